"""The gallery with sheets that cost nothing: what is written, what is left out, and how panels are laid."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cascade.evaluation import gallery
from cascade.evaluation.gallery import TASKS, Task, draw_gallery
from cascade.evaluation.panels import Panel, Row, draw_sheet
from cascade.networks.controlnet import ControlNet
from cascade.pipeline import Cascade
from cascade.training.controlnet import CONFIGS
from tests.cascade.small_models import small_cascade

RED = Image.new("RGB", (256, 256), (200, 0, 0))
WIDE = Image.new("RGB", (512, 256), (0, 0, 200))


def drawing(cascade: Cascade) -> list[Row]:
    return [Row("a heading", (Panel(RED, "red"), Panel(WIDE, "blue and wide")))]


def small() -> Cascade:
    return small_cascade()


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet.convert("RGB")) == colour).all(-1).sum())


def test_sheets_and_overview_are_written_and_hold_the_pictures(tmp_path: Path) -> None:
    told: list[str] = []
    tasks = [Task("one", "One", drawing), Task("two", "Two", drawing)]
    assert draw_gallery(small(), tmp_path, tasks, told.append) == {}
    assert told == ["One", "Two"]
    assert sorted(path.name for path in (tmp_path / "gallery").iterdir()) == ["one.png", "two.png"]
    with Image.open(tmp_path / "gallery" / "one.png") as sheet:
        assert (count(sheet, (200, 0, 0)), count(sheet, (0, 0, 200))) == (256 * 256, 512 * 256)
    with Image.open(tmp_path / "gallery.png") as overview:
        assert count(overview, (200, 0, 0)) == 2 * 80 * 80


def test_what_the_checkpoint_lacks_is_left_out_with_the_reason(tmp_path: Path) -> None:
    tasks = [
        Task("edges", "Edges", drawing, controlnet="canny"),
        Task("style", "Style", drawing, loras=("night",)),
    ]
    assert draw_gallery(small(), tmp_path, tasks) == {
        "edges": "the ControlNet canny is not installed",
        "style": "the LoRA night is not installed",
    }
    assert list(tmp_path.iterdir()) == []


def test_what_is_installed_is_drawn(tmp_path: Path) -> None:
    cascade = small()
    cascade.controlnets = {"canny": ControlNet(CONFIGS["canny"])}
    cascade.loras = SimpleNamespace(names=lambda: ["night", "azure"])
    tasks = [Task("both", "Both", drawing, controlnet="canny", loras=("azure", "night"))]
    assert draw_gallery(cascade, tmp_path, tasks) == {}
    assert (tmp_path / "gallery" / "both.png").exists()


def test_a_row_that_is_too_long_goes_on_below() -> None:
    row = Row("", tuple(Panel(RED, str(index)) for index in range(4)))
    long, broken = draw_sheet("A title", [row]), draw_sheet("A title", [row], width=600)
    assert broken.width <= 600 + 2 * 16 < long.width
    assert count(broken, (200, 0, 0)) == count(long, (200, 0, 0)) == 4 * 256 * 256


def test_labels_are_broken_into_lines_below_their_picture() -> None:
    words = "a label of many words that does not fit into one line below its picture"
    short, long = (draw_sheet("", [Row("", (Panel(RED, label),))]) for label in ("short", words))
    assert long.width == short.width
    assert long.height > short.height


def test_every_task_has_its_own_file_and_title() -> None:
    assert len({task.name for task in TASKS}) == len({task.title for task in TASKS}) == len(TASKS)
    assert {task.controlnet for task in TASKS} >= {"canny", "super_resolution"}


def test_the_command_draws_only_what_is_asked_for_and_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = (Task("one", "One", drawing), Task("edges", "Edges", drawing, controlnet="canny"))
    monkeypatch.setattr(gallery, "TASKS", (*tasks, Task("other", "Other", drawing)))
    monkeypatch.setattr(Cascade, "from_pretrained", lambda name: small())
    monkeypatch.setattr("sys.argv", ["gallery", "--out", str(tmp_path), "--only", "one", "edges"])
    assert gallery.main() == 0
    assert "left out edges: the ControlNet canny is not installed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*.png")] == ["one.png"]


def test_a_checkpoint_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gallery", "--model", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert gallery.main() == 2
    assert capsys.readouterr().err.startswith("gallery: ")
