"""Which of the workers that hold jobs are still alive.

A lease is a time on a wall clock, and wall clocks jump and differ between machines. So a lease is never
compared with a clock: it is over when its holder has not renewed it for its length while we watched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

LOOKS = 3  # a worker must be found silent at least so many times
LOOK_SECONDS = 0.25  # between two looks; claims in between do not look


@dataclass(slots=True)
class _Holder:
    lease_until: float
    looked_at: float
    silent_seconds: float = 0.0


class LeaseWatch:
    """Compares leases with those of earlier looks. `clock` must never jump."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holders: dict[str, _Holder] = {}
        self._looked_at = -inf

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return self._clock() - self._looked_at >= LOOK_SECONDS

    def silent(self, leases: Mapping[str, float], lease_seconds: float) -> set[str]:
        """Return the holders of `leases` that have not renewed theirs for `lease_seconds`.

        The time between two looks counts only up to a part of the lease: while the database was away,
        nobody could renew, so nobody failed to.
        """
        now = self._looked_at = self._clock()
        holders = {worker: self._look(worker, lease, now, lease_seconds) for worker, lease in leases.items()}
        self._holders = holders
        return {worker for worker, holder in holders.items() if holder.silent_seconds >= lease_seconds}

    def _look(self, worker: str, lease_until: float, now: float, lease_seconds: float) -> _Holder:
        known = self._holders.get(worker)
        if known is None or known.lease_until != lease_until:
            return _Holder(lease_until, now)
        known.silent_seconds += min(now - known.looked_at, lease_seconds / LOOKS)
        known.looked_at = now
        return known
