"""A small checkpoint that can look at pictures, and pictures to look at."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import ImageEncoder
from cascade.config import ControlNetConfig, EffNetConfig, EffNetStage
from cascade.models import Models
from cascade.networks.adapters import Adapter, Change
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.pipeline import Cascade
from cascade.sizes import NativeSizes
from tests.cascade.small_models import STAGE_C, small_cascade

_EFFNET = EffNetConfig(
    stem_channels=8,
    stages=(
        EffNetStage("fused", 1, 1, 8, 1),
        EffNetStage("fused", 4, 2, 12, 1),
        EffNetStage("mbconv", 4, 2, 16, 1),
        EffNetStage("mbconv", 6, 2, 24, 1),
        EffNetStage("mbconv", 6, 2, 24, 1),
    ),
    head_channels=40,
)


class Glance:
    """A vision tower that sees the mean colour and how varied it is."""

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = [np.asarray(image, np.float32) / 255 for image in images]
        rows = [[*each.mean((0, 1)), each.std()] for each in pixels]
        return torch.tensor(np.array(rows, np.float32))[:, None, : STAGE_C.clip_image_in_channels]


def seeing_cascade(native: NativeSizes | None = None, **changes: Any) -> Cascade:
    """`small_cascade` with a semantic encoder and a vision tower."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        effnet = EffNetEncoder(_EFFNET).eval().requires_grad_(False)
    norm = cast(torch.nn.BatchNorm2d, effnet.mapper[1])
    with torch.no_grad():  # latents of about zero mean and unit variance, as those of trained weights are
        seen = effnet(torch.from_numpy(np.array(scene())).permute(2, 0, 1)[None] / 255)
        norm.running_var = seen.var((0, 2, 3))
        norm.running_mean = seen.mean((0, 2, 3))
    eyes = cast(ImageEncoder, Glance())
    return small_cascade(native, **({"effnet": effnet, "image_encoder": eyes} | changes))


class OneLoRA:
    """A folder with a single LoRA, whatever its name."""

    def __init__(self) -> None:
        width = STAGE_C.block_out_channels[0]
        generator = torch.Generator().manual_seed(0)
        down, up = (torch.randn(shape, generator=generator) for shape in ((2, width), (3 * width, 2)))
        self._adapter = Adapter.of({"down_blocks.0.2.attention.attn.in_proj": Change(down, 0.3 * up)})

    def adapter(self, _: Models, uses: Sequence[tuple[str, float]]) -> Adapter | None:
        return self._adapter if uses else None


def controlnet(in_channels: int) -> ControlNet:
    """A small ControlNet over pictures: canny for 1 channel, inpainting for 4."""
    config = ControlNetConfig(
        mode="effnet",
        in_channels=in_channels,
        channels=24,
        injections=(0, 2),
        out_channels=(STAGE_C.block_out_channels[0],) * 2,
        stem_channels=8,
        stages=_EFFNET.stages,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = ControlNet(config).eval().requires_grad_(False)
    for projection in network.projections:  # random ones say next to nothing
        cast(torch.nn.Conv2d, cast(torch.nn.Sequential, projection)[2]).weight *= 1e4
    return network


def scene(width: int = 128, height: int = 128, seed: int = 0) -> Image.Image:
    """Coloured tiles."""
    rng = np.random.default_rng(seed)
    tiles = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return tiles.resize((width, height), Image.Resampling.BICUBIC)


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """White in the box, else black."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask
