import json
import shutil
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.app.cli.running import Run, pixels

COMPONENTS = ("text", "vision", "stage_a", "encoder", "stage_c", "image_prompts", "wordings", "stage_b")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the components whose trainers were called; they do nothing else."""
    called: list[str] = []
    for name in COMPONENTS:
        module = ModuleType(name)
        module.__dict__["train"] = partial(lambda name, run: called.append(name), name)
        monkeypatch.setitem(sys.modules, f"cascade.training.{name}", module)
    packing = SimpleNamespace(
        pack=lambda run, to: called.append(f"pack {to}"), num_bytes=lambda folder: 1_000_000
    )
    monkeypatch.setitem(sys.modules, "cascade.training.pack", packing)
    return called


def test_training_goes_through_the_components_in_order(run: Run, tmp_path: Path, trained: list[str]) -> None:
    outcome = run("train", "tiny", "--run", tmp_path / "run")
    assert outcome.status == 0
    assert trained == [*COMPONENTS, f"pack {tmp_path / 'run' / 'checkpoint'}"]


def test_one_component_can_be_trained_alone(run: Run, tmp_path: Path, trained: list[str]) -> None:
    assert run("train", "tiny", "--component", "stage_b", "--run", tmp_path).status == 0
    assert trained == ["stage_b"]
    outcome = run("train", "tiny", "--component", "stage_d", "--run", tmp_path)
    assert outcome.status == 2
    assert "'stage_d' is not one of 'text'" in outcome.err


def test_every_component_has_a_trainer() -> None:
    assert all(callable(import_module(f"cascade.training.{name}").train) for name in COMPONENTS)


@pytest.fixture
def small_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that draws at 256x256, and an evaluation that takes one step."""
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    index = json.loads((small / "model_index.json").read_text())
    (small / "model_index.json").write_text(json.dumps(index | {"native_sizes": [[256, 256]]}))
    evaluation = import_module("cascade.evaluation.evaluate")
    monkeypatch.setattr(evaluation, "evaluate", partial(evaluation.evaluate, steps=1, decoder_steps=1))
    return small


def test_evaluation_writes_a_sheet_and_a_card(run: Run, tmp_path: Path, small_checkpoint: Path) -> None:
    sheet, card = tmp_path / "sheet.png", tmp_path / "card.md"
    files = ("--sheet", sheet, "--card", card)
    outcome = run("evaluate", "-m", small_checkpoint, "--prompts", 2, "--free", 3, *files)
    assert outcome.status == 0
    assert "all of these" in outcome.out
    assert "free prompts" in outcome.out
    assert "In free wordings" in card.read_text()
    assert pixels(sheet).ndim == 3
    assert card.read_text().startswith("# ")
    outcome = run("evaluate", "-m", small_checkpoint, "--prompts", 2, "--free", 0, *files)
    assert "free prompts" not in outcome.out
    assert "In free wordings" not in card.read_text()


@pytest.mark.parametrize("option", ["--sheet", "--card"])
def test_evaluation_refuses_early_what_it_could_not_save(run: Run, tmp_path: Path, option: str) -> None:
    outcome = run("evaluate", "--model", tmp_path, option, tmp_path / "nowhere" / "a.png")
    assert outcome.status == 2
    assert "nowhere does not exist" in outcome.err


@pytest.mark.parametrize(
    ("words", "names"),
    [(("controlnet", "canny"), ["canny"]), (("lora", "azure"), ["azure"]), (("lcm",), [])],
)
def test_extras_are_trained_with_what_was_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], names: list[str]
) -> None:
    module = import_module(f"cascade.training.{words[0]}")
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: calls.append((args, kwargs)))
    outcome = run("train", *words, "--run", tmp_path, "--device", "cpu", "--batch", 7, "--minutes", 2)
    assert outcome.status == 0
    [(args, kwargs)] = calls
    assert list(args[:-3]) == names
    assert args[-3] == tmp_path
    assert args[-1].seconds == 120  # type: ignore[attr-defined]
    assert args[-1].steps == module.PLAN.steps  # type: ignore[attr-defined]
    assert kwargs["batch"] == 7
    assert str(kwargs["device"]) == "cpu"


def test_a_controlnet_is_trained_further(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("cascade.training.controlnet")
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(module, "train", lambda *_, **kwargs: calls.append(kwargs))
    words = ("train", "controlnet", "canny", "--run", tmp_path, "--device", "cpu")
    assert run(*words, "--start", tmp_path / "absent.safetensors").status == 2
    (tmp_path / "canny.safetensors").write_bytes(b"x")
    assert run(*words, "--start", tmp_path / "canny.safetensors").status == 0
    assert run(*words).status == 0
    assert [kwargs.get("start") for kwargs in calls] == [tmp_path / "canny.safetensors", None]


def test_nothing_to_pack_is_said(run: Run, tmp_path: Path) -> None:
    outcome = run("train", "pack", "--run", tmp_path, "--model", tmp_path)
    assert outcome.status == 2
    assert "nothing to pack; trained are canny" in outcome.err
