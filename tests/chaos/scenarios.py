"""What is done to a server while eight clients work. Each scenario leaves it running, for the audit.

A job that was aboard three engines that died is failed by design. So after a kill, or two in a row, those
that were aboard get the time to end before the next one.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tests.chaos.client import FINAL, Client, Outcome, Refused, Way
from tests.chaos.crowd import Crowd
from tests.chaos.orders import long_order
from tests.chaos.site import Missed, Site

WORK_SECONDS = 1.0  # about what a picture takes in company; kills come at a random moment of it
# From the death of an engine to its successor. One of two may die several times before it has worked, and the
# pause before it is started again doubles each time: 0.2 s, ... 3.2 s.
SEEN_SECONDS = 8.0
HANG_SECONDS = 45.0  # from SIGSTOP to a successor: 30 s without a sign of life, and some
AGAIN = 0.2  # share of the kills that are followed by another before the work has recovered
ABOARD_SECONDS = 0.2  # in which a job that is running has begun, and is far from its end
AWAY_SECONDS = 6.0  # that the bucket is away at most: callers are told so after two
NUM_SAME = 50  # clients with one key
SAME_WAYS = (Way.WAIT, Way.POLL, Way.WATCH)  # whose requests are the same
PATIENCE_SECONDS = 300.0


async def kill_engine(site: Site) -> Sequence[Outcome]:
    """`kill -9` of an engine at random moments; sometimes of its successor, too."""
    await site.start()
    async with site.crowd() as crowd:
        while site.kills < site.rounds:
            await crowd.finished(1)
            await site.pause(WORK_SECONDS)
            aboard = set(crowd.in_flight)
            start = await site.send_engine(signal.SIGKILL, within=SEEN_SECONDS)
            if site.kills < site.rounds and site.chance.random() < AGAIN:
                await site.server.until_ready()
                await site.pause(WORK_SECONDS / 4)
                aboard |= crowd.in_flight
                start = await site.send_engine(signal.SIGKILL, within=SEEN_SECONDS)
            await crowd.settled(aboard)
            _note_recovery(site, crowd, start)
    return crowd.outcomes


async def kill_server(site: Site) -> Sequence[Outcome]:
    """`kill -9` of the whole server at random moments; sometimes while it starts again, too."""
    await site.start()
    async with site.crowd() as crowd:
        while site.kills < site.rounds:
            await crowd.finished(1)
            await site.pause(WORK_SECONDS)
            await site.kill_server()
            start = time.monotonic()
            site.server.start()
            if site.kills < site.rounds and site.chance.random() < AGAIN:
                await site.pause(3 * WORK_SECONDS)
                await site.kill_server()
                start = time.monotonic()
                site.server.start()
            await crowd.finished(1)
            _note_recovery(site, crowd, start)
    return crowd.outcomes


async def lose_bucket(site: Site) -> Sequence[Outcome]:
    """`kill -9` of the bucket at random moments; it is back after a random time."""
    site.use_bucket()
    assert site.s3 is not None
    await site.start()
    async with site.crowd() as crowd:
        while site.kills < site.rounds:
            await crowd.finished(2)
            await site.pause(WORK_SECONDS)
            site.s3.stop()
            site.kills += 1
            await site.pause(AWAY_SECONDS)
            start = time.monotonic()
            await asyncio.to_thread(site.s3.start)
            await crowd.finished(1)
            _note_recovery(site, crowd, start)
    return crowd.outcomes


async def hang(site: Site) -> Sequence[Outcome]:
    """`SIGSTOP` of an engine: it lives and says nothing."""
    await site.start()
    async with site.crowd() as crowd:
        while site.kills < site.rounds:
            await crowd.finished(1)
            await site.pause(WORK_SECONDS)
            aboard = set(crowd.in_flight)
            start = await site.send_engine(signal.SIGSTOP, within=HANG_SECONDS)
            await crowd.settled(aboard)
            _note_recovery(site, crowd, start)
    return crowd.outcomes


def poison(num_good: int) -> Callable[[Site], Awaitable[Sequence[Outcome]]]:
    """A scenario with a job that kills every engine that works on it, among so many good ones."""

    async def poisoned(site: Site) -> Sequence[Outcome]:
        await site.start()
        client = Client(site.server.url)
        try:
            async with site.crowd(limit=num_good) as crowd:
                await crowd.finished(1)
                job = await _die_of_it(site, client)
                await crowd.all_done()
        finally:
            await client.close()
        if (job["status"], site.kills) != ("failed", 3):
            raise Missed(f"the poisonous job is {job['status']} after {site.kills} kills")
        return crowd.outcomes

    return poisoned


async def _die_of_it(site: Site, client: Client) -> dict[str, Any]:
    """Submit the poisonous job and kill whichever engine works on it; returns it when it has ended."""
    job = await client.submit(long_order(), "poison", Prefer="respond-async")
    has_waited = True  # since the last kill
    while job["status"] not in FINAL:
        has_waited |= job["status"] == "queued"
        if has_waited and job["status"] == "running":
            await asyncio.sleep(ABOARD_SECONDS)
            await site.send_engine(signal.SIGKILL, within=SEEN_SECONDS)
            has_waited = False
        job = await client.job(job["id"])
    return job


async def same_key(site: Site) -> Sequence[Outcome]:
    """Fifty clients submit one request under one key, and the server dies: one job comes of it."""
    await site.start()
    clients = [Client(site.server.url) for _ in range(NUM_SAME)]
    outcomes: list[Outcome] = []
    try:
        for number in range(site.rounds):
            outcomes += await _visit_together(site, clients, number)
            await site.server.until_ready()  # all may have been answered before it died
            await _require_refusal(clients[0], f"same-{number}")
    finally:
        for client in clients:
            await client.close()
    return outcomes


async def _visit_together(site: Site, clients: Sequence[Client], number: int) -> list[Outcome]:
    """All clients ask for the same, while the server dies and comes back."""
    order = site.orders[number % len(site.orders)]
    visits = [
        asyncio.create_task(client.make(order, f"same-{number}", SAME_WAYS[index % 3], PATIENCE_SECONDS))
        for index, client in enumerate(clients)
    ]
    try:
        await site.pause(WORK_SECONDS / 2)
        await site.kill_server()
        site.server.start()
        return await asyncio.gather(*visits)
    finally:
        for visit in visits:
            visit.cancel()


async def _require_refusal(client: Client, ticket: str) -> None:
    """Another body under a key that is taken must be 422."""
    try:
        await client.submit(long_order(), ticket, Prefer="respond-async")
    except Refused as refusal:
        if refusal.status == 422:
            return
        raise Missed(f"another body under the same key: {refusal}") from None
    raise Missed("another body under the same key was accepted")


def _note_recovery(site: Site, crowd: Crowd, start: float) -> None:
    first = crowd.first_finished_after(start)
    if first is not None:
        site.note("serving again", first - start)
