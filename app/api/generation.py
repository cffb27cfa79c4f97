"""What all contracts share: from a checked request to a job, and from the job to its files.

A caller who waits is counted by the dispatcher as long as it does; when the last one leaves, the work on a
job that nobody could fetch later is dropped.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from app.api.deps import Services
from app.api.gateway import Exchange
from app.api.prefer import Preference
from app.api.views import MODEL_ID
from app.errors import AppError, Canceled, ClientGone, InvalidRequest, JobFailed, ModelNotFound, TimedOut
from app.jobs.job import Job, JobStatus, OnDisconnect, StoredImage
from app.jobs.keys import Idempotency
from app.jobs.store import Submitted
from app.schemas import GenerationRequest, check_size, choose_seeds

MODEL_NAMES = (MODEL_ID, "stabilityai/stable-cascade")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A checked request, and how its job is to be treated."""

    generation: GenerationRequest
    priority: int
    deadline_seconds: int | None
    on_disconnect: OnDisconnect
    preference: Preference
    metadata: dict[str, str] = field(default_factory=dict)
    idempotency: Idempotency | None = None


def resolve_model(name: str | None, services: Services) -> None:
    """Accept the names of the one model that is served; raises ModelNotFound for others."""
    settings = services.settings
    if (
        name is None
        or name in MODEL_NAMES
        or name in (settings.model, settings.model_name)
        or name.startswith(settings.model_aliases)
    ):
        return
    raise ModelNotFound(f"the model {name[:100]!r} is not served here; {MODEL_ID} is", param="model")


def seeds_for(
    seed: int | None, seeds: list[int] | None, num_images: int, services: Services, *, param: str
) -> tuple[int, ...]:
    """The seed of each picture; refuses more pictures than the operator allows."""
    most = services.settings.max_images
    if num_images > most:
        raise InvalidRequest(
            f"{param} must be at most {most} on this server, not {num_images}",
            param=param,
            code="integer_out_of_range",
        )
    return tuple(seeds) if seeds is not None else choose_seeds(seed, num_images)


def size_for(width: int | None, height: int | None, services: Services, *, param: str) -> tuple[int, int]:
    """The sides asked for, those of the native size where they are absent, all within the limits."""
    model = services.dispatcher.model
    size = (width or model.native_width, height or model.native_height)
    check_size(*size, max_pixels=services.settings.max_pixels, param=param)
    return size


async def wait_for_model(services: Services) -> None:
    """Give a model that is still loading some time: a caller right after the start need not ask again.

    Whether there is one, whoever needs it finds out from the dispatcher.
    """
    await services.dispatcher.wait_loaded(services.settings.loading_wait)


async def submit(services: Services, exchange: Exchange, order: Order) -> Submitted:
    """Commit the job of `order`, or find the one that its idempotency key stands for."""
    generation = order.generation
    exchange.facts.update(
        images=generation.num_images,
        size=f"{generation.width}x{generation.height}",
        steps=generation.prior_num_inference_steps,
        prompt_characters=len(generation.prompt),
    )
    if services.settings.log_prompts:
        exchange.facts["prompt"] = generation.prompt
    now = services.clock()
    job = Job(
        tenant=exchange.tenant,
        request=generation,
        created_at=now,
        priority=order.priority,
        deadline_at=None if order.deadline_seconds is None else now + order.deadline_seconds,
        on_disconnect="finish" if order.preference.is_async else order.on_disconnect,
        metadata=order.metadata,
    )
    submitted = await services.dispatcher.submit(job, order.idempotency)
    exchange.facts["job"] = submitted.job.id
    return submitted


async def wait_for_end(request: Request, services: Services, job: Job, preference: Preference) -> Job | None:
    """The ended job; None when it goes on and its caller does not want to wait any more.

    Raises ClientGone when the caller leaves, TimedOut when the server's own patience is over.
    """
    dispatcher, most = services.dispatcher, services.settings.sync_timeout
    if preference.may_outlive_the_call and not preference.patience_seconds:
        dispatcher.detach(job.id)
        return None
    seconds = min(preference.patience_seconds or most, most)
    with dispatcher.waiting(job):
        ended = asyncio.ensure_future(dispatcher.wait(job.id))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            either: set[asyncio.Future[Any]] = {ended, gone}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                services.tracing.ended(ended.result())
                return ended.result()
            if gone.done():
                raise ClientGone("the caller left before the picture was ready")
            if preference.may_outlive_the_call:
                dispatcher.detach(job.id)
                return None
            raise TimedOut(f"the picture was not ready within {most:g} seconds; ask for less of it")
        finally:
            gone.cancel()
            ended.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_success(job: Job) -> None:
    """Raise what a caller is told who waited for pictures and gets none."""
    if error := outcome_error(job):
        raise error


def outcome_error(job: Job) -> AppError | None:
    """Why an ended job has no pictures; None when it has."""
    if job.failure is not None:
        return JobFailed(job.failure.message, status=job.failure.status, code=job.failure.code)
    if job.status == JobStatus.CANCELED:
        return Canceled("the job was canceled before the picture was ready")
    if job.status == JobStatus.EXPIRED:
        return TimedOut("the deadline passed before the picture was ready")
    return None


async def while_waiting(
    services: Services, job: Job, events: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """`events`, for a caller who counts as waiting for the job as long as they are sent."""
    with services.dispatcher.waiting(job):
        async with aclosing(events):
            async for event in events:
                yield event


async def read_images(services: Services, images: tuple[StoredImage, ...]) -> list[bytes]:
    """The files of `images`."""
    loop = asyncio.get_running_loop()
    reads = [loop.run_in_executor(services.encoders, services.images.read, image.name) for image in images]
    return list(await asyncio.gather(*reads))
