"""Low-rank changes of Stage C's matrices under training, and the files that they are kept in.

The frozen network runs with W + up @ down * scale in place of W, by a functional call: nothing is merged, so
gradients reach both factors. At the start the change is zero.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cascade.checkpoints.stored import StoredTensor
from cascade.checkpoints.writing import write_tensors
from cascade.networks.blocks import AttnBlock, ResBlock
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training.preconditioning import precondition
from cascade.training.stage_c import SCHEDULE

_PAIR = 100.0


class Predictor(nn.Module):
    """Stage C from latents and embeddings to noise, including the preparation of its condition."""

    def __init__(self, stage: StageC) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, latents: Tensor, ratio: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Predict the noise in `latents` (b, 16, h, w), without an image prompt."""
        image = torch.zeros(len(latents), 1, self.stage.config.clip_image_in_channels, device=latents.device)
        return cast(Tensor, self.stage(latents, ratio, self.stage.prepare(hidden, pooled, image)))


class LowRank(nn.Module):
    """One pair of factors for each of some matrices, named as in Stage C, in the order of `names`."""

    def __init__(self, stage: StageC, names: list[str], rank: int, scale: float) -> None:
        super().__init__()
        self.names, self.rank, self.scale = names, rank, scale
        shapes = [tuple(stage.get_parameter(name).shape) for name in names]
        self.down = nn.ParameterList(
            nn.Parameter(torch.randn(rank, columns) * columns**-0.5) for _, columns in shapes
        )
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(rows, rank)) for rows, _ in shapes)

    def changed(self, stage: StageC) -> dict[str, Tensor]:
        """Return the changed matrices by their names in Stage C."""
        return {
            name: stage.get_parameter(name) + self.scale * (up @ down)
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        }

    def predict(
        self, predictor: Predictor, latents: Tensor, ratio: Tensor, hidden: Tensor, pooled: Tensor
    ) -> Tensor:
        """Predict the noise with the changed network."""
        weights = {f"stage.{name}": weight for name, weight in self.changed(predictor.stage).items()}
        return cast(Tensor, functional_call(predictor, weights, (latents, ratio, hidden, pooled)))

    @torch.no_grad()
    def merged(self, stage: StageC) -> StageC:
        """Return a copy of Stage C with the changes added to its weights."""
        copy = deepcopy(stage)
        for name, weight in self.changed(stage).items():
            copy.get_parameter(name).copy_(weight)
        return copy

    def trainable(self, stage: StageC) -> dict[str, Tensor]:
        """Return masks for `fit` that freeze what carries the input of the preconditioned network."""
        masks = precondition(StageC(stage.config), CosineSchedule(SCHEDULE), _PAIR)
        return {
            f"up.{index}": masks[name].flatten(1).any(1, keepdim=True).float().expand_as(self.up[index])
            for index, name in enumerate(self.names)
            if name in masks
        }


def attention_matrices(stage: StageC) -> list[str]:
    """Name output, then input projection of every attention, in execution order: the official choice."""
    return [
        f"{name}.attention.attn.{matrix}"
        for name, block in named_blocks(stage)
        if isinstance(block, AttnBlock)
        for matrix in ("out_proj.weight", "in_proj_weight")
    ]


def all_matrices(stage: StageC) -> list[str]:
    """Name the matrices of attention, of the keys and values of the condition, and of the MLPs."""
    names = attention_matrices(stage)
    for name, block in named_blocks(stage):
        if isinstance(block, AttnBlock):
            names.append(f"{name}.kv_mapper.1.weight")
        elif isinstance(block, ResBlock):
            names += [f"{name}.channelwise.0.weight", f"{name}.channelwise.4.weight"]
    return names


def named_blocks(stage: StageC) -> Iterator[tuple[str, nn.Module]]:
    """Yield all blocks with their names, in execution order."""
    for part in ("down_blocks", "up_blocks"):
        for i, level in enumerate(getattr(stage, part)):
            for j, block in enumerate(level):
                yield f"{part}.{i}.{j}", block


def save_official(
    adapter: LowRank, path: Path, metadata: dict[str, str], tokens: dict[int, Tensor] | None = None
) -> None:
    """Write the official layout in fp16: `weights.I.lora_down`, `weights.I.lora_up`, learned token rows.

    The scale of that layout is one over the rank, so the adapter's must be, too.
    """
    assert adapter.scale == 1 / adapter.rank
    tensors = {}
    for index, (down, up) in enumerate(zip(adapter.down, adapter.up, strict=True)):
        tensors[f"weights.{index}.lora_down"] = down
        tensors[f"weights.{index}.lora_up"] = up
    write(path, tensors | _token_rows(tokens), metadata)


def save_dotted(
    adapter: LowRank, path: Path, metadata: dict[str, str], tokens: dict[int, Tensor] | None = None
) -> None:
    """Write the layout of PEFT in fp16, `prior.MODULE.lora_A.weight`, with diffusers' names of attention.

    In diffusers queries, keys and values are three layers, so their common factor is written three times.
    """
    assert adapter.scale == 1
    tensors = {}
    for name, down, up in zip(adapter.names, adapter.down, adapter.up, strict=True):
        if name.endswith("in_proj_weight"):
            module = name.removesuffix(".attn.in_proj_weight")
            parts = {
                f"{module}.{part}": rows
                for part, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True)
            }
        else:
            parts = {
                name.removesuffix(".weight").replace("attention.attn.out_proj", "attention.to_out.0"): up
            }
        for module, rows in parts.items():
            tensors[f"prior.{module}.lora_A.weight"] = down
            tensors[f"prior.{module}.lora_B.weight"] = rows
    write(path, tensors | _token_rows(tokens), metadata)


def _token_rows(tokens: dict[int, Tensor] | None) -> dict[str, Tensor]:
    """Return the embeddings of learned tokens and their ids, under the names of the official layout."""
    if not tokens:
        return {}
    return {
        "embeddings.indices": torch.tensor(list(tokens)),
        "embeddings.embeddings": torch.stack(list(tokens.values())),
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, floating ones in fp16."""
    stored = {name: StoredTensor.of(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
    write_tensors(path, stored, _half, metadata)


def _half(_: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype.is_floating_point else dtype
