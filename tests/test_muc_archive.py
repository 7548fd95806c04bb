"""The message archive of rooms (XEP-0313 §6.1.2), and what is taken back there (XEP-0424, XEP-0425)."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tests.dialogue import Client
from tests.muc import CONFIG, COVEN, HOST, Server, configures, coven, enters, forget, person, saying, witch
from tests.servers import MemoryServer
from tests.test_archive import MAM, RETRACTED, STANZA_ID, Answer, asks, form, page
from tests.test_muc_lasting import archived, restarted

pytestmark = pytest.mark.config(**CONFIG)
OCCUPANT_ID = "{urn:xmpp:occupant-id:0}occupant-id"
ITEM = "{http://jabber.org/protocol/muc#user}x/{http://jabber.org/protocol/muc#user}item"
RETRACT = "{urn:xmpp:message-retract:1}retract"
MODERATED = "{urn:xmpp:message-moderate:1}moderated"


def reads(client: Client, content: str = "", **attributes: str) -> Answer:
    """Ask the coven's archive."""
    return asks(client, content, to=COVEN, **attributes)


def is_refused(client: Client, condition: str, content: str = "") -> None:
    client.sends(f"<iq type='set' id='mam' to='{COVEN}'><query xmlns='{MAM}'>{content}</query></iq>")
    client.receives(f"<iq type='error' id='mam'><error ...><{condition} .../></error></iq>")


def moderates(client: Client, id: str, inner: str = "<retract xmlns='urn:xmpp:message-retract:1'/>") -> None:
    client.sends(f"<iq type='set' id='mod' to='{COVEN}'><moderate xmlns='urn:xmpp:message-moderate:1' id='{id}'>{inner}"
                 "</moderate></iq>")  # fmt: skip


def features(client: Client) -> set[str]:
    client.sends(f"<iq type='get' id='d' to='{COVEN}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    return {one.get("var", "") for one in client.receives("<iq type='result' id='d' ...>...</iq>")[0]}


def test_what_was_said_can_be_read(server: Server) -> None:
    """XEP-0313 §6.1.2, §3.5, XEP-0421: once, without `to`, with the id that all were told; private messages are not in it"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("Harpier cries", id="h1") + f"<message type='groupchat' to='{COVEN}'><body/>"
              "<x xmlns='http://jabber.org/protocol/muc#user'><item jid='forged@x'/></x></message>")  # fmt: skip
    hag.sends(f"<message type='chat' to='{COVEN}/firstwitch'><body>secret</body></message>")
    crone.sends(f"<message type='groupchat' to='{COVEN}'><subject>Spells</subject></message>")
    crone.sends(f"<message type='groupchat' to='{COVEN}'><composing xmlns='http://jabber.org/protocol/chatstates'/></message>")
    told = [stanza for stanza in wicca.receives_anything() if stanza.find(STANZA_ID) is not None]
    forget(crone, hag)
    answer = reads(hag, queryid="g27")
    assert answer.is_complete and answer.bodies == ["Harpier cries", "", None]
    assert answer.ids == [one.find(STANZA_ID).get("id") for one in told[:3]]  # type: ignore[union-attr]
    assert {one.get("from") for one in answer.results} == {COVEN}
    first = answer.messages[0]
    assert (first.get("from"), first.get("to"), first.get("id"), first.get("type")) == (f"{COVEN}/thirdwitch", None, "h1", "groupchat")
    assert first.find(OCCUPANT_ID) is not None and all(one.find(ITEM) is None for one in answer.messages)
    assert answer.messages[2].findtext("{jabber:client}subject") == "Spells"
    assert reads(hag, page(max=1, before="")).ids == answer.ids[2:]
    hag.sends(f"<iq type='get' id='m' to='{COVEN}'><metadata xmlns='{MAM}'/></iq><iq type='get' id='f' to='{COVEN}'><query xmlns='{MAM}'/></iq>")
    hag.receives(f"<iq type='result' id='m'><metadata xmlns='{MAM}'><start id='{answer.ids[0]}' timestamp='*'/>"
                 f"<end id='{answer.ids[2]}' timestamp='*'/></metadata></iq>", "<iq type='result' id='f' ...>...</iq>")  # fmt: skip
    assert {MAM, f"{MAM}#extended", "urn:xmpp:message-moderate:1", "urn:xmpp:message-retract:1#tombstone"} <= features(hag)


def test_real_addresses_are_for_those_who_may_know_them(server: Server) -> None:
    """XEP-0313 §6.1.2, §4.1.1; trap: a filter by address would tell who is who"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("O"))
    wicca.sends(saying("Ay"))
    forget(crone, wicca, hag)
    addresses = [one.find(ITEM).get("jid") for one in reads(crone).messages]  # type: ignore[union-attr]
    assert addresses == [hag.jid, wicca.jid]
    assert reads(crone, form(with_=f"hag66@{HOST}")).bodies == ["O"]
    is_refused(hag, "forbidden", form(with_=f"wiccarocks@{HOST}"))
    assert reads(hag, form(with_=f"{COVEN}/secondwitch")).bodies == ["Ay"]
    configures(crone, whois="anyone")
    forget(crone, wicca, hag)
    assert [one.find(ITEM).get("jid") for one in reads(hag).messages] == addresses  # type: ignore[union-attr]


def test_who_may_not_enter_may_not_read(server: Server) -> None:
    """XEP-0313 §6.1.2, §8.1: at the time of the query; and outside of the room only if its owner wants that"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("O"))
    forget(crone, wicca, hag)
    hecate = witch(server, "hecate")
    is_refused(hecate, "forbidden")
    configures(crone, enablelogging=True)
    forget(crone, wicca, hag)
    assert reads(hecate).bodies == ["O"]
    configures(crone, membersonly=True)
    forget(crone, wicca, hag)
    is_refused(hecate, "forbidden")
    is_refused(hag, "forbidden")
    member = person(server, f"wiccarocks@{HOST}/phone")
    assert reads(member).bodies == ["O"]
    crone.sends(f"<iq type='set' id='a' to='{COVEN}'><query xmlns='http://jabber.org/protocol/muc#admin'>"
                f"<item affiliation='outcast' jid='wiccarocks@{HOST}'/></query></iq>")  # fmt: skip
    forget(crone, wicca, hag)
    is_refused(member, "forbidden")
    hecate.sends(f"<iq type='set' id='mam' to='nowhere@{COVEN.partition('@')[2]}'><query xmlns='{MAM}'/></iq>")
    hecate.receives("<iq type='error' id='mam'><error ...><item-not-found .../></error></iq>")


@pytest.mark.parametrize("values", [{"persistentroom": False}, {"persistentroom": True, "enablearchiving": False}])
def test_a_room_without_an_archive_says_so(server: Server, values: dict[str, bool]) -> None:
    """XEP-0313 §7"""
    crone, _wicca, _hag = coven(server, **values)
    is_refused(crone, "service-unavailable")
    assert MAM not in features(crone)


def test_newcomers_and_the_archive_tell_the_same_ids(server: MemoryServer) -> None:
    """XEP-0313 §3.5: live, in the history, after the room was made persistent, and after a restart"""
    crone, wicca, hag = coven(server)
    hag.sends(saying("1"))
    hag.sends(saying("2"))
    forget(crone, wicca, hag)
    configures(crone, persistentroom=True)
    hag.sends(saying("3"))
    forget(crone, wicca, hag)
    answer = reads(hag)
    assert answer.bodies == ["1", "2", "3"]
    for _ in range(2):
        came = [one for one in enters(witch(server, "hecate"), "hecate") if one.find("{jabber:client}body") is not None]
        assert [one.find(STANZA_ID).get("id") for one in came] == answer.ids  # type: ignore[union-attr]
        restarted(server)


def test_the_author_takes_a_message_back(server: MemoryServer) -> None:
    """XEP-0424 §3 to §5: no newcomer hears it, in the archive is a tombstone; and nobody else can"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("Double, double toil and trouble", id="m1"))
    forget(crone, wicca, hag)
    id = reads(hag).ids[0]
    retraction = f"<message type='groupchat' id='r1' to='{COVEN}'><retract xmlns='urn:xmpp:message-retract:1' id='{id}'/></message>"
    wicca.sends(retraction)
    forget(crone, wicca, hag)
    assert reads(hag).bodies == ["Double, double toil and trouble", None]
    hag.sends(retraction)
    assert [one.find(RETRACT) is not None for one in crone.receives_anything()] == [True]
    forget(wicca, hag)
    answer = reads(hag)
    tombstone = answer.messages[0]
    assert answer.bodies == [None, None, None] and answer.ids[0] == id
    assert tombstone.find(RETRACTED).get("id") == "r1" and tombstone.find(OCCUPANT_ID) is not None  # type: ignore[union-attr]
    assert tombstone.get("from") == f"{COVEN}/thirdwitch" and "toil" not in str(archived(server))
    for _ in range(2):
        assert not [one for one in enters(witch(server, "hecate"), "hecate") if one.find("{jabber:client}body") is not None]
        restarted(server)


def test_a_moderator_takes_a_message_back(server: MemoryServer) -> None:
    """XEP-0425 §3.1, §4: all are told who did it and why; the tombstone tells, too"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("DM me for free magic potions!"))
    forget(crone, wicca, hag)
    id = reads(hag).ids[0]
    moderates(wicca, id, "<retract xmlns='urn:xmpp:message-retract:1'/><reason>Spam</reason>")
    wicca.receives_in_any_order("<iq type='result' id='mod'/>", "<message type='groupchat' ...>...</message>")
    for witch_ in (crone, hag):
        witch_.receives(
            f"<message type='groupchat' from='{COVEN}' id='*'><retract xmlns='urn:xmpp:message-retract:1' id='{id}'>"
            f"<moderated xmlns='urn:xmpp:message-moderate:1' by='{COVEN}/secondwitch'><occupant-id .../></moderated>"
            f"<reason>Spam</reason></retract><stanza-id .../></message>")  # fmt: skip
    answer = reads(hag)
    retracted = answer.messages[0].find(RETRACTED)
    assert retracted is not None and retracted.find(MODERATED).get("by") == f"{COVEN}/secondwitch"  # type: ignore[union-attr]
    assert retracted.findtext("{urn:xmpp:message-retract:1}reason") == "Spam" and answer.bodies == [None, None]
    assert answer.messages[1].find(f"{RETRACT}/{MODERATED}") is not None and "potions" not in str(archived(server))
    newcomer = [one for one in enters(person(server, f"hecate@{HOST}/broom"), "hecate") if one.find("{jabber:client}body") is not None]
    assert not newcomer
    forget(crone, wicca, hag)


def test_moderation_is_for_moderators(server: Server) -> None:
    """XEP-0425 §3.2: and not against those whose affiliation is higher; unknown messages are not found"""
    crone, wicca, hag = coven(server, persistentroom=True)
    crone.sends(saying("Mine"))
    hag.sends(saying("His"))
    forget(crone, wicca, hag)
    mine, his = reads(hag).ids
    for client, id, inner, condition in (
        (hag, mine, "<retract xmlns='urn:xmpp:message-retract:1'/>", "forbidden"),
        (wicca, mine, "<retract xmlns='urn:xmpp:message-retract:1'/>", "not-allowed"),
        (wicca, "0" * 30, "<retract xmlns='urn:xmpp:message-retract:1'/>", "item-not-found"),
        (wicca, his, "", "feature-not-implemented"),
    ):
        moderates(client, id, inner)
        client.receives(f"<iq type='error' id='mod'><error ...><{condition} .../></error></iq>")
    assert reads(hag).bodies == ["Mine", "His"]


def test_a_room_that_lasts_for_a_visit_only_is_moderated_too(server: Server) -> None:
    """XEP-0425 §5: what is taken back is told to no newcomer"""
    crone, wicca, hag = coven(server)
    hag.sends(saying("Spam"))
    id = crone.receives_anything()[0].find(STANZA_ID).get("id", "")  # type: ignore[union-attr]
    forget(wicca, hag)
    moderates(crone, id)
    forget(crone, wicca, hag)
    assert not [one for one in enters(witch(server, "hecate"), "hecate") if one.find("{jabber:client}body") is not None]
    forget(crone, wicca, hag)


def test_results_are_archived_nowhere(server: Server) -> None:
    """XEP-0313 §6.1.1: what an archive answers is not said"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("O"))
    forget(crone, wicca, hag)
    assert len(reads(hag).results) == 1
    assert asks(hag).results == [] and ET.tostring(reads(hag).results[0]).count(b"<") > 5
