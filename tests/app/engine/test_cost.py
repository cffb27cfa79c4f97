"""Predicted seconds of ticks, pictures and queues."""

import msgspec
import pytest

from app.engine.contract import Work
from app.engine.cost import (
    MAX_LINES,
    MAX_RETRY_SECONDS,
    CostModel,
    retry_after_seconds,
    work_of,
)
from app.engine.protocol import Observation
from app.engine.scheduler import BatchKey, Stage
from app.schemas import GenerationRequest

PRIOR = BatchKey("prior", (6, 6))


def request(**members: object) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {"prompt": "x", "width": 1024, "height": 1024, "seeds": (0,), **members}
    )


def tick(rows: int, seconds: float, *, key: BatchKey = PRIOR, cap: int = 16) -> Observation:
    height, width = key.shape
    return Observation(key.stage, f"{height}x{width}", rows, rows, seconds, cap, is_backlogged=False)


def taught(start: float, row: float, *, key: BatchKey = PRIOR, cap: int = 16) -> CostModel:
    """A model that has seen many ticks of a device which takes `start` and `row` for each row."""
    cost = CostModel()
    for number in range(300):
        rows = 1 + number % cap
        cost.learn(tick(rows, start + row * rows, key=key, cap=cap))
    return cost


def test_a_first_guess_is_about_five_seconds_for_a_default_picture() -> None:
    assert CostModel().alone(work_of(request())) == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize(("start", "row"), [(0.0, 0.01), (0.003, 0.0015), (0.5, 0.1), (2.0, 0.01)])
def test_it_learns_what_a_tick_takes_whatever_its_rows(start: float, row: float) -> None:
    cost = taught(start, row)
    for rows in (1, 2, 5, 16):
        assert cost.step_seconds(PRIOR, rows) == pytest.approx(start + row * rows, rel=0.1)


def test_a_single_tick_is_enough_for_a_first_idea_and_a_slower_device_is_noticed() -> None:
    cost = CostModel()
    cost.learn(tick(4, 0.01))
    assert cost.step_seconds(PRIOR, 4) == pytest.approx(0.01)
    assert 0.01 < cost.step_seconds(PRIOR, 8) <= 0.02
    for _ in range(60):
        cost.learn(tick(4, 0.03))
    assert cost.step_seconds(PRIOR, 4) == pytest.approx(0.03, rel=0.01)


def test_its_error_is_the_share_by_which_it_is_wrong_and_falls_as_it_learns() -> None:
    cost = CostModel()
    cost.learn(tick(4, 0.01))
    assert cost.error > 0.1
    for _ in range(100):
        cost.learn(tick(4, 0.01))
    assert cost.error < 0.01
    for number in range(200):
        cost.learn(tick(4, 0.008 if number % 2 else 0.012))
    assert 0.15 < cost.error < 0.3


def test_ticks_that_took_no_time_teach_nothing() -> None:
    cost = CostModel()
    cost.learn(tick(4, 0.0))
    assert cost.step_seconds(PRIOR, 4) == CostModel().step_seconds(PRIOR, 4)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_unknown_shapes_follow_a_power_law_between_known_ones(stage: Stage) -> None:
    cost = CostModel()
    for side in (8, 32):
        cost.learn_profile({f"{stage}:{side}x{side}": 1e-6 * side**3})
    between = cost.shared([Work(BatchKey(stage, (16, 16)), 1, 1)])
    assert between == pytest.approx(1e-6 * 16**3, rel=0.15)


def test_beyond_the_known_shapes_a_row_takes_as_long_as_it_has_cells() -> None:
    cost = taught(0.002, 0.001)
    assert cost.step_seconds(BatchKey("prior", (12, 12)), 1) == pytest.approx(0.002 + 4 * 0.001, rel=0.1)
    assert cost.step_seconds(BatchKey("prior", (3, 3)), 1) == pytest.approx(0.002 + 0.001 / 4, rel=0.1)


def test_a_profile_tells_the_price_of_a_row_in_a_full_batch() -> None:
    cost = CostModel()
    cost.learn_profile({"prior:24x24": 0.04, "decoder:256x256": 0.05, "decode:256x256": 0.06})
    assert cost.price(request()) == pytest.approx(20 * 2 * 0.04 + 10 * 0.05 + 0.06)
    cost.learn_profile({"prior:24x24": 0.08})
    assert cost.price(request()) == pytest.approx(20 * 2 * 0.08 + 10 * 0.05 + 0.06)


def test_full_batches_make_a_picture_cheaper_than_it_is_alone() -> None:
    cost = taught(0.004, 0.001)
    work = [Work(PRIOR, 2, 20)]
    assert cost.alone(work) == pytest.approx(20 * 0.006, rel=0.05)
    assert cost.shared(work) == pytest.approx(20 * 2 * 0.020 / 16, rel=0.05)


def test_the_price_grows_with_pictures_pixels_steps_and_guidance() -> None:
    price = CostModel().price
    assert price(request(seeds=(0, 1, 2))) == pytest.approx(3 * price(request()))
    assert price(request(width=512, height=512)) < 0.5 * price(request())
    assert price(request(prior_num_inference_steps=40)) > 1.4 * price(request())
    assert price(request(prior_guidance_scale=1.0)) < 0.8 * price(request())
    assert price(request(decoder_guidance_scale=2.0)) > 1.1 * price(request())


def test_a_model_that_draws_one_size_has_one_price_for_all_sizes() -> None:
    cost = CostModel()
    cost.drawn = (256, 256)
    assert cost.price(request(width=256, height=256)) == cost.price(request(width=2048, height=1024))


@pytest.mark.parametrize(
    ("width", "height", "prior", "decoder"),
    [(1024, 1024, (24, 24), (256, 256)), (256, 256, (6, 6), (64, 64)), (1536, 640, (15, 36), (160, 384))],
)
def test_requests_are_drawn_on_these_grids(
    width: int, height: int, prior: tuple[int, int], decoder: tuple[int, int]
) -> None:
    keys = [key for key, _, _ in work_of(request(width=width, height=height))]
    assert keys == [BatchKey("prior", prior), BatchKey("decoder", decoder), BatchKey("decode", decoder)]


def test_a_picture_is_there_when_those_before_it_are_but_never_sooner_than_alone() -> None:
    cost, one = CostModel(), request()
    alone, price = cost.alone(work_of(one)), cost.price(one)
    assert cost.eta_seconds(one, ahead_seconds=0, num_devices=1) == alone
    assert cost.eta_seconds(one, ahead_seconds=100, num_devices=4) == pytest.approx((100 + price) / 4)


def test_what_is_learned_survives_on_disk() -> None:
    cost = taught(0.004, 0.001)
    heir = CostModel()
    heir.restore(cost.snapshot())
    assert heir.step_seconds(PRIOR, 3) == cost.step_seconds(PRIOR, 3)
    assert heir.shared([Work(PRIOR, 2, 20)]) == cost.shared([Work(PRIOR, 2, 20)])


@pytest.mark.parametrize(
    "torn", [b"", b'{"prior"', b'{"prior":{"36":[1]}}', b'{"prior":{"36":[0,0,8]}}', b"[]"]
)
def test_a_torn_snapshot_is_refused_and_changes_nothing(torn: bytes) -> None:
    cost = taught(0.004, 0.001)
    before = cost.snapshot()
    with pytest.raises(msgspec.DecodeError):
        cost.restore(torn)
    assert cost.snapshot() == before


def test_it_remembers_the_shapes_seen_last_and_not_ever_more() -> None:
    cost = taught(0.004, 0.001)
    for side in range(1, 2 * MAX_LINES):
        cost.learn(tick(1, 0.01, key=BatchKey("prior", (1, 1000 + side))))
    assert len(msgspec.json.decode(cost.snapshot())["prior"]) == MAX_LINES


@pytest.mark.parametrize(
    ("queued_seconds", "num_devices", "seconds"),
    [(40, 1, 20), (40, 4, 5), (0, 1, 1), (0.3, 1000, 1), (1e9, 1, MAX_RETRY_SECONDS), (5, 0, 3)],
)
def test_a_full_queue_is_asked_again_when_half_of_it_is_done_but_within_a_minute(
    queued_seconds: float, num_devices: int, seconds: int
) -> None:
    assert retry_after_seconds(queued_seconds, num_devices) == seconds


def test_a_picture_to_start_from_saves_steps_and_an_interval_rows() -> None:
    cost = CostModel()
    picture = {"sha256": "0" * 64, "width": 64, "height": 64}
    prior, *rest = work_of(request(image=picture, strength=0.5))
    assert (prior.rows, prior.steps) == (2, 10)
    assert rest == work_of(request())[1:]
    assert [part.key.stage for part in work_of(request(image=picture, strength=0))] == ["decoder", "decode"]
    halved = request(guidance_interval=(0, 0.5))
    assert [(part.rows, part.steps) for part in work_of(halved)[:2]] == [(2, 10), (1, 10)]
    prices = [cost.price(request(image=picture, strength=s)) for s in (0, 0.3, 0.75, 1)]
    assert prices == sorted(set(prices))
    assert prices[-1] == cost.price(request())
