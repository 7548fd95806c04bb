"""Publish-subscribe, personal eventing, capabilities, vCards, avatars and bookmarks with slixmpp's plugins."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from slixmpp.exceptions import IqError
from slixmpp.plugins.xep_0402.stanza import Conference

from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer

JULIET, ROMEO = "juliet@example.org", "romeo@example.org"
PLUGINS = ("0030", "0054", "0060", "0084", "0107", "0115", "0153", "0163", "0172", "0402")
PICTURE = b"\x89PNG" + bytes(range(256)) * 40


class Sociable(Person):
    """Somebody with all of these plugins; what is published wherever they are interested waits in `news`."""

    def __init__(self, jid: str, server: ProcessServer, without: str = "") -> None:
        super().__init__(jid, server.authority)
        for number in (number for number in PLUGINS if number != without):
            self.register_plugin(f"xep_{number}")
        self.news: asyncio.Queue[Any] = asyncio.Queue()
        self.pictures: asyncio.Queue[Any] = asyncio.Queue()
        for event in ("user_nick_publish", "user_mood_publish", "avatar_metadata_publish", "pubsub_retract",
                      "bookmarks_publish", "pubsub_subscription", "feed_publish"):  # fmt: skip
            self.add_event_handler(event, self.news.put_nowait)
        self.add_event_handler("vcard_avatar_update", self.pictures.put_nowait)

    def __getattr__(self, name: str) -> Any:
        """`juliet.xep_0060` is the plugin."""
        if name.startswith("xep_"):
            return self.plugin[name]
        raise AttributeError(name)

    async def shows_capabilities(self) -> None:
        """Send presence with the hash of what the plugins can do by now."""
        await soon(self.plugin["xep_0115"].update_caps(broadcast=False))
        self.send_presence()

    async def learns(self, node: str) -> Any:
        """Wait for news of this node."""
        while True:
            message = await soon(self.news.get())
            if message["pubsub_event"]["items"]["node"] == node:
                return message

    async def sees_picture(self, id: str) -> None:
        while (await self.learns("urn:xmpp:avatar:metadata"))["pubsub_event"]["items"]["item"]["id"] != id:
            pass


async def friends(server: ProcessServer, without: str = "") -> tuple[Sociable, Sociable]:
    """Return juliet, who does without one of the plugins, and romeo."""
    juliet, romeo = Sociable(f"{JULIET}/balcony", server, without), Sociable(f"{ROMEO}/orchard", server)
    for person in (juliet, romeo):
        await person.comes_online(server.port)
    romeo.send_presence_subscription(JULIET)
    await romeo.sees("available", JULIET)
    await juliet.sees("available", ROMEO)
    for person in (juliet, romeo):
        await person.shows_capabilities()
    return juliet, romeo


async def news_of_the_day(server: ProcessServer) -> None:
    juliet, romeo = await friends(server)
    nick = "http://jabber.org/protocol/nick"
    await soon(juliet.xep_0172.publish_nick("Jule"))
    message = await romeo.learns(nick)
    assert message["from"].full == JULIET
    assert message["pubsub_event"]["items"]["item"]["nick"]["nick"] == "Jule"
    await soon(juliet.xep_0107.publish_mood("annoyed", "curse my nurse!"))
    message = await romeo.learns("http://jabber.org/protocol/mood")
    assert message["pubsub_event"]["items"]["item"]["mood"]["value"] == "annoyed"

    info = await soon(romeo.xep_0030.get_info(JULIET))
    assert ("pubsub", "pep", None, None) in info["disco_info"]["identities"]
    nodes = await soon(romeo.xep_0060.get_nodes(JULIET))
    assert nick in {node for _jid, node, _name in nodes["disco_items"]["items"]}
    await romeo.goes()

    romeo = Sociable(f"{ROMEO}/garden", server)
    await romeo.comes_online(server.port)
    await romeo.shows_capabilities()
    message = await romeo.learns(nick)
    assert message["pubsub_event"]["items"]["item"]["nick"]["nick"] == "Jule"
    assert message.xml.find("{urn:xmpp:delay}delay") is not None
    for person in (juliet, romeo):
        await person.goes()


async def faces(server: ProcessServer) -> None:
    juliet, romeo = await friends(server, without="0153")  # it would say that there is no picture
    id = hashlib.sha1(PICTURE).hexdigest()
    await soon(juliet.xep_0084.publish_avatar(PICTURE))
    await soon(juliet.xep_0084.publish_avatar_metadata({"id": id, "type": "image/png", "bytes": len(PICTURE)}))
    message = await romeo.learns("urn:xmpp:avatar:metadata")
    assert message["pubsub_event"]["items"]["item"]["id"] == id
    found = await soon(romeo.xep_0084.retrieve_avatar(JULIET, id))
    assert found["pubsub"]["items"]["item"]["avatar_data"]["value"] == PICTURE

    presence = await soon(romeo.pictures.get())  # the same picture in the old way
    while presence["from"].bare != JULIET or presence["vcard_temp_update"]["photo"] != id:
        presence = await soon(romeo.pictures.get())
    card = await soon(romeo.xep_0054.get_vcard(JULIET, cached=False))
    assert card["vcard_temp"]["PHOTO"]["BINVAL"] == PICTURE

    other = PICTURE[::-1]
    await soon(romeo.xep_0153.set_avatar(avatar=other, mtype="image/png"))
    await soon(juliet.sees_picture(hashlib.sha1(other).hexdigest()))  # her own came to her first
    for person in (juliet, romeo):
        await person.goes()


async def cards(server: ProcessServer) -> None:
    juliet, romeo = await friends(server)
    card = juliet.xep_0054.make_vcard()
    card["FN"], card["DESC"] = "Juliet Capulet", "On the balcony"
    await soon(juliet.xep_0054.publish_vcard(card))
    found = await soon(romeo.xep_0054.get_vcard(JULIET, cached=False))
    assert (found["vcard_temp"]["FN"], found["vcard_temp"]["DESC"]) == ("Juliet Capulet", "On the balcony")
    for who in ("nurse@example.org", "ghost@example.org"):
        with pytest.raises(IqError) as refusal:
            await soon(romeo.xep_0054.get_vcard(who, cached=False))
        assert refusal.value.condition == "service-unavailable"
    for person in (juliet, romeo):
        await person.goes()


async def a_newspaper(server: ProcessServer) -> None:
    """XEP-0060's use cases, all of them with the plugin: owner, publisher, subscriber."""
    juliet, romeo = await friends(server)
    pubsub, reader = juliet.xep_0060, romeo.xep_0060
    for person in (juliet, romeo):
        person.xep_0060.map_node_event("feed", "feed")
    form = juliet.plugin["xep_0004"].make_form("submit")
    form.add_field(var="FORM_TYPE", ftype="hidden", value="http://jabber.org/protocol/pubsub#node_config")
    form.add_field(var="pubsub#max_items", value="5")
    form.add_field(var="pubsub#access_model", value="open")
    await soon(pubsub.create_node(JULIET, "feed", config=form))
    answer = await soon(reader.subscribe(JULIET, "feed"))
    assert answer["pubsub"]["subscription"]["subscription"] == "subscribed"
    payload = juliet.plugin["xep_0172"].stanza.UserNick()
    payload["nick"] = "news"
    for id in ("a", "b", "c"):
        await soon(pubsub.publish(JULIET, "feed", id=id, payload=payload.xml))
        assert (await romeo.learns("feed"))["pubsub_event"]["items"]["item"]["id"] == id
    items = await soon(reader.get_items(JULIET, "feed", max_items=2))
    assert [item["id"] for item in items["pubsub"]["items"]] == ["b", "c"]
    await soon(pubsub.retract(JULIET, "feed", "b", notify=True))
    assert (await romeo.learns("feed"))["pubsub_event"]["items"]["retract"]["id"] == "b"
    assert len((await soon(reader.get_subscriptions(JULIET)))["pubsub"]["subscriptions"]) == 1
    config = await soon(pubsub.get_node_config(JULIET, "feed"))
    assert config["pubsub_owner"]["configure"]["form"].get_values()["pubsub#max_items"] == "5"
    await soon(pubsub.modify_affiliations(JULIET, "feed", affiliations=[(ROMEO, "publisher")]))
    await soon(reader.publish(JULIET, "feed", id="d", payload=payload.xml))
    await soon(reader.unsubscribe(JULIET, "feed"))
    await soon(pubsub.purge(JULIET, "feed"))
    await soon(pubsub.delete_node(JULIET, "feed"))
    with pytest.raises(IqError) as refusal:
        await soon(reader.get_items(JULIET, "feed"))
    assert refusal.value.condition == "item-not-found"
    for person in (juliet, romeo):
        await person.goes()


async def rooms_to_remember(server: ProcessServer) -> None:
    juliet = Sociable(f"{JULIET}/balcony", server)
    await juliet.comes_online(server.port)
    form = juliet.plugin["xep_0004"].make_form("submit")
    form.add_field(var="FORM_TYPE", ftype="hidden", value="http://jabber.org/protocol/pubsub#publish-options")
    for name, value in (("persist_items", "true"), ("max_items", "max"), ("send_last_published_item", "never"),
                        ("access_model", "whitelist")):  # fmt: skip
        form.add_field(var=f"pubsub#{name}", value=value)
    for room in ("theplay@conference.example.org", "orchard@conference.example.org"):
        bookmark = Conference()
        bookmark["name"], bookmark["nick"], bookmark["autojoin"] = room.partition("@")[0], "JC", True
        pubsub = juliet.xep_0060
        await soon(pubsub.publish(JULIET, "urn:xmpp:bookmarks:1", id=room, payload=bookmark.xml, options=form))
    found = await soon(juliet.xep_0060.get_items(JULIET, "urn:xmpp:bookmarks:1"))
    assert [(item["id"], item["conference"]["nick"]) for item in found["pubsub"]["items"]] == [
        ("theplay@conference.example.org", "JC"), ("orchard@conference.example.org", "JC")]  # fmt: skip
    await juliet.goes()


def test_news_reach_friends(process_server: ProcessServer) -> None:
    """XEP-0163, XEP-0115, XEP-0172, XEP-0107"""
    asyncio.run(news_of_the_day(process_server))


def test_avatars_in_both_ways(process_server: ProcessServer) -> None:
    """XEP-0084, XEP-0153, XEP-0398"""
    asyncio.run(faces(process_server))


def test_cards(process_server: ProcessServer) -> None:
    """XEP-0054"""
    asyncio.run(cards(process_server))


def test_a_node_and_its_readers(process_server: ProcessServer) -> None:
    """XEP-0060"""
    asyncio.run(a_newspaper(process_server))


def test_bookmarks(process_server: ProcessServer) -> None:
    """XEP-0402"""
    asyncio.run(rooms_to_remember(process_server))
