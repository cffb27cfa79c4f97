"""Scenes drawn once by several processes, so that neither a GPU nor the trainers wait for them.

A table holds scenes of one size: their codes, one caption each as token ids, and, where a trainer asks for
them, further arrays made from the rendered pictures.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade.conditioning import TextEncoder
from cascade.training.captions import caption
from cascade.training.code import scene_code
from cascade.training.scenes import NATIVE_SIZES, SQUARE_SIZE, Scene, sample_scene

Size = tuple[int, int]  # width, height in pixels
# Scenes of one size -> further arrays by name, with one row per scene.
Extras = Callable[[list[Scene]], Mapping[str, NDArray[np.generic]]]
# A scene, a random generator -> the scene and the words to train on.
Wording = Callable[[Scene, np.random.Generator], tuple[Scene, str]]

CPU = torch.device("cpu")

_CHUNK = 250
_SQUARE_SHARE = 0.8
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Table:
    """Scenes of one size, one row each, on the device of the training."""

    size: Size
    codes: Tensor  # (n, 16, gh, gw)
    tokens: Tensor  # (n, longest prompt): token ids of the captions
    mask: Tensor  # (n, longest prompt): 1 up to the end token
    extras: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.codes)


def plain_wording(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """Return the scene and a caption of it."""
    return scene, caption(scene, rng).text


def make_tables(
    text: TextEncoder,
    count: int,
    *,
    seed: int,
    device: torch.device,
    wording: Wording = plain_wording,
    extras: Extras | None = None,
    sizes: tuple[Size, ...] = NATIVE_SIZES,
    workers: int | None = None,
) -> list[Table]:
    """Make tables of `count` scenes in all, four fifths of them square if there are other `sizes`.

    `wording` and `extras` run in worker processes (unless `workers` is 0), so they must be picklable.
    """
    others = [size for size in sizes if size != SQUARE_SIZE]
    num_square = int(count * _SQUARE_SHARE) if others else count
    counts = {SQUARE_SIZE: num_square} | {size: (count - num_square) // len(others) for size in others}
    jobs = [
        (size, min(_CHUNK, number - start), (seed, index, start), wording, extras)
        for index, (size, number) in enumerate(counts.items())
        for start in range(0, number, _CHUNK)
    ]
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) // 3)) if workers is None else workers
    if workers:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread) as pool:
            parts = list(pool.map(_draw, jobs))
    else:
        parts = [_draw(job) for job in jobs]
    return [
        _table(size, [part for job, part in zip(jobs, parts, strict=True) if job[0] == size], text, device)
        for size in counts
        if counts[size]
    ]


def choose_table(tables: list[Table], rng: np.random.Generator) -> Table:
    """Choose one of the tables at random, each with a chance proportional to its number of scenes."""
    lengths = np.array([len(table) for table in tables], float)
    return tables[int(rng.choice(len(tables), p=lengths / lengths.sum()))]


@torch.no_grad()
def embed_table(text: TextEncoder, table: Table) -> tuple[Tensor, Tensor]:
    """Return the text tower's embeddings of a table's captions: hidden (n, t, d), pooled (n, 1, d)."""
    parts = [
        run_tower(text, tokens, mask)
        for tokens, mask in zip(
            torch.split(table.tokens, _TEXTS_AT_ONCE), torch.split(table.mask, _TEXTS_AT_ONCE), strict=True
        )
    ]
    return torch.cat([hidden for hidden, _ in parts]), torch.cat([pooled for _, pooled in parts])


def run_tower(text: TextEncoder, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token ids (b, t) as `TextEncoder.encode`, with gradients: hidden (b, t, d), pooled (b, 1, d)."""
    outputs = text.model.text_model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    first_end = (tokens == text.tokenizer.eos_token_id).int().argmax(dim=-1)
    rows = torch.arange(len(tokens), device=tokens.device)
    pooled = text.model.text_projection(outputs.last_hidden_state[rows, first_end])
    return outputs.hidden_states[-1], pooled.unsqueeze(1)


def tokenize(text: TextEncoder, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and padding mask, (b, t) each."""
    tokens = text.tokenizer(
        prompts, padding="max_length", max_length=text.max_tokens, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask


def _one_thread() -> None:
    torch.set_num_threads(1)


_Job = tuple[Size, int, tuple[int, int, int], Wording, Extras | None]
_Part = tuple[NDArray[np.float32], list[str], dict[str, NDArray[np.generic]]]


def _draw(job: _Job) -> _Part:
    size, count, seed, wording, extras = job
    rng = np.random.default_rng(seed)
    told = [wording(sample_scene(rng, size), rng) for _ in range(count)]
    scenes = [scene for scene, _ in told]
    codes = np.stack([scene_code(scene) for scene in scenes])
    return codes, [words for _, words in told], dict(extras(scenes)) if extras else {}


def _table(size: Size, parts: list[_Part], text: TextEncoder, device: torch.device) -> Table:
    tokens, mask = tokenize(text, [words for _, prompts, _ in parts for words in prompts])
    codes = torch.from_numpy(np.concatenate([codes for codes, _, _ in parts]))
    names = parts[0][2]
    extras = {
        name: torch.from_numpy(np.concatenate([extra[name] for _, _, extra in parts])).to(device)
        for name in names
    }
    return Table(size, codes.to(device), tokens.to(device), mask.to(device), extras)
