"""Administration with slixmpp's own plugin for ad-hoc commands (XEP-0050)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.interop.test_slixmpp import Person, soon
from tests.servers import ProcessServer

ADMIN = "http://jabber.org/protocol/admin"


class Administrator(Person):
    """Somebody with the plugin."""

    def __init__(self, server: ProcessServer, name: str) -> None:
        super().__init__(f"{name}@example.org/here", server.authority)
        for plugin in ("xep_0004", "xep_0030", "xep_0050"):
            self.register_plugin(plugin)

    async def runs(self, name: str, **answers: Any) -> Any:
        """Ask for a command's form, fill it in, and return the answer."""
        commands = self.plugin["xep_0050"]
        begun = await soon(commands.send_command("example.org", f"{ADMIN}#{name}", action="execute"))
        assert begun["command"]["status"] == "executing"
        form = begun["command"]["form"]
        form.set_values({key.replace("_verify", "-verify"): value for key, value in answers.items()})
        form["type"] = "submit"
        return await soon(commands.send_command(
            "example.org", f"{ADMIN}#{name}", action="complete", payload=form,
            sessionid=begun["command"]["sessionid"]))  # fmt: skip


async def an_hour_of_administration(server: ProcessServer) -> None:
    nurse = Administrator(server, "nurse")
    await nurse.comes_online(server.port)
    found = await soon(nurse.plugin["xep_0050"].get_commands("example.org"))
    assert f"{ADMIN}#add-user" in [node for _, node, _ in found["disco_items"]["items"]]
    done = await nurse.runs("add-user", accountjid="paris@example.org", password="paris-secret",
                            password_verify="paris-secret")  # fmt: skip
    assert done["command"]["status"] == "completed"
    paris = Person("paris@example.org/verona", server.authority)
    await paris.comes_online(server.port)
    await nurse.runs("announce", announcement=["The feast begins."])
    assert (await paris.hears())["body"] == "The feast begins."
    listed = await nurse.runs("get-online-users-list", max_items="25")
    assert listed["command"]["form"].get_values()["onlineuserjids"] == ["nurse@example.org", "paris@example.org"]
    gone = asyncio.Event()
    paris.add_event_handler("disconnected", lambda _: gone.set())
    await nurse.runs("delete-user", accountjids=["paris@example.org"])
    await soon(gone.wait())
    paris.abort()
    await nurse.goes()


@pytest.mark.config(admins=["nurse@example.org"])
def test_an_administrator_works_from_a_client(process_server: ProcessServer) -> None:
    asyncio.run(an_hour_of_administration(process_server))
