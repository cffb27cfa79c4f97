"""`POST /api/v1/images`: every form of the answer, and what is refused."""

import asyncio
import base64
import hashlib
from datetime import datetime
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from app.jobs import maintenance
from tests.app.api.sse import Watcher
from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner, closed, until

pytestmark = pytest.mark.anyio
PATH = "/api/v1/images"


async def post(
    client: httpx2.AsyncClient, headers: dict[str, str] | None = None, **members: Any
) -> httpx2.Response:
    return await client.post(PATH, json={"prompt": "a red circle", **members}, headers=headers or {})


async def test_a_waiting_caller_gets_the_ended_job(client: httpx2.AsyncClient) -> None:
    answer = await post(
        client, num_images_per_prompt=2, seed=42, metadata={"order": "A-99"}, user="end-user-17"
    )
    assert answer.status_code == 200
    job = answer.json()
    assert set(job) == {
        "id", "object", "status", "model", "created_at", "started_at", "completed_at", "expires_at",
        "progress", "queue_position", "images", "error", "timings", "request", "metadata", "urls",
    }  # fmt: skip
    assert (job["object"], job["status"], job["model"]) == ("image.job", "succeeded", "stable-cascade")
    assert job["created_at"] <= job["started_at"] <= job["completed_at"] < job["expires_at"]
    assert job["completed_at"].endswith("Z")
    assert job["progress"]["fraction"] == 1
    assert job["progress"] == {"stage": "done", "fraction": 1.0, "step": 10, "steps": 10, "eta_seconds": 0}
    assert (job["queue_position"], job["error"], job["metadata"]) == (None, None, {"order": "A-99"})
    assert set(job["timings"]) == {"queued", "prior", "decoder", "encode"}
    created, completed = (datetime.fromisoformat(job[name]) for name in ("created_at", "completed_at"))
    assert sum(job["timings"].values()) == pytest.approx((completed - created).total_seconds(), abs=0.01)
    for index, image in enumerate(job["images"]):
        content = base64.b64decode(image.pop("b64_json"))
        assert image == {
            "index": index,
            "seed": 42 + index,
            "width": 64,
            "height": 64,
            "mime_type": "image/png",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        assert Image.open(BytesIO(content)).size == (64, 64)
    headers = answer.headers
    assert (headers["x-job-id"], headers["x-seed"], headers["vary"]) == (
        job["id"],
        "42, 43",
        "Accept, Prefer",
    )
    assert "prior;dur=" in headers["server-timing"]


async def test_the_request_shown_makes_the_same_pictures_again(client: httpx2.AsyncClient) -> None:
    for members in ({"num_images_per_prompt": 2}, {"seeds": [5, 9, 1], "width": 128}, {"seed": -1}):
        first = (await post(client, **members)).json()
        again = (await client.post(PATH, json=first["request"])).json()
        assert [image["sha256"] for image in again["images"]] == [
            image["sha256"] for image in first["images"]
        ]
        assert again["request"] == first["request"]
    assert first["request"]["prompt"] == "a red circle"


async def test_pictures_as_urls(client: httpx2.AsyncClient) -> None:
    [image] = (await post(client, response_format="url", output_format="webp")).json()["images"]
    assert image["url"].startswith("http://server/files/")
    picture = await client.get(image["url"])
    assert hashlib.sha256(picture.content).hexdigest() == image["sha256"]
    assert picture.headers["content-type"] == image["mime_type"] == "image/webp"


async def test_raw_bytes(client: httpx2.AsyncClient) -> None:
    answer = await post(client, {"accept": "image/webp, */*;q=0.1"}, seed=7)
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["content-disposition"] == f'inline; filename="{answer.headers["x-job-id"]}.webp"'
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert Image.open(BytesIO(answer.content)).format == "WEBP"
    taken = await post(client, {"accept": "image/*"}, output_format="jpeg")
    assert taken.headers["content-type"] == "image/jpeg"


async def test_raw_bytes_cannot_hold_two(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    answer = await post(client, {"accept": "image/png"}, num_images_per_prompt=2)
    assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
    assert answer.json()["errors"][0]["pointer"] == "/num_images_per_prompt"
    assert runner.started == []


async def test_async_is_answered_at_once_and_finishes(
    serve: Serve, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 60.0)  # none that would be claiming just then
    async with serve() as client:
        dispatcher = inside(client).dispatcher
        await until(lambda: not (dispatcher._fleet.may_claim or dispatcher._fleet._boarding.locked()))
        with closed(runner.gate):
            answer = await post(client, {"prefer": "respond-async"}, num_images_per_prompt=2)
            job = answer.json()
            assert answer.status_code == 202
            assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}"
            assert answer.headers["preference-applied"] == "respond-async"
            assert answer.headers["retry-after"] == "1"
            assert (job["status"], job["images"]) == ("running", [])  # begun by the commit that accepted it
            assert (job["queue_position"], job["progress"]["stage"]) == (None, "prior")
            assert job["started_at"]
        await ended(client, job["id"], "succeeded")


async def ended(client: httpx2.AsyncClient, job_id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            job: dict[str, Any] = (await client.get(f"/api/v1/jobs/{job_id}")).json()
            if job["status"] == status:
                return job
            await asyncio.sleep(0.005)


async def test_a_wait_ends_early_or_the_job_goes_on(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    answer = await post(client, {"prefer": "wait=20"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=20")
    assert answer.json()["images"][0]["b64_json"]
    with closed(runner.gate):
        answer = await post(client, {"prefer": "wait=1"})
        assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")
        assert answer.headers["location"].endswith(answer.json()["id"])
        assert answer.json()["status"] == "running"
    job = await ended(client, answer.json()["id"], "succeeded")
    assert job["images"][0]["url"]


async def test_a_malformed_preference_is_ignored(client: httpx2.AsyncClient) -> None:
    answer = await post(client, {"prefer": "wait=soon"})
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


async def test_a_stream_tells_everything(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    watcher = Watcher(client)
    body = {"prompt": "x", "num_images_per_prompt": 2, "previews": 1}
    async with watcher.watching("POST", PATH, body, {"accept": "text/event-stream"}):
        end = await watcher.until("job.succeeded")
        await until(lambda: watcher.is_over)
    assert watcher.status == 200
    assert watcher.headers["content-type"].startswith("text/event-stream")
    assert watcher.headers["x-job-id"] == end.data["id"]
    images = [told.data for told in watcher.events if told.event == "job.image"]
    assert sorted(image["index"] for image in images) == [0, 1]
    assert all(base64.b64decode(image["b64_json"]) for image in images)
    assert watcher.events[-1] == end
    assert len(end.data["images"]) == 2
    numbers = [told.id or 0 for told in watcher.events]
    assert numbers == sorted(set(numbers))
    assert numbers[0] > 0
    fractions = [told.data["fraction"] for told in watcher.events if told.event == "job.progress"]
    assert fractions
    assert fractions == sorted(fractions)


@pytest.mark.parametrize(
    ("members", "pointer", "code"),
    [
        ({"width": 99_999}, "/width", "invalid_value"),
        ({"height": 2048, "width": 128}, "/width", "invalid_value"),
        ({"typo": 1}, "/typo", "unsupported_parameter"),
        ({"seed": 1, "seeds": [1]}, "/seeds", "invalid_value"),
        ({"metadata": {"a": 1}}, "/metadata/a", "invalid_type"),
        ({"model": "flux"}, "/model", "model_not_found"),
    ],
)
async def test_mistakes_are_problems_before_anything_is_queued(
    client: httpx2.AsyncClient, runner: FakeRunner, members: dict[str, Any], pointer: str, code: str
) -> None:
    for headers in (
        {},
        {"prefer": "respond-async"},
        {"accept": "text/event-stream"},
        {"accept": "image/png"},
    ):
        answer = await post(client, headers, **members)
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.status_code == problem["status"] == (404 if code == "model_not_found" else 400)
        assert (problem["errors"][0]["pointer"], problem["code"]) == (pointer, code)
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert problem["instance"] == PATH
    assert (await inside(client).store.counts()).queued == 0
    assert runner.started == []


async def test_operators_limits_count(serve: Serve) -> None:
    async with serve(max_images=2, max_pixels=64 * 64) as client:
        answer = await post(client, num_images_per_prompt=3)
        assert answer.json()["errors"][0]["pointer"] == "/num_images_per_prompt"
        answer = await post(client, width=128)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (400, "/width")


async def test_a_failed_job_is_a_problem_for_who_waits(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    runner.broken = {"bad": RuntimeError("secret internals")}
    answer = await post(client, prompt="bad")
    assert (answer.status_code, answer.json()["code"]) == (500, "generation_failed")
    assert answer.headers["x-should-retry"] == "false"
    assert "internals" not in answer.text
    answer = await post(client, {"prefer": "respond-async"}, prompt="bad")
    job = await ended(client, answer.json()["id"], "failed")
    assert (job["error"]["status"], job["error"]["code"]) == (500, "generation_failed")


async def test_the_queue_in_numbers(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    queue = (await client.get("/api/v1/queue")).json()
    assert queue == {"running": 0, "queued": 0, "capacity": 64, "eta_seconds": 0}
    with closed(runner.gate):
        for _ in range(3):
            await post(client, {"prefer": "respond-async"})
        await until(lambda: runner.started)
        queue = (await client.get("/api/v1/queue")).json()
        assert queue["running"] + queue["queued"] == 3
        assert queue["eta_seconds"] > 0
