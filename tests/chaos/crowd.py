"""Clients that keep a server busy while it is tormented."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import httpx2

from tests.chaos.client import Client, Outcome, Way
from tests.chaos.orders import Order
from tests.receiver import Receiver

NUM_CLIENTS = 8  # where nobody says otherwise
WAYS = tuple(Way)
# Of one client with one request; after that the job counts as lost. A server that dies twenty times in a
# row soon after its start, on a machine with others like it, is up for a fraction of that.
PATIENCE_SECONDS = 600.0


class Crowd:
    """Clients in a closed loop; `async with` starts them, and waits in the end for what they asked for."""

    def __init__(
        self,
        url: str,
        orders: Sequence[Order],
        name: str,
        *,
        num_clients: int = NUM_CLIENTS,
        limit: int | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.in_flight: set[str] = set()
        self.finished_at: list[float] = []
        self._receiver = Receiver()
        self._client = Client(url, transport, self._receiver)
        self._name = name
        self._num_clients = num_clients
        self._orders = itertools.cycle(orders)
        self._numbers: Iterator[int] = iter(range(limit)) if limit is not None else itertools.count()
        self._is_over = False
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._receiver.__aenter__()
        self._tasks = [asyncio.create_task(self._one_client()) for _ in range(self._num_clients)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        if error is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=error is not None)
        await self._client.close()
        await self._receiver.__aexit__(kind, error, trace)

    async def finished(self, count: int) -> None:
        """Wait until so many more requests have ended."""
        goal = len(self.outcomes) + count
        await self._until(lambda: len(self.outcomes) >= goal)

    async def settled(self, tickets: set[str]) -> None:
        """Wait until every one of `tickets` has ended."""
        await self._until(lambda: not tickets & self.in_flight)

    async def all_done(self) -> None:
        """Wait until a crowd with a limit has asked for everything and got it."""
        await asyncio.gather(*self._tasks)

    def first_finished_after(self, moment: float) -> float | None:
        """When the first request ended after `moment` (both of time.monotonic)."""
        return next((end for end in self.finished_at if end > moment), None)

    async def _one_client(self) -> None:
        for number in self._numbers:
            if self._is_over:
                return
            ticket, way = f"{self._name}-{number}", WAYS[number % len(WAYS)]
            self.in_flight.add(ticket)
            outcome = await self._client.make(next(self._orders), ticket, way, PATIENCE_SECONDS)
            async with self._changed:
                self.in_flight.remove(ticket)
                self.outcomes.append(outcome)
                self.finished_at.append(time.monotonic())
                self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
