"""Linear layers joined with what follows them, and a fast reduction: where CPU time beside the products goes.

On a CPU and without gradients, oneDNN applies the activation or the addition to its results while these are
in the cache, which saves passes over the largest tensors, and in bf16 before it rounds them. It is also fast
on processors of every make; the library behind PyTorch's own products takes twice the time on some.
Everywhere else these are the plain formulas.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED_ELEMENTS = 1 << 18  # as fp32 half of a 2 MB L2 cache


def cached_rows(num_elements: int) -> int:
    """How many rows of so many elements each fit into the cache together, at least one."""
    return max(1, _CACHED_ELEMENTS // num_elements)


def in_parts(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """`function` of so many rows of the tensors at a time, joined again; it treats each row by itself."""
    if len(tensors[0]) <= rows:
        return function(*tensors)
    parts = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer alone; oneDNN adds the bias without a pass of its own, too."""
    if _has_fused_kernels(x):
        return cast(Tensor, _onednn_linear()(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(linear(x))."""
    if _has_fused_kernels(x):
        return cast(Tensor, _onednn_linear()(x, weight, bias, "gelu", [], "none"))
    return F.gelu(F.linear(x, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x); the shapes of the result and of `residual` are equal."""
    if _has_fused_kernels(x):
        return cast(Tensor, _onednn_linear().binary(x, residual, weight, bias, "add"))
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
    per_row = x.numel() // len(x)
    if per_row > _CACHED_ELEMENTS:
        total = torch.stack([_sum_of_squares(row.flatten(0, 1)) for row in x])[:, None, None]
    else:
        total = in_parts(_small_sums_of_squares, cached_rows(per_row), x)
    return total.sqrt_()


def _small_sums_of_squares(x: Tensor) -> Tensor:
    return x.float().square().sum(dim=(1, 2), keepdim=True)


def _sum_of_squares(row: Tensor) -> Tensor:
    """Over the tokens of a large picture, (n, c) -> (c,)."""
    total = row.new_zeros(row.shape[-1], dtype=torch.float32)
    for piece in torch.split(row, cached_rows(4 * row.shape[-1])):
        total += piece.float().square().sum(dim=0)
    return total


def _has_fused_kernels(x: Tensor) -> bool:
    if not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():  # that joins operators itself, and cannot take these
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if x.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    return x.dtype is torch.float32


def _onednn_linear() -> Any:
    """The operator that torch.compile writes into its own CPU code; PyTorch has no public name for it."""
    return torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
