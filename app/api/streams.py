"""Server-sent events on the wire: how one is written, and an answer that sends them as they come."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.metrics import Metrics

QUIET_SECONDS = 15.0  # then a comment, because proxies cut connections that seem dead
RETRY_MILLISECONDS = 2000

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def sse(event: str, data: Mapping[str, Any] | Any, *, number: int | None = None) -> bytes:
    """One event on the wire, its data one line of JSON."""
    return format_sse_event(
        event=event, data_str=to_json(data).decode(), id=None if number is None else str(number)
    )


class _Stream(EventSourceResponse):
    """Events that are sent inside `within`."""

    within: AbstractContextManager[None] = nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        with self.within:
            await super().__call__(scope, receive, send)


def respond_with_events(
    events: AsyncGenerator[bytes],
    headers: Mapping[str, str],
    metrics: Metrics,
    *,
    retry: bool = False,
    within: AbstractContextManager[None] | None = None,
) -> EventSourceResponse:
    """An answer that sends `events` as they come. When the caller leaves, they are closed.

    `within` is entered when the answer begins, before anything else can happen, and left when it ends.
    """
    response = _Stream(_kept_alive(events, metrics, retry=retry), headers={**_HEADERS, **headers})
    response.within = within or nullcontext()
    return response


async def _kept_alive(
    events: AsyncGenerator[bytes], metrics: Metrics, *, retry: bool
) -> AsyncIterator[bytes]:
    """`events`, with comments while there are none. The first bytes leave at once."""
    ahead: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)
    pump = asyncio.create_task(_pump(events, ahead))
    # Not in a block of its own: some clients take that for an event.
    head = b"retry: %d\n" % RETRY_MILLISECONDS if retry else b""
    with metrics.streaming():
        try:
            yield KEEPALIVE_COMMENT
            while True:
                try:
                    async with asyncio.timeout(QUIET_SECONDS):
                        event = await ahead.get()
                except TimeoutError:
                    event = KEEPALIVE_COMMENT
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                if event is not KEEPALIVE_COMMENT:
                    event, head = head + event, b""
                yield event
        finally:
            pump.cancel()


async def _pump(events: AsyncGenerator[bytes], ahead: "asyncio.Queue[bytes | Exception | None]") -> None:
    """Runs the generator in a task of its own, so that it may wait for something while it is closed."""
    try:
        async with aclosing(events):
            async for event in events:
                await ahead.put(event)
    except Exception as error:
        await ahead.put(error)
    else:
        await ahead.put(None)
