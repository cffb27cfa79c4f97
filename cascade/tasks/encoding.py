"""Pictures to latents of Stage C: the semantic encoder, on the grid that such a picture is drawn on.

1024x1024 pixels become 16 x 24 x 24 values.
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
    """The latents of each picture, made by itself.

    A picture of another size than `width` x `height` is scaled and cut centrally to it; absent, each side is
    the picture's own, or the nearest that is allowed. Transparent pixels are seen on white.

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
    """A picture of the size at which it would be drawn, RGB, as latents of Stage C, (16, h, w) fp32."""
    effnet = need_encoder(models)
    weight = next(effnet.parameters())
    values = torch.from_numpy(np.array(drawn, dtype=np.uint8)).permute(2, 0, 1)[None]
    pixels = values.to(weight.device, weight.dtype) / 255
    latents: Tensor = effnet(resize_for_encoder(pixels, plan.prior_grid))
    return latents[0].float()


def flattened(image: Image.Image) -> Image.Image:
    """The picture as RGB, turned as its camera says; what is transparent shows white."""
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def need_encoder(models: Models) -> EffNetEncoder:
    """The semantic encoder, or `InvalidSetting` where the checkpoint cannot look at pictures."""
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
    """A picture where a drawing of the planned size will be cut out, at the size at which it is drawn."""
    return fit_to_drawing(cover(image, (plan.width, plan.height)), plan)
