"""Chapter 10: credentials, and every mechanism from both sides."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import xmppd
from xmppd import JID, Challenge, LoginContext, Mechanism, SASLError, Success, Work

HOST = "example.org"
ALICE = JID("alice", HOST, "")
END_POINT = {"tls-server-end-point": bytes(range(32)), "tls-unique": b"twelve bytes"}
SECRET = b"the server's own secret"
PASSWORD = "pencil"
MALFORMED, NOT_AUTHORIZED, INVALID_AUTHZID = "malformed-request", "not-authorized", "invalid-authzid"

CREDENTIALS = xmppd.make_credentials(PASSWORD, digest_md5=ALICE)
ACCOUNTS: dict[str, Any] = {
    "alice": CREDENTIALS,
    "bob": xmppd.make_credentials("another"),
    "sleeper": xmppd.make_credentials(PASSWORD, digest_md5=JID("sleeper", HOST, "")),
    "old": {key: value for key, value in CREDENTIALS.items() if key == "scram-sha-256"},
    "certified": {},
    "a,b=c": CREDENTIALS,
}
ALL = list(xmppd.MECHANISMS)
SCRAMS = [name for name in ALL if name.startswith("SCRAM")]


class Compat:
    digest_md5 = True


class Settings:
    compat = Compat()


def a_context(accounts: Mapping[str, Any] = ACCOUNTS, **changes: Any) -> LoginContext:
    values: dict[str, Any] = {
        "host": HOST,
        "secure": True,
        "bindings": END_POINT,
        "credentials": accounts.get,
        "secret": SECRET,
        "offered": list(ALL),
        "disabled": lambda local: local == "sleeper",
    }
    return LoginContext(**values | changes)


def begin(name: str, **changes: Any) -> Mechanism:
    return xmppd.start_mechanism(name, a_context(**changes))


def finished(step: Any) -> Any:
    """Do a step's work as the loop and its workers would."""
    while isinstance(step, Work):
        step = step.then(step.function(*step.args))
    return step


def refusal(run: Callable[[], Any]) -> str:
    """Return the condition that `run` fails with."""
    with pytest.raises(SASLError) as found:
        run()
    return found.value.condition


# -- the client's side, written from the RFCs


class ScramClient:
    """RFC 5802, by the book; every message can be tampered with."""

    def __init__(self, name: str, user: str = "alice", password: str = PASSWORD, **options: Any) -> None:
        self.hash_name = "sha256" if "256" in name else "sha1"
        plus = name.endswith("-PLUS")
        self.flag = options.get("flag", "p=tls-server-end-point" if plus else "n")
        self.binding = options.get("binding", END_POINT["tls-server-end-point"] if plus else b"")
        self.authzid = options.get("authzid", "")
        self.user, self.password = user, password
        self.nonce = options.get("nonce", "fyko+d2lbbFgONRv9qkxdawL")
        self.extensions = options.get("extensions", "")

    @property
    def gs2_header(self) -> str:
        return f"{self.flag},{'a=' + self.authzid if self.authzid else ''},"

    def first(self) -> bytes:
        self.bare = f"n={self.user},r={self.nonce}{self.extensions}"
        return (self.gs2_header + self.bare).encode()

    def final(self, challenge: bytes, **changes: str) -> bytes:
        server_first = challenge.decode()
        fields = dict(part.split("=", 1) for part in server_first.split(","))
        assert fields["r"].startswith(self.nonce) and len(fields["r"]) >= len(self.nonce) + 20
        assert int(fields["i"]) >= 4096
        salted = hashlib.pbkdf2_hmac(
            self.hash_name, self.password.encode(), base64.b64decode(fields["s"]), int(fields["i"])
        )
        client_key = hmac.digest(salted, b"Client Key", self.hash_name)
        binding = base64.b64encode(self.gs2_header.encode() + self.binding).decode()
        without = f"c={changes.get('c', binding)},r={changes.get('r', fields['r'])}{self.extensions}"
        message = f"{self.bare},{server_first},{without}".encode()
        signature = hmac.digest(hashlib.new(self.hash_name, client_key).digest(), message, self.hash_name)
        proof = bytes(left ^ right for left, right in zip(client_key, signature, strict=True))
        self.verifier = hmac.digest(hmac.digest(salted, b"Server Key", self.hash_name), message, self.hash_name)
        return f"{without},p={changes.get('p', base64.b64encode(proof).decode())}".encode()

    def log_in(self, mechanism: Mechanism, **changes: str) -> Success:
        challenge = mechanism.step(self.first())
        assert isinstance(challenge, Challenge)
        success = mechanism.step(self.final(challenge.data, **changes))
        assert isinstance(success, Success)
        assert success.data == b"v=" + base64.b64encode(self.verifier)  # the server knows the password too
        return success


def digest_md5(*parts: bytes) -> bytes:
    return hashlib.md5(b":".join(parts)).hexdigest().encode()


class DigestClient:
    """RFC 2831, by the book."""

    def __init__(self, user: str = "alice", password: str = PASSWORD, **changes: Any) -> None:
        self.user, self.password, self.changes = user, password, changes
        self.charset = "latin-1" if changes.get("charset", "") is None else "utf-8"

    def respond(self, challenge: bytes) -> bytes:
        given = dict(re.findall(r'([a-z]+)="?([^",]*)"?', challenge.decode()))
        assert given["algorithm"] == "md5-sess" and given["charset"] == "utf-8" and given["qop"] == "auth"
        fields: dict[str, Any] = {
            "charset": "utf-8",
            "username": self.user,
            "realm": given["realm"],
            "nonce": given["nonce"],
            "nc": "00000001",
            "cnonce": 'cn\\once"x',
            "digest-uri": f"xmpp/{HOST}",
            "qop": "auth",
        } | self.changes
        fields = {name: value for name, value in fields.items() if value is not None}
        self.fields = {name: str(value).encode(self.charset) for name, value in fields.items()}
        try:
            secret = hashlib.md5(f"{self.user}:{HOST}:{self.password}".encode("latin-1")).digest()
        except UnicodeEncodeError:
            secret = hashlib.md5(f"{self.user}:{HOST}:{self.password}".encode()).digest()
        identity = [self.fields["authzid"]] if "authzid" in fields else []
        names = ("nonce", "nc", "cnonce")
        nonces = [self.fields.get(name, b"") for name in names]
        uri = self.fields.get("digest-uri", b"")
        first = digest_md5(secret, nonces[0], nonces[2], *identity)
        self.rspauth = digest_md5(first, *nonces, b"auth", digest_md5(b"", uri))
        self.fields.setdefault("response", digest_md5(first, *nonces, b"auth", digest_md5(b"AUTHENTICATE", uri)))
        return b",".join(self.directive(name, value) for name, value in self.fields.items())

    @staticmethod
    def directive(name: str, value: bytes) -> bytes:
        if name in ("charset", "nc", "qop", "response", "maxbuf"):
            return name.encode() + b"=" + value
        return name.encode() + b'="' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'

    def log_in(self, mechanism: Mechanism) -> Success:
        challenge = mechanism.step(b"")
        assert isinstance(challenge, Challenge) and len(challenge.data) < 2048
        answer = mechanism.step(self.respond(challenge.data))
        assert answer == Challenge(b"rspauth=" + self.rspauth)
        success = mechanism.step(b"")
        assert isinstance(success, Success)
        return success


def plain(*parts: str) -> bytes:
    return "\0".join(parts).encode()


def log_in(name: str, user: str, password: str, **changes: Any) -> Success:
    """Log in by any mechanism with a password."""
    mechanism = begin(name, **changes)
    if name.startswith("SCRAM"):
        return ScramClient(name, user, password).log_in(mechanism)
    if name == "DIGEST-MD5":
        return DigestClient(user, password).log_in(mechanism)
    success = finished(mechanism.step(plain("", user, password)))
    assert isinstance(success, Success)
    return success


PASSWORD_MECHANISMS = [*SCRAMS, "DIGEST-MD5", "PLAIN"]


# -- all mechanisms


@pytest.mark.parametrize("name", PASSWORD_MECHANISMS)
def test_the_right_password_logs_in(name: str) -> None:
    """RFC5802-4-1, RFC5802-5-2, RFC6120-13.8.1-1"""
    assert log_in(name, "alice", PASSWORD).username == ALICE


@pytest.mark.parametrize("name", PASSWORD_MECHANISMS)
def test_a_wrong_password_and_an_unknown_user_fail_alike(name: str) -> None:
    """RFC6120-6.5.10-1, S29"""
    for user, password in (("alice", "Pencil"), ("alice", "pencil "), ("nobody", PASSWORD), ("certified", PASSWORD)):
        assert refusal(lambda u=user, p=password: log_in(name, u, p)) == NOT_AUTHORIZED  # type: ignore[misc]


@pytest.mark.parametrize("name", PASSWORD_MECHANISMS)
def test_a_disabled_account_is_told_only_to_its_owner(name: str) -> None:
    """RFC6120-6.5.2-1"""
    assert refusal(lambda: log_in(name, "sleeper", "wrong")) == NOT_AUTHORIZED
    assert refusal(lambda: log_in(name, "sleeper", PASSWORD)) == "account-disabled"


@pytest.mark.parametrize("name", ["SCRAM-SHA-1", "SCRAM-SHA-1-PLUS", "DIGEST-MD5"])
def test_an_account_without_keys_for_a_mechanism_fails_like_a_wrong_password(name: str) -> None:
    assert refusal(lambda: log_in(name, "old", PASSWORD)) == NOT_AUTHORIZED
    assert log_in("PLAIN", "old", PASSWORD).username.local == "old"


@pytest.mark.parametrize("name", PASSWORD_MECHANISMS)
@pytest.mark.parametrize(
    "user", ["", "@example.org", "alice@example.com", "al ice", "alice@@", "\u202ealice", "a" * 1100]
)
def test_what_cannot_be_a_name_fails(name: str, user: str) -> None:
    """RFC4616-2-2"""
    assert refusal(lambda: log_in(name, user, PASSWORD)) in (NOT_AUTHORIZED, MALFORMED)


@pytest.mark.parametrize("name", [*SCRAMS, "PLAIN"])
@pytest.mark.parametrize("user", ["alice", "ALICE", "\uff41lice", "alice@example.org", "Alice@Example.ORG"])
def test_names_are_prepared_and_a_whole_address_is_tolerated(name: str, user: str) -> None:
    """RFC6120-6.3.7-1, RFC5802-5.1-1"""
    assert log_in(name, user, PASSWORD).username == ALICE


FOREIGN = ["bob@example.org", "alice@example.com", "alice", "example.org", "alice@example.org/phone", "@", "a@b@c"]


def with_authzid(name: str, authzid: str) -> Success:
    if name == "PLAIN":
        success = finished(begin(name).step(plain(authzid, "alice", PASSWORD)))
        assert isinstance(success, Success)
        return success
    if name == "DIGEST-MD5":
        return DigestClient(authzid=authzid).log_in(begin(name))
    return ScramClient(name, authzid=authzid).log_in(begin(name))


@pytest.mark.parametrize("name", PASSWORD_MECHANISMS)
@pytest.mark.parametrize("authzid", FOREIGN)
def test_nobody_acts_for_somebody_else(name: str, authzid: str) -> None:
    """S25, RFC4616-2-3, RFC6120-6.3.8-1, RFC6120-6.5.6-1"""
    assert refusal(lambda: with_authzid(name, authzid)) == INVALID_AUTHZID


@pytest.mark.parametrize("name", PASSWORD_MECHANISMS)
@pytest.mark.parametrize("authzid", ["alice@example.org", "ALICE@Example.org"])
def test_everybody_may_act_for_themselves(name: str, authzid: str) -> None:
    """S25, RFC6120-6.3.8-1, RFC2831-2.1.2-2"""
    assert with_authzid(name, authzid).username == ALICE


def test_an_empty_authzid_is_part_of_the_digest_only() -> None:
    assert DigestClient(authzid="").log_in(begin("DIGEST-MD5")).username == ALICE


@settings(max_examples=300)
@given(st.sampled_from(ALL), st.lists(st.binary(max_size=80), max_size=3))
def test_any_bytes_only_ever_give_a_step_or_a_sasl_error(name: str, messages: list[bytes]) -> None:
    mechanism = begin(name, certificate_addresses=[ALICE])
    try:
        for message in messages:
            step = mechanism.step(message)
            assert isinstance(step, Challenge | Success | Work)
            assert not isinstance(step, Success) or name == "EXTERNAL"
    except SASLError:
        pass


MUTATIONS = st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=3))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*SCRAMS, "DIGEST-MD5"]), MUTATIONS)
def test_a_tampered_last_message_never_succeeds(name: str, mutation: tuple[int, int, bytes]) -> None:
    """RFC5802-5.1-4: all that was said is part of the proof."""
    at, cut, patch = mutation
    mechanism = begin(name)
    client = ScramClient(name) if name != "DIGEST-MD5" else DigestClient()
    challenge = mechanism.step(client.first() if isinstance(client, ScramClient) else b"")
    assert isinstance(challenge, Challenge)
    message = client.final(challenge.data) if isinstance(client, ScramClient) else client.respond(challenge.data)
    tampered = message[:at] + patch + message[at + cut :]
    if name == "DIGEST-MD5":
        # What the digest doesn't cover may change: spaces, the case of names, unknown directives.
        try:
            if xmppd.digest_directives(tampered).items() >= xmppd.digest_directives(message).items():
                return
        except SASLError:
            pass
    if tampered != message:
        try:
            step = mechanism.step(tampered)
        except SASLError:
            return
        assert canonical_proof(name, tampered) == canonical_proof(name, message), step


def canonical_proof(name: str, message: bytes) -> Any:
    """Return the message with what means the same written the same: base64 has spare bits, a digest has defaults."""
    if name == "DIGEST-MD5":
        defaults = {"qop": "auth", "charset": "utf-8"}
        known = {*DigestClient().changes, "username", "realm", "nonce", "nc", "cnonce", "digest-uri", "response"}
        directives = defaults | xmppd.digest_directives(message)
        return {name: value for name, value in directives.items() if name in known | defaults.keys()}
    head, _, proof = message.rpartition(b",p=")
    return head, base64.b64decode(proof)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PASSWORD_MECHANISMS), st.text(min_size=1, max_size=12), st.text(max_size=12))
@example("PLAIN", "I\u00adX", "IX")
@example("SCRAM-SHA-1", "\u2168", "IX")
@example("DIGEST-MD5", "pässword", "pässword")
@example("DIGEST-MD5", "пароль", "пароль")
def test_only_the_right_password_is_right(name: str, password: str, tried: str) -> None:
    """RFC4616-2-2, RFC5802-5.1-4"""
    try:
        prepared = xmppd.saslprep(password)
    except ValueError:
        with pytest.raises(ValueError):
            xmppd.make_credentials(password)
        return
    accounts = {"alice": cheap_credentials(prepared)}
    try:
        same = xmppd.saslprep(tried) == prepared
        tried = tried if name == "PLAIN" else xmppd.saslprep(tried)  # other clients prepare it themselves
    except ValueError:
        same = False
    try:
        assert log_in(name, "alice", tried, credentials=accounts.get).username == ALICE
        assert same
    except SASLError:
        assert not same


def cheap_credentials(password: str) -> dict[str, Any]:
    """Return credentials with the fewest iterations that SCRAM may have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmppd, "SCRAM_ITERATIONS", 4096)
        return xmppd.make_credentials(password, digest_md5=ALICE)


# -- credentials


def test_credentials_are_json_and_hold_no_password() -> None:
    """RFC5802-9-1"""
    document = xmppd.make_credentials("correct horse")
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {"scram-sha-256", "scram-sha-1"}  # the hash of DIGEST-MD5 only where it is asked for
    assert "horse" not in json.dumps(document)
    assert document["scram-sha-256"]["iterations"] >= 4096 <= document["scram-sha-1"]["iterations"]
    assert len(base64.b64decode(document["scram-sha-1"]["salt"])) == 16
    assert document["scram-sha-1"]["salt"] != xmppd.make_credentials("correct horse")["scram-sha-1"]["salt"]


@pytest.mark.parametrize("password", ["", "\u00ad", "a\0b", "\ue000", "\u0627\u0031"])
def test_passwords_that_cannot_be_prepared_are_refused(password: str) -> None:
    with pytest.raises(ValueError):
        xmppd.make_credentials(password)
    assert not xmppd.check_password(CREDENTIALS, password)


def test_a_password_is_checked_in_its_prepared_form() -> None:
    """RFC4616-2-2"""
    credentials = xmppd.make_credentials("\u00bd\u00a0IX")
    assert xmppd.check_password(credentials, "1\u20442 \u2168")
    assert not xmppd.check_password(credentials, "1/2 IX")
    assert not xmppd.check_password(None, "1/2 IX")
    assert not xmppd.check_password({}, "1/2 IX")


def test_a_password_can_be_checked_with_the_keys_of_sha_1_alone() -> None:
    assert xmppd.check_password({"scram-sha-1": CREDENTIALS["scram-sha-1"]}, PASSWORD)
    assert not xmppd.check_password({"scram-sha-1": CREDENTIALS["scram-sha-1"]}, "wrong")


def test_no_account_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC6120-6.5.10-1, S29: the same derivation, whoever is asked for."""
    asked = []
    real = hashlib.pbkdf2_hmac

    def derive(*args: Any) -> bytes:
        asked.append((args[0], len(args[2]), args[3]))
        return real(*args)

    monkeypatch.setattr(xmppd.hashlib, "pbkdf2_hmac", derive)
    for credentials in (CREDENTIALS, None, {}):
        xmppd.check_password(credentials, "wrong")
    assert asked == [("sha256", 16, 10_000)] * 3


DAMAGED: list[Any] = [
    {},
    [],
    "x",
    7,
    CREDENTIALS["scram-sha-256"] | {"salt": "no base64!"},
    CREDENTIALS["scram-sha-256"] | {"salt": ""},
    CREDENTIALS["scram-sha-256"] | {"stored": "AAAA"},
    CREDENTIALS["scram-sha-256"] | {"iterations": 0},
    CREDENTIALS["scram-sha-256"] | {"iterations": None},
    CREDENTIALS["scram-sha-256"] | {"server": 5},
]


@pytest.mark.parametrize("entry", DAMAGED)
@pytest.mark.parametrize("name", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"])
def test_damaged_credentials_are_the_servers_fault(name: str, entry: Any) -> None:
    """RFC6120-6.5.11-1"""
    accounts = {"alice": {"scram-sha-256": entry}}
    assert refusal(lambda: log_in(name, "alice", PASSWORD, credentials=accounts.get)) == "temporary-auth-failure"


@pytest.mark.parametrize("entry", ["no base64!", 5])
def test_a_damaged_digest_is_the_servers_fault(entry: Any) -> None:
    """RFC6120-6.5.11-1"""
    accounts = {"alice": {"digest-md5": {HOST: entry}}}
    assert (
        refusal(lambda: log_in("DIGEST-MD5", "alice", PASSWORD, credentials=accounts.get)) == "temporary-auth-failure"
    )


def test_credentials_of_other_programs_keep_their_salts_and_counts() -> None:
    keys = xmppd.derive_keys(PASSWORD, "sha1", b"short", 4096)
    entry = {"salt": b"short", "stored": keys.stored, "server": keys.server}
    document = {"scram-sha-1": {key: base64.b64encode(value).decode() for key, value in entry.items()}}
    document["scram-sha-1"]["iterations"] = 4096
    for name in ("SCRAM-SHA-1", "PLAIN"):
        assert log_in(name, "alice", PASSWORD, credentials={"alice": document}.get).username == ALICE


# -- base64 on the wire


@pytest.mark.parametrize(
    ("text", "data"), [("=", b""), ("", b""), ("YQ==", b"a"), ("AGE=", b"\0a"), ("+/+/", b"\xfb\xff\xbf")]
)
def test_base64_is_decoded(text: str, data: bytes) -> None:
    """RFC6120-6.3.5-1"""
    assert xmppd.decode_base64(text) == data
    if text:
        assert xmppd.encode_base64(data) == text


@pytest.mark.parametrize(
    "text", ["a", "YQ", "YQ=", "YQ==YQ==", "=YQ=", "==", "Y Q=", "YQ==\n", "-_-_", "ÄÖÜÜ", "YQ==x", "\0\0\0\0"]
)
def test_what_is_not_base64_is_refused(text: str) -> None:
    """RFC6120-13.9.1-1, RFC6120-6.5.5-1"""
    assert refusal(lambda: xmppd.decode_base64(text)) == "incorrect-encoding"


@given(st.text(max_size=30))
def test_any_text_is_base64_or_a_sasl_error(text: str) -> None:
    try:
        assert isinstance(xmppd.decode_base64(text), bytes)
    except SASLError as error:
        assert error.condition == "incorrect-encoding"


@given(st.binary(max_size=30))
def test_base64_goes_both_ways(data: bytes) -> None:
    assert xmppd.decode_base64(xmppd.encode_base64(data)) == data


# -- which mechanisms


def test_mechanisms_are_listed_strongest_first() -> None:
    """RFC6120-6.3.3-1, RFC6120-6.3.4-2, RFC3920-14.7-1"""
    assert xmppd.mechanisms(a_context(certificate_addresses=[ALICE]), Settings()) == [
        "EXTERNAL",
        "SCRAM-SHA-256-PLUS",
        "SCRAM-SHA-1-PLUS",
        "SCRAM-SHA-256",
        "SCRAM-SHA-1",
        "DIGEST-MD5",
        "PLAIN",
    ]


def test_without_tls_there_is_neither_plain_nor_channel_binding() -> None:
    """RFC6120-6.3.4-1, RFC6120-13.8.3-1, RFC5802-6-1"""
    bare = a_context(secure=False, bindings={}, offered=["SCRAM-SHA-1"])
    assert xmppd.mechanisms(bare, Settings()) == ["SCRAM-SHA-256", "SCRAM-SHA-1", "DIGEST-MD5"]
    assert refusal(lambda: xmppd.start_mechanism("PLAIN", bare)) == "encryption-required"


def test_digest_md5_waits_until_it_is_asked_for() -> None:
    off = type("Off", (), {"compat": type("C", (), {"digest_md5": False})})
    names = xmppd.mechanisms(a_context(), off)
    assert "DIGEST-MD5" not in names
    assert refusal(lambda: begin("DIGEST-MD5", offered=names)) == "invalid-mechanism"


@pytest.mark.parametrize("addresses", [[], [JID("alice", "example.com", "")], [JID("", HOST, "")]])
def test_external_is_offered_only_to_whom_it_can_help(addresses: list[JID]) -> None:
    """XEP0178-2-5"""
    context = a_context(certificate_addresses=addresses)
    assert "EXTERNAL" not in xmppd.mechanisms(context, Settings())


@pytest.mark.parametrize("name", ["", "CRAM-MD5", "scram-sha-1", "SCRAM-SHA-512", "ANONYMOUS", "plain"])
def test_unknown_mechanisms_are_refused(name: str) -> None:
    """RFC6120-6.5.7-1"""
    assert refusal(lambda: begin(name)) == "invalid-mechanism"


@pytest.mark.parametrize("name", ALL)
def test_what_was_not_offered_is_refused(name: str) -> None:
    """RFC6120-6.5.7-1"""
    assert refusal(lambda: begin(name, offered=[other for other in ALL if other != name])) == "invalid-mechanism"


# -- PLAIN


@pytest.mark.parametrize(
    "message", [b"", b"\0", b"alice", b"alice\0pencil", b"\0alice\0pencil\0", b"a\0\0alice\0x", b"\0\xff\0x"]
)
def test_plain_has_exactly_three_parts_of_utf_8(message: bytes) -> None:
    """RFC4616-2-1, RFC6120-6.5.8-1"""
    assert refusal(lambda: begin("PLAIN").step(message)) == MALFORMED


@pytest.mark.parametrize("message", [plain("", "alice", ""), plain("", "", PASSWORD)])
def test_plain_needs_a_name_and_a_password(message: bytes) -> None:
    """RFC4616-2-2"""
    assert refusal(lambda: finished(begin("PLAIN").step(message))) == NOT_AUTHORIZED


def test_plain_takes_long_names_and_passwords() -> None:
    """RFC4616-2-1"""
    user, password = "é" * 127, "ü" * 127  # 254 octets each
    accounts = {user: xmppd.make_credentials(password)}
    authzid = f"{user}@{HOST}"
    success = finished(begin("PLAIN", credentials=accounts.get).step(plain(authzid, user, password)))
    assert success == Success(None, JID(user, HOST, ""))


def test_plain_does_its_work_elsewhere() -> None:
    """S31: PBKDF2 never runs in the loop's thread."""
    step = begin("PLAIN").step(plain("", "alice", PASSWORD))
    assert isinstance(step, Work) and step.function is xmppd.check_password
    assert step.then(True) == Success(None, ALICE)


# -- SCRAM


def test_the_example_of_rfc_5802(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC5802-5.1-3, RFC5802-5.1-4: §5 of RFC 5802."""
    monkeypatch.setattr(xmppd.secrets, "token_urlsafe", lambda size: "3rfcNHYJY1ZVvWVs7j")
    monkeypatch.setattr(xmppd.Scram, "extensions", lambda mechanism: "")  # XEP-0474 is younger
    keys = xmppd.derive_keys("pencil", "sha1", base64.b64decode("QSXCR+Q6sek8bf92"), 4096)
    accounts = {"user": {"scram-sha-1": stored(keys)}}
    mechanism = begin("SCRAM-SHA-1", credentials=accounts.get)
    challenge = mechanism.step(b"n,,n=user,r=fyko+d2lbbFgONRv9qkxdawL")
    assert challenge == Challenge(b"r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096")
    step = mechanism.step(b"c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=")
    assert step == Success(b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ=", JID("user", HOST, ""))


def test_the_example_of_rfc_7677(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC5802-4-1: §3 of RFC 7677."""
    monkeypatch.setattr(xmppd.secrets, "token_urlsafe", lambda size: "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    monkeypatch.setattr(xmppd.Scram, "extensions", lambda mechanism: "")  # XEP-0474 is younger
    keys = xmppd.derive_keys("pencil", "sha256", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
    accounts = {"user": {"scram-sha-256": stored(keys)}}
    mechanism = begin("SCRAM-SHA-256", credentials=accounts.get)
    nonce = b"rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    challenge = mechanism.step(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO")
    assert challenge == Challenge(b"r=" + nonce + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096")
    step = mechanism.step(b"c=biws,r=" + nonce + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    assert step == Success(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", JID("user", HOST, ""))


def stored(keys: xmppd.ScramKeys) -> dict[str, Any]:
    encoded = {name: base64.b64encode(getattr(keys, name)).decode() for name in ("salt", "stored", "server")}
    return encoded | {"iterations": keys.iterations}


@pytest.mark.parametrize("name", SCRAMS)
@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"n",
        b"n,,",
        b"x,,n=alice,r=abc",
        b"F,n,,n=alice,r=abc",
        b",,n=alice,r=abc",
        b"p=,,n=alice,r=abc",
        b"p=a b,,n=alice,r=abc",
        b"N,,n=alice,r=abc",
        b"n=,,n=alice,r=abc",
        b"FLAG,a=,n=alice,r=abc",
        b"FLAG,alice,n=alice,r=abc",
        b"FLAG,,r=abc,n=alice",
        b"FLAG,,n=alice",
        b"FLAG,,n=,r=abc",
        b"FLAG,,n=alice,r=",
        b"FLAG,,n=alice,r=a\xc3\xa4",
        b"FLAG,,n=alice,r=a b",
        b"FLAG,,n=ali\xff,r=abc",
        b"FLAG,,n=ali=ce,r=abc",
        b"FLAG,,n=ali=2cce,r=abc",
        b"FLAG,,n=alice=,r=abc",
        b"FLAG,a==41,n=alice,r=abc",
        b"FLAG,,n=alice,r=abc,",
        b"FLAG,,n=alice,r=abc,x",
        b"FLAG,,n=alice,r=abc,x=",
        b"FLAG,,n=alice,r=abc,xy=1",
        b"FLAG,,n=alice,r=abc,1=1",
        b"FLAG,,n=alice,r=abc,r=def",
        b"FLAG,,n=alice,r=abc,x=\0",
        b"FLAG,,m=1,n=alice,r=abc",
        b"FLAG,,n=alice,r=abc,m=1",
    ],
)
def test_a_malformed_first_message_is_refused(name: str, first: bytes) -> None:
    """RFC5802-5-1, RFC5802-5.1-1, RFC5802-5.1-2, RFC6120-6.5.8-1"""
    flag = b"p=tls-server-end-point" if name.endswith("PLUS") else b"n"
    assert refusal(lambda: begin(name).step(first.replace(b"FLAG", flag))) == MALFORMED


@pytest.mark.parametrize("name", SCRAMS)
@pytest.mark.parametrize(
    "final",
    [
        "",
        "c=CB",
        "r=NONCE,c=CB,p=AAAA",
        "c=CB,r=NONCE",
        "c=CB,p=AAAA",
        "c=,r=NONCE,p=AAAA",
        "c=CB,r=NONCE,p=",
        "c=CB,r=NONCE,p=A",
        "c=CB,r=NONCE,p=AA!A",
        "c=CB,r=NONCE,p=AAAA,x=1",
        "c=CB,r=NONCE,p=AAAA,p=AAAA",
        "c=CB,r=NONCE,m=1,p=AAAA",
        "m=1,c=CB,r=NONCE,p=AAAA",
        "c=CB,r=NONCE,r=NONCE,p=AAAA",
        "\udcff",
    ],
)
def test_a_malformed_last_message_is_refused(name: str, final: str) -> None:
    """RFC5802-5.1-2, RFC6120-6.5.8-1"""
    client, mechanism = ScramClient(name), begin(name)
    challenge = mechanism.step(client.first())
    assert isinstance(challenge, Challenge)
    fields = re.match(r"c=(?P<CB>[^,]+),r=(?P<NONCE>[^,]+)", client.final(challenge.data).decode())
    assert fields
    message = final.replace("CB", fields["CB"]).replace("NONCE", fields["NONCE"])
    assert refusal(lambda: mechanism.step(message.encode("utf-8", "surrogateescape"))) == MALFORMED


@pytest.mark.parametrize("name", SCRAMS)
@pytest.mark.parametrize(
    "changes",
    [
        {"r": "fyko+d2lbbFgONRv9qkxdawL"},  # only the client's half
        {"r": "something else"},
        {"c": "biws" * 3},
        {"c": base64.b64encode(b"y,,").decode()},
        {"c": "biws="},
        {"p": "AAAA"},
        {"p": base64.b64encode(bytes(32)).decode()},
        {"p": base64.b64encode(bytes(20)).decode()},
    ],
)
def test_the_nonce_the_binding_and_the_proof_must_be_exact(name: str, changes: dict[str, str]) -> None:
    """RFC5802-5.1-4, S26"""
    assert refusal(lambda: ScramClient(name).log_in(begin(name), **changes)) == NOT_AUTHORIZED


@pytest.mark.parametrize("name", SCRAMS)
def test_unknown_optional_extensions_are_ignored(name: str) -> None:
    """RFC5802-5.1-2"""
    assert ScramClient(name, extensions=",x=1=2,Z=ü").log_in(begin(name)).username == ALICE


@pytest.mark.parametrize("name", SCRAMS)
def test_commas_and_equals_signs_in_names_are_escaped(name: str) -> None:
    """RFC5802-5.1-1"""
    client = ScramClient(name, "a=2Cb=3Dc", authzid="a=2Cb=3Dc@example.org")
    assert client.log_in(begin(name)).username == JID("a,b=c", HOST, "")


@pytest.mark.parametrize("name", ["SCRAM-SHA-1", "SCRAM-SHA-256"])
def test_a_client_that_saw_no_plus_where_there_was_one_is_warned(name: str) -> None:
    """RFC5802-6-1, S26: somebody has taken -PLUS out of the list."""
    assert refusal(lambda: begin(name).step(ScramClient(name, flag="y").first())) == NOT_AUTHORIZED
    bare = {"offered": ["SCRAM-SHA-256", "SCRAM-SHA-1"], "bindings": {}}
    assert ScramClient(name, flag="y").log_in(begin(name, **bare)).username == ALICE


@pytest.mark.parametrize("name", ["SCRAM-SHA-1-PLUS", "SCRAM-SHA-256-PLUS"])
def test_channel_binding_of_every_type_offered(name: str) -> None:
    """RFC5802-6.1-1"""
    for kind, data in END_POINT.items():
        assert ScramClient(name, flag=f"p={kind}", binding=data).log_in(begin(name)).username == ALICE
        assert refusal(
            lambda k=kind: ScramClient(name, flag=f"p={k}", binding=b"another channel").log_in(begin(name))
        ) == (  # type: ignore[misc]
            NOT_AUTHORIZED
        )


@pytest.mark.parametrize("name", ["SCRAM-SHA-1-PLUS", "SCRAM-SHA-256-PLUS"])
def test_an_unsupported_binding_type_fails(name: str) -> None:
    """RFC5802-6-1"""
    client = ScramClient(name, flag="p=tls-exporter", binding=b"")
    assert refusal(lambda: begin(name).step(client.first())) == NOT_AUTHORIZED


@pytest.mark.parametrize(
    ("name", "flag"), [("SCRAM-SHA-256-PLUS", "n"), ("SCRAM-SHA-256-PLUS", "y"), ("SCRAM-SHA-256", "p=tls-unique")]
)
def test_the_flag_and_the_mechanism_must_agree(name: str, flag: str) -> None:
    """RFC5802-6-1"""
    assert refusal(lambda: begin(name).step(ScramClient(name, flag=flag).first())) == MALFORMED


@pytest.mark.parametrize("name", SCRAMS)
def test_nonces_and_salts(name: str) -> None:
    """RFC5802-5.1-3, RFC6120-6.5.10-1, S29"""

    def challenge(user: str, **changes: Any) -> dict[str, str]:
        step = begin(name, **changes).step(ScramClient(name, user).first())
        assert isinstance(step, Challenge)
        return dict(part.split("=", 1) for part in step.data.decode().split(","))

    known, again = challenge("alice"), challenge("alice")
    assert known["r"] != again["r"] and known["s"] == again["s"]
    unknown, others = challenge("nobody"), [challenge("nobody"), challenge("NoBody"), challenge("nobody@example.org")]
    assert all(other["s"] == unknown["s"] for other in others)  # stable, and by the prepared name
    assert known.keys() == unknown.keys() and known["i"] == unknown["i"]
    assert len(base64.b64decode(known["s"])) == len(base64.b64decode(unknown["s"]))
    assert challenge("nobody2")["s"] != unknown["s"]
    assert challenge("nobody", secret=b"other server")["s"] != unknown["s"]
    assert challenge("certified")["s"] == challenge("certified")["s"]  # an account without a password
    sibling = name.removesuffix("-PLUS") if name.endswith("-PLUS") else f"{name}-PLUS"
    step = begin(sibling).step(ScramClient(sibling, "nobody").first())
    assert isinstance(step, Challenge) and f"s={unknown['s']}".encode() in step.data


@pytest.mark.parametrize("name", SCRAMS)
def test_the_proof_of_one_exchange_is_worth_nothing_in_the_next(name: str) -> None:
    client, first, second = ScramClient(name), begin(name), begin(name)
    challenge = first.step(client.first())
    second.step(client.first())
    assert isinstance(challenge, Challenge)
    final = client.final(challenge.data)
    assert isinstance(first.step(final), Success)
    assert refusal(lambda: second.step(final)) == NOT_AUTHORIZED


# -- EXTERNAL


def external(message: bytes, *addresses: str, sender: str = "", **changes: Any) -> Success:
    parsed = [JID.parse(text) for text in addresses]
    step = begin(
        "EXTERNAL", certificate_addresses=parsed, sender=JID.parse(sender) if sender else None, **changes
    ).step(message)
    assert isinstance(step, Success) and step.data is None
    return step


@pytest.mark.parametrize("message", [b"", b"alice@example.org", b"Alice@Example.org"])
def test_a_certificate_with_one_address_is_enough(message: bytes) -> None:
    """XEP0178-2-1, RFC6120-13.8.4-1, RFC6120-13.7.2.2-1"""
    assert external(message, "alice@example.org").username == ALICE
    assert external(message, "alice@example.org/phone", "alice@example.org").username == ALICE
    assert external(message, "alice@example.org", "alice@example.com").username == ALICE


def test_an_account_without_a_password_can_use_its_certificate() -> None:
    assert external(b"", "certified@example.org").username.local == "certified"


def test_among_several_addresses_the_client_chooses() -> None:
    """XEP0178-2-2, XEP0178-2-3, RFC6120-13.7.2.2-1"""
    both = ("alice@example.org", "bob@example.org")
    assert external(b"bob@example.org", *both).username.local == "bob"
    assert refusal(lambda: external(b"", *both)) == INVALID_AUTHZID
    assert refusal(lambda: external(b"", *both, sender="certified@example.org")) == INVALID_AUTHZID
    assert external(b"", *both, sender="bob@example.org/phone").username.local == "bob"
    assert external(b"alice@example.org", *both, sender="bob@example.org").username == ALICE


@pytest.mark.parametrize(
    "message", [b"bob@example.org", b"alice@example.com", b"@", b"alice@example.org/x", b"example.org"]
)
def test_the_certificate_must_hold_the_address_that_is_asked_for(message: bytes) -> None:
    """XEP0178-2-2, RFC6120-6.5.6-1"""
    assert refusal(lambda: external(message, "alice@example.org", "alice@example.com")) == INVALID_AUTHZID


def test_an_address_without_an_account_is_not_authorized() -> None:
    """XEP0178-2-4"""
    assert refusal(lambda: external(b"", "nobody@example.org")) == NOT_AUTHORIZED
    assert refusal(lambda: external(b"nobody@example.org", "nobody@example.org")) == NOT_AUTHORIZED
    assert external(b"", "nobody@example.org", "alice@example.org").username == ALICE
    assert refusal(lambda: external(b"", "alice@example.com")) == NOT_AUTHORIZED


def test_a_disabled_account_is_told_to_its_certificate_too() -> None:
    """RFC6120-6.5.2-1"""
    assert refusal(lambda: external(b"", "sleeper@example.org")) == "account-disabled"


def test_external_wants_utf_8() -> None:
    assert refusal(lambda: external(b"\xff", "alice@example.org")) == MALFORMED


# -- DIGEST-MD5


@pytest.mark.parametrize(
    ("nonce", "cnonce", "uri", "response", "rspauth"),
    [
        ("OA6MG9tEQGm2hh", "OA6MHXh6VqTrRk", "imap/elwood.innosoft.com", "d388dad90d4bbd760a152321f2143af7", "ea40f60335c427b5527b84dbabcdfffd"),
        ("OA9BSXrbuRhWay", "OA9BSuZWMSpW8m", "acap/elwood.innosoft.com", "6084c6db3fede7352c551284490fd0fc", "2f0b3d7c3c2e486600ef710726aa2eae"),
    ],
)  # fmt: skip
def test_the_examples_of_rfc_2831(nonce: str, cnonce: str, uri: str, response: str, rspauth: str) -> None:
    """RFC2831-2.1.2-2: §4 of RFC 2831."""
    message = (
        f'charset=utf-8,username="chris",realm="elwood.innosoft.com",nonce="{nonce}",nc=00000001,'
        f'cnonce="{cnonce}",digest-uri="{uri}",response={response},qop=auth'
    )
    directives = xmppd.digest_directives(message.encode())
    secret = xmppd.digest_md5_secret("chris", "elwood.innosoft.com", "secret")
    assert xmppd.digest_md5_response(secret, directives, "AUTHENTICATE") == directives["response"] == response
    assert xmppd.digest_md5_response(secret, directives, "") == rspauth


def test_the_challenge_is_what_rfc_2831_asks_for() -> None:
    """RFC2831-2.1.1-1, RFC2831-2.1.3-2"""
    mechanism, again = begin("DIGEST-MD5"), begin("DIGEST-MD5")
    assert not mechanism.client_first
    step, other = mechanism.step(b""), again.step(b"")
    assert isinstance(step, Challenge)
    nonce = rb'nonce="([A-Za-z0-9_-]{20,})"'
    assert re.fullmatch(rb'realm="example.org",' + nonce + rb',qop="auth",charset=utf-8,algorithm=md5-sess', step.data)
    assert step != other


def test_an_initial_response_is_refused() -> None:
    """RFC6120-6.5.8-1"""
    assert refusal(lambda: begin("DIGEST-MD5").step(b'username="alice"')) == MALFORMED


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ({"username": None}, MALFORMED),
        ({"nonce": None}, MALFORMED),
        ({"cnonce": None}, MALFORMED),
        ({"response": "zz"}, MALFORMED),
        ({"response": "D388DAD90D4BBD760A152321F2143AF7"}, MALFORMED),
        ({"charset": "iso-8859-1"}, MALFORMED),
        ({"nc": "00000002"}, NOT_AUTHORIZED),
        ({"nc": None}, NOT_AUTHORIZED),
        ({"nonce": "another"}, NOT_AUTHORIZED),
        ({"realm": "example.com"}, NOT_AUTHORIZED),
        ({"realm": None}, NOT_AUTHORIZED),
        ({"digest-uri": "xmpp/example.com"}, NOT_AUTHORIZED),
        ({"digest-uri": "imap/example.org"}, NOT_AUTHORIZED),
        ({"digest-uri": None}, NOT_AUTHORIZED),
        ({"qop": "auth-int"}, NOT_AUTHORIZED),
        ({"username": "Alice"}, NOT_AUTHORIZED),  # the digest was made of "alice"
        ({"username": "alice@example.org"}, NOT_AUTHORIZED),
        ({"response": "d388dad90d4bbd760a152321f2143af7"}, NOT_AUTHORIZED),
    ],
)
def test_every_directive_is_checked(changes: dict[str, Any], condition: str) -> None:
    """RFC2831-2.1.2-1, RFC2831-2.1.3-2"""
    assert refusal(lambda: DigestClient(**changes).log_in(begin("DIGEST-MD5"))) == condition


@pytest.mark.parametrize("changes", [{"qop": None}, {"charset": None}, {"maxbuf": "65536"}, {"x-extra": "1"}])
def test_what_may_be_left_out_or_added_may(changes: dict[str, Any]) -> None:
    assert DigestClient(**changes).log_in(begin("DIGEST-MD5")).username == ALICE


@pytest.mark.parametrize(
    ("user", "password", "charset"),
    [("jürgen", "pässword", "utf-8"), ("jürgen", "pässword", None), ("юрий", "пароль", "utf-8")],
)
def test_names_and_passwords_beyond_ascii(user: str, password: str, charset: str | None) -> None:
    account = JID(user, HOST, "")
    accounts = {user: xmppd.make_credentials(password, digest_md5=account)}
    if charset and not user.startswith("j"):  # RFC 2831 hashes each part in ISO 8859-1 if it can
        secret = hashlib.md5(f"{user}:{HOST}:{password}".encode()).digest()
        assert base64.b64decode(accounts[user]["digest-md5"][HOST]) == secret
    client = DigestClient(user, password, charset=charset)
    assert client.log_in(begin("DIGEST-MD5", credentials=accounts.get)).username == account


@pytest.mark.parametrize(
    "extra",
    [
        b',nonce="x"',
        b",NONCE=x",
        b",broken",
        b',x="open',
        b",x=a b",
        b',x="a"b',
        b",=x",
        b",x=",
        b"," + b"x" * 4096 + b"=1",
    ],
)
def test_directives_that_cannot_be_read_are_refused(extra: bytes) -> None:
    """RFC2831-2.1.2-1: none is given twice."""
    mechanism, client = begin("DIGEST-MD5"), DigestClient()
    challenge = mechanism.step(b"")
    assert isinstance(challenge, Challenge)
    message = client.respond(challenge.data) + extra
    assert refusal(lambda: mechanism.step(message)) == MALFORMED


def test_lists_may_have_empty_elements_and_spaces() -> None:
    """RFC 2831 §7.1"""
    mechanism, client = begin("DIGEST-MD5"), DigestClient()
    challenge = mechanism.step(b"")
    assert isinstance(challenge, Challenge)
    message = b" ,, " + client.respond(challenge.data).replace(b",nc=", b" ,\t\r\n , nc = ") + b",, "
    assert isinstance(mechanism.step(message), Challenge)


def test_a_disabled_account_gets_no_digest_of_ours() -> None:
    """RFC6120-6.5.2-1"""
    mechanism, client = begin("DIGEST-MD5"), DigestClient("sleeper")
    challenge = mechanism.step(b"")
    assert isinstance(challenge, Challenge)
    message = client.respond(challenge.data)
    assert refusal(lambda: mechanism.step(message)) == "account-disabled"


def test_the_last_response_is_empty() -> None:
    """RFC2831-2.1.3-1"""
    mechanism, client = begin("DIGEST-MD5"), DigestClient()
    challenge = mechanism.step(b"")
    assert isinstance(challenge, Challenge)
    mechanism.step(client.respond(challenge.data))
    assert refusal(lambda: mechanism.step(b"more")) == MALFORMED


def test_a_digest_is_good_for_one_exchange() -> None:
    """RFC2831-2.1.3-2"""
    first, second, client = begin("DIGEST-MD5"), begin("DIGEST-MD5"), DigestClient()
    challenge = first.step(b"")
    second.step(b"")
    assert isinstance(challenge, Challenge)
    message = client.respond(challenge.data)
    assert isinstance(first.step(message), Challenge)
    assert refusal(lambda: second.step(message)) == NOT_AUTHORIZED


@given(st.binary(max_size=120))
@example(b'a="\\')
@example(b"a\xa0=\x85b")
def test_any_bytes_are_directives_or_a_sasl_error(data: bytes) -> None:
    try:
        assert all(isinstance(text, str) for text in itertools.chain(*xmppd.digest_directives(data).items()))
    except SASLError as error:
        assert error.condition == MALFORMED
