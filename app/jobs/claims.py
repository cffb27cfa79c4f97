"""Jobs in the hands of workers: claimed, renewed, written and released, each within one transaction.

A worker holds a job by its lease, and the fence tells this claim from every earlier one: a worker's write is
accepted only while the row has the fence that the worker knows.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, select, update

from app.jobs import rows
from app.jobs.job import MAX_CRASHES, Failure, Job, JobStatus, Progress
from app.jobs.queue import CLAIM_ORDER, IS_QUEUED, IS_RUNNING
from app.jobs.tables import jobs, pictures

TOO_MANY_CRASHES = Failure(
    500,
    "generation_failed",
    f"the engine died {MAX_CRASHES} times with this job aboard; it is not tried again",
)


# Built once, as that takes longer than to run them. Claims never wait for rows that others have locked.
_NEXT = (
    select(jobs)
    .join(CLAIM_ORDER, jobs.c.number == CLAIM_ORDER.c.number)
    .where(IS_QUEUED, jobs.c.tenant.not_in(bindparam("without", expanding=True)))
    .order_by(CLAIM_ORDER.c.turn, jobs.c.number)
    .limit(bindparam("most"))
    .with_for_update(of=jobs, skip_locked=True)
)
_HELD = (
    select(jobs.c.id)
    .where(jobs.c.id == bindparam("held_id"), jobs.c.fence == bindparam("held_fence"), IS_RUNNING)
    .with_for_update()
)
_UNMOVED = rows.locking(
    select(jobs).where(
        jobs.c.id == bindparam("moved_id"),
        jobs.c.fence == bindparam("held_fence"),
        jobs.c.status == bindparam("left_status"),
    )
)
_SAVE_PICTURE = update(pictures).where(
    pictures.c.job_id == bindparam("of_job"), pictures.c.idx == bindparam("of_index")
)
_IS_MINE = (jobs.c.worker == bindparam("holder")) & IS_RUNNING
_LOCK_MINE = rows.locking(select(jobs).where(_IS_MINE).order_by(jobs.c.number))
_RENEW = update(jobs).where(_IS_MINE).values(lease_until=bindparam("until"))
_TELL_PROGRESS = (
    update(jobs).where(jobs.c.id == bindparam("told_id"), _IS_MINE).values(progress=bindparam("told"))
)
_WANTED_ENDED = (
    select(jobs.c.id, jobs.c.cancel_requested).where(_IS_MINE).order_by(jobs.c.number).with_for_update()
)
_LEASES = (
    select(jobs.c.worker, func.max(jobs.c.lease_until))
    .where(IS_RUNNING, jobs.c.worker != bindparam("holder"))
    .group_by(jobs.c.worker)
)


@dataclass(frozen=True, slots=True)
class Claim:
    """Which jobs a worker wants to claim."""

    worker: str
    lease_seconds: float
    limit: int = 1  # jobs at most
    without: Collection[str] = ()  # tenants whose jobs it leaves


def claim(connection: Connection, wanted: Claim, now: float) -> list[Job]:
    """Claim the jobs that are next."""
    values = {"without": list(wanted.without), "most": wanted.limit, "now": now}
    found = rows.read(connection, _NEXT, values)
    return [rows.put(connection, job.claimed(wanted.worker, now, wanted.lease_seconds)) for job in found]


def renew(
    connection: Connection, worker: str, lease_seconds: float, now: float, progress: Mapping[str, Progress]
) -> list[str]:
    """Extend all leases of a worker, and write the progress of its jobs.

    Returns the ids of those that somebody wants ended.
    """
    found = connection.execute(_WANTED_ENDED, {"holder": worker}).all()
    connection.execute(_RENEW, {"holder": worker, "until": now + lease_seconds})
    if progress:
        told = [
            {"told_id": job_id, "told": rows.to_json(each), "holder": worker}
            for job_id, each in progress.items()
        ]
        connection.execute(_TELL_PROGRESS, told)
    return [row.id for row in found if row.cancel_requested]


def save_picture(
    connection: Connection, job: Job, index: int, columns: Mapping[str, object], ended: Job | None = None
) -> bool:
    """Write `columns` of a picture, and its job if that has `ended` with it.

    Returns False if the job is not held under this fence any more, or never had such a picture.
    """
    if connection.scalar(_HELD, {"held_id": job.id, "held_fence": job.fence}) is None:
        return False
    values = {"of_job": job.id, "of_index": index, **columns}
    if connection.execute(_SAVE_PICTURE, values).rowcount != 1:
        return False
    if ended is not None:
        rows.put(connection, ended)
    return True


def load_latents(connection: Connection, job_id: str) -> dict[int, bytes]:
    """Return the stored latents of the pictures that are not finished, by index."""
    kept = (pictures.c.job_id == job_id) & pictures.c.latents.is_not(None)
    found = connection.execute(select(pictures.c.idx, pictures.c.latents).where(kept))
    return {row.idx: row.latents for row in found}


def move(connection: Connection, before: Job, after: Job, now: float) -> bool:
    """Write a moved job; return False if its row no longer has the status and fence it was moved from."""
    values = {"moved_id": before.id, "held_fence": before.fence, "left_status": before.status.value}
    found = rows.read(connection, _UNMOVED, values)
    for current in found:
        rows.put(connection, _sensible(after, current, now))
    return bool(found)


def release(
    connection: Connection, worker: str, crashed: Collection[str], kept: Collection[str], now: float
) -> list[Job]:
    """Requeue all jobs of a worker but those `kept`; return them as they are now."""
    held = [job for job in _lock_held(connection, worker) if job.id not in kept]
    return _requeue(connection, held, crashed, now)


def leases(connection: Connection, worker: str) -> dict[str, float]:
    """Return the latest lease of each other worker that holds jobs."""
    return {row[0]: row[1] for row in connection.execute(_LEASES, {"holder": worker})}


def release_lost(connection: Connection, worker: str, lease_until: float, now: float) -> list[Job]:
    """Requeue the jobs of a worker silent since `lease_until`, each as one that may have crashed it."""
    held = _lock_held(connection, worker)
    if max((job.lease_until or 0.0 for job in held), default=0.0) != lease_until:
        return []
    return _requeue(connection, held, {job.id for job in held}, now)


def _lock_held(connection: Connection, worker: str) -> list[Job]:
    return rows.read(connection, _LOCK_MINE, {"holder": worker})


def _requeue(connection: Connection, held: Iterable[Job], crashed: Collection[str], now: float) -> list[Job]:
    moved = [_sensible(job.released(crashed=job.id in crashed), job, now) for job in held]
    return [rows.put(connection, job) for job in moved]


def _sensible(after: Job, current: Job, now: float) -> Job:
    """Return `after`, but ended if it would be queued although it was canceled or crashed too often."""
    if after.status == JobStatus.QUEUED and current.cancel_requested:
        return after.canceled(now)
    if after.status == JobStatus.QUEUED and after.crashes >= MAX_CRASHES:
        return after.failed(TOO_MANY_CRASHES, now)
    return after
