"""Rehearsed steps: of the right stage and number of rows, timed by the least, bounded by memory."""

import time

import pytest
import torch
from torch import Tensor

from cascade.networks.unet import Condition
from cascade.pipeline import Cascade
from cascade.sizes import NativeSizes
from cascade.tasks.rehearsal import Rehearsal
from tests.cascade.small_models import small_cascade

CASCADE = small_cascade(NativeSizes(((128, 128),), resamples=True))


class Watched:
    """The networks, and how many rows each was called with."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.rows: list[int] = []

    def rehearsal(self) -> Rehearsal:
        def watched(latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
            self.rows.append(len(latents))
            network = self.cascade.stage_c if latents.shape[1] == 16 else self.cascade.stage_b
            return network(latents, ratio, condition)

        return Rehearsal(self.cascade, {"prior": watched, "decoder": watched}, (192, 128))


@pytest.fixture
def watched() -> Watched:
    return Watched(CASCADE)


def test_shapes_are_those_of_the_picture(watched: Watched) -> None:
    rehearsal = watched.rehearsal()
    assert rehearsal.shape("prior") == (3, 3)
    assert rehearsal.shape("decoder") == rehearsal.shape("decode") == (32, 32)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_every_row_is_a_picture_without_guidance(watched: Watched, stage: str) -> None:
    rehearsal = watched.rehearsal()
    for rows in (1, 3):
        rehearsal.make("prior" if stage == "prior" else "decoder", rows)
    assert watched.rows == [1, 3]


def test_decoding_is_rehearsed_by_stage_a(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(latents: Tensor, **_: float) -> Tensor:
        decoded.append(len(latents))
        return latents

    monkeypatch.setattr(CASCADE.stage_a, "decode", decode)
    watched.rehearsal().make("decode", 2)
    assert (decoded, watched.rows) == ([2], [])


def test_the_time_is_the_least_of_some_once_all_is_warm(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 0.3, 1.0, 1.1, 2.0, 2.15])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    assert watched.rehearsal().seconds("prior", 2) == pytest.approx(0.1)
    assert watched.rows == [2] * 4, "one to get warm"


def test_a_long_step_is_not_repeated(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert watched.rehearsal().seconds("prior", 1) == 2.0
    assert watched.rows == [1, 1]


def test_twice_the_rows_need_twice_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.tasks.rehearsal.used_bytes", lambda _: 1000)
    monkeypatch.setattr("cascade.tasks.rehearsal.limit_bytes", lambda _: 1600)
    rehearsal = Watched(CASCADE).rehearsal()
    for peak, has_room in ((1200, True), (1300, True), (1301, False)):
        monkeypatch.setattr("cascade.tasks.rehearsal.peak_bytes", lambda _, peak=peak: peak)
        assert rehearsal.has_room_for_twice() is has_room


def test_half_of_the_free_memory_is_for_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest is the map of Stage B: 16 x 16 tokens of 8 channels in fp32, twice when guided."""
    monkeypatch.setattr("cascade.tasks.rehearsal.used_bytes", lambda _: 1000)
    monkeypatch.setattr("cascade.tasks.rehearsal.limit_bytes", lambda _: 1000 + 2 * 10**6)
    num_pictures = Watched(CASCADE).rehearsal().num_pictures()
    assert 10**6 // 80_000 < num_pictures < 10**6 // (2 * 16 * 16 * 8 * 4)
    monkeypatch.setattr("cascade.tasks.rehearsal.limit_bytes", lambda _: 0)
    assert Watched(CASCADE).rehearsal().num_pictures() == 1
