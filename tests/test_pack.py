"""`xmppd pack`: the zipapp, tried on a clean machine, that is in an environment without packages and in an empty home."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import xmppd
from tests.servers import ProcessServer, ServerProcess
from xmppd import ConfigError

SOURCE = Path(xmppd.__file__)
PATIENCE = 30.0  # seconds
CONFIGURATION = """\
hosts = ["example.org"]
data = "data"
[listen]
client = ["127.0.0.1:0"]
client_tls = ["127.0.0.1:0"]
server = []
component = []
web = []
"""
PACKAGES = ("xmppd", "defusedxml", "platformdirs", "tomli_w")  # that run from inside the archive

Done = subprocess.CompletedProcess[str]


def run(*words: object, text: str = "", **options: object) -> Done:
    """Run a program to its end."""
    usual: dict[str, object] = {"input": text, "capture_output": True, "text": True, "timeout": PATIENCE, "check": False}
    return subprocess.run(list(map(str, words)), **usual | options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xmppd.pyz, packed as people do it; nobody changes it."""
    folder = tmp_path_factory.mktemp("packed")
    done = run(sys.executable, SOURCE, "pack", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote xmppd.pyz, ")
    assert done.stdout.endswith(f" MB, with `cryptography` for {xmppd.platform_tag()}\nnext: python3 xmppd.pyz\n")
    assert [path.name for path in folder.iterdir()] == ["xmppd.pyz"]
    return folder / "xmppd.pyz"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any packages, not even pip."""
    folder = tmp_path_factory.mktemp("machine") / "venv"
    venv.create(folder, symlinks=os.name == "posix")
    return next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())


class Machine:
    """Another machine: only Python, our archive, and an empty home."""

    def __init__(self, python: Path, archive: Path, home: Path) -> None:
        self.python, self.archive, self.home = python, archive, home
        self.config = home / "xmppd.toml"
        self.config.write_text(CONFIGURATION)

    def run(self, *words: object, text: str = "") -> Done:
        """Run `python3 xmppd.pyz WORDS`."""
        return run(self.python, self.archive, *words, text=text, cwd=self.home)

    def starts(self) -> ServerProcess:
        """Return a server that is ready."""
        server = ServerProcess(self.config, self.home / "data", program=(str(self.archive),))
        server.wait_for("ready: ")
        return server

    def refuses_to_start(self) -> str:
        """Return the one line with which a server ends that cannot start."""
        done = self.run("--config", self.config, "run")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        return done.stderr.rstrip("\n").partition(" error: ")[2]

    def python_says(self, program: str) -> str:
        """Return what a Python program prints that has the archive on its path."""
        done = run(self.python, "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{program}", self.archive)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def unpacked(self) -> list[Path]:
        """Return the folders of unpacked packages."""
        return [path for path in self.home.rglob("cryptography") if path.is_dir()]


@pytest.fixture
def machine(archive: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A clean machine; what this test starts runs there."""
    for name in os.environ:
        if name.startswith(("PYTHON", "XDG_", "XMPPD_", "JOURNAL_", "VIRTUAL_ENV")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(python))  # for `ServerProcess`
    return Machine(python, archive, tmp_path)


def changed(archive: Path, target: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """Write a copy of an archive in which each file is what `change` makes of it, None for nothing; returns it."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if (file := change(info.filename, old.read(info))) is not None:
                new.writestr(*file)
    return target


# -- on another machine


def test_the_machine_has_no_packages(machine):
    program = "from importlib.util import find_spec\nimport sys\n[print(name) for name in sys.argv[1:] if find_spec(name)]"
    done = run(machine.python, "-c", program, *xmppd.PACKAGES, "_cffi_backend", "xmppd", "re", cwd=machine.home)
    assert (done.returncode, done.stdout) == (0, "re\n")


def test_it_is_the_same_program(machine):
    done = machine.run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"xmppd {xmppd.__version__} (Python 3.")
    done = machine.run("status", "extra")
    assert (done.returncode, done.stderr.split()[:2]) == (2, ["usage:", "xmppd"])


def test_it_can_be_executed(machine):
    done = run(machine.archive, "--version", env={"PATH": str(machine.python.parent)})
    assert (done.returncode, done.stdout) == (0, machine.run("--version").stdout)


def test_a_server_lives_its_life(machine):
    """From nothing to a login over TLS, and to the end; the advice given can be typed as it stands."""
    written = machine.home / "first.toml"
    done = machine.run("--config", written, "init", "example.org")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"then: python3 {machine.archive} --config {written} run\n" in done.stdout
    assert xmppd.load_config(written).hosts == ("example.org",)

    people = ProcessServer(machine.home, {"hosts": ["example.org"]})
    people.program = (str(machine.archive),)
    common = ("--config", people.config, "--data", people.data)
    done = machine.run(*common, "user", "add", "romeo@example.org", "--password-stdin", text="pencil\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "added romeo@example.org\n", "")
    people.start()
    try:
        romeo = people.client().login("romeo", password="pencil", resource="orchard")
        romeo.sends("<iq type='get' id='p1' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")
        romeo.receives("<iq type='result' id='p1' from='example.org'/>")
        found = json.loads(machine.run(*common, "status", "--json").stdout)
        assert found["running"] and found["sessions"] == 1 and found["version"] == xmppd.__version__
        assert machine.run(*common, "check").returncode == 0
        romeo.closes()
    finally:
        people.cast.hang_up()
        people.stop()  # SIGTERM, and the exit status must be 0
    assert machine.run(*common, "status").returncode == 1


def test_packages_are_unpacked_once_and_for_us_alone(machine):
    machine.starts().stop()
    [unpacked] = machine.unpacked()
    folder = unpacked.parent
    assert folder.parent == machine.home / ".cache" / "xmppd" or sys.platform != "linux"
    if os.name == "posix":
        assert (folder.stat().st_mode & 0o777, folder.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary folder is left
    before = folder.stat().st_ino, (unpacked / "__init__.py").stat().st_mtime_ns
    shutil.rmtree(machine.home / "data")  # so that certificates are made again
    machine.starts().stop()
    assert (folder.stat().st_ino, (unpacked / "__init__.py").stat().st_mtime_ns) == before


def test_only_who_makes_certificates_unpacks(machine):
    for words in (["--version"], ["init"], ["user", "list"], ["check"], ["status"]):
        machine.run("--config", machine.home / "none.toml" if "init" in words else machine.config, *words)
    assert machine.unpacked() == []


def test_what_a_power_cut_left_of_the_unpacked_is_mended(machine):
    machine.starts().stop()
    [unpacked] = machine.unpacked()
    (unpacked / "__init__.py").write_bytes(b"")
    (unpacked / "utils.py").unlink()
    shutil.rmtree(machine.home / "data")
    machine.starts().stop()
    assert (unpacked / "__init__.py").stat().st_size and (unpacked / "utils.py").exists()


def test_the_machines_own_cryptography_is_preferred(machine, monkeypatch):
    (machine.home / "cryptography").mkdir()
    (machine.home / "cryptography" / "__init__.py").write_text("raise ImportError('the own one')")
    monkeypatch.setenv("PYTHONPATH", str(machine.home))
    assert "ImportError: the own one" in machine.refuses_to_start()
    assert machine.unpacked() == [machine.home / "cryptography"]


def test_where_nothing_can_be_unpacked_one_line_says_so(machine):
    (machine.home / ".cache").write_text("a file")
    assert machine.refuses_to_start() == (
        f"cannot make certificates: cannot unpack `cryptography` to {unpacking_to(machine)}: Not a directory; "
        "install the package `cryptography`, or set [tls] certificate and key"
    )


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_code_is_not_run_from_where_others_write(machine):
    cache = machine.home / ".cache" / "xmppd"
    cache.mkdir(parents=True)
    cache.chmod(0o770)
    assert f"{cache}: not a folder that only this user writes to; install" in machine.refuses_to_start()
    cache.rmdir()
    elsewhere = machine.home / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    cache.symlink_to(elsewhere)
    assert f"{cache}: not a folder that only this user writes to; install" in machine.refuses_to_start()
    assert list(elsewhere.iterdir()) == []


def unpacking_to(machine: Machine) -> Path:
    """Return the folder that packages would be unpacked to."""
    with zipfile.ZipFile(machine.archive) as whole:
        packed = whole.read(xmppd.packed_name())
    return machine.home / ".cache" / "xmppd" / xmppd.hashlib.sha256(packed).hexdigest()[:32]


def elsewhere(name: str, content: bytes) -> tuple[str, bytes]:
    """Pack for a machine of another kind."""
    return name.replace(xmppd.platform_tag(), "plan9-mips.cpython-399"), content


def without_compiled(name: str, content: bytes) -> tuple[str, bytes] | None:
    """Leave out what is compiled."""
    return None if name.startswith("packed/") else (name, content)


@pytest.mark.parametrize("change", [elsewhere, without_compiled])
def test_for_another_platform_one_line_says_what_is_missing(machine, change):
    machine.archive = changed(machine.archive, machine.home / "other.pyz", change)
    why = f"{machine.archive} brings no `cryptography` for {xmppd.platform_tag()}"
    assert machine.refuses_to_start() == (
        f"cannot make certificates: {why}; install the package `cryptography`, or set [tls] certificate and key"
    )
    done = machine.run("--config", machine.config, "check")
    assert done.returncode == 1
    remedy = "python3 -m pip install cryptography, or set [tls] certificate and key"
    assert f"\nproblem: certificate: {why}; remedy: {remedy}\n" in done.stdout
    assert done.stdout.startswith("ok: Python ")
    assert "packages: defusedxml, platformdirs, tomli-w\n" in done.stdout


def test_with_certificates_of_the_owner_another_platform_will_do(machine, tmp_path):
    files = xmppd.ensure_certificates(tmp_path / "made", ["example.org"])
    tls = f'[tls]\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
    machine.config.write_text(CONFIGURATION + tls)
    machine.archive = changed(machine.archive, machine.home / "other.pyz", elsewhere)
    done = machine.run("--config", machine.config, "check")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all is well")
    machine.starts().stop()


def zip_with(name: str) -> bytes:
    """Return a ZIP file with one file of this name, written as it stands."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as files:
        info = zipfile.ZipInfo("x")
        info.filename = name  # which would have changed it
        files.writestr(info, "whole = True\n")
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="the cache folder is named by XDG_CACHE_HOME on Linux only")
@pytest.mark.parametrize(
    "name", ["../evil.py", "/evil.py", "x/../../evil.py", "x/..", "a\\..\\evil.py", "C:/evil.py", ".evil.py", "x//evil.py", "e\nvil.py"]
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as caught:
        xmppd.unpacked(zip_with(name))
    assert str(caught.value) == f"the packed `cryptography` is damaged (the name {name!r})"
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "xmppd"]
    folder = xmppd.unpacked(zip_with("x/good.py"))
    assert (folder / "x" / "good.py").read_text() == "whole = True\n"


def test_a_damaged_package_is_one_line(machine):
    def cut(name: str, content: bytes) -> tuple[str, bytes]:
        return name, content[: len(content) // 2] if name.startswith("packed/") else content

    machine.archive = changed(machine.archive, machine.home / "cut.pyz", cut)
    assert "the packed `cryptography` is damaged (File is not a zip file); install" in machine.refuses_to_start()


# -- bytecode and source


def test_all_runs_from_bytecode(machine):
    told = machine.python_says(f"for name in {PACKAGES}: print(__import__(name).__file__)")
    assert len(told.splitlines()) == len(PACKAGES)
    assert all(line.endswith(".pyc") for line in told.splitlines())


def test_another_version_of_python_runs_the_source(machine):
    """Each version has a magic number of its own at the head of bytecode."""

    def other(name: str, content: bytes) -> tuple[str, bytes]:
        return name, b"\x00\x00\r\n" + content[4:] if name.endswith(".pyc") else content

    own = machine.run("--version").stdout
    machine.archive = changed(machine.archive, machine.home / "other.pyz", other)
    told = machine.python_says(f"for name in {PACKAGES}: print(__import__(name).__file__)")
    assert all(line.endswith(".py") for line in told.splitlines())
    assert machine.run("--version").stdout == own


def test_a_python_that_is_too_old_is_one_line(machine):
    program = "sys.version_info = (3, 10, 1); sys.version = '3.10.1 (main)'\nimport runpy; runpy.run_path(sys.argv[1])"
    done = run(machine.python, "-c", f"import sys\n{program}", machine.archive)
    assert (done.returncode, done.stderr) == (1, "xmppd: needs Python 3.11 or newer; this is 3.10.1\n")


def test_the_source_is_there_to_be_read(machine):
    told = machine.python_says("import inspect, xmppd\nprint(inspect.getsource(xmppd), end='')")
    assert told == SOURCE.read_text()


def test_a_traceback_quotes_the_source(machine):
    program = """
import traceback, xmppd
try:
    xmppd.parse_stamp("yesterday")
except ValueError as error:
    print(traceback.format_exc())
    print(xmppd.on_one_line(error))
"""
    told = machine.python_says(program)
    assert "/xmppd.py" in told and "    moment = datetime.fromisoformat(" in told
    assert "(xmppd.py:" in told


# -- packing


@pytest.fixture
def packing(tmp_path: Path) -> Callable[..., Path]:
    """Pack in this process."""

    def pack(*words: str) -> Path:
        assert xmppd.main(["pack", str(tmp_path / "xmppd.pyz"), *words]) == 0
        return tmp_path / "xmppd.pyz"

    return pack


def test_the_same_makes_the_same(archive, tmp_path):
    """Neither the time, nor the folder, nor what else the process has done, is in the archive."""
    program = "import http.client, sqlite3, sys, xmppd; sys.exit(xmppd.main())"
    environment = os.environ | {"PYTHONHASHSEED": "1", "TZ": "XYZ-7", "PYTHONPATH": str(SOURCE.parent)}
    target = tmp_path / "another name.pyz"
    done = run(sys.executable, "-c", program, "pack", target, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes() == archive.read_bytes()


def test_it_packs_itself(machine):
    done = machine.run("pack")
    assert (done.returncode, done.stderr) == (0, "")
    assert (machine.home / "xmppd.pyz").read_bytes() == machine.archive.read_bytes()


def test_a_zipapp_cannot_pack_what_it_does_not_have(machine):
    machine.archive = changed(machine.archive, machine.home / "other.pyz", elsewhere)
    done = machine.run("pack", "new.pyz")
    assert (done.returncode, done.stdout) == (1, "")
    why = f"{machine.archive} brings no `cryptography` for {xmppd.platform_tag()}"
    assert done.stderr == f"xmppd: {why}; install it, or pack without: --pure\n"
    assert machine.run("pack", "new.pyz", "--pure").returncode == 0


def test_pure_has_nothing_compiled(packing, capsys):
    with zipfile.ZipFile(packing("--pure")) as whole:
        names = whole.namelist()
    assert " MB, without `cryptography`\n" in capsys.readouterr().out
    assert "xmppd.pyc" in names and "tomli_w/_writer.pyc" in names
    assert not [name for name in names if name.startswith(("packed", "cryptography")) or name.endswith(".so")]


def test_licences_travel_along(archive):
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(io.BytesIO(whole.read(xmppd.packed_name()))) as compiled:
        names = [name for name in (*whole.namelist(), *compiled.namelist()) if "LICENSE" in name]
    for package in ("defusedxml", "platformdirs", "tomli_w", "cryptography", "cffi"):
        assert any(name.startswith(f"{package}-") for name in names), package


def test_extras_are_taken_along_if_they_are_pure(packing, tmp_path, monkeypatch):
    for name, files in {"pure_extra": ["inner/deep.py"], "mixed_extra": ["inner/fast.so"]}.items():
        for file in ("__init__.py", *files):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    extras: Mapping[str, str] = {name: name for name in ("pure_extra", "mixed_extra", "absent_extra")}
    monkeypatch.setattr(xmppd, "EXTRAS", extras)
    with zipfile.ZipFile(packing("--pure")) as whole:
        names = [name for name in whole.namelist() if "extra" in name]
    assert names == [f"pure_extra/{name}" for name in ("__init__.py", "__init__.pyc", "inner/deep.py", "inner/deep.pyc")]


def test_the_file_is_replaced_as_a_whole(packing, tmp_path):
    target = tmp_path / "xmppd.pyz"
    target.write_text("the one before")
    with target.open() as reader:
        packing("--pure")
        assert reader.read() == "the one before"
    assert zipfile.is_zipfile(target)
    assert target.stat().st_mode & 0o100
    assert [path.name for path in tmp_path.iterdir()] == ["xmppd.pyz"]


@pytest.mark.parametrize(("name", "why"), [("file/x.pyz", "Not a directory"), ("none/x.pyz", "No such file or directory"), ("", "Is a directory")])
def test_where_nothing_can_be_written_one_line_says_so(tmp_path, name, why, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("")
    target = folder / name
    assert xmppd.main(["pack", "--pure", str(target)]) == 1
    assert capsys.readouterr().err == f"xmppd: {target}: cannot be written: {why}; name another place\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


def test_a_python_that_cannot_compile_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"cannot compile the program: .*nothing"):
        xmppd.add_bytecode(tmp_path)


def test_two_who_unpack_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """The slower one finds the folder in its place."""
    folder = tmp_path / "folder"

    def faster(source: object, target: Path) -> None:
        (target / "cryptography").mkdir(parents=True)
        (target / "cryptography" / "__init__.py").write_text("whole = True\n")
        raise OSError("Directory not empty")

    monkeypatch.setattr(os, "rename", faster)
    with zipfile.ZipFile(io.BytesIO(zip_with("cryptography/__init__.py"))) as files:
        xmppd.unpack(files, folder)
        assert xmppd.is_unpacked(files, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
