"""LoRAs beside the weights: what they add to each linear layer, for some rows of a batch only.

Weights are never changed, so that rows with different adapters, or with none, share a batch. An `Adapter` is
data; the blocks are handed the part that concerns them. Source: Hu et al. 2021, LoRA; Liu et al. 2024, DoRA.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# A block of a level, and the place of a layer in it.
_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.\d+)\.(.+)")

# Layers that can be adapted by rows: in a block, or beside all blocks.
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
    """What is added to the product of a layer: x -> up(down(x)), and for DoRA shares of the product itself.

    All scales are in `up` already. Tensors may need gradients: they flow to `down` and `up`.
    """

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    rows: Tensor | None = None  # (out,): share of the product W x that is added, by output
    columns: Tensor | None = None  # (parts, in): the same by input, for equal parts of the outputs

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) -> (..., out); `weight` (out, in) is the layer's own."""
        dtype = x.dtype  # of a second try in fp32, or of an autocast, it is another than the adapter's
        total = F.linear(F.linear(x, self.down.to(dtype)), self.up.to(dtype))
        if self.rows is not None:
            total = total + self.rows.to(dtype) * F.linear(x, weight)
        if self.columns is not None:
            parts = zip(self.columns.to(dtype), weight.chunk(len(self.columns)), strict=True)
            total = total + torch.cat([F.linear(x * share, part) for share, part in parts], dim=-1)
        return total

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Change":
        """The same in another type, on another device."""
        rows, columns = (
            None if each is None else each.to(device, dtype) for each in (self.rows, self.columns)
        )
        return Change(self.down.to(device, dtype), self.up.to(device, dtype), rows, columns)

    def thirds(self, first: int, last: int) -> "Change":
        """The change of some of the three equal parts of the outputs: queries, keys, values."""
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
        """The whole matrix that is added to `weight` (out, in), in fp32."""
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

    Two are the same only if they are one object: whoever wants rows to be computed together gives one.
    """

    blocks: Mapping[str, Mapping[str, Change]]  # by block ("down_blocks.0.2", or ""), then place in it
    text: Mapping[str, Change] = field(default_factory=dict)  # by module of the text tower
    words: Mapping[str, Tensor] = field(default_factory=dict)  # learned tokens: embedding rows, (d,)
    rows: Mapping[int, Tensor] = field(default_factory=dict)  # known tokens by id: changed rows, (d,)

    @classmethod
    def of(cls, changes: Mapping[str, Change]) -> "Adapter":
        """From changes by the path of their layer: "down_blocks.0.2.attention.attn.in_proj"."""
        blocks: dict[str, dict[str, Change]] = {}
        for path, change in changes.items():
            match = _BLOCK.fullmatch(path)
            block, place = (match[1], match[2]) if match else ("", path)
            blocks.setdefault(block, {})[place] = change
        return cls(blocks)

    @property
    def changes_text(self) -> bool:
        """Whether prompts are encoded in another way with it."""
        return bool(self.text or self.words or self.rows)


def can_be_beside(path: str) -> bool:
    """Whether a layer of Stage C can be adapted by rows."""
    match = _BLOCK.fullmatch(path)
    return match[2] in BLOCK_PLACES if match else path in STAGE_PLACES


@dataclass(frozen=True, slots=True)
class Adapted:
    """Rows of a batch and what changes for them: in one block, by place."""

    rows: slice | list[int]
    changes: Mapping[str, Change]

    def numbers(self, rows: int) -> Sequence[int]:
        """The rows, of so many in the batch."""
        return range(rows)[self.rows] if isinstance(self.rows, slice) else self.rows

    @property
    def is_everything(self) -> bool:
        """All rows of the batch."""
        return self.rows == slice(None)


# Of one batch and one block; empty where no row is adapted
Groups: TypeAlias = Sequence[Adapted]


def groups_of(
    adapters: Sequence[Adapter | None] | None, device: torch.device
) -> list[tuple[slice | list[int], Adapter]]:
    """The rows of each adapter in a batch.

    A CPU adds up one row in another order than several: by themselves they are the same in any company. Where
    gradients are wanted, speed counts more.
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
    """What of the adapters of a batch concerns one block."""
    return [Adapted(rows, adapter.blocks[block]) for rows, adapter in groups if block in adapter.blocks]


def adapt(product: Tensor, x: Tensor, weight: Tensor, groups: Groups, place: str) -> Tensor:
    """`product`, a fresh (b, ..., out) = layer(x), with the changes of the rows in `groups` added."""
    for group in groups:
        if change := group.changes.get(place):
            product = _added(product, x, weight, group, change)
    return product


def adapt_thirds(
    product: Tensor, x: Tensor, weight: Tensor, groups: Groups, place: str, first: int, last: int
) -> Tensor:
    """The same where `product` and `weight` are some thirds of the layer's outputs."""
    for group in groups:
        if change := group.changes.get(place):
            product = _added(product, x, weight, group, change.thirds(first, last))
    return product


def _added(product: Tensor, x: Tensor, weight: Tensor, group: Adapted, change: Change) -> Tensor:
    if group.is_everything:
        return product + change(x, weight)
    product[group.rows] = product[group.rows] + change(x[group.rows], weight)
    return product
