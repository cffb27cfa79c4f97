"""Stage B against diffusers, and what the engine relies on: rows are independent, conditions are reusable."""

import pytest
import torch
from torch import Tensor

from cascade.config import StageBConfig
from cascade.networks.stage_b import StageB
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

REPEATED = StageBConfig(
    conditioning_dim=64,
    block_out_channels=(32, 64, 64),
    num_attention_heads=(0, 2, 4),
    down_num_layers_per_block=(1, 2, 2),
    up_num_layers_per_block=(2, 2, 1),
    down_blocks_repeat_mappers=(1, 2, 1),
    up_blocks_repeat_mappers=(3, 2, 2),
    block_types_per_layer=("CT", "CT", "CTA"),
    clip_text_pooled_in_channels=48,
    dropout=(0.0, 0.0, 0.1),
    self_attn=(True, True, True),
)
PUBLISHED_SHAPE = StageBConfig(  # four levels as published, narrow
    conditioning_dim=40,
    block_out_channels=(16, 32, 64, 64),
    num_attention_heads=(0, 9, 1, 1),
    down_num_layers_per_block=(1, 1, 2, 1),
    up_num_layers_per_block=(1, 2, 1, 1),
    up_blocks_repeat_mappers=(2, 2, 2, 2),
    clip_text_pooled_in_channels=24,
)
FLAT = StageBConfig(  # patches of 4, another latent width
    in_channels=8,
    out_channels=8,
    patch_size=4,
    timestep_ratio_embedding_dim=32,
    conditioning_dim=32,
    block_out_channels=(48, 96),
    num_attention_heads=(3, 4),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(2, 1),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=("CTA", "CTA"),
    clip_text_pooled_in_channels=16,
    clip_seq=3,
    effnet_in_channels=5,
    dropout=(0.0, 0.0),
    self_attn=(True, True),
    timestep_conditioning_type=("sca", "crp"),
)
CONFIGS = {"repeated": REPEATED, "published shape": PUBLISHED_SHAPE, "flat": FLAT}
ODD = (11, 15)  # tokens: every level below loses a row or column


def inputs(config: StageBConfig, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents of an odd number of tokens, ratios, the latent of Stage C and pooled text."""
    height, width = (side * config.patch_size for side in ODD)
    latents = noise(1, batch, config.in_channels, height, width)
    effnet = noise(2, batch, config.effnet_in_channels, 3, 4)
    pooled = noise(3, batch, 1, config.clip_text_pooled_in_channels)
    return latents, torch.linspace(0.937, 0.112, batch), effnet, pooled


def size(latents: Tensor) -> tuple[int, int]:
    return latents.shape[2], latents.shape[3]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("pixels", [None, noise(4, 2, 3, 8, 8)], ids=["no pixels", "pixels"])
def test_equals_diffusers(config: StageBConfig, pixels: Tensor | None) -> None:
    network = randomized(StageB(config), seed=5)
    latents, ratio, effnet, pooled = inputs(config)
    with torch.inference_mode():
        ours = network(latents, ratio, network.prepare(effnet, pooled, size(latents), pixels))
        theirs = diffusers_unet(network)(latents, ratio, pooled, effnet=effnet, pixels=pixels).sample
    assert difference(theirs) > 0.3
    assert worst(ours, theirs) <= TOLERANCE


def test_training_has_the_same_output_and_gradients() -> None:
    network = randomized(StageB(REPEATED), seed=11)
    latents, ratio, effnet, pooled = inputs(REPEATED)
    unet = diffusers_unet(network)
    ours = network(latents, ratio, network.prepare(effnet, pooled, size(latents)))
    theirs = unet(latents, ratio, pooled, effnet=effnet).sample
    assert worst(ours, theirs) <= TOLERANCE
    # gradients are sums over all tokens, which cancel in part
    assert worst_gradient(network, ours, unet, theirs) <= TOLERANCE


@torch.inference_mode()
def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    network = randomized(StageB(REPEATED), seed=6)
    latents, ratio, effnet, pooled = inputs(REPEATED)
    together = network(latents, ratio, network.prepare(effnet, pooled, size(latents)))
    for row in range(2):
        one = slice(row, row + 1)
        condition = network.prepare(effnet[one], pooled[one], size(latents))
        # the same products, blocked otherwise by the matrix library when there are fewer rows
        assert worst(network(latents[one], ratio[one], condition), together[one]) <= 1e-5


@torch.inference_mode()
def test_conditions_are_joined_and_picked_row_by_row() -> None:
    network = randomized(StageB(REPEATED), seed=7)
    latents, ratio, effnet, pooled = inputs(REPEATED)
    rows = [network.prepare(effnet[i : i + 1], pooled[i : i + 1], size(latents)) for i in range(2)]
    together = network(latents, ratio, network.prepare(effnet, pooled, size(latents)))
    swapped = network(latents.flip(0), ratio.flip(0), Condition.cat(rows)[[1, 0]])
    assert worst(swapped.flip(0), together) <= 1e-5  # see above


@torch.inference_mode()
def test_a_condition_serves_many_steps_unchanged() -> None:
    network = randomized(StageB(REPEATED), seed=8)
    latents, ratio, effnet, pooled = inputs(REPEATED)
    condition = network.prepare(effnet, pooled, size(latents))
    first = network(latents, ratio, condition)
    network(latents * 2, ratio / 2, condition)
    fresh = network.prepare(effnet, pooled, size(latents))
    assert torch.equal(network(latents, ratio, condition), first)
    assert torch.equal(network(latents, ratio, fresh), first)


@torch.inference_mode()
def test_bf16_is_close_to_fp32() -> None:
    network = randomized(StageB(REPEATED), seed=9)
    latents, ratio, effnet, pooled = inputs(REPEATED)
    exact = network(latents, ratio, network.prepare(effnet, pooled, size(latents)))
    network.bfloat16()
    rounded = network(latents, ratio, network.prepare(effnet, pooled, size(latents)))
    assert rounded.isfinite().all()
    # 8 bits: 4e-3 relative error per layer, over some forty layers (levels are repeated)
    assert (rounded.float() - exact).square().mean().sqrt() <= 0.08 * exact.std()
