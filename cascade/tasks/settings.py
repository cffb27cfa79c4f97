"""Settings of a request for pictures, checked on construction."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from cascade.config import CONTROL_KINDS
from cascade.errors import InvalidSetting
from cascade.prompts import MAX_PROMPT_CHARACTERS
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sizes import check_side, check_size

NUM_SEEDS = 2**32
MAX_IMAGE_PROMPTS = 15
MAX_LORAS = 4
MAX_FEATHER = 256
STRENGTH = 0.75  # default of image-to-image; for inpainting and outpainting it is 1

ANCHORS = (
    *("center", "top", "bottom", "left", "right"),
    *("top-left", "top-right", "bottom-left", "bottom-right"),
)


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A picture that guides like a prompt: by what it shows, not by where. Weight 0 ignores it."""

    image: Image.Image = field(repr=False, hash=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_image("image_prompts", self.image)
        _check_number("image_prompts", self.weight, -2, 2)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """Input of identity control in place of a picture: numbers (channels, h, w), of any height and width."""

    values: Tensor

    def __post_init__(self) -> None:
        shape = self.values.shape
        if len(shape) != 3 or 0 in shape or not self.values.isfinite().all():
            raise InvalidSetting("control", "must be a map of finite numbers, (channels, height, width)")


@dataclass(frozen=True, slots=True)
class Control:
    """A picture that a ControlNet of the checkpoint follows, in the share `start`..`end` of Stage C's run.

    Without `preprocess` the picture is the network's input itself, such as edges already found. Inpainting
    paints what is transparent in it. For identity it is a map of numbers. With `faithful` super-resolution is
    exact: the result, reduced, equals the picture up to rounding. None means yes if the picture is followed
    at scale 1 over the whole run, else no.
    """

    kind: str
    image: Image.Image | FeatureMap = field(repr=False, hash=False)
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: bool = True
    faithful: bool | None = None

    def __post_init__(self) -> None:
        _check_choice("control", self.kind, CONTROL_KINDS)
        if not isinstance(self.image, FeatureMap):
            _check_image("control", self.image)
        _check_number("control", self.scale, 0, 2)
        _check_interval("control", (self.start, self.end))

    @property
    def enlarges(self) -> bool:
        """Whether the result, reduced, has to equal the picture."""
        if self.kind != "super_resolution":
            return False
        is_followed = (self.scale, self.start, self.end) == (1, 0, 1)
        return is_followed if self.faithful is None else self.faithful


@dataclass(frozen=True, slots=True)
class LoRAUse:
    """A LoRA by name, and its scale."""

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_text("loras", self.name)
        if not self.name:
            raise InvalidSetting("loras", "a name must not be empty")
        _check_number("loras", self.scale, -2, 2)


class Options(TypedDict, total=False):
    """The settings that all tasks share; see `ImageSettings`."""

    negative_prompt: str
    width: int | None
    height: int | None
    num_images: int
    seed: int | None
    steps: int
    guidance_scale: float
    decoder_steps: int
    decoder_guidance_scale: float
    preset: str
    sampler: str
    shares_generator: bool
    image_prompts: tuple[ImagePrompt, ...]
    control: Control | None
    loras: tuple[LoRAUse, ...]
    guidance_interval: tuple[float, float]
    weighted_prompt: bool
    long_prompt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """The settings of a request, checked on construction: a wrong one raises `InvalidSetting`.

    Absent sizes are the checkpoint's, an absent seed is random. Picture i uses the seed plus i. A guidance
    scale of 1 or less turns guidance off and halves the work of its stage.

    `shares_generator` concerns the preset "diffusers": the script passes one generator to both pipelines, as
    the combined pipeline does; otherwise each gets a new one with the same seed.

    Further inputs of a picture:

    image, strength: the picture to start from. 0 keeps it as the model sees it, 1 ignores it; None is 0.75,
        or 1 if a mask or an anchor determines what is painted.
    mask, feather: white in the mask is painted, black stays bit-identical; without a mask, an alpha channel
        of `image` serves as one. The new part fades into the old over `feather` pixels.
    anchor: the place of `image`, unscaled, on a canvas of `width` x `height`; the rest is painted.
    image_prompts: pictures as prompts, up to 15. With these or an image the prompt may be empty.
    control: a picture that a ControlNet follows.
    loras: up to 4 LoRAs.
    guidance_interval: the share of Stage C's run, from 0 noise to 1 clean, in which guidance is on.
    weighted_prompt: "(word:1.3)" in the texts is a weight; long_prompt: texts are read beyond the window.
    noise_at_sampling_shift: noise the picture at the schedule's shift, not at shift 1 like the official code.
    """

    prompt: str = ""
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
    image: Image.Image | None = field(default=None, repr=False, hash=False)
    strength: float | None = None
    mask: Image.Image | None = field(default=None, repr=False, hash=False)
    feather: int = 0
    anchor: str | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()
    control: Control | None = None
    loras: tuple[LoRAUse, ...] = ()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    weighted_prompt: bool = False
    long_prompt: bool = False
    noise_at_sampling_shift: bool = False

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        self._check_pictures()
        if not self.prompt.strip() and not self.image_prompts and self.image is None:
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
        _check_parts("loras", self.loras, LoRAUse, MAX_LORAS)
        _check_interval("guidance_interval", self.guidance_interval)

    @property
    def repaints(self) -> bool:
        """Whether only a part of the picture is painted: inpainting or outpainting."""
        return self.mask is not None or self.anchor is not None or _has_alpha(self.image)

    @property
    def start(self) -> float:
        """Time at which Stage C begins: 1 from noise; at 0 it does not run."""
        if self.image is None:
            return 1.0
        if self.strength is None:
            return 1.0 if self.repaints else STRENGTH
        return float(self.strength)

    @property
    def prior_steps(self) -> int:
        """Number of steps that Stage C makes: the share of `steps` from time `start` to 0."""
        if self.start == 0:
            return 0
        return max(1, int(self.steps * self.start + 1e-9))  # 100 * .29 is 28.999999999999996

    @property
    def guided_steps(self) -> range:
        """Steps of Stage C with guidance."""
        if self.guidance_scale <= 1:
            return range(0)
        return steps_within(self.guidance_interval, self.prior_steps)

    @property
    def texts(self) -> tuple[str, str]:
        """Texts for the text encoder: prompt and negative prompt."""
        return self.prompt, self.negative_prompt

    def _check_pictures(self) -> None:
        for name, image in (("image", self.image), ("mask", self.mask)):
            if image is not None:
                _check_image(name, image)
                object.__setattr__(self, name, _upright(image))
        if self.image is None:
            for name in ("strength", "mask", "anchor"):
                if getattr(self, name) is not None:
                    raise InvalidSetting(name, "needs an image")
        if self.strength is not None:
            _check_number("strength", self.strength, 0, 1)
        if self.mask is not None and self.image is not None and self.mask.size != self.image.size:
            sizes = [f"{width}x{height}" for width, height in (self.image.size, self.mask.size)]
            raise InvalidSetting("mask", f"must have the size of the image, {sizes[0]}, but has {sizes[1]}")
        _check_integer("feather", self.feather, 0, MAX_FEATHER)
        if self.anchor is not None:
            _check_choice("anchor", self.anchor, ANCHORS)
        _check_parts("image_prompts", self.image_prompts, ImagePrompt, MAX_IMAGE_PROMPTS)
        if self.control is not None and not isinstance(self.control, Control):
            raise InvalidSetting("control", f"must be a Control, but is {self.control!r}")


def steps_within(interval: tuple[float, float], steps: int) -> range:
    """Return the steps that begin within `interval`, in shares of a run, without its end."""
    start, end = (math.ceil(share * steps - 1e-9) for share in interval)
    return range(start, end)


def _has_alpha(image: Image.Image | None) -> bool:
    """Tell whether any pixel is transparent."""
    if image is None or not image.has_transparency_data:
        return False
    return any(image.convert("RGBA").getchannel("A").histogram()[:255])


def _upright(image: Image.Image) -> Image.Image:
    """Rotate the picture by its EXIF orientation."""
    return ImageOps.exif_transpose(image) if ExifTags.Base.Orientation in image.getexif() else image


def _check_image(name: str, value: object) -> None:
    if not isinstance(value, Image.Image):
        raise InvalidSetting(name, f"must be a picture, but is {value!r}")
    if 0 in value.size:
        raise InvalidSetting(name, "must have pixels")


def _check_parts(name: str, value: object, kind: type, most: int) -> None:
    if not isinstance(value, tuple) or not all(isinstance(part, kind) for part in value):
        raise InvalidSetting(name, f"must be a tuple of {kind.__name__}")
    if len(value) > most:
        raise InvalidSetting(name, f"may be {most} at most, but are {len(value)}")


def _check_interval(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise InvalidSetting(name, f"must be two numbers, but is {value!r}")
    start, end = value
    for share in (start, end):
        _check_number(name, share, 0, 1)
    if start >= end:
        raise InvalidSetting(name, f"must begin before it ends, but is {start} to {end}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidSetting(name, f"must be text, but is {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, which Python makes of invalid bytes on a command line
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
