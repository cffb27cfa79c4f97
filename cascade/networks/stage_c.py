"""Stage C, the prior: denoises the 16-channel latent of a picture, 42.67 pixels to a cell.

Source: the Stable Cascade code release, `modules/stage_c.py`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cascade.config import StageCConfig
from cascade.networks.adapters import Adapter, Groups, adapt, groups_of, in_block
from cascade.networks.blocks import NO_PRODUCTS, ChannelNorm, Pointwise, Products, Rescaling, resize
from cascade.networks.fused import layer_norm
from cascade.networks.unet import Condition, Constants, UNet, to_channels_first, to_channels_last


class StageC(UNet):
    """UNet over (b, 16, h, w) latents, guided by text tokens, pooled text and image embeddings."""

    def __init__(self, config: StageCConfig) -> None:
        super().__init__(config)
        self.config = config
        widths, width = config.block_out_channels, config.conditioning_dim
        patch = config.patch_size**2
        self.clip_txt_mapper = nn.Linear(config.clip_text_in_channels, width)
        self.clip_txt_pooled_mapper = nn.Linear(config.clip_text_pooled_in_channels, width * config.clip_seq)
        self.clip_img_mapper = nn.Linear(config.clip_image_in_channels, width * config.clip_seq)
        self.embedding = nn.Sequential(
            nn.Identity(), Pointwise(config.in_channels * patch, widths[0]), ChannelNorm()
        )
        for level in range(len(widths)):
            self.down_downscalers.append(Rescaling(*self._between(level - 1, level, "down")))
        for level in reversed(range(len(widths))):
            self.up_upscalers.append(Rescaling(*self._between(level, level - 1, "up")))
        self._products = self._find_products()
        self.clf = nn.Sequential(ChannelNorm(), Pointwise(widths[0], config.out_channels * patch))

    def _between(self, here: int, there: int, direction: str) -> tuple[nn.Module, ...]:
        """Build the modules from one level to its neighbour; none above the first level."""
        if min(here, there) < 0:
            return ()
        widths, is_switched = self.config.block_out_channels, self.config.switch_level[min(here, there)]
        return ChannelNorm(), _Rescale(widths[here], widths[there], is_switched, direction)

    def prepare(
        self,
        text: Tensor,
        pooled: Tensor,
        image_embeds: Tensor,
        *,
        adapters: Sequence[Adapter | None] | None = None,
        constants: Constants | None = None,
    ) -> Condition:
        """Build the condition of a request.

        Args:
            text: last hidden states of the text tower, (b, n, text width).
            pooled: projected text, (b, 1, pooled width).
            image_embeds: CLIP image embeddings, (b, k, image width); zeros (b, 1, ...) without a picture.
            adapters: one for each row, None for a row without LoRAs.
            constants: the result of `constants`, if it is already known.
        """
        groups = in_block(groups_of(adapters, self.device), "")
        tokens = [
            self._map("clip_txt_mapper", text, groups),
            self._map("clip_txt_pooled_mapper", pooled, groups),
            self._map("clip_img_mapper", image_embeds, groups),
        ]
        return self._prepare(layer_norm(torch.cat(tokens, dim=1)), adapters=adapters, constants=constants)

    @property
    def control_levels(self) -> tuple[int, ...]:
        """Level of each ResBlock in running order, with repeats, as ControlNets count them."""
        config = self.config
        down, up = config.down_num_layers_per_block, config.up_num_layers_per_block[::-1]
        down_repeats, up_repeats = (
            config.down_blocks_repeat_mappers,
            config.up_blocks_repeat_mappers[::-1],
        )
        per_layer = [pattern.count("C") for pattern in config.block_types_per_layer]
        levels = range(len(per_layer))
        runs = [(level, down[level] * down_repeats[level]) for level in levels]
        runs += [(level, up[level] * up_repeats[level]) for level in reversed(levels)]
        return tuple(level for level, layers in runs for _ in range(layers * per_layer[level]))

    def fit_control(
        self, maps: Sequence[Tensor], places: Sequence[int], grid: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Resize a ControlNet's maps to the feature maps that they are added to, for latents of `grid`.

        Maps that do not fit yet are otherwise resized at every step.
        """
        sizes = [(grid[0] // self.config.patch_size, grid[1] // self.config.patch_size)]
        for halved in self.config.switch_level:
            height, width = sizes[-1]
            sizes.append((height // 2, width // 2) if halved else (height, width))
        levels = self.control_levels
        return tuple(
            resize(each.to(self.dtype), *sizes[levels[place]])
            for each, place in zip(maps, places, strict=True)
        )

    def _map(self, name: str, embeddings: Tensor, groups: Groups) -> Tensor:
        """Map embeddings (b, n, width) to tokens of the condition, (b, m, conditioning width)."""
        mapper = cast(nn.Linear, getattr(self, name))
        embeddings = embeddings.to(self.dtype)
        mapped = adapt(mapper(embeddings), embeddings, mapper.weight, groups, name)
        return mapped.view(len(embeddings), -1, self.config.conditioning_dim)

    def forward(self, latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Predict the noise in `latents` (b, 16, h, w) at noise levels `ratio` (b,), 0 clean to 1 noise."""
        latents = latents.to(condition.constants.dtype)
        x = self.embedding(to_channels_last(latents, self.config.patch_size))
        x = self.clf(self._run(x, ratio, condition))
        return to_channels_first(x, self.config.patch_size)


class _Rescale(nn.Module):
    """The step between two levels: a 1x1 convolution and, if enabled, a bilinear resize by 2.

    `blocks` keeps the published numbering: convolution first on the way down, last on the way up.
    """

    def __init__(self, in_channels: int, out_channels: int, enabled: bool, direction: str) -> None:
        super().__init__()
        self.factor = (0.5 if direction == "down" else 2.0) if enabled else 1.0
        pointwise = Pointwise(in_channels, out_channels)
        blocks = [pointwise, nn.Identity()] if direction == "down" else [nn.Identity(), pointwise]
        self.blocks = nn.ModuleList(blocks)
        self.direction = direction

    def forward(self, x: Tensor, products: Products = NO_PRODUCTS) -> Tensor:
        pointwise = self.blocks[0 if self.direction == "down" else 1]
        height, width = (int(side * self.factor) for side in x.shape[1:3])
        if self.direction == "down":
            return resize(cast(Tensor, pointwise(x, products)), height, width)
        return cast(Tensor, pointwise(resize(x, height, width), products))
