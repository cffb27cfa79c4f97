"""The semantic code: written and read back."""

import numpy as np
import pytest

from cascade.training.code import (
    _SIMPLEX,
    _WHITENED,
    DEVIATION,
    MEAN,
    estimate_moments,
    grid_size,
    read_code,
    scene_code,
)
from cascade.training.scenes import NATIVE_SIZES, Scene, Thing, held_out_generator, sample_scene, sample_size


def scenes(count: int) -> list[Scene]:
    rng = held_out_generator(11)
    return [sample_scene(rng, sample_size(rng)) for _ in range(count)]


@pytest.mark.parametrize("size", NATIVE_SIZES)
def test_a_code_has_the_stage_c_grid_of_its_picture(size: tuple[int, int]) -> None:
    code = scene_code(sample_scene(np.random.default_rng(0), size))
    grid = tuple(-(-side * 100 // 4267) for side in reversed(size))
    assert code.shape == (16, *grid)
    assert grid_size(*size) == grid
    assert code.dtype == np.float32


def test_codes_read_back_exactly() -> None:
    for scene in scenes(150):
        read = read_code(scene_code(scene), (scene.width, scene.height))
        assert read.background == scene.background
        for seen, drawn in zip(read.in_order(), scene.in_order(), strict=True):
            assert (seen.shape, seen.colour) == (drawn.shape, drawn.colour)
            assert (seen.x, seen.y, seen.radius) == pytest.approx((drawn.x, drawn.y, drawn.radius), abs=1e-3)


def test_codes_read_back_through_noise() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(150):
        code = scene_code(scene)
        noisy = code + 0.3 * rng.standard_normal(code.shape)
        read = read_code(noisy.astype(np.float32), (scene.width, scene.height))
        assert read.background == scene.background
        assert [(t.shape, t.colour) for t in read.in_order()] == [
            (t.shape, t.colour) for t in scene.in_order()
        ]


def test_a_code_without_things_reads_as_an_empty_scene() -> None:
    assert read_code(scene_code(Scene(256, 256, "pink", ())), (256, 256)) == Scene(256, 256, "pink", ())


def test_the_stored_moments_are_those_of_training_scenes() -> None:
    rng = np.random.default_rng(1)
    mean, deviation = estimate_moments([sample_scene(rng, sample_size(rng)) for _ in range(1500)])
    # fifteen hundred scenes instead of twenty thousand
    np.testing.assert_allclose(mean, MEAN, atol=0.03)
    np.testing.assert_allclose(deviation, DEVIATION, atol=0.03)


def test_content_follows_the_formulas_at_a_node() -> None:
    scene = Scene(256, 256, "red", (Thing("star", "blue", 128, 128, 40),))
    raw = scene_code(scene) * DEVIATION[:, None, None] + MEAN[:, None, None]
    x = 4 + 0 * 248 / 5  # the first node's column: 84 pixels outside the box
    weight = (76.8 - (128 - x - 40)) / 28.8
    assert weight < 0
    assert raw[15, 0, 0] == pytest.approx(0, abs=1e-6)
    x = 4 + 1 * 248 / 5
    weight = min(1, (76.8 - (128 - x - 40)) / 28.8)
    assert raw[15, 1, 1] == pytest.approx(weight, abs=1e-6)
    assert raw[12, 1, 1] == pytest.approx((x - 128) / 64 * weight, abs=1e-5)
    assert raw[14, 1, 1] == pytest.approx((40 - 45) / 20 * weight, abs=1e-5)


def test_colours_are_white_and_shapes_equally_far_apart() -> None:
    np.testing.assert_allclose(_WHITENED.T @ _WHITENED / 10, np.eye(3), atol=1e-5)
    gram = _SIMPLEX @ _SIMPLEX.T
    np.testing.assert_allclose(gram, 7 * np.eye(7) - 1, atol=1e-5)
