"""The verifier: reads a picture by palette and shapes, without a network, and compares it with a prompt.

It knows only what the drawn world is made of: flat things in palette colours on a plain background.
Whatever is not clearly one of these is reported as `UNCLEAR`, which no prompt asks for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascade.training.captions import scene_facts
from cascade.training.scenes import COLOURS, OUTLINES, PALETTE, Picture, Scene, Thing

UNCLEAR = "unclear"

_SMALLEST = 0.008  # share of the short side's square; smaller regions are specks
_OVERLAP = 0.75  # required overlap with the best template
_PURITY = 0.85  # required share of a thing's inner pixels that have its colour
_WIDEST_EDGE = 5.5  # pixels; drawn edges are about one wide
_PURE = 0.08
_PER_PIXEL = 2 / 3 * (1 - 2 * _PURE) ** 3
_AROUND = 8  # pixels around a thing where its edge may fade
_GRID = 64  # samples along each side of a template

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which facts of a prompt a picture got right; None for a fact that the prompt does not state."""

    background: bool | None
    count: bool
    colours: bool
    shapes: bool
    place: bool | None
    size: bool | None

    @property
    def is_right(self) -> bool:
        """Whether background, number, colours and shapes are right; place and size are reported apart."""
        return self.background is not False and self.count and self.colours and self.shapes


def read_picture(picture: Picture) -> Scene:
    """Return the scene that a picture (h, w, 3) shows."""
    height, width = picture.shape[:2]
    colours = _nearest_colours(picture)
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    background = int(np.bincount(border).argmax())
    regions = _regions(colours != background)
    smallest = _SMALLEST * min(width, height) ** 2
    labels, areas = np.unique(regions, return_counts=True)
    things = tuple(
        _read_thing(picture, colours, regions == label, COLOURS[background])
        for label, area in zip(labels, areas, strict=True)
        if label >= 0 and area > smallest
    )
    return Scene(width, height, COLOURS[background], things)


def judge(facts: Mapping[str, str], seen: Scene) -> Verdict:
    """Compare a scene with what a caption states (`Caption.facts`)."""
    asked = [
        (facts[f"{mention}_colour"], facts[f"{mention}_shape"])
        for mention in ("first", "second")
        if f"{mention}_shape" in facts
    ]
    drawn = [(thing.colour, thing.shape) for thing in seen.things]
    colours = sorted(colour for colour, _ in asked) == sorted(colour for colour, _ in drawn)
    # Shapes swapped between two colours are wrong; where the colours are wrong, only the shapes count.
    shapes = sorted(asked) == sorted(drawn) or (
        not colours and sorted(shape for _, shape in asked) == sorted(shape for _, shape in drawn)
    )
    return Verdict(
        background=facts["background"] == seen.background if "background" in facts else None,
        count=len(asked) == len(drawn),
        colours=colours,
        shapes=shapes,
        place=_judge_each(facts, seen, "place"),
        size=_judge_each(facts, seen, "size"),
    )


def shows(scene: Scene, picture: Picture) -> bool:
    """Return whether a picture shows a scene's background and its things' number, colours and shapes."""
    return judge(scene_facts(scene), read_picture(picture)).is_right


def _judge_each(facts: Mapping[str, str], seen: Scene, what: str) -> bool | None:
    """Return whether things have the places or sizes stated for their colours; None if none is stated."""
    stated = [mention for mention in ("first", "second") if f"{mention}_{what}" in facts]
    if not stated:
        return None
    return all(
        any(
            thing.colour == facts[f"{mention}_colour"]
            and (seen.place(thing) if what == "place" else seen.size_word(thing))
            == facts[f"{mention}_{what}"]
            for thing in seen.things
        )
        for mention in stated
    )


def _nearest_colours(picture: Picture) -> NDArray[np.int64]:
    """Return the index of the palette colour nearest to each pixel, (h, w)."""
    palette = np.array(list(PALETTE.values()), np.float32)
    pixels = picture.reshape(-1, 3).T.astype(np.float32)
    scores = (2 * palette) @ pixels - (palette**2).sum(1)[:, None]  # (colours, pixels)
    nearest: NDArray[np.int64] = scores.argmax(0).reshape(picture.shape[:2])
    return nearest


def _regions(mask: Mask) -> NDArray[np.int64]:
    """Label the connected regions of a mask, each with the index of its first pixel; -1 elsewhere.

    The smallest index spreads along rows and columns in turn; few rounds fill compact regions.
    """
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    while True:
        spread = _spread(_spread(labels).T).T
        if (spread == labels).all():
            return labels
        labels = spread


def _spread(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give every run of labelled pixels in a row the smallest label in it."""
    is_labelled = labels >= 0
    starts = np.ones(labels.shape, bool)
    starts[:, 1:] = is_labelled[:, 1:] != is_labelled[:, :-1]
    first = np.flatnonzero(starts)
    smallest = np.minimum.reduceat(labels.ravel(), first)
    return np.repeat(smallest, np.diff(first, append=labels.size)).reshape(labels.shape)


def _read_thing(picture: Picture, colours: NDArray[np.int64], region: Mask, background: str) -> Thing:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    shape, overlap = _best_shape(region[top:bottom, left:right])
    around = slice(max(0, top - _AROUND), bottom + _AROUND), slice(max(0, left - _AROUND), right + _AROUND)
    colour, purity = _main_colour(colours[around][_eroded(region[around], 2)])
    edge_width = _edge_width(picture[around], region[around], background, colour)
    x, y, radius = _placed(shape, (left, top, right, bottom))
    return Thing(
        shape=shape if overlap >= _OVERLAP and edge_width <= _WIDEST_EDGE else UNCLEAR,
        colour=colour if purity >= _PURITY else UNCLEAR,
        x=x,
        y=y,
        radius=radius,
    )


def _main_colour(inner: NDArray[np.int64]) -> tuple[str, float]:
    """Return the commonest colour of a thing's inner pixels and its share of them."""
    counts = np.bincount(inner, minlength=len(COLOURS))
    return COLOURS[int(counts.argmax())], float(counts.max() / max(1, len(inner)))


def _best_shape(box: Mask) -> tuple[str, float]:
    """Return the shape whose template fits the box best, and their overlap, less a penalty for stretching."""
    height, width = box.shape
    samples = (np.arange(_GRID) + 0.5) / _GRID
    stretched = box[np.ix_((samples * height).astype(int), (samples * width).astype(int))]
    scores = {}
    for shape, template in _TEMPLATES.items():
        overlap = (stretched & template.mask).sum() / (stretched | template.mask).sum()
        stretch = (width / height) / ((template.right - template.left) / (template.bottom - template.top))
        scores[shape] = float(overlap * min(stretch, 1 / stretch))
    best = max(scores, key=lambda shape: scores[shape])
    return best, scores[best]


def _edge_width(picture: Picture, region: Mask, background: str, colour: str) -> float:
    """Estimate the width in pixels of the edge between background and thing from its mixed pixels.

    Each pixel is read as a mixture with `share` of the thing's colour. A share near 0 or 1 may be jitter or
    noise and counts as pure; what then remains of 4 share (1 - share) on a ramp of one pixel is `_PER_PIXEL`.
    """
    grown = _eroded(region, -_AROUND)
    ground, paint = np.array(PALETTE[background], float), np.array(PALETTE[colour], float)
    if background == colour:
        return 0.0
    along = (picture[grown] - ground) @ (paint - ground) / ((paint - ground) ** 2).sum()
    share = along.clip(_PURE, 1 - _PURE)
    mixed = 4 * (share * (1 - share) - _PURE * (1 - _PURE))
    outline = (region & ~_eroded(region, 1)).sum()
    return float(mixed.sum() / outline / _PER_PIXEL)


def _eroded(mask: Mask, pixels: int) -> Mask:
    """Erode a mask by `pixels`; dilate it if negative."""
    if pixels < 0:
        return ~_eroded(~mask, -pixels)
    for _ in range(pixels):
        padded = np.pad(mask, 1, constant_values=True)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _placed(shape: str, box: tuple[int, int, int, int]) -> tuple[float, float, float]:
    """Return centre and radius of a shape whose outline fills a box of pixels (left, top, right, bottom)."""
    left, top, right, bottom = box
    template = _TEMPLATES[shape]
    radius = (right - left + bottom - top) / (template.right - template.left + template.bottom - template.top)
    x = (left + right) / 2 - radius * (template.left + template.right) / 2
    y = (top + bottom) / 2 - radius * (template.top + template.bottom) / 2
    return x, y, radius


@dataclass(frozen=True, slots=True)
class _Template:
    """A shape stretched to fill its bounding box, and that box for radius 1."""

    mask: Mask  # (64, 64)
    left: float
    top: float
    right: float
    bottom: float


def _template(shape: str) -> _Template:
    fine = np.linspace(-1.2, 1.2, 4801)
    crossings = OUTLINES[shape](fine)
    inside = np.isfinite(crossings)
    left, right = float(crossings[inside].min()), float(crossings[inside].max())
    top, bottom = float(fine[inside.any(1)].min()), float(fine[inside.any(1)].max())
    samples = (np.arange(_GRID) + 0.5) / _GRID
    rows = OUTLINES[shape](top + samples * (bottom - top))  # (64, crossings)
    x = left + samples * (right - left)
    mask = (rows[:, None, :] <= x[None, :, None]).sum(-1) % 2 == 1
    return _Template(mask, left, top, right, bottom)


_TEMPLATES = {shape: _template(shape) for shape in OUTLINES}
