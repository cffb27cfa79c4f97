"""One denoising step of Stages B and C, ours and diffusers', on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cascade.config import StageBConfig, StageCConfig
from cascade.networks.blocks import ratio_embedding
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from tests.benchmarks.weights import in_diffusers, random_network

RATIO = 0.73
TOKENS = 77


@dataclass(slots=True)
class Step:
    """A step at one noise level. Latents are numbers that bf16 holds, so that both libraries see the same."""

    network: StageB | StageC
    latents: Tensor
    prepare: Callable[[], Condition]  # what ours does once per request
    reference: Callable[[Tensor, Tensor], Tensor] | None  # (latents, ratio) -> noise, by diffusers
    condition: Condition = field(init=False)
    ratio: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.condition = self.prepare()
        self.ratio = torch.full((len(self.latents),), RATIO, device=self.latents.device)

    @torch.inference_mode()
    def ours(self) -> Tensor:
        """With the condition prepared before."""
        return self.network(self.latents, self.ratio, self.condition)

    @torch.inference_mode()
    def theirs(self) -> Tensor:
        """diffusers computes the condition in every step."""
        assert self.reference is not None
        half = torch.bfloat16
        return self.reference(self.latents.to(half), self.ratio.to(half))

    def first(self, rows: int) -> "Step":
        """The same step of the first rows only."""
        some = slice(0, rows)
        return replace(self, latents=self.latents[some], prepare=lambda: self.condition[some])

    @torch.inference_mode()
    def exact(self) -> Tensor:
        """In fp32; the network stays so, and its condition is prepared anew."""
        self.network.float()
        return self.network(self.latents, self.ratio, self.prepare())


def stage_c_step(
    config: StageCConfig, rows: int, side: int, device: str = "cpu", *, with_reference: bool = True
) -> Step:
    """A step of `rows` rows (guidance takes two per picture) on a grid of `side` x `side` cells, in bf16."""
    network = random_network(StageC, config, torch.bfloat16, device)
    text = _inputs(rows, TOKENS, config.clip_text_in_channels, device=device)
    pooled = _inputs(rows, 1, config.clip_text_pooled_in_channels, device=device)
    image = torch.zeros(rows, 1, config.clip_image_in_channels, device=device, dtype=torch.bfloat16)
    unet = exact_levels(in_diffusers(network)) if with_reference else None
    return Step(
        network,
        _inputs(rows, config.in_channels, side, side, device=device).float(),
        torch.inference_mode()(lambda: network.prepare(text, pooled, image)),
        unet
        and (lambda x, ratio: unet(x, ratio, *(each[: len(x)] for each in (pooled, text, image))).sample),
    )


def stage_b_step(
    config: StageBConfig, rows: int, side: int, device: str = "cpu", *, with_reference: bool = True
) -> Step:
    """A step of `rows` pictures (without guidance) on latents of `side` x `side`, in bf16."""
    network = random_network(StageB, config, torch.bfloat16, device)
    pooled = _inputs(rows, 1, config.clip_text_pooled_in_channels, device=device)
    effnet = _inputs(rows, config.effnet_in_channels, 24, 24, device=device)
    unet = exact_levels(in_diffusers(network)) if with_reference else None
    return Step(
        network,
        _inputs(rows, config.in_channels, side, side, device=device).float(),
        torch.inference_mode()(lambda: network.prepare(effnet, pooled, (side, side))),
        unet and (lambda x, ratio: unet(x, ratio, pooled[: len(x)], effnet=effnet[: len(x)]).sample),
    )


def exact_levels(unet: Any) -> Any:
    """diffusers' network without its rounding of the noise level to bf16, which would hide other differences.

    It embeds 10000 * bf16(ratio) and so tells the network another level than it was given.
    """
    dtype, dim = unet.dtype, unet.config.timestep_ratio_embedding_dim

    def embed(ratio: Tensor) -> Tensor:
        level = RATIO if ratio.any() else 0.0
        return ratio_embedding(torch.full_like(ratio, level, dtype=torch.float32), dim).to(dtype)

    unet.get_timestep_ratio_embedding = embed
    return unet


def _inputs(*shape: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).bfloat16()
