"""Trains the tiny semantic encoder (picture to code) and the previewer (code to small picture) together.

Both share the scenes, which are new at every step. The encoder sees pictures resized as image-to-image
does it, so that its grid is the code's.
"""

import json
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.checkpoints.save import save_component
from cascade.config import EffNetConfig, EffNetStage, PreviewerConfig
from cascade.networks.effnet import EffNetEncoder, resize_for_encoder
from cascade.networks.previewer import Previewer
from cascade.training.code import read_code
from cascade.training.loop import Plan, fit
from cascade.training.scenes import (
    SQUARE_SIZE,
    Scene,
    held_out_generator,
    sample_scene,
    sample_size,
)
from cascade.training.tensors import code_tensor, picture_tensor

TINY_EFFNET = EffNetConfig(
    stem_channels=16,
    stages=(
        EffNetStage("fused", 1, 1, 16, 1),
        EffNetStage("fused", 4, 2, 24, 1),
        EffNetStage("fused", 4, 2, 40, 2),
        EffNetStage("mbconv", 4, 2, 64, 2),
        EffNetStage("mbconv", 4, 1, 80, 1),
        EffNetStage("mbconv", 4, 2, 112, 3),
    ),
    head_channels=256,
)
TINY_PREVIEWER = PreviewerConfig(hidden_channels=64)
PLAN = Plan(steps=2300, learning_rate=3e-3, matrix_rate=1e-2, save_every=100)

_BATCH = 32
_MAX_SIGMA = 0.3  # of the noise on the previewer's codes
_NORM_BATCHES = 40
_HELD_OUT_PICTURES = 200
_PREVIEW_PIXELS = 8  # per cell


class EncoderAndPreviewer(nn.Module):
    """The two networks as one module for the training loop."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = EffNetEncoder(TINY_EFFNET)
        self.previewer = Previewer(TINY_PREVIEWER)


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train and write `run`/effnet_encoder and `run`/previewer; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    trained = fit(EncoderAndPreviewer(), loss, plan, run / "encoder", title="Encoder and previewer")
    networks = cast(EncoderAndPreviewer, trained)
    estimate_norms(networks, plan)
    save_component(networks.encoder, run / "effnet_encoder", torch.float32)
    save_component(networks.previewer, run / "previewer", torch.float32)
    (run / "encoder" / "figures.json").write_text(json.dumps(figures(networks, _HELD_OUT_PICTURES), indent=2))


def loss(networks: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Return the summed squared errors of codes and previews, and each as a figure."""
    assert isinstance(networks, EncoderAndPreviewer)
    pictures, codes = scenes_and_codes(_scenes(rng))
    sigma, noise = rng.random((len(codes), 1, 1, 1), np.float32), rng.standard_normal(codes.shape, np.float32)
    noisy = codes + _MAX_SIGMA * torch.from_numpy(sigma * noise)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = networks.encoder(resize_for_encoder(pictures))
        preview = networks.previewer(noisy)
    code_error = F.mse_loss(encoded.float(), codes)
    preview_error = F.mse_loss(preview.float(), previews(pictures, codes))
    return code_error + preview_error, {"code": code_error.item(), "preview": preview_error.item()}


def scenes_and_codes(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return pictures (b, 3, h, w) in 0..1 of scenes of one size, and their codes (b, 16, gh, gw)."""
    return picture_tensor(scenes), code_tensor(scenes)


def previews(pictures: Tensor, codes: Tensor) -> Tensor:
    """Return the pictures as the previewer should show them, eight pixels per cell of the code."""
    size = [_PREVIEW_PIXELS * side for side in codes.shape[-2:]]
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


@torch.no_grad()
def estimate_norms(networks: EncoderAndPreviewer, plan: Plan) -> None:
    """Estimate batch norm statistics of the averaged weights; those gathered during training lag behind."""
    norms = [module for module in networks.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    networks.train()
    for batch in range(_NORM_BATCHES):
        loss(networks, 0, np.random.default_rng((plan.seed, plan.steps + batch)))
    networks.eval()


@torch.inference_mode()
def figures(networks: EncoderAndPreviewer, count: int) -> dict[str, float]:
    """Return the errors on held-out pictures, and the shares that the encoder's codes describe correctly."""
    rng = held_out_generator(2)
    right = {"number": 0, "background": 0, "shapes": 0, "colours": 0, "all": 0}
    code_error = preview_error = 0.0
    for _ in range(count):
        scene = sample_scene(rng, sample_size(rng))
        pictures, codes = scenes_and_codes([scene])
        encoded = networks.encoder(resize_for_encoder(pictures))
        code_error += F.mse_loss(encoded, codes).item() / count
        preview_error += F.mse_loss(networks.previewer(codes), previews(pictures, codes)).item() / count
        seen = read_code(encoded[0].numpy(), (scene.width, scene.height))
        answers = _answers(scene, seen)
        for name, is_right in (answers | {"all": all(answers.values())}).items():
            right[name] += is_right
    return {"code_error": code_error, "preview_error": preview_error} | {
        k: v / count for k, v in right.items()
    }


def _scenes(rng: np.random.Generator) -> list[Scene]:
    """Sample a batch of scenes of one size."""
    size = sample_size(rng)
    count = _BATCH * SQUARE_SIZE[0] * SQUARE_SIZE[1] // (size[0] * size[1])
    return [sample_scene(rng, size) for _ in range(count)]


def _answers(scene: Scene, seen: Scene) -> dict[str, bool]:
    drawn, read = scene.in_order(), seen.in_order()
    return {
        "number": len(drawn) == len(read),
        "background": scene.background == seen.background,
        "shapes": [thing.shape for thing in drawn] == [thing.shape for thing in read],
        "colours": [thing.colour for thing in drawn] == [thing.colour for thing in read],
    }


if __name__ == "__main__":
    train(Path(sys.argv[1]))
