"""Streams (RFC 6120 §4, §5, §11): headers, features, restarts, errors, the end."""

from __future__ import annotations

import re

import pytest

import xmppd
from tests.dialogue import BIND, PATIENCE, SASL, STREAMS, TLS, Client, StreamReader, password_of

XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
HEADER = f"<stream:stream xmlns='jabber:client' xmlns:stream='{STREAMS}' to='example.org' version='1.0'>"
PING = "<iq type='get' id='p' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>"


def hears(client: Client, ending: str) -> str:
    """Return the server's bytes as they are, up to and including `ending`."""
    text = b""
    while ending.encode() not in text:
        data = client.wire.read(PATIENCE)
        assert data, f"no {ending} in {text!r}"
        text += data
    assert text.endswith(ending.encode()), text
    return text.decode()


def are_online(romeo: Client, juliet: Client) -> None:
    """Let both know that the other is there."""
    romeo.befriends(juliet)
    romeo.comes_online()
    juliet.comes_online()
    romeo.receives_anything()
    juliet.receives_anything()


def begins_stream(client: Client, text: str) -> None:
    """Send the first words of a new stream, good or bad."""
    client._reader = StreamReader()
    client.sends_raw(text)


@pytest.fixture
def client(server) -> Client:
    """Somebody who has just connected."""
    return server.client().connect()


@pytest.fixture
def secured(client) -> Client:
    """Somebody inside TLS, whose next word is a stream header."""
    client.negotiates()
    client.starts_tls()
    return client


@pytest.fixture
def authenticated(secured) -> Client:
    """Romeo after the login, with features, before binding."""
    secured.negotiates()
    secured.authenticates("romeo", password_of("romeo"))
    secured.negotiates()
    return secured


def test_the_ports_are_those_of_the_standard() -> None:
    """RFC6120-3.1-1"""
    listen = xmppd.Listen()
    ports = {name: {address.port for address in getattr(listen, name)} for name in ("client", "client_tls", "server")}
    assert ports == {"client": {5222}, "client_tls": {5223}, "server": {5269}}


# -- headers


def test_the_server_opens_its_own_stream_before_it_says_anything_else(client) -> None:
    """RFC6120-4.1-1, RFC6120-4.2-1, RFC6120-4.3.2-1, RFC6120-4.3.3-3, RFC6120-11.5-1"""
    client.sends_raw(f"<?xml version='1.0'?>{HEADER}")
    said = hears(client, "</stream:features>")
    assert re.match(r"<\?xml version='1\.0'\?><stream:stream [^>]*><stream:features>", said)


def test_the_header_says_who_we_are_in_which_language_and_version(client) -> None:
    """RFC6120-4.7.1-1, RFC6120-4.7.4-1, RFC6120-4.8.2-1, RFC6120-4.8.5-1, RFC6120-4.7.1-2, RFC6120-4.7.2-2"""
    client.sends_raw(HEADER)
    said = hears(client, "</stream:features>")
    assert "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'" in said
    client.disconnects()
    client.connect()
    client.opens_stream(xml_lang="de")
    header = client.receives_stream_header()
    assert {key: value for key, value in header.items() if key != "id"} == {
        "from": "example.org", "version": "1.0", XML_LANG: "en",
    }  # fmt: skip
    client.receives_features()


@pytest.mark.parametrize(
    ("sender", "expected"),
    [("romeo@example.org", "romeo@example.org"), ("Romeo@EXAMPLE.org/orchard", "romeo@example.org")],
)
def test_who_says_from_hears_to(client, sender: str, expected: str) -> None:
    """RFC6120-4.7.2-2"""
    client.opens_stream(from_=sender)
    assert client.receives_stream_header().get("to") == expected
    client.receives_features()


def test_every_stream_has_an_id_that_nobody_can_guess(server) -> None:
    """RFC6120-4.7.3-1, RFC6120-4.7.3-2, RFC6120-4.3.3-2, S32"""
    ids = []
    for _ in range(3):
        client = server.client().connect()
        client.opens_stream(id="mine")
        ids.append(client.receives_stream_header().get("id"))
        client.receives_features()
        client.starts_tls()
        client.opens_stream(id="mine")
        ids.append(client.receives_stream_header().get("id"))
        client.receives_features()
        client.authenticates("romeo", password_of("romeo"))
        client.opens_stream()
        ids.append(client.receives_stream_header().get("id"))
        client.receives_features()
    assert len(set(ids)) == 9
    assert all(len(id) >= 22 for id in ids)  # 128 bits in base64
    assert "mine" not in ids


def test_the_one_host_may_go_without_saying(server, client) -> None:
    """RFC6120-4.7.2-4, RFC6120-4.9.1.3-1: there are two hosts here."""
    client.opens_stream(to="")
    assert client.receives_stream_header().get("from") == "example.org"
    client.receives_stream_error("host-unknown")
    assert client.is_closed()


@pytest.mark.config(hosts=["example.org"])
def test_a_missing_to_means_the_only_host(client) -> None:
    """RFC6120-4.7.2-4, RFC3920-5-1"""
    client.opens_stream(to="")
    assert client.receives_stream_header().get("from") == "example.org"
    client.receives_features("starttls")


@pytest.mark.parametrize(
    ("attributes", "condition"),
    [
        ({"to": "example.com"}, "host-unknown"),
        ({"to": "conference.nowhere"}, "host-unknown"),
        ({"to": "a@b@c/"}, "improper-addressing"),
        ({"from_": "@/"}, "improper-addressing"),
        ({"version": "1"}, "unsupported-version"),
        ({"version": "one.zero"}, "unsupported-version"),
        ({"version": "-1.0"}, "unsupported-version"),
    ],
)
def test_what_is_wrong_in_a_header_is_said_behind_our_own(client, attributes: dict[str, str], condition: str) -> None:
    """RFC6120-4.9.1.2-1, RFC6120-4.9.1.3-1, RFC6120-4.9.3.6-1, RFC6120-4.7.5-3, RFC6120-4.9.3.25-1"""
    client.opens_stream(**attributes)
    header = client.receives_stream_header()
    assert header.get("from") in ("example.org", "example.net")
    assert header.get("id")
    client.receives_stream_error(condition)
    assert client.is_closed()


@pytest.mark.parametrize(
    ("header", "condition"),
    [
        (f"<stream xmlns='jabber:client' xmlns:stream='{STREAMS}' to='example.org' version='1.0'>", "invalid-namespace"),
        (f"<stream:flood xmlns='jabber:client' xmlns:stream='{STREAMS}' to='example.org'>", "bad-format"),
        ("<stream:stream xmlns='jabber:client' xmlns:stream='urn:mine' to='example.org'>", "invalid-namespace"),
        (f"<s:stream xmlns='jabber:client' xmlns:s='{STREAMS}' to='example.org' version='1.0'>", "bad-namespace-prefix"),
        (f"<stream xmlns='{STREAMS}' to='example.org' version='1.0'>", "bad-namespace-prefix"),
        (f"<stream:stream xmlns='jabber:server' xmlns:stream='{STREAMS}' to='example.org' version='1.0'>", "invalid-namespace"),
        (f"<stream:stream xmlns='jabber:component:accept' xmlns:stream='{STREAMS}' to='example.org'>", "invalid-namespace"),
        (f"<stream:stream xmlns:c='jabber:client' xmlns:stream='{STREAMS}' to='example.org'>", "invalid-namespace"),
        ("<?xml version='1.0' encoding='iso-8859-1'?>", "unsupported-encoding"),
        ("<!DOCTYPE stream [", "restricted-xml"),
        ("<!-- -->", "restricted-xml"),
        ("GET / HTTP/1.1\r\n\r\n", "not-well-formed"),
        ("\ufeff" + HEADER, "not-well-formed"),
        ("<a><b></a>", "invalid-namespace"),
    ],
)  # fmt: skip
def test_what_is_no_stream_of_a_client_is_refused(client, header: str, condition: str) -> None:
    """RFC6120-4.8.1-1, RFC6120-4.8.3-1, RFC6120-4.8.5-1, RFC6120-4.9.1.2-1, RFC6120-4.9.3.1-1, S01, S04"""
    client.sends_raw(header)
    client.receives_stream_header()
    client.receives_stream_error(condition)
    assert client.is_closed()


def test_utf_16_is_refused(client) -> None:
    """RFC6120-4.9.3.22-1, RFC6120-11.6-1"""
    client.sends_raw(HEADER.encode("utf-16"))
    client.receives_stream_error("unsupported-encoding")
    assert client.is_closed()


@pytest.mark.parametrize(
    ("theirs", "ours"), [("1.0", "1.0"), ("01.00", "1.0"), ("1.10", "1.0"), ("2.0", "1.0"), ("10.0", "1.0")]
)
def test_the_lower_version_counts(client, theirs: str, ours: str) -> None:
    """RFC6120-4.7.5-1"""
    client.opens_stream(version=theirs)
    assert client.receives_stream_header().get("version") == ours
    client.receives_features("starttls")


@pytest.mark.parametrize("version", [None, "0.9", "0.10"])
def test_a_peer_from_before_2004_gets_no_version_and_no_features(client, version: str | None) -> None:
    """RFC6120-4.7.5-2, RFC3920-5-1"""
    client.opens_stream(version=version)
    assert client.receives_stream_header().get("version") is None
    client.sends(f"<starttls xmlns='{TLS}'/>")  # nothing came in between
    client.receives(f"<proceed xmlns='{TLS}'/>")


def test_a_stranger_to_all_attributes_is_a_client_too(server) -> None:
    """RFC3920-5-1: without from, xml:lang and id."""
    client = server.client().connect()
    client.sends_raw(HEADER)
    client.receives_stream_header()
    client.receives_features("starttls")


# -- features and restarts


def test_before_tls_there_is_nothing_but_starttls(client) -> None:
    """RFC6120-5.3.1-1, RFC6120-5.4.1-1, RFC6120-4.3.2-2, RFC6120-7.4-1, RFC6120-6.3.4-1, RFC6120-13.3-1"""
    features = client.negotiates()
    [starttls] = features
    assert starttls.tag == f"{{{TLS}}}starttls"
    assert [child.tag for child in starttls] == [f"{{{TLS}}}required"]


def test_each_stage_offers_only_what_can_be_done_now(secured) -> None:
    """RFC6120-4.3.4-1, RFC6120-5.4.1-1, RFC6120-6.4.1-1, RFC6120-7.4-1, XEP-0440 §2, XEP-0478 §3.1"""
    secured.opens_stream()
    secured.receives_stream_header()
    features = secured.receives_features("mechanisms", "authentication", "auth", "limits", "sasl-channel-binding", *2 * ["register"])
    assert len(features.find(f"{{{SASL}}}mechanisms")) >= 5
    assert features.findtext("{urn:xmpp:stream-limits:0}limits/{urn:xmpp:stream-limits:0}max-bytes") == "8192"
    secured.authenticates("romeo", password_of("romeo"))
    secured.opens_stream()
    secured.receives_stream_header()
    features = secured.receives_features()
    names = [child.tag for child in features]
    assert f"{{{BIND}}}bind" in names
    assert not {f"{{{SASL}}}mechanisms", f"{{{TLS}}}starttls", "{http://jabber.org/features/iq-auth}auth"} & set(names)
    limits = features.find("{urn:xmpp:stream-limits:0}limits")
    assert limits.findtext("{urn:xmpp:stream-limits:0}max-bytes") == "262144"
    assert limits.findtext("{urn:xmpp:stream-limits:0}idle-seconds") == "300"


def test_a_restart_drops_the_old_stream_without_a_word(secured) -> None:
    """RFC6120-4.3.3-1, RFC6120-4.3.3-3, RFC6120-5.3.2-1, RFC6120-6.3.2-1, RFC6120-6.4.6-2"""
    secured.sends_raw(HEADER)
    assert hears(secured, "</stream:features>").startswith("<?xml version='1.0'?><stream:stream ")
    secured.sends_auth("PLAIN", b"\0romeo\0" + password_of("romeo").encode())
    assert hears(secured, ">") == f"<success xmlns='{SASL}'/>"
    secured.sends_raw(HEADER)
    assert hears(secured, "</stream:features>").startswith("<?xml version='1.0'?><stream:stream ")


def test_after_success_comes_a_header_and_nothing_else(secured) -> None:
    """RFC6120-6.4.6-2"""
    secured.negotiates()
    secured.authenticates("romeo", password_of("romeo"))
    begins_stream(secured, f"<iq type='set' id='b'><bind xmlns='{BIND}'/></iq>")
    secured.receives_stream_header()
    secured.receives_stream_error("invalid-namespace")
    assert secured.is_closed()


def test_a_client_in_a_hurry_may_send_its_next_header_with_its_password(secured) -> None:
    """RFC6120-4.3.3-1, RFC6120-10.1-1: what is behind <auth/> belongs to the next stream, also while a worker works."""
    secured.negotiates()
    secured.sends_auth("PLAIN", b"\0romeo\0" + password_of("romeo").encode())
    secured.sends_raw(f"\n<?xml version='1.0'?>{HEADER}<iq type='set' id='b'><bind xmlns='{BIND}'/></iq>")
    secured.receives(f"<success xmlns='{SASL}'/>")
    said = hears(secured, "</iq>")
    assert said.count("<stream:stream") == 1
    assert "romeo@example.org/" in said


def test_no_features_come_once_the_negotiation_is_over(romeo) -> None:
    """RFC6120-4.3.5-1, RFC6120-7.3.2-1"""
    romeo.receives_nothing()


@pytest.mark.parametrize("split", [1, 2, 3, 7, 100])
def test_a_whole_login_in_pieces_gives_the_same(server, juliet, split: int) -> None:
    romeo = server.client(split=split).login("romeo", resource="orchard")
    romeo.sends("<message to='juliet@example.org/balcony' type='chat'><body>é &lt; <![CDATA[>]]></body></message>")
    juliet.receives(
        "<message to='juliet@example.org/balcony' from='romeo@example.org/orchard' type='chat'><body>é &lt; &gt;</body></message>"
    )


# -- STARTTLS (RFC 6120 §5)


@pytest.mark.wire
def test_starttls_is_answered_by_proceed_and_not_a_byte_more(client) -> None:
    """RFC6120-5.2-1, RFC6120-5.3.3-1, RFC6120-5.4.2.1-1"""
    client.negotiates()
    client.sends_raw(f"<starttls xmlns='{TLS}'/>")
    assert hears(client, ">") == f"<proceed xmlns='{TLS}'/>"
    assert client.wire.read(0.2) is None


@pytest.mark.parametrize("stage", ["secured", "authenticated"])
def test_starttls_twice_fails_and_ends_the_stream(request, stage: str) -> None:
    """RFC6120-5.3.4-1, RFC6120-5.4.2.2-1, XEP-0368 §3: not inside TLS, and not after the login."""
    client = request.getfixturevalue(stage)
    if stage == "secured":
        client.negotiates()
    client.sends(f"<starttls xmlns='{TLS}'/>")
    client.receives(f"<failure xmlns='{TLS}'/>")
    assert client.is_closed()


@pytest.mark.parametrize(
    "injected",
    [
        "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>AHJvbWVvAHJvbWVvLXNlY3JldA==</auth>",
        "<iq type='set' id='a'><query xmlns='jabber:iq:auth'/></iq>",
        HEADER,
        "</stream:stream>",
        "\x16\x03\x01",
        "<",
    ],
)
def test_plain_text_behind_starttls_ends_the_stream(client, injected: str) -> None:
    """RFC6120-5.4.2.3-1, S20"""
    client.negotiates()
    client.sends_raw(f"<starttls xmlns='{TLS}'/>{injected}")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


def test_what_was_said_before_tls_is_forgotten(client) -> None:
    """RFC6120-5.4.3.3-1"""
    client.opens_stream(from_="juliet@example.org", xml_lang="it")
    client.receives_stream_header()
    client.receives_features()
    client.starts_tls()
    client.opens_stream()
    assert client.receives_stream_header().get("to") is None
    client.receives_features()
    client.authenticates("romeo", password_of("romeo"))
    client.negotiates()
    client.binds("orchard")
    client.sends("<message to='romeo@example.org/orchard'><body>O</body></message>")
    client.receives("<message to='romeo@example.org/orchard' from='romeo@example.org/orchard'><body>O</body></message>")


@pytest.mark.parametrize(
    "text",
    [
        "<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
        "<iq type='set' id='s'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>",
        "<message to='juliet@example.org'><body>O</body></message>",
        "<presence/>",
        PING,
        "<query xmlns='jabber:iq:roster'/>",
        "<r xmlns='urn:xmpp:sm:3'/>",
    ],
)
def test_before_tls_nothing_else_is_heard(client, juliet, text: str) -> None:
    """RFC6120-4.3.5-2, RFC6120-4.9.3.12-1, RFC6120-13.12-3, S21"""
    client.negotiates()
    client.sends(text)
    client.receives_stream_error("not-authorized")
    assert client.is_closed()
    juliet.receives_nothing()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256", "EXTERNAL", "X-NONE"])
def test_no_password_is_taken_before_tls(client, mechanism: str) -> None:
    """RFC6120-6.5.4-1, RFC6120-6.3.4-1, RFC6120-13.8.3-1, S21"""
    client.negotiates()
    client.sends_auth(mechanism, b"\0romeo\0" + password_of("romeo").encode())
    client.receives_failure("encryption-required")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


# -- before binding


@pytest.mark.parametrize("stage", ["secured", "authenticated"])
@pytest.mark.parametrize(
    "text",
    [
        "<message to='juliet@example.org'><body>O</body></message>",
        "<presence to='juliet@example.org'/>",
        "<presence/>",
        "<iq type='get' id='1' to='juliet@example.org'><query xmlns='jabber:iq:last'/></iq>",
        "<iq type='set' id='1' to='juliet@example.org'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
        "<iq type='set' id='1' to='a@b@c/'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
        "<iq type='get' id='1'><query xmlns='jabber:iq:roster'/></iq>",
        "<iq type='result' id='1'/>",
        "<iq type='set' id='1'/>",
        "<iq type='set'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
    ],
)  # fmt: skip
def test_a_stanza_before_binding_is_not_processed(request, juliet, stage: str, text: str) -> None:
    """RFC6120-4.3.5-2, RFC6120-7.1-3, RFC6120-6.3.1-1, RFC6120-4.9.3.12-1"""
    client = request.getfixturevalue(stage)
    if stage == "secured":
        client.negotiates()
    client.sends(text)
    client.receives_stream_error("not-authorized")
    assert client.is_closed()
    juliet.receives_nothing()


def test_a_request_to_ones_own_server_or_account_may_name_it(authenticated) -> None:
    """RFC6120-4.3.5-2"""
    authenticated.sends(
        f"<iq type='set' id='1' to='EXAMPLE.org'><bind xmlns='{BIND}'><resource>a</resource></bind></iq>"
    )
    authenticated.receives(
        f"<iq type='result' id='1' ...><bind xmlns='{BIND}'><jid>romeo@example.org/a</jid></bind></iq>"
    )


def test_the_address_is_that_of_the_login_whatever_the_header_says(secured) -> None:
    """RFC6120-4.3.6-1, RFC6120-6.4.6-1"""
    secured.opens_stream(from_="juliet@example.org")
    assert secured.receives_stream_header().get("to") == "juliet@example.org"
    secured.receives_features()
    secured.authenticates("romeo", password_of("romeo"))
    secured.opens_stream(from_="juliet@example.org")
    assert secured.receives_stream_header().get("to") == "romeo@example.org"
    secured.receives_features()
    assert secured.binds("Orchard") == "romeo@example.org/Orchard"


def test_a_login_is_good_for_one_domain(secured) -> None:
    """RFC6120-4.3.6-1: the same name at another domain of this server is somebody else."""
    secured.negotiates()
    secured.authenticates("romeo", password_of("romeo"))
    secured.opens_stream(to="example.net")
    secured.receives_stream_header()
    secured.receives_stream_error("not-authorized")
    assert secured.is_closed()


# -- language


def test_the_streams_language_is_that_of_stanzas_without_one(server, juliet) -> None:
    """RFC6120-4.7.4-2, RFC6120-4.7.4-3"""
    romeo = server.client().connect()
    romeo.negotiates()
    romeo.starts_tls()
    romeo.negotiates()
    romeo.authenticates("romeo", password_of("romeo"))
    romeo.negotiates(xml_lang="it-IT")
    romeo.binds("orchard")
    romeo.sends(
        "<message to='juliet@example.org/balcony' id='1'><body>O</body></message>"
        "<message to='juliet@example.org/balcony' id='2' xml:lang='de'><body xml:lang='fr'>O</body></message>"
        "<message to='juliet@example.org/balcony' id='3' xml:lang=''><body>O</body></message>"
    )
    juliet.receives(
        "<message from='romeo@example.org/orchard' to='juliet@example.org/balcony' id='1' xml:lang='it-IT'><body>O</body></message>",
        "<message from='romeo@example.org/orchard' to='juliet@example.org/balcony' id='2' xml:lang='de'><body xml:lang='fr'>O</body></message>",
        "<message from='romeo@example.org/orchard' to='juliet@example.org/balcony' id='3' xml:lang=''><body>O</body></message>",
    )


@pytest.mark.parametrize("lang", ["x" * 5000, "not a language", "de-" + "a1-" * 20, "-", "dé"])
def test_what_is_no_language_is_not_put_on_every_stanza(server, juliet, lang: str) -> None:
    """RFC6120-4.7.4-2: with a long one, each presence would grow by as much, for each contact."""
    romeo = server.client().connect()
    romeo.negotiates()
    romeo.starts_tls()
    romeo.negotiates()
    romeo.authenticates("romeo", password_of("romeo"))
    romeo.negotiates(xml_lang=lang)
    romeo.binds("orchard")
    romeo.sends("<message to='juliet@example.org/balcony'><body>O</body></message>")
    juliet.receives(
        "<message from='romeo@example.org/orchard' to='juliet@example.org/balcony'><body>O</body></message>"
    )


# -- elements that are no stanzas


@pytest.mark.parametrize(
    "text",
    [
        "<foo/>",
        "<body>O</body>",
        "<message xmlns='jabber:server' to='juliet@example.org'/>",
        "<message xmlns='' to='juliet@example.org'/>",
        "<x xmlns='urn:x'><message xmlns='jabber:client' to='juliet@example.org'/></x>",
        f"<auth xmlns='{SASL}' mechanism='PLAIN'>AGEAYg==</auth>",
        f"<response xmlns='{SASL}'/>",
        f"<stream:stream xmlns:stream='{STREAMS}'/>",
    ],
)
def test_what_is_no_stanza_is_never_passed_on(romeo, juliet, text: str) -> None:
    """RFC6120-4.8.4-1, RFC6120-4.9.3.24-1, RFC6120-4.8.3-2"""
    romeo.sends_raw(text)
    romeo.receives_stream_error("unsupported-stanza-type")
    assert romeo.is_closed()
    juliet.receives_nothing()


def test_a_prefixed_stanza_arrives_without_its_prefix(romeo, juliet) -> None:
    """RFC6120-4.8.5-2"""
    romeo.sends_raw("<c:message xmlns:c='jabber:client' to='juliet@example.org/balcony'><c:body>O</c:body></c:message>")
    said = hears(juliet, "</message>")
    assert said.startswith("<message to='juliet@example.org/balcony' from='romeo@example.org/orchard'><body>O</body><")


@pytest.mark.parametrize("start", ["xml:space='preserve'", "xmlns:a='http://www.w3.org/1999/xlink' a:href='x'"])
def test_odd_attributes_break_nobodys_stream(romeo, juliet, start: str) -> None:
    """RFC6120-8.4-3, S05"""
    romeo.sends_raw(f"<message {start} to='juliet@example.org/balcony'><xml:x><![CDATA[O]]></xml:x></message>")
    [came] = juliet.receives_anything()
    assert came[0].text == "O"
    juliet.receives_nothing()


def test_a_prefix_of_ones_own_header_means_the_same_elsewhere(server, juliet) -> None:
    """RFC6120-4.8.5-3"""
    romeo = server.client().connect()
    romeo.negotiates()
    romeo.starts_tls()
    romeo.negotiates()
    romeo.authenticates("romeo", password_of("romeo"))
    begins_stream(romeo, HEADER.replace(" to=", " xmlns:h='http://jabber.org/protocol/xhtml-im' to="))
    romeo.receives_stream_header()
    romeo.receives_features()
    romeo.binds("orchard")
    romeo.sends_raw("<message to='juliet@example.org/balcony'><h:html h:a='1'/></message>")
    [came] = juliet.receives_anything()
    assert came[0].tag == "{http://jabber.org/protocol/xhtml-im}html"
    assert came[0].attrib == {"{http://jabber.org/protocol/xhtml-im}a": "1"}


# -- errors


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("<message to='juliet@example.org/balcony'><!-- --></message>", "restricted-xml"),
        ("<message to='juliet@example.org/balcony'>&x;</message>", "restricted-xml"),
        ("<?xml version='1.0'?>", "restricted-xml"),
        ("<message to='juliet@example.org/balcony'><body></message>", "not-well-formed"),
        ("<message to='juliet@example.org/balcony'><x:body/></message>", "not-well-formed"),
        (b"<message to='juliet@example.org/balcony'><body>\xc0\xaf</body></message>", "not-well-formed"),
        ("<message to='juliet@example.org/balcony'><body>&#0;</body></message>", "not-well-formed"),
        ("O Romeo", "bad-format"),
        ("<message to='juliet@example.org/balcony' from='mercutio@example.org'/>", "invalid-from"),
        (f"<message to='juliet@example.org/balcony'><body>{'a' * 262_144}</body></message>", "policy-violation"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_ends_the_stream_and_nothing_behind_it_is_processed(romeo, juliet, text, condition: str) -> None:
    """RFC6120-4.9.1.1-1, RFC6120-4.9.2-1, RFC6120-11.3-1, RFC6120-11.3-2, RFC6120-11.1-1, RFC6120-13.12-2, S04, S05"""
    before, behind = (f"<message to='juliet@example.org/balcony' id='{id}'/>".encode() for id in ("before", "behind"))
    romeo.sends_raw(before + (text.encode() if isinstance(text, str) else text) + behind)
    error = romeo.receives_stream_error(condition)
    assert error.tag == f"{{{STREAMS}}}error"
    assert romeo.is_closed()
    juliet.receives("<message from='romeo@example.org/orchard' to='juliet@example.org/balcony' id='before'/>")
    juliet.receives_nothing()


def test_an_error_is_one_condition_and_a_text_with_its_language(secured) -> None:
    """RFC6120-4.9.2-1, RFC6120-8.1.5-1, RFC6120-4.9.1.1-1"""
    secured.negotiates()
    secured.sends_raw(f"<message to='a'>{'<a>' * 100}")
    said = hears(secured, "</stream:stream>")
    assert said == (
        "<stream:error><policy-violation xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"
        "<text xmlns='urn:ietf:params:xml:ns:xmpp-streams' xml:lang='en'>too many elements, levels or attributes</text>"
        "</stream:error></stream:stream>"
    )


@pytest.mark.parametrize(
    "text",
    [
        "<message to='" + "a" * 9000 + "'/>",
        "<message>" + "text " * 2000,
        "<message " + "".join(f"a{n}='' " for n in range(1000)) + "/>",
        "<message>" + "<x/>" * 40,
        "<message>" + "<x>" * 100_000,
        "<" + "a" * 9000,
    ],
    ids=lambda text: text[:20],
)
def test_strangers_have_nothing_long_to_say(client, text: str) -> None:
    """RFC6120-4.9.3.14-1, S07, S09"""
    client.negotiates()
    client.sends_raw(text)
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


@pytest.mark.parametrize("condition", ["not-well-formed", "xml-not-well-formed", "invalid-id", "undefined-condition"])
def test_an_error_of_the_client_ends_the_stream_without_another(romeo, juliet, condition: str) -> None:
    """RFC6120-4.9.1.1-2, RFC3920-4.7.3-1"""
    are_online(romeo, juliet)
    romeo.sends_raw(
        f"<stream:error><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error></stream:stream>"
    )
    assert hears(romeo, "</stream:stream>") == "</stream:stream>"
    assert romeo.is_closed()
    juliet.receives("<presence type='unavailable' from='romeo@example.org/orchard'/>")


def test_another_password_ends_the_other_sessions(server, romeo) -> None:
    """RFC6120-4.9.3.16-1, S33"""
    server.server.set_credentials(xmppd.JID.parse("romeo@example.org"), xmppd.make_credentials("other"))
    romeo.receives_stream_error("reset")
    assert romeo.is_closed()


# -- the end


def test_closing_is_answered_after_what_came_before_it(romeo, juliet) -> None:
    """RFC6120-4.4-1"""
    romeo.sends_raw(
        PING + "<message to='juliet@example.org/balcony'/></stream:stream><message to='juliet@example.org/balcony'/>"
    )
    romeo.receives("<iq type='result' id='p' from='example.org'/>")
    assert romeo.is_closed()
    juliet.receives("<message from='romeo@example.org/orchard' to='juliet@example.org/balcony'/>")
    juliet.receives_nothing()


@pytest.mark.parametrize("stage", ["client", "secured", "authenticated"])
def test_a_stream_may_be_closed_at_any_time(request, stage: str) -> None:
    """RFC6120-4.4-1"""
    client = request.getfixturevalue(stage)
    if stage != "authenticated":
        client.negotiates()
    client.sends_raw("</stream:stream>")
    assert hears(client, ">") == "</stream:stream>"
    assert client.is_closed()


def test_white_space_keeps_a_connection_alive_and_means_nothing(server, romeo) -> None:
    """RFC6120-4.6.4-1, RFC6120-11.7-1"""
    for _ in range(3):
        romeo.sends_raw(" ")
        server.clock.skip(299)
        romeo.sends_raw("\n")
        romeo.wire.read(0)
    romeo.sends_raw(" \n" + PING + "\t\r\n" + PING + " ")
    romeo.receives("<iq type='result' id='p' from='example.org'/>", "<iq type='result' id='p' from='example.org'/>")
    romeo.receives_nothing()


def test_a_silent_client_is_asked_and_may_answer(server, romeo) -> None:
    """RFC6120-4.6.4-1: not before five minutes."""
    server.clock.skip(299)
    assert romeo.wire.read(0) is None
    server.clock.skip(2)
    ping = romeo.receives("<iq type='get' id='*' from='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")
    romeo.sends(f"<iq type='result' id='{ping.get('id')}' to='example.org'/>")
    server.clock.skip(200)
    romeo.receives_nothing()


def test_a_client_that_never_answers_is_gone(server, romeo, juliet) -> None:
    """RFC6120-4.6.1-1, RFC6120-4.9.3.4-1"""
    are_online(romeo, juliet)
    server.clock.skip(290)
    juliet.sends_raw(" ")  # she is still there
    server.clock.skip(11)
    romeo.receives("<iq type='get' id='*' from='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")
    server.clock.skip(61)
    juliet.receives("<presence type='unavailable' from='romeo@example.org/orchard'/>")
    romeo.receives_stream_error("connection-timeout")
    assert romeo.is_closed()


@pytest.mark.parametrize("stage", ["client", "secured", "authenticated"])
def test_who_does_not_log_in_has_to_go(request, server, stage: str) -> None:
    """RFC6120-13.12-1, S10: a minute, whatever is sent in it."""
    client = request.getfixturevalue(stage)
    if stage == "client":
        client.sends_raw("<stream:stre")
    elif stage == "secured":
        client.negotiates()
    server.clock.skip(50)
    client.sends_raw(" " if stage != "client" else "am")
    server.clock.skip(11)
    client.receives_stream_error("connection-timeout")
    assert client.is_closed()


def test_half_open_streams_leave_nothing_behind(server) -> None:
    """S10"""
    for text in ("", "<", "<?xml version='1.0'?><stream:stream", HEADER, HEADER + f"<starttls xmlns='{TLS}'/>"):
        for _ in range(20):
            client = server.client().connect()
            client.sends_raw(text)
            client.disconnects()
    assert not server.server.streams


def test_addresses_of_machines_stay_private(romeo, juliet) -> None:
    """RFC6120-13.10.1-1"""
    romeo.befriends(juliet)
    juliet.comes_online()
    romeo.comes_online()
    romeo.sends("<message to='juliet@example.org/balcony'><body>O</body></message>")
    juliet.passes_barrier()
    assert not any("127.0.0.1" in line for line in juliet.transcript)
    juliet.forgets_unread()
    romeo.forgets_unread()


# -- how many others one client may write to


@pytest.mark.config(limits={"recipients_per_minute": 5})
def test_who_writes_to_too_many_has_to_wait(server, romeo, juliet) -> None:
    """RFC6120-13.12-1"""
    for n in range(4):
        romeo.sends(f"<message to='somebody-{n}@example.org'><body>O</body></message>")
    for resource in ("balcony", "none", ""):  # one address, whatever its resource
        romeo.sends(f"<message to='juliet@example.org{'/' * bool(resource)}{resource}' type='headline'/>")
    for name, attributes in (("message", ""), ("presence", ""), ("iq", "type='get' id='q'")):
        romeo.sends_raw(f"<{name} to='nurse@example.org' {attributes}><q xmlns='urn:q'/></{name}>")
        error = "<error type='wait' code='405'><policy-violation .../></error>"
        romeo.receives(f"<{name} type='error' from='nurse@example.org' {attributes[11:]}>{error}</{name}>")
    juliet.receives("<message from='romeo@example.org/orchard' to='juliet@example.org/balcony' type='headline'/>")
    romeo.sends("<message to='juliet@example.org/balcony'/>")
    juliet.receives("<message from='romeo@example.org/orchard' to='juliet@example.org/balcony'/>")
    server.clock.skip(61)
    romeo.sends("<message to='nurse@example.org' type='headline'/>")
    romeo.receives_nothing()
