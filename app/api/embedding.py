"""JSON answers with pictures in base64, which are read and encoded while they are sent.

What a slow client has not read yet is on disk and not in memory, however many pictures it asked for.
"""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor

from starlette.responses import StreamingResponse

from app.jobs.job import StoredImage
from app.storage.images import ImageStore

PART_BYTES = 96 * 1024  # a multiple of three, so that the parts' base64 joins without padding


class Embedding:
    """The pictures of one answer, each with a placeholder in the JSON until it is sent."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)  # unguessable, so that no prompt can contain it
        self._names: list[str] = []

    def base64_of(self, image: StoredImage) -> str:
        """Return the placeholder of a picture. The calls must be in the order of the JSON."""
        self._names.append(image.name)
        return self._mark

    async def respond(
        self, text: bytes, images: ImageStore, storage: Executor, headers: Mapping[str, str]
    ) -> StreamingResponse:
        """Answer `text` with the pictures filled in; `storage` is where they are read.

        Raises NotFound or DamagedFile for a missing one.
        """
        loop = asyncio.get_running_loop()
        found = [await loop.run_in_executor(storage, images.examine, name) for name in self._names]
        sizes = [image.size_bytes for image in found]
        pieces = text.split(self._mark.encode())
        length = sum(map(len, pieces)) + sum((size + 2) // 3 * 4 for size in sizes)
        return StreamingResponse(
            self._parts(pieces, sizes, images, storage),
            headers={**headers, "Content-Length": str(length)},
            media_type="application/json",
        )

    async def _parts(
        self, pieces: Sequence[bytes], sizes: Sequence[int], images: ImageStore, storage: Executor
    ) -> AsyncIterator[bytes]:
        """Yield the pieces of the JSON, and between them the pictures."""

        def encode(name: str, start: int, num_bytes: int) -> bytes:
            return base64.b64encode(images.read_part(name, start, num_bytes))

        loop = asyncio.get_running_loop()
        for piece, name, size in zip(pieces[:-1], self._names, sizes, strict=True):
            yield piece
            for start in range(0, size, PART_BYTES):
                num_bytes = min(PART_BYTES, size - start)
                yield await loop.run_in_executor(storage, encode, name, start, num_bytes)
        yield pieces[-1]
