"""The core of multi-user chat, without a server: who may do what, what newcomers hear, and what never happens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import xmppd
from xmppd import JID, Room, RoomChange, Said, Standing, Stanza, StanzaError

MUC = "http://jabber.org/protocol/muc"
USER = f"{{{MUC}#user}}"
KITCHEN = JID("kitchen", "conference.example.org", "")


def outcome(plan: Callable[..., None], *arguments: object) -> str:
    """The error's condition, or ""."""
    try:
        plan(*arguments)
    except StanzaError as error:
        return error.condition
    return ""


# ---- roles (§5.1, tables 3 and 5) ---------------------------------------------------------------

OWNER, ADMIN = Standing("owner", "moderator"), Standing("admin", "moderator")
MEMBER_MODERATOR, MODERATOR = Standing("member", "moderator"), Standing("none", "moderator")
MEMBER, PARTICIPANT, VISITOR = Standing("member", "participant"), Standing("none", "participant"), Standing("none", "visitor")

ROLE_CASES = [  # actor, target, new role, the error's condition
    # kick participants and visitors: moderators
    (MODERATOR, VISITOR, "none", ""), (MODERATOR, PARTICIPANT, "none", ""), (PARTICIPANT, VISITOR, "none", "forbidden"),
    (VISITOR, VISITOR, "none", "forbidden"), (Standing("none", "none"), VISITOR, "none", "forbidden"),
    # nobody is kicked by somebody with a lower affiliation (§8.2)
    (MODERATOR, MEMBER, "none", "not-allowed"), (MEMBER_MODERATOR, ADMIN, "none", "not-allowed"),
    (MEMBER_MODERATOR, OWNER, "none", "not-allowed"), (ADMIN, OWNER, "none", "not-allowed"),
    (ADMIN, ADMIN, "none", ""), (OWNER, ADMIN, "none", ""), (OWNER, OWNER, "none", ""),
    # moderators are kicked by admins and owners only (table 5)
    (MODERATOR, MODERATOR, "none", "not-allowed"), (ADMIN, MODERATOR, "none", ""), (OWNER, MEMBER_MODERATOR, "none", ""),
    # grant voice: moderators (§8.3)
    (MODERATOR, VISITOR, "participant", ""), (MODERATOR, Standing("member", "visitor"), "participant", ""),
    (PARTICIPANT, VISITOR, "participant", "forbidden"),
    # revoke voice: never from an equal or a higher affiliation, never from an admin or owner (§8.4)
    (MODERATOR, PARTICIPANT, "visitor", ""), (MODERATOR, MEMBER, "visitor", "not-allowed"),
    (MEMBER_MODERATOR, MEMBER, "visitor", "not-allowed"), (MEMBER_MODERATOR, PARTICIPANT, "visitor", ""),
    (ADMIN, MEMBER, "visitor", ""), (ADMIN, ADMIN, "visitor", "not-allowed"), (OWNER, ADMIN, "visitor", "not-allowed"),
    (OWNER, OWNER, "visitor", "not-allowed"),
    # moderators are made and unmade by admins and owners (§9.6, §9.7)
    (MODERATOR, PARTICIPANT, "moderator", "forbidden"), (ADMIN, PARTICIPANT, "moderator", ""),
    (OWNER, VISITOR, "moderator", ""), (MODERATOR, MODERATOR, "participant", "not-allowed"),
    (ADMIN, MODERATOR, "participant", ""), (ADMIN, MEMBER_MODERATOR, "visitor", ""),
    (ADMIN, ADMIN, "participant", "not-allowed"), (OWNER, ADMIN, "participant", "not-allowed"),
    # an admin who isn't in the room governs all the same
    (Standing("admin", "none"), PARTICIPANT, "none", ""), (Standing("owner", "none"), PARTICIPANT, "moderator", ""),
]  # fmt: skip


@pytest.mark.parametrize(("actor", "target", "role", "condition"), ROLE_CASES)
def test_who_gives_which_role(actor: Standing, target: Standing, role: str, condition: str) -> None:
    """XEP0045-5.2.1-1, XEP0045-5.1.3-2, XEP0045-8.2-2, XEP0045-8.4-1"""
    assert outcome(xmppd.plan_role, actor, target, role) == condition


def test_nobody_without_power_changes_any_role() -> None:
    """XEP0045-5.2.1-1"""
    for actor in (PARTICIPANT, VISITOR, MEMBER, Standing("none", "none"), Standing("outcast", "none")):
        for affiliation, role, new in itertools.product(xmppd.AFFILIATIONS[1:], xmppd.ROLES[1:], xmppd.ROLES):
            assert outcome(xmppd.plan_role, actor, Standing(affiliation, role), new) == "forbidden"


@pytest.mark.parametrize(("affiliation", "moderated", "role"), [
    ("none", True, "visitor"), ("none", False, "participant"), ("member", True, "participant"),
    ("member", False, "participant"), ("admin", True, "moderator"), ("admin", False, "moderator"),
    ("owner", True, "moderator"), ("owner", False, "moderator"), ("outcast", False, "none"),
])  # fmt: skip
def test_default_roles(affiliation: str, moderated: bool, role: str) -> None:
    """XEP0045-5.1.2-1: table 4"""
    assert xmppd.default_role(affiliation, moderated) == role


@pytest.mark.parametrize(("old", "new", "role", "moderated", "expected"), [
    ("none", "member", "visitor", True, "participant"), ("none", "admin", "visitor", True, "moderator"),
    ("none", "member", "moderator", False, "moderator"), ("member", "none", "participant", True, "participant"),
    ("member", "none", "visitor", True, "visitor"), ("admin", "none", "moderator", True, "participant"),
    ("admin", "member", "moderator", False, "participant"), ("owner", "admin", "moderator", True, "moderator"),
])  # fmt: skip
def test_a_role_follows_the_affiliation(old: str, new: str, role: str, moderated: bool, expected: str) -> None:
    """XEP0045-5.1.3-1, XEP0045-10.7-1"""
    assert xmppd.role_after(old, new, role, moderated) == expected


# ---- affiliations (§5.2, tables 6 and 7) ------------------------------------------------------------

TABLE_7 = {  # (old, new): who may
    ("outcast", "none"): "admin", ("outcast", "member"): "admin", ("outcast", "admin"): "owner", ("outcast", "owner"): "owner",
    ("none", "outcast"): "admin", ("none", "member"): "admin", ("none", "admin"): "owner", ("none", "owner"): "owner",
    ("member", "outcast"): "admin", ("member", "none"): "admin", ("member", "admin"): "owner", ("member", "owner"): "owner",
    ("admin", "outcast"): "owner", ("admin", "none"): "owner", ("admin", "member"): "owner", ("admin", "owner"): "owner",
    ("owner", "outcast"): "owner", ("owner", "none"): "owner", ("owner", "member"): "owner", ("owner", "admin"): "owner",
}  # fmt: skip


@pytest.mark.parametrize("actor", xmppd.AFFILIATIONS)
@pytest.mark.parametrize(("old", "new"), TABLE_7)
def test_who_gives_which_affiliation(actor: str, old: str, new: str) -> None:
    """XEP0045-5.2.1-1, XEP0045-9-1, XEP0045-9.1-2"""
    allowed = actor == "owner" or actor == TABLE_7[old, new]
    condition = "" if allowed else "forbidden"
    if actor == "admin" and new == "outcast" and not allowed:
        condition = "not-allowed"  # §9.1
    assert outcome(xmppd.plan_affiliation, actor, old, new) == condition


# ---- nicknames ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("Romeo", "ROMEO"), ("Romeo", "Romeo "), ("a  b", "a b"), ("a\u00a0b", "a b"),
                                            ("Ro\u200bmeo", "Romeo"), ("x\ufe0f", "x"), ("stra\u00dfe", "STRASSE")])  # fmt: skip
def test_nicknames_that_look_the_same(one: str, other: str) -> None:
    """S50"""
    assert xmppd.canonical_nick(one) == xmppd.canonical_nick(other)


def test_nicknames_that_differ() -> None:
    """S50"""
    nicks = ["Romeo", "Juliet", "Rom", "\U0001f339", "\U0001f5e1", "a b", "ab"]
    assert len({xmppd.canonical_nick(nick) for nick in nicks}) == len(nicks)


# ---- history (§7.2.14) --------------------------------------------------------------------------------------


def message(text: str, at: str = "2026-11-22T14:00:00Z") -> Said:
    """Something that was said."""
    stanza = Stanza(xmppd.MESSAGE, {"type": "groupchat", "from": f"{KITCHEN}/Romeo"})
    stanza.add(xmppd.E(xmppd.CLIENT("body"), None, text))
    return Said(at, stanza)


@given(texts=st.lists(st.text("abc\u00e9<&", max_size=20), max_size=12), maxstanzas=st.integers(0, 14),
       maxchars=st.integers(0, 2000), since=st.integers(0, 12))  # fmt: skip
def test_history_is_the_longest_end_that_satisfies_all_wishes(
    texts: list[str], maxstanzas: int, maxchars: int, since: int
) -> None:
    """XEP0045-7.2.14-1"""
    said = [message(text, f"2026-11-22T14:00:{second:02}Z") for second, text in enumerate(texts)]
    wish = xmppd.HistoryWish(maxstanzas, maxchars, f"2026-11-22T14:00:{since:02}Z")
    chosen = [stanza.wire().decode() for stanza in xmppd.select_history(said, wish, "juliet@example.org/balcony")]
    everything = [one.message.addressed(to="juliet@example.org/balcony").wire().decode() for one in said]
    assert chosen == (everything[-len(chosen) :] if chosen else [])
    assert len(chosen) <= min(maxstanzas, max(0, len(texts) - since)) and sum(map(len, chosen)) <= maxchars
    longer = everything[-len(chosen) - 1 :]
    could_be_longer = len(longer) > len(chosen) and len(longer) <= maxstanzas and len(texts) - len(longer) >= since
    assert not (could_be_longer and sum(map(len, longer)) <= maxchars)


def test_history_is_bounded_in_bytes() -> None:
    """S54"""
    history = xmppd.RoomHistory()
    for number in range(20):
        history.add(message(f"{number}" * 50_000), 200)
        assert history.bytes == sum(len(said.message.content) for said in history.messages) <= xmppd.MAX_HISTORY_BYTES
    assert history.messages[-1].message.content.startswith(b"<body>1919")
    history.add(message("x"), 0)
    assert not history.messages and not history.bytes


@pytest.mark.parametrize(("text", "belongs"), [
    ("<body>O</body>", True), ("<composing xmlns='http://jabber.org/protocol/chatstates'/>", False),
    ("<body>O</body><no-store xmlns='urn:xmpp:hints'/>", False), ("<store xmlns='urn:xmpp:hints'/>", True),
    ("<displayed xmlns='urn:xmpp:chat-markers:0' id='x'/>", False),
])  # fmt: skip
def test_what_belongs_to_the_history(text: str, belongs: bool) -> None:
    """XEP0045-7.2.13-1"""
    stanza = xmppd.parse_element(f"<message type='groupchat'>{text}</message>")
    assert isinstance(stanza, Stanza) and xmppd.belongs_to_history(stanza) is belongs


# ---- a room among people -------------------------------------------------------------------------------------


class Nobody:
    """Keeps nothing."""

    def store(self, room: Room, key: str, item: Any) -> None:
        """Forget it."""

    def remember(self, room: Room, message: Stanza, author: str) -> str:
        """Forget it."""
        return "0" * 30

    def author_of(self, room: Room, id: str) -> str:
        """Nobody said anything."""
        return ""

    def bury(self, room: Room, id: str, retraction: str) -> None:
        """Nothing is there."""

    def configured(self, room: Room) -> None:
        """Forget it."""


@dataclass
class View:
    """What one client believes: who is in the room, in which role; and what must never be seen."""

    full: str
    occupants: dict[str, tuple[str, str]] = field(default_factory=dict)  # nick: affiliation, role
    nick: str = ""  # its own; "" while not in the room
    got: int = 0


PEOPLE = [f"{name}@example.org/{resource}" for name in ("owner", "bob", "carol", "dave") for resource in ("a", "b")]
NICKS = ["Owner", "Bob", "Carol", "Dave", "Eve"]


class World:
    """A room and its people, who keep their views by what they receive alone."""

    def __init__(self) -> None:
        self.room = Room(KITCHEN, b"secret", self.receive, Nobody())
        self.room.affiliations["owner@example.org"] = {"affiliation": "owner"}
        self.views = {full: View(full) for full in PEOPLE}
        self.entering = ""  # who is being let in just now

    def receive(self, stanza: Stanza) -> None:
        """Deliver; the invariants about single stanzas are checked here."""
        to = stanza.attrib["to"]
        if to not in self.views:
            return  # to a bare JID: an invitation, or news about the affiliation
        view = self.views[to]
        view.got += 1
        if stanza.tag == xmppd.PRESENCE:
            self._take_presence(view, stanza)
        else:
            assert view.nick, "nobody receives from a room they are not in"
            assert not self._addresses(stanza), "messages tell no addresses"

    def _take_presence(self, view: View, stanza: Stanza) -> None:
        [x] = [child for child in stanza if child.tag == f"{USER}x"]
        codes = {status.get("code") for status in x.iter(f"{USER}status")}
        item = x[0]
        nick = stanza.attrib["from"].partition("/")[2]
        assert view.nick or view.full == self.entering or "110" in codes, "nobody receives from a room they are not in"
        if "110" not in codes:
            sees = self.room.config["muc#roomconfig_whois"] == "anyone" or self._is_moderator(view)
            assert sees or not self._addresses(stanza), "real addresses are for moderators"
        if stanza.get("type") != "unavailable":
            view.occupants[nick] = item.attrib["affiliation"], item.attrib["role"]
            view.nick = nick if "110" in codes else view.nick
        else:
            view.occupants.pop(nick, None)
            if "110" in codes:
                view.nick = item.get("nick", "")
                if not view.nick:
                    view.occupants.clear()

    def _is_moderator(self, view: View) -> bool:
        occupant = self.room.present.get(view.full)
        return occupant is not None and occupant.role == "moderator"

    @staticmethod
    def _addresses(stanza: Stanza) -> bool:
        return any("@example.org" in value for element in stanza.iter() for name, value in element.attrib.items()
                   if element is not stanza)  # fmt: skip

    # -- what people do

    def enter(self, full: str, nick: str) -> None:
        self.entering = full
        stanza = Stanza(xmppd.PRESENCE, {"from": full, "to": f"{KITCHEN}/{nick}"})
        entry = xmppd.E(xmppd.MUC("x"))
        stanza.add(entry)
        self.room.join(stanza, nick, entry)

    def leave(self, full: str, nick: str) -> None:
        if full in self.room.present:
            self.room.leave(Stanza(xmppd.PRESENCE, {"from": full, "type": "unavailable"}))

    def rename(self, full: str, nick: str) -> None:
        if full in self.room.present:
            self.room.update_presence(Stanza(xmppd.PRESENCE, {"from": full, "to": f"{KITCHEN}/{nick}"}), nick)

    def vanish(self, full: str, nick: str) -> None:
        self.room.remove_unreachable(full)

    def speak(self, full: str, nick: str) -> None:
        stanza = Stanza(xmppd.MESSAGE, {"from": full, "type": "groupchat"})
        stanza.add(xmppd.E(xmppd.CLIENT("body"), None, "O"))
        self.room.speak(stanza)

    def administer(self, full: str, **item: str) -> None:
        changes = self.room.plan(JID.parse(full), [xmppd.E(xmppd.MUC_ADMIN("item"), item)])
        self.room.apply(JID.parse(full), changes)

    def configure(self, **changes: object) -> None:
        values = {f"muc#roomconfig_{name}": value for name, value in changes.items()}
        self.room.configure(values, self.room.plan_configuration(values))

    # -- what always holds

    def check(self) -> None:
        room = self.room
        assert room.people("owner"), "a room has an owner"
        assert {full for full, view in self.views.items() if view.nick} == set(room.present)
        assert set(room.present) == {full for occupant in room.occupants.values() for full in occupant.sessions}
        shown = room.config["muc#roomconfig_presencebroadcast"]
        for full, occupant in room.present.items():
            assert room.occupants[occupant.nick] is occupant and occupant.jid == JID.parse(full).bare
            expected = {other.nick: (other.affiliation, other.role) for other in room.occupants.values()
                        if other.role in shown or other is occupant}  # fmt: skip
            assert self.views[full].occupants == expected
            assert self.views[full].nick == occupant.nick
            assert occupant.affiliation == room.affiliation_of(occupant.jid) != "outcast"
            assert not (room["membersonly"] and occupant.affiliation == "none")
        assert len({xmppd.canonical_nick(nick) for nick in room.occupants}) == len(room.occupants)


FULL, NICK = st.sampled_from(PEOPLE), st.sampled_from(NICKS)
ACTOR = st.one_of(st.just(PEOPLE[0]), st.just(PEOPLE[0]), FULL)  # mostly the owner, or nothing much would happen
BARE = FULL.map(lambda full: full.partition("/")[0])
DEEDS = st.one_of(
    st.tuples(st.just("enter"), FULL, NICK),
    st.tuples(st.just("enter"), FULL, NICK),
    st.tuples(st.sampled_from(["leave", "rename", "rename", "vanish", "speak"]), FULL, NICK),
    st.tuples(st.just("role"), ACTOR, NICK, st.sampled_from(xmppd.ROLES)),
    st.tuples(st.just("affiliation"), ACTOR, BARE, st.sampled_from(xmppd.AFFILIATIONS)),
    st.tuples(st.just("configure"), st.sampled_from(["membersonly", "moderatedroom", "whois", "presencebroadcast"]),
              st.booleans()),
)  # fmt: skip
VALUES = {"whois": ("moderators", "anyone"), "presencebroadcast": (["moderator"], ["moderator", "participant", "visitor"])}


def do(world: World, deed: tuple[Any, ...]) -> None:
    """Let one thing happen, or be refused; then nothing has happened at all."""
    kind, *words = deed
    before = sum(view.got for view in world.views.values())
    try:
        if kind == "role":
            world.administer(words[0], nick=words[1], role=words[2])
        elif kind == "affiliation":
            world.administer(words[0], jid=words[1], affiliation=words[2])
        elif kind == "configure":
            world.configure(**{words[0]: VALUES.get(words[0], (False, True))[words[1]]})
        else:
            getattr(world, kind)(*words)
    except StanzaError:
        assert sum(view.got for view in world.views.values()) == before


@example([("enter", PEOPLE[1], "Eve"), ("rename", PEOPLE[1], "Owner"), ("leave", PEOPLE[0], "Owner")])  # two become one
@example([("affiliation", PEOPLE[0], "bob@example.org", "member"), ("configure", "membersonly", True),
          ("affiliation", PEOPLE[0], "bob@example.org", "none")])
@settings(deadline=None, max_examples=150)
@given(st.lists(DEEDS, max_size=40))
def test_whatever_happens_everybody_sees_the_same_room(deeds: list[tuple[Any, ...]]) -> None:
    """XEP0045-10-1, XEP0045-7.2.4-1, XEP0045-5.1.3-1, XEP0045-5.2.2-1, XEP0045-17.3-5"""
    world = World()
    for full, nick in ((PEOPLE[0], "Owner"), (PEOPLE[2], "Bob"), (PEOPLE[3], "Bob"), (PEOPLE[4], "Carol")):
        do(world, ("enter", full, nick))
    for deed in deeds:
        do(world, deed)
        world.check()


def test_five_hundred_people_share_one_serialisation() -> None:
    """S54: what is said is written once; only the start tags differ"""
    sent: list[Stanza] = []
    room = Room(KITCHEN, b"secret", sent.append, Nobody())
    room.config["muc#roomconfig_maxusers"] = "none"
    room.affiliations["u0@example.org"] = {"affiliation": "owner"}
    for number in range(500):
        stanza = Stanza(xmppd.PRESENCE, {"from": f"u{number}@example.org/x", "to": f"{KITCHEN}/u{number}"})
        entry = xmppd.E(xmppd.MUC("x"))
        stanza.add(entry)
        sent.clear()
        started = time.process_time()
        room.join(stanza, f"u{number}", entry)
        spent = time.process_time() - started
    assert len(sent) == 499 + 499 + 1 + 1
    assert spent < 0.05  # seconds of CPU, for the last one of 500
    assert len({id(stanza.content) for stanza in sent[499:998]}) == 2  # with and without the real address
    sent.clear()
    speech = Stanza(xmppd.MESSAGE, {"from": "u7@example.org/x", "type": "groupchat"})
    speech.add(xmppd.E(xmppd.CLIENT("body"), None, "x" * 100_000))
    room.speak(speech)
    assert len(sent) == 500 and len({id(stanza.content) for stanza in sent}) == 1


def test_a_room_knows_only_so_many_people() -> None:
    """S54"""
    room = World().room
    room.affiliations |= {f"m{number}@example.org": {"affiliation": "member"} for number in range(xmppd.MAX_AFFILIATIONS)}
    stranger = RoomChange(affiliation="member", jid=JID("stranger", "example.org", ""))
    assert outcome(room.check_together, [stranger]) == "resource-constraint"
    assert outcome(room.check_together, [RoomChange(affiliation="none", jid=JID("m1", "example.org", ""))]) == ""


def test_one_person_has_only_so_many_clients_in_a_room() -> None:
    """S54"""
    world = World()
    for number in range(xmppd.MAX_SESSIONS_IN_ROOM):
        full = f"bob@example.org/{number}"
        world.views[full] = View(full)
        world.enter(full, "Bob")
    with pytest.raises(StanzaError) as refused:
        world.enter("bob@example.org/one-more", "Bob")
    assert refused.value.condition == "service-unavailable"
