"""The blocking command (XEP-0191), and how it and privacy lists (XEP-0016) look at the same rules.

The mission's checklist has no items of XEP-0191; the tests name its sections.
"""

from __future__ import annotations

import pytest

from tests.dialogue import Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer

BLOCKING = "urn:xmpp:blocking"
PRIVACY = "jabber:iq:privacy"
UNAVAILABLE = "<presence type='unavailable' from='romeo@example.org/orchard' to='juliet@example.org'/>"
REFUSED = "<message type='error' id='{}'><error type='cancel'><service-unavailable .../></error></message>"


def items(*jids: str) -> str:
    """Return the <item/>s of a request."""
    return "".join(f"<item jid='{jid}'/>" for jid in jids)


def sends_command(client: Client, name: str, *jids: str) -> None:
    """Send a block or unblock."""
    client.sends(f"<iq type='set' id='{name}'><{name} xmlns='{BLOCKING}'>{items(*jids)}</{name}></iq>")


def pushed(name: str, *jids: str) -> str:
    """Return the pattern of a push."""
    return f"<iq type='set' id='*'><{name} xmlns='{BLOCKING}'>{items(*jids)}</{name}></iq>"


def blocks(client: Client, *jids: str) -> None:
    """Block, and drop what comes because of it."""
    sends_command(client, "block", *jids)
    assert "result" in [stanza.get("type") for stanza in client.receives_anything()]


def unblocks(client: Client, *jids: str) -> None:
    """Unblock, or all without addresses, and drop what comes because of it."""
    sends_command(client, "unblock", *jids)
    assert "result" in [stanza.get("type") for stanza in client.receives_anything()]


def blocklist(client: Client) -> list[str]:
    """Ask for the blocklist."""
    client.sends(f"<iq type='get' id='list'><blocklist xmlns='{BLOCKING}'/></iq>")
    result = client.receives(f"<iq type='result' id='list'><blocklist xmlns='{BLOCKING}'>...</blocklist></iq>")
    return [item.attrib["jid"] for item in result[0]]


def query(client: Client, type: str, content: str) -> str:
    """Send a privacy query; return the answer's children, as `name=value of the attributes`; drop everything else."""
    client.sends(f"<iq type='{type}' id='query'><query xmlns='{PRIVACY}'>{content}</query></iq>")
    [answer] = [stanza for stanza in client.receives_anything() if stanza.get("id") == "query"]
    assert answer.get("type") == "result"
    elements = list(answer.iter())[2:]
    return " ".join(" ".join([element.tag.partition("}")[2], *element.attrib.values()]) for element in elements)


@pytest.fixture
def friends(romeo: Client, juliet: Client) -> None:
    """Romeo and Juliet are available and see each other."""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)


# ---- the command ----------------------------------------------------------------------


def test_the_server_says_that_it_can_block(romeo: Client) -> None:
    """§3.1"""
    romeo.sends("<iq type='get' id='d' to='example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    info = romeo.receives("<iq type='result' id='d'><query ...>...</query></iq>")
    assert BLOCKING in [feature.get("var") for feature in info[0]]


@pytest.mark.wire
def test_blocking_unblocking_and_the_blocklist(romeo: Client) -> None:
    """§3.2, §3.3, §3.4: examples 3 to 8 and 10 to 12"""
    assert blocklist(romeo) == []
    sends_command(romeo, "block", "romeo@montague.net")
    romeo.receives("<iq type='result' id='block'/>", pushed("block", "romeo@montague.net"))
    sends_command(romeo, "block", "Iago@Shakespeare.lit", "montague.net", "a@b/c")
    romeo.receives("<iq type='result' id='block'/>", pushed("block", "iago@shakespeare.lit", "montague.net", "a@b/c"))
    assert blocklist(romeo) == ["romeo@montague.net", "iago@shakespeare.lit", "montague.net", "a@b/c"]
    sends_command(romeo, "unblock", "iago@shakespeare.lit", "a@b/c")
    romeo.receives("<iq type='result' id='unblock'/>", pushed("unblock", "iago@shakespeare.lit", "a@b/c"))
    assert blocklist(romeo) == ["romeo@montague.net", "montague.net"]


def test_unblocking_everybody(romeo: Client) -> None:
    """§3.5: examples 13 to 15"""
    blocklist(romeo)
    blocks(romeo, "a@b", "c@d")
    sends_command(romeo, "unblock")
    romeo.receives("<iq type='result' id='unblock'/>", pushed("unblock"))
    assert blocklist(romeo) == []


def test_pushes_go_to_the_resources_that_have_asked_for_the_blocklist(server: MemoryServer, romeo: Client) -> None:
    """§3.3, §3.4"""
    home, garden = (server.client().login("romeo", resource=name) for name in ("home", "garden"))
    blocklist(home)
    sends_command(romeo, "block", "a@b")
    romeo.receives("<iq type='result' id='block'/>")
    home.receives(pushed("block", "a@b"))
    sends_command(romeo, "unblock", "a@b")
    romeo.receives("<iq type='result' id='unblock'/>")
    home.receives(pushed("unblock", "a@b"))
    garden.receives_nothing()


def test_blocking_twice_and_unblocking_whom_nobody_has_blocked_change_nothing(romeo: Client) -> None:
    blocks(romeo, "a@b", "a@b")
    blocks(romeo, "a@b")
    unblocks(romeo, "c@d")
    assert blocklist(romeo) == ["a@b"]


@pytest.mark.parametrize(
    ("command", "condition"),
    [
        ("<block xmlns='{}'/>", "bad-request"),  # §3.3
        ("<block xmlns='{}'><item/></block>", "bad-request"),
        ("<block xmlns='{}'><item jid=''/></block>", "bad-request"),
        ("<block xmlns='{}'><item jid='c@d'/><item jid='@'/></block>", "jid-malformed"),
        ("<block xmlns='{}'><item xmlns='urn:other' jid='c@d'/></block>", "bad-request"),
        ("<unblock xmlns='{}'><item/></unblock>", "bad-request"),
        ("<unblock xmlns='{}'><item xmlns='urn:other' jid='a@b'/></unblock>", "bad-request"),  # not: everybody
        ("<unblock xmlns='{}'><item jid='a@b@c'/></unblock>", "jid-malformed"),
        ("<blocklist xmlns='{}'/>", "service-unavailable"),  # a set
    ],
)
def test_malformed_commands_change_nothing(romeo: Client, command: str, condition: str) -> None:
    blocks(romeo, "a@b")
    romeo.sends(f"<iq type='set' id='x'>{command.format(BLOCKING)}</iq>")
    romeo.receives(f"<iq type='error' id='x'><error type='*'><{condition} .../></error></iq>")
    assert blocklist(romeo) == ["a@b"]


def test_the_blocklist_of_others_is_refused(romeo: Client) -> None:
    """§3.2: "with no 'to' address"; one's own bare JID is the same"""
    romeo.sends(f"<iq type='get' id='o' to='juliet@example.org'><blocklist xmlns='{BLOCKING}'/></iq>")
    romeo.receives("<iq type='error' id='o'><error type='cancel'><service-unavailable .../></error></iq>")
    romeo.sends(f"<iq type='set' id='p' to='juliet@example.org'><block xmlns='{BLOCKING}'>{items('a@b')}</block></iq>")
    romeo.receives("<iq type='error' id='p'><error type='cancel'><service-unavailable .../></error></iq>")
    romeo.sends(f"<iq type='get' id='s' to='romeo@example.org'><blocklist xmlns='{BLOCKING}'/></iq>")
    romeo.receives(f"<iq type='result' id='s'><blocklist xmlns='{BLOCKING}'/></iq>")


@pytest.mark.config(limits={"privacy_rules": 3})
def test_the_blocklist_is_limited(romeo: Client) -> None:
    """S59"""
    blocks(romeo, "a@b", "c@d", "e@f")
    sends_command(romeo, "block", "g@h")
    romeo.receives("<iq type='error' id='block'><error type='wait'><resource-constraint .../></error></iq>")
    assert blocklist(romeo) == ["a@b", "c@d", "e@f"]


# ---- its effect -----------------------------------------------------------------------


@pytest.mark.wire
@pytest.mark.usefixtures("friends")
def test_who_is_blocked_sees_one_go_and_come_back(romeo: Client, juliet: Client) -> None:
    """§3.3, §3.4, §4: presence, and the subscriptions stay as they are"""
    sends_command(romeo, "block", "juliet@example.org")
    juliet.receives(UNAVAILABLE)
    romeo.receives("<presence type='unavailable' from='juliet@example.org/balcony'/>", "<iq type='result' id='block'/>")
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    juliet.sends("<presence><show>xa</show></presence><presence type='probe' to='romeo@example.org'/>")
    juliet.receives("<presence from='juliet@example.org/balcony'><show>xa</show></presence>")
    juliet.receives_nothing()
    sends_command(romeo, "unblock", "juliet@example.org")
    romeo.receives("<presence from='juliet@example.org/balcony'><show>xa</show></presence>")
    romeo.receives("<iq type='result' id='unblock'/>")
    juliet.receives("<presence from='romeo@example.org/orchard' to='juliet@example.org'><show>away</show></presence>")
    romeo.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
    contact = "<item jid='juliet@example.org' subscription='both'/>"
    romeo.receives(f"<iq type='result' id='r'><query xmlns='jabber:iq:roster' ...>{contact}</query></iq>")


@pytest.mark.parametrize("address", ["juliet@example.org", "juliet@example.org/balcony", "example.org"])
@pytest.mark.usefixtures("friends")
def test_every_form_of_an_address_blocks(romeo: Client, juliet: Client, address: str) -> None:
    """§6, §3.3, S48"""
    blocks(romeo, address)
    juliet.receives(UNAVAILABLE if "/" not in address else UNAVAILABLE.replace("org'/>", "org/balcony'/>"))
    for number, to in enumerate(["romeo@example.org", "romeo@example.org/orchard", "romeo@example.org/gone"]):
        juliet.sends(f"<message to='{to}' id='m{number}' type='chat'><body>O Romeo</body></message>")
        juliet.receives(REFUSED.format(f"m{number}"))
        juliet.sends(f"<iq to='{to}' id='i{number}' type='get'><query xmlns='jabber:iq:version'/></iq>")
        juliet.receives(f"<iq type='error' id='i{number}'><error type='cancel'><service-unavailable .../></error></iq>")
    juliet.sends("<iq to='romeo@example.org/orchard' id='r' type='result'/>")
    juliet.sends("<presence to='romeo@example.org/orchard'/>")
    romeo.receives_nothing()
    unblocks(romeo, address)
    juliet.receives("<presence from='romeo@example.org/orchard' ...>...</presence>")
    juliet.sends("<message to='romeo@example.org' id='n'/>")
    romeo.receives("<message from='juliet@example.org/balcony' to='romeo@example.org' id='n'/>")


def test_another_resource_of_a_blocked_person_is_blocked_as_well(server: MemoryServer, romeo: Client) -> None:
    """S48"""
    blocks(romeo, "juliet@example.org")
    tomb = server.client().login("juliet", resource="tomb")
    tomb.sends("<message to='romeo@example.org/orchard' id='m'/>")
    tomb.receives(REFUSED.format("m"))
    romeo.receives_nothing()


def test_only_the_resource_that_is_named_is_blocked(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§6"""
    blocks(romeo, juliet.jid)
    tomb = server.client().login("juliet", resource="tomb")
    tomb.sends("<message to='romeo@example.org/orchard' id='m'/>")
    romeo.receives("<message from='juliet@example.org/tomb' id='m'/>")
    juliet.sends("<message to='romeo@example.org/orchard' id='m'/>")
    juliet.receives(REFUSED.format("m"))


def test_a_block_outlives_the_session(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """§3.3: "across sessions", also while nobody is there; and nothing is kept for later (S48)"""
    blocks(romeo, "juliet@example.org")
    romeo.closes()
    juliet.sends("<message to='romeo@example.org' id='m' type='chat'><body>O Romeo</body></message>")
    juliet.receives(REFUSED.format("m"))
    juliet.sends("<presence to='romeo@example.org' type='subscribe'/>")
    juliet.receives_anything()
    romeo.login("romeo", resource="orchard")
    romeo.comes_online()
    romeo.receives_nothing()
    assert blocklist(romeo) == ["juliet@example.org"]


@pytest.mark.parametrize("to", ["juliet@example.org", "juliet@example.org/balcony"])
def test_one_cannot_write_to_whom_one_has_blocked(romeo: Client, juliet: Client, to: str) -> None:
    """§3.3: example 9"""
    blocks(romeo, "juliet@example.org")
    error = "<error type='cancel'><not-acceptable .../><blocked xmlns='urn:xmpp:blocking:errors'/></error>"
    romeo.sends(f"<message to='{to}' id='m'><body>Can you hear me now?</body></message>")
    romeo.receives(f"<message type='error' id='m'>{error}</message>")
    romeo.sends(f"<iq type='get' to='{to}' id='i'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives(f"<iq type='error' id='i'>{error}</iq>")
    romeo.sends(f"<presence to='{to}' id='p'/>")
    romeo.receives(f"<presence type='error' id='p'>{error}</presence>")
    juliet.receives_nothing()


def test_a_request_that_nobody_has_answered_is_not_repeated_to_whom_one_has_blocked(
    server: MemoryServer, romeo: Client
) -> None:
    """Of the server's own accord nothing leaves either; what ends a relation does."""
    verona = Elsewhere(server)
    romeo.comes_online()
    romeo.sends("<presence type='subscribe' to='tybalt@example.com'/>")
    romeo.receives_anything()
    blocks(romeo, "tybalt@example.com")
    verona.forgets()
    romeo.sends("<presence type='unavailable'/><presence/>")
    romeo.receives_anything()
    verona.receives_nothing()
    romeo.sends("<iq type='set' id='r'><query xmlns='jabber:iq:roster'>"
                "<item jid='tybalt@example.com' subscription='remove'/></query></iq>")  # fmt: skip
    romeo.receives_anything()
    verona.receives("<presence type='unsubscribe' from='romeo@example.org' to='tybalt@example.com'/>")


def test_to_leave_a_room_by_blocking_it(server: MemoryServer, romeo: Client) -> None:
    """§3.3: who has had directed presence is told, and the client seems to be out"""
    rooms = Elsewhere(server)
    romeo.sends("<presence to='garden@example.com/Romeo'/>")
    romeo.passes_barrier()
    rooms.forgets()
    sends_command(romeo, "block", "garden@example.com")
    romeo.receives("<presence type='unavailable' from='garden@example.com/Romeo'/>", "<iq type='result' id='block'/>")
    rooms.receives("<presence type='unavailable' from='romeo@example.org/orchard' to='garden@example.com/Romeo'/>")
    romeo.closes()
    rooms.receives_nothing()


def test_blocking_oneself_or_the_server_does_nothing(server: MemoryServer, romeo: Client) -> None:
    """§5, note 1"""
    home = server.client().login("romeo", resource="home")
    blocks(romeo, "romeo@example.org", "example.org")
    home.sends("<message to='romeo@example.org/orchard' id='m'/>")
    romeo.receives("<message from='romeo@example.org/home' id='m'/>")


@pytest.mark.usefixtures("friends")
def test_events_of_nodes_reach_neither_side(romeo: Client, juliet: Client) -> None:
    """XEP0163-4.3.3-3, S48"""
    node = "http://jabber.org/protocol/tune"
    publish = (
        "<iq type='set' id='{}'><pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='{}'>"
        f"<item id='current'><tune xmlns='{node}'><title>Lark</title></tune></item></publish></pubsub></iq>"
    )
    for person, other in ((romeo, juliet), (juliet, romeo)):
        person.sends(publish.format("first", node))
        person.passes_barrier()
        subscribe = f"<subscribe node='{node}' jid='{other.bare}'/>"
        other.sends(f"<iq type='set' id='s' to='{person.bare}'>"
                    f"<pubsub xmlns='http://jabber.org/protocol/pubsub'>{subscribe}</pubsub></iq>")  # fmt: skip
        assert [stanza for stanza in other.receives_anything() if stanza.get("type") == "result"]
    for person, other in ((romeo, juliet), (juliet, romeo)):
        person.receives_anything()
        other.receives_anything()
        person.sends(publish.format("second", node))
        person.receives("<iq type='result' id='second' ...>...</iq>")
        other.receives(f"<message from='{person.bare}' ...>...</message>")
    blocks(romeo, juliet.bare)
    juliet.receives(UNAVAILABLE)
    for person, other in ((romeo, juliet), (juliet, romeo)):
        person.sends(publish.format("third", node))
        person.receives("<iq type='result' id='third' ...>...</iq>")
        other.receives_nothing()


# ---- both ways of looking -------------------------------------------------------------


def test_a_block_is_a_rule_of_the_default_list(romeo: Client) -> None:
    """§5, item 1; the name is ejabberd's, so that lists can be carried over"""
    blocks(romeo, "a@b", "c@d")
    assert query(romeo, "get", "") == "default Blocked contacts list Blocked contacts"
    assert query(romeo, "get", "<list name='Blocked contacts'/>") == (
        "list Blocked contacts item jid a@b deny 1 item jid c@d deny 2"
    )
    unblocks(romeo)
    assert query(romeo, "get", "") == ""


def test_a_block_comes_before_all_other_rules(romeo: Client, juliet: Client) -> None:
    """§5, the last paragraph"""
    allow = "<item type='jid' value='juliet@example.org' action='allow' order='0'/>"
    narrow = "<item type='jid' value='tybalt@example.com' action='deny' order='9'><message/></item>"
    query(romeo, "set", f"<list name='public'>{allow}{narrow}</list>")
    query(romeo, "set", "<default name='public'/>")
    assert blocklist(romeo) == []  # §5, item 3
    blocks(romeo, "juliet@example.org")
    assert query(romeo, "get", "<list name='public'/>") == (
        "list public item jid juliet@example.org deny 1 item jid juliet@example.org allow 2 "
        "item jid tybalt@example.com deny 3 message"
    )
    juliet.sends("<message to='romeo@example.org/orchard' id='m'/>")
    juliet.receives(REFUSED.format("m"))
    unblocks(romeo, "juliet@example.org")
    assert query(romeo, "get", "<list name='public'/>") == (
        "list public item jid juliet@example.org allow 1 item jid tybalt@example.com deny 2 message"
    )


def test_a_change_by_one_way_is_told_to_those_who_look_the_other_way(server: MemoryServer, romeo: Client) -> None:
    """§5, items 2 and 4"""
    home = server.client().login("romeo", resource="home")
    assert blocklist(home) == []
    query(romeo, "set", "<list name='public'><item type='jid' value='a@b' action='deny' order='1'/></list>")
    home.receives(f"<iq type='set' id='*'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>")
    query(romeo, "set", "<default name='public'/>")
    home.receives(pushed("block", "a@b"))
    assert blocklist(home) == ["a@b"]
    query(romeo, "set", "<list name='public'><item type='jid' value='c@d' action='deny' order='1'/></list>")
    home.receives_in_any_order(
        f"<iq type='set' id='*'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>",
        pushed("block", "c@d"),
        pushed("unblock", "a@b"),
    )
    sends_command(home, "block", "e@f")
    home.receives("<iq type='result' id='block'/>", pushed("block", "e@f"))
    romeo.receives(f"<iq type='set' id='*'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>")
    sends_command(home, "unblock")
    home.receives("<iq type='result' id='unblock'/>", pushed("unblock"))
    assert query(romeo, "get", "") == ""


def test_those_who_know_nothing_of_lists_hear_nothing_of_lists(server: MemoryServer, romeo: Client) -> None:
    """§5: the default list is "virtual" as long as nobody uses lists"""
    home = server.client().login("romeo", resource="home")
    blocks(romeo, "a@b")
    home.receives_nothing()


def test_an_active_list_makes_a_session_deaf_to_blocks(romeo: Client, juliet: Client) -> None:
    """§5, item 5; and what such a list denies is not called blocked"""
    deny = "<item type='jid' value='nurse@example.org' action='deny' order='1'/>"
    query(romeo, "set", f"<list name='other'>{deny}</list>")
    blocks(romeo, "juliet@example.org")
    query(romeo, "set", "<active name='other'/>")
    juliet.sends("<message to='romeo@example.org/orchard' id='m'/>")
    romeo.receives("<message from='juliet@example.org/balcony' id='m'/>")
    romeo.sends("<message to='nurse@example.org' id='n'/>")
    romeo.receives("<message type='error' id='n'><error type='cancel'><not-acceptable .../></error></message>")


def test_a_block_does_not_bring_back_rules_that_were_set_aside(romeo: Client) -> None:
    blocks(romeo, "a@b")
    query(romeo, "set", "<default/>")
    assert blocklist(romeo) == []
    blocks(romeo, "c@d")
    assert blocklist(romeo) == ["c@d"]
    assert query(romeo, "get", "") == (
        "default Blocked contacts 2 list Blocked contacts list Blocked contacts 2"
    )
