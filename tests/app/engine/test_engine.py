"""The engine's thread: order, sharing, cancelling, faults, stopping."""

import io
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from app.engine.engine import Engine, Steps
from app.errors import (
    AppError,
    ClientGone,
    GenerationFailed,
    ModelLoading,
    ModelUnusable,
    Overloaded,
    ShuttingDown,
)
from app.jobs.job import Job, JobStatus, Progress
from app.logs import make_logger
from app.metrics import Metrics
from app.schemas import GenerationRequest
from app.settings import Settings
from tests.app.fakes import FakeRunner, colour

Start = Callable[..., Engine]


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def start(runner: FakeRunner) -> Iterator[Start]:
    engines = []

    def start(*, max_queue: int = 100, max_batch: int | None = 4) -> Engine:
        engine = Engine(
            runner,
            max_queue=max_queue,
            max_batch=max_batch,
            metrics=Metrics(),
            logger=make_logger(Settings(log_format="json"), io.StringIO()),
        )
        engines.append(engine)
        engine.start()
        engine.loaded.exception(10)
        return engine

    yield start
    runner.gate.set()
    for engine in engines:
        engine.stop(10)


def request(
    prompt: str = "x", *, seeds: tuple[int, ...] = (0,), width: int = 64, preset: str = "official"
) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {"prompt": prompt, "seeds": seeds, "width": width, "height": 64, "preset": preset}
    )


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def hold(engine: Engine, runner: FakeRunner) -> Job:
    """A job that keeps the device busy until the gate opens."""
    runner.gate.clear()
    job = engine.submit(request("first"))
    wait_until(lambda: runner.batches)
    return job


def test_jobs_end_in_the_order_of_arrival(start: Start, runner: FakeRunner) -> None:
    engine = start(max_batch=1)
    jobs = [engine.submit(request(prompt)) for prompt in "abcdef"]
    for job in jobs:
        assert len(job.outcome.result(10)) == 1
    assert [batch[0].prompt for batch in runner.batches] == list("abcdef")
    ended = [job.ended_at or 0 for job in jobs]
    assert ended == sorted(ended)


def test_requests_that_fit_are_made_together_and_equal_lone_ones(start: Start, runner: FakeRunner) -> None:
    engine = start(max_batch=4)
    hold(engine, runner)
    sent = [
        request("a", seeds=(1, 2)),
        request("b", width=128),
        request("c", seeds=(3,)),
        request("d", preset="diffusers"),
        request("e", seeds=(4, 5)),
        request("f", seeds=(6,)),
    ]
    jobs = [engine.submit(one) for one in sent]
    runner.gate.set()
    for one, job in zip(sent, jobs, strict=True):
        pictures = job.outcome.result(10)
        assert [picture.image.getpixel((0, 0)) for picture in pictures] == [colour(one, s) for s in one.seeds]
        assert [picture.seed for picture in pictures] == list(one.seeds)
    prompts = ["".join(one.prompt for one in batch) for batch in runner.batches]
    assert prompts == ["first", "acf", "b", "d", "e"]


def test_a_request_larger_than_a_batch_is_made_in_parts(start: Start, runner: FakeRunner) -> None:
    engine = start(max_batch=2)
    pictures = engine.submit(request(seeds=(1, 2, 3))).outcome.result(10)
    assert [picture.seed for picture in pictures] == [1, 2, 3]
    assert [batch[0].seeds for batch in runner.batches] == [(1, 2), (3,)]


def test_on_a_cpu_pictures_are_made_one_by_one_unless_told_otherwise(
    start: Start, runner: FakeRunner
) -> None:
    engine = start(max_batch=None)
    engine.submit(request(seeds=(1, 2))).outcome.result(10)
    assert [batch[0].seeds for batch in runner.batches] == [(1,), (2,)]


def test_the_bound_counts_those_that_wait(start: Start, runner: FakeRunner) -> None:
    engine = start(max_queue=2, max_batch=1)
    hold(engine, runner)
    jobs = [engine.submit(request()) for _ in range(2)]
    assert (engine.num_queued, engine.is_accepting) == (2, False)
    with pytest.raises(Overloaded) as refused:
        engine.submit(request())
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 59
    engine.cancel(jobs[0])
    assert engine.is_accepting
    engine.submit(request())


def test_the_bound_holds_against_many_threads(start: Start, runner: FakeRunner) -> None:
    engine = start(max_queue=10, max_batch=1)
    hold(engine, runner)
    accepted, refused = [], []

    def send() -> None:
        for _ in range(50):
            try:
                accepted.append(engine.submit(request()))
            except Overloaded as error:
                refused.append(error)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(accepted), len(refused)) == (10, 390)


def test_a_queue_of_zero_takes_work_only_when_idle(start: Start, runner: FakeRunner) -> None:
    engine = start(max_queue=0)
    hold(engine, runner)
    with pytest.raises(Overloaded):
        engine.submit(request())


def test_a_queued_job_that_is_cancelled_never_runs(start: Start, runner: FakeRunner) -> None:
    engine = start(max_batch=1)
    hold(engine, runner)
    job = engine.submit(request("never"))
    engine.cancel(job)
    after = engine.submit(request("after"))
    runner.gate.set()
    after.outcome.result(10)
    assert [batch[0].prompt for batch in runner.batches] == ["first", "after"]
    assert isinstance(job.outcome.exception(0), ClientGone)


def test_a_running_job_that_is_cancelled_stops_by_the_next_step(start: Start, runner: FakeRunner) -> None:
    runner.steps = 50
    engine = start()
    job = hold(engine, runner)
    engine.cancel(job)
    runner.gate.set()
    wait_until(lambda: runner.num_stopped)
    assert runner.steps_done == 1
    assert job.status == JobStatus.CANCELED
    assert engine.submit(request()).outcome.result(10)


def test_one_who_leaves_does_not_stop_the_others(start: Start, runner: FakeRunner) -> None:
    engine = start()
    hold(engine, runner)
    leaving, staying = engine.submit(request("leaving")), engine.submit(request("staying"))
    runner.steps = 3
    runner.gate.set()
    wait_until(lambda: len(runner.batches) == 2)
    engine.cancel(leaving)
    assert staying.outcome.result(10)
    assert runner.num_stopped == 0


def test_only_the_culprit_fails(start: Start, runner: FakeRunner) -> None:
    runner.broken = {"bad": RuntimeError("inner"), "poor": Overloaded("told", retry_after_seconds=1)}
    engine = start()
    hold(engine, runner)
    jobs = {prompt: engine.submit(request(prompt)) for prompt in ("a", "bad", "poor", "b")}
    runner.gate.set()
    assert jobs["a"].outcome.result(10)
    assert jobs["b"].outcome.result(10)
    failure = jobs["bad"].outcome.exception(10)
    assert isinstance(failure, GenerationFailed)
    assert "inner" not in failure.message
    assert jobs["poor"].outcome.exception(10) is runner.broken["poor"]
    assert engine.submit(request()).outcome.result(10)


def test_nothing_is_accepted_without_a_model(runner: FakeRunner, start: Start) -> None:
    runner.load_error = ValueError("no such folder")
    engine = start()
    with pytest.raises(ModelUnusable):
        engine.submit(request())
    assert str(engine.loaded.exception(0)) == "no such folder"
    assert not engine.has_model
    idle = Engine(FakeRunner(), max_queue=1, max_batch=1, metrics=Metrics(), logger=make_logger(Settings()))
    with pytest.raises(ModelLoading):
        idle.submit(request())


def test_stopping_ends_every_job(start: Start, runner: FakeRunner) -> None:
    runner.steps = 50
    engine = start(max_batch=1)
    running = hold(engine, runner)
    waiting = engine.submit(request())
    stopper = threading.Thread(target=engine.stop, args=(10,))
    stopper.start()
    assert isinstance(waiting.outcome.exception(10), ShuttingDown)
    runner.gate.set()
    stopper.join(10)
    assert isinstance(running.outcome.exception(10), ShuttingDown)
    assert runner.steps_done < 3
    with pytest.raises(ShuttingDown):
        engine.submit(request())


def test_the_advice_to_come_back_follows_what_was_measured(start: Start, runner: FakeRunner) -> None:
    engine = start(max_batch=1)
    job = engine.submit(request())
    job.outcome.result(10)
    wait_until(lambda: not engine._running)
    hold(engine, runner)
    assert engine.retry_after_seconds() == 1
    engine._cost.learn(engine._cost.units(request()), 1000.0)
    assert engine.retry_after_seconds() == 59


def test_every_error_of_the_tree_has_a_status_of_its_kind() -> None:
    def family(kind: type[AppError]) -> list[type[AppError]]:
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in family(child))]

    for kind in family(AppError):
        assert 400 <= kind.status <= 599
        assert kind.type.endswith("_error")
        assert kind.code


def test_a_closed_engine_fails_what_waits_and_finishes_what_runs(start: Start, runner: FakeRunner) -> None:
    engine = start(max_batch=1)
    running = hold(engine, runner)
    waiting = engine.submit(request())
    engine.close()
    assert isinstance(waiting.outcome.exception(0), ShuttingDown)
    assert not engine.is_accepting
    with pytest.raises(ShuttingDown):
        engine.submit(request())
    runner.gate.set()
    assert running.outcome.result(10)


def test_an_abandoned_job_does_not_wait_for_the_end_of_its_step(start: Start, runner: FakeRunner) -> None:
    engine = start()
    running = hold(engine, runner)
    engine.abandon()
    assert isinstance(running.outcome.exception(0), ShuttingDown)


def test_a_runner_that_makes_too_few_pictures_harms_its_job_only(
    start: Start, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(_: object) -> Steps:
        yield Progress("prior", 1, 1)
        return [[]]

    engine = start()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "generate", forgetful)
        assert isinstance(engine.submit(request()).outcome.exception(10), GenerationFailed)
    assert engine.submit(request()).outcome.result(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_died_is_not_ready(start: Start, runner: FakeRunner) -> None:
    runner.broken = {"fatal": SystemExit()}  # type: ignore[dict-item]
    engine = start()
    job = engine.submit(request("fatal"))
    assert isinstance(job.outcome.exception(10), ShuttingDown), "nobody waits for the dead"
    wait_until(lambda: not engine.has_model)
    assert not engine.is_accepting
