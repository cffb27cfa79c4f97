"""What webhooks have still to be told: rows written with what they tell of, and deleted when that is settled.

An attempt is counted before it is made, and its number is its fence: the outcome of a late one is ignored
when another has been begun.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, select, tuple_, update

from app.jobs import rows
from app.jobs.job import Job, JobStatus
from app.jobs.tables import deliveries, jobs

LONGEST_PAUSE = 3 * 3600.0  # between two attempts; what is due later was written before a clock jumped

_IS_DUE = (deliveries.c.due_at <= bindparam("now")) | (deliveries.c.due_at > bindparam("now") + LONGEST_PAUSE)
_ANY_DUE = select(deliveries.c.job_id).where(_IS_DUE).limit(1)
_NEXT = (
    select(deliveries)
    .where(
        _IS_DUE,
        deliveries.c.tenant.not_in(bindparam("without_tenants", expanding=True)),
        tuple_(deliveries.c.tenant, deliveries.c.receiver).not_in(bindparam("without", expanding=True)),
    )
    .order_by(deliveries.c.due_at, deliveries.c.job_id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_JOBS = select(jobs).where(jobs.c.id.in_(bindparam("ids", expanding=True)))
_THIS = (
    deliveries.c.job_id == bindparam("of_job"),
    deliveries.c.status == bindparam("of_status"),
    deliveries.c.attempts == bindparam("attempt"),
)
_BEGIN = update(deliveries).where(*_THIS).values(attempts=bindparam("attempt") + 1, due_at=bindparam("until"))
_POSTPONE = update(deliveries).where(*_THIS).values(due_at=bindparam("until"))
_FORGET = delete(deliveries).where(*_THIS)


@dataclass(frozen=True, slots=True)
class Delivery:
    """An attempt to tell a webhook that a job has reached a status."""

    job: Job
    status: JobStatus
    attempt: int  # counted from 1

    @property
    def id(self) -> str:
        """Id of the message, the same for every attempt."""
        return f"msg_{self.job.id.removeprefix('job_')}_{self.status}"


def any_due(connection: Connection, now: float) -> bool:
    """Return whether any delivery is due."""
    return connection.execute(_ANY_DUE, {"now": now}).first() is not None


@dataclass(frozen=True, slots=True)
class Busy:
    """Tenants and receivers to leave alone for now."""

    tenants: Collection[str] = ()
    receivers: Collection[tuple[str, str]] = ()  # each with its tenant first


def claim(
    connection: Connection, limit: int, busy: Busy, now: float, hold_seconds: float
) -> Sequence[Delivery]:
    """Begin up to `limit` attempts for those not `busy`; for `hold_seconds` nobody else begins them."""
    without = {"without_tenants": list(busy.tenants), "without": list(busy.receivers)}
    found = connection.execute(_NEXT, {"now": now, "most": limit, **without}).all()
    if not found:
        return ()
    told = {job.id: job for job in rows.read(connection, _JOBS, {"ids": [row.job_id for row in found]})}
    for row in found:
        values = {"of_job": row.job_id, "of_status": row.status, "attempt": row.attempts}
        connection.execute(_BEGIN, {**values, "until": now + hold_seconds})
    return [Delivery(told[row.job_id], JobStatus(row.status), row.attempts + 1) for row in found]


def settle(connection: Connection, delivery: Delivery, again_at: float | None) -> None:
    """Write the outcome of an attempt: another one at `again_at`, or None for no more."""
    values = {"of_job": delivery.job.id, "of_status": delivery.status.value, "attempt": delivery.attempt}
    if again_at is None:
        connection.execute(_FORGET, values)
    else:
        connection.execute(_POSTPONE, {**values, "until": again_at})
