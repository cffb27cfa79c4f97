"""Pictures in requests: the forms in which they may be sent, and their conversion to plain named files.

A body is validated first, with its pictures still encoded; then all are decoded, in a thread, and only then
is anything stored. Jobs refer to them by digest and size.
"""

import asyncio
import binascii
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image, ImageOps
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.api.deps import Services
from app.api.examples import PICTURE_URI
from app.errors import InvalidRequest, NotFound
from app.schemas import Control, ControlKind, ControlScale, ImagePrompt, PictureRef, Share, Weight
from app.storage.decoding import BrokenPicture, encode_picture, mask_of, opaque, transparency
from app.storage.inputs import InputStore

if TYPE_CHECKING:
    from app.api.bodies import GenerationMembers

INVALID_IMAGE = "invalid_image"
PROMPT_SIDE = 512  # shorter side of an image prompt at most: vision towers read 224 pixels
CLEARLY = 128  # an alpha channel that nowhere goes below this is not a mask

_DATA_URI = re.compile(r"data:[^,;]*(?:;[^,;]*)*?;base64,", re.IGNORECASE)
_SPACE = string.whitespace.encode()


@dataclass(frozen=True, slots=True)
class Source:
    """A picture as sent: the bytes of a file part, text in base64, or the name of one sent before."""

    content: bytes | str = field(repr=False, default=b"")
    name: str = ""  # the sha256 of a picture of an earlier job of the caller
    place: str = ""  # the caller's name for it, if not that of the native member


def parse_source(value: object, place: str = "") -> Source:
    """Return the source in a member's value. Raises PydanticCustomError if it cannot be one."""
    if isinstance(value, Source):
        return Source(value.content, value.name, place or value.place)
    if isinstance(value, dict) and set(value) <= {"sha256", "width", "height"}:
        name = value.get("sha256")
        if isinstance(name, str) and re.fullmatch(r"[0-9a-f]{64}", name):
            return Source(name=name, place=place)
    if not isinstance(value, str):
        raise PydanticCustomError(INVALID_IMAGE, "should be a picture: a data URI or base64")
    if value[:8].lower().startswith(("http://", "https://")):
        raise PydanticCustomError(
            "unsupported_url", "should be the picture itself: this server does not fetch URLs"
        )
    return Source(value, place=place)


_FORMS = "a data URI or base64 of a PNG, JPEG or WebP; in multipart bodies a file part"
Picture = Annotated[
    InstanceOf[Source],
    BeforeValidator(parse_source),
    WithJsonSchema({"type": "string", "description": _FORMS, "examples": [PICTURE_URI]}),
]


def _as_entry(value: object) -> object:
    """Wrap a bare picture as an image prompt, of weight 1."""
    is_picture = isinstance(value, str | Source) or (isinstance(value, dict) and "sha256" in value)
    return {"image": value} if is_picture else value


class ImagePromptBody(BaseModel):
    """A picture that guides as a prompt does: by what it shows, not by where."""

    model_config = ConfigDict(extra="forbid")

    image: Picture
    weight: Weight = Field(1.0, description="0 is without it")


class ControlBody(BaseModel):
    """A picture that a ControlNet follows."""

    model_config = ConfigDict(extra="forbid")

    type: ControlKind = Field(description="As far as installed: see `GET /api/v1/models`")
    image: Picture
    scale: ControlScale = Field(1.0, description="How strictly it is followed")
    start: Share = Field(0.0, description="The share of the run from which on it counts")
    end: Share = 1.0
    preprocess: bool = Field(
        True, description="False: the picture is what the network reads, such as edges already found"
    )
    faithful: bool | None = Field(
        None,
        description="The result of `super_resolution`, reduced, is the picture; false: as it was drawn. "
        "Absent: at scale 1 over the whole run",
    )


ImagePromptMember = Annotated[ImagePromptBody, BeforeValidator(_as_entry)]


@dataclass(frozen=True, slots=True)
class Received:
    """The decoded pictures of a request: the job's references to them, and the files to store."""

    image: PictureRef | None = None
    mask: PictureRef | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()
    control: Control | None = None
    prompt_size: tuple[int, int] | None = None  # of the first image prompt, as it came
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    def members(self) -> dict[str, Any]:
        """Return the references as members of a GenerationRequest."""
        return {
            "image": self.image,
            "mask": self.mask,
            "image_prompts": self.image_prompts,
            "control": self.control,
        }

    async def keep(self, services: Services) -> None:
        """Store the files, so that a job can refer to them. Raises StorageFull."""
        loop = asyncio.get_running_loop()
        for content in self.files.values():
            await loop.run_in_executor(services.storage, services.inputs.save, content)


async def receive(
    body: "GenerationMembers", services: Services, tenant: str, *, may_replay: bool
) -> Received:
    """Decode all pictures of a body. Raises InvalidRequest, naming the member that is not a picture.

    Decoding is slow: when the queue is full, Overloaded is raised before it, unless the request `may_replay`
    one that was accepted.
    """
    sources = list(_sources(body))
    if not sources:
        return Received()
    if not may_replay:
        await services.dispatcher.require_room(tenant)
    for place, source in sources:
        if source.name and not await services.store.has_input(source.name, tenant):
            raise _invalid(place, source, "must be a picture of one of your jobs that is still kept")
    return await asyncio.get_running_loop().run_in_executor(services.reader, _decoded, body, services.inputs)


def _sources(body: "GenerationMembers") -> Iterator[tuple[str, Source]]:
    """Yield all pictures of a body, each with the JSON pointer to it."""
    if body.image is not None:
        yield "/image", body.image
    if body.mask is not None:
        yield "/mask", body.mask
    for number, prompt in enumerate(body.image_prompts):
        yield f"/image_prompts/{number}/image", prompt.image
    if body.control is not None:
        yield "/control/image", body.control.image


def _decoded(body: "GenerationMembers", inputs: InputStore) -> Received:
    """Decode the pictures of a body. Runs in the reader's thread."""
    files: dict[str, bytes] = {}

    def kept(image: Image.Image) -> PictureRef:
        content = encode_picture(image)
        name = inputs.name(content)
        files[name] = content
        return PictureRef(sha256=name, width=image.width, height=image.height)

    pictures = {place: _open(place, source, inputs) for place, source in _sources(body)}
    image, mask = pictures.get("/image"), pictures.get("/mask")
    if mask is not None:
        mask = mask_of(mask)
    elif image is not None and _is_cut_out(image):
        mask = transparency(image)
    if image is not None and mask is not None and image.size != mask.size:
        sizes = f"{image.size[0]}x{image.size[1]}, but has {mask.size[0]}x{mask.size[1]}"
        assert body.mask is not None, "only a given mask can have another size"
        raise _invalid("/mask", body.mask, f"must have the size of the image, {sizes}")
    return Received(
        image=None if image is None else kept(opaque(image)),
        mask=None if mask is None else kept(mask),
        image_prompts=tuple(
            ImagePrompt(image=kept(reduced(pictures[f"/image_prompts/{i}/image"])), weight=prompt.weight)
            for i, prompt in enumerate(body.image_prompts)
        ),
        control=None if body.control is None else _control(body.control, pictures["/control/image"], kept),
        prompt_size=pictures["/image_prompts/0/image"].size if body.image_prompts else None,
        files=files,
    )


def reduced(image: Image.Image) -> Image.Image:
    """Scale an image prompt to what a vision tower can see: each picture of a job keeps it in memory."""
    image = opaque(image)
    factor = PROMPT_SIDE / min(image.size)
    if factor >= 1:
        return image
    width, height = (round(factor * side) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def mask_like(image: Source, mask: Source, inputs: InputStore, *, is_inverted: bool) -> Source:
    """Resize a mask to its picture: other programs send any size. Runs in the reader's thread."""
    size = _open("/image", image, inputs).size
    drawn = _open("/mask", mask, inputs)
    marked = drawn.getchannel("A") if drawn.mode == "RGBA" else drawn.convert("L")  # opaque counts as white
    if is_inverted:
        marked = ImageOps.invert(marked)
    if marked.size != size:
        marked = marked.resize(size, Image.Resampling.NEAREST)
    return Source(encode_picture(marked), place=mask.place)


def content_of(source: Source) -> bytes:
    """Return the bytes of a source's file. Raises InvalidRequest."""
    try:
        return _content(source.content)
    except BrokenPicture as error:
        raise _invalid("/image", source, str(error)) from None


def invalid_picture(name: str, message: str) -> InvalidRequest:
    """Return the error for the picture in a member."""
    return _invalid(f"/{name}", Source(), message)


def _control(given: ControlBody, picture: Image.Image, kept: Any) -> Control:
    """Build the control. `inpaint` fills what is transparent; other types ignore transparency."""
    image = kept(picture if given.type == "inpaint" else opaque(picture))
    return Control(image=image, **given.model_dump(exclude={"image"}))


def _is_cut_out(image: Image.Image) -> bool:
    """Return whether the transparency is intended: some of the picture is clearly transparent."""
    return image.mode == "RGBA" and any(image.getchannel("A").histogram()[:CLEARLY])


def _open(place: str, source: Source, inputs: InputStore) -> Image.Image:
    if source.name:
        try:
            image = Image.open(BytesIO(inputs.read(source.name)), formats=("PNG",))
        except NotFound:
            raise _invalid(
                place, source, "must be a picture of one of your jobs that is still kept"
            ) from None
        image.load()
        return image
    try:
        return inputs.decode(_content(source.content))
    except BrokenPicture as error:
        raise _invalid(place, source, str(error)) from None


def _content(given: bytes | str) -> bytes:
    """Return the bytes of a file, decoded from base64 if necessary. Raises BrokenPicture."""
    if isinstance(given, bytes):
        return given
    text = given
    if text[:5].lower() == "data:":
        head = _DATA_URI.match(text[:200])
        if head is None:
            raise BrokenPicture("must be a data URI with base64, as in data:image/png;base64,iVBORw0K…")
        text = text[head.end() :]
    try:
        plain = text.encode("ascii").translate(None, _SPACE).rstrip(b"=")
        return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)
    except (binascii.Error, ValueError):
        raise BrokenPicture("must be a data URI or base64") from None


def _invalid(place: str, source: Source, message: str) -> InvalidRequest:
    names = [source.place] if source.place else place.strip("/").split("/")
    words, pointer = f"{'.'.join(names)} {message}", "/" + "/".join(names)
    return InvalidRequest(words, param=names[0], code=INVALID_IMAGE, places=[(pointer, words)])
