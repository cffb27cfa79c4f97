"""What this server knows of jobs that no row says: promises and wishes of its own callers."""

from dataclasses import dataclass

MAX_NOTES = 10_000  # of jobs whose end was not told here, the oldest are forgotten


@dataclass(slots=True)
class Note:
    """Of one job."""

    promised_seconds: float | None = None  # that it should take, as said when it was accepted
    num_previews: int = 0  # that somebody wants of each picture
    is_detached: bool = False  # it is to finish, whoever leaves


class Notes:
    """One for each job that has not ended."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def of(self, job_id: str) -> Note:
        """The note of a job, to be read and written."""
        if job_id not in self._notes and len(self._notes) >= MAX_NOTES:
            del self._notes[next(iter(self._notes))]
        return self._notes.setdefault(job_id, Note())

    def is_detached(self, job_id: str) -> bool:
        """Whether the job finishes, whoever leaves."""
        return job_id in self._notes and self._notes[job_id].is_detached

    def take(self, job_id: str) -> Note:
        """The last look: the job has ended."""
        return self._notes.pop(job_id, Note())
