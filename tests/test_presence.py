"""Presence (RFC 6121 §4): who is told that somebody comes, changes and goes, who may ask, and who never learns it.

Last activity (XEP-0012) tells of presence too, and stands at the end.
"""

from __future__ import annotations

import re

import pytest

from tests.dialogue import ROSTER, Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer, ProcessServer

LAST = "jabber:iq:last"
FRIEND = "juliet@example.com"  # on another server


def meets(romeo: Client, juliet: Client) -> None:
    """Both see each other, and are online and up to date."""
    romeo.befriends(juliet)
    romeo.comes_online()
    juliet.comes_online()
    romeo.receives_anything()
    juliet.receives_anything()


def allows(romeo: Client, elsewhere: Elsewhere, *, mutual: bool = False) -> None:
    """Juliet on the other server may see Romeo, and he her if it is mutual."""
    elsewhere.says(f"<presence type='subscribe' from='{FRIEND}' to='romeo@example.org'/>")
    romeo.sends(f"<presence type='subscribed' to='{FRIEND}'/>")
    if mutual:
        romeo.sends(f"<presence type='subscribe' to='{FRIEND}'/>")
        romeo.passes_barrier()
        elsewhere.says(f"<presence type='subscribed' from='{FRIEND}' to='romeo@example.org'/>")
    romeo.receives_anything()
    elsewhere.forgets()


# ---- initial presence (§4.2) ----------------------------------------------------------


@pytest.mark.wire
def test_initial_presence_goes_to_subscribers_and_oneself(romeo: Client, juliet: Client, nurse: Client) -> None:
    """RFC6121-4.2.2-1, RFC6121-4.2.2-2, RFC6121-4.2.3-1, RFC6121-4.2.2-4"""
    romeo.befriends(juliet)
    nurse.comes_online()
    juliet.comes_online("<show>chat</show>")
    juliet.receives("<presence type='unavailable' from='romeo@example.org'/>")
    romeo.sends("<presence id='p1'><priority>1</priority></presence>")
    romeo.receives(
        "<presence id='p1' from='romeo@example.org/orchard'><priority>1</priority></presence>",
        "<presence from='juliet@example.org/balcony'><show>chat</show></presence>",
    )
    juliet.receives("<presence id='p1' from='romeo@example.org/orchard'><priority>1</priority></presence>")
    nurse.receives_nothing()


@pytest.mark.parametrize(
    ("romeos", "juliets", "sees"),
    [("subscribe", "", False), ("subscribe", "subscribed", True), ("subscribed", "", False), ("", "", False)],
)
def test_only_who_is_subscribed_sees(romeo: Client, juliet: Client, romeos: str, juliets: str, sees: bool) -> None:
    """RFC6121-4.2.2-1, RFC6121-4.4.2-1, RFC6121-4.5.2-1, RFC6121-11-1: not who has only asked or is approved in advance."""
    for client, other, type in ((romeo, "juliet", romeos), (juliet, "romeo", juliets)):
        if type:
            client.sends(f"<presence type='{type}' to='{other}@example.org'/>")
            client.passes_barrier()
    romeo.comes_online()
    romeo.receives_anything()
    for presence in ("<presence/>", "<presence><show>away</show></presence>", "<presence type='unavailable'/>", "<presence/>"):
        juliet.sends(presence)
        juliet.receives_anything()
    juliet.disconnects()
    came = [stanza for stanza in romeo.receives_anything() if stanza.get("from", "").startswith("juliet@example.org/")]
    assert [stanza.get("type") for stanza in came] == ([None, None, "unavailable", None, "unavailable"] if sees else [])


def test_resources_of_one_account_see_each_other(server: MemoryServer, romeo: Client) -> None:
    """RFC6121-4.2.2-2, RFC6121-4.2.2-3, RFC6121-4.4.2-1"""
    romeo.comes_online("<show>dnd</show>")
    connected = server.client().login("romeo", resource="connected")
    garden = server.client().login("romeo", resource="garden")
    garden.sends("<presence/>")
    garden.receives(
        "<presence from='romeo@example.org/garden'/>",
        "<presence from='romeo@example.org/orchard'><show>dnd</show></presence>",
    )
    romeo.receives("<presence from='romeo@example.org/garden'/>")
    garden.sends("<presence><show>xa</show></presence>")
    for client in (garden, romeo):
        client.receives("<presence from='romeo@example.org/garden'><show>xa</show></presence>")
    connected.receives_nothing()


def test_a_mutual_friend_on_another_server_is_told_and_asked(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-4.2.2-1, RFC6121-4.2.2-4, RFC6121-4.3-1: once, when the presence session begins."""
    allows(romeo, elsewhere, mutual=True)
    romeo.sends("<presence/>")
    romeo.receives("<presence from='romeo@example.org/orchard'/>")
    elsewhere.receives(
        f"<presence from='romeo@example.org/orchard' to='{FRIEND}'/>",
        f"<presence type='probe' from='romeo@example.org' to='{FRIEND}'/>",
    )
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    elsewhere.receives(f"<presence from='romeo@example.org/orchard' to='{FRIEND}'><show>away</show></presence>")


def test_what_a_friend_elsewhere_says_reaches_all_available_resources(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-4.2.3-1, RFC6121-4.5.3-1: with the `to` as it came."""
    allows(romeo, elsewhere, mutual=True)
    garden = server.client().login("romeo", resource="garden")
    connected = server.client().login("romeo", resource="connected")
    for client in (romeo, garden):
        client.sends("<presence/>")
    for client in (romeo, garden):
        client.receives_anything()
    for type in ("", " type='unavailable'"):
        elsewhere.says(f"<presence{type} from='{FRIEND}/balcony' to='romeo@example.org'><status>O</status></presence>")
        for client in (romeo, garden):
            client.receives(f"<presence{type} from='{FRIEND}/balcony' to='romeo@example.org'><status>O</status></presence>")
    connected.receives_nothing()


def test_requests_come_before_waiting_messages(romeo: Client, juliet: Client) -> None:
    """RFC6121-4.2.2-5: and with a negative priority the messages wait on."""
    juliet.sends("<presence type='subscribe' to='romeo@example.org'/>")
    juliet.sends("<message to='romeo@example.org' type='chat'><body>Art thou not Romeo?</body></message>")
    juliet.passes_barrier()
    romeo.sends("<presence><priority>-1</priority></presence>")
    romeo.receives(
        "<presence from='romeo@example.org/orchard'><priority>-1</priority></presence>",
        "<presence type='subscribe' from='juliet@example.org'/>",
    )
    romeo.receives_nothing()
    romeo.sends("<presence type='unavailable'/><presence/>")
    romeo.receives(
        "<presence type='unavailable' from='romeo@example.org/orchard'/>",
        "<presence from='romeo@example.org/orchard'/>",
        "<presence type='subscribe' from='juliet@example.org'/>",
        "<message type='chat' from='juliet@example.org/balcony'><body>*</body><delay .../></message>",
    )


# ---- updates and their content (§4.4, §4.7) -------------------------------------------


def test_everything_in_a_presence_passes_unchanged(romeo: Client, juliet: Client) -> None:
    """RFC6121-4.7.2.1-1, RFC6121-4.4.2-1"""
    meets(romeo, juliet)
    for show in ("away", "chat", "dnd", "xa"):
        content = (
            f"<show>{show}</show><status>Wooing Juliet</status><status xml:lang='cs'>Dvo&#x0159;&#x00ED;m se Julii</status>"
            "<priority>1</priority><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='n' ver='v='/>"
        )
        romeo.sends(f"<presence id='jx62vs97' xml:lang='en'>{content}</presence>")
        for client in (romeo, juliet):
            client.receives(f"<presence id='jx62vs97' xml:lang='en' from='romeo@example.org/orchard'>{content}</presence>")


@pytest.mark.parametrize("priority", ["-128", "127", "0", "+5", " 7 ", ""])
def test_priorities(romeo: Client, priority: str) -> None:
    """RFC6121-4.7.2.3-1"""
    romeo.sends(f"<presence><priority>{priority}</priority></presence>")
    romeo.receives(f"<presence from='romeo@example.org/orchard'><priority>{priority}</priority></presence>")


@pytest.mark.parametrize("priority", ["-129", "128", "1.5", "high", "1_0", "\u0665", "0x1", "9" * 5000])
@pytest.mark.parametrize("to", ["", "juliet@example.org"])
def test_no_priorities(romeo: Client, juliet: Client, priority: str, to: str) -> None:
    """RFC6121-4.7.2.3-1: refused, and nothing of it is told to anybody."""
    meets(romeo, juliet)
    address = f" to='{to}'" if to else ""
    romeo.sends(f"<presence id='p1'{address}><priority>{priority}</priority></presence>")
    romeo.receives("<presence id='p1' type='error'><error type='modify'><bad-request .../></error></presence>")
    juliet.receives_nothing()


def test_priority_decides_who_gets_messages_for_the_account(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """RFC6121-4.7.2.3-1: missing counts as 0, and the last one counts."""
    garden = server.client().login("romeo", resource="garden")
    message = "<message to='romeo@example.org' type='chat'><body>{}</body></message>"
    romeo.sends("<presence/>")
    romeo.passes_barrier()
    garden.sends("<presence><priority>-1</priority></presence>")
    garden.passes_barrier()
    for client in (romeo, garden):
        client.receives_anything()
    juliet.sends(message.format("one"))
    romeo.receives("<message type='chat' from='juliet@example.org/balcony'><body>one</body></message>")
    garden.sends("<presence><priority>1</priority></presence>")
    for client in (garden, romeo):
        client.receives("<presence from='romeo@example.org/garden'><priority>1</priority></presence>")
    juliet.sends(message.format("two"))
    garden.receives("<message type='chat' from='juliet@example.org/balcony'><body>two</body></message>")
    romeo.receives_nothing()


@pytest.mark.parametrize("type", ["available", "invisible", "Unavailable", "", "none"])
def test_unknown_types_are_refused(romeo: Client, type: str) -> None:
    """RFC6121-4.7.1-1"""
    for to in ("", " to='juliet@example.org'"):
        romeo.sends(f"<presence id='p1' type='{type}'{to}/>")
        romeo.receives("<presence id='p1' type='error'><error type='modify'><bad-request .../></error></presence>")


def test_an_error_from_a_subscriber_stops_nothing(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC3921-5.1.1-1: RFC 6121 §4.4.2 has dropped that rule; subscriptions end by `unsubscribe`, not by errors."""
    allows(romeo, elsewhere)
    romeo.sends("<presence/>")
    romeo.receives("<presence from='romeo@example.org/orchard'/>")
    elsewhere.forgets()
    error = "<error type='cancel'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    elsewhere.says(f"<presence type='error' from='{FRIEND}' to='romeo@example.org/orchard'>{error}</presence>")
    romeo.receives(f"<presence type='error' from='{FRIEND}' to='romeo@example.org/orchard'>{error}</presence>")
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    elsewhere.receives(f"<presence from='romeo@example.org/orchard' to='{FRIEND}'><show>away</show></presence>")


# ---- the end of a presence session (§4.5) ---------------------------------------------


def test_a_goodbye_is_passed_on_in_full_and_the_next_presence_is_initial(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """RFC6121-4.5.2-1, RFC6121-4.5.2-2, RFC6121-4.5.2-3, RFC6121-4.5.3-1"""
    meets(romeo, juliet)
    garden = server.client().login("romeo", resource="garden")
    garden.comes_online()
    for client in (romeo, garden, juliet):
        client.receives_anything()
    romeo.sends("<presence type='unavailable' id='u1'><status>going on vacation</status></presence>")
    for client in (romeo, garden, juliet):
        client.receives(
            "<presence type='unavailable' id='u1' from='romeo@example.org/orchard'><status>going on vacation</status></presence>"
        )
    juliet.sends("<presence><show>away</show></presence>")
    juliet.receives("<presence from='juliet@example.org/balcony'><show>away</show></presence>")
    garden.receives("<presence from='juliet@example.org/balcony'><show>away</show></presence>")
    romeo.receives_nothing()
    romeo.sends("<presence/>")
    romeo.receives("<presence from='romeo@example.org/orchard'/>", "<presence from='romeo@example.org/garden'/>")
    romeo.receives("<presence from='juliet@example.org/balcony'><show>away</show></presence>")
    juliet.receives("<presence from='romeo@example.org/orchard'/>")
    garden.receives("<presence from='romeo@example.org/orchard'/>")


@pytest.mark.parametrize("end", ["disconnects", "closes", "conflict"])
def test_the_server_says_goodbye_for_who_cannot(
    server: MemoryServer, romeo: Client, juliet: Client, elsewhere: Elsewhere, end: str
) -> None:
    """RFC6121-4.5.2-1"""
    meets(romeo, juliet)
    allows(romeo, elsewhere)
    garden = server.client().login("romeo", resource="garden")
    garden.comes_online()
    for client in (romeo, juliet, garden):
        client.receives_anything()
    elsewhere.forgets()
    if end == "conflict":
        server.client().login("romeo", resource="orchard")
        romeo.receives_anything()
        romeo.disconnects()
    else:
        getattr(romeo, end)()
    for client in (juliet, garden):
        client.receives("<presence type='unavailable' from='romeo@example.org/orchard'/>")
    elsewhere.receives(f"<presence type='unavailable' from='romeo@example.org/orchard' to='{FRIEND}'/>")


def test_who_was_never_there_need_not_go(romeo: Client, juliet: Client) -> None:
    """RFC6121-4.5.2-1, RFC6121-11-1"""
    romeo.befriends(juliet)
    juliet.comes_online()
    juliet.receives_anything()
    romeo.sends("<presence type='unavailable'/>")
    romeo.receives("<presence type='unavailable' from='romeo@example.org/orchard'/>")
    romeo.closes()
    juliet.receives_nothing()


@pytest.mark.wire
def test_clients_of_a_killed_server_are_gone_afterwards(process_server: ProcessServer) -> None:
    """RFC6121-4.5.2-1: presence is not kept, a restart brings no ghosts."""
    romeo, juliet = (process_server.client().login(name, resource="one") for name in ("romeo", "juliet"))
    meets(romeo, juliet)
    process_server.kill()
    process_server.start()
    juliet = process_server.client().login("juliet", resource="one")
    juliet.comes_online()
    juliet.receives("<presence type='unavailable' from='romeo@example.org'/>")


# ---- probes (§4.3) --------------------------------------------------------------------


def probe(to: str, sender: str = FRIEND) -> str:
    return f"<presence type='probe' id='ign291v5' from='{sender}' to='{to}'/>"


def test_a_subscriber_gets_the_last_presence_of_each_resource(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-4.3.2-3, RFC6121-4.3.2.1-1, RFC3921-5.1.1-2: with its own id, sent to whoever has asked."""
    allows(romeo, elsewhere)
    garden = server.client().login("romeo", resource="garden")
    server.client().login("romeo", resource="connected")
    for client, presence in (
        (romeo, "<presence/>"),
        (romeo, "<presence id='pres1'><show>dnd</show><status>busy!</status><c xmlns='urn:x'/></presence>"),
        (romeo, f"<presence to='{FRIEND}' id='directed'><status>for your eyes only</status></presence>"),
        (garden, "<presence id='pres2'><show>away</show></presence>"),
    ):
        client.sends(presence)
        client.passes_barrier()
    elsewhere.forgets()
    for sender in (FRIEND, f"{FRIEND}/balcony"):
        elsewhere.says(probe("romeo@example.org", sender))
        elsewhere.receives(
            f"<presence id='pres1' from='romeo@example.org/orchard' to='{sender}'>"
            "<show>dnd</show><status>busy!</status><c xmlns='urn:x'/></presence>",
            f"<presence id='pres2' from='romeo@example.org/garden' to='{sender}'><show>away</show></presence>",
        )
    for client in (romeo, garden):
        client.receives_anything()


def test_a_probe_for_one_resource_tells_of_it_alone_and_only_that_it_is_there(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-4.3.2-4"""
    allows(romeo, elsewhere)
    romeo.sends("<presence id='pres1'><show>dnd</show></presence>")
    server.client().login("romeo", resource="connected")
    romeo.receives_anything()
    elsewhere.forgets()
    elsewhere.says(probe("romeo@example.org/orchard"))
    elsewhere.receives(f"<presence id='ign291v5' from='romeo@example.org/orchard' to='{FRIEND}'/>")
    for gone in ("nowhere", "connected"):
        elsewhere.says(probe(f"romeo@example.org/{gone}"))
        elsewhere.receives(f"<presence type='unavailable' id='ign291v5' from='romeo@example.org/{gone}' to='{FRIEND}'/>")


def test_a_subscriber_learns_since_when_somebody_is_away(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-4.3.2-2, RFC6121-4.3.2.1-1"""
    allows(romeo, elsewhere)
    elsewhere.says(probe("romeo@example.org"))
    elsewhere.receives(f"<presence type='unavailable' id='ign291v5' from='romeo@example.org' to='{FRIEND}'/>")
    romeo.sends("<presence/><presence type='unavailable'><status>to Mantua</status></presence>")
    romeo.receives_anything()
    elsewhere.forgets()
    elsewhere.says(probe("romeo@example.org"))
    [answer] = elsewhere.came
    elsewhere.receives(
        f"<presence type='unavailable' id='ign291v5' from='romeo@example.org' to='{FRIEND}'>"
        "<status>to Mantua</status><delay xmlns='urn:xmpp:delay' from='romeo@example.org' stamp='*'/></presence>"
    )
    stamp = answer.find("{urn:xmpp:delay}delay").get("stamp")  # type: ignore[union-attr]  # checked above
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", stamp or "")


@pytest.mark.parametrize("relation", ["none", "has asked", "only seen by us", "approved in advance", "no account"])
@pytest.mark.parametrize("resource", ["", "/orchard", "/nowhere"])
def test_strangers_probe_in_vain(romeo: Client, elsewhere: Elsewhere, relation: str, resource: str) -> None:
    """RFC6121-4.3.2-1, RFC6121-4.3.2.1-1, RFC6121-11-1; S45, S29: one answer, whoever is there or not."""
    romeo.comes_online("<show>dnd</show>")
    steps = {
        "has asked": [f"S:<presence type='subscribe' from='{FRIEND}' to='romeo@example.org'/>"],
        "only seen by us": [
            f"C:<presence type='subscribe' to='{FRIEND}'/>",
            f"S:<presence type='subscribed' from='{FRIEND}' to='romeo@example.org'/>",
        ],
        "approved in advance": [f"C:<presence type='subscribed' to='{FRIEND}'/>"],
    }
    for step in steps.get(relation, []):
        (romeo.sends if step.startswith("C") else elsewhere.says)(step[2:])
        romeo.passes_barrier()
    romeo.receives_anything()
    elsewhere.forgets()
    name = "nobody" if relation == "no account" else "romeo"
    elsewhere.says(probe(f"{name}@example.org{resource}", f"{FRIEND}/balcony"))
    elsewhere.receives(f"<presence type='unsubscribed' id='ign291v5' from='{name}@example.org' to='{FRIEND}'/>")
    if relation == "approved in advance":  # it is not withdrawn by that
        elsewhere.says(f"<presence type='subscribe' from='{FRIEND}' to='romeo@example.org'/>")
        assert elsewhere.came[0].get("type") == "subscribed"
    romeo.receives_anything()


@pytest.mark.parametrize("to", ["juliet@example.org", "juliet@example.org/balcony", "nobody@example.org", "example.org", "x@nowhere.example"])
def test_a_clients_own_probe_is_no_error(romeo: Client, juliet: Client, to: str) -> None:
    """RFC6121-4.3-2, RFC6121-11-1; S45"""
    juliet.comes_online()
    romeo.sends(f"<presence type='probe' to='{to}' id='p1'/><presence type='probe' id='p2'/>")
    romeo.receives_nothing()
    juliet.receives_nothing()


def test_a_clients_own_probe_is_routed_and_answered(romeo: Client, juliet: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-4.3-2"""
    meets(romeo, juliet)
    romeo.sends(f"<presence type='probe' to='juliet@example.org'/><presence type='probe' to='{FRIEND}'/>")
    romeo.receives("<presence from='juliet@example.org/balcony'/>")
    elsewhere.receives(f"<presence type='probe' from='romeo@example.org/orchard' to='{FRIEND}'/>")


def test_a_subscription_that_only_one_side_remembers_ends_at_the_next_probe(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-4.3.2-1: the other side of it, §3.2.3."""
    allows(romeo, elsewhere, mutual=True)
    romeo.comes_online()
    elsewhere.says(f"<presence type='unsubscribed' from='{FRIEND}' to='romeo@example.org' id='ign291v5'/>")
    romeo.receives(
        f"<presence type='unsubscribed' from='{FRIEND}' id='ign291v5'/>",
        f"<iq type='set' id='*'><query xmlns='{ROSTER}' ver='*'><item jid='{FRIEND}' subscription='from'/></query></iq>",
    )


# ---- directed presence (§4.6) ---------------------------------------------------------


@pytest.mark.parametrize("is_available", [True, False], ids=["after initial presence", "before initial presence"])
@pytest.mark.parametrize("end", ["unavailable", "closes", "disconnects"])
def test_a_stranger_sees_what_is_shown_to_it_and_the_end(
    romeo: Client, nurse: Client, juliet: Client, end: str, is_available: bool
) -> None:
    """RFC6121-4.6.3-2, RFC6121-4.6.3-3, RFC6121-4.5.2-1; trap 7"""
    nurse.comes_online()
    juliet.comes_online()
    if is_available:
        romeo.comes_online()
    romeo.sends("<presence to='nurse@example.org/chamber' id='d1'><show>chat</show></presence>")
    nurse.receives("<presence id='d1' from='romeo@example.org/orchard' to='nurse@example.org/chamber'><show>chat</show></presence>")
    if is_available:
        romeo.sends("<presence><show>away</show></presence>")
        romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    nurse.receives_nothing()
    status = ""
    if end == "unavailable":
        status = "<status>bye</status>"
        romeo.sends(f"<presence type='unavailable'>{status}</presence>")
        romeo.receives(f"<presence type='unavailable' from='romeo@example.org/orchard'>{status}</presence>")
    else:
        getattr(romeo, end)()
    nurse.receives(f"<presence type='unavailable' from='romeo@example.org/orchard' to='nurse@example.org/chamber'>{status}</presence>")
    juliet.receives_nothing()


def test_the_end_comes_once(romeo: Client, nurse: Client) -> None:
    """RFC6121-4.6.1-1: not again for those who were told, or have gone themselves."""
    nurse.comes_online()
    romeo.sends("<presence to='nurse@example.org/chamber'/><presence to='nurse@example.org/chamber' type='unavailable'/>")
    nurse.receives(
        "<presence from='romeo@example.org/orchard' to='nurse@example.org/chamber'/>",
        "<presence from='romeo@example.org/orchard' to='nurse@example.org/chamber' type='unavailable'/>",
    )
    romeo.sends("<presence to='nurse@example.org/chamber'/>")
    nurse.receives("<presence from='romeo@example.org/orchard' to='nurse@example.org/chamber'/>")
    nurse.sends("<presence to='romeo@example.org/orchard' type='unavailable'/>")
    romeo.receives("<presence from='nurse@example.org/chamber' to='romeo@example.org/orchard' type='unavailable'/>")
    romeo.sends("<presence/><presence type='unavailable'/>")
    romeo.closes()
    nurse.receives_nothing()


def test_directed_presence_changes_nothing_for_a_subscriber(romeo: Client, juliet: Client) -> None:
    """RFC6121-4.6.3-1: one goodbye, not two."""
    meets(romeo, juliet)
    for type in ("", " type='unavailable'", ""):
        romeo.sends(f"<presence to='juliet@example.org'{type}><show>chat</show></presence>")
        juliet.receives(f"<presence from='romeo@example.org/orchard'{type}><show>chat</show></presence>")
    romeo.sends("<presence><show>away</show></presence>")
    juliet.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    romeo.closes()
    juliet.receives("<presence type='unavailable' from='romeo@example.org/orchard'/>")


def test_a_cancelled_subscription_ends_directed_presence_too(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC 6121 §4.6.1: subscriptions take precedence."""
    allows(romeo, elsewhere)
    romeo.sends(f"<presence/><presence to='{FRIEND}/balcony'/><presence type='unsubscribed' to='{FRIEND}'/>")
    romeo.receives_anything()
    elsewhere.forgets()
    elsewhere.says(probe("romeo@example.org/orchard", f"{FRIEND}/balcony"))
    elsewhere.receives(f"<presence type='unsubscribed' id='ign291v5' from='romeo@example.org' to='{FRIEND}'/>")
    romeo.closes()
    elsewhere.receives_nothing()


def test_who_holds_directed_presence_may_ask_about_that_resource_only(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-4.6.6-1: plainly, and until it ends."""
    garden = server.client().login("romeo", resource="garden")
    other = server.client().login("romeo", resource="other")
    for client in (romeo, garden, other):
        client.sends("<presence><show>dnd</show></presence>")
        client.passes_barrier()
    romeo.sends("<presence to='room@example.com/Romeo'><show>chat</show></presence>")
    garden.sends("<presence to='juliet@example.com'/>")
    for client in (romeo, garden, other):
        client.receives_anything()
    elsewhere.forgets()
    unsubscribed = "<presence type='unsubscribed' id='ign291v5' from='romeo@example.org' to='{}'/>"
    for sender, asked, answer in (
        ("room@example.com/Romeo", "/orchard", "<presence id='ign291v5' from='romeo@example.org/orchard' to='room@example.com/Romeo'/>"),
        ("room@example.com/Romeo", "", "<presence id='ign291v5' from='romeo@example.org/orchard' to='room@example.com/Romeo'/>"),
        ("room@example.com/Romeo", "/other", unsubscribed.format("room@example.com")),
        ("room@example.com/Romeo", "/garden", unsubscribed.format("room@example.com")),
        ("room@example.com/Tybalt", "/orchard", unsubscribed.format("room@example.com")),
        ("juliet@example.com/x", "/garden", "<presence id='ign291v5' from='romeo@example.org/garden' to='juliet@example.com/x'/>"),
        ("juliet@example.com", "/orchard", unsubscribed.format("juliet@example.com")),
    ):
        elsewhere.says(probe(f"romeo@example.org{asked}", sender))
        elsewhere.receives(answer)
    romeo.sends("<presence to='room@example.com/Romeo' type='unavailable'/>")
    romeo.receives_anything()
    elsewhere.forgets()
    elsewhere.says(probe("romeo@example.org/orchard", "room@example.com/Romeo"))
    elsewhere.receives(unsubscribed.format("room@example.com"))


@pytest.mark.config(limits={"directed": 2})
def test_nobody_shows_itself_to_everybody(romeo: Client) -> None:
    """S55: as many as configured; those who are on the list may be shown updates."""
    for name in ("a", "b"):
        romeo.sends(f"<presence to='{name}@example.org'/>")
    romeo.sends("<presence to='c@example.org' id='p3'/>")
    romeo.receives("<presence id='p3' type='error'><error type='modify'><policy-violation .../></error></presence>")
    romeo.sends("<presence to='b@example.org'><show>away</show></presence>")
    romeo.receives_nothing()
    romeo.sends("<presence to='a@example.org' type='unavailable'/><presence to='c@example.org'/>")
    romeo.receives_nothing()


# ---- what else could tell (§11) -------------------------------------------------------


@pytest.mark.parametrize("payload", ["jabber:iq:version", "http://jabber.org/protocol/disco#info", "http://jabber.org/protocol/disco#items", "urn:xmpp:time", "jabber:iq:last", "vcard-temp", "urn:ietf:params:xml:ns:vcard-4.0", "urn:xmpp:ping"])
@pytest.mark.parametrize("type", ["get", "set"])
def test_requests_of_strangers_tell_nothing(romeo: Client, juliet: Client, payload: str, type: str) -> None:
    """RFC6121-11-1; S45: the same error for who is there, has gone, never was; and nothing reaches the client."""
    juliet.comes_online("<show>chat</show>")
    answers = set()
    for to in ("juliet@example.org/balcony", "juliet@example.org/gone", "nurse@example.org/any", "nobody@example.org/balcony"):
        romeo.sends(f"<iq type='{type}' id='x' to='{to}'><query xmlns='{payload}'/></iq>")
        romeo.passes_barrier()
        [error] = romeo.receives_anything()
        assert error.get("type") == "error"
        answers.add(tuple(child.tag for child in error.iterfind("{jabber:client}error/*")))
    assert len(answers) == 1
    juliet.receives_nothing()


def test_requests_pass_where_presence_is_shared(romeo: Client, juliet: Client) -> None:
    """RFC6121-11-1, the other side: by a subscription, or by directed presence while it lasts."""
    request = "<iq type='get' id='x' to='juliet@example.org/balcony'><query xmlns='jabber:iq:version'/></iq>"
    arrived = "<iq type='get' id='x' from='romeo@example.org/orchard'><query xmlns='jabber:iq:version'/></iq>"
    refused = "<iq type='error' id='x'><error type='cancel'><service-unavailable .../></error></iq>"
    romeo.sends(request)
    romeo.receives(refused)
    juliet.sends("<presence to='romeo@example.org/orchard'/>")
    romeo.receives("<presence from='juliet@example.org/balcony'/>")
    romeo.sends(request)
    juliet.receives(arrived)
    juliet.sends("<presence to='romeo@example.org/orchard' type='unavailable'/>")
    romeo.receives("<presence from='juliet@example.org/balcony' type='unavailable'/>")
    romeo.sends(request)
    romeo.receives(refused)
    meets(romeo, juliet)
    romeo.sends(request)
    juliet.receives(arrived)


def test_the_servers_own_requests_always_arrive(server: MemoryServer, romeo: Client) -> None:
    """Trap 14: the server asks a silent client whether it is there, though no client has shown itself to a server."""
    [session] = server.server.all_sessions()
    server.server.ping(session)
    romeo.receives("<iq type='get' id='*' from='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")


def test_presence_for_nobody_is_silent(romeo: Client, juliet: Client) -> None:
    """RFC6121-11-1: neither who is away nor who does not exist answers."""
    for to in ("juliet@example.org", "juliet@example.org/gone", "nobody@example.org", "nobody@example.org/x"):
        for type in ("", " type='unavailable'"):
            romeo.sends(f"<presence to='{to}'{type}/>")
    romeo.receives_nothing()
    juliet.receives_nothing()


# ---- last activity (XEP-0012) ---------------------------------------------------------


def asks_last(client: Client, to: str) -> None:
    client.sends(f"<iq type='get' id='last1' to='{to}'><query xmlns='{LAST}'/></iq>")


FORBIDDEN = "<iq type='error' id='last1'><error type='auth'><forbidden .../></error></iq>"


@pytest.mark.parametrize("to", ["juliet@example.org", "juliet@example.org/balcony", "juliet@example.org/gone", "nobody@example.org", "nobody@example.org/x"])
def test_last_activity_is_forbidden_to_strangers(romeo: Client, juliet: Client, to: str) -> None:
    """XEP-0012 §3, §4, §8: whether there is an account or not; S45"""
    juliet.comes_online()
    asks_last(romeo, to)
    romeo.receives(FORBIDDEN)
    juliet.receives_nothing()


@pytest.mark.wire
def test_last_activity_of_a_friend(romeo: Client, juliet: Client) -> None:
    """XEP-0012 §3, §4: 0 while connected, then the seconds and the status of the goodbye; a resource is asked itself."""
    romeo.befriends(juliet)
    asks_last(romeo, "juliet@example.org")
    romeo.receives(f"<iq type='result' id='last1'><query xmlns='{LAST}' seconds='0'/></iq>")
    asks_last(romeo, "juliet@example.org/balcony")
    juliet.receives(f"<iq type='get' id='last1' from='romeo@example.org/orchard'><query xmlns='{LAST}'/></iq>")
    juliet.sends(f"<iq type='result' id='last1' to='romeo@example.org/orchard'><query xmlns='{LAST}' seconds='123'/></iq>")
    romeo.receives(f"<iq type='result' id='last1'><query xmlns='{LAST}' seconds='123'/></iq>")
    juliet.sends("<presence/><presence type='unavailable'><status>Heading home &amp; happy</status></presence>")
    juliet.closes()
    asks_last(romeo, "juliet@example.org")
    seconds = romeo.receives(f"<iq type='result' id='last1'><query xmlns='{LAST}' seconds='*'>Heading home &amp; happy</query></iq>")[0].get("seconds")
    assert 0 <= int(seconds or "") < 60
    asks_last(romeo, "juliet@example.org/balcony")
    romeo.receives("<iq type='error' id='last1'><error type='cancel'><service-unavailable .../></error></iq>")


def test_last_activity_since_the_server_knows(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """XEP-0012 §3: seconds since the goodbye, by the clock; of somebody who was never there, since the account was made."""
    romeo.befriends(juliet)
    juliet.closes()
    asks_last(romeo, "juliet@example.org")
    romeo.receives(f"<iq type='result' id='last1'><query xmlns='{LAST}' seconds='*'/></iq>")
    last = server.server.storage.documents("last")
    owner = next(owner for owner in server.server.accounts.owners("example.org") if owner.local == "juliet")
    last[owner] = {"at": "2002-09-10T23:08:25Z", "status": ""}
    asks_last(romeo, "juliet@example.org")
    answer = romeo.receives(f"<iq type='result' id='last1'><query xmlns='{LAST}' seconds='*'/></iq>")
    assert int(answer[0].attrib["seconds"]) > 20 * 365 * 86400


def test_last_activity_of_the_server_is_its_uptime(romeo: Client) -> None:
    """XEP-0012 §5, §6"""
    asks_last(romeo, "example.org")
    answer = romeo.receives(f"<iq type='result' id='last1'><query xmlns='{LAST}' seconds='*'/></iq>")
    assert 0 <= int(answer[0].attrib["seconds"]) < 60
    romeo.sends("<iq type='get' id='d1' to='example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    info = romeo.receives("<iq type='result' id='d1' ...><query ...>...</query></iq>")
    assert LAST in [feature.get("var") for feature in info[0]]
