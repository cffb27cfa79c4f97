"""Noise that depends on nothing but the request.

`gaussian` is a function of (seed, stage, step), so a picture gets the same noise alone, in any batch, on any
machine and after any crash. `TorchGenerator` instead repeats the draws of a diffusers script, step by step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Stage = Literal["prior", "decoder", "prior known", "decoder known"]  # known: the part that a mask keeps

# step -> noise of the latents' shape, fp32 on the CPU: step 0 is the initial noise, step i the i-th update's
NoiseSource = Callable[[int], Tensor]

_STAGE_NUMBER: dict[Stage, int] = {"prior": 1, "decoder": 2, "prior known": 3, "decoder known": 4}


def gaussian(shape: Sequence[int], seed: int, stage: Stage, step: int) -> Tensor:
    """Draw standard normal noise, fp32 on the CPU: Philox 4x64 bits (Salmon et al. 2011) through Box-Muller.

    The key is (seed, stage), the high counter word is the step. numpy guarantees these bits for ever, but not
    its normal variates: hence our own transform, in fp64, so that rounding to fp32 hides differences of libm.
    """
    num_values = math.prod(shape)
    key = np.array([seed, _STAGE_NUMBER[stage]], dtype=np.uint64)
    counter = np.array([0, 0, 0, step], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw((num_values + 1) // 2)
    # Integers below 2**32 are exact in fp64. PyTorch's sine takes a tenth of numpy's time.
    halves = (torch.from_numpy(half.astype(np.float64)) for half in (bits >> 32, bits & 0xFFFFFFFF))
    first, second = (half.add_(0.5) for half in halves)
    radius = first.div_(2**32).log_().mul_(-2).sqrt_()
    angle = second.mul_(2 * math.pi / 2**32)
    pairs = torch.empty(len(bits), 2)
    torch.mul(radius, angle.cos(), out=pairs[:, 0])
    torch.mul(radius, angle.sin_(), out=pairs[:, 1])
    return pairs.flatten()[:num_values].reshape(*shape)


@dataclass(frozen=True, slots=True)
class PhiloxNoise:
    """Noise source of one sample that draws from `gaussian`."""

    shape: tuple[int, ...]
    seed: int
    stage: Stage

    def __call__(self, step: int) -> Tensor:
        """Draw the noise of one step."""
        return gaussian(self.shape, self.seed, self.stage, step)


class TorchGenerator:
    """Noise source with the draws of `torch.Generator("cpu").manual_seed(seed)` in a diffusers script.

    Draws are sequential, so the generator's state before each is kept: any of them can be repeated.
    `dtype` is the weights' (the draws differ between types); `earlier` are shapes drawn before this run.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        earlier: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        generator = torch.Generator("cpu").manual_seed(seed)
        for drawn in earlier:
            torch.randn(drawn, generator=generator, dtype=dtype)
        self._states = [generator.get_state()]

    def __call__(self, step: int) -> Tensor:
        """Draw the noise of one step, after that of all earlier steps which were not drawn yet."""
        generator = torch.Generator("cpu")
        for known in range(min(step, len(self._states) - 1), step + 1):
            generator.set_state(self._states[known])
            noise = torch.randn(self._shape, generator=generator, dtype=self._dtype)
            if known + 1 == len(self._states):
                self._states.append(generator.get_state())
        return noise.float()
