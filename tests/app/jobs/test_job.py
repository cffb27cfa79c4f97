"""A job moves forwards only, whoever pushes."""

import threading
from collections.abc import Callable
from functools import partial

import pytest

from app.errors import ClientGone, GenerationFailed
from app.jobs.job import Job, JobStatus, Progress
from app.schemas import GenerationRequest


@pytest.fixture
def job() -> Job:
    return Job(GenerationRequest(prompt="x", width=64, height=64, seeds=(1,)))


def test_from_queued_to_succeeded(job: Job) -> None:
    assert (job.status, job.is_finished, job.running_seconds) == (JobStatus.QUEUED, False, 0.0)
    assert job.start()
    assert job.status == "running"
    job.report(Progress("prior", 1, 20))
    assert job.progress.step == 1
    job.succeed([])
    assert (job.status, job.is_finished) == (JobStatus.SUCCEEDED, True)
    assert job.outcome.result(0) == []
    assert job.running_seconds >= 0
    assert job.queued_seconds >= 0


def test_a_final_status_stays(job: Job) -> None:
    job.cancel()
    assert not job.start()
    job.succeed([])
    job.fail(GenerationFailed("x"))
    job.cancel()
    assert job.status == JobStatus.CANCELED
    assert job.started_at is None
    assert isinstance(job.outcome.exception(0), ClientGone)


def test_a_waiter_that_gives_up_does_not_cancel_the_outcome(job: Job) -> None:
    assert not job.outcome.cancel()
    job.fail(GenerationFailed("x"))
    assert isinstance(job.outcome.exception(0), GenerationFailed)


def test_of_many_ends_at_once_one_counts() -> None:
    for _ in range(50):
        job = Job(GenerationRequest(prompt="x", width=64, height=64, seeds=(1,)))
        job.start()
        ends: list[Callable[[], None]] = [
            job.cancel,
            partial(job.succeed, []),
            partial(job.fail, GenerationFailed("x")),
        ]
        threads = [threading.Thread(target=end) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert job.outcome.done()
        assert (job.outcome.exception(0) is None) == (job.status == JobStatus.SUCCEEDED)
