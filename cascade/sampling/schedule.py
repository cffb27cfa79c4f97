"""The cosine schedule: from time t (1 noise, 0 clean) to noise level, and to the ratio that networks read.

The level is the log of the signal-to-noise ratio, `log_snr`; latents at a level are alpha * clean + sigma *
noise with alpha^2 = sigmoid(log_snr) and sigma^2 = 1 - alpha^2. Differences of nearly equal squares are
written as products of sines, so that both ends are exact even in fp32.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade.config import ScheduleConfig

_QUARTER = math.pi / 2  # the cosine falls to 0 over a quarter turn


@dataclass(frozen=True, slots=True)
class Levels:
    """Noise levels of one sample's run, fp64 on the CPU."""

    log_snr: Tensor  # (steps + 1,): rising from noise to clean; the last is the level of the result
    ratio: Tensor  # (steps,): what the network receives at the start of each step

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return len(self.ratio)


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """Noise levels over time, as a checkpoint's scheduler configuration defines them."""

    config: ScheduleConfig

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the level at time `t` (any shape, 0..1), clamped before and after the shift."""
        offset = self._offset
        angle = offset + self._warp(t) * (_QUARTER - offset)
        noise = torch.sin(angle - offset) * torch.sin(angle + offset)  # cos^2(offset) - cos^2(angle)
        log_snr = 2 * torch.cos(angle).abs().log() - noise.log()
        return self._clamp(self._clamp(log_snr) - 2 * math.log(self.config.shift))

    def ratio(self, log_snr: Tensor) -> Tensor:
        """Return the number in 0..1 that tells a network the level: the unshifted time of that level."""
        signal, noise = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        cosine = signal.sqrt() * math.cos(self._offset)
        sine = (noise + signal * math.sin(self._offset) ** 2).sqrt()
        return torch.atan2(sine, cosine) / _QUARTER * (1 + self.config.s) - self.config.s

    def grid(self, steps: int, t_start: float = 1.0) -> Levels:
        """Return the levels of a run in equal steps of time from `t_start` to 0, as in the official code."""
        log_snr = self.log_snr(torch.linspace(t_start, 0.0, steps + 1, dtype=torch.float64))
        return Levels(log_snr, self.ratio(log_snr[:-1]))

    def diffusers_grid(self, steps: int, t_start: float = 1.0) -> Levels:
        """Return the levels of a run in diffusers: no shift, and the network is told the time, 1.0 at first.

        A checkpoint with its own clamp was never trained on times beyond it: it is told the level's time.
        """
        # The times as fp32 rounds them
        t = torch.linspace(t_start, 0.0, steps + 1, dtype=torch.float32).double()
        log_snr = self.unshifted.log_snr(t)
        return Levels(log_snr, self.ratio(log_snr[:-1]) if self._has_own_clamp else t[:-1])

    @property
    def unshifted(self) -> "CosineSchedule":
        """This schedule at shift 1."""
        return CosineSchedule(replace(self.config, shift=1.0))

    @property
    def _offset(self) -> float:
        """Angle at t = 0, slightly past the maximum of the cosine."""
        return self.config.s / (1 + self.config.s) * _QUARTER

    @property
    def _has_own_clamp(self) -> bool:
        official = ScheduleConfig()
        return (self.config.clamp_min, self.config.clamp_max) != (official.clamp_min, official.clamp_max)

    def _clamp(self, log_snr: Tensor) -> Tensor:
        return log_snr.clamp(_logit(self.config.clamp_min), _logit(self.config.clamp_max))

    def _warp(self, t: Tensor) -> Tensor:
        """Apply the time warp of diffusers' scheduler; a scaler of 1 changes nothing."""
        scaler = self.config.scaler
        if scaler == 1:
            return t
        return 1 - (1 - t) ** scaler if scaler > 1 else t**scaler


def signal_and_noise(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales alpha of the clean latents and sigma of the noise; their squares sum to one."""
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def _logit(share: float) -> float:
    """Return the level of a share of signal, in fp32 like both code bases: .9999 is 9.21007, not 9.21024."""
    rounded = torch.tensor(share, dtype=torch.float32).item()
    return math.log(rounded / (1 - rounded))
