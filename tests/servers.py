"""The two servers that the dialogues run against: one in this process, one of its own.

`MemoryServer` is the real server without sockets: a client's bytes go straight into a
`ClientStream`, and turns of the real loop happen while a client waits. `ProcessServer` is
`python xmppd.py run` on 127.0.0.1, reached over TCP and TLS and ended with SIGTERM.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

import xmppd
from tests.dialogue import Cast, Client, SocketWire, Wire, password_of, pieces

PEOPLE = ("romeo", "juliet", "nurse", "benvolio")  # the accounts @example.org of every test server
HOSTS = ("example.org", "example.net")
START_TIMEOUT = 20.0  # seconds; a cold start makes certificates
STOP_TIMEOUT = 15.0  # seconds from SIGTERM to the end

BUG = re.compile(r"Traceback|unexpected error|\(xmppd\.py:\d+ in ")  # how a log line about an exception looks

BASE: dict[str, Any] = {
    "hosts": list(HOSTS),
    "listen": {"client": [], "client_tls": [], "server": [], "component": [], "web": []},
    "limits": {
        "connections_per_address": 0,
        "connections_per_minute": 0,
        "logins_per_minute": 0,
        "bytes_per_second": 0,
    },
    "federation": {"enabled": False},
    "upload": {"check": False},  # it would ask the name service for example.org
}


def configuration(*changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `BASE` with the changes laid over it, section by section."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for change in changes:
        for key, value in change.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged


def write_configuration(folder: Path, values: Mapping[str, Any]) -> Path:
    """Write xmppd.toml into the folder; returns its path."""
    path = folder / "xmppd.toml"
    path.write_text(tomli_w.dumps(values))
    return path


@functools.cache
def credentials_of(name: str) -> dict[str, Any]:
    """Return the account document's credentials; made once, for they are made to be slow."""
    return xmppd.make_credentials(password_of(name))


def password_of_jid(jid: str) -> str:
    """Return the password that the tests give to the account `jid`."""
    return password_of(jid.partition("@")[0])


# ---- a process of its own -------------------------------------------------------------


class ServerProcess:
    """`python xmppd.py --config FILE --data DIR run`; its stderr is collected, line by line.

    `program` stands in for xmppd.py: the words of a script that does something else before.
    """

    def __init__(self, config: Path, data: Path, program: Sequence[str] = ()) -> None:
        program = program or (str(xmppd.__file__),)
        self.command = [sys.executable, *program, "--config", str(config), "--data", str(data)]
        self.lines: list[str] = []
        self._new_lines: queue.Queue[str] = queue.Queue()
        command, nowhere = [*self.command, "run"], subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            self._new_lines.put(line)
        self._new_lines.put("")  # the end

    def wait_for(self, word: str, timeout: float = START_TIMEOUT) -> str:
        """Return the next line on stderr that contains `word`."""
        give_up = time.monotonic() + timeout
        while True:
            try:
                line = self._new_lines.get(timeout=max(0.0, give_up - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"the server did not say {word!r} in {timeout} seconds:\n{self.log()}") from None
            if not line:
                raise AssertionError(f"the server ended before it said {word!r}:\n{self.log()}")
            if word in line:
                return line

    def log(self) -> str:
        """Return what the server wrote to stderr so far."""
        return "\n".join(self.lines)

    def check_log(self) -> None:
        """Check that the log tells of no bug that the loop survived."""
        bugs = [line for line in self.lines if BUG.search(line)]
        assert not bugs, self.log()

    def kill(self) -> None:
        """End it as a power cut does."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT)
        self._reader.join(STOP_TIMEOUT)

    def stop(self) -> None:
        """End it with SIGTERM, and check that it leaves with status 0 and without a traceback."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end in {STOP_TIMEOUT} seconds:\n{self.log()}") from None
        self._reader.join(STOP_TIMEOUT)
        assert status == 0, f"exit status {status}:\n{self.log()}"
        self.check_log()


class ProcessServer:
    """A server process on 127.0.0.1 with the test accounts; starts and stops with `start()` and `stop()`."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        self.folder = folder
        self.data = folder / "data"
        listen = {"client": ["127.0.0.1:0"], "client_tls": ["127.0.0.1:0"]}
        self.config = write_configuration(folder, configuration({"listen": listen}, values))
        self.ports: dict[str, int] = {}  # by the names in [listen], once it runs
        self.cast = Cast()
        self.program: Sequence[str] = ()  # see `ServerProcess`
        self._process: ServerProcess | None = None

    @property
    def process(self) -> ServerProcess:
        """The running process."""
        assert self._process is not None, "the server is not running"
        return self._process

    def start(self) -> None:
        """Start and wait until it says that it is ready."""
        self._process = ServerProcess(self.config, self.data, self.program)
        try:
            ready = self._process.wait_for("ready: ")
        except AssertionError:
            self._process.kill()
            raise
        self.ports = {name: int(port) for name, port in re.findall(r"(\w+) 127\.0\.0\.1:(\d+)", ready)}

    @property
    def port(self) -> int:
        """The port for clients."""
        return self.ports["client"]

    def check_log(self) -> None:
        """See `ServerProcess.check_log`."""
        self.process.check_log()

    def stop(self) -> None:
        """End the process if it runs, checked."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def kill(self) -> None:
        """End the process without a warning; `start()` may follow."""
        self.process.kill()
        self._process = None

    def command(self, *words: str, text: str = "") -> str:
        """Run `xmppd WORDS` for this server; `text` is its standard input. Returns its output."""
        command = [sys.executable, str(xmppd.__file__), "--config", str(self.config), "--data", str(self.data), *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=STOP_TIMEOUT, check=False)
        assert done.returncode == 0, f"xmppd {' '.join(words)}: exit status {done.returncode}: {done.stderr}"
        return done.stdout

    def add_account(self, jid: str, password: str = "") -> None:
        """Make an account; its password is that of `password_of` unless given. The server may run or not."""
        self.command("user", "add", jid, "--password-stdin", text=(password or password_of_jid(jid)) + "\n")

    def renew_accounts(self) -> None:
        """Take the people's accounts away with all that belongs to them, and make them anew; the server runs."""
        for name in PEOPLE:
            jid = f"{name}@example.org"
            with contextlib.suppress(xmppd.ConfigError), xmppd.ControlClient(self.data) as control:  # it may be gone
                control.request("user remove", {"jid": jid})
            with xmppd.ControlClient(self.data) as control:
                control.request("user add", {"jid": jid, "credentials": credentials_of(name)})

    @property
    def authority(self) -> Path:
        """The certificate of the server's own authority, to be trusted by clients."""
        return authority_in(self.data)

    @functools.cached_property
    def trust(self) -> ssl.SSLContext:
        """A client's TLS context that trusts nobody but this server's own authority."""
        return ssl.create_default_context(cafile=str(self.authority))

    def client(self, *, host: str = "example.org", split: int = 0, direct_tls: bool = False) -> Client:
        """Return somebody who has not yet connected; `split` cuts what they send into pieces of so many bytes."""

        def dial() -> Wire:
            port = self.ports["client_tls" if direct_tls else "client"]
            return SocketWire(("127.0.0.1", port), self.trust, split=split, direct_tls=host if direct_tls else "")

        return Client(dial, self.cast, host=host)


def authority_in(data: Path) -> Path:
    """Return the file with the certificate of the authority that a server with this data folder has made."""
    return data / "tls" / "ca.pem"


# ---- in this process ------------------------------------------------------------------


class Clock:
    """Seconds that never go back, and that a test may skip."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        """Return the loop's time."""
        return time.monotonic() + self.skipped

    def skip(self, seconds: float) -> None:
        """Let time pass at once."""
        self.skipped += seconds


class BugReports(logging.Handler):
    """Collects what the server logs about its own bugs: a loop that survives them must not hide them from the tests."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.reports: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record that has a traceback."""
        if record.exc_info:
            self.reports.append(self.format(record))


class MemoryTransport:
    """The server's end of a connection in memory (a `Transport`, chapter 11)."""

    def __init__(self, loop: xmppd.Loop) -> None:
        self.loop = loop
        self.stream: xmppd.Carried | None = None
        self.secure = False
        self.lab = False
        self.compressed = False
        self.refused_certificate = False
        self.certificate: bytes | None = None  # that the other end, a server, shows when it is asked
        self.certificate_is_good = True
        self.peer_tls: xmppd.PeerTLS | None = None  # how TLS was begun with a server
        self.peer = "127.0.0.1"
        self.incoming = bytearray()  # sent by the client, not yet taken by the stream
        self.outgoing = bytearray()  # written by the stream, not yet read by the client
        self.closed = False  # by the server
        self._pauses = 0

    def deliver(self) -> None:
        """Give the stream what the client has sent, unless it wants to read no more."""
        if self.incoming and not self._pauses and not self.closed:
            data = bytes(self.incoming)
            self.incoming.clear()
            assert self.stream is not None
            self.stream.receive(data)

    def write(self, data: bytes) -> None:
        """Queue bytes for the client."""
        assert not self.closed, f"written after the end: {data!r}"
        self.outgoing += data

    write_ahead = write  # nothing waits here

    def start_tls(self, host: str, peer: xmppd.PeerTLS | None = None) -> None:
        """The handshake takes a turn."""
        self.peer_tls = peer
        self.loop.post(self._tls_established)

    def _tls_established(self) -> None:
        assert self.stream is not None
        if self.peer_tls is not None and self.peer_tls.verify and self.certificate and not self.certificate_is_good:
            self.refused_certificate = self.closed = True
            return self.stream.connection_lost()
        self.secure = True
        self.stream.tls_established()

    def set_rate(self, rate: float) -> None:
        """Memory takes everything at once."""

    def compress(self) -> None:
        """Not in memory: the `wire` dialogues compress."""
        raise AssertionError("compression needs @pytest.mark.wire")

    def close(self) -> None:
        """The server hangs up; the client can still read what was written."""
        self.closed = True

    def pause(self) -> None:
        """Let the client's bytes wait."""
        self._pauses += 1

    def resume(self) -> None:
        """Undo one `pause`."""
        self._pauses -= 1
        self.loop.post(self.deliver)

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Memory takes everything at once; but who has hung up gets nothing."""
        self.loop.run_last(lambda: None if self.closed else callback())

    def channel_bindings(self) -> dict[str, bytes]:
        """There is a binding, so that the -PLUS mechanisms work in memory too."""
        return {"tls-exporter": b"in memory"} if self.secure else {}

    def peer_certificate(self) -> bytes | None:
        """No client shows one here."""
        return self.certificate if self.peer_tls is not None and self.peer_tls.verify else None


class MemoryServer:
    """The server in this process, with the people's accounts; `server` is the real one."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        config = xmppd.load_config(write_configuration(folder, configuration(values)), data=folder / "data")
        self.bugs = BugReports()
        logging.getLogger("xmppd").addHandler(self.bugs)
        self.clock = Clock()
        self.loop = xmppd.Loop(self.clock)
        self.storage = xmppd.Storage(config.data, self.loop, sync=False, freeze=True)
        self.server = xmppd.Server(config, self.loop, self.storage, xmppd.FEATURES)
        self.cast = Cast()
        for name in PEOPLE:
            self.server.create_account(xmppd.JID(name, "example.org", ""), credentials_of(name))

    def client(self, *, host: str = "example.org", split: int = 0, direct_tls: bool = False) -> Client:
        """See `ProcessServer.client`."""
        return Client(lambda: MemoryWire(self, split=split, direct_tls=direct_tls), self.cast, host=host)

    def add_account(self, jid: str, password: str = "") -> None:
        """Make an account; its password is that of `password_of` unless given."""
        self.server.create_account(xmppd.JID.parse(jid), xmppd.make_credentials(password or password_of_jid(jid)))

    def check_log(self) -> None:
        """Check that nothing was logged with a traceback: it would be a bug that the loop survived."""
        assert not self.bugs.reports, "\n".join(self.bugs.reports)

    def stop(self) -> None:
        """Release files and threads."""
        logging.getLogger("xmppd").removeHandler(self.bugs)
        self.storage.close()
        self.loop.close()


class MemoryWire:
    """The client's end of a connection in memory; waiting for bytes means to run turns of the server's loop.

    `split` is the number of bytes that the server gets at once, 0 for all; `protocol` names
    who listens there (`Server.protocols`).
    """

    def __init__(
        self, server: MemoryServer, *, split: int = 0, direct_tls: bool = False, protocol: str = "xmpp-client"
    ) -> None:
        self.loop = server.loop
        self.split = split
        self.transport = MemoryTransport(server.loop)
        self.transport.secure = direct_tls
        accept: Callable[[Any], xmppd.Carried] = server.server.protocols[protocol]
        self.transport.stream = accept(self.transport)

    def send(self, data: bytes) -> None:
        """See `Wire.send`."""
        for piece in pieces(data, self.split):
            self.transport.incoming += piece
            self.transport.deliver()

    def read(self, timeout: float) -> bytes | None:
        """See `Wire.read`."""
        give_up = time.monotonic() + timeout
        self.loop.turn(0)
        while not self.transport.outgoing and not self.transport.closed:
            left = give_up - time.monotonic()
            if left <= 0:
                return None
            self.loop.turn(left)
        data = bytes(self.transport.outgoing)
        self.transport.outgoing.clear()
        return data

    def start_tls(self, host: str) -> None:
        """See `Wire.start_tls`."""
        give_up = time.monotonic() + START_TIMEOUT
        while not self.transport.secure:
            self.loop.turn(max(0.0, give_up - time.monotonic()))
            assert time.monotonic() < give_up, "the server does not begin TLS"

    def bindings(self) -> dict[str, bytes]:
        """See `Wire.bindings`."""
        return self.transport.channel_bindings()

    def close(self) -> None:
        """See `Wire.close`."""
        if not self.transport.closed:
            self.transport.closed = True
            assert self.transport.stream is not None
            self.transport.stream.connection_lost()
        self.loop.turn(0)
