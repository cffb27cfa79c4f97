"""Trains the tiny Stage C to read image embeddings, with everything else frozen.

The teacher is Stage C with a caption that states everything; given the picture's embedding and no words, it
has to predict the same. Only the weight of the mapper, which makes four tokens of the embedding, is trained.
Its bias is frozen, so that requests without image prompts, whose embedding is zero, give bit-identical
pictures as before. The vision tower is frozen, too: it embeds a picture nearly as the text tower embeds the
caption (`vision`).

Two image prompts are trained, too: their target is a thing of each before the background of one of them.

Embeddings of captions differ little, as they share a large mean, so a weight for them would learn slowly. It
is trained on whitened embeddings, and the whitening is multiplied into it at the end.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cascade.checkpoints.load import load_network
from cascade.checkpoints.save import save_component
from cascade.conditioning import ImageEncoder, TextEncoder
from cascade.errors import CheckpointError
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from cascade.sampling.schedule import CosineSchedule
from cascade.training.captions import full_caption
from cascade.training.code import read_code, scene_code
from cascade.training.denoising import PRIOR_EMPHASIS, noise_batch
from cascade.training.drawing_codes import draw_codes
from cascade.training.loop import Plan, fit
from cascade.training.scenes import SQUARE_SIZE, Scene, held_out_generator, sample_scene, sample_size
from cascade.training.stage_c import SCHEDULE, load_image_encoder, load_text_encoder
from cascade.training.vision import prepare

PLAN = Plan(
    steps=4200,
    learning_rate=2e-3,
    warmup=20,
    ema_decay=0.98,
    final_fraction=0.02,
    save_every=50,
    judge_every=250,
    seed=33,
)

_BATCH = 32
_PAIRS_EVERY = 4  # steps
_CAPTIONS = 2000
_FLOOR = 0.01  # of the mean variance
_CASES = 40

Shown = tuple[Scene, ...]  # the scenes of a row's image prompts


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train the mapper of `run`/prior in place; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(run / "prior")).eval().requires_grad_(False)
    text = load_text_encoder(run)
    text.model.float()
    images = load_image_encoder(run)
    if images is None:
        raise CheckpointError(f"{run}: the vision tower is not trained yet")
    images.model.float()
    schedule = CosineSchedule(SCHEDULE)
    whitening = estimate_whitening(text)
    mapper = cast(nn.Parameter, stage.clip_img_mapper.weight).requires_grad_()
    nn.init.zeros_(mapper)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, StageC)
        size = sample_size(rng)
        shown: list[Shown]
        if step % _PAIRS_EVERY == _PAIRS_EVERY - 1:
            pairs = [sample_pair(rng, size) for _ in range(_BATCH)]
            drawn, shown = [mixed(pair, rng) for pair in pairs], list(pairs)
        else:
            drawn = [sample_scene(rng, size) for _ in range(_BATCH)]
            shown = [(scene,) for scene in drawn]
        codes = torch.from_numpy(np.stack([scene_code(scene) for scene in drawn]))
        batch = noise_batch(codes, schedule, PRIOR_EMPHASIS, rng)
        with torch.no_grad():
            taught = batch.implied(module(batch.latents, batch.ratio, told(module, text, drawn)))
        embeds = embed(images, shown) @ whitening
        said = batch.implied(module(batch.latents, batch.ratio, guided(module, text, embeds)))
        apart = ((said - taught).square().mean((1, 2, 3)) * batch.weight).mean()
        return apart, {"alone" if len(shown[0]) == 1 else "two": float(apart.detach())}

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, StageC)
        ready = deepcopy(module)
        ready.clip_img_mapper.weight.data @= whitening
        save_component(ready, run / "prior")
        return judge(ready, text, images, schedule)

    fit(stage, loss, plan, run / "image_prompts", title="image prompts", judge=report)


@torch.no_grad()
def estimate_whitening(text: TextEncoder) -> Tensor:
    """Return the symmetric matrix (d, d) that makes the second moments of captions' embeddings the identity.

    Directions in which they hardly differ are scaled up less: pictures will not be told apart by these.
    """
    rng = np.random.default_rng(PLAN.seed)
    embeds = text.encode([full_caption(sample_scene(rng)) for _ in range(_CAPTIONS)]).pooled[:, 0].clone()
    variances, directions = torch.linalg.eigh((embeds.T @ embeds / len(embeds)).double())
    scale = (variances + _FLOOR * variances.mean()).rsqrt()
    whitening: Tensor = ((directions * scale) @ directions.T).float()
    return whitening


def told(stage: StageC, text: TextEncoder, scenes: list[Scene]) -> Condition:
    """Return the condition of captions that state everything, without a picture."""
    embeddings = text.encode([full_caption(scene) for scene in scenes])
    return stage.prepare(
        embeddings.hidden.clone(), embeddings.pooled.clone(), nothing(stage).expand(len(scenes), -1, -1)
    )


@torch.no_grad()
def embed(images: ImageEncoder, shown: Sequence[Shown]) -> Tensor:
    """Return the vision tower's embeddings of pictures, equally many in each row: (b, k, d)."""
    pixels = prepare([scene for pictures in shown for scene in pictures])
    embeds: Tensor = images.model(pixels).image_embeds
    return embeds.view(len(shown), len(shown[0]), -1)


def guided(stage: StageC, text: TextEncoder, embeds: Tensor) -> Condition:
    """Return the condition of pictures without words."""
    empty, rows = text.encode([""]), len(embeds)
    return stage.prepare(
        empty.hidden.clone().expand(rows, -1, -1), empty.pooled.clone().expand(rows, -1, -1), embeds
    )


def nothing(stage: StageC, number: int = 1) -> Tensor:
    """Return the zero embedding that stands for `number` absent pictures, (1, number, width)."""
    return torch.zeros(1, number, stage.config.clip_image_in_channels)


def sample_pair(rng: np.random.Generator, size: tuple[int, int] = SQUARE_SIZE) -> tuple[Scene, Scene]:
    """Sample two scenes without a common colour, so that their things can stand in one picture."""
    while True:
        first, second = sample_scene(rng, size), sample_scene(rng, size)
        if not _colours(first) & _colours(second):
            return first, second


def mixed(pair: tuple[Scene, Scene], rng: np.random.Generator) -> Scene:
    """Return a scene with a thing of each of two scenes before the background of one."""
    size = (pair[0].width, pair[0].height)
    while len((scene := sample_scene(rng, size)).things) < 2:
        pass
    chosen = [each.things[int(rng.integers(len(each.things)))] for each in pair]
    things = tuple(
        replace(thing, shape=model.shape, colour=model.colour)
        for thing, model in zip(scene.things, chosen, strict=True)
    )
    return replace(scene, things=things, background=pair[int(rng.integers(2))].background)


@torch.no_grad()
def judge(
    stage: StageC, text: TextEncoder, images: ImageEncoder, schedule: CosineSchedule
) -> dict[str, float]:
    """Return the shares of codes, drawn from pictures alone, that show their things; of two, one of each."""
    rng = held_out_generator(9)
    scenes = [sample_scene(rng) for _ in range(_CASES)]
    pairs = [sample_pair(rng) for _ in range(_CASES)]

    def read(shown: Sequence[Shown]) -> list[Scene]:
        condition = guided(stage, text, embed(images, shown))
        none = guided(stage, text, nothing(stage, len(shown[0])))
        codes = draw_codes(stage, schedule, condition, none, guidance_scale=4.0, count=len(shown))
        return [read_code(code.numpy(), SQUARE_SIZE) for code in codes]

    alone = zip(scenes, read([(scene,) for scene in scenes]), strict=True)
    two = zip(pairs, read(pairs), strict=True)
    return {
        "same": float(np.mean([_things(scene) == _things(seen) for scene, seen in alone])),
        "of both": float(np.mean([_shows_both(pair, seen) for pair, seen in two])),
    }


def _shows_both(pair: tuple[Scene, Scene], seen: Scene) -> bool:
    return all(set(_things(scene)) & set(_things(seen)) for scene in pair)


def _things(scene: Scene) -> list[tuple[str, str]]:
    return sorted((thing.shape, thing.colour) for thing in scene.things)


def _colours(scene: Scene) -> set[str]:
    return {scene.background, *(thing.colour for thing in scene.things)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
