from app.engine.caps import Caps
from app.engine.profile import Profile
from app.engine.scheduler import BatchKey

PROFILE: Profile = {
    "prior:6x6": {rows: 0.01 + 0.001 * rows for rows in (1, 2, 4, 8, 16, 32)},
    "decoder:64x64": {1: 0.014, 2: 0.021, 4: 0.038, 8: 0.068},
    "decode:64x64": {1: 0.03, 2: 0.05},
}
PRIOR = BatchKey("prior", (6, 6))


def test_a_profiled_shape_has_the_cap_that_was_found_best() -> None:
    caps = Caps(PROFILE)
    assert caps.cap(PRIOR) == 32
    assert caps.cap(BatchKey("decoder", (64, 64))) == 8
    assert caps.cap(BatchKey("decode", (64, 64))) == 2


def test_other_shapes_take_as_many_cells() -> None:
    caps = Caps(PROFILE)
    assert caps.cap(BatchKey("prior", (12, 6))) == 16
    assert caps.cap(BatchKey("prior", (3, 6))) == 64
    assert caps.cap(BatchKey("decoder", (128, 64))) == 4
    assert caps.cap(BatchKey("decoder", (72, 72))) == 6
    assert caps.cap(BatchKey("decoder", (68, 68))) == 7, "the nearest number, not the next smaller one"
    assert caps.cap(BatchKey("decoder", (1024, 1024))) == 1


def test_the_nearest_profiled_shape_counts() -> None:
    caps = Caps({"prior:6x6": {1: 1.0, 2: 1.0, 4: 1.0}, "prior:24x24": {1: 1.0, 2: 2.0}})
    assert caps.cap(BatchKey("prior", (8, 8))) == 2
    assert caps.cap(BatchKey("prior", (24, 20))) == 1


def test_a_bound_is_never_exceeded() -> None:
    assert Caps(PROFILE, max_rows=12).cap(PRIOR) == 12
    assert Caps(PROFILE, max_rows=1).cap(BatchKey("decoder", (128, 128))) == 1


def test_the_largest_cap_is_of_a_profiled_shape_and_within_the_bound() -> None:
    assert Caps(PROFILE).largest == 32
    assert Caps(PROFILE, max_rows=12).largest == 12


def test_a_halved_cap_stays_halved_for_that_key_alone() -> None:
    caps = Caps(PROFILE)
    for expected in (16, 8, 4, 2, 1, 1):
        caps.halve(PRIOR)
        assert caps.cap(PRIOR) == expected
    assert caps.cap(BatchKey("prior", (6, 6), "fp32")) == 32
