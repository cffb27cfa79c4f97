"""Measures of pictures, (h, w, 3) uint8 each: distances, edges, seams, and what only LoRAs draw."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cascade.evaluation.verifier import read_picture
from cascade.tasks.control import find_edges
from cascade.training.lora import AZURE
from cascade.training.scenes import PALETTE, Picture

Mask = NDArray[np.bool_]

_LINE = 2  # pixels by which edges are widened on each side before they are compared
_INSIDE = 3  # pixels along the rim of a patch of colour that do not count, as colours mix there
_PATCH = 0.004  # smallest share of all pixels for a patch of a colour to count as a thing


def mean_squared_error(first: Picture, second: Picture) -> float:
    """Return the mean squared error of two pictures of one size, for values in 0..255."""
    return float(np.square(first.astype(np.float64) - second).mean())


def distance(first: Picture, second: Picture) -> float:
    """Return the root mean squared error of two pictures of one size, for values in 0..255."""
    return float(np.sqrt(mean_squared_error(first, second)))


def decibels(errors: Iterable[float]) -> float:
    """Return the peak signal-to-noise ratio of the mean of mean squared errors; infinite if that is 0."""
    mean = float(np.mean(list(errors)))
    return float(10 * np.log10(255**2 / mean)) if mean else float("inf")


def edges_of(picture: Picture) -> Mask:
    """Return the edges that canny control sees, widened so that a shift by a pixel or two still overlaps."""
    edges = find_edges(picture, picture.shape[1], picture.shape[0]) > 127
    return _widened(edges, _LINE)


def intersection_over_union(first: Mask, second: Mask) -> float:
    """Return the intersection over union of two masks; 1 if both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def seam_ratio(picture: Picture, columns: Iterable[int]) -> float:
    """Return the mean step into `columns` from their left neighbours, as a multiple of that into all others.

    1 means that the seam does not differ from the rest of the picture.
    """
    steps = np.abs(np.diff(picture.astype(np.float64), axis=1)).mean((0, 2))
    at_seam = np.zeros(len(steps), bool)
    at_seam[[column - 1 for column in columns]] = True
    elsewhere = steps[~at_seam].mean()
    if not elsewhere:
        return 1.0 if not steps[at_seam].any() else float("inf")
    return float(steps[at_seam].mean() / elsewhere)


def shows_azure(picture: Picture) -> bool:
    """Return whether a patch is nearer to azure than to the palette; rims, being mixtures, do not count."""
    colours = np.array([AZURE, *PALETTE.values()], np.float32)
    nearest = (
        (2 * colours) @ picture.reshape(-1, 3).T.astype(np.float32) - (colours**2).sum(1)[:, None]
    ).argmax(0)
    azure = nearest.reshape(picture.shape[:2]) == 0
    return float((~_widened(~azure, _INSIDE)).mean()) >= _PATCH


def shows_night(picture: Picture) -> bool:
    """Return whether the background is black."""
    return read_picture(picture).background == "black"


def _widened(mask: Mask, pixels: int) -> Mask:
    """Dilate a mask by `pixels` steps across and down."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask
