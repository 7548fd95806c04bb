"""Chat rooms with slixmpp's own plugin for XEP-0045, and those for self-pings and direct invitations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from slixmpp import JID
from slixmpp.exceptions import IqError, PresenceError

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
        self.invitations: asyncio.Queue[Any] = asyncio.Queue()
        self.add_event_handler("groupchat_message", self.said.put_nowait)
        self.add_event_handler("groupchat_invite", self.invitations.put_nowait)
        self.add_event_handler("groupchat_direct_invite", self.invitations.put_nowait)

    @property
    def rooms(self) -> Any:
        """The plugin."""
        return self["xep_0045"]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for presences until something is true of what the plugin knows."""
        while not holds():
            await soon(self.presences.get())


async def an_evening(server: ProcessServer) -> None:
    romeo, juliet, nurse = (Guest(server, name) for name in ("romeo", "juliet", "nurse"))
    for guest in (romeo, juliet, nurse):
        await guest.comes_online(server.port)

    await soon(romeo.rooms.join_muc_wait(ROOM, "Romeo", maxstanzas=0))
    form = await soon(romeo.rooms.get_room_config(ROOM))
    form.reply()
    form["type"] = "submit"
    form.set_values({"muc#roomconfig_roomname": "The orchard", "muc#roomconfig_persistentroom": True})
    await soon(romeo.rooms.set_room_config(ROOM, form))

    joined = await soon(juliet.rooms.join_muc_wait(ROOM, "Juliet"))
    assert [presence["from"].resource for presence in joined.occupants] == ["Romeo"]
    await romeo.until(lambda: "Juliet" in romeo.rooms.get_roster(ROOM))
    assert romeo.rooms.get_jid_property(ROOM, "Juliet", "role") == "participant"

    romeo.send_message(ROOM, "But soft! what light?", mtype="groupchat")
    for guest in (romeo, juliet):
        message = await soon(guest.said.get())
        assert (message["body"], message["from"].resource) == ("But soft! what light?", "Romeo")

    await soon(juliet["xep_0410"].is_joined(ROOM, "Juliet")) if hasattr(juliet["xep_0410"], "is_joined") else None
    await soon(juliet["xep_0199"].ping(JID(f"{ROOM}/Juliet")))
    try:
        await soon(nurse["xep_0199"].ping(JID(f"{ROOM}/Nurse")))
        raise AssertionError("the nurse is not in the orchard")
    except IqError as error:
        assert error.condition == "not-acceptable"

    romeo.rooms.invite(ROOM, JID("nurse@example.org"), reason="Come!")
    assert (await soon(nurse.invitations.get()))["from"].bare == ROOM.bare
    juliet["xep_0249"].send_invitation(JID("nurse@example.org"), ROOM, reason="Do!")
    assert (await soon(nurse.invitations.get()))["from"].bare == "juliet@example.org"

    await soon(romeo.rooms.set_affiliation(ROOM, "member", jid=JID("nurse@example.org")))
    members = await soon(romeo.rooms.get_users_by_affiliation(ROOM, "member"))
    assert [str(item["jid"]) for item in members["mucadmin_query"]["items"]] == ["nurse@example.org"]
    await soon(nurse.rooms.join_muc_wait(ROOM, "Nurse"))
    await soon(romeo.rooms.set_role(ROOM, "Nurse", "none", reason="It is late."))
    await nurse.until(lambda: ROOM not in nurse.rooms.get_joined_rooms())

    await soon(romeo.rooms.set_affiliation(ROOM, "outcast", jid=JID("nurse@example.org"), reason="Peace!"))
    try:
        await soon(nurse.rooms.join_muc_wait(ROOM, "Nurse"))
        raise AssertionError("the nurse is banned")
    except PresenceError as error:
        assert error.condition == "forbidden"

    info = await soon(juliet["xep_0030"].get_info(ROOM))
    assert {"muc_persistent", "muc_semianonymous", "http://jabber.org/protocol/muc#stable_id"} <= set(
        info["disco_info"]["features"])  # fmt: skip
    await soon(romeo.rooms.destroy(ROOM, reason="Day breaks."))
    await juliet.until(lambda: ROOM not in juliet.rooms.get_joined_rooms())
    for guest in (romeo, juliet, nurse):
        await guest.goes()


def test_an_evening_in_the_orchard(process_server: ProcessServer) -> None:
    """XEP0045-7.2.2-1, XEP0045-8.2-1, XEP0045-9.1-1, XEP0045-10.1.3-2, XEP0045-10.9-1"""
    asyncio.run(an_evening(process_server))
