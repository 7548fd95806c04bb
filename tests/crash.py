"""Kill the server at random moments, start it again, and see whether it has kept its word.

    python -m tests.crash --rounds 200 [--seed N]

The server is a process of its own, reached over TCP and TLS. Nine people talk to it at once:
they change rosters and watch each other's pushes, keep private XML, change passwords, register
and remove accounts, ask for subscriptions and allow them, write to who is away. In each round
the process is killed with SIGKILL: some milliseconds after it is ready, at the very moment of an
answer, within a step on the disk, or while it starts, also several times in a row. Then it is started
again and everybody looks for what they were promised (DESIGN §5, "What acknowledged means"):

    an answer, a push       the change is there; what was under way may be there or not
    a stanza of somebody    both their rosters agree with it
    a ping's result         messages sent before it, to somebody away, are delivered, at least
                            once, in order; twice only if a crash fell into the delivery; and
                            never again after a ping that followed the delivery

Between death and restart every file is read: JSON is valid, journal lines have their checksums
and numbers, nothing was set aside but the torn end of a journal, and no turn is there by half:
no item without its version, no subscription with one end, nothing of an account that is gone.

Three kinds of rounds take turns at random:

    as it is      xmppd.py itself
    in a hurry    with a checkpoint every few kilobytes, so that kills meet them (see `tampered`)
    power cut     the same, and what no fsync covers is lost too; an fsync takes its time
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import xmppd
from tests.dialogue import CLIENT, PATIENCE, ROSTER, SASL, TLS, Event, SocketWire, StreamReader
from tests.servers import BUG, ProcessServer, ServerProcess

HOST = "example.org"
MAILBOXES = tuple(f"mailbox{number}" for number in range(4))  # accounts that are away most of the time
CONTACTS = tuple(f"contact{number}@elsewhere.example" for number in range(6))
MOMENTS = ("under load", "at an answer", "within a step on the disk")  # when the process is killed
LOAD_SECONDS = 1.0  # after "ready", at most
ANSWERS = 250  # of the server, at most
STEPS = 300  # of the disk, at most
START_SECONDS, START_STEPS = 0.3, 20  # the same for a kill during the start
JOURNAL = "journal=12000"  # bytes: some fifty changes
MODES: Mapping[str, tuple[str, ...]] = {
    "as it is": (),
    "in a hurry": (JOURNAL,),
    "power cut": (JOURNAL, "powercut", "sluggish"),
}
VALUES: Mapping[str, Any] = {
    "hosts": [HOST],
    "registration": {"open": True},
    "limits": {"offline": 1_000_000, "resources": 100},
}


def program(*words: str) -> Sequence[str]:
    """Return what to run instead of xmppd.py to have the server tampered with, for `ServerProcess`."""
    return (str(Path(__file__).with_name("tampered.py")), str(xmppd.__file__), ",".join(words)) if words else ()


# ---- What was promised ----------------------------------------------------------------


@dataclass
class Cell:
    """One thing that is changed over and over: what was tried since it was last read, and what of it is promised."""

    values: list[Any]  # the first is what was there, the others were tried, in this order
    floor: int = 0  # all before this one is history
    promises: int = 0  # answers that nobody has checked yet


@dataclass
class Letter:
    """A message to somebody away."""

    mailbox: str
    sender: str
    number: int  # per sender and mailbox
    acknowledged: bool = False
    delivered_in: int = -1  # the run of the server that delivered it last
    settled: bool = False  # its delivery was followed by a ping's result


class Ledger:
    """Everything that was tried and promised; all threads write into it. `answered` hears of each promise."""

    def __init__(self, answered: Callable[[], None]) -> None:
        self.answered = answered
        self.cells: dict[tuple[str, ...], Cell] = {}
        self.letters: dict[str, Letter] = {}  # by their text
        self.run = 0  # of the server; each start counts
        self.acknowledged = Counter[str]()  # promises, by what they are about
        self.checked = 0
        self.lost: list[str] = []
        self.problems: list[str] = []
        self.delivered = 0
        self.duplicates = 0
        self._lock = threading.RLock()

    def problem(self, text: str) -> None:
        """Note something that must not be."""
        with self._lock:
            self.problems.append(f"run {self.run}: {text}")

    def lose(self, text: str) -> None:
        """Note that a promise was broken."""
        with self._lock:
            self.lost.append(f"run {self.run}: {text}")

    # -- cells

    def cell(self, key: tuple[str, ...], value: Any = None) -> Cell:
        """Return the cell of a key; a new one holds `value`."""
        with self._lock:
            return self.cells.setdefault(key, Cell([value]))

    def tries(self, key: tuple[str, ...], value: Any) -> None:
        """Somebody is about to ask for this."""
        with self._lock:
            self.cell(key).values.append(value)

    def withdraws(self, key: tuple[str, ...]) -> None:
        """What was tried last was refused."""
        with self._lock:
            self.cell(key).values.pop()

    def promises(self, key: tuple[str, ...], value: Any) -> None:
        """The server says, to anybody, that this is stored."""
        with self._lock:
            cell = self.cell(key)
            at = next((at for at in reversed(range(len(cell.values))) if cell.values[at] == value), -1)
            if at < 0:
                return self.problem(f"{key}: {value!r} is told, which nobody wrote")
            if at > cell.floor:
                cell.floor = at
                cell.promises += 1
                self.acknowledged[key[0]] += 1
        self.answered()

    def holds(self, key: tuple[str, ...], value: Any) -> None:
        """After a restart, this is what is there."""
        with self._lock:
            cell = self.cell(key)
            if value not in cell.values[cell.floor :]:
                self.lose(f"{key}: {cell.values[cell.floor]!r} was acknowledged, {value!r} is there")
            self.checked += cell.promises
            self.cells[key] = Cell([value])

    def has_heard_all(self, key: tuple[str, ...]) -> None:
        """No answer or push about it is under way any more: history can be forgotten."""
        with self._lock:
            cell = self.cell(key)
            del cell.values[: cell.floor]
            cell.floor = 0

    def candidates(self, key: tuple[str, ...]) -> list[Any]:
        """Return what may be there now, the newest first."""
        with self._lock:
            cell = self.cell(key)
            return cell.values[: cell.floor - 1 if cell.floor else None : -1]

    # -- letters

    def writes(self, text: str, letter: Letter) -> None:
        """Somebody is about to send this."""
        with self._lock:
            self.letters[text] = letter

    def promises_delivery(self, texts: Sequence[str]) -> None:
        """A ping's result came after these."""
        with self._lock:
            for text in texts:
                self.letters[text].acknowledged = True
            self.acknowledged["message"] += len(texts)
        self.answered()

    def delivers(self, mailbox: str, text: str) -> None:
        """A message came out of a mailbox."""
        with self._lock:
            letter = self.letters.get(text)
            if letter is None or letter.mailbox != mailbox:
                return self.problem(f"{mailbox} got a message that nobody sent there: {text!r}")
            if letter.settled:
                return self.problem(f"{mailbox} got {text!r} again, which it had for good")
            if letter.delivered_in == self.run:
                return self.problem(f"{mailbox} got {text!r} twice without a crash")
            self.duplicates += letter.delivered_in >= 0
            self.delivered += 1
            letter.delivered_in = self.run

    def settles(self, mailbox: str) -> None:
        """The delivery is over: a ping's result came after it."""
        with self._lock:
            for text, letter in self.letters.items():
                if letter.mailbox == mailbox and not letter.settled:
                    letter.settled = True
                    self.checked += letter.acknowledged
                    if letter.acknowledged and letter.delivered_in < 0:
                        self.lose(f"{mailbox} never got {text!r}")


# ---- People ---------------------------------------------------------------------------


class Ended(Exception):
    """The connection is over."""


class Refused(Exception):
    """An error came back; the text is its condition."""


class Peer:
    """A client with one stream, lean enough that the server has most of the machine."""

    def __init__(self, port: int, server: ProcessServer) -> None:
        self.sent = 0
        self.on_stanza: Callable[[ET.Element], None] = lambda stanza: None  # is told of all that comes
        self._events: list[Event] = []
        self._reader = StreamReader()
        try:
            self.wire = SocketWire(("127.0.0.1", port), server.trust)
            self._open_stream()
            self.send(f"<starttls xmlns='{TLS}'/>")
            self._next()
            self.wire.start_tls(HOST)
        except OSError as error:
            raise Ended from error
        self._open_stream()

    def _open_stream(self) -> None:
        self._reader = StreamReader()
        header = f"<?xml version='1.0'?><stream:stream xmlns='{CLIENT}' to='{HOST}' version='1.0' "
        self.send(f"{header}xmlns:stream='http://etherx.jabber.org/streams'>")
        while "features" not in self._next().element.tag:
            pass

    def login(self, name: str, password: str, resource: str = "here") -> bool:
        """Log in and bind; False when the password is wrong."""
        initial = base64.b64encode(f"\0{name}\0{password}".encode()).decode()
        self.send(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{initial}</auth>")
        if self._next().element.tag != f"{{{SASL}}}success":
            return False
        self._open_stream()
        bind = f"<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>{resource}</resource></bind>"
        self.request(bind, kind="set")
        return True

    def send(self, text: str) -> None:
        """Send stanzas; raises Ended."""
        try:
            self.wire.send(text.encode())
        except OSError as error:  # the wire itself takes care of resets only
            raise Ended from error

    def ask(self, payload: str, *, kind: str = "get", to: str = "") -> str:
        """Send a request without waiting; returns its id."""
        self.sent += 1
        address = f" to='{to}'" if to else ""
        self.send(f"<iq type='{kind}' id='q{self.sent}'{address}>{payload}</iq>")
        return f"q{self.sent}"

    def answer(self, id: str) -> ET.Element:
        """Read up to the answer; raises Refused."""
        found = self.read_until(lambda s: s.tag == f"{{{CLIENT}}}iq" and s.get("id") == id and s.get("type") != "set")
        if found.get("type") == "error":
            error = found.find(f"{{{CLIENT}}}error")
            raise Refused("unknown" if error is None else " ".join(child.tag.rpartition("}")[2] for child in error))
        return found

    def request(self, payload: str, *, kind: str = "get", to: str = "") -> ET.Element:
        """Ask and read up to the answer."""
        return self.answer(self.ask(payload, kind=kind, to=to))

    def ping(self) -> None:
        """Pass a barrier: what was sent before is handled, and durable."""
        self.request("<ping xmlns='urn:xmpp:ping'/>", to=HOST)

    def read_until(self, condition: Callable[[ET.Element], bool]) -> ET.Element:
        """Read up to a stanza; it and those before it go to `on_stanza`."""
        while True:
            stanza = self._next().element
            self.on_stanza(stanza)
            if condition(stanza):
                return stanza

    def leave(self) -> None:
        """Close the stream and wait until the server has noticed."""
        self.send("</stream:stream>")
        while self._next(ended=False).kind not in ("footer", "end"):
            pass
        self.wire.close()

    def _next(self, *, ended: bool = True) -> Event:
        while not self._events:
            try:
                data = self.wire.read(PATIENCE)
            except OSError as error:
                raise Ended from error
            if data is None:
                raise AssertionError(f"nothing came for {PATIENCE:.0f} seconds")
            self._events = self._reader.feed(data) if data else [Event("end", ET.Element("end"))]
        event = self._events.pop(0)
        if ended and event.kind in ("footer", "end"):
            raise Ended
        return event


class Person:
    """Somebody who does the same kind of thing until the server dies; `check` comes first, after each restart."""

    def __init__(self, trial: Trial, *accounts: str) -> None:
        self.trial = trial
        self.ledger = trial.ledger
        self.accounts = accounts
        self.random = random.Random(f"{trial.seed} {type(self).__name__} {accounts}")
        self.peers: list[Peer] = []
        self.serial = 0  # never the same value twice

    def live(self) -> None:
        """Run in a thread of one's own until the connection ends."""
        try:
            self.check()
            while not self.trial.is_over:
                self.act()
        except Ended:
            if not self.trial.killed.wait(1):  # the news of its death may come a little later
                self.ledger.problem(f"{type(self).__name__}: the server hung up")
        except Exception as error:  # a thread's end must not go unnoticed
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.ledger.problem(f"{type(self).__name__}: {error!r} in line {where.lineno}, {where.name}")
        finally:
            for peer in self.peers:
                peer.wire.close()
            self.peers.clear()

    def check(self) -> None:
        """Connect, and compare what is there with what was promised."""
        raise NotImplementedError

    def act(self) -> None:
        """Change something."""
        raise NotImplementedError

    def connect(self) -> Peer:
        """Return a stream inside TLS."""
        peer = Peer(self.trial.server.port, self.trial.server)
        self.peers.append(peer)
        return peer

    def log_in(self, name: str, resource: str = "here") -> Peer:
        """Return a session with the password that never changes."""
        peer = self.connect()
        assert peer.login(name, password_of(name), resource), f"{name} cannot log in"
        return peer

    def fresh(self) -> str:
        """Return a value that was never written before."""
        self.serial += 1
        return f"{self.serial}"


def password_of(name: str) -> str:
    """Return the first password of an account."""
    return f"{name}-secret"


def roster_of(peer: Peer) -> ET.Element:
    """Ask for the roster: its <query/>."""
    return peer.request(f"<query xmlns='{ROSTER}'/>")[0]


def items_of(query: ET.Element) -> dict[str, ET.Element]:
    """Return the items of a roster or of a push, by address."""
    return {item.get("jid", ""): item for item in query}


def pushed(push: ET.Element) -> tuple[str, str | None]:
    """Return what a roster push says: the contact, and the name that it has now; None: it is removed."""
    [item] = push[0]
    return item.get("jid", ""), None if item.get("subscription") == "remove" else item.get("name")


class RosterKeeper(Person):
    """Changes a roster in one session and watches the pushes in another: both are promises."""

    def __init__(self, trial: Trial, name: str) -> None:
        super().__init__(trial, name)
        self.name = name
        self.version = 0  # the highest ever seen

    def check(self) -> None:
        self.writer, self.watcher = self.log_in(self.name), self.log_in(self.name, "there")
        query = roster_of(self.writer)
        roster_of(self.watcher)
        items = items_of(query)
        for contact in CONTACTS:
            item = items.get(contact)
            self.ledger.holds(("roster", self.name, contact), None if item is None else item.get("name"))
        if int(query.get("ver", "")) < self.version:
            self.ledger.lose(f"{self.name}: version {self.version} was told, {query.get('ver')} is there")
        self.writer.on_stanza = functools.partial(self.hear, [self.version])
        self.watcher.on_stanza = functools.partial(self.hear, [self.version])

    def hear(self, last: list[int], stanza: ET.Element) -> None:
        """A push; `last` is the version of the one before it on this stream."""
        if stanza.get("type") != "set":
            return
        version = int(stanza[0].get("ver", ""))
        if version <= last[0]:
            self.ledger.problem(f"{self.name}: version {version} came after {last[0]}")
        last[0] = version
        self.version = max(self.version, version)
        contact, name = pushed(stanza)
        self.ledger.promises(("roster", self.name, contact), name)

    def act(self) -> None:
        asked = []
        for _ in range(self.random.randint(1, 5)):
            contact = self.random.choice(CONTACTS)
            key = ("roster", self.name, contact)
            remove = None not in self.ledger.cell(key).values and self.random.random() < 0.2  # or a push were ambiguous
            value = None if remove else self.fresh()
            self.ledger.tries(key, value)
            words = "subscription='remove'" if remove else f"name='{value}'"
            query = f"<query xmlns='{ROSTER}'><item jid='{contact}' {words}/></query>"
            asked.append((self.writer.ask(query, kind="set"), key, value))
        watched_first = self.random.random() < 0.5
        if watched_first:
            self.watch(*asked[-1][1:])
        for id, key, value in asked:
            self.writer.answer(id)
            self.ledger.promises(key, value)
        if not watched_first:
            self.watch(*asked[-1][1:])
        for key in {key for _, key, _ in asked}:
            self.ledger.has_heard_all(key)

    def watch(self, key: tuple[str, ...], value: str | None) -> None:
        """Read in the other session up to the push of this change."""
        self.watcher.read_until(lambda stanza: stanza.get("type") == "set" and pushed(stanza) == (key[-1], value))


class Settler(Person):
    """Keeps private XML, and changes the password now and then."""

    def __init__(self, trial: Trial, name: str) -> None:
        super().__init__(trial, name)
        self.name = name

    def check(self) -> None:
        key = ("password", self.name)
        self.ledger.cell(key, password_of(self.name))
        for password in self.ledger.candidates(key):
            self.peer = self.connect()
            if self.peer.login(self.name, password):
                self.ledger.holds(key, password)
                break
        else:
            self.ledger.lose(f"{self.name}: no password is right that may be")
            raise AssertionError(f"{self.name} cannot log in")
        for number in range(4):
            query = f"<query xmlns='jabber:iq:private'><stored xmlns='urn:test:{number}'/></query>"
            self.ledger.holds(("private", self.name, str(number)), self.peer.request(query)[0][0].text)

    def act(self) -> None:
        if self.random.random() < 0.15:
            return self.change_password()
        asked = []
        for _ in range(self.random.randint(1, 5)):
            number, value = str(self.random.randrange(4)), self.fresh()
            key = ("private", self.name, number)
            self.ledger.tries(key, value)
            query = f"<query xmlns='jabber:iq:private'><stored xmlns='urn:test:{number}'>{value}</stored></query>"
            asked.append((self.peer.ask(query, kind="set"), key, value))
        for id, key, value in asked:
            self.peer.answer(id)
            self.ledger.promises(key, value)

    def change_password(self) -> None:
        key, password = ("password", self.name), f"{self.name}-{self.fresh()}"
        self.ledger.tries(key, password)
        words = f"<username>{self.name}</username><password>{password}</password>"
        self.peer.request(f"<query xmlns='jabber:iq:register'>{words}</query>", kind="set")
        self.ledger.promises(key, password)


class Writer(Person):
    """Writes to people who are away; the result of a ping says that the messages are safe."""

    def __init__(self, trial: Trial, name: str) -> None:
        super().__init__(trial, name)
        self.name = name

    def check(self) -> None:
        self.peer = self.log_in(self.name)

    def act(self) -> None:
        mailbox = self.random.choice(MAILBOXES)
        if not self.trial.away[mailbox].acquire(timeout=0.01):
            return self.peer.ping()  # somebody is reading it, or about to be written to
        try:
            self.write(mailbox)
        finally:
            self.trial.away[mailbox].release()

    def write(self, mailbox: str) -> None:
        texts = []
        for _ in range(self.random.randint(1, 8)):
            number = self.fresh()
            texts.append(f"{self.name} {mailbox} {number}")
            self.ledger.writes(texts[-1], Letter(mailbox, self.name, int(number)))
            self.peer.send(f"<message to='{mailbox}@{HOST}' type='chat'><body>{texts[-1]}</body></message>")
        self.peer.ping()
        self.ledger.promises_delivery(texts)


class Reader(Person):
    """Comes online as one of those who are away, reads, and leaves."""

    def check(self) -> None:
        """There is nothing to compare before somebody reads."""

    def act(self) -> None:
        mailbox = self.random.choice(MAILBOXES)
        with self.trial.away[mailbox]:
            self.read(mailbox)

    def read(self, mailbox: str) -> None:
        """Empty a mailbox."""
        peer = self.log_in(mailbox)
        peer.on_stanza = functools.partial(self.take, mailbox, {})
        peer.send("<presence/>")
        peer.ping()  # its result comes after the messages
        peer.ping()  # this one after their removal
        self.ledger.settles(mailbox)
        peer.leave()
        self.peers.remove(peer)

    def take(self, mailbox: str, numbers: dict[str, int], stanza: ET.Element) -> None:
        """A stanza came; `numbers` are the last ones of each sender."""
        if stanza.tag != f"{{{CLIENT}}}message":
            return
        text = stanza.findtext(f"{{{CLIENT}}}body") or ""
        delay = stanza.find("{urn:xmpp:delay}delay")
        if delay is None:
            self.ledger.problem(f"{text!r} doesn't say since when it waits")
        sender, _, number = text.split(" ")
        if int(number) <= numbers.get(sender, 0):
            self.ledger.problem(f"{text!r} came after number {numbers[sender]}")
        numbers[sender] = int(number)
        self.ledger.delivers(mailbox, text)


class Registrar(Person):
    """Registers accounts and removes some of them, with what they had."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.unproven: list[str] = []  # registered in the last run
        self.registered: list[str] = []

    def check(self) -> None:
        users, unproven = self.users(), self.unproven
        for key in [key for key in self.ledger.cells if key[0] == "account"]:
            self.ledger.holds(key, f"{key[1]}@{HOST}" in users)
        self.registered = [name for name in self.registered if f"{name}@{HOST}" in users]
        self.unproven = []
        for name in unproven:
            if f"{name}@{HOST}" in users:
                self.leave(self.log_in(name))

    def users(self) -> set[str]:
        """Ask for all accounts, as the command line does."""
        try:
            with xmppd.ControlClient(self.trial.server.data) as control:
                return set(control.request("user list", {})["users"])
        except (xmppd.ConfigError, xmppd.ServerAbsent, OSError, ValueError) as error:  # ValueError: half an answer
            raise Ended from error

    def act(self) -> None:
        if self.registered and self.random.random() < 0.4:
            self.remove(self.registered.pop(self.random.randrange(len(self.registered))))
        else:
            self.register(f"newcomer{self.fresh()}")

    def register(self, name: str) -> None:
        key, peer = ("account", name), self.connect()
        self.ledger.cell(key, False)
        self.ledger.tries(key, True)
        self.unproven.append(name)
        words = f"<username>{name}</username><password>{password_of(name)}</password>"
        try:
            peer.request(f"<query xmlns='jabber:iq:register'>{words}</query>", kind="set")
        except Refused as error:
            assert "not-acceptable" in str(error), error  # too many in a minute, when nobody tampers with the limit
            self.ledger.withdraws(key)
            self.unproven.remove(name)
            return self.leave(peer)
        self.ledger.promises(key, True)
        self.registered.append(name)
        self.leave(peer)

    def remove(self, name: str) -> None:
        """Remove an account; first give it something to leave behind."""
        key, peer = ("account", name), self.log_in(name)
        peer.request(f"<query xmlns='{ROSTER}'><item jid='{CONTACTS[0]}'/></query>", kind="set")
        peer.request("<query xmlns='jabber:iq:private'><stored xmlns='urn:test:0'>x</stored></query>", kind="set")
        peer.send(f"<presence/><presence type='unavailable'/><message to='{name}@{HOST}'><body>me</body></message>")
        self.ledger.tries(key, False)
        peer.request("<query xmlns='jabber:iq:register'><remove/></query>", kind="set")
        self.ledger.promises(key, False)
        peer.wire.close()
        self.peers.remove(peer)

    def leave(self, peer: Peer) -> None:
        peer.leave()
        self.peers.remove(peer)


class Couple(Person):
    """One asks for a subscription, the other allows it, one of them ends it; both rosters always agree."""

    KEY: ClassVar[tuple[str, ...]] = ("subscription", "romeo", "juliet")
    STATES: ClassVar[Mapping[tuple[Any, ...], str]] = {
        (("none", False), "none", False): "strangers",
        (("none", True), "none", True): "asked",
        (("to", False), "from", False): "allowed",
    }
    def check(self) -> None:
        self.romeo, self.juliet = self.log_in("romeo"), self.log_in("juliet")
        requests: list[ET.Element] = []
        self.juliet.on_stanza = lambda s: requests.append(s) if s.get("type") == "subscribe" else None
        his = items_of(roster_of(self.romeo)).get(f"juliet@{HOST}", ET.Element("item", subscription="none"))
        hers = items_of(roster_of(self.juliet)).get(f"romeo@{HOST}", ET.Element("item", subscription="none"))
        self.juliet.send("<presence/>")
        self.juliet.ping()
        self.juliet.on_stanza = lambda stanza: None
        found = (his.get("subscription"), his.get("ask") == "subscribe"), hers.get("subscription"), bool(requests)
        if found not in self.STATES:
            self.ledger.problem(f"romeo's and juliet's rosters disagree: {found}")
        self.ledger.cell(self.KEY, "strangers")
        self.ledger.holds(self.KEY, self.STATES.get(found))

    def act(self) -> None:
        state = self.ledger.cell(self.KEY).values[-1]
        if state == "strangers":
            self.tell(self.romeo, self.juliet, "subscribe", "asked")
        elif state == "asked":
            type = self.random.choice(("subscribed", "subscribed", "unsubscribed"))
            self.tell(self.juliet, self.romeo, type, "allowed" if type == "subscribed" else "strangers")
        elif self.random.random() < 0.5:
            self.tell(self.romeo, self.juliet, "unsubscribe", "strangers")
        else:
            self.tell(self.juliet, self.romeo, "unsubscribed", "strangers")

    def tell(self, one: Peer, other: Peer, type: str, then: str) -> None:
        """Let one say something and the other hear it: that it is heard is the promise."""
        self.ledger.tries(self.KEY, then)
        to = "juliet" if other is self.juliet else "romeo"
        one.send(f"<presence type='{type}' to='{to}@{HOST}'/>")
        ways: list[Callable[[], object]] = [one.ping, lambda: other.read_until(lambda stanza: stanza.get("type") == type)]
        self.random.shuffle(ways)
        for way in ways:  # both, or the next one would read this one's stanza
            way()
            self.ledger.promises(self.KEY, then)


# ---- Files ----------------------------------------------------------------------------


@dataclass
class Folder:
    """What is in a data folder, read by other means than xmppd's."""

    problems: list[str] = field(default_factory=list)
    documents: dict[tuple[str, str], Any] = field(default_factory=dict)  # by kind and owner; {} for what is empty
    logs: set[tuple[str, str]] = field(default_factory=set)
    journals: int = 0
    changes: int = 0  # in the journals
    torn: bool = False  # the newest journal ends within a line
    unfinished: int = 0  # files that were being written
    set_aside: int = 0  # torn ends of journals, kept by a recovery


def read_folder(data: Path) -> Folder:
    """Read all files of a data folder, and say what is wrong with them."""
    folder = Folder()
    for path in sorted(data.rglob("*")):
        name = path.relative_to(data).as_posix()
        try:
            if path.is_file() and not re.fullmatch(r"tls/.*|control\.json|\.lock|\.reserve|journal-\d{6}\.jsonl", name):
                _read_file(folder, path, name)
        except FileNotFoundError:
            pass  # a running server has just removed it
    _read_journals(folder, sorted(data.glob("journal-*.jsonl")))
    return folder


def _read_file(folder: Folder, path: Path, name: str) -> None:
    *where, file = name.split("/")
    if ".broken-" in file:
        folder.set_aside += 1
        if not re.fullmatch(r"journal-\d{6}\.jsonl\.broken-.*", name):
            folder.problems.append(f"{name} was set aside")
    elif file.endswith(".new"):
        folder.unfinished += 1
    elif file.endswith(".json") and len(where) in (1, 2):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            return folder.problems.append(f"{name}: {error}")
        kind, owner = (where[1], f"{unquote(file[:-5])}@{where[0]}") if len(where) == 2 else (file[:-5], where[0])
        folder.documents[kind, owner] = document
    elif file.endswith(".jsonl") and len(where) in (2, 3):  # three: one month of an archive
        local, *part = [*where[2:], file[:-6]]
        folder.logs.add((where[1], "/".join([f"{unquote(local)}@{where[0]}", *part])))
        folder.problems += [f"{name}: {problem}" for problem in _log_problems(path.read_bytes())]
    else:
        folder.problems.append(f"{name} belongs to nothing")


def _log_problems(data: bytes) -> Iterator[str]:
    """Yield what is wrong with a log's file; its last line may be torn, as the journal still has it."""
    head, *lines = data.split(b"\n")[:-1] or [b""]
    try:
        assert json.loads(head).keys() == {"log", "generation", "start"}
        for line in lines:
            json.loads(line)
    except (ValueError, AssertionError) as error:
        yield f"{error} in {data[:200]!r}"


def _read_journals(folder: Folder, paths: Sequence[Path]) -> None:
    """Read the lines and do what they say, as far as documents go."""
    sequence = 0
    for path in paths:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            continue
        folder.journals += 1
        for at, line in enumerate(lines):
            body = line[18:]
            if line[:18] != b'{"crc":"%08x",' % zlib.crc32(body) or not line.endswith(b"\n"):
                folder.torn = path == paths[-1]
                if at + 1 < len(lines) or not folder.torn:
                    folder.problems.append(f"{path.name}: line {at + 1} of {len(lines)} is bad: {line[:100]!r}")
                break
            turn = json.loads(line)
            if sequence and turn["seq"] != sequence + 1:
                folder.problems.append(f"{path.name}: line {turn['seq']} comes after {sequence}")
            sequence = turn["seq"]
            for change in turn["changes"]:
                folder.changes += 1
                _apply(folder, *change)


def _apply(folder: Folder, verb: str, kind: str, owner: str, *values: Any) -> None:
    key = kind, owner
    if verb == "set":
        folder.documents[key] = values[0] or {}
    elif verb == "put":
        document = {**folder.documents.get(key, {}), values[0]: values[1]}
        folder.documents[key] = {name: item for name, item in document.items() if item is not None}
    elif verb == "append" or (verb == "rewrite" and values[1]):
        folder.logs.add(key)
    elif verb == "rewrite":
        folder.logs.discard(key)


def half_turns(folder: Folder) -> Iterator[str]:
    """Yield what cannot be unless only a part of a turn has survived."""
    accounts = {owner for (kind, owner), document in folder.documents.items() if kind == "accounts" and document}
    for kind, owner in {key for key, document in folder.documents.items() if document} | folder.logs:
        if "@" in owner and owner.partition("/")[0] not in accounts:
            yield f"{owner} has no account, but {kind}"
    for (kind, owner), roster in folder.documents.items():
        if kind == "roster":
            yield from _roster_problems(folder, accounts, owner, roster)


def _roster_problems(folder: Folder, accounts: set[str], owner: str, roster: Mapping[str, Any]) -> Iterator[str]:
    versions = [item.get("ver") for item in roster.values()]
    if not all(isinstance(version, int) for version in versions) or len(set(versions)) < len(versions):
        yield f"{owner}'s roster has the versions {versions}"
    for contact, item in roster.items():
        if contact not in accounts:
            continue
        hers = folder.documents.get(("roster", contact), {}).get(owner, {"subscription": "none"})
        sees, is_seen = item["subscription"] in ("to", "both"), hers["subscription"] in ("from", "both")
        asks, is_asked = item.get("ask", False), owner in folder.documents.get(("requests", contact), {})
        if (sees, asks) != (is_seen, is_asked):
            yield f"{owner} has {item}, {contact} has {hers}, request: {is_asked}"


# ---- Rounds ---------------------------------------------------------------------------


class Trial:
    """Rounds of load, death and restart; `report` is the outcome, `is_passed` the verdict."""

    def __init__(self, folder: Path, seed: int, values: Mapping[str, Any] = VALUES) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.server = ProcessServer(folder, values)
        self.ledger = Ledger(self._count_answer)
        self.away = {name: threading.Lock() for name in MAILBOXES}  # held by who writes there or reads
        self.killed = threading.Event()
        self.is_over = False  # the last round ends without a kill
        self.moments = Counter[str]()  # of kills
        self.found = Counter[str]()  # what the killed process was in the middle of
        self.recoveries: list[float] = []  # seconds from the start of the process to "ready"
        self.rounds = 0
        self.seconds = 0.0
        self._moment = ""  # of the next kill
        self._answers_left = 0  # until the kill; 0: the kill does not wait for answers
        self._lock = threading.Lock()
        self.people: list[Person] = [
            *(RosterKeeper(self, f"keeper{number}") for number in range(2)),
            *(Settler(self, f"settler{number}") for number in range(2)),
            *(Writer(self, f"writer{number}") for number in range(2)),
            Reader(self), Registrar(self), Couple(self, "romeo", "juliet"),
        ]  # fmt: skip

    def run(self, rounds: int, modes: Sequence[str] = tuple(MODES)) -> Trial:
        """Run so many rounds and one without a kill; returns the trial itself."""
        began = time.monotonic()
        self._make_accounts()
        while self.rounds < rounds:
            mode = MODES[self.random.choice(modes)]
            self._kill_while_starting(mode)
            if self._start(mode):
                self._live()
                self.rounds += 1
            self._look_at_the_dead()
        self._end()
        self.seconds = time.monotonic() - began
        return self

    def _make_accounts(self) -> None:
        names = [*MAILBOXES, *(name for person in self.people for name in person.accounts)]
        self.server.program = program(JOURNAL)  # has the bytecode made, so that it isn't part of the first recovery
        self.server.start()
        for name in names:
            with xmppd.ControlClient(self.server.data) as control:
                arguments = {"jid": f"{name}@{HOST}", "credentials": xmppd.make_credentials(password_of(name))}
                control.request("user add", arguments)
            self.ledger.cell(("account", name), True)
        self.server.stop()

    def _kill_while_starting(self, mode: Sequence[str]) -> None:
        """Start and kill, some times, none most often; by the clock, or in the middle of a step on the disk."""
        while self.random.random() < 0.35:
            die = (f"die={self.random.randint(1, START_STEPS)}",) if self.random.random() < 0.5 else ()
            process = ServerProcess(self.server.config, self.server.data, program(*mode, *die))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(START_SECONDS * (1 if die else self.random.random()))
            self._bury(process)
            self.moments["while it starts"] += 1
            self._look_at_the_dead()

    def _start(self, mode: Sequence[str]) -> bool:
        """Start, having decided on the moment of the end; False if that came before the server was ready."""
        self._moment = "" if self.is_over else self.random.choice(MOMENTS)
        die = (f"die={self.random.randint(1, STEPS)}",) if self._moment == "within a step on the disk" else ()
        self._answers_left = self.random.randint(1, ANSWERS) if self._moment == "at an answer" else 0
        self.server.program = program(*mode, *die)
        self.killed.clear()
        self.ledger.run += 1
        began = time.monotonic()
        try:
            self.server.start()
        except AssertionError:
            if not die:
                raise
            self.moments["while it starts"] += 1
            return False
        self.recoveries.append(time.monotonic() - began)
        for problem in read_folder(self.server.data).problems:
            self.ledger.problem(f"just after the start: {problem}")
        return True

    def _live(self) -> None:
        """Let people live until the kill, and until they have noticed."""
        process = self.server.process
        people = [threading.Thread(target=person.live, daemon=True) for person in self.people]
        death = threading.Thread(target=self._await_death, args=(process,), daemon=True)
        for thread in (death, *people):
            thread.start()
        in_time = self.killed.wait(LOAD_SECONDS * (self.random.random() if self._moment == "under load" else 2))
        self.moments[self._moment if in_time else "under load"] += 1
        self.kill()
        for thread in (death, *people):
            thread.join(2 * PATIENCE)
            assert not thread.is_alive(), "somebody hasn't noticed that the server is dead"
        self._bury(process)

    def _await_death(self, process: ServerProcess) -> None:
        process.process.wait()
        self.killed.set()

    def _bury(self, process: ServerProcess) -> None:
        """Wait until a process is gone, and look into its log for why, and for bugs that it survived."""
        process.kill()
        if process.process.returncode != -signal.SIGKILL:
            self.ledger.problem(f"the server ended by itself:\n{process.log()}")
        for line in process.lines:
            if BUG.search(line):
                self.ledger.problem(f"in the log: {line}")

    def _count_answer(self) -> None:
        """A promise was made: is this the moment?"""
        with self._lock:
            if not self._answers_left:
                return
            self._answers_left -= 1
            due = not self._answers_left
        if due:
            self.kill()

    def kill(self) -> None:
        """End the process as a power cut does; any thread."""
        with self._lock:
            self._answers_left = 0
            self.killed.set()
        self.server.process.process.kill()

    def _look_at_the_dead(self) -> None:
        """Read what the killed process has left."""
        folder = read_folder(self.server.data)
        for problem in (*folder.problems, *half_turns(folder)):
            self.ledger.problem(f"after the kill: {problem}")
        self.found["a checkpoint"] += folder.journals > 1
        self.found["a line of the journal"] += folder.torn
        self.found["a file"] += folder.unfinished > 0

    def _end(self) -> None:
        """Start once more, let everybody compare, empty all mailboxes, end politely, and read all files."""
        self.is_over = True
        self._start(())
        for person in self.people:
            person.live()
        reader = next(person for person in self.people if isinstance(person, Reader))
        for mailbox in MAILBOXES:
            reader.read(mailbox)
        self.server.stop()
        folder = read_folder(self.server.data)
        for problem in (*folder.problems, *half_turns(folder)):
            self.ledger.problem(f"after the end: {problem}")
        if folder.changes or folder.journals != 1 or folder.unfinished:
            self.ledger.problem(f"after the end: {folder.journals} journals, {folder.changes} changes, {folder.unfinished} .new")

    # -- the outcome

    @property
    def is_passed(self) -> bool:
        """Whether every promise was kept, and nothing odd was seen."""
        return not self.ledger.lost and not self.ledger.problems

    def report(self) -> str:
        """Return the figures, and what was wrong."""
        ledger, starts = self.ledger, sorted(self.recoveries)
        by_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(ledger.acknowledged.items()))
        lines = [
            f"seed {self.seed}: {self.rounds} rounds in {self.seconds:.0f} s",
            f"acknowledged: {sum(ledger.acknowledged.values())} changes ({by_kind})",
            f"checked: {ledger.checked}; lost: {len(ledger.lost)}; other problems: {len(ledger.problems)}",
            f"messages delivered: {ledger.delivered}, of these again after an interrupted delivery: {ledger.duplicates}",
            f"start to ready: median {statistics.median(starts):.2f} s, longest {starts[-1]:.2f} s",
            f"kills: {self.moments.total()}, " + ", ".join(f"{n} {name}" for name, n in self.moments.most_common()),
            "found in the middle of: " + ", ".join(f"{name} {n}" for name, n in self.found.most_common()),
        ]
        return "\n".join([*lines, *ledger.lost[:20], *ledger.problems[:20]])


def main() -> int:
    """The command line; the exit status is 0 if nothing was lost."""
    parser = argparse.ArgumentParser("python -m tests.crash", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"{options.rounds} rounds, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="xmppd-crash-") as folder:
        trial = Trial(Path(folder), options.seed).run(options.rounds)
    print(trial.report())
    return 0 if trial.is_passed else 1


if __name__ == "__main__":
    sys.exit(main())
