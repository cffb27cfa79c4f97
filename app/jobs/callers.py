"""Who waits for which job. When the last one has left, the job is given up, unless it is to finish."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.jobs.job import Job
from app.jobs.job_notes import JobNotes


class Callers:
    """Counts the callers that wait, and calls `give_up` for jobs that nobody waits for any more."""

    def __init__(self, notes: JobNotes, give_up: Callable[[Job], None]) -> None:
        self._notes = notes
        self._give_up = give_up
        self._waiting: Counter[str] = Counter()

    def num_waiting(self, job_id: str) -> int:
        """Return how many callers wait for a job now."""
        return self._waiting[job_id]

    @contextmanager
    def waiting(self, job: Job) -> Iterator[None]:
        """Count a caller as waiting for a job inside this context."""
        self._waiting[job.id] += 1
        try:
            yield
        finally:
            self._waiting[job.id] -= 1
            if not self._waiting[job.id]:
                del self._waiting[job.id]
                if job.on_disconnect == "cancel" and not self._notes.is_detached(job.id):
                    self._give_up(job)
