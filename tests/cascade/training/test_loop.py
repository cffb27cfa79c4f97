from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.errors import CheckpointError
from cascade.training.loop import STATE_FILE, Plan, fit, seconds_spent

PLAN = Plan(steps=12, learning_rate=0.05, warmup=2, ema_decay=0.9, save_every=4)


def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    x = torch.from_numpy(rng.standard_normal((16, 3), np.float32)).to(next(module.parameters()).dtype)
    return (module(x) - x.sum(1, keepdim=True)).square().mean().float(), {"step": float(step)}


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.GELU(), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 1, 1), nn.Flatten()
    )


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_it_learns_and_returns_the_average(tmp_path: Path) -> None:
    module = linear()
    average = fit(module, loss, replace(PLAN, steps=200), tmp_path, title="test")
    assert torch.allclose(weights(average), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=0.1)
    assert not torch.equal(weights(average), weights(module))


@pytest.mark.parametrize("matrix_rate", [0.0, 0.05])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path: Path, matrix_rate: float) -> None:
    plan = replace(PLAN, matrix_rate=matrix_rate)
    undisturbed = fit(network(), loss, plan, tmp_path / "a", title="test")

    def failing(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        if step == 9:
            raise KeyboardInterrupt
        return loss(module, step, rng)

    with pytest.raises(KeyboardInterrupt):
        fit(network(), failing, plan, tmp_path / "b", title="test")
    resumed = fit(network(seed=2), loss, plan, tmp_path / "b", title="test")
    assert torch.equal(weights(resumed), weights(undisturbed))


def test_the_time_of_all_parts_of_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def slow(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        clock[0] += 10
        return loss(module, step, rng)

    fit(linear(), slow, replace(PLAN, steps=4), tmp_path, title="test")
    assert seconds_spent(tmp_path / STATE_FILE) == 40
    clock[0] += 500  # between the parts
    fit(linear(), slow, PLAN, tmp_path, title="test")
    assert seconds_spent(tmp_path / STATE_FILE) == 10 * PLAN.steps


def test_a_state_without_a_time_is_continued_and_its_time_stays_unknown(tmp_path: Path) -> None:
    fit(linear(), loss, replace(PLAN, steps=4), tmp_path / "a", title="test")
    state = load_file(tmp_path / "a" / STATE_FILE)
    (tmp_path / "b").mkdir()
    save_file(state, tmp_path / "b" / STATE_FILE, metadata={"progress": '{"step": 4}'})
    resumed = [fit(linear(), loss, PLAN, tmp_path / name, title="test") for name in ("a", "b")]
    assert torch.equal(weights(resumed[0]), weights(resumed[1]))
    assert seconds_spent(tmp_path / "a" / STATE_FILE) is not None
    assert seconds_spent(tmp_path / "b" / STATE_FILE) is None


def test_what_is_not_trained_is_not_kept_and_a_run_upon_another_rest_is_refused(tmp_path: Path) -> None:
    def partly(seed: int) -> nn.Module:
        module = network(seed)
        module[0].requires_grad_(False)  # type: ignore[index]
        return module

    fit(partly(1), loss, replace(PLAN, steps=4), tmp_path, title="test")
    assert not any(".0." in name for name in load_file(tmp_path / STATE_FILE))
    fit(partly(1), loss, replace(PLAN, steps=6), tmp_path, title="test")
    with pytest.raises(CheckpointError, match="began with other weights"):
        fit(partly(2), loss, PLAN, tmp_path, title="test")


def test_no_partial_file_stays_behind(tmp_path: Path) -> None:
    fit(linear(), loss, PLAN, tmp_path, title="test")
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_frozen_entries_keep_their_values(tmp_path: Path) -> None:
    module = linear()
    before = weights(module).clone()
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    fit(module, loss, PLAN, tmp_path, title="test", trainable={"weight": mask})
    assert [bool(same) for same in weights(module) == before] == [False, True, False, False]


def test_bf16_arithmetic_updates_fp32_weights(tmp_path: Path) -> None:
    module = linear()
    plan = replace(PLAN, steps=200, compute_dtype=torch.bfloat16)
    average = fit(module, loss, plan, tmp_path, title="test")
    assert next(average.parameters()).dtype == torch.float32
    assert torch.allclose(weights(average), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=0.1)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    module = linear()
    before = weights(module).clone()

    def broken(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        return loss(module, step, rng)[0] * float("nan"), {}

    fit(module, broken, PLAN, tmp_path, title="test")
    assert torch.equal(weights(module), before)


def test_the_judge_sees_the_average_on_schedule(tmp_path: Path) -> None:
    seen: list[int] = []

    def judge(module: nn.Module, step: int) -> dict[str, float]:
        seen.append(step)
        return {"bias": float(weights(module)[-1])}

    fit(linear(), loss, replace(PLAN, judge_every=5), tmp_path, title="test", judge=judge)
    assert seen == [5, 10, 12]


def test_muon_keeps_frozen_rows_and_learns(tmp_path: Path) -> None:
    module = network()
    before = module[0].weight.detach().clone()  # type: ignore[index]
    mask = torch.ones(8, 3)
    mask[2:4] = 0
    plan = replace(PLAN, steps=300, matrix_rate=0.05, learning_rate=0.01)
    average = fit(module, loss, plan, tmp_path, title="test", trainable={"0.weight": mask})
    assert torch.equal(module[0].weight[2:4], before[2:4])  # type: ignore[index]
    assert float(loss(average, 0, np.random.default_rng(5))[0]) < 0.05


def test_a_run_ends_when_its_seconds_are_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def ticking(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        clock[0] += 1
        return loss(module, step, rng)

    monkeypatch.setattr("cascade.training.loop.time.monotonic", lambda: clock[0])
    judged: list[int] = []

    def judge(module: nn.Module, step: int) -> dict[str, float]:
        judged.append(step)
        return {}

    fit(linear(), ticking, replace(PLAN, seconds=5.0, steps=100), tmp_path, title="test", judge=judge)
    assert judged == [6]
    assert seconds_spent(tmp_path / STATE_FILE) == 6


def test_the_rate_falls_with_the_time_where_that_is_short() -> None:
    plan = replace(PLAN, steps=1000, seconds=10.0, warmup=1)
    assert plan.progress(1, 10.0) == pytest.approx(plan.final_fraction)
    assert plan.progress(1, 0.0) > 0.99
    assert replace(plan, seconds=0.0).progress(1, 10.0) > 0.99
