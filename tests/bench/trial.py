"""One case's turn on one running server: its clients, and how the cost of a unit is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tests.bench.accounting import cpu_seconds
from tests.bench.load import Client, Load, Script
from tests.bench.people import RESOURCE
from tests.bench.profiler import Profiler
from tests.bench.servers import Server

DRAIN_TIMEOUT = 60.0  # seconds for the last deliveries
WARM_UP = 0.25  # of a case's time goes by before the measuring begins


class Cost:
    """What `Trial.metered` has measured."""

    cpu = 0.0  # seconds of processor time
    wall = 0.0  # seconds


class Trial:
    """A case's turn: `seconds` is how long a case that goes on until it is stopped should be measured."""

    def __init__(self, server: Server, load: Load, seconds: float, profiler: Profiler | None = None) -> None:
        self.server = server
        self.load = load
        self.seconds = seconds
        self.profiler = profiler
        self.clients: list[Client] = []
        self.remark = ""  # how busy the server was, for whoever watches

    def connect(self, numbers: Iterable[int], *, available: bool = False, resource: str = RESOURCE) -> list[Client]:
        """Log these users in, with TLS from the first byte; `available`: they send initial presence too."""
        clients = [Client(self.load, number, self.server.tls_port, resource=resource) for number in numbers]
        self.clients += clients
        self.load.log_in(clients)
        if available:
            for client in clients:
                client.send(b"<presence/>")
            self.quiet()
        return clients

    def quiet(self) -> None:
        """Wait until the server has done what it has to and all that it said is read."""
        self.load.run_for(0.1)
        self.server.settle()
        self.load.run_for(0.1)

    def disconnect(self) -> None:
        """Drop all clients and wait until the server has seen to that."""
        for client in self.clients:
            client.drop()
        self.clients.clear()
        self.load.stopping = False
        if self.server.process is not None:
            self.server.settle()

    @contextmanager
    def metered(self) -> Iterator[Cost]:
        """Measure what the server spends on what happens inside."""
        cost = Cost()
        if self.profiler is not None:
            self.profiler.begin(self.server.pid)
        cpu, wall = cpu_seconds(self.server.pid), time.monotonic()
        try:
            yield cost
            cost.cpu, cost.wall = cpu_seconds(self.server.pid) - cpu, time.monotonic() - wall
        finally:
            if self.profiler is not None:
                self.profiler.end()

    def steady(self, count: Callable[[], int], is_drained: Callable[[], bool], what: str) -> float:
        """Measure a load that its clients keep up by themselves until `load.stopping`.

        Returns microseconds of processor time per unit of `count`, taken from the middle,
        with the load at its full height; then it is stopped, and every unit under way has
        to arrive.
        """
        self.load.run_for(self.seconds * WARM_UP)
        before = count()
        with self.metered() as cost:
            self.load.run_for(self.seconds)
            units = count() - before
        self.load.stopping = True
        self.load.run_until(is_drained, DRAIN_TIMEOUT, what)
        self.remark = f"{units / cost.wall:,.0f} a second with {cost.cpu / cost.wall:.0%} of a core"
        return cost.cpu / max(1, units) * 1e6

    def run_scripts(self, clients: Iterable[Client], script: Callable[[Client], Script], what: str) -> None:
        """Run a script on each client, all at once, until all are done."""
        started = list(clients)
        for client in started:
            client.begin(script(client))
        self.load.run_until(lambda: all(client.script is None for client in started), DRAIN_TIMEOUT, what)
