"""A job: one accepted request on its way to pictures, as the database keeps it.

Jobs are immutable. Only their own methods move them: from queued through running to succeeded, failed,
canceled or expired. The store writes a moved job only if its row still has the status and fence that it was
moved from. The fence counts claims: a worker that lost its lease has an old one, so its writes are refused.
"""

import secrets
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, Self
from urllib.parse import urlsplit

from app.errors import AppError
from app.schemas import GenerationRequest

MAX_CRASHES = 3  # a job aboard so many engines that died is taken to be the cause

OnDisconnect = Literal["cancel", "finish"]


class JobStatus(StrEnum):
    """The status of a job. The last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether no other status can follow."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class IllegalMove(Exception):
    """A move that the status of the job does not allow: a bug of ours, never a mistake of a caller."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work on a job is. The fraction never falls."""

    stage: Literal["queued", "loading", "prior", "decoder", "encode", "done"] = "queued"
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job has no pictures, as every caller is told."""

    status: int  # of HTTP
    code: str
    message: str

    @classmethod
    def of(cls, error: AppError) -> Self:
        """Convert one of our errors to a failure."""
        return cls(error.status, error.code, error.message)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A finished picture in the image store."""

    index: int
    seed: int
    name: str  # of the file, such as "7c....png"
    width: int
    height: int
    mime_type: str
    num_bytes: int
    sha256: str
    resampled_from: tuple[int, int] | None = None  # (width, height) that it was drawn at
    prompt_truncated: bool = False
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """How the seconds of a job were spent, by the picture done last; they add up to the whole time."""

    queued: float = 0.0  # until its first step, in the queue and aboard; also work lost in a crash
    prior: float = 0.0
    decoder: float = 0.0
    encode: float = 0.0

    def within(self, seconds: float) -> "Timings":
        """Return a copy that counts all of `seconds` that no stage took as time in the queue."""
        return replace(self, queued=max(0.0, seconds - self.prior - self.decoder - self.encode))


@dataclass(frozen=True, slots=True)
class Webhook:
    """The receiver to be told when a job has reached one of `statuses`."""

    url: str
    statuses: tuple[JobStatus, ...]
    base: str  # of the URLs in messages to it, such as "https://host"

    @property
    def receiver(self) -> str:
        """Host of the receiver."""
        return urlsplit(self.url).hostname or ""


def new_job_id() -> str:
    """Return a random id, which nobody can guess."""
    return f"job_{secrets.token_hex(10)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request, its status and its outcome. Times are seconds since 1970, UTC."""

    id: str = field(default_factory=new_job_id)
    tenant: str  # name of the API key that it belongs to; "" where none is configured
    request: GenerationRequest
    status: JobStatus = JobStatus.QUEUED
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    priority: int = 0  # within the tenant, higher first
    deadline_at: float | None = None
    on_disconnect: OnDisconnect = "cancel"
    metadata: dict[str, str] = field(default_factory=dict)
    webhook: Webhook | None = None
    cost_seconds: float = 0.0  # of device time, as predicted when it was accepted

    fence: int = 0  # counts claims
    worker: str | None = None  # who holds the lease
    lease_until: float | None = None
    crashes: int = 0  # engines that died with it aboard
    cancel_requested: bool = False  # read by whichever server runs it

    images: tuple[StoredImage, ...] = ()  # in order of index; grows while it runs
    failure: Failure | None = None
    timings: Timings = Timings()
    progress: Progress | None = None  # as its worker last wrote it for other servers, where there are any

    @property
    def is_finished(self) -> bool:
        """Whether the status is final."""
        return self.status.is_final

    @property
    def is_news(self) -> bool:
        """Whether its webhook is to be told of the status that it has just reached.

        That it is running is told only once, however often it has to be begun again.
        """
        if self.webhook is None or self.status not in self.webhook.statuses:
            return False
        return self.is_finished or self.fence == 1

    @property
    def num_images(self) -> int:
        """Number of pictures asked for."""
        return self.request.num_images

    @property
    def is_quarantined(self) -> bool:
        """Whether it may only run alone, because two engines died with it aboard."""
        return self.crashes >= MAX_CRASHES - 1

    def claimed(self, worker: str, now: float, lease_seconds: float) -> "Job":
        """Move from queued to running, leased to `worker`."""
        self._require(JobStatus.QUEUED)
        return replace(
            self,
            status=JobStatus.RUNNING,
            worker=worker,
            lease_until=now + lease_seconds,
            fence=self.fence + 1,
            started_at=self.started_at or now,
            timings=self._waited(self.started_at or now),
        )

    def as_started(self) -> "Job":
        """Return the job as it was when it was claimed, whatever became of it."""
        return replace(
            self,
            status=JobStatus.RUNNING,
            completed_at=None,
            images=(),
            failure=None,
            timings=self._waited(self.started_at or self.created_at),
        )

    def released(self, *, crashed: bool = False) -> "Job":
        """Move from running back to queued, to be resumed from what is stored of it."""
        self._require(JobStatus.RUNNING)
        return replace(
            self,
            status=JobStatus.QUEUED,
            worker=None,
            lease_until=None,
            crashes=self.crashes + crashed,
        )

    def succeeded(self, now: float, timings: Timings | None = None) -> "Job":
        """Move from running to succeeded, with every picture stored. `timings` are those of the last one."""
        self._require(JobStatus.RUNNING)
        if len(self.images) != self.num_images:
            raise IllegalMove(f"{self.id} has {len(self.images)} of {self.num_images} pictures")
        return self._ended(JobStatus.SUCCEEDED, now, timings=timings)

    def failed(self, failure: Failure, now: float) -> "Job":
        """End the job by an error."""
        self._require(JobStatus.QUEUED, JobStatus.RUNNING)
        return self._ended(JobStatus.FAILED, now, failure=failure)

    def canceled(self, now: float) -> "Job":
        """End the job because nobody wants it any more."""
        self._require(JobStatus.QUEUED, JobStatus.RUNNING)
        return self._ended(JobStatus.CANCELED, now)

    def expired(self, now: float) -> "Job":
        """End the job because its deadline has passed."""
        self._require(JobStatus.QUEUED, JobStatus.RUNNING)
        return self._ended(JobStatus.EXPIRED, now)

    def _ended(
        self, status: JobStatus, now: float, *, failure: Failure | None = None, timings: Timings | None = None
    ) -> "Job":
        return replace(
            self,
            status=status,
            completed_at=max(now, self.created_at),
            worker=None,
            lease_until=None,
            failure=failure,
            timings=(timings or Timings()).within(now - self.created_at),
        )

    def _waited(self, until: float) -> Timings:
        return Timings().within(until - self.created_at)

    def _require(self, *allowed: JobStatus) -> None:
        if self.status not in allowed:
            raise IllegalMove(f"{self.id} is {self.status} and must be {' or '.join(allowed)} for this")
