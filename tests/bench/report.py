"""The table that README carries."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.cases import CASES, Row

PEERS = ("prosody", "ejabberd")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # row key, server, one value per round


def number(value: float) -> str:
    """Return a value with three digits that matter, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def median_and_spread(values: Sequence[float]) -> str:
    """Return the median, and the least and most where there is more than one."""
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def ratio(ours: Sequence[float], *others: Sequence[float]) -> float:
    """Return the median over the rounds of our share of the best of the others in the same round."""
    best = [min(values) for values in zip(*others, strict=True)]
    return float(statistics.median([mine / other for mine, other in zip(ours, best, strict=True)]))


def verdicts(row: Row, found: Mapping[str, Sequence[float]]) -> tuple[list[str], list[str]]:
    """Return what to say of a row's ratios, and what became of its targets."""
    said: list[str] = []
    targets: list[str] = []
    ours = found.get("xmppd")
    if ours is None:
        return said, targets
    peers = [found[peer] for peer in PEERS if peer in found]
    checks = [(row.most, statistics.median(ours), "")]
    if peers:
        share = ratio(ours, *peers)
        said.append(f"{share:.2f} of the better peer" if len(peers) > 1 else f"{share:.2f} of the peer")
        checks.append((row.peer, share, " of the better peer"))
    if "floor" in found:
        share = ratio(ours, found["floor"])
        said.append(f"{share:.2f} of the floor")
        checks.append((row.floor, share, " of the floor"))
    for target, value, what in checks:
        if target is not None:
            unit = what or f" {row.unit}"
            targets.append(f"≤ {target:g}{unit}: {'met' if value <= target else 'missed'}")
    return said, targets


def table(values: Values, servers: Sequence[str]) -> str:
    """Return the values as a table in Markdown."""
    lines = [
        "| | unit | " + " | ".join(servers) + " | ratio | target |",
        "|---|---|" + "--:|" * len(servers) + "---|---|",
    ]
    for row in (row for case in CASES for row in case.rows):
        found = values.get(row.key)
        if found:
            cells = [median_and_spread(found[server]) if server in found else "–" for server in servers]
            said, targets = verdicts(row, found)
            columns = [row.title, row.unit, *cells, ", ".join(said), "; ".join(targets)]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def machine() -> str:
    """Return what this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    return f"{cpu}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
