"""One known change of a small Stage C, written in every layout of LoRA files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.networks.blocks import AttentionWeights
from cascade.networks.stage_c import StageC

RANK = 3

Factors = dict[str, tuple[Tensor, Tensor]]  # by layer: down (rank, in), up (out, rank)


def attention_factors(stage: StageC, seed: int) -> Factors:
    """For every attention: output, then input projection, in execution order; the scale is in `up`."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for name, module in stage.named_modules():
        if isinstance(module, AttentionWeights):
            width = module.out_proj.in_features
            for place, rows in (("out_proj", width), ("in_proj", 3 * width)):
                down = torch.randn(RANK, width, generator=generator) * width**-0.5
                factors[f"{name}.{place}"] = down, torch.randn(rows, RANK, generator=generator) * 0.3
    return factors


def factors_of(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Factors:
    """Random factors for layers of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5,
            torch.randn(shape[0], RANK, generator=generator) * 0.3,
        )
        for name, shape in shapes.items()
    }


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def official(factors: Factors) -> dict[str, Tensor]:
    """Numbered pairs whose scale, 1 / rank, is not stored."""
    tensors = {}
    for index, (down, up) in enumerate(factors.values()):
        tensors[f"weights.{index}.lora_down"] = down
        tensors[f"weights.{index}.lora_up"] = up * RANK
    return tensors


def kohya(factors: Factors, alpha: float = 2.0, prefix: str = "lora_prior_unet_") -> dict[str, Tensor]:
    """Underscores, `alpha`, ComfyUI's spelling of attention; queries, keys and values by themselves."""
    tensors: dict[str, Tensor] = {}
    for name, down, up in _split(factors, "attn.to_q", "attn.to_out.0"):
        module = prefix + name.replace(".", "_")
        tensors[f"{module}.lora_down.weight"] = down
        tensors[f"{module}.lora_up.weight"] = up * (RANK / alpha)
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(factors: Factors, prefix: str = "prior.") -> dict[str, Tensor]:
    """Dots, diffusers' spelling of attention, no scale."""
    tensors: dict[str, Tensor] = {}
    for name, down, up in _split(factors, "to_q", "to_out.0"):
        tensors[f"{prefix}{name}.lora_A.weight"] = down
        tensors[f"{prefix}{name}.lora_B.weight"] = up
    return tensors


def fused_peft(factors: Factors) -> dict[str, Tensor]:
    """Dots and the original spelling of attention."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        tensors[f"{name}.lora_A.default.weight"] = down
        tensors[f"{name}.lora_B.default.weight"] = up
    return tensors


LAYOUTS: dict[str, Any] = {"official": official, "kohya": kohya, "peft": peft, "fused": fused_peft}


def _split(factors: Factors, query: str, out: str) -> list[tuple[str, Tensor, Tensor]]:
    """Factors with queries, keys and values as layers of their own."""
    result = []
    for name, (down, up) in factors.items():
        if name.endswith(".attn.in_proj"):
            outer = name.removesuffix("attn.in_proj")
            for letter, rows in zip("qkv", up.chunk(3), strict=True):
                result.append((outer + query.replace("to_q", f"to_{letter}"), down, rows))
        elif name.endswith(".attn.out_proj"):
            result.append((name.removesuffix("attn.out_proj") + out, down, up))
        else:
            result.append((name, down, up))
    return result
