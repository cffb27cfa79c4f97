"""`cascade train prior` and `decoder`, and the same run under torchrun: what is asked for is what is done."""

import dataclasses
from pathlib import Path

import pytest

from cascade.training import finetune as package
from cascade.training.finetune import FinetuneSettings, __main__
from tests.app.cli.running import Run

CHOSEN: dict[str, object] = {
    "model": "elsewhere",
    "steps": 7,
    "batch": 12,
    "accumulate": 3,
    "learning_rate": 0.5,
    "warmup": 4,
    "weighting": "adaptive",
    "ema_decay": 0.5,
    "image_size": 512,
    "seed": 9,
    "sheet_every": 0,
    "save_every": 5,
    "save_dtype": "bfloat16",
    "device": "cpu",
}


def options(settings: dict[str, object]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneSettings]:
    """The settings of the runs that were begun; they do nothing else."""
    runs: list[FinetuneSettings] = []
    monkeypatch.setattr(package, "finetune", runs.append)
    monkeypatch.setattr(__main__, "finetune", runs.append)
    return runs


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_command_is_the_stage(run: Run, asked: list[FinetuneSettings], stage: str) -> None:
    assert run("train", stage, "--data", "pictures", "-o", "mine").status == 0
    assert asked == [FinetuneSettings(stage=stage, data=Path("pictures"), output=Path("mine"))]  # type: ignore[arg-type]


def test_every_option_reaches_the_run(run: Run, asked: list[FinetuneSettings]) -> None:
    flags = ("--checkpointing", "--bf16", "--no-cache")
    outcome = run("train", "prior", "--data", "a", "-o", "b", *options(CHOSEN), *flags)
    assert (outcome.status, outcome.err) == (0, "")
    [settings] = asked
    told = {name: value for name, value in dataclasses.asdict(settings).items() if name in CHOSEN}
    assert told == CHOSEN
    assert (settings.checkpointing, settings.bf16, settings.cache) == (True, True, False)


def test_a_wrong_setting_names_its_option(run: Run) -> None:
    outcome = run("train", "decoder", "--data", "a", "-o", "b", "--weighting", "even")
    assert outcome.status == 2
    assert outcome.err.startswith("cascade: --weighting: must be p2 or adaptive")


def test_torchrun_takes_every_setting(asked: list[FinetuneSettings]) -> None:
    flags = ["--checkpointing", "--no-bf16", "--no-sharded", "--effnet-noise", "0.2"]
    assert __main__.main(["prior", "--data", "a", "-o", "b", *options(CHOSEN), *flags]) == 0
    [settings] = asked
    told = {name: value for name, value in dataclasses.asdict(settings).items() if name in CHOSEN}
    assert told == CHOSEN
    assert (settings.checkpointing, settings.bf16, settings.sharded) == (True, False, False)
    assert settings.effnet_noise == 0.2


def test_torchrun_is_told_of_a_wrong_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["prior", "--data", "a", "-o", "b", "--batch", "0"]) == 2
    assert capsys.readouterr().err == "batch: must be at least 1, but is 0\n"
