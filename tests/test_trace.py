"""The trace (chapter 26): a conversation as the specifications print it, with the rule that decided, and no secrets."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest

import xmppd
from tests.dialogue import password_of


@pytest.fixture
def lines(server) -> list[str]:
    """What the trace prints from now on."""
    found: list[str] = []
    server.server.trace = xmppd.Trace(found.append, colour=False)
    return found


def test_a_message_its_rule_and_its_delivery(server, romeo, juliet, lines):
    romeo.comes_online()
    juliet.comes_online()
    lines.clear()
    romeo.sends("<message to='juliet@example.org' type='chat'><body>O</body></message>")
    juliet.receives("<message from='romeo@example.org/orchard' type='chat'><body>O</body></message>")
    heard, decided, said = [line for line in lines if "barrier" not in line][:3]
    assert heard.split() == [
        "romeo@example.org/orchard", "C:", "<message", "to='juliet@example.org'", "type='chat'><body>O</body></message>",
    ]
    assert decided.strip().startswith("→ RFC 6121 §8.5.2.1.1: ")
    assert "highest priority" in decided
    assert said.startswith("juliet@example.org/balcony")
    assert " S: <message " in said and "<body>O</body>" in said


def test_a_request_names_its_extension_and_an_error_its_condition(server, romeo, lines):
    romeo.sends("<iq type='get' id='p1' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>")
    romeo.receives("<iq type='result' id='p1' from='example.org'/>")
    assert any("→ XMPP Ping (XEP-0199): §4.2" in line for line in lines)
    romeo.sends("<iq type='get' id='u1' to='example.org'><unknown xmlns='urn:example:unknown'/></iq>")
    romeo.receives("<iq type='error' id='u1' from='example.org'><error type='cancel'><service-unavailable .../></error></iq>")
    assert any("RFC 6120 §8.3: refused with service-unavailable" in line for line in lines)


def test_no_password_and_no_proof_is_ever_printed(server, lines):
    """S86"""
    for mechanism in ("PLAIN", "SCRAM-SHA-256"):
        client = server.client().connect()
        client.negotiates()
        client.starts_tls()
        client.negotiates()
        client.authenticates("romeo", password_of("romeo"), mechanism)
    legacy = server.client().connect()
    legacy.negotiates()
    legacy.starts_tls()
    legacy.negotiates()
    legacy.sends("<iq type='set' id='a1'><query xmlns='jabber:iq:auth'><username>romeo</username>"
                 f"<password>{password_of('romeo')}</password><resource>old</resource></query></iq>")
    legacy.receives("<iq type='result' id='a1' from='example.org'/>")
    text = "\n".join(lines)
    secrets = [password_of("romeo"), base64.b64encode(f"\0romeo\0{password_of('romeo')}".encode()).decode()]
    assert not any(secret in text for secret in secrets)
    assert "<password>***</password>" in text
    assert text.count(">***</auth>") == 2 and ">***</response>" in text and ">***</challenge>" in text


def test_what_moves_a_cursor_is_neutralised(server, romeo, juliet, lines):
    romeo.sends("<message to='juliet@example.org/balcony' type='chat'><body>a&#10;b\u202e</body></message>")
    juliet.receives("<message from='romeo@example.org/orchard' type='chat'><body>a\nb\u202e</body></message>")
    assert all("\n" not in line and "\u202e" not in line for line in lines)


def test_colours_are_for_terminals():
    found: list[str] = []
    xmppd.Trace(found.append, colour=True).decided("a rule")
    assert found[0].startswith("\x1b[33m") and found[0].endswith("\x1b[0m")


def test_the_stream_is_printed_from_its_first_word_to_its_last(server, lines):
    client = server.client().connect()
    client.opens_stream(to="elsewhere.example")
    client.receives_stream_header()
    client.receives_stream_error("host-unknown")
    assert client.is_closed()
    text = "\n".join(lines)
    assert "C: <stream:stream" in text and "S: <?xml version='1.0'?><stream:stream" in text
    assert "S: <stream:error><host-unknown" in text and "S: </stream:stream>" in text


def test_run_with_trace_prints_on_stdout(tmp_path, process_server):
    """The option of the command line, with a real process."""
    process_server.stop()
    folder = ["--config", str(process_server.config), "--data", str(process_server.data)]
    command = [sys.executable, str(xmppd.__file__), *folder, "run", "--trace"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None and process.stdout is not None
        port = 0
        for line in process.stderr:
            if "ready: client " in line:
                port = int(line.partition("ready: client 127.0.0.1:")[2].partition(",")[0])
                break
        process_server.ports = {"client": port}
        romeo = process_server.client().login("romeo", resource="orchard")
        first = process.stdout.readline()
        assert first.startswith("somebody") and " C: <stream:stream" in first
        romeo.closes()
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "romeo@example.org/orchard" in output and password_of("romeo") not in output
    process_server.start()


def test_the_trace_is_off_unless_asked_for(server):
    assert server.server.trace is None
