"""Multi-user chat: what moderators, admins and owners do (XEP-0045 §5, §8 to §10)."""

from __future__ import annotations

import pytest

import xmppd
from tests.dialogue import Client
from tests.muc import (
    ADDRESSES,
    ADMIN,
    CONFIG,
    COVEN,
    FORM,
    HOST,
    MUC,
    NO_SUBJECT,
    OWNER,
    SERVICE,
    USER,
    administering,
    configures,
    configuring,
    coven,
    enter,
    enters,
    forget,
    gone,
    listed,
    listing,
    person,
    refused,
    result,
    said,
    saying,
    shown,
    status,
    witch,
)
from tests.servers import MemoryServer

pytestmark = pytest.mark.config(**CONFIG)
BY_CRONE, BY_WICCA = "<actor nick='firstwitch'/>", "<actor nick='secondwitch'/>"


def affiliate(client: Client, *people: str) -> None:
    """Let an owner or admin set affiliations: `"member hecate"`; what comes of it stays unread."""
    items = [f"affiliation='{each.split()[0]}' jid='{each.split()[1]}@{HOST}'" for each in people]
    client.sends(administering(*items))
    client.passes_barrier()
    assert any(stanza.get("id") == "admin1" and stanza.get("type") == "result" for stanza in client.unread())


# ---- moderators (§8) -----------------------------------------------------------------------


def test_a_kick(server: MemoryServer) -> None:
    """XEP0045-8.2-1, XEP0045-17.3-5: the moderator hears of the success first"""
    crone, wicca, hag = coven(server)
    reason = "<reason>Avaunt, you cullion!</reason>"
    wicca.sends(administering(f"<item nick='thirdwitch' role='none'>{reason}</item>", id="kick1"))
    kicked = {"jid": True, "because": BY_WICCA + reason}
    wicca.receives(result("kick1"), gone("thirdwitch", "none", 307, **kicked))
    hag.receives(gone("thirdwitch", "none", 110, 307, **kicked))
    crone.receives(gone("thirdwitch", "none", 307, **kicked))
    hag.sends(saying("What?", id="m"))
    hag.receives(refused("not-acceptable", "m", "message"))
    hag.sends(enter("thirdwitch"))  # a kick is no ban
    crone.receives(shown("thirdwitch", jid=True))
    forget(*server.cast.clients)


@pytest.mark.parametrize(("nick", "condition"), [("firstwitch", "not-allowed"), ("nobody", "item-not-found")])
def test_kicks_that_fail(server: MemoryServer, nick: str, condition: str) -> None:
    """XEP0045-8.2-2, XEP0045-8.2-3"""
    crone, wicca, _ = coven(server)
    wicca.sends(administering(f"nick='{nick}' role='none'"))
    wicca.receives(refused(condition))
    crone.receives_nothing()


@pytest.mark.parametrize("item", ["nick='firstwitch' role='none'", "nick='secondwitch' role='visitor'",
                                  "nick='thirdwitch' role='moderator'", "nick='nobody' role='none'"])  # fmt: skip
def test_only_moderators_govern_roles(server: MemoryServer, item: str) -> None:
    """XEP0045-8-1"""
    crone, _, hag = coven(server)
    hecate = witch(server, "hecate")
    for client in (hag, hecate):
        client.sends(administering(item))
        client.receives(refused("forbidden"))
    crone.receives_nothing()


def test_voice_is_granted_and_revoked(server: MemoryServer) -> None:
    """XEP0045-8.3-1, XEP0045-8.4-1, XEP0045-5.1.3-1, XEP0045-5.1.2-1"""
    crone, wicca, hag = coven(server, moderatedroom=True)
    for role, reason in (("participant", "A worthy witch indeed!"), ("visitor", "Not so worthy after all!")):
        crone.sends(administering(f"<item nick='thirdwitch' role='{role}'><reason>{reason}</reason></item>", id="voice1"))
        because = f"{BY_CRONE}<reason>{reason}</reason>"
        crone.receives(result("voice1"), shown("thirdwitch", "none", role, jid=True, because=because))
        wicca.receives(shown("thirdwitch", "none", role, jid=True, because=because))
        hag.receives(shown("thirdwitch", "none", role, 110, jid=True, because=because))
    hag.sends(f"<presence to='{COVEN}/thirdwitch'/>")  # and so it stays
    crone.receives(shown("thirdwitch", "none", "visitor", jid=True))
    forget(*server.cast.clients)


@pytest.mark.parametrize(("who", "nick"), [("crone", "secondwitch"), ("wicca", "firstwitch"), ("wicca", "secondwitch")])
@pytest.mark.parametrize("role", ["visitor", "participant"])
def test_admins_and_owners_keep_their_role(server: MemoryServer, who: str, nick: str, role: str) -> None:
    """XEP0045-8.4-1, XEP0045-9.7-1"""
    witches = coven(server, moderatedroom=True)
    actor: Client = getattr(witches, who)
    actor.sends(administering(f"nick='{nick}' role='{role}'"))
    actor.receives(refused("not-allowed"))


def test_moderators_are_made_by_admins(server: MemoryServer) -> None:
    """XEP0045-9.6-1, XEP0045-9.7-1, XEP0045-9.8-1, XEP0045-5.1.3-2"""
    crone, wicca, hag = coven(server)
    wicca.sends(administering("nick='thirdwitch' role='moderator'", id="mod1"))
    wicca.receives(result("mod1"), shown("thirdwitch", "none", "moderator", jid=True, because=BY_WICCA))
    hag.receives(shown("thirdwitch", "none", "moderator", 110, jid=True, because=BY_WICCA))
    forget(crone)
    hag.sends(listing("role='moderator'"))
    hag.receives(listed(*(f"nick='{nick}' role='moderator' affiliation='{affiliation}' jid='{ADDRESSES[nick]}'"
                          for nick, affiliation in (("firstwitch", "owner"), ("secondwitch", "admin"),
                                                    ("thirdwitch", "none")))))  # fmt: skip
    hecate = witch(server, "hecate")
    enters(hecate, "hecate")
    hag.sends(administering("nick='hecate' role='moderator'"))  # may not
    hag.receives(shown("hecate", jid=True), refused("forbidden"))
    hag.sends(administering("nick='secondwitch' role='participant'"))
    hag.receives(refused("not-allowed"))
    hag.sends(administering("nick='hecate' role='visitor'"))  # may
    hag.receives(result(), shown("hecate", "none", "visitor", jid=True, because="<actor nick='thirdwitch'/>"))
    forget(crone, wicca, hecate)
    wicca.sends(administering("nick='thirdwitch' role='participant'", id="mod2"))
    hag.receives(shown("thirdwitch", "none", "participant", 110, jid=True, because=BY_WICCA))
    forget(*server.cast.clients)


def test_several_roles_at_once_or_none(server: MemoryServer) -> None:
    """XEP0045-8.5-1, XEP0045-8.5-2, XEP0045-17.4-4"""
    crone, wicca, hag = coven(server)
    hecate = witch(server, "hecate")
    enters(hecate, "hecate")
    forget(*server.cast.clients)
    crone.sends(administering("nick='thirdwitch' role='visitor'", "nick='secondwitch' role='visitor'"))
    crone.receives(refused("not-allowed"))
    hag.receives_nothing()
    crone.sends(listing("role='participant'", id="voice3"))
    crone.receives(listed(*(f"nick='{nick}' role='participant' affiliation='none' jid='{ADDRESSES[nick]}'"
                            for nick in ("thirdwitch", "hecate")), id="voice3"))  # fmt: skip
    crone.sends(administering("nick='thirdwitch' role='visitor'", "nick='hecate' role='visitor'", id="voice4"))
    crone.receives(result("voice4"), shown("thirdwitch", "none", "visitor", jid=True, because=BY_CRONE),
                   shown("hecate", "none", "visitor", jid=True, because=BY_CRONE))  # fmt: skip
    forget(wicca, hag, hecate)


BAD = [
    "", "<item/>", "<item nick='thirdwitch'/>", "<item nick='thirdwitch' role='king'/>",
    "<item nick='thirdwitch' role='none' affiliation='none'/>", "<item role='none'/>",
    f"<item jid='hag66@{HOST}' affiliation='king'/>", "<item affiliation='member'/>",
    "<item nick='thirdwitch' role='none'/><other xmlns='urn:x'/>", "<other xmlns='urn:x'/>",
]  # fmt: skip


@pytest.mark.parametrize("items", BAD)
def test_requests_that_make_no_sense(server: MemoryServer, items: str) -> None:
    """XEP0045-17.4-3"""
    crone, _, hag = coven(server)
    crone.sends(f"<iq type='set' id='admin1' to='{COVEN}'><query xmlns='{ADMIN}'>{items}</query></iq>")
    crone.receives(refused("bad-request"))
    hag.receives_nothing()


@pytest.mark.parametrize("item", ["role='none'", "affiliation='none'", "", "role='moderator' affiliation='owner'"])
def test_lists_that_there_are_not(server: MemoryServer, item: str) -> None:
    """XEP0045-8.5-1"""
    crone = coven(server).crone
    crone.sends(listing(item))
    crone.receives(refused("bad-request", "list1"))


# ---- admins (§9) -----------------------------------------------------------------------------


@pytest.mark.parametrize("item", [f"affiliation='{new}' jid='hecate@{HOST}'"
                                  for new in ("outcast", "none", "member", "admin", "owner")])  # fmt: skip
def test_only_admins_govern_affiliations(server: MemoryServer, item: str) -> None:
    """XEP0045-9-1, XEP0045-5.2.1-1"""
    crone, _, hag = coven(server)
    crone.sends(administering("nick='thirdwitch' role='moderator'"))
    forget(*server.cast.clients)
    hag.sends(administering(item))
    hag.receives(refused("forbidden"))


def test_a_ban(server: MemoryServer) -> None:
    """XEP0045-9.1-1, XEP0045-9.2-1, XEP0045-9.2-2, XEP0045-5.2.2-1, XEP0045-10.3-2"""
    crone, wicca, hag = coven(server)
    crone.sends(administering(f"affiliation='member' jid='hag66@{HOST}' nick='hag'"))
    forget(crone, wicca, hag)
    reason = "<reason>Treason</reason>"
    ban = f"<item affiliation='outcast' jid='hag66@{HOST}/pda'>{reason}</item>"
    wicca.sends(administering(ban, id="ban1"))
    because = BY_WICCA + reason
    wicca.receives(result("ban1"), gone("thirdwitch", "outcast", 301, jid=True, because=because))
    hag.receives(gone("thirdwitch", "outcast", 110, 301, jid=True, because=because))
    crone.receives(gone("thirdwitch", "outcast", 301, jid=True, because=because))
    wicca.sends(listing("affiliation='outcast'", id="ban2"))
    wicca.receives(listed(f"<item affiliation='outcast' jid='hag66@{HOST}'>{reason}</item>", id="ban2"))
    hag.sends(enter("thirdwitch"))
    hag.receives(refused("forbidden", "n13mt3l", "presence"))
    affiliate(wicca, "none hag66")
    forget(wicca)
    hag.sends(enter("thirdwitch"))
    crone.receives(shown("thirdwitch", jid=True))
    hecate = witch(server, "hecate")
    hecate.sends(enter("hag"))  # the nickname is free again
    crone.receives(shown("hag", jid=ADDRESSES["hecate"]))
    forget(*server.cast.clients)


@pytest.mark.parametrize(("who", "jid", "condition"), [
    ("wicca", "crone1", "not-allowed"), ("wicca", "wiccarocks", "conflict"), ("crone", "crone1", "conflict")])  # fmt: skip
def test_bans_that_fail(server: MemoryServer, who: str, jid: str, condition: str) -> None:
    """XEP0045-9.1-2"""
    witches = coven(server)
    actor: Client = getattr(witches, who)
    actor.sends(administering(f"affiliation='outcast' jid='{jid}@{HOST}'"))
    actor.receives(refused(condition))


def test_a_change_with_one_forbidden_item_is_refused_whole(server: MemoryServer) -> None:
    """XEP0045-9.2-4, XEP0045-8.5-2"""
    crone, wicca, hag = coven(server)
    wicca.sends(administering(f"affiliation='outcast' jid='hag66@{HOST}'", f"affiliation='outcast' jid='crone1@{HOST}'"))
    wicca.receives(refused("not-allowed"))
    hag.sends(saying("Still here"))
    crone.receives(said("thirdwitch", "Still here"))
    forget(*server.cast.clients)


def test_a_person_can_be_named_by_the_nickname(server: MemoryServer) -> None:
    """XEP0045-9.1-1"""
    crone, _, hag = coven(server)
    crone.sends(administering("affiliation='outcast' nick='thirdwitch'"))
    crone.receives(result(), gone("thirdwitch", "outcast", 301, jid=True, because=BY_CRONE))
    crone.sends(administering("affiliation='outcast' nick='nobody'"))
    crone.receives(refused("item-not-found"))
    forget(*server.cast.clients)
    assert hag


@pytest.mark.parametrize("new", ["member", "admin", "owner"])
def test_a_whole_domain_is_only_banned(server: MemoryServer, new: str) -> None:
    """XEP0045-9.2-3"""
    crone = coven(server).crone
    crone.sends(administering(f"affiliation='{new}' jid='{HOST}'"))
    crone.receives(refused("not-allowed"))


def test_membership_is_granted_and_revoked(server: MemoryServer) -> None:
    """XEP0045-9.3-1, XEP0045-9.4-1, XEP0045-5.2.2-1"""
    crone, wicca, hag = coven(server)
    for affiliation, reason in (("member", "A worthy witch indeed!"), ("none", "Not so worthy after all!")):
        written = f"<reason>{reason}</reason>"
        wicca.sends(administering(f"<item affiliation='{affiliation}' jid='hag66@{HOST}'>{written}</item>"))
        because = BY_WICCA + written
        wicca.receives(result(), shown("thirdwitch", affiliation, jid=True, because=because))
        crone.receives(shown("thirdwitch", affiliation, jid=True, because=because))
        hag.receives(shown("thirdwitch", affiliation, "participant", 110, jid=True, because=because))


def test_who_is_no_member_any_more_leaves_a_members_only_room(server: MemoryServer) -> None:
    """XEP0045-9.4-1, XEP0045-9.5-2"""
    crone, wicca, hag = coven(server, membersonly=True)
    hag.sends("<presence/>")
    forget(hag)
    affiliate(crone, "member hag66")
    hag.receives(f"<message id='*' from='{COVEN}'><x xmlns='{USER}'><invite from='{COVEN}'/></x></message>")
    enters(hag, "thirdwitch")
    forget(crone, wicca, hag)
    affiliate(wicca, "none hag66")
    crone.receives(gone("thirdwitch", "none", 321, jid=True, because=BY_WICCA))
    hag.receives(gone("thirdwitch", "none", 110, 321, jid=True, because=BY_WICCA))
    forget(wicca)


def test_reserved_nicknames_are_given_changed_and_taken(server: MemoryServer) -> None:
    """XEP0045-9.3-1, XEP0045-17.4-4: §9.5, an empty one unsets it, none leaves it"""
    crone = coven(server).crone
    member = f"affiliation='member' jid='hecate@{HOST}'"
    for request, expected in ((f"{member} nick='Hecate'", f"{member} nick='Hecate'"), (member, f"{member} nick='Hecate'"),
                              (f"{member} nick=''", member)):  # fmt: skip
        crone.sends(administering(request) + listing("affiliation='member'"))
        crone.receives(result(), listed(expected))
    crone.sends(administering(f"{member} nick='x'", f"affiliation='member' jid='hag66@{HOST}' nick='X'"))
    crone.receives(refused("conflict"))


LISTS = ["outcast", "member", "admin", "owner"]
MAY_LIST = [  # configuration, person, lists that this person may see
    ({}, "crone", "outcast member admin owner"),
    ({}, "wicca", "outcast member"),
    ({}, "hecate", ""),  # a member
    ({}, "hag", ""),
    ({"whois": "anyone"}, "wicca", "outcast member admin owner"),
    ({"whois": "anyone"}, "hecate", "member"),
    ({"whois": "anyone"}, "hag", ""),
    ({"whois": "anyone", "getmemberlist": ["moderator"]}, "hecate", ""),
    ({"whois": "anyone", "membersonly": True}, "hecate", "member admin owner"),
]


@pytest.mark.parametrize(("fields", "who", "allowed"), MAY_LIST)
def test_who_sees_which_list(server: MemoryServer, fields: dict[str, object], who: str, allowed: str) -> None:
    """XEP0045-9.5-1, XEP0045-10.5-1, XEP0045-10.8-1, XEP0045-9.2-1, XEP0045-10.2-5, S52"""
    witches = coven(server, **fields)
    affiliate(witches.crone, "member hecate", "outcast tybalt")
    forget(*witches)
    client: Client = witch(server, "hecate") if who == "hecate" else getattr(witches, who)
    for affiliation in LISTS:
        client.sends(listing(f"affiliation='{affiliation}'"))
        if affiliation not in allowed.split():
            client.receives(refused("forbidden", "list1"))
        else:
            names = {"outcast": "tybalt", "member": "hecate", "admin": "wiccarocks", "owner": "crone1"}
            client.receives(listed(f"affiliation='{affiliation}' jid='{names[affiliation]}@{HOST}'"))


# ---- owners (§10.3 to §10.8) ---------------------------------------------------------------------


@pytest.mark.parametrize(("new", "role"), [("owner", "moderator"), ("admin", "moderator")])
def test_owners_make_owners_and_admins(server: MemoryServer, new: str, role: str) -> None:
    """XEP0045-10.3-1, XEP0045-10.6-1, XEP0045-10.7-1, XEP0045-10.4-1, XEP0045-5.2-1"""
    crone, wicca, hag = coven(server)
    grant = administering(f"affiliation='{new}' jid='hag66@{HOST}'")
    wicca.sends(grant)
    wicca.receives(refused("forbidden"))
    crone.sends(grant)
    crone.receives(result(), shown("thirdwitch", new, role, jid=True, because=BY_CRONE))
    hag.receives(shown("thirdwitch", new, role, 110, jid=True, because=BY_CRONE))
    revoke = administering(f"affiliation='none' jid='hag66@{HOST}'")
    wicca.sends(revoke)
    wicca.receives(shown("thirdwitch", new, role, jid=True, because=BY_CRONE), refused("forbidden"))
    crone.sends(revoke)
    crone.receives(result(), shown("thirdwitch", "none", "participant", jid=True, because=BY_CRONE))
    forget(wicca, hag)


@pytest.mark.parametrize("new", ["admin", "member", "none"])
def test_the_last_owner_stays(server: MemoryServer, new: str) -> None:
    """XEP0045-10-1, XEP0045-10.4-1, S52"""
    crone, wicca, hag = coven(server)
    resign = f"affiliation='{new}' jid='crone1@{HOST}'"
    crone.sends(administering(resign))
    crone.receives(refused("conflict"))
    crone.sends(administering(resign, f"affiliation='owner' jid='hag66@{HOST}'"))  # with a successor
    forget(wicca, hag)
    crone.sends(listing("affiliation='owner'"))
    assert crone.receives_anything()[-1].get("type") == "error"
    hag.sends(listing("affiliation='owner'"))
    hag.receives(listed(f"affiliation='owner' jid='hag66@{HOST}'"))
    hag.sends(administering(f"affiliation='outcast' jid='hag66@{HOST}'"))
    hag.receives(refused("conflict"))


def test_the_absent_hear_of_great_changes(server: MemoryServer) -> None:
    """XEP0045-18.1-1"""
    crone = coven(server).crone
    hecate = witch(server, "hecate")
    hecate.sends("<presence/>")
    forget(hecate)
    for affiliation in ("admin", "none"):
        affiliate(crone, f"{affiliation} hecate")
        hecate.receives(f"<message id='*' from='{COVEN}'><x xmlns='{USER}'><item affiliation='{affiliation}' role='none'/>"
                        f"{status(101)}</x></message>")  # fmt: skip
    affiliate(crone, "member hecate")
    affiliate(crone, "outcast hecate")
    hecate.receives_nothing()
    forget(crone)


def test_an_owner_governs_from_outside(server: MemoryServer) -> None:
    """XEP0045-10-1, XEP0045-8-1: whom the affiliation makes a moderator"""
    _, _, hag = coven(server)
    phone = person(server, f"crone1@{HOST}/phone")
    phone.sends(administering("nick='thirdwitch' role='none'"))
    phone.receives(result())
    hag.receives(gone("thirdwitch", "none", 110, 307, jid=True))
    forget(*server.cast.clients)


# ---- creation and configuration (§10.1, §10.2) --------------------------------------------------------


def test_an_instant_room(server: MemoryServer) -> None:
    """XEP0045-10.1.2-1, XEP0045-10.1.1-2"""
    crone, hag = witch(server, "firstwitch"), witch(server, "thirdwitch")
    enters(crone, "firstwitch")
    crone.sends(f"<iq type='set' id='create1' to='{COVEN}'><query xmlns='{OWNER}'><x xmlns='{FORM}' type='submit'/></query></iq>")
    crone.receives(result("create1"))
    hag.sends(enter("thirdwitch"))
    crone.receives(shown("thirdwitch", jid=True))
    forget(hag)


def fields_of(client: Client) -> dict[str, list[str]]:
    """The form of the configuration: its fields and their values."""
    client.sends(f"<iq type='get' id='config1' to='{COVEN}'><query xmlns='{OWNER}'/></iq>")
    answer = client.receives(f"<iq type='result' id='config1'><query xmlns='{OWNER}'><x xmlns='{FORM}' type='form'>...</x>"
                             "</query></iq>")  # fmt: skip
    return {field.get("var", "").removeprefix("muc#roomconfig_"): [value.text or "" for value in field.findall(f"{{{FORM}}}value")]
            for field in answer.iter(f"{{{FORM}}}field")}  # fmt: skip


REGISTRY = {"muc#maxhistoryfetch", "allowpm", "allowinvites", "changesubject", "enablearchiving", "enablelogging",
            "getmemberlist", "lang", "maxusers", "membersonly", "moderatedroom", "passwordprotectedroom", "persistentroom", "presencebroadcast",
            "publicroom", "roomadmins", "roomdesc", "roomname", "roomowners", "roomsecret", "whois"}  # fmt: skip


def test_a_reserved_room(server: MemoryServer) -> None:
    """XEP0045-10.1.3-1, XEP0045-10.1.3-2, XEP0045-10.2-2"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    form = fields_of(crone)
    assert set(form) == REGISTRY | {"FORM_TYPE"}  # all of §16.5.3 but for pubsub
    assert form["FORM_TYPE"] == [f"{MUC}#roomconfig"]
    crone.sends(configuring(passwordprotectedroom=True, roomname="x"))
    crone.receives(refused("not-acceptable", "create2"))
    hag = witch(server, "thirdwitch")
    hag.sends(enter("thirdwitch"))
    hag.receives(refused("item-not-found", "n13mt3l", "presence"))
    configures(crone, roomname="A Dark Cave", roomadmins=[f"hecate@{HOST}", f"wiccarocks@{HOST}/laptop"])
    assert fields_of_after(crone)["roomname"] == ["A Dark Cave"]
    configures(crone, roomdesc="The place")  # a part only: the rest stays
    form = fields_of_after(crone)
    assert (form["roomname"], form["roomdesc"]) == (["A Dark Cave"], ["The place"])
    assert form["roomadmins"] == [f"hecate@{HOST}", f"wiccarocks@{HOST}"] and form["roomowners"] == [f"crone1@{HOST}"]
    crone.sends(f"<iq type='set' id='config2' to='{COVEN}'><query xmlns='{OWNER}'><x xmlns='{FORM}' type='cancel'/></query></iq>")
    crone.receives(result("config2"))
    assert fields_of(crone) == form


def fields_of_after(client: Client) -> dict[str, list[str]]:
    """Like `fields_of`, when notices of the change have come before."""
    forget(client)
    return fields_of(client)


@pytest.mark.parametrize("fields", [
    {"roomname": "x" * 300}, {"maxusers": "0"}, {"maxusers": "many"}, {"whois": "nobody"}, {"allowpm": "some"},
    {"maxhistoryfetch": 100000}, {"presencebroadcast": ["king"]}, {"persistentroom": "perhaps"},
    {"passwordprotectedroom": True, "roomsecret": ""}, {"roomadmins": [HOST]}, {"roomsecret": "x" * 2000}])  # fmt: skip
def test_configurations_that_cannot_be(server: MemoryServer, fields: dict[str, object]) -> None:
    """XEP0045-10.1.3-2"""
    crone = coven(server).crone
    before = fields_of(crone)
    crone.sends(configuring(**fields, lang="la"))
    crone.receives(refused("not-acceptable", "create2"))
    assert fields_of(crone) == before


@pytest.mark.parametrize("payload", ["", "<x xmlns='jabber:x:data' type='result'/>", "<item xmlns='urn:x'/>",
    "<x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'><value>urn:other</value></field></x>"])  # fmt: skip
def test_configurations_that_are_none(server: MemoryServer, payload: str) -> None:
    """XEP0045-10.1.3-2"""
    crone = coven(server).crone
    crone.sends(f"<iq type='set' id='c' to='{COVEN}'><query xmlns='{OWNER}'>{payload}</query></iq>")
    crone.receives(refused("bad-request", "c"))


def test_who_cancels_the_first_form_wants_no_room(server: MemoryServer) -> None:
    """XEP0045-10.1.3-3"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    crone.sends(f"<iq type='set' id='c' to='{COVEN}'><query xmlns='{OWNER}'><x xmlns='{FORM}' type='cancel'/></query></iq>")
    crone.receives(gone("firstwitch", "none", 110, jid=True, after="<destroy/>"), result("c"))
    crone.sends(f"<iq type='get' id='c' to='{COVEN}'><query xmlns='{OWNER}'/></iq>")
    crone.receives(refused("item-not-found", "c"))


@pytest.mark.parametrize(("type", "payload"), [("get", ""), ("set", f"<x xmlns='{FORM}' type='submit'/>"),
                                               ("set", "<destroy/>")])  # fmt: skip
def test_only_owners_configure_and_destroy(server: MemoryServer, type: str, payload: str) -> None:
    """XEP0045-10.2-1, XEP0045-10.9-2, XEP0045-5.2.1-1"""
    _, wicca, hag = coven(server)
    for client in (wicca, hag):
        client.sends(f"<iq type='{type}' id='c' to='{COVEN}'><query xmlns='{OWNER}'>{payload}</query></iq>")
        client.receives(refused("forbidden", "c"))


def test_admins_and_owners_by_configuration(server: MemoryServer) -> None:
    """XEP0045-10.2-3, XEP0045-10-1"""
    crone, wicca, hag = coven(server)
    crone.sends(configuring(roomadmins=[f"hag66@{HOST}"]))
    crone.receives(result("create2"))
    changes = [("secondwitch", "none", "participant"), ("thirdwitch", "admin", "moderator")]
    crone.receives_in_any_order(*(shown(nick, affiliation, role, jid=True) for nick, affiliation, role in changes))
    forget(wicca, hag)
    crone.sends(configuring(roomowners=[f"wiccarocks@{HOST}", f"crone1@{HOST}"]))
    crone.receives(result("create2"), shown("secondwitch", "owner", "moderator", jid=True))
    wicca.receives(shown("secondwitch", "owner", "moderator", 110, jid=True))
    forget(hag)
    crone.sends(configuring(roomowners=[], roomname="Nobody's"))
    crone.receives(refused("conflict", "create2"))
    assert fields_of(crone)["roomname"] == [""]
    crone.sends(configuring(roomowners=[f"wiccarocks@{HOST}"]))
    crone.receives(result("create2"), shown("firstwitch", "none", "participant", 110, jid=True))
    forget(wicca, hag)


def test_becoming_members_only(server: MemoryServer) -> None:
    """XEP0045-10.2-4, XEP0045-10.2.1-1"""
    crone, wicca, hag = coven(server)
    crone.sends(configuring(membersonly=True))
    told = f"<message type='groupchat' id='*' from='{COVEN}'><x xmlns='{USER}'>{status(104)}</x></message>"
    crone.receives(result("create2"), gone("thirdwitch", "none", 322, jid=True), told)
    wicca.receives(gone("thirdwitch", "none", 322, jid=True), told)
    hag.receives(gone("thirdwitch", "none", 110, 322, jid=True))


@pytest.mark.parametrize(("before", "after", "codes"), [
    ({}, {"enablelogging": True}, [170]), ({"enablelogging": True}, {"enablelogging": False}, [171]),
    ({}, {"whois": "anyone"}, [172]), ({"whois": "anyone"}, {"whois": "moderators"}, [173]),
    ({}, {"roomname": "x"}, [104]), ({}, {"whois": "anyone", "lang": "en", "enablelogging": True}, [104, 170, 172]),
    ({"lang": "en"}, {"lang": "en"}, []), ({}, {"roomadmins": [f"wiccarocks@{HOST}"]}, [])])  # fmt: skip
def test_changes_are_told(server: MemoryServer, before: dict[str, object], after: dict[str, object],
                          codes: list[int]) -> None:  # fmt: skip
    """XEP0045-10.2.1-1"""
    crone, wicca, hag = coven(server, **before)
    configures(crone, **after)
    message = f"<message type='groupchat' id='*' from='{COVEN}'><x xmlns='{USER}'>{{}}</x></message>"
    for client in (crone, wicca, hag) if codes else ():
        came = client.receives(message.format("".join("<status code='*'/>" for _ in codes)))
        assert sorted(int(each.get("code", "")) for each in came[0]) == codes
    hag.receives_nothing()


def test_becoming_moderated(server: MemoryServer) -> None:
    """XEP0045-10.2-5, XEP0045-5.1-2, XEP0045-5.1.2-1, XEP0045-5.1-1"""
    crone, wicca, hag = coven(server)
    configures(crone, moderatedroom=True)
    hag.receives(shown("thirdwitch", "none", "visitor", 110, jid=True), "<message ...>...</message>")
    hag.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")
    forget(crone, wicca, hag)
    hag.sends(enter("thirdwitch"))
    crone.receives(shown("thirdwitch", "none", "visitor", jid=True))
    affiliate(crone, "member hag66")
    wicca.receives(shown("thirdwitch", "none", "visitor", jid=True), shown("thirdwitch", "member", jid=True, because=BY_CRONE))
    affiliate(crone, "none hag66")  # who was a participant is not silenced by it
    wicca.receives(shown("thirdwitch", "none", jid=True, because=BY_CRONE))
    configures(crone, moderatedroom=False)
    forget(*server.cast.clients)


def test_whose_presence_is_shown(server: MemoryServer) -> None:
    """XEP0045-10.2-5, XEP0045-5.1.3-1, XEP0045-7.14-1: who becomes a visitor disappears, who gets a voice appears"""
    crone, wicca, hag = coven(server, moderatedroom=True, presencebroadcast=["moderator", "participant"])
    hecate = witch(server, "hecate")
    hecate.sends(enter("hecate"))
    hecate.receives(shown("firstwitch", "owner", "moderator"), shown("secondwitch", "admin", "moderator"),
                    shown("hecate", "none", "visitor", 110, jid=True, id="n13mt3l"), NO_SUBJECT)  # fmt: skip
    crone.receives_nothing()
    crone.sends(administering("nick='hecate' role='participant'"))
    crone.receives(result(), shown("hecate", jid=True, because=BY_CRONE))
    hag.receives(shown("hecate", because=BY_CRONE))
    crone.sends(administering("nick='hecate' role='visitor'"))
    crone.receives(result(), gone("hecate", jid=True))
    hecate.receives(shown("hecate", "none", "participant", 110, jid=True, because=BY_CRONE),
                    shown("hecate", "none", "visitor", 110, jid=True, because=BY_CRONE))  # fmt: skip
    forget(wicca, hag)
    hecate.sends(f"<presence type='unavailable' to='{COVEN}/hecate'/>")
    hecate.receives(gone("hecate", "none", 110, jid=True))
    crone.receives_nothing()
    configures(crone, presencebroadcast=["moderator", "participant", "visitor"])
    wicca.receives(shown("thirdwitch", "none", "visitor", jid=True), "<message ...>...</message>")
    configures(crone, presencebroadcast=[])
    assert [stanza.get("type") for stanza in wicca.receives_anything()] == ["unavailable", "unavailable", "groupchat"]
    forget(*server.cast.clients)


# ---- destruction (§10.9) -------------------------------------------------------------------------------


def test_destruction(server: MemoryServer) -> None:
    """XEP0045-10.9-1, XEP0045-10.9-3"""
    crone, wicca, hag = coven(server, persistentroom=True)
    venue = f"<destroy jid='heath@{SERVICE}'><password>p</password><reason>Macbeth doth come.</reason></destroy>"
    crone.sends(f"<iq type='set' id='begone' to='{COVEN}'><query xmlns='{OWNER}'>{venue}</query></iq>")
    crone.receives(gone("firstwitch", "none", 110, jid=True, after=venue), result("begone"))
    wicca.receives(gone("secondwitch", "none", 110, jid=True, after=venue))
    hag.receives(gone("thirdwitch", "none", 110, jid=True, after=venue))
    for to in (COVEN, f"{COVEN}/firstwitch"):
        hag.sends(f"<message type='groupchat' id='m' to='{to}'><body>O</body></message>")
        hag.receives(refused("item-not-found", "m", "message"))
    hag.sends(f"<iq type='get' id='d' to='{SERVICE}'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    hag.receives("<iq type='result' id='d'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    assert not list(server.storage.documents("room").owners(SERVICE))


# ---- accounts that go -------------------------------------------------------------------------------------


def test_the_next_owner_of_a_name_inherits_nothing(server: MemoryServer) -> None:
    """XEP0045-5.2-2, XEP0045-10-1: trap 13; a room without its owner goes to its admins"""
    crone, wicca, hag = coven(server, persistentroom=True)
    server.server.remove_account(xmppd.JID("crone1", HOST, ""))
    crone.receives_stream_error("not-authorized")
    assert crone.is_closed()
    forget(wicca, hag)
    wicca.sends(listing("affiliation='owner'"))
    wicca.receives(listed(f"affiliation='owner' jid='wiccarocks@{HOST}'"))
    newcomer = person(server, f"crone1@{HOST}/desktop")
    newcomer.sends(enter("firstwitch"))
    hag.receives(shown("firstwitch"))
    forget(*server.cast.clients)
