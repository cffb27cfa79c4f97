"""SIGTERM under load: new work is refused, what runs is finished or kept, and the server leaves with 0."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2
import psutil

from tests.chaos.client import Client, Gone, Outcome
from tests.chaos.orders import all_orders, long_order
from tests.chaos.site import GRACE_SECONDS, ORPHAN_SECONDS, Missed, Site

SEEN_SECONDS = 2.0  # from SIGTERM to the first word of it
PROBE_SECONDS = 0.05
HALF_A_BODY = (
    b"POST /api/v1/images HTTP/1.1\r\nHost: half\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"prompt":'
)


@dataclass(slots=True)
class Answers:
    """What newcomers were told while the server drained."""

    posts: set[int] = field(default_factory=set)
    readiness: set[int] = field(default_factory=set)
    without_retry_after: int = 0


async def drain(site: Site) -> Sequence[Outcome]:
    """SIGTERM, with a long job in work, open event streams and a half-sent body."""
    await site.start()
    async with site.crowd() as crowd:
        for number in range(site.rounds):
            await crowd.finished(1)
            await _drain_once(site, f"long-{number}")
            await site.start()
            await crowd.settled(set(crowd.in_flight))
    return crowd.outcomes


async def _drain_once(site: Site, ticket: str) -> None:
    client = Client(site.server.url)
    _, half = await asyncio.open_connection("127.0.0.1", site.server.port)
    try:
        half.write(HALF_A_BODY)
        await half.drain()
        job = await client.submit(long_order(), ticket, Prefer="respond-async")
        reader = asyncio.create_task(_read_to_the_end(client, job))
        await client.until(job["id"], ("running",))
        engines, start = site.server.engines(), time.monotonic()
        site.server.terminate()
        site.kills += 1
        probes = asyncio.create_task(_probe(site))
        status = await site.server.until_left(GRACE_SECONDS + 5)
        site.note("drained", time.monotonic() - start)
        answers = await probes
        await reader
    finally:
        half.close()
        await client.close()
    _check(status, answers)
    _, alive = await asyncio.to_thread(psutil.wait_procs, engines, timeout=ORPHAN_SECONDS)
    if alive:
        raise Missed(f"{len(alive)} engines outlived the drained server")


def _check(status: int | None, answers: Answers) -> None:
    if status != 0:
        raise Missed(f"the server left with {status} after SIGTERM")
    if answers.posts != {503} or answers.readiness != {503} or answers.without_retry_after:
        raise Missed(f"newcomers were not told 503 with Retry-After: {answers}")


async def _probe(site: Site) -> Answers:
    """Ask as a newcomer, on a connection of its own each time, as long as somebody listens.

    From the moment on when the server says that it has seen the signal: a busy machine may take a while to
    deliver it.
    """
    answers = Answers()
    unseen_until = time.monotonic() + SEEN_SECONDS
    while site.server.is_alive:
        await asyncio.sleep(PROBE_SECONDS)
        try:
            async with httpx2.AsyncClient(base_url=site.server.url, timeout=5) as client:
                ready = await client.get("/readyz")
                if ready.status_code == 200 and not answers.posts and time.monotonic() < unseen_until:
                    continue
                post = await client.post("/api/v1/images", json=all_orders()[0].body("newcomer"))
        except httpx2.TransportError:  # nobody listens any more: it is about to leave
            continue
        answers.posts.add(post.status_code)
        answers.readiness.add(ready.status_code)
        answers.without_retry_after += "retry-after" not in post.headers
    return answers


async def _read_to_the_end(client: Client, job: dict[str, object]) -> None:
    try:
        async for _ in client.events(job):
            continue
    except Gone:
        return
