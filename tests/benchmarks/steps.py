"""One denoising step of Stages B and C, ours and diffusers', on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.config import StageBConfig, StageCConfig
from cascade.networks.blocks import ratio_embedding
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from tests.benchmarks.weights import in_diffusers, random_network

_RATIO = 0.73
_TOKENS = 77


@dataclass(frozen=True, slots=True)
class Step:
    """The same step in both libraries; `prepare` is what ours does once per request."""

    network: StageB | StageC
    prepare: Callable[[], object]
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor] | None = None


def stage_c_step(
    config: StageCConfig, rows: int, side: int, device: str = "cpu", *, with_reference: bool = True
) -> Step:
    """A step of `rows` rows (guidance takes two per picture) on a grid of `side` x `side` cells, in bf16."""
    dtype = torch.bfloat16
    network = random_network(StageC, config, dtype, device)
    latents = torch.randn(rows, config.in_channels, side, side, device=device)
    text = torch.randn(rows, _TOKENS, config.clip_text_in_channels, device=device).to(dtype)
    pooled = torch.randn(rows, 1, config.clip_text_pooled_in_channels, device=device).to(dtype)
    image = torch.zeros(rows, 1, config.clip_image_in_channels, device=device, dtype=dtype)
    ratio = torch.full((rows,), _RATIO, device=device)

    def prepare() -> Any:
        return network.prepare(text, pooled, image)

    with torch.inference_mode():
        condition = prepare()
    if not with_reference:
        return Step(network, _quiet(prepare), _quiet(lambda: network(latents, ratio, condition)))
    unet = exact_levels(in_diffusers(network))
    half = latents.to(dtype)
    return Step(
        network,
        _quiet(prepare),
        _quiet(lambda: network(latents, ratio, condition)),
        _quiet(lambda: unet(half, ratio.to(dtype), pooled, text, image).sample),
    )


def stage_b_step(
    config: StageBConfig, rows: int, side: int, device: str = "cpu", *, with_reference: bool = True
) -> Step:
    """A step of `rows` pictures (without guidance) on latents of `side` x `side`, in bf16."""
    dtype = torch.bfloat16
    network = random_network(StageB, config, dtype, device)
    latents = torch.randn(rows, config.in_channels, side, side, device=device)
    pooled = torch.randn(rows, 1, config.clip_text_pooled_in_channels, device=device).to(dtype)
    effnet = torch.randn(rows, config.effnet_in_channels, 24, 24, device=device)
    ratio = torch.full((rows,), _RATIO, device=device)

    def prepare() -> Any:
        return network.prepare(effnet, pooled, (side, side))

    with torch.inference_mode():
        condition = prepare()
    if not with_reference:
        return Step(network, _quiet(prepare), _quiet(lambda: network(latents, ratio, condition)))
    unet = exact_levels(in_diffusers(network))
    half, guide = latents.to(dtype), effnet.to(dtype)
    return Step(
        network,
        _quiet(prepare),
        _quiet(lambda: network(latents, ratio, condition)),
        _quiet(lambda: unet(half, ratio.to(dtype), pooled, effnet=guide).sample),
    )


def exact_levels(unet: Any) -> Any:
    """diffusers' network without its rounding of the noise level to bf16, which would hide other differences.

    It embeds 10000 * bf16(ratio) and so tells the network another level than it was given.
    """
    dtype, dim = unet.dtype, unet.config.timestep_ratio_embedding_dim

    def embed(ratio: Tensor) -> Tensor:
        level = _RATIO if ratio.any() else 0.0
        return ratio_embedding(torch.full_like(ratio, level, dtype=torch.float32), dim).to(dtype)

    unet.get_timestep_ratio_embedding = embed
    return unet


def _quiet(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work` without gradients."""

    def run() -> Tensor:
        with torch.inference_mode():
            return work()

    return run
