"""The semantic encoder against a second, plain reading of EfficientNet-V2, block by block."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.config import EffNetConfig, EffNetStage
from cascade.networks.effnet import EffNetEncoder, resize_for_encoder
from tests.cascade.networks.reference import (
    TOLERANCE,
    difference,
    noise,
    randomized,
    with_statistics_of,
    worst,
)

SMALL = EffNetConfig(
    stem_channels=8,
    stages=(
        EffNetStage("fused", 1, 1, 8, 2),
        EffNetStage("fused", 4, 2, 12, 2),
        EffNetStage("mbconv", 4, 2, 16, 2),
        EffNetStage("mbconv", 6, 1, 20, 2),
        EffNetStage("mbconv", 6, 2, 24, 3),
    ),
    head_channels=40,
)
ONLY_FUSED = EffNetConfig(
    stem_channels=6,
    stages=(EffNetStage("fused", 1, 2, 10, 3), EffNetStage("fused", 2, 1, 10, 1)),
    head_channels=16,
    latent_channels=5,
)
ONLY_MBCONV = EffNetConfig(
    stem_channels=12,
    stages=(EffNetStage("mbconv", 4, 1, 12, 2), EffNetStage("mbconv", 3, 2, 8, 2)),
    head_channels=20,
)
CONFIGS = {"small": SMALL, "only fused": ONLY_FUSED, "only mbconv": ONLY_MBCONV}

Weights = Mapping[str, Tensor]


def plain_encode(weights: Weights, config: EffNetConfig, pixels: Tensor) -> Tensor:
    """The whole network as the tables say it."""
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    x = (pixels - mean) / deviation
    x = F.silu(plain_conv_norm(weights, "backbone.0", x, stride=2))
    for number, stage in enumerate(config.stages, start=1):
        for repeat in range(stage.repeats):
            prefix = f"backbone.{number}.{repeat}.block"
            stride = stage.stride if repeat == 0 else 1
            plain = plain_fused if stage.kind == "fused" else plain_mbconv
            y = plain(weights, prefix, x, stride)
            x = x + y if y.shape == x.shape and stride == 1 else y
    x = F.silu(plain_conv_norm(weights, f"backbone.{len(config.stages) + 1}", x))
    x = F.conv2d(x, weights["mapper.0.weight"])
    variance = weights["mapper.1.running_var"].view(1, -1, 1, 1)
    return (x - weights["mapper.1.running_mean"].view(1, -1, 1, 1)) / (variance + 1e-5) ** 0.5


def plain_fused(weights: Weights, prefix: str, x: Tensor, stride: int) -> Tensor:
    x = F.silu(plain_conv_norm(weights, f"{prefix}.0", x, stride))
    return plain_conv_norm(weights, f"{prefix}.1", x) if f"{prefix}.1.0.weight" in weights else x


def plain_mbconv(weights: Weights, prefix: str, x: Tensor, stride: int) -> Tensor:
    x = F.silu(plain_conv_norm(weights, f"{prefix}.0", x))
    x = F.silu(plain_conv_norm(weights, f"{prefix}.1", x, stride))
    s = F.adaptive_avg_pool2d(x, 1)
    s = F.silu(F.conv2d(s, weights[f"{prefix}.2.fc1.weight"], weights[f"{prefix}.2.fc1.bias"]))
    s = torch.sigmoid(F.conv2d(s, weights[f"{prefix}.2.fc2.weight"], weights[f"{prefix}.2.fc2.bias"]))
    return plain_conv_norm(weights, f"{prefix}.3", x * s)


def plain_conv_norm(weights: Weights, prefix: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = weights[f"{prefix}.0.weight"]
    x = F.conv2d(x, kernel, None, stride, (kernel.shape[-1] - 1) // 2, groups=x.shape[1] // kernel.shape[1])
    scale = weights[f"{prefix}.1.weight"] / (weights[f"{prefix}.1.running_var"] + 1e-3) ** 0.5
    shift = weights[f"{prefix}.1.bias"] - weights[f"{prefix}.1.running_mean"] * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", [(64, 96), (41, 75)], ids=["even", "odd"])
@torch.inference_mode()
def test_equals_the_plain_reading(config: EffNetConfig, size: tuple[int, int]) -> None:
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    network = with_statistics_of(randomized(EffNetEncoder(config), seed=1), pixels)
    expected = plain_encode(network.state_dict(), config, pixels)
    assert difference(expected) > 0.3
    assert worst(network(pixels), expected) <= TOLERANCE


@torch.inference_mode()
def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    network = randomized(EffNetEncoder(SMALL), seed=3)
    pixels = noise(4, 2, 3, 64, 32)
    together = network(pixels)
    for row in range(2):
        assert worst(network(pixels[row : row + 1]), together[row : row + 1]) <= 1e-5  # order of the sums


@torch.inference_mode()
def test_bf16_is_close_to_fp32() -> None:
    network = randomized(EffNetEncoder(SMALL), seed=5)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    exact = network(pixels)
    rounded = network.bfloat16()(pixels.bfloat16())
    # 8 bits: 4e-3 relative error per layer, over some thirty layers
    assert (rounded.float() - exact).square().mean().sqrt() <= 0.08 * exact.std()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1024, 1024), (24, 24)),
        ((256, 256), (6, 6)),
        ((256, 320), (6, 8)),
        ((64, 512), (2, 12)),
        ((200, 77), (5, 2)),
    ],
)
def test_resized_pictures_fill_the_grid_of_stage_c(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert resize_for_encoder(torch.zeros(1, 3, *size)).shape[2:] == (32 * grid[0], 32 * grid[1])


def test_resizing_blurs_what_the_small_grid_cannot_hold() -> None:
    columns = torch.zeros(1, 3, 256, 256)
    columns[..., ::2] = 1
    resized = resize_for_encoder(columns)
    assert resized.std() < 0.15  # without antialias .27
    assert resized.mean().item() == pytest.approx(0.5, abs=0.01)


def test_resizing_averages_and_keeps_the_picture_upright() -> None:
    pixels = torch.zeros(1, 3, 256, 256)
    pixels[:, :, :128, :64] = 1
    resized = resize_for_encoder(pixels)
    assert resized[0, 0, 0, 0] == 1
    assert resized[0, 0, -1, 0] == 0
    assert resized[0, 0, 0, -1] == 0
    assert resized.mean().item() == pytest.approx(pixels.mean().item(), abs=1e-3)
