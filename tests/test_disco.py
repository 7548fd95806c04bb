"""Service discovery (XEP-0030): what the server and its accounts can do, and who may know."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tests.dialogue import Client
from tests.servers import MemoryServer, ProcessServer

INFO = "http://jabber.org/protocol/disco#info"
ITEMS = "http://jabber.org/protocol/disco#items"
JULIET = "juliet@example.org"
UNAVAILABLE = "<error type='cancel' code='503'><service-unavailable .../></error>"
NOT_FOUND = "<error type='cancel' code='404'><item-not-found .../></error>"


def asks(client: Client, to: str, namespace: str = INFO, node: str | None = None) -> ET.Element:
    """Ask and return the <query/> of the result."""
    of_node = "" if node is None else f" node='{node}'"
    client.sends(f"<iq type='get' id='d1' to='{to}'><query xmlns='{namespace}'{of_node}/></iq>")
    answer = client.receives(f"<iq type='result' id='d1'><query xmlns='{namespace}' ...>...</query></iq>")
    return answer[0]


def features(info: ET.Element) -> list[str]:
    return [feature.get("var") or "" for feature in info.findall(f"{{{INFO}}}feature")]


def identities(info: ET.Element) -> list[tuple[str | None, str | None]]:
    return [(identity.get("category"), identity.get("type")) for identity in info.findall(f"{{{INFO}}}identity")]


# ---- the server --------------------------------------------------------------------------


@pytest.mark.wire
def test_the_server_says_what_it_is_and_does(server: ProcessServer, romeo: Client) -> None:
    """XEP0030-3.1-1, XEP0160-4-1, XEP-0077 §10, XEP-0092 §4, XEP-0199 §5, XEP-0202 §4, XEP-0012 §6"""
    info = asks(romeo, "example.org")
    assert ("server", "im") in identities(info)
    expected = {INFO, ITEMS, "urn:xmpp:ping", "jabber:iq:version", "urn:xmpp:time", "jabber:iq:last", "msgoffline",
                "jabber:iq:register"}  # fmt: skip
    assert expected <= set(features(info))


@pytest.mark.parametrize("to", ["example.org", "example.net", "romeo@example.org"])
def test_an_answer_is_well_made(romeo: Client, to: str) -> None:
    """XEP0030-3.1-2, XEP0030-3.1-3, XEP0030-3.1-4, XEP0030-6.3-1"""
    info = asks(romeo, to)
    listed = features(info)
    assert all(listed) and len(set(listed)) == len(listed)
    assert all(len(feature) == 0 and not feature.text for feature in info.findall(f"{{{INFO}}}feature"))
    kinds = identities(info)
    assert kinds and all(category and type for category, type in kinds)
    assert len(set(kinds)) == len(kinds)
    names = {identity.get("name") for identity in info.findall(f"{{{INFO}}}identity")} - {None}
    assert len(names) <= 1
    again = asks(romeo, to)
    assert (features(again), identities(again)) == (listed, kinds)


def test_every_feature_that_is_told_is_there(romeo: Client) -> None:
    """XEP0030-3.1-1: whatever takes a plain question answers it, instead of service-unavailable."""
    told = features(asks(romeo, "example.org"))
    for namespace, name in {"urn:xmpp:ping": "ping", "jabber:iq:version": "query", "urn:xmpp:time": "time",
                            "jabber:iq:last": "query", "jabber:iq:register": "query"}.items():  # fmt: skip
        assert namespace in told
        romeo.sends(f"<iq type='get' id='f' to='example.org'><{name} xmlns='{namespace}'/></iq>")
        [answer] = romeo.receives_anything()
        assert answer.get("type") == "result", namespace


def test_the_servers_items_are_its_own(romeo: Client) -> None:
    """XEP0030-4.1-1, XEP0030-4.1-3, XEP0030-4.4-1: each with an address in this house, and answering there"""
    items = asks(romeo, "example.org", ITEMS)
    assert not (items.text or "").strip()
    for item in items:
        assert (item.get("jid") or "").endswith("example.org")
        assert item.get("node") != ""
        assert identities(asks(romeo, item.get("jid") or ""))


@pytest.mark.parametrize("namespace", [INFO, ITEMS])
@pytest.mark.parametrize("to", ["example.org", "romeo@example.org"])
def test_unknown_nodes_are_not_found(romeo: Client, to: str, namespace: str) -> None:
    """XEP0030-3.2-2: nor answered as if none had been named"""
    romeo.sends(f"<iq type='get' id='n' to='{to}'><query xmlns='{namespace}' node='no-such-node'/></iq>")
    romeo.receives(f"<iq type='error' id='n'>{NOT_FOUND}</iq>")


@pytest.mark.parametrize("namespace", [INFO, ITEMS])
@pytest.mark.parametrize("to", ["example.org", "romeo@example.org", JULIET, "nobody@example.org"])
def test_discovery_cannot_be_set(romeo: Client, to: str, namespace: str) -> None:
    """XEP0030-7-1"""
    romeo.sends(f"<iq type='set' id='s' to='{to}'><query xmlns='{namespace}'/></iq>")
    romeo.receives(f"<iq type='error' id='s'>{UNAVAILABLE}</iq>")


def test_nobody_answers_for_a_resource_of_the_server(romeo: Client) -> None:
    """RFC6120-10.5.2-1"""
    romeo.sends(f"<iq type='get' id='r' to='example.org/nowhere'><query xmlns='{INFO}'/></iq>")
    romeo.receives(f"<iq type='error' id='r'>{UNAVAILABLE}</iq>")


# ---- accounts (§8) ------------------------------------------------------------------------


def test_ones_own_account_answers(romeo: Client) -> None:
    """XEP0030-3.1-5, XEP0030-4.1-4: with or without its address"""
    info = asks(romeo, "romeo@example.org")
    assert ("account", "registered") in identities(info)
    assert {INFO, ITEMS, "jabber:iq:roster"} <= set(features(info))
    romeo.sends(f"<iq type='get' id='d2'><query xmlns='{INFO}'/></iq>")
    assert identities(romeo.receives(f"<iq type='result' id='d2'><query xmlns='{INFO}'>...</query></iq>")[0]) == (
        identities(info)
    )


def test_ones_own_resources_are_the_items(server: MemoryServer, romeo: Client) -> None:
    """XEP0030-4.1-4, XEP0030-4.1-2: those that are available; without any the list is empty"""
    assert resources(romeo, "romeo@example.org") == set()
    garden = server.client().login("romeo", resource="garden")
    romeo.sends("<presence/>")
    garden.receives_nothing()
    assert resources(garden, "romeo@example.org") == {"romeo@example.org/orchard"}
    romeo.forgets_unread()


def resources(client: Client, to: str) -> set[str | None]:
    """The full JIDs among the items; nodes are another thing."""
    return {item.get("jid") for item in asks(client, to, ITEMS) if item.get("node") is None}


@pytest.mark.parametrize("subscription", ["none", "to", "from", "both"])
def test_only_who_sees_the_presence_learns_of_the_account(romeo: Client, juliet: Client, subscription: str) -> None:
    """XEP0030-8-1, XEP0030-8-2, XEP0030-7-2, XEP0030-3.1-5"""
    if subscription in ("from", "both"):
        romeo.sends(f"<presence type='subscribe' to='{JULIET}'/>")
        romeo.passes_barrier()
        juliet.sends("<presence type='subscribed' to='romeo@example.org'/>")
    if subscription in ("to", "both"):
        juliet.sends("<presence type='subscribe' to='romeo@example.org'/>")
        juliet.passes_barrier()
        romeo.sends(f"<presence type='subscribed' to='{JULIET}'/>")
    juliet.sends("<presence/>")
    juliet.passes_barrier()
    for client in (romeo, juliet):
        client.receives_anything()
    romeo.sends(f"<iq type='get' id='i' to='{JULIET}'><query xmlns='{INFO}'/></iq>")
    if subscription in ("from", "both"):
        [answer] = romeo.receives_anything()
        assert ("account", "registered") in identities(answer[0])
        assert resources(romeo, JULIET) == {f"{JULIET}/balcony"}
    else:
        romeo.receives(f"<iq type='error' id='i' from='{JULIET}'>{UNAVAILABLE}</iq>")
        assert len(asks(romeo, JULIET, ITEMS)) == 0


@pytest.mark.parametrize("node", [None, "n", "http://jabber.org/protocol/commands"])
@pytest.mark.parametrize("who", ["juliet", "nobody"])
def test_a_stranger_gets_the_same_whether_there_is_an_account_or_not(
    romeo: Client, juliet: Client, who: str, node: str | None
) -> None:
    """XEP0030-8-1, XEP0030-8-2, XEP0030-3.1-6, XEP0030-3.2-1: with a node too, which comes back"""
    juliet.sends("<presence/>")
    juliet.receives("<presence ...>...</presence>")
    of_node = "" if node is None else f" node='{node}'"
    romeo.sends(f"<iq type='get' id='i' to='{who}@example.org'><query xmlns='{INFO}'{of_node}/></iq>")
    romeo.receives(f"<iq type='error' id='i'>{UNAVAILABLE}</iq>")
    items = asks(romeo, f"{who}@example.org", ITEMS, node)
    assert items.get("node") == node
    assert len(items) == 0


def test_a_resource_answers_for_itself(romeo: Client, juliet: Client) -> None:
    """XEP0030-8-3: the server only passes the question on, to those who may ask"""
    question = f"<iq type='get' id='q' to='{JULIET}/balcony'><query xmlns='{INFO}'/></iq>"
    romeo.sends(question)
    romeo.receives(f"<iq type='error' id='q' from='{JULIET}/balcony'>{UNAVAILABLE}</iq>")
    juliet.receives_nothing()
    juliet.sends("<presence to='romeo@example.org/orchard'/>")
    romeo.receives("<presence ...>...</presence>")
    romeo.sends(question)
    juliet.receives(f"<iq type='get' id='q' from='romeo@example.org/orchard'><query xmlns='{INFO}'/></iq>")


def test_long_lists_do_not_come_from_accounts(server: MemoryServer, romeo: Client) -> None:
    """XEP0030-6.2-1: an account lists its resources, whose number is limited."""
    assert server.server.config.limits.resources <= 100
    assert len(asks(romeo, "example.org", ITEMS)) <= 100
