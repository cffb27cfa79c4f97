"""Each sampler's step in fp64 against a plain reading of its formula, and against diffusers' own step."""

import math

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from torch import Tensor

from cascade.config import SCHEDULE_B, SCHEDULE_C, ScheduleConfig
from cascade.sampling.samplers import SAMPLERS, clean_latents, ddpm, next_latents
from cascade.sampling.schedule import CosineSchedule

SCHEDULES = [SCHEDULE_B, SCHEDULE_C, ScheduleConfig(clamp_min=0.02), ScheduleConfig(clamp_min=0.02, shift=2)]
ETA = {"ddim": 0.0, "ddpm": 1.0}


def plain_step(name: str, level: float, next_level: float, x0: Tensor, e: Tensor, z: Tensor) -> Tensor:
    a = math.sqrt(1 / (1 + math.exp(-level)))
    b = math.sqrt(1 - a**2)
    next_a = math.sqrt(1 / (1 + math.exp(-next_level)))
    next_b = math.sqrt(1 - next_a**2)
    if name == "lcm":
        return next_a * x0 + next_b * z
    sg = ETA[name] * (next_b / b) * math.sqrt(max(0.0, 1 - a**2 / next_a**2))
    return next_a * x0 + math.sqrt(next_b**2 - sg**2) * e + sg * z


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_step_is_the_formula(name: str, config: ScheduleConfig) -> None:
    """All twenty steps of a run as twenty rows of one batch."""
    torch.manual_seed(0)
    log_snr = CosineSchedule(config).grid(20).log_snr
    x, e, z = torch.randn(3, 20, 4, 3, 5, dtype=torch.float64)
    clean = clean_latents(x, e, log_snr[:-1])
    stepped = next_latents(clean, e, z, SAMPLERS[name](log_snr[:-1], log_snr[1:]))
    for row in range(20):
        level, next_level = log_snr[row].item(), log_snr[row + 1].item()
        a = math.sqrt(1 / (1 + math.exp(-level)))
        x0 = (x[row] - math.sqrt(1 - a**2) * e[row]) / a
        torch.testing.assert_close(clean[row], x0, atol=1e-9, rtol=1e-9)
        expected = plain_step(name, level, next_level, x0, e[row], z[row])
        torch.testing.assert_close(stepped[row], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", range(20))
def test_ddpm_is_the_step_of_diffusers(step: int) -> None:
    scheduler = DDPMWuerstchenScheduler()
    scheduler.s = scheduler.s.double()
    scheduler._init_alpha_cumprod = torch.cos(scheduler.s / (1 + scheduler.s) * torch.pi * 0.5) ** 2
    scheduler.set_timesteps(timesteps=torch.linspace(1, 0, 21, dtype=torch.float64))
    x, e = torch.randn(2, 1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    t = scheduler.timesteps[step].expand(1)
    expected = scheduler.step(e, t, x, generator=torch.Generator().manual_seed(7)).prev_sample

    schedule = CosineSchedule(ScheduleConfig(s=scheduler.s.item()))
    log_snr = schedule.log_snr(scheduler.timesteps[step : step + 2])
    weights = ddpm(log_snr[:1], log_snr[1:])
    z = torch.randn(1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    z = z if step < 19 else torch.zeros_like(z)
    stepped = next_latents(clean_latents(x, e, log_snr[:1]), e, z, weights)
    torch.testing.assert_close(stepped, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_latents_keep_the_variance_of_their_level(name: str) -> None:
    """Clean latents, noise and fresh noise of unit variance give unit variance at every level."""
    log_snr = CosineSchedule(SCHEDULE_C).grid(20).log_snr
    weights = SAMPLERS[name](log_snr[:-1], log_snr[1:])
    torch.testing.assert_close(sum(weight**2 for weight in weights), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_step_between_equal_levels_changes_nothing(name: str) -> None:
    """With a gentle clamp the first times of a run lie on one level."""
    level = torch.tensor([-3.9], dtype=torch.float64)
    x, e, z = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    stepped = next_latents(clean_latents(x, e, level), e, z, SAMPLERS[name](level, level))
    torch.testing.assert_close(stepped, x)


def test_latents_keep_their_type() -> None:
    log_snr = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    x, e, z = torch.randn(3, 1, 4, 2, 2)
    stepped = next_latents(clean_latents(x, e, log_snr[:1]), e, z, ddpm(log_snr[:1], log_snr[1:]))
    assert stepped.dtype == torch.float32
