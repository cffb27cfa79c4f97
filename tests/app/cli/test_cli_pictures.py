from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.cli_pictures import (
    as_request,
    check_folder,
    contact_sheet,
    numbered,
    picture_format,
    save_pictures,
    write_all,
)
from app.storage.encoding import parameters_text
from cascade import Control, GeneratedImage, ImagePrompt, ImageSettings, InvalidSetting, LoRAUse
from cascade.tasks.settings import FeatureMap

SIZES: dict[str, Any] = {"width": 128, "height": 128, "seed": 7}


@pytest.mark.parametrize(
    ("name", "expected"), [("a.png", "png"), ("a.JPG", "jpeg"), ("b.jpeg", "jpeg"), ("c.d.webp", "webp")]
)
def test_suffix_chooses_the_format(name: str, expected: str) -> None:
    assert picture_format(Path(name)) == expected


@pytest.mark.parametrize("name", ["a.gif", "a", ".png", "a.png.txt"])
def test_other_suffixes_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidSetting, match=r"output: must end in \.png, \.jpg, \.jpeg, \.webp"):
        picture_format(Path(name))


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    check_folder(tmp_path / "out.png")
    with pytest.raises(InvalidSetting, match="does not exist"):
        check_folder(tmp_path / "nowhere" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidSetting, match="is a folder"):
        check_folder(tmp_path / "folder.png")


def test_one_picture_has_the_name_itself_and_several_have_numbers() -> None:
    assert numbered(Path("a/out.png"), 1) == [Path("a/out.png")]
    assert numbered(Path("a/out.png"), 3) == [Path("a/out-0.png"), Path("a/out-1.png"), Path("a/out-2.png")]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (10, 4, 3)])
def test_the_grid_is_about_square_and_holds_every_picture(count: int, columns: int, rows: int) -> None:
    images = [Image.new("RGB", (20, 10), (index + 1, 0, 0)) for index in range(count)]
    sheet = contact_sheet(images)
    assert sheet.size == (columns * 24 - 4, rows * 14 - 4)
    seen = {sheet.getpixel((column * 24, row * 14)) for row in range(rows) for column in range(columns)}
    assert {(index + 1, 0, 0) for index in range(count)} <= seen


def test_parameters_name_every_setting() -> None:
    settings = ImageSettings(prompt="a cat", negative_prompt="a dog", width=256, height=128, seed=7, steps=11)
    text = parameters_text(as_request(settings), 7, "tiny")
    assert text.splitlines()[:2] == ["a cat", "Negative prompt: a dog"]
    assert "Steps: 11, Sampler: ddpm, CFG scale: 4.0, Seed: 7, Size: 256x128, Model: tiny" in text


def test_parameters_tell_what_guides_a_picture_beside_words() -> None:
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    settings = ImageSettings(
        image=picture,
        strength=0.5,
        mask=mask,
        feather=4,
        image_prompts=(ImagePrompt(picture, 0.5), ImagePrompt(picture)),
        control=Control("inpainting", picture, 0.8, 0.1, 0.9, preprocess=False),
        loras=(LoRAUse("teal"), LoRAUse("a, b", -0.5)),
        guidance_interval=(0.0, 0.5),
        weighted_prompt=True,
        long_prompt=True,
        width=64,
        height=64,
        seed=7,
    )
    told = parameters_text(as_request(settings), 7, "tiny").partition("Preset: official, ")[2]
    assert told == (
        'Denoising strength: 0.5, Masked: True, Feather: 4, Image prompts: "0.5, 1.0", '
        'ControlNet 0: "Module: none, Model: inpaint, Weight: 0.8, Guidance Start: 0.1, Guidance End: 0.9", '
        'Loras: "teal: 1.0, a, b: -0.5", Guidance interval: 0.0 to 0.5, Weighted prompt: True, '
        "Long prompt: True"
    )


def test_every_setting_of_a_control_is_passed_on_and_an_unusual_one_is_told() -> None:
    changed = {"scale": 0.5, "start": 0.1, "end": 0.9, "preprocess": False, "faithful": False}
    control = Control("super_resolution", Image.new("RGB", (64, 64)), **changed)  # type: ignore[arg-type]
    assert {"kind", "image", *changed} == {member.name for member in fields(Control)}
    request = as_request(ImageSettings(prompt="x", control=control, **SIZES))
    assert request.control is not None
    assert {"type", "image", *changed} == set(type(request.control).model_fields)
    assert request.control.model_dump(include=set(changed)) == changed
    assert 'Guidance End: 0.9, Faithful: False"' in parameters_text(request, 7, "tiny")
    usual = as_request(ImageSettings(prompt="x", control=Control("canny", control.image), **SIZES))
    assert 'Guidance End: 1.0"' in parameters_text(usual, 7, "tiny")


def test_parameters_tell_the_strength_that_was_meant() -> None:
    cut_out = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    sizes = {"width": 128, "height": 64, "seed": 7}
    for picture, anchor, strength in (
        (cut_out.convert("RGB"), None, "0.75"),
        (cut_out, None, "1.0, Masked: True"),
        (cut_out.convert("RGB"), "left", "1.0, Anchor: left"),
    ):
        settings = ImageSettings(image=picture, anchor=anchor, **sizes)  # type: ignore[arg-type]
        assert parameters_text(as_request(settings), 7, "tiny").endswith(f"Denoising strength: {strength}")


def test_a_map_of_numbers_stands_for_a_control_picture() -> None:
    control = Control("identity", FeatureMap(torch.zeros(3, 2, 5)))
    request = as_request(ImageSettings(prompt="x", control=control, width=64, height=64, seed=7))
    assert request.control is not None
    assert (request.control.type, request.control.image.width, request.control.image.height) == (
        "identity",
        5,
        2,
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"preset": "diffusers", "shares_generator": False}, ", Two generators: True"),
        ({"shares_generator": False}, "Preset: official"),
    ],
)
def test_settings_that_no_request_has_are_embedded_too(
    tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    sizes = {"prompt": "x", "width": 64, "height": 64, "seed": 7}
    chosen = ImageSettings(**sizes, **settings)  # type: ignore[arg-type]
    made = GeneratedImage(Image.new("RGB", (64, 64)), chosen, None, prompt_truncated=False, prompt_tokens=3)
    save_pictures([made], tmp_path / "a.png", quality=90, has_grid=False, named_model="tiny")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"].endswith(told)


def test_all_files_are_written_or_none(tmp_path: Path) -> None:
    old = tmp_path / "b.png"
    old.write_bytes(b"old")
    with pytest.raises(OSError, match="nowhere"):
        write_all({tmp_path / "a.png": b"1", old: b"2", tmp_path / "nowhere" / "c.png": b"3"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    assert old.read_bytes() == b"old"

    write_all({tmp_path / "a.png": b"1", old: b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"1", "b.png": b"2"}
