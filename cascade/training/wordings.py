"""Trains the text tower to understand free wordings, with everything else frozen.

The teacher is Stage C with a plain caption, read by the tower as it was before; with a free wording of the
same meaning, read by the trained tower, it has to predict the same. So Stage C, and all that is trained on
top of it, stays as it is. The pooled embeddings have to agree, too: that teaches new words sooner than the
predictions do. Captions of the training are among the wordings, and so is the empty prompt.

The tower as it was is kept in RUN/plain_text.
"""

import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from cascade.checkpoints.load import load_network
from cascade.conditioning import TextEncoder
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import Caption, caption
from cascade.training.code import scene_code
from cascade.training.denoising import PRIOR_EMPHASIS, noise_batch
from cascade.training.drawing_codes import shares_right
from cascade.training.free_captions import filler, free_caption, mistyped, settle
from cascade.training.image_prompts import estimate_whitening, nothing
from cascade.training.loop import Plan, fit
from cascade.training.scenes import Scene, held_out_generator, sample_scene, sample_size
from cascade.training.stage_c import SCHEDULE, load_text_encoder, sample_codes

PLAN = Plan(
    steps=7000,
    learning_rate=2e-3,
    warmup=100,
    ema_decay=0.995,
    final_fraction=0.01,
    save_every=100,
    judge_every=500,
    seed=34,
)

_ROWS = 128  # whose pooled embeddings are compared ...
_DRAWN = 32  # ... and of these, whose predictions are
_POOLED = 0.1  # weight of the distance of the pooled embeddings
_POOLED_FIRST = 2000  # steps in which nothing else is compared
_MISTYPED = 0.06  # share of the wordings
_CASES = 120

Wordings = tuple[list[Scene], list[str], list[str]]  # scenes, what is said of them, the same in plain words


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train the tower of `run`/text_encoder against `run`/prior; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(run / "prior")).eval().requires_grad_(False)
    plain = run / "plain_text"
    if not plain.exists():
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(run / name, plain / name)
    teacher = load_text_encoder(plain)
    teacher.model.float()
    student = load_text_encoder(run)
    tower = CLIPTextModelWithProjection.from_pretrained(
        run / "text_encoder", attn_implementation="eager"
    ).float()
    schedule = CosineSchedule(SCHEDULE)
    whitening = estimate_whitening(teacher)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes, said, plainly = sample_wordings(rng, _ROWS, sample_size(rng))
        targets = teacher.encode(plainly)
        hidden, pooled = embed(module, student, said, "longest" if step < _POOLED_FIRST else "max_length")
        distance = ((pooled - targets.pooled.clone()) @ whitening).square().mean()
        if step < _POOLED_FIRST:
            return _POOLED * distance, {"pooled": float(distance.detach())}
        drawn = slice(0, _DRAWN)
        codes = torch.from_numpy(np.stack([scene_code(scene) for scene in scenes[drawn]]))
        batch = noise_batch(codes, schedule, PRIOR_EMPHASIS, rng)
        image = nothing(stage).expand(_DRAWN, -1, -1)
        with torch.no_grad():
            told = stage.prepare(targets.hidden[drawn].clone(), targets.pooled[drawn].clone(), image)
            taught = batch.implied(stage(batch.latents, batch.ratio, told))
        own = stage.prepare(hidden[drawn], pooled[drawn], image)
        predicted = batch.implied(stage(batch.latents, batch.ratio, own))
        apart = ((predicted - taught).square().mean((1, 2, 3)) * batch.weight).mean()
        figures = {"predictions": float(apart.detach()), "pooled": float(distance.detach())}
        return apart + _POOLED * distance, figures

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, CLIPTextModelWithProjection)
        module.save_pretrained(run / "text_encoder")
        return judge(stage, TextEncoder(student.tokenizer, deepcopy(module)), schedule)

    fit(tower, loss, plan, run / "wordings", title="wordings", judge=report)


def sample_wordings(rng: np.random.Generator, count: int, size: tuple[int, int]) -> Wordings:
    """Sample scenes, wordings of them and plain captions of the same meaning.

    One in eight is a caption of the training, one in thirty-two empty, and another names nothing. Some have a
    typing error.
    """
    scenes, said, plainly = [], [], []
    for index in range(count):
        scene = sample_scene(rng, size)
        if index % 32 < 2:
            words, plain = ("", filler(rng))[index % 32], ""
        else:
            stated = caption(scene, rng) if index % 8 == 2 else free_caption(scene, rng)
            scene, plain = settle(scene, stated)
            words = mistyped(stated.text, rng) if rng.random() < _MISTYPED else stated.text
        scenes.append(scene)
        said.append(words)
        plainly.append(plain)
    return scenes, said, plainly


def embed(
    tower: nn.Module, text: TextEncoder, texts: list[str], padding: str = "max_length"
) -> tuple[Tensor, Tensor]:
    """Return hidden states (b, n, d) and pooled embeddings (b, 1, d) of texts, differentiable."""
    tokens = text.tokenizer(
        texts, padding=padding, max_length=text.max_tokens, truncation=True, return_tensors="pt"
    )
    output = tower(**tokens, output_hidden_states=True)
    return output.hidden_states[-1], output.text_embeds.unsqueeze(1)


@torch.no_grad()
def judge(stage: StageC, text: TextEncoder, schedule: CosineSchedule) -> dict[str, float]:
    """Return the shares of held-out wordings, plain and free, whose sampled code reads right."""
    rng = held_out_generator(10)
    figures: dict[str, float] = {}
    for name, wording in (("plain", caption), ("free", free_caption)):
        scenes = [sample_scene(rng) for _ in range(_CASES)]
        captions = [wording(scene, rng) for scene in scenes]
        settled = [settle(*pair)[0] for pair in zip(scenes, captions, strict=True)]
        codes = sample_codes(stage, text, schedule, [stated.text for stated in captions], 4.0)
        stated = [Caption(each.text, {"background": "stated"}) for each in captions]
        shares = shares_right(codes, settled, stated)
        figures |= {f"{name} {key.removeprefix('right_')}": share for key, share in shares.items()}
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
