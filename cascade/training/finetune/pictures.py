"""Pictures of a dataset as tensors: cut to their bucket, encoded, and optionally cached on disk."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cascade.checkpoints.stored import StoredTensor
from cascade.checkpoints.writing import write_tensors
from cascade.errors import InvalidSetting
from cascade.training.finetune.buckets import Size
from cascade.training.finetune.dataset import Dataset, Example, UnreadablePicture

Encode = Callable[[Tensor], Tensor]  # pixels (b, 3, h, w) in 0..1 to latents (b, c, gh, gw)


class Pictures:
    """Reads examples; a damaged one is reported once and replaced by another of its bucket."""

    def __init__(
        self, dataset: Dataset, members: dict[int, list[int]], report: Callable[[str], None]
    ) -> None:
        self.dataset = dataset
        self.members = members
        self.report = report
        self.unreadable: set[int] = set()

    def pixels(
        self, index: int, bucket: int, size: Size, rng: np.random.Generator | None
    ) -> tuple[Example, Tensor]:
        """Return an example and its pixels (3, h, w) in 0..1, cut at random, or centrally without `rng`.

        Raises `InvalidSetting` when no picture of the bucket can be read.
        """
        group = self.members[bucket]
        start = group.index(index)
        for candidate in (*group[start:], *group[:start]):
            if candidate in self.unreadable:
                continue
            example = self.dataset.examples[candidate]
            try:
                return example, to_pixels(cut(example.open(), size, rng))
            except UnreadablePicture as error:
                self.unreadable.add(candidate)
                self.report(f"skipped {error}")
        raise InvalidSetting("data", f"no picture of the size group {size[0]}x{size[1]} can be read")


class LatentCache:
    """Latents of pictures in a folder, one safetensors file each, made on first use."""

    def __init__(self, folder: Path, encoder: str) -> None:
        """`encoder` identifies the weights that make the latents; others get other files."""
        self.folder = folder
        self.encoder = encoder

    def path(self, example: Example, size: Size) -> Path:
        """Return where the latents of an example at a size are, or will be."""
        key = (self.encoder, example.name, example.source.num_bytes, _modified(example), *size)
        digest = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def get(self, example: Example, size: Size) -> Tensor | None:
        """Return the latents, or None if they are missing or damaged."""
        path = self.path(example, size)
        try:
            return load_file(path)["latents"] if path.is_file() else None
        except (SafetensorError, KeyError, OSError):
            return None  # damaged: made anew

    def put(self, example: Example, size: Size, latents: Tensor) -> None:
        """Keep latents (c, h, w); raise `CheckpointError` if the disk is full."""
        stored = {"latents": StoredTensor.of(latents.detach().float().cpu().contiguous())}
        write_tensors(self.path(example, size), stored, lambda _, dtype: dtype, {})


def encoded(
    pictures: Pictures,
    indices: Sequence[int],
    bucket: int,
    size: Size,
    encode: Encode,
    *,
    cache: LatentCache | None,
    rngs: Sequence[np.random.Generator],
) -> tuple[list[Example], Tensor]:
    """Return the examples of a batch and their latents (b, c, gh, gw); those not cached are made together."""
    examples: list[Example] = []
    rows: list[Tensor | None] = []
    fresh: list[Tensor] = []
    for index, rng in zip(indices, rngs, strict=True):
        example = pictures.dataset.examples[index]
        known = cache.get(example, size) if cache else None
        if known is None:
            example, pixels = pictures.pixels(index, bucket, size, None if cache else rng)
            fresh.append(pixels)
        examples.append(example)
        rows.append(known)
    made = iter(encode(torch.stack(fresh)).cpu() if fresh else ())
    for place, (example, row) in enumerate(zip(examples, rows, strict=True)):
        if row is None:
            rows[place] = latents = next(made)
            if cache:
                cache.put(example, size, latents)
    return examples, torch.stack([row for row in rows if row is not None])


def cut(image: Image.Image, size: Size, rng: np.random.Generator | None) -> Image.Image:
    """Scale a picture so that it covers `size`, and cut the rest away, at random or equally on both sides."""
    scale = max(size[0] / image.width, size[1] / image.height)
    spare = (image.width - size[0] / scale, image.height - size[1] / scale)
    shares = (0.5, 0.5) if rng is None else tuple(rng.random(2))
    left, top = (max(0.0, room * share) for room, share in zip(spare, shares, strict=True))
    box = (left, top, min(image.width, left + size[0] / scale), min(image.height, top + size[1] / scale))
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR, box=box)


def to_pixels(image: Image.Image) -> Tensor:
    """Return the pixels of a picture, (3, h, w) in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _modified(example: Example) -> int:
    try:
        return example.source.path.stat().st_mtime_ns
    except OSError:
        return 0
