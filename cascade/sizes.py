"""Picture sizes: which are allowed, on which grids they are drawn, and how to reach the requested size."""

import math
from dataclasses import dataclass

from PIL import Image, ImageOps

from cascade.errors import InvalidSetting

DRAWN_MULTIPLE = 8  # Stage B joins 2x2 latents, each of 4x4 pixels; the requested size is cut out
MIN_SIDE = 64
MAX_SIDE = 4096
MAX_PIXELS = 4_194_304
MAX_ASPECT = 4

_CELL_PIXELS = 42.67  # side of a cell of Stage C's latent, rounded as in both official code bases
_LATENTS_PER_CELL = 10.67  # the same side in cells of Stage B's latent, four pixels each
_LATENT_PIXELS = 4


@dataclass(frozen=True, slots=True)
class NativeSizes:
    """The sizes (width, height) that a checkpoint knows, the default first.

    Full checkpoints draw any size. Those that resample draw only these sizes and scale them to others.
    """

    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    resamples: bool = False


@dataclass(frozen=True, slots=True)
class SizePlan:
    """A requested size and the grids (height, width) on which it is drawn."""

    width: int
    height: int
    prior_grid: tuple[int, int]
    decoder_grid: tuple[int, int]  # even sides: Stage B joins 2x2 latents to one token
    resampled: bool = False

    @property
    def draw_width(self) -> int:
        """Width of Stage A's output in pixels."""
        return self.decoder_grid[1] * _LATENT_PIXELS

    @property
    def draw_height(self) -> int:
        """Height of Stage A's output in pixels."""
        return self.decoder_grid[0] * _LATENT_PIXELS

    @property
    def resampled_from(self) -> tuple[int, int] | None:
        """Drawn size (width, height), if the picture is scaled to the requested size."""
        return (self.draw_width, self.draw_height) if self.resampled else None


def plan_size(
    width: int | None, height: int | None, native: NativeSizes, max_pixels: int = MAX_PIXELS
) -> SizePlan:
    """Plan how to draw a picture of `width` x `height` pixels; an absent side is the native one.

    Raises:
        InvalidSetting: the size is not allowed.
    """
    default_width, default_height = native.sizes[0]
    width = default_width if width is None else width
    height = default_height if height is None else height
    check_size(width, height, max_pixels)
    if native.resamples:
        drawn = _nearest_aspect(width, height, native)
        return SizePlan(width, height, _cells(*drawn), _latents(*drawn), resampled=drawn != (width, height))
    prior_grid = _cells(width, height)
    rows, columns = (_even(int(cells * _LATENTS_PER_CELL)) for cells in prior_grid)
    return SizePlan(width, height, prior_grid, (rows, columns))


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise `InvalidSetting` unless `width` x `height` is a size that can be requested."""
    check_side("width", width)
    check_side("height", height)
    if width * height > max_pixels:
        raise InvalidSetting("size", f"{width}x{height} has more than {max_pixels} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidSetting(
            "size", f"{width}x{height} is beyond the aspect ratios 1:{MAX_ASPECT} to {MAX_ASPECT}:1"
        )


def check_side(field: str, side: int) -> None:
    """Raise `InvalidSetting` unless a picture can have this width or height."""
    if type(side) is not int or not MIN_SIDE <= side <= MAX_SIDE:
        raise InvalidSetting(field, f"must be a whole number from {MIN_SIDE} to {MAX_SIDE}, but is {side!r}")


def cover(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scale a picture to cover a size and crop it centrally; one of that size is returned unchanged."""
    return image if image.size == size else ImageOps.fit(image, size, resample)


def fit_to_size(image: Image.Image, plan: SizePlan) -> Image.Image:
    """Bring a drawn picture to exactly the planned size: scale it to cover if needed, then crop centrally."""
    if plan.resampled:
        scale = max(plan.width / image.width, plan.height / image.height)
        covering = (round(image.width * scale), round(image.height * scale))
        image = image.resize(covering, Image.Resampling.LANCZOS)
    if image.size == (plan.width, plan.height):
        return image
    left, top = (image.width - plan.width) // 2, (image.height - plan.height) // 2
    return image.crop((left, top, left + plan.width, top + plan.height))


def fit_to_drawing(image: Image.Image, plan: SizePlan) -> Image.Image:
    """Invert `fit_to_size`: return the drawing from which it would make this picture of the planned size.

    What is cropped in the end is filled with the nearest pixels of the edge, and nothing moves.
    """
    drawn = (plan.draw_width, plan.draw_height)
    widened = widen_to_drawing(image, plan)
    return widened if widened.size == drawn else widened.resize(drawn, Image.Resampling.LANCZOS)


def widen_to_drawing(image: Image.Image, plan: SizePlan) -> Image.Image:
    """Add the margins that `fit_to_size` crops around a picture of the planned size, before any scaling."""
    width, height = plan.draw_width, plan.draw_height
    if plan.resampled:
        scale = max(plan.width / width, plan.height / height)
        width, height = round(width * scale), round(height * scale)
    return widen_edges(image, (width, height), (width - plan.width) // 2, (height - plan.height) // 2)


def widen_edges(image: Image.Image, size: tuple[int, int], left: int, top: int) -> Image.Image:
    """Place a picture at `left`, `top` on a canvas of `size` (width, height); the rest repeats its edges."""
    if image.size == size:
        return image
    canvas = Image.new(image.mode, size)
    right, bottom = left + image.width, top + image.height
    canvas.paste(image, (left, top))
    for column, gap in ((left, (0, top, left, bottom)), (right - 1, (right, top, size[0], bottom))):
        if gap[2] > gap[0]:
            edge = canvas.crop((column, top, column + 1, bottom))
            canvas.paste(edge.resize((gap[2] - gap[0], image.height), Image.Resampling.NEAREST), gap[:2])
    for row, gap in ((top, (0, 0, size[0], top)), (bottom - 1, (0, bottom, size[0], size[1]))):
        if gap[3] > gap[1]:
            edge = canvas.crop((0, row, size[0], row + 1))
            canvas.paste(edge.resize((size[0], gap[3] - gap[1]), Image.Resampling.NEAREST), gap[:2])
    return canvas


def nearest_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the allowed size for a picture of any size: its own if allowed, else the nearest.

    A picture that is too large, too small or too long is scaled, and cut if its aspect ratio demands it.
    """
    width, height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    scale = min(1, MAX_SIDE / max(width, height), math.sqrt(max_pixels / (width * height)))
    scale = max(scale, MIN_SIDE / min(width, height))
    sides = [round(scale * side) for side in (width, height)]
    while sides[0] * sides[1] > max_pixels or max(sides) > MAX_ASPECT * min(sides):
        sides[sides.index(max(sides))] -= 1  # rounding went beyond a limit
    return sides[0], sides[1]


def _nearest_aspect(width: int, height: int, native: NativeSizes) -> tuple[int, int]:
    """Return the native size of the nearest aspect ratio and, among equals, of the nearest area."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        across, area = size[0] / size[1], size[0] * size[1]
        return abs(math.log(across * height / width)), abs(math.log(area / (width * height)))

    return min(native.sizes, key=distance)


def _cells(width: int, height: int) -> tuple[int, int]:
    return math.ceil(height / _CELL_PIXELS), math.ceil(width / _CELL_PIXELS)


def _latents(width: int, height: int) -> tuple[int, int]:
    return height // _LATENT_PIXELS, width // _LATENT_PIXELS


def _even(side: int) -> int:
    return side + side % 2
