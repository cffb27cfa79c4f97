"""The dispatcher with the real engine, in threads, and a fake model."""

import asyncio
import io
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from app.errors import GenerationFailed
from app.jobs import fleet
from app.jobs.events import Preview
from app.jobs.job import JobStatus
from app.jobs.links import ThreadLauncher
from app.jobs.store import JobStore
from app.logs import make_logger
from app.settings import Settings
from tests.app.fakes import PATIENCE_SECONDS, FakeRunner, FakeTrack, closed, colour
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import Server, until

pytestmark = pytest.mark.anyio


def launcher(runner: FakeRunner) -> ThreadLauncher:
    return ThreadLauncher(runner, make_logger(Settings(log_format="json"), io.StringIO()))


async def test_pictures_are_made(serve: Serve) -> None:
    server = await serve(launch=launcher(FakeRunner()))
    jobs = [await server.submit(seed, seed + 100) for seed in range(5)]
    for accepted in jobs:
        done = await server.ended(accepted)
        assert done.status == JobStatus.SUCCEEDED
        for image in done.images:
            pixel = Image.open(server.files / image.name).getpixel((0, 0))
            assert pixel == colour(done.request, image.seed)


async def test_progress_and_previews_are_told(serve: Serve) -> None:
    runner, are_seen = FakeRunner(steps=(100, 1)), threading.Event()

    def wait_in_stage_b(tracks: Sequence[FakeTrack]) -> None:
        if tracks[0].work[0].key.stage == "decoder":
            are_seen.wait(PATIENCE_SECONDS)

    runner.on_step = wait_in_stage_b
    server = await serve(launch=launcher(runner))
    with closed(runner.gate):  # until the engine has heard that previews are wanted
        accepted = await server.submit(1)
        server.dispatcher.want_previews(accepted.id, 2)
        await until(lambda: runner.started)
        await server.dispatcher.eta_seconds()
    told = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for event in server.dispatcher.follow(accepted.id):
            told.append(event)
            if isinstance(event.news, Preview):  # a newer one may have taken the place of the first
                are_seen.set()
    assert {event.kind for event in told} >= {"progress", "preview", "image", "final"}


async def test_a_broken_picture_fails_alone(serve: Serve) -> None:
    runner = FakeRunner()
    runner.broken["broken"] = GenerationFailed("it cannot be made")
    server = await serve(launch=launcher(runner))
    broken, good = await server.submit(1, prompt="broken"), await server.submit(1)
    failure = (await server.ended(broken)).failure
    assert failure is not None
    assert failure.message == "it cannot be made"
    assert (await server.ended(good)).status == JobStatus.SUCCEEDED


async def test_a_canceled_job_leaves_the_engine(serve: Serve) -> None:
    runner = FakeRunner()
    server = await serve(launch=launcher(runner))
    with closed(runner.gate):
        accepted = await server.submit(1)
        await until(lambda: runner.started)
        await server.dispatcher.cancel(accepted.id)
    assert (await server.ended(accepted)).status == JobStatus.CANCELED
    again = await server.submit(2)
    assert (await server.ended(again)).status == JobStatus.SUCCEEDED
    assert {track.run.job for batch in runner.batches[-2:] for track in batch} == {again.id}


async def test_a_job_that_kills_its_engine_is_given_up(serve: Serve) -> None:
    runner = FakeRunner()
    runner.deadly.add("deadly")
    server = await serve(launch=launcher(runner))
    deadly, good = await server.submit(1, prompt="deadly"), await server.submit(1)
    failure = (await server.ended(deadly)).failure
    assert failure is not None
    assert failure.code == "generation_failed"
    assert (await server.ended(good)).status == JobStatus.SUCCEEDED
    assert server.dispatcher.engines[0].num_deaths == 3


async def test_an_engine_in_a_step_is_left_alone_when_the_server_ends(
    folder: Path, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LEAVE_SECONDS", 0.05)
    runner = FakeRunner()
    server = await Server(folder, store, launch=launcher(runner)).start()
    with closed(runner.gate):
        accepted = await server.submit(1)
        await until(lambda: runner.started)
        await server.dispatcher.drain(0.01)
    server.leave()
    left = await store.get(accepted.id, None)
    assert left is not None
    assert left.status == JobStatus.QUEUED
