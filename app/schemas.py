"""The request that every contract's body becomes: validated once, on arrival, and then immutable.

The engine knows no other. The bodies themselves are in `app/api/bodies.py`; they share the types here.
"""

import re
import secrets
from collections.abc import Iterator
from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.errors import InvalidRequest

MAX_SEED = 2**32 - 1
MAX_PROMPT_CHARACTERS = 32_000
MIN_SIDE, MAX_SIDE, SIDE_STEP, MAX_ASPECT = 64, 4096, 8, 4
MAX_IMAGE_PROMPTS = 4
MAX_EDIT_PICTURES = 16  # the one to edit, and image prompts: as many as OpenAI takes
MAX_LORAS = 4
DEFAULT_STRENGTH = 0.75  # of image-to-image; with a mask or an anchor the default is 1

OutputFormat = Literal["png", "jpeg", "webp"]
Preset = Literal["official", "diffusers"]
Sampler = Literal["ddpm", "ddim", "lcm"]
ControlKind = Literal["canny", "inpaint", "super_resolution", "identity"]
Anchor = Literal[
    "center", "top", "bottom", "left", "right", "top-left", "top-right", "bottom-left", "bottom-right"
]


def _refuse_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "should be a number")
    return value


def _check_side(side: int, step: int = SIDE_STEP) -> int:
    if not MIN_SIDE <= side <= MAX_SIDE or side % step:
        kind = "a whole number" if step == 1 else f"a multiple of {step}"
        raise ValueError(f"should be {kind} from {MIN_SIDE} to {MAX_SIDE}, not {side}")
    return side


Number = BeforeValidator(_refuse_boolean)  # pydantic would read `true` as 1

NumImages = Annotated[int, Field(ge=1, le=10), Number]
NumPreviews = Annotated[int, Field(ge=0, le=3), Number]
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), Number]
Side = Annotated[
    int,
    Field(json_schema_extra={"minimum": MIN_SIDE, "maximum": MAX_SIDE, "multipleOf": SIDE_STEP}),
    AfterValidator(_check_side),
    Number,
]
AnySide = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE), Number]  # a drawn picture is fitted to any size
PriorSteps = Annotated[int, Field(ge=1, le=100), Number]
PriorGuidance = Annotated[float, Field(ge=0.0, le=20.0), Number]
DecoderSteps = Annotated[int, Field(ge=1, le=60), Number]
DecoderGuidance = Annotated[float, Field(ge=0.0, le=10.0), Number]
Quality100 = Annotated[int, Field(ge=1, le=100), Number]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Share = Annotated[float, Field(ge=0.0, le=1.0), Number]
Feather = Annotated[int, Field(ge=0, le=256), Number]
Weight = Annotated[float, Field(ge=-2.0, le=2.0), Number]
ControlScale = Annotated[float, Field(ge=0.0, le=2.0), Number]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] >= interval[1]:
        raise ValueError("should begin before it ends")
    return interval


Interval = Annotated[tuple[Share, Share], AfterValidator(_check_interval)]  # of the run, from 0 to 1


class PictureRef(BaseModel):
    """A reference to an input picture: the name of its file, and its size; never the content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Sha256  # of the PNG file in the data folder
    width: int
    height: int


class ImagePrompt(BaseModel):
    """A picture that guides like a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: PictureRef
    weight: Weight = 1.0


class Control(BaseModel):
    """A picture that says where things are, by way of a ControlNet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: ControlKind
    image: PictureRef
    scale: ControlScale = 1.0
    start: Share = 0.0
    end: Share = 1.0
    preprocess: bool = True
    faithful: bool | None = None


class LoRA(BaseModel):
    """An installed LoRA and its scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    scale: Weight = Field(1.0, description="0 is without it; negative is the opposite")


class GenerationRequest(BaseModel):
    """A request with all defaults filled in, so that the same request gives the same pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt
    negative_prompt: Prompt = ""
    width: AnySide
    height: AnySide
    seeds: tuple[int, ...]
    prior_num_inference_steps: PriorSteps = 20
    prior_guidance_scale: PriorGuidance = 4.0
    decoder_num_inference_steps: DecoderSteps = 10
    decoder_guidance_scale: DecoderGuidance = 0.0
    preset: Preset = "official"
    sampler: Sampler = "ddpm"
    output_format: OutputFormat = "png"
    output_quality: Quality100 = 90
    embed_metadata: bool = False
    image: PictureRef | None = None
    strength: Share | None = None
    mask: PictureRef | None = None  # one channel: white is repainted
    feather: Feather = 0
    anchor: Anchor | None = None
    image_prompts: Annotated[tuple[ImagePrompt, ...], Field(max_length=MAX_EDIT_PICTURES - 1)] = ()
    control: Control | None = None
    loras: Annotated[tuple[LoRA, ...], Field(max_length=MAX_LORAS)] = ()
    guidance_interval: Interval = (0.0, 1.0)
    weighted_prompt: bool = False
    long_prompt: bool = False
    previews: NumPreviews = 0  # per picture, for callers that follow the job's events

    @property
    def num_images(self) -> int:
        """Number of pictures to make."""
        return len(self.seeds)

    @property
    def pictures(self) -> Iterator[PictureRef]:
        """All input pictures of the request. One that was sent twice is there twice."""
        if self.image is not None:
            yield self.image
        if self.mask is not None:
            yield self.mask
        for prompt in self.image_prompts:
            yield prompt.image
        if self.control is not None:
            yield self.control.image

    @property
    def input_names(self) -> frozenset[str]:
        """The SHA-256 of each input picture of the request."""
        return frozenset(picture.sha256 for picture in self.pictures)

    @property
    def is_edit(self) -> bool:
        """Whether a picture is changed, filled in or enlarged, and not only an example for a new one."""
        changes = self.control is not None and self.control.type in ("inpaint", "super_resolution")
        return self.image is not None or changes

    @property
    def denoising_strength(self) -> float:
        """How freely the input picture is redrawn; 1 where there is none."""
        if self.image is None:
            return 1.0
        if self.strength is not None:
            return self.strength
        is_partial = self.mask is not None or self.anchor is not None
        return 1.0 if is_partial else DEFAULT_STRENGTH

    @property
    def prior_steps(self) -> int:
        """Number of steps that Stage C takes: image-to-image starts part of the way through."""
        strength = self.denoising_strength
        return max(int(self.prior_num_inference_steps * strength + 1e-9), 1) if strength else 0

    @property
    def guided_steps(self) -> int:
        """Number of Stage C's steps with guidance, which take two rows."""
        if self.prior_guidance_scale <= 1:
            return 0
        start, end = (ceil(share * self.prior_steps - 1e-9) for share in self.guidance_interval)
        return end - start

    @model_validator(mode="after")
    def _check_company(self) -> Self:
        check_company(self)
        return self


def check_company(request: Any) -> None:
    """Refuse members that need another one which is absent, in a body or in a GenerationRequest.

    Raises PydanticCustomError of type `company`, with the name of the lone member.
    """

    def require(is_met: object, member: str, message: str) -> None:
        if not is_met:
            words = {"member": member, "message": f"{member} {message}"}
            raise PydanticCustomError("company", "{message}", words)

    for member in ("strength", "mask", "anchor"):
        require(getattr(request, member) is None or request.image, member, "needs image")
    require(not request.feather or request.image, "feather", "needs image")
    if request.control is not None:
        require(request.control.start < request.control.end, "control", "should start before it ends")


_SIZE = re.compile(r"([0-9]{1,6})\s*[xX×*]\s*([0-9]{1,6})")


def parse_size(size: str) -> tuple[int, int] | None:
    """Parse `WIDTHxHEIGHT` into width and height, `auto` into None. Raises InvalidRequest."""
    if size.strip().lower() == "auto":
        return None
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise InvalidRequest("size must be auto or WIDTHxHEIGHT, such as 1024x1024", param="size")
    return int(match[1]), int(match[2])


def check_size(width: int, height: int, *, max_pixels: int, param: str, step: int = SIDE_STEP) -> None:
    """Raise InvalidRequest for a size that is not allowed, before anything is allocated."""
    for name, side in (("width", width), ("height", height)):
        try:
            _check_side(side, step)
        except ValueError as error:
            named = f"the {name} of size" if param == "size" else name
            raise InvalidRequest(f"{named} {error}".replace("should", "must"), param=param) from None
    if width * height > max_pixels:
        raise InvalidRequest(
            f"width times height must be at most {max_pixels}, not {width * height}", param=param
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"the sides must be within 1:{MAX_ASPECT} to {MAX_ASPECT}:1, not {width}:{height}", param=param
        )


def fit_size(width: int, height: int, *, max_pixels: int, step: int = SIDE_STEP) -> tuple[int, int]:
    """Return the allowed size for a picture of any size: its own where that is allowed.

    A picture that is too large or too small is scaled, and one that is too long is cut, as in `cascade`.
    """
    width, height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    scale = min(1.0, MAX_SIDE / max(width, height), (max_pixels / (width * height)) ** 0.5)
    scale = max(scale, MIN_SIDE / min(width, height))
    sides = [_near_side(scale * side, step) for side in (width, height)]
    while sides[0] * sides[1] > max_pixels or max(sides) > MAX_ASPECT * min(sides):  # by the rounding
        sides[sides.index(max(sides))] -= step
    return sides[0], sides[1]


def other_side(side: int, ratio: float, step: int = SIDE_STEP) -> int:
    """Return the allowed side nearest to `side` times `ratio`."""
    return _near_side(side * ratio, step)


def _near_side(side: float, step: int) -> int:
    return min(max(round(side / step) * step, MIN_SIDE), MAX_SIDE)


def choose_seeds(seed: int | None, num_images: int) -> tuple[int, ...]:
    """Return one seed per picture: seed + i modulo 2^32, from a random start for None and -1."""
    first = secrets.randbelow(MAX_SEED + 1) if seed is None or seed == -1 else seed
    return tuple((first + i) % (MAX_SEED + 1) for i in range(num_images))
