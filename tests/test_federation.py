"""Streams between servers: RFC 6120, EXTERNAL (XEP-0178), both ways (XEP-0288), counting (XEP-0198), and the queues."""

from __future__ import annotations

import base64
import socket
import ssl
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import SASL, TLS, Client
from tests.federating import DIALBACK_OFFER, Internet, Peer, certificate_of
from tests.servers import MemoryServer, ProcessServer

pytestmark = pytest.mark.config(federation={"enabled": True})

FAR = "montague.example"
ADDRESS = f"address of {FAR}"
EXTERNAL = f"<mechanisms xmlns='{SASL}'><mechanism>EXTERNAL</mechanism></mechanisms>"
BIDI = "<bidi xmlns='urn:xmpp:features:bidi'/>"
SM = "<sm xmlns='urn:xmpp:sm:3'/>"
HELLO = f"<message from='juliet@{FAR}/x' to='romeo@example.org' type='chat'><body>hi</body></message>"


def writes(romeo: Client, body: str, id: str = "") -> str:
    """Send a message away; return how it looks there."""
    mark = f" id='{id}'" if id else ""
    romeo.sends(f"<message to='juliet@{FAR}'{mark}><body>{body}</body></message>")
    return f"<message from='{romeo.jid}' to='juliet@{FAR}'{mark}><body>{body}</body></message>"


def certified(internet: Internet, *names: str) -> Peer:
    """Return a caller of FAR behind TLS, with a certificate for `names` that its own server shows, too."""
    certificate = certificate_of(*(names or (FAR,)))
    internet.add(FAR, certificate=certificate)
    peer = internet.caller(FAR, certificate=certificate)
    peer.negotiates()
    peer.sends(f"<starttls xmlns='{TLS}'/>")
    internet.called(FAR).accepts_all()
    peer.receives(f"<proceed xmlns='{TLS}'/>")
    peer._connected().start_tls("example.org")
    return peer


def offers(peer: Peer) -> list[str]:
    """Open a stream and return the mechanisms that are offered."""
    return [mechanism.text or "" for mechanism in peer.negotiates().iter(f"{{{SASL}}}mechanism")]


# ---- inbound streams ------------------------------------------------------------------


def test_a_server_is_greeted_as_one(internet: Internet) -> None:
    """RFC6120-4.2-1, RFC6120-4.7.2-3, RFC6120-4.8.3-1, RFC6120-5.2-1"""
    peer = internet.caller(FAR)
    peer.opens_stream()
    header = peer.receives_stream_header()
    assert (header.get("from"), header.get("to"), header.get("version")) == ("example.org", FAR, "1.0")
    assert "xmlns='jabber:server'" in peer.transcript[-1]
    features = peer.receives_features("starttls", "bidi")
    assert features.find(f"{{{TLS}}}starttls/{{{TLS}}}required") is not None


@pytest.mark.parametrize(
    ("to", "error"), [("nowhere.example", "host-unknown"), ("a@b@c", "improper-addressing"), ("conference.example.org", "")]
)
def test_the_header_names_a_domain_that_is_here(internet: Internet, to: str, error: str) -> None:
    """RFC6120-4.9.3.6-1; rooms are reached by streams of their own, too"""
    peer = internet.caller(FAR)
    peer.opens_stream(to=to)
    if error:
        peer.receives_stream_error(error)
        assert peer.is_closed()
    else:
        assert peer.receives_stream_header().get("from") == to
        peer.receives_features()


def test_a_client_on_the_servers_port_is_told_so(internet: Internet) -> None:
    """RFC6120-4.8.3-1"""
    peer = internet.caller(FAR)
    peer.sends_raw("<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>")
    peer.receives_stream_error("invalid-namespace")
    assert peer.is_closed()


def test_nobody_opens_a_stream_in_our_name(internet: Internet) -> None:
    """S73"""
    peer = internet.caller("example.net")
    peer.opens_stream()
    peer.receives_stream_error("invalid-from")
    assert peer.is_closed()


def test_what_stands_behind_starttls_ends_the_stream(internet: Internet) -> None:
    """RFC6120-5.4.2.1: no injection (CVE-2011-0411)"""
    peer = internet.caller(FAR)
    peer.negotiates()
    peer.sends_raw(f"<starttls xmlns='{TLS}'/><db:result from='{FAR}' to='example.org'>key</db:result>")
    peer.receives_stream_error("policy-violation")
    assert peer.is_closed()


@pytest.mark.parametrize(
    ("addresses", "error"),
    [
        (f"from='juliet@{FAR}'", "improper-addressing"),
        ("to='romeo@example.org'", "improper-addressing"),
        (f"from='juliet@{FAR}' to='@'", "improper-addressing"),
        ("from='juliet@evil.example' to='romeo@example.org'", "invalid-from"),
        (f"from='juliet@sub.{FAR}' to='romeo@example.org'", "invalid-from"),
        ("from='nurse@example.org' to='romeo@example.org'", "invalid-from"),
        (f"from='juliet@{FAR}' to='romeo@nowhere.example'", "host-unknown"),
        (f"from='juliet@{FAR}' to='romeo@example.net'", "invalid-from"),
    ],
)
def test_addresses_of_what_comes_in(internet: Internet, addresses: str, error: str) -> None:
    """RFC6120-4.9.3.7-1, RFC6120-4.9.3.9-1, RFC6120-8.1.1.2-1, RFC6120-8.1.1.2-2, RFC6120-8.1.2.2-1, S73"""
    peer = internet.caller(FAR).is_verified()
    peer.sends(f"<message {addresses}><body>x</body></message>")
    peer.receives_stream_error(error)
    assert peer.is_closed()


def test_requests_are_answered_on_our_own_stream(romeo: Client, internet: Internet) -> None:
    """RFC6120-8.2.3, RFC6120-4.5-2: disco#info of the server, an error for what it doesn't know"""
    peer = internet.caller(FAR).is_verified()
    peer.sends(f"<iq from='juliet@{FAR}/x' to='example.org' type='get' id='1'><query xmlns='jabber:iq:version'/></iq>")
    peer.sends(f"<iq from='juliet@{FAR}/x' to='example.org' type='get' id='2'><none xmlns='none'/></iq>")
    peer.sends(f"<iq from='juliet@{FAR}/x' to='example.org' type='get' id='3'/>")
    ours = internet.peers[FAR]
    ours.confirms()
    ours.receives(f"<iq from='example.org' to='juliet@{FAR}/x' type='result' id='1'><query ...>...</query></iq>")
    for id, condition in (("2", "service-unavailable"), ("3", "bad-request")):
        ours.receives(f"<iq from='example.org' to='juliet@{FAR}/x' type='error' id='{id}'><error ...><{condition} .../></error></iq>")


def test_the_streams_language_is_that_of_its_stanzas(romeo: Client, internet: Internet) -> None:
    """RFC6120-4.7.4"""
    romeo.comes_online()
    peer = internet.caller(FAR).is_verified(**{"xml:lang": "it"})
    peer.sends(HELLO)
    romeo.receives(f"<message from='juliet@{FAR}/x' type='chat' xml:lang='it'><body>hi</body></message>")


def test_what_comes_is_in_our_namespace(romeo: Client, internet: Internet) -> None:
    """RFC6120-4.8.3-2: even when it was written otherwise"""
    romeo.comes_online()
    peer = internet.caller(FAR).is_verified()
    peer.sends_raw(f"<x:message xmlns:x='jabber:server' from='juliet@{FAR}/x' to='romeo@example.org' type='chat'>"
                   "<x:body>hi</x:body></x:message>")  # fmt: skip
    romeo.receives(f"<message from='juliet@{FAR}/x' type='chat'><body>hi</body></message>")
    assert "jabber:server" not in "".join(romeo.transcript)


@pytest.mark.config(federation={"enabled": True}, limits={"remote_stanza": 20_000})
def test_stanzas_from_servers_have_their_own_limit(romeo: Client, internet: Internet) -> None:
    """RFC6120-13.12"""
    romeo.comes_online()
    peer = internet.caller(FAR).is_verified()
    for length, passes in ((19_000, True), (20_000, False)):
        peer.sends(f"<message from='j@{FAR}' to='romeo@example.org' type='chat'><body>{'x' * length}</body></message>")
        if passes:
            romeo.receives(f"<message from='j@{FAR}' type='chat'><body>*</body></message>")
    peer.receives_stream_error("policy-violation")
    assert peer.is_closed()


def test_an_unused_stream_is_closed(internet: Internet) -> None:
    """XEP-0478: the features say when"""
    peer = internet.caller(FAR).is_verified()
    internet.server.clock.skip(xmppd.REMOTE_IDLE_TIMEOUT + 1)
    assert peer.is_closed()


def test_a_caller_who_says_nothing_is_sent_away(internet: Internet) -> None:
    """S10"""
    peer = internet.caller(FAR)
    peer.negotiates()
    internet.server.clock.skip(xmppd.UNAUTHENTICATED_TIMEOUT + 1)
    peer.receives_stream_error("connection-timeout")
    assert peer.is_closed()


# ---- EXTERNAL, called -----------------------------------------------------------------


@pytest.mark.parametrize("authzid", ["=", base64.b64encode(FAR.encode()).decode()])
def test_a_certificate_is_enough(romeo: Client, internet: Internet, authzid: str) -> None:
    """XEP0178-3-1, XEP0178-3-3, XEP0178-3-7, RFC6120-6.3.4-2, RFC6120-13.8.4-1, RFC6120-4.3.6-2"""
    romeo.comes_online()
    peer = certified(internet)
    assert offers(peer) == ["EXTERNAL"]
    peer.sends(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>{authzid}</auth>")
    peer.receives(f"<success xmlns='{SASL}'/>")
    peer.negotiates()
    peer.sends(HELLO)
    romeo.receives(HELLO)
    peer.sends(f"<message from='juliet@{FAR}' to='r@example.net'><body>to all domains here</body></message>")
    peer.sends("<message from='juliet@other.example' to='romeo@example.org'><body>x</body></message>")
    peer.receives_stream_error("invalid-from")
    assert peer.is_closed()


@pytest.mark.parametrize(("authzid", "condition"), [("other.example", "invalid-authzid"), ("example.net", "invalid-authzid")])
def test_a_certificate_speaks_for_its_names_only(internet: Internet, authzid: str, condition: str) -> None:
    """XEP0178-3-4, RFC6120-6.3.8-2, S72: even for our own domain, if it should be named there"""
    peer = certified(internet, FAR, "example.net")
    offers(peer)
    peer.sends(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>{base64.b64encode(authzid.encode()).decode()}</auth>")
    peer.receives_failure(condition)
    peer.sends(f"<auth xmlns='{SASL}' mechanism='PLAIN'>AAA=</auth>")
    peer.receives_failure("invalid-mechanism")
    peer.sends(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>=</auth>")
    peer.receives(f"<success xmlns='{SASL}'/>")


def test_a_certificate_for_another_name_leaves_dialback(internet: Internet) -> None:
    """XEP0178-3-1, XEP0178-3-2, S72 (GHSA-c9xv-56cc-gjw2): EXTERNAL is not offered, and the key is really verified"""
    peer = certified(internet, "other.example")
    assert offers(peer) == []
    peer.sends(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>=</auth>")
    peer.receives_failure("not-authorized")
    peer.proves(FAR, "example.org")


def test_with_a_certificate_dialback_needs_no_call(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.2.1-6: dialback without dialling back, for the certificate's own names"""
    peer = certified(internet)
    offers(peer)
    peer.sends(f"<db:result from='{FAR}' to='example.org'>whatever</db:result>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='valid'/>")
    internet.peers[FAR].receives_nothing()


def test_too_many_failures_end_the_stream(internet: Internet) -> None:
    """RFC6120-6.4.5"""
    peer = internet.caller(FAR)
    peer.over_tls()
    for _ in range(xmppd.MAX_SASL_FAILURES):
        peer.sends(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>=</auth>")
        peer.receives_failure("not-authorized")
    peer.receives_stream_error("policy-violation")
    assert peer.is_closed()


@pytest.mark.parametrize(("good", "asked"), [(True, True), (False, False)])
def test_a_certificate_is_asked_for_where_it_will_be_good(internet: Internet, good: bool, asked: bool) -> None:
    """RFC6120-5.4.3.1-2: its own server's certificate is looked at first"""
    internet.add(FAR, certificate=certificate_of(FAR), good=good)
    peer = internet.caller(FAR, certificate=certificate_of(FAR), good=good)
    peer.negotiates()
    peer.sends(f"<starttls xmlns='{TLS}'/>")
    ours = internet.called(FAR)
    if not good:
        ours.offers_tls()
        assert ours.is_closed()
        ours = internet.called(FAR)
    ours.accepts_all()
    peer.receives(f"<proceed xmlns='{TLS}'/>")
    assert peer.transport.peer_tls is not None
    assert peer.transport.peer_tls.verify == asked
    again = internet.caller(FAR, certificate=certificate_of(FAR), good=good)
    again.negotiates()
    again.sends(f"<starttls xmlns='{TLS}'/>")
    again.receives(f"<proceed xmlns='{TLS}'/>")
    internet.is_quiet()


def test_a_handshake_that_failed_is_remembered(internet: Internet) -> None:
    """RFC6120-5.4.3.1-2: who cannot be called is asked, and if that ends the connection, asked no more"""
    for verified in (True, False):
        peer = internet.caller(FAR, certificate=certificate_of(FAR), good=False)
        peer.negotiates()
        peer.sends(f"<starttls xmlns='{TLS}'/>")
        peer.receives(f"<proceed xmlns='{TLS}'/>")
        assert peer.transport.peer_tls is not None
        assert peer.transport.peer_tls.verify == verified
        if verified:
            assert peer.is_closed()


def test_what_is_known_of_a_certificate_grows_old(romeo: Client, internet: Internet) -> None:
    """XEP0178-3-6: a server that had a bad one is given another chance"""
    internet.federation.remember(FAR, False, verifies=False)
    assert internet.federation.recall(FAR) is not None
    internet.server.clock.skip(xmppd.REMEMBERED_LIFE + 1)
    internet.add(FAR, certificate=certificate_of(FAR))
    writes(romeo, "O")
    peer = internet.called(FAR).accepts_all()
    assert peer.transport.peer_tls is not None
    assert peer.transport.peer_tls.verify
    peer.forgets_unread()


def test_two_servers_that_call_each_other_do_not_wait_for_each_other(romeo: Client, internet: Internet) -> None:
    """While we wait for its `proceed`, it gets ours."""
    internet.add(FAR)
    writes(romeo, "O")
    ours = internet.called(FAR)
    ours.hears_stream_header(to=FAR)
    ours.answers_stream(f"<starttls xmlns='{TLS}'/>")
    ours.receives(f"<starttls xmlns='{TLS}'/>")
    peer = internet.caller(FAR)
    peer.over_tls()
    romeo.forgets_unread()


def test_a_stream_ends_with_its_certificate(internet: Internet) -> None:
    """RFC6120-13.7.2.3-1"""
    peer = certified(internet)
    offers(peer)
    peer.sends(f"<db:result from='{FAR}' to='example.org'>whatever</db:result>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='valid'/>")
    stream = peer.transport.stream
    assert isinstance(stream, xmppd.ServerStream)
    assert stream._expiry is not None
    assert stream._expiry.callback is not None
    stream._expiry.callback()
    peer.receives_stream_error("reset")
    assert peer.is_closed()


# ---- outbound streams -----------------------------------------------------------------


def test_we_show_our_certificate_where_it_is_wanted(romeo: Client, internet: Internet) -> None:
    """XEP0178-3-5, XEP0178-3-6, XEP0178-3-7, RFC6120-6.2-1"""
    internet.add(FAR, certificate=certificate_of(FAR))
    message = writes(romeo, "O")
    peer = internet.called(FAR).accepts_all(EXTERNAL)
    assert peer.transport.peer_tls == xmppd.PeerTLS(FAR, calling=True, verify=True)
    peer.receives(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>{base64.b64encode(b'example.org').decode()}</auth>")
    peer.renews_stream(f"<success xmlns='{SASL}'/>")
    peer.hears_stream_header(from_="example.org", to=FAR)
    peer.receives_nothing()
    peer.answers_stream(DIALBACK_OFFER)
    peer.receives(message)


def test_a_refused_certificate_leaves_dialback(romeo: Client, internet: Internet) -> None:
    """XEP0178-3-8"""
    internet.add(FAR)
    message = writes(romeo, "O")
    peer = internet.called(FAR).accepts_all(EXTERNAL)
    peer.receives(f"<auth xmlns='{SASL}' mechanism='EXTERNAL'>*</auth>")
    peer.sends(f"<failure xmlns='{SASL}'><not-authorized/></failure>")
    peer.confirms()
    peer.receives(message)


def test_a_bad_certificate_costs_a_second_call(romeo: Client, internet: Internet) -> None:
    """XEP0178-3-8, RFC6120-13.14-1: then TLS without a look at it, and dialback; next time at once"""
    internet.add(FAR, certificate=certificate_of(FAR), good=False)
    message = writes(romeo, "O")
    first = internet.called(FAR)
    first.offers_tls()
    assert first.is_closed()
    peer = internet.called(FAR).lets_in()
    assert peer.transport.peer_tls == xmppd.PeerTLS(FAR, calling=True, verify=False)
    peer.receives(message)
    peer.closes()
    internet.called_after(FAR, 3).lets_in().receives(message)
    assert internet.attempts == [ADDRESS] * 3


@pytest.mark.config(federation={"enabled": True, "domains": {FAR: "verified"}})
@pytest.mark.parametrize("certificate", [None, certificate_of("other.example")])
def test_where_a_certificate_is_wanted_nothing_goes_without(romeo: Client, internet: Internet, certificate: bytes | None) -> None:
    """XEP0178-3-6, S72"""
    internet.add(FAR, certificate=certificate)
    writes(romeo, "O", "m1")
    internet.called(FAR).accepts_all_but_is_left()
    romeo.receives("<message type='error' id='m1'><error ...><remote-server-not-found .../></error></message>")


def test_without_tls_nothing_goes(romeo: Client, internet: Internet) -> None:
    """RFC6120-5.2-1, RFC6120-13.14-1"""
    internet.add(FAR)
    writes(romeo, "O", "m1")
    peer = internet.called(FAR)
    peer.hears_stream_header(to=FAR)
    peer.answers_stream(DIALBACK_OFFER)
    assert peer.is_closed()
    romeo.receives("<message type='error' id='m1'><error ...><remote-server-not-found .../></error></message>")


def test_all_addresses_are_tried_in_order(romeo: Client, internet: Internet) -> None:
    """RFC6120-3.2.1-1"""
    internet.add(FAR, "2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3")
    internet.refusing |= {"2001:db8::1", "192.0.2.2"}
    message = writes(romeo, "O")
    internet.called(FAR).disconnects()
    internet.called(FAR).lets_in().receives(message)
    assert internet.attempts == ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"]


def test_a_domain_that_does_not_exist(romeo: Client, internet: Internet) -> None:
    """RFC6120-10.4-1"""
    writes(romeo, "O", "m1")
    romeo.receives("<message type='error' id='m1'><error ...><remote-server-not-found .../></error></message>")
    romeo.sends(f"<iq type='get' id='i1' to='{FAR}'><ping xmlns='urn:xmpp:ping'/></iq>")
    romeo.receives("<iq type='error' id='i1'><error ...><remote-server-not-found .../></error></iq>")
    romeo.sends(f"<presence type='subscribe' to='juliet@{FAR}' id='p1'/>")
    romeo.receives_nothing()


@pytest.mark.config(federation={})
def test_the_look_of_a_domain_decides(server: MemoryServer) -> None:
    """RFC6120-10.4-1: on for real domains, off for localhost, *.local, addresses"""
    config = xmppd.Config()
    names = {name: xmppd.federates(config, name) for name in ("example.org", "localhost", "pi.local", "192.0.2.1", "pi", "[::1]")}
    assert names == {"example.org": True, "localhost": False, "pi.local": False, "192.0.2.1": False, "pi": False, "[::1]": False}


@pytest.mark.config(federation={"enabled": False})
def test_switched_off_nobody_is_called(romeo: Client) -> None:
    """RFC6120-10.4-1"""
    writes(romeo, "O", "m1")
    romeo.receives("<message type='error' id='m1'><error ...><remote-server-not-found .../></error></message>")


# ---- queues ---------------------------------------------------------------------------


def test_who_cannot_be_reached_now_is_tried_again(romeo: Client, internet: Internet) -> None:
    """RFC6120-3.3-1: later and later, for as long as a message may wait"""
    internet.add(FAR, "192.0.2.1")
    internet.refusing.add("192.0.2.1")
    writes(romeo, "O", "m1")
    for _ in range(40):
        internet.server.clock.skip(2.5)
        romeo.passes_barrier()
    romeo.receives_nothing()
    assert 4 < len(internet.attempts) < 12
    internet.server.clock.skip(30)
    romeo.receives("<message type='error' id='m1'><error ...><remote-server-timeout .../></error></message>")


@pytest.mark.config(federation={"enabled": True}, limits={"outgoing": 2})
def test_no_more_waits_than_the_limit(romeo: Client, internet: Internet) -> None:
    """S75"""
    internet.add(FAR)
    for id in ("m1", "m2", "m3"):
        writes(romeo, "O", id)
    romeo.receives("<message type='error' id='m3'><error ...><resource-constraint .../></error></message>")


def test_what_a_broken_stream_has_not_taken_goes_out_again(romeo: Client, internet: Internet) -> None:
    """RFC6120-4.9.1.1-2, XEP-0199: no answer to the ping, so perhaps it did not arrive"""
    internet.add(FAR)
    messages = [writes(romeo, "1"), writes(romeo, "2")]
    peer = internet.called(FAR).lets_in()
    peer.receives(*messages)
    peer.receives_nothing()
    assert len(peer.pings) == 1
    peer.disconnects()
    again = internet.called_after(FAR, 3).lets_in()
    again.receives(*messages)


def test_a_ping_that_is_answered_proves_what_was_before(romeo: Client, internet: Internet) -> None:
    """XEP-0199 §4.3"""
    internet.add(FAR)
    message = writes(romeo, "1")
    peer = internet.called(FAR).lets_in()
    peer.receives(message)
    peer.receives_nothing()
    caller = internet.caller(FAR).is_verified()
    caller.sends(f"<iq type='error' from='{FAR}' to='example.org' id='{peer.pings[0].get('id')}'/>")
    caller.receives_nothing()
    internet.server.clock.skip(xmppd.FORGET_DELAY)
    internet.is_quiet()
    assert internet.federation.log.count(xmppd.JID("example.org", FAR, "")) == 0
    peer.disconnects()
    internet.server.clock.skip(10)
    internet.is_quiet()


def test_messages_that_wait_survive_the_server(romeo: Client, internet: Internet, tmp_path: Path) -> None:
    """DESIGN's promise: what is acknowledged is queued durably; presence is not, subscriptions are"""
    internet.add(FAR)
    message = writes(romeo, "1")
    romeo.sends(f"<presence type='subscribe' to='juliet@{FAR}'/><presence to='juliet@{FAR}'/>")
    romeo.sends(f"<iq type='get' id='i' to='{FAR}'><ping xmlns='urn:xmpp:ping'/></iq>")
    romeo.passes_barrier()
    romeo.forgets_unread()
    federation = internet.federation
    federation.routes.clear()
    federation.calls.clear()
    internet.dialled.clear()
    federation.restore()
    peer = internet.called(FAR).lets_in()
    peer.receives(message, f"<presence type='subscribe' from='romeo@example.org' to='juliet@{FAR}' ...>...</presence>")
    peer.receives_nothing()


def test_what_the_command_line_says_waits_for_the_server(server: MemoryServer, romeo: Client) -> None:
    """Nobody is called while nothing is served: an account is removed, and its contacts elsewhere hear of it later"""
    federation = server.server.registry.feature(xmppd.Federation)
    romeo.sends(f"<presence type='subscribe' to='juliet@{FAR}'/>")
    romeo.receives_anything()
    assert not federation.calls
    assert federation.log.count(xmppd.JID("example.org", FAR, "")) == 1
    peer_world = Internet(server)
    peer_world.add(FAR)
    federation.routes.clear()
    federation.restore()
    peer = peer_world.called(FAR).lets_in()
    peer.receives(f"<presence type='subscribe' from='romeo@example.org' to='juliet@{FAR}' ...>...</presence>")


def test_subscriptions_and_presence_cross_the_border(romeo: Client, internet: Internet) -> None:
    """RFC6121-3.1, RFC6121-4.3"""
    romeo.comes_online()
    internet.add(FAR)
    romeo.sends(f"<presence type='subscribe' to='juliet@{FAR}'/>")
    peer = internet.called(FAR).lets_in()
    peer.receives(f"<presence type='subscribe' from='romeo@example.org' to='juliet@{FAR}' ...>...</presence>")
    caller = internet.caller(FAR).is_verified()
    caller.sends(f"<presence type='subscribed' from='juliet@{FAR}' to='romeo@example.org'/>"
                 f"<presence type='subscribe' from='juliet@{FAR}' to='romeo@example.org'/>"
                 f"<presence from='juliet@{FAR}/x' to='romeo@example.org'/>")  # fmt: skip
    romeo.receives_anything()
    romeo.sends(f"<presence type='subscribed' to='juliet@{FAR}'/>")
    peer.receives(f"<presence type='subscribed' from='romeo@example.org' to='juliet@{FAR}' ...>...</presence>")
    peer.receives(f"<presence from='{romeo.jid}' to='juliet@{FAR}' ...>...</presence>")
    caller.sends(f"<presence type='probe' from='juliet@{FAR}' to='romeo@example.org'/>")
    peer.receives(f"<presence from='{romeo.jid}' to='juliet@{FAR}' ...>...</presence>")
    romeo.receives_anything()


def test_rooms_let_go_of_who_cannot_be_reached(romeo: Client, internet: Internet) -> None:
    """XEP0045-18.1.2: everybody of a domain that is lost leaves, whoever was written to"""
    room, muc = "kitchen@conference.example.org", "<x xmlns='http://jabber.org/protocol/muc'/>"
    romeo.sends(f"<presence to='{room}/Romeo'>{muc}</presence>")
    romeo.sends(f"<iq type='set' id='c' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'>"
                "<x xmlns='jabber:x:data' type='submit'/></query></iq>")  # fmt: skip
    caller = internet.caller(FAR).is_verified(to="example.org")
    caller.proves(FAR, "conference.example.org")
    for nick in ("Juliet", "Nurse"):
        caller.sends(f"<presence from='{nick}@{FAR}/x' to='{room}/{nick}'>{muc}</presence>")
    ours = internet.peers[FAR]
    ours.confirms("conference.example.org")
    ours.receives_nothing_of_importance()
    romeo.receives_anything()
    internet.domains.clear()
    ours.disconnects()
    romeo.sends(f"<message type='groupchat' to='{room}'><body>Where are you?</body></message>")
    romeo.passes_barrier()
    internet.server.clock.skip(5)
    romeo.passes_barrier()
    internet.is_quiet()
    gone = {stanza.get("from") for stanza in romeo.receives_anything() if stanza.get("type") == "unavailable"}
    assert gone == {f"{room}/Juliet", f"{room}/Nurse"}


# ---- both ways ------------------------------------------------------------------------


def test_both_ways_after_dialback(romeo: Client, internet: Internet) -> None:
    """XEP-0288 §2.2, example 4: stanzas come back on the stream that the other server has opened"""
    romeo.comes_online()
    peer = internet.caller(FAR)
    assert peer.over_tls().find("{urn:xmpp:features:bidi}bidi") is not None
    peer.sends("<bidi xmlns='urn:xmpp:bidi'/>")
    peer.proves(FAR, "example.org")
    message = writes(romeo, "1")
    peer.receives(message)
    internet.server.server.emit(xmppd.parse_element(f"<message from='r@conference.example.org' to='juliet@{FAR}'/>"))
    internet.peers[FAR].confirms("conference.example.org")
    internet.peers[FAR].receives(f"<message from='r@conference.example.org' to='juliet@{FAR}'/>")


def test_both_ways_nothing_comes_before_the_proof(romeo: Client, internet: Internet) -> None:
    """XEP-0288 §2.2 MUST NOT; S70"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends("<bidi xmlns='urn:xmpp:bidi'/>")
    peer.sends(f"<db:result from='{FAR}' to='example.org' type='valid'/>")
    writes(romeo, "1")
    peer.receives_nothing()
    romeo.receives_anything()


def test_both_ways_with_certificates(romeo: Client, internet: Internet) -> None:
    """XEP-0288 §2.2, example 3: only between the authenticated domain and the one in `to`"""
    peer = certified(internet)
    offers(peer)
    peer.sends(f"<bidi xmlns='urn:xmpp:bidi'/><auth xmlns='{SASL}' mechanism='EXTERNAL'>=</auth>")
    peer.receives(f"<success xmlns='{SASL}'/>")
    peer.negotiates()
    peer.receives(writes(romeo, "1"))


def test_too_late_for_both_ways(internet: Internet) -> None:
    """XEP-0288 §2.2"""
    peer = internet.caller(FAR).is_verified()
    peer.sends("<bidi xmlns='urn:xmpp:bidi'/>")
    peer.receives_stream_error("policy-violation")
    assert peer.is_closed()


def test_we_ask_for_both_ways(romeo: Client, internet: Internet) -> None:
    """XEP-0288 §2.2: then the other server may send, and prove further domains of its own"""
    romeo.comes_online()
    internet.add(FAR)
    message = writes(romeo, "1")
    peer = internet.called(FAR).accepts_all(BIDI)
    peer.receives("<bidi xmlns='urn:xmpp:bidi'/>")
    peer.confirms()
    peer.receives(message)
    peer.sends(HELLO)
    romeo.receives(HELLO)
    peer.proves("chat.montague.example", "example.org")
    peer.sends("<message from='r@chat.montague.example' to='romeo@example.org' type='chat'><body>2</body></message>")
    romeo.receives("<message from='r@chat.montague.example' type='chat'><body>2</body></message>")


def test_without_bidi_nothing_comes_on_our_stream(romeo: Client, internet: Internet) -> None:
    """RFC6120-4.5-2, S73"""
    internet.add(FAR)
    message = writes(romeo, "1")
    peer = internet.called(FAR).lets_in()
    peer.receives(message)
    peer.sends(HELLO)
    peer.receives_stream_error("not-authorized")
    assert peer.is_closed()
    romeo.forgets_unread()


# ---- counting -------------------------------------------------------------------------


def test_we_count_for_others(romeo: Client, internet: Internet) -> None:
    """XEP-0198 §4: stanzas only, and not before the proof"""
    romeo.comes_online()
    peer = internet.caller(FAR)
    assert peer.over_tls().find("{urn:xmpp:sm:3}sm") is not None
    peer.sends("<enable xmlns='urn:xmpp:sm:3'/>")
    peer.receives("<failed xmlns='urn:xmpp:sm:3'><unexpected-request xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>")
    peer.proves(FAR, "example.org")
    peer.sends("<enable xmlns='urn:xmpp:sm:3'/>")
    peer.receives("<enabled xmlns='urn:xmpp:sm:3'/>")
    peer.sends(HELLO)
    romeo.receives(HELLO)
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result><r xmlns='urn:xmpp:sm:3'/>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='valid'/>", "<a xmlns='urn:xmpp:sm:3' h='1'/>")


def test_what_is_not_acknowledged_goes_out_again(romeo: Client, internet: Internet) -> None:
    """XEP-0198 §4: once and in order, when the connection has been cut"""
    internet.add(FAR)
    first = writes(romeo, "1")
    peer = internet.called(FAR).lets_in(SM)
    peer.receives("<enable xmlns='urn:xmpp:sm:3'/>", first, "<r xmlns='urn:xmpp:sm:3'/>")
    peer.sends("<enabled xmlns='urn:xmpp:sm:3'/><a xmlns='urn:xmpp:sm:3' h='1'/>")
    others = [writes(romeo, "2"), writes(romeo, "3"), writes(romeo, "4")]
    peer.receives(*others, "<r xmlns='urn:xmpp:sm:3'/>")
    peer.sends("<a xmlns='urn:xmpp:sm:3' h='2'/>")
    peer.receives("<r xmlns='urn:xmpp:sm:3'/>")
    peer.disconnects()
    again = internet.called_after(FAR, 3).lets_in(SM)
    again.receives("<enable xmlns='urn:xmpp:sm:3'/>", *others[1:], "<r xmlns='urn:xmpp:sm:3'/>")


def test_an_acknowledgement_of_what_was_never_sent(romeo: Client, internet: Internet) -> None:
    """XEP-0198 §6: handled-count-too-high"""
    internet.add(FAR)
    message = writes(romeo, "1")
    peer = internet.called(FAR).lets_in(SM)
    peer.receives("<enable xmlns='urn:xmpp:sm:3'/>", message, "<r xmlns='urn:xmpp:sm:3'/>")
    peer.sends("<enabled xmlns='urn:xmpp:sm:3'/><a xmlns='urn:xmpp:sm:3' h='2'/>")
    too_high = "<handled-count-too-high xmlns='urn:xmpp:sm:3' h='2' send-count='1'/>"
    peer.receives_stream_error("undefined-condition", too_high)
    assert peer.is_closed()


def test_who_does_not_answer_the_question_is_gone(romeo: Client, internet: Internet) -> None:
    """XEP-0198 §4"""
    internet.add(FAR)
    message = writes(romeo, "1")
    peer = internet.called(FAR).lets_in(SM)
    peer.receives("<enable xmlns='urn:xmpp:sm:3'/>", message, "<r xmlns='urn:xmpp:sm:3'/>")
    internet.server.clock.skip(xmppd.ANSWER_TIMEOUT + 1)
    peer.receives_stream_error("connection-timeout")
    assert peer.is_closed()
    romeo.forgets_unread()


# ---- on the wire ----------------------------------------------------------------------


@pytest.mark.wire
@pytest.mark.config(federation={"enabled": True}, listen={"server": ["127.0.0.1:0"]})
def test_tls_from_the_first_byte_on_the_same_port(server: ProcessServer) -> None:
    """XEP-0368 §3: ALPN says xmpp-server; and STARTTLS works there, too"""
    context = ssl.create_default_context(cafile=str(server.authority))
    context.set_alpn_protocols(["xmpp-server"])
    header = ("<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' "
              "xmlns:db='jabber:server:dialback' to='example.org' from='montague.example' version='1.0'>")  # fmt: skip
    plain = socket.create_connection(("127.0.0.1", server.ports["server"]), 15)
    with context.wrap_socket(plain, server_hostname="example.org") as sock:
        assert sock.selected_alpn_protocol() == "xmpp-server"
        sock.sendall(header.encode())
        assert "<dialback " in read_until(sock, b"</stream:features>")
    with socket.create_connection(("127.0.0.1", server.ports["server"]), 15) as sock:
        sock.sendall(header.encode())
        assert "<starttls " in read_until(sock, b"</stream:features>")


@pytest.mark.wire
@pytest.mark.config(federation={"enabled": True, "routes": {FAR: "127.0.0.1:1"}}, listen={"server": ["127.0.0.1:0"]})
def test_a_server_that_is_not_there_does_not_hold_us_up(romeo: Client) -> None:
    """RFC6120-3.2.1-1: the connection is refused at once, and the message waits"""
    writes(romeo, "O", "m1")
    romeo.receives_nothing()


def read_until(sock: socket.socket, end: bytes) -> str:
    data = b""
    while end not in data:
        more = sock.recv(4096)
        assert more, data
        data += more
    return data.decode()


# ---- the end --------------------------------------------------------------------------


def test_a_host_that_is_gone_ends_its_streams(internet: Internet) -> None:
    """RFC6120-4.9.3.5"""
    peer = internet.caller(FAR).is_verified()
    server = internet.server.server
    server.domains.pop("example.org")
    internet.federation.reloaded()
    peer.receives_stream_error("host-gone")
    assert peer.is_closed()


def test_both_hear_the_end(internet: Internet) -> None:
    """RFC6120-4.4-1, RFC6120-4.9.3.20"""
    peer = internet.caller(FAR).is_verified()
    ours = internet.peers[FAR]
    ours.closes()
    internet.federation.shutting_down()
    peer.receives_stream_error("system-shutdown")
    assert peer.is_closed()
