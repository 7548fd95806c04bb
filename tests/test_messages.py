"""Messages at rest (XEP-0160), their stamps (XEP-0203, XEP-0082), their hints (XEP-0334), and what nobody may forge."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import Client
from tests.servers import MemoryServer, ProcessServer

JULIET = "juliet@example.org"
UNAVAILABLE = "<error type='cancel' code='503'><service-unavailable .../></error>"
DELAY = "<delay xmlns='urn:xmpp:delay' from='example.org' stamp='*Z'/>"


def kept(body: str, attributes: str = f"to='{JULIET}' type='chat'", delay: str = DELAY) -> str:
    """What juliet gets of a message that has waited."""
    return f"<message from='romeo@example.org/orchard' {attributes}><body>{body}</body>{delay}</message>"


def comes(server: MemoryServer | ProcessServer, resource: str = "balcony", presence: str = "<presence/>") -> Client:
    """Juliet logs in and is available."""
    juliet = server.client().login("juliet", resource=resource)
    juliet.sends(presence)
    juliet.receives(presence.replace("<presence", f"<presence from='{JULIET}/{resource}' "))
    return juliet


def writes(romeo: Client, *bodies: str) -> None:
    """Romeo writes to juliet, and knows that the server has it all."""
    for body in bodies:
        romeo.sends(f"<message to='{JULIET}' type='chat'><body>{body}</body></message>")
    romeo.receives_nothing()


def stored(server: MemoryServer) -> list[str]:
    """The bodies that wait for juliet."""
    records = server.storage.log("offline").read(xmppd.JID.parse(JULIET))
    return [xmppd.child_text(xmppd.parse_element(record["stanza"]), "{jabber:client}body") for record in records]


# ---- the flow (§2) -----------------------------------------------------------------------


def test_messages_wait_for_their_reader_in_order(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-2-1, XEP0203-2-1, RFC6121-8.5.2.2.1-1"""
    writes(romeo, "O blessed", "blessed night!", "I am afeard.")
    juliet = comes(server)
    juliet.receives(kept("O blessed"), kept("blessed night!"), kept("I am afeard."))
    writes(romeo, "Being in night")
    juliet.receives("<message from='romeo@example.org/orchard' to='juliet@example.org' type='chat'>"
                    "<body>Being in night</body></message>")  # fmt: skip


def test_each_is_delivered_once(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-2-1: then it is removed"""
    writes(romeo, "O")
    juliet = comes(server)
    juliet.receives(kept("O"))
    assert stored(server) == []
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    juliet.receives_nothing()
    juliet.closes()
    comes(server).receives_nothing()


@pytest.mark.wire
def test_messages_wait_on_a_real_server_too(server: ProcessServer, romeo: Client) -> None:
    """XEP0160-2-1"""
    writes(romeo, "1", "2")
    juliet = comes(server)
    juliet.receives(kept("1"), kept("2"))
    juliet.closes()
    comes(server).receives_nothing()


def test_the_stamp_is_the_moment_of_arrival_in_utc(server: MemoryServer, romeo: Client) -> None:
    """XEP0203-2-1, XEP0082-3-1"""
    before = datetime.now(UTC).replace(microsecond=0)
    writes(romeo, "O")
    after = datetime.now(UTC)
    delay = comes(server).receives(kept("O")).find("{urn:xmpp:delay}delay")
    assert delay is not None
    stamp = delay.get("stamp") or ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", stamp)
    assert before <= datetime.fromisoformat(stamp) <= after


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1969-07-21T02:56:15Z", datetime(1969, 7, 21, 2, 56, 15, tzinfo=UTC)),
        ("1969-07-20T21:56:15-05:00", datetime(1969, 7, 21, 2, 56, 15, tzinfo=UTC)),
        ("1969-07-21T02:56:15.123456Z", datetime(1969, 7, 21, 2, 56, 15, 123456, tzinfo=UTC)),
        ("1969-07-21T02:56:15.1Z", datetime(1969, 7, 21, 2, 56, 15, 100000, tzinfo=UTC)),
        ("1969-07-21T05:26:15.5+02:30", datetime(1969, 7, 21, 2, 56, 15, 500000, tzinfo=UTC)),
    ],
)
def test_moments_of_others_are_understood(text: str, moment: datetime) -> None:
    """XEP0082-3-1"""
    assert xmppd.parse_stamp(text) == moment
    assert xmppd.parse_stamp(xmppd.stamp(moment)) == moment.replace(microsecond=0)
    assert xmppd.stamp(moment + timedelta(days=1)).endswith("Z")


@pytest.mark.parametrize("text", ["", "yesterday", "1969-07-21T02:56:15", "20020910T23:08:25", "1969-13-21T02:56:15Z"])
def test_moments_without_a_zone_are_none(text: str) -> None:
    """XEP0082-3-1"""
    with pytest.raises(ValueError):
        xmppd.parse_stamp(text)


def test_a_negative_priority_gets_nothing(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-2-1, RFC6121-8.5.2.1.1-6: neither what waits nor what comes, until it changes its mind."""
    writes(romeo, "before")
    juliet = comes(server, presence="<presence><priority>-1</priority></presence>")
    writes(romeo, "after")
    juliet.receives_nothing()
    juliet.sends("<presence><priority>0</priority></presence>")
    juliet.receives("<presence ...>...</presence>", kept("before"), kept("after"))


def test_one_resource_gets_them_even_if_two_come_at_once(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-2-1: the first one, not both."""
    writes(romeo, "O")
    balcony, chamber = (server.client().login("juliet", resource=name) for name in ("balcony", "chamber"))
    for client in (balcony, chamber):
        client.sends_raw("<presence/>")  # both within one turn of the loop
    came = [len([stanza for stanza in client.receives_anything() if stanza.tag.endswith("message")])
            for client in (balcony, chamber)]  # fmt: skip
    assert came == [1, 0]


def test_what_comes_while_others_are_under_way_is_not_lost(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-2-1: only what was delivered leaves the log."""
    writes(romeo, "1")
    juliet = server.client().login("juliet", resource="balcony")
    juliet.sends_raw("<presence/>")
    juliet.sends_raw("<presence><priority>-1</priority></presence>")  # in the same turn, and the next message too
    romeo.sends_raw(f"<message to='{JULIET}' type='chat'><body>2</body></message>")
    juliet.receives("<presence ...>...</presence>", kept("1"), "<presence ...>...</presence>")
    juliet.receives_nothing()
    assert stored(server) == ["2"]


def test_a_session_that_ends_too_early_leaves_them_to_the_next(
    server: MemoryServer, romeo: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XEP0160-2-1: until they are in the kernel's hands they stay in the log."""
    writes(romeo, "1", "2")
    unsent = []
    with monkeypatch.context() as network:
        network.setattr("tests.servers.MemoryTransport.when_sent", lambda _transport, callback: unsent.append(callback))
        juliet = comes(server)
        juliet.receives(kept("1"), kept("2"))
        juliet.disconnects()
    assert stored(server) == ["1", "2"]
    second = comes(server, "chamber")
    second.receives(kept("1"), kept("2"))
    assert stored(server) == []
    second.closes()
    writes(romeo, "3")
    [late] = unsent
    late()  # the first connection's news come when the log holds something else by now
    assert stored(server) == ["3"]


def test_a_session_that_ends_too_early_leaves_them_to_another_that_is_there(
    server: MemoryServer, romeo: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XEP0160-2-1: which would else get them when it says something of its presence, perhaps tomorrow."""
    writes(romeo, "1", "2")
    with monkeypatch.context() as network:
        network.setattr("tests.servers.MemoryTransport.when_sent", lambda _transport, callback: None)
        juliet = comes(server)
        juliet.receives(kept("1"), kept("2"))
        chamber = comes(server, "chamber")
        for client in (juliet, chamber):
            client.receives_anything()
        juliet.disconnects()
        chamber.receives("<presence type='unavailable' from='juliet@example.org/balcony'/>")
    server.clock.skip(2 * xmppd.CLOSE_TIMEOUT)
    chamber.receives(kept("1"), kept("2"))
    assert stored(server) == []


def test_a_quick_goodbye_does_not_bring_them_twice(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-2-1: whoever hangs up politely has got what was sent before."""
    writes(romeo, "1")
    offline = server.server.registry.feature(xmppd.OfflineMessages)
    juliet = server.client().login("juliet", resource="balcony")
    sent: list[Callable[[], None]] = []
    session = server.server.session(xmppd.JID.parse(juliet.jid))
    assert session
    session.stream.transport.when_sent = sent.append  # type: ignore[method-assign,assignment]  # the kernel takes its time
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>", kept("1"))
    juliet.closes()
    [done] = sent
    done()
    assert stored(server) == []
    assert not offline._flushing


def test_a_crash_between_delivery_and_drop_brings_them_twice(
    server: MemoryServer, romeo: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XEP0160-2-1: which is better than never."""
    writes(romeo, "1")
    monkeypatch.setattr("tests.servers.MemoryTransport.when_sent", lambda _transport, _callback: None)
    comes(server).receives(kept("1"))
    server.cast.hang_up()
    server.storage.close()
    loop = xmppd.Loop()
    again = xmppd.Storage(tmp_path / "data", loop, sync=False)
    try:
        [record] = again.log("offline").read(xmppd.JID.parse(JULIET))
        assert "<body>1</body>" in record["stanza"]
    finally:
        again.close()
        loop.close()


def test_a_power_cut_behind_the_delivery_brings_no_message_twice(process_server: ProcessServer) -> None:
    """XEP0160-2-1: once juliet has sent something behind it, it is surely dropped."""
    romeo = process_server.client().login("romeo", resource="orchard")
    writes(romeo, "1")
    juliet = comes(process_server)
    juliet.receives(kept("1"))
    juliet.sends("<iq type='set' id='p'><query xmlns='jabber:iq:private'><x xmlns='urn:x'/></query></iq>")
    juliet.receives("<iq type='result' id='p'/>")  # what is on disk now has everything before it
    process_server.kill()
    process_server.cast.hang_up()
    process_server.start()
    comes(process_server).receives_nothing()


# ---- which messages (§3, XEP-0334) --------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "is_kept"),
    [
        ("<message type='normal'><body>O</body></message>", True),
        ("<message><body>O</body></message>", True),
        ("<message type='chat'><body>O</body></message>", True),
        ("<message type='normal'><subject>O</subject></message>", True),
        ("<message type='chat'><received xmlns='urn:xmpp:receipts' id='1'/></message>", True),
        ("<message type='chat'><encrypted xmlns='urn:e'/><store xmlns='urn:xmpp:hints'/></message>", True),
        ("<message type='chat'><body/><active xmlns='http://jabber.org/protocol/chatstates'/></message>", True),
        ("<message type='chat'><body>O</body><no-permanent-store xmlns='urn:xmpp:hints'/></message>", True),
        ("<message type='chat'><body>O</body><no-copy xmlns='urn:xmpp:hints'/></message>", True),
        ("<message type='chat'><thread>t</thread><store xmlns='urn:xmpp:hints'/></message>", True),
        ("<message type='chat'><composing xmlns='http://jabber.org/protocol/chatstates'/></message>", False),
        (
            "<message type='chat'><thread>t</thread><gone xmlns='http://jabber.org/protocol/chatstates'/></message>",
            False,
        ),
        ("<message type='chat'><body>O</body><no-store xmlns='urn:xmpp:hints'/></message>", False),
        ("<message type='chat'><body>O</body><no-storage xmlns='urn:xmpp:hints'/></message>", False),
        ("<message type='chat'><store xmlns='urn:xmpp:hints'/><no-store xmlns='urn:xmpp:hints'/></message>", False),
        ("<message type='headline'><body>O</body><store xmlns='urn:xmpp:hints'/></message>", False),
        ("<message type='error'><body>O</body><store xmlns='urn:xmpp:hints'/></message>", False),
        ("<message type='chat'/>", False),
    ],
)
def test_what_is_worth_keeping_is_kept(server: MemoryServer, romeo: Client, message: str, is_kept: bool) -> None:
    """XEP0160-3-1, XEP-0334 §4.1, §4.2, §4.4, §5"""
    romeo.sends(message.replace("<message", f"<message to='{JULIET}'", 1))
    romeo.receives_nothing()
    juliet = comes(server)
    if is_kept:
        addressed = message.replace("<message", f"<message from='romeo@example.org/orchard' to='{JULIET}'", 1)
        juliet.receives(addressed.replace("</message>", DELAY + "</message>"))
    juliet.receives_nothing()


def test_groupchat_is_refused_and_not_kept(server: MemoryServer, romeo: Client) -> None:
    """XEP0160-3-1"""
    romeo.sends(f"<message to='{JULIET}' type='groupchat' id='g'><body>O</body></message>")
    romeo.receives(f"<message type='error' id='g'>{UNAVAILABLE}</message>")
    comes(server).receives_nothing()


def test_a_full_jid_that_is_gone_keeps_its_form(server: MemoryServer, romeo: Client) -> None:
    """RFC6121-8.5.3.2.1-1, RFC6120-8.1.1.1-1"""
    romeo.sends(f"<message to='{JULIET}/gone' type='chat'><body>O</body></message>")
    romeo.receives_nothing()
    comes(server).receives(kept("O", f"to='{JULIET}/gone' type='chat'"))


def test_notes_to_oneself_wait_too(server: MemoryServer) -> None:
    """RFC6120-10.3.1-1"""
    juliet = server.client().login("juliet", resource="balcony")
    juliet.sends("<message type='chat'><body>Buy a dagger</body></message>")
    juliet.receives_nothing()
    juliet.sends("<presence/>")
    note = f"<message from='{JULIET}/balcony' type='chat'><body>Buy a dagger</body>{DELAY}</message>"
    juliet.receives("<presence ...>...</presence>", note)


def test_the_server_says_that_it_keeps_messages(romeo: Client) -> None:
    """XEP0160-4-1"""
    romeo.sends("<iq type='get' id='d' to='example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    [answer] = romeo.receives_anything()
    assert answer.find(".//*[@var='msgoffline']") is not None


# ---- limits ------------------------------------------------------------------------------


@pytest.mark.config(limits={"offline": 3})
def test_a_full_box_refuses_contacts_and_is_silent_to_strangers(server: MemoryServer, romeo: Client) -> None:
    """XEP-0160 §2, S59; RFC6121-8.1-1: to a stranger a refusal would betray the account"""
    writes(romeo, "1", "2", "3", "4")
    juliet = comes(server)
    juliet.receives(kept("1"), kept("2"), kept("3"))
    romeo.befriends(juliet)
    juliet.closes()
    writes(romeo, "1", "2", "3")
    romeo.sends(f"<message to='{JULIET}' type='chat' id='m4'><body>4</body></message>")
    romeo.receives(f"<message type='error' from='{JULIET}' id='m4'>{UNAVAILABLE}</message>")
    romeo.sends(f"<message to='{JULIET}' type='chat'><active xmlns='http://jabber.org/protocol/chatstates'/></message>")
    romeo.receives_nothing()  # what is worth nothing is not missed


@pytest.mark.config(limits={"offline": 0})
def test_the_owner_may_keep_nothing_at_all(server: MemoryServer, romeo: Client) -> None:
    """RFC6121-8.5.2.2.1-1"""
    writes(romeo, "1")
    comes(server).receives_nothing()


@pytest.mark.wire
def test_all_that_is_kept_fits_into_what_a_client_may_leave_unread(server: ProcessServer, romeo: Client) -> None:
    """S59, S11: strangers could otherwise fill the box so full that its owner's stream breaks at each login."""
    for number in range(20):  # 5 MB, more than may wait for one client
        romeo.sends(f"<message to='{JULIET}' type='chat'><body>{number:250000}</body></message>")
        romeo.receives_nothing()
    juliet = comes(server)
    numbers = [int(stanza.findtext("{jabber:client}body") or "") for stanza in juliet.receives_anything()]
    assert numbers == list(range(len(numbers)))
    assert 2 < len(numbers) < 20


@pytest.mark.parametrize(
    "attributes", [" ".join(f"a{n}='1'" for n in range(xmppd.MAX_ATTRIBUTES - 2)), "xmlns:p='urn:p' p:a='1'"]
)
def test_a_message_at_its_limits_comes_out_again(server: MemoryServer, romeo: Client, attributes: str) -> None:
    """S59: the server adds attributes of its own, and must not refuse to read back what it took."""
    romeo.sends_raw(f"<message to='{JULIET}' type='chat' {attributes}><body>O</body></message>")
    romeo.receives_nothing()
    comes(server).receives("<message ...><body>O</body><delay .../></message>")


def test_messages_of_many_strangers_do_not_add_up_to_a_limit(server: MemoryServer) -> None:
    """S59: each of these is allowed, and so are all."""
    for number in range(3):
        stranger = server.client().login("romeo")
        names = "".join(f"<n{number}-{n}/>" for n in range(xmppd.MAX_NAMES // 2 - 50))
        prefixes = "".join(f" xmlns:p{number}-{n}='urn:{n}'" for n in range(40))
        stranger.sends_raw(
            f"<message to='{JULIET}' type='chat'><body>{number}</body><x xmlns='urn:x'{prefixes}>{names}</x></message>"
        )
        stranger.receives_nothing()
        stranger.closes()
    juliet = comes(server)
    bodies = [stanza.findtext("{jabber:client}body") for stanza in juliet.receives_anything()]
    assert bodies == ["0", "1", "2"]


@pytest.mark.parametrize(("length", "is_whole"), [(100, True), (100_000, False)])
def test_a_request_to_subscribe_is_no_way_to_fill_the_box(
    server: MemoryServer, romeo: Client, length: int, is_whole: bool
) -> None:
    """S59, S11, RFC 6121 §3.1.3: five hundred of them may wait, and all are sent at once."""
    status = f"<status>{'O' * length}</status>"
    romeo.sends(f"<presence type='subscribe' to='{JULIET}'>{status}</presence>")
    romeo.receives_nothing()
    request = (
        f"<presence type='subscribe' from='romeo@example.org' to='{JULIET}'>{status if is_whole else ''}</presence>"
    )
    comes(server).receives(request)


@pytest.mark.config(limits={"elements": 20000})
def test_a_generous_owner_can_read_what_was_sent(server: MemoryServer, romeo: Client) -> None:
    """S59: more elements than the limit that goes without saying."""
    romeo.sends_raw(f"<message to='{JULIET}' type='chat'><body>O</body><x xmlns='urn:x'>{'<a/>' * 15000}</x></message>")
    romeo.receives_nothing()
    comes(server).receives("<message ...><body>O</body><x xmlns='urn:x'>...</x><delay .../></message>")


def test_a_record_that_cannot_be_read_costs_nothing_but_itself(server: MemoryServer, romeo: Client) -> None:
    """S61: an owner may have edited the file."""
    writes(romeo, "1")
    server.storage.log("offline").append(xmppd.JID.parse(JULIET), {"at": xmppd.stamp(), "stanza": "<message><body>"})
    writes(romeo, "2")
    juliet = comes(server)
    juliet.receives(kept("1"), kept("2"))
    assert stored(server) == []


# ---- what nobody may forge ----------------------------------------------------------------


@pytest.mark.parametrize("is_there", [True, False])
def test_stamps_in_our_name_are_taken_away(server: MemoryServer, romeo: Client, is_there: bool) -> None:
    """S44, S43, XEP-0203 §5: those of others stay."""
    juliet = comes(server) if is_there else None
    forged = "".join(
        f"<delay xmlns='urn:xmpp:delay' from='{sender}' stamp='2002-09-10T23:08:25Z'/>"
        f"<stanza-id xmlns='urn:xmpp:sid:0' by='{sender}' id='1'/>"
        for sender in ("example.org", "EXAMPLE.org", "juliet@example.org", "Juliet@example.org")
    )
    honest = "".join(
        f"<delay xmlns='urn:xmpp:delay' from='{sender}' stamp='2002-09-10T23:08:25Z'/>"
        f"<stanza-id xmlns='urn:xmpp:sid:0' by='{sender}' id='1'/>"
        for sender in ("romeo@example.org/orchard", "room@conference.example.org", "@@")
    )
    honest += "<delay xmlns='urn:xmpp:delay' stamp='2002-09-10T23:08:25Z'/>"
    romeo.sends(f"<message to='{JULIET}' type='chat'>{forged}<body>O</body>{honest}</message>")
    romeo.receives_nothing()
    ours = "" if is_there else DELAY
    (juliet or comes(server)).receives(
        f"<message from='romeo@example.org/orchard' to='{JULIET}' type='chat'><body>O</body>{honest}{ours}</message>"
    )


@pytest.mark.parametrize(
    "content",
    [
        "<received xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'>"
        "<message xmlns='jabber:client' from='nurse@example.org/chamber' to='juliet@example.org/balcony'>"
        "<body>Hie you hence to Friar Laurence' cell</body></message></forwarded></received>",
        "<result xmlns='urn:xmpp:mam:2' id='1'><forwarded xmlns='urn:xmpp:forward:0'>"
        "<delay xmlns='urn:xmpp:delay' from='example.org' stamp='2010-07-10T23:08:25Z'/>"
        "<message xmlns='jabber:client' from='nurse@example.org' to='juliet@example.org'><body>O</body></message>"
        "</forwarded></result>",
    ],
    ids=["carbon", "archive"],
)
@pytest.mark.parametrize("to", [JULIET, JULIET + "/balcony"])
def test_a_forged_copy_has_its_forgers_name_on_it(server: MemoryServer, romeo: Client, content: str, to: str) -> None:
    """S42: clients believe copies of their own server only, and that is what `from` tells them."""
    juliet = comes(server)
    romeo.sends(f"<message to='{to}' type='chat'>{content}</message>")
    juliet.receives(f"<message from='romeo@example.org/orchard' to='{to}' type='chat'>{content}</message>")
