"""Training of Stage A: what it is shown, what its latents should mean, and that the result can be loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cascade.networks.stage_a import StageA
from cascade.training import stage_a
from cascade.training.loop import Plan
from cascade.training.scenes import PALETTE


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_a, "_BATCH", 8)


def palette() -> torch.Tensor:
    """(3, colours, 1) in 0..1."""
    return torch.tensor(list(PALETTE.values())).T[..., None] / 255


def test_latent_meaning_is_white_over_the_palette() -> None:
    latents = stage_a.colour_latents(palette()[None])[0, :, :, 0]
    assert torch.allclose(latents.mean(1), torch.zeros(4), atol=1e-5)
    assert torch.allclose(latents.std(1, correction=0), torch.ones(4), atol=1e-5)
    assert torch.allclose(latents.sum(0), torch.zeros(len(PALETTE)), atol=1e-5)


def test_crops_show_edges_and_repeat_with_the_seed() -> None:
    crops = stage_a.crops(np.random.default_rng(1), 32)
    assert crops.shape == (32, 3, 64, 64)
    assert crops.min() >= 0
    assert crops.max() <= 1
    spread = crops.amax((2, 3)) - crops.amin((2, 3))
    assert (spread.amax(1) > 0.05).sum() >= 24
    assert torch.equal(crops, stage_a.crops(np.random.default_rng(1), 32))
    assert not torch.equal(crops, stage_a.crops(np.random.default_rng(2), 32))


def test_the_nearest_code_is_chosen() -> None:
    model = StageA(stage_a.TINY_STAGE_A)
    codebook = stage_a.codes(model).detach()
    latents = torch.randn(2, 4, 3, 5)
    chosen = stage_a.quantize(model, latents).detach()
    distances = (latents[:, None] - codebook.view(1, -1, 4, 1, 1)).square().sum(2)
    assert torch.allclose((latents - chosen).square().sum(1), distances.amin(1), atol=1e-5)


def test_one_sample_in_eight_is_quantised_and_the_others_are_noisy() -> None:
    latents, quantized = torch.zeros(16, 4, 8, 8), torch.ones(16, 4, 8, 8)
    disturbed = stage_a.disturb(latents, quantized, np.random.default_rng(1))
    assert torch.equal(disturbed[[0, 8]], quantized[[0, 8]])
    noisy = disturbed[[index for index in range(16) if index % 8]]
    assert noisy.std((1, 2, 3)).min() > 0
    assert noisy.std((1, 2, 3)).max() < 0.3


def test_two_samples_in_eight_are_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_a, "_MAX_SIGMA", 0)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    disturbed = stage_a.disturb(latents, latents, np.random.default_rng(1))
    softer = disturbed.std((1, 2, 3)) < latents.std((1, 2, 3)) - 1e-3
    assert softer.tolist() == [False, True, True, False, False, False, False, False]


def test_a_few_steps_lower_the_loss_and_the_norm_stays_the_identity(small_batches: None) -> None:
    torch.manual_seed(1)
    model = StageA(stage_a.TINY_STAGE_A)
    stage_a.initialise(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for step in range(6):
        value, figures = stage_a.loss(model, step, np.random.default_rng(step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        assert figures.keys() == {"dB", "meaning"}
    assert losses[-1] < 0.8 * losses[0]
    norm = stage_a.batch_norm(model).state_dict()
    assert torch.equal(norm["running_mean"], torch.zeros(4))
    assert torch.equal(norm["weight"], torch.ones(4))


def test_in_the_end_only_the_decoder_learns_and_pale_edges_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    monkeypatch.setattr(stage_a, "held_out_pictures", lambda count: torch.rand(1, 3, 64, 64))
    exported: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        stage_a, "save_component", lambda model, folder, dtype: exported.append(model.state_dict())
    )
    for steps in (0, 2):
        stage_a.train(tmp_path, Plan(steps=1, learning_rate=1e-3), Plan(steps=steps, learning_rate=1e-2))
    before, after = exported
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"up_blocks", "out_block"}

    model = StageA(stage_a.TINY_STAGE_A)
    stage_a.initialise(model)
    edges = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    values = []
    for contrast in (1.0, 0.3):
        monkeypatch.setattr(stage_a, "crops", lambda rng, count, c=contrast: 0.5 + c * (edges - 0.5))
        values.append(stage_a.decoder_loss(model, 0, np.random.default_rng(0))[0].item())
    assert values[1] > values[0]


def test_training_writes_a_component_with_unit_variance_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    pictures = stage_a.held_out_pictures(2)
    monkeypatch.setattr(stage_a, "held_out_pictures", lambda count: pictures)
    plans = Plan(steps=2, learning_rate=1e-3), Plan(steps=1, learning_rate=1e-3)
    stage_a.train(tmp_path, *plans)
    saved: dict[str, StageA] = {}
    monkeypatch.setattr(stage_a, "save_component", lambda model, folder, dtype: saved.update(model=model))
    stage_a.train(tmp_path, *plans)  # finds the finished run and only exports it
    weights = load_file(tmp_path / "vqgan" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["out_block.0.weight"], saved["model"].state_dict()["out_block.0.weight"])
    with torch.inference_mode():
        assert saved["model"].encode(pictures).std().item() == pytest.approx(1, abs=1e-4)


@torch.inference_mode()
def test_figures_see_the_difference_between_clean_and_noisy_latents() -> None:
    model = StageA(stage_a.TINY_STAGE_A).eval()
    pictures = F.interpolate(stage_a.held_out_pictures(1), (64, 64))
    figures = stage_a.figures(model, pictures)
    assert figures["dB"] != figures["dB_noise_.2"]
    assert len(figures["latent_std"]) == 4  # type: ignore[arg-type]
