"""What goes wrong in a step, in a stage, on a device, and who has to bear it."""

from collections.abc import Sequence
from threading import Event
from typing import Any

import pytest

from app.engine.protocol import (
    Expect,
    Failed,
    Latents,
    Run,
)
from app.errors import DeviceGone, GenerationFailed, InvalidRequest, OutOfMemory
from tests.app.engine.bench import Bench, asked, run, wait_until, watched
from tests.app.fakes import FakeRunner, FakeTrack


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def bench(runner: FakeRunner) -> Bench:
    return Bench(runner)


class TestOutOfMemory:
    def test_halves_the_cap_and_repeats_the_step(self, bench: Bench, runner: FakeRunner) -> None:
        runner.memory_rows = 3
        bench.work(*(run("a", index) for index in range(8)))
        assert len(bench.made) == 8
        assert bench.failed == {}
        assert set(runner.caps.values()) == {2}
        assert all(tick.rows <= 2 for tick in bench.ticks)  # nothing is learned from steps that went wrong
        assert bench.pulse.events["halvings"] == 6  # 16, 8, 4, 2 for each of the two stages

    def test_happens_once(self, bench: Bench, runner: FakeRunner) -> None:
        runner.memory_rows, runner.steps = 4, (10, 1)
        bench.work(*(run("a", index) for index in range(8)))
        assert bench.num_tries - runner.steps_done <= 4

    def test_steps_a_guided_picture_row_by_row(self, bench: Bench, runner: FakeRunner) -> None:
        runner.memory_rows = 1
        bench.work(run("a", request=asked("a", guidance=4)))
        assert len(bench.made) == 1

    def test_of_a_single_row_is_the_end_of_that_job(self, bench: Bench, runner: FakeRunner) -> None:
        runner.broken["a"] = OutOfMemory("too large")
        bench.work(run("a"), run("b"))
        assert bench.failed == {"a": "out_of_memory"}
        assert list(bench.made) == [("b", 0)]

    def test_waits_for_stage_a_to_make_room(self, bench: Bench, runner: FakeRunner) -> None:
        decoding, tried, decoded = Event(), Event(), Event()

        def decode(tracks: Sequence[FakeTrack]) -> None:
            if tracks[0].run.job == "a":
                decoding.set()
                assert tried.wait(10)
                decoded.set()

        def step(tracks: Sequence[FakeTrack]) -> None:
            if tracks[0].run.job == "b" and runner.started[0].work[0].key.stage == "decode":
                assert decoding.wait(10)
                tried.set()
                if not decoded.is_set():
                    raise OutOfMemory("Stage A has it all")

        runner.on_decode, runner.on_step, runner.steps = decode, step, (3, 3)
        resumed = run("a", latents=b"", request=asked("a", width=128))
        bench.work(resumed, run("b"))
        assert sorted(bench.made) == [("a", 0), ("b", 0)]


class TestErrors:
    def test_fail_the_culprit_alone(self, bench: Bench, runner: FakeRunner) -> None:
        runner.broken["e"] = RuntimeError("secret of the house")
        bench.work(*(run(name) for name in "abcdefgh"))
        assert bench.failed == {"e": "generation_failed"}
        assert sorted(job for job, _ in bench.made) == list("abcdfgh")
        assert bench.pulse.events["bisections"] == 3
        assert "secret" not in bench.of(Failed)[0].message
        assert "secret of the house" in bench.log.getvalue()

    def test_of_ours_are_told_as_they_are(self, bench: Bench, runner: FakeRunner) -> None:
        runner.broken["a"] = InvalidRequest("ask for less", code="too_much")
        bench.work(run("a"))
        assert bench.of(Failed) == [Failed("a", 0, "too_much", "ask for less")]

    def test_drop_the_other_pictures_of_the_job(self, bench: Bench, runner: FakeRunner) -> None:
        def step(tracks: Sequence[FakeTrack]) -> None:
            if any(track.run.index == 1 for track in tracks):
                raise RuntimeError

        runner.on_step = step
        bench.work(run("a", 0), run("a", 1), run("a", 2), run("b"))
        assert bench.of(Failed) == [Failed("a", 1, "generation_failed", bench.of(Failed)[0].message)]
        assert list(bench.made) == [("b", 0)]
        assert bench.pulse.num_samples == 0

    def test_of_what_may_come_are_kept_until_it_does(
        self, bench: Bench, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(what: object) -> None:
            raise InvalidRequest("no")

        monkeypatch.setattr(runner, "expect", fail)
        bench.work(Expect(b""), run("a"))
        assert list(bench.made) == [("a", 0)]
        assert bench.failed == {}

    @pytest.mark.parametrize("method", ["start", "begin", "check"])
    def test_outside_of_steps_fail_one(
        self, bench: Bench, runner: FakeRunner, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        works = getattr(runner, method)

        def fail(what: Run | FakeTrack) -> Any:
            if (what if isinstance(what, Run) else what.run).job == "a":
                raise InvalidRequest("no")
            return works(what)

        monkeypatch.setattr(runner, method, fail)
        bench.work(run("a"), run("b"))
        assert bench.failed == {"a": "invalid_value"}
        assert list(bench.made) == [("b", 0)]

    def test_in_stage_a_fail_one_of_two(self, bench: Bench, runner: FakeRunner) -> None:
        def decode(tracks: Sequence[FakeTrack]) -> None:
            if any(track.run.job == "a" for track in tracks):
                raise GenerationFailed("all the same")

        runner.on_decode = decode
        bench.work(run("a"), run("b"))
        assert bench.failed == {"a": "generation_failed"}
        assert list(bench.made) == [("b", 0)]

    @pytest.mark.parametrize("method", ["start", "begin", "check", "retry_in_fp32"])
    def test_of_a_lone_picture_fail_it(
        self, bench: Bench, runner: FakeRunner, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(what: object) -> None:
            raise OutOfMemory("no room")

        runner.nan["a"] = 1
        monkeypatch.setattr(runner, method, fail)
        bench.work(run("a"))
        assert bench.failed == {"a": "out_of_memory"}

    @pytest.mark.parametrize("method", ["expect", "start", "begin", "step", "check", "decode"])
    def test_of_a_lost_device_end_the_engine(
        self, bench: Bench, runner: FakeRunner, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(what: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

        monkeypatch.setattr(runner, method, fail)
        with pytest.raises(DeviceGone, match=r"CUDA error: an illegal memory access was encountered$"):
            bench.work(Expect(b""), run("a"), run("b"))
        assert bench.failed == {}

    def test_without_last_words_are_the_pictures_own(self, bench: Bench, runner: FakeRunner) -> None:
        runner.broken["a"] = RuntimeError("CUDA error: invalid configuration argument")
        bench.work(run("a"), run("b"))
        assert list(bench.made) == [("b", 0)]


class TestLatentsThatAreNoPicture:
    def test_are_tried_again_in_fp32(self, bench: Bench, runner: FakeRunner) -> None:
        runner.nan["a"] = 1
        bench.work(run("a"), run("b"))
        assert sorted(bench.made) == [("a", 0), ("b", 0)]
        assert [track.run.job for track in runner.started if track.is_fp32] == ["a"]
        assert bench.pulse.events["fp32_retries"] == 1
        assert len(bench.of(Latents)) == 2

    def test_fail_then(self, bench: Bench, runner: FakeRunner) -> None:
        runner.nan["a"] = 2
        bench.work(run("a"), run("b"))
        assert bench.failed == {"a": "generation_failed"}
        assert list(bench.made) == [("b", 0)]

    def test_are_found_after_stage_b_too(self, bench: Bench, runner: FakeRunner) -> None:
        runner.nan["a"] = 2
        bench.work(run("a", latents=b""))
        assert bench.made == {}
        assert runner.steps_done == 4


class TestAlone:
    def test_shares_no_step(self, bench: Bench) -> None:
        bench.during(1, run("q", is_alone=True))
        bench.work(run("a"), run("b"))
        assert len(bench.made) == 3
        assert all(batch == ["q"] or "q" not in batch for batch in bench.batches)

    def test_waits_for_stage_a_of_others(self, bench: Bench, runner: FakeRunner) -> None:
        is_decoding: list[bool] = []

        def decode(tracks: Sequence[FakeTrack]) -> None:
            is_decoding.append(True)
            wait_until(lambda: runner.steps_done > 4, seconds=0.05)  # a loop that does not wait steps now
            is_decoding.append(False)

        def step(tracks: Sequence[FakeTrack]) -> None:
            assert not tracks[0].run.is_alone or is_decoding == [True, False]

        runner.on_decode, runner.on_step = decode, watched(runner.on_step, step)
        bench.during(2, run("q", is_alone=True))
        bench.work(run("a"))
        assert sorted(bench.made) == [("a", 0), ("q", 0)]

    def test_has_stage_a_to_itself(self, bench: Bench, runner: FakeRunner) -> None:
        decoded: list[str] = []

        def decode(tracks: Sequence[FakeTrack]) -> None:
            wait_until(lambda: runner.steps_done > 4, seconds=0.05)
            decoded.append(tracks[0].run.job)

        def step(tracks: Sequence[FakeTrack]) -> None:
            assert tracks[0].run.is_alone or decoded[:1] == ["q"]

        runner.on_decode, runner.on_step = decode, watched(runner.on_step, step)
        bench.work(run("a"), run("q", is_alone=True))
        assert sorted(bench.made) == [("a", 0), ("q", 0)]
