"""Encode, decode, reconstruct: grids, files of latents, who may decode them, and that pictures come back."""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from cascade.config import EffNetConfig, EffNetStage
from cascade.errors import CheckpointError, InvalidSetting
from cascade.networks.effnet import EffNetEncoder
from cascade.pipeline import Cascade
from cascade.sizes import (
    MAX_PIXELS,
    check_size,
    nearest_size,
)
from cascade.tasks.autoencode import DecodeSettings, decode_all
from cascade.tasks.encoding import encode, flattened
from cascade.tasks.latents import Latents, encoder_sha256
from cascade.training.scenes import held_out_generator, render, sample_scene
from tests.cascade.small_models import small_cascade

EFFNET = EffNetConfig(
    stem_channels=4,
    stages=tuple(EffNetStage("fused", expand=1, stride=2, channels=4, repeats=1) for _ in range(4)),
    head_channels=8,
)
FAST = DecodeSettings(decoder_steps=2)


def small_encoder(seed: int = 0) -> EffNetEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EffNetEncoder(EFFNET).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> Cascade:
    return small_cascade(effnet=small_encoder(), name="small")


@pytest.fixture
def latents(models: Cascade) -> Latents:
    return models.encode(Image.radial_gradient("L"), width=128, height=96)


def scene(width: int, height: int) -> Image.Image:
    """A picture that the embedded checkpoint can draw: a red disc left of a yellow square, on blue."""
    image = Image.new("RGB", (4 * width, 4 * height), (40, 70, 200))
    pen, short = ImageDraw.Draw(image), 4 * min(width, height)
    for centre, colour, kind in ((0.28, (220, 40, 40), "disc"), (0.72, (240, 210, 50), "square")):
        x, y, r = 4 * width * centre, 2 * height, 0.15 * short
        (pen.ellipse if kind == "disc" else pen.rectangle)((x - r, y - r, x + r, y + r), fill=colour)
    return image.resize((width, height), Image.Resampling.BOX)


def decibels(one: Image.Image, other: Image.Image) -> float:
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize(
    ("size", "grid"),
    [((1024, 1024), (24, 24)), ((1536, 1024), (24, 36)), ((832, 1216), (29, 20)), ((64, 64), (2, 2))],
)
def test_latents_have_the_grid_on_which_stage_c_draws(
    models: Cascade, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    latents = models.encode(Image.new("RGB", size, "teal"))
    assert latents.values.shape == (16, *grid)
    assert (latents.width, latents.height) == size
    assert (latents.values.dtype, latents.values.device.type) == (torch.float32, "cpu")


def test_official_sizes_are_resized_to_three_quarters(models: Cascade) -> None:
    """The official rule: each side times 3/4, floored to a multiple of 32."""
    image = Image.effect_noise((512, 384), 80).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(pixels, (288, 384), mode="bilinear", antialias=True)
    assert models.effnet is not None
    assert (models.encode(image).values - models.effnet(small)[0]).abs().max() <= 1e-5


@settings(max_examples=30)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_a_picture_of_any_size_has_an_allowed_one(width: int, height: int) -> None:
    size = nearest_size(width, height)
    check_size(*size)
    assert nearest_size(*size) == size
    if min(width, height) >= 72 and max(width, height) <= min(2000, 3.8 * min(width, height)):
        assert abs(size[0] - width) <= 4
        assert abs(size[1] - height) <= 4


@settings(max_examples=12)
@given(st.integers(8, 30).map(lambda n: 8 * n), st.integers(8, 30).map(lambda n: 8 * n))
def test_every_size_comes_back_exactly(width: int, height: int) -> None:
    """On odd grids too: Stage B's levels are then of unequal halves."""
    assume(width * height <= MAX_PIXELS and max(width, height) <= 4 * min(width, height))
    models = small_cascade(effnet=small_encoder())
    drawn = models.reconstruct(Image.new("RGB", (width, height), "teal"), FAST)
    assert drawn.size == (width, height)
    assert len(np.unique(np.asarray(drawn))) > 10


def test_pictures_are_turned_flattened_and_covered(models: Cascade) -> None:
    layers = Image.new("RGBA", (80, 64), (255, 0, 0, 0))
    assert flattened(layers).getpixel((3, 3)) == (255, 255, 255)
    turned = Image.new("RGB", (80, 64), "teal")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.info["exif"] = exif.tobytes()
    latents = models.encode(turned)
    assert (latents.width, latents.height) == (64, 80)
    assert models.encode(Image.new("L", (999, 333))).width == 999
    with pytest.raises(InvalidSetting, match="width: must be a whole number from 64"):
        models.encode(turned, width=60)


def test_a_checkpoint_without_encoder_says_so(latents: Latents) -> None:
    blind = small_cascade(name="blind")
    with pytest.raises(InvalidSetting, match=r"image: blind cannot look at pictures.*effnet_encoder"):
        blind.encode(Image.new("RGB", (64, 64)))
    with pytest.raises(InvalidSetting, match="model: blind has no encoder to compare with that of small"):
        blind.decode(latents, FAST)
    assert blind.decode(latents, replace(FAST, any_model=True)).size == (128, 96)
    assert small_cascade(name="small").decode(latents, FAST).size == (128, 96)


def test_only_models_with_the_same_encoder_decode_unasked(latents: Latents) -> None:
    other = small_cascade(effnet=small_encoder(1), name="other")
    with pytest.raises(InvalidSetting, match=r"model: .* encoder of small, and that of other is another"):
        other.decode(latents, FAST)
    assert other.decode(latents, replace(FAST, any_model=True)).size == (128, 96)
    renamed = small_cascade(effnet=small_encoder(), name="renamed")
    assert renamed.decode(latents, FAST).size == (128, 96)
    assert renamed.effnet is not None
    assert encoder_sha256(renamed.effnet) == latents.encoder_sha256


def test_a_picture_is_the_same_alone_and_in_any_company(models: Cascade) -> None:
    images = [scene(128, 96), scene(64, 128), Image.radial_gradient("L").resize((128, 96))]
    wanted = [DecodeSettings(seed=seed, decoder_steps=2 + seed % 2) for seed in range(3)]
    wanted[2] = replace(wanted[2], prompt="a word", decoder_guidance_scale=1.5)
    latents = encode(models, images)
    run = decode_all(models, latents, wanted)
    seen = []
    while True:
        try:
            seen.append(next(run))
        except StopIteration as finished:
            together = finished.value
            break
    alone = [models.decode(*pair) for pair in zip(latents, wanted, strict=True)]
    assert [image.size for image in together] == [(128, 96), (64, 128), (128, 96)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    steps = [(step.step, step.steps) for step in seen if step.stage == "decoder"]
    assert steps == [(step, 5) for step in range(1, 6)]
    assert [step.step for step in seen if step.stage == "decode"][-1] == 3


def test_settings_of_decoding_matter_and_are_checked(models: Cascade, latents: Latents) -> None:
    plain = np.asarray(models.decode(latents, FAST))
    assert np.array_equal(plain, np.asarray(models.decode(latents, FAST)))
    for changed in (
        replace(FAST, seed=1),
        replace(FAST, prompt="a word"),
        replace(FAST, prompt="-"),  # a caption like others
        replace(FAST, decoder_steps=3),
        replace(FAST, decoder_guidance_scale=3.0),
        replace(FAST, preset="diffusers"),
    ):
        assert not np.array_equal(plain, np.asarray(models.decode(latents, changed))), changed
    assert models.decode(latents, replace(FAST, width=64, height=128)).size == (64, 128)
    for wrong in ({"seed": -1}, {"decoder_steps": 0}, {"width": 60}, {"preset": "best"}, {"sampler": "x"}):
        with pytest.raises(InvalidSetting, match=next(iter(wrong))):
            models.decode(latents, replace(FAST, **wrong))
        with pytest.raises(InvalidSetting, match=next(iter(wrong))):
            replace(FAST, **wrong).check()


def test_latents_survive_their_file_to_the_bit(models: Cascade, latents: Latents, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    replace(latents, preset="diffusers").save(path)
    again = Latents.load(path)
    assert torch.equal(again.values, latents.values)
    assert (again.width, again.height, again.model, again.preset) == (128, 96, "small", "diffusers")
    assert again.encoder_sha256 == latents.encoder_sha256
    assert len(again.encoder_sha256) == 64
    with pytest.raises(InvalidSetting, match=r"output: must end in .safetensors, not '.pt'"):
        latents.save(tmp_path / "a.pt")


def rewritten(path: Path, metadata: Mapping[str, str | None], **tensors: Any) -> Path:
    """The file with other entries in its header (None: without it) and, if any are given, other tensors."""
    from safetensors.torch import load_file, save_file

    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    stated = json.loads(content[8 : 8 + length])["__metadata__"] | metadata
    kept = {name: value for name, value in stated.items() if value is not None}
    save_file(tensors or load_file(path), path, kept)
    return path


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": None}, "holds no latents: `cascade encode` writes such files"),
        ({"format": "pt"}, "holds no latents"),
        ({"format_version": "2"}, "latents of format '2'; this version reads 1"),
        ({"width": None, "preset": None}, "its header lacks width, preset"),
        ({"width": "-8"}, "width must be a whole number, but is '-8'"),
        ({"height": "9" * 50}, "height must be a whole number, but is '9999"),
        ({"height": "60"}, "the picture's height must be a whole number from 64"),
        ({"height": "8000"}, "the picture's height must be a whole number from 64"),
        ({"shape": "[16, 9, 9]"}, "has the shape [16, 3, 3], but the header states [16, 9, 9]"),
        ({"preset": "best"}, "preset 'best' is none of official, diffusers"),
    ],
)
def test_a_wrong_header_is_named(
    latents: Latents, tmp_path: Path, metadata: dict[str, str | None], words: str
) -> None:
    path = tmp_path / "a.safetensors"
    latents.save(path)
    with pytest.raises(CheckpointError) as caught:
        Latents.load(rewritten(path, metadata))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weights": torch.zeros(16, 3, 3)}, "must hold one tensor, latents, but holds weights"),
        ({"latents": torch.zeros(16, 3, 3).half()}, "must be float32 (16, h, w), but is torch.float16"),
        ({"latents": torch.zeros(4, 3, 3)}, "must be float32 (16, h, w), but is torch.float32 [4, 3, 3]"),
        ({"latents": torch.zeros(16, 3)}, "must be float32 (16, h, w)"),
        ({"latents": torch.zeros(16, 257, 1)}, "must have sides from 1 to 256"),
        ({"latents": torch.full((16, 3, 3), torch.nan)}, "has values that are not finite"),
    ],
)
def test_a_wrong_tensor_is_named(
    latents: Latents, tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    path = tmp_path / "a.safetensors"
    latents.save(path)
    shape = json.dumps(list(next(iter(tensors.values())).shape))
    with pytest.raises(CheckpointError) as caught:
        Latents.load(rewritten(path, {"shape": shape}, **tensors))
    assert words in str(caught.value)


def test_foreign_cut_and_missing_files_are_refused(latents: Latents, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Latents.load(path)
    latents.save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut"):
        Latents.load(path)
    with pytest.raises(CheckpointError, match="never read"):
        Latents.load(tmp_path / "a.pt")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 256), (320, 256), (256, 384), (512, 256), (256, 512)])
def test_the_embedded_checkpoint_draws_ones_own_pictures_again(size: tuple[int, int]) -> None:
    models, rng = Cascade.from_pretrained("tiny"), held_out_generator(7)
    sources = [Image.fromarray(render(sample_scene(rng, size))) for _ in range(4)]
    errors = []
    for source in sources:
        drawn = models.decode(models.encode(source))
        assert drawn.size == size
        errors.append(10 ** (-decibels(drawn, source) / 10))
    assert -10 * np.log10(np.mean(errors)) > 25
    assert decibels(drawn, sources[0]) < 20  # what a picture has in common with another one
