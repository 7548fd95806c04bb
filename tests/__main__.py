"""Everything that has to pass: `python -m tests` (further words go to pytest).

Ruff reads for style and slips, mypy for types, pytest runs the tests. All of them run even
when one fails, and the exit status is 0 only if all of them are content.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ROOT / "tests" / "node_modules"
CLIENTS = ("@xmpp/client", "converse.js", "puppeteer-core")


def install_javascript_clients() -> bool:
    """Fetch what tests/package.json names, for tests/interop; return whether that is all right.

    Without npm those tests are skipped and say so; continuous integration insists on them.
    """
    npm = shutil.which("npm")
    if all((MODULES / name).is_dir() for name in CLIENTS) or (npm is None and "CI" not in os.environ):
        return True
    if npm is None:
        print("CI is set, but there is no npm: node and npm are needed for tests/interop")
        return False
    command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=MODULES.parent, check=False)
    return done.returncode == 0 or "CI" not in os.environ


def passes(name: str, *command: str) -> bool:
    """Run one check with this Python and return whether it was content."""
    print(f"\n--- {name}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Run all checks; return the exit status."""
    results = [
        install_javascript_clients(),
        passes("ruff", "ruff", "check", "."),
        passes("mypy", "mypy"),
        passes("chapters", "tests.test_layout"),
        passes("pytest", "pytest", "-n", "2", "--dist", "loadfile", *sys.argv[1:]),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
