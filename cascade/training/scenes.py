"""Scenes: the small world that the built-in checkpoint can draw, and its pictures.

A scene is one or two flat shapes on a plain background. It is the source of everything
that the tiny networks learn from: the picture, the caption and the semantic code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (35, 150, 60),
    "blue": (35, 75, 215),
    "yellow": (250, 220, 40),
    "orange": (250, 135, 15),
    "purple": (125, 45, 165),
    "pink": (250, 130, 190),
    "black": (18, 18, 20),
    "white": (245, 245, 245),
    "gray": (130, 130, 132),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross")

# Radius as a share of the picture's short side.
RADII: dict[str, tuple[float, float]] = {
    "small": (0.11, 0.145),
    "medium": (0.165, 0.215),
    "large": (0.25, 0.31),
}
SIZE_WORDS = tuple(RADII)
PLACES = ("centre", "left", "right", "top", "bottom")
Place = Literal["centre", "left", "right", "top", "bottom"]

SQUARE_SIZE = (256, 256)
LONG_SIZES = tuple((long, 256) for long in (320, 384, 448, 512))
NATIVE_SIZES: tuple[tuple[int, int], ...] = (SQUARE_SIZE, *LONG_SIZES, *((h, w) for w, h in LONG_SIZES))

Rgb = tuple[float, float, float]
Picture = NDArray[np.uint8]  # (h, w, 3)

_PAIR_DISTANCE = 0.27  # of the width or height, from the middle
_SINGLE_DISTANCE = 0.25
_MARGIN = 6.0  # pixels between a large shape and the edge of the picture
_JITTER = 3.0  # of 255
_SUPERSAMPLING = 4
_HELD_OUT = 0x48656C64


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape; x, y and the radius are in pixels, `tint` is added to its palette colour."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    tint: Rgb = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a background; what is drawn, and also what is read from pictures and codes."""

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    tint: Rgb = (0.0, 0.0, 0.0)

    @property
    def is_stacked(self) -> bool:
        """Whether the two things stand one above the other, not side by side."""
        first, second = self.things
        return abs(first.y - second.y) / self.height > abs(first.x - second.x) / self.width

    def place(self, thing: Thing) -> Place:
        """Return where a thing stands, judged by the direction in which it is farther from the middle."""
        right, down = thing.x / self.width - 0.5, thing.y / self.height - 0.5
        if max(abs(right), abs(down)) < 0.07:
            return "centre"
        if abs(right) >= abs(down):
            return "left" if right < 0 else "right"
        return "top" if down < 0 else "bottom"

    def size_word(self, thing: Thing) -> str:
        """Return small, medium or large: the range of radii nearest to the thing's."""
        share = thing.radius / min(self.width, self.height)
        return min(RADII, key=lambda word: max(RADII[word][0] - share, share - RADII[word][1]))

    def in_order(self) -> tuple[Thing, ...]:
        """Return the things from left to right, or from top to bottom if they are stacked."""
        if len(self.things) != 2:
            return self.things
        stacked = self.is_stacked
        return tuple(sorted(self.things, key=lambda thing: thing.y if stacked else thing.x))


def held_out_generator(seed: int) -> np.random.Generator:
    """Return a generator for evaluation; training generators, seeded by small numbers, never repeat it."""
    return np.random.default_rng((seed, _HELD_OUT))


def sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Sample width and height of a training picture: 256x256 four times out of five, otherwise elongated."""
    if rng.random() < 0.8:
        return SQUARE_SIZE
    return NATIVE_SIZES[1 + int(rng.integers(len(NATIVE_SIZES) - 1))]


def sample_colours(rng: np.random.Generator, num_things: int) -> tuple[str, ...]:
    """Sample the background's colour and those of the things, all different."""
    return tuple(COLOURS[i] for i in rng.permutation(len(COLOURS))[: num_things + 1])


def sample_scene(rng: np.random.Generator, size: tuple[int, int] = SQUARE_SIZE) -> Scene:
    """Sample a scene: 55 % with one thing, 45 % with two of different colours."""
    num_things = 1 if rng.random() < 0.55 else 2
    background, *colours = sample_colours(rng, num_things)
    short = min(size)
    sizes = SIZE_WORDS if num_things == 1 else SIZE_WORDS[:2]
    radii = [short * float(rng.uniform(*RADII[sizes[int(rng.integers(len(sizes)))]])) for _ in colours]
    centres = [_single_centre(rng, size, radii[0])] if num_things == 1 else _pair_centres(rng, size)
    things = tuple(
        Thing(SHAPES[int(rng.integers(len(SHAPES)))], colour, x, y, radius, sample_tint(rng))
        for colour, (x, y), radius in zip(colours, centres, radii, strict=True)
    )
    return Scene(*size, background, things, sample_tint(rng))


def render(scene: Scene) -> Picture:
    """Draw a scene with edges smoothed by 4x4 samples per pixel."""
    picture = np.empty((scene.height, scene.width, 3), np.float32)
    picture[:] = tinted(scene.background, scene.tint)
    for thing in scene.things:
        rows, columns, coverage = _coverage(thing, scene.width, scene.height)
        box = picture[rows, columns]
        box += coverage[..., None] * (tinted(thing.colour, thing.tint) - box)
    return (picture + 0.5).astype(np.uint8)


def coverage(thing: Thing, width: int, height: int) -> NDArray[np.float32]:
    """Return the share of each pixel of a picture that a thing covers, (h, w)."""
    shares = np.zeros((height, width), np.float32)
    rows, columns, shares_in_box = _coverage(thing, width, height)
    shares[rows, columns] = shares_in_box
    return shares


def _single_centre(rng: np.random.Generator, size: tuple[int, int], radius: float) -> tuple[float, float]:
    width, height = size
    place = "centre" if rng.random() < 0.5 else PLACES[1 + int(rng.integers(4))]
    side = width if place in ("left", "right") else height
    distance = min(_SINGLE_DISTANCE * side, side / 2 - 1.05 * radius - _MARGIN)
    towards = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[place]
    return width / 2 + towards[0] * distance, height / 2 + towards[1] * distance


def _pair_centres(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Sample two centres, side by side or stacked; an elongated picture prefers its long side."""
    width, height = size
    stacked = rng.random() < (0.5 if width == height else 0.35 if width > height else 0.65)
    signs = (-1, 1) if rng.random() < 0.5 else (1, -1)
    if stacked:
        return [(width / 2, height * (0.5 + sign * _PAIR_DISTANCE)) for sign in signs]
    return [(width * (0.5 + sign * _PAIR_DISTANCE), height / 2) for sign in signs]


def sample_tint(rng: np.random.Generator) -> Rgb:
    """Sample a small offset to a palette colour."""
    red, green, blue = rng.uniform(-_JITTER, _JITTER, 3).tolist()
    return red, green, blue


def tinted(colour: str, tint: Rgb) -> NDArray[np.float32]:
    """Return a colour of the palette with its tint, (3,) in 0..255."""
    return np.add(PALETTE[colour], tint).clip(0, 255).astype(np.float32)


def _coverage(thing: Thing, width: int, height: int) -> tuple[slice, slice, NDArray[np.float32]]:
    """Return the box of pixels around a thing and the share of each pixel's 4x4 samples inside the thing.

    Scan lines: in every row of samples the outline is crossed an even number of times. A crossing
    switches all samples to its right on or off, which a running sum over the pixels then adds up.
    """
    reach = 1.1 * thing.radius + 1
    left, right = max(0, int(thing.x - reach)), min(width, int(thing.x + reach) + 1)
    top, bottom = max(0, int(thing.y - reach)), min(height, int(thing.y + reach) + 1)
    sample_rows = top + (np.arange((bottom - top) * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    crossings = OUTLINES[thing.shape]((sample_rows - thing.y) / thing.radius)  # (rows, crossings), sorted
    columns = np.ceil((thing.x + thing.radius * crossings - left) * _SUPERSAMPLING - 0.5)
    columns = columns.clip(0, (right - left) * _SUPERSAMPLING).astype(np.int64)  # first sample switched
    pixel, rest = np.divmod(columns, _SUPERSAMPLING)
    sign = np.resize([1.0, -1.0], columns.shape[1])
    box_width = right - left + 2
    cell = (np.arange(len(columns)) // _SUPERSAMPLING)[:, None] * box_width + pixel
    cells = np.concatenate([cell.ravel(), cell.ravel() + 1])
    switched = np.concatenate([(sign * (_SUPERSAMPLING - rest)).ravel(), (sign * rest).ravel()])
    steps = np.bincount(cells, switched, (bottom - top) * box_width).reshape(bottom - top, box_width)
    coverage = (steps.cumsum(1)[:, : right - left] / _SUPERSAMPLING**2).astype(np.float32)
    return slice(top, bottom), slice(left, right), coverage


Crossings = NDArray[np.float64]  # (rows, crossings): ascending x, infinite where the row crosses less often
Outline = Callable[[NDArray[np.float64]], Crossings]


def _circle(radius: float) -> Outline:
    def crossings(y: NDArray[np.float64]) -> Crossings:
        half = np.sqrt(np.maximum(radius**2 - y**2, 0))
        inside = np.abs(y) < radius
        return np.stack([np.where(inside, -half, np.inf), np.where(inside, half, np.inf)], axis=1)

    return crossings


def _ring(outer: float, inner: float) -> Outline:
    def crossings(y: NDArray[np.float64]) -> Crossings:
        return np.sort(np.concatenate([_circle(outer)(y), _circle(inner)(y)], axis=1), axis=1)

    return crossings


def _polygon(corners: list[tuple[float, float]]) -> Outline:
    start = np.array(corners)
    end = np.roll(start, -1, axis=0)
    slope = (end[:, 0] - start[:, 0]) / np.where(end[:, 1] == start[:, 1], 1, end[:, 1] - start[:, 1])

    def crossings(y: NDArray[np.float64]) -> Crossings:
        row = y[:, None]
        crossed = (start[:, 1] <= row) != (end[:, 1] <= row)
        return np.sort(np.where(crossed, start[:, 0] + (row - start[:, 1]) * slope, np.inf), axis=1)

    return crossings


def _star(outer: float, inner: float, lowered: float) -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, outer, inner)
    return [
        (float(r * np.sin(a)), float(lowered - r * np.cos(a))) for r, a in zip(radii, angles, strict=True)
    ]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turned = [(quarter, 1, 0), (quarter, 0, 1), (quarter, -1, 0), (quarter, 0, -1)]
    return [(cos * x - sin * y, sin * x + cos * y) for corners, cos, sin in turned for x, y in corners]


# Each outline for radius 1 around the origin, y downwards, as the scan line crossings of given rows.
OUTLINES: dict[str, Outline] = {
    "circle": _circle(1.0),
    "ring": _ring(1.0, 0.55),
    "square": _polygon([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
    "triangle": _polygon([(0.0, -0.92), (1.0, 0.84), (-1.0, 0.84)]),
    "diamond": _polygon([(0.0, -1.0), (0.78, 0.0), (0.0, 1.0), (-0.78, 0.0)]),
    "star": _polygon(_star(1.05, 0.46, 0.08)),
    "cross": _polygon(_cross(0.34)),
}
