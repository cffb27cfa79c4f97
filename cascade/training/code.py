"""The semantic code: the latents that Stage C draws for a scene, defined by a formula instead of learned.

Sixteen channels on the grid of Stage C describe the whole scene, so that each network of the tiny checkpoint
can be trained against them on its own.
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cascade.training.scenes import COLOURS, PALETTE, SHAPES, Scene, Thing

CHANNELS = 16
CELL = 48.0  # pixels; about the distance between two nodes
CELLS_PER_SIDE = 3 / 128  # one node per 42.67 pixels

Code = NDArray[np.float32]  # (16, gh, gw)

_TOKEN = 8.0  # pixels per token of Stage B; the outermost nodes lie at the centres of the outermost tokens
_FULL_WITHIN, _GONE_BEYOND = CELL, 1.6 * CELL
_SAME_THING = 64.0  # pixels; nodes agree on a thing if the centres that they give it are nearer than this
_FEWEST_NODES = 4  # the smallest thing has nine
_BACKGROUND, _COLOUR, _SHAPE, _OFFSET, _RADIUS, _WEIGHT = (
    slice(0, 3),
    slice(3, 6),
    slice(6, 12),
    slice(12, 14),
    slice(14, 15),
    slice(15, 16),
)

# Moments of the raw channels over 20,000 training scenes; `estimate_moments` computes them.
MEAN = np.array([0.0] * 14 + [0.109, 0.577], np.float32)
DEVIATION = np.array([1.001] * 3 + [0.744] * 3 + [0.743] * 6 + [0.691] * 2 + [0.576, 0.469], np.float32)


def grid_size(width: int, height: int) -> tuple[int, int]:
    """Return the rows and columns of the code of a picture."""
    return math.ceil(height * CELLS_PER_SIDE), math.ceil(width * CELLS_PER_SIDE)


def scene_code(scene: Scene) -> Code:
    """Return the code of a scene, each channel with zero mean and unit variance over training scenes."""
    return ((_raw_code(scene) - MEAN[:, None, None]) / DEVIATION[:, None, None]).astype(np.float32)


def read_code(code: Code, size: tuple[int, int]) -> Scene:
    """Return the scene of a code for a picture of `size` (width, height); exact for codes of real scenes.

    Every node describes the thing that it belongs to; nodes that agree on its centre are averaged. Shape and
    colour are the nearest ones, however far away.
    """
    raw = code * DEVIATION[:, None, None] + MEAN[:, None, None]
    background = _nearest(raw[_BACKGROUND].mean((1, 2)), _WHITENED, COLOURS)
    is_thing = raw[15] > 0.6
    nodes = raw[:, is_thing].T.astype(float)  # (n, 16)
    position = np.stack(np.meshgrid(*_nodes(*size)), axis=-1)[is_thing]  # (n, 2)
    centres = position - 64 * nodes[:, _OFFSET] / nodes[:, _WEIGHT]
    agree = np.linalg.norm(centres[:, None] - centres, axis=-1) < _SAME_THING  # (n, n)
    things = []
    fewest = _FEWEST_NODES
    while (votes := agree.sum(1)).max(initial=0) >= fewest:
        centre = centres[agree[votes.argmax()]].mean(0)
        mine = agree.any(1) & (np.linalg.norm(centres - centre, axis=1) < _SAME_THING)
        things.append(_read_thing(nodes[mine], position[mine]))
        agree &= ~mine & ~mine[:, None]
        fewest = max(fewest, int(0.3 * mine.sum()))
    return Scene(*size, background, tuple(things))


def colour_vector(rgb: tuple[float, float, float]) -> NDArray[np.float32]:
    """Return the code of any colour, (3,), whitened like the palette but not yet divided by `DEVIATION`."""
    palette = np.array([(*PALETTE[colour], 1) for colour in COLOURS], float)
    whitening = np.linalg.lstsq(palette, _WHITENED, rcond=None)[0]  # exact: the whitening is affine
    vector: NDArray[np.float32] = (np.array([*rgb, 1.0]) @ whitening).astype(np.float32)
    return vector


def recoloured(scene: Scene, index: int, rgb: tuple[float, float, float]) -> Code:
    """Return the code of a scene in which the thing at `index` has any colour."""
    code = scene_code(scene)
    others = set(COLOURS) - {scene.things[index].colour}
    changed = [
        replace(thing, colour=min(others)) if place == index else thing
        for place, thing in enumerate(scene.things)
    ]
    nodes = (scene_code(replace(scene, things=tuple(changed))) != code)[_COLOUR].any(0)
    weight = code[15] * DEVIATION[15] + MEAN[15]
    painted = (colour_vector(rgb) / DEVIATION[_COLOUR])[:, None, None] * weight
    code[_COLOUR] = np.where(nodes, painted, code[_COLOUR])
    return code


def estimate_moments(scenes: list[Scene]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate mean and deviation of raw channels; those of one vector have mean 0 and share a deviation."""
    raw = np.concatenate([_raw_code(scene).reshape(CHANNELS, -1) for scene in scenes], axis=1).astype(float)
    mean, deviation = raw.mean(1), raw.std(1)
    for group in (_BACKGROUND, _COLOUR, _SHAPE, _OFFSET):
        mean[group] = 0
        deviation[group] = np.sqrt((raw[group] ** 2).mean())
    return mean, deviation


def _raw_code(scene: Scene) -> NDArray[np.float32]:
    x, y = _nodes(scene.width, scene.height)
    raw = np.zeros((CHANNELS, len(y), len(x)), np.float32)
    raw[_BACKGROUND] = _WHITENED[COLOURS.index(scene.background)][:, None, None]
    nearest = np.full((len(y), len(x)), np.inf)
    for thing in scene.things:
        distance = np.maximum(np.abs(x - thing.x)[None, :], np.abs(y - thing.y)[:, None]) - thing.radius
        weight = ((_GONE_BEYOND - distance) / (_GONE_BEYOND - _FULL_WITHIN)).clip(0, 1)
        content = np.zeros((CHANNELS, len(y), len(x)), np.float32)
        content[_COLOUR] = _WHITENED[COLOURS.index(thing.colour)][:, None, None]
        content[_SHAPE] = _SIMPLEX[SHAPES.index(thing.shape)][:, None, None]
        content[12] = ((x - thing.x) / 64)[None, :]
        content[13] = ((y - thing.y) / 64)[:, None]
        content[_RADIUS] = (thing.radius - 45) / 20
        content[_WEIGHT] = 1
        raw[3:] = np.where(distance < nearest, content * weight, raw)[3:]
        nearest = np.minimum(nearest, distance)
    return raw


def _read_thing(nodes: NDArray[np.float64], position: NDArray[np.float64]) -> Thing:
    """Average the nodes of one thing, whose contents are already multiplied by their weights."""
    weights = nodes[:, 15]
    mean = nodes.sum(0) / weights.sum()
    x, y = (weights @ position) / weights.sum() - 64 * mean[_OFFSET]
    shape, colour = _nearest(mean[_SHAPE], _SIMPLEX, SHAPES), _nearest(mean[_COLOUR], _WHITENED, COLOURS)
    return Thing(shape, colour, float(x), float(y), float(45 + 20 * mean[14]))


def _nearest(vector: NDArray[np.floating], corners: NDArray[np.float32], names: tuple[str, ...]) -> str:
    return names[int(np.linalg.norm(corners - vector, axis=1).argmin())]


def _nodes(width: int, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the pixel columns and rows of the nodes.

    Stage B resizes the code with aligned corners, so an offset, which is linear in these positions, stays
    exact at every token.
    """
    rows, columns = grid_size(width, height)
    x = _TOKEN / 2 + np.arange(columns) * (width - _TOKEN) / (columns - 1)
    y = _TOKEN / 2 + np.arange(rows) * (height - _TOKEN) / (rows - 1)
    return x, y


def _whitened_palette() -> NDArray[np.float32]:
    """Return the palette with zero mean and unit covariance, (colours, 3)."""
    centred = np.array([PALETTE[colour] for colour in COLOURS], float)
    centred -= centred.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    whitened: NDArray[np.float32] = (centred @ axes @ np.diag(variances**-0.5) @ axes.T).astype(np.float32)
    return whitened


def _simplex(corners: int) -> NDArray[np.float32]:
    """Return the corners of a regular simplex, (corners, corners - 1), each of norm sqrt(corners - 1).

    Row k of the Helmert matrix is orthogonal to the vector of ones and to all other rows.
    """
    helmert = np.zeros((corners - 1, corners))
    for k in range(1, corners):
        helmert[k - 1, :k] = 1 / math.sqrt(k * (k + 1))
        helmert[k - 1, k] = -k / math.sqrt(k * (k + 1))
    return (helmert.T * math.sqrt(corners)).astype(np.float32)


_WHITENED = _whitened_palette()
_SIMPLEX = _simplex(len(SHAPES))
