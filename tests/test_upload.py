"""HTTP File Upload (XEP-0363)."""

from __future__ import annotations

import http.client
import io
import re
import threading
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import Client
from tests.servers import MemoryServer, ProcessServer
from tests.web import Server, head, pipe, read_answer, request

UPLOAD = "urn:xmpp:http:upload:0"
LISTEN = {"web": ["127.0.0.1:0"], "client": ["127.0.0.1:0"], "client_tls": ["127.0.0.1:0"]}
WEB = pytest.mark.config(listen=LISTEN)
pytestmark = WEB


def with_limits(**limits: int) -> pytest.MarkDecorator:
    return pytest.mark.config(listen=LISTEN, limits=limits)


def asks(client: Client, name: str = "x.jpg", size: object = 5, kind: str = "image/jpeg", more: str = "") -> None:
    words = f" content-type='{kind}'" if kind else ""
    client.sends(f"<iq type='get' id='u' to='upload.example.org'><request xmlns='{UPLOAD}' filename='{name}' size='{size}'{words}>{more}</request></iq>")


def slot(client: Client, name: str = "x.jpg", size: int = 5, kind: str = "image/jpeg", more: str = "") -> str:
    """Ask for a slot; return the path of its URLs, which are the same."""
    asks(client, name, size, kind, more)
    answer = client.receives(f"<iq type='result' id='u'><slot xmlns='{UPLOAD}'><put url='*'/><get url='*'/></slot></iq>")
    [put, get] = [child.get("url") for child in answer[0]]
    assert put == get and put.startswith("https://example.org") and put.isascii()
    return "/upload/" + put.partition("/upload/")[2]


def upload(client: Client, server: Server, data: bytes = b"hello", kind: str = "image/jpeg", name: str = "x.jpg") -> str:
    path = slot(client, name, len(data), kind)
    assert request(server, "PUT", path, data, Content_Type=kind).status == 201
    return path


def files(server: Server) -> list[Path]:
    folder = (server.server.config.data if isinstance(server, MemoryServer) else server.data) / "upload.example.org" / "files"
    return sorted(folder.iterdir()) if folder.exists() else []


def settle(server: MemoryServer) -> None:
    """Let the workers finish."""
    done = threading.Event()
    for _ in range(3):
        server.loop.offload(lambda: None, then=lambda _: done.set())
        while not done.is_set():
            server.loop.turn(0.1)
        done.clear()


# ---- discovery ------------------------------------------------------------------------


def test_clients_find_the_service_on_a_name_of_its_own(romeo: Client) -> None:
    """XEP-0363 §3; clients.md: some look only at subdomains."""
    romeo.sends("<iq type='get' id='1' to='example.org'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    items = romeo.receives("<iq type='result' id='1'><query xmlns='http://jabber.org/protocol/disco#items'>...</query></iq>")
    assert "upload.example.org" in [item.get("jid") for item in items[0]]
    romeo.sends("<iq type='get' id='2' to='upload.example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    romeo.receives(f"""<iq type='result' id='2'><query xmlns='http://jabber.org/protocol/disco#info'>
        <identity category='store' type='file' name='HTTP File Upload'/>
        <feature var='http://jabber.org/protocol/disco#info'/><feature var='http://jabber.org/protocol/disco#items'/>
        <feature var='{UPLOAD}'/><feature var='urn:xmpp:http:upload:purpose:0#message'/>
        <feature var='urn:xmpp:http:upload:purpose:0#ephemeral'/>
        <x xmlns='jabber:x:data' type='result'><field var='FORM_TYPE' type='hidden'><value>{UPLOAD}</value></field>
          <field var='max-file-size'><value>104857600</value></field></x></query></iq>""")
    romeo.sends("<iq type='get' id='3' to='upload.example.org'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    romeo.receives("<iq type='result' id='3'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")


@pytest.mark.config(listen=LISTEN, upload={"host": ""})
def test_the_owner_may_do_without(romeo: Client) -> None:
    romeo.sends("<iq type='get' id='1' to='example.org'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    items = romeo.receives("<iq type='result' id='1'><query xmlns='http://jabber.org/protocol/disco#items'>...</query></iq>")
    assert "upload.example.org" not in [item.get("jid") for item in items[0]]


# ---- slots ----------------------------------------------------------------------------


def test_the_name_is_kept_in_the_url(romeo: Client) -> None:
    """XEP-0363 §4: percent-encoded"""
    assert re.fullmatch(r"/upload/[0-9a-f]{40}/tr%C3%A8s%20cool\.jpg", slot(romeo, "très cool.jpg"))


@pytest.mark.parametrize(("given", "kept"), [
    ("../../x.png", "x.png"), ("a\\..\\b.txt", "b.txt"), ("%2e%2e%2fx", "%2e%2e%2fx"), ("..", "file"), ("a/", "file"), ("x\x7fy\u202e.jpg", "xy.jpg"),
    ("é" * 300 + ".jpeg", "é" * 97 + ".jpeg"), ("x." + "y" * 300, "x." + "y" * 198), (".htaccess", "htaccess"),
])  # fmt: skip
def test_names_are_harmless(given: str, kept: str) -> None:
    """S76"""
    assert xmppd.file_title(given) == kept and len(kept.encode()) <= 200


@pytest.mark.parametrize("wrong", ["size='0'", "size='-1'", "size='x'", "size='١'", "", "size='5' content-type='image'", "size='5' content-type='a/b&#10;c: d'"])
def test_a_request_without_name_size_or_sense_is_bad(romeo: Client, wrong: str) -> None:
    """XEP-0363 §4"""
    romeo.sends(f"<iq type='get' id='u' to='upload.example.org'><request xmlns='{UPLOAD}' filename='x' {wrong}/></iq>")
    romeo.receives("<iq type='error' id='u'><error type='modify'><bad-request .../></error></iq>")


def test_a_name_is_needed(romeo: Client) -> None:
    """XEP-0363 §4"""
    romeo.sends(f"<iq type='get' id='u' to='upload.example.org'><request xmlns='{UPLOAD}' size='5'/></iq>")
    romeo.receives("<iq type='error' id='u'><error type='modify'><bad-request .../></error></iq>")


@with_limits(upload_size=20000)
def test_too_large(romeo: Client) -> None:
    """XEP-0363 §6, example 11"""
    for size in (20001, 10**40):
        asks(romeo, size=size)
        romeo.receives(f"""<iq type='error' id='u'><error type='modify'><not-acceptable .../>
            <file-too-large xmlns='{UPLOAD}'><max-file-size>20000</max-file-size></file-too-large></error></iq>""")
    slot(romeo, size=20000)


@with_limits(upload_day=100, silence_timeout=10000)
def test_enough_for_one_day(romeo: Client, server: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """XEP-0363 §6, example 12: and when to come again"""
    upload(romeo, server, b"x" * 60)
    slot(romeo, size=40)
    asks(romeo, size=1)
    romeo.receives(f"<iq type='error' id='u'><error type='wait'><resource-constraint .../><retry xmlns='{UPLOAD}' stamp='*Z'/></error></iq>")
    server.clock.skip(301)
    server.loop.turn(0)
    slot(romeo, size=40)
    monkeypatch.setattr(xmppd.HttpUpload, "now", lambda self: int(xmppd.time.time()) + xmppd.DAY + 1)
    slot(romeo, size=60)


@with_limits(upload_account=100)
def test_an_account_has_so_much_room(romeo: Client, juliet: Client, server: MemoryServer) -> None:
    upload(romeo, server, b"x" * 60)
    asks(romeo, size=41)
    romeo.receives("<iq type='error' id='u'><error type='wait'><resource-constraint .../></error></iq>")
    slot(juliet, size=41)


@with_limits(upload_total=100)
def test_the_server_has_so_much_room(romeo: Client, juliet: Client, server: MemoryServer) -> None:
    upload(romeo, server, b"x" * 60)
    asks(juliet, size=41)
    juliet.receives("<iq type='error' id='u'><error type='wait'><resource-constraint .../></error></iq>")


def test_many_slots_are_not_for_keeping(romeo: Client) -> None:
    for _ in range(100):
        slot(romeo)
    asks(romeo)
    romeo.receives(f"<iq type='error' id='u'><error type='wait'><resource-constraint .../><retry xmlns='{UPLOAD}' stamp='*'/></error></iq>")


def test_strangers_get_no_slots(server: MemoryServer) -> None:
    """XEP-0363 §6; S74: only for accounts here"""
    stanza = xmppd.Stanza(xmppd.IQ, {"type": "get", "id": "1", "from": "a@example.com/x", "to": "upload.example.org"})
    stanza.add(xmppd.E(xmppd.UPLOAD("request"), {"filename": "x", "size": "1"}))
    with pytest.raises(xmppd.StanzaError, match="service-unavailable"):
        server.server.route(stanza, xmppd.JID.parse("upload.example.org"))
    assert not server.server.registry.feature(xmppd.HttpUpload).slots


def test_other_stanzas_mean_nothing_to_it(romeo: Client) -> None:
    romeo.sends("<message id='m' to='upload.example.org'><body>O</body></message><presence to='upload.example.org'/>")
    romeo.receives("<message type='error' id='m'><error type='cancel'><service-unavailable .../></error></message>")
    romeo.sends("<iq type='get' id='u' to='a@upload.example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    romeo.receives("<iq type='error' id='u'><error type='cancel'><service-unavailable .../></error></iq>")


# ---- sending --------------------------------------------------------------------------


def test_what_is_sent_can_be_fetched(romeo: Client, server: Server) -> None:
    """XEP-0363 §7"""
    path = upload(romeo, server, name="très cool.jpg")
    got = request(server, "GET", path)
    assert (got.status, got.body, got["content-type"]) == (200, b"hello", "image/jpeg")
    assert got["content-disposition"] == "inline; filename*=UTF-8''tr%C3%A8s%20cool.jpg"
    head_only = request(server, "HEAD", path)
    assert (head_only.status, head_only["content-length"], head_only.body) == (200, "5", b"")


@WEB
@pytest.mark.wire
def test_a_large_file_over_sockets(romeo: Client, server: ProcessServer) -> None:
    """In pieces, on both ways; http.client is other people's."""
    data = bytes(range(256)) * 20000
    path = slot(romeo, "large", len(data), "")
    connection = http.client.HTTPSConnection("localhost", server.ports["web"], context=server.trust, timeout=30)
    connection.request("PUT", path, io.BytesIO(data), {"Content-Length": str(len(data)), "Expect": "100-continue"})
    put = connection.getresponse()
    assert (put.status, put.read()) == (201, b"")
    connection.request("GET", path)
    got = connection.getresponse()
    assert got.read() == data and got.getheader("content-disposition") == "attachment; filename*=UTF-8''large"
    connection.request("GET", path, headers={"Range": "bytes=300000-4000000"})
    part = connection.getresponse()
    assert part.status == 206 and part.read() == data[300000:4000001]
    connection.close()


@pytest.mark.parametrize(("change", "status"), [
    (lambda path: path.replace("x.jpg", "y.jpg"), 404), (lambda path: path + "/", 404), (lambda path: "/upload/" + "0" * 40 + "/x.jpg", 404),
    (lambda path: path.replace("/x.jpg", "/../x.jpg"), 404), (lambda path: path.replace("/x.jpg", "/%2e%2e%2fx.jpg"), 404),
    (lambda path: path.upper().replace("/UPLOAD", "/upload"), 404), (lambda path: path.replace("/x.jpg", "/x%252ejpg"), 404),
    (lambda path: path.replace("/x.jpg", ""), 404), (lambda path: path.replace("/x.jpg", "%00/x.jpg"), 404), (lambda path: path.replace(".", "%2E"), 201),
])  # fmt: skip
def test_only_the_urls_of_the_slot_will_do(romeo: Client, server: MemoryServer, change: object, status: int) -> None:
    """S76, S77"""
    path = slot(romeo)
    changed = "".join(path.rpartition("/")[:2]) + path.rpartition("/")[2]
    assert request(server, "PUT", change(changed), b"hello").status == status
    assert len(files(server)) == (status == 201)


@pytest.mark.parametrize(("headers", "body", "status"), [
    ({}, b"hell", 400), ({}, b"hello!", 413), ({"Content_Type": "text/html"}, b"hello", 415), ({"Content_Type": "Image/JPEG; q=1"}, b"hello", 201),
    ({"Transfer_Encoding": "chunked", "Content_Length": ""}, b"5\r\nhello\r\n0\r\n\r\n", 411),
])  # fmt: skip
def test_only_what_the_slot_was_for_is_taken(romeo: Client, server: MemoryServer, headers: dict[str, str], body: bytes, status: int) -> None:
    """XEP-0363 §7, S76: longer or shorter than size, other type"""
    path = slot(romeo)
    lines = {name.replace("_", "-"): value for name, value in headers.items() if value}
    wire = pipe(server)
    raw = head("PUT", path, lines, body)
    if "Transfer_Encoding" in headers:
        raw = raw.replace(b"Content-Length: %d\r\n" % len(body), b"")
    wire.send(raw)
    assert read_answer(wire)[0].status == status
    settle(server)
    assert len(files(server)) == (status == 201)


def test_a_slot_is_good_once(romeo: Client, server: MemoryServer) -> None:
    """S76: PUT twice"""
    path = upload(romeo, server)
    assert request(server, "PUT", path, b"HELLO").status == 409
    assert request(server, "GET", path).body == b"hello"


@with_limits(silence_timeout=10000)
def test_a_slot_has_its_time(romeo: Client, server: MemoryServer) -> None:
    """XEP-0363 §8, S76: expired slot"""
    path = slot(romeo)
    server.clock.skip(301)
    server.loop.turn(0)
    assert request(server, "PUT", path, b"hello").status == 404


def test_half_a_file_is_nothing(romeo: Client, server: MemoryServer) -> None:
    """S76: GET of unfinished; an upload that broke off may be tried again."""
    data = b"x" * 600_000
    path = slot(romeo, "x", len(data), "")
    wire = pipe(server)
    wire.send(head("PUT", path, {}, data)[:-1])
    assert wire.read(0.2) is None
    assert request(server, "GET", path).status == 404
    assert request(server, "PUT", path, data).status == 409
    wire.close()
    settle(server)
    assert files(server) == []
    assert request(server, "PUT", path, data).status == 201
    assert len(files(server)) == 1 and files(server)[0].read_bytes() == data


def test_a_slow_upload_is_not_waited_for(romeo: Client, server: MemoryServer) -> None:
    """S82"""
    path = slot(romeo, size=10)
    wire = pipe(server)
    wire.send(head("PUT", path, {"Content-Length": "10"}, b"hel"))
    server.clock.skip(61)
    assert wire.read(10) == b""


def test_a_full_disk_is_said(romeo: Client, server: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    path = slot(romeo)
    monkeypatch.setattr(server.storage.disk, "write", full)
    assert request(server, "PUT", path, b"hello").status == 507
    monkeypatch.undo()
    settle(server)
    assert files(server) == [] and request(server, "PUT", path, b"hello").status == 201
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    asks(romeo)
    romeo.receives("<iq type='error' id='u'><error type='wait'><resource-constraint .../></error></iq>")


# ---- fetching -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "told", "way"), [
    ("image/png", "image/png", "inline"), ("video/mp4", "video/mp4", "inline"), ("audio/ogg; codecs=opus", "audio/ogg; codecs=opus", "inline"),
    ("text/plain; charset=utf-8", "text/plain; charset=utf-8", "inline"),
    ("text/html", "application/octet-stream", "attachment"), ("image/svg+xml", "application/octet-stream", "attachment"),
    ("application/xhtml+xml", "application/octet-stream", "attachment"), ("text/javascript", "application/octet-stream", "attachment"),
    ("application/pdf", "application/octet-stream", "attachment"), ("IMAGE/SVG+XML", "application/octet-stream", "attachment"),
])  # fmt: skip
def test_no_browser_takes_a_file_for_a_program(romeo: Client, server: MemoryServer, kind: str, told: str, way: str) -> None:
    """S75"""
    got = request(server, "GET", upload(romeo, server, b"<script>alert(1)</script>", kind, "x.html"))
    assert got["content-type"] == told and got["content-disposition"].startswith(way)
    assert got["x-content-type-options"] == "nosniff"
    assert got["content-security-policy"] == "default-src 'none'; sandbox; frame-ancestors 'none'"
    assert "set-cookie" not in got


def test_a_type_is_no_place_for_headers(romeo: Client, server: MemoryServer) -> None:
    """S75, S86"""
    path = slot(romeo, kind="")
    assert request(server, "PUT", path, b"hello", Content_Type="a/b; c=\t\xe9").status == 201
    assert request(server, "GET", path)["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(("asked", "status", "body", "range_"), [
    ("bytes=0-1", 206, b"he", "bytes 0-1/5"), ("bytes=3-", 206, b"lo", "bytes 3-4/5"), ("bytes=-2", 206, b"lo", "bytes 3-4/5"),
    ("bytes=1-99", 206, b"ello", "bytes 1-4/5"), ("bytes=-99", 206, b"hello", "bytes 0-4/5"), ("bytes=5-", 416, None, "bytes */5"),
    ("bytes=-0", 416, None, "bytes */5"), ("bytes=3-1", 200, b"hello", None), ("bytes=-", 200, b"hello", None), ("lines=1-2", 200, b"hello", None),
    ("bytes=0-1,3-4", 200, b"hello", None),
])  # fmt: skip
def test_parts_of_a_file(romeo: Client, server: MemoryServer, asked: str, status: int, body: bytes | None, range_: str | None) -> None:
    """RFC 9110 §14"""
    got = request(server, "GET", upload(romeo, server), Range=asked)
    assert got.status == status and (body is None or got.body == body)
    assert got.headers.get("content-range") == range_


def test_what_is_known_need_not_be_fetched(romeo: Client, server: MemoryServer) -> None:
    """RFC 9110 §13"""
    path = upload(romeo, server)
    tag = request(server, "GET", path)["etag"]
    same = request(server, "GET", path, If_None_Match=f'"x", {tag}')
    assert (same.status, same.body, same["etag"]) == (304, b"", tag)
    assert request(server, "GET", path, If_None_Match='"x"').status == 200
    assert request(server, "GET", path, Range="bytes=0-1", If_Range=tag).status == 206
    assert request(server, "GET", path, Range="bytes=0-1", If_Range='"x"').status == 200


def test_web_clients_of_all_sites_may_use_it(romeo: Client, server: MemoryServer) -> None:
    """XEP-0363 §8: CORS; S79: without credentials"""
    path = slot(romeo)
    asked = request(server, "OPTIONS", path, Origin="https://web.example", Access_Control_Request_Method="PUT")
    assert (asked.status, asked["access-control-allow-origin"]) == (204, "*")
    assert {"PUT", "GET", "HEAD", "OPTIONS"} <= set(asked["access-control-allow-methods"].split(", "))
    assert "access-control-allow-credentials" not in asked
    put = request(server, "PUT", path, b"hello", Origin="https://web.example")
    assert (put.status, put["access-control-allow-origin"]) == (201, "*")
    assert request(server, "GET", path, Origin="https://web.example")["access-control-allow-origin"] == "*"


def test_who_goes_away_stops_a_download(romeo: Client, server: MemoryServer) -> None:
    path = upload(romeo, server, b"x" * 1_000_000)
    wire = pipe(server)
    wire.send(head("GET", path, {}, b""))
    assert wire.read(10)
    wire.close()
    settle(server)


# ---- the end of files -----------------------------------------------------------------


def test_files_go_after_their_time(romeo: Client, server: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = upload(romeo, server), upload(romeo, server)
    feature = server.server.registry.feature(xmppd.HttpUpload)
    token = xmppd.JID(path.split("/")[2], "upload.example.org", "")
    feature.documents[token] = {**feature.documents[token], "at": 1}
    assert request(server, "GET", path).status == 404
    feature.sweep()
    settle(server)
    assert [file.name for file in files(server)] == [kept.split("/")[2]] and token not in feature.documents
    assert list(feature.by_owner.items(xmppd.JID.parse("romeo@example.org"))) == [kept.split("/")[2]]
    assert (feature.total, request(server, "GET", kept).status) == (5, 200)


def test_a_sender_may_want_a_file_to_go_early(romeo: Client, server: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """XEP-0363 §5.3: not available after expire-before"""
    purpose = "<ephemeral xmlns='urn:xmpp:http:upload:purpose:0' expire-before='2100-01-01T00:00:00Z'/>"
    path = slot(romeo, more=purpose)
    assert request(server, "PUT", path, b"hello").status == 201 and request(server, "GET", path).status == 200
    monkeypatch.setattr(xmppd.HttpUpload, "now", lambda self: 4102444800)
    assert request(server, "GET", path).status == 404
    asks(romeo, more=purpose.replace("2100", "soon"))
    romeo.receives("<iq type='error' id='u'><error type='modify'><bad-request .../></error></iq>")


def test_files_of_an_account_go_with_it(romeo: Client, server: MemoryServer) -> None:
    path, early = upload(romeo, server), slot(romeo)
    server.server.remove_account(xmppd.JID.parse("romeo@example.org"))
    settle(server)
    assert files(server) == [] and request(server, "GET", path).status == 404
    assert request(server, "PUT", early, b"hello").status == 404
    settle(server)
    assert files(server) == []
    romeo.forgets_unread()
    romeo.disconnects()


def test_what_a_crash_has_left_is_removed(romeo: Client, server: MemoryServer) -> None:
    """No half files: neither one without a document nor one that was not finished stays."""
    kept = upload(romeo, server)
    folder = files(server)[0].parent
    for name in ("0" * 40, "1" * 40 + ".abcd"):
        (folder / name).write_bytes(b"x")
    server.server.registry.feature(xmppd.HttpUpload).sweep()
    settle(server)
    assert [file.name for file in files(server)] == [kept.split("/")[2]]


@pytest.mark.wire
def test_a_file_that_was_confirmed_outlives_a_crash(tmp_path: Path) -> None:
    """DESIGN §5: the answer waits for the journal."""
    server = ProcessServer(tmp_path, {"listen": LISTEN})
    server.add_account("romeo@example.org")
    server.start()
    path = upload(server.client().login("romeo"), server)
    server.cast.hang_up()
    server.kill()
    server.start()
    assert request(server, "GET", path).body == b"hello"
    assert request(server, "PUT", path, b"HELLO").status == 409
    server.stop()


# ---- does it work? --------------------------------------------------------------------


@pytest.mark.wire
def test_at_start_it_tries_itself(tmp_path: Path) -> None:
    values = {"hosts": ["localhost"], "listen": LISTEN, "upload": {"check": True}}
    server = ProcessServer(tmp_path, values)
    server.start()
    line = server.process.wait_for("files: ")
    assert f"files: sending and fetching them works at https://localhost:{server.ports['web']}" in line
    server.stop()
    assert not list((tmp_path / "data" / "upload.localhost" / "files").iterdir())


def test_a_failure_is_said_in_one_line(tmp_path: Path) -> None:
    assert "refused" in xmppd.try_upload("https://127.0.0.1:1/upload/x/y", None)


def test_without_the_packages_only_the_web_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(xmppd.HttpServer, "missing_packages", staticmethod(lambda: ["h11"]))
    server = MemoryServer(tmp_path, {"listen": {"web": ["127.0.0.1:0"]}})
    server.server.registry.feature(xmppd.HttpServer).listening([])
    assert [record.getMessage() for record in caplog.records] == [
        "no web port: install h11, with: python3 -m pip install 'xmppd[web]'"
    ]
    romeo = server.client().login("romeo")
    romeo.sends("<iq type='get' id='1' to='upload.example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    romeo.receives("<iq type='error' id='1' ...>...</iq>")
    server.cast.hang_up()
    server.stop()
