"""Jobs, pictures and models as callers see them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, WithJsonSchema

from app.api.failures import Problem
from app.jobs.job import Job, JobStatus, Progress, StoredImage
from app.schemas import GenerationRequest

MODEL_ID = "stable-cascade"


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _is_none(value: object) -> bool:
    return value is None


Moment = Annotated[
    datetime,
    PlainSerializer(_iso, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Seconds = Annotated[float, PlainSerializer(lambda seconds: round(seconds, 3), return_type=float)]


class ModelView(BaseModel):
    """A model as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 1707868800  # the day of the release of Stable Cascade
    owned_by: str


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelView]


class ImageView(BaseModel):
    """A finished picture, as a signed URL or as base64. Members that do not apply are left out."""

    index: int
    seed: int = Field(description="Asked for alone it gives this picture again")
    width: int
    height: int
    mime_type: str
    bytes: int
    sha256: str
    url: str | None = Field(None, exclude_if=_is_none, description="Works without a key, for a while")
    b64_json: str | None = Field(None, exclude_if=_is_none, description="The file in base64")
    resampled_from: str | None = Field(
        None, exclude_if=_is_none, description="The size drawn, when it is not the size asked for"
    )
    prompt_truncated: bool | None = Field(
        None, exclude_if=_is_none, description="Whether the model saw a part of the prompt only"
    )


class ProgressView(BaseModel):
    """Progress of a job. The fraction never falls."""

    fraction: Seconds = Field(description="Of the work of the whole job, 0 to 1")
    stage: Literal["queued", "loading", "prior", "decoder", "encode", "done"] = Field(
        description="Of the picture that is least far, as are the steps"
    )
    step: int
    steps: int
    eta_seconds: Seconds | None


class TimingsView(BaseModel):
    """Seconds that a job spent in each phase, by its last picture. Together they are the whole time."""

    queued: Seconds = Field(description="Until the first step of that picture, and what a crash undid")
    prior: Seconds = Field(description="In Stage C, waits between its steps included")
    decoder: Seconds = Field(description="In Stage B, likewise")
    encode: Seconds = Field(description="In Stage A, to a file, into storage")


class JobUrls(BaseModel):
    """URLs of a job."""

    self: str
    events: str = Field(description="Signed: works without a key, for a while")
    cancel: str


class JobView(BaseModel):
    """A job."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: JobStatus
    model: str = MODEL_ID
    created_at: Moment
    started_at: Moment | None
    completed_at: Moment | None
    expires_at: Moment | None
    progress: ProgressView
    queue_position: int | None
    images: list[ImageView]
    error: Problem | None
    timings: TimingsView
    request: dict[str, Any] = Field(description="The request with its defaults; sent again it gives the same")
    metadata: dict[str, str]
    urls: JobUrls


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    has_more: bool
    next_cursor: str | None


class QueueView(BaseModel):
    """How busy the server is."""

    running: int
    queued: int
    capacity: int = Field(description="How many may wait")
    eta_seconds: Seconds = Field(description="When the work of now should be done")


def image_view(image: StoredImage, *, url: str | None = None, in_base64: str | None = None) -> ImageView:
    """Return the view of a picture, with its `url` or its content `in_base64`."""
    return ImageView(
        index=image.index,
        seed=image.seed,
        width=image.width,
        height=image.height,
        mime_type=image.mime_type,
        bytes=image.num_bytes,
        sha256=image.sha256,
        url=url,
        b64_json=in_base64,
        resampled_from=size_text(image.resampled_from),
        prompt_truncated=image.prompt_truncated or None,
    )


def size_text(size: tuple[int, int] | None) -> str | None:
    """Format a size as `WIDTHxHEIGHT`."""
    return f"{size[0]}x{size[1]}" if size else None


def progress_view(progress: Progress) -> ProgressView:
    """Return the view of a job's progress."""
    return ProgressView(
        fraction=progress.fraction,
        stage=progress.stage,
        step=progress.step,
        steps=progress.steps,
        eta_seconds=progress.eta_seconds,
    )


def job_view(
    job: Job,
    *,
    progress: Progress,
    position: int | None,
    images: list[ImageView],
    urls: JobUrls,
    request_id: str,
    ttl_seconds: float,
) -> JobView:
    """Return the view of a job."""
    return JobView(
        id=job.id,
        status=job.status,
        created_at=_moment(job.created_at),
        started_at=_optional_moment(job.started_at),
        completed_at=_optional_moment(job.completed_at),
        expires_at=_optional_moment(job.completed_at, ttl_seconds),
        progress=progress_view(progress),
        queue_position=position,
        images=images,
        error=_problem(job, request_id),
        timings=TimingsView(
            queued=job.timings.queued,
            prior=job.timings.prior,
            decoder=job.timings.decoder,
            encode=job.timings.encode,
        ),
        request=request_members(job.request),
        metadata=job.metadata,
        urls=urls,
    )


def request_members(request: GenerationRequest) -> dict[str, Any]:
    """Return the native body that makes the same pictures."""
    members = request.model_dump(exclude={"seeds"})
    first = request.seeds[0]
    follow = tuple((first + i) % 2**32 for i in range(request.num_images))
    members["num_images_per_prompt"] = request.num_images
    if request.seeds == follow:
        members["seed"] = first
    else:
        members["seeds"] = list(request.seeds)
    return members


def _problem(job: Job, request_id: str) -> Problem | None:
    failure = job.failure
    if failure is None:
        return None
    return Problem(
        type="about:blank",
        title="Generation failed",
        status=failure.status,
        detail=failure.message,
        instance=f"/api/v1/jobs/{job.id}",
        code=failure.code,
        request_id=request_id,
    )


def server_timing(job: Job) -> str:
    """Return the `Server-Timing` of an answer that waited for `job`, in milliseconds."""
    spans: Mapping[str, float] = {
        "queued": job.timings.queued,
        "prior": job.timings.prior,
        "decoder": job.timings.decoder,
        "encode": job.timings.encode,
    }
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in spans.items())


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _optional_moment(seconds: float | None, later: float = 0.0) -> datetime | None:
    return None if seconds is None else _moment(seconds + later)
