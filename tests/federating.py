"""Other servers, played by the test in memory: `Peer` is one stream of one of them.

    peer = internet.caller("montague.example")         it calls the server under test
    peer.negotiates()
    peer.sends("<db:result from='montague.example' to='example.org'>key</db:result>")

    peer = internet.called("montague.example")          the server under test calls it
    peer.hears_stream_header(from_="example.org", to="montague.example")
    peer.answers_stream(id="D60000229F", features="…")

What a peer says and hears is in jabber:server; patterns are written without a namespace, as
everywhere in these tests. `Internet` stands in for DNS and TCP: a domain that nobody has
added doesn't exist.
"""

from __future__ import annotations

import functools
import ssl
import time
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import xmppd
from tests.dialogue import CLIENT, PATIENCE, STREAMS, TLS, Client, StreamReader
from tests.servers import MemoryServer, MemoryTransport, MemoryWire

SERVER = "jabber:server"
DIALBACK = "jabber:server:dialback"
PING = "{urn:xmpp:ping}ping"
SECRET_ID = "D60000229F"


@functools.cache
def certificate_of(*domains: str) -> bytes:
    """Return a certificate (DER) for these domains; that it is trusted is for the transport to say."""
    request = {"machine": "test", "hosts": list(domains), "addresses": [], "authority": "", "authority_key": ""}
    pem = xmppd.make_certificates(request)["certificate"]
    return ssl.PEM_cert_to_DER_cert(pem[: pem.index("-----END CERTIFICATE-----") + 26])


class PeerWire(MemoryWire):
    """The other server's end of a connection in memory."""

    def __init__(self, server: MemoryServer, transport: MemoryTransport) -> None:
        self.loop = server.loop
        self.split = 0
        self.transport = transport


class Peer(Client):
    """One stream with the server under test, as another server sees it."""

    def __init__(self, internet: Internet, domain: str, transport: MemoryTransport) -> None:
        super().__init__(lambda: PeerWire(internet.server, transport), internet.server.cast, host="example.org")
        self.internet = internet
        self.domain = domain
        self.transport = transport
        self.hears_requests = True
        self.pings: list[ET.Element] = []  # by which the server wants to know what has arrived
        self.stream_id = ""  # that of our own header, or of the server's
        self.connect()

    # -- as the one who calls

    def opens_stream(self, *, to: str | None = None, version: str | None = "1.0", **attributes: str) -> None:
        """Send a stream header; without `from_` it is this peer's domain."""
        values = {"from": self.domain, "to": self.host if to is None else to, "version": version or "", **attributes}
        values["from"] = values.pop("from_", values["from"])
        self._reader = StreamReader()
        self._sends_header(values)

    def receives_stream_header(self) -> ET.Element:
        """Return the server's header, and note its id."""
        header = super().receives_stream_header()
        self.stream_id = header.get("id", "")
        return header

    def over_tls(self, **attributes: str) -> ET.Element:
        """Go through STARTTLS; return the features behind it."""
        self.negotiates(**attributes)
        self.starts_tls()
        return self.negotiates(**attributes)

    def starts_tls(self) -> None:
        """The answer may take the server a visit."""
        self.sends(f"<starttls xmlns='{TLS}'/>")
        self.receives(f"<proceed xmlns='{TLS}'/>")
        self._connected().start_tls(self.host)

    def is_verified(self, **attributes: str) -> Peer:
        """Go through TLS and dialback, without a look at the key; return the peer itself."""
        self.over_tls(**attributes)
        self.proves(self.domain, "example.org")
        return self

    def proves(self, sender: str, to: str) -> None:
        """Have the server believe that we are `sender`: the domain's own server confirms it."""
        self.sends(f"<db:result from='{sender}' to='{to}'>key</db:result>")
        authority = self.internet.called_or_known(sender)
        verify = authority.receives(f"<db:verify from='{to}' to='{sender}' id='*'>key</db:verify>")
        authority.sends(f"<db:verify from='{sender}' to='{to}' id='{verify.get('id')}' type='valid'/>")
        self.receives(f"<db:result from='{to}' to='{sender}' type='valid'/>")

    # -- as the one who is called

    def hears_stream_header(self, **attributes: str) -> ET.Element:
        """Check the attributes of the server's header."""
        header = super().receives_stream_header()
        for name, value in attributes.items():
            assert header.get(name.rstrip("_")) == value, f"{name}: {header.attrib}"
        return header

    def answers_stream(self, features: str = "", *, id: str = SECRET_ID, version: str = "1.0") -> None:
        """Answer with a header, and with features if there is a version."""
        self._sends_header({"from": self.domain, "to": self.host, "id": id, "version": version})
        if version:
            self.sends_raw(f"<stream:features>{features}</stream:features>")

    def accepts_tls(self) -> None:
        """Let the server begin TLS, and wait for its new header."""
        self.hears_stream_header(to=self.domain)
        self.answers_stream(f"<starttls xmlns='{TLS}'><required/></starttls>")
        self.receives(f"<starttls xmlns='{TLS}'/>")
        self.proceeds()

    def offers_tls(self) -> None:
        """Let TLS begin, whatever becomes of it."""
        self.hears_stream_header(to=self.domain)
        self.answers_stream(f"<starttls xmlns='{TLS}'><required/></starttls>")
        self.receives(f"<starttls xmlns='{TLS}'/>")
        self.sends(f"<proceed xmlns='{TLS}'/>")

    def renews_stream(self, text: str) -> None:
        """Send something behind which the server begins a new stream."""
        self._reader = StreamReader()
        self.sends(text)

    def proceeds(self) -> None:
        """Let TLS begin; what comes then is a new stream."""
        self.renews_stream(f"<proceed xmlns='{TLS}'/>")

    def accepts_all(self, features: str = "") -> Peer:
        """Play a server that offers TLS and dialback; return the peer itself."""
        self.accepts_tls()
        self.hears_stream_header(to=self.domain)
        self.answers_stream(DIALBACK_OFFER + features)
        return self

    def accepts_all_but_is_left(self) -> None:
        """Play a server whose certificate will not do: the server under test closes the stream behind TLS."""
        self.accepts_tls()
        self.hears_stream_header(to=self.domain)
        self.answers_stream(DIALBACK_OFFER)
        assert self.is_closed()

    def sends_header_and(self, text: str) -> None:
        """Answer with a header and something else than features."""
        self._sends_header({"from": self.domain, "to": self.host, "id": SECRET_ID, "version": "1.0"})
        self.sends_raw(text)

    def lets_in(self, features: str = "", *, sender: str = "example.org") -> Peer:
        """The same, and let the server prove itself by dialback."""
        self.accepts_all(features)
        self.confirms(sender)
        return self

    def confirms(self, sender: str = "example.org", to: str = "") -> None:
        """Take the server's word for a key."""
        to = to or self.domain
        self.receives(f"<db:result from='{sender}' to='{to}'>*</db:result>")
        self.sends(f"<db:result from='{to}' to='{sender}' type='valid'/>")

    # -- within

    def _sends_header(self, values: dict[str, str]) -> None:
        words = "".join(f" {name}='{value}'" for name, value in values.items() if value)
        namespaces = f"xmlns='{SERVER}' xmlns:stream='{STREAMS}' xmlns:db='{DIALBACK}'"
        self.sends_raw(f"<?xml version='1.0'?><stream:stream {namespaces}{words}>")

    def receives_nothing(self) -> None:
        """Check that nothing has come, after all that others have sent is handled."""
        self.cast.settle()
        for _ in range(3):
            self.internet.server.loop.turn(0)
        while self.transport.outgoing and self.wire is not None:
            self._take(self._connected().read(0) or b"")
        self._check(not self._inbox, "expected nothing")

    def receives_nothing_of_importance(self) -> None:
        """Let all that has come be forgotten."""
        for _ in range(3):
            self.internet.server.loop.turn(0)
        self._connected().read(0)
        self._inbox.clear()

    def _take(self, data: bytes) -> None:
        before = len(self._inbox)
        super()._take(data)
        for event in list(self._inbox)[before:]:
            for element in event.element.iter():
                element.tag = in_client_namespace(element.tag)
            if event.element.find(PING) is not None:
                self._inbox.remove(event)
                self.pings.append(event.element)


def in_client_namespace(tag: str) -> str:
    """Return how patterns name what is in jabber:server; nothing may be in jabber:client here (RFC 6120 §4.8.3)."""
    return tag.replace(f"{{{SERVER}}}", f"{{{CLIENT}}}")


DIALBACK_OFFER = "<dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback>"


class Internet:
    """DNS and TCP between the server under test and the peers that a test plays."""

    def __init__(self, server: MemoryServer) -> None:
        self.server = server
        self.federation = server.server.registry.feature(xmppd.Federation)
        self.federation.resolve = self._resolve
        self.federation.dial = self._dial
        self.federation.is_at_rest = False
        self.domains: dict[str, Sequence[xmppd.Target]] = {}
        self.refusing: set[str] = set()  # addresses where nobody listens
        self.certificates: dict[str, tuple[bytes, bool]] = {}  # by address: the certificate shown, whether it is good
        self.dialled: deque[tuple[str, MemoryTransport]] = deque()  # address, and the connection
        self.attempts: list[str] = []  # addresses, in order
        self.peers: dict[str, Peer] = {}  # those that were called last, by domain

    def add(self, domain: str, *addresses: str, certificate: bytes | None = None, good: bool = True) -> None:
        """Let there be a server of this domain, perhaps with a certificate."""
        addresses = addresses or (f"address of {domain}",)
        self.domains[domain] = [xmppd.Target(domain, 5269, False, tuple(addresses))]
        for address in addresses:
            if certificate is not None:
                self.certificates[address] = (certificate, good)

    def _resolve(self, domain: str, then: Callable[[list[xmppd.Target]], None]) -> None:
        self.server.loop.post(lambda: then(list(self.domains.get(domain, ()))))

    def _dial(self, address: str, port: int, make: Callable[[Any], xmppd.Carried], failed: Callable[[], None]) -> None:
        self.attempts.append(address)
        if address in self.refusing:
            return self.server.loop.post(failed)
        transport = MemoryTransport(self.server.loop)
        transport.certificate, transport.certificate_is_good = self.certificates.get(address, (None, True))
        transport.stream = make(transport)
        self.dialled.append((address, transport))

    def caller(self, domain: str, *, certificate: bytes | None = None, good: bool = True) -> Peer:
        """Return a peer that calls the server under test."""
        transport = MemoryTransport(self.server.loop)
        transport.certificate, transport.certificate_is_good = certificate, good
        transport.stream = xmppd.IncomingStream(self.federation, transport)
        return Peer(self, domain, transport)

    def called(self, domain: str) -> Peer:
        """Wait until the server under test calls a domain; return the one that answers."""
        give_up = time.monotonic() + PATIENCE
        while not self.dialled:
            assert time.monotonic() < give_up, f"nobody calls {domain}"
            self.server.loop.turn(0.05)
        address, transport = self.dialled.popleft()
        assert any(address in target.addresses for target in self.domains[domain]), f"{address} is called"
        self.peers[domain] = Peer(self, domain, transport)
        return self.peers[domain]

    def called_after(self, domain: str, seconds: float) -> Peer:
        """The same, once time has passed."""
        self.server.loop.turn(0)
        self.server.clock.skip(seconds)
        return self.called(domain)

    def called_or_known(self, domain: str) -> Peer:
        """Return the peer that answers for a domain: the one that was called before, or goes through TLS now."""
        known = self.peers.get(domain)
        if known is not None and known.wire is not None:
            return known
        if domain not in self.domains:
            self.add(domain)
        return self.called(domain).accepts_all()

    def is_quiet(self) -> None:
        """Check that nobody else is called."""
        for _ in range(3):
            self.server.loop.turn(0)
        assert not self.dialled, [address for address, _transport in self.dialled]
