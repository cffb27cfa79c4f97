"""Linear layers joined with what follows them, and a fast reduction: where CPU time beside the products goes.

On a CPU and without gradients, oneDNN applies the activation or the addition to its results while these are
in the cache, which saves passes over the largest tensors, and in bf16 before it rounds them. Small products
in fp32 are left to the other library, which starts in half the time. Everywhere else these are the plain
formulas.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED_ELEMENTS = 1 << 18  # as fp32 half of a 2 MB L2 cache


def cached_rows(num_elements: int) -> int:
    """How many rows of so many elements each fit into the cache together, at least one."""
    return max(1, _CACHED_ELEMENTS // num_elements)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer alone; oneDNN adds the bias without a pass of its own, too."""
    if _is_worth_fusing(x, weight):
        return cast(Tensor, _onednn_linear()(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(linear(x))."""
    if _is_worth_fusing(x, weight):
        return cast(Tensor, _onednn_linear()(x, weight, bias, "gelu", [], "none"))
    return F.gelu(F.linear(x, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x); the shapes of the result and of `residual` are equal."""
    if x.dtype is torch.bfloat16 and _has_fused_kernels(x):
        return cast(Tensor, _onednn_linear().binary(x, residual, weight, bias, "add"))
    if x.is_cpu and x.dtype is torch.float32 and not torch.is_grad_enabled():
        total = torch.add(residual, bias).contiguous()
        total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
        return total
    return residual + F.linear(x, weight, bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of each channel by itself to the same size; (b, h, w, c) with weight (c, 1, k, k)."""
    planes = x.permute(0, 3, 1, 2)
    planes = F.conv2d(planes, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return planes.permute(0, 2, 3, 1)


def energy(x: Tensor) -> Tensor:
    """L2 norm over height and width in fp32, (b, h, w, c) -> (b, 1, 1, c).

    PyTorch's own norm over outer axes is not vectorised on a CPU and takes longer than the matrix products
    around it. Pieces that fit the cache are squared and summed in fp32 instead; no fp32 copy of `x` is made.
    How a row is cut depends on its own size only: its sum is the same to the last bit in any company.
    """
    if not x.is_cpu:
        return cast(Tensor, torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32))
    if x[0].numel() > _CACHED_ELEMENTS:
        total = torch.stack([_sum_of_squares(row.flatten(0, 1)) for row in x])[:, None, None]
    else:
        parts = torch.split(x, cached_rows(x[0].numel()))
        sums = [part.float().square().sum(dim=(1, 2), keepdim=True) for part in parts]
        total = sums[0] if len(sums) == 1 else torch.cat(sums)
    return total.sqrt_()


def _sum_of_squares(row: Tensor) -> Tensor:
    """Over the tokens of a large picture, (n, c) -> (c,)."""
    total = row.new_zeros(row.shape[-1], dtype=torch.float32)
    for piece in torch.split(row, cached_rows(4 * row.shape[-1])):
        total += piece.float().square().sum(dim=0)
    return total


def _is_worth_fusing(x: Tensor, weight: Tensor) -> bool:
    """Always in bf16; in fp32 where the wider side of the layer does not fit the cache beside its weights.

    `cached_rows` takes a row as large as that by itself, so that company does not change the choice.
    """
    is_large = max(weight.shape) * (x.numel() // x.shape[-1]) > _CACHED_ELEMENTS
    return (x.dtype is torch.bfloat16 or is_large) and _has_fused_kernels(x)


def _has_fused_kernels(x: Tensor) -> bool:
    if not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if x.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    return x.dtype is torch.float32


def _onednn_linear() -> Any:
    """The operator that torch.compile writes into its own CPU code; PyTorch has no public name for it."""
    return torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
