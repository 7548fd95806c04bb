"""How long a page of a large message archive takes, of the server's own code alone.

    python -m tests.bench.archive [MESSAGES]

An archive of so many messages (200,000) is written to a temporary folder and opened anew;
then each kind of question is asked some times. Printed are the best and the median time
until all results are written, and the longest slice: so long the loop serves nobody else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import xmppd

OWNER, FRIEND, RARE, NOBODY = map(
    xmppd.JID.parse, ("alice@example.org", "bob@example.org", "eve@example.org", "mallory@example.org"))  # fmt: skip
TIMES = 9  # each question
MOST = 2**40  # bytes


def fill(folder: Path, amount: int) -> str:
    """Write an archive; every thousandth message is from somebody else. Returns the id of the one in the middle."""
    loop = xmppd.Loop()
    storage = xmppd.Storage(folder, loop, sync=False)
    archives = xmppd.Archives(storage, "archive")
    message = xmppd.Stanza(xmppd.MESSAGE, {"from": f"{FRIEND}/car", "to": str(OWNER), "type": "chat", "id": "x" * 20})
    message.add(xmppd.E(xmppd.CLIENT("body"), None, "Hello, how are you today? " * 6))
    middle = ""
    for number in range(amount):
        id = archives.append(OWNER, str(FRIEND if number % 1000 else RARE), message, MOST)
        middle = id if number == amount // 2 else middle
        if number % 50 == 49:
            loop.turn(0)
    storage.close()
    loop.close()
    return middle


def ask(archives: xmppd.Archives, wanted: xmppd.Selection) -> tuple[int, float, float]:
    """Return the number of results, the milliseconds that they took, and those of the longest slice."""
    began, longest = time.perf_counter(), 0.0
    steps = archives.select(OWNER, wanted)
    while True:
        before = time.perf_counter()
        try:
            next(steps)
        except StopIteration as end:
            page: xmppd.ArchivePage = end.value
            found = list(xmppd.archive_results(archives, OWNER, page, xmppd.E(xmppd.MAM("query"))))
            now = time.perf_counter()
            return len(found), (now - began) * 1000, max(longest, now - before) * 1000
        longest = max(longest, time.perf_counter() - before)


def main(amount: int) -> None:
    """Fill, ask, print."""
    with tempfile.TemporaryDirectory() as folder:
        middle = fill(Path(folder) / "data", amount).encode()
        loop = xmppd.Loop()
        storage = xmppd.Storage(Path(folder) / "data", loop, sync=False)
        archives = xmppd.Archives(storage, "archive")
        for name, wanted in {
            "the first 50": xmppd.Selection(),
            "the last 50": xmppd.Selection(backward=True),
            "50 behind the middle": xmppd.Selection(low=middle),
            "50 before the middle": xmppd.Selection(high=middle, backward=True),
            "the last 50 with one of a thousand": xmppd.Selection(contact=RARE, backward=True),
            "those with nobody": xmppd.Selection(contact=NOBODY),
        }.items():
            answers = [ask(archives, wanted) for _ in range(TIMES)]
            best, median = min(took for _, took, _ in answers), statistics.median(took for _, took, _ in answers)
            longest = statistics.median(slice for _, _, slice in answers)
            print(f"{name}: {answers[0][0]} results in {best:.2f} ms, median {median:.2f} ms, slice {longest:.2f} ms")
        storage.close()
        loop.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
