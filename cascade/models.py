"""Everything that a checkpoint brings, loaded: networks, encoders and the constants that go with them."""

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
    """The LoRAs that can be asked for by name: `cascade.lora.LoRALibrary`."""

    def names(self) -> list[str]:
        """The names that can be asked for."""

    def adapter(self, models: "Models", uses: Sequence[tuple[str, float]]) -> Adapter | None:
        """Some of them by name and scale; raises `InvalidSetting` for one that is not there."""


@dataclass(kw_only=True, eq=False, repr=False)
class Models:
    """The parts of one checkpoint. None changes while pictures are made, so that requests can share them."""

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
    stated_scale_factor: float | None = None  # of Stage A's latents, in a configuration file of diffusers

    def in_fp32(self, stage: Literal["stage_a", "stage_b", "stage_c"]) -> Self:
        """The same models with a copy of one network in fp32, to try again what failed in less precision."""
        return replace(self, **{stage: deepcopy(getattr(self, stage)).float()})

    def scale_factor(self, preset: str) -> float:
        """By what a preset multiplies Stage B's latents before Stage A decodes them.

        The published weights are decoded with one constant by the official code and with another by
        diffusers; a checkpoint with a constant of its own is decoded with that by both.
        """
        known = self.stage_a.config.scale_factor
        if preset == "official":
            return OFFICIAL_SCALE_FACTOR if known == DIFFUSERS_SCALE_FACTOR else known
        if self.stated_scale_factor is not None:
            return self.stated_scale_factor
        return DIFFUSERS_SCALE_FACTOR if known == OFFICIAL_SCALE_FACTOR else known
