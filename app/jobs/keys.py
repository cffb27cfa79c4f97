"""Idempotency keys: which job was submitted with which key of a tenant, kept for a while."""

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
    """What identifies a repeated submission of a tenant."""

    key: str
    fingerprint: str  # of the request
    ttl_seconds: float = DAY_SECONDS


def replayed(connection: Connection, tenant: str, given: Idempotency, now: float) -> Job | None:
    """Return the job submitted with this key before. Raises KeyReused if its request was another one.

    A job that failed, expired or was canceled, or is about to be, is ignored: a caller that asks again wants
    pictures.
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
    """Let the key refer to `job` from now on."""
    mine: Mapping[str, Any] = {"tenant": job.tenant, "key": given.key}
    connection.execute(delete(idempotency).filter_by(**mine))
    expires_at = now + given.ttl_seconds
    values = {**mine, "fingerprint": given.fingerprint, "job_id": job.id, "expires_at": expires_at}
    connection.execute(insert(idempotency).values(values))


def forget_old(connection: Connection, now: float) -> None:
    """Delete the keys that have expired."""
    connection.execute(delete(idempotency).where(idempotency.c.expires_at <= now))
