"""The examples of XEP-0045, §6 to §10, played with the specification's own stanzas.

`Stage.plays(44, 45)` takes the stanzas of examples 44 and 45 one after the other: what has a
`from` at the service must reach whom it is addressed to, what comes from a person is sent by
that person, who logs in first if need be. The server may add to a stanza (occupant ids,
addresses for moderators); what the example has must be there. Where examples of the
specification contradict each other or name people by addresses that they don't have
elsewhere, `adapted` says so.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.dialogue import Client, parse, show
from tests.muc import (
    CONFIG,
    COVEN,
    HOST,
    SERVICE,
    Server,
    administering,
    configures,
    enter,
    enters,
    forget,
    lacks,
    person,
    saying,
)
from tests.servers import MemoryServer

pytestmark = [pytest.mark.config(**CONFIG), pytest.mark.unread]
CRONE, WICCA, HAG = f"crone1@{HOST}/desktop", f"wiccarocks@{HOST}/laptop", f"hag66@{HOST}/pda"
HECATE = f"hecate@{HOST}/broom"
NICKS = {CRONE: "firstwitch", WICCA: "secondwitch", HAG: "thirdwitch", HECATE: "hecate"}


def read_examples() -> dict[int, list[str]]:
    """Return the stanzas of each example, as text; in the file each begins at the beginning of a line."""
    text = Path(__file__).with_name("xep-0045-examples.xml").read_text()
    found = re.findall(r"<example n='(\d+)'>\n(.*?)</example>", text, re.DOTALL)
    stanza = re.compile(r"^<(?:iq|message|presence)\b.*?(?=^<(?:iq|message|presence)\b|\Z)", re.DOTALL | re.MULTILINE)
    return {int(number): [each.strip() for each in stanza.findall(content)] for number, content in found}


EXAMPLES = read_examples()


class Stage:
    """The witches, and all others who come up in the examples."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.clients: dict[str, Client] = {}

    def person(self, jid: str) -> Client:
        """Return somebody's client, logged in; for a bare JID, any of theirs."""
        bare = jid.partition("/")[0]
        known = self.clients.get(jid) or next((c for c in self.clients.values() if "/" not in jid and c.bare == bare), None)
        if known is None:
            known = self.clients[jid] = person(self.server, jid)
            known.sends("<presence/>")
            forget(known)
        return known

    def plays(self, *examples: int, adapted: tuple[tuple[str, str], ...] = (), only: slice = slice(None)) -> None:
        """Play examples; `adapted` replaces in them, `only` picks some of their stanzas."""
        for number in examples:
            for text in EXAMPLES[number][only]:
                for old, new in adapted:
                    text = text.replace(old, new)
                [stanza] = parse(text)
                if SERVICE in stanza.attrib["from"] or stanza.attrib["from"] == HOST:
                    self._arrives(number, stanza)
                else:
                    self.person(stanza.attrib["from"]).sends(text)

    def _arrives(self, number: int, expected: ET.Element) -> None:
        client = self.person(expected.attrib["to"])
        self.server.cast.settle(last=client)
        reasons = []
        for event in list(client._inbox):
            wrong = lacks(without_optional(expected), event.element)
            if not wrong:
                return client._inbox.remove(event)
            reasons.append(f"{show(event.element)}\n lacks {wrong}")
        raise AssertionError(f"example {number}: {client.jid} never hears\n{show(expected)}\nbut\n" + "\n".join(reasons))

    def nothing_more(self) -> None:
        """Forget what the examples don't show."""
        forget(*self.clients.values())

    def opens(self, room: str = COVEN, owner: str = CRONE, nick: str = "firstwitch", **fields: object) -> Client:
        """Let somebody open a room."""
        client = self.person(owner)
        enters(client, nick, room=room)
        configures(client, room, **fields)
        self.nothing_more()
        return client

    def enter(self, *people: str, room: str = COVEN, **nicks: str) -> None:
        """Let people enter, the witches under their nicknames."""
        for jid in people:
            enters(self.person(jid), NICKS[jid], room=room)
        self.nothing_more()

    def govern(self, *items: str, room: str = COVEN, owner: str = CRONE) -> None:
        """Let the owner change affiliations or roles beforehand."""
        self.person(owner).sends(administering(*items, room=room))
        self.nothing_more()


def without_optional(expected: ET.Element) -> ET.Element:
    """Drop what an answer may leave out: what an error is about and `by` whom, a nickname in an item."""
    plain = ET.fromstring(ET.tostring(expected))
    is_error, is_change = plain.get("type") == "error", plain.get("type") == "unavailable"
    for child in list(plain):
        if is_error and not plain.tag.endswith("}presence") and not child.tag.endswith("}error"):
            plain.remove(child)
    for element in plain.iter():
        element.attrib.pop("by", None)
        if plain.tag.endswith("}presence") and not is_change and element.tag.endswith("}item"):
            element.attrib.pop("nick", None)
    return plain


@pytest.fixture
def stage(server: MemoryServer) -> Stage:
    return Stage(server)


@pytest.fixture
def coven(stage: Stage) -> Stage:
    """The room with firstwitch, secondwitch the admin, and thirdwitch, a member as in most examples."""
    stage.opens(roomadmins=[f"wiccarocks@{HOST}"])
    stage.govern(f"affiliation='member' jid='hag66@{HOST}'")
    stage.enter(WICCA, HAG)
    return stage


# ---- §6 -----------------------------------------------------------------------------------------


def test_discovery(stage: Stage) -> None:
    """XEP0045-6.2-1, XEP0045-6.3-1, XEP0045-6.4-1, XEP0045-6.5-1"""
    stage.plays(1, 2, adapted=(("Chatroom Service", "Chat rooms"),))
    stage.plays(3, 4, adapted=(("Shakespearean Chat Service", "Chat rooms"),))
    for room, name in (("heath", "A Lonely Heath"), ("coven", "A Dark Cave"), ("forres", "The Palace"),
                       ("inverness", "Macbeth's Castle")):  # fmt: skip
        stage.opens(f"{room}@{SERVICE}", roomname=name)
    stage.plays(5, 6)
    stage.enter(WICCA)
    stage.plays(11, 12)
    configures(stage.person(CRONE), passwordprotectedroom=True, roomsecret="x", publicroom=False, whois="anyone")
    stage.nothing_more()
    stage.plays(8, 9, 11, 13)


# ---- §7 -----------------------------------------------------------------------------------------


def test_entering(stage: Stage) -> None:
    """XEP0045-7.2.2-1, XEP0045-7.2.1-1"""
    stage.opens(roomadmins=[f"wiccarocks@{HOST}"])
    stage.govern(f"affiliation='member' jid='hag66@{HOST}'")
    stage.enter(WICCA)
    stage.plays(18, 20, 21)


def test_entering_a_non_anonymous_room(stage: Stage) -> None:
    """XEP0045-7.2.3-1"""
    stage.opens(whois="anyone", enablelogging=True)
    stage.plays(18, 23)
    stage.nothing_more()
    stage.plays(18)  # entering again shows the same
    stage.plays(32, adapted=(("affiliation='member'", "affiliation='none'"), ("<status code='210'/>", "")))


def test_entering_with_a_password(stage: Stage) -> None:
    """XEP0045-7.2.5-1"""
    stage.opens(passwordprotectedroom=True, roomsecret="cauldronburn")
    stage.plays(18, 25, 26)
    stage.plays(22, adapted=(("affiliation='member'", "affiliation='none'"), ("<status code='210'/>", "")))


@pytest.mark.parametrize(("number", "fields", "item"), [
    (27, {"membersonly": True}, ""), (28, {}, f"affiliation='outcast' jid='hag66@{HOST}'"),
    (29, {}, f"affiliation='member' jid='hecate@{HOST}' nick='thirdwitch'"), (30, {"maxusers": 1}, "")])  # fmt: skip
def test_entering_denied(stage: Stage, number: int, fields: dict[str, object], item: str) -> None:
    """XEP0045-7.2.6-1, XEP0045-7.2.7-1, XEP0045-7.2.8-1, XEP0045-7.2.9-1"""
    stage.opens(**fields)
    if item:
        stage.govern(item)
    stage.plays(18, number)


def test_entering_a_locked_room_and_without_a_nickname(stage: Stage) -> None:
    """XEP0045-7.2.10-1, XEP0045-7.2.1-2, XEP0045-7.2.18-1"""
    stage.plays(153, 154, 18, 31)
    stage.person(HAG).sends(enter("", room=COVEN).replace(f"{COVEN}/", COVEN))
    stage.plays(19)
    stage.plays(42, 43)


def test_history_and_subject(coven: Stage) -> None:
    """XEP0045-7.2.13-1, XEP0045-7.2.14-1, XEP0045-7.2.15-1"""
    coven.person(CRONE).sends(saying("Thrice the brinded cat hath mew'd."))
    coven.person(WICCA).sends(saying("Thrice and once the hedge-pig whined."))
    coven.person(HAG).sends(saying("Harpier cries 'Tis time, 'tis time."))
    coven.nothing_more()
    enters_quietly(coven.person(HECATE))
    coven.plays(33)
    for number in (35, 36, 37, 38, 39):
        coven.person(HAG).sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")
        coven.nothing_more()
        coven.plays(number)
        came = coven.person(HAG).receives_anything()
        said = [stanza for stanza in came if stanza.find("{jabber:client}body") is not None]
        assert len(said) == (0 if number == 39 else 3), f"example {number}"
    coven.plays(84, 85)
    coven.nothing_more()
    enters_quietly(coven.person(HECATE))
    coven.plays(40, adapted=((CRONE, HECATE),))


def enters_quietly(client: Client) -> None:
    """Enter; what comes stays unread."""
    client.sends(enter("hecate"))
    client.passes_barrier()


def test_messages(coven: Stage) -> None:
    """XEP0045-7.4-1, XEP0045-7.5-1, XEP0045-7.5-2"""
    coven.plays(44, 45, 46, 47, 48)


def test_nicknames_and_availability(coven: Stage) -> None:
    """XEP0045-7.6-1, XEP0045-7.6-2, XEP0045-7.7-1"""
    coven.plays(54, 55, adapted=(("/oldhag'", "/secondwitch'"),))  # secondwitch's nickname in all other examples
    coven.plays(49, 50)
    coven.person(HAG).sends(f"<presence id='ifd1c35' to='{COVEN}/secondwitch'/>")
    coven.plays(52, adapted=(("/thirdwitch'", "/secondwitch'"),))  # an error comes from where the stanza went


def test_invitations(stage: Stage) -> None:
    """XEP0045-7.8.2-1, XEP0045-7.8.2-4"""
    stage.opens(passwordprotectedroom=True, roomsecret="cauldronburn")
    stage.person(HECATE)
    stage.plays(56)
    stage.plays(57, adapted=((f"{CRONE}'>", f"crone1@{HOST}'>"),))  # the bare JID, as in example 64
    stage.plays(58, 59)


def test_one_to_one_becomes_a_conference(stage: Stage) -> None:
    """XEP0045-7.8.2-1: §7.9"""
    for jid in (CRONE, WICCA, HAG):
        stage.person(jid)
    stage.plays(61)
    configures(stage.person(CRONE))
    stage.nothing_more()
    stage.plays(62, 63)
    stage.plays(64, adapted=((f"{COVEN}/firstwitch", COVEN),))  # as in example 57
    stage.govern(f"affiliation='member' jid='wiccarocks@{HOST}'")
    stage.plays(65, only=slice(3))


def test_registration(coven: Stage) -> None:
    """XEP0045-7.10-1, XEP0045-7.10-2, XEP0045-7.10-3, XEP0045-7.10-4, XEP0045-7.12-1"""
    coven.govern(f"affiliation='none' jid='hag66@{HOST}'", f"affiliation='member' jid='hecate@{HOST}' nick='thirdwitch'")
    coven.plays(71, 72)
    coven.govern(f"affiliation='member' jid='hecate@{HOST}' nick=''")
    coven.plays(71, 75, 76, 66, 69, 77, 78)
    configures(coven.person(CRONE), membersonly=True)
    coven.govern(f"affiliation='none' jid='hag66@{HOST}'")
    coven.plays(66, 68)
    coven.plays(66, 67, adapted=(("coven@", "nowhere@"),))


def test_voice_requests(stage: Stage) -> None:
    """XEP0045-7.13-1"""
    crone = stage.opens(owner=f"crone1@{HOST}/pda", moderatedroom=True)
    stage.enter(HAG)
    stage.plays(79)
    [form] = crone.receives_anything()
    [expected] = parse(EXAMPLES[108][0])
    assert fields(form) == {**fields(expected), "muc#request_allow": "0"}
    stage.plays(109)
    stage.plays(97, adapted=((CRONE, f"crone1@{HOST}/pda"), ("affiliation='member'", "affiliation='none'"),
                             ("<reason>A worthy witch indeed!</reason>", "")))  # fmt: skip


def fields(stanza: ET.Element) -> dict[str | None, str | None]:
    """The values of a form."""
    return {each.get("var"): each.findtext("{jabber:x:data}value") for each in stanza.iter("{jabber:x:data}field")}


def test_leaving(coven: Stage) -> None:
    """XEP0045-7.14-1"""
    coven.plays(80, 82)
    coven.plays(83, adapted=(("/oldhag'", "/secondwitch'"),))
    [goodbye] = [stanza for stanza in coven.person(CRONE).receives_anything() if stanza.get("type") == "unavailable"]
    assert goodbye.findtext("{jabber:client}status") == "gone where the goblins go"


# ---- §8 -----------------------------------------------------------------------------------------


def test_the_subject(coven: Stage) -> None:
    """XEP0045-8.1-1, XEP0045-8.1-3"""
    coven.plays(84, 85)
    coven.person(HAG).sends(f"<message id='lh2bs617' to='{COVEN}' type='groupchat'><subject>S</subject></message>")
    coven.plays(87, adapted=((f"'{COVEN}/thirdwitch'", f"'{COVEN}'"),))  # an error comes from where the stanza went
    coven.plays(88)


def test_kicks(stage: Stage) -> None:
    """XEP0045-8.2-1, XEP0045-8.2-2"""
    room = f"harfleur@{SERVICE}"
    stage.opens(room, f"fluellen@{HOST}/pda", "Fluellen")
    for jid, nick in ((f"pistol@{HOST}/harfleur", "pistol"), (f"gower@{HOST}/cell", "gower")):
        enters(stage.person(jid), nick, room=room)
    stage.nothing_more()
    stage.plays(89, 90, 91, 92)
    stage.opens(roomadmins=[f"wiccarocks@{HOST}"])
    stage.enter(WICCA)
    stage.person(WICCA).sends(administering("nick='firstwitch' role='none'", id="kicktest"))
    stage.plays(93)


def test_voice(stage: Stage) -> None:
    """XEP0045-8.3-1, XEP0045-8.4-1"""
    stage.opens(moderatedroom=True, roomadmins=[f"wiccarocks@{HOST}"])
    stage.govern(f"affiliation='member' jid='hag66@{HOST}'")
    stage.enter(WICCA, HAG)
    stage.plays(98, 100, 101, 95, 96, 97, 99, 94)
    stage.person(CRONE).sends(administering("nick='secondwitch' role='visitor'", id="voicetest"))
    stage.plays(102)


# ---- §9 -----------------------------------------------------------------------------------------


def test_bans(stage: Stage) -> None:
    """XEP0045-9.1-1, XEP0045-9.2-1, XEP0045-9.2-2"""
    room, king = f"southampton@{SERVICE}", f"kinghenryv@{HOST}/throne"
    stage.opens(room, king, "The \u265a")
    for jid, nick in ((f"earlofcambridge@{HOST}/stabber", "cambridge"), (f"exeter@{HOST}/pda", "exeter")):
        enters(stage.person(jid), nick, room=room)
    stage.nothing_more()
    stage.plays(111, 112, 113)
    stage.plays(114, adapted=((f"jid='earlofcambridge@{HOST}/stabber'", ""),))  # exeter is no moderator
    stage.plays(116, 117, 118, 119, 110)


def test_membership(coven: Stage) -> None:
    """XEP0045-9.3-1, XEP0045-9.4-1, XEP0045-9.5-1"""
    coven.plays(125, 126, 127, 121, 122, 123)
    coven.plays(129)
    coven.plays(130, adapted=(("role='participant'", ""),))  # §17.4: no role in lists of affiliations
    coven.plays(131, 132, 133, 120, 124)


def test_membership_of_a_members_only_room(coven: Stage) -> None:
    """XEP0045-9.4-1, XEP0045-9.5-2, XEP0045-7.8.2-2"""
    configures(coven.person(CRONE), membersonly=True, passwordprotectedroom=True, roomsecret="cauldronburn")
    coven.nothing_more()
    coven.person(HAG).sends(f"<message id='x' to='{COVEN}'><x xmlns='http://jabber.org/protocol/muc#user'>"
                            f"<invite to='hecate@{HOST}'/></x></message>")  # fmt: skip
    coven.plays(135)
    coven.person(HECATE)
    coven.plays(131)
    coven.plays(134, adapted=((f"bard@{HOST}", COVEN),))
    coven.plays(128, adapted=(("TheBard", "firstwitch"),))


def test_moderators(coven: Stage) -> None:
    """XEP0045-9.6-1, XEP0045-9.7-1, XEP0045-9.8-1"""
    coven.plays(138, 139, 140, 146, 147, 142, 143, 144, 137, 141)
    enters(coven.person(HECATE), "Hecate")
    coven.govern("nick='thirdwitch' role='moderator'")
    coven.plays(148, 149)
    coven.person(CRONE).sends(administering("nick='secondwitch' role='participant'", id="modtest"))
    coven.plays(145)


# ---- §10 ----------------------------------------------------------------------------------------


def test_an_instant_room(stage: Stage) -> None:
    """XEP0045-10.1.2-1"""
    stage.plays(153, 154, 155)
    stage.plays(160, adapted=(("create2", "create1"),))


def test_a_reserved_room(stage: Stage) -> None:
    """XEP0045-10.1.3-1, XEP0045-10.1.3-2, XEP0045-10.1.3-3"""
    crone = stage.person(CRONE)
    stage.plays(153, 154, 156)
    offered = {field.get("var") for field in crone.receives_anything()[-1].iter("{jabber:x:data}field")}
    wanted = {field.get("var") for field in ET.fromstring(EXAMPLES[157][0]).iter("{jabber:x:data}field")}
    assert wanted - {None} <= offered
    crone.sends(EXAMPLES[159][0].replace("<value>cauldronburn</value>", ""))
    stage.plays(161, 159, 160, 163)
    [form] = crone.receives_anything()[-1:]
    [expected] = parse(EXAMPLES[165][0])
    different = {var for var, value in fields(expected).items() if var and fields(form)[var] != value}
    assert different == {"muc#roomconfig_changesubject", "muc#roomconfig_roomowners"}  # 159 sets the former to 1; the owner
    stage.plays(166)
    stage.person(WICCA).sends(f"<iq type='get' id='configures' to='{COVEN}'>"
                              "<query xmlns='http://jabber.org/protocol/muc#owner'/></iq>")  # fmt: skip
    stage.plays(164)


def test_a_cancelled_room(stage: Stage) -> None:
    """XEP0045-10.1.3-3"""
    stage.plays(153, 154, 162)
    stage.plays(160)
    gone = stage.person(CRONE).receives_anything()[-1]
    assert gone.get("type") == "unavailable" and gone.find(".//{*}destroy") is not None


def test_changes_by_configuration(coven: Stage) -> None:
    """XEP0045-10.2-3, XEP0045-10.2.1-1"""
    crone = coven.person(CRONE)
    configures(crone, roomadmins=[])
    coven.plays(167, adapted=(("affiliation='member'", "affiliation='none'"),))
    configures(crone, roomadmins=[f"wiccarocks@{HOST}"])
    coven.plays(168)
    configures(crone, roomowners=[f"wiccarocks@{HOST}", f"crone1@{HOST}"])
    coven.plays(170)
    configures(crone, roomowners=[f"crone1@{HOST}"], roomadmins=[f"wiccarocks@{HOST}"])
    coven.plays(169)
    configures(crone, enablelogging=True)
    coven.plays(171)


def test_owners(coven: Stage) -> None:
    """XEP0045-10.3-1, XEP0045-10.4-1, XEP0045-10.5-1"""
    enters(coven.person(HECATE), "hecate")
    coven.nothing_more()
    full = ((f"jid='hecate@{HOST}'", f"jid='{HECATE}'"),)  # §17.3: in presence it is the full JID
    coven.plays(173, 174)
    coven.plays(175, adapted=full)
    coven.plays(178, 179)
    coven.plays(180, adapted=(*full, ("/secondwitch'", "/hecate'")))
    bard = ((f"bard@{HOST}/globe", CRONE),)
    coven.plays(181, 182, 183, 185, adapted=bard)
    coven.person(HAG).sends(administering(f"affiliation='owner' jid='hag66@{HOST}'", id="ownertest"))
    coven.plays(184, 172, 177)


def test_admins(coven: Stage) -> None:
    """XEP0045-10.6-1, XEP0045-10.7-1, XEP0045-10.8-1"""
    full = ((f"jid='wiccarocks@{HOST}'", f"jid='{WICCA}'"),)
    coven.plays(192, 193)
    coven.plays(194, adapted=full)
    coven.plays(187, 188)
    coven.plays(189, adapted=full)
    coven.govern(f"affiliation='admin' jid='hag66@{HOST}'", f"affiliation='admin' jid='wiccarocks@{HOST}' nick='secondwitch'")
    bard = ((f"bard@{HOST}/desktop", CRONE), (f"bard@{HOST}/globe", CRONE))
    coven.plays(196, 197, 198, 200, adapted=bard)
    coven.person(HAG).sends(administering(f"affiliation='admin' jid='hag66@{HOST}'", id="admintest"))
    coven.plays(199, 186, 191)


def test_destruction(stage: Stage) -> None:
    """XEP0045-10.9-1, XEP0045-10.9-2"""
    heath = f"heath@{SERVICE}"
    stage.opens(heath, roomadmins=[f"wiccarocks@{HOST}"])
    stage.enter(WICCA, HAG, room=heath)
    stage.person(WICCA).sends(f"<iq type='set' id='destroytest' to='{heath}'><query "
                              "xmlns='http://jabber.org/protocol/muc#owner'><destroy/></query></iq>")  # fmt: skip
    stage.plays(204, 201, 202, 203)


@pytest.mark.config(**{**CONFIG, "muc": {"host": "chat", "create": "admins"}})
def test_creation_denied(stage: Stage) -> None:
    """XEP0045-10.1.1-1"""
    stage.plays(18, 152)
