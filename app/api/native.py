"""The native contract: `POST /api/v1/images` and `GET /api/v1/queue`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app.api.accept import prefers_events, raw_format
from app.api.answers import VARY, Call, answer_when_ended, replayed, require_one, view
from app.api.bodies import NativeImageBody, parse_native
from app.api.deps import TheExchange, TheServices, authenticate, count_request, public_base
from app.api.description import NATIVE_GENERATION, NATIVE_RESPONSES, NEEDS_KEY, problems
from app.api.embedding import Embedding
from app.api.forms import read_members
from app.api.generation import (
    Order,
    accept,
    picture_size,
    resolve_model,
    seeds_for,
    shared_members,
    size_for,
)
from app.api.idempotency import idempotency_of
from app.api.job_events import JobStream
from app.api.prefer import Preference, parse_prefer
from app.api.sources import Received
from app.api.streams import respond_with_events
from app.api.views import QueueView, image_view
from app.api.webhooks import check_receiver
from app.jobs.job import Job
from app.jobs.store import Submitted
from app.schemas import GenerationRequest

router = APIRouter(prefix="/api/v1", tags=["Native"], dependencies=[Depends(authenticate)])


@router.post(
    "/images",
    operation_id="generateImages",
    dependencies=[Depends(count_request)],
    summary="Make pictures from a prompt",
    response_class=Response,
    responses=NATIVE_RESPONSES,
    openapi_extra=NATIVE_GENERATION,
)
async def generate_images(
    request: Request,
    services: TheServices,
    exchange: TheExchange,
    members: Annotated[dict[str, Any], Depends(read_members)],
) -> Response:
    """Answer with the job, a picture or events, as `Accept` says; or at once, if `Prefer` says so."""
    body = parse_native(members)
    wanted = request.headers.get("accept", "")
    is_stream = prefers_events(wanted)
    preference = Preference() if is_stream else parse_prefer(request.headers.getlist("prefer"))
    if body.webhook is not None and not is_stream:
        preference = replace(preference, is_async=True)
    raw = None if is_stream or preference.is_async else raw_format(wanted, body.output_format)
    if raw is not None:
        require_one(body.num_images, "num_images_per_prompt")
    base = public_base(request, services.settings)  # refuse a bad Host before the work
    resolve_model(body.model, services)
    if body.webhook is not None:
        check_receiver(body.webhook, services)
    call = Call(request, services, exchange, preference, raw)
    submitted = await accept(request, services, exchange, body, partial(_order, call, body, members, base))
    if is_stream:
        return _stream(call, submitted, base, as_base64=body.response_format != "url")

    async def tell(job: Job, headers: Mapping[str, str]) -> Response:
        embedding = Embedding()
        images = None  # as URLs
        if body.response_format != "url":
            images = [image_view(image, in_base64=embedding.base64_of(image)) for image in job.images]
        told = await view(job, services, exchange, base, images=images)
        text = told.model_dump_json().encode()
        return await embedding.respond(text, services.images, services.storage, headers)

    return await answer_when_ended(call, submitted, tell, {})


def _stream(call: Call, submitted: Submitted, base: str, *, as_base64: bool) -> Response:
    """Stream the events of a job from its beginning to its end."""
    services, job = call.services, submitted.job
    stream = JobStream(services, call.exchange, base, as_base64)
    headers = {"X-Job-Id": job.id, "Vary": VARY, **replayed(submitted.is_replay)}
    waiting = services.dispatcher.waiting(job)
    return respond_with_events(stream.events(job), headers, services.metrics, retry=True, within=waiting)


@router.get(
    "/queue",
    operation_id="getQueue",
    summary="How busy the server is",
    responses=problems(401),
    openapi_extra=NEEDS_KEY,
)
async def get_queue(services: TheServices) -> QueueView:
    """Count the jobs of all callers."""
    counts = await services.store.counts()
    return QueueView(
        running=counts.running,
        queued=counts.queued,
        capacity=services.settings.max_queue,
        eta_seconds=await services.dispatcher.eta_seconds(),
    )


def _order(
    call: Call, body: NativeImageBody, members: Mapping[str, Any], base: str, received: Received
) -> Order:
    """Return the order, with all defaults filled in and all limits checked."""
    services = call.services
    seeds = seeds_for(body.seed, body.seeds, body.num_images, services, param="num_images_per_prompt")
    param, like = "width" if body.width else "height", picture_size(received)
    width, height = size_for(body.width, body.height, services, param=param, like=like)
    generation = GenerationRequest(
        width=width,
        height=height,
        seeds=seeds,
        prior_num_inference_steps=body.prior_num_inference_steps,
        decoder_num_inference_steps=body.decoder_num_inference_steps,
        output_format=call.raw or body.output_format,
        output_quality=body.output_quality,
        previews=body.previews,
        **shared_members(body, received),
    )
    return Order(
        generation=generation,
        body=body,
        preference=call.preference,
        received=received,
        idempotency=idempotency_of(call.request, members, generation, services.settings.key_ttl),
        metadata=body.metadata,
        webhook=None if body.webhook is None else body.webhook.target(base),
    )
