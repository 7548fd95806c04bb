"""Storage: what was acknowledged is there after any crash, and nobody else's file is touched.

A *crash* is played in two ways: by a copy of the data folder made in the middle of a step of
the disk thread, and by a disk thread that is stopped without a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
import queue
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xmppd
from xmppd import JID, ConfigError, Disk, StanzaError, Storage

ALICE = JID("alice", "example.org", "")
BOB = JID("bob", "example.org", "")
EXAMPLE = JID("", "example.org", "")
PATIENCE = 20  # seconds; only a failing test waits that long


class Turns:
    """A loop without sockets and clocks: turns happen when a test asks for them."""

    def __init__(self) -> None:
        self.at_turn_end: list[Callable[[], None]] = []
        self.timers: list[Callable[[], None]] = []
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def post(self, callback: Callable[[], None]) -> None:
        self._posted.put(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        assert seconds > 0
        self.timers.append(callback)

    def turn(self) -> None:
        """Run what was posted, then the turn's end."""
        for _ in range(self._posted.qsize()):
            self._posted.get()()
        self._end()

    def until(self, condition: Callable[[], bool]) -> None:
        """Run turns until something is the case."""
        self.turn()
        while not condition():
            self._posted.get(timeout=PATIENCE)()
            self._end()

    def let_time_pass(self) -> None:
        """Run all timers."""
        timers, self.timers = self.timers, []
        for callback in timers:
            callback()
        self._end()

    def _end(self) -> None:
        for callback in tuple(self.at_turn_end):
            callback()


class QuickDisk(Disk):
    """A disk whose fsync is quick, as no test cuts the power; it counts and can be told to wait or to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []
        self.opened: list[Path] = []
        self.bytes_read = 0
        self.fails: OSError | None = None  # what fsync raises
        self.gate = threading.Event()  # fsync passes when it is set
        self.gate.set()
        self.waits = threading.Event()  # somebody came to the gate

    def open(self, path: Path) -> BinaryIO:
        self.opened.append(path)
        disk = self

        class Counted(io.FileIO):
            def readinto(self, buffer: Any) -> int | None:
                got = super().readinto(buffer)
                disk.bytes_read += got or 0
                return got

        return io.BufferedReader(Counted(path, "rb"))

    def fsync(self, file: int) -> None:
        self.waits.set()
        assert self.gate.wait(PATIENCE)
        self.steps.append(f"fsync {name_of(file)}")
        if self.fails:
            raise self.fails

    def replace(self, source: Path, target: Path) -> None:
        self.steps.append(f"replace {target.name}")
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self.steps.append(f"remove {path.name}")
        super().remove(path)


class SlowSaves(QuickDisk):
    """Each file of a checkpoint waits for a permission of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.permissions = threading.Semaphore(0)

    def save(self, path: Path, data: bytes) -> None:
        assert self.permissions.acquire(timeout=PATIENCE)
        super().save(path, data)


def name_of(file: int) -> str:
    link = Path(f"/proc/self/fd/{file}")
    return Path(os.readlink(link)).name if link.exists() else "file"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small reserve: making four megabytes of noise for each folder would take most of the time."""
    monkeypatch.setattr(xmppd, "RESERVE_BYTES", 4096)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at the end of nearly every turn that changes something."""
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", 1)


class Opened:
    """Data folders opened in a test, with the loop of each; closed in the end."""

    def __init__(self) -> None:
        self.all: list[Storage] = []

    def __call__(self, folder: Path, **options: Any) -> tuple[Storage, Turns]:
        turns = Turns()
        options.setdefault("disk", QuickDisk())
        storage = Storage(folder, turns, **options)  # type: ignore[arg-type]
        self.all.append(storage)
        return storage, turns


@pytest.fixture
def opened() -> Iterator[Opened]:
    it = Opened()
    yield it
    for storage in it.all:
        storage.disk.gate.set()
        storage.close()


def crash(storage: Storage) -> None:
    """End a storage as `kill -9` would: no checkpoint, no goodbye."""
    assert storage._thread.stop(PATIENCE)
    os.close(storage._lock)
    storage.close = lambda: None  # type: ignore[method-assign]


def synced(storage: Storage, turns: Turns) -> None:
    """End the turn and wait for the disk."""
    turns.turn()
    turns.until(lambda: storage.synced == storage.position)


def at_rest(storage: Storage, turns: Turns) -> None:
    """Wait until the running checkpoint is done."""
    turns.until(lambda: not storage._checkpointing and storage.synced == storage.position)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def broken(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.broken-*"))


# ---- documents ------------------------------------------------------------------------


def test_a_document_is_there_after_a_restart(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    storage.documents("vcard")[ALICE] = {"FN": "Älice 🐇", "n": [1, 2.5, None, True]}
    storage.documents("secret")[EXAMPLE] = "s3cret"
    storage.close()
    again, _ = opened(tmp_path / "data")
    assert again.documents("vcard")[ALICE] == {"FN": "Älice 🐇", "n": [1, 2.5, None, True]}
    assert again.documents("secret")[EXAMPLE] == "s3cret"


def test_the_files_lie_where_the_book_says(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    storage.documents("roster").put(ALICE, "bob@example.org", {"name": "Bob"})
    storage.documents("secret")[EXAMPLE] = "s3cret"
    storage.log("offline").append(ALICE, {"n": 1})
    storage.close()
    assert files(tmp_path / "data") == {
        ".lock", ".reserve", "journal-000002.jsonl",
        "example.org/roster/alice.json", "example.org/secret.json", "example.org/offline/alice.jsonl",
    }  # fmt: skip
    assert json.loads((tmp_path / "data/example.org/roster/alice.json").read_bytes()) == {
        "bob@example.org": {"name": "Bob"}
    }


def test_nobody_else_may_read_the_files(opened: Opened, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        storage, _ = opened(tmp_path / "data")
        storage.documents("accounts")[ALICE] = {"credentials": {}}
        storage.log("offline").append(ALICE, 1)
        storage.close()
    finally:
        os.umask(before)
    for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_get_item_and_membership(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    rosters = storage.documents("roster")
    assert rosters.get(ALICE) is None and rosters.get(ALICE, 7) == 7 and ALICE not in rosters
    assert rosters.items(ALICE) == {} and rosters.item(ALICE, "x") is None
    with pytest.raises(KeyError):
        rosters[ALICE]
    rosters.put(ALICE, "x", {"a": 1})
    assert ALICE in rosters and rosters[ALICE] == rosters.items(ALICE) == {"x": {"a": 1}}
    assert rosters.item(ALICE, "x") == {"a": 1} and rosters.item(ALICE, "y") is None
    del rosters[ALICE]
    assert ALICE not in rosters
    assert storage.documents("roster") is rosters


def test_removing_what_is_not_there_changes_nothing(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    before = storage.position
    del storage.documents("roster")[ALICE]
    storage.documents("roster").put(ALICE, "x", None)
    storage.log("offline").drop(ALICE, 5)
    storage.remove_owner(ALICE)
    assert storage.position == before


def test_only_the_item_is_journalled(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data")
    for n in range(500):
        storage.documents("roster").put(ALICE, f"contact{n}@example.org", {"name": f"Contact {n}"})
    synced(storage, turns)
    journal = tmp_path / "data/journal-000001.jsonl"
    before = journal.stat().st_size
    storage.documents("roster").put(ALICE, "contact7@example.org", {"name": "Seven"})
    synced(storage, turns)
    assert journal.stat().st_size - before < 200


def test_a_value_that_was_handed_out_does_not_change(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    rosters = storage.documents("roster")
    mine = {"x": 1}
    rosters[ALICE] = mine
    rosters.put(ALICE, "y", 2)
    assert mine == {"x": 1}
    seen = rosters.items(ALICE)
    rosters.put(ALICE, "z", 3)
    rosters.put(ALICE, "x", None)
    assert seen == {"x": 1, "y": 2} and rosters[ALICE] == {"y": 2, "z": 3}


def test_frozen_values_refuse_edits(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data", freeze=True)
    documents = storage.documents("private")
    given_value = {"list": [1, {"deep": 1}], "dict": {"a": 1}}
    documents[ALICE] = given_value
    given_value["late"] = 1
    value = documents[ALICE]
    assert value == {"list": [1, {"deep": 1}], "dict": {"a": 1}}
    edits: list[Callable[[], Any]] = [
        lambda: value.update(x=1), lambda: value["list"].append(2), lambda: value["list"][1].pop("deep"),
        lambda: value.__setitem__("x", 1), lambda: value["dict"].clear(), lambda: value["list"].sort(),
        lambda: documents.items(ALICE).setdefault("x", 1), lambda: documents.item(ALICE, "dict").__delitem__("a"),
    ]  # fmt: skip
    for edit in edits:
        with pytest.raises(TypeError):
            edit()
    thawed = copy.deepcopy(value)
    thawed["list"].append(3)
    documents[ALICE] = {**thawed, "shallow": copy.copy(value["dict"])}
    assert documents[ALICE]["list"] == [1, {"deep": 1}, 3]
    with pytest.raises(AssertionError):
        documents[BOB] = {"not json": (1, 2)}


def test_what_json_cannot_say_is_refused_before_anything_changed(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data")
    documents, position = storage.documents("vcard"), storage.position
    for wrong in ({1, 2}, float("nan"), "\ud800", b"bytes"):
        with pytest.raises((TypeError, ValueError)):
            documents[ALICE] = wrong
        with pytest.raises((TypeError, ValueError)):
            documents.put(ALICE, "x", wrong)
        with pytest.raises((TypeError, ValueError)):
            storage.log("offline").append(ALICE, wrong)
        with pytest.raises((TypeError, ValueError)):
            storage.log("offline").rewrite(ALICE, [1, wrong])
    assert ALICE not in documents and storage.position == position and storage.log("offline").count(ALICE) == 0
    documents[ALICE] = "fine"
    synced(storage, turns)


def test_owners_come_from_disk_and_from_what_is_pending(opened: Opened, tmp_path: Path) -> None:
    names = ["alice", "o.hara", "élise", "con", "x" * 300]
    owners = [JID(name, "example.org", "") for name in names]
    storage, _ = opened(tmp_path / "data")
    for owner in owners:
        storage.documents("accounts")[owner] = {"n": owner.local}
        storage.log("offline").append(owner, 1)
    storage.documents("accounts")[EXAMPLE] = "not an account"
    storage.documents("accounts")[JID("alice", "example.net", "")] = "another"
    assert set(storage.documents("accounts").owners("example.org")) == set(owners)
    storage.close()
    again, turns = opened(tmp_path / "data")
    folder = tmp_path / "data/example.org/accounts"
    for alien in ("README.json", "%zz.json", "a b.json", "alice.json.broken-2026-11-22", "%sha256-12.json"):
        (folder / alien).write_text("{}")
    accounts = again.documents("accounts")
    assert list(accounts.owners("example.org")) == sorted(owners)
    assert list(again.log("offline").owners("example.org")) == sorted(owners)
    assert all(accounts[owner] == {"n": owner.local} for owner in owners)
    accounts[BOB] = "pending"
    del accounts[owners[4]]
    again.log("offline").drop(ALICE, 1)
    assert set(accounts.owners("example.org")) == {*owners[:4], BOB}
    assert ALICE not in set(again.log("offline").owners("example.org"))
    synced(again, turns)
    assert set(accounts.owners("example.org")) == {*owners[:4], BOB}
    assert list(accounts.owners("nowhere.example")) == []


# ---- names of files -------------------------------------------------------------------

ODD_NAMES = [
    "..", ".", "con", "CON", "nul", "com1", "lpt9", "com10", "a/b", "a\\b", "%2e", "%2e%2e", "a", "A", "a.b", "a%2eb",
    "x" * 127, "x" * 128, "x" * 129, "x" * 200, "x" * 201, "X" * 200, "é", "é", "ß", "ss", "ı", "i", "🐇", "a b", "a:b", "a\n",
    "*", "?", "~", "-", "_", "alice.json", "%sha256-", "journal-000001.jsonl", "aux.txt",
]  # fmt: skip


def test_s60_odd_names_get_files_of_their_own_inside_the_folder() -> None:
    made = [xmppd.file_name(name) for name in ODD_NAMES]
    assert len({name.casefold() for name in made}) == len(set(ODD_NAMES))
    for name in made:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-%") and len(name) <= 128
        assert name not in {"con", "nul", "com1", "lpt9"}


@given(st.text(max_size=60).filter(str), st.text(max_size=60).filter(str))
def test_different_names_get_different_files(one: str, other: str) -> None:
    assert (xmppd.file_name(one).casefold() == xmppd.file_name(other).casefold()) == (one == other)
    assert (xmppd.folder_name(one).casefold() == xmppd.folder_name(other).casefold()) == (one == other)


@given(st.text(alphabet="./\\con%a-journl", max_size=12).filter(str))
def test_a_domain_never_leaves_the_data_folder(domain: str) -> None:
    name = xmppd.folder_name(domain)
    assert name not in {".", "..", ".lock", ".reserve"} and not name.startswith((".", "journal-"))
    assert not name.endswith(".") and not set(name) & set("/\\:")
    assert name.partition(".")[0] not in xmppd.WINDOWS_DEVICES


def test_domains_stay_readable() -> None:
    assert xmppd.folder_name("chat.example.org") == "chat.example.org"
    assert xmppd.folder_name("con.example.org") == "%63on.example.org"
    assert xmppd.folder_name("tls") == "%74ls", "our certificates lie there"
    assert xmppd.folder_name(xmppd.CONTROL_FILE) == "%63ontrol.json"
    assert xmppd.folder_name("tls.example.org") == "tls.example.org"
    assert xmppd.folder_name("example.org.") == "example%2eorg%2e"
    assert xmppd.folder_name("x" * 200).startswith("%sha256-")


def test_s60_odd_names_are_different_accounts(opened: Opened, tmp_path: Path) -> None:
    owners = [JID(name, "example.org", "") for name in dict.fromkeys(ODD_NAMES)]
    owners += [JID("alice", name, "") for name in dict.fromkeys(ODD_NAMES)]
    storage, _ = opened(tmp_path / "outer/data")
    for n, owner in enumerate(owners):
        storage.documents("accounts")[owner] = n
        storage.log("offline").append(owner, n)
    storage.close()
    assert [path.name for path in (tmp_path / "outer").iterdir()] == ["data"]
    again, _ = opened(tmp_path / "outer/data")
    assert [again.documents("accounts")[owner] for owner in owners] == list(range(len(owners)))
    assert [again.log("offline").read(owner) for owner in owners] == [[n] for n in range(len(owners))]


# ---- logs -----------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 3, 6], ids=["all pending", "half pending", "none pending"])
def test_readers_see_file_and_pending_tail(opened: Opened, tmp_path: Path, written: int) -> None:
    storage, _ = opened(tmp_path / "data")
    for n in range(written):
        storage.log("offline").append(ALICE, {"n": n, "text": "zwölf\n"})
    storage.close()
    storage, turns = opened(tmp_path / "data")
    offline = storage.log("offline")
    for n in range(written, 6):
        offline.append(ALICE, {"n": n, "text": "zwölf\n"})
    assert [record["n"] for record in offline.read(ALICE)] == list(range(6)) and offline.count(ALICE) == 6
    offline.drop(ALICE, 2)
    assert [record["n"] for record in offline.read(ALICE)] == [2, 3, 4, 5] and offline.count(ALICE) == 4
    synced(storage, turns)
    crash(storage)
    storage, turns = opened(tmp_path / "data")
    offline = storage.log("offline")
    assert [record["n"] for record in offline.read(ALICE)] == [2, 3, 4, 5] and offline.count(ALICE) == 4
    at_rest(storage, turns)
    assert [record["n"] for record in offline.read(ALICE)] == [2, 3, 4, 5]
    offline.rewrite(ALICE, ({"n": n} for n in (7, 8)))
    offline.append(ALICE, {"n": 9})
    assert offline.read(ALICE) == [{"n": 7}, {"n": 8}, {"n": 9}] and offline.count(ALICE) == 3
    storage.close()
    storage, _ = opened(tmp_path / "data")
    assert storage.log("offline").read(ALICE) == [{"n": 7}, {"n": 8}, {"n": 9}]
    storage.log("offline").drop(ALICE, 99)
    assert storage.log("offline").read(ALICE) == [] and storage.log("offline").count(ALICE) == 0
    storage.close()
    assert not (tmp_path / "data/example.org/offline/alice.jsonl").exists()


def test_appending_and_dropping_are_cheap(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    for n in range(1000):
        storage.log("offline").append(ALICE, {"n": n, "stanza": "x" * 500})
    storage.close()
    storage, turns = opened(tmp_path / "data")
    at_rest(storage, turns)
    disk = storage.disk
    disk.bytes_read = 0
    offline = storage.log("offline")
    offline.append(ALICE, {"n": 1000})
    assert disk.bytes_read < 20_000, "the log was read"
    assert offline.count(ALICE) == 1001
    disk.bytes_read = 0
    assert offline.count(ALICE) == 1001 and disk.bytes_read == 0
    synced(storage, turns)
    journal = sum(path.stat().st_size for _, path in xmppd.journals(tmp_path / "data"))
    del disk.steps[:]
    for _ in range(10):
        offline.drop(ALICE, 10)
        synced(storage, turns)
    assert not [step for step in disk.steps if step.startswith("replace")]
    assert sum(path.stat().st_size for _, path in xmppd.journals(tmp_path / "data")) - journal < 10 * 120
    assert [record["n"] for record in offline.read(ALICE)] == list(range(100, 1001))


def test_a_log_that_was_emptied_and_begun_again(opened: Opened, tmp_path: Path, often: None) -> None:
    storage, turns = opened(tmp_path / "data")
    offline = storage.log("offline")
    for n in range(5):
        offline.append(ALICE, n)
        synced(storage, turns)
        at_rest(storage, turns)
        offline.drop(ALICE, 1)
        if n % 2:
            offline.rewrite(ALICE, [])
        offline.append(ALICE, n + 100)
        synced(storage, turns)
        assert offline.read(ALICE) == [n + 100]
        crash(storage)
        storage, turns = opened(tmp_path / "data")
        offline = storage.log("offline")
        assert offline.read(ALICE) == [n + 100]
        at_rest(storage, turns)
        offline.drop(ALICE, 1)


# ---- removal of accounts --------------------------------------------------------------


def test_remove_owner_takes_everything_of_one_account_and_nothing_else(opened: Opened, tmp_path: Path) -> None:
    other = JID("alice2", "example.org", "")
    elsewhere = JID("alice", "example.net", "")
    storage, _ = opened(tmp_path / "data")
    for owner in (ALICE, other, elsewhere, EXAMPLE):
        storage.documents("roster").put(owner, "x", 1)
        storage.documents("vcard")[owner] = "card"
        storage.log("offline").append(owner, 1)
    storage.close()
    storage, turns = opened(tmp_path / "data")
    storage.documents("pep")[ALICE] = "pending"
    turns.turn()
    before = storage.position
    storage.remove_owner(ALICE)
    assert storage.position == before + 1, "one line"
    for checkpointed in (False, True):
        for kind in ("roster", "vcard", "pep"):
            assert ALICE not in storage.documents(kind)
            assert list(storage.documents(kind).owners("example.org")) == ([] if kind == "pep" else [other])
        assert storage.log("offline").read(ALICE) == []
        for owner in (other, elsewhere, EXAMPLE):
            assert storage.documents("vcard")[owner] == "card" and storage.log("offline").read(owner) == [1]
        if not checkpointed:
            synced(storage, turns)
            crash(storage)
            storage, turns = opened(tmp_path / "data")
            at_rest(storage, turns)
    assert not [name for name in files(tmp_path / "data/example.org") if name.startswith("alice.")]


@pytest.mark.parametrize("turns_between", [0, 1, 2], ids=["same turn", "later turn", "after a checkpoint"])
def test_an_account_made_again_starts_empty(opened: Opened, tmp_path: Path, turns_between: int) -> None:
    storage, turns = opened(tmp_path / "data")
    storage.documents("accounts")[ALICE] = "old"
    storage.documents("roster").put(ALICE, "old", 1)
    for n in range(3):
        storage.log("offline").append(ALICE, f"old {n}")
    if turns_between == 2:
        storage.close()
        storage, turns = opened(tmp_path / "data")
        at_rest(storage, turns)
    storage.remove_owner(ALICE)
    if turns_between:
        synced(storage, turns)
    storage.documents("accounts")[ALICE] = "new"
    storage.documents("roster").put(ALICE, "new", 2)
    storage.log("offline").append(ALICE, "new")
    synced(storage, turns)
    for end in (crash, Storage.close, Storage.close):
        assert storage.documents("accounts")[ALICE] == "new"
        assert storage.documents("roster")[ALICE] == {"new": 2}
        assert storage.log("offline").read(ALICE) == ["new"]
        end(storage)
        storage, turns = opened(tmp_path / "data")


# ---- positions ------------------------------------------------------------------------


def test_synced_grows_after_the_fsync_and_not_before(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data")
    told: list[int] = []
    storage.when_synced = lambda: told.append(storage.synced)
    disk = storage.disk
    assert storage.position == storage.synced
    before = storage.position
    turns.turn()
    assert storage.position == before, "a turn without changes"
    disk.gate.clear()
    disk.waits.clear()
    storage.documents("vcard")[ALICE] = 1
    storage.documents("vcard")[BOB] = 1
    assert storage.position == before + 1, "one line per turn, known at once"
    turns.turn()
    assert disk.waits.wait(PATIENCE)
    turns.turn()
    assert storage.synced == before and told == []
    disk.gate.set()
    synced(storage, turns)
    assert storage.synced == before + 1 and told == [before + 1]


def test_a_slow_disk_blocks_no_turn_and_lines_share_an_fsync(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data")
    disk = storage.disk
    disk.gate.clear()
    disk.waits.clear()
    storage.documents("vcard")[ALICE] = -1
    turns.turn()
    assert disk.waits.wait(PATIENCE)
    for n in range(100):
        storage.documents("vcard")[ALICE] = n
        turns.turn()
        assert storage.documents("vcard")[ALICE] == n
    assert storage.synced == storage.position - 101
    del disk.steps[:]
    disk.gate.set()
    synced(storage, turns)
    assert len(disk.steps) == 2, "one for the first line, one for the hundred that waited"


def test_positions_never_fall_not_even_over_restarts(opened: Opened, tmp_path: Path, often: None) -> None:
    last = 0
    for _ in range(3):
        storage, turns = opened(tmp_path / "data")
        for n in range(4):
            assert storage.position > last or n
            last = storage.position
            storage.documents("vcard")[ALICE] = n
            assert storage.position > last
            last = storage.position
            synced(storage, turns)
        last = storage.position
        storage.close()


def test_without_sync_the_operating_system_has_it_and_files_still_wait_for_the_journal(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, turns = opened(tmp_path / "data", sync=False)
    at_rest(storage, turns)
    disk = storage.disk
    del disk.steps[:]
    for n in range(3):
        storage.documents("vcard")[ALICE] = n
        synced(storage, turns)
    assert disk.steps == []
    assert b'"seq":4,' in (tmp_path / "data/journal-000001.jsonl").read_bytes()
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", 1)
    storage.documents("vcard")[ALICE] = 3
    synced(storage, turns)
    at_rest(storage, turns)
    steps = disk.steps
    assert steps.index("fsync journal-000001.jsonl") < steps.index("replace alice.json")


def test_without_sync_a_file_is_never_newer_than_the_journal_on_disk(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xmppd, "SAVES_UNDER_WAY", 1)
    disk = SlowSaves()
    storage, turns = opened(tmp_path / "data", disk=disk, sync=False)
    storage.documents("vcard")[ALICE] = storage.documents("vcard")[BOB] = 1
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", 1)
    synced(storage, turns)  # Alice's file waits for its permission, Bob's for Alice's
    storage.documents("vcard")[BOB] = 2
    turns.turn()
    disk.permissions.release()
    disk.permissions.release()
    synced(storage, turns)
    turns.until(lambda: "replace bob.json" in disk.steps)
    assert (tmp_path / "data/example.org/vcard/bob.json").read_text() == "2\n"
    before = disk.steps[: disk.steps.index("replace bob.json")]
    assert before.count("fsync journal-000002.jsonl") == 2, "its first line, and the one with Bob's change"
    for _ in range(4):
        disk.permissions.release()


# ---- attempts -------------------------------------------------------------------------


class Refused(Exception):
    """What goes wrong in an attempt."""


def attempted(storage: Storage, model: Model, attempt: list[tuple[Any, ...]], fails: bool) -> None:
    """Let changes be one attempt, which may fail when all are made; the model then knows nothing of them."""
    before = copy.deepcopy((model.documents, model.logs))

    def handler(changes: list[tuple[Any, ...]]) -> int:
        for change in changes:
            model.apply(storage, change)
        if fails:
            raise Refused
        return len(changes)

    try:
        assert storage.attempt(handler, attempt) == len(attempt)
        assert not fails
    except Refused:
        model.documents, model.logs = before


# ---- crashes --------------------------------------------------------------------------

KINDS = ("roster", "vcard")
OWNERS = (ALICE, BOB, JID("x" * 150, "example.org", ""), EXAMPLE)


class Model:
    """What a correct storage would hold, and what it held at each position."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, JID], Any] = {}
        self.logs: dict[JID, list[Any]] = {}
        self.history: dict[int, Any] = {}

    def apply(self, storage: Storage, change: tuple[Any, ...]) -> None:
        verb, owner, *rest = change
        getattr(self, verb)(storage, owner, *rest)

    def set(self, storage: Storage, owner: JID, kind: str, value: Any) -> None:
        storage.documents(kind)[owner] = value
        self.documents[kind, owner] = value

    def put(self, storage: Storage, owner: JID, kind: str, key: str, item: Any) -> None:
        storage.documents(kind).put(owner, key, item)
        new = {**(self.documents.get((kind, owner)) or {}), key: item}
        if key in (self.documents.get((kind, owner)) or {}) or item is not None:
            self.documents[kind, owner] = {k: v for k, v in new.items() if v is not None}

    def append(self, storage: Storage, owner: JID, records: list[Any]) -> None:
        for record in records:
            storage.log("offline").append(owner, record)
        self.logs[owner] = self.logs.get(owner, []) + records

    def drop(self, storage: Storage, owner: JID, n: int) -> None:
        storage.log("offline").drop(owner, n)
        self.logs[owner] = self.logs.get(owner, [])[n:]

    def rewrite(self, storage: Storage, owner: JID, records: list[Any]) -> None:
        storage.log("offline").rewrite(owner, records)
        self.logs[owner] = records

    def remove(self, storage: Storage, owner: JID) -> None:
        storage.remove_owner(owner)
        self.logs[owner] = []
        for kind in KINDS:
            self.documents[kind, owner] = None

    def state(self) -> Any:
        documents = {key: value for key, value in self.documents.items() if value is not None}
        return documents, {owner: records for owner, records in self.logs.items() if records}

    def note(self, position: int) -> None:
        """Note what is true from this position on; a checkpoint takes numbers of its own, without changes."""
        last = max(self.history, default=0)
        for between in range(last + 1, position):
            self.history[between] = self.history.get(last, ({}, {}))
        self.history[position] = copy.deepcopy(self.state())


def state_of(storage: Storage) -> Any:
    documents = {
        (kind, owner): storage.documents(kind)[owner]
        for kind in KINDS for owner in OWNERS if owner in storage.documents(kind)
    }  # fmt: skip
    logs = {owner: storage.log("offline").read(owner) for owner in OWNERS}
    for owner, records in logs.items():
        assert storage.log("offline").count(owner) == len(records)
    return documents, {owner: records for owner, records in logs.items() if records}


records = st.lists(st.integers(0, 99) | st.text("ab\n", max_size=30), max_size=4)
owners = st.sampled_from(OWNERS)
kinds = st.sampled_from(KINDS)
items = st.none() | st.integers(0, 9)
changes = st.one_of(
    st.tuples(st.just("set"), owners, kinds, st.none() | st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9))),
    st.tuples(st.just("put"), owners, kinds, st.sampled_from("xyz"), items),
    st.tuples(st.just("append"), owners, records),
    st.tuples(st.just("append"), owners, records),
    st.tuples(st.just("drop"), owners, st.integers(0, 6)),
    st.tuples(st.just("rewrite"), owners, records),
    st.tuples(st.just("remove"), owners),
)
histories = st.lists(st.lists(changes, max_size=4), max_size=8)


class CopyingDisk(QuickDisk):
    """Copies the data folder before each step and in the middle of each write: what a crash there would leave."""

    def __init__(self, copies: Path) -> None:
        super().__init__()
        self.copies = copies
        self.made: list[tuple[Path, int]] = []  # with what was known to be synced then
        self.storage: Storage | None = None

    def copy(self) -> None:
        if self.storage is not None:
            acknowledged = self.storage.synced
            target = self.copies / str(len(self.made))
            shutil.copytree(self.storage.folder, target)
            self.made.append((target, acknowledged))

    def write(self, file: int, data: bytes) -> None:
        self.copy()
        super().write(file, data[: len(data) // 2])
        self.copy()
        super().write(file, data[len(data) // 2 :])

    def truncate(self, file: int, length: int) -> None:
        self.copy()
        super().truncate(file, length)

    def fsync(self, file: int) -> None:
        self.copy()

    def replace(self, source: Path, target: Path) -> None:
        self.copy()
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self.copy()
        super().remove(path)


def recovers(folder: Path, model: Model, acknowledged: int) -> None:
    """Open what a crash left, again and again: after a crash during recovery, one after it, and for good."""
    expected = None
    for how in ("crash", "crash later", "close", "close"):
        turns = Turns()
        storage = Storage(folder, turns, disk=QuickDisk(), freeze=True)  # type: ignore[arg-type]
        if expected is None:
            recovered = storage.position - 1  # the newest line that was read back
            assert recovered >= acknowledged
            expected = model.history[min(recovered, max(model.history))]
        before = storage.position
        assert state_of(storage) == expected
        assert storage.position == before, "reading had to mend something"
        if how == "crash later":
            at_rest(storage, turns)
            assert state_of(storage) == expected
        if how == "close":
            storage.close()
        else:
            crash(storage)
    assert not [path for path in broken(folder) if not path.name.startswith("journal-")]


few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(histories, st.sampled_from([1, 150, 10_000]), st.sampled_from([500, 1_000_000]), st.integers(0, 9))
def test_a_crash_at_any_step_loses_nothing_acknowledged_and_no_half_turn_survives(
    monkeypatch: pytest.MonkeyPatch, history: list[list[tuple[Any, ...]]], journal_bytes: int, cache_bytes: int, first: int
) -> None:
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", journal_bytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk, turns, model = CopyingDisk(folder), Turns(), Model()
        storage = Storage(folder / "data", turns, disk=disk, cache_bytes=cache_bytes)  # type: ignore[arg-type]
        model.note(storage.position)
        disk.storage = storage
        for turn in history:
            for change in turn:
                model.apply(storage, change)
            position = storage.position
            turns.turn()
            model.note(position)
            model.note(storage.position)
            if len(turn) % 2:
                turns.until(lambda: storage.synced == storage.position)
            assert state_of(storage) == model.state()
        storage.close()
        disk.storage = None
        model.note(storage.position)
        disk.made.append((folder / "data", storage.synced))
        for copied, acknowledged in disk.made[first :: 1 + len(disk.made) // 12]:
            recovers(copied, model, acknowledged)


@few
@given(st.lists(st.lists(st.tuples(st.lists(changes, max_size=3), st.booleans()), max_size=3), max_size=8), st.sampled_from([1, 10_000]))
def test_an_attempt_that_fails_leaves_nothing_in_memory_nor_on_disk(
    monkeypatch: pytest.MonkeyPatch, history: list[list[tuple[list[tuple[Any, ...]], bool]]], journal_bytes: int
) -> None:
    """A refused request has changed nothing, neither now nor after a restart, and nobody waits for its line."""
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", journal_bytes)
    with tempfile.TemporaryDirectory() as name:
        turns, model = Turns(), Model()
        storage = Storage(Path(name) / "data", turns, disk=QuickDisk(), freeze=True)  # type: ignore[arg-type]
        for turn in history:
            for attempt, fails in turn:
                attempted(storage, model, attempt, fails)
                assert state_of(storage) == model.state()
            synced(storage, turns)
        assert storage.way_back is None
        model.note(storage.position)
        crash(storage)
        recovers(Path(name) / "data", model, storage.synced)


def test_an_attempt_within_another_is_part_of_it(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data")
    vcards = storage.documents("vcard", dict)

    def inner(fails: bool) -> None:
        vcards.put(ALICE, "inner", 1)
        if fails:
            raise Refused

    def outer(fails: bool) -> None:
        vcards.put(ALICE, "outer", 1)
        with contextlib.suppress(Refused):
            storage.attempt(inner, not fails)
        if fails:
            raise Refused

    storage.attempt(outer, False)
    synced(storage, turns)
    assert vcards[ALICE] == {"outer": 1}, "the inner one failed"
    with pytest.raises(Refused):
        storage.attempt(outer, True)
    assert vcards[ALICE] == {"outer": 1}, "the outer one failed, and took the inner one with it"
    position = storage.position
    synced(storage, turns)
    assert storage.position == position == storage.synced


@few
@given(histories.filter(any), st.data())
def test_a_journal_cut_anywhere_recovers_its_whole_lines(history: list[list[tuple[Any, ...]]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        turns, model = Turns(), Model()
        storage = Storage(folder, turns, disk=QuickDisk())  # type: ignore[arg-type]
        journal = folder / "journal-000001.jsonl"
        ends = {storage.position: journal.stat().st_size}
        model.note(storage.position)
        for turn in history:
            for change in turn:
                model.apply(storage, change)
            synced(storage, turns)
            ends[storage.position] = journal.stat().st_size
            model.note(storage.position)
        crash(storage)
        whole = journal.read_bytes()
        cut = data.draw(st.integers(ends[1], len(whole)))
        garbage = data.draw(st.sampled_from([b"", bytes(100), b"\xff\n{}\n", whole[-40:]]))
        journal.write_bytes(whole[:cut] + garbage)
        survivor = max(position for position, end in ends.items() if end <= cut)
        storage = Storage(folder, Turns(), disk=QuickDisk())  # type: ignore[arg-type]
        if whole[: len(whole[:cut] + garbage)] != whole[:cut] + garbage:  # else the garbage was the rest of the line
            assert storage.position == survivor + 1
        assert state_of(storage) == model.history[storage.position - 1]
        rest = (whole[:cut] + garbage)[ends[storage.position - 1] :]
        assert [path.read_bytes() for path in broken(folder)] == ([rest] if rest else [])
        storage.close()


def test_replay_stops_at_a_bad_line_a_gap_and_a_repetition() -> None:
    lines = [xmppd.journal_line(n, [b'["set","vcard","alice@example.org",%d]' % n]) for n in range(5, 10)]
    whole = b"".join(lines)
    assert xmppd.replay(whole).sequence == 9 and xmppd.replay(whole).good_length == len(whole)
    assert xmppd.replay(whole, 4).changes == [["set", "vcard", "alice@example.org", n] for n in range(5, 10)]
    assert xmppd.replay(whole, 3) == ([], 3, 0)
    assert xmppd.replay(b"") == ([], 0, 0)
    for bad in (lines[0] + lines[2], lines[0] + lines[0], lines[0] + lines[1].replace(b"6]", b"7]") + lines[2]):
        assert xmppd.replay(bad)[1:] == (5, len(lines[0]))
    assert all(json.loads(line)["seq"] for line in lines)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_flipped_bit_ends_the_replay_before_it(at: int, bit: int) -> None:
    lines = [xmppd.journal_line(n, [b'["set","vcard","alice@example.org",%d]' % n]) for n in range(1, 5)]
    data = bytearray(b"".join(lines))
    at %= len(data)
    data[at] ^= 1 << bit
    good = at // len(lines[0])
    assert xmppd.replay(bytes(data)).good_length == good * len(lines[0])


def test_a_bad_line_keeps_all_that_follows_aside(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage, turns = opened(tmp_path / "data")
    for n in range(4):
        storage.documents("vcard")[ALICE] = n
        synced(storage, turns)
    crash(storage)
    storage, turns = opened(tmp_path / "data")
    storage.documents("vcard")[BOB] = "in the second journal"
    crash_after = tmp_path / "data/journal-000001.jsonl"
    turns._posted.put(lambda: None)
    storage.commit()
    crash(storage)
    if not crash_after.exists():
        pytest.fail("the first journal is gone before its documents are on disk")
    lines = crash_after.read_bytes().splitlines(keepends=True)
    crash_after.write_bytes(b"".join(lines[:3]) + lines[3].replace(b"crc", b"CRC") + lines[4])
    shutil.rmtree(tmp_path / "data/example.org", ignore_errors=True)
    storage, _ = opened(tmp_path / "data")
    assert storage.documents("vcard")[ALICE] == 1 and BOB not in storage.documents("vcard")
    kept = b"".join(path.read_bytes() for path in broken(tmp_path / "data"))
    assert lines[4] in kept and b"in the second journal" in kept
    assert "journal-000001.jsonl is bad from byte" in caplog.text


def test_a_journal_of_a_newer_program_is_not_guessed_at(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    line = xmppd.journal_line(7, [b'["transmogrify","vcard","alice@example.org"]'])
    (tmp_path / "data/journal-000009.jsonl").write_bytes(line)
    with pytest.raises(ConfigError, match=r"journal-000009\.jsonl.*newer xmppd.*transmogrify"):
        opened(tmp_path / "data")
    assert (tmp_path / "data/journal-000009.jsonl").read_bytes() == line
    (tmp_path / "data/journal-000009.jsonl").unlink()
    opened(tmp_path / "data")  # the lock was released


def test_a_log_that_is_newer_than_the_journal_stays_as_it_is(opened: Opened, tmp_path: Path) -> None:
    """The journal's later lines may be lost to damage; the file that was written because of them is not."""
    storage, _ = opened(tmp_path / "data")
    storage.log("offline").rewrite(ALICE, ["second generation"])
    storage.log("offline").rewrite(ALICE, ["third generation"])
    storage.close()
    old = [b'["append","offline","alice@example.org",1,0,"first"]', b'["rewrite","offline","alice@example.org",2,["old"]]',
           b'["append","offline","alice@example.org",2,6,"old"]', b'["drop","offline","alice@example.org",2,6]']  # fmt: skip
    for _, path in xmppd.journals(tmp_path / "data"):
        path.write_bytes(xmppd.journal_line(9, old))
    storage, turns = opened(tmp_path / "data")
    assert storage.log("offline").read(ALICE) == ["third generation"]
    storage.log("offline").append(ALICE, "more")
    at_rest(storage, turns)
    assert storage.log("offline").read(ALICE) == ["third generation", "more"]


@pytest.mark.parametrize("more", [[], ["x"]], ids=["nothing follows", "a record follows"])
def test_a_log_that_was_dropped_whole_has_no_file_and_misses_none(opened: Opened, tmp_path: Path, more: list[str]) -> None:
    changes = [b'["drop","offline","alice@example.org",1,50]']
    changes += [b'["append","offline","alice@example.org",1,50,"x"]' for _ in more]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/journal-000001.jsonl").write_bytes(xmppd.journal_line(1, changes))
    storage, turns = opened(tmp_path / "data")
    for _ in range(2):
        before = storage.position
        assert storage.log("offline").read(ALICE) == more and storage.log("offline").count(ALICE) == len(more)
        assert storage.position == before, "it was mended"
        at_rest(storage, turns)


# ---- checkpoints ----------------------------------------------------------------------


def test_a_checkpoint_syncs_before_it_replaces_and_removes(opened: Opened, tmp_path: Path, often: None) -> None:
    storage, turns = opened(tmp_path / "data")
    at_rest(storage, turns)
    disk = storage.disk
    del disk.steps[:]
    storage.documents("vcard")[ALICE] = 1
    synced(storage, turns)
    at_rest(storage, turns)
    steps = disk.steps
    order = ["fsync journal-000001.jsonl", "fsync journal-000002.jsonl", "fsync alice.json.new", "replace alice.json",
             "fsync vcard", "remove journal-000001.jsonl"]  # fmt: skip
    assert [step for step in steps if step in order] == order
    between = steps[steps.index("replace alice.json") : steps.index("remove journal-000001.jsonl")]
    assert {"fsync data", "fsync example.org"} <= set(between), "folders that are new themselves"
    assert files(tmp_path / "data") == {".lock", ".reserve", "journal-000002.jsonl", "example.org/vcard/alice.json"}


def test_answers_go_on_between_the_files_of_a_checkpoint(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowSaves()
    storage, turns = opened(tmp_path / "data", disk=disk)
    owners = [JID(f"user{n}", "example.org", "") for n in range(20)]
    for owner in owners:
        storage.documents("vcard")[owner] = 0
    begin_checkpoint(storage, turns, monkeypatch)
    for n in range(len(owners)):
        storage.documents("vcard")[owners[-1]] = n
        turns.turn()
        disk.permissions.release()
        turns.until(lambda: storage.synced == storage.position)
        assert len(files(tmp_path / "data/example.org") if n else ()) <= n + 1
    at_rest(storage, turns)
    assert (tmp_path / "data/example.org/vcard/user0.json").read_text() == "0\n"
    for _ in owners:
        disk.permissions.release()
    crash(storage)
    storage, _ = opened(tmp_path / "data")
    assert storage.documents("vcard")[owners[-1]] == len(owners) - 1


def begin_checkpoint(storage: Storage, turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin one checkpoint now, whose first file waits for its permission, and none after it."""
    with monkeypatch.context() as patch:
        patch.setattr(xmppd, "JOURNAL_BYTES", 1)
        turns.turn()
    turns.turn()
    assert storage._checkpointing and storage._tasks


def test_what_changes_during_a_checkpoint_is_kept_by_the_next_journal(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowSaves()
    storage, turns = opened(tmp_path / "data", disk=disk, cache_bytes=5_000)
    cards, offline = storage.documents("vcard"), storage.log("offline")
    cards[ALICE] = "old"
    for n in range(3):
        offline.append(ALICE, f"old {n}")
        offline.append(BOB, f"old {n}")
    begin_checkpoint(storage, turns, monkeypatch)
    cards[ALICE] = "new"
    offline.rewrite(ALICE, ["new 0", "new 1"])
    offline.drop(BOB, 2)
    offline.append(BOB, "new")
    for _ in range(3):
        disk.permissions.release()
    at_rest(storage, turns)
    assert [path.name for _, path in xmppd.journals(tmp_path / "data")] == ["journal-000002.jsonl"]
    for _ in range(2):
        for n in range(100):
            cards.get(JID(f"user{n}", "example.org", ""))
        assert cards[ALICE] == "new"
        assert offline.read(ALICE) == ["new 0", "new 1"] and offline.read(BOB) == ["old 2", "new"]
        crash(storage)
        storage, turns = opened(tmp_path / "data")
        cards, offline = storage.documents("vcard"), storage.log("offline")


def test_only_a_few_files_wait_in_memory(opened: Opened, tmp_path: Path, often: None) -> None:
    disk = SlowSaves()
    storage, turns = opened(tmp_path / "data", disk=disk)
    at_rest(storage, turns)
    for n in range(100):
        storage.documents("vcard")[JID(f"user{n}", "example.org", "")] = 0
    for _ in range(50):
        turns.turn()
    assert storage._tasks == xmppd.SAVES_UNDER_WAY
    for _ in range(100):
        disk.permissions.release()
    at_rest(storage, turns)
    assert len(list((tmp_path / "data/example.org/vcard").iterdir())) == 100


def test_close_takes_a_bounded_time(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xmppd, "CLOSE_DISK_TIMEOUT", 0.2)
    storage, _ = opened(tmp_path / "data")
    storage.disk.gate.clear()
    storage.documents("vcard")[ALICE] = 1
    storage.close()
    assert storage.synced < storage.position
    with pytest.raises(ConfigError, match="in use"):
        opened(tmp_path / "data")  # the thread may still write
    with pytest.raises(StanzaError):
        storage.documents("vcard")[ALICE] = 2
    storage.disk.gate.set()
    storage._thread._thread.join(PATIENCE)


# ---- the cache ------------------------------------------------------------------------


def test_the_cache_is_bounded_and_remembers_absence(opened: Opened, tmp_path: Path) -> None:
    owners = [JID(f"user{n}", "example.org", "") for n in range(200)]
    storage, _ = opened(tmp_path / "data")
    for owner in owners:
        storage.documents("vcard")[owner] = "x" * 200
    storage.close()
    storage, turns = opened(tmp_path / "data", cache_bytes=50_000)
    at_rest(storage, turns)
    disk, cards = storage.disk, storage.documents("vcard")
    for owner in owners:
        cards.get(owner)
        cards.get(owners[0])  # used all the time, so it stays
        assert storage.cache.size <= 50_000
    assert len(cards.entries) < 50
    del disk.opened[:]
    cards.get(owners[0])
    assert disk.opened == []
    cards.get(owners[1])
    assert disk.opened == [cards.path(owners[1])]
    for _ in range(3):
        assert cards.get(ALICE) is None
    assert disk.opened[1:] == [cards.path(ALICE)]


def test_what_is_journalled_but_not_written_stays_in_memory(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data", cache_bytes=5_000)
    at_rest(storage, turns)
    cards = storage.documents("vcard")
    cards[ALICE] = "changed"
    storage.log("offline").append(ALICE, "pending")
    turns.turn()
    for n in range(100):
        assert cards.get(JID(f"user{n}", "example.org", "")) is None
    del storage.disk.opened[:]
    assert cards[ALICE] == "changed" and storage.log("offline").read(ALICE) == ["pending"]
    assert storage.disk.opened == []


def test_much_pinned_memory_calls_for_a_checkpoint(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data", cache_bytes=5_000)
    at_rest(storage, turns)
    for n in range(50):
        storage.documents("vcard")[JID(f"user{n}", "example.org", "")] = n
    synced(storage, turns)
    at_rest(storage, turns)
    assert len(files(tmp_path / "data/example.org")) == 50
    assert storage.cache.size <= 5_000


def test_10000_accounts_at_rest_cost_nothing_at_start(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "data/example.org/accounts"
    folder.mkdir(parents=True)
    for n in range(10_000):
        (folder / f"user{n}.json").touch()
    storage, turns = opened(tmp_path / "data")
    at_rest(storage, turns)
    assert storage.disk.opened == [] and storage.documents("accounts").entries == {}


# ---- when the disk fails --------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_fsync_is_final(opened: Opened, tmp_path: Path, number: int) -> None:
    storage, turns = opened(tmp_path / "data")
    cards, disk = storage.documents("vcard"), storage.disk
    cards[ALICE] = "acknowledged"
    synced(storage, turns)
    acknowledged = storage.synced
    del disk.steps[:]
    disk.fails = OSError(number, os.strerror(number))
    cards[ALICE] = "lost"
    turns.until(lambda: bool(storage.failed))
    disk.fails = None
    assert "fsync failed" in storage.failed and os.strerror(number) in storage.failed
    position = storage.position
    attempts: list[Callable[[], Any]] = [
        lambda: cards.__setitem__(ALICE, 1), lambda: cards.put(BOB, "x", 1), lambda: cards.__delitem__(ALICE),
        lambda: storage.log("offline").append(ALICE, 1), lambda: storage.log("offline").rewrite(ALICE, [1]),
        lambda: storage.log("offline").drop(ALICE, 1), lambda: storage.remove_owner(ALICE),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(StanzaError) as refusal:
            attempt()
        assert refusal.value.condition == "resource-constraint"
    assert cards[ALICE] == "lost" and BOB not in cards and storage.log("offline").count(ALICE) == 0
    turns.let_time_pass()
    turns.turn()
    assert storage.failed and storage.position == position and storage.synced == acknowledged
    storage.close()
    assert disk.steps == ["fsync journal-000001.jsonl"], "never again"
    again, _ = opened(tmp_path / "data")
    assert again.documents("vcard")[ALICE] in ("acknowledged", "lost")


def test_a_failed_fsync_of_a_document_is_final_too(opened: Opened, tmp_path: Path) -> None:
    class Disk7(QuickDisk):
        def fsync(self, file: int) -> None:
            if name_of(file).endswith(".new"):
                raise OSError(errno.EIO, "no such luck")
            super().fsync(file)

    storage, turns = opened(tmp_path / "data", disk=Disk7())
    storage.documents("vcard")[ALICE] = "safe in the journal"
    synced(storage, turns)
    storage.close()
    assert "no such luck" in storage.failed and (tmp_path / "data/journal-000001.jsonl").exists()
    again, _ = opened(tmp_path / "data")
    assert again.documents("vcard")[ALICE] == "safe in the journal"


class SmallDisk(QuickDisk):
    """A disk with so many bytes of room."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, file: int, data: bytes) -> None:
        fits = data[: self.room]
        super().write(file, fits)
        self.room -= len(fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def truncate(self, file: int, length: int) -> None:
        self.room += os.fstat(file).st_size - length
        super().truncate(file, length)

    def remove(self, path: Path) -> None:
        self.room += path.stat().st_size if path.exists() else 0
        super().remove(path)


def test_a_full_disk_finishes_the_turn_and_refuses_the_next(opened: Opened, tmp_path: Path) -> None:
    disk = SmallDisk(5_000)
    storage, turns = opened(tmp_path / "data", disk=disk)
    cards = storage.documents("vcard")
    cards[ALICE] = "small"
    synced(storage, turns)
    cards[BOB] = "x" * 1000
    storage.documents("roster").put(BOB, "x", 1)
    synced(storage, turns)
    turns.until(lambda: bool(storage.failed))
    assert "no space left" in storage.failed and storage.synced == storage.position
    journal = (tmp_path / "data/journal-000001.jsonl").read_bytes()
    assert xmppd.replay(journal).good_length == len(journal) and b"x" * 1000 in journal
    position = storage.position
    with pytest.raises(StanzaError) as refusal:
        cards[ALICE] = "later"
    assert refusal.value.condition == "resource-constraint" and cards[ALICE] == "small" and storage.position == position
    turns.let_time_pass()
    turns.until(lambda: len(turns.timers) == 1)  # looked, found no room, looks again later
    assert storage.failed
    disk.room += 100_000
    turns.let_time_pass()
    turns.until(lambda: not storage.failed)
    cards[ALICE] = "later"
    synced(storage, turns)
    crash(storage)
    again, _ = opened(tmp_path / "data")
    assert again.documents("vcard")[ALICE] == "later" and again.documents("roster")[BOB] == {"x": 1}


def test_a_turn_larger_than_the_reserve_leaves_no_half_line(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data", disk=SmallDisk(5_000))
    storage.documents("vcard")[ALICE] = "small"
    synced(storage, turns)
    acknowledged = storage.synced
    storage.documents("vcard")[BOB] = "x" * 9_000
    turns.until(lambda: bool(storage.failed))
    storage.close()
    assert storage.synced == acknowledged
    journal = (tmp_path / "data/journal-000001.jsonl").read_bytes()
    assert xmppd.replay(journal).good_length == len(journal)
    again, _ = opened(tmp_path / "data")
    assert again.documents("vcard")[ALICE] == "small" and BOB not in again.documents("vcard")
    assert broken(tmp_path / "data") == []


def test_a_checkpoint_that_meets_a_full_disk_is_done_later(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SmallDisk(15_000)
    storage, turns = opened(tmp_path / "data", disk=disk)
    at_rest(storage, turns)
    storage.documents("vcard")[ALICE] = "x" * 3_000
    storage.log("offline").append(ALICE, "y" * 3_000)
    storage.documents("vcard")[BOB] = "small"
    disk.room = 7_000
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", 1)
    synced(storage, turns)
    monkeypatch.setattr(xmppd, "JOURNAL_BYTES", 10**9)
    turns.until(lambda: not storage._checkpointing)
    assert (tmp_path / "data/journal-000001.jsonl").exists() and turns.timers and not storage.failed
    assert storage.documents("vcard")[ALICE] == "x" * 3_000
    disk.room += 100_000
    turns.let_time_pass()
    at_rest(storage, turns)
    assert [path.name for _, path in xmppd.journals(tmp_path / "data")] == ["journal-000003.jsonl"]
    crash(storage)
    again, _ = opened(tmp_path / "data")
    assert again.documents("vcard")[ALICE] == "x" * 3_000 and again.documents("vcard")[BOB] == "small"
    assert again.log("offline").read(ALICE) == ["y" * 3_000]


def test_a_start_on_a_full_disk_says_so_in_one_line(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        opened(tmp_path / "data", disk=SmallDisk(10))
    assert "No space left" in str(error.value) and "\n" not in str(error.value)


def test_a_start_without_room_for_the_reserve_only_reads(opened: Opened, tmp_path: Path) -> None:
    storage, turns = opened(tmp_path / "data", disk=SmallDisk(500))
    turns.turn()
    assert "no space left" in storage.failed and storage.documents("vcard").get(ALICE) is None
    assert (tmp_path / "data/.reserve").stat().st_size == 0


def test_a_disk_thread_that_dies_of_a_bug_is_not_silent(opened: Opened, tmp_path: Path) -> None:
    class Buggy(QuickDisk):
        def write(self, file: int, data: bytes) -> None:
            if b"trigger" in data:
                raise ZeroDivisionError
            super().write(file, data)

    storage, turns = opened(tmp_path / "data", disk=Buggy())
    storage.documents("vcard")[ALICE] = "trigger"
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        turns.until(lambda: bool(storage.failed))
    finally:
        storage._thread._thread.join(PATIENCE)
        threading.excepthook = hook
    assert "bug" in storage.failed and storage.failed_for_good


# ---- damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"half":', b"\xff\xfe", b"[" * 100_000], ids=["empty", "half", "bytes", "deep"])
def test_s61_a_damaged_document_is_set_aside_and_never_overwritten(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    folder = tmp_path / "data/example.org/roster"
    folder.mkdir(parents=True)
    (folder / "alice.json").write_bytes(content)
    storage, _ = opened(tmp_path / "data")
    storage.documents("roster").put(ALICE, "bob@example.org", {"name": "Bob"})
    assert "alice.json is damaged" in caplog.text and "alice.json.broken-" in caplog.text
    storage.close()
    assert [path.read_bytes() for path in broken(tmp_path / "data")] == [content]
    assert json.loads((folder / "alice.json").read_bytes()) == {"bob@example.org": {"name": "Bob"}}


def test_two_damaged_files_in_one_second_are_both_kept(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the clock may say what it likes."""
    monkeypatch.setattr(xmppd.time, "gmtime", lambda *_: (1970, 1, 1, 0, 0, 0, 3, 1, 0))
    monkeypatch.setattr(xmppd.time, "time", lambda: -1.0)
    folder = tmp_path / "data/example.org/vcard"
    folder.mkdir(parents=True)
    for content in (b"one", b"two", b"three"):
        (folder / "alice.json").write_bytes(content)
        storage, turns = opened(tmp_path / "data")
        assert storage.documents("vcard").get(ALICE) is None
        storage.documents("vcard")[BOB] = content.decode()
        synced(storage, turns)
        storage.close()
    assert {path.read_bytes() for path in broken(tmp_path / "data")} == {b"one", b"two", b"three"}
    storage, _ = opened(tmp_path / "data")
    assert storage.documents("vcard")[BOB] == "three"


def test_a_file_that_cannot_be_opened_is_neither_empty_nor_overwritten(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "data/example.org/vcard/alice.json"
    folder.mkdir(parents=True)  # a folder in the place of the file: an error for root, too
    storage, _ = opened(tmp_path / "data")
    attempts: list[Callable[[], Any]] = [
        lambda: storage.documents("vcard").get(ALICE), lambda: storage.documents("vcard").put(ALICE, "x", 1),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(StanzaError) as error:
            attempt()
        assert error.value.condition == "internal-server-error"
    assert storage.position == storage.synced


def make_log(opened: Opened, folder: Path) -> Path:
    storage, _ = opened(folder)
    for n in range(5):
        storage.log("offline").append(ALICE, {"n": n})
    storage.close()
    return folder / "example.org/offline/alice.jsonl"


def test_a_damaged_record_costs_only_itself(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_log(opened, tmp_path / "data")
    damaged = path.read_bytes().replace(b'{"n":2}', b'{"n"\xff2}')
    path.write_bytes(damaged)
    storage, turns = opened(tmp_path / "data")
    for _ in range(2):
        assert [record["n"] for record in storage.log("offline").read(ALICE)] == [0, 1, 3, 4]
    assert storage.log("offline").count(ALICE) == 4 and caplog.text.count("is damaged") == 1
    storage.log("offline").append(ALICE, {"n": 5})
    synced(storage, turns)
    storage.close()
    storage, _ = opened(tmp_path / "data")
    assert [record["n"] for record in storage.log("offline").read(ALICE)] == [0, 1, 3, 4, 5]
    assert [kept.read_bytes() for kept in broken(tmp_path / "data")] == [damaged]


def test_a_log_that_ends_within_a_record(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_log(opened, tmp_path / "data")
    damaged = path.read_bytes() + b'{"n":"' + b"x" * 100
    path.write_bytes(damaged)
    for n in (5, 6):
        storage, _ = opened(tmp_path / "data")
        storage.log("offline").append(ALICE, {"n": n})
        storage.close()
    storage, _ = opened(tmp_path / "data")
    assert [record["n"] for record in storage.log("offline").read(ALICE)] == [0, 1, 2, 3, 4, 5, 6]
    assert "ends within a record" in caplog.text
    assert [kept.read_bytes() for kept in broken(tmp_path / "data")] == [damaged]


@pytest.mark.parametrize("content", [b"", b"what?\n", b"[]\n{}\n", None], ids=["empty", "no head", "no object", "gone"])
def test_a_log_without_a_head(opened: Opened, tmp_path: Path, content: bytes | None) -> None:
    path = make_log(opened, tmp_path / "data")
    path.unlink() if content is None else path.write_bytes(content)
    storage, turns = opened(tmp_path / "data")
    assert storage.log("offline").read(ALICE) == []
    storage.log("offline").append(ALICE, "new")
    synced(storage, turns)
    storage.close()
    storage, _ = opened(tmp_path / "data")
    assert storage.log("offline").read(ALICE) == ["new"]
    assert [kept.read_bytes() for kept in broken(tmp_path / "data")] == ([] if content is None else [content])


@pytest.mark.parametrize("content", [None, b"what?\n", b""], ids=["gone", "no head", "empty"])
def test_a_log_damaged_while_the_server_runs(opened: Opened, tmp_path: Path, content: bytes | None) -> None:
    path = make_log(opened, tmp_path / "data")
    storage, turns = opened(tmp_path / "data")
    offline = storage.log("offline")
    offline.append(ALICE, "pending")
    path.unlink() if content is None else path.write_bytes(content)
    if content is None:
        assert offline.read(ALICE) == ["pending"] == offline.read(ALICE)
    synced(storage, turns)
    storage.close()
    assert storage.failed == "closed"
    storage, _ = opened(tmp_path / "data")
    assert storage.log("offline").read(ALICE) == ["pending"]


# ---- the lock -------------------------------------------------------------------------


def test_a_second_server_in_the_same_folder_is_refused(opened: Opened, tmp_path: Path) -> None:
    storage, _ = opened(tmp_path / "data")
    before = files(tmp_path / "data")
    with pytest.raises(ConfigError, match="in use by another xmppd"):
        opened(tmp_path / "data")
    assert files(tmp_path / "data") == before
    storage.close()
    storage.close()  # twice is once
    opened(tmp_path / "data")


def test_a_folder_that_cannot_be_made_is_said_in_one_line(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/data"):
        with pytest.raises(ConfigError) as error:
            opened(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
