"""Small features: session establishment, private XML, version, ping, time; and what a log may hold."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import Client
from tests.servers import BUG, MemoryServer, ProcessServer

JULIET = "juliet@example.org"
UNAVAILABLE = "<error type='cancel' code='503'><service-unavailable .../></error>"
NOT_ACCEPTABLE = "<error type='modify' code='406'><not-acceptable .../></error>"
FULL = "<error type='wait' code='500'><resource-constraint .../></error>"
SESSION = "<session xmlns='urn:ietf:params:xml:ns:xmpp-session'/>"
PING = "<ping xmlns='urn:xmpp:ping'/>"


# ---- session establishment (RFC 3921 §3) --------------------------------------------------


def authenticated(server: MemoryServer) -> Client:
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    assert client.negotiates().find("{urn:ietf:params:xml:ns:xmpp-session}session") is None
    client.authenticates("romeo", "romeo-secret")
    return client


def test_a_session_is_offered_but_not_needed(server: MemoryServer, juliet: Client) -> None:
    """RFC3921-3-1, RFC3921-3-3: with bind, after the login"""
    romeo = authenticated(server)
    features = romeo.negotiates()
    session = "{urn:ietf:params:xml:ns:xmpp-session}"
    assert features.find("{urn:ietf:params:xml:ns:xmpp-bind}bind") is not None
    assert features.find(f"{session}session/{session}optional") is not None
    romeo.binds("orchard")
    romeo.sends(f"<message to='{JULIET}/balcony'><body>O</body></message>")  # without having asked for a session
    juliet.receives("<message from='romeo@example.org/orchard'><body>O</body></message>")


@pytest.mark.parametrize("to", ["", " to='example.org'", " to='romeo@example.org'"])
def test_a_session_is_granted_as_often_as_wanted(romeo: Client, to: str) -> None:
    """RFC3921-3-2"""
    for number in range(3):
        romeo.sends(f"<iq type='set' id='sess_{number}'{to}>{SESSION}</iq>")
        romeo.receives(f"<iq type='result' id='sess_{number}'/>")


@pytest.mark.wire
def test_a_client_of_2004_gets_its_session(server: ProcessServer) -> None:
    """RFC3921-3-2"""
    romeo = server.client().login("romeo", resource="orchard")
    romeo.sends(f"<iq to='example.org' type='set' id='sess_1'>{SESSION}</iq>")
    romeo.receives("<iq from='example.org' type='result' id='sess_1'/>")


def test_there_is_no_session_before_a_resource(server: MemoryServer) -> None:
    """RFC3921-3-3"""
    romeo = authenticated(server)
    romeo.negotiates()
    romeo.sends(f"<iq type='set' id='s'>{SESSION}</iq>")
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()


def test_a_session_never_conflicts(server: MemoryServer, romeo: Client) -> None:
    """RFC3921-3-4: binding has settled that already"""
    again = server.client().login("romeo", resource="orchard")
    romeo.receives_stream_error("conflict")
    assert romeo.is_closed()
    again.sends(f"<iq type='set' id='s'>{SESSION}</iq>")
    again.receives("<iq type='result' id='s'/>")


# ---- private XML storage (XEP-0049) -------------------------------------------------------

PREFS = "<exodus xmlns='exodus:prefs'><defaultnick>Hamlet</defaultnick></exodus>"


def private(type: str, content: str, identifier: str = "p", to: str = "") -> str:
    return f"<iq type='{type}' id='{identifier}'{to}><query xmlns='jabber:iq:private'>{content}</query></iq>"


def stores(client: Client, content: str) -> None:
    client.sends(private("set", content))
    client.receives("<iq type='result' id='p'/>")


def finds(client: Client, asked: str, content: str) -> None:
    client.sends(private("get", asked))
    client.receives(private("result", content))


@pytest.mark.wire
def test_a_client_stores_what_it_likes(server: ProcessServer, romeo: Client) -> None:
    """XEP-0049 §2.3, examples 1 and 2; another resource finds it"""
    stores(romeo, PREFS)
    other = server.client().login("romeo", resource="elsewhere")
    finds(other, "<exodus xmlns='exodus:prefs'/>", PREFS)


@pytest.mark.parametrize("to", ["", " to='romeo@example.org'"])
def test_ones_own_address_is_allowed(romeo: Client, to: str) -> None:
    """XEP-0049 §2.3"""
    romeo.sends(private("set", PREFS, to=to))
    romeo.receives("<iq type='result' id='p'/>")
    romeo.sends(private("get", "<exodus xmlns='exodus:prefs'/>", to=to))
    romeo.receives(private("result", PREFS))


def test_what_was_never_stored_is_empty(romeo: Client) -> None:
    """XEP-0049 §2.3"""
    finds(romeo, "<storage xmlns='storage:bookmarks'/>", "<storage xmlns='storage:bookmarks'/>")


@pytest.mark.parametrize(
    "content",
    [
        "<x xmlns='urn:x' a='1' b='&lt;&apos;&quot;&#10;'>text<y xmlns='urn:y'> &amp; </y>tail<z xmlns=''/></x>",
        "<p:x xmlns:p='urn:x' p:a='1' xml:lang='it'/>",
        "<x xmlns='urn:x'>\U0001f339 &#13; ]]&gt;</x>",
        "<x xmlns='urn:x'><message xmlns='jabber:client'><body/></message></x>",
    ],
)
def test_it_comes_back_as_it_was(romeo: Client, content: str) -> None:
    """XEP-0049 §2.1"""
    stores(romeo, content)
    finds(romeo, "<x xmlns='urn:x'/>", content)


def test_elements_replace_those_of_their_name_only(romeo: Client) -> None:
    """XEP-0049 §2.3: also several in one request"""
    stores(romeo, "<x xmlns='urn:x'>1</x><y xmlns='urn:x'>2</y><x xmlns='urn:other'>3</x>")
    stores(romeo, "<x xmlns='urn:x'>4</x><x xmlns='urn:x'>5</x>")
    finds(romeo, "<x xmlns='urn:x'/>", "<x xmlns='urn:x'>4</x><x xmlns='urn:x'>5</x>")
    finds(romeo, "<y xmlns='urn:x'/>", "<y xmlns='urn:x'>2</y>")
    finds(romeo, "<x xmlns='urn:other'/>", "<x xmlns='urn:other'>3</x>")
    stores(romeo, "<x xmlns='urn:x'/>")
    finds(romeo, "<x xmlns='urn:x'/>", "<x xmlns='urn:x'/>")


@pytest.mark.parametrize("type", ["get", "set"])
@pytest.mark.parametrize(
    "content",
    ["", "no element", "<x/>", "<x xmlns='jabber:iq:private'/>", "<x xmlns=''/>", "<x xmlns='jabber:client'/>"],
)
def test_an_element_with_a_namespace_of_its_own_is_needed(romeo: Client, type: str, content: str) -> None:
    """XEP-0049 §2.3, §3"""
    romeo.sends(private(type, content))
    romeo.receives(f"<iq type='error' id='p'>{NOT_ACCEPTABLE}</iq>")


def test_one_thing_at_a_time_is_asked_for(romeo: Client) -> None:
    """XEP-0049 §2.3; and nothing is stored of a request that is half wrong"""
    romeo.sends(private("get", "<x xmlns='urn:x'/><y xmlns='urn:y'/>"))
    romeo.receives(f"<iq type='error' id='p'>{NOT_ACCEPTABLE}</iq>")
    romeo.sends(private("set", "<x xmlns='urn:x'>1</x><y/>"))
    romeo.receives(f"<iq type='error' id='p'>{NOT_ACCEPTABLE}</iq>")
    finds(romeo, "<x xmlns='urn:x'/>", "<x xmlns='urn:x'/>")


@pytest.mark.parametrize("type", ["get", "set"])
@pytest.mark.parametrize("to", [JULIET, "nobody@example.org", "example.org", "juliet@example.org/balcony"])
def test_what_is_private_stays_private(romeo: Client, juliet: Client, type: str, to: str) -> None:
    """XEP-0049 §2.3, example 3, §4: not even a friend's"""
    romeo.befriends(juliet)
    stores(juliet, PREFS)
    romeo.sends(private(type, "<exodus xmlns='exodus:prefs'/>", to=f" to='{to}'"))
    if to == "juliet@example.org/balcony":
        juliet.receives("<iq .../>".replace("/>", ">...</iq>"))  # her client is asked, and will say no
    else:
        romeo.receives(f"<iq type='error' id='p'>{UNAVAILABLE}</iq>")
    finds(juliet, "<exodus xmlns='exodus:prefs'/>", PREFS)


@pytest.mark.config(limits={"private": 3})
def test_there_is_room_for_so_many_elements(romeo: Client) -> None:
    """S59"""
    for number in range(3):
        stores(romeo, f"<x xmlns='urn:{number}'/>")
    romeo.sends(private("set", "<x xmlns='urn:3'/>"))
    romeo.receives(f"<iq type='error' id='p'>{FULL}</iq>")
    stores(romeo, "<x xmlns='urn:0'>again</x>")
    finds(romeo, "<x xmlns='urn:3'/>", "<x xmlns='urn:3'/>")


@pytest.mark.config(limits={"private_bytes": 1000})
@pytest.mark.parametrize("sign", ["a", "é", "\U0001f339"])
def test_there_is_room_for_so_many_bytes(romeo: Client, sign: str) -> None:
    """S59"""
    size = len(sign.encode())
    stores(romeo, f"<x xmlns='urn:x'>{sign * (900 // size)}</x>")
    romeo.sends(private("set", f"<y xmlns='urn:y'>{sign * (100 // size)}</y>"))
    romeo.receives(f"<iq type='error' id='p'>{FULL}</iq>")
    stores(romeo, f"<x xmlns='urn:x'>{sign * (100 // size)}</x>")


# ---- software version (XEP-0092) ----------------------------------------------------------


@pytest.mark.wire
def test_the_server_says_its_version_and_nothing_more(server: ProcessServer, romeo: Client) -> None:
    """XEP-0092 §2, §5: the operating system is nobody's business"""
    romeo.sends("<iq type='get' id='v' to='example.org'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives(
        "<iq type='result' id='v'><query xmlns='jabber:iq:version'>"
        f"<name>xmppd</name><version>{xmppd.__version__}</version></query></iq>"
    )


def test_a_version_cannot_be_set(romeo: Client) -> None:
    """XEP-0092 §3"""
    romeo.sends("<iq type='set' id='v' to='example.org'><query xmlns='jabber:iq:version'/></iq>")
    romeo.receives(f"<iq type='error' id='v'>{UNAVAILABLE}</iq>")


# ---- ping (XEP-0199) ----------------------------------------------------------------------


@pytest.mark.parametrize("to", ["", " to='example.org'", " to='romeo@example.org'"])
def test_the_server_answers_a_ping(romeo: Client, to: str) -> None:
    """XEP-0199 §4.2, examples 4 and 5"""
    romeo.sends(f"<iq type='get' id='c2s1'{to}>{PING}</iq>")
    romeo.receives("<iq type='result' id='c2s1'/>")


def test_a_stranger_learns_nothing_from_a_ping(romeo: Client, juliet: Client) -> None:
    """XEP-0199 §7"""
    for to in (JULIET, JULIET + "/balcony", JULIET + "/gone", "nobody@example.org", "nobody@example.org/x"):
        romeo.sends(f"<iq type='get' id='p' to='{to}'>{PING}</iq>")
        romeo.receives(f"<iq type='error' id='p' from='{to}'>{UNAVAILABLE}</iq>")
    juliet.receives_nothing()


def test_friends_ping_each_other(romeo: Client, juliet: Client) -> None:
    """XEP-0199 §4.4, examples 10 to 12"""
    romeo.befriends(juliet)
    for answer in ("<iq type='result'", "<iq type='error'"):
        romeo.sends(f"<iq type='get' id='e2e1' to='{JULIET}/balcony'>{PING}</iq>")
        juliet.receives(f"<iq type='get' id='e2e1' from='romeo@example.org/orchard'>{PING}</iq>")
        juliet.sends(f"{answer} id='e2e1' to='romeo@example.org/orchard'/>")
        romeo.receives(f"{answer} id='e2e1' from='{JULIET}/balcony'/>")


def passes(server: MemoryServer, seconds: float) -> None:
    """Let time pass for the server's timers."""
    now = server.loop.now() + seconds
    server.loop.now = lambda: now
    server.loop.turn(0)


@pytest.mark.parametrize("answer", ["<iq type='result' id='ID' to='example.org'/>", "<iq type='error' id='ID'/>", " "])
def test_a_silent_client_is_asked_whether_it_is_there(server: MemoryServer, answer: str) -> None:
    """XEP-0199 §4.1, §6, examples 1 to 3: any sign of life will do, an error too"""
    romeo = server.client().login("romeo", resource="orchard")
    limits = server.server.config.limits
    passes(server, limits.silence_timeout + 1)
    ping = romeo.receives(f"<iq type='get' id='*' from='example.org'>{PING}</iq>")
    romeo.sends_raw(answer.replace("ID", ping.get("id") or ""))
    passes(server, limits.answer_timeout + 1)
    romeo.receives_nothing()
    passes(server, limits.silence_timeout + 1)
    romeo.receives(f"<iq type='get' id='*' from='example.org'>{PING}</iq>")
    passes(server, limits.answer_timeout + 1)
    romeo.receives_stream_error("connection-timeout")
    assert romeo.is_closed()


def test_an_answer_that_nobody_waits_for_is_no_answer(server: MemoryServer, romeo: Client, juliet: Client) -> None:
    """RFC6120-10.3.3-1, S55: nor does one count that comes from somebody else"""
    answers: list[xmppd.Stanza | None] = []
    question = xmppd.E("{urn:xmpp:ping}ping")
    server.server.ask(JULIET, xmppd.JID.parse(JULIET + "/balcony"), question, answers.append)
    asked = juliet.receives(f"<iq type='get' id='*' from='{JULIET}'>{PING}</iq>").get("id")
    romeo.sends(f"<iq type='result' id='{asked}' to='{JULIET}'/><iq type='result' id='{asked}' to='example.org'/>")
    juliet.sends("<iq type='result' id='another' to='juliet@example.org'/>")
    romeo.receives_nothing()
    assert not answers
    juliet.sends(f"<iq type='result' id='{asked}' to='{JULIET}'/>")
    juliet.sends(f"<iq type='result' id='{asked}' to='{JULIET}'/>")
    juliet.receives_nothing()
    assert len(answers) == 1


# ---- entity time (XEP-0202) ---------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC0", "CET-1", "EST5", "IST-5:30"])
def test_the_server_tells_the_time(romeo: Client, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """XEP-0202 §3, XEP0082-3-1: UTC, and how far the wall clock is from that"""
    import time

    if not hasattr(time, "tzset"):
        pytest.skip("this system's clock cannot be moved to another zone")
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        romeo.sends("<iq type='get' id='t' to='example.org'><time xmlns='urn:xmpp:time'/></iq>")
        answer = romeo.receives(
            "<iq type='result' id='t'><time xmlns='urn:xmpp:time'><tzo>*</tzo><utc>*Z</utc></time></iq>"
        )
    finally:
        monkeypatch.undo()
        time.tzset()
    utc = datetime.fromisoformat(answer.findtext(".//{urn:xmpp:time}utc") or "")
    assert abs(datetime.now(UTC) - utc) < timedelta(minutes=1)
    offsets = {"UTC0": "+00:00", "CET-1": "+01:00", "EST5": "-05:00", "IST-5:30": "+05:30"}
    assert answer.findtext(".//{urn:xmpp:time}tzo") in ({offsets[zone], "Z"} if zone == "UTC0" else {offsets[zone]})


# ---- the log (S86) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a\nb", "a\rb", "\x1b[31mred", "\x07", "\u202eabc", "\u2028", "\x9b1m", "\x00", "\x7f", "\ud800"]
)
@pytest.mark.parametrize("journald", [True, False])
def test_a_log_line_is_one_line_of_printable_text(text: str, journald: bool) -> None:
    """S86"""
    record = logging.LogRecord("xmppd", logging.INFO, "", 0, "%s: session begins", (text,), None)
    line = xmppd.LineFormatter(journald=journald).format(record)
    assert line.isprintable()
    assert "session begins" in line


SECRETS = {
    "sasl": "Wherefore-art-thou",
    "wrong sasl": "Deny-thy-father",
    "iq-auth": "refuse-thy-name",
    "wrong iq-auth": "Or-if-thou-wilt-not",
    "registered": "be-but-sworn-my-love",
    "refused": "And-Ill-no-longer",
    "changed": "be-a-Capulet",
    "body": "Tis-but-thy-name",
}


@pytest.fixture
def talkative_server(tmp_path: Path) -> Iterator[ProcessServer]:
    """A server process that logs all it can, with one account."""
    server = ProcessServer(tmp_path, {"registration": {"open": True}})
    program = str(xmppd.__file__)
    verbosely = (
        f"sys.argv = [{program!r}, *sys.argv[1:], '--verbose']; runpy.run_path({program!r}, run_name='__main__')"
    )
    server.program = ("-c", "import runpy, sys; " + verbosely)
    server.start()
    with xmppd.ControlClient(server.data) as control:
        credentials = xmppd.make_credentials(SECRETS["sasl"])
        control.request("user add", {"jid": "nun@example.org", "credentials": credentials})
    yield server
    server.cast.hang_up()
    server.stop()


def test_no_secret_is_ever_logged(talkative_server: ProcessServer) -> None:
    """S86: at the log's most talkative, over real TLS, whatever goes wrong"""
    process_server = talkative_server
    for mechanism in ("PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256"):
        process_server.client().login("nun", password=SECRETS["sasl"], mechanism=mechanism).closes()
    nun = stranger(process_server)
    nun.sends_auth("PLAIN", f"\0nun\0{SECRETS['wrong sasl']}".encode())
    nun.receives_failure("not-authorized")
    nun.disconnects()
    for name, password in (("ghost", SECRETS["registered"]), ("nun", SECRETS["refused"]), ("a b", SECRETS["refused"])):
        client = stranger(process_server)
        client.sends(register(name, password))
        client.receives("<iq id='r' ...>...</iq>")
        client.disconnects()
    for password in (SECRETS["wrong iq-auth"], SECRETS["sasl"]):
        client = stranger(process_server)
        client.sends(
            "<iq type='set' id='a'><query xmlns='jabber:iq:auth'><username>nun</username>"
            f"<password>{password}</password><resource>\u212b\u0301</resource></query></iq>"
        )
        client.receives("<iq id='a' ...>...</iq>")
        client.disconnects()
    nun = process_server.client().login("nun", password=SECRETS["sasl"], resource="[31m \u00ad\u2763")
    nun.sends(f"<message to='nun@example.org'><body>{SECRETS['body']}</body></message>")
    nun.sends(register("nun", SECRETS["changed"]))
    nun.receives("<iq type='result' id='r'/>")
    nun.sends_raw(f"<iq type='set' id='x'><password>{SECRETS['changed']}</oops>")
    nun.receives_stream_error("not-well-formed")
    assert nun.is_closed()
    process = process_server.process
    process_server.stop()
    log = process.log()
    assert " debug: " in log
    assert "nun@example.org" in log  # it was talkative indeed
    assert not [secret for secret in SECRETS.values() if secret in log]
    assert all(line.isprintable() for line in log.splitlines())
    assert not BUG.search(log)


def stranger(server: ProcessServer) -> Client:
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    return client


def register(name: str, password: str) -> str:
    query = f"<username>{name}</username><password>{password}</password>"
    return f"<iq type='set' id='r'><query xmlns='jabber:iq:register'>{query}</query></iq>"


def test_names_that_look_alike_are_one_account(server: MemoryServer) -> None:
    """S49: whatever is written, one prepared address stands for it"""
    for name in ("romeo", "ROMEO", "ｒomeo", "ro\u00admeo"):
        client = server.client().login(name, password="romeo-secret", resource="orchard", mechanism="PLAIN")
        assert client.jid == "romeo@example.org/orchard"
        client.closes()


def test_every_stamp_has_the_form_of_the_standard() -> None:
    """XEP0082-3-1"""
    pattern = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
    for moment in (None, 0.0, 1e9 + 0.999, datetime(2026, 11, 22, 15, tzinfo=UTC)):
        assert pattern.fullmatch(xmppd.stamp(moment))
