"""Slow clients hurt only themselves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fastapi import FastAPI

from app.api.connections import configure, protocol
from app.settings import Settings

pytestmark = pytest.mark.anyio


HEAD_SECONDS = 0.05


async def hello(scope: dict[str, object], receive: object, send: object) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(4 * HEAD_SECONDS)
    if scope["path"] == "/refused":
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})  # type: ignore[operator]
        await send({"type": "http.response.body"})  # type: ignore[operator]
        return
    await send({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body"})  # type: ignore[operator]


@asynccontextmanager
async def connected(
    header_seconds: float,
    rest_seconds: float = 30.0,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(
        hello, http=protocol(header_seconds, rest_seconds), lifespan="off", log_config=None, port=0
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.shutdown()


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nSlow: "])
async def test_a_head_that_does_not_come_closes_the_connection(begun: bytes) -> None:
    async with connected(HEAD_SECONDS) as (reader, writer):
        writer.write(begun)
        async with asyncio.timeout(5):
            assert await reader.read() == b""


async def test_every_head_has_its_time_and_no_more() -> None:
    async with connected(0.3) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(5):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(b"GET / HT")
        async with asyncio.timeout(3):
            assert await reader.read() == b""


async def test_once_the_head_is_there_the_rest_may_take_its_time() -> None:
    async with connected(HEAD_SECONDS) as (reader, writer):
        writer.write(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")


async def test_a_body_that_was_refused_may_be_sent_to_its_end() -> None:
    """To close before would be a reset, in which most clients lose the answer."""
    async with connected(1.0) as (reader, writer):
        for _ in range(2):
            writer.write(b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
            for _ in range(50):
                writer.write(b"x" * 100_000)
                await writer.drain()
            async with asyncio.timeout(5):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")


async def test_but_not_for_ever() -> None:
    async with connected(1.0, rest_seconds=0.2) as (reader, writer):
        writer.write(b"POST /refused HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionError):
                await send_for_ever(writer)


async def test_nor_is_a_body_awaited_that_does_not_come() -> None:
    async with connected(1.0, rest_seconds=0.2) as (reader, writer):
        writer.write(b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 413")


async def send_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"1\r\nx\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


def test_an_idle_connection_outlives_the_patience_of_those_who_reuse_it() -> None:
    """nginx and load balancers keep theirs for 60 seconds, httpx for 5; who closes first must not be us."""
    assert configure(FastAPI(), Settings()).timeout_keep_alive > 60
