"""The blocks that Stages B and C are made of.

Feature maps are channels-last, (b, h, w, c): LayerNorm and linear layers then work on the last axis and the
depthwise convolution sees a channels-last view, so that nothing is transposed. Modules keep no state; what
is constant during a request (condition keys and values, terms of unused time conditions) is computed once by
`prepare` and passed in at every step. Source: the Stable Cascade code release, `modules/common.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.networks.adapters import Groups, adapt, adapt_thirds
from cascade.networks.fused import (
    NORM_EPS,
    PackedLinear,
    attention,
    cached_rows,
    depthwise,
    energy,
    in_row_blocks,
    is_plain_cpu,
    layer_norm,
    linear,
    linear_add,
    linear_add_each,
    linear_gelu,
    packed_depthwise,
    packed_linear,
)

_IN_PROJ, _OUT_PROJ = "attention.attn.in_proj", "attention.attn.out_proj"  # places of adapters
_LARGE_MAP = 1 << 20  # elements; scaling a smaller one takes less time than preparing weights


def ratio_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """Return the frequencies of `ratio_embedding`, (dim // 2,) in fp32, which are the same at every step.

    The order of operations is the reference's, so that results agree to the last bits.
    """
    half = dim // 2
    decay = math.log(10_000) / (half - 1)
    return torch.arange(half, device=device).float().mul(-decay).exp()


def ratio_embedding(ratio: Tensor, dim: int, frequencies: Tensor | None = None) -> Tensor:
    """Embed the noise level `ratio` in 0..1 as sines, then cosines: (b,) -> (b, dim), in fp32.

    The fastest component turns by one radian per 1e-4 of `ratio`: rounding to bf16 would destroy it.
    """
    frequencies = ratio_frequencies(dim, ratio.device) if frequencies is None else frequencies
    angles = (ratio.float() * 10_000)[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly with aligned corners, in fp32: (b, h, w, c) -> (b, height, width, c)."""
    if x.shape[1:3] == (height, width):
        return x
    planes = x.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=True)
    return planes.permute(0, 2, 3, 1).to(x.dtype)


class ChannelNorm(nn.Module):
    """`layer_norm` as a module, for the places where the published layout has a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x)


class ProductWeights(NamedTuple):
    """The weights that a `Product` reads at every step, laid out once.

    They are not packed: that takes longer than it saves for one picture, and cannot be cached by parameter.
    """

    matrix: Tensor  # (outputs, inputs)
    bias: Tensor


# By each `Product` of a network, for steps without gradients
Products = Mapping[nn.Module, ProductWeights]
NO_PRODUCTS: Products = MappingProxyType({})  # each `Product` lays out its own weights


class Product(nn.Module):
    """A convolution that is a matrix product of tokens or patches; its weight keeps the published shape."""

    def __init__(self, shape: tuple[int, int, int, int], out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight)

    def step_weights(self) -> ProductWeights:
        """Return the weights for `forward` without gradients; call again when a weight has changed."""
        return ProductWeights(self.weight.flatten(1), self.bias)

    def _multiply(self, x: Tensor, products: Products) -> Tensor:
        weights = None if torch.is_grad_enabled() else products.get(self)
        return linear(x, *(self.step_weights() if weights is None else weights))


class Pointwise(Product):
    """A 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__((out_channels, in_channels, 1, 1), out_channels)

    def forward(self, x: Tensor, products: Products = NO_PRODUCTS) -> Tensor:
        return self._multiply(x, products)


class Downsample(Product):
    """A 2x2 convolution of stride 2; an odd last row or column is dropped."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__((out_channels, in_channels, 2, 2), out_channels)

    def step_weights(self) -> ProductWeights:
        """Return the weights with their inputs in the order of a patch."""
        return ProductWeights(self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)

    def forward(self, x: Tensor, products: Products = NO_PRODUCTS) -> Tensor:
        b, h, w, c = x.shape
        patches = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3)
        return self._multiply(patches.reshape(b, h // 2, w // 2, 4 * c), products)


class Upsample(Product):
    """A 2x2 transposed convolution of stride 2; an interleaving copy follows the product."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__((in_channels, out_channels, 2, 2), out_channels)

    def step_weights(self) -> ProductWeights:
        """Return the weights with their outputs in the order of a patch."""
        return ProductWeights(self.weight.permute(2, 3, 1, 0).flatten(0, 2), self.bias.repeat(4))

    def forward(self, x: Tensor, products: Products = NO_PRODUCTS) -> Tensor:
        b, h, w, _ = x.shape
        patches = self._multiply(x, products).view(b, h, w, 2, 2, -1)
        return patches.transpose(2, 3).reshape(b, 2 * h, 2 * w, -1)


class Rescaling(nn.Sequential):
    """The step between two levels: a norm, then a layer that changes width and size; or nothing."""

    def forward(self, x: Tensor, products: Products = NO_PRODUCTS) -> Tensor:
        if not len(self):
            return x
        norm, change = self
        return cast(Tensor, change(norm(x), products))


class GlobalResponseNorm(nn.Module):
    """GRN (Woo et al. 2023, ConvNeXt V2): scales channels by their energy over the whole picture.

    The energy is a reduction over height and width, so a picture cannot be tiled or padded through it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _ResponseNorm.apply(x, self.gamma, self.beta))  # type: ignore[no-untyped-call]


class _ResponseNorm(torch.autograd.Function):
    """GRN as one multiply-add, with a backward pass that reads the large map twice instead of six times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        mean = energy.mean(dim=-1, keepdim=True) + NORM_EPS
        scale = (1 + gamma.float() * (energy / mean)).to(x.dtype)
        ctx.save_for_backward(x, gamma, energy, mean, scale)
        return torch.addcmul(beta.to(x.dtype), x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gamma, energy, mean, scale = ctx.saved_tensors
        grad = grads[0]
        per_channel = (grad * x).sum(dim=(1, 2), keepdim=True, dtype=torch.float32)
        grad_normed = per_channel * gamma.float()  # with respect to energy / mean
        grad_energy = grad_normed / mean
        grad_energy = grad_energy - (grad_normed * energy).mean(dim=-1, keepdim=True) / mean.square()
        pull = (grad_energy / energy.clamp_min(1e-12)).to(x.dtype)
        grad_x = torch.addcmul(grad * scale, x, pull)
        grad_gamma = (per_channel * energy / mean).sum(dim=0, keepdim=True)
        grad_beta = grad.sum(dim=(0, 1, 2), keepdim=True, dtype=torch.float32)
        return grad_x, grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype)


class ResWeights(NamedTuple):
    """The weights that a ResBlock reads at every step, looked up once and packed where that pays.

    The plain weights serve where packed ones cannot be used, and where GRN's factors are multiplied in.
    """

    kernel: Tensor
    kernel_bias: Tensor
    widen: Tensor
    widen_bias: Tensor
    gain: Tensor  # GRN's gamma times the number of channels, in fp32
    narrow: Tensor
    narrow_bias: Tensor  # includes the contribution of GRN's beta
    packed_widen: PackedLinear | None
    packed_narrow: PackedLinear | None


class ResBlock(nn.Module):
    """Block C: depthwise 3x3, norm, per-pixel MLP with GRN; an optional skip joins before the MLP."""

    def __init__(
        self, channels: int, skip_channels: int = 0, kernel_size: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels + skip_channels, 4 * channels),
            nn.GELU(),
            GlobalResponseNorm(4 * channels),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, channels),
        )

    def step_weights(self) -> ResWeights:
        """Return the weights for `forward` without gradients; call again when a weight has changed."""
        widen, _, norm, _, narrow = self._mlp
        return ResWeights(
            kernel=packed_depthwise(self.depthwise.weight),
            kernel_bias=cast(Tensor, self.depthwise.bias),
            widen=widen.weight,
            widen_bias=widen.bias,
            gain=norm.gamma.float() * norm.gamma.numel(),
            narrow=narrow.weight,
            narrow_bias=torch.addmv(narrow.bias, narrow.weight, norm.beta.flatten()),
            packed_widen=packed_linear(widen.weight),
            packed_narrow=packed_linear(narrow.weight),
        )

    def forward(
        self, x: Tensor, skip: Tensor | None = None, groups: Groups = (), weights: ResWeights | None = None
    ) -> Tensor:
        """Map (b, h, w, c) to the same shape; `skip` is (b, h, w, skip channels)."""
        if self.training or torch.is_grad_enabled():
            weights = None  # run the modules themselves
        elif weights is None:
            weights = self.step_weights()
        if weights is not None and is_plain_cpu(x):
            hidden = depthwise(x, weights.kernel, weights.kernel_bias)
        else:
            hidden = depthwise(x, self.depthwise.weight, self.depthwise.bias)
        hidden = layer_norm(hidden)
        if skip is not None:
            hidden = torch.cat([hidden, skip], dim=-1)
        if groups:
            return self._in_groups(x, hidden, groups, weights)
        return self._with_mlp(x, hidden, weights)

    @property
    def _mlp(self) -> tuple[nn.Linear, nn.GELU, GlobalResponseNorm, nn.Dropout, nn.Linear]:
        return cast(
            tuple[nn.Linear, nn.GELU, GlobalResponseNorm, nn.Dropout, nn.Linear], tuple(self.channelwise)
        )

    def _with_mlp(self, x: Tensor, hidden: Tensor, weights: ResWeights | None) -> Tensor:
        if weights is None:
            return x + cast(Tensor, self.channelwise(hidden))
        # The wide map between the two layers is by far the largest: on a CPU it should stay in the cache.
        rows = cached_rows(4 * x.numel() // len(x)) if x.is_cpu else len(x)
        if rows >= len(x):
            return _add_mlp(weights, x, hidden)
        return in_row_blocks(partial(_add_mlp, weights), rows, x, hidden)

    def _in_groups(self, x: Tensor, hidden: Tensor, groups: Groups, weights: ResWeights | None) -> Tensor:
        """Return x + MLP(hidden), with each group's changes; other rows are computed as without groups."""
        widen, gelu, norm, dropout, narrow = self._mlp
        done = torch.empty_like(x)
        adapted: set[int] = set()
        for group in groups:
            alone = [replace(group, rows=slice(None))]
            some = hidden[group.rows]
            wide = dropout(norm(gelu(adapt(widen(some), some, widen.weight, alone, "channelwise.0"))))
            done[group.rows] = x[group.rows] + adapt(
                narrow(wide), wide, narrow.weight, alone, "channelwise.4"
            )
            adapted.update(group.numbers(len(x)))
        if others := [row for row in range(len(x)) if row not in adapted]:
            done[others] = self._with_mlp(x[others], hidden[others], weights)
        return done


def _add_mlp(weights: ResWeights, x: Tensor, hidden: Tensor) -> Tensor:
    """Return x + MLP(hidden). GRN's factors scale the map or the next weights, whichever is smaller."""
    _, _, widen, widen_bias, gain, narrow, bias, packed_widen, packed_narrow = weights
    hidden = linear_gelu(hidden, widen, widen_bias, packed_widen)
    norms = energy(hidden)
    total = norms.sum(dim=-1, keepdim=True).add_(norms.shape[-1] * NORM_EPS)
    scale = torch.addcmul(total, norms, gain).div_(total)  # 1 + gamma * norms / mean
    if hidden.dtype is not torch.float32:  # `to` takes time even if it does nothing
        scale = scale.to(hidden.dtype)
    _, height, width, channels = x.shape
    if height * width < 2 * channels or hidden.numel() < _LARGE_MAP:
        return linear_add(hidden.mul_(scale), narrow, bias, x, packed_narrow)
    return linear_add_each(hidden, narrow * scale.flatten(1, 2), bias, x)


class TimestepBlock(nn.Module):
    """Block T: scales and shifts the channels by the noise level.

    The other time conditions of the published models (`sca`, `crp`) are always zero: their terms are
    constants.
    """

    def __init__(self, channels: int, ratio_channels: int, conditions: tuple[str, ...]) -> None:
        super().__init__()
        self.conditions = conditions
        self.mapper = nn.Linear(ratio_channels, 2 * channels)
        for name in conditions:
            setattr(self, f"mapper_{name}", nn.Linear(ratio_channels, 2 * channels))

    def prepare(self, zero_embedding: Tensor) -> Tensor:
        """Return the mapper's bias plus all constants, (2c,) in fp32, including the 1 of the factor 1 + a.

        `zero_embedding`, (1, ratio channels), is the embedding of 0.
        """
        bias = self.mapper.bias.float()
        for name in self.conditions:
            mapper = getattr(self, f"mapper_{name}")
            bias = bias + F.linear(zero_embedding, mapper.weight.float(), mapper.bias.float())[0]
        scale, shift = bias.chunk(2)
        return torch.cat([scale + 1, shift])

    def adapt(self, mapped: Tensor, embedding: Tensor, zero_embedding: Tensor, groups: Groups) -> Tensor:
        """Add the adapters' changes to `mapped`, (b, 2c) in fp32; embeddings are (b, ratio channels)."""
        mapped = adapt(mapped, embedding, self.mapper.weight.float(), groups, "mapper")
        for name in self.conditions:
            weight = getattr(self, f"mapper_{name}").weight.float()
            mapped = adapt(mapped, zero_embedding, weight, groups, f"mapper_{name}")
        return mapped

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Map (b, h, w, c) to the same shape; factors and shifts are (b, 1, 1, c)."""
        return torch.addcmul(shift, x, scale)


class AttentionWeights(nn.Module):
    """Fused query, key and value projections and the output projection, under their published names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)


class AttnWeights(NamedTuple):
    """The weights that an AttnBlock reads at every step, looked up once and packed where that pays."""

    project: Tensor  # to queries and, with self-attention, to keys and values
    project_bias: Tensor
    out: Tensor
    out_bias: Tensor
    packed_project: PackedLinear | None
    packed_out: PackedLinear | None


class AttnBlock(nn.Module):
    """Block A: the picture's tokens attend to themselves and to the condition's tokens."""

    def __init__(
        self, channels: int, condition_channels: int, num_heads: int, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.self_attention = self_attention
        self.attention = nn.ModuleDict({"attn": AttentionWeights(channels)})
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(condition_channels, channels))

    @property
    def weights(self) -> AttentionWeights:
        return cast(AttentionWeights, self.attention["attn"])

    def prepare(self, tokens: Tensor, groups: Groups = ()) -> Tensor:
        """Map the condition (b, m, condition channels) to keys and values (b, 2, heads, m, head width)."""
        weights = self.weights
        channels = weights.out_proj.in_features
        mapped = self.kv_mapper(tokens)
        if groups:
            activate, mapper = cast(tuple[nn.SiLU, nn.Linear], tuple(self.kv_mapper))
            mapped = adapt(mapped, activate(tokens), mapper.weight, groups, "kv_mapper.1")
        keys_values = F.linear(mapped, weights.in_proj_weight[channels:], weights.in_proj_bias[channels:])
        keys_values = adapt_thirds(
            keys_values, mapped, weights.in_proj_weight[channels:], groups, _IN_PROJ, 1, 3
        )
        return self._split_heads(keys_values, parts=2)

    def step_weights(self) -> AttnWeights:
        """Return the weights for `forward` without gradients; call again when a weight has changed."""
        weights = self.weights
        project: Tensor = weights.in_proj_weight
        bias: Tensor = weights.in_proj_bias
        out = weights.out_proj
        if not self.self_attention:
            project, bias = project[: out.in_features], bias[: out.in_features]
        # A slice is a new tensor every time, so its packed form could not be cached.
        packed_project = packed_linear(project) if self.self_attention else None
        return AttnWeights(project, bias, out.weight, out.bias, packed_project, packed_linear(out.weight))

    def forward(
        self, x: Tensor, condition: Tensor, groups: Groups = (), weights: AttnWeights | None = None
    ) -> Tensor:
        """Map (b, h, w, c) to the same shape; `condition` is the result of `prepare`."""
        if weights is None or self.training or torch.is_grad_enabled():
            weights = self.step_weights()
        b, h, w, channels = x.shape
        normed = layer_norm(x).view(b, h * w, channels)
        projected = linear(normed, weights.project, weights.project_bias, weights.packed_project)
        if self.self_attention:
            projected = adapt(projected, normed, weights.project, groups, _IN_PROJ)
            split = self._split_heads(projected, parts=3)
            condition = torch.cat([split[:, 1:], condition], dim=3)
        else:
            projected = adapt_thirds(projected, normed, weights.project, groups, _IN_PROJ, 0, 1)
            split = self._split_heads(projected, parts=1)
        attended = attention(split[:, 0], *condition.unbind(1)).transpose(1, 2).reshape(b, h, w, channels)
        added = linear_add(attended, weights.out, weights.out_bias, x, weights.packed_out)
        return adapt(added, attended, weights.out, groups, _OUT_PROJ)

    def _split_heads(self, projected: Tensor, parts: int) -> Tensor:
        """Reshape (b, n, parts * channels) to (b, parts, heads, n, head width)."""
        b, n, _ = projected.shape
        return projected.view(b, n, parts, self.num_heads, -1).permute(0, 2, 3, 1, 4)
