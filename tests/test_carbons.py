"""Message Carbons (XEP-0280): which messages are copied, to whom, and what no copy is made of."""

from __future__ import annotations

import pytest

import xmppd
from tests.dialogue import Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer, ProcessServer

CARBONS = "xmlns='urn:xmpp:carbons:2'"
ROMEO, JULIET = "romeo@example.org", "juliet@example.org"
STATE = "<active xmlns='http://jabber.org/protocol/chatstates'/>"
Server = MemoryServer | ProcessServer


def copies(client: Client, wish: str = "enable") -> None:
    """Switch copies on or off."""
    client.sends(f"<iq type='set' id='c'><{wish} {CARBONS}/></iq>")
    client.receives("<iq type='result' id='c'/>")


def phone(server: Server, name: str = "juliet", resource: str = "phone", *, priority: int = 0) -> Client:
    """Another device of the account, with copies; it is available."""
    client = server.client().login(name, resource=resource)
    client.comes_online(f"<priority>{priority}</priority>")
    client.receives_anything()
    copies(client)
    return client


def copy(direction: str, message: str, to: str, type: str | None = "chat") -> str:
    """A copy as it comes to `to`."""
    kind = f"type='{type}' " if type else ""
    return (f"<message from='{to.partition('/')[0]}' to='{to}' {kind}><{direction} {CARBONS}>"
            f"<forwarded xmlns='urn:xmpp:forward:0'>{message}</forwarded></{direction}></message>")  # fmt: skip


def from_romeo(content: str, to: str = f"{JULIET}/balcony", attributes: str = "type='chat'") -> str:
    """What romeo says, with his stamp."""
    return f"<message xmlns='jabber:client' from='{ROMEO}/orchard' to='{to}' {attributes}>{content}</message>"


@pytest.fixture
def pair(server: Server, romeo: Client, juliet: Client) -> tuple[Client, Client, Client]:
    """Romeo, juliet on her balcony, and her phone, which gets copies."""
    romeo.comes_online()
    juliet.comes_online()
    hers = phone(server, priority=-1)
    for client in (romeo, juliet, hers):
        client.receives_anything()
    return romeo, juliet, hers


Pair = tuple[Client, Client, Client]


# ---- enabling (§3 to §5) -----------------------------------------------------------------


def test_it_can_be_discovered(romeo: Client) -> None:
    """§3 example 2, §6.2: at the server, and at one's account"""
    for to in ("example.org", ROMEO):
        romeo.sends(f"<iq type='get' id='d' to='{to}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
        info = romeo.receives("<iq type='result' id='d' ...>...</iq>")
        features = {feature.get("var") for feature in info.iter("{http://jabber.org/protocol/disco#info}feature")}
        assert features >= {"urn:xmpp:carbons:2", "urn:xmpp:carbons:rules:0"}


def test_it_is_enabled_and_disabled_as_often_as_one_likes(pair: Pair) -> None:
    """§4 examples 3 and 4, §5 examples 6 and 7, §10.1"""
    romeo, juliet, hers = pair
    copies(hers)
    copies(hers)
    romeo.sends(from_romeo("<body>O</body>"))
    juliet.receives(from_romeo("<body>O</body>"))
    hers.receives(copy("received", from_romeo("<body>O</body>"), f"{JULIET}/phone"))
    copies(hers, "disable")
    copies(hers, "disable")
    romeo.sends(from_romeo("<body>P</body>"))
    juliet.receives(from_romeo("<body>P</body>"))
    hers.receives_nothing()
    copies(hers)


@pytest.mark.parametrize("to", [JULIET, "example.org", "nobody@example.org"])
@pytest.mark.parametrize("wish", ["enable", "disable"])
def test_nobody_enables_it_for_others(romeo: Client, to: str, wish: str) -> None:
    """§4.1, §5.1, example 8"""
    romeo.sends(f"<iq type='set' id='c' to='{to}'><{wish} {CARBONS}/></iq>")
    romeo.receives("<iq type='error' id='c'><error type='cancel'><not-allowed .../></error></iq>")


# ---- receiving and sending (§7, §8) --------------------------------------------------------


def test_what_one_device_gets_the_others_see(pair: Pair) -> None:
    """§7 examples 9 and 10: the same type, from the account, the message as it came"""
    romeo, juliet, hers = pair
    message = from_romeo("<body>What man art thou?</body><thread>0e3141</thread>", attributes="type='chat' id='m1'")
    romeo.sends(message)
    juliet.receives(message)
    hers.receives(copy("received", message, f"{JULIET}/phone"))


@pytest.mark.wire
def test_what_one_device_gets_the_others_see_over_tls(pair: Pair) -> None:
    """§7, on real connections"""
    test_what_one_device_gets_the_others_see(pair)


def test_what_one_device_says_the_others_see(pair: Pair, server: Server) -> None:
    """§8 examples 12 and 13: also when the sender does not get copies; the sender gets none"""
    romeo, juliet, _hers = pair
    his = phone(server, "romeo", priority=-1)
    romeo.receives_anything()
    message = from_romeo("<body>Neither, fair saint.</body>")
    romeo.sends(message.replace(f"from='{ROMEO}/orchard' ", ""))
    juliet.receives(message)
    his.receives(copy("sent", message, f"{ROMEO}/phone"))
    _hers.receives(copy("received", message, f"{JULIET}/phone"))
    copies(romeo)
    romeo.sends(message)
    juliet.receives(message)
    his.receives(copy("sent", message, f"{ROMEO}/phone"))
    _hers.receives(copy("received", message, f"{JULIET}/phone"))
    romeo.receives_nothing()


def test_who_gets_the_message_itself_gets_no_copy(server: Server, romeo: Client, juliet: Client) -> None:
    """§7: to the bare JID, with equal priorities"""
    juliet.comes_online()
    hers = phone(server)
    juliet.receives_anything()
    message = from_romeo("<body>O</body>", JULIET)
    romeo.sends(message)
    juliet.receives(message)
    hers.receives(message)


def test_a_message_for_a_device_that_is_gone_is_copied_to_those_that_do_not_get_it(pair: Pair) -> None:
    """§7, RFC6121-8.5.3.2.1: chat for a full JID without a session goes to the most available"""
    romeo, juliet, hers = pair
    message = from_romeo("<body>O</body>", f"{JULIET}/gone")
    romeo.sends(message)
    juliet.receives(message)
    hers.receives(copy("received", message, f"{JULIET}/phone"))


def test_a_note_to_oneself_comes_once(server: Server, romeo: Client) -> None:
    """§8: to the account itself it is received, so it is not sent, too; nor copied to who wrote it"""
    romeo.comes_online("<priority>1</priority>")
    copies(romeo)
    his = phone(server, "romeo")
    romeo.receives_anything()
    his.receives_anything()
    romeo.sends(from_romeo("<body>buy milk</body>", ROMEO))
    romeo.receives(from_romeo("<body>buy milk</body>", ROMEO))
    his.receives(copy("received", from_romeo("<body>buy milk</body>", ROMEO), f"{ROMEO}/phone"))
    romeo.sends(from_romeo("<body>and bread</body>", f"{ROMEO}/phone"))
    his.receives(from_romeo("<body>and bread</body>", f"{ROMEO}/phone"))
    romeo.receives_nothing()


# ---- the rules (§6.1) ----------------------------------------------------------------------

BODY = "<body>O</body>"
USER = "http://jabber.org/protocol/muc#user"


@pytest.mark.parametrize(("attributes", "content"), [
    ("type='chat'", "<x xmlns='urn:example:secret'/>"),
    ("", BODY),
    ("type='normal'", BODY),
    ("", "<received xmlns='urn:xmpp:receipts' id='m'/>"),
    ("type='normal'", STATE),
    ("", "<displayed xmlns='urn:xmpp:chat-markers:0' id='m'/>"),
    ("", "<x xmlns='jabber:x:conference' jid='coven@chat.example.com'/>"),
    ("", f"<x xmlns='{USER}'><invite from='crone@example.com'/></x>"),
])  # fmt: skip
def test_conversations_are_copied(pair: Pair, attributes: str, content: str) -> None:
    """§6.1: chat, normal with a body, payloads of instant messaging, invitations of both kinds"""
    romeo, juliet, hers = pair
    message = from_romeo(content, attributes=attributes)
    romeo.sends(message)
    juliet.receives(message)
    type = attributes[6:-1] or None
    hers.receives(copy("received", message, f"{JULIET}/phone", type))


@pytest.mark.parametrize(("attributes", "content"), [
    ("type='groupchat'", BODY),
    ("type='headline'", BODY),
    ("", "<x xmlns='urn:example:data'/>"),
    ("type='chat'", f"{BODY}<private {CARBONS}/><no-copy xmlns='urn:xmpp:hints'/>"),
    ("type='chat'", f"{BODY}<private {CARBONS}/>"),
    ("type='chat'", f"{BODY}<no-copy xmlns='urn:xmpp:hints'/>"),
    ("type='chat'", f"{BODY}<x xmlns='{USER}'/>"),
    ("type='error'", f"{BODY}<error type='cancel'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"),
])  # fmt: skip
def test_others_are_not(pair: Pair, attributes: str, content: str) -> None:
    """§6.1, §9 examples 14 and 15, trap 4: private ones pass as they are; what a room sends comes to each by itself"""
    romeo, juliet, hers = pair
    message = from_romeo(content, attributes=attributes)
    romeo.sends(message)
    juliet.receives(message)
    hers.receives_nothing()


def test_nothing_private_is_copied_at_the_senders(server: Server, romeo: Client, juliet: Client) -> None:
    """§9: neither server copies it"""
    romeo.comes_online()
    his = phone(server, "romeo", priority=-1)
    romeo.receives_anything()
    message = from_romeo(f"{BODY}<private {CARBONS}/><no-copy xmlns='urn:xmpp:hints'/>")
    romeo.sends(message)
    juliet.receives(message)
    his.receives_nothing()


def test_what_one_says_in_private_to_somebody_in_a_room_is_copied(server: Server, romeo: Client) -> None:
    """§6.1, fourth rule about rooms: nobody else would show it to the account's other devices"""
    his = phone(server, "romeo", priority=-1)
    message = from_romeo(f"{BODY}<x xmlns='{USER}'/>", "coven@conference.example.org/witch", "type='chat' id='pm'")
    romeo.sends(message)
    romeo.receives("<message type='error' id='pm' ...>...</message>")
    his.receives(copy("sent", message, f"{ROMEO}/phone"))
    his.receives("<message from='romeo@example.org' type='error' ...>...</message>")


def test_errors_about_copied_messages_are_copied(server: MemoryServer, romeo: Client, elsewhere: Elsewhere) -> None:
    """§6.1: "sent in response to a message that was eligible", whoever says so, with or without its content"""
    his = phone(server, "romeo", priority=-1)
    for number, to in enumerate(("mercutio@example.com", "nobody@nowhere.example")):
        message = from_romeo(BODY, to, f"type='chat' id='m{number}'")
        romeo.sends(message)
        romeo.passes_barrier()
        his.receives(copy("sent", message, f"{ROMEO}/phone"))
        if not number:
            elsewhere.says(f"<message type='error' id='m0' from='{to}' to='{ROMEO}/orchard'><error type='cancel'>"
                           "<gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></message>")  # fmt: skip
        his.receives(f"<message from='{ROMEO}' type='error'><received {CARBONS}><forwarded xmlns='urn:xmpp:forward:0'>"
                     f"<message xmlns='jabber:client' type='error' from='{to}' ...>...</message></forwarded>"
                     "</received></message>")  # fmt: skip
        romeo.receives(f"<message type='error' id='m{number}' from='{to}' ...>...</message>")
    elsewhere.says(f"<message type='error' id='m7' from='mercutio@example.com' to='{ROMEO}/orchard'/>")
    romeo.receives("<message type='error' id='m7' from='mercutio@example.com'/>")
    his.receives_nothing()


# ---- who might be deceived (§11) -----------------------------------------------------------


@pytest.mark.parametrize("direction", ["received", "sent"])
def test_a_forged_copy_stays_the_forgers(pair: Pair, server: Server, direction: str) -> None:
    """S42 (CVE-2017-5589), example 11: it passes with the forger's address, and never in a wrapper of ours"""
    romeo, juliet, hers = pair
    his = phone(server, "romeo", priority=-1)
    romeo.receives_anything()
    forged = copy(direction, from_romeo("<body>meet me tonight</body>"), f"{JULIET}/balcony")
    romeo.sends(forged.replace(f"from='{JULIET}' ", "", 1))
    juliet.receives(forged.replace(f"from='{JULIET}' ", f"from='{ROMEO}/orchard' ", 1))
    hers.receives_nothing()
    his.receives_nothing()


def test_a_room_passes_no_forged_copies(server: Server, romeo: Client, juliet: Client) -> None:
    """S42: stripped in rooms, where `from` is the room's"""
    room = "kitchen@conference.example.org"
    romeo.sends(f"<presence to='{room}/Romeo'><x xmlns='http://jabber.org/protocol/muc'/></presence>")
    romeo.receives_anything()
    romeo.sends(f"<message to='{room}' type='groupchat'><body>O</body><received {CARBONS}/></message>")
    romeo.receives(f"<message from='{room}/Romeo' type='groupchat' ...><body>O</body><occupant-id .../>"
                   "<stanza-id .../></message>")  # fmt: skip


def test_blocked_people_are_not_copied(pair: Pair) -> None:
    """XEP-0191, §7: copies pass the same rules"""
    romeo, juliet, hers = pair
    juliet.sends(f"<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{ROMEO}'/></block></iq>")
    juliet.passes_barrier()
    juliet.forgets_unread()
    romeo.sends(from_romeo(BODY).replace("<message ", "<message id='m' "))
    romeo.receives("<message type='error' id='m' ...>...</message>")
    hers.receives_anything()
    juliet.receives_nothing()


def test_a_copy_that_bounces_troubles_nobody(pair: Pair) -> None:
    """§10.3: an error from the receiver of a copy goes to its own account, not to the sender"""
    romeo, juliet, hers = pair
    romeo.sends(from_romeo(BODY))
    juliet.receives(from_romeo(BODY))
    hers.receives(copy("received", from_romeo(BODY), f"{JULIET}/phone"))
    hers.sends(f"<message type='error' to='{JULIET}'/>")
    romeo.receives_nothing()


def test_sessions_that_end_leave_nothing_behind(server: MemoryServer, romeo: Client) -> None:
    """What isn't used costs nothing"""
    his = phone(server, "romeo")
    carbons = server.server.registry.feature(xmppd.Carbons)
    assert carbons._copying[xmppd.JID.parse(ROMEO)] == 1
    his.closes()
    assert not carbons._copying


def test_a_dead_sessions_message_is_not_repeated_to_who_had_a_copy(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """XEP-0198 §4 with XEP-0280: neither lost nor doubled"""
    juliet.comes_online()
    hers = phone(server, priority=-1)
    juliet.receives_anything()
    juliet.sends("<enable xmlns='urn:xmpp:sm:3'/>")
    juliet.receives("<enabled xmlns='urn:xmpp:sm:3'/>")
    romeo.sends(from_romeo(BODY))
    romeo.passes_barrier()
    hers.receives(copy("received", from_romeo(BODY), f"{JULIET}/phone"))
    juliet.forgets_unread()
    juliet.disconnects()
    hers.receives(f"<presence type='unavailable' from='{JULIET}/balcony'/>")
    hers.receives_nothing()
    assert server.storage.log("offline").read(xmppd.JID.parse(JULIET)) == []


def test_when_both_sessions_die_the_message_is_kept_once(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """XEP-0198 §4 with XEP-0280: who has got a copy has got the message, until that session dies, too"""
    juliet.comes_online()
    hers = phone(server, priority=-1)
    juliet.receives_anything()
    for client in (juliet, hers):
        client.sends("<enable xmlns='urn:xmpp:sm:3'/>")
        client.receives("<enabled xmlns='urn:xmpp:sm:3'/>")
    romeo.sends(from_romeo(BODY))
    romeo.passes_barrier()
    juliet.sends(f"<message to='{ROMEO}/orchard' type='chat'><body>said, not heard</body></message>")
    juliet.passes_barrier()
    romeo.passes_barrier()
    romeo.forgets_unread()
    for client in (juliet, hers):
        client.forgets_unread()
        client.disconnects()
    again = server.client().login("juliet", resource="balcony")
    again.sends("<presence/>")
    again.receives(f"<presence from='{JULIET}/balcony'/>",
                   from_romeo(f"{BODY}<delay xmlns='urn:xmpp:delay' from='example.org' stamp='*Z'/>"))  # fmt: skip
