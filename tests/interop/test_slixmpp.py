"""Two people with slixmpp, a client library of other people, over TLS with verification."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import slixmpp

from tests.dialogue import password_of
from tests.servers import ProcessServer

PATIENCE = 15.0  # seconds for one thing to happen


class Person(slixmpp.ClientXMPP):
    """Somebody whose messages and presences wait in queues until the test reads them."""

    def __init__(self, jid: str, authority: Path) -> None:
        super().__init__(jid, password_of(jid.partition("@")[0]))
        self.register_plugin("xep_0203")
        self.ca_certs = authority
        self.enable_direct_tls = False
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.presences: asyncio.Queue[Any] = asyncio.Queue()
        self.started = asyncio.Event()
        self.add_event_handler("session_start", lambda _: self.started.set())
        self.add_event_handler("message", self.messages.put_nowait)
        self.add_event_handler("presence", self.presences.put_nowait)

    async def comes_online(self, port: int) -> None:
        """Log in, ask for the roster, send presence."""
        self.connect("127.0.0.1", port)
        await soon(self.started.wait())
        await soon(self.get_roster())
        self.send_presence()

    async def sees(self, kind: str, jid: str) -> Any:
        """Wait for a presence of this type from this bare JID."""
        while True:
            presence = await soon(self.presences.get())
            if presence["type"] == kind and presence["from"].bare == jid:
                return presence

    async def hears(self) -> Any:
        """Wait for a message."""
        return await soon(self.messages.get())

    async def goes(self) -> None:
        """Log out."""
        await soon(self.disconnect())


async def soon(wait: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> Any:
    """Wait, but not for ever."""
    return await asyncio.wait_for(wait, PATIENCE)


async def a_day_in_verona(server: ProcessServer) -> None:
    romeo = Person("romeo@example.org/orchard", server.authority)
    juliet = Person("juliet@example.org/balcony", server.authority)
    await romeo.comes_online(server.port)
    await juliet.comes_online(server.port)

    romeo.send_presence_subscription("juliet@example.org")  # slixmpp says yes and asks back by itself
    await romeo.sees("available", "juliet@example.org")
    await juliet.sees("available", "romeo@example.org")

    romeo.send_message("juliet@example.org", "She speaks.", mtype="chat")
    message = await juliet.hears()
    assert (message["body"], message["from"].full) == ("She speaks.", "romeo@example.org/orchard")
    message.reply("Ay me!").send()
    assert (await romeo.hears())["body"] == "Ay me!"

    await juliet.goes()
    await romeo.sees("unavailable", "juliet@example.org")
    for body in ("Wilt thou leave me", "so unsatisfied?"):
        romeo.send_message("juliet@example.org", body, mtype="chat")
    await soon(romeo.get_roster())  # the server is through with what came before

    juliet = Person("juliet@example.org/chamber", server.authority)
    await juliet.comes_online(server.port)
    missed = [await juliet.hears(), await juliet.hears()]
    assert [message["body"] for message in missed] == ["Wilt thou leave me", "so unsatisfied?"]
    assert all(message["delay"]["stamp"] for message in missed)
    assert juliet.client_roster["romeo@example.org"]["subscription"] == "both"
    await romeo.sees("available", "juliet@example.org")
    await juliet.goes()
    await romeo.goes()


def test_two_people_become_friends_talk_and_miss_nothing(process_server: ProcessServer) -> None:
    asyncio.run(a_day_in_verona(process_server))


def test_the_certificate_is_verified(process_server: ProcessServer) -> None:
    """The test above proves little if the client would trust anybody."""

    async def login() -> None:
        romeo = Person("romeo@example.org/orchard", process_server.authority)
        romeo.ca_certs = None  # the system's authorities, who don't know ours
        refused = asyncio.Event()
        for event in ("ssl_invalid_chain", "connection_failed", "disconnected"):
            romeo.add_event_handler(event, lambda _: refused.set())
        romeo.connect("127.0.0.1", process_server.port)
        await soon(refused.wait())
        assert not romeo.started.is_set()
        romeo.abort()

    asyncio.run(login())
