"""Reconstruction: a drawn picture through the semantic encoder, Stage B and Stage A, and back to pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cascade.evaluation.verifier import judge, read_picture
from cascade.models import Models
from cascade.networks.effnet import resize_for_encoder
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Sample, denoise
from cascade.sampling.noise import PhiloxNoise
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import scene_facts
from cascade.training.scenes import Picture, Scene, held_out_generator, render, sample_scene

_BATCH_SIZE = 16
_PRESET = "official"


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well Stages B and A draw what the encoder saw."""

    count: int
    decibels: float  # peak signal to noise ratio of the mean squared error of all pictures
    verified: int  # pictures whose background, number, colours and shapes are right


def reconstruct(models: Models, count: int, seed: int, decoder_steps: int = 10) -> Reconstruction:
    """Encode and draw anew `count` held-out pictures of 256x256."""
    rng = held_out_generator(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    errors: list[float] = []
    verified = 0
    for start in range(0, count, _BATCH_SIZE):
        batch = scenes[start : start + _BATCH_SIZE]
        pictures = np.stack([render(scene) for scene in batch])
        drawn = _draw_anew(models, pictures, seed + start, decoder_steps)
        errors += ((drawn.astype(float) - pictures) ** 2).mean((1, 2, 3)).tolist()
        verified += sum(map(_is_right, batch, drawn))
    return Reconstruction(count, float(10 * np.log10(255**2 / np.mean(errors))), verified)


@torch.inference_mode()
def _draw_anew(models: Models, pictures: Picture, seed: int, steps: int) -> Picture:
    """Pictures (b, h, w, 3) as Stages B and A draw them from the encoder's codes alone, without text."""
    assert models.effnet is not None
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(models.device, models.dtype) / 255
    codes = models.effnet(resize_for_encoder(pixels))
    height, width = pictures.shape[1:3]
    latents = torch.stack(_decode_codes(models, codes, (height // 4, width // 4), seed, steps))
    scaled = latents * models.scale_factor(_PRESET)
    drawn = models.stage_a.decode(scaled.to(models.dtype), scale_factor=1.0)
    values = (drawn.float().clamp(0, 1) * 255).round().to(torch.uint8)
    array: Picture = values.permute(0, 2, 3, 1).cpu().numpy()
    return array


def _decode_codes(
    models: Models, codes: Tensor, size: tuple[int, int], seed: int, steps: int
) -> list[Tensor]:
    """Stage B's latents (4, h, w) of some codes."""
    pooled = models.decoder_text_encoder.encode([""]).pooled
    preset = PRESETS[_PRESET]
    levels = preset.levels(CosineSchedule(models.decoder_schedule), steps)
    samples: list[Sample[Condition]] = [
        Sample(
            condition=models.stage_b.prepare(codes[row : row + 1], pooled, size),
            unguided=None,
            guidance_scale=0.0,
            levels=levels,
            sampler=SAMPLERS["ddpm"],
            preset=preset,
            draw=PhiloxNoise((4, *size), seed + row, "decoder"),
            device=models.device,
        )
        for row in range(len(codes))
    ]
    for _ in denoise(models.stage_b, samples, Condition.cat):
        pass
    return [sample.result for sample in samples]


def _is_right(scene: Scene, picture: Picture) -> bool:
    return judge(scene_facts(scene), read_picture(picture)).is_right
