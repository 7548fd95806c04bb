"""Promises that a reviewer found broken: each of these tests failed before it was mended."""

from __future__ import annotations

import base64
import hashlib
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import xmppd
from tests.dialogue import Client, password_of
from tests.servers import MemoryServer, configuration, write_configuration

PUBSUB = "http://jabber.org/protocol/pubsub"
MUC = "http://jabber.org/protocol/muc"
ROOM = "kitchen@conference.example.org"


# ---- durability -----------------------------------------------------------------------


def connected(folder: Path, **limits: int) -> tuple[Any, xmppd.Connection, socket.socket]:
    """Return a network in this process, one of its connections, and the peer's end of that."""
    config = xmppd.load_config(write_configuration(folder, configuration({"limits": limits})), data=folder / "data")
    loop = xmppd.Loop()
    storage = xmppd.Storage(config.data, loop, sync=False)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    network = xmppd.Network(config, loop, storage, None)
    return network, xmppd.Connection(network, ours, "127.0.0.1"), theirs


def test_what_did_not_fit_into_the_queue_is_not_reported_as_sent(tmp_path: Path) -> None:
    """Else offline messages would leave the log unsent: DESIGN §5, S11."""
    network, connection, theirs = connected(tmp_path, unread=65_536)
    sent: list[str] = []
    connection.write(b" " * 70_000)  # too much: the connection is about to end
    connection.write(b"<message/>")  # and this is dropped
    connection.when_sent(lambda: sent.append("the message"))
    network.loop.turn(0)
    theirs.close()
    network.storage.close()
    network.loop.close()
    assert not sent


# ---- logins and accounts --------------------------------------------------------------


@pytest.mark.config(compat={"iq_auth": True})
def test_a_login_by_iq_auth_does_not_outlive_the_password_that_it_used(server: MemoryServer) -> None:
    """S33: the password changes while a worker still checks the old one."""
    client = server.client().connect()
    client.negotiates()
    client.starts_tls()
    client.negotiates()
    client.sends(
        "<iq type='set' id='a1'><query xmlns='jabber:iq:auth'><username>romeo</username>"
        f"<password>{password_of('romeo')}</password><resource>orchard</resource></query></iq>"
    )
    romeo = xmppd.JID("romeo", "example.org", "")
    server.server.set_credentials(romeo, xmppd.make_credentials("another password"))
    client.receives("<iq type='error' id='a1' ...><error type='auth' ...><not-authorized/></error></iq>")
    assert not server.server.sessions(romeo)


# ---- rooms ----------------------------------------------------------------------------


def makes_room(client: Client, nick: str = "cook") -> None:
    client.sends(f"<presence to='{ROOM}/{nick}'><x xmlns='{MUC}'/></presence>")
    client.sends(
        f"<iq type='set' id='unlock' to='{ROOM}'><query xmlns='{MUC}#owner'><x xmlns='jabber:x:data' type='submit'/>"
        "</query></iq>"
    )
    client.receives_anything()


def administers(client: Client, items: str) -> None:
    client.sends_raw(f"<iq type='set' id='admin' to='{ROOM}'><query xmlns='{MUC}#admin'>{items}</query></iq>")


@pytest.mark.config(limits={"room_stanzas_per_minute": 0})
def test_a_request_about_many_nicknames_costs_little_in_a_room_that_knows_many(server, romeo) -> None:
    """S54: one stanza of an owner must not stop the server for everybody."""
    makes_room(romeo)
    room = server.server.registry.feature(xmppd.MultiUserChat).rooms[xmppd.JID.parse(ROOM)]
    for number in range(2000):
        room.affiliations[f"m{number}@example.org"] = {"affiliation": "member", "nick": f"member {number}"}
    began = time.process_time()
    administers(romeo, "".join(f"<item affiliation='member' jid='n{n}@example.org' nick='n{n}'/>" for n in range(1000)))
    romeo.receives("<iq type='result' id='admin' .../>")
    assert time.process_time() - began < 1.0


def test_a_long_reason_is_not_kept_in_full(server, romeo) -> None:
    """S54, S59: 5,000 people may be banned, and each ban is kept with its reason."""
    makes_room(romeo)
    reason = f"<reason>{'because ' * 5000}</reason>"
    administers(romeo, f"<item affiliation='outcast' jid='tybalt@example.org'>{reason}</item>")
    romeo.receives("<iq type='result' id='admin' .../>")
    room = server.server.registry.feature(xmppd.MultiUserChat).rooms[xmppd.JID.parse(ROOM)]
    assert len(room.affiliations["tybalt@example.org"]["reason"]) <= 1000


# ---- publish-subscribe ----------------------------------------------------------------


def publish(node: str, items: str) -> str:
    return (
        f"<iq type='set' id='pub'><pubsub xmlns='{PUBSUB}'><publish node='{node}'>{items}</publish></pubsub></iq>"
    )


def test_the_wishes_of_made_up_clients_are_not_remembered_for_ever(server, romeo) -> None:
    """S47, S59: anybody can verify anything about capabilities that they have made up."""
    features = [f"{number}:{'x' * 100}+notify" for number in range(2000)]
    ver = base64.b64encode(hashlib.sha1("".join(f"{name}<" for name in sorted(features)).encode()).digest()).decode()
    romeo.hears_questions = True
    romeo.sends(
        f"<presence><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='http://a.example' ver='{ver}'/>"
        "</presence>"
    )
    question = next(stanza for stanza in romeo.receives_anything() if stanza.tag.endswith("iq"))
    listed = "".join(f"<feature var='{name}'/>" for name in features)
    romeo.sends_raw(
        f"<iq type='result' id='{question.get('id')}' to='{question.get('from')}'>"
        f"<query xmlns='http://jabber.org/protocol/disco#info' node='http://a.example#{ver}'>{listed}</query></iq>"
    )
    romeo.receives_nothing()
    session = server.server.sessions(xmppd.JID("romeo", "example.org", ""))[0]
    assert len(session.wants) == 2000  # for this session they count
    known = server.storage.documents("caps").items(xmppd.JID("", "example.org", ""))
    assert len(xmppd.encode_json(dict(known))) < 10_000


def test_an_avatar_too_large_for_the_card_is_published_all_the_same(server, romeo) -> None:
    """An error must not follow what has happened: RFC 6120 §8.2.3, XEP-0060 §7.1.2."""
    picture = bytes(100 * 1024)
    sha1 = hashlib.sha1(picture).hexdigest()
    card = f"<DESC>{'I ' * 40_000}</DESC>"
    romeo.sends(f"<iq type='set' id='v'><vCard xmlns='vcard-temp'>{card}</vCard></iq>")
    romeo.receives("<iq type='result' id='v'/>")
    text = base64.b64encode(picture).decode()
    romeo.sends_raw(
        publish("urn:xmpp:avatar:data", f"<item id='{sha1}'><data xmlns='urn:xmpp:avatar:data'>{text}</data></item>")
    )
    romeo.receives("<iq type='result' id='pub' ...>...</iq>")
    info = f"<info bytes='{len(picture)}' id='{sha1}' type='image/png'/>"
    romeo.sends(
        publish(
            "urn:xmpp:avatar:metadata",
            f"<item id='{sha1}'><metadata xmlns='urn:xmpp:avatar:metadata'>{info}</metadata></item>",
        )
    )
    romeo.receives("<iq type='result' id='pub' ...>...</iq>")


# ---- the end --------------------------------------------------------------------------


class Broken(xmppd.Feature):
    """A feature that meets a disk that cannot be read."""

    def shutting_down(self) -> None:
        raise xmppd.StanzaError("internal-server-error")


def test_a_shutdown_ends_even_if_something_goes_wrong_in_it(tmp_path: Path) -> None:
    """Else a server would survive its SIGTERM: DESIGN §5."""
    network, connection, theirs = connected(tmp_path)
    server = xmppd.Server(network.config, network.loop, network.storage, [Broken])
    server.network = network
    ended: list[str] = []
    with pytest.raises(xmppd.StanzaError):
        server.shutdown(lambda: ended.append("now"))
    connection.abort()
    network.loop.turn(0)
    network.loop.turn(0)
    theirs.close()
    network.storage.close()
    network.loop.close()
    assert ended == ["now"]


# ---- other systems --------------------------------------------------------------------


class Gone:
    """A socket whose peer has gone already, as macOS shows it."""

    def __init__(self) -> None:
        self.is_closed = False

    def setblocking(self, flag: bool) -> None:
        pass

    def setsockopt(self, *option: int) -> None:
        raise OSError(22, "Invalid argument")

    def close(self) -> None:
        self.is_closed = True


def test_a_peer_that_is_gone_before_it_is_accepted_leaves_no_trace(tmp_path: Path) -> None:
    """On macOS setsockopt fails for such a socket."""
    network, connection, theirs = connected(tmp_path)
    gone = Gone()
    network.admit(None, gone, "127.0.0.1")
    assert gone.is_closed and not network.connections
    theirs.close()
    connection.abort()
    network.loop.turn(0)
    network.storage.close()
    network.loop.close()


# ---- fairness -------------------------------------------------------------------------


def test_a_hundred_costly_requests_at_once_keep_nobody_else_waiting(server, romeo, juliet) -> None:
    """S55: they fit into one read, and each reads a thousand items; the answers come in order all the same."""
    many = f"<field var='FORM_TYPE' type='hidden'><value>{PUBSUB}#publish-options</value></field>"
    many += "<field var='pubsub#max_items'><value>max</value></field>"
    options = f"<publish-options><x xmlns='jabber:x:data' type='submit'>{many}</x></publish-options>"
    items = "".join(f"<item id='{number}'><x xmlns='a'/></item>" for number in range(500))
    romeo.sends_raw(publish("n", items).replace("</publish>", f"</publish>{options}"))
    romeo.receives("<iq type='result' id='pub' ...>...</iq>")
    asked = [f"<iq type='get' id='{n}'><pubsub xmlns='{PUBSUB}'><items node='n'/></pubsub></iq>" for n in range(100)]
    began = time.process_time()
    romeo.sends_raw("".join(asked))
    juliet.passes_barrier()
    assert time.process_time() - began < 0.5
    for number in range(100):
        romeo.receives(f"<iq type='result' id='{number}' ...>...</iq>")
