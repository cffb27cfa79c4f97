"""A picture aboard: its place in the queue, its previews, its seconds."""

import pytest

from app.engine.picture import Picture
from app.engine.protocol import Run, Stepped
from app.engine.scheduler import BatchKey
from app.schemas import GenerationRequest
from tests.app.fakes import FakeTrack, decoded

REQUEST = GenerationRequest(prompt="x", width=64, height=64, seeds=(0,), prior_guidance_scale=4)


def picture(
    *, steps: int = 4, decoder_steps: int = 1, deadline: float | None = None, is_alone: bool = False
) -> Picture:
    run = Run("a", 2, 7, "me", 5, deadline, 3.0, REQUEST.model_dump_json().encode(), is_alone=is_alone)
    return Picture.aboard(run, FakeTrack(run, (steps, decoder_steps)), now=100.0)


def step(picture: Picture, times: int = 1) -> None:
    assert isinstance(picture.track, FakeTrack)
    for _ in range(times):
        picture.track.advance()


def test_its_entry_says_what_the_scheduler_needs() -> None:
    one = picture(deadline=60.0, is_alone=True)
    entry = one.entry
    assert (entry.job, entry.index, entry.tenant, entry.priority) == ("a", 2, "me", 5)
    assert (entry.key, entry.rows) == (BatchKey("prior", (64, 64)), 2)
    assert (entry.arrived, entry.deadline, entry.is_alone) == (97.0, 160.0, True)
    assert picture().entry.deadline is None


def test_its_entry_follows_the_runner() -> None:
    one = picture()
    step(one, 4)
    one.follow(1.5)
    assert (one.entry.key, one.entry.rows) == (BatchKey("decoder", (64, 64)), 1)
    assert one.entry.cost_left == 1.5
    assert one.progress() == Stepped("a", 2, "decoder", 0, 1, 1.5)
    step(one)
    assert one.is_drawn
    assert one.progress().stage == "encode"


@pytest.mark.parametrize(
    ("count", "steps", "shown"),
    [(0, 20, []), (1, 20, [10]), (3, 20, [5, 10, 15]), (2, 7, [3, 5]), (5, 3, [1, 2]), (9, 1, [])],
)
def test_previews_are_spread_over_stage_c(count: int, steps: int, shown: list[int]) -> None:
    one = picture(steps=steps)
    due = []
    for number in range(1, steps + 1):
        step(one)
        if one.wants_preview(count):
            due.append(number)
    assert due == shown


def test_previews_wanted_late_are_not_made_up_for() -> None:
    one = picture(steps=20)
    step(one, 12)
    assert one.wants_preview(3)
    assert one.num_previews == 2
    assert not one.wants_preview(3)


def test_stage_b_shows_nothing() -> None:
    one = picture(steps=1, decoder_steps=4)
    step(one, 3)
    assert one.key.stage == "decoder"
    assert not one.wants_preview(1)


def test_a_stage_begun_again_shows_nothing_twice() -> None:
    one = picture(steps=4)
    assert isinstance(one.track, FakeTrack)
    step(one, 2)
    assert one.wants_preview(1)
    step(one, 2)
    one.track.go_back()
    step(one, 2)
    assert not one.wants_preview(1)


def test_its_seconds_are_told_by_stage() -> None:
    one = picture()
    one.began_stage_at = 110.0
    for stage, now in (("prior", 113.0), ("decoder", 115.0), ("decode", 115.5)):
        one.end_stage(stage, now)
    pixels = one.pixels(decoded(REQUEST, 7))
    assert (pixels.prior_seconds, pixels.decoder_seconds, pixels.decode_seconds) == (3.0, 2.0, 0.5)
    assert pixels.pixels == decoded(REQUEST, 7).pixels
