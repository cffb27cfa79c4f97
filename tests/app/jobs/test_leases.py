"""When a worker that says nothing counts as gone."""

import pytest

from app.jobs.leases import LOOK_SECONDS, LeaseWatch
from tests.app.jobs.stores import Clock

LEASE = 30.0


@pytest.fixture
def watch(clock: Clock) -> LeaseWatch:
    return LeaseWatch(clock.steady)


def test_silence_is_counted_from_the_first_look(watch: LeaseWatch, clock: Clock) -> None:
    clock.let_pass(1000)
    for _ in range(30):
        assert watch.silent({"one": 5.0}, LEASE) == set()
        clock.let_pass(1)
    assert watch.silent({"one": 5.0}, LEASE) == {"one"}


def test_any_change_of_a_lease_is_a_sign_of_life(watch: LeaseWatch, clock: Clock) -> None:
    for lease in (5.0, 4.0, 1e9, 5.0):
        for _ in range(30):
            assert watch.silent({"one": lease}, LEASE) == set()
            clock.let_pass(1)


def test_a_time_without_looks_is_no_silence(watch: LeaseWatch, clock: Clock) -> None:
    for _ in range(3):
        assert watch.silent({"one": 5.0}, LEASE) == set()
        clock.let_pass(1000)
    assert watch.silent({"one": 5.0}, LEASE) == {"one"}  # the third gap that counts a third


def test_a_look_is_due_some_time_after_the_last(watch: LeaseWatch, clock: Clock) -> None:
    due = [watch.is_due]
    watch.silent({}, LEASE)
    due.append(watch.is_due)
    clock.let_pass(LOOK_SECONDS)
    assert [*due, watch.is_due] == [True, False, True]


def test_workers_are_watched_apart(watch: LeaseWatch, clock: Clock) -> None:
    for second in range(31):
        silent = watch.silent({"one": 5.0, "two": 100.0 + second}, LEASE)
        clock.let_pass(1)
    assert silent == {"one"}


def test_who_held_nothing_meanwhile_starts_anew(watch: LeaseWatch, clock: Clock) -> None:
    for _ in range(30):
        watch.silent({"one": 5.0}, LEASE)
        clock.let_pass(1)
    assert watch.silent({}, LEASE) == set()
    assert watch.silent({"one": 5.0}, LEASE) == set()
