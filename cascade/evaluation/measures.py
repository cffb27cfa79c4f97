"""Measures of pictures, (h, w, 3) uint8 each: distances, edges, seams and what only LoRAs draw."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cascade.evaluation.verifier import read_picture
from cascade.tasks.control import find_edges
from cascade.training.lora import AZURE
from cascade.training.scenes import PALETTE, Picture

Mask = NDArray[np.bool_]

_LINE = 2  # pixels by which an edge is widened to each side before two are laid over each other
_INSIDE = 3  # pixels from the rim of a patch of colour; nearer ones are mixtures
_PATCH = 0.004  # of all pixels: the least patch of a colour that is a thing


def mean_squared_error(first: Picture, second: Picture) -> float:
    """Of two pictures of one size, in steps of 255."""
    return float(np.square(first.astype(np.float64) - second).mean())


def distance(first: Picture, second: Picture) -> float:
    """Root of the mean squared error, in steps of 255."""
    return float(np.sqrt(mean_squared_error(first, second)))


def decibels(errors: Iterable[float]) -> float:
    """Peak signal to noise ratio of the mean of some mean squared errors; infinite where there is none."""
    mean = float(np.mean(list(errors)))
    return float(10 * np.log10(255**2 / mean)) if mean else float("inf")


def edges_of(picture: Picture) -> Mask:
    """Where canny control sees edges, widened so that a shift by a pixel or two still meets them."""
    edges = find_edges(picture, picture.shape[1], picture.shape[0]) > 127
    return _widened(edges, _LINE)


def intersection_over_union(first: Mask, second: Mask) -> float:
    """Of two masks: 1 if they are the same, two empty ones too."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def seam_ratio(picture: Picture, columns: Iterable[int]) -> float:
    """The mean step into each of some columns from its left neighbour, as a multiple of that into all others.

    1 is a seam that differs in nothing from the rest of the picture.
    """
    steps = np.abs(np.diff(picture.astype(np.float64), axis=1)).mean((0, 2))
    at_seam = np.zeros(len(steps), bool)
    at_seam[[column - 1 for column in columns]] = True
    elsewhere = steps[~at_seam].mean()
    if not elsewhere:
        return 1.0 if not steps[at_seam].any() else float("inf")
    return float(steps[at_seam].mean() / elsewhere)


def shows_azure(picture: Picture) -> bool:
    """A patch is nearer to azure than to any colour of the palette; rims, which mix colours, do not count."""
    colours = np.array([AZURE, *PALETTE.values()], np.float32)
    nearest = (
        (2 * colours) @ picture.reshape(-1, 3).T.astype(np.float32) - (colours**2).sum(1)[:, None]
    ).argmax(0)
    azure = nearest.reshape(picture.shape[:2]) == 0
    return float((~_widened(~azure, _INSIDE)).mean()) >= _PATCH


def shows_night(picture: Picture) -> bool:
    """The background is black."""
    return read_picture(picture).background == "black"


def _widened(mask: Mask, pixels: int) -> Mask:
    """The mask and what lies within some steps across and down of it."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask
