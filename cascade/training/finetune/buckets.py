"""Aspect buckets: sizes of about the same area; pictures of similar proportions are batched at one of them.

The pictures of a batch are a function of the seed and of the batch's number, so that a run can be resumed
anywhere, and several processes agree without communication.
"""

import math
from collections.abc import Sequence

import numpy as np

from cascade.sizes import NativeSizes

Size = tuple[int, int]  # width, height in pixels

MULTIPLE = 32  # pixels; both sides of a bucket are multiples of it
# Aspect ratios of the official training code, which also uses their inverses.
_RATIOS = (1 / 1, 1 / 2, 1 / 3, 2 / 3, 3 / 4, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1 / 6, 5 / 6, 9 / 16)


def bucket_sizes(native: NativeSizes, image_size: int | None = None) -> tuple[Size, ...]:
    """Return the sizes at which a checkpoint is trained, the square one first.

    They are the checkpoint's fixed sizes, or else rectangles of about the area of a square of `image_size`.
    """
    if native.resamples and image_size is None:
        return native.sizes
    side = image_size or min(native.sizes[0])
    sizes = []
    for ratio in sorted({*_RATIOS, *(1 / ratio for ratio in _RATIOS)}, key=lambda r: abs(math.log(r))):
        exact = (side * math.sqrt(ratio), side / math.sqrt(ratio))
        width, height = (max(MULTIPLE, round(length / MULTIPLE) * MULTIPLE) for length in exact)
        sizes.append((width, height))
    return tuple(dict.fromkeys(sizes))


def nearest_bucket(width: int, height: int, sizes: Sequence[Size]) -> int:
    """Return the index of the size whose proportions are nearest."""
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][0] * height / (sizes[i][1] * width))))


class BatchOrder:
    """The pictures of each batch; every epoch shows each picture at least once, newly shuffled."""

    def __init__(self, buckets: Sequence[int], batch: int, seed: int) -> None:
        """`buckets` holds the bucket of every picture."""
        self.members = {b: [i for i, own in enumerate(buckets) if own == b] for b in sorted(set(buckets))}
        self.batch = batch
        self.seed = seed
        self._epoch: tuple[int, list[tuple[int, list[int]]]] = (-1, [])

    @property
    def per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return sum(math.ceil(len(members) / self.batch) for members in self.members.values())

    def __getitem__(self, number: int) -> tuple[int, list[int]]:
        """Return bucket and pictures of a batch; a bucket's last batch is filled up from its beginning."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][place]

    def _shuffled(self, epoch: int) -> list[tuple[int, list[int]]]:
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for bucket, members in self.members.items():
            order = [members[i] for i in rng.permutation(len(members))]
            padded = np.resize(order, math.ceil(len(order) / self.batch) * self.batch).tolist()
            batches += [(bucket, padded[at : at + self.batch]) for at in range(0, len(padded), self.batch)]
        return [batches[i] for i in rng.permutation(len(batches))]
