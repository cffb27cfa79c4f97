"""A receiver of webhooks, on a port of this machine."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Call:
    """What came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> dict[str, Any]:
        """The body as it is meant."""
        message: dict[str, Any] = json.loads(self.body)
        return message


def accept(call: Call) -> bytes:
    """The answer of somebody who is content."""
    return b"HTTP/1.1 204 No Content\r\n\r\n"


def answer(status: int, *lines: str) -> Callable[[Call], bytes]:
    """Always the same answer."""
    head = "\r\n".join([f"HTTP/1.1 {status} x", "content-length: 0", *lines, "", ""])
    return lambda call: head.encode()


class Receiver:
    """`async with Receiver() as receiver`: takes calls at `receiver.url` and remembers them."""

    def __init__(self, reply: Callable[[Call], bytes | None] = accept) -> None:
        self.calls: list[Call] = []
        self.reply = reply  # None: no answer at all
        self.url = ""
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def got(self, number: int) -> list[Call]:
        """The first calls, when there are so many."""
        await self.until(lambda: len(self.calls) >= number)
        return self.calls[:number]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a call after which this is true."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(condition()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                call = await _read(reader)
                async with self._changed:
                    self.calls.append(call)
                    self._changed.notify_all()
                if (reply := self.reply(call)) is None:
                    await reader.read()  # until the caller has enough of it
                    break
                writer.write(reply)
                await writer.drain()
        self._open.discard(writer)
        writer.close()


async def _read(reader: asyncio.StreamReader) -> Call:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Call(first.split()[1], headers, body)
