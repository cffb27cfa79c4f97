"""The time of day for everything that lasts a while: deadlines, leases of files, ages of jobs.

The system's clock may be set, forwards by a day or back by an hour, and no job is older for it.
"""

import threading
import time
from collections.abc import Callable

SLEW = 0.05  # how much faster or slower time passes until both clocks agree again


def seconds_since_boot() -> float:
    """A clock that never jumps, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SteadyClock:
    """Seconds since 1970, UTC, that pass at their pace: what `wall` jumps is made up for little by little."""

    def __init__(self, wall: Callable[[], float], passed: Callable[[], float] = seconds_since_boot) -> None:
        self._wall = wall
        self._passed = passed
        self._lock = threading.Lock()
        self._looked_at = passed()
        self._now = wall()

    def __call__(self) -> float:
        """The time now; never less than before."""
        with self._lock:
            looked_at = self._passed()
            elapsed = looked_at - self._looked_at
            now, most = self._now + elapsed, SLEW * elapsed
            self._now = now + max(-most, min(self._wall() - now, most))
            self._looked_at = looked_at
            return self._now
