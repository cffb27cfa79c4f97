"""Code shared by all contracts: from a checked request to a job, and from the job to its files.

The dispatcher counts the callers that wait for a job; when the last one leaves, the job is canceled, unless
it is to finish without them.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from app.api.bodies import GenerationMembers
from app.api.deps import Services
from app.api.gateway import Exchange
from app.api.idempotency import read_key
from app.api.prefer import Preference
from app.api.sources import Received, receive
from app.api.views import MODEL_ID
from app.errors import (
    AppError,
    Canceled,
    ClientGone,
    InvalidRequest,
    JobFailed,
    ModelNotFound,
    StorageFull,
    TimedOut,
    UnsupportedParameter,
)
from app.jobs.job import Job, JobStatus, StoredImage, Webhook
from app.jobs.keys import Idempotency
from app.jobs.store import Submitted
from app.schemas import (
    SIDE_STEP,
    GenerationRequest,
    LoRA,
    PictureRef,
    check_size,
    choose_seeds,
    fit_size,
    other_side,
)

MODEL_NAMES = (MODEL_ID, "stabilityai/stable-cascade")
SUPER_RESOLUTION = 2  # default factor from the sides of the picture to those of the result


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A checked request, and how its job is to be treated."""

    generation: GenerationRequest
    body: GenerationMembers  # for priority, deadline and disconnect behaviour
    preference: Preference
    received: Received
    idempotency: Idempotency | None
    metadata: dict[str, str] = field(default_factory=dict)
    webhook: Webhook | None = None


def resolve_model(name: str | None, services: Services) -> None:
    """Accept the names of the one model that is served. Raises ModelNotFound for others."""
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
    """Return the seed of each picture. Raises InvalidRequest for more pictures than allowed."""
    most = services.settings.max_images
    if num_images > most:
        raise InvalidRequest(
            f"{param} must be at most {most} on this server, not {num_images}",
            param=param,
            code="integer_out_of_range",
        )
    return tuple(seeds) if seeds is not None else choose_seeds(seed, num_images)


def size_for(
    width: int | None,
    height: int | None,
    services: Services,
    *,
    param: str,
    like: tuple[int, int] | None = None,
    step: int = SIDE_STEP,
) -> tuple[int, int]:
    """Return width and height. Raises InvalidRequest for sides beyond the limits or no multiples of `step`.

    Absent sides are those of the native size, or of a picture of size `like`, scaled to fit the limits; a
    single absent side keeps the proportions of `like`.
    """
    model, most = services.dispatcher.model, services.settings.max_pixels
    if like is None:
        size = (
            model.native_width if width is None else width,
            model.native_height if height is None else height,
        )
    elif width is None and height is None:
        size = fit_size(*like, max_pixels=most, step=step)
    else:
        size = (
            other_side(height or 0, like[0] / like[1], step) if width is None else width,
            other_side(width or 0, like[1] / like[0], step) if height is None else height,
        )
    check_size(*size, max_pixels=most, param=param, step=step)
    return size


def picture_size(received: Received) -> tuple[int, int] | None:
    """Return the default size of a result: that of the input picture, or else by the control picture."""
    if received.image is not None:
        return received.image.width, received.image.height
    if received.control is None:
        return None
    factor = SUPER_RESOLUTION if received.control.type == "super_resolution" else 1
    return received.control.image.width * factor, received.control.image.height * factor


async def check_abilities(generation: GenerationRequest, services: Services) -> None:
    """Refuse a request that the installed networks and files cannot serve, before anything is queued."""
    model = services.dispatcher.model
    if generation.anchor is not None and generation.image is not None:
        _check_canvas(generation, generation.image)
    if generation.image is not None and not model.reads_pictures:
        message = "image needs an encoder of pictures, which this model lacks"
        raise UnsupportedParameter(message, param="image")
    if generation.image_prompts and not model.reads_image_prompts:
        message = "image_prompts need a vision tower, which this model lacks"
        raise UnsupportedParameter(message, param="image_prompts")
    control = generation.control
    if control is not None and control.type not in model.controls:
        installed = ", ".join(model.controls) or "none"
        message = f"control {control.type} is not installed; installed are: {installed}"
        raise UnsupportedParameter(message, param="control", places=[("/control/type", message)])
    if generation.loras:
        await _check_loras(generation.loras, services, model.lora_dirs)


async def _check_loras(loras: Sequence[LoRA], services: Services, folders: Sequence[str]) -> None:
    loop = asyncio.get_running_loop()
    names = await loop.run_in_executor(services.storage, services.loras.names, folders)
    for number, lora in enumerate(loras):
        if lora.name not in names:
            message = f"loras: there is no {lora.name[:100]!r}; installed are: {', '.join(names) or 'none'}"
            raise InvalidRequest(message, param="loras", places=[(f"/loras/{number}/name", message)])


def _check_canvas(generation: GenerationRequest, image: PictureRef) -> None:
    canvas, size = (generation.width, generation.height), (image.width, image.height)
    if canvas == size or canvas[0] < size[0] or canvas[1] < size[1]:
        sizes = f"the image is {size[0]}x{size[1]}, the canvas {canvas[0]}x{canvas[1]}"
        raise InvalidRequest(
            f"anchor needs width and height beyond those of the image: {sizes}", param="anchor"
        )


def shared_members(body: GenerationMembers, received: Received) -> dict[str, Any]:
    """Return the members of a GenerationRequest that mean the same in every contract."""
    return {
        **received.members(),
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "prior_guidance_scale": body.prior_guidance_scale,
        "decoder_guidance_scale": body.decoder_guidance_scale,
        "preset": body.preset,
        "sampler": body.sampler,
        "embed_metadata": body.embed_metadata,
        "strength": body.strength,
        "feather": body.feather,
        "anchor": body.anchor,
        "loras": tuple(body.loras),
        "guidance_interval": body.guidance_interval,
        "weighted_prompt": body.weighted_prompt,
        "long_prompt": body.long_prompt,
    }


async def wait_for_model(services: Services) -> None:
    """Wait some time for a model that is still loading, so that early callers need not retry.

    It may not be loaded after that: `dispatcher.model` raises then.
    """
    await services.dispatcher.wait_loaded(services.settings.loading_wait)


async def accept(
    request: Request,
    services: Services,
    exchange: Exchange,
    body: GenerationMembers,
    order_of: Callable[[Received], Order],
) -> Submitted:
    """Wait for the model, read the pictures of `body`, and submit the order that `order_of` makes of them."""
    await wait_for_model(services)
    may_replay = read_key(request) is not None
    received = await receive(body, services, exchange.tenant, may_replay=may_replay)
    return await submit(services, exchange, order_of(received))


async def submit(services: Services, exchange: Exchange, order: Order) -> Submitted:
    """Commit the job of `order`, or find the one that its idempotency key stands for.

    Its input pictures are on disk before it is committed.
    """
    generation, body = order.generation, order.body
    await check_abilities(generation, services)
    exchange.facts.update(
        images=generation.num_images,
        size=f"{generation.width}x{generation.height}",
        steps=generation.prior_num_inference_steps,
        prompt_characters=len(generation.prompt),
        **({"pictures": len(generation.input_names)} if generation.input_names else {}),
    )
    if services.settings.log_prompts:
        exchange.facts["prompt"] = generation.prompt
    now = services.clock()
    job = Job(
        tenant=exchange.tenant,
        request=generation,
        created_at=now,
        priority=body.priority,
        deadline_at=None if body.deadline_seconds is None else now + body.deadline_seconds,
        on_disconnect="finish" if order.preference.is_async or order.webhook else body.on_disconnect,
        metadata=order.metadata,
        webhook=order.webhook,
    )
    await order.received.keep(services)
    submitted = await services.dispatcher.submit(job, order.idempotency)
    exchange.facts["job"] = submitted.job.id
    exchange.headers["X-Job-Id"] = submitted.job.id  # on errors, too: the job may be fetched later
    return submitted


async def wait_for_end(request: Request, services: Services, job: Job, preference: Preference) -> Job | None:
    """Return the ended job, or None when it goes on and its caller prefers not to wait any longer.

    Raises ClientGone when the caller disconnects, TimedOut after the server's own limit, and StorageFull when
    the job cannot go on until there is disk space.
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
                if preference.may_outlive_the_call and isinstance(ended.exception(), StorageFull):
                    return None
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
    """Return when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_success(job: Job) -> None:
    """Raise the error of an ended job that did not succeed."""
    if error := outcome_error(job):
        raise error


def outcome_error(job: Job) -> AppError | None:
    """Return the error of an ended job, or None if it succeeded."""
    if job.failure is not None:
        return JobFailed(job.failure.message, status=job.failure.status, code=job.failure.code)
    if job.status == JobStatus.CANCELED:
        return Canceled("the job was canceled before the picture was ready")
    if job.status == JobStatus.EXPIRED:
        return TimedOut("the deadline passed before the picture was ready")
    return None


async def read_images(services: Services, images: tuple[StoredImage, ...]) -> list[bytes]:
    """Read the files of `images`."""
    loop = asyncio.get_running_loop()
    reads = [loop.run_in_executor(services.storage, services.images.read, image.name) for image in images]
    return list(await asyncio.gather(*reads))
