"""OpenAI's Images contract: `/v1/images/generations`, `edits` and `variations`, and `/v1/models`."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from app.api.accept import raw_format
from app.api.answers import (
    VARY,
    Call,
    answer_when_ended,
    file_url,
    ignored_params,
    replayed,
    require_one,
)
from app.api.bodies import (
    ImageEditBody,
    ImageGenerationBody,
    ImageVariationBody,
    parse_image_edit,
    parse_image_generation,
    parse_image_variation,
)
from app.api.deps import Services, TheExchange, TheServices, authenticate, count_request, public_base
from app.api.description import (
    EDIT,
    GENERATION,
    GENERATION_RESPONSES,
    NEEDS_KEY,
    VARIATION,
    openai_errors,
)
from app.api.embedding import Embedding
from app.api.forms import read_members
from app.api.gateway import Exchange
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
from app.api.openai_events import EventFamily, ImageStream, usage
from app.api.prefer import Preference, parse_prefer
from app.api.sources import Received
from app.api.streams import respond_with_events
from app.api.views import MODEL_ID, ModelList, ModelView, size_text
from app.jobs.job import Job, StoredImage
from app.jobs.store import Submitted
from app.schemas import GenerationRequest, parse_size
from app.settings import Settings

Members = Annotated[dict[str, Any], Depends(read_members)]

router = APIRouter(prefix="/v1", tags=["OpenAI"], dependencies=[Depends(authenticate)])

QUALITIES = {
    "auto": "medium",
    "standard": "medium",
    "hd": "high",
    "xhigh": "max",
}
PROJECT = "stable-cascade-server"
LISTED_ALIASES = ("dall-e-2", "dall-e-3", "gpt-image-1")


@router.post(
    "/images/generations",
    operation_id="createImage",
    dependencies=[Depends(count_request)],
    summary="Make pictures from a prompt",
    response_class=Response,
    responses=GENERATION_RESPONSES,
    openapi_extra=GENERATION,
)
async def create_image(
    request: Request,
    services: TheServices,
    exchange: TheExchange,
    members: Members,
) -> Response:
    """Wait for the pictures, or with `stream` send them as events.

    With `Accept: image/png` (jpeg, webp) and n = 1 the answer is the picture. `Prefer: respond-async` returns
    the job at once.
    """
    return await _respond(request, services, exchange, members, parse_image_generation(members))


@router.post(
    "/images/edits",
    operation_id="createImageEdit",
    dependencies=[Depends(count_request)],
    summary="Change a picture by a prompt",
    response_class=Response,
    responses=GENERATION_RESPONSES,
    openapi_extra=EDIT,
)
async def create_image_edit(
    request: Request, services: TheServices, exchange: TheExchange, members: Members
) -> Response:
    """Edit the first picture; up to 15 further ones are image prompts.

    With a `mask` (as large as the picture; its transparent, or else its white parts are repainted), or where
    the picture itself is transparent, only that area is painted, and the rest stays bit-identical. Otherwise
    the whole picture is redrawn from a noisy version of itself; a higher `strength` (default 0.75) changes
    more. The edited picture is not also an image prompt, which would work against the prompt. The answer is
    that of a generation, and the result is as large as the picture unless `size` is given.
    """
    return await _respond(request, services, exchange, members, parse_image_edit(members), "image_edit")


@router.post(
    "/images/variations",
    operation_id="createImageVariation",
    dependencies=[Depends(count_request)],
    summary="Make pictures like a picture",
    response_class=Response,
    responses=GENERATION_RESPONSES,
    openapi_extra=VARIATION,
)
async def create_image_variation(
    request: Request, services: TheServices, exchange: TheExchange, members: Members
) -> Response:
    """Use the picture as an image prompt: what it shows counts, not where. Answer as a generation does."""
    return await _respond(request, services, exchange, members, parse_image_variation(members))


async def _respond(
    request: Request,
    services: Services,
    exchange: Exchange,
    members: Mapping[str, Any],
    body: ImageGenerationBody,
    event: EventFamily = "image_generation",
) -> Response:
    """Submit the job of a checked body and answer in the form that the caller asked for."""
    call, base = _call(request, services, exchange, body)
    resolve_model(body.model, services)
    submitted = await accept(request, services, exchange, body, partial(_order, call, body, members))
    if body.stream:
        return _stream(call, submitted, body, event)

    async def tell(job: Job, headers: Mapping[str, str]) -> Response:
        embedding = Embedding()
        answer = to_json(_answer(body, job, services, base, embedding))
        return await embedding.respond(answer, services.images, services.storage, headers)

    return await answer_when_ended(call, submitted, tell, ignored_params(body.ignored))


def _call(
    request: Request, services: Services, exchange: Exchange, body: ImageGenerationBody
) -> tuple[Call, str | None]:
    """Return how the caller wants to be answered, and the base of its picture URLs (None: no URLs)."""
    if body.stream:
        return Call(request, services, exchange, Preference(), raw=None), None
    preference = parse_prefer(request.headers.getlist("prefer"))
    wanted = "" if preference.is_async else request.headers.get("accept", "")
    raw = raw_format(wanted, body.output_format)
    if raw is not None:
        require_one(body.n, "n")
    as_url = raw is None and _wants_url(body)
    base = None
    if as_url or preference.may_outlive_the_call:  # refuse a bad Host before the work
        base = public_base(request, services.settings)
    return Call(request, services, exchange, preference, raw), base if as_url else None


def _stream(call: Call, submitted: Submitted, body: ImageGenerationBody, event: EventFamily) -> Response:
    """Stream the pictures as server-sent events while they are drawn."""
    services, job = call.services, submitted.job
    stream = ImageStream(services, _quality(body), body.partial_images, event)
    headers = {
        "X-Job-Id": job.id,
        "Vary": VARY,
        **replayed(submitted.is_replay),
        **ignored_params(body.ignored),
    }
    waiting = services.dispatcher.waiting(job)
    return respond_with_events(stream.events(job), headers, services.metrics, within=waiting)


@router.get(
    "/models",
    operation_id="listModels",
    summary="The models served",
    responses=openai_errors(401),
    openapi_extra=NEEDS_KEY,
)
async def list_models(services: TheServices) -> ModelList:
    """List the one model, and with `CASCADE_LIST_ALIASES` the names that common clients insist on."""
    aliases = LISTED_ALIASES if services.settings.list_aliases else ()
    owner = _owner(services.settings)
    return ModelList(data=[ModelView(id=name, owned_by=owner) for name in (MODEL_ID, *aliases)])


@router.get(
    "/models/{model:path}",
    operation_id="retrieveModel",
    summary="One model",
    responses=openai_errors(400, 401, 404),
    openapi_extra=NEEDS_KEY,
)
async def retrieve_model(model: str, services: TheServices) -> ModelView:
    """Return the model of that name, which may be an alias."""
    resolve_model(model, services)
    return ModelView(id=MODEL_ID, owned_by=_owner(services.settings))


def _owner(settings: Settings) -> str:
    """Return the owner of the weights: this project for the embedded ones, or a repository's owner."""
    if settings.model == Settings.model_fields["model"].default:
        return PROJECT
    owner, slash, _ = settings.model_name.partition("/")
    return owner if slash else "unknown"


def _order(call: Call, body: ImageGenerationBody, members: Mapping[str, Any], received: Received) -> Order:
    """Return the order, with all defaults filled in and all limits checked."""
    services = call.services
    seeds = seeds_for(body.seed, body.seeds, body.n, services, param="n")
    width, height = _size(body, received, services)
    steps, decoder_steps = services.settings.quality_steps[_quality(body)]
    compression = 95 if body.output_compression == 100 else max(body.output_compression, 1)
    generation = GenerationRequest(
        width=width,
        height=height,
        seeds=seeds,
        prior_num_inference_steps=body.prior_num_inference_steps or steps,
        decoder_num_inference_steps=body.decoder_num_inference_steps or decoder_steps,
        output_format=call.raw or body.output_format,
        output_quality=body.output_quality or compression,
        **shared_members(body, received),
    )
    return Order(
        generation=generation,
        body=body,
        preference=call.preference,
        received=received,
        idempotency=idempotency_of(call.request, members, generation, services.settings.key_ttl),
    )


def _size(body: ImageGenerationBody, received: Received, services: Services) -> tuple[int, int]:
    """Return `size`, overridden by `width` and `height`; `auto` is that of an input picture, or native."""
    sized = parse_size(body.size)
    if sized is not None:
        size_for(*sized, services, param="size")
    width, height = sized or (None, None)
    param = "width" if body.width else "height" if body.height else "size"
    like = received.prompt_size if isinstance(body, ImageVariationBody) else picture_size(received)
    return size_for(body.width or width, body.height or height, services, param=param, like=like)


def _quality(body: ImageGenerationBody) -> str:
    return QUALITIES.get(body.quality, body.quality)


def _wants_url(body: ImageGenerationBody) -> bool:
    if body.response_format is not None:
        return body.response_format == "url"
    return (body.model or "").startswith("dall-e-")


def _wants_base64(body: ImageGenerationBody) -> bool:
    """Return whether to send base64. Edits without `response_format` always get it: clients differ."""
    is_edited = isinstance(body, ImageEditBody | ImageVariationBody)
    return not _wants_url(body) or (is_edited and body.response_format is None)


def _data(
    image: StoredImage, services: Services, base: str | None, embedding: Embedding | None
) -> dict[str, Any]:
    """Return one picture of the answer: a signed URL if there is a `base`, base64 if an `embedding`."""
    data: dict[str, Any] = {"seed": image.seed}
    if base is not None:
        data["url"] = file_url(image, services, base)
    if embedding is not None:
        data["b64_json"] = embedding.base64_of(image)
    return data


def _answer(
    body: ImageGenerationBody, job: Job, services: Services, base: str | None, embedding: Embedding
) -> dict[str, Any]:
    """Return the whole answer."""
    generation, first = job.request, job.images[0]
    pictures = embedding if _wants_base64(body) else None
    answer: dict[str, Any] = {
        "created": int(job.completed_at or job.created_at),
        "data": [_data(image, services, base, pictures) for image in job.images],
        "background": "opaque",
        "output_format": generation.output_format,
        "quality": _quality(body),
        "size": f"{generation.width}x{generation.height}",
        "usage": usage(first.prompt_tokens),
    }
    if drawn := size_text(first.resampled_from):
        answer["resampled_from"] = drawn
    return answer
