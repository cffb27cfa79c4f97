"""Events of jobs, for those who wait or watch.

A job's log keeps the latest news of each kind, so that a slow reader sees fewer events and costs no more
memory than a quick one: a reader is only a position in the log. Events can be read again by their numbers.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from app.jobs.job import Job, Progress, StoredImage

KEPT_SECONDS = 10.0  # after its end, for those who come back with the number of their last event
MAX_ENDED = 100  # logs of ended jobs that are kept at most; the end itself is in the database
# Event numbers per claim, so that they rise when another server, or this one restarted, goes on with a job.
NUMBERS_PER_CLAIM = 1_000_000

Kind = Literal["queued", "progress", "preview", "image", "final"]


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits in the queue."""

    position: int  # jobs before it


@dataclass(frozen=True, slots=True)
class Preview:
    """A small preview of a picture in work."""

    index: int
    preview: int  # counts from 0
    content: bytes  # WebP, with the mark


News = Queued | Progress | Preview | StoredImage | Job

_KINDS: dict[type[News], Kind] = {
    Queued: "queued",
    Progress: "progress",
    Preview: "preview",
    StoredImage: "image",
    Job: "final",
}


@dataclass(frozen=True, slots=True)
class Event:
    """News of a job. Numbers rise; those of outdated events are missing."""

    id: int
    news: News

    @property
    def kind(self) -> Kind:
        """Kind of the news."""
        return _KINDS[type(self.news)]


@dataclass(slots=True)
class _Log:
    # By what a newer one would replace, oldest first.
    events: dict[object, Event] = field(default_factory=dict)
    last_id: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_streams: int = 0
    num_waiting: int = 0
    is_over: bool = False  # nothing more will come: the job has ended, or is forgotten

    def add(self, news: News) -> bool:
        """Add news; return whether they are the last."""
        self.last_id += 1
        event = Event(self.last_id, news)
        self.events.pop(_place(news), None)
        self.events[_place(news)] = event
        self.is_over = event.kind == "final"
        self.wake()
        return self.is_over

    def after(self, last_id: int) -> list[Event]:
        """Return later events; all of them if `last_id` is not of this server but of another one."""
        known = last_id if last_id <= self.last_id else 0
        return [event for event in self.events.values() if event.id > known]

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class EventHub:
    """The logs of the jobs that this process works on or is asked about. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logs: dict[str, _Log] = {}
        self._ended: deque[tuple[float, str]] = deque()
        self._is_closed = False
        self._is_held_up = False

    def publish(self, job_id: str, news: News) -> None:
        """Add news to the log of a job and wake its readers. After the end of a job news are ignored."""
        self._forget_old()
        log = self._logs.setdefault(job_id, _Log())
        if log.is_over or self._is_known(log, news):
            return
        if log.add(news):
            self._ended.append((self._clock(), job_id))

    def begin_claim(self, job: Job) -> None:
        """Continue with event numbers that no earlier claim has given out, here or elsewhere."""
        log = self._logs.setdefault(job.id, _Log())
        log.last_id = max(log.last_id, job.fence * NUMBERS_PER_CLAIM)

    @property
    def is_held_up(self) -> bool:
        """Whether no job can end now, for want of room."""
        return self._is_held_up

    def has_ended(self, job_id: str) -> bool:
        """Return whether the end of a job was published here, not long ago."""
        return job_id in self._logs and self._logs[job_id].is_over

    def is_watched(self, job_id: str) -> bool:
        """Return whether somebody reads the news of a job as they come."""
        return job_id in self._logs and self._logs[job_id].num_streams > 0

    def progress(self, job: Job) -> Progress:
        """Return the furthest progress of a job that was reported here or by another server."""
        event = self._logs.get(job.id, _Log()).events.get("progress")
        said = event.news if event is not None and isinstance(event.news, Progress) else Progress()
        return said if job.progress is None or job.progress.fraction < said.fraction else job.progress

    async def subscribe(
        self, job_id: str, last_id: int = 0, *, is_patient: bool = True
    ) -> AsyncGenerator[Event, None]:
        """Yield the stored events of a job after `last_id`, then new ones, until it or this server ends.

        Unless `is_patient`, it does not wait while all jobs are held up.
        """
        log = self._logs.setdefault(job_id, _Log())
        log.num_streams += 1
        try:
            while True:
                changed = log.changed
                for event in log.after(last_id):
                    last_id = event.id
                    yield event
                if changed.is_set():
                    continue  # something came while the reader was busy
                if log.is_over or self._is_closed or (self._is_held_up and not is_patient):
                    return
                await changed.wait()
        finally:
            log.num_streams -= 1
            self._forget_idle(job_id)

    async def final(self, job_id: str) -> Job | None:
        """Wait for the end of a job. None if it is forgotten, this server ends, or all jobs are held up."""
        log = self._logs.setdefault(job_id, _Log())
        log.num_waiting += 1
        try:
            while not (log.is_over or self._is_closed or self._is_held_up):
                await log.changed.wait()
        finally:
            log.num_waiting -= 1
            self._forget_idle(job_id)
        event = log.events.get("final")
        return event.news if event is not None and isinstance(event.news, Job) else None

    def unended(self) -> Iterator[tuple[str, bool, bool]]:
        """Yield unended jobs: id, whether anybody waits or watches, whether anybody watches."""
        for job_id, log in list(self._logs.items()):
            if not log.is_over:
                yield job_id, bool(log.num_streams or log.num_waiting), bool(log.num_streams)

    def forget(self, job_id: str) -> None:
        """Forget a job of which nothing more will be known, and release those who wait for it."""
        log = self._logs.pop(job_id, None)
        if log is not None:
            log.is_over = True
            log.wake()

    def hold_up(self, is_held_up: bool) -> None:
        """Set whether no job can end now; if so, release those who wait for an end and are not patient."""
        if is_held_up and not self._is_held_up:
            for log in self._logs.values():
                log.wake()
        self._is_held_up = is_held_up

    def close(self) -> None:
        """Release all readers, after they have read what there is."""
        self._is_closed = True
        for log in self._logs.values():
            log.wake()

    def _is_known(self, log: _Log, news: News) -> bool:
        event = log.events.get(_place(news))
        return event is not None and event.news == news

    def _forget_idle(self, job_id: str) -> None:
        log = self._logs.get(job_id)
        if log is not None and not (log.events or log.num_streams or log.num_waiting):
            del self._logs[job_id]

    def _forget_old(self) -> None:
        """Drop the old logs of ended jobs; those who still read one can do so to its end."""
        oldest = self._clock() - KEPT_SECONDS
        while self._ended and (self._ended[0][0] < oldest or len(self._ended) > MAX_ENDED):
            self._logs.pop(self._ended.popleft()[1], None)


def _place(news: News) -> object:
    """Return the key of news in a log, under which newer ones replace older ones."""
    match news:
        case Preview(index, preview):
            return ("preview", index, preview)
        case StoredImage(index):
            return ("image", index)
        case _:
            return _KINDS[type(news)]
