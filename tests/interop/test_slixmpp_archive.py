"""The message archive with slixmpp (XEP-0313): a new device fetches what was said, in pages."""

from __future__ import annotations

import asyncio

from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer

MANY = 60  # more than a page


async def collect(person: Person, **filters: object) -> list[str]:
    """Return the bodies that the archive has, page by page."""
    bodies = []
    async for result in person.plugin["xep_0313"].iterate(**filters):
        bodies.append(result["mam_result"]["forwarded"]["stanza"]["body"])
    return bodies


async def a_new_telephone(server: ProcessServer) -> None:
    romeo = Person("romeo@example.org/orchard", server.authority)
    juliet = Person("juliet@example.org/balcony", server.authority)
    await romeo.comes_online(server.port)
    await juliet.comes_online(server.port)
    said = [f"{number}, Juliet!" for number in range(MANY)]
    for body in said:
        romeo.send_message("juliet@example.org", body, mtype="chat")
    assert [(await juliet.hears())["body"] for _ in said] == said
    juliet.send_message("romeo@example.org", "Ay me!", mtype="chat")
    await romeo.hears()

    phone = Person("juliet@example.org/phone", server.authority)
    for plugin in ("xep_0059", "xep_0297", "xep_0313"):
        phone.register_plugin(plugin)
    await phone.comes_online(server.port)
    assert await soon(collect(phone, rsm={"max": 25})) == [*said, "Ay me!"]
    assert await soon(collect(phone, with_jid="romeo@example.org", rsm={"max": 7})) == [*said, "Ay me!"]
    assert await soon(collect(phone, with_jid="nurse@example.org")) == []
    backward = await soon(collect(phone, reverse=True, rsm={"max": 25}))
    assert set(backward[:25]) == {*said[-24:], "Ay me!"} and sorted(backward) == sorted([*said, "Ay me!"])
    for person in (romeo, juliet, phone):
        await person.goes()


def test_a_new_device_fetches_what_was_said(process_server: ProcessServer) -> None:
    """XEP-0313 §4, XEP-0059"""
    asyncio.run(a_new_telephone(process_server))
