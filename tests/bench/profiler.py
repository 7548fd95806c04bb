"""Where xmppd spends its time under a case's load: samples of its stacks by py-spy, for `--profile`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.bench.accounting import cores

RATE = 500  # samples per second
PATIENCE = 60.0  # seconds for py-spy to write its report


class Profiler:
    """Samples a process while a case is measured; `report` says which functions it was found in."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if program is None:
            raise SystemExit("--profile needs py-spy: python -m pip install py-spy")
        self._program = program
        self._folder = folder
        self._files: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, pid: int) -> None:
        """Sample a process from now on."""
        self._files.append(self._folder / f"profile-{pid}-{len(self._files)}.txt")
        command = [self._program, "record", "--pid", str(pid), "--format", "raw", "--rate", str(RATE), "--nonblocking",
                   "--duration", "3600", "--output", str(self._files[-1])]  # fmt: skip
        with self._files[-1].with_suffix(".log").open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        os.sched_setaffinity(self._process.pid, {cores()[1]})

    def end(self) -> None:
        """Stop sampling."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # it writes what it has
        self._process.wait(PATIENCE)

    def report(self, amount: int = 25) -> str:
        """Return the functions by their own share, with the lines that take most of it, and forget everything."""
        functions, lines, whole = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
        for path in self._files:
            for sample in path.read_text().splitlines() if path.exists() else ():
                stack, _, times = sample.rpartition(" ")
                taken = int(times)
                frames = [frame.rpartition(":") for frame in stack.split(";")]
                function = frames[-1][0].rstrip(")")
                functions[function] += taken
                lines[function, frames[-1][2].rstrip(")")] += taken
                whole.update(dict.fromkeys({frame[0] for frame in frames}, taken))
        self._files.clear()
        total = functions.total() or 1
        text = [f"{'self':>6} {'whole':>6}  function: its lines ({total} samples)"]
        for function, samples in functions.most_common(amount):
            top = Counter({line: own for (name, line), own in lines.items() if name == function}).most_common(4)
            where = ", ".join(f"{line} {own / total:.1%}" for line, own in top)
            text.append(f"{samples / total:6.1%} {whole[function] / total:6.1%}  {function}): {where}")
        return "\n".join(text)
