"""Reconstruction: rendered pictures through the semantic encoder, Stage B and Stage A, back to pixels."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cascade.evaluation.measures import decibels, mean_squared_error
from cascade.evaluation.verifier import shows
from cascade.models import Models
from cascade.tasks.autoencode import DecodeSettings, reconstruct_all
from cascade.tasks.generation import run_to_end
from cascade.training.scenes import Picture, held_out_generator, render, sample_scene

_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well Stages B and A reproduce what the encoder saw."""

    count: int
    decibels: float  # peak signal-to-noise ratio of the mean squared error of all pictures
    verified: int  # pictures whose background, number, colours and shapes are right


def reconstruct(models: Models, count: int, seed: int, decoder_steps: int = 10) -> Reconstruction:
    """Encode `count` held-out pictures of 256x256, redraw them and measure the result."""
    rng = held_out_generator(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    errors: list[float] = []
    verified = 0
    for start in range(0, count, _BATCH_SIZE):
        batch = scenes[start : start + _BATCH_SIZE]
        pictures = np.stack([render(scene) for scene in batch])
        drawn = _draw_anew(models, pictures, seed + start, decoder_steps)
        errors += map(mean_squared_error, pictures, drawn)
        verified += sum(map(shows, batch, drawn))
    return Reconstruction(count, decibels(errors), verified)


def _draw_anew(models: Models, pictures: Picture, seed: int, steps: int) -> Picture:
    """Redraw pictures (b, h, w, 3) with Stages B and A from the encoder's codes alone, without text."""
    images = [Image.fromarray(picture) for picture in pictures]
    settings = [DecodeSettings(seed=seed + row, decoder_steps=steps) for row in range(len(images))]
    drawn = run_to_end(reconstruct_all(models, images, settings))
    return np.stack([np.asarray(image) for image in drawn])
