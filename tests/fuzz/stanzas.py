"""A grammar-aware fuzzer: several people at once say what no client would, and the server stays a server.

    python -m tests.fuzz.stanzas --seconds 3600 [--seed N]

It knows all namespaces and element names of xmppd.py and the requests that the features
answer; out of them it makes stanzas that are well-formed and nearly sensible, in orders
that are not. Each round has a server and a seed of its own, which is printed, so that what
went wrong can be seen again. Promised throughout:

    every request is answered exactly once, unless its stream has ended first
    nobody receives a stanza whose `from` isn't the sender's address
    a stream ends only when there is a reason, and says it
    nothing is logged as a bug; when all have left, nothing of them is left
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import re
import resource
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

import xmppd
from tests.dialogue import Client, local_name, namespace
from tests.servers import HOSTS, PEOPLE, MemoryServer, credentials_of

MARK = "urn:xmppd:fuzz"  # each stanza carries who really sent it
UNPROVOKED = {"conflict", "reset", "not-authorized", "connection-timeout"}  # stream errors that are others' doing
SETTLE_EVERY = 40  # steps between two looks at what has not been answered
LONG = 30_000  # characters in a long text or attribute


# ---- the grammar ----------------------------------------------------------------------


def namespaces() -> dict[str, str]:
    """Return all namespaces of the server, by the names of their constants; but XML's own cannot be declared."""
    found = {name: str(value) for name, value in vars(xmppd).items() if isinstance(value, xmppd.Namespace)}
    return {name: value for name, value in found.items() if value != "http://www.w3.org/XML/1998/namespace"}


def vocabulary() -> list[str]:
    """Return all qualified names that the server's source mentions, as `{namespace}name`."""
    known = namespaces()
    calls = re.findall(r"\b([A-Z][A-Z0-9_]*)\(\"([A-Za-z][\w.-]*)\"\)", Path(xmppd.__file__).read_text())
    return sorted({f"{{{known[name]}}}{word}" for name, word in calls if name in known})


ATTRIBUTES = (
    *("jid", "to", "from", "type", "node", "name", "subscription", "ask", "id", "by", "stamp", "var", "ver", "seconds"),
    *("xml:lang", "mechanism", "code", "max", "xmlns:y", "category", "affiliation", "role", "nick", "action"),
)
WORDS = (
    *("", "0", "1", "-1", "127", "-129", "99999999999999999999", "true", "get", "set", "result", "error", "remove"),
    *("both", "to", "from", "none", "subscribe", "unavailable", "submit", "PLAIN", "SCRAM-SHA-256", "zlib", "zh-Hant"),
    *("2026-11-22T14:00:00Z", "1969-07-21T02:56:15-25:00", "AGE=", "====", "n,,n=romeo,r=x", "http://jabber.org/protocol/disco#info"),
    *("O", "\u202e\u0000\ufffe".replace("\0", "").replace("\ufffe", ""), "\U0001f339", "ß", "e\u0301" * 40, " ", "\r\n\t", "]]>", "<&>'\"", "&amp;"),
    *("..", "/", "con", "a" * 1024, "\u05d0\u05d1"),
)
NODES = (
    *("urn:xmpp:avatar:data", "urn:xmpp:avatar:metadata", "urn:xmpp:bookmarks:1", "http://jabber.org/protocol/nick", "node"),
    *("eu.siacs.conversations.axolotl.devicelist", "urn:xmpp:omemo:2:bundles", "storage:bookmarks", "urn:xmpp:vcard4"),
)
PUBLISH_OPTIONS = "http://jabber.org/protocol/pubsub#publish-options"
NODE_CONFIG = "http://jabber.org/protocol/pubsub#node_config"
NODE_AFFILIATIONS = ("owner", "publisher", "member", "outcast", "none")
NODE_FIELDS = tuple(
    f"pubsub#{name}" for name in ("access_model", "max_items", "persist_items", "send_last_published_item", "notify_retract", "title",
                                  "roster_groups_allowed", "publish_model", "item_expire", "notification_type", "deliver_payloads")
)  # fmt: skip
ROOM_FIELDS = tuple(
    f"muc#roomconfig_{name}" for name in ("roomname", "roomdesc", "persistentroom", "publicroom", "moderatedroom", "membersonly", "whois",
                                          "passwordprotectedroom", "roomsecret", "maxusers", "allowinvites", "changesubject", "lang",
                                          "roomadmins", "roomowners", "enablelogging", "maxhistoryfetch", "allowpm")
)  # fmt: skip
FORM_VALUES = (
    *("0", "1", "true", "false", "open", "presence", "roster", "whitelist", "authorize", "max", "never", "on_sub", "moderators"),
    *("anyone", "participants", "none", "on_sub_and_presence", "publishers", "subscribers", "headline"),
)
MESSAGE_TYPES = ("chat", "normal", "groupchat", "headline", "error", "", "nonsense")
PRESENCE_TYPES = (
    *("", "", "unavailable", "subscribe", "subscribed", "unsubscribe", "unsubscribed", "probe", "error", "invisible"),
)
IQ_TYPES = ("get", "set", "get", "set", "result", "error", "", "nonsense")
BREAKING = (  # what ends a stream
    "<a></b>",
    "<message to='romeo@example.org'><!-- --></message>",
    "<?xml-stylesheet href='x'?>",
    "<!DOCTYPE a [<!ENTITY b 'c'>]>",
    "<message><body>&lol;</body></message>",
    "<message><body>\x01</body></message>",
    "text between stanzas <presence/>",
    "<stream:features/>",
    "<stream:stream xmlns='jabber:client' to='example.org' version='1.0'></stream:stream>",
    "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>AGEAYg==</auth>",
    "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
    "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
    "<message from='juliet@example.org/forged' to='romeo@example.org'/>",
    "<iq type='get' from='example.org' id='1' to='romeo@example.org'><ping xmlns='urn:xmpp:ping'/></iq>",
    "<presence from='@@'/>",
    "<message xmlns='jabber:server'/>",
    "<x:message/>",
    "<message><a" + "".join(f" a{number}=''" for number in range(65)) + "/></message>",
    "<message>" + "<a>" * 70 + "</a>" * 70 + "</message>",
    "<message>" + "<a/>" * 10_001 + "</message>",
    "<message><body>" + "a" * 263_000 + "</body></message>",
    f"<message id='{'a' * 263_000}'/>",
    f"<{'a' * 2000}/>",
    "</stream:stream><message to='romeo@example.org'><body>too late</body></message>",
)
MANAGING = (  # stream management, copies, client state: some of it ends a stream
    "<enable xmlns='urn:xmpp:sm:3' resume='true'/>",
    "<enable xmlns='urn:xmpp:sm:3' resume='true' max='100'/>",
    "<enable xmlns='urn:xmpp:sm:3'/>",
    "<r xmlns='urn:xmpp:sm:3'/>",
    "<a xmlns='urn:xmpp:sm:3' h='0'/>",
    "<a xmlns='urn:xmpp:sm:3' h='3'/>",
    "<a xmlns='urn:xmpp:sm:3' h='x'/>",
    "<resume xmlns='urn:xmpp:sm:3' previd='x' h='0'/>",
    "<inactive xmlns='urn:xmpp:csi:0'/>",
    "<active xmlns='urn:xmpp:csi:0'/>",
    "<iq type='set' id='carbons'><enable xmlns='urn:xmpp:carbons:2'/></iq>",
)
NEGOTIATION = (  # for who has not logged in
    "<enable xmlns='urn:xmpp:sm:3'/><resume xmlns='urn:xmpp:sm:3' previd='{word}' h='1'/>",
    "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/><iq type='set' id='1'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
    "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='{word}'>{word}</auth>",
    "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>AHJvbWVvAHdyb25n</auth>",
    "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='SCRAM-SHA-256'>bixjPXJvbWVvLHI9eA==</auth>",
    "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='SCRAM-SHA-1'>bixuPXJvbWVvLHI9eA==</auth><response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>Yz1iaXdzLHI9eA==</response>",
    "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{word}</response>",
    "<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
    "<iq type='set' id='1'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>{word}</resource></bind></iq>",
    "<iq type='set' id='1'><query xmlns='jabber:iq:auth'><username>romeo</username><password>{word}</password><resource>x</resource></query></iq>",
    "<iq type='get' id='1'><query xmlns='jabber:iq:auth'/></iq>",
    "<iq type='get' id='1'><query xmlns='jabber:iq:register'/></iq>",
    "<iq type='set' id='1'><query xmlns='jabber:iq:register'><username>{word}</username><password>{word}</password></query></iq>",
    "<compress xmlns='http://jabber.org/protocol/compress'><method>zlib</method></compress>",
    "<presence/>",
    "<message to='romeo@example.org'><body>hello</body></message>",
    " \n",
    "x<",
    "</stream:stream>",
)
HEADERS = (
    "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='example.org' version='1.0'>",
    "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='example.net' from='a@b' xml:lang='de'>",
    "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='elsewhere.example' version='1.0'>",
    "<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' to='example.org' version='1.0'>",
    "GET / HTTP/1.1\r\n\r\n",
)


class Said(NamedTuple):
    """Something to send: its text, and the request that it is, if any (id and `to`)."""

    text: str
    request: str = ""
    to: str | None = None


class Grammar:
    """Makes stanzas by chance, for the features and the domains of a server."""

    def __init__(self, chance: random.Random, server: xmppd.Server) -> None:
        self.chance = chance
        self.requests = [xmppd.IqKey(*key) for key in server.registry.iqs]  # under which the features answer
        self.services = sorted(server.domains.keys() - set(HOSTS))  # domains of rooms and the like
        self.names = vocabulary()
        self.spaces = sorted(set(namespaces().values()))
        self._ids = 0

    def word(self) -> str:
        """A value that means something somewhere."""
        if self.chance.random() < 0.01:
            return "x" * LONG
        return self.chance.choice((*WORDS, self.address(), self.chance.choice(self.spaces)))

    def address(self) -> str:
        """An address: somebody's, nobody's, the server's, another server's, or none at all."""
        if self.services and self.chance.random() < 0.25:
            return self.chance.choice(("hall@", "cave@", "")) + self.chance.choice(self.services) + self.chance.choice(("", "/a", "/b"))
        local = self.chance.choice((*PEOPLE, *PEOPLE, "nobody", "ROMEO", "", "a b", "x" * 1024, "\u00ad"))
        domain = self.chance.choice((*HOSTS, HOSTS[0], HOSTS[0], HOSTS[0], "elsewhere.example", "[::1]", "", "-"))
        tail = self.chance.choice(("", "", "/a", "/b", "/", "/a/b@c", "/\U0001f339"))
        return f"{local}@{domain}{tail}" if local else domain + tail

    def attributes(self) -> str:
        """Up to four attributes, once in a while very many."""
        amount = self.chance.choice((0, 0, 1, 1, 2, 4)) if self.chance.random() > 0.01 else 60
        chosen = {self.chance.choice(ATTRIBUTES) if amount < 9 else f"a{number}" for number in range(amount)}
        return "".join(f" {name}={attribute(self.word() or 'urn:y')}" for name in sorted(chosen) if name != "xmlns")

    def element(self, levels: int = 3, tag: str = "") -> str:
        """An element of the vocabulary with anything inside."""
        tag = tag or self.chance.choice(self.names)
        own, name = namespace(tag), local_name(tag)
        if own == "http://etherx.jabber.org/streams":
            own = MARK
        inside = "" if levels == 0 else self.content(levels - 1, own)
        return f"<{name} xmlns={attribute(own)}{self.attributes()}>{inside}</{name}>"

    def content(self, levels: int, around: str) -> str:
        """What stands inside an element: text, or elements, most of its own namespace."""
        if self.chance.random() < 0.4:
            return escape(self.word())
        kin = [name for name in self.names if namespace(name) == around] or self.names
        amount = self.chance.choice((0, 1, 1, 2, 3))
        return "".join(
            self.element(levels, self.chance.choice(kin if self.chance.random() < 0.8 else self.names)) for _ in range(amount)
        )

    def forgery(self) -> str:
        """A claim that only the server may make (threats S43, S44)."""
        kind = self.chance.choice(("delay xmlns='urn:xmpp:delay' from=", "stanza-id xmlns='urn:xmpp:sid:0' id='1' by="))
        claimed = self.chance.choice((HOSTS[0], HOSTS[0], f"{self.chance.choice(PEOPLE)}@{HOSTS[0]}", self.address()))
        return f"<{kind}{attribute(claimed)} stamp='2026-11-22T14:00:00Z' forged='1'/>"

    def stanza(self, sender: str) -> Said:
        """A message, presence or iq as `sender` might hand it in."""
        said = self.chance.choice((self.message, self.presence, self.iq, self.iq))(sender)
        if len(said.text.encode()) > xmppd.MAX_STANZA - LONG:
            return self.stanza(sender)  # several long values have met; that ends a stream, see BREAKING
        if self.chance.random() > 0.2:
            return said
        honest = self.chance.choice((sender, sender.partition("/")[0]))  # as clients may say it, and the server completes it
        return said._replace(text=re.sub(r"^<(\w+)", lambda tag: f"{tag.group()} from={attribute(honest)}", said.text))

    def message(self, sender: str) -> Said:
        """RFC 6121 §5."""
        parts = [mark(sender)]
        for choice in ("body", "subject", "thread", "body"):
            if self.chance.random() < 0.5:
                parts.append(f"<{choice}>{escape(self.word())}</{choice}>")
        parts += [self.element() for _ in range(self.chance.choice((0, 0, 1, 2)))]
        if self.chance.random() < 0.3:
            parts.append(self.forgery())
        if self.chance.random() < 0.2:
            parts.append(f"<{self.chance.choice(('no-store', 'store', 'no-copy'))} xmlns='urn:xmpp:hints'/>")
        self.chance.shuffle(parts)
        return Said(self.tag("message", self.chance.choice(MESSAGE_TYPES), self.to(), f"m{self.number()}", "".join(parts)))

    def presence(self, sender: str) -> Said:
        """RFC 6121 §3 and §4."""
        kind = self.chance.choice(PRESENCE_TYPES)
        parts = [mark(sender)]
        if self.chance.random() < 0.4:
            parts.append(f"<priority>{escape(self.chance.choice(('0', '5', '-1', '127', '128', '', '+3', 'x')))}</priority>")
        if self.chance.random() < 0.4:
            parts.append(f"<status>{escape(self.word())}</status><show>{self.chance.choice(('away', 'xa', 'lunch'))}</show>")
        if self.chance.random() < 0.2:
            parts += [self.element(), self.forgery()]
        to = None if not kind or self.chance.random() < 0.1 else self.to()
        if self.services and self.chance.random() < 0.2:
            kind, to = "", self.address()
            parts.append("<x xmlns='http://jabber.org/protocol/muc'/>")
        return Said(self.tag("presence", kind, to, self.chance.choice(("", "p1")), "".join(parts)))

    def iq(self, sender: str) -> Said:
        """RFC 6120 §8.2.3; most of them requests that somebody answers."""
        kind, to = self.chance.choice(IQ_TYPES), self.to()
        tag = ""
        if self.chance.random() < 0.6:
            key = self.chance.choice(self.requests)
            kind, tag = key.type, key.payload
            to = self.place(key.place)
        payload = self.payload(tag).replace(" xmlns=", f" fuzz-by={attribute(sender)} xmlns=", 1)
        amount = self.chance.choice((1, 1, 1, 1, 1, 1, 0, 2))
        if kind not in ("get", "set"):
            return Said(self.tag("iq", kind, to, f"r{self.number()}", payload))
        id = f"q{self.number()}" + self.chance.choice(("", "", "", "&<'\"\n é"))
        return Said(self.tag("iq", kind, to, id, payload * amount), id, to)

    def place(self, name: str) -> str | None:
        """An address at which requests for a place of `xmppd.PLACES` arrive."""
        service = self.chance.choice(self.services or HOSTS)
        known = {"self": None, "stream": None, "server": HOSTS[0], "account": f"{self.chance.choice(PEOPLE)}@{HOSTS[0]}",
                 "rooms": service, "room": f"{self.chance.choice(('hall', 'cave'))}@{service}"}  # fmt: skip
        return known[name] if name in known else self.address()

    def payload(self, tag: str) -> str:
        """What a request asks; the well-known ones nearly as they should be."""
        maker = {
            "{jabber:iq:roster}query": self.roster,
            "{jabber:iq:private}query": self.private,
            "{jabber:iq:register}query": self.register,
            "{jabber:iq:privacy}query": self.privacy,
            "{urn:xmpp:blocking}block": lambda: self.blocking("block"),
            "{urn:xmpp:blocking}unblock": lambda: self.blocking("unblock"),
            "{http://jabber.org/protocol/pubsub}pubsub": self.pubsub,
            "{http://jabber.org/protocol/pubsub#owner}pubsub": self.pubsub_owner,
            "{http://jabber.org/protocol/muc#admin}query": self.muc_admin,
            "{http://jabber.org/protocol/muc#owner}query": self.muc_owner,
        }.get(tag)
        return maker() if maker and self.chance.random() < 0.8 else self.element(tag=tag)

    def roster(self) -> str:
        """RFC 6121 §2."""
        groups = "".join(f"<group>{escape(self.word())}</group>" for _ in range(self.chance.choice((0, 1, 2))))
        gone = self.chance.choice(("", "", " subscription='remove'", " subscription='both'"))
        item = f"<item jid={attribute(self.address())} name={attribute(self.word())}{gone}>{groups}</item>"
        return f"<query xmlns='jabber:iq:roster'>{item * self.chance.choice((0, 1, 1, 1, 2))}</query>"

    def private(self) -> str:
        """XEP-0049."""
        return f"<query xmlns='jabber:iq:private'>{self.element()}</query>"

    def register(self) -> str:
        """XEP-0077; who does away with an account gets a new one at the next login."""
        if self.chance.random() < 0.1:
            return "<query xmlns='jabber:iq:register'><remove/></query>"
        name, password = self.chance.choice((*PEOPLE, self.word())), self.chance.choice(("new password", self.word()))
        return f"<query xmlns='jabber:iq:register'><username>{escape(name)}</username><password>{escape(password)}</password></query>"

    def privacy(self) -> str:
        """XEP-0016."""
        name = f" name={attribute(self.chance.choice(('one', 'two', 'three', self.word())))}" * (self.chance.random() < 0.8)
        wish = self.chance.choice(("list", "list", "active", "default"))
        items = "".join(
            f"<item action='{self.chance.choice(('allow', 'deny', 'deny'))}' order='{order}'{self.privacy_test()}>"
            f"{self.chance.choice(('', '', '<message/>', '<iq/>', '<presence-in/><presence-out/>'))}</item>"
            for order in range(self.chance.choice((0, 1, 1, 3)) if wish == "list" else 0)
        )
        return f"<query xmlns='jabber:iq:privacy'><{wish}{name}>{items}</{wish}></query>"

    def privacy_test(self) -> str:
        """Whom a privacy item is about."""
        kind = self.chance.choice(("", "jid", "jid", "group", "subscription"))
        value = {"jid": self.address, "group": self.word}.get(kind, lambda: self.chance.choice(("both", "to", "from", "none")))()
        return f" type='{kind}' value={attribute(value)}" if kind else ""

    def blocking(self, wish: str) -> str:
        """XEP-0191."""
        items = "".join(f"<item jid={attribute(self.address())}/>" for _ in range(self.chance.choice((0, 1, 1, 2))))
        return f"<{wish} xmlns='urn:xmpp:blocking'>{items}</{wish}>"

    def node(self) -> str:
        """A node's name as an attribute."""
        return f" node={attribute(self.chance.choice((*NODES, *NODES, self.word())))}"

    def form(self, kind: str, fields: Sequence[str]) -> str:
        """XEP-0004, of what a node or a room may be told."""
        inside = "".join(
            f"<field var={attribute(field)}><value>{escape(self.chance.choice((*FORM_VALUES, self.word())))}</value></field>"
            for field in self.chance.sample(fields, self.chance.randrange(4))
        )
        return (
            f"<x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE' type='hidden'><value>{kind}</value></field>{inside}</x>"
        )

    def pubsub(self) -> str:
        """XEP-0060 §5 to §7, as everybody may ask."""
        node, jid = self.node(), attribute(self.address())
        item = f"<item id={attribute(self.chance.choice(('current', '1', self.word())))}>{self.element(2)}</item>"
        options = f"<publish-options>{self.form(PUBLISH_OPTIONS, NODE_FIELDS)}</publish-options>" * (self.chance.random() < 0.4)
        wish = self.chance.choice((
            *(f"<publish{node}>{item}</publish>{options}", f"<publish{node}>{item}</publish>{options}", f"<items{node}/>"),
            *(f"<items{node} max_items='1'/>", f"<retract{node} notify='true'><item id='1'/></retract>", f"<create{node}/>"),
            *(f"<subscribe{node} jid={jid}/>", f"<unsubscribe{node} jid={jid}/>", "<subscriptions/>", "<affiliations/>"),
            f"<create{node}/><configure>{self.form(NODE_CONFIG, NODE_FIELDS)}</configure>",
        ))  # fmt: skip
        return f"<pubsub xmlns='http://jabber.org/protocol/pubsub'>{wish}</pubsub>"

    def pubsub_owner(self) -> str:
        """XEP-0060 §8."""
        node, jid = self.node(), attribute(self.address())
        wish = self.chance.choice((
            *(f"<delete{node}/>", f"<purge{node}/>", f"<configure{node}/>", "<default/>", f"<subscriptions{node}/>"),
            f"<configure{node}>{self.form(NODE_CONFIG, NODE_FIELDS)}</configure>",
            f"<affiliations{node}><affiliation jid={jid} affiliation='{self.chance.choice(NODE_AFFILIATIONS)}'/></affiliations>",
            f"<subscriptions{node}><subscription jid={jid} subscription='{self.chance.choice(('subscribed', 'none'))}'/></subscriptions>",
        ))  # fmt: skip
        return f"<pubsub xmlns='http://jabber.org/protocol/pubsub#owner'>{wish}</pubsub>"

    def muc_admin(self) -> str:
        """XEP-0045 §8 and §9."""
        whom = self.chance.choice((f"jid={attribute(self.address())}", f"nick={attribute(self.chance.choice(('a', 'b', self.word())))}"))
        power = self.chance.choice((
            *("affiliation='outcast'", "affiliation='none'", "affiliation='member'", "affiliation='admin'", "affiliation='owner'"),
            *("role='none'", "role='visitor'", "role='participant'", "role='moderator'"),
        ))  # fmt: skip
        items = f"<item {whom} {power}><reason>{escape(self.word())}</reason></item>" if self.chance.random() < 0.8 else f"<item {power}/>"
        return f"<query xmlns='http://jabber.org/protocol/muc#admin'>{items * self.chance.choice((1, 1, 2))}</query>"

    def muc_owner(self) -> str:
        """XEP-0045 §10."""
        destroy = f"<destroy jid={attribute(self.address())}><reason>{escape(self.word())}</reason></destroy>"
        config = self.form("http://jabber.org/protocol/muc#roomconfig", ROOM_FIELDS)
        wish = self.chance.choice(("", config, config, config, destroy if self.chance.random() < 0.3 else ""))
        return f"<query xmlns='http://jabber.org/protocol/muc#owner'>{wish}</query>"

    def to(self) -> str | None:
        """An address or none."""
        return self.chance.choice((None, self.address(), self.address(), self.address()))

    def number(self) -> int:
        """A number that was never used before."""
        self._ids += 1
        return self._ids

    @staticmethod
    def tag(name: str, kind: str, to: str | None, id: str, content: str) -> str:
        """Write a stanza."""
        values = {"type": kind or None, "to": to, "id": id or None}
        words = "".join(f" {key}={attribute(value)}" for key, value in values.items() if value is not None)
        return f"<{name}{words}>{content}</{name}>"

    def negotiation(self) -> str:
        """What a stranger says."""
        header = self.chance.choice((HEADERS[0], *HEADERS)).replace("version='1.0'", self.chance.choice(("version='1.0'", "version='0.9'", "version='1.0'")))
        steps = self.chance.choices(NEGOTIATION, k=self.chance.randrange(6))
        return header + "".join(step.replace("{word}", escape(self.word(), {"'": "&apos;"})) for step in steps)


def attribute(value: str) -> str:
    """Quote an attribute's value; white space survives."""
    return quoteattr(value)


def mark(sender: str) -> str:
    """The child that says who really sent a stanza."""
    return f"<mark xmlns='{MARK}' by={attribute(sender)}/>"


# ---- the people -----------------------------------------------------------------------


class Player:
    """One client: says what the grammar makes, and answers requests that reach it, as a decent client does."""

    def __init__(self, play: Play, name: str, resource: str) -> None:
        self.play = play
        self.name = name
        self.resource = resource
        self.client: Client = play.server.client()
        self.full = ""  # while there is a session
        self.asked: Counter[str] = Counter()  # requests without an answer, by id
        self.lost: Counter[str] = Counter()  # requests to a session that has ended: perhaps it has answered
        self.addressee: dict[str, str | None] = {}  # of the requests of this session
        self.written_to: set[str] = set()  # whoever this session has said something to: may send errors
        self.provoking = False  # said something for which the stream may end

    def log_in(self) -> None:
        """Begin a session, whatever has become of the account."""
        owner = xmppd.JID(self.name, HOSTS[0], "")
        server = self.play.server.server
        if owner in server.accounts:
            server.accounts[owner] = {**server.accounts[owner], "credentials": dict(credentials_of(self.name))}
        else:
            server.create_account(owner, credentials_of(self.name))
        for other in self.play.players:
            if other.full == f"{owner}/{self.resource}":  # its stream ends with a conflict
                other.collect()
        self.client.login(self.name, resource=self.resource)
        self.full = self.client.jid
        self.play.alive.add(self.full)

    def leave(self) -> None:
        """Forget the session, however it ended."""
        self.client.disconnects()
        self.client.forgets_unread()
        self.play.ended(self.full)
        self.full = ""
        self.forget()
        self.written_to.clear()
        self.provoking = False

    def forget(self) -> None:
        """Nobody waits any more for answers."""
        self.asked.clear()
        self.lost.clear()
        self.addressee.clear()

    def says(self, said: list[Said], cut: int) -> None:
        """Send stanzas as one piece of text, or in two."""
        for one in said:
            if one.request:
                self.asked[one.request] += 1
                self.addressee[one.request] = one.to
        text = "".join(one.text for one in said).encode()
        self.written_to.update(re.findall(r' to="([^"]*)"', text.decode()))
        cut %= len(text) + 1
        for piece in (text[:cut], text[cut:]):
            if piece:
                self.client.sends_raw(piece)

    def collect(self) -> None:
        """Read what has come, check and answer it; find out whether the stream has ended."""
        if not self.full:
            return
        self.client.passes_barrier()
        came = self.client.unread()
        self.client.forgets_unread()
        for element in came:
            if element.tag == "{http://etherx.jabber.org/streams}error":
                self.check_end(element)
            elif element.tag == "end-of-connection":
                return self.leave()
            elif namespace(element.tag) == "jabber:client":
                self.hear(element)

    def check_end(self, error: ET.Element) -> None:
        """The stream ends: only for a reason."""
        condition = local_name(error[0].tag)
        assert condition in xmppd.STREAM_CONDITIONS and condition != "internal-server-error", condition
        assert self.provoking or condition in UNPROVOKED, f"{self.full}: unprovoked {condition}\n{self.transcript()}"

    def transcript(self) -> str:
        """The last lines of the conversation."""
        return "\n".join(line[:1500] for line in self.client.transcript)

    def hear(self, stanza: ET.Element) -> None:
        """Check who a stanza says it is from, count answers, answer requests."""
        self.check_sender(stanza)
        if local_name(stanza.tag) != "iq":
            return
        kind, id = stanza.get("type"), stanza.get("id", "")
        if kind in ("result", "error"):
            self.check_answer(stanza, id)
        elif stanza.get("from") and self.play.chance.random() < 0.9:
            self.answer(stanza)

    def answer(self, request: ET.Element) -> None:
        """Answer a request, as a result or an error."""
        kind = self.play.chance.choice(("result", "error"))
        content = "<error type='cancel'><item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>" * (kind == "error")
        self.play.answered.add((request.get("from", ""), request.get("id", "")))
        self.written_to.add(request.get("from", ""))
        self.client.sends_raw(Grammar.tag("iq", kind, request.get("from"), request.get("id", ""), content))

    def check_answer(self, stanza: ET.Element, id: str) -> None:
        """An answer comes once, from whoever was asked."""
        if id not in self.addressee:
            return  # to nothing of ours: somebody has invented it, which is allowed
        to, sender = self.addressee[id], stanza.get("from")
        from_whom = sender == to or (to and sender and same_address(to, sender))
        if not from_whom and (to is not None or sender not in (None, self.full, self.client.bare, HOSTS[0])):
            return  # as above
        self.asked[id] -= 1
        if self.asked[id] < 0 and to and any(same_address(to, full) for full in self.play.managed):
            self.asked[id] = 0  # it had answered, and then its session died before it acknowledged (XEP-0198 §4)
        assert self.asked[id] + self.lost[id] >= 0, f"{self.full}: {id!r} was answered twice\n{self.transcript()}"

    def check_sender(self, stanza: ET.Element) -> None:
        """The `from` is that of the one who sent it (threats S40, S43, S44)."""
        sender = stanza.get("from")
        child = stanza.find(f"{{{MARK}}}mark")
        by = child.get("by") if child is not None else next((one.get("fuzz-by") for one in stanza if one.get("fuzz-by")), None)
        is_answer = stanza.get("id", "") in self.addressee and stanza.get("type") == "result"  # perhaps with what was stored
        if by is not None and stanza.get("type") != "error" and not is_answer:
            self.check_marked(stanza, sender or "", by)
        elif sender is not None:
            ours = sender.partition("/")[0] in (self.client.bare, *HOSTS, *(f"{name}@{HOSTS[0]}" for name in PEOPLE))
            service = self.is_service(sender)
            known = ours or service or self.has_written_to(sender)
            assert known, f"{self.full} got {ET.tostring(stanza)!r}\n{self.transcript()}"
            assert service or local_name(stanza.tag) != "message" or self.may_be_made(stanza, sender), ET.tostring(stanza)
        else:
            assert local_name(stanza.tag) == "iq" or stanza.get("type") == "error", ET.tostring(stanza)

    def check_marked(self, stanza: ET.Element, sender: str, by: str) -> None:
        """What somebody wrote comes from that session, or, for subscriptions, from its account."""
        from_account = stanza.get("type") in ("subscribe", "subscribed", "unsubscribe", "unsubscribed")
        honest = sender == (by.partition("/")[0] if from_account else by)
        honest = honest or self.is_service(sender)  # rooms have addresses of their own
        assert honest, f"{self.full}: from {by}, it says {sender}: {ET.tostring(stanza)!r}"
        if local_name(stanza.tag) == "presence" and sender.partition("/")[0] == self.client.bare:
            return  # our own siblings may believe us
        for forged in stanza:
            if forged.get("forged") and stanza.get("type") != "error":
                claimed = forged.get("from") or forged.get("by") or ""
                good = not same_address(claimed, self.client.bare) and not same_address(claimed, HOSTS[0])
                assert good, f"{self.full}: a forged {forged.tag} of {claimed}"

    def may_be_made(self, message: ET.Element, sender: str) -> bool:
        """Whether the server itself may have made a message: an error, a copy of our own, news of somebody's node."""
        is_event = any(child.tag == "{http://jabber.org/protocol/pubsub#event}event" for child in message)
        return message.get("type") == "error" or sender in (self.client.bare, *HOSTS) or is_event

    def is_service(self, sender: str) -> bool:
        """Whether an address is that of a room or of a domain of rooms."""
        return sender.partition("/")[0].rpartition("@")[2] in self.play.grammar.services

    def has_written_to(self, sender: str) -> bool:
        """Whether an error from there can be an answer to us."""
        texts = self.written_to | {to for to in self.addressee.values() if to}
        return sender in texts or any(same_address(sender, text) or same_address(sender, text.partition("/")[0]) for text in texts)


def same_address(one: str, other: str) -> bool:
    """Whether two texts mean the same address."""
    try:
        return xmppd.JID.parse(one) == xmppd.JID.parse(other)
    except xmppd.StanzaError:
        return False


# ---- the play -------------------------------------------------------------------------


class Play:
    """One round: a server, its people, and chance, which decides who does what."""

    def __init__(self, server: MemoryServer, seed: int) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self.grammar = Grammar(self.chance, server.server)
        self.answered: set[tuple[str, str]] = set()  # (asker, id) of requests that a player has answered
        self.alive: set[str] = set()  # full JIDs
        self.managed: set[str] = set()  # full JIDs that have once enabled stream management
        self.standing = len(server.loop._timers)  # timers that are there for as long as the server runs
        self.ahead = 0.0  # seconds that our clock is ahead of the real one
        server.loop.now = lambda: time.monotonic() + self.ahead
        self.players: list[Player] = []
        for name, place in [(name, place) for name in PEOPLE[:3] for place in "ab"] + [("romeo", "a")]:
            self.players.append(Player(self, name, place))
        self.stranger = server.client()
        self.counts: Counter[str] = Counter()  # of what was done

    ACTIONS: tuple[tuple[str, int], ...] = (
        ("talk", 160), ("manage", 12), ("stop", 8), ("break_", 10), ("vanish", 4), ("close", 3), ("intrude", 8), ("wait", 3),
    )  # fmt: skip

    def step(self) -> None:
        """Let somebody do something."""
        names, weights = zip(*self.ACTIONS, strict=True)
        action = self.chance.choices(names, weights)[0]
        player = self.chance.choice(self.players)
        self.counts[action] += 1
        if not player.full:
            player.log_in()
        getattr(self, action)(player)
        self.counts["steps"] += 1
        if self.counts["steps"] % SETTLE_EVERY == 0:
            self.settle()

    def talk(self, player: Player) -> None:
        """Say some stanzas at once, and look at what comes."""
        said = [self.grammar.stanza(player.full) for _ in range(self.chance.choice((1, 1, 2, 5)))]
        self.counts["stanzas"] += len(said)
        player.says(said, self.chance.randrange(100_000))
        player.collect()

    def manage(self, player: Player) -> None:
        """Have the server count, copy or hold back, or count wrong."""
        player.provoking = True
        self.managed.add(player.full)
        player.client.sends_raw(self.chance.choice(MANAGING))
        player.collect()

    def break_(self, player: Player) -> None:
        """Say something for which the stream ends; what was said before still counts."""
        player.provoking = True
        said = [self.grammar.stanza(player.full), Said(self.chance.choice(BREAKING))]
        player.says(said, self.chance.randrange(100_000))
        player.collect()
        assert not player.full, f"the stream goes on after {said[-1].text[:300]}"

    def stop(self, player: Player) -> None:
        """Hang up in the middle of a word."""
        text = "".join(self.grammar.stanza(player.full).text for _ in range(2)).encode()
        player.client.sends_raw(text[: self.chance.randrange(len(text))])
        player.leave()

    def vanish(self, player: Player) -> None:
        """Hang up with much to read, and something said that looks like text between stanzas."""
        for _ in range(5):
            player.client.sends_raw(self.grammar.stanza(player.full).text)
        player.client.sends_raw(self.chance.choice(("", "x<", " <", "<message><body>x<", "<a", "x")))
        player.leave()

    def close(self, player: Player) -> None:
        """Log out as it should be, now and then right behind a request."""
        player.client.sends_raw(self.grammar.stanza(player.full).text)
        player.client.closes()
        player.leave()

    def intrude(self, player: Player) -> None:
        """A stranger says what they like; the same workers serve them that serve us."""
        self.stranger.connect()
        self.stranger.sends_raw(self.grammar.negotiation())
        assert self.stranger.wire is not None
        for _ in range(self.chance.randrange(3)):
            self.stranger.wire.read(0)
        self.stranger.disconnects()

    def wait(self, player: Player) -> None:
        """Time passes: silent clients are asked, or were silent for too long."""
        self.ahead += self.chance.choice((1, 61, 301, 400))
        self.server.loop.turn(0)

    def ended(self, full: str) -> None:
        """A session is gone, and with it perhaps requests and answers that it has not read."""
        self.alive.discard(full)
        for player in self.players:
            for id, to in player.addressee.items():
                if to and full and same_address(to, full) and player.asked[id] > 0:
                    player.lost[id] += player.asked[id]
                    player.asked[id] = 0

    def settle(self) -> None:
        """All read and answer; then every request must have been answered."""
        for _ in range(3):
            for player in self.players:
                player.collect()
        for player in self.players:
            for id, amount in player.asked.items():
                passed_on = self.was_passed_on(player.addressee[id])
                if amount > 0 and not (passed_on and (player.full, id) not in self.answered):
                    raise AssertionError(f"{player.full}: no answer to {id!r}, to {player.addressee[id]!r}\n{player.transcript()}")
            player.forget()
        self.answered.clear()
        self.server.check_log()

    def was_passed_on(self, to: str | None) -> bool:
        """Whether a request to this address goes to another client, who may choose not to answer."""
        try:
            return to is not None and bool(xmppd.JID.parse(to).local and xmppd.JID.parse(to).resource)
        except xmppd.StanzaError:
            return False

    def timers_are_due(self) -> bool:
        """Whether a timer's moment has come: the loop takes only so many of them in a turn."""
        loop = self.server.loop
        return bool(loop._timers) and loop._timers[0][0] <= loop.now()

    def end(self) -> None:
        """Everybody leaves, and time passes until every timeout is over."""
        self.settle()
        for player in self.players:
            if player.full:
                player.leave()
        for _ in range(20):  # some things are tried again, after a while
            self.ahead += 3600
            self.come_to_rest()
            if not self.server.server._questions:
                break

    def come_to_rest(self) -> None:
        """Run turns until nothing is left to do now."""
        loop, done = self.server.loop, list[int]()
        loop.offload(len, "", then=done.append)  # behind what the workers still have to do for strangers
        give_up = time.monotonic() + 10
        while not done or loop._posted or loop._last_in_turn or self.timers_are_due():
            loop.turn(0.01)
            assert time.monotonic() < give_up, "the loop does not come to rest"


LEFT_BEHIND: tuple[type[Any], ...] = (xmppd.Session, xmppd.ClientStream, xmppd.StreamParser)


def left_behind(server: MemoryServer, standing_timers: int) -> dict[str, int]:
    """Return what is still there of people who have left; all numbers should be 0."""
    gc.collect()
    there = server.server
    found = Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, LEFT_BEHIND))
    return {
        **{kind.__name__: found[kind.__name__] for kind in LEFT_BEHIND},
        "streams": len(there.streams),
        "sessions": len(list(there.all_sessions())),
        "questions": len(there._questions),
        "timers": len(server.loop._timers) - standing_timers,
        "last in turn": len(server.loop._last_in_turn),
    }


def check_bounds(server: MemoryServer) -> None:
    """Check what is kept for speed, or against guessers, and has a bound."""
    assert xmppd.ADDRESSES.bytes <= xmppd.ADDRESSES.limit
    for value in vars(server.server.guard).values():
        assert not hasattr(value, "__len__") or len(value) <= 10_000
    for name, value in vars(xmppd).items():
        assert not hasattr(value, "cache_info") or value.cache_parameters()["maxsize"] is not None, f"{name} grows for ever"


@contextlib.contextmanager
def a_play(folder: Path, seed: int) -> Iterator[Play]:
    """Make a server for one round, and check at the end that nothing is left."""
    server = MemoryServer(folder, {"registration": {"open": True}})
    try:
        play = Play(server, seed)
        yield play
        play.end()
        server.check_log()
        check_bounds(server)
        left = left_behind(server, play.standing)
        assert not any(left.values()), left
    finally:
        server.cast.hang_up()
        server.stop()


def play_round(seed: int, enough: Callable[[Play], bool]) -> Counter[str]:
    """Play until it is `enough`; returns what was done."""
    with tempfile.TemporaryDirectory() as folder, a_play(Path(folder), seed) as play:
        while not enough(play):
            play.step()
        return play.counts


def main() -> None:
    """Play rounds until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.stanzas", description="A grammar-aware stanza fuzzer.")
    parser.add_argument("--seconds", type=float, default=60, help="how long to play (default: 60)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="of the first round")
    parser.add_argument("--steps", type=int, default=2000, help="in one round (default: 2000)")
    options = parser.parse_args()
    until, seed, total = time.monotonic() + options.seconds, options.seed, Counter[str]()
    while time.monotonic() < until:
        print(f"seed {seed}", end="", flush=True)
        total += play_round(seed, lambda play: play.counts["steps"] >= options.steps or time.monotonic() > until)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f": ok; so far {total['steps']} steps, {total['stanzas']} stanzas; peak memory {peak} MB", flush=True)
        seed += 1


if __name__ == "__main__":
    main()
