"""The server with something changed that cannot be had otherwise: a bad disk, a wrong clock, a hurry.

    python tests/tampered.py /path/to/xmppd.py journal=20000,powercut --config … --data … run

The second word says what is changed, separated by commas:

    journal=BYTES    a checkpoint after so many bytes, not after four megabytes
    look=SECONDS     how often a full disk is looked at
    powercut         what no fsync covers is lost with the process; without it kill -9 leaves
                     all that was written, as the system's cache survives
    sluggish         writes and fsyncs take up to 5 ms each
    die=NUMBER       the process kills itself (SIGKILL) at this step on the disk: within a write, just
                     before or after an fsync, before a renaming or a removal
    gate=FILE        while the file is there, each fsync connects to the port of 127.0.0.1 that the
                     file names and waits for the end of that connection
    broken=FILE      while the file is there, fsync fails
    full=FILE        while the file is there, the disk has no room but that of the reserve
    clock=FILE       the clock is wrong by the seconds in the file

Nothing else is changed: xmppd's own `main` runs, and what is replaced is named in chapter 8
as the place for it (`Disk`), or is the clock.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "__main__":
    import xmppd
else:
    _spec = importlib.util.spec_from_file_location("xmppd", sys.argv[1])
    xmppd = sys.modules["xmppd"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(xmppd)


class TamperedDisk(xmppd.Disk):
    """A disk that is slow, full, failing or forgetful; `words` says which."""

    def __init__(self, words: Mapping[str, str]) -> None:
        super().__init__()
        self.words = words
        self._cached: dict[int, list[bytes]] = {}  # written by the server, not synced yet
        self._through = False  # write at once
        self._room = 0  # bytes that a full disk still takes
        self._steps_left = int(words.get("die", "0"))

    def _is_on(self, word: str) -> bool:
        return word in self.words and Path(self.words[word]).exists()

    def create(self, path: Path) -> int:
        file = super().create(path)
        self._cached.pop(file, None)  # of an earlier file with this number
        return file

    def write(self, file: int, data: bytes) -> None:
        if self._is_on("full"):
            self._squeeze(file, data)
        elif "powercut" in self.words and not self._through:
            self._cached.setdefault(file, []).append(data)
        else:
            self._put(file, data)

    def _put(self, file: int, data: bytes) -> None:
        """Write in two parts, between which the process may end."""
        cut = random.randrange(len(data) + 1)
        super().write(file, data[:cut])
        self._step()
        super().write(file, data[cut:])

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if "sluggish" in self.words:
            threading.Event().wait(random.random() * 0.005)  # the disk takes its time; there is nothing to wait for

    def _squeeze(self, file: int, data: bytes) -> None:
        fits, self._room = data[: self._room], max(self._room - len(data), 0)
        super().write(file, fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, file: int, length: int) -> None:
        if not length:
            self._cached.pop(file, None)
        super().truncate(file, length)

    def fsync(self, file: int) -> None:
        if self._is_on("gate"):
            with socket.create_connection(("127.0.0.1", int(Path(self.words["gate"]).read_text()))) as gate:
                gate.recv(1)
        if self._is_on("broken"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for data in self._cached.pop(file, ()):
            self._put(file, data)
        self._step()
        if "powercut" not in self.words:
            super().fsync(file)
        self._step()

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._step()
        if path.name == ".reserve" and path.exists():
            self._room += path.stat().st_size
        super().remove(path)

    def reserve(self, path: Path, size: int) -> None:
        self._through = True
        try:
            super().reserve(path, size)
        finally:
            self._through = False


class WrongClock:
    """The clock, wrong by the seconds that a file says; no file: right."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._right = time.time

    def time(self) -> float:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return self._right() + float(self.file.read_text())
        return self._right()

    def set(self) -> None:
        """Let the whole process go by this clock, except for intervals."""
        clock, gmtime, localtime = self, time.gmtime, time.localtime

        class WrongDatetime(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> WrongDatetime:
                return cls.fromtimestamp(clock.time(), tz)

        time.time = clock.time
        time.time_ns = lambda: int(clock.time() * 1_000_000) * 1000
        time.gmtime = lambda at=None: gmtime(clock.time() if at is None else at)
        time.localtime = lambda at=None: localtime(clock.time() if at is None else at)
        vars(xmppd)["datetime"] = WrongDatetime


def tamper(words: Mapping[str, str]) -> None:
    """Change what the words name."""
    changes: Mapping[str, Callable[[str], Any]] = {
        "journal": lambda value: setattr(xmppd, "JOURNAL_BYTES", int(value)),
        "look": lambda value: setattr(xmppd, "SPACE_INTERVAL", float(value)),
        "clock": lambda value: WrongClock(Path(value)).set(),
    }
    for word, change in changes.items():
        if word in words:
            change(words[word])
    xmppd.Disk = lambda: TamperedDisk(words)  # type: ignore[assignment,misc]


if __name__ == "__main__":
    tamper(dict(word.partition("=")[::2] for word in sys.argv[2].split(",") if word))
    sys.exit(xmppd.main(sys.argv[3:]))
