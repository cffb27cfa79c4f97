"""What a job says of itself."""

from dataclasses import replace

from app.jobs.job import Failure, JobStatus, Timings
from tests.app.jobs.stores import new_image, new_job


def test_its_timings_add_up_to_the_time_it_took() -> None:
    job = new_job()
    running = replace(job.claimed("one", job.created_at + 1.0, 60.0), images=(new_image(),))
    assert running.timings == Timings(queued=1.0)
    done = running.succeeded(job.created_at + 10.0, Timings(prior=3.0, decoder=2.0, encode=0.5))
    assert done.status == JobStatus.SUCCEEDED
    assert done.timings == Timings(queued=4.5, prior=3.0, decoder=2.0, encode=0.5)


def test_its_timings_are_never_negative() -> None:
    job = new_job()
    running = replace(job.claimed("one", job.created_at, 60.0), images=(new_image(),))
    assert running.succeeded(job.created_at + 1.0, Timings(prior=3.0)).timings == Timings(prior=3.0)


def test_of_a_job_without_a_last_picture_all_its_time_is_waiting() -> None:
    job = new_job()
    running = replace(job.claimed("one", job.created_at + 1.0, 60.0), images=(new_image(),))
    end = job.created_at + 10.0
    ended = [
        running.succeeded(end),  # its pictures were stored before a crash
        running.canceled(end),
        running.expired(end),
        running.failed(Failure(500, "x", "y"), end),
    ]
    assert {each.timings for each in ended} == {Timings(queued=10.0)}
