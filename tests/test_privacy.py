"""Privacy lists (XEP-0016): the decision by table and property, the lists and their effect by dialogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xmppd
from tests.dialogue import STANZA_ERRORS, Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer
from xmppd import JID, Rule, decide, rules_by_key

PRIVACY = "jabber:iq:privacy"
KINDS = ("message", "iq", "presence-in", "presence-out", xmppd.ANYTHING)


# ---- the decision ---------------------------------------------------------------------

DENY_ALL = Rule(99, "deny")


@pytest.mark.parametrize(
    ("value", "contact", "fits"),
    [
        ("tybalt@example.com/pda", "tybalt@example.com/pda", True),
        ("tybalt@example.com/pda", "tybalt@example.com/home", False),
        ("tybalt@example.com/pda", "tybalt@example.com", False),
        ("tybalt@example.com", "tybalt@example.com/pda", True),
        ("tybalt@example.com", "tybalt@example.com", True),
        ("tybalt@example.com", "paris@example.com", False),
        ("example.com/pda", "example.com/pda", True),
        ("example.com/pda", "tybalt@example.com/pda", False),
        ("example.com/pda", "example.com", False),
        ("example.com", "example.com", True),
        ("example.com", "example.com/pda", True),
        ("example.com", "tybalt@example.com", True),
        ("example.com", "tybalt@example.com/pda", True),
        ("example.com", "tybalt@sub.example.com", False),
        ("example.com", "tybalt@example.org", False),
    ],
)
def test_whom_an_address_means(value: str, contact: str, fits: bool) -> None:
    """XEP0016-2.1-1"""
    rules = rules_by_key([Rule(1, "deny", "jid", value)])
    assert decide(rules, "message", JID.parse(contact), "none", ()) is not fits


@pytest.mark.parametrize("relation", ["none", "to", "from", "both"])
@pytest.mark.parametrize("value", ["none", "to", "from", "both"])
def test_a_subscription_is_matched_exactly(value: str, relation: str) -> None:
    """XEP0016-2.1-4"""
    rules = rules_by_key([Rule(1, "deny", "subscription", value)])
    assert decide(rules, "iq", JID.parse("tybalt@example.com"), relation, ()) is (value != relation)


@pytest.mark.parametrize(
    ("groups", "allowed"), [((), True), (("Enemies",), False), (("Friends", "Enemies"), False), (("enemies",), True)]
)
def test_a_group_is_one_of_the_contacts(groups: Sequence[str], allowed: bool) -> None:
    rules = rules_by_key([Rule(1, "deny", "group", "Enemies")])
    assert decide(rules, "iq", JID.parse("tybalt@example.com"), "both", groups) is allowed


@pytest.mark.parametrize("kinds", [(), ("message",), ("iq",), ("presence-in",), ("presence-out",), ("iq", "message")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_children_limit_a_rule_to_their_kinds(kinds: Sequence[str], kind: str) -> None:
    """XEP0016-2.1-9, XEP0016-2.1-5, XEP0016-2.13-1"""
    rules = rules_by_key([Rule(1, "deny", kinds=kinds)])
    assert decide(rules, kind, JID.parse("tybalt@example.com"), "none", ()) is not (not kinds or kind in kinds)


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ([], True),  # XEP0016-2.2-6
        ([Rule(1, "allow", "jid", "tybalt@example.com"), Rule(2, "deny")], True),
        ([Rule(2, "allow", "jid", "tybalt@example.com"), Rule(1, "deny")], False),
        ([Rule(5, "deny", "jid", "example.com"), Rule(4, "allow", "group", "Cousins")], True),
        ([Rule(5, "allow", "jid", "tybalt@example.com/pda"), Rule(4, "deny", "jid", "example.com")], False),
        ([Rule(10, "deny", "subscription", "both"), Rule(9, "allow", "jid", "example.com", ("iq",))], False),
    ],
)
def test_the_first_rule_in_order_decides(rules: Sequence[Rule], allowed: bool) -> None:
    """XEP0016-2.2-5, XEP0016-2.2-6"""
    ready = rules_by_key(rules)
    assert decide(ready, "message", JID.parse("tybalt@example.com/pda"), "both", ["Cousins"]) is allowed


addresses = st.sampled_from(["a@x", "a@x/r", "b@x", "x", "x/r", "a@y", "y"])
groups = st.sampled_from(["G", "H", "x"])
relations = st.sampled_from(["none", "to", "from", "both"])
abouts = st.one_of(
    st.tuples(st.just("jid"), addresses),
    st.tuples(st.just("group"), groups),
    st.tuples(st.just("subscription"), relations),
    st.just(("", "")),
)
kinds = st.sets(st.sampled_from(xmppd.RULE_KINDS)).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def privacy_lists(draw: st.DrawFn) -> list[Rule]:
    orders = draw(st.lists(st.integers(0, xmppd.MAX_ORDER), unique=True, max_size=12))
    return [Rule(order, draw(st.sampled_from(["allow", "deny"])), *draw(abouts), draw(kinds)) for order in orders]


def means(rule: Rule, contact: str, relation: str, groups: Iterable[str]) -> bool:
    """Tell whether a rule is about the contact, in the words of XEP-0016 §2.1."""
    bare = contact.partition("/")[0]
    domain = bare.rpartition("@")[2]
    if rule.type == "jid":
        return rule.value == contact or (rule.value == bare) or rule.value == domain
    if rule.type == "group":
        return rule.value in groups
    return rule.type == "" or rule.value == relation


@given(privacy_lists(), st.sampled_from(KINDS), addresses, relations, st.lists(groups))
def test_looking_rules_up_is_the_same_as_trying_one_after_the_other(
    rules: list[Rule], kind: str, contact: str, relation: str, groups: list[str]
) -> None:
    """XEP0016-2.2-5"""
    expected = True
    for rule in sorted(rules, key=lambda rule: rule.order):
        if (not rule.kinds or kind in rule.kinds) and means(rule, contact, relation, groups):
            expected = rule.action == "allow"
            break
    assert decide(rules_by_key(rules), kind, JID.parse(contact), relation, groups) is expected


@given(privacy_lists())
def test_a_list_is_the_same_after_it_was_stored_and_shown(rules: list[Rule]) -> None:
    assert [xmppd.rule_from(xmppd.rule_record(rule)) for rule in rules] == rules
    shown = [xmppd.rule_item(rule) for rule in rules]
    kinds_in_order = [rule._replace(kinds=tuple(k for k in xmppd.RULE_KINDS if k in rule.kinds)) for rule in rules]
    assert xmppd.read_rules(shown) == sorted(kinds_in_order)


# ---- phrases --------------------------------------------------------------------------


def item(value: str = "", *kinds: str, type: str = "jid", action: str = "deny", order: int = 1) -> str:
    """Return an <item/>; without a value, one for everybody."""
    about = f"type='{type}' value='{value}' " if value else ""
    return f"<item {about}action='{action}' order='{order}'>{''.join(f'<{kind}/>' for kind in kinds)}</item>"


def asks(client: Client, type: str, content: str, error: str = "") -> None:
    """Send a privacy query; the answer is an empty result, or an error with this condition, and comes next."""
    client.sends(f"<iq type='{type}' id='q'><query xmlns='{PRIVACY}'>{content}</query></iq>")
    if error:
        client.receives(f"<iq type='error' id='q'><error type='*'><{error} .../></error></iq>")
    else:
        client.receives("<iq type='result' id='q'/>")


def pushed(name: str) -> str:
    """Return the pattern of a privacy list push."""
    return f"<iq type='set' id='*'><query xmlns='{PRIVACY}'><list name='{name}'/></query></iq>"


def keeps(client: Client, name: str, *items: str) -> None:
    """Create or replace a list; the client receives the push."""
    asks(client, "set", f"<list name='{name}'>{''.join(items)}</list>")
    client.receives(pushed(name))


def uses(client: Client, *items: str) -> None:
    """Create a list and make it active; what comes because of it is dropped."""
    keeps(client, "mine", *items)
    activates(client, "<active name='mine'/>")


def activates(client: Client, active: str) -> None:
    """Choose the active list; what comes because of it is dropped."""
    client.sends(f"<iq type='set' id='activate'><query xmlns='{PRIVACY}'>{active}</query></iq>")
    answers = [stanza.get("type") for stanza in client.receives_anything() if stanza.get("id") == "activate"]
    assert answers == ["result"]


def names(client: Client) -> str:
    """Return the pattern's content of an answer that names all lists, as a test writes it down."""
    client.sends(f"<iq type='get' id='names'><query xmlns='{PRIVACY}'/></iq>")
    result = client.receives(f"<iq type='result' id='names'><query xmlns='{PRIVACY}'>...</query></iq>")
    return " ".join(f"{child.tag.partition('}')[2]}={child.get('name')}" for child in result[0])




@pytest.fixture
def friends(romeo: Client, juliet: Client) -> None:
    """Romeo and Juliet are available and see each other."""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)


def puts_in_group(client: Client, contact: str, group: str) -> None:
    """Change the contact's group; pushes and the answer are dropped."""
    group = f"<group>{group}</group>" if group else ""
    client.sends(f"<iq type='set' id='g'><query xmlns='jabber:iq:roster'><item jid='{contact}'>{group}</item></query></iq>")
    client.passes_barrier()


# ---- keeping lists --------------------------------------------------------------------


@pytest.mark.wire
def test_lists_are_created_shown_edited_and_removed(romeo: Client) -> None:
    """XEP0016-2.3-1, XEP0016-2.3-2, XEP0016-2.6-1, XEP0016-2.7-1, XEP0016-2.8-1, XEP0016-2.2-9"""
    assert names(romeo) == ""
    tybalt, anybody = item("tybalt@example.com", order=3), item(action="allow", order=68)
    paris = item("paris@example.org", "message", "iq", order=5)
    keeps(romeo, "public", anybody, tybalt)
    keeps(romeo, "special", item("both", type="subscription", action="allow", order=10))
    asks(romeo, "set", "<default name='public'/>")
    asks(romeo, "set", "<active name='special'/>")
    assert names(romeo) == "active=special default=public list=public list=special"
    keeps(romeo, "public", tybalt, paris, anybody)
    romeo.sends(f"<iq type='get' id='g'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>")
    shown = f"<list name='public'>{tybalt}{paris}{anybody}</list>"
    romeo.receives(f"<iq type='result' id='g'><query xmlns='{PRIVACY}'>{shown}</query></iq>")
    asks(romeo, "set", "<list name='public'/>")  # its own default list
    assert names(romeo) == "active=special list=special"
    asks(romeo, "set", "<list name='special'/>")  # its own active list
    assert names(romeo) == ""


def test_lists_outlive_the_server(process_server) -> None:  # type: ignore[no-untyped-def]
    romeo = process_server.client().login("romeo")
    keeps(romeo, "public", item("tybalt@example.com", "iq", order=3))
    asks(romeo, "set", "<default name='public'/>")
    process_server.stop()
    process_server.cast.hang_up()
    process_server.start()
    romeo = process_server.client().login("romeo")
    assert names(romeo) == "default=public list=public"
    romeo.sends(f"<iq type='get' id='g'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>")
    shown = item("tybalt@example.com", "iq", order=3)
    romeo.receives(f"<iq type='result' id='g'><query xmlns='{PRIVACY}'><list name='public'>{shown}</list></query></iq>")


def test_every_connected_resource_hears_of_a_changed_list(server: MemoryServer, romeo: Client) -> None:
    """XEP0016-2.2-9, XEP0016-2.6-1: available or not, and whether it has ever asked for lists or not"""
    home = server.client().login("romeo", resource="home")
    keeps(romeo, "public", item())
    home.receives(pushed("public"))
    home.sends("<iq type='result' id='push'/>")
    keeps(romeo, "public", item("tybalt@example.com"))
    home.receives(pushed("public"))


def test_a_list_that_does_not_exist(romeo: Client) -> None:
    """XEP0016-2.3-2, XEP0016-2.4-1, XEP0016-2.5-1, XEP0016-2.8-1"""
    keeps(romeo, "public", item())
    asks(romeo, "set", "<active name='public'/>")
    asks(romeo, "set", "<default name='public'/>")
    asks(romeo, "get", "<list name='The Empty Set'/>", "item-not-found")
    for content in (f"<{kind} name='The Empty Set'/>" for kind in ("active", "default", "list")):
        asks(romeo, "set", content, "item-not-found")
    assert names(romeo) == "active=public default=public list=public"


MALFORMED_QUERIES = [
    ("get", "<list name='public'/><list name='private'/>"),  # XEP0016-2.3-3
    ("get", "<list/>"),
    ("get", "<list name=''/>"),
    ("get", "<lists/>"),
    ("set", ""),
    ("set", "<active name='public'/><default name='public'/>"),  # XEP0016-2.1-8
    ("set", "<list name='public'/><list name='private'/>"),  # XEP0016-2.8-1
    ("set", "<other name='public'/>"),
    ("set", "<list xmlns='urn:other' name='public'/>"),
    ("set", "<list/>"),
    ("set", f"<list>{item()}</list>"),
    ("set", f"<list name=''>{item()}</list>"),
    ("set", f"<list name='public'>{item()}{item()}</list>"),  # XEP0016-2.1-7
    ("set", "<list name='public'><item type='jid' value='@' action='deny' order='1'/></list>"),  # XEP0016-2.1-2
]


def test_a_malformed_query_changes_nothing(romeo: Client) -> None:
    """XEP0016-2.3-3, XEP0016-2.1-8, XEP0016-2.8-1"""
    public = item("tybalt@example.com", "iq", order=7)
    keeps(romeo, "public", public)
    keeps(romeo, "private", item())
    for type, content in MALFORMED_QUERIES:
        asks(romeo, type, content, "bad-request")
    assert names(romeo) == "list=public list=private"
    romeo.sends(f"<iq type='get' id='g'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>")
    romeo.receives(f"<iq type='result' id='g'><query xmlns='{PRIVACY}'><list name='public'>{public}</list></query></iq>")


@pytest.mark.parametrize(
    "items",
    [
        "<item type='jid' value='@example.com' action='deny' order='1'/>",  # XEP0016-2.1-2
        "<item type='jid' value='a@b@c' action='deny' order='1'/>",
        "<item type='jid' value='' action='deny' order='1'/>",
        "<item type='jid' action='deny' order='1'/>",
        "<item type='group' action='deny' order='1'/>",
        "<item type='group' value='' action='deny' order='1'/>",
        "<item type='subscription' value='remove' action='deny' order='1'/>",  # XEP0016-2.1-4
        "<item type='subscription' value='Both' action='deny' order='1'/>",
        "<item type='subscription' action='deny' order='1'/>",
        "<item type='domain' value='example.com' action='deny' order='1'/>",
        "<item order='1'/>",  # XEP0016-2.1-6
        "<item action='block' order='1'/>",
        "<item action='deny'/>",  # XEP0016-2.1-7
        "<item action='deny' order=''/>",
        "<item action='deny' order='-1'/>",
        "<item action='deny' order='1.5'/>",
        "<item action='deny' order='one'/>",
        "<item action='deny' order='４'/>",
        "<item action='deny' order='4294967296'/>",
        "<item action='deny' order='1'/><item action='allow' order='1'/>",
        "<item action='deny' order='1'/><item action='allow' order='01'/>",
        "<item action='deny' order='1'><presence/></item>",
        "<item action='deny' order='1'><message xmlns='urn:other'/></item>",
        "<item xmlns='urn:other' action='deny' order='1'/>",
        "<list name='public'/>",
    ],
)
def test_malformed_rules(items: str) -> None:
    """XEP0016-2.1-2, XEP0016-2.1-4, XEP0016-2.1-6, XEP0016-2.1-7"""
    with pytest.raises(xmppd.StanzaError) as refusal:
        xmppd.read_rules(xmppd.parse_element(f"<list xmlns='{PRIVACY}'>{items}</list>"))
    assert refusal.value.condition == "bad-request"


def test_a_group_has_to_be_in_the_roster(romeo: Client) -> None:
    """XEP0016-2.1-3"""
    enemies = f"<list name='l'>{item('Enemies', type='group')}</list>"
    asks(romeo, "set", enemies, "item-not-found")
    assert names(romeo) == ""
    puts_in_group(romeo, "tybalt@example.com", "Enemies")
    romeo.receives_anything()
    asks(romeo, "set", enemies)
    romeo.receives(pushed("l"))


def test_addresses_are_kept_prepared(romeo: Client) -> None:
    keeps(romeo, "public", item("Tybalt@EXAMPLE.com/Pda"))
    romeo.sends(f"<iq type='get' id='g'><query xmlns='{PRIVACY}'><list name='public'/></query></iq>")
    shown = item("tybalt@example.com/Pda")
    romeo.receives(f"<iq type='result' id='g'><query xmlns='{PRIVACY}'><list name='public'>{shown}</list></query></iq>")


def test_a_list_in_use_elsewhere_is_not_removed_nor_replaced_as_default(server: MemoryServer, romeo: Client) -> None:
    """XEP0016-2.2-10, XEP0016-2.5-1, XEP0016-2.5-2, XEP0016-2.8-1"""
    keeps(romeo, "public", item())
    keeps(romeo, "private", item())
    asks(romeo, "set", "<default name='public'/>")
    home = server.client().login("romeo", resource="home")
    for change in ("<default name='private'/>", "<default/>", "<list name='public'/>"):
        asks(romeo, "set", change, "conflict")
    asks(romeo, "set", "<default name='public'/>")  # nothing changes
    asks(home, "set", "<active name='private'/>")
    asks(romeo, "set", "<list name='private'/>", "conflict")
    assert names(romeo) == "default=public list=public list=private"
    asks(romeo, "set", "<default/>")  # home has an active list
    asks(romeo, "set", "<default name='public'/>")
    asks(home, "set", "<active/>")
    asks(romeo, "set", "<default/>", "conflict")
    home.closes()
    asks(romeo, "set", "<list name='public'/>")
    assert names(romeo) == "list=private"


def test_editing_a_list_in_use_elsewhere_is_no_conflict(server: MemoryServer, romeo: Client, nurse: Client) -> None:
    """XEP0016-2.2-7"""
    home = server.client().login("romeo", resource="home")
    keeps(romeo, "public", item("nurse@example.org", "message"))
    home.receives(pushed("public"))
    asks(home, "set", "<active name='public'/>")
    nurse.sends("<message to='romeo@example.org/home' id='m1'/>")
    nurse.receives("<message type='error' id='m1'><error type='cancel'><service-unavailable .../></error></message>")
    keeps(romeo, "public", item("tybalt@example.com", "message"))
    home.receives(pushed("public"))
    nurse.sends("<message to='romeo@example.org/home' id='m2'/>")
    home.receives("<message from='nurse@example.org/chamber' id='m2'/>")


@pytest.mark.config(limits={"privacy_lists": 2, "privacy_rules": 3})
def test_lists_and_rules_are_limited(romeo: Client) -> None:
    """S59"""
    keeps(romeo, "a", item(order=1), item("x", order=2))
    keeps(romeo, "b", item())
    asks(romeo, "set", f"<list name='c'>{item()}</list>", "resource-constraint")
    asks(romeo, "set", f"<list name='b'>{item(order=1)}{item(order=2)}</list>", "resource-constraint")
    keeps(romeo, "a", item(order=4), item("y", order=5))
    romeo.sends("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='x'/></block></iq>")
    romeo.receives("<iq type='error' id='b'><error type='wait'><resource-constraint .../></error></iq>")
    long = "n" * 1024
    asks(romeo, "set", f"<list name='{long}'>{item()}</list>", "not-acceptable")
    assert names(romeo) == "list=a list=b"


def test_the_lists_of_others_are_refused(romeo: Client) -> None:
    """XEP0016-2.1-11"""
    for who in ("juliet@example.org", "nobody@example.org"):
        for type, content in (("get", ""), ("set", f"<list name='l'>{item()}</list>")):
            romeo.sends(f"<iq type='{type}' id='o' to='{who}'><query xmlns='{PRIVACY}'>{content}</query></iq>")
            romeo.receives("<iq type='error' id='o'><error type='cancel'><service-unavailable .../></error></iq>")
    romeo.sends(f"<iq type='get' id='s' to='{romeo.bare}'><query xmlns='{PRIVACY}'/></iq>")
    romeo.receives(f"<iq type='result' id='s'><query xmlns='{PRIVACY}'/></iq>")


def test_the_server_says_that_it_knows_lists(romeo: Client) -> None:
    """XEP0016-3-1"""
    romeo.sends("<iq type='get' id='d' to='example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    info = romeo.receives("<iq type='result' id='d'><query ...>...</query></iq>")
    assert PRIVACY in [feature.get("var") for feature in info[0]]


# ---- which list counts ----------------------------------------------------------------


def test_an_active_list_is_the_sessions_own_and_ends_with_it(server: MemoryServer, romeo: Client, nurse: Client) -> None:
    """XEP0016-2.2-1, XEP0016-2.2-2, XEP0016-2.2-3, XEP0016-2.4-2"""
    home = server.client().login("romeo", resource="home")
    refused = "<message type='error' id='{}'><error type='cancel'><service-unavailable .../></error></message>"
    keeps(romeo, "closed", item("nurse@example.org"))
    keeps(romeo, "open", item("tybalt@example.com"))
    home.receives(pushed("closed"), pushed("open"))
    asks(romeo, "set", "<active name='closed'/>")
    nurse.sends("<message to='romeo@example.org/orchard' id='m1'/><message to='romeo@example.org/home' id='m2'/>")
    nurse.receives(refused.format("m1"))
    home.receives("<message from='nurse@example.org/chamber' id='m2'/>")

    asks(home, "set", "<default name='closed'/>")
    asks(romeo, "set", "<active name='open'/>")  # and the default list is not applied on top of it
    nurse.sends("<message to='romeo@example.org/orchard' id='m3'/><message to='romeo@example.org/home' id='m4'/>")
    romeo.receives("<message from='nurse@example.org/chamber' id='m3'/>")
    nurse.receives(refused.format("m4"))

    asks(romeo, "set", "<active/>")
    nurse.sends("<message to='romeo@example.org/orchard' id='m5'/>")
    nurse.receives(refused.format("m5"))
    asks(romeo, "set", "<active name='open'/>")
    romeo.closes()
    romeo.login("romeo", resource="orchard")
    assert names(romeo) == "default=closed list=closed list=open"


def test_what_goes_to_several_reaches_those_whose_lists_allow_it(
    server: MemoryServer, romeo: Client, nurse: Client
) -> None:
    """XEP0016-2.2-1"""
    home = server.client().login("romeo", resource="home")
    romeo.comes_online()
    home.comes_online()
    romeo.receives_anything()
    home.forgets_unread()
    keeps(romeo, "closed", item("nurse@example.org", "message", "presence-in"))
    home.receives(pushed("closed"))
    asks(romeo, "set", "<active name='closed'/>")
    nurse.sends("<message to='romeo@example.org' id='m1'/><presence to='romeo@example.org'/>")
    home.receives("<message from='nurse@example.org/chamber' to='romeo@example.org' id='m1'/>")
    home.receives("<presence from='nurse@example.org/chamber' to='romeo@example.org'/>")
    asks(home, "set", "<active name='closed'/>")
    nurse.sends("<message to='romeo@example.org' id='m2'/><presence to='romeo@example.org'/>")
    nurse.receives("<message type='error' id='m2'><error type='cancel'><service-unavailable .../></error></message>")
    romeo.receives_nothing()
    home.receives_nothing()


def test_a_message_is_refused_when_whoever_would_get_it_blocks_it(
    server: MemoryServer, romeo: Client, nurse: Client
) -> None:
    """Rather than vanish because a resource with a lower priority would have taken it."""
    home = server.client().login("romeo", resource="home")
    home.comes_online("<priority>1</priority>")
    romeo.comes_online("<priority>5</priority>")
    home.receives_anything()
    romeo.forgets_unread()
    uses(romeo, item("nurse@example.org", "message"))
    home.receives(pushed("mine"))
    nurse.sends("<message to='romeo@example.org' id='m1'/>")
    nurse.receives("<message type='error' id='m1'><error type='cancel'><service-unavailable .../></error></message>")


def test_the_default_list_counts_while_nobody_is_there(server: MemoryServer, romeo: Client, nurse: Client) -> None:
    """XEP0016-2.2-2, S48: nothing blocked is kept for later"""
    keeps(romeo, "closed", item("nurse@example.org", "message"))
    keeps(romeo, "open", item("tybalt@example.com"))
    asks(romeo, "set", "<default name='closed'/>")
    asks(romeo, "set", "<active name='open'/>")
    romeo.closes()
    nurse.sends("<message to='romeo@example.org' type='chat' id='m1'><body>Sir</body></message>")
    nurse.receives("<message type='error' id='m1'><error type='cancel'><service-unavailable .../></error></message>")
    nurse.sends("<message to='romeo@example.org/orchard' type='chat' id='m2'><body>Sir</body></message>")
    nurse.receives("<message type='error' id='m2'><error type='cancel'><service-unavailable .../></error></message>")
    romeo.login("romeo", resource="orchard")
    romeo.comes_online()
    romeo.receives_nothing()


@pytest.mark.parametrize("to", ["romeo@example.org", "romeo@example.org/orchard"])
def test_what_has_waited_is_dropped_if_it_is_blocked_meanwhile(
    server: MemoryServer, romeo: Client, nurse: Client, to: str
) -> None:
    """S48"""
    romeo.closes()
    nurse.sends(f"<message to='{to}' type='chat'><body>Sir</body></message><presence to='{to}' type='subscribe'/>")
    nurse.receives_anything()
    romeo.login("romeo", resource="orchard")
    keeps(romeo, "closed", item("nurse@example.org"))
    asks(romeo, "set", "<default name='closed'/>")
    romeo.comes_online()
    romeo.receives_nothing()


def test_lists_come_before_the_rules_of_subscriptions(romeo: Client, nurse: Client) -> None:
    """XEP0016-2.2-4, XEP0016-2.14-1, RFC6121-11-2, RFC3921-10-1: a blocked request doesn't reach the roster, nor any resource"""
    romeo.comes_online()
    uses(romeo, item("nurse@example.org"))
    nurse.sends("<presence to='romeo@example.org' type='subscribe'/><presence to='romeo@example.org' type='probe'/>")
    romeo.receives_nothing()
    asks(romeo, "set", "<active/>")
    romeo.sends("<presence type='unavailable'/><presence/>")  # waiting requests would come now
    romeo.receives("<presence type='unavailable' from='*'/>", "<presence from='romeo@example.org/orchard'/>")
    nurse.receives_nothing()


# ---- what is blocked, and how ---------------------------------------------------------

INCOMING = {  # what the nurse sends: the kind of rule that blocks it, and whether she hears of it
    "<message to='{to}' id='1' type='chat'><body>Sir</body></message>": ("message", True),
    "<message to='{to}' id='2'><subject>Sir</subject></message>": ("message", True),
    "<message to='{to}' id='3' type='headline'/>": ("message", False),
    "<message to='{to}' id='4' type='groupchat'/>": ("message", False),
    "<message to='{to}' id='5' type='error'/>": ("message", False),
    "<iq to='{to}' id='6' type='get'><query xmlns='jabber:iq:version'/></iq>": ("iq", True),
    "<iq to='{to}' id='7' type='set'><query xmlns='urn:x'/></iq>": ("iq", True),
    "<iq to='{to}' id='8' type='result'/>": ("iq", False),
    "<iq to='{to}' id='9' type='error'/>": ("iq", False),
    "<presence to='{to}' id='10'/>": ("presence-in", False),
    "<presence to='{to}' id='11' type='unavailable'/>": ("presence-in", False),
}


@pytest.mark.parametrize("kind", ["", "message", "iq", "presence-in", "presence-out"])
def test_what_a_rule_keeps_out_and_what_it_lets_in(romeo: Client, nurse: Client, kind: str) -> None:
    """XEP0016-2.1-9, 2.9-1, 2.10-1, 2.12-1, 2.13-1, 2.14-1, 2.14-2, 2.14-3"""
    rule = item("nurse@example.org", *([kind] if kind else []), order=2)
    uses(romeo, item(nurse.jid, "presence-out", action="allow"), rule)
    romeo.sends(f"<presence to='{nurse.jid}'/>") if kind else None  # or a stranger's requests would be refused anyway
    nurse.receives_anything()
    for sent in INCOMING:
        nurse.sends(sent.format(to=romeo.jid))
    came = [stanza.get("id") for stanza in romeo.receives_anything()]
    table = {sent.split("id='")[1].split("'")[0]: case for sent, case in INCOMING.items()}
    assert came == [id for id, (needed, _answered) in table.items() if kind not in ("", needed)]
    refused = [id for id, (needed, answered) in table.items() if answered and kind in ("", needed)]
    errors = nurse.receives_anything()
    assert [error.get("id") for error in errors] == refused
    assert all(error.find(f"*/{{{STANZA_ERRORS}}}service-unavailable") is not None for error in errors)


def test_requests_to_the_account_are_blocked_as_those_to_a_resource(romeo: Client, nurse: Client) -> None:
    """XEP0016-2.14-3, the XEP's example 49"""
    uses(romeo, item("nurse@example.org"))
    nurse.sends("<iq type='get' to='romeo@example.org' id='p'><query xmlns='jabber:iq:last'/></iq>")
    nurse.receives("<iq type='error' id='p'><error type='cancel'><service-unavailable .../></error></iq>")


OUTGOING = {  # what Romeo sends to the nurse, and whether it is a notification: what rules about presence-out block
    "<message to='{to}' id='1' type='chat'><body>Hist</body></message>": False,
    "<iq to='{to}' id='2' type='get'><query xmlns='jabber:iq:version'/></iq>": False,
    "<presence to='{to}' id='3'/>": True,
    "<presence to='{to}' id='4' type='unavailable'/>": True,
    "<presence to='{to}' id='5' type='subscribe'/>": False,
    "<presence to='{to}' id='6' type='unsubscribed'/>": False,
}


@pytest.mark.parametrize("kind", ["", "message", "iq", "presence-in", "presence-out"])
def test_what_a_rule_does_not_let_out(romeo: Client, nurse: Client, kind: str) -> None:
    """XEP0016-2.14-4, XEP0016-2.11-1, XEP0016-2.9-1, XEP0016-2.13-1"""
    uses(romeo, item("nurse@example.org", *([kind] if kind else [])))
    for sent in OUTGOING:
        romeo.sends(sent.format(to=nurse.jid))
    answers = romeo.receives_anything()
    refused = [answer.get("id") for answer in answers if answer.find(f"*/{{{STANZA_ERRORS}}}not-acceptable") is not None]
    table = {sent.split("id='")[1].split("'")[0]: notification for sent, notification in OUTGOING.items()}
    assert refused == [id for id, notification in table.items() if kind == "" or (kind == "presence-out" and notification)]
    assert ("1" in [stanza.get("id") for stanza in nurse.receives_anything()]) == (kind != "")


def test_answers_do_not_leave_either_and_cause_no_error(romeo: Client, nurse: Client) -> None:
    """XEP0016-2.14-4: an answer is never answered (RFC 6120 §8.3.1)"""
    uses(romeo, item("nurse@example.org"))
    romeo.sends(f"<iq type='result' id='r1' to='{nurse.jid}'/><message type='error' id='r2' to='{nurse.jid}'/>")
    romeo.receives_nothing()
    nurse.receives_nothing()


def test_the_answers_to_ones_own_requests_come_where_the_rule_is_not_about_them(romeo: Client, nurse: Client) -> None:
    """XEP0016-2.12-1, XEP0016-2.14-3"""
    nurse.sends(f"<presence to='{romeo.jid}'/>")
    romeo.receives("<presence from='nurse@example.org/chamber'/>")
    ask = f"<iq type='get' to='{nurse.jid}' id='{{}}'><query xmlns='jabber:iq:version'/></iq>"
    uses(romeo, item("nurse@example.org", "message", "presence-in", "presence-out"))
    romeo.sends(ask.format("v1"))
    nurse.receives("<iq type='get' from='romeo@example.org/orchard' id='v1'><query xmlns='jabber:iq:version'/></iq>")
    nurse.sends(f"<iq type='result' to='{romeo.jid}' id='v1'/>")
    romeo.receives("<iq type='result' id='v1'/>")
    keeps(romeo, "mine", item("nurse@example.org", "iq"))
    romeo.sends(ask.format("v2"))
    nurse.receives("<iq type='get' from='romeo@example.org/orchard' id='v2'><query xmlns='jabber:iq:version'/></iq>")
    nurse.sends(f"<iq type='result' to='{romeo.jid}' id='v2'/>")
    romeo.receives_nothing()


def test_oneself_and_ones_own_server_are_never_blocked(server: MemoryServer, romeo: Client) -> None:
    """XEP0016-2.1-10, and the server's requests"""
    home = server.client().login("romeo", resource="home")
    romeo.comes_online()
    keeps(romeo, "closed", item(order=1), item("example.org", order=2), item("romeo@example.org", order=3))
    home.receives(pushed("closed"))
    asks(romeo, "set", "<active name='closed'/>")
    asks(home, "set", "<active name='closed'/>")
    home.sends(f"<message to='{romeo.jid}' id='m'/><message to='romeo@example.org' id='n'/>")
    romeo.receives("<message from='romeo@example.org/home' id='m'/>")
    romeo.receives("<message from='romeo@example.org/home' to='romeo@example.org' id='n'/>")
    home.comes_online()
    romeo.receives("<presence from='romeo@example.org/home'/>")
    home.receives("<presence from='romeo@example.org/orchard'/>")
    romeo.sends("<iq type='get' id='v' to='example.org'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives("<iq type='result' id='v'><query ...>...</query></iq>")
    server.server.ping(server.server.session(JID.parse(romeo.jid)))  # type: ignore[arg-type]
    romeo.receives("<iq type='get' id='*' from='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")


def test_an_invitation_comes_from_the_inviter(server: MemoryServer, romeo: Client) -> None:
    """S48: a room is only the messenger of somebody who is blocked"""
    rooms = Elsewhere(server)
    uses(romeo, item("nurse@example.org"))
    invitation = (
        "<message from='garden@example.com' to='romeo@example.org' id='i'>"
        "<x xmlns='http://jabber.org/protocol/muc#user'><invite from='{}'/></x></message>"
    )
    romeo.comes_online()
    rooms.says(invitation.format("nurse@example.org/chamber"))
    romeo.receives_nothing()
    rooms.says(invitation.format("juliet@example.org"))
    romeo.receives("<message from='garden@example.com' to='romeo@example.org' id='i'>...</message>")
    rooms.forgets()


# ---- presence -------------------------------------------------------------------------


@pytest.mark.usefixtures("friends")
@pytest.mark.parametrize("kinds", [(), ("presence-out",)])
def test_a_contact_from_whom_presence_is_withheld_sees_one_go(romeo: Client, juliet: Client, kinds: Sequence[str]) -> None:
    """XEP0016-2.11-1, XEP0016-2.11-2, XEP0016-4-1"""
    keeps(romeo, "mine", item("juliet@example.org", *kinds))
    juliet.receives_nothing()  # it doesn't count yet
    romeo.sends(f"<iq type='set' id='a'><query xmlns='{PRIVACY}'><active name='mine'/></query></iq>")
    juliet.receives("<presence type='unavailable' from='romeo@example.org/orchard' to='juliet@example.org'/>")
    came = [stanza.get("type") for stanza in romeo.receives_anything()]
    assert came == (["result"] if kinds else ["unavailable", "result"])
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    juliet.sends("<presence type='probe' to='romeo@example.org'/><presence type='probe' to='romeo@example.org/orchard'/>")
    juliet.sends("<iq type='get' id='l' to='romeo@example.org'><query xmlns='jabber:iq:last'/></iq>")
    condition = "forbidden" if kinds else "service-unavailable"
    juliet.receives(f"<iq type='error' id='l'><error type='*'><{condition} .../></error></iq>")
    juliet.receives_nothing()
    romeo.sends("<presence type='unavailable'/><presence/>")
    romeo.receives_anything()
    juliet.receives_nothing()
    activates(romeo, "<active/>")
    juliet.receives("<presence from='romeo@example.org/orchard' to='juliet@example.org'/>")
    romeo.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
    contact = "<item jid='juliet@example.org' subscription='both'/>"
    romeo.receives(f"<iq type='result' id='r'><query xmlns='jabber:iq:roster' ...>{contact}</query></iq>")


@pytest.mark.usefixtures("friends")
def test_the_resources_of_one_who_hides_are_not_listed_nor_reached(romeo: Client, juliet: Client) -> None:
    """RFC6121-11-1, XEP0016-2.11-1, S45"""
    uses(romeo, item("", "presence-out"))
    juliet.receives("<presence type='unavailable' from='romeo@example.org/orchard' to='juliet@example.org'/>")
    juliet.sends("<iq type='get' id='i' to='romeo@example.org'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    juliet.receives("<iq type='result' id='i'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    juliet.sends("<iq type='get' id='v' to='romeo@example.org/orchard'><query xmlns='jabber:iq:version'/></iq>")
    juliet.receives("<iq type='error' id='v'><error type='cancel'><service-unavailable .../></error></iq>")
    juliet.sends("<message to='romeo@example.org' id='m'/>")
    romeo.receives("<message from='juliet@example.org/balcony' to='romeo@example.org' id='m'/>")


@pytest.mark.usefixtures("friends")
def test_presence_that_is_kept_out_seems_to_go_and_comes_back(romeo: Client, juliet: Client) -> None:
    """XEP0016-2.10-1, XEP0016-2.10-2"""
    keeps(romeo, "mine", item("juliet@example.org", "presence-in"))
    romeo.sends(f"<iq type='set' id='a'><query xmlns='{PRIVACY}'><active name='mine'/></query></iq>")
    romeo.receives("<presence type='unavailable' from='juliet@example.org/balcony'/>", "<iq type='result' id='a'/>")
    juliet.sends("<presence><show>dnd</show></presence>")
    juliet.receives("<presence from='juliet@example.org/balcony'><show>dnd</show></presence>")
    romeo.receives_nothing()
    romeo.sends("<presence><show>away</show></presence>")  # she still sees him
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    juliet.receives("<presence from='romeo@example.org/orchard' to='juliet@example.org'><show>away</show></presence>")
    romeo.sends(f"<iq type='set' id='a'><query xmlns='{PRIVACY}'><active/></query></iq>")
    romeo.receives("<presence from='juliet@example.org/balcony'><show>dnd</show></presence>", "<iq type='result' id='a'/>")


@pytest.mark.usefixtures("friends")
def test_a_hidden_contact_is_not_given_away_by_ones_own_lists(romeo: Client, juliet: Client) -> None:
    """S45: who unblocks sees only what the other shows"""
    uses(romeo, item("juliet@example.org", "presence-in"))
    uses(juliet, item("romeo@example.org", "presence-out"))
    asks(romeo, "set", "<active/>")
    romeo.receives_nothing()


def test_a_stranger_is_not_seen_by_whoever_lifts_a_rule(romeo: Client, nurse: Client) -> None:
    """S45: directed presence gives no right to see the other's"""
    nurse.comes_online()
    romeo.comes_online()
    romeo.sends(f"<presence to='{nurse.jid}'/>")
    nurse.receives("<presence from='romeo@example.org/orchard'/>")
    uses(romeo, item("nurse@example.org", "presence-in"))
    asks(romeo, "set", "<active/>")
    romeo.receives_nothing()


def test_directed_presence_is_taken_back_once(romeo: Client, nurse: Client) -> None:
    """XEP0016-2.11-2: those who only have directed presence are told as well"""
    romeo.sends("<presence to='nurse@example.org/chamber'/>")
    nurse.receives("<presence from='romeo@example.org/orchard'/>")
    keeps(romeo, "mine", item("nurse@example.org", "presence-out"))
    asks(romeo, "set", "<active name='mine'/>")
    nurse.receives("<presence type='unavailable' from='romeo@example.org/orchard'/>")
    romeo.closes()
    nurse.receives_nothing()


@pytest.mark.usefixtures("friends")
def test_a_list_that_is_set_before_the_first_presence_hides_from_the_start(
    server: MemoryServer, romeo: Client, juliet: Client
) -> None:
    """XEP0016-2.11-1: how clients are invisible (XEP-0126)"""
    home = server.client().login("romeo", resource="home")
    keeps(home, "invisible", item("", "presence-out"))
    romeo.receives(pushed("invisible"))
    asks(home, "set", "<active name='invisible'/>")
    home.sends("<presence/>")
    home.receives_in_any_order(
        "<presence from='romeo@example.org/home'/>",
        "<presence from='romeo@example.org/orchard'/>",
        "<presence from='juliet@example.org/balcony'/>",
    )
    romeo.receives("<presence from='romeo@example.org/home'/>")
    juliet.sends("<presence type='probe' to='romeo@example.org'/>")
    juliet.receives("<presence from='romeo@example.org/orchard'/>")
    home.closes()
    romeo.receives("<presence type='unavailable' from='romeo@example.org/home'/>")
    juliet.receives_nothing()


@pytest.mark.usefixtures("friends")
def test_a_change_of_group_counts_at_once(romeo: Client, juliet: Client) -> None:
    """XEP0016-2.2-8"""
    puts_in_group(romeo, "juliet@example.org", "Capulets")
    puts_in_group(romeo, "nurse@example.org", "Enemies")
    romeo.receives_anything()
    uses(romeo, item("Enemies", type="group"))
    juliet.receives_nothing()
    puts_in_group(romeo, "juliet@example.org", "Enemies")
    juliet.receives("<presence type='unavailable' from='romeo@example.org/orchard' to='juliet@example.org'/>")
    came = romeo.receives_anything()
    assert [stanza.get("type") for stanza in came] == ["set", "unavailable", "result"]
    juliet.sends("<message to='romeo@example.org' id='m'/>")
    juliet.receives("<message type='error' id='m'><error type='cancel'><service-unavailable .../></error></message>")
    puts_in_group(romeo, "juliet@example.org", "Enemies")  # nothing changes, nobody is told again
    romeo.receives_anything()
    juliet.receives_nothing()
    puts_in_group(romeo, "juliet@example.org", "Capulets")
    juliet.receives("<presence from='romeo@example.org/orchard' to='juliet@example.org'/>")
    romeo.receives_anything()


@pytest.mark.usefixtures("friends")
def test_a_change_of_subscription_counts_at_once(romeo: Client, juliet: Client) -> None:
    """XEP0016-2.2-8, XEP0016-2.1-4"""
    uses(romeo, item("none", "message", type="subscription"))
    juliet.sends("<message to='romeo@example.org' id='m1'/>")
    romeo.receives("<message from='juliet@example.org/balcony' to='romeo@example.org' id='m1'/>")
    romeo.sends("<iq type='set' id='r'><query xmlns='jabber:iq:roster'>"
                "<item jid='juliet@example.org' subscription='remove'/></query></iq>")  # fmt: skip
    romeo.receives_anything()
    juliet.receives_anything()
    juliet.sends("<message to='romeo@example.org' id='m2'/>")
    juliet.receives("<message type='error' id='m2'><error type='cancel'><service-unavailable .../></error></message>")


def test_presence_is_shown_once_to_a_new_subscriber_whom_a_rule_now_admits(romeo: Client, juliet: Client) -> None:
    """XEP0016-2.2-8: the rule about strangers doesn't hold any more when the subscription is told"""
    romeo.comes_online()
    juliet.comes_online()
    uses(romeo, item("none", "presence-out", type="subscription"))
    juliet.sends("<presence type='subscribe' to='romeo@example.org'/>")
    romeo.receives("<presence type='subscribe' from='juliet@example.org' to='romeo@example.org'/>")
    juliet.receives_anything()
    romeo.sends("<presence type='subscribed' to='juliet@example.org'/>")
    came = [stanza for stanza in juliet.receives_anything() if stanza.tag.endswith("presence")]
    assert [(stanza.get("type"), stanza.get("from")) for stanza in came] == [
        ("subscribed", "romeo@example.org"), (None, "romeo@example.org/orchard"),
    ]  # fmt: skip
    romeo.receives_anything()


def test_contacts_on_other_servers_seem_to_go_and_are_asked_when_they_may_be_seen_again(
    server: MemoryServer, romeo: Client
) -> None:
    """XEP0016-2.10-2, XEP0016-2.11-2, XEP0016-2.13-1"""
    verona = Elsewhere(server)
    romeo.comes_online()
    romeo.sends("<presence type='subscribe' to='tybalt@example.com'/>")
    romeo.passes_barrier()
    verona.says("<presence type='subscribed' from='tybalt@example.com' to='romeo@example.org'/>")
    verona.says("<presence type='subscribe' from='tybalt@example.com' to='romeo@example.org'/>")
    romeo.sends("<presence type='subscribed' to='tybalt@example.com'/>")
    romeo.receives_anything()
    verona.forgets()
    uses_list = f"<iq type='set' id='a'><query xmlns='{PRIVACY}'><active name='mine'/></query></iq>"
    keeps(romeo, "mine", item("tybalt@example.com"))
    romeo.sends(uses_list)
    romeo.receives("<presence type='unavailable' from='tybalt@example.com'/>", "<iq type='result' id='a'/>")
    verona.receives("<presence type='unavailable' from='romeo@example.org/orchard' to='tybalt@example.com'/>")
    romeo.sends("<presence type='unavailable'/><presence/>")
    romeo.receives_anything()
    verona.receives_nothing()  # neither presence nor a probe
    asks(romeo, "set", "<active/>")
    verona.receives("<presence type='probe' from='romeo@example.org' to='tybalt@example.com'/>",
                    "<presence from='romeo@example.org/orchard' to='tybalt@example.com'/>")  # fmt: skip


# ---- and nobody else ------------------------------------------------------------------


def test_a_new_owner_of_the_name_has_no_lists(server: MemoryServer, romeo: Client) -> None:
    keeps(romeo, "mine", item())
    asks(romeo, "set", "<default name='mine'/>")
    owner = JID.parse("romeo@example.org")
    credentials = server.server.accounts[owner]["credentials"]
    server.server.remove_account(owner)
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    server.server.create_account(owner, dict(credentials))
    again = server.client().login("romeo", resource="orchard")
    assert names(again) == ""
