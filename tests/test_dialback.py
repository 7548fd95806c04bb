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
