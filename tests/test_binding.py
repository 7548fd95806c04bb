"""Resource binding (RFC 6120 §7) and the session of RFC 3921."""

from __future__ import annotations

import pytest

from tests.dialogue import BIND, Client, password_of

SESSION = "urn:ietf:params:xml:ns:xmpp-session"


@pytest.fixture
def client(server) -> Client:
    """Romeo, authenticated, not yet bound."""
    return authenticated(server)


def authenticated(server, name: str = "romeo") -> Client:
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    client.authenticates(name, password_of(name))
    client.negotiates()
    return client


def wants(client: Client, resource: str, id: str = "b") -> None:
    client.sends(f"<iq type='set' id='{id}'><bind xmlns='{BIND}'><resource>{resource}</resource></bind></iq>")


def test_the_client_gets_the_resource_that_it_wants(client) -> None:
    """RFC6120-7.6.1-1, RFC6120-7.7.1-1, RFC6120-7.3.2-1"""
    client.sends(f"<iq type='set' id='wy2xa82b4'><bind xmlns='{BIND}'><resource>balcony scene ☾</resource></bind></iq>")
    client.receives(f"<iq type='result' id='wy2xa82b4' from='example.org'><bind xmlns='{BIND}'><jid>romeo@example.org/balcony scene ☾</jid></bind></iq>")  # fmt: skip
    client.jid = "romeo@example.org/balcony scene ☾"
    client.receives_nothing()


def test_a_resource_is_prepared(client) -> None:
    """RFC6120-7.7.1-1, RFC6120-4.3.6-1"""
    assert client.binds("\u212bngstr\u00f6m") == "romeo@example.org/\u00c5ngstr\u00f6m"


@pytest.mark.parametrize("wish", ["", "<resource/>", "<other xmlns='urn:x'/>"])
def test_without_a_wish_the_resource_is_one_that_nobody_can_guess(server, wish: str) -> None:
    """RFC6120-7.6-1, RFC6120-7.7.2.1-1, S32"""
    resources = set()
    for _ in range(3):
        client = authenticated(server)
        client.sends(f"<iq type='set' id='b'><bind xmlns='{BIND}'>{wish}</bind></iq>")
        answer = client.receives(
            f"<iq type='result' id='b' ...><bind xmlns='{BIND}'><jid>romeo@example.org/*</jid></bind></iq>"
        )
        resources.add(answer.findtext(f"{{{BIND}}}bind/{{{BIND}}}jid").partition("/")[2])
    assert len(resources) == 3
    assert all(len(resource) >= 12 for resource in resources)


def test_an_impossible_resource_is_a_bad_request_and_another_may_follow(client) -> None:
    """RFC6120-7.7.2.1-1, RFC6120-7.7.3-1, XEP0086-2-1"""
    for resource in ("a" * 1024, "a\x7fb", "a\u200eb"):
        wants(client, resource)
        client.receives(
            "<iq type='error' id='b' from='example.org'><error type='modify' code='400'><bad-request .../></error></iq>"
        )
    assert client.binds("orchard") == "romeo@example.org/orchard"


def test_too_many_attempts_end_the_stream(client) -> None:
    """RFC6120-7.7.3-1, RFC6120-7.7.3-2"""
    for number in range(9):
        wants(client, "\x7f", str(number))
        client.receives(
            f"<iq type='error' id='{number}' from='example.org'><error type='modify'><bad-request .../></error></iq>"
        )
    wants(client, "\x7f")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


def test_several_resources_may_be_connected(server, romeo, juliet) -> None:
    """RFC6120-7.1-1"""
    other = server.client().login("romeo", resource="street")
    for resource, client in (("orchard", romeo), ("street", other)):
        juliet.sends(f"<message to='romeo@example.org/{resource}'/>")
        client.receives(f"<message to='romeo@example.org/{resource}' from='juliet@example.org/balcony'/>")
    romeo.receives_nothing()
    other.receives_nothing()


@pytest.mark.config(limits={"resources": 2})
def test_the_number_of_resources_is_limited(server, romeo) -> None:
    """RFC6120-7.1-2, RFC6120-7.6.2.1-1, RFC6120-13.12-1"""
    second = server.client().login("romeo", resource="street")
    third = authenticated(server)
    wants(third, "tomb")
    third.receives(
        "<iq type='error' id='b' from='example.org'><error type='wait' code='500'><resource-constraint .../></error></iq>"
    )
    second.closes()
    assert third.binds("tomb") == "romeo@example.org/tomb"
    fourth = authenticated(server)
    assert fourth.binds("tomb") == "romeo@example.org/tomb"  # who comes back takes no room
    third.receives_stream_error("conflict")
    assert third.is_closed()


def test_a_resource_in_use_is_taken_over(server, romeo, juliet) -> None:
    """RFC6120-7.5-1, RFC6120-7.7.2.2-1, RFC6120-4.9.3.3-1"""
    again = server.client().login("romeo", resource="orchard")
    romeo.receives_stream_error("conflict")
    assert romeo.is_closed()
    juliet.sends("<message to='romeo@example.org/orchard'/>")
    again.receives("<message to='romeo@example.org/orchard' from='juliet@example.org/balcony'/>")
    again.receives_nothing()


def test_the_same_resource_of_somebody_else_is_no_conflict(server, romeo) -> None:
    """RFC6120-7.5-1"""
    server.client().login("juliet", resource="orchard").receives_nothing()
    romeo.receives_nothing()


def test_a_stream_has_one_resource(romeo) -> None:
    """RFC6120-7.1-4, RFC6120-7.6.2.2-1"""
    wants(romeo, "street")
    romeo.receives("<iq type='error' id='b'><error type='cancel' code='405'><not-allowed .../></error></iq>")
    romeo.receives_nothing()


def test_nobody_binds_without_a_login(server) -> None:
    """RFC6120-6.3.1-1, RFC6120-7.4-1, S21"""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    features = client.negotiates()
    assert features.find(f"{{{BIND}}}bind") is None
    wants(client, "orchard")
    client.receives_stream_error("not-authorized")
    assert client.is_closed()


@pytest.mark.parametrize("type", ["get", "result", "error", "other"])
def test_binding_is_a_set(client, type: str) -> None:
    """RFC6120-7.1-3"""
    client.sends(f"<iq type='{type}' id='b'><bind xmlns='{BIND}'/></iq>")
    client.receives_stream_error("not-authorized")
    assert client.is_closed()


def test_bind_may_come_in_one_breath_with_what_follows(client, juliet) -> None:
    """RFC6120-10.1-1, RFC6120-7.3.2-1"""
    client.sends_raw(
        f"<iq type='set' id='b'><bind xmlns='{BIND}'><resource>orchard</resource></bind></iq>"
        f"<iq type='set' id='s'><session xmlns='{SESSION}'/></iq><message to='juliet@example.org/balcony'/>"
    )
    client.receives(
        f"<iq type='result' id='b' from='example.org'><bind xmlns='{BIND}'><jid>romeo@example.org/orchard</jid></bind></iq>"
    )
    client.receives("<iq type='result' id='s' ...></iq>")
    juliet.receives("<message to='juliet@example.org/balcony' from='romeo@example.org/orchard'/>")


@pytest.mark.wire
def test_binding_works_over_the_wire(romeo, juliet) -> None:
    """RFC6120-4.5-1"""
    romeo.sends("<message to='juliet@example.org/balcony'/>")
    juliet.receives("<message to='juliet@example.org/balcony' from='romeo@example.org/orchard'/>")


# -- the session of RFC 3921 §3


def test_a_session_is_offered_as_optional(server) -> None:
    """RFC3921-3-1"""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    client.authenticates("romeo", password_of("romeo"))
    [session] = client.negotiates().findall(f"{{{SESSION}}}session")
    assert [child.tag for child in session] == [f"{{{SESSION}}}optional"]


@pytest.mark.parametrize("to", ["", " to='example.org'", " to='romeo@example.org'"])
def test_a_session_is_granted_as_often_as_asked_for(romeo, to: str) -> None:
    """RFC3921-3-2, RFC3921-3-4"""
    for _ in range(2):
        romeo.sends(f"<iq type='set' id='s'{to}><session xmlns='{SESSION}'/></iq>")
        romeo.receives("<iq type='result' id='s'/>")
    romeo.receives_nothing()


def test_there_is_no_session_before_binding(client) -> None:
    """RFC3921-3-3; that nobody needs one, all other dialogues show."""
    client.sends(f"<iq type='set' id='s'><session xmlns='{SESSION}'/></iq>")
    client.receives_stream_error("not-authorized")
    assert client.is_closed()
