"""What travels over HTTP. `GenerationRequest` is validated once, at the door, and never changes after.

Every contract translates its own body into one `GenerationRequest`; the engine knows nothing else.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
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


_Number = BeforeValidator(_refuse_boolean)  # pydantic would read `true` as 1

NumImages = Annotated[int, Field(ge=1, le=10), _Number]
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), _Number]
Side = Annotated[
    int,
    Field(json_schema_extra={"minimum": MIN_SIDE, "maximum": MAX_SIDE, "multipleOf": SIDE_STEP}),
    AfterValidator(_check_side),
    _Number,
]
PriorSteps = Annotated[int, Field(ge=1, le=100), _Number]
PriorGuidance = Annotated[float, Field(ge=0.0, le=20.0), _Number]
DecoderSteps = Annotated[int, Field(ge=1, le=60), _Number]
DecoderGuidance = Annotated[float, Field(ge=0.0, le=10.0), _Number]
Quality100 = Annotated[int, Field(ge=1, le=100), _Number]
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


class ImageGenerationBody(BaseModel):
    """Body of `POST /v1/images/generations`: OpenAI's members and the native ones. Others are ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})

    prompt: Prompt = Field(
        description="What the picture shows; not blank",
        examples=["a red circle on a blue background"],
        json_schema_extra={"pattern": r"\S"},
    )
    model: str | None = Field(
        None, description="A name of `/v1/models`, or an alias; absent: the model served"
    )
    n: NumImages = Field(1, description="Number of pictures; also `num_images_per_prompt`")
    size: str = Field("auto", description="`WIDTHxHEIGHT` or `auto`, the native size of the model")
    quality: Literal["auto", "low", "medium", "standard", "high", "hd", "xhigh", "max"] = Field(
        "auto", description="Chooses the steps; explicit steps win"
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="When absent: `url` for models named `dall-e-*`, else `b64_json`"
    )
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100), _Number] = Field(
        100, description="Quality of JPEG and WebP; 100 is treated as 95"
    )
    background: Literal["auto", "opaque"] = "auto"

    negative_prompt: Prompt = Field("", description="What the picture does not show")
    width: Side | None = Field(None, description="With `height`, instead of `size`")
    height: Side | None = None
    seed: Seed | None = Field(None, description="-1 or absent: random. Picture i uses seed + i")
    prior_num_inference_steps: PriorSteps | None = Field(
        None, description="Also `num_inference_steps`, `steps`"
    )
    prior_guidance_scale: PriorGuidance = Field(
        4.0, description="Also `guidance_scale`, `cfg`; 1 and less turn guidance off"
    )
    decoder_num_inference_steps: DecoderSteps | None = None
    decoder_guidance_scale: DecoderGuidance = 0.0
    preset: Preset = "official"
    sampler: Sampler = "ddpm"
    output_quality: Quality100 | None = Field(None, description="Instead of `output_compression`")
    embed_metadata: bool = Field(False, description="Write prompt, seed and settings into the file")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("should not be blank")
        return prompt

    @property
    def ignored(self) -> list[str]:
        """Names of the members that mean nothing here."""
        return sorted(self.model_extra or {})


class ModelView(BaseModel):
    """A model as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 1707868800  # the day of the release of Stable Cascade
    owned_by: str


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelView]


ALIASES = {
    "num_images_per_prompt": "n",
    "num_inference_steps": "prior_num_inference_steps",
    "steps": "prior_num_inference_steps",
    "guidance_scale": "prior_guidance_scale",
    "cfg": "prior_guidance_scale",
}


def parse_image_generation(members: Mapping[str, Any]) -> ImageGenerationBody:
    """Check a decoded JSON object. None and an empty text count as absent; the first error is raised."""
    given = {name: value for name, value in members.items() if value is not None and value != ""}
    if "prompt" in members and members["prompt"] == "":
        given["prompt"] = ""
    sent_as = {name: name for name in given}
    for alias, name in ALIASES.items():
        if alias in given and name not in given:
            given[name] = given.pop(alias)
            sent_as[name] = alias
    try:
        return ImageGenerationBody.model_validate(given)
    except ValidationError as error:
        raise _invalid_request(error, sent_as) from None


_CODES = {
    "not_a_number": "invalid_type",
    "missing": "missing_required_parameter",
    "string_type": "invalid_type",
    "int_type": "invalid_type",
    "int_parsing": "invalid_type",
    "int_from_float": "invalid_type",
    "float_type": "invalid_type",
    "float_parsing": "invalid_type",
    "bool_type": "invalid_type",
    "bool_parsing": "invalid_type",
}


def _invalid_request(error: ValidationError, sent_as: Mapping[str, str]) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False)[0]
    name = str(problem["loc"][0])
    name = sent_as.get(name, name)
    kind = problem["type"]
    if kind == "missing":
        return InvalidRequest(f"{name} is required", param=name, code=_CODES[kind])
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    code = _CODES.get(kind, "invalid_value")
    bounds = problem.get("ctx", {}).values()
    if kind in ("greater_than_equal", "less_than_equal") and all(isinstance(bound, int) for bound in bounds):
        code = "integer_out_of_range"
    return InvalidRequest(f"{name} {message.replace('should', 'must', 1)}", param=name, code=code)


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
