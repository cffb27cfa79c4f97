"""Predicted seconds of a job."""

import pytest

from app.engine.cost import FIRST_GUESS_SECONDS, CostModel
from app.schemas import GenerationRequest


def request(**members: object) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {"prompt": "x", "width": 64, "height": 64, "seeds": (0,), **members}
    )


def test_work_grows_with_pictures_pixels_steps_and_guidance() -> None:
    units = CostModel().units
    plain = units(request(prior_guidance_scale=1.0, decoder_num_inference_steps=20))
    assert units(request(prior_guidance_scale=1.0, decoder_num_inference_steps=20, seeds=(0, 1))) == 2 * plain
    assert units(request(prior_guidance_scale=1.0, decoder_num_inference_steps=20, width=128)) == 2 * plain
    assert units(request(prior_guidance_scale=4.0, decoder_num_inference_steps=20)) > 1.5 * plain
    assert units(request(prior_num_inference_steps=40, prior_guidance_scale=1.0)) > 1.4 * plain


def test_it_guesses_first_and_then_follows_what_it_sees() -> None:
    cost = CostModel()
    assert cost.seconds(100.0, num_jobs=2) == 2 * FIRST_GUESS_SECONDS
    cost.learn(10.0, 1.0)
    assert cost.seconds(100.0, num_jobs=2) == pytest.approx(10.0)
    for _ in range(50):
        cost.learn(10.0, 3.0)
    assert cost.seconds(100.0, num_jobs=2) == pytest.approx(30.0, rel=0.01)
