"""A component (XEP-0114), played by the test in the vocabulary of `tests.dialogue`.

    gateway = Gateway(server).connects()
    gateway.sends("<message from='mercutio@gateway.example.org' to='romeo@example.org'><body>Nay.</body></message>")
    romeo.receives("<message from='mercutio@gateway.example.org' ...><body>Nay.</body></message>")

Here, as in all tests, a stanza without xmlns is in jabber:client; the gateway's stream has
jabber:component:accept in its place, which the reader and `opens_stream` see to.
"""

from __future__ import annotations

import hashlib
import ssl
import xml.etree.ElementTree as ET

from tests.dialogue import CLIENT, STREAMS, Cast, Client, Event, SocketWire, StreamReader, Wire
from tests.servers import MemoryServer, MemoryWire, ProcessServer

COMPONENT = "jabber:component:accept"
NAME = "gateway.example.org"
SECRET = "verona"
COMPONENTS = {NAME: {"secret": SECRET}, "other.example.org": {"secret": "mantua"}}  # for `@pytest.mark.config`


class ComponentReader(StreamReader):
    """Reads the component's namespace as if it were the clients'."""

    def feed(self, data: bytes) -> list[Event]:
        """See `StreamReader.feed`; the header keeps its own, which is declared and has no name of its own."""
        events = super().feed(data)
        for event in events:
            for element in event.element.iter():
                assert not element.tag.startswith(f"{{{CLIENT}}}"), f"{element.tag} on a component's stream"
                element.tag = element.tag.replace(f"{{{COMPONENT}}}", f"{{{CLIENT}}}")
        return events


class Gateway(Client):
    """A component that is not yet connected; `server` runs in memory or as a process, or is an address."""

    def __init__(
        self, server: MemoryServer | ProcessServer | tuple[str, int], name: str = NAME, secret: str = SECRET,
        cast: Cast | None = None,
    ) -> None:  # fmt: skip
        def dial() -> Wire:
            if isinstance(server, MemoryServer):
                return MemoryWire(server, protocol="component")
            address = server if isinstance(server, tuple) else ("127.0.0.1", server.ports["component"])
            return SocketWire(address, ssl.create_default_context())  # there will be no TLS

        super().__init__(dial, cast or (Cast() if isinstance(server, tuple) else server.cast), host=name)
        self.secret = secret

    def opens_stream(self, *, to: str | None = None, version: str | None = None, **attributes: str) -> None:
        """Send the header of XEP-0114 §3, example 1; `xmlns` may be another."""
        values = {"to": self.host if to is None else to, "version": version or "", "xmlns": COMPONENT, **attributes}
        words = "".join(f" {name.replace('_', ':')}='{value}'" for name, value in values.items() if value)
        self._reader = ComponentReader()
        self.sends_raw(f"<?xml version='1.0'?><stream:stream xmlns:stream='{STREAMS}'{words}>")

    def connects(self) -> Gateway:
        """Connect and show the secret; returns the gateway itself."""
        self.connect()
        self.opens_stream()
        self.sends_handshake(self.receives_stream_header())
        self.receives("<handshake/>")
        self.jid = self.host
        return self

    def sends_handshake(self, header: ET.Element) -> None:
        """Send the proof for the stream with this header (XEP-0114 §3, example 3)."""
        proof = hashlib.sha1((header.attrib["id"] + self.secret).encode()).hexdigest()
        self.sends(f"<handshake>{proof}</handshake>")

    def passes_barrier(self) -> None:
        """See `Client.passes_barrier`; a component says who it is and whom it asks, and an error is an answer too."""
        self._barriers += 1
        name = f"barrier-{self._barriers}"
        ping = f"<iq type='get' id='{name}' from='{self.host}' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>"
        self._connected().send(ping.encode())
        came: list[Event] = []
        while (event := self._next()).element.get("id") != name:
            came.append(event)
            if event.kind == "end":
                break
        self._inbox.extend(came)
