"""The loop, driven in the test's own thread on a clock that only steps move."""

import gc
from collections.abc import Sequence
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.engine import HungUp
from app.engine.picture import Picture
from app.engine.protocol import (
    Cancel,
    Expect,
    Heartbeat,
    Latents,
    Pixels,
    Previewed,
    Progressed,
    WantPreviews,
)
from app.engine.scheduler import Entry
from app.errors import OutOfMemory
from tests.app.engine.bench import STEP_SECONDS, Bench, asked, run, wait_until
from tests.app.fakes import FakeRunner, FakeTrack, decoded, digest


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def bench(runner: FakeRunner) -> Bench:
    return Bench(runner)


def test_every_picture_is_the_one_that_was_asked_for(bench: Bench) -> None:
    bench.work(run("a"), run("b", 0), run("b", 1), run("c", request=asked("c", width=128)))
    assert bench.made == {
        ("a", 0): decoded(asked("a"), 0).pixels,
        ("b", 0): decoded(asked("b"), 0).pixels,
        ("b", 1): decoded(asked("b"), 1).pixels,
        ("c", 0): decoded(asked("c", width=128), 0).pixels,
    }
    assert bench.pulse.num_samples == 0


def out_of_memory(tracks: Sequence[FakeTrack]) -> None:
    if any(track.run.job == "a" for track in tracks):
        try:
            raise RuntimeError("cannot allocate")
        except RuntimeError as error:
            raise OutOfMemory("too large") from error


@pytest.mark.parametrize("end", ["made", "canceled", "wrong", "too large"])
def test_what_is_done_with_is_freed_without_a_collector(bench: Bench, runner: FakeRunner, end: str) -> None:
    gc.collect()
    gc.disable()
    try:
        match end:
            case "canceled":
                bench.during(3, Cancel("a"))
            case "wrong":
                runner.broken["a"] = ValueError("odd")
            case "too large":
                runner.on_step = out_of_memory
        Thread(target=bench.engine.run, daemon=True).start()
        bench.tell(run("a"), run("b"))
        wait_until(lambda: len(bench.of(Pixels)) + len(bench.failed) + (end == "canceled") == 2)
        wait_until(lambda: not any(isinstance(thing, Picture | Entry) for thing in gc.get_objects()))
        assert not any(isinstance(thing, Picture | Entry) for thing in gc.get_objects())
    finally:
        gc.enable()
        bench.tell(HungUp())


def test_the_runner_forgets_what_is_canceled(bench: Bench, runner: FakeRunner) -> None:
    bench.during(2, Cancel("a"))
    bench.work(run("a"), run("b"))
    assert [track.run.job for track in runner.dropped] == ["a"]
    assert set(bench.made) == {("b", 0)}


def test_callers_step_together(bench: Bench) -> None:
    bench.work(run("a"), run("b"), run("c"))
    assert [sorted(batch) for batch in bench.batches] == [["a", "b", "c"]] * 4


def test_a_newcomer_joins_at_the_next_step(bench: Bench, runner: FakeRunner) -> None:
    runner.steps = (4, 1)
    bench.during(2, run("b"))
    bench.work(run("a"))
    assert [sorted(batch) for batch in bench.batches[:4]] == [["a"], ["a"], ["a", "b"], ["a", "b"]]


def test_only_idle_time_is_spent_on_what_may_come(bench: Bench, runner: FakeRunner) -> None:
    expected = [Expect(asked(name).model_dump_json().encode()) for name in "ab"]
    bench.during(2, expected[1])
    bench.work(expected[0], run("a"))
    assert runner.expected == [asked("a")]
    assert list(bench.made) == [("a", 0)]


def test_what_may_come_is_seen_to_hang(
    bench: Bench, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(_: bytes) -> None:
        bench.now += 60
        bench.pulse.beat()

    monkeypatch.setattr(runner, "expect", hang)
    bench.work(Expect(b""))
    [beat] = bench.of(Heartbeat)
    assert (beat.busy_seconds, beat.predicted_seconds) == (60, 0)


def test_a_large_job_delays_another_tenant_by_two_steps_at_most(bench: Bench, runner: FakeRunner) -> None:
    runner.steps = (20, 10)
    bench.during(7, run("b", tenant="b"))
    bench.work(*(run("a", index, tenant="a") for index in range(64)))
    at = [number for number, batch in enumerate(bench.batches, start=1) if "b" in batch]
    assert len(at) == 30
    assert at[-1] <= 7 + 30 + 2


def test_a_guided_picture_is_two_rows(bench: Bench, runner: FakeRunner) -> None:
    runner.first_cap = 4
    bench.work(*(run(name, request=asked(name, guidance=4)) for name in "abcd"))
    guided = [tick for tick in bench.ticks if tick.stage == "prior"]
    assert {(tick.rows, tick.samples) for tick in guided} == {(4, 2)}
    assert any(tick.is_backlogged for tick in guided)


def test_a_picture_of_another_size_is_no_backlog_of_stage_a(bench: Bench, runner: FakeRunner) -> None:
    def decode(tracks: Sequence[FakeTrack]) -> None:
        if not bench.made:
            wait_until(lambda: bool(bench.engine._finisher._drawn))

    runner.on_decode = decode
    bench.work(run("a"), run("b", request=asked("b", width=128)))
    assert len(bench.made) == 2
    assert not any(tick.is_backlogged for tick in bench.ticks if tick.stage == "decode")


def test_stage_a_decodes_two_alike_together_with_another_between_them(
    bench: Bench, runner: FakeRunner
) -> None:
    finisher, together = bench.engine._finisher, []
    runner.on_decode = lambda tracks: together.append([track.run.job for track in tracks])
    runner.decoding.clear()
    sizes = {"first": 64, "b": 128, "c": 192, "d": 128, "e": 128}
    for name, width in sizes.items():
        track = FakeTrack(run(name, request=asked(name, width=width)), (1, 1))
        track.work = track.work[-1:]
        picture = Picture.aboard(track.run, track, bench.now)
        picture.began_stage_at = bench.now
        finisher.finish(picture)
        wait_until(lambda: finisher._is_working)  # on the first, until all others are there
    runner.decoding.set()
    finisher.wait_until_idle()
    assert together == [["first"], ["b", "d"], ["c"], ["e"]]


def test_latents_are_told_when_stage_c_is_done(bench: Bench) -> None:
    bench.work(run("a"))
    [latents] = bench.of(Latents)
    assert latents == Latents("a", 0, digest(asked("a"), 0))
    assert bench.said.index(latents) < bench.said.index(bench.of(Pixels)[0])


def test_a_replay_begins_at_stage_b_and_gives_the_same_picture(bench: Bench, runner: FakeRunner) -> None:
    runner.steps = (20, 3)
    bench.work(run("a", latents=digest(asked("a"), 0)))
    assert runner.steps_done == 3
    assert bench.made == {("a", 0): decoded(asked("a"), 0).pixels}
    assert bench.of(Latents) == []


def test_a_picture_asked_for_twice_is_made_once(bench: Bench) -> None:
    bench.work(run("a"), run("a"))
    assert list(bench.made) == [("a", 0)]


def test_what_follows_stage_a_is_not_in_its_price(bench: Bench, runner: FakeRunner) -> None:
    def pass_time(seconds: float) -> None:
        bench.now += seconds

    runner.on_decode = lambda tracks: pass_time(0.5)
    runner.on_finish = lambda track: pass_time(7.0)
    bench.work(run("a"))
    assert [tick.seconds for tick in bench.ticks if tick.stage == "decode"] == [pytest.approx(0.5)]
    assert bench.of(Pixels)[0].decode_seconds == pytest.approx(7.5)


def test_seconds_are_told_by_stage(bench: Bench, runner: FakeRunner) -> None:
    runner.steps = (5, 3)
    bench.work(run("a"))
    [pixels] = bench.of(Pixels)
    assert pixels.prior_seconds == pytest.approx(5 * STEP_SECONDS)
    assert pixels.decoder_seconds == pytest.approx(3 * STEP_SECONDS)


class TestProgress:
    def test_is_told_ten_times_a_second_for_a_job(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (60, 40)
        bench.work(*(run("a", index) for index in range(3)))
        seconds = 100 * STEP_SECONDS
        assert seconds * 5 < len(bench.of(Progressed)) <= seconds * 10 + 1
        for message in bench.of(Progressed):
            assert sorted(step.index for step in message.steps) == [0, 1, 2]

    def test_is_told_of_every_picture_of_a_job_in_whichever_batches(
        self, bench: Bench, runner: FakeRunner
    ) -> None:
        runner.steps, runner.first_cap = (60, 40), 2
        bench.work(*(run("a", index) for index in range(7)))
        seconds = 4 * 100 * STEP_SECONDS
        assert len(bench.of(Progressed)) <= seconds * 10 + 1
        for index in range(7):
            told = [step for step in bench.steps if step.index == index]
            assert len(told) > 20
            assert {step.stage for step in told} >= {"prior", "decoder"}
            assert len(set(told)) == len(told), "what did not move is not told again"

    def test_of_all_jobs_in_a_batch_is_one_message(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (30, 1)
        bench.work(*(run(name) for name in "abcd"))
        together = [sorted(step.job for step in message.steps) for message in bench.of(Progressed)]
        assert together.count(list("abcd")) > 5

    def test_goes_forward_and_gets_shorter(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (30, 30)
        bench.work(run("a"))
        told = bench.steps
        order = [("prior", "decoder", "encode").index(message.stage) for message in told]
        assert order == sorted(order)
        assert {(message.stage, message.steps) for message in told} >= {("prior", 30), ("decoder", 30)}
        remaining = [message.remaining for message in told]
        assert remaining == sorted(remaining, reverse=True)
        assert remaining[0] > 0

    def test_a_second_job_is_told_apart(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (30, 1)
        bench.work(run("a"), run("b"))
        told = [message.job for message in bench.steps]
        assert told.count("a") == told.count("b") > 5


class TestCancel:
    def test_stops_by_the_next_step(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (10, 10)
        bench.during(3, Cancel("a"))
        bench.work(run("a", 0), run("a", 1), run("b"))
        assert sum("a" in batch for batch in bench.batches) == 3
        assert list(bench.made) == [("b", 0)]

    def test_silences_the_job(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (10, 10)
        bench.during(3, Cancel("a"))
        bench.plans[4] = bench.said.clear
        bench.work(run("a"), run("b"))
        assert len(bench.said) > 5
        assert all(getattr(message, "job", "") != "a" for message in bench.said)

    def test_of_a_stranger_is_nothing(self, bench: Bench) -> None:
        bench.work(Cancel("zzz"), run("a"))
        assert list(bench.made) == [("a", 0)]

    def test_reaches_pictures_in_stage_a_and_behind_it(self, bench: Bench, runner: FakeRunner) -> None:
        seen: list[tuple[str, int]] = []

        def cancel(tracks: Sequence[FakeTrack]) -> None:
            seen.extend((track.run.job, track.run.index) for track in tracks)
            if seen[-1][0] == "a":
                bench.tell(Cancel("a"))
                wait_until(lambda: bench.pulse.num_samples == 1)

        runner.on_decode = cancel
        bench.work(run("b"), *(run("a", index) for index in range(5)))
        assert list(bench.made) == [("b", 0)]
        assert len(seen) <= 3

    def test_lets_the_job_come_again(self, bench: Bench) -> None:
        bench.during(1, Cancel("a"), run("a"))
        bench.work(run("a"))
        assert list(bench.made) == [("a", 0)]

    def test_lets_the_job_come_again_while_it_is_in_stage_a(self, bench: Bench, runner: FakeRunner) -> None:
        def again(tracks: Sequence[FakeTrack]) -> None:
            if len(runner.started) == 1:
                bench.tell(Cancel("a"), run("a"))
                wait_until(lambda: len(runner.started) == 2)

        runner.on_decode = again
        bench.plans[5] = lambda: wait_until(lambda: bench.inbox.qsize() == 2)  # the first is done with
        bench.work(run("a"))
        assert list(bench.made) == [("a", 0)]


class TestPreviews:
    def test_are_spread_over_stage_c(self, bench: Bench, runner: FakeRunner) -> None:
        asked_after = []

        def step(tracks: Sequence[FakeTrack]) -> None:
            wait_until(lambda: len(bench.of(Previewed)) >= tracks[0].step // 5)
            asked_after.append(len(bench.of(Previewed)))

        runner.on_step, runner.steps = step, (20, 5)
        bench.work(run("a"), WantPreviews("a", 3))
        assert asked_after == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 10
        assert [message.preview for message in bench.of(Previewed)] == [0, 1, 2]

    def test_are_made_for_those_who_watch(self, bench: Bench, runner: FakeRunner) -> None:
        runner.steps = (20, 5)
        bench.plans[20] = lambda: wait_until(lambda: bool(bench.of(Previewed)))
        bench.work(run("a"), run("b"), WantPreviews("b", 1), WantPreviews("zzz", 1))
        assert [message.job for message in bench.of(Previewed)] == ["b"]

    def test_need_a_previewer(self, bench: Bench, runner: FakeRunner) -> None:
        runner.has_previewer = False
        bench.work(run("a"), WantPreviews("a", 3))
        assert len(bench.made) == 1

    def test_give_way_to_finished_pictures(self, bench: Bench, runner: FakeRunner) -> None:
        is_showing = Event()

        def show(track: FakeTrack) -> tuple[int, int, bytes]:
            is_showing.set()
            wait_until(lambda: len(bench.engine._finisher._drawn) == 2)
            return (1, 1, b"rgb")

        runner.preview = show  # type: ignore[method-assign]
        bench.plans[2] = lambda: wait_until(is_showing.is_set)
        bench.work(run("a"), run("b"), WantPreviews("a", 1), WantPreviews("b", 1))
        assert len(bench.of(Previewed)) == 1
        assert len(bench.made) == 2

    def test_that_fail_spoil_no_picture(self, bench: Bench, runner: FakeRunner) -> None:
        runner.preview = lambda track: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        bench.work(run("a"), WantPreviews("a", 1))
        assert len(bench.made) == 1


def test_hanging_up_ends_it_after_the_step(bench: Bench, runner: FakeRunner) -> None:
    bench.during(2, HungUp())
    runner.steps = (10, 10)
    bench.work(run("a"))
    assert runner.steps_done == 2


def test_ticks_are_observed(bench: Bench) -> None:
    bench.work(run("a"), run("b"))
    tick = bench.ticks[0]
    assert (tick.stage, tick.shape, tick.rows, tick.samples, tick.cap) == ("prior", "64x64", 2, 2, 16)
    assert tick.seconds == pytest.approx(STEP_SECONDS)


orders = st.lists(
    st.tuples(
        st.sampled_from(["run", "cancel", "poison", "replay"]),
        st.integers(0, 5),
        st.integers(0, 2),
        st.integers(1, 9),
    ),
    max_size=12,
)


@given(orders, st.integers(1, 16))
def test_every_picture_ends_once(orders: list[tuple[str, int, int, int]], memory_rows: int) -> None:
    bench = Bench(FakeRunner(steps=(3, 2)))
    bench.runner.memory_rows = memory_rows
    expected, canceled = set(), set()
    for kind, number, index, step in orders:
        job = f"job{number}"
        if kind == "poison":
            bench.runner.broken[job] = RuntimeError()
        elif kind == "cancel":
            canceled.add(job)
            bench.during(step, Cancel(job))
        else:
            expected.add((job, index))
            bench.tell(run(job, index, latents=b"" if kind == "replay" else None))
    bench.work()
    for job, index in expected:
        is_made, is_failed = (job, index) in bench.made, job in bench.failed
        assert not (is_made and is_failed and job not in canceled)
        assert is_made or is_failed or job in canceled
    assert bench.pulse.num_samples == 0
