"""Linear layers joined with what follows them, norms and sums: where CPU time beside the products goes.

On a CPU and without gradients, oneDNN applies the activation or the addition to its results while these are
in the cache, which saves passes over the largest tensors, and in bf16 before it rounds them. It is also fast
on processors of every make; the library behind PyTorch's own products takes twice the time on some.
Everywhere else these are the plain formulas.
"""

from collections.abc import Callable, MutableMapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NORM_EPS = 1e-6

_CACHED_ELEMENTS = 1 << 18  # as fp32 half of a 2 MB L2 cache
_SMALL_WEIGHT = 1 << 18  # elements
_MANY_TOKENS = 256  # of a picture; for fewer, the passes cost more to start than the one operator
_SCORE_BYTES = 4 << 20  # of a piece of attention: it stays in the cache from one operator to the next
_MANY_SCORES = 1 << 17  # of a picture
_MANY_QUERIES = 64

# By weight: its values, and what was made of them.
_packed: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakTensorKeyDictionary()


def is_plain_cpu(x: Tensor) -> bool:
    """Nothing records the operators, or joins them itself and cannot take oneDNN's, as torch.compile does."""
    if not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling()


def cached_rows(num_elements: int) -> int:
    """How many rows of so many elements each fit into the cache together, at least one."""
    return max(1, _CACHED_ELEMENTS // num_elements)


def in_parts(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """`function` of so many rows of the tensors at a time, joined again; it treats each row by itself."""
    if tensors[0].shape[0] <= rows:
        return function(*tensors)
    parts = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def linear(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None = None) -> Tensor:
    """The linear layer alone; oneDNN adds the bias without a pass of its own, too.

    Here and below, `packed` is what `packed_linear` made of the weight.
    """
    if _has_fused_kernels(x):
        product: Tensor = _onednn_linear().default(x, _either(packed, weight), bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None = None) -> Tensor:
    """GELU(linear(x))."""
    if _has_fused_kernels(x):
        product: Tensor = _onednn_linear().default(x, _either(packed, weight), bias, "gelu", [], "none")
        return product
    return F.gelu(F.linear(x, weight, bias))


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, packed: Tensor | None = None
) -> Tensor:
    """residual + linear(x); the shapes of the result and of `residual` are equal."""
    if _has_fused_kernels(x):
        total: Tensor = _onednn_linear().binary(x, residual, _either(packed, weight), bias, "add")
        return total
    return residual + F.linear(x, weight, bias)


def linear_add_each(x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x), each picture (h, w, c) with a weight of its own, (b, outputs, c).

    On a CPU one picture at a time: each is the same to the last bit in any company, and stays in the cache.
    Elsewhere together, which is fewer kernels, and one code for any number of pictures when it is compiled.
    """
    if residual.is_cpu and not torch.compiler.is_compiling():
        rows = [linear_add(x[n : n + 1], weights[n], bias, residual[n : n + 1]) for n in range(len(x))]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    total = (residual + bias).flatten(1, 2)
    return torch.baddbmm(total, x.flatten(1, 2), weights.transpose(1, 2)).view_as(residual)


def layer_norm(x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the last axis of (b, ..., c), then times `gain`, plus `bias`, both of one element.

    PyTorch's own goes to work anew for every token: of a few passes over the map, each vectorised, it takes
    twice the time where there are a hundred channels, and a third more where there are two thousand. Which
    of the two it is depends on the picture, not on its company.
    """
    rows, *_, channels = x.shape
    # The size is asked last: in a trace it would be a condition on it.
    if not (is_plain_cpu(x) and x.dtype is torch.float32 and x.numel() >= _MANY_TOKENS * channels * rows):
        gain = None if gain is None else gain.expand(channels)
        bias = None if bias is None else bias.expand(channels)
        return torch.layer_norm(x, (channels,), gain, bias, NORM_EPS)
    centered = x - x.mean(dim=-1, keepdim=True)
    norms = torch.linalg.vector_norm(centered, dim=-1, keepdim=True)
    scale = norms.square_().div_(channels).add_(NORM_EPS).rsqrt_()
    if gain is not None:
        scale *= gain
    if bias is None:
        return centered.mul_(scale)
    return torch.addcmul(bias, centered, scale, out=centered)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of (b, heads, n, d) to keys and values (b, heads, m, d), of equal b and heads.

    PyTorch's fused operator is slow twice on a CPU. Its backward pass takes thrice as long as the plain
    formula; and in bf16 it multiplies at a fraction of the speed of oneDNN's products. So large pictures are
    taken in pieces, whose scores stay in the cache while they are made, normalised and used. Not so with AMX,
    where it is fast, and without instructions for bf16, where the products are not.
    """
    if query.is_cpu and query.requires_grad:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return cast(Tensor, scores.softmax(dim=-1) @ value)
    if query.dtype is torch.bfloat16 and _has_fused_kernels(query) and _has_fast_products():
        _, heads, n, _ = query.shape
        if n >= _MANY_QUERIES and heads * n * key.shape[2] >= _MANY_SCORES:
            return _attention_in_pieces(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _attention_in_pieces(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Cut by the size of a picture alone, so that the result is the same to the last bit in any company.

    The products are rounded to bf16, which would cost most where scores are largest and count most. So they
    are made twice, the second time less the largest of their query, which the softmax does not see.
    """
    b, heads, n, d = query.shape
    row_bytes = key.shape[2] * query.element_size()
    num_queries = max(1, _SCORE_BYTES // row_bytes)
    num_heads = max(1, _SCORE_BYTES // (row_bytes * n))
    attended = query.new_empty(b, n, heads, d).transpose(1, 2)
    unused = query.new_empty(())
    for picture in zip(query, key, value, attended, strict=True):
        for q, k, v, out in zip(*(tensor.split(num_heads) for tensor in picture), strict=True):
            keys = k.transpose(1, 2)
            for part, target in zip(q.split(num_queries, dim=1), out.split(num_queries, dim=1), strict=True):
                largest = torch.baddbmm(unused, part, keys, beta=0, alpha=d**-0.5).amax(dim=-1, keepdim=True)
                scores = torch.baddbmm(largest, part, keys, beta=-1, alpha=d**-0.5)
                target.copy_(scores.softmax(dim=-1) @ v)
    return attended


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of each channel by itself to the same size; (b, h, w, c) with weight (c, 1, k, k).

    The weight may be what `packed_depthwise` made of it.
    """
    planes, channels, padding = x.permute(0, 3, 1, 2), x.shape[-1], weight.shape[-1] // 2
    if weight.is_mkldnn:
        pair = (padding, padding)
        planes = _onednn_convolution()(planes, weight, bias, pair, (1, 1), (1, 1), channels, "none", (), "")
    else:
        planes = F.conv2d(planes, weight, bias, padding=padding, groups=channels)
    return planes.permute(0, 2, 3, 1)


def packed_depthwise(weight: Tensor) -> Tensor:
    """A depthwise weight as oneDNN's kernels read it: else each call reorders it, a quarter of its time."""
    if not _has_fused_kernels(weight):
        return weight
    channels, _, side, _ = weight.shape
    padding = (side // 2, side // 2)
    reorder = torch.ops.mkldnn._reorder_convolution_weight  # noqa: SLF001
    return _kept(weight, lambda values: reorder(values, padding, (1, 1), (1, 1), channels, ()))


def packed_linear(weight: Tensor) -> Tensor | None:
    """A linear weight as oneDNN's kernels read it; None for a large one, of which nobody wants copies."""
    if weight.numel() > _SMALL_WEIGHT or not _has_fused_kernels(weight):
        return None
    reorder = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001
    return _kept(weight, lambda values: reorder(values, None))


def _kept(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """What `pack` makes of a weight, remembered while the weight lives and has the same values.

    To pack those of a network takes longer than a picture gains by it, to compare them a tenth of that.
    """
    known = _packed.get(weight)
    if known is None or known[0].dtype is not weight.dtype or not torch.equal(known[0], weight):
        values = weight.detach().clone()
        known = _packed[weight] = values, pack(values)
    return known[1]


def energy(x: Tensor) -> Tensor:
    """L2 norm over height and width in fp32, (b, h, w, c) -> (b, 1, 1, c).

    PyTorch's own norm over outer axes is not vectorised on a CPU and takes longer than the matrix products
    around it. Pieces that fit the cache are squared and summed in fp32 instead; no fp32 copy of `x` is made.
    How a row is cut depends on its own size only: its sum is the same to the last bit in any company.
    """
    if not x.is_cpu:
        return cast(Tensor, torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32))
    size, rows = x.numel(), x.shape[0]
    if size > rows * 2 * _CACHED_ELEMENTS:  # up to there, what a copy costs is less than that of many pieces
        total = torch.stack([_sum_of_squares(row.flatten(0, 1)) for row in x])[:, None, None]
    elif size > _CACHED_ELEMENTS:
        total = in_parts(_small_sums_of_squares, cached_rows(size // rows), x)
    else:
        total = _small_sums_of_squares(x)
    return total.sqrt_()


def _small_sums_of_squares(x: Tensor) -> Tensor:
    exact = x if x.dtype is torch.float32 else x.float()
    return exact.square().sum(dim=(1, 2), keepdim=True)


def _sum_of_squares(row: Tensor) -> Tensor:
    """Over the tokens of a large picture, (n, c) -> (c,)."""
    total = row.new_zeros(row.shape[-1], dtype=torch.float32)
    for piece in torch.split(row, cached_rows(row.shape[-1])):
        total += piece.float().square().sum(dim=0)
    return total


def _either(packed: Tensor | None, weight: Tensor) -> Tensor:
    return weight if packed is None else packed


def _has_fused_kernels(x: Tensor) -> bool:
    return is_plain_cpu(x) and x.dtype in _fused_dtypes()


@cache
def _fused_dtypes() -> tuple[torch.dtype, ...]:
    """For which oneDNN is there, and fast on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


@cache
def _has_fast_products() -> bool:
    """In bf16, of batches of matrices, where PyTorch's own attention has none."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()  # noqa: SLF001


@cache
def _onednn_convolution() -> Any:
    return torch.ops.mkldnn._convolution_pointwise.default  # noqa: SLF001


@cache
def _onednn_linear() -> Any:
    """The operator that torch.compile writes into its own CPU code; PyTorch has no public name for it."""
    return torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
