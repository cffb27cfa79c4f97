"""`stream` and `partial_images` of OpenAI's contract, and `Prefer` there."""

import base64
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.app.api.sse import Told, Watcher, told
from tests.app.conftest import inside
from tests.app.fakes import FakeRunner, closed, until

pytestmark = pytest.mark.anyio
PATH = "/v1/images/generations"
MEMBERS = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}


async def stream(client: httpx2.AsyncClient, **members: Any) -> list[Told]:
    body = {"prompt": "a red circle", "stream": True, **members}
    answer = await client.post(PATH, json=body, headers={"accept": "application/json"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"]
    return told(answer.text)


def opened(event: Told) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(event.data["b64_json"])))


async def test_one_picture_is_one_event(client: httpx2.AsyncClient) -> None:
    [event] = await stream(client, seed=7, quality="hd", response_format="url")
    assert event.event == event.data["type"] == "image_generation.completed"
    assert set(event.data) == MEMBERS | {"usage", "seed"}
    assert event.data["usage"]["total_tokens"] == 3
    assert (event.data["quality"], event.data["size"]) == ("high", "64x64")
    plain = (await client.post(PATH, json={"prompt": "a red circle", "seed": 7, "quality": "hd"})).json()
    assert event.data["b64_json"] == plain["data"][0]["b64_json"]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_partial_pictures_come_first_in_the_same_format(
    client: httpx2.AsyncClient, runner: FakeRunner, output_format: str
) -> None:
    runner.steps = (6, 2)
    *partial, last = await stream(client, partial_images=2, output_format=output_format)
    assert [event.event for event in partial] == ["image_generation.partial_image"] * len(partial)
    assert 1 <= len(partial) <= 2
    for number, event in enumerate(partial):
        assert set(event.data) == MEMBERS | {"partial_image_index"}
        assert event.data["partial_image_index"] == number
    assert opened(last).size == (64, 64)
    for event in (*partial, last):
        image = opened(event)
        assert event.data["size"] == "64x64"  # as asked for: a preview is smaller
        assert image.format == event.data["output_format"].upper() == output_format.upper()
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]


async def test_without_a_previewer_the_picture_itself_is_the_partial_one(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    runner.has_previewer = False
    partial, last = await stream(client, partial_images=3)
    assert partial.data["partial_image_index"] == 0
    assert partial.data["b64_json"] == last.data["b64_json"]


async def test_of_several_pictures_each_is_numbered(client: httpx2.AsyncClient) -> None:
    events = await stream(client, n=3, seed=1, partial_images=1)
    completed = [event.data for event in events if event.event == "image_generation.completed"]
    assert sorted(data["image_index"] for data in completed) == [0, 1, 2]
    assert {data["seed"] - data["image_index"] for data in completed} == {1}
    partial = [
        event.data["image_index"] for event in events if event.event == "image_generation.partial_image"
    ]
    assert sorted(partial) == [0, 1, 2]


async def test_a_failure_later_is_an_event_of_openais_shape(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    runner.broken = {"bad": RuntimeError("internals")}
    [event] = await stream(client, prompt="bad")
    assert event.event == "error"
    assert set(event.data["error"]) == {"message", "type", "param", "code"}
    assert (event.data["error"]["code"], event.data["error"]["type"]) == ("generation_failed", "server_error")


@pytest.mark.parametrize(
    "members", [{"n": 0}, {"partial_images": 4}, {"stream": "perhaps"}, {"model": "flux"}]
)
async def test_bad_requests_are_answered_before_the_stream(
    client: httpx2.AsyncClient, runner: FakeRunner, members: dict[str, Any]
) -> None:
    answer = await client.post(PATH, json={"prompt": "x", "stream": True, **members})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == next(iter(members))
    assert runner.started == []


async def test_a_watcher_that_leaves_ends_the_work(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    with closed(runner.gate):
        watcher = Watcher(client)
        async with watcher.watching("POST", PATH, {"prompt": "x", "stream": True}):
            await until(lambda: runner.started)
        job = await inside(client).dispatcher.wait(watcher.headers["x-job-id"])
        assert job.status == "canceled"


async def test_prefer_is_honoured_with_the_native_job(client: httpx2.AsyncClient) -> None:
    answer = await client.post(PATH, json={"prompt": "x"}, headers={"prefer": "respond-async"})
    assert (answer.status_code, answer.json()["object"]) == (202, "image.job")
    assert answer.headers["location"] == f"/api/v1/jobs/{answer.json()['id']}"
    waited = await client.post(PATH, json={"prompt": "x"}, headers={"prefer": "wait=20"})
    assert waited.json()["data"][0]["b64_json"]
    assert waited.headers["preference-applied"] == "wait=20"
