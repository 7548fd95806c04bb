"""The vocabulary of the tests: people who talk to the server in XML.

    romeo.sends("<message to='juliet@example.org' type='chat'><body>O</body></message>")
    juliet.receives("<message from='romeo@example.org/orchard' type='chat'><body>O</body></message>")
    romeo.receives_nothing()

The XML is that of the specifications' examples; what is expected is a pattern:

    id='*'                  any value; `*` may also be a part of a value or of a text
    <body>*</body>          any text
    <conflict .../>         any further attributes; without an xmlns of its own, in any namespace
    <query ...>...</query>  any content

Everything that arrives has to be expected, in the order of its arrival. Not worth a word
are: prefixes, the order of attributes, white space between elements, the order of children
with different names, and what follows from the stanza itself: a `to` that is the receiver's
own address, a `from` that is the address the failed or answered request went to, and of an
error its old number (XEP-0086), its text and a copy of what it is about; nor, of a message,
the `<stanza-id/>` under which the receiver's own archive has it. A stanza without xmlns is in
jabber:client.

Nothing here ever sleeps: that nothing arrives is shown by a ping whose answer is the very
next stanza (the barrier).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import re
import secrets
import socket
import ssl
import time
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

CLIENT = "jabber:client"
STREAMS = "http://etherx.jabber.org/streams"
STREAM_ERRORS = "urn:ietf:params:xml:ns:xmpp-streams"
STANZA_ERRORS = "urn:ietf:params:xml:ns:xmpp-stanzas"
SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
TLS = "urn:ietf:params:xml:ns:xmpp-tls"
BIND = "urn:ietf:params:xml:ns:xmpp-bind"
SM = "urn:xmpp:sm:3"
ROSTER = "jabber:iq:roster"
DISCO_INFO = "http://jabber.org/protocol/disco#info"
STANZA_ID = "{urn:xmpp:sid:0}stanza-id"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"

ELLIPSIS = "..."  # in a pattern: a namespace, an attribute or a text that stands for any
ELLIPSIS_ATTRIBUTE = "any-further-attributes"  # how `...` in a start tag is spelled for the XML parser
PATIENCE = 10.0  # seconds until what should have come counts as missing
TRANSCRIPT = 30  # lines of the conversation that a failure shows


# ---- Patterns -------------------------------------------------------------------------

_START_TAG = re.compile(r"""<[A-Za-z_](?:[^<>"']|"[^"]*"|'[^']*')*>""")
_QUOTED_OR_ELLIPSIS = re.compile(r"""("[^"]*"|'[^']*')|\.\.\.""")
_WRAPPER = (
    "<all xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' xmlns:db='jabber:server:dialback'>"
)


def parse(text: str) -> list[ET.Element]:
    """Return the elements of a pattern, or of something to send."""
    try:
        return list(ET.fromstring(_WRAPPER + _START_TAG.sub(_spell_out, text) + "</all>"))
    except ET.ParseError as error:
        raise ValueError(f"the test's own XML is not well-formed ({error}): {text}") from error


def _spell_out(tag: re.Match[str]) -> str:
    """Turn the `...` of a start tag into attributes that an XML parser takes."""
    text = tag.group()
    spelled = _QUOTED_OR_ELLIPSIS.sub(lambda match: match.group(1) or f' {ELLIPSIS_ATTRIBUTE}="..." ', text)
    name = re.match(r"<[^\s/>]+", text)
    assert name
    is_stanza_or_prefixed = name.group() in ("<message", "<presence", "<iq") or ":" in name.group()
    if spelled == text or is_stanza_or_prefixed or re.search(r"\sxmlns=", text):
        return spelled
    return name.group() + ' xmlns="..."' + spelled[name.end() :]


def difference(expected: ET.Element, actual: ET.Element) -> str:
    """Return "" if `actual` is what the pattern says, else where and in what it differs."""
    where = local_name(expected.tag)
    if not _same_name(expected.tag, actual.tag):
        return f"expected <{expected.tag}>, got <{actual.tag}>"
    wrong = _attribute_difference(expected, actual)
    if wrong:
        return f"<{where}>: {wrong}"
    if len(expected) == 0 and (expected.text or "").strip() == ELLIPSIS:
        return ""
    wrong = _text_difference(expected, actual) or _child_difference(expected, list(actual))
    return f"<{where}>: {wrong}" if wrong else ""


def local_name(tag: str) -> str:
    """Return the name without its namespace."""
    return tag.rpartition("}")[2]


def _same_name(expected: str, actual: str) -> bool:
    if expected.startswith("{...}"):
        return local_name(expected) == local_name(actual)
    return expected == actual


def _attribute_difference(expected: ET.Element, actual: ET.Element) -> str:
    for name, value in expected.items():
        found = actual.get(name)
        if name != ELLIPSIS_ATTRIBUTE and (found is None or not _fits(value, found)):
            return f"expected {name}={value!r}, got {'none' if found is None else repr(found)}"
    further = [f"{name}={value!r}" for name, value in actual.items() if name not in expected.attrib]
    return f"unexpected {', '.join(further)}" if further and ELLIPSIS_ATTRIBUTE not in expected.attrib else ""


def _text_difference(expected: ET.Element, actual: ET.Element) -> str:
    wanted, found = _own_text(expected), _own_text(actual)
    if len(expected) or len(actual):  # white space between elements means nothing
        wanted, found = wanted.strip(), found.strip()
    return "" if _fits(wanted, found) else f"expected the text {wanted!r}, got {found!r}"


def _own_text(element: ET.Element) -> str:
    return (element.text or "") + "".join(child.tail or "" for child in element)


def _child_difference(expected: Iterable[ET.Element], actual: list[ET.Element]) -> str:
    """Pair each expected child with the first of its name that is left: order counts among equal names."""
    for child in expected:
        partner = next((other for other in actual if _same_name(child.tag, other.tag)), None)
        if partner is None:
            return f"no <{local_name(child.tag)}> in {namespace(child.tag)!r}"
        if wrong := difference(child, partner):
            return wrong
        actual.remove(partner)
    return "unexpected " + ", ".join(show(child) for child in actual) if actual else ""


def namespace(tag: str) -> str:
    """Return the namespace of a name, "" if it has none."""
    return tag[1:].partition("}")[0] if tag.startswith("{") else ""


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


def _fits(pattern: str, value: str) -> bool:
    return pattern == value or ("*" in pattern and _glob(pattern).fullmatch(value) is not None)


def show(element: ET.Element, outer: str = CLIENT, indent: str = "") -> str:
    """Return an element as a reader likes it: one child per line, namespaces as defaults."""
    own, name = namespace(element.tag), local_name(element.tag)
    words = [name] + ([f"xmlns='{own}'"] if own != outer else [])
    words += [f"{key.replace(LANG, 'xml:lang')}={quoteattr(value)}" for key, value in element.items()]
    start = "<" + " ".join(words).replace(f'{ELLIPSIS_ATTRIBUTE}="..."', "...").replace(" xmlns='...'", "")
    if not len(element):
        return indent + (f"{start}>{escape(element.text)}</{name}>" if element.text else start + "/>")
    children = [show(child, own, indent + "  ") for child in element]
    text = [f"{indent}  {_own_text(element).strip()}"] if _own_text(element).strip() else []
    return "\n".join([f"{indent}{start}>", *text, *children, f"{indent}</{name}>"])


# ---- Reading a stream -----------------------------------------------------------------


class Event(NamedTuple):
    """Something that came: kind "header" (the stream's start tag), "stanza", "footer" or "end" (of the connection)."""

    kind: str
    element: ET.Element


class StreamReader:
    """An incremental parser of one XML stream; after STARTTLS and SASL a new one begins."""

    def __init__(self) -> None:
        self._parser = expat.ParserCreate("UTF-8", "}")
        self._parser.buffer_text = True
        if hasattr(self._parser, "SetReparseDeferralEnabled"):  # expat ≥ 2.6 would hold back what is complete
            self._parser.SetReparseDeferralEnabled(False)
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._data
        self._open: list[ET.Element] = []
        self._events: list[Event] = []

    def feed(self, data: bytes) -> list[Event]:
        """Return what is complete with these bytes; raises `expat.ExpatError` when the server sends no XML."""
        self._parser.Parse(data, False)
        events, self._events = self._events, []
        return events

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        element = ET.Element(_clark(name), {_clark(key): value for key, value in attributes.items()})
        if not self._open:
            self._events.append(Event("header", element))
        elif len(self._open) > 1:
            self._open[-1].append(element)
        self._open.append(element)

    def _end(self, _name: str) -> None:
        element = self._open.pop()
        if len(self._open) == 1:
            self._events.append(Event("stanza", element))
        elif not self._open:
            self._events.append(Event("footer", element))

    def _data(self, text: str) -> None:
        if len(self._open) < 2:  # white space between stanzas keeps connections alive
            assert not text.strip(), f"text between stanzas: {text!r}"
        elif len(self._open[-1]):
            self._open[-1][-1].tail = (self._open[-1][-1].tail or "") + text
        else:
            self._open[-1].text = (self._open[-1].text or "") + text


def _clark(name: str) -> str:
    return "{" + name if "}" in name else name


# ---- Wires ----------------------------------------------------------------------------


class Wire(Protocol):
    """The client's end of a connection; the server's end is a socket or lives in this process."""

    def send(self, data: bytes) -> None:
        """Hand bytes to the server; a server that has hung up makes no difference."""

    def read(self, timeout: float) -> bytes | None:
        """Return the next bytes, b"" at the end of the connection, None if nothing comes within `timeout` seconds."""

    def start_tls(self, host: str) -> None:
        """Negotiate TLS as a client, after the server's <proceed/>."""

    def bindings(self) -> dict[str, bytes]:
        """Return the channel bindings by type: `{"tls-server-end-point": b"..."}`."""

    def close(self) -> None:
        """Hang up."""


def pieces(data: bytes, size: int) -> list[bytes]:
    """Cut data into pieces of `size` bytes; 0 means not at all."""
    step = size or len(data) or 1
    return [data[at : at + step] for at in range(0, len(data), step)]


class SocketWire:
    """A TCP connection to a server process; `context` trusts the server's own CA and verifies.

    `split` is the number of bytes in one segment, 0 for all; `direct_tls` names the host.
    """

    def __init__(
        self, address: tuple[str, int], context: ssl.SSLContext, *, split: int = 0, direct_tls: str = ""
    ) -> None:
        self.context = context
        self.split = split
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if direct_tls:
            self.start_tls(direct_tls)

    def send(self, data: bytes) -> None:
        """See `Wire.send`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the test reads next, and sees the end
            for piece in pieces(data, self.split):
                self.socket.sendall(piece)

    def read(self, timeout: float) -> bytes | None:
        """See `Wire.read`."""
        self.socket.settimeout(timeout)
        try:
            return self.socket.recv(65536)
        except TimeoutError:
            return None
        except (ConnectionResetError, ssl.SSLEOFError):
            return b""
        finally:
            self.socket.settimeout(PATIENCE)

    def start_tls(self, host: str) -> None:
        """See `Wire.start_tls`."""
        self.socket = self.context.wrap_socket(self.socket, server_hostname=host)

    def bindings(self) -> dict[str, bytes]:
        """See `Wire.bindings`; Python offers no exporter, and the leaf is signed with SHA-256."""
        if not isinstance(self.socket, ssl.SSLSocket):
            return {}
        return {"tls-server-end-point": hashlib.sha256(self.socket.getpeercert(True) or b"").digest()}

    def close(self) -> None:
        """See `Wire.close`."""
        self.socket.close()


# ---- People ---------------------------------------------------------------------------


class Client:
    """Somebody who talks to the server; a client takes part in a `cast`, with which it waits at barriers.

    Verbs in the third person (`sends`, `receives`, `binds`) act and check in one; those that
    check raise AssertionError with the last lines of the conversation.
    """

    def __init__(self, dial: Callable[[], Wire], cast: Cast, *, host: str = "example.org") -> None:
        self.dial = dial
        self.cast = cast
        self.host = host  # the domain of the stream, later of the account
        self.jid = ""  # the full JID, once bound
        self.wire: Wire | None = None
        self.transcript: deque[str] = deque(maxlen=TRANSCRIPT)
        self.hears_questions = False  # what the client can do, which the server asks every client without caps
        self.hears_requests = False  # for acknowledgements (XEP-0198), which come a second after a stanza
        self._reader = StreamReader()
        self._inbox: deque[Event] = deque()
        self._sent: dict[str, ET.Element] = {}  # the stanzas sent, by id: errors and answers are checked against them
        self._barriers = 0
        cast.clients.append(self)

    # -- the connection and its streams

    def connect(self) -> Client:
        """Connect without sending anything; returns the client itself."""
        self.wire = self.dial()
        self._reader = StreamReader()
        self._inbox.clear()
        return self

    def opens_stream(self, *, to: str | None = None, version: str | None = "1.0", **attributes: str) -> None:
        """Send a stream header (RFC 6120 §4.2); `from_` and `xml_lang` are spelled so."""
        values = {"to": self.host if to is None else to, "version": version or "", **attributes}
        names = {"from_": "from", "xml_lang": "xml:lang"}
        words = "".join(f" {names.get(name, name)}='{value}'" for name, value in values.items() if value)
        self._reader = StreamReader()
        self.sends_raw(f"<?xml version='1.0'?><stream:stream xmlns='{CLIENT}' xmlns:stream='{STREAMS}'{words}>")

    def receives_stream_header(self) -> ET.Element:
        """Return the server's stream header, without children."""
        return self._expect("header", "a stream header")

    def receives_features(self, *names: str) -> ET.Element:
        """Return <stream:features/>; given names, those must be the local names of exactly these features."""
        features = self._expect("stanza", "stream features")
        self._check(features.tag == f"{{{STREAMS}}}features", f"expected stream features, got:\n{show(features)}")
        found = sorted(local_name(feature.tag) for feature in features)
        self._check(not names or found == sorted(names), f"expected the features {sorted(names)}, got {found}")
        return features

    def negotiates(self, **attributes: str) -> ET.Element:
        """Open a stream and return the features that the server offers."""
        self.opens_stream(**attributes)
        self.receives_stream_header()
        return self.receives_features()

    def starts_tls(self) -> None:
        """Upgrade the connection (RFC 6120 §5.4.2, §5.4.3)."""
        self.sends(f"<starttls xmlns='{TLS}'/>")
        self.receives(f"<proceed xmlns='{TLS}'/>")
        self._connected().start_tls(self.host)

    def receives_stream_error(self, condition: str, content: str = "") -> ET.Element:
        """Check that the stream ends with this error (RFC 6120 §4.9); `content` is a pattern for further children."""
        self._pass_headers()
        error = self._expect("stanza", f"the stream error {condition}")
        pattern = parse(f"<stream:error><{condition} xmlns='{STREAM_ERRORS}'>*</{condition}>{content}</stream:error>")
        wrong = difference(pattern[0], _without(error, f"{{{STREAM_ERRORS}}}text"))
        self._check(not wrong, f"expected the stream error {condition}, got:\n{show(error)}\n{wrong}")
        return error

    def is_closed(self) -> bool:
        """Check that nothing but the end of the stream and of the connection comes; returns True."""
        event = self._next()
        if event.kind == "footer":
            event = self._next()
        self._check(event.kind == "end", f"expected the end of the connection, got:\n{show(event.element)}")
        self._leave()
        return True

    def closes(self) -> None:
        """Close the stream and wait until the server has done so too (RFC 6120 §4.4); unread stanzas are dropped."""
        self.sends_raw("</stream:stream>")
        while self._next().kind not in ("footer", "end"):
            pass
        self._leave()

    def disconnects(self) -> None:
        """Hang up without a word, as a train does in a tunnel."""
        self._leave()

    # -- login

    def login(self, name: str, *, resource: str = "", password: str = "", mechanism: str = "SCRAM-SHA-256") -> Client:
        """Connect if necessary and go all the way to a bound session; the password is `NAME-secret` unless given.

        Over TLS, always. An empty `resource` lets the server choose. Returns the client itself.
        """
        self.logs_in(name, password=password, mechanism=mechanism)
        self.binds(resource)
        self.transcript.clear()  # a failure later on is not about the login
        return self

    def logs_in(self, name: str, *, password: str = "", mechanism: str = "SCRAM-SHA-256") -> ET.Element:
        """Like `login`, but bind nothing; return the features that the server offers then."""
        if self.wire is None:
            self.connect()
        features = self.negotiates()
        if features.find(f"{{{TLS}}}starttls") is not None:
            self.starts_tls()
            self.negotiates()
        self.authenticates(name, password or password_of(name), mechanism)
        return self.negotiates()

    def authenticates(self, name: str, password: str, mechanism: str = "SCRAM-SHA-256") -> None:
        """Log in by a SASL mechanism (RFC 6120 §6.4): PLAIN, SCRAM-SHA-1, SCRAM-SHA-256, the latter also with -PLUS."""
        if mechanism == "PLAIN":
            self.sends_auth("PLAIN", f"\0{name}\0{password}".encode())
        else:
            scram = Scram(name, password, mechanism, self._connected().bindings())
            self.sends_auth(mechanism, scram.first())
            self.sends(f"<response xmlns='{SASL}'>{_base64(scram.final(self.receives_challenge()))}</response>")
        success = self.receives(f"<success xmlns='{SASL}'>*</success>")
        if mechanism != "PLAIN":
            self._check(scram.verifies(base64.b64decode(success.text or "")), "the server does not know the password")

    def sends_auth(self, mechanism: str, initial: bytes | None = None) -> None:
        """Send <auth/> (RFC 6120 §6.4.2); no initial response and an empty one (`=`) are two different things."""
        content = "" if initial is None else _base64(initial) or "="
        self.sends(f"<auth xmlns='{SASL}' mechanism='{mechanism}'>{content}</auth>")

    def receives_challenge(self) -> bytes:
        """Return the content of the <challenge/> that must come next."""
        return base64.b64decode(self.receives(f"<challenge xmlns='{SASL}'>*</challenge>").text or "")

    def receives_failure(self, condition: str) -> None:
        """Check that the login fails for this reason (RFC 6120 §6.5)."""
        failure = self._expect("stanza", f"the SASL failure {condition}")
        pattern = parse(f"<failure xmlns='{SASL}'><{condition}/></failure>")[0]
        wrong = difference(pattern, _without(failure, f"{{{SASL}}}text"))
        self._check(not wrong, f"expected the SASL failure {condition}, got:\n{show(failure)}\n{wrong}")

    def binds(self, resource: str = "") -> str:
        """Bind a resource (RFC 6120 §7); returns the full JID."""
        wish = f"<resource>{resource}</resource>" if resource else ""
        self.sends(f"<iq type='set' id='bind'><bind xmlns='{BIND}'>{wish}</bind></iq>")
        result = self.receives(f"<iq type='result' id='bind' ...><bind xmlns='{BIND}'><jid>*</jid></bind></iq>")
        self.jid = result.findtext(f"{{{BIND}}}bind/{{{BIND}}}jid") or ""
        return self.jid

    @property
    def bare(self) -> str:
        """The bare JID of the account."""
        return self.jid.partition("/")[0]

    # -- stanzas

    def sends(self, text: str) -> None:
        """Send stanzas, written as in the specifications' examples."""
        for stanza in parse(text):
            self._sent[stanza.get("id", "")] = stanza
        self.sends_raw(text.strip())

    def sends_raw(self, data: bytes | str) -> None:
        """Send bytes as they are, well-formed or not."""
        data = data.encode() if isinstance(data, str) else data
        self.transcript.append("C: " + data[:2000].decode(errors="replace"))
        self._connected().send(data)

    def receives(self, *patterns: str) -> ET.Element:
        """Check that exactly these stanzas come next, in this order; returns the last of them."""
        wanted = [stanza for pattern in patterns for stanza in parse(pattern)]
        assert wanted, "say what is expected, or receives_nothing()"
        for expected in wanted:
            actual = self._expect("stanza", show(expected))
            wrong = self._difference(expected, actual)
            both = f"expected:\n{show(expected, indent='  ')}\ngot:\n{show(actual, indent='  ')}"
            self._check(not wrong, f"{both}\n{wrong}")
        return actual

    def receives_in_any_order(self, *patterns: str) -> list[ET.Element]:
        """Check that exactly these stanzas come next, whatever their order; returns them as they came."""
        wanted = [stanza for pattern in patterns for stanza in parse(pattern)]
        came = []
        while wanted:
            actual = self._expect("stanza", " or ".join(map(show, wanted)))
            wrong = {index: self._difference(expected, actual) for index, expected in enumerate(wanted)}
            fitting = next((index for index in wrong if not wrong[index]), None)
            reasons = "\n".join(f"{show(wanted[index], indent='  ')}\n  {why}" for index, why in wrong.items())
            self._check(fitting is not None, f"got:\n{show(actual, indent='  ')}\nexpected one of:\n{reasons}")
            came.append(actual)
            del wanted[fitting or 0]
        return came

    def receives_nothing(self) -> None:
        """Check that nothing came: whatever anybody has sent is handled by now, and this client's inbox is empty."""
        self.cast.settle(last=self)
        self._check(not self._inbox, "expected nothing, got:\n" + "\n".join(map(show, self.unread())))

    def receives_anything(self) -> list[ET.Element]:
        """Return all that has come, for a check of another kind."""
        self.cast.settle(last=self)
        came = [event.element for event in self._inbox]
        self._inbox.clear()
        return came

    # -- roster and presence

    def comes_online(self, content: str = "") -> None:
        """Ask for the roster and send initial presence (RFC 6121 §2.2, §4.2); what comes from others stays unread."""
        self.sends(f"<iq type='get' id='roster'><query xmlns='{ROSTER}'/></iq>")
        self.sends(f"<presence>{content}</presence>")
        own = [
            parse(f"<iq type='result' id='roster'><query xmlns='{ROSTER}' ...>...</query></iq>")[0],
            parse(f"<presence from='{self.jid}' ...>{content}</presence>")[0],
        ]
        self.passes_barrier()
        for expected in own:
            partner = next((event for event in self._inbox if not self._difference(expected, event.element)), None)
            self._check(partner is not None, f"expected:\n{show(expected)}")
            self._inbox.remove(partner)  # type: ignore[arg-type]  # checked above

    def befriends(self, other: Client) -> None:
        """Subscribe both to each other (RFC 6121 §3.1); both forget what they received on the way."""
        self.sends(f"<presence type='subscribe' to='{other.bare}'/>")
        self.passes_barrier()
        other.sends(f"<presence type='subscribed' to='{self.bare}'/><presence type='subscribe' to='{self.bare}'/>")
        other.passes_barrier()
        self.sends(f"<presence type='subscribed' to='{other.bare}'/>")
        self.receives_anything()
        other.receives_anything()

    # -- barriers

    @property
    def is_bound(self) -> bool:
        """Whether there is a session that can be asked."""
        return self.wire is not None and bool(self.jid)

    def passes_barrier(self) -> None:
        """Ask the server and read until it answers: what was sent before is handled, its effects are in the inbox."""
        assert self.is_bound, "only a bound session can ask the server"
        self._barriers += 1
        name = f"barrier-{self._barriers}"
        ping = f"<iq type='get' id='{name}' to='{self.host}'><ping xmlns='urn:xmpp:ping'/></iq>"
        self._connected().send(ping.encode())
        came: list[Event] = []
        while not _answers(name, event := self._next()):
            came.append(event)
            if event.kind == "end":
                break  # whoever reads the inbox will see it
        self._inbox.extend(came)

    def unread(self) -> list[ET.Element]:
        """Return the stanzas in the inbox; they stay there."""
        return [event.element for event in self._inbox]

    def forgets_unread(self) -> None:
        """Drop what has come so far."""
        self._inbox.clear()

    # -- within

    def _connected(self) -> Wire:
        assert self.wire is not None, "this client is not connected"
        return self.wire

    def _leave(self) -> None:
        if self.wire is not None:
            self.wire.close()
        self.wire = None
        self.jid = ""

    def _next(self) -> Event:
        """Return the next event, waiting for it if necessary."""
        give_up = time.monotonic() + PATIENCE
        while not self._inbox:
            data = self._connected().read(max(0.0, give_up - time.monotonic()))
            self._check(data is not None, f"nothing came for {PATIENCE:.0f} seconds")
            self._take(data or b"")
        return self._inbox.popleft()

    def _take(self, data: bytes) -> None:
        if not data:
            self._inbox.append(Event("end", ET.Element("end-of-connection")))
            return
        self.transcript.append("S: " + data[:2000].decode(errors="replace"))
        self._inbox.extend(event for event in self._reader.feed(data) if self._hears(event))

    def _hears(self, event: Event) -> bool:
        if event.element.tag == f"{{{SM}}}r":
            return self.hears_requests
        return self.hears_questions or not _asks(event)

    def _expect(self, kind: str, what: str) -> ET.Element:
        event = self._next()
        self._check(event.kind == kind, f"expected:\n{what}\ngot the stream's {event.kind}:\n{show(event.element)}")
        return event.element

    def _pass_headers(self) -> None:
        """A server that refuses a header sends its own first (RFC 6120 §4.9.1.2)."""
        event = self._next()
        if event.kind != "header":
            self._inbox.appendleft(event)

    def _check(self, good: bool, why: str) -> None:
        if good:
            return
        who = self.jid or "the client"
        more = ["still unread:", *map(show, self.unread())] if self._inbox else []
        raise AssertionError("\n".join([f"{who}: {why}", *more, "the conversation so far:", *self.transcript]))

    def _difference(self, expected: ET.Element, actual: ET.Element) -> str:
        return difference(expected, self._without_the_obvious(expected, actual))

    def _without_the_obvious(self, expected: ET.Element, actual: ET.Element) -> ET.Element:
        """Take away what the pattern does not mention and what follows from the stanza itself."""
        if namespace(actual.tag) != CLIENT:
            return actual
        cause = self._sent.get(actual.get("id", ""))
        plain = _copy(actual)
        if not any(_fits(child.get("by", "*"), self.bare) for child in expected.iter(STANZA_ID)):
            plain[:] = [_without_id(child, self.bare) for child in actual if not _is_id(child, self.bare)]
        if ELLIPSIS_ATTRIBUTE in expected.attrib:
            return plain
        if "to" not in expected.attrib and actual.get("to") in (self.jid, self.bare):
            plain.attrib.pop("to", None)
        if "from" not in expected.attrib and actual.get("from") in self._answering(actual, cause):
            plain.attrib.pop("from", None)
        return _plain_error(plain, expected, cause) if actual.get("type") == "error" else plain

    def _answering(self, actual: ET.Element, cause: ET.Element | None) -> tuple[str, ...]:
        """Return the addresses that an answer to `cause` may come from (RFC 6120 §8.1.2.1, §8.3.1)."""
        if cause is None or actual.get("type") not in ("result", "error"):
            return ()
        return (cause.attrib["to"],) if "to" in cause.attrib else (self.bare, self.jid, self.host)


def _asks(event: Event) -> bool:
    """Whether this is the server's own question what the client can do (XEP-0115 §6.2); it means nothing to most."""
    element = event.element
    is_question = element.tag == f"{{{CLIENT}}}iq" and element.get("type") == "get"
    is_about_us = [child.tag for child in element] == [f"{{{DISCO_INFO}}}query"] and "/" not in element.get("from", "/")
    return is_question and is_about_us


def _answers(name: str, event: Event) -> bool:
    element = event.element
    return element.tag == f"{{{CLIENT}}}iq" and element.get("id") == name and element.get("type") in ("result", "error")


def _is_id(element: ET.Element, by: str) -> bool:
    return element.tag == STANZA_ID and element.get("by") == by


def _without_id(element: ET.Element, by: str) -> ET.Element:
    """Return the element without any stanza-id of `by` inside, as in the copies of XEP-0280."""
    if not any(_is_id(inner, by) for inner in element.iter()):
        return element
    plain = _copy(element)
    plain[:] = [_without_id(child, by) for child in element if not _is_id(child, by)]
    return plain


def _copy(element: ET.Element) -> ET.Element:
    """Copy an element, not its children."""
    plain = ET.Element(element.tag, dict(element.attrib))
    plain.text = element.text
    plain.extend(element)
    return plain


def _without(element: ET.Element, *tags: str) -> ET.Element:
    plain = _copy(element)
    plain[:] = [child for child in element if child.tag not in tags]
    return plain


def _plain_error(stanza: ET.Element, expected: ET.Element, cause: ET.Element | None) -> ET.Element:
    """Drop an error's text, number and copy of the cause, as far as the pattern does not mention them."""
    mentioned = {child.tag for child in expected.iter()}
    copies = [child for child in stanza if cause is not None and child.tag not in mentioned and _is_in(child, cause)]
    plain = _copy(stanza)
    plain[:] = [_bare_error(child, expected, mentioned) for child in stanza if child not in copies]
    return plain


def _bare_error(child: ET.Element, expected: ET.Element, mentioned: set[str]) -> ET.Element:
    if child.tag != f"{{{CLIENT}}}error":
        return child
    text = f"{{{STANZA_ERRORS}}}text"
    bare = _without(child, text) if text not in mentioned else _copy(child)
    pattern = expected.find(child.tag)
    if pattern is not None and "code" not in pattern.attrib:
        bare.attrib.pop("code", None)
    return bare


def _is_in(child: ET.Element, cause: ET.Element) -> bool:
    return any(ET.canonicalize(ET.tostring(child)) == ET.canonicalize(ET.tostring(other)) for other in cause)


class Cast:
    """The clients of one test."""

    def __init__(self) -> None:
        self.clients: list[Client] = []

    def settle(self, last: Client | None = None) -> None:
        """Let every bound client pass a barrier, `last` after all others: what one sends, another receives."""
        for client in self.clients:
            if client.is_bound and client is not last:
                client.passes_barrier()
        if last is not None and last.is_bound:
            last.passes_barrier()

    def leave(self, *, unread_allowed: bool = False) -> None:
        """End of the test: nobody may have received what the test did not expect."""
        self.settle()
        self.settle()  # the first round may have put something in the inbox of who went first
        for client in self.clients:
            client._check(unread_allowed or not client.unread(), "the test ends with unread stanzas")
        self.hang_up()

    def hang_up(self) -> None:
        """Close all connections; the next test has a cast of its own."""
        for client in self.clients:
            client.disconnects()
        self.clients.clear()


# ---- SASL SCRAM, the client's part (RFC 5802) -----------------------------------------


def password_of(name: str) -> str:
    """Return the password that the tests give to an account."""
    return f"{name}-secret"


@functools.cache
def _salted(password: str, salt: bytes, iterations: int, hash_name: str) -> bytes:
    return hashlib.pbkdf2_hmac(hash_name, password.encode(), salt, iterations)


class Scram:
    """One SCRAM exchange: `first()` is sent, the challenge goes to `final()`, the success to `verifies()`."""

    def __init__(self, name: str, password: str, mechanism: str, bindings: dict[str, bytes]) -> None:
        self.password = password
        self.hash = {"SCRAM-SHA-1": "sha1", "SCRAM-SHA-256": "sha256"}[mechanism.removesuffix("-PLUS")]
        kind, self._binding = next(iter(bindings.items())) if mechanism.endswith("-PLUS") else ("", b"")
        self._header = f"p={kind},," if kind else "n,,"
        self._bare = "n=" + name.replace("=", "=3D").replace(",", "=2C") + ",r=" + secrets.token_urlsafe(18)
        self._signature = b""

    def first(self) -> bytes:
        """Return the client's first message (RFC 5802 §7)."""
        return (self._header + self._bare).encode()

    def final(self, challenge: bytes) -> bytes:
        """Return the client's final message, with the proof."""
        fields = dict(part.split("=", 1) for part in challenge.decode().split(","))
        assert fields["r"].startswith(self._bare.partition("r=")[2]), "the server changed the nonce"
        salted = _salted(self.password, base64.b64decode(fields["s"]), int(fields["i"]), self.hash)
        without_proof = f"c={_base64(self._header.encode() + self._binding)},r={fields['r']}"
        message = f"{self._bare},{challenge.decode()},{without_proof}".encode()
        client_key = self._mac(salted, b"Client Key")
        stored_key = hashlib.new(self.hash, client_key).digest()
        proof = bytes(a ^ b for a, b in zip(client_key, self._mac(stored_key, message), strict=True))
        self._signature = self._mac(self._mac(salted, b"Server Key"), message)
        return f"{without_proof},p={_base64(proof)}".encode()

    def verifies(self, success: bytes) -> bool:
        """Return whether the server has proved that it knows the password too."""
        return success == b"v=" + base64.b64encode(self._signature)

    def _mac(self, key: bytes, message: bytes) -> bytes:
        return hmac.digest(key, message, self.hash)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
