"""The benchmark: what xmppd costs, next to two peers and a bare relay, under the same load in one run.

    python -m tests.bench [--only chat,login] [--rounds 3] [--servers xmppd,prosody,ejabberd,floor]
                          [--seconds 4] [--quick] [--modules like|debian|archive] [--json FILE] [--profile]
    python -m tests.bench --install-peers      (Debian, as root; none of them starts by itself)

In each case the servers have their turns, A B C D A B C D, each pinned to the machine's first
core, with the load generator on the last. All talk to 127.0.0.1 only, keep everything in one
temporary folder (TMPDIR says where; it should be on a real disk, for xmppd syncs every
record), and are ended at the end. A server's processor time comes from the operating
system's accounting, with all its threads and child processes. Still the machine should have
nothing else to do: others take the caches away, and with them up to half of the speed.

Printed: per row the median over the rounds (least to most), the share of the better peer's
and of the floor's cost, and whether the target is met. --json keeps every single value.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import xmppd
from tests.bench.accounting import cores
from tests.bench.cases import CASES, Case
from tests.bench.load import BenchError, Load, client_context
from tests.bench.people import HOST
from tests.bench.profiler import Profiler
from tests.bench.report import machine, table
from tests.bench.servers import MODULES, SERVERS, NotInstalled, Server, install_peers
from tests.bench.trial import Trial

DESCRIPTORS = 8192  # open files: 2,000 sessions, on both sides
QUICK_SECONDS = 1.0

Results = dict[str, dict[str, list[float]]]


def words(known: Sequence[str], text: str) -> list[str]:
    """Return the words of a list with commas, all of them known; raises ArgumentTypeError."""
    found = text.split(",")
    for word in found:
        if word not in known:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found '{word}'")
    return found


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser("python -m tests.bench", description="Measure xmppd next to its peers.")
    add = parser.add_argument
    add("--only", type=lambda text: words(names, text), default=names, help=f"of {','.join(names)}")
    known = list(SERVERS)
    add("--servers", type=lambda text: words(known, text), default=known, help=f"of {','.join(known)}")
    add("--rounds", type=int, default=3, help="how often each server has its turn (3)")
    add("--seconds", type=float, default=4.0, help="how long a case is measured (4)")
    add("--quick", action="store_true", help="one round of a second each: shows that everything works")
    add("--modules", choices=MODULES, default="like",
        help="of the peers: like xmppd's (like), as debian has them, or like, and all with a message archive")
    add("--json", type=Path, metavar="FILE", help="write every value there")
    add("--profile", action="store_true", help="also show where xmppd spends its time (needs py-spy)")
    add("--install-peers", action="store_true", help="install Debian's Prosody and ejabberd, and end")
    options = parser.parse_args(line)
    if options.quick:
        options.rounds, options.seconds = 1, QUICK_SECONDS
    return options


class Bench:
    """One run: the servers, and what was found."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.cases = [case for case in CASES if case.name in options.only]
        self.seconds: float = options.seconds
        self.results: Results = {}
        self.profiler = Profiler(folder) if options.profile else None
        certificates = xmppd.ensure_certificates(folder / "authority", [HOST])
        self.context = client_context(certificates.authority)
        self.servers: list[Server] = []
        self.versions: list[str] = []
        for name in options.servers:
            kind = SERVERS[name]
            try:
                version = kind.version()
            except NotInstalled as problem:
                print(f"left out: {problem}", file=sys.stderr)
                continue
            self.servers.append(kind(folder, certificates, options.modules))
            self.versions += [version] if version else []

    def prepare(self) -> None:
        """Configure the servers and let each start once, so that later starts are like any other day's."""
        for server in self.servers:
            say(f"preparing {server.name}")
            server.prepare()
            server.start()
            server.settle()
            server.stop()

    def run(self, rounds: int) -> None:
        """Run each case on all servers in turn, as often as there are rounds.

        A machine is never equally fast for long; so those who are compared run within a
        minute of each other, and the ratios are taken within a round. Those whose turn it
        isn't have nobody to serve and take no time.
        """
        for case in self.cases:
            for number in range(rounds):
                say(f"{case.name}, round {number + 1} of {rounds}")
                for server in self.servers:
                    if server.name in case.servers:
                        self._run(case, server)

    def close(self) -> None:
        """End the servers that run."""
        for server in self.servers:
            server.stop()

    def _run(self, case: type[Case], server: Server) -> None:
        profiler = self.profiler if server.name == "xmppd" else None
        if case.fresh:
            server.stop()
        if server.process is None:
            server.start()
            server.settle()
        with closing(Load(self.context)) as load:
            trial = Trial(server, load, self.seconds, profiler)
            began = time.monotonic()
            try:
                values = case().run(trial)
            except BenchError as problem:
                raise BenchError(f"{server.name}, {case.name}: {problem}") from problem
            finally:
                trial.disconnect()
        if case.fresh:
            server.stop()  # thousands have come and gone: not a server like any other
        for row, value in zip(case.rows, values, strict=True):
            self.results.setdefault(row.key, {}).setdefault(server.name, []).append(value)
        found = ", ".join(f"{value:.4g} {row.unit}" for row, value in zip(case.rows, values, strict=True))
        remarks = [trial.remark] if trial.remark else []
        say(f"  {server.name} {case.name}: {'; '.join([found, *remarks])} ({time.monotonic() - began:.0f} s)")
        if profiler is not None:
            say(profiler.report())

    def report(self, command: str) -> str:
        """Return the table, with what made it and where."""
        names = [server.name for server in self.servers]
        return "\n".join([
            f"`{command}` on {time.strftime('%Y-%m-%d')}: {', '.join(self.versions)}.",
            f"{machine()}; servers on core {cores()[0]}, load on core {cores()[1]}.",
            "",
            table(self.results, names),
        ])  # fmt: skip


def say(text: str) -> None:
    """Tell whoever waits how far we are; the report alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Do what the command line says; return the exit status."""
    options = arguments()
    if options.install_peers:
        return install_peers()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if most < 0 else min(DESCRIPTORS, most), most))
    folder = Path(tempfile.mkdtemp(prefix="xmppd-bench-"))
    folder.chmod(0o755)  # the peers run as users of their own
    began = time.monotonic()
    try:
        with closing(Bench(folder, options)) as bench:
            os.sched_setaffinity(0, {cores()[1]})
            bench.prepare()
            bench.run(options.rounds)
    except BenchError as problem:
        say(f"failed: {problem}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"{time.monotonic() - began:.0f} seconds in all")
    print(bench.report(" ".join(["python -m tests.bench", *sys.argv[1:]])))
    if options.json:
        found = {"versions": bench.versions, "machine": machine(), "seconds": options.seconds, "results": bench.results}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
