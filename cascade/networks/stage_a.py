"""Stage A, the VQGAN ("Paella") between pixels and 4-channel latents at a quarter of their resolution.

Feature maps are (b, h, w, c) from the first layer to the last, so that layer norms and the MLPs need no
transposes; convolutions see the same memory as a channels-last tensor. Module names are those of the
published checkpoint.
"""

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import StageAConfig
from cascade.networks.fused import layer_norm, linear, linear_gelu

_STRIP_ELEMENTS = 1 << 18  # feature values of a strip, which stays in the cache between operators
_MIN_STRIP_ROWS = 8  # each strip reads two rows more


class StageA(nn.Module):
    """Autoencoder of pictures. `encode` divides latents by the scale factor of the config."""

    def __init__(self, config: StageAConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.hidden_channels // 2**level for level in reversed(range(config.levels))]
        self.in_block = nn.Sequential(_PixelUnshuffle(2), _Pointwise(3 * 4, widths[0]))
        self.down_blocks = nn.Sequential(*_down_blocks(widths, config))
        codebook = nn.Embedding(config.codebook_size, config.latent_channels)
        self.vquantizer = nn.ModuleDict({"codebook": codebook})
        self.up_blocks = nn.Sequential(*_up_blocks(widths[::-1], config))
        self.out_block = nn.Sequential(_Pointwise(widths[0], 3 * 4), _PixelShuffle(2))

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (b, 3, h, w) in 0..1, sides divisible by 2**levels, as latents (b, 4, h/4, w/4)."""
        features = self.down_blocks(self.in_block(pixels.permute(0, 2, 3, 1)))
        latents: Tensor = features.permute(0, 3, 1, 2) / self.config.scale_factor
        return latents

    def decode(self, latents: Tensor, scale_factor: float | None = None) -> Tensor:
        """Decode latents (b, 4, h, w) to pixels (b, 3, 4h, 4w), nominally in 0..1 and not clamped."""
        scale_factor = self.config.scale_factor if scale_factor is None else scale_factor
        features = self.up_blocks((latents * scale_factor).permute(0, 2, 3, 1))
        pixels: Tensor = self.out_block(features).permute(0, 3, 1, 2)
        return pixels


def _down_blocks(widths: list[int], config: StageAConfig) -> list[nn.Module]:
    blocks: list[nn.Module] = [_MixingBlock(widths[0])]
    for narrow, wide in pairwise(widths):
        blocks += [_Downsample(narrow, wide, kernel_size=4, stride=2, padding=1), _MixingBlock(wide)]
    to_latents = _Pointwise(widths[-1], config.latent_channels, bias=False)
    return [*blocks, nn.Sequential(to_latents, _BatchNorm(config.latent_channels))]


def _up_blocks(widths: list[int], config: StageAConfig) -> list[nn.Module]:
    blocks: list[nn.Module] = [nn.Sequential(_Pointwise(config.latent_channels, widths[0]))]
    blocks += [_MixingBlock(widths[0]) for _ in range(config.bottleneck_blocks)]
    for wide, narrow in pairwise(widths):
        blocks += [_Upsample(wide, narrow, kernel_size=4, stride=2, padding=1), _MixingBlock(narrow)]
    return blocks


class _MixingBlock(nn.Module):
    """Depthwise 3x3 convolution, then MLP; the six `gammas` set the norm before and the gain after each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, kernel_size=3, groups=channels)
        self.depthwise = nn.Sequential(nn.Identity(), conv)  # the padding depends on the strip
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, h, w, c) to the same shape; on a CPU without gradients, in strips that fit the cache."""
        batch, height, width, channels = x.shape
        if torch.is_grad_enabled() or not x.is_cpu or x.numel() <= _STRIP_ELEMENTS:
            return self._rows(x, 0, height)
        rows = max(_MIN_STRIP_ROWS, _STRIP_ELEMENTS // (width * channels))
        mixed = torch.empty_like(x)
        for sample in range(batch):
            for top in range(0, height, rows):
                bottom = min(top + rows, height)
                mixed[sample : sample + 1, top:bottom] = self._rows(x[sample : sample + 1], top, bottom)
        return mixed

    def _rows(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """Compute the output for rows top..bottom; the convolution reads one more row on each side."""
        first, last = max(top - 1, 0), min(bottom + 1, x.shape[1])
        gains = 1 + self.gammas
        normed = layer_norm(x[:, first:last], gains[0], self.gammas[1])
        padding = (1, 1, 1 - (top - first), 1 - (last - bottom))  # replicate only at the picture's own edges
        padded = F.pad(normed.permute(0, 3, 1, 2), padding, mode="replicate")
        x = torch.addcmul(x[:, top:bottom], self.depthwise(padded).permute(0, 2, 3, 1), self.gammas[2])
        widen, _, narrow = cast(tuple[nn.Linear, nn.GELU, nn.Linear], tuple(self.channelwise))
        wide = linear_gelu(layer_norm(x, gains[3], self.gammas[4]), widen.weight, widen.bias)
        return torch.addcmul(x, linear(wide, narrow.weight, narrow.bias), self.gammas[5])


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution on (b, h, w, c)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class _Downsample(nn.Conv2d):
    """Convolution on (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Upsample(nn.ConvTranspose2d):
    """Transposed convolution on (b, h, w, c)."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1)


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm on (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _PixelUnshuffle(nn.PixelUnshuffle):
    """Space to channels on (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _PixelShuffle(nn.PixelShuffle):
    """Channels to space on (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
