"""ControlNets: from the control picture of a request to the maps that are added inside Stage C.

Each kind reads its picture in its own way; all run once per picture, before the first step. The picture is
scaled and cropped centrally to the shape of the drawing, as all pictures of a request are.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cascade.checkpoints.stored import open_weights
from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.networks.effnet import STRIDE, resize_for_encoder
from cascade.sizes import SizePlan, fit_to_drawing
from cascade.tasks.encoding import flattened
from cascade.tasks.settings import Control, FeatureMap

CANNY_SIDE = 224  # pixels: the official filter finds edges in such a square, whatever the aspect ratio
CANNY_THRESHOLDS = (100, 200)  # for weak and strong edges, on a scale of 0..255


@torch.inference_mode()
def prepare_control(models: Models, control: Control, plan: SizePlan) -> tuple[Tensor, ...]:
    """Compute a ControlNet's maps for one picture: (1, h, w, c) for each of its injections, scaled.

    The maps have the size of Stage C's feature maps to which they are added, so that rows with and without
    them, or of other ControlNets, can share a batch.

    Raises:
        InvalidSetting: that ControlNet is not installed, or it cannot read this kind of input.
    """
    network = models.controlnets.get(control.kind)
    if network is None:
        installed = ", ".join(sorted(models.controlnets)) or "none"
        raise InvalidSetting(
            "control", f"the ControlNet {control.kind} is not installed; installed are: {installed}"
        )
    read = {
        "canny": _edges,
        "inpainting": _masked,
        "super_resolution": _enlarged,
        "identity": _given_map,
    }[control.kind]
    inputs = read(models, control, plan)
    if inputs.shape[1] != network.config.in_channels:
        raise InvalidSetting(
            "control",
            f"the ControlNet {control.kind} reads maps of {network.config.in_channels} channels, "
            f"but gets {inputs.shape[1]}",
        )
    maps = network(inputs, control.scale)
    return models.stage_c.fit_control(maps, network.injections, plan.prior_grid)


def find_edges(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Find the edges of a picture (h, w, 3) like the official filter: values of 0 to 255, (height, width).

    They are found in a square of 224 pixels (bilinear, not antialiased) and resized to `width` x `height`.
    """
    small = cv2.resize(pixels, (CANNY_SIDE, CANNY_SIDE), interpolation=cv2.INTER_LINEAR)
    edges = cv2.Canny(small, *CANNY_THRESHOLDS)
    return np.asarray(cv2.resize(edges, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def read_map(path: Path) -> FeatureMap:
    """Read the only tensor (channels, h, w) of a safetensors file, the input of identity control.

    Raises:
        CheckpointError: the file is not safetensors.
        InvalidSetting: it does not hold exactly one such tensor.
    """
    tensors = list(open_weights(path).values())
    if len(tensors) != 1 or not tensors[0].dtype.is_floating_point:
        raise InvalidSetting("control", f"{path} must hold one tensor of floats, (channels, height, width)")
    return FeatureMap(tensors[0].read(torch.float32))


def _edges(models: Models, control: Control, plan: SizePlan) -> Tensor:
    """Return the edges, (1, 1, h, w) in 0..1, at the size at which the encoder reads pictures."""
    picture = _drawn(_picture(control), plan)
    height, width = _encoder_size(plan)
    if not control.preprocess:
        values = np.asarray(picture.convert("L").resize((width, height), Image.Resampling.BILINEAR))
    else:
        if min(width, height) >= CANNY_SIDE:  # a smaller one would only be blurred
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        values = find_edges(np.asarray(picture), width, height)
    return _to_tensor(values[None], models)


def _masked(models: Models, control: Control, plan: SizePlan) -> Tensor:
    """Return RGB in 0..1, white where it is to be painted, and the mask, 1 there: (1, 4, h, w).

    A pixel at the encoder's size is painted if any pixel of its area is transparent, even partly.
    """
    image = ImageOps.exif_transpose(_picture(control))
    if not image.has_transparency_data:
        raise InvalidSetting("control", "inpainting needs a picture that is transparent where it is painted")
    layer = image.convert("RGBA")
    opaque = _drawn(layer.getchannel("A"), plan)
    pixels = _to_tensor(np.asarray(_drawn(layer.convert("RGB"), plan)).transpose(2, 0, 1), models)
    hidden = _to_tensor((np.asarray(opaque) < 255)[None] * np.uint8(255), models)
    mask = F.adaptive_max_pool2d(hidden, _encoder_size(plan))
    return torch.cat([torch.where(mask > 0, 1.0, resize_for_encoder(pixels, plan.prior_grid)), mask], dim=1)


def _enlarged(models: Models, control: Control, plan: SizePlan) -> Tensor:
    """Return the latents of the picture encoded at half the size, each cell twice per side: (1, 16, h, w)."""
    if models.effnet is None:
        raise InvalidSetting("control", f"the checkpoint {models.name} has no encoder to read the picture")
    picture = np.asarray(_drawn(flattened(_picture(control)), plan)).transpose(2, 0, 1)
    rows, columns = plan.prior_grid
    small = resize_for_encoder(_to_tensor(picture, models), (-(-rows // 2), -(-columns // 2)))
    latents = models.effnet(small.to(next(models.effnet.parameters()).dtype)).float()
    return F.interpolate(latents, scale_factor=2, mode="nearest")[..., :rows, :columns]


def _given_map(models: Models, control: Control, plan: SizePlan) -> Tensor:  # noqa: ARG001
    """Return the request's own map, of any size: (1, c, h, w)."""
    if not isinstance(control.image, FeatureMap):
        raise InvalidSetting("control", "identity reads a map of numbers, (channels, h, w), not a picture")
    return control.image.values[None].to(models.device, torch.float32)


def _picture(control: Control) -> Image.Image:
    if isinstance(control.image, FeatureMap):
        raise InvalidSetting("control", f"{control.kind} reads a picture, not a map of numbers")
    return control.image


def _drawn(image: Image.Image, plan: SizePlan) -> Image.Image:
    """Bring the picture to the size of the drawing; mode "L" is kept, all others become RGB."""
    flat = image if image.mode == "L" else flattened(image)
    if flat.size == (plan.draw_width, plan.draw_height):
        return flat
    size = (plan.width, plan.height)
    fitted = flat if flat.size == size else ImageOps.fit(flat, size, Image.Resampling.LANCZOS)
    return fit_to_drawing(fitted, plan)


def _encoder_size(plan: SizePlan) -> tuple[int, int]:
    """Return height and width of the encoder's input for a picture of this plan."""
    rows, columns = plan.prior_grid
    return STRIDE * rows, STRIDE * columns


def _to_tensor(values: NDArray[np.uint8], models: Models) -> Tensor:
    """Convert (c, h, w) in 0..255 to (1, c, h, w) in 0..1."""
    return torch.from_numpy(np.array(values, order="C"))[None].to(models.device).float() / 255
