"""Two people with Converse.js, a web client of other people, in headless Chromium (converse.mjs): WebSocket and BOSH."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import PEOPLE, ProcessServer

HERE = Path(__file__).parent
MODULES = HERE.parent / "node_modules"
DIST = MODULES / "converse.js" / "dist"
PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>Converse</title><link rel="stylesheet" href="/converse.min.css">
</head><body class="converse-fullscreen"><script type="module">
import * as module from "/converse.min.js";
const converse = module.converse ?? module.default ?? window.converse;
const given = new URLSearchParams(location.search);
const service = given.get("service");
converse.plugins.add("watch", {
  initialize() {
    window.api = this._converse.api;
    const connected = () => { window.online = true; };
    this._converse.api.listen.on("connected", connected);
    window.transport = () => this._converse.api.connection.get()._proto.socket ? "websocket" : "bosh";
  },
});
converse.initialize({
  jid: given.get("jid"), password: given.get("password"), auto_login: true, authentication: "login",
  [service.startsWith("wss") ? "websocket_url" : "bosh_service_url"]: service,
  discover_connection_methods: false, view_mode: "fullscreen", assets_path: "/", i18n: "en", persistent_store: "none",
  whitelisted_plugins: ["watch"], clear_cache_on_logout: true, play_sounds: false, show_desktop_notifications: false,
});
</script></body></html>
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves Converse.js and the page."""

    def do_GET(self) -> None:
        if not self.path.startswith("/?"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(PAGE.encode())
        return None

    def log_message(self, *_args: object) -> None:
        pass


def missing() -> str:
    """Return what these tests lack, "" for nothing."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (DIST.is_dir() and (MODULES / "puppeteer-core").is_dir()):
        return "converse.js and puppeteer-core are not installed: npm ci --prefix tests"
    return "" if shutil.which("chromium") else "chromium is not installed"


@pytest.fixture
def site() -> Iterator[str]:
    """The origin that Converse.js is served from."""
    if reason := missing():
        pytest.skip(reason)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(DIST)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("service", ["wss://example.org:{}/xmpp-websocket", "https://example.org:{}/http-bind"])
def test_two_people_chat_and_meet_in_a_room(site: str, service: str, tmp_path: Path) -> None:
    """Issue: the browser. The screens stay in the test's folder."""
    server = ProcessServer(tmp_path, {"listen": {"web": ["127.0.0.1:0"]}, "web": {"origins": [site]}})
    for name in PEOPLE[:2]:
        server.add_account(f"{name}@example.org")
    server.start()
    try:
        command = ["node", str(HERE / "converse.mjs"), shutil.which("chromium") or "", site,
                   service.format(server.ports["web"]), str(tmp_path)]  # fmt: skip
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=110, check=False)
    finally:
        server.stop()
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr
    assert (tmp_path / "romeo.png").stat().st_size > 10_000
