"""Graphs with a recorder that runs on a CPU: the same buffers are read again at every replay."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cascade import acceleration
from cascade.acceleration import Graphs, accelerate, keeping_graphs, repeated_blocks
from cascade.networks.unet import Condition
from cascade.recent import Recent
from tests.cascade.small_models import small_cascade

SIZE = (8, 8)


class Recorder:
    """What a CUDA graph does: computes from the same tensors, and writes to the same place every time."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        result = run()

        def replay() -> Tensor:
            self.num_replayed += 1
            return result.copy_(run())

        return replay


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


CASCADE = small_cascade()


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, 1, 8, generator=generator)
    semantic = torch.randn(rows, 16, 3, 3, generator=generator)
    condition = CASCADE.stage_b.prepare(semantic, pooled, SIZE)
    latents, ratio = torch.randn(rows, 4, *SIZE, generator=generator), torch.rand(rows, generator=generator)
    return latents, ratio, condition


def close(graphs: Graphs, rows: int, seed: int = 0) -> bool:
    given = inputs(rows, seed)
    return torch.allclose(graphs(*given), CASCADE.stage_b(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
def test_a_graph_gives_what_the_network_gives(recorder: Recorder, rows: int) -> None:
    graphs = Graphs(CASCADE.stage_b, recorder, keeps_all=True)
    assert close(graphs, rows)
    assert close(graphs, rows, seed=1), "other latents and another condition"
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 2)


def test_rows_between_two_sizes_use_the_larger_graph(recorder: Recorder) -> None:
    graphs = Graphs(CASCADE.stage_b, recorder, keeps_all=True)
    for rows in (8, 5, 6, 7, 8):
        assert close(graphs, rows, seed=rows)
    assert recorder.num_recorded == 1


def test_more_rows_than_any_graph_has_run_without_one(recorder: Recorder) -> None:
    assert close(Graphs(CASCADE.stage_b, recorder, keeps_all=True), 17)
    assert recorder.num_recorded == 0


def test_a_condition_is_copied_only_when_it_is_another(recorder: Recorder) -> None:
    graphs = Graphs(CASCADE.stage_b, recorder, keeps_all=True)
    latents, ratio, condition = inputs(2)
    first = graphs(latents, ratio, condition)
    kept = condition.keys_values[0].clone()
    condition.keys_values[0].fill_(7)  # nobody does this; here it shows that the copy is not renewed
    assert torch.equal(graphs(latents, ratio, condition), first)
    condition.keys_values[0].copy_(kept)


def test_a_result_outlives_the_next_replay(recorder: Recorder) -> None:
    graphs = Graphs(CASCADE.stage_b, recorder, keeps_all=True)
    first = graphs(*inputs(2))
    expected = first.clone()
    graphs(*inputs(2, seed=1))
    assert torch.equal(first, expected)


def test_shapes_have_graphs_of_their_own(recorder: Recorder) -> None:
    graphs = Graphs(CASCADE.stage_b, recorder, keeps_all=True)
    assert close(graphs, 2)
    wide = (torch.randn(2, 4, 8, 16), torch.rand(2), CASCADE.stage_b.prepare(torch.randn(2, 16, 3, 5),
            torch.randn(2, 1, 8), (8, 16)))  # fmt: skip
    assert torch.allclose(graphs(*wide), CASCADE.stage_b(*wide), atol=1e-5, rtol=1e-5)
    assert recorder.num_recorded == 2


def test_a_graph_is_recorded_when_its_calls_come_often(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "CALLS_BEFORE_GRAPH", 3)
    graphs = Graphs(CASCADE.stage_b, recorder)
    for number in range(6):
        assert close(graphs, 2, seed=number)
        assert close(graphs, 1 + number % 2 * 3)
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 3)
    graphs.drop()
    assert close(graphs, 2)
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 3)


def test_many_kinds_of_calls_in_turn_are_not_recorded_again_and_again(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "CALLS_BEFORE_GRAPH", 5)
    graphs = Graphs(CASCADE.stage_b, recorder)
    monkeypatch.setattr(graphs, "_recent", Recent(2))
    for _ in range(20):
        for rows in (1, 2, 4):
            assert close(graphs, rows)
    assert recorder.num_recorded <= 60 / 5


def test_graphs_from_before_the_requests_stay(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "CALLS_BEFORE_GRAPH", 0)
    graphs = Graphs(CASCADE.stage_b, recorder)
    monkeypatch.setattr(graphs, "_recent", Recent(1))
    with keeping_graphs([graphs, CASCADE.stage_c]):
        assert close(graphs, 1)
    for rows in (2, 4, 2, 1):
        assert close(graphs, rows)
    graphs.drop()
    assert close(graphs, 1)
    assert recorder.num_recorded == 4, "of one row once, of two twice, of four once"


def test_a_network_without_a_map_in_its_condition(recorder: Recorder) -> None:
    graphs = Graphs(CASCADE.stage_c, recorder, keeps_all=True)
    condition = CASCADE.stage_c.prepare(torch.randn(3, 6, 8), torch.randn(3, 1, 8), torch.zeros(3, 1, 4))
    given = (torch.randn(3, 16, 3, 3), torch.rand(3), condition)
    assert torch.allclose(graphs(*given), CASCADE.stage_c(*given), atol=1e-5, rtol=1e-5)


def test_without_a_gpu_there_are_no_graphs() -> None:
    cpu = torch.device("cpu")
    for mode in ("off", "graphs"):
        assert accelerate(CASCADE.stage_b, mode, cpu) is CASCADE.stage_b
    assert isinstance(accelerate(CASCADE.stage_b, "graphs", torch.device("cuda")), Graphs)


def test_all_blocks_of_all_levels_are_compiled_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: compiled.append(block))
    stage_b = small_cascade().stage_b
    assert accelerate(stage_b, "full", torch.device("cpu")) is stage_b
    assert compiled == []
    assert isinstance(accelerate(stage_b, "full", torch.device("cuda")), Graphs)
    assert compiled == repeated_blocks(stage_b)
    assert len(compiled) == 2 + 3 + 3 + 2


def test_rows_with_control_are_run_without_a_graph(recorder: Recorder) -> None:
    latents, ratio = torch.randn(2, 16, 6, 6), torch.rand(2)
    condition = CASCADE.stage_c.prepare(torch.randn(2, 6, 8), torch.randn(2, 1, 8), torch.zeros(2, 1, 4))
    controlled = condition.controlled([torch.randn(1, 6, 6, 16)], (1,))
    graphs = Graphs(CASCADE.stage_c, recorder, keeps_all=True)
    assert torch.equal(graphs(latents, ratio, controlled), CASCADE.stage_c(latents, ratio, controlled))
    assert recorder.num_recorded == 0
    graphs(latents, ratio, condition)
    assert recorder.num_recorded == 1


def test_another_number_of_tokens_has_a_graph_of_its_own(recorder: Recorder) -> None:
    def step(num_images: int) -> tuple[Tensor, Tensor, Condition]:
        images = torch.ones(2, num_images, 4)
        condition = CASCADE.stage_c.prepare(torch.ones(2, 6, 8), torch.ones(2, 1, 8), images)
        return torch.ones(2, 16, 3, 3), torch.full((2,), 0.5), condition

    graphs = Graphs(CASCADE.stage_c, recorder, keeps_all=True)
    for num_images in (1, 2, 1):
        given = step(num_images)
        assert torch.allclose(graphs(*given), CASCADE.stage_c(*given), atol=1e-5, rtol=1e-5)
    assert (recorder.num_recorded, recorder.num_replayed) == (2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile itself calls it
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@torch.inference_mode()
def test_compiled_blocks_predict_the_same() -> None:
    stage_c = small_cascade().stage_c
    condition = stage_c.prepare(torch.randn(2, 6, 8), torch.randn(2, 1, 8), torch.zeros(2, 1, 4))
    given = (torch.randn(2, 16, 6, 6), torch.rand(2), condition)
    plain = stage_c(*given)
    for block in repeated_blocks(stage_c):
        block.compile(dynamic=True)
    assert torch.allclose(stage_c(*given), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # as torch.compile does
def test_a_training_step_is_one_graph() -> None:
    """It is compiled with its condition; what breaks the graph costs what compiling gains."""
    stage_b = small_cascade().stage_b.requires_grad_().train()

    def predict(codes: Tensor, pooled: Tensor, latents: Tensor, ratio: Tensor) -> Tensor:
        return stage_b(latents, ratio, stage_b.prepare(codes, pooled, (16, 16)))

    compiled = torch.compile(predict, backend="eager", fullgraph=True)
    given = (torch.randn(2, 16, 2, 2), torch.randn(2, 1, 8), torch.randn(2, 4, 16, 16), torch.rand(2))
    assert torch.allclose(compiled(*given), predict(*given), atol=1e-5, rtol=1e-5)
