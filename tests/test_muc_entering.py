"""Multi-user chat: discovery (XEP-0045 §6) and entering a room (§7.1, §7.2)."""

from __future__ import annotations

import re

import pytest

import xmppd
from tests.dialogue import Client, difference, parse
from tests.muc import (
    ADDRESSES,
    CONFIG,
    COVEN,
    DELAY,
    HOST,
    MUC,
    NO_SUBJECT,
    OCCUPANT,
    SERVICE,
    STANZA_ID,
    USER,
    configures,
    configuring,
    coven,
    enter,
    enters,
    forget,
    gone,
    person,
    refused,
    result,
    said,
    saying,
    shown,
    status,
    witch,
)
from tests.servers import MemoryServer, ProcessServer

pytestmark = pytest.mark.config(**CONFIG)
INFO = "http://jabber.org/protocol/disco#info"
ITEMS = "http://jabber.org/protocol/disco#items"


def asking(namespace: str, to: str, id: str = "d1", node: str = "") -> str:
    """A question of service discovery."""
    attribute = f" node='{node}'" if node else ""
    return f"<iq type='get' id='{id}' to='{to}'><query xmlns='{namespace}'{attribute}/></iq>"


def features(client: Client, to: str) -> set[str]:
    """What a service or room says that it can do."""
    client.sends(asking(INFO, to))
    info = client.receives(f"<iq type='result' id='d1'><query xmlns='{INFO}'>...</query></iq>")
    return {feature.get("var", "") for feature in info.iter(f"{{{INFO}}}feature")}


def details(client: Client) -> dict[str, list[str]]:
    """The fields of the coven's muc#roominfo."""
    client.sends(asking(INFO, COVEN))
    info = client.receives(f"<iq type='result' id='d1'><query xmlns='{INFO}'>...</query></iq>")
    fields = list(info.iter("{jabber:x:data}field"))
    return {field.get("var", ""): [value.text or "" for value in field] for field in fields}


def rooms(client: Client) -> list[tuple[str | None, str | None]]:
    """The rooms that are listed, with their names."""
    client.sends(asking(ITEMS, SERVICE))
    items = client.receives(f"<iq type='result' id='d1'><query xmlns='{ITEMS}'>...</query></iq>")
    return [(item.get("jid"), item.get("name")) for item in items.iter(f"{{{ITEMS}}}item")]


# ---- discovery (§6) ----------------------------------------------------------------------


def test_the_server_names_its_rooms_and_they_say_what_they_are(server: MemoryServer) -> None:
    """XEP0045-6.2-1"""
    hag = witch(server, "thirdwitch")
    hag.sends(asking(ITEMS, HOST))
    hag.receives(f"<iq type='result' id='d1'><query xmlns='{ITEMS}'><item jid='{SERVICE}' name='*'/></query></iq>")
    hag.sends(asking(INFO, SERVICE))
    info = hag.receives(f"<iq type='result' id='d1'><query xmlns='{INFO}'>...</query></iq>")
    assert not difference(parse(f"<identity xmlns='{INFO}' category='conference' type='text' name='*'/>")[0], info[0][0])
    assert {MUC, f"{MUC}#stable_id", "urn:xmpp:occupant-id:0"} <= features(hag, SERVICE)
    hag.sends(f"<iq type='get' id='p' to='{SERVICE}'><ping xmlns='urn:xmpp:ping'/></iq>")
    hag.receives(result("p"))


def test_public_rooms_are_listed_and_hidden_ones_are_not(server: MemoryServer) -> None:
    """XEP0045-6.3-1"""
    crone, _, hag = coven(server, roomname="A Dark Cave")
    enters(crone, "firstwitch", room=f"heath@{SERVICE}")
    assert rooms(hag) == [(COVEN, "A Dark Cave")]  # the heath is locked yet
    configures(crone, f"heath@{SERVICE}")
    assert rooms(hag) == [(COVEN, "A Dark Cave"), (f"heath@{SERVICE}", "heath")]
    configures(crone, publicroom=False)
    forget(crone, hag)
    assert rooms(hag) == [(f"heath@{SERVICE}", "heath")]
    forget(*server.cast.clients)


def test_a_long_list_of_rooms_comes_in_pages(server: MemoryServer) -> None:
    """XEP0045-6.3-1"""
    crone = witch(server, "firstwitch")
    for room in ("alls-well", "as-you-like-it", "cleopatra"):
        enters(crone, "firstwitch", room=f"{room}@{SERVICE}")
        configures(crone, f"{room}@{SERVICE}")
    page = "<set xmlns='http://jabber.org/protocol/rsm'>{}</set>"
    question = f"<query xmlns='{ITEMS}'>{page.format('<max>2</max>')}</query>"
    crone.sends(f"<iq type='get' id='d1' to='{SERVICE}'>{question}</iq>")
    answer = page.format(f"<first index='0'>alls-well@{SERVICE}</first><last>as-you-like-it@{SERVICE}</last>"
                         "<count>3</count>")  # fmt: skip
    items = "".join(f"<item jid='{room}@{SERVICE}' name='{room}'/>" for room in ("alls-well", "as-you-like-it"))
    crone.receives(f"<iq type='result' id='d1'><query xmlns='{ITEMS}'>{items}{answer}</query></iq>")


FEATURES = [
    ({}, {"muc_unsecured", "muc_public", "muc_open", "muc_unmoderated", "muc_semianonymous", "muc_temporary"}),
    ({"roomsecret": "x", "passwordprotectedroom": True}, {"muc_passwordprotected"}),
    ({"publicroom": False}, {"muc_hidden"}),
    ({"membersonly": True}, {"muc_membersonly"}),
    ({"moderatedroom": True}, {"muc_moderated"}),
    ({"whois": "anyone"}, {"muc_nonanonymous"}),
    ({"persistentroom": True}, {"muc_persistent"}),
]


@pytest.mark.parametrize(("fields", "expected"), FEATURES)
def test_a_room_says_how_it_is_configured(server: MemoryServer, fields: dict[str, object], expected: set[str]) -> None:
    """XEP0045-6.4-1, XEP0045-7.4-2"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    configures(crone, roomname="A Dark Cave", **fields)
    crone.sends(asking(INFO, COVEN))
    forget(crone)
    found = features(crone, COVEN)
    assert {MUC, f"{MUC}#stable_id", f"{MUC}#self-ping-optimization", "urn:xmpp:occupant-id:0", "urn:xmpp:sid:0",
            "vcard-temp"} | expected <= found  # fmt: skip
    assert len({name for name in found if name.startswith("muc_")}) == 6
    crone.sends(asking(INFO, COVEN))
    info = crone.receives("<iq ...>...</iq>")
    assert not difference(parse(f"<identity xmlns='{INFO}' category='conference' type='text' name='A Dark Cave'/>")[0],
                          info[0][0])  # fmt: skip


def test_a_room_tells_more_about_itself_to_those_who_may_enter(server: MemoryServer) -> None:
    """XEP0045-6.4-2: and what goes on in a closed one only to those who belong to it (§14.4)"""
    crone, wicca, hag = coven(server, roomdesc="The place for all good witches!", lang="en", maxhistoryfetch=50)
    crone.sends(f"<message type='groupchat' to='{COVEN}'><subject>Spells</subject></message>")
    forget(crone, wicca, hag)
    found = details(hag)
    assert found["FORM_TYPE"] == [f"{MUC}#roominfo"]
    assert found["muc#roominfo_description"] == ["The place for all good witches!"]
    assert (found["muc#roominfo_subject"], found["muc#roominfo_occupants"]) == (["Spells"], ["3"])
    assert (found["muc#roominfo_lang"], found["muc#maxhistoryfetch"]) == (["en"], ["50"])
    assert found["muc#roominfo_subjectmod"] == ["0"]
    configures(crone, membersonly=True)
    forget(crone, wicca, hag)
    assert "muc#roominfo_subject" not in details(hag)
    assert details(wicca)["muc#roominfo_subject"] == ["Spells"]


@pytest.mark.parametrize("namespace", [INFO, ITEMS])
def test_asking_about_a_room_does_not_make_it(server: MemoryServer, namespace: str) -> None:
    """XEP0045-6.4-3"""
    crone = witch(server, "firstwitch")
    for _ in range(2):
        crone.sends(asking(namespace, COVEN))
        crone.receives(refused("item-not-found", "d1"))


@pytest.mark.parametrize("fields", [{"publicroom": False}, {"membersonly": True},
                                    {"passwordprotectedroom": True, "roomsecret": "x"}])  # fmt: skip
def test_who_is_in_a_closed_room_is_not_for_everybody(server: MemoryServer, fields: dict[str, object]) -> None:
    """XEP0045-6.5-1, S51"""
    crone, wicca, hag = coven(server)
    hecate = witch(server, "hecate")
    everybody = "".join(f"<item jid='{COVEN}/{nick}'/>" for nick in ("firstwitch", "secondwitch", "thirdwitch"))
    hecate.sends(asking(ITEMS, COVEN))
    hecate.receives(f"<iq type='result' id='d1'><query xmlns='{ITEMS}'>{everybody}</query></iq>")
    configures(crone, **fields)
    forget(crone, wicca, hag)
    hecate.sends(asking(ITEMS, COVEN))
    hecate.receives(f"<iq type='result' id='d1'><query xmlns='{ITEMS}'/></iq>")
    wicca.sends(asking(ITEMS, COVEN))
    assert len(wicca.receives("<iq ...>...</iq>")[0]) >= 2


def test_occupants_are_asked_by_occupants_only(server: MemoryServer) -> None:
    """XEP0045-6.6-1"""
    _, wicca, hag = coven(server)
    hecate = witch(server, "hecate")
    for namespace in (INFO, ITEMS):
        hecate.sends(asking(namespace, f"{COVEN}/thirdwitch"))
        hecate.receives(refused("bad-request", "d1"))
    wicca.sends(asking(INFO, f"{COVEN}/thirdwitch"))
    question = hag.receives(f"<iq type='get' id='*' from='{COVEN}/secondwitch'><query xmlns='{INFO}'/></iq>")
    hag.sends(f"<iq type='result' id='{question.get('id')}' to='{COVEN}/secondwitch'><query xmlns='{INFO}'/></iq>")
    wicca.receives(f"<iq type='result' id='d1' from='{COVEN}/thirdwitch'><query xmlns='{INFO}'/></iq>")


def test_nothing_is_filtered(server: MemoryServer) -> None:
    """XEP0045-18.1.1-1"""
    _, _, hag = coven(server)
    hag.sends(asking(INFO, COVEN, node=f"{MUC}#traffic"))
    hag.receives(refused("service-unavailable", "d1"))


# ---- the order of events (§7.1) ----------------------------------------------------------


def test_who_enters_learns_everything_in_order(server: MemoryServer) -> None:
    """XEP0045-7.1-1, XEP0045-7.2.2-1, XEP0045-7.2.2-2, XEP0045-7.2.13-1, XEP0045-7.2.15-1, XEP0045-7.2.16-1,
    XEP0045-5.1-3, XEP0045-4.1-1, XEP0045-7.2.4-1
    """
    crone, wicca, _ = coven(server)
    crone.sends(saying("Thrice the brinded cat hath mew'd."))
    wicca.sends(f"<message type='groupchat' to='{COVEN}'><subject>Spells</subject></message>")
    forget(*server.cast.clients)
    hecate = witch(server, "hecate")
    hecate.sends(enter("hecate", more="<show>chat</show>"))
    crone.sends(saying("Hail!"))
    hecate.receives(
        shown("firstwitch", "owner", "moderator"),
        shown("secondwitch", "admin", "moderator"),
        shown("thirdwitch"),
        shown("hecate", "none", "participant", 110, jid=True, id="n13mt3l", content="<show>chat</show>"),
        said("firstwitch", "Thrice the brinded cat hath mew'd.", more=DELAY),
        f"<message type='groupchat' from='{COVEN}/secondwitch'><subject>Spells</subject>{OCCUPANT}{STANZA_ID}{DELAY}"
        "</message>",
        said("firstwitch", "Hail!"),
    )
    crone.receives(shown("hecate", jid=True, content="<show>chat</show>"), said("firstwitch", "Hail!"))
    forget(*server.cast.clients)


def test_moderators_see_addresses_and_others_do_not(server: MemoryServer) -> None:
    """XEP0045-7.2.4-1, XEP0045-17.3-4"""
    crone, wicca, hag = coven(server)
    hecate = witch(server, "hecate")
    enters(hecate, "hecate")
    crone.receives(shown("hecate", jid=True))
    wicca.receives(shown("hecate", jid=True))
    hag.receives(shown("hecate"))
    assert all(ADDRESSES["firstwitch"].partition("/")[0] not in xmppd.serialize(stanza) for stanza in hag.unread())


def test_in_a_non_anonymous_room_everybody_sees_addresses(server: MemoryServer) -> None:
    """XEP0045-7.2.3-1, XEP0045-14.3-1"""
    _, _, hag = coven(server, whois="anyone")
    hecate = witch(server, "hecate")
    hecate.sends(enter("hecate"))
    hecate.receives(
        shown("firstwitch", "owner", "moderator", jid=True),
        shown("secondwitch", "admin", "moderator", jid=True),
        shown("thirdwitch", jid=True),
        shown("hecate", "none", "participant", 100, 110, jid=True, id="n13mt3l"),
        NO_SUBJECT,
    )
    hag.receives(shown("hecate", jid=True))
    forget(*server.cast.clients)


def test_a_logged_room_warns(server: MemoryServer) -> None:
    """XEP0045-7.2.12-1, XEP0045-14.3-1"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    configures(crone, enablelogging=True)
    forget(crone)
    hag = witch(server, "thirdwitch")
    hag.sends(enter("thirdwitch"))
    hag.receives(shown("firstwitch", "owner", "moderator"),
                 shown("thirdwitch", "none", "participant", 110, 170, jid=True, id="n13mt3l"), NO_SUBJECT)  # fmt: skip
    forget(crone)


def test_a_nickname_that_was_prepared_is_told_so(server: MemoryServer) -> None:
    """XEP0045-7.2.2-3, XEP0045-17.1-1"""
    crone = witch(server, "firstwitch")
    crone.sends(enter("\uff26irst\u00adwitch"))
    crone.receives(shown("Firstwitch", "owner", "moderator", 110, 201, 210, jid="*", id="n13mt3l"), NO_SUBJECT)
    crone.sends(f"<presence id='ifd1c35' to='{COVEN}/O\u00adldhag'/>")
    crone.receives(gone_with_303("Firstwitch", "Oldhag", "owner", "moderator"),
                   shown("Oldhag", "owner", "moderator", 110, 210, jid="*", id="ifd1c35"))  # fmt: skip


def gone_with_303(nick: str, new: str, affiliation: str, role: str) -> str:
    """One's own presence, when the nickname changes."""
    return shown(nick, affiliation, role, 110, 303, jid="*", type="unavailable", new=new)


# ---- how to enter, and how not (§7.2.1) ----------------------------------------------------


def test_nobody_enters_without_a_nickname(server: MemoryServer) -> None:
    """XEP0045-7.2.1-2, XEP0045-7.2.1-4"""
    hag = witch(server, "thirdwitch")
    hag.sends(f"<presence id='273hs51g' to='{COVEN}'><x xmlns='{MUC}'/></presence>")
    hag.receives(f"<presence type='error' id='273hs51g' from='{COVEN}'><x xmlns='{MUC}'/><error type='modify'>"
                 "<jid-malformed .../></error></presence>")  # fmt: skip


@pytest.mark.parametrize("type", ["unavailable", "probe", "subscribe", "unsubscribed", "error"])
def test_presence_with_a_type_enters_no_room(server: MemoryServer, type: str) -> None:
    """XEP0045-7.2.1-1, XEP0045-17.3-1, XEP0045-17.3-2"""
    crone, _, hag = coven(server)
    hecate = witch(server, "hecate")
    hecate.sends(f"<presence type='{type}' to='{COVEN}/hecate'><x xmlns='{MUC}'/></presence>")
    hecate.receives_nothing()
    crone.receives_nothing()
    if type != "unavailable":
        hag.sends(f"<presence type='{type}' to='{COVEN}/thirdwitch'/>")
        crone.receives_nothing()
        hag.sends(saying("Still here."))
        crone.receives(said("thirdwitch", "Still here."))
    forget(*server.cast.clients)


def test_who_is_not_in_the_room_but_believes_so_is_told(server: MemoryServer) -> None:
    """XEP0045-7.2.18-1"""
    _, _, hag = coven(server)
    hecate = witch(server, "hecate")
    for room in (COVEN, f"heath@{SERVICE}"):
        hecate.sends(f"<presence to='{room}/hecate'><show>away</show></presence>")
        hecate.receives(f"<presence type='unavailable' from='{room}/hecate'><x xmlns='{USER}'>"
                        "<item affiliation='none' role='none'><reason>You are not in the room.</reason></item>"
                        f"{status(110, 307, 333)}</x></presence>")  # fmt: skip
    hag.receives_nothing()


def test_entering_again_is_a_full_synchronisation(server: MemoryServer) -> None:
    """XEP0045-7.2.1-3"""
    crone, wicca, hag = coven(server)
    hag.sends(saying("Harpier cries"))
    forget(crone, wicca, hag)
    everything = [
        shown("firstwitch", "owner", "moderator"),
        shown("secondwitch", "admin", "moderator"),
        shown("thirdwitch", "none", "participant", 110, jid=True, id="n13mt3l"),
        said("thirdwitch", "Harpier cries", more=DELAY),
        NO_SUBJECT,
    ]
    hag.sends(enter("thirdwitch"))
    hag.receives(*everything)
    crone.receives_nothing()
    hag.sends(enter("thirdwitch", more="<show>away</show>"))
    crone.receives(shown("thirdwitch", jid=True, content="<show>away</show>"))
    assert len(hag.receives_anything()) == 5
    hag.sends(enter("oldhag", "<history maxstanzas='0'/>"))
    crone.receives(shown("thirdwitch", jid=True, type="unavailable", new="oldhag", after=status(303)),
                   shown("oldhag", jid=ADDRESSES["thirdwitch"]))  # fmt: skip
    assert [stanza.get("from") for stanza in hag.receives_anything()] == [
        f"{COVEN}/thirdwitch", f"{COVEN}/firstwitch", f"{COVEN}/secondwitch", f"{COVEN}/oldhag", COVEN]  # fmt: skip
    forget(wicca)


# ---- who may not enter (§7.2.5 to §7.2.11) -------------------------------------------------


@pytest.mark.parametrize(("fields", "inner", "condition", "type"), [
    ({"passwordprotectedroom": True, "roomsecret": "cauldronburn"}, "", "not-authorized", "auth"),
    ({"passwordprotectedroom": True, "roomsecret": "cauldronburn"}, "<password>x</password>", "not-authorized", "auth"),
    ({"membersonly": True}, "", "registration-required", "auth"),
    ({"maxusers": 2}, "", "service-unavailable", "wait"),
])  # fmt: skip
def test_closed_doors(server: MemoryServer, fields: dict[str, object], inner: str, condition: str, type: str) -> None:
    """XEP0045-7.2.5-1, XEP0045-7.2.6-1, XEP0045-7.2.9-1, XEP0045-7.2.1-4"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    configures(crone, roomadmins=[f"wiccarocks@{HOST}"], **fields)
    wicca = witch(server, "secondwitch")
    wicca.sends(enter("secondwitch", "<password>cauldronburn</password>"))
    forget(crone, wicca)
    hag = witch(server, "thirdwitch")
    hag.sends(enter("thirdwitch", inner))
    hag.receives(f"<presence type='error' id='n13mt3l' from='{COVEN}/thirdwitch'><x xmlns='{MUC}'/><error type='{type}'>"
                 f"<{condition} .../></error></presence>")  # fmt: skip
    crone.receives_nothing()


def test_the_right_password_opens(server: MemoryServer) -> None:
    """XEP0045-7.2.5-1"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    configures(crone, passwordprotectedroom=True, roomsecret="cauldronburn")
    hag = witch(server, "thirdwitch")
    assert len(enters(hag, "thirdwitch", "<password>cauldronburn</password>")) == 3
    forget(crone)


@pytest.mark.parametrize("banned", [f"hag66@{HOST}", HOST])
def test_outcasts_stay_out(server: MemoryServer, banned: str) -> None:
    """XEP0045-7.2.7-1, XEP0045-9.2-3"""
    crone, wicca, hag = coven(server)
    crone.sends(f"<iq type='set' id='b' to='{COVEN}'><query xmlns='{MUC}#admin'>"
                f"<item affiliation='outcast' jid='{banned}'/></query></iq>")  # fmt: skip
    forget(crone, wicca, hag)
    hag.sends(enter("thirdwitch"))
    hag.receives(refused("forbidden", "n13mt3l", "presence"))
    wicca.sends(saying("Whoever is known by name comes before the domain."))
    crone.receives(said("secondwitch", "*"))
    wicca.receives(said("secondwitch", "*"))


NICKS = ["firstwitch", "FirstWitch", "\uff26irstwitch", "firstwitch\u00a0", "first\u200bwitch", "First\u00adwitch"]


@pytest.mark.parametrize("nick", NICKS)
def test_nobody_takes_the_nickname_of_somebody_else(server: MemoryServer, nick: str) -> None:
    """XEP0045-7.2.8-1, XEP0045-7.6-2, S50"""
    crone, _, hag = coven(server)
    hecate = witch(server, "hecate")
    hecate.sends(enter(nick))
    hecate.receives(refused("conflict", "n13mt3l", "presence"))
    hag.sends(f"<presence id='ifd1c35' to='{COVEN}/{nick}'/>")
    hag.receives(refused("conflict", "ifd1c35", "presence"))
    crone.receives_nothing()
    hag.sends(saying("I am still thirdwitch."))
    crone.receives(said("thirdwitch", "*"))
    forget(*server.cast.clients)


@pytest.mark.parametrize("nick", ["\u3164" * 2, "\u2800", "\ufe0e", "x" * 300])
def test_impossible_nicknames(server: MemoryServer, nick: str) -> None:
    """XEP0045-17.1-1, S50: invisible ones; and those that only spoil the screen"""
    hag = coven(server).hag
    hecate = witch(server, "hecate")
    hecate.sends(enter(nick))
    error = hecate.receives("<presence type='error' ...>...</presence>")
    assert error.find(".//{*}not-acceptable") is not None or error.find(".//{*}jid-malformed") is not None
    hag.receives_nothing()


@pytest.mark.parametrize("address", [f"a b@{SERVICE}/x", f"{COVEN}/ ", f"@{SERVICE}/x"])
def test_addresses_that_are_none(server: MemoryServer, address: str) -> None:
    """XEP0045-17.1-1"""
    hag = witch(server, "thirdwitch")
    hag.sends(f"<presence id='n13mt3l' to='{address}'><x xmlns='{MUC}'/></presence>")
    error = hag.receives("<presence type='error' ...>...</presence>")
    assert error.find(".//{*}jid-malformed") is not None


def test_a_full_room_has_places_for_its_admins(server: MemoryServer) -> None:
    """XEP0045-7.2.9-2"""
    crone, _wicca, _ = coven(server)
    configures(crone, maxusers=1, roomadmins=[f"wiccarocks@{HOST}", f"hecate@{HOST}"])
    hecate = witch(server, "hecate")
    assert shown_to_self(enters(hecate, "hecate"))
    forget(*server.cast.clients)


def shown_to_self(stanzas: list) -> bool:  # type: ignore[type-arg]
    """Whether there is a presence with status 110."""
    return any(element.get("code") == "110" for stanza in stanzas for element in stanza.iter(f"{{{USER}}}status"))


def test_one_person_with_two_clients_is_one_occupant(server: MemoryServer) -> None:
    """XEP0045-7.2.8-2, XEP0045-7.5-1, XEP0045-7.14-1"""
    crone, _, hag = coven(server)
    broom = person(server, f"hag66@{HOST}/broom")
    broom.sends(enter("thirdwitch", more="<show>dnd</show>"))
    crone.receives(shown("thirdwitch", jid=f"hag66@{HOST}/broom", content="<show>dnd</show>"))
    hag.receives(shown("thirdwitch", "none", "participant", 110, jid="*", content="<show>dnd</show>"))
    broom.receives(shown("firstwitch", "owner", "moderator"), shown("secondwitch", "admin", "moderator"),
                   shown("thirdwitch", "none", "participant", 110, jid="*", content="<show>dnd</show>", id="n13mt3l"),
                   NO_SUBJECT)  # fmt: skip
    crone.sends(saying("Hail!"))
    for client in (crone, hag, broom):
        client.receives(said("firstwitch", "Hail!"))
    broom.sends(saying("Hail thou!"))
    for client in (crone, hag, broom):
        client.receives(said("thirdwitch", "Hail thou!"))
    crone.sends(f"<message type='chat' to='{COVEN}/thirdwitch'><body>psst</body></message>")
    for client in (hag, broom):
        client.receives(f"<message type='chat' from='{COVEN}/firstwitch'><body>psst</body>{OCCUPANT}<x xmlns='{USER}'/>"
                        "</message>")  # fmt: skip
    broom.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")
    broom.receives(gone("thirdwitch", "none", 110, jid="*"))
    crone.receives(shown("thirdwitch", jid=f"hag66@{HOST}/pda"))  # the other client stands for her now
    hag.receives(shown("thirdwitch", "none", "participant", 110, jid="*"))
    hag.disconnects()
    crone.receives(gone("thirdwitch", jid=f"hag66@{HOST}/pda"))
    forget(*server.cast.clients)


def test_a_new_nickname_is_that_of_all_clients_and_none_becomes_a_ghost(server: MemoryServer) -> None:
    """XEP0045-7.6-1, XEP0045-7.14-2, XEP0045-17.3-6"""
    crone, _, hag = coven(server)
    broom = person(server, f"hag66@{HOST}/broom")
    enters(broom, "thirdwitch")
    forget(*server.cast.clients)
    hag.sends(f"<presence to='{COVEN}/oldhag'/>")
    for client in (hag, broom):
        client.receives(gone_with_303("thirdwitch", "oldhag", "none", "participant"),
                        shown("oldhag", "none", "participant", 110, jid="*"))  # fmt: skip
    forget(*server.cast.clients)
    hag.disconnects()
    broom.disconnects()  # it has never sent presence to the new address itself
    crone.receives(shown("oldhag", jid="*"), gone("oldhag", jid="*"))
    forget(*server.cast.clients)


def test_two_nicknames_of_one_person_become_one(server: MemoryServer) -> None:
    """XEP0045-7.6-1, XEP0045-7.2.8-2"""
    crone, _, hag = coven(server)
    broom = person(server, f"hag66@{HOST}/broom")
    enters(broom, "oldhag")
    forget(*server.cast.clients)
    broom.sends(f"<presence to='{COVEN}/thirdwitch'/>")
    crone.receives(shown("oldhag", "none", "participant", 303, jid="*", type="unavailable", new="thirdwitch"),
                   shown("thirdwitch", jid=f"hag66@{HOST}/broom"))  # fmt: skip
    forget(*server.cast.clients)
    hag.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")
    broom.sends(saying("I am still here."))
    crone.receives(said("thirdwitch", "I am still here."))
    forget(*server.cast.clients)


def test_a_locked_room_does_not_exist_for_others(server: MemoryServer) -> None:
    """XEP0045-7.2.10-1, XEP0045-17.2-2, XEP0045-10.1.1-2, XEP0045-7.2.11-1"""
    crone, hag = witch(server, "firstwitch"), witch(server, "thirdwitch")
    crone.sends(enter("firstwitch"))
    crone.receives(shown("firstwitch", "owner", "moderator", 110, 201, jid=True, id="n13mt3l"), NO_SUBJECT)
    hag.sends(enter("thirdwitch"))
    hag.receives(refused("item-not-found", "n13mt3l", "presence"))
    hag.sends(saying("Is there anybody?", id="m"))
    hag.receives(refused("item-not-found", "m", "message"))
    hag.sends(asking(INFO, COVEN))
    hag.receives(refused("item-not-found", "d1"))
    hag.sends(saying("Nor here?", room=f"heath@{SERVICE}", id="m"))
    hag.receives(refused("item-not-found", "m", "message"))
    configures(crone)
    assert shown_to_self(enters(hag, "thirdwitch"))
    forget(crone)


# ---- history (§7.2.14) -----------------------------------------------------------------


def bodies(stanzas: list) -> list[str]:  # type: ignore[type-arg]
    """What was said earlier, of all that came."""
    return [stanza.findtext("{jabber:client}body") for stanza in stanzas if stanza.find("{urn:xmpp:delay}delay") is not None
            and stanza.find("{jabber:client}body") is not None]  # fmt: skip


@pytest.mark.parametrize(("history", "expected"), [
    ("", ["1", "2", "3", "4", "5"]),
    ("<history maxstanzas='20'/>", ["1", "2", "3", "4", "5"]),
    ("<history maxstanzas='2'/>", ["4", "5"]),
    ("<history maxstanzas='0'/>", []),
    ("<history maxchars='0'/>", []),
    ("<history maxchars='65000'/>", ["1", "2", "3", "4", "5"]),
    ("<history seconds='180'/>", ["1", "2", "3", "4", "5"]),
    ("<history seconds='999999999999'/>", ["1", "2", "3", "4", "5"]),
    ("<history since='1970-01-01T00:00:00Z'/>", ["1", "2", "3", "4", "5"]),
    ("<history since='2970-01-01T00:00:00Z' maxstanzas='3' seconds='0'/>", None),
    ("<history since='1970-01-01T00:00:00Z' maxstanzas='1' maxchars='65000'/>", ["5"]),
])  # fmt: skip
def test_newcomers_choose_how_much_they_hear(server: MemoryServer, history: str, expected: list[str] | None) -> None:
    """XEP0045-7.2.14-1"""
    crone, _, _ = coven(server)
    crone.sends("".join(saying(str(number)) for number in range(1, 6)))
    hecate = witch(server, "hecate")
    came = bodies(enters(hecate, "hecate", history))
    assert came == expected if expected is not None else len(came) <= 3
    forget(*server.cast.clients)


def test_history_is_counted_in_whole_stanzas(server: MemoryServer) -> None:
    """XEP0045-7.2.14-1"""
    crone, _, _ = coven(server)
    crone.sends("".join(saying(str(number)) for number in range(1, 6)))
    hecate = witch(server, "hecate")
    messages = [data for data in received_raw(hecate, "hecate") if "<delay" in data]
    two = len(messages[-1]) + len(messages[-2])
    for limit, expected in ((two, ["4", "5"]), (two - 1, ["5"]), (len(messages[-1]) - 1, [])):
        hecate.sends(f"<presence type='unavailable' to='{COVEN}/hecate'/>")
        forget(hecate)
        assert bodies(enters(hecate, "hecate", f"<history maxchars='{limit}'/>")) == expected
    forget(*server.cast.clients)


def received_raw(client: Client, nick: str) -> list[str]:
    """Enter, and return the messages as they stood on the wire."""
    before = len(client.transcript)
    enters(client, nick)
    wire = "".join(line.removeprefix("S: ") for line in list(client.transcript)[before:] if line.startswith("S: "))
    return re.findall("<message.*?</message>", wire)


@pytest.mark.parametrize("history", ["maxchars='-1'", "maxstanzas='many'", "seconds=''", "since='yesterday'",
                                     "since='2020-01-01T00:00:00'"])  # fmt: skip
def test_a_wish_that_makes_no_sense_lets_nobody_in(server: MemoryServer, history: str) -> None:
    """XEP0045-7.2.14-1: refused before anybody has seen anything"""
    crone, _, _ = coven(server)
    hecate = witch(server, "hecate")
    hecate.sends(enter("hecate", f"<history {history}/>"))
    hecate.receives(refused("bad-request", "n13mt3l", "presence"))
    crone.receives_nothing()


def test_the_room_bounds_its_history(server: MemoryServer) -> None:
    """XEP0045-7.2.14-1, XEP0045-10.2-5"""
    crone, _, hag = coven(server, maxhistoryfetch=2)
    crone.sends("".join(saying(str(number)) for number in range(1, 6)))
    crone.sends(saying("psst", "<no-store xmlns='urn:xmpp:hints'/>"))
    hag.sends(f"<message type='groupchat' to='{COVEN}'><composing xmlns='http://jabber.org/protocol/chatstates'/></message>")
    hecate = witch(server, "hecate")
    assert bodies(enters(hecate, "hecate", "<history maxstanzas='20'/>")) == ["4", "5"]
    forget(*server.cast.clients)


def test_the_subject_comes_last_even_when_it_is_empty(server: MemoryServer) -> None:
    """XEP0045-7.2.15-1, XEP0045-8.1-1: with the moment of its change, also when it was taken away"""
    crone, _, _ = coven(server)
    crone.sends(f"<message type='groupchat' to='{COVEN}'><subject>Spells</subject></message>")
    crone.sends(f"<message type='groupchat' to='{COVEN}'><subject/></message>")
    hecate = witch(server, "hecate")
    last = enters(hecate, "hecate")[-1]
    expected = f"<message to='*' type='groupchat' from='{COVEN}/firstwitch'><subject/>{OCCUPANT}{STANZA_ID}{DELAY}</message>"
    assert not difference(parse(expected)[0], last)
    forget(*server.cast.clients)


# ---- creation (§10.1.1) ------------------------------------------------------------------


@pytest.mark.config(**{**CONFIG, "muc": {"host": "chat", "create": "admins"}, "admins": [f"crone1@{HOST}"]})
def test_rooms_may_be_for_admins_to_make(server: MemoryServer) -> None:
    """XEP0045-10.1.1-1, XEP0045-7.2.11-1"""
    hag = witch(server, "thirdwitch")
    hag.sends(enter("thirdwitch"))
    hag.receives(refused("not-allowed", "n13mt3l", "presence"))
    crone = witch(server, "firstwitch")
    assert shown_to_self(enters(crone, "firstwitch"))


@pytest.mark.config(**{**CONFIG, "limits": {"rooms_per_account": 2, "rooms": 3}})
def test_nobody_makes_rooms_without_end(server: MemoryServer) -> None:
    """S54"""
    crone = witch(server, "firstwitch")
    for room in ("a", "b"):
        enters(crone, "x", room=f"{room}@{SERVICE}")
    crone.sends(enter("x", room=f"c@{SERVICE}"))
    crone.receives(refused("resource-constraint", "n13mt3l", "presence"))
    hag = witch(server, "thirdwitch")
    enters(hag, "x", room=f"c@{SERVICE}")
    hag.sends(enter("x", room=f"d@{SERVICE}"))
    hag.receives(refused("resource-constraint", "n13mt3l", "presence"))
    crone.sends(f"<presence type='unavailable' to='a@{SERVICE}/x'/>")  # never configured: gone
    forget(crone)
    assert shown_to_self(enters(crone, "x", room=f"e@{SERVICE}"))


@pytest.mark.wire
def test_a_room_on_a_real_server(server: ProcessServer, romeo: Client, juliet: Client) -> None:
    """XEP0045-7.1-1, XEP0045-7.4-1"""
    room = "verona@chat.example.org"
    romeo.sends(enter("Romeo", room=room))
    romeo.receives(shown("Romeo", "owner", "moderator", 110, 201, jid=romeo.jid, id="n13mt3l", room=room),
                   f"<message type='groupchat' from='{room}'><subject/></message>")  # fmt: skip
    romeo.sends(configuring(room))
    romeo.receives(result("create2"))
    juliet.sends(enter("Juliet", room=room))
    romeo.receives(shown("Juliet", jid=juliet.jid, room=room))
    forget(juliet)
    juliet.sends(saying("O Romeo", room=room))
    message = f"<message type='groupchat' from='{room}/Juliet'><body>O Romeo</body>...</message>"
    for client in (romeo, juliet):
        came = client.receives("<message ...>...</message>")
        assert (came.get("from"), came[0].text) == (f"{room}/Juliet", "O Romeo"), message
    juliet.disconnects()
    romeo.receives(gone("Juliet", jid="*", room=room))
