"""Finished pictures by signed URL: no key is needed, and URLs cannot be listed or guessed."""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from app.api.deps import Services, TheServices
from app.api.description import MEANINGS, PICTURE_CONTENT, problems
from app.errors import RangeNotSatisfiable
from app.storage.encoding import MIME_TYPES

router = APIRouter(tags=["Files"])

_CHUNK_BYTES = 64 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get(
    "/files/{name}",
    operation_id="getFile",
    summary="A finished picture",
    response_class=Response,
    responses={
        200: {"description": "The picture", "content": PICTURE_CONTENT},
        206: {"description": "The range asked for", "content": PICTURE_CONTENT},
        304: {"description": MEANINGS[304]},
        **problems(400, 403, 404, 410, 416),
    },
)
@router.head("/files/{name}", include_in_schema=False)
async def get_file(
    name: str,
    request: Request,
    services: TheServices,
    exp: Annotated[str, Query(description="End of the URL's life, Unix seconds")] = "",
    sig: Annotated[str, Query(description="HMAC-SHA256 of name and end")] = "",
    download: Annotated[str, Query(description="`1` makes browsers save the picture")] = "",
) -> Response:
    """Return the picture to any holder of its URL, until the URL expires or the picture is removed."""
    seconds_left = services.signer.verify(name, exp, sig)
    image = await asyncio.get_running_loop().run_in_executor(services.storage, services.images.examine, name)
    etag = f'"{image.sha256}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"private, max-age={seconds_left}, immutable",
        "X-Content-Type-Options": "nosniff",
        "Accept-Ranges": "bytes",
    }
    if download not in ("", "0"):
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
    media_type = MIME_TYPES[name.rpartition(".")[2]]
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    start, end = _range(request, etag, image.size_bytes)
    headers["Content-Length"] = str(end - start)
    if end - start < image.size_bytes:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{image.size_bytes}"
    status = 206 if "Content-Range" in headers else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(_chunks(services, name, start, end), status, headers, media_type)


def _matches(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or "*" in tags


def _range(request: Request, etag: str, size: int) -> tuple[int, int]:
    """Return first byte and one after the last. Several ranges, or unknown units, mean the whole file."""
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if match is None or match[0] == "bytes=-" or request.headers.get("if-range", etag) != etag:
        return 0, size
    if not match[1]:
        start, end = max(size - int(match[2]), 0), size
    else:
        start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    if start >= end:
        raise RangeNotSatisfiable(f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, end


async def _chunks(services: Services, name: str, start: int, end: int) -> AsyncIterator[bytes]:
    """Yield the bytes. The file is closed between chunks: the client may take hours, or disconnect."""
    loop = asyncio.get_running_loop()
    while start < end:
        read = partial(services.images.read_part, name, start, min(_CHUNK_BYTES, end - start))
        chunk = await loop.run_in_executor(services.storage, read)
        start += len(chunk)
        yield chunk
