"""Turns the messages of engines into files, rows and events, in this order, and retries what fails.

The database decides. What is known here of a job may be out of date, so every write names the fence that it
was claimed with; if a write is refused, the job is not ours any more, whoever holds it now.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from app.engine.cost import CostModel
from app.engine.protocol import Failed, Latents, Pixels, Previewed, Stepped
from app.errors import AppError, InvalidRequest, StorageFull, UnsupportedParameter
from app.jobs.disk_space import DiskSpace
from app.jobs.events import EventHub, Preview
from app.jobs.faults import Faults
from app.jobs.flights import Flight, Slot
from app.jobs.job import Failure, Job, JobStatus, StoredImage, Timings
from app.jobs.job_notes import JobNotes
from app.jobs.pictures import encode_picture, encode_preview
from app.jobs.store import JobStore
from app.logs import Logger
from app.metrics import Metrics
from app.storage.credentials import Credentials
from app.storage.images import ImageStore
from app.storage.inputs import InputStore

MAX_PIXELS_WAITING = 8  # finished pictures that may wait for encoding or disk space before engines have to
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries to write

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resources:
    """The dependencies of those who have jobs done, except engines."""

    store: JobStore
    images: ImageStore
    inputs: InputStore
    encoders: Executor
    storage: Executor
    credentials: Credentials
    events: EventHub
    cost: CostModel
    metrics: Metrics
    logger: Logger
    faults: Faults
    notes: JobNotes
    disk_space: DiskSpace
    model_name: str
    clock: Callable[[], float]  # time of day
    on_change: Callable[[], None]  # room, or an engine, came or went
    on_queued: Callable[[], None]  # a job is in the queue again
    on_end: Callable[[Job, bool], None]  # a job ended; True when we ended it


class ResultWriter:
    """Stores the results of the jobs in our hands."""

    def __init__(self, resources: Resources) -> None:
        self.is_leaving = False  # what cannot be written at once is left to the next holder of our lock
        self._resources = resources
        self._store = resources.store
        self._events = resources.events
        self._logger = resources.logger
        self._pixels = asyncio.Semaphore(MAX_PIXELS_WAITING)

    def follow(self, flight: Flight, steps: Iterable[Stepped]) -> None:
        """Record steps of a job, and publish its progress once if somebody watches it already."""
        for step in steps:
            flight.stepped(step)
        if self._events.is_watched(flight.job.id):
            self._events.publish(flight.job.id, flight.progress())

    async def hear(self, flight: Flight, message: Previewed | Latents | Pixels | Failed) -> None:
        """Handle a message of an engine about a job. Waits while too many pictures wait to be encoded."""
        match message:
            case Previewed():
                self._spawn(flight, self._show(flight, message))
            case Latents():
                self._spawn(flight, self._keep_latents(flight, message))
            case Pixels() if message.index in flight.missing:
                await self._pixels.acquire()
                flight.missing.discard(message.index)
                self._spawn(flight, self._keep_picture(flight, message))
                self._make_room(flight.slot)
            case Failed():
                self._spawn(flight, self.end(flight, partial(self._failed, _blame(message))))

    def finish(self, flight: Flight) -> None:
        """End a job that has all its pictures: the last server died before it had written the end."""
        self._spawn(flight, self.end(flight, lambda job: job.succeeded(self._resources.clock())))

    async def end(self, flight: Flight, moved: Callable[[Job], Job]) -> None:
        """End a job, unless it has just ended otherwise."""
        async with flight.lock:
            if not flight.is_over:
                self._events.publish(flight.job.id, flight.progress())  # the last one, which stays
                await self._end(flight, moved(flight.job))

    async def read_inputs(self, job: Job) -> dict[str, bytes]:
        """Read the pictures that came with a job. Raises AppError or OSError if one cannot be read."""
        read = self._resources.inputs.read
        loop = asyncio.get_running_loop()
        return {
            name: await loop.run_in_executor(self._resources.storage, read, name)
            for name in sorted(job.request.input_names)
        }

    async def fail(self, flight: Flight, error: AppError | OSError) -> None:
        """Fail a job because a picture that came with it cannot be read."""
        self._logger.error("a picture that came cannot be read", job=flight.job.id, exc_info=error)
        message = "a picture that came with the request cannot be read; the server's log says why"
        await self.end(flight, partial(self._failed, Failure(500, "internal_error", message)))

    def drop(self, flight: Flight) -> None:
        """Remove a job from our hands, which makes room for others."""
        flight.is_over = True
        flight.slot.remove(flight)
        self._make_room(flight.slot)

    def _make_room(self, slot: Slot) -> None:
        slot.board(asyncio.get_running_loop().time())
        self._resources.on_change()

    async def release(self, slot: Slot, crashed: set[str]) -> None:
        """Requeue the jobs of a slot except its flights; those `crashed` were aboard when its engine died."""
        release = partial(
            self._store.release, slot.worker, crashed_jobs=crashed, kept_jobs=frozenset(slot.flights)
        )
        released = await self.persist(release)
        for job in released:
            self._logger.warning(
                "a job goes back",
                job=job.id,
                status=job.status.value,
                crashes=job.crashes,
                worker=slot.worker,
            )
            self.tell(job, is_ours=True)

    def tell(self, job: Job, *, is_ours: bool) -> None:
        """Publish where a job is now; `is_ours` if we moved it there."""
        if job.is_finished:
            self._resources.on_end(job, is_ours)
            self._events.publish(job.id, job)
        elif job.status == JobStatus.QUEUED:
            self._resources.on_queued()

    async def persist(self, write: Callable[[], Awaitable[T]]) -> T:
        """Repeat a write, which must be safe to repeat, until it succeeds or, when we leave, fails.

        A database that is away comes back, and a full disk is emptied; until then no end is published.
        """
        pauses = _pauses()
        try:
            while True:
                pause = next(pauses)
                try:
                    return await write()
                except Exception as error:
                    if self.is_leaving:
                        raise
                    if isinstance(error, StorageFull):
                        self._resources.disk_space.lacks(write, error)
                    else:
                        self._logger.error("the database does not answer", seconds=pause, exc_info=error)
                await asyncio.sleep(pause)
        finally:
            self._resources.disk_space.suffices(write)

    def _spawn(self, flight: Flight, work: Coroutine[Any, Any, None]) -> None:
        write = asyncio.create_task(self._guard(flight, work))
        flight.writes.add(write)
        write.add_done_callback(flight.writes.discard)

    async def _guard(self, flight: Flight, work: Coroutine[Any, Any, None]) -> None:
        """Do work on a job. After an unexpected error, requeue the job as if it had crashed an engine."""
        try:
            await work
        except Exception as error:
            self._logger.error("a job goes back after a mistake", job=flight.job.id, exc_info=error)
            await self.end(flight, lambda job: job.released(crashed=True))

    async def _show(self, flight: Flight, message: Previewed) -> None:
        loop = asyncio.get_running_loop()
        encode = partial(encode_preview, message, flight.job, self._resources.credentials)
        try:
            content = await loop.run_in_executor(self._resources.encoders, encode)
        except (AppError, OSError, ValueError) as error:
            self._logger.warning("a preview could not be encoded", job=flight.job.id, exc_info=error)
            return
        # A newer one may have been encoded faster.
        if message.preview > flight.last_preview.get(message.index, -1):
            flight.last_preview[message.index] = message.preview
            self._events.publish(flight.job.id, Preview(message.index, message.preview, content))

    async def _keep_latents(self, flight: Flight, message: Latents) -> None:
        async with flight.lock:
            if flight.is_over or message.index not in flight.missing:
                return
            save = partial(self._store.save_latents, flight.job, message.index, message.latents)
            if not await self.persist(save):
                await self._let_go(flight)

    async def _keep_picture(self, flight: Flight, message: Pixels) -> None:
        """Write file, row and event, in this order, so that whoever is told of a picture can fetch it."""
        began = time.monotonic()
        try:
            image = await self._to_store(flight, message)
        except (AppError, OSError) as error:
            self._logger.error("a picture could not be kept", job=flight.job.id, exc_info=error)
            await self.end(flight, partial(self._failed, _failure(error)))
            return
        finally:
            self._pixels.release()
        if image is None:
            return
        encode = message.decode_seconds + time.monotonic() - began
        timings = Timings(prior=message.prior_seconds, decoder=message.decoder_seconds, encode=encode)
        if image.resampled_from is not None:
            self._resources.cost.drawn = image.resampled_from
        async with flight.lock:
            if not flight.is_over:
                await self._add_picture(flight, image, timings)

    async def _to_store(self, flight: Flight, message: Pixels) -> StoredImage | None:
        """Encode a picture and store it as soon as there is room. None if nobody wants it any more."""
        resources, loop = self._resources, asyncio.get_running_loop()
        encode = partial(encode_picture, message, flight.job, resources.model_name, resources.credentials)
        image, content = await loop.run_in_executor(resources.encoders, encode)
        save = partial(resources.images.save, content, image.name)
        pauses = _pauses()
        try:
            while not flight.is_over:
                try:
                    await loop.run_in_executor(resources.storage, save)
                    return image
                except StorageFull as error:
                    resources.disk_space.lacks(save, error)
                await asyncio.sleep(next(pauses))
            return None
        finally:
            resources.disk_space.suffices(save)

    async def _add_picture(self, flight: Flight, image: StoredImage, timings: Timings) -> None:
        job = flight.job_with(image)
        is_last = len(job.images) == job.num_images
        ended = job.succeeded(self._resources.clock(), timings) if is_last else None
        if not await self.persist(partial(self._store.save_image, flight.job, image, ended)):
            await self._let_go(flight)
            return
        flight.job = job
        self._resources.metrics.pictures.inc()
        self._events.publish(job.id, image)
        self._events.publish(job.id, flight.progress())
        if ended is not None:
            self._tell_end(flight, ended)

    def _failed(self, failure: Failure, job: Job) -> Job:
        return job.failed(failure, self._resources.clock())

    # Endings. The caller of these holds the lock of the flight.

    async def _end(self, flight: Flight, after: Job) -> None:
        """Write the end of a job, then publish it. If the job moved on without us, publish where it is."""
        is_ours = await self.persist(partial(self._store.move, flight.job, after))
        if is_ours and after.is_finished:
            self._tell_end(flight, after)
        else:
            await self._let_go(flight, is_ours=is_ours)

    def _tell_end(self, flight: Flight, ended: Job) -> None:
        self._resources.faults.hit("after_commit_before_event")
        self.drop(flight)
        self.tell(ended, is_ours=True)

    async def _let_go(self, flight: Flight, *, is_ours: bool = False) -> None:
        """Drop a job that is not in our hands any more, and publish where it is."""
        now = await self.persist(partial(self._store.get, flight.job.id, None))
        self.drop(flight)
        if now is None:
            self._events.forget(flight.job.id)
        else:
            self.tell(now, is_ours=is_ours)


def _pauses() -> Iterator[float]:
    """Yield the seconds between tries."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def _blame(message: Failed) -> Failure:
    """Convert an engine's message to a failure, with the HTTP status of its code."""
    return Failure(_STATUSES.get(message.code, 500), message.code, message.message)


def _failure(error: AppError | OSError) -> Failure:
    if isinstance(error, AppError):
        return Failure.of(error)
    return Failure(500, "internal_error", "the picture could not be kept; the server's log says why")


# Errors of engines that are the request's mistake; all others are our failure.
_STATUSES = {kind.code: kind.status for kind in (InvalidRequest, UnsupportedParameter)}
