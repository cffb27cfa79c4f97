from pathlib import Path

import pytest
from PIL import Image

from app.cli_pictures import as_request, check_folder, contact_sheet, numbered, picture_format, write_all
from app.storage.encoding import parameters_text
from cascade import ImageSettings, InvalidSetting


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


def test_all_files_are_written_or_none(tmp_path: Path) -> None:
    old = tmp_path / "b.png"
    old.write_bytes(b"old")
    with pytest.raises(OSError, match="nowhere"):
        write_all({tmp_path / "a.png": b"1", old: b"2", tmp_path / "nowhere" / "c.png": b"3"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    assert old.read_bytes() == b"old"

    write_all({tmp_path / "a.png": b"1", old: b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"1", "b.png": b"2"}
