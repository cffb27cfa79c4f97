"""Inpainting and outpainting: a part of a picture is drawn anew and the rest stays as it is, to the bit.

While Stages C and B draw, what they know is put back with the noise of the level after every step, so that
the new part fits the old one; then the old pixels are laid over the drawn ones.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.sizes import SizePlan, cover, widen_edges, widen_to_drawing
from cascade.tasks.settings import ImageSettings


@dataclass(frozen=True, slots=True)
class Canvas:
    """What is there before anything is drawn, at the size asked for."""

    image: Image.Image  # RGB
    mask: Image.Image | None  # L: 255 is drawn anew, 0 is kept; None: all is drawn


def canvas_of(settings: ImageSettings, plan: SizePlan) -> Canvas | None:
    """The source at the size asked for: scaled to cover it, or at its anchor with its edges repeated.

    Raises:
        InvalidSetting: the source is larger than the canvas on which it is to stand.
    """
    source = settings.image
    if source is None:
        return None
    image, size = source.convert("RGB"), (plan.width, plan.height)
    mask = _mask_of(settings, source)
    if settings.anchor is None:
        fitted = cover(image, size)
        return Canvas(fitted, None if mask is None else cover(mask, size, Image.Resampling.BOX))
    if image.width > plan.width or image.height > plan.height:
        message = f"needs a canvas no smaller than the image, {image.width}x{image.height}"
        raise InvalidSetting("anchor", f"{message}, but it is {plan.width}x{plan.height}")
    left, top = _corner(settings.anchor, plan.width - image.width, plan.height - image.height)
    whole = Image.new("L", size, 255)
    whole.paste(mask if mask is not None else Image.new("L", image.size, 0), (left, top))
    return Canvas(widen_edges(image, size, left, top), whole)


def free_cells(mask: Image.Image, plan: SizePlan, grid: tuple[int, int], device: torch.device) -> Tensor:
    """The cells of a grid that are drawn anew, (h, w) bool: those of which any pixel is."""
    pixels = torch.from_numpy(np.array(widen_to_drawing(mask, plan)))
    # Windows of unequal size overlap where the sides do not divide: no marked pixel is missed.
    return F.adaptive_max_pool2d(pixels[None].float(), grid)[0].to(device) > 0


def encode_known(models: Models, preset: str, drawn: Image.Image) -> Tensor:
    """Latents of Stage B, (4, h, w) fp32, of a picture of the drawn size, in the scale of a preset."""
    stage_a = models.stage_a
    dtype = next(stage_a.parameters()).dtype
    values = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].to(models.device)
    latents: Tensor = stage_a.encode(values.to(dtype) / 255)[0].float()
    return latents * (stage_a.config.scale_factor / models.scale_factor(preset))


def composite(drawn: Image.Image, canvas: Canvas, feather: int) -> Image.Image:
    """The drawn picture where the mask is white, the canvas where it is black, bit for bit.

    The drawn one fades in over `feather` pixels, all of them inside the mask.
    """
    if canvas.mask is None:
        return drawn
    mask = canvas.mask
    if feather:
        share = np.minimum(_distance_to_kept(np.asarray(mask) > 0) / (feather + 1), 1)
        mask = Image.fromarray((np.asarray(mask) * share).round().astype(np.uint8))
    return Image.composite(drawn, canvas.image, mask)


def _mask_of(settings: ImageSettings, source: Image.Image) -> Image.Image | None:
    """What of the source is drawn anew: what the mask says, and else what is transparent."""
    if settings.mask is not None:
        return settings.mask.convert("L")
    if settings.repaints and source.has_transparency_data:
        return ImageChops.invert(source.convert("RGBA").getchannel("A"))
    return None


def _corner(anchor: str, across: int, down: int) -> tuple[int, int]:
    """Left and top of what stands on a canvas with so much room beside and below it."""
    words = anchor.split("-")
    left = 0 if "left" in words else across if "right" in words else across // 2
    top = 0 if "top" in words else down if "bottom" in words else down // 2
    return left, top


def _distance_to_kept(is_free: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Steps across and down from every pixel to the nearest one that is kept, 0 for those."""
    distance = np.where(is_free, np.float32(sum(is_free.shape)), np.float32(0))
    for axis in (distance, distance.T):  # views: both write into the same numbers
        for ways in (axis, axis[::-1]):
            for row in range(1, len(ways)):
                np.minimum(ways[row], ways[row - 1] + 1, out=ways[row])
    return distance
