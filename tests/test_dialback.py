"""Server Dialback (XEP-0220), its keys (XEP-0185), and what servers tell each other on the way."""

from __future__ import annotations

import re

import pytest

import xmppd
from tests.dialogue import Client
from tests.federating import DIALBACK_OFFER, SECRET_ID, Internet

pytestmark = pytest.mark.config(federation={"enabled": True})

FAR = "montague.example"
ERROR = "<error type='*'><{} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
HELLO = "<message from='romeo@montague.example/x' to='romeo@example.org' type='chat'><body>hi</body></message>"


def key_for(internet: Internet, id: str, receiving: str = FAR, originating: str = "example.org") -> str:
    return xmppd.dialback_key(internet.federation.secret, receiving, originating, id)


# ---- keys -----------------------------------------------------------------------------


def test_the_key_is_that_of_the_specifications_example() -> None:
    """XEP0185-2-1"""
    key = xmppd.dialback_key(b"s3cr3tf0rd14lb4ck", FAR, "capulet.example", SECRET_ID)
    assert key == "b4835385f37fe2895af6c196b59097b16862406db80559900d96bf6fa7d23df3"


def test_no_two_pairs_of_domains_share_a_key() -> None:
    """S71 (CVE-2016-0756): the domains are kept apart, and so is the id."""
    assert xmppd.dialback_key(b"s", "a.tld", "b", "1") != xmppd.dialback_key(b"s", "a.tl", "db", "1")
    assert xmppd.dialback_key(b"s", "a.tld", "b", "1") != xmppd.dialback_key(b"s", "a.tld", "b", "11")


# ---- initiating -----------------------------------------------------------------------


def test_stanzas_wait_until_the_key_is_accepted(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.1.1-1, XEP0220-2-1, XEP0220-2.4.1-1, RFC6120-4.7.1-3, RFC6120-10.4-1"""
    internet.add(FAR)
    romeo.sends("<message to='juliet@montague.example'><body>1</body></message>")
    romeo.sends("<message to='juliet@montague.example'><body>2</body></message>")
    peer = internet.called(FAR)
    peer.hears_stream_header(from_="example.org", to=FAR, version="1.0")
    assert re.search("xmlns:db='jabber:server:dialback'", "".join(peer.transcript))
    peer.answers_stream("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    peer.receives("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    peer.proceeds()
    peer.hears_stream_header(from_="example.org", to=FAR)
    peer.answers_stream(DIALBACK_OFFER)
    peer.receives(f"<db:result from='example.org' to='{FAR}'>{key_for(internet, SECRET_ID)}</db:result>")
    assert "<db:result " in peer.transcript[-1], "the prefix is db"
    peer.receives_nothing()
    peer.sends(f"<db:result from='{FAR}' to='example.org' type='valid'/>")
    for body in "12":
        peer.receives(f"<message from='{romeo.jid}' to='juliet@{FAR}'><body>{body}</body></message>")


@pytest.mark.parametrize(
    ("verdict", "condition"), [("invalid", "internal-server-error"), ("error", "remote-server-timeout")]
)
def test_a_refused_key_sends_everything_back(romeo: Client, internet: Internet, verdict: str, condition: str) -> None:
    """XEP0220-2.1.1-3, XEP0220-2.1.1-4"""
    internet.add(FAR)
    romeo.sends("<message to='juliet@montague.example' id='m1'><body>O</body></message>")
    peer = internet.called(FAR).accepts_all()
    peer.receives(f"<db:result from='example.org' to='{FAR}'>*</db:result>")
    error = ERROR.format("item-not-found") if verdict == "error" else ""
    peer.sends(f"<db:result from='{FAR}' to='example.org' type='{verdict}'>{error}</db:result>")
    romeo.receives(f"<message type='error' id='m1'><error ...><{condition} .../></error></message>")
    romeo.sends("<message to='juliet@montague.example' id='m2'><body>P</body></message>")
    peer.receives(f"<db:result from='example.org' to='{FAR}'>*</db:result>") if verdict == "error" else None


def test_an_unanswered_key_sends_everything_back(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.1.1-5"""
    internet.add(FAR)
    romeo.sends("<message to='juliet@montague.example' id='m1'><body>O</body></message>")
    peer = internet.called(FAR).accepts_all()
    peer.receives(f"<db:result from='example.org' to='{FAR}'>*</db:result>")
    internet.server.clock.skip(xmppd.DIALBACK_TIMEOUT + 1)
    romeo.receives("<message type='error' id='m1'><error ...><remote-server-timeout .../></error></message>")


def test_a_verdict_that_nobody_asked_for_is_ignored(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.1.1-2, S70: on the wrong stream, for another pair, or twice"""
    internet.add(FAR)
    stranger = internet.caller("evil.example")
    stranger.over_tls()
    romeo.sends("<message to='juliet@montague.example'><body>O</body></message>")
    peer = internet.called(FAR).accepts_all()
    peer.receives(f"<db:result from='example.org' to='{FAR}'>*</db:result>")
    stranger.sends(f"<db:result from='{FAR}' to='example.org' type='valid'/>")
    stranger.sends(f"<db:verify from='{FAR}' to='example.org' id='{SECRET_ID}' type='valid'/>")
    peer.sends("<db:result from='evil.example' to='example.org' type='valid'/>")
    peer.sends(f"<db:verify from='{FAR}' to='example.org' id='{SECRET_ID}' type='valid'/>")
    peer.receives_nothing()
    stranger.receives_nothing()
    peer.sends(f"<db:result from='{FAR}' to='example.org' type='valid'/>")
    peer.receives(f"<message from='{romeo.jid}' to='juliet@{FAR}'><body>O</body></message>")


# ---- receiving ------------------------------------------------------------------------


def test_a_proven_domain_may_write_to_the_one_here(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.1.2-1, XEP0220-2.2.1-3, XEP0220-2.2.1-1: nothing before"""
    romeo.comes_online()
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{FAR}' to='example.org'>secret</db:result>")
    authority = internet.called_or_known(FAR)
    verify = authority.receives(f"<db:verify from='example.org' to='{FAR}' id='*'>secret</db:verify>")
    assert verify.get("id") == peer.stream_id
    authority.sends(f"<db:verify from='{FAR}' to='example.org' id='{peer.stream_id}' type='valid'/>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='valid'/>")
    peer.sends(HELLO)
    romeo.receives(HELLO)


def test_nothing_is_taken_before_the_proof(server: object, internet: Internet) -> None:
    """XEP0220-2.2.1-1"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(HELLO)
    peer.receives_stream_error("not-authorized")
    assert peer.is_closed()


def test_a_false_key_ends_a_stream_that_has_nothing_else(internet: Internet) -> None:
    """XEP0220-2.2.1-4"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{FAR}' to='example.org'>forged</db:result>")
    authority = internet.called_or_known(FAR)
    authority.receives(f"<db:verify from='example.org' to='{FAR}' id='*'>forged</db:verify>")
    authority.sends(f"<db:verify from='{FAR}' to='example.org' id='{peer.stream_id}' type='invalid'/>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='invalid'/>")
    assert peer.is_closed()


def test_a_false_key_leaves_the_other_pairs_alone(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.2.1-4, XEP0220-2.2.1-5, XEP0220-2.6.2-1"""
    romeo.comes_online()
    peer = internet.caller(FAR).is_verified()
    internet.add("chat.montague.example")
    peer.sends("<db:result from='chat.montague.example' to='example.org'>forged</db:result>")
    authority = internet.called_or_known("chat.montague.example")
    authority.receives("<db:verify from='example.org' to='chat.montague.example' id='*'>forged</db:verify>")
    peer.sends(HELLO)
    romeo.receives(HELLO)
    id = peer.stream_id
    authority.sends(f"<db:verify from='chat.montague.example' to='example.org' id='{id}' type='invalid'/>")
    forbidden = ERROR.format("forbidden")
    peer.receives(f"<db:result from='example.org' to='chat.montague.example' type='error'>{forbidden}</db:result>")
    peer.sends(HELLO)
    romeo.receives(HELLO)


def test_several_pairs_share_a_stream(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.6.2-1, XEP0220-2.2.1-3: each for itself, and for exactly that pair"""
    romeo.comes_online()
    peer = internet.caller(FAR).is_verified()
    peer.proves("chat.montague.example", "example.org")
    peer.sends("<message from='r@chat.montague.example/x' to='romeo@example.org' type='chat'><body>1</body></message>")
    romeo.receives("<message from='r@chat.montague.example/x' type='chat'><body>1</body></message>")
    peer.sends("<message from='r@chat.montague.example/x' to='romeo@example.net' type='chat'><body>2</body></message>")
    peer.receives_stream_error("invalid-from")
    assert peer.is_closed()


def test_a_domain_that_is_not_here_is_an_error_and_no_end(internet: Internet) -> None:
    """XEP0220-2.2.1-2, XEP0220-2.5-2"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{FAR}' to='nowhere.example'>key</db:result>")
    error = ERROR.format("item-not-found")
    peer.receives(f"<db:result from='nowhere.example' to='{FAR}' type='error'>{error}</db:result>")
    peer.proves(FAR, "example.org")


@pytest.mark.parametrize("name", ["example.org", "example.net", "conference.example.org"])
def test_nobody_claims_to_be_us(internet: Internet, name: str) -> None:
    """XEP0220-2.5-1, S73"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{name}' to='example.org'>key</db:result>")
    error = ERROR.format("not-acceptable")
    peer.receives(f"<db:result from='example.org' to='{name}' type='error'>{error}</db:result>")


def test_without_tls_there_is_no_dialback(internet: Internet) -> None:
    """XEP0220-2.5-1 (policy-violation), RFC6120-13.14-1"""
    peer = internet.caller(FAR)
    assert peer.negotiates().find("{urn:xmpp:features:dialback}dialback") is None
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    error = ERROR.format("policy-violation")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='error'>{error}</db:result>")


@pytest.mark.config(federation={"enabled": True, "domains": {FAR: "plain"}})
def test_on_this_machine_the_owner_may_do_without_tls(romeo: Client, internet: Internet) -> None:
    """RFC6120-5.2-1: and then servers from before RFC 3920, without a version, are understood (XEP0220-2.4.1-1)"""
    romeo.comes_online()
    peer = internet.caller(FAR)
    peer.opens_stream(version=None)
    assert peer.receives_stream_header().get("version") is None
    internet.add(FAR)
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    authority = internet.called(FAR)
    authority.hears_stream_header(to=FAR)
    authority.answers_stream(version="")
    authority.receives(f"<db:verify from='example.org' to='{FAR}' id='{peer.stream_id}'>key</db:verify>")
    authority.sends(f"<db:verify from='{FAR}' to='example.org' id='{peer.stream_id}' type='valid'/>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='valid'/>")
    peer.sends(HELLO)
    romeo.receives(HELLO)


def test_there_is_no_such_server(internet: Internet) -> None:
    """XEP0220-2.5-1: remote-server-not-found"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    error = ERROR.format("remote-server-not-found")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='error'>{error}</db:result>")


def test_nobody_listens_at_the_authoritative_server(internet: Internet) -> None:
    """XEP0220-2.5-1: remote-connection-failed"""
    peer = internet.caller(FAR)
    peer.over_tls()
    internet.add(FAR, "192.0.2.1")
    internet.refusing.add("192.0.2.1")
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    error = ERROR.format("remote-connection-failed")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='error'>{error}</db:result>")


def test_the_authoritative_server_doesnt_know_the_domain(internet: Internet) -> None:
    """XEP0220-2.5-1: an error, or the stream error host-unknown, is remote-server-not-found"""
    peer = internet.caller(FAR)
    peer.over_tls()
    error = ERROR.format("remote-server-not-found")
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    authority = internet.called_or_known(FAR)
    authority.receives(f"<db:verify from='example.org' to='{FAR}' id='*'>key</db:verify>")
    no, id = ERROR.format("item-not-found"), peer.stream_id
    authority.sends(f"<db:verify from='{FAR}' to='example.org' id='{id}' type='error'>{no}</db:verify>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='error'>{error}</db:result>")
    internet.add("other.example")
    peer.sends("<db:result from='other.example' to='example.org'>key</db:result>")
    other = internet.called("other.example")
    other.hears_stream_header(to="other.example")
    other.sends_header_and("<stream:error><host-unknown xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>")
    peer.receives(f"<db:result from='example.org' to='other.example' type='error'>{error}</db:result>")
    assert other.is_closed()


def test_the_authoritative_server_breaks_off(internet: Internet) -> None:
    """XEP0220-2.1.2-3, XEP0220-2.5-1: remote-server-timeout"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    authority = internet.called_or_known(FAR)
    authority.receives(f"<db:verify from='example.org' to='{FAR}' id='*'>key</db:verify>")
    authority.disconnects()
    error = ERROR.format("remote-server-timeout")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='error'>{error}</db:result>")


@pytest.mark.config(federation={"enabled": True, "security": "verified"})
def test_where_certificates_are_wanted_the_authoritative_server_needs_one(internet: Internet) -> None:
    """XEP0220-2.5-1: not-authorized"""
    internet.add(FAR)
    peer = internet.caller(FAR)
    peer.negotiates()
    peer.sends("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    internet.called(FAR).accepts_all_but_is_left()
    peer.receives("<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    peer._connected().start_tls("example.org")
    peer.negotiates()
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    internet.called(FAR).accepts_all_but_is_left()
    error = ERROR.format("not-authorized")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='error'>{error}</db:result>")


def test_pairs_are_bounded(monkeypatch: pytest.MonkeyPatch, internet: Internet) -> None:
    """XEP0220-2.5-1: resource-constraint"""
    monkeypatch.setattr(xmppd, "MAX_PAIRS", 1)
    peer = internet.caller(FAR).is_verified()
    peer.sends("<db:result from='more.example' to='example.org'>key</db:result>")
    error = ERROR.format("resource-constraint")
    peer.receives(f"<db:result from='example.org' to='more.example' type='error'>{error}</db:result>")


@pytest.mark.parametrize("attributes", ["", "from='a.example'", "from='a.example' to='@'"])
def test_dialback_needs_addresses(internet: Internet, attributes: str) -> None:
    """RFC6120-4.9.3.7-1"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result {attributes}>key</db:result>")
    peer.receives_stream_error("improper-addressing")
    assert peer.is_closed()


# ---- authoritative --------------------------------------------------------------------


def test_our_own_keys_are_confirmed_and_no_others(internet: Internet) -> None:
    """XEP0220-2.2.2-1, XEP0220-2.2.2-3: on a stream that has proven nothing"""
    peer = internet.caller(FAR)
    peer.over_tls()
    for key, verdict in ((key_for(internet, "x1"), "valid"), (key_for(internet, "x2"), "invalid"), ("", "invalid")):
        peer.sends(f"<db:verify from='{FAR}' to='example.org' id='x1'>{key}</db:verify>")
        peer.receives(f"<db:verify from='example.org' to='{FAR}' id='x1' type='{verdict}'/>")


def test_a_question_about_a_domain_that_is_not_here(internet: Internet) -> None:
    """XEP0220-2.2.2-2"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:verify from='{FAR}' to='nowhere.example' id='x1'>key</db:verify>")
    error = ERROR.format("item-not-found")
    peer.receives(f"<db:verify from='nowhere.example' to='{FAR}' id='x1' type='error'>{error}</db:verify>")
    peer.proves(FAR, "example.org")


def test_verdicts_fit_the_request_or_nobody_hears_of_them(internet: Internet) -> None:
    """XEP0220-2.1.2-2, S70"""
    peer = internet.caller(FAR)
    peer.over_tls()
    peer.sends(f"<db:result from='{FAR}' to='example.org'>key</db:result>")
    authority = internet.called_or_known(FAR)
    authority.receives(f"<db:verify from='example.org' to='{FAR}' id='*'>key</db:verify>")
    for sender, to, id in ((FAR, "example.net", peer.stream_id), ("other.example", "example.org", peer.stream_id), (FAR, "example.org", "x")):
        authority.sends(f"<db:verify from='{sender}' to='{to}' id='{id}' type='valid'/>")
    peer.sends(f"<db:verify from='{FAR}' to='example.org' id='{peer.stream_id}' type='valid'/>")
    authority.receives_nothing()
    peer.receives_nothing()
    authority.sends(f"<db:verify from='{FAR}' to='example.org' id='{peer.stream_id}' type='valid'/>")
    peer.receives(f"<db:result from='example.org' to='{FAR}' type='valid'/>")


def test_the_features_say_that_errors_are_understood(internet: Internet) -> None:
    """XEP0220-2.4.2-1"""
    features = internet.caller(FAR).over_tls()
    assert features.find("{urn:xmpp:features:dialback}dialback/{urn:xmpp:features:dialback}errors") is not None


def test_one_direction_gives_no_right_in_the_other(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.3-1, RFC6120-4.5-2, RFC3920-14.4-1"""
    peer = internet.caller(FAR).is_verified()
    romeo.sends(f"<message to='juliet@{FAR}'><body>O</body></message>")
    authority = internet.peers[FAR]
    authority.confirms()
    authority.receives(f"<message from='{romeo.jid}' to='juliet@{FAR}'><body>O</body></message>")
    peer.receives_nothing()


def test_rooms_ask_on_the_stream_of_their_host(romeo: Client, internet: Internet) -> None:
    """XEP0220-2.6.2-1, RFC6120-10.4.1-1"""
    internet.add(FAR)
    romeo.sends(f"<message to='juliet@{FAR}'><body>O</body></message>")
    peer = internet.called(FAR).lets_in()
    peer.receives(f"<message from='{romeo.jid}' to='juliet@{FAR}'><body>O</body></message>")
    internet.federation.server.emit(xmppd.parse_element(f"<message from='r@conference.example.org' to='juliet@{FAR}'/>"))
    peer.confirms("conference.example.org")
    peer.receives(f"<message from='r@conference.example.org' to='juliet@{FAR}'/>")
    internet.is_quiet()
