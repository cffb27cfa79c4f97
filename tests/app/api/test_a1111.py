"""`/sdapi/v1`, as clients of AUTOMATIC1111's server use it."""

import asyncio
import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from app.api.a1111 import _LORA
from app.api.a1111_surroundings import ALWAYS, NOTHING_TO_DO
from app.api.infotext import parse_parameters
from app.schemas import GenerationRequest
from app.storage.encoding import encode, parameters_text
from tests.app.conftest import Serve, eventually
from tests.app.fakes import FakeRunner, closed, until
from tests.app.pictures import SIZE, file, sample

pytestmark = pytest.mark.anyio

ROOT = "/sdapi/v1"
PICTURE = base64.b64encode(file(sample())).decode()
KEY = "s3cret"


async def draw(client: httpx2.AsyncClient, path: str = "txt2img", **members: Any) -> httpx2.Response:
    return await client.post(f"{ROOT}/{path}", json={"prompt": "a red circle", "steps": 3, **members})


async def redraw(
    client: httpx2.AsyncClient, headers: dict[str, str] | None = None, **members: Any
) -> httpx2.Response:
    body = {"prompt": "a red circle", "init_images": [PICTURE], "width": 96, "height": 64, **members}
    return await client.post(f"{ROOT}/img2img", json=body, headers=headers)


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text, validate=True)))


def drawn(runner: FakeRunner) -> GenerationRequest:
    return runner.started[-1].request


def mask_of(runner: FakeRunner) -> Image.Image:
    mask = drawn(runner).mask
    assert mask is not None
    return Image.open(BytesIO(runner.started[-1].run.inputs[mask.sha256]))


async def test_the_answer_is_what_its_clients_read(client: httpx2.AsyncClient) -> None:
    answer = await draw(client, negative_prompt="blue", seed=7, batch_size=2, n_iter=2, cfg_scale=5)
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"images", "parameters", "info"}
    assert body["parameters"]["negative_prompt"] == "blue"
    info = json.loads(body["info"])
    assert isinstance(body["info"], str)
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert (info["seed"], info["width"], info["height"]) == (7, 512, 512)
    assert (info["steps"], info["cfg_scale"], info["sampler_name"]) == (3, 5.0, "DDPM")
    assert (info["batch_size"], info["index_of_first_image"]) == (2, 0)
    assert set(info) >= {
        "prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "seed", "all_seeds", "subseed",
        "all_subseeds", "width", "height", "sampler_name", "cfg_scale", "steps", "batch_size",
        "sd_model_name",
        "sd_model_hash", "index_of_first_image", "infotexts", "job_timestamp",
    }  # fmt: skip
    for picture, seed, infotext in zip(body["images"], info["all_seeds"], info["infotexts"], strict=True):
        image = opened(picture)
        assert (image.format, image.size) == ("PNG", (512, 512))
        assert image.info["parameters"] == infotext
        assert infotext.startswith("a red circle\nNegative prompt: blue\nSteps: 3, Sampler: ")
        assert f"Seed: {seed}, Size: 512x512" in infotext
    assert answer.headers["x-seed"] == "7, 8, 9, 10"


async def test_members_of_forms_that_mean_nothing_here_are_ignored(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    """What webuiapi and SillyTavern send with every request."""
    answer = await draw(
        client,
        enable_hr=False, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.7, firstphase_width=0,
        styles=[], subseed=-1, subseed_strength=0, seed_resize_from_h=0, restore_faces=False, tiling=False,
        do_not_save_samples=False, eta=1.0, s_churn=0, override_settings={"sd_model_checkpoint": "sdxl"},
        override_settings_restore_afterwards=True, script_args=[], script_name=None, sampler_name="Euler a",
        sampler_index=0, scheduler="Karras", alwayson_scripts={"ADetailer": {"args": [True]}}, clip_skip=2,
        url="http://localhost", auth="", save_images=False, seed=None, negative_prompt=None,
    )  # fmt: skip
    assert answer.status_code == 200
    assert drawn(runner).sampler == "ddpm"
    ignored = answer.headers["x-ignored-params"].split(", ")
    assert {"clip_skip", "scheduler", "alwayson_scripts", "styles"} <= set(ignored)
    assert not {"prompt", "steps", "override_settings", "seed", "negative_prompt"} & set(ignored)
    assert (await draw(client, sampler_name=3)).status_code == 200


@pytest.mark.parametrize("size", [(500, 333), (96, 257), (64, 64)])
async def test_any_size_comes_back_exactly(client: httpx2.AsyncClient, size: tuple[int, int]) -> None:
    answer = await draw(client, width=size[0], height=size[1])
    assert opened(answer.json()["images"][0]).size == size


async def test_what_counts_arrives(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    overrides = {"decoder_steps": 4, "decoder_guidance_scale": 1.5}
    await draw(client, steps=150, cfg_scale=30, sampler_name="ddim", override_settings=overrides)
    request = drawn(runner)
    assert (request.prior_num_inference_steps, request.prior_guidance_scale) == (100, 20.0)
    assert (request.decoder_num_inference_steps, request.decoder_guidance_scale) == (4, 1.5)
    assert (request.sampler, request.embed_metadata) == ("ddim", True)


async def test_loras_are_named_in_the_prompt(serve: Serve, runner: FakeRunner, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("sketch", "night"):
        (folder / f"{name}.safetensors").write_bytes(b"x")
    runner.lora_dirs = (str(folder),)
    prompt = "a cat <lora:sketch: -8e-1 > in <lora:absent:1><lora:night::x> snow"
    async with serve() as client:
        info = json.loads((await draw(client, prompt=prompt)).json()["info"])
        listed = (await client.get(f"{ROOT}/loras")).json()
    assert info["prompt"] == prompt
    assert drawn(runner).prompt == "a cat  in  snow"
    assert [(lora.name, lora.scale) for lora in drawn(runner).loras] == [("sketch", -0.8), ("night", 1.0)]
    assert [entry["name"] for entry in listed] == ["night", "sketch"]
    assert str(folder) not in json.dumps(listed)


@pytest.mark.parametrize("scale", ["5", "-2.1", "much", "nan", "1e999", "1" * 31_000])
async def test_a_scale_that_no_lora_has_is_named(client: httpx2.AsyncClient, scale: str) -> None:
    answer = await draw(client, prompt=f"a cat <lora:night:{scale}>")
    assert answer.status_code == 400
    assert "prompt has " in answer.json()["detail"]
    assert "from -2 to 2" in answer.json()["detail"]


def test_no_prompt_takes_long_to_read() -> None:
    """Each would take minutes by a pattern that tries everything."""
    digits = "<lora:a:" + "1" * 31_900
    for prompt in (digits, "<lora:" * 5300, "<lora:a:" * 4000, "<lora:a:1:" * 3000 + ">"):
        assert len(_LORA.sub("", prompt)) <= len(prompt)
    for text in ("a\na" + " " * 90_000 + "b", "a:" * 45_000, 'a:"' * 30_000, "a b" * 30_000):
        parse_parameters(text)


async def test_a_model_that_is_loading_is_waited_for(serve: Serve, runner: FakeRunner) -> None:
    with closed(runner.loading):
        async with serve(wait=False) as client:
            waiting = asyncio.create_task(draw(client, prompt="a cat <lora:absent:1>"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            runner.loading.set()
            assert (await waiting).status_code == 200


async def test_a_picture_is_redrawn(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    answer = await redraw(client, denoising_strength=0.4)
    assert answer.json()["parameters"]["init_images"] is None
    request = drawn(runner)
    assert request.image is not None
    assert ((request.image.width, request.image.height), request.strength) == (SIZE, 0.4)
    assert (request.mask, request.feather, request.image_prompts) == (None, 0, ())
    await redraw(client, mask_blur=4)  # which some send always
    assert drawn(runner).feather == 0
    info = json.loads(answer.json()["info"])
    assert info["denoising_strength"] == 0.4
    assert "Denoising strength: 0.4" in info["infotexts"][0]


@pytest.mark.parametrize("is_inverted", [0, 1])
@pytest.mark.parametrize("size", [SIZE, (48, 32), (300, 200)])
async def test_a_mask_of_any_size_marks_what_is_painted(
    client: httpx2.AsyncClient, runner: FakeRunner, size: tuple[int, int], is_inverted: int
) -> None:
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 2, 0, *size))
    text = base64.b64encode(file(mask)).decode()
    answer = await redraw(client, mask=text, mask_blur=4, inpainting_mask_invert=is_inverted)
    assert answer.status_code == 200
    made = mask_of(runner)
    assert (made.size, drawn(runner).feather) == (SIZE, 4)
    left, right = made.getpixel((4, 30)), made.getpixel((90, 30))
    assert (left, right) == ((255, 0) if is_inverted else (0, 255))


async def test_of_a_mask_with_transparency_what_is_opaque_is_painted(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    """As in the original, and unlike OpenAI's."""
    mask = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (0, 0, SIZE[0] // 2, SIZE[1]))
    await redraw(client, mask=base64.b64encode(file(mask)).decode())
    assert (mask_of(runner).getpixel((4, 30)), mask_of(runner).getpixel((90, 30))) == (255, 0)


@pytest.mark.parametrize("prompt", ["", " ", "<lora:night:1>"])
async def test_without_words_the_picture_is_the_prompt(
    client: httpx2.AsyncClient, runner: FakeRunner, prompt: str
) -> None:
    assert (await redraw(client, prompt=prompt)).status_code == 200
    [shown] = drawn(runner).image_prompts
    assert shown.image == drawn(runner).image


@pytest.mark.parametrize(
    ("members", "status", "words"),
    [
        ({"prompt": " "}, 400, "prompt must not be blank"),
        ({"width": 63}, 400, "width must be greater than or equal to 64"),
        ({"height": 5000}, 400, "height must be less than or equal to 4096"),
        ({"width": 4096, "height": 4096}, 400, "width times height"),
        ({"width": 64, "height": 1000}, 400, "sides must be within"),
        ({"batch_size": 4, "n_iter": 3}, 422, "batch_size times n_iter must be at most 10"),
        ({"batch_size": 10**4000}, 400, "batch_size must be"),
        ({"batch_size": "1" * 3000, "n_iter": "1" * 3000}, 400, "batch_size must be"),
        ({"steps": 0}, 400, "steps must be"),
        ({"seed": 2**32}, 400, "seed must be"),
        ({"cfg_scale": "much"}, 400, "cfg_scale must be"),
        ({"override_settings": {"decoder_steps": 1000}}, 400, "override_settings must be"),
    ],
)
async def test_mistakes_are_named(
    client: httpx2.AsyncClient, members: dict[str, Any], status: int, words: str
) -> None:
    answer = await draw(client, **members)
    assert answer.status_code == status
    body = answer.json()
    assert set(body) == {"error", "detail", "body", "errors"}
    assert body["error"] == "HTTPException"
    assert words in body["detail"] == body["errors"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"init_images": None}, "init_images is required"),
        ({"init_images": []}, "init_images must have at least 1"),
        ({"init_images": ["nonsense"]}, "init_images must be"),
        ({"init_images": [{"sha256": "0" * 64}]}, "init_images must be in base64"),
        ({"mask": "nonsense"}, "mask must be"),
        ({"mask": {"sha256": "0" * 64}}, "mask must be in base64"),
        ({"denoising_strength": 2}, "denoising_strength must be"),
    ],
)
async def test_mistakes_with_pictures_are_named(
    client: httpx2.AsyncClient, members: dict[str, Any], words: str
) -> None:
    answer = await redraw(client, **members)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


async def test_a_full_queue_is_told_before_a_mask_is_decoded(serve: Serve, runner: FakeRunner) -> None:
    runner.max_samples = 1
    async with serve(max_queue=1) as client:
        with closed(runner.gate):
            running = [asyncio.create_task(draw(client))]
            await until(lambda: runner.started)
            mask = {"mask": base64.b64encode(file(Image.new("L", SIZE))).decode()}
            running += [asyncio.create_task(redraw(client, {"idempotency-key": "k"}, **mask))]
            await eventually(lambda: is_queued(client, 1))
            answer = await redraw(client, mask="nonsense")
            assert answer.status_code == 503
            assert "retry-after" in answer.headers
            again = asyncio.create_task(redraw(client, {"idempotency-key": "k"}, **mask))
            await asyncio.sleep(0.05)
            assert not again.done(), "it was accepted before"
        for each in (*running, again):
            assert (await each).status_code == 200


async def is_queued(client: httpx2.AsyncClient, number: int) -> bool:
    return bool((await client.get("/api/v1/queue")).json()["queued"] == number)


async def test_progress_is_that_of_the_oldest(serve: Serve, runner: FakeRunner) -> None:
    async with serve(api_keys=f"web={KEY},other=second") as client:
        client.headers["authorization"] = "Basic " + base64.b64encode(f"x:{KEY}".encode()).decode()

        async def progress() -> dict[str, Any]:
            answer: dict[str, Any] = (await client.get(f"{ROOT}/progress?skip_current_image=true")).json()
            return answer

        async def has_begun(number: int) -> bool:
            return bool((await progress())["state"]["job_count"] == number)

        idle = await progress()
        assert (idle["progress"], idle["state"]["job_count"], idle["eta_relative"]) == (0.0, 0, 0.0)
        with closed(runner.gate):
            native = client.post("/api/v1/images", json={"prompt": "x"})
            others = [asyncio.create_task(native)]
            first = asyncio.create_task(draw(client, force_task_id="task(1)"))
            await eventually(lambda: has_begun(1))
            second = asyncio.create_task(draw(client))
            await eventually(lambda: has_begun(2))
            busy = await progress()
            assert busy["state"]["sampling_steps"] > 0
            assert (busy["state"]["job"], busy["state"]["job_no"]) == ("task(1)", 0)
            assert busy["current_image"] is None
            assert busy["eta_relative"] > 0
            foreign = await client.get(f"{ROOT}/progress", headers={"authorization": "Bearer second"})
            assert foreign.json()["state"]["job_count"] == 0
        for each in (first, second, *others):
            assert (await each).status_code == 200
        assert (await progress()) | {"state": None} == idle | {"state": None}


@pytest.mark.parametrize("path", ["interrupt", "skip"])
async def test_who_is_interrupted_gets_what_is_finished(
    client: httpx2.AsyncClient, runner: FakeRunner, path: str
) -> None:
    async def finished(number: int) -> bool:
        jobs = (await client.get("/api/v1/jobs?status=running")).json()["data"]
        return [len(job["images"]) for job in jobs] == [number]

    def hold_the_second(tracks: Any) -> None:
        if any(track.run.index for track in tracks):
            runner.gate.clear()
            runner.gate.wait(10)

    runner.first_cap = 1
    runner.on_step = hold_the_second
    waiting = asyncio.create_task(draw(client, batch_size=2, seed=5, cfg_scale=0))
    await eventually(lambda: finished(1))
    assert (await progress_of(client))["progress"] > 0
    assert (await client.post(f"{ROOT}/{path}")).json() == {}
    runner.on_step = lambda tracks: None
    runner.gate.set()
    answer = await waiting
    assert answer.status_code == 200
    assert len(answer.json()["images"]) == 1
    assert json.loads(answer.json()["info"])["all_seeds"] == [5]


async def progress_of(client: httpx2.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get(f"{ROOT}/progress")).json()
    return answer


async def test_a_job_is_found_behind_many_others(serve: Serve, runner: FakeRunner) -> None:
    runner.max_samples = 1
    async with serve(max_queue=200) as client:
        with closed(runner.gate):
            waiting = asyncio.create_task(draw(client))
            await until(lambda: runner.started)
            second = asyncio.create_task(draw(client))
            await eventually(lambda: is_queued(client, 1))
            for _ in range(101):
                body = {"prompt": "x"}
                await client.post("/api/v1/images", json=body, headers={"prefer": "respond-async"})
            await eventually(lambda: is_queued(client, 102))
            assert (await progress_of(client))["state"]["job_count"] == 2
            await client.post(f"{ROOT}/interrupt")
            assert (await progress_of(client))["state"]["job_count"] <= 1  # until the step is done
        for each in (waiting, second):
            assert (await each).json()["images"] == []


async def test_a_failure_is_told_in_this_family(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    runner.broken["bad"] = RuntimeError("no")
    answer = await draw(client, prompt="bad")
    assert answer.status_code == 500
    assert answer.json()["error"] == "HTTPException"
    assert answer.headers["x-should-retry"] == "false"


async def test_twice_with_one_key_is_once(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    first, second = [
        await client.post(f"{ROOT}/txt2img", json={"prompt": "x"}, headers={"idempotency-key": "k"})
        for _ in range(2)
    ]
    assert first.json() == second.json()
    assert second.headers["idempotency-replayed"] == "true"
    assert len(runner.started) == 1


async def test_pictures_need_not_be_sent(client: httpx2.AsyncClient) -> None:
    body = (await draw(client, send_images=False)).json()
    assert body["images"] == []
    assert len(json.loads(body["info"])["infotexts"]) == 1


async def test_options_may_be_given_back(client: httpx2.AsyncClient) -> None:
    options = (await client.get(f"{ROOT}/options")).json()
    assert options["sd_model_checkpoint"] == "stable-cascade"
    assert {"samples_format", "CLIP_stop_at_last_layers"} <= set(options)
    assert "forge_preset" not in options
    known = [{"sd_model_checkpoint": f"stable-cascade{end}"} for end in (" [abc]", ".safetensors [abc]")]
    for content in (options, *known, {"new": [1]}, None):
        answer = await client.post(f"{ROOT}/options", json=content)
        assert (answer.status_code, answer.json()) == (200, {})
    assert (await client.post(f"{ROOT}/options")).status_code == 200
    other = await client.post(f"{ROOT}/options", json={"sd_model_checkpoint": "sdxl"})
    assert other.status_code == 404
    assert "stable-cascade is" in other.json()["detail"]
    assert (await client.get(f"{ROOT}/options")).json() == options


async def test_lists_are_there(client: httpx2.AsyncClient) -> None:
    for path in ALWAYS:
        answer = await client.get(f"{ROOT}/{path}")
        assert answer.status_code == 200
        assert answer.json() == ALWAYS[path][1]
    for path in ("sd-models", "samplers", "schedulers", "upscalers", "latent-upscale-modes"):
        assert ALWAYS[path][1], f"clients want an entry of {path}"
    for path in NOTHING_TO_DO:
        answer = await client.post(f"{ROOT}/{path}")
        assert (answer.status_code, answer.json()) == (200, {})


async def test_what_is_not_here_is_told_in_this_family(client: httpx2.AsyncClient) -> None:
    for method, path in (("POST", "interrogate"), ("POST", "extra-single-image"), ("GET", "txt2img")):
        answer = await client.request(method, f"{ROOT}/{path}")
        assert answer.status_code in (404, 405)
        assert answer.json()["error"] == "HTTPException"


async def test_a_key_is_asked_for_as_a_password_too(serve: Serve) -> None:
    async with serve(api_keys=KEY) as client:
        answer = await client.get(f"{ROOT}/options")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="images", Basic realm="images"'


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_the_text_in_a_picture_is_read(client: httpx2.AsyncClient, kind: Any) -> None:
    request = GenerationRequest(
        prompt="a cat, a dog\nand more", negative_prompt="no", width=64, height=64, seeds=(7,)
    )
    text = parameters_text(request, 7, "stable-cascade", {"Note": 'a, "b": c'})
    content = encode(sample(), kind, 90, text)
    for image in (base64.b64encode(content).decode(), "data:;base64," + base64.b64encode(content).decode()):
        body = (await client.post(f"{ROOT}/png-info", json={"image": image})).json()
        assert body["info"] == body["items"]["parameters"] == text
        assert body["parameters"]["Prompt"] == "a cat, a dog\nand more"
        assert body["parameters"]["Negative prompt"] == "no"
        assert body["parameters"]["Seed"] == "7"
        assert body["parameters"]["Note"] == 'a, "b": c'


async def test_a_picture_without_text_has_none(client: httpx2.AsyncClient) -> None:
    body = (await client.post(f"{ROOT}/png-info", json={"image": PICTURE})).json()
    assert body == {"info": "", "items": {}, "parameters": {}}


@pytest.mark.parametrize(
    "image", [None, "", 7, "nonsense", "http://x.test/a.png", base64.b64encode(b"GIF89a").decode()]
)
async def test_what_is_no_picture_has_no_text(client: httpx2.AsyncClient, image: object) -> None:
    answer = await client.post(f"{ROOT}/png-info", json={"image": image})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("image must be ")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", {}),
        ("a cat", {"Prompt": "a cat", "Negative prompt": ""}),
        ("a: b, c: d", {"Prompt": "a: b, c: d", "Negative prompt": ""}),
        (
            'x\nNegative prompt: y\nz\nSteps: 3, Size: 1x2, Note: "bro\\"ken, Seed: 1',
            {
                "Prompt": "x",
                "Negative prompt": "y\nz",
                "Steps": "3",
                "Size": "1x2",
                "Note": '"bro\\"ken',
                "Seed": "1",
            },
        ),
    ],
)
def test_texts_of_any_kind_are_read(text: str, parsed: dict[str, str]) -> None:
    assert parse_parameters(text) == parsed
