"""All engines of this server and the jobs in their hands: claims jobs, sends them, and survives deaths.

Whatever process dies, at whatever moment: what is missing is made again, and comes out the same.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

from app.engine.cost import work_of
from app.engine.protocol import AnyFromEngine, Failed, Heartbeat, Latents, Pixels, Previewed, Progressed
from app.errors import AppError, QueueFull, StorageFull
from app.jobs.claims import Claim
from app.jobs.flights import Flight, Slot
from app.jobs.job import Job
from app.jobs.results import Resources, ResultWriter
from app.jobs.store import Submitted
from app.jobs.supervisor import Supervisor

LEAVE_SECONDS = 3.0  # for the last writes, and again for the engines

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Fleet:
    """Has engines do the jobs of the queue, as far as there is room. `spawn` runs what nobody waits for."""

    def __init__(self, slots: Sequence[Slot], resources: Resources, spawn: Spawn) -> None:
        self.slots = slots
        self.results = ResultWriter(resources)
        self._resources = resources
        self._store = resources.store
        self._events = resources.events
        self._spawn = spawn
        self._is_closed = False
        self._boarding = asyncio.Lock()  # held to claim jobs, and to put them back after a death
        self._queued: frozenset[str] | None = None  # who may have jobs in the queue; None: anybody

    def flight(self, job_id: str) -> Flight | None:
        """Return the flight of a job, if it is in our hands."""
        return next((slot.flights[job_id] for slot in self.slots if job_id in slot.flights), None)

    @property
    def flights(self) -> list[Flight]:
        """All jobs in our hands."""
        return [flight for slot in self.slots for flight in slot.flights.values()]

    def want_previews(self, job_id: str, count: int) -> None:
        """Have `count` previews made of each picture of a job, whether it is here already or not."""
        note = self._resources.notes.of(job_id)
        note.num_previews = max(count, note.num_previews)
        flight = self.flight(job_id)
        if flight is not None:
            flight.slot.want_previews(flight, count)

    def close(self) -> None:
        """Stop claiming. Jobs that were claimed before are still done."""
        self._is_closed = True

    async def recover(self) -> None:
        """Requeue what was in work when the last holder of our lock died. No job is blamed for that."""
        for slot in self.slots:
            for job in await self._store.release(slot.worker):
                self._resources.logger.info("a job is resumed", job=job.id, status=job.status.value)

    async def accept(
        self, job: Job, submit: Callable[..., Awaitable[Submitted]], lease_seconds: float
    ) -> Submitted:
        """Have a job accepted by `submit`, and with it claim what is next, if there is room for its tenant.

        An idle engine is told to expect the job meanwhile. It is accepted when this returns; what was claimed
        boards later, as files may be slow to read and a database may not answer. Raises what `submit` raises.
        """
        slot = None if self._is_closed else self._roomiest_for(job.tenant)
        if slot is None or not await self._may_board_at_once():
            return await submit()
        try:
            slot.expect(job)
            submitted = await self._submit_and_claim(slot, submit, lease_seconds)
        except BaseException:
            self._boarding.release()
            raise
        boarding = self._spawn(self._board_all(slot, submitted.claimed))
        boarding.add_done_callback(lambda _: self._boarding.release())
        return submitted

    def may_take(self, tenant: str) -> bool:
        """Return whether an engine has room for a job of the tenant."""
        return not self._is_closed and self._roomiest_for(tenant) is not None

    async def _may_board_at_once(self) -> bool:
        """Take the lock `_boarding` if that needs no waiting; return whether it was taken."""
        try:
            async with asyncio.timeout(0):
                return await self._boarding.acquire()
        except TimeoutError:
            return False

    async def _submit_and_claim(
        self, slot: Slot, submit: Callable[..., Awaitable[Submitted]], lease_seconds: float
    ) -> Submitted:
        slot.may_hold_strays = True  # until all that was claimed is known here
        try:
            return await submit(claim=Claim(slot.worker, lease_seconds, without=slot.sated))
        except (AppError, QueueFull):  # from the transaction, which was then rolled back
            slot.may_hold_strays = False
            raise

    async def _board_all(self, slot: Slot, claimed: Sequence[Job]) -> None:
        try:
            for job in claimed:
                await self._board(slot, job)
            slot.may_hold_strays = False
        except StorageFull as error:
            self._resources.logger.warning("a job that was claimed goes back", reason=error.reason)
        except Exception as error:
            self._resources.logger.error("a job that was claimed could not board", exc_info=error)

    def note_queued(self, tenant: str | None = None) -> None:
        """Learn that a job of `tenant`, or of anybody, may have joined the queue."""
        if tenant is None:
            self._queued = None
        elif self._queued is not None:
            self._queued |= {tenant}

    @property
    def may_claim(self) -> bool:
        """Whether there may be jobs of tenants that are not sated everywhere, or that a failed claim left."""
        return any(slot.may_hold_strays or self._may_claim_for(slot) for slot in self.slots)

    async def claim(self, lease_seconds: float) -> None:
        """Fill the engines with jobs, the least busy one first."""
        done: set[Slot] = set()
        async with self._boarding:
            await self._return_strays()
            while not self._is_closed and (slot := self._emptiest(done)) is not None:
                if not (self._may_claim_for(slot) and await self._claim(slot, lease_seconds)):
                    done.add(slot)

    async def renew(self, lease_seconds: float, *, tells: bool) -> None:
        """Renew the leases of the jobs in our hands, and end those that somebody wants ended.

        If `tells`, their progress is written for other servers.
        """
        for slot in self.slots:
            if slot.flights:
                progress = {job_id: flight.progress() for job_id, flight in slot.flights.items() if tells}
                for job_id in await self._store.renew(slot.worker, lease_seconds, progress):
                    await self.cancel(job_id)

    async def cancel(self, job_id: str) -> None:
        """Cancel a job that is in our hands, after any claim that is under way."""
        async with self._boarding:
            flight = self.flight(job_id)
        if flight is not None:
            await self.results.end(flight, lambda job: job.canceled(self._resources.clock()))

    async def expire(self) -> None:
        """End the jobs in our hands whose deadline has passed."""
        now = asyncio.get_running_loop().time()
        for flight in self.flights:
            if flight.expires_at is not None and flight.expires_at <= now:
                await self.results.end(flight, lambda job: job.expired(self._resources.clock()))

    async def leave(self) -> None:
        """Requeue what is not done, and end the engines."""
        self.close()
        self.results.is_leaving = True
        try:
            async with asyncio.timeout(LEAVE_SECONDS), self._boarding:
                await self._put_back()
        except Exception as error:  # then the next holder of our lock does it
            self._resources.logger.error("jobs could not be put back", exc_info=error)
        for flight in self.flights:
            self.results.drop(flight)
        await asyncio.gather(*(slot.engine.stop(LEAVE_SECONDS) for slot in self.slots))

    async def _put_back(self) -> None:
        if writes := self._writes(self.slots):
            await asyncio.wait(writes, timeout=LEAVE_SECONDS / 2)  # of pictures that are made
        for write in self._writes(self.slots):
            write.cancel()
        for flight in self.flights:
            self.results.drop(flight)
        for slot in self.slots:
            await self.results.release(slot, set())

    # Called by supervisors

    async def engine_ready(self, engine: Supervisor) -> None:
        """Learn what the engine measured, and look for work for it."""
        if engine.ready is not None:
            self._resources.cost.learn_profile(engine.ready.step_seconds)
        self._resources.on_change()

    async def engine_said(self, engine: Supervisor, message: AnyFromEngine) -> None:
        """Handle a message of an engine, but ignore it if its job is not aboard any more."""
        if isinstance(message, Heartbeat):
            for tick in message.ticks:
                self._resources.cost.learn(tick)
            self._resources.metrics.cost_error.set(self._resources.cost.error)
        elif isinstance(message, Progressed):
            flights = self._slot(engine).flights
            for job, steps in groupby(message.steps, attrgetter("job")):  # those of a job are adjacent
                if job in flights:
                    self.results.follow(flights[job], steps)
        elif isinstance(message, Previewed | Latents | Pixels | Failed):
            flight = self._slot(engine).flights.get(message.job)
            if flight is not None:
                await self.results.hear(flight, message)

    async def engine_lost(self, engine: Supervisor) -> None:
        """Finish writing what the dead engine had sent, and requeue the rest."""
        slot = self._slot(engine)
        async with self._boarding:
            while writes := self._writes([slot]):
                await asyncio.wait(writes)
            aboard = {flight.job.id for flight in slot.flights.values() if flight.is_aboard}
            for flight in list(slot.flights.values()):
                self.results.drop(flight)
            await self.results.release(slot, aboard)
        self._resources.on_change()

    # Boarding

    def _slot(self, engine: Supervisor) -> Slot:
        return next(slot for slot in self.slots if slot.engine is engine)

    def _roomiest_for(self, tenant: str) -> Slot | None:
        return self._emptiest([slot for slot in self.slots if tenant in slot.sated])

    def _emptiest(self, done: Collection[Slot]) -> Slot | None:
        roomy = [slot for slot in self.slots if slot.room > 0 and slot not in done]
        return min(roomy, key=lambda slot: slot.seconds_left, default=None)

    def _may_claim_for(self, slot: Slot) -> bool:
        return self._queued is None or not self._queued <= slot.sated

    async def _claim(self, slot: Slot, lease_seconds: float) -> bool:
        """Claim and board one job of a tenant that is not sated; the next one may be for another engine."""
        slot.may_hold_strays = True  # until all that was claimed is known here
        sated = slot.sated
        # If nothing is found, only these have jobs in the queue, and who joins it meanwhile.
        self._queued = sated if self._queued is None else self._queued & sated
        jobs: Sequence[Job] | None = None
        try:
            jobs = await self._store.claim(slot.worker, limit=1, lease_seconds=lease_seconds, without=sated)
        finally:
            if jobs is None or jobs:
                self.note_queued()
        for job in jobs:
            await self._board(slot, job)
        slot.may_hold_strays = False
        return bool(jobs)

    async def _return_strays(self) -> None:
        """Requeue jobs that a failed claim left under our name without our knowledge."""
        for slot in self.slots:
            if slot.may_hold_strays:
                await self.results.release(slot, set())
                slot.may_hold_strays = False

    async def _board(self, slot: Slot, job: Job) -> None:
        """Make a flight of a claimed job, which resumes from what is stored of it."""
        now = asyncio.get_running_loop().time()
        if (earlier := self.flight(job.id)) is not None:  # whose lease was lost while it wrote
            self.results.drop(earlier)
        is_replay = job.fence > 1
        latents = await self.results.persist(partial(self._store.load_latents, job.id)) if is_replay else {}
        inputs, flaw = {}, None
        try:
            inputs = await self.results.read_inputs(job)
        except StorageFull:  # the bucket is away: the job goes back, as after any claim that failed
            raise
        except (AppError, OSError) as error:
            flaw = error
        age = self._resources.clock() - job.created_at
        flight = Flight(
            job,
            slot,
            latents,
            inputs,
            picture_seconds=self._resources.cost.alone(work_of(job.request, self._resources.cost.drawn)),
            arrived_at=now - max(age, 0.0),
            num_previews=self._resources.notes.of(job.id).num_previews,
            expires_at=None if job.deadline_at is None else now + job.deadline_at - self._resources.clock(),
        )
        if is_replay:
            self._resources.metrics.replays.labels("decoder" if latents else "prior").inc()
        self._events.begin_claim(job)
        flight.fraction = self._events.progress(job).fraction
        for image in job.images:
            self._events.publish(job.id, image)
        if flaw is not None:
            await self.results.fail(flight, flaw)
            return
        slot.add(flight, now)
        self._events.publish(job.id, flight.progress())
        if not flight.missing:
            self.results.finish(flight)

    def _writes(self, slots: Sequence[Slot]) -> list["asyncio.Task[None]"]:
        return [write for slot in slots for flight in slot.flights.values() for write in flight.writes]
