"""A name server for tests: SRV, A and AAAA records of a zone file, over UDP on 127.0.0.1.

    with NameServer("_xmpp-server._tcp.example.net. 300 IN SRV 10 5 5269 xmpp.example.net.") as names:
        names.address  # "127.0.0.1:41873", for `[federation] nameservers`

It notes who was asked for (`asked`), and is silent about the names in `silent`, as a broken
one is. A name that it doesn't know doesn't exist.
"""

from __future__ import annotations

import contextlib
import socket
import threading

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.zonefile


class NameServer:
    """Answers for as long as the `with` lasts; `zone` is the text of a zone file, with complete names."""

    def __init__(self, zone: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []  # (name, kind), in order
        self.silent: set[str] = set()  # names about which nothing is said
        self.broken: set[str] = set()  # names for which the answer is SERVFAIL
        self.records: list[dns.rrset.RRset] = []
        self.add(zone)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self.host: str = host
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def address(self) -> str:
        """Where it is, as the configuration wants it."""
        return f"{self.host}:{self.port}"

    def add(self, zone: str) -> None:
        """Know more records."""
        self.records += dns.zonefile.read_rrsets(zone, rdclass=None)

    def __enter__(self) -> NameServer:
        """Begin to answer."""
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Answer no more."""
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", (self.host, self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            data, peer = self._socket.recvfrom(4096)
            if not data:  # the end
                return
            if answer := self._answer(dns.message.from_wire(data)):
                self._socket.sendto(answer.to_wire(), peer)

    def _answer(self, query: dns.message.Message) -> dns.message.Message | None:
        name, kind = query.question[0].name, query.question[0].rdtype
        text = name.to_text(omit_final_dot=True).lower()
        self.asked.append((text, dns.rdatatype.to_text(kind)))
        if text in self.silent:
            return None
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA | dns.flags.RA
        answer.answer = [rrset for rrset in self.records if rrset.name == name and rrset.rdtype == kind]
        if text in self.broken:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif not any(rrset.name.is_subdomain(name) for rrset in self.records):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer
