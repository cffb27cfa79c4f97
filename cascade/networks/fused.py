"""Fused linear layers, attention, norms and sums: the operators besides plain products that cost CPU time.

On a CPU without gradients, oneDNN applies the activation or the addition to its results while these are in
the cache, which saves passes over the largest tensors, and, in bf16, before it rounds them. It is also fast
on processors of every make; the library behind PyTorch's own products, MKL, takes twice the time on some. On
Intel's both are equally fast, and MKL starts in 2 microseconds instead of 20: there it makes small products.
Everywhere else these are the plain formulas.
"""

from collections.abc import Callable, Mapping, MutableMapping
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Packed = TypeVar("Packed")

NORM_EPS = 1e-6

_CACHED_ELEMENTS = 1 << 18  # in fp32, half of a 2 MB L2 cache
_SMALL_WEIGHT = 1 << 18  # elements
_FEW_INPUTS, _FEW_THREADS = 512, 4  # beyond, MKL sums in an order that depends on how many rows there are
_LANES = 16  # else MKL's sums could depend on where in memory a row begins
_MANY_TOKENS = 256  # of a picture; for fewer, starting several passes costs more than one operator
_SCORE_BYTES = 4 << 20  # of a piece of attention, which stays in the cache between operators
_MANY_SCORES = 1 << 17  # of a picture
_MANY_QUERIES = 64


class PackedLinear(NamedTuple):
    """A small linear weight, laid out for the libraries that multiply by it."""

    onednn: Tensor
    transposed: Tensor | None  # (inputs, outputs), for MKL; None where oneDNN is to be used

    def for_mkl(self, x: Tensor, most_tokens: int | None = None) -> Tensor | None:
        """Return the transposed weight if MKL should multiply (b, ..., c) with it, else None.

        Not for pictures of a single token, whose sums would depend on the batch.
        """
        if self.transposed is None or not len(x) or torch.get_num_threads() > _FEW_THREADS:
            return None
        tokens = x.numel() // (x.shape[0] * x.shape[-1])
        return self.transposed if 1 < tokens <= (most_tokens or tokens) else None


# By weight: a copy of its values, and their packed form.
_packed_depthwise: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakTensorKeyDictionary()
_packed_linear: MutableMapping[Tensor, tuple[Tensor, PackedLinear]] = WeakTensorKeyDictionary()


def is_plain_cpu(x: Tensor) -> bool:
    """Tell whether `x` is on a CPU without gradients, autocast or torch.compile, which fuses by itself."""
    if not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling()


def cached_rows(num_elements: int) -> int:
    """Return how many rows of `num_elements` each fit into the cache together, at least one."""
    return max(1, _CACHED_ELEMENTS // num_elements)


def in_row_blocks(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """Apply `function`, which treats each row by itself, to `rows` rows at a time; join the results."""
    if tensors[0].shape[0] <= rows:
        return function(*tensors)
    parts = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def linear(x: Tensor, weight: Tensor, bias: Tensor, packed: PackedLinear | None = None) -> Tensor:
    """Apply a linear layer alone; here too, the bias is added without an extra pass.

    Here and below, `packed` is the result of `packed_linear` for the weight.
    """
    if not _has_fused_kernels(x):
        return F.linear(x, weight, bias)
    if packed is not None and (transposed := packed.for_mkl(x)) is not None:
        return torch.addmm(bias, x.flatten(0, -2), transposed).view(*x.shape[:-1], -1)
    product: Tensor = _onednn_linear().default(x, _either(packed, weight), bias, "none", [], "")
    return product


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, packed: PackedLinear | None = None) -> Tensor:
    """Return GELU(linear(x))."""
    if not _has_fused_kernels(x):
        return F.gelu(F.linear(x, weight, bias))
    # For many tokens, the pass over the results that oneDNN saves is worth more than a quick start.
    if packed is not None and (transposed := packed.for_mkl(x, _MANY_TOKENS)) is not None:
        return F.gelu(torch.addmm(bias, x.flatten(0, -2), transposed)).view(*x.shape[:-1], -1)
    product: Tensor = _onednn_linear().default(x, _either(packed, weight), bias, "gelu", [], "none")
    return product


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, packed: PackedLinear | None = None
) -> Tensor:
    """Return residual + linear(x), of the shape of `residual`."""
    if not _has_fused_kernels(x):
        return residual + F.linear(x, weight, bias)
    if packed is not None and (transposed := packed.for_mkl(x)) is not None:
        total = (residual + bias).contiguous()
        total.view(-1, total.shape[-1]).addmm_(x.flatten(0, -2), transposed)
        return total
    added: Tensor = _onednn_linear().binary(x, residual, _either(packed, weight), bias, "add")
    return added


def linear_add_each(x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Return residual + linear(x), where each picture (h, w, c) has its own weight, (b, outputs, c).

    A CPU takes one picture at a time: each is bit-identical in any batch, and stays in the cache. Elsewhere
    all are taken together: fewer kernels, and one compiled code for any number of pictures.
    """
    if residual.is_cpu and not torch.compiler.is_compiling():
        rows = [linear_add(x[n : n + 1], weights[n], bias, residual[n : n + 1]) for n in range(len(x))]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    total = (residual + bias).flatten(1, 2)
    return torch.baddbmm(total, x.flatten(1, 2), weights.transpose(1, 2)).view_as(residual)


def layer_norm(x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Apply LayerNorm over the last axis of (b, ..., c), then `gain` and `bias`, both of one element.

    PyTorch's own operator starts anew for every token. Compared with a few vectorised passes over the map, it
    takes twice the time at a hundred channels and a third more at two thousand. The choice between the two
    depends on the size of one picture, not on the batch.
    """
    rows, *_, channels = x.shape
    # The size is tested last: in a trace the test would become a guard.
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
    """Compute softmax attention of queries (b, heads, n, d) to keys and values (b, heads, m, d).

    PyTorch's fused operator is slow in two cases on a CPU. Its backward pass takes three times as long as the
    plain formula; and in bf16 it multiplies at a fraction of the speed of oneDNN's products. So in bf16 large
    pictures are taken in pieces, whose scores stay in the cache while they are made, normalised and used. The
    operator is kept with AMX, where it is fast, and without bf16 instructions, where products are slow.
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
    """Attend in pieces, cut by the size of a picture alone, so that results are bit-identical in any batch.

    Products are rounded to bf16, with the largest error where scores are largest and count most. So they are
    computed twice, the second time minus the largest of their query, which does not change the softmax.
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
    """Convolve each channel by itself, to the same size: (b, h, w, c) with weight (c, 1, k, k).

    The weight may be the result of `packed_depthwise`.
    """
    planes, channels, padding = x.permute(0, 3, 1, 2), x.shape[-1], weight.shape[-1] // 2
    if weight.is_mkldnn:
        pair = (padding, padding)
        planes = _onednn_convolution()(planes, weight, bias, pair, (1, 1), (1, 1), channels, "none", (), "")
    else:
        planes = F.conv2d(planes, weight, bias, padding=padding, groups=channels)
    return planes.permute(0, 2, 3, 1)


def packed_depthwise(weight: Tensor) -> Tensor:
    """Pack a depthwise weight for oneDNN's kernels: else each call reorders it, a quarter of its time."""
    if not _has_fused_kernels(weight):
        return weight
    channels, _, side, _ = weight.shape
    padding = (side // 2, side // 2)
    reorder = torch.ops.mkldnn._reorder_convolution_weight  # noqa: SLF001
    return _kept(
        _packed_depthwise, weight, lambda values: reorder(values, padding, (1, 1), (1, 1), channels, ())
    )


def packed_linear(weight: Tensor) -> PackedLinear | None:
    """Pack a linear weight for the kernels that multiply; return None if it is too large to be copied."""
    if weight.numel() > _SMALL_WEIGHT or not _has_fused_kernels(weight):
        return None
    return _kept(_packed_linear, weight, _laid_out)


def _laid_out(weight: Tensor) -> PackedLinear:
    is_aligned = all(side % _LANES == 0 for side in weight.shape)
    suits_mkl = weight.dtype is torch.float32 and is_aligned and weight.shape[1] <= _FEW_INPUTS
    suits_mkl = suits_mkl and _has_fast_mkl()
    reorder = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001
    return PackedLinear(reorder(weight, None), weight.t().contiguous() if suits_mkl else None)


def _kept(
    known: MutableMapping[Tensor, tuple[Tensor, Packed]], weight: Tensor, pack: Callable[[Tensor], Packed]
) -> Packed:
    """Return `pack(weight)`, cached while the weight lives and keeps its values.

    Packing the weights of a network takes longer than it saves for one picture, comparing a tenth of that.
    """
    entry = known.get(weight)
    if entry is None or entry[0].dtype is not weight.dtype or not torch.equal(entry[0], weight):
        values = weight.detach().clone()
        entry = known[weight] = values, pack(values)
    return entry[1]


def energy(x: Tensor) -> Tensor:
    """Compute the L2 norm over height and width in fp32, (b, h, w, c) -> (b, 1, 1, c).

    PyTorch's own norm over outer axes is not vectorised on a CPU and takes longer than the matrix products
    around it. Pieces that fit the cache are squared and summed in fp32 instead; no fp32 copy of `x` is made.
    How a row is cut depends on its own size only: its sum is bit-identical in any batch.
    """
    if not x.is_cpu:
        return cast(Tensor, torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32))
    size, rows = x.numel(), x.shape[0]
    if size > rows * 2 * _CACHED_ELEMENTS:  # below, one copy costs less than many pieces
        total = torch.stack([_sum_of_squares(row.flatten(0, 1)) for row in x])[:, None, None]
    elif size > _CACHED_ELEMENTS:
        total = in_row_blocks(_small_sums_of_squares, cached_rows(size // rows), x)
    else:
        total = _small_sums_of_squares(x)
    return total.sqrt_()


def _small_sums_of_squares(x: Tensor) -> Tensor:
    exact = x if x.dtype is torch.float32 else x.float()
    return exact.square().sum(dim=(1, 2), keepdim=True)


def _sum_of_squares(row: Tensor) -> Tensor:
    """Sum the squares over the tokens of a large picture, (n, c) -> (c,)."""
    total = row.new_zeros(row.shape[-1], dtype=torch.float32)
    for piece in torch.split(row, cached_rows(row.shape[-1])):
        total += piece.float().square().sum(dim=0)
    return total


def _either(packed: PackedLinear | None, weight: Tensor) -> Tensor:
    return weight if packed is None else packed.onednn


def _has_fused_kernels(x: Tensor) -> bool:
    return is_plain_cpu(x) and x.dtype in _fused_dtypes()


@cache
def _fused_dtypes() -> tuple[torch.dtype, ...]:
    """Return the types for which oneDNN is available and fast on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


@cache
def _has_fast_products() -> bool:
    """Tell whether bf16 products of batches of matrices are fast where PyTorch's own attention is not."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()  # noqa: SLF001


@cache
def _has_fast_mkl() -> bool:
    """Tell whether MKL is here and made for this processor: on those of other makes it is slow."""
    capabilities: Callable[[], Mapping[str, Any]] = getattr(
        torch.cpu, "get_capabilities", dict
    )  # older torch lacks it
    return torch.backends.mkl.is_available() and "Intel" in capabilities().get("cpu_name", "")  # type: ignore[no-untyped-call]


@cache
def _onednn_convolution() -> Any:
    return torch.ops.mkldnn._convolution_pointwise.default  # noqa: SLF001


@cache
def _onednn_linear() -> Any:
    """Return the operator that torch.compile writes into its CPU code; PyTorch has no public name for it."""
    return torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
