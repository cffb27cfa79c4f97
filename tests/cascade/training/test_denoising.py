import numpy as np
import pytest
import torch

from cascade.config import ScheduleConfig
from cascade.sampling.schedule import CosineSchedule, signal_and_noise
from cascade.training.denoising import Emphasis, noise_batch

SCHEDULE = CosineSchedule(ScheduleConfig(clamp_min=0.02))
PLAIN = Emphasis(starts=0.0, decoys=0.0, overshot=0.0, wobbly=0.0, rough=0.0, low_noise=0.25, highest=8.0)


def test_the_true_noise_has_no_loss() -> None:
    clean = torch.randn(16, 4, 8, 8)
    batch = noise_batch(clean, SCHEDULE, PLAIN, np.random.default_rng(0))
    alpha, sigma = (scale.float().view(-1, 1, 1, 1) for scale in signal_and_noise(batch.log_snr))
    noise = (batch.latents - alpha * clean) / sigma
    assert float(batch.loss(noise)[0]) < 1e-9
    assert float(batch.loss(noise + 0.1)[0]) > 1e-3


def test_levels_are_spread_evenly_over_time() -> None:
    batch = noise_batch(torch.zeros(10, 1, 2, 2), SCHEDULE, PLAIN, np.random.default_rng(0))
    assert sorted((batch.ratio * 10).int().tolist()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_starts_show_nothing_of_the_picture() -> None:
    emphasis = Emphasis(
        starts=0.5, decoys=0.0, overshot=0.0, wobbly=0.0, rough=0.0, low_noise=0.25, highest=8.0
    )
    batch = noise_batch(torch.full((8, 4, 32, 32), 50.0), SCHEDULE, emphasis, np.random.default_rng(0))
    assert batch.latents[:4].mean().abs() < 0.1
    assert batch.latents[:4].std().item() == pytest.approx(1.0, abs=0.02)
    assert (batch.latents[4:].mean((1, 2, 3)) > 1).all()


def test_decoys_show_another_picture_and_lead_to_the_right_one() -> None:
    clean = torch.zeros(64, 1, 4, 4)
    clean[1::2] = 1000.0
    emphasis = Emphasis(
        starts=0.0, decoys=1.0, overshot=0.0, wobbly=0.0, rough=0.0, low_noise=0.25, highest=8.0
    )
    batch = noise_batch(clean, SCHEDULE, emphasis, np.random.default_rng(0))
    assert torch.equal(batch.clean, clean)
    wrong = batch.latents[0::2].mean((1, 2, 3)) > 10
    assert wrong.float().mean() > 0.5
    assert not wrong[batch.ratio[0::2] < 0.28].any()


def test_latents_may_show_another_picture_than_they_lead_to() -> None:
    clean, shown = torch.zeros(16, 1, 4, 4), torch.full((16, 1, 4, 4), 1000.0)
    batch = noise_batch(clean, SCHEDULE, PLAIN, np.random.default_rng(0), shown)
    alpha = signal_and_noise(batch.log_snr)[0].float()
    assert torch.equal(batch.clean, clean)
    assert torch.allclose(batch.latents.mean((1, 2, 3)), 1000 * alpha, atol=2)


def test_channels_count_by_their_importance_and_rows_can_be_chosen() -> None:
    clean = torch.randn(16, 2, 4, 4)
    batch = noise_batch(clean, SCHEDULE, PLAIN, np.random.default_rng(0))
    alpha, sigma = (scale.float().view(-1, 1, 1, 1) for scale in signal_and_noise(batch.log_snr))
    noise = (batch.latents - alpha * clean) / sigma
    wrong = noise + torch.tensor([0.1, 0.0]).view(2, 1, 1)
    first, second = torch.tensor([1.0, 0.0]).view(2, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    assert float(batch.loss(wrong, second)[0]) < 1e-9
    assert float(batch.loss(wrong, 3 * first)[0]) == pytest.approx(3 * float(batch.loss(wrong)[0]), rel=1e-4)
    assert float(batch.disagreement(wrong, noise, second)) < 1e-9
    assert float(batch.disagreement(wrong, noise, first)) > 1e-4
    some = batch[::2]
    assert torch.equal(some.clean, clean[::2])
    assert float(some.loss(noise[::2])[0]) < 1e-9


def test_low_noise_counts_more_within_bounds() -> None:
    batch = noise_batch(torch.zeros(32, 1, 2, 2), SCHEDULE, PLAIN, np.random.default_rng(0))
    order = batch.ratio.argsort()
    assert batch.weight[order[0]] == 8.0
    assert batch.weight[order[-1]] == 1.0
    assert (batch.weight[order].diff() <= 0).all()


def test_overshot_latents_are_larger_and_lead_back() -> None:
    clean = torch.ones(64, 2, 4, 4) * 10
    emphasis = Emphasis(
        starts=0.0, decoys=0.0, overshot=0.5, wobbly=0.0, rough=0.0, low_noise=0.25, highest=8.0
    )
    batch = noise_batch(clean, SCHEDULE, emphasis, np.random.default_rng(0))
    alpha = signal_and_noise(batch.log_snr)[0].float()
    ratio = batch.latents.mean((1, 2, 3)) / (10 * alpha)
    assert torch.equal(batch.clean, clean)
    late = batch.ratio < 0.7
    assert ((ratio[late] - 1).abs() < 0.06).float().mean() == pytest.approx(0.5, abs=0.15)
    assert ratio[late].max() > 1.4


def test_wobbly_latents_have_the_same_content_elsewhere() -> None:
    clean = torch.zeros(32, 1, 30, 30)
    clean[:, :, 10:20, 10:20] = 1
    emphasis = Emphasis(
        starts=0.0, decoys=0.0, overshot=0.0, wobbly=1.0, rough=0.0, low_noise=0.25, highest=8.0
    )
    batch = noise_batch(clean, SCHEDULE, emphasis, np.random.default_rng(0))
    latest = batch.ratio.argmin()
    shown = batch.latents[latest] / signal_and_noise(batch.log_snr[latest])[0].float()
    assert torch.equal(batch.clean, clean)
    assert shown[:, 13:17, 13:17].mean() == pytest.approx(1, abs=0.1)
    assert shown[:, :7, :7].mean() == pytest.approx(0, abs=0.1)
    assert (shown - clean[latest]).abs().max() > 0.3


def test_rough_latents_have_more_noise_than_their_level_says() -> None:
    clean = torch.zeros(400, 1, 8, 8)
    emphasis = Emphasis(
        starts=0.0, decoys=0.0, overshot=0.0, wobbly=0.0, rough=0.5, low_noise=0.25, highest=8.0
    )
    batch = noise_batch(clean, SCHEDULE, emphasis, np.random.default_rng(0))
    sigma = signal_and_noise(batch.log_snr)[1].float()
    late = batch.ratio < 0.2
    excess = batch.latents[late].std((1, 2, 3)) / sigma[late]
    assert torch.equal(batch.clean, clean)
    assert (excess > 1.4).float().mean() == pytest.approx(0.4, abs=0.15)
