"""Where a stanza goes, and what its sender learns (RFC 6120 §8, §10; RFC 6121 §8)."""

from __future__ import annotations

import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Mapping

import pytest

import xmppd
from tests.dialogue import PATIENCE, Client
from tests.servers import MemoryServer, ProcessServer

JULIET = "juliet@example.org"
UNAVAILABLE = "<error type='cancel' code='503'><service-unavailable .../></error>"
BAD_REQUEST = "<error type='modify' code='400'><bad-request .../></error>"
MALFORMED = "<error type='modify' code='400'><jid-malformed .../></error>"
FORBIDDEN = "<error type='auth' code='403'><forbidden .../></error>"
PING = "<ping xmlns='urn:xmpp:ping'/>"


def logged_in(server: MemoryServer, resource: str, priority: int | None = None, name: str = "juliet") -> Client:
    """Somebody logged in, and available if there is a priority."""
    client = server.client().login(name, resource=resource)
    if priority is not None:
        client.sends(f"<presence><priority>{priority}</priority></presence>")
    return client


def befriend(server: MemoryServer, romeo: Client) -> None:
    """Let romeo see juliet's presence, and be in her roster."""
    juliet = server.client().login("juliet", resource="somewhere")
    romeo.befriends(juliet)
    juliet.closes()
    romeo.forgets_unread()


# ---- the table of messages: RFC 6121 §8.5.4 ----------------------------------------------
#
# One letter for each message type: (O)ffline, (E)rror, (S)ilence, (D)elivered to the resource
# addressed, (M)ost available, (A)ll that are not negative. The RFC's own table comes first;
# ours is a choice from it, which may differ for contacts and strangers (§8.1).

RESOURCES: dict[str, dict[str, int | None]] = {
    "nobody": {},
    "nobody active": {},
    "connected only": {"balcony": None},
    "negative": {"balcony": -1},
    "one": {"balcony": 0},
    "several": {"balcony": 5, "chamber": 5, "garden": 1, "cellar": -1},
}
MOST_AVAILABLE = {"one": ["balcony"], "several": ["balcony", "chamber"]}
ALL = {"one": ["balcony"], "several": ["balcony", "chamber", "garden"]}

TABLE = [  # condition, address, and for normal, chat, groupchat, headline: what the RFC allows, contact, stranger
    ("nobody", "bare", "S/E: S", "S/E: S", "E: E", "S: S"),
    ("nobody", "full", "S/E: S", "S/E: S", "S/E: S", "S/E: S"),
    ("nobody active", "bare", "O/E: O", "O/E: O", "E: E", "S: S"),
    ("nobody active", "no match", "S/E: E S", "O/E: O", "S/E: E S", "S/E: S"),
    ("connected only", "bare", "O/E: O", "O/E: O", "E: E", "S: S"),
    ("connected only", "match", "D: D", "D: D", "D: D", "D: D"),
    ("connected only", "no match", "S/E: E S", "O/E: O", "S/E: E S", "S/E: S"),
    ("negative", "bare", "O/E: O", "O/E: O", "E: E", "S: S"),
    ("negative", "match", "D: D", "D: D", "D: D", "D: D"),
    ("negative", "no match", "S/E: E S", "O/E: O", "S/E: E S", "S/E: S"),
    ("one", "bare", "D/M: M", "D/M: M", "E: E", "D/A: A"),
    ("one", "match", "D: D", "D: D", "D: D", "D: D"),
    ("one", "no match", "S/E: E S", "D/M: M", "S/E: E S", "S/E: S"),
    ("several", "bare", "M/A: M", "M/A: M", "E: E", "A: A"),
    ("several", "match", "D: D", "D/A: D", "D: D", "D: D"),
    ("several", "no match", "S/E: E S", "M/A: M", "S/E: E S", "S/E: S"),
]
TYPES = ("normal", "chat", "groupchat", "headline")
ROWS = [
    pytest.param(condition, address, dict(zip(TYPES, cells, strict=True)), is_contact,
                 id=f"{condition}, {address}, {'contact' if is_contact else 'stranger'}")
    for condition, address, *cells in TABLE
    for is_contact in (False, True)
    if not (is_contact and condition == "nobody")
]  # fmt: skip


@pytest.mark.parametrize(("condition", "address", "cells", "is_contact"), ROWS)
def test_messages_go_where_the_table_says(
    server: MemoryServer, romeo: Client, condition: str, address: str, cells: dict[str, str], is_contact: bool
) -> None:
    """RFC6121-8.5.4; RFC6121-8.1-1; RFC6121-8.5.1-1, RFC6121-8.5.2.1.1-1, RFC6121-8.5.2.1.1-2,
    RFC6121-8.5.2.1.1-3, RFC6121-8.5.2.1.1-4, RFC6121-8.5.2.1.1-5, RFC6121-8.5.2.1.1-6, RFC6121-8.5.2.1.1-7,
    RFC6121-8.5.2.2.1-1, RFC6121-8.5.2.2.1-2, RFC6121-8.5.3.1-2, RFC6121-8.5.3.2.1-1;
    RFC6121-5.2.2-2; RFC3921-11.1-1"""
    if is_contact:
        befriend(server, romeo)
    resources = {name: logged_in(server, name, priority) for name, priority in RESOURCES[condition].items()}
    forget_all(server)
    to = "nobody@example.org" if condition == "nobody" else JULIET
    to += {"bare": "", "full": "/balcony", "match": "/balcony", "no match": "/gone"}[address]
    kept = []
    for type, cell in cells.items():
        allowed, choice = cell.split(": ")
        letter = choice.split()[0] if is_contact else choice.split()[-1]
        assert letter in allowed.split("/")
        message = f"<message from='romeo@example.org/orchard' to='{to}' type='{type}'><body>O</body></message>"
        romeo.sends(f"<message to='{to}' type='{type}'><body>O</body></message>")
        if letter == "E":
            romeo.receives(f"<message type='error' from='{to}'>{UNAVAILABLE}</message>")
        for name in {"D": ["balcony"], "M": MOST_AVAILABLE.get(condition), "A": ALL.get(condition)}.get(letter) or []:
            resources[name].receives(message)
        if letter == "O":
            kept.append(message.replace("</body>", "</body><delay xmlns='urn:xmpp:delay' .../>"))
        romeo.receives_nothing()
        for client in resources.values():
            client.receives_nothing()
    for client in resources.values():
        client.disconnects()
    if condition != "nobody":
        later = logged_in(server, "later", 0)
        of_romeo = ["<presence type='unavailable' from='romeo@example.org' .../>"] if is_contact else []
        later.receives("<presence ...>...</presence>", *of_romeo, *kept)
    forget_presence(server)


def forget_all(server: MemoryServer) -> None:
    """Let everybody drop what has come so far."""
    server.cast.settle()
    for client in server.cast.clients:
        client.forgets_unread()


def forget_presence(server: MemoryServer) -> None:
    """Let everybody drop the presence that has come so far; anything else stays, and fails the test at its end."""
    server.cast.settle()
    for client in server.cast.clients:
        unread = client.unread()
        client.forgets_unread()
        assert all(stanza.tag.endswith("presence") for stanza in unread), unread


def test_the_table_has_all_rows_of_the_rfc() -> None:
    """RFC6121-8.5.4"""
    rows = {(condition, address) for condition, address, *_ in TABLE}
    active = ("connected only", "negative", "one", "several")
    assert rows == {
        ("nobody", "bare"),
        ("nobody", "full"),
        ("nobody active", "bare"),
        ("nobody active", "no match"),
    } | {(condition, address) for condition in active for address in ("bare", "match", "no match")}


@pytest.mark.parametrize("to", ["nobody@example.org", "nobody@example.org/x", JULIET, JULIET + "/gone"])
def test_message_errors_for_nobody_in_particular_are_ignored(romeo: Client, juliet: Client, to: str) -> None:
    """RFC6121-8.5.2.1.1-5, RFC6121-8.5.2.2.1-2, RFC6121-8.5.3.2.1-1, RFC6120-8.3.1-2"""
    for is_available in (False, True):
        if is_available:
            juliet.sends("<presence/>")
            juliet.receives("<presence from='juliet@example.org/balcony'/>")
        romeo.sends(f"<message to='{to}' type='error' id='e'><body>?</body><error type='cancel'/></message>")
        romeo.receives_nothing()
        juliet.receives_nothing()


def test_message_errors_reach_the_resource_that_they_are_for(romeo: Client, juliet: Client) -> None:
    """RFC6121-8.5.3.1-2"""
    error = "<error type='cancel'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    romeo.sends(f"<message to='{JULIET}/balcony' type='error' id='e'>{error}</message>")
    juliet.receives(f"<message from='romeo@example.org/orchard' type='error' id='e'>{error}</message>")


def test_a_message_of_no_known_type_is_normal(server: MemoryServer, romeo: Client) -> None:
    """RFC6121-5.2.2-1, RFC6120-8.1.4-1: one to a resource that is gone shows it, for chat would be kept."""
    befriend(server, romeo)
    for type in ("", " type='normal'", " type='gossip'", " type=''", " type='CHAT'"):
        romeo.sends(f"<message to='{JULIET}/gone' id='m'{type}><body>O</body></message>")
        romeo.receives(f"<message type='error' id='m' from='{JULIET}/gone'>{UNAVAILABLE}</message>")


# ---- every other cell of FATES -----------------------------------------------------------

CASES = {  # address, and juliet's one resource: its priority, "connected" or ""
    "NOBODY": ("nobody@example.org", ""),
    "BARE": (JULIET, "0"),
    "BARE_AWAY": (JULIET, ""),
    "FULL": (JULIET + "/balcony", "connected"),
    "FULL_GONE": (JULIET + "/gone", "0"),
}
OTHER_KINDS = {  # one stanza per kind, and what becomes of it in the order of CASES, when sent by a contact
    "presence available": ("<presence/>", "silence delivered silence delivered silence"),
    "presence unavailable": ("<presence type='unavailable'/>", "silence delivered silence delivered silence"),
    "presence error": ("<presence type='error'/>", "silence silence silence delivered silence"),
    "iq request": (f"<iq type='get'>{PING}</iq>", "refused refused refused delivered refused"),
    "iq set": ("<iq type='set'><x xmlns='urn:x'/></iq>", "refused refused refused delivered refused"),
    "iq reply": ("<iq type='result'/>", "silence silence silence delivered silence"),
    "iq error": ("<iq type='error'/>", "silence silence silence delivered silence"),
}
SUBSCRIPTION_KINDS = {  # what each does to juliet's roster, where she has asked romeo and is seen by him
    "presence subscribe": ("subscribe", "- - - - -"),
    "presence subscribed": ("subscribed", "- both both both -"),
    "presence unsubscribed": ("unsubscribed", "- from from from -"),
    "presence unsubscribe": ("unsubscribe", "- none none none -"),
}


def test_every_kind_and_every_case_is_tried_here() -> None:
    """RFC6121-8.5"""
    assert set(CASES) == {case.name for case in xmppd.Case}
    tried = {*OTHER_KINDS, *SUBSCRIPTION_KINDS, "presence probe", *(f"message {type}" for type in (*TYPES, "error"))}
    assert set(xmppd.FATES) <= tried
    assert all(set(row) == set(xmppd.Case) for row in xmppd.FATES.values())


def juliet_in(server: MemoryServer, case: str) -> tuple[str, Client | None]:
    """Set the scene of a case: the address, and juliet's resource if there is one."""
    to, resource = CASES[case]
    juliet = logged_in(server, "balcony", None if resource == "connected" else int(resource)) if resource else None
    forget_all(server)
    return to, juliet


@pytest.mark.parametrize("case", CASES)
def test_presence_and_requests_go_where_they_must(server: MemoryServer, romeo: Client, case: str) -> None:
    """RFC6121-8.5.1-1, RFC6121-8.5.2.1.2-1, RFC6121-8.5.2.1.3-1, RFC6121-8.5.2.2.2-1, RFC6121-8.5.2.2.3-1,
    RFC6121-8.5.3.1-2, RFC6121-8.5.3.2.2-1, RFC6121-8.5.3.2.3-1;
    RFC6120-10.5.3.1-1, RFC6120-10.5.3.2-1, RFC6120-10.5.4-1"""
    befriend(server, romeo)
    to, juliet = juliet_in(server, case)
    for text, fates in OTHER_KINDS.values():
        fate = fates.split()[list(CASES).index(case)]
        stanza = re.sub("(/?>)", rf" to='{to}' id='s1'\1", text, count=1)
        romeo.sends(stanza)
        if fate == "refused":
            romeo.receives(f"<iq type='error' id='s1' from='{to}'>{UNAVAILABLE}</iq>")
        if fate == "delivered":
            assert juliet
            juliet.receives(stanza.replace(" to=", " from='romeo@example.org/orchard' to="))
        romeo.receives_nothing()
        if juliet:
            juliet.receives_nothing()
    if juliet:
        juliet.disconnects()
    forget_presence(server)


def arrives(server: MemoryServer, text: str) -> None:
    """Let the server have a stanza as another server would hand it in: a client's own would be put right first."""
    stanza = xmppd.parse_element(text)
    assert isinstance(stanza, xmppd.Stanza)
    server.server.emit(stanza)


@pytest.mark.parametrize("case", CASES)
def test_subscriptions_change_as_their_address_allows(server: MemoryServer, case: str) -> None:
    """RFC6121-8.5.1-1, RFC6121-8.5.2.1.2-1, RFC6121-8.5.3.2.2-1: what is for a resource that is gone is ignored.

    RFC3921-11.1-2: what comes while nobody is there is known from the roster at the next login.
    """
    owner, contact = xmppd.JID.parse(JULIET), "romeo@example.org"
    to, _juliet = juliet_in(server, case)
    for type, effects in SUBSCRIPTION_KINDS.values():
        server.server.rosters.put(owner, contact, {"subscription": "from", "ask": True, "ver": 1})
        effect = effects.split()[list(CASES).index(case)]
        arrives(server, f"<presence type='{type}' from='{contact}' to='{to}'/>")
        item = server.server.rosters.item(owner, contact)
        changed = {"-": ("from", True), "both": ("both", False), "from": ("from", False), "none": ("none", True)}[
            effect
        ]
        assert (item["subscription"], bool(item.get("ask"))) == changed, type
    assert not server.server.rosters.items(xmppd.JID.parse("nobody@example.org"))
    forget_presence(server)


@pytest.mark.parametrize("to", [JULIET, JULIET + "/balcony", JULIET + "/gone"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_request_to_subscribe_arrives_at_any_address(server: MemoryServer, to: str, is_there: bool) -> None:
    """RFC6121-8.5.3.2.2-1 (§3.1.3): now, or when juliet comes."""
    juliet = logged_in(server, "balcony", 0) if is_there else None
    if juliet:
        juliet.receives("<presence ...>...</presence>")
    arrives(server, f"<presence type='subscribe' from='romeo@example.org' to='{to}'/>")
    if not juliet:
        juliet = logged_in(server, "balcony", 0)
        juliet.receives("<presence ...>...</presence>")
    juliet.receives(f"<presence type='subscribe' from='romeo@example.org' to='{JULIET}'/>")


PROBED = {  # the answers that a contact gets: their type, from whom
    "NOBODY": [],
    "BARE": [(None, "juliet@example.org/balcony")],
    "BARE_AWAY": [("unavailable", "juliet@example.org")],
    "FULL": [("unavailable", "juliet@example.org/balcony")],
    "FULL_GONE": [("unavailable", "juliet@example.org/gone")],
}


@pytest.mark.parametrize("case", CASES)
def test_probes_are_answered_by_the_server(server: MemoryServer, romeo: Client, case: str) -> None:
    """RFC6121-8.5.2.1.2-1, RFC6121-8.5.1-1, RFC6121-8.5.3.2.2-1

    What strangers are told, that they are not subscribed, their own server knows: it passes nothing on.
    """
    to, juliet = juliet_in(server, case)
    romeo.sends(f"<presence type='probe' to='{to}'/>")
    romeo.receives_nothing()
    item = {"subscription": "from", "ver": 1}
    server.server.rosters.put(xmppd.JID.parse(JULIET), "romeo@example.org", item)
    romeo.sends(f"<presence type='probe' to='{to}'/>")
    assert [(stanza.get("type"), stanza.get("from")) for stanza in romeo.receives_anything()] == PROBED[case]
    if juliet:
        juliet.receives_nothing()


def test_requests_between_own_resources_pass(server: MemoryServer, juliet: Client) -> None:
    """RFC6121-8.5.3.1-1: nobody is a stranger to themselves."""
    chamber = logged_in(server, "chamber")
    juliet.sends(f"<iq type='get' to='{JULIET}/chamber' id='q'>{PING}</iq>")
    chamber.receives(f"<iq type='get' from='{JULIET}/balcony' id='q'>{PING}</iq>")
    chamber.sends(f"<iq type='result' to='{JULIET}/balcony' id='q'/>")
    juliet.receives(f"<iq type='result' from='{JULIET}/chamber' id='q'/>")


def test_directed_presence_opens_a_resource_for_requests(romeo: Client, juliet: Client) -> None:
    """RFC6121-8.5.3.1-1: and the goodbye closes it again."""
    question = f"<iq type='get' to='{JULIET}/balcony' id='q'>{PING}</iq>"
    refusal = f"<iq type='error' id='q' from='{JULIET}/balcony'>{UNAVAILABLE}</iq>"
    romeo.sends(question)
    romeo.receives(refusal)
    juliet.sends("<presence to='romeo@example.org/orchard'/>")
    romeo.receives(f"<presence from='{JULIET}/balcony' />")
    romeo.sends(question)
    juliet.receives(f"<iq type='get' from='romeo@example.org/orchard' id='q'>{PING}</iq>")
    juliet.sends("<presence type='unavailable' to='romeo@example.org/orchard'/>")
    romeo.receives(f"<presence type='unavailable' from='{JULIET}/balcony' />")
    romeo.sends(question)
    romeo.receives(refusal)


@pytest.mark.parametrize("to", [JULIET, JULIET + "/balcony", JULIET + "/gone", "nobody@example.org/balcony"])
def test_nobody_but_the_server_pushes_rosters(server: MemoryServer, romeo: Client, juliet: Client, to: str) -> None:
    """RFC6121-2.1.5-2, S41: not even a contact."""
    romeo.befriends(juliet)
    item = "<query xmlns='jabber:iq:roster'><item jid='paris@example.org'/></query>"
    romeo.sends(f"<iq type='set' to='{to}' id='r'>{item}</iq>")
    romeo.receives(f"<iq type='error' id='r' from='{to}'>{FORBIDDEN}</iq>")
    juliet.receives_nothing()


# ---- attributes of stanzas (RFC 6120 §8.1) -----------------------------------------------


def test_a_stanza_counts_when_it_is_complete(romeo: Client, juliet: Client) -> None:
    """RFC6120-8-1"""
    romeo.sends_raw(f"<message to='{JULIET}/balcony'><body>Art thou not Romeo?</body>")
    juliet.passes_barrier()
    assert not juliet.unread()
    romeo.sends_raw("</message>")
    juliet.receives("<message from='romeo@example.org/orchard'><body>Art thou not Romeo?</body></message>")


@pytest.mark.parametrize("to", [JULIET, "JULIET@Example.ORG", JULIET + "/balcony", "Juliet@example.org./balcony"])
def test_the_address_stays_as_it_was_written(romeo: Client, juliet: Client, to: str) -> None:
    """RFC6120-8.1.1.1-1, RFC6121-8.5.2.1.1-7"""
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    romeo.sends(f"<message to='{to}' type='chat'><body>O</body></message>")
    juliet.receives(f"<message from='romeo@example.org/orchard' to='{to}' type='chat'><body>O</body></message>")


@pytest.mark.parametrize("claimed", ["", " from='romeo@example.org'", " from='romeo@example.org/orchard'",
                                     " from='ROMEO@example.org'"])  # fmt: skip
def test_the_sender_is_stamped(romeo: Client, juliet: Client, claimed: str) -> None:
    """RFC6120-8.1.2.1-1, RFC6120-8.1.2.1-3, S40"""
    romeo.sends(f"<message{claimed} to='{JULIET}/balcony' id='m'><body>O</body></message>")
    juliet.receives("<message from='romeo@example.org/orchard' id='m'><body>O</body></message>")


@pytest.mark.parametrize("kind", ["message", "presence", "iq type='get' id='i'"])
def test_who_claims_to_be_somebody_else_is_sent_away(server: MemoryServer, juliet: Client, kind: str) -> None:
    """RFC6120-8.1.2.1-1, S40"""
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    others = ["juliet@example.org", "juliet@example.org/balcony", "example.org", "romeo@example.org/elsewhere",
              "romeo@example.net/orchard", "r\u043emeo@example.org/orchard", "@@", ""]  # fmt: skip
    for claimed in others:
        romeo = server.client().login("romeo", resource="orchard")
        romeo.sends(f"<{kind} from='{claimed}' to='{JULIET}'>{PING}</{kind.split()[0]}>")
        romeo.receives_stream_error("invalid-from")
        assert romeo.is_closed()
    juliet.receives_nothing()


def test_the_server_speaks_under_its_own_name(romeo: Client) -> None:
    """RFC6120-8.1.2.1-2, RFC6120-8.1.1.1-2: `receives` checks the `to`, here also that nothing else is in its place."""
    romeo.sends(f"<iq type='get' id='a' to='example.org'>{PING}</iq>")
    answer = romeo.receives("<iq type='result' id='a' from='example.org' />")
    assert answer.get("to") in (None, "romeo@example.org/orchard")
    romeo.sends("<iq type='get' id='b'><query xmlns='jabber:iq:roster'/></iq>")
    answer = romeo.receives("<iq type='result' id='b'><query xmlns='jabber:iq:roster' .../></iq>")
    assert answer.get("from") in (None, "romeo@example.org")
    assert answer.get("to") in (None, "romeo@example.org/orchard")


@pytest.mark.parametrize("identifier", ["1", "a b", "&lt;&amp;&quot;", "é\u2028", "0" * 500])
def test_ids_come_back_exactly(romeo: Client, identifier: str) -> None:
    """RFC6120-8.1.3-1"""
    for payload in (PING, "<x xmlns='urn:unknown'/>"):
        romeo.sends(f"<iq type='get' id=\"{identifier}\" to='example.org'>{payload}</iq>")
    expected = ET.fromstring(f'<a id="{identifier}"/>').get("id")
    assert [stanza.get("id") for stanza in romeo.receives_anything()] == [expected, expected]


@pytest.mark.parametrize(
    ("stanza", "why"),
    [
        (f"<iq type='get' to='example.org'>{PING}</iq>", "no id"),
        (f"<iq id='q' to='example.org'>{PING}</iq>", "no type"),
        (f"<iq id='q' type='subscribe' to='example.org'>{PING}</iq>", "no such type"),
        ("<iq id='q' type='get' to='example.org'/>", "no payload"),
        (f"<iq id='q' type='set' to='example.org'>{PING}{PING}</iq>", "two payloads"),
        ("<iq id='q' type='get'>text</iq>", "text is no payload"),
        (f"<iq id='q' type='get' to='{JULIET}/balcony'/>", "also to others"),
        (f"<iq id='q' type='get' to='{JULIET}/balcony'>{PING}{PING}</iq>", "also to others"),
    ],
)
def test_malformed_requests_are_answered_all_the_same(romeo: Client, juliet: Client, stanza: str, why: str) -> None:
    """RFC6120-8.1.3-1, RFC6120-8.1.4-1, RFC6120-8.2.3-1, RFC6120-8.2.3-2"""
    juliet.sends("<presence to='romeo@example.org/orchard'/>")  # so that romeo could ask her
    romeo.receives("<presence ...>...</presence>")
    romeo.sends(stanza)
    identifier = "id='q'" if "id='q'" in stanza else ""
    romeo.receives(f"<iq type='error' {identifier}>{BAD_REQUEST}</iq>")
    juliet.receives_nothing()


@pytest.mark.parametrize("to", ["", f" to='{JULIET}'"])
def test_presence_of_unknown_type_is_a_bad_request(romeo: Client, juliet: Client, to: str) -> None:
    """RFC6120-8.1.4-1"""
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    for type in ("gossip", "", "Unavailable", "available", "directed", "none"):
        romeo.sends(f"<presence id='p' type='{type}'{to}/>")
        romeo.receives(f"<presence type='error' id='p'>{BAD_REQUEST}</presence>")
    juliet.receives_nothing()


def test_texts_of_the_server_say_their_language(romeo: Client) -> None:
    """RFC6120-8.1.5-1"""
    romeo.sends("<iq type='get' id='q'/>")
    text = romeo.receives_anything()[0].find(".//{urn:ietf:params:xml:ns:xmpp-stanzas}text")
    assert text is not None
    assert text.get("{http://www.w3.org/XML/1998/namespace}lang") == "en"


def test_a_stanza_takes_the_language_of_its_stream(server: MemoryServer, juliet: Client) -> None:
    """RFC6120-8.1.5-1 (§8.1.5, §4.7.4): its own language is left alone."""
    romeo = server.client().connect()
    romeo.negotiates()
    romeo.starts_tls()
    romeo.negotiates()
    romeo.authenticates("romeo", "romeo-secret")
    romeo.negotiates(xml_lang="it")
    romeo.binds("orchard")
    romeo.sends(f"<message to='{JULIET}/balcony'><body>Sì</body></message>")
    romeo.sends(f"<message to='{JULIET}/balcony' xml:lang='en'><body>Ay</body></message>")
    juliet.receives("<message from='romeo@example.org/orchard' xml:lang='it'><body>Sì</body></message>")
    juliet.receives("<message from='romeo@example.org/orchard' xml:lang='en'><body>Ay</body></message>")


# ---- errors (RFC 6120 §8.3) --------------------------------------------------------------


@pytest.mark.parametrize(
    ("stanza", "kind"),
    [
        ("<message id='e1' to='juliet@elsewhere.example'><body>O</body></message>", "message"),
        ("<presence id='e1' to='juliet@elsewhere.example'/>", "presence"),
        (f"<iq id='e1' type='get' to='juliet@elsewhere.example'>{PING}</iq>", "iq"),
    ],
)
def test_an_error_is_the_stanza_turned_round(romeo: Client, stanza: str, kind: str) -> None:
    """RFC6120-8.3.1-1, RFC6120-8.3.2-1, RFC6120-10.4-1: nobody federates with this server"""
    romeo.sends(stanza)
    [error] = romeo.receives_anything()
    assert error.tag == f"{{jabber:client}}{kind}"
    assert {"type": "error", "id": "e1", "from": "juliet@elsewhere.example", "to": "romeo@example.org/orchard"}.items() \
        <= error.attrib.items()  # fmt: skip
    [child] = error.findall("{jabber:client}error")
    assert child.get("type") == "cancel"
    assert child[0].tag == "{urn:ietf:params:xml:ns:xmpp-stanzas}remote-server-not-found"


def test_every_error_has_a_type_and_a_number() -> None:
    """RFC6120-8.3.2-1, RFC6120-8.3.3-1"""
    usual = """bad-request modify; conflict cancel; feature-not-implemented cancel; forbidden auth; gone cancel;
        internal-server-error cancel; item-not-found cancel; jid-malformed modify; not-acceptable modify; not-allowed
        cancel; not-authorized auth; policy-violation modify; recipient-unavailable wait; redirect modify;
        registration-required auth; remote-server-not-found cancel; remote-server-timeout wait; resource-constraint
        wait; service-unavailable cancel; subscription-required auth; unexpected-request wait"""
    for condition, kind in (pair.split() for pair in usual.split(";")):
        error = xmppd.error_element(xmppd.StanzaError(condition))
        assert error.get("type") == kind, condition
        assert error[0].tag == f"{{urn:ietf:params:xml:ns:xmpp-stanzas}}{condition}"
    assert (
        xmppd.error_element(xmppd.StanzaError("gone"), by="example.org").get("by") == "example.org"
    )  # RFC6120-8.3.2-2


ANSWERS = [
    *(f"<{kind} type='error'{{}}><error type='cancel'/></{kind}>" for kind in ("message", "presence")),
    "<iq type='error' id='e'{}><error type='cancel'/></iq>",
    "<iq type='result' id='e'{}/>",
    "<iq type='result' id='e'{}><x xmlns='urn:x'/><y xmlns='urn:y'/></iq>",
]


ANYWHERE = ["", "example.org", "example.org/x", "nobody@example.org", "nobody@example.org/x", JULIET, JULIET + "/gone",
            "romeo@example.org", "elsewhere.example", "juliet@elsewhere.example/x", "@", "a@b@c",
            "\u2028@example.org"]  # fmt: skip


@pytest.mark.parametrize("stanza", ANSWERS)
def test_no_answer_is_answered(romeo: Client, stanza: str) -> None:
    """RFC6120-8.2.3-3, RFC6120-8.3.1-2, RFC6120-10.3.3-1, S55"""
    for to in ANYWHERE:
        romeo.sends(stanza.format(f" to='{to}'" if to else ""))
        romeo.receives_nothing()


def test_an_answer_without_an_id_answers_nothing(romeo: Client) -> None:
    """RFC6120-8.2.3-3: nor does it get an error for that."""
    romeo.sends("<iq type='result'/><iq type='error'/><iq type='error' id=''/>")
    romeo.receives_nothing()


IMPOSSIBLE = ["a@b@example.org", "@example.org", "romeo@", "example.org/", "a b@example.org", "''@x", "/x", "",
              "juliet@example.org/", "juliet@exa mple.org", "x" * 1024 + "@example.org", "\u2028@example.org"]  # fmt: skip


@pytest.mark.parametrize("kind", ["message", "presence", "iq"])
def test_an_impossible_address_costs_one_stanza(romeo: Client, kind: str) -> None:
    """RFC6120-8.3.3.8-1, S49: the stream stays open."""
    type = " type='get'" if kind == "iq" else ""
    for to in IMPOSSIBLE:
        romeo.sends(f'<{kind} to="{to}" id="x"{type}>{PING}</{kind}>')
        romeo.receives(f'<{kind} type="error" id="x" from="{to}">{MALFORMED}</{kind}>')


# ---- extended content (RFC 6120 §8.4) ----------------------------------------------------

CONTENT = [
    "<body>a &lt; b &amp; c &gt; d &quot;e&quot; 'f'</body>",
    "<body>  white\n\tspace  </body>",
    "<body>line&#13;end&#10;</body>",
    "<body>é ü 漢字 \U0001f339</body>",
    "<body/><subject xml:lang='cs'>Úpěnlivá prosba!</subject><subject>I implore you!</subject><thread parent='p'>t</thread>",
    "<body xml:lang='en'>Wherefore?</body><body xml:lang='cs'>Proč?</body>",
    "<x xmlns='urn:x' a='1' b='&#9;2&#10;'><y xmlns='urn:y'>1</y>tail<z xmlns=''/> <y/>end</x>",
    "<p:x xmlns:p='urn:x' p:a='1'><p:y q:b='2' xmlns:q='urn:q'/></p:x>",
    "<x xmlns='urn:x'><message xmlns='jabber:client' from='a' to='b'><body>inner</body></message></x>",
    "<x xmlns='urn:x'><message xmlns='jabber:server'><body/></message></x>",
    "<x xmlns='urn:x'><![CDATA[<not> &an; element]]></x>",
    "<x xmlns='urn:x' xml:space='preserve'> <y xml:lang='it'/> </x>",
]


ADDED = ("{urn:xmpp:delay}delay", "{urn:xmpp:sid:0}stanza-id", "{urn:last}last")  # what came to the content


@pytest.mark.parametrize("attributes", ["", " xmlns:e='urn:e' e:f='g'", " xml:space='preserve'", " unknown='1'"])
def test_content_passes_unchanged(romeo: Client, juliet: Client, attributes: str) -> None:
    """RFC6120-8.4-1, RFC6120-8.4-3, RFC6121-5.2-1: straight, and out of the offline storage."""
    for to in (f"{JULIET}/balcony", JULIET):
        for content in CONTENT:
            romeo.sends_raw(f"<message to='{to}' type='chat'{attributes}>{content}<last xmlns='urn:last'/></message>")
    juliet.sends("<presence/>")
    came = [stanza for stanza in juliet.receives_anything() if stanza.tag.endswith("message")]
    assert len(came) == 2 * len(CONTENT)
    for content, stanza in zip(CONTENT * 2, came, strict=True):
        expected = ET.fromstring(f"<a xmlns='jabber:client'><message{attributes}>{content}</message></a>")[0]
        for added in [child for tag in ADDED for child in stanza.findall(tag)]:
            stanza.remove(added)
        assert expected.attrib.items() <= stanza.attrib.items()
        assert [canonical(child) for child in stanza] == [canonical(child) for child in expected]


def canonical(element: ET.Element) -> str:
    return ET.canonicalize(ET.tostring(element))


@pytest.mark.parametrize("to", ["", " to='example.org'", " to='romeo@example.org'", f" to='{JULIET}'"])
@pytest.mark.parametrize("type", ["get", "set"])
def test_what_nobody_understands_is_unavailable(romeo: Client, juliet: Client, to: str, type: str) -> None:
    """RFC6120-8.4-2, RFC6120-10.3.3-1, RFC6121-8.4-1, RFC6121-8.5.2.1.3-1"""
    romeo.befriends(juliet)
    romeo.sends(f"<iq type='{type}' id='u'{to}><x xmlns='urn:unknown'/></iq>")
    romeo.receives(f"<iq type='error' id='u'>{UNAVAILABLE}</iq>")
    juliet.receives_nothing()


# ---- order and missing addresses (RFC 6120 §10) ------------------------------------------


def test_stanzas_of_one_stream_stay_in_order(server: MemoryServer, romeo: Client) -> None:
    """RFC6120-10.1-1, RFC6120-10.1-2: bare or full, also before and after juliet comes"""
    juliet = logged_in(server, "balcony", 0)
    juliet.receives("<presence ...>...</presence>")
    addresses = [JULIET, JULIET + "/balcony"] * 20
    romeo.sends("".join(f"<message to='{to}' id='{n}' type='chat'/>" for n, to in enumerate(addresses)))
    for n, to in enumerate(addresses):
        juliet.receives(f"<message from='romeo@example.org/orchard' to='{to}' id='{n}' type='chat'/>")


@pytest.mark.wire
def test_order_holds_between_processes_too(server: ProcessServer, romeo: Client, juliet: Client) -> None:
    """RFC6120-10.1-2"""
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    for n in range(100):
        romeo.sends(f"<message to='{JULIET}{'/balcony' if n % 3 else ''}' id='{n}' type='chat'/>")
    for n in range(100):
        juliet.receives(f"<message id='{n}' .../>")


def test_a_slow_request_holds_up_its_own_stream_only(
    romeo: Client, juliet: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC6120-10.1-1, RFC6120-10.1-4: a password is hashed in a worker; what comes behind waits for it."""
    is_hashed, hash_password = threading.Event(), xmppd.new_credentials

    def wait_and_hash(*args: object) -> Mapping[str, object]:
        assert is_hashed.wait(PATIENCE)
        return hash_password(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(xmppd, "new_credentials", wait_and_hash)
    password = "<query xmlns='jabber:iq:register'><username>romeo</username><password>new-secret</password></query>"
    romeo.sends_raw(
        f"<iq type='set' id='1' to='example.org'>{password}</iq>"
        f"<message to='{JULIET}/balcony' id='2'/><iq type='get' id='3' to='example.org'>{PING}</iq>"
    )
    juliet.passes_barrier()
    assert not juliet.unread()
    is_hashed.set()
    juliet.receives("<message id='2' from='romeo@example.org/orchard'/>")
    romeo.receives("<iq type='result' id='1' .../><iq type='result' id='3' .../>")


def test_a_message_to_nobody_in_particular_is_for_oneself(server: MemoryServer, romeo: Client) -> None:
    """RFC6120-10.3.1-1: to one's bare JID"""
    other = logged_in(server, "garden", 3, name="romeo")
    other.receives("<presence ...>...</presence>")
    romeo.sends("<message type='chat' id='note'><body>Buy poison</body></message>")
    other.receives("<message type='chat' id='note' from='romeo@example.org/orchard'><body>Buy poison</body></message>")
    romeo.receives_nothing()


def test_an_own_bare_jid_is_like_no_address(romeo: Client) -> None:
    """RFC6120-10.3.3-1"""
    for to in ("", " to='romeo@example.org'", " to='Romeo@EXAMPLE.org'"):
        romeo.sends(f"<iq type='get' id='q'{to}><query xmlns='jabber:iq:roster'/></iq>")
        romeo.receives("<iq type='result' id='q'><query xmlns='jabber:iq:roster' .../></iq>")


def test_presence_without_an_address_is_broadcast(romeo: Client, juliet: Client, nurse: Client) -> None:
    """RFC6120-10.3.2-1"""
    romeo.befriends(juliet)
    juliet.sends("<presence/>")
    nurse.sends("<presence/>")
    for client in (juliet, nurse):
        client.receives_anything()
    romeo.sends("<presence/>")
    juliet.receives("<presence from='romeo@example.org/orchard' to='juliet@example.org'/>")
    romeo.receives_anything()
    nurse.receives_nothing()


@pytest.mark.parametrize("to", ["example.org", "example.org/x", "EXAMPLE.org", "example.net"])
def test_the_domain_itself_is_an_address(romeo: Client, to: str) -> None:
    """RFC6120-10.5.1-1, RFC6120-10.5.2-1, RFC6120-10.5-1, RFC6121-8.4-1"""
    romeo.sends(f"<presence to='{to}'/><message to='{to}' type='headline'><body>News</body></message>")
    romeo.receives_nothing()
    for type in ("normal", "chat", "groupchat"):
        romeo.sends(f"<message to='{to}' type='{type}' id='m'><body>O</body></message>")
        romeo.receives(f"<message type='error' id='m' from='{to}'>{UNAVAILABLE}</message>")
    romeo.sends(f"<iq type='get' id='q' to='{to}'>{PING}</iq>")
    answer = (
        f"<iq type='error' id='q' from='{to}'>{UNAVAILABLE}</iq>"
        if "/" in to
        else f"<iq type='result' id='q' from='{to}'/>"
    )
    romeo.receives(answer)


def test_the_other_domain_served_here_is_no_stranger(server: MemoryServer, romeo: Client) -> None:
    """RFC6120-10.5-1: nothing goes out of the house for it."""
    server.add_account("paris@example.net")
    paris = server.client(host="example.net").login("paris", resource="tomb")
    romeo.sends("<message to='paris@example.net/tomb' id='m'><body>Tempt not a desperate man</body></message>")
    paris.receives("<message from='romeo@example.org/orchard' id='m'><body>Tempt not a desperate man</body></message>")


def test_a_bug_in_a_handler_costs_one_stanza(
    server: MemoryServer, romeo: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC6120-8.2.3-1: the client hears of it, the stream goes on, and the log has the traceback."""
    monkeypatch.setattr(xmppd, "__version__", object())  # no text for an element
    romeo.sends("<iq type='get' id='v' to='example.org'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives("<iq type='error' id='v'><error type='cancel'><internal-server-error .../></error></iq>")
    assert len(server.bugs.reports) == 1
    server.bugs.reports.clear()
    romeo.receives_nothing()


def test_a_request_that_fails_late_has_changed_nothing(
    server: MemoryServer, romeo: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC6120-8.3.1: an error says that it was not done; so a bug behind the change must undo it."""

    def fails(self: xmppd.Feature, owner: xmppd.JID, contact: xmppd.JID) -> None:
        raise ZeroDivisionError

    item = "<item jid='juliet@example.org' subscription='none'/>"
    with monkeypatch.context() as patch:
        patch.setattr(xmppd.Roster, "roster_changed", fails)
        romeo.sends("<iq type='set' id='r1'><query xmlns='jabber:iq:roster'><item jid='juliet@example.org'/></query></iq>")
        romeo.receives("<iq type='error' id='r1'><error type='cancel'><internal-server-error .../></error></iq>")
    assert len(server.bugs.reports) == 1
    server.bugs.reports.clear()
    romeo.sends("<iq type='get' id='r2'><query xmlns='jabber:iq:roster'/></iq>")
    romeo.receives("<iq type='result' id='r2'><query xmlns='jabber:iq:roster' ver='*'/></iq>")
    romeo.sends("<iq type='set' id='r3'><query xmlns='jabber:iq:roster'><item jid='juliet@example.org'/></query></iq>")
    romeo.receives(f"<iq type='set' id='*'><query xmlns='jabber:iq:roster' ver='*'>{item}</query></iq>", "<iq type='result' id='r3'/>")


def test_a_bug_behind_the_answer_is_no_second_answer(
    server: MemoryServer, romeo: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC6120-8.2.3-3: exactly one answer, whatever happens to what follows it."""

    def get(self: xmppd.Feature, request: xmppd.Iq) -> None:
        request.afterwards(lambda: [][0])

    handlers = server.server.registry.iqs
    key = ("get", "{jabber:iq:version}query", "server", "")
    feature = handlers[key].feature
    monkeypatch.setitem(handlers, key, handlers[key]._replace(function=lambda request: get(feature, request)))
    romeo.sends("<iq type='get' id='v' to='example.org'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives("<iq type='result' id='v' from='example.org'/>")
    romeo.receives_nothing()
    assert len(server.bugs.reports) == 1
    server.bugs.reports.clear()


# ---- nothing betrays which accounts exist, or who is there (RFC 6120 §13.10.2, §13.11) ----

IQ_PAYLOADS = {
    "roster": "<query xmlns='jabber:iq:roster'/>",
    "private": "<query xmlns='jabber:iq:private'><x xmlns='urn:x'/></query>",
    "last": "<query xmlns='jabber:iq:last'/>",
    "register": "<query xmlns='jabber:iq:register'/>",
    "remove": "<query xmlns='jabber:iq:register'><remove/></query>",
    "auth": "<query xmlns='jabber:iq:auth'><username>NAME</username></query>",
    "version": "<query xmlns='jabber:iq:version'/>",
    "vcard": "<vCard xmlns='vcard-temp'/>",
    "disco-info": "<query xmlns='http://jabber.org/protocol/disco#info'/>",
    "disco-info-node": "<query xmlns='http://jabber.org/protocol/disco#info' node='n'/>",
    "disco-items": "<query xmlns='http://jabber.org/protocol/disco#items'/>",
    "disco-items-node": "<query xmlns='http://jabber.org/protocol/disco#items' node='n'/>",
    "pubsub": "<pubsub xmlns='http://jabber.org/protocol/pubsub'><items node='n'/></pubsub>",
    "pubsub-owner": "<pubsub xmlns='http://jabber.org/protocol/pubsub#owner'><configure node='n'/></pubsub>",
    "archive": "<query xmlns='urn:xmpp:mam:2'/>",
    "blocklist": "<blocklist xmlns='urn:xmpp:blocking'/>",
    "privacy": "<query xmlns='jabber:iq:privacy'/>",
    "commands": "<command xmlns='http://jabber.org/protocol/commands' node='n'/>",
    "ping": PING,
    "time": "<time xmlns='urn:xmpp:time'/>",
    "session": "<session xmlns='urn:ietf:params:xml:ns:xmpp-session'/>",
    "bind": "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>",
    "unknown": "<x xmlns='urn:unknown'/>",
}
PROBES = {
    **{f"{type}-{name}": f"<iq type='{type}' id='i' to='TO'>{payload}</iq>"
       for name, payload in IQ_PAYLOADS.items() for type in ("get", "set")},
    "iq-without-payload": "<iq type='get' id='i' to='TO'/>",
    "iq-of-unknown-type": f"<iq type='x' id='i' to='TO'>{PING}</iq>",
    "iq-result": "<iq type='result' id='i' to='TO'/>",
    **{f"message-{type}": f"<message type='{type}' id='m' to='TO'><body>O</body></message>"
       for type in ("normal", "chat", "groupchat", "headline", "error", "x")},
    "message-empty": "<message id='m' to='TO'/>",
    "message-composing": "<message id='m' type='chat' to='TO'><composing xmlns='http://jabber.org/protocol/chatstates'/>"
                         "</message>",
    "message-no-store": "<message id='m' type='chat' to='TO'><body>O</body><no-store xmlns='urn:xmpp:hints'/></message>",
    **{f"presence-{type}": f"<presence type='{type}' id='p' to='TO'/>"
       for type in ("unavailable", "probe", "subscribe", "unsubscribe", "subscribed", "unsubscribed", "error", "x")},
    "presence-available": "<presence id='p' to='TO'/>",
}  # fmt: skip
# Where other standards demand an answer of the bare JID, the same for every name, that RFC 6121 §8.5.3.1 has no
# resource give: an empty list (XEP-0030 §8), "you are not the owner" (XEP-0054 §3.2, XEP-0060 §8).
BARE_ONLY = ("disco-items", "disco-items-node", "set-vcard", "pubsub-owner", "archive")
SITUATIONS: dict[str, int | None] = {"away": None, "connected": None, "available": 0}


def answers(romeo: Client, probe: str, name: str, address: str) -> str:
    """Return the very bytes that come back for a probe, but for the name and what is random in any case."""
    romeo.passes_barrier()
    romeo.forgets_unread()
    romeo.transcript.clear()
    romeo.sends_raw(probe.replace("TO", address.replace("NAME", name)).replace("NAME", name))
    romeo.passes_barrier()
    romeo.forgets_unread()
    text = "".join(line.removeprefix("S: ") for line in romeo.transcript if line.startswith("S: "))
    text = re.sub(r"<iq [^>]*id='barrier-[^>]*>", "", text)
    return re.sub("(ver|id)='[^']{10,}'", "", text).replace(name, "NAME")


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("address", ["NAME@example.org", "NAME@example.org/balcony", "NAME@example.org/gone"])
def test_an_account_looks_like_none_to_a_stranger(
    server: MemoryServer, romeo: Client, situation: str, address: str
) -> None:
    """RFC6120-13.10.2-1, RFC6120-8.3.3.7-1, RFC6121-8.5.1-1, RFC6121-8.5.3.1-1, XEP0030-3.1-6, S29, S45: byte for byte."""
    juliet = logged_in(server, "balcony", SITUATIONS[situation]) if situation != "away" else None
    romeo.comes_online()
    romeo.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")  # and hears all of its own roster
    different = {}
    for name, probe in PROBES.items():
        of_juliet, of_nobody = (answers(romeo, probe, who, address) for who in ("juliet", "nobody"))
        if of_juliet != of_nobody:
            different[name] = (of_juliet, of_nobody)
        assert "auth" in name or probe[:3] != "<iq" or "result" in name or of_nobody, "requests are answered"
    assert not different
    if juliet:
        juliet.passes_barrier()
        juliet.forgets_unread()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_resource_looks_like_none_to_a_stranger(server: MemoryServer, romeo: Client, situation: str) -> None:
    """RFC6120-13.10.2-1: one that is there, one that isn't, and for requests the bare JID too."""
    juliet = logged_in(server, "balcony", SITUATIONS[situation]) if situation != "away" else None
    for name, probe in PROBES.items():
        there, gone, bare = (
            answers(romeo, probe, "juliet", f"NAME@example.org{resource}").replace(
                f"NAME@example.org{resource}", "NAME"
            )
            for resource in ("/balcony", "/gone", "")
        )
        assert there == gone, name
        if "<iq" in probe and not name.endswith(BARE_ONLY):
            assert there == bare, name
    if juliet:
        juliet.passes_barrier()
        juliet.forgets_unread()


LOGINS: dict[str, str | bytes] = {
    "iq-auth-get": "<iq type='get' id='a'><query xmlns='jabber:iq:auth'><username>NAME</username></query></iq>",
    "iq-auth-set": "<iq type='set' id='a'><query xmlns='jabber:iq:auth'><username>NAME</username>"
                   "<password>wrong</password><resource>r</resource></query></iq>",
    "iq-auth-digest": "<iq type='set' id='a'><query xmlns='jabber:iq:auth'><username>NAME</username>"
                      "<digest>48fc78be9ec8f86d8ce1c39c320c97c21d62334d</digest><resource>r</resource></query></iq>",
    "register-get": "<iq type='get' id='a'><query xmlns='jabber:iq:register'/></iq>",
    "register-set": "<iq type='set' id='a'><query xmlns='jabber:iq:register'><username>NAME</username>"
                    "<password>wrong</password></query></iq>",
    "remove": "<iq type='set' id='a'><query xmlns='jabber:iq:register'><remove/></query></iq>",
    "plain": b"\0NAME\0wrong",
    "plain-authzid": b"NAME@example.org\0NAME\0wrong",
    "plain-other-authzid": b"romeo@example.org\0NAME\0wrong",
    "scram-sha-1": b"n,,n=NAME,r=abc",
    "scram-sha-256": b"n,,n=NAME,r=abc",
}  # fmt: skip


@pytest.mark.parametrize("login", LOGINS)
def test_who_is_not_logged_in_learns_nothing_either(server: MemoryServer, login: str) -> None:
    """S29: nonces and salts apart, which are of the same length, and the salt each time the same for the same name."""

    def attempt(name: str) -> tuple[str, list[str]]:
        client = server.client().connect()
        client.negotiates()
        client.starts_tls()
        client.negotiates()
        client.transcript.clear()
        said = LOGINS[login]
        if isinstance(said, str):
            client.sends_raw(said.replace("NAME", name))
            client.receives("<iq ...>...</iq>")
        else:
            mechanism = login.upper() if login.startswith("scram") else "PLAIN"
            client.sends_auth(mechanism, said.replace(b"NAME", name.encode()))
        if login.startswith("scram"):
            nonce, salt, iterations, _ = client.receives_challenge().decode().split(",")
            client.disconnects()
            return f"{len(nonce)} {len(salt)} {iterations}", [salt]
        if not isinstance(said, str):
            client.receives_failure("invalid-authzid" if "other" in login else "not-authorized")
        lines = [line for line in client.transcript if line.startswith("S: ")]
        client.disconnects()
        return "".join(lines).replace(name, "NAME"), []

    (of_juliet, _), (of_nobody, salt), (again, same_salt) = (attempt(name) for name in ("juliet", "nobody", "nobody"))
    assert of_juliet == of_nobody == again
    assert salt == same_salt
