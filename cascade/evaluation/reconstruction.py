"""Reconstruction: a drawn picture through the semantic encoder, Stage B and Stage A, and back to pixels."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cascade.evaluation.verifier import judge, read_picture
from cascade.models import Models
from cascade.tasks.autoencode import DecodeSettings, reconstruct_all
from cascade.training.captions import scene_facts
from cascade.training.scenes import Picture, Scene, held_out_generator, render, sample_scene

_BATCH_SIZE = 16


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


def _draw_anew(models: Models, pictures: Picture, seed: int, steps: int) -> Picture:
    """Pictures (b, h, w, 3) as Stages B and A draw them from the encoder's codes alone, without text."""
    images = [Image.fromarray(picture) for picture in pictures]
    settings = [DecodeSettings(seed=seed + row, decoder_steps=steps) for row in range(len(images))]
    run = reconstruct_all(models, images, settings)
    while True:
        try:
            next(run)
        except StopIteration as finished:
            drawn: list[Image.Image] = finished.value
            return np.stack([np.asarray(image) for image in drawn])


def _is_right(scene: Scene, picture: Picture) -> bool:
    return judge(scene_facts(scene), read_picture(picture)).is_right
