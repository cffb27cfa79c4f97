"""The dispatcher, between callers and engines: accepts jobs, has them done, and tells what becomes of them.

A job is accepted when the database has committed it, and no caller is told before. These objects cooperate:

    JobStore   keeps the jobs in the database
    Fleet      claims jobs and sends them to engines; its ResultWriter stores what engines send back
    Maintenance     does periodic work in one task, which is woken when something can be claimed
    EventHub   tells what happens to jobs to those who wait or watch
    Callers    counts who waits for which job, which is given up when the last one has left
    JobNotes      holds what this server knows of a job beyond its row
    Forecast   predicts progress and waiting times
    Room       watches the free disk space

Locks are taken in this order: `_canceling` (to submit a job or give one up), `Fleet._boarding` (to claim jobs
or put them back), `Flight.lock` (to write a job's row). A submission holds `_canceling` and takes `_boarding`
only if that is free; a holder of `_boarding` may take `Flight.lock`, or wait for writes that do. A
cancellation releases each lock before it takes the next.
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
    StorageAway,
    StorageFull,
)
from app.jobs.callers import Callers
from app.jobs.database import DatabaseAway
from app.jobs.disk_space import DiskSpace
from app.jobs.events import Event, EventHub
from app.jobs.faults import NO_FAULTS, Faults
from app.jobs.fleet import LEAVE_SECONDS, Fleet
from app.jobs.flights import Slot
from app.jobs.forecast import Forecast
from app.jobs.job import Job, JobStatus, Progress
from app.jobs.job_notes import JobNotes
from app.jobs.keys import Idempotency
from app.jobs.maintenance import Maintenance
from app.jobs.results import Resources
from app.jobs.server_lock import ServerLock
from app.jobs.store import JobStore, Submitted
from app.jobs.supervisor import EngineState, Supervisor
from app.logs import Logger
from app.metrics import Metrics
from app.settings import Settings
from app.storage.credentials import UNSIGNED, Credentials
from app.storage.images import ImageStore
from app.storage.inputs import InputStore

LOADING_RETRY_SECONDS = 5

T = TypeVar("T")


class Dispatcher:
    """Accepts jobs and has them done. For one event loop."""

    def __init__(
        self,
        store: JobStore,
        engines: Sequence[Supervisor],
        *,
        server_lock: ServerLock,
        images: ImageStore,
        inputs: InputStore,
        encoders: Executor,
        storage: Executor,
        cost: CostModel,
        settings: Settings,
        metrics: Metrics,
        logger: Logger,
        credentials: Credentials = UNSIGNED,
        faults: Faults = NO_FAULTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.events = EventHub()
        self.engines = engines
        self._store = store
        self._server_lock = server_lock
        self._cost = cost
        self._settings = settings
        self._metrics = metrics
        self._logger = logger
        disk_space = DiskSpace(
            [settings.data_dir / "files", settings.data_dir],  # which may be two disks
            try_job=store.try_to_submit,
            on_held_up=self.events.hold_up,
            metrics=metrics,
            logger=logger,
        )
        resources = Resources(
            store=store,
            images=images,
            inputs=inputs,
            encoders=encoders,
            storage=storage,
            credentials=credentials,
            events=self.events,
            cost=cost,
            metrics=metrics,
            logger=logger,
            faults=faults,
            notes=JobNotes(),
            disk_space=disk_space,
            model_name=settings.model_name,
            clock=clock,
            on_change=self._wake_all,
            on_queued=self._wake_to_claim,
            on_end=self._take_leave,
        )
        self._notes = resources.notes
        self._disk_space = disk_space
        self._callers = Callers(resources.notes, self._give_up)
        self._fleet = Fleet(
            [Slot(engine, f"{server_lock.name}/{number}") for number, engine in enumerate(engines)],
            resources,
            self._spawn,
        )
        self._forecast = Forecast(store, self._fleet, self.events, cost)
        self._maintenance = Maintenance(
            self._fleet,
            self._forecast,
            resources,
            lease_seconds=settings.lease_seconds,
            is_sole=server_lock.is_sole,
        )
        self._changed = asyncio.Event()
        self._decided = asyncio.Event()  # the model is loaded, or never will be
        self._is_closed = False
        self._canceling = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    # Life

    async def start(self) -> None:
        """Requeue what was in work when this server was last killed, and start the engines."""
        await self._fleet.recover()
        for engine in self.engines:
            engine.start(self._fleet)
        self._spawn(self._maintenance.run())
        self._watching = self._spawn(self._disk_space.watch())

    def close(self) -> None:
        """Take no more work, from callers or from the queue."""
        self._is_closed = True
        self._maintenance.close()
        self._fleet.close()
        self._wake_all()
        if self._server_lock.is_sole:  # no other server will do the queued jobs
            for job_id, _, _ in self.events.unended():
                if self._fleet.flight(job_id) is None:
                    self.events.forget(job_id)

    async def drain(self, grace_seconds: float) -> None:
        """Take no more work, finish what is in work, and put back the rest after the grace period."""
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
        """Release all callers that wait. Their jobs stay accepted."""
        self.close()
        self.events.close()

    async def stop(self) -> None:
        """End at once: what is not done goes back to the queue."""
        self.abandon()
        self._maintenance.end()
        if self._watching is not None:
            self._watching.cancel()
        if self._tasks:  # so that a claim being committed is known and put back
            await asyncio.wait(self._tasks, timeout=LEAVE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._fleet.leave()

    # The model

    @property
    def model(self) -> Ready:
        """The report of the first usable engine. Raises ModelUnusable, ShuttingDown or ModelLoading."""
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

    def require_model(self) -> None:
        """Raise what `model` raises while no job can be accepted."""
        _ = self.model

    async def wait_loaded(self, timeout_seconds: float) -> None:
        """Wait until it is known whether there is a model, or until the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._decided.wait()

    @property
    def has_room(self) -> bool:
        """Whether the disks have room for another job and its pictures."""
        return not self._disk_space.is_short

    @property
    def is_accepting(self) -> bool:
        """Whether a new job would be accepted now, if the disks have room for it."""
        has_model = any(engine.ready and engine.state is not EngineState.UNUSABLE for engine in self.engines)
        counts, limit = self._forecast.counts, self._settings.max_queue
        has_room = counts.queued < limit or limit == counts.queued + counts.running == 0
        return has_model and has_room and self._forecast.is_current and not self._is_closed

    # For callers

    async def require_room(self, tenant: str) -> None:
        """Raise Overloaded or StorageFull if a new job would be refused now.

        `submit` may still decide otherwise.
        """
        if not self.has_room:
            raise self._no_room()
        if self._fleet.may_take(tenant):
            return
        try:
            await self._store.require_room(self._settings.max_queue)
        except QueueFull as full:
            raise self._overloaded(full) from None

    async def submit(self, job: Job, idempotency: Idempotency | None = None) -> Submitted:
        """Accept a job. The caller must enter `waiting` directly after it.

        Raises Overloaded, StorageFull, KeyReused, ShuttingDown, ModelLoading and ModelUnusable.
        """
        self.require_model()
        priced = replace(job, cost_seconds=self._cost.price(job.request))
        await self._canceling.acquire()  # else a caller could join a job that is being given up
        try:
            self.require_model()  # we may have closed meanwhile
        except AppError:
            self._canceling.release()
            raise
        submitting = self._spawn(self._submit(priced, idempotency))
        try:
            return await asyncio.shield(submitting)
        finally:
            if submitting.done():  # at once: the caller enters `waiting` before any other task runs
                self._canceling.release()
            else:  # the caller was canceled, which ends no transaction
                submitting.add_done_callback(lambda _: self._canceling.release())

    def waiting(self, job: Job) -> AbstractContextManager[None]:
        """Count a caller as waiting. When the last one leaves, the job is canceled unless it is to finish."""
        return self._callers.waiting(job)

    def detach(self, job_id: str) -> None:
        """Let a job finish even if all callers leave."""
        self._notes.of(job_id).is_detached = True

    async def wait(self, job_id: str) -> Job:
        """Return the job when it has ended.

        Raises NotFound, ShuttingDown if we end first, StorageFull if it cannot end until there is room.
        """
        if self._fleet.flight(job_id) is None:
            job = await self._get(job_id)
            if job.is_finished:
                return job
            if self._server_lock.is_sole and self._is_closed and self._fleet.flight(job_id) is None:
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
        """Yield the events of a job after `last_id`, up to its end. Raises NotFound.

        For a job that has ended, at least the end is yielded, even if it was seen before. Unless
        `is_patient`, StorageFull is raised if the job cannot end until there is room.
        """
        job = await self._get(job_id)
        await self._maintenance.look_at(job, is_watched=True)
        if self._fleet.flight(job_id) is not None:
            self._forecast.progress(job)  # publishes it: nobody was told of the steps so far
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
        """Cancel a job, unless it has ended, and return it. None if the tenant has no such job."""
        return await asyncio.shield(self._spawn(self._cancel(job_id, tenant)))

    def want_previews(self, job_id: str, count: int) -> None:
        """Have `count` previews made of each picture of a job that has not ended, if it is done here."""
        self._fleet.want_previews(job_id, count)

    def progress(self, job: Job) -> Progress:
        """Return the progress of a job, as far as it is known here."""
        return self._forecast.progress(job)

    def retry_after_seconds(self) -> int:
        """Return the seconds after which there should be room in the queue, 1 to 59."""
        return self._forecast.retry_after_seconds()

    async def eta_seconds(self, job: Job | None = None) -> float:
        """Return the seconds until a job is done, or without one, all jobs."""
        return await self._forecast.eta_seconds(job)

    # How jobs begin and end

    async def _submit(self, job: Job, idempotency: Idempotency | None) -> Submitted:
        """Have a job accepted and, if there is room for it, claimed. It runs in a task, because a canceled
        caller must not interrupt it between the commit and what is noted here."""
        submit = partial(
            self._store.submit,
            job,
            max_queue=self._settings.max_queue,
            idempotency=idempotency,
            has_room=self.has_room,
        )
        promised_seconds = self._forecast.promise(job)  # before the job is itself part of the work ahead
        try:
            submitted = await self._fleet.accept(job, submit, self._settings.lease_seconds)
        except QueueFull as full:
            raise self._overloaded(full) from None
        except StorageFull as error:
            if not self.has_room:
                raise self._no_room() from None
            self._metrics.refused.labels(error.code).inc()
            self._disk_space.refused(error)  # we did not know it
            raise
        if not submitted.is_replay:
            self._notes.of(job.id).promised_seconds = promised_seconds
            if not submitted.is_claimed:
                self._wake_to_claim(job.tenant)
        return submitted

    async def _cancel(self, job_id: str, tenant: str | None) -> Job | None:
        job = await self._request_cancel(job_id, tenant)
        if job is None or job.is_finished:
            return job
        await self._fleet.cancel(job_id)
        return await self._store.get(job_id, tenant)

    async def _request_cancel(self, job_id: str, tenant: str | None) -> Job | None:
        """End a queued job, or note in the database that a running one is to end."""
        before = await self._store.get(job_id, tenant)
        if before is None or before.is_finished:
            return before
        job = await self._store.request_cancel(job_id, tenant)
        if job is not None and job.is_finished:
            self._fleet.results.tell(job, is_ours=True)
        return job

    def _give_up(self, job: Job) -> None:
        """Cancel a job that nobody waits for, unless callers only left because this server closes."""
        if not (self._is_closed or job.is_finished or self.events.has_ended(job.id)):
            self._spawn(self._cancel_unless_wanted(job.id))

    async def _cancel_unless_wanted(self, job_id: str) -> None:
        async with self._canceling:
            if self._callers.num_waiting(job_id):
                return
            try:
                job = await self._request_cancel(job_id, None)  # from here on nobody can join it
            except (StorageFull, DatabaseAway) as error:  # it goes on in vain
                self._logger.warning("a job that nobody wants goes on", job=job_id, reason=str(error))
                return
        if job is not None and not job.is_finished:
            await self._fleet.cancel(job_id)

    def _take_leave(self, job: Job, is_ours: bool) -> None:
        """Forget the notes of a job that has ended; if it ended here, record it in metrics and log."""
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

    def _wake_all(self) -> None:
        """React to a change: there may be room, or nothing left to do, or another engine."""
        self._maintenance.wake()
        self._changed.set()
        usable = [engine for engine in self.engines if engine.state is not EngineState.UNUSABLE]
        if self._is_closed or not usable or any(engine.ready for engine in usable):
            self._decided.set()

    def _wake_to_claim(self, tenant: str | None = None) -> None:
        """React to a job in the queue, of `tenant` or of anybody."""
        self._fleet.note_queued(tenant)
        self._maintenance.wake()

    async def _get(self, job_id: str) -> Job:
        job = await self._store.get(job_id, None)
        if job is None:
            raise NotFound("there is no such job")
        return job

    def _overloaded(self, full: QueueFull) -> Overloaded:
        self._metrics.refused.labels(Overloaded.code).inc()
        return Overloaded(f"{full}; try again later", retry_after_seconds=self.retry_after_seconds())

    def room_error(self) -> StorageFull:
        """Return the error for a job that is not accepted for want of room."""
        return self._disk_space.refusal()

    def _no_room(self) -> StorageFull:
        refusal = self.room_error()
        self._metrics.refused.labels(refusal.code).inc()
        return refusal

    def _held_up(self, job_id: str) -> StorageFull:
        """Return the error for callers of a job that waits for room, and let the job finish without them."""
        self.detach(job_id)
        ask = "ask for it then, or for the same with its Idempotency-Key"
        if self._disk_space.is_away:
            return StorageAway(
                f"the store of pictures does not answer now; {job_id} goes on when it does: {ask}"
            )
        return StorageFull(
            "there is no room to keep the picture now; "
            f"{job_id} goes on when the operator has made some: {ask}"
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
