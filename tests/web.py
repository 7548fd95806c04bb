"""The web port for the tests: HTTP requests, and people who log in over WebSocket or BOSH.

`request(server, …)` is one HTTP exchange. `web_client(server, "websocket")` is a `Client` like any
other: what it says as on TCP is put into WebSocket messages or BOSH bodies, and back. All of it
works in memory and against a server process.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import re
import secrets
import time
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Mapping
from xml.parsers import expat

from wsproto.connection import Connection as Framing
from wsproto.connection import ConnectionType
from wsproto.events import CloseConnection, Event, Ping, Pong, TextMessage

import xmppd
from tests.dialogue import PATIENCE, Client, SocketWire, Wire
from tests.servers import MemoryServer, ProcessServer

Server = MemoryServer | ProcessServer
HOST = "example.org"
FRAMING = "urn:ietf:params:xml:ns:xmpp-framing"
HTTP_BIND = "http://jabber.org/protocol/httpbind"


class MemoryConnection:
    """Stands in for `xmppd.Connection`: what the server writes is kept for the client."""

    def __init__(self, server: MemoryServer) -> None:
        self.loop = server.loop
        self.peer = "127.0.0.1"
        self.secure = True
        self.carried: xmppd.Carried | None = None
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.closed = False
        self._pauses = 0

    def carry(self, carried: xmppd.Carried) -> None:
        self.carried = carried

    def deliver(self) -> None:
        if self.incoming and not self._pauses and not self.closed:
            data = bytes(self.incoming)
            self.incoming.clear()
            assert self.carried is not None
            self.carried.receive(data)

    def write(self, data: bytes) -> None:
        if not self.closed:
            assert isinstance(data, bytes)
            self.outgoing += data

    write_ahead = write

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.run_last(self.lost)

    abort = close

    def lost(self) -> None:
        carried, self.carried = self.carried, None
        if carried is not None:
            carried.connection_lost()

    def pause(self) -> None:
        self._pauses += 1

    def resume(self) -> None:
        self._pauses -= 1
        self.loop.post(self.deliver)

    def when_sent(self, callback: Callable[[], None]) -> None:
        if not self.closed:
            self.loop.run_last(callback)

    def channel_bindings(self) -> dict[str, bytes]:
        return {}


class MemoryPipe:
    """A `Wire` of bytes to the web port of a server in memory."""

    def __init__(self, server: MemoryServer) -> None:
        self.loop = server.loop
        self.connection = MemoryConnection(server)
        self.connection.carry(server.server.protocols["http/1.1"](self.connection))  # type: ignore[arg-type]

    def send(self, data: bytes) -> None:
        self.connection.incoming += data
        self.connection.deliver()

    def read(self, timeout: float) -> bytes | None:
        give_up = time.monotonic() + timeout
        self.loop.turn(0)
        while not self.connection.outgoing and not self.connection.closed:
            left = give_up - time.monotonic()
            if left <= 0:
                return None
            self.loop.turn(left)
        data = bytes(self.connection.outgoing)
        self.connection.outgoing.clear()
        return data

    def start_tls(self, host: str) -> None:
        raise AssertionError("as good as done")

    def bindings(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None:
        self.connection.closed = True
        self.connection.lost()
        self.loop.turn(0)


def pipe(server: Server) -> Wire:
    """Return a connection to the web port."""
    if isinstance(server, MemoryServer):
        return MemoryPipe(server)
    return SocketWire(("127.0.0.1", server.ports["web"]), server.trust, direct_tls=HOST)


# ---- HTTP -----------------------------------------------------------------------------


class Answer:
    """An HTTP response: `status`, `body`, and headers by name in any case."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    def __getitem__(self, header: str) -> str:
        return self.headers[header.lower()]

    def __contains__(self, header: str) -> bool:
        return header.lower() in self.headers

    def __repr__(self) -> str:
        return f"{self.status} {self.headers} {self.body[:200]!r}"


class Reading(io.BytesIO):
    """What http.client takes for a socket's file."""

    def makefile(self, *_args: object) -> Reading:
        return self


def read_answer(wire: Wire, method: str = "GET") -> tuple[Answer, bytes]:
    """Return the next answer, and the bytes behind it."""
    data = b""
    while True:
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", data[: end + 2])
            length = int(found[1]) if found and method != "HEAD" else 0
            if len(data) >= end + 4 + length:
                break
        piece = wire.read(PATIENCE)
        assert piece is not None, f"no answer in {PATIENCE} seconds: {data!r}"
        if not piece:
            break
        data += piece
    assert data, "the server hung up without an answer"
    size = end + 4 + length
    response = http.client.HTTPResponse(Reading(data[:size]), method=method)  # type: ignore[arg-type]
    response.begin()
    return Answer(response.status, dict(response.getheaders()), response.read()), data[size:]


def head(method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a request as it goes over the wire."""
    lines = {"Host": HOST, **({"Content-Length": str(len(body))} if body or method in ("PUT", "POST") else {}), **headers}
    fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + body


def request(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """Do one HTTP exchange on a connection of its own; names of headers have `_` for `-`."""
    wire = pipe(server)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    wire.send(head(method, path, named, body))
    answer, _ = read_answer(wire, method)
    wire.close()
    return answer


# ---- a client's stream, cut into elements ---------------------------------------------


class Splitter:
    """Cuts what a client says on a stream into ("open", attributes), ("element", bytes) and ("close", None)."""

    def __init__(self) -> None:
        self._new_stream()

    def _new_stream(self) -> None:
        self._parser = expat.ParserCreate("UTF-8", "}")
        if hasattr(self._parser, "SetReparseDeferralEnabled"):  # expat ≥ 2.6 would hold back what is complete
            self._parser.SetReparseDeferralEnabled(False)
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._data = b""
        self._depth = self._began = 0
        self.events: list[tuple[str, object]] = []

    def feed(self, data: bytes) -> list[tuple[str, object]]:
        if data.startswith((b"<?xml", b"<stream:stream")):
            self._new_stream()
        self._data += data
        self._parser.Parse(data, False)
        events, self.events = self.events, []
        return events

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._depth == 0:
            plain = {key.replace("http://www.w3.org/XML/1998/namespace}", "xml:"): value for key, value in attributes.items()}
            self.events.append(("open", plain))
        elif self._depth == 1:
            self._began = self._parser.CurrentByteIndex
        self._depth += 1

    def _end(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 1:
            start = xmppd.START_TAG.match(self._data, self._began)
            assert start
            is_empty = start.group().endswith(b"/>")
            end = start.end() if is_empty else self._data.index(b">", self._parser.CurrentByteIndex) + 1
            self.events.append(("element", self._data[self._began : end]))
        elif self._depth == 0:
            self.events.append(("close", None))


def attributes_text(attributes: object) -> str:
    assert isinstance(attributes, dict)
    return "".join(f" {name}='{xmppd.escape_attribute(value)}'" for name, value in attributes.items())


def with_client_namespace(element: bytes) -> bytes:
    """Declare what on TCP the stream's header declares."""
    found = re.match(rb"<(message|presence|iq)(?=[\s/>])(?![^>]*\sxmlns=)", element)
    return element if found is None else b"%b xmlns='jabber:client'%b" % (found.group(), element[found.end() :])


STREAM_START = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'"


class WebSocketWire:
    """A `Wire` on which streams look as on TCP, and travel over WebSocket (RFC 7395)."""

    def __init__(self, raw: Wire, path: str = "/xmpp-websocket", **headers: str) -> None:
        self.raw = raw
        self.answer, early = self._handshake(path, {name.replace("_", "-"): value for name, value in headers.items()})
        self.framing = Framing(ConnectionType.CLIENT, trailing_data=early)
        self.close_code = 0
        self.pongs = 0
        self._splitter = Splitter()
        self._ended = False

    def _handshake(self, path: str, headers: Mapping[str, str]) -> tuple[Answer, bytes]:
        usual = {
            "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": "xmpp",
            "Sec-WebSocket-Key": base64.b64encode(secrets.token_bytes(16)).decode(),
        }  # fmt: skip
        self.raw.send(head("GET", path, {**usual, **headers}, b""))
        return read_answer_without_body(self.raw)

    def send(self, data: bytes) -> None:
        for kind, what in self._splitter.feed(data):
            if kind == "open":
                self.sends_message(f"<open xmlns='{FRAMING}'{attributes_text(what)}/>")
            elif kind == "close":
                self.sends_message(f"<close xmlns='{FRAMING}'/>")
            else:
                assert isinstance(what, bytes)
                self.sends_message(with_client_namespace(what).decode())

    def sends_message(self, text: str) -> None:
        """Send one WebSocket message."""
        self.sends_event(TextMessage(data=text))

    def sends_event(self, event: Event) -> None:
        if self._ended:
            return  # as a socket that the server has closed: whoever reads next will see it
        self.raw.send(bytes(self.framing.send(event)))

    def read(self, timeout: float) -> bytes | None:
        if self._ended:
            return b""
        data = self.raw.read(timeout)
        if not data:
            return data
        self.framing.receive_data(data)
        came = b"".join(self._as_on_tcp(event) for event in self.framing.events())
        return came or (b"" if self._ended else b" ")  # white space means nothing

    def _as_on_tcp(self, event: Event) -> bytes:
        if isinstance(event, CloseConnection):
            self._ended, self.close_code = True, int(event.code)
        elif isinstance(event, Ping):
            self.pongs += 1
            self.sends_event(Pong(payload=bytes(event.payload)))
        elif isinstance(event, TextMessage):
            assert event.data.startswith("<") and event.message_finished
            element = ET.fromstring(event.data)  # each is a document of its own
            if element.tag == f"{{{FRAMING}}}open":
                attributes = event.data.partition("<open")[2].replace(f"xmlns='{FRAMING}'", "").removesuffix("/>")
                return f"{STREAM_START}{attributes}>".encode()
            return b"</stream:stream>" if element.tag == f"{{{FRAMING}}}close" else event.data.encode()
        return b""

    def start_tls(self, host: str) -> None:
        raise AssertionError("TLS is the web's")

    def bindings(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None:
        self.raw.close()


class BoshWire:
    """A `Wire` on which streams look as on TCP, and travel in BOSH's bodies (XEP-0124, XEP-0206)."""

    def __init__(self, server: Server, path: str = "/http-bind") -> None:
        self.server, self.path = server, path
        self.pipes: deque[Wire] = deque([pipe(server)])  # idle ones
        self.open: deque[tuple[int, Wire]] = deque()  # with a request that waits for its answer
        self.rid = itertools.count(secrets.randbelow(1 << 40))
        self.sid = ""
        self.last: ET.Element = ET.Element("none")  # the last body that came
        self._stash = b""  # what came while something was to be sent
        self._splitter = Splitter()
        self._header: dict[str, str] = {}
        self._is_opening = self._ended = False

    def send(self, data: bytes) -> None:
        payload = b""
        for kind, what in self._splitter.feed(data):
            if kind == "open":
                assert isinstance(what, dict)
                self._open(what)
            elif kind == "close":
                self.posts(payload.decode(), type="terminate")
                return
            else:
                assert isinstance(what, bytes)
                payload += with_client_namespace(what)
        if payload:
            self.posts(payload.decode())

    def _open(self, attributes: dict[str, str]) -> None:
        self._is_opening = True
        common = {"to": attributes.get("to", ""), **({"xml:lang": attributes["xml:lang"]} if "xml:lang" in attributes else {}), "xmlns:xmpp": "urn:xmpp:xbosh"}
        if self.sid:
            self.posts("", **common, **{"xmpp:restart": "true"})
        else:
            self.posts("", **common, **{"hold": "1", "wait": "60", "ver": "1.6", "xmpp:version": attributes.get("version", "1.0")})

    def posts(self, payload: str, **attributes: str) -> int:
        """Send one request; return its rid."""
        while len(self.open) > 1 and not attributes:  # a client may have two requests open, no more
            self._stash += self._receive(PATIENCE) or b""
        rid = int(attributes.pop("rid", "") or next(self.rid))
        words = attributes_text({"rid": str(rid), **({"sid": self.sid} if self.sid else {}), **attributes})
        wire = self.pipes.popleft() if self.pipes else pipe(self.server)
        wire.send(head("POST", self.path, {}, f"<body xmlns='{HTTP_BIND}'{words}>{payload}</body>".encode()))
        self.open.append((rid, wire))
        return rid

    def read(self, timeout: float) -> bytes | None:
        if self._ended:
            return b""
        stash, self._stash = self._stash, b""
        if stash:
            return stash
        if not self.open:
            self.posts("")
        return self._receive(timeout)

    def _receive(self, timeout: float) -> bytes | None:
        wire = self.open[0][1]
        data = wire.read(timeout)
        if not data:
            return data
        if not data.endswith(b"</body>") and not data.endswith(b"/>"):
            data += wire.read(timeout) or b""
        self.open.popleft()
        self.pipes.append(wire)
        return self._as_on_tcp(data.partition(b"\r\n\r\n")[2])

    def _as_on_tcp(self, body: bytes) -> bytes:
        self.last = element = ET.fromstring(body)
        assert element.tag == f"{{{HTTP_BIND}}}body"
        start = xmppd.START_TAG.match(body)
        assert start
        inside = body[start.end() :].removesuffix(b"</body>") if len(element) else b""
        if not self.sid and element.get("sid"):
            self.sid = element.get("sid", "")
            header = {"from": element.get("from", ""), "id": element.get("authid", ""), "version": "1.0", "xml:lang": "en"}
            self._header = header
        if b"<stream:features" in inside and self._is_opening:  # behind SASL2 they come without a header
            self._is_opening = False
            inside = f"{STREAM_START}{attributes_text(self._header)}>".encode() + inside
        if element.get("type") == "terminate":
            self._ended = True
            if condition := element.get("condition", "").replace("remote-stream-error", ""):
                inside += f"<error xmlns='{HTTP_BIND}'><{condition}/></error>".encode()
            inside += b"</stream:stream>"
        return inside or b" "

    def start_tls(self, host: str) -> None:
        raise AssertionError("TLS is the web's")

    def bindings(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None:
        """As a client that is gone: in memory its silence need not be waited for."""
        if isinstance(self.server, MemoryServer):
            session = self.server.server.registry.feature(xmppd.Bosh).sessions.get(self.sid)
            if session is not None:
                session._expire()
        elif self.sid and not self._ended:
            self.posts("", type="terminate")
        for wire in (*self.pipes, *(wire for _, wire in self.open)):
            wire.close()


def read_answer_without_body(wire: Wire) -> tuple[Answer, bytes]:
    """Return an answer whose end is the end of its headers, and what follows."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = wire.read(PATIENCE)
        assert piece, f"no answer: {data!r}"
        data += piece
    heading, _, rest = data.partition(b"\r\n\r\n")
    lines = heading.decode().split("\r\n")
    pairs = (line.partition(": ")[::2] for line in lines[1:])
    return Answer(int(lines[0].split()[1]), dict(pairs), b""), rest


def web_client(server: Server, transport: str = "websocket", host: str = HOST) -> Client:
    """Return somebody who has not connected yet and will by `transport`."""
    return Client(lambda: WIRES[transport](server), server.cast, host=host)


WIRES: dict[str, Callable[[Server], Wire]] = {
    "websocket": lambda server: WebSocketWire(pipe(server)),
    "bosh": BoshWire,
}
