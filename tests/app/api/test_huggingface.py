"""`/hf`, as Hugging Face's clients use it: a URL for each task, and the answer is the picture."""

import base64
import json
from io import BytesIO

import httpx2
import pytest
from PIL import Image

from app.schemas import GenerationRequest
from tests.app.api.sse import Watcher
from tests.app.conftest import Serve, eventually
from tests.app.fakes import FakeRunner, closed, until
from tests.app.pictures import SIZE, file, sample

pytestmark = pytest.mark.anyio

TEXT, IMAGE = "/hf/text-to-image", "/hf/image-to-image"
PICTURE = file(sample())
IN_BASE64 = base64.b64encode(PICTURE).decode()


def drawn(runner: FakeRunner) -> GenerationRequest:
    return runner.started[-1].request


def opened(answer: httpx2.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(BytesIO(answer.content))


async def test_a_prompt_becomes_a_picture(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    parameters = {
        "negative_prompt": "blue", "width": 300, "height": 201, "num_inference_steps": 5, "guidance_scale": 3,
        "scheduler": "Euler", "seed": 9, "decoder_num_inference_steps": 4, "sampler": "ddim",
        "num_images_per_prompt": 3, "seeds": [1, 2], "unheard": {"of": 1},
    }  # fmt: skip
    answer = await client.post(TEXT, json={"inputs": "a red circle", "parameters": parameters})
    assert opened(answer).size == (300, 201)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "9"
    request = drawn(runner)
    assert (request.prompt, request.negative_prompt, request.seeds) == ("a red circle", "blue", (9,))
    assert (request.prior_num_inference_steps, request.prior_guidance_scale) == (5, 3.0)
    assert (request.decoder_num_inference_steps, request.sampler) == (4, "ddim")
    assert answer.headers["x-ignored-params"] == "num_images_per_prompt, scheduler, unheard"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "png"),
        ("*/*", "png"),
        ("application/json", "png"),
        ("image/jpeg", "jpeg"),
        ("image/webp", "webp"),
    ],
)
async def test_accept_chooses_the_format(client: httpx2.AsyncClient, accept: str, kind: str) -> None:
    answer = await client.post(TEXT, json={"inputs": "x"}, headers={"accept": accept})
    assert answer.headers["content-type"] == f"image/{kind}"
    assert (opened(answer).format or "").lower() == kind
    assert opened(answer).size == (64, 64)


async def test_a_picture_is_redrawn_by_a_prompt(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    size = {"target_size": {"width": 111, "height": 99}, "width": None, "height": None}
    parameters = {"prompt": "a cat", "strength": 0.4, **size}
    answer = await client.post(IMAGE, json={"inputs": IN_BASE64, "parameters": parameters})
    assert opened(answer).size == (111, 99)
    request = drawn(runner)
    assert request.image is not None
    assert (request.strength, request.prompt, request.image_prompts) == (0.4, "a cat", ())


@pytest.mark.parametrize("kind", [None, "image/png", "application/octet-stream", "application/json"])
async def test_bare_bytes_give_a_variation(
    client: httpx2.AsyncClient, runner: FakeRunner, kind: str | None
) -> None:
    content = file(sample(size=(97, 65)))
    answer = await client.post(IMAGE, content=content, headers={"content-type": kind} if kind else {})
    assert opened(answer).size == (97, 65)
    request = drawn(runner)
    assert (request.image, request.prompt, len(request.image_prompts)) == (None, "", 1)


async def test_without_a_prompt_json_gives_a_variation(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    body = {"inputs": IN_BASE64, "parameters": {"prompt": None, "strength": 0.5, "seed": 3}}
    assert opened(await client.post(IMAGE, json=body)).size == SIZE
    marked = b"\xef\xbb\xbf" + json.dumps(body).encode()
    assert opened(await client.post(IMAGE, content=marked)).size == SIZE
    assert (drawn(runner).strength, drawn(runner).seeds) == (None, (3,))


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        (TEXT, b'{"inputs": " "}', "inputs must not be blank"),
        (TEXT, b"{}", "inputs is required"),
        (TEXT, b'{"inputs": "x", "parameters": 7}', "parameters must be an object"),
        (TEXT, b'{"inputs": "x", "parameters": {"width": 10}}', "width must be"),
        (IMAGE, b'{"inputs": "eA==", "parameters": {"target_size": [64, 64]}}', "target_size must be"),
        (TEXT, b'{"inputs": "x", "parameters": {"num_inference_steps": 0}}', "num_inference_steps must be"),
        (TEXT, b'{"inputs": "x", "parameters": {"width": 64, "height": 999}}', "sides must be"),
        (IMAGE, b"", "inputs is required"),
        (IMAGE, b"{}", "inputs is required"),
        (IMAGE, b'{"inputs": "nonsense"}', "inputs must be"),
        (IMAGE, b"nonsense", "inputs must be a picture"),
        (IMAGE, b'{"inputs": "nonsense", "parameters": {"prompt": "x"}}', "inputs must be"),
        (IMAGE, b"{nonsense", "not valid JSON"),
    ],
)
async def test_mistakes_are_named(client: httpx2.AsyncClient, path: str, content: bytes, words: str) -> None:
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert words in answer.json()["error"]


async def test_a_model_that_loads_has_a_time(serve: Serve, runner: FakeRunner) -> None:
    with closed(runner.loading):
        async with serve(wait=False, loading_wait=0.01) as client:
            answer = await client.post(TEXT, json={"inputs": "x"})
            runner.loading.set()
    assert answer.status_code == 503
    assert answer.json()["estimated_time"] == float(answer.headers["retry-after"])


async def test_keys_limits_and_paths_are_told_in_this_family(serve: Serve) -> None:
    async with serve(api_keys="k", rate_limit=1) as client:
        answers = [await client.post(TEXT, json={"inputs": "x"})]
        client.headers["authorization"] = "Bearer k"
        answers += [await client.post(TEXT, json={"inputs": "x"}) for _ in range(2)]
        answers += [await client.post("/hf/nothing"), await client.get(TEXT)]
    assert [answer.status_code for answer in answers] == [401, 200, 429, 404, 405]
    assert all(set(answer.json()) == {"error"} for answer in answers if answer.status_code != 200)


async def test_twice_with_one_key_is_once(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    async def post(content: bytes) -> httpx2.Response:
        return await client.post(IMAGE, content=content, headers={"idempotency-key": "k"})

    first, second, other = await post(PICTURE), await post(PICTURE), await post(file(sample("L")))
    assert first.content == second.content
    assert (second.headers["idempotency-replayed"], other.status_code) == ("true", 422)
    assert len(runner.started) == 1


async def test_who_leaves_gives_up_the_work(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    async def has(status: str) -> bool:
        jobs = (await client.get("/api/v1/jobs")).json()["data"]
        return [job["status"] for job in jobs] == [status]

    watcher = Watcher(client)
    with closed(runner.gate):
        async with watcher.watching("POST", TEXT, {"inputs": "x"}):
            await eventually(lambda: has("running"))
            watcher.leave()
            await until(lambda: watcher.is_over)
        await eventually(lambda: has("canceled"))
