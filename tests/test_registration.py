"""In-band registration (XEP-0077): a new account, another password, no account any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import Client, StreamReader
from tests.servers import MemoryServer, ProcessServer

REGISTER = "jabber:iq:register"
OPEN = pytest.mark.config(registration={"open": True})
UNAVAILABLE = "<error type='cancel' code='503'><service-unavailable .../></error>"
NOT_ACCEPTABLE = "<error type='modify' code='406'><not-acceptable .../></error>"
BAD_REQUEST = "<error type='modify' code='400'><bad-request .../></error>"
CONFLICT = "<error type='cancel' code='409'><conflict .../></error>"
NOT_ALLOWED = "<error type='cancel' code='405'><not-allowed .../></error>"
UNEXPECTED = "<error type='wait' code='400'><unexpected-request .../></error>"
REQUIRED = "<error type='auth' code='407'><registration-required .../></error>"
FIELDS = f"<iq type='get' id='reg1' to='example.org'><query xmlns='{REGISTER}'/></iq>"
REMOVE = f"<iq type='set' id='unreg1'><query xmlns='{REGISTER}'><remove/></query></iq>"


def stranger(server: MemoryServer | ProcessServer) -> Client:
    """Somebody without an account, inside TLS."""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    return client


def account(name: str | None, password: str | None, identifier: str = "reg2", more: str = "") -> str:
    """A request to register, or to change a password; None leaves the element out."""
    username = "" if name is None else f"<username>{name}</username>"
    secret = "" if password is None else f"<password>{password}</password>"
    return f"<iq type='set' id='{identifier}'><query xmlns='{REGISTER}'>{username}{secret}{more}</query></iq>"


# ---- closed, as it comes ------------------------------------------------------------------


@pytest.mark.parametrize("request_", [FIELDS, account("bill", "Calliope")])
def test_registration_is_closed_by_default(server: MemoryServer, request_: str) -> None:
    """XEP-0077 §3.1"""
    bill = stranger(server)
    bill.sends(request_)
    bill.receives(f"<iq type='error' id='*'>{UNAVAILABLE}</iq>")
    assert xmppd.JID.parse("bill@example.org") not in server.server.accounts
    bill.disconnects()


@pytest.mark.parametrize("is_open", [pytest.param(False, id="closed"), pytest.param(True, id="open", marks=OPEN)])
def test_the_stream_says_whether_it_is_open(server: MemoryServer, is_open: bool) -> None:
    """XEP-0077 §8, S21: and only inside TLS"""
    bill = server.client().connect()
    assert bill.negotiates().find("{http://jabber.org/features/iq-register}register") is None
    bill.starts_tls()
    assert (bill.negotiates().find("{http://jabber.org/features/iq-register}register") is not None) == is_open
    bill.disconnects()


@OPEN
@pytest.mark.parametrize("request_", [FIELDS, account("bill", "Calliope")])
def test_nobody_registers_without_tls(server: MemoryServer, request_: str) -> None:
    """XEP-0077 §11, S21: the password would be there for all to read"""
    bill = server.client().connect()
    bill.negotiates()
    bill.sends(request_)
    bill.receives(f"<iq type='error' id='*'>{UNAVAILABLE}</iq>")
    assert xmppd.JID.parse("bill@example.org") not in server.server.accounts
    bill.disconnects()


# ---- opened ------------------------------------------------------------------------------


@OPEN
@pytest.mark.wire
def test_somebody_registers_and_logs_in(server: ProcessServer) -> None:
    """XEP-0077 §3.1, examples 1 to 5; on the same stream"""
    bill = stranger(server)
    bill.sends(FIELDS)
    bill.receives(
        f"<iq type='result' id='reg1' ...><query xmlns='{REGISTER}'>"
        "<instructions>*</instructions><username/><password/></query></iq>"
    )
    bill.sends(account("bill", "Calliope"))
    bill.receives("<iq type='result' id='reg2' .../>")
    bill.authenticates("bill", "Calliope")
    bill.negotiates()
    assert bill.binds("globe") == "bill@example.org/globe"
    bill.sends(REMOVE)  # the server process is shared
    bill.receives("<iq type='result' id='unreg1'/>")
    bill.receives_stream_error("not-authorized")
    assert bill.is_closed()


@OPEN
@pytest.mark.parametrize(
    ("name", "password", "error"),
    [
        ("juliet", "Calliope", CONFLICT),
        ("JULIET", "Calliope", CONFLICT),
        ("ｊuliet", "Calliope", CONFLICT),
        (None, "Calliope", NOT_ACCEPTABLE),
        ("", "Calliope", NOT_ACCEPTABLE),
        ("bill", None, NOT_ACCEPTABLE),
        ("bill", "", NOT_ACCEPTABLE),
        (None, None, NOT_ACCEPTABLE),
        ("bill@example.org", "Calliope", NOT_ACCEPTABLE),
        ("bill/globe", "Calliope", NOT_ACCEPTABLE),
        ("bi ll", "Calliope", NOT_ACCEPTABLE),
        (" bill", "Calliope", NOT_ACCEPTABLE),
        ("b\u2028ill", "Calliope", NOT_ACCEPTABLE),
        ("\u2654", "Calliope", NOT_ACCEPTABLE),
        ("\u202ebill", "Calliope", NOT_ACCEPTABLE),
        ("b" * 1024, "Calliope", NOT_ACCEPTABLE),
        ("bill", "\u2028", NOT_ACCEPTABLE),
    ],
)
def test_what_cannot_be_registered(server: MemoryServer, name: str | None, password: str | None, error: str) -> None:
    """XEP-0077 §3.1, examples 6 and 7; S49"""
    bill = stranger(server)
    bill.sends(account(name, password))
    answer = bill.receives(f"<iq type='error' id='reg2'>{error}</iq>")
    assert "Calliope" not in "".join(answer.itertext())
    assert sorted(map(str, server.server.accounts.owners("example.org"))) == [
        "benvolio@example.org", "juliet@example.org", "nurse@example.org", "romeo@example.org"]  # fmt: skip
    bill.disconnects()


@pytest.mark.config(registration={"open": True}, admins=["friar@example.org"])
def test_an_administrators_name_is_not_for_the_first_who_comes(server: MemoryServer) -> None:
    """S53: who registers it would be an administrator"""
    paris = stranger(server)
    paris.sends(account("friar", "Calliope"))
    paris.receives(f"<iq type='error' id='reg2'>{CONFLICT}</iq>")
    paris.disconnects()


@OPEN
def test_a_password_is_taken_as_it_is(server: MemoryServer) -> None:
    """XEP-0077 §3.1: white space belongs to it"""
    bill = stranger(server)
    bill.sends(account("bill", "  my\u00a0secret &lt;é "))
    bill.receives("<iq type='result' id='reg2' .../>")
    bill.authenticates("bill", "  my secret <é ", "PLAIN")
    bill.disconnects()


@OPEN
def test_a_name_is_free_once_only(server: MemoryServer) -> None:
    """XEP-0077 §3.1: also when two ask in the same moment; S84-like races"""
    first, second = stranger(server), stranger(server)
    for client in (first, second):
        client.sends_raw(account("bill", "Calliope"))
    answers = [client.receives("<iq id='reg2' ...>...</iq>").get("type") for client in (first, second)]
    assert sorted(map(str, answers)) == ["error", "result"]
    for client in (first, second):
        client.disconnects()


@OPEN
def test_a_stream_registers_one_account(server: MemoryServer) -> None:
    """XEP-0077 §3.1.1"""
    bill = stranger(server)
    bill.sends(account("bill", "Calliope"))
    bill.receives("<iq type='result' id='reg2' .../>")
    for request in (account("ben", "Calliope"), FIELDS):
        bill.sends(request)
        bill.receives(f"<iq type='error' id='*'>{NOT_ACCEPTABLE}</iq>")
    bill.sends("<message to='juliet@example.org'><body>O</body></message>")
    bill.receives_stream_error("not-authorized")
    assert bill.is_closed()


@OPEN
def test_an_address_registers_a_few_accounts_a_minute(server: MemoryServer) -> None:
    """XEP-0077 §3.1.1, S30, S85: whether its attempts succeed or not"""
    registration, clock = server.server.registry.feature(xmppd.Registration), [0.0]
    per_minute = registration.ATTEMPTS_PER_MINUTE
    registration.guard = xmppd.LoginGuard(per_minute, lambda: clock[0])
    for number in range(per_minute + 1):
        bill = stranger(server)
        bill.sends(account(f"bill{number}" if number % 2 else "juliet", "Calliope"))
        expected = NOT_ACCEPTABLE if number == per_minute else CONFLICT
        bill.receives("<iq type='result' id='reg2' .../>" if number % 2 and number < per_minute
                      else f"<iq type='error' id='reg2'>{expected}</iq>")  # fmt: skip
        bill.disconnects()
    clock[0] += 60.0
    bill = stranger(server)
    bill.sends(account("later", "Calliope"))
    bill.receives("<iq type='result' id='reg2' .../>")
    bill.disconnects()


@OPEN
@pytest.mark.parametrize(
    "payload",
    [
        "<query xmlns='jabber:iq:register'/>",
        "<query xmlns='jabber:iq:register'><x xmlns='jabber:x:data' type='submit'>"
        "<field var='username'><value>bill</value></field></x></query>",
        "<query xmlns='jabber:iq:register'><username><b>bill</b></username><password>Calliope</password></query>",
    ],
)
def test_a_form_that_was_not_offered_registers_nobody(server: MemoryServer, payload: str) -> None:
    """S85, XEP-0077 §4: there is one way in"""
    bill = stranger(server)
    bill.sends(f"<iq type='set' id='reg2'>{payload}</iq>")
    bill.receives(f"<iq type='error' id='reg2'>{NOT_ACCEPTABLE}</iq>")
    bill.disconnects()


@pytest.mark.parametrize("is_open", [pytest.param(False, id="closed"), pytest.param(True, id="open", marks=OPEN)])
def test_nobody_removes_an_account_without_one(server: MemoryServer, is_open: bool) -> None:
    """XEP-0077 §3.2, table 1: `unexpected-request`"""
    bill = stranger(server)
    bill.sends(REMOVE)
    bill.receives(f"<iq type='error' id='unreg1'>{UNEXPECTED}</iq>")
    bill.disconnects()


# ---- another password (§3.3) --------------------------------------------------------------


@pytest.mark.parametrize("to", ["", " to='example.org'", " to='romeo@example.org'"])
def test_who_is_registered_is_told_so(romeo: Client, to: str) -> None:
    """XEP-0077 §3.1, example 3: without the password"""
    romeo.sends(f"<iq type='get' id='r'{to}><query xmlns='{REGISTER}'/></iq>")
    romeo.receives(
        f"<iq type='result' id='r'><query xmlns='{REGISTER}'><registered/><instructions>*</instructions>"
        "<username>romeo</username><password/></query></iq>"
    )


@pytest.mark.wire
def test_a_password_is_changed(server: ProcessServer, romeo: Client) -> None:
    """XEP-0077 §3.3, examples 18 and 19; S33: all other sessions end, for who had the old one may be a thief"""
    other = server.client().login("romeo", resource="elsewhere")
    romeo.sends(account("romeo", "new secret", "change1"))
    romeo.receives("<iq type='result' id='change1'/>")
    other.receives_stream_error("reset")
    assert other.is_closed()
    romeo.receives_nothing()
    for mechanism in ("PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256"):
        again = server.client().login("romeo", password="new secret", mechanism=mechanism)
        again.closes()
    thief = stranger(server)
    thief.sends_auth("PLAIN", b"\0romeo\0romeo-secret")
    thief.receives_failure("not-authorized")
    thief.disconnects()


@pytest.mark.parametrize("stage", ["authenticated", "restarted", "half a SCRAM exchange"])
@pytest.mark.parametrize("end", ["reset", "not-authorized"])
def test_a_login_with_the_old_password_is_not_finished_later(
    server: MemoryServer, romeo: Client, stage: str, end: str
) -> None:
    """S33: whoever is about to come in with it when it is changed, or the account removed"""
    thief = stranger(server)
    if stage == "half a SCRAM exchange":
        thief.sends_auth("SCRAM-SHA-256", b"n,,n=romeo,r=abc")
        thief.receives_challenge()
    else:
        thief.authenticates("romeo", "romeo-secret")
        if stage == "restarted":
            thief.negotiates()
    innocent = stranger(server)
    innocent.sends_auth("SCRAM-SHA-256", b"n,,n=juliet,r=abc")
    innocent.receives_challenge()
    romeo.sends(account("romeo", "new secret", "unreg1") if end == "reset" else REMOVE)
    romeo.receives("<iq type='result' id='unreg1'/>")
    if stage == "authenticated":
        thief._reader = StreamReader()  # a new stream, which begins with its end
    thief.receives_stream_error(end)
    assert thief.is_closed()
    if end == "not-authorized":
        romeo.receives_stream_error(end)
        assert romeo.is_closed()
    innocent.sends("<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
    innocent.receives_failure("aborted")
    innocent.disconnects()


@pytest.mark.parametrize(
    ("name", "password", "error"),
    [
        ("romeo", "", BAD_REQUEST),
        ("romeo", None, BAD_REQUEST),
        (None, "new secret", BAD_REQUEST),
        ("", "new secret", BAD_REQUEST),
        (None, None, BAD_REQUEST),
        ("juliet", "new secret", NOT_ALLOWED),
        ("nobody", "new secret", NOT_ALLOWED),
        ("romeo@example.net", "new secret", NOT_ALLOWED),
        ("@", "new secret", NOT_ALLOWED),
        ("romeo", "\u2028", NOT_ACCEPTABLE),
    ],
)
def test_what_is_no_change_of_password(
    server: MemoryServer, romeo: Client, name: str | None, password: str | None, error: str
) -> None:
    """XEP-0077 §3.3, table 2: the old one stays, above all where the new one is empty; nothing is echoed"""
    romeo.sends(account(name, password, "change1"))
    answer = romeo.receives(f"<iq type='error' id='change1'>{error}</iq>")
    assert answer.find(f"{{{REGISTER}}}query") is None
    for who in ("romeo", "juliet"):
        server.client().login(who).closes()


def test_one_does_not_change_the_password_of_others(server: MemoryServer, romeo: Client) -> None:
    """XEP-0077 §3.3: at their address there is nobody to ask"""
    romeo.sends(account("juliet", "new secret", "c").replace("id=", "to='juliet@example.org' id="))
    romeo.receives(f"<iq type='error' id='c'>{UNAVAILABLE}</iq>")
    server.client().login("juliet").closes()


@pytest.mark.parametrize("payload", ["<remove/>", "<username>paris</username><password>new secret</password>"])
def test_the_other_domain_of_the_house_is_not_ones_own(server: MemoryServer, payload: str) -> None:
    """XEP-0077 §3.2, table 1: `registration-required`; the account at home must not go for it"""
    server.add_account("paris@example.net")
    paris = server.client(host="example.net").login("paris")
    paris.sends(f"<iq type='set' id='u' to='example.org'><query xmlns='{REGISTER}'>{payload}</query></iq>")
    paris.receives(f"<iq type='error' id='u'>{REQUIRED}</iq>")
    paris.sends(f"<iq type='get' id='g' to='example.org'><query xmlns='{REGISTER}'/></iq>")
    paris.receives(f"<iq type='error' id='g'>{UNAVAILABLE}</iq>")
    server.client(host="example.net").login("paris").closes()


# ---- removal (§3.2) -----------------------------------------------------------------------


@pytest.mark.parametrize("to", ["", " to='example.org'", " to='romeo@example.org'"])
def test_an_account_is_removed(server: MemoryServer, romeo: Client, to: str) -> None:
    """XEP-0077 §3.2, examples 11 and 12: the answer, the end of all sessions, and no way back"""
    other = server.client().login("romeo", resource="elsewhere")
    romeo.sends(REMOVE.replace(" id=", f"{to} id="))
    romeo.receives("<iq type='result' id='unreg1'/>")
    for client in (romeo, other):
        client.receives_stream_error("not-authorized")
        assert client.is_closed()
    again = stranger(server)
    again.sends_auth("PLAIN", b"\0romeo\0romeo-secret")
    again.receives_failure("not-authorized")
    again.disconnects()


@pytest.mark.parametrize(
    "payload", ["<remove/><username>romeo</username>", "<remove/><remove/>", "<password>x</password><remove/>"]
)
def test_remove_stands_alone(server: MemoryServer, romeo: Client, payload: str) -> None:
    """XEP-0077 §3.2, table 1, example 13"""
    romeo.sends(f"<iq type='set' id='unreg1'><query xmlns='{REGISTER}'>{payload}</query></iq>")
    romeo.receives(f"<iq type='error' id='unreg1'>{BAD_REQUEST}</iq>")
    server.client().login("romeo").closes()


@pytest.mark.parametrize("to", ["juliet@example.org", "juliet@example.org/balcony", "nobody@example.org"])
def test_nobody_removes_others(server: MemoryServer, romeo: Client, to: str) -> None:
    """XEP-0077 §3.2"""
    romeo.sends(REMOVE.replace(" id=", f" to='{to}' id="))
    romeo.receives(f"<iq type='error' id='unreg1'>{UNAVAILABLE}</iq>")
    server.client().login("juliet").closes()
    server.client().login("romeo").closes()


def files_about(folder: Path, name: str) -> list[str]:
    """What is left of somebody on disk: files called so, and files that mention the name."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.stem == name or (path.suffix != ".lock" and name.encode() in path.read_bytes())):
            found.append(str(path.relative_to(folder)))
    return found


def test_nothing_of_a_removed_account_stays_on_disk(server: MemoryServer, tmp_path: Path) -> None:
    """XEP-0077 §3.2, S33: account, roster, requests, private storage, messages that wait, the last goodbye"""
    server.add_account("mercutio@example.org")
    romeo = server.client().login("romeo", resource="orchard")
    mercutio = server.client().login("mercutio", resource="street")
    romeo.befriends(mercutio)
    mercutio.sends("<iq type='set' id='p'><query xmlns='jabber:iq:private'><x xmlns='urn:x'/></query></iq>")
    mercutio.receives("<iq type='result' id='p'/>")
    mercutio.sends("<presence/><presence type='unavailable'><status>A plague o' both</status></presence>")
    mercutio.receives_anything()
    nurse = server.client().login("nurse", resource="chamber")
    nurse.sends("<presence type='subscribe' to='mercutio@example.org'/>")
    nurse.sends("<message to='mercutio@example.org' type='chat'><body>I pray you, sir</body></message>")
    nurse.receives_nothing()
    romeo.forgets_unread()
    mercutio.sends(REMOVE)
    mercutio.receives("<iq type='result' id='unreg1'/>")
    mercutio.receives_stream_error("not-authorized")
    assert mercutio.is_closed()
    for other in (romeo, nurse):
        other.passes_barrier()
        other.forgets_unread()
    jid = xmppd.JID.parse("mercutio@example.org")
    for kind, documents in server.storage._documents.items():
        assert documents.get(jid) is None, kind
    assert all(not log.count(jid) for log in server.storage._logs.values())
    server.cast.hang_up()
    server.storage.close()
    about = files_about(tmp_path / "data", "mercutio")
    rosters = ["example.org/roster/nurse.json", "example.org/roster/romeo.json"]  # of those who knew him
    archives = [path for path in about if path.startswith("example.org/archive/nurse/")]  # what she said to him is hers
    assert set(about) <= {*rosters, *archives}, about
    for path in set(about) - set(archives):
        item = json.loads((tmp_path / "data" / path).read_text())["mercutio@example.org"]
        assert item["subscription"] == "none"
        assert "ask" not in item and "approved" not in item


def test_the_friends_of_a_removed_account_hear_of_it(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """XEP-0077 §3.2 (scenario 1): all subscriptions are cancelled, in both directions, and each goodbye comes once"""
    romeo.befriends(juliet)
    juliet.comes_online()
    juliet.receives("<presence type='unavailable' from='romeo@example.org' .../>")
    garden = server.client().login("romeo", resource="garden")
    for client in (romeo, garden):
        client.sends("<presence/>")
        client.passes_barrier()
    for client in (romeo, garden, juliet):
        client.receives_anything()
    romeo.sends(REMOVE)
    came = juliet.receives_anything()
    goodbyes = [stanza.get("from") for stanza in came if stanza.get("type") == "unavailable"]
    assert sorted(map(str, goodbyes)) == ["romeo@example.org/garden", "romeo@example.org/orchard"]
    told = {stanza.get("type") for stanza in came if stanza.get("from") == "romeo@example.org"}
    assert told == {"unsubscribe", "unsubscribed"}
    juliet.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
    juliet.receives(
        "<iq type='result' id='r'><query xmlns='jabber:iq:roster' ...>"
        "<item jid='romeo@example.org' subscription='none'/></query></iq>"
    )
    for client in (romeo, garden):
        client.receives_anything()
        client.disconnects()


def test_the_next_owner_of_a_name_inherits_nothing(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """XEP-0077 §3.2, S33: neither friends nor messages nor settings"""
    romeo.befriends(juliet)
    romeo.sends("<iq type='set' id='p'><query xmlns='jabber:iq:private'><x xmlns='urn:x'>secret</x></query></iq>")
    romeo.receives("<iq type='result' id='p'/>")
    juliet.sends("<message to='romeo@example.org' type='chat'><body>My bounty is as boundless</body></message>")
    juliet.passes_barrier()
    romeo.sends(REMOVE)
    romeo.receives("<iq type='result' id='unreg1'/>")
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    juliet.forgets_unread()
    server.add_account("romeo@example.org")
    heir = server.client().login("romeo", resource="orchard")
    heir.sends("<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>")
    heir.receives("<iq type='result' id='r'><query xmlns='jabber:iq:roster' .../></iq>")
    heir.sends("<iq type='get' id='p'><query xmlns='jabber:iq:private'><x xmlns='urn:x'/></query></iq>")
    heir.receives("<iq type='result' id='p'><query xmlns='jabber:iq:private'><x xmlns='urn:x'/></query></iq>")
    heir.sends("<presence/>")
    heir.receives("<presence ...>...</presence>")
    heir.receives_nothing()
    juliet.receives_nothing()


def test_messages_under_way_to_a_removed_account_do_not_touch_its_heirs(
    server: MemoryServer, juliet: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XEP0160-2-1: the log that they came from is another one"""
    juliet.sends("<message to='romeo@example.org' type='chat'><body>1</body></message>")
    juliet.receives_nothing()
    unsent = []
    romeo = server.client().login("romeo", resource="orchard")
    with monkeypatch.context() as network:
        network.setattr("tests.servers.MemoryTransport.when_sent", lambda _transport, callback: unsent.append(callback))
        romeo.sends("<presence/>")
        assert len(romeo.receives_anything()) == 2
        romeo.sends(REMOVE)
        romeo.receives_anything()
        romeo.disconnects()
    server.add_account("romeo@example.org")
    juliet.sends("<message to='romeo@example.org' type='chat'><body>2</body></message>")
    juliet.receives_nothing()
    for late in unsent:
        late()
    assert server.storage.log("offline").count(xmppd.JID.parse("romeo@example.org")) == 1


def test_nothing_is_removed_while_nothing_can_be_stored(server: MemoryServer, romeo: Client) -> None:
    """S61: an error, and all is as it was; not half of it"""
    other = server.client().login("romeo", resource="elsewhere")
    server.storage.failed = "the disk is full"
    romeo.sends(REMOVE)
    romeo.receives("<iq type='error' id='unreg1'><error type='wait' code='500'><resource-constraint .../></error></iq>")
    romeo.sends(account("romeo", "new secret", "c"))
    romeo.receives("<iq type='error' id='c'><error type='wait' code='500'><resource-constraint .../></error></iq>")
    server.storage.failed = ""
    other.receives_nothing()
    server.client().login("romeo").closes()
