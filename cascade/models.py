"""The loaded contents of a checkpoint: networks, encoders and the constants that go with them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self

import torch

from cascade.conditioning import ImageEncoder, TextEncoder
from cascade.config import ScheduleConfig
from cascade.networks.adapters import Adapter
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.sizes import NativeSizes

OFFICIAL_SCALE_FACTOR = 0.43
DIFFUSERS_SCALE_FACTOR = 0.3764  # left over from an earlier model, in diffusers' configuration only


class LoRAs(Protocol):
    """Interface of a collection of named LoRAs: `cascade.lora.LoRALibrary`."""

    def names(self) -> list[str]:
        """Return the names of the installed LoRAs."""

    def adapter(self, models: "Models", uses: Sequence[tuple[str, float]]) -> Adapter | None:
        """Return the adapter of some LoRAs by name and scale; raise `InvalidSetting` for an unknown name."""


@dataclass(kw_only=True, eq=False, repr=False)
class Models:
    """The parts of one checkpoint. They do not change while pictures are made, so requests can share them."""

    stage_a: StageA
    stage_b: StageB
    stage_c: StageC
    text_encoder: TextEncoder
    decoder_text_encoder: TextEncoder  # the same object, unless the decoder brings different weights
    prior_schedule: ScheduleConfig
    decoder_schedule: ScheduleConfig
    image_encoder: ImageEncoder | None = None
    effnet: EffNetEncoder | None = None
    previewer: Previewer | None = None
    loras: LoRAs | None = None
    controlnets: Mapping[str, ControlNet] = field(default_factory=dict)  # by kind
    native: NativeSizes = field(default_factory=NativeSizes)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    name: str = ""
    stated_scale_factor: float | None = None  # of Stage A's latents, if its configuration states one

    def in_fp32(self, stage: Literal["stage_a", "stage_b", "stage_c"]) -> Self:
        """Return the models with a copy of one network in fp32, to retry what failed in lower precision."""
        return replace(self, **{stage: deepcopy(getattr(self, stage)).float()})

    def scale_factor(self, preset: str) -> float:
        """Return the factor by which a preset multiplies Stage B's latents before Stage A decodes them.

        The official code decodes the published weights with one constant, diffusers with another; a
        checkpoint with a constant of its own is decoded with that by both.
        """
        known = self.stage_a.config.scale_factor
        if preset == "official":
            return OFFICIAL_SCALE_FACTOR if known == DIFFUSERS_SCALE_FACTOR else known
        if self.stated_scale_factor is not None:
            return self.stated_scale_factor
        return DIFFUSERS_SCALE_FACTOR if known == OFFICIAL_SCALE_FACTOR else known
