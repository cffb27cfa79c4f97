"""Server-sent events on the wire: order, comments while it is quiet, errors, callers who leave."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import pytest

from app.api import streams
from app.api.streams import respond_with_events, sse
from app.metrics import Metrics
from tests.app.fakes import until

pytestmark = pytest.mark.anyio


def test_data_is_one_line_of_json() -> None:
    event = sse("job.queued", {"text": "a\nb\r\u2028é"}, number=7)
    name, data, number, *rest = event.decode().split("\n")
    assert (name, number, rest) == ("event: job.queued", "id: 7", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {"text": "a\nb\r\u2028é"}
    assert b"id:" not in sse("x", {})


class Source:
    """Events that tests put in, and whether they were closed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.is_closed = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while (event := await self.queue.get()) != b"":
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            await asyncio.sleep(0)  # closing may take its time
            self.is_closed.set()


@pytest.fixture
def source() -> Source:
    return Source()


async def test_events_leave_in_order(source: Source) -> None:
    for event in (b"1", b"2", b""):
        source.queue.put_nowait(event)
    response = respond_with_events(source.events(), {"x": "y"}, Metrics(), retry=True)
    assert [chunk async for chunk in response.body_iterator] == [b": ping\n\n", b"retry: 2000\n1", b"2"]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert response.headers["x"] == "y"
    assert source.is_closed.is_set()


async def test_comments_while_it_is_quiet(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "QUIET_SECONDS", 0.01)
    chunks = aiter(respond_with_events(source.events(), {}, Metrics()).body_iterator)
    assert [await anext(chunks) for _ in range(3)] == [b": ping\n\n"] * 3
    source.queue.put_nowait(b"1")
    while (chunk := await anext(chunks)) == b": ping\n\n":
        pass
    assert chunk == b"1"
    await chunks.aclose()  # type: ignore[attr-defined]


async def test_an_error_reaches_whoever_sends(source: Source) -> None:
    source.queue.put_nowait(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        [chunk async for chunk in respond_with_events(source.events(), {}, Metrics()).body_iterator]


async def test_a_caller_who_leaves_closes_the_events(source: Source) -> None:
    gone = asyncio.Event()
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        sent.append(message)  # type: ignore[arg-type]

    metrics = Metrics()
    response = respond_with_events(source.events(), {}, metrics)
    visit = asyncio.ensure_future(response({"type": "http", "asgi": {"version": "3.0"}}, receive, send))
    source.queue.put_nowait(b"1")
    async with asyncio.timeout(5):
        await until(lambda: len(sent) >= 3)
        assert metrics.registry.get_sample_value("cascade_http_streams") == 1
        gone.set()
        await visit
        await source.is_closed.wait()
    assert metrics.registry.get_sample_value("cascade_http_streams") == 0
    assert [message.get("body") for message in sent[1:3]] == [b": ping\n\n", b"1"]


async def test_whoever_waits_does_so_from_the_first_moment_to_the_last(source: Source) -> None:
    """In between, nobody else can find that nobody waits."""
    moments: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        moments.append("waits")
        yield
        moments.append("has left")

    async def send(message: object) -> None:
        moments.append("is sent to")

    response = respond_with_events(source.events(), {}, Metrics(), within=waiting())
    assert moments == []
    sending = asyncio.ensure_future(response({"type": "http"}, asyncio.Event().wait, send))  # type: ignore[arg-type]
    await asyncio.sleep(0)  # it has begun, and no more than that
    assert moments[0] == "waits"
    source.queue.put_nowait(b"")
    await sending
    assert source.is_closed.is_set()
    assert (moments[1], moments[-1], moments.count("has left")) == ("is sent to", "has left", 1)


async def test_a_slow_reader_holds_up_the_source_and_not_the_memory(source: Source) -> None:
    for _ in range(100):
        source.queue.put_nowait(b"x" * 1000)
    chunks = aiter(respond_with_events(source.events(), {}, Metrics()).body_iterator)
    await anext(chunks)
    for _ in range(50):
        await asyncio.sleep(0)
    assert source.queue.qsize() >= 97
    await chunks.aclose()  # type: ignore[attr-defined]
