"""Servers on one database: whichever is asked, it knows how far a job is."""

import asyncio
from pathlib import Path

import pytest

from app.engine.protocol import Ready
from app.jobs import maintenance
from app.jobs.database import Database
from app.jobs.job import JobStatus, Progress
from app.jobs.store import JobStore
from tests.app.jobs.dispatcher.conftest import Serve, store_of
from tests.app.jobs.servers import Server, eventually

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "RENEW_SECONDS", 0.005)


async def idle_server(folder: Path, store: JobStore) -> Server:
    """One that accepts jobs, and leaves them to others."""
    server = Server(folder, store, is_sole=False, max_samples=0)
    server.dispatcher.engines[0].ready = Ready("cpu", "float32", 64, 64, 1, {})  # and not any more
    await server.dispatcher.start()
    return server


async def test_progress_is_told_by_servers_that_do_not_draw(
    folder: Path, database: Database, serve: Serve
) -> None:
    here = await idle_server(folder, store_of(database))
    there = await serve(is_sole=False, store=store_of(database))
    accepted = await here.submit(5)
    reading = asyncio.create_task(here.read(accepted))
    [run] = await there.runs(1)

    async def progress() -> Progress:
        now = await here.store.get(accepted.id, None)
        assert now is not None
        return here.dispatcher.progress(now)

    async def is_begun() -> bool:
        return (await progress()).stage == "prior"

    async def is_told() -> bool:
        return (await progress()).step == 3

    async def is_streamed() -> bool:
        return (
            here.dispatcher.progress(accepted).step == 3
        )  # by events alone: what was accepted tells nothing

    await eventually(is_begun)  # before its first step
    there.engine.step(run, 1, remaining=2.0)
    there.engine.step(run, 3, remaining=1.0)
    await eventually(is_told)
    told = await progress()
    assert (told.stage, told.steps) == ("prior", 20)
    assert 0.4 < told.fraction < 0.6
    assert told.eta_seconds is not None
    await eventually(is_streamed)
    there.engine.step(run, 7, "decoder", remaining=0.5)

    async def is_in_stage_b() -> bool:
        return (await progress()).stage == "decoder"

    await eventually(is_in_stage_b)
    there.engine.finish(run)
    assert (await here.ended(accepted)).status == JobStatus.SUCCEEDED
    steps = [news for kind, news in await reading if kind == "progress"]
    assert {(step.stage, step.step) for step in steps if isinstance(step, Progress)} >= {("prior", 3)}
    await here.stop()


async def test_whoever_goes_on_with_a_job_does_not_fall_behind_what_was_told(
    folder: Path, database: Database, serve: Serve
) -> None:
    first = await serve(is_sole=False, store=store_of(database))
    accepted = await first.submit(5)
    [run] = await first.runs(1)
    first.engine.step(run, 1, remaining=2.0)
    first.engine.step(run, 9, remaining=1.0)

    async def fraction() -> float:
        now = await first.store.get(accepted.id, None)
        return 0.0 if now is None or now.progress is None else now.progress.fraction

    async def is_told() -> bool:
        return await fraction() > 0.4

    await eventually(is_told)
    told = await fraction()
    await first.stop()
    second = await serve(is_sole=False, store=store_of(database))
    await second.runs(1)
    assert second.dispatcher.progress(accepted).fraction >= told


async def test_a_server_that_is_alone_writes_nothing_of_it(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5)
    [run] = await server.runs(1)
    server.engine.step(run, 3)
    await asyncio.sleep(0.03)
    now = await server.store.get(accepted.id, None)
    assert now is not None
    assert now.progress is None
