"""Scenes and their pictures, against the published palette and geometry."""

import numpy as np
import pytest

from cascade.training.scenes import (
    COLOURS,
    NATIVE_SIZES,
    PALETTE,
    SHAPES,
    SQUARE_SIZE,
    Scene,
    Thing,
    held_out_generator,
    render,
    sample_scene,
    sample_size,
)

STAR_AREA = 5 * 1.05 * 0.46 * np.sin(np.pi / 5)
AREAS = {
    "circle": np.pi,
    "square": 1.72**2,
    "triangle": 1.76,
    "diamond": 2 * 0.78,
    "star": STAR_AREA,
    "ring": np.pi * (1 - 0.55**2),
    "cross": 4 * 0.68 - 0.68**2,
}


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, sample_size(rng)) for _ in range(count)]


def black_on_white(shape: str, x: float, y: float, radius: float) -> Scene:
    return Scene(256, 256, "white", (Thing(shape, "black", x, y, radius),))


def coverage(scene: Scene) -> np.ndarray:
    white, black = PALETTE["white"][0], PALETTE["black"][0]
    return (white - render(scene)[..., 0].astype(float)) / (white - black)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_a_shape_is_that_of_its_geometry(shape: str) -> None:
    area = coverage(black_on_white(shape, 120.3, 130.9, 60.2)).sum()
    assert area == pytest.approx(AREAS[shape] * 60.2**2, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_box_of_a_shape_is_that_of_its_geometry(shape: str) -> None:
    half_width, top, bottom = {
        "square": (0.86, -0.86, 0.86),
        "triangle": (1.0, -0.92, 0.84),
        "diamond": (0.78, -1.0, 1.0),
        "star": (1.05 * np.sin(0.4 * np.pi), 0.08 - 1.05, 0.08 + 1.05 * np.cos(0.2 * np.pi)),
    }.get(shape, (1.0, -1.0, 1.0))
    drawn = coverage(black_on_white(shape, 128, 128, 100)) > 0
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    # corners end in slivers thinner than a sample, hence two pixels
    assert rows[0] == pytest.approx(128 + 100 * top, abs=2)
    assert rows[-1] + 1 == pytest.approx(128 + 100 * bottom, abs=2)
    assert (columns[0], columns[-1] + 1) == pytest.approx(
        (128 - 100 * half_width, 128 + 100 * half_width), abs=2
    )


def test_pixels_are_means_of_four_by_four_samples() -> None:
    x, y, radius = 100.37, 99.81, 41.7
    samples = (np.arange(4 * 256) + 0.5) / 4
    is_inside = (samples[None, :] - x) ** 2 + (samples[:, None] - y) ** 2 < radius**2
    expected = is_inside.reshape(256, 4, 256, 4).mean((1, 3))
    drawn = coverage(black_on_white("circle", x, y, radius))
    assert np.abs(drawn - expected).max() < 1 / 227  # rounding to 8 bits


def test_things_keep_off_the_edges_and_off_each_other() -> None:
    for scene in scenes(500):
        for thing in scene.things:
            assert 1.05 * thing.radius <= min(thing.x, scene.width - thing.x)
            assert 1.05 * thing.radius <= min(thing.y, scene.height - thing.y)
        if len(scene.things) == 2:
            first, second = scene.things
            distance = max(abs(first.x - second.x), abs(first.y - second.y))
            assert distance > 1.05 * (first.radius + second.radius) + 8


def test_two_things_stand_at_27_percent_from_the_middle_in_every_arrangement() -> None:
    seen = set()
    for scene in scenes(2000):
        if len(scene.things) == 2:
            away = {
                (round(abs(t.x / scene.width - 0.5), 6), round(abs(t.y / scene.height - 0.5), 6))
                for t in scene.things
            }
            assert away == ({(0.0, 0.27)} if scene.is_stacked else {(0.27, 0.0)})
            seen.add((scene.width, scene.height, scene.is_stacked))
    assert len(seen) == 2 * len(NATIVE_SIZES)


def test_shares_of_numbers_places_and_sizes() -> None:
    drawn = scenes(4000)
    singles = [scene for scene in drawn if len(scene.things) == 1]
    assert len(singles) / len(drawn) == pytest.approx(0.55, abs=0.03)
    places = [scene.place(scene.things[0]) for scene in singles]
    assert places.count("centre") / len(places) == pytest.approx(0.5, abs=0.04)
    assert {*places} == {"centre", "left", "right", "top", "bottom"}
    assert {scene.size_word(scene.things[0]) for scene in singles} == {"small", "medium", "large"}
    pairs = [scene for scene in drawn if len(scene.things) == 2]
    assert {scene.size_word(thing) for scene in pairs for thing in scene.things} == {"small", "medium"}
    is_square = [(scene.width, scene.height) == SQUARE_SIZE for scene in drawn]
    assert np.mean(is_square) == pytest.approx(0.8, abs=0.03)


def test_all_colours_of_a_scene_differ_and_none_is_missing() -> None:
    drawn = scenes(500)
    for scene in drawn:
        colours = [scene.background, *(thing.colour for thing in scene.things)]
        assert len({*colours}) == len(colours)
    assert {scene.background for scene in drawn} == {*COLOURS}
    assert {(t.shape, t.colour) for s in scenes(3000) for t in s.things} == {
        (shape, colour) for shape in SHAPES for colour in COLOURS
    }


def test_colours_are_jittered_by_three_of_255_at_most() -> None:
    corners = [(render(scene)[0, 0].astype(int), PALETTE[scene.background]) for scene in scenes(100)]
    away = np.abs([corner - colour for corner, colour in corners])
    assert 2 <= away.max() <= 3


def test_the_same_generator_draws_the_same_scene_and_held_out_ones_differ() -> None:
    assert scenes(5, seed=3) == scenes(5, seed=3)
    rng = held_out_generator(3)
    assert [sample_scene(rng, sample_size(rng)) for _ in range(5)] != scenes(5, seed=3)


def test_order_is_from_left_to_right_and_from_top_to_bottom() -> None:
    left, right = Thing("star", "red", 60, 128, 30), Thing("ring", "blue", 196, 128, 30)
    assert Scene(256, 256, "white", (right, left)).in_order() == (left, right)
    top, bottom = Thing("star", "red", 128, 60, 30), Thing("ring", "blue", 128, 196, 30)
    assert Scene(256, 256, "white", (bottom, top)).in_order() == (top, bottom)
