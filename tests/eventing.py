"""Words for the dialogues about publish-subscribe: requests, events, and clients that want to be told.

    juliet.sends(publish(MOOD, item("m1", "<mood xmlns='...'/>")))
    juliet.receives(published(MOOD, "m1"))
    romeo.receives(event(MOOD, item("m1", "<mood xmlns='...'/>"), by="juliet@example.org/balcony"))
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterable
from xml.sax.saxutils import quoteattr

from tests.dialogue import DISCO_INFO, Client

PUBSUB = "http://jabber.org/protocol/pubsub"
OWNER = f"{PUBSUB}#owner"
EVENT = f"{PUBSUB}#event"
CAPS = "http://jabber.org/protocol/caps"
MOOD = "http://jabber.org/protocol/mood"
TUNE = "http://jabber.org/protocol/tune"
BOOKMARKS = "urn:xmpp:bookmarks:1"
HAPPY = f"<mood xmlns='{MOOD}'><happy/></mood>"
SAD = f"<mood xmlns='{MOOD}'><sad/></mood>"
JULIET, ROMEO, NURSE = "juliet@example.org", "romeo@example.org", "nurse@example.org"
FROM_BALCONY = f"{JULIET}/balcony"
VERSIONS = itertools.count()  # of the clients' software: each is new to the server, which has to ask


# ---- requests -------------------------------------------------------------------------


def request(content: str, *, type: str = "set", to: str = "", id: str = "p", namespace: str = PUBSUB) -> str:
    """Return an IQ with a <pubsub/>."""
    address = f" to='{to}'" if to else ""
    return f"<iq type='{type}' id='{id}'{address}><pubsub xmlns='{namespace}'>{content}</pubsub></iq>"


def item(id: str, payload: str = HAPPY) -> str:
    """Return an item, to be published or expected."""
    return f"<item id='{id}'>{payload}</item>" if payload else f"<item id='{id}'/>"


def form(fields: dict[str, str], kind: str, type: str = "submit") -> str:
    """Return a form of XEP-0060 with these fields, named without their prefix."""
    texts = [
        f"<field var='pubsub#{name}'>{''.join(f'<value>{line}</value>' for line in value.split(','))}</field>"
        for name, value in fields.items()
    ]
    kind_field = f"<field var='FORM_TYPE' type='hidden'><value>{PUBSUB}#{kind}</value></field>"
    return f"<x xmlns='jabber:x:data' type='{type}'>{kind_field}{''.join(texts)}</x>"


def publish(node: str, *items: str, to: str = "", id: str = "p", **options: str) -> str:
    """Return a request to publish (§7.1.1), with publish-options if there are any (§7.1.5)."""
    publishing = f"<publish node={quoteattr(node)}>{''.join(items)}</publish>"
    conditions = f"<publish-options>{form(options, 'publish-options')}</publish-options>" if options else ""
    return request(publishing + conditions, to=to, id=id)


def published(node: str, *ids: str, id: str = "p") -> str:
    """Return the answer to that."""
    items = "".join(f"<item id='{name}'/>" for name in ids)
    return f"<iq type='result' id='{id}'><pubsub xmlns='{PUBSUB}'><publish node='{node}'>{items}</publish></pubsub></iq>"


def retract(node: str, *ids: str, to: str = "", notify: str = "", id: str = "p") -> str:
    """Return a request to remove items (§7.2.1)."""
    items = "".join(f"<item id='{name}'/>" for name in ids)
    attribute = f" notify='{notify}'" if notify else ""
    return request(f"<retract node='{node}'{attribute}>{items}</retract>", to=to, id=id)


def ask_items(node: str, inside: str = "", *, to: str = JULIET, most: str = "", beside: str = "", id: str = "p") -> str:
    """Return a request for items (§6.5)."""
    attribute = f" max_items='{most}'" if most else ""
    return request(f"<items node='{node}'{attribute}>{inside}</items>{beside}", type="get", to=to, id=id)


def items_of(node: str, *items: str, beside: str = "", id: str = "p") -> str:
    """Return the answer to that."""
    found = f"<items node='{node}'>{''.join(items)}</items>{beside}"
    return f"<iq type='result' id='{id}'><pubsub xmlns='{PUBSUB}'>{found}</pubsub></iq>"


def configure(node: str, *, id: str = "p", **fields: str) -> str:
    """Return a request to configure a node (§8.2.4)."""
    asked = f"<configure node='{node}'>{form(fields, 'node_config')}</configure>"
    return request(asked, id=id, namespace=OWNER)


def subscribe(node: str, jid: str, *, to: str = JULIET, id: str = "p") -> str:
    """Return a request to subscribe (§6.1.1)."""
    return request(f"<subscribe node='{node}' jid='{jid}'/>", to=to, id=id)


def subscribed(node: str, jid: str, state: str = "subscribed", *, id: str = "p") -> str:
    """Return the answer to that (§6.1.2)."""
    found = f"<subscription node='{node}' jid='{jid}' subscription='{state}'/>"
    return f"<iq type='result' id='{id}'><pubsub xmlns='{PUBSUB}'>{found}</pubsub></iq>"


def done(id: str = "p") -> str:
    """Return an empty result."""
    return f"<iq type='result' id='{id}'/>"


def error(condition: str, detail: str = "", *, id: str = "p", feature: str = "") -> str:
    """Return an error, with XEP-0060's own condition if there is one (§11)."""
    attribute = f" feature='{feature}'" if feature else ""
    own = f"<{detail} xmlns='{PUBSUB}#errors'{attribute}/>" if detail else ""
    return f"<iq type='error' id='{id}'><error type='*'><{condition} .../>{own}</error></iq>"


# ---- events ---------------------------------------------------------------------------


def event(node: str, *items: str, by: str = "", owner: str = JULIET, delayed: bool = False, **address: str) -> str:
    """Return a notification (XEP-0163 §4.3.1); `by` is the resource that replies go to, for those who may know it."""
    reply_to = f"<addresses xmlns='http://jabber.org/protocol/address'><address type='replyto' jid='{by}'/></addresses>"
    delay = f"<delay xmlns='urn:xmpp:delay' from='{owner}' stamp='*'/>"
    to = f" to='{address['to']}'" if address else ""
    return (
        f"<message from='{owner}' type='headline' id='*'{to}><event xmlns='{EVENT}'><items node='{node}'>"
        f"{''.join(items)}</items></event>{delay if delayed else ''}{reply_to if by else ''}</message>"
    )


def plain_event(inside: str, owner: str = JULIET, type: str = " type='headline'") -> str:
    """Return a notification of another kind."""
    return f"<message from='{owner}'{type} id='*'><event xmlns='{EVENT}'>{inside}</event></message>"


# ---- clients with wishes --------------------------------------------------------------


def capabilities(name: str, nodes: Iterable[str]) -> tuple[str, str]:
    """Return the `ver` of a client that wants to hear of these nodes, and what it answers (XEP-0115 §5.1)."""
    features = sorted([f"{node}+notify" for node in nodes] + [CAPS, DISCO_INFO])
    text = f"client/pc//{name}<" + "".join(f"{feature}<" for feature in features)
    ver = base64.b64encode(hashlib.sha1(text.encode()).digest()).decode()
    listed = "".join(f"<feature var={quoteattr(feature)}/>" for feature in features)
    return ver, f"<identity category='client' type='pc' name='{name}'/>{listed}"


def with_caps(ver: str) -> str:
    """Return the element of a presence with that hash."""
    return f"<c xmlns='{CAPS}' hash='sha-1' node='https://client.example' ver='{ver}'/>"


def answer(question: object, info: str) -> str:
    """Return the answer to a server's question; `info` is what is in it."""
    get = question.get  # type: ignore[attr-defined]
    node = question[0].get("node")  # type: ignore[index]
    about = f" node='{node}'" if node else ""
    return (
        f"<iq type='result' id='{get('id')}' to='{get('from')}'><query xmlns='{DISCO_INFO}'{about}>{info}</query></iq>"
    )


def comes_online(client: Client, *nodes: str, content: str = "") -> str:
    """Send initial presence, and answer the server's question: the client wants to hear of these nodes.

    What came before the answer is forgotten; what it brings is still to be received. Returns the hash.
    """
    ver, info = capabilities(f"{client.jid} {next(VERSIONS)}", nodes)
    client.passes_barrier()  # so that what the server has asked before is ignored
    client.hears_questions = True
    client.sends("<iq type='get' id='roster'><query xmlns='jabber:iq:roster'/></iq>")
    client.sends(f"<presence>{with_caps(ver)}{content}</presence>")
    [question] = [stanza for stanza in client.receives_anything() if is_question(stanza)]
    client.hears_questions = False
    client.sends(answer(question, info))
    client.passes_barrier()
    return ver


def is_question(stanza: object) -> bool:
    """Whether the server asks what a client can do."""
    return len(stanza) == 1 and stanza[0].tag == f"{{{DISCO_INFO}}}query" and stanza.get("type") == "get"  # type: ignore[arg-type,index,attr-defined]
