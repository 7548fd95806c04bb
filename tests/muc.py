"""The witches of XEP-0045 and their room: what the dialogues about multi-user chat have in common.

The test server is configured so that the addresses are those of the specification:
coven@chat.shakespeare.lit, in it firstwitch (crone1, the owner), secondwitch (wiccarocks,
an admin) and thirdwitch (hag66, no affiliation). `shown`, `said` and the like write the
patterns of what the room sends.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

import xmppd
from tests.dialogue import Client, parse, show
from tests.servers import MemoryServer, ProcessServer, credentials_of

HOST = "shakespeare.lit"
SERVICE = f"chat.{HOST}"
COVEN = f"coven@{SERVICE}"
CONFIG: dict[str, Any] = {"hosts": [HOST, "example.org"], "muc": {"host": "chat"}}

MUC = "http://jabber.org/protocol/muc"
USER = f"{MUC}#user"
ADMIN = f"{MUC}#admin"
OWNER = f"{MUC}#owner"
FORM = "jabber:x:data"
OCCUPANT = "<occupant-id xmlns='urn:xmpp:occupant-id:0' id='*'/>"
STANZA_ID = f"<stanza-id xmlns='urn:xmpp:sid:0' by='{COVEN}' id='*'/>"
DELAY = f"<delay xmlns='urn:xmpp:delay' from='{COVEN}' stamp='*Z'/>"
NO_SUBJECT = f"<message type='groupchat' from='{COVEN}'><subject/></message>"

ADDRESSES = {
    "firstwitch": f"crone1@{HOST}/desktop",
    "secondwitch": f"wiccarocks@{HOST}/laptop",
    "thirdwitch": f"hag66@{HOST}/pda",
    "hecate": f"hecate@{HOST}/broom",
}
Server = MemoryServer | ProcessServer


def person(server: Server, jid: str) -> Client:
    """Log somebody in who has no account yet, or has one."""
    address = xmppd.JID.parse(jid)
    if isinstance(server, MemoryServer) and address.bare not in server.server.accounts:
        server.server.create_account(address.bare, credentials_of(address.local))
    return server.client(host=address.domain).login(address.local, resource=address.resource)


def witch(server: Server, nick: str) -> Client:
    """Log in the person who uses this nickname."""
    return person(server, ADDRESSES[nick])


class Witches(NamedTuple):
    """Who is in the coven."""

    crone: Client  # firstwitch, owner
    wicca: Client  # secondwitch, admin
    hag: Client  # thirdwitch


def enter(nick: str, inner: str = "", room: str = COVEN, more: str = "") -> str:
    """Write what one sends to enter a room."""
    return f"<presence id='n13mt3l' to='{room}/{nick}'>{more}<x xmlns='{MUC}'>{inner}</x></presence>"


def enters(client: Client, nick: str, inner: str = "", room: str = COVEN) -> list[ET.Element]:
    """Let somebody enter; returns all that they receive."""
    client.sends(enter(nick, inner, room))
    return client.receives_anything()


def form(kind: str = "roomconfig", **fields: Any) -> str:
    """Write a submission: `roomname='A Dark Cave'`, several values as a list."""
    written = []
    for name, value in fields.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        var = "muc#maxhistoryfetch" if name == "maxhistoryfetch" else f"muc#{kind}_{name}"
        texts = (str(int(each)) if isinstance(each, bool) else str(each) for each in values)
        written.append(f"<field var='{var}'>{''.join(f'<value>{text}</value>' for text in texts)}</field>")
    return (f"<x xmlns='{FORM}' type='submit'><field var='FORM_TYPE'><value>{MUC}#{kind}</value></field>"
            f"{''.join(written)}</x>") if fields else f"<x xmlns='{FORM}' type='submit'/>"  # fmt: skip


def configuring(room: str = COVEN, id: str = "create2", **fields: Any) -> str:
    """Write an owner's request to configure a room; without fields, to take the defaults."""
    return f"<iq type='set' id='{id}' to='{room}'><query xmlns='{OWNER}'>{form(**fields)}</query></iq>"


def configures(client: Client, room: str = COVEN, **fields: Any) -> None:
    """Let the owner configure the room; what else comes stays unread."""
    client.sends(configuring(room, **fields))
    client.passes_barrier()
    results = [stanza for stanza in client.unread() if stanza.get("id") == "create2"]
    assert [result.get("type") for result in results] == ["result"], [show(result) for result in results]
    take_out(client, results[0])


def take_out(client: Client, stanza: ET.Element) -> None:
    """Remove one stanza from a client's inbox."""
    client._inbox.remove(next(event for event in client._inbox if event.element is stanza))


def coven(server: Server, **fields: Any) -> Witches:
    """Open the coven with the three witches in it, configured; nobody has anything unread."""
    witches = Witches(*(witch(server, nick) for nick in ("firstwitch", "secondwitch", "thirdwitch")))
    enters(witches.crone, "firstwitch")
    configures(witches.crone, **{"roomadmins": [f"wiccarocks@{HOST}"], **fields})
    enters(witches.wicca, "secondwitch", password(fields))
    if not fields.get("membersonly"):
        enters(witches.hag, "thirdwitch", password(fields))
    forget(*witches)
    return witches


def password(fields: dict[str, object]) -> str:
    """Write the password of the room, if it has one."""
    return f"<password>{fields['roomsecret']}</password>" if "roomsecret" in fields else ""


def forget(*clients: Client) -> None:
    """Let everybody read what has come, and forget it."""
    for client in clients:
        client.receives_anything()
    for client in clients:
        client.forgets_unread()


def status(*codes: int) -> str:
    """Write status codes."""
    return "".join(f"<status code='{code}'/>" for code in codes)


def shown(nick: str, affiliation: str = "none", role: str = "participant", *codes: int, jid: bool | str = False,
          because: str = "", content: str = "", after: str = "", to: str = "", room: str = COVEN,
          **attributes: str) -> str:  # fmt: skip
    """Write an occupant's presence; `jid=True`: with the real address, a str: with that one."""
    address = ADDRESSES.get(nick, "*") if jid is True else jid
    real = f" jid='{address}'" if jid else ""
    new = f" nick='{attributes.pop('new')}'" if "new" in attributes else ""
    words = "".join(f" {name}='{value}'" for name, value in attributes.items())
    item = f"<item affiliation='{affiliation}' role='{role}'{real}{new}>{because}</item>"
    return (f"<presence from='{room}/{nick}'{words}>{content}{OCCUPANT}"
            f"<x xmlns='{USER}'>{item}{after}{status(*codes)}</x></presence>")  # fmt: skip


def gone(nick: str, affiliation: str = "none", *codes: int, **more: Any) -> str:
    """Write the presence of somebody who leaves."""
    return shown(nick, affiliation, "none", *codes, type="unavailable", **more)


def said(nick: str, body: str, *, id: str = "", more: str = "") -> str:
    """Write what everybody receives when somebody speaks."""
    words = f" id='{id}'" if id else ""
    return (f"<message type='groupchat' from='{COVEN}/{nick}'{words}><body>{body}</body>{more}"
            f"{OCCUPANT}{STANZA_ID}</message>")  # fmt: skip


def saying(body: str, more: str = "", room: str = COVEN, id: str = "") -> str:
    """Write what somebody sends to speak."""
    words = f" id='{id}'" if id else ""
    return f"<message type='groupchat' to='{room}'{words}><body>{body}</body>{more}</message>"


def administering(*items: str, id: str = "admin1", room: str = COVEN) -> str:
    """Write an admin's request: `"nick='thirdwitch' role='none'"`."""
    written = "".join(item if item.startswith("<") else f"<item {item}/>" for item in items)
    return f"<iq type='set' id='{id}' to='{room}'><query xmlns='{ADMIN}'>{written}</query></iq>"


def listing(item: str, id: str = "list1", room: str = COVEN) -> str:
    """Write the request for a list: `"affiliation='member'"`."""
    return f"<iq type='get' id='{id}' to='{room}'><query xmlns='{ADMIN}'><item {item}/></query></iq>"


def listed(*items: str, id: str = "list1") -> str:
    """Write the answer to `listing`."""
    written = "".join(item if item.startswith("<") else f"<item {item}/>" for item in items)
    return f"<iq type='result' id='{id}'><query xmlns='{ADMIN}'>{written}</query></iq>"


def result(id: str = "admin1") -> str:
    """Write an empty result."""
    return f"<iq type='result' id='{id}'/>"


KINDS = {"not-authorized": "auth", "forbidden": "auth", "registration-required": "auth", "jid-malformed": "modify",
         "bad-request": "modify", "not-acceptable": "modify", "policy-violation": "modify",
         "resource-constraint": "wait"}  # fmt: skip


def refused(condition: str, id: str = "admin1", kind: str = "iq", type: str = "") -> str:
    """Write an error; that of a presence has an empty `<x/>` (§7.2.5)."""
    type = type or KINDS.get(condition, "cancel")
    entry = f"<x xmlns='{MUC}'/>" if kind == "presence" else ""
    return f"<{kind} type='error' id='{id}'>{entry}<error type='{type}'><{condition} .../></error></{kind}>"


def lacks(expected: ET.Element, actual: ET.Element) -> str:
    """Return what the specification's stanza has and the actual one has not; ids and stamps are the service's own."""
    if expected.tag != actual.tag:
        return f"<{expected.tag}>"
    for name, value in expected.items():
        is_own = name == "stamp" or (name == "id" and not expected.tag.endswith("}iq"))
        if actual.get(name) != value and not is_own:
            return f"{name}={value!r} in {show(actual)}"
    if (expected.text or "").split() != (actual.text or "").split():
        return f"{expected.text!r} in {show(actual)}"
    for child in expected:
        if all(lacks(child, other) for other in actual):
            return f"{show(child)} in {show(actual)}"
    return ""


def hears(client: Client, *examples: str) -> None:
    """Check that the specification's stanzas come next; what the server adds to them is allowed."""
    for expected in (stanza for example in examples for stanza in parse(example)):
        actual = client.receives(f"<{expected.tag.rpartition('}')[2]} ...>...</{expected.tag.rpartition('}')[2]}>")
        wrong = lacks(expected, actual)
        assert not wrong, f"{client.jid} misses {wrong}"
