"""Sizes: what is allowed, on which grids it is drawn, and that it comes out exactly as asked for."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from app import schemas
from app.settings import Settings
from cascade import sizes
from cascade.errors import InvalidSetting
from cascade.sizes import MAX_PIXELS, NativeSizes, check_size, fit_to_size, plan_size

FULL = NativeSizes()
TINY = NativeSizes(((256, 256), (384, 256), (256, 384), (512, 256), (256, 512)), resamples=True)

sides = st.integers(8, 512).map(lambda eighths: eighths * 8)


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
        assert asked <= drawn < asked + 48  # at most a cell of Stage C, and what makes sides even
    assert not plan.resampled
    assert fit_to_size(Image.new("L", (plan.draw_width, plan.draw_height)), plan).size == (width, height)


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
        (513, 512, "width"),
        (512, 516, "height"),
        (0, 512, "width"),
        (-512, 512, "width"),
        (4096, 4096, "size"),
        (2056, 512, "size"),
        (256, 1032, "size"),
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
    assert schemas.SIDE_STEP == sizes.MULTIPLE
    assert schemas.MAX_ASPECT == sizes.MAX_ASPECT
    assert Settings.model_fields["max_pixels"].default == sizes.MAX_PIXELS


def test_the_limit_of_pixels_can_be_lowered() -> None:
    check_size(1024, 1024, max_pixels=1024 * 1024)
    with pytest.raises(InvalidSetting, match="1032x1024 has more than 1048576 pixels"):
        check_size(1032, 1024, max_pixels=1024 * 1024)


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
