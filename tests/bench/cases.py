"""What is measured. To add a case: write a class with `rows` and `run`, and put it into `CASES`.

A case gets a `Trial` (a running server and a load generator), connects whom it needs,
keeps the server busy, checks every delivery, and returns one value for each of its rows.
A delivery is checked by a number in its text: the receiver knows which one comes next from
each sender, so nothing can be lost, doubled, changed in order or given to somebody else.
"""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from tests.bench.accounting import KIB, resident_bytes
from tests.bench.load import IQ_RESULT, BenchError, Client, Load, Script
from tests.bench.people import AWAY, CONTACTS, EVERYBODY, HOST, PRESENT, TALKERS, bare_jid, contacts_of, full_jid
from tests.bench.trial import DRAIN_TIMEOUT, Trial

WITH_ACCOUNTS = ("xmppd", "prosody", "ejabberd")  # the floor has neither accounts nor answers
MESSAGE_SIZE = 330  # bytes of a chat message as real clients send it: ids, receipt request, marker, a sentence
WINDOW = 2  # messages of each sender that are under way
LATENCY_RATE = 200  # messages per second


class Row(NamedTuple):
    """One line of the report, and what was promised of it."""

    key: str
    title: str
    unit: str
    peer: float | None = None  # at most so much of the better peer's
    floor: float | None = None  # at most so much of the floor's
    most: float | None = None  # at most so much, in `unit`


class Case(ABC):
    """One kind of load."""

    name: ClassVar[str]  # for --only
    rows: ClassVar[Sequence[Row]]
    servers: ClassVar[Sequence[str]] = WITH_ACCOUNTS
    fresh: ClassVar[bool] = False  # wants a server that was started just now

    @abstractmethod
    def run(self, trial: Trial) -> Sequence[float]:
        """Return the value of each row."""


# -- messages


def check(is_right: bool, client: Client, expected: bytes, piece: bytes) -> None:
    """Raise BenchError with what came in instead of what was expected."""
    if not is_right:
        raise BenchError(f"{client.full.decode()}: expected {expected.decode()}, found {piece[-500:]!r}")


def chat_message(to: str) -> bytes:
    """Return a template for a message of MESSAGE_SIZE bytes, with the place of its number twice."""
    start = f"<message to='{to}' type='chat' id='m%06d'><body>#%06d# ".encode()
    end = (
        b"</body><active xmlns='http://jabber.org/protocol/chatstates'/><request xmlns='urn:xmpp:receipts'/>"
        b"<markable xmlns='urn:xmpp:chat-markers:0'/></message>"
    )
    words = b"Shall I hear more, or shall I speak at this? " * 8
    size = len(start % (0, 0)) + len(end)
    return start + words[: MESSAGE_SIZE - size] + end


class Talker:
    """One end of a pair: sends messages, answers each of the partner's with a receipt and a marker."""

    def __init__(self, client: Client, partner: int) -> None:
        self.client = client
        self.load: Load = client.load
        self.sent = self.received = 0  # stanzas of all kinds
        to = full_jid(partner)
        self._partner = to.encode()
        self._message = chat_message(to)
        self._receipt = (
            f"<message to='{to}' type='chat' id='r%06d'><received xmlns='urn:xmpp:receipts' id='m%06d'/></message>"
        ).encode()
        self._marker = (
            f"<message to='{to}' type='chat' id='d%06d'>"
            "<displayed xmlns='urn:xmpp:chat-markers:0' id='m%06d'/></message>"
        ).encode()
        self._next = self._heard = self._receipts = self._markers = 0  # numbers of the next message of each kind
        client.expect(b"</message>", self.take)

    def say(self) -> None:
        """Send the next message."""
        self.client.send(self._message % (self._next, self._next))
        self._next += 1
        self.sent += 1

    def take(self, piece: bytes) -> None:
        """Check a message and do what it calls for."""
        check(self._partner in piece, self.client, self._partner, piece)
        self.received += 1
        if b"<body>" in piece:
            number = self._heard
            check(b"#%06d#" % number in piece, self.client, b"#%06d#" % number, piece)
            self._heard = number + 1
            self.client.send(self._receipt % (number, number))
            self.client.send(self._marker % (number, number))
            self.sent += 2
            return
        is_receipt = b"<received" in piece
        number = self._receipts if is_receipt else self._markers
        check(b"m%06d" % number in piece, self.client, b"the next receipt or marker", piece)
        if is_receipt:
            self._receipts += 1
        else:
            self._markers += 1
            if not self.load.stopping:
                self.say()


class Chat(Case):
    """100 pairs talk, both ways at once; each message is answered by a receipt (XEP-0184) and a marker (XEP-0333)."""

    name = "chat"
    servers = ("floor", *WITH_ACCOUNTS)
    rows = (
        Row("chat", f"chat: {MESSAGE_SIZE}-byte messages, receipts, markers; per delivery", "µs", peer=0.35, floor=1.8),
    )
    talker: ClassVar[type[Talker]] = Talker

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`; the unit is a stanza delivered."""
        clients = trial.connect(TALKERS, available=True)
        talkers = [self.talker(client, client.number ^ 1) for client in clients]
        for talker in talkers:
            for _ in range(WINDOW):
                talker.say()
        cost = trial.steady(
            lambda: sum(talker.received for talker in talkers),
            lambda: sum(talker.sent for talker in talkers) == sum(talker.received for talker in talkers),
            "the last messages",
        )
        return [cost]


class ShortTalker(Talker):
    """Sends a short message for each that comes in."""

    def __init__(self, client: Client, partner: int) -> None:
        super().__init__(client, partner)
        start = f"<message to='{full_jid(partner)}' type='chat' id='m%06d'>"
        self._message = f"{start}<body>#%06d#</body></message>".encode()

    def take(self, piece: bytes) -> None:
        """Check a message and answer it."""
        check(self._partner in piece, self.client, self._partner, piece)
        check(b"#%06d#" % self._heard in piece, self.client, b"#%06d#" % self._heard, piece)
        self._heard += 1
        self.received += 1
        if not self.load.stopping:
            self.say()


class Small(Chat):
    """100 pairs exchange messages of a hundred bytes without anything else."""

    name = "small"
    rows = (Row("small", "chat: 100-byte messages; per delivery", "µs"),)
    talker = ShortTalker


SM = b"xmlns='urn:xmpp:sm:3'"
ASK_EVERY = 5  # messages; as slixmpp


class ManagedClient:
    """A client with stream management and copies: it counts, answers each question, and asks now and then."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.handled = 0

    def enable(self) -> Script:
        """The script that switches both on."""
        self.client.send(b"<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq>")
        yield IQ_RESULT
        self.client.send(b"<enable %b resume='true'/>" % SM)
        yield re.compile(rb"<enabled[^>]*>")

    def listen(self) -> None:
        """From now on, count."""
        self.client.expect(b"</message>", self.take)

    def take(self, piece: bytes) -> None:
        """Answer what stands in front of a message, then count the message; of a copy the inner end counts."""
        if b"<r xmlns" in piece:
            self.client.send(b"<a %b h='%d'/>" % (SM, self.handled))
        if b"<body>" in piece:
            self.handled += 1
            self.heard(piece)

    def heard(self, piece: bytes) -> None:
        """Do what a message calls for."""


class ManagedTalker(ManagedClient):
    """Answers each message by the next one."""

    def __init__(self, client: Client, partner: int) -> None:
        super().__init__(client)
        self._partner = full_jid(partner).encode()
        self._message = chat_message(full_jid(partner))
        self._next = self._heard = 0

    def say(self) -> None:
        """Send the next message, and sometimes a question."""
        question = b"<r %b/>" % SM if self._next % ASK_EVERY == 0 else b""
        self.client.send(self._message % (self._next, self._next) + question)
        self._next += 1

    def heard(self, piece: bytes) -> None:
        """Check a message and answer it."""
        check(self._partner in piece, self.client, self._partner, piece)
        check(b"#%06d#" % self._heard in piece, self.client, b"#%06d#" % self._heard, piece)
        self._heard += 1
        if not self.client.load.stopping:
            self.say()

    @property
    def counts(self) -> tuple[int, int]:
        """How many messages it has sent and received."""
        return self._next, self._heard


class Devices(Case):
    """50 pairs talk, each person with two devices that manage their streams; the second gets copies of everything.

    A message means three deliveries; with `--modules archive` also two entries in archives.
    """

    name = "devices"
    rows = (Row("devices", "chat with stream management, copies (and an archive); per message", "µs", peer=0.15),)
    people: ClassVar[Sequence[int]] = TALKERS[:100]

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`."""
        desks = trial.connect(self.people, available=True)
        phones = [ManagedClient(client) for client in trial.connect(self.people, available=True, resource="phone")]
        talkers = [ManagedTalker(client, client.number ^ 1) for client in desks]
        everybody = [*talkers, *phones]
        for device in everybody:
            device.client.begin(device.enable())
        trial.load.run_until(
            lambda: all(device.client.script is None for device in everybody), DRAIN_TIMEOUT, "enabling"
        )
        for device in everybody:
            device.listen()
        for talker in talkers:
            for _ in range(WINDOW):
                talker.say()

        def is_drained() -> bool:
            said, heard = (sum(column) for column in zip(*(talker.counts for talker in talkers), strict=True))
            return bool(said == heard and sum(phone.handled for phone in phones) == said + heard)

        return [trial.steady(lambda: sum(talker.counts[1] for talker in talkers), is_drained, "the last messages")]


class TimedTalker(ShortTalker):
    """Notes when each message was sent and how long it took."""

    def __init__(self, client: Client, partner: int) -> None:
        super().__init__(client, partner)
        self._message = chat_message(full_jid(partner))
        self.partner: TimedTalker = self
        self.sent_at: list[float] = []
        self.delays: list[float] = []  # seconds

    def say(self) -> None:
        """Send the next message and note when."""
        self.sent_at.append(time.perf_counter())
        super().say()

    def take(self, piece: bytes) -> None:
        """Check a message and note when it came."""
        check(b"#%06d#" % self._heard in piece, self.client, b"#%06d#" % self._heard, piece)
        self.delays.append(time.perf_counter() - self.partner.sent_at[self._heard])
        self._heard += 1
        self.received += 1


class Latency(Case):
    """Messages at a fixed rate, whatever the server does: how long each takes from send to receive."""

    name = "latency"
    servers = ("floor", *WITH_ACCOUNTS)
    rows = (
        Row("latency_median", f"latency at {LATENCY_RATE} messages a second: median", "ms"),
        Row("latency_99", f"latency at {LATENCY_RATE} messages a second: 99th percentile", "ms"),
    )

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`."""
        talkers = [TimedTalker(client, client.number ^ 1) for client in trial.connect(TALKERS, available=True)]
        for talker in talkers:
            talker.partner = talkers[talker.client.number ^ 1]
        amount = int(LATENCY_RATE * max(1.0, trial.seconds))
        began = time.perf_counter()
        for number in range(amount):
            while (left := began + number / LATENCY_RATE - time.perf_counter()) > 0:
                trial.load.turn(left)
            talkers[number % len(talkers)].say()
        trial.load.run_until(lambda: sum(t.received for t in talkers) == amount, DRAIN_TIMEOUT, "the last messages")
        delays = sorted(delay * 1000 for talker in talkers for delay in talker.delays)
        return [statistics.median(delays), delays[int(len(delays) * 0.99)]]


# -- presence


class Watcher:
    """A user with contacts: changes presence, and checks theirs."""

    def __init__(self, client: Client, watchers: list[Watcher]) -> None:
        self.client = client
        self.watchers = watchers
        self.received = 0  # from contacts
        self.missing = 0  # contacts that have not got the last change yet
        self.number = 0  # of changes
        self._heard = [0] * len(PRESENT)  # number of each contact's last change
        client.expect(b"</presence>", self.take)

    def change(self) -> None:
        """Tell all contacts something new."""
        self.number += 1
        self.missing = CONTACTS
        self.client.send(
            b"<presence><show>away</show><status>#%04d#%06d#</status>"
            b"<c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='https://bench.example/client' "
            b"ver='QgayPKawpkPSDYmwT/WM94uAlu0='/></presence>" % (self.client.number, self.number)
        )

    def take(self, piece: bytes) -> None:
        """Check a contact's presence; our own comes back too, and may.

        What has no number is late news from the beginning; a change that is lost is
        noticed, since nobody stops waiting for it.
        """
        _, found, said = piece.partition(b"<status>#")
        if not found:
            return
        sender, number = int(said[:4]), int(said[5:11])
        if sender == self.client.number:
            return
        check(number == self._heard[sender] + 1, self.client, b"the next change", piece)
        check(full_jid(sender).encode() in piece, self.client, full_jid(sender).encode(), piece)
        self._heard[sender] = number
        self.received += 1
        watcher = self.watchers[sender]
        watcher.missing -= 1
        if not watcher.missing and not self.client.load.stopping:
            self._pass_on(sender)

    def _pass_on(self, sender: int) -> None:
        """When all contacts know, somebody else changes, so that everybody has a turn."""
        ahead = sender + 1
        while self.watchers[ahead % len(PRESENT)].missing:
            ahead += 1
        self.watchers[ahead % len(PRESENT)].change()


class PresenceChanges(Case):
    """100 users with 30 contacts each change their presence, ten of them at a time."""

    name = "presence"
    title = f"presence among {len(PRESENT)} users, rosters of {CONTACTS}; per delivery"
    rows = (Row("presence", title, "µs", peer=0.4),)

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`; the unit is a presence delivered to a contact."""
        watchers: list[Watcher] = []
        watchers += [Watcher(client, watchers) for client in trial.connect(PRESENT)]
        for watcher in watchers:
            watcher.client.expect(b">", lambda piece: None)
            watcher.client.send(b"<presence/>")
        trial.quiet()
        for watcher in watchers:
            watcher.client.expect(b"</presence>", watcher.take)
        for watcher in watchers[::10]:
            watcher.change()
        cost = trial.steady(
            lambda: sum(watcher.received for watcher in watchers),
            lambda: not any(watcher.missing for watcher in watchers),
            "the last presences",
        )
        return [cost]


# -- rooms and personal eventing


class Visitor:
    """An occupant of a room, who says something when the message before it has reached everybody."""

    def __init__(self, client: Client, room: Conversation) -> None:
        self.client = client
        self.room = room
        self.heard = 0  # messages

    def take(self, piece: bytes) -> None:
        """Check a message: the room says all of them in one order to everybody."""
        if b"<body>" not in piece:
            return  # the subject, from when we entered
        wanted = b"#%06d#" % self.heard
        check(wanted in piece, self.client, wanted, piece)
        self.heard += 1
        self.room.delivered(self.heard)


class Conversation:
    """A room with so many occupants, and one message at a time."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.load = clients[0].load
        self.address = f"bench{len(clients)}@conference.{HOST}"
        self.visitors = [Visitor(client, self) for client in clients]
        self.received = self.said = self._missing = 0

    def say(self) -> None:
        """Let the next occupant say something."""
        visitor = self.visitors[self.said % len(self.visitors)]
        body = b"#%06d# Shall I hear more, or shall I speak at this?" % self.said
        message = f"<message to='{self.address}' type='groupchat' id='m%06d'><body>%b</body></message>".encode()
        visitor.client.send(message % (self.said, body))
        self.said += 1
        self._missing = len(self.visitors)

    def delivered(self, number: int) -> None:
        """Count a delivery; when the last occupant has the message, the next one follows."""
        self.received += 1
        self._missing -= 1
        if not self._missing and not self.load.stopping:
            self.say()


class Rooms(Case):
    """A room with 20 occupants (XEP-0045); each message goes to all of them before the next is said."""

    name = "room20"
    occupants: ClassVar[int] = 20
    rows = (Row("room20", "room with 20 occupants; per delivery", "µs", peer=0.35),)

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`; the unit is a message delivered to an occupant."""
        clients = trial.connect(range(self.occupants), available=True)
        room = Conversation(clients)
        for visitor in room.visitors:
            visitor.client.expect(b">", lambda piece: None)
            entry = f"<presence to='{room.address}/{visitor.client.number}'><x xmlns='http://jabber.org/protocol/muc'/>"
            visitor.client.send(f"{entry}</presence>".encode())
            if visitor is room.visitors[0]:
                trial.quiet()
                accept = "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/>"
                visitor.client.send(f"<iq type='set' id='o1' to='{room.address}'>{accept}</query></iq>".encode())
                trial.quiet()
        trial.quiet()
        for visitor in room.visitors:
            visitor.client.expect(b"</message>", visitor.take)
        room.say()
        cost = trial.steady(
            lambda: room.received, lambda: room.received == room.said * len(room.visitors), "the last messages"
        )
        return [cost]


class BigRoom(Rooms):
    """A room with 100 occupants."""

    name = "room100"
    occupants = 100
    rows = (Row("room100", "room with 100 occupants; per delivery", "µs", peer=0.35),)


MOOD = "http://jabber.org/protocol/mood"
CAPS_NODE = "https://bench.example/client"
CAPS_VER = base64.b64encode(hashlib.sha1(f"client/pc//bench<{MOOD}+notify<".encode()).digest()).decode()
CAPS_INFO = f"<identity category='client' type='pc' name='bench'/><feature var='{MOOD}+notify'/></query></iq>"


class Listener:
    """A user with contacts who publishes a mood when all contacts have heard of the last one."""

    def __init__(self, client: Client, everybody: list[Listener]) -> None:
        self.client = client
        self.everybody = everybody
        self.received = self.number = 0
        self.missing = set[int]()  # contacts who have not heard of the latest mood

    def announce(self) -> None:
        """Come online with capabilities, and answer the server's question what they mean."""
        self.client.expect(b"</iq>", self.answer)
        self.client.send(
            f"<presence><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='{CAPS_NODE}' ver='{CAPS_VER}'/>"
            "</presence>".encode()
        )

    def answer(self, piece: bytes) -> None:
        """Tell what we are interested in."""
        asked = re.search(rb"<iq [^>]*>", piece[piece.rfind(b"<iq ") :])
        if asked is None or b"disco#info" not in piece:
            return
        attributes = dict(re.findall(rb"""(\w+)=['"]([^'"]*)['"]""", asked[0]))
        node = f"{CAPS_NODE}#{CAPS_VER}"
        start = f"<query xmlns='http://jabber.org/protocol/disco#info' node='{node}'>{CAPS_INFO}"
        head = b"<iq type='result' id='%b' to='%b'>" % (attributes[b"id"], attributes.get(b"from", b""))
        self.client.send(head + start.encode())

    def publish(self) -> None:
        """Publish the next mood."""
        self.number += 1
        self.missing = set(contacts_of(self.client.number))
        item = f"<item id='current'><mood xmlns='{MOOD}'><happy/><text>#%04d#%06d#</text></mood></item>"
        self.client.send((
            f"<iq type='set' id='p%06d'><pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='{MOOD}'>"
            f"{item}</publish></pubsub></iq>"
        ).encode() % (self.number, self.client.number, self.number))  # fmt: skip

    def take(self, piece: bytes) -> None:
        """Check a notification: the latest mood of a contact. One's own is told too, and one of before to who comes."""
        check(b"type='error'" not in piece, self.client, b"no error", piece)
        _, found, said = piece.partition(b"<text>#")
        if not found:
            return
        publisher, number = self.everybody[int(said[:4])], int(said[5:11])
        if number != publisher.number or self.client.number not in publisher.missing:
            return  # Prosody 0.12 tells some twice, at the full and the bare address: that counts once
        self.received += 1
        publisher.missing.discard(self.client.number)
        if not publisher.missing and not self.client.load.stopping:
            publisher.publish()


class Eventing(Case):
    """Ten of 100 users with 30 contacts each publish moods (XEP-0163); contacts are told because of their caps."""

    name = "pep"
    servers = WITH_ACCOUNTS
    rows = (Row("pep", f"personal eventing: notification of {CONTACTS} contacts; per delivery", "µs", peer=0.35),)

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`; the unit is a notification delivered to a contact."""
        listeners: list[Listener] = []
        listeners += [Listener(client, listeners) for client in trial.connect(PRESENT)]
        listeners[0].announce()
        trial.quiet()  # its capabilities are known now, as those of most clients are
        for listener in listeners[1:]:
            listener.announce()
        trial.quiet()
        trial.quiet()
        for listener in listeners:
            listener.client.expect(b"</message>", listener.take)
        publishers = listeners[::10]
        self.create_nodes(trial, publishers)
        for publisher in publishers:
            publisher.publish()
        cost = trial.steady(
            lambda: sum(listener.received for listener in listeners),
            lambda: not any(listener.missing for listener in listeners),
            "the last notifications",
        )
        return [cost]

    @staticmethod
    def create_nodes(trial: Trial, publishers: Sequence[Listener]) -> None:
        """Let each publish once, one after the other: of ten first publications at once ejabberd refuses nine."""
        trial.load.stopping = True
        for publisher in publishers:
            publisher.publish()
            trial.load.run_until(lambda: not publisher.missing, DRAIN_TIMEOUT, "the first notifications")  # noqa: B023
        trial.load.stopping = False


# -- requests


class Asker:
    """Sends a request for each answer that comes."""

    def __init__(self, client: Client, request: bytes, end_tag: bytes, expected: bytes) -> None:
        self.client = client
        self.sent = self.received = 0
        self._request = request
        self._expected = expected
        client.expect(end_tag, self.take)

    def ask(self) -> None:
        """Send the next request."""
        self.client.send(self._request % self.sent)
        self.sent += 1

    def take(self, piece: bytes) -> None:
        """Check an answer and ask again."""
        if b"<iq " not in piece:
            return  # the end of another element
        wanted = b"q%06d" % self.received
        check(wanted in piece and self._expected in piece, self.client, wanted + b", " + self._expected, piece)
        self.received += 1
        if not self.client.load.stopping:
            self.ask()


class Ping(Case):
    """100 users ping the server (XEP-0199)."""

    name = "ping"
    rows = (Row("ping", "IQ ping; per answer", "µs", peer=0.4),)
    request = f"<iq type='get' id='q%06d' to='{HOST}'><ping xmlns='urn:xmpp:ping'/></iq>".encode()
    end_tag = b">"
    expected = b"result"

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`; the unit is a request answered."""
        clients = trial.connect(PRESENT)
        askers = [Asker(client, self.request, self.end_tag, self.expected) for client in clients]
        for asker in askers:
            for _ in range(WINDOW):
                asker.ask()
        cost = trial.steady(
            lambda: sum(asker.received for asker in askers),
            lambda: sum(asker.sent for asker in askers) == sum(asker.received for asker in askers),
            "the last answers",
        )
        return [cost]


class Disco(Ping):
    """100 users ask what the server can do (XEP-0030 §3.1)."""

    name = "disco"
    rows = (Row("disco", "service discovery; per answer", "µs", peer=0.4),)
    request = (
        f"<iq type='get' id='q%06d' to='{HOST}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>"
    ).encode()
    end_tag = b"</iq>"
    expected = b"category="


# -- logging in


class Login(Case):
    """Users log in and out, eight at a time: TCP, STARTTLS, TLS 1.3, SCRAM-SHA-1, binding, and goodbye."""

    name = "login"
    rows = (Row("login", "login: STARTTLS, TLS 1.3, SCRAM-SHA-1, bind, logout; each", "µs", peer=0.6),)
    at_once = 8

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`; the unit is a login."""
        done = 0
        clients = [Client(trial.load, number, trial.server.port, starttls=True) for number in TALKERS]
        trial.clients += clients

        def whole(client: Client) -> Script:
            nonlocal done
            yield from client.login()
            yield from client.logout()
            done += 1

        waiting = clients[self.at_once :]
        busy = clients[: self.at_once]
        for client in busy:
            client.begin(whole(client))

        def keep_up() -> None:
            for at, client in enumerate(busy):
                if client.script is None and not trial.load.stopping:
                    waiting.append(client)
                    busy[at] = waiting.pop(0)
                    busy[at].begin(whole(busy[at]))

        trial.load.after_turn = keep_up
        try:
            cost = trial.steady(lambda: done, lambda: not any(client.script for client in busy), "the last logins")
        finally:
            trial.load.after_turn = None
        return [cost]


# -- offline messages

BATCH = 10  # messages that a sender hands in before it waits until the server has got them
SENDERS = 10
OFFLINE_PER_SECOND = 16  # messages to each account per second of a case's time


class Recipient:
    """Somebody who comes back and finds messages, in order."""

    def __init__(self, client: Client, sender: int) -> None:
        self.client = client
        self.received = 0
        self._sender = full_jid(sender).encode()
        client.expect(b"</message>", self.take)

    def take(self, piece: bytes) -> None:
        """Check a message."""
        wanted = b"#%06d#" % self.received
        check(wanted in piece and self._sender in piece, self.client, wanted, piece)
        self.received += 1


class Offline(Case):
    """Messages to 50 users who are away are stored; then they come, and get them."""

    name = "offline"
    rows = (
        Row("offline_store", f"offline: store a {MESSAGE_SIZE}-byte message", "µs", peer=0.3),
        Row("offline_flush", "offline: deliver a stored message", "µs"),
    )

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`. A ping behind every few messages tells when they have been dealt with."""
        per_account = max(2, round(OFFLINE_PER_SECOND * trial.seconds / 2)) * 2
        total = per_account * len(AWAY)
        senders = trial.connect(range(SENDERS), available=True)
        with trial.metered() as storing:
            trial.run_scripts(senders, lambda sender: self._store(sender, per_account), "storing")
            trial.server.settle()
        recipients = [Recipient(client, client.number % SENDERS) for client in trial.connect(AWAY)]
        trial.quiet()
        with trial.metered() as flushing:
            for recipient in recipients:
                recipient.client.send(b"<presence/>")
            trial.load.run_until(lambda: sum(r.received for r in recipients) >= total, DRAIN_TIMEOUT, "the messages")
            trial.server.settle()
        trial.quiet()
        if any(recipient.received != per_account for recipient in recipients):
            raise BenchError("a message was delivered twice")
        return [storing.cpu / total * 1e6, flushing.cpu / total * 1e6]

    def _store(self, sender: Client, amount: int) -> Script:
        templates = [chat_message(bare_jid(number)) for number in AWAY if number % SENDERS == sender.number]
        messages = [template % (number, number) for number in range(amount) for template in templates]
        for first in range(0, len(messages), BATCH):
            sender.send(b"".join(messages[first : first + BATCH]) + Ping.request % first)
            answer = yield IQ_RESULT
            if b"q%06d" % first not in answer[0]:
                raise BenchError(f"expected the answer to a ping, found {answer[0]!r}")


# -- memory and start


class Start(Case):
    """From exec until a stream header is answered: by the clock and, for busy machines, in processor time."""

    name = "start"
    rows = (
        Row("start", "start-up until ready", "s", most=0.3),
        Row("start_cpu", "processor time of a start-up", "s"),
    )
    fresh = True

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`."""
        return [trial.server.ready_seconds, trial.server.start_cpu]


class Idle(Case):
    """Resident memory with nobody there, and with many sessions that have done nothing for some seconds."""

    name = "idle"
    rows = (
        Row("idle_0", "resident at rest", "MB", most=28),
        Row("idle_500", "resident with 500 idle TLS sessions", "MB"),
        Row("idle_2000", "resident with 2,000 idle TLS sessions", "MB"),
        Row("idle_each", "resident per idle TLS session", "KB", most=36),
    )
    servers = ("floor", *WITH_ACCOUNTS)
    fresh = True
    steps = (0, 500, 2000)
    silence = 10.0  # seconds without a word before a session counts as idle

    def run(self, trial: Trial) -> Sequence[float]:
        """See `Case.run`. MB and KB are powers of 1024."""
        first, readings = EVERYBODY.stop - self.steps[-1], list[int]()  # none of those who have contacts
        for more, steps in zip((0, *self.steps), self.steps, strict=False):
            trial.connect(range(first + more, first + steps), available=True)
            trial.load.run_for(self.silence)
            trial.server.settle()
            readings.append(resident_bytes(trial.server.pid))
        each = (readings[-1] - readings[0]) / self.steps[-1] / KIB
        return [*(reading / KIB / KIB for reading in readings), each]


CASES: Sequence[type[Case]] = (
    Start, Idle, Login, Chat, Small, Devices, PresenceChanges, Rooms, BigRoom, Eventing, Ping, Disco, Offline, Latency,
)  # fmt: skip
