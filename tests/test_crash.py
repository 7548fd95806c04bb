"""Nothing that was acknowledged is lost: by kill -9, a full, failing or slow disk, damaged files, a wrong clock.

The rounds of `tests.crash` in small (200 of them by hand: `python -m tests.crash --rounds 200`),
and one case each for what they do not meet. All of it with a real process, over TCP and TLS;
what is wrong with its disk or its clock is arranged by `tests/tampered.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import xmppd
from tests.crash import VALUES, Trial, half_turns, program, read_folder
from tests.dialogue import PATIENCE, Client
from tests.servers import PEOPLE, ProcessServer, credentials_of

DAY = 86400  # seconds


# ---- kill -9 --------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_twenty_kills_at_random_moments_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    trial = Trial(tmp_path, seed=random.SystemRandom().randrange(10**6)).run(20)
    print(trial.report())
    assert trial.is_passed, trial.report()
    kinds = {"account", "message", "password", "private", "roster", "subscription"}
    assert trial.ledger.acknowledged.keys() == kinds and trial.ledger.checked > 500, trial.report()


@pytest.mark.timeout(120)
def test_a_server_that_answers_before_the_disk_is_caught_by_these_rounds(tmp_path: Path) -> None:
    """Proves the rounds: with `sync = false` a power cut may cost what was acknowledged, and they must see that."""
    trial = Trial(tmp_path, seed=1, values={**VALUES, "storage": {"sync": False}})
    with contextlib.suppress(AssertionError):  # what was lost may be what it needs to go on
        trial.run(4, ["power cut"])
    assert trial.ledger.lost


# ---- the cases ------------------------------------------------------------------------


class House:
    """A server process that is tampered with, and its people."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.switch = folder / "switch"  # the file that the words name
        self.server = ProcessServer(folder, {})

    def start(self, *words: str) -> None:
        """Start with these words; `=SWITCH` is replaced."""
        self.server.program = program(*(word.replace("SWITCH", str(self.switch)) for word in words))
        self.server.start()

    def make_accounts(self) -> None:
        """Give the people their accounts."""
        for name in PEOPLE:
            with xmppd.ControlClient(self.server.data) as control:
                control.request("user add", {"jid": f"{name}@example.org", "credentials": credentials_of(name)})

    def kill(self) -> None:
        """Kill -9, and look at what that leaves."""
        self.server.check_log()
        self.server.kill()
        self.server.cast.hang_up()
        folder = read_folder(self.server.data)
        assert not [*folder.problems, *half_turns(folder)]

    def adds_no_account(self, jid: str) -> None:
        """Check that `user add` says that it has failed; the server may run or not."""
        command = [sys.executable, *self.server.program, "--config", str(self.server.config), "--data", str(self.server.data)]
        command += ["user", "add", jid, "--password-stdin"]
        done = subprocess.run(command, input="secret words\n", capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1 and not done.stdout, (done.stdout, done.stderr)
        assert re.fullmatch("xmppd: (not saved|refused|.* cannot be read and written): .*\n", done.stderr), done.stderr

    def login(self, name: str) -> Client:
        """Log somebody in, at a place of their own."""
        return self.server.client().login(name, resource="here")

    def says(self, word: str) -> str:
        """Wait until the log says something; returns the line."""
        return self.server.process.wait_for(word)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.switch.unlink(missing_ok=True)
    house.server.cast.hang_up()
    house.server.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what shows in files or in the log only, without a word to the server."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        threading.Event().wait(0.01)


def keeps(client: Client, value: str) -> None:
    """Store something in the private XML: that it is answered is the promise."""
    client.sends(f"<iq type='set' id='s'><query xmlns='jabber:iq:private'><kept xmlns='urn:k'>{value}</kept></query></iq>")
    client.receives("<iq type='result' id='s'/>")


def is_refused(client: Client) -> None:
    """Check that nothing can be stored."""
    client.sends("<iq type='set' id='s'><query xmlns='jabber:iq:private'><kept xmlns='urn:k'>no</kept></query></iq>")
    client.receives(
        "<iq type='error' id='s'><error type='wait'><resource-constraint .../></error></iq>"
    )


def has_kept(client: Client, value: str) -> None:
    """Check what is stored in the private XML."""
    client.sends("<iq type='get' id='g'><query xmlns='jabber:iq:private'><kept xmlns='urn:k'/></query></iq>")
    client.receives(
        f"<iq type='result' id='g'><query xmlns='jabber:iq:private'><kept xmlns='urn:k'>{value}</kept></query></iq>"
    )


# ---- what the rounds would find rarely -------------------------------------------------


def test_what_was_delivered_leaves_the_log_though_nothing_else_happens(house: House) -> None:
    """Or a crash, hours later, would have it delivered again."""
    house.start()
    house.make_accounts()
    romeo = house.login("romeo")
    romeo.sends("<message to='nurse@example.org' type='chat'><body>once</body></message>")
    romeo.receives_nothing()
    romeo.closes()
    nurse = house.login("nurse")
    nurse.sends("<presence/>")
    nurse.receives("<presence from='nurse@example.org/here'/>")
    nurse.receives("<message from='romeo@example.org/here' to='nurse@example.org' type='chat'><body>once</body><delay .../></message>")
    is_dropped = b'["drop","offline","nurse@example.org"'
    wait_until(lambda: any(is_dropped in path.read_bytes() for path in house.server.data.glob("journal-*")))


class NotingDisk(xmppd.Disk):
    """Notes the files that were synced, by their number in the file system."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[int] = []

    def fsync(self, file: int) -> None:
        self.synced.append(os.fstat(file).st_ino)
        super().fsync(file)


def test_what_is_read_back_is_made_durable_before_anything_builds_on_it(tmp_path: Path) -> None:
    """A killed process leaves lines in the system's cache; were they told, and then lost in a power cut,
    the next journal would begin behind a gap, and all of it would be lost too."""
    change = xmppd.encode_json(["set", "private", "romeo@example.org", {"a": "b"}])
    journal = xmppd.journal_path(tmp_path, 1)
    journal.write_bytes(xmppd.journal_line(1, ()) + xmppd.journal_line(2, [change]))
    disk, loop = NotingDisk(), xmppd.Loop()
    storage = xmppd.Storage(tmp_path, loop, disk=disk)
    try:
        fresh = xmppd.journal_path(tmp_path, 2).stat().st_ino
        assert disk.synced.index(journal.stat().st_ino) < disk.synced.index(fresh)
    finally:
        storage.close()
        loop.close()


class Gate:
    """Holds fsyncs: `arrives` returns when one has come and is held, `passes` lets that one go on, `opens` all."""

    def __init__(self, switch: Path) -> None:
        self.switch = switch
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)
        self.held: list[socket.socket] = []
        switch.write_text(str(self.listener.getsockname()[1]))

    def arrives(self) -> None:
        self.held.append(self.listener.accept()[0])

    def passes(self) -> None:
        self.held.pop().close()

    def is_empty(self) -> bool:
        """Whether no fsync has come that nobody has noticed."""
        self.listener.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            self.arrives()
        self.listener.settimeout(PATIENCE)
        return not self.held

    def opens(self) -> None:
        self.switch.unlink(missing_ok=True)
        self.listener.close()
        for connection in self.held:
            connection.close()


@pytest.mark.parametrize(
    ("before", "who", "type"),
    [
        ("", "romeo", "subscribe"),
        ("subscribe", "juliet", "subscribed"),
        ("subscribe", "juliet", "unsubscribed"),
        ("subscribe", "romeo", "unsubscribe"),
        ("subscribe subscribed", "juliet", "unsubscribed"),
        ("subscribe subscribed", "romeo", "unsubscribe"),
    ],
)
def test_nobody_hears_of_a_change_that_a_power_cut_may_undo(house: House, before: str, who: str, type: str) -> None:
    """Whatever the order in which a handler speaks and changes something; DESIGN §5, output commit."""
    house.start("powercut", "gate=SWITCH")
    house.make_accounts()
    people = {"romeo": house.login("romeo"), "juliet": house.login("juliet")}
    for client in people.values():
        client.comes_online()
    for step in before.split():
        one, other = ("romeo", "juliet") if step == "subscribe" else ("juliet", "romeo")
        people[one].sends(f"<presence type='{step}' to='{other}@example.org'/>")
        people[one].receives_anything()
        people[other].receives_anything()
    gate, other = Gate(house.switch), "juliet" if who == "romeo" else "romeo"
    try:
        people[who].sends(f"<presence type='{type}' to='{other}@example.org'/>")
        gate.arrives()
        house.server.kill()
    finally:
        gate.opens()
    assert people[who].is_closed() and people[other].is_closed()
    house.start()


def test_nothing_of_a_removed_account_stays_in_a_file_that_a_crash_left_unfinished(tmp_path: Path) -> None:
    """The crash came while the file was written, the removal after that but before the next checkpoint."""
    unfinished = tmp_path / "example.org" / "private" / "romeo.json.new"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text('{"{urn:k}kept":"<kept xmlns=')
    removal = xmppd.encode_json(["set", "private", "romeo@example.org", None])
    xmppd.journal_path(tmp_path, 1).write_bytes(xmppd.journal_line(1, [removal]))
    loop = xmppd.Loop()
    xmppd.Storage(tmp_path, loop).close()
    loop.close()
    assert not unfinished.exists()


# ---- no room --------------------------------------------------------------------------


class InjectedFullDisk:
    """A disk that says it is full while a file is there."""

    words = ("full=SWITCH", "look=0.1")

    def __init__(self, house: House) -> None:
        self.switch = house.switch

    def fill(self) -> None:
        self.switch.touch()

    def make_room(self) -> None:
        self.switch.unlink()

    def remove(self) -> None:
        """Nothing to undo."""


class SmallFileSystem:
    """Eight megabytes of memory as the file system of the data folder."""

    words = ("look=0.1",)

    def __init__(self, house: House) -> None:
        self.data = house.server.data
        self.data.mkdir(mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(self.data)]
        if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small file system, on Linux; the injected full disk is tested instead")

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.data / "tls" / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1000))

    def make_room(self) -> None:
        (self.data / "tls" / "filler").unlink()

    def remove(self) -> None:
        subprocess.run(["umount", str(self.data)], check=True)


@pytest.fixture(params=[InjectedFullDisk, SmallFileSystem], ids=["injected", "tmpfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[House, Any]]:
    house = House(tmp_path)
    disk = request.param(house)
    try:
        house.start(*disk.words)
        house.make_accounts()
        yield house, disk
    finally:
        house.server.cast.hang_up()
        try:
            house.server.stop()
        finally:
            disk.remove()


def fills_up(disk: Any, client: Client) -> str:
    """Fill the disk and store until nothing more can be stored; returns what was acknowledged last."""
    disk.fill()
    kept = ""
    for number in range(5000):
        value = f"{number} " + "x" * 5000
        query = f"<query xmlns='jabber:iq:private'><kept xmlns='urn:k'>{value}</kept></query>"
        client.sends_raw(f"<iq type='set' id='n{number}'>{query}</iq>")
        answer = client.receives("<iq id='*' type='*' ...>...</iq>")
        if answer.get("type") == "error":
            return kept
        kept = value
    raise AssertionError("the disk never filled up")


def test_a_full_disk_refuses_changes_and_goes_on_with_everything_else(small_disk: tuple[House, Any]) -> None:
    house, disk = small_disk
    romeo, juliet = house.login("romeo"), house.login("juliet")
    romeo.befriends(juliet)
    romeo.comes_online()
    juliet.comes_online()
    romeo.receives_anything()
    juliet.receives_anything()
    kept = fills_up(disk, romeo)
    is_refused(romeo)
    has_kept(romeo, kept)
    romeo.sends("<message to='juliet@example.org' type='chat'><body>live</body></message>")
    juliet.receives("<message from='romeo@example.org/here' to='juliet@example.org' type='chat'><body>live</body></message>")
    romeo.sends("<message to='nurse@example.org' type='chat' id='m'><body>for later</body></message>")
    romeo.receives("<message type='error' id='m'><error type='wait'><resource-constraint .../></error></message>")
    assert "changes are refused until there is" in house.says("no space left on the disk")


def test_sessions_begin_and_end_on_a_full_disk_as_ever(small_disk: tuple[House, Any]) -> None:
    house, disk = small_disk
    romeo, juliet = house.login("romeo"), house.login("juliet")
    romeo.befriends(juliet)
    romeo.comes_online()
    juliet.comes_online()
    romeo.receives_anything()
    fills_up(disk, romeo)
    juliet.disconnects()
    romeo.receives("<presence type='unavailable' from='juliet@example.org/here'/>")
    again = house.login("juliet")
    again.comes_online()
    again.receives("<presence from='romeo@example.org/here'/>")
    romeo.receives("<presence from='juliet@example.org/here'/>")
    again.sends("<presence type='unavailable'/>")
    romeo.receives("<presence type='unavailable' from='juliet@example.org/here'/>")
    again.receives("<presence type='unavailable' from='juliet@example.org/here'/>")
    house.server.check_log()


def test_messages_that_wait_are_delivered_on_a_full_disk_and_stay_until_there_is_room(small_disk: tuple[House, Any]) -> None:
    house, disk = small_disk
    romeo = house.login("romeo")
    romeo.sends("<message to='nurse@example.org' type='chat'><body>waits</body></message>")
    romeo.receives_nothing()
    fills_up(disk, romeo)
    nurse = house.login("nurse")
    nurse.comes_online()
    nurse.receives("<message from='romeo@example.org/here' type='chat' ...><body>waits</body><delay .../></message>")
    nurse.receives_nothing()
    house.server.check_log()


def test_a_full_disk_loses_nothing_and_recovers_when_there_is_room(small_disk: tuple[House, Any]) -> None:
    house, disk = small_disk
    romeo = house.login("romeo")
    kept = fills_up(disk, romeo)
    disk.make_room()
    house.says("there is room on the disk again")
    has_kept(romeo, kept)
    keeps(romeo, "after")
    kept = fills_up(disk, romeo)
    house.kill()
    disk.make_room()
    house.start(*disk.words)
    romeo = house.login("romeo")
    has_kept(romeo, kept)
    keeps(romeo, "again")


# ---- a disk that fails ----------------------------------------------------------------


def test_after_a_failed_fsync_changes_are_refused_and_reads_go_on(house: House) -> None:
    """Who waits for what the disk did not take gets no answer, for none would be true, but an end."""
    house.start("broken=SWITCH")
    house.make_accounts()
    romeo, juliet = house.login("romeo"), house.login("juliet")
    keeps(romeo, "before")
    house.switch.touch()
    romeo.sends_raw("<iq type='set' id='x'><query xmlns='jabber:iq:private'><kept xmlns='urn:k'>lost</kept></query></iq>")
    assert romeo.is_closed()
    assert "fsync failed" in house.says("changes are refused")
    juliet.receives_nothing()
    is_refused(juliet)
    nurse = house.login("nurse")
    nurse.sends("<message to='juliet@example.org/here' type='chat'><body>live</body></message>")
    juliet.receives("<message from='nurse@example.org/here' to='juliet@example.org/here' type='chat'><body>live</body></message>")
    house.switch.unlink()  # the next fsync would succeed, and mean nothing
    is_refused(juliet)
    assert house.server.process.log().count("fsync failed") == 1
    house.kill()
    house.start()
    romeo = house.login("romeo")
    keeps(romeo, "after")


def test_an_account_that_the_disk_did_not_take_is_not_said_to_be_added(house: House) -> None:
    """On the command line too, whether the server runs or not."""
    house.start("broken=SWITCH")
    house.switch.touch()
    house.adds_no_account("romeo@example.org")
    house.kill()
    house.adds_no_account("juliet@example.org")
    house.switch.unlink()
    house.start()
    with xmppd.ControlClient(house.server.data) as control:
        assert "juliet@example.org" not in control.request("user list", {})["users"]


# ---- a disk that is slow --------------------------------------------------------------


@dataclass
class SlowHouse:
    """Romeo has changed something, whose fsync takes as long as the test likes; juliet and nurse are online."""

    house: House
    gate: Gate
    romeo: Client
    juliet: Client
    nurse: Client


@pytest.fixture
def slow(house: House) -> Iterator[SlowHouse]:
    house.start("gate=SWITCH")
    house.make_accounts()
    romeo, juliet, nurse = house.login("romeo"), house.login("juliet"), house.login("nurse")
    juliet.befriends(nurse)
    juliet.comes_online()
    nurse.comes_online()
    juliet.receives_anything()
    nurse.receives_anything()
    gate = Gate(house.switch)
    try:
        romeo.sends("<iq type='set' id='s'><query xmlns='jabber:iq:private'><kept xmlns='urn:k'>slow</kept></query></iq>")
        gate.arrives()
        yield SlowHouse(house, gate, romeo, juliet, nurse)
    finally:
        gate.opens()


PINGS = [f"<iq type='get' id='p{number}' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>" for number in range(200)]
PONGS = [f"<iq type='result' id='p{number}'/>" for number in range(200)]
AWAY = "<presence from='juliet@example.org/here'><show>away</show></presence>"


def test_a_slow_fsync_holds_up_the_output_once_and_the_server_never(slow: SlowHouse) -> None:
    """DESIGN §5: nothing overtakes its record. All that is said meanwhile waits for this fsync, and for no other."""
    slow.juliet.sends("".join(PINGS) + "<presence><show>away</show></presence>")
    off_the_record = "<body>O</body><no-permanent-store xmlns='urn:xmpp:hints'/>"
    slow.juliet.sends(f"<message to='nurse@example.org/here' type='chat'>{off_the_record}</message>")
    newcomer = slow.house.server.client(direct_tls=True).connect()  # a handshake: so the server goes on
    slow.gate.passes()
    slow.romeo.receives("<iq type='result' id='s'/>")
    slow.juliet.receives(*PONGS, AWAY)
    slow.nurse.receives(AWAY)
    message = f"<message from='juliet@example.org/here' to='nurse@example.org/here' type='chat'>{off_the_record}</message>"
    slow.nurse.receives(message)
    newcomer.negotiates()
    assert slow.gate.is_empty()


# ---- damaged files --------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "binary": lambda data: bytes(range(256)) * 4,
    "a list": lambda data: b"[1, 2]\n",
    "a string": lambda data: b'"roster"\n',
    "a number": lambda data: b"17\n",
    "null": lambda data: b"null\n",
}
GOOD: dict[str, Any] = {
    "accounts": {"created": "2026-11-22T14:00:00Z", "credentials": credentials_of("romeo")},
    "roster": {"juliet@example.org": {"subscription": "none", "ver": 1}},
    "private": {"{urn:k}kept": "<kept xmlns='urn:k'>treasure</kept>"},
}


@dataclass
class Victim:
    """Somebody, one of whose files is damaged; the name is theirs alone."""

    name: str
    path: Path
    bad: bytes

    def login(self, house: House) -> Client:
        """Log in with the password that all victims have."""
        return house.server.client().login(self.name, password="romeo-secret", resource="here")

    def was_set_aside(self, house: House) -> None:
        """Check that the file was kept under another name, and that the log says so."""
        [aside] = self.path.parent.glob(f"{self.path.name}.broken-*")
        assert aside.read_bytes() == self.bad
        wait_until(lambda: any(str(self.path) in line for line in house.server.process.lines))
        [line] = [line for line in house.server.process.lines if str(self.path) in line]
        assert "is damaged" in line and aside.name in line


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, dict[tuple[str, str], Victim]]]:
    """A running server for all of these tests, and by kind of document and of damage whom it met."""
    house = House(tmp_path_factory.mktemp("damaged"))
    victims = {}
    for number, (kind, damage) in enumerate(itertools.product(GOOD, DAMAGES)):
        for folder, document in GOOD.items():
            path = house.server.data / "example.org" / folder / f"victim{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document))
            if folder == kind:
                path.write_bytes(DAMAGES[damage](path.read_bytes()))
                victims[kind, damage] = Victim(f"victim{number}", path, path.read_bytes())
    house.server.data.chmod(0o700)
    house.start()
    yield house, victims
    house.server.cast.hang_up()
    house.server.stop()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["roster", "private"])
def test_a_damaged_document_is_set_aside_and_the_server_goes_on(
    damaged: tuple[House, dict[tuple[str, str], Victim]], kind: str, damage: str
) -> None:
    """S61"""
    house, victim = damaged[0], damaged[1][kind, damage]
    client = victim.login(house)
    item = "" if kind == "roster" else "<item jid='juliet@example.org' subscription='none'/>"
    client.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
    client.receives(f"<iq type='result' id='r'><query xmlns='jabber:iq:roster' ver='*'>{item}</query></iq>")
    has_kept(client, "" if kind == "private" else "treasure")
    victim.was_set_aside(house)
    keeps(client, "new treasure")
    adds_contact(client, "nurse@example.org")
    client.disconnects()
    house.server.check_log()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_account_is_set_aside_and_looks_like_none(
    damaged: tuple[House, dict[tuple[str, str], Victim]], damage: str
) -> None:
    house, victim = damaged[0], damaged[1]["accounts", damage]
    client = house.server.client(direct_tls=True).connect()
    client.negotiates()
    client.sends_auth("PLAIN", f"\0{victim.name}\0romeo-secret".encode())
    client.receives_failure("not-authorized")
    client.disconnects()
    victim.was_set_aside(house)
    house.server.check_log()


def test_a_document_damaged_by_the_crash_costs_nothing_that_the_journal_has(house: House) -> None:
    house.start()
    for number in range(len(DAMAGES)):
        with xmppd.ControlClient(house.server.data) as control:
            control.request("user add", {"jid": f"victim{number}@example.org", "credentials": credentials_of("romeo")})
    victims = []
    for number, damage in enumerate(DAMAGES.values()):
        path = house.server.data / "example.org" / "roster" / f"victim{number}.json"
        victims.append(Victim(f"victim{number}", path, damage(json.dumps(GOOD["roster"]).encode())))
        adds_contact(victims[-1].login(house), "nurse@example.org")
    house.kill()
    for victim in victims:
        victim.path.parent.mkdir(parents=True, exist_ok=True)
        victim.path.write_bytes(victim.bad)
    house.start()
    for victim in victims:
        client = victim.login(house)
        client.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
        client.receives(
            "<iq type='result' id='r'><query xmlns='jabber:iq:roster' ver='*'>"
            "<item jid='nurse@example.org' subscription='none'/></query></iq>"
        )
        victim.was_set_aside(house)


# ---- two servers ----------------------------------------------------------------------


def test_a_second_server_in_the_same_folder_says_so_in_one_line_and_ends(house: House) -> None:
    house.start()
    command = [sys.executable, str(xmppd.__file__), "--config", str(house.server.config), "--data", str(house.server.data)]
    done = subprocess.run([*command, "run"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1 and not done.stdout
    [line] = done.stderr.splitlines()
    assert re.search(r"in use by another xmppd: stop it, or give this one its own folder$", line)
    house.make_accounts()
    keeps(house.login("romeo"), "all is well with the first")


# ---- a wrong clock --------------------------------------------------------------------


def sets_clock(house: House, seconds: int) -> None:
    """Let the server's clock be wrong by so much from now on."""
    fresh = house.switch.with_suffix(".new")
    fresh.write_text(str(seconds))
    fresh.replace(house.switch)


def adds_contact(client: Client, jid: str) -> int:
    """Add a contact; returns the roster's version by the push, for which one asks for the roster first."""
    client.sends("<iq type='get' id='i'><query xmlns='jabber:iq:roster'/></iq>")
    client.receives("<iq type='result' id='i'><query xmlns='jabber:iq:roster' ver='*'>...</query></iq>")
    client.sends(f"<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='{jid}'/></query></iq>")
    push = client.receives(f"<iq type='set' id='*'><query xmlns='jabber:iq:roster' ver='*'><item jid='{jid}' subscription='none'/></query></iq>")
    client.receives("<iq type='result' id='r'/>")
    return int(push[0].attrib["ver"])


def roster_version(client: Client) -> int:
    """Ask for the roster; returns its version."""
    client.sends("<iq type='get' id='v'><query xmlns='jabber:iq:roster'/></iq>")
    return int(client.receives("<iq type='result' id='v'><query xmlns='jabber:iq:roster' ver='*'>...</query></iq>")[0].attrib["ver"])


def test_the_clock_jumps_a_day_both_ways(house: House) -> None:
    house.start("clock=SWITCH")
    house.make_accounts()
    romeo = house.login("romeo")
    versions: list[int] = []
    for number, jump in enumerate((0, DAY, 0, -DAY, -DAY, DAY)):
        sets_clock(house, jump)
        versions.append(adds_contact(romeo, f"contact{number}@elsewhere.example"))
        romeo.receives_nothing()  # no timer has ended the session
    assert versions == sorted(set(versions))
    sets_clock(house, -DAY)
    house.kill()
    house.start("clock=SWITCH")
    romeo = house.login("romeo")
    assert roster_version(romeo) == versions[-1]
    assert adds_contact(romeo, "last@elsewhere.example") > versions[-1]


@pytest.mark.parametrize("later", [-DAY, DAY], ids=["back", "forth"])
def test_messages_and_absences_survive_a_jump_of_the_clock(house: House, later: int) -> None:
    house.start("clock=SWITCH")
    house.make_accounts()
    romeo, juliet = house.login("romeo"), house.login("juliet")
    romeo.befriends(juliet)
    juliet.comes_online()
    juliet.closes()
    romeo.receives_anything()
    romeo.sends("<message to='juliet@example.org' type='chat'><body>1</body></message>")
    romeo.receives_nothing()
    sets_clock(house, later)
    romeo.sends("<message to='juliet@example.org' type='chat'><body>2</body></message>")
    romeo.sends("<iq type='get' id='l' to='juliet@example.org'><query xmlns='jabber:iq:last'/></iq>")
    last = romeo.receives("<iq type='result' id='l'><query xmlns='jabber:iq:last' seconds='*'/></iq>")
    away = int(last[0].attrib["seconds"])
    assert away == 0 if later < 0 else DAY <= away < DAY + 60
    house.kill()
    house.start("clock=SWITCH")
    juliet = house.login("juliet")
    juliet.sends("<presence/>")
    messages = [stanza for stanza in juliet.receives_anything() if stanza.tag.endswith("message")]
    assert [message.findtext("{jabber:client}body") for message in messages] == ["1", "2"]
    stamps = [datetime.fromisoformat(message.find("{urn:xmpp:delay}delay").attrib["stamp"]) for message in messages]  # type: ignore[union-attr]
    now = datetime.now(UTC)
    for stamp, expected in zip(stamps, (now, now + timedelta(seconds=later)), strict=True):
        assert abs(stamp - expected) < timedelta(seconds=60)
