"""The client repeats what it must, resumes where it was, and believes no file that is not what was said."""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.chaos import client as module
from tests.chaos.client import Client, Way
from tests.chaos.orders import all_orders
from tests.receiver import Receiver

ORDER = all_orders()[0]
Answer = Callable[[httpx2.Request], httpx2.Response]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.0)


def png() -> tuple[bytes, str]:
    """A file and the digest of its pixels."""
    image, buffer = Image.new("RGB", (2, 2), "red"), io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), hashlib.sha256(image.tobytes()).hexdigest()


FILE, PIXELS = png()


def job(status: str, *, torn: bool = False, **image: Any) -> dict[str, Any]:
    sha256 = "0" * 64 if torn else hashlib.sha256(FILE).hexdigest()
    return {
        "id": "job_1",
        "status": status,
        "error": None,
        "images": [{"sha256": sha256, **image}] if image else [],
        "urls": {"events": "/events"},
    }


def in_base64(**more: Any) -> dict[str, Any]:
    return job("succeeded", b64_json=base64.b64encode(FILE).decode(), **more)


def asking(*answers: httpx2.Response | Exception) -> tuple[Client, list[httpx2.Request]]:
    """A client that gets these answers in turn, and what it asked."""
    asked: list[httpx2.Request] = []
    waiting = list(answers)

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        given = waiting.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    return Client("http://server", httpx2.MockTransport(answer)), asked


def ok(content: Any, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, json=content)


@pytest.mark.anyio
async def test_a_lost_connection_and_a_full_queue_are_asked_again_under_the_same_key() -> None:
    busy = httpx2.Response(503, headers={"retry-after": "30"})
    client, asked = asking(httpx2.ReadError("killed"), busy, ok(in_base64()))
    outcome = await client.make(ORDER, "t", Way.WAIT, 5)
    assert (outcome.status, outcome.digests) == ("succeeded", (PIXELS,))
    assert [request.headers["idempotency-key"] for request in asked] == ["t"] * 3
    assert len({request.content for request in asked}) == 1


@pytest.mark.anyio
async def test_an_error_that_is_no_matter_of_time_ends_it() -> None:
    client, asked = asking(httpx2.Response(500, json={"code": "generation_failed"}))
    outcome = await client.make(ORDER, "t", Way.WAIT, 5)
    assert outcome.status == "refused"
    assert "generation_failed" in outcome.remark
    assert len(asked) == 1


@pytest.mark.anyio
async def test_polling_goes_on_over_a_restart_with_the_job_it_was_given() -> None:
    done = job("succeeded", url="/files/x.png")
    client, asked = asking(
        ok(job("queued"), 202),
        ok(job("running")),
        httpx2.ConnectError("gone"),
        ok(job("queued"), 202),  # submitted again, and it is the same
        ok(done),
        httpx2.Response(200, content=FILE),
    )
    outcome = await client.make(ORDER, "t", Way.POLL, 5)
    assert (outcome.job, outcome.digests) == ("job_1", (PIXELS,))
    assert [request.url.path for request in asked][-2:] == ["/api/v1/jobs/job_1", "/files/x.png"]


def events(*lines: tuple[int, str]) -> httpx2.Response:
    text = "retry: 2000\n\n: hello\n\n"
    for number, name in lines:
        text += f"id: {number}\nevent: {name}\ndata: {json.dumps({})}\n\n"
    return httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


@pytest.mark.anyio
async def test_a_stream_that_broke_is_resumed_after_the_last_event() -> None:
    client, asked = asking(
        ok(job("queued"), 202),
        events((1, "job.queued"), (2, "job.progress")),
        httpx2.ConnectError("gone"),
        events((3, "job.succeeded")),
        ok(in_base64()),
    )
    outcome = await client.make(ORDER, "t", Way.WATCH, 5)
    assert outcome.status == "succeeded"
    streams = [request.headers.get("last-event-id") for request in asked if request.url.path == "/events"]
    assert streams == [None, "2", "2"]


@pytest.mark.anyio
async def test_a_file_that_is_not_what_was_said_of_it_has_no_digest() -> None:
    client, _ = asking(ok(in_base64(torn=True)))
    assert (await client.make(ORDER, "t", Way.WAIT, 5)).digests == ("a torn file",)


@pytest.mark.anyio
async def test_all_jobs_are_read_page_by_page() -> None:
    client, asked = asking(
        ok({"data": [{"id": 1}], "has_more": True, "next_cursor": "next"}),
        ok({"data": [{"id": 2}], "has_more": False, "next_cursor": None}),
    )
    assert await client.all_jobs() == [{"id": 1}, {"id": 2}]
    assert asked[1].url.params["cursor"] == "next"


@pytest.mark.anyio
async def test_patience_ends() -> None:
    client = Client("http://server", httpx2.MockTransport(lambda _: ok(job("running"))))
    assert (await client.make(ORDER, "t", Way.POLL, 0.02)).status == "unanswered"


@pytest.mark.anyio
async def test_who_waits_for_a_webhook_asks_nobody_meanwhile() -> None:
    async with Receiver() as receiver:
        asked: list[httpx2.Request] = []
        waiting = [ok(job("queued"), 202), ok(in_base64())]

        def reply(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            return waiting.pop(0)

        client = Client("http://server", httpx2.MockTransport(reply), receiver)
        making = asyncio.create_task(client.make(ORDER, "t", Way.HOOK, 5))
        async with httpx2.AsyncClient() as server:
            await server.post(receiver.url, json={"data": job("succeeded") | {"id": "job_of_another"}})
            await asyncio.sleep(0.01)
            assert len(asked) == 1
            assert json.loads(asked[0].content)["webhook"] == receiver.url
            await server.post(receiver.url, json={"data": job("succeeded")})
        assert (await making).digests == (PIXELS,)
