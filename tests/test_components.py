"""Chapter 23: components (XEP-0114)."""

from __future__ import annotations

import pytest

import xmppd
from tests.dialogue import Client
from tests.elsewhere import Elsewhere
from tests.gateway import COMPONENT, COMPONENTS, NAME, Gateway
from tests.servers import MemoryServer, configuration, write_configuration

pytestmark = pytest.mark.config(components=COMPONENTS, listen={"component": ["127.0.0.1:0"]})

STANZAS = "urn:ietf:params:xml:ns:xmpp-stanzas"
AWAY = f"<error type='wait'><remote-server-timeout xmlns='{STANZAS}'/></error>"
BODY = "<body>But soft</body>"


@pytest.fixture
def gateway(server):
    return Gateway(server).connects()


# -- the stream


@pytest.mark.wire
def test_a_component_connects_and_talks_with_people(romeo, server):
    """XEP0114-3-6, XEP0114-3-9, XEP0114-3-10"""
    gateway = Gateway(server).connects()
    romeo.comes_online()
    gateway.sends(f"<message from='mercutio@{NAME}/phone' to='romeo@example.org' type='chat'>{BODY}</message>")
    romeo.receives(f"<message from='mercutio@{NAME}/phone' to='romeo@example.org' type='chat'>{BODY}</message>")
    romeo.sends(f"<message to='mercutio@{NAME}/phone' type='chat'>{BODY}</message>")
    gateway.receives(f"<message from='romeo@example.org/orchard' to='mercutio@{NAME}/phone' type='chat'>{BODY}</message>")
    gateway.closes()


def test_the_header_names_the_component_and_has_an_unpredictable_id(server):
    """XEP0114-3-1: no version, no features"""
    first, second = Gateway(server), Gateway(server)
    ids = set()
    for gateway in (first, second):
        gateway.connect()
        gateway.opens_stream(version="1.0")
        header = gateway.receives_stream_header()
        assert (header.get("from"), header.get("version")) == (NAME, None)
        ids.add(header.attrib["id"])
        gateway.sends_handshake(header)
        gateway.receives("<handshake/>")
        gateway.closes()
    assert len(ids) == 2 and all(len(id) > 20 for id in ids)


def test_names_that_are_no_components_are_unknown(server):
    """XEP0114-3-2, S83: above all not a host of ours"""
    for name in ("example.org", "conference.example.org", "nobody.example.org", "example.com"):
        assert is_refused(server, "host-unknown", to=name)


def test_a_name_that_is_none_is_refused(server):
    for name in ("", "a b"):
        assert is_refused(server, "improper-addressing", to=name)


def is_refused(server, condition: str, **header: str) -> bool:
    """Check that a header is answered by a header, this error, and the end."""
    gateway = Gateway(server).connect()
    gateway.opens_stream(**header)
    gateway.receives_stream_header()
    gateway.receives_stream_error(condition)
    return gateway.is_closed()


def test_a_second_one_of_the_same_name_is_a_conflict(gateway, server):
    """XEP0114-3-2"""
    assert is_refused(server, "conflict")
    gateway.receives_nothing()


def test_of_two_that_open_at_once_the_first_to_prove_itself_stays(server):
    """XEP0114-3-2"""
    first, second = Gateway(server), Gateway(server)
    headers = []
    for gateway in (first, second):
        gateway.connect()
        gateway.opens_stream()
        headers.append(gateway.receives_stream_header())
    second.sends_handshake(headers[1])
    second.receives("<handshake/>")
    first.sends_handshake(headers[0])
    first.receives_stream_error("conflict")
    assert first.is_closed()
    second.closes()


def test_another_namespace_is_invalid(server):
    """XEP0114-3-3"""
    for namespace in ("jabber:client", "jabber:server", "jabber:component:connect"):
        assert is_refused(server, "invalid-namespace", xmlns=namespace)


def test_the_handshake_is_compared_in_constant_time(server, monkeypatch):
    """XEP0114-3-4, S83"""
    compared = []
    monkeypatch.setattr(xmppd.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    Gateway(server).connects().closes()
    [(given, expected)] = compared
    assert given == expected and len(given) == 40 and given == given.lower()


def test_a_wrong_handshake_ends_the_stream(server):
    """XEP0114-3-5, S83"""
    for wrong in ("", "0" * 40, "ä", "A" * 40):
        gateway = Gateway(server).connect()
        gateway.opens_stream()
        gateway.receives_stream_header()
        gateway.sends(f"<handshake>{wrong}</handshake>")
        gateway.receives_stream_error("not-authorized")
        assert gateway.is_closed()


def test_each_component_has_a_secret_of_its_own(server):
    """XEP0114-4-1, S83: that of another component does not do"""
    stranger = Gateway(server, "other.example.org").connect()
    stranger.opens_stream()
    stranger.sends_handshake(stranger.receives_stream_header())
    stranger.receives_stream_error("not-authorized")
    assert stranger.is_closed()


def test_the_handshake_is_for_one_stream_only(server):
    """S83: the id is new each time, so that nothing can be replayed"""
    gateway = Gateway(server).connect()
    gateway.opens_stream()
    old = gateway.receives_stream_header()
    gateway.disconnects()
    gateway.connect()
    gateway.opens_stream()
    gateway.receives_stream_header()
    gateway.sends_handshake(old)
    gateway.receives_stream_error("not-authorized")
    assert gateway.is_closed()


def test_nothing_comes_before_the_handshake(server, romeo):
    """XEP0114-3-7"""
    romeo.comes_online()
    for early in (
        f"<message from='a@{NAME}' to='romeo@example.org'>{BODY}</message>",
        "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>AGE=</auth>",
        "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    ):
        gateway = Gateway(server).connect()
        gateway.opens_stream()
        gateway.receives_stream_header()
        gateway.sends(early)
        gateway.receives_stream_error("not-authorized")
        assert gateway.is_closed()
    romeo.receives_nothing()


def test_who_shows_no_secret_has_a_minute(server):
    gateway = Gateway(server).connect()
    gateway.opens_stream()
    gateway.receives_stream_header()
    server.clock.skip(61)
    gateway.receives_stream_error("connection-timeout")
    assert gateway.is_closed()


def test_a_component_may_be_silent_for_hours(gateway, server):
    """RFC6120-4.6.1: white space keeps the connection, nobody is asked"""
    for _ in range(30):
        server.clock.skip(301)
        gateway.receives_nothing()


# -- who may say what


FALSE_ADDRESSES = [
    ("to='romeo@example.org'", "improper-addressing"),
    (f"from='a@{NAME}'", "improper-addressing"),
    ("from='' to='romeo@example.org'", "improper-addressing"),
    ("from='@' to='romeo@example.org'", "improper-addressing"),
    ("from='juliet@example.org' to='romeo@example.org'", "invalid-from"),
    ("from='example.org' to='romeo@example.org'", "invalid-from"),
    ("from='a@other.example.org' to='romeo@example.org'", "invalid-from"),
    (f"from='a@sub.{NAME}' to='romeo@example.org'", "invalid-from"),
]


def test_it_speaks_for_its_domain_only(server, romeo):
    """XEP0114-3-8, S83"""
    romeo.comes_online()
    query = "<query xmlns='jabber:iq:version'/>"
    for addresses, condition in FALSE_ADDRESSES:
        for stanza in (f"<message {addresses}>{BODY}</message>", f"<presence {addresses}/>", f"<iq {addresses} type='get' id='1'>{query}</iq>"):
            gateway = Gateway(server).connects()
            gateway.sends(stanza)
            gateway.receives_stream_error(condition)
            assert gateway.is_closed()
    romeo.receives_nothing()


def test_it_speaks_for_every_address_of_its_domain(gateway, romeo):
    """XEP0114-3-9; addresses are told in their prepared form"""
    romeo.comes_online()
    for sender in (NAME, f"a@{NAME}", f"a@{NAME}/b", f"{NAME}/b", "A@Gateway.Example.ORG/B"):
        gateway.sends(f"<message from='{sender}' to='romeo@example.org'>{BODY}</message>")
        romeo.receives(f"<message from='{xmppd.JID.parse(sender)}' to='romeo@example.org'>{BODY}</message>")


def test_what_cannot_be_delivered_comes_back(gateway):
    gateway.sends(f"<message id='1' from='a@{NAME}' to='@'>{BODY}</message>")
    gateway.receives(f"<message id='1' type='error' from='@' to='a@{NAME}'><error type='modify'><jid-malformed .../></error></message>")
    gateway.sends(f"<iq type='get' id='2' from='a@{NAME}' to='romeo@example.org'/>")
    gateway.receives(f"<iq type='error' id='2' to='a@{NAME}'><error type='modify'><bad-request .../></error></iq>")
    gateway.sends(f"<message id='3' from='a@{NAME}' to='romeo@nowhere.example'>{BODY}</message>")
    gateway.receives(f"<message id='3' type='error' to='a@{NAME}'><error type='cancel'><remote-server-not-found .../></error></message>")


def test_its_language_is_that_of_its_stream(server, romeo):
    """RFC6120-4.7.4"""
    gateway = Gateway(server).connect()
    gateway.opens_stream(xml_lang="it")
    gateway.sends_handshake(gateway.receives_stream_header())
    gateway.receives("<handshake/>")
    romeo.comes_online()
    gateway.sends(f"<message from='{NAME}' to='romeo@example.org'>{BODY}</message>")
    romeo.receives(f"<message xml:lang='it' from='{NAME}' to='romeo@example.org'>{BODY}</message>")
    gateway.closes()


def test_something_that_is_no_stanza_ends_the_stream(gateway):
    gateway.sends("<route from='a' to='b'/>")
    gateway.receives_stream_error("unsupported-stanza-type")
    assert gateway.is_closed()


def test_it_may_end_with_an_error_of_its_own(gateway):
    gateway.sends("<stream:error><system-shutdown xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>")
    assert gateway.is_closed()


def test_towards_accounts_it_is_a_stranger(gateway, romeo):
    """DESIGN §3: what only local users may ask stays theirs"""
    for to, payload in (
        ("example.org", "<query xmlns='jabber:iq:register'/>"),
        ("romeo@example.org", "<query xmlns='jabber:iq:roster'/>"),
        ("romeo@example.org/orchard", "<query xmlns='jabber:iq:version'/>"),
        ("nobody@example.org", "<query xmlns='http://jabber.org/protocol/disco#info'/>"),
    ):
        gateway.sends(f"<iq type='get' id='1' from='{NAME}' to='{to}'>{payload}</iq>")
        gateway.receives("<iq type='error' id='1'><error type='cancel'><service-unavailable .../></error></iq>")
    romeo.receives_nothing()


# -- everything that goes to its domain


def test_all_kinds_of_stanzas_reach_all_its_addresses_unchanged(gateway, romeo):
    """XEP0114-3-10"""
    extra = "<x xmlns='urn:example:x' a='&lt;'><y>ä&amp;</y></x>"
    for to in (NAME, f"someone@{NAME}", f"someone@{NAME}/somewhere", f"{NAME}/somewhere"):
        romeo.sends(f"<message to='{to}' xml:lang='en' id='1'>{BODY}{extra}</message>")
        gateway.receives(f"<message from='romeo@example.org/orchard' to='{to}' xml:lang='en' id='1'>{BODY}{extra}</message>")
        romeo.sends(f"<presence to='{to}'>{extra}</presence>")
        gateway.receives(f"<presence from='romeo@example.org/orchard' to='{to}'>{extra}</presence>")
        romeo.sends(f"<iq type='get' id='2' to='{to}'><query xmlns='jabber:iq:version'/></iq>")
        gateway.receives(f"<iq type='get' id='2' from='romeo@example.org/orchard' to='{to}'><query xmlns='jabber:iq:version'/></iq>")
        gateway.sends(f"<iq type='result' id='2' from='{to}' to='romeo@example.org/orchard'/>")
        romeo.receives(f"<iq type='result' id='2' from='{to}'/>")
    romeo.disconnects()
    gateway.receives(*(f"<presence type='unavailable' from='romeo@example.org/orchard' to='{to}'/>"
                       for to in (NAME, f"someone@{NAME}", f"someone@{NAME}/somewhere", f"{NAME}/somewhere")))  # fmt: skip


def test_components_reach_each_other(gateway, server):
    """XEP0114-3-10"""
    other = Gateway(server, "other.example.org", "mantua").connects()
    gateway.sends(f"<message from='a@{NAME}' to='b@other.example.org'>{BODY}</message>")
    other.receives(f"<message from='a@{NAME}' to='b@other.example.org'>{BODY}</message>")


def test_components_and_other_servers_reach_each_other(gateway, server):
    """XEP0114-3-10, XEP0114-3-12"""
    elsewhere = Elsewhere(server)
    gateway.sends(f"<message from='a@{NAME}' to='b@example.com'>{BODY}</message>")
    gateway.receives_nothing()
    elsewhere.receives(f"<message from='a@{NAME}' to='b@example.com'>{BODY}</message>")
    elsewhere.says(f"<message from='b@example.com' to='a@{NAME}'>{BODY}</message>")
    gateway.receives(f"<message from='b@example.com' to='a@{NAME}'>{BODY}</message>")


def test_people_subscribe_to_what_is_behind_a_gateway(gateway, romeo: Client):
    """RFC6121-3.1: as with contacts of other servers; probes included (§4.3)"""
    romeo.comes_online()
    contact = f"mercutio@{NAME}"
    romeo.sends(f"<presence type='subscribe' to='{contact}'/>")
    gateway.receives(f"<presence type='subscribe' from='romeo@example.org' to='{contact}'/>")
    gateway.sends(f"<presence type='subscribed' from='{contact}' to='romeo@example.org'/>")
    gateway.sends(f"<presence from='{contact}/phone' to='romeo@example.org'><show>away</show></presence>")
    push = f"<iq type='set' id='*'><query xmlns='jabber:iq:roster' ...><item jid='{contact}' ...>...</item></query></iq>"
    romeo.receives(push, f"<presence type='subscribed' from='{contact}' to='romeo@example.org'/>", push)
    romeo.receives(f"<presence from='{contact}/phone' to='romeo@example.org'><show>away</show></presence>")
    gateway.sends(f"<presence type='subscribe' from='{contact}' to='romeo@example.org'/>")
    romeo.receives(f"<presence type='subscribe' from='{contact}' to='romeo@example.org'/>")
    romeo.sends(f"<presence type='subscribed' to='{contact}'/>")
    romeo.receives(f"<iq type='set' id='*'><query xmlns='jabber:iq:roster' ...><item jid='{contact}' subscription='both'/></query></iq>")
    gateway.receives(f"<presence type='subscribed' from='romeo@example.org' to='{contact}'/>")
    gateway.receives(f"<presence from='romeo@example.org/orchard' to='{contact}'/>")
    romeo.sends("<presence><show>dnd</show></presence>")
    romeo.receives("<presence from='romeo@example.org/orchard'><show>dnd</show></presence>")
    gateway.receives(f"<presence from='romeo@example.org/orchard' to='{contact}'><show>dnd</show></presence>")
    gateway.sends(f"<presence type='probe' from='{contact}' to='romeo@example.org'/>")
    gateway.receives(f"<presence from='romeo@example.org/orchard' to='{contact}'><show>dnd</show></presence>")


def test_connected_components_are_items_of_the_host_above_them(gateway, server, romeo):
    """XEP0114-3-13: of the others nothing is said"""
    items = "<query xmlns='http://jabber.org/protocol/disco#items'/>"
    rooms = "<item jid='conference.{}' name='Chat rooms'/>"
    romeo.sends(f"<iq type='get' id='1' to='example.org'>{items}</iq><iq type='get' id='2' to='example.net'>{items}</iq>")
    romeo.receives(f"<iq type='result' id='1'>{items[:-2]}><item jid='{NAME}'/>{rooms.format('example.org')}</query></iq>")
    romeo.receives(f"<iq type='result' id='2'>{items[:-2]}>{rooms.format('example.net')}</query></iq>")
    gateway.closes()
    romeo.sends(f"<iq type='get' id='3' to='example.org'>{items}</iq>")
    romeo.receives(f"<iq type='result' id='3'>{items[:-2]}>{rooms.format('example.org')}</query></iq>")


# -- while it is away


def test_for_a_moment_stanzas_wait_and_arrive_in_order(gateway, romeo, server):
    gateway.closes()
    for number in range(3):
        romeo.sends(f"<message to='a@{NAME}' id='{number}'>{BODY}</message>")
    romeo.sends(f"<iq type='get' id='v' to='{NAME}'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives_nothing()
    server.clock.skip(29)
    romeo.receives_nothing()
    gateway.connects()
    gateway.receives(*(f"<message from='romeo@example.org/orchard' to='a@{NAME}' id='{number}'>{BODY}</message>" for number in range(3)))
    gateway.receives(f"<iq type='get' id='v' from='romeo@example.org/orchard' to='{NAME}'><query xmlns='jabber:iq:version'/></iq>")
    server.clock.skip(100)
    romeo.receives_nothing()


def test_after_half_a_minute_they_bounce_and_later_ones_at_once(romeo, server):
    """XEP0114-3-11; also when it has never been there"""
    message = f"<message to='a@{NAME}' id='1'>{BODY}</message>"
    error = f"<message type='error' from='a@{NAME}' id='1'>{AWAY}</message>"
    romeo.sends(message)
    romeo.receives_nothing()
    server.clock.skip(31)
    romeo.receives(error)
    romeo.sends(message)
    romeo.receives(error)
    romeo.sends(f"<iq type='get' id='2' to='{NAME}'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives(f"<iq type='error' id='2'>{AWAY}</iq>")
    romeo.sends(f"<message type='error' to='a@{NAME}'><error type='cancel'/></message><iq type='result' id='3' to='{NAME}'/>")
    romeo.receives_nothing()
    Gateway(server).connects().receives_nothing()


@pytest.mark.config(components=COMPONENTS, limits={"component_queue": 2})
def test_what_waits_is_bounded_in_number(romeo):
    for number in range(3):
        romeo.sends(f"<message to='a@{NAME}' id='{number}'>{BODY}</message>")
    romeo.receives(f"<message type='error' from='a@{NAME}' id='2'>{AWAY}</message>")


@pytest.mark.config(components=COMPONENTS, limits={"unread": 65536})
def test_what_waits_is_bounded_in_bytes(romeo):
    body = f"<body>{'x' * 40_000}</body>"
    for number in range(2):
        romeo.sends(f"<message to='a@{NAME}' id='{number}'>{body}</message>")
    romeo.receives(f"<message type='error' from='a@{NAME}' id='1'>{AWAY}</message>")


# -- the configuration


def reload(server: MemoryServer, components: dict[str, dict[str, str]], **more: object) -> None:
    """Let the server read another configuration; what `Server.reload` does beside sockets."""
    folder = server.server.config.data.parent
    config = xmppd.load_config(write_configuration(folder, configuration({"components": components}, more)), data=folder / "data")
    server.server.config = config
    for event in server.server.registry.listeners("reloaded"):
        event()


def test_a_component_that_is_not_wanted_any_more_has_to_go(gateway, server, romeo):
    """RFC6120-4.9.3.5"""
    reload(server, {"new.example.org": {"secret": "s"}})
    gateway.receives_stream_error("host-gone")
    assert gateway.is_closed()
    romeo.sends(f"<message to='a@{NAME}' id='1'>{BODY}</message>")
    romeo.receives(f"<message type='error' from='a@{NAME}' id='1'><error type='cancel'><remote-server-not-found .../></error></message>")
    Gateway(server, "new.example.org", "s").connects().closes()


def test_one_that_is_not_wanted_while_it_introduces_itself_has_to_go(server):
    gateway = Gateway(server).connect()
    gateway.opens_stream()
    header = gateway.receives_stream_header()
    reload(server, {})
    gateway.sends_handshake(header)
    gateway.receives_stream_error("host-gone")
    assert gateway.is_closed()


ROOMS = "conference.example.org"


@pytest.mark.config(components={ROOMS: {"secret": "s"}})
def test_a_component_may_be_the_room_service(server, romeo):
    rooms = Gateway(server, ROOMS, "s").connects()
    romeo.sends(f"<presence to='kitchen@{ROOMS}/Romeo'><x xmlns='http://jabber.org/protocol/muc'/></presence>")
    rooms.receives(f"<presence from='romeo@example.org/orchard' to='kitchen@{ROOMS}/Romeo'><x xmlns='http://jabber.org/protocol/muc'/></presence>")
    romeo.sends("<iq type='get' id='1' to='example.org'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    romeo.receives(f"<iq type='result' id='1'><query xmlns='http://jabber.org/protocol/disco#items'><item jid='{ROOMS}'/></query></iq>")
    rooms.closes()
    romeo.disconnects()


def test_rooms_and_a_component_may_take_turns(server, romeo):
    join = f"<presence to='kitchen@{ROOMS}/Romeo'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    romeo.sends(join)
    romeo.receives(f"<presence from='kitchen@{ROOMS}/Romeo' ...>...</presence>", f"<message from='kitchen@{ROOMS}' ...>...</message>")
    reload(server, {ROOMS: {"secret": "s"}})
    romeo.receives(f"<presence type='unavailable' from='kitchen@{ROOMS}/Romeo' ...>...</presence>")
    rooms = Gateway(server, ROOMS, "s").connects()
    romeo.sends(join)
    rooms.receives("<presence from='romeo@example.org/orchard' ...>...</presence>")
    reload(server, {})
    rooms.receives_stream_error("host-gone")
    assert rooms.is_closed()
    romeo.sends(join)
    romeo.receives(f"<presence from='kitchen@{ROOMS}/Romeo' ...>...</presence>", f"<message from='kitchen@{ROOMS}' ...>...</message>")


@pytest.mark.config()
def test_without_components_nobody_listens_for_them(server):
    assert "component" not in server.server.protocols


def test_the_trace_does_not_tell_the_proof():
    """S86"""
    assert xmppd.masked(xmppd.E(xmppd.CLIENT("handshake"), None, "aaee83")).text == "***"


def test_when_the_server_ends_components_hear_of_it(gateway, server):
    """RFC6120-4.9.3.20"""
    for event in server.server.registry.listeners("shutting_down"):
        event()
    gateway.receives_stream_error("system-shutdown")
    assert gateway.is_closed()


def test_the_namespace_is_that_of_components():
    assert xmppd.COMPONENT == COMPONENT
