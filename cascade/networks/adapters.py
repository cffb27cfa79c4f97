"""LoRAs applied beside the weights: what they add to linear layers, for chosen rows of a batch.

Weights never change, so rows with different adapters, or with none, share a batch. An `Adapter` is only data;
each block receives the part that concerns it. Source: Hu et al. 2021, LoRA; Liu et al. 2024, DoRA.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# The path of a block, and the place of a layer in it.
_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.\d+)\.(.+)")

# Layers that can be adapted by rows: those in a block, and those outside all blocks.
BLOCK_PLACES = (
    "attention.attn.in_proj",
    "attention.attn.out_proj",
    "channelwise.0",
    "channelwise.4",
    "kv_mapper.1",
    "mapper",
    "mapper_sca",
    "mapper_crp",
)
STAGE_PLACES = ("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper")


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is added to a layer's output W x: up(down(x)) and, for DoRA, multiples of W x itself.

    All scales are already included. Tensors may need gradients: they flow to `down` and `up`.
    """

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    rows: Tensor | None = None  # (out,): by output, the multiple of W x that is added
    columns: Tensor | None = None  # (parts, in): the same by input, for equal parts of the outputs

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what is added: (..., in) -> (..., out); `weight` (out, in) is the layer's own."""
        dtype = x.dtype  # differs from the adapter's in a retry in fp32 and under autocast
        total = F.linear(F.linear(x, self.down.to(dtype)), self.up.to(dtype))
        if self.rows is not None:
            total = total + self.rows.to(dtype) * F.linear(x, weight)
        if self.columns is not None:
            parts = zip(self.columns.to(dtype), weight.chunk(len(self.columns)), strict=True)
            total = total + torch.cat([F.linear(x * share, part) for share, part in parts], dim=-1)
        return total

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Change":
        """Return the change in another type, on another device."""
        rows, columns = (
            None if each is None else each.to(device, dtype) for each in (self.rows, self.columns)
        )
        return Change(self.down.to(device, dtype), self.up.to(device, dtype), rows, columns)

    def thirds(self, first: int, last: int) -> "Change":
        """Return the change of thirds `first` to `last` of the outputs: queries, keys, values."""
        size = len(self.up) // 3
        some = slice(first * size, last * size)
        columns = self.columns
        return Change(
            self.down,
            self.up[some],
            None if self.rows is None else self.rows[some],
            columns if columns is None or len(columns) == 1 else columns[first:last],
        )

    def dense(self, weight: Tensor) -> Tensor:
        """Return the full matrix that is added to `weight` (out, in), in fp32."""
        weight = weight.float()
        total = self.up.float() @ self.down.float()
        if self.rows is not None:
            total = total + self.rows.float()[:, None] * weight
        if self.columns is not None:
            parts = zip(self.columns.float(), weight.chunk(len(self.columns)), strict=True)
            total = total + torch.cat([part * share for share, part in parts])
        return total


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """One or several LoRAs with their scales, ready for a row of Stage C and for its prompts.

    Adapters are compared by identity: rows are computed together only if they share one object.
    """

    blocks: Mapping[str, Mapping[str, Change]]  # by block ("down_blocks.0.2", or ""), then place in it
    text: Mapping[str, Change] = field(default_factory=dict)  # by module of the text tower
    words: Mapping[str, Tensor] = field(default_factory=dict)  # learned tokens: embedding rows, (d,)
    rows: Mapping[int, Tensor] = field(default_factory=dict)  # known tokens by id: changed rows, (d,)

    @classmethod
    def of(cls, changes: Mapping[str, Change]) -> "Adapter":
        """Build an adapter from changes by layer path, such as "down_blocks.0.2.attention.attn.in_proj"."""
        blocks: dict[str, dict[str, Change]] = {}
        for path, change in changes.items():
            match = _BLOCK.fullmatch(path)
            block, place = (match[1], match[2]) if match else ("", path)
            blocks.setdefault(block, {})[place] = change
        return cls(blocks)

    @property
    def changes_text(self) -> bool:
        """Whether the adapter changes how prompts are encoded."""
        return bool(self.text or self.words or self.rows)


def can_be_beside(path: str) -> bool:
    """Tell whether a layer of Stage C can be adapted by rows."""
    match = _BLOCK.fullmatch(path)
    return match[2] in BLOCK_PLACES if match else path in STAGE_PLACES


@dataclass(frozen=True, slots=True)
class Adapted:
    """Rows of a batch and the changes that apply to them in one block, by place."""

    rows: slice | list[int]
    changes: Mapping[str, Change]

    def numbers(self, rows: int) -> Sequence[int]:
        """Return the indices of the adapted rows in a batch of `rows`."""
        return range(rows)[self.rows] if isinstance(self.rows, slice) else self.rows

    @property
    def is_everything(self) -> bool:
        """Whether these are all rows of the batch."""
        return self.rows == slice(None)


# The adapted rows of one batch in one block; empty if no row is adapted
Groups: TypeAlias = Sequence[Adapted]


def groups_of(
    adapters: Sequence[Adapter | None] | None, device: torch.device
) -> list[tuple[slice | list[int], Adapter]]:
    """Return the rows of each adapter in a batch.

    A CPU sums one row in another order than several, so there each row is a group of its own: results are
    bit-identical in any batch. With gradients enabled, speed counts more.
    """
    if adapters is None:
        return []
    if device.type == "cpu" and not torch.is_grad_enabled():
        return [(slice(row, row + 1), each) for row, each in enumerate(adapters) if each is not None]
    distinct = dict.fromkeys(each for each in adapters if each is not None)
    if len(distinct) == 1 and None not in adapters:
        return [(slice(None), each) for each in distinct]
    return [([row for row, other in enumerate(adapters) if other is each], each) for each in distinct]


def in_block(groups: Sequence[tuple[slice | list[int], Adapter]], block: str) -> Groups:
    """Return the parts of a batch's adapters that concern one block."""
    return [Adapted(rows, adapter.blocks[block]) for rows, adapter in groups if block in adapter.blocks]


def adapt(product: Tensor, x: Tensor, weight: Tensor, groups: Groups, place: str) -> Tensor:
    """Add the changes of `groups` to `product` = layer(x), (b, ..., out), which may be overwritten."""
    for group in groups:
        if change := group.changes.get(place):
            product = _added(product, x, weight, group, change)
    return product


def adapt_thirds(
    product: Tensor, x: Tensor, weight: Tensor, groups: Groups, place: str, first: int, last: int
) -> Tensor:
    """Do as `adapt` where `product` and `weight` are thirds `first` to `last` of the layer's outputs."""
    for group in groups:
        if change := group.changes.get(place):
            product = _added(product, x, weight, group, change.thirds(first, last))
    return product


def _added(product: Tensor, x: Tensor, weight: Tensor, group: Adapted, change: Change) -> Tensor:
    if group.is_everything:
        return product + change(x, weight)
    product[group.rows] = product[group.rows] + change(x[group.rows], weight)
    return product
