"""Every task over HTTP with the embedded model: bit for bit what the library makes of the same pictures."""

import asyncio
import json
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from safetensors.torch import save_file

from app.engine.runner import CascadeRunner
from app.main import create_app
from app.settings import Settings
from cascade import Cascade, ImageSettings
from cascade.checkpoints.load import load_controlnet
from cascade.lora import LoRALibrary
from cascade.tasks.generation import generate
from cascade.tasks.settings import Control, ImagePrompt, LoRAUse
from tests.app.pictures import file, sample
from tests.cascade.checkpoints.test_controlnets import controlnet
from tests.cascade.lora.files import attention_factors, official

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SIZE = (256, 256)
SOURCE, OTHER = sample(size=SIZE), Image.new("RGB", (100, 80), "lime")
MASK = Image.new("L", SIZE, 0)
MASK.paste(255, (64, 96, 200, 230))
STEPS = {"prior_num_inference_steps": 4, "decoder_num_inference_steps": 2}

# What is asked for over HTTP, and of the library.
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "image-to-image": ({"image": SOURCE, "strength": 0.5}, {"image": SOURCE, "strength": 0.5}),
    "reconstruction": ({"image": SOURCE, "strength": 0, "prompt": ""}, {"image": SOURCE, "strength": 0.0}),
    "inpainting": (
        {"image": SOURCE, "mask": MASK, "feather": 5},
        {"image": SOURCE, "mask": MASK, "feather": 5},
    ),
    "outpainting": (
        {"image": SOURCE, "anchor": "top-left", "width": 384, "height": 256},
        {"image": SOURCE, "anchor": "top-left", "width": 384, "height": 256},
    ),
    "image prompts": (
        {"image_prompts": [SOURCE, OTHER]},
        {"image_prompts": (ImagePrompt(SOURCE), ImagePrompt(OTHER))},
    ),
    "control": (
        {"control": ({"type": "canny", "scale": 0.8, "end": 0.5}, SOURCE), "width": 256, "height": 256},
        {"control": Control("canny", SOURCE, scale=0.8, end=0.5)},
    ),
    "super-resolution": (
        {"control": ({"type": "super_resolution"}, OTHER), "width": 256, "height": 256},
        {"control": Control("super_resolution", OTHER)},
    ),
    "super-resolution as it was drawn": (
        {"control": ({"type": "super_resolution", "faithful": False}, OTHER), "width": 256, "height": 256},
        {"control": Control("super_resolution", OTHER, faithful=False)},
    ),
    "LoRA": ({"loras": [{"name": "noise", "scale": 0.5}]}, {"loras": (LoRAUse("noise", 0.5),)}),
    "words": (
        {"prompt": "a (red:1.4) circle " * 30, "weighted_prompt": True, "long_prompt": True},
        {"prompt": "a (red:1.4) circle " * 30, "weighted_prompt": True, "long_prompt": True},
    ),
    "interval": ({"guidance_interval": [0.25, 0.75]}, {"guidance_interval": (0.25, 0.75)}),
    "text": ({}, {}),
}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    cascade = Cascade.from_pretrained("tiny", device="cpu")
    loras, networks = (tmp_path_factory.mktemp(name) for name in ("loras", "controlnets"))
    save_file(official(attention_factors(cascade.stage_c, seed=3)), loras / "noise.safetensors")
    save_file(
        controlnet(cascade, "canny").state_dict(), networks / "canny.safetensors", {"injections": "0,2"}
    )
    network = load_controlnet(networks / "canny.safetensors", cascade)
    cascade.loras = LoRALibrary([loras])
    cascade.controlnets = {**cascade.controlnets, network.kind: network}
    return cascade


@pytest.fixture
async def client(cascade: Cascade, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    [library] = cascade.loras.folders  # type: ignore[union-attr]
    settings = Settings(
        data_dir=tmp_path,
        log_level="error",
        lora_dir=library,
        controlnet_dir=library.parent / library.name.replace("loras", "controlnets"),
    )
    app = create_app(settings, runner=CascadeRunner())
    async with app.router.lifespan_context(app):
        await app.state.services.dispatcher.wait_loaded(120)
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            yield client


def form(members: dict[str, Any], seed: int) -> dict[str, Any]:
    """The members as a form with file parts."""
    fields: dict[str, Any] = {"prompt": "a blue square", "seed": str(seed)}
    fields |= {name: str(value) for name, value in STEPS.items()}
    files: list[tuple[str, Any]] = []
    for name, value in members.items():
        if isinstance(value, Image.Image):
            files.append((name, (name, file(value))))
        elif name == "image_prompts":
            files += [(name, (name, file(picture))) for picture in value]
        elif name == "control":
            fields[name] = json.dumps(value[0])
            files.append((name, (name, file(value[1]))))
        else:
            fields[name] = value if isinstance(value, str) else json.dumps(value)
    files.append(("params", (None, "{}")))  # so that it is a form in any case
    return {"data": fields, "files": files}


def expected(cascade: Cascade, members: dict[str, Any], seed: int) -> bytes:
    plain: dict[str, Any] = {"prompt": "a blue square", "seed": seed, "steps": 4, "decoder_steps": 2}
    run = generate(cascade, [ImageSettings(**plain | {"width": 256, "height": 256} | members)])
    while True:
        try:
            next(run)
        except StopIteration as end:
            [[made]] = end.value
            return made.image.tobytes()


async def test_all_tasks_at_once_are_what_the_library_makes_of_each(
    client: httpx2.AsyncClient, cascade: Cascade
) -> None:
    async def made(seed: int, members: dict[str, Any]) -> bytes:
        answer = await client.post("/api/v1/images", headers={"accept": "image/png"}, **form(members, seed))
        assert answer.status_code == 200, answer.text
        return Image.open(BytesIO(answer.content)).convert("RGB").tobytes()

    abilities = (await client.get("/api/v1/models")).json()["data"][0]["abilities"]
    assert "canny" in abilities["controls"]
    pictures = await asyncio.gather(*(made(seed, asked) for seed, (asked, _) in enumerate(TASKS.values())))
    for seed, (name, (_, members)) in enumerate(TASKS.items()):
        assert pictures[seed] == expected(cascade, members, seed), name
    assert len(set(pictures)) == len(pictures)


async def test_a_lora_that_does_not_fit_is_the_requests_mistake(
    client: httpx2.AsyncClient, cascade: Cascade
) -> None:
    [folder] = cascade.loras.folders  # type: ignore[union-attr]
    (folder / "broken.safetensors").write_bytes(b"not a file of tensors")
    answer = await client.post("/api/v1/images", json={"prompt": "x", "loras": [{"name": "broken"}]})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_value")
    assert "broken" in answer.json()["detail"]
    answer = await client.post("/api/v1/images", json={"prompt": "x", **STEPS})
    assert answer.status_code == 200
