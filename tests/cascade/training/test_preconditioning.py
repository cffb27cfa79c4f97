from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.networks.unet import UNet
from cascade.sampling.samplers import clean_latents
from cascade.sampling.schedule import CosineSchedule
from cascade.training.preconditioning import precondition
from cascade.training.stage_b import SCHEDULE as SCHEDULE_B
from cascade.training.stage_b import TINY_STAGE_B
from cascade.training.stage_c import SCHEDULE as SCHEDULE_C
from cascade.training.stage_c import TINY_STAGE_C


@pytest.fixture(scope="module")
def stage_b() -> tuple[StageB, dict[str, Tensor]]:
    torch.manual_seed(0)
    stage = StageB(TINY_STAGE_B)
    return stage, precondition(stage, CosineSchedule(SCHEDULE_B), 200.0)


@torch.no_grad()
def implied_clean(stage: StageB, latents: Tensor, t: float) -> Tensor:
    schedule = CosineSchedule(SCHEDULE_B)
    log_snr = schedule.log_snr(torch.full((len(latents),), t, dtype=torch.float64))
    condition = stage.prepare(
        torch.zeros(len(latents), 16, 3, 3), torch.zeros(len(latents), 1, 128), (16, 16)
    )
    noise = stage(latents, schedule.ratio(log_snr).float(), condition)
    return clean_latents(latents, noise, log_snr)


@pytest.mark.parametrize("t", [1.0, 0.9, 0.5, 0.1])
def test_at_the_start_the_input_passes_exactly_enough_to_be_divided_by_alpha(
    stage_b: tuple[StageB, dict[str, Tensor]], t: float
) -> None:
    """The clean latents implied do not depend on the input: what is subtracted is the input itself.

    An untrained network of the ordinary kind is off by 1 / alpha = 7 at t = 1. Residual branches are not
    silent at the start, so a slight dependence remains.
    """
    stage, _ = stage_b
    latents = torch.randn(4, 4, 16, 16)
    clean = implied_clean(stage, latents, t)
    slope = (clean * latents).mean() / latents.square().mean()
    assert abs(slope) < 0.05
    assert clean.std() < 1.5


def test_the_carrying_weights_are_frozen_and_the_rest_is_not(
    stage_b: tuple[StageB, dict[str, Tensor]],
) -> None:
    stage, trainable = stage_b
    assert not trainable["embedding.1.weight"].any()
    assert not trainable["clf.1.weight"].any()
    assert trainable["up_blocks.2.0.channelwise.4.weight"].mean() > 0.5
    free = sum(
        float(trainable[n].sum()) if n in trainable else p.numel() for n, p in stage.named_parameters()
    )
    assert free > 0.9 * sum(parameter.numel() for parameter in stage.parameters())


def test_stage_c_starts_the_same_way() -> None:
    torch.manual_seed(0)
    stage = StageC(replace(TINY_STAGE_C, down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1)))
    schedule = CosineSchedule(SCHEDULE_C)
    precondition(stage, schedule, 100.0)
    log_snr = schedule.log_snr(torch.ones(4, dtype=torch.float64))
    latents = torch.randn(4, 16, 6, 6)
    with torch.no_grad():
        condition = stage.prepare(torch.randn(4, 5, 128), torch.randn(4, 1, 128), torch.zeros(4, 1, 128))
        noise = stage(latents, schedule.ratio(log_snr).float(), condition)
    slope = (clean_latents(latents, noise, log_snr) * latents).mean()
    assert abs(slope) < 0.3  # an ordinary start: 14


def test_nothing_but_weights_changes(stage_b: tuple[StageB, dict[str, Tensor]]) -> None:
    stage, _ = stage_b
    fresh: UNet = StageB(TINY_STAGE_B)
    assert {n: p.shape for n, p in stage.named_parameters()} == {
        n: p.shape for n, p in fresh.named_parameters()
    }
