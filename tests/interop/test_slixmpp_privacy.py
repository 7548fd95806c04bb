"""Privacy lists and the blocking command with slixmpp's plugins xep_0016 and xep_0191."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from slixmpp.exceptions import IqError

from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer


class Careful(Person):
    """Somebody with the two plugins; pushes of the blocklist wait in `pushes`."""

    def __init__(self, jid: str, server: ProcessServer) -> None:
        super().__init__(jid, server.authority)
        self.register_plugin("xep_0016")
        self.register_plugin("xep_0191")
        self.pushes: asyncio.Queue[Any] = asyncio.Queue()
        for event in ("blocked", "unblocked"):
            self.add_event_handler(event, self.pushes.put_nowait)

    async def hears_error(self) -> str:
        """Wait for the error that answers a message; return its condition."""
        while True:
            message = await self.hears()
            if message["type"] == "error":
                return str(message["error"]["condition"])


async def befriended(server: ProcessServer) -> tuple[Careful, Careful]:
    romeo = Careful("romeo@example.org/orchard", server)
    juliet = Careful("juliet@example.org/balcony", server)
    for person in (romeo, juliet):
        person.add_event_handler("message_error", person.messages.put_nowait)
        await person.comes_online(server.port)
    romeo.send_presence_subscription("juliet@example.org")
    await romeo.sees("available", "juliet@example.org")
    await juliet.sees("available", "romeo@example.org")
    return romeo, juliet


async def a_quarrel(server: ProcessServer) -> None:
    romeo, juliet = await befriended(server)
    assert await soon(romeo.plugin["xep_0191"].get_blocked_jids()) == set()
    await soon(romeo.plugin["xep_0191"].block("juliet@example.org"))
    push = await soon(romeo.pushes.get())
    assert [str(item["jid"]) for item in push["block"]["items"]] == ["juliet@example.org"]
    assert {str(jid) for jid in await soon(romeo.plugin["xep_0191"].get_blocked_jids())} == {"juliet@example.org"}
    await juliet.sees("unavailable", "romeo@example.org")
    juliet.send_message("romeo@example.org", "O Romeo, Romeo!", mtype="chat")
    assert await juliet.hears_error() == "service-unavailable"
    romeo.send_message("juliet@example.org", "Can you hear me now?", mtype="chat")
    assert await romeo.hears_error() == "not-acceptable"
    await soon(romeo.plugin["xep_0191"].unblock("juliet@example.org"))
    await juliet.sees("available", "romeo@example.org")
    juliet.send_message("romeo@example.org", "Wherefore art thou Romeo?", mtype="chat")
    assert (await romeo.hears())["body"] == "Wherefore art thou Romeo?"
    for person in (romeo, juliet):
        await person.goes()


async def lists_of_a_careful_man(server: ProcessServer) -> None:
    romeo, juliet = await befriended(server)
    privacy = romeo.plugin["xep_0016"]
    rule = {"type": "jid", "value": "juliet@example.org", "action": "deny", "order": "1", "message": True}
    await soon(privacy.edit_list("quiet", [rule]))
    quiet = (await soon(privacy.get_list("quiet")))["privacy"]["list"]
    [item] = quiet["items"]
    assert (item["type"], item["value"], item["action"], item["order"]) == ("jid", "juliet@example.org", "deny", "1")
    assert item["message"] and not item["iq"]
    with pytest.raises(IqError) as refusal:
        await soon(privacy.activate("loud"))
    assert refusal.value.condition == "item-not-found"

    await soon(privacy.activate("quiet"))
    assert (await soon(privacy.get_active()))["privacy"]["active"]["name"] == "quiet"
    juliet.send_message("romeo@example.org", "O Romeo, Romeo!", mtype="chat")
    assert await juliet.hears_error() == "service-unavailable"
    await soon(privacy.deactivate())
    await soon(privacy.make_default("quiet"))
    assert (await soon(privacy.get_default()))["privacy"]["default"]["name"] == "quiet"
    juliet.send_message("romeo@example.org", "Romeo!", mtype="chat")
    assert await juliet.hears_error() == "service-unavailable"
    await soon(privacy.remove_default())
    await soon(privacy.remove_list("quiet"))
    assert not (await soon(privacy.get_privacy_lists()))["privacy"]["lists"]
    juliet.send_message("romeo@example.org", "Be not so cold.", mtype="chat")
    assert (await romeo.hears())["body"] == "Be not so cold."
    for person in (romeo, juliet):
        await person.goes()


def test_a_block_and_its_end(process_server: ProcessServer) -> None:
    """XEP-0191 §3"""
    asyncio.run(a_quarrel(process_server))


def test_privacy_lists(process_server: ProcessServer) -> None:
    """XEP-0016 §2.3 to §2.9"""
    asyncio.run(lists_of_a_careful_man(process_server))
