"""LoRAs in memory, and the combination of several, with scales, into the adapter of a row."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.checkpoints.stored import StoredTensor, open_weights, read_metadata
from cascade.errors import CheckpointError
from cascade.lora.formats import Entry, Layer, listed, read_contents
from cascade.models import Models
from cascade.networks.adapters import Adapter, Change, can_be_beside

_MAX_REGEX = 100  # characters
_NESTED = re.compile(r"[+*}?]\)[+*{]")  # repetition in repetition can take for ever
_MAX_SIDECAR = 1_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """The change of one layer in full precision: W + up down, with the file's own scale."""

    layer: Layer
    names: tuple[str, ...]  # of its tensors in the file
    down: Tensor  # (rank, in), kernels flattened
    up: Tensor  # (out, rank)
    magnitude: Tensor | None = None  # DoRA: (out, 1) or (1, in)


@dataclass(frozen=True, slots=True)
class Token:
    """A learned token: what is added to a row of the embedding table.

    The row of a new token starts from the mean of the rows whose tokens match `regex`.
    """

    index: int
    added: Tensor  # (d,)
    text: str | None = None  # None: the token is already in the vocabulary
    regex: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoRA:
    """A LoRA file, read and checked against the models that it is for."""

    path: Path
    pairs: tuple[Pair, ...]
    tokens: tuple[Token, ...] = ()

    @property
    def only_merged(self) -> list[str]:
        """Names of tensors that can only be merged: those of convolutions and of layers between levels."""
        return [
            name
            for pair in self.pairs
            if not pair.layer.is_text and not can_be_beside(pair.layer.path)
            for name in pair.names
        ]


def read_lora(path: Path, models: Models) -> LoRA:
    """Read a LoRA of any layout for the Stage C and the text encoder of `models`.

    The text and regex of new tokens come from the file's metadata, or from a JSON file of the same name
    beside it: `{"token": "[name]", "regex": "^dog</w>"}`, or a list of such under "tokens".

    Raises:
        CheckpointError: the file is unknown, ill-fitting or damaged; names the tensors.
    """
    contents = read_contents(path, open_weights(path), models)
    pairs = tuple(_pair(path, entry) for entry in contents.entries)
    tokens: tuple[Token, ...] = ()
    if contents.indices is not None and contents.embeddings is not None:
        indices = [int(index) for index in contents.indices.read()]
        rows = _finite(path, "embeddings.embeddings", contents.embeddings)
        tokens = tuple(_tokens(path, indices, rows, models))
    return LoRA(path, pairs, tokens)


def combine(models: Models, uses: Sequence[tuple[LoRA, float]], *, for_merging: bool = False) -> Adapter:
    """Combine LoRAs with scales into one adapter for a row; their changes add up.

    Args:
        for_merging: include layers that cannot be adapted by rows, and keep fp32.

    Raises:
        CheckpointError: a LoRA changes layers that cannot be adapted by rows; names the tensors.
    """
    for lora, _ in uses:
        if not for_merging and (names := lora.only_merged):
            raise CheckpointError(
                f"{lora.path}: must be merged into the weights, because it changes {listed(names)}"
            )
    changes: dict[str, list[Change]] = {}
    for lora, scale in uses:
        for pair in lora.pairs:
            changes.setdefault(pair.layer.path, []).append(_change(pair, scale, models))
    dtype, device = torch.float32 if for_merging else models.stage_c.dtype, models.device
    joined = {path: _sum(some) for path, some in changes.items()}
    beside = {p: c.to(dtype, device) for p, c in joined.items() if not _is_text(p)}
    words, rows = _learned(models, uses)
    text = {path: change.to(torch.float32, device) for path, change in joined.items() if _is_text(path)}
    return replace(Adapter.of(beside), text=text, words=words, rows=rows)


def _pair(path: Path, entry: Entry) -> Pair:
    down, up = (_finite(path, f"{entry.names[0]} ({part})", entry.parts[part]) for part in ("down", "up"))
    alpha, magnitude = entry.parts.get("alpha"), entry.parts.get("magnitude")
    scale = 1.0
    if entry.scale is not None:
        scale = entry.scale
    elif alpha is not None:
        scale = float(_finite(path, f"alpha beside {entry.names[0]}", alpha)) / len(down)
    gain = None
    if magnitude is not None:
        gain = _finite(path, f"the DoRA scale beside {entry.names[0]}", magnitude)
        gain = gain.view(-1, 1) if len(gain) == entry.layer.shape[0] else gain.view(1, -1)
    return Pair(entry.layer, tuple(entry.names), down.flatten(1), up.flatten(1) * scale, gain)


def _finite(path: Path, name: str, stored: StoredTensor) -> Tensor:
    """Read values in fp32; raise `CheckpointError` unless all are finite."""
    values = stored.read(torch.float32)
    if not values.isfinite().all():
        raise CheckpointError(f"{path}: {name} has values that are not finite")
    return values


def _change(pair: Pair, scale: float, models: Models) -> Change:
    """Return the change of a layer; for DoRA, the scaled W' - W with W' = m (W + up down) / |W + up down|."""
    device = models.device
    down, up = pair.down.to(device), pair.up.to(device)
    rows = columns = None
    if pair.magnitude is not None:
        weight = _weight(models, pair.layer)
        norm = (weight + up @ down).norm(dim=1 if pair.magnitude.shape[1] == 1 else 0, keepdim=True)
        gain = pair.magnitude.to(device) / (norm + torch.finfo(torch.float32).eps)
        if pair.magnitude.shape[1] == 1:
            up, rows = up * gain, scale * (gain[:, 0] - 1)
        else:
            down, columns = down * gain, scale * (gain - 1)
    change = Change(down, up * scale, rows, columns)
    return change if pair.layer.third is None else _lifted(change, pair.layer.third)


def _weight(models: Models, layer: Layer) -> Tensor:
    """Return the weight of a layer in fp32; for a third of a fused projection, its rows."""
    root = models.text_encoder.model if layer.is_text else models.stage_c
    name = layer.path + ("_weight" if layer.path.endswith(".in_proj") else ".weight")
    weight: Tensor = root.get_parameter(name).detach().float()
    return weight if layer.third is None else weight.chunk(3)[layer.third]


def _lifted(change: Change, third: int) -> Change:
    """Extend a change of queries, keys or values to the fused projection, with zeros elsewhere."""

    def among(part: Tensor) -> Tensor:
        nothing = torch.zeros_like(part)
        return torch.cat([part if index == third else nothing for index in range(3)])

    return Change(
        change.down,
        among(change.up),
        None if change.rows is None else among(change.rows),
        None if change.columns is None else among(change.columns),
    )


def _sum(changes: Sequence[Change]) -> Change:
    """Return one change that adds what all of `changes` add."""
    if len(changes) == 1:
        return changes[0]
    rows = [change.rows for change in changes if change.rows is not None]
    columns = [change.columns for change in changes if change.columns is not None]
    parts = max((len(each) for each in columns), default=1)
    return Change(
        torch.cat([change.down for change in changes]),
        torch.cat([change.up for change in changes], dim=1),
        torch.stack(rows).sum(0) if rows else None,
        torch.stack([each.expand(parts, -1) for each in columns]).sum(0) if columns else None,
    )


def _is_text(path: str) -> bool:
    return Layer(path, ()).is_text


def _tokens(path: Path, indices: Sequence[int], rows: Tensor, models: Models) -> Iterator[Token]:
    """Yield learned tokens; those beyond the vocabulary need a text and a regex, in the order of ids."""
    size = models.text_encoder.model.get_input_embeddings().num_embeddings
    if len(set(indices)) < len(indices) or any(index < 0 for index in indices):
        raise CheckpointError(f"{path}: embeddings.indices must be different and not negative")
    new = sorted(index for index in indices if index >= size)
    stated = _stated_tokens(path)
    if len(new) != len(stated):
        raise CheckpointError(
            f"{path}: has {len(new)} new tokens, but {len(stated)} are described; write "
            f'{{"tokens": [{{"token": "[name]", "regex": "^dog</w>"}}]}} to {path.with_suffix(".json").name}'
        )
    described = dict(zip(new, stated, strict=True))
    for index, row in zip(indices, rows, strict=True):
        yield Token(index, row, *described.get(index, (None, None)))


def _stated_tokens(path: Path) -> list[tuple[str, str]]:
    """Return text and regex of new tokens, from the JSON file beside the LoRA or its metadata."""
    stated: Any = read_metadata(path)
    sidecar = path.with_suffix(".json")
    try:
        if sidecar.is_file() and sidecar.stat().st_size <= _MAX_SIDECAR:
            stated = json.loads(sidecar.read_text(encoding="utf-8"))
        tokens = stated.get("tokens", [stated] if "token" in stated else [])
        tokens = json.loads(tokens) if isinstance(tokens, str) else tokens
        pairs = [(token["token"], token["regex"]) for token in tokens]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its learned tokens are described wrongly: {error}") from error
    for text, regex in pairs:
        if not isinstance(text, str) or not re.fullmatch(r"\S{1,64}", text):
            raise CheckpointError(f"{path}: the token {text!r} must be 1 to 64 characters without spaces")
        if not isinstance(regex, str) or len(regex) > _MAX_REGEX or _NESTED.search(regex):
            raise CheckpointError(
                f"{path}: the regex of {text} must have at most {_MAX_REGEX} characters "
                "and no repetition within a repetition"
            )
    return pairs


def _learned(
    models: Models, uses: Sequence[tuple[LoRA, float]]
) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Return the embedding rows of new tokens by text and of known ones by id, in the table's type."""
    if not any(lora.tokens for lora, _ in uses):
        return {}, {}
    encoder = models.text_encoder
    table = encoder.model.get_input_embeddings().weight.detach()
    words: dict[str, Tensor] = {}
    rows: dict[int, Tensor] = {}
    for lora, scale in uses:
        for token in lora.tokens:
            added = scale * token.added.to(table.device)
            if token.text is None:
                rows[token.index] = rows.get(token.index, table[token.index].float()) + added
            elif token.text in words:
                words[token.text] = words[token.text] + added
            else:
                assert token.regex is not None
                base = _base_row(lora.path, token.regex, encoder.tokenizer.get_vocab(), table)
                words[token.text] = base + added
    return (
        {text: row.to(table.dtype) for text, row in words.items()},
        {index: row.to(table.dtype) for index, row in rows.items()},
    )


def _base_row(path: Path, regex: str, vocabulary: Mapping[str, int], table: Tensor) -> Tensor:
    """Return the mean of the rows whose tokens the regex matches, in fp32."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise CheckpointError(f"{path}: the regex {regex!r} is none: {error}") from error
    found = sorted(index for text, index in vocabulary.items() if pattern.search(text) and index < len(table))
    if not found:
        raise CheckpointError(f"{path}: the regex {regex!r} matches no token of the vocabulary")
    return table[found].float().mean(dim=0)
