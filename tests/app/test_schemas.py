"""The checked request: what goes with what, how many steps it takes, which size a picture gives it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.schemas import GenerationRequest, PictureRef, check_size, fit_size
from cascade.sizes import nearest_size

PICTURE = PictureRef(sha256="0" * 64, width=64, height=64)


def request(**members: Any) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {"prompt": "x", "width": 64, "height": 64, "seeds": (1,), **members}
    )


@pytest.mark.parametrize(
    ("members", "steps"),
    [
        ({}, 20),
        ({"image": PICTURE}, 15),
        ({"image": PICTURE, "strength": 0.5}, 10),
        ({"image": PICTURE, "strength": 0.01}, 1),
        ({"image": PICTURE, "strength": 0}, 0),
        ({"image": PICTURE, "mask": PICTURE}, 20),
        ({"image": PICTURE, "anchor": "left"}, 20),
        ({"image": PICTURE, "mask": PICTURE, "strength": 0.5}, 10),
        ({"image": PICTURE, "strength": 0.29, "prior_num_inference_steps": 100}, 29),
        ({"image_prompts": ({"image": PICTURE},)}, 20),
    ],
)
def test_the_steps_of_stage_c_follow_the_strength(members: dict[str, Any], steps: int) -> None:
    assert request(**members).prior_steps == steps


def test_guided_steps_are_those_in_the_interval() -> None:
    assert request().guided_steps == 20
    assert request(prior_guidance_scale=1).guided_steps == 0
    assert request(guidance_interval=(0.25, 0.5)).guided_steps == 5
    assert request(image=PICTURE, strength=0.5, guidance_interval=(0, 0.5)).guided_steps == 5


@pytest.mark.parametrize("member", ["mask", "strength", "anchor", "feather"])
def test_members_that_need_an_image(member: str) -> None:
    value = {"mask": PICTURE, "strength": 0.5, "anchor": "left", "feather": 1}[member]
    with pytest.raises(ValidationError, match=f"{member} needs image"):
        request(**{member: value})
    request(image=PICTURE, **{member: value})


def test_requests_stored_before_there_were_pictures_are_read() -> None:
    old = '{"prompt":"x","width":64,"height":64,"seeds":[1]}'
    assert GenerationRequest.model_validate_json(old) == request()


def test_pictures_are_named_once_each() -> None:
    other = PictureRef(sha256="1" * 64, width=8, height=8)
    whole = request(
        image=PICTURE,
        mask=PICTURE,
        image_prompts=({"image": other},),
        control={"type": "canny", "image": PICTURE},
    )
    assert whole.input_names == {"0" * 64, "1" * 64}
    assert GenerationRequest.model_validate_json(whole.model_dump_json()) == whole


@given(st.integers(1, 50_000), st.integers(1, 50_000), st.sampled_from([64 * 64, 512 * 512, 4_194_304]))
def test_every_picture_gives_an_allowed_size(width: int, height: int, max_pixels: int) -> None:
    fitted = fit_size(width, height, max_pixels=max_pixels)
    check_size(*fitted, max_pixels=max_pixels, param="size")


@given(st.integers(1, 50_000), st.integers(1, 50_000), st.sampled_from([64 * 64, 4_194_304]))
def test_it_is_the_size_that_the_library_gives_it(width: int, height: int, max_pixels: int) -> None:
    fitted = fit_size(width, height, max_pixels=max_pixels, step=1)
    assert fitted == nearest_size(width, height, max_pixels)


@given(st.integers(8, 256), st.integers(8, 256))
def test_an_allowed_size_stays_as_it_is(columns: int, rows: int) -> None:
    width, height = 8 * columns, 8 * rows
    if max(width, height) <= 4 * min(width, height):
        assert fit_size(width, height, max_pixels=4_194_304) == (width, height)
