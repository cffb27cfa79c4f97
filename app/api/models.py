"""The model in the native contract: its limits, defaults and abilities, and its LoRAs."""

import asyncio
from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from app.api.bodies import NativeImageBody
from app.api.deps import Services, TheServices, authenticate
from app.api.description import NEEDS_KEY, problems
from app.api.views import MODEL_ID
from app.engine.protocol import Ready
from app.schemas import (
    DEFAULT_STRENGTH,
    MAX_ASPECT,
    MAX_IMAGE_PROMPTS,
    MAX_LORAS,
    MAX_PROMPT_CHARACTERS,
    MAX_SIDE,
    MIN_SIDE,
    SIDE_STEP,
)

router = APIRouter(prefix="/api/v1", tags=["Native"], dependencies=[Depends(authenticate)])


class Limits(BaseModel):
    """Limits of a request."""

    min_side: int = MIN_SIDE
    max_side: int = MAX_SIDE
    side_step: int = SIDE_STEP
    max_aspect: int = MAX_ASPECT
    max_pixels: int
    max_images: int
    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    max_image_prompts: int = MAX_IMAGE_PROMPTS
    max_loras: int = MAX_LORAS
    max_body_bytes: int
    max_upload_bytes: int


class Defaults(BaseModel):
    """Defaults of a request."""

    width: int
    height: int
    prior_num_inference_steps: int
    prior_guidance_scale: float
    decoder_num_inference_steps: int
    decoder_guidance_scale: float
    strength: float = DEFAULT_STRENGTH
    preset: str
    sampler: str


class Abilities(BaseModel):
    """What the installed files make possible."""

    image_to_image: bool
    inpainting: bool
    outpainting: bool
    image_prompts: bool
    controls: list[str]
    loras: bool


class NativeModel(BaseModel):
    """A model."""

    id: str = MODEL_ID
    object: Literal["model"] = "model"
    name: str
    limits: Limits
    defaults: Defaults
    abilities: Abilities


class NativeModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[NativeModel]


class LoRAView(BaseModel):
    """An installed LoRA."""

    name: str
    bytes: int
    sha256: str


class LoRAList(BaseModel):
    """All LoRAs."""

    object: Literal["list"] = "list"
    data: list[LoRAView]


@router.get(
    "/models",
    operation_id="listNativeModels",
    summary="The model: its limits, defaults and abilities",
    responses=problems(401, 500, 503),
    openapi_extra=NEEDS_KEY,
)
async def list_models(services: TheServices) -> NativeModelList:
    """List the one model. 503 while it is being loaded: its abilities are not known before."""
    return NativeModelList(data=[_model(services, services.dispatcher.model)])


@router.get(
    "/loras",
    operation_id="listLoRAs",
    summary="The LoRAs that are installed",
    responses=problems(401, 500, 503),
    openapi_extra=NEEDS_KEY,
)
async def list_loras(services: TheServices) -> LoRAList:
    """List the LoRAs in the model's folder and in `CASCADE_LORA_DIR`, as they are now."""
    folders = services.dispatcher.model.lora_dirs
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(services.storage, services.loras.all, folders)
    return LoRAList(
        data=[LoRAView(name=lora.name, bytes=lora.num_bytes, sha256=lora.sha256) for lora in found]
    )


def _model(services: Services, ready: Ready) -> NativeModel:
    settings = services.settings
    given = NativeImageBody(prompt="x")
    return NativeModel(
        name=settings.model_name,
        limits=Limits(
            max_pixels=settings.max_pixels,
            max_images=settings.max_images,
            max_body_bytes=settings.max_body_bytes,
            max_upload_bytes=settings.max_upload_bytes,
        ),
        defaults=Defaults(
            width=ready.native_width,
            height=ready.native_height,
            prior_num_inference_steps=given.prior_num_inference_steps,
            prior_guidance_scale=given.prior_guidance_scale,
            decoder_num_inference_steps=given.decoder_num_inference_steps,
            decoder_guidance_scale=given.decoder_guidance_scale,
            preset=given.preset,
            sampler=given.sampler,
        ),
        abilities=Abilities(
            image_to_image=ready.reads_pictures,
            inpainting=ready.reads_pictures,
            outpainting=ready.reads_pictures,
            image_prompts=ready.reads_image_prompts,
            controls=list(ready.controls),
            loras=bool(ready.lora_dirs),
        ),
    )
