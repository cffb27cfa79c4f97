"""Lists of jobs, newest first, page by page. A cursor names the last job seen, so new jobs move nothing."""

import base64
import binascii

import msgspec
from sqlalchemy import ColumnElement, Connection, select, tuple_

from app.errors import InvalidRequest
from app.jobs import rows
from app.jobs.job import Job, JobStatus
from app.jobs.tables import jobs

_Place = tuple[float, str]  # when a job was created, and its id


def page(
    connection: Connection,
    tenant: str,
    limit: int,
    after: ColumnElement[_Place] | None,
    status: JobStatus | None,
) -> tuple[list[Job], str | None]:
    """Return up to `limit` jobs, and the cursor that continues; None if these were the last."""
    query = select(jobs).where(jobs.c.tenant == tenant)
    if status is not None:
        query = query.where(jobs.c.status == status)
    if after is not None:
        query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < after)
    query = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit + 1)
    found = rows.read(connection, query)
    return found[:limit], _to_cursor(found[limit - 1]) if len(found) > limit else None


def from_cursor(cursor: str) -> ColumnElement[_Place]:
    """Return the place in the list that a cursor stands for. Raises InvalidRequest if it is no cursor."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        created_at, job_id = msgspec.json.decode(text, type=_Place)
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise InvalidRequest("cursor must be the next_cursor of a list of jobs", param="cursor") from None
    if not rows.may_be_id(job_id):
        raise InvalidRequest("cursor must be the next_cursor of a list of jobs", param="cursor")
    return tuple_(created_at, job_id)


def _to_cursor(job: Job) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((job.created_at, job.id))).decode().rstrip("=")
