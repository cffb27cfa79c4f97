"""An initialisation at which small UNets already denoise: their layers compute (x - alpha * x0) / sigma.

Large networks learn by themselves to pass the input on to the output at high noise. Small ones fail there:
the first sampling step divides by alpha, so an error of a tenth of a percent in the input's path spoils the
picture. Here the first level carries three groups of channels through the network: the input, untouched; a
prediction of the clean latent, which is all that is left to learn; and a constant pair +K, -K, so large
that the layer norms become linear. The last time block scales the prediction by -alpha and the pair by
sigma, and the final norm divides by the pair. The idea is the preconditioning of Karras et al. 2022
(equation 7), expressed in weights of the unchanged architecture.
"""

import math
from dataclasses import dataclass, field
from typing import Self, cast

import torch
from torch import Tensor, nn

from cascade.config import StageBConfig, StageCConfig
from cascade.networks.blocks import AttnBlock, Downsample, Pointwise, ResBlock, TimestepBlock, ratio_embedding
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.networks.unet import UNet
from cascade.sampling.schedule import CosineSchedule

_PAIR_IN = 40.0  # K in the embedding of the input; large compared with the input's norm of about 4


@dataclass(slots=True)
class Channels:
    """The groups of channels of the first level, and masks of the trainable entries of each parameter."""

    width: int
    size: int  # values of a token
    trainable: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: StageBConfig | StageCConfig) -> Self:
        """Return the groups of a network's first level."""
        return cls(config.block_out_channels[0], config.in_channels * config.patch_size**2)

    @property
    def pair(self) -> list[int]:
        """Channels of the constants +K and -K."""
        return [0, 1]

    @property
    def input(self) -> list[int]:
        """Channels of the input, one more than a token has values."""
        return list(range(2, 3 + self.size))

    @property
    def prediction(self) -> list[int]:
        """Channels of the predicted clean latent, as many."""
        return list(range(3 + self.size, 4 + 2 * self.size))

    @property
    def basis(self) -> Tensor:
        """Orthonormal map of a token's values into one group, (size + 1, size); its columns sum to 0."""
        rows = torch.zeros(self.size, self.size + 1)
        for k in range(1, self.size + 1):
            rows[k - 1, :k] = 1 / math.sqrt(k * (k + 1))
            rows[k - 1, k] = -k / math.sqrt(k * (k + 1))
        return rows.T

    @property
    def input_gain(self) -> float:
        """Factor by which the norm of the embedding shrinks the input."""
        return math.sqrt((2 * _PAIR_IN**2 + self.size) / self.width)


def precondition(unet: StageB | StageC, schedule: CosineSchedule, pair: float) -> dict[str, Tensor]:
    """Initialise `unet` in place as described above; `pair` is K at the output.

    Returns masks by parameter name, 1 where training may change an entry: what carries the input is frozen.
    """
    config = unet.config
    channels = Channels.of(config)
    _plain_start(unet)
    builder = _Builder(unet, channels, pair)
    builder.embed()
    builder.carry_down()
    builder.carry_up(schedule)
    builder.read_out()
    return channels.trainable


def _plain_start(unet: UNet) -> None:
    """Initialise with Xavier weights, zeroed time blocks and small residual branches."""
    blocks = [block for block in unet.modules() if isinstance(block, ResBlock)]
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in unet.modules():
        if isinstance(module, TimestepBlock):
            for mapper in module.children():
                nn.init.zeros_(cast(nn.Linear, mapper).weight)
    for block in blocks:
        nn.init.normal_(block.depthwise.weight, std=0.1)
        nn.init.zeros_(cast(Tensor, block.depthwise.bias))
        with torch.no_grad():
            block.depthwise.weight[:, :, 1, 1] += 1
            cast(nn.Linear, block.channelwise[4]).weight.mul_(len(blocks) ** -0.5)


class _Builder:
    """Writes the weights that carry the input into the first level and freezes them."""

    def __init__(self, unet: StageB | StageC, channels: Channels, pair: float) -> None:
        self.unet = unet
        self.channels = channels
        self.pair = pair
        self.names = {id(parameter): name for name, parameter in unet.named_parameters()}
        self.carriers = channels.pair + channels.input

    @torch.no_grad()
    def embed(self) -> None:
        embedding = cast(Pointwise, self.unet.embedding[1])
        embedding.weight.zero_()
        embedding.weight[self.channels.input, :, 0, 0] = self.channels.basis
        embedding.bias.zero_()
        embedding.bias[self.channels.pair] = torch.tensor([_PAIR_IN, -_PAIR_IN])
        for parameter in embedding.parameters():
            self.freeze(parameter)
        if isinstance(self.unet, StageB):
            # Steep and scattered units: shapes have edges, which nearly linear ones are slow to find.
            first = cast(Pointwise, self.unet.effnet_mapper[0])
            first.weight.mul_(4)
            nn.init.normal_(first.bias, std=1.5)
            self.silence_rows(cast(Pointwise, self.unet.effnet_mapper[2]))
            for parameter in self.unet.pixels_mapper.parameters():
                parameter.zero_()
                self.freeze(parameter)
            for parameter in self.unet.clip_mapper.parameters():  # the code says everything
                parameter.zero_()
                self.freeze(parameter)

    @torch.no_grad()
    def carry_down(self) -> None:
        gain = self.channels.input_gain
        for block in self.level("down"):
            self.carry(block)
            if isinstance(block, ResBlock):
                block.depthwise.weight[self.channels.input] *= gain
        if len(self.unet.down_blocks) > 1:
            down = cast(nn.Sequential, self.unet.down_downscalers[1])[1]
            layer = down if isinstance(down, Downsample) else cast(nn.ModuleList, down.blocks)[0]
            weight = cast(Tensor, layer.weight)
            weight[:, self.channels.input] *= gain
            weight[:, self.channels.pair] = 0

    @torch.no_grad()
    def carry_up(self, schedule: CosineSchedule) -> None:
        if len(self.unet.up_blocks) > 1:
            self.silence_upscaler(cast(nn.Sequential, self.unet.up_upscalers[-2])[1])
        level = self.level("up")
        first = level[0]
        assert isinstance(first, ResBlock)
        for block in level:
            self.carry(block)
            if isinstance(block, AttnBlock):
                # The pair makes the norm shrink the picture's tokens, but not the condition's.
                gain = self.pair / math.sqrt(self.channels.width / 2)
                block.weights.in_proj_weight.mul_(gain)
                block.weights.in_proj_weight[:, self.channels.pair] = 0
                cast(Tensor, block.kv_mapper[1].weight).div_(gain)
        self.pass_skip(first)
        self.mix(next(block for block in reversed(level) if isinstance(block, TimestepBlock)), schedule)

    @torch.no_grad()
    def pass_skip(self, block: ResBlock) -> None:
        """Let the input through the MLP as gelu(a) - gelu(-a) = a, and add the constant pair."""
        channels, size = self.channels, self.channels.size
        first, norm, last = block.channelwise[0], block.channelwise[2], block.channelwise[4]
        columns = [channels.width + index for index in channels.input]
        passing = channels.input_gain * channels.basis.T
        weight = cast(Tensor, first.weight)
        weight[: 2 * size] = 0
        weight[:size, columns] = passing
        weight[size : 2 * size, columns] = -passing
        self.freeze(weight, slice(0, 2 * size))
        self.freeze(cast(Tensor, first.bias), slice(0, 2 * size))
        for name in ("gamma", "beta"):
            self.freeze(cast(Tensor, getattr(norm, name)), (..., slice(0, 2 * size)))
        out = cast(Tensor, last.weight)
        out[channels.input, :size] = channels.basis
        out[channels.input, size : 2 * size] = -channels.basis
        cast(Tensor, last.bias)[channels.pair] = torch.tensor([self.pair, -self.pair])

    @torch.no_grad()
    def mix(self, block: TimestepBlock, schedule: CosineSchedule) -> None:
        """Scale the prediction by -alpha and the pair by sigma, fitted over all levels; drop the rest."""
        width, channels = self.channels.width, self.channels
        log_snr = schedule.log_snr(torch.linspace(0, 1, 2001, dtype=torch.float64))
        ratios = schedule.ratio(log_snr)
        embedding = ratio_embedding(ratios.float(), self.unet.ratio_channels).double()
        design = torch.cat([embedding, torch.ones(len(embedding), 1, dtype=torch.float64)], dim=1)
        targets = torch.stack([-log_snr.sigmoid().sqrt() - 1, (-log_snr).sigmoid().sqrt() - 1], dim=1)
        ridge = 1e-6 * len(design) * torch.eye(design.shape[1], dtype=torch.float64)
        fitted = torch.linalg.solve(design.T @ design + ridge, design.T @ targets).float()  # (dim + 1, 2)
        for rows, column in ((channels.prediction, 0), (channels.pair, 1)):
            block.mapper.weight[rows] = fitted[:-1, column]
            block.mapper.bias[rows] = fitted[-1, column]
        fixed = self.carriers + channels.prediction
        if self.level("up")[-1] is block:  # only the final norm still reads the other channels
            others = [index for index in range(width) if index not in fixed]
            block.mapper.bias[others] = -1
            fixed = list(range(width))
        for mapper in block.children():
            linear = cast(nn.Linear, mapper)
            for parameter in (linear.weight, linear.bias):
                self.freeze(parameter, fixed + [width + index for index in fixed])

    @torch.no_grad()
    def read_out(self) -> None:
        last = cast(Pointwise, self.unet.clf[1])
        gain = self.pair / math.sqrt(self.channels.width / 2)
        last.weight.zero_()
        last.weight[:, self.channels.input, 0, 0] = gain * self.channels.basis.T
        last.weight[:, self.channels.prediction, 0, 0] = gain * self.channels.basis.T
        last.bias.zero_()
        for parameter in last.parameters():
            self.freeze(parameter)

    def carry(self, block: nn.Module) -> None:
        """Keep a block of the first level from touching the input and the pair."""
        width = self.channels.width
        if isinstance(block, ResBlock):
            for parameter in (block.depthwise.weight, cast(Tensor, block.depthwise.bias)):
                parameter[self.channels.pair] = 0
                self.freeze(parameter, self.channels.pair)
            self.silence_rows(cast(nn.Linear, block.channelwise[4]))
            cast(Tensor, block.channelwise[4].weight)[self.channels.prediction] *= 0.1
        elif isinstance(block, AttnBlock):
            self.silence_rows(block.weights.out_proj)
        elif isinstance(block, TimestepBlock):
            rows = self.carriers + [width + index for index in self.carriers]
            for mapper in block.children():
                self.silence_rows(cast(nn.Linear, mapper), rows)

    def silence_rows(self, layer: nn.Linear | Pointwise, rows: list[int] | None = None) -> None:
        """Zero and freeze `rows` of a layer, by default its outputs to the carrying channels."""
        rows = self.carriers if rows is None else rows
        for parameter in (layer.weight, layer.bias):
            parameter.data[rows] = 0
            self.freeze(parameter, rows)

    def silence_upscaler(self, upscaler: nn.Module) -> None:
        if isinstance(self.unet, StageC):
            self.silence_rows(cast(Pointwise, cast(nn.ModuleList, upscaler.blocks)[1]))
            return
        weight, bias = cast(Tensor, upscaler.weight), cast(Tensor, upscaler.bias)
        weight.data[:, self.carriers] = 0
        bias.data[self.carriers] = 0
        self.freeze(weight, (slice(None), self.carriers))
        self.freeze(bias, self.carriers)

    def freeze(self, parameter: Tensor, where: object = ...) -> None:
        mask = self.channels.trainable.setdefault(self.names[id(parameter)], torch.ones_like(parameter))
        mask[where] = 0  # type: ignore[index]

    def level(self, direction: str) -> list[nn.Module]:
        levels = self.unet.down_blocks if direction == "down" else self.unet.up_blocks
        return list(cast(nn.ModuleList, levels[0 if direction == "down" else -1]))
