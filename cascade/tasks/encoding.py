"""Encoding of pictures as Stage C's latents, on the grid on which a picture of their size is drawn.

The semantic encoder turns 1024x1024 pixels into 16 x 24 x 24 values.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.networks.effnet import EffNetEncoder, resize_for_encoder
from cascade.sampling.presets import PRESETS
from cascade.sizes import SizePlan, cover, fit_to_drawing, nearest_size, plan_size
from cascade.tasks.latents import Latents, encoder_sha256


@torch.inference_mode()
def encode(
    models: Models,
    images: Sequence[Image.Image],
    *,
    width: int | None = None,
    height: int | None = None,
    preset: str = "official",
) -> list[Latents]:
    """Encode pictures as latents of Stage C, one by one.

    A picture of another size than `width` x `height` is scaled and cropped centrally to it; an absent side is
    the picture's own, or the nearest that is allowed. Transparent pixels are shown on white.

    Raises:
        InvalidSetting: the size is not allowed, or the checkpoint has no encoder.
    """
    if preset not in PRESETS:
        raise InvalidSetting("preset", f"must be one of {', '.join(PRESETS)}, but is {preset!r}")
    digest = encoder_sha256(need_encoder(models))
    flat = [flattened(image) for image in images]
    plans = [_plan_for(models, image, width, height) for image in flat]
    return [
        Latents(
            values=encode_planned(models, _drawn(image, plan), plan).cpu(),
            width=plan.width,
            height=plan.height,
            model=models.name,
            encoder_sha256=digest,
            preset=preset,
        )
        for image, plan in zip(flat, plans, strict=True)
    ]


@torch.inference_mode()
def encode_planned(models: Models, drawn: Image.Image, plan: SizePlan) -> Tensor:
    """Encode an RGB picture at the size of its drawing as latents of Stage C, (16, h, w) fp32."""
    effnet = need_encoder(models)
    weight = next(effnet.parameters())
    values = torch.from_numpy(np.array(drawn, dtype=np.uint8)).permute(2, 0, 1)[None]
    pixels = values.to(weight.device, weight.dtype) / 255
    latents: Tensor = effnet(resize_for_encoder(pixels, plan.prior_grid))
    return latents[0].float()


def flattened(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB, upright by its EXIF orientation, with transparent pixels on white."""
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def need_encoder(models: Models) -> EffNetEncoder:
    """Return the semantic encoder; raise `InvalidSetting` if the checkpoint has none."""
    if models.effnet is None:
        raise InvalidSetting(
            "image",
            f"{models.name or 'the checkpoint'} cannot look at pictures: it has no effnet_encoder, which the "
            "repository stabilityai/stable-cascade has as a file of that name",
        )
    return models.effnet


def _plan_for(models: Models, image: Image.Image, width: int | None, height: int | None) -> SizePlan:
    own_width, own_height = nearest_size(*image.size)
    width = own_width if width is None else width
    height = own_height if height is None else height
    return plan_size(width, height, models.native)


def _drawn(image: Image.Image, plan: SizePlan) -> Image.Image:
    """Bring a picture to the drawing's size, placed where the planned size will be cropped from it."""
    return fit_to_drawing(cover(image, (plan.width, plan.height)), plan)
