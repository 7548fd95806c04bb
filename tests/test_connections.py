"""Connections over real sockets: TLS, limits, slow and fast peers, the end, signals."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import xmppd
from tests.dialogue import PATIENCE, STREAMS, TLS, Client, SocketWire, password_of
from tests.servers import Clock, ProcessServer, configuration, write_configuration
from tests.test_certificates import certify, dns, write_pair, write_pem

HEADER = f"<stream:stream xmlns='jabber:client' xmlns:stream='{STREAMS}' to='example.org' version='1.0'>"


@contextlib.contextmanager
def running(folder: Path, values: Mapping[str, Any]) -> Iterator[ProcessServer]:
    """A server process of the test's own with the people's accounts, ended at the end, checked."""
    server = ProcessServer(folder, values)
    server.start()
    try:
        server.renew_accounts()
        yield server
    finally:
        server.cast.hang_up()
        server.stop()


def dial(server: ProcessServer, port: str = "client") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.ports[port]), timeout=PATIENCE)


def rest(sock: socket.socket) -> bytes:
    """Return all that comes until the server hangs up, or resets the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def begins(client: Client) -> Client:
    client.connect().negotiates()
    return client


def is_served(server: ProcessServer) -> bool:
    """Whether somebody else can log in now, which shows that the server goes on."""
    nurse = server.client().login("nurse")
    nurse.receives_nothing()
    nurse.closes()
    return True


# -- TLS


@pytest.mark.wire
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("direct_tls", [False, True])
def test_tls_of_today_is_spoken(server, version: ssl.TLSVersion, direct_tls: bool) -> None:
    """RFC6120-5.2-1, RFC6120-5.3.2-1, RFC6120-4.5-1, XEP-0368 §3"""
    client = server.client(direct_tls=direct_tls)
    context = ssl.create_default_context(cafile=str(server.authority))
    context.minimum_version = context.maximum_version = version

    def with_version() -> SocketWire:
        port = server.ports["client_tls" if direct_tls else "client"]
        return SocketWire(("127.0.0.1", port), context, direct_tls="example.org" if direct_tls else "")

    client.dial = with_version
    client.login("romeo").receives_nothing()
    assert (
        client.wire.socket.version() == {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]
    )


@pytest.mark.wire
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("direct_tls", [False, True])
def test_tls_of_yesterday_is_refused_without_a_word(server, direct_tls: bool) -> None:
    """RFC6120-13.9.5-1, RFC6120-5.4.3.2-1"""
    sock = dial(server, "client_tls" if direct_tls else "client")
    if not direct_tls:
        sock.sendall(f"{HEADER}<starttls xmlns='{TLS}'/>".encode())
        said = b""
        while b"<proceed" not in said:
            said += sock.recv(65536)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)
    assert is_served(server)


@pytest.mark.wire
@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.1\r\n\r\n", HEADER.encode(), b"\x16\x03\x01\x00\x05hello", b"\0" * 1000]
)
def test_a_failed_handshake_ends_the_connection_with_no_word_of_xml(server, junk: bytes) -> None:
    """RFC6120-5.4.3.2-1, RFC6120-5.4.2.3-1, S20"""
    for port in ("client", "client_tls"):
        with dial(server, port) as sock:
            if port == "client":
                sock.sendall(f"{HEADER}<starttls xmlns='{TLS}'/>".encode())
                said = b""
                while b"<proceed" not in said:
                    said += sock.recv(65536)
            sock.sendall(junk)
            with contextlib.suppress(OSError):  # it may have hung up already
                sock.shutdown(socket.SHUT_WR)
            assert b"<" not in rest(sock)
    assert is_served(server)


@pytest.mark.wire
def test_plain_text_in_the_segment_of_starttls_ends_the_stream(server) -> None:
    """RFC6120-5.4.2.3-1, S20"""
    with dial(server) as sock:
        sock.sendall(f"{HEADER}<starttls xmlns='{TLS}'/><iq type='set' id='a'/>".encode())
        said = rest(sock)
    assert b"<proceed" not in said
    assert b"<policy-violation" in said


@pytest.mark.wire
@pytest.mark.skipif(not shutil.which("openssl"), reason="only the openssl command can ask for a renegotiation")
def test_a_renegotiation_is_refused(server) -> None:
    """RFC6120-5.3.5-1, S12"""
    command = [
        "openssl",
        "s_client",
        "-connect",
        f"127.0.0.1:{server.ports['client_tls']}",
        "-tls1_2",
        "-alpn",
        "xmpp-client",
    ]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    while b"Verify return code" not in said:
        said += client.stdout.readline()
    client.stdin.write(b"R\n")
    client.stdin.flush()
    said = client.stdout.read()  # it gives up
    assert client.wait(PATIENCE) != 0
    assert b"RENEGOTIATING" in said
    assert b"no renegotiation" in said
    assert b"stream:error" not in said
    assert is_served(server)


@pytest.mark.wire
@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(["xmpp-client"], "xmpp-client"), (["h2", "xmpp-client"], "xmpp-client"), (["h2"], None), ([], None)],
)
def test_direct_tls_knows_its_application_protocol(server, offered: list[str], chosen: str | None) -> None:
    """XEP-0368 §3"""
    context = ssl.create_default_context(cafile=str(server.authority))
    if offered:
        context.set_alpn_protocols(offered)
    with context.wrap_socket(dial(server, "client_tls"), server_hostname="example.org") as sock:
        assert sock.selected_alpn_protocol() == chosen
        sock.sendall(HEADER.encode())
        said = b""
        while b"</stream:features>" not in said:
            said += sock.recv(65536)
    assert b"<mechanisms" in said
    assert b"<starttls" not in said


def bound(client: Client, name: str) -> Client:
    """Log in inside TLS that is already there."""
    client.negotiates()
    client.authenticates(name, password_of(name))
    client.negotiates()
    client.binds()
    return client


def test_each_host_shows_its_own_certificate(tmp_path: Path) -> None:
    """RFC6120-5.4.3.1-1, XEP-0368 §3: by the stream's `to`, by SNI for direct TLS."""
    authority = certify([], ca=True, common_name="ca")
    trust = write_pem(tmp_path / "trust.pem", authority[0])
    folder = tmp_path / "pairs"
    folder.mkdir()
    for host in ("example.org", "example.net"):
        write_pair(folder, certify(dns(host), issuer=authority, common_name=host), host)
    with running(tmp_path, {"tls": {"certificate": str(folder)}}) as server:
        server.trust = ssl.create_default_context(cafile=str(trust))
        for host in ("example.org", "example.net"):
            for direct_tls in (False, True):
                client = server.client(host=host, direct_tls=direct_tls).connect()
                if not direct_tls:
                    client.negotiates()
                    client.starts_tls()
                names = client.wire.socket.getpeercert()["subjectAltName"]
                assert names == (("DNS", host),)
                client.negotiates()
                client.closes()


def test_a_renewed_certificate_is_used_and_nobody_is_disconnected(tmp_path: Path) -> None:
    """RFC6120-4.9.3.16-1: reset is ours to use, and we don't."""
    pair = write_pair(tmp_path, certify(dns("example.org"), common_name="first"))
    values = {"hosts": ["example.org"], "tls": {"certificate": str(pair.certificate), "key": str(pair.key)}}
    with running(tmp_path, values) as server:
        server.trust = ssl.create_default_context(cafile=str(pair.certificate))
        romeo = server.client().login("romeo")
        assert romeo.wire.socket.getpeercert()["subject"] == ((("commonName", "first"),),)
        write_pair(tmp_path, certify(dns("example.org"), common_name="second"))
        server.process.process.send_signal(signal.SIGHUP)
        server.process.wait_for("reloaded")
        server.trust = ssl.create_default_context(cafile=str(pair.certificate))
        juliet = server.client().login("juliet")
        assert juliet.wire.socket.getpeercert()["subject"] == ((("commonName", "second"),),)
        romeo.sends(f"<message to='{juliet.jid}'/>")
        juliet.receives(f"<message to='{juliet.jid}' from='{romeo.jid}'/>")


@pytest.mark.skipif(not xmppd.machine_has_ipv6(), reason="this machine has no IPv6")
def test_ipv6_is_served_like_ipv4(tmp_path: Path) -> None:
    """RFC6120-3.1-1"""
    with running(tmp_path, {"listen": {"client": ["127.0.0.1:0", "[::1]:0"]}}) as server:
        [ready] = [line for line in server.process.lines if "ready: " in line]
        port = int(ready.partition("[::1]:")[2].partition(",")[0])
        client = server.client()
        client.dial = lambda: SocketWire(("::1", port), server.trust)
        assert client.login("romeo", resource="orchard").jid == "romeo@example.org/orchard"


def test_the_lab_takes_logins_without_tls_but_no_password(tmp_path: Path) -> None:
    """RFC3920-5-1, RFC6120-13.8.3-1, RFC6120-5.2-1: on loopback, where the owner allows it."""
    with running(tmp_path, {"listen": {"lab": ["127.0.0.1:0"]}}) as server:
        client = server.client()
        client.dial = lambda: SocketWire(("127.0.0.1", server.ports["lab"]), server.trust)
        features = client.connect().negotiates()
        starttls = features.find(f"{{{TLS}}}starttls")
        assert starttls is not None
        assert not len(starttls)
        offered = [child.text for child in features.find("{urn:ietf:params:xml:ns:xmpp-sasl}mechanisms")]
        assert offered == ["SCRAM-SHA-256", "SCRAM-SHA-1"]
        client.sends_auth("PLAIN", b"\0romeo\0romeo-secret")
        client.receives_failure("encryption-required")
        client.receives_stream_error("policy-violation")
        assert client.is_closed()
        bound(client.connect(), "romeo").receives_nothing()
        stranger = server.client()
        stranger.dial = client.dial
        stranger.connect().negotiates()
        stranger.starts_tls()
        bound(stranger, "juliet").receives_nothing()


# -- the end


def secured(server: ProcessServer, version: ssl.TLSVersion) -> ssl.SSLSocket:
    """Return a TLS socket with an open stream, that tells a missing close_notify from a good end."""
    context = ssl.create_default_context(cafile=str(server.authority))
    context.maximum_version = version
    sock = context.wrap_socket(dial(server, "client_tls"), server_hostname="example.org", suppress_ragged_eofs=False)
    sock.sendall(HEADER.encode())
    said = b""
    while b"</stream:features>" not in said:
        said += sock.recv(65536)
    return sock


@pytest.mark.wire
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("last_words", ["</stream:stream>", "<nonsense/>", "<!-- -->"])
def test_tls_is_closed_before_tcp(server, version: ssl.TLSVersion, last_words: str) -> None:
    """RFC6120-4.4-1, RFC6120-4.4-2, RFC6120-4.4-3"""
    with secured(server, version) as sock:
        sock.sendall(last_words.encode())
        said = b""
        while piece := sock.recv(65536):  # raises SSLEOFError if TCP ends without close_notify
            said += piece
        assert said.endswith(b"</stream:stream>")
        assert (b"<stream:error>" in said) is (last_words != "</stream:stream>")


@pytest.mark.wire
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_clients_close_notify_is_answered(server, version: ssl.TLSVersion) -> None:
    """RFC6120-4.4-3"""
    with secured(server, version) as sock, sock.unwrap() as plain:  # raises SSLEOFError without the server's own
        assert plain.recv(1) == b""


@pytest.mark.wire
def test_who_does_not_end_the_connection_is_not_waited_for_long(server) -> None:
    """RFC6120-4.4-2: their end is gone after five seconds, though ours stays open."""
    with dial(server) as sock:
        sock.sendall(f"{HEADER}</stream:stream>".encode())
        assert rest(sock).endswith(b"</stream:stream>")
        began, broken = time.monotonic(), select.poll()
        broken.register(sock, 0)
        while not broken.poll(100):
            assert time.monotonic() < began + 4 * xmppd.CLOSE_TIMEOUT
            with contextlib.suppress(ConnectionError):
                sock.sendall(b" ")
    assert time.monotonic() - began > 1


@pytest.mark.wire
@pytest.mark.parametrize("direct_tls", [False, True])
def test_the_reason_arrives_though_the_client_goes_on_talking(server, direct_tls: bool) -> None:
    """RFC6120-4.9.1.1-1, RFC6120-13.12-2, S07: a reset must not overtake it."""
    for _ in range(5):
        client = server.client(direct_tls=direct_tls).login("romeo")
        client.sends_raw(f"<message to='juliet@example.org'><body>{'a' * 2_000_000}</body></message>")
        client.receives_stream_error("policy-violation")
        assert client.is_closed()


@pytest.mark.wire
def test_a_stream_may_end_while_a_password_is_checked(server) -> None:
    """S10, S31"""
    for _ in range(5):
        client = server.client(direct_tls=True).connect()
        client.negotiates()
        client.sends_auth("PLAIN", b"\0romeo\0romeo-secret")
        client.disconnects()
    assert is_served(server)


# -- slow and fast


@pytest.mark.wire
@pytest.mark.config(limits={"unread": 1_000_000})
def test_who_does_not_read_is_dropped_and_nobody_else_notices(server, romeo, nurse) -> None:
    """S11"""
    juliet = server.client().login("juliet", resource="balcony")
    romeo.befriends(juliet)
    romeo.comes_online()
    juliet.comes_online()
    romeo.receives_anything()
    juliet.receives_anything()
    before = json.loads(server.command("status", "--json"))["memory"]
    sock, juliet.wire = juliet.wire.socket, None  # she reads no more
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    text = "O " * 100_000
    for _ in range(100):  # 20 MB, more than the kernel's buffers take
        romeo.sends_raw(f"<message to='juliet@example.org/balcony' type='headline'><body>{text}</body></message>")
        nurse.receives_nothing()
        if "bytes unread" in server.process.log():
            break
    romeo.receives("<presence type='unavailable' from='juliet@example.org/balcony'/>")
    after = json.loads(server.command("status", "--json"))["memory"]
    assert after - before < 30_000_000
    sock.close()
    romeo.receives_nothing()


@pytest.mark.wire
@pytest.mark.config(limits={"bytes_per_second": 20_000})
def test_a_fast_sender_is_slowed_down_and_others_go_on(romeo, nurse, juliet) -> None:
    """RFC6120-13.12-1: a burst of ten seconds' worth is free."""
    message = f"<message to='juliet@example.org/balcony' id='fast'><body>{'a' * 9900}</body></message>"
    began = time.monotonic()
    for _ in range(25):  # 250 KB where 200 are free
        romeo.sends(message)
    nurse.sends("<message to='juliet@example.org/balcony' id='slow'/>")
    ids = [juliet.receives("<message ...>...</message>").get("id") for _ in range(26)]
    assert ids.count("fast") == 25
    assert ids[-1] == "fast"  # hers went past what he had sent before
    assert time.monotonic() - began > 1


@pytest.mark.wire
@pytest.mark.config(limits={"bytes_per_second": 2000})
def test_a_fast_sender_before_tls_gets_through_in_the_end(server) -> None:
    """RFC6120-13.12-1: the pause for being fast and the pause for TLS don't disturb each other."""
    client = server.client().connect()
    client.sends_raw(" " * 21_000 + HEADER + f"<starttls xmlns='{TLS}'/>")
    client.receives_stream_header()
    client.receives_features("starttls")
    client.receives(f"<proceed xmlns='{TLS}'/>")
    client.wire.start_tls("example.org")
    bound(client, "romeo").receives_nothing()
    assert client.wire.read(1) is None  # until all pauses are over
    client.receives_nothing()


@pytest.mark.wire
def test_strangers_who_come_at_once_are_all_heard(server) -> None:
    """S10: more than one turn listens to stand in line, and none of them is forgotten."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(dial(server)) for _ in range(90)]
        for sock in socks:
            sock.settimeout(30)
            sock.sendall(HEADER.encode() + f"<starttls xmlns='{TLS}'/>".encode())
        for sock in socks:
            said = b""
            while b"<proceed" not in said:
                piece = sock.recv(65536)
                assert piece, said
                said += piece


# -- limits of connections


@pytest.mark.wire
@pytest.mark.config(limits={"connections_per_address": 3})
def test_an_address_has_so_many_connections_at_once(server) -> None:
    """RFC6120-13.12-1, S10"""
    clients = [begins(server.client()) for _ in range(3)]
    with dial(server) as sock:
        assert rest(sock) == b""
    with dial(server, "client_tls") as sock:
        assert rest(sock) == b""
    clients[0].closes()
    while True:  # the place is free as soon as the server has seen the end
        with dial(server) as sock:
            sock.sendall(HEADER.encode())
            with contextlib.suppress(ConnectionResetError):
                if sock.recv(65536):
                    break
    for client in clients[1:]:
        client.starts_tls()


@pytest.mark.wire
@pytest.mark.config(limits={"connections_per_minute": 5})
def test_an_address_makes_so_many_connections_a_minute(server) -> None:
    """RFC6120-13.12-1, S10"""
    for _ in range(5):
        begins(server.client()).closes()
    for port in ("client", "client_tls"):
        with dial(server, port) as sock:
            assert rest(sock) == b""
    for _ in range(2):
        server.process.wait_for("refused a connection from 127.0.0.1: more than 5 per minute")


@pytest.mark.wire
@pytest.mark.config(limits={"unauthenticated_timeout": 1})
@pytest.mark.parametrize("stage", ["nothing", "header", "proceed", "direct TLS", "half a handshake", "authenticated"])
def test_who_does_not_log_in_has_to_go(server, stage: str) -> None:
    """S10: however far it came; nothing of XML is said into a handshake (RFC6120-5.4.3.2-1)."""
    began = time.monotonic()
    if stage == "authenticated":
        client = server.client(direct_tls=True).connect()
        client.negotiates()
        client.authenticates("romeo", password_of("romeo"))
        client.negotiates()
        client.receives_stream_error("connection-timeout")
        assert client.is_closed()
        return
    with dial(server, "client_tls" if "T" in stage or "half" in stage else "client") as sock:
        if stage == "header":
            sock.sendall(HEADER.encode())
        elif stage == "proceed":
            sock.sendall(f"{HEADER}<starttls xmlns='{TLS}'/>".encode())
        elif stage == "half a handshake":
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        said = rest(sock)
    assert 0.8 < time.monotonic() - began < 4
    assert (b"<connection-timeout" in said) is (stage in ("nothing", "header"))
    if stage == "proceed":
        assert said.endswith(b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    elif stage in ("direct TLS", "half a handshake"):
        assert said == b""


@pytest.mark.wire
@pytest.mark.config(limits={"unauthenticated_timeout": 1})
def test_a_header_byte_by_byte_takes_too_long(server) -> None:
    """S10: bytes that trickle in buy no time."""
    with dial(server) as sock:
        sock.settimeout(0.05)
        said, letters = b"", iter(HEADER * 3)
        while b"</stream:stream>" not in said:
            sock.sendall(next(letters).encode())
            with contextlib.suppress(TimeoutError):
                said += sock.recv(65536)
    assert b"<connection-timeout" in said


@pytest.mark.wire
def test_a_crowd_that_only_looks_in_leaves_no_memory_behind(server) -> None:
    """S10: scaled down from 20,000."""

    def crowd(count: int) -> int:
        for number in range(count):
            with dial(server, ("client", "client_tls")[number % 2]) as sock:
                sock.sendall((b"", b"\x16\x03", b"<?xml version='1.0'?><stream:st", HEADER.encode())[number % 4])
                with contextlib.suppress(OSError):  # it may have hung up already
                    sock.shutdown(socket.SHUT_WR)
                rest(sock)  # one after the other, so that no peak of many at once is measured
        assert is_served(server)
        return json.loads(server.command("status", "--json"))["memory"]

    before = crowd(200)
    assert crowd(600) - before < 5_000_000


@pytest.mark.wire
def test_a_silent_stream_lets_go_of_its_parser_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    """DESIGN §6: most of what an idle session takes is expat's."""
    config = xmppd.load_config(write_configuration(tmp_path, configuration({})), data=tmp_path / "data")
    clock, dozed, streams = Clock(), list[bool](), list[xmppd.ClientStream]()
    doze = xmppd.StreamParser.doze
    monkeypatch.setattr(xmppd.StreamParser, "doze", lambda parser: dozed.append(doze(parser)) or dozed[-1])
    loop = xmppd.Loop(clock)
    storage = xmppd.Storage(config.data, loop, sync=False)
    server = xmppd.Server(config, loop, storage, xmppd.FEATURES)
    network = xmppd.Network(config, loop, storage, None)

    def accepted(connection: xmppd.Connection) -> None:
        streams.append(xmppd.ClientStream(server, connection))
        streams[0].owner = xmppd.JID("romeo", "example.org", "")  # as if it had logged in
        connection.carry(streams[0])

    def turns(until: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < give_up
            loop.turn(0.1)

    network.listen("client", xmppd.Address(socket.AF_INET, "127.0.0.1", 0), accepted)
    [listener] = network.listeners.values()
    with socket.create_connection(("127.0.0.1", listener.port), PATIENCE) as peer:
        peer.sendall(f"{HEADER}<iq type='set' id='b1'><bind xmlns='{xmppd.BIND}'/></iq>\n<presen".encode())
        turns(lambda: bool(streams and streams[0].session))
        clock.skip(2 * xmppd.SILENCE)
        turns(lambda: bool(dozed))
        peer.sendall(b"ce/>")
        turns(lambda: streams[0].session.presence is not None)
        clock.skip(2 * xmppd.SILENCE)
        turns(lambda: dozed[-1])
        assert not dozed[0]  # in the middle of a stanza
        peer.sendall(b"<presence type='unavailable'/>")
        turns(lambda: streams[0].session.presence is None)
    turns(lambda: not network.connections)
    storage.close()
    loop.close()


def test_a_thousand_bytes_at_a_time_or_one_is_the_same(server, juliet) -> None:
    romeo = server.client(split=1).login("romeo", resource="orchard")
    romeo.sends("<message to='juliet@example.org/balcony'><body>é &lt; ü</body></message>")
    juliet.receives(
        "<message to='juliet@example.org/balcony' from='romeo@example.org/orchard'><body>é &lt; ü</body></message>"
    )


# -- signals


def test_sigterm_ends_everybody_within_five_seconds(tmp_path: Path) -> None:
    """RFC6120-4.9.3.20-1"""
    server = ProcessServer(tmp_path, {})
    server.start()
    server.renew_accounts()
    romeo = server.client().login("romeo")
    stranger = begins(server.client())
    half = dial(server, "client_tls")
    half.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
    silent = dial(server)  # never says a word, never reads, never closes
    deaf = server.client().login("juliet")
    began = time.monotonic()
    server.process.process.send_signal(signal.SIGTERM)
    romeo.receives_stream_error("system-shutdown")
    assert romeo.is_closed()
    stranger.receives_stream_error("system-shutdown")
    assert stranger.is_closed()
    assert rest(half) == b""
    assert server.process.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 5
    assert b"<system-shutdown" in rest(silent)
    deaf.receives_stream_error("system-shutdown")
    half.close()
    silent.close()
    server.cast.hang_up()
    server.stop()


def test_a_reload_keeps_sessions_and_changes_what_it_can(tmp_path: Path) -> None:
    """RFC6120-4.9.3.5-1"""
    listen = {"client": ["127.0.0.1:0"], "client_tls": ["127.0.0.1:0"]}
    values = {"hosts": ["example.org", "example.net"], "listen": listen}
    with running(tmp_path, values) as server:
        server.add_account("tybalt@example.net")
        romeo = server.client().login("romeo", resource="orchard")
        tybalt = server.client(host="example.net").login("tybalt")
        waiting = begins(server.client(host="example.net"))

        def reload(**changes: Any) -> None:
            write_configuration(tmp_path, configuration(values, changes))
            server.process.process.send_signal(signal.SIGHUP)
            server.process.wait_for("reloaded")

        reload(hosts=["example.org"], limits={"connections_per_minute": 1, "recipients_per_minute": 1})
        tybalt.receives_stream_error("host-gone")
        assert tybalt.is_closed()
        waiting.receives_stream_error("host-gone")
        assert waiting.is_closed()
        romeo.sends("<message to='nurse@example.org' type='headline'/><message to='juliet@example.org' id='2'/>")
        romeo.receives(
            "<message type='error' id='2' from='juliet@example.org'><error type='wait'><policy-violation .../></error></message>"
        )
        client = server.client().connect()
        client.opens_stream(to="example.net")
        client.receives_stream_header()
        client.receives_stream_error("host-unknown")
        assert client.is_closed()
        with dial(server) as sock:
            assert rest(sock) == b""
        reload(hosts=["example.org", "example.net"])
        server.client(host="example.net").login("tybalt").receives_nothing()
        romeo.sends(f"<message to='{romeo.jid}'/>")
        romeo.receives(f"<message to='{romeo.jid}' from='{romeo.jid}'/>")


def test_a_bad_configuration_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path, {}) as server:
        romeo = server.client().login("romeo")
        server.config.write_text("hosts = 7\n")
        server.process.process.send_signal(signal.SIGHUP)
        server.process.wait_for("not reloaded")
        romeo.receives_nothing()
        assert is_served(server)
