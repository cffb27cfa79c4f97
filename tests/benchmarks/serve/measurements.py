"""What is measured: a lone picture, a closed loop, open loops of rising rate, and five times too much."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.client import HTTPConnection
from urllib.parse import urlsplit

import aiohttp

from app.jobs.flights import LEAST_PLENTY
from tests.benchmarks.measure import Comparison, compare
from tests.benchmarks.serve.contestants import OURS, PEER, Contestants
from tests.benchmarks.serve.library import library
from tests.benchmarks.serve.load import PATH, Load, Pulse, closed_loop, feel_pulse, open_loop
from tests.benchmarks.serve.ticks import Ticks, read_ticks
from tests.benchmarks.serve.workload import mean_images, orders, usual_orders

OVERLOAD = 5.0  # times the capacity
OVERLOAD_QUEUE = 32
PATIENCE_SECONDS = 20.0  # of a client in an open loop
SHARES = (0.5, 0.9, 2.0, 4.0)  # offered in open loops, of the peer's capacity

Advance = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure."""

    lone_rounds: int
    closed_rounds: int
    warm_up: float  # seconds of each load before it is measured
    seconds: float  # of each load
    overload_seconds: float
    shares: tuple[float, ...]
    num_clients: int = 16

    @classmethod
    def of(cls, is_quick: bool) -> "Extent":
        """A run to believe, or one to see that everything works."""
        return cls(3, 1, 2, 6, 8, (2.0,)) if is_quick else cls(40, 5, 10, 20, 60, SHARES)

    @property
    def num_measurements(self) -> int:
        """For a progress bar."""
        return 3 + 2 * self.closed_rounds + 2 * len(self.shares)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load and what our server said of its ticks meanwhile."""

    server: str
    offered: float | None  # pictures a second; None in a closed loop
    load: Load
    ticks: Ticks | None


@dataclass(frozen=True, slots=True)
class Overload:
    """What happened at five times the capacity."""

    offered: float  # pictures a second
    load: Load
    health: Pulse
    capacity: int  # of the queue
    most_queued: int


async def lone_picture(contestants: Contestants, rounds: int) -> Comparison:
    """A picture over HTTP against the same call of the library and the same encoder: what the server adds.

    Each round has a prompt of its own, which the server has not encoded yet. The client is the plainest there
    is, as what it takes itself is not the server's. The library's process is given what an engine is given.
    """
    over_http, in_library = usual_orders(), usual_orders()
    with library(contestants.model) as ours:
        async with contestants.started(OURS) as url:
            with closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as client:

                def served() -> object:
                    content = json.dumps(next(over_http).body)
                    client.request("POST", PATH, content, {"Content-Type": "application/json"})
                    response = client.getresponse()
                    assert response.status == HTTPStatus.OK
                    return response.read()

                return await asyncio.to_thread(
                    compare,
                    "a lone picture, over HTTP and in the library",
                    served,
                    lambda: ours.draw(next(in_library)),
                    rounds=rounds,
                )


async def closed(contestants: Contestants, server: str, extent: Extent, seed: int) -> Loaded:
    """So many pictures a second for so many clients."""
    async with contestants.running(server) as client:
        before = await read_ticks(client, server)
        load = await _crowd(client, extent, seed)
        return Loaded(server, None, load, await read_ticks(client, server, before))


async def opened(contestants: Contestants, server: str, extent: Extent, offered: float) -> Loaded:
    """Pictures offered at a steady rate, whatever the server makes of them.

    Measured from the start: who is offered too much falls further behind the longer it lasts.
    """
    async with contestants.running(server) as client:
        before = await read_ticks(client, server)
        load = await open_loop(
            client,
            orders(seed=1),
            rate=offered / mean_images(),
            seconds=extent.seconds,
            patience=PATIENCE_SECONDS,
        )
        return Loaded(server, offered, load, await read_ticks(client, server, before))


async def overloaded(contestants: Contestants, extent: Extent, capacity: float) -> Overload:
    """Five times what the server can do, with a queue that is soon full.

    Who was accepted waits for as long as a full queue and full engines take twice: who left earlier would
    have work dropped that was half done, and the goodput would tell of impatience.
    """
    offered = OVERLOAD * capacity
    devices = str(contestants.settings.get("devices", "")).count(",") + 1
    accepted = OVERLOAD_QUEUE + LEAST_PLENTY * devices
    patience = max(PATIENCE_SECONDS, 2 * accepted * mean_images() / capacity)
    async with contestants.running(OURS, max_queue=OVERLOAD_QUEUE) as client:
        stop = asyncio.Event()
        health = asyncio.create_task(feel_pulse(client, "/healthz", 0.25, stop))
        queue = asyncio.create_task(_watch_queue(client, stop))
        try:
            load = await open_loop(
                client,
                orders(seed=2),
                rate=offered / mean_images(),
                seconds=extent.overload_seconds,
                patience=patience,
                warm_up=extent.warm_up,
            )
        finally:
            stop.set()
        return Overload(offered, load, await health, OVERLOAD_QUEUE, await queue)


async def tuned(contestants: Contestants, extent: Extent) -> Contestants:
    """Each server at its best here: threads in the peer, engines in ours, by a short trial of each."""
    peers = [replace(contestants, peer_threads=threads) for threads in (None, 1)]
    contestants = await _fastest(peers, PEER, extent)
    if "devices" in contestants.settings:
        return contestants
    choices = ("auto", ",".join(["cpu"] * (os.cpu_count() or 1)))
    ours = [replace(contestants, settings={**contestants.settings, "devices": one}) for one in choices]
    return await _fastest(ours, OURS, extent)


async def _fastest(candidates: Sequence[Contestants], server: str, extent: Extent) -> Contestants:
    rates = []
    for candidate in candidates:
        async with candidate.running(server) as client:
            load = await _crowd(client, extent, seed=0)
        rates.append(load.images_per_second)
    return candidates[rates.index(max(rates))]


async def _crowd(client: aiohttp.ClientSession, extent: Extent, seed: int) -> Load:
    return await closed_loop(
        client,
        orders(seed),
        num_clients=extent.num_clients,
        seconds=extent.seconds,
        warm_up=extent.warm_up,
    )


async def _watch_queue(client: aiohttp.ClientSession, stop: asyncio.Event) -> int:
    most = 0
    while not stop.is_set():
        async with client.get("/api/v1/queue", raise_for_status=True) as answer:
            most = max(most, int((await answer.json())["queued"]))
        await asyncio.sleep(0.25)
    return most
