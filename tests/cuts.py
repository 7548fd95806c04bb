"""Cut connections at random during a conversation, and see whether anything that was acknowledged is lost.

    python -m tests.cuts --cuts 200 [--seed N]

Romeo and juliet talk, each with two devices, over TCP and TLS with a server process. All four
manage their streams (XEP-0198) and get copies (XEP-0280). Their connections are cut in all
ways that a train knows:

    hangs up     in the middle of anything, with what the server has sent still unread
    mid-stanza   the last message leaves by half
    takes over   a new connection comes while the old one is still open
    forgets      the client comes back without its session: what that had not got goes elsewhere

Each device keeps the books that XEP-0198 asks of a client: what it has handled, what it has sent
and the server has not acknowledged; that it sends again. In the end:

    not lost     what the server has acknowledged has come to the other one's account
    once         within a session nobody gets a message twice
    in order     when nobody forgets, every device has seen all that the others have said, in order
    the same     what comes again to another session has the same archive id, if it has one
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.dialogue import CLIENT, PATIENCE, SM
from tests.servers import ProcessServer

SM_NAME, MESSAGE, BODY = f"{{{SM}}}", f"{{{CLIENT}}}message", f"{{{CLIENT}}}body"
CARBONS, STANZA_ID = "{urn:xmpp:carbons:2}", "{urn:xmpp:sid:0}stanza-id"
PEOPLE = {"romeo": ("orchard", "phone"), "juliet": ("balcony", "phone")}
GLANCE = 0.004  # seconds to wait for bytes when nobody knows whether there are any


class Device:
    """A client with a resource of its own, and its books."""

    def __init__(self, server: ProcessServer, name: str, resource: str) -> None:
        self.server = server
        self.name = name
        self.resource = resource
        self.bare = f"{name}@example.org"
        self.full = f"{self.bare}/{resource}"
        self.client = server.client()
        self.id = ""  # of the session that can be resumed
        self.handled = 0
        self.acknowledged = 0  # of ours, by the server, in this session
        self.unacknowledged: deque[tuple[str, str]] = deque()  # (body, stanza)
        self.sessions: list[list[str]] = []  # the bodies that came, by session
        self.resent: set[str] = set()  # in another session, not knowing whether they were taken in the one before
        self.ids: dict[str, set[str]] = {}  # of each body that came, its ids in the archive

    # -- the connection

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as the client knows."""
        return self.client.wire is not None

    def hangs_up(self) -> None:
        """Cut."""
        self.client.disconnects()

    def connects(self, *, resume: bool = True) -> None:
        """Log in; go on with the old session or, when that fails or is not wanted, begin a new one."""
        old, self.client = self.client, self.server.client()
        self.client.hears_requests = True
        self.client.logs_in(self.name)
        if not (resume and self.id and self._resumes()):
            self._begins()
        old.disconnects()

    def _resumes(self) -> bool:
        self.client.sends(f"<resume xmlns='{SM}' previd='{self.id}' h='{self.handled % 2**32}'/>")
        answer = self.client._expect("stanza", "resumed or failed")
        h = answer.get("h")
        if h is not None:
            self._confirm(int(h))
        if answer.tag != f"{SM_NAME}resumed":
            return False
        for _body, stanza in self.unacknowledged:
            self.client.sends_raw(stanza)
        return True

    def _begins(self) -> None:
        """A session without a past; what the old one could not deliver is sent again, and may come twice."""
        self.client.binds(self.resource)
        self.client.sends(f"<enable xmlns='{SM}' resume='true'/>")
        self.handled = self.acknowledged = 0
        self.sessions.append([])
        while (element := self.client._expect("stanza", "enabled")).tag != f"{SM_NAME}enabled":
            self._reads(element)  # which is not counted yet
        self.id = element.get("id", "")
        again, self.unacknowledged = self.unacknowledged, deque()
        self.sends("", "<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq>")
        self.sends("", "<presence/>")
        for body, stanza in again:
            if body:
                self.resent.add(body)
                self.sends(body, stanza)

    # -- stanzas

    def says(self, body: str, to: str) -> None:
        """Write a chat message."""
        self.sends(body, f"<message to='{to}' type='chat' id='{body}'><body>{body}</body></message>")

    def sends(self, body: str, stanza: str, bytes_sent: int | None = None) -> None:
        """Note a stanza and send it, or the first bytes of it."""
        self.unacknowledged.append((body, stanza))
        self.client.sends_raw(stanza[:bytes_sent])

    def asks(self) -> None:
        """Ask for an acknowledgement."""
        self.client.sends_raw(f"<r xmlns='{SM}'/>")

    def _confirm(self, h: int) -> None:
        while self.acknowledged != h and self.unacknowledged:
            self.acknowledged = (self.acknowledged + 1) % 2**32
            body, _stanza = self.unacknowledged.popleft()
            self.confirmed(body)
        assert self.acknowledged == h, f"{self.full}: the server has handled {h}, and {self.acknowledged} were sent"

    def confirmed(self, body: str) -> None:
        """The server has taken responsibility for a message of ours; replaced by `Conversation`."""

    def listens(self, seconds: float = GLANCE) -> bool:
        """Take what has come; return whether anything has."""
        if not self.is_connected:
            return False
        data = self.client._connected().read(seconds)
        if data is None:
            return False
        self.client._take(data)
        while self.client._inbox:
            event = self.client._inbox.popleft()
            if event.kind == "stanza":
                self._hears(event.element)
            elif event.kind == "end":
                self.hangs_up()
                break
        return True

    def _hears(self, element: ET.Element) -> None:
        if element.tag == f"{SM_NAME}a":
            self._confirm(int(element.get("h", "")))
        elif element.tag == f"{SM_NAME}r":
            self.client.sends_raw(f"<a xmlns='{SM}' h='{self.handled % 2**32}'/>")
        elif element.tag.startswith(f"{{{CLIENT}}}"):
            self.handled += 1
            self._reads(element)

    def _reads(self, stanza: ET.Element) -> None:
        message = next((copy for copy in stanza.iter(MESSAGE) if copy.find(BODY) is not None), None)
        if message is None or stanza.find(f"{CARBONS}sent") is not None:
            return
        body = message.findtext(BODY, "")
        self.sessions[-1].append(body)
        for stanza_id in message.iterfind(STANZA_ID):
            if stanza_id.get("by") == self.bare:
                self.ids.setdefault(body, set()).add(stanza_id.get("id", ""))


class Conversation:
    """Four devices and one chance."""

    def __init__(self, server: ProcessServer, seed: int, *, forgetful: bool = True) -> None:
        self.chance = random.Random(seed)
        self.steps = self._steps if forgetful else [step for step in self._steps if step is not Conversation._forgets]
        self.said: list[str] = []
        self.devices = [Device(server, name, resource) for name, found in PEOPLE.items() for resource in found]
        self.confirmed: dict[str, set[str]] = {name: set() for name in PEOPLE}  # by sender
        self.cuts: Counter[str] = Counter()
        self._number = 0
        for device in self.devices:
            device.confirmed = self.confirmed[device.name].add  # type: ignore[method-assign]
            device.connects()
        self._settle()

    def run(self, cuts: int) -> None:
        """Talk until so many connections are cut, then let everybody come back and hear the rest."""
        while self.cuts.total() < cuts:
            device = self.chance.choice(self.devices)
            if not device.is_connected:
                device.connects()
            self.chance.choice(self.steps)(self, device)
        self._settle()

    # -- what may happen

    def _talks(self, device: Device) -> None:
        other = self.chance.choice([other for other in self.devices if other.name != device.name])
        self._number += 1
        self.said.append(f"{device.name}-{device.resource}-{self._number}")
        device.says(self.said[-1], self.chance.choice([other.bare, other.full]))

    def _burst(self, device: Device) -> None:
        for _ in range(self.chance.randint(2, 12)):
            self._talks(device)
        device.asks()

    def _listens(self, device: Device) -> None:
        device.listens()

    def _asks(self, device: Device) -> None:
        device.asks()

    def _hangs_up(self, device: Device) -> None:
        self.cuts["hangs up"] += 1
        device.hangs_up()

    def _mid_stanza(self, device: Device) -> None:
        self.cuts["mid-stanza"] += 1
        stanza = f"<message to='romeo@example.org' type='chat'><body>{'x' * 50}</body></message>"
        device.client.sends_raw(stanza[: self.chance.randrange(1, len(stanza))])
        device.hangs_up()

    def _takes_over(self, device: Device) -> None:
        self.cuts["takes over"] += 1
        device.connects()

    def _forgets(self, device: Device) -> None:
        self.cuts["forgets"] += 1
        device.connects(resume=False)

    _steps: Sequence[Callable[[Conversation, Device], None]] = (
        _talks, _talks, _talks, _burst, _listens, _listens, _listens, _asks,
        _hangs_up, _hangs_up, _mid_stanza, _takes_over, _forgets,
    )  # fmt: skip

    # -- the end

    def _settle(self) -> None:
        """Everybody is back, and hears until all is acknowledged, and then until nothing comes any more."""
        give_up = time.monotonic() + 3 * PATIENCE
        for device in self.devices:
            if not device.is_connected:
                device.connects()
            device.asks()
        quiet = 0
        while quiet < 3:
            assert time.monotonic() < give_up, "the conversation does not come to an end"
            came = [self._hears_all(device) for device in self.devices]
            waiting = [device for device in self.devices if device.unacknowledged]
            for device in waiting:
                if not device.is_connected:
                    device.connects()
                device.asks()
            quiet = 0 if any(came) or waiting else quiet + 1

    def _hears_all(self, device: Device) -> bool:
        """One read is one TLS record."""
        heard = device.listens(0.05)
        while device.listens():
            heard = True
        return heard

    def goes(self) -> None:
        """Everybody logs out."""
        for device in self.devices:
            device.client.closes()

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        found = []
        resent = set().union(*(device.resent for device in self.devices))
        for sender, confirmed in self.confirmed.items():
            others = [device for device in self.devices if device.name != sender]
            heard = {body for device in others for session in device.sessions for body in session}
            found += [f"lost: {body}" for body in sorted(confirmed - {""} - heard)]
            for body in sorted(heard):
                ids = set().union(*(device.ids.get(body, set()) for device in others))
                if len(ids) > 1 and body not in resent:
                    found.append(f"{body} has the ids {sorted(ids)}")
        for device in self.devices:
            for session in device.sessions:
                twice = [body for body, times in Counter(session).items() if times > 1 and body not in resent]
                found += [f"{device.full} got {body} twice in one session" for body in twice]
            if not self.cuts["forgets"]:
                found += self._disorder(device)
        return found

    def _disorder(self, device: Device) -> Iterator[str]:
        """When nobody forgets their session, every device sees all of a conversation, in order."""
        (session,) = device.sessions
        for other in self.devices:
            if other.name != device.name:
                said = [body for body in self.said if body.startswith(f"{other.name}-{other.resource}-")]
                heard = [body for body in session if body in said]
                if heard != said:
                    yield f"{device.full} heard {heard} of {said}"

    def report(self) -> str:
        """Say what happened."""
        confirmed = sum(len(bodies - {""}) for bodies in self.confirmed.values())
        sessions = sum(len(device.sessions) for device in self.devices)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.cuts.items()))
        return f"{self.cuts.total()} cuts ({kinds}), {sessions} sessions, {confirmed} messages acknowledged"


def main() -> int:
    """Run by hand."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--cuts", type=int, default=200)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ProcessServer(Path(folder), {})
        for name in PEOPLE:
            server.add_account(f"{name}@example.org")
        server.start()
        began = time.monotonic()
        problems = []
        for forgetful in (False, True):
            conversation = Conversation(server, chosen.seed, forgetful=forgetful)
            conversation.run(chosen.cuts // 2)
            print(f"seed {chosen.seed}: {conversation.report()} in {time.monotonic() - began:.0f} s")
            problems += conversation.problems()
            conversation.goes()
        print("\n".join(problems) or "nothing lost, nothing twice")
        server.stop()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
