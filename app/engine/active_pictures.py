"""The pictures aboard an engine, by job, and which of them are due for a progress message or a preview."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from app.engine.picture import Picture
from app.engine.protocol import Run

STEPPED_SECONDS = 0.1  # between two progress messages about a job


@dataclass(slots=True)
class _Job:
    pictures: dict[int, Picture] = field(default_factory=dict)
    untold: dict[int, Picture] = field(default_factory=dict)  # stepped since the last such message
    num_previews: int = 0  # wanted of each picture
    told_at: float = -inf


class ActivePictures:
    """The pictures in work, from their arrival until their pixels are sent."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._num_pictures = 0

    def __len__(self) -> int:
        return self._num_pictures

    def __contains__(self, run: Run) -> bool:
        return run.job in self._jobs and run.index in self._jobs[run.job].pictures

    def at(self, job: str, index: int) -> Picture:
        """Return a picture. Raises KeyError if it is not aboard."""
        return self._jobs[job].pictures[index]

    def of(self, job: str) -> list[Picture]:
        """Return the pictures of a job."""
        return list(self._jobs[job].pictures.values()) if job in self._jobs else []

    def add(self, picture: Picture) -> None:
        """Add a picture."""
        self._jobs.setdefault(picture.run.job, _Job()).pictures[picture.run.index] = picture
        self._num_pictures += 1

    def remove(self, picture: Picture) -> None:
        """Remove a picture, unless it is gone already or a new one has taken its place."""
        job = self._jobs.get(picture.run.job)
        if job is not None and job.pictures.get(picture.run.index) is picture:
            del job.pictures[picture.run.index]
            job.untold.pop(picture.run.index, None)
            self._num_pictures -= 1
            if not job.pictures:
                del self._jobs[picture.run.job]

    def want_previews(self, job: str, count: int) -> None:
        """Set how many previews are wanted of each picture of a job, if it is aboard."""
        if job in self._jobs:
            self._jobs[job].num_previews = count

    def to_tell(self, stepped: list[Picture], now: float) -> list[Picture]:
        """Note which pictures have stepped, and return those that a progress message is due for.

        A job is due at most every `STEPPED_SECONDS`, then with all pictures that have stepped since.
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
        """Yield the pictures of which a preview is due."""
        for picture in pictures:
            job = self._jobs.get(picture.run.job)
            if job is not None and picture.wants_preview(job.num_previews):
                yield picture
