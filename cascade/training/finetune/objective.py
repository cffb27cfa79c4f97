"""The training objective: predict the noise in noised latents, each noise level with its weight.

Formulas are those of the official training code (`gdf`): times uniform over the unshifted cosine schedule,
the squared error of the noise, and P2 or adaptive weights.
"""

import math
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule, signal_and_noise

NUM_LEVELS = 300
LEVEL_RANGE = (-10.0, 10.0)  # log SNR
LEVEL_BETA = 0.99
WEIGHT_RANGE = (1e-7, 1e7)

_PYRAMID_LEVELS = range(1, 10)
_PYRAMID_SIDES = (1, 16)
_PYRAMID_DECAY = 0.75


@dataclass(frozen=True, slots=True)
class Batch:
    """Noised latents, the noise in them and the other inputs of the network, row by row."""

    latents: Tensor  # (b, c, h, w)
    noise: Tensor  # (b, c, h, w)
    log_snr: Tensor  # (b,)
    ratio: Tensor  # (b,)
    told: tuple[Tensor, ...]  # Stage C: text, pooled, image embeddings; Stage B: semantic latents, pooled


class PriorObjective(nn.Module):
    """Stage C and the preparation of its condition in one forward pass, which sharding can wrap."""

    def __init__(self, stage: StageC) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, latents: Tensor, ratio: Tensor, text: Tensor, pooled: Tensor, images: Tensor) -> Tensor:
        """Predict the noise."""
        return cast(Tensor, self.stage(latents, ratio, self.stage.prepare(text, pooled, images)))


class DecoderObjective(nn.Module):
    """Stage B and the preparation of its condition in one forward pass."""

    def __init__(self, stage: StageB) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, latents: Tensor, ratio: Tensor, semantic: Tensor, pooled: Tensor) -> Tensor:
        """Predict the noise."""
        height, width = latents.shape[-2:]
        return cast(Tensor, self.stage(latents, ratio, self.stage.prepare(semantic, pooled, (height, width))))


class LossWeights(Protocol):
    """The weights of noise levels in the loss."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return the weights (b,) of the levels (b,)."""

    def update(self, log_snr: Tensor, errors: Tensor) -> None:
        """Learn from the errors (b,) of a forward pass."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""


class P2Weights:
    """P2 weights, 1 / (1 + SNR) (Choi et al. 2022, with k and gamma 1)."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return the weights (b,) of the levels (b,)."""
        return torch.sigmoid(-log_snr).float()

    def update(self, log_snr: Tensor, errors: Tensor) -> None:
        """Do nothing: nothing is learned."""

    def state(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is nothing to restore."""


class AdaptiveWeights:
    """The inverse of a running mean of the error at each of 300 levels, so that all levels count alike."""

    def __init__(self) -> None:
        self.means = torch.ones(NUM_LEVELS)

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return the weights (b,) of the levels (b,)."""
        means = self.means[self._level(log_snr)]
        return (1 / means).clamp(*WEIGHT_RANGE).to(log_snr.device)

    def update(self, log_snr: Tensor, errors: Tensor) -> None:
        """Move each level that occurs towards the mean error of its rows."""
        levels = self._level(log_snr)
        sums = torch.zeros(NUM_LEVELS).index_add_(0, levels, errors.detach().float().cpu())
        counts = torch.zeros(NUM_LEVELS).index_add_(0, levels, torch.ones(len(levels)))
        seen = counts > 0
        self.means[seen] = LEVEL_BETA * self.means[seen] + (1 - LEVEL_BETA) * (sums[seen] / counts[seen])

    def state(self) -> dict[str, Tensor]:
        """Return the running means."""
        return {"means": self.means.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the running means."""
        self.means = state["means"].clone()

    @staticmethod
    def _level(log_snr: Tensor) -> Tensor:
        low, high = LEVEL_RANGE
        share = (log_snr.detach().float().cpu() - low) / (high - low)
        return (share * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)


def row_errors(predicted: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of every row, (b, c, h, w) to (b,), in fp32."""
    return (predicted.float() - noise).square().mean((1, 2, 3))


def noised(
    clean: Tensor,
    told: tuple[Tensor, ...],
    schedule: CosineSchedule,
    rngs: list[np.random.Generator],
    *,
    pyramid: bool,
) -> Batch:
    """Noise `clean` (b, c, h, w), each row by its own generator, so that a row is the same in any batch.

    `schedule` is not shifted, as in the official training code: shifts belong to sampling.
    """
    times = torch.tensor(
        [min(1.0, max(0.001, 1 - rng.random() + 0.001)) for rng in rngs], dtype=torch.float64
    )
    shape = tuple(clean.shape[1:])
    noise = torch.stack([_noise(rng, shape, pyramid) for rng in rngs]).to(clean.device)
    log_snr = schedule.log_snr(times)
    alpha, sigma = (scale.to(clean).view(-1, 1, 1, 1) for scale in signal_and_noise(log_snr))
    return Batch(
        latents=alpha * clean + sigma * noise,
        noise=noise,
        log_snr=log_snr.float().to(clean.device),
        ratio=schedule.ratio(log_snr).float().to(clean.device),
        told=told,
    )


def _noise(rng: np.random.Generator, shape: tuple[int, ...], pyramid: bool) -> Tensor:
    """Draw noise of variance 1; a pyramid adds coarse parts, which a large latent otherwise lacks."""

    def draw(height: int, width: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((shape[0], height, width), dtype=np.float32))

    height, width = shape[1:]
    noise: Tensor = draw(height, width)
    squares = 1.0
    for level in _PYRAMID_LEVELS if pyramid else ():
        rows, columns = height // 2**level, width // 2**level
        least, most = _PYRAMID_SIDES
        if least <= min(rows, columns) and max(rows, columns) <= most:
            weight = _PYRAMID_DECAY**level
            noise = noise + weight * F.interpolate(draw(rows, columns)[None], (height, width))[0]
            squares += weight**2
    return noise / math.sqrt(squares)
