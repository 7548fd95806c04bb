"""BOSH (XEP-0124) and XMPP over it (XEP-0206)."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET

import pytest

import xmppd
from tests.dialogue import Client
from tests.web import HTTP_BIND, Answer, BoshWire, Server, head, pipe, read_answer, request, web_client

WEB = pytest.mark.config(listen={"web": ["127.0.0.1:0"], "client": ["127.0.0.1:0"], "client_tls": ["127.0.0.1:0"]})
FIRST = {"to": "example.org", "rid": "1573741820", "hold": "1", "wait": "60", "ver": "1.6"}


class Browser:
    """Speaks BOSH by hand: `posts` returns the connection on which the answer will come."""

    def __init__(self, server: Server, **attributes: str) -> None:
        self.server = server
        self.rid = 1573741820
        self.sid = ""
        self.first = self.answer(self.posts(**{**FIRST, **attributes}))
        self.sid = self.first.get("sid", "")

    def posts(self, payload: str = "", **attributes: str) -> object:
        known = {"sid": self.sid} if self.sid else {}
        if self.sid and "rid" not in attributes:
            self.rid += 1
            known["rid"] = str(self.rid)
        words = "".join(f" {name}='{value}'" for name, value in {**known, **attributes}.items() if value)
        wire = pipe(self.server)
        body = f"<body xmlns='{HTTP_BIND}' xmlns:xmpp='urn:xmpp:xbosh'{words}>{payload}</body>"
        wire.send(head("POST", "/http-bind", {}, body.encode()))
        return wire

    @staticmethod
    def answer(wire: object, status: int = 200) -> ET.Element:
        answer, _ = read_answer(wire)
        assert answer.status == status
        return ET.fromstring(answer.body)

    def asks(self, payload: str = "", **attributes: str) -> ET.Element:
        return self.answer(self.posts(payload, **attributes))

    def ended(self, condition: str, wire: object) -> bool:
        """Check that the session ends with this condition (§17.2) and is gone."""
        last = self.answer(wire)
        assert (last.get("type"), last.get("condition")) == ("terminate", condition)
        assert self.asks().get("condition") == "item-not-found"
        return True


@pytest.fixture
def browser(server: Server) -> Browser:
    return Browser(server)


def is_waiting(wire: object) -> bool:
    return wire.read(0) is None


# ---- opening --------------------------------------------------------------------------


def test_a_session_begins(browser: Browser) -> None:
    """XEP-0124 §7.2, XEP-0206 §4"""
    first = browser.first
    expected = {"wait": "60", "hold": "1", "requests": "2", "inactivity": "60", "maxpause": "120", "ver": "1.6", "from": "example.org"}
    assert {name: first.get(name) for name in expected} == expected
    assert len(first.get("sid")) >= 32 and first.get("authid")
    assert (first.get("{urn:xmpp:xbosh}restartlogic"), first.get("{urn:xmpp:xbosh}version")) == ("true", "1.0")
    [features] = first
    assert features.tag == "{http://etherx.jabber.org/streams}features"
    names = {feature.tag.rpartition("}")[2] for feature in features}
    assert "mechanisms" in names and not names & {"starttls", "compression"}


@pytest.mark.parametrize(("asked", "told"), [
    ({"wait": "3600"}, {"wait": "60"}), ({"wait": "5"}, {"wait": "5"}), ({"hold": "100"}, {"hold": "2", "requests": "3"}),
    ({"hold": "0"}, {"hold": "0", "requests": "1"}), ({"ver": "1.12"}, {"ver": "1.11"}), ({"ver": "2.0"}, {"ver": "1.11"}),
    ({"ver": "x"}, {"ver": "1.11"}), ({"content": "application/xml"}, {}),
])  # fmt: skip
def test_what_the_client_wants_is_bounded(server: Server, asked: dict[str, str], told: dict[str, str]) -> None:
    """XEP-0124 §7.2, S80: huge wait"""
    first = Browser(server, **asked).first
    assert {name: first.get(name) for name in told} == told and first.get("type") is None


@pytest.mark.parametrize("wrong", [
    {"rid": ""}, {"rid": "-1"}, {"rid": "9" * 20}, {"wait": "x"}, {"hold": "1.5"}, {"content": "text/html"},
])  # fmt: skip
def test_a_bad_beginning(server: Server, wrong: dict[str, str]) -> None:
    """XEP-0124 §17.2"""
    first = Browser(server, **wrong).first
    assert (first.get("type"), first.get("condition")) == ("terminate", "bad-request")


@pytest.mark.parametrize("body", [
    b"", b"<", b"<body/>", b"<body xmlns='jabber:client' rid='1'/>", b"<!DOCTYPE a><body/>", b"<a xmlns='http://jabber.org/protocol/httpbind'/>",
    b"\xff\xfe<\0b\0", b"<body " + b"a" * 20000,
])  # fmt: skip
def test_what_is_no_body_is_a_bad_request(server: Server, body: bytes) -> None:
    """XEP-0124 §6"""
    last = ET.fromstring(request(server, "POST", "/http-bind", body).body)
    assert (last.get("type"), last.get("condition")) == ("terminate", "bad-request")


@pytest.mark.parametrize(("to", "condition"), [("example.com", "host-unknown"), ("a@b@c", "improper-addressing")])
def test_who_is_asked_for_must_live_here(server: Server, to: str, condition: str) -> None:
    """XEP-0124 §17.2"""
    first = Browser(server, to=to).first
    assert (first.get("type"), first.get("condition")) == ("terminate", condition)


def test_pages_of_others_may_not_use_it(server: Server) -> None:
    """S79"""
    own = request(server, "OPTIONS", "/http-bind", Origin="https://example.org", Access_Control_Request_Method="POST")
    assert (own.status, own["access-control-allow-origin"]) == (204, "https://example.org")
    assert "POST" in own["access-control-allow-methods"] and "Content-Type" in own["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in own
    for method in ("OPTIONS", "POST"):
        evil = request(server, method, "/http-bind", Origin="https://evil.example")
        assert evil.status == 403 and "access-control-allow-origin" not in evil


@pytest.mark.config(limits={"connections_per_address": 3})
def test_one_address_has_so_many_sessions_and_no_more(server: Server) -> None:
    """S80: many sids"""
    assert [Browser(server).first.get("condition") for _ in range(4)] == [None, None, None, "item-not-found"]


def test_a_stranger_has_little_to_say(browser: Browser) -> None:
    """S80: 1 MB body"""
    assert request(browser.server, "POST", "/http-bind", b"x" * 1_000_000).status == 413
    assert browser.ended("policy-violation", browser.posts("<a/>" * 10000))


# ---- people ---------------------------------------------------------------------------


def test_people_meet_across_transports(server: Server, juliet: Client) -> None:
    """XEP-0206 §5"""
    romeo = web_client(server, "bosh").login("romeo", resource="web")
    romeo.sends("<message to='juliet@example.org/balcony' type='chat'><body>O</body></message>")
    juliet.receives("<message from='romeo@example.org/web' type='chat'><body>O</body></message>")
    juliet.sends("<message to='romeo@example.org/web' type='chat'><body>Ay me!</body></message>")
    romeo.receives("<message from='juliet@example.org/balcony' type='chat'><body>Ay me!</body></message>")
    romeo.closes()
    assert romeo.wire is None


@WEB
@pytest.mark.wire
def test_people_meet_over_sockets(server: Server, juliet: Client) -> None:
    """XEP-0206, over TCP and TLS"""
    romeo = web_client(server, "bosh").login("romeo", resource="web")
    juliet.sends("<message to='romeo@example.org/web' type='chat'><body>Ay me!</body></message>")
    romeo.receives("<message from='juliet@example.org/balcony' type='chat'><body>Ay me!</body></message>")
    romeo.closes()


def test_stanzas_without_a_namespace_are_understood(server: Server, juliet: Client) -> None:
    """XEP-0206 §2, note: older clients rely on the wrapper's namespace."""
    romeo = web_client(server, "bosh").login("romeo", resource="web")
    romeo.wire.posts("<message to='juliet@example.org/balcony'><body>O<x xmlns='urn:x'/></body></message>")
    juliet.receives("<message from='romeo@example.org/web' ><body>O<x xmlns='urn:x'/></body></message>")


@pytest.mark.parametrize(("payload", "condition"), [
    ("<!-- x -->", "restricted-xml"), ("<?x y?>", "restricted-xml"), ("text", "bad-format"), ("<message>", "not-well-formed"),
    ("<message xmlns='jabber:client'>&x;</message>", "restricted-xml"),
])  # fmt: skip
def test_the_same_parser_on_every_transport(server: Server, payload: str, condition: str) -> None:
    """S04, XEP-0124 §17.2: told as a stream error"""
    romeo = web_client(server, "bosh").login("romeo")
    romeo.wire.posts(payload)
    romeo.receives_stream_error(condition)
    romeo.is_closed()


def test_nothing_is_heard_between_the_login_and_the_restart(server: Server) -> None:
    """XEP-0206 §5"""
    romeo = web_client(server, "bosh").connect()
    romeo.negotiates()
    romeo.authenticates("romeo", "romeo-secret")
    romeo.wire.posts("<iq xmlns='jabber:client' type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>")
    romeo.receives_stream_error("not-authorized")
    romeo.is_closed()


# ---- requests -------------------------------------------------------------------------


def test_a_request_waits_for_something_to_say(browser: Browser) -> None:
    """XEP-0124 §8"""
    held = browser.posts()
    assert is_waiting(held)
    other = browser.posts()
    assert browser.answer(held).attrib == {} and is_waiting(other)
    browser.server.clock.skip(61)
    assert browser.answer(other).attrib == {}


def test_requests_out_of_order_are_put_in_order(browser: Browser) -> None:
    """XEP-0124 §14.2"""
    late, early = browser.rid + 1, browser.rid + 2
    second = browser.posts("<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>", rid=str(early))
    assert is_waiting(second)
    first = browser.posts(rid=str(late))
    assert [child.tag.rpartition("}")[2] for child in browser.answer(first)] == ["failure"]
    assert is_waiting(second)


def test_a_lost_answer_is_given_again(browser: Browser) -> None:
    """XEP-0124 §14.3"""
    rid = str(browser.rid + 1)
    for _ in range(3):
        body = browser.asks("<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>", rid=rid)
        assert [child.tag.rpartition("}")[2] for child in body] == ["failure"]


def test_a_repeated_request_takes_the_place_of_the_one_that_waits(browser: Browser) -> None:
    """XEP-0124 §14.3, §17.3"""
    rid = str(browser.rid + 1)
    old, new = browser.posts(rid=rid), browser.posts(rid=rid)
    assert browser.answer(old).get("type") == "error" and is_waiting(new)


@pytest.mark.parametrize("step", [-10, 4, 1000])
def test_a_request_outside_of_the_window_ends_the_session(browser: Browser, step: int) -> None:
    """XEP-0124 §14.2, S80: replayed rid, rid+1000"""
    assert browser.ended("item-not-found", browser.posts(rid=str(browser.rid + step)))


def test_nobody_guesses_a_session(browser: Browser) -> None:
    """XEP-0124 §19.3, S80"""
    assert browser.asks(sid="x").get("condition") == "item-not-found"


def test_clients_that_know_no_conditions_get_a_status(server: Server) -> None:
    """XEP-0124 §17.1"""
    browser = Browser(server, ver="")
    browser.answer(browser.posts(rid="1"), status=404)


def test_too_many_requests_at_once_end_the_session(browser: Browser) -> None:
    """XEP-0124 §11"""
    rid = browser.rid
    early = [browser.posts(rid=str(rid + step)) for step in (3, 2)] if browser.first.get("requests") == "3" else []
    assert not early and browser.ended("item-not-found", browser.posts(rid=str(rid + 3)))


def test_a_silent_client_is_gone(browser: Browser) -> None:
    """XEP-0124 §10"""
    browser.server.clock.skip(55)
    held = browser.posts()
    browser.server.clock.skip(61)
    browser.answer(held)
    browser.server.clock.skip(61)
    browser.server.loop.turn(0)
    assert browser.asks().get("condition") == "item-not-found"


def test_a_client_may_pause(server: Server) -> None:
    """XEP-0124 §10: everything comes back at once, and nothing is said in the answer to that."""
    romeo = web_client(server, "bosh").login("romeo", resource="web")
    held, wire = romeo.wire.posts(""), romeo.wire
    wire.posts("<iq xmlns='jabber:client' type='get' id='p'><ping xmlns='urn:xmpp:ping'/></iq>", pause="120")
    assert b"<body" in wire.open[0][1].read(10) and b"/>" in wire.open[1][1].read(10) and held
    wire.open.clear()
    server.clock.skip(115)
    server.loop.turn(0)
    wire.posts("")
    romeo.receives_nothing()
    wire.posts("", pause="121")
    while b"policy-violation" not in (wire.read(10) or b""):
        pass
    romeo.disconnects()


def test_the_end(browser: Browser) -> None:
    """XEP-0124 §13: the oldest request hears of it, the others are just answered."""
    oldest = browser.posts()
    last = browser.posts(type="terminate")
    assert browser.answer(oldest).attrib == {"type": "terminate"} and browser.answer(last).attrib == {}
    assert browser.asks().get("condition") == "item-not-found"


def test_last_words_wait_for_the_next_request(server: Server) -> None:
    """XEP-0124 §17.2: also when no request was open."""
    browser = Browser(server)
    server.clock.skip(55)
    browser.answer(browser.posts("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='X'/>"))
    server.clock.skip(10)
    server.loop.turn(0)
    last = browser.asks()
    assert last.get("condition") == "remote-stream-error"
    assert last.find("*/{urn:ietf:params:xml:ns:xmpp-streams}connection-timeout") is not None


def keys(seed: str, count: int) -> list[str]:
    """§15.3, in the order of their use."""
    chain = [hashlib.sha1(seed.encode()).hexdigest()]
    while len(chain) < count:
        chain.append(hashlib.sha1(chain[-1].encode()).hexdigest())
    return chain[::-1]


def test_a_chain_of_keys_keeps_others_out(server: Server) -> None:
    """XEP-0124 §15"""
    first, second, third = keys("a", 3)
    other, next_other = keys("b", 2)
    browser = Browser(server, newkey=first.upper(), hold="0")
    assert browser.asks(key=second).get("type") is None
    assert browser.asks(key=third, newkey=other).get("type") is None
    assert browser.asks(key=next_other).get("type") is None
    assert browser.ended("item-not-found", browser.posts(key=next_other))


def test_a_broken_connection_loses_nothing(server: Server, juliet: Client) -> None:
    """XEP-0124 §14.3: what was sent to it is said again."""
    romeo = web_client(server, "bosh").login("romeo", resource="web")
    wire: BoshWire = romeo.wire
    rid = wire.posts("")
    wire.open.pop()[1].close()
    juliet.sends("<message to='romeo@example.org/web'><body>Ay me!</body></message>")
    juliet.passes_barrier()
    wire.posts("", rid=str(rid))
    romeo.receives("<message from='juliet@example.org/balcony'><body>Ay me!</body></message>")


@pytest.mark.config(limits={"unread": 65536})
def test_who_does_not_fetch_is_not_waited_for(server: Server, juliet: Client) -> None:
    """S11"""
    romeo = web_client(server, "bosh").login("romeo", resource="web")
    session = next(iter(server.server.registry.feature(xmppd.Bosh).sessions.values()))
    for _ in range(4):
        juliet.sends(f"<message to='romeo@example.org/web' type='headline'><body>{'x' * 20000}</body></message>")
        juliet.passes_barrier()
    assert session.stream.state is xmppd.StreamState.CLOSED and not server.server.session(xmppd.JID.parse(romeo.jid))
    romeo.wire._ended = True
    romeo.disconnects()


def test_it_tells_people_what_it_is(server: Server) -> None:
    answer: Answer = request(server, "GET", "/http-bind")
    assert answer.status == 200 and b"XEP-0124" in answer.body
