"""Bodies that take their time, and what becomes of them when the server stops."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from app.api.uploads import Uploads
from app.errors import RequestTimeout, ShuttingDown
from tests.app.conftest import Serve, inside
from tests.app.fakes import until

pytestmark = pytest.mark.anyio
PATHS = ("/v1/images/generations", "/api/v1/images")


async def never_ending() -> AsyncIterator[bytes]:
    yield b'{"prompt":'
    await asyncio.Event().wait()


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_does_not_come_is_refused(serve: Serve, path: str) -> None:
    async with serve(body_timeout=0.05) as client:
        answer = await client.post(path, content=never_ending(), headers={"content-type": "application/json"})
        code = (answer.json().get("error") or answer.json())["code"]
        assert (answer.status_code, code, answer.headers["connection"]) == (408, "timeout", "close")


async def test_whoever_still_sends_is_told_when_the_server_stops(serve: Serve) -> None:
    async with serve(body_timeout=600) as client:
        await asyncio.wait_for(_stop_while_sending(client), 20)


async def _stop_while_sending(client: httpx2.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    sending = asyncio.ensure_future(client.post(PATHS[0], content=never_ending(), headers=headers))
    uploads = inside(client).uploads
    await until(lambda: uploads.num_open)
    uploads.close()
    answer = await sending
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert (await client.post(PATHS[1], json={"prompt": "x"})).status_code == 503


async def test_the_time_is_for_each_body() -> None:
    uploads = Uploads()
    with pytest.raises(RequestTimeout):
        async with uploads.reading(0.01):
            await asyncio.Event().wait()
    async with uploads.reading(10):
        assert uploads.num_open == 1
    assert uploads.num_open == 0
    uploads.close()
    with pytest.raises(ShuttingDown):
        async with uploads.reading(10):
            await asyncio.sleep(1)
