"""Push Notifications (XEP-0357), published to an app server that `elsewhere` plays."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

import xmppd
from tests.dialogue import Client
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer, ProcessServer

PUSH = "xmlns='urn:xmpp:push:0'"
SM = "xmlns='urn:xmpp:sm:3'"
PUBSUB = "http://jabber.org/protocol/pubsub"
ROMEO, JULIET = "romeo@example.org", "juliet@example.org"
BALCONY = f"{JULIET}/balcony"
APP = "push-5.client.example"
SECRET = ("<x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'><value>"
          f"{PUBSUB}#publish-options</value></field><field var='secret'><value>eruio234vzxc2kla-91</value></field></x>")  # fmt: skip


@pytest.fixture
def app(server: MemoryServer) -> Elsewhere:
    """The app server."""
    return Elsewhere(server, APP)


def field(var: str, value: str, type: str = "text-single") -> str:
    """One field of the summary."""
    return f"<field var='{var}' type='{type}'><value>{value}</value></field>"


def notification(count: int = 1, *, sender: str = "", body: str = "New message!", node: str = "node='yxs32'",
                 options: str = "") -> str:  # fmt: skip
    """What the app server is sent."""
    who = field("last-message-sender", sender) if sender else ""
    summary = field("FORM_TYPE", "urn:xmpp:push:summary", "hidden") + field("message-count", str(count)) + who
    more = f"<publish-options>{options}</publish-options>" if options else ""
    return (f"<iq type='set' from='example.org' to='{APP}' id='*'><pubsub xmlns='{PUBSUB}'><publish {node}><item>"
            f"<notification {PUSH}><x xmlns='jabber:x:data' type='submit'>{summary}{field('last-message-body', body)}"
            f"</x></notification></item></publish>{more}</pubsub></iq>")  # fmt: skip


def registers(client: Client, wish: str = "enable", node: str = "node='yxs32'", options: str = "") -> None:
    """Enable or disable push."""
    client.sends(f"<iq type='set' id='x42'><{wish} {PUSH} jid='{APP}' {node}>{options}</{wish}></iq>")
    client.receives("<iq type='result' id='x42'/>")


def writes(client: Client, body: str, to: str = JULIET, attributes: str = "type='chat'") -> None:
    """Write to juliet."""
    client.sends(f"<message to='{to}' {attributes}><body>{body}</body></message>")
    client.passes_barrier()


def answers(app: Elsewhere, *, error: str = "", type: str = "cancel") -> None:
    """The app server answers the last request."""
    request: ET.Element = app.came[-1]
    app.came.clear()
    content = f"<error type='{type}'><{error} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>" if error else ""
    app.says(f"<iq type='{'error' if error else 'result'}' id='{request.get('id')}' from='{APP}' to='example.org'>"
             f"{content}</iq>")  # fmt: skip


def registered(server: MemoryServer) -> list[str]:
    """The keys of juliet's registrations."""
    return list(server.server.registry.feature(xmppd.Push).registrations.items(xmppd.JID.parse(JULIET)))


# ---- registering (§4 to §6) ----------------------------------------------------------------


def test_it_can_be_discovered(romeo: Client) -> None:
    """§4.1 examples 4 and 5; clients.md: Conversations looks at the domain, too"""
    for to in (ROMEO, "example.org"):
        romeo.sends(f"<iq type='get' id='d' to='{to}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
        info = romeo.receives("<iq type='result' id='d' ...>...</iq>")
        assert "urn:xmpp:push:0" in {child.get("var") for child in info[0]}


@pytest.mark.parametrize(("wish", "error"), [
    (f"<enable {PUSH}/>", "bad-request"),
    (f"<enable {PUSH} jid=''/>", "bad-request"),
    (f"<disable {PUSH}/>", "bad-request"),
    (f"<enable {PUSH} jid='@'/>", "jid-malformed"),
    (f"<enable {PUSH} jid='{APP}'>{SECRET.replace('publish-options', 'other')}</enable>", "bad-request"),
    (f"<enable {PUSH} jid='{APP}'>{SECRET.replace('kla-91', 'x' * 5000)}</enable>", "bad-request"),
])  # fmt: skip
def test_nonsense_is_refused(juliet: Client, wish: str, error: str) -> None:
    """§5: MUST contain a jid; the form is one of publish-options, and short"""
    juliet.sends(f"<iq type='set' id='x42'>{wish}</iq>")
    juliet.receives(f"<iq type='error' id='x42'><error ...><{error} .../></error></iq>")


def test_nobody_registers_for_others(romeo: Client) -> None:
    """§9: an account's own clients only"""
    romeo.sends(f"<iq type='set' id='x42' to='{JULIET}'><enable {PUSH} jid='{APP}' node='evil'/></iq>")
    romeo.receives("<iq type='error' id='x42'><error type='cancel'><service-unavailable .../></error></iq>")


@pytest.mark.config(limits={"pushes": 2})
def test_registrations_are_bounded(server: MemoryServer, juliet: Client, app: Elsewhere) -> None:
    """§5: the oldest makes room, or a client that gets a new node each time would lock itself out"""
    for node in ("a", "b", "a", "c"):
        registers(juliet, node=f"node='{node}'")
    assert registered(server) == [f"{APP} b", f"{APP} c"] or registered(server) == [f"{APP} a", f"{APP} c"]


@pytest.mark.config(limits={"pushes": 0})
def test_the_owner_may_allow_none(juliet: Client) -> None:
    """A limit of 0"""
    juliet.sends(f"<iq type='set' id='x42'><enable {PUSH} jid='{APP}'/></iq>")
    juliet.receives("<iq type='error' id='x42'><error type='cancel'><not-allowed .../></error></iq>")


def test_one_node_or_all_are_disabled(server: MemoryServer, juliet: Client, app: Elsewhere) -> None:
    """§6 examples 10 and 11"""
    for node in ("node='a'", "node='b'", ""):
        registers(juliet, node=node)
    registers(juliet, "disable", "node='a'")
    assert registered(server) == [f"{APP} b", f"{APP} "]
    registers(juliet, "disable", "")
    assert registered(server) == []
    registers(juliet, "disable", "")


# ---- publishing (§7) -----------------------------------------------------------------------


def test_a_message_for_nobody_there_is_published(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """§7 example 12: that there is a message, and no more"""
    registers(juliet)
    juliet.closes()
    writes(romeo, "Wherefore art thou?")
    app.receives(notification())


@pytest.mark.parametrize(("content", "sender", "body"), [
    pytest.param("sender", f"{ROMEO}/orchard", "New message!", marks=pytest.mark.config(push={"content": "sender"})),
    pytest.param("body", f"{ROMEO}/orchard", "Wherefore?", marks=pytest.mark.config(push={"content": "body"})),
])  # fmt: skip
def test_the_owner_may_have_more_told(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere, content: str, sender: str, body: str
) -> None:
    """§7 example 12: the fields that clients expect"""
    assert server.server.config.push_content == content
    registers(juliet)
    juliet.closes()
    writes(romeo, "Wherefore?")
    app.receives(notification(sender=sender, body=body))


@pytest.mark.config(push={"content": "body"})
def test_long_bodies_are_cut(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """Notifications of telephones hold 4 KB"""
    registers(juliet)
    juliet.closes()
    writes(romeo, "x" * 10_000)
    app.receives(notification(sender=f"{ROMEO}/orchard", body="x" * xmppd.MAX_PUSHED_BODY))


def test_the_app_servers_options_are_repeated(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """§5 example 9, §7 example 13; the last request's count"""
    registers(juliet, options=SECRET.replace("kla-91", "old"))
    registers(juliet, options=SECRET)
    juliet.closes()
    writes(romeo, "O")
    app.receives(notification(options=SECRET))


def test_a_registration_without_node(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """§5: SHOULD contain a node"""
    registers(juliet, node="")
    juliet.closes()
    writes(romeo, "O")
    app.receives(notification(node=""))


def test_one_request_at_a_time(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """Bounded: what comes while a request is under way is told when it is answered, at once"""
    registers(juliet)
    juliet.closes()
    for body in "abc":
        writes(romeo, body)
    assert len(app.came) == 1
    answers(app)
    app.receives(notification(3))
    answers_to = server.server._questions
    assert len(answers_to) == 1


def test_who_is_there_is_not_woken(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """§7: and when it is back, the count begins anew"""
    juliet.comes_online()
    registers(juliet)
    writes(romeo, "O")
    juliet.receives(f"<message from='{ROMEO}/orchard' to='{JULIET}' type='chat'><body>O</body></message>")
    app.receives_nothing()


def test_other_devices_do_not_keep_a_telephone_asleep(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """A registration belongs to the client that has made it"""
    registers(juliet)
    juliet.closes()
    desk = server.client().login("juliet", resource="desk")
    desk.comes_online()
    writes(romeo, "O", f"{JULIET}/desk")
    desk.receives(f"<message from='{ROMEO}/orchard' to='{JULIET}/desk' type='chat'><body>O</body></message>")
    app.receives(notification())
    desk.sends(f"<message to='{JULIET}'><body>my own words</body></message>")
    desk.receives(f"<message from='{JULIET}/desk' to='{JULIET}'><body>my own words</body></message>")
    app.receives_nothing()


@pytest.mark.parametrize("message", [
    "<message to='{to}' type='chat'><composing xmlns='http://jabber.org/protocol/chatstates'/></message>",
    "<message to='{to}' type='chat'><received xmlns='urn:xmpp:receipts' id='m'/></message>",
    "<message to='{to}' type='headline'><body>news</body></message>",
    "<message to='{to}' type='error'><body>O</body></message>",
    "<presence to='{to}'/>",
])  # fmt: skip
def test_trifles_wake_nobody(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere, message: str) -> None:
    """§7: "an event warranting a push notification\""""
    registers(juliet)
    juliet.closes()
    romeo.sends(message.format(to=JULIET))
    romeo.passes_barrier()
    app.receives_nothing()


@pytest.mark.parametrize("content", [
    "<encrypted xmlns='eu.siacs.conversations.axolotl'/>",
    "<propose xmlns='urn:xmpp:jingle-message:0' id='call'/><store xmlns='urn:xmpp:hints'/>",
    "<x xmlns='jabber:x:conference' jid='coven@chat.example.com'/>",
])  # fmt: skip
def test_calls_and_secrets_and_invitations_wake(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere, content: str
) -> None:
    """They have no body, and matter all the same"""
    registers(juliet)
    juliet.closes()
    romeo.sends(f"<message to='{JULIET}' type='chat'>{content}</message>")
    romeo.passes_barrier()
    app.receives(notification())


def test_blocked_people_wake_nobody(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """XEP-0191"""
    registers(juliet)
    juliet.sends(f"<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{ROMEO}'/></block></iq>")
    juliet.receives_anything()
    juliet.closes()
    romeo.sends(f"<message to='{JULIET}' type='chat' id='m'><body>O</body></message>")
    romeo.receives("<message type='error' id='m' ...>...</message>")
    app.receives_nothing()


# ---- with stream management (XEP-0198) -----------------------------------------------------


def manages(client: Client) -> str:
    """Enable stream management."""
    client.sends(f"<enable {SM} resume='true'/>")
    return client.receives(f"<enabled {SM} ...>...</enabled>").attrib["id"]


def test_a_session_that_waits_is_woken(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """For messages, for rooms that it is in, and not after it is back"""
    registers(juliet)
    id = manages(juliet)
    juliet.disconnects()
    writes(romeo, "O", BALCONY)
    app.receives(notification())
    room = Elsewhere(server, "rooms.example.com")
    room.says(f"<message type='groupchat' from='coven@rooms.example.com/witch' to='{BALCONY}'><body>P</body></message>")
    app.receives_nothing()
    juliet = server.client()
    juliet.logs_in("juliet")
    juliet.sends(f"<resume {SM} previd='{id}' h='0'/>")
    juliet.receives(f"<resumed {SM} previd='{id}' h='0'/>")
    juliet.jid = BALCONY
    assert len(juliet.receives_anything()) == 2
    writes(romeo, "Q", BALCONY)
    app.receives_nothing()
    juliet.forgets_unread()
    juliet.sends(f"<a {SM} h='4'/>")
    juliet.receives_anything()
    juliet.sends(f"<a {SM} h='5'/>")
    juliet.disconnects()
    room.says(f"<message type='groupchat' from='coven@rooms.example.com/witch' to='{BALCONY}'><body>R</body></message>")
    app.receives(notification())


def test_what_was_on_its_way_when_the_stream_broke_wakes(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """The message went out, but nobody says that it arrived"""
    registers(juliet)
    manages(juliet)
    writes(romeo, "O", BALCONY)
    juliet.receives(f"<message from='{ROMEO}/orchard' to='{BALCONY}' type='chat'><body>O</body></message>")
    app.receives_nothing()
    juliet.disconnects()
    app.receives(notification())


def test_a_client_that_does_not_answer_is_woken_before_it_is_given_up(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """A telephone's system may stop an app and leave its connection open: once, after twenty seconds"""
    registers(juliet)
    manages(juliet)
    writes(romeo, "O", BALCONY)
    juliet.receives(f"<message from='{ROMEO}/orchard' to='{BALCONY}' type='chat'><body>O</body></message>")
    for seconds in (xmppd.ACK_DELAY, xmppd.ACK_STALL):
        app.receives_nothing()
        server.clock.skip(seconds)
        server.loop.turn(0)
    app.receives(notification())
    server.clock.skip(server.server.config.limits.answer_timeout)
    server.loop.turn(0)
    juliet.receives_stream_error("connection-timeout")
    assert juliet.is_closed()
    app.receives_nothing()


# ---- failures (§7.1, §8) -------------------------------------------------------------------


def test_an_error_disables_the_registration(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """§7.1"""
    registers(juliet)
    juliet.closes()
    writes(romeo, "O")
    answers(app, error="item-not-found")
    assert registered(server) == []
    writes(romeo, "P")
    app.receives_nothing()


@pytest.mark.parametrize(("error", "type"), [("resource-constraint", "wait"), ("remote-server-not-found", "cancel")])
def test_what_may_pass_disables_it_only_in_the_end(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere, error: str, type: str
) -> None:
    """§7.1: until a sufficient number of errors have been received in a row"""
    registers(juliet)
    juliet.closes()
    for _ in range(xmppd.MAX_PUSH_FAILURES - 1):
        writes(romeo, "O")
        answers(app, error=error, type=type)
    writes(romeo, "O")
    answers(app)
    writes(romeo, "O")
    answers(app, error=error, type=type)
    assert registered(server) == [f"{APP} yxs32"]
    for _ in range(xmppd.MAX_PUSH_FAILURES - 1):
        writes(romeo, "O")
        answers(app, error=error, type=type)
    assert registered(server) == []


def test_an_app_server_that_does_not_answer_blocks_nothing(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """Never blocking: after a minute the next request may go"""
    registers(juliet)
    juliet.closes()
    writes(romeo, "O")
    app.receives(notification())
    writes(romeo, "P")
    app.receives_nothing()
    server.clock.skip(xmppd.ANSWER_TIMEOUT + 1)
    server.loop.turn(0)
    app.receives(notification(2))


def test_the_app_server_may_take_it_back(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """§8 example 15; nobody else may"""
    registers(juliet)
    juliet.closes()
    told = f"<pubsub xmlns='{PUBSUB}' node='yxs32'><affiliation jid='{JULIET}' affiliation='none'/></pubsub></message>"
    Elsewhere(server, "evil.example").says(f"<message from='evil.example' to='{JULIET}'>{told}")
    assert registered(server) == [f"{APP} yxs32"]
    app.says(f"<message from='{APP}' to='{JULIET}'>{told}")
    assert registered(server) == []


def test_disabled_while_under_way(server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere) -> None:
    """§6: MUST NOT attempt publishing notifications to the service"""
    registers(juliet)
    juliet.closes()
    writes(romeo, "O")
    writes(romeo, "P")
    other = server.client().login("juliet", resource="other")
    registers(other, "disable")
    answers(app)
    app.receives_nothing()


def test_an_account_that_goes_takes_its_registrations_along(
    server: MemoryServer, romeo: Client, juliet: Client, app: Elsewhere
) -> None:
    """Trap 13"""
    registers(juliet)
    juliet.closes()
    writes(romeo, "O")
    server.server.remove_account(xmppd.JID.parse(JULIET))
    answers(app)
    server.add_account(JULIET, "juliet-secret")
    writes(romeo, "P")
    app.receives_nothing()
    assert registered(server) == []


def test_registrations_outlive_a_restart(process_server: ProcessServer) -> None:
    """§5: and a registration that is repeated is still one"""
    server = process_server
    juliet = server.client().login("juliet", resource="balcony")
    registers(juliet)
    juliet.closes()
    server.stop()
    server.start()
    juliet = server.client().login("juliet", resource="balcony")
    registers(juliet)
    juliet.closes()
    server.stop()
    stored = list((server.data / "example.org" / "push").rglob("juliet*"))
    assert len(stored) == 1 and stored[0].read_text().count('"yxs32"') == 1, stored[0].read_text()
