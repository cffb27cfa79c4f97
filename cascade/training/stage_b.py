"""Trains the tiny Stage B: from the semantic code of a scene to Stage A's latents of its picture.

Its first level is trained first, alone, as a regression (`regression.py`); then the whole, at low rates, as a
denoiser. For square pictures half of the codes are drawn by Stage C or the encoder, errors included; all
others are true codes, disturbed. Judge the run by its sampled latents: every `judge_every` steps their errors
are printed and a sheet of pictures is written.
"""

import shutil
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cascade.checkpoints.load import load_network
from cascade.checkpoints.save import save_component
from cascade.config import ScheduleConfig, StageBConfig
from cascade.marks import save_png
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Guides, Sample, denoise
from cascade.sampling.noise import PhiloxNoise
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.training.denoising import Emphasis, noise_batch
from cascade.training.drawn_codes import drawn_codes
from cascade.training.loop import Plan, fit
from cascade.training.preconditioning import Channels, precondition
from cascade.training.regression import pretrain
from cascade.training.scenes import (
    SQUARE_SIZE,
    Scene,
    held_out_generator,
    sample_scene,
    sample_size,
)
from cascade.training.stage_a import colour_latents
from cascade.training.tensors import code_tensor, picture_tensor

TINY_STAGE_B = StageBConfig(
    timestep_ratio_embedding_dim=32,
    conditioning_dim=64,
    block_out_channels=(96, 96, 112),
    num_attention_heads=(0, 0, 4),
    down_num_layers_per_block=(1, 2, 2),
    up_num_layers_per_block=(2, 2, 3),
    down_blocks_repeat_mappers=(1, 1, 1),
    up_blocks_repeat_mappers=(1, 1, 1),
    block_types_per_layer=("CT", "CT", "CTA"),
    clip_text_pooled_in_channels=128,
    dropout=(0.0, 0.0, 0.0),
    self_attn=(True, True, True),
)
SCHEDULE = ScheduleConfig(clamp_min=0.02)
PLAN = Plan(
    steps=6500,
    learning_rate=5e-4,
    matrix_rate=1e-3,
    compute_dtype=torch.bfloat16,
    save_every=250,
    judge_every=500,
    seed=43,
)

_BATCH = 8
_PAIR = 200.0
_EMPHASIS = Emphasis(
    starts=0.25, decoys=0.25, overshot=0.0, wobbly=0.5, rough=0.0, low_noise=0.25, highest=8.0
)
_WITHOUT_CODE = 0.02
_NUM_KINDS = 12  # channels of colours and shapes, before those of places


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train against `run`/vqgan and write `run`/decoder; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    stage_a = load_stage_a(run)
    stage = StageB(TINY_STAGE_B)
    schedule = CosineSchedule(SCHEDULE)
    trainable = precondition(stage, schedule, _PAIR)
    drawn = drawn_codes(run)
    first_level = run / "stage_b_first_level"
    pretrain(stage, Channels.of(TINY_STAGE_B), stage_a.config.scale_factor, first_level, trainable, drawn)
    # Most batches have one shape, whose step is compiled; that needs a C++ compiler.
    compiled = torch.compile(_predict, dynamic=False) if shutil.which("g++") else _predict

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, StageB)
        size = sample_size(rng)
        codes, scenes = draw_batch(rng, size, drawn)
        latents = latents_of(picture_tensor(scenes), stage_a.config.scale_factor)
        batch = noise_batch(latents, schedule, _EMPHASIS, rng)
        predict = compiled if size == SQUARE_SIZE else _predict
        return batch.loss(predict(module, batch.latents, batch.ratio, codes))

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, StageB)
        figures = judge(module, stage_a, schedule, run / "stage_b" / f"sheet-{step:06}.png")
        save_component(module, run / "decoder")
        return figures

    fit(stage, loss, plan, run / "stage_b", title="Stage B", judge=report, trainable=trainable)


def _predict(stage: StageB, latents: Tensor, ratio: Tensor, codes: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    no_text = torch.zeros(len(codes), 1, stage.config.clip_text_pooled_in_channels)
    return cast(Tensor, stage(latents, ratio, stage.prepare(codes, no_text, (height, width))))


def draw_batch(
    rng: np.random.Generator, size: tuple[int, int], drawn: tuple[Tensor, list[Scene]]
) -> tuple[Tensor, list[Scene]]:
    """Return codes and scenes of pictures of one size; for square ones, half are drawn codes."""
    scenes = [sample_scene(rng, size) for _ in range(_BATCH // 2)]
    codes = disturb(code_tensor(scenes), rng)
    if size != SQUARE_SIZE:
        return codes, scenes
    chosen = rng.integers(0, len(drawn[1]), _BATCH - len(scenes))
    return torch.cat([codes, drawn[0][chosen]]), scenes + [drawn[1][index] for index in chosen]


def disturb(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Disturb codes as Stage C and guidance do, and zero a few.

    Noise of sigma 0 to 0.2 at every node; scaling by 0.95 to 1.3; constant shifts of colours and shapes.
    """
    count = len(codes)
    sigma = rng.uniform(0, 0.2, count) * (rng.random(count) < 0.7)
    scale = np.where(rng.random(count) < 0.5, rng.uniform(0.95, 1.3, count), 1.0)
    scale[rng.random(count) < _WITHOUT_CODE] = 0
    noise = torch.from_numpy(rng.standard_normal(tuple(codes.shape), dtype=np.float32))
    moved = np.zeros((count, codes.shape[1], 1, 1), np.float32)
    moved[:, :_NUM_KINDS, 0, 0] = rng.normal(0, 0.12, (count, _NUM_KINDS)) * (rng.random((count, 1)) < 0.4)
    sigma_rows, scale_rows = (
        torch.from_numpy(v.astype(np.float32)).view(-1, 1, 1, 1) for v in (sigma, scale)
    )
    return (codes + torch.from_numpy(moved) + sigma_rows * noise) * scale_rows


def latents_of(pixels: Tensor, scale_factor: float) -> Tensor:
    """Approximate Stage A's latents of rendered pictures, (b, 3, h, w) in 0..1 -> (b, 4, h / 4, w / 4).

    The encoder was trained to give the mean colours of 4x4 pixels and is nearer to them (a squared distance
    of 1e-4) than Stage B will ever come; this is a hundred times faster.
    """
    return colour_latents(F.avg_pool2d(pixels, 4)) / scale_factor


@torch.no_grad()
def judge(
    stage: StageB, stage_a: StageA, schedule: CosineSchedule, sheet: Path | None = None, count: int = 24
) -> dict[str, float]:
    """Return the error of latents sampled in ten steps from held-out codes, and of their pictures in dB."""
    rng = held_out_generator(4)
    scenes = [sample_scene(rng) for _ in range(count)]
    truth = picture_tensor(scenes)
    latents = stage_a.encode(truth)
    drawn = sample_latents(stage, schedule, code_tensor(scenes))
    decoded = stage_a.decode(drawn).clamp(0, 1)
    per_picture = (decoded - truth).square().mean((1, 2, 3))
    if sheet:
        rows = torch.cat([truth[:12], decoded[:12]]).view(4, 6, *truth.shape[1:])
        grid = (rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2) * 255).round().to(torch.uint8)
        save_png(Image.fromarray(grid.numpy()), sheet)
    return {
        "latent_error": round(F.mse_loss(drawn, latents).item(), 4),
        "dB": round(float(-10 * per_picture.mean().log10()), 2),
        "dB_mean": round(float((-10 * per_picture.log10()).mean()), 2),
    }


def sample_latents(stage: StageB, schedule: CosineSchedule, codes: Tensor, steps: int = 10) -> Tensor:
    """Sample latents (b, 4, 64, 64) for the codes of square pictures."""
    preset = PRESETS["official"]
    no_text = torch.zeros(len(codes), 1, stage.config.clip_text_pooled_in_channels)
    conditions = stage.prepare(codes, no_text, (64, 64))
    samples = [
        Sample(
            guides=Guides(conditions[index : index + 1], None),
            guidance_scale=1.0,
            levels=preset.levels(schedule, steps),
            sampler=SAMPLERS["ddpm"],
            preset=preset,
            draw=PhiloxNoise((4, 64, 64), index, "decoder"),
            device=torch.device("cpu"),
        )
        for index in range(len(codes))
    ]
    for _ in denoise(stage, samples, Condition.cat):
        pass
    return torch.stack([sample.result for sample in samples])


def load_stage_a(run: Path) -> StageA:
    """Load the frozen Stage A of a training run."""
    stage_a = load_network(run / "vqgan")
    assert isinstance(stage_a, StageA)
    return stage_a.eval().requires_grad_(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
