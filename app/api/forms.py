"""`multipart/form-data` as the members of a request, with the same names and rules as in JSON.

Numbers and booleans are text, structured members are JSON text, pictures are file parts. `params` may hold a
whole JSON object, whose members the single fields override.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.bodies import ALIASES, ImageEditBody, NativeImageBody
from app.api.deps import TheServices, bounded_stream, read_json_object, refuse_compressed
from app.api.sources import Source
from app.api.values import LONG_BYTES, parse_json, require_few
from app.errors import InvalidRequest, UnsupportedMediaType
from app.storage.writing import room_for

MAX_FILES = 32
MAX_FIELDS = 200
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")  # some of Python's other codecs take minutes for a megabyte

STRUCTURED = ("image_prompts", "control", "loras", "seeds", "metadata", "guidance_interval", "webhook")
LISTS = ("image_prompts", "loras", "seeds", "guidance_interval")  # always lists, even of one value
ONCE = {*NativeImageBody.model_fields, *ImageEditBody.model_fields, *ALIASES} - {*LISTS, "image"}
WITH_PICTURE = ("image_prompts", "control")  # a file part of this name is the picture of an entry
TEXTS = ("prompt", "negative_prompt")  # empty is not the same as absent

_INDEX = re.compile(r"\[[0-9]*\]$")  # one of several parts: `image[]`, or `image[0]` as PHP's curl writes it

Texts = dict[str, list[str]]
Files = dict[str, list[Source]]


class _FormParser(MultiPartParser):
    """Starlette's parser, which accepts a truncated body; `is_complete` tells whether it is whole."""

    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True


async def read_members(request: Request, services: TheServices) -> dict[str, Any]:
    """Read the body of a request for pictures, JSON or a form, no further than the limit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return await read_json_object(request, services, or_form=True)
    refuse_compressed(request)
    _refuse_other_charsets(request)
    settings = services.settings
    async with services.uploads.reading(settings.body_timeout):
        stream = bounded_stream(request, settings.max_upload_bytes)
        texts, files = await parse_form(request, stream, settings.max_body_bytes)
    if sum(len(value) for values in texts.values() for value in values) <= LONG_BYTES:
        return _members(texts, files)
    return await asyncio.get_running_loop().run_in_executor(services.encoders, _members, texts, files)


def _refuse_other_charsets(request: Request) -> None:
    """Refuse charsets other than UTF-8, since texts are decoded as the header says."""
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", CHARSETS[0])
    if charset.strip().lower() not in CHARSETS:
        raise UnsupportedMediaType("the charset of a form must be utf-8, which it also is when none is given")


async def parse_form(
    request: Request, stream: AsyncGenerator[bytes, None], max_field_bytes: int
) -> tuple[Texts, Files]:
    """Read the parts of a body from `stream`, by their names.

    Raises InvalidRequest and StorageFull.
    """
    parser = _FormParser(
        request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max_field_bytes
    )
    try:
        with room_for("the files of the form"):  # large ones pass through the temporary folder
            form = await parser.parse()
    except (MultiPartException, ValueError) as error:  # python-multipart raises ValueErrors
        raise InvalidRequest(f"the body is not valid multipart/form-data: {error}") from None
    texts: Texts = {}
    files: Files = {}
    try:
        if not parser.is_complete:
            raise InvalidRequest(
                "the body is not valid multipart/form-data: it ends without the closing boundary"
            )
        for part, value in form.multi_items():
            name = _INDEX.sub("", part)
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(Source(await value.read()))
            else:
                texts.setdefault(name, []).append(value)
    finally:
        await form.close()
    return texts, files


def _members(texts: Texts, files: Files) -> dict[str, Any]:
    """Return the members that the parts give. With long texts it runs in a thread."""
    members = _params(texts.pop("params", []))
    for name, values in texts.items():
        read = [_structured(name, value) for value in values if value or name in TEXTS]
        if len(read) > 1:
            _refuse_repeated(name, len(read))
        if len(read) > 1 or (read and name in LISTS and not isinstance(read[0], list)):
            members[name] = read
        elif read:
            members[name] = read[0]
    require_few(members)
    for name, sources in files.items():
        if len(sources) > 1:
            _refuse_repeated(name, len(sources))
        if name in WITH_PICTURE:
            members[name] = _with_pictures(name, members.get(name), sources)
        else:
            members[name] = sources[0] if len(sources) == 1 else sources
    return members


def _refuse_repeated(name: str, number: int) -> None:
    """Refuse a known member that is repeated; unknown ones are ignored, however often they come."""
    if name in ONCE:
        raise InvalidRequest(f"{name} must be given once, not {number} times", param=name)


def _params(values: list[str]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for value in filter(None, values):
        parsed = _json("params", value)
        if not isinstance(parsed, dict):
            raise InvalidRequest("params must be a JSON object", param="params", code="invalid_type")
        members |= parsed
    return members


def _structured(name: str, value: str) -> Any:
    """Parse a member as JSON if it is not plain text."""
    is_json = name in STRUCTURED or (name in ("image", "mask") and value.startswith("{"))
    return _json(name, value) if is_json and value[:1] in "[{" else value


def _json(name: str, value: str) -> Any:
    try:
        return parse_json(value.encode())
    except ValueError as error:
        message = f"{name} is not valid JSON: {error}"
        raise InvalidRequest(message, param=name, code="invalid_json") from None


def _with_pictures(name: str, given: Any, sources: list[Source]) -> Any:
    """Give each file to the first entry that has no picture yet, or else an entry of its own."""
    is_list = name != "control"
    entries = given if isinstance(given, list) else [] if given is None else [given]
    for source in sources:
        empty = (entry for entry in entries if isinstance(entry, dict) and "image" not in entry)
        entry = next(empty, None)
        if entry is None:
            entry = {}
            entries.append(entry)
        entry["image"] = source
    return entries if is_list or len(entries) != 1 else entries[0]
