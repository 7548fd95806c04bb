"""Staying connected with slixmpp, a client library of other people: cuts, copies, inactive clients, push."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from slixmpp.xmlstream.handler import Callback
from slixmpp.xmlstream.matcher import MatchXPath

from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer

ROMEO, JULIET, NURSE = "romeo@example.org/orchard", "juliet@example.org/balcony", "nurse@example.org/app"
PUSH = "urn:xmpp:push:0"


class Phone(Person):
    """Somebody with plugins for a telephone."""

    def __init__(self, jid: str, authority: Path, *plugins: str) -> None:
        super().__init__(jid, authority)
        for plugin in plugins:
            self.register_plugin(plugin)
        self.resumed = asyncio.Event()
        self.add_event_handler("session_resumed", lambda _: self.resumed.set())
        self.copies: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.add_event_handler("carbon_received", lambda copy: self.copies.put_nowait(("received", copy)))
        self.add_event_handler("carbon_sent", lambda copy: self.copies.put_nowait(("sent", copy)))

    async def is_cut_off(self) -> None:
        """The connection breaks without a word."""
        gone = asyncio.Event()
        self.add_event_handler("disconnected", lambda _: gone.set(), disposable=True)
        self.transport.abort()  # type: ignore[union-attr]
        await soon(gone.wait())

    async def sends_set(self, payload: ET.Element) -> Any:
        """Ask one's own account."""
        iq = self.make_iq_set()
        iq.append(payload)
        return await soon(iq.send(timeout=15))


async def a_cut(server: ProcessServer) -> None:
    """XEP-0198: three cuts, messages in both directions, none lost and none twice."""
    romeo, juliet = Phone(ROMEO, server.authority), Phone(JULIET, server.authority, "xep_0198")
    await romeo.comes_online(server.port)
    await juliet.comes_online(server.port)
    heard = []
    for number in range(3):
        romeo.send_message(JULIET, f"{number} before", mtype="chat")
        heard.append((await juliet.hears())["body"])
        await juliet.is_cut_off()
        romeo.send_message(JULIET, f"{number} during", mtype="chat")
        await soon(romeo.get_roster())  # the server is through with it
        juliet.resumed.clear()
        juliet.connect("127.0.0.1", server.port)
        await soon(juliet.resumed.wait())
        romeo.send_message(JULIET, f"{number} after", mtype="chat")
        heard += [(await juliet.hears())["body"] for _ in range(2)]
        juliet.send_message(ROMEO, str(number), mtype="chat")
        assert (await romeo.hears())["body"] == str(number)
    assert heard == [f"{number} {when}" for number in range(3) for when in ("before", "during", "after")]
    assert juliet.messages.empty()
    await juliet.goes()
    await romeo.goes()


def test_a_session_survives_its_connection(process_server: ProcessServer) -> None:
    """XEP-0198 §5, as slixmpp resumes it"""
    asyncio.run(a_cut(process_server))


async def copies(server: ProcessServer) -> None:
    """XEP-0280: juliet's other device sees both halves of the conversation."""
    romeo = Phone(ROMEO, server.authority)
    juliet, phone = Phone(JULIET, server.authority), Phone("juliet@example.org/phone", server.authority, "xep_0280")
    await romeo.comes_online(server.port)
    await juliet.comes_online(server.port)
    await phone.comes_online(server.port)
    await soon(phone.plugin["xep_0280"].enable())
    romeo.send_message(JULIET, "She speaks.", mtype="chat")
    (await juliet.hears()).reply("Ay me!").send()
    seen = [await soon(phone.copies.get()) for _ in range(2)]
    assert [(way, copy[f"carbon_{way}"]["body"]) for way, copy in seen] == [
        ("received", "She speaks."),
        ("sent", "Ay me!"),
    ]
    for person in (romeo, juliet, phone):
        await person.goes()


def test_every_device_sees_the_conversation(process_server: ProcessServer) -> None:
    """XEP-0280 §7, §8"""
    asyncio.run(copies(process_server))


async def a_nap(server: ProcessServer) -> None:
    """XEP-0352: while juliet sleeps she hears of nothing but a message, and of presence the last, before it."""
    romeo, juliet = Phone(ROMEO, server.authority), Phone(JULIET, server.authority, "xep_0352")
    await romeo.comes_online(server.port)
    await juliet.comes_online(server.port)
    romeo.send_presence_subscription("juliet@example.org")
    await romeo.sees("available", "juliet@example.org")
    await juliet.sees("available", "romeo@example.org")
    juliet.plugin["xep_0352"].send_inactive()
    await soon(juliet.get_roster())
    for status in "abc":
        romeo.send_presence(pstatus=status)
    romeo.send_message(JULIET, "She sleeps.", mtype="chat")
    assert (await juliet.hears())["body"] == "She sleeps."
    presences = [juliet.presences.get_nowait() for _ in range(juliet.presences.qsize())]
    assert [presence["status"] for presence in presences if presence["status"]] == ["c"]
    romeo.send_presence(pstatus="d")
    await soon(romeo.get_roster())
    juliet.plugin["xep_0352"].send_active()
    assert (await juliet.sees("available", "romeo@example.org"))["status"] == "d"
    await juliet.goes()
    await romeo.goes()


def test_a_sleeping_client_is_told_less(process_server: ProcessServer) -> None:
    """XEP-0352 §3.2, §4.2"""
    asyncio.run(a_nap(process_server))


async def a_call(server: ProcessServer) -> None:
    """XEP-0357: the nurse plays the app server; slixmpp has no plugin for push, but one for what is published."""
    romeo, juliet = Phone(ROMEO, server.authority), Phone(JULIET, server.authority, "xep_0198")
    nurse = Phone(NURSE, server.authority, "xep_0060")
    published: asyncio.Queue[Any] = asyncio.Queue()

    def publish(iq: Any) -> None:
        published.put_nowait(iq)
        iq.reply().send()

    path = "{jabber:client}iq/{http://jabber.org/protocol/pubsub}pubsub/{http://jabber.org/protocol/pubsub}publish"
    nurse.register_handler(Callback("push", MatchXPath(path), publish))
    for person in (romeo, juliet, nurse):
        await person.comes_online(server.port)
    await juliet.sends_set(ET.Element(f"{{{PUSH}}}enable", jid=NURSE, node="yxs32uqsflafdk3iuqo"))
    await juliet.is_cut_off()
    romeo.send_message(JULIET, "Wherefore art thou?", mtype="chat")
    iq = await soon(published.get())
    assert iq["from"] == "example.org"
    assert iq["pubsub"]["publish"]["node"] == "yxs32uqsflafdk3iuqo"
    values = [value.text for value in iq.xml.iter("{jabber:x:data}value")]
    assert values == ["urn:xmpp:push:summary", "1", "New message!"]
    juliet.connect("127.0.0.1", server.port)
    assert (await juliet.hears())["body"] == "Wherefore art thou?"
    for person in (romeo, juliet, nurse):
        await person.goes()


def test_an_app_that_is_away_is_woken(process_server: ProcessServer) -> None:
    """XEP-0357 §5, §7"""
    asyncio.run(a_call(process_server))
