"""Logging in (RFC 6120 §6): each mechanism from end to end, failures, and what guessers meet."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import SASL, Client, Scram, password_of
from tests.servers import MemoryServer, ProcessServer
from tests.test_certificates import certify, write_pair, write_pem, xmpp_addr

MECHANISMS = f"{{{SASL}}}mechanisms"
BINDINGS = "{urn:xmpp:sasl-cb:0}sasl-channel-binding"


def before_login(server: MemoryServer | ProcessServer, **attributes: str) -> Client:
    """Return somebody inside TLS who has got the list of mechanisms."""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates(**attributes)
    return client


@pytest.fixture
def client(server) -> Client:
    """Somebody inside TLS who has got the list of mechanisms."""
    return before_login(server)


def plain(name: str, password: str, authzid: str = "") -> bytes:
    return f"{authzid}\0{name}\0{password}".encode()


def names(features) -> list[str]:
    """Return the mechanisms offered, in their order."""
    return [mechanism.text for mechanism in features.find(MECHANISMS)]


# -- what is offered


def test_mechanisms_are_offered_strongest_first(server) -> None:
    """RFC6120-6.3.3-1, RFC6120-6.4.1-1, RFC6120-13.8.1-1, RFC5802-4-1, RFC5802-6-1, RFC4505-2-1, S27"""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    features = client.negotiates()
    offered = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]
    assert names(features) == offered
    assert [child.get("type") for child in features.find(BINDINGS)] == ["tls-exporter"]


@pytest.mark.config(compat={"digest_md5": True})
def test_digest_md5_is_offered_behind_scram_where_it_is_wanted(server) -> None:
    """RFC3920-14.7-1"""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    assert names(client.negotiates())[-3:] == ["SCRAM-SHA-1", "DIGEST-MD5", "PLAIN"]


@pytest.mark.wire
@pytest.mark.parametrize("direct_tls", [False, True])
def test_the_end_point_is_always_among_the_channel_bindings(server, direct_tls: bool) -> None:
    """RFC5802-6.1-1, XEP-0440 §3: servers must offer tls-server-end-point."""
    client = server.client(direct_tls=direct_tls).connect()
    features = client.negotiates()
    if not direct_tls:
        client.starts_tls()
        features = client.negotiates()
    assert "tls-server-end-point" in [child.get("type") for child in features.find(BINDINGS)]


# -- each mechanism


@pytest.mark.parametrize(
    "mechanism", ["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256-PLUS"]
)
def test_every_mechanism_logs_in(server, mechanism: str) -> None:
    """RFC6120-6.2-1, RFC6120-6.3.10-1, RFC5802-5-2, RFC4616-2-1"""
    assert server.client().login("juliet", mechanism=mechanism, resource="a").jid == "juliet@example.org/a"


def digest(*parts: str) -> str:
    return hashlib.md5(":".join(parts).encode("latin-1")).hexdigest()


@pytest.mark.config(compat={"digest_md5": True})
@pytest.mark.parametrize("right", [True, False])
def test_digest_md5_logs_in(server, right: bool) -> None:
    """RFC2831-2.1.1-1, RFC2831-2.1.2-2, RFC2831-2.1.3-1, RFC2831-2.1.3-2"""
    jid = xmppd.JID.parse("tybalt@example.org")
    server.server.create_account(jid, xmppd.make_credentials("pencil", digest_md5=jid))
    client = before_login(server)
    client.sends_auth("DIGEST-MD5")
    challenge = client.receives_challenge().decode()
    nonce = re.search('nonce="([^"]+)"', challenge).group(1)
    secret = hashlib.md5(f"tybalt:example.org:{'pencil' if right else 'pen'}".encode()).digest()
    first = hashlib.md5(secret + f":{nonce}:cn".encode()).hexdigest()
    uri = "xmpp/example.org"
    response = digest(first, nonce, "00000001", "cn", "auth", digest("AUTHENTICATE", uri))
    answer = f'username="tybalt",realm="example.org",nonce="{nonce}",cnonce="cn",nc=00000001,qop=auth,digest-uri="{uri}",response={response},charset=utf-8'
    client.sends(f"<response xmlns='{SASL}'>{base64.b64encode(answer.encode()).decode()}</response>")
    if not right:
        client.receives_failure("not-authorized")
        client.sends_auth("DIGEST-MD5")
        assert nonce not in client.receives_challenge().decode()
        return
    ours = digest(first, nonce, "00000001", "cn", "auth", digest("", uri))
    assert client.receives_challenge() == f"rspauth={ours}".encode()
    client.sends(f"<response xmlns='{SASL}'/>")
    client.receives(f"<success xmlns='{SASL}'/>")
    client.negotiates()
    assert client.binds("street") == "tybalt@example.org/street"


@pytest.mark.parametrize(
    ("addresses", "offered"),
    [
        (["romeo@example.org"], True),
        (["romeo@example.net"], False),
        (["romeo@example.org", "juliet@example.org"], True),
    ],
)
def test_a_certificate_logs_in(tmp_path: Path, addresses: list[str], offered: bool) -> None:
    """RFC6120-6.3.4-2, RFC6120-13.8.4-1, RFC6120-13.7.2.2-1, RFC6120-5.4.3.1-2, XEP0178-2"""
    authority = certify([], ca=True, common_name="people")
    client_ca = write_pem(tmp_path / "people.pem", authority[0])
    server = ProcessServer(tmp_path, {"tls": {"client_ca": str(client_ca)}})
    server.start()
    try:
        server.renew_accounts()
        pair = write_pair(tmp_path, certify([xmpp_addr(address) for address in addresses], issuer=authority), "romeo")
        server.trust.load_cert_chain(*pair)
        client = server.client().connect()
        client.negotiates()
        client.starts_tls()
        assert (names(client.negotiates())[0] == "EXTERNAL") is offered
        client.sends_auth("EXTERNAL", b"")
        if not offered:
            client.receives_failure("invalid-mechanism")
        elif len(addresses) > 1:  # which of them, the client has to say
            client.receives_failure("invalid-authzid")
            client.sends_auth("EXTERNAL", b"juliet@example.org")
            client.receives(f"<success xmlns='{SASL}'/>")
            client.negotiates()
            assert client.binds("a") == "juliet@example.org/a"
        else:
            client.receives(f"<success xmlns='{SASL}'/>")
            client.negotiates()
            assert client.binds("a") == "romeo@example.org/a"
    finally:
        server.cast.hang_up()
        server.stop()


# -- the frame around a mechanism


def test_data_may_come_with_auth_or_later(client) -> None:
    """RFC6120-6.3.10-1, RFC6120-6.3.5-1"""
    client.sends_auth("PLAIN")
    assert client.receives("<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>*</challenge>").text in (None, "=")
    client.sends(
        f"<response xmlns='{SASL}'>{base64.b64encode(plain('romeo', password_of('romeo'))).decode()}</response>"
    )
    client.receives(f"<success xmlns='{SASL}'/>")


def test_no_data_and_empty_data_are_two_things(client) -> None:
    """RFC6120-6.3.5-1"""
    client.sends_auth("PLAIN", b"")  # "="
    client.receives_failure("malformed-request")
    client.sends_auth("PLAIN")
    client.receives_challenge()
    client.sends(f"<response xmlns='{SASL}'>=</response>")
    client.receives_failure("malformed-request")


def test_a_second_auth_forgets_the_first(client) -> None:
    """RFC6120-6.4.2-1"""
    scram = Scram("romeo", password_of("romeo"), "SCRAM-SHA-256", {})
    client.sends_auth("SCRAM-SHA-256", scram.first())
    proof = scram.final(client.receives_challenge())
    client.sends_auth("SCRAM-SHA-1", Scram("romeo", "x", "SCRAM-SHA-1", {}).first())
    client.receives_challenge()
    client.sends(f"<response xmlns='{SASL}'>{base64.b64encode(proof).decode()}</response>")
    client.receives_failure("not-authorized")
    client.authenticates("romeo", password_of("romeo"))


def test_an_exchange_may_be_given_up(client) -> None:
    """RFC6120-6.4.4-1"""
    client.sends_auth("SCRAM-SHA-256", Scram("romeo", "x", "SCRAM-SHA-256", {}).first())
    client.receives_challenge()
    client.sends(f"<abort xmlns='{SASL}'/>")
    client.receives_failure("aborted")
    client.sends(f"<response xmlns='{SASL}'>Yz1iaXdz</response>")
    client.receives_failure("malformed-request")
    client.authenticates("romeo", password_of("romeo"))


@pytest.mark.parametrize("text", ["AHJvbWVv*", "AHJv bWVv", "AHJvbWVvAG=x", "====", "A", "AA=A", "é", "AHJvbWVvA\n"])
def test_what_is_no_base64_is_refused(client, text: str) -> None:
    """RFC6120-6.5.5-1, RFC6120-13.9.1-1"""
    client.sends_raw(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{text}</auth>")
    client.receives_failure("incorrect-encoding")
    client.authenticates("romeo", password_of("romeo"))


@pytest.mark.parametrize("mechanism", ["", "plain", "CRAM-MD5", "ANONYMOUS", "EXTERNAL", "DIGEST-MD5", "SCRAM-SHA-512"])
def test_what_was_not_offered_is_no_mechanism(client, mechanism: str) -> None:
    """RFC6120-6.5.7-1, RFC4505-2-1"""
    client.sends_auth(mechanism, b"\0romeo\0x")
    client.receives_failure("invalid-mechanism")


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (b"romeo", "malformed-request"),
        (b"\0romeo", "malformed-request"),
        (b"\0romeo\0romeo-secret\0", "malformed-request"),
        (b"\0\xff\0romeo-secret", "malformed-request"),
        (plain("", "romeo-secret"), "not-authorized"),
        (plain("romeo", ""), "not-authorized"),
        (plain("romeo", "romeo-secret", "juliet@example.org"), "invalid-authzid"),
        (plain("romeo", "romeo-secret", "juliet"), "invalid-authzid"),
        (plain("romeo", "romeo-secret", "romeo@example.org/orchard"), "invalid-authzid"),
        (plain("romeo", "romeo-secret", "romeo@example.net"), "invalid-authzid"),
        (plain("romeo", "romeo-secret", "example.org"), "invalid-authzid"),
        (plain("romeo", "romeo-secret", "@"), "invalid-authzid"),
        (plain("romeo@example.net", "romeo-secret"), "not-authorized"),
        (plain("romeo", "romeo-secret", "romeo@example.org"), None),
        (plain("romeo", "romeo-secret", "ROMEO@Example.org"), None),
        (plain("Romeo", "romeo-secret"), None),
        (plain("romeo@example.org", "romeo-secret"), None),
    ],
)
def test_one_logs_in_as_oneself_only(client, data: bytes, condition: str | None) -> None:
    """RFC6120-6.3.7-1, RFC6120-6.3.8-1, RFC6120-6.5.6-1, RFC6120-6.5.8-1, RFC4616-2-1, RFC4616-2-2, RFC4616-2-3, S25"""
    client.sends_auth("PLAIN", data)
    if condition:
        client.receives_failure(condition)
        return
    client.receives(f"<success xmlns='{SASL}'/>")
    client.negotiates()
    assert client.binds("orchard") == "romeo@example.org/orchard"


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-1", "SCRAM-SHA-256"])
@pytest.mark.parametrize(
    ("old", "new"),
    [(",r=", ",r=x"), ("c=biws,", "c=eSws,"), (",p=", ",p=AAAA"), (",r=", ",m=x,r="), ("c=biws,", "")],
    ids=["another nonce", "another header", "another proof", "a mandatory extension", "no header"],
)
def test_a_tampered_proof_proves_nothing(client, mechanism: str, old: str, new: str) -> None:
    """RFC5802-5.1-4, RFC5802-5.1-2, S26"""
    scram = Scram("romeo", password_of("romeo"), mechanism, {})
    client.sends_auth(mechanism, scram.first())
    final = scram.final(client.receives_challenge()).replace(old.encode(), new.encode(), 1)
    client.sends(f"<response xmlns='{SASL}'>{base64.b64encode(final).decode()}</response>")
    failure = client.receives(f"<failure xmlns='{SASL}'>...</failure>")
    assert failure[0].tag in (f"{{{SASL}}}not-authorized", f"{{{SASL}}}malformed-request")
    client.authenticates("romeo", password_of("romeo"))


def test_a_stripped_list_of_mechanisms_is_noticed(client) -> None:
    """RFC5802-6-1, S26: the client says that it would have bound the channel, had it been offered."""
    client.sends_auth("SCRAM-SHA-256", b"y,,n=romeo,r=abc")
    client.receives_failure("not-authorized")


# -- failures


def test_a_failure_is_one_condition_and_perhaps_a_text(client) -> None:
    """RFC6120-6.4.5-3"""
    client.sends_auth("PLAIN", plain("romeo", "wrong"))
    failure = client.receives(f"<failure xmlns='{SASL}'>...</failure>")
    conditions = [child.tag for child in failure if child.tag != f"{{{SASL}}}text"]
    assert conditions == [f"{{{SASL}}}not-authorized"]


def test_a_few_mistakes_are_allowed(client) -> None:
    """RFC6120-6.4.5-1, RFC6120-13.9.4-1"""
    for _ in range(4):
        client.sends_auth("PLAIN", plain("romeo", "wrong"))
        client.receives_failure("not-authorized")
    client.authenticates("romeo", password_of("romeo"))


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "NONSENSE"])
def test_too_many_mistakes_end_the_stream(client, mechanism: str) -> None:
    """RFC6120-6.4.5-2, RFC6120-13.9.4-1, S30"""
    for _ in range(5):
        if mechanism == "SCRAM-SHA-256":
            scram = Scram("romeo", "wrong", mechanism, {})
            client.sends_auth(mechanism, scram.first())
            final = scram.final(client.receives_challenge())
            client.sends(f"<response xmlns='{SASL}'>{base64.b64encode(final).decode()}</response>")
        else:
            client.sends_auth(mechanism, plain("romeo", "wrong"))
        client.receives_failure("invalid-mechanism" if mechanism == "NONSENSE" else "not-authorized")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


def test_a_suspended_account_is_told_so_to_its_owner_only(server) -> None:
    """RFC6120-6.5.2-1"""
    jid = xmppd.JID.parse("romeo@example.org")
    server.server.accounts[jid] = {**server.server.account(jid), "disabled": True}
    client = before_login(server)
    client.sends_auth("PLAIN", plain("romeo", "wrong"))
    client.receives_failure("not-authorized")
    client.sends_auth("PLAIN", plain("romeo", password_of("romeo")))
    client.receives_failure("account-disabled")
    scram = Scram("romeo", password_of("romeo"), "SCRAM-SHA-256", {})
    client.sends_auth("SCRAM-SHA-256", scram.first())
    final = scram.final(client.receives_challenge())
    client.sends(f"<response xmlns='{SASL}'>{base64.b64encode(final).decode()}</response>")
    client.receives_failure("account-disabled")


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_a_damaged_account_is_the_servers_fault(server, mechanism: str) -> None:
    """RFC6120-6.5.11-1"""
    jid = xmppd.JID.parse("romeo@example.org")
    server.server.accounts[jid] = {**server.server.account(jid), "credentials": {"scram-sha-256": {"salt": "?"}}}
    client = before_login(server)
    data = plain("romeo", "x") if mechanism == "PLAIN" else b"n,,n=romeo,r=abc"
    client.sends_auth(mechanism, data)
    client.receives_failure("temporary-auth-failure")


# -- nobody learns who has an account


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-1", "SCRAM-SHA-256"])
def test_an_unknown_name_looks_like_a_known_one(server, mechanism: str) -> None:
    """RFC6120-6.5.10-1, RFC5802-5.1-3, S29"""

    def salt_of(name: str) -> str:
        client = before_login(server)
        client.sends_auth(mechanism, f"n,,n={name},r=abc".encode())
        nonce, salt, iterations, _ = client.receives_challenge().decode().split(",")
        assert nonce.startswith("r=abc")
        assert len(nonce) >= 2 + 3 + 20
        assert len(base64.b64decode(salt[2:])) == 16
        assert iterations == "i=10000"
        client.sends(
            f"<response xmlns='{SASL}'>{base64.b64encode(f'c=biws,{nonce},p=AAAA'.encode()).decode()}</response>"
        )
        client.receives_failure("not-authorized")
        return salt

    assert salt_of("romeo") == salt_of("romeo")
    assert salt_of("nobody") == salt_of("Nobody") != salt_of("somebody")


def test_an_unknown_name_takes_as_long_as_a_wrong_password(server) -> None:
    """RFC6120-6.5.10-1, S28, S29"""
    spent = {"romeo": 0.0, "nobody": 0.0}
    for _ in range(2):
        for name in spent:
            client = before_login(server)
            began = time.perf_counter()
            client.sends_auth("PLAIN", plain(name, "wrong"))
            client.receives_failure("not-authorized")
            spent[name] += time.perf_counter() - began
    assert 0.2 < spent["romeo"] / spent["nobody"] < 5  # PBKDF2 in both; without it, a hundred times less


# -- guessing


@pytest.mark.config(limits={"logins_per_minute": 3, "sasl_failures": 2})
def test_an_address_that_guesses_has_to_wait(server) -> None:
    """RFC6120-13.9.4-1, RFC6120-6.5.11-1, S30"""
    romeo = server.client().login("romeo")  # who is in stays in
    for name in ("romeo", "juliet", "nurse"):
        client = before_login(server)
        client.sends_auth("PLAIN", plain(name, "wrong"))
        client.receives_failure("not-authorized")
    client = before_login(server)
    client.sends_auth("PLAIN", plain("benvolio", password_of("benvolio")))
    client.receives_failure("temporary-auth-failure")
    romeo.receives_nothing()
    server.clock.skip(21)
    client.authenticates("benvolio", password_of("benvolio"))


def test_who_is_refused_already_gets_no_deeper_into_debt() -> None:
    """S30: a phone with an old password tries again and again; its household waits no longer for that."""
    now = 0.0
    guard = xmppd.LoginGuard(30, lambda: now)
    for _ in range(1000):
        guard.count("192.0.2.1", "romeo@example.org")
    with pytest.raises(xmppd.SASLError):
        guard.check("192.0.2.1")
    assert guard.delay("romeo@example.org") == 10
    now = 3.0
    guard.check("192.0.2.1")
    now = 15.0
    assert guard.delay("romeo@example.org") == 0


@pytest.mark.config(limits={"logins_per_minute": 3})
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
@pytest.mark.parametrize("right", [True, False])
def test_an_account_under_attack_answers_later_to_its_owner_too(server, mechanism: str, right: bool) -> None:
    """S30: from many addresses; nobody is locked out, and silence tells nothing."""
    for number in range(9):
        server.server.guard.count(f"192.0.2.{number}", "romeo@example.org")
    client = before_login(server)
    password = password_of("romeo") if right else "wrong"
    if mechanism == "PLAIN":
        client.sends_auth("PLAIN", plain("romeo", password))
    else:
        scram = Scram("romeo", password, mechanism, {})
        client.sends_auth(mechanism, scram.first())
        final = scram.final(client.receives_challenge())
        client.sends(f"<response xmlns='{SASL}'>{base64.b64encode(final).decode()}</response>")
    assert client.wire.read(0.3) is None
    server.clock.skip(10)
    if right:
        client.receives(f"<success xmlns='{SASL}'>*</success>")
        client.negotiates()
        client.binds("orchard")
    else:
        client.receives_failure("not-authorized")


@pytest.mark.config(limits={"logins_per_minute": 3})
def test_others_are_not_slowed_by_an_attack_on_one(server) -> None:
    """S30"""
    for number in range(9):
        server.server.guard.count(f"192.0.2.{number}", "romeo@example.org")
    assert server.server.guard.delay("romeo@example.org") == 10
    assert server.server.guard.delay("juliet@example.org") == 0
    server.client().login("juliet")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_of_ipv6_a_household_counts_as_one(one: str, other: str, same: bool) -> None:
    """S10, S30: who has one IPv6 address has 2⁶⁴ of them."""
    assert (xmppd.limited_address(one) == xmppd.limited_address(other)) is same


def test_what_is_remembered_of_guessers_is_bounded() -> None:
    """S30"""
    guard = xmppd.LoginGuard(30, lambda: 0.0)
    for number in range(25_000):
        guard.count(f"10.0.{number // 256}.{number % 256}", f"user{number}@example.org")
    assert len(guard._addresses._buckets) == len(guard._accounts._buckets) == xmppd.Allowances.MAX_KEYS


@pytest.mark.config(limits={"logins_per_minute": 0, "sasl_failures": 5})
def test_zero_switches_the_guard_off(server) -> None:
    """RFC6120-13.12-1"""
    for _ in range(8):
        client = before_login(server)
        for _ in range(4):
            client.sends_auth("NONSENSE")
            client.receives_failure("invalid-mechanism")
        client.disconnects()
    server.client().login("romeo")


# -- many at once


def test_many_logins_at_once_all_succeed(server) -> None:
    """S31: password hashes are computed one after the other, and nobody is stuck behind another's stream."""
    clients = [before_login(server) for _ in range(12)]
    for client in clients:
        client.sends_auth("PLAIN", plain("romeo", password_of("romeo")))
    bound = server.client().login("juliet", resource="balcony")
    bound.receives_nothing()
    for client in clients:
        client.receives(f"<success xmlns='{SASL}'/>")
        client.negotiates()
        client.binds()


def test_who_hangs_up_while_the_password_is_checked_leaves_nothing_behind(server) -> None:
    """S10, S31"""
    for _ in range(5):
        client = before_login(server)
        client.sends_auth("PLAIN", plain("romeo", password_of("romeo")))
        client.disconnects()
    server.client().login("romeo").receives_nothing()
    assert len(server.server.streams) == 1
