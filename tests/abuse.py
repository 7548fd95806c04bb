"""Attacks on a server process, while two honest people chat and measure how long their messages take.

    python -m tests.abuse                                   all attacks in full, some ten minutes; Linux
    python -m tests.abuse --half-open 20000 half_open quick_leavers

For each attack it prints the latency that the honest pair saw meanwhile, from the moment at
which a message was due to the moment at which it was there, and the server's memory before,
at its peak and afterwards. The promise: below 100 ms for 99 of 100 messages, and memory
back within 5 MB of where it was. The exit status is 1 if it was not kept.

Attackers are processes of their own with low priority, so that their work isn't measured.
They come from many addresses of 127.0.0.0/8, to stay below the server's limit per address.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import selectors
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dialogue import Cast, Client, SocketWire, password_of
from tests.servers import PEOPLE, ProcessServer

RATE = 20  # honest messages per second
PROMISED_LATENCY = 100.0  # ms, for 99 of 100
PROMISED_MEMORY = 5.0  # MB above the base line afterwards
PER_ADDRESS = 90  # connections from one address; the server allows 100
PER_PROCESS = 8000  # connections of one attacker: below the usual limits of descriptors
AT_ONCE = 256  # connections that are being made
UNAUTHENTICATED_TIMEOUT = 10  # seconds; so configured for the server in a full run
GIVE_UP = 180.0  # seconds for one attack

STREAM = "xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='example.org' version='1.0'"
HEADER = f"<?xml version='1.0'?><stream:stream {STREAM}>".encode()
STARTTLS = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
COMPRESS = b"<compress xmlns='http://jabber.org/protocol/compress'><method>zlib</method></compress>"
COMPRESSED = "<compressed xmlns='http://jabber.org/protocol/compress'/>"


@dataclass(frozen=True)
class Target:
    """Where the server is, as an attacker knows it."""

    client: int  # the ports
    client_tls: int
    authority: str  # the file with its certificate
    block: int  # which block of 127.0.0.0/8 the attacker has
    patience: float  # seconds after which the server ought to have lost its own

    def source(self, number: int) -> tuple[str, int]:
        """Return the address from which the attacker's connection with this number comes."""
        place = number // PER_ADDRESS
        return f"127.{self.block}.{place // 250}.{1 + place % 250}", 0

    def login(self, name: str, **options: Any) -> Client:
        """Log in as somebody, from 127.0.0.1."""
        context = ssl.create_default_context(cafile=self.authority)
        client = Client(lambda: SocketWire(("127.0.0.1", self.client), context), Cast())
        return client.login(name, **options)

    def hello(self) -> bytes:
        """Return a TLS client's first message."""
        output = ssl.MemoryBIO()
        session = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), output, server_hostname="example.org")
        with contextlib.suppress(ssl.SSLWantReadError):
            session.do_handshake()
        return output.read()


# ---- attackers ------------------------------------------------------------------------


class Crowd:
    """Very many connections of one attacker; each says `words`, then a byte of `crumbs` per second.

    `leave`: they hang up when they have said that. Else they wait until the server does.
    """

    def __init__(self, target: Target, count: int, port: int, *, words: bytes = b"", crumbs: bytes = b"", leave: bool = False) -> None:
        self.target = target
        self.count = count
        self.address = ("127.0.0.1", port)
        self.words = words
        self.crumbs = crumbs
        self.leave = leave
        self.begun = 0
        self.connected = 0
        self.closed = 0
        self.connecting: set[socket.socket] = set()
        self.talking: list[socket.socket] = []
        self.selector = selectors.DefaultSelector()

    def run(self) -> dict[str, int]:
        """Connect all, and wait until all are gone; raises TimeoutError if the server keeps some."""
        give_up = time.monotonic() + GIVE_UP
        next_crumb, crumb = time.monotonic() + 1, 0
        while self.closed < self.count:
            while self.begun < self.count and len(self.connecting) < AT_ONCE:
                self.begin()
            for key, events in self.selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                self.go_on(key.fileobj, events)
            if time.monotonic() > next_crumb:
                self.drop(self.crumbs[crumb % len(self.crumbs) :][:1] if self.crumbs else b"")
                next_crumb, crumb = next_crumb + 1, crumb + 1
            if time.monotonic() > give_up:
                raise TimeoutError(f"the server keeps {self.connected - self.closed} of {self.connected} connections")
        return {"connected": self.connected}

    def begin(self) -> None:
        """Begin one connection."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: choose the port by the whole connection
        sock.bind(self.target.source(self.begun))
        self.begun += 1
        self.connecting.add(sock)
        sock.connect_ex(self.address)
        self.selector.register(sock, selectors.EVENT_WRITE)

    def go_on(self, sock: socket.socket, events: int) -> None:
        """A connection is made, or the server says something, or hangs up."""
        try:
            if sock in self.connecting:
                self.connecting.discard(sock)
                self.connected += 1
                sock.send(self.words)
                if self.leave:
                    return self.end(sock)
                self.talking.append(sock)
                self.selector.modify(sock, selectors.EVENT_READ)
            elif not sock.recv(65536):
                self.end(sock)
        except OSError:
            self.end(sock)

    def drop(self, crumb: bytes) -> None:
        """Let everybody say one more byte."""
        for sock in list(self.talking) if crumb else ():
            with contextlib.suppress(OSError):
                sock.send(crumb)

    def end(self, sock: socket.socket) -> None:
        """A connection is over."""
        self.closed += 1
        self.selector.unregister(sock)
        if sock in self.talking[-1:]:
            self.talking.pop()
        elif not self.leave and self.crumbs and sock in self.talking:
            self.talking.remove(sock)
        sock.close()


def half_open(target: Target, count: int) -> dict[str, int]:
    """Connect, and say nothing."""
    return Crowd(target, count, target.client).run()


def half_a_hello(target: Target, count: int) -> dict[str, int]:
    """Begin TLS, but stop within the first message."""
    return Crowd(target, count, target.client_tls, words=target.hello()[:100]).run()


def half_a_handshake(target: Target, count: int) -> dict[str, int]:
    """Let the server sign its half of a TLS handshake, and then say nothing."""
    return Crowd(target, count, target.client_tls, words=target.hello()).run()


def starttls_and_silence(target: Target, count: int) -> dict[str, int]:
    """Ask for TLS and don't begin it."""
    return Crowd(target, count, target.client, words=HEADER + STARTTLS).run()


def headerless(target: Target, count: int) -> dict[str, int]:
    """Send white space, which means nothing, once a second and for ever."""
    return Crowd(target, count, target.client, words=b" " * 100, crumbs=b" ").run()


def byte_a_second(target: Target, count: int) -> dict[str, int]:
    """Send a header that never ends, a byte a second."""
    return Crowd(target, count, target.client, crumbs=HEADER[:-1]).run()


def quick_leavers(target: Target, count: int) -> dict[str, int]:
    """Connect, say half a header, hang up (CVE-2026-43506)."""
    return Crowd(target, count, target.client, words=HEADER[:60], leave=True).run()


def nothing(target: Target, count: int) -> dict[str, int]:
    """Wait so many seconds: what the honest see when nobody attacks, on this machine and now."""
    threading.Event().wait(count)
    return {}


def one_address(target: Target, count: int) -> dict[str, int]:
    """Connect from one address until the server refuses, and see how often it does not."""
    socks = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", target.client), timeout=10, source_address=(f"127.{target.block}.0.1", 0))
        sock.sendall(HEADER)
        socks.append(sock)
    welcome = 0
    for sock in socks:
        with contextlib.suppress(ConnectionResetError):
            welcome += sock.recv(1000).startswith(b"<?xml")
    for sock in socks:  # not before all have been answered: each that leaves makes room for another
        sock.close()
    return {"connected": count, "welcome": welcome}


BOMBS = {
    "billion laughs": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY a0 'ha'>"
    + b"".join(b"<!ENTITY a%d '%b'>" % (number + 1, b"&a%d;" % number * 10) for number in range(12))
    + b"]><stream:stream to='&a12;'>",
    "external entity": b"<!DOCTYPE a [<!ENTITY a SYSTEM 'file:///dev/zero'>]><a>&a;</a>",
    "quadratic attribute": b"<!DOCTYPE a [<!ENTITY a '" + b"a" * 50_000 + b"'>]><a a='" + b"&a;" * 50_000 + b"'/>",
    "deep nesting": HEADER + b"<a>" * 100_000,
    "10,000 attributes": HEADER + b"<a " + b" ".join(b"a%d=''" % number for number in range(10_000)) + b"/>",
    "many elements": HEADER + b"<a>" + b"<a/>" * 100_000 + b"</a>",
    "long attribute": HEADER + b"<a a='" + b"a" * 1_000_000 + b"'/>",
    "long name": HEADER + b"<" + b"a" * 1_000_000 + b"/>",
    "long text": HEADER + b"<a>" + b"a" * 1_000_000,
    "long white space": HEADER + b"<a " + b" " * 1_000_000,
    "many namespaces": HEADER + b"".join(b"<a%d xmlns='urn:%d'/>" % (number, number) for number in range(10_000)),
}


def xml_bombs(target: Target, count: int) -> dict[str, int]:
    """Strangers send all kinds of bombs."""
    for number in range(count):
        for bomb in BOMBS.values():
            sock = socket.create_connection(("127.0.0.1", target.client), timeout=10, source_address=target.source(number * 9))
            with contextlib.suppress(OSError):
                sock.sendall(bomb)
                while sock.recv(65536):
                    pass
            sock.close()
    return {"bombs": count * len(BOMBS)}


def bombs_of_users(target: Target, count: int) -> dict[str, int]:
    """The same behind a login, where limits are wider; each as the content of a message."""
    for _ in range(count):
        for bomb in BOMBS.values():
            client = target.login("benvolio")
            with contextlib.suppress(OSError):
                client.sends_raw(b"<message>" + bomb.removeprefix(HEADER))
                client.sends_raw(b" " * 300_000 + b"</message>")
            until_end(client)
    return {"bombs": count * len(BOMBS)}


def zlib_bombs(target: Target, count: int) -> dict[str, int]:
    """CVE-2014-2741 and its kin: 100 kB that become 100 MB."""
    bomb = zlib.compress(b" " * 100_000_000, 9)
    for _ in range(count):
        client = compressing(target)
        with contextlib.suppress(OSError):
            client.sends_raw(bomb)
        until_end(client)
    return {"bombs": count}


def compressing(target: Target) -> Client:
    """Return somebody who has logged in and asked for compression; what they send next is to be compressed."""
    context = ssl.create_default_context(cafile=target.authority)
    client = Client(lambda: SocketWire(("127.0.0.1", target.client), context), Cast()).connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    client.authenticates("benvolio", password_of("benvolio"))
    client.negotiates()
    client.sends_raw(COMPRESS)
    client.receives(COMPRESSED)
    return client


def until_end(client: Client) -> None:
    """Read until the server hangs up."""
    give_up = time.monotonic() + 30
    with contextlib.suppress(OSError):
        while client.wire is not None and client.wire.read(10):
            assert time.monotonic() < give_up, "the server does not hang up"
    client.disconnects()


def non_readers(target: Target, count: int) -> dict[str, int]:
    """Five sessions of benvolio's read nothing, while nurse sends them `count` MB (threat S11, CVE-2010-0305)."""
    message = f"<message to='benvolio@example.org' type='chat'><body>{'a' * 100_000}</body></message>".encode()
    nurse = target.login("nurse")
    sent = 0
    while sent < count * 1_000_000:
        crowd = [target.login("benvolio") for _ in range(5)]
        for client in crowd:
            client.sends_raw("<presence/>")
            client.passes_barrier()
        for _ in range(200):  # the kernel takes some 60 of these for each of them
            nurse.sends_raw(message)
            sent += len(message)
        nurse.passes_barrier()
        nurse.forgets_unread()
        for client in crowd:
            client.disconnects()
    nurse.closes()
    return {"megabytes": sent // 1_000_000}


def ping_flood(target: Target, count: int) -> dict[str, int]:
    """Nurse asks without a pause, and reads the answers."""
    nurse = target.login("nurse")
    ping = b"<iq type='get' id='p' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>" * 500
    for _ in range(count):
        nurse.sends_raw(ping)
        nurse.passes_barrier()
        nurse.forgets_unread()
    nurse.closes()
    return {"pings": count * 500}


Attack = Callable[[Target, int], dict[str, int]]
ATTACKS: Mapping[str, tuple[Attack, float]] = {  # with their size, as a part of --half-open
    "nothing": (nothing, 0.0005),
    "half_open": (half_open, 1),
    "half_a_hello": (half_a_hello, 0.25),
    "half_a_handshake": (half_a_handshake, 0.1),
    "starttls_and_silence": (starttls_and_silence, 0.1),
    "headerless": (headerless, 0.25),
    "byte_a_second": (byte_a_second, 0.25),
    "quick_leavers": (quick_leavers, 1),
    "one_address": (one_address, 0.0075),
    "xml_bombs": (xml_bombs, 0.001),
    "bombs_of_users": (bombs_of_users, 0.0005),
    "zlib_bombs": (zlib_bombs, 0.001),
    "non_readers": (non_readers, 0.005),
    "ping_flood": (ping_flood, 0.005),
}


# ---- the honest pair ------------------------------------------------------------------


def pace(seconds: float) -> None:
    """Let time pass, not for an event to come but to keep a rhythm: of messages, or of looks at the server's memory."""
    if seconds > 0:
        threading.Event().wait(seconds)


def chat(target: Target) -> None:
    """Romeo writes to Juliet at a steady pace; each message's latency in ms is a line on stdout, for ever.

    It counts from the moment at which the message was due: a late answer doesn't excuse the
    next one.
    """
    romeo, juliet = target.login("romeo", resource="orchard"), target.login("juliet", resource="balcony")
    assert romeo.wire is not None and juliet.wire is not None
    begun, number, came = time.monotonic(), 0, b""
    while True:
        due = begun + number / RATE
        pace(due - time.monotonic())
        romeo.wire.send(f"<message to='{juliet.jid}' id='n{number}.' type='chat'><body>O</body></message>".encode())
        word = f"'n{number}.'".encode()
        while word not in came:
            data = juliet.wire.read(60)
            assert data, "the server has forgotten juliet"
            came = came[-200:] + data
        print(f"{due} {(time.monotonic() - due) * 1000}", flush=True)
        number += 1


class HonestPair:
    """The process in which two people chat; `latencies` are (when due, ms)."""

    def __init__(self, target: Target) -> None:
        self.process = start(target, "chat")
        self.latencies: list[tuple[float, float]] = []
        self.first: queue.Queue[None] = queue.Queue()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        self.first.get(timeout=30)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            due, latency = map(float, line.split())
            self.latencies.append((due, latency))
            self.first.put(None)

    def during(self, begin: float, end: float) -> list[float]:
        """Return the latencies of what was due in this time, in order of size."""
        return sorted(latency for due, latency in list(self.latencies) if begin <= due <= end)

    def leave(self) -> None:
        """End the chat, and check that nothing has ended it before."""
        assert self.process.poll() is None, "the honest pair was disconnected"
        self.process.kill()
        self.process.wait()
        self.thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def start(target: Target, name: str, count: int = 0, *, nice: int = 0) -> subprocess.Popen[str]:
    """Start `name` of this module as a process: the chat, or an attack."""
    words = [sys.executable, "-m", "tests.abuse", "--as", json.dumps([name, count, vars(target)])]
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen(
        ["nice", "-n", str(nice), *words], cwd=root, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


# ---- the siege ------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What an attack did to the honest pair (ms) and to the server's memory (MB)."""

    attack: str
    count: int
    seconds: float
    latencies: Sequence[float]
    before: float
    peak: float
    after: float
    result: Mapping[str, int]

    def percentile(self, part: float) -> float:
        """Return the latency that `part` of the messages stayed below."""
        return self.latencies[min(len(self.latencies) - 1, math.ceil(part * len(self.latencies)) - 1)]

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return self.percentile(0.99) < PROMISED_LATENCY and self.after - self.before <= PROMISED_MEMORY

    def __str__(self) -> str:
        p50, p99 = self.percentile(0.5), self.percentile(0.99)
        return (
            f"{self.attack:22}{self.count:7}{self.seconds:7.1f}{len(self.latencies):7}{p50:8.1f}{p99:8.1f}{self.latencies[-1]:8.1f}"
            f"{self.before:9.1f}{self.peak:8.1f}{self.after:8.1f}  {'' if self.kept else 'BROKEN '}"
            + ", ".join(f"{key} {value}" for key, value in self.result.items())
        )


TITLES = f"{'attack':22}{'size':>7}{'s':>7}{'msgs':>7}{'p50/ms':>8}{'p99/ms':>8}{'max/ms':>8}{'MB base':>9}{'peak':>8}{'after':>8}"


class Siege:
    """A server with a honest pair, to be attacked again and again."""

    def __init__(self, folder: Path, timeout: float = UNAUTHENTICATED_TIMEOUT) -> None:
        limits = {
            "connections_per_address": 100,
            "connections_per_minute": 0,  # attackers come back more often here than addresses last
            "unauthenticated_timeout": timeout,
        }
        self.server = ProcessServer(folder, {"limits": limits, "compat": {"compression": True}})
        for name in PEOPLE:
            self.server.add_account(f"{name}@example.org")
        self.server.start()
        self.pid = self.server.process.process.pid
        self.blocks = 1
        self.timeout = timeout
        self.pair = HonestPair(self.target())
        self.people = self.descriptors()  # of the server, while only the honest are there

    def target(self) -> Target:
        """Return what a new attacker, with addresses of its own, has to know."""
        self.blocks += 1
        ports = self.server.ports
        return Target(ports["client"], ports["client_tls"], str(self.server.authority), self.blocks, self.timeout)

    def memory(self) -> float:
        """Return the server's resident memory in MB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def descriptors(self) -> int:
        """Return the number of the server's open files."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def attack(self, **sizes: int) -> Report:
        """Let attackers of these kinds do their work to the end; return what it did."""
        before, begin = self.memory(), time.monotonic()
        result, peak = self.send_attackers(sizes)
        end = time.monotonic()
        self.wait_for_quiet()
        after = self.settled_memory(before)
        latencies = self.pair.during(begin, end)
        if not latencies:
            raise AssertionError(f"{sizes}: the honest pair got nothing through for {end - begin:.0f} seconds")
        return Report(" ".join(sizes), sum(sizes.values()), end - begin, latencies, before, peak, after, result)

    def first_crowd(self, size: int) -> None:
        """Have the server pay what any first crowd costs it once and for all.

        That are tables that have grown, and Python's arenas with a long-lived object in
        them. The promise is about all crowds that follow.
        """
        self.send_attackers({"half_open": size})
        self.wait_for_quiet()

    def send_attackers(self, sizes: Mapping[str, int]) -> tuple[dict[str, int], float]:
        """Run attackers side by side; return what they say, and the server's memory at its peak (MB)."""
        attackers = [
            start(self.target(), name, min(PER_PROCESS, size - at), nice=10)
            for name, size in sizes.items()
            for at in range(0, size, PER_PROCESS)
        ]
        peak = self.memory()
        while any(attacker.poll() is None for attacker in attackers):
            peak = max(peak, self.memory())
            pace(0.02)
        return self.results(attackers), peak

    @staticmethod
    def results(attackers: Sequence[subprocess.Popen[str]]) -> dict[str, int]:
        """Return what the attackers say, added up."""
        total: dict[str, int] = {}
        for attacker in attackers:
            said, _ = attacker.communicate()
            assert attacker.returncode == 0, f"an attacker failed with status {attacker.returncode}"
            for key, value in json.loads(said).items():
                total[key] = total.get(key, 0) + value
        return total

    def wait_for_quiet(self) -> None:
        """Wait until only the honest are connected."""
        give_up = time.monotonic() + self.timeout + 10
        while self.descriptors() > self.people:
            assert time.monotonic() < give_up, f"the server keeps {self.descriptors() - self.people} descriptors"
            pace(0.1)

    def settled_memory(self, wanted: float) -> float:
        """Return the memory once it is as low as it gets, when even the last timer is over."""
        lowest, give_up = self.memory(), time.monotonic() + self.timeout + 10
        while lowest > wanted + PROMISED_MEMORY and time.monotonic() < give_up:
            pace(0.1)
            lowest = min(lowest, self.memory())
        return lowest

    def end(self) -> None:
        """End the chat and the server, both checked."""
        self.pair.leave()
        self.server.stop()


@contextlib.contextmanager
def besieged(folder: Path, timeout: float = UNAUTHENTICATED_TIMEOUT) -> Iterator[Siege]:
    """A siege that ends with the block."""
    siege = Siege(folder, timeout)
    try:
        yield siege
    except BaseException:
        siege.pair.process.kill()
        siege.server.kill()
        raise
    siege.end()


def raise_descriptors() -> None:
    """Allow this process and its children as many descriptors as they may have."""
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Run the attacks that are asked for; or, in a process of its own, one part."""
    parser = argparse.ArgumentParser(prog="python -m tests.abuse", description="Attacks on a server, and what honest people feel of them.")
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"some of: {', '.join(ATTACKS)} (default: all)")
    parser.add_argument("--half-open", type=int, default=20_000, metavar="N", help="how large; other attacks in proportion")
    parser.add_argument("--as", dest="part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    raise_descriptors()
    if options.part:
        name, count, values = json.loads(options.part)
        if name == "chat":
            chat(Target(**values))
        print(json.dumps(ATTACKS[name][0](Target(**values), count)))
        return 0
    if not sys.platform.startswith("linux"):
        parser.error("this needs Linux: /proc, and all of 127.0.0.0/8")
    kept = True
    with tempfile.TemporaryDirectory() as folder, besieged(Path(folder)) as siege:
        print(f"a fresh server takes {siege.memory():.1f} MB,", end=" ", flush=True)
        siege.first_crowd(options.half_open)
        siege.settled_memory(0)
        print(f"after a first crowd {siege.memory():.1f} MB")
        print(TITLES)
        for name in options.attacks or ATTACKS:
            size = max(1, int(options.half_open * ATTACKS[name][1]))
            report = siege.attack(**{name: size})
            print(report, flush=True)
            kept = kept and report.kept
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
