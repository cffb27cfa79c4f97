"""OpenAI's Images contract: `/v1/images/generations` and `/v1/models`."""

import asyncio
import base64
import hashlib
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from app.api.accept import raw_format
from app.api.deps import Services, TheExchange, TheServices, authenticate, public_base, read_json_object
from app.api.description import GENERATION, GENERATION_RESPONSES, NEEDS_KEY, openai_errors
from app.api.gateway import Exchange
from app.api.generation import FinishedImage, wait_for_images, wait_for_model
from app.errors import InvalidRequest, ModelNotFound, NotAcceptable, UnsupportedParameter
from app.schemas import (
    GenerationRequest,
    ImageGenerationBody,
    ModelList,
    ModelView,
    check_size,
    choose_seeds,
    parse_image_generation,
    parse_size,
)
from app.settings import Settings
from app.storage.encoding import MIME_TYPES

router = APIRouter(prefix="/v1", tags=["OpenAI"], dependencies=[Depends(authenticate)])

QUALITIES = {
    "auto": "medium",
    "standard": "medium",
    "hd": "high",
    "xhigh": "max",
}
MODEL_ID = "stable-cascade"
PROJECT = "stable-cascade-server"
MODEL_NAMES = (MODEL_ID, "stabilityai/stable-cascade")
LISTED_ALIASES = ("dall-e-2", "dall-e-3", "gpt-image-1")

_ABSENT: tuple[object, ...] = (None, False, "", "false", [], {})

# Known members whose silent loss would give a wrong picture.
NOT_YET = ("stream", "image", "mask", "control", "loras", "image_prompts", "strength", "seeds")


@router.post(
    "/images/generations",
    operation_id="createImage",
    summary="Make pictures from a prompt",
    response_class=Response,
    responses=GENERATION_RESPONSES,
    openapi_extra=GENERATION,
)
async def create_image(
    request: Request,
    services: TheServices,
    exchange: TheExchange,
    members: Annotated[dict[str, Any], Depends(read_json_object)],
) -> Response:
    """Waits for the pictures. With `Accept: image/png` (jpeg, webp) and n = 1 the answer is the picture."""
    body = _checked(members)
    _resolve_model(body.model, services)
    await wait_for_model(services)
    generation = _translated(body, services)
    raw = raw_format(request.headers.get("accept", ""), body.output_format)
    if raw is not None:
        generation = generation.model_copy(update={"output_format": raw})
        if body.n > 1:
            raise NotAcceptable("raw bytes hold one picture: ask for n = 1, or for JSON", param="n")
    as_url = raw is None and _wants_url(body)
    base = public_base(request, services.settings) if as_url else ""  # a bad Host is refused before the work
    _describe(exchange, generation, services)

    job = services.engine.submit(generation)
    images = await wait_for_images(request, services, job)
    headers = _headers(body, images) | {"X-Job-Id": job.id}
    if raw is not None:
        headers["Content-Disposition"] = f'inline; filename="{job.id}.{raw}"'
        headers["ETag"] = f'"{hashlib.sha256(images[0].content).hexdigest()}"'
        return Response(images[0].content, media_type=MIME_TYPES[raw], headers=headers)
    loop = asyncio.get_running_loop()
    data = await asyncio.gather(
        *(
            loop.run_in_executor(services.encoders, _item, image, generation, services, base)
            for image in images
        )
    )
    answer = _answer(body, generation, images, data)
    content = await loop.run_in_executor(services.encoders, to_json, answer)
    return Response(content, media_type="application/json", headers=headers)


@router.get(
    "/models",
    operation_id="listModels",
    summary="The models served",
    responses=openai_errors(401),
    openapi_extra=NEEDS_KEY,
)
async def list_models(services: TheServices) -> ModelList:
    """One model, and with `CASCADE_LIST_ALIASES` the names that common clients insist on."""
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
    """The model of that name, which may be an alias."""
    _resolve_model(model, services)
    return ModelView(id=MODEL_ID, owned_by=_owner(services.settings))


def _owner(settings: Settings) -> str:
    """Whose weights are served: the embedded ones are this project's, a repository has its owner."""
    if settings.model == Settings.model_fields["model"].default:
        return PROJECT
    owner, slash, _ = settings.model_name.partition("/")
    return owner if slash else "unknown"


def _resolve_model(name: str | None, services: Services) -> None:
    """Accept the names of the one model that is served."""
    settings = services.settings
    if (
        name is None
        or name in MODEL_NAMES
        or name in (settings.model, settings.model_name)
        or name.startswith(settings.model_aliases)
    ):
        return
    raise ModelNotFound(f"the model {name[:100]!r} is not served here; {MODEL_ID} is", param="model")


def _checked(members: Mapping[str, Any]) -> ImageGenerationBody:
    for name in NOT_YET:
        if members.get(name) not in _ABSENT:
            raise UnsupportedParameter(f"{name} is not supported by this version", param=name)
    if members.get("background") == "transparent":
        raise UnsupportedParameter("background must be auto or opaque", param="background")
    return parse_image_generation(members)


def _translated(body: ImageGenerationBody, services: Services) -> GenerationRequest:
    """The internal request, with every default filled in and every limit checked."""
    settings = services.settings
    if body.n > settings.max_images:
        raise InvalidRequest(
            f"n must be at most {settings.max_images} on this server", param="n", code="integer_out_of_range"
        )
    sized = parse_size(body.size)
    if sized is not None:
        check_size(*sized, max_pixels=settings.max_pixels, param="size")
    native_width, native_height = sized or services.engine.model.native_size
    width, height = body.width or native_width, body.height or native_height
    check_size(width, height, max_pixels=settings.max_pixels, param="width" if body.width else "size")
    steps, decoder_steps = settings.quality_steps[QUALITIES.get(body.quality, body.quality)]
    compression = 95 if body.output_compression == 100 else max(body.output_compression, 1)
    return GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        seeds=choose_seeds(body.seed, body.n),
        prior_num_inference_steps=body.prior_num_inference_steps or steps,
        prior_guidance_scale=body.prior_guidance_scale,
        decoder_num_inference_steps=body.decoder_num_inference_steps or decoder_steps,
        decoder_guidance_scale=body.decoder_guidance_scale,
        preset=body.preset,
        sampler=body.sampler,
        output_format=body.output_format,
        output_quality=body.output_quality or compression,
        embed_metadata=body.embed_metadata,
    )


def _wants_url(body: ImageGenerationBody) -> bool:
    if body.response_format is not None:
        return body.response_format == "url"
    return (body.model or "").startswith("dall-e-")


def _describe(exchange: Exchange, generation: GenerationRequest, services: Services) -> None:
    exchange.facts.update(
        images=generation.num_images,
        size=f"{generation.width}x{generation.height}",
        steps=generation.prior_num_inference_steps,
        prompt_characters=len(generation.prompt),
    )
    if services.settings.log_prompts:
        exchange.facts["prompt"] = generation.prompt


def _headers(body: ImageGenerationBody, images: list[FinishedImage]) -> dict[str, str]:
    headers = {"X-Seed": ", ".join(str(image.seed) for image in images), "Vary": "Accept, Prefer"}
    if ignored := body.ignored:
        printable = [name for name in ignored if name.isascii() and name.isprintable() and len(name) <= 64]
        headers["X-Ignored-Params"] = ", ".join(printable)[:1000]
    if drawn := images[0].picture.resampled_from:
        headers["X-Resampled-From"] = f"{drawn[0]}x{drawn[1]}"
    if images[0].picture.prompt_truncated:
        headers["X-Prompt-Truncated"] = "true"
    return headers


def _item(
    image: FinishedImage, generation: GenerationRequest, services: Services, base: str
) -> dict[str, Any]:
    """One picture in the answer: as a signed URL under `base`, or as base64 when there is none."""
    if not base:
        return {"b64_json": base64.b64encode(image.content).decode(), "seed": image.seed}
    name = services.images.save(image.content, generation.output_format)
    return {"url": f"{base}/files/{name}?{services.signer.sign(name)}", "seed": image.seed}


def _answer(
    body: ImageGenerationBody,
    generation: GenerationRequest,
    images: list[FinishedImage],
    data: list[dict[str, Any]],
) -> dict[str, Any]:
    tokens = images[0].picture.prompt_tokens
    answer: dict[str, Any] = {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": generation.output_format,
        "quality": QUALITIES.get(body.quality, body.quality),
        "size": f"{generation.width}x{generation.height}",
        "usage": {
            "input_tokens": tokens,
            "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": tokens,
        },
    }
    if drawn := images[0].picture.resampled_from:
        answer["resampled_from"] = f"{drawn[0]}x{drawn[1]}"
    return answer
