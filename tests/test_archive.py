"""The message archive of accounts (XEP-0313): what is in it, under which ids, and how it is asked."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xmppd
from tests.dialogue import Client
from tests.servers import MemoryServer, ProcessServer

MAM = "urn:xmpp:mam:2"
RSM = "http://jabber.org/protocol/rsm"
STANZA_ID = "{urn:xmpp:sid:0}stanza-id"
MESSAGE = "{jabber:client}message"
BODY = "{jabber:client}body"
JULIET = xmppd.JID.parse("juliet@example.org")
ROMEO = xmppd.JID.parse("romeo@example.org")


def form(**fields: str | list[str]) -> str:
    """Return the filters of a query; `with_` and `before_id` are spelled so."""
    text = f"<field var='FORM_TYPE' type='hidden'><value>{MAM}</value></field>"
    for name, values in fields.items():
        chosen = [values] if isinstance(values, str) else values
        var = name.rstrip("_").replace("_", "-")
        text += f"<field var='{var}'>" + "".join(f"<value>{value}</value>" for value in chosen) + "</field>"
    return f"<x xmlns='jabber:x:data' type='submit'>{text}</x>"


def page(**wish: str | int) -> str:
    """Return the part of the results that is wanted (XEP-0059)."""
    return f"<set xmlns='{RSM}'>" + "".join(f"<{name}>{value}</{name}>" for name, value in wish.items()) + "</set>"


class Answer:
    """What an archive says to a query."""

    def __init__(self, stanzas: list[ET.Element]) -> None:
        *self.results, self.iq = stanzas
        assert self.iq.get("type") == "result", ET.tostring(self.iq)
        self.fin = self.iq[0]
        assert self.fin.tag == f"{{{MAM}}}fin"
        self.is_complete = self.fin.get("complete") == "true"
        self.found = [result[0] for result in self.results]
        self.ids = [result.get("id", "") for result in self.found]
        self.messages = [message for result in self.found for message in result.iter(MESSAGE)]
        self.bodies = [message.findtext(BODY) for message in self.messages]
        self.first, self.last, self.count = (self.fin.findtext(f"{{{RSM}}}set/{{{RSM}}}{name}")
                                             for name in ("first", "last", "count"))  # fmt: skip


def asks(client: Client, content: str = "", **attributes: str) -> Answer:
    """Ask one's own archive, or another by `to`."""
    queryid = attributes.pop("queryid", "")
    named = f" queryid='{queryid}'" if queryid else ""
    where = "".join(f" {name}='{value}'" for name, value in attributes.items())
    client.sends(f"<iq type='set' id='mam'{where}><query xmlns='{MAM}'{named}>{content}</query></iq>")
    return Answer(client.receives_anything())


def refused(client: Client, content: str, condition: str) -> None:
    client.sends(f"<iq type='set' id='mam'><query xmlns='{MAM}'>{content}</query></iq>")
    client.receives(f"<iq type='error' id='mam'><error ...><{condition} .../></error></iq>")


def chat(body: str, to: str = "juliet@example.org", **attributes: str) -> str:
    more = "".join(f" {name}='{value}'" for name, value in attributes.items())
    return f"<message type='chat' to='{to}'{more}><body>{body}</body></message>"


@pytest.fixture
def talk(romeo: Client, juliet: Client) -> tuple[Client, Client]:
    """romeo and juliet have said five things to each other."""
    juliet.comes_online()
    for number in range(1, 6):
        speaker, other = (romeo, juliet) if number % 2 else (juliet, romeo)
        speaker.sends(chat(str(number), to=other.jid))
        other.receives(f"<message type='chat' from='{speaker.jid}'><body>{number}</body></message>")
    return romeo, juliet


# -- what is archived, and under which id


def test_both_archives_have_a_message_once(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §3.3.1, §4.2, §6.1.1: with its addresses and the moment, in the order of time"""
    romeo, juliet = talk
    for client in talk:
        answer = asks(client, queryid="f27")
        assert answer.bodies == ["1", "2", "3", "4", "5"] and answer.is_complete and answer.count == "5"
        assert [result.get("queryid") for result in answer.found] == ["f27"] * 5
        assert {result.get("from") for result in answer.results} <= {client.bare, None}
        first = answer.messages[0]
        assert (first.get("from"), first.get("to"), first.get("type")) == (romeo.jid, juliet.jid, "chat")
        stamp = answer.found[0].find(".//{urn:xmpp:delay}delay").get("stamp", "")  # type: ignore[union-attr]
        assert abs(datetime.now(UTC) - datetime.fromisoformat(stamp)) < timedelta(seconds=60)
        assert (answer.first, answer.last) == (answer.ids[0], answer.ids[-1]) and sorted(answer.ids) == answer.ids


def test_the_receiver_is_told_the_id_and_nobody_elses(romeo: Client, juliet: Client) -> None:
    """XEP-0313 §3.5, XEP-0359 §3: live; the sender's id is not for others"""
    juliet.comes_online()
    romeo.sends(chat("Art thou not Romeo?"))
    told = juliet.receives("<message type='chat' from='romeo@example.org/orchard'><body>*</body>"
                           "<stanza-id xmlns='urn:xmpp:sid:0' by='juliet@example.org' id='*'/></message>")  # fmt: skip
    assert asks(juliet).ids == [told.find(STANZA_ID).get("id")]  # type: ignore[union-attr]
    assert len(told.findall(STANZA_ID)) == 1 and asks(romeo).ids != asks(juliet).ids


def test_an_offline_message_has_the_same_id(romeo: Client, juliet: Client) -> None:
    """XEP-0313 §3.5: so a client that asks the archive sees that it has it"""
    romeo.sends(chat("Later"))
    romeo.passes_barrier()
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    told = juliet.receives("<message type='chat' from='romeo@example.org/orchard'><body>Later</body>"
                           "<delay .../><stanza-id xmlns='urn:xmpp:sid:0' by='juliet@example.org' id='*'/></message>")  # fmt: skip
    assert asks(juliet).ids == [told.find(STANZA_ID).get("id")]  # type: ignore[union-attr]


def test_what_came_from_the_archive_does_not_come_again(romeo: Client, juliet: Client, server: MemoryServer) -> None:
    """XEP-0313 §6.1.1, XEP-0160: who asks the archive before becoming available; all others get everything"""
    romeo.sends("".join(chat(str(number)) for number in range(4)))
    romeo.passes_barrier()
    assert asks(juliet, page(max=2)).bodies == ["0", "1"]
    juliet.sends("<presence/>")
    assert [stanza.findtext(BODY) for stanza in juliet.receives_anything()] == [None, "2", "3"]
    juliet.sends("<presence type='unavailable'/>")
    juliet.receives_anything()
    romeo.sends(chat("4"))
    assert asks(juliet, page(max=1)).bodies == ["0"]
    other = server.client().login("juliet", resource="phone")
    other.sends("<presence/>")
    assert [stanza.findtext(BODY) for stanza in other.receives_anything()] == [None, "4"]
    juliet.receives_anything()


def test_forged_ids_are_taken_away(romeo: Client, juliet: Client) -> None:
    """S43: all that claim to be by the account are gone, then there is one; those by others stay"""
    juliet.comes_online()
    forged = "".join(f"<stanza-id xmlns='urn:xmpp:sid:0' by='{by}' id='forged'/>"
                     for by in (JULIET, "Juliet@EXAMPLE.org", "example.org", ROMEO))  # fmt: skip
    theirs = "<stanza-id xmlns='urn:xmpp:sid:0' by='elsewhere.lit' id='theirs'/>"
    romeo.sends(f"<message type='chat' to='{JULIET}'><body>O</body>{forged}{theirs}</message>")
    came = juliet.receives_anything()[0]
    assert [(one.get("by"), one.get("id") == "forged") for one in came.findall(STANZA_ID)] == [
        ("elsewhere.lit", False), (str(JULIET), False)]  # fmt: skip
    assert [one.get("id") for one in asks(juliet).messages[0].findall(STANZA_ID)] == ["theirs"]
    assert str(ROMEO) not in [one.get("by") for one in asks(romeo).messages[0].findall(STANZA_ID)]


def test_a_note_to_oneself_is_archived_once(romeo: Client) -> None:
    """XEP-0313 §6.1.1, §4.1.1: and found by one's own address, which finds nothing else"""
    romeo.comes_online()
    romeo.sends(chat("Buy poison", to="romeo@example.org"))
    romeo.receives("<message type='chat' from='romeo@example.org/orchard'><body>Buy poison</body></message>")
    romeo.sends(chat("Juliet!"))
    assert asks(romeo).bodies == ["Buy poison", "Juliet!"]
    assert asks(romeo, form(with_="romeo@example.org")).bodies == ["Buy poison"]
    assert asks(romeo, form(with_="romeo@example.org/orchard")).bodies == ["Buy poison", "Juliet!"]


HINT = "<{} xmlns='urn:xmpp:hints'/>"
KEPT = {
    "body": "<body>O</body>",
    "encrypted": "<encrypted xmlns='eu.siacs.conversations.axolotl'><header sid='1'/></encrypted>",
    "omemo 2": "<encrypted xmlns='urn:xmpp:omemo:2'><header sid='1'/></encrypted>",
    "receipt": "<received xmlns='urn:xmpp:receipts' id='1'/>",
    "marker": "<displayed xmlns='urn:xmpp:chat-markers:0' id='1'/>",
    "reaction": "<reactions xmlns='urn:xmpp:reactions:0' id='1'><reaction>x</reaction></reactions>",
    "retraction": "<retract xmlns='urn:xmpp:message-retract:1' id='nothing'/>",
    "correction": "<body>Oh</body><replace xmlns='urn:xmpp:message-correct:0' id='1'/>",
    "reply": "<body>Yes</body><reply xmlns='urn:xmpp:reply:0' id='1' to='juliet@example.org'/>",
    "action": "<body>/me sighs</body>",
    "call": "<propose xmlns='urn:xmpp:jingle-message:0' id='1'><description xmlns='urn:d' media='audio'/></propose>",
    "wish": "<x xmlns='urn:x'/>" + HINT.format("store"),
    "with a typing notice": "<body>O</body><active xmlns='http://jabber.org/protocol/chatstates'/>",
}
NOT_KEPT = {
    "typing notice": "<composing xmlns='http://jabber.org/protocol/chatstates'/>",
    "request": "<request xmlns='urn:xmpp:receipts'/>",
    "markable": "<markable xmlns='urn:xmpp:chat-markers:0'/>",
    "unknown": "<x xmlns='urn:x'/>",
    "no-store": "<body>O</body>" + HINT.format("no-store"),
    "no-permanent-store": "<body>O</body>" + HINT.format("no-permanent-store"),
    "nothing": "",
}


@pytest.mark.parametrize(("content", "is_kept"), [*((text, True) for text in KEPT.values()),
                                                  *((text, False) for text in NOT_KEPT.values())],
                         ids=[*KEPT, *NOT_KEPT])  # fmt: skip
def test_what_says_something_is_kept(romeo: Client, juliet: Client, content: str, is_kept: bool) -> None:
    """XEP-0313 §6.1.1, XEP-0334 §4.1, §4.2, §4.4: and passes unchanged (0085, 0184, 0245, 0308, 0333, 0444, 0461)"""
    juliet.comes_online()
    romeo.sends(f"<message type='chat' id='m1' to='{JULIET}'>{content}</message>")
    came = juliet.receives(f"<message type='chat' id='m1' from='{romeo.jid}'>{content}</message>")
    assert (came.find(STANZA_ID) is not None) == is_kept
    for client in (romeo, juliet):
        assert len(asks(client).results) == is_kept
    if is_kept:
        kept, sent = asks(juliet).messages[0], ET.fromstring(f"<m xmlns='jabber:client'>{content}</m>")
        assert [ET.canonicalize(ET.tostring(child)) for child in kept] == [
            ET.canonicalize(ET.tostring(child)) for child in sent]  # fmt: skip


@pytest.mark.parametrize("type", ["groupchat", "headline", "error"])
def test_only_conversations_are_kept(romeo: Client, juliet: Client, type: str) -> None:
    """XEP-0313 §6.1.1, XEP-0334 §5: what rooms say is in the rooms' archives"""
    juliet.comes_online()
    romeo.sends(f"<message type='{type}' to='{juliet.jid}'><body>O</body>{HINT.format('store')}</message>")
    juliet.receives(f"<message type='{type}' from='{romeo.jid}'>...</message>")
    assert not asks(romeo).results and not asks(juliet).results


def test_what_is_refused_never_arrived(romeo: Client, juliet: Client) -> None:
    """XEP-0313 §6.1: blocked, or for a device that is gone"""
    juliet.comes_online()
    juliet.sends("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='romeo@example.org'/></block></iq>")
    juliet.receives_anything()
    romeo.sends(chat("Let me in"))
    romeo.receives_anything()
    juliet.sends("<iq type='set' id='b'><unblock xmlns='urn:xmpp:blocking'/></iq>")
    juliet.receives_anything()
    romeo.sends("<message to='juliet@example.org/gone'><body>To your desk</body></message>")
    romeo.receives_anything()
    assert asks(juliet).bodies == []


# -- queries


def test_filters_by_contact(talk: tuple[Client, Client], nurse: Client) -> None:
    """XEP-0313 §4.1.1: bare for all resources, full for one"""
    _romeo, juliet = talk
    nurse.sends(chat("Madam!", to=juliet.jid))
    juliet.receives_anything()
    for contact, bodies in {
        "romeo@example.org": ["1", "2", "3", "4", "5"],
        "Romeo@example.org/orchard": ["1", "2", "3", "4", "5"],
        "romeo@example.org/elsewhere": [],
        "nurse@example.org": ["Madam!"],
        "rome@example.org": [],
        "tybalt@example.org": [],
    }.items():
        assert asks(juliet, form(with_=contact)).bodies == bodies, contact


def test_filters_by_time(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §4.1.2: both borders belong to it, as the stamps have them"""
    romeo, _juliet = talk
    stamps = [found.find(".//{urn:xmpp:delay}delay").get("stamp", "") for found in asks(romeo).found]  # type: ignore[union-attr]
    assert asks(romeo, form(start=stamps[0], end=stamps[-1])).bodies == ["1", "2", "3", "4", "5"]
    assert asks(romeo, form(end="2010-07-07T13:23:54Z")).bodies == []
    assert asks(romeo, form(start="2099-07-07T13:23:54.123+02:00")).bodies == []
    refused(romeo, form(start="yesterday"), "bad-request")


def test_filters_by_id(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §4.1.3: between two messages, and single ones in the order of time"""
    romeo, _juliet = talk
    ids = asks(romeo).ids
    assert asks(romeo, form(after_id=ids[1])).bodies == ["3", "4", "5"]
    assert asks(romeo, form(before_id=ids[1])).bodies == ["1"]
    assert asks(romeo, form(after_id=ids[0], before_id=ids[3])).bodies == ["2", "3"]
    assert asks(romeo, form(ids=[ids[4], ids[1]])).bodies == ["2", "5"]
    assert asks(romeo, form(ids=[ids[4], ids[1]]) + page(max=1)).bodies == ["2"]
    assert asks(romeo, form(ids=ids) + page(max=1, before="")).bodies == ["5"]


def test_unknown_ids_are_not_found(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §4.1.3, §4.3.2"""
    romeo, juliet = talk
    known = asks(romeo).ids[0]
    for unknown in ("nonsense", "0" * 30, "f" * 30, known[:-1] + ("0" if known[-1] != "0" else "1"), asks(juliet).ids[0]):
        for content in (form(before_id=unknown), form(after_id=unknown), form(ids=[known, unknown]),
                        page(after=unknown), page(before=unknown)):  # fmt: skip
            refused(romeo, content, "item-not-found")


def test_pages_in_both_directions(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §4.3.1 to §4.3.3, XEP-0059 §2.2 to §2.5"""
    romeo, _juliet = talk
    first = asks(romeo, page(max=2))
    assert first.bodies == ["1", "2"] and not first.is_complete
    second = asks(romeo, page(max=2, after=first.last or ""))
    assert second.bodies == ["3", "4"] and not second.is_complete
    third = asks(romeo, page(max=2, after=second.last or ""))
    assert third.bodies == ["5"] and third.is_complete
    last = asks(romeo, page(max=2, before=""))
    assert last.bodies == ["4", "5"] and not last.is_complete
    before = asks(romeo, page(max=3, before=last.first or ""))
    assert before.bodies == ["1", "2", "3"] and before.is_complete
    assert asks(romeo, page(max=2, after=third.last or "")).bodies == []
    assert asks(romeo, page(max=0)).count == "5"
    assert asks(romeo, form(with_="nurse@example.org") + page(max=0)).count == "0"
    refused(romeo, page(max=2, index=2), "feature-not-implemented")
    refused(romeo, page(max="many"), "bad-request")


def test_a_flipped_page_has_the_same_messages(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §4.3.4: only their order is another"""
    romeo, _juliet = talk
    plain, flipped = (asks(romeo, page(max=3, before="") + flip) for flip in ("", "<flip-page/>"))
    assert plain.bodies == ["3", "4", "5"] and flipped.bodies == ["5", "4", "3"]
    assert (plain.first, plain.last) == (flipped.first, flipped.last)


def test_a_page_has_a_bound(server: MemoryServer, romeo: Client) -> None:
    """XEP-0313 §4.3.1: fifty unless asked for, 250 at most, and never more than a client's queue takes"""
    for _ in range(260):
        romeo.sends(chat("O"))
    assert len(asks(romeo).results) == 50
    assert len(asks(romeo, page(max=1000)).results) == 250
    for _ in range(4):
        romeo.sends(chat("O" * 200_000))
    answer = asks(romeo, page(max=4, before=""))
    assert len(answer.results) == 2 and not answer.is_complete
    assert len(asks(romeo, page(max=4, before=answer.first or "")).results) == 4


def test_the_form_names_what_a_query_may_say(romeo: Client) -> None:
    """XEP-0313 §4.1.5"""
    romeo.sends(f"<iq type='get' id='f'><query xmlns='{MAM}'/></iq>")
    romeo.receives(
        f"<iq type='result' id='f'><query xmlns='{MAM}'><x xmlns='jabber:x:data' type='form'>"
        f"<field type='hidden' var='FORM_TYPE'><value>{MAM}</value></field><field type='jid-single' var='with'/>"
        "<field type='text-single' var='start'/><field type='text-single' var='end'/>"
        "<field type='text-single' var='before-id'/><field type='text-single' var='after-id'/>"
        "<field type='list-multi' var='ids'><validate xmlns='http://jabber.org/protocol/xdata-validate'"
        " datatype='xs:string'><open/></validate></field><field type='boolean' var='include-groupchat'/></x></query></iq>"
    )
    refused(romeo, form(unheard_of="1"), "feature-not-implemented")
    refused(romeo, form().replace(MAM, "urn:other"), "bad-request")
    assert asks(romeo, form(include_groupchat="true")).bodies == []


def test_the_archive_tells_where_it_begins_and_ends(talk: tuple[Client, Client], nurse: Client) -> None:
    """XEP-0313 §5"""
    romeo, _juliet = talk
    ids = asks(romeo).ids
    romeo.sends(f"<iq type='get' id='m'><metadata xmlns='{MAM}'/></iq>")
    romeo.receives(f"<iq type='result' id='m'><metadata xmlns='{MAM}'><start id='{ids[0]}' timestamp='*'/>"
                   f"<end id='{ids[-1]}' timestamp='*'/></metadata></iq>")  # fmt: skip
    nurse.sends(f"<iq type='get' id='m'><metadata xmlns='{MAM}'/></iq>")
    nurse.receives(f"<iq type='result' id='m'><metadata xmlns='{MAM}'/></iq>")


def test_an_empty_archive_answers_too(romeo: Client) -> None:
    """XEP-0313 §4.1: no message is a result, no error"""
    for content in ("", page(before=""), form(with_="juliet@example.org"), page(max=0)):
        answer = asks(romeo, content)
        assert answer.bodies == [] and answer.first is None


def test_nobody_reads_anothers_archive(talk: tuple[Client, Client]) -> None:
    """XEP-0313 §8.1: and nobody learns whether there is one"""
    romeo, _juliet = talk
    for who in ("juliet@example.org", "nobody@example.org"):
        for content in (f"<query xmlns='{MAM}'/>", f"<prefs xmlns='{MAM}' default='always'/>"):
            romeo.sends(f"<iq type='set' id='q' to='{who}'>{content}</iq>")
            romeo.receives("<iq type='error' id='q'><error type='auth'><forbidden .../></error></iq>")


def test_support_can_be_discovered(romeo: Client) -> None:
    """XEP-0313 §7, XEP-0359 §5, XEP-0424 §4"""
    romeo.sends("<iq type='get' id='d' to='romeo@example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    features = {one.get("var") for one in romeo.receives("<iq type='result' ...>...</iq>")[0]}
    assert {MAM, f"{MAM}#extended", "urn:xmpp:sid:0", "urn:xmpp:message-retract:1#tombstone"} <= features


@pytest.mark.config(archive={"enabled": False})
def test_an_archive_that_is_switched_off_is_not_there(romeo: Client, juliet: Client) -> None:
    juliet.comes_online()
    romeo.sends(chat("O"))
    assert juliet.receives_anything()[0].find(STANZA_ID) is None
    refused(romeo, "", "service-unavailable")
    romeo.sends("<iq type='get' id='d' to='romeo@example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    features = {one.get("var") for one in romeo.receives("<iq type='result' ...>...</iq>")[0]}
    assert not any(name and name.startswith(MAM) for name in features)


# -- preferences (XEP-0441)


def prefers(client: Client, default: str, always: str = "", never: str = "") -> None:
    lists = "".join(f"<{name}>" + "".join(f"<jid>{jid}</jid>" for jid in jids.split()) + f"</{name}>"
                    for name, jids in (("always", always), ("never", never)))  # fmt: skip
    prefs = f"<prefs xmlns='{MAM}' default='{default}'>{lists}</prefs>"
    client.sends(f"<iq type='set' id='p'>{prefs}</iq><iq type='get' id='g'><prefs xmlns='{MAM}'/></iq>")
    client.receives(f"<iq type='result' id='p'>{prefs}</iq><iq type='result' id='g'>{prefs}</iq>")


def test_preferences_decide_whose_messages_are_kept(romeo: Client, juliet: Client, nurse: Client) -> None:
    """XEP-0441 §2.1, §2.3: each account for itself; a resource names a device"""
    juliet.comes_online()

    def kept(speaker: Client) -> bool:
        before = len(asks(juliet).results)
        speaker.sends(chat("O"))
        return len([one for one in juliet.receives_anything() if one.tag == MESSAGE]) == 1 and (
            len(asks(juliet).results) > before)  # fmt: skip

    juliet.sends(f"<iq type='get' id='g'><prefs xmlns='{MAM}'/></iq>")
    juliet.receives(f"<iq type='result' id='g'><prefs xmlns='{MAM}' default='always'><always/><never/></prefs></iq>")
    assert kept(romeo) and kept(nurse)
    prefers(juliet, "always", never="romeo@example.org")
    assert not kept(romeo) and kept(nurse)
    prefers(juliet, "never", always="romeo@example.org/orchard")
    assert kept(romeo) and not kept(nurse)
    prefers(juliet, "roster")
    assert not kept(romeo)
    juliet.sends("<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='romeo@example.org'/></query></iq>")
    juliet.receives_anything()
    assert kept(romeo) and not kept(nurse)
    assert len(asks(romeo).results) == 5


def test_preferences_are_checked(romeo: Client) -> None:
    """XEP-0441 §2.1.1; S59"""
    for default, jids, condition in (("sometimes", "", "bad-request"), ("always", "<jid>@@</jid>", "jid-malformed"),
                                     ("always", "".join(f"<jid>{n}@x</jid>" for n in range(1001)), "resource-constraint")):  # fmt: skip
        romeo.sends(f"<iq type='set' id='p'><prefs xmlns='{MAM}' default='{default}'><never>{jids}</never></prefs></iq>")
        romeo.receives(f"<iq type='error' id='p'><error ...><{condition} .../></error></iq>")


# -- taking back (XEP-0424)

RETRACTED = "{urn:xmpp:message-retract:1}retracted"


def takes_back(id: str, **attributes: str) -> str:
    more = "".join(f" {name}='{value}'" for name, value in attributes.items())
    return (f"<message type='chat' to='juliet@example.org' id='r-{id}'{more}>"
            f"<retract xmlns='urn:xmpp:message-retract:1' id='{id}'/></message>")  # fmt: skip


@pytest.mark.parametrize("body", ["O", "Have not saints lips, and holy palmers too? " * 20])
def test_a_message_taken_back_leaves_a_tombstone(romeo: Client, juliet: Client, server: MemoryServer, body: str) -> None:
    """XEP-0424 §4, §5: in both archives, with its id, moment and addresses; the retraction itself stays"""
    juliet.comes_online()
    romeo.sends(chat("Before", id="m0") + chat(body, id="m1") + chat("After", id="m2"))
    ids = asks(juliet).ids if juliet.receives_anything() else []
    romeo.sends(takes_back("m1"))
    assert juliet.receives_anything()
    for client in (romeo, juliet):
        answer = asks(client)
        assert answer.bodies == ["Before", None, "After", None]
        tombstone = answer.messages[1].find(RETRACTED)
        assert tombstone is not None and tombstone.get("id") == "r-m1" and tombstone.get("stamp")
        assert (answer.messages[1].get("id"), answer.messages[1].get("from")) == ("m1", romeo.jid)
        assert answer.messages[3].find("{urn:xmpp:message-retract:1}retract") is not None
        assert answer.found[1].find(".//{urn:xmpp:delay}delay").get("stamp")  # type: ignore[union-attr]
    assert asks(juliet).ids[:3] == ids and asks(juliet, form(ids=[ids[1]])).messages[0].find(RETRACTED) is not None
    server.storage.close()
    files = [path.read_text() for path in Path(server.storage.folder).rglob("*.jsonl")]
    assert not any(f">{body}<" in text for text in files), "what was taken back is not on the disk any more"
    assert sum("After" in text for text in files) == 2


def test_only_the_author_takes_a_message_back(romeo: Client, juliet: Client, nurse: Client) -> None:
    """XEP-0424 §5, §6; what is not there, or a retraction itself, is left alone"""
    juliet.comes_online()
    romeo.sends(chat("Mine", id="m1") + takes_back("unknown"))
    romeo.passes_barrier()
    nurse.sends(takes_back("m1") + takes_back("r-unknown"))
    nurse.passes_barrier()
    juliet.sends(takes_back("m1").replace("juliet@", "romeo@"))
    romeo.sends(takes_back("r-unknown"))
    juliet.receives_anything()
    for client in (romeo, juliet):
        answer = asks(client)
        assert answer.bodies[0] == "Mine"
        assert not any(message.find(RETRACTED) is not None for message in answer.messages)


# -- what lasts


def test_what_is_too_old_goes(server: MemoryServer, talk: tuple[Client, Client]) -> None:
    """XEP-0313 §3.2, `[archive] keep`: the oldest, exactly; the ids of what is gone are not found"""
    romeo, juliet = talk
    archives = server.server.registry.feature(xmppd.Archive).archives
    ids = asks(romeo).ids
    archives.purge(ROMEO, ids[2].encode())
    assert asks(romeo).bodies == ["3", "4", "5"]
    refused(romeo, page(after=ids[0]), "item-not-found")
    archives.purge(ROMEO, b"%014x" % (2**51))
    assert asks(romeo).bodies == []
    romeo.sends(chat("New"))
    assert asks(romeo).bodies == ["New"] and asks(romeo).ids[0] > ids[-1]
    juliet.receives("<message type='chat' from='romeo@example.org/orchard'><body>New</body></message>")


@pytest.mark.config(archive={"keep": "30 days"})
def test_old_messages_go_by_themselves(server: MemoryServer, romeo: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = xmppd.time.time_ns
    monkeypatch.setattr(xmppd.time, "time_ns", lambda: clock() - 31 * 86400 * 10**9)
    romeo.sends(chat("Old"))
    romeo.passes_barrier()
    server.server.registry.feature(xmppd.Archive).archives.forget(ROMEO)
    monkeypatch.undo()
    romeo.sends(chat("New"))
    assert asks(romeo).bodies == ["Old", "New"]
    server.clock.skip(86401)
    romeo.passes_barrier()
    romeo.passes_barrier()
    assert asks(romeo).bodies == ["New"]


@pytest.mark.config(limits={"archive_bytes": 1024 * 1024})
def test_an_archive_has_a_bound(romeo: Client, server: MemoryServer) -> None:
    """S59: then the oldest messages go"""
    for number in range(12):
        romeo.sends(chat(f"{number} " + "O" * 100_000))
    answer = asks(romeo, page(max=1, before=""))
    assert (answer.bodies[0] or "").startswith("11 ")
    first = (asks(romeo, page(max=1)).bodies[0] or "").partition(" ")[0]
    assert 1 <= int(first) <= 8
    archives = server.server.registry.feature(xmppd.Archive).archives
    assert sum(archives.log.size(ROMEO._replace(resource=part)) for part in archives.log.parts(ROMEO)) <= 1024 * 1024


def test_the_next_owner_of_a_name_finds_nothing(server: MemoryServer, talk: tuple[Client, Client]) -> None:
    """S59; trap 13 of accounts that are removed"""
    _romeo, juliet = talk
    juliet.disconnects()
    server.server.remove_account(JULIET)
    server.server.create_account(JULIET, xmppd.make_credentials("juliet-secret"))
    again = server.client().login("juliet", resource="balcony")
    assert asks(again).bodies == []


@pytest.mark.wire
def test_an_archive_survives_a_crash(process_server: ProcessServer) -> None:
    """DESIGN §5: what the receiver has seen is in both archives, though nothing was written but the journal"""
    romeo = process_server.client().login("romeo", resource="orchard")
    juliet = process_server.client().login("juliet", resource="balcony")
    juliet.comes_online()
    romeo.sends("".join(chat(str(number), id=f"m{number}") for number in range(20)) + takes_back("m3"))
    for _ in range(21):
        told = juliet.receives("<message type='chat' ...>...</message>")
    newest = told.find(STANZA_ID).get("id")  # type: ignore[union-attr]
    romeo.passes_barrier()
    before = [ET.tostring(result) for result in asks(juliet).found]
    process_server.cast.hang_up()
    for _ in range(2):
        process_server.kill()
        process_server.start()
        juliet = process_server.client().login("juliet", resource="balcony")
        romeo = process_server.client().login("romeo", resource="orchard")
        answer = asks(juliet)
        assert [ET.tostring(result) for result in answer.found] == before and answer.ids[-1] == newest
        assert answer.bodies[3] is None and asks(romeo).bodies == answer.bodies
        process_server.cast.hang_up()


# -- the files


@pytest.fixture
def archives(server: MemoryServer) -> xmppd.Archives:
    """Archives without a protocol."""
    return xmppd.Archives(server.storage, "attic")


def fill(archives: xmppd.Archives, owner: xmppd.JID, amount: int, size: int = 0) -> list[str]:
    ids = []
    for number in range(amount):
        contact = f"friend{number % 3}@example.org"
        stanza = xmppd.Stanza("{jabber:client}message", {"from": contact, "to": str(owner)})
        stanza.add(xmppd.E("{jabber:client}body", None, f"{number} " + "x" * (size and number % size)))
        ids.append(archives.append(owner, contact, stanza, 2**40))
    return ids


def whole(steps: Iterator[None]) -> xmppd.ArchivePage:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_paging_gives_everything_once_in_both_directions(
    server: MemoryServer, archives: xmppd.Archives, is_on_disk: bool
) -> None:
    """XEP-0313 §4.2: any size of page, with and without a contact, over months; lines longer than a block too"""
    ids = fill(archives, ROMEO, 60, 7)
    with pytest.MonkeyPatch.context() as patch:
        for month in range(1, 4):
            later = xmppd.time.time_ns() + month * 32 * 86400 * 10**9
            patch.setattr(xmppd.time, "time_ns", lambda later=later: later)
            ids += fill(archives, ROMEO, 25, 100_000 if month == 2 else 7)
            patch.undo()
    if is_on_disk:
        server.loop.turn(0)
        server.storage._begin_checkpoint()
        while server.storage._checkpointing:
            server.loop.turn(0.01)
    assert len(archives.log.parts(ROMEO)) == 4 and ids == sorted(ids)

    @given(size=st.integers(1, 60), backward=st.booleans(), contact=st.sampled_from([None, 0, 1, 2]))
    @settings(max_examples=25, deadline=None)
    def check(size: int, backward: bool, contact: int | None) -> None:
        wanted = ids if contact is None else [id for number, id in enumerate(ids[:60]) if number % 3 == contact] + [
            id for month in range(3) for number, id in enumerate(ids[60 + 25 * month :][:25]) if number % 3 == contact]  # fmt: skip
        friend = None if contact is None else xmppd.JID.parse(f"friend{contact}@example.org")
        seen: list[str] = []
        edge = xmppd.LAST_ID if backward else b""
        while True:
            selection = xmppd.Selection(b"" if backward else edge, edge if backward else xmppd.LAST_ID, friend, (), size, backward)
            page = whole(archives.select(ROMEO, selection))
            found = [record["id"] for record in page.records]
            seen = [*found, *seen] if backward else [*seen, *found]
            if page.is_complete:
                break
            edge = found[0].encode() if backward else found[-1].encode() + xmppd.LAST_ID
        assert seen == wanted

    check()
    for number in range(0, len(ids), 7):
        record = archives.get(ROMEO, ids[number])
        assert record is not None and record["id"] == ids[number]
        assert archives.find(ROMEO, ids[number][:-1] + ("0" if ids[number][-1] != "0" else "1")) is None
    buried = ids[::11]
    for id in buried:
        assert archives.bury(ROMEO, id, ids[-1])
    assert [record["id"] for record in whole(archives.select(ROMEO, xmppd.Selection(maximum=250))).records] == ids[:250]
    assert all("gone" in (archives.get(ROMEO, id) or {}) for id in buried)


def test_ids_increase_when_the_clock_goes_back(archives: xmppd.Archives, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN §5: also after a restart, when only the file knows the newest"""
    ids = fill(archives, ROMEO, 3)
    earlier = xmppd.time.time_ns() - 40 * 86400 * 10**9
    monkeypatch.setattr(xmppd.time, "time_ns", lambda: earlier)
    ids += fill(archives, ROMEO, 3)
    archives.forget(ROMEO)
    ids += fill(archives, ROMEO, 3)
    assert ids == sorted(set(ids)) and len(archives.log.parts(ROMEO)) == 1


def test_all_copies_carry_the_id(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """XEP-0313 §3.5, §6.1.1; trap 4: the receiver's other devices, the sender's too, each the own archive's; once"""
    juliet.comes_online()
    romeo.comes_online()
    hers, his = (server.client().login(name, resource="phone") for name in ("juliet", "romeo"))
    for client in (hers, his):
        client.sends("<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq><presence><priority>-1</priority></presence>")
        client.receives_anything()
    juliet.receives_anything()
    romeo.receives_anything()
    romeo.sends(chat("O", to=juliet.jid))
    told = [client.receives_anything()[0] for client in (juliet, hers, his)]
    ids = [{one.get("by", ""): one.get("id", "") for one in stanza.iter(STANZA_ID)} for stanza in told]
    assert ids[0] == ids[1] == {"juliet@example.org": asks(juliet).ids[0]}
    assert ids[2] == {"romeo@example.org": asks(romeo).ids[0]}
    assert asks(hers).ids == asks(juliet).ids and len(asks(his).ids) == 1


def test_a_journal_that_is_cut_anywhere_keeps_whole_turns(tmp_path: Path) -> None:
    """DESIGN §5: records, tombstones and what was dropped, with files that a checkpoint has written in part"""

    def opened(folder: Path) -> tuple[xmppd.Loop, xmppd.Storage, xmppd.Archives]:
        loop = xmppd.Loop()
        storage = xmppd.Storage(folder, loop, sync=False)
        return loop, storage, xmppd.Archives(storage, "archive")

    def records(archives: xmppd.Archives) -> list[object]:
        return list(whole(archives.select(ROMEO, xmppd.Selection(maximum=250))).records)

    loop, storage, archives = opened(tmp_path / "data")
    ids: list[str] = []
    turns: list[tuple[int, list[object]]] = []  # the length of the journal, and what the archive holds then
    for number in range(40):
        ids += fill(archives, ROMEO, 3, 5)
        if number % 5 == 4:
            archives.bury(ROMEO, ids[-number], ids[-1])
        if number % 13 == 12:
            archives.purge(ROMEO, ids[number].encode())
        loop.turn(0)
        if number == 20:
            storage._begin_checkpoint()
        while storage.synced < storage.position or storage._checkpointing:
            loop.turn(0.01)
        if number > 20:
            turns.append((xmppd.journals(tmp_path / "data")[-1][1].stat().st_size, records(archives)))
    copies = iter(range(1000))

    @given(cut=st.integers(turns[0][0], turns[-1][0]))
    @settings(max_examples=15, deadline=None)
    def check(cut: int) -> None:
        copy = tmp_path / f"copy{next(copies)}"
        shutil.copytree(tmp_path / "data", copy, ignore=shutil.ignore_patterns(".reserve", ".lock"))
        journal = xmppd.journals(copy)[-1][1]
        journal.write_bytes(journal.read_bytes()[:cut])
        for _ in range(2):  # the second time from files alone
            again, other, found = opened(copy)
            assert records(found) == [kept for length, kept in turns if length <= cut][-1]
            other.close()
            again.close()

    check()
    storage.close()
    loop.close()
