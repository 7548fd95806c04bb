"""What today's clients send, in the order and the form in which they send it: end-to-end keys, bookmarks, what they look for.

The stanzas are those of Conversations 2.12 (and its forks), Dino 0.4, Kaidan, Monal and Gajim,
with their payloads shortened. What they have in common, and what servers stumble over: they
ask for a node before it exists, publish with conditions, and when those are not met they
fetch the node's form, change two fields in it and send *all* of it back.
"""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET

import pytest

from tests.dialogue import DISCO_INFO, Client, local_name
from tests.eventing import (
    BOOKMARKS,
    FROM_BALCONY,
    JULIET,
    PUBSUB,
    ask_items,
    comes_online,
    error,
    event,
    item,
    items_of,
)
from tests.servers import MemoryServer
from tests.test_pep import friends, wants

OLD = "eu.siacs.conversations.axolotl"  # OMEMO as Conversations, Dino, Gajim, Monal and Profanity speak it
NEW = "urn:xmpp:omemo:2"  # as Kaidan does
DEVICES, BUNDLES = f"{OLD}.devicelist", f"{OLD}.bundles"
KEY = base64.b64encode(bytes(range(33))).decode()
RESULT = "<iq type='result' id='*'/>"


def options(**values: str) -> str:
    """Write publish-options as the libraries do, with `type` on the hidden field only."""
    fields = "".join(f"<field var='pubsub#{name}'><value>{value}</value></field>" for name, value in values.items())
    kind = f"<field type='hidden' var='FORM_TYPE'><value>{PUBSUB}#publish-options</value></field>"
    return f"<publish-options><x xmlns='jabber:x:data' type='submit'>{kind}{fields}</x></publish-options>"


def publication(node: str, id: str, payload: str, conditions: str, to: str = "") -> str:
    """Write a request to publish one item."""
    address = f" to='{to}'" if to else ""
    return (
        f"<iq{address} id='pub' type='set'><pubsub xmlns='{PUBSUB}'><publish node='{node}'><item id='{id}'>{payload}</item>"
        f"</publish>{conditions}</pubsub></iq>"
    )


def publishes(client: Client, node: str, id: str, payload: str, conditions: str, to: str = "") -> None:
    """Publish, and hear that it is done."""
    client.sends(publication(node, id, payload, conditions, to))
    client.receives("<iq type='result' id='pub' ...>...</iq>")


def reconfigures(client: Client, node: str, **changes: str) -> None:
    """Fetch a node's form, and send all of it back with some fields changed, options and labels and all."""
    owner = f"{PUBSUB}#owner"
    client.sends(f"<iq to='{client.bare}' id='get' type='get'><pubsub xmlns='{owner}'><configure node='{node}'/></pubsub></iq>")
    [answer] = client.receives("<iq type='result' id='get' ...>...</iq>").iter("{jabber:x:data}x")
    answer.set("type", "submit")
    for field in answer:
        name = field.get("var", "").removeprefix("pubsub#")
        if name in changes:
            for value in field.findall("{jabber:x:data}value"):
                field.remove(value)
            ET.SubElement(field, "{jabber:x:data}value").text = changes[name]
    ET.register_namespace("", "jabber:x:data")
    form = ET.tostring(answer, encoding="unicode")
    client.sends(
        f"<iq to='{client.bare}' id='set' type='set'><pubsub xmlns='{owner}'><configure node='{node}'>{form}</configure></pubsub></iq>"
    )
    client.receives("<iq type='result' id='set' ...>...</iq>")


def devices(*ids: str) -> str:
    """Write the list of somebody's devices."""
    inside = "".join(f"<device id='{id}'/>" for id in ids)
    return f"<list xmlns='{OLD}'>{inside}</list>"


def bundle(id: str) -> str:
    """Write the public keys of one device."""
    return (
        f"<bundle xmlns='{OLD}'><signedPreKeyPublic signedPreKeyId='1'>{KEY}</signedPreKeyPublic><signedPreKeySignature>{KEY}"
        f"</signedPreKeySignature><identityKey>{KEY}</identityKey><prekeys><preKeyPublic preKeyId='{id}'>{KEY}</preKeyPublic></prekeys></bundle>"
    )


def fetches(client: Client, node: str, *items: str, inside: str = "", to: str = JULIET) -> None:
    """Ask for what is at a node, by its items' names or without, and get it."""
    client.sends(ask_items(node, inside, to=to))
    client.receives(items_of(node, *items))


# ---- OMEMO (XEP-0384 §5, and the version before it) -------------------------------------


def test_conversations_publishes_its_keys_and_everybody_can_fetch_them(
    server: MemoryServer, juliet: Client, romeo: Client, nurse: Client
) -> None:
    """XEP-0384 §5.3: the list first, then the keys of the device; contacts are told, strangers ask"""
    friends(juliet, romeo)
    wants(romeo, DEVICES)
    chamber = server.client().login("juliet", resource="chamber")
    comes_online(chamber, DEVICES)
    for client in (juliet, romeo, chamber):
        client.receives_anything()
    juliet.sends(ask_items(DEVICES))
    juliet.receives(error("item-not-found"))
    publishes(juliet, DEVICES, "current", devices("31415"), options(persist_items="true", access_model="open"), to=JULIET)
    for client in (romeo, chamber):
        client.receives(event(DEVICES, item("current", devices("31415")), by=FROM_BALCONY))
    open_to_all = options(persist_items="true", access_model="open")
    publishes(juliet, f"{BUNDLES}:31415", "current", bundle("31415"), open_to_all, to=JULIET)
    romeo.receives_nothing()  # nobody is told of bundles: they are long, and fetched when needed
    fetches(chamber, DEVICES, item("current", devices("31415")))
    for client in (chamber, romeo, nurse):
        fetches(client, f"{BUNDLES}:31415", item("current", bundle("31415")))
    publishes(chamber, DEVICES, "current", devices("31415", "27182"), open_to_all, to=JULIET)
    romeo.receives(event(DEVICES, item("current", devices("31415", "27182")), by=f"{JULIET}/chamber"))
    chamber.receives(event(DEVICES, item("current", devices("31415", "27182")), by=f"{JULIET}/chamber"))
    fetches(nurse, DEVICES, item("current", devices("31415", "27182")))
    for client, condition in ((romeo, "item-not-found"), (nurse, "service-unavailable")):  # to strangers as if nobody were there
        client.sends(ask_items(f"{BUNDLES}:27182"))
        client.receives(error(condition))


@pytest.mark.parametrize("conditions", [{"persist_items": "true", "access_model": "open"}, {"access_model": "open"}])
def test_a_node_that_is_not_open_yet_is_opened_by_its_form(
    juliet: Client, romeo: Client, nurse: Client, conditions: dict[str, str]
) -> None:
    """XEP0060-7.1.5-1: conditions not met, form fetched, sent back whole, published again (Conversations, Dino)"""
    friends(juliet, romeo)
    publishes(juliet, DEVICES, "current", devices("1"), "")  # an old client has made the node: for contacts
    nurse.sends(ask_items(DEVICES))
    nurse.receives(error("not-authorized", "presence-subscription-required"))
    juliet.sends(publication(DEVICES, "current", devices("1", "31415"), options(**conditions)))
    juliet.receives(error("conflict", "precondition-not-met", id="pub"))
    fetches(juliet, DEVICES, item("current", devices("1")))
    reconfigures(juliet, DEVICES, **conditions)
    publishes(juliet, DEVICES, "current", devices("1", "31415"), options(**conditions))
    fetches(nurse, DEVICES, item("current", devices("1", "31415")))


def test_dino_asks_with_and_without_a_number_and_names_its_bundles_one(juliet: Client, nurse: Client) -> None:
    """Its bundles have the item id "1"; what it fetches is the newest item, whatever its name."""
    publishes(juliet, f"{BUNDLES}:271", "1", bundle("271"), options(access_model="open"))
    publishes(juliet, f"{BUNDLES}:271", "1", bundle("272"), options(access_model="open"))
    fetches(nurse, f"{BUNDLES}:271", item("1", bundle("272")))
    nurse.sends(ask_items(f"{BUNDLES}:271", most="1"))
    nurse.receives(items_of(f"{BUNDLES}:271", item("1", bundle("272"))))


def test_one_item_is_kept_when_a_client_names_them_differently(juliet: Client, nurse: Client) -> None:
    """A list under another name replaces the old one: two would contradict each other."""
    for id in ("current", "A1B2"):
        publishes(juliet, DEVICES, id, devices(str(len(id))), options(access_model="open"))
    fetches(nurse, DEVICES, item("A1B2", devices("4")))


def test_kaidan_keeps_all_bundles_at_one_node(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP-0384 §5.3.2: `urn:xmpp:omemo:2`, an item per device, `max_items` as many as possible"""
    friends(juliet, romeo)
    wants(romeo, f"{NEW}:devices")
    listed = f"<devices xmlns='{NEW}'><device id='12345'/><device id='4223' label='Gajim on Ubuntu Linux'/></devices>"
    publishes(juliet, f"{NEW}:devices", "current", listed, options(access_model="open"))
    romeo.receives(event(f"{NEW}:devices", item("current", listed), by=FROM_BALCONY))
    keys = {id: f"<bundle xmlns='{NEW}'><spk id='1'>{KEY}</spk><spks>{KEY}</spks><ik>{KEY}</ik><prekeys><pk id='{id}'>{KEY}</pk></prekeys></bundle>"
            for id in ("12345", "4223")}  # fmt: skip
    for id, text in keys.items():
        publishes(juliet, f"{NEW}:bundles", id, text, options(max_items="max", access_model="open"))
    fetches(nurse, f"{NEW}:bundles", item("4223", keys["4223"]), inside="<item id='4223'/>")
    fetches(nurse, f"{NEW}:bundles", item("12345", keys["12345"]), inside="<item id='12345'/>")
    juliet.sends(f"<iq type='set' id='r'><pubsub xmlns='{PUBSUB}'><retract node='{NEW}:bundles'><item id='12345'/></retract></pubsub></iq>")
    juliet.receives("<iq type='result' id='r'/>")
    fetches(nurse, f"{NEW}:bundles", item("4223", keys["4223"]))


def test_a_contact_who_comes_back_gets_the_list_that_has_changed(juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.4-1: else messages would be encrypted for devices that are gone"""
    friends(juliet, romeo)
    wants(romeo, DEVICES)
    romeo.sends("<presence type='unavailable'/>")
    juliet.receives_anything()
    publishes(juliet, DEVICES, "current", devices("2"), options(access_model="open"))
    juliet.receives_anything()
    comes_online(romeo, DEVICES)
    romeo.receives(event(DEVICES, item("current", devices("2")), by=FROM_BALCONY, delayed=True))
    juliet.receives_anything()


# ---- bookmarks (XEP-0402) ---------------------------------------------------------------

THEPLAY = "theplay@conference.shakespeare.lit"
CONFERENCE = f"<conference xmlns='{BOOKMARKS}' name='The Play' autojoin='true'><nick>JC</nick></conference>"
BOOKMARK_OPTIONS = {  # what each asks for
    "Conversations": {"persist_items": "true", "access_model": "whitelist", "send_last_published_item": "never", "max_items": "max",
                      "notify_delete": "true", "notify_retract": "true"},
    "Dino": {"persist_items": "true", "max_items": "max", "send_last_published_item": "never", "access_model": "whitelist"},
    "Monal": {"persist_items": "true", "max_items": "max", "send_last_published_item": "never", "access_model": "whitelist"},
    "Gajim": {"persist_items": "true", "max_items": "max", "notify_delete": "true", "notify_retract": "true",
              "send_last_published_item": "never", "access_model": "whitelist"},
    "who forgets": {},
}  # fmt: skip


@pytest.mark.parametrize("who", BOOKMARK_OPTIONS)
def test_bookmarks_are_kept_told_to_ones_own_and_hidden_from_others(
    server: MemoryServer, juliet: Client, romeo: Client, who: str
) -> None:
    """XEP-0402 §3, XEP-0223 §2, S57: whatever the client says, a node for each of them works, and the next client's too"""
    friends(juliet, romeo)
    wants(romeo, BOOKMARKS)
    chamber = server.client().login("juliet", resource="chamber")
    comes_online(chamber, BOOKMARKS)
    for client in (juliet, romeo, chamber):
        client.receives_anything()
    fetches_nothing(juliet, BOOKMARKS)
    conditions = options(**BOOKMARK_OPTIONS[who]) if BOOKMARK_OPTIONS[who] else ""
    publishes(juliet, BOOKMARKS, THEPLAY, CONFERENCE, conditions)
    chamber.receives(event(BOOKMARKS, item(THEPLAY, CONFERENCE), by=FROM_BALCONY))
    for other in BOOKMARK_OPTIONS.values():
        publishes(chamber, BOOKMARKS, f"other@{THEPLAY.partition('@')[2]}", CONFERENCE, options(**other) if other else "")
        chamber.receives_anything()
    romeo.receives_nothing()
    romeo.sends(ask_items(BOOKMARKS))
    romeo.receives(error("not-allowed", "closed-node"))
    juliet.sends(
        f"<iq type='set' id='r'><pubsub xmlns='{PUBSUB}'><retract node='{BOOKMARKS}' notify='true'><item id='{THEPLAY}'/></retract></pubsub></iq>"
    )
    juliet.receives_in_any_order("<iq type='result' id='r'/>")
    gone = f"<event xmlns='{PUBSUB}#event'><items node='{BOOKMARKS}'><retract id='{THEPLAY}'/></items></event>"
    chamber.receives(f"<message from='{JULIET}' type='headline' id='*'>{gone}</message>")
    juliet.receives_anything()


def fetches_nothing(client: Client, node: str) -> None:
    """Ask for what is at one's own node before it exists; clients take the error for "empty"."""
    client.sends(ask_items(node, to=""))
    client.receives(error("item-not-found"))


@pytest.mark.parametrize("node", ["storage:rosternotes", "storage:metacontacts", "urn:xmpp:openpgp:0:secret-key"])
def test_what_was_private_xml_once_is_private_in_pep(juliet: Client, romeo: Client, node: str) -> None:
    """S57, XEP-0223 §2: notes about one's contacts are nothing for these contacts"""
    friends(juliet, romeo)
    publishes(juliet, node, "current", f"<storage xmlns='{node}'/>", "")
    romeo.sends(ask_items(node))
    romeo.receives(error("not-allowed", "closed-node"))


# ---- what they look for -------------------------------------------------------------------

LOOKED_FOR = {  # of one's own account; by the sources of the clients
    "Conversations": {f"{PUBSUB}#publish-options", f"{PUBSUB}#persistent-items", "urn:xmpp:pep-vcard-conversion:0",
                      "urn:xmpp:bookmarks-conversion:0", f"{BOOKMARKS}#compat"},
    "Monal": {f"{PUBSUB}#{name}" for name in ("filtered-notifications", "publish-options", "publish", "subscribe", "create-nodes",
                                              "delete-items", "delete-nodes", "persistent-items", "retrieve-items", "auto-create",
                                              "item-ids", "multi-items", "config-node-max")} | {f"{BOOKMARKS}#compat-pep"},
    "Gajim": {"urn:xmpp:bookmarks-conversion:0", "urn:xmpp:pep-vcard-conversion:0", f"{BOOKMARKS}#compat", f"{BOOKMARKS}#compat-pep"},
    "Converse.js": {f"{PUBSUB}#publish-options"},
    "the compliance tester": {f"{PUBSUB}#publish", f"{PUBSUB}#publish-options", "urn:xmpp:bookmarks-conversion:0"},
}  # fmt: skip


@pytest.mark.parametrize("who", LOOKED_FOR)
def test_what_clients_look_for_is_there(juliet: Client, who: str) -> None:
    """XEP0163-6.1-1: at one's own bare address, which is where they all look"""
    juliet.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_INFO}'/></iq>")
    info = juliet.receives("<iq type='result' id='d' ...>...</iq>")[0]
    assert {(one.get("category"), one.get("type")) for one in info if local_name(one.tag) == "identity"} >= {("pubsub", "pep")}
    assert {one.get("var") for one in info} >= LOOKED_FOR[who]
