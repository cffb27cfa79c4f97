"""The previewer: a cheap preview of what Stage C is drawing, eight pixels to a latent cell.

Source: the Stable Cascade code release, `modules/previewer.py`. Each batch norm comes after the
activation, so it cannot be folded into the next 3x3 convolution, whose zero padding it does not touch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cascade.config import PreviewerConfig


class Previewer(nn.Module):
    """Decoder of Stage C latents (b, 16, h, w) to pixels (b, 3, 8h, 8w), nominally in 0..1, not clamped."""

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(*_layers(config))

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.blocks(latents.contiguous(memory_format=torch.channels_last))
        return pixels


def _layers(config: PreviewerConfig) -> Iterator[nn.Module]:
    """Yield a 3x3 convolution at each of four resolutions, doublings between them, and 1x1 at both ends."""
    wide, half, quarter = (config.hidden_channels // divisor for divisor in (1, 2, 4))
    yield from _activated(nn.Conv2d(config.in_channels, wide, kernel_size=1))
    yield from _activated(nn.Conv2d(wide, wide, kernel_size=3, padding=1))
    for before, after in ((wide, half), (half, quarter), (quarter, quarter)):
        yield from _activated(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
        yield from _activated(nn.Conv2d(after, after, kernel_size=3, padding=1))
    yield nn.Conv2d(quarter, config.out_channels, kernel_size=1)


def _activated(conv: nn.Conv2d | nn.ConvTranspose2d) -> Iterator[nn.Module]:
    yield conv
    yield nn.GELU()
    yield nn.BatchNorm2d(conv.out_channels)
