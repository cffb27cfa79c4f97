"""Dimensions that no network can have are refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cascade.config import (
    EFFNET_V2_S,
    PREVIEWER,
    STAGE_A,
    STAGE_B_1_5B,
    STAGE_C_1B,
    EffNetConfig,
    EffNetStage,
    StageCConfig,
)
from cascade.errors import CheckpointError
from cascade.networks.stage_c import StageC

FUSED = EffNetStage("fused", 4, 2, 8, 1)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (FUSED, {"stride": 0}, "stride must be a whole number of at least 1, but is 0"),
        (FUSED, {"stride": 3}, "stride 3; allowed are 1 and 2"),
        (FUSED, {"stride": 1.5}, "stride must be a whole number"),
        (FUSED, {"expand": 0}, "expand must be"),
        (FUSED, {"channels": -8}, "channels must be"),
        (FUSED, {"repeats": 0}, "repeats must be"),
        (FUSED, {"kind": "dense"}, "'dense'; known are fused and mbconv"),
        (EFFNET_V2_S, {"head_channels": 0}, "head_channels must be"),
        (EFFNET_V2_S, {"stem_channels": True}, "stem_channels must be"),
        (PREVIEWER, {"hidden_channels": 0}, "hidden_channels must be"),
        (STAGE_A, {"levels": 0}, "levels must be"),
        (STAGE_A, {"hidden_channels": 6, "levels": 3}, "hidden_channels = 6 cannot be halved"),
        (STAGE_B_1_5B, {"patch_size": 0}, "patch_size must be"),
        (STAGE_B_1_5B, {"kernel_size": 4}, "kernel_size must be odd, but is 4"),
        (
            STAGE_B_1_5B,
            {"timestep_ratio_embedding_dim": 3},
            "timestep_ratio_embedding_dim must be at least 4",
        ),
        (STAGE_B_1_5B, {"up_blocks_repeat_mappers": (1, 1, 0, 1)}, r"must be .* but is \[1, 1, 0, 1\]"),
        (STAGE_B_1_5B, {"dropout": (0.0,)}, "dropout = .* has not one value for each of 4 levels"),
        (STAGE_B_1_5B, {"num_attention_heads": (0, 0, 3, 20)}, "3 heads do not divide the width 1280"),
        (STAGE_B_1_5B, {"num_attention_heads": (0, 0, 0, 20)}, "0 heads do not divide"),
        (STAGE_B_1_5B, {"block_types_per_layer": ("CT", "TC", "CTA", "CTA")}, "'TC' must begin with C"),
        (STAGE_B_1_5B, {"block_types_per_layer": ("CT", "", "CTA", "CTA")}, "'' must begin with C"),
        (STAGE_B_1_5B, {"block_types_per_layer": ("CT", "CX", "CTA", "CTA")}, "'X' is not a known block"),
        (STAGE_C_1B, {"block_types_per_layer": ("CA", "C")}, "no level has a block T"),
        (STAGE_C_1B, {"switch_level": ()}, "switch_level"),
    ],
)
def test_nonsense_is_refused_by_name(config: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(config, **change)


def test_squeezing_needs_channels() -> None:
    with pytest.raises(CheckpointError, match="needs 4 channels before it, has 2"):
        EffNetConfig(stem_channels=8, stages=(replace(FUSED, channels=2), EffNetStage("mbconv", 4, 1, 8, 1)))


def test_heads_of_levels_without_attention_may_be_anything() -> None:
    assert replace(STAGE_B_1_5B, num_attention_heads=(-1, 9, 20, 20)).num_attention_heads[0] == -1


def test_a_pattern_of_two_blocks_c_joins_its_skip_in_the_first() -> None:
    config = StageCConfig(
        conditioning_dim=64,
        block_out_channels=(64, 64),
        num_attention_heads=(1, 1),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=("CCT", "CCTA"),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
    )
    with torch.device("meta"):
        weights = StageC(config).state_dict()
    widths = [weights[f"up_blocks.1.{block}.channelwise.0.weight"].shape[1] for block in (0, 1)]
    assert widths == [128, 64]
