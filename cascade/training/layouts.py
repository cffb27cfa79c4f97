"""Layouts of scenes, rendered once and painted in fresh colours to make fresh pictures.

Rendering and shrinking a scene takes longer than training on it. Both are linear in the colours, so the
shares of the small pixels that each thing covers are enough for any colours.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade.training.scenes import (
    Scene,
    Thing,
    coverage,
    sample_colours,
    sample_scene,
    sample_size,
    sample_tint,
    tinted,
)

_MOST_THINGS = 2


@dataclass(frozen=True, slots=True)
class Layouts:
    """Scenes, and the share that each of their things covers of each pixel of a small square picture."""

    scenes: list[Scene]
    covered: Tensor  # (n, 2, side, side) fp16, zeros where a scene has one thing

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, side: int) -> "Layouts":
        """Sample `count` scenes of all sizes, squeezed to `side` pixels as the image processor does it."""
        scenes = [sample_scene(rng, sample_size(rng)) for _ in range(count)]
        covered = np.zeros((count, _MOST_THINGS, side, side), np.float16)
        for row, scene in enumerate(scenes):
            for column, thing in enumerate(scene.things):
                covered[row, column] = _small(coverage(thing, scene.width, scene.height), side)
        return cls(scenes, torch.from_numpy(covered))

    def paint(self, rng: np.random.Generator, count: int) -> tuple[list[Scene], Tensor, Tensor]:
        """Paint `count` of the layouts in fresh colours.

        Returns:
            The scenes, their pixels (count, 3, side, side), integral in 0..255, and the share of each
            pixel that things cover, (count, side, side).
        """
        rows = rng.integers(0, len(self.scenes), count)
        scenes = [recoloured(self.scenes[row], rng) for row in rows]
        colours = np.zeros((count, 1 + _MOST_THINGS, 3), np.float32)
        for place, scene in enumerate(scenes):
            colours[place] = tinted(scene.background, scene.tint)
            for column, thing in enumerate(scene.things):
                colours[place, 1 + column] = tinted(thing.colour, thing.tint)
        covered = self.covered[torch.from_numpy(rows)].float()
        background, things = torch.split(torch.from_numpy(colours), [1, _MOST_THINGS], dim=1)
        added = torch.einsum("bthw,btc->bchw", covered, things - background)
        pixels = (background.transpose(1, 2)[..., None] + added).round().clamp(0, 255)
        return scenes, pixels, covered.sum(1)


def recoloured(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene in other colours and tints."""
    background, *colours = sample_colours(rng, len(scene.things))

    def painted(thing: Thing, colour: str) -> Thing:
        return replace(thing, colour=colour, tint=sample_tint(rng))

    things = tuple(map(painted, scene.things, colours))
    return replace(scene, background=background, things=things, tint=sample_tint(rng))


def _small(shares: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(shares).resize((side, side), Image.Resampling.BICUBIC))
