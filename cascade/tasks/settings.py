"""The settings of a request for pictures, checked when they are put together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cascade.errors import InvalidSetting
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sizes import check_side, check_size

NUM_SEEDS = 2**32
MAX_PROMPT_CHARACTERS = 32_000


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

    @property
    def texts(self) -> tuple[str, str]:
        """What the text encoder reads: prompt and negative prompt."""
        return self.prompt, self.negative_prompt


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
