"""A gateway with slixmpp's ComponentXMPP, a component library of other people, between two people."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from slixmpp.componentxmpp import ComponentXMPP

from tests.gateway import COMPONENTS, NAME, SECRET
from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer

pytestmark = pytest.mark.config(components=COMPONENTS, listen={"component": ["127.0.0.1:0"]})


class Echo(ComponentXMPP):
    """Everybody at its domain says back what is said to them, and lets everybody subscribe."""

    def __init__(self, port: int, secret: str = SECRET) -> None:
        super().__init__(NAME, secret, "127.0.0.1", port)
        self.register_plugin("xep_0030")
        self.register_plugin("xep_0092", {"software_name": "echo", "version": "1"})
        self.register_plugin("xep_0199")
        self.plugin["xep_0030"].add_identity(category="gateway", itype="echo", name="Echo")
        self.started = asyncio.Event()
        self.refused = asyncio.Event()
        self.available: asyncio.Queue[Any] = asyncio.Queue()
        self.unavailable: asyncio.Queue[Any] = asyncio.Queue()
        self.add_event_handler("session_start", lambda _: self.started.set())
        self.add_event_handler("stream_error", lambda _: self.refused.set())
        self.add_event_handler("message", self.answer)
        self.add_event_handler("presence_available", self.available.put_nowait)
        self.add_event_handler("presence_unavailable", self.unavailable.put_nowait)
        self.add_event_handler("presence_subscribe", self.welcome)

    def answer(self, message: Any) -> None:
        """Say it back."""
        if message["type"] != "error":
            message.reply(message["body"]).send()

    def welcome(self, presence: Any) -> None:
        """Say yes, be available, and ask back; a slixmpp client says yes by itself."""
        self.send_presence(pto=presence["from"], pfrom=presence["to"].bare, ptype="subscribed")
        self.send_presence(pto=presence["from"], pfrom=presence["to"].bare + "/echo")
        self.send_presence(pto=presence["from"], pfrom=presence["to"].bare, ptype="subscribe")


async def a_day_at_the_gateway(server: ProcessServer) -> None:
    stranger = Echo(server.ports["component"], "wrong")
    stranger.connect()
    await soon(stranger.refused.wait())
    stranger.abort()
    echo = Echo(server.ports["component"])
    echo.connect()
    await soon(echo.started.wait())
    romeo = Person("romeo@example.org/orchard", server.authority)
    for plugin in ("xep_0030", "xep_0092"):
        romeo.register_plugin(plugin)
    await romeo.comes_online(server.port)

    items = await soon(romeo.plugin["xep_0030"].get_items(jid="example.org"))
    assert NAME in [item[0] for item in items["disco_items"]["items"]]
    info = await soon(romeo.plugin["xep_0030"].get_info(jid=NAME))
    assert ("gateway", "echo", None, "Echo") in info["disco_info"]["identities"]
    version = await soon(romeo.plugin["xep_0092"].get_version(NAME))
    assert version["software_version"]["name"] == "echo"

    romeo.send_presence_subscription(f"mercutio@{NAME}")
    await romeo.sees("available", f"mercutio@{NAME}")
    assert (await soon(echo.available.get()))["from"].full == "romeo@example.org/orchard"
    romeo.send_message(f"mercutio@{NAME}", "Nay, gentle Romeo", mtype="chat")
    message = await romeo.hears()
    assert (message["from"].bare, message["body"]) == (f"mercutio@{NAME}", "Nay, gentle Romeo")
    romeo.send_message(f"benvolio@{NAME}/phone", "Peace", mtype="chat")
    assert (await romeo.hears())["from"].full == f"benvolio@{NAME}/phone"

    await soon(echo.disconnect())
    romeo.send_message(f"tybalt@{NAME}", "Good", mtype="chat")  # waits until the gateway is back
    again = Echo(server.ports["component"])
    again.connect()
    assert (await romeo.hears())["from"].bare == f"tybalt@{NAME}"
    await romeo.goes()
    assert (await soon(again.unavailable.get()))["from"].full == "romeo@example.org/orchard"
    await soon(again.disconnect())


def test_a_gateway_and_its_people(process_server: ProcessServer) -> None:
    """XEP0114-3-4, XEP0114-3-6, XEP0114-3-9, XEP0114-3-10, XEP0114-3-13"""
    asyncio.run(a_day_at_the_gateway(process_server))
