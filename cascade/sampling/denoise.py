"""Denoising of samples from noise to clean latents.

The network keeps no state. Everything that changes during a run lives in `Sample`, and everything is per row:
samples with different prompts, steps, guidance, samplers and presets share one forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from cascade.sampling.guidance import guide
from cascade.sampling.noise import NoiseSource
from cascade.sampling.presets import Preset
from cascade.sampling.samplers import Sampler, Weights, next_latents, without_noise
from cascade.sampling.schedule import Levels, signal_and_noise


class Rows(Protocol):
    """A condition that guides the network, opaque here except that it has rows."""

    def __getitem__(self, rows: slice, /) -> Self:
        """Return some of the rows."""


C = TypeVar("C", bound=Rows)

# (latents (b, c, h, w), ratio (b,) fp32, condition of b rows) -> predicted noise, same shape as the latents
Network = Callable[[Tensor, Tensor, C], Tensor]

# Conditions of some rows each -> one condition of all their rows, in order
Join = Callable[[list[C]], C]


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Clean latents, part of which is kept: it is restored after every step, with the noise of that level.

    Source: Lugmayr et al. 2022, RePaint, without its resampling (going back in time).
    """

    clean: Tensor  # (c, h, w) fp32
    is_free: Tensor  # (h, w) bool: the cells that are not kept
    draw: NoiseSource  # separate from the sample's, whose noise must not depend on what is kept


class Guides(NamedTuple, Generic[C]):
    """The conditions of a step, one row each."""

    conditional: C
    unconditional: C | None  # of the negative prompt; None: no guidance, one network row per step


@dataclass(slots=True, eq=False)
class Sample(Generic[C]):
    """The state of one picture in one stage.

    It starts from noise or from `start`, and its condition may change between two steps.
    """

    guides: Guides[C]
    guidance_scale: float
    levels: Levels
    sampler: Sampler
    preset: Preset
    draw: NoiseSource
    device: torch.device
    start: Tensor | None = None  # (c, h, w) fp32: latents at the first level; None: noise
    known: Known | None = None
    guided_steps: range | None = None  # the steps with guidance; None: all
    guides_without_control: Guides[C] | None = None  # for the steps outside `controlled_steps`
    controlled_steps: range | None = None  # None: all
    latents: Tensor = field(init=False)  # (c, h, w) fp32, at level `step`
    clean: Tensor = field(init=False)  # (c, h, w) fp32: the last predicted clean latents
    coefficients: Tensor = field(init=False)  # (steps, 6) fp64: ratio, alpha, sigma, the sampler's weights
    step: int = field(default=0, init=False)
    _known_scales: tuple[Tensor, Tensor] = field(init=False, repr=False)  # (steps + 1,) each

    def __post_init__(self) -> None:
        self.latents = self.draw(0).to(self.device) if self.start is None else self.start
        self.clean = torch.zeros_like(self.latents)
        # Computed for all steps at once: sigmoids of one value and of many may differ in their last bits.
        scales = signal_and_noise(self.levels.log_snr[:-1])
        weights = self.sampler(self.levels.log_snr[:-1], self.levels.log_snr[1:])
        weights.fresh[-1] = 0  # no later step would remove this noise
        self.coefficients = torch.stack([self.levels.ratio, *scales, *weights], dim=1)
        self._known_scales = signal_and_noise(self.levels.log_snr)
        self.latents = self.with_known(self.latents, 0)

    @property
    def next_guides(self) -> Guides[C]:
        """Conditions of the next step, the unconditional one only if that step is guided."""
        guides = self.guides
        if self.guides_without_control is not None and self.controlled_steps is not None:
            guides = guides if self.step in self.controlled_steps else self.guides_without_control
        is_guided = self.guided_steps is None or self.step in self.guided_steps
        return guides if is_guided else guides._replace(unconditional=None)

    def with_known(self, latents: Tensor, step: int) -> Tensor:
        """Restore the known part, if any, of latents (c, h, w) at the level of `step`."""
        if self.known is None:
            return latents
        alpha, sigma = (float(scale[step]) for scale in self._known_scales)
        noise = self.known.draw(step).to(latents.device)
        return torch.where(self.known.is_free, latents, alpha * self.known.clean + sigma * noise)

    @property
    def is_done(self) -> bool:
        """Whether all steps have been made."""
        return self.step == self.levels.steps

    @property
    def result(self) -> Tensor:
        """Latents for the next stage, (c, h, w)."""
        return self.clean if self.preset.keeps_clean else self.latents


class Batch(Generic[C]):
    """Samples of one shape that step together; their conditions are joined again only if one has changed."""

    _condition: C
    _guided: Tensor  # indices of the guided samples
    _scale: Tensor
    _rescale: Tensor | None  # None: no guided sample rescales

    def __init__(self, samples: Sequence[Sample[C]], join: Join[C]) -> None:
        self.samples = list(samples)
        self._join = join
        self._joined: list[Guides[C]] = []

    def step(self, network: Network[C]) -> None:
        """Advance every sample by one step of its own, or none if an error occurs."""
        self.commit(*self.compute_step(network))

    def compute_step(self, network: Network[C]) -> tuple[Tensor, Tensor]:
        """Compute the latents of every sample after its next step, and the clean latents predicted there."""
        self._join_conditions()
        samples = self.samples
        latents = torch.stack([sample.latents for sample in samples])
        table = torch.stack([sample.coefficients[sample.step] for sample in samples])
        ratio, alpha, sigma, *weights = table.to(latents.device, torch.float32).unbind(1)
        noise = self._predict(network, latents, ratio)
        clean = without_noise(latents, noise, alpha, sigma)
        # On a GPU the network is still running while this noise is drawn.
        shares = table[:, -1].tolist()
        fresh = torch.stack(
            [
                sample.draw(sample.step + 1) if share > 0 else torch.zeros(latents.shape[1:])
                for sample, share in zip(samples, shares, strict=True)
            ]
        )
        stepped = next_latents(clean, noise, fresh.to(latents.device), Weights(*weights))
        for row, sample in enumerate(samples):
            if sample.known is not None:
                stepped[row] = sample.with_known(stepped[row], sample.step + 1)
                clean[row] = torch.where(sample.known.is_free, clean[row], sample.known.clean)
        return stepped, clean

    def commit(self, latents: Tensor, clean: Tensor) -> None:
        """Store the result of `compute_step` as the state of the samples."""
        for sample, stepped, predicted in zip(self.samples, latents, clean, strict=True):
            sample.latents, sample.clean = stepped, predicted
            sample.step += 1

    def _join_conditions(self) -> None:
        """Join the conditions of all samples' next steps, unless they are joined already."""
        guides = [sample.next_guides for sample in self.samples]
        same = (
            condition is known and unguided is known_unguided
            for (condition, unguided), (known, known_unguided) in zip(guides, self._joined, strict=False)
        )
        if self._joined and all(same):
            return
        device = self.samples[0].device
        guided = [row for row, (_, unguided) in enumerate(guides) if unguided is not None]
        active = [self.samples[row] for row in guided]
        unguided = [each for _, each in guides if each is not None]
        self._condition = self._join([*(condition for condition, _ in guides), *unguided])
        self._guided = torch.tensor(guided, device=device)
        self._scale = torch.tensor([sample.guidance_scale for sample in active], device=device)
        rescale = [sample.preset.rescale for sample in active]
        self._rescale = torch.tensor(rescale, device=device) if any(rescale) else None
        self._joined = guides

    def _predict(self, network: Network[C], latents: Tensor, ratio: Tensor) -> Tensor:
        """Predict the noise in fp32. The network's rows are all samples, then the guided ones unguided."""
        guided = self._guided
        if not len(guided):
            return network(latents, ratio, self._condition).float()
        if len(guided) == len(latents):  # the usual case, which does without gathering rows
            noise = network(torch.cat([latents, latents]), torch.cat([ratio, ratio]), self._condition).float()
            noise, unguided = noise.chunk(2)
            return guide(noise, unguided, self._scale, self._rescale)
        rows = torch.cat([latents, latents[guided]])
        noise = network(rows, torch.cat([ratio, ratio[guided]]), self._condition).float()
        noise, unguided = noise[: len(latents)], noise[len(latents) :]
        return noise.index_copy(0, guided, guide(noise[guided], unguided, self._scale, self._rescale))


def in_parts(network: Network[C], rows: int) -> Network[C]:
    """Wrap a network so that a call gets at most `rows` rows; with 1, a row is bit-identical in any batch."""

    def call(latents: Tensor, ratio: Tensor, condition: C) -> Tensor:
        if len(latents) <= rows:
            return network(latents, ratio, condition)
        parts = [slice(start, start + rows) for start in range(0, len(latents), rows)]
        return torch.cat([network(latents[part], ratio[part], condition[part]) for part in parts])

    return call


@torch.inference_mode()
def denoise(network: Network[C], samples: list[Sample[C]], join: Join[C]) -> Iterator[None]:
    """Advance `samples` together and yield after every step.

    Between two steps the caller may report progress, remove a cancelled sample or append a new one.
    Samples may be at different steps; their shapes must match.
    """
    batch: Batch[C] | None = None
    while active := [sample for sample in samples if not sample.is_done]:
        if batch is None or batch.samples != active:
            batch = Batch(active, join)
        batch.step(network)
        yield
