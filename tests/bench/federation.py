"""What a chat message costs that crosses from one server to another, next to one that stays at home.

    python -m tests.bench.federation [--messages 20000]

Two xmppd on 127.0.0.2 and 127.0.0.3 find each other by static routes and prove themselves by
dialback inside TLS; both keep the journal and sync it. Pairs of clients send in batches, and
every message is counted where it arrives. Printed is each server's processor time per
message: the target is at most twice what a message costs that stays at home.
"""

from __future__ import annotations

import argparse
import re
import ssl
import tempfile
import time
from pathlib import Path

import xmppd
from tests.bench.accounting import cpu_seconds
from tests.dialogue import Cast, Client, SocketWire
from tests.servers import ServerProcess, configuration, credentials_of, write_configuration

PAIRS = 8
BATCH = 50  # messages of each pair that are under way
ADDRESSES = {"one.example": "127.0.0.2", "two.example": "127.0.0.3"}
PORT = 15269
BODY = "Shall I hear more, or shall I speak at this? " * 4
PATIENCE = 60.0  # seconds for a batch


class Home:
    """A server of one domain, with accounts for all pairs."""

    def __init__(self, folder: Path, domain: str) -> None:
        folder.mkdir()
        self.domain, self.data, address = domain, folder / "data", ADDRESSES[domain]
        config = write_configuration(folder, configuration({
            "hosts": [domain],
            "listen": {"client": [f"{address}:0"], "client_tls": [f"{address}:0"], "server": [f"{address}:{PORT}"]},
            "limits": {"remote_bytes_per_second": 0, "recipients_per_minute": 0},
            "archive": {"enabled": False},
            "federation": {"enabled": True, "routes": {name: f"{where}:{PORT}" for name, where in ADDRESSES.items()}},
        }))  # fmt: skip
        self.process = ServerProcess(config, self.data)
        ready = self.process.wait_for("ready: ")
        self.address = (address, int(re.findall(rf"client {address}:(\d+)", ready)[0]))
        for number in range(2 * PAIRS):
            with xmppd.ControlClient(self.data) as control:
                control.request("user add", {"jid": f"user{number}@{domain}", "credentials": credentials_of(f"user{number}")})

    def cpu(self) -> float:
        """Return the processor time spent so far, in seconds."""
        return cpu_seconds(self.process.process.pid)

    def client(self, cast: Cast, number: int) -> Client:
        """Return somebody who is logged in and available."""
        context = ssl.create_default_context(cafile=str(self.data / "tls" / "ca.pem"))
        context.check_hostname = False
        client = Client(lambda: SocketWire(self.address, context), cast, host=self.domain)
        client.login(f"user{number}", resource="bench")
        client.comes_online()
        return client


def send_and_count(pairs: list[tuple[Client, Client]], messages: int) -> int:
    """Let the first of each pair write to the second, until so many have arrived; return how many."""
    sent = 0
    while sent < messages:
        for speaker, listener in pairs:
            one = f"<message to='{listener.jid}' type='chat'><body>{BODY}</body></message>".encode()
            assert speaker.wire is not None
            speaker.wire.send(one * BATCH)
        for _speaker, listener in pairs:
            missing, give_up = BATCH, time.monotonic() + PATIENCE
            while missing:
                assert listener.wire is not None
                data = listener.wire.read(max(0.0, give_up - time.monotonic()))
                assert data, f"{missing} messages are missing"
                missing -= data.count(b"</message>")
        sent += BATCH * len(pairs)
    return sent


def measure(homes: list[Home], pairs: list[tuple[Client, Client]], messages: int) -> list[float]:
    """Return the microseconds of processor time that each server spends per message."""
    send_and_count(pairs, messages // 10)
    before = [home.cpu() for home in homes]
    count = send_and_count(pairs, messages)
    return [(home.cpu() - then) / count * 1e6 for home, then in zip(homes, before, strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m tests.bench.federation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=20_000)
    messages = parser.parse_args().messages
    with tempfile.TemporaryDirectory() as folder:
        homes = [Home(Path(folder, domain), domain) for domain in ADDRESSES]
        cast = Cast()
        near = [homes[0].client(cast, number) for number in range(2 * PAIRS)]
        far = [homes[1].client(cast, number) for number in range(PAIRS)]
        at_home, _idle = measure(homes, list(zip(near[:PAIRS], near[PAIRS:], strict=True)), messages)
        sending, receiving = measure(homes, list(zip(near[:PAIRS], far, strict=True)), messages)
        print(f"at home {at_home:.0f} µs a message; across {sending:.0f} µs for who sends ({sending / at_home:.2f} times) "
              f"and {receiving:.0f} µs for who receives ({receiving / at_home:.2f} times)")  # fmt: skip
        cast.hang_up()
        for home in homes:
            home.process.stop()


if __name__ == "__main__":
    main()
