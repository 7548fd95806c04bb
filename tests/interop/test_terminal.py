"""Profanity and Poezio, two clients of other people, each in a terminal of its own: what their users would see."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

from tests.dialogue import password_of
from tests.servers import ProcessServer

PATIENCE = 25.0  # seconds for something to appear on a screen
ROWS, COLUMNS = 40, 160
POEZIO = "import os; os.geteuid = os.getuid = lambda: 1; from poezio.poezio import main; main()"  # it refuses to be root
ROOM = "verona@conference.example.org"


class Terminal:
    """A program in a terminal; what it shows is kept as lines of text."""

    def __init__(self, command: list[str], home: Path, environment: dict[str, str]) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self.stream = pyte.ByteStream(self.screen)
        known = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(home)
            os.execvpe(command[0], command, {**known, **environment})
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    def types(self, line: str) -> None:
        """Type a line as people do, looking at what appears: what comes all at once counts as pasted text."""
        before = self.screen.display[-1]
        os.write(self.descriptor, line[0].encode())
        while self.screen.display[-1] == before:
            self._reads(time.monotonic() + PATIENCE, line[0])
        os.write(self.descriptor, line[1:].encode())
        self.shows(line)
        self.enters("")

    def enters(self, secret: str) -> None:
        """Type what the screen does not show, and Enter."""
        os.write(self.descriptor, secret.encode() + b"\r")

    def shows(self, text: str) -> None:
        """Wait until the screen shows a text."""
        until = time.monotonic() + PATIENCE
        while text not in self.text:
            self._reads(until, text)

    @property
    def text(self) -> str:
        """All lines of the screen."""
        return "\n".join(self.screen.display)

    def _reads(self, until: float, awaited: str) -> None:
        ready, _, _ = select.select([self.descriptor], [], [], max(0.0, until - time.monotonic()))
        assert ready, f"{awaited!r} is not on the screen:\n{self.text}"
        try:
            self.stream.feed(os.read(self.descriptor, 65536))
        except OSError:  # the program has ended, and with it the terminal
            pytest.fail(f"the program ended before it showed {awaited!r}:\n{self.text}")

    def close(self) -> None:
        """End the program, if it still runs."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.descriptor)


def program(name: str) -> str:
    """Return where a client is; without it these tests are skipped."""
    found = shutil.which(name)
    if found:
        return found
    pytest.skip(f"{name} is not installed")


@pytest.fixture
def profanity(tmp_path: Path, process_server: ProcessServer) -> Iterator[Terminal]:
    """Juliet, with Profanity, logged in with TLS verified."""
    home = tmp_path / "profanity"
    home.mkdir()
    terminal = Terminal([program("profanity")], home, {"SSL_CERT_FILE": str(process_server.authority)})
    terminal.shows("Profanity")
    terminal.types(f"/connect juliet@example.org/balcony server 127.0.0.1 port {process_server.port} tls force")
    terminal.shows("Enter password")
    terminal.enters(password_of("juliet"))
    terminal.shows("logged in successfully")
    yield terminal
    terminal.close()


@pytest.fixture
def poezio(tmp_path: Path, process_server: ProcessServer) -> Iterator[Terminal]:
    """Romeo, with Poezio, logged in with TLS verified."""
    home = tmp_path / "poezio"
    folder = home / ".config" / "poezio"
    folder.mkdir(parents=True)
    (folder / "poezio.cfg").write_text(
        f"""[Poezio]
jid = romeo@example.org/orchard
password = {password_of("romeo")}
custom_host = 127.0.0.1
custom_port = {process_server.port}
ca_cert_path = {process_server.authority}
auto_reconnect = false
""",
    )
    python = Path(program("poezio")).read_text().splitlines()[0].removeprefix("#!").strip()  # that which has its packages
    terminal = Terminal([python, "-c", POEZIO], home, {})
    terminal.shows("Your JID is romeo@example.org")
    yield terminal
    terminal.close()


def test_two_people_talk(profanity: Terminal, poezio: Terminal) -> None:
    profanity.types("/msg romeo@example.org Wherefore art thou Romeo?")
    poezio.shows("1.juliet")
    poezio.types("/win 1")
    poezio.shows("Wherefore art thou Romeo?")
    poezio.types("Call me but love")
    profanity.shows("Call me but love")


def test_two_people_meet_in_a_room(profanity: Terminal, poezio: Terminal) -> None:
    profanity.types(f"/join {ROOM} nick Jule")
    profanity.shows("/room accept")
    profanity.types("/room accept")
    poezio.types(f"/join {ROOM}/Romeo")
    poezio.shows("Jule")
    profanity.shows("Romeo")
    profanity.types("Good night, good night!")
    poezio.shows("Good night, good night!")
    poezio.types("Parting is such sweet sorrow")
    profanity.shows("Parting is such sweet sorrow")
