"""People on different servers: two xmppd, Debian's Prosody and ejabberd, in both directions.

Between domains with certificates that all trust (and where both ends insist on them), and
between domains whose certificates nobody knows, where dialback has to do.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import xmppd
from tests.bench.servers import NotInstalled, debian_version
from tests.gateway import Gateway
from tests.interop.internet import CAPS, Ejabberd, Internet, Node, Person, Prosody, Xmppd, wait_until

pytestmark = pytest.mark.timeout(180)

ADDRESSES = {"verona": "127.0.0.2", "mantua": "127.0.0.3", "prosody": "127.0.0.4", "ejabberd": "127.0.0.5"}
KINDS: dict[str, type[Node]] = {"verona": Xmppd, "mantua": Xmppd, "prosody": Prosody, "ejabberd": Ejabberd}
NUMBERS = count(1)


class Servers:
    """The servers of this run, each started when it is first wanted."""

    def __init__(self) -> None:
        self.internet = Internet()
        self.running: dict[str, Node] = {}

    def get(self, name: str) -> Node:
        """Return a running server, or skip the test if its package is not installed."""
        if name in ("prosody", "ejabberd"):
            try:
                debian_version(name)
            except NotInstalled as reason:
                pytest.skip(f"{reason}; .ci/run installs it")
        if name not in self.running:
            node = KINDS[name](self.internet, name, ADDRESSES[name])
            node.start()
            self.running[name] = node
        return self.running[name]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.internet.close()


def domains(node: Node, trust: str) -> str:
    return node.good if trust == "certificate" else node.own


# -- what people do


def befriend(one: Person, other: Person) -> None:
    """RFC6121-3.1: subscription in both directions, and presence with it."""
    one.sends(f"<presence type='subscribe' to='{other.bare}'/>")
    other.awaits("presence", type="subscribe", from_=one.bare)
    other.sends(f"<presence type='subscribed' to='{one.bare}'/><presence type='subscribe' to='{one.bare}'/>")
    one.awaits("presence", type="subscribed", from_=other.bare)
    one.awaits("presence", from_=other.jid)
    one.awaits("presence", type="subscribe", from_=other.bare)
    one.sends(f"<presence type='subscribed' to='{other.bare}'/>")
    other.awaits("presence", type="subscribed", from_=one.bare)
    other.awaits("presence", from_=one.jid)
    for speaker, listener in ((one, other), (other, one)):
        speaker.sends(f"<presence><show>away</show>{CAPS}</presence>")
        listener.awaits("presence", from_=speaker.jid, show="away")


def talk(one: Person, other: Person) -> None:
    """Messages to bare and full addresses arrive; to nobody, they don't."""
    for speaker, listener in ((one, other), (other, one)):
        for to in (listener.bare, listener.jid):
            body = f"words {next(NUMBERS)}"
            speaker.sends(f"<message type='chat' to='{to}'><body>{body}</body></message>")
            listener.awaits("message", type="chat", from_=speaker.jid, body=body)


def meet(owner: Person, guest: Person) -> None:
    """XEP-0045: the guest enters a room of the owner's server."""
    room = f"room{next(NUMBERS)}@conference.{owner.host}"
    muc = "<x xmlns='http://jabber.org/protocol/muc'/>"
    owner.sends(f"<presence to='{room}/Owner'>{muc}</presence>")
    owner.awaits("presence", from_=f"{room}/Owner", item="*")
    form = "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>"
    owner.asks(f"<iq type='set' id='{room}' to='{room}'>{form}</iq>", room)
    guest.sends(f"<presence to='{room}/Guest'>{muc}</presence>")
    guest.awaits("presence", from_=f"{room}/Owner")
    guest.awaits("presence", from_=f"{room}/Guest")
    owner.awaits("presence", from_=f"{room}/Guest")
    for speaker, listener, nick in ((owner, guest, "Owner"), (guest, owner, "Guest")):
        speaker.sends(f"<message type='groupchat' to='{room}'><body>{nick} speaks</body></message>")
        listener.awaits("message", type="groupchat", from_=f"{room}/{nick}", body=f"{nick} speaks")
    guest.sends(f"<presence type='unavailable' to='{room}/Guest'/>")
    owner.awaits("presence", type="unavailable", from_=f"{room}/Guest")
    owner.sends(f"<presence type='unavailable' to='{room}/Owner'/>")


def show_picture(owner: Person, friend: Person) -> None:
    """XEP-0084 over XEP-0163: the friend is told, and fetches the picture."""
    data = f"picture {next(NUMBERS)}"
    id = hashlib.sha1(data.encode()).hexdigest()
    for node, payload in (
        ("data", f"<data xmlns='urn:xmpp:avatar:data'>{data.replace(' ', '')}</data>"),
        ("metadata", f"<metadata xmlns='urn:xmpp:avatar:metadata'><info bytes='9' id='{id}' type='image/png'/></metadata>"),
    ):
        publish = f"<publish node='urn:xmpp:avatar:{node}'><item id='{id}'>{payload}</item></publish>"
        owner.asks(f"<iq type='set' id='{node}'><pubsub xmlns='http://jabber.org/protocol/pubsub'>{publish}</pubsub></iq>", node)
    while True:
        news = friend.awaits("message", type="headline", from_=owner.bare, metadata="*")
        if any(info.get("id") == id for info in news.iter("{urn:xmpp:avatar:metadata}info")):
            break
    items = f"<items node='urn:xmpp:avatar:data'><item id='{id}'/></items>"
    question = f"<pubsub xmlns='http://jabber.org/protocol/pubsub'>{items}</pubsub>"
    answer = friend.asks(f"<iq type='get' id='{id}' to='{owner.bare}'>{question}</iq>", id)
    assert answer.findtext(".//{urn:xmpp:avatar:data}data") == data.replace(" ", "")


def block(one: Person, other: Person) -> None:
    """XEP-0191: the blocked one sees nothing and reaches nobody, until it is over."""
    is_told = "ejabberd" not in one.host  # ejabberd 23.01 sends the blocked one no presence
    for verb in ("block", "unblock"):
        item = f"<{verb} xmlns='urn:xmpp:blocking'><item jid='{other.bare}'/></{verb}>"
        one.asks(f"<iq type='set' id='{verb}'>{item}</iq>", verb)
        if is_told:
            other.awaits("presence", type="unavailable" if verb == "block" else "", from_=one.jid)
        if verb == "block":
            other.sends(f"<message type='chat' to='{one.bare}' id='blocked'><body>in vain</body></message>")
            other.awaits("message", type="error", id="blocked", from_=one.bare)
    talk(one, other)
    assert not any("in vain" in (text or "") for stanza in one.unread() for text in stanza.itertext())


def lose_the_connection(one: Person, other: Person, internet: Internet) -> None:
    """What `one` says while the connection breaks arrives in order, also what was on its way.

    The other server confirms what it gets by stream management (XEP-0198), which Prosody 0.12 has
    where streams begin with SASL, or else by answering a ping behind it.
    """
    relays = [internet.relays[person.host] for person in (one, other)]
    talk(one, other)
    before = sum(relay.passed for relay in relays)
    bodies = [f"sentence {next(NUMBERS)}" for _ in range(8)]
    for relay in relays:
        relay.hold()
    for body in bodies[:5]:
        one.sends(f"<message type='chat' to='{other.bare}'><body>{body}</body></message>")
    one.asks("<iq type='get' id='handed-over'><query xmlns='jabber:iq:roster'/></iq>", "handed-over")
    for relay in relays:
        relay.cut()
    for body in bodies[5:]:
        one.sends(f"<message type='chat' to='{other.bare}'><body>{body}</body></message>")
    came: dict[str | None, None] = {}  # what was confirmed too late comes again: better twice than never
    while not came.keys() >= set(bodies):
        came.setdefault(other.awaits("message", type="chat", from_=one.jid).findtext("{jabber:client}body"))
    assert [body for body in came if body in bodies] == bodies
    assert sum(relay.passed for relay in relays) > before
    talk(one, other)


def get_through_again(one: Person, other: Person, internet: Internet) -> None:
    """After a cut the other server finds the way back; what it loses before it notices is its own affair."""
    for person in (one, other):
        internet.relays[person.host].cut()
    body = f"sentence {next(NUMBERS)}"

    def arrives() -> bool:
        one.sends(f"<message type='chat' to='{other.bare}'><body>{body}</body></message>")
        return other.hears("message", type="chat", from_=one.jid, body=body)

    wait_until(arrives, lambda: f"{one.jid} does not get through again")


# -- between whom


def a_day(near: Node, far: Node, trust: str, servers: Servers) -> None:
    romeo = near.person("romeo", domains(near, trust))
    juliet = far.person("juliet", domains(far, trust))
    befriend(romeo, juliet)
    talk(romeo, juliet)
    for one, other in ((romeo, juliet), (juliet, romeo)):
        meet(one, other)
        show_picture(one, other)
        block(one, other)
    lose_the_connection(romeo, juliet, servers.internet)
    if far.name == "mantua":
        lose_the_connection(juliet, romeo, servers.internet)
    else:
        get_through_again(juliet, romeo, servers.internet)
    juliet.disconnects()
    romeo.awaits("presence", type="unavailable", from_=f"juliet@{domains(far, trust)}")
    romeo.disconnects()


@pytest.mark.parametrize("trust", ["certificate", "dialback"])
@pytest.mark.parametrize("far", ["mantua", "prosody", "ejabberd"])
def test_people_of_two_servers(servers: Servers, far: str, trust: str) -> None:
    a_day(servers.get("verona"), servers.get(far), trust, servers)


@pytest.mark.parametrize("far", ["mantua", "prosody", "ejabberd"])
def test_a_component_reaches_people_of_other_servers(servers: Servers, far: str) -> None:
    """XEP0114-3-10, XEP0114-3-12: by dialback for the component's own domain"""
    near, node = servers.get("verona"), servers.get(far)
    assert isinstance(near, Xmppd)
    gateway = Gateway((near.host, near.component_port), near.gateway).connects()
    juliet = node.person("juliet", node.own)
    sender = f"mercutio@{near.gateway}"
    gateway.sends(f"<message type='chat' from='{sender}' to='{juliet.bare}'><body>Nay</body></message>")
    juliet.awaits("message", type="chat", from_=sender, body="Nay")
    juliet.sends(f"<message type='chat' to='{sender}'><body>Ay</body></message>")
    gateway.receives(f"<message type='chat' from='{juliet.jid}' to='{sender}' ...><body>Ay</body></message>")
    gateway.closes()
    juliet.disconnects()


# -- what `xmppd check DOMAIN` says of them


def looked_at(servers: Servers, node: Node, domain: str, tmp_path: Path) -> tuple[int, str]:
    """Return exit status and output of the command, on a machine that trusts the tests' authority."""
    servers.internet.names.add(f"_xmpp-client._tcp.{domain}. 300 IN SRV 5 0 {node.client_port} xmpp.{domain}.")
    config = tmp_path / "xmppd.toml"
    config.write_text(f'hosts = ["mantua.example"]\n[federation]\nnameservers = ["{servers.internet.names.address}"]\n')
    command = [sys.executable, str(xmppd.__file__), "--config", str(config), "--data", str(tmp_path / "data"), "check", domain]
    environment = {**os.environ, "SSL_CERT_FILE": str(servers.internet.authority)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["verona", "prosody", "ejabberd"])
def test_check_finds_a_healthy_server_healthy_and_tells_what_ails_another(servers: Servers, tmp_path: Path, name: str) -> None:
    node = servers.get(name)
    status, said = looked_at(servers, node, node.good, tmp_path)
    assert (status, said.splitlines()[-1]) == (0, "all is well"), said
    for service in ("xmpp-client", "xmpp-server"):
        assert f"ok: {service}: {node.host} port " in said and "is from an authority that this machine knows" in said
    status, said = looked_at(servers, node, node.own, tmp_path)
    assert (status, said.splitlines()[-1]) == (1, "2 problems"), said
    assert said.count("its certificate doesn't verify: self") == 2, said
