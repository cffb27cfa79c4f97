"""`/v1/images/generations` and `/v1/models`, as clients of OpenAI's contract use them."""

import asyncio
import base64
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner, until

pytestmark = pytest.mark.anyio
PATH = "/v1/images/generations"


async def generate(client: httpx2.AsyncClient, **members: Any) -> httpx2.Response:
    return await client.post(PATH, json={"prompt": "a red circle", **members})


def opened(item: dict[str, Any]) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(item["b64_json"])))


async def test_the_answer_has_all_members(client: httpx2.AsyncClient) -> None:
    answer = await generate(client, n=2, seed=42, quality="hd")
    assert answer.status_code == 200
    body = answer.json()
    assert [set(item) for item in body["data"]] == [{"b64_json", "seed"}] * 2
    assert [item["seed"] for item in body["data"]] == [42, 43]
    assert answer.headers["x-seed"] == "42, 43"
    assert body["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 3,
    }
    assert {name: body[name] for name in ("background", "output_format", "quality", "size")} == {
        "background": "opaque",
        "output_format": "png",
        "quality": "high",
        "size": "64x64",
    }
    assert isinstance(body["created"], int)
    assert "resampled_from" not in body
    assert "x-resampled-from" not in answer.headers


async def test_a_reported_seed_asked_for_alone_gives_the_picture_again(client: httpx2.AsyncClient) -> None:
    together = (await generate(client, n=3, seed=2**32 - 2)).json()["data"]
    assert [item["seed"] for item in together] == [2**32 - 2, 2**32 - 1, 0]
    for item in together:
        alone = (await generate(client, seed=item["seed"])).json()["data"]
        assert alone[0]["b64_json"] == item["b64_json"]


async def test_seeds_are_random_unless_given(client: httpx2.AsyncClient) -> None:
    answers = [await generate(client, seed=seed) for seed in (None, -1, None)]
    assert len({answer.json()["data"][0]["seed"] for answer in answers}) == 3


@pytest.mark.parametrize(
    ("model", "response_format", "member"),
    [
        (None, None, "b64_json"),
        ("stable-cascade", None, "b64_json"),
        ("stabilityai/stable-cascade", None, "b64_json"),
        ("tiny", None, "b64_json"),
        ("", "", "b64_json"),
        ("gpt-image-1", None, "b64_json"),
        ("chatgpt-image-latest", None, "b64_json"),
        ("dall-e-3", None, "url"),
        ("dall-e-2", "b64_json", "b64_json"),
        ("gpt-image-1", "url", "url"),
    ],
)
async def test_the_model_name_chooses_the_form(
    client: httpx2.AsyncClient, model: str | None, response_format: str | None, member: str
) -> None:
    body = (await generate(client, model=model, response_format=response_format)).json()
    assert set(body["data"][0]) == {member, "seed"}


async def test_an_unknown_model_is_not_found(client: httpx2.AsyncClient) -> None:
    answer = await generate(client, model="flux")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["param"] == "model"
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_sizes_come_back_exactly(client: httpx2.AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({"size": "832x1216"}, (832, 1216)),
        ({"width": 512, "height": 768, "size": "64x64"}, (512, 768)),
        ({"width": 128}, (128, 64)),
        ({"size": "auto"}, (64, 64)),
        ({"size": ""}, (64, 64)),
    ]
    for members, size in cases:
        answer = await generate(client, **members)
        assert opened(answer.json()["data"][0]).size == size
        assert answer.json()["size"] == f"{size[0]}x{size[1]}"
        is_native = size == (64, 64)
        assert answer.headers.get("x-resampled-from") == (None if is_native else "64x64")
        assert answer.json().get("resampled_from") == (None if is_native else "64x64")


@pytest.mark.parametrize(
    ("quality", "steps"), [("low", (12, 6)), ("auto", (20, 10)), ("hd", (30, 15)), ("max", (40, 20))]
)
async def test_quality_chooses_the_steps(
    client: httpx2.AsyncClient, runner: FakeRunner, quality: str, steps: tuple[int, int]
) -> None:
    await generate(client, quality=quality)
    await generate(client, quality=quality, steps=7)
    first, second = (batch[0] for batch in runner.batches)
    assert (first.prior_num_inference_steps, first.decoder_num_inference_steps) == steps
    assert (second.prior_num_inference_steps, second.decoder_num_inference_steps) == (7, steps[1])


async def test_native_members_and_their_aliases_arrive(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    native = {
        "negative_prompt": "green",
        "prior_num_inference_steps": 3,
        "prior_guidance_scale": 2.5,
        "decoder_num_inference_steps": 4,
        "decoder_guidance_scale": 1.5,
        "preset": "diffusers",
        "sampler": "ddim",
    }
    await generate(client, seed=1, **native)
    for aliases in (
        {"steps": 3, "cfg": 2.5},
        {"num_inference_steps": "3", "guidance_scale": "2.5", "num_images_per_prompt": 1},
    ):
        await generate(client, seed=1, **{k: v for k, v in native.items() if "prior" not in k}, **aliases)
    requests = [batch[0] for batch in runner.batches]
    assert requests[0].model_dump().items() >= native.items()
    assert requests[1] == requests[0]
    assert requests[2] == requests[0]


async def test_unknown_members_are_ignored_and_named(client: httpx2.AsyncClient) -> None:
    ignored = {"style": "vivid", "moderation": "low", "user": "u", "partial_images": 2, "x-später": 1}
    answer = await generate(client, **ignored, input_fidelity=None, stream=False)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "moderation, partial_images, stream, style, user"


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
        ({"output_compression": 101}, "output_compression", "integer_out_of_range"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"stream": True}, "stream", "unsupported_parameter"),
        ({"image": "data:"}, "image", "unsupported_parameter"),
        ({"seeds": [1, 2]}, "seeds", "unsupported_parameter"),
        ({"strength": 0.5}, "strength", "unsupported_parameter"),
        ({"mask": "data:"}, "mask", "unsupported_parameter"),
        ({"control": {"type": "canny"}}, "control", "unsupported_parameter"),
        ({"loras": [{"name": "x"}]}, "loras", "unsupported_parameter"),
        ({"image_prompts": [{}]}, "image_prompts", "unsupported_parameter"),
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
    assert runner.batches == []


async def test_empty_lists_and_false_count_as_absent(client: httpx2.AsyncClient) -> None:
    answer = await generate(client, loras=[], control=None, image_prompts=[], stream=False)
    assert answer.status_code == 200


async def test_limits_of_the_operator_count(serve: Serve) -> None:
    async with serve(max_images=2, max_pixels=64 * 64) as client:
        assert (await generate(client, n=3)).json()["error"]["param"] == "n"
        assert (await generate(client, size="128x64")).json()["error"]["param"] == "size"
        assert (await generate(client, n=2, size="64x64")).status_code == 200


async def test_raw_bytes_for_one_picture(client: httpx2.AsyncClient) -> None:
    for accept, format_ in [
        ("image/png", "PNG"),
        ("image/jpeg", "JPEG"),
        ("image/webp;q=0.9, image/*;q=0.1", "WEBP"),
        ("image/*", "JPEG"),
    ]:
        answer = await client.post(
            PATH, json={"prompt": "x", "seed": 5, "output_format": "jpeg"}, headers={"accept": accept}
        )
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"image/{format_.lower()}"
        assert answer.headers["x-seed"] == "5"
        assert answer.headers["content-disposition"].startswith("inline; filename=")
        assert Image.open(BytesIO(answer.content)).format == format_
    for accept in ("*/*", "application/json", "application/json, image/png;q=0.5", "text/html"):
        answer = await client.post(PATH, json={"prompt": "x"}, headers={"accept": accept})
        assert answer.headers["content-type"] == "application/json"


async def test_raw_bytes_cannot_hold_two_pictures(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    answer = await client.post(PATH, json={"prompt": "x", "n": 2}, headers={"accept": "image/png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (406, "not_acceptable")
    answer = await client.post(PATH, json={"prompt": "x"}, headers={"accept": "image/gif"})
    assert answer.status_code == 406
    assert runner.batches == []


async def test_a_cut_prompt_is_said(client: httpx2.AsyncClient) -> None:
    assert (await generate(client, prompt="long " * 100)).headers["x-prompt-truncated"] == "true"
    assert "x-prompt-truncated" not in (await generate(client)).headers


async def test_urls_are_absolute_and_open_without_a_key(serve: Serve) -> None:
    async with serve(api_keys="secret") as client:
        key = {"authorization": "Bearer secret"}
        answer = await client.post(
            PATH, json={"prompt": "x", "response_format": "url", "output_format": "webp"}, headers=key
        )
        url = answer.json()["data"][0]["url"]
        assert url.startswith("http://server.test/files/")
        assert url.partition("?")[0].endswith(".webp")
        picture = await client.get(url)
        assert picture.headers["content-type"] == "image/webp"
        assert Image.open(BytesIO(picture.content)).size == (64, 64)


async def test_the_base_of_urls(serve: Serve) -> None:
    forwarded = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.example"}
    members = {"prompt": "x", "response_format": "url"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "http://server.test/files/"),
        ({"trusted_proxies": "127.0.0.0/8"}, "https://pictures.example/files/"),
        ({"trusted_proxies": "10.0.0.0/8"}, "http://server.test/files/"),
        ({"public_base_url": "https://cdn.example/"}, "https://cdn.example/files/"),
    ]
    for settings, expected in cases:
        async with serve(**settings) as client:
            answer = await client.post(PATH, json=members, headers=forwarded)
            assert answer.json()["data"][0]["url"].startswith(expected)
    async with serve() as client:
        answer = await client.post(PATH, json=members, headers={"host": "evil.example/x?"})
        assert answer.status_code == 400


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


async def test_models_are_listed(serve: Serve) -> None:
    model = {
        "id": "stable-cascade",
        "object": "model",
        "created": 1707868800,
        "owned_by": "stabilityai",
    }
    async with serve() as client:
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [model]}
        for name in ("stable-cascade", "stabilityai/stable-cascade", "dall-e-3"):
            assert (await client.get(f"/v1/models/{name}")).json() == model
        assert (await client.get("/v1/models/flux")).json()["error"]["code"] == "model_not_found"
    async with serve(list_aliases=True) as client:
        listed = [item["id"] for item in (await client.get("/v1/models")).json()["data"]]
        assert listed == ["stable-cascade", "dall-e-2", "dall-e-3", "gpt-image-1"]


async def test_no_picture_before_the_model(serve: Serve, runner: FakeRunner) -> None:
    runner.loading.clear()
    async with serve(wait=False) as client:
        answer = await generate(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 59
        assert (await generate(client, n=0)).status_code == 400
        runner.loading.set()
        client.app.state.services.engine.loaded.result(10)  # type: ignore[attr-defined]
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
    async with serve(max_queue=3, max_batch=1) as client:
        runner.gate.clear()
        running = asyncio.ensure_future(generate(client))
        await until(lambda: runner.batches)
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
    async with serve(sync_timeout=0.02) as client:
        runner.gate.clear()
        answer = await generate(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        runner.gate.set()
        await until(lambda: runner.num_stopped)
        assert runner.steps_done == 1


async def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    answer = await generate(client, response_format="url")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
    folder = client.app.state.services.settings.data_dir / "files"  # type: ignore[attr-defined]
    assert list(folder.iterdir()) == []
    assert (await generate(client)).status_code == 200
