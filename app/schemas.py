"""The request that every contract's body becomes: validated once, at the door, and never changed after.

The engine knows nothing else. The bodies themselves are in `app/api/bodies.py`; they share the types here.
"""

import re
import secrets
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from app.errors import InvalidRequest

MAX_SEED = 2**32 - 1
MAX_PROMPT_CHARACTERS = 32_000
MIN_SIDE, MAX_SIDE, SIDE_STEP, MAX_ASPECT = 64, 4096, 8, 4

OutputFormat = Literal["png", "jpeg", "webp"]
Preset = Literal["official", "diffusers"]
Sampler = Literal["ddpm", "ddim", "lcm"]


def _refuse_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "should be a number")
    return value


def _check_side(side: int) -> int:
    if not MIN_SIDE <= side <= MAX_SIDE or side % SIDE_STEP:
        raise ValueError(f"should be a multiple of {SIDE_STEP} from {MIN_SIDE} to {MAX_SIDE}, not {side}")
    return side


Number = BeforeValidator(_refuse_boolean)  # pydantic would read `true` as 1

NumImages = Annotated[int, Field(ge=1, le=10), Number]
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), Number]
Side = Annotated[
    int,
    Field(json_schema_extra={"minimum": MIN_SIDE, "maximum": MAX_SIDE, "multipleOf": SIDE_STEP}),
    AfterValidator(_check_side),
    Number,
]
PriorSteps = Annotated[int, Field(ge=1, le=100), Number]
PriorGuidance = Annotated[float, Field(ge=0.0, le=20.0), Number]
DecoderSteps = Annotated[int, Field(ge=1, le=60), Number]
DecoderGuidance = Annotated[float, Field(ge=0.0, le=10.0), Number]
Quality100 = Annotated[int, Field(ge=1, le=100), Number]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class GenerationRequest(BaseModel):
    """What to make: with all defaults filled in, so that the same request gives the same pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt
    negative_prompt: Prompt = ""
    width: Side
    height: Side
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

    @property
    def num_images(self) -> int:
        """Pictures to make."""
        return len(self.seeds)


_SIZE = re.compile(r"([0-9]{1,6})\s*[xX×*]\s*([0-9]{1,6})")


def parse_size(size: str) -> tuple[int, int] | None:
    """Width and height of `WIDTHxHEIGHT`, None for `auto`."""
    if size.strip().lower() == "auto":
        return None
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise InvalidRequest("size must be auto or WIDTHxHEIGHT, such as 1024x1024", param="size")
    return int(match[1]), int(match[2])


def check_size(width: int, height: int, *, max_pixels: int, param: str) -> None:
    """Refuse what no model may be asked for. The product is checked before anything is allocated."""
    for name, side in (("width", width), ("height", height)):
        try:
            _check_side(side)
        except ValueError as error:
            raise InvalidRequest(f"{name} {error}".replace("should", "must"), param=param) from None
    if width * height > max_pixels:
        raise InvalidRequest(
            f"width times height must be at most {max_pixels}, not {width * height}", param=param
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"the sides must be within 1:{MAX_ASPECT} to {MAX_ASPECT}:1, not {width}:{height}", param=param
        )


def choose_seeds(seed: int | None, num_images: int) -> tuple[int, ...]:
    """One seed for each picture: seed + i modulo 2^32, from a random start for None and -1."""
    first = secrets.randbelow(MAX_SEED + 1) if seed is None or seed == -1 else seed
    return tuple((first + i) % (MAX_SEED + 1) for i in range(num_images))
