"""The audit finds what a chaos run is there to find."""

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.audit import audit
from tests.chaos.client import Outcome, Way
from tests.chaos.faults import engine_points, server_points
from tests.chaos.orders import NUM_QUICK_ORDERS, SIZES, Order, all_orders

ORDERS = all_orders()
REFERENCES = {order.number: (f"digest {order.number}",) for order in ORDERS}


def outcome(number: int) -> Outcome:
    digests = REFERENCES[number]
    return Outcome(f"t{number}", ORDERS[number], Way.POLL, f"job_{number}", "succeeded", digests, 1.0)


def job(number: int, status: str = "succeeded", name: str | None = None) -> dict[str, Any]:
    return {"id": name or f"job_{number}", "status": status, "metadata": {"ticket": f"t{number}"}}


def test_all_is_well() -> None:
    assert audit([outcome(0), outcome(1)], [job(0), job(1)], REFERENCES).is_clean


def test_an_accepted_job_that_the_server_does_not_know_is_lost() -> None:
    assert audit([outcome(0), outcome(1)], [job(0)], REFERENCES).lost == ("t1",)


def test_a_job_that_did_not_succeed_is_lost() -> None:
    failed = replace(outcome(0), status="failed", digests=())
    found = audit([failed], [job(0, "failed")], REFERENCES)
    assert found.lost == ("t0",)
    assert "failed" in found.remarks[0]
    assert audit([outcome(0)], [job(0, "canceled")], REFERENCES).lost == ("t0",)


def test_one_ticket_with_two_jobs_is_a_duplicate() -> None:
    found = audit([outcome(0)], [job(0), job(0, name="job_copy")], REFERENCES)
    assert (found.duplicated, found.lost) == (("t0",), ())
    assert not found.is_clean


def test_a_job_that_never_ended_is_stuck_also_when_no_client_knows_it() -> None:
    assert audit([outcome(0)], [job(0), job(7, "running")], REFERENCES).stuck == ("t7",)


def test_other_pixels_are_different() -> None:
    other = replace(outcome(0), digests=("something else",))
    assert audit([other], [job(0)], REFERENCES).different == ("t0",)


def test_orders_differ_so_that_no_picture_passes_for_another() -> None:
    assert len({replace(order, number=0) for order in ORDERS}) == len(ORDERS)


@pytest.mark.parametrize("orders", [ORDERS, ORDERS[:NUM_QUICK_ORDERS]], ids=["full", "quick"])
def test_orders_are_of_every_kind(orders: list[Order]) -> None:
    assert {(order.width, order.height) for order in orders} == set(SIZES)
    assert {order.guidance_scale for order in orders} == {1.0, 4.0}
    assert {order.num_images for order in orders} == {1, 2}


def test_every_fault_point_has_its_scenario() -> None:
    assert server_points()
    assert engine_points()
