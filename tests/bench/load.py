"""The load generator: many clients on one selector, much cheaper than any server that they talk to.

Nothing here parses XML. A client cuts what comes in at an end tag and hands each piece to
`take`, which looks for the bytes that must be in it. What a client sends are templates in
bytes. Everything that has an end is written as a script, a generator that yields what it
waits for:

    challenge = yield CHALLENGE     a compiled pattern: gives the bytes up to its end
    yield HANDSHAKE                 until TLS is up
"""

from __future__ import annotations

import base64
import re
import secrets
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from tests.bench.people import HOST, PASSWORD, RESOURCE, ScramLogin, full_jid, name_of

READ_SIZE = 64 * 1024  # bytes
CONNECT_TIMEOUT = 10.0  # seconds
LOGINS_AT_ONCE = 16
HANDSHAKE = re.compile(b"")  # what a script yields to have TLS begin

FEATURES = re.compile(rb"</(?:stream:)?features>")
PROCEED = re.compile(rb"<proceed [^>]*>")
CHALLENGE = re.compile(rb"<challenge[^>]*>([^<]*)</challenge>|<failure.*?</failure>", re.DOTALL)
SUCCESS = re.compile(rb"<success[^>]*?(?:/>|>([^<]*)</success>)|<failure.*?</failure>", re.DOTALL)
IQ_RESULT = re.compile(rb"<iq [^>]*?(?:/>|>.*?</iq>)", re.DOTALL)
END_OF_STREAM = re.compile(rb"</stream:stream>")

HEADER = (
    b"<?xml version='1.0'?><stream:stream to='%b' version='1.0' xmlns='jabber:client' "
    b"xmlns:stream='http://etherx.jabber.org/streams'>" % HOST.encode()
)
STARTTLS = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
AUTH = "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='%s'>%s</auth>"
RESPONSE = "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>%s</response>"
BIND = b"<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>%b</resource></bind></iq>"

Script = Generator[re.Pattern[bytes], re.Match[bytes], None]


class BenchError(Exception):
    """Something was not delivered, or not as it should be; or a server does not do its part."""


def client_context(authority: Path) -> ssl.SSLContext:
    """Return a context for TLS 1.3 that trusts the benchmark's own authority only."""
    context = ssl.create_default_context(cafile=str(authority))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class Load:
    """The selector that drives all clients."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.selector = selectors.DefaultSelector()
        self.stopping = False  # the clients begin nothing new
        self.after_turn: Callable[[], None] | None = None  # for a case that has to look after its clients

    def turn(self, timeout: float) -> None:
        """Let clients whose sockets are ready do what they have to."""
        for key, events in self.selector.select(timeout):
            key.data(events)
        if self.after_turn is not None:
            self.after_turn()

    def run_for(self, seconds: float) -> None:
        """Run turns for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.turn(left)

    def run_until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Run turns until `done()`; raises BenchError after `timeout` seconds without that."""
        end = time.monotonic() + timeout
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                raise BenchError(f"{what}: not done after {timeout:.0f} seconds")
            self.turn(min(left, 0.2))

    def log_in(self, clients: Iterable[Client], timeout: float = 120.0) -> None:
        """Log clients in, a few at a time."""
        waiting, busy = list(clients), set[Client]()
        waiting.reverse()

        def done() -> bool:
            busy.difference_update([client for client in busy if client.script is None])
            while waiting and len(busy) < LOGINS_AT_ONCE:
                client = waiting.pop()
                client.begin(client.login())
                busy.add(client)
            return not busy

        self.run_until(done, timeout, "logging in")

    def close(self) -> None:
        """Release the selector."""
        self.selector.close()


class Client:
    """One session: a socket with TLS, a script while it has one, then `take` for each piece that comes in."""

    def __init__(self, load: Load, number: int, port: int, *, starttls: bool = False, resource: str = RESOURCE) -> None:
        self.load = load
        self.number = number
        self.resource = resource
        self.full = full_jid(number, resource).encode()
        self.port = port
        self.starttls = starttls
        self.script: Script | None = None
        self.take: Callable[[bytes], None] = lambda piece: None
        self.end_tag = b">"  # where pieces end
        self._socket: socket.socket | ssl.SSLSocket | None = None
        self._input = b""
        self._unsent = b""
        self._awaited = HANDSHAKE

    # -- scripts

    def begin(self, script: Script) -> None:
        """Connect, unless that was done before, and run a script."""
        if self._socket is None:
            self._connect()
        self.script = script
        self._await(next(script))

    def _await(self, awaited: re.Pattern[bytes]) -> None:
        self._awaited = awaited
        if awaited is HANDSHAKE:
            assert self._socket is not None
            self.load.selector.unregister(self._socket)
            self._socket = self.load.context.wrap_socket(
                self._socket, server_hostname=HOST, do_handshake_on_connect=False
            )
            self.load.selector.register(self._socket, selectors.EVENT_READ, self._shake_hands)
            self._shake_hands(selectors.EVENT_READ)

    def _shake_hands(self, events: int) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        try:
            self._socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if self._socket.version() != "TLSv1.3":
            raise BenchError(f"expected TLSv1.3, found {self._socket.version()}")
        self.load.selector.modify(self._socket, selectors.EVENT_READ, self._ready)
        self._resume(HANDSHAKE.match(b""))

    def _resume(self, found: re.Match[bytes] | None) -> None:
        """Give the script what it waits for, as long as it is there."""
        while self.script is not None and found is not None:
            try:
                self._await(self.script.send(found))
            except StopIteration:
                self.script = None
                return
            if self._awaited is HANDSHAKE:
                return
            found = self._awaited.search(self._input)
            if found is not None:
                self._input = self._input[found.end() :]

    # -- bytes

    def _connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self.port), CONNECT_TIMEOUT)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.load.selector.register(self._socket, selectors.EVENT_READ, self._ready)

    def send(self, data: bytes) -> None:
        """Send bytes, or what is possible of them now and the rest later."""
        assert self._socket is not None
        if not self._unsent:
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, ssl.SSLWantWriteError):
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
            self.load.selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self._ready)
        self._unsent += data

    def _send_rest(self) -> None:
        assert self._socket is not None
        data, self._unsent = self._unsent, b""
        self.load.selector.modify(self._socket, selectors.EVENT_READ, self._ready)
        self.send(data)

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send_rest()
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if not data:
            raise BenchError(f"{name_of(self.number)}: the server has hung up after {self._input[-300:]!r}")
        if self._input:
            data = self._input + data
        if self.script is not None:
            self._input = data
            found = self._awaited.search(data)
            if found is not None:
                self._input = data[found.end() :]
                self._resume(found)
            return
        *pieces, self._input = data.split(self.end_tag)
        take = self.take
        for piece in pieces:
            take(piece)

    def expect(self, end_tag: bytes, take: Callable[[bytes], None]) -> None:
        """Give each piece that comes in, cut behind `end_tag`, to `take` from now on."""
        self.end_tag, self.take = end_tag, take

    def drop(self) -> None:
        """Close the connection without a word."""
        if self._socket is not None:
            self.load.selector.unregister(self._socket)
            self._socket.close()
            self._socket = None
            self._input = self._unsent = b""

    # -- what all clients do

    def login(self) -> Script:
        """The script from the stream header to a bound resource (RFC 6120 §4 to §7)."""
        if self.starttls:
            self.send(HEADER)
            yield FEATURES
            self.send(STARTTLS)
            yield PROCEED
        yield HANDSHAKE
        self.send(HEADER)
        features = yield FEATURES
        yield from self._authenticate(features.string[: features.end()])
        self.send(HEADER)
        yield FEATURES
        self.send(BIND % self.resource.encode())
        result = yield IQ_RESULT
        if self.full not in result[0]:
            raise BenchError(f"expected to be bound as {self.full.decode()}, found {result[0]!r}")

    def _authenticate(self, features: bytes) -> Script:
        name = name_of(self.number)
        if b"<mechanism>SCRAM-SHA-1</mechanism>" not in features:  # only the floor has no more than this
            self.send((AUTH % ("PLAIN", base64.b64encode(f"\0{name}\0{PASSWORD}".encode()).decode())).encode())
            yield SUCCESS
            return
        scram = ScramLogin(name, secrets.token_urlsafe(18))
        self.send((AUTH % ("SCRAM-SHA-1", scram.first())).encode())
        challenge = yield CHALLENGE
        if challenge[1] is None:
            raise BenchError(f"{name} cannot log in: {challenge[0]!r}")
        self.send((RESPONSE % scram.answer(challenge[1].decode())).encode())
        success = yield SUCCESS
        if success[1] is None:
            raise BenchError(f"{name} cannot log in: {success[0]!r}")
        scram.check(success[1].decode())

    def logout(self) -> Script:
        """The script that ends a session politely (RFC 6120 §4.4)."""
        self.send(b"</stream:stream>")
        yield END_OF_STREAM
        self.drop()
