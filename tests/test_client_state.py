"""Client State Indication (XEP-0352): what an inactive client is told at once, later, and never."""

from __future__ import annotations

import pytest

from tests.dialogue import Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer, ProcessServer

CSI = "xmlns='urn:xmpp:csi:0'"
SM = "xmlns='urn:xmpp:sm:3'"
ROMEO, JULIET = "romeo@example.org", "juliet@example.org"
BALCONY = f"{JULIET}/balcony"
STATE = "<composing xmlns='http://jabber.org/protocol/chatstates'/>"
RECEIPT = "<received xmlns='urn:xmpp:receipts' id='m'/>"
Server = MemoryServer | ProcessServer


def says(client: Client, content: str, attributes: str = "type='chat'") -> str:
    """Say something to juliet, and return what she gets of it when she gets it."""
    client.sends(f"<message to='{BALCONY}' {attributes}>{content}</message>")
    client.passes_barrier()
    return f"<message from='{client.jid}' to='{BALCONY}' {attributes}>{content}</message>"


@pytest.fixture
def sleeper(romeo: Client, juliet: Client) -> Client:
    """Juliet, who is romeo's contact, and whose client is inactive."""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    juliet.sends(f"<inactive {CSI}/>")
    return juliet


def shows(romeo: Client, status: str, type: str = "") -> str:
    """Romeo's presence changes; return what juliet gets of it."""
    kind = f"type='{type}'" if type else ""
    romeo.sends(f"<presence {kind}><status>{status}</status></presence>")
    romeo.receives(f"<presence from='{romeo.jid}' {kind}><status>{status}</status></presence>")
    return f"<presence from='{romeo.jid}' to='{JULIET}' {kind}><status>{status}</status></presence>"


def test_it_is_offered_after_the_login(server: Server) -> None:
    """§4.1 example 1"""
    client = server.client().connect()
    assert client.negotiates().find("{urn:xmpp:csi:0}csi") is None
    client.starts_tls()
    assert client.negotiates().find("{urn:xmpp:csi:0}csi") is None
    client.authenticates("romeo", "romeo-secret")
    assert client.negotiates().find("{urn:xmpp:csi:0}csi") is not None


def test_of_presence_only_the_last_of_each_is_told_and_later(romeo: Client, sleeper: Client) -> None:
    """§3.2, §4.2 examples 2 and 3"""
    shows(romeo, "a")
    shows(romeo, "b")
    last = shows(romeo, "c")
    sleeper.sends(f"<active {CSI}/>")
    sleeper.receives(last)
    sleeper.receives_nothing()
    active = shows(romeo, "d")
    sleeper.receives(active)


@pytest.mark.wire
def test_of_presence_only_the_last_is_told_over_tls(romeo: Client, sleeper: Client) -> None:
    """§3.2, on real connections"""
    shows(romeo, "a")
    last = shows(romeo, "b")
    sleeper.sends(f"<active {CSI}/>")
    sleeper.receives(last)


def test_a_message_takes_everything_along_in_order(romeo: Client, sleeper: Client) -> None:
    """RFC6120-10.1: what waits comes first"""
    receipt = says(romeo, RECEIPT)
    status = shows(romeo, "a")
    says(romeo, STATE)
    another = says(romeo, RECEIPT)
    message = says(romeo, f"<body>O</body>{STATE}")
    sleeper.receives(receipt, status, another, message)
    shows(romeo, "b")  # and then it is held again
    sleeper._check(not sleeper.unread(), "presence is held back")
    sleeper.sends(f"<active {CSI}/>")
    sleeper.receives(f"<presence from='{romeo.jid}' to='{JULIET}'><status>b</status></presence>")


def test_the_answer_to_a_ping_comes_behind_what_was_held(romeo: Client, sleeper: Client) -> None:
    """§5.1 example 4"""
    status = shows(romeo, "a")
    sleeper.sends(f"<active {CSI}/><iq type='get' id='p' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")
    sleeper.receives(status, "<iq type='result' id='p'/>")


@pytest.mark.parametrize("content", [
    "<body>O</body>",
    "<encrypted xmlns='eu.siacs.conversations.axolotl'/>",
    "<propose xmlns='urn:xmpp:jingle-message:0' id='call'/>",
    "<x xmlns='jabber:x:conference' jid='coven@chat.example.com'/>",
    "<x xmlns='http://jabber.org/protocol/muc#user'><invite from='crone@example.com'/></x>",
    "<event xmlns='urn:example:unknown'/>",
])  # fmt: skip
def test_what_matters_is_told_at_once(romeo: Client, sleeper: Client, content: str) -> None:
    """Anything that is not known to be unimportant"""
    sleeper.receives(says(romeo, content))


@pytest.mark.parametrize("stanza", [
    "<iq type='get' id='q' from='mercutio@example.com/x' to='{to}'><query xmlns='jabber:iq:version'/></iq>",
    "<iq type='result' id='q' from='mercutio@example.com/x' to='{to}'/>",
    "<message type='error' from='mercutio@example.com/x' to='{to}'><body>O</body></message>",
    "<message type='groupchat' from='coven@example.com/witch' to='{to}'><body>O</body></message>",
    "<presence from='coven@example.com/witch' to='{to}'><x xmlns='http://jabber.org/protocol/muc#user'>"
    "<item affiliation='none' role='none'/><status code='110'/></x></presence>",
    "<presence type='subscribe' from='mercutio@example.com' to='juliet@example.org'/>",
])  # fmt: skip
def test_what_needs_an_answer_or_concerns_oneself_is_told_at_once(
    sleeper: Client, elsewhere: Elsewhere, stanza: str
) -> None:
    """Requests, errors, rooms, one's own place in a room, subscriptions"""
    if "<iq type='get'" in stanza:
        sleeper.sends("<presence to='mercutio@example.com/x'/>")  # so that he may ask
        sleeper.passes_barrier()
    elsewhere.says(stanza.format(to=BALCONY))
    sleeper.receives(stanza.format(to=BALCONY).replace(" to='juliet@example.org'", ""))
    if "<iq type='get'" in stanza:
        sleeper.sends("<iq type='result' id='q' to='mercutio@example.com/x'/>")


@pytest.mark.config(limits={"held": 3})
def test_what_is_held_is_bounded(romeo: Client, sleeper: Client) -> None:
    """More than the limit of stanzas: everything is sent, and holding goes on"""
    held = [says(romeo, RECEIPT.replace("'m'", f"'{number}'")) for number in range(4)]
    sleeper.receives(*held)
    shows(romeo, "a")
    sleeper._check(not sleeper.unread(), "presence is held back")
    sleeper.sends(f"<active {CSI}/>")
    sleeper.receives(f"<presence from='{romeo.jid}' to='{JULIET}'><status>a</status></presence>")


def test_it_is_bounded_in_bytes(romeo: Client, sleeper: Client) -> None:
    """256 KB, whatever the number"""
    large = f"<received xmlns='urn:xmpp:receipts' id='{'x' * 100_000}'/>"
    sleeper.receives(*[says(romeo, large) for _ in range(3)])


@pytest.mark.config(limits={"held": 0})
def test_the_owner_may_switch_it_off(romeo: Client, sleeper: Client) -> None:
    """§3.2: SHOULD provide a way for administrators to configure them"""
    sleeper.receives(shows(romeo, "a"), shows(romeo, "b"))


def test_states_repeated_make_no_difference(romeo: Client, sleeper: Client) -> None:
    """§4.2: twice inactive, twice active"""
    sleeper.sends(f"<inactive {CSI}/>")
    status = shows(romeo, "a")
    sleeper.sends(f"<active {CSI}/><active {CSI}/>")
    sleeper.receives(status)
    sleeper.receives_nothing()


def test_nobody_learns_of_it(romeo: Client, sleeper: Client) -> None:
    """§5, §6: the state is unrelated to presence, and others see nothing"""
    romeo.receives_nothing()
    sleeper.sends(f"<active {CSI}/>")
    romeo.receives_nothing()


def test_copies_are_weighed_by_what_is_in_them(server: Server, romeo: Client, sleeper: Client) -> None:
    """XEP-0280: a copy of what somebody says matters; of what one has said elsewhere, it can wait"""
    sleeper.sends("<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq>")
    sleeper.receives("<iq type='result' id='c'/>")
    desk = server.client().login("juliet", resource="desk")
    desk.sends(f"<message to='{romeo.jid}' type='chat'><body>from the desk</body></message>")
    desk.sends(f"<message to='{romeo.jid}' type='chat'>{STATE}</message>")
    desk.passes_barrier()
    romeo.passes_barrier()
    romeo.forgets_unread()
    sleeper._check(not sleeper.unread(), "copies of what was sent are held back")
    romeo.sends(f"<message to='{JULIET}/desk' type='chat'>{STATE}</message>")
    romeo.sends(f"<message to='{JULIET}/desk' type='chat'><body>to the desk</body></message>")
    romeo.passes_barrier()
    sleeper.receives(*(f"<message from='{JULIET}' type='chat'><{kind} xmlns='urn:xmpp:carbons:2'>...</{kind}></message>"
                       for kind in ("sent", "sent", "received")))  # fmt: skip
    desk.receives_anything()


# ---- with stream management (§5.2, XEP-0198) ------------------------------------------------


def resumed(server: Server, id: str, h: int) -> Client:
    """Juliet is back."""
    juliet = server.client()
    juliet.logs_in("juliet")
    juliet.sends(f"<resume {SM} previd='{id}' h='{h}'/>")
    juliet.receives(f"<resumed {SM} previd='{id}' h='*'/>")
    juliet.jid = BALCONY
    return juliet


def test_a_resumed_stream_is_active(server: Server, romeo: Client, sleeper: Client) -> None:
    """§5.2: whatever the state was; what was held comes behind what is repeated"""
    sleeper.sends(f"<enable {SM} resume='true'/>")
    id = sleeper.receives(f"<enabled {SM} ...>...</enabled>").attrib["id"]
    message = says(romeo, "<body>O</body>")
    sleeper.receives(message)
    status = shows(romeo, "a")
    sleeper.disconnects()
    juliet = resumed(server, id, 0)
    juliet.receives(message, status)
    juliet.receives(shows(romeo, "b"))


def test_a_session_that_waits_keeps_the_last_presence_only(server: Server, romeo: Client, sleeper: Client) -> None:
    """An hour in a tunnel is not an hour of presence; what is held has not been counted"""
    sleeper.sends(f"<active {CSI}/><enable {SM} resume='true'/>")
    id = sleeper.receives(f"<enabled {SM} ...>...</enabled>").attrib["id"]
    sleeper.disconnects()
    for number in range(5):
        shows(romeo, str(number))
    message = says(romeo, "<body>O</body>")
    juliet = resumed(server, id, 0)
    juliet.receives(f"<presence from='{romeo.jid}' to='{JULIET}'><status>4</status></presence>", message)
    juliet.sends(f"<a {SM} h='2'/>")
    juliet.receives_nothing()


def test_stream_management_may_begin_while_inactive(server: Server, romeo: Client, sleeper: Client) -> None:
    """What is held is counted when it is sent"""
    status = shows(romeo, "a")
    sleeper.sends(f"<enable {SM} resume='true'/>")
    id = sleeper.receives(f"<enabled {SM} ...>...</enabled>").attrib["id"]
    sleeper.sends(f"<active {CSI}/>")
    sleeper.receives(status)
    sleeper.disconnects()
    resumed(server, id, 0).receives(status)


def test_what_was_held_at_the_end_is_not_lost(server: MemoryServer, romeo: Client, sleeper: Client) -> None:
    """XEP-0198 §4: a receipt waits like any other message"""
    sleeper.sends(f"<enable {SM}/>")
    sleeper.receives(f"<enabled {SM}/>")
    says(romeo, RECEIPT)
    shows(romeo, "a")
    sleeper.disconnects()
    romeo.receives_anything()
    juliet = server.client().login("juliet", resource="balcony")
    juliet.sends("<presence/>")
    juliet.receives_in_any_order(
        f"<presence from='{BALCONY}'/>", f"<presence from='{romeo.jid}' to='{BALCONY}'><status>a</status></presence>",
        f"<message from='{romeo.jid}' to='{BALCONY}' type='chat'>{RECEIPT}<delay .../></message>")  # fmt: skip
    romeo.receives_anything()
