"""One picture and its stages: how each stage begins with the result of the one before.

Nothing here waits or loops. `generate` takes pictures through all stages in one go; a server advances each as
it likes, and batches the samples of many callers.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.models import Models
from cascade.networks.adapters import Adapter
from cascade.networks.unet import Condition, Constants
from cascade.sampling.denoise import Guides, Known, Sample
from cascade.sampling.noise import NoiseSource, PhiloxNoise, Stage, TorchGenerator
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.sizes import SizePlan, fit_to_drawing, fit_to_size, nearest_size, plan_size
from cascade.tasks.encoding import encode_planned
from cascade.tasks.enlarging import keep_to_small
from cascade.tasks.extras import ControlMaps, adapter_of, control_of
from cascade.tasks.image_prompts import Embed, encode_image_prompts
from cascade.tasks.image_to_image import noised
from cascade.tasks.inpainting import canvas_of, composite, encode_known, free_cells
from cascade.tasks.settings import NUM_SEEDS, ImageSettings, steps_within

DECODE_PIXELS = 2 * 1024**2  # per call of Stage A, whose activations take about 1 GB per 1024x1024 picture


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a request: its settings with seed and size filled in, and the grids of its drawing."""

    settings: ImageSettings
    plan: SizePlan

    @property
    def prior_shape(self) -> tuple[int, int, int]:
        """Shape of Stage C's latents."""
        return (16, *self.plan.prior_grid)

    @property
    def decoder_shape(self) -> tuple[int, int, int]:
        """Shape of Stage B's latents."""
        return (4, *self.plan.decoder_grid)

    @property
    def prior_steps(self) -> int:
        """Number of steps of Stage C; 0 if the source's latents are kept unchanged."""
        return self.settings.prior_steps

    @property
    def decoder_steps(self) -> int:
        """Number of steps of Stage B."""
        return self.settings.decoder_steps

    @property
    def prior_rows(self) -> int:
        """Largest number of rows of the picture in Stage C's batches."""
        return 2 if self.settings.guided_steps else 1

    @property
    def decoder_rows(self) -> int:
        """Number of rows of the picture in Stage B's batches."""
        return 2 if self.settings.decoder_guidance_scale > 1 else 1


@dataclass(frozen=True, slots=True, eq=False)
class EncodedInputs:
    """Inputs of the stages from a request's own pictures and LoRAs, computed before the first step."""

    semantic: Tensor | None = None  # (16, h, w) fp32: the source as latents of Stage C
    semantic_free: Tensor | None = None  # (h, w) bool: its cells that are painted; None: all
    latents: Tensor | None = None  # (4, h, w) fp32: the source as latents of Stage B
    latents_free: Tensor | None = None  # (h, w) bool: its cells that are painted; None: all
    image_embeds: Tensor | None = None  # (1, k, d) fp32: image prompts
    control: ControlMaps | None = None
    adapter: Adapter | None = None  # LoRAs


NO_INPUTS = EncodedInputs()


def plan_pictures(models: Models, request: ImageSettings) -> list[Picture]:
    """Plan a request's pictures; picture i has the seed plus i. An absent size is the source's, if any."""
    width, height = request.width, request.height
    if request.image is not None and request.anchor is None and width is height is None:
        width, height = nearest_size(*request.image.size)
    plan = plan_size(width, height, models.native)
    seed = secrets.randbelow(NUM_SEEDS) if request.seed is None else request.seed
    alone = replace(request, width=plan.width, height=plan.height, num_images=1, seed=seed)
    return [
        Picture(replace(alone, seed=(seed + index) % NUM_SEEDS), plan) for index in range(request.num_images)
    ]


def encode_inputs(models: Models, picture: Picture, embed: Embed | None = None) -> EncodedInputs:
    """Encode the request's own pictures, its image prompts by `embed`, and load its LoRAs.

    Raises:
        InvalidSetting: the checkpoint lacks a part that is needed, or a picture does not fit.
        CheckpointError: a LoRA's file cannot be used.
    """
    settings, plan = picture.settings, picture.plan
    semantic = semantic_free = latents = latents_free = None
    canvas = canvas_of(settings, plan)
    adapter = adapter_of(models, settings.loras)
    control = control_of(models, settings, plan, canvas)
    if canvas is not None:
        drawn = fit_to_drawing(canvas.image, plan)
        semantic = encode_planned(models, drawn, plan)
        if canvas.mask is not None:
            latents = encode_known(models, settings.preset, drawn)
            semantic_free = free_cells(canvas.mask, plan, plan.prior_grid, models.device)
            latents_free = free_cells(canvas.mask, plan, plan.decoder_grid, models.device)
    return EncodedInputs(
        semantic=semantic,
        semantic_free=semantic_free,
        latents=latents,
        latents_free=latents_free,
        image_embeds=encode_image_prompts(models, settings.image_prompts, embed),
        control=control,
        adapter=adapter,
    )


def prior_condition(
    models: Models,
    text: TextEmbeddings,
    image_embeds: Tensor | None = None,
    adapter: Adapter | None = None,
    *,
    constants: Constants | None = None,
) -> Condition:
    """Prepare Stage C's condition, one row per text; image embeddings are (b, k, d), zeros for no picture."""
    rows, width = len(text.pooled), models.stage_c.config.clip_image_in_channels
    if image_embeds is None:
        image_embeds = torch.zeros(rows, 1, width, device=models.device)
    adapters = None if adapter is None else [adapter] * rows
    return models.stage_c.prepare(
        text.hidden, text.pooled, image_embeds, adapters=adapters, constants=constants
    )


def begin_prior(
    models: Models,
    picture: Picture,
    guides: Guides[Condition],
    inputs: EncodedInputs = NO_INPUTS,
) -> Sample[Condition]:
    """Create a picture's sample for Stage C, starting from noise or the noised source."""
    settings, preset = picture.settings, PRESETS[picture.settings.preset]
    schedule, draw = CosineSchedule(models.prior_schedule), _noise(picture, "prior", models.dtype)
    start = None
    if inputs.semantic is not None and settings.start < 1:
        start = noised(settings, schedule, inputs.semantic, draw)
    without_control = control_steps = None
    if settings.control is not None:
        control_steps = steps_within((settings.control.start, settings.control.end), picture.prior_steps)
        without_control = guides
    if inputs.control is not None:  # also that of an inpainting, which nobody has to ask for
        guides = _controlled(guides, inputs.control)
    return Sample(
        guides=guides,
        guidance_scale=settings.guidance_scale,
        levels=preset.levels(schedule, picture.prior_steps, settings.start),
        sampler=SAMPLERS[settings.sampler],
        preset=preset,
        draw=draw,
        device=models.device,
        start=start,
        known=_known(picture, "prior known", inputs.semantic, inputs.semantic_free),
        guided_steps=settings.guided_steps,
        guides_without_control=without_control,
        controlled_steps=control_steps,
    )


def _controlled(guides: Guides[Condition], control: ControlMaps) -> Guides[Condition]:
    conditional, unconditional = guides
    return Guides(control.on(conditional), None if unconditional is None else control.on(unconditional))


def begin_decoder(
    models: Models,
    picture: Picture,
    semantic: Tensor,
    pooled: Sequence[Tensor],
    inputs: EncodedInputs = NO_INPUTS,
    *,
    constants: Constants | None = None,
) -> Sample[Condition]:
    """Create a picture's sample for Stage B, starting from noise.

    Args:
        semantic: the result of Stage C, (16, h, w).
        pooled: embeddings of the prompt and of the negative prompt, (1, 1, d) each.
    """
    settings, size = picture.settings, picture.plan.decoder_grid
    prompt, negative = pooled
    is_guided = settings.decoder_guidance_scale > 1
    wanted, nothing = semantic[None], torch.zeros_like(semantic)[None]
    condition = models.stage_b.prepare(wanted, prompt, size, constants=constants)
    unguided = (
        models.stage_b.prepare(nothing, negative, size, constants=condition.constants) if is_guided else None
    )
    return Sample(
        guides=Guides(condition, unguided),
        guidance_scale=settings.decoder_guidance_scale,
        levels=PRESETS[settings.preset].levels(
            CosineSchedule(models.decoder_schedule), settings.decoder_steps
        ),
        sampler=SAMPLERS[settings.sampler],
        preset=PRESETS[settings.preset],
        draw=_noise(picture, "decoder", models.dtype),
        device=models.device,
        known=_known(picture, "decoder known", inputs.latents, inputs.latents_free),
    )


def decode(models: Models, pictures: Sequence[Picture], latents: Iterable[Tensor]) -> Tensor:
    """Decode latents of one shape, (4, h, w) each, by Stage A to pixels (b, 3, 4h, 4w), nominally in 0..1."""
    scaled = [
        row * models.scale_factor(picture.settings.preset)
        for row, picture in zip(latents, pictures, strict=True)
    ]
    dtype = next(models.stage_a.parameters()).dtype
    return models.stage_a.decode(torch.stack(scaled).to(dtype), scale_factor=1.0)


def find_defect(values: Tensor) -> str | None:
    """Return why latents or pixels cannot be a picture, or None if they can."""
    least, most = values.aminmax()  # a single pass, which propagates NaN
    if not (least.isfinite() and most.isfinite()):
        return "not finite"
    return "all the same" if least == most else None


def to_bytes(latents: Tensor) -> bytes:
    """Serialize latents as little-endian fp32 values in order; resuming from them is bit-identical."""
    return latents.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()


def from_bytes(values: bytes, shape: Sequence[int], device: torch.device) -> Tensor:
    """Read latents of a shape from `to_bytes`; raise `ValueError` if the number of values does not fit."""
    latents = torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32))
    if latents.numel() != math.prod(shape):
        raise ValueError(f"{latents.numel()} values cannot be latents of shape {tuple(shape)}")
    return latents.view(*shape).to(device)


def decode_chunk(plan: SizePlan) -> int:
    """Return how many pictures Stage A decodes in one call at most."""
    return max(1, DECODE_PIXELS // (plan.draw_width * plan.draw_height))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (b, 3, h, w), nominally in 0..1, to 8-bit pictures."""
    values = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


def finished(image: Image.Image, picture: Picture) -> Image.Image:
    """Fit a drawn picture to its size, correct it by the small one it enlarges, and paste kept pixels."""
    fitted = fit_to_size(image, picture.plan)
    control = picture.settings.control
    if control is not None and control.enlarges and isinstance(control.image, Image.Image):
        fitted = keep_to_small(fitted, control.image)
    if not picture.settings.repaints:
        return fitted
    canvas = canvas_of(picture.settings, picture.plan)
    assert canvas is not None
    return composite(fitted, canvas, picture.settings.feather)


def _known(picture: Picture, stage: Stage, clean: Tensor | None, is_free: Tensor | None) -> Known | None:
    """Return what a mask keeps of latents. Its noise is Philox in every preset: no script draws it."""
    settings = picture.settings
    if clean is None or is_free is None:
        return None
    assert settings.seed is not None
    return Known(clean, is_free, PhiloxNoise(tuple(clean.shape), settings.seed, stage))


def _noise(picture: Picture, stage: Literal["prior", "decoder"], dtype: torch.dtype) -> NoiseSource:
    """Return the noise source of a picture in a stage."""
    settings = picture.settings
    assert settings.seed is not None
    shape = picture.prior_shape if stage == "prior" else picture.decoder_shape
    if settings.preset == "official":
        return PhiloxNoise(shape, settings.seed, stage)
    # A prior run draws its initial noise and then noise for every step, even the last, which does not use it.
    has_earlier = stage == "decoder" and settings.shares_generator and picture.prior_steps > 0
    num_earlier = picture.prior_steps + 1 if has_earlier else 0
    return TorchGenerator(shape, settings.seed, dtype=dtype, earlier=[picture.prior_shape] * num_earlier)
