"""Finetuning: the loss, its weights, resuming, and the checkpoint that comes out."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade.checkpoints.load import load_cascade
from cascade.config import ScheduleConfig
from cascade.errors import CheckpointError, InvalidSetting
from cascade.sampling.schedule import CosineSchedule
from cascade.training.finetune import FinetuneSettings, finetune
from cascade.training.finetune import trainer as trainer_module
from cascade.training.finetune.objective import AdaptiveWeights, P2Weights, noised


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("teal", "navy", "olive", "coral")):
        Image.new("RGB", (80 if index < 2 else 64, 64), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture
def settings(tmp_path: Path, data: Path) -> FinetuneSettings:
    return FinetuneSettings(
        stage="prior", data=data, output=tmp_path / "out", steps=4, batch=4, warmup=1, sheet_every=0, seed=3
    )


def test_p2_weights_are_the_share_of_noise() -> None:
    snr = torch.tensor([0.01, 1.0, 100.0])
    assert torch.allclose(P2Weights()(snr.log()), 1 / (1 + snr))


def test_adaptive_weights_follow_the_error_of_their_level_only() -> None:
    weights = AdaptiveWeights()
    level, other = torch.tensor([2.0]), torch.tensor([-3.0])
    for _ in range(2000):
        weights.update(level, torch.tensor([0.25]))
    assert weights(level).item() == pytest.approx(4, rel=1e-3)
    assert weights(other).item() == 1
    copy = AdaptiveWeights()
    copy.restore(weights.state())
    assert torch.equal(copy(level), weights(level))


@pytest.mark.parametrize("pyramid", [False, True])
def test_noise_has_variance_one_and_gives_back_the_clean_latents(pyramid: bool) -> None:
    clean = torch.randn(64, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    rngs = [np.random.default_rng(i) for i in range(64)]

    batch = noised(clean, (), CosineSchedule(ScheduleConfig(shift=2.0)).unshifted, rngs, pyramid=pyramid)

    alpha, sigma = (v.sqrt().view(-1, 1, 1, 1) for v in (batch.log_snr.sigmoid(), (-batch.log_snr).sigmoid()))
    assert torch.allclose(batch.latents - sigma * batch.noise, alpha * clean, atol=1e-4)
    assert batch.noise.var().item() == pytest.approx(1, abs=0.1)
    coarse = batch.noise.mean((2, 3)).var().item() * 16 * 24  # 1 for white noise
    assert (coarse > 3) is pyramid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "vqgan"}, "prior or decoder"),
        ({"batch": 5, "accumulate": 2}, "no multiple"),
        ({"caption_dropout": 1.5}, "from 0 to 1"),
        ({"learning_rate": float("nan")}, "at least"),
    ],
)
def test_wrong_settings_are_refused(
    settings: FinetuneSettings, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        replace(settings, **change)  # type: ignore[arg-type]


def test_only_the_trained_stage_changes_and_a_resumed_run_ends_alike(settings: FinetuneSettings) -> None:
    settings = replace(settings, steps=2)
    whole = finetune(replace(settings, weighting="adaptive"))
    halves = replace(settings, output=settings.output.with_name("halves"), weighting="adaptive")
    first = finetune(replace(halves, steps=1))
    halves.output.rename(halves.output.with_name("early"))
    second = finetune(halves)

    assert first + second == pytest.approx(whole, rel=1e-5)
    before, after = load_cascade("tiny"), load_cascade(settings.output)
    resumed = load_cascade(halves.output).stage_c.state_dict()
    for name, weight in after.stage_c.state_dict().items():
        assert torch.allclose(weight, resumed[name], atol=1e-6), name
    assert not torch.equal(
        before.stage_c.state_dict()["clf.1.weight"], after.stage_c.state_dict()["clf.1.weight"]
    )
    for name, weight in before.stage_b.state_dict().items():
        assert torch.equal(weight, after.stage_b.state_dict()[name])
    with pytest.raises(CheckpointError, match="exists already"):
        finetune(settings)


def test_a_run_with_other_settings_is_not_resumed(settings: FinetuneSettings, data: Path) -> None:
    finetune(replace(settings, steps=1))
    settings.output.rename(settings.output.with_name("early"))
    with pytest.raises(InvalidSetting, match="learning_rate: the unfinished run"):
        finetune(replace(settings, learning_rate=1.0))
    (data / "teal.txt").write_text("another caption")
    with pytest.raises(InvalidSetting, match="dataset: the unfinished run"):
        finetune(settings)


def test_recomputing_changes_nothing(settings: FinetuneSettings) -> None:
    plain = finetune(replace(settings, steps=2))
    recomputed = finetune(
        replace(settings, steps=2, output=settings.output.with_name("b"), checkpointing=True)
    )
    assert recomputed == pytest.approx(plain, rel=1e-5)
    a, b = (load_cascade(settings.output.with_name(name)).stage_c.state_dict() for name in ("out", "b"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_decoder_learns_too_in_half_precision(settings: FinetuneSettings) -> None:
    losses = finetune(replace(settings, stage="decoder", steps=1, batch=2, bf16=True, effnet_noise=0.2))
    assert 0 < losses[0] < 2
    before, after = load_cascade("tiny"), load_cascade(settings.output)
    assert not torch.equal(
        before.stage_b.state_dict()["clf.1.weight"], after.stage_b.state_dict()["clf.1.weight"]
    )


def test_a_checkpoint_without_effnet_is_refused(
    settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = replace(load_cascade("tiny"), effnet=None)
    monkeypatch.setattr(trainer_module, "load_cascade", lambda *_, **__: models)
    with pytest.raises(CheckpointError, match="no effnet_encoder"):
        finetune(settings)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--sharded", "--no-sharded"])
def test_two_processes_learn_what_one_does(settings: FinetuneSettings, flag: str) -> None:
    settings = replace(settings, weighting="adaptive", accumulate=2, batch=8, device="cpu")
    finetune(settings)
    both = settings.output.with_name("both")
    words = f"prior --data {settings.data} -o {both} --steps 4 --batch 8 --accumulate 2 --warmup 1 --seed 3"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "cascade.training.finetune", *words.split(), "--sheet-every", "0", flag]
    command += ["--weighting", "adaptive", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]

    one, two = (
        load_file(path.with_name(f"{path.name}.training") / "state.safetensors")
        for path in (settings.output, both)
    )
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=2e-5), name
