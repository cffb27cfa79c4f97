from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.conditioning import TextEncoder
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from cascade.sampling.noise import gaussian
from cascade.sampling.schedule import CosineSchedule
from cascade.training import visits
from cascade.training.captions import Caption
from cascade.training.code import read_code, scene_code
from cascade.training.drawing_codes import conditions, draw_codes, shows
from cascade.training.scenes import Scene, Thing
from cascade.training.stage_c import SCHEDULE, load_text_encoder
from cascade.training.visits import Visits, ask, exact, go_on, scales_at, visit

TINY = EMBEDDED["tiny"]
TIMES = (1.0, 0.75, 0.5, 0.25)
SCENE = Scene(256, 256, "white", (Thing("circle", "red", 70, 128, 30.0),))
TOLD = Caption(
    "a red circle on the left", {"first_shape": "circle", "first_colour": "red", "first_place": "left"}
)


@pytest.fixture(scope="module")
def stage() -> StageC:
    return cast(StageC, load_network(TINY / "prior")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return load_text_encoder(TINY)


def code_of(scene: Scene) -> torch.Tensor:
    return torch.from_numpy(scene_code(scene))


def test_a_code_is_read_and_written_anew() -> None:
    torch.manual_seed(0)
    code = code_of(SCENE)
    found = exact(code + 0.1 * torch.randn_like(code), SCENE, TOLD)
    assert found is not None
    assert (found - code).square().mean() < 0.1**2 / 4
    again = scene_code(read_code(found.numpy(), (256, 256)))
    assert np.allclose(found.numpy(), again, atol=1e-3)


@pytest.mark.parametrize(
    ("drawn", "facts"),
    [
        pytest.param(replace(SCENE, things=(replace(SCENE.things[0], colour="blue"),)), {}, id="colour"),
        pytest.param(replace(SCENE, things=()), {}, id="number"),
        pytest.param(SCENE, {"first_place": "right"}, id="place"),
        pytest.param(SCENE, {"first_size": "large"}, id="size"),
        pytest.param(replace(SCENE, background="green"), {"background": "white"}, id="background"),
        pytest.param(replace(SCENE, background="red"), {}, id="nothing to see"),
    ],
)
def test_what_was_not_asked_for_teaches_nothing(drawn: Scene, facts: dict[str, str]) -> None:
    assert exact(code_of(drawn), SCENE, Caption(TOLD.text, TOLD.facts | facts)) is None


def test_a_code_far_from_every_scene_teaches_nothing() -> None:
    torch.manual_seed(2)
    code = code_of(SCENE) + 0.42 * torch.randn(16, 6, 6)
    assert shows(read_code(code.numpy(), (256, 256)), SCENE, Caption(TOLD.text, {}))
    assert exact(code, SCENE, TOLD) is None


def test_the_teacher_goes_back_to_the_scene_that_was_noised(stage: StageC, text: TextEncoder) -> None:
    torch.manual_seed(0)
    schedule = CosineSchedule(SCHEDULE)
    codes = code_of(SCENE).expand(4, -1, -1, -1)
    embeddings = text.encode([TOLD.text] * 4)
    guided, unguided = conditions(stage, embeddings.hidden.clone(), embeddings.pooled.clone(), text)
    both = Condition.cat([guided, unguided[[0] * 4]])
    alpha, sigma = scales_at(schedule, 0.375)
    noised = alpha * codes + sigma * torch.randn_like(codes)
    with torch.no_grad():
        ends = go_on(stage, schedule, noised, 0.375, guided, both)
    assert (ends - codes).square().mean() < 0.02
    assert (noised / alpha - codes).square().mean() > 0.2


def test_the_teacher_steps_as_the_sampler_ddim(
    stage: StageC, text: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "_DECIDED", -1.0)  # guided to the end, as the sampler is
    schedule = CosineSchedule(SCHEDULE)
    embeddings = text.encode([TOLD.text, "a blue star above a green ring"])
    guided, unguided = conditions(stage, embeddings.hidden.clone(), embeddings.pooled.clone(), text)
    both = Condition.cat([guided, unguided[[0, 0]]])
    expected = draw_codes(stage, schedule, guided, unguided, count=2, steps=8, sampler="ddim", first_seed=7)
    start = torch.stack([gaussian((16, 6, 6), 7 + row, "prior", 0) for row in range(2)])
    with torch.no_grad():
        ends = go_on(stage, schedule, start, 1.0, guided, both)
    assert torch.allclose(ends, torch.stack(expected), atol=5e-3)


def test_a_run_is_visited_at_its_own_latents(stage: StageC, text: TextEncoder) -> None:
    torch.manual_seed(1)
    asked = ask(text, 6, (320, 256), np.random.default_rng(3))
    rows = visit(stage, stage, CosineSchedule(SCHEDULE), text, asked, TIMES)
    assert [len(some) >= 3 for some in rows] == [True] * 4
    assert rows[0].latents.std().item() == pytest.approx(1, abs=0.1)
    schedule = CosineSchedule(SCHEDULE)
    for time, some in zip(TIMES, rows, strict=True):
        assert some.latents.shape[1:] == some.goals.shape[1:] == (16, *asked.grid)
        for goal in some.goals:
            read = read_code(goal.numpy(), (320, 256))
            assert np.allclose(scene_code(read), goal.numpy(), atol=2e-3)
        for hidden in some.hidden:
            assert any(torch.equal(hidden, told) for told in asked.hidden)
        if time < 0.5:  # the student is nearly sure here, so what remains beside its goal is noise
            alpha, sigma = scales_at(schedule, time)
            assert ((some.latents - alpha * some.goals) / sigma).std().item() == pytest.approx(1, abs=0.3)


def test_where_the_teacher_goes_astray_an_earlier_goal_holds(
    stage: StageC, text: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(text, 3, (256, 256), np.random.default_rng(5))
    right = torch.stack([code_of(scene) for scene in asked.scenes])
    nothing = torch.zeros_like(right)

    def reach(
        _: StageC, __: CosineSchedule, latents: torch.Tensor, start: float, *conditions: Condition
    ) -> torch.Tensor:
        ends = {1.0: [True, False, False], 0.75: [False, True, False], 0.5: [False] * 3}.get(
            start, [True] * 3
        )
        return torch.where(torch.tensor(ends).view(-1, 1, 1, 1), right, nothing)

    monkeypatch.setattr(visits, "go_on", reach)
    rows = visit(stage, stage, CosineSchedule(SCHEDULE), text, asked, TIMES)
    assert [len(some) for some in rows] == [1, 2, 2, 3]
    for some, whose in zip(rows, ([0], [0, 1], [0, 1], [0, 1, 2]), strict=True):
        assert torch.equal(some.hidden, asked.hidden[whose])
        assert torch.allclose(some.goals, right[whose], atol=2e-3)


def test_the_oldest_rows_are_forgotten() -> None:
    def numbered(*numbers: float) -> Visits:
        rows = torch.tensor(numbers).view(-1, 1, 1, 1)
        return Visits(rows, rows, rows, rows)

    both = numbered(1, 2, 3).followed_by(numbered(4, 5), most=4)
    assert both.latents.flatten().tolist() == both.pooled.flatten().tolist() == [2, 3, 4, 5]
    assert numbered(1).followed_by(numbered(2), most=4).goals.flatten().tolist() == [1, 2]
