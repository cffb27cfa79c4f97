"""Stages A, B and C at published size on a CUDA device, in bf16, with random weights made there.

In bf16 two right programs differ by their roundings. So both are held against the same network in fp32: ours
may be no further from it than diffusers is.

`make test-gpu` runs this. A machine that has only torch, transformers, diffusers and pytest needs no more:
`python -m pytest -c /dev/null --rootdir . --noconftest --import-mode=importlib tests/gpu`
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cascade.config import STAGE_A, STAGE_B_1_5B, STAGE_C_3_6B
from cascade.networks.stage_a import StageA
from tests.benchmarks.steps import Step, stage_b_step, stage_c_step
from tests.benchmarks.weights import in_diffusers, random_network

pytestmark = pytest.mark.gpu

SLACK = 1.1  # both errors are sums of about the same number of roundings
LARGEST_ERROR = 0.05  # of the output's deviation: 2**-9 per rounding, over some three hundred layers


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu: no CUDA device is here", returncode=2)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield "cuda"
    torch.cuda.empty_cache()


@pytest.mark.parametrize("rows", [1, 3])
def test_stage_c_is_as_exact_as_diffusers(device: str, rows: int) -> None:
    assert_as_exact_as_diffusers(stage_c_step(STAGE_C_3_6B, rows, 24, device))


@pytest.mark.parametrize("rows", [1, 2])
def test_stage_b_is_as_exact_as_diffusers(device: str, rows: int) -> None:
    assert_as_exact_as_diffusers(stage_b_step(STAGE_B_1_5B, rows, 256, device))


@torch.inference_mode()
def test_stage_a_is_as_exact_as_diffusers(device: str) -> None:
    network = random_network(StageA, STAGE_A, torch.bfloat16, device)
    latents = torch.randn(1, STAGE_A.latent_channels, 256, 256, device=device).bfloat16()
    theirs = in_diffusers(network).decode(latents).sample
    ours = network.decode(latents, scale_factor=1)
    assert_close(ours, theirs, network.float().decode(latents.float(), scale_factor=1))


@pytest.mark.parametrize("stage", ["b", "c"])
def test_a_batch_equals_its_rows_alone(device: str, stage: str) -> None:
    if stage == "c":
        step = stage_c_step(STAGE_C_3_6B, 4, 24, device, with_reference=False)
    else:
        step = stage_b_step(STAGE_B_1_5B, 4, 256, device, with_reference=False)
    together = step.ours()
    with torch.inference_mode():
        for row in range(4):
            one = slice(row, row + 1)
            alone = step.network(step.latents[one], step.ratio[one], step.condition[one])
            assert relative_error(alone, together[one].float()) <= LARGEST_ERROR


def assert_as_exact_as_diffusers(step: Step) -> None:
    ours, theirs = step.ours(), step.theirs()
    step.reference = None
    assert_close(ours, theirs, step.exact())


def assert_close(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert exact.isfinite().all()
    assert exact.std() > 0.01
    assert relative_error(ours, exact) <= LARGEST_ERROR
    assert relative_error(ours, exact) <= SLACK * relative_error(theirs, exact)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.float() - exact).square().mean().sqrt() / exact.std()).item()
