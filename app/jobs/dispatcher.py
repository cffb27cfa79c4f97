"""The door between callers and engines: accepts jobs, has them done, tells what becomes of them.

Accepted is what the database has committed, and nobody is told before. One task tends to all that has to be
done now and then; it is woken when something can be claimed.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from app.engine.cost import CostModel
from app.engine.protocol import Ready
from app.errors import (
    AppError,
    ModelLoading,
    ModelUnusable,
    NotFound,
    Overloaded,
    QueueFull,
    ShuttingDown,
    StorageFull,
)
from app.jobs.callers import Callers
from app.jobs.chores import Chores
from app.jobs.database import DatabaseAway
from app.jobs.events import Event, EventHub
from app.jobs.faults import NO_FAULTS, Faults
from app.jobs.fleet import LEAVE_SECONDS, Fleet
from app.jobs.flights import Slot
from app.jobs.forecast import Forecast
from app.jobs.job import Job, JobStatus, Progress
from app.jobs.keeping import Means
from app.jobs.keys import Idempotency
from app.jobs.notes import Notes
from app.jobs.room import NO_ROOM, Room
from app.jobs.seat import Seat
from app.jobs.store import JobStore, Submitted
from app.jobs.supervisor import EngineState, Supervisor
from app.logs import Logger
from app.metrics import Metrics
from app.settings import Settings
from app.storage.images import ImageStore
from app.storage.inputs import InputStore

LOADING_RETRY_SECONDS = 5

T = TypeVar("T")


class Dispatcher:
    """Has jobs done. For one event loop."""

    def __init__(
        self,
        store: JobStore,
        engines: Sequence[Supervisor],
        *,
        seat: Seat,
        images: ImageStore,
        inputs: InputStore,
        encoders: Executor,
        cost: CostModel,
        settings: Settings,
        metrics: Metrics,
        logger: Logger,
        faults: Faults = NO_FAULTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.events = EventHub()
        self.engines = engines
        self._store = store
        self._seat = seat
        self._cost = cost
        self._settings = settings
        self._metrics = metrics
        self._logger = logger
        room = Room(
            [settings.data_dir / "files", settings.data_dir],  # the pictures may be on a disk of their own
            try_job=store.try_to_submit,
            on_held_up=self.events.hold_up,
            metrics=metrics,
            logger=logger,
        )
        means = Means(
            store=store,
            images=images,
            inputs=inputs,
            encoders=encoders,
            events=self.events,
            cost=cost,
            metrics=metrics,
            logger=logger,
            faults=faults,
            notes=Notes(),
            room=room,
            model_name=settings.model_name,
            clock=clock,
            on_change=self._look_up,
            on_queued=lambda: self._chores.wake(is_queued=True),
            on_end=self._take_leave,
        )
        self._notes = means.notes
        self._room = room
        self._callers = Callers(means.notes, self._give_up)
        self._fleet = Fleet(
            [Slot(engine, f"{seat.name}/{number}") for number, engine in enumerate(engines)],
            means,
            self._spawn,
        )
        self._forecast = Forecast(store, self._fleet, self.events, cost)
        self._chores = Chores(
            self._fleet,
            self._forecast,
            means,
            lease_seconds=settings.lease_seconds,
            is_sole=seat.is_sole,
        )
        self._changed = asyncio.Event()
        self._decided = asyncio.Event()  # the model is loaded, or never will be
        self._is_closed = False
        self._canceling = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    # Life

    async def start(self) -> None:
        """Take up what was in work when this server was last killed, and start the engines."""
        await self._fleet.recover()
        for engine in self.engines:
            engine.start(self._fleet)
        self._spawn(self._chores.run())
        self._watching = self._spawn(self._room.watch())

    def close(self) -> None:
        """Take no more work, from callers or from the queue."""
        self._is_closed = True
        self._chores.close()
        self._fleet.close()
        self._look_up()
        if self._seat.is_sole:  # nobody will have the queued jobs done in time
            for job_id, _, _ in self.events.unended():
                if self._fleet.flight(job_id) is None:
                    self.events.forget(job_id)

    async def drain(self, grace_seconds: float) -> None:
        """Take no more work, finish what is in work, and after the grace put back the rest."""
        self.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_seconds
        if flights := self._fleet.flights:
            told = "stopping when what is in work is done; another signal stops at once"
            self._logger.info(told, jobs=len(flights), seconds_at_most=round(grace_seconds))
        while self._fleet.flights and loop.time() < end:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await self._changed.wait()
        await self.stop()

    def abandon(self) -> None:
        """Let go of all who wait. Their jobs stay accepted."""
        self.close()
        self.events.close()

    async def stop(self) -> None:
        """End at once: what is not done stays in the queue."""
        self.abandon()
        self._chores.end()
        if self._watching is not None:
            self._watching.cancel()
        if self._tasks:  # a claim that is being committed should be known, to be put back
            await asyncio.wait(self._tasks, timeout=LEAVE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._fleet.leave()

    # The model

    @property
    def model(self) -> Ready:
        """What the first engine said that was ready. Raises ModelUnusable, ShuttingDown or ModelLoading."""
        if self._is_closed:
            raise ShuttingDown("the server is about to stop", retry_after_seconds=LOADING_RETRY_SECONDS)
        usable = [engine for engine in self.engines if engine.state is not EngineState.UNUSABLE]
        if not usable:
            raise ModelUnusable("the model could not be loaded; the server's log says why")
        for engine in usable:
            if engine.ready is not None:
                return engine.ready
        raise ModelLoading(
            "the model is being loaded; try again soon", retry_after_seconds=LOADING_RETRY_SECONDS
        )

    async def wait_loaded(self, timeout_seconds: float) -> None:
        """Return when it is decided whether there is a model, or after this time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._decided.wait()

    @property
    def has_room(self) -> bool:
        """Whether another job, and its pictures, could be kept."""
        return not self._room.is_short

    @property
    def is_accepting(self) -> bool:
        """Whether a job would be taken now, if there is room to keep it."""
        has_model = any(engine.ready and engine.state is not EngineState.UNUSABLE for engine in self.engines)
        counts, limit = self._forecast.counts, self._settings.max_queue
        has_room = counts.queued < limit or limit == counts.queued + counts.running == 0
        return has_model and has_room and self._forecast.is_current and not self._is_closed

    # For callers

    async def require_room(self, tenant: str) -> None:
        """Raise Overloaded or StorageFull if a new job would be refused now.

        `submit` may find otherwise later.
        """
        if not self.has_room:
            raise self._out_of_room()
        if self._fleet.may_take(tenant):
            return
        try:
            await self._store.require_room(self._settings.max_queue)
        except QueueFull as full:
            raise self._overloaded(full) from None

    async def submit(self, job: Job, idempotency: Idempotency | None = None) -> Submitted:
        """Accept a job. Enter `waiting` directly after it.

        Raises Overloaded, StorageFull, KeyReused, ShuttingDown, ModelLoading and ModelUnusable.
        """
        _ = self.model
        priced = replace(job, cost_seconds=self._cost.price(job.request))
        await self._canceling.acquire()  # or who joins could find a job that is just given up
        try:
            _ = self.model  # we may have closed meanwhile
        except AppError:
            self._canceling.release()
            raise
        submitting = self._spawn(self._submit(priced, idempotency))
        try:
            return await asyncio.shield(submitting)
        finally:
            if submitting.done():  # at once: the caller is waiting before anybody else has a turn
                self._canceling.release()
            else:  # it is sent away, which ends no transaction
                submitting.add_done_callback(lambda _: self._canceling.release())

    def waiting(self, job: Job) -> AbstractContextManager[None]:
        """Wait for a job inside. When the last caller has left, it is canceled, if it is not to finish."""
        return self._callers.waiting(job)

    def detach(self, job_id: str) -> None:
        """The job finishes, whoever leaves."""
        self._notes.of(job_id).is_detached = True

    async def wait(self, job_id: str) -> Job:
        """The job, when it has ended.

        Raises NotFound, ShuttingDown when we end first, StorageFull when it cannot end until there is room.
        """
        if self._fleet.flight(job_id) is None:
            job = await self._get(job_id)
            if job.is_finished:
                return job
            if self._seat.is_sole and self._is_closed and self._fleet.flight(job_id) is None:
                raise self._leaving()
        ended = await self.events.final(job_id)
        if ended is not None:
            return ended
        job = await self._get(job_id)
        if job.is_finished:
            return job
        raise self._leaving() if self._is_closed else self._held_up(job_id)

    async def follow(
        self, job_id: str, last_id: int = 0, *, is_patient: bool = True
    ) -> AsyncGenerator[Event, None]:
        """News of a job after the event `last_id`, up to its end. Raises NotFound.

        Of a job that has ended at least the end is told, even to those who know it. For those who are not
        patient StorageFull is raised when it cannot end until there is room.
        """
        job = await self._get(job_id)
        await self._chores.look_at(job, is_watched=True)
        if self._fleet.flight(job_id) is not None:
            self._forecast.progress(job)  # nobody was told of the steps so far
        last = None
        async for event in self.events.subscribe(job_id, last_id, is_patient=is_patient):
            last = event
            if job.is_finished and last_id == 0 and event.kind != "final":
                continue
            yield event
        if last is None and job.is_finished:
            yield Event(last_id, job)
        has_ended = job.is_finished or (last is not None and last.kind == "final")
        if self.events.is_held_up and not (is_patient or has_ended or self._is_closed):
            raise self._held_up(job_id)

    async def cancel(self, job_id: str, tenant: str | None = None) -> Job | None:
        """End a job, unless it has ended. None when there is no such job of the tenant."""
        return await asyncio.shield(self._spawn(self._cancel(job_id, tenant)))

    def want_previews(self, job_id: str, count: int) -> None:
        """Have so many previews made of each picture of a job that has not ended, if it is done here."""
        self._fleet.want_previews(job_id, count)

    def progress(self, job: Job) -> Progress:
        """How far a job is, as far as it is known here."""
        return self._forecast.progress(job)

    def retry_after_seconds(self) -> int:
        """When there should be room in the queue, 1 to 59."""
        return self._forecast.retry_after_seconds()

    async def eta_seconds(self, job: Job | None = None) -> float:
        """Seconds until a job is done, or all there is."""
        return await self._forecast.eta_seconds(job)

    # Comings and goings

    async def _submit(self, job: Job, idempotency: Idempotency | None) -> Submitted:
        """Have a job accepted and, if there is room for it, claimed: in a task, as nobody may leave between
        what the database has taken down and what is known of it here."""
        submit = partial(
            self._store.submit,
            job,
            max_queue=self._settings.max_queue,
            idempotency=idempotency,
            has_room=self.has_room,
        )
        promised_seconds = self._forecast.promise(job)  # before it is part of what lies ahead
        try:
            submitted = await self._fleet.accept(job, submit, self._settings.lease_seconds)
        except QueueFull as full:
            raise self._overloaded(full) from None
        except StorageFull as error:
            self._metrics.refused.labels(StorageFull.code).inc()
            if self.has_room:  # as far as was known
                self._room.refused(error)
            raise
        if not submitted.is_replay:
            self._notes.of(job.id).promised_seconds = promised_seconds
            if not submitted.is_claimed:
                self._chores.wake(is_queued=True)
        return submitted

    async def _cancel(self, job_id: str, tenant: str | None) -> Job | None:
        job = await self._request_cancel(job_id, tenant)
        if job is None or job.is_finished:
            return job
        await self._fleet.cancel(job_id)
        return await self._store.get(job_id, tenant)

    async def _request_cancel(self, job_id: str, tenant: str | None) -> Job | None:
        """End a queued job; of a running one the database knows from now on that it is to end."""
        before = await self._store.get(job_id, tenant)
        if before is None or before.is_finished:
            return before
        job = await self._store.request_cancel(job_id, tenant)
        if job is not None and job.is_finished:
            self._fleet.keeper.tell(job, is_ours=True)
        return job

    def _give_up(self, job: Job) -> None:
        """Nobody waits any more. When we send them away, the job is still theirs to ask for."""
        if not (self._is_closed or job.is_finished or self.events.has_ended(job.id)):
            self._spawn(self._cancel_unless_wanted(job.id))

    async def _cancel_unless_wanted(self, job_id: str) -> None:
        async with self._canceling:
            if self._callers.num_waiting(job_id):
                return
            try:
                job = await self._request_cancel(job_id, None)  # from here on nobody can join it
            except (StorageFull, DatabaseAway) as error:  # it is drawn for nobody
                self._logger.warning("a job that nobody wants goes on", job=job_id, reason=str(error))
                return
        if job is not None and not job.is_finished:
            await self._fleet.cancel(job_id)

    def _take_leave(self, job: Job, is_ours: bool) -> None:
        """A job ended."""
        promised = self._notes.take(job.id).promised_seconds
        if not is_ours:
            return
        seconds = (job.completed_at or job.created_at) - job.created_at
        phases: dict[str, float] = {}
        if job.status == JobStatus.SUCCEEDED:
            phases = {**asdict(job.timings), "total": seconds}
            if promised is not None:
                self._metrics.predicted(promised, seconds)
        reason = None if job.failure is None else job.failure.code
        self._metrics.ended(job.status, reason, phases)
        self._logger.info(
            "job ended", job=job.id, status=job.status.value, reason=reason, seconds=round(seconds, 3)
        )

    def _look_up(self) -> None:
        """There may be room, or nothing left to do, or another engine."""
        self._chores.wake()
        self._changed.set()
        usable = [engine for engine in self.engines if engine.state is not EngineState.UNUSABLE]
        if self._is_closed or not usable or any(engine.ready for engine in usable):
            self._decided.set()

    async def _get(self, job_id: str) -> Job:
        job = await self._store.get(job_id, None)
        if job is None:
            raise NotFound("there is no such job")
        return job

    def _overloaded(self, full: QueueFull) -> Overloaded:
        self._metrics.refused.labels(Overloaded.code).inc()
        return Overloaded(f"{full}; try again later", retry_after_seconds=self.retry_after_seconds())

    def _out_of_room(self) -> StorageFull:
        self._metrics.refused.labels(StorageFull.code).inc()
        return StorageFull(NO_ROOM)

    def _held_up(self, job_id: str) -> StorageFull:
        """What those are told who wait for a job that waits for room. It is done then, whoever leaves now."""
        self.detach(job_id)
        return StorageFull(
            f"there is no room to keep the picture now; {job_id} goes on when the operator has made some: "
            "ask for it then, or for the same with its Idempotency-Key"
        )

    def _leaving(self) -> ShuttingDown:
        return ShuttingDown(
            "the server is about to stop; the job goes on when it is back",
            retry_after_seconds=LOADING_RETRY_SECONDS,
        )

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
