from collections.abc import Callable
from pathlib import Path

import pytest

from app.engine.profile import (
    Profile,
    best_rows,
    load_profile,
    measure,
    parse_shape,
    row_seconds,
    save_profile,
    shape_name,
)
from app.engine.scheduler import Stage
from app.errors import OutOfMemory

PROFILE: Profile = {
    "prior:6x6": {1: 0.004, 2: 0.005, 4: 0.008, 8: 0.0158},
    "decoder:64x64": {1: 0.014, 2: 0.021, 4: 0.038, 8: 0.08},
    "decode:64x64": {1: 0.03, 2: 0.06},
}


def line(start: float, row: float) -> Callable[[Stage, int], float]:
    return lambda _, rows: start + row * rows


def tried(
    seconds: Callable[[Stage, int], float],
    *,
    max_rows: int = 64,
    has_room: Callable[[], bool] = lambda: True,
) -> dict[Stage, list[int]]:
    return {stage: list(rows) for stage, rows in measure(seconds, has_room, max_rows).items()}


def test_rows_are_doubled_until_they_bring_nothing() -> None:
    # Twice the rows of r gain (1 + r) * 2 / (1 + 2 r): 1.11 with 4 rows, 1.06 with 8.
    assert tried(line(1e-3, 1e-3))["prior"] == [1, 2, 4, 8, 16]
    assert tried(line(0, 1e-3))["prior"] == [1, 2]
    assert tried(line(3, 1e-6))["decoder"] == [1], "longer steps would be too long to wait for"


def test_a_step_that_something_else_slowed_down_is_measured_again() -> None:
    slow = iter([1e-3])

    def seconds(stage: Stage, rows: int) -> float:
        return 1e-3 + 1e-3 * rows + (next(slow, 0.0) if (stage, rows) == ("prior", 2) else 0.0)

    measured = measure(seconds, lambda: True, 64)["prior"]
    assert measured == pytest.approx({rows: 1e-3 + 1e-3 * rows for rows in (1, 2, 4, 8, 16)})


def test_a_smaller_step_that_something_else_slowed_down_makes_no_larger_one_worthwhile() -> None:
    slow = iter([1.0])

    def seconds(stage: Stage, rows: int) -> float:
        return 0.1 * rows + (next(slow, 0.0) if (stage, rows) == ("decoder", 1) else 0.0)

    measured = measure(seconds, lambda: True, 64)["decoder"]
    assert measured == pytest.approx({1: 0.1, 2: 0.2})
    assert best_rows(measured) == 1


def test_rows_stop_at_the_bound_and_decoding_at_two_pictures() -> None:
    assert tried(line(1e-3, 1e-6), max_rows=8) == {
        "prior": [1, 2, 4, 8],
        "decoder": [1, 2, 4, 8],
        "decode": [1, 2],
    }
    assert tried(line(1e-3, 1e-6), max_rows=1)["prior"] == [1]


def test_rows_stop_where_memory_ends() -> None:
    assert tried(line(1e-3, 1e-6), has_room=lambda: False)["prior"] == [1]

    def short(stage: Stage, rows: int) -> float:
        if stage == "decoder" and rows > 2:
            raise OutOfMemory("no more")
        return 1e-3

    assert tried(short, max_rows=8)["prior"] == [1, 2, 4, 8]
    assert tried(short, max_rows=8)["decoder"] == [1, 2]


def test_a_picture_that_does_not_fit_alone_is_an_error() -> None:
    def none(_: Stage, rows: int) -> float:
        raise OutOfMemory("none at all")

    with pytest.raises(OutOfMemory):
        tried(none)


def test_the_best_rows_are_the_last_that_are_worth_it() -> None:
    assert best_rows(PROFILE["prior:6x6"]) == 4
    assert best_rows(PROFILE["decoder:64x64"]) == 4
    assert best_rows(PROFILE["decode:64x64"]) == 1
    assert row_seconds(PROFILE) == {
        "prior:6x6": 0.002,
        "decoder:64x64": 0.0095,
        "decode:64x64": 0.03,
    }


def test_shapes_have_names() -> None:
    assert shape_name("prior", (24, 36)) == "prior:24x36"
    assert parse_shape("prior:24x36") == ("prior", 24, 36)


def test_a_profile_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "profile.json"
    assert load_profile(path) is None
    save_profile(path, PROFILE)
    assert load_profile(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b'{"prior:6x6": {"1": "soon"}}', b'{"prior:6x6": {"1": 0.5}}',
     b'{"prior:6x6": {"1": 1}, "decoder:6x6": {"2": 1}, "decode:6x6": {"1": 1}}'],
)  # fmt: skip
def test_a_profile_that_makes_no_sense_is_measured_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    assert load_profile(path) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    save_profile(tmp_path / "cache" / "profile.json", PROFILE)
    assert load_profile(tmp_path / "cache" / "profile.json") is None
