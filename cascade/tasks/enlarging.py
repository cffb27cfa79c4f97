"""Consistency of super-resolution: the large picture, reduced, equals the small one.

The networks draw crisp edges, but not exactly in place, and colours only roughly. So the drawn picture is
used where, reduced, it agrees with the small one, and a smooth enlargement of the small one elsewhere. Then
the remaining error, the difference of the small picture and the reduced result, is enlarged and added, a few
times. Sources: back-projection, Irani and Peleg, "Improving resolution by image registration", 1991; the
same consistency for diffusion, Choi et al., "ILVR", 2021, and Wang et al., "DDNM", 2023.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cascade.tasks.encoding import flattened

Pixels = NDArray[np.float32]  # (h, w, c), 0 to 255

ROUNDS = 4  # the fourth changes values by less than half a level of 255
DOUBT = 16.0  # levels of 255: the difference from the small picture that gives the drawn one a weight of 1/2


def keep_to_small(drawn: Image.Image, given: Image.Image) -> Image.Image:
    """Return the drawn picture, RGB, made consistent with the small one that it enlarges.

    They agree up to rounding and the clipping at black and white. The small one is cropped centrally to the
    aspect ratio of the drawn one, as ControlNets read it. Unless it is smaller along both sides, nothing was
    enlarged, and the drawn picture is returned unchanged.
    """
    fitted = _of_shape(flattened(given), drawn.size)
    if fitted.width >= drawn.width or fitted.height >= drawn.height:
        return drawn
    small, large = _pixels(fitted), _pixels(drawn)
    smooth = _resized(small, drawn.size)
    result = smooth + _confidence(large, small) * (large - smooth)
    for _ in range(ROUNDS):
        result += _resized(small - _resized(result, fitted.size), drawn.size)
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8))


def _confidence(large: Pixels, small: Pixels) -> Pixels:
    """Return the drawn picture's weight at each pixel, (h, w, 1) in 0..1: high where, reduced, it agrees.

    The squared difference is averaged over 3x3 pixels of the small picture.
    """
    rows, columns = small.shape[:2]
    error = np.square(small - _resized(large, (columns, rows))).mean(-1, keepdims=True)
    padded = np.pad(error, ((1, 1), (1, 1), (0, 0)), "edge")
    shifted = [padded[down : down + rows, right : right + columns] for down, right in np.ndindex(3, 3)]
    mean = np.stack(shifted).mean(0)
    return DOUBT**2 / (DOUBT**2 + _resized(mean, large.shape[1::-1], Image.Resampling.BILINEAR))


def _of_shape(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop a picture centrally to the aspect ratio of `size`, without scaling except by parts of a pixel."""
    scale = min(image.width / size[0], image.height / size[1])
    cut = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return image if image.size == cut else ImageOps.fit(image, cut, Image.Resampling.BICUBIC)


def _resized(
    pixels: Pixels, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Pixels:
    """Resize to `size`, (width, height), without rounding; the filter is widened where it reduces."""
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(channel.resize(size, resample)) for channel in channels], axis=-1)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"), np.float32)
