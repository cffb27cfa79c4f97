"""What this server knows of jobs beyond their rows: what its callers were promised and what they want."""

from dataclasses import dataclass

MAX_NOTES = 10_000  # beyond this the oldest are forgotten, as ends of jobs elsewhere may not be told here


@dataclass(slots=True)
class Note:
    """The note of one job."""

    promised_seconds: float | None = None  # until it is done, as predicted when it was accepted
    num_previews: int = 0  # wanted of each picture
    is_detached: bool = False  # it is to finish even if all callers leave


class JobNotes:
    """The notes of the jobs that have not ended."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def of(self, job_id: str) -> Note:
        """Return the note of a job, to be read and written."""
        if job_id not in self._notes and len(self._notes) >= MAX_NOTES:
            del self._notes[next(iter(self._notes))]
        return self._notes.setdefault(job_id, Note())

    def is_detached(self, job_id: str) -> bool:
        """Return whether the job is to finish even if all callers leave."""
        return job_id in self._notes and self._notes[job_id].is_detached

    def take(self, job_id: str) -> Note:
        """Remove and return the note of a job that has ended."""
        return self._notes.pop(job_id, Note())
