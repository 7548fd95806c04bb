"""Non-SASL Authentication (XEP-0078), for clients from before 2004, and their error codes (XEP-0086)."""

from __future__ import annotations

import pytest

import xmppd
from tests.dialogue import BIND, Client, password_of

AUTH = "jabber:iq:auth"


def inside_tls(server, version: str | None = "1.0") -> Client:
    """Return somebody inside TLS; without a version there are no features."""
    client = server.client(direct_tls=True).connect()
    client.opens_stream(version=version)
    client.receives_stream_header()
    if version:
        client.receives_features()
    return client


@pytest.fixture
def client(server) -> Client:
    return inside_tls(server)


def logs_in(client: Client, **fields: str) -> None:
    """Send the fields, by default those of romeo."""
    values = {"username": "romeo", "password": password_of("romeo"), "resource": "orchard", **fields}
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in values.items() if value != "-")
    client.sends(f"<iq type='set' id='auth2'><query xmlns='{AUTH}'>{inside}</query></iq>")


def fails(client: Client, kind: str, code: int, condition: str) -> None:
    client.receives(
        f"<iq type='error' id='auth2' from='example.org'><error type='{kind}' code='{code}'><{condition} .../></error></iq>"
    )


def test_it_is_advertised_inside_tls_only(server) -> None:
    """XEP0078-4-1, XEP0078-7-1"""
    client = server.client().connect()
    assert client.negotiates().find("{http://jabber.org/features/iq-auth}auth") is None
    client.starts_tls()
    assert client.negotiates().find("{http://jabber.org/features/iq-auth}auth") is not None


@pytest.mark.parametrize("username", ["<username>romeo</username>", "<username>nobody</username>", ""])
@pytest.mark.parametrize("to", ["", " to='example.org'"])
def test_the_fields_are_the_same_for_everybody(client, username: str, to: str) -> None:
    """XEP0078-3.1-1, XEP0078-3.1-2, XEP0078-3.1-4, XEP0078-3.1-6, S29"""
    client.sends(f"<iq type='get' id='auth1'{to}><query xmlns='{AUTH}'>{username}</query></iq>")
    client.receives(
        f"<iq type='result' id='auth1' from='example.org'><query xmlns='{AUTH}'><username/><password/><resource/></query></iq>"
    )


@pytest.mark.parametrize("version", ["1.0", None])
def test_login_and_binding_are_one_step(server, juliet, version: str | None) -> None:
    """XEP0078-3.1-5, XEP0078-3.1-13, XEP0078-3.1-14, RFC3920-5-1"""
    client = inside_tls(server, version)
    logs_in(client)
    client.receives("<iq type='result' id='auth2' from='example.org'/>")
    client.jid = "romeo@example.org/orchard"
    client.sends("<iq type='set' id='s' to='example.org'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>")
    client.receives("<iq type='result' id='s'/>")
    client.sends("<message to='juliet@example.org/balcony'><body>O</body></message>")
    juliet.receives(
        "<message to='juliet@example.org/balcony' from='romeo@example.org/orchard'><body>O</body></message>"
    )
    client.receives_nothing()


def test_large_stanzas_are_welcome_after_the_login(client) -> None:
    logs_in(client)
    client.receives("<iq type='result' id='auth2' from='example.org'/>")
    client.jid = "romeo@example.org/orchard"
    text = "O " * 50_000
    client.sends(f"<message to='romeo@example.org/orchard' id='m'><body>{text}</body></message>")
    client.receives(
        f"<message to='romeo@example.org/orchard' id='m' from='romeo@example.org/orchard'><body>{text}</body></message>"
    )


def test_nothing_else_is_needed_or_possible_afterwards(client) -> None:
    """XEP0078-3.1-14"""
    logs_in(client)
    client.receives("<iq type='result' id='auth2' from='example.org'/>")
    client.jid = "romeo@example.org/orchard"
    client.sends(f"<iq type='set' id='b'><bind xmlns='{BIND}'><resource>x</resource></bind></iq>")
    client.receives("<iq type='error' id='b'><error type='cancel'><not-allowed .../></error></iq>")
    client.sends_auth("PLAIN", b"\0juliet\0juliet-secret")
    client.receives_stream_error("unsupported-stanza-type")
    assert client.is_closed()


@pytest.mark.parametrize("password", ["<&'\">", "pass wörd ☂", " spaces "])
def test_a_password_is_text_like_any_other(server, password: str) -> None:
    """XEP0078-3.1-7"""
    server.add_account("tybalt@example.org", password)
    client = inside_tls(server)
    logs_in(client, username="tybalt", password=password.replace("&", "&amp;").replace("<", "&lt;"))
    client.receives("<iq type='result' id='auth2' from='example.org'/>")


@pytest.mark.parametrize(
    "fields",
    [{"password": "wrong"}, {"username": "nobody"}, {"username": "romeo@example.net"}, {"username": "@"}],
    ids=str,
)
def test_wrong_credentials_look_all_the_same_and_may_be_mended(client, fields: dict[str, str]) -> None:
    """XEP0078-3.1-8, XEP0078-3.1-11, XEP0078-5-1, XEP0086-2-2, RFC6120-6.5.10-1, S29"""
    logs_in(client, **fields)
    fails(client, "auth", 401, "not-authorized")
    assert not any(
        password_of("romeo") in line or "wrong" in line for line in client.transcript if line.startswith("S:")
    )
    logs_in(client)
    client.receives("<iq type='result' id='auth2' from='example.org'/>")


@pytest.mark.parametrize("missing", ["username", "password", "resource"])
def test_every_field_is_needed(client, missing: str) -> None:
    """XEP0078-3.1-5, XEP0078-3.1-10"""
    for value in ("-", ""):
        logs_in(client, **{missing: value})
        fails(client, "modify", 406, "not-acceptable")


def test_a_digest_is_no_password(client) -> None:
    """XEP0078-3.1-6: it was not offered."""
    logs_in(client, password="-", digest="48fc78be9ec8f86d8ce1c39c320c97c21d62334d")
    fails(client, "modify", 406, "not-acceptable")


def test_an_impossible_resource_is_refused(client) -> None:
    """XEP0078-3.1-10"""
    logs_in(client, resource="a" * 1024)
    fails(client, "modify", 400, "jid-malformed")


def test_a_suspended_account_does_not_get_in(server) -> None:
    """XEP0078-3.1-8"""
    jid = xmppd.JID.parse("romeo@example.org")
    server.server.accounts[jid] = {**server.server.account(jid), "disabled": True}
    client = inside_tls(server)
    logs_in(client)
    fails(client, "auth", 401, "not-authorized")


def test_a_damaged_account_is_the_servers_fault(server) -> None:
    jid = xmppd.JID.parse("romeo@example.org")
    server.server.accounts[jid] = {**server.server.account(jid), "credentials": {"scram-sha-256": {"salt": "?"}}}
    client = inside_tls(server)
    logs_in(client)
    fails(client, "wait", 500, "resource-constraint")


def test_a_resource_in_use_is_taken_over(server, romeo) -> None:
    """XEP0078-3.1-9"""
    client = inside_tls(server)
    logs_in(client)
    client.receives("<iq type='result' id='auth2' from='example.org'/>")
    romeo.receives_stream_error("conflict")
    assert romeo.is_closed()


@pytest.mark.config(limits={"resources": 1})
def test_the_limit_of_resources_holds_here_too(server, romeo) -> None:
    """RFC6120-7.1-2"""
    client = inside_tls(server)
    logs_in(client, resource="street")
    fails(client, "wait", 500, "resource-constraint")


def test_it_is_no_way_around_a_failed_sasl_login(client) -> None:
    """XEP0078-3.1-12"""
    client.sends_auth("PLAIN", b"\0romeo\0wrong")
    client.receives_failure("not-authorized")
    logs_in(client)
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


def test_too_many_mistakes_end_the_stream(client) -> None:
    """RFC6120-6.4.5-2, S30"""
    for _ in range(4):
        logs_in(client, password="wrong")
        fails(client, "auth", 401, "not-authorized")
    logs_in(client, password="wrong")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


@pytest.mark.config(limits={"logins_per_minute": 2})
def test_who_guesses_has_to_wait(server) -> None:
    """S30: whether one account is guessed at from many addresses, or many from one."""
    client = inside_tls(server)
    for number in range(3):
        server.server.guard.count(f"192.0.2.{number}", "juliet@example.org")
    logs_in(client, username="juliet", password=password_of("juliet"))
    fails(client, "wait", 500, "resource-constraint")
    for _ in range(2):
        logs_in(client, password="wrong")
        fails(client, "auth", 401, "not-authorized")
    logs_in(client)
    fails(client, "wait", 500, "resource-constraint")
    server.clock.skip(31)
    client = inside_tls(server)
    logs_in(client, username="nurse", password=password_of("nurse"))
    client.receives("<iq type='result' id='auth2' from='example.org'/>")


@pytest.mark.parametrize("type", ["get", "set"])
def test_before_tls_there_is_no_such_service(server, type: str) -> None:
    """XEP0078-7-1, XEP0078-3.1-3, S21"""
    client = server.client().connect()
    client.negotiates()
    client.sends(
        f"<iq type='{type}' id='auth2'><query xmlns='{AUTH}'><username>romeo</username><password>romeo-secret</password><resource>a</resource></query></iq>"
    )
    fails(client, "cancel", 503, "service-unavailable")


@pytest.mark.config(compat={"iq_auth": False})
def test_it_can_be_switched_off(server) -> None:
    """XEP0078-3.1-3"""
    client = server.client(direct_tls=True).connect()
    assert client.negotiates().find("{http://jabber.org/features/iq-auth}auth") is None
    logs_in(client)
    fails(client, "cancel", 503, "service-unavailable")


def test_it_is_not_offered_after_the_login(server) -> None:
    """XEP0078-3.1-14"""
    client = inside_tls(server)
    client.authenticates("romeo", password_of("romeo"))
    assert client.negotiates().find("{http://jabber.org/features/iq-auth}auth") is None
    logs_in(client)
    fails(client, "cancel", 405, "not-allowed")


@pytest.mark.wire
def test_an_old_client_gets_in_over_the_wire(server) -> None:
    """XEP0078-3.1-13, RFC3920-5-1"""
    client = inside_tls(server, None)
    logs_in(client)
    client.receives("<iq type='result' id='auth2' from='example.org'/>")
    client.jid = "romeo@example.org/orchard"
    client.receives_nothing()


# -- XEP-0086


def test_an_old_error_code_is_passed_on_as_it_is(romeo, juliet) -> None:
    """XEP0086-2-3"""
    romeo.sends("<message type='error' to='juliet@example.org/balcony'><error code='404'>Not Found</error></message>")
    juliet.receives(
        "<message type='error' from='romeo@example.org/orchard' to='juliet@example.org/balcony'><error code='404'>Not Found</error></message>"
    )
