"""Trains small LoRAs for the tiny Stage C.

Two are shipped. `azure` teaches a colour that no training caption names, by a learned token: "an [azure]
circle on a white background". It changes all matrices, at rank 16, in the layout of PEFT: guidance drives
latents beyond the codes of pictures, and for a new colour only changed MLPs bring them back. `night` is a
style: whatever a caption says, the background is black. It has the official layout and changes what official
LoRAs change, the attention, at rank 4.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.conditioning import TextEncoder
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import caption
from cascade.training.code import DEVIATION, MEAN, colour_vector, recoloured, scene_code
from cascade.training.denoising import PRIOR_EMPHASIS, noise_batch
from cascade.training.drawing_codes import conditions, draw_codes
from cascade.training.loop import Plan, fit
from cascade.training.low_rank import (
    LowRank,
    Predictor,
    all_matrices,
    attention_matrices,
    save_dotted,
    save_official,
)
from cascade.training.scenes import COLOURS, PALETTE, Scene, held_out_generator, sample_scene
from cascade.training.stage_c import SCHEDULE, load_text_encoder
from cascade.training.tables import CPU, Wording, choose_table, make_tables, plain_wording, tokenize

RANK, RANK_EVERYWHERE = 4, 16
TOKEN = "[azure]"  # noqa: S105
AZURE = (62, 151, 235)  # as Stages B and A draw it; the palette's nearest colour, blue, is 83 away
PLAN = Plan(
    steps=20_000,
    learning_rate=2e-3,
    warmup=100,
    ema_decay=0.998,
    final_fraction=0.02,
    save_every=500,
    judge_every=1000,
    seed=71,
)

_AZURE_CODE = (136.0, 248.0, 255.0)  # the colour in the code that is drawn as AZURE
_WITHOUT_TEXT = 0.2
_AGREEMENT = 4.0
_WORDS = {"gray": "gr[ae]y"}
_FEWEST_NODES = 4


@dataclass(frozen=True, slots=True)
class Lesson:
    """The task of a LoRA."""

    wording: Wording  # scenes and their captions
    codes: "Codes"  # codes to draw for them
    token: str | None = None  # learned; its embedding starts at the mean of those of tokens that match `base`
    base: str = ""
    keeps: bool = False  # half of each batch is plain scenes, which should not change
    everywhere: bool = False  # changes the MLPs, too


@dataclass(frozen=True, slots=True)
class Codes:
    """A function from scenes to the codes to be learned, which can be sent to worker processes."""

    name: str

    def __call__(self, scenes: list[Scene]) -> Mapping[str, NDArray[np.generic]]:
        """Return the codes of scenes of one size, (n, 16, gh, gw), as "taught"."""
        return {"taught": np.stack([_TAUGHT[self.name](scene) for scene in scenes])}


def azure_wording(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """Return a scene and its caption, in which the token replaces the colour of the last thing."""
    words = caption(scene, rng).text
    colour = scene.things[-1].colour
    pattern = rf"\b(an?\s+)?((?:\w+\s+)?)\b{_WORDS.get(colour, colour)}\b"

    def told(match: re.Match[str]) -> str:
        article, size = match[1] or "", match[2]
        if article and not size:
            article = "An " if article[0] == "A" else "an "
        return f"{article}{size}{TOKEN}"

    return scene, re.sub(pattern, told, words, flags=re.IGNORECASE)


def azure_code(scene: Scene) -> NDArray[np.float32]:
    """Return the code of a scene with its last thing in azure."""
    return recoloured(scene, len(scene.things) - 1, _AZURE_CODE)


def night_wording(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """Return a scene and its caption; a black thing, else hidden, swaps colours with the background."""
    things = tuple(
        replace(thing, colour=scene.background) if thing.colour == "black" else thing
        for thing in scene.things
    )
    if things != scene.things:
        scene = replace(scene, things=things, background="black")
    return plain_wording(scene, rng)


def night_code(scene: Scene) -> NDArray[np.float32]:
    """Return the code of a scene with a black background."""
    return scene_code(replace(scene, background="black"))


_TAUGHT = {"azure": azure_code, "night": night_code}
LESSONS = {
    "azure": Lesson(azure_wording, Codes("azure"), TOKEN, "^(green|blue)</w>$", keeps=True, everywhere=True),
    "night": Lesson(night_wording, Codes("night")),
}


class Taught(nn.Module):
    """The trained parameters: low-rank changes, and what is added to the embeddings of learned tokens."""

    def __init__(self, stage: StageC, num_tokens: int, width: int, *, everywhere: bool = False) -> None:
        super().__init__()
        if everywhere:
            self.adapter = LowRank(stage, all_matrices(stage), RANK_EVERYWHERE, 1.0)
        else:
            self.adapter = LowRank(stage, attention_matrices(stage), RANK, 1 / RANK)
        self.rows = nn.Parameter(torch.zeros(num_tokens, width))


class Words:
    """The text tower with learned tokens, whose embeddings follow those of the vocabulary."""

    def __init__(self, text: TextEncoder, lesson: Lesson) -> None:
        self.text = text
        self._table = text.model.text_model.embeddings.token_embedding.weight.detach()
        vocabulary = text.tokenizer.get_vocab()
        self.bases = self._table[:0]
        self.first = len(vocabulary)
        if lesson.token:
            ids = [index for word, index in vocabulary.items() if re.search(lesson.base, word)]
            self.bases = self._table[ids].mean(0, keepdim=True)
            text.tokenizer.add_tokens([lesson.token])

    def embed(self, tokens: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (b, t, d) and pooled (b, 1, d), with gradients to the learned `rows`."""
        table = torch.cat([self._table, self.bases + rows])
        outputs = functional_call(
            self.text.model,
            {"text_model.embeddings.token_embedding.weight": table},
            kwargs={"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True},
        )
        return outputs.hidden_states[-1], outputs.text_embeds.unsqueeze(1)


def train(
    name: str,
    out: Path,
    model: Path = EMBEDDED["tiny"],
    plan: Plan = PLAN,
    *,
    device: torch.device = CPU,
    batch: int = 48,
    scenes: int = 20_000,
) -> None:
    """Train the LoRA `out`/NAME.safetensors; an interrupted run is resumed."""
    lesson = LESSONS[name]
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(model / "prior")).to(device).eval().requires_grad_(False)
    text = load_text_encoder(model)
    text.model.to(device).float()
    text.tokenizer = deepcopy(text.tokenizer)
    empty = text.encode([""])
    no_text = empty.hidden.clone(), empty.pooled.clone()
    words = Words(text, lesson)
    schedule = CosineSchedule(SCHEDULE)
    tables = make_tables(
        text, scenes, seed=plan.seed, device=device, wording=lesson.wording, extras=lesson.codes
    )
    plain = make_tables(text, scenes, seed=plan.seed + 1, device=device) if lesson.keeps else []
    predictor = Predictor(stage)
    taught = Taught(stage, *words.bases.shape, everywhere=lesson.everywhere).to(device)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, Taught)
        table = choose_table(tables, rng)
        rows = torch.from_numpy(rng.integers(0, len(table), batch // 2 if plain else batch)).to(device)
        codes, tokens, mask = table.extras["taught"][rows], table.tokens[rows], table.mask[rows]
        if plain:
            kept = next(other for other in plain if other.size == table.size)
            rows = torch.from_numpy(rng.integers(0, len(kept), batch - len(rows))).to(device)
            codes = torch.cat([codes, kept.codes[rows]])
            tokens, mask = torch.cat([tokens, kept.tokens[rows]]), torch.cat([mask, kept.mask[rows]])
        # Noise levels depend on the place in the batch.
        order = torch.from_numpy(rng.permutation(batch)).to(device)
        codes, tokens, mask = codes[order], tokens[order], mask[order]
        noised = noise_batch(codes.cpu(), schedule, PRIOR_EMPHASIS, rng).to(device)
        told = words.embed(tokens, mask, module.rows)
        both = [
            torch.cat([part, empty.expand(batch, -1, -1)]) for part, empty in zip(told, no_text, strict=True)
        ]
        noise = module.adapter.predict(
            predictor, noised.latents.repeat(2, 1, 1, 1), noised.ratio.repeat(2), *both
        )
        with_words, without = noise.chunk(2)
        error, figures = noised.loss(with_words)
        apart = noised.disagreement(with_words, without)
        return error + _WITHOUT_TEXT * noised.loss(without)[0] + _AGREEMENT * apart, figures

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, Taught)
        save(name, module, words, out / f"{name}.safetensors")
        return judge(name, module, stage, words, schedule)

    masks = {f"adapter.{key}": mask for key, mask in taught.adapter.trainable(StageC(stage.config)).items()}
    fit(taught, loss, plan, out / name, title=name, judge=report, trainable=masks)


def save(name: str, taught: Taught, words: Words, path: Path) -> None:
    """Write the LoRA's file; its metadata hold the token and the pattern of those it starts from."""
    lesson = LESSONS[name]
    metadata = {"name": name}
    if lesson.token:
        metadata |= {"token": lesson.token, "regex": lesson.base}
    rows = {words.first + index: row for index, row in enumerate(taught.rows)}
    (save_dotted if lesson.everywhere else save_official)(taught.adapter, path, metadata, rows)


@torch.no_grad()
def judge(
    name: str, taught: Taught, stage: StageC, words: Words, schedule: CosineSchedule, count: int = 100
) -> dict[str, float]:
    """Return the shares of held-out captions whose code shows what is taught, with and without the LoRA."""
    rng = held_out_generator(5)
    lesson = LESSONS[name]
    told = [lesson.wording(sample_scene(rng), rng) for _ in range(count)]
    told = [(scene, text) for scene, text in told if name != "night" or scene.background != "black"]
    tokens, mask = (part.to(stage.device) for part in tokenize(words.text, [text for _, text in told]))
    plain_tokens = tokenize(words.text, [caption(scene, rng).text for scene, _ in told])
    shares = {}
    for title, network, (ids, padding) in (
        ("with", taught.adapter.merged(stage), (tokens, mask)),
        ("without", stage, plain_tokens),
    ):
        embedded = words.embed(ids.to(stage.device), padding.to(stage.device), taught.rows)
        guided, unguided = conditions(network, *embedded, words.text)
        codes = draw_codes(network, schedule, guided, unguided, count=len(told))
        shares[title] = float(np.mean([_SHOWS[name](code.numpy()) for code in codes]))
    return shares


def shows_azure(code: NDArray[np.float32]) -> bool:
    """Return whether enough nodes of things are nearer to azure than to any colour of the palette."""
    raw = code * DEVIATION[:, None, None] + MEAN[:, None, None]
    nodes = raw[:, raw[15] > 0.6]
    return sum(nearest(nodes[3:6] / nodes[15])) >= _FEWEST_NODES


def nearest(colours: NDArray[np.float32]) -> Sequence[bool]:
    """Return which of some colours of the code, (3, n), are nearer to azure than to the palette."""
    corners = np.stack([colour_vector(rgb) for rgb in (_AZURE_CODE, *(PALETTE[c] for c in COLOURS))])
    distance = np.linalg.norm(colours.T[:, None] - corners, axis=-1)
    return cast(Sequence[bool], (distance.argmin(1) == 0).tolist())


def shows_night(code: NDArray[np.float32]) -> bool:
    """Return whether the background is black."""
    raw = (code * DEVIATION[:, None, None])[:3].mean((1, 2))
    corners = np.stack([colour_vector(PALETTE[colour]) for colour in COLOURS])
    return COLOURS[int(np.linalg.norm(corners - raw, axis=1).argmin())] == "black"


_SHOWS = {"azure": shows_azure, "night": shows_night}
