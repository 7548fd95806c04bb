"""What the operating system says that a server costs: processor time and memory of a process and its children."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")  # per second, the unit of /proc/PID/stat
KIB = 1024


@functools.cache  # before anybody is pinned
def cores() -> tuple[int, int]:
    """Return the cores of the servers and of the load: two different ones where there are two."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


def process_tree(pid: int) -> Iterator[int]:
    """Yield a process and everything below it (ejabberd has helpers)."""
    yield pid
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from process_tree(int(child))
    except FileNotFoundError:
        return  # it has ended meanwhile


def cpu_seconds(pid: int) -> float:
    """Return the processor time, user and system, that a process and its children have taken so far.

    The clock of a process (clock_getcpuclockid(3)) counts all its threads, those that have
    ended too, in nanoseconds; /proc/PID/stat has the same number in hundredths of a second.
    Children that have ended are known from there only.
    """
    total = 0.0
    for process in process_tree(pid):
        try:
            total += time.clock_gettime(~process << 3 | 2)  # how Linux writes that clock's id
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        total += (int(fields[13]) + int(fields[14])) / TICKS  # cutime, cstime
    return total


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children."""
    total = 0
    for process in process_tree(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                total += int(line.split()[1]) * KIB
    return total
