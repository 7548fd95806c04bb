"""The vocabulary of the tests is tested itself: a matcher that takes everything would prove nothing."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from collections import deque

import pytest

from tests import dialogue
from tests.dialogue import Cast, Client, Scram, StreamReader, difference, parse

HEADER = (
    "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' "
    "from='example.org' id='s1' version='1.0'>"
)


def matches(expected: str, actual: str) -> bool:
    [pattern], [element] = parse(expected), parse(actual)
    return not difference(pattern, element)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("<message id='1' to='a'/>", "<message to='a' id='1'></message>"),
        ("<message/>", "<c:message xmlns:c='jabber:client'/>"),
        ("<message id='*'/>", "<message id='any &lt; thing'/>"),
        ("<presence from='romeo@example.org/*'/>", "<presence from='romeo@example.org/orchard'/>"),
        ("<message><body>*</body></message>", "<message><body>O Romeo,\n Romeo!</body></message>"),
        ("<message><body>*</body></message>", "<message><body/></message>"),
        ("<message><body>O *!</body></message>", "<message><body>O Romeo!</body></message>"),
        ("<message>\n  <body>O</body>\n</message>", "<message><body>O</body></message>"),
        ("<message><body>O</body></message>", "<message>\n<body>O</body>\n</message>"),
        ("<message><body>O</body><thread>t</thread></message>", "<message><thread>t</thread><body>O</body></message>"),
        ("<error><conflict .../></error>", "<error><conflict xmlns='urn:any' by='x'/></error>"),
        ("<error><conflict xmlns='urn:a' .../></error>", "<error><conflict xmlns='urn:a' by='x'/></error>"),
        ("<iq ...><a xmlns='u'/></iq>", "<iq type='result' id='1'><a xmlns='u'/></iq>"),
        ("<iq><query ...><item jid='a'/></query></iq>", "<iq><query xmlns='u' ver='1'><item jid='a'/></query></iq>"),
        ("<iq><query xmlns='u'>...</query></iq>", "<iq><query xmlns='u'>text<item jid='a'/></query></iq>"),
        ("<iq><query xmlns='u'>...</query></iq>", "<iq><query xmlns='u'/></iq>"),
        ("<message subject='a > b ...'/>", "<message subject='a > b ...'/>"),
        ("<stream:features/>", "<features xmlns='http://etherx.jabber.org/streams'/>"),
        ("<m xmlns='u'>O <b>my</b> dear</m>", "<m xmlns='u'>O <b>my</b> dear</m>"),
    ],
)
def test_what_fits(expected: str, actual: str) -> None:
    assert matches(expected, actual)


@pytest.mark.parametrize(
    ("expected", "actual", "why"),
    [
        ("<message/>", "<presence/>", "got <{jabber:client}presence>"),
        ("<message/>", "<message xmlns='jabber:server'/>", "got <{jabber:server}message>"),
        ("<message to='a'/>", "<message/>", "expected to='a', got none"),
        ("<message to='*'/>", "<message/>", "expected to='*', got none"),
        ("<message to='a'/>", "<message to='b'/>", "expected to='a', got 'b'"),
        ("<message/>", "<message to='b'/>", "unexpected to='b'"),
        ("<presence from='romeo@example.org/*'/>", "<presence from='romeo@example.org'/>", "got 'romeo@example.org'"),
        ("<message from='a.b'/>", "<message from='aXb'/>", "got 'aXb'"),
        ("<message><body>O</body></message>", "<message/>", "no <body> in 'jabber:client'"),
        ("<message/>", "<message><body/></message>", "unexpected <body/>"),
        ("<message ...><body/></message>", "<message a='1'><body>text</body></message>", "expected the text ''"),
        ("<message><body>O</body></message>", "<message><body> O</body></message>", "got ' O'"),
        ("<message><a .../></message>", "<message><a xmlns='u'><b/></a></message>", "unexpected <b"),
        ("<message><a xmlns='v' .../></message>", "<message><a xmlns='u'/></message>", "no <a> in 'v'"),
        ("<iq><q ...>...</q></iq>", "<iq><q2 xmlns='u'/></iq>", "no <q>"),
        ("<r><i>1</i><i>2</i></r>", "<r><i>2</i><i>1</i></r>", "expected the text '1', got '2'"),
        ("<r><i/><i/></r>", "<r><i/></r>", "no <i>"),
        ("<m xmlns='u'>O <b>my</b> dear</m>", "<m xmlns='u'>O <b>my</b> foe</m>", "got 'O  foe'"),
    ],
)
def test_what_does_not_fit_and_why(expected: str, actual: str, why: str) -> None:
    [pattern], [element] = parse(expected), parse(actual)
    assert why in difference(pattern, element)


def test_a_mistake_in_the_tests_own_xml_is_told() -> None:
    with pytest.raises(ValueError, match="not well-formed"):
        parse("<message>")


def test_any_split_of_the_bytes_gives_the_same_stanzas() -> None:
    text = HEADER + "<message to='é'><body>a&lt;b<i xmlns='u'>c</i>d</body>e</message> <presence/></stream:stream>"
    data = text.encode()
    whole = [(kind, ET.tostring(element)) for kind, element in StreamReader().feed(data)]
    for size in (1, 2, 3, 7):
        reader = StreamReader()
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        events = [event for part in parts for event in reader.feed(part)]
        kinds = [(kind, ET.tostring(element)) for kind, element in events]
        assert [kind for kind, _ in kinds] == ["header", "stanza", "stanza", "footer"]
        assert kinds[1:3] == whole[1:3]


def test_a_failure_shows_namespaces_as_a_reader_likes_them() -> None:
    [stanza] = parse("<iq type='get'><query xmlns='jabber:iq:roster' .../></iq>")
    shown = dialogue.show(stanza)
    assert shown == "<iq type=\"get\">\n  <query xmlns='jabber:iq:roster' .../>\n</iq>"


# ---- the verbs, against a server that says what the test tells it ----------------------


class Script:
    """A wire whose server answers pings and otherwise says only what `says` was given."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.coming: deque[bytes] = deque([HEADER.encode()])

    def says(self, text: str) -> None:
        self.coming.append(text.encode())

    def send(self, data: bytes) -> None:
        self.sent.append(data.decode())
        if "urn:xmpp:ping" in data.decode():
            name = parse(data.decode())[0].get("id")
            self.says(f"<iq type='result' from='example.org' id='{name}'/>")

    def read(self, timeout: float) -> bytes | None:
        return self.coming.popleft() if self.coming else None

    def start_tls(self, host: str) -> None:
        self.sent.append(f"TLS with {host}")

    def bindings(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None:
        self.coming.clear()


class Scene:
    """Romeo, bound, on a scripted wire."""

    def __init__(self) -> None:
        self.cast = Cast()
        self.wire = Script()
        self.romeo = Client(lambda: self.wire, self.cast).connect()
        self.romeo.receives_stream_header()
        self.romeo.jid = "romeo@example.org/orchard"


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_stanzas_are_expected_in_their_order(scene: Scene) -> None:
    scene.wire.says("<message id='1'/><message id='2'/>")
    scene.romeo.receives("<message id='1'/>", "<message id='2'/>")
    scene.wire.says("<message id='1'/><message id='2'/>")
    with pytest.raises(AssertionError, match="expected id='2', got '1'"):
        scene.romeo.receives("<message id='2'/><message id='1'/>")


def test_in_any_order_still_means_each_exactly_once(scene: Scene) -> None:
    scene.wire.says("<message id='1'/><message id='2'/>")
    came = scene.romeo.receives_in_any_order("<message id='2'/>", "<message id='1'/>")
    assert [stanza.get("id") for stanza in came] == ["1", "2"]
    scene.wire.says("<message id='1'/><message id='1'/>")
    with pytest.raises(AssertionError, match="expected id='2', got '1'"):
        scene.romeo.receives_in_any_order("<message id='2'/>", "<message id='1'/>")


def test_a_missing_stanza_is_a_failure(scene: Scene) -> None:
    with pytest.raises(AssertionError, match="nothing came"):
        scene.romeo.receives("<message/>")


def test_nothing_means_nothing_before_the_barrier(scene: Scene) -> None:
    scene.romeo.receives_nothing()
    scene.wire.says("<presence from='juliet@example.org/balcony'/>")
    with pytest.raises(AssertionError, match="expected nothing, got:\n<presence"):
        scene.romeo.receives_nothing()
    scene.romeo.receives("<presence from='juliet@example.org/balcony'/>")
    scene.romeo.receives_nothing()


def test_what_is_left_unread_is_a_failure_at_the_end(scene: Scene) -> None:
    scene.wire.says("<message id='1'/>")
    with pytest.raises(AssertionError, match="still unread:\n<message"):
        scene.cast.leave()


def test_an_end_of_the_connection_that_nobody_expects_is_a_failure_at_the_end(scene: Scene) -> None:
    scene.wire.says("")
    with pytest.raises(AssertionError, match="end-of-connection"):
        scene.cast.leave()


def test_a_failure_shows_what_else_came_and_the_conversation(scene: Scene) -> None:
    scene.romeo.sends("<presence/>")
    scene.wire.says("<message id='1'/><message id='2'/>")
    with pytest.raises(AssertionError) as failure:
        scene.romeo.receives("<presence/>")
    told = str(failure.value)
    assert 'still unread:\n<message id="2"/>' in told
    assert "C: <presence/>" in told


def test_the_receivers_own_address_goes_without_saying(scene: Scene) -> None:
    scene.wire.says("<message to='romeo@example.org/orchard'/><message to='romeo@example.org'/><message to='other'/>")
    scene.romeo.receives("<message/><message/>")
    with pytest.raises(AssertionError, match="unexpected to='other'"):
        scene.romeo.receives("<message/>")


def test_an_answer_comes_from_where_the_request_went(scene: Scene) -> None:
    scene.romeo.sends("<iq type='get' id='a' to='juliet@example.org'><q xmlns='u'/></iq>")
    scene.wire.says("<iq type='result' id='a' from='juliet@example.org'/>" * 2 + "<iq type='result' id='a' from='x'/>")
    scene.romeo.receives("<iq type='result' id='a'/>")
    scene.romeo.receives("<iq type='result' id='a' from='juliet@example.org'/>")
    with pytest.raises(AssertionError, match="unexpected from='x'"):
        scene.romeo.receives("<iq type='result' id='a'/>")


def test_a_message_says_from_whom(scene: Scene) -> None:
    scene.romeo.sends("<message id='m' to='juliet@example.org'/>")
    scene.wire.says("<message id='m' from='juliet@example.org'/>")
    with pytest.raises(AssertionError, match="unexpected from="):
        scene.romeo.receives("<message id='m'/>")


ERROR = "<error type='cancel' code='503'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>{}</error>"
TEXT = "<text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'>No.</text>"


def test_an_error_may_carry_its_number_its_text_and_a_copy_of_the_request(scene: Scene) -> None:
    scene.romeo.sends("<iq type='get' id='a' to='x@example.org'><q xmlns='u'><i/></q></iq>")
    scene.wire.says(f"<iq type='error' id='a' from='x@example.org'><q xmlns='u'><i/></q>{ERROR.format(TEXT)}</iq>")
    scene.romeo.receives("<iq type='error' id='a'><error type='cancel'><service-unavailable .../></error></iq>")


def test_an_errors_number_is_checked_where_the_test_names_it(scene: Scene) -> None:
    scene.wire.says(f"<message type='error'>{ERROR.format('')}</message>")
    with pytest.raises(AssertionError, match="expected code='404', got '503'"):
        scene.romeo.receives("<message type='error'><error type='cancel' code='404'>...</error></message>")


def test_an_error_may_carry_nothing_else(scene: Scene) -> None:
    scene.romeo.sends("<iq type='get' id='a'><q xmlns='u'/></iq>")
    scene.wire.says(f"<iq type='error' id='a'><q xmlns='u' more='x'/>{ERROR.format('')}</iq>")
    with pytest.raises(AssertionError, match="unexpected <q"):
        scene.romeo.receives("<iq type='error' id='a'><error type='cancel'><service-unavailable .../></error></iq>")


def test_a_stream_error_and_the_end_behind_it(scene: Scene) -> None:
    error = "<stream:error><{0} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error></stream:stream>"
    scene.wire.says(error.format("policy-violation"))
    scene.wire.says("")
    scene.romeo.receives_stream_error("policy-violation")
    assert scene.romeo.is_closed()
    other = Scene()
    other.wire.says(error.format("conflict"))
    with pytest.raises(AssertionError, match="expected the stream error policy-violation"):
        other.romeo.receives_stream_error("policy-violation")


def test_features_are_compared_by_name(scene: Scene) -> None:
    features = "<stream:features><starttls xmlns='t'/><ver xmlns='v'/></stream:features>"
    scene.wire.says(features * 2)
    scene.romeo.receives_features("ver", "starttls")
    with pytest.raises(AssertionError, match="expected the features"):
        scene.romeo.receives_features("starttls")


def test_an_open_stream_is_not_closed(scene: Scene) -> None:
    scene.wire.says("<message/>")
    with pytest.raises(AssertionError, match="expected the end of the connection"):
        scene.romeo.is_closed()


def test_scram_gives_the_exchange_of_rfc_5802(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 5802 §5"""
    monkeypatch.setattr("secrets.token_urlsafe", lambda size: "fyko+d2lbbFgONRv9qkxdawL")
    scram = Scram("user", "pencil", "SCRAM-SHA-1", {})
    assert scram.first() == b"n,,n=user,r=fyko+d2lbbFgONRv9qkxdawL"
    nonce = "fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j"
    final = scram.final(f"r={nonce},s=QSXCR+Q6sek8bf92,i=4096".encode())
    assert final == f"c=biws,r={nonce},p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=".encode()
    assert scram.verifies(b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ=")
    assert not scram.verifies(b"v=" + base64.b64encode(bytes(20)))
