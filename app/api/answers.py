"""Answers about jobs that all contracts share: the job itself, 202 Accepted, or one raw picture."""

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

Tell = Callable[[Job, Mapping[str, str]], Awaitable[Response]]  # (ended job, headers) -> answer


@dataclass(frozen=True, slots=True)
class Call:
    """A request for pictures, and how its caller wants to be answered."""

    request: Request
    services: Services
    exchange: Exchange
    preference: Preference
    raw: OutputFormat | None  # format of a raw picture, if that is the answer


async def answer_when_ended(
    call: Call, submitted: Submitted, tell: Tell, headers: Mapping[str, str]
) -> Response:
    """Wait for the pictures and answer with `tell`, or with the bytes of one if the caller wants those.

    A caller that prefers not to wait so long gets 202 and the URL of the job.
    """
    job, told = submitted.now, {**headers, **replayed(submitted.is_replay)}
    ended = await wait_for_end(call.request, call.services, job, call.preference)
    if ended is None:
        if call.preference.patience_seconds:  # it may have started meanwhile
            job = await call.services.store.get(job.id, job.tenant) or job
        return await _accepted(call, job, {**told, "X-Job-Id": job.id, "Vary": VARY})
    require_success(ended)
    told = picture_headers(ended) | told
    if call.preference.may_outlive_the_call:
        told["Preference-Applied"] = call.preference.applied
    return await (tell(ended, told) if call.raw is None else raw_picture(call.services, ended, told))


def file_url(image: StoredImage, services: Services, base: str) -> str:
    """Return a signed URL of the picture, which works for a while without a key."""
    return f"{base}/files/{image.name}?{services.signer.sign(image.name)}"


def events_path(job_id: str) -> str:
    """Return the path of a job's events, which is also the text that is signed."""
    return f"{JOBS}/{job_id}/events"


def job_urls(job_id: str, services: Services) -> JobUrls:
    """Return the URLs of a job."""
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
    """Return the view of a job, by default with picture URLs under `base` and its current progress."""
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
    """Return the progress of a job, and how many are ahead of it in the queue."""
    progress = services.dispatcher.progress(job)
    if job.status != JobStatus.QUEUED:
        return progress, None
    eta_seconds = await services.dispatcher.eta_seconds(job)
    position = await services.store.position(job)
    return replace(progress, eta_seconds=eta_seconds), position or 0  # None: it has just been claimed


async def _accepted(call: Call, job: Job, headers: Mapping[str, str]) -> Response:
    """Answer 202 with the job, which goes on, and its URL."""
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
    """Answer with the bytes of the one picture of an ended job."""
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
    """Raise NotAcceptable for more than one picture as raw bytes."""
    if num_images > 1:
        raise NotAcceptable(f"raw bytes hold one picture: ask for {param} = 1, or for JSON", param=param)


def picture_headers(job: Job) -> dict[str, str]:
    """Return the headers about the pictures of an ended job, which every form of answer has."""
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
    """Return the header that names the ignored members of a request."""
    printable = [name for name in sorted(names) if name.isascii() and name.isprintable() and len(name) <= 64]
    return {"X-Ignored-Params": ", ".join(printable)[:1000]} if printable else {}


def replayed(is_replay: bool) -> dict[str, str]:
    """Return the header that says that an earlier request with the same key is answered again."""
    return {"Idempotency-Replayed": "true"} if is_replay else {}
