"""The queue of jobs that wait: their number, their order, and whether there is room for one more.

The order is fair: of each tenant the oldest job of the highest priority comes next, and among these the one
whose tenant has fewest jobs in work or before it. So a tenant that queues a thousand jobs delays nobody else.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, Subquery, bindparam, func, or_, select

from app.errors import QueueFull
from app.jobs.job import JobStatus
from app.jobs.tables import jobs

FULL_SECONDS = 0.5

IS_QUEUED = jobs.c.status == JobStatus.QUEUED
IS_RUNNING = jobs.c.status == JobStatus.RUNNING


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """How much there is to do, on all servers."""

    queued: int
    running: int
    queued_cost_seconds: float
    oldest_created_at: float | None  # of those queued


class FullQueue:
    """What is known of a full queue, so that refusing many callers does not take a transaction for each.

    `clock` must never jump. Jobs that leave without our knowledge, such as through other servers, are noticed
    `FULL_SECONDS` after the last look.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_left = 0
        self._num_queued: int | None = None  # while it is known to be full
        self._max_queue = 0
        self._known_until = 0.0

    @property
    def num_left(self) -> int:
        """How often jobs have left the queue."""
        return self._num_left

    def check(self, max_queue: int) -> None:
        """Raise QueueFull if the queue is known to hold `max_queue` jobs."""
        if self._num_queued is None or max_queue != self._max_queue or self._clock() >= self._known_until:
            return
        raise QueueFull(self._num_queued)

    def note(self, full: QueueFull, max_queue: int, num_left: int) -> None:
        """Learn that a transaction found it full, which began when `num_left` was what it said."""
        if max_queue and num_left == self._num_left:  # a bound of 0 also asks whether any job is in work
            self._num_queued, self._max_queue = full.num_queued, max_queue
            self._known_until = self._clock() + FULL_SECONDS

    def left(self) -> None:
        """Learn that jobs may have left the queue."""
        self._num_left += 1
        self._num_queued = None


def count(connection: Connection) -> QueueCounts:
    """Count how much there is to do now."""
    return QueueCounts(*connection.execute(_COUNT).one())


def require_room(connection: Connection, max_queue: int) -> None:
    """Raise QueueFull if `max_queue` jobs wait; for a bound of 0, if there is anything to do at all."""
    counts = count(connection)
    is_idle = counts.queued == counts.running == 0
    if counts.queued >= max_queue and not (max_queue == 0 and is_idle):
        raise QueueFull(counts.queued)


def require_bound(connection: Connection, max_queue: int) -> None:
    """Raise QueueFull if more than `max_queue` jobs wait, including the one that came last."""
    queued = count(connection).queued
    if queued > max_queue:
        raise QueueFull(queued - 1)


def position(connection: Connection, job_id: str, now: float) -> int | None:
    """Return how many jobs will be claimed before this one; None if it will not be claimed."""
    return connection.scalar(_POSITION, {"job_id": job_id, "now": now})


def _claim_order() -> Subquery:
    at_work = jobs.alias()
    shares = (
        select(at_work.c.tenant, func.count().label("num_running"))
        .where(at_work.c.status == JobStatus.RUNNING)
        .group_by(at_work.c.tenant)
        .subquery()
    )
    place = func.row_number().over(
        partition_by=jobs.c.tenant, order_by=(jobs.c.priority.desc(), jobs.c.number)
    )
    turn = place + func.coalesce(shares.c.num_running, 0)
    return (
        select(jobs.c.number, jobs.c.id, turn.label("turn"))
        .outerjoin(shares, shares.c.tenant == jobs.c.tenant)
        .where(IS_QUEUED, or_(jobs.c.deadline_at.is_(None), jobs.c.deadline_at > bindparam("now")))
        .subquery()
    )


# Built once: building a query takes longer than SQLite needs to answer it.
_COUNT = select(
    func.count().filter(IS_QUEUED),
    func.count().filter(IS_RUNNING),
    func.coalesce(func.sum(jobs.c.cost_seconds).filter(IS_QUEUED), 0.0),
    func.min(jobs.c.created_at).filter(IS_QUEUED),
).where(IS_QUEUED | IS_RUNNING)
# `number`, `id` and `turn` of the jobs that wait and are not late at `now`; to be ordered by turn, number.
CLAIM_ORDER = _claim_order()
_PLACES = select(
    CLAIM_ORDER.c.id,
    (func.row_number().over(order_by=(CLAIM_ORDER.c.turn, CLAIM_ORDER.c.number)) - 1).label("place"),
).subquery()
_POSITION = select(_PLACES.c.place).where(_PLACES.c.id == bindparam("job_id"))
