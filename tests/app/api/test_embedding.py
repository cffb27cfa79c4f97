"""Pictures in JSON: as they are in the files, in parts, and no faster than they are taken."""

import asyncio
import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.api.embedding import PART_BYTES, Embedding
from app.errors import DamagedFile, NotFound
from app.jobs.job import StoredImage
from app.storage.images import ImageStore
from tests.app.jobs.stores import new_image
from tests.app.pictures import kept

pytestmark = pytest.mark.anyio


SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


class Shelf:
    """Pictures, and how often parts of them were read."""

    def __init__(self, folder: Path) -> None:
        self.images = ImageStore(folder, 1000)
        self.storage = ThreadPoolExecutor(1)
        self.num_reads = 0
        read_part = self.images.read_part

        def counted(name: str, start: int, num_bytes: int) -> bytes:
            self.num_reads += 1
            return read_part(name, start, num_bytes)

        self.images.read_part = counted  # type: ignore[method-assign]

    def put(self, content: bytes) -> StoredImage:
        return new_image(name=kept(self.images, content, "png"))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


class Reader:
    """Takes what is sent, as long as it may."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await self.goes_on.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def receive() -> Any:
    await asyncio.Event().wait()


def content(num_bytes: int) -> bytes:
    return (bytes(range(251)) * (num_bytes // 251 + 1))[:num_bytes]


@pytest.mark.parametrize(
    "sizes",
    [(1,), (2,), (3, 4), (PART_BYTES - 1,), (PART_BYTES, 5), (PART_BYTES + 1, 3 * PART_BYTES + 2), ()],
    ids=str,
)
async def test_the_pictures_are_those_of_the_files(shelf: Shelf, sizes: tuple[int, ...]) -> None:
    embedding, reader = Embedding(), Reader()
    shown = [embedding.base64_of(shelf.put(content(size))) for size in sizes]
    text = json.dumps({"prompt": 'a "circle", й', "pictures": shown, "end": True}).encode()
    response = await embedding.respond(text, shelf.images, shelf.storage, {"X-Job-Id": "7"})
    await response(SCOPE, receive, reader.send)
    told = json.loads(reader.body)
    assert (told["prompt"], told["end"]) == ('a "circle", й', True)
    assert [base64.b64decode(picture, validate=True) for picture in told["pictures"]] == [
        content(size) for size in sizes
    ]
    assert response.headers["content-length"] == str(len(reader.body))
    assert (response.headers["content-type"], response.headers["x-job-id"]) == ("application/json", "7")


async def test_what_is_not_taken_is_not_read(shelf: Shelf) -> None:
    embedding, reader = Embedding(), Reader()
    text = embedding.base64_of(shelf.put(content(20 * PART_BYTES))).encode()
    response = await embedding.respond(text, shelf.images, shelf.storage, {})
    reader.goes_on.clear()
    sending = asyncio.ensure_future(response(SCOPE, receive, reader.send))
    await asyncio.sleep(0.05)
    assert (len(reader.sent), shelf.num_reads) == (1, 0)
    reader.goes_on.set()
    await sending
    assert shelf.num_reads == 20
    assert max(len(message.get("body", b"")) for message in reader.sent) == PART_BYTES * 4 // 3


async def test_a_picture_that_cannot_be_sent_is_known_before_anything_is(
    shelf: Shelf, tmp_path: Path
) -> None:
    for spoil, error in ((Path.unlink, NotFound), (lambda path: path.write_bytes(b"torn"), DamagedFile)):
        embedding, image = Embedding(), shelf.put(content(1000))
        text = embedding.base64_of(image).encode()
        spoil(tmp_path / image.name)
        with pytest.raises(error):
            await embedding.respond(text, shelf.images, shelf.storage, {})


async def test_a_picture_that_is_removed_meanwhile_ends_the_answer(shelf: Shelf, tmp_path: Path) -> None:
    embedding, image, reader = Embedding(), shelf.put(content(1000)), Reader()
    response = await embedding.respond(embedding.base64_of(image).encode(), shelf.images, shelf.storage, {})
    (tmp_path / image.name).unlink()
    with pytest.raises(NotFound):
        await response(SCOPE, receive, reader.send)
    assert all(message["more_body"] for message in reader.sent[1:]), "for the client an answer that was cut"
