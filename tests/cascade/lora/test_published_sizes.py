"""The official layout at full size, on the meta device: 64 attentions, output before input projection."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.checkpoints.stored import StoredTensor
from cascade.config import STAGE_C_1B, STAGE_C_3_6B, StageCConfig
from cascade.lora.formats import read_contents
from cascade.networks.stage_c import StageC
from tests.cascade.small_models import small_cascade


@pytest.mark.parametrize(("config", "pairs"), [(STAGE_C_3_6B, 128), (STAGE_C_1B, 64)])
def test_inventory(config: StageCConfig, pairs: int) -> None:
    width = config.block_out_channels[0]
    with torch.device("meta"):
        models = replace(small_cascade(), stage_c=StageC(config))
    tensors = {}
    for index in range(pairs):
        rows = 3 * width if index % 2 else width
        tensors[f"weights.{index}.lora_down"] = StoredTensor((4, width), torch.float32, ())
        tensors[f"weights.{index}.lora_up"] = StoredTensor((rows, 4), torch.float32, ())
    entries = read_contents(Path("official.safetensors"), tensors, models).entries
    assert len(entries) == pairs
    assert {entry.scale for entry in entries} == {1 / 4}
    assert [entry.layer.path for entry in entries[:3]] == [
        "down_blocks.0.2.attention.attn.out_proj",
        "down_blocks.0.2.attention.attn.in_proj",
        "down_blocks.0.5.attention.attn.out_proj",
    ]
    assert entries[-1].layer.path.startswith("up_blocks.1.")
