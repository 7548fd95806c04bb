"""Small attacks on a server process while two honest people chat; by hand in full: `python -m tests.abuse`."""

from __future__ import annotations

import gc
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import xmppd
from tests.abuse import HEADER, Siege, besieged, raise_descriptors
from tests.dialogue import Cast, Client, SocketWire
from tests.servers import PEOPLE, authority_in, configuration, credentials_of, write_configuration

SHARED_MACHINE = 1000.0  # ms: other tests run beside this one; alone, and in full, the promise is a tenth of it

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and all of 127.0.0.0/8")


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """A server whose patience with strangers is short, and which has seen a first crowd."""
    raise_descriptors()
    with besieged(tmp_path_factory.mktemp("siege"), timeout=2) as siege:
        siege.first_crowd(500)
        yield siege


@pytest.mark.parametrize(
    "sizes",
    [
        {"half_open": 500, "half_a_hello": 20, "half_a_handshake": 20, "starttls_and_silence": 20, "headerless": 20, "byte_a_second": 20},
        {"quick_leavers": 1000, "xml_bombs": 2, "bombs_of_users": 1, "zlib_bombs": 2, "ping_flood": 5},
        {"non_readers": 16},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_honest_people_notice_nothing_and_memory_comes_back(siege: Siege, sizes: dict[str, int]) -> None:
    """S01 S02 S03 S07 S08 S09 S10 S11 S23"""
    report = siege.attack(**sizes)
    assert report.percentile(0.99) < SHARED_MACHINE, report
    assert report.after - report.before <= 5, report


def test_one_address_gets_no_more_than_its_share(siege: Siege) -> None:
    """S10"""
    assert siege.attack(one_address=150).result == {"connected": 150, "welcome": 100}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[xmppd.Server, Path]]:
    """A server with sockets in this process, its loop in another thread; and its data folder."""
    folder = tmp_path_factory.mktemp("running")
    values = configuration({"listen": {"client": ["127.0.0.1:0"]}, "limits": {"unauthenticated_timeout": 1}})
    config = xmppd.load_config(write_configuration(folder, values), data=folder / "data")
    loop = xmppd.Loop()
    storage = xmppd.Storage(config.data, loop, sync=False)
    server = xmppd.Server(config, loop, storage, xmppd.FEATURES, xmppd.Certificates(config))
    for name in PEOPLE:
        server.create_account(xmppd.JID(name, "example.org", ""), credentials_of(name))
    server.listen()
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield server, config.data
    loop.post(lambda: server.shutdown(loop.stop))
    thread.join()
    storage.close()
    loop.close()


@pytest.mark.parametrize(
    ("login", "last_words"),
    [
        (False, b""),
        (False, HEADER[:50]),
        (False, HEADER),
        (False, HEADER + b"<!DOCTYPE a>"),
        (False, HEADER + b"<iq/>"),
        (False, b"\x16\x03\x01"),
        (True, b""),
        (True, b"</stream:stream>"),
        (True, b"<message to='romeo@example.org'><body>x<"),
        (True, b"<a></b>"),
        (True, b"<message from='juliet@example.org'/>"),
    ],
)
def test_a_connection_leaves_no_garbage(running: tuple[xmppd.Server, Path], login: bool, last_words: bytes) -> None:
    """S10: else memory would wait for a full collection, and everybody for that one."""
    server, data = running
    assert server.network is not None
    context = ssl.create_default_context(cafile=authority_in(data))
    port = next(iter(server.network.listeners.values())).port
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        client = Client(lambda: SocketWire(("127.0.0.1", port), context), Cast()).connect()
        if login:
            client.login("romeo")
        client.sends_raw(last_words)
        if last_words:
            assert client.wire is not None
            client.wire.read(0.2)
        client.disconnects()
        wait_until_nobody_is_there(server)
        gc.collect()
        left = Counter(type(thing).__name__ for thing in gc.garbage if is_ours(thing))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left


def is_ours(thing: object) -> bool:
    """Whether an object is the server's, and not one of these tests' own."""
    return type(thing).__module__ == "xmppd" or type(thing).__name__ == "DefusedXMLParser"


def wait_until_nobody_is_there(server: xmppd.Server) -> None:
    """Return when the server has no connection any more, and has ended that turn."""
    gone = threading.Event()

    def look() -> None:
        assert server.network is not None
        if server.network.connections:
            server.loop.call_later(0.01, look)
        else:
            server.loop.post(gone.set)

    server.loop.post(look)
    assert gone.wait(10), "the server keeps a connection"
