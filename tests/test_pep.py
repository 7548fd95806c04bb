"""Personal eventing (XEP-0163) on publish-subscribe (XEP-0060): each account is a service of its own."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

import xmppd
from tests.dialogue import DISCO_INFO, Client, local_name
from tests.elsewhere import Elsewhere
from tests.eventing import (
    FROM_BALCONY,
    HAPPY,
    JULIET,
    MOOD,
    NURSE,
    OWNER,
    PUBSUB,
    ROMEO,
    SAD,
    TUNE,
    ask_items,
    comes_online,
    configure,
    done,
    error,
    event,
    form,
    item,
    items_of,
    plain_event,
    publish,
    published,
    request,
    retract,
    subscribe,
    subscribed,
)
from tests.servers import MemoryServer, ProcessServer

DISCO_ITEMS = "http://jabber.org/protocol/disco#items"
GONE = "<iq type='error' id='p'><error type='cancel'><service-unavailable .../></error></iq>"
DEFAULTS = {
    "access_model": "presence",
    "deliver_notifications": "1",
    "deliver_payloads": "1",
    "send_last_published_item": "on_sub_and_presence",
    "max_items": "1",
    "persist_items": "1",
}


def succeeds(client: Client, text: str) -> None:
    """Send a request whose result says nothing."""
    client.sends(text)
    client.receives(done())


def publishes(client: Client, node: str, *items: str, **options: str) -> None:
    """Publish, when nobody is there to be told but perhaps others."""
    client.sends(publish(node, *items, **options))
    client.receives("<iq type='result' id='p' ...>...</iq>")


def friends(juliet: Client, *others: Client) -> None:
    """Make all friends of juliet's, everybody online and without wishes."""
    for client in (juliet, *others):
        client.comes_online()
    for other in others:
        juliet.befriends(other)
    for client in (juliet, *others):
        client.receives_anything()


def wants(client: Client, *nodes: str) -> None:
    """Let a client come online anew, with wishes; what that brings to it and to others is forgotten."""
    client.sends("<presence type='unavailable'/>")
    comes_online(client, *nodes)
    for other in client.cast.clients:
        other.receives_anything()


def grouped(juliet: Client, contact: str, *groups: str) -> None:
    """Put a contact into groups of juliet's."""
    inside = "".join(f"<group>{group}</group>" for group in groups)
    juliet.sends(
        f"<iq type='set' id='g'><query xmlns='jabber:iq:roster'><item jid='{contact}'>{inside}</item></query></iq>"
    )
    juliet.passes_barrier()


def form_of(answer: ET.Element) -> dict[str, list[str]]:
    """Return the values of the form that is somewhere in an answer."""
    fields = answer.iter("{jabber:x:data}field")
    return {
        field.get("var", ""): [value.text or "" for value in field.findall("{jabber:x:data}value")] for field in fields
    }


# ---- publishing (XEP-0163 §3, XEP-0060 §7.1) --------------------------------------------


@pytest.mark.parametrize("to", ["", JULIET])
def test_publishing_creates_the_node(juliet: Client, to: str) -> None:
    """XEP0163-2.1-1, XEP0163-3-1, XEP0060-7.1.4-1, XEP0060-7.1.1-1, XEP0060-7.1.2-1"""
    juliet.sends(publish(MOOD, item("m"), to=to))
    juliet.receives(published(MOOD, "m"))
    juliet.sends(ask_items(MOOD, to=to))
    juliet.receives(items_of(MOOD, item("m")))


def test_a_created_node_has_the_recommended_configuration(juliet: Client) -> None:
    """XEP0163-3-1, XEP0163-5-4, XEP0163-5-6, XEP0060-8.2-1, XEP0060-16.4.4-1, XEP0163-4.3.4-1"""
    publishes(juliet, MOOD, item("m"))
    juliet.sends(request(f"<configure node='{MOOD}'/>", type="get", namespace=OWNER))
    answer = juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{OWNER}'>...</pubsub></iq>")
    values = form_of(answer)
    assert values["FORM_TYPE"] == [f"{PUBSUB}#node_config"]
    assert {name: values[f"pubsub#{name}"] for name in DEFAULTS} == {name: [v] for name, v in DEFAULTS.items()}


def test_an_item_without_an_id_gets_one(juliet: Client) -> None:
    """XEP0060-7.1.1-1, XEP0060-7.1.2-1"""
    ids = set()
    for _time in range(2):
        juliet.sends(publish(MOOD, f"<item>{HAPPY}</item>"))
        answer = juliet.receives(published(MOOD, "*"))
        ids.add(answer[0][0][0].get("id"))
    assert len(ids) == 2


def test_only_the_service_says_who_has_published(juliet: Client) -> None:
    """XEP0060-7.1.2.3-1"""
    publishes(juliet, MOOD, f"<item id='m' publisher='duke@example.org'>{HAPPY}</item>")
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("m")))


def test_an_item_of_the_same_id_is_overwritten_and_told_again(juliet: Client) -> None:
    """XEP0060-7.1.2-1, XEP0060-12.9-1"""
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("m"), max_items="10")
    juliet.receives(event(MOOD, item("m"), by=FROM_BALCONY))
    publishes(juliet, MOOD, item("m", SAD))
    juliet.receives(event(MOOD, item("m", SAD), by=FROM_BALCONY))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("m", SAD)))


def test_the_same_item_id_at_two_nodes_is_two_items(juliet: Client) -> None:
    """XEP0060-12.9-1, XEP0060-4.6-1"""
    publishes(juliet, MOOD, item("x"))
    publishes(juliet, TUNE, item("x", "<tune xmlns='http://jabber.org/protocol/tune'/>"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("x")))


def test_a_full_node_loses_its_oldest_item(juliet: Client) -> None:
    """XEP0060-7.1.2.5-1"""
    comes_online(juliet, MOOD)
    for id in ("a", "b"):
        publishes(juliet, MOOD, item(id), max_items="2")
        juliet.receives(event(MOOD, item(id), by=FROM_BALCONY))
    publishes(juliet, MOOD, item("a"))  # is the newest now
    juliet.receives(event(MOOD, item("a"), by=FROM_BALCONY))
    publishes(juliet, MOOD, item("c"))
    juliet.receives(event(MOOD, "<retract id='b'/>"), event(MOOD, item("c"), by=FROM_BALCONY))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("a"), item("c")))


def test_a_node_with_one_place_is_silent_about_what_was_there(juliet: Client) -> None:
    comes_online(juliet, MOOD)
    for id in ("a", "b"):
        publishes(juliet, MOOD, item(id))
        juliet.receives(event(MOOD, item(id), by=FROM_BALCONY))


def test_a_full_node_may_refuse(juliet: Client) -> None:
    """XEP0060-7.1.2.5-1: as it is configured; what is there may still change."""
    publishes(juliet, MOOD, item("a"), publish_node_full="reject", max_items="1")
    juliet.sends(publish(MOOD, item("b")))
    juliet.receives(error("conflict", "node-full"))
    publishes(juliet, MOOD, item("a", SAD))


def test_items_come_all_together_or_not_at_all(juliet: Client) -> None:
    """XEP0060-12.11-1"""
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("a"), item("b"), max_items="3")
    juliet.receives(event(MOOD, item("a"), item("b"), by=FROM_BALCONY))
    juliet.sends(publish(MOOD, *map(item, "cdef")))
    juliet.receives(error("not-allowed", "max-items-exceeded"))
    juliet.sends(publish(MOOD, item("c"), item("d", "")))
    juliet.receives(error("bad-request", "payload-required"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("a"), item("b")))


BAD_PUBLICATIONS = [
    (publish(MOOD), "bad-request", "item-required"),
    (publish(MOOD, item("m", "")), "bad-request", "payload-required"),
    (publish(MOOD, item("m", HAPPY + SAD)), "bad-request", "invalid-payload"),
    (publish(MOOD, item("m", f"<x xmlns='urn:x'>{'x' * 210_000}</x>")), "not-acceptable", "payload-too-big"),
    (publish(MOOD, item("m" * 600)), "not-acceptable", ""),
    (publish("n" * 600, item("m")), "not-acceptable", ""),
    (publish("a\nb", item("m")), "not-acceptable", ""),
    (request(f"<publish>{item('m')}</publish>"), "bad-request", "nodeid-required"),
    (request(f"<publish node=''>{item('m')}</publish>"), "bad-request", "nodeid-required"),
    (request(f"<retract>{item('m', '')}</retract>"), "bad-request", "nodeid-required"),
    (ask_items("", to=""), "bad-request", "nodeid-required"),
    (request("<subscribe jid='juliet@example.org'/>"), "bad-request", "nodeid-required"),
    (request("<configure/>", type="get", namespace=OWNER), "bad-request", "nodeid-required"),
    (request("<delete/>", namespace=OWNER), "bad-request", "nodeid-required"),
]


@pytest.mark.parametrize(("text", "condition", "detail"), BAD_PUBLICATIONS)
def test_what_makes_no_sense_is_refused_at_once(juliet: Client, text: str, condition: str, detail: str) -> None:
    """S13, XEP0060-7.1.3.5-1, XEP0060-7.1.3.6-1, XEP0060-7.1.3.7-1, XEP0060-7.2.3-1, XEP0060-8.2.3-1"""
    juliet.sends_raw(text)
    juliet.receives(error(condition, detail))
    juliet.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_ITEMS}'/></iq>")
    juliet.receives(f"<iq type='result' id='d' from='{JULIET}'><query xmlns='{DISCO_ITEMS}'/></iq>")


def test_the_node_is_not_left_behind_by_a_failed_publication(juliet: Client) -> None:
    juliet.sends(publish(MOOD, item("a"), item("b")))
    juliet.receives(error("not-allowed", "max-items-exceeded"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(error("item-not-found"))


# ---- transient nodes and pure notifications (§4.3) ---------------------------------------


def test_a_node_that_keeps_nothing_still_tells(juliet: Client) -> None:
    """XEP0060-4.3-1, XEP0060-12.10-1: and the latest item is remembered for who comes later."""
    succeeds(juliet, request(f"<create node='{MOOD}'/><configure>{form({'persist_items': '0'}, 'node_config')}</configure>"))
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("m"))
    juliet.receives(event(MOOD, item("m"), by=FROM_BALCONY))
    wants(juliet)
    comes_online(juliet, MOOD)
    juliet.receives(event(MOOD, item("m"), by=FROM_BALCONY, delayed=True))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("m")))
    juliet.sends(retract(MOOD, "m"))
    juliet.receives(error("feature-not-implemented", "unsupported", feature="persistent-items"))
    juliet.sends(request(f"<purge node='{MOOD}'/>", namespace=OWNER))
    juliet.receives(error("feature-not-implemented", "unsupported", feature="persistent-items"))


def test_a_notification_may_be_all_there_is(juliet: Client) -> None:
    """XEP0060-4.3-1, XEP0060-7.1.3.7-1"""
    config = form({"persist_items": "0", "deliver_payloads": "0"}, "node_config")
    succeeds(juliet, request(f"<create node='{MOOD}'/><configure>{config}</configure>"))
    comes_online(juliet, MOOD)
    juliet.sends(publish(MOOD, item("m")))
    juliet.receives(error("bad-request", "item-forbidden"))
    juliet.sends(publish(MOOD))
    juliet.receives(published(MOOD), event(MOOD))


def test_payloads_may_stay_at_home(juliet: Client) -> None:
    """XEP0060-7.1.2-2, XEP0060-4.3-1"""
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("m"), deliver_payloads="0")
    juliet.receives(event(MOOD, item("m", ""), by=FROM_BALCONY))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("m")))


def test_notifications_can_be_switched_off(juliet: Client) -> None:
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("m"), deliver_notifications="0")
    succeeds(juliet, retract(MOOD, "m", notify="1"))
    juliet.receives_nothing()


def test_notifications_may_be_normal_messages(juliet: Client) -> None:
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("m"), notification_type="normal")
    juliet.receives(f"<message from='{JULIET}' id='*'><event ...>...</event><addresses ...>...</addresses></message>")


# ---- publish-options (§7.1.5) --------------------------------------------------------------


def test_options_configure_a_new_node_and_are_conditions_of_an_old_one(juliet: Client) -> None:
    """XEP0163-3-2, XEP0060-7.1.5-1: Conversations' and Dino's sequence for keys that strangers may read."""
    keys = "eu.siacs.conversations.axolotl.devicelist"
    devices = "<list xmlns='eu.siacs.conversations.axolotl'><device id='1'/></list>"
    publishes(juliet, keys, item("current", devices))
    juliet.sends(publish(keys, item("current", devices.replace("1", "2")), access_model="open", persist_items="true"))
    juliet.receives(error("conflict", "precondition-not-met"))
    juliet.sends(ask_items(keys))
    juliet.receives(items_of(keys, item("current", devices)))  # nothing was published

    juliet.sends(request(f"<configure node='{keys}'/>", type="get", namespace=OWNER))
    old = juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{OWNER}'>...</pubsub></iq>")
    fields = {name.removeprefix("pubsub#"): ",".join(values) for name, values in form_of(old).items()}
    del fields["FORM_TYPE"]
    succeeds(juliet, configure(keys, **{**fields, "access_model": "open"}))  # they send the whole form back
    publishes(juliet, keys, item("current", devices.replace("1", "2")), access_model="open", persist_items="true")


def test_a_new_node_gets_all_of_the_options(juliet: Client) -> None:
    """XEP0060-7.1.5-1"""
    options = {"access_model": "whitelist", "max_items": "max", "send_last_published_item": "never"}
    publishes(juliet, "urn:x", item("m"), **options)
    publishes(juliet, "urn:x", item("m"), **options)
    juliet.sends(publish("urn:x", item("m"), max_items="1"))
    juliet.receives(error("conflict", "precondition-not-met"))


def test_unknown_options_are_refused(juliet: Client) -> None:
    """XEP0060-7.1.5-1: also for a node that is not there yet, which is then not created."""
    juliet.sends(publish(MOOD, item("m"), color="red"))
    juliet.receives(error("conflict", "precondition-not-met"))
    juliet.sends(publish(MOOD, item("m"), access_model="secret"))
    juliet.receives(error("not-acceptable"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(error("item-not-found"))


def test_options_of_another_kind_are_refused(juliet: Client) -> None:
    """XEP0060-7.1.5-1: the FORM_TYPE must be right."""
    wrong = f"<publish-options>{form({'access_model': 'open'}, 'node_config')}</publish-options>"
    juliet.sends(request(f"<publish node='{MOOD}'>{item('m')}</publish>{wrong}"))
    juliet.receives(error("bad-request"))


# ---- reading (§6.5) ------------------------------------------------------------------------


@pytest.fixture
def shelf(juliet: Client) -> Client:
    """Juliet, with a public node of five items, a to e."""
    publishes(juliet, "shelf", *map(item, "abcde"), access_model="open", max_items="max")
    return juliet


def test_items_are_found_by_number_and_by_id(shelf: Client, romeo: Client) -> None:
    """XEP0060-6.5.3-1, XEP0060-6.5.7-1, XEP0060-6.5.6-1, XEP0060-6.5.9.12-1: also by strangers"""
    for text, found in (
        (ask_items("shelf"), "abcde"),
        (ask_items("shelf", most="2"), "de"),
        (ask_items("shelf", most="9"), "abcde"),
        (ask_items("shelf", "<item id='d'/><item id='b'/>"), "db"),
        (ask_items("shelf", "<item id='d'/><item id='z'/><item id='d'/>"), "d"),
        (ask_items("shelf", "<item id='z'/>"), ""),
    ):
        romeo.sends(text)
        romeo.receives(items_of("shelf", *map(item, found)))
    romeo.sends(ask_items("shelf", most="many"))
    romeo.receives(error("bad-request"))


def paged(content: str) -> str:
    return f"<set xmlns='http://jabber.org/protocol/rsm'>{content}</set>"


def page(first: str, index: int, last: str) -> str:
    return paged(f"<first index='{index}'>{first}</first><last>{last}</last><count>5</count>")


def test_items_come_in_pages(shelf: Client, romeo: Client) -> None:
    """XEP0060-6.5.4-1"""
    for asked, found, index in (
        ("<max>2</max>", "ab", 0),
        ("<max>2</max><after>b</after>", "cd", 2),
        ("<max>2</max><before/>", "de", 3),
        ("<max>2</max><before>d</before>", "bc", 1),
        ("<max>9</max>", "abcde", 0),
    ):
        romeo.sends(ask_items("shelf", beside=paged(asked)))
        romeo.receives(items_of("shelf", *map(item, found), beside=page(found[0], index, found[-1])))
    romeo.sends(ask_items("shelf", beside=paged("<max>0</max>")))
    romeo.receives(items_of("shelf", beside=paged("<count>5</count>")))
    romeo.sends(ask_items("shelf", beside=paged("<max>2</max><after>z</after>")))
    romeo.receives(error("item-not-found"))


@pytest.mark.config(limits={"pep_bytes": 10_000_000})
def test_more_than_an_answer_holds_is_cut_and_said_to_be(juliet: Client, romeo: Client) -> None:
    """XEP0060-6.5.4-1, S55: an answer has a bound, whatever is asked for."""
    big = f"<x xmlns='urn:x'>{'x' * 190_000}</x>"
    for id in "abcdefg":
        juliet.sends_raw(publish("shelf", item(id, big), access_model="open", max_items="max"))
        juliet.receives(published("shelf", id))
    romeo.sends(ask_items("shelf"))
    answer = romeo.receives("<iq type='result' id='p' ...>...</iq>")
    assert [one.get("id") for one in answer[0][0]] == ["c", "d", "e", "f", "g"]
    assert answer[0][1].findtext("{http://jabber.org/protocol/rsm}count") == "7"
    assert answer[0][1].find("{http://jabber.org/protocol/rsm}first").get("index") == "2"  # type: ignore[union-attr]
    romeo.sends(ask_items("shelf", beside=paged("<max>100</max>")))
    answer = romeo.receives("<iq type='result' id='p' ...>...</iq>")
    assert [one.get("id") for one in answer[0][0]] == ["a", "b", "c", "d", "e"]
    romeo.sends(ask_items("shelf", "".join(f"<item id='{id}'/>" for id in "abcdefg")))
    romeo.receives(error("policy-violation"))
    romeo.sends(ask_items("shelf", "<item id='a'/>" * 500))
    assert len(romeo.receives("<iq type='result' id='p' ...>...</iq>")[0][0]) == 1


def test_payloads_come_back_as_they_went_in(juliet: Client) -> None:
    """XEP-0222 §3: namespaces, attributes with prefixes, text with white space; in answers and in events."""
    payload = (
        "<x xmlns='urn:x' xmlns:y='urn:y' y:a='1' b='&apos;&quot;&lt;'><y:z xml:lang='it'> o \n<k xmlns=''/></y:z>"
        "<message xmlns='jabber:client'/><item xmlns='http://jabber.org/protocol/pubsub'/>&amp;</x>"
    )
    comes_online(juliet, "urn:x")
    publishes(juliet, "urn:x", item("m", payload))
    juliet.receives(event("urn:x", item("m", payload), by=FROM_BALCONY))
    juliet.sends(ask_items("urn:x"))
    juliet.receives(items_of("urn:x", item("m", payload)))


# ---- removing (§7.2) -----------------------------------------------------------------------


@pytest.mark.parametrize(("notify_retract", "notify", "told"), [("1", "", 1), ("0", "", 0), ("0", "true", 1),
                                                                ("0", "1", 1), ("0", "0", 0)])  # fmt: skip
def test_removed_items_are_gone_and_told(juliet: Client, notify_retract: str, notify: str, told: int) -> None:
    """XEP0060-7.2-1, XEP0060-7.2.2-1"""
    publishes(juliet, MOOD, item("a"), item("b"), max_items="5", notify_retract=notify_retract)
    wants(juliet, MOOD)
    succeeds(juliet, retract(MOOD, "a", notify=notify))
    if told:
        juliet.receives(event(MOOD, "<retract id='a'/>"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("b")))


def test_a_retraction_happens_as_a_whole_or_not_at_all(juliet: Client, romeo: Client) -> None:
    """XEP0060-7.2.3-1, XEP0060-12.11-1"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("a"))
    for text, wrong in (
        (retract(MOOD, "a", "z"), error("item-not-found")),
        (retract("nowhere", "a"), error("item-not-found")),
        (retract(MOOD), error("bad-request", "item-required")),
        (request(f"<retract node='{MOOD}'><item/></retract>"), error("bad-request", "item-required")),
    ):
        juliet.sends(text)
        juliet.receives(wrong)
    romeo.sends(retract(MOOD, "a", to=JULIET))
    romeo.receives(error("forbidden"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("a")))


# ---- who may what (§4.5, §6.1.3, §6.5.9) ---------------------------------------------------

REFUSED = {  # by access model, for a friend without a group and for a stranger: the error, None if it is allowed
    "open": (None, None),
    "presence": (None, ("not-authorized", "presence-subscription-required")),
    "roster": (("not-authorized", "not-in-roster-group"), ("not-authorized", "not-in-roster-group")),
    "whitelist": (("not-allowed", "closed-node"), ("not-allowed", "closed-node")),
    "authorize": (("not-authorized", "not-subscribed"), ("not-authorized", "not-subscribed")),
}


@pytest.mark.parametrize("model", REFUSED)
def test_the_access_model_is_obeyed(juliet: Client, romeo: Client, nurse: Client, model: str) -> None:
    """XEP0060-4.5-1, XEP0060-6.5.1-1, XEP0060-6.5.9-1, XEP0060-6.1.3.2-1, XEP0060-6.1.3.3-1, XEP0060-6.1.3.4-1,
    XEP0060-14.3-1, XEP0163-4.1-2, XEP0163-5-4: in retrieval, subscription, notification and discovery alike."""
    friends(juliet, romeo)
    publishes(juliet, "urn:x", item("m"), access_model=model, roster_groups_allowed="Friends")
    wants(romeo, "urn:x")
    for client, wrong in zip((romeo, nurse), REFUSED[model], strict=True):
        client.sends(ask_items("urn:x"))
        client.receives(items_of("urn:x", item("m")) if wrong is None else error(*wrong))
        if model != "authorize":
            client.sends(subscribe("urn:x", client.bare))
            client.receives(subscribed("urn:x", client.bare) if wrong is None else error(*wrong))
            if wrong is None:
                client.passes_barrier()
        client.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_ITEMS}'/></iq>")
        nodes = [one.get("node") for one in items_in(client) if one.get("node")]
        assert nodes == (["urn:x"] if wrong is None else [])
        client.receives_anything()
    publishes(juliet, "urn:x", item("n"))
    if REFUSED[model][0] is None:
        romeo.receives(event("urn:x", item("n"), by=FROM_BALCONY))
    juliet.receives_anything()
    nurse.receives_anything()


def items_in(client: Client) -> list[ET.Element]:
    """Return the items of the disco#items answer among what has come."""
    [answer] = [one for one in client.receives_anything() if one.get("id") == "d"]
    return list(answer[0])


def test_the_group_of_a_contact_decides(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0060-4.5-1, XEP0163-4.1-1, XEP-0060 §9.2: juliet's example of her geolocation"""
    friends(juliet, romeo, nurse)
    grouped(juliet, ROMEO, "Friends")
    grouped(juliet, NURSE, "Servants")
    for client in (romeo, nurse):
        wants(client, "geoloc")
    publishes_in_company(juliet, "geoloc", access_model="roster", roster_groups_allowed="Friends")
    romeo.receives(event("geoloc", item("m"), by=FROM_BALCONY))
    nurse.receives_nothing()


def publishes_in_company(juliet: Client, node: str, id: str = "m", **options: str) -> None:
    """Publish while presence and pushes are coming in, which nobody asks about."""
    juliet.receives_anything()
    publishes(juliet, node, item(id), **options)


def test_affiliations_open_doors_and_close_them(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0060-4.1-1, XEP0060-6.1.3.8-1, XEP0060-12.12-1, XEP0060-7.1.3.1-1"""
    publishes(juliet, "urn:x", item("m"), access_model="whitelist", max_items="5")
    affiliations = f"<affiliation jid='{ROMEO}' affiliation='publisher'/><affiliation jid='{NURSE}' affiliation='member'/>"
    succeeds(juliet, request(f"<affiliations node='urn:x'>{affiliations}</affiliations>", namespace=OWNER))
    for client in (romeo, nurse):
        client.sends(ask_items("urn:x"))
        client.receives(items_of("urn:x", item("m")))
    romeo.sends(publish("urn:x", item("n"), to=JULIET))
    romeo.receives(published("urn:x", "n"))
    romeo.sends(retract("urn:x", "m", to=JULIET))
    romeo.receives(done())
    nurse.sends(publish("urn:x", item("o"), to=JULIET))
    nurse.receives(error("forbidden"))
    nurse.sends(retract("urn:x", "n", to=JULIET))
    nurse.receives(error("forbidden"))
    banned = f"<affiliations node='urn:x'><affiliation jid='{NURSE}' affiliation='outcast'/></affiliations>"
    succeeds(juliet, request(banned, namespace=OWNER))
    for text in (ask_items("urn:x"), subscribe("urn:x", NURSE)):
        nurse.sends(text)
        nurse.receives(error("forbidden"))


def test_nobody_else_publishes_by_default(juliet: Client, romeo: Client) -> None:
    """XEP0163-2.2-1, XEP0060-7.1.3.1-1, XEP0060-7.1.3.3-1: neither to a node that is there nor to a new one"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"))
    for node in (MOOD, TUNE):
        romeo.sends(publish(node, item("n"), to=JULIET))
        romeo.receives(error("forbidden"))


def test_a_guest_book_is_written_by_everybody_but_nobody_tears_out_a_page(juliet: Client, romeo: Client) -> None:
    """XEP-0060 §4.1: what somebody else has published may be neither removed nor overwritten."""
    publishes(juliet, "book", item("m"), publish_model="open", access_model="open", max_items="5")
    romeo.sends(publish("book", item("n"), to=JULIET))
    romeo.receives(published("book", "n"))
    for text in (publish("book", item("m", SAD), to=JULIET), retract("book", "m", to=JULIET)):
        romeo.sends(text)
        romeo.receives(error("forbidden"))
    romeo.sends(retract("book", "n", to=JULIET))
    romeo.receives(done())


# ---- strangers learn nothing (S29, S58) ---------------------------------------------------

CURIOUS = [
    publish(MOOD, item("m"), to="{to}"),
    retract(MOOD, "m", to="{to}"),
    ask_items(MOOD, to="{to}"),
    subscribe(MOOD, "romeo@example.org", to="{to}"),
    request(f"<unsubscribe node='{MOOD}' jid='romeo@example.org'/>", to="{to}"),
    request("<subscriptions/>", type="get", to="{to}"),
    request(f"<subscriptions node='{MOOD}'/>", type="get", to="{to}"),
    request("<affiliations/>", type="get", to="{to}"),
    request(f"<options node='{MOOD}' jid='romeo@example.org'/>", type="get", to="{to}"),
    request("<default/>", type="get", to="{to}"),
    request(f"<create node='{MOOD}'/>", to="{to}"),
    request("<default/>", type="get", to="{to}", namespace=OWNER),
    *(request(f"<{name} node='{MOOD}'/>", type=type, to="{to}", namespace=OWNER) for type, name in (
        ("get", "configure"), ("set", "configure"), ("set", "delete"), ("set", "purge"), ("get", "subscriptions"),
        ("set", "subscriptions"), ("get", "affiliations"), ("set", "affiliations"))),
    *(f"<iq type='get' id='p' to='{{to}}'><query xmlns='{ns}'{node}/></iq>" for ns in (DISCO_INFO, DISCO_ITEMS)
      for node in ("", f" node='{MOOD}'")),
]  # fmt: skip


@pytest.mark.parametrize("text", CURIOUS)
def test_strangers_can_not_tell_an_account_from_none(juliet: Client, romeo: Client, text: str) -> None:
    """S29, S58, XEP0060-14.2-1: and no object is created."""
    answers = []
    for to in (JULIET, "ghost@example.org"):
        romeo.sends(text.replace("{to}", to))
        answer = romeo.receives("<iq id='p' ...>...</iq>")
        answers.append(ET.tostring(answer).decode().replace(to, "somebody"))
    assert answers[0] == answers[1]


def test_nothing_is_created_for_nobody(server: MemoryServer, romeo: Client) -> None:
    """S58"""
    for text in (publish(MOOD, item("m"), to="ghost@example.org"), subscribe(MOOD, ROMEO, to="ghost@example.org")):
        romeo.sends(text)
        romeo.receives(GONE)
    romeo.sends(request(f"<create node='{MOOD}'/>", to="ghost@example.org"))
    romeo.receives(error("forbidden"))
    assert not list(server.storage.documents("pep").owners("example.org"))


# ---- notifications (XEP-0163 §4.3) ---------------------------------------------------------


def test_who_sees_the_presence_and_wants_to_know_is_told(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0163-4.1-1, XEP0163-4.2-1, XEP0163-4.3.1-1, XEP0163-4.3.1-3, XEP0163-4.3.1-4, XEP0163-4.3.3-1, XEP0060-9.1.2-1,
    XEP0060-9.2-1, XEP0060-7.1.2-2: one for each resource that wants it, from the bare JID, with an id of its own"""
    friends(juliet, romeo, nurse)
    wants(romeo, MOOD)
    wants(nurse, TUNE)
    juliet.receives_anything()
    ids = []
    for id in "mn":
        publishes(juliet, MOOD, item(id))
        ids.append(romeo.receives(event(MOOD, item(id), by=FROM_BALCONY)).get("id"))
    assert len(set(ids)) == 2
    for client in (romeo, nurse, juliet):
        client.receives_nothing()


def test_ones_own_resources_are_told(server: MemoryServer, juliet: Client) -> None:
    """XEP0163-4.2-1, XEP0060-9.1.1-1, XEP0163-4.3.3-1: whatever the access model, if they want it"""
    comes_online(juliet, MOOD)
    chamber, garden = (server.client().login("juliet", resource=name) for name in ("chamber", "garden"))
    comes_online(chamber, MOOD)
    comes_online(garden)
    for client in (juliet, chamber, garden):
        client.receives_anything()
    chamber.sends(publish(MOOD, item("m"), access_model="whitelist"))
    chamber.receives(published(MOOD, "m"), event(MOOD, item("m"), by=f"{JULIET}/chamber"))
    juliet.receives(event(MOOD, item("m"), by=f"{JULIET}/chamber"))
    garden.receives_nothing()


def test_who_comes_online_gets_the_latest(juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.3-2, XEP0163-4.3.4-1, XEP0163-4.3.4-2, XEP0163-3-3: once, also while the owner is away"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"), item("n"), max_items="2")
    publishes(juliet, TUNE, item("t"), send_last_published_item="never")
    publishes(juliet, "urn:x", item("x"), send_last_published_item="on_sub")
    juliet.sends("<presence type='unavailable'/>")
    juliet.receives_anything()
    romeo.sends("<presence type='unavailable'/>")
    romeo.receives_anything()
    comes_online(romeo, MOOD, TUNE, "urn:x")
    romeo.receives(event(MOOD, item("n"), by=FROM_BALCONY, delayed=True))
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives(f"<presence from='{romeo.jid}'><show>away</show></presence>")
    romeo.receives_nothing()


def test_ones_own_new_resource_gets_the_latest(server: MemoryServer, juliet: Client) -> None:
    """XEP0163-4.3.4-1"""
    publishes(juliet, MOOD, item("m"), access_model="whitelist")
    chamber = server.client().login("juliet", resource="chamber")
    comes_online(chamber, MOOD)
    chamber.receives(event(MOOD, item("m"), by=FROM_BALCONY, delayed=True))


def test_a_new_friend_gets_the_latest(juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.4-1: on the subscription to the presence"""
    publishes(juliet, MOOD, item("m"))
    comes_online(romeo, MOOD)
    juliet.comes_online()
    romeo.sends(f"<presence type='subscribe' to='{JULIET}'/>")
    romeo.receives_anything()
    juliet.sends(f"<presence type='subscribed' to='{ROMEO}'/>")
    juliet.receives_anything()
    last = [one for one in romeo.receives_anything() if local_name(one.tag) == "message"]
    assert [one.get("from") for one in last] == [JULIET]


def test_a_renamed_friend_gets_nothing(juliet: Client, romeo: Client) -> None:
    """XEP0060-12.2-1: only once, when access is gained"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"))
    wants(romeo, MOOD)
    grouped(juliet, ROMEO, "Friends")
    juliet.receives_anything()
    romeo.receives_nothing()


def test_a_change_of_the_group_opens_and_closes(juliet: Client, romeo: Client) -> None:
    """XEP0163-7.1-1, XEP0060-12.2-1, XEP0060-12.14-1: and a subscription that lost its ground is gone"""
    friends(juliet, romeo)
    publishes(juliet, "urn:x", item("m"), access_model="roster", roster_groups_allowed="Friends")
    wants(romeo, "urn:x")
    grouped(juliet, ROMEO, "Friends")
    romeo.receives(event("urn:x", item("m"), by=FROM_BALCONY, delayed=True))
    romeo.sends(subscribe("urn:x", ROMEO))
    romeo.receives(subscribed("urn:x", ROMEO), event("urn:x", item("m"), by=FROM_BALCONY, delayed=True))
    grouped(juliet, ROMEO, "Enemies")
    gone = f"<subscription node='urn:x' jid='{ROMEO}' subscription='none'/>"
    romeo.receives(plain_event(gone, type=""))
    juliet.receives_anything()
    romeo.sends(request("<subscriptions/>", type="get", to=JULIET))
    romeo.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><subscriptions/></pubsub></iq>")
    publishes(juliet, "urn:x", item("n"))
    romeo.receives_nothing()


def test_the_end_of_a_friendship_ends_subscriptions(juliet: Client, romeo: Client) -> None:
    """XEP0163-7.1-1, XEP0060-14.3-1"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"))
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives_anything()
    juliet.sends(f"<presence type='unsubscribed' to='{ROMEO}'/>")
    juliet.receives_anything()
    came = [one for one in romeo.receives_anything() if local_name(one.tag) == "message"]
    assert [one[0][0].get("subscription") for one in came] == ["none"]
    romeo.sends(ask_items(MOOD))
    romeo.receives(error("not-authorized", "presence-subscription-required"))


def test_a_change_of_the_access_model_opens_and_closes(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0060-12.2-1, XEP0060-14.3-1"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"), access_model="open")
    nurse.comes_online()
    nurse.sends(subscribe(MOOD, NURSE))
    nurse.receives(subscribed(MOOD, NURSE), event(MOOD, item("m"), delayed=True))
    wants(romeo, MOOD)
    juliet.receives_anything()
    succeeds(juliet, configure(MOOD, access_model="presence"))
    nurse.receives(plain_event(f"<subscription node='{MOOD}' jid='{NURSE}' subscription='none'/>", type=""))
    succeeds(juliet, configure(MOOD, access_model="whitelist"))
    publishes(juliet, MOOD, item("n"))
    romeo.receives_nothing()
    succeeds(juliet, configure(MOOD, access_model="presence"))
    romeo.receives(event(MOOD, item("n"), by=FROM_BALCONY, delayed=True))
    romeo.receives_nothing()


@pytest.mark.parametrize("how", ["block", "list"])
def test_the_blocked_are_told_nothing(juliet: Client, romeo: Client, how: str) -> None:
    """XEP0163-4.3.3-3, S48: neither what is new nor the latest; and again as soon as they are not blocked any more"""
    friends(juliet, romeo)
    wants(romeo, MOOD)
    if how == "block":
        juliet.sends(f"<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{ROMEO}'/></block></iq>")
    else:
        rule = f"<item type='jid' value='{ROMEO}' action='deny' order='1'/>"
        juliet.sends(
            f"<iq type='set' id='b'><query xmlns='jabber:iq:privacy'><list name='l'>{rule}</list></query></iq>"
            "<iq type='set' id='b'><query xmlns='jabber:iq:privacy'><default name='l'/></query></iq>"
        )
    juliet.receives_anything()
    romeo.receives_anything()
    publishes(juliet, MOOD, item("m"))
    wants(romeo, MOOD)
    romeo.receives_nothing()
    romeo.sends(ask_items(MOOD))
    romeo.receives(GONE)
    if how == "block":
        juliet.sends("<iq type='set' id='b'><unblock xmlns='urn:xmpp:blocking'/></iq>")
    else:
        juliet.sends("<iq type='set' id='b'><query xmlns='jabber:iq:privacy'><default/></query></iq>")
    juliet.receives_anything()
    romeo.receives_anything()
    publishes(juliet, MOOD, item("n"))
    romeo.receives(event(MOOD, item("n"), by=FROM_BALCONY))
    juliet.receives_anything()


def test_who_blocks_the_owner_is_spared(juliet: Client, romeo: Client) -> None:
    """S48: the receiver's list counts as well."""
    friends(juliet, romeo)
    wants(romeo, MOOD)
    romeo.sends(f"<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{JULIET}'/></block></iq>")
    romeo.receives_anything()
    juliet.receives_anything()
    publishes(juliet, MOOD, item("m"))
    wants(romeo, MOOD)
    romeo.receives_nothing()
    juliet.receives_anything()


def test_directed_presence_is_a_temporary_subscription_to_open_nodes(juliet: Client, nurse: Client) -> None:
    """XEP0060-9.1.3-1"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    publishes(juliet, TUNE, item("t"))
    juliet.comes_online()
    nurse.hears_questions = True
    from tests.eventing import answer, capabilities, is_question, with_caps

    ver, info = capabilities("nurse", [MOOD, TUNE])
    nurse.sends(f"<presence to='{JULIET}'>{with_caps(ver)}</presence>")
    [question] = [one for one in nurse.receives_anything() if is_question(one)]
    nurse.sends(answer(question, info))
    nurse.receives(event(MOOD, item("m"), delayed=True))
    juliet.receives_anything()
    publishes(juliet, MOOD, item("n"))
    nurse.receives(event(MOOD, item("n")))  # no reply-to: she may not see where juliet is
    nurse.sends(f"<presence to='{JULIET}' type='unavailable'/>")
    juliet.receives_anything()
    publishes(juliet, MOOD, item("o"))
    nurse.receives_nothing()


def test_errors_are_absorbed(juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.1-2"""
    friends(juliet, romeo)
    wants(romeo, MOOD)
    juliet.receives_anything()
    publishes(juliet, MOOD, item("m"))
    id = romeo.receives(event(MOOD, item("m"), by=FROM_BALCONY)).get("id")
    wrong = "<error type='cancel'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    romeo.sends(f"<message type='error' id='{id}' to='{JULIET}'>{wrong}</message>")
    juliet.receives_nothing()
    romeo.receives_nothing()


@pytest.mark.parametrize(("kind", "condition", "ends"), [("cancel", "item-not-found", True), ("modify", "gone", True),
                                                        ("auth", "forbidden", False), ("wait", "redirect", False)])  # fmt: skip
def test_an_address_that_is_gone_loses_its_subscription(
    juliet: Client, elsewhere: Elsewhere, kind: str, condition: str, ends: bool
) -> None:
    """XEP0060-12.4-1"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    elsewhere.says(
        f"<iq type='set' id='s' from='romeo@example.com/x' to='{JULIET}'><pubsub xmlns='{PUBSUB}'>"
        f"<subscribe node='{MOOD}' jid='romeo@example.com'/></pubsub></iq>"
    )
    elsewhere.forgets()
    wrong = f"<error type='{kind}'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    elsewhere.says(f"<message type='error' id='x' from='romeo@example.com' to='{JULIET}'>{wrong}</message>")
    publishes(juliet, MOOD, item("n"))
    assert len(elsewhere.came) == (0 if ends else 1)


# ---- explicit subscriptions (§6.1, §6.2, §5.6) ---------------------------------------------


def test_a_stranger_subscribes_to_an_open_node(juliet: Client, nurse: Client) -> None:
    """XEP0060-6.1.2-1, XEP0060-6.1.7-1, XEP0060-4.2-1, XEP0163-4.3.2-2, XEP0163-4.3.1-3, XEP0060-6.2.2-1, XEP0163-5-1"""
    publishes(juliet, "urn:x", item("m"), access_model="open")
    nurse.comes_online()
    nurse.sends(subscribe("urn:x", NURSE))
    nurse.receives(subscribed("urn:x", NURSE), event("urn:x", item("m"), delayed=True, to=NURSE))
    publishes(juliet, "urn:x", item("n"))
    nurse.receives(event("urn:x", item("n"), to=NURSE))
    nurse.sends(request(f"<unsubscribe node='urn:x' jid='{NURSE}'/>", to=JULIET))
    nurse.receives(done())
    publishes(juliet, "urn:x", item("o"))
    nurse.receives_nothing()


def test_a_full_jid_gets_exactly_one_notification(server: MemoryServer, juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.2-1, XEP0163-4.3.2-3: also if it wants to know anyway; and one for each interested resource"""
    garden = server.client().login("romeo", resource="garden")
    friends(juliet, romeo)
    wants(romeo, MOOD)
    comes_online(garden)
    for client in (romeo, garden):
        client.receives_anything()
    publishes_in_company(juliet, MOOD)
    romeo.receives(event(MOOD, item("m"), by=FROM_BALCONY))
    for client, jid in ((romeo, romeo.jid), (garden, garden.jid), (romeo, ROMEO)):
        client.sends(subscribe(MOOD, jid))
        client.receives(subscribed(MOOD, jid))
        client.receives_anything()
    garden.receives_anything()
    publishes(juliet, MOOD, item("n"))
    romeo.receives(event(MOOD, item("n"), by=FROM_BALCONY))
    garden.receives(event(MOOD, item("n"), by=FROM_BALCONY))
    for client in (romeo, garden):
        client.receives_nothing()


def test_a_bare_subscriber_without_wishes_gets_one_at_the_bare_address(juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.2-2, XEP0163-4.3.1-4"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"))
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO), event(MOOD, item("m"), by=FROM_BALCONY, delayed=True, to=ROMEO))
    publishes(juliet, MOOD, item("n"))
    romeo.receives(event(MOOD, item("n"), by=FROM_BALCONY, to=ROMEO))


BAD_SUBSCRIPTIONS = [
    (subscribe(MOOD, JULIET), error("bad-request", "invalid-jid")),
    (subscribe(MOOD, "@"), error("bad-request", "invalid-jid")),
    (request(f"<subscribe node='{MOOD}'/>", to=JULIET), error("bad-request", "invalid-jid")),
    (subscribe("nowhere", ROMEO), error("item-not-found")),
    (request(f"<unsubscribe node='{MOOD}' jid='{NURSE}'/>", to=JULIET), error("forbidden")),
    (request(f"<unsubscribe node='{MOOD}' jid='{ROMEO}'/>", to=JULIET), error("unexpected-request", "not-subscribed")),
    (request(f"<unsubscribe node='nowhere' jid='{ROMEO}'/>", to=JULIET), error("item-not-found")),
    (request(f"<options node='{MOOD}' jid='{ROMEO}'/>", type="get", to=JULIET),
     error("feature-not-implemented", "unsupported", feature="subscription-options")),
    (request(f"<default node='{MOOD}'/>", type="get", to=JULIET),
     error("feature-not-implemented", "unsupported", feature="subscription-options")),
    (ask_items("nowhere"), error("item-not-found")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wrong"), BAD_SUBSCRIPTIONS)
def test_subscriptions_that_can_not_be(juliet: Client, romeo: Client, text: str, wrong: str) -> None:
    """XEP0060-6.1.3.1-1, XEP0060-6.1.3.12-1, XEP0060-6.2.3-1, XEP0060-6.3-1, XEP0060-6.5.9.12-1"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"))
    romeo.sends(text)
    romeo.receives(wrong)


def test_a_subscription_id_that_nobody_has_given_is_ignored(juliet: Client, romeo: Client) -> None:
    """XEP0060-6.2.3-1: §6.2.3.5, where there are none"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO))
    romeo.sends(request(f"<unsubscribe node='{MOOD}' jid='{ROMEO}' subid='1'/>", to=JULIET))
    romeo.receives(done())


def test_who_subscribes_again_hears_how_things_are(juliet: Client, romeo: Client) -> None:
    """XEP0060-6.1.6-1"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    for _time in range(2):
        romeo.sends(subscribe(MOOD, ROMEO))
        romeo.receives(subscribed(MOOD, ROMEO))
    romeo.sends(request(f"<subscriptions node='{MOOD}'/>", type="get", to=JULIET))
    found = f"<subscription node='{MOOD}' jid='{ROMEO}' subscription='subscribed'/>"
    romeo.receives(
        f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><subscriptions node='{MOOD}'>{found}</subscriptions></pubsub></iq>"
    )


@pytest.mark.config(limits={"pep_subscribers": 1})
def test_there_are_not_too_many_subscriptions(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0060-6.1.3.9-1, S59"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO))
    nurse.sends(subscribe(MOOD, NURSE))
    nurse.receives(error("policy-violation", "too-many-subscriptions"))


def test_a_node_without_subscriptions(juliet: Client, romeo: Client) -> None:
    """XEP0060-6.1.3.10-1"""
    publishes(juliet, MOOD, item("m"), access_model="open", subscribe="0")
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(error("feature-not-implemented", "unsupported", feature="subscribe"))


def test_what_somebody_is_at_an_account(juliet: Client, romeo: Client) -> None:
    """XEP0060-5.6-1, XEP0060-5.7-1, XEP0163-5-3"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    publishes(juliet, TUNE, item("m"), access_model="open")
    for name in ("subscriptions", "affiliations"):
        romeo.sends(request(f"<{name}/>", type="get", to=JULIET))
        romeo.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><{name}/></pubsub></iq>")
    for jid in (ROMEO, romeo.jid):
        romeo.sends(subscribe(MOOD, jid))
        romeo.receives(subscribed(MOOD, jid))
        romeo.receives_anything()
    made = f"<affiliations node='{TUNE}'><affiliation jid='{ROMEO}' affiliation='member'/></affiliations>"
    succeeds(juliet, request(made, namespace=OWNER))
    romeo.sends(request("<subscriptions/>", type="get", to=JULIET))
    found = "".join(f"<subscription node='{MOOD}' jid='{jid}' subscription='subscribed'/>" for jid in (ROMEO, romeo.jid))
    romeo.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><subscriptions>{found}</subscriptions></pubsub></iq>")
    romeo.sends(request("<affiliations/>", type="get", to=JULIET))
    found = f"<affiliation node='{TUNE}' affiliation='member'/>"
    romeo.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><affiliations>{found}</affiliations></pubsub></iq>")
    juliet.sends(request("<affiliations/>", type="get"))
    found = "".join(f"<affiliation node='{node}' affiliation='owner'/>" for node in (MOOD, TUNE))
    juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><affiliations>{found}</affiliations></pubsub></iq>")


# ---- the owner's approval (§6.1.4, §8.6) ---------------------------------------------------

QUESTION = f"""<message from='{JULIET}' to='{JULIET}' id='*'><x xmlns='jabber:x:data' type='form'><title>*</title>
<field var='FORM_TYPE' type='hidden'><value>{PUBSUB}#subscribe_authorization</value></field>
<field var='pubsub#node' type='text-single' label='*'><value>{MOOD}</value></field>
<field var='pubsub#subscriber_jid' type='jid-single' label='*'><value>{ROMEO}</value></field>
<field var='pubsub#allow' type='boolean' label='*'><value>0</value></field></x></message>"""


def decision(id: str, allow: str, type: str = "submit") -> str:
    """Return the owner's answer."""
    fields = {"node": MOOD, "subscriber_jid": ROMEO} | ({"allow": allow} if allow else {})
    inside = form(fields, "subscribe_authorization", type) if type == "submit" else (
        f"<x xmlns='jabber:x:data' type='cancel'><field var='FORM_TYPE' type='hidden'>"
        f"<value>{PUBSUB}#subscribe_authorization</value></field></x>")  # fmt: skip
    return f"<message to='{JULIET}' id='{id}'>{inside}</message>"


@pytest.fixture
def question(juliet: Client, romeo: Client) -> str:
    """The id of the question that juliet got, since romeo wants to subscribe."""
    publishes(juliet, MOOD, item("m"), access_model="authorize")
    juliet.comes_online()
    romeo.comes_online()
    romeo.sends(ask_items(MOOD))
    romeo.receives(error("not-authorized", "not-subscribed"))
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO, "pending"))
    return juliet.receives(QUESTION).get("id") or ""


def test_the_owner_approves(juliet: Client, romeo: Client, question: str) -> None:
    """XEP0060-6.1.4-1, XEP0060-8.6-1, XEP0060-4.2-1, XEP0060-6.1.3.7-1, XEP0060-12.14-1"""
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(error("not-authorized", "pending-subscription"))
    romeo.sends(ask_items(MOOD))
    romeo.receives(error("not-authorized", "not-subscribed"))
    publishes(juliet, MOOD, item("n"))
    romeo.receives_nothing()
    juliet.sends(decision(question, "1"))
    approved = f"<subscription node='{MOOD}' jid='{ROMEO}' subscription='subscribed'/>"
    romeo.receives(plain_event(approved, type=""), event(MOOD, item("n"), delayed=True))
    romeo.sends(ask_items(MOOD))
    romeo.receives(items_of(MOOD, item("n")))
    publishes(juliet, MOOD, item("o"))
    romeo.receives(event(MOOD, item("o")))
    juliet.sends(decision(question, "1"))
    juliet.receives(f"<message type='error' id='{question}' from='{JULIET}'><error type='cancel'><item-not-found .../></error></message>")


def test_the_owner_denies(juliet: Client, romeo: Client, question: str) -> None:
    """XEP0060-8.6-1, XEP0060-12.14-1"""
    juliet.sends(decision(question, "false"))
    romeo.receives(plain_event(f"<subscription node='{MOOD}' jid='{ROMEO}' subscription='none'/>", type=""))
    romeo.sends(ask_items(MOOD))
    romeo.receives(error("not-authorized", "not-subscribed"))
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO, "pending"))
    juliet.receives(QUESTION)


def test_a_form_that_decides_nothing_leaves_the_question_open(juliet: Client, romeo: Client, question: str) -> None:
    """XEP0060-8.6-1"""
    juliet.sends(decision(question, "", "cancel"))
    juliet.sends(decision(question, ""))
    juliet.receives(f"<message type='error' id='{question}' from='{JULIET}'><error type='modify'><bad-request .../></error></message>")
    romeo.receives_nothing()
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(error("not-authorized", "pending-subscription"))


def test_nobody_else_decides(juliet: Client, romeo: Client, question: str) -> None:
    """XEP0060-14.2-1: it is a message like any other."""
    romeo.sends(decision("forged", "1"))
    juliet.receives(f"<message from='{romeo.jid}' to='{JULIET}' id='forged'>...</message>")
    romeo.receives_nothing()
    romeo.sends(ask_items(MOOD))
    romeo.receives(error("not-authorized", "not-subscribed"))


@pytest.mark.parametrize(("affiliation", "state"), [("member", "subscribed"), ("publisher", "subscribed"),
                                                    ("outcast", "none")])  # fmt: skip
def test_a_place_on_the_list_answers_the_question(
    juliet: Client, romeo: Client, question: str, affiliation: str, state: str
) -> None:
    """XEP-0060 §8.7.4"""
    made = f"<affiliations node='{MOOD}'><affiliation jid='{ROMEO}' affiliation='{affiliation}'/></affiliations>"
    succeeds(juliet, request(made, namespace=OWNER))
    told = plain_event(f"<subscription node='{MOOD}' jid='{ROMEO}' subscription='{state}'/>", type="")
    romeo.receives(told, *([event(MOOD, item("m"), delayed=True)] if state == "subscribed" else []))


def test_the_question_waits_for_an_absent_owner(server: MemoryServer, juliet: Client, romeo: Client) -> None:
    """XEP-0060 §12.13"""
    publishes(juliet, MOOD, item("m"), access_model="authorize")
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO, "pending"))
    juliet.comes_online()
    came = juliet.receives_anything()
    assert [one.get("from") for one in came if local_name(one.tag) == "message"] == [JULIET]


# ---- the owner's requests (§8) -------------------------------------------------------------


def test_nodes_are_created_and_deleted(juliet: Client) -> None:
    """XEP0060-8.1.1-1, XEP0060-8.1.1-2, XEP0060-8.4-1, XEP0163-5-1"""
    succeeds(juliet, request(f"<create node='{MOOD}'/>"))
    juliet.sends(request(f"<create node='{MOOD}'/>"))
    juliet.receives(error("conflict"))
    comes_online(juliet, MOOD)
    publishes(juliet, MOOD, item("m"))
    juliet.receives(event(MOOD, item("m"), by=FROM_BALCONY))
    succeeds(juliet, request(f"<delete node='{MOOD}'/>", namespace=OWNER))
    juliet.receives(plain_event(f"<delete node='{MOOD}'/>"))
    for text in (ask_items(MOOD), request(f"<delete node='{MOOD}'/>", namespace=OWNER)):
        juliet.sends(text)
        juliet.receives(error("item-not-found"))
    succeeds(juliet, request(f"<create node='{MOOD}'/>"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD))


def test_a_node_without_a_name_gets_one(juliet: Client) -> None:
    """XEP0060-8.1.1-1"""
    juliet.sends(request("<create/>"))
    answer = juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><create node='*'/></pubsub></iq>")
    publishes(juliet, answer[0][0].get("node") or "", item("m"))


def test_a_node_is_configured_while_it_is_created(juliet: Client, romeo: Client) -> None:
    """XEP0060-8.1.3-1, XEP0060-8.1.2-1"""
    config = form({"access_model": "open", "title": "How I feel"}, "node_config")
    succeeds(juliet, request(f"<create node='{MOOD}'/><configure>{config}</configure>"))
    romeo.sends(ask_items(MOOD))
    romeo.receives(items_of(MOOD))
    wrong = form({"access_model": "secret"}, "node_config")
    for text, refused in (
        (request(f"<create node='n'/><configure>{wrong}</configure>"), error("not-acceptable", "unsupported-access-model")),
        (request(f"<configure>{config}</configure><create node='n'/>"), error("bad-request")),
        (request(f"<create node='n'/><configure node='n'>{config}</configure>"), error("bad-request")),
        (request("<create node='n'/><configure/>").replace("'n'", "'m'"), done()),
        (ask_items("n"), error("item-not-found")),
    ):
        juliet.sends(text)
        juliet.receives(refused)


def test_configuration_is_taken_as_a_whole_or_not_at_all(juliet: Client, romeo: Client) -> None:
    """XEP0060-8.2-1, XEP0060-8.2.5.2-1, XEP0060-8.2.3-1"""
    publishes(juliet, MOOD, item("m"))
    for fields in ({"access_model": "open", "max_items": "many"}, {"access_model": "open", "persist_items": "perhaps"},
                   {"access_model": "open", "max_items": "5000"}, {"access_model": "secret"}):  # fmt: skip
        juliet.sends(configure(MOOD, **fields))
        juliet.receives(error("not-acceptable", "unsupported-access-model" if "secret" in fields.values() else ""))
    romeo.sends(ask_items(MOOD))
    romeo.receives(error("not-authorized", "presence-subscription-required"))
    succeeds(juliet, request(f"<configure node='{MOOD}'><x xmlns='jabber:x:data' type='cancel'/></configure>", namespace=OWNER))
    juliet.sends(request(f"<configure node='{MOOD}'/>", namespace=OWNER))
    juliet.receives(error("bad-request"))
    juliet.sends(configure("nowhere", title="x"))
    juliet.receives(error("item-not-found"))
    succeeds(juliet, configure(MOOD, access_model="open"))
    romeo.sends(ask_items(MOOD))
    romeo.receives(items_of(MOOD, item("m")))


def test_a_smaller_node_keeps_the_newest(juliet: Client) -> None:
    publishes(juliet, MOOD, *map(item, "abc"), max_items="max")
    succeeds(juliet, configure(MOOD, max_items="2"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("b"), item("c")))
    succeeds(juliet, configure(MOOD, persist_items="0"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD))


@pytest.mark.parametrize("payloads", ["1", "0"])
def test_a_change_of_the_configuration_can_be_told(juliet: Client, payloads: str) -> None:
    """XEP0060-8.2.5.3-1"""
    publishes(juliet, MOOD, item("m"), deliver_payloads=payloads)
    wants(juliet, MOOD)
    succeeds(juliet, configure(MOOD, notify_config="1", title="How I feel"))
    inside = "<x xmlns='jabber:x:data' type='result'>...</x>" if payloads == "1" else ""
    juliet.receives(plain_event(f"<configuration node='{MOOD}'>{inside}</configuration>"))


def test_the_default_configuration(juliet: Client) -> None:
    """XEP0060-8.3-1"""
    juliet.sends(request("<default/>", type="get", namespace=OWNER))
    answer = juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{OWNER}'><default>...</default></pubsub></iq>")
    assert form_of(answer)["pubsub#access_model"] == ["presence"]


def test_a_node_is_emptied_with_one_word(juliet: Client) -> None:
    """XEP0060-8.5-1"""
    publishes(juliet, MOOD, *map(item, "abc"), max_items="max")
    wants(juliet, MOOD)
    succeeds(juliet, request(f"<purge node='{MOOD}'/>", namespace=OWNER))
    juliet.receives(plain_event(f"<purge node='{MOOD}'/>"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD))
    juliet.sends(request("<purge node='nowhere'/>", namespace=OWNER))
    juliet.receives(error("item-not-found"))


def test_subscribers_hear_of_the_end_of_a_node(juliet: Client, romeo: Client, question: str) -> None:
    """XEP0060-8.4-1: also those whose question is open"""
    succeeds(juliet, request(f"<delete node='{MOOD}'/>", namespace=OWNER))
    romeo.receives(plain_event(f"<delete node='{MOOD}'/>"))


def test_subscribers_are_listed_and_changed(juliet: Client, romeo: Client, nurse: Client, question: str) -> None:
    """XEP0060-8.8-1, XEP0060-12.14-1"""

    def subscriptions(*states: str) -> str:
        inside = "".join(f"<subscription jid='{ROMEO}' subscription='{state}'/>" for state in states)
        return f"<subscriptions node='{MOOD}'>{inside}</subscriptions>"

    juliet.sends(request(subscriptions(), type="get", namespace=OWNER))
    juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{OWNER}'>{subscriptions()}</pubsub></iq>")  # pending
    succeeds(juliet, request(subscriptions("subscribed"), namespace=OWNER))
    approved = f"<subscription node='{MOOD}' jid='{ROMEO}' subscription='subscribed'/>"
    romeo.receives(plain_event(approved, type=""), event(MOOD, item("m"), delayed=True))
    juliet.sends(request(subscriptions(), type="get", namespace=OWNER))
    juliet.receives(f"<iq type='result' id='p'><pubsub xmlns='{OWNER}'>{subscriptions('subscribed')}</pubsub></iq>")
    for wrong in (subscriptions("perhaps"), subscriptions(), subscriptions("none", "subscribed")):
        juliet.sends(request(wrong, namespace=OWNER))
        juliet.receives(error("bad-request"))
    juliet.sends(request(subscriptions("none").replace(ROMEO, NURSE).replace("'none'", "'subscribed'"), namespace=OWNER))
    juliet.receives(error("not-acceptable"))  # S55: who neither knows juliet nor has asked is not told
    succeeds(juliet, request(subscriptions("none"), namespace=OWNER))
    romeo.receives(plain_event(approved.replace("'subscribed'", "'none'"), type=""))
    nurse.receives_nothing()


def test_affiliations_are_listed_and_changed(juliet: Client, romeo: Client) -> None:
    """XEP0060-8.9-1"""
    publishes(juliet, MOOD, item("m"))

    def affiliations(*what: str, jid: str = ROMEO) -> str:
        inside = "".join(f"<affiliation jid='{jid}' affiliation='{one}'/>" for one in what)
        return f"<affiliations node='{MOOD}'>{inside}</affiliations>"

    for wish, refused in (
        (affiliations("member", "publisher"), error("bad-request")),
        (affiliations("king"), error("bad-request")),
        (affiliations(), error("bad-request")),
        (affiliations("publish-only"), error("feature-not-implemented", "unsupported", feature="publish-only-affiliation")),
        (affiliations("owner"), error("not-acceptable")),
        (affiliations("none", jid=JULIET), error("not-acceptable")),
        (affiliations("member").replace("</aff", f"<affiliation jid='{ROMEO}/x' affiliation='outcast'/></aff"), error("bad-request")),
    ):
        juliet.sends(request(wish, namespace=OWNER))
        juliet.receives(refused)
    owner = f"<affiliation jid='{JULIET}' affiliation='owner'/>"
    for wish, found in (("member", f"<affiliation jid='{ROMEO}' affiliation='member'/>"), ("none", "")):
        succeeds(juliet, request(affiliations(wish), namespace=OWNER))
        juliet.sends(request(affiliations(), type="get", namespace=OWNER))
        juliet.receives(
            f"<iq type='result' id='p'><pubsub xmlns='{OWNER}'><affiliations node='{MOOD}'>{owner}{found}</affiliations></pubsub></iq>"
        )


@pytest.mark.parametrize("text", [
    request(f"<create node='{TUNE}'/>", to=JULIET), request("<create/>", to=JULIET),
    *(request(f"<{name} node='{MOOD}'/>", type=type, to=JULIET, namespace=OWNER) for type, name in (
        ("get", "configure"), ("set", "configure"), ("set", "delete"), ("set", "purge"), ("get", "subscriptions"),
        ("set", "subscriptions"), ("get", "affiliations"), ("set", "affiliations"))),
])  # fmt: skip
def test_only_the_owner_rules(juliet: Client, romeo: Client, text: str) -> None:
    """XEP0060-14.2-1, XEP0060-8.2.3-1, XEP0060-8.4-1, XEP0060-8.5-1, XEP0060-8.8-1, XEP0060-8.9-1, XEP0060-8.1.1-2:
    not even a publisher and friend"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"))
    made = f"<affiliations node='{MOOD}'><affiliation jid='{ROMEO}' affiliation='publisher'/></affiliations>"
    succeeds(juliet, request(made, namespace=OWNER))
    romeo.sends(text)
    romeo.receives(error("forbidden"))
    juliet.sends(ask_items(MOOD))
    juliet.receives(items_of(MOOD, item("m")))


# ---- service discovery (§5, XEP-0163 §6) ----------------------------------------------------

MONAL = {  # all of these, or Monal thinks that there is no PEP
    "filtered-notifications", "publish-options", "publish", "subscribe", "create-nodes", "delete-items",
    "delete-nodes", "persistent-items", "retrieve-items", "auto-create",
}  # fmt: skip
ALSO = {
    "item-ids", "multi-items", "config-node", "config-node-max", "access-open", "access-presence", "access-roster",
    "access-whitelist", "access-authorize", "create-and-configure", "last-published", "meta-data", "auto-subscribe",
    "publisher-affiliation", "member-affiliation", "outcast-affiliation", "retract-items", "purge-nodes", "rsm",
    "instant-nodes", "retrieve-default", "retrieve-subscriptions", "retrieve-affiliations", "manage-subscriptions",
    "modify-affiliations", "subscription-notifications", "pubsub-on-a-jid", "presence-subscribe",
    "presence-notifications", "publish-node-full",
}  # fmt: skip


def test_the_account_says_what_it_can(juliet: Client, romeo: Client) -> None:
    """XEP0163-6.1-1, XEP0163-5-2, XEP0060-5.1-1, XEP0060-5.1-2, XEP0060-9-1: to friends as well"""
    friends(juliet, romeo)
    for client in (juliet, romeo):
        client.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_INFO}'/></iq>")
        info = client.receives("<iq type='result' id='d' ...>...</iq>")[0]
        identities = {(one.get("category"), one.get("type")) for one in info if local_name(one.tag) == "identity"}
        assert identities == {("account", "registered"), ("pubsub", "pep")}
        features = {one.get("var", "") for one in info if local_name(one.tag) == "feature"}
        told = {name.removeprefix(f"{PUBSUB}#") for name in features if name.startswith(f"{PUBSUB}#")}
        assert told - {"owner"} == MONAL | ALSO and PUBSUB in features


def test_the_nodes_of_an_account(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0163-6.2-1, XEP0060-5.2-1, XEP0163-5-5: those that who asks may read"""
    friends(juliet, romeo)
    for node, model in (("a", "open"), ("b", "presence"), ("c", "whitelist")):
        publishes(juliet, node, item("m"), access_model=model)
    for client, found in ((juliet, "abc"), (romeo, "ab"), (nurse, "a")):
        client.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_ITEMS}'/></iq>")
        items = client.receives("<iq type='result' id='d' ...>...</iq>")[0]
        nodes = [(one.get("jid"), one.get("node")) for one in items if one.get("node")]
        assert nodes == [(JULIET, node) for node in found]


def test_what_a_node_says_of_itself(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP0060-5.3-1, XEP0060-5.4-1"""
    friends(juliet, romeo)
    publishes(juliet, MOOD, item("m"), title="How I feel")
    about = f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_INFO}' node='{MOOD}'/></iq>"
    romeo.sends(subscribe(MOOD, romeo.jid))
    romeo.receives_anything()
    romeo.sends(about)
    info = romeo.receives("<iq type='result' id='d' ...>...</iq>")[0]
    assert info.get("node") == MOOD
    assert [one.attrib for one in info if local_name(one.tag) == "identity"] == [{"category": "pubsub", "type": "leaf"}]
    values = form_of(info)
    assert values["FORM_TYPE"] == [f"{PUBSUB}#meta-data"]
    assert values["pubsub#title"] == ["How I feel"]
    assert values["pubsub#owner"] == [JULIET]
    assert values["pubsub#num_subscribers"] == ["1"]
    xmppd.parse_stamp(values["pubsub#creation_date"][0])
    nurse.sends(about)
    nurse.receives(error("not-authorized", "presence-subscription-required", id="d"))
    romeo.sends(about.replace(MOOD, "nowhere"))
    romeo.receives("<iq type='error' id='d'><error type='cancel'><item-not-found .../></error></iq>")


def test_the_items_of_a_node_are_listed_by_name(juliet: Client, romeo: Client) -> None:
    """XEP0060-5.5-1"""
    publishes(juliet, "shelf", item("a"), item("b"), access_model="open", max_items="2")
    romeo.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_ITEMS}' node='shelf'/></iq>")
    listed = "".join(f"<item jid='{JULIET}' name='{id}'/>" for id in "ab")
    romeo.receives(f"<iq type='result' id='d'><query xmlns='{DISCO_ITEMS}' node='shelf'>{listed}</query></iq>")


# ---- quotas (S59) ---------------------------------------------------------------------------


@pytest.mark.config(limits={"pep_nodes": 3})
def test_there_are_not_too_many_nodes(juliet: Client) -> None:
    """S59"""
    for name in "abc":
        publishes(juliet, name, item("m"))
    for text in (publish("d", item("m")), request("<create node='d'/>")):
        juliet.sends(text)
        juliet.receives(error("resource-constraint"))
    publishes(juliet, "a", item("n"))


@pytest.mark.config(limits={"pep_bytes": 20_000})
def test_items_count_with_their_ids(juliet: Client) -> None:
    """S59: or empty items with long ids would fill the disk; what is overwritten doesn't count."""
    for number in range(27):
        publishes(juliet, f"n{number}", f"<item id='{number:0500}'><x xmlns='urn:x'/></item>")
    publishes(juliet, "n1", f"<item id='{1:0500}'><x xmlns='urn:x'/></item>")
    juliet.sends(publish("n", f"<item id='{28:0500}'><x xmlns='urn:x'/></item>"))
    juliet.receives(error("resource-constraint"))
    juliet.sends(ask_items("n"))
    juliet.receives(error("item-not-found"))


@pytest.mark.config(limits={"pep_items": 3})
def test_as_many_as_possible_is_a_number(juliet: Client) -> None:
    """S59, XEP-0060 §16.4.4: `max`"""
    for id in "abcd":
        publishes(juliet, "shelf", item(id), max_items="max")
    juliet.sends(ask_items("shelf"))
    juliet.receives(items_of("shelf", *map(item, "bcd")))
    juliet.sends(publish("other", item("m"), max_items="4"))
    juliet.receives(error("not-acceptable"))


# ---- well-known nodes ------------------------------------------------------------------------

WELL_KNOWN = {  # the last example of each specification, more or less
    "http://jabber.org/protocol/nick": "<nick xmlns='http://jabber.org/protocol/nick'>Ishmael</nick>",
    MOOD: f"<mood xmlns='{MOOD}'><annoyed/><text>curse my nurse!</text></mood>",
    "http://jabber.org/protocol/activity": "<activity xmlns='http://jabber.org/protocol/activity'><relaxing><partying/>"
    "</relaxing><text xml:lang='en'>My nurse&apos;s birthday!</text></activity>",
    TUNE: f"<tune xmlns='{TUNE}'><artist>Yes</artist><title>Heart of the Sunrise</title></tune>",
    "urn:xmpp:vcard4": "<vcard xmlns='urn:ietf:params:xml:ns:vcard-4.0'><fn><text>Juliet</text></fn></vcard>",
}


@pytest.mark.parametrize("node", WELL_KNOWN)
def test_extended_presence_reaches_friends(juliet: Client, romeo: Client, node: str) -> None:
    """XEP-0172, XEP-0107, XEP-0108, XEP-0118, XEP-0292"""
    friends(juliet, romeo)
    wants(romeo, node)
    publishes_in_company(juliet, node)
    romeo.receives(event(node, item("m"), by=FROM_BALCONY))
    publishes(juliet, node, item("n", WELL_KNOWN[node]))
    romeo.receives(event(node, item("n", WELL_KNOWN[node]), by=FROM_BALCONY))
    romeo.sends(ask_items(node))
    romeo.receives(items_of(node, item("n", WELL_KNOWN[node])))


@pytest.mark.parametrize("old", [True, False])
def test_strangers_fetch_the_keys_of_every_device(juliet: Client, romeo: Client, nurse: Client, old: bool) -> None:
    """XEP-0384 §5.3, and the one node per device of before: as Conversations and Dino publish and fetch them."""
    friends(juliet, romeo)
    devices = "eu.siacs.conversations.axolotl.devicelist" if old else "urn:xmpp:omemo:2:devices"
    wants(romeo, devices)
    listed = "<list xmlns='eu.siacs.conversations.axolotl'><device id='31415'/><device id='27182'/></list>"
    publishes_in_company(juliet, devices, "current", access_model="open", persist_items="true")
    romeo.receives(event(devices, item("current"), by=FROM_BALCONY))
    publishes(juliet, devices, item("current", listed), access_model="open", persist_items="true")
    romeo.receives(event(devices, item("current", listed), by=FROM_BALCONY))
    nurse.sends(ask_items(devices))
    nurse.receives(items_of(devices, item("current", listed)))
    for id in ("31415", "27182"):
        bundle = f"<bundle xmlns='eu.siacs.conversations.axolotl'><identityKey>{id}</identityKey></bundle>"
        if old:
            node, name = f"eu.siacs.conversations.axolotl.bundles:{id}", "current"
            publishes(juliet, node, item(name, bundle), access_model="open", persist_items="true")
        else:
            node, name = "urn:xmpp:omemo:2:bundles", id
            publishes(juliet, node, item(name, bundle), access_model="open", max_items="max")
    for id in ("31415", "27182"):
        node, name = (f"eu.siacs.conversations.axolotl.bundles:{id}", "current") if old else ("urn:xmpp:omemo:2:bundles", id)
        bundle = f"<bundle xmlns='eu.siacs.conversations.axolotl'><identityKey>{id}</identityKey></bundle>"
        nurse.sends(ask_items(node, f"<item id='{name}'/>"))
        nurse.receives(items_of(node, item(name, bundle)))


@pytest.mark.parametrize("node", ["urn:xmpp:bookmarks:1", "storage:bookmarks", "urn:xmpp:mds:displayed:0"])
def test_private_data_is_private_whatever_the_client_forgets(juliet: Client, romeo: Client, node: str) -> None:
    """S57, XEP-0223 §2"""
    friends(juliet, romeo)
    wants(romeo, node)
    publishes_in_company(juliet, node)
    romeo.receives_nothing()
    romeo.sends(ask_items(node))
    romeo.receives(error("not-allowed", "closed-node"))


def test_what_has_been_read_is_known_to_all_devices(server: MemoryServer, juliet: Client) -> None:
    """XEP-0490 §4: one item per chat, republished again and again"""
    node = "urn:xmpp:mds:displayed:0"
    chamber = server.client().login("juliet", resource="chamber")
    comes_online(chamber, node)
    options = {"persist_items": "true", "max_items": "max", "send_last_published_item": "never", "access_model": "whitelist"}

    def displayed(id: str) -> str:
        return f"<displayed xmlns='{node}'><stanza-id xmlns='urn:xmpp:sid:0' by='{JULIET}' id='{id}'/></displayed>"

    for chat, id in (("romeo@montegue.lit", "1"), ("example@conference.shakespeare.lit", "2"), ("romeo@montegue.lit", "3")):
        publishes(juliet, node, item(chat, displayed(id)), **options)
        chamber.receives(event(node, item(chat, displayed(id)), by=FROM_BALCONY))
    juliet.sends(ask_items(node, to=""))
    juliet.receives(items_of(node, item("example@conference.shakespeare.lit", displayed("2")),
                             item("romeo@montegue.lit", displayed("3"))))  # fmt: skip


# ---- accounts that go, servers that restart ---------------------------------------------------


def test_the_next_owner_of_a_name_inherits_nothing(server: MemoryServer, juliet: Client, romeo: Client) -> None:
    """DESIGN §7, trap 13: no subscription, no place on a list, no item"""
    publishes(juliet, MOOD, item("m"), access_model="open")
    publishes(juliet, TUNE, item("m"), access_model="whitelist")
    listed = f"<affiliations node='{TUNE}'><affiliation jid='{ROMEO}' affiliation='publisher'/></affiliations>"
    succeeds(juliet, request(listed, namespace=OWNER))
    romeo.sends(subscribe(MOOD, ROMEO))
    romeo.receives(subscribed(MOOD, ROMEO))
    publishes(romeo, MOOD, item("r"), access_model="open")
    romeo.sends("<iq type='set' id='r'><query xmlns='jabber:iq:register'><remove/></query></iq>")
    romeo.receives("<iq type='result' id='r'/>")
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    server.add_account(ROMEO)
    heir = server.client().login("romeo", resource="orchard")
    heir.sends(request("<subscriptions/>", type="get", to=JULIET))
    heir.receives(f"<iq type='result' id='p'><pubsub xmlns='{PUBSUB}'><subscriptions/></pubsub></iq>")
    heir.sends(ask_items(TUNE))
    heir.receives(error("not-allowed", "closed-node"))
    heir.sends(ask_items(MOOD, to=""))
    heir.receives(error("item-not-found"))
    publishes(heir, MOOD, item("h"))
    heir.sends(ask_items(MOOD, to=""))
    heir.receives(items_of(MOOD, item("h")))


def test_everything_is_there_after_a_restart(process_server: ProcessServer) -> None:
    """XEP0163-3-3: over the wire; items in their order, configuration, subscriptions, affiliations"""
    juliet = process_server.client().login("juliet", resource="balcony")
    romeo = process_server.client().login("romeo", resource="orchard")
    publishes(juliet, "shelf", *map(item, "abc"), access_model="open", max_items="3")
    publishes(juliet, "shelf", item("a"))
    romeo.sends(subscribe("shelf", ROMEO))
    romeo.receives(subscribed("shelf", ROMEO))
    for client in (juliet, romeo):
        client.closes()
    process_server.kill()
    process_server.start()
    juliet = process_server.client().login("juliet", resource="balcony")
    romeo = process_server.client().login("romeo", resource="orchard")
    romeo.comes_online()
    juliet.sends(ask_items("shelf"))
    juliet.receives(items_of("shelf", *map(item, "bca")))
    publishes(juliet, "shelf", item("d"))
    romeo.receives_in_any_order(event("shelf", "<retract id='b'/>"), event("shelf", item("d")))


@pytest.mark.wire
def test_a_mood_reaches_a_friend_over_the_wire(juliet: Client, romeo: Client) -> None:
    """XEP0163-4.3.3-1"""
    friends(juliet, romeo)
    wants(romeo, MOOD)
    publishes_in_company(juliet, MOOD)
    romeo.receives(event(MOOD, item("m"), by=FROM_BALCONY))


def test_names_are_escaped(juliet: Client) -> None:
    """The event is written by hand: it must be well-formed for the strictest reader."""
    comes_online(juliet, "a&'")
    publishes(juliet, "a&'", item("&apos;&quot;&gt;"))
    juliet.receives(event("a&amp;&apos;", item("&apos;&quot;&gt;"), by=FROM_BALCONY))
