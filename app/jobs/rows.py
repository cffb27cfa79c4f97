"""Converts between a `Job` and its rows: writes one job, and reads or locks many at once."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, bindparam, insert, select, update

from app.jobs.job import Failure, Job, JobStatus, Progress, StoredImage, Timings, Webhook
from app.jobs.tables import deliveries, inputs, jobs, pictures
from app.schemas import GenerationRequest


def locking(query: Select[Any]) -> Select[Any]:
    """Return `query`, for whole rows of `jobs`, so that it locks them until the transaction ends.

    Whoever locks many jobs does so in the order of `number`, except for claims, which never wait.
    """
    return query.with_for_update(of=jobs)


AT_ONCE = 0.0  # due, whatever a clock says

# Built once: building a statement takes longer than SQLite needs to run it.
_ADD_JOB = insert(jobs)
_ADD_PICTURES = insert(pictures)
_FIND = select(jobs).where(jobs.c.id == bindparam("job_id"))
_LOCK = locking(_FIND)
_MOVE = update(jobs).where(jobs.c.id == bindparam("moved_id"))
_FORGET_LATENTS = (
    update(pictures)
    .where(pictures.c.job_id == bindparam("ended_id"), pictures.c.latents.is_not(None))
    .values(latents=None)
)
_TELL = insert(deliveries)
_IMAGES = (
    select(pictures.c.job_id, pictures.c.image)
    .where(pictures.c.job_id.in_(bindparam("ids", expanding=True)), pictures.c.image.is_not(None))
    .order_by(pictures.c.idx)
)


def add(connection: Connection, job: Job) -> None:
    """Write a new job, a row for each of its pictures, and one for each picture that came with it."""
    connection.execute(_ADD_JOB, _columns(job))
    rows = [{"job_id": job.id, "idx": index, "seed": seed} for index, seed in enumerate(job.request.seeds)]
    connection.execute(_ADD_PICTURES, rows)
    if names := job.request.input_names:
        connection.execute(insert(inputs), [{"job_id": job.id, "sha256": name} for name in sorted(names)])


def read(connection: Connection, query: Select[Any], values: Mapping[str, object] | None = None) -> list[Job]:
    """Return the jobs of a query for whole rows of `jobs`, in its order, with their finished pictures.

    `values` are the parameters of the query.
    """
    rows = connection.execute(query, values).all()
    images = _images(connection, [row.id for row in rows if row.fence])  # others were never claimed
    return [_job(row, images[row.id]) for row in rows]


def find(connection: Connection, job_id: str, tenant: str | None, *, is_locked: bool = False) -> Job | None:
    """Return the job of that id if it belongs to `tenant`; None stands for all tenants."""
    if not may_be_id(job_id):
        return None
    found = read(connection, _LOCK if is_locked else _FIND, {"job_id": job_id})
    return found[0] if found and tenant in (None, found[0].tenant) else None


def may_be_id(text: str) -> bool:
    """Return whether a text can be an id. Others may hold characters that no database takes."""
    return text.isascii() and text.isprintable()


def put(connection: Connection, job: Job) -> Job:
    """Write a moved job, whose row is locked, and return it. Latents of an ended one are deleted.

    What its webhook is to be told is written in the same transaction.
    """
    connection.execute(_MOVE, {"moved_id": job.id, **_moved(job)})
    if job.is_finished:
        connection.execute(_FORGET_LATENTS, {"ended_id": job.id})
    if job.webhook is not None and job.is_news:
        news = {"job_id": job.id, "status": job.status.value}
        whom = {"tenant": job.tenant, "receiver": job.webhook.receiver}
        connection.execute(_TELL, {**news, **whom, "attempts": 0, "due_at": AT_ONCE})
    return job


def _images(connection: Connection, ids: Sequence[str]) -> dict[str, tuple[StoredImage, ...]]:
    images: defaultdict[str, tuple[StoredImage, ...]] = defaultdict(tuple)
    if ids:
        for job_id, image in connection.execute(_IMAGES, {"ids": list(ids)}).all():
            images[job_id] += (msgspec.json.decode(image, type=StoredImage),)
    return images


def _columns(job: Job) -> dict[str, object]:
    return {
        "id": job.id,
        "tenant": job.tenant,
        "priority": job.priority,
        "created_at": job.created_at,
        "deadline_at": job.deadline_at,
        "cost_seconds": job.cost_seconds,
        "on_disconnect": job.on_disconnect,
        "cancel_requested": job.cancel_requested,
        "request": job.request.model_dump_json(),
        "metadata": to_json(job.metadata),
        "webhook": None if job.webhook is None else to_json(job.webhook),
        **_moved(job),
    }


def _moved(job: Job) -> dict[str, object]:
    """Return the columns that moves of a job change.

    `cancel_requested` is none, because others write it: a move of an older copy must not undo it.
    """
    return {
        "status": job.status.value,
        "started_at": job.started_at,
        "completed_at": job.completed_at,
        "fence": job.fence,
        "worker": job.worker,
        "lease_until": job.lease_until,
        "crashes": job.crashes,
        "timings": to_json(job.timings),
        "failure": None if job.failure is None else to_json(job.failure),
    }


def _job(row: Row[Any], images: tuple[StoredImage, ...]) -> Job:
    return Job(
        id=row.id,
        tenant=row.tenant,
        request=GenerationRequest.model_validate_json(row.request),
        status=JobStatus(row.status),
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        priority=row.priority,
        deadline_at=row.deadline_at,
        on_disconnect=row.on_disconnect,
        metadata=msgspec.json.decode(row.metadata, type=dict[str, str]),
        webhook=None if row.webhook is None else msgspec.json.decode(row.webhook, type=Webhook),
        cost_seconds=row.cost_seconds,
        fence=row.fence,
        worker=row.worker,
        lease_until=row.lease_until,
        crashes=row.crashes,
        cancel_requested=row.cancel_requested,
        images=images,
        failure=None if row.failure is None else msgspec.json.decode(row.failure, type=Failure),
        timings=msgspec.json.decode(row.timings, type=Timings),
        progress=None if row.progress is None else msgspec.json.decode(row.progress, type=Progress),
    )


def to_json(value: object) -> str:
    """Encode a dictionary or dataclass as JSON that msgspec reads back."""
    return msgspec.json.encode(value).decode()
