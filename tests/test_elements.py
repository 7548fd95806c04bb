"""Reading and writing XML: what comes in by any route means the same, and what goes out is harmless."""

from __future__ import annotations

import itertools
import time
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xmppd
from xmppd import (
    BIND,
    CLIENT,
    COMPONENT,
    IQ,
    MESSAGE,
    PING,
    SERVER,
    STANZA_ERRORS,
    XML_LANG,
    Closed,
    E,
    Element,
    Opened,
    Stanza,
    StanzaError,
    StreamError,
    StreamParser,
    error_element,
    error_reply,
    parse_element,
    parse_stamp,
    serialize,
    stamp,
)

STREAM = "xmlns:stream='http://etherx.jabber.org/streams' to='example.org' version='1.0'"
HEADER = f"<?xml version='1.0'?><stream:stream xmlns='jabber:client' {STREAM}>"
XML = "http://www.w3.org/XML/1998/namespace"


def events_of(parser: StreamParser, pieces: Sequence[bytes]) -> list[object]:
    """Return the events of all pieces, taken as they come."""
    events: list[object] = []
    for piece in pieces:
        parser.feed(piece)
        while (event := parser.next()) is not None:
            events.append(event)
    return events


def drowsy(parser: StreamParser, pieces: Sequence[bytes]) -> list[object]:
    """Like `events_of`, with a parser that dozes whenever it may."""
    events: list[object] = []
    for piece in pieces:
        events += events_of(parser, [piece])
        parser.doze()
    return events


def read(text: str | bytes, size: int = 0, **limits: int) -> list[object]:
    """Return the events behind the stream header; `size` is that of the pieces, 0 for all at once."""
    data = (HEADER.encode() + text) if isinstance(text, bytes) else (HEADER + text).encode()
    step = size or len(data)
    events = events_of(StreamParser(**limits), [data[at : at + step] for at in range(0, len(data), step)])
    assert isinstance(events[0], Opened)
    return events[1:]


def read_one(text: str) -> Stanza:
    [stanza] = read(text)
    assert isinstance(stanza, Stanza), stanza
    return stanza


def error_of(events: list[object]) -> str:
    """Return the condition of the error that must end the events."""
    assert events and isinstance(events[-1], StreamError), events
    return events[-1].condition


def infoset(element: Element) -> object:
    """Return what an XML parser knows of an element, for comparison."""
    return (element.tag, dict(element.attrib), element.text or "",
            [(infoset(child), child.tail or "") for child in element])  # fmt: skip


def shown(event: object) -> object:
    """Return an event as a value: of a stanza its bytes and its infoset."""
    if isinstance(event, Stanza):
        return event.wire(), infoset(event)
    if isinstance(event, Element):
        return infoset(event)
    return (event.condition, event.text) if isinstance(event, StreamError) else event


# -- any split of the bytes, any way out: hypothesis

TEXTS = ["x", " ", "\n", "\r\n", "\t", "&lt;", "&amp;", "&#233;", "&#x1F600;", "&#13;", "é", "😀", "]]", ">", "'",
         "<![CDATA[<a/>&]]>", "stream:", "db:", "jabber:client", "xmlns:"]  # fmt: skip
VALUES = ["x", "é", ">", "/>", "&#10;", "&#9;", "\n", "&lt;", "&quot;", "&apos;", "stream:", "jabber:server"]
URIS = ["urn:a", "urn:b&amp;c", "jabber:client", "jabber:&#115;erver", "http://etherx.jabber.org/streams"]
NAMES = ["a", "body", "x-1", "ä", "Ω"]


@st.composite
def attribute_texts(draw: st.DrawFn, prefixes: list[str]) -> str:
    names = draw(st.lists(st.sampled_from(["a", "to", "é"]), unique=True, max_size=2))
    if draw(st.booleans()):
        names.append(draw(st.sampled_from([*[f"{prefix}:p" for prefix in prefixes], "xml:lang", "xml:space"])))
    words = []
    for name in names:
        quote = draw(st.sampled_from("'\""))
        value = "".join(draw(st.lists(st.sampled_from([*VALUES, "\"'".replace(quote, "")]), max_size=3)))
        words.append(f"{draw(st.sampled_from([' ', '  ', chr(10)]))}{name}={quote}{value}{quote}")
    return "".join(words)


@st.composite
def element_texts(draw: st.DrawFn, name: str = "", prefixes: tuple[str, ...] = (), depth: int = 0) -> str:
    """An element as somebody may write it: prefixes, quotes, white space and all."""
    declared = draw(st.lists(st.sampled_from("pq"), unique=True, max_size=2)) if draw(st.booleans()) else []
    known = sorted({*prefixes, *declared})
    words = "".join(f" xmlns:{prefix}='{draw(st.sampled_from(URIS))}'" for prefix in declared)
    if not name:
        prefix = draw(st.sampled_from(["", "", "", "xml:", *[f"{prefix}:" for prefix in known]]))
        name = prefix + draw(st.sampled_from(NAMES))
        if draw(st.booleans()):
            words += f" xmlns='{draw(st.sampled_from(['', *URIS]))}'"
    words += draw(attribute_texts(known))
    children = st.one_of(st.sampled_from(TEXTS), element_texts(prefixes=tuple(known), depth=depth + 1))
    inside = "".join(draw(st.lists(children if depth < 3 else st.sampled_from(TEXTS), max_size=3)))
    return f"<{name}{words}>{inside}</{name}>" if inside or draw(st.booleans()) else f"<{name}{words} />"


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A stream header, perhaps with a prefix that stanzas rely on, and what follows it."""
    more = draw(st.sampled_from(["", "", " xmlns:db='jabber:server:dialback'", " xmlns:h='urn:h'"]))
    inherited = ("h",) if ":h=" in more else ()
    stanza = st.sampled_from(["message", "presence", "iq"]).flatmap(lambda name: element_texts(name, inherited))
    other = element_texts(prefixes=inherited)
    follows = draw(st.lists(st.one_of(stanza, stanza, other, st.sampled_from([" ", "\n\r\n"])), min_size=1, max_size=4))
    return HEADER.replace(" to=", f"{more} to="), follows


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(documents(), st.lists(st.integers(0, 10_000), max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_split_of_the_bytes_gives_the_same_stanzas_and_the_same_output(document, places) -> None:
    data = (document[0] + "".join(document[1])).encode()
    whole = [shown(event) for event in events_of(StreamParser(), [data])]
    assert [shown(event) for event in events_of(StreamParser(), cut(data, places))] == whole
    assert [shown(event) for event in events_of(StreamParser(), cut(data, range(len(data))))] == whole
    assert [shown(event) for event in drowsy(StreamParser(), cut(data, places))] == whole
    assert [shown(event) for event in drowsy(StreamParser(), cut(data, range(len(data))))] == whole


@given(documents(), st.sampled_from([CLIENT, SERVER, COMPONENT]))
@settings(max_examples=120, deadline=None)
def test_copied_bytes_mean_the_same_on_every_stream_as_what_the_serializer_writes(document, namespace) -> None:
    """RFC6120-4.8.3-2, RFC6120-4.8.5-2, RFC6120-4.8.5-3, RFC6120-8.4-1, RFC6120-11.4-1"""
    events = events_of(StreamParser(), [(document[0] + "".join(document[1])).encode()])
    stanzas = [event for event in events if isinstance(event, Stanza)]
    for stanza in stanzas:
        header = f"<stream:stream xmlns='{namespace}' {STREAM}>".encode()
        rewritten = Stanza(stanza.tag, stanza.attrib)
        rewritten.text, rewritten[:] = stanza.text, list(stanza)
        for wire in (stanza.wire(), rewritten.wire()):
            assert b"stream:" not in wire or b"<stream:" not in wire  # no prefix of the header's
            _, came = events_of(StreamParser(namespace), [header, wire])
            assert isinstance(came, Stanza), (wire, came)
            assert infoset(came) == infoset(without_other_content_namespaces(stanza, namespace))


def without_other_content_namespaces(element: Element, namespace: str) -> Element:
    """What a stream makes of an element: its content namespace is jabber:client in here (chapter 3)."""

    def tag(name: str) -> str:
        return name.replace(f"{{{namespace}}}", f"{{{CLIENT}}}") if namespace != CLIENT else name

    copy = Element(tag(element.tag), {tag(key): value for key, value in element.attrib.items()})
    copy.text, copy.tail = element.text, element.tail
    copy.extend(without_other_content_namespaces(child, namespace) for child in element)
    return copy


@given(documents(), st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), min_size=1, max_size=3),
       st.lists(st.integers(0, 10_000), max_size=8))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_damaged_input_ends_in_one_error_wherever_it_is_cut(document, damages, places) -> None:
    """RFC6120-11.3-1"""
    data = bytearray((document[0] + "".join(document[1])).encode())
    for at, replacement in damages:
        at %= len(data) + 1
        data[at : at + 1] = replacement
    whole = events_of(StreamParser(), [bytes(data)])
    pieces = events_of(StreamParser(), cut(bytes(data), places))
    # Which of two faults is met first may depend on the cut; that there is one does not.
    assert [is_error(event) or shown(event) for event in pieces] == [is_error(event) or shown(event) for event in whole]
    assert not any(is_error(event) for event in whole[:-1])


def is_error(event: object) -> bool:
    return isinstance(event, StreamError)


# -- passing on


@pytest.mark.parametrize(
    "text",
    [
        "<message><body>O\n Romeo</body></message>",
        "<message  type = \"chat\" to='a>b' ><body a=\"1\"  b='2' /></message>",
        "<message xmlns='jabber:client'><x xmlns='urn:x'><y xmlns=''/></x></message>",
        "<message><p:x xmlns:p='urn:x' p:a='1'>é &#233; &#xe9;</p:x></message>",
        "<message><body>jabber:client, jabber:server, xmlns:x, http://etherx.jabber.org/streams</body></message>",
        "<iq type='get'><query xmlns='jabber:iq:roster'/></iq>",
    ],
)
def test_the_senders_bytes_are_passed_on(text: str) -> None:
    """RFC6120-8.4-1, RFC6120-8.4-3"""
    stanza = read_one(text)
    content = text[text.index(">", text.index("to='a>b'") + 8 if "to='a>b'" in text else 0) + 1 : text.rindex("</")]
    assert stanza.content.decode() == content
    assert content.encode() in stanza.wire()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<c:message xmlns:c='jabber:client'><c:body>O</c:body></c:message>", "<message><body>O</body></message>"),
        ("<message xmlns:p='urn:p'><p:x a=\"1\"/></message>", "<message><x xmlns='urn:p' a='1'/></message>"),
        ("<message><body xmlns='jabber:client'>O</body></message>", "<message><body>O</body></message>"),
        ("<message><x xmlns='jabber&#58;client'/></message>", "<message><x/></message>"),
        ("<message><p:x xmlns:p='jabber:server'/></message>", "<message><x xmlns='jabber:server'/></message>"),
        ("<message><x xmlns='jabber:component:accept' a=\"\"/></message>", "<message><x xmlns='jabber:component:accept' a=''/></message>"),
        ("<message><body><![CDATA[</body>]]></body></message>", "<message><body>&lt;/body&gt;</body></message>"),
        ("<message><stream:features/></message>", "<message><features xmlns='http://etherx.jabber.org/streams'/></message>"),
        ("<message xml:lang='de' xml:space=\"preserve\"/>", "<message xml:lang='de' xml:space='preserve'/>"),
        ("<message xmlns:p='urn:p' p:a='1'/>", "<message xmlns:ns0='urn:p' ns0:a='1'/>"),
        ("<message><xml:x xml:id='1'><![CDATA[]]><y xmlns='urn:y'/></xml:x></message>", "<message><xml:x xml:id='1'><y xmlns='urn:y'/></xml:x></message>"),
        ("<message>a<x xmlns='urn:x'>b</x>c<![CDATA[&]]></message>", "<message>a<x xmlns='urn:x'>b</x>c&amp;</message>"),
    ],
)  # fmt: skip
def test_what_relies_on_its_stream_or_hides_something_is_written_anew(text: str, written: str) -> None:
    """RFC6120-4.8.5-2, RFC6120-4.8.5-3, S05"""
    assert read_one(text).wire().decode() == written


def test_a_prefix_declared_in_the_header_is_declared_again_where_it_is_needed() -> None:
    """RFC6120-4.8.5-3"""
    header = HEADER.replace(" to=", " xmlns:p='urn:p' to=")
    _, stanza = events_of(StreamParser(), [f"{header}<message><p:x/></message>".encode()])
    assert isinstance(stanza, Stanza)
    assert stanza.wire() == b"<message><x xmlns='urn:p'/></message>"


def test_one_stanza_says_nothing_about_the_next() -> None:
    _, second = read("<message xmlns:p='urn:p'><p:x/></message><message><body a=\"1\"/></message>")
    assert isinstance(second, Stanza)
    assert second.wire() == b'<message><body a="1"/></message>'


def test_another_content_namespace_is_jabber_client_inside() -> None:
    """RFC6120-4.8.3-2"""
    header = f"<stream:stream xmlns='jabber:server' {STREAM}>".encode()
    _, stanza = events_of(StreamParser(SERVER), [header, b"<message><body>O</body><x xmlns='u'/></message>"])
    assert isinstance(stanza, Stanza)
    assert stanza.tag == MESSAGE
    assert stanza[0].tag == CLIENT("body")
    assert stanza.wire() == b"<message><body>O</body><x xmlns='u'/></message>"


def test_changing_a_stanza_changes_what_is_written() -> None:
    stanza = read_one("<message to='a'><body a=\"1\"/><secret xmlns='u'/></message>")
    stanza.add(E(PING("ping")))
    assert stanza.wire() == b"<message to='a'><body a=\"1\"/><secret xmlns='u'/><ping xmlns='urn:xmpp:ping'/></message>"
    copy = stanza.addressed(to="b", sender="c<'")
    stanza.discard(lambda child: child.tag == "{u}secret")
    assert stanza.wire() == b"<message to='a'><body a='1'/><ping xmlns='urn:xmpp:ping'/></message>"
    assert copy.wire().startswith(b"<message to='b' from='c&lt;&apos;'><body a=\"1\"/><secret")
    stanza.discard(lambda child: True)
    assert stanza.wire() == b"<message to='a'/>"


@pytest.mark.parametrize("text", ["a&b<c>d", "\r\n", "]]>", "'\"", "é😀\u2028\x85"])
def test_what_is_escaped_is_read_back(text: str) -> None:
    element = E(BIND("jid"), {"a": text, "b": "\t\n x"}, text, E("empty"), text)
    back = parse_element(serialize(element))
    assert infoset(back) == infoset(element)


# -- what ends a stream


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("<!-- a comment -->", "restricted-xml"),
        ("<message><!----></message>", "restricted-xml"),
        ("<?php?>", "restricted-xml"),
        ("<message><?xml-stylesheet href='a'?></message>", "restricted-xml"),
        ("<?xml version='1.0'?>", "restricted-xml"),
        ("<message>&eacute;</message>", "restricted-xml"),
        ("<message to='&file;'/>", "restricted-xml"),
        ("<!DOCTYPE a>", "not-well-formed"),
        ("<message>&#0;</message>", "not-well-formed"),
        ("<message>&#x1F;</message>", "not-well-formed"),
        ("<message>\x00</message>", "not-well-formed"),
        ("<message>\x1b</message>", "not-well-formed"),
        ("<message>\ufffe</message>", "not-well-formed"),
        ("<message>\uffff</message>", "not-well-formed"),
        ("<message><p:x/></message>", "not-well-formed"),
        ("<message p:x='1'/>", "not-well-formed"),
        ("<a:b:c/>", "not-well-formed"),
        ("<message a='1' a='2'/>", "not-well-formed"),
        ("<message xmlns:p='u' xmlns:q='u' p:a='1' q:a='2'/>", "not-well-formed"),
        ("<message to='a>b'", None),
        ("<message to=a/>", "not-well-formed"),
        ("<message></presence>", "not-well-formed"),
        ("<message>]]></message>", "not-well-formed"),
        ("<message to='<'/>", "not-well-formed"),
        ("<message xmlns:p='urn:a}b'/>", "not-well-formed"),
        ("<message xmlns:p=''/>", "not-well-formed"),
        ("<message xmlns:xml='urn:a'/>", "not-well-formed"),
        ("<message xmlns:p='http://www.w3.org/XML/1998/namespace'/>", "not-well-formed"),
        ("text", "bad-format"),
        ("<![CDATA[text]]>", "bad-format"),
    ],
)  # fmt: skip
def test_what_xmpp_forbids_ends_the_stream(text: str, condition: str | None, size: int) -> None:
    """RFC6120-11.1-1, RFC6120-11.3-1, RFC6120-11.3-2, RFC6120-11.3-3, RFC6120-4.9.3.13-1, RFC6120-4.9.3.18-1, S04, S05"""
    events = read(f"<presence/>{text}<presence id='never'/>", size)
    assert [event.get("id") for event in events if isinstance(event, Element)] == [None]
    if condition:
        assert error_of(events) == condition


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    "text",
    [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\x80", b"\xc3<"],
    ids=[
        "overlong slash",
        "overlong in three",
        "surrogate",
        "beyond Unicode",
        "no UTF-8 at all",
        "tail only",
        "cut short",
    ],
)
def test_only_utf_8_comes_in(text: bytes, size: int) -> None:
    """RFC6120-11.6-1, S05"""
    assert error_of(read(b"<message><body>" + text + b"</body></message>", size)) == "not-well-formed"


@pytest.mark.parametrize("size", [0, 1, 2, 3])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_utf_16_is_refused_however_it_comes(encoding: str, size: int) -> None:
    """RFC6120-11.6-1, RFC6120-4.9.3.22-1"""
    data = HEADER.encode(encoding)
    step = size or len(data)
    events = events_of(StreamParser(), [data[at : at + step] for at in range(0, len(data), step)])
    assert error_of(events) == "unsupported-encoding"


@pytest.mark.parametrize(
    ("declaration", "condition"),
    [
        ("<?xml version='1.0' encoding='UTF-8'?>", None),
        ("<?xml version='1.0' encoding='utf-8' standalone='yes'?>", None),
        ("<?xml version='1.0' standalone='no'?>", None),
        (" \r\n<?xml version='1.0'?>", None),
        ("", None),
        ("<?xml version='1.0' encoding='iso-8859-1'?>", "unsupported-encoding"),
        ("<?xml version='1.0' encoding='UTF-16'?>", "unsupported-encoding"),
        ("<?xml version='1.0' encoding='klingon'?>", "unsupported-encoding"),
        ("\ufeff<?xml version='1.0'?>", "not-well-formed"),
        ("<!-- -->", "restricted-xml"),
        ("<?pi?>", "restricted-xml"),
    ],
)
def test_the_declaration_in_front(declaration: str, condition: str | None) -> None:
    """RFC6120-11.5-1, RFC6120-11.6-1, RFC6120-4.9.3.22-1"""
    header = HEADER.removeprefix("<?xml version='1.0'?>")
    events = events_of(StreamParser(), [(declaration + header).encode()])
    if condition:
        assert error_of(events) == condition
    else:
        assert isinstance(events[0], Opened)
        assert len(events) == 1


def test_a_byte_order_mark_inside_is_an_ordinary_character() -> None:
    """RFC6120-11.6-1"""
    assert xmppd.child_text(read_one("<message><body>\ufeffO</body></message>"), CLIENT("body")) == "\ufeffO"


LAUGHS = "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 10))


@pytest.mark.parametrize(
    "attack",
    [
        f"<!DOCTYPE x [<!ENTITY l0 'lol'>{LAUGHS}]>{HEADER}<message>&l9;</message>",
        f"<!DOCTYPE x [<!ENTITY l0 'lol'>{LAUGHS}]>{HEADER}<message to='&l9;'/>",
        f"<!DOCTYPE x [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>{HEADER}<message>&x;</message>",
        f"<!DOCTYPE x SYSTEM 'http://127.0.0.1/evil.dtd'>{HEADER}",
        "<!DOCTYPE x [",
    ],
    ids=["S01 laughs", "S02 in an attribute", "S03 external entity", "external subset", "at its first word"],
)  # fmt: skip
def test_a_document_type_ends_the_stream_before_it_is_read(attack: str) -> None:
    """RFC6120-11.1-1, RFC6120-4.9.3.18-1, S01, S02, S03"""
    data = attack.replace("<?xml version='1.0'?>", "").encode()
    tracemalloc.start()
    try:
        events = events_of(StreamParser(), [data])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [event.condition for event in events if isinstance(event, StreamError)] == ["restricted-xml"]
    assert len(events) == 1
    assert peak < 1_000_000


# -- limits


def endless(start: str, piece: str) -> Iterator[bytes]:
    """A stream that begins well and never ends."""
    yield (HEADER + start).encode()
    for _ in range(10_000):
        yield piece.encode() * 100


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        ("<message to='", "a"),
        ("<message ", " "),
        ("<message><body>", "text "),
        ("<message><body>", "é"),
        ("<message><body>", " "),
        ("<message><body>", "&lt;"),
        ("<message", "a"),
        ("<message><!--", "a"),
        ("<message><![CDATA[", "a"),
        ("<message>&", "a"),
        ("<message></", "a"),
        ("<message>", "<x/>"),
        ("<message>", "<x>"),
        ("<message ", "a='' "),
    ],
)
@pytest.mark.parametrize("size", [1024, 7])
def test_what_never_ends_is_ended_within_the_limit(start: str, piece: str, size: int) -> None:
    """RFC6120-13.12-2, RFC6120-4.9.3.14-1, S07, S09"""
    parser, sent = StreamParser(max_stanza=8192, max_elements=200), 0
    tracemalloc.start()
    try:
        for data in endless(start, piece):
            for at in range(0, len(data), size):
                parser.feed(data[at : at + size])
            sent += len(data)
            while isinstance(event := parser.next(), Opened):
                pass
            if isinstance(event, StreamError) or sent > 50_000:
                break
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(event, StreamError)
    assert event.condition in ("policy-violation", "not-well-formed")
    assert event.condition == "policy-violation" or piece == "a='' "  # a second `a` is no XML
    assert sent < 3 * 8192
    assert peak < 500_000


@pytest.mark.parametrize(
    ("text", "good"),
    [  # the namespace counts with a name: jabber:client has 13 characters
        (f"<message><body>{'a' * 9968}</body></message>", True),
        (f"<message><body>{'a' * 9969}</body></message>", False),
        (f"<message>{'<x/>' * 31}</message>", True),
        (f"<message>{'<x/>' * 32}</message>", False),
        (f"<message>{'<x>' * 63}{'</x>' * 63}</message>", True),
        (f"<message>{'<x>' * 64}{'</x>' * 64}</message>", False),
        ("<message {}/>".format(" ".join(f"a{n}=''" for n in range(64))), True),
        ("<message {}/>".format(" ".join(f"a{n}=''" for n in range(65))), False),
        (f"<message><{'a' * 1010}/></message>", True),
        (f"<message><{'a' * 1011}/></message>", False),
        (f"<message {'a' * 1025}=''/>", False),
        (f"<message><x xmlns='{'a' * 1025}'/></message>", False),
    ],
)
def test_the_limits_are_exact(text: str, good: bool) -> None:
    """RFC6120-13.12-2, S07, S09: a stanza's size is that from its first `<` to its last `>`."""
    elements = 32 if "<x/>" in text else 1000
    for size in (0, 1000):
        events = read("<presence/>" + text + "<presence/>", size, max_stanza=10_000, max_elements=elements)
        if good:
            assert len(events) == 3
        else:
            assert error_of(events) == "policy-violation"
            assert len(events) == 2


def test_limits_hold_for_each_stanza_not_for_the_stream() -> None:
    text = f"<message><body>{'a' * 5000}</body></message>" * 20 + "<iq><a/><b/></iq>" * 100 + " " * 20_000
    assert len(read(text, 0, max_stanza=6000, max_elements=10)) == 120
    assert len(read(text, 777, max_stanza=6000, max_elements=10)) == 120


def test_a_stream_cannot_fill_the_memory_with_names() -> None:
    """S07: expat remembers every name that it meets."""
    parser = StreamParser()
    parser.feed(HEADER.encode())
    for number in range(20_000):
        parser.feed(f"<message><n{number} xmlns='urn:{number % 50}'/></message>".encode())
        while isinstance(event := parser.next(), Opened | Stanza):
            pass
        if event is not None:
            break
    assert isinstance(event, StreamError)
    assert event.condition == "policy-violation"
    assert number > 3000


def test_a_stream_cannot_fill_the_memory_with_prefixes() -> None:
    """S07"""
    text = "".join(f"<message xmlns:p{number}='urn:p'/>" for number in range(2000))
    assert error_of(read(text)) == "policy-violation"


def test_white_space_costs_nothing_for_ever() -> None:
    """RFC6120-11.7-1, RFC6120-4.6.4-1, S07"""
    parser = StreamParser(max_stanza=8192)
    assert events_of(parser, [b" " * 1000] * 1000) == []
    assert len(events_of(parser, [HEADER.encode(), b"<presence/>"])) == 2
    tracemalloc.start()
    try:
        assert events_of(parser, [b" \n" * 1000] * 1000) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert len(events_of(parser, [b"<presence/>"])) == 1


@pytest.mark.parametrize("value", ["a", ">", "'"])
def test_a_tag_in_single_bytes_costs_no_more_than_its_length(value: str) -> None:
    """S08"""
    data = (HEADER + f'<message to="{value * 200_000}"/>').encode()
    began = time.process_time()
    events = events_of(StreamParser(), [data[at : at + 1] for at in range(len(data))])
    assert time.process_time() - began < 5  # [measured: 0.3 seconds; 30 if expat sees the tag anew for each byte]
    assert isinstance(events[0], Opened)


@pytest.mark.parametrize("length", [1, 10, 63, 64, 65, 66, 100, 130, 131, 132, 1000, 8000])
def test_a_stanza_is_there_with_its_last_byte(length: int) -> None:
    """RFC6120-8-1, S08: neither before its closing tag, nor later."""
    parser = StreamParser()
    parser.feed(HEADER.encode())
    parser.next()
    data = f"<message to='{'a' * length}'><body x=\"{'>' * min(length, 100)}\">O</body></message>".encode()
    for at in range(len(data) - 1):
        parser.feed(data[at : at + 1])
        assert parser.next() is None
    parser.feed(data[-1:])
    assert isinstance(parser.next(), Stanza)


def test_nesting_is_no_recursion_too_deep() -> None:
    """S09"""
    assert error_of(read("<message>" + "<a>" * 100_000)) == "policy-violation"
    deepest = read_one("<message><![CDATA[]]>" + "<a>" * 63 + "</a>" * 63 + "</message>")
    assert len(read(deepest.wire().decode())) == 1


# -- the life of a parser


def test_what_stands_in_front_of_an_error_is_not_lost() -> None:
    events = read("<message id='1'/><message id='2'/><message></x>")
    assert [type(event) for event in events] == [Stanza, Stanza, StreamError]


def test_nothing_is_read_behind_an_error_or_the_end() -> None:
    """RFC6120-4.9.1.1-1"""
    parser = StreamParser()
    assert error_of(events_of(parser, [HEADER.encode(), b"<!-- -->", b"<presence/>", b"<!-- -->"])) == "restricted-xml"
    assert parser.next() is None
    assert [type(event) for event in read("</stream:stream><presence/>")] == [Closed]
    assert [type(event) for event in read("</stream:stream>\n")] == [Closed]


def test_the_rest_of_a_read_belongs_to_the_next_stream() -> None:
    """RFC6120-4.3.3-1"""
    parser = StreamParser()
    parser.feed((HEADER + "<auth xmlns='urn:a'/>" + HEADER + "<presence/>").encode())
    assert isinstance(parser.next(), Opened)
    assert isinstance(parser.next(), Element)
    assert parser.rest() == (HEADER + "<presence/>").encode()
    parser.feed(b"<iq/>")
    assert parser.rest() == (HEADER + "<presence/><iq/>").encode()


def test_a_silent_stream_needs_no_parser_and_goes_on_as_if_it_had_one() -> None:
    parser = StreamParser(max_stanza=200)
    pieces = [HEADER, "<message><body>a &lt; b</body></message>\n", "<presence", "/>", " ", "<iq><x xmlns='urn:a'/></iq>"]
    assert [shown(event) for event in drowsy(parser, [piece.encode() for piece in pieces])] == [
        shown(event) for event in events_of(StreamParser(), ["".join(pieces).encode()])]  # fmt: skip
    parser.feed(b"<presence")
    assert not parser.doze()  # in the middle of a stanza
    parser.feed(b"/><pre")
    assert not parser.doze()  # with a stanza that nobody has taken
    assert isinstance(parser.next(), Stanza)
    parser.feed(b"sence/>")
    assert isinstance(parser.next(), Stanza)
    assert parser.doze()
    assert not parser.doze()  # twice
    assert error_of(drowsy(parser, [b"<message>", b"x" * 200])) == "policy-violation"  # the limits are what they were


def test_a_header_is_remembered_with_its_prefixes() -> None:
    header = f"<s:stream xmlns:s='http://etherx.jabber.org/streams' xmlns:a='urn:a' xmlns='jabber:client' {STREAM}>"
    stanza = "<message><a:b/></message>"
    pieces = [header.encode(), stanza.encode(), stanza.encode(), b"</s:stream>"]
    assert [shown(event) for event in drowsy(StreamParser(), pieces)] == [
        shown(event) for event in events_of(StreamParser(), pieces)]  # fmt: skip


def test_a_closed_parser_is_gone_without_a_garbage_collection() -> None:
    """S10"""
    parser = StreamParser()
    parser.feed((HEADER + "<message><body>").encode())
    gone = weakref.ref(parser)
    parser.close()
    parser.feed(b"</body></message>")
    assert isinstance(parser.next(), Opened)
    assert parser.next() is None
    del parser
    assert gone() is None


# -- answers


@pytest.mark.parametrize(
    ("condition", "kind", "code"),
    [
        ("bad-request", "modify", 400),
        ("conflict", "cancel", 409),
        ("feature-not-implemented", "cancel", 501),
        ("forbidden", "auth", 403),
        ("gone", "cancel", 302),
        ("internal-server-error", "cancel", 500),
        ("item-not-found", "cancel", 404),
        ("jid-malformed", "modify", 400),
        ("not-acceptable", "modify", 406),
        ("not-allowed", "cancel", 405),
        ("not-authorized", "auth", 401),
        ("payment-required", "auth", 402),
        ("policy-violation", "modify", 405),
        ("recipient-unavailable", "wait", 404),
        ("redirect", "modify", 302),
        ("registration-required", "auth", 407),
        ("remote-server-not-found", "cancel", 404),
        ("remote-server-timeout", "wait", 504),
        ("resource-constraint", "wait", 500),
        ("service-unavailable", "cancel", 503),
        ("subscription-required", "auth", 407),
        ("undefined-condition", "cancel", 500),
        ("unexpected-request", "wait", 400),
    ],
)
def test_every_error_has_a_condition_a_type_and_its_old_number(condition: str, kind: str, code: int) -> None:
    """XEP0086-2-1, XEP0086-2-2, RFC3920-9.3.3-1, RFC6120-8.3.2-1, RFC6120-8.3.3-1"""
    error = error_element(StanzaError(condition, "No.", application=E("{urn:app}more")), by="example.org")
    assert error.attrib == {"type": kind, "code": str(code), "by": "example.org"}
    assert [child.tag for child in error] == [STANZA_ERRORS(condition), STANZA_ERRORS("text"), "{urn:app}more"]
    assert error[1].get(XML_LANG) == "en"


def test_the_table_of_conditions_is_complete() -> None:
    assert len(xmppd.STANZA_CONDITIONS) == 23


@pytest.mark.parametrize(
    ("content", "condition"),
    [
        ("<error type='cancel'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>", "gone"),
        ("<error code='404' type='auth'><text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/><forbidden xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>", "forbidden"),
        ("<error code='404'>Not Found</error>", "item-not-found"),
        ("<error code='502'/>", "service-unavailable"),
        ("<error code='510'/>", "service-unavailable"),
        ("<error code='999'/>", ""),
        ("<error/>", ""),
        ("<body/>", ""),
    ],
)  # fmt: skip
def test_an_error_that_has_only_a_number_has_a_condition(content: str, condition: str) -> None:
    """XEP0086-3-1"""
    message = parse_element(f"<message type='error'>{content}</message>")
    assert isinstance(message, Stanza)
    assert xmppd.error_condition(message) == condition


def test_every_number_means_a_condition_of_that_number() -> None:
    """XEP0086-3-1: but for those that are younger than the numbers, or say what came from elsewhere"""
    for number, condition in xmppd.NUMBERED_CONDITIONS.items():
        assert str(xmppd.STANZA_CONDITIONS[condition].code) == number or number in ("408", "502", "510")


def test_an_error_goes_back_where_the_stanza_came_from_without_its_content() -> None:
    """RFC6120-8.3.1-1, RFC6120-8.3.1-3, RFC6120-8.1.3-1, XEP0078-3.1-11"""
    request = parse_element(
        "<iq type='set' id='a&lt;1' to='b@c/d' from='e@f/g' xml:lang='de'><query xmlns='jabber:iq:auth'><password>x</password></query></iq>"
    )
    assert isinstance(request, Stanza)
    reply = error_reply(request, StanzaError("not-allowed"))
    assert reply.tag == IQ
    assert reply.attrib == {"type": "error", "id": "a<1", "to": "e@f/g", "from": "b@c/d"}
    assert [child.tag for child in reply] == [CLIENT("error")]
    bare = error_reply(Stanza(MESSAGE), StanzaError("not-allowed"))
    assert bare.attrib == {"type": "error"}


# -- stamps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1969-07-21T02:56:15Z", "1969-07-21T02:56:15Z"),
        ("1969-07-20T21:56:15-05:00", "1969-07-21T02:56:15Z"),
        ("1969-07-21T02:56:15.123456Z", "1969-07-21T02:56:15Z"),
        ("1969-07-21T02:56:15.1+00:00", "1969-07-21T02:56:15Z"),
    ],
)
def test_stamps_are_read_as_utc(text: str, expected: str) -> None:
    """XEP-0082 §3.2"""
    assert stamp(parse_stamp(text)) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "1969-07-21T02:56:15", "20020910T23:08:25", "1969-13-21T02:56:15Z"])
def test_what_is_no_stamp_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_stamp(text)


def test_a_stamp_is_seconds_since_1970() -> None:
    assert stamp(0) == "1970-01-01T00:00:00Z"
    assert abs(parse_stamp(stamp()).timestamp() - time.time()) < 5


# -- elements that this server keeps


def test_documents_are_read_under_the_same_rules() -> None:
    """S04"""
    assert parse_element("<body>O</body>").tag == CLIENT("body")
    for text, condition in (("<!-- -->", "restricted-xml"), ("<a/><b/>", "bad-format"), ("", "bad-format"), ("<a>", "bad-format"), ("</stream>", "bad-format")):  # fmt: skip
        with pytest.raises(StreamError) as refused:
            parse_element(text)
        assert refused.value.condition == condition
