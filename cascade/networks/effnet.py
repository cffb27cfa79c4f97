"""The semantic encoder: EfficientNet-V2 features and a 1x1 mapper to the latent space of Stage C.

Source: Tan and Le 2021 for the blocks, the Stable Cascade code release, `modules/effnet.py`, for the mapper.
Almost every layer is a convolution, so tensors keep the shape (b, c, h, w) in channels-last memory.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import EffNetConfig, EffNetStage

STRIDE = 32
CELLS_PER_PIXEL = 3 / 128  # Stage C: one cell per 42.67 pixels

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_BACKBONE_EPS = 1e-3


def resize_for_encoder(pixels: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Resize (b, 3, h, w) so that the encoder's output has the grid of Stage C for a picture of that size.

    Bilinear with antialiasing; each side becomes 32 pixels per cell, about 3/4 of what it was. `grid`, height
    and width in cells, is given if the pixels cover more than the picture for which it was planned.
    """
    if grid is None:
        height, width = (math.ceil(side * CELLS_PER_PIXEL) for side in pixels.shape[-2:])
    else:
        height, width = grid
    size = (STRIDE * height, STRIDE * width)
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


class EffNetEncoder(nn.Module):
    """Encoder of pictures as Stage C latents; the mapper's batch norm gives them mean 0 and variance 1."""

    def __init__(self, config: EffNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = effnet_features(3, config.stem_channels, config.stages, config.head_channels)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.head_channels, config.latent_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=False),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (b, 3, h, w) in 0..1 as latents (b, 16, h/32, w/32), sides rounded up."""
        mean, deviation = (pixels.new_tensor(value).view(3, 1, 1) for value in (_MEAN, _DEVIATION))
        normed = ((pixels - mean) / deviation).contiguous(memory_format=torch.channels_last)
        latents: Tensor = self.mapper(self.backbone(normed))
        return latents


def effnet_features(
    in_channels: int, stem_channels: int, stages: Sequence[EffNetStage], head_channels: int
) -> nn.Sequential:
    """Build EfficientNet-V2 without its classifier: (b, in, h, w) -> (b, head, about h / 32, about w / 32).

    With other than 3 input channels the first convolution has no padding, as in the published networks.
    """
    stem = _conv_norm(in_channels, stem_channels, kernel_size=3, stride=2, is_padded=in_channels == 3)
    layers: list[nn.Module] = [stem]
    channels = stem_channels
    for stage in stages:
        layers.append(_stage(channels, stage))
        channels = stage.channels
    layers.append(_conv_norm(channels, head_channels))
    return nn.Sequential(*layers)


def _stage(channels: int, stage: EffNetStage) -> nn.Sequential:
    """Build the blocks of a stage; only the first changes width and resolution."""
    block = {"fused": _FusedBlock, "mbconv": _MBConvBlock}[stage.kind]
    first = block(channels, stage.channels, stage.expand, stage.stride)
    rest = [block(stage.channels, stage.channels, stage.expand, 1) for _ in range(stage.repeats - 1)]
    return nn.Sequential(first, *rest)


class _Residual(nn.Module):
    """A block whose input is added to its output if neither width nor resolution changes."""

    def __init__(self, block: nn.Sequential, is_residual: bool) -> None:
        super().__init__()
        self.block = block
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.block(x)
        return x + changed if self.is_residual else changed


class _FusedBlock(_Residual):
    """FusedMBConv: a 3x3 convolution that widens by `expand` and, unless that is 1, a 1x1 that narrows."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int) -> None:
        wide = in_channels * expand
        if expand == 1:
            layers = [_conv_norm(in_channels, out_channels, kernel_size=3, stride=stride)]
        else:
            widen = _conv_norm(in_channels, wide, kernel_size=3, stride=stride)
            layers = [widen, _conv_norm(wide, out_channels, is_active=False)]
        super().__init__(nn.Sequential(*layers), stride == 1 and in_channels == out_channels)


class _MBConvBlock(_Residual):
    """MBConv: widen, depthwise 3x3, squeeze and excitation, narrow."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int) -> None:
        wide = in_channels * expand
        block = nn.Sequential(
            _conv_norm(in_channels, wide),
            _conv_norm(wide, wide, kernel_size=3, stride=stride, groups=wide),
            _SqueezeExcitation(wide, in_channels // 4),
            _conv_norm(wide, out_channels, is_active=False),
        )
        super().__init__(block, stride == 1 and in_channels == out_channels)


class _SqueezeExcitation(nn.Module):
    """Channel gains that a small MLP computes from the picture's channel means (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.fc2 = nn.Conv2d(squeezed, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        weights: Tensor = self.fc2(F.silu(self.fc1(means))).sigmoid()
        return x * weights


def _conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
    is_active: bool = True,
    is_padded: bool = True,
) -> nn.Sequential:
    """Build a convolution without bias, a batch norm and, if `is_active`, SiLU."""
    padding = (kernel_size - 1) // 2 if is_padded else 0
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out_channels, eps=_BACKBONE_EPS)
    return nn.Sequential(conv, norm, nn.SiLU()) if is_active else nn.Sequential(conv, norm)
