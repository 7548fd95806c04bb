"""The roster (RFC 6121 §2): kept by the server, the same on all devices, nobody else's business; with versions (XEP-0237)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import ROSTER, Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer, ProcessServer

NURSE = "<item jid='nurse@example.org' name='Nurse'><group>Servants</group></item>"
NURSE_STORED = "<item jid='nurse@example.org' name='Nurse' subscription='none'><group>Servants</group></item>"


def setting(item: str, id: str = "s1", to: str = "") -> str:
    """Return a roster set."""
    address = f" to='{to}'" if to else ""
    return f"<iq type='set' id='{id}'{address}><query xmlns='{ROSTER}'>{item}</query></iq>"


def push(item: str, ver: str = "*") -> str:
    """Return the pattern of a roster push: without `from`, with a version."""
    return f"<iq type='set' id='*'><query xmlns='{ROSTER}' ver='{ver}'>{item}</query></iq>"


def roster(*items: str, id: str = "g1") -> str:
    """Return the pattern of a roster result."""
    return f"<iq type='result' id='{id}'><query xmlns='{ROSTER}' ver='*'>{''.join(items)}</query></iq>"


def gets(client: Client, *items: str, ver: str | None = None) -> str:
    """Ask for the roster, check that all of it comes, and return its version."""
    attribute = "" if ver is None else f" ver='{ver}'"
    client.sends(f"<iq type='get' id='g1'><query xmlns='{ROSTER}'{attribute}/></iq>")
    return client.receives(roster(*items))[0].attrib["ver"]


def sets(client: Client, item: str, *, pushed: str) -> str:
    """Change the roster, check push and result, and return the new version."""
    client.sends(setting(item))
    version = client.receives(push(pushed))[0].attrib["ver"]
    client.receives("<iq type='result' id='s1'/>")
    return version


def refused(client: Client, item: str, kind: str, condition: str) -> None:
    """Check that a roster set fails and changes nothing."""
    client.sends(setting(item, "bad"))
    client.receives(f"<iq type='error' id='bad'><error type='{kind}'><{condition} .../></error></iq>")
    gets(client)


# ---- get ------------------------------------------------------------------------------


@pytest.mark.wire
def test_an_empty_roster_is_a_result_without_items(romeo: Client) -> None:
    """RFC6121-2.1.4-1, RFC6121-2.6.3-3: and the version is there even if nobody asked for it."""
    gets(romeo)


def test_the_roster_comes_at_any_time_and_in_the_same_form(romeo: Client) -> None:
    """RFC3921-7.3-1, RFC6121-2-2: after a session request, after presence, with `to` the own bare JID or without."""
    romeo.sends("<iq type='set' id='s'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>")
    romeo.receives("<iq type='result' id='s'/>")
    romeo.sends("<presence/>")
    romeo.receives("<presence from='romeo@example.org/orchard'/>")
    gets(romeo)
    sets(romeo, NURSE, pushed=NURSE_STORED)
    for to in ("", " to='romeo@example.org'", " to='Romeo@Example.ORG'"):
        romeo.sends(f"<iq type='get' id='g1'{to}><query xmlns='{ROSTER}'/></iq>")
        result = romeo.receives("<iq type='result' id='g1' ...><query xmlns='jabber:iq:roster' ...>...</query></iq>")
        assert [item.get("jid") for item in result[0]] == ["nurse@example.org"]


def test_a_get_with_items_is_no_set(romeo: Client) -> None:
    """RFC6121-2.1.3-1"""
    romeo.sends(f"<iq type='get' id='g'><query xmlns='{ROSTER}'>{NURSE}</query></iq>")
    romeo.receives("<iq type='error' id='g'><error type='modify'><bad-request .../></error></iq>")
    gets(romeo)


def test_somebody_who_only_asks_is_no_item(romeo: Client, juliet: Client) -> None:
    """RFC6121-2.1.4-3"""
    juliet.sends("<presence type='subscribe' to='romeo@example.org'/>")
    juliet.passes_barrier()
    gets(romeo)


@pytest.mark.parametrize("type", ["get", "set"])
@pytest.mark.parametrize("owner", ["juliet", "nobody"])
@pytest.mark.parametrize("resource", ["", "/balcony"])
def test_the_roster_of_others_is_forbidden_and_nobodys_looks_the_same(
    romeo: Client, juliet: Client, type: str, owner: str, resource: str
) -> None:
    """RFC6121-2-1, RFC6121-2.1.4-2, RFC6121-2.1.5-2, RFC6121-11-1: to both accounts the same answer, error for error."""
    juliet.comes_online()
    kind, condition = ("cancel", "service-unavailable") if type == "get" else ("auth", "forbidden")
    item = NURSE if type == "set" else ""
    romeo.sends(f"<iq type='{type}' id='x' to='{owner}@example.org{resource}'><query xmlns='{ROSTER}'>{item}</query></iq>")
    romeo.receives(f"<iq type='error' id='x'><error type='{kind}'><{condition} .../></error></iq>")
    juliet.receives_nothing()
    gets(juliet)


def test_friends_may_not_read_it_either(romeo: Client, juliet: Client, elsewhere: Elsewhere) -> None:
    """RFC6121-2-1: nor may other servers."""
    romeo.befriends(juliet)
    romeo.sends(setting(NURSE, to="juliet@example.org"))
    romeo.receives("<iq type='error' id='s1'><error type='auth'><forbidden .../></error></iq>")
    elsewhere.says(f"<iq type='get' id='e1' from='nurse@example.com' to='juliet@example.org'><query xmlns='{ROSTER}'/></iq>")
    elsewhere.receives_nothing()  # the refusal takes the way of all answers, which a played domain has not


# ---- set ------------------------------------------------------------------------------


def test_a_new_item_is_pushed_to_the_interested_resources(server: MemoryServer, romeo: Client) -> None:
    """RFC6121-2.3.2-1, RFC6121-2.1.6-1, RFC6121-2.2-1: available or not; not to those that have not asked."""
    garden = server.client().login("romeo", resource="garden")
    phone = server.client().login("romeo", resource="phone")
    gets(romeo)
    gets(garden)
    phone.sends("<presence/>")
    phone.receives("<presence from='romeo@example.org/phone'/>")
    romeo.sends(setting(NURSE, "ph1xaz53"))
    one = romeo.receives(push(NURSE_STORED))
    romeo.receives("<iq type='result' id='ph1xaz53'/>")
    two = garden.receives(push(NURSE_STORED))
    phone.receives_nothing()
    assert one.get("to") == "romeo@example.org/orchard" and two.get("to") == "romeo@example.org/garden"
    assert one.get("id") != two.get("id")
    assert one[0].get("ver") == two[0].get("ver")


def test_the_setter_gets_no_push_unless_it_is_interested(romeo: Client) -> None:
    """RFC6121-2.2-1"""
    romeo.sends(setting(NURSE))
    romeo.receives("<iq type='result' id='s1'/>")
    gets(romeo, NURSE_STORED)


def test_answers_to_a_push_are_ignored(romeo: Client) -> None:
    """RFC6121-2.1.6-2"""
    gets(romeo)
    romeo.sends(setting(NURSE))
    id = romeo.receives(push(NURSE_STORED)).get("id")
    romeo.receives("<iq type='result' id='s1'/>")
    romeo.sends(f"<iq type='result' id='{id}'/>")
    error = "<error type='cancel'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    for to in ("", " to='romeo@example.org'", " to='example.org'"):
        romeo.sends(f"<iq type='error' id='{id}'{to}>{error}</iq>")
    romeo.receives_nothing()
    gets(romeo, NURSE_STORED)


def test_items_are_kept_as_they_came(romeo: Client) -> None:
    """RFC6121-2-2, RFC6121-2.1.2.3-1: names and groups to the letter, addresses in prepared form."""
    gets(romeo)
    stored = "<item jid='nurse@example.org' name=' &lt;Ämme&gt; &#x1F600; ' subscription='none'><group> a </group><group>A</group></item>"
    sets(
        romeo,
        "<item jid='NURSE@EXAMPLE.ORG' name=' &lt;Ämme&gt; &#x1F600; '><group> a </group><group>A</group></item>",
        pushed=stored,
    )
    gets(romeo, stored)


def test_what_only_the_server_may_say_is_ignored(romeo: Client, juliet: Client) -> None:
    """RFC6121-2.1.2.5-1, RFC6121-2.1.2.2-1, RFC6121-2.1.2.1-1, RFC6121-2.1.1-1; S46"""
    before = gets(romeo)
    for word in ("both", "from", "to", "none", "REMOVE", ""):
        item = f"<item jid='juliet@example.org' subscription='{word}' ask='subscribe' approved='true' ver='9'/>"
        romeo.sends(f"<iq type='set' id='s1'><query xmlns='{ROSTER}' ver='9'>{item}</query></iq>")
        version = romeo.receives(push("<item jid='juliet@example.org' subscription='none'/>"))[0].get("ver")
        romeo.receives("<iq type='result' id='s1'/>")
        assert version not in (before, "9")
    romeo.sends("<presence/>")
    romeo.receives("<presence from='romeo@example.org/orchard'/>")
    juliet.comes_online()
    juliet.receives_nothing()
    romeo.receives_nothing()


def test_subscriptions_nobody_asked_for_are_ignored(romeo: Client, juliet: Client) -> None:
    """S46: `subscribed` without a request."""
    gets(romeo)
    romeo.sends("<presence/>")
    romeo.receives("<presence from='romeo@example.org/orchard'/>")
    juliet.comes_online()
    juliet.sends("<presence type='subscribed' to='romeo@example.org'/>")  # an approval in advance
    romeo.receives_nothing()
    gets(romeo)
    juliet.receives(push("<item jid='romeo@example.org' subscription='none' approved='true'/>"))


def test_an_update_replaces_name_and_groups_and_nothing_else(romeo: Client, juliet: Client) -> None:
    """RFC6121-2.4.1-1, RFC6121-2.4.2-1: the five updates of §2.4.1."""
    gets(romeo)
    romeo.sends("<presence type='subscribed' to='juliet@example.org'/><presence type='subscribe' to='juliet@example.org'/>")
    romeo.receives_anything()
    state = "jid='juliet@example.org' subscription='none' ask='subscribe' approved='true'"
    for told, kept in [
        ("name='Juliet'><group>Friends</group>", "name='Juliet'><group>Friends</group>"),
        ("name='Juliet'><group>Friends</group><group>Lovers</group>", "name='Juliet'><group>Friends</group><group>Lovers</group>"),
        ("name='Juliet'><group>Lovers</group>", "name='Juliet'><group>Lovers</group>"),
        ("name='MyJuliet'>", "name='MyJuliet'>"),
        ("name=''>", ">"),
        (">", ">"),
    ]:
        sets(romeo, f"<item jid='juliet@example.org' {told}</item>", pushed=f"<item {state} {kept}</item>")
        gets(romeo, f"<item {state} {kept}</item>")
    juliet.receives_nothing()


@pytest.mark.parametrize(
    ("item", "kind", "condition"),
    [
        (NURSE + "<item jid='mother@example.org'/>", "modify", "bad-request"),
        ("", "modify", "bad-request"),
        ("<contact xmlns='urn:x'/>", "modify", "bad-request"),
        ("<item/>", "modify", "bad-request"),
        ("<item jid=''/>", "modify", "bad-request"),
        ("<item jid='@example.org'/>", "modify", "jid-malformed"),
        ("<item jid='a@b@c'/>", "modify", "jid-malformed"),
        ("<item jid='nurse@example.org'><group>A</group><group>A</group></item>", "modify", "bad-request"),
        ("<item jid='nurse@example.org'><group/></item>", "modify", "not-acceptable"),
        (f"<item jid='nurse@example.org' name='{'n' * 1024}'/>", "modify", "not-acceptable"),
        (f"<item jid='nurse@example.org'><group>{'g' * 1024}</group></item>", "modify", "not-acceptable"),
        (f"<item jid='nurse@example.org'>{''.join(f'<group>{n}</group>' for n in range(65))}</item>", "modify", "not-acceptable"),
        ("<item jid='romeo@example.org'/>", "cancel", "not-allowed"),
        ("<item jid='romeo@example.org/garden'/>", "cancel", "not-allowed"),
        ("<item jid='nurse@example.org' subscription='remove'/>", "cancel", "item-not-found"),
        ("<item subscription='remove'/>", "modify", "bad-request"),
    ],
)
def test_bad_sets_fail_and_change_nothing(romeo: Client, item: str, kind: str, condition: str) -> None:
    """RFC6121-2.1.5-1, RFC6121-2.1.2.3-1, RFC6121-2.3.3-1, RFC6121-2.3.3-2, RFC6121-2.5.3-1"""
    refused(romeo, item, kind, condition)


def test_the_longest_names_are_kept(romeo: Client) -> None:
    """RFC6121-2.3.3-2"""
    item = f"<item jid='nurse@example.org' name='{'n' * 1023}' {{}}><group>{'g' * 1023}</group></item>"
    romeo.sends(setting(item.format("")))
    romeo.receives("<iq type='result' id='s1'/>")
    gets(romeo, item.format("subscription='none'"))


def test_a_failed_update_leaves_the_item_as_it_was(romeo: Client) -> None:
    version = gets(romeo)
    version = sets(romeo, NURSE, pushed=NURSE_STORED)
    romeo.sends(setting("<item jid='nurse@example.org' name='X'><group/></item>"))
    romeo.receives("<iq type='error' id='s1'><error type='modify'><not-acceptable .../></error></iq>")
    assert gets(romeo, NURSE_STORED) == version


@pytest.mark.config(limits={"roster_items": 3})
def test_a_roster_has_room_for_as_many_contacts_as_configured(romeo: Client) -> None:
    for number in range(60):  # removed contacts take no room
        romeo.sends(setting(f"<item jid='n{number}@example.org'/>"))
        romeo.sends(setting(f"<item jid='n{number}@example.org' subscription='remove'/>"))
    for number in range(3):
        romeo.sends(setting(f"<item jid='n{number}@example.org'/>"))
    assert all(stanza.get("type") == "result" for stanza in romeo.receives_anything())
    romeo.sends(setting(NURSE))
    romeo.receives("<iq type='error' id='s1'><error type='wait'><resource-constraint .../></error></iq>")
    romeo.sends(setting("<item jid='n1@example.org' name='an update needs no room'/>"))
    romeo.receives("<iq type='result' id='s1'/>")
    romeo.sends("<presence id='p1' type='subscribe' to='nurse@example.org'/>")
    romeo.receives("<presence id='p1' from='nurse@example.org' type='error'><error type='wait'><resource-constraint .../></error></presence>")


# ---- remove ---------------------------------------------------------------------------

REMOVE = "<item jid='juliet@example.com' subscription='remove'/>"


@pytest.mark.parametrize(
    ("steps", "tells"),
    [
        ("", []),
        ("C:subscribe", ["romeo@example.org unsubscribe"]),
        ("C:subscribe S:subscribed", ["romeo@example.org unsubscribe"]),
        ("S:subscribe C:subscribed", ["romeo@example.org/orchard unavailable", "romeo@example.org unsubscribed"]),
        (
            "S:subscribe C:subscribed C:subscribe S:subscribed",
            ["romeo@example.org/orchard unavailable", "romeo@example.org unsubscribed", "romeo@example.org unsubscribe"],
        ),
    ],
    ids=["none", "pending out", "to", "from", "both"],
)
def test_a_removed_contact_is_told_what_ends(romeo: Client, elsewhere: Elsewhere, steps: str, tells: list[str]) -> None:
    """RFC6121-2.5.2-1, RFC6121-2.5.2-2"""
    romeo.comes_online()
    romeo.sends(setting("<item jid='juliet@example.com'/>"))
    for step in steps.split():
        who, type = step.split(":")
        if who == "C":
            romeo.sends(f"<presence type='{type}' to='juliet@example.com'/>")
        else:
            elsewhere.says(f"<presence type='{type}' from='juliet@example.com' to='romeo@example.org'/>")
    romeo.receives_anything()
    elsewhere.forgets()
    sets(romeo, REMOVE, pushed=REMOVE)
    assert [f"{stanza.get('from')} {stanza.get('type')}" for stanza in elsewhere.came] == tells
    gets(romeo)
    romeo.sends(setting(REMOVE))
    romeo.receives("<iq type='error' id='s1'><error type='cancel'><item-not-found .../></error></iq>")


@pytest.mark.wire
def test_a_removed_friend_here_sees_the_end_of_both_subscriptions(romeo: Client, juliet: Client) -> None:
    """RFC6121-2.5.2-1, RFC6121-2.5.2-2"""
    romeo.comes_online()
    juliet.comes_online()
    romeo.befriends(juliet)
    romeo.sends(setting("<item jid='juliet@example.org' subscription='remove'/>", "hm4hs97y"))
    romeo.receives(
        push("<item jid='juliet@example.org' subscription='remove'/>"),
        "<iq type='result' id='hm4hs97y'/>",
        "<presence from='juliet@example.org/balcony' type='unavailable'/>",
    )
    juliet.receives(
        "<presence from='romeo@example.org/orchard' type='unavailable'/>",
        "<presence from='romeo@example.org' type='unsubscribed'/>",
        push("<item jid='romeo@example.org' subscription='from'/>"),
        "<presence from='romeo@example.org' type='unsubscribe'/>",
        push("<item jid='romeo@example.org' subscription='none'/>"),
    )
    romeo.sends("<presence><show>away</show></presence>")
    romeo.receives("<presence from='romeo@example.org/orchard'><show>away</show></presence>")
    juliet.receives_nothing()


def test_a_contact_without_an_account_of_its_own_can_be_removed(romeo: Client) -> None:
    gets(romeo)
    for jid in ("gateway.example.com", "nobody@nowhere.example", "nurse@example.org/chamber"):
        sets(romeo, f"<item jid='{jid}'/>", pushed=f"<item jid='{jid}' subscription='none'/>")
        remove = f"<item jid='{jid}' subscription='remove'/>"
        sets(romeo, remove, pushed=remove)
    gets(romeo)


# ---- S41: who may push ----------------------------------------------------------------


@pytest.mark.parametrize("sender", ["juliet", "friend", "own other resource"])
def test_nobody_but_the_server_pushes(server: MemoryServer, romeo: Client, juliet: Client, sender: str) -> None:
    """S41 (CVE-2015-8688 and its kind)"""
    client = server.client().login("romeo", resource="garden") if sender == "own other resource" else juliet
    if sender == "friend":
        romeo.befriends(juliet)
    client.sends(setting(NURSE, to="romeo@example.org/orchard"))
    client.receives("<iq type='error' id='s1'><error type='auth'><forbidden .../></error></iq>")
    romeo.receives_nothing()
    gets(client, *([item("romeo", "subscription='both'")] if sender == "friend" else []))


def test_nor_does_another_server(romeo: Client, elsewhere: Elsewhere) -> None:
    """S41"""
    gets(romeo)
    for sender in ("juliet@example.com/balcony", "example.com"):
        elsewhere.says(f"<iq type='set' id='x' from='{sender}' to='romeo@example.org/orchard'><query xmlns='{ROSTER}'>{NURSE}</query></iq>")
    romeo.receives_nothing()
    gets(romeo)


# ---- versions (§2.6, XEP-0237) --------------------------------------------------------


def item(name: str, more: str = "subscription='none'") -> str:
    return f"<item jid='{name}@example.org' {more}/>"


def returns(client: Client, ver: str) -> None:
    """Ask for what has changed since a version; the empty result is checked."""
    client.sends(f"<iq type='get' id='v1'><query xmlns='{ROSTER}' ver='{ver}'/></iq>")
    client.receives("<iq type='result' id='v1'/>")


def test_the_current_version_has_no_news(romeo: Client) -> None:
    """RFC6121-2.6.3-1"""
    gets(romeo)
    version = sets(romeo, NURSE, pushed=NURSE_STORED)
    assert gets(romeo, NURSE_STORED) == version
    returns(romeo, version)
    romeo.receives_nothing()


def test_after_an_older_version_each_changed_item_is_pushed_once_and_in_order(server: MemoryServer, romeo: Client) -> None:
    """RFC6121-2.6.3-1, RFC6121-2.6.3-2, RFC6121-2.1.1-1"""
    versions = [gets(romeo)]
    for name in ("tybalt", "bill", "nurse", "juliet"):
        versions.append(sets(romeo, item(name, ""), pushed=item(name)))
    known = versions[-1]
    for name, change, now in (
        ("nurse", "name='1'", "name='1' subscription='none'"),
        ("tybalt", "subscription='remove'", "subscription='remove'"),
        ("bill", "name='2'", "name='2' subscription='none'"),
        ("nurse", "name='3'", "name='3' subscription='none'"),
    ):
        versions.append(sets(romeo, item(name, change), pushed=item(name, now)))
    assert len(set(versions)) == len(versions)
    garden = server.client().login("romeo", resource="garden")
    returns(garden, known)
    garden.receives(
        push(item("tybalt", "subscription='remove'"), versions[6]),
        push(item("bill", "name='2' subscription='none'"), versions[7]),
        push(item("nurse", "name='3' subscription='none'"), versions[8]),
    )
    garden.receives_nothing()
    garden.disconnects()
    garden = server.client().login("romeo", resource="garden")
    returns(garden, versions[7])  # the connection broke in the middle
    garden.receives(push(item("nurse", "name='3' subscription='none'"), versions[8]))
    sets(romeo, item("paris", ""), pushed=item("paris"))
    garden.receives(push(item("paris")))  # and it is interested


@pytest.mark.parametrize("ver", ["", "ver14", "0", "1", "99999999999999999", "-1", "1e3", "\U0001f600", "null"])
def test_an_unknown_version_gets_everything(romeo: Client, ver: str) -> None:
    """RFC6121-2.6.3-1"""
    gets(romeo)
    sets(romeo, NURSE, pushed=NURSE_STORED)
    gets(romeo, NURSE_STORED, ver=ver)


def test_a_version_from_before_the_removals_that_are_remembered_gets_everything(romeo: Client) -> None:
    """RFC6121-2.6.3-2: or a removed contact would stay on that device for ever."""
    gets(romeo)
    first = sets(romeo, item("nurse", ""), pushed=item("nurse"))
    for number in range(xmppd.FORGETFUL_AFTER):
        romeo.sends(setting(item(f"n{number}", "")) + setting(item(f"n{number}", "subscription='remove'")))
    romeo.receives_anything()
    romeo.sends(f"<iq type='get' id='v1'><query xmlns='{ROSTER}' ver='{first}'/></iq>")
    romeo.receives("<iq type='result' id='v1'/>")
    assert len(romeo.receives_anything()) == xmppd.FORGETFUL_AFTER
    romeo.sends(setting(item("tybalt", "")) + setting(item("tybalt", "subscription='remove'")))
    romeo.receives_anything()
    last = gets(romeo, item("nurse"), ver=first)
    returns(romeo, last)
    romeo.receives_nothing()


def test_subscriptions_change_the_version_too(romeo: Client, juliet: Client) -> None:
    """RFC6121-2.1.1-1; XEP-0237 §2.4: what was pushed has a new version, what was not pushed has none."""
    versions = [gets(romeo), sets(romeo, item("juliet", ""), pushed=item("juliet"))]
    juliet.sends("<presence type='subscribe' to='romeo@example.org'/>")  # changes nothing that shows
    juliet.passes_barrier()
    assert gets(romeo, item("juliet")) == versions[-1]
    romeo.sends("<presence type='subscribed' to='juliet@example.org'/>")
    versions.append(romeo.receives(push(item("juliet", "subscription='from'")))[0].attrib["ver"])
    juliet.sends("<presence type='unsubscribe' to='romeo@example.org'/>")
    juliet.passes_barrier()
    romeo.receives("<presence type='unsubscribe' from='juliet@example.org'/>")
    versions.append(romeo.receives(push(item("juliet")))[0].attrib["ver"])
    assert len(set(versions)) == 4
    gets(romeo, item("juliet"), ver=versions[1])  # the same content under another name: everything, to be sure


def test_another_account_of_the_same_name_has_other_versions(server: MemoryServer, romeo: Client) -> None:
    gets(romeo)
    version = sets(romeo, NURSE, pushed=NURSE_STORED)
    server.server.remove_account(xmppd.JID.parse("romeo@example.org"))
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    server.add_account("romeo@example.org")
    heir = server.client().login("romeo")
    gets(heir, ver=version)


@pytest.mark.wire
def test_versions_outlive_the_server(process_server: ProcessServer) -> None:
    """RFC6121-2.6.3-1: also a server that was killed."""
    romeo = process_server.client().login("romeo")
    gets(romeo)
    first = sets(romeo, item("nurse", ""), pushed=item("nurse"))
    second = sets(romeo, item("juliet", ""), pushed=item("juliet"))
    process_server.kill()
    process_server.start()
    romeo = process_server.client().login("romeo")
    returns(romeo, second)
    romeo.receives_nothing()
    returns(romeo, first)
    romeo.receives(push(item("juliet"), second))
    third = sets(romeo, item("nurse", "name='N'"), pushed=item("nurse", "name='N' subscription='none'"))
    assert third not in (first, second)


@pytest.mark.parametrize("clock", [0, 1_795_000_000_000_000_000], ids=["stands at 1970", "stands still"])
def test_a_version_never_comes_back_for_other_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    """Trap 1: a crash loses the last change, which a client has seen; the clock is no help either."""
    monkeypatch.setattr(time, "time_ns", lambda: clock)
    known: list[str] = []
    for life, name in enumerate(("nurse", "tybalt")):  # two futures of the same moment
        (tmp_path / name).mkdir()
        server = MemoryServer(tmp_path / name, {})
        romeo = server.client().login("romeo")
        if life:
            gets(romeo, ver=known[0])
        else:
            gets(romeo)
        version = sets(romeo, item(name, ""), pushed=item(name))
        assert version not in known
        known.append(version)
        if life:
            gets(romeo, item(name), ver=known[0])
        server.cast.leave()
        server.check_log()
        server.stop()
