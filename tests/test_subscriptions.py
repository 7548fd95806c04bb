"""Presence subscriptions (RFC 6121 §3 and Appendix A): asking, allowing, cancelling, and who may see whom."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import xmppd
from tests.dialogue import ROSTER, Client
from tests.elsewhere import Elsewhere
from tests.servers import HOSTS, MemoryServer, ProcessServer, credentials_of

JULIET = "juliet@example.com"  # on another server: see `Elsewhere`


class Item(NamedTuple):
    """What a client sees of a contact in its roster."""

    subscription: str
    ask: bool = False
    approved: bool = False


def rosters_item(client: Client, contact: str) -> Item | None:
    """Ask for the roster and return the contact's item; everything else that comes is dropped."""
    client.receives_anything()
    client.sends(f"<iq type='get' id='look'><query xmlns='{ROSTER}'/></iq>")
    result = client.receives("<iq type='result' id='look'><query xmlns='jabber:iq:roster' ...>...</query></iq>")
    for item in result.iter(f"{{{ROSTER}}}item"):
        if item.get("jid") == contact:
            return Item(item.attrib["subscription"], item.get("ask") == "subscribe", item.get("approved") == "true")
    return None


def is_asked_anew(client: Client, contact: str) -> bool:
    """Become available once more: whoever waits for an answer asks then. Everything else that comes is dropped."""
    client.receives_anything()
    client.sends("<presence type='unavailable'/><presence/>")
    asking = [stanza for stanza in client.receives_anything() if stanza.get("type") == "subscribe"]
    assert len(asking) == len({stanza.get("from") for stanza in asking}), "asked twice by the same contact"
    return any(stanza.get("from") == contact for stanza in asking)


def push(contact: str, subscription: str, *, ask: bool = False, approved: bool = False) -> str:
    """Return the pattern of a roster push."""
    more = (" ask='subscribe'" if ask else "") + (" approved='true'" if approved else "")
    item = f"<item jid='{contact}' subscription='{subscription}'{more}/>"
    return f"<iq type='set' id='*'><query xmlns='{ROSTER}' ver='*'>{item}</query></iq>"


# ---- Appendix A: the tables -----------------------------------------------------------

# How each state of A.1 shows in the roster (subscription, ask), whether a request waits, and
# by which stanzas it is reached from "None": C is said by our client, S by the contact's server.
STATES = {
    "None": ("none", False, False, ""),
    "None + Pending Out": ("none", True, False, "C:subscribe"),
    "None + Pending In": ("none", False, True, "S:subscribe"),
    "None + Pending Out+In": ("none", True, True, "C:subscribe S:subscribe"),
    "To": ("to", False, False, "C:subscribe S:subscribed"),
    "To + Pending In": ("to", False, True, "C:subscribe S:subscribed S:subscribe"),
    "From": ("from", False, False, "S:subscribe C:subscribed"),
    "From + Pending Out": ("from", True, False, "S:subscribe C:subscribed C:subscribe"),
    "Both": ("both", False, False, "S:subscribe C:subscribed C:subscribe S:subscribed"),
}

# Tables 2 to 5: type, existing state, is it routed, new state ("=": no state change)
OUTBOUND = """
    subscribe    | None                  | MUST | None + Pending Out
    subscribe    | None + Pending Out    | MUST | =
    subscribe    | None + Pending In     | MUST | None + Pending Out+In
    subscribe    | None + Pending Out+In | MUST | =
    subscribe    | To                    | MUST | =
    subscribe    | To + Pending In       | MUST | =
    subscribe    | From                  | MUST | From + Pending Out
    subscribe    | From + Pending Out    | MUST | =
    subscribe    | Both                  | MUST | =
    unsubscribe  | None                  | MUST | =
    unsubscribe  | None + Pending Out    | MUST | None
    unsubscribe  | None + Pending In     | MUST | =
    unsubscribe  | None + Pending Out+In | MUST | None + Pending In
    unsubscribe  | To                    | MUST | None
    unsubscribe  | To + Pending In       | MUST | None + Pending In
    unsubscribe  | From                  | MUST | =
    unsubscribe  | From + Pending Out    | MUST | From
    unsubscribe  | Both                  | MUST | From
    subscribed   | None                  | M.N. | pre-approval
    subscribed   | None + Pending Out    | M.N. | pre-approval
    subscribed   | None + Pending In     | MUST | From
    subscribed   | None + Pending Out+In | MUST | From + Pending Out
    subscribed   | To                    | M.N. | pre-approval
    subscribed   | To + Pending In       | MUST | Both
    subscribed   | From                  | M.N. | =
    subscribed   | From + Pending Out    | M.N. | =
    subscribed   | Both                  | M.N. | =
    unsubscribed | None                  | S.N. | =
    unsubscribed | None + Pending Out    | S.N. | =
    unsubscribed | None + Pending In     | MUST | None
    unsubscribed | None + Pending Out+In | MUST | None + Pending Out
    unsubscribed | To                    | S.N. | =
    unsubscribed | To + Pending In       | MUST | To
    unsubscribed | From                  | MUST | None
    unsubscribed | From + Pending Out    | MUST | None + Pending Out
    unsubscribed | Both                  | MUST | To
"""

# Tables 6 to 9: type, existing state, is it delivered, new state, what the server answers by itself
INBOUND = """
    subscribe    | None                  | MUST | None + Pending In     |
    subscribe    | None + Pending Out    | MUST | None + Pending Out+In |
    subscribe    | None + Pending In     | S.N. | =                     |
    subscribe    | None + Pending Out+In | S.N. | =                     |
    subscribe    | To                    | MUST | To + Pending In       |
    subscribe    | To + Pending In       | S.N. | =                     |
    subscribe    | From                  | S.N. | =                     | subscribed
    subscribe    | From + Pending Out    | S.N. | =                     | subscribed
    subscribe    | Both                  | S.N. | =                     | subscribed
    unsubscribe  | None                  | S.N. | =                     |
    unsubscribe  | None + Pending Out    | S.N. | =                     |
    unsubscribe  | None + Pending In     | MUST | None                  | unsubscribed
    unsubscribe  | None + Pending Out+In | MUST | None + Pending Out    | unsubscribed
    unsubscribe  | To                    | S.N. | =                     |
    unsubscribe  | To + Pending In       | MUST | To                    | unsubscribed
    unsubscribe  | From                  | MUST | None                  | unsubscribed
    unsubscribe  | From + Pending Out    | MUST | None + Pending Out    | unsubscribed
    unsubscribe  | Both                  | MUST | To                    | unsubscribed
    subscribed   | None                  | S.N. | =                     |
    subscribed   | None + Pending Out    | MUST | To                    |
    subscribed   | None + Pending In     | S.N. | =                     |
    subscribed   | None + Pending Out+In | MUST | To + Pending In       |
    subscribed   | To                    | S.N. | =                     |
    subscribed   | To + Pending In       | S.N. | =                     |
    subscribed   | From                  | S.N. | =                     |
    subscribed   | From + Pending Out    | MUST | Both                  |
    subscribed   | Both                  | S.N. | =                     |
    unsubscribed | None                  | S.N. | =                     |
    unsubscribed | None + Pending Out    | MUST | None                  |
    unsubscribed | None + Pending In     | S.N. | =                     |
    unsubscribed | None + Pending Out+In | MUST | None + Pending In     |
    unsubscribed | To                    | MUST | None                  |
    unsubscribed | To + Pending In       | MUST | None + Pending In     |
    unsubscribed | From                  | S.N. | =                     |
    unsubscribed | From + Pending Out    | MUST | From                  |
    unsubscribed | Both                  | MUST | From                  |
"""


def cells(table: str) -> list[tuple[str, ...]]:
    """Return the rows of a table, in cells."""
    return [tuple(cell.strip() for cell in row.split("|")) for row in table.strip().splitlines()]


def reach(state: str, romeo: Client, elsewhere: Elsewhere, *, listed: bool) -> None:
    """Bring Romeo's half of the relation into a state, by stanzas only; he is available and interested then."""
    romeo.comes_online()
    if listed:
        romeo.sends(f"<iq type='set' id='add'><query xmlns='{ROSTER}'><item jid='{JULIET}'/></query></iq>")
    for step in STATES[state][3].split():
        who, type = step.split(":")
        if who == "C":
            romeo.sends(f"<presence type='{type}' to='{JULIET}'/>")
        else:
            elsewhere.says(f"<presence type='{type}' from='{JULIET}' to='romeo@example.org'/>")
        romeo.passes_barrier()
    romeo.receives_anything()
    elsewhere.forgets()


def check_state(expected: str, romeo: Client, *, listed: bool, approved: bool = False) -> None:
    """Check Romeo's half of the relation: what his roster shows, and whether a request is waiting."""
    subscription, ask, asked, _how = STATES[expected]
    item = rosters_item(romeo, JULIET)
    assert item == (Item(subscription, ask, approved) if listed else None)
    assert is_asked_anew(romeo, JULIET) is asked


def changes_of_roster(stanzas: list[xmppd.Element]) -> int:
    return sum(stanza.find(f"{{{ROSTER}}}query") is not None for stanza in stanzas)


def with_and_without_an_item(table: str) -> list[tuple[str, bool]]:
    """Return the rows, each for a contact that is in the roster, and where that is possible (A.1) for one that isn't."""
    rows = [(" | ".join(row).rstrip(" |"), True) for row in cells(table)]
    return [*rows, *((row, False) for row, _listed in rows if cells(row)[0][1] in ("None", "None + Pending In"))]


def test_the_tables_are_complete() -> None:
    for table in (OUTBOUND, INBOUND):
        keys = [(row[0], row[1]) for row in cells(table)]
        types = ("subscribe", "unsubscribe", "subscribed", "unsubscribed")
        assert keys == [(type, state) for type in types for state in STATES]


@pytest.mark.parametrize(("row", "listed"), with_and_without_an_item(OUTBOUND))
def test_outbound(romeo: Client, elsewhere: Elsewhere, row: str, listed: bool) -> None:
    """RFC6121-A.2.1-1, RFC6121-A.2.2-1, RFC6121-A.2.3-1, RFC6121-A.2.4-1, RFC6121-3-1, RFC6121-3.1.2-2,
    RFC6121-3.4.2-1, RFC6121-3.4.2-2, RFC6121-3.4.2-3, RFC6121-3.4.2-4"""
    [(type, existing, route, new)] = cells(row)
    reach(existing, romeo, elsewhere, listed=listed)
    romeo.sends(f"<presence type='{type}' to='{JULIET}' id='s1'><status>?</status></presence>")
    came = romeo.receives_anything()
    routed = [stanza for stanza in elsewhere.came if "/" not in stanza.attrib["from"]]
    as_sent = [("romeo@example.org", JULIET, type, "s1", "?")] if route == "MUST" else []
    assert [(*map(stanza.get, ("from", "to", "type", "id")), stanza[0].text) for stanza in routed] == as_sent
    approved, state = new == "pre-approval", existing if new in ("=", "pre-approval") else new
    before, after = STATES[existing][:2], STATES[state][:2]
    assert changes_of_roster(came) == (before != after or approved) == len(came)  # the push and nothing but the push
    check_state(state, romeo, listed=listed or after != before or approved, approved=approved)


@pytest.mark.parametrize(("row", "listed"), with_and_without_an_item(INBOUND))
def test_inbound(romeo: Client, elsewhere: Elsewhere, row: str, listed: bool) -> None:
    """RFC6121-A.3.1-1, RFC6121-A.3.2-1, RFC6121-A.3.3-1, RFC6121-A.3.4-1, RFC6121-A.1-1, RFC6121-3.1.3-3,
    RFC6121-3.1.3-9, RFC6121-3.1.6-2, RFC6121-3.2.3-2, RFC6121-3.3.3-2, RFC6121-3.3.3-3; S46"""
    type, existing, deliver, new, answer = (*cells(row)[0], "")[:5]
    reach(existing, romeo, elsewhere, listed=listed)
    if (type, existing, listed) == ("unsubscribe", "None + Pending In", False):
        deliver, answer = "M.N.", ""  # §3.3.3: where there was never an item, the request is dropped, and that is all
    elsewhere.says(f"<presence type='{type}' from='{JULIET}' to='romeo@example.org' id='s2'><status>!</status></presence>")
    came = romeo.receives_anything()
    state = existing if new == "=" else new
    shown = STATES[existing][:2], STATES[state][:2]
    delivered = [stanza for stanza in came if stanza.tag == "{jabber:client}presence"]
    as_said = [(JULIET, "romeo@example.org", type, "s2", "!")] if deliver == "MUST" else []
    assert [(*map(stanza.get, ("from", "to", "type", "id")), stanza[0].text) for stanza in delivered] == as_said
    assert changes_of_roster(came) == (shown[0] != shown[1]) == len(came) - len(delivered)
    assert came[: len(delivered)] == delivered  # before the push
    answers = [(stanza.get("type"), stanza.get("to")) for stanza in elsewhere.came if "/" not in stanza.attrib["from"]]
    assert answers == ([(answer, JULIET)] if answer else [])
    check_state(state, romeo, listed=listed or shown[0] != shown[1])


# ---- requests, as the sections tell it ------------------------------------------------


def test_a_request_is_stamped_pushed_and_delivered(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.1.2-2, RFC6121-3.1.2-4, RFC6121-3-1, RFC6121-3.1.3-5, RFC6121-3.1.3-9"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.sends("<presence id='xk3h1v69' to='juliet@example.org' type='subscribe'/>")
    romeo.receives(push("juliet@example.org", "none", ask=True))
    romeo.receives_nothing()
    juliet.receives("<presence id='xk3h1v69' from='romeo@example.org' type='subscribe'/>")
    assert rosters_item(juliet, "romeo@example.org") is None


@pytest.mark.wire
def test_two_people_make_friends(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.1.5-1, RFC6121-3.1.6-1 and the order of §3.1.5 and §3.1.6; RFC6121-3.1.2-4"""
    romeo.comes_online()
    juliet.comes_online("<show>away</show>")
    romeo.sends("<presence to='juliet@example.org' type='subscribe'/>")
    romeo.receives(push("juliet@example.org", "none", ask=True))
    juliet.receives("<presence from='romeo@example.org' type='subscribe'/>")
    juliet.sends("<presence id='h4v1c4kj' to='romeo@example.org' type='subscribed'/>")
    juliet.receives(push("romeo@example.org", "from"))
    romeo.receives(
        "<presence id='h4v1c4kj' from='juliet@example.org' type='subscribed'/>",
        push("juliet@example.org", "to"),
        "<presence from='juliet@example.org/balcony'><show>away</show></presence>",
    )
    juliet.sends("<presence to='romeo@example.org' type='subscribe'/>")
    juliet.receives(push("romeo@example.org", "from", ask=True))
    romeo.receives("<presence from='juliet@example.org' type='subscribe'/>")
    romeo.sends("<presence to='juliet@example.org' type='subscribed'/>")
    romeo.receives(push("juliet@example.org", "both"))
    juliet.receives(
        "<presence from='romeo@example.org' type='subscribed'/>",
        push("romeo@example.org", "both"),
        "<presence from='romeo@example.org/orchard'/>",
    )


def test_the_new_subscriber_sees_every_available_resource_on_all_its_own(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """RFC6121-3.1.5-1, RFC6121-3.1.6-1"""
    chamber = server.client().login("juliet", resource="chamber")
    silent = server.client().login("juliet", resource="silent")  # connected, not available
    garden = server.client().login("romeo", resource="garden")
    for client in (romeo, garden, juliet, chamber):
        client.comes_online()
    for client in (romeo, garden, juliet, chamber):
        client.receives_anything()
    romeo.sends("<presence to='juliet@example.org' type='subscribe'/>")
    romeo.passes_barrier()
    silent.sends("<presence to='romeo@example.org' type='subscribed'/>")
    for client in (romeo, garden):
        presences = [stanza.get("from") for stanza in client.receives_anything() if stanza.get("type") is None]
        assert presences == ["juliet@example.org/balcony", "juliet@example.org/chamber"]
    for client in (juliet, chamber):
        client.receives("<presence type='subscribe' from='romeo@example.org'/>", push("romeo@example.org", "from"))
    silent.receives_nothing()


@pytest.mark.parametrize("type", ["subscribe", "subscribed", "unsubscribe", "unsubscribed"])
def test_a_full_jid_is_cut_to_the_bare_jid(romeo: Client, elsewhere: Elsewhere, type: str) -> None:
    """RFC6121-3.1.2-1, RFC6121-3.1.3-1, RFC6121-3-1"""
    romeo.comes_online()
    elsewhere.says("<presence type='subscribe' from='juliet@example.com/balcony' to='romeo@example.org/orchard'/>")
    romeo.receives("<presence type='subscribe' from='juliet@example.com'/>")
    romeo.sends(f"<presence type='{type}' to='juliet@example.com/balcony'/>")
    romeo.receives_anything()
    assert [(s.get("from"), s.get("to")) for s in elsewhere.came if s.get("type")] == [("romeo@example.org", JULIET)]


def test_roster_set_and_request_work_in_either_order(romeo: Client) -> None:
    """RFC6121-3.1.1-1, RFC6121-2.4.1-1"""
    romeo.comes_online()
    item = "<item jid='{}' name='{}'><group>Capulets</group></item>"
    for name, set_first in (("juliet", True), ("nurse", False)):
        jid = f"{name}@example.org"
        both = [
            f"<iq type='set' id='{name}'><query xmlns='{ROSTER}'>{item.format(jid, name)}</query></iq>",
            f"<presence to='{jid}' type='subscribe'/>",
        ]
        romeo.sends("".join(both if set_first else reversed(both)))
        romeo.receives_anything()
        romeo.sends(f"<iq type='get' id='g-{name}'><query xmlns='{ROSTER}'/></iq>")
        [*_others, found] = romeo.receives(f"<iq type='result' id='g-{name}'><query ...>...</query></iq>")[0]
        assert dict(found.attrib) == {"jid": jid, "name": name, "subscription": "none", "ask": "subscribe"}
        assert [group.text for group in found] == ["Capulets"]


def test_a_request_for_an_unknown_domain_fails_and_changes_nothing(romeo: Client) -> None:
    """RFC6121-3.1.2-3"""
    romeo.comes_online()
    romeo.sends("<presence id='xk3h1v69' to='juliet@nowhere.example' type='subscribe'/>")
    romeo.receives(
        "<presence id='xk3h1v69' from='juliet@nowhere.example' type='error'>"
        "<error type='cancel'><remote-server-not-found .../></error></presence>"
    )
    assert rosters_item(romeo, "juliet@nowhere.example") is None


def test_a_malformed_address_fails_and_changes_nothing(romeo: Client) -> None:
    """RFC6121-3.1.2-3, RFC6121-3.1.2-1"""
    romeo.comes_online()
    romeo.sends("<presence id='s1' to='@example.org' type='subscribe'/>")
    romeo.receives("<presence id='s1' type='error'><error type='modify'><jid-malformed .../></error></presence>")
    romeo.sends("<presence id='s2' type='subscribe'/>")
    romeo.receives("<presence id='s2' type='error'><error type='modify'><bad-request .../></error></presence>")
    romeo.sends("<presence id='s3' to='romeo@example.org' type='subscribe'/>")
    romeo.receives("<presence id='s3' type='error'><error type='cancel'><not-allowed .../></error></presence>")


def test_a_refusal_by_the_domain_of_the_contact_comes_back_to_the_client(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-3.1.2-3: at once, as from a component that is away."""

    def refuse(stanza: xmppd.Stanza, to: xmppd.JID) -> None:
        raise xmppd.StanzaError("remote-server-timeout")

    elsewhere.receive = refuse  # type: ignore[method-assign]
    romeo.comes_online()
    romeo.sends(f"<presence id='s1' to='{JULIET}' type='subscribe'/>")
    romeo.receives(
        push(JULIET, "none", ask=True),
        f"<presence id='s1' from='{JULIET}' type='error'><error type='wait'><remote-server-timeout .../></error></presence>",
    )


def test_a_refusal_by_the_other_server_reaches_who_has_asked(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-3.1.2-3: later, addressed to the bare JID from which the request was sent."""
    error = "<error type='cancel'><item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    stanza = f"<presence type='error' from='{JULIET}' to='romeo@example.org' id='s1'>{error}</presence>"
    romeo.comes_online()
    elsewhere.says(stanza)
    romeo.receives_nothing()  # nothing was asked
    romeo.sends(f"<presence id='s1' to='{JULIET}' type='subscribe'/>")
    romeo.receives(push(JULIET, "none", ask=True))
    elsewhere.says(stanza)
    romeo.receives(f"<presence id='s1' type='error' from='{JULIET}'>{error}</presence>")


def test_an_unanswered_request_is_sent_again_at_the_next_login(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-3.1.2-5"""
    romeo.comes_online()
    romeo.sends(f"<presence id='s1' to='{JULIET}' type='subscribe'/><presence><show>away</show></presence>")
    romeo.receives_anything()
    elsewhere.receives(f"<presence id='s1' from='romeo@example.org' to='{JULIET}' type='subscribe'/>")
    romeo.sends("<presence type='unavailable'/><presence/>")
    romeo.receives_anything()
    elsewhere.receives(f"<presence id='*' from='romeo@example.org' to='{JULIET}' type='subscribe'/>")
    elsewhere.says(f"<presence type='unsubscribed' from='{JULIET}' to='romeo@example.org'/>")
    romeo.sends("<presence type='unavailable'/><presence/>")
    romeo.receives_anything()
    elsewhere.receives_nothing()


def test_only_the_user_allows(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.1.3-2, RFC6121-3.1.3-10, RFC6121-3.1.3-6: no answer, whether there is such an account or not."""
    juliet.comes_online()
    romeo.comes_online()
    for to in ("juliet@example.org", "nobody@example.org"):
        romeo.sends(f"<presence to='{to}' type='subscribe'/>")
        romeo.receives(push(to, "none", ask=True))
        romeo.receives_nothing()
    juliet.receives("<presence from='romeo@example.org' type='subscribe'/>")


@pytest.mark.parametrize("type", ["subscribe", "subscribed", "unsubscribe", "unsubscribed"])
def test_nobodys_account_is_silent(romeo: Client, elsewhere: Elsewhere, type: str) -> None:
    """RFC6121-3.1.3-10, RFC6121-3.1.6-2, RFC6121-3.3.3-3"""
    elsewhere.says(f"<presence from='{JULIET}' to='nobody@example.org' type='{type}'/>")
    romeo.passes_barrier()
    elsewhere.receives_nothing()


def test_a_request_waits_for_each_available_resource_until_it_is_answered(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """RFC6121-3.1.3-7, RFC6121-4.2.2-5"""
    request = (
        "<presence id='xk3h1v69' {}type='subscribe' xml:lang='en'><status>Hi, the nurse told me to add you.</status>"
        "<nick xmlns='http://jabber.org/protocol/nick'>Romeo</nick></presence>"
    )
    romeo.sends(request.format("to='juliet@example.org' "))
    romeo.passes_barrier()
    juliet.receives_nothing()  # connected only
    juliet.comes_online()
    juliet.receives(request.format("from='romeo@example.org' "))
    chamber = server.client().login("juliet", resource="chamber")
    chamber.comes_online()
    chamber.receives("<presence from='juliet@example.org/balcony'/>", request.format("from='romeo@example.org' "))
    juliet.receives("<presence from='juliet@example.org/chamber'/>")
    juliet.sends("<presence><show>dnd</show></presence>")  # an update is no new resource
    juliet.receives("<presence from='juliet@example.org/balcony'><show>dnd</show></presence>")
    juliet.receives_nothing()
    juliet.sends("<presence to='romeo@example.org' type='unsubscribed'/>")
    assert not is_asked_anew(juliet, "romeo@example.org")
    chamber.receives_anything()


@pytest.mark.wire
def test_a_waiting_request_survives_a_restart(process_server: ProcessServer) -> None:
    """RFC6121-3.1.3-7"""
    romeo = process_server.client().login("romeo")
    romeo.sends("<presence to='juliet@example.org' type='subscribe'><status>é</status></presence>")
    romeo.passes_barrier()
    process_server.kill()
    process_server.start()
    juliet = process_server.client().login("juliet")
    juliet.comes_online()
    juliet.receives("<presence from='romeo@example.org' type='subscribe'><status>é</status></presence>")


def test_only_one_request_of_each_sender_is_kept_and_delivered(romeo: Client, nurse: Client, juliet: Client) -> None:
    """RFC6121-3.1.3-8"""
    for sender in (romeo, nurse):
        for word in ("first", "second", "third"):
            sender.sends(f"<presence to='juliet@example.org' type='subscribe'><status>{word}</status></presence>")
        sender.passes_barrier()
    juliet.comes_online()
    juliet.receives(
        "<presence from='romeo@example.org' type='subscribe'><status>first</status></presence>",
        "<presence from='nurse@example.org' type='subscribe'><status>first</status></presence>",
    )
    romeo.sends("<presence to='juliet@example.org' type='subscribe'><status>fourth</status></presence>")
    juliet.receives_nothing()


@pytest.mark.config(limits={"requests": 3})
def test_strangers_cannot_fill_the_store_of_requests(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC 6121 §3.1.3, security warning"""
    for number in range(10):
        elsewhere.says(f"<presence from='juliet{number}@example.com' to='romeo@example.org' type='subscribe'/>")
    romeo.comes_online()
    romeo.receives(*(f"<presence from='juliet{number}@example.com' type='subscribe'/>" for number in range(3)))
    romeo.sends("<presence to='juliet1@example.com' type='unsubscribed'/>")
    elsewhere.says("<presence from='juliet9@example.com' to='romeo@example.org' type='subscribe'/>")
    romeo.receives("<presence from='juliet9@example.com' type='subscribe'/>")


@pytest.mark.config(limits={"roster_items": 1})
def test_a_request_stays_while_the_roster_has_no_room_for_its_answer(romeo: Client, elsewhere: Elsewhere) -> None:
    romeo.comes_online()
    romeo.sends("<presence to='nurse@example.org' type='subscribe'/>")
    elsewhere.says(f"<presence from='{JULIET}' to='romeo@example.org' type='subscribe'/>")
    romeo.receives_anything()
    romeo.sends(f"<presence id='s1' to='{JULIET}' type='subscribed'/>")
    romeo.receives(f"<presence id='s1' from='{JULIET}' type='error'><error type='wait'><resource-constraint .../></error></presence>")
    elsewhere.receives_nothing()
    assert is_asked_anew(romeo, JULIET)


def test_who_is_allowed_and_asks_again_is_answered_by_the_server(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-3.1.3-3: with the presence that the other side seems to have lost, and without bothering the client."""
    reach("From", romeo, elsewhere, listed=True)
    elsewhere.says(f"<presence id='xk3h1v69' from='{JULIET}/balcony' to='romeo@example.org' type='subscribe'/>")
    romeo.receives_nothing()
    elsewhere.receives(
        f"<presence id='xk3h1v69' from='romeo@example.org' to='{JULIET}' type='subscribed'/>",
        f"<presence from='romeo@example.org/orchard' to='{JULIET}'/>",
    )


def test_who_is_not_interested_gets_no_answers_and_who_is_not_available_no_requests(
    server: MemoryServer, romeo: Client, elsewhere: Elsewhere
) -> None:
    """RFC6121-2.2-1, RFC6121-3.1.3-5, RFC6121-3.1.6-1: interested and available are two things."""
    interested = server.client().login("romeo", resource="interested")
    interested.sends(f"<iq type='get' id='r'><query xmlns='{ROSTER}'/></iq>")
    interested.receives(f"<iq type='result' id='r'><query xmlns='{ROSTER}' ver='*'/></iq>")
    available = server.client().login("romeo", resource="available")
    available.sends("<presence/>")
    available.receives("<presence from='romeo@example.org/available'/>")
    romeo.sends(f"<presence to='{JULIET}' type='subscribe'/>")
    interested.receives(push(JULIET, "none", ask=True))
    elsewhere.says(
        f"<presence from='{JULIET}' to='romeo@example.org' type='subscribe'/>"
        f"<presence from='{JULIET}' to='romeo@example.org' type='subscribed'/>"
        f"<presence from='{JULIET}/balcony' to='romeo@example.org'/>"
    )
    interested.receives(f"<presence from='{JULIET}' type='subscribed'/>", push(JULIET, "to"))
    available.receives(f"<presence from='{JULIET}' type='subscribe'/>", f"<presence from='{JULIET}/balcony'/>")
    romeo.receives_nothing()


# ---- cancelling and unsubscribing -----------------------------------------------------


def test_a_cancelled_subscriber_sees_all_resources_go_first(server: MemoryServer, juliet: Client, romeo: Client) -> None:
    """RFC6121-3.2.2-3, RFC6121-3.2.3-1"""
    chamber = server.client().login("juliet", resource="chamber")
    for client in (romeo, juliet, chamber):
        client.comes_online()
    juliet.befriends(romeo)
    chamber.receives_anything()
    juliet.sends("<presence id='ij5b1v7g' to='romeo@example.org' type='unsubscribed'/>")
    romeo.receives(
        "<presence from='juliet@example.org/balcony' type='unavailable'/>",
        "<presence from='juliet@example.org/chamber' type='unavailable'/>",
        "<presence id='ij5b1v7g' from='juliet@example.org' type='unsubscribed'/>",
        push("juliet@example.org", "from"),
    )
    juliet.receives(push("romeo@example.org", "to"))
    chamber.receives(push("romeo@example.org", "to"))
    chamber.sends("<presence><show>away</show></presence>")
    romeo.receives_nothing()
    romeo.sends("<presence><show>away</show></presence>")  # what was allowed the other way stays
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    for client in (juliet, chamber):
        client.receives(
            "<presence from='juliet@example.org/chamber'><show>away</show></presence>",
            "<presence from='romeo@example.org/orchard'><show>away</show></presence>",
        )


def test_the_order_towards_another_server(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-3.2.2-3, RFC6121-3.1.5-1"""
    reach("None + Pending In", romeo, elsewhere, listed=False)
    romeo.sends(f"<presence id='s1' to='{JULIET}' type='subscribed'/>")
    romeo.receives(push(JULIET, "from"))
    elsewhere.receives(
        f"<presence id='s1' from='romeo@example.org' to='{JULIET}' type='subscribed'/>",
        f"<presence from='romeo@example.org/orchard' to='{JULIET}'/>",
    )
    romeo.sends(f"<presence id='s2' to='{JULIET}' type='unsubscribed'/>")
    romeo.receives(push(JULIET, "none"))
    elsewhere.receives(
        f"<presence from='romeo@example.org/orchard' to='{JULIET}' type='unavailable'/>",
        f"<presence id='s2' from='romeo@example.org' to='{JULIET}' type='unsubscribed'/>",
    )


@pytest.mark.parametrize("state", ["None", "None + Pending Out", "To"])
def test_cancelling_what_was_never_granted_tells_nothing(romeo: Client, elsewhere: Elsewhere, state: str) -> None:
    """RFC6121-3.2.2-1"""
    reach(state, romeo, elsewhere, listed=False)
    romeo.sends(f"<presence to='{JULIET}' type='unsubscribed'/>")
    romeo.receives_nothing()
    elsewhere.receives_nothing()


def test_a_denied_request_is_over(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.2.2-4, RFC6121-3.2.3-1"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.sends("<presence to='juliet@example.org' type='subscribe'/>")
    romeo.receives(push("juliet@example.org", "none", ask=True))
    juliet.receives("<presence from='romeo@example.org' type='subscribe'/>")
    juliet.sends("<presence to='romeo@example.org' type='unsubscribed'/>")
    romeo.receives("<presence from='juliet@example.org' type='unsubscribed'/>", push("juliet@example.org", "none"))
    assert not is_asked_anew(juliet, "romeo@example.org")
    romeo.receives_nothing()


def test_unsubscribing_ends_what_the_user_sees(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.3.2-1, RFC6121-3.3.3-1"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    romeo.sends("<presence id='ul4bs71n' to='juliet@example.org' type='unsubscribe'/>")
    romeo.receives(
        push("juliet@example.org", "from"),
        "<presence from='juliet@example.org/balcony' type='unavailable'/>",
    )
    juliet.receives(
        "<presence id='ul4bs71n' from='romeo@example.org' type='unsubscribe'/>", push("romeo@example.org", "to")
    )
    juliet.sends("<presence type='unavailable'/>")
    juliet.receives("<presence from='juliet@example.org/balcony' type='unavailable'/>")
    romeo.receives_nothing()


def test_the_other_servers_user_who_unsubscribes_sees_us_go(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-3.3.3-1"""
    reach("Both", romeo, elsewhere, listed=True)
    elsewhere.says(f"<presence id='u1' from='{JULIET}' to='romeo@example.org' type='unsubscribe'/>")
    romeo.receives(f"<presence id='u1' from='{JULIET}' type='unsubscribe'/>", push(JULIET, "to"))
    elsewhere.receives(
        f"<presence from='romeo@example.org/orchard' to='{JULIET}' type='unavailable'/>",
        f"<presence from='romeo@example.org' to='{JULIET}' type='unsubscribed'/>",
    )


def test_a_request_that_is_taken_back_is_forgotten(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.3.3-2"""
    romeo.sends("<presence to='juliet@example.org' type='subscribe'/>")
    romeo.sends("<presence to='juliet@example.org' type='unsubscribe'/>")
    romeo.passes_barrier()
    juliet.comes_online()
    juliet.receives_nothing()


@pytest.mark.parametrize("condition", ["forbidden", "not-authorized"])
def test_a_probe_refused_as_in_2004_means_unsubscribed(romeo: Client, elsewhere: Elsewhere, condition: str) -> None:
    """RFC3921-5.1.3-1"""
    reach("To", romeo, elsewhere, listed=True)
    error = f"<error type='auth'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    for sender, to in ((JULIET, "romeo@example.org/orchard"), (f"{JULIET}/balcony", "romeo@example.org")):
        elsewhere.says(f"<presence type='error' from='{sender}' to='{to}'>{error}</presence>")  # about something else
    assert rosters_item(romeo, JULIET) == Item("to")
    elsewhere.says(f"<presence type='error' from='{JULIET}' to='romeo@example.org'>{error}</presence>")
    romeo.receives(f"<presence type='unsubscribed' from='{JULIET}'/>", push(JULIET, "none"))


# ---- approval in advance --------------------------------------------------------------


def test_stream_features_announce_approval_in_advance(server: MemoryServer) -> None:
    """RFC6121-3.4-1, RFC6121-2.6.1-1: after the login, not before."""
    client = server.client().connect()
    names = ("{urn:xmpp:features:pre-approval}sub", "{urn:xmpp:features:rosterver}ver")
    before = client.negotiates()
    client.starts_tls()
    secured = client.negotiates()
    client.authenticates("romeo", "romeo-secret")
    after = client.negotiates()
    for name in names:
        assert before.find(name) is None and secured.find(name) is None
        assert after.find(name) is not None


def test_who_is_approved_in_advance_is_never_asked_about(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-3.4.2-4, RFC6121-3.4.2-5, RFC6121-3.1.3-4, RFC6121-2.1.2.1-1"""
    romeo.comes_online()
    romeo.sends(f"<presence id='pg81vx64' to='{JULIET}' type='subscribed'/>")
    romeo.receives(push(JULIET, "none", approved=True))
    elsewhere.receives_nothing()
    romeo.sends(f"<presence id='pg81vx65' to='{JULIET}' type='subscribed'/>")
    romeo.receives_nothing()  # approved already
    elsewhere.says(f"<presence id='a1' from='{JULIET}' to='romeo@example.org' type='subscribe'/>")
    romeo.receives(push(JULIET, "from", approved=True))
    romeo.receives_nothing()
    elsewhere.receives(
        f"<presence id='a1' from='romeo@example.org' to='{JULIET}' type='subscribed'/>",
        f"<presence from='romeo@example.org/orchard' to='{JULIET}'/>",
    )
    romeo.sends(f"<presence to='{JULIET}' type='unsubscribed'/>")
    romeo.receives(push(JULIET, "none"))
    elsewhere.forgets()
    elsewhere.says(f"<presence from='{JULIET}' to='romeo@example.org' type='subscribe'/>")
    romeo.receives(f"<presence from='{JULIET}' type='subscribe'/>")


@pytest.mark.parametrize(("state", "after"), [("None", "from"), ("None + Pending Out", "from"), ("To", "both")])
def test_approved_in_advance_in_every_state(romeo: Client, elsewhere: Elsewhere, state: str, after: str) -> None:
    """RFC6121-3.4.2-3, RFC6121-3.4.2-5"""
    reach(state, romeo, elsewhere, listed=True)
    ask = STATES[state][1]
    romeo.sends(f"<presence to='{JULIET}' type='subscribed'/>")
    romeo.receives(push(JULIET, STATES[state][0], ask=ask, approved=True))
    elsewhere.says(f"<presence from='{JULIET}' to='romeo@example.org' type='subscribe'/>")
    romeo.receives(push(JULIET, after, ask=ask, approved=True))
    assert not is_asked_anew(romeo, JULIET)


@pytest.mark.parametrize("state", ["None", "None + Pending Out", "To"])
def test_an_approval_in_advance_is_withdrawn_without_a_word(romeo: Client, elsewhere: Elsewhere, state: str) -> None:
    """RFC6121-3.2.2-2"""
    reach(state, romeo, elsewhere, listed=True)
    romeo.sends(f"<presence to='{JULIET}' type='subscribed'/><presence to='{JULIET}' type='unsubscribed'/>")
    subscription, ask = STATES[state][:2]
    romeo.receives(push(JULIET, subscription, ask=ask, approved=True), push(JULIET, subscription, ask=ask))
    elsewhere.receives_nothing()


def test_removing_the_item_withdraws_the_approval(romeo: Client, elsewhere: Elsewhere) -> None:
    """RFC 6121 §3.4.2, the last note"""
    romeo.comes_online()
    romeo.sends(f"<presence to='{JULIET}' type='subscribed'/>")
    romeo.sends(f"<iq type='set' id='r'><query xmlns='{ROSTER}'><item jid='{JULIET}' subscription='remove'/></query></iq>")
    romeo.receives_anything()
    elsewhere.says(f"<presence from='{JULIET}' to='romeo@example.org' type='subscribe'/>")
    romeo.receives(f"<presence from='{JULIET}' type='subscribe'/>")


def test_two_who_approve_in_advance_need_one_request(romeo: Client, juliet: Client) -> None:
    """RFC6121-3.1.3-4: also when both live here, where the answer comes within the same call."""
    romeo.comes_online()
    juliet.comes_online()
    juliet.sends("<presence to='romeo@example.org' type='subscribed'/>")
    juliet.receives(push("romeo@example.org", "none", approved=True))
    romeo.sends("<presence id='s1' to='juliet@example.org' type='subscribe'/>")
    romeo.receives(
        push("juliet@example.org", "none", ask=True),
        "<presence id='s1' type='subscribed' from='juliet@example.org'/>",
        push("juliet@example.org", "to"),
        "<presence from='juliet@example.org/balcony'/>",
    )
    juliet.receives(push("romeo@example.org", "from", approved=True))


# ---- the end of an account (trap 13) --------------------------------------------------


def remove(server: MemoryServer, jid: str) -> None:
    server.server.remove_account(xmppd.JID.parse(jid))


def be_reborn(server: MemoryServer, name: str, resource: str = "new") -> Client:
    """Return a client of a new account with an old name."""
    server.server.create_account(xmppd.JID(name, "example.org", ""), credentials_of(name))
    return server.client().login(name, resource=resource)


def test_with_an_account_all_its_relations_end(server: MemoryServer, romeo: Client, juliet: Client, elsewhere: Elsewhere) -> None:
    """Trap 13; RFC6121-11-1"""
    reach("Both", romeo, elsewhere, listed=True)
    juliet.comes_online()
    juliet.befriends(romeo)
    elsewhere.forgets()
    juliet.forgets_unread()
    remove(server, "romeo@example.org")
    juliet.receives(
        "<presence from='romeo@example.org/orchard' type='unavailable'/>",
        "<presence from='romeo@example.org' type='unsubscribed'/>",
        push("romeo@example.org", "from"),
        "<presence from='romeo@example.org' type='unsubscribe'/>",
        push("romeo@example.org", "none"),
    )
    elsewhere.receives(
        f"<presence from='romeo@example.org/orchard' to='{JULIET}' type='unavailable'/>",
        f"<presence from='romeo@example.org' to='{JULIET}' type='unsubscribed'/>",
        f"<presence from='romeo@example.org' to='{JULIET}' type='unsubscribe'/>",
    )
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    heir = be_reborn(server, "romeo")
    heir.comes_online()
    assert rosters_item(heir, "juliet@example.org") is None
    juliet.receives_nothing()
    heir.sends("<presence to='juliet@example.org' type='probe'/>")
    heir.receives_nothing()


@pytest.mark.parametrize("friend", ["nurse@example.org", "nurse@example.net"])
def test_the_next_owner_of_a_name_inherits_no_approval(server: MemoryServer, romeo: Client, friend: str) -> None:
    """Trap 13: also not where the friend's account belongs to another of our hosts."""
    name, host = friend.split("@")
    if host != HOSTS[0]:
        server.add_account(friend)
    nurse = server.client(host=host).login(name, resource="chamber")
    nurse.comes_online()
    nurse.sends("<presence to='romeo@example.org' type='subscribed'/>")
    nurse.receives(push("romeo@example.org", "none", approved=True))
    remove(server, "romeo@example.org")
    nurse.receives(push("romeo@example.org", "none"))
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    heir = be_reborn(server, "romeo")
    heir.sends(f"<presence to='{friend}' type='subscribe'/>")
    nurse.receives("<presence from='romeo@example.org' type='subscribe'/>")
    heir.receives_nothing()


def test_requests_from_and_to_an_account_end_with_it(server: MemoryServer, romeo: Client, juliet: Client, nurse: Client) -> None:
    """Trap 13"""
    nurse.comes_online()
    romeo.sends("<presence to='juliet@example.org' type='subscribe'/>")
    nurse.sends("<presence to='romeo@example.org' type='subscribe'/>")
    nurse.receives(push("romeo@example.org", "none", ask=True))
    romeo.passes_barrier()
    remove(server, "romeo@example.org")
    nurse.receives("<presence from='romeo@example.org' type='unsubscribed'/>", push("romeo@example.org", "none"))
    juliet.comes_online()
    juliet.receives_nothing()
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    heir = be_reborn(server, "romeo")
    heir.comes_online()
    heir.receives_nothing()
    assert not is_asked_anew(nurse, "romeo@example.org")


def test_even_where_the_halves_disagree_the_next_owner_sees_nothing(server: MemoryServer, romeo: Client, nurse: Client) -> None:
    """Trap 13: the nurse's half says "from", Romeo's nothing, as after a backup was put back."""
    nurse.comes_online()
    nurse.sends("<presence to='romeo@example.org' type='subscribed'/>")
    romeo.sends("<presence to='nurse@example.org' type='subscribe'/>")
    romeo.passes_barrier()
    nurse.receives_anything()
    server.server.rosters[xmppd.JID.parse("romeo@example.org")] = {}
    remove(server, "romeo@example.org")
    nurse.receives(push("romeo@example.org", "none"))
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    heir = be_reborn(server, "romeo")
    heir.comes_online()
    nurse.sends("<presence><show>away</show></presence>")
    nurse.receives_anything()
    heir.receives_nothing()


# ---- two accounts, any order of everything --------------------------------------------

PAIR = ("romeo", "juliet")
TYPES = ("subscribe", "unsubscribe", "subscribed", "unsubscribed")
WHO = st.sampled_from(PAIR)
WHICH = st.sampled_from(("one", "two"))


def other(name: str) -> str:
    """Return the other of the two."""
    return PAIR[1 - PAIR.index(name)]


class Half:
    """One side's view of the relation, as the tables above would have it."""

    def __init__(self) -> None:
        self.state = "None"
        self.listed = False
        self.approved = False

    def apply(self, table: dict[tuple[str, str], str], type: str) -> bool:
        """Follow a table; return whether the state has changed."""
        new = table[type, self.state]
        changed = new not in ("=", "pre-approval")
        self.state = new if changed else self.state
        self.listed |= changed and self.state not in ("None", "None + Pending In")
        return changed

    def sees_them(self) -> bool:
        return STATES[self.state][0] in ("to", "both")

    def shows_itself(self) -> bool:
        return STATES[self.state][0] in ("from", "both")


OUT, IN = ({(row[0], row[1]): row[3] for row in cells(table)} for table in (OUTBOUND, INBOUND))


class Model:
    """Both halves, moved by the tables of the RFC."""

    def __init__(self) -> None:
        self.halves = {name: Half() for name in PAIR}

    def say(self, name: str, type: str) -> None:
        """`name` sends a stanza of this type to the other."""
        half = self.halves[name]
        before = half.state
        half.apply(OUT, type)
        if type == "subscribed" and OUT[type, before] == "pre-approval":
            half.listed = half.approved = True
        elif type == "unsubscribed":
            half.approved = False
        if type in ("subscribe", "unsubscribe") or half.state != before:
            self.hear(other(name), type)

    def hear(self, name: str, type: str) -> None:
        """What the other says arrives."""
        half = self.halves[name]
        if type == "subscribe" and (half.approved or half.shows_itself()):
            half.apply(IN, "subscribe")
            half.apply(OUT, "subscribed")
            self.halves[other(name)].apply(IN, "subscribed")
        else:
            half.apply(IN, type)

    def remove(self, name: str) -> None:
        """`name` takes the other from the roster (§2.5.2)."""
        half = self.halves[name]
        subscription, ask, asked, _how = STATES[half.state]
        half.listed = half.approved = False
        half.state = "None + Pending In" if asked else "None"
        if subscription in ("from", "both"):
            self.hear(other(name), "unsubscribed")
        if subscription in ("to", "both") or ask:
            self.hear(other(name), "unsubscribe")


class TwoAccounts(RuleBasedStateMachine):
    """Romeo and Juliet do anything in any order, each with two resources that come and go.

    RFC6121-A.1-1, RFC6121-4.2.2-1, RFC6121-4.4.2-1, RFC6121-4.5.2-1, RFC6121-11-1; S46
    """

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.server = MemoryServer(Path(self.folder.name), {})
        self.model = Model()
        self.clients: dict[tuple[str, str], Client] = {}
        self.available: set[tuple[str, str]] = set()
        self.seen: dict[tuple[str, str], set[str]] = {}  # whom of the other's resources each believes to be there
        for name in PAIR:
            for resource in ("one", "two"):
                self.connect(name, resource)
            self.becomes_available(name, "one")

    def connect(self, name: str, resource: str) -> None:
        client = self.server.client().login(name, resource=resource)
        client.sends(f"<iq type='get' id='r'><query xmlns='{ROSTER}'/></iq>")
        client.receives(f"<iq type='result' id='r'><query xmlns='{ROSTER}' ...>...</query></iq>")
        self.clients[name, resource] = client
        self.seen[name, resource] = set()

    @rule(name=WHO, which=WHICH, type=st.sampled_from(TYPES))
    def says(self, name: str, which: str, type: str) -> None:
        self.clients[name, which].sends(f"<presence type='{type}' to='{other(name)}@example.org'/>")
        self.model.say(name, type)

    @rule(name=WHO, which=WHICH)
    def asks_and_is_allowed(self, name: str, which: str) -> None:
        """The two steps that a random walk would seldom take in a row."""
        self.says(name, which, "subscribe")
        self.server.cast.settle()
        self.says(other(name), which, "subscribed")

    @rule(name=WHO, which=WHICH, forged=st.sampled_from(("", " subscription='both'", " ask='subscribe'", " approved='true'")))
    def lists(self, name: str, which: str, forged: str) -> None:
        item = f"<item jid='{other(name)}@example.org' name='dear'{forged}/>"
        self.clients[name, which].sends(f"<iq type='set' id='s'><query xmlns='{ROSTER}'>{item}</query></iq>")
        self.model.halves[name].listed = True

    @precondition(lambda self: any(half.listed for half in self.model.halves.values()))
    @rule(name=WHO, which=WHICH)
    def removes(self, name: str, which: str) -> None:
        if self.model.halves[name].listed:
            item = f"<item jid='{other(name)}@example.org' subscription='remove'/>"
            self.clients[name, which].sends(f"<iq type='set' id='s'><query xmlns='{ROSTER}'>{item}</query></iq>")
            self.model.remove(name)

    @rule(name=WHO, which=WHICH)
    def becomes_available(self, name: str, which: str) -> None:
        self.clients[name, which].sends("<presence/>")
        if (name, which) not in self.available:
            self.available.add((name, which))
            if STATES[self.model.halves[name].state][1]:
                self.model.say(name, "subscribe")  # §3.1.2: what was not answered is sent again

    @rule(name=WHO, which=WHICH)
    def becomes_unavailable(self, name: str, which: str) -> None:
        self.clients[name, which].sends("<presence type='unavailable'/>")
        self.available.discard((name, which))
        self.clients[name, which].receives_anything()
        self.seen[name, which].clear()

    @rule(name=WHO, which=WHICH)
    def vanishes_and_returns(self, name: str, which: str) -> None:
        self.server.cast.settle()
        self.clients[name, which].disconnects()
        self.available.discard((name, which))
        self.connect(name, which)

    @invariant()
    def all_is_as_the_tables_say(self) -> None:
        """After each step. What everybody sees comes first: asking for the rosters drops what is unread."""
        self.check_who_sees_whom()
        self.check_the_rosters()
        self.check_that_the_halves_agree()

    def check_who_sees_whom(self) -> None:
        """Nobody else's presence came, and nobody's is missing."""
        self.server.cast.settle()
        for (name, resource), client in self.clients.items():
            allowed = {f"{other(name)}@example.org/{which}" for whose, which in self.available if whose == other(name)}
            for stanza in client.receives_anything():
                self.take(name, resource, stanza)
            expected = allowed if self.model.halves[other(name)].shows_itself() else set()
            if (name, resource) in self.available:
                assert self.seen[name, resource] == expected, (name, resource)

    def take(self, name: str, resource: str, stanza: xmppd.Element) -> None:
        sender = stanza.get("from", "")
        if stanza.tag != "{jabber:client}presence" or not sender.startswith(f"{other(name)}@example.org/"):
            return
        if stanza.get("type") == "unavailable":
            self.seen[name, resource].discard(sender)
            return
        assert stanza.get("type") is None, "only bare JIDs speak of subscriptions"
        assert (name, resource) in self.available, "presence for somebody who is not there"
        assert self.model.halves[other(name)].shows_itself(), "presence for somebody who is not subscribed"
        self.seen[name, resource].add(sender)

    def check_the_rosters(self) -> None:
        for name, half in self.model.halves.items():
            item = rosters_item(self.clients[name, "one"], f"{other(name)}@example.org")
            subscription, ask, _asked, _how = STATES[half.state]
            assert item == (Item(subscription, ask, half.approved) if half.listed else None), name

    def check_that_the_halves_agree(self) -> None:
        """Who sees is shown, who has asked was asked: at both ends."""
        romeo, juliet = self.model.halves.values()
        for one, two in ((romeo, juliet), (juliet, romeo)):
            assert one.sees_them() == two.shows_itself()
            assert STATES[one.state][1] == STATES[two.state][2]

    @rule(name=WHO)
    def is_asked_about_what_waits(self, name: str) -> None:
        """A request waits exactly if the tables say so: a new resource is asked. Only who may notices the resource."""
        half, third_jid = self.model.halves[name], f"{name}@example.org/third"
        third = self.server.client().login(name, resource="third")
        third.sends("<presence/>")
        asking = [stanza for stanza in third.receives_anything() if stanza.get("type") == "subscribe"]
        assert len(asking) == STATES[half.state][2]
        third.closes()
        for (whose, which), client in self.clients.items():
            noticed = [stanza.get("type") for stanza in client.receives_anything() if stanza.get("from") == third_jid]
            may = (whose, which) in self.available and (whose == name or half.shows_itself())
            assert noticed == ([None, "unavailable"] if may else [])

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.cast.hang_up()
            self.server.check_log()
            self.server.stop()
            self.folder.cleanup()


TwoAccounts.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None,
    phases=[Phase.generate],  # 40 steps can be read; to make them fewer takes minutes
)  # fmt: skip




@pytest.mark.timeout(240)  # six seconds of work, but some machines have more to do
class TestTwoAccounts(TwoAccounts.TestCase):  # type: ignore[misc, valid-type]  # made by hypothesis
    """All of the above, at random."""
