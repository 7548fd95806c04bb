"""Chat rooms with slixmpp's own plugin for XEP-0045, and those for self-pings and direct invitations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from slixmpp import JID
from slixmpp.exceptions import PresenceError
from slixmpp.plugins.xep_0410.self_ping import PingStatus

from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer

ROOM = JID("orchard@conference.example.org")


class Guest(Person):
    """Somebody with the plugins for rooms; what a room says waits in a queue."""

    def __init__(self, server: ProcessServer, name: str) -> None:
        super().__init__(f"{name}@example.org/here", server.authority)
        for plugin in ("xep_0004", "xep_0030", "xep_0045", "xep_0199", "xep_0249", "xep_0410"):
            self.register_plugin(plugin)
        self.said: asyncio.Queue[Any] = asyncio.Queue()
        self.seen: asyncio.Queue[Any] = asyncio.Queue()
        self.invitations: asyncio.Queue[Any] = asyncio.Queue()
        self.add_event_handler("groupchat_message", self.said.put_nowait)
        self.add_event_handler("groupchat_presence", self.seen.put_nowait)
        self.add_event_handler("groupchat_invite", self.invitations.put_nowait)
        self.add_event_handler("groupchat_direct_invite", self.invitations.put_nowait)

    @property
    def rooms(self) -> Any:
        """The plugin."""
        return self.plugin["xep_0045"]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for presences until something is true of what the plugin knows."""
        while not holds():
            await soon(self.seen.get())

    async def is_shown_out(self, nick: str, *codes: int) -> None:
        """Wait for the presence that ends the own visit."""
        while True:
            presence = await soon(self.seen.get())
            if presence["type"] == "unavailable" and presence["from"].resource == nick:
                assert {110, *codes} <= presence["muc"]["status_codes"]
                return


async def an_evening(server: ProcessServer) -> None:
    romeo, juliet, nurse = (Guest(server, name) for name in ("romeo", "juliet", "nurse"))
    for guest in (romeo, juliet, nurse):
        await guest.comes_online(server.port)

    await soon(romeo.rooms.join_muc_wait(ROOM, "Romeo", maxstanzas=0))
    form = await soon(romeo.rooms.get_room_config(ROOM))
    form.set_values({"muc#roomconfig_roomname": "The orchard", "muc#roomconfig_persistentroom": True})
    await soon(romeo.rooms.set_room_config(ROOM, form))

    own, subject, others, history = await soon(juliet.rooms.join_muc_wait(ROOM, "Juliet"))
    assert own["from"].resource == "Juliet" and [presence["from"].resource for presence in others] == ["Romeo", "Juliet"]
    assert not subject["subject"] and not history
    await romeo.until(lambda: "Juliet" in romeo.rooms.get_roster(ROOM))
    assert romeo.rooms.get_jid_property(ROOM, "Juliet", "role") == "participant"

    romeo.send_message(ROOM, "But soft! what light?", mtype="groupchat")
    for guest in (romeo, juliet):
        message = await soon(guest.said.get())
        assert (message["body"], message["from"].resource) == ("But soft! what light?", "Romeo")

    for guest, nick, status in ((juliet, "Juliet", PingStatus.JOINED), (nurse, "Nurse", PingStatus.DISCONNECTED)):
        assert await soon(guest.plugin["xep_0410"].send_self_ping(JID(f"{ROOM}/{nick}"))) is status

    romeo.rooms.invite(ROOM, JID("nurse@example.org"), reason="Come!")
    assert (await soon(nurse.invitations.get()))["from"].bare == ROOM.bare
    juliet.plugin["xep_0249"].send_invitation(JID("nurse@example.org"), ROOM, reason="Do!")
    assert (await soon(nurse.invitations.get()))["from"].bare == "juliet@example.org"

    await soon(romeo.rooms.set_affiliation(ROOM, "member", jid=JID("nurse@example.org")))
    assert await soon(romeo.rooms.get_affiliation_list(ROOM, "member")) == ["nurse@example.org"]
    await soon(nurse.rooms.join_muc_wait(ROOM, "Nurse"))
    await soon(romeo.rooms.set_role(ROOM, "Nurse", "none", reason="It is late."))
    await nurse.is_shown_out("Nurse", 307)

    await soon(romeo.rooms.set_affiliation(ROOM, "outcast", jid=JID("nurse@example.org"), reason="Peace!"))
    try:
        await soon(nurse.rooms.join_muc_wait(ROOM, "Nurse"))
        raise AssertionError("the nurse is banned")
    except PresenceError as error:
        assert error.condition == "forbidden"

    info = await soon(juliet.plugin["xep_0030"].get_info(ROOM))
    assert {"muc_persistent", "muc_semianonymous", "http://jabber.org/protocol/muc#stable_id"} <= set(
        info["disco_info"]["features"])  # fmt: skip
    await soon(romeo.rooms.destroy(ROOM, reason="Day breaks."))
    await juliet.is_shown_out("Juliet")
    for guest in (romeo, juliet, nurse):
        await guest.goes()


def test_an_evening_in_the_orchard(process_server: ProcessServer) -> None:
    """XEP0045-7.2.2-1, XEP0045-8.2-1, XEP0045-9.1-1, XEP0045-10.1.3-2, XEP0045-10.9-1"""
    asyncio.run(an_evening(process_server))
