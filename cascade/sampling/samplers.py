"""Samplers: the rules by which latents move from one noise level to the next.

Every rule is a weighted sum of the predicted clean latents, the predicted noise and fresh noise. So a sampler
is just a function that returns the three weights, and rows of one batch may use different samplers.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.sampling.schedule import signal_and_noise


class Weights(NamedTuple):
    """Weights of the three parts of the next latents, each of the shape of the levels."""

    clean: Tensor
    noise: Tensor
    fresh: Tensor


# (log_snr, next_log_snr) -> weights
Sampler = Callable[[Tensor, Tensor], Weights]


def ddim(_: Tensor, next_log_snr: Tensor) -> Weights:
    """Keep the predicted noise: deterministic (Song et al. 2021, equation 12 with sigma = 0)."""
    next_alpha, next_sigma = signal_and_noise(next_log_snr)
    return Weights(next_alpha, next_sigma, torch.zeros_like(next_sigma))


def ddpm(log_snr: Tensor, next_log_snr: Tensor) -> Weights:
    """Replace part of the predicted noise by fresh noise: ancestral (the same equation with eta = 1)."""
    alpha, sigma = signal_and_noise(log_snr)
    next_alpha, next_sigma = signal_and_noise(next_log_snr)
    replaced = (1 - (alpha / next_alpha) ** 2).clamp(min=0)  # share of the noise variance to draw afresh
    fresh = next_sigma / sigma * replaced.sqrt()
    return Weights(next_alpha, (next_sigma**2 - fresh**2).clamp(min=0).sqrt(), fresh)


def lcm(_: Tensor, next_log_snr: Tensor) -> Weights:
    """Draw all noise afresh: consistency sampling (Luo et al. 2023, latent consistency models)."""
    next_alpha, next_sigma = signal_and_noise(next_log_snr)
    return Weights(next_alpha, torch.zeros_like(next_sigma), next_sigma)


SAMPLERS: Mapping[str, Sampler] = MappingProxyType({"ddpm": ddpm, "ddim": ddim, "lcm": lcm})


def clean_latents(latents: Tensor, noise: Tensor, log_snr: Tensor) -> Tensor:
    """Return the clean latents x0 that a noise prediction implies; `log_snr` is (b,), the rest (b, c, h, w).

    At the first step alpha is .01, which amplifies errors of the prediction a hundredfold: keep this in fp32,
    unclamped.
    """
    return without_noise(latents, noise, *signal_and_noise(log_snr))


def without_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Compute `clean_latents` from the scales of the level, (b,) each."""
    alpha, sigma = (scale.view(-1, 1, 1, 1).to(latents) for scale in (alpha, sigma))
    return torch.addcmul(latents, sigma, noise, value=-1) / alpha


def next_latents(clean: Tensor, noise: Tensor, fresh: Tensor, weights: Weights) -> Tensor:
    """Return the latents at the next level, (b, c, h, w); each of the `weights` is (b,)."""
    shares = [weight.view(-1, 1, 1, 1).to(clean) for weight in weights]
    return torch.addcmul(torch.addcmul(shares[0] * clean, shares[1], noise), shares[2], fresh)
