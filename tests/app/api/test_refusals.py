"""What `/v1/images/generations` refuses, and what it answers when a picture cannot be made."""

import asyncio
import threading
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner, until

pytestmark = pytest.mark.anyio
PATH = "/v1/images/generations"


async def generate(client: httpx2.AsyncClient, **members: Any) -> httpx2.Response:
    return await client.post(PATH, json={"prompt": "a red circle", **members})


@pytest.mark.parametrize(
    ("members", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"prompt": 7}, "prompt", "invalid_type"),
        ({"prompt": ["x"]}, "prompt", "invalid_type"),
        ({"n": 0}, "n", "integer_out_of_range"),
        ({"n": 11}, "n", "integer_out_of_range"),
        ({"n": 10**40}, "n", "integer_out_of_range"),
        ({"n": "two"}, "n", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"size": "100x100"}, "size", "invalid_value"),
        ({"size": "0x0"}, "size", "invalid_value"),
        ({"size": "0x512"}, "size", "invalid_value"),
        ({"size": "4096x4096"}, "size", "invalid_value"),
        ({"size": "2048x256"}, "size", "invalid_value"),
        ({"size": 512}, "size", "invalid_type"),
        ({"width": 99_999}, "width", "invalid_value"),
        ({"width": 68}, "width", "invalid_value"),
        ({"width": 512}, "width", "invalid_value"),
        ({"seed": 2**32}, "seed", "integer_out_of_range"),
        ({"seed": -2}, "seed", "integer_out_of_range"),
        ({"steps": 0}, "steps", "integer_out_of_range"),
        ({"num_inference_steps": 101}, "num_inference_steps", "integer_out_of_range"),
        ({"cfg": 21}, "cfg", "invalid_value"),
        ({"guidance_scale": "1e999"}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": "nan"}, "guidance_scale", "invalid_value"),
        ({"decoder_num_inference_steps": 61}, "decoder_num_inference_steps", "integer_out_of_range"),
        ({"quality": "great"}, "quality", "invalid_value"),
        ({"sampler": "euler"}, "sampler", "invalid_value"),
        ({"preset": "mine"}, "preset", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"seed": 1e30}, "seed", "integer_out_of_range"),
        ({"output_compression": 101}, "output_compression", "integer_out_of_range"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"stream": "perhaps"}, "stream", "invalid_type"),
        ({"partial_images": 4}, "partial_images", "integer_out_of_range"),
        ({"image": "data:"}, "image", "invalid_image"),
        ({"image": "https://example.org/cat.png"}, "image", "unsupported_parameter"),
        ({"seeds": [1, 2]}, "seeds", "invalid_value"),
        ({"seeds": [-1]}, "seeds", "invalid_value"),
        ({"priority": 11}, "priority", "integer_out_of_range"),
        ({"deadline_seconds": 0}, "deadline_seconds", "integer_out_of_range"),
        ({"on_disconnect": "stay"}, "on_disconnect", "invalid_value"),
        ({"strength": 0.5}, "strength", "invalid_value"),
        ({"mask": "data:"}, "mask", "invalid_value"),
        ({"control": {"type": "canny"}}, "control", "missing_required_parameter"),
        ({"loras": [{"name": "x"}]}, "loras", "invalid_value"),
        ({"image_prompts": [{}]}, "image_prompts", "missing_required_parameter"),
        ({"webhook": {"url": "https://example.org"}}, "webhook", "unsupported_parameter"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx2.AsyncClient, runner: FakeRunner, members: dict[str, Any], param: str, code: str
) -> None:
    answer = await generate(client, **members)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert param in error["message"] or "width" in error["message"] or "sides" in error["message"]
    assert len(error["message"]) < 200
    assert runner.started == []


async def test_empty_lists_and_false_count_as_absent(client: httpx2.AsyncClient) -> None:
    answer = await generate(client, loras=[], control=None, image_prompts=[], stream=False)
    assert answer.status_code == 200


async def test_limits_of_the_operator_count(serve: Serve) -> None:
    async with serve(max_images=2, max_pixels=64 * 64) as client:
        assert (await generate(client, n=3)).json()["error"]["param"] == "n"
        assert (await generate(client, size="128x64")).json()["error"]["param"] == "size"
        assert (await generate(client, n=2, size="64x64")).status_code == 200


async def test_a_mistake_does_not_name_the_type_of_a_member(client: httpx2.AsyncClient) -> None:
    answer = await generate(client, prompt="x" * 32_001)
    assert answer.json()["error"]["message"] == "prompt must have at most 32000 characters"


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"", "application/json", 400, "invalid_json"),
        (b"{", "application/json", 400, "invalid_json"),
        (b'{"prompt": NaN}', "application/json", 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "invalid_json"),
        (b'{"prompt": "\xff"}', "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"a":' * 100_000, "application/json; charset=utf-8", 400, "invalid_json"),
        (b'{"n": ' + b"1" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_type"),
        (b"null", "application/json", 400, "invalid_type"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"{}", "\x80", 415, "unsupported_media_type"),
    ],
)
async def test_bodies_that_are_no_request(
    client: httpx2.AsyncClient, content: bytes, content_type: str, status: int, code: str
) -> None:
    headers = {b"content-type": content_type.encode("latin-1")}
    answer = await client.post(PATH, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    compressed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert (await client.post(PATH, content=content, headers=compressed)).status_code == 415


async def test_a_body_is_read_no_further_than_the_limit(serve: Serve) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 100_000:
            sent += 1000
            yield b" " * 1000

    async with serve(max_body_bytes=10_000) as client:
        json = {"content-type": "application/json"}
        answer = await client.post(PATH, content=endless(), headers=json)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        assert sent <= 12_000
        answer = await client.post(PATH, content=b" " * 20_000, headers=json)
        assert answer.status_code == 413


async def test_by_default_a_body_is_at_most_32_mebibytes(client: httpx2.AsyncClient) -> None:
    json = {"content-type": "application/json"}
    for size, status in [(32 * 1024**2, 200), (32 * 1024**2 + 1, 413)]:
        body = b'{"prompt": "x"}'.ljust(size)
        assert (await client.post(PATH, content=body, headers=json)).status_code == status


async def test_long_bodies_are_parsed_off_the_event_loop(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spy(body: bytes, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return from_json(body, **options)

    threads: list[str] = []
    monkeypatch.setattr("app.api.values.from_json", spy)
    for size in (64 * 1024, 64 * 1024 + 1):
        body = b'{"prompt": "x"}'.ljust(size)
        assert (await client.post(PATH, content=body)).status_code == 200
    assert threads[0] == threading.current_thread().name
    assert threads[1].startswith("encoder")


async def test_a_body_has_at_most_200_members(client: httpx2.AsyncClient) -> None:
    members = {f"member_{number}": number for number in range(199)}
    assert (await client.post(PATH, json=members | {"prompt": "x"})).status_code == 200
    answer = await client.post(PATH, json=members | {"prompt": "x", "more": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert "200 members" in answer.json()["error"]["message"]


MANY = dict.fromkeys(map(str, range(201)), 1)


@pytest.mark.parametrize("path", [PATH, "/api/v1/images"])
@pytest.mark.parametrize("is_form", [False, True])
@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"control": MANY}, "/control"),
        ({"metadata": MANY}, "/metadata"),
        ({"loras": [1] * 201}, "/loras"),
        ({"image_prompts": [{"image": MANY}]}, "/image_prompts/0/image"),
        ({"style": {"a": [[1], {"b/\n": [[]] * 50_000}]}}, "/style/a/1/'b~1\\n'"),
        ({"style": [[[0] * 100] * 20]}, None),
    ],
)
async def test_no_object_or_list_has_more_members_than_any_request_needs(
    client: httpx2.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    is_form: bool,
    members: dict[str, Any],
    pointer: str | None,
) -> None:
    def spy(kind: type[BaseModel], *_: object) -> Any:
        pytest.fail(f"{kind} was asked")

    monkeypatch.setattr("app.api.bodies.validated", spy)
    given = {"prompt": "x", **members}
    sent = {"files": {"params": (None, to_json(given))}} if is_form else {"content": to_json(given)}
    answer = await client.post(path, **sent)
    assert answer.status_code == 400
    problem = answer.json().get("error") or answer.json()
    assert problem["code"] == "invalid_value"
    name = (pointer or "the body").strip("/").replace("/", ".").replace("~1", "/")
    most = 200 if pointer else 2000
    assert (problem.get("message") or problem["detail"]).startswith(
        f"{name} must have at most {most} members"
    )
    if "errors" in problem:
        assert problem["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize("is_form", [False, True])
async def test_what_has_countless_values_is_not_even_parsed(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, is_form: bool
) -> None:
    monkeypatch.setattr("app.api.values.from_json", lambda *_, **__: pytest.fail("it was parsed"))
    body = b'{"prompt": [' + b"[]," * 200_000 + b"1]}"
    sent = {"files": {"params": (None, body)}} if is_form else {"content": body}
    answer = await client.post(PATH, **sent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert "200000" in answer.json()["error"]["message"]


async def test_long_texts_of_forms_are_parsed_off_the_event_loop(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spy(text: bytes, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return from_json(text, **options)

    threads: list[str] = []
    monkeypatch.setattr("app.api.values.from_json", spy)
    for size in (64 * 1024, 64 * 1024 + 1):
        params = b'{"prompt": "x"}'.ljust(size)
        assert (await client.post(PATH, files={"params": (None, params)})).status_code == 200
    assert threads[0] == threading.current_thread().name
    assert threads[1].startswith("encoder")


async def test_no_picture_before_the_model(serve: Serve, runner: FakeRunner) -> None:
    runner.loading.clear()
    async with serve(wait=False, loading_wait=0) as client:
        answer = await generate(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 59
        assert (await generate(client, n=0)).status_code == 400
        runner.loading.set()
        await inside(client).dispatcher.wait_loaded(10)
        assert (await generate(client)).status_code == 200


async def test_a_model_that_fails_is_an_error_that_repeating_does_not_mend(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    runner.broken = {"bad": RuntimeError("secret internals")}
    answer = await generate(client, prompt="bad")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
    assert answer.headers["x-should-retry"] == "false"
    assert "internals" not in answer.text
    assert (await generate(client)).status_code == 200


async def test_the_queue_bound_is_exact(serve: Serve, runner: FakeRunner) -> None:
    runner.max_samples = 1
    async with serve(max_queue=3) as client:
        runner.gate.clear()
        running = asyncio.ensure_future(generate(client))
        await until(lambda: runner.started)
        waiting = [asyncio.ensure_future(generate(client, seed=seed)) for seed in range(20)]
        await until(lambda: sum(task.done() for task in waiting) == 17)
        refused = [task for task in waiting if task.done()]
        runner.gate.set()
        answers = await asyncio.gather(*waiting)
        assert (await running).status_code == 200
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 17
    for task in refused:
        answer = task.result()
        assert answer.json()["error"]["code"] == "overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 59


async def test_a_wait_that_is_too_long_ends_and_frees_the_device(serve: Serve, runner: FakeRunner) -> None:
    async with serve(sync_timeout=0.2) as client:
        runner.gate.clear()
        answer = await generate(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        [job], _ = await inside(client).store.list("", limit=10)
        assert (await inside(client).dispatcher.wait(job.id)).status == "canceled"


async def test_a_request_waits_for_a_model_that_is_still_loading(serve: Serve, runner: FakeRunner) -> None:
    runner.loading.clear()
    async with serve(wait=False, loading_wait=10) as client:
        asked = asyncio.ensure_future(generate(client))
        await asyncio.sleep(0.05)
        assert not asked.done()
        runner.loading.set()
        assert (await asked).status_code == 200
