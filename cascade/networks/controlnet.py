"""ControlNets: networks from a picture or map to the maps added inside Stage C, run once per request.

Source: the Stable Cascade code release, `modules/controlnet.py`. The backbones are convolutions over
(b, c, h, w); the added maps are channels-last, like Stage C's own. They do not depend on the noise level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import ControlNetConfig
from cascade.networks.effnet import effnet_features

_SLOPE = 0.2  # of the leaky ReLUs


class ControlNet(nn.Module):
    """A backbone and one projection for every injection. Its result is part of a `Condition` of Stage C."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        channels = config.channels
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, kernel_size=1, bias=False),
                nn.LeakyReLU(_SLOPE),
                nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
            )
            for out_channels in config.out_channels
        )

    @property
    def kind(self) -> str:
        """Kind of control: canny, inpainting, super_resolution, identity or custom."""
        return self.config.kind

    @property
    def injections(self) -> tuple[int, ...]:
        """Indices, in running order, of the ResBlocks of Stage C before which the maps are added."""
        return self.config.injections

    @property
    def dtype(self) -> torch.dtype:
        """Type of the projections' weights; batch norms of the backbone may be in fp32."""
        projection = self.projections[0]
        assert isinstance(projection, nn.Sequential)
        weight = projection[0].weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def forward(self, x: Tensor, strength: float = 1.0) -> tuple[Tensor, ...]:
        """Return what the picture or map `x`, (b, in, h, w), adds to Stage C at each of the `injections`.

        Each map is (b, h', w', width of Stage C), scaled by `strength`; h' and w' are about h / 32 and w / 32
        for a picture ("effnet"), else h and w. Stage C resizes the maps.
        """
        features = self.backbone(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        return tuple(strength * each for each in self.project(features))

    def project(self, features: Tensor) -> tuple[Tensor, ...]:
        """Project the backbone's result, (b, c, h', w'), to the maps of `forward` before scaling."""
        return tuple(projection(features).permute(0, 2, 3, 1) for projection in self.projections)


class _ResidualBlock(nn.Module):
    """Norm, GELU and a 3x3 convolution, twice; the norms are affine, over the channels of each cell.

    `blocks` keeps the published numbering.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _ChannelNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            _ChannelNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.blocks(x)
        return x + changed


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def _backbone(config: ControlNetConfig) -> nn.Sequential:
    if config.mode == "effnet":
        return effnet_features(config.in_channels, config.stem_channels, config.stages, config.channels)
    if config.mode == "large":
        wide, narrow = config.hidden_channels
        return nn.Sequential(
            nn.Conv2d(config.in_channels, wide, kernel_size=1),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(wide, narrow, kernel_size=1),
            *(_ResidualBlock(narrow) for _ in range(config.num_blocks)),
            nn.Conv2d(narrow, config.channels, kernel_size=1),
        )
    (wide,) = config.hidden_channels
    return nn.Sequential(
        nn.Conv2d(config.in_channels, wide, kernel_size=3, padding=1),
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(wide, config.channels, kernel_size=3, padding=1),
    )
