"""Inspection of a checkpoint without loading it: what it holds, in which form, and what is missing."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from cascade.checkpoints.files import (
    LORA_FOLDER,
    REQUIRED,
    TOKENIZER_FILES,
    Part,
    folder_beside,
    scan,
    variant_of,
)
from cascade.checkpoints.fill import check_tensors
from cascade.checkpoints.keys import Component, Layout
from cascade.checkpoints.load import build, existing
from cascade.checkpoints.stored import StoredTensor
from cascade.checkpoints.sums import check_sums
from cascade.errors import CheckpointError
from cascade.lora.library import LoRALibrary


@dataclass(frozen=True, slots=True)
class InspectedComponent:
    """One component, as its files describe it."""

    component: Component
    variant: str  # the publishers' name of these dimensions, such as "3.6B", or "custom"
    layout: Layout
    dtypes: tuple[str, ...]  # of the weights, the most frequent first
    parameters: int
    num_bytes: int
    files: tuple[Path, ...]
    problem: str | None  # why it would not load


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a file or folder."""

    path: Path
    components: tuple[InspectedComponent, ...]
    missing: tuple[str, ...]  # for a folder: parts that pictures need and that are absent
    unknown: tuple[Path, ...]  # safetensors files that are no known component
    refused: tuple[Path, ...]  # pickles
    loras: tuple[str, ...]  # names of the files in its folder of LoRAs, which are read only when asked for

    @property
    def is_complete(self) -> bool:
        """Whether pictures can be made from it alone."""
        return not self.missing and not any(component.problem for component in self.components)


def inspect(path: str | PathLike[str], *, verify: bool = False) -> Inspection:
    """Read the headers of a file, of a folder, or of the embedded checkpoint "tiny".

    `verify` reads everything and compares it with the checksums that the folder states.

    Raises:
        CheckpointError: nothing is there, or a file is cut, corrupt, a pickle or, with `verify`, changed.
    """
    place = existing(path)
    if verify:
        check_sums(place if place.is_dir() else place.parent, max_bytes=None)
    found = scan(place)
    order = list(Component)
    parts = sorted(found.parts, key=lambda part: (order.index(part.component), str(part.files[0])))
    return Inspection(
        path=place,
        components=tuple(_inspected(part) for part in parts),
        missing=() if place.is_file() else _missing(parts),
        unknown=tuple(found.unknown),
        refused=tuple(found.pickles),
        loras=tuple(LoRALibrary([place / LORA_FOLDER]).names()),
    )


def _inspected(part: Part) -> InspectedComponent:
    tensors = part.stored.values()
    return InspectedComponent(
        component=part.component,
        variant=variant_of(part),
        layout=part.layout,
        dtypes=_dtypes(tensors),
        parameters=sum(_count(tensor) for tensor in tensors if tensor.dtype.is_floating_point),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        files=part.files,
        problem=_problem(part),
    )


def _dtypes(tensors: Iterable[StoredTensor]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + _count(tensor)
    return tuple(sorted(counts, key=lambda name: -counts[name]))


def _count(tensor: StoredTensor) -> int:
    return tensor.num_bytes // tensor.dtype.itemsize


def _problem(part: Part) -> str | None:
    try:
        check_tensors(build(part).state_dict(), part.tensors, str(part))
    except CheckpointError as error:
        return str(error)
    return None


def _missing(parts: Iterable[Part]) -> tuple[str, ...]:
    parts = list(parts)
    present = {part.component for part in parts}
    missing = [str(component) for component in REQUIRED if component not in present]
    texts = [part for part in parts if part.component is Component.TEXT_ENCODER]
    names = ("tokenizer", "prior_tokenizer")
    if not any(folder_beside(part, names, TOKENIZER_FILES) for part in texts):
        missing.append("tokenizer")
    return tuple(missing)
