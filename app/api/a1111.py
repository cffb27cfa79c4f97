"""AUTOMATIC1111's contract: `/sdapi/v1/txt2img` and `img2img`.

Settings that this model does not have are accepted and ignored, because clients send every field of their
forms.
"""

import asyncio
import math
import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from app.api.answers import ignored_params, picture_headers, replayed
from app.api.deps import Services, TheExchange, TheServices, authenticate, count_request, read_json_object
from app.api.description import A1111_RESPONSES, a1111_body
from app.api.embedding import Embedding
from app.api.examples import PICTURE
from app.api.gateway import Exchange
from app.api.generation import require_success, wait_for_model
from app.api.idempotency import read_key
from app.api.layers import Asked, Drawn, draw, in_native_members
from app.api.mistakes import validated
from app.api.sources import Picture, Source, mask_like
from app.api.values import printable
from app.api.views import MODEL_ID
from app.errors import InvalidRequest, TooManyPictures
from app.jobs.job import Job, JobStatus
from app.schemas import AnySide, Feather, Number, Prompt, Seed, Share

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], dependencies=[Depends(authenticate)])

LAYER = "sdapi"  # value of `api` in the metadata of this layer's jobs
MOST_STEPS, MOST_GUIDANCE = 100, 20.0  # A1111's forms allow more; larger values are clamped to these
SAMPLERS = {"DDPM": "ddpm", "DDIM": "ddim"}

_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?(?::[^<>]*)?>")
_MANY = 1000  # larger factors are refused before their product is quoted in an error


class TextToImage(BaseModel):
    """Body of `txt2img`. Members that are not listed are ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    prompt: Prompt = Field(
        "", description="Not blank, but for `img2img`; `<lora:NAME:0.8>` uses an installed LoRA"
    )
    negative_prompt: Prompt = ""
    width: AnySide = 512
    height: AnySide = 512
    seed: Seed = Field(-1, description="-1: random. Picture i uses seed + i")
    steps: Annotated[int, Field(ge=1), Number] = Field(20, description="Of the prior; more than 100 are 100")
    cfg_scale: Annotated[float, Field(ge=0), Number] = Field(
        4.0, description="Guidance of the prior; more than 20 is 20"
    )
    batch_size: Annotated[int, Field(ge=1, le=_MANY), Number] = 1
    n_iter: Annotated[int, Field(ge=1, le=_MANY), Number] = Field(
        1, description="`batch_size` times as many pictures"
    )
    sampler_name: str = Field("DDPM", description="Those that are not among `samplers` mean DDPM")
    override_settings: dict[str, Any] = Field(
        {}, description="`decoder_steps` and `decoder_guidance_scale` count, others are ignored"
    )
    send_images: bool = True
    force_task_id: str = Field(
        "", max_length=256, description="`state.job` of `progress` while this is drawn"
    )


class ImageToImage(TextToImage):
    """Body of `img2img`. Members that are not listed are ignored."""

    init_images: Annotated[list[Picture], Field(min_length=1)] = Field(description="The first one counts")
    denoising_strength: Share = 0.75
    mask: Picture | None = Field(None, description="White is painted anew")
    inpainting_mask_invert: bool = Field(False, description="Black is painted anew")
    mask_blur: Feather = Field(0, description="Pixels over which the new part fades into the old")


@router.post(
    "/txt2img",
    operation_id="a1111TextToImage",
    dependencies=[Depends(count_request)],
    summary="Make pictures from a prompt",
    response_class=Response,
    responses=A1111_RESPONSES,
    openapi_extra=a1111_body(TextToImage, {"prompt": "a red circle on a blue background", "seed": 7}),
)
async def text_to_image(request: Request, services: TheServices, exchange: TheExchange) -> Response:
    """Return PNG in base64, and `info`, which is JSON as a string."""
    members = await read_json_object(request, services)
    body = validated(TextToImage, _present(members), {})
    return await _respond(request, services, exchange, members, body, {})


@router.post(
    "/img2img",
    operation_id="a1111ImageToImage",
    dependencies=[Depends(count_request)],
    summary="Make pictures from a picture",
    response_class=Response,
    responses=A1111_RESPONSES,
    openapi_extra=a1111_body(
        ImageToImage,
        {"init_images": [PICTURE], "prompt": "a red star on a blue background", "denoising_strength": 0.6},
    ),
)
async def image_to_image(request: Request, services: TheServices, exchange: TheExchange) -> Response:
    """Answer as `txt2img` does. Without a prompt, the picture is an image prompt too."""
    members = await read_json_object(request, services)
    body = validated(ImageToImage, _present(members), {})
    picture = _sent(body.init_images[0], "init_images")
    mask = None if body.mask is None else _sent(body.mask, "mask")
    if mask is not None:
        if read_key(request) is None:
            await services.dispatcher.require_room(exchange.tenant)  # before the mask is decoded
        remake = partial(mask_like, picture, mask, services.inputs, is_inverted=body.inpainting_mask_invert)
        mask = await asyncio.get_running_loop().run_in_executor(services.reader, remake)
    guides: dict[str, Any] = {
        "image": picture,
        "strength": body.denoising_strength,
        "mask": mask,
        "feather": body.mask_blur if mask is not None else 0,
    }
    if not _words(body.prompt).strip():
        guides["image_prompts"] = [{"image": picture}]
    return await _respond(request, services, exchange, members, body, guides)


def _present(members: Mapping[str, Any]) -> dict[str, Any]:
    """Drop members that are null, and a `sampler_name` that is an index rather than a name."""
    given = {name: value for name, value in members.items() if value is not None}
    if not isinstance(given.get("sampler_name", ""), str):
        del given["sampler_name"]
    return given


def _sent(source: Source, name: str) -> Source:
    """Label a picture with the caller's `name`. Raises InvalidRequest unless this request contains it."""
    if source.name:
        raise InvalidRequest(f"{name} must be in base64", param=name, code="invalid_type")
    return Source(source.content, place=name)


async def _respond(
    request: Request,
    services: Services,
    exchange: Exchange,
    members: Mapping[str, Any],
    body: TextToImage,
    guides: Mapping[str, Any],
) -> Response:
    native = {**_native_members(body, services), **await _loras(body.prompt, services), **guides}
    sent_as = {
        "decoder_num_inference_steps": "override_settings",
        "decoder_guidance_scale": "override_settings",
        "loras": "prompt",
    }
    metadata = {"api": LAYER, **({"task": body.force_task_id} if body.force_task_id else {})}
    asked = Asked(members, in_native_members(native, sent_as), "png", metadata)
    drawn = await draw(request, services, exchange, asked)
    if drawn.job.status != JobStatus.CANCELED:  # by `interrupt`: answer with the finished pictures
        require_success(drawn.job)
    embedding = Embedding()
    write = partial(_answer, drawn.job, services, members, body, embedding)
    text = await asyncio.get_running_loop().run_in_executor(services.encoders, write)
    ignored = _present(members).keys() - type(body).model_fields.keys()
    return await embedding.respond(text, services.images, services.storage, _headers(drawn, ignored))


def _native_members(body: TextToImage, services: Services) -> dict[str, Any]:
    num_images, most = body.batch_size * body.n_iter, services.settings.max_images
    if num_images > most:
        message = f"batch_size times n_iter must be at most {most} on this server, not {num_images}"
        raise TooManyPictures(message, param="batch_size")
    return {
        "prompt": _words(body.prompt),
        "negative_prompt": body.negative_prompt,
        "width": body.width,
        "height": body.height,
        "seed": body.seed,
        "num_images": num_images,
        "prior_num_inference_steps": min(body.steps, MOST_STEPS),
        "prior_guidance_scale": min(body.cfg_scale, MOST_GUIDANCE),
        "decoder_num_inference_steps": body.override_settings.get("decoder_steps"),
        "decoder_guidance_scale": body.override_settings.get("decoder_guidance_scale"),
        "sampler": SAMPLERS.get(body.sampler_name.upper()),
        "embed_metadata": True,
    }


def _words(prompt: str) -> str:
    """Return the prompt without its LoRA tags."""
    return _LORA.sub("", prompt).strip() if "<lora:" in prompt else prompt


async def _loras(prompt: str, services: Services) -> dict[str, Any]:
    """Return the installed LoRAs that the prompt names; others are ignored, as A1111 does."""
    named = {name.strip(): _scale(name, scale) for name, scale in _LORA.findall(prompt)}
    if not named:
        return {}
    await wait_for_model(services)
    folders = services.dispatcher.model.lora_dirs
    loop = asyncio.get_running_loop()
    installed = await loop.run_in_executor(services.storage, services.loras.names, folders)
    return {"loras": [{"name": name, "scale": scale} for name, scale in named.items() if name in installed]}


def _scale(name: str, scale: str) -> float:
    try:
        value = float(scale or 1)
    except ValueError:
        value = math.nan
    if not -2 <= value <= 2:
        tag = printable(f"<lora:{name}:{scale}>")
        raise InvalidRequest(f"prompt has {tag}, whose scale must be a number from -2 to 2", param="prompt")
    return value


def _headers(drawn: Drawn, ignored: Collection[str]) -> dict[str, str]:
    told = picture_headers(drawn.job) if drawn.job.images else {"X-Job-Id": drawn.job.id}
    return told | replayed(drawn.is_replay) | ignored_params(ignored)


def _answer(
    job: Job, services: Services, members: Mapping[str, Any], body: TextToImage, embedding: Embedding
) -> bytes:
    """Return the answer as JSON. Runs in a thread, since it reads files and echoes the request."""
    infotexts = [_infotext(services.images.read(image.name)) for image in job.images]
    echo = {**members, **{name: None for name in ("init_images", "mask") if name in members}}
    answer = {
        "images": [embedding.base64_of(image) for image in job.images] if body.send_images else [],
        "parameters": echo,
        "info": to_json(_info(job, body, infotexts)).decode(),
    }
    return to_json(answer)


def _infotext(content: bytes) -> str:
    """Return the settings text that is embedded in a picture's file."""
    with Image.open(BytesIO(content), formats=("PNG",)) as image:
        return str(image.info["parameters"])


def _info(job: Job, body: TextToImage, infotexts: list[str]) -> dict[str, Any]:
    """Return the facts about the pictures under the names that A1111's clients look for."""
    generation, seeds = job.request, [image.seed for image in job.images]
    number, drawn_at = len(seeds), datetime.fromtimestamp(job.completed_at or job.created_at, UTC)
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * number,
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * number,
        "seed": job.request.seeds[0],
        "all_seeds": seeds,
        "subseed": job.request.seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": generation.width,
        "height": generation.height,
        "sampler_name": generation.sampler.upper(),
        "cfg_scale": generation.prior_guidance_scale,
        "steps": generation.prior_num_inference_steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": MODEL_ID,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "denoising_strength": None if generation.image is None else generation.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": f"{drawn_at:%Y%m%d%H%M%S}",
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
    }
