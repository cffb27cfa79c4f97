"""The UNet that Stages B and C share: levels of C, T and A blocks, repeated levels, skips.

A forward pass needs a `Condition`, made once per request by the stage's `prepare`. Up-path lists are
deepest level first, as in the published checkpoints: list index u is level n - 1 - u.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, repeat
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import StageBConfig, StageCConfig
from cascade.networks.adapters import Adapter, Groups, groups_of, in_block
from cascade.networks.blocks import (
    AttnBlock,
    AttnWeights,
    Pointwise,
    Product,
    Products,
    ProductWeights,
    ResBlock,
    ResWeights,
    TimestepBlock,
    ratio_embedding,
    ratio_frequencies,
    resize,
)

Block = TypeVar("Block", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Constants:
    """Tensors computed from the weights alone: the same for all requests, until a weight changes.

    At full size they take tens of megabytes; cached conditions share one copy.
    """

    frequencies: Tensor  # of the embedding of noise levels, (ratio channels // 2,)
    time_weight: Tensor  # the mappers of all T blocks, stacked: (sum of 2c, ratio channels)
    time_bias: Tensor  # their biases plus all constants in fp32, (sum of 2c,)
    res_weights: tuple[ResWeights, ...]  # one per ResBlock
    attn_weights: tuple[AttnWeights, ...]  # one per AttnBlock
    product_weights: tuple[ProductWeights, ...]  # one per product between levels and repeats

    @property
    def dtype(self) -> torch.dtype:
        """Type of the network's weights; asking the network takes longer than many operators of a step."""
        return self.time_weight.dtype

    def embedding(self, ratio: Tensor) -> Tensor:
        """Embed noise levels, (b,) -> (b, ratio channels) in fp32."""
        return ratio_embedding(ratio, self.time_weight.shape[1], self.frequencies)

    def map_time(self, embedding: Tensor) -> Tensor:
        """Compute factors and shifts of all T blocks, (b, ratio channels) -> (b, sum of 2c) in fp32."""
        weight, bias = self.time_weight.float(), self.time_bias
        # A CPU sums one row in another order than several: one by one, rows are bit-identical in any batch.
        if embedding.is_cpu and len(embedding) > 1:
            return torch.cat([F.linear(row, weight, bias) for row in torch.split(embedding, 1)])
        return F.linear(embedding, weight, bias)


@dataclass(frozen=True, slots=True)
class Condition:
    """Inputs that guide a network during a request: constant over the steps, one row per picture."""

    keys_values: tuple[Tensor, ...]  # one per A block: (b, 2, heads, tokens, head width)
    constants: Constants  # of the network
    features: Tensor | None = None  # Stage B: the mapped Stage C latent and pixels, (b, h, w, c)
    control: tuple[Tensor, ...] | None = None  # Stage C: the maps that a ControlNet adds, (b, h, w, c) each
    control_at: tuple[int, ...] = ()  # the ResBlocks before which, in running order, repeats counted
    adapters: tuple[Adapter | None, ...] | None = None  # one for each row; None: no row has LoRAs

    @property
    def num_bytes(self) -> int:
        """Size of the rows in bytes, without the shared constants."""
        rows = [*self.keys_values, *(self.control or ())]
        rows += [] if self.features is None else [self.features]
        return sum(each.numel() * each.element_size() for each in rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that each block attends to; rows with different numbers cannot share a call."""
        return self.keys_values[0].shape[-2] if self.keys_values else 0

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Join the rows of several conditions of one network, in order.

        Maps of different ControlNets at one place must have one size: `StageC.fit_control` ensures it.
        """
        first = conditions[0]
        if len(conditions) == 1:
            return first
        features = [condition.features for condition in conditions if condition.features is not None]
        columns = zip(*(condition.keys_values for condition in conditions), strict=True)
        control_at = tuple(sorted({place for condition in conditions for place in condition.control_at}))
        return Condition(
            keys_values=tuple(torch.cat(column) for column in columns),
            constants=first.constants,
            features=torch.cat(features) if features else None,
            control=_joined_control(conditions, control_at) if control_at else None,
            control_at=control_at,
            adapters=_kept([adapter for each in conditions for adapter in each.row_adapters]),
        )

    @property
    def row_adapters(self) -> tuple[Adapter | None, ...]:
        """Adapter of each row; None for a row without LoRAs."""
        return self.adapters or (None,) * len(self.keys_values[0])

    def controlled(self, maps: Sequence[Tensor], places: Sequence[int]) -> "Condition":
        """Return a copy with a ControlNet's maps for all rows: (b or 1, h, w, c) at each of `places`."""
        rows = len(self.keys_values[0])
        control = tuple(each.expand(rows, -1, -1, -1) for each in maps)
        return replace(self, control=control, control_at=tuple(places))

    def __getitem__(self, rows: slice | Tensor | list[int]) -> "Condition":
        """Return the condition of some of the rows."""
        return Condition(
            keys_values=tuple(tensor[rows] for tensor in self.keys_values),
            constants=self.constants,
            features=None if self.features is None else self.features[rows],
            control=None if self.control is None else tuple(each[rows] for each in self.control),
            control_at=self.control_at,
            adapters=None if self.adapters is None else _kept(_chosen(self.adapters, rows)),
        )


def _chosen(adapters: tuple[Adapter | None, ...], rows: slice | Tensor | list[int]) -> list[Adapter | None]:
    if isinstance(rows, slice):
        return list(adapters[rows])
    if isinstance(rows, Tensor) and rows.dtype is torch.bool:
        rows = rows.nonzero()[:, 0]
    return [adapters[int(row)] for row in rows]


def _kept(adapters: Sequence[Adapter | None]) -> tuple[Adapter | None, ...] | None:
    return tuple(adapters) if any(adapter is not None for adapter in adapters) else None


class UNet(nn.Module):
    """Levels down and up between an embedding and a classifier, which the stages define."""

    down_blocks: nn.ModuleList
    up_blocks: nn.ModuleList

    def __init__(self, config: StageBConfig | StageCConfig) -> None:
        super().__init__()
        self.ratio_channels = config.timestep_ratio_embedding_dim
        self.patterns = config.block_types_per_layer
        widths = config.block_out_channels
        depth = len(widths)
        down_counts, up_counts = config.down_num_layers_per_block, config.up_num_layers_per_block

        def level(index: int, count: int, skip_channels: int) -> nn.ModuleList:
            blocks: list[nn.Module] = []
            for group in range(count):
                for place, kind in enumerate(self.patterns[index]):
                    skip = skip_channels if group == place == 0 else 0
                    blocks.append(_block(config, index, kind, skip))
            return nn.ModuleList(blocks)

        self.down_blocks = nn.ModuleList(level(i, down_counts[i], 0) for i in range(depth))
        self.up_blocks = nn.ModuleList(
            level(i, up_counts[depth - 1 - i], widths[i] if i < depth - 1 else 0)
            for i in reversed(range(depth))
        )
        self.down_repeat_mappers = _repeat_mappers(widths, config.down_blocks_repeat_mappers)
        self.up_repeat_mappers = _repeat_mappers(widths[::-1], config.up_blocks_repeat_mappers)
        self.down_downscalers = nn.ModuleList()  # a stage fills these ...
        self.up_upscalers = nn.ModuleList()
        self._products: tuple[Product, ...] = ()  # ... and then finds these
        self._res_blocks = tuple(self._blocks(ResBlock))
        self._time_blocks = tuple(self._blocks(TimestepBlock))
        self._attention_blocks = tuple(self._blocks(AttnBlock))
        self._time_sizes = [block.mapper.out_features for block in self._time_blocks]  # factors and shifts

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the large activations."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def constants(self) -> Constants:
        """Compute the constants, as `prepare` does unless they are passed in."""
        frequencies = ratio_frequencies(self.ratio_channels, self.device)
        zero = ratio_embedding(torch.zeros(1, device=self.device), self.ratio_channels, frequencies)
        return Constants(
            frequencies,
            torch.cat([block.mapper.weight for block in self._time_blocks]),
            torch.cat([block.prepare(zero) for block in self._time_blocks]),
            tuple(block.step_weights() for block in self._res_blocks),
            tuple(block.step_weights() for block in self._attention_blocks),
            tuple(product.step_weights() for product in self._products),
        )

    def _prepare(
        self,
        tokens: Tensor,
        features: Tensor | None = None,
        adapters: Sequence[Adapter | None] | None = None,
        constants: Constants | None = None,
    ) -> Condition:
        """Build a condition from its tokens (b, m, conditioning width) and the other inputs."""
        groups = self._groups(adapters)
        return Condition(
            keys_values=tuple(
                block.prepare(tokens, groups.get(block, ())) for block in self._attention_blocks
            ),
            constants=constants or self.constants(),
            features=features,
            adapters=None if adapters is None else _kept(adapters),
        )

    def _run(self, x: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Run all levels: (b, h, w, c) to the same shape; `ratio` (b,) is the noise level in fp32."""
        inputs = self._step_inputs(ratio, condition)
        skips: list[Tensor] = []
        for downscale, blocks, mappers in zip(
            self.down_downscalers, self.down_blocks, self.down_repeat_mappers, strict=True
        ):
            x = _level(blocks, mappers, downscale(x, inputs.products), None, inputs)
            skips.append(x)
        for index, (blocks, mappers, upscale) in enumerate(
            zip(self.up_blocks, self.up_repeat_mappers, self.up_upscalers, strict=True)
        ):
            skip: Tensor | None = skips.pop()
            if index > 0:
                assert skip is not None
                x = resize(x, *skip.shape[1:3])
            else:
                skip = None
            x = upscale(_level(blocks, mappers, x, skip, inputs), inputs.products)
        return x

    def _step_inputs(self, ratio: Tensor, condition: Condition) -> "_StepInputs":
        """Collect what each block reads at noise levels `ratio` (b,).

        The factors multiply over all blocks, so they are rounded to the weights' type only once.
        """
        groups = self._groups(condition.adapters)
        constants = condition.constants
        embedding = constants.embedding(ratio)
        mapped = constants.map_time(embedding)
        sizes = self._time_sizes
        if any(block in groups for block in self._time_blocks):
            zero = constants.embedding(torch.zeros_like(ratio))
            cut = zip(self._time_blocks, torch.split(mapped, sizes, dim=-1), strict=True)
            mapped = torch.cat(
                [block.adapt(part.clone(), embedding, zero, groups.get(block, ())) for block, part in cut],
                dim=-1,
            )
        halves = [size // 2 for size in sizes for _ in range(2)]
        times = iter(torch.split(mapped.to(constants.dtype)[:, None, None], halves, dim=-1))
        return _StepInputs(
            res_weights=dict(zip(self._res_blocks, constants.res_weights, strict=True)),
            attn_weights=dict(zip(self._attention_blocks, constants.attn_weights, strict=True)),
            products=dict(zip(self._products, constants.product_weights, strict=True)),
            times=dict(zip(self._time_blocks, zip(times, times, strict=True), strict=True)),
            keys_values=dict(zip(self._attention_blocks, condition.keys_values, strict=True)),
            groups=groups,
            control=_control_of_blocks(condition),
        )

    def _groups(self, adapters: Sequence[Adapter | None] | None) -> dict[nn.Module, Groups]:
        """Group the rows' adapters by block; blocks that no adapter changes are absent."""
        if adapters is None:
            return {}
        rows = groups_of(adapters, self.device)
        concerned = {
            block: in_block(rows, f"{part}.{level}.{index}")
            for part, levels in (("down_blocks", self.down_blocks), ("up_blocks", self.up_blocks))
            for level, blocks in enumerate(levels)
            for index, block in enumerate(cast(nn.ModuleList, blocks))
        }
        return {block: groups for block, groups in concerned.items() if groups}

    def _find_products(self) -> tuple[Product, ...]:
        """Return the products between levels and repeats, without those before or after all levels."""
        between = self.down_downscalers, self.up_upscalers, self.down_repeat_mappers, self.up_repeat_mappers
        return tuple(each for part in between for each in part.modules() if isinstance(each, Product))

    def _blocks(self, kind: type[Block]) -> Iterator[Block]:
        for level in (*self.down_blocks, *self.up_blocks):
            for block in cast(nn.ModuleList, level):
                if isinstance(block, kind):
                    yield block


def to_channels_last(x: Tensor, patch_size: int) -> Tensor:
    """Convert (b, c, h, w) to (b, h / p, w / p, c * p * p).

    The result is contiguous: a matrix product sums in another order if a single row is a transposed view.
    """
    planes = F.pixel_unshuffle(x, patch_size) if patch_size > 1 else x
    return planes.permute(0, 2, 3, 1).contiguous()


def to_channels_first(x: Tensor, patch_size: int) -> Tensor:
    """Convert (b, h, w, c * p * p) to (b, c, h * p, w * p)."""
    planes = x.permute(0, 3, 1, 2)
    return F.pixel_shuffle(planes, patch_size) if patch_size > 1 else planes


def _joined_control(conditions: Sequence[Condition], places: Sequence[int]) -> tuple[Tensor, ...]:
    """Join the maps of all rows at each place; rows that have none there get zeros, which change nothing."""
    columns = [
        dict(zip(condition.control_at, condition.control or (), strict=True)) for condition in conditions
    ]
    joined = []
    for place in places:
        like = next(column[place] for column in columns if place in column)
        absent = [like.new_zeros(len(each.keys_values[0]), *like.shape[1:]) for each in conditions]
        pairs = zip(columns, absent, strict=True)
        joined.append(torch.cat([column.get(place, zeros) for column, zeros in pairs]))
    return tuple(joined)


def _control_of_blocks(condition: Condition) -> Iterator[Tensor | None]:
    """Iterate over what is added to the input of each ResBlock, in running order."""
    if condition.control is None:
        return repeat(None)
    maps = dict(zip(condition.control_at, condition.control, strict=True))
    return (maps.get(place) for place in count())


@dataclass(frozen=True, slots=True)
class _StepInputs:
    """Inputs of the blocks at one step, besides the feature map."""

    res_weights: Mapping[nn.Module, ResWeights]
    attn_weights: Mapping[nn.Module, AttnWeights]
    products: Products
    times: Mapping[nn.Module, tuple[Tensor, Tensor]]  # factors and shifts, (b, 1, 1, c)
    keys_values: Mapping[nn.Module, Tensor]
    groups: Mapping[nn.Module, Groups]
    control: Iterator[Tensor | None]  # for each ResBlock, in running order


def _level(
    blocks: nn.Module, mappers: nn.Module, x: Tensor, skip: Tensor | None, inputs: _StepInputs
) -> Tensor:
    """Run a level; repeats run the same weights again with the same skip."""
    for mapper in (*cast(nn.ModuleList, mappers), None):
        for index, block in enumerate(cast(nn.ModuleList, blocks)):
            groups = inputs.groups.get(block, ())
            if isinstance(block, ResBlock):
                if (added := next(inputs.control)) is not None:
                    x = x + resize(added, *x.shape[1:3]).to(x.dtype)
                x = block(x, skip if index == 0 else None, groups, inputs.res_weights[block])
            elif isinstance(block, AttnBlock):
                x = block(x, inputs.keys_values[block], groups, inputs.attn_weights[block])
            else:
                x = block(x, *inputs.times[block])
        if mapper is not None:
            x = mapper(x, inputs.products)
    return x


def _block(config: StageBConfig | StageCConfig, level: int, kind: str, skip_channels: int) -> nn.Module:
    channels = config.block_out_channels[level]
    if kind == "C":
        return ResBlock(channels, skip_channels, config.kernel_size, config.dropout[level])
    if kind == "T":
        conditions = config.timestep_conditioning_type
        return TimestepBlock(channels, config.timestep_ratio_embedding_dim, conditions)
    assert kind == "A"
    heads = config.num_attention_heads[level]
    return AttnBlock(channels, config.conditioning_dim, heads, config.self_attn[level])


def _repeat_mappers(widths: Sequence[int], repeats: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleList(Pointwise(width, width) for _ in range(times - 1))
        for width, times in zip(widths, repeats, strict=True)
    )
