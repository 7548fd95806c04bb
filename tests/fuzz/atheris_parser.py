"""Coverage-guided fuzzing of the stream parser and of addresses, by hand:

    pip install atheris        (not a test dependency: Linux and macOS only, 35 MB)
    python -m tests.fuzz.atheris_parser -max_total_time=3600 [FOLDER]

The options are libFuzzer's. FOLDER keeps what was learnt for the next run; without it,
a temporary one serves. An input that breaks a promise is written to `crash-…` beside it,
and `python -m tests.fuzz.atheris_parser crash-…` runs that one again.

The first byte of an input chooses what it is tried on (`TRIALS`), the second one where
the stream is cut, the rest is XML or an address, so that an input can be read.
"""

from __future__ import annotations

import random
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

try:
    import atheris
except ImportError:
    raise SystemExit("atheris is missing: pip install atheris (Linux, macOS; CPython 3.11 to 3.13)") from None

with atheris.instrument_imports(include=["xmppd"]):
    import xmppd

STREAM = "xmlns:stream='http://etherx.jabber.org/streams'"
HEADER = f"<?xml version='1.0'?><stream:stream xmlns='jabber:client' {STREAM} to='example.org' version='1.0'>".encode()
SERVER_HEADER = f"<stream:stream xmlns='jabber:server' xmlns:db='jabber:server:dialback' {STREAM}>".encode()
PREFIXED_HEADER = f"<stream:stream xmlns='jabber:client' xmlns:x='urn:x' {STREAM}>".encode()
MAX_STANZA, MAX_ELEMENTS = 2048, 64  # small, so that inputs reach them
CONTENT_NAMESPACES = ("jabber:client", "jabber:server", "jabber:component:accept")
CRUMBS = 400  # bytes: longer streams are not cut into single ones (the parser then waits on purpose, STUBBORN_READS)

Trial = Callable[[bytes, random.Random], None]


# ---- what is promised -----------------------------------------------------------------


def check_stream(data: bytes, cuts: random.Random, namespace: str = "jabber:client") -> None:
    """A stream means the same however it is cut, and each stanza can be passed on."""
    data += b">"  # for a tag in crumbs, the parser waits until the next of these
    whole = list(read([data], namespace))
    compare(whole, list(read(pieces(data, cuts), namespace)))
    for event in whole:
        if isinstance(event, ET.Element):
            check_element(event)
        if isinstance(event, xmppd.Stanza):
            check_stanza(event)


def check_client_stream(data: bytes, cuts: random.Random) -> None:
    """See `check_stream`; and what a parser has not yet read can be given to another one."""
    check_stream(HEADER + data, cuts)
    parser = new_parser()
    parser.feed(HEADER + data)
    event: xmppd.Event | None = None
    for _ in range(cuts.randrange(2, 5)):
        event = parser.next()
    if isinstance(event, ET.Element):
        rest = parser.rest()
        assert data.endswith(rest), rest
        following = list(drain(parser))
        compare(following, list(read([HEADER, rest]))[1:])


def pieces(data: bytes, cuts: random.Random) -> Iterator[bytes]:
    """Cut `data` at up to eight places, or everywhere."""
    if len(data) <= CRUMBS and cuts.random() < 0.3:
        places = list(range(len(data)))
    else:
        places = sorted(cuts.randrange(len(data) + 1) for _ in range(cuts.randrange(1, 9)))
    for start, end in zip([0, *places], [*places, len(data)], strict=True):
        yield data[start:end]


def new_parser(namespace: str = "jabber:client") -> xmppd.StreamParser:
    """A parser with small limits."""
    return xmppd.StreamParser(namespace, max_stanza=MAX_STANZA, max_elements=MAX_ELEMENTS)


def read(chunks: Iterable[bytes], namespace: str = "jabber:client") -> Iterator[xmppd.Event]:
    """Yield the events of a stream; what comes behind its closing tag is nobody's business."""
    parser = new_parser(namespace)
    for chunk in chunks:
        parser.feed(chunk)
        for event in drain(parser):
            yield event
            if isinstance(event, xmppd.Closed):
                return parser.close()
    parser.close()


def drain(parser: xmppd.StreamParser) -> Iterator[xmppd.Event]:
    """Yield the events that are ready."""
    while (event := parser.next()) is not None:
        yield event


def compare(whole: list[xmppd.Event], split: list[xmppd.Event]) -> None:
    """Two readings of one stream are equal, but for which of several faults was seen first."""
    if whole and isinstance(whole[0], xmppd.StreamError):  # of a header that begins and ends in one of the first four
        split = [event for event in split if not isinstance(event, xmppd.Opened)]  # bytes, before a NUL in another
    assert len(whole) == len(split), (whole, split)
    for one, other in zip(whole, split, strict=True):
        assert type(one) is type(other), (one, other)
        if isinstance(one, xmppd.Stanza):
            assert one.wire() == other.wire(), (one.wire(), other.wire())
        if isinstance(one, ET.Element):
            assert infoset(one) == infoset(other)
        elif not isinstance(one, xmppd.StreamError):
            assert one == other
    assert not any(isinstance(event, xmppd.StreamError) for event in whole[:-1]), "something follows an error"


def check_element(element: ET.Element) -> None:
    """The limits hold, and writing and reading an element changes nothing."""
    assert sum(1 for _ in element.iter()) <= MAX_ELEMENTS
    assert depth(element) <= xmppd.MAX_DEPTH
    assert all(len(one.attrib) <= xmppd.MAX_ATTRIBUTES for one in element.iter())
    written = xmppd.serialize(element, "jabber:client")
    assert infoset(xmppd.parse_element(written)) == infoset(element), written


def check_stanza(stanza: xmppd.Stanza) -> None:
    """What is passed on means the same on streams of clients, servers and components, for us and for another parser."""
    written = stanza.wire()
    for namespace in CONTENT_NAMESPACES:
        header = f"<stream:stream xmlns='{namespace}' {STREAM}>".encode()
        parser = xmppd.StreamParser(namespace)
        parser.feed(header + written)
        _opened, *events = drain(parser)
        parser.close()
        assert len(events) == 1 and isinstance(events[0], xmppd.Stanza), (written, events)
        assert infoset(events[0], namespace) == infoset(stanza, namespace), written
        (element,) = ET.fromstring(b"<all xmlns='%b'>%b</all>" % (namespace.encode(), written))
        assert infoset(element, namespace) == infoset(stanza, namespace), written
    assert b"<!" not in written and b"<?" not in written and b"<stream:" not in written, written


def infoset(element: ET.Element, content_namespace: str = "") -> tuple[object, ...]:
    """What an element means, as a value; given a content namespace, it and the clients' one are the same.

    Attributes qualified by those have no meaning to anybody, and are left out then.
    """

    def name(tag: str) -> str:
        own = xmppd.namespace_of(tag)
        same = own == content_namespace or own == "jabber:client"
        return tag.replace(f"{{{own}}}", "{content}") if content_namespace and same else tag

    def value(one: ET.Element) -> tuple[object, ...]:
        attributes = sorted((key, text) for key, text in one.items() if name(key) == key)
        return name(one.tag), attributes, one.text or "", [(value(child), child.tail or "") for child in one]

    return value(element)


def depth(element: ET.Element) -> int:
    """How many elements are nested, the outermost counted."""
    return 1 + max(map(depth, element), default=0)


def check_address(data: bytes, _cuts: random.Random) -> None:
    """An address parses or is malformed; parsed, it is its own only form, with or without the cache."""
    text = data.decode("utf-8", "replace")
    check_texts(text)
    try:
        jid = xmppd.JID.parse(text)
    except xmppd.StanzaError as error:
        assert error.condition == "jid-malformed"
        return
    assert xmppd.parse_address(text) == xmppd.JID.parse(text) == jid
    assert xmppd.parse_address(str(jid)) == jid, (text, jid)
    assert xmppd.parse_address(str(jid.bare)) == jid.bare == jid.bare.bare
    assert all(len(part.encode()) <= xmppd.MAX_PART for part in jid)
    assert jid.domain and not set("@/") & set(jid.local + jid.domain), jid
    assert not any(character < " " or character == "\x7f" for character in str(jid)), jid
    if jid.resource:
        assert jid.bare.with_resource(jid.resource) == jid
    as_attribute = xmppd.Stanza(xmppd.MESSAGE, {"to": str(jid)}).wire()
    assert ET.fromstring(as_attribute).get("to") == str(jid)


def check_texts(text: str) -> None:
    """Preparing twice is preparing once; what is escaped can be unescaped."""
    for prepare in (xmppd.saslprep, xmppd.prepare_local, xmppd.prepare_domain, xmppd.prepare_resource):
        try:
            prepared = prepare(text)
        except ValueError:
            continue
        assert prepare(prepared) == prepared, (prepare, text)
    try:
        escaped = xmppd.escape_local(text)
    except ValueError:
        return
    assert xmppd.unescape_local(escaped) == text, text


# ---- elements made of bytes -----------------------------------------------------------

NAMES = ("a", "body", "message", "x", "ä", "stream", "_", "a.b-c", "xml", "ns0")
NAMESPACES = ("", "jabber:client", "jabber:server", "urn:a", "urn:'&\"<>", "http://etherx.jabber.org/streams", "\t{")


def check_written(data: bytes, _cuts: random.Random) -> None:
    """Whatever tree we write is read as the same tree."""
    given = atheris.FuzzedDataProvider(data)
    element = make_element(given, 5)
    written = xmppd.serialize(element, "jabber:client")
    assert infoset(xmppd.parse_element(written)) == infoset(element), written
    stanza = xmppd.Stanza(xmppd.MESSAGE, {"id": clean(given.ConsumeUnicodeNoSurrogates(8))})
    stanza.add(element)
    check_stanza(stanza)
    check_stanza(stanza.addressed("a@b", "c@d/'&<>"))


def make_element(given: atheris.FuzzedDataProvider, levels: int) -> ET.Element:
    """Build a tree of at most `levels` levels."""
    element = ET.Element(make_name(given))
    for _ in range(given.ConsumeIntInRange(0, 3)):
        element.set(make_name(given), clean(given.ConsumeUnicodeNoSurrogates(12)))
    element.text = clean(given.ConsumeUnicodeNoSurrogates(12))
    for _ in range(given.ConsumeIntInRange(0, 3) if levels else 0):
        child = make_element(given, levels - 1)
        child.tail = clean(given.ConsumeUnicodeNoSurrogates(6))
        element.append(child)
    return element


def make_name(given: atheris.FuzzedDataProvider) -> str:
    """A qualified name, or one without a namespace."""
    space = given.PickValueInList(list(NAMESPACES)).replace("{", "")
    name: str = given.PickValueInList(list(NAMES))
    return f"{{{space}}}{name}" if space else name


def clean(text: str) -> str:
    """Leave out what no XML may contain (XML 1.0 §2.2)."""
    return "".join(c for c in text if c in "\t\n\r" or (" " <= c < "\ud800") or (c >= "\ue000" and c not in "\ufffe\uffff"))


# ---- the run --------------------------------------------------------------------------


def check_server_stream(data: bytes, cuts: random.Random) -> None:
    """See `check_stream`."""
    check_stream(SERVER_HEADER + data, cuts, "jabber:server")


def check_prefixed_stream(data: bytes, cuts: random.Random) -> None:
    """See `check_stream`: with a prefix declared by the header, on which stanzas may rely."""
    check_stream(PREFIXED_HEADER + data, cuts)


TRIALS: dict[str, Trial] = {  # by the first byte of an input, modulo their number
    "h": check_client_stream,
    "i": check_client_stream,
    "j": check_prefixed_stream,
    "k": check_server_stream,
    "l": check_stream,
    "m": check_address,
    "n": check_address,
    "o": check_written,
}


def run_one(data: bytes) -> None:
    """Try one input."""
    if len(data) > 2:
        trial = list(TRIALS.values())[(data[0] - ord("h")) % len(TRIALS)]
        trial(data[2:], random.Random(data[1]))


STANZAS = (
    "<message to='a@b/c' id='1' type='chat'><body>hi &lt;&#13;&amp; ünï</body></message>",
    "<iq type='get' id='1'><query xmlns='jabber:iq:roster'><item jid='a@b' name='&quot;x'/></query></iq>",
    "<presence xml:lang='de'><show>away</show><c xmlns='urn:caps' ver='1'/></presence> \n<presence/>",
    "<message><x xmlns='urn:x' xmlns:y='urn:y' y:z='1'><y:q/><w xmlns=''/></x><![CDATA[<a>]]></message>",
    "<stream:error><x xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error></stream:stream>",
    "<message xmlns:c='jabber:client'><c:body/><body xmlns='jabber:server'>x</body><x:q/></message>",
    "<db:result from='a' to='b'>key</db:result><auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>AGE=</auth>",
    "<!-- c --><?pi x?><!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
    "<a xmlns='urn:a' b='1' c=\"'>\">" * 8 + "</a>" * 8,
)
ADDRESSES = ("juliet@example.org/balcony", "Ümlaut@münchen.de/♥", "[::1]", "a@xn--mnchen-3ya.de./x/y@z", "ß@ﬁ.de/ﬀ", "1.2.3.4/x", "\\20a\\5c@b", "א1@ב")
WORDS = (
    *("<message", "<presence", "<iq", "<body>", "</message>", "/>", " to='", " from='", " id='", " type='", "xmlns='", "xmlns:a='"),
    *("jabber:client", "jabber:server", "jabber:component:accept", "http://etherx.jabber.org/streams", "stream:", "db:"),
    *("<![CDATA[", "]]>", "<!--", "-->", "<!DOCTYPE", "<?xml version='1.0' encoding='utf-8'?>", "&lt;", "&#13;", "&#0;", "&#x1F600;", "xml:lang='"),
    *("</stream:stream>", "\ufeff", "\u00ad", "\u3002", "xn--", "\\40", "@", "/", "\u202e", "\U0001f600", "\u0130", "\u1e9e", "\ufb03", "\u2126"),
)


def write_seeds(folder: Path) -> None:
    """Write what the fuzzer begins with."""
    folder.mkdir(exist_ok=True)
    streams = [kind + "0" + stanza for stanza in (*STANZAS, "".join(STANZAS[:3])) for kind in "hjk"]
    bare = ["l0" + HEADER.decode() + STANZAS[0] + "</stream:stream>", "l1\ufeff<a/>", "o0" + "abc" * 40]
    for number, seed in enumerate(streams + bare + ["m0" + address for address in ADDRESSES]):
        (folder / f"seed-{number}").write_text(seed)


def write_words(path: Path) -> None:
    """Write libFuzzer's dictionary."""
    lines = ('"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"' for word in WORDS)
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run as the module's docstring says."""
    with tempfile.TemporaryDirectory() as temporary:
        seeds, words = Path(temporary) / "seeds", Path(temporary) / "words"
        write_seeds(seeds)
        write_words(words)
        options = [word for word in sys.argv[1:] if word.startswith("-")]
        given = [word for word in sys.argv[1:] if not word.startswith("-")]
        places = given if any(Path(word).is_file() for word in given) else [*given, str(seeds)]
        defaults = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", f"-dict={words}"]
        atheris.Setup([sys.argv[0], *defaults, *options, *places], run_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
