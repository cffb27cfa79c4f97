"""What heartbeats say, on a clock that the test moves."""

import threading

import pytest

from app.engine.protocol import Heartbeat, Message, Observation
from app.engine.pulse import Pulse
from app.engine.scheduler import BatchKey
from tests.app.fakes import FakeRunner

TICK = Observation("prior", "8x8", 4, 3, 0.5, 8, True)


class Listener:
    def __init__(self) -> None:
        self.now = 100.0
        self.runner = FakeRunner()
        self.said: list[Message] = []
        self.pulse = Pulse(self.runner, self.said.append, lambda: self.now)

    def observe(self) -> None:
        key = BatchKey("prior", (8, 8))
        tick = self.pulse.observe(key, rows=4, samples=3, seconds=0.5, cap=8, is_backlogged=True)
        assert tick == TICK

    def beat(self) -> Heartbeat:
        self.pulse.beat()
        beat = self.said[-1]
        assert isinstance(beat, Heartbeat)
        return beat


@pytest.fixture
def listener() -> Listener:
    return Listener()


def test_an_idle_engine_says_so(listener: Listener) -> None:
    beat = listener.beat()
    assert (beat.busy_seconds, beat.predicted_seconds, beat.num_samples) == (0, 0, 0)
    assert beat.memory_bytes > 2**20


def test_a_step_is_told_with_its_age(listener: Listener) -> None:
    with listener.pulse.busy(2.0):
        listener.now += 7
        beat = listener.beat()
        assert (beat.busy_seconds, beat.predicted_seconds) == (7, 2)
    assert listener.beat().busy_seconds == 0


def test_the_thread_that_overdoes_it_most_is_told(listener: Listener) -> None:
    entered, told = threading.Event(), threading.Event()

    def hang() -> None:
        with listener.pulse.busy(1.0):
            entered.set()
            told.wait(10)

    other = threading.Thread(target=hang)
    with listener.pulse.busy(60.0):
        listener.now += 9
        other.start()
        assert entered.wait(10)
        listener.now += 41
        beat = listener.beat()
    told.set()
    other.join()
    assert (beat.busy_seconds, beat.predicted_seconds) == (41, 1)


def test_an_error_ends_the_work_too(listener: Listener) -> None:
    with pytest.raises(ZeroDivisionError), listener.pulse.busy(1.0):
        raise ZeroDivisionError
    listener.now += 5
    assert listener.beat().busy_seconds == 0


def test_ticks_and_events_are_told_once(listener: Listener) -> None:
    listener.observe()
    listener.pulse.events["halvings"] += 1
    listener.runner.counts["cache_hits"] = 5
    beat = listener.beat()
    assert (beat.ticks, beat.events) == ((TICK,), {"halvings": 1, "cache_hits": 5})
    listener.runner.counts["cache_hits"] = 7
    beat = listener.beat()
    assert (beat.ticks, beat.events) == ((), {"cache_hits": 2})


def test_the_last_beat_tells_the_rest(listener: Listener) -> None:
    listener.pulse.start()
    listener.observe()
    listener.pulse.stop()
    last = listener.said[-1]
    assert isinstance(last, Heartbeat)
    assert last.ticks == (TICK,)
