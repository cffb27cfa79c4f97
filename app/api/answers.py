"""Answers about jobs, in the forms that all contracts share: the job itself, accepted, or one raw picture."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from fastapi import Request, Response

from app.api.deps import Services, public_base
from app.api.gateway import Exchange
from app.api.generation import read_images, require_success, wait_for_end
from app.api.prefer import Preference
from app.api.views import ImageView, JobUrls, JobView, image_view, job_view, server_timing, size_text
from app.errors import NotAcceptable
from app.jobs.job import Job, JobStatus, Progress, StoredImage
from app.jobs.store import Submitted
from app.schemas import OutputFormat

JOBS = "/api/v1/jobs"
VARY = "Accept, Prefer"
POLL_SECONDS = 1

Tell = Callable[[Job, Mapping[str, str]], Awaitable[Response]]  # an ended job and headers to an answer


@dataclass(frozen=True, slots=True)
class Call:
    """A request for pictures, and how its caller wants to be answered."""

    request: Request
    services: Services
    exchange: Exchange
    preference: Preference
    raw: OutputFormat | None  # the bytes of one picture in this format


async def answer_when_ended(
    call: Call, submitted: Submitted, tell: Tell, headers: Mapping[str, str]
) -> Response:
    """Wait for the pictures; `tell` is what a contract says of them, unless their bytes are wanted.

    A caller that does not want to wait so long is told where to ask for the job.
    """
    job, told = submitted.now, {**headers, **replayed(submitted.is_replay)}
    ended = await wait_for_end(call.request, call.services, job, call.preference)
    if ended is None:
        if call.preference.patience_seconds:  # it may have been begun since
            job = await call.services.store.get(job.id, job.tenant) or job
        return await _accepted(call, job, {**told, "X-Job-Id": job.id, "Vary": VARY})
    require_success(ended)
    told = picture_headers(ended) | told
    if call.preference.may_outlive_the_call:
        told["Preference-Applied"] = call.preference.applied
    return await (tell(ended, told) if call.raw is None else raw_picture(call.services, ended, told))


def file_url(image: StoredImage, services: Services, base: str) -> str:
    """Where the picture can be had for a while, without a key."""
    return f"{base}/files/{image.name}?{services.signer.sign(image.name)}"


def events_path(job_id: str) -> str:
    """The path of a job's events, which is also what its signature is for."""
    return f"{JOBS}/{job_id}/events"


def job_urls(job_id: str, services: Services) -> JobUrls:
    """Where to ask about a job."""
    events = events_path(job_id)
    return JobUrls(
        self=f"{JOBS}/{job_id}",
        events=f"{events}?{services.signer.sign(events)}",
        cancel=f"{JOBS}/{job_id}/cancel",
    )


async def view(
    job: Job,
    services: Services,
    exchange: Exchange,
    base: str,
    *,
    images: list[ImageView] | None = None,
    progress: Progress | None = None,
) -> JobView:
    """The job as it stands, its pictures as URLs under `base` and its progress that of now, unless given."""
    if images is None:
        images = [image_view(image, url=file_url(image, services, base)) for image in job.images]
    now, position = await _standing(job, services)
    return job_view(
        job,
        progress=progress or now,
        position=position,
        images=images,
        urls=job_urls(job.id, services),
        request_id=exchange.request_id,
        ttl_seconds=services.settings.job_ttl,
    )


async def _standing(job: Job, services: Services) -> tuple[Progress, int | None]:
    """How far a job is, and how many are before it in the queue."""
    progress = services.dispatcher.progress(job)
    if job.status != JobStatus.QUEUED:
        return progress, None
    eta_seconds = await services.dispatcher.eta_seconds(job)
    position = await services.store.position(job)
    return replace(progress, eta_seconds=eta_seconds), position or 0  # None: it was taken just now


async def _accepted(call: Call, job: Job, headers: Mapping[str, str]) -> Response:
    """202: the job goes on, and where to ask for it."""
    base = public_base(call.request, call.services.settings)
    told = await view(job, call.services, call.exchange, base)
    headers = {
        **headers,
        "Location": f"{JOBS}/{job.id}",
        "Retry-After": str(POLL_SECONDS),
        "Preference-Applied": call.preference.applied,
    }
    return Response(told.model_dump_json(), 202, headers, media_type="application/json")


async def raw_picture(services: Services, job: Job, headers: Mapping[str, str]) -> Response:
    """The bytes of the one picture of an ended job."""
    [image] = job.images
    [content] = await read_images(services, job.images)
    return Response(
        content,
        media_type=image.mime_type,
        headers={
            **headers,
            "Content-Disposition": f'inline; filename="{job.id}.{image.name.rpartition(".")[2]}"',
            "ETag": f'"{image.sha256}"',
        },
    )


def require_one(num_images: int, param: str) -> None:
    """Raw bytes hold one picture."""
    if num_images > 1:
        raise NotAcceptable(f"raw bytes hold one picture: ask for {param} = 1, or for JSON", param=param)


def picture_headers(job: Job) -> dict[str, str]:
    """What is told about the pictures of an ended job, in every form of answer."""
    headers = {
        "X-Job-Id": job.id,
        "X-Seed": ", ".join(str(image.seed) for image in job.images),
        "Vary": VARY,
        "Server-Timing": server_timing(job),
    }
    if drawn := size_text(job.images[0].resampled_from):
        headers["X-Resampled-From"] = drawn
    if job.images[0].prompt_truncated:
        headers["X-Prompt-Truncated"] = "true"
    return headers


def ignored_params(names: Iterable[str]) -> dict[str, str]:
    """Names the members of a request that mean nothing here."""
    printable = [name for name in sorted(names) if name.isascii() and name.isprintable() and len(name) <= 64]
    return {"X-Ignored-Params": ", ".join(printable)[:1000]} if printable else {}


def replayed(is_replay: bool) -> dict[str, str]:
    """Says that the answer is that of an earlier request with the same key."""
    return {"Idempotency-Replayed": "true"} if is_replay else {}
