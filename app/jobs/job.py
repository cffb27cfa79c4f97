"""A job: one accepted request on its way to pictures.

The event loop waits for it and may cancel it, the engine's thread works on it. Only its own methods
move it: queued -> running -> succeeded | failed | canceled; the last three are final.
"""

import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from PIL.Image import Image

from app.errors import ClientGone
from app.schemas import GenerationRequest


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work on a job is."""

    stage: Literal["queued", "prior", "decoder", "decode"]
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture, not encoded yet."""

    image: Image
    seed: int
    resampled_from: tuple[int, int] | None = None  # (width, height) that it was drawn at
    prompt_truncated: bool = False
    prompt_tokens: int = 0


def _new_id() -> str:
    return f"job_{secrets.token_hex(10)}"


def _new_outcome() -> Future[list[Picture]]:
    outcome: Future[list[Picture]] = Future()
    outcome.set_running_or_notify_cancel()  # a waiter that gives up must not cancel it for the engine
    return outcome


@dataclass(slots=True, eq=False)
class Job:
    """One request, its status and its outcome. Times are of `time.monotonic`, in seconds."""

    request: GenerationRequest
    id: str = field(default_factory=_new_id)
    status: JobStatus = JobStatus.QUEUED
    progress: Progress = Progress("queued", 0, 0)
    created_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None
    outcome: Future[list[Picture]] = field(default_factory=_new_outcome, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def is_finished(self) -> bool:
        """Whether the status is final."""
        return self.status not in (JobStatus.QUEUED, JobStatus.RUNNING)

    @property
    def queued_seconds(self) -> float:
        """Time from acceptance to the first work on it, or to its end."""
        return (self.started_at or self.ended_at or time.monotonic()) - self.created_at

    @property
    def running_seconds(self) -> float:
        """Time that the engine worked on it."""
        return (self.ended_at or time.monotonic()) - self.started_at if self.started_at else 0.0

    def start(self) -> bool:
        """Queued to running; a job that ended meanwhile stays as it is, and the answer is False."""
        with self._lock:
            if self.is_finished:
                return False
            self.status = JobStatus.RUNNING
            self.started_at = self.started_at or time.monotonic()
            return True

    def report(self, progress: Progress) -> None:
        """Take note of a step."""
        self.progress = progress

    def succeed(self, pictures: list[Picture]) -> None:
        """Hand over the pictures, unless the job was cancelled meanwhile."""
        if self._end(JobStatus.SUCCEEDED):
            self.outcome.set_result(pictures)

    def fail(self, error: Exception) -> None:
        """End with an error, which every waiter gets."""
        if self._end(JobStatus.FAILED):
            self.outcome.set_exception(error)

    def cancel(self) -> None:
        """End without a result. The engine stops working on it at the next step."""
        if self._end(JobStatus.CANCELED):
            self.outcome.set_exception(ClientGone("the job was cancelled"))

    def _end(self, status: JobStatus) -> bool:
        with self._lock:
            if self.is_finished:
                return False
            self.status = status
            self.ended_at = time.monotonic()
            return True
