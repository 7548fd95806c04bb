"""What every test may ask for: a server and the people who talk to it.

`romeo`, `juliet`, `nurse` and `benvolio` are logged in, bound to a resource, and not yet
available (`romeo.comes_online()`). `server` is theirs, `server.client()` somebody who has
not connected yet. Dialogues run in memory; those marked `wire`, or all with `--wire`, run
over TCP and TLS; `--transport websocket` and `--transport bosh` are for finding out whether
all that is said on TCP can be said there. `@pytest.mark.config(limits={"stanza": 10000})` changes the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dialogue import Client
from tests.elsewhere import Elsewhere
from tests.federating import Internet
from tests.servers import PEOPLE, MemoryServer, ProcessServer
from tests.web import web_client


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --wire."""
    parser.addoption("--wire", action="store_true", help="run all dialogues over TCP and TLS, none in memory")
    parser.addoption("--transport", choices=("websocket", "bosh"), help="run those in memory over another transport")


class Processes:
    """The server processes of this test run, one for each configuration, shared by the tests that want it."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.folders = folders
        self.running: dict[str, ProcessServer] = {}

    def get(self, values: Mapping[str, Any]) -> ProcessServer:
        """Return a running server with fresh accounts."""
        key = repr(sorted(values.items()))
        if key not in self.running:
            server = ProcessServer(self.folders.mktemp("server"), values)
            server.start()
            self.running[key] = server
        self.running[key].renew_accounts()
        return self.running[key]

    def stop(self) -> None:
        """End them all, checked."""
        running, self.running = self.running, {}
        for server in running.values():
            server.stop()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """The server processes that this run shares."""
    processes = Processes(tmp_path_factory)
    yield processes
    processes.stop()


def configured(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the changes to the configuration that the test's marker asks for."""
    marker = request.node.get_closest_marker("config")
    return dict(marker.kwargs) if marker else {}


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryServer | ProcessServer]:
    """The server of a dialogue; at its end nobody may have unread stanzas, and nothing may be in the log of bugs."""
    values = configured(request)
    is_wire = request.config.getoption("--wire") or request.node.get_closest_marker("wire")
    server: MemoryServer | ProcessServer
    server = request.getfixturevalue("processes").get(values) if is_wire else MemoryServer(tmp_path, values)
    if (transport := request.config.getoption("--transport")) and isinstance(server, MemoryServer):
        memory_server = server
        server.client = lambda **options: web_client(memory_server, transport, options.get("host", "example.org"))  # type: ignore[method-assign]
    yield server
    try:
        server.cast.leave(unread_allowed=request.node.get_closest_marker("unread") is not None)
        server.check_log()
    finally:
        server.cast.hang_up()
        if isinstance(server, MemoryServer):
            server.stop()


@pytest.fixture
def process_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ProcessServer]:
    """A server process of the test's own, running, with the people's accounts made on the command line."""
    server = ProcessServer(tmp_path, configured(request))
    for name in PEOPLE:
        server.add_account(f"{name}@example.org")
    server.start()
    yield server
    server.cast.hang_up()
    server.stop()


@pytest.fixture
def romeo(server: MemoryServer | ProcessServer) -> Client:
    """romeo@example.org/orchard, logged in."""
    return server.client().login("romeo", resource="orchard")


@pytest.fixture
def juliet(server: MemoryServer | ProcessServer) -> Client:
    """juliet@example.org/balcony, logged in."""
    return server.client().login("juliet", resource="balcony")


@pytest.fixture
def nurse(server: MemoryServer | ProcessServer) -> Client:
    """nurse@example.org/chamber, logged in."""
    return server.client().login("nurse", resource="chamber")


@pytest.fixture
def benvolio(server: MemoryServer | ProcessServer) -> Client:
    """benvolio@example.org/pda, logged in."""
    return server.client().login("benvolio", resource="pda")


@pytest.fixture
def elsewhere(server: MemoryServer) -> Elsewhere:
    """The domain example.com, which is not served here."""
    return Elsewhere(server)


@pytest.fixture
def internet(server: MemoryServer) -> Internet:
    """The servers of other domains; federation has to be switched on by the test's configuration."""
    return Internet(server)
