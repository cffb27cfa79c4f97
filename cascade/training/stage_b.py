"""Trains the tiny Stage B: from the semantic code of a scene to Stage A's latents of its picture.

The code is disturbed as Stage C will disturb it: noise, and the enlargement that guidance brings. Judge the
run by sampled latents, printed with a sheet of pictures at every sample.
"""

import json
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.config import ScheduleConfig, StageAConfig, StageBConfig
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Sample, denoise
from cascade.sampling.noise import PhiloxNoise
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import SAMPLERS
from cascade.sampling.schedule import CosineSchedule
from cascade.training.code import scene_code
from cascade.training.denoising import Emphasis, noise_batch
from cascade.training.loop import Plan, fit
from cascade.training.preconditioning import precondition
from cascade.training.scenes import NATIVE_SIZES, SQUARE_SIZE, Scene, held_out_generator, render, sample_scene
from cascade.training.stage_a import TINY_STAGE_A

TINY_STAGE_B = StageBConfig(
    timestep_ratio_embedding_dim=32,
    conditioning_dim=64,
    block_out_channels=(64, 96, 128),
    num_attention_heads=(0, 0, 4),
    down_num_layers_per_block=(1, 2, 2),
    up_num_layers_per_block=(2, 2, 2),
    down_blocks_repeat_mappers=(1, 1, 1),
    up_blocks_repeat_mappers=(1, 1, 1),
    block_types_per_layer=("CT", "CT", "CTA"),
    clip_text_pooled_in_channels=128,
    dropout=(0.0, 0.0, 0.0),
    self_attn=(True, True, True),
)
SCHEDULE = ScheduleConfig(clamp_min=0.02)
PLAN = Plan(
    steps=12_000,
    learning_rate=2e-3,
    compute_dtype=torch.bfloat16,
    save_every=100,
    sample_every=500,
    seed=41,
)

_BATCH = 32
_PAIR = 200.0
_EMPHASIS = Emphasis(starts=0.15, decoys=0.25, low_noise=0.25, highest=8.0)
_FRESH = 12  # new pictures per step; the others come from those drawn before
_POOL = 6000  # pictures kept per size
_WITHOUT_CODE = 0.03


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train on the latents of `run`/vqgan and write `run`/decoder; an interrupted run goes on where it was."""
    torch.manual_seed(plan.seed)
    stage_a = load_stage_a(run)
    stage = StageB(TINY_STAGE_B)
    schedule = CosineSchedule(SCHEDULE)
    trainable = precondition(stage, schedule, _PAIR)
    pool = LatentPool(stage_a)
    # Most batches have one shape, for which a compiled step is half as long again; it needs a C++ compiler.
    compiled = torch.compile(_predict, dynamic=False) if shutil.which("g++") else _predict

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, StageB)
        size = SQUARE_SIZE if rng.random() < 0.85 else NATIVE_SIZES[1 + int(rng.integers(len(NATIVE_SIZES) - 1))]
        codes, latents = pool.batch(size, _BATCH if size == SQUARE_SIZE else _BATCH // 2, rng)
        batch = noise_batch(latents, schedule, _EMPHASIS, rng)
        predict = compiled if size == SQUARE_SIZE else _predict
        return batch.loss(predict(module, batch.latents, batch.ratio, disturb(codes, rng)))

    def report(module: nn.Module, step: int) -> None:
        assert isinstance(module, StageB)
        figures = judge(module, stage_a, schedule, run / "stage_b" / f"sheet-{step:06}.png")
        print(f"step {step}  {json.dumps(figures)}", flush=True)
        save(module, run / "decoder")

    fit(stage, loss, plan, run / "stage_b", title="Stage B", sample=report, trainable=trainable)


def _predict(stage: StageB, latents: Tensor, ratio: Tensor, codes: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    no_text = torch.zeros(len(codes), 1, stage.config.clip_text_pooled_in_channels)
    return stage(latents, ratio, stage.prepare(codes, no_text, (height, width)))


def disturb(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Codes with noise of sigma 0 to .3, half of them enlarged up to 1.3 times, a few left out."""
    count = len(codes)
    sigma = rng.uniform(0, 0.3, count) * (rng.random(count) < 0.8)
    scale = np.where(rng.random(count) < 0.5, rng.uniform(0.9, 1.3, count), 1.0)
    scale[rng.random(count) < _WITHOUT_CODE] = 0
    noise = torch.from_numpy(rng.standard_normal(tuple(codes.shape), dtype=np.float32))
    sigma_rows, scale_rows = (torch.from_numpy(v.astype(np.float32)).view(-1, 1, 1, 1) for v in (sigma, scale))
    return (codes + sigma_rows * noise) * scale_rows


@dataclass(slots=True)
class LatentPool:
    """Codes and latents of scenes drawn so far, by size; every batch brings some new ones."""

    stage_a: StageA
    _rows: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def batch(self, size: tuple[int, int], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Codes (count, 16, gh, gw) and latents (count, 4, h / 4, w / 4)."""
        rows = self._rows[size]
        num_fresh = _FRESH * count // _BATCH if len(rows) >= count else count
        fresh = self.draw([sample_scene(rng, size) for _ in range(num_fresh)])
        rows.extend(fresh)
        del rows[: max(0, len(rows) - _POOL)]
        chosen = [rows[int(index)] for index in rng.integers(len(rows), size=count - len(fresh))]
        codes, latents = zip(*fresh, *chosen, strict=True)
        return torch.stack(codes), torch.stack(latents).float()

    @torch.no_grad()
    def draw(self, scenes: list[Scene]) -> list[tuple[Tensor, Tensor]]:
        """Code and latents, in bf16, of each scene."""
        latents = self.stage_a.encode(pictures(scenes)).bfloat16()
        return [(torch.from_numpy(scene_code(scene)), row) for scene, row in zip(scenes, latents, strict=True)]


def pictures(scenes: list[Scene]) -> Tensor:
    """Rendered scenes of one size, (b, 3, h, w) in 0..1."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def judge(
    stage: StageB, stage_a: StageA, schedule: CosineSchedule, sheet: Path | None = None, count: int = 24
) -> dict[str, float]:
    """Error of latents sampled in ten steps from true codes of held-out scenes, and of their pictures in dB."""
    rng = held_out_generator(4)
    scenes = [sample_scene(rng) for _ in range(count)]
    truth = pictures(scenes)
    latents = stage_a.encode(truth)
    drawn = sample_latents(stage, schedule, torch.from_numpy(np.stack([scene_code(scene) for scene in scenes])))
    decoded = stage_a.decode(drawn).clamp(0, 1)
    per_picture = (decoded - truth).square().mean((1, 2, 3))
    if sheet:
        rows = torch.cat([truth[:12], decoded[:12]]).unflatten(0, (4, 6))
        grid = (rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2) * 255).round().to(torch.uint8)
        sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid.numpy()).save(sheet)
    return {
        "latent_error": round(F.mse_loss(drawn, latents).item(), 4),
        "dB": round(float(-10 * per_picture.mean().log10()), 2),
        "dB_mean": round(float((-10 * per_picture.log10()).mean()), 2),
    }


def sample_latents(stage: StageB, schedule: CosineSchedule, codes: Tensor, steps: int = 10) -> Tensor:
    """Latents (b, 4, 64, 64) for the codes of square pictures."""
    preset = PRESETS["official"]
    no_text = torch.zeros(len(codes), 1, stage.config.clip_text_pooled_in_channels)
    conditions = stage.prepare(codes, no_text, (64, 64))
    samples = [
        Sample(
            condition=conditions[index : index + 1],
            unguided=None,
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
    """The frozen Stage A of a training run."""
    scale = json.loads((run / "vqgan" / "config.json").read_text())["scale_factor"]
    config = StageAConfig(
        levels=TINY_STAGE_A.levels,
        bottleneck_blocks=TINY_STAGE_A.bottleneck_blocks,
        hidden_channels=TINY_STAGE_A.hidden_channels,
        latent_channels=TINY_STAGE_A.latent_channels,
        codebook_size=TINY_STAGE_A.codebook_size,
        scale_factor=scale,
    )
    stage_a = StageA(config)
    stage_a.load_state_dict(load_file(run / "vqgan" / "diffusion_pytorch_model.safetensors"))
    return stage_a.eval().requires_grad_(False)


def save(stage: StageB, folder: Path) -> None:
    """Write the averaged weights under their original names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stage.state_dict(), folder / "weights.safetensors")


def load(run: Path) -> StageB:
    """Stage B as a training run last saved it."""
    stage = StageB(TINY_STAGE_B)
    stage.load_state_dict(load_file(run / "decoder" / "weights.safetensors"))
    return stage.eval().requires_grad_(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
