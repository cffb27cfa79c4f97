"""Who still lives among the workers that hold jobs.

A lease is a time on a wall clock, and wall clocks jump and differ between machines. So nobody compares a
lease with a clock: it is out when its holder has not renewed it for so long while we watched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

LOOKS = 3  # a worker must have been found silent so many times
LOOK_SECONDS = 0.25  # from one look to the next; a claim in between does not wait for one


@dataclass(slots=True)
class _Holder:
    lease_until: float
    looked_at: float
    silent_seconds: float = 0.0


class LeaseWatch:
    """Remembers what leases looked like. `clock` never jumps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holders: dict[str, _Holder] = {}
        self._looked_at = -inf

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return self._clock() - self._looked_at >= LOOK_SECONDS

    def silent(self, leases: Mapping[str, float], lease_seconds: float) -> set[str]:
        """The workers among those that hold `leases` now which gave no sign of life for a lease's length.

        The time between two looks counts only up to a part of the lease: when the database was away for
        minutes, nobody could renew, and we did not see anybody fail to.
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
