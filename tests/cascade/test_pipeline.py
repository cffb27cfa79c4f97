"""The whole chain against diffusers: it writes random pipelines to a folder, both make pictures from them."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade import Cascade
from cascade.checkpoints.convert import convert
from tests.cascade.diffusers_pipelines import Pipelines, random_pipelines

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    return random_pipelines(0)


@pytest.fixture(scope="module")
def folder(pipelines: Pipelines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    pipelines.save(folder)
    return folder


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return Cascade.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def scripted(pipelines: Pipelines) -> Callable[[int], Image.Image]:
    """The script's picture of a seed, made once."""
    return cache(lambda seed: pipelines.script(PROMPT, seed))


def share_of_equal_pixels(image: Image.Image, other: Image.Image) -> float:
    """Pixels whose channels all agree within 1/255."""
    assert image.size == other.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int))
    return float((difference.max(axis=-1) <= 1).mean())


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_the_diffusers_preset_is_the_script(
    scripted: Callable[[int], Image.Image], cascade: Cascade, seed: int
) -> None:
    [made] = cascade.text_to_image(PROMPT, preset="diffusers", seed=seed, width=256, height=256)
    expected = scripted(seed)
    assert np.asarray(expected).std() > 20, "a flat picture would prove nothing"
    assert share_of_equal_pixels(made.image, expected) >= 0.999


def test_a_batch_of_three_seeds_is_three_scripts(
    scripted: Callable[[int], Image.Image], cascade: Cascade
) -> None:
    made = cascade.text_to_image(PROMPT, preset="diffusers", seed=7, num_images=3, width=256, height=256)
    for index, picture in enumerate(made):
        assert share_of_equal_pixels(picture.image, scripted(7 + index)) >= 0.999


@pytest.mark.parametrize(
    "settings",
    [
        {"negative_prompt": "blurry", "decoder_guidance_scale": 4.0, "guidance_scale": 7.0},
        {"steps": 9, "decoder_steps": 4, "guidance_scale": 0.0},
        {"width": 384, "height": 128},
    ],
)
def test_every_setting_means_the_same(
    pipelines: Pipelines, cascade: Cascade, settings: dict[str, Any]
) -> None:
    settings = {"width": 256, "height": 256, "seed": 7} | settings
    [made] = cascade.text_to_image(PROMPT, preset="diffusers", **settings)
    assert share_of_equal_pixels(made.image, pipelines.script(PROMPT, **settings)) >= 0.999


def test_a_size_off_the_grid_is_the_centre_of_the_script_s_larger_picture(
    pipelines: Pipelines, cascade: Cascade
) -> None:
    """416 pixels are 10 cells, 106 latents and, at the second level of Stage B, odd: 53 tokens, then 26."""
    [made] = cascade.text_to_image(PROMPT, preset="diffusers", seed=7, width=416, height=256)
    larger = pipelines.script(PROMPT, 7, width=416, height=256)
    assert larger.size == (424, 256)
    assert share_of_equal_pixels(made.image, larger.crop((4, 0, 420, 256))) >= 0.999


def test_a_script_may_give_each_pipeline_a_generator_of_its_own(
    pipelines: Pipelines, scripted: Callable[[int], Image.Image], cascade: Cascade
) -> None:
    settings: dict[str, Any] = {"seed": 7, "width": 256, "height": 256}
    [made] = cascade.text_to_image(PROMPT, preset="diffusers", shares_generator=False, **settings)
    assert share_of_equal_pixels(made.image, pipelines.script(PROMPT, 7, one_generator=False)) >= 0.999
    assert share_of_equal_pixels(made.image, scripted(7)) < 0.9


def test_the_original_layout_gives_the_same_picture(cascade: Cascade, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "original", layout="original")
    converted = Cascade.from_pretrained(tmp_path / "original", device="cpu", dtype="float32")
    settings: dict[str, Any] = {"preset": "diffusers", "seed": 7, "width": 256, "height": 256}
    [made] = converted.text_to_image(PROMPT, **settings)
    [expected] = cascade.text_to_image(PROMPT, **settings)
    # A product with one row adds up in an order that depends on where in memory the mapped weights lie.
    assert np.abs(np.asarray(made.image).astype(int) - np.asarray(expected.image)).max() <= 1
    assert share_of_equal_pixels(made.image, expected.image) >= 0.999


def test_a_scale_factor_in_the_folder_is_the_one_that_diffusers_multiplies_by(
    scripted: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    changed = random_pipelines(0)
    changed.decoder.vqgan.register_to_config(scale_factor=0.43)
    changed.save(tmp_path)
    cascade = Cascade.from_pretrained(tmp_path, device="cpu", dtype="float32")
    [made] = cascade.text_to_image(PROMPT, preset="diffusers", seed=7, width=256, height=256)
    assert share_of_equal_pixels(made.image, changed.script(PROMPT, 7)) >= 0.999
    assert share_of_equal_pixels(made.image, scripted(7)) < 0.9


def test_presets_differ(cascade: Cascade) -> None:
    settings: dict[str, Any] = {"seed": 7, "width": 256, "height": 256}
    [official] = cascade.text_to_image(PROMPT, **settings)
    [other] = cascade.text_to_image(PROMPT, preset="diffusers", **settings)
    assert official.settings.preset == "official"
    assert share_of_equal_pixels(official.image, other.image) < 0.9


def test_importing_the_library_imports_nothing_else(tmp_path: Path) -> None:
    code = "import sys, cascade; print('torch' in sys.modules, cascade.InvalidSetting.__name__)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "InvalidSetting"]


def test_an_unknown_name_of_the_library_is_an_attribute_error() -> None:
    import cascade as library

    with pytest.raises(AttributeError, match="no attribute 'Cascades'"):
        _ = library.Cascades
