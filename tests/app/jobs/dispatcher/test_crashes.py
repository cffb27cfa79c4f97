"""Errors and kills at every point, databases that go away, other servers: one result each, none lost."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from app.engine.protocol import AnyFromEngine, Failed, Latents, Ready, Run
from app.jobs import maintenance, results
from app.jobs.database import Database
from app.jobs.faults import Faults, InjectedFault
from app.jobs.fleet import Fleet
from app.jobs.job import Failure, Job, JobStatus
from app.jobs.store import JobStore
from tests.app.jobs.dispatcher.conftest import Serve, store_of
from tests.app.jobs.servers import Server, eventually, job, latents_of, pixels_of, until

pytestmark = pytest.mark.anyio


# What is passed while pictures are made. Of commits there are more, in no certain order.
PASSAGES = [
    ("before_commit", 1),
    ("before_commit", 2),
    ("before_commit", 3),
    ("before_commit", 4),
    ("after_commit", 1),
    ("after_commit", 2),
    ("after_commit", 3),
    ("after_commit", 4),
    ("after_claim", 1),
    ("after_latents", 1),
    ("after_image_before_commit", 1),
    ("after_image", 1),
    ("after_commit_before_event", 1),
]


async def no_claim(*_: object) -> bool:
    return False


@contextmanager
def closed_to_claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is submitted inside is still queued at the end."""
    with monkeypatch.context() as patch:
        patch.setattr(Fleet, "claim", no_claim)
        patch.setattr(Fleet, "_roomiest_for", lambda *_: None)
        yield


class Diligent:
    """Does whatever an engine of `server` is told, as long as this lasts."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._done: set[int] = set()
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            for engines in self._server.engines:
                for engine in engines:
                    for run in engine.runs:
                        if id(run) not in self._done:
                            self._done.add(id(run))
                            engine.end_prior(run)
                            engine.finish(run)

    def stop(self) -> None:
        self._task.cancel()


@pytest.mark.parametrize(("point", "passage"), PASSAGES)
async def test_an_error_at_any_point_loses_nothing(
    database: Database, serve: Serve, monkeypatch: pytest.MonkeyPatch, point: str, passage: int
) -> None:
    """The server lives on. Whoever waits gets one result, and every picture is there."""
    monkeypatch.setattr(maintenance, "OTHERS_ROUNDS", 10**9)  # nobody is told late of what happened here
    monkeypatch.setattr(maintenance, "IDLE_ROUNDS", 10**9)
    faults = Faults()
    store = store_of(database, faults)
    server = await serve(store=store, faults=faults)
    diligent = Diligent(server)
    with closed_to_claims(monkeypatch):
        accepted = await server.submit(5, 6)
        waiting = asyncio.create_task(server.ended(accepted))
        await until(lambda: server.num_awaited)
    faults._faults |= Faults([f"{point}:raise@{passage}"])._faults
    another = job(7)
    try:
        await server.dispatcher.submit(another)
    except InjectedFault:
        await server.dispatcher.submit(another := job(7))
    for wanted in (await waiting, another):
        done = await server.ended(wanted)
        assert done.status == JobStatus.SUCCEEDED
        assert await store.get(wanted.id, None) == done
        for image in done.images:
            assert (server.files / image.name).exists()
    await until(lambda: server.dispatcher._fleet.flights == [])
    diligent.stop()
    await server.dispatcher.stop()
    counts = await store.counts()
    assert (counts.running, counts.queued) == (0, 0)


async def test_an_end_that_was_committed_without_our_knowledge_is_told(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "OTHERS_ROUNDS", 10**9)
    monkeypatch.setattr(maintenance, "IDLE_ROUNDS", 10**9)
    server = await serve()
    accepted = await server.submit(5)
    waiting = asyncio.create_task(server.ended(accepted))
    move, answers = store.move, iter([OSError("the connection was lost"), None])

    async def lossy_move(before: Job, after: Job) -> bool:
        is_moved = await move(before, after)
        if error := next(answers):
            raise error
        return is_moved

    monkeypatch.setattr(store, "move", lossy_move)
    server.engine.finish(*await server.runs(1))
    assert (await waiting).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("moment", ["submitted", "claimed", "latents", "one picture", "all but the end"])
async def test_a_killed_server_resumes_where_it_was(
    folder: Path,
    database: Database,
    store: JobStore,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    first = Server(folder, store_of(database))
    await first.start()
    if moment == "submitted":
        monkeypatch.setattr(Fleet, "claim", no_claim)
    accepted = await first.submit(5, 6)
    runs = [] if moment == "submitted" else await first.runs(2)
    if moment in ("latents", "one picture"):
        first.engine.end_prior(runs[0])
        await eventually(lambda: store.load_latents(accepted.id))
    if moment == "one picture":
        first.engine.finish(runs[1])
        await eventually(lambda: _images(store, accepted, 1))
    if moment == "all but the end":
        monkeypatch.setattr(first.store, "move", _never)
        first.engine.finish(*runs)
        await eventually(lambda: _images(store, accepted, 2))
    await first.crash()
    monkeypatch.undo()

    second = await serve()
    assert second.server_lock.name == first.server_lock.name
    left = {"one picture": 1, "all but the end": 0}.get(moment, 2)
    again = await second.runs(left)
    kept = latents_of(5) if moment in ("latents", "one picture") else None
    assert [run.latents for run in again] == [kept, None][:left]
    second.engine.finish(*again)
    done = await second.ended(accepted)
    assert (done.status, done.crashes) == (JobStatus.SUCCEEDED, 0)
    assert [image.seed for image in done.images] == [5, 6]
    assert len(list(second.files.iterdir())) == 2


async def _never(*_: object) -> bool:
    await asyncio.Event().wait()
    return False


async def _images(store: JobStore, job: Job, count: int) -> bool:
    found = await store.get(job.id, None)
    return found is not None and len(found.images) == count


@pytest.mark.parametrize(
    "late",
    [
        lambda run: Latents(run.job, run.index, b"late"),
        pixels_of,
        lambda run: Failed(run.job, run.index, "odd", "late"),
    ],
    ids=["latents", "pixels", "failed"],
)
async def test_a_server_that_hung_too_long_cannot_overwrite(
    serve: Serve, store: JobStore, late: Callable[[Run], AnyFromEngine]
) -> None:
    """Its lease ran out, and another one has its job."""
    server = await serve()
    accepted = await server.submit(5, 6)
    runs = await server.runs(2)
    async with server.dispatcher._fleet._boarding:
        (released,) = await store.release(server.dispatcher._fleet.slots[0].worker)
        (stolen,) = await store.claim("another", limit=1, lease_seconds=30)
    assert (released.id, stolen.fence) == (accepted.id, 2)
    server.engine.say(late(runs[0]))
    await until(lambda: server.engine.canceled == [accepted.id])
    assert server.dispatcher._fleet.flights == []
    assert await store.get(accepted.id, None) == stolen
    failed = stolen.failed(Failure(500, "odd", "the other one says"), 1.0)
    await store.move(stolen, failed)
    assert (await server.ended(accepted)).status == JobStatus.FAILED


async def test_a_write_of_an_earlier_claim_leaves_the_later_one_alone(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    accepted, other = await server.submit(1), await server.submit(2)
    [early, _] = await server.runs(2)
    monkeypatch.setattr(results, "FIRST_PAUSE", 0.005)
    save, is_away = store.save_latents, True

    async def save_later(*args: Any) -> bool:
        if is_away:
            raise OSError("connection refused")
        return await save(*args)

    monkeypatch.setattr(store, "save_latents", save_later)
    server.engine.end_prior(early)
    await until(lambda: "does not answer" in server.log.getvalue())
    [slot] = server.dispatcher._fleet.slots
    # What another server does for one that it has not heard of for long; then this one claims it again.
    await store.release(slot.worker, crashed_jobs=[accepted.id], kept_jobs=[other.id])
    await until(lambda: (flight := slot.flights.get(accepted.id)) and flight.job.fence == 2)
    is_away = False
    num_warnings = server.log.getvalue().count("does not answer")
    await asyncio.sleep(0.03)
    assert server.log.getvalue().count("does not answer") <= num_warnings + 1
    assert slot.flights[accepted.id].job.fence == 2
    server.engine.finish(*(await server.runs(3)))
    assert (await server.ended(accepted)).status == JobStatus.SUCCEEDED


async def test_what_another_server_ends_is_told_here(
    folder: Path, database: Database, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "RENEW_SECONDS", 0.02)
    here = Server(folder, store_of(database), is_sole=False, max_samples=0)
    here.dispatcher.engines[0].ready = Ready("cpu", "float32", 64, 64, 1, {})  # and not any more
    await here.dispatcher.start()
    there = await serve(is_sole=False, store=store_of(database))
    accepted = await here.submit(5, 6)
    waiting = asyncio.create_task(here.ended(accepted))
    reading = asyncio.create_task(here.read(accepted))
    there.engine.finish(*await there.runs(2))
    done = await waiting
    assert done.status == JobStatus.SUCCEEDED
    events = await reading
    *images, last = [news for _, news in events][-3:]
    assert sorted(images, key=attrgetter("index")) == list(done.images), "in whichever order they came"
    assert last == done
    canceled = await here.submit(7)
    await there.runs(3)
    await here.dispatcher.cancel(canceled.id)
    assert (await there.ended(canceled)).status == JobStatus.CANCELED
    assert there.engine.canceled == [canceled.id]
    assert (await here.ended(canceled)).status == JobStatus.CANCELED
    await here.stop()
    await there.dispatcher.stop()


async def test_a_database_that_goes_away_comes_back(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    diligent = Diligent(server)
    is_away = True
    refused = 0

    def losing(name: str) -> None:
        method = getattr(store, name)

        async def call(*args: Any, **options: Any) -> Any:
            nonlocal refused
            if is_away:
                refused += 1
                raise OSError("connection refused")
            return await method(*args, **options)

        monkeypatch.setattr(store, name, call)

    jobs = [await server.submit(seed, seed + 10) for seed in range(3)]
    names = (
        "claim",
        "renew",
        "expire",
        "counts",
        "save_latents",
        "save_image",
        "move",
        "load_latents",
        "release",
    )
    for name in names:
        losing(name)
    await until(lambda: refused > 5)
    server.engine.die(-9)
    await until(lambda: refused > 10)
    is_away = False
    assert {(await server.ended(job)).status for job in jobs} == {JobStatus.SUCCEEDED}
    assert "the database does not answer" in server.log.getvalue()
    diligent.stop()
