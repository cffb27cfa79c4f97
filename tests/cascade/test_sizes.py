"""Sizes: what is allowed, on which grids it is drawn, and that it comes out exactly as asked for."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from app import schemas
from app.settings import Settings
from cascade import sizes
from cascade.errors import InvalidSetting
from cascade.sizes import (
    MAX_PIXELS,
    NativeSizes,
    check_size,
    fit_to_drawing,
    fit_to_size,
    plan_size,
    widen_edges,
)
from tests.cascade.small_models import small_cascade

FULL = NativeSizes()
TINY = NativeSizes(((256, 256), (384, 256), (256, 384), (512, 256), (256, 512)), resamples=True)

SIZES_OF_8 = 90_823  # counted from the rules: 64..4096, 1:4..4:1, 4 194 304 pixels; multiples of 8 alone

sides = st.integers(64, 4096)


@pytest.mark.parametrize(
    ("size", "prior_grid", "decoder_grid"),
    [
        ((512, 512), (12, 12), (128, 128)),
        ((768, 768), (18, 18), (192, 192)),
        ((1024, 1024), (24, 24), (256, 256)),
        ((1536, 1024), (24, 36), (256, 384)),
        ((1152, 896), (21, 27), (224, 288)),
        ((1536, 1536), (36, 36), (384, 384)),
        ((2048, 2048), (48, 48), (512, 512)),
        ((832, 1216), (29, 20), (310, 214)),  # not of 128: drawn larger, on even sides
    ],
)
def test_grids_are_those_of_the_published_table(
    size: tuple[int, int], prior_grid: tuple[int, int], decoder_grid: tuple[int, int]
) -> None:
    plan = plan_size(*size, FULL)
    assert (plan.prior_grid, plan.decoder_grid) == (prior_grid, decoder_grid)
    assert plan.resampled_from is None


@given(sides, sides)
def test_every_allowed_size_is_covered_by_its_drawing_and_cut_to_size(width: int, height: int) -> None:
    assume(width * height <= MAX_PIXELS and max(width, height) <= 4 * min(width, height))
    plan = plan_size(width, height, FULL)
    for drawn, asked, latents in zip(
        (plan.draw_height, plan.draw_width), (height, width), plan.decoder_grid, strict=True
    ):
        assert latents % 2 == 0
        assert asked <= drawn < asked + 52  # at most a cell of Stage C, and what makes sides even
    assert not plan.resampled
    assert fit_to_size(Image.new("L", (plan.draw_width, plan.draw_height)), plan).size == (width, height)


@pytest.mark.parametrize("native", [FULL, TINY], ids=["any size", "resampled"])
def test_each_size_in_steps_of_8_has_grids_that_cover_it(native: NativeSizes) -> None:
    count = 0
    for width in range(64, 4097, 8):
        lowest, highest = max(64, -(-width // 32) * 8), min(4096, 4 * width, MAX_PIXELS // width // 8 * 8)
        for height in range(lowest, highest + 1, 8):
            plan = plan_size(width, height, native)
            count += 1
            rows, columns = plan.decoder_grid
            assert (plan.width, plan.height, rows % 2, columns % 2) == (width, height, 0, 0)
            assert min(plan.prior_grid) >= 1
            assert plan.resampled or (4 * columns >= width and 4 * rows >= height)
    assert count == SIZES_OF_8


@pytest.mark.parametrize(
    ("size", "neighbour"),
    [
        ((64, 257), "aspect"),
        ((4096, 1025), "pixels"),
        ((63, 64), "width"),
        ((4097, 1024), "width"),
    ],
)
def test_what_lies_just_beyond_is_not_allowed(size: tuple[int, int], neighbour: str) -> None:
    with pytest.raises(InvalidSetting, match=neighbour):
        plan_size(*size, FULL)


@settings(max_examples=12)
@given(st.integers(64, 240), st.integers(64, 240))
def test_pictures_of_every_size_come_out_exactly(width: int, height: int) -> None:
    """Through all stages, where odd levels of Stage B lose a row or column on the way down."""
    assume(max(width, height) <= 4 * min(width, height))
    [drawn] = small_cascade().text_to_image(
        "a word", width=width, height=height, seed=1, steps=1, decoder_steps=1
    )
    assert drawn.image.size == (width, height)
    assert len(set(drawn.image.convert("L").tobytes())) > 10


@pytest.mark.parametrize("native", [FULL, TINY], ids=["any size", "resampled"])
@pytest.mark.parametrize("size", [(832, 576), (576, 832), (640, 384), (448, 440), (451, 333)])
def test_a_picture_fitted_to_its_drawing_is_cut_out_of_it_again(
    size: tuple[int, int], native: NativeSizes
) -> None:
    plan = plan_size(*size, native)
    picture = Image.radial_gradient("L").resize(size)
    drawn = fit_to_drawing(picture, plan)
    assert drawn.size == (plan.draw_width, plan.draw_height)
    difference = ImageChops.difference(fit_to_size(drawn, plan), picture).tobytes()
    assert max(difference) <= (8 if plan.resampled else 0)


def test_edges_are_repeated_around_a_picture() -> None:
    picture = Image.new("L", (2, 2))
    picture.putdata([1, 2, 3, 4])
    widened = widen_edges(picture, (5, 4), 2, 1)
    assert list(widened.tobytes()) == [*[1, 1, 1, 2, 2] * 2, *[3, 3, 3, 4, 4] * 2]
    assert widen_edges(picture, (2, 2), 0, 0) is picture


@settings(max_examples=15)
@given(sides, sides)
def test_small_checkpoints_draw_native_sizes_and_scale(width: int, height: int) -> None:
    assume(width * height <= MAX_PIXELS and max(width, height) <= 4 * min(width, height))
    plan = plan_size(width, height, TINY)
    drawn = (plan.draw_width, plan.draw_height)
    assert drawn in TINY.sizes
    assert plan.resampled_from == (None if drawn == (width, height) else drawn)
    assert fit_to_size(Image.new("L", drawn), plan).size == (width, height)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((1024, 1024), (256, 256)),
        ((1536, 1024), (384, 256)),
        ((64, 128), (256, 512)),
        ((300 * 8, 640), (512, 256)),
    ],
)
def test_the_nearest_aspect_ratio_is_drawn(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    plan = plan_size(*size, TINY)
    assert plan.resampled_from == drawn


def test_absent_sides_are_native() -> None:
    assert (plan_size(None, None, FULL).width, plan_size(None, None, FULL).height) == (1024, 1024)
    assert (plan_size(None, None, TINY).width, plan_size(None, None, TINY).height) == (256, 256)
    assert (plan_size(512, None, FULL).width, plan_size(512, None, FULL).height) == (512, 1024)


@pytest.mark.parametrize(
    ("width", "height", "field"),
    [
        (60, 512, "width"),
        (512, 4104, "height"),
        (513.5, 512, "width"),
        (512, 63, "height"),
        (0, 512, "width"),
        (-512, 512, "width"),
        (4096, 4096, "size"),
        (2049, 512, "size"),
        (256, 1025, "size"),
        (512.0, 512, "width"),
        (True, 512, "width"),
    ],
)
def test_other_sizes_are_refused_by_name(width: int, height: int, field: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        plan_size(width, height, FULL)
    assert caught.value.field == field


def test_the_server_has_the_same_limits() -> None:
    assert (schemas.MIN_SIDE, schemas.MAX_SIDE) == (sizes.MIN_SIDE, sizes.MAX_SIDE)
    assert schemas.MAX_ASPECT == sizes.MAX_ASPECT
    assert Settings.model_fields["max_pixels"].default == sizes.MAX_PIXELS


def test_the_limit_of_pixels_can_be_lowered() -> None:
    check_size(1024, 1024, max_pixels=1024 * 1024)
    with pytest.raises(InvalidSetting, match="1025x1024 has more than 1048576 pixels"):
        check_size(1025, 1024, max_pixels=1024 * 1024)


def test_the_centre_is_kept() -> None:
    plan = plan_size(832, 832, FULL)
    drawn = Image.new("L", (plan.draw_width, plan.draw_height))
    centre = (drawn.width // 2, drawn.height // 2)
    drawn.putpixel(centre, 255)
    cut = fit_to_size(drawn, plan)
    assert cut.getpixel((cut.width // 2, cut.height // 2)) == 255


def test_scaling_keeps_the_shapes() -> None:
    """A square stays square: the picture is scaled by one factor and cut, not stretched."""
    plan = plan_size(512, 384, TINY)
    assert plan.resampled_from == (384, 256)
    drawn = Image.new("L", (384, 256))
    drawn.paste(255, (160, 96, 224, 160))
    left, top, right, bottom = (
        fit_to_size(drawn, plan).point(lambda value: 255 * (value > 127)).getbbox() or (0,) * 4
    )
    assert right - left == bottom - top == 96
