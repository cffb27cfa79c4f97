"""ControlNets against a second, plain reading in NCHW, and what Stage C does with their maps."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import ControlNetConfig, EffNetStage
from cascade.errors import CheckpointError
from cascade.networks.blocks import ResBlock
from cascade.networks.controlnet import ControlNet
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from tests.cascade.networks.reference import (
    TOLERANCE,
    difference,
    noise,
    randomized,
    with_statistics_of,
    worst,
)
from tests.cascade.networks.test_effnet import plain_fused, plain_mbconv
from tests.cascade.small_models import STAGE_C

STAGES = (
    EffNetStage("fused", 1, 1, 8, 2),
    EffNetStage("fused", 4, 2, 12, 1),
    EffNetStage("mbconv", 4, 2, 16, 2),
)
CANNY = ControlNetConfig("effnet", 1, 24, (0, 2, 3), (16, 16, 16), stem_channels=8, stages=STAGES)
INPAINTING = replace(CANNY, in_channels=4, injections=(1,), out_channels=(20,))
COLOUR = replace(CANNY, in_channels=3)  # the only number of channels with a padded stem
LARGE = ControlNetConfig("large", 16, 12, (0, 1), (16, 8), hidden_channels=(40, 24), num_blocks=2)
LARGER = ControlNetConfig("large", 5, 20, (3,), (16,), hidden_channels=(16, 32), num_blocks=3)
SIMPLE = ControlNetConfig("simple", 6, 10, (0, 1, 2, 3), (16,) * 4, hidden_channels=(24,))
SIMPLER = ControlNetConfig("simple", 2, 3, (2,), (4,), hidden_channels=(8,))
CONFIGS = {
    "canny": CANNY,
    "inpainting": INPAINTING,
    "colour": COLOUR,
    "large": LARGE,
    "larger": LARGER,
    "simple": SIMPLE,
    "simpler": SIMPLER,
}

Weights = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def plain_maps(weights: Weights, config: ControlNetConfig, x: Tensor) -> list[Tensor]:
    """The whole network as the description says it, NCHW."""
    plain = {"effnet": plain_effnet, "large": plain_large, "simple": plain_simple}[config.mode]
    x = plain(weights, config, x)
    maps: list[Tensor] = []
    for number in count():
        if f"projections.{number}.0.weight" not in weights:
            return maps
        y = F.conv2d(x, weights[f"projections.{number}.0.weight"])
        y = torch.where(y > 0, y, 0.2 * y)
        maps.append(F.conv2d(y, weights[f"projections.{number}.2.weight"]))
    raise AssertionError


def plain_effnet(weights: Weights, config: ControlNetConfig, x: Tensor) -> Tensor:
    padding = 1 if config.in_channels == 3 else 0
    x = F.conv2d(x, weights["backbone.0.0.weight"], None, 2, padding)
    x = F.silu(plain_norm(weights, "backbone.0.1", x))
    for number, stage in enumerate(config.stages, start=1):
        for repeat in range(stage.repeats):
            block = plain_fused if stage.kind == "fused" else plain_mbconv
            stride = stage.stride if repeat == 0 else 1
            y = block(weights, f"backbone.{number}.{repeat}.block", x, stride)
            x = x + y if y.shape == x.shape and stride == 1 else y
    last = len(config.stages) + 1
    return F.silu(
        plain_norm(weights, f"backbone.{last}.1", F.conv2d(x, weights[f"backbone.{last}.0.weight"]))
    )


def plain_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    statistics = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-3)


def plain_large(weights: Weights, config: ControlNetConfig, x: Tensor) -> Tensor:
    x = F.conv2d(x, weights["backbone.0.weight"], weights["backbone.0.bias"])
    x = F.conv2d(F.leaky_relu(x, 0.2), weights["backbone.2.weight"], weights["backbone.2.bias"])
    for number in range(3, 3 + config.num_blocks):
        y = x
        for norm, conv in ((0, 2), (3, 5)):
            prefix = f"backbone.{number}.blocks"
            mean, variance = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
            gain, bias = (weights[f"{prefix}.{norm}.{n}"].view(1, -1, 1, 1) for n in ("weight", "bias"))
            y = F.gelu((y - mean) / (variance + 1e-5).sqrt() * gain + bias)
            y = F.conv2d(y, weights[f"{prefix}.{conv}.weight"], weights[f"{prefix}.{conv}.bias"], padding=1)
        x = x + y
    last = f"backbone.{3 + config.num_blocks}"
    return F.conv2d(x, weights[f"{last}.weight"], weights[f"{last}.bias"])


def plain_simple(weights: Weights, config: ControlNetConfig, x: Tensor) -> Tensor:
    x = F.conv2d(x, weights["backbone.0.weight"], weights["backbone.0.bias"], padding=1)
    return F.conv2d(F.leaky_relu(x, 0.2), weights["backbone.2.weight"], weights["backbone.2.bias"], padding=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", [(64, 96), (41, 75), (9, 16)], ids=["even", "odd", "small"])
def test_equals_the_plain_reading(config: ControlNetConfig, size: tuple[int, int]) -> None:
    x = noise(2, 2, config.in_channels, *size)
    network = with_statistics_of(randomized(ControlNet(config), seed=1), x)
    expected = plain_maps(network.state_dict(), config, x)
    ours = network(x)
    assert len(ours) == len(expected) == len(config.injections)
    for one, other, width in zip(ours, expected, config.out_channels, strict=True):
        assert one.shape[-1] == width
        assert difference(other) > 0.05
        assert worst(one.permute(0, 3, 1, 2), other) <= TOLERANCE


def test_the_published_stem_ends_on_the_same_grid_as_the_encoder() -> None:
    """1024 -> 511 without padding, and 32 cells in the end; so do all multiples of 32."""
    five_halvings = (*STAGES, EffNetStage("fused", 1, 2, 8, 1), EffNetStage("fused", 1, 2, 8, 1))
    network = randomized(ControlNet(replace(CANNY, stages=five_halvings)), seed=1)
    assert network.backbone[0](torch.zeros(1, 1, 1024, 64)).shape[-2:] == (511, 31)
    for side in range(64, 1025, 160):
        assert network(torch.zeros(1, 1, side, 64))[0].shape[1:3] == (side // 32, 2)


def test_strength_scales_every_map() -> None:
    network, x = randomized(ControlNet(SIMPLE), seed=1), noise(2, 1, 6, 5, 4)
    for full, weak in zip(network(x), network(x, 0.25), strict=True):
        assert torch.equal(weak, 0.25 * full)


def test_batch_norms_in_fp32_serve_other_weights_in_bf16() -> None:
    x = noise(2, 1, 1, 64, 64)
    network = with_statistics_of(randomized(ControlNet(CANNY), seed=1), x)
    exact = network(x)
    for module in network.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.bfloat16()
    for one, other in zip(network(x), exact, strict=True):
        assert one.dtype is torch.bfloat16
        # 8 bits: 4e-3 relative error per layer, over some twelve layers
        assert (one.float() - other).square().mean().sqrt() <= 0.05 * other.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injections": (0, 2)}, "not one for each of 3 projections"),
        ({"injections": (0, 2, 2)}, "different numbers that rise"),
        ({"injections": (-1, 2, 3)}, "different numbers that rise"),
        ({"mode": "huge"}, "one of effnet, large, simple"),
        ({"hidden_channels": (3,)}, "do not suit 'effnet'"),
        ({"channels": 0}, "channels must be a whole number of at least 1"),
        ({"stem_channels": 0}, "stem_channels must be a whole number of at least 1"),
        ({"stages": (EffNetStage("fused", 1, 1, 3, 1), STAGES[2])}, "needs 4 channels before it"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(CANNY, **changes)


# Two repeats of the lower levels, and a grid that is halved between the levels.
REPEATED = replace(
    STAGE_C,
    block_out_channels=(16, 24),
    num_attention_heads=(2, 2),
    down_num_layers_per_block=(2, 1),
    up_num_layers_per_block=(1, 1),
    down_blocks_repeat_mappers=(1, 2),
    up_blocks_repeat_mappers=(2, 1),
    switch_level=(True,),
)


def conditions(network: StageC, rows: int) -> Condition:
    text, pooled = noise(2, rows, 6, 8), noise(3, rows, 1, 8)
    return network.prepare(text, pooled, torch.zeros(rows, 1, 4))


def random_maps(network: StageC, places: tuple[int, ...], rows: int, size: tuple[int, int]) -> list[Tensor]:
    widths = network.config.block_out_channels
    levels = network.control_levels
    return [noise(10 + place, rows, *size, widths[levels[place]]) for place in places]


def by_hand(
    network: StageC, latents: Tensor, ratio: Tensor, condition: Condition, maps: Mapping[int, Tensor]
) -> Tensor:
    """Stage C where each ResBlock is told what to add by the number of blocks that ran before it."""
    place = count()
    seen = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        number = next(place)
        seen.append(number)
        if number not in maps:
            return None
        x, *rest = inputs
        planes = F.interpolate(
            maps[number].permute(0, 3, 1, 2), x.shape[1:3], mode="bilinear", align_corners=True
        )
        return (x + planes.permute(0, 2, 3, 1), *rest)

    handles = [m.register_forward_pre_hook(before) for m in network.modules() if isinstance(m, ResBlock)]
    result: Tensor = network(latents, ratio, condition)
    for handle in handles:
        handle.remove()
    assert seen == list(range(len(network.control_levels)))
    return result


@pytest.mark.parametrize(
    ("config", "levels"),
    [(STAGE_C, (0, 1, 1, 0)), (REPEATED, (0, 0, 1, 1, 1, 1, 0))],
    ids=["plain", "repeated"],
)
@pytest.mark.parametrize("size", [(6, 6), (7, 5)], ids=["even", "odd"])
def test_every_injection_adds_before_its_block(
    config: object, levels: tuple[int, ...], size: tuple[int, int]
) -> None:
    network = randomized(StageC(config), seed=1)  # type: ignore[arg-type]
    assert network.control_levels == levels
    latents, ratio, condition = noise(4, 2, 16, *size), torch.tensor([0.2, 0.8]), conditions(network, 2)
    plain = network(latents, ratio, condition)
    results = [plain]
    for places in [(place,) for place in range(len(levels))] + [tuple(range(len(levels)))]:
        maps = random_maps(network, places, 2, (4, 9))
        controlled = network(latents, ratio, condition.controlled(maps, places))
        expected = by_hand(network, latents, ratio, condition, dict(zip(places, maps, strict=True)))
        assert worst(controlled, expected) <= TOLERANCE
        assert min(worst(controlled, other) for other in results) > 0.01
        fitted = network.fit_control(maps, places, size)
        assert torch.equal(network(latents, ratio, condition.controlled(fitted, places)), controlled)
        results.append(controlled)


def test_rows_with_and_without_control_are_the_same_alone_to_the_last_bit() -> None:
    network = randomized(StageC(STAGE_C), seed=1)
    latents, ratio = noise(4, 4, 16, 6, 5), torch.linspace(0.1, 0.9, 4)
    text = conditions(network, 4)
    rows = [text[row : row + 1] for row in range(4)]
    for row, places in ((1, (0, 3)), (2, (1,)), (3, (0, 1, 2, 3))):
        maps = network.fit_control(random_maps(network, places, 1, (3, 4)), places, (6, 5))
        rows[row] = rows[row].controlled(maps, places)
    joined = Condition.cat(rows)
    assert joined.control_at == (0, 1, 2, 3)
    together = network(latents, ratio, joined)
    for row, condition in enumerate(rows):
        one = slice(row, row + 1)
        alone = network(latents[one], ratio[one], condition)
        assert torch.equal(together[one], alone), f"row {row}"
        assert torch.equal(network(latents[one], ratio[one], joined[one]), alone), f"row {row}"
    assert torch.equal(together[:1], network(latents, ratio, text)[:1])
    assert worst(together[1:2], network(latents, ratio, text)[1:2]) > 0.01


def test_a_condition_keeps_its_control() -> None:
    network = randomized(StageC(STAGE_C), seed=1)
    plain = conditions(network, 3)
    [maps] = random_maps(network, (2,), 1, (6, 5))
    condition = plain.controlled([maps], (2,))
    assert condition.num_bytes == plain.num_bytes + 3 * 6 * 5 * 16 * 4
    for changed in (condition[1:], condition[[0, 2]]):
        assert changed.control is not None
        assert changed.control_at == (2,)
        assert torch.equal(changed.control[0], maps.expand(len(changed.keys_values[0]), -1, -1, -1))
    assert Condition.cat([plain, plain]).control is None


def test_gradients_reach_the_controlnet() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        network, stage = randomized(ControlNet(SIMPLE), seed=1), randomized(StageC(STAGE_C), seed=2)
        condition = conditions(stage, 1)
        condition = condition.controlled(network(noise(3, 1, 6, 6, 5)), network.injections)
        stage(noise(4, 1, 16, 6, 5), torch.tensor([0.5]), condition).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())
