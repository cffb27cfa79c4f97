"""Fills the disk of a server, empties it, says what callers see: `python -m tests.app.full_disk FOLDER`."""

import asyncio
import random
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from app.engine.contract import Decoded
from app.errors import SettingsError
from app.jobs import disk_space, results
from app.main import create_app
from app.settings import Settings
from tests.app import fakes
from tests.app.conftest import eventually
from tests.app.fakes import FakeRunner, closed

SIDE = 256  # a picture of noise, which no format makes small


class Disk:
    """The file system of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave no byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                with suppress(OSError):
                    while file.write(b"x" * size):
                        pass

    def empty(self) -> None:
        """As it was before."""
        self._filler.unlink()

    def num_unfinished(self) -> int:
        """Files that were begun and left."""
        return len(list(self._folder.rglob("*.partial")))


class NoisyRunner(FakeRunner):
    """Its pictures are large."""

    def _finished(self, track: fakes.FakeTrack) -> Decoded:
        made = super()._finished(track)
        return replace(made, pixels=random.Random(track.run.seed).randbytes(len(made.pixels)))


async def post(client: httpx2.AsyncClient, seed: int = 1) -> httpx2.Response:
    members = {"prompt": "x", "width": SIDE, "height": SIDE, "seed": seed, "response_format": "url"}
    return await client.post("/api/v1/images", json=members)


async def ready(client: httpx2.AsyncClient, wanted: int) -> int:
    """Whether the server is, when that is what is wanted."""

    async def is_wanted() -> bool:
        return (await client.get("/readyz")).status_code == wanted

    await eventually(is_wanted)
    return wanted


async def use(client: httpx2.AsyncClient, runner: FakeRunner, disk: Disk) -> None:
    """A full disk with nothing in work, and one with two jobs."""
    disk.fill()
    refused = (await post(client)).status_code
    up = (await client.get("/healthz")).status_code
    say(f"new: {refused}, ready: {await ready(client, 503)}, up: {up}")
    disk.empty()
    is_ready = await ready(client, 200)
    say(f"with room: {(await post(client)).status_code}, ready: {is_ready}")
    with closed(runner.gate):
        waiting = [asyncio.ensure_future(post(client, seed)) for seed in (2, 3)]
        await eventually(lambda: both_run(client))
        disk.fill()
    told = await asyncio.gather(*waiting)
    statuses = ", ".join(str(answer.status_code) for answer in told)
    say(f"who waited: {statuses}, ready: {await ready(client, 503)}")
    disk.empty()
    ended = [await outcome(client, answer.headers["x-job-id"]) for answer in told]
    say(f"with room: {', '.join(ended)}")


async def both_run(client: httpx2.AsyncClient) -> bool:
    return bool((await client.get("/api/v1/queue")).json()["running"] == 2)


async def outcome(client: httpx2.AsyncClient, job_id: str) -> str:
    """How a job ends; its pictures are whole."""
    job: dict[str, Any] = {}

    async def has_ended() -> bool:
        job.update((await client.get(f"/api/v1/jobs/{job_id}")).json())
        return job["status"] not in ("queued", "running")

    await eventually(has_ended)
    for image in job["images"]:
        content = (await client.get(image["url"])).content
        assert len(content) == image["bytes"] > SIDE * SIDE
    return str(job["status"])


def say(line: str) -> None:
    print(line, flush=True)


async def main(folder: Path) -> None:
    """The whole story."""
    disk_space.LOOK_SECONDS, disk_space.PATIENCE_SECONDS, results.LONGEST_PAUSE = 0.05, 0.3, 0.1
    disk, runner = Disk(folder), NoisyRunner()
    settings = Settings(data_dir=folder / "data", log_format="json", sync_timeout=60)
    app = create_app(settings, runner=runner)
    async with app.router.lifespan_context(app):
        await app.state.services.dispatcher.wait_loaded(fakes.PATIENCE_SECONDS)
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            await use(client, runner, disk)
    say(f"left unfinished: {disk.num_unfinished()}")
    disk.fill()
    try:
        app = create_app(settings, runner=runner)
        async with app.router.lifespan_context(app):
            say("start: it works")
    except SettingsError as error:
        say(f"start: {'there is no space left' if f'no space left in {folder}' in str(error) else error}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
