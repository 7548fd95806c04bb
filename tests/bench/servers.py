"""The servers under test: how each is installed, configured alike, given its users, started and ended.

All of them: one host, `bench.example`, on 127.0.0.1; the same ECDSA certificate; TLS 1.3;
SCRAM-SHA-1; roster, offline messages, disco, ping, last activity, private XML, time and
version; no archive; no limits of rates; log level info, into a file; as many users with as
many contacts; the defaults of their distribution in everything else. What a configuration
says is in the method that writes it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import tomli_w

import xmppd
from tests.bench.accounting import cores, cpu_seconds
from tests.bench.people import (
    EVERYBODY,
    HOST,
    ITERATIONS,
    PASSWORD,
    PRESENT,
    SALT,
    bare_jid,
    contacts_of,
    name_of,
    scram_keys,
)

START_TIMEOUT = 60.0  # seconds
STOP_TIMEOUT = 30.0  # seconds from SIGTERM to the end
SEED_TIMEOUT = 180.0  # seconds for ejabberd to make its accounts
POLL = 0.001  # seconds between two looks whether a server is ready
PACKAGES = ("prosody", "ejabberd")
POLICY = Path("/usr/sbin/policy-rc.d")
HELLO = (
    f"<?xml version='1.0'?><stream:stream to='{HOST}' version='1.0' xmlns='jabber:client' "
    "xmlns:stream='http://etherx.jabber.org/streams'>"
).encode()


# What the peers do besides the core. "like": what xmppd does. "debian": what the packages switch on,
# but for archive, federation, the web, administration, and limits of rates. "archive": like xmppd's,
# with the message archive, copies for other devices and stream management. Rooms are on in all.
LIKE = {
    "prosody": ("roster", "saslauth", "tls", "disco", "offline", "ping", "lastactivity", "private", "time", "version",
                "blocklist", "pep", "vcard_legacy"),
    "ejabberd": ("mod_disco", "mod_last", "mod_offline", "mod_ping", "mod_private", "mod_roster", "mod_time",
                 "mod_version", "mod_blocking", "mod_caps", "mod_muc", "mod_privacy", "mod_pubsub", "mod_vcard",
                 "mod_vcard_xupdate"),
}  # fmt: skip
DEBIAN = {
    "prosody": ("roster", "saslauth", "tls", "disco", "offline", "ping", "private", "time", "uptime", "version",
                "blocklist", "bookmarks", "carbons", "csi_simple", "pep", "posix", "smacks", "vcard4", "vcard_legacy"),
    "ejabberd": ("mod_disco", "mod_last", "mod_offline", "mod_ping", "mod_private", "mod_roster", "mod_version",
                 "mod_adhoc", "mod_avatar", "mod_blocking", "mod_caps", "mod_carboncopy", "mod_client_state",
                 "mod_fail2ban", "mod_muc", "mod_privacy", "mod_pubsub", "mod_push", "mod_push_keepalive", "mod_shared_roster",
                 "mod_stream_mgmt", "mod_vcard", "mod_vcard_xupdate"),
}  # fmt: skip
ARCHIVE = {
    "xmppd": ("archive",),
    "prosody": (*LIKE["prosody"], "mam", "carbons", "smacks"),
    "ejabberd": (*LIKE["ejabberd"], "mod_mam", "mod_carboncopy", "mod_stream_mgmt"),
}
MODULES: Mapping[str, Mapping[str, Sequence[str]]] = {"like": LIKE, "debian": DEBIAN, "archive": ARCHIVE}


class NotInstalled(Exception):
    """A peer isn't there; the text says how to get it."""


def install_peers() -> int:
    """Install Debian's Prosody and ejabberd so that neither starts by itself; return the exit status.

    invoke-rc.d(8) asks policy-rc.d whether a package may start its service: 101 is no.
    """
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print("installing the peers takes root and apt-get: on Debian, run this as root", file=sys.stderr)
        return 1
    is_ours = not POLICY.exists()
    if is_ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        return subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False).returncode
    finally:
        if is_ours:
            POLICY.unlink()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Have what is started inside run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server(ABC):
    """A server with a folder of its own; prepared once, started anew for each round."""

    name: ClassVar[str]
    user: ClassVar[str] = ""  # whom it insists on being; "": whoever runs the benchmark
    direct_tls_only: ClassVar[bool] = False

    def __init__(self, folder: Path, certificates: xmppd.CertificateFiles, modules: str = "like") -> None:
        self.folder = folder / self.name
        self.modules = MODULES[modules].get(self.name, ())
        self.port = free_port()  # STARTTLS
        self.tls_port = free_port()  # TLS from the first byte
        self.ready_seconds = self.start_cpu = 0.0  # what the last start took
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir()
        self.certificate = self.folder / "leaf.pem"
        self.key = self.folder / "leaf.key"
        shutil.copy(certificates.certificate, self.certificate)
        shutil.copy(certificates.key, self.key)

    @staticmethod
    def version() -> str:
        """Return what is measured, for the report; raises NotInstalled."""
        return ""

    @abstractmethod
    def prepare(self) -> None:
        """Write the configuration and make the users."""

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Return the command that runs it in the foreground."""

    def environment(self) -> dict[str, str]:
        """Return its environment: nothing that would keep Python from using its bytecode."""
        return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def hand_over(self) -> None:
        """Give the folder to the user who runs the server."""
        if self.user and os.geteuid() == 0:
            for path in (self.folder, *self.folder.rglob("*")):
                shutil.chown(path, self.user, self.user)

    def identity(self) -> dict[str, Any]:
        """Return who runs the server, for subprocess."""
        if not self.user or os.geteuid() != 0:
            return {}
        entry = pwd.getpwnam(self.user)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    # -- its life

    @property
    def pid(self) -> int:
        """The process that was started; others may be below it."""
        assert self.process is not None, f"{self.name} is not running"
        return self.process.pid

    def start(self) -> None:
        """Start it on its core, and wait until it answers a stream header."""
        with (self.folder / "output.txt").open("ab") as output, on_core(cores()[0]):
            began = time.monotonic()
            self.process = subprocess.Popen(
                [str(word) for word in self.command()], cwd=self.folder, env=self.environment(),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, **self.identity(),
            )  # fmt: skip
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() - began > START_TIMEOUT:
                self.stop()
                raise RuntimeError(f"{self.name} does not start; see {self.folder}")
            self._pass_time(POLL)
        self.ready_seconds, self.start_cpu = time.monotonic() - began, cpu_seconds(self.pid)

    def _pass_time(self, seconds: float) -> None:
        """Wait between two looks, no longer than the server lives."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _answers(self) -> bool:
        try:
            port = self.tls_port if self.direct_tls_only else self.port
            with socket.create_connection(("127.0.0.1", port), START_TIMEOUT) as sock:
                if self.direct_tls_only:
                    return True
                sock.sendall(HELLO)
                return bool(sock.recv(1))
        except OSError:
            return False

    def stop(self) -> None:
        """End it, politely if it lets us."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def settle(self, timeout: float = 10.0) -> None:
        """Wait until it has done what it has put off: less than 2% of a core for a fifth of a second."""
        give_up = time.monotonic() + timeout
        before = cpu_seconds(self.pid)
        while time.monotonic() < give_up:
            self._pass_time(0.2)
            now = cpu_seconds(self.pid)
            if now - before < 0.004:
                return
            before = now


class Xmppd(Server):
    """This repository's server, from bytecode, as it was when the benchmark began."""

    name = "xmppd"

    @staticmethod
    def version() -> str:
        """See `Server.version`."""
        return f"xmppd {xmppd.__version__} on Python {sys.version.split()[0]}"

    def command(self) -> Sequence[str | Path]:
        """See `Server.command`; `-m` runs from bytecode, as the console script does."""
        return [sys.executable, "-m", "xmppd", "--config", self.folder / "xmppd.toml", "run"]

    def prepare(self) -> None:
        """See `Server.prepare`. The users are made by the server's own code, before it runs."""
        shutil.copy(xmppd.__file__, self.folder / "xmppd.py")
        config = self.folder / "xmppd.toml"
        config.write_text(tomli_w.dumps({
            "hosts": [HOST],
            "data": str(self.folder / "data"),
            "listen": {"client": [f"127.0.0.1:{self.port}"], "client_tls": [f"127.0.0.1:{self.tls_port}"],
                       "server": [], "component": [], "web": []},
            "tls": {"certificate": str(self.certificate), "key": str(self.key)},
            "limits": {"connections_per_address": 0, "connections_per_minute": 0, "logins_per_minute": 0,
                       "bytes_per_second": 0, "room_stanzas_per_minute": 0, "recipients_per_minute": 0, "offline": 1_000_000},
            "archive": {"enabled": "archive" in self.modules},
            "federation": {"enabled": False},
        }))  # fmt: skip
        loop = xmppd.Loop()
        storage = xmppd.Storage(self.folder / "data", loop)
        server = xmppd.Server(xmppd.load_config(config), loop, storage, xmppd.FEATURES)
        credentials = xmppd.make_credentials(PASSWORD)
        for number in EVERYBODY:
            server.create_account(xmppd.JID.parse(bare_jid(number)), credentials)
        for number in PRESENT:
            for version, contact in enumerate(contacts_of(number), 1):
                item = {"subscription": "both", "ver": version}
                server.rosters.put(xmppd.JID.parse(bare_jid(number)), bare_jid(contact), item)
        loop.turn(0)
        storage.close()
        loop.close()


class Prosody(Server):
    """Debian's Prosody with its own files, on epoll."""

    name = "prosody"
    user = "prosody"

    @staticmethod
    def version() -> str:
        """See `Server.version`."""
        return f"Prosody {debian_version('prosody')}"

    def command(self) -> Sequence[str | Path]:
        """See `Server.command`."""
        return ["/usr/bin/prosody", "-F", "--config", self.folder / "prosody.cfg.lua"]

    def prepare(self) -> None:
        """See `Server.prepare`. Users and rosters are files, of which it has one each."""
        (self.folder / "prosody.cfg.lua").write_text(f"""
            data_path = "{self.folder}/data"
            pidfile = "{self.folder}/prosody.pid"
            interfaces = {{ "127.0.0.1" }}
            c2s_ports = {{ {self.port} }}
            c2s_direct_tls_ports = {{ {self.tls_port} }}
            s2s_ports = {{}}
            network_backend = "epoll"
            modules_enabled = {{ {", ".join(f'"{name}"' for name in self.modules)} }}
            modules_disabled = {{ "s2s" }}
            c2s_require_encryption = true
            authentication = "internal_hashed"
            storage = "internal"
            default_archive_policy = true
            log = {{ info = "{self.folder}/prosody.log" }}
            ssl = {{ certificate = "{self.certificate}", key = "{self.key}" }}
            VirtualHost "{HOST}"
            Component "conference.{HOST}" "muc"
                muc_room_default_public = true
                muc_room_locking = false
        """)
        base = self.folder / "data" / HOST.replace(".", "%2e")
        for kind in ("accounts", "roster"):
            (base / kind).mkdir(parents=True)
        keys = scram_keys(SALT, ITERATIONS)
        account = (
            f'return {{ ["salt"] = "{SALT.decode()}"; ["iteration_count"] = {ITERATIONS}; '
            f'["stored_key"] = "{keys.stored.hex()}"; ["server_key"] = "{keys.server.hex()}"; }};\n'
        )
        for number in EVERYBODY:
            (base / "accounts" / f"{name_of(number)}.dat").write_text(account)
        for number in PRESENT:
            items = "".join(
                f'["{bare_jid(contact)}"] = {{ ["subscription"] = "both"; ["groups"] = {{}}; }}; '
                for contact in contacts_of(number)
            )
            roster = f'return {{ [false] = {{ ["version"] = 1; ["pending"] = {{}}; }}; {items}}};\n'
            (base / "roster" / f"{name_of(number)}.dat").write_text(roster)
        self.hand_over()


class Ejabberd(Server):
    """Debian's ejabberd with Mnesia; without Erlang's distribution, so that nothing else listens (no epmd)."""

    name = "ejabberd"
    user = "ejabberd"
    options: ClassVar[Mapping[str, str]] = {
        "mod_mam": "default: always",
        "mod_muc": "default_room_options: {mam: false}",
        "mod_offline": "access_max_user_messages: max_user_offline_messages",
        "mod_pubsub": "plugins: [flat, pep]",
        "mod_roster": "versioning: true",
        "mod_vcard": "search: false",
    }

    @staticmethod
    def version() -> str:
        """See `Server.version`."""
        return f"ejabberd {debian_version('ejabberd')}"

    def command(self) -> Sequence[str | Path]:
        """See `Server.command`; the options are those of Debian's ejabberdctl."""
        return [
            "/usr/bin/erl", "+K", "true", "+P", "250000", "-env", "ERL_CRASH_DUMP_BYTES", "0",
            "-mnesia", "dir", f'"{self.folder}/spool"', "-s", "ejabberd", "-noinput",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """See `Server.environment`; the variables are those of Debian's ejabberdctl."""
        return {
            **super().environment(),
            "HOME": str(self.folder),
            "ERL_LIBS": "/usr/lib/x86_64-linux-gnu" if Path("/usr/lib/x86_64-linux-gnu").is_dir() else "/usr/lib",
            "ERL_MAX_PORTS": "32000",
            "ERL_MAX_ETS_TABLES": "1400",
            "EJABBERD_CONFIG_PATH": str(self.folder / "ejabberd.yml"),
            "EJABBERD_LOG_PATH": str(self.folder / "ejabberd.log"),
        }

    def prepare(self) -> None:
        """See `Server.prepare`. The users are made by a first run, in Erlang."""
        (self.folder / "spool").mkdir()
        pair = self.folder / "pair.pem"
        pair.write_text(self.certificate.read_text() + self.key.read_text())
        options = "\n".join(f"  {name}: {{{self.options.get(name, '')}}}" for name in self.modules)
        (self.folder / "ejabberd.yml").write_text(f"""
hosts: ["{HOST}"]
loglevel: info
log_rotate_count: 0
certfiles: ["{pair}"]
listen:
  - {{port: {self.port}, ip: "127.0.0.1", module: ejabberd_c2s, starttls_required: true,
     max_stanza_size: 262144, backlog: 1024}}
  - {{port: {self.tls_port}, ip: "127.0.0.1", module: ejabberd_c2s, tls: true,
     max_stanza_size: 262144, backlog: 1024}}
auth_method: internal
auth_password_format: scram
shaper_rules:
  max_user_sessions: 100
  max_user_offline_messages: 1000000
modules:
{options}
""")
        self.hand_over()
        with on_core(cores()[0]), (self.folder / "output.txt").open("ab") as output:
            subprocess.run(
                [*map(str, self.command()), "-eval", self._users()], cwd=self.folder, env=self.environment(),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=SEED_TIMEOUT, check=True,
                **self.identity(),
            )  # fmt: skip

    def _users(self) -> str:
        """Return the Erlang expression that makes the accounts and rosters, says that it did, and ends."""
        circle, half = len(PRESENT), len(list(contacts_of(0))) // 2
        return f"""
            Host = <<"{HOST}">>,
            Name = fun(N) -> iolist_to_binary(io_lib:format("u~4..0b", [N])) end,
            [ok = ejabberd_auth:try_register(Name(N), Host, <<"{PASSWORD}">>)
                || N <- lists:seq({EVERYBODY.start}, {EVERYBODY.stop - 1})],
            [ok = mod_admin_extra:add_rosteritem(
                    Name(N), Host, Name((N + D + {circle}) rem {circle}), Host, <<>>, <<>>, <<"both">>)
                || N <- lists:seq(0, {circle - 1}), D <- lists:seq(-{half}, {half}), D /= 0],
            init:stop().
        """


class Floor(Server):
    """The bare relay: see `tests.bench.floor`. It knows nobody and believes everybody."""

    name = "floor"
    direct_tls_only = True

    def prepare(self) -> None:
        """See `Server.prepare`."""
        shutil.copy(Path(__file__).with_name("floor.py"), self.folder / "floor.py")

    def command(self) -> Sequence[str | Path]:
        """See `Server.command`."""
        return [sys.executable, "-m", "floor", self.certificate, self.key, str(self.tls_port)]


SERVERS: dict[str, type[Server]] = {kind.name: kind for kind in (Floor, Xmppd, Prosody, Ejabberd)}


def debian_version(package: str) -> str:
    """Return the installed version of a Debian package; raises NotInstalled."""
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise NotInstalled(f"{package}: this is not Debian, where the peers come from") from None
    status, _, version = done.stdout.partition(" ")
    if status != "installed":
        raise NotInstalled(f"{package} is not installed; as root: python -m tests.bench --install-peers")
    return version
