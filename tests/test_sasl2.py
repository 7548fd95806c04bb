"""Logging in fast: SASL2 (XEP-0388), Bind 2 (XEP-0386), tokens (XEP-0484), downgrade protection (XEP-0474)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
import xml.etree.ElementTree as ET
from typing import Any

import pytest

import xmppd
from tests.dialogue import SASL, Client, Scram, password_of
from tests.servers import MemoryServer, ProcessServer

SASL2 = "urn:xmpp:sasl:2"
BIND2 = "urn:xmpp:bind:0"
FAST = "urn:xmpp:fast:0"
SM = "urn:xmpp:sm:3"
PHONE = "d4565fa7-4d72-4749-b3d3-740edbf87770"
TABLET = "0f2a3b4c-1d2e-4f5a-8b6c-7d8e9f0a1b2c"
NONE = "HT-SHA-256-NONE"
AnyServer = MemoryServer | ProcessServer


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def before_login(server: AnyServer, **attributes: str) -> tuple[Client, ET.Element]:
    """Return somebody inside TLS, and the features offered to them."""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    return client, client.negotiates(**attributes)


@pytest.fixture
def client(server) -> Client:
    """Somebody inside TLS who has got the list of mechanisms."""
    return before_login(server)[0]


def inside(features: ET.Element) -> ET.Element:
    """Return SASL2's own feature."""
    found = features.find(f"{{{SASL2}}}authentication")
    assert found is not None
    return found


def authenticates(client: Client, mechanism: str, initial: bytes | None, more: str = "", agent: str = PHONE) -> None:
    """Send <authenticate/>."""
    first = "" if initial is None else f"<initial-response>{base64_of(initial)}</initial-response>"
    who = f"<user-agent id='{agent}'><software>Dino</software><device>Phone</device></user-agent>" if agent else ""
    client.sends(f"<authenticate xmlns='{SASL2}' mechanism='{mechanism}'>{first}{who}{more}</authenticate>")


def succeeds(client: Client, *children: str, features: bool = True) -> ET.Element:
    """Receive <success/> with an identity and these children, in any order, and the features behind it."""
    success = client.receives(
        f"<success xmlns='{SASL2}'><authorization-identifier>*</authorization-identifier>{''.join(children)}</success>")
    client.jid = success.findtext(f"{{{SASL2}}}authorization-identifier") or ""
    if features:
        client.receives_features()
    if "/" not in client.jid:
        client.jid = ""  # no resource, so no barriers
    return success


def fails(client: Client, condition: str) -> None:
    """Receive <failure/> for this reason."""
    failure = client.receives(f"<failure xmlns='{SASL2}' ...>...</failure>")
    assert failure[0].tag == f"{{{SASL}}}{condition}", ET.tostring(failure)


def plain(name: str, password: str = "", authzid: str = "") -> bytes:
    return f"{authzid}\0{name}\0{password or password_of(name)}".encode()


def hashed(name: str, token: str, who: bytes = b"Initiator", binding: bytes = b"") -> bytes:
    """Return what proves a token."""
    proof = hmac.digest(token.encode(), who + binding, "sha256")
    return proof if who == b"Responder" else name.encode() + b"\0" + proof


METADATA = "<metadata xmlns='urn:xmpp:mam:2' ...>...</metadata>"
BOUND = f"<bound xmlns='{BIND2}'>{METADATA}</bound>"
TOKEN = f"<token xmlns='{FAST}' token='*' expiry='*'/>"
DATA = f"<additional-data xmlns='{SASL2}'>*</additional-data>"
BIND = f"<bind xmlns='{BIND2}'><tag>Dino</tag></bind>"


def gets_token(server: AnyServer, name: str = "romeo", agent: str = PHONE, mechanism: str = NONE) -> str:
    """Log in with the password and return a token for next time."""
    client, _ = before_login(server)
    wish = f"<request-token xmlns='{FAST}' mechanism='{mechanism}'/>"
    authenticates(client, "PLAIN", plain(name), wish, agent)
    token = succeeds(client, TOKEN).find(f"{{{FAST}}}token").get("token")
    client.disconnects()
    return token


def shows_token(server: AnyServer, token: str, more: str = "", *, fast: str = "", agent: str = PHONE,
                mechanism: str = NONE, binding: bytes = b"") -> Client:  # fmt: skip
    """Log in as romeo with a token, and leave it to the caller to see what comes of it."""
    client, _ = before_login(server)
    proof = hashed("romeo", token, binding=binding)
    authenticates(client, mechanism, proof, f"<fast xmlns='{FAST}'{fast}/>{more}", agent)
    return client


def is_refused(server: AnyServer, token: str, condition: str = "not-authorized", **more: Any) -> None:
    client = shows_token(server, token, **more)
    fails(client, condition)
    client.disconnects()


def is_good(server: AnyServer, token: str, *children: str, **more: Any) -> ET.Element:
    client = shows_token(server, token, **more)
    success = succeeds(client, DATA, *children)
    client.disconnects()
    return success


# -- SASL2 (XEP-0388)


def test_sasl2_is_offered_with_what_can_be_asked_for_inline(server) -> None:
    """XEP-0388 §2.1, XEP-0386 §3.1, XEP-0484 §3.1: tokens have mechanisms with and without channel binding."""
    _, features = before_login(server)
    names = [child.text for child in inside(features).findall(f"{{{SASL2}}}mechanism")]
    assert names == ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]
    inline = inside(features).find(f"{{{SASL2}}}inline")
    assert inline.find(f"{{{SM}}}sm") is not None
    assert SM in [child.get("var") for child in inline.find(f"{{{BIND2}}}bind/{{{BIND2}}}inline")]
    assert [child.text for child in inline.find(f"{{{FAST}}}fast")] == ["HT-SHA-256-EXPR", NONE]


def test_sasl2_is_not_offered_without_tls(server) -> None:
    """XEP-0388 §3, S21"""
    client = server.client().connect()
    assert [child.tag.rpartition("}")[2] for child in client.negotiates()] == ["starttls"]
    authenticates(client, "PLAIN", plain("romeo"))
    fails(client, "encryption-required")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


def test_scram_proves_both_sides_and_the_same_stream_goes_on(client) -> None:
    """XEP-0388 §2.3, §2.5, §2.6.1, example 7"""
    scram = Scram("romeo", password_of("romeo"), "SCRAM-SHA-256", {})
    authenticates(client, "SCRAM-SHA-256", scram.first())
    challenge = client.receives(f"<challenge xmlns='{SASL2}'>*</challenge>").text or ""
    client.sends(f"<response xmlns='{SASL2}'>{base64_of(scram.final(base64.b64decode(challenge)))}</response>")
    success = client.receives(
        f"<success xmlns='{SASL2}'>{DATA}"
        "<authorization-identifier>romeo@example.org</authorization-identifier></success>")
    assert scram.verifies(base64.b64decode(success.findtext(f"{{{SASL2}}}additional-data") or ""))
    assert "bind" in [child.tag.rpartition("}")[2] for child in client.receives_features()]
    client.binds("orchard")
    client.sends(f"<message to='romeo@example.org/orchard' type='chat'><body>{'long ' * 4000}</body></message>")
    client.receives("<message from='romeo@example.org/orchard' type='chat'><body>*</body></message>")


@pytest.mark.wire
def test_scram_plus_binds_to_the_channel(server) -> None:
    """XEP-0388 §2.3, XEP-0440"""
    client, _ = before_login(server)
    scram = Scram("romeo", password_of("romeo"), "SCRAM-SHA-256-PLUS", client.wire.bindings())
    authenticates(client, "SCRAM-SHA-256-PLUS", scram.first(), BIND)
    challenge = client.receives(f"<challenge xmlns='{SASL2}'>*</challenge>").text or ""
    client.sends(f"<response xmlns='{SASL2}'>{base64_of(scram.final(base64.b64decode(challenge)))}</response>")
    succeeds(client, DATA, BOUND)
    client.comes_online()


def test_a_client_that_sends_its_first_data_later_is_asked(client) -> None:
    """XEP-0388 §2.3: the initial response is optional."""
    authenticates(client, "PLAIN", None)
    client.receives(f"<challenge xmlns='{SASL2}'/>")
    client.sends(f"<response xmlns='{SASL2}'>{base64_of(plain('romeo'))}</response>")
    succeeds(client)


def test_a_failure_leaves_the_stream_as_it_was(client) -> None:
    """XEP-0388 §2.6.2: nothing is bound, another attempt may follow, and by RFC 6120's profile too."""
    authenticates(client, "PLAIN", plain("romeo", "wrong"), BIND)
    fails(client, "not-authorized")
    client.authenticates("romeo", password_of("romeo"))
    client.negotiates()
    client.binds()


@pytest.mark.parametrize(("mechanism", "initial", "condition"), [
    ("X-UNKNOWN", b"", "invalid-mechanism"),
    (NONE, b"romeo\0proof", "invalid-mechanism"),  # without <fast/>
    ("", b"", "invalid-mechanism"),
    ("PLAIN", b"one part", "malformed-request"),
    ("PLAIN", b"", "malformed-request"),
])  # fmt: skip
def test_what_makes_no_sense_fails(client, mechanism: str, initial: bytes, condition: str) -> None:
    """XEP-0388 §2.3"""
    authenticates(client, mechanism, initial)
    fails(client, condition)


def test_what_is_not_base64_fails(client) -> None:
    """XEP-0388 §2.2"""
    client.sends(
        f"<authenticate xmlns='{SASL2}' mechanism='PLAIN'><initial-response>?</initial-response></authenticate>")
    fails(client, "incorrect-encoding")


@pytest.mark.parametrize("authzid", ["juliet@example.org", "romeo@example.net", "romeo@example.org/orchard", "@"])
def test_nobody_logs_in_as_somebody_else(client, authzid: str) -> None:
    """S25, XEP-0388 §4.4"""
    authenticates(client, "PLAIN", plain("romeo", authzid=authzid))
    fails(client, "invalid-authzid")


def test_the_login_must_be_that_of_the_stream_header(server) -> None:
    """XEP-0388 §2.3, §4.4"""
    client, _ = before_login(server, from_="juliet@example.org")
    authenticates(client, "PLAIN", plain("romeo", authzid="romeo@example.org"))
    fails(client, "invalid-authzid")
    authenticates(client, "PLAIN", plain("juliet"))
    succeeds(client)


def test_a_header_from_another_domain_is_refused(server) -> None:
    """XEP-0388 §2.1"""
    client, _ = before_login(server, from_="romeo@example.net")
    authenticates(client, "PLAIN", plain("romeo"))
    client.receives_stream_error("invalid-from")
    assert client.is_closed()


@pytest.mark.parametrize("other", [
    "<presence/>",
    "<iq type='get' id='1'><query xmlns='jabber:iq:auth'/></iq>",
    f"<authenticate xmlns='{SASL2}' mechanism='PLAIN'/>",
    f"<response xmlns='{SASL}'/>",
])  # fmt: skip
def test_nothing_else_is_said_during_an_exchange(client, other: str) -> None:
    """XEP-0388 §2.4"""
    authenticates(client, "PLAIN", None)
    client.receives(f"<challenge xmlns='{SASL2}'/>")
    client.sends(other)
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


@pytest.mark.parametrize("name", ["response", "abort"])
def test_an_answer_to_nothing_ends_the_stream(client, name: str) -> None:
    """XEP-0388 §2.4"""
    client.sends(f"<{name} xmlns='{SASL2}'/>")
    client.receives_stream_error("not-authorized")
    assert client.is_closed()


def test_a_client_may_give_up_and_begin_again(client) -> None:
    """XEP-0388 §4.5"""
    authenticates(client, "PLAIN", None)
    client.receives(f"<challenge xmlns='{SASL2}'/>")
    client.sends(f"<abort xmlns='{SASL2}'><text>Wherefore?</text></abort>")
    fails(client, "aborted")
    authenticates(client, "PLAIN", plain("romeo"))
    succeeds(client)


def test_there_is_one_login_per_stream(client) -> None:
    """XEP-0388 §4.8"""
    authenticates(client, "PLAIN", plain("romeo"))
    succeeds(client)
    authenticates(client, "PLAIN", plain("romeo"))
    client.receives_stream_error("unsupported-stanza-type")
    assert client.is_closed()


def test_guessing_ends_the_stream(client) -> None:
    """S30, RFC6120-6.4.5"""
    for _ in range(5):
        authenticates(client, "PLAIN", plain("romeo", "wrong"))
        fails(client, "not-authorized")
    client.receives_stream_error("policy-violation")
    assert client.is_closed()


@pytest.mark.config(limits={"logins_per_minute": 3})
def test_an_address_that_guesses_is_refused_for_a_while(server) -> None:
    """S30"""
    client, _ = before_login(server)
    for number, condition in enumerate(["not-authorized"] * 3 + ["temporary-auth-failure"]):
        authenticates(client, "PLAIN", plain(f"nobody{number}", "wrong"))
        fails(client, condition)


def test_an_unknown_name_fails_as_a_wrong_password_does(server) -> None:
    """S29: the salt of a name is the same each time, and the proof fails."""
    salts = []
    for _ in range(2):
        client, _ = before_login(server)
        scram = Scram("nobody", "secret", "SCRAM-SHA-256", {})
        authenticates(client, "SCRAM-SHA-256", scram.first())
        challenge = base64.b64decode(client.receives(f"<challenge xmlns='{SASL2}'>*</challenge>").text or "")
        salts.append(challenge.split(b",")[1])
        client.sends(f"<response xmlns='{SASL2}'>{base64_of(scram.final(challenge))}</response>")
        fails(client, "not-authorized")
    assert salts[0] == salts[1]


def test_a_channel_binding_that_the_list_hid_is_missed(client) -> None:
    """S26: a client that could bind, and was shown no -PLUS, talks through somebody else."""
    authenticates(client, "SCRAM-SHA-256", b"y,,n=romeo,r=abc")
    fails(client, "not-authorized")


def test_a_suspended_account_learns_it_behind_the_password(server, client) -> None:
    """RFC6120-6.5.2"""
    romeo = xmppd.JID("romeo", "example.org", "")
    server.server.accounts[romeo] = {**server.server.accounts[romeo], "disabled": True}
    authenticates(client, "PLAIN", plain("romeo"), BIND)
    fails(client, "account-disabled")


@pytest.mark.config(compat={"digest_md5": True})
def test_digest_md5_stays_where_its_clients_are(server) -> None:
    client, features = before_login(server)
    assert "DIGEST-MD5" not in [child.text for child in inside(features)]
    authenticates(client, "DIGEST-MD5", None)
    fails(client, "invalid-mechanism")


# -- downgrade protection (XEP-0474)


@pytest.mark.parametrize("profile", [SASL, SASL2])
@pytest.mark.config(compat={"digest_md5": True})
def test_the_proof_covers_the_offer(server, profile: str) -> None:
    """S27, XEP-0474 §6.1: only the list of the profile in use, without FAST's mechanisms."""
    client, features = before_login(server)
    offer = features.find(f"{{{SASL}}}mechanisms") if profile == SASL else inside(features)
    names = sorted(child.text for child in offer.findall(f"{{{profile}}}mechanism"))
    first = b"n,,n=romeo,r=abc"
    if profile == SASL:
        client.sends_auth("SCRAM-SHA-1", first)
    else:
        authenticates(client, "SCRAM-SHA-1", first)
    challenge = base64.b64decode(client.receives(f"<challenge xmlns='{profile}'>*</challenge>").text or "").decode()
    text = "\x1e".join(names) + "\x1f" + "tls-exporter"
    assert challenge.rpartition(",")[2] == "h=" + base64_of(hashlib.sha1(text.encode()).digest())


def test_the_example_of_xep_0474() -> None:
    """XEP-0474 §6.3"""
    bindings = {"tls-server-end-point": b"", "tls-exporter": b""}
    offered = ["SCRAM-SHA-1", "SCRAM-SHA-1-PLUS"]
    context = xmppd.LoginContext("example.org", True, bindings, lambda name: None, b"", offered=offered)
    scram = xmppd.start_mechanism("SCRAM-SHA-1-PLUS", context)
    challenge = scram.step(b"p=tls-exporter,,n=user,r=12C4CD5C-E38E-4A98-8F6D-15C38F51CCC6")
    assert isinstance(challenge, xmppd.Challenge)
    assert challenge.data.endswith(b",h=G6k/rBLDqgOhRRaCuuatSDFkJ08=")


# -- Bind 2 (XEP-0386)


def binds(server: AnyServer, more: str = BIND, agent: str = PHONE, name: str = "romeo") -> Client:
    """Log in and bind in one."""
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain(name), more, agent)
    succeeds(client, f"<bound xmlns='{BIND2}'>...</bound>")
    return client


@pytest.mark.wire
def test_a_login_binds_a_resource(server) -> None:
    """XEP-0386 §3.2, example 4; what is only for the way to a session is offered no more."""
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain("romeo"), BIND)
    success = succeeds(client, BOUND, features=False)
    names = {child.tag.rpartition("}")[2] for child in client.receives_features()}
    assert "ver" in names and not names & {"bind", "session", "compression", "authentication", "mechanisms"}
    assert re.fullmatch(r"romeo@example\.org/Dino/[\w-]{12}", client.jid)
    assert PHONE not in ET.tostring(success, encoding="unicode")
    client.comes_online()


def test_the_resource_of_a_client_stays_the_same(server) -> None:
    """XEP-0386 §3.2.1: with the same tag and id; another client has another."""
    names = []
    for agent in (PHONE, TABLET, PHONE):
        romeo = binds(server, agent=agent)
        names.append(romeo.jid)
        romeo.closes()
    assert names[0] == names[2] != names[1]


def test_without_an_id_each_session_is_another(server) -> None:
    """XEP-0386 §3.2.1"""
    one, other = binds(server, agent=""), binds(server, agent="")
    assert one.jid != other.jid
    one.receives_nothing()


def test_an_id_that_is_none_is_ignored(server) -> None:
    """XEP-0388 §2.3: it must be a UUID."""
    assert binds(server, agent="me").jid != binds(server, agent="me").jid


@pytest.mark.parametrize("tag", ["Dino", "Gajim"])
def test_a_client_that_comes_back_ends_its_earlier_session(server, tag: str) -> None:
    """XEP-0386 §3.2: whatever it calls itself now."""
    before = binds(server)
    after = binds(server, f"<bind xmlns='{BIND2}'><tag>{tag}</tag></bind>")
    before.receives_stream_error("conflict")
    assert before.is_closed()
    after.comes_online()


@pytest.mark.parametrize("tag", ["x" * 1100, "a\x7fb"])
def test_a_tag_that_cannot_be_is_left_out(server, tag: str) -> None:
    """XEP-0386 §3.2.1: "subject to the necessary validation"."""
    assert re.fullmatch(r"romeo@example\.org/[\w-]{12}", binds(server, f"<bind xmlns='{BIND2}'><tag>{tag}</tag></bind>").jid)


@pytest.mark.config(limits={"resources": 1})
def test_where_there_is_no_room_the_login_succeeds_and_binding_says_why(server, romeo) -> None:
    """XEP-0388 §2.6.1: then the identity is the bare JID."""
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain("romeo"), BIND)
    client.receives(
        f"<success xmlns='{SASL2}'><authorization-identifier>romeo@example.org</authorization-identifier></success>")
    client.receives_features()
    client.sends("<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>")
    client.receives("<iq type='error' id='b' from='example.org'><error type='wait'><resource-constraint .../></error></iq>")
    romeo.passes_barrier()


def test_carbons_are_on_from_the_first_moment(server, juliet) -> None:
    """XEP-0386 §3.2"""
    romeo = binds(server, f"<bind xmlns='{BIND2}'><enable xmlns='urn:xmpp:carbons:2'/></bind>")
    other = binds(server, agent=TABLET)
    other.sends("<message to='juliet@example.org/balcony' type='chat'><body>O</body></message>")
    juliet.receives(f"<message from='{other.jid}' type='chat'><body>O</body></message>")
    romeo.receives("<message from='romeo@example.org' type='chat'><sent xmlns='urn:xmpp:carbons:2'>...</sent></message>")


def test_the_archives_ends_are_told(server, juliet) -> None:
    """XEP-0386 §3.2, example 4: so that a client knows what to fetch."""
    juliet.sends("<message to='romeo@example.org' type='chat'><body>Wilt thou?</body></message>")
    juliet.passes_barrier()
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain("romeo"), BIND)
    end = "<metadata xmlns='urn:xmpp:mam:2'><start id='*' timestamp='*'/><end id='*' timestamp='*'/></metadata>"
    succeeds(client, f"<bound xmlns='{BIND2}'>{end}</bound>")


@pytest.mark.config(archive={"enabled": False})
def test_without_an_archive_nothing_is_told_of_it(server) -> None:
    """XEP-0386 §3.2"""
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain("romeo"), BIND)
    succeeds(client, f"<bound xmlns='{BIND2}'/>")


def test_a_session_may_begin_inactive(server) -> None:
    """XEP-0386 §3.2: presence waits from the first moment, until somebody looks."""
    more = f"<inactive xmlns='urn:xmpp:csi:0'/><enable xmlns='{SM}'/>"
    romeo = binds(server, f"<bind xmlns='{BIND2}'>{more}</bind>")
    romeo.sends("<presence/><active xmlns='urn:xmpp:csi:0'/><iq type='get' id='p'><ping xmlns='urn:xmpp:ping'/></iq>")
    session = server.server.session(xmppd.JID.parse(romeo.jid))
    romeo.receives(f"<presence from='{romeo.jid}'/>", "<iq type='result' id='p'/>")
    assert session.idle is None
    romeo = binds(server, f"<bind xmlns='{BIND2}'>{more}</bind>", agent=TABLET)
    assert server.server.session(xmppd.JID.parse(romeo.jid)).idle is not None


def test_unknown_wishes_are_ignored(server) -> None:
    """XEP-0386 §3.2, XEP-0388 §2.3"""
    client, _ = before_login(server)
    wish = f"<bind xmlns='{BIND2}'><enable xmlns='urn:example:x'/></bind><enable xmlns='urn:example:y'/>"
    authenticates(client, "PLAIN", plain("romeo"), wish)
    succeeds(client, BOUND)


def test_offline_messages_are_not_lost(server, juliet) -> None:
    """XEP-0386 §3.2: only what is surely in an archive may be cleared."""
    juliet.sends("<message to='romeo@example.org' type='chat'><body>Wilt thou?</body></message>")
    juliet.passes_barrier()
    romeo = binds(server)
    romeo.sends("<presence/>")
    romeo.receives_in_any_order(
        f"<presence from='{romeo.jid}'/>",
        "<message from='juliet@example.org/balcony' to='romeo@example.org' type='chat'><body>Wilt thou?</body>"
        "<delay .../></message>")


# -- stream management inline (XEP-0198 §9)


def manages(server: AnyServer, agent: str = PHONE) -> tuple[Client, str]:
    """Log in with stream management; return the client and its SM-ID."""
    client, _ = before_login(server)
    wish = f"<bind xmlns='{BIND2}'><tag>Dino</tag><enable xmlns='{SM}' resume='true'/></bind>"
    authenticates(client, "PLAIN", plain("romeo"), wish, agent)
    bound = f"<bound xmlns='{BIND2}'>{METADATA}<enabled xmlns='{SM}' id='*' resume='true' max='3600'/></bound>"
    success = succeeds(client, bound, features=False)
    assert client.receives_features().find(f"{{{SM}}}sm") is None  # a second <enable/> would end the stream
    return client, success.find(f"{{{BIND2}}}bound/{{{SM}}}enabled").get("id")


@pytest.mark.wire
def test_a_login_resumes_a_session(server, juliet) -> None:
    """XEP-0198 §9.2, XEP-0386 §3.2: what was missed comes behind the success, without features; nothing is bound."""
    romeo, id = manages(server)
    romeo.comes_online()
    romeo.sends(f"<r xmlns='{SM}'/>")
    romeo.receives(f"<a xmlns='{SM}' h='*'/>")
    jid = romeo.jid
    romeo.disconnects()
    juliet.sends("<message to='romeo@example.org' type='chat'><body>Wilt thou?</body></message>")
    juliet.passes_barrier()
    romeo, _ = before_login(server)
    more = f"<resume xmlns='{SM}' previd='{id}' h='3'/>{BIND}"
    authenticates(romeo, "PLAIN", plain("romeo"), more, PHONE)
    succeeds(romeo, f"<resumed xmlns='{SM}' previd='{id}' h='3'/>", features=False)
    assert romeo.jid == jid
    message = romeo.receives("<message ...>...</message>")
    assert message.findtext("{jabber:client}body") == "Wilt thou?"


def test_a_session_that_is_gone_is_bound_anew(server) -> None:
    """XEP-0198 §9.2.1: the failure stands beside the new session, with its own stream management."""
    client, _ = before_login(server)
    more = (f"<resume xmlns='{SM}' previd='gone' h='0'/>"
            f"<bind xmlns='{BIND2}'><enable xmlns='{SM}'/></bind>")  # fmt: skip
    authenticates(client, "PLAIN", plain("romeo"), more)
    succeeds(client, f"<failed xmlns='{SM}'><item-not-found .../></failed>",
             f"<bound xmlns='{BIND2}'>{METADATA}<enabled xmlns='{SM}'/></bound>")  # fmt: skip


def test_nobody_resumes_the_session_of_somebody_else(server) -> None:
    """S34"""
    _, id = manages(server)
    thief, _ = before_login(server)
    authenticates(thief, "PLAIN", plain("juliet"), f"<resume xmlns='{SM}' previd='{id}' h='0'/>")
    succeeds(thief, f"<failed xmlns='{SM}'><item-not-found .../></failed>")


def test_a_new_session_ends_the_one_that_its_client_left_behind(server, juliet) -> None:
    """XEP-0386 §3.2: also one that waits to be resumed, and what it had not got is offered again."""
    romeo, _ = manages(server)
    romeo.comes_online()
    before = romeo.jid
    romeo.disconnects()
    juliet.sends("<message to='romeo@example.org' type='chat'><body>Wilt thou?</body></message>")
    juliet.passes_barrier()
    romeo = binds(server, f"<bind xmlns='{BIND2}'><tag>Gajim</tag></bind>")
    assert server.server.session(xmppd.JID.parse(before)) is None
    romeo.sends("<presence/>")
    romeo.receives(f"<presence from='{romeo.jid}'/>")
    assert romeo.receives("<message ...>...</message>").findtext("{jabber:client}body") == "Wilt thou?"


def test_no_session_without_the_password(server) -> None:
    """S34, XEP-0388 §2.6.2"""
    romeo, id = manages(server)
    romeo.disconnects()
    thief, _ = before_login(server)
    authenticates(thief, "PLAIN", plain("romeo", "wrong"), f"<resume xmlns='{SM}' previd='{id}' h='0'/>")
    fails(thief, "not-authorized")


@pytest.mark.unread
def test_a_new_password_ends_the_sessions_that_wait(server) -> None:
    """S33"""
    romeo, id = manages(server)
    romeo.disconnects()
    owner = xmppd.JID("romeo", "example.org", "")
    server.server.set_credentials(owner, xmppd.make_credentials("another-secret"))
    romeo, _ = before_login(server)
    authenticates(romeo, "PLAIN", plain("romeo", "another-secret"), f"<resume xmlns='{SM}' previd='{id}' h='0'/>")
    succeeds(romeo, f"<failed xmlns='{SM}' ...><item-not-found .../></failed>")


# -- tokens (XEP-0484)


@pytest.mark.wire
@pytest.mark.parametrize("mechanism", [NONE, "HT-SHA-256-ENDP"])
def test_a_token_stands_in_for_the_password(server, mechanism: str) -> None:
    """XEP-0484 §3.3, §3.4: in one round trip, and the server proves that it knows the token too."""
    token = gets_token(server, mechanism=mechanism)
    assert len(token) >= 22  # 128 bits
    client, _ = before_login(server, from_="romeo@example.org")
    binding = client.wire.bindings()["tls-server-end-point"] if mechanism.endswith("ENDP") else b""
    authenticates(client, mechanism, hashed("romeo", token, binding=binding), f"<fast xmlns='{FAST}'/>{BIND}")
    answer = succeeds(client, DATA, BOUND).findtext(f"{{{SASL2}}}additional-data")
    assert base64.b64decode(answer or "") == hashed("romeo", token, b"Responder", binding)
    client.comes_online()


def test_a_token_lasts_three_weeks(server) -> None:
    """XEP-0484 §3.3"""
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain("romeo"), f"<request-token xmlns='{FAST}' mechanism='{NONE}'/>")
    expiry = xmppd.parse_stamp(succeeds(client, TOKEN).find(f"{{{FAST}}}token").get("expiry")).timestamp()
    assert abs(expiry - time.time() - 21 * 86400) < 60


@pytest.mark.parametrize(("wish", "agent"), [
    (f"<request-token xmlns='{FAST}' mechanism='SCRAM-SHA-256'/>", PHONE),
    (f"<request-token xmlns='{FAST}' mechanism='HT-SHA-256-UNIQ'/>", PHONE),  # not of this connection
    (f"<request-token xmlns='{FAST}'/>", PHONE),
    (f"<request-token xmlns='{FAST}' mechanism='{NONE}'/>", ""),
])  # fmt: skip
def test_no_token_for_what_was_not_offered_or_nobody_in_particular(server, wish: str, agent: str) -> None:
    """XEP-0484 §3.2, §4.1"""
    client, _ = before_login(server)
    authenticates(client, "PLAIN", plain("romeo"), wish, agent)
    succeeds(client)


def test_no_token_without_a_login(client) -> None:
    """XEP-0484 §3.3, XEP-0388 §2.6.2"""
    authenticates(client, "PLAIN", plain("romeo", "wrong"), f"<request-token xmlns='{FAST}' mechanism='{NONE}'/>")
    fails(client, "not-authorized")


def test_a_token_is_for_one_mechanism_one_client_and_one_account(server) -> None:
    """XEP-0484 §3.4: no mechanism without channel binding for a token of one with it."""
    token = gets_token(server, mechanism="HT-SHA-256-EXPR")
    is_refused(server, token)
    is_refused(server, token, mechanism="HT-SHA-256-EXPR")  # not bound to this channel
    is_refused(server, token, mechanism="HT-SHA-256-EXPR", binding=b"in memory", agent=TABLET)
    is_refused(server, token, "malformed-request", mechanism="HT-SHA-256-EXPR", agent="")
    is_refused(server, token, "invalid-mechanism", mechanism="SCRAM-SHA-1")
    is_good(server, token, mechanism="HT-SHA-256-EXPR", binding=b"in memory")
    of_juliet = gets_token(server, "juliet")
    is_refused(server, of_juliet)


@pytest.mark.parametrize("message", [b"", b"romeo", b"romeo\0", b"\0proof", b"\xff\0proof", b"nobody\0" + bytes(32)])
def test_a_wrong_proof_is_refused(server, message: bytes) -> None:
    """S29: nobody's name and a wrong token fail alike."""
    client, _ = before_login(server)
    authenticates(client, NONE, message, f"<fast xmlns='{FAST}'/>")
    fails(client, "malformed-request" if message.startswith(b"\xff") else "not-authorized")


def slots_of(server: MemoryServer) -> dict[str, Any]:
    """Return what is kept of romeo's tokens, by client."""
    return dict(server.server.storage.documents("fast").items(xmppd.JID("romeo", "example.org", "")))


def age(server: MemoryServer, seconds: float) -> None:
    """Let romeo's tokens be older."""
    fast, romeo = server.server.storage.documents("fast"), xmppd.JID("romeo", "example.org", "")
    for client, slots in slots_of(server).items():
        older = {name: {**slot, "issued": slot["issued"] - int(seconds)} for name, slot in slots.items()}
        fast.put(romeo, client, older)


def test_an_expired_token_asks_for_the_password(server) -> None:
    """XEP-0484 §4.2: only who had the token learns that it was one."""
    token = gets_token(server)
    age(server, 22 * 86400)
    is_refused(server, token, "credentials-expired")
    is_refused(server, "another")


def test_a_token_older_than_a_day_is_replaced_when_the_new_one_is_used(server) -> None:
    """XEP-0484 §3.5, §5.1: until then the old one is good, for the new one may have been lost on its way."""
    old = gets_token(server)
    is_good(server, old)
    age(server, 2 * 86400)
    lost = is_good(server, old, TOKEN).find(f"{{{FAST}}}token").get("token")
    new = is_good(server, old, TOKEN).find(f"{{{FAST}}}token").get("token")
    is_refused(server, lost)  # never used, and replaced
    is_good(server, new)
    is_refused(server, old)
    is_good(server, new)


@pytest.mark.parametrize("yes", ["1", "true"])
def test_a_client_may_throw_its_token_away(server, yes: str) -> None:
    """XEP-0484 §3.6: that login succeeds, and brings no new token though one is due."""
    token, other = gets_token(server), gets_token(server, agent=TABLET)
    age(server, 2 * 86400)
    is_good(server, token, fast=f" invalidate='{yes}'")
    is_refused(server, token)
    is_good(server, other, TOKEN, agent=TABLET)


def test_a_client_may_change_its_token(server) -> None:
    """XEP-0484 §3.6"""
    token = gets_token(server)
    more = f"<request-token xmlns='{FAST}' mechanism='{NONE}'/>"
    new = is_good(server, token, TOKEN, fast=" invalidate='true'", more=more).find(f"{{{FAST}}}token").get("token")
    is_refused(server, token)
    is_good(server, new)


def test_a_count_must_grow(server) -> None:
    """XEP-0484 §3.4: what was said once is worth nothing the second time."""
    token = gets_token(server)
    is_good(server, token, fast=" count='1'")
    for count in (" count='1'", " count='0'", " count='-2'", " count='x'", ""):
        is_refused(server, token, fast=count)
    is_good(server, token, fast=" count='7'")


@pytest.mark.config(limits={"tokens": 2})
def test_an_account_has_so_many_tokens(server) -> None:
    """The client that has been away for the longest time needs its password again."""
    agents = [f"{number:08}-4d72-4749-b3d3-740edbf87770" for number in range(3)]
    tokens = []
    for agent in agents:
        age(server, 60)
        tokens.append(gets_token(server, agent=agent))
    is_refused(server, tokens[0], agent=agents[0])
    is_good(server, tokens[1], agent=agents[1])
    is_good(server, tokens[2], agent=agents[2])
    assert len(slots_of(server)) == 2


def test_a_new_password_ends_all_tokens(server, romeo) -> None:
    """S33"""
    token = gets_token(server)
    romeo.sends("<iq type='set' id='p' to='example.org'><query xmlns='jabber:iq:register'>"
                "<username>romeo</username><password>another-secret</password></query></iq>")  # fmt: skip
    romeo.receives("<iq type='result' id='p'/>")
    is_refused(server, token)


def test_who_removes_an_account_and_makes_it_anew_has_no_tokens(server) -> None:
    """S33"""
    token, romeo = gets_token(server), xmppd.JID("romeo", "example.org", "")
    server.server.remove_account(romeo)
    is_refused(server, token)
    server.add_account("romeo@example.org")
    is_refused(server, token)


def test_tokens_can_be_revoked(server) -> None:
    """S33: for one client, or all."""
    token, other = gets_token(server), gets_token(server, agent=TABLET)
    fast, romeo = server.server.registry.feature(xmppd.FastLogin), xmppd.JID("romeo", "example.org", "")
    fast.revoke(romeo, next(iter(slots_of(server))))
    is_refused(server, token)
    is_good(server, other, agent=TABLET)
    fast.revoke(romeo)
    is_refused(server, other, agent=TABLET)


def test_no_token_for_the_suspended(server) -> None:
    """RFC6120-6.5.2"""
    token, romeo = gets_token(server), xmppd.JID("romeo", "example.org", "")
    server.server.accounts[romeo] = {**server.server.accounts[romeo], "disabled": True}
    is_refused(server, token, "account-disabled")


def test_what_is_on_disk_is_no_token(server) -> None:
    """S32: it takes the server's own secret too."""
    token = gets_token(server)
    assert token not in repr(slots_of(server))
    assert PHONE not in repr(slots_of(server))


def test_tokens_survive_a_restart(process_server) -> None:
    """XEP-0484 §4.2: and nothing was said before it was on disk."""
    token = gets_token(process_server)
    process_server.kill()
    process_server.start()
    is_good(process_server, token)


def test_traces_hide_what_logs_in(server, client) -> None:
    """S86"""
    lines: list[str] = []
    server.server.trace = xmppd.Trace(lines.append, colour=False)
    authenticates(client, "PLAIN", plain("romeo"), f"<request-token xmlns='{FAST}' mechanism='{NONE}'/>")
    token = succeeds(client, TOKEN).find(f"{{{FAST}}}token").get("token")
    text = "\n".join(lines)
    assert "<authenticate" in text and "<token" in text
    assert token not in text and base64_of(plain("romeo")) not in text
