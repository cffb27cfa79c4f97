"""`/v1/images/generations` and `/v1/models`, as clients of OpenAI's contract use them."""

import base64
import hashlib
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner

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
    first, second = (track.request for track in runner.started)
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
    requests = [track.request for track in runner.started]
    assert requests[0].model_dump().items() >= native.items()
    assert requests[1] == requests[0]
    assert requests[2] == requests[0]


async def test_unknown_members_are_ignored_and_named(client: httpx2.AsyncClient) -> None:
    ignored = {"style": "vivid", "moderation": "low", "user": "u", "metadata": [], "x-später": 1}
    answer = await generate(client, **ignored, input_fidelity=None, stream=False)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "metadata, moderation, style, user"


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
        job_id = answer.headers["x-job-id"]
        filename = f"{job_id}.{format_.lower()}"
        assert answer.headers["content-disposition"] == f'inline; filename="{filename}"'
        assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
        assert Image.open(BytesIO(answer.content)).format == format_
    for accept in ("*/*", "application/json", "application/json, image/png;q=0.5", "text/html"):
        answer = await client.post(PATH, json={"prompt": "x"}, headers={"accept": accept})
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["jpg", "JPEG", "Jpg"])
async def test_formats_are_known_by_their_usual_names(client: httpx2.AsyncClient, name: str) -> None:
    answer = await client.post(PATH, json={"prompt": "x", "output_format": name})
    assert answer.json()["output_format"] == "jpeg"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_every_picture_says_that_a_model_made_it(
    client: httpx2.AsyncClient, output_format: str
) -> None:
    members = {"prompt": "x", "output_format": output_format}
    raw = await client.post(PATH, json=members, headers={"accept": f"image/{output_format}"})
    as_url = await client.post(PATH, json={**members, "response_format": "url"})
    as_text = await client.post(PATH, json=members)
    contents = [
        raw.content,
        (await client.get(as_url.json()["data"][0]["url"])).content,
        base64.b64decode(as_text.json()["data"][0]["b64_json"]),
    ]
    for content in contents:
        packet = Image.open(BytesIO(content)).info["xmp"]
        assert b"digitalsourcetype/trainedAlgorithmicMedia" in packet


async def test_the_settings_are_embedded_when_asked_for(client: httpx2.AsyncClient) -> None:
    answer = await generate(client, negative_prompt="blue", seed=9, embed_metadata=True)
    assert opened(answer.json()["data"][0]).info["parameters"] == (
        "a red circle\nNegative prompt: blue\nSteps: 20, Sampler: ddpm, CFG scale: 4.0, Seed: 9, "
        "Size: 64x64, Model: tiny, Decoder steps: 10, Decoder CFG scale: 0.0, Preset: official"
    )
    assert "parameters" not in opened((await generate(client)).json()["data"][0]).info


async def test_raw_bytes_cannot_hold_two_pictures(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    answer = await client.post(PATH, json={"prompt": "x", "n": 2}, headers={"accept": "image/png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (406, "not_acceptable")
    answer = await client.post(PATH, json={"prompt": "x"}, headers={"accept": "image/gif"})
    assert answer.status_code == 406
    assert runner.started == []


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
        assert url.startswith("http://server/files/")
        assert url.partition("?")[0].endswith(".webp")
        picture = await client.get(url)
        assert picture.headers["content-type"] == "image/webp"
        assert Image.open(BytesIO(picture.content)).size == (64, 64)


async def test_the_base_of_urls(serve: Serve) -> None:
    forwarded = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.example"}
    members = {"prompt": "x", "response_format": "url"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "http://server/files/"),
        ({"trusted_proxies": "127.0.0.0/8"}, "https://pictures.example/files/"),
        ({"trusted_proxies": "10.0.0.0/8"}, "http://server/files/"),
        ({"public_base_url": "https://cdn.example/"}, "https://cdn.example/files/"),
    ]
    for settings, expected in cases:
        async with serve(**settings) as client:
            answer = await client.post(PATH, json=members, headers=forwarded)
            assert answer.json()["data"][0]["url"].startswith(expected)
    hosts = {
        "0.0.0.0": "127.0.0.1",
        "0.0.0.0:8000": "127.0.0.1:8000",
        "[::]:80": "[::1]:80",
        "0.0.0.0.x": None,
    }
    async with serve(api_keys="k") as client:
        for host, told in hosts.items():
            answer = await client.post(PATH, json=members, headers={"host": host, "x-api-key": "k"})
            assert answer.json()["data"][0]["url"].startswith(f"http://{told or host}/files/")
        answer = await client.post(PATH, json=members, headers={"host": "evil.example/x?", "x-api-key": "k"})
        assert answer.status_code == 400


async def test_models_are_listed(serve: Serve) -> None:
    model = {
        "id": "stable-cascade",
        "object": "model",
        "created": 1707868800,
        "owned_by": "stable-cascade-server",
    }
    async with serve() as client:
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [model]}
        for name in ("stable-cascade", "stabilityai/stable-cascade", "dall-e-3"):
            assert (await client.get(f"/v1/models/{name}")).json() == model
        assert (await client.get("/v1/models/flux")).json()["error"]["code"] == "model_not_found"
    async with serve(list_aliases=True) as client:
        listed = [item["id"] for item in (await client.get("/v1/models")).json()["data"]]
        assert listed == ["stable-cascade", "dall-e-2", "dall-e-3", "gpt-image-1"]


async def test_the_name_that_the_log_and_version_show_is_accepted(serve: Serve) -> None:
    async with serve(model="/models/my-cascade") as client:
        for name in ("my-cascade", "/models/my-cascade"):
            assert (await generate(client, model=name)).status_code == 200
        assert (await generate(client, model="models")).status_code == 404
