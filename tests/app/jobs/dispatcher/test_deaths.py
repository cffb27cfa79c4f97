"""Engines die with jobs aboard."""

import asyncio
from pathlib import Path

import pytest

from app.engine.protocol import Unusable
from app.errors import (
    ModelLoading,
    ModelUnusable,
)
from app.jobs.job import JobStatus
from app.jobs.store import JobStore
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import Engine, Server, latents_of, until

pytestmark = pytest.mark.anyio


async def test_the_jobs_of_a_dead_engine_are_done_by_the_next(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5, 6, 7)
    runs = await server.runs(3)
    server.engine.finish(runs[1])
    server.engine.end_prior(runs[2])
    await server.replace_engine()
    again = await server.runs(2)
    assert [(run.index, run.latents) for run in again] == [(0, None), (2, latents_of(7))]
    server.engine.finish(*again)
    done = await server.ended(accepted)
    assert done.status == JobStatus.SUCCEEDED
    assert (done.crashes, done.fence) == (1, 2)
    assert len(list(server.files.iterdir())) == 3
    assert server.sample("cascade_jobs_replayed_total", begun_at="decoder") == 1


async def test_a_job_whose_pictures_had_all_come_is_not_made_again(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5)
    server.engine.finish(*await server.runs(1))
    server.engine.die(-9)
    done = await server.ended(accepted)
    assert (done.status, done.crashes) == (JobStatus.SUCCEEDED, 0)
    await until(lambda: len(server.engines[0]) == 2)
    assert server.engine.runs == []


async def test_a_poisonous_job_fails_and_the_good_ones_are_done(serve: Serve) -> None:
    server = await serve()
    poison = await server.submit(666)
    good = [await server.submit(seed) for seed in range(8)]
    deaths = 0

    async def work() -> None:
        nonlocal deaths
        seen: dict[Engine, int] = {}
        while True:
            await asyncio.sleep(0.001)
            for engine in server.engines[0]:
                if engine.status.done():
                    continue
                for run in engine.runs[seen.get(engine, 0) :]:
                    seen[engine] = seen.get(engine, 0) + 1
                    if run.is_alone:
                        assert engine.runs[-1] is run, "something came aboard beside it"
                    if run.seed == 666:
                        deaths += 1
                        engine.die(-9)
                        break
                    if deaths >= 2:
                        engine.finish(run)

    working = asyncio.create_task(work())
    assert {(await server.ended(job)).status for job in good} == {JobStatus.SUCCEEDED}
    done = await server.ended(poison)
    working.cancel()
    assert done.failure is not None
    assert (done.failure.code, deaths) == ("generation_failed", 3)


async def test_who_was_not_sent_yet_is_not_blamed(serve: Serve) -> None:
    server = await serve()
    suspect = await server.submit(1)
    await server.runs(1)
    await server.replace_engine()
    await server.runs(1)
    other = await server.submit(2, priority=1)
    await server.runs(2)
    await server.replace_engine()
    await until(lambda: len(server.dispatcher._fleet.flights) == 2)
    assert [run.job for run in await server.runs(1)] == [other.id]
    await server.replace_engine()
    for count in (1, 2):
        server.engine.finish((await server.runs(count))[-1])
    ended = [await server.ended(job) for job in (suspect, other)]
    assert [job.status for job in ended] == [JobStatus.SUCCEEDED] * 2
    assert [job.crashes for job in ended] == [2, 2]


async def test_who_flies_alone_is_alone_to_blame(serve: Serve) -> None:
    server = await serve()
    jobs = [await server.submit(seed) for seed in range(3)]
    for _ in range(2):
        await server.runs(3)
        await server.replace_engine()
    await server.runs(1)
    await server.replace_engine()
    for count in (1, 2):
        server.engine.finish((await server.runs(count))[-1])
    ended = [await server.ended(job) for job in jobs]
    assert [job.status for job in ended] == [JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.SUCCEEDED]
    assert [job.crashes for job in ended] == [3, 2, 2]


async def test_a_death_touches_only_the_jobs_of_that_engine(serve: Serve) -> None:
    server = await serve(devices=2)
    await until(lambda: all(engine.is_ready for engine in server.dispatcher.engines))
    jobs = [await server.submit(seed) for seed in range(4)]
    runs = [await server.runs(2, device) for device in range(2)]
    server.engines[0][0].die(-9)
    await until(lambda: len(server.engines[0]) == 2)
    server.engines[1][0].finish(*runs[1])

    async def finish() -> None:
        done: set[int] = set()
        while True:
            await asyncio.sleep(0.001)
            for engine in (server.engines[0][-1], server.engines[1][0]):
                for run in engine.runs:
                    if id(run) not in done:
                        done.add(id(run))
                        engine.finish(run)

    finishing = asyncio.create_task(finish())
    crashes = {(await server.ended(job)).id: (await server.ended(job)).crashes for job in jobs}
    finishing.cancel()
    assert {crashes[run.job] for run in runs[1]} == {0}
    assert {crashes[run.job] for run in runs[0]} == {1}


async def test_an_unusable_model_is_told_to_everybody(folder: Path, store: JobStore) -> None:
    server = Server(folder, store, max_samples=0)
    with pytest.raises(ModelLoading):
        _ = server.dispatcher.model
    with pytest.raises(ModelLoading):
        await server.submit(1)
    await server.dispatcher.start()
    await until(lambda: server.engines[0])
    server.engine.say(Unusable("no such folder"))
    server.engine.die(2)
    await server.dispatcher.wait_loaded(10)
    with pytest.raises(ModelUnusable):
        _ = server.dispatcher.model
    assert server.dispatcher.engines[0].reason == "no such folder"
    assert not server.dispatcher.is_accepting
    await server.stop()
