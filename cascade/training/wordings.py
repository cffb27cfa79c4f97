"""Trains the text tower to understand free wordings, with everything else frozen.

The teacher is Stage C with a plain caption, read by the tower as it was before; with a free wording of the
same meaning, read by the trained tower, it has to predict the same. So Stage C, and all that is trained on
top of it, stays as it is. The pooled embeddings have to agree, too: that teaches new words sooner than the
predictions do. Captions of the training are among the wordings, and so is the empty prompt.
"""

import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascade.checkpoints.load import load_network
from cascade.conditioning import TextEncoder
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import caption
from cascade.training.code import read_code, scene_code
from cascade.training.denoising import PRIOR_EMPHASIS, noise_batch
from cascade.training.free_captions import filler, free_caption, mistyped, settle
from cascade.training.image_prompts import estimate_whitening, nothing
from cascade.training.loop import Plan, fit
from cascade.training.scenes import SQUARE_SIZE, Scene, held_out_generator, sample_scene, sample_size
from cascade.training.stage_c import SCHEDULE, load_text_encoder, sample_codes

FREE_TEXT_ENCODER = "free_text_encoder"  # folder in a run
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
_MISTYPED = 0.12  # share of the wordings
_CASES = 120

Wordings = tuple[list[Scene], list[str], list[str]]  # scenes, what is said of them, the same in plain words


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train on from `run`/text_encoder and write `run`/free_text_encoder; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(run / "prior")).eval().requires_grad_(False)
    teacher = load_text_encoder(run)
    teacher.model.float()
    student = CLIPTextModelWithProjection.from_pretrained(
        run / "text_encoder", attn_implementation="eager"
    ).float()
    schedule = CosineSchedule(SCHEDULE)
    whitening = estimate_whitening(teacher)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes, said, plainly = sample_wordings(rng, _ROWS, sample_size(rng))
        targets = teacher.encode(plainly)
        hidden, pooled = embed(module, teacher.tokenizer, said, fills_window=step >= _POOLED_FIRST)
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
        module.save_pretrained(run / FREE_TEXT_ENCODER)
        return judge(stage, TextEncoder(teacher.tokenizer, module), schedule)

    fit(student, loss, plan, run / "wordings", title="wordings", judge=report)


def sample_wordings(rng: np.random.Generator, count: int, size: tuple[int, int]) -> Wordings:
    """Sample scenes, wordings of them and plain captions of the same meaning.

    One in four is a caption of the training, one in thirty-two empty, and another names nothing. Some have a
    typing error.
    """
    scenes, said, plainly = [], [], []
    for index in range(count):
        scene = sample_scene(rng, size)
        if index % 32 < 2:
            words, plain = ("", filler(rng))[index % 32], ""
        else:
            stated = caption(scene, rng) if index % 4 == 2 else free_caption(scene, rng)
            scene, plain = settle(scene, stated)
            words = mistyped(stated.text, rng) if rng.random() < _MISTYPED else stated.text
        scenes.append(scene)
        said.append(words)
        plainly.append(plain)
    return scenes, said, plainly


def embed(
    tower: nn.Module, tokenizer: CLIPTokenizer, texts: list[str], *, fills_window: bool = True
) -> tuple[Tensor, Tensor]:
    """Return hidden states (b, n, d) and pooled embeddings (b, 1, d) of texts, differentiable.

    Args:
        fills_window: n is the tokenizer's window; otherwise the length of the longest text, if shorter.
    """
    padding = "max_length" if fills_window else "longest"
    tokens = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    output = tower(**tokens, output_hidden_states=True)
    return output.hidden_states[-1], output.text_embeds.unsqueeze(1)


@torch.no_grad()
def judge(stage: StageC, text: TextEncoder, schedule: CosineSchedule) -> dict[str, float]:
    """Return the shares of held-out wordings, plain and free, whose sampled code reads right."""
    rng = held_out_generator(10)
    shares: dict[str, float] = {}
    for name, wording in (("plain", caption), ("free", free_caption)):
        scenes = [sample_scene(rng) for _ in range(_CASES)]
        captions = [wording(scene, rng) for scene in scenes]
        asked = [settle(*pair)[0] for pair in zip(scenes, captions, strict=True)]
        codes = sample_codes(stage, text, schedule, [stated.text for stated in captions], 4.0)
        right = [
            _summary(read_code(code.numpy(), SQUARE_SIZE)) == _summary(scene)
            for code, scene in zip(codes, asked, strict=True)
        ]
        for count in (1, 2):
            chosen = [
                is_right for scene, is_right in zip(asked, right, strict=True) if len(scene.things) == count
            ]
            shares[f"{name} {count}"] = round(float(np.mean(chosen)), 3) if chosen else 0.0
    return shares


def _summary(scene: Scene) -> tuple[str, list[tuple[str, str]], bool]:
    """Return the background, what stands there in order, and whether it is stacked."""
    things = [(thing.colour, thing.shape) for thing in scene.in_order()]
    return scene.background, things, len(things) == 2 and scene.is_stacked


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
