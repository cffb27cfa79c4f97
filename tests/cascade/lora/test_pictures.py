"""Pictures with different LoRAs, and with none, drawn together: each is the one that it is alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cascade.checkpoints.load import load_cascade
from cascade.errors import InvalidSetting
from cascade.lora import LoRALibrary, merge, read_lora
from cascade.models import Models
from cascade.tasks.generation import GeneratedImage, generate
from cascade.tasks.settings import ImageSettings, LoRAUse
from tests.cascade.lora.files import attention_factors, kohya, official, peft, save

QUICK: dict[str, Any] = {"steps": 4, "decoder_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    models = load_cascade("tiny", device="cpu")
    folder = tmp_path_factory.mktemp("loras")
    for seed, (name, write) in enumerate({"one": official, "two": kohya, "three": peft}.items(), start=1):
        tensors = write(attention_factors(models.stage_c, seed))
        if name == "one":
            size = models.text_encoder.model.config.vocab_size
            width = models.text_encoder.model.config.hidden_size
            tensors["embeddings.indices"] = torch.tensor([size])
            tensors["embeddings.embeddings"] = torch.ones(1, width) * 0.05
        described = {"token": "[new]", "regex": "^(red|blue)</w>$"} if name == "one" else {}
        save(folder / f"{name}.safetensors", tensors, **described)
    return replace(models, loras=LoRALibrary([folder]))


def request(prompt: str, *loras: LoRAUse, **settings: Any) -> ImageSettings:
    return ImageSettings(prompt=prompt, loras=loras, **(QUICK | settings))


def run(models: Models, requests: Sequence[ImageSettings]) -> list[NDArray[np.uint8]]:
    steps = generate(models, requests)
    made: list[list[GeneratedImage]]
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            made = finished.value
            return [np.asarray(image.image) for images in made for image in images]


def test_each_picture_is_the_one_that_it_is_alone(models: Models) -> None:
    requests = [
        request("a [new] circle", LoRAUse("one")),
        request("a [new] circle"),
        request("a red star on a white background", LoRAUse("two", -0.5)),
        request("a red star on a white background", LoRAUse("two", 0.5), guidance_scale=1.0),
        request("a [new] circle", LoRAUse("three"), LoRAUse("one", 0.5)),
        request("a red star on a white background"),
    ]
    together = run(models, requests)
    for index, settings in enumerate(requests):
        [alone] = run(models, [settings])
        assert np.array_equal(together[index], alone), index
    assert len({picture.tobytes() for picture in together}) == len(requests)
    without = replace(models, loras=None)
    for index in (1, 5):
        [plain] = run(without, [requests[index]])
        assert np.array_equal(together[index], plain), index


def test_a_scale_of_zero_changes_nothing_to_be_seen(models: Models) -> None:
    prompt = "a red star on a white background"
    none, some, plain = run(
        models, [request(prompt, LoRAUse("two", 0.0)), request(prompt, LoRAUse("two", 1.0)), request(prompt)]
    )
    assert np.abs(none.astype(int) - plain).max() <= 1
    assert np.abs(some.astype(int) - plain).max() > 20


def test_merged_models_draw_the_same(models: Models) -> None:
    assert isinstance(models.loras, LoRALibrary)
    [folder] = models.loras.folders
    lora = read_lora(Path(folder) / "one.safetensors", models)
    merged = merge(models, [(lora, 0.3)])
    [beside] = run(models, [request("a [new] circle", LoRAUse("one", 0.3))])
    [within] = run(merged, [request("a [new] circle")])
    assert np.abs(beside.astype(int) - within).max() <= 1


def test_an_unknown_one_is_refused_before_anything_is_drawn(models: Models) -> None:
    with pytest.raises(
        InvalidSetting, match="loras: 'four' is not installed; installed are: one, three, two"
    ):
        run(models, [request("a red star", LoRAUse("four"))])
