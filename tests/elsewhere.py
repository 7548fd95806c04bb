"""A domain on another server, as far as the server under test can tell.

    elsewhere = Elsewhere(server, "example.com")
    romeo.sends("<presence type='subscribe' to='juliet@example.com'/>")
    elsewhere.receives("<presence type='subscribe' from='romeo@example.org' to='juliet@example.com'/>")
    elsewhere.says("<presence type='subscribed' from='juliet@example.com' to='romeo@example.org'/>")

It takes the place of the federation: what is routed to the domain is kept, and what it says
goes the way of all stanzas that arrive. So both ends of a relation can be driven apart.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

import xmppd
from tests.dialogue import difference, parse, show
from tests.servers import MemoryServer


class Elsewhere:
    """A `Domain` (chapter 14) of the server in memory, played by the test."""

    def __init__(self, server: MemoryServer, name: str = "example.com") -> None:
        self.server = server.server
        self.name = name
        self.came: list[ET.Element] = []  # routed to this domain, not yet looked at
        self.server.domains[name] = self

    def receive(self, stanza: xmppd.Stanza, to: xmppd.JID) -> None:
        """Take what is routed here; the address is that of the stanza."""
        assert stanza.get("to") == str(to)
        self.came += xmppd.parse_elements([stanza.wire().decode()])

    def says(self, text: str) -> None:
        """Let stanzas of this domain arrive at the server."""
        for stanza in xmppd.parse_elements([text]):
            assert isinstance(stanza, xmppd.Stanza)
            self.server.emit(stanza)

    def receives(self, *patterns: str) -> None:
        """Check that exactly these stanzas have come, in this order; who sends them must have passed a barrier."""
        for expected in (stanza for pattern in patterns for stanza in parse(pattern)):
            assert self.came, f"expected:\n{show(expected)}\ngot nothing"
            actual = self.came.pop(0)
            assert not difference(expected, actual), f"expected:\n{show(expected)}\ngot:\n{show(actual)}"
        self.receives_nothing()

    def receives_nothing(self) -> None:
        """Check that there is nothing else."""
        assert not self.came, "unexpected:\n" + "\n".join(map(show, self.came))

    def forgets(self) -> None:
        """Drop what has come so far."""
        self.came.clear()
