"""Training inputs of ControlNets, made from procedural scenes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal
from zlib import crc32

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cascade.networks.effnet import STRIDE, EffNetEncoder
from cascade.tasks.control import CANNY_THRESHOLDS, find_edges
from cascade.training.code import grid_size, scene_code
from cascade.training.scenes import Scene, Thing, render

Kind = Literal["canny", "inpainting", "super_resolution"]

# Rows of a table -> inputs of the ControlNet for them, (b, c, h, w).
Inputs = Callable[[Tensor], Tensor]

_FAR = 5.0  # pixels: largest displacement of a thing along each axis, and largest change of its radius


class Read:
    """Makes the arrays that a ControlNet's inputs are taken from, in worker processes."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, scenes: list[Scene]) -> Mapping[str, NDArray[np.generic]]:
        """Return arrays with one row per scene: uint8 "edges" (n, 1, h, w) or "pixels" (n, 3, h, w).

        "edges" come with "astray", (n, 16, gh, gw): codes of the scenes with displaced things.
        """
        pictures = [render(scene) for scene in scenes]
        rows, columns = grid_size(scenes[0].width, scenes[0].height)
        size = STRIDE * columns, STRIDE * rows  # width, height
        if self.kind == "canny":
            edges = [canny_edges(picture, size, index % 2 == 0) for index, picture in enumerate(pictures)]
            # Seeded by the scenes, so that the displacement does not depend on the process.
            rng = np.random.default_rng(crc32(np.stack(list(map(scene_code, scenes))).tobytes()))
            moved = [scene_code(astray(scene, rng)) for scene in scenes]
            return {"edges": np.stack(edges)[:, None], "astray": np.stack(moved)}
        if self.kind == "super_resolution":
            size = STRIDE * -(-columns // 2), STRIDE * -(-rows // 2)
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, size[::-1], mode="bilinear", align_corners=False, antialias=True)
        return {"pixels": small.round().clamp(0, 255).to(torch.uint8).numpy()}


def canny_edges(
    picture: NDArray[np.uint8], size: tuple[int, int], at_official_size: bool = True
) -> NDArray[np.uint8]:
    """Return the edges of a picture (h, w, 3) at `size` (width, height), found as the task finds them.

    Without `at_official_size` they are found at `size` itself, where lines are thinner; training uses both.
    """
    if at_official_size:
        return find_edges(picture, *size)
    return np.asarray(cv2.Canny(cv2.resize(picture, size), *CANNY_THRESHOLDS), np.uint8)


def astray(scene: Scene, rng: np.random.Generator) -> Scene:
    """Displace each thing of a scene by a few pixels, and enlarge or shrink it by a few."""

    def moved(thing: Thing) -> Thing:
        right, down, wider = rng.uniform(-_FAR, _FAR, 3).tolist()
        return replace(thing, x=thing.x + right, y=thing.y + down, radius=thing.radius + wider)

    return replace(scene, things=tuple(map(moved, scene.things)))


def control_inputs(kind: Kind, encoder: EffNetEncoder, codes: Tensor, extras: Mapping[str, Tensor]) -> Inputs:
    """Return the function from rows of a table to the ControlNet's inputs, (b, c, h, w)."""
    if kind == "canny":
        return lambda rows: extras["edges"][rows].float() / 255
    pixels = extras["pixels"]
    if kind == "inpainting":
        return lambda rows: masked(pixels[rows].float() / 255, random_masks(rows, pixels))
    with torch.no_grad():
        parts = [encoder(part.float() / 255) for part in torch.split(pixels, 500)]
    latents = F.interpolate(torch.cat(parts), tuple(2 * side for side in parts[0].shape[-2:]), mode="nearest")
    height, width = codes.shape[-2:]
    latents = latents[..., :height, :width].contiguous()
    return lambda rows: latents[rows]


def masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Paint pixels (b, 3, h, w) white where `mask` (b, 1, h, w) is 1, and append the mask as a channel."""
    return torch.cat([torch.where(mask > 0.5, 1.0, pixels), mask], dim=1)


def random_masks(rows: Tensor, pixels: Tensor) -> Tensor:
    """Sample masks (b, 1, h, w): rectangles, ellipses, sides or all of a picture; 1 is to be painted."""
    count, (height, width) = len(rows), pixels.shape[-2:]
    device = rows.device

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, device=device)

    y = torch.linspace(0, 1, height, device=device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=device).view(1, 1, 1, -1)
    dx, dy = (x - draw(0.1, 0.9)).abs() / draw(0.15, 0.5), (y - draw(0.1, 0.9)).abs() / draw(0.15, 0.5)
    kind = draw(0, 1)
    box, blob = torch.maximum(dx, dy) < 1, dx.square() + dy.square() < 1
    along = torch.where(draw(0, 1) < 0.5, x, y)
    flipped = torch.where(draw(0, 1) < 0.5, along, 1 - along)
    side = flipped < draw(0.3, 0.7)
    mask = torch.where(kind < 0.4, box, torch.where(kind < 0.65, blob, side)) | (kind > 0.95)
    outside = draw(0, 1) < 0.15  # inverted, as for outpainting
    return (mask ^ (outside & (kind < 0.65))).float()
