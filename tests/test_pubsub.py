"""The core of publish-subscribe, without a stanza: who may read and publish, preconditions, the order of items."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xmppd
from xmppd import JID, Node, PublishedItem, StanzaError, Viewer

JULIET, ROMEO = JID.parse("juliet@example.org"), JID.parse("romeo@example.org/orchard")


def viewer(who: str) -> Viewer:
    """The owner, a friend in the group Friends, a contact without groups, or a stranger."""
    groups = frozenset({"Friends"}) if who == "friend" else frozenset()
    return Viewer(ROMEO, is_owner=who == "owner", sees=who != "stranger", groups=groups)


def node(model: str, *, affiliation: str = "", subscription: str = "", **config: object) -> Node:
    """A node of this access model, whose group is Friends, with romeo in a role."""
    values = {"pubsub#access_model": model, "pubsub#roster_groups_allowed": ["Friends"]}
    return Node(
        "n",
        values | {f"pubsub#{name}": value for name, value in config.items()},
        {"romeo@example.org": affiliation} if affiliation else {},
        {"romeo@example.org/garden": subscription} if subscription else {},
    )


# who may read: XEP-0060 §4.5, §6.5.9; "" is yes
REFUSALS = {
    "open": {"owner": "", "friend": "", "contact": "", "stranger": ""},
    "presence": {"owner": "", "friend": "", "contact": "", "stranger": "presence-subscription-required"},
    "roster": {"owner": "", "friend": "", "contact": "not-in-roster-group", "stranger": "not-in-roster-group"},
    "authorize": {"owner": "", "friend": "not-subscribed", "contact": "not-subscribed", "stranger": "not-subscribed"},
    "whitelist": {"owner": "", "friend": "closed-node", "contact": "closed-node", "stranger": "closed-node"},
}
CONDITIONS = {"closed-node": "not-allowed"}  # else not-authorized


def refusal(found: StanzaError | None) -> tuple[str, str]:
    """The two conditions of an error."""
    assert found is not None
    return found.condition, "" if found.application is None else xmppd.local_name(found.application.tag)


@pytest.mark.parametrize("model", REFUSALS)
@pytest.mark.parametrize("who", ["owner", "friend", "contact", "stranger"])
def test_the_access_model_says_who_may_read(model: str, who: str) -> None:
    """XEP0060-4.5-1, XEP0060-6.5.9-1, XEP0163-5-4"""
    detail = REFUSALS[model][who]
    found = node(model).refusal(viewer(who))
    if detail:
        assert refusal(found) == (CONDITIONS.get(detail, "not-authorized"), detail)
    else:
        assert found is None


@pytest.mark.parametrize("model", REFUSALS)
@pytest.mark.parametrize(
    ("affiliation", "may"), [("publisher", True), ("member", True), ("outcast", False)]
)
def test_an_affiliation_counts_more_than_the_model(model: str, affiliation: str, may: bool) -> None:
    """XEP0060-4.1-1, XEP0060-12.12-1, XEP0060-6.1.3.8-1"""
    for who in ("friend", "stranger"):
        found = node(model, affiliation=affiliation).refusal(viewer(who))
        assert (found is None) is may
        assert may or refusal(found) == ("forbidden", "")
    assert node(model, affiliation="outcast").may_read(viewer("owner"))


def test_who_is_approved_may_read_by_any_resource() -> None:
    assert node("authorize", subscription="subscribed").may_read(viewer("stranger"))
    assert not node("authorize", subscription="pending").may_read(viewer("stranger"))


@pytest.mark.parametrize(
    ("model", "affiliation", "subscription", "may"),
    [
        ("publishers", "", "", False),
        ("publishers", "", "subscribed", False),
        ("publishers", "member", "", False),
        ("publishers", "publisher", "", True),
        ("subscribers", "", "", False),
        ("subscribers", "", "pending", False),
        ("subscribers", "", "subscribed", True),
        ("open", "", "", True),
        ("open", "outcast", "", False),
    ],
)
def test_the_publish_model_says_who_may_publish(model: str, affiliation: str, subscription: str, may: bool) -> None:
    """XEP0060-7.1.3.1-1, XEP0163-2.2-1"""
    one = node("open", affiliation=affiliation, subscription=subscription, publish_model=model)
    one.check_publish(viewer("owner"))
    if may:
        one.check_publish(viewer("friend"))
    else:
        with pytest.raises(StanzaError, match="forbidden"):
            one.check_publish(viewer("friend"))


def test_who_may_only_publish_changes_their_own_items_only() -> None:
    """XEP-0060 §4.1, table 1"""
    theirs, hers = (PublishedItem("i", "", by, "") for by in ("romeo@example.org/garden", "juliet@example.org/balcony"))
    anybody = node("open", publish_model="open")
    assert anybody.may_change(viewer("stranger"), theirs) and not anybody.may_change(viewer("stranger"), hers)
    assert node("open", affiliation="publisher").may_change(viewer("stranger"), hers)


@pytest.mark.parametrize(
    ("options", "unmet"),
    [
        ({}, ""),
        ({"pubsub#access_model": "open"}, ""),
        ({"pubsub#access_model": "whitelist"}, "pubsub#access_model"),
        ({"pubsub#max_items": 1}, ""),
        ({"pubsub#max_items": "max"}, "pubsub#max_items"),
        ({"pubsub#access_model": "open", "pubsub#persist_items": False}, "pubsub#persist_items"),
        ({"pubsub#roster_groups_allowed": ["Friends"]}, ""),
        ({"pubsub#roster_groups_allowed": ["Friends", "Enemies"]}, "pubsub#roster_groups_allowed"),
    ],
)
def test_preconditions_are_compared_with_what_holds(options: dict[str, object], unmet: str) -> None:
    """XEP0060-7.1.5-1: also with what nobody has configured."""
    assert xmppd.unmet_precondition(node("open"), options) == unmet


@pytest.mark.parametrize("name", ["urn:xmpp:bookmarks:1", "storage:bookmarks", "urn:xmpp:mds:displayed:0",
                                  "urn:xmpp:openpgp:0:secret-key"])  # fmt: skip
def test_private_nodes_are_private_whatever_the_client_forgets(name: str) -> None:
    """S57"""
    assert Node(name).is_private
    assert not Node("http://jabber.org/protocol/mood").is_private
    assert not Node(name, affiliations={"romeo@example.org": "member"}).is_private


# ---- items ----------------------------------------------------------------------------

EVENT_TYPES = [  # persist_items, deliver_payloads, items, the error: XEP-0060 §4.3, table 4; §7.1.3.7
    (True, True, "", "item-required"),
    (True, True, "<item/>", "payload-required"),
    (True, True, "<item><x xmlns='urn:x'/></item>", ""),
    (True, True, "<item><x xmlns='urn:x'/><y xmlns='urn:x'/></item>", "invalid-payload"),
    (True, True, "<item><x xmlns=''/></item>", "invalid-payload"),
    (True, False, "", "item-required"),
    (True, False, "<item/>", ""),
    (True, False, "<item><x xmlns='urn:x'/></item>", ""),
    (False, True, "", "item-required"),
    (False, True, "<item/>", "payload-required"),
    (False, True, "<item><x xmlns='urn:x'/></item>", ""),
    (False, False, "", ""),
    (False, False, "<item/>", "item-forbidden"),
]


@pytest.mark.parametrize(("persist", "payloads", "items", "wrong"), EVENT_TYPES)
def test_items_are_what_the_node_is_configured_for(persist: bool, payloads: bool, items: str, wrong: str) -> None:
    """XEP0060-4.3-1, XEP0060-7.1.3.6-1, XEP0060-7.1.3.7-1"""
    parsed = list(xmppd.parse_element(f"<publish xmlns='urn:p'>{items}</publish>"))
    one = node("open", persist_items=persist, deliver_payloads=payloads)
    if wrong:
        with pytest.raises(StanzaError) as found:
            xmppd.check_event_type(one, parsed)
        assert refusal(found.value) == ("bad-request", wrong)
    else:
        xmppd.check_event_type(one, parsed)


def made(id: str, size: int = 0) -> PublishedItem:
    return PublishedItem(id, f"<x xmlns='urn:x'>{'x' * size}</x>", "juliet@example.org", "")


def test_an_answer_holds_what_fits_but_always_one_item() -> None:
    huge = xmppd.MAX_ANSWER_BYTES
    items = [made("a", huge // 2), made("b", huge // 3), made("c", huge // 3)]
    assert [item.id for item in xmppd.fitting_items(items, newest=False)] == ["a", "b"]
    assert [item.id for item in xmppd.fitting_items(items, newest=True)] == ["b", "c"]
    assert xmppd.fitting_items([made("z", huge)], newest=True) and not xmppd.fitting_items([], newest=True)


class Shop:
    """A store on disk that can be closed and opened again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open()

    def open(self) -> None:
        self.loop = xmppd.Loop()
        self.storage = xmppd.Storage(self.folder, self.loop, sync=False, freeze=True)
        self.store = xmppd.PubsubStore(self.storage)

    def close(self) -> None:
        self.storage.close()
        self.loop.close()


NODES = ("urn:xmpp:avatar:data", "eu.siacs.conversations.axolotl.bundles:1", "mood", "mood2")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(NODES), st.sampled_from("abcd")),
        st.tuples(st.just("retract"), st.sampled_from(NODES), st.sampled_from("abcd")),
        st.tuples(st.just("delete"), st.sampled_from(NODES), st.just("")),
        st.tuples(st.just("restart"), st.just(""), st.just("")),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=30)
@given(steps=STEPS)
def test_items_stand_in_the_order_of_their_publication(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    """XEP-0060 §12.1, XEP0060-12.9-1: republished ones come last, also after a restart."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    expected: dict[str, list[str]] = {name: [] for name in NODES}
    for step, name, id in steps:
        if step == "restart":
            shop.close()
            shop.open()
            continue
        kept = expected[name]
        if id in kept:
            kept.remove(id)
        if step == "publish":
            shop.store.publish(JULIET, name, made(id))
            kept.append(id)
        elif step == "retract":
            shop.store.retract(JULIET, name, id)
        else:
            shop.store.delete(JULIET, name)
            kept.clear()
    for name, ids in expected.items():
        assert shop.store.ids(JULIET, name) == ids == [item.id for item in shop.store.items(JULIET, name)]
        last = shop.store.last(JULIET, name)
        assert (last.id if last else None) == (ids[-1] if ids else None)
    assert shop.store.size(JULIET) == sum(made(id).size for ids in expected.values() for id in ids)
    shop.close()


def test_a_nodes_items_are_not_those_of_one_whose_name_begins_alike(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.store.publish(JULIET, "mood", made("1\nb"))
    assert shop.store.ids(JULIET, "mood") == ["1\nb"] and shop.store.ids(JULIET, "mood\n1") == []
    shop.close()


def test_the_order_of_a_bounded_number_of_accounts_is_in_memory(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    for number in range(xmppd.MAX_INDEXED + 10):
        shop.store.ids(JID(f"u{number}", "example.org", ""), "n")
    assert len(shop.store._indexes) == xmppd.MAX_INDEXED
    shop.close()
