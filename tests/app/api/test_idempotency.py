"""Submitting twice with one key is submitting once, in every form of the answer."""

import asyncio
from typing import Any

import httpx2
import pytest

from tests.app.api.sse import told
from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner, closed, until

pytestmark = pytest.mark.anyio
NATIVE, OPENAI = "/api/v1/images", "/v1/images/generations"
KEY = {"idempotency-key": "k-1"}


async def post(
    client: httpx2.AsyncClient, path: str = NATIVE, headers: dict[str, str] | None = None, **members: Any
) -> httpx2.Response:
    return await client.post(path, json={"prompt": "x", **members}, headers={**KEY, **(headers or {})})


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_the_stored_answer_is_given_again(
    client: httpx2.AsyncClient, runner: FakeRunner, path: str
) -> None:
    first, second = await post(client, path), await post(client, path, seed=None)
    assert first.status_code == second.status_code == 200
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert second.headers["x-job-id"] == first.headers["x-job-id"]
    told_once, again = first.json(), second.json()
    for answer in (told_once, again):
        answer.pop("urls", None)  # signed anew
    assert again == told_once
    assert len(runner.started) == 1


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_another_request_with_the_key_is_refused(client: httpx2.AsyncClient, path: str) -> None:
    await post(client, path)
    answer = await post(client, path, seed=1)
    error = answer.json().get("error") or answer.json()
    assert (answer.status_code, error["code"]) == (422, "idempotency_key_reused")
    other = OPENAI if path == NATIVE else NATIVE
    assert (await post(client, other)).status_code == 422


@pytest.mark.parametrize("kept", ["file_ttl", "job_ttl"])
async def test_a_key_stands_for_no_more_than_there_is(serve: Serve, kept: str) -> None:
    async with serve(**{kept: 0.3}) as client:
        assert (await post(client)).status_code == 200
        await asyncio.sleep(0.7)
        again = await post(client)
        assert (again.status_code, "idempotency-replayed" in again.headers) == (200, False)


async def test_many_at_once_are_one(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    with closed(runner.gate):
        asked = [asyncio.ensure_future(post(client)) for _ in range(20)]
        await until(lambda: runner.started)
        queued = await post(client, headers={"prefer": "respond-async"})
        assert (queued.status_code, queued.headers["idempotency-replayed"]) == (202, "true")
    answers = await asyncio.gather(*asked)
    assert {answer.headers["x-job-id"] for answer in answers} == {queued.json()["id"]}
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 19
    assert len(runner.started) == 1


async def test_the_bytes_and_the_events_are_given_again(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    json = await post(client, seed=4)
    raw = await post(client, headers={"accept": "image/png"}, seed=4)
    events = await post(client, headers={"accept": "text/event-stream"}, seed=4)
    assert raw.headers["etag"] == f'"{json.json()["images"][0]["sha256"]}"'
    assert [event.event for event in told(events.text)] == ["job.succeeded"]
    assert len(runner.started) == 1
    assert (await post(client, headers={"accept": "image/webp"}, seed=4)).status_code == 422


async def test_failures_are_not_stored(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    runner.broken = {"x": RuntimeError("once")}
    assert (await post(client)).status_code == 500
    runner.broken = {}
    answer = await post(client)
    assert (answer.status_code, "idempotency-replayed" in answer.headers) == (200, False)


async def test_keys_of_two_tenants_are_apart(serve: Serve) -> None:
    async with serve(api_keys="a=one,b=two") as client:
        first = await post(client, headers={"x-api-key": "one"})
        second = await post(client, headers={"x-api-key": "two"}, seed=3)
        assert first.status_code == second.status_code == 200
        assert "idempotency-replayed" not in second.headers


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_a_key_that_is_none(client: httpx2.AsyncClient, path: str) -> None:
    answer = await post(client, path, {"idempotency-key": "k" * 256})
    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.text
