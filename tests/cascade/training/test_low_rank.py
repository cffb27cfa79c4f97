from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.networks.stage_c import StageC
from cascade.training.low_rank import (
    LowRank,
    Predictor,
    all_matrices,
    attention_matrices,
    save_dotted,
    save_official,
)
from cascade.training.preconditioning import Channels


@pytest.fixture(scope="module")
def stage() -> StageC:
    return cast(StageC, load_network(EMBEDDED["tiny"] / "prior")).eval().requires_grad_(False)


def some(count: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    return (
        torch.randn(count, 16, 6, 6),
        torch.rand(count),
        torch.randn(count, 8, 128),
        torch.randn(count, 1, 128),
    )


def test_the_start_changes_nothing_and_gradients_reach_both_factors(stage: StageC) -> None:
    adapter = LowRank(stage, all_matrices(stage), 3, 1.0)
    with torch.no_grad():
        plain = Predictor(stage)(*some())
    drawn = adapter.predict(Predictor(stage), *some())
    assert torch.allclose(drawn, plain, atol=2e-5)
    drawn.square().sum().backward()
    assert all(up.grad is not None and up.grad.abs().sum() > 0 for up in adapter.up)
    with torch.no_grad():
        for up in adapter.up:
            up.add_(0.01)
    adapter.predict(Predictor(stage), *some()).square().sum().backward()
    assert all(down.grad is not None and down.grad.abs().sum() > 0 for down in adapter.down)


def test_a_merged_copy_predicts_the_same(stage: StageC) -> None:
    torch.manual_seed(2)
    adapter = LowRank(stage, attention_matrices(stage), 4, 0.25)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.1)
    with torch.no_grad():
        plain = Predictor(stage)(*some())
        changed = adapter.predict(Predictor(stage), *some())
        merged = Predictor(adapter.merged(stage))(*some())
    assert torch.allclose(changed, merged, atol=1e-4)
    assert (changed - plain).abs().max() > 1e-2


def test_the_channels_that_carry_the_input_are_not_trained(stage: StageC) -> None:
    adapter = LowRank(stage, all_matrices(stage), 2, 1.0)
    channels = Channels.of(stage.config)
    masks = adapter.trainable(stage)
    index = adapter.names.index("down_blocks.0.2.attention.attn.out_proj.weight")
    rows = masks[f"up.{index}"][:, 0]
    assert not rows[channels.pair + channels.input].any()
    assert rows[channels.prediction].all()


def test_the_official_file_lists_attention_in_the_order_of_execution(stage: StageC, tmp_path: Path) -> None:
    adapter = LowRank(stage, attention_matrices(stage), 4, 0.25)
    row = torch.arange(128.0)
    save_official(adapter, tmp_path / "a.safetensors", {"token": "[x]"}, {754: row})
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 2 * 16 + 2
    assert tensors["weights.0.lora_up"].shape == (96, 4)  # out_proj comes first
    assert tensors["weights.1.lora_up"].shape == (288, 4)
    assert torch.equal(tensors["weights.3.lora_down"], adapter.down[3].detach().half())
    assert tensors["embeddings.indices"].tolist() == [754]
    assert torch.equal(tensors["embeddings.embeddings"][0], row.half())


def test_the_dotted_file_gives_the_same_product(stage: StageC, tmp_path: Path) -> None:
    adapter = LowRank(stage, all_matrices(stage), 2, 1.0)
    for up in adapter.up:
        torch.nn.init.normal_(up)
    save_dotted(adapter, tmp_path / "a.safetensors", {})
    tensors = load_file(tmp_path / "a.safetensors")
    name = "up_blocks.1.1.2.attention" if "up_blocks.1.1.2" in tensors else "down_blocks.1.2.attention"
    index = adapter.names.index(f"{name}.attn.in_proj_weight")
    parts = [
        tensors[f"prior.{name}.{part}.lora_B.weight"].float()
        @ tensors[f"prior.{name}.{part}.lora_A.weight"].float()
        for part in ("to_q", "to_k", "to_v")
    ]
    whole = (adapter.up[index] @ adapter.down[index]).detach()
    assert torch.allclose(torch.cat(parts), whole, atol=0.02)
    assert f"prior.{name}.to_out.0.lora_A.weight" in tensors
    assert sum(t.numel() for t in LowRank(stage, all_matrices(stage), 24, 1.0).parameters()) * 2 < 1_000_000
