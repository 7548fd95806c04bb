"""The pages for people: what this is, and an invitation's (XEP-0401 §5.2)."""

from __future__ import annotations

import re

import pytest

import xmppd
from tests.dialogue import Client
from tests.servers import MemoryServer, ProcessServer
from tests.web import Answer, Server, request


def store(server: MemoryServer) -> xmppd.Invitations:
    return server.server.registry.feature(xmppd.Invitations)


def invited(server: MemoryServer, by: str = "", **options: object) -> str:
    return store(server).create("example.org", [xmppd.JID.parse(by)] if by else [], **{"account": True, **options})


def left(server: MemoryServer) -> int:
    return len(store(server).known.items(xmppd.JID("", "example.org", "")))


def accept(server: Server, token: str, name: str = "tybalt", password: str = "tybalt-secret", again: str = "", **headers: str) -> Answer:
    body = f"name={name}&password={password}&again={again or password}".encode()
    return request(server, "POST", f"/invite/{token}", body, **{"Origin": "https://example.org", **headers})


# ---- by a browser ---------------------------------------------------------------------


def test_the_page_shows_the_way(server: MemoryServer) -> None:
    """XEP-0401 §5.2; S78: no scripts, nothing leaks"""
    token = invited(server, "romeo@example.org")
    page = request(server, "GET", f"/invite/{token}")
    text = page.body.decode()
    assert page.status == 200 and "romeo@example.org invites you" in text
    assert f"href='xmpp:romeo@example.org?roster;preauth={token};ibr=y'" in text and "data:image/svg+xml" in text
    assert "<script" not in text and "script-src" not in page["content-security-policy"]
    assert "default-src 'none'" in page["content-security-policy"] and "frame-ancestors 'none'" in page["content-security-policy"]
    assert (page["referrer-policy"], page["cache-control"], page["x-content-type-options"]) == ("same-origin", "no-store", "nosniff")
    assert "set-cookie" not in page


def test_an_account_is_made_in_the_browser(server: MemoryServer) -> None:
    """XEP-0401 §5.4"""
    token = invited(server, uses=2)
    done = accept(server, token, "Tybalt")
    assert done.status == 201 and b"tybalt@example.org" in done.body
    server.client().login("tybalt")
    assert left(server) == 1 and accept(server, token, "paris").status == 201 and left(server) == 0
    assert accept(server, token, "mercutio").status == 404


@pytest.mark.parametrize(("name", "password", "again", "why"), [
    ("romeo", "long-enough", "", "taken"), ("tybalt", "2short4", "", "too short"), ("tybalt", "long-enough", "other-words", "differ"),
    ("a@b", "long-enough", "", "not possible"), ("", "long-enough", "", "not possible"), ("%3Cb%3E%22x", "long-enough", "", "not possible"),
])  # fmt: skip
def test_what_is_wrong_is_said_and_costs_no_invitation(server: MemoryServer, name: str, password: str, again: str, why: str) -> None:
    """S78: what comes back is escaped"""
    token = invited(server)
    answer = accept(server, token, name, password, again)
    assert answer.status == 422 and why in answer.body.decode() and left(server) == 1
    assert b"<b>" not in answer.body and password.encode() not in answer.body


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://example.org", ""])
def test_the_form_is_for_our_own_page(server: MemoryServer, origin: str) -> None:
    """S78: CSRF"""
    token = invited(server)
    assert accept(server, token, Origin=origin).status == 403
    assert left(server) == 1 and xmppd.JID.parse("tybalt@example.org") not in server.server.accounts


def test_without_an_invitation_there_is_no_form(server: MemoryServer) -> None:
    """S85: POST without the step"""
    assert accept(server, "x").status == 404
    assert accept(server, "").status == 404


def test_the_welcome_page(server: MemoryServer) -> None:
    page = request(server, "GET", "/", Host="example.net")
    assert page.status == 200 and b"name@example.net" in page.body
    assert request(server, "GET", "/", Host="<b>").body.count(b"<b>") == 0
    assert request(server, "GET", "/style.css")["content-type"] == "text/css"
    assert request(server, "GET", "/ca.pem").status == 404


@pytest.mark.wire
@pytest.mark.config(listen={"web": ["127.0.0.1:0"]})
def test_the_command_invites(process_server: ProcessServer) -> None:
    """The page tells the authority's fingerprint, and hands out its certificate."""
    said = process_server.command("invite", "--contact", "romeo@example.org")
    port = process_server.ports["web"]
    [path] = re.findall(rf"https://example\.org:{port}(/invite/\S+)", said)
    assert f"xmpp:romeo@example.org?roster;preauth={path.rpartition('/')[2]};ibr=y" in said
    page = request(process_server, "GET", path).body.decode()
    assert xmppd.fingerprint(process_server.authority) in page
    assert request(process_server, "GET", "/ca.pem").body == process_server.authority.read_bytes()
    assert accept(process_server, path.rpartition("/")[2], Host=f"example.org:{port}", Origin=f"https://example.org:{port}").status == 201
    process_server.client().login("tybalt")


def test_nobody_guesses_tokens(server: MemoryServer) -> None:
    """S84: brute force"""
    token = invited(server)
    feature = server.server.registry.feature(xmppd.Pages)
    feature.guard = xmppd.LoginGuard(5, server.loop.now)
    for _ in range(6):
        assert request(server, "GET", "/invite/x").status == 404
    assert request(server, "GET", f"/invite/{token}").status == 404
    server.clock.skip(61)
    assert request(server, "GET", f"/invite/{token}").status == 200


def test_an_invitation_may_be_for_a_name(server: MemoryServer, romeo: Client) -> None:
    """XEP-0401 §6.2, §5.5: the name is reserved; who invited is a contact from the start."""
    token, other = invited(server, "romeo@example.org", username="tybalt"), invited(server)
    assert "value='tybalt'" in request(server, "GET", f"/invite/{token}").body.decode()
    assert accept(server, token, "paris").status == 422 and accept(server, other, "tybalt").status == 422
    assert accept(server, token, "tybalt").status == 201
    assert server.server.rosters.item(xmppd.JID.parse("romeo@example.org"), "tybalt@example.org")["subscription"] == "both"


def test_an_invitation_for_people_with_accounts_has_no_form(server: MemoryServer) -> None:
    """XEP-0401 §5.1"""
    token = invited(server, "romeo@example.org", account=False)
    assert "<form" not in request(server, "GET", f"/invite/{token}").body.decode()
    assert accept(server, token).status == 403


def test_an_expired_invitation_has_no_page(server: MemoryServer) -> None:
    """S84"""
    assert request(server, "GET", f"/invite/{invited(server, lifetime=-1)}").status == 404
