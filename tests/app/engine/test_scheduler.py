"""Who steps next, on a clock that only the tests move."""

import cProfile
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from app.engine.scheduler import COMPANY, PATIENCE, Batch, BatchKey, Entry, Scheduler, Stage

CAP = 16
DECODER_STEPS = 10

steps_left: dict[Entry, int] = {}  # of the stage that a picture is in
PRIOR = BatchKey("prior", (6, 6))


class Device:
    """Steps what the scheduler says, and takes pictures from the prior to the decoder to their end."""

    def __init__(
        self,
        *,
        cap: int = CAP,
        weights: dict[str, float] | None = None,
        seconds: Callable[[BatchKey, int], float] = lambda key, rows: 1 + rows / 8,
    ) -> None:
        self.scheduler = Scheduler(lambda key: cap, weights or {})
        self.seconds = seconds
        self.now = 0.0
        self.batches: list[Batch] = []
        self.done: dict[str, int] = {}  # ticks, by job; of its last picture
        self.had: defaultdict[str, float] = defaultdict(float)  # seconds by tenant

    def add(self, job: str, tenant: str = "a", *, num_images: int = 1, **members: Any) -> list[Entry]:
        entries = [
            entry(job, tenant, index=index, arrived=self.now, **members) for index in range(num_images)
        ]
        cost = sum(self.seconds(key, rows) * steps for key, rows, steps in ahead(entries[0]))
        for one in entries:
            one.cost_left = cost
            self.scheduler.add(one)
        return entries

    def tick(self) -> Batch | None:
        batch = self.scheduler.next(self.now)
        if batch is None:
            return None
        assert batch.rows == sum(one.rows for one in batch.entries)
        seconds = self.seconds(batch.key, batch.rows)
        self.now += seconds
        self.batches.append(batch)
        self.scheduler.stepped(batch, seconds)
        for one in batch.entries:
            self.had[one.tenant] += seconds * one.rows / batch.rows
            self._advance(one)
        return batch

    def run(self, ticks: int = 10_000) -> list[Batch]:
        before = len(self.batches)
        while len(self.batches) < before + ticks and self.tick() is not None:
            pass
        return self.batches[before:]

    def _advance(self, one: Entry) -> None:
        steps_left[one] -= 1
        one.cost_left -= self.seconds(one.key, one.rows)
        if steps_left[one]:
            return
        self.scheduler.remove(one)
        if one.key.stage == "prior":
            one.key, one.rows, steps_left[one] = BatchKey("decoder", one.key.shape), 1, DECODER_STEPS
            self.scheduler.add(one)
        else:
            self.done[one.job] = len(self.batches)


def ahead(one: Entry) -> list[tuple[BatchKey, int, int]]:
    """The work of a picture: its stage, and the decoder unless that is it."""
    here = (one.key, one.rows, steps_left[one])
    if one.key.stage == "decoder":
        return [here]
    return [here, (BatchKey("decoder", one.key.shape), 1, DECODER_STEPS)]


def entry(
    job: str,
    tenant: str = "a",
    *,
    index: int = 0,
    stage: Stage = "prior",
    shape: tuple[int, int] = (6, 6),
    rows: int = 2,
    steps: int = 20,
    arrived: float = 0.0,
    priority: int = 0,
    deadline: float | None = None,
    cost_left: float = 0.0,
    is_alone: bool = False,
) -> Entry:
    one = Entry(
        job=job,
        index=index,
        tenant=tenant,
        priority=priority,
        deadline=deadline,
        arrived=arrived,
        key=BatchKey(stage, shape),
        rows=rows,
        cost_left=cost_left,
        is_alone=is_alone,
    )
    steps_left[one] = steps
    return one


def scheduler_of(*entries: Entry, cap: int = CAP) -> Scheduler:
    scheduler = Scheduler(lambda key: cap, {})
    for one in entries:
        scheduler.add(one)
    return scheduler


def jobs(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [one.job for one in batch.entries]


def ticks_of(device: Device, job: str) -> list[int]:
    return [tick for tick, batch in enumerate(device.batches) if job in jobs(batch)]


# What a batch is made of


def test_a_batch_has_one_stage_shape_and_adapter_set() -> None:
    adapted = entry("adapted")
    adapted.key = BatchKey("prior", (6, 6), "sketch")
    device = Device()
    for one in (
        entry("a"),
        entry("b"),
        entry("wide", shape=(4, 8)),
        entry("late", stage="decoder", shape=(8, 8)),
        adapted,
    ):
        device.scheduler.add(one)
    batches = [set(jobs(device.tick())) for _ in range(40)]
    assert {frozenset(batch) for batch in batches} == {
        frozenset(("a", "b")),
        frozenset(("wide",)),
        frozenset(("late",)),
        frozenset(("adapted",)),
    }


def test_rows_fill_up_to_the_cap_and_the_rest_is_backlog() -> None:
    scheduler = scheduler_of(*(entry(f"{number:02}", rows=2) for number in range(9)))
    batch = scheduler.next(0.0)
    assert batch is not None
    assert (batch.key, batch.rows, batch.has_backlog) == (PRIOR, 16, True)
    assert jobs(batch) == [f"{number:02}" for number in range(8)]
    scheduler.remove(batch.entries[0])
    batch = scheduler.next(0.0)
    assert batch is not None
    assert (len(batch.entries), batch.has_backlog) == (8, False)


def test_a_row_that_is_left_goes_to_a_picture_that_needs_one() -> None:
    others = [entry(f"{number}", rows=2) for number in range(4)]
    single = entry("single", tenant="b", rows=1)
    batch = scheduler_of(*others, single, cap=5).next(0.0)
    assert batch is not None
    assert batch.rows == 5
    assert "single" in jobs(batch)


def test_a_guided_picture_is_stepped_even_where_only_one_row_is_allowed() -> None:
    batch = scheduler_of(entry("guided", rows=2), entry("next", rows=2), cap=1).next(0.0)
    assert jobs(batch) == ["guided"]


def test_the_cap_counts_as_it_is_now() -> None:
    caps = {PRIOR: 16}
    scheduler = Scheduler(lambda key: caps[key], {})
    for number in range(8):
        scheduler.add(entry(f"{number}"))
    caps[PRIOR] = 8
    batch = scheduler.next(0.0)
    assert batch is not None
    assert batch.rows == 8


def test_the_batch_is_chosen_when_the_device_is_free_and_not_earlier() -> None:
    device = Device()
    first, second = *device.add("first"), *device.add("second")
    assert jobs(device.tick()) == ["first", "second"]
    device.add("third")
    assert jobs(device.tick()) == ["first", "second", "third"]
    device.scheduler.remove(second)
    assert jobs(device.tick()) == ["first", "third"]
    device.scheduler.remove(first)
    assert len(device.scheduler) == 1


def test_nothing_aboard_is_nothing_to_step() -> None:
    scheduler = scheduler_of(one := entry("a"))
    scheduler.remove(one)
    assert scheduler.next(0.0) is None
    assert len(scheduler) == 0
    with pytest.raises(KeyError):
        scheduler.remove(one)


# Order within a tenant


def test_priority_comes_first_then_deadline_then_arrival() -> None:
    late, early = entry("late", arrived=2.0), entry("early", arrived=1.0)
    due, sooner = entry("due", arrived=3.0, deadline=90.0), entry("sooner", arrived=4.0, deadline=80.0)
    urgent, unimportant = entry("urgent", arrived=5.0, priority=1), entry("unimportant", priority=-1)
    scheduler = scheduler_of(late, early, due, sooner, urgent, unimportant)
    assert jobs(scheduler.next(0.0)) == ["urgent", "sooner", "due", "early", "late", "unimportant"]


def test_pictures_of_a_job_go_in_their_order() -> None:
    entries = [entry("a", index=index) for index in range(12)]
    batch = scheduler_of(*reversed(entries)).next(0.0)
    assert batch is not None
    assert [one.index for one in batch.entries] == list(range(8))


def test_priority_decides_between_kinds_however_full() -> None:
    many = [entry(f"{number}") for number in range(8)]
    assert jobs(scheduler_of(*many, entry("urgent", shape=(4, 8), priority=1)).next(0.0)) == ["urgent"]


@pytest.mark.parametrize(
    ("deadline", "leads"), [(5.0, False), (12.0, True), (29.0, True), (60.0, False)], ids=str
)
def test_a_deadline_that_can_just_be_kept_decides_between_kinds(deadline: float, leads: bool) -> None:
    many = [entry(f"{number}") for number in range(8)]
    pressed = entry("pressed", shape=(4, 8), deadline=100 + deadline, cost_left=10.0)
    assert (jobs(scheduler_of(*many, pressed).next(100.0)) == ["pressed"]) is leads


def test_of_two_kinds_equally_full_the_one_nearer_to_the_end_is_stepped() -> None:
    device = Device()
    device.add("begun")
    device.run(20)
    device.add("new", rows=1)
    assert [batch.key.stage for batch in device.run(4)] == ["decoder"] * 4


def test_a_picture_without_rivals_is_the_whole_batch_even_beyond_the_cap() -> None:
    device = Device(cap=1)
    device.add("a", rows=2, steps=3)
    batches = device.run()
    assert [(batch.rows, batch.has_backlog) for batch in batches[:3]] == [(2, False)] * 3
    assert jobs(batches[-1]) == ["a"]


def test_a_lone_row_waits_for_company_but_not_for_long() -> None:
    device = Device()
    device.add("lone", stage="decoder", rows=1, steps=3)
    device.add("many", num_images=8, steps=1000)
    device.run(4 * COMPANY)
    waits = [after - before for before, after in pairwise([0, *ticks_of(device, "lone")])]
    assert len(waits) == 3
    assert COMPANY / 4 < max(waits) <= COMPANY


def test_full_batches_of_two_kinds_take_turns() -> None:
    device = Device()
    device.add("one", num_images=8, steps=1000)
    device.add("other", num_images=8, steps=1000, shape=(4, 8))
    turns = Counter(batch.entries[0].job for batch in device.run(100))
    assert abs(turns["one"] - turns["other"]) <= 2


# Between tenants


@pytest.mark.parametrize("shape", [(6, 6), (4, 8)], ids=["same shape", "own shape"])
@pytest.mark.parametrize("arrives_at", [0, 1, 7, 20, 33, 61, 64, 100, 127, 150])
def test_64_pictures_of_one_delay_a_picture_of_another_by_two_ticks_at_most(
    arrives_at: int, shape: tuple[int, int]
) -> None:
    alone = Device()
    alone.add("single", "b", shape=shape)
    alone.run()
    device = Device()
    device.add("many", "a", num_images=64)
    device.run(arrives_at)
    device.add("single", "b", shape=shape)
    while "single" not in device.done:
        device.tick()
    assert device.done["single"] - arrives_at - alone.done["single"] <= 2


def test_a_picture_now_and_then_is_as_good_as_alone_beside_a_thousand_jobs() -> None:
    device = Device(seconds=lambda key, rows: 0.01 + 0.005 * rows)
    for number in range(1000):
        device.add(f"many {number:03}", "a")
    for number in range(10):
        job, began_at = f"single {number}", len(device.batches)
        device.add(job, "b")
        while job not in device.done:
            device.tick()
        assert device.done[job] - began_at <= 30 + 2
        while device.now < 2.0 * (number + 1):
            device.tick()


@pytest.mark.parametrize("weights", [{}, {"b": 3.0}, {"a": 0.5, "c": 4.0}], ids=str)
@pytest.mark.parametrize("shapes", [[(6, 6)] * 3, [(6, 6), (4, 8), (8, 4)]], ids=["same", "own"])
def test_tenants_get_their_shares_of_the_device(
    weights: dict[str, float], shapes: list[tuple[int, int]]
) -> None:
    device = Device(weights=weights)
    for tenant, shape in zip("abc", shapes, strict=True):
        for number in range(300):
            device.add(f"{tenant}{number}", tenant, shape=shape)
    device.run(800)
    total = sum(weights.get(tenant, 1.0) for tenant in "abc")
    for tenant in "abc":
        share = device.had[tenant] / device.now
        assert share == pytest.approx(weights.get(tenant, 1.0) / total, rel=0.1)


def test_shares_are_of_time_and_not_of_pictures() -> None:
    device = Device(seconds=lambda key, rows: 10.0 if key.shape == (24, 24) else 1.0)
    device.add("large", "a", num_images=100, shape=(24, 24))
    device.add("small", "b", num_images=1000)
    device.run(1000)
    assert device.had["a"] == pytest.approx(device.had["b"], rel=0.1)


def test_tenants_share_a_batch_by_their_weights() -> None:
    device = Device(weights={"a": 3.0})
    for number in range(20):
        for tenant in "ab":
            device.scheduler.add(entry(f"{tenant}{number}", tenant, rows=1))
    for batch in device.run(10):
        assert Counter(one.tenant for one in batch.entries) == {"a": 12, "b": 4}


def test_guided_pictures_count_twice() -> None:
    device = Device()
    device.add("guided", "a", num_images=300)
    device.add("plain", "b", num_images=300, rows=1)
    device.run(300)
    assert device.had["a"] == pytest.approx(device.had["b"], rel=0.1)


def test_shares_hold_where_pictures_are_shorter_than_a_tick_of_many_and_of_unknown_cost() -> None:
    device = Device(weights={"a": 3.0})
    for number in range(2000):
        for tenant in "ab":
            (one,) = device.add(f"{tenant}{number}", tenant, stage="decoder", steps=1)
            one.cost_left = 0.0
    device.run(300)
    assert device.had["a"] == pytest.approx(3 * device.had["b"], rel=0.1)


def test_one_picture_after_the_other_is_no_way_to_get_more() -> None:
    device = Device()
    device.add("bulk", "a", num_images=1000)
    for number in range(30):
        device.add(f"next {number}", "b", shape=(24, 24))
        while f"next {number}" not in device.done:
            device.tick()
    assert device.had["a"] == pytest.approx(device.had["b"], rel=0.1)


def test_who_asked_for_little_for_long_cannot_take_it_all_later() -> None:
    device = Device()
    device.add("bulk", "a", num_images=3000)
    for number in range(60):
        device.add(f"trickle {number}", "b")
        device.run(25)
    device.had.clear()
    device.add("flood", "b", num_images=1000)
    device.run(300)
    assert device.had["a"] > 0.7 * device.had["b"]


# Nobody starves


def test_an_unimportant_picture_is_stepped_within_the_bound_however_many_important_ones_come() -> None:
    device = Device()
    device.add("unimportant", num_images=3, priority=-1)
    waits = dict.fromkeys(device.scheduler._queued, 0)
    number = 0
    while "unimportant" not in device.done:
        while len(device.scheduler) < 20:
            device.add(f"{(number := number + 1)}", steps=5)
        batch = device.tick()
        assert batch is not None
        waits = {
            one: 0 if one in batch.entries else waits.get(one, 0) + 1 for one in device.scheduler._queued
        }
        assert max(waits.values()) <= PATIENCE * (20 + 1)
    assert number > 100


def test_many_kinds_of_one_tenant_all_come_on() -> None:
    device = Device()
    for number in range(300):
        device.add(f"{number}", shape=(6, 6 + number))
    device.run(900)
    assert {steps_left[one] for one in device.scheduler._queued} <= set(range(15, 19))


# Alone


def test_one_that_must_be_alone_waits_for_those_begun_and_the_others_for_it() -> None:
    device = Device()
    device.add("begun", steps=3)
    device.run(1)
    device.add("early")
    device.add("alone", is_alone=True)
    device.add("late")
    device.run()
    order = [set(jobs(batch)) for batch in device.batches]
    assert order == [{"begun"}] * 13 + [{"alone"}] * 30 + [{"early", "late"}] * 30


def test_one_after_the_other_is_alone() -> None:
    device = Device()
    device.add("first", is_alone=True, num_images=2, steps=2)
    device.add("second", is_alone=True, steps=2)
    device.run()
    assert all(len(batch.entries) == 1 for batch in device.batches)
    assert [jobs(batch)[0] for batch in device.batches] == ["first"] * 24 + ["second"] * 12


def test_those_held_back_can_be_cancelled_and_are_let_go_when_the_lone_one_is() -> None:
    device = Device()
    (alone,) = device.add("alone", is_alone=True)
    held, other = *device.add("held"), *device.add("other")
    assert jobs(device.tick()) == ["alone"]
    device.scheduler.remove(held)
    device.scheduler.remove(alone)
    assert jobs(device.tick()) == ["other"]
    device.scheduler.remove(other)
    assert device.tick() is None


# Cost and soundness of a decision


@pytest.mark.parametrize(("num_tenants", "num_shapes"), [(1, 2500), (10, 100), (10_000, 1)])
def test_a_decision_among_ten_thousand_takes_few_steps(num_tenants: int, num_shapes: int) -> None:
    scheduler = Scheduler(lambda key: CAP, {})
    for number in range(10_000):
        shape = (6, 6 + number % num_shapes)
        scheduler.add(entry(f"{number}", f"{number % num_tenants}", arrived=number, shape=shape))
    calls = [_calls_of_next_tick(scheduler) for _ in range(PATIENCE + 1)]
    assert sum(calls) / len(calls) <= 1000
    assert max(calls) <= 1500 or num_tenants > 10  # a heap with all of them is put in order now and then


def _calls_of_next_tick(scheduler: Scheduler) -> int:
    with cProfile.Profile() as profile:
        batch = scheduler.next(0.0)
        assert batch is not None
        scheduler.stepped(batch, 1.0)
    return sum(function.callcount for function in profile.getstats())


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_and_goes_batches_are_sound(seed: int) -> None:
    chance = random.Random(seed)
    scheduler = Scheduler(lambda key: 5, {"x": 2.0})
    aboard: set[Entry] = set()
    for number in range(400):
        if chance.random() < 0.5:
            one = entry(
                f"{number}",
                chance.choice("xyz"),
                stage=chance.choice(["prior", "decoder"]),
                rows=chance.choice([1, 2]),
                priority=chance.randrange(2),
                deadline=chance.choice([None, 30.0]),
                is_alone=chance.random() < 0.02,
            )
            aboard.add(one)
            scheduler.add(one)
        if aboard and chance.random() < 0.4:
            scheduler.remove(gone := chance.choice(sorted(aboard, key=lambda one: one.job)))
            aboard.remove(gone)
        batch = scheduler.next(float(number))
        assert (batch is None) == (not aboard)
        assert len(scheduler) == len(aboard)
        if batch is not None:
            assert len(set(batch.entries)) == len(batch.entries)
            assert set(batch.entries) <= aboard
            assert {one.key for one in batch.entries} == {batch.key}
            assert sum(one.rows for one in batch.entries) == batch.rows <= 5
            assert len(batch.entries) == 1 or not any(one.is_alone for one in batch.entries)
            scheduler.stepped(batch, chance.random())
