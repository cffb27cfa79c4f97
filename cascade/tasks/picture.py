"""One picture and its stages: each begins with what the one before left, alone or in any company.

Nothing here waits or loops. `generate` takes pictures through all stages in one go, a server takes each as
far as it likes and joins the samples of many callers.
"""

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.models import Models
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Sample
from cascade.sampling.noise import NoiseSource, PhiloxNoise, Stage, TorchGenerator
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.sizes import SizePlan, fit_to_size, plan_size
from cascade.tasks.settings import NUM_SEEDS, TextToImage

DECODE_PIXELS = 2 * 1024**2  # per call of Stage A: its activations are about 1 GB per 1024x1024 picture


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a request: its settings, all filled in, and the grids that it is drawn on."""

    settings: TextToImage
    plan: SizePlan

    @property
    def prior_shape(self) -> tuple[int, int, int]:
        """Of Stage C's latents."""
        return (16, *self.plan.prior_grid)

    @property
    def decoder_shape(self) -> tuple[int, int, int]:
        """Of Stage B's latents."""
        return (4, *self.plan.decoder_grid)


def plan_pictures(models: Models, request: TextToImage) -> list[Picture]:
    """The pictures of a request; picture i has the seed plus i."""
    plan = plan_size(request.width, request.height, models.native)
    seed = secrets.randbelow(NUM_SEEDS) if request.seed is None else request.seed
    alone = replace(request, width=plan.width, height=plan.height, num_images=1, seed=seed)
    return [
        Picture(replace(alone, seed=(seed + index) % NUM_SEEDS), plan) for index in range(request.num_images)
    ]


def prior_condition(models: Models, text: TextEmbeddings) -> Condition:
    """What guides Stage C, a row for each text."""
    rows, width = len(text.pooled), models.stage_c.config.clip_image_in_channels
    no_image = torch.zeros(rows, 1, width, device=models.device)
    return models.stage_c.prepare(text.hidden, text.pooled, no_image)


def begin_prior(models: Models, picture: Picture, conditions: Mapping[str, Condition]) -> Sample[Condition]:
    """A picture as noise, before the first step of Stage C. `conditions` has a row for each of its texts."""
    settings = picture.settings
    prompt, negative = settings.texts
    return Sample(
        condition=conditions[prompt],
        unguided=conditions[negative] if settings.guidance_scale > 1 else None,
        guidance_scale=settings.guidance_scale,
        levels=PRESETS[settings.preset].levels(CosineSchedule(models.prior_schedule), settings.steps),
        sampler=SAMPLERS[settings.sampler],
        preset=PRESETS[settings.preset],
        draw=_noise(picture, "prior", models.dtype),
        device=models.device,
    )


def begin_decoder(
    models: Models, picture: Picture, semantic: Tensor, texts: Mapping[str, TextEmbeddings]
) -> Sample[Condition]:
    """A picture as noise, before the first step of Stage B; `semantic`, (16, h, w), is Stage C's result."""
    settings, size = picture.settings, picture.plan.decoder_grid
    prompt, negative = (texts[text].pooled for text in settings.texts)
    is_guided = settings.decoder_guidance_scale > 1
    wanted, nothing = semantic[None], torch.zeros_like(semantic)[None]
    return Sample(
        condition=models.stage_b.prepare(wanted, prompt, size),
        unguided=models.stage_b.prepare(nothing, negative, size) if is_guided else None,
        guidance_scale=settings.decoder_guidance_scale,
        levels=PRESETS[settings.preset].levels(
            CosineSchedule(models.decoder_schedule), settings.decoder_steps
        ),
        sampler=SAMPLERS[settings.sampler],
        preset=PRESETS[settings.preset],
        draw=_noise(picture, "decoder", models.dtype),
        device=models.device,
    )


def decode(models: Models, pictures: Sequence[Picture], latents: Iterable[Tensor]) -> Tensor:
    """Stage A: latents of one shape, (4, h, w) each, to pixels (b, 3, 4h, 4w), nominally in 0..1."""
    scaled = [
        row * models.scale_factor(picture.settings.preset)
        for row, picture in zip(latents, pictures, strict=True)
    ]
    dtype = next(models.stage_a.parameters()).dtype
    return models.stage_a.decode(torch.stack(scaled).to(dtype), scale_factor=1.0)


def flaw(values: Tensor) -> str | None:
    """Why latents or pixels cannot be a picture, or None."""
    if not values.isfinite().all():
        return "not finite"
    return "all the same" if (values == values.flatten()[0]).all() else None


def to_bytes(latents: Tensor) -> bytes:
    """Latents as their fp32 values in order, little endian: enough to go on from them to the last bit."""
    return latents.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()


def from_bytes(values: bytes, shape: Sequence[int], device: torch.device) -> Tensor:
    """Latents of a shape from their values; raises ValueError for another number of them."""
    latents = torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32))
    if latents.numel() != math.prod(shape):
        raise ValueError(f"{latents.numel()} values cannot be latents of shape {tuple(shape)}")
    return latents.view(*shape).to(device)


def decode_chunk(plan: SizePlan) -> int:
    """How many pictures Stage A decodes in one call at most."""
    return max(1, DECODE_PIXELS // (plan.draw_width * plan.draw_height))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, h, w), nominally in 0..1, as 8-bit pictures."""
    values = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


def finish(pixels: Tensor, pictures: Sequence[Picture]) -> list[Image.Image]:
    """Decoded pixels as pictures of exactly the sizes asked for."""
    return [
        fit_to_size(image, picture.plan) for image, picture in zip(to_images(pixels), pictures, strict=True)
    ]


def _noise(picture: Picture, stage: Stage, dtype: torch.dtype) -> NoiseSource:
    """Where the noise of a picture comes from in a stage."""
    settings = picture.settings
    assert settings.seed is not None
    shape = picture.prior_shape if stage == "prior" else picture.decoder_shape
    if settings.preset == "official":
        return PhiloxNoise(shape, settings.seed, stage)
    # A prior run draws its start and then noise for every step, even for the last, which does not use it.
    num_earlier = settings.steps + 1 if stage == "decoder" and settings.shares_generator else 0
    return TorchGenerator(shape, settings.seed, dtype=dtype, earlier=[picture.prior_shape] * num_earlier)
