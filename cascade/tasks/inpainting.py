"""Inpainting and outpainting: part of a picture is painted anew, and the rest stays bit-identical.

After every step of Stages C and B, the kept part is restored with the noise of that level, so that the new
part fits it; in the end the kept pixels are pasted over the drawn ones.
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
    """The source picture and its mask at the requested size, before anything is drawn."""

    image: Image.Image  # RGB
    mask: Image.Image | None  # L: 255 is painted, 0 is kept; None: all is painted


def canvas_of(settings: ImageSettings, plan: SizePlan) -> Canvas | None:
    """Bring the source to the requested size: scaled to cover it, or at its anchor with its edges repeated.

    Raises:
        InvalidSetting: the source is larger than the canvas on which it is to be placed.
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
    """Return the cells of a grid that are painted, (h, w) bool: those with any painted pixel."""
    pixels = torch.from_numpy(np.array(widen_to_drawing(mask, plan)))
    # Pooling windows overlap where the sides do not divide evenly: no marked pixel is missed.
    return F.adaptive_max_pool2d(pixels[None].float(), grid)[0].to(device) > 0


def encode_known(models: Models, preset: str, drawn: Image.Image) -> Tensor:
    """Encode a picture of the drawn size as latents of Stage B, (4, h, w) fp32, in the scale of a preset."""
    stage_a = models.stage_a
    dtype = next(stage_a.parameters()).dtype
    values = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].to(models.device)
    latents: Tensor = stage_a.encode(values.to(dtype) / 255)[0].float()
    return latents * (stage_a.config.scale_factor / models.scale_factor(preset))


def composite(drawn: Image.Image, canvas: Canvas, feather: int) -> Image.Image:
    """Paste the drawn picture onto the canvas by its mask; where that is black, all stays bit-identical.

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
    """Return the part of the source to paint: the mask or, without one, the transparent pixels."""
    if settings.mask is not None:
        return settings.mask.convert("L")
    if settings.repaints and source.has_transparency_data:
        return ImageChops.invert(source.convert("RGBA").getchannel("A"))
    return None


def _corner(anchor: str, across: int, down: int) -> tuple[int, int]:
    """Return left and top of a picture on a canvas that is `across` and `down` pixels larger than it."""
    words = anchor.split("-")
    left = 0 if "left" in words else across if "right" in words else across // 2
    top = 0 if "top" in words else down if "bottom" in words else down // 2
    return left, top


def _distance_to_kept(is_free: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the distance (across plus down) of every pixel to the nearest kept one, 0 for kept ones."""
    distance = np.where(is_free, np.float32(sum(is_free.shape)), np.float32(0))
    for axis in (distance, distance.T):  # views: both modify the same array
        for ways in (axis, axis[::-1]):
            for row in range(1, len(ways)):
                np.minimum(ways[row], ways[row - 1] + 1, out=ways[row])
    return distance
