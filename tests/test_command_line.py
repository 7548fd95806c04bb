"""Chapters 25 and 27: the command line, the control channel behind it, and the life of a server process."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import logging
import os
import re
import selectors
import signal
import socket
import stat
import subprocess
import sys
import threading
import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import xmppd
from tests.servers import ServerProcess
from xmppd import JID, Address, ConfigError, ControlChannel, ControlClient, ServerAbsent

PROGRAM = Path(xmppd.__file__)
LOG = logging.getLogger("xmppd")
ROOT = Path(__file__).resolve().parent.parent
CREDENTIALS = {"scram-sha-1": {"salt": "AAAA", "iterations": 10000, "stored": "AAAA", "server": "AAAA"}}
PATIENCE = 20.0  # seconds


class Commands:
    """`xmppd --config FILE …` as an owner types it, in a home folder of its own."""

    def __init__(self, home: Path, settings: str = "") -> None:
        self.home = home
        self.config = home / "xmppd.toml"
        self.data = home / "data"
        listen = '[listen]\nclient = ["127.0.0.1:0"]\nclient_tls = ["127.0.0.1:0"]\n'
        self.configure(f'hosts = ["example.org", "example.net"]\ndata = "data"\n{settings or listen}')

    def configure(self, text: str) -> None:
        """Write the configuration, in which listeners with fixed ports are switched off: other tests run beside this."""
        self.config.write_text(text.replace("[listen]\n", "[listen]\nserver = []\ncomponent = []\nweb = []\n"))

    def run(self, *words: str, text: str | bytes = "") -> subprocess.CompletedProcess[str]:
        """Do a command with this configuration, in this process, for that takes a tenth of the time."""
        out, errors = io.StringIO(), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text))
        handlers, level, propagate = LOG.handlers[:], LOG.level, LOG.propagate
        with (
            mock.patch.dict(os.environ, clean_environment(self.home), clear=True),
            mock.patch.multiple(sys, argv=[str(PROGRAM)], stdin=given),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            try:
                status = xmppd.main(["--config", str(self.config), *words])
            finally:
                LOG.handlers[:], LOG.level, LOG.propagate = handlers, level, propagate
        return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())

    def run_apart(self, *words: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Do a command in a process of its own, as people do."""
        usual: dict[str, Any] = {"text": True, "capture_output": True, "timeout": PATIENCE, "check": False}
        usual |= {"env": clean_environment(self.home), "cwd": self.home, "stdin": subprocess.DEVNULL}
        return subprocess.run([sys.executable, str(PROGRAM), *words], **usual | options)

    def add(self, jid: str = "juliet@example.org", password: str = "pencil") -> None:
        """Add an account."""
        done = self.run("user", "add", jid, "--password-stdin", text=f"{password}\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"added {jid}\n", "")

    def users(self) -> list[str]:
        """Return all accounts."""
        done = self.run("user", "list")
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def server(self) -> ServerProcess:
        """Return a server process that is ready."""
        server = ServerProcess(self.config, self.data)
        server.wait_for("ready: ")
        return server


def clean_environment(home: Path) -> dict[str, str]:
    """Return an environment in which nothing of the developer's own is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "XMPPD_", "JOURNAL_"))}
    return kept | {"HOME": str(home)}


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    """A configuration, and no server."""
    return Commands(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """A configuration whose server runs for all tests of this file."""
    commands = Commands(tmp_path_factory.mktemp("served"))
    server = commands.server()
    yield commands
    server.stop()


@pytest.fixture(params=["served", "at rest"])
def either(request: pytest.FixtureRequest) -> Commands:
    """A configuration, once with a running server and once without."""
    found: Commands = request.getfixturevalue("served" if request.param == "served" else "commands")
    for jid in found.users():
        assert found.run("user", "remove", jid, "--yes").returncode == 0
    return found


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line with which a command refused."""
    assert (done.returncode, done.stdout) == (1, ""), done
    assert re.fullmatch(r"xmppd: .+\n", done.stderr)
    return done.stderr.removeprefix("xmppd: ").rstrip("\n")


# -- one program


@pytest.mark.parametrize(
    "start",
    [
        [str(PROGRAM)],
        ["-m", "xmppd"],
        ["-c", "import sys, xmppd; sys.exit(xmppd.main())"],  # what the installed console script does
    ],
)
def test_however_it_is_started_it_is_the_same_program(start):
    done = subprocess.run(
        [sys.executable, *start, "--version"], capture_output=True, text=True, cwd=PROGRAM.parent, timeout=PATIENCE, check=True
    )
    assert done.stdout.startswith(f"xmppd {xmppd.__version__} (Python 3.")
    assert done.stderr == ""


def test_the_installed_command_is_this_main():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"xmppd": "xmppd:main"}


def test_a_missing_package_is_one_line_that_says_how_to_get_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", str(PROGRAM), "status"], capture_output=True, text=True, timeout=PATIENCE, check=False,
        env=clean_environment(tmp_path) | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'xmppd: the Python packages "defusedxml, cryptography, platformdirs, tomli-w" are missing; '
        "get it with: python3 -m pip install defusedxml cryptography platformdirs tomli-w\n"
    )


def test_one_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(xmppd, "missing_packages", lambda: ["tomli-w"])
    assert xmppd.main(["status"]) == 1
    assert capsys.readouterr().err == (
        'xmppd: the Python package "tomli-w" is missing; '
        "get it with: python3 -m pip install defusedxml cryptography platformdirs tomli-w\n"
    )


@pytest.mark.parametrize("words", [[], ["run"], ["init"], ["user"], ["user", "add"], ["user", "remove"], ["status"], ["check"]])
def test_help_teaches(words, capsys):
    with pytest.raises(SystemExit) as caught:
        xmppd.main([*words, "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert "usage: xmppd" in told
    if not words:
        assert "xmppd user add alice@" in told
        assert "exit status" in told


@pytest.mark.parametrize("words", [["bogus"], ["user"], ["user", "add"], ["--config"], ["status", "extra"]])
def test_a_command_line_without_sense_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        xmppd.main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: xmppd")


def test_serving_is_what_it_does_without_a_command():
    assert xmppd.build_parser().parse_args([]).function is xmppd.run
    assert xmppd.build_parser().parse_args(["run"]).function is xmppd.run


@pytest.mark.parametrize("words", [["--data", "d", "status"], ["status", "--data", "d"], ["--data", "x", "status", "--data", "d"]])
def test_common_options_may_stand_before_or_behind_the_command(words):
    assert xmppd.build_parser().parse_args(words).data == Path("d")


def test_a_configuration_that_is_wrong_is_one_line_and_status_1(commands):
    commands.config.write_text("[limits]\nstanza = 'big'")
    for words in (["status"], ["user", "list"], ["user", "add", "a@example.org", "--password-stdin"]):
        assert refused(commands.run(*words, text="pencil\n")) == (
            f"{commands.config}: [limits] stanza: expected a whole number of bytes, at least 10000, found 'big'"
        )


def test_an_interrupted_command_is_status_130(monkeypatch, capsys):
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(xmppd, "status", interrupted)
    assert xmppd.main(["status"]) == 130
    assert capsys.readouterr().err == "\n"


def test_who_stops_reading_our_output_gets_no_traceback(commands):
    commands.add()
    reader, writer = os.pipe()
    os.close(reader)
    words = ["--config", str(commands.config), "user", "list"]
    done = commands.run_apart(*words, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("called", "advice"),
    [
        ("/usr/bin/xmppd", "xmppd --data d"),  # as found on the PATH
        (".venv/bin/xmppd", ".venv/bin/xmppd --data d"),
        ("/opt/xmppd/.venv/bin/xmppd", "/opt/xmppd/.venv/bin/xmppd --data d"),
        ("xmppd.pyz", "python3 xmppd.pyz --data d"),
    ],
)
def test_advice_can_be_typed_as_it_stands(monkeypatch, called, advice):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "argv", [called])
    assert xmppd.this_command(Namespace(config=None, data=Path("d"))) == advice


# -- init


def test_init_writes_a_configuration_that_works(tmp_path):
    commands = Commands(tmp_path)
    commands.config.unlink()
    done = commands.run("init", "example.org", "example.net", "--data", str(tmp_path / "elsewhere"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"wrote {commands.config}\n"
        f"next: python3 {PROGRAM} --config {commands.config} user add alice@example.org\n"
        f"then: python3 {PROGRAM} --config {commands.config} run\n"
    )
    config = xmppd.load_config(commands.config)
    assert config.hosts == ("example.org", "example.net")
    assert config.data == tmp_path / "elsewhere"
    assert config.listen == xmppd.Listen()
    assert stat.S_IMODE(commands.config.stat().st_mode) == 0o600
    commands.add("alice@example.org")


def test_init_alone_writes_where_it_is_found_again(tmp_path):
    commands = Commands(tmp_path)
    assert commands.run_apart("init", "example.org").returncode == 0
    done = commands.run_apart("check")
    assert f"ok: configuration: {tmp_path / '.config/xmppd/xmppd.toml'}\nok: hosts: example.org\n" in done.stdout


def test_init_never_overwrites(commands):
    before = commands.config.read_text()
    assert refused(commands.run("init")) == f"{commands.config} exists already; edit it, or move it out of the way"
    assert commands.config.read_text() == before


def test_init_refuses_what_is_no_domain(tmp_path):
    commands = Commands(tmp_path)
    commands.config.unlink()
    assert refused(commands.run("init", "a b")).startswith("expected a domain such as example.org, found 'a b'; ")
    assert not commands.config.exists()


def test_init_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = Commands(tmp_path).run_apart("--config", str(tmp_path / "file" / "xmppd.toml"), "init", "example.org")
    assert refused(done) == (
        f"{tmp_path / 'file' / 'xmppd.toml'}: cannot be written: File exists; name another place with --config"
    )


# -- user: with and without a running server


def test_an_account_is_added_listed_shown_and_removed(either):
    either.add("Juliet@example.org".lower())
    either.add("romeo@example.net")
    assert either.users() == ["juliet@example.org", "romeo@example.net"]
    assert either.run("user", "list", "Example.NET").stdout == "romeo@example.net\n"
    assert json.loads(either.run("user", "list", "--json").stdout) == ["juliet@example.org", "romeo@example.net"]
    shown = json.loads(either.run("user", "show", "juliet@example.org", "--json").stdout)
    created = datetime.fromisoformat(shown.pop("created"))
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60
    assert shown == {"jid": "juliet@example.org", "sessions": [], "last_seen": None, "contacts": 0, "offline": 0}
    told = either.run("user", "show", "juliet@example.org").stdout
    assert told.startswith("juliet@example.org\n  created           20")
    assert "  last seen         never\n" in told
    done = either.run("user", "remove", "juliet@example.org", "--yes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "removed juliet@example.org\n", "")
    assert either.users() == ["romeo@example.net"]


def test_an_account_is_the_prepared_address(either):
    done = either.run("user", "add", "JULIET@Example.ORG", "--password-stdin", text="pencil\n")
    assert done.stdout == "added juliet@example.org\n"
    assert either.users() == ["juliet@example.org"]


def test_what_was_added_is_an_account_with_credentials_and_no_password(commands):
    commands.add("juliet@example.org", "correct horse")
    files = [path for path in commands.data.rglob("*") if path.is_file()]
    assert not any(b"correct horse" in path.read_bytes() for path in files)
    document = json.loads((commands.data / "example.org" / "accounts" / "juliet.json").read_text())
    assert xmppd.check_password(document["credentials"], "correct horse")
    assert not xmppd.check_password(document["credentials"], "wrong horse")
    assert "digest-md5" not in document["credentials"]


def test_digest_md5_credentials_are_made_only_where_they_are_wanted(tmp_path):
    commands = Commands(tmp_path, "[compat]\ndigest_md5 = true\n")
    commands.add()
    document = json.loads((commands.data / "example.org" / "accounts" / "juliet.json").read_text())
    assert list(document["credentials"]["digest-md5"]) == ["example.org"]


def test_a_new_password_replaces_the_old(commands):
    commands.add("juliet@example.org", "old")
    done = commands.run("user", "passwd", "juliet@example.org", "--password-stdin", text="new\n")
    assert (done.returncode, done.stdout) == (0, "new password set for juliet@example.org\n")
    document = json.loads((commands.data / "example.org" / "accounts" / "juliet.json").read_text())
    assert xmppd.check_password(document["credentials"], "new")
    assert not xmppd.check_password(document["credentials"], "old")


def test_an_account_is_added_once(either):
    either.add()
    assert refused(either.run("user", "add", "juliet@example.org", "--password-stdin", text="other\n")) == (
        "juliet@example.org exists already; for another password: xmppd user passwd juliet@example.org"
    )


@pytest.mark.parametrize(
    "words", [["passwd", "nobody@example.org", "--password-stdin"], ["show", "nobody@example.org"], ["remove", "nobody@example.org", "--yes"]]
)
def test_an_account_that_is_not_there_is_said(either, words):
    assert refused(either.run("user", *words, text="pencil\n")) == (
        "there is no account nobody@example.org; see: xmppd user list"
    )


def test_a_domain_that_is_not_served_is_said(either):
    served_here = "the hosts are: example.org, example.net"
    assert refused(either.run("user", "add", "a@example.com", "--password-stdin", text="pencil\n")) == (
        f"example.com is not served here; {served_here}"
    )
    assert refused(either.run("user", "list", "example.com")) == f"example.com is not served here; {served_here}"
    assert refused(either.run("user", "list", "a b")).startswith("expected a domain such as example.org, found 'a b'; ")


@pytest.mark.parametrize("text", ["juliet", "example.org", "juliet@example.org/balcony", "a b@example.org", "@example.org", ""])
def test_what_is_no_account_address_is_said(commands, text):
    line = refused(commands.run("user", "show", text))
    assert line.startswith(f"expected an address such as alice@example.org, found '{text}'")


def test_a_name_that_new_accounts_cannot_have_is_refused(commands):
    line = refused(commands.run("user", "add", "♔@example.org", "--password-stdin", text="pencil\n"))
    assert line.startswith("♔@example.org cannot be an account: U+2654")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (b"", "the password is empty; nothing has changed"),
        (b"\n", "the password is empty; nothing has changed"),
        (b"a\0b\n", "this password cannot be used: the text contains U+0000, which is not allowed there"),
        (b"\xff\n", "the password on stdin is not UTF-8; convert it"),
    ],
)
def test_a_password_that_nobody_could_log_in_with_is_refused(commands, given, line):
    done = commands.run("user", "add", "juliet@example.org", "--password-stdin", text=given)
    assert done.returncode == 1
    assert done.stderr == f"xmppd: {line}\n"
    assert commands.users() == []


@pytest.mark.parametrize("given", ["p e n\n", "p e n\r\n", "p e n", "p e n\nnext\n"])
def test_a_password_on_stdin_is_the_first_line(monkeypatch, given):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert xmppd.read_password_line() == "p e n"


def test_without_a_terminal_nothing_is_asked(commands):
    commands.add()
    assert refused(commands.run("user", "passwd", "juliet@example.org")) == (
        "there is no terminal to ask for a password; give it on stdin with --password-stdin"
    )
    assert refused(commands.run("user", "remove", "juliet@example.org", text="y\n")) == (
        "removing juliet@example.org cannot be undone; if you are sure: --yes"
    )
    assert commands.users() == ["juliet@example.org"]


class Terminal:
    """Somebody at a terminal, with their answers ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.answers = list(answers)
        self.questions: list[str] = []
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr(getpass, "getpass", self.answer)
        monkeypatch.setattr("builtins.input", self.answer)

    def answer(self, question: str) -> str:
        """Answer a question."""
        self.questions.append(question)
        if not self.answers:
            raise EOFError  # ^D
        return self.answers.pop(0)


def at_terminal(commands: Commands, *words: str) -> int:
    """Run a command in this process, where a test can play the terminal."""
    return xmppd.main(["--config", str(commands.config), *words])


def test_at_a_terminal_a_password_is_asked_twice(commands, monkeypatch, capsys):
    terminal = Terminal(monkeypatch, "correct horse", "correct horse")
    assert at_terminal(commands, "user", "add", "juliet@example.org") == 0
    assert terminal.questions == ["New password for juliet@example.org: ", "The same again: "]
    assert capsys.readouterr().out == "added juliet@example.org\n"
    assert commands.users() == ["juliet@example.org"]


@pytest.mark.parametrize("words", [("add", "juliet@example.org"), ("remove", "romeo@example.org")])
def test_at_a_terminal_control_d_is_no_answer(commands, monkeypatch, capsys, words):
    commands.add("romeo@example.org")
    Terminal(monkeypatch)
    assert at_terminal(commands, "user", *words) == 1
    assert capsys.readouterr().err == "\nxmppd: no answer was given; nothing has changed\n"
    assert commands.users() == ["romeo@example.org"]


def test_at_a_terminal_a_short_or_mistyped_password_is_asked_for_again(commands, monkeypatch, capsys):
    terminal = Terminal(monkeypatch, "1234567", "", "correct horse", "correct house", "never asked for")
    assert at_terminal(commands, "user", "add", "juliet@example.org") == 1
    assert terminal.answers == ["never asked for"]
    assert capsys.readouterr().err.splitlines() == [
        "xmppd: that is shorter than 8 characters; three or four words make a good password",
        "xmppd: the password is empty; nothing has changed",
        "xmppd: the two differ",
        "xmppd: no usable password after 3 attempts; nothing has changed",
    ]
    assert commands.users() == []


@pytest.mark.parametrize(("answer", "left"), [("y", []), ("Y ", []), ("n", ["juliet@example.org"]), ("", ["juliet@example.org"])])
def test_at_a_terminal_removing_is_asked_about(commands, monkeypatch, answer, left):
    commands.add()
    terminal = Terminal(monkeypatch, answer)
    assert at_terminal(commands, "user", "remove", "juliet@example.org") == (1 if left else 0)
    assert terminal.questions == ["Remove juliet@example.org with contacts and messages? This cannot be undone. [y/N] "]
    assert commands.users() == left


@pytest.mark.wire
def test_sessions_are_shown(process_server):
    process_server.client().login("romeo", resource="orchard")
    [session] = json.loads(process_server.command("user", "show", "romeo@example.org", "--json"))["sessions"]
    assert (session["resource"], session["peer"], session["available"]) == ("orchard", "127.0.0.1", False)
    told = process_server.command("user", "show", "romeo@example.org")
    assert re.search(r"^  last seen         now$", told, re.MULTILINE)
    assert re.search(r"^    orchard, unavailable, since 20.+Z, from 127\.0\.0\.1$", told, re.MULTILINE)
    assert json.loads(process_server.command("status", "--json"))["sessions"] == 1


@pytest.mark.wire
def test_whose_password_is_changed_or_whose_account_goes_has_to_leave(process_server):
    """S33"""
    romeo = process_server.client().login("romeo")
    process_server.command("user", "passwd", "romeo@example.org", "--password-stdin", text="another\n")
    romeo.receives_stream_error("reset")
    juliet = process_server.client().login("juliet")
    process_server.command("user", "remove", "juliet@example.org", "--yes")
    juliet.receives_stream_error("not-authorized")


# -- status


def test_nothing_runs(commands):
    done = commands.run("status")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        f"no server runs on {commands.data}; start one with: python3 {PROGRAM} --config {commands.config} run\n"
    )
    done = commands.run("status", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"running": False, "data": str(commands.data)})
    assert not commands.data.exists()


def test_status_tells_what_runs(served):
    done = served.run("status", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["running"], found["version"]) == (0, True, xmppd.__version__)
    assert found["hosts"] == ["example.org", "example.net"]
    assert found["data"] == str(served.data)
    assert found["sessions"] == 0
    assert [name.partition(" ")[0] for name in found["listeners"]] == ["client", "client_tls"]
    assert datetime.fromisoformat(found["started"]) <= datetime.now(UTC)
    told = served.run("status").stdout
    assert told.startswith(f"xmppd {xmppd.__version__} runs since {found['started']}, process {found['pid']}\n")
    assert re.search(r"^  memory    \d+ MB$", told, re.MULTILINE) or not Path("/proc/self/statm").exists()


# -- check


def test_all_is_well(commands):
    done = commands.run("check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "all is well"
    assert all(line.startswith("ok: ") for line in lines[:-1])
    assert f"ok: configuration: {commands.config}" in lines
    assert "ok: server: does not run" in lines
    assert f"ok: data: {commands.data} will be made at the first start" in lines
    assert not commands.data.exists()


def test_all_is_well_with_a_running_server(served):
    done = served.run("check")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all is well"), done.stdout
    assert "ok: server: runs, process " in done.stdout
    assert re.search(r"^ok: certificate: expires in 39\d days$", done.stdout, re.MULTILINE)
    assert re.search(rf"^ok: authority: {served.data}/tls/ca.pem, SHA-256 fingerprint (..:){{31}}..$", done.stdout, re.MULTILINE)


def problems(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the problems that `check` found."""
    assert (done.returncode, done.stderr) == (1, "")
    *lines, summary = done.stdout.splitlines()
    found = [line.removeprefix("problem: ") for line in lines if not line.startswith("ok: ")]
    assert summary == ("1 problem" if len(found) == 1 else f"{len(found)} problems")
    return found


def test_a_wrong_configuration_is_a_problem(commands):
    commands.config.write_text("hosts = 1")
    assert problems(commands.run("check")) == [
        f'configuration: {commands.config}: hosts: expected a list of domains such as ["example.org"], found 1; '
        "remedy: correct that, then check again"
    ]


def test_a_port_that_somebody_else_has_is_a_problem(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = Commands(tmp_path, f'[listen]\nclient = ["127.0.0.1:{port}"]\nclient_tls = []\n').run("check")
    assert problems(done) == [
        f"port: client 127.0.0.1:{port} cannot be had; "
        "remedy: another program has it: stop that one, or choose another port in [listen]"
    ]


def test_a_port_that_our_own_server_has_is_fine(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    commands = Commands(tmp_path, f'[listen]\nclient = ["127.0.0.1:{port}"]\nclient_tls = []\n')
    server = commands.server()
    done = commands.run("check")
    server.stop()
    assert done.returncode == 0
    assert f"ok: port: client 127.0.0.1:{port} is ours" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_data_folder_that_others_can_read_is_a_problem(commands):
    commands.add()
    commands.data.chmod(0o755)
    assert problems(commands.run("check")) == [
        f"data: others may look into {commands.data} (mode 055); remedy: chmod 700 {commands.data}"
    ]


def test_accounts_of_a_domain_that_is_not_served_are_a_problem(commands):
    commands.add("juliet@example.net")
    commands.config.write_text(commands.config.read_text().replace(', "example.net"', ""))
    assert problems(commands.run("check")) == [
        "data: example.net has accounts and is not served; remedy: add it to hosts, or remove its folder"
    ]


def test_a_certificate_that_is_missing_is_a_problem(commands):
    with commands.config.open("a") as file:
        file.write('[tls]\ncertificate = "no.pem"\nkey = "no.key"\n')
    [problem] = problems(commands.run("check"))
    assert problem.startswith(f"certificate: {commands.home / 'no.pem'}: cannot read the certificate")


def test_a_certificate_for_another_name_is_a_problem(commands, served):
    tls = served.data / "tls"
    text = commands.config.read_text().replace("example", "other")
    commands.config.write_text(f'{text}[tls]\ncertificate = "{tls / "leaf.pem"}"\nkey = "{tls / "leaf.key"}"\n')
    [problem] = problems(commands.run("check"))
    assert problem.startswith(f"certificate: {tls / 'leaf.pem'}: does not name other.org")


def test_a_clock_from_before_this_program_is_a_problem():
    found = xmppd.check_clock(datetime(1970, 1, 1, 0, 3, tzinfo=UTC))
    assert found == xmppd.Finding("clock: it says 1970-01-01", "set it, or have it set: timedatectl set-ntp true")
    assert not xmppd.check_clock(datetime.now(UTC)).remedy


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000))
    *_, found = xmppd.check_data(tmp_path)
    assert found == xmppd.Finding("disk: 5 MB free", "make room, or set data to a larger disk")


# -- run


def test_the_first_start_says_what_to_do_next(commands):
    server = commands.server()
    server.stop()
    log = server.log()
    assert f"configured by {commands.config}" in log
    assert f"serving example.org, example.net; everything is kept in {commands.data}" in log
    assert re.search(rf"{commands.data}/tls/ca.pem, SHA-256 fingerprint (..:){{31}}..$", log, re.MULTILINE)
    assert re.search(r"no accounts yet; add the first with: .*--config .* user add alice@example.org$", log, re.MULTILINE)
    assert re.search(r"ready: client 127\.0\.0\.1:\d+, client_tls 127\.0\.0\.1:\d+$", log, re.MULTILINE)


def test_a_later_start_does_not(commands):
    commands.add()
    server = commands.server()
    server.stop()
    assert "no accounts yet" not in server.log()


def test_without_a_configuration_it_says_so_and_serves_this_machine(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(socket, "gethostname", lambda: "kitchen")
    config = xmppd.load_config(None, data=tmp_path)
    server, loop, storage = offline_server(config)
    told = list(xmppd.greeting(server, None, "xmppd"))
    storage.close()
    loop.close()
    assert told == [
        f"xmppd {xmppd.__version__}, configured by nothing: every setting has its default",
        f"serving kitchen.local; everything is kept in {tmp_path}",
        "there are no accounts yet; add the first with: xmppd user add alice@kitchen.local",
    ]


def test_a_renamed_machine_is_told_of_its_accounts(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "kitchen")
    server, loop, storage = offline_server(xmppd.load_config(None, data=tmp_path))
    server.create_account(JID("juliet", "kitchen.local", ""), CREDENTIALS)
    storage.close()
    loop.close()
    monkeypatch.setattr(socket, "gethostname", lambda: "balcony")
    assert xmppd.unserved_domains(xmppd.load_config(None, data=tmp_path)) == ["kitchen.local"]


def test_sigterm_ends_politely_and_leaves_nothing_behind(commands):
    server = commands.server()
    assert (commands.data / "control.json").exists()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 0
    assert not (commands.data / "control.json").exists()
    assert commands.users() == []


@pytest.mark.wire
def test_whoever_is_there_hears_system_shutdown(process_server):
    """RFC6120-4.9.3.20-1"""
    romeo = process_server.client().login("romeo")
    process_server.process.process.send_signal(signal.SIGTERM)
    romeo.receives_stream_error("system-shutdown")
    assert romeo.is_closed()
    assert process_server.process.process.wait(5) == 0
    process_server.start()


def test_an_interrupt_ends_politely_too(commands):
    server = commands.server()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 130
    server.check_log()


def silent_client(server: ServerProcess) -> socket.socket:
    """Return a connection whose client will not say goodbye."""
    port = re.search(r"client 127\.0\.0\.1:(\d+)", server.log())
    assert port
    client = socket.create_connection(("127.0.0.1", int(port[1])), PATIENCE)
    client.sendall(b"<stream:stream to='example.org' version='1.0' xmlns='jabber:client' "
                   b"xmlns:stream='http://etherx.jabber.org/streams'>")  # fmt: skip
    assert client.recv(4096)
    return client


def test_a_client_that_never_leaves_does_not_hold_the_end_up(commands):
    server = commands.server()
    with silent_client(server):
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


def test_the_second_signal_ends_at_once(commands):
    server = commands.server()
    with silent_client(server) as client:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("saying goodbye")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM again: ending at once")
        assert server.process.wait(2) == 0
        assert b"system-shutdown" in client.recv(4096)
    server.check_log()


def test_sighup_reads_the_configuration_again(commands):
    server = commands.server()
    commands.config.write_text(commands.config.read_text().replace('"example.net"', '"example.com"'))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("reloaded")
    assert json.loads(commands.run("status", "--json").stdout)["hosts"] == ["example.org", "example.com"]
    commands.add("juliet@example.com")
    server.stop()


def test_sighup_gives_a_port_to_another_listener(commands):
    """The new one can have it only when the old one has let go of it."""
    server = commands.server()
    before = json.loads(commands.run("status", "--json").stdout)["listeners"]
    port = next(listener for listener in before if listener.startswith("client ")).rpartition(":")[2]
    text = commands.config.read_text().replace('client = ["127.0.0.1:0"]', "client = []")
    commands.config.write_text(text.replace('client_tls = ["127.0.0.1:0"]', f'client_tls = ["127.0.0.1:{port}"]'))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("info: reloaded")
    assert json.loads(commands.run("status", "--json").stdout)["listeners"] == [f"client_tls 127.0.0.1:{port}"]
    server.stop()


@pytest.mark.wire
def test_sighup_drops_nobody(process_server):
    romeo = process_server.client().login("romeo")
    process_server.process.process.send_signal(signal.SIGHUP)
    process_server.process.wait_for("reloaded")
    romeo.passes_barrier()


def test_a_configuration_that_cannot_be_used_changes_nothing(commands):
    server = commands.server()
    text = commands.config.read_text()
    for wrong, why in (
        ("hosts = 1", "hosts: expected a list of domains"),
        (text + "[storage]\nsync = false\n", "storage.sync cannot change while the server runs; restart it"),
    ):
        commands.config.write_text(wrong)
        server.process.send_signal(signal.SIGHUP)
        assert why in server.wait_for("not reloaded, everything stays as it was: ")
        commands.config.write_text(text)
    assert json.loads(commands.run("status", "--json").stdout)["hosts"] == ["example.org", "example.net"]
    server.stop()


def run_to_its_end(commands: Commands) -> str:
    """Run a server that cannot start; return its one line."""
    done = commands.run_apart("--config", str(commands.config), "run")
    assert (done.returncode, done.stdout) == (1, "")
    *before, line = done.stderr.splitlines()
    assert all(" info: " in earlier for earlier in before)
    return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d error: ", "", line)


def test_two_servers_do_not_share_a_folder(served):
    assert run_to_its_end(served).startswith(f"{served.data}: in use by another xmppd: stop ")
    assert served.run("status").returncode == 0


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        commands = Commands(tmp_path, f'[listen]\nclient = ["127.0.0.1:{port}"]\nclient_tls = []\n')
        assert run_to_its_end(commands) == (
            f"cannot listen on 127.0.0.1:{port}: Address already in use; "
            "another program has it: stop that one, or choose another port in [listen]"
        )
    assert commands.users() == []  # the folder is released


def test_a_killed_server_leaves_a_file_that_nobody_is_fooled_by(commands):
    server = commands.server()
    commands.add()
    server.kill()
    assert (commands.data / "control.json").exists()
    assert commands.run("status").returncode == 1
    assert commands.users() == ["juliet@example.org"]
    again = commands.server()
    assert commands.users() == ["juliet@example.org"]
    again.stop()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("bytecode", [True, False])
def test_a_start_as_a_script_hands_over_to_bytecode_where_it_can(tmp_path, bytecode, monkeypatch):
    copy = tmp_path / "xmppd.py"
    copy.write_bytes(PROGRAM.read_bytes())
    monkeypatch.setattr(xmppd, "__file__", str(copy))
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS", "PYTHONDEVMODE"):
        monkeypatch.delenv(name, raising=False)
    if not bytecode:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    server = Commands(tmp_path).server()
    words = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().split(b"\0")
    server.stop()
    assert (words[1] == b"-c") == bytecode
    assert words[-2] == b"run"
    assert list((tmp_path / "__pycache__").glob("xmppd.*.pyc") if bytecode else [1])


# -- the log


def record(text: str, *arguments: object, level: int = logging.INFO, error: BaseException | None = None) -> logging.LogRecord:
    found = logging.LogRecord("xmppd", level, "", 0, text, arguments, (type(error), error, error.__traceback__) if error else None)
    found.created = 0.0
    return found


def test_a_record_is_one_line_whatever_is_in_it():
    """S86"""
    line = xmppd.LineFormatter(journald=False).format(record("%s says", "mallory\r\n2026 error: \x1b[2J\x9b\u2028\u202eoops"))
    assert line.endswith(" info: mallory\\r\\n2026 error: \\x1b[2J\\x9b\\u2028\\u202eoops says")
    assert re.match(r"19(69|70)-\d\d-\d\d \d\d:\d\d:\d\d info: ", line)


def test_letters_of_all_languages_stay_as_they_are():
    assert xmppd.printable("Jürgen 王 🐙") == "Jürgen 王 🐙"


@pytest.mark.parametrize(("level", "priority"), [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)])
def test_journald_gets_priorities_and_no_time(level, priority):
    assert xmppd.LineFormatter(journald=True).format(record("hello", level=level)) == f"<{priority}>hello"


def test_a_traceback_is_part_of_the_line():
    try:
        try:
            int("x\ny")
        except ValueError as cause:
            raise KeyError("lost") from cause
    except KeyError as error:
        line = xmppd.LineFormatter(journald=True).format(record("bug", error=error, level=logging.ERROR))
    assert line.isprintable()
    assert re.fullmatch(
        r"<3>bug: KeyError: 'lost' \(test_command_line\.py:\d+ in test_a_traceback_is_part_of_the_line\), "
        r"after ValueError: invalid literal .* \(test_command_line\.py:\d+ in test_a_traceback_is_part_of_the_line\)",
        line,
    )


def test_only_the_stream_that_journald_reads_is_written_for_it(commands):
    reader, writer = os.pipe()
    found = os.fstat(writer)
    environment = clean_environment(commands.home)
    commands.config.write_text("hosts = 1")
    lines = {}
    for name, value in (("journal", f"{found.st_dev}:{found.st_ino}"), ("file", "1:1")):
        words = ["--config", str(commands.config), "run"]
        done = commands.run_apart(*words, capture_output=False, stderr=writer, env=environment | {"JOURNAL_STREAM": value})
        assert done.returncode == 1
        lines[name] = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert lines["journal"].startswith(f"<3>{commands.config}: hosts: expected ")
    assert re.match(r"\d{4}-.* error: ", lines["file"])


# -- the control channel


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def offline_server(config: xmppd.Config, disk: xmppd.Disk | None = None, clock: Callable[[], float] | None = None) -> Any:
    """Return a server without listeners, its loop and storage."""
    loop = xmppd.Loop(clock) if clock else xmppd.Loop()
    storage = xmppd.Storage(config.data, loop, disk=disk)
    return xmppd.Server(config, loop, storage, xmppd.FEATURES), loop, storage


class Channel:
    """A control channel whose loop runs only while a test waits, and strangers who call it."""

    def __init__(self, folder: Path, disk: xmppd.Disk | None = None) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "xmppd.toml").write_text('hosts = ["example.org"]\ndata = "data"')
        self.clock = Clock()
        self.server, self.loop, self.storage = offline_server(xmppd.load_config(folder / "xmppd.toml"), disk, self.clock)
        self.control = ControlChannel(self.server)
        self.control.open()
        self.file = self.server.config.data / "control.json"
        self.callers: list[socket.socket] = []

    def call(self) -> socket.socket:
        """Return a connection to the channel."""
        caller = socket.create_connection(("127.0.0.1", json.loads(self.file.read_text())["port"]), PATIENCE)
        caller.setblocking(False)
        self.callers.append(caller)
        self.wait_until(lambda: len(self.control.connections) > 0)
        return caller

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Run turns of the loop until `condition` holds."""
        for _ in range(1000):
            self.loop.turn(0.02)
            if condition():
                return
        raise AssertionError("it does not happen")

    def hear(self, caller: socket.socket) -> bytes:
        """Return the next line that the caller gets, b"" for the end of the connection."""
        heard = b""

        def got_something() -> bool:
            nonlocal heard
            with contextlib.suppress(BlockingIOError):
                try:
                    piece = caller.recv(65536)
                except ConnectionResetError:
                    piece = b""
                heard += piece
                return not piece or heard.endswith(b"\n")
            return False

        self.wait_until(got_something)
        return heard

    def ask(self, caller: socket.socket, request: object) -> Any:
        """Send a request and return the answer."""
        caller.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(self.hear(caller))

    def close(self) -> None:
        """Release everything."""
        for caller in self.callers:
            caller.close()
        self.control.close()
        self.loop.turn(0)
        self.storage.close()
        self.loop.close()


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    """A control channel."""
    channel = Channel(tmp_path)
    yield channel
    channel.close()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_only_the_owner_can_read_how_to_reach_the_channel(channel):
    assert stat.S_IMODE(channel.file.stat().st_mode) == 0o600
    found = json.loads(channel.file.read_text())
    assert set(found) == {"port", "token", "pid"}
    assert found["pid"] == os.getpid()
    assert len(found["token"]) >= 43


def test_the_channel_listens_on_the_loopback_only(channel):
    port = json.loads(channel.file.read_text())["port"]
    listening = [key.fileobj.getsockname() for key in channel.loop._selector.get_map().values() if is_listener(key)]
    assert listening == [("127.0.0.1", port)]


def is_listener(key: selectors.SelectorKey) -> bool:
    return isinstance(key.fileobj, socket.socket) and bool(key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def test_a_command_with_the_token_is_performed(channel):
    request = {"token": channel.control.token, "command": "user list", "arguments": {}}
    caller = channel.call()
    assert channel.ask(caller, request) == {"ok": {"users": []}}
    assert channel.hear(caller) == b""


@pytest.mark.parametrize("token", ["", "wrong", None, 5, "\ud800"])
def test_without_the_token_nothing_is_performed(channel, token):
    """S28"""
    request = {"token": token, "command": "user add", "arguments": {"jid": "a@example.org", "credentials": CREDENTIALS}}
    caller = channel.call()
    assert channel.ask(caller, request) == {"error": "the token is wrong: the server was started again meanwhile"}
    assert channel.hear(caller) == b""
    assert channel.server.account(JID("a", "example.org", "")) is None


def test_the_greeting_proves_the_token_without_telling_it(channel):
    caller = channel.call()
    proofs = [
        channel.ask(caller, {"command": "hello", "arguments": {"nonce": nonce}})["ok"]["proof"] for nonce in ("1", "1", "2")
    ]
    assert proofs[0] == proofs[1] == xmppd.control_proof(channel.control.token, "1") != proofs[2]
    assert channel.control.token not in str(proofs)


@pytest.mark.parametrize("line", [b"", b"x", b"[]", b"5", b"{}", b'{"command": 1, "arguments": 5}', b"\xff", b"[" * 50_000])
def test_what_is_no_request_gets_an_error_and_the_end(channel, line):
    caller = channel.call()
    caller.sendall(line + b"\n")
    answer = json.loads(channel.hear(caller))
    assert answer == {"error": "expected a JSON object with command, arguments and token on one line"}
    assert channel.hear(caller) == b""


def test_a_line_without_end_is_not_collected(channel):
    caller = channel.call()
    sent = 0

    def keep_sending() -> bool:
        nonlocal sent
        with contextlib.suppress(BlockingIOError):
            try:
                sent += caller.send(b"x" * 10_000)
            except OSError:
                return True
        return not channel.control.connections

    channel.wait_until(keep_sending)
    assert channel.hear(caller) == b""
    assert not channel.control.connections


def test_a_caller_who_says_nothing_is_hung_up_on(channel):
    caller = channel.call()
    channel.clock.seconds += xmppd.CONTROL_TIMEOUT - 1
    channel.loop.turn(0)
    assert len(channel.control.connections) == 1
    channel.clock.seconds += 2
    assert channel.hear(caller) == b""
    assert not channel.control.connections


def test_callers_who_say_nothing_keep_nobody_out(channel):
    callers = [channel.call() for _ in range(xmppd.MAX_CONTROL_CONNECTIONS)]
    channel.wait_until(lambda: len(channel.control.connections) == xmppd.MAX_CONTROL_CONNECTIONS)
    last = channel.call()
    request = {"token": channel.control.token, "command": "user list", "arguments": {}}
    assert channel.ask(last, request) == {"ok": {"users": []}}
    assert channel.hear(callers[0]) == b""


def test_an_unknown_command_and_wrong_arguments_are_told(channel):
    def answer(command: str, **arguments: object) -> str:
        request = {"token": channel.control.token, "command": command, "arguments": arguments}
        return str(channel.ask(channel.call(), request)["error"])

    assert answer("fly") == f"the running server (version {xmppd.__version__}) has no command 'fly'"
    assert answer("user add").startswith("expected an address such as alice@example.org, found ''; ")
    assert answer("user add", jid="a@example.org") == (
        "the request carries no credentials; is this xmppd as new as the running one?"
    )
    assert answer("user list", domain=["example.org"]) == "['example.org'] is not served here; the hosts are: example.org"


def test_a_bug_in_a_command_is_logged_and_answered(channel, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("xmppd"), "propagate", True)

    def broken(server: object, arguments: object) -> dict[str, Any]:
        raise ZeroDivisionError("oops")

    channel.control.commands = {"status": broken}
    answer = channel.ask(channel.call(), {"token": channel.control.token, "command": "status"})
    assert answer == {"error": "an unexpected error in the server; its log has the details"}
    assert "ZeroDivisionError: oops" in caplog.text


class SlowDisk(xmppd.Disk):
    """A disk that takes nothing until a test lets it, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.error: OSError | None = None

    def sync(self, file: int) -> None:
        """Wait for the test."""
        assert self.may_go_on.wait(PATIENCE)
        if self.error:
            raise self.error
        super().sync(file)


def add_juliet(channel: Channel) -> socket.socket:
    """Ask for an account, and return the caller once the server has made it."""
    juliet = JID("juliet", "example.org", "")
    request = {"token": channel.control.token, "command": "user add", "arguments": {"jid": str(juliet), "credentials": CREDENTIALS}}
    caller = channel.call()
    caller.sendall(json.dumps(request).encode() + b"\n")
    channel.wait_until(lambda: channel.server.account(juliet) is not None)
    return caller


def test_an_answer_waits_until_it_is_true_on_disk(tmp_path):
    disk = SlowDisk()
    channel = Channel(tmp_path, disk)
    channel.wait_until(lambda: channel.storage.synced == channel.storage.position)
    disk.may_go_on.clear()
    caller = add_juliet(channel)
    channel.loop.turn(0)
    channel.loop.turn(0)
    with pytest.raises(BlockingIOError):
        caller.recv(1)
    disk.may_go_on.set()
    assert json.loads(channel.hear(caller)) == {"ok": {}}
    assert channel.storage.synced == channel.storage.position
    channel.close()


def test_what_the_disk_does_not_take_is_not_promised(tmp_path):
    disk = SlowDisk()
    channel = Channel(tmp_path, disk)
    channel.wait_until(lambda: channel.storage.synced == channel.storage.position)
    disk.error = OSError(5, "Input/output error")
    caller = add_juliet(channel)
    channel.wait_until(lambda: bool(channel.storage.failed))
    channel.clock.seconds += xmppd.CONTROL_TIMEOUT + 1
    answer = json.loads(channel.hear(caller))
    assert answer == {"error": f"not saved: {channel.storage.failed}"}
    channel.close()


def test_without_a_server_what_the_disk_does_not_take_is_a_failure(tmp_path, monkeypatch):
    disk = SlowDisk()
    config = xmppd.load_config(None, data=tmp_path)
    _, loop, storage = offline_server(config, disk)
    storage.close()
    loop.close()
    disk.error = OSError(5, "Input/output error")
    monkeypatch.setattr(xmppd, "Storage", lambda folder, loop, **options: original(folder, loop, disk=disk, **options))
    jid = f"juliet@{config.hosts[0]}"
    with pytest.raises(ConfigError):
        xmppd.perform_offline(config, "user add", {"jid": jid, "credentials": CREDENTIALS})


original = xmppd.Storage


def test_a_long_answer_arrives_whole(channel):
    text = "abcdefghi " * 400_000  # more than the buffers of a connection hold
    channel.control.commands = {"status": lambda server, arguments: {"text": text}}
    caller = channel.call()
    assert channel.ask(caller, {"token": channel.control.token, "command": "status"}) == {"ok": {"text": text}}
    assert channel.hear(caller) == b""


def test_closing_takes_the_file_away_and_hangs_up(channel):
    caller = channel.call()
    channel.control.close()
    assert not channel.file.exists()
    assert channel.hear(caller) == b""
    channel.control.close()


# -- the command line's side of it


class Impostor:
    """A program that got the port of a server that was killed; remembers all that it hears."""

    def __init__(self, data: Path, answer: bytes) -> None:
        data.mkdir(exist_ok=True)
        self.heard = b""
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        document = {"port": self._listener.getsockname()[1], "token": "the-secret-token", "pid": 1}
        (data / "control.json").write_text(json.dumps(document))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            self.heard += sock.recv(65536)
            sock.sendall(self._answer)
            if not self._answer:
                return
            with contextlib.suppress(OSError):
                self.heard += sock.recv(65536)

    def leave(self) -> None:
        """Stop, having heard everything."""
        self._thread.join(PATIENCE)
        self._listener.close()


@pytest.mark.parametrize(
    "answer", [b"", b"\n", b"x\n", b'{"ok": {"proof": "guessed"}}\n', b'{"ok": {"proof": "\\ud800"}}\n', b'{"ok": 5}\n', b'{"ok": {}}\n']
)
def test_an_impostor_hears_neither_token_nor_credentials(tmp_path, answer):
    impostor = Impostor(tmp_path / "data", answer)
    with pytest.raises(ServerAbsent), ControlClient(tmp_path / "data") as control:
        control.request("user add", {"jid": "a@example.org", "credentials": CREDENTIALS})
    impostor.leave()
    assert b"hello" in impostor.heard
    assert b"the-secret-token" not in impostor.heard
    assert b"scram" not in impostor.heard


@pytest.mark.parametrize("content", [None, "", "x", "[]", "{}", '{"port": "x", "token": ""}', '{"port": 99999999, "token": ""}'])
def test_a_file_that_says_nothing_means_that_no_server_runs(tmp_path, content):
    if content is not None:
        (tmp_path / "control.json").write_text(content)
    with pytest.raises(ServerAbsent):
        ControlClient(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="owners of files are POSIX")
def test_nobody_but_the_owner_changes_the_files(commands, monkeypatch):
    commands.add()
    owner = commands.data.owner()
    monkeypatch.setattr(os, "geteuid", lambda: commands.data.stat().st_uid + 1)
    assert refused(commands.run("user", "remove", "juliet@example.org", "--yes")) == (
        f"{commands.data} belongs to {owner}; do this as that user, with: sudo -u {owner}"
    )
    monkeypatch.undo()
    assert commands.users() == ["juliet@example.org"]


def test_somebody_elses_server_is_told_apart_from_none(tmp_path, monkeypatch):
    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(ConfigError, match="cannot be read by this user; do this as the owner of that folder"):
        ControlClient(tmp_path)


def test_many_commands_at_once_all_arrive(served):
    names = [f"guest{number}@example.org" for number in range(6)]
    threads = [threading.Thread(target=request_account, args=(served.data, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert set(names) <= set(served.users())


def request_account(data: Path, name: str) -> None:
    """Ask the running server for an account."""
    with ControlClient(data) as control:
        control.request("user add", {"jid": name, "credentials": CREDENTIALS})


def test_addresses_of_listeners_read_as_in_the_configuration():
    assert str(Address(socket.AF_INET, "127.0.0.1", 5222)) == "127.0.0.1:5222"
    assert str(Address(socket.AF_INET6, "::1", 5222)) == "[::1]:5222"


# ---- specs --------------------------------------------------------------------------------


def test_what_it_speaks_is_printed(commands):
    lines = commands.run("specs").stdout.splitlines()
    assert any(re.fullmatch(r"XEP-0199 +XMPP Ping +`Ping`", line) for line in lines)
    assert [list(row) for row in xmppd.supported_specs()] == json.loads(commands.run("specs", "--json").stdout)


def test_what_the_compliance_suites_ask_is_printed(commands, monkeypatch):
    """XEP-0479 §2: a suite is met when the core's and its own rows all are"""
    monkeypatch.setattr(xmppd, "SUITES", [row for row in xmppd.SUITES if row.category in ("Core", "IM")])
    monkeypatch.setattr(xmppd, "FOUNDATIONS", [(row, "", "") for suite in xmppd.SUITES for row in suite.providers])
    assert commands.run("specs", "--compliance").stdout.endswith("Core  Advanced Server\nIM    Advanced Server\n")
    without = [row for row in xmppd.FOUNDATIONS if row[0] not in ("XEP-0368", "RFC 6121")]
    monkeypatch.setattr(xmppd, "FOUNDATIONS", without)
    told = commands.run("specs", "--compliance").stdout
    assert re.search(r"^Core +Advanced Server +Direct TLS +XEP-0368 +no: XEP-0368$", told, re.MULTILINE)
    assert told.endswith("Core  Server\nIM    not reached\n")
    told = json.loads(commands.run("specs", "--compliance", "--json").stdout)
    assert told["levels"] == {"Core": "Server", "IM": ""}
