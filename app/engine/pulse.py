"""Heartbeats: tell the API process every second what the engine is busy with, so that it notices a hang."""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from app.engine.contract import AnyRunner
from app.engine.protocol import Heartbeat, Message, Observation
from app.engine.scheduler import BatchKey

BEAT_SECONDS = 1.0


class _Activity(NamedTuple):
    began_at: float
    predicted_seconds: float


class Pulse:
    """Collects events and observations of all threads of the engine, and sends heartbeats from its own."""

    def __init__(
        self, runner: AnyRunner, send: Callable[[Message], None], clock: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._send = send
        self._clock = clock
        self._activities: dict[int, _Activity] = {}  # by thread
        self._ticks: deque[Observation] = deque()
        self._told: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self.events: Counter[str] = Counter()
        self.num_samples = 0

    def start(self) -> None:
        """Start the thread that sends heartbeats."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and send a last heartbeat with what was not sent yet."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.beat()

    @contextmanager
    def busy(self, predicted_seconds: float) -> Iterator[None]:
        """Mark that the calling thread works on something that should take so long."""
        self._activities[threading.get_ident()] = _Activity(self._clock(), predicted_seconds)
        try:
            yield
        finally:
            del self._activities[threading.get_ident()]

    def observe(
        self, key: BatchKey, *, rows: int, samples: int, seconds: float, cap: int, is_backlogged: bool
    ) -> Observation:
        """Record a call of a network for the next heartbeat."""
        height, width = key.shape
        tick = Observation(key.stage, f"{height}x{width}", rows, samples, seconds, cap, is_backlogged)
        self._ticks.append(tick)
        return tick

    def beat(self) -> None:
        """Send one heartbeat."""
        ticks = tuple(self._ticks.popleft() for _ in range(len(self._ticks)))
        totals = Counter(self.events) + Counter(self._runner.counts)
        events, self._told = totals - self._told, totals
        busy_seconds, predicted_seconds = self._longest()
        self._send(
            Heartbeat(
                busy_seconds=busy_seconds,
                predicted_seconds=predicted_seconds,
                num_samples=self.num_samples,
                memory_bytes=_resident_bytes(),
                device_memory_bytes=self._runner.device_memory_bytes(),
                ticks=ticks,
                events=dict(events),
            )
        )

    def _longest(self) -> tuple[float, float]:
        """Return busy and predicted seconds of the thread that exceeds its prediction most."""
        now = self._clock()
        activities = [(now - began, predicted) for began, predicted in list(self._activities.values())]
        return max(activities, key=lambda activity: activity[0] - activity[1], default=(0.0, 0.0))

    def _beat_on(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self.beat()


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
