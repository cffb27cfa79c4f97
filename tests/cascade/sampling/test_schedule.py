"""The schedule against recorded vectors, a plain reading of its formulas, and diffusers' scheduler."""

import math

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cascade.config import SCHEDULE_B, SCHEDULE_C, ScheduleConfig
from cascade.sampling.schedule import CosineSchedule, signal_and_noise

GENTLE = ScheduleConfig(clamp_min=0.02)

# 20 steps at shift 2: what the official code feeds to Stage C, and the levels it steps between.
RATIOS_SHIFT_2 = (
    *(0.993583, 0.974962, 0.949695, 0.923961, 0.897511, 0.870071, 0.841336, 0.810960, 0.778544, 0.743622),
    *(0.705645, 0.663973, 0.617861, 0.566463, 0.508862, 0.444138, 0.371523, 0.290640, 0.201812, 0.106265),
    0.007122,
)
LEVELS_SHIFT_2 = (
    *(-9.210240, -6.486321, -5.087794, -4.256245, -3.651504, -3.166546, -2.753193, -2.385144, -2.045983),
    *(-1.724228, -1.410921, -1.098212, -0.778321, -0.442539, -0.079892, 0.325063, 0.796634, 1.378421),
    *(2.164270, 3.434909, 7.823780),
)
LEVELS_SHIFT_1 = (
    *(-9.210240, -5.100027, -3.701500, -2.869950, -2.265210, -1.780252, -1.366898, -0.998850, -0.659688),
    *(-0.337934, -0.024627, 0.288083, 0.607973, 0.943755, 1.306402, 1.711357, 2.182928, 2.764715),
    *(3.550565, 4.821204, 9.210074),
)


def plain_log_snr(config: ScheduleConfig, t: float) -> float:
    """The formula as it is written down, one number at a time."""
    quarter = math.pi / 2
    m = math.cos(config.s / (1 + config.s) * quarter) ** 2
    v = math.cos((config.s + t) / (1 + config.s) * quarter) ** 2 / m
    v = min(max(v, config.clamp_min), rounded(config.clamp_max))
    low, high = -math.log(1 / config.clamp_min - 1), -math.log(1 / rounded(config.clamp_max) - 1)
    return min(max(math.log(v / (1 - v)) - 2 * math.log(config.shift), low), high)


def rounded(limit: float) -> float:
    """As fp32 holds it: for .9999 that changes the level by 2e-4."""
    return torch.tensor(limit).item()


def plain_ratio(config: ScheduleConfig, log_snr: float) -> float:
    quarter = math.pi / 2
    m = math.cos(config.s / (1 + config.s) * quarter) ** 2
    v = 1 / (1 + math.exp(-log_snr))
    return math.acos(math.sqrt(v * m)) / quarter * (1 + config.s) - config.s


def vector(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_recorded(levels: Tensor, recorded: tuple[float, ...]) -> None:
    """The recordings are fp32, which costs 5e-6 where signal is nearly 1; the formulas are tested to 1e-6."""
    torch.testing.assert_close(levels, vector(recorded), atol=6e-6, rtol=0)


def test_levels_of_the_official_run_are_the_recorded_ones() -> None:
    levels = CosineSchedule(SCHEDULE_C).grid(20)
    assert_recorded(levels.log_snr, LEVELS_SHIFT_2)
    torch.testing.assert_close(levels.ratio, vector(RATIOS_SHIFT_2[:-1]), atol=1e-6, rtol=0)
    assert levels.steps == 20


def test_the_end_of_the_official_run_has_the_recorded_ratio() -> None:
    schedule = CosineSchedule(SCHEDULE_C)
    ratio = schedule.ratio(schedule.grid(20).log_snr[-1]).item()
    assert ratio == pytest.approx(RATIOS_SHIFT_2[-1], abs=2e-6)


def test_unshifted_levels_are_the_recorded_ones() -> None:
    schedule = CosineSchedule(SCHEDULE_B)
    assert_recorded(schedule.grid(20).log_snr, LEVELS_SHIFT_1)
    assert_recorded(schedule.grid(10).log_snr, LEVELS_SHIFT_1[::2])


schedules = st.builds(
    ScheduleConfig,
    s=st.floats(0.001, 0.1),
    clamp_min=st.floats(1e-5, 0.1),
    clamp_max=st.floats(0.9, 0.9999),
    shift=st.floats(0.25, 4),
)


@given(schedules, st.floats(0, 1))
def test_level_and_ratio_follow_the_formulas(config: ScheduleConfig, t: float) -> None:
    schedule = CosineSchedule(config)
    level = schedule.log_snr(vector((t,)))
    assert level.item() == pytest.approx(plain_log_snr(config, t), abs=1e-6)
    assert schedule.ratio(level).item() == pytest.approx(plain_ratio(config, level.item()), abs=1e-6)


@pytest.mark.parametrize("config", [SCHEDULE_B, SCHEDULE_C, GENTLE])
def test_single_precision_loses_nothing(config: ScheduleConfig) -> None:
    schedule = CosineSchedule(config)
    t = torch.linspace(0, 1, 1001)
    level, exact = schedule.log_snr(t), schedule.log_snr(t.double())
    # Near t = 1 the cosine of an angle rounded to fp32 is off by 4e-8 in .01.
    torch.testing.assert_close(level.double(), exact, atol=3e-5, rtol=0)
    torch.testing.assert_close(
        schedule.ratio(exact.float()).double(), schedule.ratio(exact), atol=3e-7, rtol=0
    )


def test_without_a_shift_the_ratio_is_the_time_between_the_clamps() -> None:
    schedule = CosineSchedule(SCHEDULE_B)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(schedule.ratio(schedule.log_snr(t)), t, atol=1e-9, rtol=0)
    ends = schedule.ratio(schedule.log_snr(vector((1.0, 0.0))))
    torch.testing.assert_close(ends, vector((0.993583, 0.002257)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_gentler_clamp_bounds_every_level(shift: float) -> None:
    config = ScheduleConfig(clamp_min=0.02, shift=shift)
    for levels in (CosineSchedule(config).grid(20), CosineSchedule(config).diffusers_grid(20)):
        assert levels.log_snr[0].item() == pytest.approx(math.log(0.02 / 0.98), abs=1e-7)
        assert levels.log_snr.min() == levels.log_snr[0]
        assert levels.ratio[0].item() == pytest.approx(
            plain_ratio(config, levels.log_snr[0].item()), abs=1e-9
        )


def test_the_diffusers_grid_tells_the_network_the_time_and_ignores_the_shift() -> None:
    levels = CosineSchedule(SCHEDULE_C).diffusers_grid(20)
    assert torch.equal(levels.ratio.float(), torch.linspace(1, 0, 21)[:-1])
    assert_recorded(levels.log_snr, LEVELS_SHIFT_1)


@pytest.mark.parametrize("scaler", [0.5, 1.0, 1.7])
def test_the_time_warp_is_that_of_diffusers(scaler: float) -> None:
    scheduler = DDPMWuerstchenScheduler(scaler=scaler)
    t = torch.linspace(1, 0, 21)
    expected = scheduler._alpha_cumprod(t, torch.device("cpu"))
    log_snr = CosineSchedule(ScheduleConfig(scaler=scaler)).diffusers_grid(20).log_snr
    torch.testing.assert_close(log_snr.sigmoid().float(), expected, atol=3e-7, rtol=1e-5)


def test_a_run_may_start_late() -> None:
    levels = CosineSchedule(SCHEDULE_B).grid(8, t_start=0.8)
    assert_recorded(levels.log_snr, LEVELS_SHIFT_1[4::2])


def test_signal_and_noise_preserve_the_variance() -> None:
    log_snr = torch.linspace(-9.2, 9.2, 100, dtype=torch.float64)
    alpha, sigma = signal_and_noise(log_snr)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close((alpha**2 / sigma**2).log(), log_snr)
