"""Codes drawn by a Stage C under training, and the shares of them that show what was asked."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cascade.conditioning import TextEncoder
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Guides, Sample, denoise
from cascade.sampling.noise import PhiloxNoise
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import Caption, caption
from cascade.training.code import grid_size, read_code
from cascade.training.scenes import SQUARE_SIZE, Scene, held_out_generator, sample_scene


def held_out(count: int, seed: int = 3) -> tuple[list[Scene], list[Caption]]:
    """Return square scenes that no training draws, and a caption of each."""
    rng = held_out_generator(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, [caption(scene, rng) for scene in scenes]


def conditions(
    stage: StageC, hidden: Tensor, pooled: Tensor, text: TextEncoder
) -> tuple[Condition, Condition]:
    """Return the conditions of the rows of embeddings, and the one of the empty prompt."""
    empty = text.encode([""])
    image = torch.zeros(len(hidden) + 1, 1, stage.config.clip_image_in_channels, device=stage.device)
    together = stage.prepare(
        torch.cat([hidden, empty.hidden.clone()]), torch.cat([pooled, empty.pooled.clone()]), image
    )
    return together[: len(hidden)], together[len(hidden) :]


@torch.no_grad()
def draw_codes(
    stage: StageC,
    schedule: CosineSchedule,
    guided: Condition,
    unguided: Condition,
    *,
    guidance_scale: float = 4.0,
    steps: int = 20,
    sampler: str = "ddpm",
    size: tuple[int, int] = SQUARE_SIZE,
    first_seed: int = 0,
    count: int,
) -> list[Tensor]:
    """Draw codes (16, gh, gw), on the CPU, one per row of `guided`; `unguided` has one row or as many."""
    preset = PRESETS["official"]

    def row(index: int) -> slice:
        return slice(index, index + 1)

    num_unguided = len(unguided.keys_values[0])
    samples = [
        Sample(
            guides=Guides(
                guided[row(index)], unguided[row(index % num_unguided)] if guidance_scale > 1 else None
            ),
            guidance_scale=guidance_scale,
            levels=preset.levels(schedule, steps),
            sampler=SAMPLERS[sampler],
            preset=preset,
            draw=PhiloxNoise((16, *grid_size(*size)), first_seed + index, "prior"),
            device=stage.device,
        )
        for index in range(count)
    ]
    for _ in denoise(stage, samples, Condition.cat):
        pass
    return [sample.result.cpu() for sample in samples]


def shares_right(
    codes: Sequence[Tensor], scenes: Sequence[Scene], captions: Sequence[Caption]
) -> dict[str, float]:
    """Return the shares of codes that show what was asked, for one and two things."""
    results: dict[str, list[bool]] = {}
    for code, scene, stated in zip(codes, scenes, captions, strict=True):
        read = read_code(code.numpy(), (scene.width, scene.height))
        results.setdefault(f"right_{len(scene.things)}", []).append(shows(read, scene, stated))
    return {name: round(float(np.mean(hits)), 3) for name, hits in sorted(results.items())}


def shows(read: Scene, asked: Scene, stated: Caption) -> bool:
    """Return whether `read` has the things asked for and, where the caption states it, the background."""
    found, wanted = (sorted((thing.shape, thing.colour) for thing in s.things) for s in (read, asked))
    return found == wanted and ("background" not in stated.facts or read.background == asked.background)
