"""Idempotency keys: which job came with which key of a tenant, for a while."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from app.errors import KeyReused
from app.jobs import rows
from app.jobs.job import Job, JobStatus
from app.jobs.tables import idempotency

DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Idempotency:
    """What makes a second submission of a tenant known as such."""

    key: str
    fingerprint: str  # of the request
    ttl_seconds: float = DAY_SECONDS


def replayed(connection: Connection, tenant: str, given: Idempotency, now: float) -> Job | None:
    """The job that came with this key before. Raises KeyReused when its request was another one.

    A job that failed, expired or was canceled, or is about to be, is as if it had never been: who asks again
    wants pictures.
    """
    query = select(idempotency).filter_by(tenant=tenant, key=given.key)
    row = connection.execute(query.where(idempotency.c.expires_at > now)).one_or_none()
    if row is None:
        return None
    job = rows.find(connection, row.job_id, tenant)
    if job is None or (job.status != JobStatus.SUCCEEDED and (job.is_finished or job.cancel_requested)):
        return None
    if row.fingerprint != given.fingerprint:
        raise KeyReused("this idempotency key came with another request before; use a new one")
    return job


def remember(connection: Connection, job: Job, given: Idempotency, now: float) -> None:
    """Let the key stand for `job` from now on."""
    mine: Mapping[str, Any] = {"tenant": job.tenant, "key": given.key}
    connection.execute(delete(idempotency).filter_by(**mine))
    expires_at = now + given.ttl_seconds
    values = {**mine, "fingerprint": given.fingerprint, "job_id": job.id, "expires_at": expires_at}
    connection.execute(insert(idempotency).values(values))


def forget_old(connection: Connection, now: float) -> None:
    """Drop the keys whose time is over."""
    connection.execute(delete(idempotency).where(idempotency.c.expires_at <= now))
