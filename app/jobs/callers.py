"""Who waits for which job. When the last one has left, nobody needs the work, if not told otherwise."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.jobs.job import Job
from app.jobs.notes import Notes


class Callers:
    """Counts the callers that wait; `give_up` is told of jobs that nobody waits for any more."""

    def __init__(self, notes: Notes, give_up: Callable[[Job], None]) -> None:
        self._notes = notes
        self._give_up = give_up
        self._waiting: Counter[str] = Counter()

    def num_waiting(self, job_id: str) -> int:
        """Callers that wait now."""
        return self._waiting[job_id]

    @contextmanager
    def waiting(self, job: Job) -> Iterator[None]:
        """Be one who waits for a job, as long as this lasts."""
        self._waiting[job.id] += 1
        try:
            yield
        finally:
            self._waiting[job.id] -= 1
            if not self._waiting[job.id]:
                del self._waiting[job.id]
                if job.on_disconnect == "cancel" and not self._notes.is_detached(job.id):
                    self._give_up(job)
