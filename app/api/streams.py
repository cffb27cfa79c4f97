"""Server-sent events: the encoding of one event, and a response that streams them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.metrics import Metrics

QUIET_SECONDS = 15.0  # before a comment is sent, because proxies cut connections that seem dead
RETRY_MILLISECONDS = 2000

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def sse(event: str, data: Mapping[str, Any] | Any, *, number: int | None = None) -> bytes:
    """Encode one event, with its data as one line of JSON."""
    return format_sse_event(
        event=event, data_str=to_json(data).decode(), id=None if number is None else str(number)
    )


class _Stream(EventSourceResponse):
    """A response that sends its events inside the context `within`."""

    within: AbstractContextManager[None] = nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
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
    """Return a response that streams `events`, and closes them when the caller disconnects.

    `within` is entered when the response starts, before anything else can happen, and left when it ends.
    """
    response = _Stream(_kept_alive(events, metrics, retry=retry), headers={**_HEADERS, **headers})
    response.within = within or nullcontext()
    return response


async def _kept_alive(
    events: AsyncGenerator[bytes], metrics: Metrics, *, retry: bool
) -> AsyncIterator[bytes]:
    """Yield `events`, with comments while there are none. The first bytes are sent at once."""
    ahead: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)
    pump = asyncio.create_task(_pump(events, ahead))
    # Sent along with the first event: some clients take a block of its own for an event.
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
    """Run the generator in a task of its own, so that it can still await while it is being closed."""
    try:
        async with aclosing(events):
            async for event in events:
                await ahead.put(event)
    except Exception as error:
        await ahead.put(error)
    else:
        await ahead.put(None)
