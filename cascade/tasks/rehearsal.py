"""Steps of a made-up picture, to measure how long they take and to warm up before real requests."""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cascade.conditioning import encode_texts
from cascade.devices import limit_bytes, peak_bytes, used_bytes
from cascade.models import Models
from cascade.networks.unet import Condition, Constants
from cascade.sampling.denoise import Batch, Guides, Network, Sample
from cascade.tasks.picture import begin_decoder, begin_prior, decode, plan_pictures, prior_condition
from cascade.tasks.settings import ImageSettings

Step = Literal["prior", "decoder", "decode"]

_REPEATS = 3
_PATIENCE_SECONDS = 0.5  # no further repeats after this total


class Rehearsal:
    """A made-up picture of a size (width, height), without guidance: one row, repeated to fill any batch."""

    def __init__(
        self, models: Models, networks: Mapping[str, Network[Condition]], size: tuple[int, int]
    ) -> None:
        self._models = models
        self._networks = networks
        settings = ImageSettings(
            prompt="a rehearsal", width=size[0], height=size[1], seed=0, guidance_scale=0
        )
        [self._picture] = plan_pictures(models, settings)
        self._bytes_before = used_bytes(models.device)
        self._limit_bytes = limit_bytes(models.device)

    def shape(self, step: Step) -> tuple[int, int]:
        """Return height and width of the latents that a step reads."""
        plan = self._picture.plan
        return plan.prior_grid if step == "prior" else plan.decoder_grid

    @torch.inference_mode()
    def seconds(self, step: Step, rows: int) -> float:
        """Return the shortest duration of a step after a warm-up.

        On one thread of a CPU it is that thread's CPU time, which others on the same core do not prolong.
        """
        device = self._models.device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        work = self._work(step, rows)
        work()
        taken: list[float] = []
        while len(taken) < _REPEATS and sum(taken) < _PATIENCE_SECONDS:
            _wait_for(device)
            started = clock()
            work()
            _wait_for(device)
            taken.append(clock() - started)
        return min(taken)

    @torch.inference_mode()
    def make(self, step: Step, rows: int) -> None:
        """Run a step once."""
        self._work(step, rows)()

    def has_room_for_twice(self) -> bool:
        """Tell whether a step with twice the rows of the largest so far should fit into memory."""
        grown = peak_bytes(self._models.device) - self._bytes_before
        return self._bytes_before + 2 * grown <= self._limit_bytes

    @torch.inference_mode()
    def num_pictures(self) -> int:
        """Return how many pictures may be in progress in half of the free memory; the rest is for steps."""
        samples = (self._prior(), self._decoder())
        largest = max(
            2 * sample.guides.conditional.num_bytes + 3 * sample.latents.nbytes for sample in samples
        )
        return max(1, (self._limit_bytes - used_bytes(self._models.device)) // 2 // largest)

    def _work(self, step: Step, rows: int) -> Callable[[], Tensor]:
        if step == "decode":
            latents = torch.zeros(self._picture.decoder_shape, device=self._models.device)
            return lambda: decode(self._models, [self._picture] * rows, [latents] * rows)
        sample = self._prior() if step == "prior" else self._decoder()
        batch = Batch([sample] * rows, Condition.cat)
        return lambda: batch.compute_step(self._networks[step])[0]

    def _prior(self) -> Sample[Condition]:
        text = self._models.text_encoder.encode([self._picture.settings.prompt])
        condition = prior_condition(self._models, text, constants=self._prior_constants)
        return begin_prior(self._models, self._picture, Guides(condition, None))

    def _decoder(self) -> Sample[Condition]:
        texts = encode_texts(self._models.decoder_text_encoder, self._picture.settings.texts)
        pooled = [texts[text].pooled for text in self._picture.settings.texts]
        semantic = torch.zeros(self._picture.prior_shape, device=self._models.device)
        constants = self._decoder_constants
        return begin_decoder(self._models, self._picture, semantic, pooled, constants=constants)

    @cached_property
    def _prior_constants(self) -> Constants:
        return self._models.stage_c.constants()

    @cached_property
    def _decoder_constants(self) -> Constants:
        return self._models.stage_b.constants()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
