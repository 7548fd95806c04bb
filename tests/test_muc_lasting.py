"""Multi-user chat: what survives a restart and a crash (XEP-0045 §5.2, §7.14), and the end of the service (§11.2)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

import xmppd
from tests.dialogue import Client
from tests.muc import (
    ADDRESSES,
    CONFIG,
    COVEN,
    HOST,
    OWNER,
    SERVICE,
    administering,
    configures,
    configuring,
    coven,
    enter,
    enters,
    forget,
    gone,
    listing,
    refused,
    result,
    saying,
    witch,
)
from tests.servers import MemoryServer, ProcessServer

pytestmark = pytest.mark.config(**CONFIG)
KITCHEN = "kitchen@chat.example.org"
USER = "{http://jabber.org/protocol/muc#user}"


def restarted(server: MemoryServer) -> None:
    """Start the server anew on the same data, as after a clean stop; everybody is gone."""
    server.cast.hang_up()
    server.storage.close()
    config = server.server.config
    server.storage = xmppd.Storage(config.data, server.loop, sync=False, freeze=True)
    server.server = xmppd.Server(config, server.loop, server.storage, xmppd.FEATURES)


def kinds(stanzas: list[ET.Element]) -> list[str]:
    """What came, in short: nickname of a presence, body or subject of a message."""
    found = []
    for stanza in stanzas:
        text = stanza.findtext("{jabber:client}body") or stanza.findtext("{jabber:client}subject")
        found.append(text or stanza.get("from", "").partition("/")[2])
    return found


def test_a_persistent_room_is_there_again(server: MemoryServer) -> None:
    """XEP0045-5.2-2, XEP0045-7.14-2, XEP0045-10.2-5: configuration, affiliations, nicknames, subject, history, card"""
    crone, wicca, hag = coven(server, persistentroom=True, roomname="A Dark Cave", maxhistoryfetch=3, lang="en")
    crone.sends(administering(f"affiliation='member' jid='hecate@{HOST}' nick='Hecate'",
                              f"<item affiliation='outcast' jid='tybalt@{HOST}'><reason>fights</reason></item>"))  # fmt: skip
    crone.sends(f"<iq type='set' id='card' to='{COVEN}'><vCard xmlns='vcard-temp'><FN>Coven</FN></vCard></iq>")
    crone.sends(f"<message type='groupchat' to='{COVEN}'><subject>Spells</subject></message>")
    hag.sends("".join(saying(str(number)) for number in range(1, 6)))
    forget(crone, wicca, hag)
    before = lists(crone)
    for _ in range(2):
        restarted(server)
        hag = witch(server, "thirdwitch")
        assert kinds(enters(hag, "thirdwitch")) == ["thirdwitch", "3", "4", "5", "Spells"]
        crone = witch(server, "firstwitch")
        assert lists(crone) == before
        crone.sends(f"<iq type='get' id='card' to='{COVEN}'><vCard xmlns='vcard-temp'/></iq>")
        crone.receives("<iq type='result' id='card'><vCard xmlns='vcard-temp'><FN>Coven</FN></vCard></iq>")
        hag.sends(enter("Hecate", room=COVEN))
        assert hag.receives("<presence type='error' ...>...</presence>").find(".//{*}conflict") is not None


def lists(client: Client) -> list[bytes]:
    """All that an owner can ask a room about its affiliations and its configuration."""
    answers = []
    for affiliation in ("outcast", "member", "admin", "owner"):
        client.sends(listing(f"affiliation='{affiliation}'"))
        answers.append(ET.tostring(client.receives("<iq type='result' ...>...</iq>")))
    client.sends(f"<iq type='get' id='c' to='{COVEN}'><query xmlns='http://jabber.org/protocol/muc#owner'/></iq>")
    return [*answers, ET.tostring(client.receives("<iq type='result' ...>...</iq>"))]


def test_only_persistent_rooms_are_on_disk(server: MemoryServer) -> None:
    """XEP0045-7.14-2: a room that becomes temporary leaves nothing; one that becomes persistent is kept whole"""
    crone, wicca, hag = coven(server)
    hag.sends(saying("Earlier"))
    crone.sends(f"<message type='groupchat' to='{COVEN}'><subject>Spells</subject></message>")
    forget(crone, wicca, hag)
    address = xmppd.JID.parse(COVEN)
    documents, log = server.storage.documents("room"), server.storage.log("room-archive")
    assert address not in documents and not log.parts(address)
    configures(crone, persistentroom=True)
    assert documents.item(address, f"@wiccarocks@{HOST}")["affiliation"] == "admin" and len(archived(server)) == 1
    configures(crone, persistentroom=False)
    assert address not in documents and not log.parts(address)
    configures(crone, persistentroom=True)
    forget(crone, wicca, hag)
    restarted(server)
    hag = witch(server, "thirdwitch")
    assert kinds(enters(hag, "thirdwitch")) == ["thirdwitch", "Earlier", "Spells"]


def test_a_destroyed_room_does_not_come_back(server: MemoryServer) -> None:
    """XEP0045-10.9-1"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("Earlier"))
    crone.sends(f"<iq type='set' id='c' to='{COVEN}'><query xmlns='http://jabber.org/protocol/muc#owner'><destroy/></query></iq>")
    forget(crone, wicca, hag)
    restarted(server)
    hag = witch(server, "thirdwitch")
    assert hag.jid and [status.get("code") for stanza in enters(hag, "x") for status in stanza.iter(f"{USER}status")] == [
        "110", "201"]  # fmt: skip


def archived(server: MemoryServer) -> list[Any]:
    """What is on disk of what was said."""
    log, address = server.storage.log("room-archive"), xmppd.JID.parse(COVEN)
    return [record for part in log.parts(address) for record in log.read(address.with_resource(part))]


def test_a_room_without_an_archive_keeps_what_newcomers_may_get(server: MemoryServer) -> None:
    """S54"""
    rooms = server.server.registry.feature(xmppd.MultiUserChat)
    crone, wicca, hag = coven(server, persistentroom=True, enablearchiving=False)
    room, message = rooms.rooms[xmppd.JID.parse(COVEN)], xmppd.Stanza(xmppd.MESSAGE, {"type": "groupchat"})
    message.add(xmppd.E(xmppd.CLIENT("body"), None, "O"))
    for _ in range(2 * xmppd.HISTORY_MOST + 1):
        rooms.remember(room, message, ADDRESSES["thirdwitch"])
    assert xmppd.HISTORY_MOST <= len(archived(server)) <= 2 * xmppd.HISTORY_MOST
    configures(crone, enablearchiving=True)
    for _ in range(2 * xmppd.HISTORY_MOST):
        rooms.remember(room, message, ADDRESSES["thirdwitch"])
    assert len(archived(server)) >= 3 * xmppd.HISTORY_MOST
    forget(crone, wicca, hag)


def test_the_history_of_an_earlier_version_is_taken_over(server: MemoryServer) -> None:
    """Once, with its moments; and what was said since comes behind it"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("Later"))
    forget(crone, wicca, hag)
    restarted(server)
    old = (f"<message type='groupchat' from='{COVEN}/thirdwitch'><body>Earlier</body>"
           f"<delay xmlns='urn:xmpp:delay' from='{COVEN}' stamp='2002-10-13T23:58:37Z'/></message>")  # fmt: skip
    storage, address = server.storage, xmppd.JID.parse(COVEN)
    records = archived(server)
    for part in storage.log("room-archive").parts(address):
        storage.log("room-archive").rewrite(address.with_resource(part), ())
    storage.log("room-history").append(address, {"at": "2002-10-13T23:58:37Z", "stanza": old})
    for _ in range(2):
        came = enters(witch(server, "thirdwitch"), "thirdwitch")
        assert kinds(came)[:2] == ["thirdwitch", "Earlier"] and records
        assert came[1].find("{urn:xmpp:delay}delay").get("stamp") == "2002-10-13T23:58:37Z"  # type: ignore[union-attr]
        restarted(server)


def test_a_message_that_cannot_be_read_costs_only_itself(server: MemoryServer) -> None:
    """XEP0045-7.2.13-1: who edits files by hand does not lose a room"""
    crone, wicca, hag = coven(server, persistentroom=True)
    hag.sends(saying("Earlier"))
    forget(crone, wicca, hag)
    log = server.storage.log("room-archive")
    address = xmppd.JID.parse(COVEN).with_resource(log.parts(xmppd.JID.parse(COVEN))[0])
    good = log.read(address)
    log.rewrite(address, [{"at": "x", "stanza": "<message"}, {}, {**good[0], "stanza": "<message"}, *good])
    restarted(server)
    assert kinds(enters(witch(server, "thirdwitch"), "thirdwitch"))[:2] == ["thirdwitch", "Earlier"]


def test_when_nothing_can_be_stored_nothing_changes(server: MemoryServer) -> None:
    """XEP0045-9-1: the admin hears that it failed, and nobody else hears anything"""
    crone, wicca, hag = coven(server, persistentroom=True)
    server.storage.failed = "the disk is full"
    for request in (administering(f"affiliation='member' jid='hag66@{HOST}'"), configuring(roomname="x", id="admin1")):
        crone.sends(request)
        crone.receives("<iq type='error' id='admin1'><error type='wait'><resource-constraint .../></error></iq>")
    hag.receives_nothing()
    server.storage.failed = ""
    crone.sends(listing("affiliation='member'"))
    crone.receives("<iq type='result' id='list1'><query xmlns='http://jabber.org/protocol/muc#admin'/></iq>")
    wicca.receives_nothing()


def test_rooms_close_when_the_server_ends(server: MemoryServer) -> None:
    """XEP0045-11.2-1"""
    witches = coven(server)
    rooms = server.server.registry.feature(xmppd.MultiUserChat)
    rooms.shutting_down()
    witches.crone.receives(gone("firstwitch", "owner", 110, 332, jid=True))
    witches.wicca.receives(gone("secondwitch", "admin", 110, 332, jid=True))
    witches.hag.receives(gone("thirdwitch", "none", 110, 332, jid=True))


def test_rooms_follow_the_configuration(server: MemoryServer) -> None:
    """XEP0045-6.2-1, XEP0045-11.2-1: another label takes the rooms elsewhere, an empty one switches them off"""
    from dataclasses import replace

    crone, wicca, hag = coven(server)
    rooms = server.server.registry.feature(xmppd.MultiUserChat)
    server.server.config = replace(server.server.config, muc_host="")
    rooms.reloaded()
    assert len(hag.receives_anything()) == 1  # 332
    hag.sends(enter("thirdwitch"))
    hag.receives("<presence type='error' ...>...</presence>")
    hag.sends(f"<iq type='get' id='d' to='{HOST}'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    hag.receives("<iq type='result' id='d'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>")
    server.server.config = replace(server.server.config, muc_host="chat")
    rooms.reloaded()
    assert len(enters(hag, "thirdwitch", room=f"heath@{SERVICE}")) == 2
    forget(crone, wicca)


def test_a_room_survives_a_crash(process_server: ProcessServer) -> None:
    """XEP0045-5.2-2, XEP0045-8.1-1: what was confirmed is there after a kill -9"""
    romeo = process_server.client().login("romeo", resource="orchard")
    enters(romeo, "Romeo", room=KITCHEN)
    configures(romeo, KITCHEN, persistentroom=True, roomadmins=["juliet@example.org"])
    forget(romeo)
    romeo.sends(f"<message type='groupchat' to='{KITCHEN}'><subject>Love</subject></message>")
    romeo.sends(saying("But soft!", room=KITCHEN))
    romeo.receives("<message ...>...</message>", "<message ...>...</message>")  # reflected: so it is kept
    romeo.sends(administering("affiliation='outcast' jid='benvolio@example.org'", room=KITCHEN))
    romeo.receives(result())
    process_server.kill()
    process_server.cast.hang_up()
    process_server.start()
    juliet = process_server.client().login("juliet", resource="balcony")
    came = enters(juliet, "Juliet", room=KITCHEN)
    assert kinds(came) == ["Juliet", "But soft!", "Love"]
    assert came[0].find(f".//{USER}item").get("affiliation") == "admin"  # type: ignore[union-attr]
    benvolio = process_server.client().login("benvolio", resource="pda")
    benvolio.sends(enter("Benvolio", room=KITCHEN))
    assert benvolio.receives("<presence type='error' ...>...</presence>").find(".//{*}forbidden") is not None


# ---- when the disk is full ------------------------------------------------------------


def test_on_a_full_disk_nothing_is_said_and_nothing_changes_in_a_room_that_lasts(server: MemoryServer) -> None:
    """XEP0045-8.1-1: what cannot be kept is refused before anybody hears it, the newcomers of later included."""
    crone, wicca, hag = coven(server, persistentroom=True)
    server.storage.failed = "no space left on the disk"
    crone.sends(f"<message type='groupchat' id='s' to='{COVEN}'><subject>Spells</subject></message>" + saying("Thrice the brinded cat", id="c"))
    crone.receives(refused("resource-constraint", "s", "message"), refused("resource-constraint", "c", "message"))
    crone.sends(f"<iq type='set' id='d' to='{COVEN}'><query xmlns='{OWNER}'><destroy/></query></iq>")
    crone.receives(refused("resource-constraint", "d"))
    for client in (wicca, hag):
        client.receives_nothing()
    server.storage.failed = ""
    hecate = witch(server, "hecate")
    assert kinds(enters(hecate, "hecate")) == ["firstwitch", "secondwitch", "thirdwitch", "hecate", ""], "no history, no subject"
    forget(crone, wicca, hag)
