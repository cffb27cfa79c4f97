"""The objective of both diffusion stages: noised latents in, error of the implied clean latents out.

The networks predict noise. Weighting its squared error by the noise-to-signal ratio makes it the error of
the clean latents, which small networks learn well at high noise; low noise is given more weight than that.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cascade.sampling.samplers import clean_latents
from cascade.sampling.schedule import CosineSchedule, signal_and_noise

_DECIDED = 0.0  # log SNR above which the latents themselves determine the picture


@dataclass(frozen=True, slots=True)
class Emphasis:
    """Which noised latents a stage is trained on, and how much each level counts."""

    starts: float  # share of rows at the start of sampling: pure noise, no trace of the picture
    decoys: float  # share of rows whose noised latents are mixed with another picture
    overshot: float  # share of rows whose noised latents overshoot the right ones, as after strong guidance
    wobbly: float  # share of rows whose noised latents have crooked outlines, like a sampler's own errors
    rough: float  # share of rows with more noise than their level implies, as guidance leaves behind
    low_noise: float  # weight of the clean latents' error: this times the signal-to-noise ratio ...
    highest: float  # ... but at least 1 and at most this


# Of Stage C, and of what is trained on top of it.
PRIOR_EMPHASIS = Emphasis(
    starts=0.15, decoys=0.0, overshot=0.35, wobbly=0.0, rough=0.5, low_noise=0.3, highest=8.0
)


@dataclass(frozen=True, slots=True)
class NoisedBatch:
    """Noised latents, and the clean ones that they should lead to."""

    clean: Tensor  # (b, c, h, w)
    latents: Tensor  # (b, c, h, w)
    log_snr: Tensor  # (b,)
    ratio: Tensor  # (b,)
    weight: Tensor  # (b,)

    def to(self, device: torch.device) -> "NoisedBatch":
        """Return the batch on a device."""
        return NoisedBatch(*(part.to(device) for part in self._parts))

    def __getitem__(self, rows: slice) -> "NoisedBatch":
        """Return some of the rows."""
        return NoisedBatch(*(part[rows] for part in self._parts))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.clean, self.latents, self.log_snr, self.ratio, self.weight

    def implied(self, noise: Tensor) -> Tensor:
        """Return the clean latents that a predicted `noise` implies, (b, c, h, w)."""
        return clean_latents(self.latents, noise.float(), self.log_snr)

    def disagreement(self, noise: Tensor, other: Tensor, importance: Tensor | float = 1.0) -> Tensor:
        """Return the weighted distance of the clean latents that two predictions imply, at low noise only.

        Guidance multiplies the difference of the predictions with and without text. Late in a run that should
        be zero, but the two errors of a small network differ, and guidance turns their difference into noise.
        """
        distance = (importance * (self.implied(noise) - self.implied(other)).square()).mean((1, 2, 3))
        return (distance * self.weight * (self.log_snr > _DECIDED)).mean()

    def loss(self, noise: Tensor, importance: Tensor | float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted error of the clean latents that a predicted `noise` implies, and figures.

        `importance`, (c, 1, 1), is the weight of each channel.
        """
        error = (importance * (self.implied(noise) - self.clean).square()).mean((1, 2, 3))
        figures = {}
        for name, rows in (("start", self.ratio >= self.ratio.max()), ("late", self.ratio < 0.3)):
            if rows.any():
                figures[name] = float(error.detach()[rows].mean())
        return (error * self.weight).mean(), figures


def noise_batch(
    clean: Tensor,
    schedule: CosineSchedule,
    emphasis: Emphasis,
    rng: np.random.Generator,
    shown: Tensor | None = None,
) -> NoisedBatch:
    """Noise `clean` latents to levels spread evenly over time.

    `shown` is noised instead of `clean`, where the network is to lead from there to the clean latents.
    """
    count = len(clean)
    times = (rng.permutation(count) + rng.random(count)) / count
    num_starts = round(emphasis.starts * count)
    times[:num_starts] = 1.0
    log_snr = schedule.log_snr(torch.from_numpy(times))
    alpha, sigma = (scale.float().view(-1, 1, 1, 1) for scale in signal_and_noise(log_snr))
    decoy = torch.from_numpy(
        np.where((rng.random(count) < emphasis.decoys) & (times > 0.3), rng.random(count), 0.0).astype(
            np.float32
        )
    )
    shown = clean if shown is None else shown
    shown = torch.lerp(shown, clean.roll(1, 0), decoy.view(-1, 1, 1, 1))
    shown = _wobble(shown, rng.random(count) < emphasis.wobbly, rng)
    shown = _overshoot(shown, rng.random(count) < emphasis.overshot, rng)
    shown = _roughen(shown, rng.random(count) < emphasis.rough, rng)
    shown[:num_starts] = 0
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
    noise[:num_starts] /= sigma[:num_starts]
    weight = (emphasis.low_noise * log_snr.exp()).clamp(1.0, emphasis.highest).float()
    return NoisedBatch(clean, alpha * shown + sigma * noise, log_snr, schedule.ratio(log_snr).float(), weight)


def _overshoot(latents: Tensor, rows: NDArray[np.bool_], rng: np.random.Generator) -> Tensor:
    """Scale some rows by up to 1.6, and shift each of their channels a little by a constant."""
    count, num_channels = latents.shape[:2]
    scale = 1 + 0.6 * rng.random((count, 1)) * rows[:, None]
    offset = 0.3 * rng.standard_normal((count, num_channels)) * rows[:, None]
    grow, move = (torch.from_numpy(v.astype(np.float32))[:, :, None, None] for v in (scale, offset))
    return latents * grow + move


def _roughen(latents: Tensor, rows: NDArray[np.bool_], rng: np.random.Generator) -> Tensor:
    """Add noise of deviation up to 0.4 to some rows."""
    if not rows.any():
        return latents
    reach = rng.uniform(0, 0.4, (len(latents), 1, 1, 1)) * rows[:, None, None, None]
    noise = rng.standard_normal(tuple(latents.shape), dtype=np.float32)
    return latents + torch.from_numpy(reach.astype(np.float32)) * torch.from_numpy(noise)


def _wobble(latents: Tensor, rows: NDArray[np.bool_], rng: np.random.Generator) -> Tensor:
    """Warp some rows smoothly, by displacements of a deviation of up to 1.5 cells."""
    if not rows.any():
        return latents
    chosen = torch.from_numpy(rows)
    count, (height, width) = int(rows.sum()), latents.shape[-2:]
    reach = rng.uniform(0, 1.5, (count, 1, 1, 1))
    pushes = rng.standard_normal((count, 2, height // 3, width // 3)) * reach * 2
    # In the coordinates of `grid_sample` a picture is 2 wide.
    pushes /= np.array([width, height]).reshape(1, 2, 1, 1)
    smooth = F.interpolate(torch.from_numpy(pushes.astype(np.float32)), (height, width), mode="bilinear")
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 1, height, width], align_corners=False)
    grid = still + smooth.permute(0, 2, 3, 1)
    pushed = F.grid_sample(latents[chosen], grid, padding_mode="border", align_corners=False)
    return latents.clone().index_copy_(0, chosen.nonzero().flatten(), pushed)
