"""The denoising loop with fake networks: against plain readings of both presets, and in company."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from torch import Tensor

from cascade.config import SCHEDULE_B, SCHEDULE_C, ScheduleConfig
from cascade.sampling.denoise import Guides, Known, Sample, denoise
from cascade.sampling.noise import NoiseSource, PhiloxNoise, TorchGenerator
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule, signal_and_noise

SHAPE = (4, 6, 5)
CPU = torch.device("cpu")
GENTLE = ScheduleConfig(clamp_min=0.02, shift=2)


def network(latents: Tensor, ratio: Tensor, condition: Tensor) -> Tensor:
    """Some smooth function of all three; a row's condition is one number."""
    level, wish = ratio.view(-1, 1, 1, 1), condition.view(-1, 1, 1, 1)
    return torch.tanh(0.8 * latents + wish * latents.roll(1, -1) - level) + 0.1 * wish


def sample(
    *,
    seed: int = 7,
    prompt: float = 0.5,
    negative: float | None = -0.3,
    scale: float = 4.0,
    steps: int = 20,
    sampler: str = "ddpm",
    preset: str = "official",
    config: ScheduleConfig = SCHEDULE_C,
    draw: NoiseSource | None = None,
    **more: Any,
) -> Sample[Tensor]:
    chosen = PRESETS[preset]
    return Sample(
        guides=Guides(torch.tensor([prompt]), None if negative is None else torch.tensor([negative])),
        guidance_scale=scale,
        levels=chosen.levels(CosineSchedule(config), steps),
        sampler=SAMPLERS[sampler],
        preset=chosen,
        draw=draw or PhiloxNoise(SHAPE, seed, "prior"),
        device=CPU,
        **more,
    )


def run(*samples: Sample[Tensor]) -> list[Tensor]:
    for _ in denoise(network, list(samples), torch.cat):
        pass
    return [each.result for each in samples]


KEPT = torch.linspace(-2, 2, 120).view(SHAPE)
KNOWN = Known(KEPT, torch.arange(30).view(6, 5) % 3 == 0, PhiloxNoise(SHAPE, 7, "prior known"))

# Company of every kind: other lengths, guidance, samplers, presets, schedules and sources of noise.
COMPANY: dict[str, dict[str, Any]] = {
    "plain": {},
    "short": {"steps": 3, "seed": 1},
    "unguided": {"negative": None, "seed": 2},
    "strong": {"scale": 9.0, "prompt": -0.7, "seed": 3},
    "ddim": {"sampler": "ddim", "steps": 7, "seed": 4},
    "lcm": {"sampler": "lcm", "steps": 4, "seed": 5, "negative": None},
    "diffusers": {"preset": "diffusers", "steps": 11, "draw": TorchGenerator(SHAPE, 7)},
    "gentle": {"config": GENTLE, "steps": 9, "seed": 6},
    "kept": {"known": KNOWN, "seed": 8, "steps": 6},
    "late": {"start": KEPT, "steps": 5},
    "interval": {"guided_steps": range(2, 5), "steps": 8},
    "control": {
        "guides_without_control": Guides(torch.tensor([0.9]), torch.tensor([-0.9])),
        "controlled_steps": range(3),
        "steps": 8,
    },
}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("config", [SCHEDULE_C, GENTLE])
def test_official_is_the_loop_of_the_official_code(name: str, guided: bool, config: ScheduleConfig) -> None:
    schedule = CosineSchedule(config)
    draw = PhiloxNoise(SHAPE, 7, "prior")
    level = schedule.log_snr(torch.linspace(1, 0, 21, dtype=torch.float64))
    x = draw(0)[None].double()
    for i in range(20):
        ratio = schedule.ratio(level[i : i + 1])
        e = network(x, ratio, torch.tensor([0.5]))
        if guided:
            e_c, e_u = e, network(x, ratio, torch.tensor([-0.3]))
            e = e_u + 4 * (e_c - e_u)
            e = 0.7 * e * e_c.std() / (e.std() + 1e-9) + 0.3 * e
        a, b = level[i].sigmoid().sqrt(), (1 - level[i].sigmoid()).sqrt()
        x0 = (x - b * e) / a
        next_a, next_b = level[i + 1].sigmoid().sqrt(), (1 - level[i + 1].sigmoid()).sqrt()
        z = draw(i + 1).double()
        if name == "lcm":
            x = next_a * x0 + next_b * z
        else:
            sg = (name == "ddpm") * (next_b / b) * (1 - a**2 / next_a**2).clamp(min=0).sqrt()
            x = next_a * x0 + (next_b**2 - sg**2).sqrt() * e + sg * z
    [result] = run(sample(sampler=name, negative=-0.3 if guided else None, config=config))
    torch.testing.assert_close(result.double(), x0[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("guided", [True, False])
def test_diffusers_is_the_loop_of_diffusers(guided: bool) -> None:
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, *SHAPE, generator=generator)
    for t in scheduler.timesteps[:-1]:
        e = network(x, t.expand(1), torch.tensor([0.5]))
        if guided:
            e = torch.lerp(network(x, t.expand(1), torch.tensor([-0.3])), e, 4.0)
        x = scheduler.step(e, t.expand(1), x, generator=generator).prev_sample
    draw = TorchGenerator(SHAPE, 7)
    [result] = run(sample(preset="diffusers", negative=-0.3 if guided else None, draw=draw))
    torch.testing.assert_close(result, x[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("config", [SCHEDULE_B, SCHEDULE_C, GENTLE])
def test_a_perfect_network_leads_every_sampler_to_its_picture(
    name: str, preset: str, config: ScheduleConfig
) -> None:
    picture = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    schedule = CosineSchedule(config)
    levels = PRESETS[preset].levels(schedule, 10)
    level_of = dict(zip(levels.ratio.float().tolist(), levels.log_snr.tolist(), strict=False))

    def oracle(latents: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
        alpha, sigma = signal_and_noise(torch.tensor([level_of[r] for r in ratio.tolist()]).view(-1, 1, 1, 1))
        return (latents - alpha * picture) / sigma

    one = sample(sampler=name, preset=preset, config=config, steps=10, negative=None)
    for _ in denoise(oracle, [one], torch.cat):
        pass
    torch.testing.assert_close(one.clean, picture, atol=1e-3, rtol=0)
    # What diffusers returns still carries the noise of the last level, of deviation .01.
    torch.testing.assert_close(one.result, picture, atol=1e-3 if preset == "official" else 0.06, rtol=0)


@pytest.mark.parametrize("name", sorted(COMPANY))
def test_company_changes_nothing(name: str) -> None:
    alone = run(sample(**COMPANY[name]))[0]
    together = dict(zip(COMPANY, run(*(sample(**settings) for settings in COMPANY.values())), strict=True))
    torch.testing.assert_close(together[name], alone, atol=1e-5, rtol=1e-5)


def test_joining_mid_way_changes_nothing() -> None:
    samples = [sample(**COMPANY["plain"]), sample(**COMPANY["short"])]
    late = {2: "unguided", 5: "ddim", 9: "diffusers"}
    for tick, _ in enumerate(denoise(network, samples, torch.cat)):
        if tick in late:
            samples.append(sample(**COMPANY[late[tick]]))
    names = ["plain", "short", *late.values()]
    for name, joined in zip(names, samples, strict=True):
        torch.testing.assert_close(joined.result, run(sample(**COMPANY[name]))[0], atol=1e-5, rtol=1e-5)


def test_leaving_mid_way_changes_nothing() -> None:
    samples = [sample(**COMPANY[name]) for name in ("plain", "strong", "lcm")]
    leaving = samples[1]
    for tick, _ in enumerate(denoise(network, samples, torch.cat)):
        if tick == 4:
            samples.remove(leaving)
    assert leaving.step == 5
    for name, stayed in zip(("plain", "lcm"), samples, strict=True):
        torch.testing.assert_close(stayed.result, run(sample(**COMPANY[name]))[0], atol=1e-5, rtol=1e-5)


def recording(calls: list[tuple[list[float], list[float]]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def recorded(latents: Tensor, ratio: Tensor, condition: Tensor) -> Tensor:
        assert ratio.dtype == torch.float32
        assert len(latents) == len(ratio) == len(condition)
        calls.append((condition.tolist(), ratio.tolist()))
        return network(latents, ratio, condition)

    return recorded


def test_only_guided_rows_are_doubled_and_the_conditional_ones_come_first() -> None:
    calls: list[tuple[list[float], list[float]]] = []
    samples = [
        sample(prompt=1, negative=-1, steps=2),
        sample(prompt=2, negative=None, steps=1),
        sample(prompt=3, negative=-3, steps=1, preset="diffusers"),
    ]
    for _ in denoise(recording(calls), samples, torch.cat):
        pass
    assert [conditions for conditions, _ in calls] == [[1, 2, 3, -1, -3], [1, -1]]
    first = pytest.approx(0.993583, abs=1e-6)
    assert calls[0][1] == [first, first, 1.0, first, 1.0]


def test_conditions_are_joined_only_when_the_company_changes() -> None:
    joins = 0

    def join(conditions: list[Tensor]) -> Tensor:
        nonlocal joins
        joins += 1
        return torch.cat(conditions)

    for _ in denoise(network, [sample(steps=6), sample(steps=3)], join):
        pass
    assert joins == 2


def test_predictions_of_low_precision_are_handled_in_fp32() -> None:
    def rounded(latents: Tensor, ratio: Tensor, condition: Tensor) -> Tensor:
        return network(latents, ratio, condition).bfloat16()

    one = sample()
    for _ in denoise(rounded, [one], torch.cat):
        assert one.latents.dtype == one.clean.dtype == torch.float32


def test_one_step_is_a_whole_run() -> None:
    for preset in PRESETS:
        [result] = run(sample(steps=1, preset=preset))
        assert result.isfinite().all()


def test_noise_that_no_row_needs_is_not_drawn() -> None:
    asked: list[int] = []

    def draw(step: int) -> Tensor:
        asked.append(step)
        return torch.ones(SHAPE)

    run(sample(sampler="ddim", steps=3, draw=draw))
    assert asked == [0]
    run(sample(sampler="ddpm", steps=3, draw=draw))
    assert asked == [0, 0, 1, 2]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_is_known_has_the_noise_of_every_level_and_none_in_the_end(name: str, preset: str) -> None:
    one = sample(known=KNOWN, sampler=name, preset=preset, steps=5)
    free = KNOWN.is_free
    alpha, sigma = signal_and_noise(one.levels.log_snr)
    for step in range(5):
        assert one.step == step
        noised = float(alpha[step]) * KEPT + float(sigma[step]) * PhiloxNoise(SHAPE, 7, "prior known")(step)
        assert torch.equal(one.latents[:, ~free], noised[:, ~free])
        assert not torch.equal(one.latents[:, free], noised[:, free])
        next(denoise(network, [one], torch.cat))
    assert torch.equal(one.clean[:, ~free], KEPT[:, ~free])
    if preset == "official":
        assert torch.equal(one.result[:, ~free], KEPT[:, ~free])


def test_what_is_known_changes_what_is_drawn_beside_it() -> None:
    """The made-up network reads the neighbours; where it draws nothing is put back."""
    [plain], [kept] = run(sample(steps=6)), run(sample(steps=6, known=KNOWN))
    assert not torch.allclose(plain[:, KNOWN.is_free], kept[:, KNOWN.is_free], atol=1e-2)


def test_a_run_may_start_from_latents() -> None:
    one = sample(start=KEPT, steps=2)
    assert torch.equal(one.latents, KEPT)
    assert not torch.equal(run(one)[0], run(sample(steps=2))[0])


def test_guidance_and_control_are_on_in_their_steps_only() -> None:
    calls: list[tuple[list[float], list[float]]] = []
    one = sample(
        prompt=1,
        negative=-1,
        steps=5,
        guided_steps=range(1, 4),
        guides_without_control=Guides(torch.tensor([2.0]), torch.tensor([-2.0])),
        controlled_steps=range(2, 5),
    )
    other = sample(prompt=3, negative=None, steps=5)
    for _ in denoise(recording(calls), [one, other], torch.cat):
        pass
    assert [conditions for conditions, _ in calls] == [[2, 3], [2, 3, -2], [1, 3, -1], [1, 3, -1], [1, 3]]


def test_conditions_are_joined_anew_when_one_of_them_changes() -> None:
    joins = 0

    def join(conditions: list[Tensor]) -> Tensor:
        nonlocal joins
        joins += 1
        return torch.cat(conditions)

    for _ in denoise(network, [sample(steps=6, guided_steps=range(2, 4)), sample(steps=6)], join):
        pass
    assert joins == 3
