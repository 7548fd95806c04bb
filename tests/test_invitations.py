"""Invitations (XEP-0401), with registration by them (XEP-0445) and contacts by them (XEP-0379)."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

import xmppd
from tests.dialogue import Client, password_of
from tests.servers import MemoryServer, ProcessServer

COMMANDS = "http://jabber.org/protocol/commands"
DATA = "jabber:x:data"
PARS = "urn:xmpp:pars:0"
REGISTER = "jabber:iq:register"
WITH_ADMIN = {"admins": ["nurse@example.org"]}
HOST = xmppd.JID("", "example.org", "")
ROMEO = xmppd.JID("romeo", "example.org", "")

pytestmark = pytest.mark.config(**WITH_ADMIN)


def invites(who: Client, **values: str) -> dict[str, str]:
    """Make an invitation by a command; return what there is to pass on."""
    name, form, session = ("create-account" if values else "invite"), "", ""
    if values:
        who.sends(f"<iq type='set' id='c' to='example.org'><command xmlns='{COMMANDS}' node='urn:xmpp:invite#{name}'/></iq>")
        begun = who.receives(f"<iq type='result' id='c'><command xmlns='{COMMANDS}' ...>...</command></iq>")[0]
        assert [field.get("var") for field in begun.iter(f"{{{DATA}}}field")] == ["username", "roster-subscription"]
        session = f" sessionid='{begun.get('sessionid')}'"
        fields = "".join(f"<field var='{key.replace('_', '-')}'><value>{value}</value></field>"
                         for key, value in values.items())  # fmt: skip
        form = f"<x xmlns='{DATA}' type='submit'>{fields}</x>"
    who.sends(f"<iq type='set' id='c' to='example.org'>"
              f"<command xmlns='{COMMANDS}' node='urn:xmpp:invite#{name}'{session}>{form}</command></iq>")  # fmt: skip
    done = who.receives(f"<iq type='result' id='c'><command xmlns='{COMMANDS}' ... status='completed'>...</command></iq>")
    found = {field.get("var"): field[0].text for field in done.iter(f"{{{DATA}}}field")}
    assert found.pop("FORM_TYPE") == "urn:xmpp:invite#invitation"
    return found


def token_in(made: dict[str, str]) -> str:
    return made["uri"].partition("preauth=")[2].partition(";")[0]


def arrives(server: MemoryServer | ProcessServer) -> Client:
    """Return somebody inside TLS who may want to register."""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    names = [feature.tag for feature in client.negotiates()]
    assert {"{urn:xmpp:invite}register", "{urn:xmpp:ibr-token:0}register"} <= set(names)
    return client


def shows(client: Client, token: str) -> None:
    client.sends(f"<iq type='set' id='p' to='example.org'><preauth xmlns='{PARS}' token='{token}'/></iq>")


def is_let_in(client: Client, token: str) -> None:
    shows(client, token)
    client.receives("<iq type='result' id='p' from='example.org'/>")


def is_turned_away(client: Client, token: str) -> None:
    shows(client, token)
    client.receives("<iq type='error' id='p' from='example.org'><error type='cancel'><item-not-found .../></error></iq>")


def registers(client: Client, name: str, condition: str = "") -> None:
    client.sends(f"<iq type='set' id='r'><query xmlns='{REGISTER}'><username>{name}</username>"
                 f"<password>{password_of(name)}</password></query></iq>")  # fmt: skip
    if condition:
        error = client.receives("<iq type='error' id='r' from='example.org'>...</iq>").find("{jabber:client}error")
        assert condition in [child.tag.rpartition("}")[2] for child in error]
    else:
        client.receives("<iq type='result' id='r' from='example.org'/>")


def kept(server: MemoryServer) -> dict[str, Any]:
    return dict(server.server.storage.documents("invitations").items(HOST))


# -- registering by one


@pytest.mark.wire
def test_who_is_invited_registers_and_has_a_contact(server, nurse) -> None:
    """XEP-0401 §5.1, §5.5, XEP-0445 §4: once; and the inviter hears of it at once."""
    nurse.comes_online()
    made = invites(nurse)
    assert made["uri"].startswith("xmpp:nurse@example.org?roster;preauth=") and made["uri"].endswith(";ibr=y")
    week = xmppd.parse_stamp(made["expire"]).timestamp() - time.time()
    assert abs(week - 7 * 86400) < 60 and len(token_in(made)) == 32  # 128 bits
    guest = arrives(server)
    is_let_in(guest, token_in(made))
    registers(guest, "paris")
    nurse.receives("<iq type='set' id='*'><query xmlns='jabber:iq:roster' ver='*'>"
                   "<item jid='paris@example.org' subscription='both'/></query></iq>")  # fmt: skip
    guest.disconnects()
    paris = server.client().login("paris")
    paris.sends("<iq type='get' id='1'><query xmlns='jabber:iq:roster'/></iq>")
    paris.receives("<iq type='result' id='1'><query xmlns='jabber:iq:roster' ver='*'>"
                   "<item jid='nurse@example.org' subscription='both'/></query></iq>")  # fmt: skip
    again = arrives(server)
    is_turned_away(again, token_in(made))  # S84: used up
    paris.sends("<iq type='set' id='x'><query xmlns='jabber:iq:register'><remove/></query></iq>")
    paris.receives("<iq type='result' id='x'/>")
    paris.receives_stream_error("not-authorized")
    assert paris.is_closed()
    nurse.receives_anything()


def test_nobody_registers_without_an_invitation(server) -> None:
    """S84, S85: unknown tokens are no invitations, and guessing ends the stream."""
    guest = arrives(server)
    registers(guest, "paris", "service-unavailable")
    for _ in range(4):
        is_turned_away(guest, "0" * 32)
    registers(guest, "paris", "service-unavailable")
    shows(guest, "")
    guest.receives_stream_error("policy-violation")
    assert guest.is_closed()


def test_an_invitation_lasts_a_week(server, nurse) -> None:
    """XEP-0445 §4: the moment of showing it counts."""
    token = token_in(invites(nurse))
    punctual, late = arrives(server), arrives(server)
    is_let_in(punctual, token)
    (key, invitation), = kept(server).items()
    server.server.storage.documents("invitations").put(HOST, key, {**invitation, "expires": int(time.time()) - 1})
    is_turned_away(late, token)
    registers(punctual, "paris")


def test_of_two_with_the_same_invitation_one_is_faster(server, nurse) -> None:
    """S84, XEP-0445 §4: it is used when the account is there."""
    token = token_in(invites(nurse))
    one, other = arrives(server), arrives(server)
    is_let_in(one, token)
    is_let_in(other, token)
    registers(one, "romeo", "conflict")
    registers(one, "paris")
    registers(other, "rosaline", "not-acceptable")
    assert xmppd.JID("rosaline", "example.org", "") not in server.server.accounts


def test_a_name_may_be_reserved(server, nurse) -> None:
    """XEP-0401 §5.4, §6.2"""
    made = invites(nurse, username="Paris", roster_subscription="1")
    assert made["uri"].startswith("xmpp:paris@example.org?register;preauth=")
    stranger = arrives(server)
    is_let_in(stranger, token_in(invites(nurse)))
    registers(stranger, "paris", "conflict")
    guest = arrives(server)
    is_let_in(guest, token_in(made))
    registers(guest, "rosaline", "not-acceptable")
    registers(guest, "paris")
    assert server.server.sees(xmppd.JID("paris", "example.org", ""), xmppd.JID("nurse", "example.org", ""))


def test_an_invitation_to_the_server_makes_no_contacts(server, nurse) -> None:
    """XEP-0401 §5.4"""
    made = invites(nurse, username="")
    assert made["uri"].startswith("xmpp:example.org?register;preauth=")
    guest = arrives(server)
    is_let_in(guest, token_in(made))
    registers(guest, "paris")
    assert not server.server.sees(xmppd.JID("paris", "example.org", ""), xmppd.JID("nurse", "example.org", ""))


def test_not_everybody_opens_the_door(server, romeo) -> None:
    """`[registration] invite`: others make contacts only."""
    made = invites(romeo)
    assert "ibr=y" not in made["uri"]
    is_turned_away(arrives(server), token_in(made))
    romeo.sends(f"<iq type='set' id='c' to='example.org'><command xmlns='{COMMANDS}' node='urn:xmpp:invite#create-account'/></iq>")
    romeo.receives("<iq type='error' id='c'><error type='cancel'><forbidden .../></error></iq>")


@pytest.mark.config(registration={"invite": "everyone"})
def test_where_everybody_may_invite(server, romeo) -> None:
    guest = arrives(server)
    is_let_in(guest, token_in(invites(romeo)))
    registers(guest, "paris")


def test_rooms_wait_for_who_arrives(server) -> None:
    """As bookmarks (XEP-0402), also for older clients (XEP-0049); clients enter them by themselves."""
    made = xmppd.invite_user(server.server, {"rooms": ["kitchen@conference.example.org"]})
    guest = arrives(server)
    is_let_in(guest, token_in(made))
    registers(guest, "paris")
    guest.disconnects()
    paris = server.client().login("paris")
    paris.sends("<iq type='get' id='1'><pubsub xmlns='http://jabber.org/protocol/pubsub'>"
                "<items node='urn:xmpp:bookmarks:1'/></pubsub></iq>")  # fmt: skip
    paris.receives("<iq type='result' id='1'><pubsub xmlns='http://jabber.org/protocol/pubsub'>"
                   "<items node='urn:xmpp:bookmarks:1'><item id='kitchen@conference.example.org'>"
                   "<conference xmlns='urn:xmpp:bookmarks:1' name='kitchen' autojoin='true'/></item></items></pubsub></iq>")
    paris.sends("<iq type='get' id='2'><query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'/></query></iq>")
    paris.receives("<iq type='result' id='2'><query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'>"
                   "<conference jid='kitchen@conference.example.org' .../></storage></query></iq>")  # fmt: skip


def test_so_many_invitations_wait(server, romeo) -> None:
    for _ in range(25):
        invites(romeo)
    romeo.sends(f"<iq type='set' id='c' to='example.org'><command xmlns='{COMMANDS}' node='urn:xmpp:invite#invite'/></iq>")
    romeo.receives("<iq type='error' id='c'><error type='wait'><resource-constraint .../></error></iq>")
    for key, invitation in kept(server).items():
        server.server.storage.documents("invitations").put(HOST, key, {**invitation, "expires": 1})
    invites(romeo)
    assert len(kept(server)) == 1


def test_who_leaves_has_invited_nobody(server, nurse) -> None:
    """And what is on the disk is no token."""
    token = token_in(invites(nurse))
    assert token not in repr(kept(server))
    server.server.remove_account(xmppd.JID("nurse", "example.org", ""))
    assert not kept(server)
    is_turned_away(arrives(server), token)
    nurse.receives_stream_error("not-authorized")
    assert nurse.is_closed()


# -- becoming a contact by one (XEP-0379)


def test_who_shows_the_token_is_a_contact_at_once(server, romeo, juliet) -> None:
    """XEP-0379 §3.4, §3.5: and is asked back; the second time nobody vouches."""
    romeo.comes_online()
    token = token_in(invites(romeo))
    subscribe = f"<presence type='subscribe' to='romeo@example.org'><preauth xmlns='{PARS}' token='{token}'/></presence>"
    juliet.sends(f"<presence type='subscribed' to='romeo@example.org'/>{subscribe}")
    juliet.passes_barrier()
    romeo.passes_barrier()
    assert server.server.sees(xmppd.JID("juliet", "example.org", ""), ROMEO)
    assert server.server.sees(ROMEO, xmppd.JID("juliet", "example.org", ""))
    assert not any(stanza.get("type") == "subscribe" for stanza in romeo.receives_anything())
    juliet.receives_anything()
    benvolio = server.client().login("benvolio")
    benvolio.sends(subscribe)
    benvolio.passes_barrier()
    assert not server.server.sees(xmppd.JID("benvolio", "example.org", ""), ROMEO)
    assert [stanza.get("type") for stanza in romeo.receives_anything()] == ["subscribe"]
    benvolio.receives_anything()


def test_a_token_is_good_for_its_inviter_only(server, romeo, juliet, nurse) -> None:
    """XEP-0379 §4.1: a wrong one is as none."""
    token = token_in(invites(nurse))
    for wrong in (token, "invented", ""):
        juliet.sends(f"<presence type='subscribe' to='romeo@example.org'><preauth xmlns='{PARS}' token='{wrong}'/></presence>")
    juliet.passes_barrier()
    assert not server.server.sees(xmppd.JID("juliet", "example.org", ""), ROMEO)
    assert len(kept(server)) == 1
    juliet.receives_anything()


# -- the command line


def test_the_command_line_invites(process_server) -> None:
    """XEP-0401: with contacts, a time and a number of uses; whether the server runs or not."""
    out = process_server.command("invite", "--contact", "romeo@example.org", "--uses", "2", "--expires", "2 days", "--json")
    made = json.loads(out)
    assert made["uri"].startswith("xmpp:romeo@example.org?roster;preauth=") and made["uri"].endswith(";ibr=y")
    assert abs(xmppd.parse_stamp(made["expire"]).timestamp() - time.time() - 2 * 86400) < 60
    for name in ("paris", "rosaline"):
        guest = arrives(process_server)
        is_let_in(guest, token_in(made))
        registers(guest, name)
        guest.disconnects()
    guest = arrives(process_server)
    is_turned_away(guest, token_in(made))
    guest.disconnects()
    process_server.stop()
    lines = process_server.command("invite", "example.net").splitlines()
    assert lines[0].startswith("xmpp:example.net?register;preauth=") and lines[-1].startswith("valid until ")


@pytest.mark.parametrize("words", [
    ["elsewhere.example"], ["--contact", "nobody@example.org"], ["--expires", "soon"], ["--expires", "forever"],
    ["--uses", "0"], ["--room", "@"], ["example.net", "--contact", "romeo@example.org"],
])  # fmt: skip
def test_the_command_line_says_what_is_wrong(server: MemoryServer, words: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr(xmppd, "configured", lambda options: server.server.config)
    monkeypatch.setattr(xmppd, "perform", lambda config, command, arguments: xmppd.invite_user(server.server, arguments))
    assert xmppd.main(["invite", *words]) == 1
    assert capsys.readouterr().err.startswith("xmppd: ")
