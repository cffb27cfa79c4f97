"""The bridge with the real networks at tiny dimensions: what the server makes is what the library makes."""

import asyncio
import base64
from dataclasses import replace
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.engine import ModelFacts, Steps
from app.engine.runner import CascadeRunner
from app.errors import InvalidRequest, OutOfMemory
from app.jobs.job import Picture, Progress
from app.schemas import GenerationRequest
from cascade import InvalidSetting
from cascade.sizes import NativeSizes
from tests.app.conftest import Serve
from tests.cascade.small_models import small_cascade

PATH = "/v1/images/generations"


class SmallRunner(CascadeRunner):
    """The real runner on random weights."""

    native: ClassVar[NativeSizes] = NativeSizes(((128, 128), (192, 128)), resamples=True)

    def load(self) -> ModelFacts:
        return self.take(small_cascade(self.native, name="small"))


@pytest.fixture(scope="module")
def small() -> SmallRunner:
    runner = SmallRunner("small", "cpu", "float32")
    runner.load()
    return runner


def request(**members: Any) -> GenerationRequest:
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 1}
    size = {"width": 128, "height": 128}
    return GenerationRequest.model_validate(
        {"prompt": "a red circle", "seeds": (7,), **steps, **size, **members}
    )


def finished(steps: Steps) -> tuple[list[Progress], list[list[Picture]]]:
    reports = []
    while True:
        try:
            reports.append(next(steps))
        except StopIteration as end:
            return reports, end.value


def test_what_is_known_of_the_model() -> None:
    facts = SmallRunner("small", "cpu", "float32").load()
    assert facts == ModelFacts("cpu", "float32", (128, 128))


def test_a_request_is_what_the_library_makes_of_it(small: SmallRunner) -> None:
    reports, [pictures] = finished(
        small.generate(
            [request(seeds=(7, 8), prior_guidance_scale=2.0, negative_prompt="blue", sampler="ddim")]
        )
    )
    expected = small_cascade(SmallRunner.native).text_to_image(
        "a red circle",
        negative_prompt="blue",
        seed=7,
        num_images=2,
        steps=2,
        guidance_scale=2.0,
        decoder_steps=1,
        sampler="ddim",
    )
    for picture, image in zip(pictures, expected, strict=True):
        assert picture.image.tobytes() == image.image.tobytes()
        assert np.asarray(image.image).std() > 5, "a flat picture would prove nothing"
    assert [picture.seed for picture in pictures] == [7, 8]
    assert pictures[0].prompt_tokens == 3
    stages = [(report.stage, report.step, report.steps) for report in reports]
    assert stages[:3] == [("prior", 1, 2), ("prior", 2, 2), ("decoder", 1, 1)]


def test_other_sizes_are_resampled_and_long_prompts_cut(small: SmallRunner) -> None:
    _, [[picture]] = finished(small.generate([request(width=256, height=64, prompt="word " * 20)]))
    assert picture.image.size == (256, 64)
    assert picture.resampled_from == (192, 128)
    assert picture.prompt_truncated
    _, [[native]] = finished(small.generate([request()]))
    assert native.resampled_from is None
    assert not native.prompt_truncated


@pytest.mark.parametrize(
    ("raised", "expected", "word"),
    [
        (InvalidSetting("steps", "must be a number"), InvalidRequest, "steps must be"),
        (torch.OutOfMemoryError("CUDA out of memory: 0x7f"), OutOfMemory, "memory"),
    ],
)
def test_errors_of_the_library_become_ours(
    small: SmallRunner,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[Exception],
    word: str,
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr("cascade.tasks.text_to_image.generate", broken)
    with pytest.raises(expected, match=word) as caught:
        finished(small.generate([request()]))
    assert "0x7f" not in str(caught.value)


def body(client: int) -> dict[str, Any]:
    """Requests of several kinds, some of which can be made together."""
    return {
        "prompt": f"a circle number {client % 3}",
        "seed": client,
        "n": 1 + client % 2,
        "size": ("auto", "192x128", "64x64")[client % 3],
        "steps": 1 + client % 2,
        "decoder_num_inference_steps": 1,
        "guidance_scale": (1.0, 4.0)[client % 2],
    }


@pytest.mark.anyio
@pytest.mark.parametrize(("max_batch", "tolerance"), [(None, 0), (8, 1)])
async def test_eight_clients_get_what_each_gets_alone(
    serve: Serve, max_batch: int | None, tolerance: int
) -> None:
    # Larger matrices are added up in another order: where pictures share a pass a rounding may move by 1/255.
    async with serve(use=SmallRunner("small", "cpu", "float32"), max_batch=max_batch) as client:
        together = await asyncio.gather(*(client.post(PATH, json=body(number)) for number in range(8)))
        text = (await client.get("/metrics")).text
        for number, answer in enumerate(together):
            alone = await client.post(PATH, json=body(number))
            for item, other in zip(answer.json()["data"], alone.json()["data"], strict=True):
                assert np.abs(pixels(item) - pixels(other)).max() <= tolerance
    assert ("cascade_batch_pictures_count 8.0" in text) == (max_batch is None), "made together, or not"


def pixels(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(item["b64_json"])))).astype(int)


def test_settings_of_a_request_survive_the_translation(
    small: SmallRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(_: object, settings: Any) -> None:
        seen.extend(settings)
        raise InvalidSetting("enough", "seen")

    monkeypatch.setattr("cascade.tasks.text_to_image.generate", spy)
    members = {
        "negative_prompt": "blue", "width": 256, "height": 192, "prior_num_inference_steps": 3,
        "prior_guidance_scale": 2.5, "decoder_num_inference_steps": 4, "decoder_guidance_scale": 1.5,
        "preset": "diffusers", "sampler": "lcm", "seeds": (3, 9),
    }  # fmt: skip
    with pytest.raises(InvalidRequest):
        finished(small.generate([request(**members)]))
    first, second = seen
    assert second == replace(first, seed=9)
    assert (first.seed, first.num_images, first.negative_prompt) == (3, 1, "blue")
    assert (first.width, first.height) == (256, 192)
    assert (first.steps, first.guidance_scale) == (3, 2.5)
    assert (first.decoder_steps, first.decoder_guidance_scale) == (4, 1.5)
    assert (first.preset, first.sampler) == ("diffusers", "lcm")
