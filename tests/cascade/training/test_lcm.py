from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.networks.stage_c import StageC
from cascade.sampling.presets import PRESETS
from cascade.sampling.schedule import CosineSchedule
from cascade.training import lcm
from cascade.training.code import scene_code
from cascade.training.drawing_codes import draw_codes
from cascade.training.lcm import PLAN, STEPS, TIMES, Lessons, apart, blur, judge, train
from cascade.training.low_rank import LowRank, all_matrices
from cascade.training.scenes import Scene, Thing
from cascade.training.stage_c import SCHEDULE
from cascade.training.visits import Visits, level_at

SCENE = Scene(256, 256, "white", (Thing("circle", "red", 70, 128, 30.0),))


def rows(count: int, grid: tuple[int, int] = (6, 6), value: float = 0.0) -> list[Visits]:
    some = torch.full((count, 16, *grid), value)
    words = torch.zeros(count, 32, 128)
    return [Visits(some, some, words, words[:, :1]) for _ in TIMES]


def test_it_is_taught_at_the_levels_that_the_sampler_visits() -> None:
    schedule = CosineSchedule(SCHEDULE)
    levels = PRESETS["official"].levels(schedule, STEPS)
    for step, time in enumerate(TIMES):
        level, ratio = level_at(schedule, time, 1, torch.device("cpu"))
        assert level.item() == pytest.approx(levels.log_snr[step].item(), rel=1e-6)
        assert ratio.item() == pytest.approx(levels.ratio[step].item(), rel=1e-6)


def test_of_several_scenes_the_likeliest_is_nearest_and_not_their_mean() -> None:
    torch.manual_seed(0)
    often, seldom = torch.randn(2, 1, 16, 6, 6)
    goals = torch.cat([often, often, seldom])

    def distance(said: torch.Tensor) -> float:
        return float(apart(said.expand_as(goals), goals).mean())

    mean = goals.mean(0, keepdim=True)
    assert distance(often) < distance(mean)
    assert distance(often) < distance(torch.lerp(often, mean, 0.1))
    assert (mean - goals).square().mean() < (often - goals).square().mean()


def test_the_distance_is_nothing_at_the_goal_and_counts_the_background_for_itself() -> None:
    goals = torch.randn(2, 16, 6, 6)
    assert apart(goals, goals).abs().max() < 1e-6
    ground, thing = goals.clone(), goals.clone()
    ground[:, :3] += 1
    thing[:, 3:] += 1
    assert torch.allclose(apart(ground, goals), apart(thing, goals))


def test_lessons_are_of_one_size_and_of_all_times_alike() -> None:
    lessons = Lessons(100)
    lessons.add((256, 256), rows(30))
    lessons.add((512, 256), rows(10, (6, 12)))
    assert len(lessons) == 40
    rng = np.random.default_rng(0)
    drawn = [lessons.draw(10, rng) for _ in range(40)]
    assert all([len(some) for some in visits] == [3, 3, 2, 2] for visits in drawn)
    wide = [visits[0].latents.shape[-1] == 12 for visits in drawn]
    assert all(len({some.latents.shape[-1] for some in visits}) == 1 for visits in drawn)
    assert 0.1 < np.mean(wide) < 0.45


def test_latents_of_a_student_that_has_changed_are_forgotten_first() -> None:
    lessons = Lessons(80)
    for value in (0, 1, 2):
        lessons.add((256, 256), rows(20, value=value))
    first, *others = lessons.rows[256, 256]
    assert len(first) == 60
    assert all(len(some) == 10 and some.latents.min() == 2 for some in others)


def test_all_sizes_together_have_so_many_runs_and_each_forgets_its_first() -> None:
    lessons = Lessons(320)
    for value in range(40):
        size, grid = ((512, 256), (6, 12)) if value % 4 == 0 else ((256, 256), (6, 6))
        lessons.add(size, rows(20, grid, value=value))
    assert len(lessons) == 320
    wide, square = lessons.rows[512, 256], lessons.rows[256, 256]
    assert [len(some) for some in wide] == [80, 10, 10, 10]
    assert [len(some) for some in square] == [240, 30, 30, 30]
    assert wide[0].latents.min() == 24
    assert wide[1].latents.min() == 36
    assert square[1].latents.min() == 38


def test_a_true_code_is_not_blurred_and_noise_blurs_it() -> None:
    torch.manual_seed(0)
    code = torch.from_numpy(scene_code(SCENE))
    assert blur(code) < 1e-6
    assert 0.005 < blur(code + 0.1 * torch.randn_like(code)) < 0.02


def test_codes_that_read_right_but_are_blurred_are_not_counted_as_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = cast(StageC, load_network(EMBEDDED["tiny"] / "prior")).eval().requires_grad_(False)
    adapter = LowRank(stage, all_matrices(stage), 2, 1.0)
    schedule = CosineSchedule(SCHEDULE)
    sharp = judge(adapter, stage, schedule, EMBEDDED["tiny"], 6)
    assert 0 < sharp["drawn"] <= sharp["right_1"]
    plain = draw_codes
    torch.manual_seed(0)
    monkeypatch.setattr(
        lcm, "draw_codes", lambda *a, **k: [code + 0.25 * torch.randn_like(code) for code in plain(*a, **k)]
    )
    blurred = judge(adapter, stage, schedule, EMBEDDED["tiny"], 6)
    assert blurred["drawn"] == 0 < blurred["right_1"]
    assert blurred["blur"] > sharp["blur"] + 0.02


def test_a_run_writes_its_file_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lcm, "_FIRST", 1)
    monkeypatch.setattr(lcm, "judge", lambda *_: {"drawn": 1.0})
    plan = replace(PLAN, steps=2, warmup=1, save_every=1, judge_every=0, compute_dtype=torch.float32)
    train(tmp_path, plan=plan, batch=8, scenes=40)
    with safe_open(tmp_path / "lcm.safetensors", "pt") as file:
        told = {"name": "lcm", "sampler": "lcm", "steps": "4", "guidance_scale": "1"}
        assert told.items() <= file.metadata().items()
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    ups = [tensor for name, tensor in written.items() if "lora_B" in name]
    assert sum(bool(up.abs().sum()) for up in ups) > len(ups) * 0.9
    assert (tmp_path / "lcm.safetensors").stat().st_size < 1_000_000
    train(tmp_path, plan=replace(plan, steps=3), batch=8, scenes=40)
    with safe_open(tmp_path / "lcm" / "training.safetensors", "pt") as file:
        assert '"step": 3' in file.metadata()["progress"]
    with safe_open(tmp_path / "lcm.safetensors", "pt") as file:
        assert any(not torch.equal(file.get_tensor(name), tensor) for name, tensor in written.items())
