"""The native contract: `POST /api/v1/images` and `GET /api/v1/queue`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app.api.accept import prefers_events, raw_format
from app.api.answers import (
    VARY,
    accepted,
    json_response,
    picture_headers,
    raw_picture,
    replayed,
    require_one,
    view,
)
from app.api.bodies import NativeImageBody, parse_native
from app.api.deps import (
    Services,
    TheExchange,
    TheServices,
    authenticate,
    count_request,
    public_base,
)
from app.api.description import NATIVE_GENERATION, NATIVE_RESPONSES, NEEDS_KEY, problems
from app.api.forms import read_members
from app.api.generation import (
    Order,
    guidance_members,
    picture_size,
    require_success,
    resolve_model,
    seeds_for,
    size_for,
    submit,
    wait_for_end,
    wait_for_model,
    while_waiting,
)
from app.api.idempotency import idempotency_of
from app.api.job_events import JobStream
from app.api.prefer import Preference, parse_prefer
from app.api.sources import Received, receive
from app.api.streams import respond_with_events
from app.api.views import QueueView
from app.schemas import GenerationRequest, OutputFormat

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
    """Answers with the job, a picture or events, as `Accept` has it; or at once, as `Prefer` has it."""
    body = parse_native(members)
    accept = request.headers.get("accept", "")
    is_stream = prefers_events(accept)
    preference = Preference() if is_stream else parse_prefer(request.headers.getlist("prefer"))
    raw = None if is_stream or preference.is_async else raw_format(accept, body.output_format)
    if raw is not None:
        require_one(body.num_images, "num_images_per_prompt")
    base = public_base(request, services.settings)  # a bad Host is refused before the work
    resolve_model(body.model, services)
    await wait_for_model(services)
    received = await receive(body, services, exchange.tenant)
    order = _order(body, received, raw or body.output_format, preference, request, members, services)
    submitted = await submit(services, exchange, order)
    job, said = submitted.job, replayed(submitted.is_replay)
    if is_stream:
        as_base64 = body.response_format != "url"
        stream = JobStream(services, exchange, base, as_base64, body.previews)
        events = while_waiting(services, job, stream.events(job))
        return respond_with_events(events, {"X-Job-Id": job.id, "Vary": VARY, **said}, retry=True)
    ended = await wait_for_end(request, services, job, preference)
    if ended is None:
        said |= {"X-Job-Id": job.id, "Vary": VARY}
        return await accepted(request, services, exchange, job, preference, said)
    require_success(ended)
    headers = picture_headers(ended) | said
    if preference.may_outlive_the_call:
        headers["Preference-Applied"] = preference.applied
    if raw is not None:
        return await raw_picture(services, ended, headers)
    as_base64 = body.response_format != "url"
    return await json_response(
        await view(ended, services, exchange, base, as_base64=as_base64), services, headers
    )


@router.get(
    "/queue",
    operation_id="getQueue",
    summary="How busy the server is",
    responses=problems(401),
    openapi_extra=NEEDS_KEY,
)
async def get_queue(services: TheServices) -> QueueView:
    """Jobs of all callers, in numbers."""
    counts = await services.store.counts()
    return QueueView(
        running=counts.running,
        queued=counts.queued,
        capacity=services.settings.max_queue,
        eta_seconds=await services.dispatcher.eta_seconds(),
    )


def _order(
    body: NativeImageBody,
    received: Received,
    output_format: OutputFormat,
    preference: Preference,
    request: Request,
    members: dict[str, Any],
    services: Services,
) -> Order:
    """The body with every default filled in and every limit checked."""
    seeds = seeds_for(body.seed, body.seeds, body.num_images, services, param="num_images_per_prompt")
    param, like = "width" if body.width else "height", picture_size(received)
    width, height = size_for(body.width, body.height, services, param=param, like=like)
    generation = GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        seeds=seeds,
        prior_num_inference_steps=body.prior_num_inference_steps,
        prior_guidance_scale=body.prior_guidance_scale,
        decoder_num_inference_steps=body.decoder_num_inference_steps,
        decoder_guidance_scale=body.decoder_guidance_scale,
        preset=body.preset,
        sampler=body.sampler,
        output_format=output_format,
        output_quality=body.output_quality,
        embed_metadata=body.embed_metadata,
        **guidance_members(body, received),
    )
    return Order(
        generation=generation,
        priority=body.priority,
        deadline_seconds=body.deadline_seconds,
        on_disconnect=body.on_disconnect,
        preference=preference,
        metadata=body.metadata,
        idempotency=idempotency_of(request, members, generation, services.settings.idempotency_ttl),
        received=received,
    )
