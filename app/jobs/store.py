"""The store of jobs: accepted jobs survive any crash, and no worker overwrites a job that it does not hold.

What a method of the store writes is committed when it returns.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

from sqlalchemy import Connection, bindparam, delete, select, update

from app.errors import Conflict, QueueFull, StorageFull
from app.jobs import claims, keys, outbox, pages, queue, rows
from app.jobs.claims import Claim
from app.jobs.database import Database, lock_queue
from app.jobs.disk_space import NO_ROOM
from app.jobs.faults import NO_FAULTS, Faults
from app.jobs.job import Job, JobStatus, Progress, StoredImage
from app.jobs.keys import Idempotency
from app.jobs.leases import LeaseWatch
from app.jobs.outbox import Busy, Delivery
from app.jobs.queue import IS_QUEUED, FullQueue, QueueCounts
from app.jobs.tables import deliveries, inputs, jobs
from app.schemas import GenerationRequest

NOBODY = Busy()
NOTHING: Mapping[str, Progress] = MappingProxyType({})
PRUNED_AT_ONCE = 200  # jobs per transaction, so that others can write in between

# Built once, like all frequent queries.
_LATE = rows.locking(
    select(jobs).where(IS_QUEUED, jobs.c.deadline_at <= bindparam("now")).order_by(jobs.c.number)
)
_LONG_ENDED = rows.locking(
    select(jobs)
    .where(jobs.c.completed_at < bindparam("ended_before"), jobs.c.id.not_in(select(deliveries.c.job_id)))
    .order_by(jobs.c.number)
    .limit(PRUNED_AT_ONCE)
)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was submitted, and is in the database."""

    job: Job  # as it was accepted
    is_replay: bool  # it was there before, submitted with the same idempotency key
    claimed: Sequence[Job] = ()  # in the same transaction: this job, or one that was next

    @property
    def is_claimed(self) -> bool:
        """Whether this job was claimed."""
        return any(job.id == self.job.id for job in self.claimed)

    @property
    def now(self) -> Job:
        """The job as it was after that transaction."""
        return next((job for job in self.claimed if job.id == self.job.id), self.job)


class JobStore:
    """The jobs of all servers that share the database."""

    def __init__(
        self, database: Database, clock: Callable[[], float], steady: Callable[[], float], faults: Faults
    ) -> None:
        self._database = database
        self._clock = clock
        self._watch = LeaseWatch(steady)
        self._full = FullQueue(steady)
        self._faults = faults

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        faults: Faults = NO_FAULTS,
    ) -> Self:
        """Connect and bring the schema up to date; `clock` tells the time of day, `steady` never jumps.

        Raises SettingsError when the database cannot be used.
        """
        return cls(await Database.open(url, faults), clock, steady, faults)

    async def close(self) -> None:
        """Close the database."""
        await self._database.close()

    # What callers do

    async def submit(
        self,
        job: Job,
        *,
        max_queue: int,
        idempotency: Idempotency | None = None,
        claim: Claim | None = None,
        has_room: bool = True,
    ) -> Submitted:
        """Accept a job, or find the one that came with the same idempotency key.

        A worker with room may `claim` in the same transaction, which saves a commit.
        Raises KeyReused for another request with that key, StorageFull for a new job when there is no room,
        and QueueFull when over `max_queue` jobs would wait; with a `max_queue` of 0 a job is accepted only
        when there is nothing else to do.
        """
        if has_room and idempotency is None and claim is None:  # else there may be a place or a reply for it
            self._full.check(max_queue)
        num_left = self._full.num_left
        try:
            submitted = await self._database.write(
                _submit, job, max_queue, idempotency, claim, self._clock(), has_room=has_room
            )
        except QueueFull as full:
            self._full.note(full, max_queue, num_left)
            raise
        if not submitted.is_replay:
            self._faults.hit("after_submit")
        self._note_claim(submitted.claimed)
        return submitted

    async def get(self, job_id: str, tenant: str | None) -> Job | None:
        """Return the job if it belongs to `tenant`; None stands for all tenants."""
        return await self._database.read(rows.find, job_id, tenant)

    async def list(
        self, tenant: str, *, limit: int, cursor: str | None = None, status: JobStatus | None = None
    ) -> tuple[Sequence[Job], str | None]:
        """Return up to `limit` jobs, newest first, and the cursor that continues; None after the last.

        Raises InvalidRequest for a cursor that was not given out.
        """
        after = None if cursor is None else pages.from_cursor(cursor)
        return await self._database.read(pages.page, tenant, limit, after, status)

    async def request_cancel(self, job_id: str, tenant: str | None) -> Job | None:
        """End a queued job, or mark a running one for its worker to end; an ended one stays as it is."""
        job = await self._database.write(_request_cancel, job_id, tenant, self._clock())
        if job is not None and job.status == JobStatus.CANCELED:
            self._full.left()
        return job

    async def delete(self, job_id: str, tenant: str | None) -> Job | None:
        """Delete an ended job; the caller removes its files. Raises Conflict if it has not ended."""
        return await self._database.write(_delete, job_id, tenant)

    async def has_input(self, sha256: str, tenant: str) -> bool:
        """Return whether a job of `tenant` came with this picture."""
        return await self._database.read(_has_input, sha256, tenant)

    async def counts(self) -> QueueCounts:
        """Count how much there is to do."""
        return await self._database.read(queue.count)

    async def require_room(self, max_queue: int) -> None:
        """Raise QueueFull if a new job would not be accepted now."""
        await self._database.read(queue.require_room, max_queue)

    async def position(self, job: Job) -> int | None:
        """Return how many queued jobs will be claimed before this one; None if it is not queued."""
        return await self._database.read(queue.position, job.id, self._clock())

    async def try_to_submit(self) -> None:
        """Raise StorageFull if there is no room for a job; write nothing that stays if there is."""
        await self._database.write(_submit_and_forget, self._clock())

    # What workers do

    async def claim(
        self, worker: str, *, limit: int, lease_seconds: float, without: Collection[str] = ()
    ) -> Sequence[Job]:
        """Claim up to `limit` queued jobs whose deadline has not passed, including those of dead workers.

        Jobs of the tenants `without` are left where they are.
        """
        if self._watch.is_due:
            await self._release_lost(worker, lease_seconds)
        wanted = Claim(worker, lease_seconds, limit, without)
        claimed = await self._database.write(claims.claim, wanted, self._clock())
        self._note_claim(claimed)
        return claimed

    def _note_claim(self, claimed: Sequence[Job]) -> None:
        if claimed:
            self._full.left()
            self._faults.hit("after_claim")

    async def _release_lost(self, worker: str, lease_seconds: float) -> None:
        leases = await self._database.read(claims.leases, worker)
        for silent in self._watch.silent(leases, lease_seconds):
            await self._database.write(claims.release_lost, silent, leases[silent], self._clock())

    async def renew(
        self, worker: str, lease_seconds: float, progress: Mapping[str, Progress] = NOTHING
    ) -> Sequence[str]:
        """Extend all leases of a worker, and write the progress of its jobs, by id, for other servers.

        Returns the ids of its jobs that somebody wants ended.
        """
        return await self._database.write(claims.renew, worker, lease_seconds, self._clock(), progress)

    async def save_latents(self, job: Job, index: int, latents: bytes) -> bool:
        """Store Stage C's result for a picture; False if the job is not held under this fence any more."""
        is_saved = await self._database.write(claims.save_picture, job, index, {"latents": latents})
        if is_saved:
            self._faults.hit("after_latents")
        return is_saved

    async def load_latents(self, job_id: str) -> dict[int, bytes]:
        """Return the stored latents of the pictures that are not finished, by index."""
        return await self._database.read(claims.load_latents, job_id)

    async def save_image(self, job: Job, image: StoredImage, ended: Job | None = None) -> bool:
        """Store a finished picture; False if the job is not held under this fence any more.

        With the last picture the job ends, too: `ended` is written in the same transaction.
        """
        self._faults.hit("after_image_before_commit")
        columns = {"image": rows.to_json(image), "latents": None}
        is_saved = await self._database.write(claims.save_picture, job, image.index, columns, ended)
        if is_saved:
            self._faults.hit("after_image")
        return is_saved

    async def move(self, before: Job, after: Job) -> bool:
        """Write a moved job; False if its row no longer has the status and fence that it was moved from.

        A job that would be queued again is ended if somebody wants it ended or if it crashed too often.
        """
        is_moved = await self._database.write(claims.move, before, after, self._clock())
        if before.status == JobStatus.QUEUED:
            self._full.left()
        return is_moved

    async def release(
        self, worker: str, *, crashed_jobs: Collection[str] = (), kept_jobs: Collection[str] = ()
    ) -> Sequence[Job]:
        """Requeue all jobs of a worker but `kept_jobs`; return them as they are now.

        `crashed_jobs` were aboard an engine when it died, which is counted; after too many they fail.
        """
        return await self._database.write(claims.release, worker, crashed_jobs, kept_jobs, self._clock())

    # What webhooks are told

    async def has_due_deliveries(self) -> bool:
        """Return whether any delivery is due."""
        return await self._database.read(outbox.any_due, self._clock())

    async def claim_deliveries(
        self, *, limit: int, hold_seconds: float, without: Busy = NOBODY
    ) -> Sequence[Delivery]:
        """Begin up to `limit` attempts, none of them for tenants or receivers `without`.

        Attempts without an outcome for `hold_seconds` are begun again, here or by another server.
        """
        return await self._database.write(outbox.claim, limit, without, self._clock(), hold_seconds)

    async def settle_delivery(self, delivery: Delivery, *, again_after: float | None) -> None:
        """Write the outcome of an attempt: another one after so many seconds, or None for no more."""
        again_at = None if again_after is None else self._clock() + again_after
        await self._database.write(outbox.settle, delivery, again_at)

    # Housekeeping

    async def expire(self, now: float) -> Sequence[Job]:
        """End the queued jobs whose deadline has passed."""
        expired = await self._database.write(_expire, now)
        if expired:
            self._full.left()
        return expired

    async def prune(self, ended_before: float) -> Sequence[str]:
        """Delete the jobs that ended before a time; return the names of their files, to be removed.

        Jobs of which a webhook is still to be told stay. Old idempotency keys are deleted, too.
        """
        await self._database.write(keys.forget_old, self._clock())
        pruned = [await self._database.write(_prune_some, ended_before)]
        while pruned[-1]:
            pruned.append(await self._database.write(_prune_some, ended_before))
        return [image.name for some in pruned for job in some for image in job.images]

    async def unused_inputs(self, names: Collection[str]) -> Sequence[str]:
        """Return those of the names of input pictures that no job refers to any more."""
        used: set[str] = set()
        names = list(names)
        for start in range(0, len(names), PRUNED_AT_ONCE):
            used |= await self._database.read(_used_inputs, names[start : start + PRUNED_AT_ONCE])
        return [name for name in names if name not in used]


def _submit(
    connection: Connection,
    job: Job,
    max_queue: int,
    idempotency: Idempotency | None,
    claim: Claim | None,
    now: float,
    *,
    has_room: bool,
) -> Submitted:
    lock_queue(connection)
    if idempotency is not None:
        known = keys.replayed(connection, job.tenant, idempotency, now)
        if known is not None:
            return Submitted(known, is_replay=True)
    if not has_room:
        raise StorageFull(NO_ROOM)
    if claim is None or max_queue == 0:
        queue.require_room(connection, max_queue)
    rows.add(connection, job)
    if idempotency is not None:
        keys.remember(connection, job, idempotency, now)
    claimed = () if claim is None else claims.claim(connection, claim, now)
    submitted = Submitted(job, is_replay=False, claimed=claimed)
    if claim is not None and not submitted.is_claimed:  # a job in work at once needs no room in the queue
        queue.require_bound(connection, max_queue)
    return submitted


def _submit_and_forget(connection: Connection, now: float) -> None:
    prompt = "is there room? " * 64  # somewhat longer than most
    request = GenerationRequest(prompt=prompt, width=64, height=64, seeds=(0,))
    job = Job(tenant="", request=request, created_at=now)
    rows.add(connection, job)
    connection.execute(delete(jobs).where(jobs.c.id == job.id))


def _request_cancel(connection: Connection, job_id: str, tenant: str | None, now: float) -> Job | None:
    job = rows.find(connection, job_id, tenant, is_locked=True)
    if job is None or job.is_finished:
        return job
    if job.status == JobStatus.QUEUED:
        return rows.put(connection, job.canceled(now))
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
    return replace(job, cancel_requested=True)


def _delete(connection: Connection, job_id: str, tenant: str | None) -> Job | None:
    job = rows.find(connection, job_id, tenant, is_locked=True)
    if job is not None:
        if not job.is_finished:
            raise Conflict(f"the job is {job.status}; it can be deleted when it has ended")
        connection.execute(delete(jobs).where(jobs.c.id == job_id))
    return job


def _has_input(connection: Connection, sha256: str, tenant: str) -> bool:
    query = select(inputs.c.job_id).join(jobs, jobs.c.id == inputs.c.job_id)
    query = query.where(inputs.c.sha256 == sha256, jobs.c.tenant == tenant).limit(1)
    return connection.scalar(query) is not None


def _used_inputs(connection: Connection, names: Sequence[str]) -> set[str]:
    return set(connection.scalars(select(inputs.c.sha256).where(inputs.c.sha256.in_(names)).distinct()))


def _expire(connection: Connection, now: float) -> list[Job]:
    return [rows.put(connection, job.expired(now)) for job in rows.read(connection, _LATE, {"now": now})]


def _prune_some(connection: Connection, ended_before: float) -> list[Job]:
    pruned = rows.read(connection, _LONG_ENDED, {"ended_before": ended_before})
    connection.execute(delete(jobs).where(jobs.c.id.in_([job.id for job in pruned])))
    return pruned
