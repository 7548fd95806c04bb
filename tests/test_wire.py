"""What only shows over TCP and TLS, against a server process: handshakes, signals, power cuts."""

from __future__ import annotations

import signal
import ssl

import pytest

from tests.dialogue import Client
from tests.servers import ProcessServer


@pytest.mark.wire
@pytest.mark.parametrize("direct_tls", [False, True], ids=["STARTTLS", "direct TLS"])
@pytest.mark.parametrize(
    "mechanism", ["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"]
)
def test_every_mechanism_works_over_real_tls(server: ProcessServer, mechanism: str, direct_tls: bool) -> None:
    romeo = server.client(direct_tls=direct_tls)
    romeo.login("romeo", resource="orchard", mechanism=mechanism)
    assert romeo.jid == "romeo@example.org/orchard"


@pytest.mark.wire
def test_a_stranger_to_our_authority_does_not_get_in(server: ProcessServer) -> None:
    """RFC6120-13.7: the clients of these tests verify, so their success means something."""
    client = server.client()
    client.connect()
    client.negotiates()
    client.wire.context = ssl.create_default_context()  # type: ignore[union-attr]
    with pytest.raises(ssl.SSLCertVerificationError):
        client.starts_tls()
    client.disconnects()


@pytest.mark.wire
def test_each_host_shows_a_certificate_for_its_name(server: ProcessServer) -> None:
    for host in ("example.org", "example.net"):
        client = server.client(host=host).connect()
        client.negotiates()
        client.starts_tls()  # verifies the name
        client.negotiates()
        client.closes()


@pytest.mark.wire
def test_any_split_of_the_segments_gives_the_same(server: ProcessServer, juliet: Client) -> None:
    romeo = server.client(split=7).login("romeo", resource="orchard")
    romeo.sends("<message to='juliet@example.org/balcony' type='chat'><body>é &lt; ü</body></message>")
    juliet.receives(
        "<message from='romeo@example.org/orchard' to='juliet@example.org/balcony' type='chat'><body>é &lt; ü</body></message>"
    )


@pytest.mark.wire
def test_a_client_that_vanishes_is_missed(romeo: Client, juliet: Client) -> None:
    romeo.befriends(juliet)
    romeo.comes_online()
    romeo.receives("<presence type='unavailable' from='juliet@example.org'/>")
    juliet.comes_online()
    juliet.receives("<presence from='romeo@example.org/orchard'/>")
    romeo.receives("<presence from='juliet@example.org/balcony'/>")
    juliet.disconnects()
    romeo.receives("<presence type='unavailable' from='juliet@example.org/balcony'/>")


def test_sigterm_tells_everybody_and_ends_well(process_server: ProcessServer) -> None:
    """RFC 6120 §4.9.3.20; that the exit status is 0 and no traceback is logged, `stop` checks."""
    romeo = process_server.client().login("romeo")
    stranger = process_server.client().connect()
    stranger.negotiates()
    process_server.process.process.send_signal(signal.SIGTERM)
    romeo.receives_stream_error("system-shutdown")
    assert romeo.is_closed()
    stranger.receives_stream_error("system-shutdown")
    assert stranger.is_closed()
    process_server.stop()


def test_a_power_cut_loses_nothing_that_was_acknowledged(process_server: ProcessServer) -> None:
    """What romeo's barrier has passed is on disk: contacts, and messages for who is away."""
    romeo = process_server.client().login("romeo")
    juliet = process_server.client().login("juliet")
    romeo.befriends(juliet)
    juliet.closes()
    for number in range(20):
        romeo.sends(f"<message to='juliet@example.org' type='chat'><body>{number}</body></message>")
    romeo.receives_nothing()
    process_server.kill()
    process_server.cast.hang_up()
    process_server.start()
    juliet = process_server.client().login("juliet", resource="balcony")
    juliet.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
    juliet.receives(
        "<iq type='result' id='r'><query xmlns='jabber:iq:roster' ...>"
        "<item jid='romeo@example.org' subscription='both'/></query></iq>"
    )
    juliet.sends("<presence/>")
    came = [stanza.findtext("{jabber:client}body") for stanza in juliet.receives_anything()]
    assert [body for body in came if body is not None] == [str(number) for number in range(20)]


def test_accounts_are_managed_while_the_server_runs(process_server: ProcessServer) -> None:
    process_server.add_account("tybalt@example.org", "prince of cats")
    tybalt = process_server.client().login("tybalt", password="prince of cats", resource="street")
    process_server.command("user", "remove", "tybalt@example.org", "--yes")
    tybalt.receives_stream_error("not-authorized")
    assert tybalt.is_closed()
    assert "tybalt" not in process_server.command("user", "list")
