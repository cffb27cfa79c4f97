"""Graphs and compiled blocks on a CUDA device against the same networks without, at published size in bf16.

A graph launches the same kernels on the same values: it must agree to the last bit. Compiled blocks round in
other places: they may be no further from fp32 than eager is.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cascade.acceleration import GRAPH_ROWS, CudaRecorder, Graphs, accelerate, keeping_graphs
from cascade.config import STAGE_B_700M, STAGE_C_1B
from cascade.networks.unet import Condition
from tests.benchmarks.steps import Step, stage_b_step, stage_c_step

pytestmark = pytest.mark.gpu

SLACK = 1.1  # both errors are sums of about the same number of roundings
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu: no CUDA device is here", returncode=2)
    with torch.inference_mode():
        yield
    torch.cuda.empty_cache()


def step_of(stage: str, rows: int) -> Step:
    if stage == "c":
        return stage_c_step(STAGE_C_1B, rows, 24, "cuda", with_reference=False)
    return stage_b_step(STAGE_B_700M, rows, 256, "cuda", with_reference=False)


def first(step: Step, rows: int) -> tuple[Tensor, Tensor, Condition]:
    some = slice(0, rows)
    return step.latents[some], step.ratio[some], step.condition[some]


@pytest.mark.parametrize("stage", ["b", "c"])
def test_a_graph_is_eager_to_the_last_bit(stage: str) -> None:
    step = step_of(stage, 8)
    graphs = Graphs(step.network, CudaRecorder(CUDA), keeps_all=True)
    for rows in (1, 2, 4, 8, 1, 4, 8, 2):  # all are recorded, then each writes over what another left
        given = first(step, rows)
        expected = step.network(*given)
        for _ in range(3):
            assert torch.equal(graphs(*given), expected), f"{rows} rows"


def test_graphs_share_their_memory() -> None:
    step = step_of("b", 8)
    graphs = Graphs(step.network, CudaRecorder(CUDA), keeps_all=True)
    grown: list[int] = []
    for rows in (8, 4):
        before = torch.cuda.memory_reserved()
        graphs(*first(step, rows))
        torch.cuda.empty_cache()
        grown.append(torch.cuda.memory_reserved() - before)
    assert grown[1] <= grown[0] / 8, f"{grown[0]:,} bytes for 8 rows, {grown[1]:,} more for 4"


@pytest.mark.parametrize("stage", ["b", "c"])
def test_rows_between_two_graphs_are_padded(stage: str) -> None:
    step = step_of(stage, 8)
    graphs = Graphs(step.network, CudaRecorder(CUDA), keeps_all=True)
    padded = [torch.cat([each, torch.zeros_like(each[:3])]) for each in (step.latents[:5], step.ratio[:5])]
    condition = Condition.cat([step.condition[:5], step.condition[5:8]])
    expected = step.network(padded[0], padded[1], condition)[:5]
    made = graphs(*first(step, 5))
    assert (made - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_a_graph_sees_new_latents_levels_and_conditions() -> None:
    step = step_of("b", 4)
    graphs = Graphs(step.network, CudaRecorder(CUDA), keeps_all=True)
    for start in (0, 2):
        some = slice(start, start + 2)
        given = (step.latents[some], step.ratio[some] / (1 + start), step.condition[some])
        assert torch.equal(graphs(*given), step.network(*given))


@pytest.mark.parametrize("stage", ["b", "c"])
def test_compiled_blocks_are_as_exact_as_eager(stage: str) -> None:
    step = step_of(stage, 2)
    eager = step.ours()
    network = accelerate(step.network, "full", CUDA)
    with keeping_graphs([network]):
        compiled = network(step.latents, step.ratio, step.condition).clone()
    for block in step.network.modules():
        block._compiled_call_impl = None
    exact = step.exact()
    assert error(compiled, exact) <= SLACK * error(eager, exact)


def test_the_largest_graph_is_the_largest_batch_that_graphs_serve() -> None:
    step = step_of("c", GRAPH_ROWS[-1] + 1)
    graphs = Graphs(step.network, CudaRecorder(CUDA), keeps_all=True)
    assert torch.equal(
        graphs(*first(step, GRAPH_ROWS[-1] + 1)), step.network(*first(step, GRAPH_ROWS[-1] + 1))
    )


def error(result: Tensor, exact: Tensor) -> float:
    return ((result.float() - exact).square().mean().sqrt() / exact.std()).item()
