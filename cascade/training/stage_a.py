"""Trains the tiny Stage A on 64x64 crops of scenes.

The latent is pulled towards a plain meaning: the mean colour of its 4x4 pixels, whitened and spread over the
four channels. Stage B then has to paint a small picture with smooth edges, not an invented code; what the
encoder adds for the details stays small, because the decoder is trained on noisy latents.

Yellow on orange counts for little in the error of a picture, and its edges stay soft. So at the end the
decoder alone is trained further, with the error of each crop divided by its contrast; the latents are frozen.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.checkpoints.save import save_component
from cascade.config import StageAConfig
from cascade.networks.stage_a import StageA
from cascade.training.loop import Plan, fit
from cascade.training.scenes import PALETTE, held_out_generator, render, sample_scene
from cascade.training.tensors import picture_tensor

TINY_STAGE_A = StageAConfig(
    levels=2, bottleneck_blocks=2, hidden_channels=64, latent_channels=4, codebook_size=512, scale_factor=1.0
)
PLAN = Plan(steps=3000, learning_rate=3e-3, save_every=250)
DECODER_PLAN = Plan(steps=1500, learning_rate=2e-3, save_every=250, seed=1)

_BATCH = 32
_CROP = 64
_MAX_SIGMA = 0.25
_COLOUR_PENALTY = 0.1
_ABSOLUTE_ERROR = 0.02
_CODEBOOK_LOSS = 0.002
_LEAST_CONTRAST = 0.001  # variance of a crop's colours
_CALMER = 0.5  # noise when only the decoder is trained, as a share of _MAX_SIGMA


def train(run: Path, plan: Plan = PLAN, decoder_plan: Plan = DECODER_PLAN) -> None:
    """Train and write `run`/vqgan; an interrupted run is resumed."""
    torch.manual_seed(plan.seed)
    model = StageA(TINY_STAGE_A)
    initialise(model)
    model = cast(StageA, fit(model, loss, plan, run / "stage_a", title="Stage A"))
    for part in (model.up_blocks, model.out_block):
        part.requires_grad_(True)
    folder = run / "stage_a_decoder"
    trained = cast(StageA, fit(model, decoder_loss, decoder_plan, folder, title="Stage A, decoder"))
    pictures = held_out_pictures(64)
    with torch.inference_mode():
        deviation = trained.encode(pictures).std().item()
    trained.config = replace(trained.config, scale_factor=deviation)
    save_component(trained, run / "vqgan", torch.float32)
    (run / "stage_a" / "figures.json").write_text(json.dumps(figures(trained, pictures), indent=2))


def initialise(model: StageA) -> None:
    """Set residual gains to 0.3, and the codebook to mixtures of two palette colours."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gammas"):
                parameter[[2, 5]] = 0.3
    codebook = codes(model)
    palette = torch.tensor(list(PALETTE.values())) / 255
    pairs = palette[torch.randint(len(palette), (2, len(codebook)))]
    mixed = torch.lerp(pairs[0], pairs[1], torch.rand(len(codebook), 1))
    with torch.no_grad():
        codebook.copy_(colour_latents(mixed.T[None, :, None]).squeeze().T)
    for parameter in batch_norm(model).parameters():  # stays the identity: the scale factor does its work
        parameter.requires_grad_(False)


def codes(model: StageA) -> Tensor:
    """Return the codebook, (codes, 4)."""
    return cast(nn.Embedding, model.vquantizer["codebook"]).weight


def batch_norm(model: StageA) -> nn.Module:
    """Return the norm of the latents, the last layer of the encoder."""
    return list(model.down_blocks.modules())[-1]


def colour_latents(pixels: Tensor) -> Tensor:
    """Convert pixels (b, 3, h, w) in 0..1 to the intended meaning of latents (b, 4, h, w): whitened colours.

    Over the palette each of the four channels has unit variance. Their sum is zero: it is left for details.
    """
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float64) / 255
    values, vectors = torch.linalg.eigh(torch.cov(palette.T, correction=0))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    corners = torch.tensor(
        [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64
    ) / math.sqrt(3)
    matrix = corners @ whiten
    bias = -matrix @ palette.mean(0)
    return F.conv2d(pixels, matrix.float()[:, :, None, None], bias.float())


def loss(model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Return the error of reconstructed crops, of the latents' meaning and of the codebook, and figures."""
    assert isinstance(model, StageA)
    model.eval()  # the latent batch norm must not follow the crops' statistics
    pixels = crops(rng, _BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encode(pixels).float()
        quantized = quantize(model, latents.detach())
        decoded = model.decode(disturb(latents, quantized.detach(), rng)).float()
    squared = F.mse_loss(decoded, pixels)
    meaning = F.mse_loss(latents, colour_latents(F.avg_pool2d(pixels, 4)))
    total = squared + _ABSOLUTE_ERROR * F.l1_loss(decoded, pixels) + _COLOUR_PENALTY * meaning
    total = total + _CODEBOOK_LOSS * F.mse_loss(quantized, latents.detach())
    return total, {"dB": -10 * math.log10(squared.item()), "meaning": meaning.item()}


def decoder_loss(model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Return the error of crops decoded from frozen latents, each divided by its contrast, and figures."""
    assert isinstance(model, StageA)
    model.eval()
    pixels = crops(rng, _BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latents = model.encode(pixels).float()
            disturbed = disturb(latents, quantize(model, latents), rng, _CALMER * _MAX_SIGMA)
        decoded = model.decode(disturbed).float()
    squared = (decoded - pixels).square().mean((1, 2, 3))
    contrast = pixels.var((2, 3)).mean(1) + _LEAST_CONTRAST
    total = (squared / contrast).mean()
    return total, {"dB": -10 * math.log10(squared.mean().item())}


def disturb(
    latents: Tensor, quantized: Tensor, rng: np.random.Generator, max_sigma: float | None = None
) -> Tensor:
    """Disturb the decoder's inputs: of every eight samples one is quantised, two are blurred, seven noisy.

    Stage B will hand over blurred and noisy latents; the decoder learns to draw crisp edges from them.
    """
    kind = torch.arange(len(latents)) % 8
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
    sigma, blur = torch.from_numpy(rng.random((2, len(latents), 1, 1, 1), np.float32))
    blurred = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    soft = torch.lerp(latents, blurred, blur * ((kind == 1) | (kind == 2)).view(-1, 1, 1, 1))
    noisy = soft + (_MAX_SIGMA if max_sigma is None else max_sigma) * sigma * noise
    return torch.where((kind == 0).view(-1, 1, 1, 1), latents + (quantized - latents).detach(), noisy)


def quantize(model: StageA, latents: Tensor) -> Tensor:
    """Return the nearest code of each latent, (b, 4, h, w)."""
    codebook = codes(model)
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2).float()
    nearest = (codebook.detach().square().sum(1) - 2 * flat @ codebook.detach().T).argmin(1)
    batch, _, height, width = latents.shape
    return codebook[nearest].view(batch, height, width, -1).permute(0, 3, 1, 2)


def crops(rng: np.random.Generator, count: int) -> Tensor:
    """Sample crops (count, 3, 64, 64) in 0..1, most of them with an edge, some in colours off the palette."""
    found: list[Tensor] = []
    while len(found) < count:
        picture = render(sample_scene(rng))
        for _ in range(2):
            top, left = rng.integers(0, 256 - _CROP, 2)
            crop = picture[top : top + _CROP, left : left + _CROP]
            if np.ptp(crop, axis=(0, 1)).max() > 40 or rng.random() < 0.05:
                found.append(torch.from_numpy(crop.copy()))
    pixels = torch.stack(found[:count]).permute(0, 3, 1, 2) / 255
    for index in np.flatnonzero(rng.random(count) < 0.15):
        low, high = sorted(rng.random(2))
        pixels[index] = low + (high - low) * pixels[index, torch.from_numpy(rng.permutation(3))]
    return pixels


def held_out_pictures(count: int) -> Tensor:
    """Return pictures (count, 3, 256, 256) in 0..1 that no training has seen."""
    rng = held_out_generator(1)
    return picture_tensor([sample_scene(rng) for _ in range(count)])


@torch.inference_mode()
def figures(model: StageA, pictures: Tensor) -> dict[str, object]:
    """Return peak signal-to-noise ratios of whole pictures in dB, and statistics of the latents."""
    latents = model.encode(pictures)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def decibels(latents: Tensor) -> float:
        return -10 * math.log10(F.mse_loss(model.decode(latents).clamp(0, 1), pictures).item())

    meaning = colour_latents(F.avg_pool2d(pictures, 4))
    return {
        "dB": decibels(latents),
        "dB_noise_.1": decibels(latents + 0.1 * noise),
        "dB_noise_.2": decibels(latents + 0.2 * noise),
        "dB_codes": decibels(quantize(model, latents)),
        "latent_mean": latents.mean((0, 2, 3)).tolist(),
        "latent_std": latents.std((0, 2, 3)).tolist(),
        "distance_from_meaning": F.mse_loss(latents * model.config.scale_factor, meaning).item(),
    }


if __name__ == "__main__":
    train(Path(sys.argv[1]))
