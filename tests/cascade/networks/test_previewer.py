"""The previewer against a second, plain reading: layer numbers in order, convolution, GELU, batch norm."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.config import PreviewerConfig
from cascade.networks.previewer import Previewer
from tests.cascade.networks.reference import (
    TOLERANCE,
    difference,
    noise,
    randomized,
    with_statistics_of,
    worst,
)

CONFIGS = [PreviewerConfig(hidden_channels=32), PreviewerConfig(4, 16, 5), PreviewerConfig(16, 48, 3)]


def plain_preview(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Published layer numbers: 0 and 24 are 1x1, 6, 12 and 18 double the resolution, the others are 3x3."""
    for number in range(0, 24, 3):
        kernel, bias = weights[f"blocks.{number}.weight"], weights[f"blocks.{number}.bias"]
        if number in (6, 12, 18):
            x = F.conv_transpose2d(x, kernel, bias, stride=2)
        else:
            x = F.conv2d(x, kernel, bias, padding=0 if number == 0 else 1)
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        norm = {name: weights[f"blocks.{number + 2}.{name}"].view(1, -1, 1, 1) for name in NORM}
        x = norm["weight"] * (x - norm["running_mean"]) / (norm["running_var"] + 1e-5) ** 0.5 + norm["bias"]
    return F.conv2d(x, weights["blocks.24.weight"], weights["blocks.24.bias"])


NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.inference_mode()
def test_equals_the_plain_reading(config: PreviewerConfig) -> None:
    latents = noise(2, 2, config.in_channels, 5, 7)
    network = with_statistics_of(randomized(Previewer(config), seed=1), latents)
    expected = plain_preview(network.state_dict(), latents)
    assert expected.shape == (2, config.out_channels, 40, 56)
    assert difference(expected) > 0.1
    assert worst(network(latents), expected) <= TOLERANCE


@torch.inference_mode()
def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    network = randomized(Previewer(CONFIGS[0]), seed=3)
    latents = noise(4, 2, 16, 3, 3)
    together = network(latents)
    for row in range(2):
        assert worst(network(latents[row : row + 1]), together[row : row + 1]) <= 1e-5  # order of the sums


@torch.inference_mode()
def test_bf16_is_close_to_fp32() -> None:
    network = randomized(Previewer(CONFIGS[0]), seed=5)
    latents = noise(6, 1, 16, 6, 6)
    exact = network(latents)
    rounded = network.bfloat16()(latents.bfloat16())
    # 8 bits: 4e-3 relative error per layer, over nine layers
    assert (rounded.float() - exact).square().mean().sqrt() <= 0.03 * exact.std()
