"""A server without HTTP: the real dispatcher, supervisors and store, with engines that a test directs."""

import asyncio
import functools
import io
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.engine.cost import CostModel
from app.engine.protocol import (
    Cancel,
    Configure,
    Drain,
    Latents,
    Pixels,
    Progressed,
    Ready,
    Run,
    Stepped,
    ToEngine,
    WantPreviews,
)
from app.jobs.dispatcher import Dispatcher
from app.jobs.events import Event
from app.jobs.faults import NO_FAULTS, Faults
from app.jobs.job import Job
from app.jobs.links import Launch, Link
from app.jobs.server_lock import lock_server
from app.jobs.store import JobStore
from app.jobs.supervisor import Patience, Supervisor
from app.logs import make_logger
from app.metrics import Metrics
from app.schemas import GenerationRequest
from app.settings import Settings
from app.storage.images import ImageStore
from app.storage.inputs import InputStore
from tests.app.jobs.links import FakeLink

PATIENCE_SECONDS = 10


class Engine(FakeLink):
    """Ready at once, if it fits anything; makes a picture when it is told to."""

    def __init__(self, max_samples: int = 100, full_rows: int = 1) -> None:
        super().__init__()
        if max_samples:
            self.say(Ready("cpu", "float32", 64, 64, max_samples, {}, full_rows))
        self.beat()

    def send(self, message: ToEngine) -> None:
        super().send(message)
        if isinstance(message, Drain):
            self.die(0)

    @property
    def runs(self) -> list[Run]:
        return [message for message in self.sent if isinstance(message, Run)]

    @property
    def canceled(self) -> list[str]:
        return [message.job for message in self.sent if isinstance(message, Cancel)]

    @property
    def previews_wanted(self) -> list[WantPreviews]:
        return [message for message in self.sent if isinstance(message, WantPreviews)]

    def step(self, run: Run, step: int, stage: str = "prior", *, remaining: float = 1.0) -> None:
        stepped = Stepped(run.job, run.index, stage, step, 20, remaining)  # type: ignore[arg-type]
        self.say(Progressed((stepped,)))

    def end_prior(self, run: Run) -> None:
        self.say(Latents(run.job, run.index, latents_of(run.seed)))

    def finish(self, *runs: Run) -> None:
        for run in runs:
            self.say(pixels_of(run))


def latents_of(seed: int) -> bytes:
    return f"latents of {seed}".encode()


def pixels_of(run: Run) -> Pixels:
    """A picture that depends on the seed alone."""
    pixels = bytes([run.seed % 256, 7, 9]) * 16
    return Pixels(run.job, run.index, 4, 4, pixels, None, False, 3, 2.0, 1.0, 0.5)


@functools.cache
def usual_settings() -> Settings:
    """To read and check settings takes longer than many a test."""
    return Settings(log_format="json")


class Server:
    """One server on a folder. `engines` are all that were started, by device."""

    def __init__(
        self,
        folder: Path,
        store: JobStore,
        *,
        devices: int = 1,
        max_samples: int = 100,
        full_rows: int = 1,
        launch: Launch | None = None,
        is_sole: bool = True,
        faults: Faults = NO_FAULTS,
        clock: Callable[[], float] = time.time,
        **settings: Any,
    ) -> None:
        assert settings.keys() <= Settings.model_fields.keys()
        self.settings = usual_settings().model_copy(update={"data_dir": folder, **settings})
        self.store = store
        self.metrics = Metrics()
        self.log = io.StringIO()
        self.files = folder / "files"
        self.files.mkdir(exist_ok=True)
        self.images = ImageStore(self.files, 1000)
        (folder / "inputs").mkdir(exist_ok=True)
        self.inputs = InputStore(folder / "inputs", self.settings.max_pixels)
        self.server_lock = lock_server(folder, is_sole=is_sole)
        self.engines: list[list[Engine]] = [[] for _ in range(devices)]
        self.encoders = ThreadPoolExecutor(2)
        logger = make_logger(self.settings, self.log)

        def launching(device: int) -> Launch:
            async def launch() -> Link:
                self.engines[device].append(Engine(max_samples, full_rows))
                return self.engines[device][-1]

            return launch

        self.dispatcher = Dispatcher(
            store,
            [
                Supervisor(
                    launch or launching(device),
                    Configure("tiny", f"cpu:{device}", "float32"),
                    metrics=self.metrics,
                    logger=logger,
                    patience=Patience(first_pause=0.001, longest_pause=0.001),
                )
                for device in range(devices)
            ],
            server_lock=self.server_lock,
            images=self.images,
            inputs=self.inputs,
            encoders=self.encoders,
            storage=self.encoders,
            cost=CostModel(),
            settings=self.settings,
            metrics=self.metrics,
            logger=logger,
            faults=faults,
            clock=clock,
        )

    @property
    def engine(self) -> Engine:
        return self.engines[0][-1]

    @property
    def num_awaited(self) -> int:
        """Jobs whose end somebody waits for."""
        return sum(is_awaited for _, is_awaited, _ in self.dispatcher.events.unended())

    async def start(self) -> "Server":
        await self.dispatcher.start()
        await self.dispatcher.wait_loaded(PATIENCE_SECONDS)
        return self

    async def stop(self) -> None:
        await self.dispatcher.stop()
        self.leave()

    def leave(self) -> None:
        self.encoders.shutdown()
        self.server_lock.leave()

    async def crash(self) -> None:
        """As if by SIGKILL: nothing is written or told any more, and the lock is free."""
        for task in [*self.dispatcher._tasks, *(supervisor._life for supervisor in self.dispatcher.engines)]:
            if task is not None:
                task.cancel()
        writes = [write for flight in self.dispatcher._fleet.flights for write in flight.writes]
        for write in writes:
            write.cancel()
        await asyncio.gather(*writes, *self.dispatcher._tasks, return_exceptions=True)
        for supervisor in self.dispatcher.engines:
            assert supervisor._life is not None
            await asyncio.gather(supervisor._life, return_exceptions=True)
        for link in [link for links in self.engines for link in links]:
            link.kill()
        self.leave()

    async def submit(self, *seeds: int, **details: Any) -> Job:
        submitted = await self.dispatcher.submit(job(*seeds, **details))
        return submitted.job

    async def runs(self, count: int, device: int = 0) -> list[Run]:
        """What the engine of a device was told to make, when it was told so many."""
        await until(lambda: self.engines[device] and len(self.engines[device][-1].runs) >= count)
        runs = self.engines[device][-1].runs
        assert len(runs) == count
        return runs

    async def at_rest(self) -> None:
        """Until the engine is ready, and nothing is being claimed or about to be."""
        fleet = self.dispatcher._fleet
        await until(lambda: self.engine.sent and not (fleet.may_claim or fleet._boarding.locked()))

    async def replace_engine(self) -> None:
        """The engine dies, and another one takes its place."""
        lives = len(self.engines[0])
        self.engine.die(-9)
        await until(lambda: len(self.engines[0]) == lives + 1)

    async def events(self, job: Job, last_id: int = 0) -> list[Event]:
        """All that is told of a job, up to its end."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return [event async for event in self.dispatcher.follow(job.id, last_id)]

    async def read(self, job: Job, last_id: int = 0) -> list[tuple[str, object]]:
        return [(event.kind, event.news) for event in await self.events(job, last_id)]

    async def ended(self, job: Job) -> Job:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.dispatcher.wait(job.id)

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def job(*seeds: int, prompt: str = "a lighthouse", **details: Any) -> Job:
    request = GenerationRequest(prompt=prompt, width=64, height=64, seeds=seeds or (1,))
    return Job(**{"tenant": "", "request": request, "created_at": time.time(), **details})


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens soon."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def eventually(ask: Callable[[], Awaitable[object]]) -> None:
    """The same of something that has to be asked for."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if await ask():
                return
            await asyncio.sleep(0.001)
