"""Slow clients hurt only themselves."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from app.api import connections
from app.api.connections import TimeoutProtocol, configure, protocol
from app.api.gateway import CROWDED
from app.settings import Settings

pytestmark = pytest.mark.anyio


HEAD_SECONDS = 0.05
READING_SECONDS = 0.2
LONG_BYTES = 4_000_000  # more than the kernel takes for somebody who reads nothing


async def hello(scope: Any, receive: Any, send: Any) -> None:
    path, status, headers = scope["path"], 204, []
    if path == "/slow":
        await asyncio.sleep(4 * HEAD_SECONDS)
    if path == "/refused":
        status, headers = 413, [(b"content-length", b"0")]
    if path == "/long":
        status, headers = 200, [(b"content-length", b"%d" % LONG_BYTES)]
    if path == "/events":
        status = 200
    if CROWDED in scope["state"]:
        status, headers = 503, [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if status == 200 and path == "/long":
        await send({"type": "http.response.body", "body": bytes(LONG_BYTES), "more_body": True})
    if status == 200 and path == "/events":
        await send({"type": "http.response.body", "body": bytes(LONG_BYTES), "more_body": True})
        await asyncio.sleep(4 * READING_SECONDS)
        await send({"type": "http.response.body", "body": b"last", "more_body": True})
    await send({"type": "http.response.body"})


@asynccontextmanager
async def served(kind: type[TimeoutProtocol], app: Any = hello) -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(app, http=kind, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Else the kernel takes the more of an answer, the faster earlier connections of this machine were.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
        await server.startup(sockets=[listener])
        try:
            yield server
        finally:
            await server.shutdown(sockets=[listener])


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


@asynccontextmanager
async def connected(
    header_seconds: float,
    rest_seconds: float = 30.0,
    reading_seconds: float = 30.0,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with served(protocol(header_seconds, rest_seconds, reading_seconds)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        try:
            yield reader, writer
        finally:
            writer.close()


@asynccontextmanager
async def asking(
    server: uvicorn.Server, head: bytes = b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n"
) -> AsyncIterator[socket.socket]:
    """A client with little room of its own that has sent `head` and reads only when told to."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port_of(server)))
        await loop.sock_sendall(client, head)
        yield client


async def read_slowly(client: socket.socket) -> int:
    """Some 3 MB a second, until the end; returns how much there was. Raises ConnectionResetError."""
    num_bytes = 0
    while chunk := await asyncio.get_running_loop().sock_recv(client, 65536):
        num_bytes += len(chunk)
        await asyncio.sleep(0.02)
        if num_bytes > LONG_BYTES:
            break
    return num_bytes


async def until_left(server: uvicorn.Server) -> None:
    async with asyncio.timeout(5):
        while server.server_state.connections or server.server_state.tasks:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


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


@pytest.mark.parametrize(
    "head",
    [
        b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /long HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",  # to whose rest there is a limit, too
    ],
)
async def test_who_reads_nothing_is_cut_off_in_whatever_state(head: bytes) -> None:
    async with (
        served(protocol(10.0, HEAD_SECONDS, READING_SECONDS)) as server,
        asking(server, head) as client,
    ):
        await asyncio.sleep(READING_SECONDS / 2)
        assert len(server.server_state.connections) == 1
        await until_left(server)
        with pytest.raises(ConnectionResetError):
            await read_slowly(client)


async def test_the_last_bytes_must_be_read_as_the_first() -> None:
    async def fill_to_the_brim(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        [connection] = server.server_state.connections
        while not connection.transport.get_write_buffer_size():
            await send({"type": "http.response.body", "body": bytes(10_000), "more_body": True})
        await send({"type": "http.response.body"})

    kind = protocol(10.0, reading_seconds=READING_SECONDS)
    async with served(kind, fill_to_the_brim) as server, asking(server):
        await asyncio.sleep(READING_SECONDS / 2)
        await until_left(server)


async def test_who_reads_slowly_gets_everything() -> None:
    """Although the kernel takes nothing more for longer than that: a third of what it has must go first."""
    async with served(protocol(10.0, reading_seconds=READING_SECONDS)) as server, asking(server) as client:
        assert await read_slowly(client) > LONG_BYTES


async def test_but_not_at_any_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READING_RATE", 20_000_000)
    async with served(protocol(10.0, reading_seconds=READING_SECONDS)) as server, asking(server) as client:
        with pytest.raises(ConnectionResetError):
            await read_slowly(client)


async def test_a_stream_with_nothing_to_send_lives_on() -> None:
    async with connected(10.0, reading_seconds=READING_SECONDS) as (reader, writer):
        writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            while b"last" not in (chunk := await reader.read(2**20)):
                assert chunk


async def test_a_connection_too_many_is_told_so_and_more_are_closed() -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    loop = asyncio.get_running_loop()
    async with served(protocol(10.0, max_connections=8)) as server:
        holding = [await asyncio.open_connection("127.0.0.1", port_of(server)) for _ in range(8)]
        async with asking(server, request) as told, asking(server, b"") as turned_away, asyncio.timeout(5):
            assert (await loop.sock_recv(told, 100)).startswith(b"HTTP/1.1 503")
            assert await loop.sock_recv(turned_away, 100) == b""
        for _, writer in holding:
            writer.close()
        await until_left(server)
        async with asking(server, request) as welcome:
            assert (await loop.sock_recv(welcome, 100)).startswith(b"HTTP/1.1 204")


async def test_a_connection_too_many_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HURRIED_SECONDS", HEAD_SECONDS)
    async with served(protocol(10.0, max_connections=8)) as server:
        holding = [await asyncio.open_connection("127.0.0.1", port_of(server)) for _ in range(8)]
        async with asking(server, b"GET /") as beyond, asyncio.timeout(5):
            assert await asyncio.get_running_loop().sock_recv(beyond, 100) == b""
        assert len(server.server_state.connections) == 8
        for _, writer in holding:
            writer.close()


def test_some_descriptors_are_kept_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert room(Settings()) == 768
    assert room(Settings(max_connections=100)) == 100


def room(settings: Settings) -> int:
    kind = configure(FastAPI(), settings).http
    assert isinstance(kind, type)
    assert issubclass(kind, TimeoutProtocol)
    return kind.max_connections
