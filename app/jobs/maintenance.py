"""Periodic work: renew leases, expire jobs, claim, look up the jobs of other servers, count.

One task does it in rounds, and claims between them when it is told of jobs or of room.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from app.errors import StorageFull
from app.jobs.events import Queued
from app.jobs.fleet import Fleet
from app.jobs.forecast import Forecast
from app.jobs.job import Job, JobStatus
from app.jobs.results import Resources

ROUND_SECONDS = 0.5
RENEW_SECONDS = 2.0  # or sooner: a renewal also tells which jobs callers of other servers canceled
OTHERS_ROUNDS = 10  # a sole server looks up an awaited job that is not in work in one round of so many
IDLE_ROUNDS = 60  # any server looks up a job that nobody here waits for in one round of so many


class Maintenance:
    """Rounds of periodic work. What fails is tried again in the next: a database that is away comes back."""

    def __init__(
        self, fleet: Fleet, forecast: Forecast, resources: Resources, *, lease_seconds: float, is_sole: bool
    ) -> None:
        self._has_news = asyncio.Event()
        self._fleet = fleet
        self._forecast = forecast
        self._resources = resources
        self._lease_seconds = lease_seconds
        self._is_sole = is_sole
        self._has_failed_to_claim = False
        self._is_closed = False
        self._is_over = False
        self._renewed_at = 0.0
        self._round = 0

    def wake(self) -> None:
        """Wake the task, because there is room, or a job to claim."""
        self._has_news.set()

    def close(self) -> None:
        """Stop claiming."""
        self._is_closed = True

    def end(self) -> None:
        """Let `run` return soon."""
        self._is_over = True
        self.wake()

    async def run(self) -> None:
        """Do the rounds until the end."""
        loop = asyncio.get_running_loop()
        next_round = loop.time()
        while not self._is_over:
            self._has_news.clear()
            if loop.time() >= next_round:
                next_round = loop.time() + ROUND_SECONDS
                self._fleet.note_queued()  # by other servers
                self._has_failed_to_claim = False
                await self._try(self._renew, self._expire, self._claim, self._look_around, self._count)
            else:
                await self._try(self._claim)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_round):
                    await self._has_news.wait()

    async def look_at(self, job: Job, *, is_watched: bool) -> None:
        """Publish what only the database knows of a job."""
        events = self._resources.events
        for image in job.images:
            events.publish(job.id, image)
        if job.is_finished:
            self._fleet.results.tell(job, is_ours=False)
        elif is_watched and job.status == JobStatus.QUEUED:
            position = await self._resources.store.position(job)
            if position is not None:
                events.publish(job.id, Queued(position))
        elif is_watched and job.progress is not None and self._fleet.flight(job.id) is None:
            events.publish(job.id, events.progress(job))

    async def _try(self, *chores: Callable[[], Awaitable[None]]) -> None:
        for chore in chores:
            name = chore.__name__.strip("_")
            try:
                await chore()
            except StorageFull as full:  # `disk_space` logs it once, and not twice a second
                self._resources.disk_space.lacks(name, full)
            except Exception as error:
                self._resources.logger.error("a chore failed and is tried again", chore=name, exc_info=error)
            else:
                self._resources.disk_space.suffices(name)

    async def _renew(self) -> None:
        """Renew our leases before anything is claimed: after a long pause our jobs must not count as lost."""
        now = asyncio.get_running_loop().time()
        if now - self._renewed_at >= min(self._lease_seconds / 3, RENEW_SECONDS):
            await self._fleet.renew(self._lease_seconds, tells=not self._is_sole)
            self._renewed_at = now

    async def _expire(self) -> None:
        await self._fleet.expire()
        for job in await self._resources.store.expire(self._resources.clock()):
            self._fleet.results.tell(job, is_ours=True)

    async def _claim(self) -> None:
        if not self._fleet.may_claim or self._is_closed or self._has_failed_to_claim:
            return
        try:
            await self._fleet.claim(self._lease_seconds)
        except Exception:
            self._has_failed_to_claim = True  # until the next round: else the same job might fail without end
            raise

    async def _look_around(self) -> None:
        """Look up jobs that are asked about but not in work here: other servers may do or end them."""
        self._round += 1
        for job_id, is_awaited, is_watched in self._resources.events.unended():
            is_due = is_watched or self._round % IDLE_ROUNDS == 0
            is_due |= is_awaited and (not self._is_sole or self._round % OTHERS_ROUNDS == 0)
            if not is_due or self._fleet.flight(job_id) is not None:
                continue
            job = await self._resources.store.get(job_id, None)
            if job is None:
                self._resources.events.forget(job_id)
            elif self._fleet.flight(job_id) is None:
                await self.look_at(job, is_watched=is_watched)

    async def _count(self) -> None:
        counts = self._forecast.counts = await self._resources.store.counts()
        self._forecast.counted_at = time.monotonic()
        metrics, oldest = self._resources.metrics, counts.oldest_created_at
        metrics.queue_jobs.set(counts.queued)
        metrics.running_jobs.set(len(self._fleet.flights))
        metrics.queue_cost_seconds.set(counts.queued_cost_seconds)
        metrics.queue_age_seconds.set(0 if oldest is None else max(self._resources.clock() - oldest, 0))
        metrics.model_loaded.set(any(slot.engine.is_ready for slot in self._fleet.slots))
