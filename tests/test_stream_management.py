"""Stream management (XEP-0198): acknowledgements, resumption, and what becomes of what nobody acknowledged.

A barrier is a ping, and so counts as a stanza in both directions: where an `h` matters, the
tests say how many there were.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

import xmppd
from tests.dialogue import Client
from tests.servers import MemoryServer, ProcessServer

SM = "xmlns='urn:xmpp:sm:3'"
ROMEO, JULIET = "romeo@example.org", "juliet@example.org"
FAILED = f"<failed {SM}><%s xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>"
DELAY = "<delay xmlns='urn:xmpp:delay' from='example.org' stamp='*Z'/>"
UNAVAILABLE = "<error type='cancel'><service-unavailable .../></error>"
Server = MemoryServer | ProcessServer


def manages(client: Client, attributes: str = "resume='true'") -> str:
    """Enable stream management; return the SM-ID."""
    client.sends(f"<enable {SM} {attributes}/>")
    return client.receives(f"<enabled {SM} ...>...</enabled>").get("id", "")


def comes_back(server: Server, id: str, h: int, name: str = "juliet") -> Client:
    """Log in again and ask for the old session; what the server says to that is still to come."""
    client = server.client()
    client.logs_in(name)
    client.sends(f"<resume {SM} previd='{id}' h='{h}'/>")
    return client


def resumes(server: Server, id: str, h: int, theirs: int | str = "*", name: str = "juliet",
            old: str = f"{JULIET}/balcony") -> Client:  # fmt: skip
    """Resume a session; `theirs` is how many stanzas the server says it has handled."""
    client = comes_back(server, id, h, name)
    client.receives(f"<resumed {SM} previd='{id}' h='{theirs}'/>")
    client.jid = old
    return client


def writes(client: Client, *bodies: str, to: str = f"{JULIET}/balcony", type: str = "chat") -> None:
    """Write, and know that the server has handled it."""
    for body in bodies:
        client.sends(f"<message to='{to}' type='{type}'><body>{body}</body></message>")
    client.passes_barrier()


def said(body: str, to: str = f"{JULIET}/balcony", type: str = "chat", more: str = "",
         sender: str = f"{ROMEO}/orchard") -> str:  # fmt: skip
    """What arrives of `writes`."""
    return f"<message from='{sender}' to='{to}' type='{type}'><body>{body}</body>{more}</message>"


def stored(server: MemoryServer) -> list[str]:
    """The bodies that wait for juliet."""
    records = server.storage.log("offline").read(xmppd.JID.parse(JULIET))
    return [xmppd.child_text(xmppd.parse_element(record["stanza"]), "{jabber:client}body") for record in records]


def passes(server: MemoryServer, seconds: float) -> None:
    """Let time pass."""
    server.clock.skip(seconds)
    server.loop.turn(0)


# ---- enabling (§2, §3) -------------------------------------------------------------------


def test_the_feature_is_offered_when_stanzas_may_follow(server: Server) -> None:
    """§2 example 1: after the login, and not before"""
    client = server.client().connect()
    assert client.negotiates().find("{urn:xmpp:sm:3}sm") is None
    client.starts_tls()
    assert client.negotiates().find("{urn:xmpp:sm:3}sm") is None
    client.authenticates("romeo", "romeo-secret")
    assert client.negotiates().find("{urn:xmpp:sm:3}sm") is not None


@pytest.mark.parametrize(("asked", "answered"), [
    ("", ""),
    ("resume='true'", "id='*' resume='true' max='3600'"),
    ("resume='1' max='100000'", "id='*' resume='true' max='3600'"),
    ("resume='true' max='60'", "id='*' resume='true' max='60'"),
    ("resume='true' max='nonsense'", "id='*' resume='true' max='3600'"),
    ("resume='false'", ""),
])  # fmt: skip
def test_it_is_enabled_as_the_client_wishes_within_our_limit(romeo: Client, asked: str, answered: str) -> None:
    """§3 examples 2 to 4, §5 examples 8 to 10"""
    romeo.sends(f"<enable {SM} {asked}/>")
    romeo.receives(f"<enabled {SM} {answered}/>")


@pytest.mark.config(limits={"resumption_timeout": 0})
def test_the_owner_may_allow_no_resumption(romeo: Client) -> None:
    """§5: the answer has no resume then"""
    romeo.sends(f"<enable {SM} resume='true'/>")
    romeo.receives(f"<enabled {SM}/>")


def test_an_id_is_long_random_and_never_the_same(romeo: Client, juliet: Client, nurse: Client) -> None:
    """S34, §5: 144 bits, in an attribute of less than 4000 bytes"""
    ids = {manages(client) for client in (romeo, juliet, nurse)}
    assert len(ids) == 3
    assert all(re.fullmatch("[A-Za-z0-9_-]{24}", id) for id in ids)


def test_not_before_a_resource_is_bound(server: Server) -> None:
    """§3 example 5; §6: the stream goes on"""
    client = server.client().connect()
    client.negotiates()
    client.sends(f"<enable {SM}/>")
    client.receives(FAILED % "unexpected-request")
    client.starts_tls()
    client.negotiates()
    client.authenticates("romeo", "romeo-secret")
    client.negotiates()
    client.sends(f"<enable {SM}/>")
    client.receives(FAILED % "unexpected-request")
    client.binds("orchard")
    manages(client)


def test_a_second_attempt_ends_the_stream(romeo: Client) -> None:
    """§3, example 6"""
    manages(romeo)
    romeo.sends(f"<enable {SM}/>")
    romeo.receives(FAILED % "unexpected-request")
    romeo.receives_stream_error("policy-violation")
    assert romeo.is_closed()


@pytest.mark.parametrize("element", [f"<r {SM}/>", f"<a {SM} h='0'/>"])
def test_acknowledgements_before_it_is_enabled_are_refused(romeo: Client, element: str) -> None:
    """§6"""
    romeo.sends(element)
    romeo.receives(FAILED % "unexpected-request")


# ---- acknowledgements (§4) ---------------------------------------------------------------


def test_stanzas_are_counted_and_nothing_else(romeo: Client, juliet: Client) -> None:
    """§4 example 7: from <enable/> on; the elements of stream management don't count, nor does white space"""
    romeo.passes_barrier()
    manages(romeo)
    romeo.sends(f"<r {SM}/>")
    romeo.receives(f"<a {SM} h='0'/>")
    romeo.sends(f" <r {SM}/><message to='{JULIET}/balcony'><body>O</body></message> <r {SM}/>")
    romeo.receives(f"<a {SM} h='0'/><a {SM} h='1'/>")
    romeo.sends(f"<message to='nobody@nowhere.example' id='m'><body>O</body></message><r {SM}/>")
    romeo.receives("<message type='error' from='nobody@nowhere.example' id='m'>...</message>", f"<a {SM} h='2'/>")
    juliet.receives(said("O").replace(" type='chat'", ""))


def test_the_server_asks_too(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§4: a second after the first stanza that is not acknowledged, once; and again when there is more"""
    juliet.hears_requests = True
    manages(juliet)
    writes(romeo, "a", "b")
    juliet.receives(said("a"), said("b"))
    passes(server, xmppd.ACK_DELAY)
    juliet.receives(f"<r {SM}/>")
    passes(server, 5)
    writes(romeo, "c")
    juliet.receives(said("c"))
    juliet.sends(f"<a {SM} h='2'/>")
    passes(server, xmppd.ACK_DELAY)
    juliet.receives(f"<r {SM}/>")
    juliet.sends(f"<a {SM} h='3'/>")
    passes(server, 5)
    juliet.receives_nothing()  # whose barrier is a stanza


def test_after_many_stanzas_it_asks_at_once(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """The queue stays short whatever the speed"""
    juliet.hears_requests = True
    manages(juliet)
    writes(romeo, *map(str, range(xmppd.ACK_EVERY)))
    juliet.receives(*(said(str(number)) for number in range(xmppd.ACK_EVERY)), f"<r {SM}/>")


def test_a_client_that_does_not_answer_is_gone_and_may_come_back(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """§4, XEP-0199 §4.2: a dead peer is noticed a minute after the next stanza; its session waits"""
    juliet.hears_requests = True
    id = manages(juliet)
    writes(romeo, "a")
    juliet.receives(said("a"))
    passes(server, xmppd.ACK_DELAY)
    juliet.receives(f"<r {SM}/>")
    passes(server, server.server.config.limits.answer_timeout)
    juliet.receives_stream_error("connection-timeout")
    assert juliet.is_closed()
    resumes(server, id, 0, 0).receives(said("a"))


def test_each_question_has_a_minute_of_its_own(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§4: an answer to the question before doesn't make the next one late, nor the client dead"""
    juliet.hears_requests = True
    manages(juliet)
    limit = server.server.config.limits.answer_timeout
    for number in range(3):
        writes(romeo, str(number))
        juliet.receives(said(str(number)))
        passes(server, xmppd.ACK_DELAY)
        juliet.receives(f"<r {SM}/>")
        passes(server, limit - 5)
        if number < 2:
            juliet.sends(f"<a {SM} h='{number + 1}'/>")
    assert not juliet.unread()
    passes(server, 6)
    juliet.receives_stream_error("connection-timeout")
    assert juliet.is_closed()


def test_whatever_it_says_proves_that_it_is_there(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§4: a client that is slow to answer, but says other things, is not cut off"""
    manages(juliet)
    writes(romeo, "a")
    juliet.receives(said("a"))
    passes(server, xmppd.ACK_DELAY)
    juliet.passes_barrier()
    passes(server, server.server.config.limits.answer_timeout)
    juliet.receives_nothing()


def test_a_silent_client_with_stream_management_is_asked_by_it(server: MemoryServer, juliet: Client) -> None:
    """§1, §4 rather than XEP-0199"""
    juliet.hears_requests = True
    id = manages(juliet)
    passes(server, server.server.config.limits.silence_timeout + 1)
    juliet.receives(f"<r {SM}/>")
    passes(server, server.server.config.limits.answer_timeout + 1)
    juliet.receives_stream_error("connection-timeout")
    assert juliet.is_closed()
    resumes(server, id, 0, 0)


@pytest.mark.parametrize("h", ["3", "4294967295"])
def test_who_acknowledges_more_than_was_sent_is_cut_off(romeo: Client, juliet: Client, h: str) -> None:
    """§6 example 17"""
    manages(juliet)
    writes(romeo, "a", "b")
    juliet.receives(said("a"), said("b"))
    juliet.sends(f"<a {SM} h='{h}'/>")
    juliet.receives_stream_error("undefined-condition", f"<handled-count-too-high {SM} h='{h}' send-count='2'/>")
    assert juliet.is_closed()


@pytest.mark.parametrize("h", ["", " h=''", " h='-1'", " h='4294967296'", " h='x'", " h='٣'"])
def test_what_is_no_number_is_no_acknowledgement(juliet: Client, h: str) -> None:
    """§4: an <a/> has an h, of 32 bits"""
    manages(juliet)
    juliet.sends(f"<a {SM}{h}/>")
    juliet.receives_stream_error("policy-violation")
    assert juliet.is_closed()


def test_counters_start_again_at_zero(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§4, §7 trap 2: 2**32 - 1 is followed by 0, in both directions, and a session is resumed across it"""
    id = manages(juliet)
    management = server.server.session(xmppd.JID.parse(juliet.jid)).management  # type: ignore[union-attr]
    assert management is not None
    management.handled = management.sent = 2**32 - 1
    juliet.sends(f"<r {SM}/><message to='{ROMEO}/orchard'><body>O</body></message><r {SM}/>")
    juliet.receives(f"<a {SM} h='4294967295'/><a {SM} h='0'/>")
    romeo.receives(f"<message from='{JULIET}/balcony'><body>O</body></message>")
    writes(romeo, "a", "b", "c")
    juliet.receives(said("a"), said("b"), said("c"))
    juliet.sends(f"<a {SM} h='0'/>")  # that is: the first of three
    juliet.disconnects()
    juliet = resumes(server, id, 1, 0)
    juliet.receives(said("c"))


# ---- output commit (DESIGN §5) -----------------------------------------------------------


class SlowDisk:
    """Stands in for a storage whose disk takes its time."""

    def __init__(self) -> None:
        self.position = self.synced = 0


def test_what_is_not_on_the_disk_is_not_durable() -> None:
    """DESIGN §5: the durable h is that of the last stanza whose changes, and all before it, are synced"""
    disk = SlowDisk()
    acknowledgements = xmppd.Acknowledgements(cast("xmppd.Storage", disk))
    acknowledgements.count()
    assert acknowledgements.durable == 1
    for _ in range(2):  # two stanzas in one turn, whose line is number 1
        disk.position = 1
        acknowledgements.count()
    disk.position = 2
    acknowledgements.count()
    assert (acknowledgements.handled, acknowledgements.durable) == (4, 1)
    disk.synced = 1
    assert acknowledgements.durable == 3
    disk.synced = 2
    assert acknowledgements.durable == 4


def test_any_history_of_stanzas_and_syncs_gives_a_durable_count_that_is_true() -> None:
    """DESIGN §5: never more than the stanzas whose positions are synced, and all of them in the end"""
    chance = random.Random(198)
    for _ in range(50):
        disk, positions = SlowDisk(), []
        acknowledgements = xmppd.Acknowledgements(cast("xmppd.Storage", disk))
        for _ in range(40):
            step = chance.random()
            if step < 0.3:
                disk.position += 1
            elif step < 0.5:
                disk.synced = chance.randint(disk.synced, disk.position)
            else:
                acknowledgements.count()
                positions.append(disk.position)
            sure = next((at for at, position in enumerate(positions) if position > disk.synced), len(positions))
            assert acknowledgements.durable <= sure
        disk.synced = disk.position
        assert acknowledgements.durable == acknowledgements.handled == len(positions)


def test_when_the_disk_is_slow_an_answer_about_what_it_has_goes_ahead() -> None:
    """§4: MUST NOT be withheld for any condition other than a timeout"""
    disk, sent, ahead = SlowDisk(), [], []
    timers: list[Callable[[], None]] = []
    transport = SimpleNamespace(write_ahead=ahead.append)
    stream = SimpleNamespace(send_element=lambda element: sent.append(element.get("h")), transport=transport)
    loop = SimpleNamespace(call_later=lambda seconds, callback: timers.append(callback))
    session: Any = SimpleNamespace(
        server=SimpleNamespace(storage=disk, loop=loop, registry=SimpleNamespace(listeners=lambda event: [])),
        stream=stream,
        is_attached=True,
    )
    management = xmppd.SessionManagement(session, "id", 60)
    management.count()
    management.answer()
    assert (sent, timers) == (["1"], [])
    disk.position = 1
    management.count()
    management.answer()  # which the connection holds back until the disk has caught up
    timers.pop()()
    assert (sent, ahead) == (["1", "2"], [b"<a xmlns='urn:xmpp:sm:3' h='1'/>"])
    management.answer()
    disk.synced = 1
    timers.pop()()
    assert len(ahead) == 1


# ---- resumption (§5) ---------------------------------------------------------------------


def test_a_session_is_resumed_where_it_was_left(server: Server, romeo: Client, juliet: Client) -> None:
    """§5 examples 12 and 13: both sides repeat what the other has not got, in order, before anything else"""
    juliet.comes_online()
    id = manages(juliet)
    writes(romeo, "a", "b")
    juliet.receives(said("a"), said("b"))
    juliet.sends(f"<message to='{ROMEO}/orchard'><body>O</body></message><r {SM}/>")
    juliet.receives(f"<a {SM} h='1'/>")
    juliet.disconnects()
    writes(romeo, "c", "d")
    romeo.receives(f"<message from='{JULIET}/balcony'><body>O</body></message>")
    juliet = resumes(server, id, 1, 1)
    juliet.receives(said("b"), said("c"), said("d"))
    writes(romeo, "e")
    juliet.receives(said("e"))
    juliet.sends(f"<presence><status>back</status></presence><r {SM}/>")
    juliet.receives(f"<presence from='{juliet.jid}'><status>back</status></presence>", f"<a {SM} h='2'/>")


@pytest.mark.wire
def test_a_session_is_resumed_over_tls(server: Server, romeo: Client, juliet: Client) -> None:
    """§5, on real connections"""
    test_a_session_is_resumed_where_it_was_left(server, romeo, juliet)


def test_nobody_hears_of_a_cut(server: Server, romeo: Client, juliet: Client) -> None:
    """§7, trap 2: no unavailable presence, and no available one; the roster shows her as before"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    id = manages(juliet)
    juliet.disconnects()
    romeo.receives_nothing()
    juliet = resumes(server, id, 0, 0)
    romeo.receives_nothing()
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives(f"<presence from='{ROMEO}/orchard'><show>away</show></presence>")
    juliet.receives(f"<presence from='{ROMEO}/orchard' to='{JULIET}'><show>away</show></presence>")


def test_resuming_takes_over_from_a_connection_that_is_still_open(
    server: Server, romeo: Client, juliet: Client
) -> None:
    """§5 example 15: the old stream ends with conflict; nobody hears of it"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    id = manages(juliet)
    writes(romeo, "a")
    again = comes_back(server, id, 0)
    juliet.receives(said("a"))
    juliet.receives_stream_error("conflict")
    assert juliet.is_closed()
    again.jid = f"{JULIET}/balcony"
    again.receives(f"<resumed {SM} previd='{id}' h='*'/>", said("a"))
    romeo.receives_nothing()


def test_a_session_may_be_resumed_many_times(server: Server, romeo: Client, juliet: Client) -> None:
    """§5: counters go on; what is acknowledged never comes again"""
    id = manages(juliet)
    for number in range(5):
        juliet.disconnects()
        writes(romeo, str(number))
        juliet = resumes(server, id, number, 0)
        juliet.receives(said(str(number)))


def test_whom_the_session_does_not_belong_to_cannot_resume_it(server: Server, nurse: Client, juliet: Client) -> None:
    """S34: another account learns nothing but that there is no such session, and juliet's goes on"""
    id = manages(juliet)
    juliet.disconnects()
    thief = comes_back(server, id, 0, "nurse")
    thief.receives(FAILED % "item-not-found")
    thief.binds("thief")
    juliet = resumes(server, id, 0, 0)
    juliet.receives_nothing()


def test_the_login_comes_before_the_resumption(server: Server, juliet: Client) -> None:
    """§10, §5: not before it, and not instead of it"""
    id = manages(juliet)
    juliet.disconnects()
    client = server.client().connect()
    client.negotiates()
    client.sends(f"<resume {SM} previd='{id}' h='0'/>")
    client.receives(FAILED % "unexpected-request")
    resumes(server, id, 0, 0)


def test_a_bound_stream_cannot_resume(romeo: Client, server: Server) -> None:
    """§5: it takes the place of binding; a session of one's own that is managed stays as it is"""
    id = manages(romeo)
    romeo.sends(f"<resume {SM} previd='{id}' h='0'/>")
    romeo.receives(FAILED % "unexpected-request")


@pytest.mark.parametrize("attributes", ["previd='ID'", "previd='ID' h='x'", "previd='ID' h='4294967296'"])
def test_a_resumption_needs_a_number(server: Server, juliet: Client, attributes: str) -> None:
    """§5: MUST include h; §6"""
    id = manages(juliet)
    juliet.disconnects()
    client = server.client()
    client.logs_in("juliet")
    client.sends(f"<resume {SM} {attributes.replace('ID', id)}/>")
    client.receives(FAILED % "bad-request")
    client.sends(f"<resume {SM} previd='nonsense' h='0'/><resume {SM} h='0'/>")
    client.receives(FAILED % "item-not-found", FAILED % "item-not-found")
    client.sends(f"<resume {SM} previd='{id}' h='0'/>")
    client.receives(f"<resumed {SM} previd='{id}' h='0'/>")


def test_resuming_with_too_high_a_count_ends_the_new_stream_only(server: Server, juliet: Client) -> None:
    """§6"""
    id = manages(juliet)
    juliet.disconnects()
    wrong = comes_back(server, id, 7)
    wrong.receives_stream_error("undefined-condition", f"<handled-count-too-high {SM} h='7' send-count='0'/>")
    assert wrong.is_closed()
    resumes(server, id, 0, 0)


def test_a_session_that_was_not_to_be_resumed_cannot_be(server: Server, juliet: Client, romeo: Client) -> None:
    """§3: resume defaults to false"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    manages(juliet, "")
    juliet.disconnects()
    romeo.receives(f"<presence type='unavailable' from='{JULIET}/balcony' to='{ROMEO}'/>")


def test_a_client_that_closes_its_stream_is_gone(server: Server, romeo: Client, juliet: Client) -> None:
    """§7: </stream:stream> ends the session, and its presence"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    id = manages(juliet)
    juliet.closes()
    romeo.receives(f"<presence type='unavailable' from='{JULIET}/balcony' to='{ROMEO}'/>")
    again = comes_back(server, id, 0)
    again.receives(FAILED.replace(SM, f"{SM} h='0'") % "item-not-found")


def test_an_expired_session_is_known_by_its_count(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§5 example 14: then the client knows what not to repeat; and it may bind"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    id = manages(juliet, "resume='true' max='60'")
    juliet.sends("<presence/><presence/>")
    juliet.passes_barrier()
    juliet.forgets_unread()
    juliet.disconnects()
    romeo.receives_anything()
    passes(server, 59)
    romeo.receives_nothing()
    passes(server, 2)
    romeo.receives(f"<presence type='unavailable' from='{JULIET}/balcony' to='{ROMEO}'/>")
    again = comes_back(server, id, 0)
    again.receives(FAILED.replace(SM, f"{SM} h='3'") % "item-not-found")  # two presences and a barrier
    again.binds("balcony")
    stranger = comes_back(server, id, 0, "nurse")
    stranger.receives(FAILED % "item-not-found")
    stranger.binds()


def test_an_answer_that_was_being_worked_out_is_not_lost(server: MemoryServer, juliet: Client) -> None:
    """§4: the request counts as handled, so its result reaches the next stream"""
    id = manages(juliet)
    juliet.sends("<iq type='set' id='p' to='example.org'><query xmlns='jabber:iq:register'>"
                 "<username>juliet</username><password>a new password</password></query></iq>")  # fmt: skip
    juliet.disconnects()
    again = server.client()
    again.logs_in("juliet", password="a new password" if _new_password(server) else "")
    again.sends(f"<resume {SM} previd='{id}' h='0'/>")
    again.jid = f"{JULIET}/balcony"
    again.receives(f"<resumed {SM} previd='{id}' h='1'/>", "<iq type='result' id='p' from='example.org'/>")


def _new_password(server: MemoryServer) -> bool:
    """Wait until the worker is done."""
    before = server.server.credentials(xmppd.JID.parse(JULIET))
    for _ in range(1000):
        server.loop.turn(0.02)
        if server.server.credentials(xmppd.JID.parse(JULIET)) != before:
            return True
    return False


# ---- who else ends a session that waits ----------------------------------------------------


def test_binding_the_same_resource_ends_the_old_session(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """RFC6120-7.7.2.2: what it had not got comes to the new one"""
    juliet.comes_online()
    id = manages(juliet)
    juliet.disconnects()
    writes(romeo, "a")
    juliet = server.client().login("juliet", resource="balcony")
    juliet.sends("<presence/>")
    juliet.receives(f"<presence from='{JULIET}/balcony'/>", said("a", more=DELAY))
    comes_back(server, id, 0).receives(FAILED.replace(SM, f"{SM} h='0'") % "item-not-found")


@pytest.mark.config(limits={"resources": 2})
def test_sessions_that_wait_make_room(server: Server, romeo: Client) -> None:
    """RFC 6120 §7.6.2.1: a client that comes back under another name is not locked out by its own past"""
    for _ in range(4):
        juliet = server.client().login("juliet")
        manages(juliet)
        juliet.disconnects()
    alive = [server.client().login("juliet") for _ in range(2)]
    late = server.client()
    late.logs_in("juliet")
    late.sends("<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>")
    late.receives(
        "<iq type='error' id='b' ...><error type='wait' ...><resource-constraint .../><text ...>*</text></error></iq>"
    )
    for client in alive:
        client.receives_nothing()


def test_a_new_password_ends_the_sessions_that_wait(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """S33, S34: a stolen phone cannot resume"""
    id = manages(juliet)
    juliet.disconnects()
    juliet_jid = xmppd.JID.parse(JULIET)
    server.server.set_credentials(juliet_jid, dict(server.server.accounts[juliet_jid]["credentials"]))
    assert server.server.sessions(juliet_jid) == ()
    comes_back(server, id, 0).receives(FAILED.replace(SM, f"{SM} h='0'") % "item-not-found")


def test_an_account_that_goes_takes_its_sessions_along(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """Trap 13: the next owner of the name inherits nothing"""
    juliet.comes_online()
    id = manages(juliet)
    juliet.disconnects()
    writes(romeo, "a")
    server.server.remove_account(xmppd.JID.parse(JULIET))
    server.add_account(JULIET, "juliet-secret")
    assert stored(server) == []
    comes_back(server, id, 0).receives(FAILED.replace(SM, f"{SM} h='0'") % "item-not-found")


# ---- what nobody acknowledged (§4) ---------------------------------------------------------


def test_messages_of_a_session_that_died_wait_for_the_next(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§4: committed to offline storage with the moment at which they were sent, each once, acknowledged ones never"""
    juliet.comes_online()
    manages(juliet, "resume='true' max='60'")
    writes(romeo, "a", "b")
    juliet.receives(said("a"), said("b"))
    juliet.sends(f"<a {SM} h='1'/>")
    juliet.disconnects()
    writes(romeo, "c", "d", type="normal")
    assert stored(server) == []
    passes(server, 61)
    assert stored(server) == ["b", "c", "d"]
    juliet = server.client().login("juliet", resource="balcony")
    juliet.sends("<presence/>")
    juliet.receives(f"<presence from='{JULIET}/balcony'/>", said("b", more=DELAY))
    juliet.receives(said("c", type="normal", more=DELAY), said("d", type="normal", more=DELAY))


def test_without_resumption_they_wait_too(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§8.1: acknowledgements alone are enough for that"""
    juliet.comes_online()
    manages(juliet, "")
    writes(romeo, "a")
    juliet.forgets_unread()
    juliet.disconnects()
    assert stored(server) == ["a"]


def test_another_resource_gets_what_was_meant_for_the_dead_one(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """§4: delivery to an alternate resource"""
    juliet.comes_online()
    manages(juliet, "resume='true' max='60'")
    juliet.disconnects()
    writes(romeo, "a")
    desk = server.client().login("juliet", resource="desk")
    desk.comes_online()
    desk.forgets_unread()
    passes(server, 61)
    desk.receives(f"<presence type='unavailable' from='{JULIET}/balcony' to='{JULIET}/desk'/>",
                  said("a", to=f"{JULIET}/balcony", more=DELAY))  # fmt: skip
    assert stored(server) == []


def test_who_had_it_already_does_not_get_it_twice(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§4, RFC6121-8.5.2.1.1: a message to the bare JID goes to all with the highest priority"""
    juliet.comes_online()
    desk = server.client().login("juliet", resource="desk")
    desk.comes_online()
    juliet.receives_anything()
    manages(juliet, "resume='true' max='60'")
    juliet.disconnects()
    desk.forgets_unread()
    writes(romeo, "to both", to=JULIET)
    desk.receives(said("to both", to=JULIET))
    late = server.client().login("juliet", resource="late")
    late.comes_online()
    desk.closes()
    late.receives_anything()
    writes(romeo, "to both again", to=JULIET)
    late.receives(said("to both again", to=JULIET))
    passes(server, 61)
    late.receives(f"<presence type='unavailable' from='{JULIET}/balcony' to='{JULIET}/late'/>",
                  said("to both", to=JULIET, more=DELAY))  # fmt: skip
    assert stored(server) == []


def test_requests_that_died_get_an_error_and_nothing_else_does(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """§4, RFC 6121 §8.5.3.2.3; RFC6120-8.3.1: never an error for an error or a result; chat states are gone with it"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    manages(juliet, "resume='true' max='60'")
    juliet.disconnects()
    to = f"to='{JULIET}/balcony'"
    romeo.sends(f"<iq type='get' id='v' {to}><query xmlns='jabber:iq:version'/></iq>"
                f"<iq type='result' id='r' {to}/><presence {to}/><message type='error' {to}/>"
                f"<message type='headline' {to}><body>news</body></message>"
                f"<message type='chat' {to}><composing xmlns='http://jabber.org/protocol/chatstates'/></message>")  # fmt: skip
    romeo.receives_nothing()
    passes(server, 61)
    romeo.receives(f"<presence type='unavailable' from='{JULIET}/balcony' to='{ROMEO}'/>",
                   f"<iq type='error' id='v' from='{JULIET}/balcony'>{UNAVAILABLE}</iq>")  # fmt: skip
    assert stored(server) == []


def test_offline_messages_leave_the_log_when_they_are_acknowledged(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """DESIGN §5, XEP-0160: being in the kernel's hands is not enough for who can say more"""
    writes(romeo, "a", "b", to=JULIET)
    id = manages(juliet)
    juliet.sends("<presence/>")
    juliet.receives(f"<presence from='{JULIET}/balcony'/>", said("a", to=JULIET, more=DELAY),
                    said("b", to=JULIET, more=DELAY))  # fmt: skip
    assert stored(server) == ["a", "b"]
    juliet.disconnects()
    juliet = resumes(server, id, 2)
    assert stored(server) == ["a", "b"]
    juliet.receives(said("b", to=JULIET, more=DELAY))
    juliet.sends(f"<a {SM} h='3'/>")
    juliet.passes_barrier()
    assert stored(server) == []


def test_offline_messages_that_died_on_their_way_are_kept_once(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """DESIGN §5: what was acknowledged is gone from the log, the rest is in it, with its first stamp only"""
    writes(romeo, "a", "b", "c", to=JULIET)
    manages(juliet, "")
    juliet.sends("<presence/>")
    juliet.passes_barrier()
    juliet.sends(f"<a {SM} h='2'/>")
    juliet.forgets_unread()
    juliet.disconnects()
    assert stored(server) == ["b", "c"]
    again = server.client().login("juliet", resource="balcony")
    again.sends("<presence/>")
    again.receives(f"<presence from='{JULIET}/balcony'/>", said("b", to=JULIET, more=DELAY),
                   said("c", to=JULIET, more=DELAY))  # fmt: skip


@pytest.mark.config(limits={"unacknowledged": 100})
def test_the_queue_of_a_session_that_waits_is_bounded(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """Bounded in number: beyond it the session is over, and its messages are kept as any others"""
    juliet.comes_online()
    id = manages(juliet)
    juliet.disconnects()
    writes(romeo, *map(str, range(101)))
    romeo.receives_nothing()
    assert stored(server) == [str(number) for number in range(101)]
    comes_back(server, id, 0).receives(FAILED.replace(SM, f"{SM} h='0'") % "item-not-found")


@pytest.mark.config(limits={"unread": 65_536})
def test_it_is_bounded_in_bytes_too(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """A client that acknowledges nothing is not kept for ever either"""
    juliet.comes_online()
    manages(juliet)
    writes(romeo, *["x" * 8000] * 9)
    while (came := juliet._next()).kind == "stanza" and came.element.tag.endswith("message"):
        pass
    juliet._inbox.appendleft(came)
    juliet.receives_stream_error("resource-constraint")
    assert juliet.is_closed()


def test_a_shutdown_keeps_what_nobody_acknowledged(process_server: ProcessServer) -> None:
    """DESIGN §5: messages in the queue of a session that waits are there after a restart"""
    server = process_server
    romeo, juliet = server.client().login("romeo", resource="orchard"), server.client().login("juliet", resource="b")
    juliet.comes_online()
    id = manages(juliet)
    juliet.disconnects()
    writes(romeo, "a", "b", to=f"{JULIET}/b")
    server.stop()
    server.start()
    juliet = comes_back(server, id, 0)
    juliet.receives(FAILED % "item-not-found")
    juliet.binds("b")
    juliet.sends("<presence/>")
    juliet.receives(f"<presence from='{JULIET}/b'/>", said("a", to=f"{JULIET}/b", more=DELAY),
                    said("b", to=f"{JULIET}/b", more=DELAY))  # fmt: skip


# ---- other chapters and a session that waits ----------------------------------------------


def test_a_room_is_not_left_by_a_cut(server: Server, romeo: Client, juliet: Client) -> None:
    """§5, XEP-0045: what is said in the room meanwhile is there, in order, and nobody saw her leave"""
    room = "kitchen@conference.example.org"
    enter = f"<presence to='{room}/%s'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    romeo.sends(enter % "Romeo")
    romeo.sends(f"<iq type='set' id='o' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'>"
                "<x xmlns='jabber:x:data' type='submit'/></query></iq>")  # fmt: skip
    romeo.receives_anything()
    juliet.sends(enter % "Juliet")
    juliet.receives_anything()
    romeo.receives_anything()
    id = manages(juliet)
    juliet.disconnects()
    romeo.sends(f"<message to='{room}' type='groupchat'><body>O</body></message>")
    romeo.receives(f"<message from='{room}/Romeo' type='groupchat' ...>...</message>")
    romeo.receives_nothing()
    juliet = resumes(server, id, 0, 0)
    juliet.receives(f"<message from='{room}/Romeo' type='groupchat' ...>...</message>")


def test_the_owner_sees_who_waits(server: MemoryServer, juliet: Client) -> None:
    """Chapter 25: `user show` tells which sessions are connected"""
    session = server.server.session(xmppd.JID.parse(juliet.jid))
    assert session is not None
    manages(juliet)
    assert xmppd.describe_session(session)["connected"] is True
    juliet.disconnects()
    assert xmppd.describe_session(session)["connected"] is False
