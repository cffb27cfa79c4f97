"""Enlarged pictures and the small ones that they come from."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade.networks.controlnet import ControlNet
from cascade.pipeline import Cascade
from cascade.tasks.enlarging import keep_to_small
from cascade.tasks.settings import Control, ImageSettings
from cascade.training.scenes import Scene, Thing, render
from tests.cascade.networks.reference import randomized
from tests.cascade.tasks.seeing import seeing_cascade
from tests.cascade.tasks.test_control import CONFIGS
from tests.cascade.tasks.test_picture_tasks import QUICK, pixels, run

SIZE = (192, 128)
TRUE = Image.fromarray(
    render(
        Scene(*SIZE, "gray", (Thing("star", "yellow", 50, 60, 40.0), Thing("ring", "blue", 140, 70, 36.0)))
    )
)


def reduced(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.square(np.asarray(one, float) - np.asarray(other, float)).mean()))


def moved(image: Image.Image, pixels: int) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), pixels, axis=1))


def darker(image: Image.Image) -> Image.Image:
    return image.point(lambda value: int(0.9 * value))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("drawn", [TRUE, darker(TRUE), moved(TRUE, 5), Image.new("RGB", SIZE, "red")])
def test_whatever_was_drawn_it_is_the_small_picture_when_reduced(drawn: Image.Image, factor: int) -> None:
    small = reduced(TRUE, factor)
    assert drawn is TRUE or distance(reduced(drawn, factor), small) > 10
    assert distance(reduced(keep_to_small(drawn, small), factor), small) < 0.7


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_detail_is_kept_where_it_agrees_and_given_up_where_it_does_not(factor: int) -> None:
    small = reduced(TRUE, factor)
    smooth = small.resize(SIZE, Image.Resampling.BICUBIC)
    assert distance(keep_to_small(TRUE, small), TRUE) < 0.5
    assert distance(smooth, TRUE) > 2
    wrong = moved(TRUE, 20)
    assert distance(wrong, TRUE) > 40
    assert distance(keep_to_small(wrong, small), TRUE) < 1.2 * distance(smooth, TRUE)
    left, right = np.asarray(TRUE).copy(), np.asarray(TRUE)[:, 96:]
    left[:, :96] = np.asarray(wrong)[:, :96]
    half = keep_to_small(Image.fromarray(left), small)
    assert distance(half.crop((112, 0, *SIZE)), Image.fromarray(right).crop((16, 0, 96, 128))) < 0.5


def test_a_picture_that_was_not_enlarged_stays_as_it_was_drawn() -> None:
    drawn = darker(TRUE)
    for given in (TRUE, TRUE.resize((400, 300)), TRUE.resize((240, 128))):
        assert keep_to_small(drawn, given) is drawn


def test_of_a_small_picture_of_another_shape_the_middle_counts() -> None:
    wide = Image.new("RGB", (200, 64), "red")
    wide.paste(reduced(TRUE, 2), (52, 0))
    assert keep_to_small(darker(TRUE), wide).tobytes() == (
        keep_to_small(darker(TRUE), reduced(TRUE, 2)).tobytes()
    )


def test_what_is_transparent_in_a_small_picture_is_white() -> None:
    small = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    made = np.asarray(keep_to_small(darker(TRUE), small))
    assert abs(float(made.mean()) - 255) < 10


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    network = randomized(ControlNet(CONFIGS["super_resolution"]), seed=2)
    return seeing_cascade(controlnets={"super_resolution": network})


def enlarged(size: tuple[int, int], **changes: Any) -> ImageSettings:
    given = reduced(TRUE, 2).crop((0, 0, 64, 64))
    control = Control("super_resolution", given, **changes)
    return ImageSettings(prompt="a star", control=control, width=size[0], height=size[1], **QUICK)


@pytest.mark.parametrize("less", [{"scale": 0.0}, {"scale": 0.5}, {"start": 0.2}, {"end": 0.1}])
def test_what_is_asked_for_of_the_control_picture_is_not_undone(
    cascade: Cascade, less: dict[str, float]
) -> None:
    size = (128, 128)
    requests = [enlarged(size, **less, **said) for said in ({}, {"faithful": False}, {"faithful": True})]
    _, [plain, as_drawn, faithful] = run(cascade, *requests)
    assert np.array_equal(pixels(plain), pixels(as_drawn))
    assert not np.array_equal(pixels(plain), pixels(faithful))


def test_a_request_keeps_to_its_small_picture_alone_and_in_company(cascade: Cascade) -> None:
    requests = [enlarged((128, 128)), enlarged((128, 128), faithful=False), enlarged((256, 192))]
    _, [first, as_drawn, wide] = run(cascade, *requests)
    small = reduced(TRUE, 2).crop((0, 0, 64, 64))
    assert distance(reduced(first.image, 2), small) < 1
    assert distance(reduced(as_drawn.image, 2), small) > 20
    assert distance(reduced(wide.image, 4), small.crop((0, 8, 64, 56))) < 1
    for request, together in zip(requests, (first, as_drawn, wide), strict=True):
        _, [alone] = run(cascade, request)
        assert np.array_equal(pixels(alone), pixels(together))
    assert distance(Image.fromarray(pixels(first)), keep_to_small(as_drawn.image, small)) == 0
