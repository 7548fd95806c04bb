"""Administration by any client: ad-hoc commands (XEP-0050, XEP-0133), contacts (XEP-0157), reports (XEP-0377)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

import xmppd
from tests.dialogue import Client, password_of
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer

COMMANDS = "http://jabber.org/protocol/commands"
ADMIN = "http://jabber.org/protocol/admin"
ITEMS = "http://jabber.org/protocol/disco#items"
INFO = "http://jabber.org/protocol/disco#info"
DATA = "jabber:x:data"
FAST = "urn:xmpp:fast:0"
WITH_ADMIN = {"admins": ["nurse@example.org"]}
ROMEO = xmppd.JID("romeo", "example.org", "")

pytestmark = pytest.mark.config(**WITH_ADMIN)


def asks(who: Client, name: str, *, action: str = "", session: str = "", form: str = "", host: str = "example.org") -> None:
    attributes = (f" action='{action}'" if action else "") + (f" sessionid='{session}'" if session else "")
    who.sends(f"<iq type='set' id='c' to='{host}'>"
              f"<command xmlns='{COMMANDS}' node='{ADMIN}#{name}'{attributes}>{form}</command></iq>")  # fmt: skip


def begins(who: Client, name: str, *fields: str) -> str:
    """Ask for a form that has these fields; return the session's id."""
    asks(who, name, action="execute")
    found = who.receives(
        f"<iq type='result' id='c'><command xmlns='{COMMANDS}' node='{ADMIN}#{name}' sessionid='*' status='executing'>"
        f"<actions execute='complete'><complete/></actions><x xmlns='{DATA}' type='form'>...</x></command></iq>")[0]
    assert [field.get("var") for field in found.iter(f"{{{DATA}}}field")] == ["FORM_TYPE", *fields]
    return found.get("sessionid") or ""


def filled(**values: str | list[str]) -> str:
    """Return a form that is filled in; `_` in a name stands for `-`."""
    fields = "".join(
        f"<field var='{name.replace('_verify', '-verify')}'>"
        + "".join(f"<value>{value}</value>" for value in ([values[name]] if isinstance(values[name], str) else values[name]))
        + "</field>" for name in values)  # fmt: skip
    return f"<x xmlns='{DATA}' type='submit'><field var='FORM_TYPE'><value>{ADMIN}</value></field>{fields}</x>"


def does(who: Client, name: str, **values: Any) -> ET.Element:
    """Go all the way through a command; return its result."""
    session = begins(who, name, *(field.replace("_verify", "-verify") for field in values))
    asks(who, name, action="complete", session=session, form=filled(**values))
    return completed(who, name)


def completed(who: Client, name: str) -> ET.Element:
    return who.receives(
        f"<iq type='result' id='c'><command xmlns='{COMMANDS}' node='{ADMIN}#{name}' sessionid='*' status='completed'>"
        "...</command></iq>")[0]


def is_refused(who: Client, condition: str, special: str = "") -> None:
    error = who.receives("<iq type='error' id='c'>...</iq>").find("{jabber:client}error")
    names = {child.tag.rpartition("}")[2] for child in error} - {"text"}
    assert names == {condition} | ({special} if special else set())


def values_of(result: ET.Element, var: str) -> list[str | None]:
    found = next(field for field in result.iter(f"{{{DATA}}}field") if field.get("var") == var)
    return [value.text for value in found]


# -- the protocol (XEP-0050)


@pytest.mark.wire
def test_an_administrator_finds_the_commands(server, nurse) -> None:
    """XEP-0050 §2.1, §2.2, XEP-0133 §3"""
    nurse.sends(f"<iq type='get' id='1' to='example.org'><query xmlns='{ITEMS}' node='{COMMANDS}'/></iq>")
    items = nurse.receives(f"<iq type='result' id='1'><query xmlns='{ITEMS}' node='{COMMANDS}'>...</query></iq>")[0]
    names = {item.get("node"): item.get("name") for item in items}
    assert names[f"{ADMIN}#add-user"] == "Add a user" and len(names) >= 16
    for node in names:
        nurse.sends(f"<iq type='get' id='2' to='example.org'><query xmlns='{INFO}' node='{node}'/></iq>")
        nurse.receives(f"<iq type='result' id='2'><query xmlns='{INFO}' node='{node}'>"
                       f"<identity category='automation' type='command-node' name='*'/>"
                       f"<feature var='{COMMANDS}'/><feature var='{DATA}'/></query></iq>")  # fmt: skip
    nurse.sends(f"<iq type='get' id='3' to='example.org'><query xmlns='{INFO}'/></iq>")
    features = nurse.receives(f"<iq type='result' id='3'><query xmlns='{INFO}'>...</query></iq>")[0]
    assert COMMANDS in [feature.get("var") for feature in features]


def test_nobody_else_finds_or_runs_them(server, romeo) -> None:
    """XEP-0050 §4.4"""
    romeo.sends(f"<iq type='get' id='1' to='example.org'><query xmlns='{ITEMS}' node='{COMMANDS}'/></iq>")
    items = romeo.receives(f"<iq type='result' id='1'><query xmlns='{ITEMS}' node='{COMMANDS}'>...</query></iq>")[0]
    assert not [item for item in items if ADMIN in item.get("node", "")]
    romeo.sends(f"<iq type='get' id='c' to='example.org'><query xmlns='{INFO}' node='{ADMIN}#add-user'/></iq>")
    is_refused(romeo, "forbidden")
    asks(romeo, "shutdown")
    is_refused(romeo, "forbidden")


def test_an_administrators_name_elsewhere_is_nobodys(server, elsewhere: Elsewhere) -> None:
    """S53 (CVE-2020-8086): the whole address counts."""
    host = server.server.domains["example.org"]
    command = f"<command xmlns='{COMMANDS}' node='{ADMIN}#shutdown'/>"
    request = f"<iq type='set' id='c' from='nurse@example.com/x' to='example.org'>{command}</iq>"
    with pytest.raises(xmppd.StanzaError, match="forbidden"):
        host.receive(xmppd.parse_element(request), xmppd.JID("", "example.org", ""))


def test_an_administrators_name_on_another_host_is_nobodys(server) -> None:
    """S53"""
    server.add_account("nurse@example.net")
    other = server.client(host="example.net").login("nurse")
    for host in ("example.net", "example.org"):
        asks(other, "shutdown", host=host)
        is_refused(other, "forbidden")


@pytest.mark.parametrize(("name", "action", "condition", "special"), [
    ("unknown", "execute", "item-not-found", ""),
    ("announce", "explode", "bad-request", "malformed-action"),
    ("announce", "next", "bad-request", "bad-action"),
    ("announce", "prev", "bad-request", "bad-action"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(nurse, name: str, action: str, condition: str, special: str) -> None:
    """XEP-0050 §4.4, table 5"""
    asks(nurse, name, action=action)
    is_refused(nurse, condition, special)


def test_a_session_belongs_to_its_asker_and_its_command_and_ends(server, nurse) -> None:
    """XEP-0050 §3.3, §4.4"""
    session = begins(nurse, "announce", "announcement")
    other = server.client().login("nurse", resource="elsewhere")
    asks(other, "announce", session=session, form=filled(announcement="O"))
    is_refused(other, "not-allowed", "session-expired")
    asks(nurse, "user-stats", session=session, form=filled(accountjid="romeo@example.org"))
    is_refused(nurse, "bad-request", "bad-sessionid")
    asks(nurse, "announce", session="invented", form=filled(announcement="O"))
    is_refused(nurse, "not-allowed", "session-expired")
    asks(nurse, "announce", session=session, form=filled(announcement="O"))
    completed(nurse, "announce")
    asks(nurse, "announce", session=session, form=filled(announcement="O"))
    is_refused(nurse, "not-allowed", "session-expired")


def test_a_form_may_be_given_up(nurse) -> None:
    """XEP-0050 §2.4.3"""
    session = begins(nurse, "announce", "announcement")
    asks(nurse, "announce", action="cancel", session=session)
    nurse.receives(f"<iq type='result' id='c'><command xmlns='{COMMANDS}' node='{ADMIN}#announce' "
                   f"sessionid='{session}' status='canceled'/></iq>")  # fmt: skip
    asks(nurse, "announce", session=session, form=filled(announcement="O"))
    is_refused(nurse, "not-allowed", "session-expired")


def test_a_form_waits_for_a_quarter_of_an_hour(server, nurse) -> None:
    """XEP-0050 §3.3"""
    session = begins(nurse, "announce", "announcement")
    server.clock.skip(901)
    asks(nurse, "announce", session=session, form=filled(announcement="O"))
    is_refused(nurse, "not-allowed", "session-expired")


def test_only_so_many_forms_wait(server, nurse) -> None:
    first = begins(nurse, "announce", "announcement")
    for _ in range(100):
        begins(nurse, "announce", "announcement")
    assert len(server.server.registry.feature(xmppd.AdHocCommands)._sessions) == 100
    asks(nurse, "announce", session=first, form=filled(announcement="O"))
    is_refused(nurse, "not-allowed", "session-expired")


def test_a_mistake_in_a_form_can_be_mended(nurse) -> None:
    """XEP-0050 §4.4, XEP-0004 §3.1"""
    session = begins(nurse, "add-user", "accountjid", "password", "password-verify")
    asks(nurse, "add-user", session=session)
    is_refused(nurse, "bad-request", "bad-payload")
    for wrong in (
        {"accountjid": "paris@example.org"},
        {"accountjid": "paris@example.org", "password": "abc", "password_verify": "abd"},
        {"accountjid": "paris@example.org", "password": "&#x7;"},
        {"accountjid": "paris@elsewhere.example", "password": "abc"},
        {"accountjid": "romeo@example.org", "password": "abc"},
    ):
        if "&#x7;" in wrong.values():
            wrong["password"] = "\u0627\u0031x\u0061"  # RFC 4013 §2.3: right-to-left and left-to-right mixed
        asks(nurse, "add-user", session=session, form=filled(**wrong))
        error = nurse.receives("<iq type='error' id='c'>...</iq>").find("{jabber:client}error")
        assert any(child.tag.endswith("}not-acceptable") for child in error), ET.tostring(error)
    asks(nurse, "add-user", session=session, form=filled(accountjid="paris@example.org", password="abc"))
    completed(nurse, "add-user")


# -- the commands (XEP-0133)


@pytest.mark.wire
def test_a_user_is_added_and_deleted(server, nurse) -> None:
    """XEP-0133 §4.1, §4.2"""
    does(nurse, "add-user", accountjid="paris@example.org", password="county", password_verify="county")
    paris = server.client().login("paris", password="county")
    does(nurse, "delete-user", accountjids=["paris@example.org"])
    paris.receives_stream_error("not-authorized")
    assert paris.is_closed()
    session = begins(nurse, "delete-user", "accountjids")
    asks(nurse, "delete-user", session=session, form=filled(accountjids=["paris@example.org"]))
    is_refused(nurse, "item-not-found")


@pytest.mark.parametrize("name", ["delete-user", "disable-user"])
def test_nobody_saws_at_the_own_branch(server, nurse, name: str) -> None:
    """And of several accounts all are touched, or none."""
    session = begins(nurse, name, "accountjids")
    asks(nurse, name, session=session, form=filled(accountjids=["romeo@example.org", "nurse@example.org"]))
    error = nurse.receives("<iq type='error' id='c'>...</iq>").find("{jabber:client}error")
    assert any(child.tag.endswith("}not-allowed") for child in error)
    assert not server.server.account(ROMEO).get("disabled") or name == "delete-user"


def test_a_user_is_disabled_and_enabled_again(server, nurse, romeo) -> None:
    """XEP-0133 §4.3, §4.4"""
    does(nurse, "disable-user", accountjids=["romeo@example.org"])
    romeo.receives_stream_error("not-authorized")
    assert romeo.is_closed()
    romeo.connect()
    romeo.negotiates()
    romeo.starts_tls()
    romeo.negotiates()
    romeo.sends_auth("PLAIN", f"\0romeo\0{password_of('romeo')}".encode())
    romeo.receives_failure("account-disabled")
    does(nurse, "reenable-user", accountjids=["romeo@example.org"])
    romeo.sends_auth("PLAIN", f"\0romeo\0{password_of('romeo')}".encode())
    romeo.receives("<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")


def test_sessions_are_ended(server, nurse, romeo) -> None:
    """XEP-0133 §4.5: one of them, or all; S33: and then no token is good."""
    other = server.client().login("romeo", resource="garden")
    fast = server.server.registry.feature(xmppd.FastLogin)
    fast.clients.put(ROMEO, "phone", {"new": {"seed": "x", "mechanism": "HT-SHA-256-NONE", "issued": 0, "count": 0}})
    result = does(nurse, "end-user-session", accountjids=["romeo@example.org/orchard"])
    assert result.findtext(f"{{{COMMANDS}}}note") == "1 sessions are over"
    romeo.receives_stream_error("policy-violation")
    assert romeo.is_closed() and fast.clients.items(ROMEO)
    does(nurse, "end-user-session", accountjids=["romeo@example.org"])
    other.receives_stream_error("policy-violation")
    assert other.is_closed() and not fast.clients.items(ROMEO)


def test_a_password_is_changed(server, nurse, romeo) -> None:
    """XEP-0133 §4.7, S33"""
    does(nurse, "change-user-password", accountjid="romeo@example.org", password="new", password_verify="new")
    romeo.receives_stream_error("reset")
    assert romeo.is_closed()
    romeo.login("romeo", password="new")


def test_a_users_contacts_and_numbers_are_seen(server, nurse, romeo, juliet) -> None:
    """XEP-0133 §4.8, §4.9, §4.10"""
    romeo.befriends(juliet)
    roster = does(nurse, "get-user-roster", accountjid="romeo@example.org")
    items = list(roster.iter("{jabber:iq:roster}item"))
    assert [(item.get("jid"), item.get("subscription")) for item in items] == [("juliet@example.org", "both")]
    numbers = does(nurse, "user-stats", accountjid="romeo@example.org")
    assert values_of(numbers, "rostersize") == ["1"]
    assert values_of(numbers, "onlineresources") == ["orchard"]
    assert values_of(numbers, "ipaddresses") == ["127.0.0.1"]
    last = does(nurse, "get-user-lastlogin", accountjid="romeo@example.org")
    assert xmppd.parse_stamp(values_of(last, "lastlogin")[0] or "")
    last = does(nurse, "get-user-lastlogin", accountjid="benvolio@example.org")
    assert values_of(last, "lastlogin") == ["never"]


def test_users_are_counted_and_listed(server, nurse, romeo) -> None:
    """XEP-0133 §4.13, §4.15, §4.18, §4.20"""
    for name, var, number in (("get-registered-users-num", "registeredusersnum", "4"),
                              ("get-online-users-num", "onlineusersnum", "2")):  # fmt: skip
        asks(nurse, name)
        assert values_of(completed(nurse, name), var) == [number]
    online = does(nurse, "get-online-users-list", max_items="25")
    assert values_of(online, "onlineuserjids") == ["nurse@example.org", "romeo@example.org"]
    for number in range(30):
        server.server.accounts[xmppd.JID(f"user{number}", "example.org", "")] = {"credentials": {}}
    listed = does(nurse, "get-registered-users-list", max_items="25")
    assert len(values_of(listed, "registereduserjids")) == 25
    assert listed.findtext(f"{{{COMMANDS}}}note") == "25 of 34"
    assert len(values_of(does(nurse, "get-registered-users-list", max_items="none"), "registereduserjids")) == 34


def test_everybody_online_hears_an_announcement(server, nurse, romeo, juliet) -> None:
    """XEP-0133 §4.23"""
    romeo.comes_online()
    does(nurse, "announce", announcement=["The feast begins.", "Come all!"])
    romeo.receives("<message type='headline' from='example.org'><subject>Announcement</subject>"
                   "<body>The feast begins.\nCome all!</body></message>")  # fmt: skip
    juliet.receives_nothing()


@pytest.mark.parametrize(("name", "again"), [("restart", True), ("shutdown", False)])
def test_the_run_ends_in_a_while(server: MemoryServer, nurse, romeo, name: str, again: bool) -> None:
    """XEP-0133 §4.30, §4.31"""
    ended: list[bool] = []
    server.server.end_run = ended.append
    romeo.comes_online()
    does(nurse, name, delay="120", announcement="Off to bed.")
    romeo.receives("<message type='headline' from='example.org'><subject>Announcement</subject>"
                   "<body>Off to bed.</body></message>")  # fmt: skip
    server.clock.skip(119)
    nurse.passes_barrier()
    assert not ended
    server.clock.skip(2)
    nurse.passes_barrier()
    assert ended == [again]


@pytest.mark.config(**WITH_ADMIN)
def test_a_restarted_server_is_there_again(process_server) -> None:
    """XEP-0133 §4.30: the same process serves again, on other ports, as the system chose them here."""
    nurse = process_server.client().login("nurse")
    does(nurse, "restart", delay="0", announcement="")
    nurse.receives_stream_error("system-shutdown")
    assert nurse.is_closed()
    ready = process_server.process.wait_for("ready: ")
    process_server.ports = {"client": int(ready.partition("client 127.0.0.1:")[2].split(",")[0])}
    process_server.client().login("nurse").closes()


def test_a_client_shuts_the_server_down(process_server) -> None:
    """XEP-0133 §4.31"""
    nurse = process_server.client().login("nurse")
    does(nurse, "shutdown", delay="0", announcement="")
    nurse.receives_stream_error("system-shutdown")
    assert nurse.is_closed()
    assert process_server.process.process.wait(15) == 0


def test_traces_hide_passwords_and_invitations(server: MemoryServer, nurse) -> None:
    """S86"""
    lines: list[str] = []
    server.server.trace = xmppd.Trace(lines.append, colour=False)
    does(nurse, "add-user", accountjid="paris@example.org", password="county-secret", password_verify="county-secret")
    nurse.sends(f"<iq type='set' id='c' to='example.org'><command xmlns='{COMMANDS}' node='urn:xmpp:invite#invite'/></iq>")
    made = nurse.receives(f"<iq type='result' id='c'><command xmlns='{COMMANDS}' ...>...</command></iq>")
    token = (values_of(made, "uri")[0] or "").partition("preauth=")[2].partition(";")[0]
    text = "\n".join(lines)
    assert "paris@example.org" in text and "county-secret" not in text
    assert len(token) == 32 and token not in text


# -- contact addresses (XEP-0157)


@pytest.mark.config(contact={"abuse": ["mailto:abuse@example.org", "xmpp:nurse@example.org"], "support": ["https://a/"]})
def test_the_server_says_whom_to_write_to(server, romeo) -> None:
    """XEP-0157 §3"""
    romeo.sends(f"<iq type='get' id='1' to='example.org'><query xmlns='{INFO}'/></iq>")
    info = romeo.receives(f"<iq type='result' id='1'><query xmlns='{INFO}'>...</query></iq>")[0]
    form = info.find(f"{{{DATA}}}x")
    assert form.get("type") == "result"
    assert {field.get("var"): [value.text for value in field] for field in form} == {
        "FORM_TYPE": ["http://jabber.org/network/serverinfo"],
        "abuse-addresses": ["mailto:abuse@example.org", "xmpp:nurse@example.org"],
        "support-addresses": ["https://a/"],
    }


def test_who_names_nobody_shows_no_form(server, romeo) -> None:
    romeo.sends(f"<iq type='get' id='1' to='example.org'><query xmlns='{INFO}'/></iq>")
    info = romeo.receives(f"<iq type='result' id='1'><query xmlns='{INFO}'>...</query></iq>")[0]
    assert info.find(f"{{{DATA}}}x") is None


# -- reports (XEP-0377)


def blocks(who: Client, report: str, jid: str = "tybalt@example.com") -> None:
    who.sends(f"<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{jid}'>{report}</item></block></iq>")
    who.receives("<iq type='result' id='b'/>")


@pytest.mark.wire
@pytest.mark.parametrize("report", [
    "<report xmlns='urn:xmpp:reporting:1' reason='urn:xmpp:reporting:spam'><text xml:lang='en'>Fie!</text>"
    "<stanza-id xmlns='urn:xmpp:sid:0' by='example.org' id='1'/></report>",
    "<report xmlns='urn:xmpp:reporting:0'><text>Fie!</text><spam/></report>",
])  # fmt: skip
def test_a_block_may_come_with_a_report(server, nurse, romeo, report: str) -> None:
    """XEP-0377 §4, §6: the administrators get it; the block counts as any other."""
    nurse.comes_online()
    blocks(romeo, report)
    nurse.receives("<message from='example.org' to='nurse@example.org' ...><subject>spam: tybalt@example.com</subject>"
                   "<body>romeo@example.org reports tybalt@example.com for spam. Fie!</body></message>")  # fmt: skip
    romeo.sends("<iq type='get' id='l'><blocklist xmlns='urn:xmpp:blocking'/></iq>")
    romeo.receives("<iq type='result' id='l'><blocklist xmlns='urn:xmpp:blocking'>"
                   "<item jid='tybalt@example.com'/></blocklist></iq>")  # fmt: skip


def test_reports_are_kept_and_bounded(server, nurse, romeo) -> None:
    """XEP-0377 §6: what is no report is none; a wave of them ends here, and each block counts all the same."""
    blocks(romeo, "<report xmlns='urn:xmpp:reporting:1' reason='urn:example:dislike'/>")
    text = "long " * 1000
    for number in range(15):
        blocks(romeo, f"<report xmlns='urn:xmpp:reporting:1' reason='urn:xmpp:reporting:abuse'><text>{text}</text></report>",
               f"t{number}@example.com")  # fmt: skip
    records = server.server.storage.log("reports").read(xmppd.JID("", "example.org", ""))
    assert len(records) == 10
    assert (records[0]["by"], records[0]["jid"], records[0]["reason"]) == ("romeo@example.org", "t0@example.com", "abuse")
    assert len(records[0]["text"]) == 1000
    assert len(server.server.registry.feature(xmppd.Privacy).blocked(ROMEO)) == 16


def test_reporting_is_announced(server, romeo) -> None:
    """XEP-0377 §3; and by the name that Conversations looks for."""
    romeo.sends(f"<iq type='get' id='1' to='example.org'><query xmlns='{INFO}'/></iq>")
    info = romeo.receives(f"<iq type='result' id='1'><query xmlns='{INFO}'>...</query></iq>")[0]
    names = {feature.get("var") for feature in info}
    assert {"urn:xmpp:reporting:1", "urn:xmpp:reporting:reason:spam:0"} <= names
