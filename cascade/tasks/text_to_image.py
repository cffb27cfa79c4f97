"""Text to image: prompts through Stage C, Stage B and Stage A, many requests at once.

`generate` is a generator, so the caller drives it, shows progress and may stop. Requests keep their own
settings, and a picture is the same in any company.
"""

import math
import secrets
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings, TextEncoder
from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Network, Sample, denoise
from cascade.sampling.noise import NoiseSource, PhiloxNoise, Stage, TorchGenerator
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.sizes import SizePlan, check_side, check_size, fit_to_size, plan_size

NUM_SEEDS = 2**32
MAX_PROMPT_CHARACTERS = 32_000

_DECODE_PIXELS = 2 * 1024**2  # per call of Stage A: its activations are about 1 GB per 1024x1024 picture


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImage:
    """The settings of a request, checked on construction: a wrong one raises `InvalidSetting`.

    Absent sizes are the checkpoint's, an absent seed is drawn. Picture i uses the seed plus i. A guidance
    scale of 1 or less turns guidance off and halves the work of its stage.

    `shares_generator` concerns the preset "diffusers": the script hands one generator to both pipelines,
    as the combined pipeline does too; otherwise each gets a new one of the same seed.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    seed: int | None = None
    steps: int = 20
    guidance_scale: float = 4.0
    decoder_steps: int = 10
    decoder_guidance_scale: float = 0.0
    preset: str = "official"
    sampler: str = "ddpm"
    shares_generator: bool = True

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise InvalidSetting("prompt", "must not be blank")
        _check_text("negative_prompt", self.negative_prompt)
        _check_integer("num_images", self.num_images, 1, 10)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, NUM_SEEDS - 1)
        _check_integer("steps", self.steps, 1, 100)
        _check_number("guidance_scale", self.guidance_scale, 0, 20)
        _check_integer("decoder_steps", self.decoder_steps, 1, 60)
        _check_number("decoder_guidance_scale", self.decoder_guidance_scale, 0, 10)
        _check_choice("preset", self.preset, PRESETS)
        _check_choice("sampler", self.sampler, SAMPLERS)
        if self.width is not None:
            check_side("width", self.width)
        if self.height is not None:
            check_side("height", self.height)
        if self.width is not None and self.height is not None:
            check_size(self.width, self.height)


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished picture and how it was made."""

    image: Image.Image
    settings: TextToImage  # all filled in: asked for again, they give this picture again
    resampled_from: tuple[int, int] | None  # the size it was drawn at, if scaled
    prompt_truncated: bool
    prompt_tokens: int  # before truncation, with begin and end


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. Steps of "decode" are pictures."""

    stage: Literal["prior", "decoder", "decode"]
    step: int
    steps: int
    latents: Tensor | None = None  # (b, 16, h, w): clean latents as Stage C predicts them now, for previews


@dataclass(slots=True)
class _Picture:
    """One picture of one request on its way through the stages."""

    settings: TextToImage
    plan: SizePlan
    prompt_truncated: bool = False
    prompt_tokens: int = 0
    semantic: Tensor = field(init=False)  # (16, h, w): the result of Stage C
    latents: Tensor = field(init=False)  # (4, h, w): the result of Stage B
    image: Image.Image = field(init=False)

    @property
    def texts(self) -> tuple[str, str]:
        return self.settings.prompt, self.settings.negative_prompt

    @property
    def prior_shape(self) -> tuple[int, int, int]:
        return (16, *self.plan.prior_grid)

    @property
    def decoder_shape(self) -> tuple[int, int, int]:
        return (4, *self.plan.decoder_grid)

    @property
    def finished(self) -> GeneratedImage:
        return GeneratedImage(
            image=self.image,
            settings=self.settings,
            resampled_from=self.plan.resampled_from,
            prompt_truncated=self.prompt_truncated,
            prompt_tokens=self.prompt_tokens,
        )


Drawn = TypeVar("Drawn", _Picture, Sample[Condition])


@torch.inference_mode()
def generate(
    models: Models, requests: Sequence[TextToImage]
) -> Generator[Progress, None, list[list[GeneratedImage]]]:
    """Make the pictures of all `requests` together; returns them as one list per request."""
    per_request = [_pictures(request, models) for request in requests]
    pictures = [picture for group in per_request for picture in group]
    texts = _Texts(models.text_encoder, pictures)
    yield from _run_prior(models, pictures, texts)
    if models.decoder_text_encoder is not models.text_encoder:
        texts = _Texts(models.decoder_text_encoder, pictures)
    yield from _run_decoder(models, pictures, texts)
    yield from _decode(models, pictures)
    return [[picture.finished for picture in group] for group in per_request]


def _pictures(request: TextToImage, models: Models) -> list[_Picture]:
    plan = plan_size(request.width, request.height, models.native)
    seed = secrets.randbelow(NUM_SEEDS) if request.seed is None else request.seed
    alone = replace(request, width=plan.width, height=plan.height, num_images=1, seed=seed)
    return [
        _Picture(replace(alone, seed=(seed + index) % NUM_SEEDS), plan) for index in range(request.num_images)
    ]


def _run_prior(models: Models, pictures: Sequence[_Picture], texts: "_Texts") -> Iterator[Progress]:
    """Stage C: from noise to the semantic latents."""
    no_image = torch.zeros(len(texts), 1, models.stage_c.config.clip_image_in_channels, device=models.device)
    conditions = models.stage_c.prepare(texts.embeddings.hidden, texts.embeddings.pooled, no_image)
    samples = []
    for picture in pictures:
        prompt, negative = (texts.row(text) for text in picture.texts)
        picture.prompt_truncated = texts.embeddings.truncated[prompt]
        picture.prompt_tokens = texts.embeddings.num_tokens[prompt]
        unguided = conditions[negative : negative + 1] if picture.settings.guidance_scale > 1 else None
        samples.append(_sample(models, picture, "prior", conditions[prompt : prompt + 1], unguided))
    for step, steps, active in _steps(models.stage_c, samples):
        yield Progress("prior", step, steps, torch.stack([sample.clean for sample in active]))
    for picture, sample in zip(pictures, samples, strict=True):
        picture.semantic = sample.result


def _run_decoder(models: Models, pictures: Sequence[_Picture], texts: "_Texts") -> Iterator[Progress]:
    """Stage B: from noise to Stage A's latents, guided by the semantic latents."""
    prepare = models.stage_b.prepare
    samples = []
    for picture in pictures:
        size, semantic = picture.plan.decoder_grid, picture.semantic[None]
        prompt, negative = (texts.pooled(text) for text in picture.texts)
        is_guided = picture.settings.decoder_guidance_scale > 1
        unguided = prepare(torch.zeros_like(semantic), negative, size) if is_guided else None
        samples.append(_sample(models, picture, "decoder", prepare(semantic, prompt, size), unguided))
    for step, steps, _ in _steps(models.stage_b, samples):
        yield Progress("decoder", step, steps)
    for picture, sample in zip(pictures, samples, strict=True):
        picture.latents = sample.result


def _sample(
    models: Models, picture: _Picture, stage: Stage, condition: Condition, unguided: Condition | None
) -> Sample[Condition]:
    """A picture at the start of a stage."""
    settings = picture.settings
    preset = PRESETS[settings.preset]
    if stage == "prior":
        schedule, steps, scale = models.prior_schedule, settings.steps, settings.guidance_scale
    else:
        schedule, steps, scale = (
            models.decoder_schedule,
            settings.decoder_steps,
            settings.decoder_guidance_scale,
        )
    return Sample(
        condition=condition,
        unguided=unguided,
        guidance_scale=scale,
        levels=preset.levels(CosineSchedule(schedule), steps),
        sampler=SAMPLERS[settings.sampler],
        preset=preset,
        draw=_noise(picture, stage, models.dtype),
        device=models.device,
    )


def _decode(models: Models, pictures: Sequence[_Picture]) -> Iterator[Progress]:
    """Stage A: from latents to pixels, a few pictures at a time."""
    done = 0
    for group in _by_shape(pictures):
        plan = group[0].plan
        chunk = max(1, _DECODE_PIXELS // (plan.draw_width * plan.draw_height))
        for start in range(0, len(group), chunk):
            some = group[start : start + chunk]
            scaled = [picture.latents * models.scale_factor(picture.settings.preset) for picture in some]
            pixels = models.stage_a.decode(torch.stack(scaled).to(models.dtype), scale_factor=1.0)
            for picture, image in zip(some, to_images(pixels), strict=True):
                picture.image = fit_to_size(image, picture.plan)
            done += len(some)
            yield Progress("decode", done, len(pictures))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, h, w), nominally in 0..1, as 8-bit pictures."""
    values = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


class _Texts:
    """The embeddings of every prompt and negative prompt among some pictures, each text encoded once."""

    def __init__(self, encoder: TextEncoder, pictures: Iterable[_Picture]) -> None:
        self._texts = list(dict.fromkeys(text for picture in pictures for text in picture.texts))
        self.embeddings: TextEmbeddings = encoder.encode(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def row(self, text: str) -> int:
        return self._texts.index(text)

    def pooled(self, text: str) -> Tensor:
        """(1, 1, d)."""
        row = self.row(text)
        return self.embeddings.pooled[row : row + 1]


def _noise(picture: _Picture, stage: Stage, dtype: torch.dtype) -> NoiseSource:
    """Where the noise of a picture comes from in a stage."""
    settings = picture.settings
    assert settings.seed is not None
    shape = picture.prior_shape if stage == "prior" else picture.decoder_shape
    if settings.preset == "official":
        return PhiloxNoise(shape, settings.seed, stage)
    # A prior run draws its start and then noise for every step, even for the last, which does not use it.
    num_earlier = settings.steps + 1 if stage == "decoder" and settings.shares_generator else 0
    return TorchGenerator(shape, settings.seed, dtype=dtype, earlier=[picture.prior_shape] * num_earlier)


def _steps(
    network: Network[Condition], samples: Sequence[Sample[Condition]]
) -> Iterator[tuple[int, int, list[Sample[Condition]]]]:
    """Denoise all `samples`, one shape after the other; yields step, number of steps and those in work."""
    groups = list(_by_shape(samples))
    total = sum(max(sample.levels.steps for sample in group) for group in groups)
    step = 0
    for group in groups:
        for _ in denoise(network, group, Condition.cat):
            step += 1
            yield step, total, group


def _by_shape(items: Iterable[Drawn]) -> Iterable[list[Drawn]]:
    groups: dict[torch.Size, list[Drawn]] = {}
    for item in items:
        groups.setdefault(item.latents.shape, []).append(item)
    return groups.values()


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidSetting(name, f"must be text, but is {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates: what Python makes of wrong bytes on a command line
        raise InvalidSetting(name, "must be valid Unicode text") from None
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidSetting(name, f"may have {MAX_PROMPT_CHARACTERS} characters, but has {len(value)}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidSetting(name, f"must be a whole number from {low} to {high}, but is {value!r}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise InvalidSetting(name, f"must be a number from {low} to {high}, but is {value!r}")


def _check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in list(allowed):
        raise InvalidSetting(name, f"must be one of {', '.join(allowed)}, but is {value!r}")
