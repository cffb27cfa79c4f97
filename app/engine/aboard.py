"""The pictures aboard, by job, and what somebody wants to hear of each job."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from app.engine.picture import Picture
from app.engine.protocol import Run

STEPPED_SECONDS = 0.1  # between two words about the steps of a job


@dataclass(slots=True)
class _Job:
    pictures: dict[int, Picture] = field(default_factory=dict)
    untold: dict[int, Picture] = field(default_factory=dict)  # stepped since their job was spoken of
    num_previews: int = 0  # of each picture
    told_at: float = -inf


class Aboard:
    """Who is in work, from arrival until the pixels are sent."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._num_pictures = 0

    def __len__(self) -> int:
        return self._num_pictures

    def __contains__(self, run: Run) -> bool:
        return run.job in self._jobs and run.index in self._jobs[run.job].pictures

    def at(self, job: str, index: int) -> Picture:
        """One of them. KeyError when it is not here."""
        return self._jobs[job].pictures[index]

    def of(self, job: str) -> list[Picture]:
        """The pictures of a job."""
        return list(self._jobs[job].pictures.values()) if job in self._jobs else []

    def add(self, picture: Picture) -> None:
        """Take a picture in."""
        self._jobs.setdefault(picture.run.job, _Job()).pictures[picture.run.index] = picture
        self._num_pictures += 1

    def remove(self, picture: Picture) -> None:
        """Let a picture go; one that is gone already, or came back as another, is no matter."""
        job = self._jobs.get(picture.run.job)
        if job is not None and job.pictures.get(picture.run.index) is picture:
            del job.pictures[picture.run.index]
            job.untold.pop(picture.run.index, None)
            self._num_pictures -= 1
            if not job.pictures:
                del self._jobs[picture.run.job]

    def want_previews(self, job: str, count: int) -> None:
        """Somebody watches a job, if it is here."""
        if job in self._jobs:
            self._jobs[job].num_previews = count

    def to_tell(self, stepped: list[Picture], now: float) -> list[Picture]:
        """Those that have stepped, now or before, of the jobs that were not spoken of for long enough.

        A job is told at most every `STEPPED_SECONDS`, and then of all its pictures, in whichever batches.
        """
        jobs: dict[str, _Job] = {}
        for picture in stepped:
            if picture.run in self:
                job = jobs[picture.run.job] = self._jobs[picture.run.job]
                job.untold[picture.run.index] = picture
        told: list[Picture] = []
        for job in jobs.values():
            if now - job.told_at >= STEPPED_SECONDS:
                told += job.untold.values()
                job.untold.clear()
                job.told_at = now
        return told

    def to_show(self, pictures: list[Picture]) -> Iterator[Picture]:
        """Those of which a preview is due."""
        for picture in pictures:
            job = self._jobs.get(picture.run.job)
            if job is not None and picture.wants_preview(job.num_previews):
                yield picture
