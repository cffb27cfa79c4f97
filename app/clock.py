"""The time of day for everything that lasts a while: deadlines, lifetimes of files, ages of jobs.

The system's clock may be set, forwards by a day or back by an hour, without changing the age of a job.
"""

import threading
import time
from collections.abc import Callable

SLEW = 0.05  # how much faster or slower time may run until both clocks agree again


def seconds_since_boot() -> float:
    """Return the time of a clock that never jumps, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SteadyClock:
    """Seconds since 1970 (UTC) that never jump: jumps of `wall` are made up for gradually."""

    def __init__(self, wall: Callable[[], float], passed: Callable[[], float] = seconds_since_boot) -> None:
        self._wall = wall
        self._passed = passed
        self._lock = threading.Lock()
        self._looked_at = passed()
        self._now = wall()

    def __call__(self) -> float:
        """Return the time now, never less than before."""
        with self._lock:
            looked_at = self._passed()
            elapsed = looked_at - self._looked_at
            now, most = self._now + elapsed, SLEW * elapsed
            self._now = now + max(-most, min(self._wall() - now, most))
            self._looked_at = looked_at
            return self._now
