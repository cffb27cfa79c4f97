"""What tenants have had, and whose turn it is."""

from dataclasses import dataclass, field
from math import inf

import pytest

from app.engine.fairness import Share, Shares, Turns


@dataclass(eq=False)
class Guest:
    """Somebody who waits."""

    served: float
    things: list[str] = field(default_factory=lambda: ["one"])

    def __len__(self) -> int:
        return len(self.things)


def shares_at(level: float) -> tuple[Shares, Share]:
    """Shares, and one that leads them at this level."""
    shares = Shares({"b": 2.0})
    leader = shares.of("leader")
    shares.arrive(leader, 0.0)
    shares.charge(leader, level, most=inf)
    shares.lead(leader)
    return shares, leader


def test_the_least_served_comes_first_and_those_who_are_equal_in_order_of_arrival() -> None:
    turns: Turns[Guest] = Turns()
    guests = [Guest(2.0), Guest(1.0), Guest(3.0), Guest(1.0)]
    for guest in guests:
        turns.enlist(guest)
    assert turns.first(3) == [guests[1], guests[3], guests[0]]
    assert turns.least() is guests[1]


def test_who_was_served_meanwhile_goes_behind() -> None:
    turns: Turns[Guest] = Turns()
    first, second = Guest(1.0), Guest(2.0)
    turns.enlist(first)
    turns.enlist(second)
    first.served = 3.0
    assert turns.first(5) == [second, first]


def test_who_has_nothing_left_is_gone_until_enlisted_again() -> None:
    turns: Turns[Guest] = Turns()
    first, second = Guest(1.0), Guest(2.0)
    turns.enlist(first)
    turns.enlist(second)
    first.things.clear()
    assert turns.first(5) == [second]
    first.things.append("more")
    turns.enlist(first)
    turns.enlist(first)
    assert turns.first(5) == [first, second]


def test_nobody_waits() -> None:
    turns: Turns[Guest] = Turns()
    assert turns.least() is None
    assert turns.first(3) == []


def test_weights_make_the_same_seconds_count_less() -> None:
    shares = Shares({"b": 2.0})
    for tenant, served in (("a", 6.0), ("b", 3.0)):
        share = shares.of(tenant)
        shares.arrive(share, 0.0)
        shares.charge(share, 6.0, most=inf)
        assert share.served == pytest.approx(served)
    assert shares.of("a") is shares.of("a")


def test_a_newcomer_starts_one_head_start_before_those_at_work() -> None:
    shares, _ = shares_at(100.0)
    newcomer, heavy = shares.of("new"), shares.of("b")
    shares.arrive(newcomer, 8.0)
    shares.arrive(heavy, 8.0)
    assert (newcomer.served, heavy.served) == (92.0, 96.0)


def test_who_comes_back_soon_has_no_second_head_start() -> None:
    shares, _ = shares_at(100.0)
    share = shares.of("again")
    shares.arrive(share, 8.0)
    shares.charge(share, 7.0, most=inf)
    shares.arrive(share, 8.0)
    assert share.served == 99.0


def test_nobody_gets_too_far_ahead_of_the_least_served() -> None:
    shares, leader = shares_at(100.0)
    for _ in range(10):
        shares.charge(leader, 5.0, most=20.0)
    assert leader.served == 120.0
    shares.charge(leader, 5.0, most=1.0)
    assert leader.served == 120.0
