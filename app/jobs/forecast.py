"""Progress of jobs and when they will be done, from their steps that are left and the work ahead of them."""

import time
from dataclasses import replace

from app.engine.cost import CostModel, retry_after_seconds
from app.jobs.events import EventHub
from app.jobs.fleet import Fleet
from app.jobs.job import Job, JobStatus, Progress
from app.jobs.queue import QueueCounts
from app.jobs.store import JobStore
from app.jobs.supervisor import EngineState

STALE_SECONDS = 10.0


class Forecast:
    """Predicts progress and waiting times. `counts` is the queue when it was last counted, not long ago."""

    def __init__(self, store: JobStore, fleet: Fleet, events: EventHub, cost: CostModel) -> None:
        self.counts = QueueCounts(0, 0, 0.0, None)
        self.counted_at = time.monotonic()
        self._store = store
        self._fleet = fleet
        self._events = events
        self._cost = cost

    @property
    def is_current(self) -> bool:
        """Whether the queue could be counted recently; else the database is away."""
        return time.monotonic() - self.counted_at < STALE_SECONDS

    def progress(self, job: Job) -> Progress:
        """Return the progress of a job, as far as it is known here."""
        if job.is_finished and job.status != JobStatus.SUCCEEDED:
            return replace(self._events.progress(job), stage="done", eta_seconds=0.0)
        if job.is_finished:
            steps = job.request.decoder_num_inference_steps
            return Progress("done", steps, steps, 1.0, 0.0)
        flight = self._fleet.flight(job.id)
        if flight is None:
            return self._events.progress(job)
        progress = flight.progress()
        self._events.publish(job.id, progress)  # remembered, so that it does not fall with another claim
        return progress

    def retry_after_seconds(self) -> int:
        """Return the seconds after which there should be room, 1 to 59."""
        ahead = self.counts.queued_cost_seconds + self._aboard_seconds
        return retry_after_seconds(ahead, self._num_devices)

    def promise(self, job: Job) -> float:
        """Return the seconds until a job is done that would now be last in the queue."""
        return self._eta_seconds(job, self.counts.queued_cost_seconds)

    async def eta_seconds(self, job: Job | None) -> float:
        """Return the seconds until a job is done, or without one, all jobs."""
        if job is None:
            counts = await self._store.counts()
            return (self._aboard_seconds + counts.queued_cost_seconds) / self._num_devices
        if job.is_finished:
            return 0.0
        flight = self._fleet.flight(job.id)
        if flight is not None:
            return flight.slot.eta_seconds(flight)
        counts, position = await self._store.counts(), await self._store.position(job) or 0
        return self._eta_seconds(job, counts.queued_cost_seconds * position / max(counts.queued, 1))

    def _eta_seconds(self, job: Job, queued_seconds: float) -> float:
        ahead = self._aboard_seconds + queued_seconds
        return self._cost.eta_seconds(job.request, ahead_seconds=ahead, num_devices=self._num_devices)

    @property
    def _aboard_seconds(self) -> float:
        return sum(slot.seconds_left for slot in self._fleet.slots)

    @property
    def _num_devices(self) -> int:
        return max(sum(slot.engine.state is not EngineState.UNUSABLE for slot in self._fleet.slots), 1)
