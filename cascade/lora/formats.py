"""Layouts of LoRA files, read into one form: the official one, kohya's, OneTrainer's and PEFT's.

Only headers are read here. Every tensor must belong to a layer of Stage C or of the text tower and fit it; an
error names those that do not. Attention layers are known in all three spellings of checkpoints.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

from torch import nn

from cascade.checkpoints.stored import StoredTensor
from cascade.errors import CheckpointError
from cascade.models import Models
from cascade.networks.blocks import AttentionWeights, Pointwise

MAX_RANK = 1024

Tensors: TypeAlias = Mapping[str, StoredTensor]
Part: TypeAlias = Literal["down", "up", "alpha", "magnitude"]

_PREFIXES = (
    *("lora_prior_unet_", "lora_prior_te_", "lora_unet_", "lora_te1_", "lora_te_"),
    *("base_model.model.", "model.diffusion_model.", "diffusion_model."),
    *("prior_text_encoder.", "text_encoder.", "prior_unet.", "prior.", "unet."),
)
_OFFICIAL = re.compile(r"weights\.(\d+)\.lora_(down|up)")
_PARTS: Sequence[tuple[re.Pattern[str], Part]] = (
    (re.compile(r"[._](?:lora_down|lora_A|lora\.down)(?:\.default)?(?:\.weight)?$"), "down"),
    (re.compile(r"[._](?:lora_up|lora_B|lora\.up)(?:\.default)?(?:\.weight)?$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.(?:dora_scale|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"), "magnitude"),
)
_INDICES, _EMBEDDINGS = "embeddings.indices", "embeddings.embeddings"
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight that can be changed. `third` is 0, 1, 2 for queries, keys, values of a fused projection."""

    path: str  # of its module, or of in_proj; in the text tower it begins with "text_"
    shape: tuple[int, ...]
    third: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether the layer belongs to the text tower."""
        return self.path.startswith(("text_model.", "text_projection"))


@dataclass(slots=True)
class Entry:
    """The tensors of a file for one layer."""

    layer: Layer
    names: list[str] = field(default_factory=list)
    parts: dict[Part, StoredTensor] = field(default_factory=dict)
    scale: float | None = None  # if the layout fixes it


@dataclass(frozen=True, slots=True)
class Contents:
    """A file's entries and its learned tokens: their ids, and what is added to their embedding rows."""

    entries: Sequence[Entry]
    indices: StoredTensor | None = None  # (n,)
    embeddings: StoredTensor | None = None  # (n, d)


def read_contents(path: Path, tensors: Tensors, models: Models) -> Contents:
    """Sort the tensors of a file by layer, whatever its layout; raise `CheckpointError` for misfits."""
    rest = {name: tensor for name, tensor in tensors.items() if name not in (_INDICES, _EMBEDDINGS)}
    if any(_OFFICIAL.fullmatch(name) for name in rest):
        entries = _official(path, rest, models)
    else:
        entries = _named(path, rest, models)
    for entry in entries:
        _check(path, entry)
    indices, embeddings = tensors.get(_INDICES), tensors.get(_EMBEDDINGS)
    if not entries and embeddings is None:
        raise CheckpointError(f"{path}: holds no LoRA")
    _check_embeddings(path, indices, embeddings, models)
    return Contents(entries, indices, embeddings)


def _official(path: Path, tensors: Tensors, models: Models) -> list[Entry]:
    """Read the official layout: output, then input projection of each attention as it runs; scale 1/rank."""
    found = {name: _OFFICIAL.fullmatch(name) for name in tensors}
    if strangers := [name for name, match in found.items() if match is None]:
        raise CheckpointError(f"{path}: unknown tensors beside weights.N.lora_down: {listed(strangers)}")
    layers = [
        Layer(f"{name}.{place}", shape)
        for name, weights in models.stage_c.named_modules()
        if isinstance(weights, AttentionWeights)
        for place, shape in (
            ("out_proj", tuple(weights.out_proj.weight.shape)),
            ("in_proj", tuple(weights.in_proj_weight.shape)),
        )
    ]
    entries = [Entry(layer) for layer in layers]
    for name, match in found.items():
        assert match
        if int(match[1]) >= len(entries):
            raise CheckpointError(
                f"{path}: {name} is one too many: Stage C has {len(layers)} weights of attention"
            )
        entry = entries[int(match[1])]
        entry.names.append(name)
        entry.parts["down" if match[2] == "down" else "up"] = tensors[name]
    if missing := [f"weights.{index}" for index, entry in enumerate(entries) if not entry.parts]:
        raise CheckpointError(f"{path}: made for another Stage C, tensors are missing: {listed(missing)}")
    for entry in entries:
        entry.scale = 1 / entry.parts["down"].shape[0] if _has_rows(entry.parts.get("down")) else None
    return entries


def _named(path: Path, tensors: Tensors, models: Models) -> list[Entry]:
    """Read a layout that names the layer of every tensor."""
    layers = dict(_layers(models))
    entries: dict[str, Entry] = {}
    strangers = []
    for name, tensor in tensors.items():
        split = _split(name)
        layer = _find(split[0], layers) if split else None
        if split is None or layer is None:
            strangers.append(name)
            continue
        entry = entries.setdefault(split[0], Entry(layer))
        entry.names.append(name)
        if entry.parts.setdefault(split[1], tensor) is not tensor:
            raise CheckpointError(f"{path}: {name} comes twice, in two spellings")
    if strangers:
        raise CheckpointError(
            f"{path}: tensors of no layer of Stage C or its text encoder: {listed(strangers)}; known are "
            "LoRA and DoRA in the official layout, kohya's, OneTrainer's and PEFT's"
        )
    places = [(entry.layer.path, entry.layer.third) for entry in entries.values()]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise CheckpointError(f"{path}: {twice[0]} comes twice, in two spellings")
    return list(entries.values())


def _split(name: str) -> tuple[str, Part] | None:
    """Split a tensor's name into the layer's name and the part; None if it ends like no part."""
    for pattern, part in _PARTS:
        if match := pattern.search(name):
            return name[: match.start()], part
    return None


def _find(name: str, layers: Mapping[str, Layer]) -> Layer | None:
    """Return the layer of a name in any spelling, with or without prefixes; None if there is none."""
    while name not in layers:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return layers[name]


def _layers(models: Models) -> Iterator[tuple[str, Layer]]:
    """Yield every spelling of every layer, with dots and with underscores."""
    for name, layer in _dotted(models):
        yield name, layer
        yield name.replace(".", "_"), layer


def _dotted(models: Models) -> Iterator[tuple[str, Layer]]:
    for name, module in models.stage_c.named_modules():
        if isinstance(module, AttentionWeights):
            yield from _attention(name, module)
        elif isinstance(module, nn.Linear | nn.Conv2d | Pointwise):
            yield name, Layer(name, tuple(module.weight.shape))
    tower = getattr(models.text_encoder, "model", None)
    for name, module in tower.named_modules() if isinstance(tower, nn.Module) else ():
        if isinstance(module, nn.Linear):
            yield name, Layer(name, tuple(module.weight.shape))


def _attention(name: str, module: AttentionWeights) -> Iterator[tuple[str, Layer]]:
    """Yield the projections in three spellings: fused, split as in diffusers, and split as in ComfyUI."""
    outer = name.removesuffix(".attn")
    rows, columns = module.in_proj_weight.shape
    fused = Layer(f"{name}.in_proj", (rows, columns))
    yield f"{name}.in_proj", fused
    yield f"{name}.in_proj_weight", fused
    for third, letter in enumerate("qkv"):
        part = Layer(f"{name}.in_proj", (rows // 3, columns), third)
        yield f"{outer}.to_{letter}", part
        yield f"{name}.to_{letter}", part
    out = Layer(f"{name}.out_proj", tuple(module.out_proj.weight.shape))
    for spelling in (f"{outer}.to_out.0", f"{outer}.to_out", f"{name}.to_out.0", f"{name}.to_out"):
        yield spelling, out


def _check(path: Path, entry: Entry) -> None:
    """Raise `CheckpointError` unless both factors are present and all parts fit the layer."""
    down, up = entry.parts.get("down"), entry.parts.get("up")
    if down is None or up is None:
        missing = "lora_down" if down is None else "lora_up"
        raise CheckpointError(f"{path}: {missing} is missing beside {listed(entry.names)}")
    shape = entry.layer.shape
    floating = all(part.dtype.is_floating_point for part in (down, up))
    is_pair = len(down.shape) >= 2 and len(up.shape) >= 2 and floating
    rank = down.shape[0] if is_pair else 0
    fits = is_pair and prod(down.shape[1:]) == prod(shape[1:]) and up.shape[0] == shape[0]
    if not fits or prod(up.shape[1:]) != rank:
        raise CheckpointError(
            f"{path}: {listed(entry.names)}: {list(down.shape)} and {list(up.shape)} are no factors of "
            f"{entry.layer.path} {list(shape)}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{path}: {listed(entry.names)}: the rank may be 1 to {MAX_RANK}, is {rank}")
    alpha, magnitude = entry.parts.get("alpha"), entry.parts.get("magnitude")
    if alpha is not None and prod(alpha.shape) != 1:
        raise CheckpointError(
            f"{path}: alpha beside {listed(entry.names)} must be one number, is {list(alpha.shape)}"
        )
    if magnitude is not None:
        by_row = magnitude.shape[:1] == shape[:1] and prod(magnitude.shape) == shape[0]
        by_column = magnitude.shape[:2] == (1, shape[1]) and prod(magnitude.shape) == shape[1]
        if not magnitude.dtype.is_floating_point or len(shape) != 2 or not (by_row or by_column):
            raise CheckpointError(
                f"{path}: the DoRA scale beside {listed(entry.names)} has the shape "
                f"{list(magnitude.shape)}, which does not fit {entry.layer.path} {list(shape)}"
            )


def _check_embeddings(
    path: Path, indices: StoredTensor | None, embeddings: StoredTensor | None, models: Models
) -> None:
    if indices is None and embeddings is None:
        return
    if indices is None or embeddings is None:
        raise CheckpointError(f"{path}: {_INDICES} and {_EMBEDDINGS} belong together, one is missing")
    width = models.stage_c.config.clip_text_in_channels
    fits = len(indices.shape) == 1 and embeddings.shape == (indices.shape[0], width)
    if not fits or indices.dtype.is_floating_point or not embeddings.dtype.is_floating_point:
        raise CheckpointError(
            f"{path}: {_INDICES} {list(indices.shape)} and {_EMBEDDINGS} {list(embeddings.shape)} should be "
            f"[n] whole numbers and [n, {width}]"
        )
    if indices.shape[0] > MAX_RANK:
        raise CheckpointError(f"{path}: {_INDICES}: at most {MAX_RANK} tokens, has {indices.shape[0]}")


def _has_rows(tensor: StoredTensor | None) -> bool:
    return tensor is not None and bool(tensor.shape) and tensor.shape[0] > 0


def listed(names: Iterable[str]) -> str:
    """List the first few names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
