"""Search for the parts of a checkpoint in folders of any published layout.

Every safetensors file up to two folders deep is a candidate; its header tells what it is. Names of files and
folders only decide between candidates of one component, so folders may have any name.
"""

import filecmp
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from cascade.checkpoints.configs import CONFIG_CLASSES, NetworkConfig, network_config, read_json, variant_name
from cascade.checkpoints.keys import Component, Layout, detect_layout, split_file, to_original
from cascade.checkpoints.stored import (
    REFUSED_SUFFIXES,
    StoredTensor,
    open_weights,
    read_metadata,
    refuse_pickles,
)
from cascade.config import ControlNetConfig
from cascade.errors import CheckpointError, InvalidSetting
from cascade.sizes import DRAWN_MULTIPLE, check_size

REQUIRED = (Component.STAGE_C, Component.STAGE_B, Component.STAGE_A, Component.TEXT_ENCODER)
MAX_DEPTH = 2
LORA_FOLDER = "loras"  # in a checkpoint's folder; its files may change at any time and are read on demand
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
CONFIG_METADATA = "cascade.config"  # header entry of a single file, in place of a folder's config.json

_ACCEPTED = {
    Component.STAGE_C: "prior/ or stage_c[_lite][_bf16].safetensors",
    Component.STAGE_B: "decoder/ or stage_b[_lite][_bf16].safetensors",
    Component.STAGE_A: "vqgan/ or stage_a.safetensors",
    Component.TEXT_ENCODER: "text_encoder/ or text_encoder.safetensors",
}


@dataclass(frozen=True)
class Part:
    """One component of a checkpoint and the files that hold it."""

    component: Component
    files: tuple[Path, ...]
    layout: Layout
    root: Path  # the folder that was searched
    stored: Mapping[str, StoredTensor]  # names as in the file, without prefixes and wrappers

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return self.files[0].parent

    @property
    def pipeline(self) -> Path:
        """Folder whose sub-folders belong to this part, such as its tokenizer and scheduler."""
        return self.folder if self.folder == self.root or self.is_single_file else self.folder.parent

    @property
    def is_single_file(self) -> bool:
        """Whether the component is a file among others, rather than a folder of its own."""
        return not self.files[0].name.startswith(("model", "diffusion_pytorch_model"))

    @cached_property
    def stated(self) -> Mapping[str, Any]:
        """Settings of the config.json or, for a single file, of the header; empty if there are none."""
        path = self.folder / "config.json"
        if not self.is_single_file:
            return read_json(path) if path.is_file() else {}
        metadata = read_metadata(self.files[0])
        try:
            content = json.loads(metadata.get(CONFIG_METADATA, "{}"))
        except ValueError as error:
            raise CheckpointError(f"{self}: the settings in its header are not JSON") from error
        settings = content if isinstance(content, dict) else {}
        if self.component is Component.CONTROLNET and "injections" in metadata:
            settings["injections"] = metadata["injections"]
        return settings

    @property
    def config(self) -> NetworkConfig:
        """Configuration of a network (not of a CLIP tower)."""
        try:
            return network_config(self.component, self.tensors, self.stated)
        except CheckpointError as error:
            raise CheckpointError(f"{self}: {error}") from error

    @property
    def tokens(self) -> frozenset[str]:
        """Words of the file and folder names, such as "lite" and "bf16"."""
        names = f"{self.files[0].name}.{self.folder.name if self.folder != self.root else ''}"
        return frozenset(re.split(r"[._-]", names.lower()))

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Tensors by canonical name."""
        try:
            return to_original(self.component, self.stored)
        except CheckpointError as error:
            raise CheckpointError(f"{self}: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        """Type of most of the weights, read from the header and never from the file's name."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.stored.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.folder)


@dataclass
class Scan:
    """Files found in some folders, by what they are."""

    parts: list[Part] = field(default_factory=list)
    pickles: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    damaged: list[CheckpointError] = field(default_factory=list)


def scan(path: Path, found: Scan | None = None, *, named: Path | None = None) -> Scan:
    """Add everything under a folder, or in one file, that could belong to a checkpoint to `found`; return it.

    Raises `CheckpointError` naming the file if one is truncated, inconsistent or incomplete. If the user
    asked for the file `named`, errors in the others are collected in `found.damaged` instead.
    """
    found = Scan() if found is None else found
    if path.is_file():
        refuse_pickles(path)
        _add_parts(found, path.parent, (path,))
        return found
    try:
        listings = [(folder, sorted(folder.iterdir())) for folder in _folders(path, MAX_DEPTH)]
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    for folder, files in listings:
        found.pickles += [file for file in files if file.suffix.lower() in REFUSED_SUFFIXES]
        weights = [file for file in files if file.suffix == ".safetensors"]
        _scan_folder(found, path, folder, weights, named)
    return found


def find_parts(
    path: Path, *others: Path, variant: str | None = None, dtype: torch.dtype | None = None
) -> dict[Component, list[Part]]:
    """Return the candidates of each component in order of preference, with all required ones present.

    A file stands for the folder around it, with the file itself preferred. If `path` and `others` lack a
    required part, sibling folders are searched: prior and decoder are often saved as two pipelines.

    Raises:
        CheckpointError: a part is missing; lists what was found and which names are accepted.
        InvalidSetting: no file is of the variant.
    """
    if path.is_file():
        refuse_pickles(path)
    folder = path.parent if path.is_file() else path
    found = Scan()
    for place in (folder, *others):
        scan(place, found, named=path if path.is_file() else None)
    if missing := _missing(found.parts):
        found.parts += _from_siblings(folder, missing)
    if missing := _missing(found.parts):
        raise CheckpointError(_incomplete(path, found, missing))
    words = frozenset(re.split(r"[._,-]", variant.lower())) if variant else frozenset()
    if unknown := words - {"fp32"} - {word for part in found.parts for word in part.tokens}:
        raise InvalidSetting("variant", f"{path} has no files of the variant {', '.join(sorted(unknown))}")
    return ranked(found.parts, path, words, dtype)


def ranked(
    parts: Iterable[Part],
    path: Path,
    words: frozenset[str] = frozenset(),
    dtype: torch.dtype | None = None,
) -> dict[Component, list[Part]]:
    """Group parts by component, the preferred one first.

    The criteria, in order: the file `path` itself; most of `words` in the names ("fp32": neither bf16 nor
    fp16); full networks before lite ones; stored in `dtype`; not bf16 or fp16 by name; least deeply nested.
    """

    def preference(part: Part) -> tuple[bool, int, bool, bool, bool, bool, int, str]:
        is_half = not part.tokens.isdisjoint(("bf16", "fp16"))
        return (
            path not in part.files,
            len(words - part.tokens),
            is_half and "fp32" in words,
            "lite" in part.tokens and "lite" not in words,
            part.dtype is not dtype,
            is_half,
            len(part.folder.parts),
            str(part.files[0]),
        )

    candidates: dict[Component, list[Part]] = {component: [] for component in Component}
    for part in sorted(parts, key=preference):
        candidates[part.component].append(part)
    return {component: found for component, found in candidates.items() if found}


def companion(part: Part, candidates: Sequence[Part]) -> Part:
    """Return the candidate saved together with `part`: judged by file, then pipeline, then prefix."""
    is_prior = part.component is Component.STAGE_C

    def distance(candidate: Part) -> tuple[bool, bool, bool]:
        return (
            candidate.files != part.files,
            candidate.pipeline != part.pipeline,
            candidate.folder.name.startswith("prior") != is_prior,
        )

    return min(candidates, key=distance)


def by_kind(controlnets: Iterable[Part]) -> dict[str, Part]:
    """Return the preferred ControlNet of each kind; `controlnets` are in order of preference."""
    kinds: dict[str, Part] = {}
    for part in controlnets:
        config = part.config
        assert isinstance(config, ControlNetConfig)
        kinds.setdefault(config.kind, part)
    return kinds


def folder_beside(part: Part, names: Iterable[str], files: Iterable[str]) -> Path | None:
    """Return the first folder with a name of `names` and a file of `files`, in the pipeline or beside it."""
    for name in names:
        for place in (part.pipeline, part.pipeline.parent):
            if any((place / name / file).is_file() for file in files):
                return place / name
    return None


def are_equal(one: Part, other: Part) -> bool:
    """Tell whether two text encoders are the same file or files with the same bytes."""
    if one.files == other.files and one.component is other.component:
        return True
    if [file.stat().st_size for file in one.files] != [file.stat().st_size for file in other.files]:
        return False
    pairs = zip(one.files, other.files, strict=True)
    return all(filecmp.cmp(first, second, shallow=False) for first, second in pairs)


def stated_native_sizes(part: Part) -> list[list[int]]:
    """Return the list `native_sizes` of the pipeline's model_index.json; empty if there is none."""
    path = part.pipeline / "model_index.json"
    sizes = (read_json(path).get("native_sizes") or []) if path.is_file() else []
    for size in sizes if isinstance(sizes, list) else [sizes]:
        if not isinstance(size, list) or len(size) != 2:
            raise CheckpointError(f"{path}: native_sizes must be pairs of width and height, has {size!r}")
        try:
            check_size(*size)
        except InvalidSetting as error:
            raise CheckpointError(f"{path}: native_sizes has {size!r}: {error}") from error
        if size[0] % DRAWN_MULTIPLE or size[1] % DRAWN_MULTIPLE:
            raise CheckpointError(f"{path}: native_sizes has {size!r}: no multiples of {DRAWN_MULTIPLE}")
    return cast(list[list[int]], sizes)


def describe(part: Part) -> str:
    """Describe a part in one line for messages: component, variant, layout, dtype, place."""
    place = (
        part.files[0].relative_to(part.root) if part.is_single_file else part.folder.relative_to(part.root)
    )
    kind = str(part.dtype).removeprefix("torch.")
    return f"{part.component} ({variant_of(part)}, {part.layout} layout, {kind}) in {place}"


def variant_of(part: Part) -> str:
    """Return the publishers' name of this network size, "custom", or "damaged" if the shapes form none."""
    if part.component not in CONFIG_CLASSES:
        return _tower_variant(part)
    try:
        return variant_name(part.config)
    except CheckpointError:
        return "damaged"


def _tower_variant(part: Part) -> str:
    widths = {Component.TEXT_ENCODER: (1280, "ViT-bigG-14"), Component.IMAGE_ENCODER: (1024, "ViT-L-14")}
    width, name = widths[part.component]
    prefix = "text_model" if part.component is Component.TEXT_ENCODER else "vision_model"
    norm = part.tensors.get(f"{prefix}.encoder.layers.0.layer_norm1.weight")
    return name if norm and norm.shape == (width,) else "custom"


def _scan_folder(found: Scan, root: Path, folder: Path, files: Sequence[Path], named: Path | None) -> None:
    """Add the parts in `files`, the safetensors files of one folder, to `found`."""
    joined: set[Path] = set()
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        with _keeping_damage(found, named, files=()):
            shards = _shards(index)
            joined.update(shards)
            _add_parts(found, root, shards)
    for file in files:
        if file in joined:
            continue
        with _keeping_damage(found, named, files=(file,)):
            if match := re.search(r"-\d{5}-of-(\d{5})\.safetensors$", file.name):
                raise CheckpointError(
                    f"{file}: one of {int(match[1])} shards, but their index.json is missing"
                )
            _add_parts(found, root, (file,))


@contextmanager
def _keeping_damage(found: Scan, named: Path | None, files: Sequence[Path]) -> Iterator[None]:
    """Collect an error in `files` for later if the user has named another file and may not need these."""
    try:
        yield
    except CheckpointError as error:
        if named is None or named in files:
            raise
        found.damaged.append(error)


def _add_parts(found: Scan, root: Path, files: tuple[Path, ...]) -> None:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= open_weights(file)
    components = split_file(tensors)
    layout: Layout | None = "comfyui" if len(components) > 1 else None
    for component, stored in components.items():
        found.parts.append(Part(component, files, layout or detect_layout(stored), root, stored))
    if not components:
        found.unknown += files


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the files that an index.json joins."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: has no weight_map")
    files = sorted(set(map(str, names.values())))
    if outside := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{index}: points out of its folder: {outside[0]}")
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index}: {len(missing)} of {len(files)} shards are missing: {missing[0]}")
    return tuple(index.parent / name for name in files)


def _folders(path: Path, depth: int) -> Iterator[Path]:
    """Yield `path` and its sub-folders down to `depth`, except hidden ones and that of the LoRAs."""
    yield path
    if depth:
        for folder in sorted(path.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder.name != LORA_FOLDER:
                yield from _folders(folder, depth - 1)


def _missing(parts: Iterable[Part]) -> list[Component]:
    present = {part.component for part in parts}
    return [component for component in REQUIRED if component not in present]


def _from_siblings(folder: Path, missing: Sequence[Component]) -> list[Part]:
    """Return the missing parts from a sibling pipeline folder; none if several could be meant."""
    folder = folder.resolve()
    bringing, related = [], []
    for sibling in sorted(folder.parent.glob("*/model_index.json")):
        if sibling.parent == folder:
            continue
        is_related = _is_related(sibling.parent.name, folder.name)
        try:
            parts = scan(sibling.parent).parts
        except CheckpointError:
            if is_related:
                raise
            continue  # ignore damage in an unrelated sibling
        if {part.component for part in parts}.issuperset(missing):
            bringing.append(parts)
            related += [parts] if is_related else []
    choice = related if len(related) == 1 else bringing
    return choice[0] if len(choice) == 1 else []


def _is_related(name: str, other: str) -> bool:
    """Tell whether names differ only by their role, such as x and x-prior."""
    stems = [re.sub(r"[._-]?(prior|decoder)[._-]?", "", text.lower()) for text in (name, other)]
    return stems[0] == stems[1]


def _incomplete(path: Path, found: Scan, missing: Sequence[Component]) -> str:
    if not (found.parts or found.unknown or found.pickles or found.damaged):
        return f"{path}: holds no checkpoint: no .safetensors file lies here or up to two folders below"
    lines = [f"{path}: incomplete checkpoint"]
    lines += [f"  found: {describe(part)}" for part in found.parts[:12]] or ["  found: no component"]
    lines += [f"  damaged: {error}" for error in found.damaged[:6]]
    if found.unknown:
        lines.append(f"  not recognised: {', '.join(file.name for file in found.unknown[:6])}")
    if found.pickles:
        names = ", ".join(file.name for file in found.pickles[:6])
        lines.append(f"  refused: {names} (pickles run code when they are opened; use safetensors)")
    lines += [f"  missing: {component}, accepted are {_ACCEPTED[component]}" for component in missing]
    lines.append(
        "  ComfyUI's stable_cascade_stage_c and stable_cascade_stage_b.safetensors together do as well"
    )
    return "\n".join(lines)
