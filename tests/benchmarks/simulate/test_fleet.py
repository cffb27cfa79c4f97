"""The simulated devices, where it is known what must come out."""

import random

import pytest

from tests.benchmarks.simulate.fleet import Fleet, OneByOne, Picture, Speed, Together, draw, poisson
from tests.benchmarks.simulate.scenarios import jain, percentile

PROFILE = {
    "prior:6x6": {1: 0.5, 2: 0.6, 4: 0.8},
    "decoder:64x64": {1: 1.0, 2: 1.5},
    "decode:64x64": {1: 0.25},
}


@pytest.fixture
def speed() -> Speed:
    return Speed(PROFILE)


def together(speed: Speed, num_devices: int = 1) -> Fleet:
    return Together(speed, num_devices, room=8)


def test_ticks_take_what_was_measured_and_between_it_straight_lines(speed: Speed) -> None:
    assert speed.caps == {"prior": 4, "decoder": 2, "decode": 1}
    assert [speed.tick("prior", rows) for rows in (2, 3, 4, 6)] == pytest.approx([0.6, 0.7, 0.8, 1.4])


@pytest.mark.parametrize("kind", ["together", "one by one"])
def test_a_lone_picture_takes_as_long_as_it_takes_alone(speed: Speed, kind: str) -> None:
    picture = Picture("a", 3.0, prior_steps=20, decoder_steps=10, rows=2)
    fleet = together(speed) if kind == "together" else OneByOne(speed, 1)
    fleet.run([picture])
    assert picture.done - 3.0 == pytest.approx(20 * 0.6 + 10 * 1.0 + 0.25) == picture.alone(speed)
    assert fleet.busy == pytest.approx(22.25)


def test_two_pictures_together_share_their_ticks_and_one_by_one_they_do_not(speed: Speed) -> None:
    pictures = [Picture("a", 0.0, 20, 10, 2) for _ in range(2)]
    together(speed).run(pictures)
    assert max(picture.done for picture in pictures) <= 21 * 0.8 + 11 * 1.5 + 2 * 0.25
    OneByOne(speed, 1).run(pictures)
    assert max(picture.done for picture in pictures) == pytest.approx(2 * pictures[0].alone(speed))


@pytest.mark.parametrize("num_devices", [1, 3])
def test_everybody_gets_a_picture_and_no_device_works_more_than_all_the_time(
    speed: Speed, num_devices: int
) -> None:
    pictures = list(poisson(random.Random(1), "a", 0.1 * num_devices, 50))
    for fleet in (together(speed, num_devices), OneByOne(speed, num_devices)):
        fleet.run(pictures)
        assert set(fleet.done) == set(pictures)
        assert all(picture.done > picture.arrived for picture in pictures)
        assert 0 < fleet.utilisation <= 1


def test_who_has_a_picture_may_want_another(speed: Speed) -> None:
    chance, fleet, left = random.Random(1), together(speed), iter(range(9))
    fleet.run(
        [draw(chance, "a", 0.0)],
        answer=lambda picture: None if next(left, None) is None else draw(chance, "a", picture.done),
    )
    assert len(fleet.done) == 10


def test_summaries() -> None:
    assert percentile(range(100), 0.95) == 95
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
