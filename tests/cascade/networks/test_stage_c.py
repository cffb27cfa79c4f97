"""Stage C against diffusers, and what the engine relies on: rows are independent, conditions are reusable."""

import pytest
import torch
from torch import Tensor

from cascade.config import StageCConfig
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from tests.cascade.networks.reference import (
    TOLERANCE,
    difference,
    diffusers_unet,
    noise,
    randomized,
    worst,
    worst_gradient,
)

REPEATED = StageCConfig(
    conditioning_dim=96,
    block_out_channels=(64, 128),
    num_attention_heads=(2, 2),
    down_num_layers_per_block=(2, 3),
    up_num_layers_per_block=(3, 1),
    down_blocks_repeat_mappers=(2, 1),
    up_blocks_repeat_mappers=(2, 3),
    clip_text_in_channels=40,
    clip_text_pooled_in_channels=48,
    clip_image_in_channels=24,
)
SWITCHED = StageCConfig(  # resolution halved between the levels, patches of 2
    patch_size=2,
    timestep_ratio_embedding_dim=32,
    conditioning_dim=64,
    block_out_channels=(32, 64, 64),
    num_attention_heads=(1, 2, 4),
    down_num_layers_per_block=(1, 1, 2),
    up_num_layers_per_block=(1, 2, 1),
    down_blocks_repeat_mappers=(1, 1, 1),
    up_blocks_repeat_mappers=(1, 1, 1),
    block_types_per_layer=("CT", "CTA", "CTA"),
    clip_text_in_channels=24,
    clip_text_pooled_in_channels=32,
    clip_image_in_channels=16,
    clip_seq=2,
    dropout=(0.0, 0.1, 0.1),
    self_attn=(True, True, True),
    switch_level=(True, True),
)
PLAIN = StageCConfig(  # one time condition, wider kernel, attention to the condition only in one level
    conditioning_dim=48,
    block_out_channels=(48, 48),
    num_attention_heads=(3, 1),
    down_num_layers_per_block=(1, 2),
    up_num_layers_per_block=(2, 1),
    clip_text_in_channels=20,
    clip_text_pooled_in_channels=20,
    clip_image_in_channels=20,
    kernel_size=5,
    self_attn=(True, False),
    timestep_conditioning_type=("sca",),
)


def inputs(
    config: StageCConfig, batch: int = 2, images: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents of odd size, ratios, text, pooled text and images."""
    latents = noise(1, batch, config.in_channels, 5 * config.patch_size, 7 * config.patch_size)
    text = noise(2, batch, 9, config.clip_text_in_channels)
    pooled = noise(3, batch, 1, config.clip_text_pooled_in_channels)
    pictures = noise(4, batch, images, config.clip_image_in_channels)
    return latents, torch.linspace(0.937, 0.112, batch), text, pooled, pictures


@pytest.mark.parametrize("config", [REPEATED, SWITCHED, PLAIN], ids=["repeated", "switched", "plain"])
@pytest.mark.parametrize("images", [1, 2])
def test_equals_diffusers(config: StageCConfig, images: int) -> None:
    network = randomized(StageC(config), seed=5)
    latents, ratio, text, pooled, pictures = inputs(config, images=images)
    with torch.inference_mode():
        ours = network(latents, ratio, network.prepare(text, pooled, pictures))
        theirs = diffusers_unet(network)(latents, ratio, pooled, text, pictures).sample
    assert difference(theirs) > 0.3
    assert worst(ours, theirs) <= TOLERANCE


def test_training_has_the_same_output_and_gradients() -> None:
    network = randomized(StageC(REPEATED), seed=11)
    latents, ratio, text, pooled, pictures = inputs(REPEATED)
    unet = diffusers_unet(network)
    ours = network(latents, ratio, network.prepare(text, pooled, pictures))
    theirs = unet(latents, ratio, pooled, text, pictures).sample
    assert worst(ours, theirs) <= TOLERANCE
    # gradients are sums over all tokens, which cancel in part
    assert worst_gradient(network, ours, unet, theirs) <= TOLERANCE


@torch.inference_mode()
def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    network = randomized(StageC(REPEATED), seed=6)
    latents, ratio, text, pooled, pictures = inputs(REPEATED)
    condition = network.prepare(text, pooled, pictures)
    together = network(latents, ratio, condition)
    for row in range(2):
        one = slice(row, row + 1)
        alone = network(latents[one], ratio[one], network.prepare(text[one], pooled[one], pictures[one]))
        # the same products, blocked otherwise by the matrix library when there are fewer rows
        assert worst(alone, together[one]) <= 1e-5


@torch.inference_mode()
def test_conditions_are_joined_and_picked_row_by_row() -> None:
    network = randomized(StageC(REPEATED), seed=7)
    latents, ratio, text, pooled, pictures = inputs(REPEATED)
    rows = [network.prepare(text[i : i + 1], pooled[i : i + 1], pictures[i : i + 1]) for i in range(2)]
    together = network(latents, ratio, network.prepare(text, pooled, pictures))
    swapped = network(latents.flip(0), ratio.flip(0), Condition.cat(rows)[[1, 0]])
    assert worst(swapped.flip(0), together) <= 1e-5  # see above


@torch.inference_mode()
def test_a_condition_serves_many_steps_unchanged() -> None:
    network = randomized(StageC(REPEATED), seed=8)
    latents, ratio, text, pooled, pictures = inputs(REPEATED)
    condition = network.prepare(text, pooled, pictures)
    first = network(latents, ratio, condition)
    network(latents * 2, ratio / 2, condition)
    fresh = network.prepare(text, pooled, pictures)
    assert torch.equal(network(latents, ratio, condition), first)
    assert torch.equal(network(latents, ratio, fresh), first)


@torch.inference_mode()
def test_bf16_is_close_to_fp32() -> None:
    network = randomized(StageC(REPEATED), seed=9)
    latents, ratio, text, pooled, pictures = inputs(REPEATED)
    exact = network(latents, ratio, network.prepare(text, pooled, pictures))
    network.bfloat16()
    rounded = network(latents, ratio, network.prepare(text, pooled, pictures))
    assert rounded.isfinite().all()
    # 8 bits: 4e-3 relative error per layer, over some twenty layers
    assert (rounded.float() - exact).square().mean().sqrt() <= 0.05 * exact.std()


@torch.inference_mode()
def test_no_image_is_not_the_same_as_an_image_of_zeros_left_out() -> None:
    network = randomized(StageC(PLAIN), seed=10)
    latents, ratio, text, pooled, pictures = inputs(PLAIN, images=1)
    with_zeros = network(latents, ratio, network.prepare(text, pooled, torch.zeros_like(pictures)))
    without = network(latents, ratio, network.prepare(text, pooled, pictures[:, :0]))
    assert worst(with_zeros, without) > 1e-3
