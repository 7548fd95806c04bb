"""Stream compression (XEP-0138): on the wire, since it is the connection that compresses."""

from __future__ import annotations

import secrets
import time
import tracemalloc
import zlib

import pytest

import xmppd
from tests.dialogue import Client, StreamReader, password_of

COMPRESS = "http://jabber.org/protocol/compress"
pytestmark = [pytest.mark.wire, pytest.mark.config(compat={"compression": True})]


class Deflated:
    """A client's end of a compressed connection, put in place of its wire."""

    def __init__(self, wire) -> None:
        self.wire = wire
        self._out, self._in = zlib.compressobj(), zlib.decompressobj()

    def send(self, data: bytes) -> None:
        self.wire.send(self._out.compress(data) + self._out.flush(zlib.Z_SYNC_FLUSH))

    def read(self, timeout: float) -> bytes | None:
        data = self.wire.read(timeout)
        return self._in.decompress(data) if data else data

    def start_tls(self, host: str) -> None:
        self.wire.start_tls(host)

    def bindings(self) -> dict[str, bytes]:
        return self.wire.bindings()

    def close(self) -> None:
        self.wire.close()


@pytest.fixture
def client(server) -> Client:
    """Somebody who has authenticated and may now compress or bind."""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    client.authenticates("romeo", password_of("romeo"))
    return client


def test_features_stand_in_the_order_in_which_they_are_negotiated(client):
    """XEP0170-2-1: compression before binding, and whatever needs a resource behind it"""
    names = [child.tag.partition("}")[2] for child in client.negotiates()]
    known = ["compression", "bind", "session", "sm"]
    assert [name for name in names if name in known] == known


def compresses(client: Client) -> None:
    client.sends(f"<compress xmlns='{COMPRESS}'><method>zlib</method></compress>")
    client.receives(f"<compressed xmlns='{COMPRESS}'/>")
    client.wire = Deflated(client.wire)
    client._reader = StreamReader()


def test_a_compressed_stream_is_a_new_stream_and_binds(client, juliet):
    """XEP0138-2-1 XEP0138-2-2 XEP0138-4-1 XEP0138-2-6 XEP0138-3-1 XEP0138-6-1 XEP0138-2-9 XEP0138-7-1"""
    features = client.negotiates()
    method = features.find("{http://jabber.org/features/compress}compression/{http://jabber.org/features/compress}method")
    assert method is not None and method.text == "zlib"
    compresses(client)
    features = client.negotiates()
    assert features.find("{http://jabber.org/features/compress}compression") is None
    client.binds("orchard")
    juliet.sends("<message to='romeo@example.org/orchard' type='chat'><body>O</body></message>")
    client.receives("<message from='juliet@example.org/balcony' type='chat'><body>O</body></message>")
    client.receives_nothing()


def test_another_method_is_refused_and_zlib_may_follow(client):
    """XEP0138-2-3 XEP0138-2-5"""
    client.negotiates()
    client.sends(f"<compress xmlns='{COMPRESS}'><method>lzw</method></compress>")
    client.receives(f"<failure xmlns='{COMPRESS}'><unsupported-method/></failure>")
    compresses(client)
    client.negotiates()


def test_nobody_compresses_before_the_login(server):
    """S22, XEP0138-2-4: CVE-2014-8760 let a client skip STARTTLS that way."""
    client = server.client().connect()
    features = client.negotiates()
    assert [feature.tag for feature in features] == ["{urn:ietf:params:xml:ns:xmpp-tls}starttls"]
    client.sends(f"<compress xmlns='{COMPRESS}'><method>zlib</method></compress>")
    client.receives(f"<failure xmlns='{COMPRESS}'><setup-failed/></failure>")
    client.starts_tls()
    client.negotiates()
    client.sends(f"<compress xmlns='{COMPRESS}'><method>zlib</method></compress>")
    client.receives(f"<failure xmlns='{COMPRESS}'><setup-failed/></failure>")


def test_a_bound_session_does_not_compress(romeo):
    romeo.sends(f"<compress xmlns='{COMPRESS}'><method>zlib</method></compress>")
    romeo.receives(f"<failure xmlns='{COMPRESS}'><setup-failed/></failure>")


@pytest.mark.config(compat={"compression": False})
def test_it_is_off_by_default(client):
    """S24"""
    assert not xmppd.Compat().compression
    features = client.negotiates()
    assert features.find("{http://jabber.org/features/compress}compression") is None
    client.sends(f"<compress xmlns='{COMPRESS}'><method>zlib</method></compress>")
    client.receives(f"<failure xmlns='{COMPRESS}'><setup-failed/></failure>")


def test_what_came_behind_the_request_is_not_read(client):
    """XEP0138-2-7"""
    client.negotiates()
    client.sends_raw(f"<compress xmlns='{COMPRESS}'><method>zlib</method></compress><iq type='set' id='early'/>")
    client.receives(f"<compressed xmlns='{COMPRESS}'/>")
    client.wire = Deflated(client.wire)
    client.negotiates()
    client.binds("orchard")


@pytest.mark.config(compat={"compression": True}, limits={"bytes_per_second": 20_000})
def test_the_rate_is_that_of_the_text(client, juliet):
    """S23, RFC6120-13.12-1: else somebody who compresses could make us work a hundred times as much as others."""
    client.negotiates()
    compresses(client)
    client.negotiates()
    client.binds("orchard")
    began = time.monotonic()
    for _ in range(27):  # 270 KB where 200 are free; on the wire they are a fifth of it
        text = secrets.token_hex(1000) * 5
        client.sends(f"<message to='juliet@example.org/balcony' id='fast'><body>{text}</body></message>")
    for _ in range(27):
        juliet.receives("<message id='fast' ...>...</message>")
    client.sends("<message to='juliet@example.org/balcony' id='late'/>")
    juliet.receives("<message id='late' ...>...</message>")
    assert time.monotonic() - began > 2  # in which it was not listened to


def test_damaged_input_ends_the_stream(client):
    """XEP0138-2-8"""
    client.negotiates()
    compresses(client)
    client.negotiates()
    client.wire.wire.send(b"this is not zlib")
    client.receives_stream_error("undefined-condition", f"<failure xmlns='{COMPRESS}'><processing-failed/></failure>")
    assert client.is_closed()


@pytest.mark.parametrize("crumb", [b" ", b"<iq type='result' id='nobody-asked'/>"], ids=["spaces", "stanzas"])
def test_a_bomb_ends_the_stream(client, crumb):
    """S23: CVE-2014-2744, CVE-2014-2745"""
    client.negotiates()
    compresses(client)
    client.negotiates()
    client.binds("orchard")
    client.wire.send(crumb * (100_000_000 // len(crumb)))
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


def test_inflating_a_bomb_takes_bounded_memory():
    """S23"""
    bomb = zlib.compress(b" " * 100_000_000, 9)
    deflation = xmppd.Deflation()
    tracemalloc.start()
    with pytest.raises(xmppd.StreamError, match="policy-violation"):
        for piece in deflation.inflate(bomb):
            assert len(piece) <= xmppd.Deflation.PIECE
    assert tracemalloc.get_traced_memory()[1] < 2_000_000 + len(bomb)
    tracemalloc.stop()


def test_each_write_is_complete_and_shares_nothing_with_the_next():
    """S24: a full flush leaves no history by which one stanza's length could betray another's content."""
    deflation = xmppd.Deflation()
    secret = b"<message><body>the password is opensesame, do not tell</body></message>"
    first, second = deflation.deflate(secret), deflation.deflate(secret)
    assert len(second) >= len(first) - 2 - 4  # but for zlib's two bytes of header
    inflater = zlib.decompressobj()
    assert inflater.decompress(first) == secret
    assert inflater.decompress(second) == secret


def test_a_stream_that_ends_within_is_an_error():
    """S23: what follows the end of the zlib data is not taken for plain text."""
    with pytest.raises(xmppd.StreamError, match="undefined-condition"):
        list(xmppd.Deflation().inflate(zlib.compress(b"<presence/>") + b"<presence/>"))
