"""The floor: the least code in this style that passes messages on.

    python -m tests.bench.floor CERTIFICATE KEY PORT

TLS from the first byte, any name with any password (PLAIN), binding, and then every
first-level element with a `to` goes to the session with that full JID, its `from` stamped
and the bytes between its tags as they came. No rules, no limits, no errors, no features:
what is dearer than this in a server is the price of being one.
"""

from __future__ import annotations

import base64
import re
import selectors
import socket
import ssl
import sys
from html import escape
from xml.parsers import expat

READ_SIZE = 64 * 1024  # bytes
START_TAG = re.compile(rb"""<[^"'>]*(?:"[^"]*"[^"'>]*|'[^']*'[^"'>]*)*>""")
HEADER = (
    "<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' "
    "id='floor' version='1.0' from='{host}'><stream:features>{features}</stream:features>"
)
MECHANISMS = "<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>PLAIN</mechanism></mechanisms>"
BIND = "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>"
BOUND = "<iq type='result' id='{id}'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><jid>{jid}</jid></bind></iq>"


class Relay:
    """All connections, and whose they are."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        self.selector = selectors.DefaultSelector()
        self.sessions: dict[str, Connection] = {}  # by full JID
        self.written: list[Connection] = []  # have output that leaves at the end of the turn
        self._listener = listener
        self._context = context
        self.selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self, events: int) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secure = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self.selector.register(secure, selectors.EVENT_READ, Connection(self, secure).shake_hands)

    def run(self) -> None:
        """Serve until SIGTERM ends it; there is nothing to be saved."""
        while True:
            for key, events in self.selector.select():
                key.data(events)
            written, self.written = self.written, []
            for connection in written:
                connection.flush()


class Connection:
    """A client: TLS, parsing, login, and passing on."""

    def __init__(self, relay: Relay, sock: ssl.SSLSocket) -> None:
        self.relay = relay
        self.jid = ""
        self._socket = sock
        self._output: list[bytes] = []
        self._unsent = b""
        self._name = ""
        self._open_stream()

    def _open_stream(self) -> None:
        self._parser = expat.ParserCreate("utf-8")
        self._parser.buffer_text = True
        self._parser.buffer_size = 256  # bytes, per connection; by itself it takes 8 KB
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._depth = 0
        self._input = b""  # from `_input_at` on
        self._input_at = 0
        self._began = 0  # offset of the current first-level element
        self._ended = 0  # offset behind the last one
        self._tag, self._attributes, self._text = "", dict[str, str](), ""

    # -- bytes

    def shake_hands(self, events: int) -> None:
        """Take one step of the TLS handshake."""
        try:
            self._socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            return self._close()
        self.relay.selector.modify(self._socket, selectors.EVENT_READ, self.ready)

    def ready(self, events: int) -> None:
        """Read, and write what had to wait."""
        if events & selectors.EVENT_WRITE:
            self.relay.selector.modify(self._socket, selectors.EVENT_READ, self.ready)
            self.flush()
        try:
            data = self._socket.recv(READ_SIZE)
            while self._socket.pending():
                data += self._socket.recv(READ_SIZE)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            return self._close()
        if not data:
            return self._close()
        self._input = self._input[self._ended - self._input_at :] + data
        self._input_at = self._ended
        self._parser.Parse(data)

    def write(self, data: bytes) -> None:
        """Queue bytes until the end of the turn."""
        if not self._output:
            self.relay.written.append(self)
        self._output.append(data)

    def flush(self) -> None:
        """Send what the kernel takes."""
        self._unsent += b"".join(self._output)
        self._output.clear()
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self.relay.selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self.ready)
            return
        except OSError:
            return self._close()

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            self.relay.sessions.pop(self.jid, None)
            self.relay.selector.unregister(self._socket)
            self._socket.close()

    # -- elements

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 2:
            self._began = self._parser.CurrentByteIndex
            self._tag, self._attributes, self._text = name, attributes, ""
        elif self._depth == 1:
            features = BIND if self._name else MECHANISMS
            self.write(HEADER.format(host=escape(attributes.get("to", "")), features=features).encode())
            self._host = attributes.get("to", "")

    def _characters(self, text: str) -> None:
        self._text = text  # of the innermost element: all that the login needs

    def _end(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 1:
            kept, index = self._input, self._parser.CurrentByteIndex - self._input_at
            start = START_TAG.match(kept, self._began - self._input_at)
            assert start is not None
            empty = kept[start.end() - 2 : start.end()] == b"/>"
            end = start.end() if empty else kept.index(b">", index) + 1
            self._ended = self._input_at + end
            self._complete(b"" if empty else kept[start.end() : index])

    def _complete(self, content: bytes) -> None:
        if self.jid:
            receiver = self.relay.sessions.get(self._attributes.get("to", ""))
            if receiver is not None:
                self._attributes["from"] = self.jid
                inside = "".join([f" {key}='{escape(value)}'" for key, value in self._attributes.items()])
                receiver.write(b"<%b%b>%b</%b>" % (self._tag.encode(), inside.encode(), content, self._tag.encode()))
        elif self._tag == "auth":
            self._name = base64.b64decode(self._text).split(b"\0")[1].decode()
            self.write(b"<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
            self._open_stream()
        elif self._tag == "iq":
            self.jid = f"{self._name}@{self._host}/{self._text}"
            self.relay.sessions[self.jid] = self
            self.write(BOUND.format(id=escape(self._attributes["id"]), jid=escape(self.jid)).encode())


def main(certificate: str, key: str, port: str) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    Relay(socket.create_server(("127.0.0.1", int(port)), backlog=1024), context).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
