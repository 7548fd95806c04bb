"""XMPP over WebSocket (RFC 7395) and what it stands on: HTTP, host-meta."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import xml.etree.ElementTree as ET

import pytest
from wsproto.events import BytesMessage, Ping, TextMessage

from tests.dialogue import Client
from tests.web import FRAMING, Server, WebSocketWire, head, pipe, read_answer, request, web_client

OPEN = f"<open xmlns='{FRAMING}' to='example.org' version='1.0'/>"
WEB = pytest.mark.config(listen={"web": ["127.0.0.1:0"], "client": ["127.0.0.1:0"], "client_tls": ["127.0.0.1:0"]})


@pytest.fixture
def stranger(server: Server) -> Client:
    """Somebody with an open stream over WebSocket, not logged in."""
    client = web_client(server).connect()
    client.negotiates()
    return client


def message_lines(client: Client) -> list[str]:
    """Return what came from the server, as it came."""
    return [line for line in client.transcript if line.startswith("S:")]


# ---- HTTP -----------------------------------------------------------------------------


def test_host_meta_tells_where_to_connect(server: Server) -> None:
    """XEP-0156 §2.3"""
    answer = request(server, "GET", "/.well-known/host-meta", Origin="https://elsewhere.example")
    links = {link.get("rel"): link.get("href") for link in ET.fromstring(answer.body)}
    assert links == {
        "urn:xmpp:alt-connections:websocket": "wss://example.org/xmpp-websocket",
        "urn:xmpp:alt-connections:xbosh": "https://example.org/http-bind",
    }
    assert (answer["content-type"], answer["access-control-allow-origin"]) == ("application/xrd+xml; charset=utf-8", "*")


def test_host_meta_comes_as_json_too(server: Server) -> None:
    """XEP-0156 §2.2"""
    answer = request(server, "GET", "/.well-known/host-meta.json", Host="example.net")
    assert {"rel": "urn:xmpp:alt-connections:xbosh", "href": "https://example.net/http-bind"} in json.loads(answer.body)["links"]
    assert answer["content-type"] == "application/json"


@pytest.mark.config(web={"url": "https://chat.example.org/x/"})
def test_the_owner_says_where_the_world_reaches_us(server: Server) -> None:
    links = json.loads(request(server, "GET", "/.well-known/host-meta.json").body)["links"]
    assert [link["href"] for link in links] == ["wss://chat.example.org/x/xmpp-websocket", "https://chat.example.org/x/http-bind"]


@pytest.mark.parametrize("path", [
    "/x", "/.well-known", "/.well-known/host-meta/", "/x/..%2f.well-known/host-meta", "/%2e%2e/.well-known/host-meta",
    "/%u002ewell-known/host-meta", "/%252ewell-known/host-meta", "//.well-known/host-meta", "/x/../.well-known/host-meta",
    "https://example.org/.well-known/host-meta", "/%ff", "/%00", "*",
])  # fmt: skip
def test_what_is_not_in_the_table_is_not_there(server: Server, path: str) -> None:
    """S77"""
    assert request(server, "GET", path).status == 404


def test_the_path_is_decoded_once(server: Server) -> None:
    """S77"""
    assert request(server, "GET", "/%2ewell-known/host%2Dmeta?x=/../").status == 200


def test_methods_that_a_path_does_not_have(server: Server) -> None:
    answer = request(server, "DELETE", "/.well-known/host-meta")
    assert (answer.status, answer["allow"]) == (405, "GET")
    head_only = request(server, "HEAD", "/.well-known/host-meta")
    assert (head_only.status, head_only.body) == (200, b"") and int(head_only["content-length"]) > 100


def test_a_connection_serves_one_request_after_the_other(server: Server) -> None:
    wire = pipe(server)
    both = head("GET", "/x", {}, b"") + head("GET", "/.well-known/host-meta", {}, b"")
    for data in (both[:10], both[10:]):
        wire.send(data)
    first, rest = read_answer(wire)
    assert first.status == 404
    assert b" 200 " in rest or read_answer(wire)[0].status == 200


@pytest.mark.parametrize(("bad", "status"), [
    (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\n b: c\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nb : c\r\n\r\n", 400),
    (b"<stream:stream>\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 10000, 431),
    (b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
])  # fmt: skip
def test_what_could_be_read_in_two_ways_ends_the_connection(server: Server, bad: bytes, status: int) -> None:
    """S82: request smuggling, RFC 9112 §6.1, §11.2: nothing may follow."""
    wire = pipe(server)
    wire.send(bad + head("GET", "/.well-known/host-meta", {}, b""))
    answer, rest = read_answer(wire)
    assert answer.status in (status, 400) and b"200" not in rest
    while wire.read(10):
        pass


def test_who_is_slow_to_ask_is_not_waited_for(server: Server) -> None:
    """S82: slowloris"""
    wire = pipe(server)
    wire.send(b"GET / HTTP/1.1\r\n")
    for _ in range(4):
        server.clock.skip(8)
        wire.read(0)
        wire.send(b"x: y\r\n")
    assert wire.read(10) == b""


def test_an_unused_connection_is_closed(server: Server) -> None:
    """S82"""
    wire = pipe(server)
    server.clock.skip(76)
    assert wire.read(10) == b""


def test_too_many_requests_at_once_end_the_connection(server: Server) -> None:
    """S82"""
    wire = pipe(server)
    wire.send(head("POST", "/http-bind", {"Content-Length": "70000"}, b"x" * 70000) * 3)
    while wire.read(10):
        pass


# ---- the handshake --------------------------------------------------------------------


def handshake(server: Server, **headers: str) -> int:
    """Return the status with which a WebSocket handshake is answered."""
    wire = WebSocketWire(pipe(server), **headers)
    wire.close()
    return wire.answer.status


def test_the_handshake(server: Server) -> None:
    """RFC 7395 §3.1, RFC 6455 §1.3"""
    wire = WebSocketWire(pipe(server), Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==", Sec_WebSocket_Protocol="chat, XMPP")
    assert wire.answer.status == 101
    assert wire.answer["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert wire.answer["sec-websocket-protocol"] == "xmpp"
    assert "sec-websocket-extensions" not in wire.answer
    wire.close()


@pytest.mark.parametrize(("headers", "status"), [
    ({"Sec_WebSocket_Protocol": "chat"}, 400),
    ({"Sec_WebSocket_Version": "8"}, 426),
    ({"Upgrade": "h2c"}, 426),
    ({"Connection": "close"}, 426),
    ({"Sec_WebSocket_Key": "x"}, 400),
])  # fmt: skip
def test_a_handshake_that_is_none_is_refused(server: Server, headers: dict[str, str], status: int) -> None:
    """RFC 6455 §4.2.1, RFC 7395 §3.1"""
    assert handshake(server, **headers) == status


@pytest.mark.parametrize(("origin", "status"), [
    ("https://example.org", 101), ("https://example.org:5443", 101), ("https://example.net", 101),
    ("http://example.org", 403), ("https://evil.example", 403), ("https://example.org.evil.example", 403), ("null", 403),
    ("https://evil.example/https://example.org", 403),
])  # fmt: skip
def test_pages_of_others_may_not_log_people_in(server: Server, origin: str, status: int) -> None:
    """S79"""
    assert handshake(server, Origin=origin) == status


@pytest.mark.config(web={"origins": ["https://chat.example"]})
def test_the_owner_names_further_pages(server: Server) -> None:
    """S79"""
    assert handshake(server, Origin="https://chat.example") == 101
    assert handshake(server, Origin="https://chat.example:444") == 403


@pytest.mark.config(web={"origins": ["*"]})
def test_the_owner_may_allow_all_pages(server: Server) -> None:
    """S79"""
    assert handshake(server, Origin="https://anything.example") == 101


# ---- streams --------------------------------------------------------------------------


def test_no_starttls_and_no_compression_over_websocket(server: Server) -> None:
    """RFC 7395 §3.9"""
    client = web_client(server).connect()
    names = [feature.tag.rpartition("}")[2] for feature in client.negotiates()]
    assert "mechanisms" in names and "starttls" not in names and "compression" not in names


def test_people_meet_across_transports(server: Server, juliet: Client) -> None:
    """RFC 7395 §3.3.3: one element in each message, a document of its own (checked by the wire)."""
    romeo = web_client(server).login("romeo", resource="web")
    romeo.sends("<message to='juliet@example.org/balcony' type='chat'><body>O &amp; <![CDATA[<]]></body></message>")
    juliet.receives("<message from='romeo@example.org/web' type='chat'><body>O &amp; &lt;</body></message>")
    juliet.sends("<message to='romeo@example.org/web' type='chat'><body>Ay me!</body></message>")
    romeo.receives("<message from='juliet@example.org/balcony' type='chat'><body>Ay me!</body></message>")
    assert any("<message xmlns='jabber:client'" in line for line in message_lines(romeo))
    romeo.closes()


@WEB
@pytest.mark.wire
def test_people_meet_over_sockets(server: Server, juliet: Client) -> None:
    """RFC 7395, over TCP and TLS"""
    romeo = web_client(server).login("romeo", resource="web")
    romeo.sends("<message to='juliet@example.org/balcony' type='chat'><body>O</body></message>")
    juliet.receives("<message from='romeo@example.org/web' type='chat'><body>O</body></message>")
    romeo.closes()


@WEB
@pytest.mark.wire
@pytest.mark.parametrize(("port", "proposed", "first"), [
    ("web", "http/1.1", b"HTTP/1.1 400"), ("web", "", b"HTTP/1.1 400"), ("web", "xmpp-client", b"<?xml"),
    ("client_tls", "xmpp-client", b"<?xml"), ("client_tls", "", b"<?xml"), ("client_tls", "http/1.1", b"HTTP/1.1 400"),
    ("client_tls", "h2", b"<?xml"),
])  # fmt: skip
def test_xmpp_and_https_share_a_port(server: Server, port: str, proposed: str, first: bytes) -> None:
    """XEP-0368 §3, RFC 7301: ALPN tells what is meant."""
    context = ssl.create_default_context(cafile=str(server.authority))
    if proposed:
        context.set_alpn_protocols([proposed])
    plain = socket.create_connection(("127.0.0.1", server.ports[port]), timeout=15)
    with context.wrap_socket(plain, server_hostname="example.org") as secure:
        secure.sendall(b"<x/>\r\n\r\n")
        assert secure.recv(100).startswith(first)


def test_the_first_message_opens_the_stream(server: Server) -> None:
    """RFC 7395 §3.4, §3.5"""
    client = web_client(server).connect()
    client.wire.sends_message("<message xmlns='jabber:client'/>")
    client.receives_stream_error("not-authorized")
    client.is_closed()


@pytest.mark.parametrize("element", ["<open to='example.org' version='1.0'/>", "<close xmlns='jabber:client'/>"])
def test_framing_has_a_namespace(server: Server, element: str) -> None:
    """RFC 7395 §3.3.2"""
    client = web_client(server).connect()
    client.wire.sends_message(element)
    client.receives_stream_error("invalid-namespace")
    client.is_closed()


def test_an_unknown_host_hears_a_header_first(server: Server) -> None:
    """RFC 7395 §3.5"""
    client = web_client(server).connect()
    client.wire.sends_message(OPEN.replace("example.org", "example.com"))
    client.receives_stream_error("host-unknown")
    client.is_closed()


def test_a_stream_is_not_opened_twice(stranger: Client) -> None:
    """RFC 7395 §3.4: no multiplexing"""
    stranger.wire.sends_message(OPEN)
    stranger.receives_stream_error("bad-format")
    stranger.is_closed()


@pytest.mark.parametrize(("message", "condition"), [
    ("<presence xmlns='jabber:client'/><presence xmlns='jabber:client'/>", "not-well-formed"),
    ("<presence xmlns='jabber:client'>", "not-well-formed"),
    ("</stream:stream>", "not-well-formed"),
    ("</stream:stream><a/>", "not-well-formed"),
    (" <presence xmlns='jabber:client'/>", "not-well-formed"),
    ("", "not-well-formed"),
    ("text", "not-well-formed"),
    ("<presence xmlns='jabber:client'/>text", "bad-format"),
    ("<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='example.org'>", "not-well-formed"),
    ("<!-- x --><presence xmlns='jabber:client'/>", "restricted-xml"),
    ("<?x y?><presence xmlns='jabber:client'/>", "restricted-xml"),
    ("<!DOCTYPE a><presence xmlns='jabber:client'/>", "not-well-formed"),
    ("<presence xmlns='jabber:client'><show>&x;</show></presence>", "restricted-xml"),
    ("<presence xmlns='jabber:client'>\0</presence>", "not-well-formed"),
    ("<?xml version='1.0' encoding='UTF-16'?><presence xmlns='jabber:client'/>", "unsupported-encoding"),
])  # fmt: skip
def test_the_same_parser_on_every_transport(server: Server, message: str, condition: str) -> None:
    """S04, S81"""
    romeo = web_client(server).login("romeo")
    romeo.wire.sends_message(message)
    romeo.receives_stream_error(condition)
    romeo.is_closed()


def test_white_space_behind_an_element_and_a_declaration_before_it_do_no_harm(server: Server) -> None:
    """RFC 7395 §3.3.3: declarations are not recommended, but allowed."""
    romeo = web_client(server).login("romeo", resource="web")
    for end in ("", "\n", " \r\n "):
        romeo.wire.sends_message(f"<?xml version='1.0' encoding='utf-8'?>\n<message xmlns='jabber:client' to='{romeo.jid}'/>{end}")
        romeo.receives(f"<message from='{romeo.jid}'/>")


def test_prefixes_end_with_their_message(server: Server) -> None:
    """RFC 7395 §3.3.3"""
    romeo = web_client(server).login("romeo", resource="web")
    romeo.wire.sends_message(f"<c:message xmlns:c='jabber:client' to='{romeo.jid}'><c:body>O</c:body></c:message>")
    romeo.receives(f"<message from='{romeo.jid}'><body>O</body></message>")
    romeo.wire.sends_message(f"<c:message to='{romeo.jid}'/>")
    romeo.receives_stream_error("not-well-formed")
    romeo.is_closed()


# ---- framing (S81) --------------------------------------------------------------------


def refused(client: Client, code: int) -> bool:
    """Check that the server closes the WebSocket with this code."""
    while (data := client.wire.read(10)) and client.wire.close_code == 0:
        client._take(data)
    assert client.wire.close_code == code
    client.forgets_unread()
    client.disconnects()
    return True


def test_an_unmasked_frame_is_refused(stranger: Client) -> None:
    """S81, RFC 6455 §5.1"""
    stranger.wire.raw.send(b"\x81\x04<a/>")
    assert refused(stranger, 1002)


def test_a_compressed_frame_is_refused(stranger: Client) -> None:
    """S81: there is no permessage-deflate."""
    stranger.wire.raw.send(b"\xc1\x84\0\0\0\0<a/>")
    assert refused(stranger, 1002)


def test_text_that_is_no_utf8_is_refused(stranger: Client) -> None:
    """S81, RFC 6455 §8.1"""
    stranger.wire.raw.send(b"\x81\x84\0\0\0\0<\xff/>")
    assert refused(stranger, 1007)


def test_binary_messages_are_refused(stranger: Client) -> None:
    """RFC 7395 §3.2"""
    stranger.wire.sends_event(BytesMessage(data=b"<a/>"))
    stranger.receives_stream_error("bad-format")
    assert refused(stranger, 1003)


def test_a_long_message_is_refused_while_it_comes(stranger: Client) -> None:
    """S81: a gigabyte in fragments"""
    stranger.wire.raw.send(b"\x01\xff" + (1 << 30).to_bytes(8) + b"\0\0\0\0" + b"<" * 9000)
    stranger.receives_stream_error("policy-violation")
    assert refused(stranger, 1009)


def test_a_message_in_too_many_fragments_is_refused(stranger: Client) -> None:
    """S81"""
    for _ in range(1001):
        stranger.wire.sends_event(TextMessage(data="", message_finished=False))
    stranger.receives_stream_error("policy-violation")
    assert refused(stranger, 1009)


def test_fragments_make_one_message(server: Server) -> None:
    """RFC 6455 §5.4"""
    romeo = web_client(server).login("romeo", resource="web")
    text = f"<message xmlns='jabber:client' to='{romeo.jid}'><body>Ö</body></message>"
    for at in range(len(text)):
        romeo.wire.sends_event(TextMessage(data=text[at], message_finished=at == len(text) - 1))
        if at == 30:
            romeo.wire.sends_event(Ping())
    romeo.receives(f"<message from='{romeo.jid}'><body>Ö</body></message>")


@pytest.mark.config(limits={"silence_timeout": 10, "answer_timeout": 10})
def test_a_silent_client_is_asked_by_a_ping_of_websockets(server: Server) -> None:
    """RFC 7395 §3.8"""
    romeo = web_client(server).login("romeo")
    server.clock.skip(11)
    assert romeo.wire.read(10) == b" " and romeo.wire.pongs == 1  # it is answered by the wire, as by a browser
    romeo.receives_nothing()
    server.clock.skip(11)
    romeo.receives_nothing()
    romeo.wire.raw.send = lambda data: None
    server.clock.skip(11)
    assert romeo.wire.read(10) == b" "
    server.clock.skip(11)
    romeo.receives_stream_error("connection-timeout")
    romeo.is_closed()


def test_a_connection_that_breaks_ends_the_session(server: Server, juliet: Client) -> None:
    """RFC 7395 §3.6"""
    romeo = web_client(server).login("romeo", resource="web")
    romeo.sends("<presence to='juliet@example.org/balcony'/>")
    juliet.receives("<presence from='romeo@example.org/web' .../>")
    romeo.disconnects()
    juliet.receives("<presence from='romeo@example.org/web' type='unavailable'/>")


@WEB
@pytest.mark.wire
def test_at_shutdown_clients_hear_why(process_server: Server) -> None:
    romeo = web_client(process_server).login("romeo")
    process_server.process.process.terminate()
    romeo.receives_stream_error("system-shutdown")
    romeo.is_closed()
    process_server.process.process.wait(15)




@pytest.mark.parametrize("transport", ["websocket", "bosh"])
def test_sasl2_needs_no_restart_on_any_transport(server: Server, transport: str) -> None:
    """XEP-0388 §5, XEP-0386, XEP-0206 §5: the stream goes on, so nothing has to be opened anew."""
    romeo = web_client(server, transport).connect()
    romeo.negotiates()
    initial = base64.b64encode(b"\0romeo\0romeo-secret").decode()
    romeo.sends(f"""<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'><initial-response>{initial}</initial-response>
        <bind xmlns='urn:xmpp:bind:0'><tag>Web</tag></bind></authenticate>""")
    romeo.receives("<success xmlns='urn:xmpp:sasl:2'><authorization-identifier>romeo@example.org/Web*</authorization-identifier>"
                   "<bound xmlns='urn:xmpp:bind:0'>...</bound></success>")  # fmt: skip
    romeo.receives_features()
    romeo.sends("<iq type='get' id='p' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")
    romeo.receives("<iq type='result' id='p' from='example.org' to='romeo@example.org/Web*'/>")
