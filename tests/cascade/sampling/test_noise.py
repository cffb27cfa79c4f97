"""Noise: the same for ever, normal, independent; for diffusers, the very draws of its script."""

import time

import numpy as np
import pytest
import torch

from cascade.sampling.noise import PhiloxNoise, TorchGenerator, gaussian

SHAPE = (4, 256, 256)


def test_values_never_change() -> None:
    """A changed value here changes every picture that anybody ever got from a seed."""
    first = torch.tensor([-0.00616374, -0.50003016, -1.15013111, 0.81908971, -1.03017724, 0.50782883])
    torch.testing.assert_close(gaussian((16, 24, 24), 7, "prior", 0).flatten()[:6], first, atol=1e-6, rtol=0)
    last = torch.tensor([-0.39296442, -0.51617014, -1.43836117, -0.22393729, -0.0812262, -0.61858469])
    drawn = gaussian((4, 3, 5), 2**32 - 1, "decoder", 10)
    torch.testing.assert_close(drawn.flatten()[-6:], last, atol=1e-6, rtol=0)


def test_noise_is_standard_normal() -> None:
    values = gaussian(SHAPE, 1, "decoder", 3).double()
    # 262,144 values: four standard errors of mean, deviation, skewness and kurtosis
    assert abs(values.mean().item()) < 4 / 512
    assert abs(values.std().item() - 1) < 4 / 512 / 2**0.5
    assert abs((values**3).mean().item()) < 4 * 15**0.5 / 512
    assert abs((values**4).mean().item() - 3) < 4 * 96**0.5 / 512
    tail = (values.abs() > 3).double().mean().item()
    assert tail == pytest.approx(0.0027, abs=4 * 0.0027**0.5 / 512)


def test_neighbours_seeds_steps_and_stages_are_independent() -> None:
    noise = gaussian(SHAPE, 1, "decoder", 3).flatten()
    others = {
        "seed": gaussian(SHAPE, 2, "decoder", 3),
        "step": gaussian(SHAPE, 1, "decoder", 4),
        "stage": gaussian(SHAPE, 1, "prior", 3),
        "neighbour": noise.roll(1),
        "next but one": noise.roll(2),
    }
    for name, other in others.items():
        correlation = (noise.double() * other.flatten().double()).mean().item()
        assert abs(correlation) < 4 / 512, name
        energy = np.corrcoef(noise.abs().numpy(), other.flatten().abs().numpy())[0, 1]
        assert abs(energy) < 4 / 512, name


def test_noise_is_a_function_of_its_arguments() -> None:
    assert torch.equal(gaussian((3, 5, 7), 9, "prior", 2), gaussian((3, 5, 7), 9, "prior", 2))
    assert torch.equal(PhiloxNoise((3, 5, 7), 9, "prior")(2), gaussian((3, 5, 7), 9, "prior", 2))
    odd = gaussian((3, 5, 7), 9, "prior", 2)
    assert odd.shape == (3, 5, 7)
    assert odd.dtype == torch.float32
    assert odd.isfinite().all()


def test_noise_of_a_picture_is_quick() -> None:
    gaussian(SHAPE, 0, "decoder", 0)
    times = []
    for step in range(5):
        start = time.thread_time()
        gaussian(SHAPE, 0, "decoder", step)
        times.append(time.thread_time() - start)
    assert min(times) < 0.05, "one 4x256x256 draw takes about 5 ms of a core, however busy the others are"


def test_torch_draws_follow_each_other_as_in_a_script() -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    expected = [torch.randn(1, 16, 6, 6, generator=generator)[0] for _ in range(5)]
    draw = TorchGenerator((16, 6, 6), 7)
    for step in (0, 1, 3, 2, 0, 4, 4):
        assert torch.equal(draw(step), expected[step]), step


def test_torch_draws_continue_after_earlier_ones() -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    for _ in range(3):
        torch.randn(1, 16, 6, 5, generator=generator)
    expected = torch.randn(1, 4, 64, 54, generator=generator)[0]
    assert torch.equal(TorchGenerator((4, 64, 54), 7, earlier=[(16, 6, 5)] * 3)(0), expected)


def test_torch_draws_are_of_the_type_of_the_weights() -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    expected = torch.randn(16, 6, 6, generator=generator, dtype=torch.bfloat16).float()
    drawn = TorchGenerator((16, 6, 6), 7, dtype=torch.bfloat16)(0)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, expected)


def test_torch_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    TorchGenerator((4, 8, 8), 7)(3)
    assert torch.equal(torch.get_rng_state(), before)
