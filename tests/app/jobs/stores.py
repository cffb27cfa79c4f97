"""What the tests of the store put into it, and the time that they let pass."""

from typing import Any

from sqlalchemy import Connection, delete

from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS
from app.jobs.job import Job, StoredImage
from app.jobs.store import JobStore
from app.jobs.tables import jobs
from app.schemas import GenerationRequest

LEASE_SECONDS = 30.0
MANY = 10_000  # a bound of the queue that no test reaches


class Clock:
    """The time of day, which a test may let jump, and the time that only ever passes."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.passed = 0.0

    def wall(self) -> float:
        return self.now

    def steady(self) -> float:
        return self.passed

    def let_pass(self, seconds: float) -> None:
        self.now += seconds
        self.passed += seconds


async def kept(url: str, databases: dict[str, Database]) -> Database:
    """An empty one of those that are kept from test to test."""
    if url not in databases:
        databases[url] = await Database.open(url, NO_FAULTS)
    await databases[url].write(empty)
    return databases[url]


def empty(connection: Connection) -> None:
    """Delete all jobs, and what belongs to them."""
    connection.execute(delete(jobs))


def new_job(
    tenant: str = "ann", *, num_images: int = 1, created_at: float = 1_700_000_000.0, **fields: Any
) -> Job:
    seeds = tuple(range(7, 7 + num_images))
    request = GenerationRequest(prompt="a red circle, привет", width=64, height=128, seeds=seeds)
    return Job(tenant=tenant, request=request, created_at=created_at, **fields)


def new_image(index: int = 0, name: str = "0" * 32 + ".png") -> StoredImage:
    return StoredImage(
        index=index,
        seed=7 + index,
        name=name,
        width=64,
        height=128,
        mime_type="image/png",
        num_bytes=1234,
        sha256="ab" * 32,
        resampled_from=(32, 64),
        prompt_truncated=True,
        prompt_tokens=9,
    )


async def add(store: JobStore, *new: Job) -> None:
    for job in new:
        await store.submit(job, max_queue=MANY)


async def claim(store: JobStore, worker: str = "one", limit: int = 1) -> list[Job]:
    return list(await store.claim(worker, limit=limit, lease_seconds=LEASE_SECONDS))


async def add_running(store: JobStore, worker: str = "one", **fields: Any) -> Job:
    await add(store, new_job(**fields))
    (job,) = await claim(store, worker)
    return job


async def stored(store: JobStore, job: Job) -> Job:
    found = await store.get(job.id, None)
    assert found is not None
    return found
