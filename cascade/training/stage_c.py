"""Trains the tiny Stage C: from a caption to the semantic code of a scene.

Codes need no pictures, so every step draws fresh scenes and wordings. Judge the run by the scenes read back
from sampled codes: every `judge_every` steps the shares of right ones are printed.
"""

import shutil
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from cascade.checkpoints.save import save_component
from cascade.conditioning import ImageEncoder, TextEncoder
from cascade.config import ScheduleConfig, StageCConfig
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import caption
from cascade.training.code import read_code, scene_code
from cascade.training.denoising import PRIOR_EMPHASIS, noise_batch
from cascade.training.drawing_codes import conditions, draw_codes, held_out, shares_right
from cascade.training.loop import Plan, fit
from cascade.training.preconditioning import precondition
from cascade.training.scenes import (
    SQUARE_SIZE,
    Scene,
    render,
    sample_scene,
    sample_size,
)

TINY_STAGE_C = StageCConfig(
    timestep_ratio_embedding_dim=32,
    conditioning_dim=128,
    block_out_channels=(96, 96),
    num_attention_heads=(3, 3),
    down_num_layers_per_block=(2, 2),
    up_num_layers_per_block=(2, 2),
    clip_text_in_channels=128,
    clip_text_pooled_in_channels=128,
    clip_image_in_channels=128,
    dropout=(0.0, 0.0),
)
SCHEDULE = ScheduleConfig(clamp_min=0.005)
PLAN = Plan(
    steps=10400,
    learning_rate=1.5e-3,
    matrix_rate=7e-3,
    compute_dtype=torch.bfloat16,
    save_every=250,
    judge_every=500,
    seed=31,
)

_BATCH = 48  # rows, each with text and without
_PAIR = 100.0
_WITHOUT_TEXT = 0.2  # weight of the predictions without text
_AGREEMENT = 4.0  # weight of the distance between the two
_WITH_IMAGE = 0.08


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train against the towers in `run` and write `run`/prior; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    stage = StageC(TINY_STAGE_C)
    schedule = CosineSchedule(SCHEDULE)
    trainable = precondition(stage, schedule, _PAIR)
    text, images = load_text_encoder(run), load_image_encoder(run)
    empty = text.encode([""])
    no_text = (
        empty.hidden.clone(),
        empty.pooled.clone(),
        torch.zeros(1, 1, TINY_STAGE_C.clip_image_in_channels),
    )
    without = [part.expand(_BATCH, -1, -1) for part in no_text]
    # Most batches have one shape, whose step is compiled; that needs a C++ compiler.
    compiled = torch.compile(_predict, dynamic=False) if shutil.which("g++") else _predict

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, StageC)
        size = sample_size(rng)
        scenes = [sample_scene(rng, size) for _ in range(_BATCH)]
        batch = noise_batch(_codes(scenes), schedule, PRIOR_EMPHASIS, rng)
        predict = compiled if size == SQUARE_SIZE else _predict
        conditions = map(torch.cat, zip(embed(scenes, text, images, rng), without, strict=True))
        noise = predict(module, batch.latents.repeat(2, 1, 1, 1), batch.ratio.repeat(2), *conditions)
        told, untold = noise.chunk(2)
        error, figures = batch.loss(told)
        apart = batch.disagreement(told, untold)
        error = error + _WITHOUT_TEXT * batch.loss(untold)[0] + _AGREEMENT * apart
        return error, figures | {"apart": float(apart.detach())}

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, StageC)
        figures = judge(module, text, schedule)
        save_component(module, run / "prior")
        return figures

    fit(stage, loss, plan, run / "stage_c", title="Stage C", judge=report, trainable=trainable)


def _predict(
    stage: StageC, latents: Tensor, ratio: Tensor, text: Tensor, pooled: Tensor, image_embeds: Tensor
) -> Tensor:
    return cast(Tensor, stage(latents, ratio, stage.prepare(text, pooled, image_embeds)))


def embed(
    scenes: list[Scene], text: TextEncoder, images: ImageEncoder | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed captions and, for some rows, the picture, most of these without words."""
    words = [caption(scene, rng).text for scene in scenes]
    shown = np.flatnonzero(rng.random(len(scenes)) < _WITH_IMAGE) if images else np.empty(0, int)
    for index in shown:
        words[index] = words[index] if rng.random() < 0.3 else ""
    embeddings = text.encode(words)
    image_embeds = torch.zeros(len(scenes), 1, TINY_STAGE_C.clip_image_in_channels)
    if images and len(shown):
        pictures = [Image.fromarray(render(scenes[index])) for index in shown]
        image_embeds[torch.from_numpy(shown)] = images.encode(pictures).clone()
    return embeddings.hidden.clone(), embeddings.pooled.clone(), image_embeds


@torch.no_grad()
def judge(
    stage: StageC, text: TextEncoder, schedule: CosineSchedule, count: int = 120, guidance_scale: float = 4.0
) -> dict[str, float]:
    """Return the shares of held-out captions whose sampled code reads right, and of stated sides that do."""
    scenes, captions = held_out(count)
    codes = sample_codes(stage, text, schedule, [stated.text for stated in captions], guidance_scale)
    sides: list[bool] = []
    for code, scene, stated in zip(codes, scenes, captions, strict=True):
        found, wanted = (
            [(thing.shape, thing.colour) for thing in each.in_order()]
            for each in (read_code(code.numpy(), SQUARE_SIZE), scene)
        )
        if len(wanted) == 2 and sorted(found) == sorted(wanted) and "near_shape" in stated.facts:
            sides.append(found == wanted)
    figures = shares_right(codes, scenes, captions)
    return figures | ({"sides": round(float(np.mean(sides)), 3)} if sides else {})


def sample_codes(
    stage: StageC,
    text: TextEncoder,
    schedule: CosineSchedule,
    prompts: list[str],
    guidance_scale: float,
    first_seed: int = 0,
) -> list[Tensor]:
    """Draw codes (16, 6, 6) for `prompts` in 20 steps."""
    embeddings = text.encode(prompts)
    guided, unguided = conditions(stage, embeddings.hidden, embeddings.pooled, text)
    return draw_codes(
        stage,
        schedule,
        guided,
        unguided,
        guidance_scale=guidance_scale,
        first_seed=first_seed,
        count=len(prompts),
    )


def load_text_encoder(run: Path) -> TextEncoder:
    """Load the frozen text tower of a training run."""
    model = CLIPTextModelWithProjection.from_pretrained(run / "text_encoder").eval().requires_grad_(False)
    return TextEncoder(CLIPTokenizer.from_pretrained(run / "tokenizer"), model)


def load_image_encoder(run: Path) -> ImageEncoder | None:
    """Load the frozen vision tower of a training run, if it is there yet."""
    if not (run / "feature_extractor").exists():
        return None
    model = CLIPVisionModelWithProjection.from_pretrained(run / "image_encoder").eval().requires_grad_(False)
    return ImageEncoder(AutoImageProcessor.from_pretrained(run / "feature_extractor"), model)


def _codes(scenes: list[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([scene_code(scene) for scene in scenes]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
