"""The request bodies of the contracts: their members, and the various forms in which callers send them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, HttpUrl, field_validator, model_validator
from pydantic_core import PydanticCustomError

from app.api.mistakes import CODES, validated
from app.api.sources import ControlBody, ImagePromptMember, Picture, Source, parse_source
from app.api.values import present
from app.errors import InvalidRequest, UnsupportedParameter
from app.jobs.job import JobStatus, OnDisconnect, Webhook
from app.schemas import (
    MAX_EDIT_PICTURES,
    MAX_IMAGE_PROMPTS,
    MAX_LORAS,
    Anchor,
    DecoderGuidance,
    DecoderSteps,
    Feather,
    Interval,
    LoRA,
    Number,
    NumImages,
    NumPreviews,
    OutputFormat,
    Preset,
    PriorGuidance,
    PriorSteps,
    Prompt,
    Quality100,
    Sampler,
    Seed,
    Share,
    Side,
    check_company,
)

OpenAIBody = TypeVar("OpenAIBody", bound="ImageGenerationBody")

ResponseFormat = Literal["url", "b64_json"]
Priority = Annotated[int, Field(ge=-10, le=10), Number]
DeadlineSeconds = Annotated[int, Field(ge=1, le=86_400), Number]
MetadataText = Annotated[str, Field(max_length=512)]

WebhookType = Literal["image.job.started", "image.job.succeeded", "image.job.failed", "image.job.canceled"]
WEBHOOK_TYPES: dict[WebhookType, tuple[JobStatus, ...]] = {
    "image.job.started": (JobStatus.RUNNING,),
    "image.job.succeeded": (JobStatus.SUCCEEDED,),
    "image.job.failed": (JobStatus.FAILED, JobStatus.EXPIRED),
    "image.job.canceled": (JobStatus.CANCELED,),
}
_ENDS: tuple[WebhookType, ...] = ("image.job.succeeded", "image.job.failed", "image.job.canceled")

_EMPTY: tuple[object, ...] = (None, False, "", "false", [], {})


def _usual_name(output_format: object) -> object:
    """JPEG and jpg are jpeg."""
    name = output_format.lower() if isinstance(output_format, str) else output_format
    return "jpeg" if name == "jpg" else name


class GenerationMembers(BaseModel):
    """Members of every contract's body: what to draw, and how to treat the job."""

    prompt: Prompt = Field(
        description="What the picture shows; may be blank only with `image_prompts`, or with `strength` 0",
        examples=["a red circle on a blue background"],
    )
    model: str | None = Field(
        None, description="A name of `/v1/models`, or an alias; absent: the model served"
    )
    negative_prompt: Prompt = Field("", description="What the picture does not show")
    width: Side | None = Field(
        None, description="Absent: that of `image` or of the control picture, or else of the native size"
    )
    height: Side | None = None
    seed: Seed | None = Field(None, description="-1 or absent: random. Picture i uses seed + i")
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=10)] | None = Field(
        None, description="Instead of `seed`: one for each picture"
    )
    prior_guidance_scale: PriorGuidance = Field(4.0, description="1 and less turn guidance off")
    decoder_guidance_scale: DecoderGuidance = 0.0
    preset: Preset = Field("official", description="Sampling as the official code does it, or as diffusers")
    sampler: Sampler = "ddpm"
    output_format: Annotated[OutputFormat, BeforeValidator(_usual_name)] = "png"
    embed_metadata: bool = Field(False, description="Write prompt, seed and settings into the file")
    priority: Priority = Field(0, description="Among the jobs of one key; higher goes first")
    deadline_seconds: DeadlineSeconds | None = Field(
        None, description="Not finished by then: the job is `expired`"
    )
    on_disconnect: OnDisconnect = Field(
        "cancel", description="What becomes of the work when the waiting caller leaves"
    )

    image: Picture | None = Field(
        None, description="The picture to start from; what is transparent in it is painted anew"
    )
    strength: Share | None = Field(
        None,
        description="0 keeps the picture as the model sees it, 1 does not look at it. "
        "Absent: 0.75, and 1 where a mask or an anchor says what is painted anew",
    )
    mask: Picture | None = Field(
        None, description="As large as `image`: white, or what is transparent, is painted anew"
    )
    feather: Feather = Field(0, description="Pixels over which the new part fades into the old")
    anchor: Anchor | None = Field(
        None, description="Where `image` stands on a canvas of `width` x `height`; the rest is painted"
    )
    image_prompts: Annotated[list[ImagePromptMember], Field(max_length=MAX_IMAGE_PROMPTS)] = Field(
        [], description="Pictures as prompts, with or without words"
    )
    control: ControlBody | None = Field(None, description="A picture that says where things are")
    loras: Annotated[list[LoRA], Field(max_length=MAX_LORAS)] = Field(
        [], description="Installed ones: see `GET /api/v1/loras`"
    )
    guidance_interval: Interval = Field(
        (0.0, 1.0), description="The share of the prior's run in which guidance is on"
    )
    weighted_prompt: bool = Field(False, description="`(word:1.3)` in a prompt is a weight")
    long_prompt: bool = Field(False, description="Read prompts beyond the encoder's window, by chunks")

    @model_validator(mode="after")
    def _check_company(self) -> Self:
        if not (self.prompt.strip() or self.image_prompts or (self.image and self.strength == 0)):
            message = "prompt should not be blank"
            raise PydanticCustomError("company", "{message}", {"member": "prompt", "message": message})
        check_company(self)
        return self

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and -1 in seeds:
            raise ValueError("should be given each, and not -1")
        return seeds


class ImageGenerationBody(GenerationMembers):
    """Body of `POST /v1/images/generations`: OpenAI's members and the native ones. Others are ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})

    n: NumImages = Field(1, description="Number of pictures; also `num_images_per_prompt`")
    size: str = Field(
        "auto", description="`WIDTHxHEIGHT` or `auto`, the native size; `width` and `height` win"
    )
    quality: Literal["auto", "low", "medium", "standard", "high", "hd", "xhigh", "max"] = Field(
        "auto", description="Chooses the steps; explicit steps win"
    )
    response_format: ResponseFormat | None = Field(
        None, description="When absent: `url` for models named `dall-e-*`, else `b64_json`"
    )
    output_compression: Annotated[int, Field(ge=0, le=100), Number] = Field(
        100, description="Quality of JPEG and WebP; 100 is treated as 95"
    )
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = Field(False, description="Answer with server-sent events")
    partial_images: NumPreviews = Field(0, description="Previews in a stream, at most")
    prior_num_inference_steps: PriorSteps | None = Field(
        None, description="Also `num_inference_steps`, `steps`"
    )
    prior_guidance_scale: PriorGuidance = Field(
        4.0, description="Also `guidance_scale`, `cfg`; 1 and less turn guidance off"
    )
    decoder_num_inference_steps: DecoderSteps | None = None
    output_quality: Quality100 | None = Field(None, description="Instead of `output_compression`")

    @property
    def ignored(self) -> list[str]:
        """Names of the members that are ignored."""
        return sorted(self.model_extra or {})

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        _check_number_of_seeds(self.seed, self.seeds, self.n)
        return self


class ImageEditBody(ImageGenerationBody):
    """Body of `POST /v1/images/edits`: that of a generation, and the picture to edit."""

    size: str = Field(
        "auto",
        description="`WIDTHxHEIGHT`, which pictures are scaled and cut to, or `auto`: that of the first",
    )
    image: Picture = Field(description="The picture to edit; further ones are image prompts")
    image_prompts: Annotated[list[ImagePromptMember], Field(max_length=MAX_EDIT_PICTURES - 1)] = Field(
        [], description="Pictures as prompts, with or without words"
    )


class ImageVariationBody(ImageGenerationBody):
    """Body of `POST /v1/images/variations`: a picture, which becomes the one image prompt."""

    prompt: Prompt = Field("", description="None is needed")
    size: str = Field("auto", description="`WIDTHxHEIGHT`, or `auto`: that of the picture")


class WebhookBody(BaseModel):
    """A receiver to call about a job."""

    model_config = ConfigDict(extra="forbid")

    url: HttpUrl = Field(
        description="Where the job is posted to, signed as Standard Webhooks has it: at a public address, "
        "or one that this server allows",
        examples=["https://service.example/hook"],
    )
    events: Annotated[list[WebhookType], Field(min_length=1, max_length=len(WEBHOOK_TYPES))] = Field(
        list(_ENDS), description="Of what; a job that is `expired` is told as failed"
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: HttpUrl) -> HttpUrl:
        if url.username or url.password:
            raise ValueError("should have no user name and password: the signature says who calls")
        return url

    def target(self, base: str) -> Webhook:
        """Return the webhook as the job stores it; `base` is the base of this server's URLs."""
        statuses = dict.fromkeys(status for name in self.events for status in WEBHOOK_TYPES[name])
        return Webhook(url=str(self.url), statuses=tuple(statuses), base=base)


def _as_webhook(value: object) -> object:
    """Wrap a bare URL, which is told only how the job ended."""
    return {"url": value} if isinstance(value, str) else value


WebhookMember = Annotated[
    WebhookBody, BeforeValidator(_as_webhook, json_schema_input_type=WebhookBody | HttpUrl)
]


class NativeImageBody(GenerationMembers):
    """Body of `POST /api/v1/images`. A member that is not listed is an error."""

    model_config = ConfigDict(extra="forbid")

    num_images_per_prompt: NumImages | None = Field(
        None, description="Number of pictures; absent: that of `seeds`, or 1"
    )
    prior_num_inference_steps: PriorSteps = 20
    decoder_num_inference_steps: DecoderSteps = 10
    output_quality: Quality100 = Field(90, description="Of JPEG and WebP")
    response_format: ResponseFormat | None = Field(
        None,
        description="When absent: `b64_json` for callers that wait, else `url`, as a job that is asked for "
        "later always has",
    )
    previews: NumPreviews = Field(0, description="Previews in its events, at most")
    user: Annotated[str, Field(max_length=256)] = Field("", description="Not used")
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], MetadataText], Field(max_length=16)] = (
        Field({}, description="Given back with the job")
    )
    webhook: WebhookMember | None = Field(
        None, description="Whom to tell what became of the job, which is not waited for then"
    )

    @property
    def num_images(self) -> int:
        """Number of pictures to make."""
        return self.num_images_per_prompt or len(self.seeds or [0])

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        _check_number_of_seeds(self.seed, self.seeds, self.num_images)
        return self


def _check_number_of_seeds(seed: int | None, seeds: list[int] | None, num_images: int) -> None:
    if seeds is None:
        return
    if seed is not None:
        raise PydanticCustomError("seeds", "seeds and seed should not both be given")
    if len(seeds) != num_images:
        raise PydanticCustomError(
            "seeds", "seeds should be one for each of the {number} pictures", {"number": num_images}
        )


ALIASES = {
    "num_images_per_prompt": "n",
    "num_inference_steps": "prior_num_inference_steps",
    "steps": "prior_num_inference_steps",
    "guidance_scale": "prior_guidance_scale",
    "cfg": "prior_guidance_scale",
}


def parse_image_generation(members: Mapping[str, Any]) -> ImageGenerationBody:
    """Check the body of OpenAI's contract. None and empty strings count as absent."""
    return _parse_openai(ImageGenerationBody, members, {})


def parse_image_edit(members: Mapping[str, Any]) -> ImageEditBody:
    """Check the body of an edit: the first picture is edited, the others are image prompts."""
    first, *others = _given_pictures(members, MAX_EDIT_PICTURES)
    given = {name: value for name, value in members.items() if name not in ("image", "images")}
    prompts = given.get("image_prompts") or []
    if others and isinstance(prompts, list):
        given["image_prompts"] = [*({"image": other} for other in others), *prompts]
        if 1 + len(others) + len(prompts) > MAX_EDIT_PICTURES:
            message = f"image and image_prompts must be at most {MAX_EDIT_PICTURES} pictures together"
            raise InvalidRequest(message, param="image")
    mask = given.get("mask")
    if isinstance(mask, Mapping) and "image_url" in mask:
        given["mask"] = mask["image_url"]
    return _parse_openai(
        ImageEditBody, {**given, "image": first}, {"image_prompts": "image"} if others else {}
    )


def parse_image_variation(members: Mapping[str, Any]) -> ImageVariationBody:
    """Check the body of a variation."""
    [picture] = _given_pictures(members, 1)
    given = {name: value for name, value in members.items() if name not in ("image", "images")}
    given["image_prompts"] = [{"image": picture}]
    return _parse_openai(ImageVariationBody, given, {"image_prompts": "image"})


def _given_pictures(members: Mapping[str, Any], most: int) -> list[Source]:
    """Return the pictures given as `image`, once or several times, or as `images` in JSON."""
    if members.get("image") not in _EMPTY and members.get("images") not in _EMPTY:
        raise InvalidRequest("give image or images, not both", param="images")
    name = "image" if members.get("image") not in _EMPTY else "images"
    given = members.get(name)
    if given in _EMPTY:
        raise InvalidRequest("image is required", param="image", code="missing_required_parameter")
    pictures = given if isinstance(given, list) else [given]
    if len(pictures) > most:
        allowed = "one picture" if most == 1 else f"1 to {most} pictures"
        raise InvalidRequest(f"image must be {allowed}, not {len(pictures)}", param="image")
    return [given_picture(picture, name) for picture in pictures]


def given_picture(given: object, name: str) -> Source:
    """Return the picture in the member `name`. Raises InvalidRequest for what cannot be one."""
    if isinstance(given, Mapping) and "image_url" in given:
        given = given["image_url"]
    try:
        return parse_source(given, name)
    except PydanticCustomError as error:
        message = f"{name} {error.message()}".replace("should", "must", 1)
        raise InvalidRequest(message, param=name, code=CODES[error.type]) from None


def _parse_openai(kind: type[OpenAIBody], members: Mapping[str, Any], sent_as: dict[str, str]) -> OpenAIBody:
    if members.get("webhook") not in _EMPTY:  # it would never be called
        raise UnsupportedParameter("webhook is a member of POST /api/v1/images only", param="webhook")
    if members.get("background") == "transparent":
        raise UnsupportedParameter("background must be auto or opaque", param="background")
    given = {
        name: value
        for name, value in present(members).items()
        if value != "" and name != "webhook" and (name, value) != ("seeds", [])
    }
    if members.get("prompt") == "":
        given["prompt"] = ""
    sent_as = {**{name: name for name in given}, **sent_as}
    for alias, name in ALIASES.items():
        if alias in given and name not in given:
            given[name] = given.pop(alias)
            sent_as[name] = alias
    _allow_no_prompt(given)
    return validated(kind, given, sent_as)


def parse_native(members: Mapping[str, Any]) -> NativeImageBody:
    """Check the body of the native contract. None counts as absent."""
    given = present(members)
    _allow_no_prompt(given)
    return validated(NativeImageBody, given, {})


def _allow_no_prompt(given: dict[str, Any]) -> None:
    """Let the prompt be absent, not only empty, where a picture takes its place."""
    is_kept = given.get("image") is not None and str(given.get("strength")) in ("0", "0.0")
    if given.get("image_prompts") or is_kept:
        given.setdefault("prompt", "")
