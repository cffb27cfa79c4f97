"""Thousands of small jobs and refused requests: afterwards the processes hold what they held before."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2
import psutil

from tests.chaos.client import Client, Outcome, Way
from tests.chaos.crowd import Crowd
from tests.chaos.orders import Order, small_orders
from tests.chaos.site import Missed, Site

JOBS_PER_ROUND = 100
REFUSALS_PER_ROUND = 400
WARM_ROUNDS = 10  # until batches of all sizes were met: for each, oneDNN keeps code, megabytes of it
NUM_CLIENTS = 4  # not more, or new sizes of batches would come for a long time
REST_SECONDS = 10.0  # connections that are kept for the next request are closed, and rounds have been made
MOST_GROWTH = 20e6  # bytes of a process
SLACK = 2  # descriptors, threads, tasks
UNFINISHED = ".partial"

Refusal = tuple[str, str, bytes, int]  # method, path, body, status
REFUSALS: Sequence[Refusal] = (
    ("POST", "/api/v1/images", b'{"prompt": "x", "width": 17}', 400),
    ("POST", "/api/v1/images", b'{"prompt": ', 400),
    ("POST", "/api/v1/images", b'{"prompt": "x", "image": "data:image/png;base64,iVBORw0K"}', 400),
    ("POST", "/v1/images/generations", b'{"prompt": "x", "n": 1000}', 400),
    ("POST", "/sdapi/v1/txt2img", b'{"prompt": 5}', 400),
    ("GET", "/api/v1/jobs/job_0000000000000000", b"", 404),
    ("GET", "/files/00000000000000000000000000000000.png?exp=1&sig=x", b"", 403),
    ("GET", "/nowhere", b"", 404),
)


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of one process; `tasks` are those of the server's event loop."""

    memory_bytes: int
    descriptors: int
    threads: int
    tasks: int = 0


async def leak(site: Site) -> Sequence[Outcome]:
    """A hundred small jobs and four hundred refusals in each round, and the balance at the end."""
    scratch = site.folder / "scratch"
    scratch.mkdir()
    site.server.start(TMPDIR=str(scratch))
    site.note("start", await site.server.until_ready())
    orders = small_orders()
    site.references = {**site.references, **await _references(site, orders)}
    outcomes = await _work(site, orders, WARM_ROUNDS, "warm")
    before, known = await _holdings(site), set(scratch.rglob("*"))  # libraries keep a folder there
    outcomes += await _work(site, orders, site.rounds, "work")
    after = await _holdings(site)
    _compare(site, before, after)
    unfinished = (site.folder / "data").rglob(f"*{UNFINISHED}")
    if left := [str(path) for path in (*unfinished, *scratch.rglob("*")) if path not in known]:
        raise Missed(f"{len(left)} files were left, as {left[0]}")
    return outcomes


async def _references(site: Site, orders: Sequence[Order]) -> dict[int, tuple[str, ...]]:
    """Each once, alone."""
    client = Client(site.server.url)
    try:
        made = [await client.make(one, f"reference-{one.number}", Way.WAIT, 60) for one in orders]
    finally:
        await client.close()
    return {outcome.order.number: outcome.digests for outcome in made}


async def _work(site: Site, orders: Sequence[Order], rounds: int, name: str) -> list[Outcome]:
    crowd = Crowd(
        site.server.url,
        orders,
        f"{site.name}-{name}",
        num_clients=NUM_CLIENTS,
        limit=rounds * JOBS_PER_ROUND,
    )
    async with crowd:
        await crowd.all_done()
    await _be_refused(site, rounds * REFUSALS_PER_ROUND)
    return crowd.outcomes


async def _be_refused(site: Site, count: int) -> None:
    """Ask for what nobody gets, so many times."""
    waiting = itertools.islice(itertools.cycle(REFUSALS), count)
    async with httpx2.AsyncClient(base_url=site.server.url, timeout=60) as http:

        async def one_client() -> None:
            for method, path, body, status in waiting:
                headers = {"Content-Type": "application/json"} if body else {}
                answer = await http.request(method, path, content=body, headers=headers)
                if answer.status_code != status:
                    raise Missed(f"{method} {path}: {answer.status_code} instead of {status}, {answer.text}")

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))


async def _holdings(site: Site) -> dict[str, Holdings]:
    """What server and engine hold when nothing is asked of them."""
    await asyncio.sleep(REST_SECONDS)
    async with httpx2.AsyncClient(base_url=site.server.url) as http:
        text = (await http.get("/metrics")).text
    tasks = next(line for line in text.splitlines() if line.startswith("cascade_tasks "))
    [engine] = site.server.engines()
    return {
        "server": _of(psutil.Process(site.server.pid), int(float(tasks.split()[1]))),
        "engine": _of(engine),
    }


def _of(process: psutil.Process, tasks: int = 0) -> Holdings:
    return Holdings(process.memory_info().rss, process.num_fds(), process.num_threads(), tasks)


def _compare(site: Site, before: dict[str, Holdings], after: dict[str, Holdings]) -> None:
    for name, held in before.items():
        holds = after[name]
        growth = holds.memory_bytes - held.memory_bytes
        site.note(f"growth of the {name}", growth / 1e6, "MB")
        if growth > MOST_GROWTH:
            raise Missed(f"the {name} has grown by {growth / 1e6:.0f} MB")
        for what in ("descriptors", "threads", "tasks"):
            if getattr(holds, what) > getattr(held, what) + SLACK:
                raise Missed(f"the {name} had {getattr(held, what)} {what} and has {getattr(holds, what)}")
