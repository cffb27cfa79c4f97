"""Drawings in a studio, with the real networks at tiny dimensions: alone, in company, resumed, gone wrong."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cascade.errors import FlawedResult
from cascade.networks.stage_a import StageA
from cascade.networks.unet import Condition
from cascade.pipeline import Cascade
from cascade.sampling.denoise import Network
from cascade.tasks.drawing import Drawing, Studio
from cascade.tasks.picture import from_bytes, plan_pictures, to_bytes
from cascade.tasks.settings import ImageSettings
from tests.cascade.small_models import WordEncoder, small_cascade

QUICK: dict[str, Any] = {"width": 128, "height": 128, "steps": 3, "decoder_steps": 2, "seed": 7}
COMPANY: list[dict[str, Any]] = [
    {},
    {"prompt": "a blue star", "seed": 1, "steps": 5, "decoder_steps": 4, "guidance_scale": 7.5},
    {
        "prompt": "two words",
        "guidance_scale": 0.0,
        "decoder_guidance_scale": 2.0,
        "negative_prompt": "blurry",
    },
    {"prompt": "odd", "preset": "diffusers", "sampler": "ddim", "seed": 3, "decoder_guidance_scale": 1.1},
]


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return small_cascade()


def eager(models: Cascade) -> dict[str, Network[Condition]]:
    return {"prior": models.stage_c, "decoder": models.stage_b}


@pytest.fixture
def studio(cascade: Cascade) -> Studio:
    return Studio(cascade, eager(cascade))


def draw(studio: Studio, **settings: Any) -> Drawing:
    request = ImageSettings(**({"prompt": "a red circle"} | QUICK | settings))
    [picture] = plan_pictures(studio.models, request)
    drawing = Drawing(picture, studio.models)
    studio.begin(drawing)
    return drawing


def finish(studio: Studio, *drawings: Drawing, rows: int = 99) -> list[bytes]:
    """Step all of a stage together, whatever their step, until all are drawn."""
    for stage in ("prior", "decoder"):
        while active := [drawing for drawing in drawings if drawing.stage == stage]:
            studio.step(active, rows)
    return [studio.decode([drawing])[0]().tobytes() for drawing in drawings]


def test_a_drawing_becomes_what_the_library_makes(cascade: Cascade, studio: Studio) -> None:
    for settings in COMPANY:
        prompt = {"prompt": "a red circle"} | QUICK | settings
        [expected] = cascade.text_to_image(**prompt)
        [made] = finish(studio, draw(studio, **settings))
        assert made == expected.image.tobytes()
        assert np.frombuffer(made, np.uint8).std() > 5, "a flat picture would prove nothing"


@pytest.mark.parametrize("rows", [99, 3, 1])
def test_company_changes_not_a_bit(studio: Studio, rows: int) -> None:
    """In fp32 on a CPU, and with a single row per call on any device."""
    alone = [finish(studio, draw(studio, **settings)) for settings in COMPANY]
    together = [draw(studio, **settings) for settings in COMPANY]
    late = draw(studio, seed=9)
    studio.step([*together, late], rows)
    made = finish(studio, *together[1:], together[0], rows=rows)
    assert made == [picture for [picture] in [*alone[1:], alone[0]]]


def test_no_more_rows_than_allowed_are_stepped_at_once(cascade: Cascade) -> None:
    seen: list[int] = []

    def counting(values: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        seen.append(len(values))
        return cascade.stage_c(values, ratio, condition)

    studio = Studio(cascade, eager(cascade) | {"prior": counting})
    guided = [draw(studio, seed=seed) for seed in range(3)]
    for rows, expected in ((99, [6]), (4, [4, 2]), (1, [1] * 6)):
        seen.clear()
        studio.step(guided, rows)
        assert seen == expected


def test_kept_latents_of_stage_c_give_the_same_picture(studio: Studio) -> None:
    settings: dict[str, Any] = {"decoder_guidance_scale": 2.0, "preset": "diffusers"}
    whole = draw(studio, **settings)
    [expected] = finish(studio, whole)
    assert whole.semantic is not None
    kept = to_bytes(whole.semantic)
    [picture] = plan_pictures(studio.models, whole.picture.settings)
    resumed = Drawing(picture, studio.models)
    resumed.resume(from_bytes(kept, picture.prior_shape, torch.device("cpu")))
    studio.begin(resumed)
    assert resumed.stage == "decoder"
    assert finish(studio, resumed) == [expected]


def test_kept_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values"):
        from_bytes(bytes(8), (16, 3, 3), torch.device("cpu"))


def test_a_text_is_encoded_once_for_all_drawings_and_alone() -> None:
    studio = Studio(models := small_cascade(), eager(models))
    for settings in ({}, {"seed": 8}, {"negative_prompt": "a red circle"}, {"guidance_scale": 1.0}):
        finish(studio, draw(studio, **settings))
    assert cast(WordEncoder, models.text_encoder).calls == [["a red circle"], [""]]
    assert studio.texts.misses == 2
    assert studio.texts.hits > 8


def test_each_stage_may_have_a_text_encoder_of_its_own() -> None:
    models = small_cascade(decoder_text_encoder=WordEncoder())
    finish(studio := Studio(models, eager(models)), draw(studio))
    for encoder in (models.text_encoder, models.decoder_text_encoder):
        assert cast(WordEncoder, encoder).calls == [["a red circle"], [""]]


def test_conditions_are_joined_only_when_the_company_changes(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[int] = []
    original = Condition.cat

    def cat(conditions: Sequence[Condition]) -> Condition:
        joined.append(len(conditions))
        return original(conditions)

    monkeypatch.setattr(Condition, "cat", staticmethod(cat))
    first, second, third = (draw(studio, seed=seed, guidance_scale=1.0, steps=9) for seed in range(3))
    for company in ([first, second], [first, second], [first, second, third], [first, second]):
        studio.step(company, 99)
    assert joined == [2, 3]


def test_all_conditions_share_the_constants_of_their_network(studio: Studio) -> None:
    drawings = [draw(studio, seed=seed) for seed in (1, 2)]
    for drawing in drawings:
        while drawing.stage == "prior":
            studio.step([drawing], 99)
        studio.step([drawing], 99)
    samples = [drawing.sample for drawing in drawings]
    assert samples[0] is not None
    assert samples[1] is not None
    assert samples[0].guides.conditional.constants is samples[1].guides.conditional.constants


def test_a_failed_step_changes_nothing(cascade: Cascade) -> None:
    studio = Studio(cascade, eager(cascade))
    drawings = [draw(studio, seed=seed, guidance_scale=1.0) for seed in range(2)]
    expected = finish(studio, *(draw(studio, seed=seed, guidance_scale=1.0) for seed in range(2)))
    calls = 0

    def failing(values: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first row was stepped already
            raise RuntimeError("the device hiccups")
        return cascade.stage_c(values, ratio, condition)

    broken = Studio(cascade, eager(cascade) | {"prior": failing})
    with pytest.raises(RuntimeError, match="hiccups"):
        broken.step(drawings, 1)
    assert [drawing.sample and drawing.sample.step for drawing in drawings] == [0, 0]
    assert finish(studio, *drawings) == expected


def poisoned(network: Network[Condition], with_what: Callable[[Tensor], Tensor]) -> Network[Condition]:
    return lambda values, ratio, condition: with_what(network(values, ratio, condition))


@pytest.mark.parametrize("stage", ["prior", "decoder"])
@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (lambda noise: noise * float("nan"), "not finite"),
        (lambda noise: noise / 0.0, "not finite"),
    ],
)
def test_latents_that_are_no_picture_are_told(
    cascade: Cascade, stage: str, poison: Callable[[Tensor], Tensor], words: str
) -> None:
    networks = eager(cascade)
    studio = Studio(cascade, networks | {stage: poisoned(networks[stage], poison)})
    drawing = draw(studio)
    while drawing.stage in ("prior", stage):
        studio.step([drawing], 99)
        if drawing.stage == "decoder" and stage == "decoder":
            drawing.check()
    with pytest.raises(FlawedResult, match=f"Stage {'C' if stage == 'prior' else 'B'} are {words}"):
        drawing.check()


def test_latents_that_are_all_the_same_are_told(studio: Studio) -> None:
    drawing = draw(studio)
    drawing.resume(torch.full(drawing.picture.prior_shape, 0.25))
    with pytest.raises(FlawedResult, match="all the same"):
        drawing.check()


def test_pixels_that_are_no_picture_are_told(studio: Studio, cascade: Cascade) -> None:
    drawing = draw(studio)
    finish(studio, drawing)
    drawing.latents = torch.full(drawing.picture.decoder_shape, float("inf"))
    with pytest.raises(FlawedResult, match="pixels are not finite"):
        studio.decode([drawing])


def in_bf16() -> Cascade:
    cascade = small_cascade(dtype=torch.bfloat16)
    for network in (cascade.stage_a, cascade.stage_b, cascade.stage_c):
        network.to(torch.bfloat16)
    return cascade


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_stage_that_failed_in_bf16_is_made_again_in_fp32(stage: str) -> None:
    cascade = in_bf16()
    networks = eager(cascade)
    failing = poisoned(networks[stage], lambda noise: noise * float("nan"))
    studio = Studio(cascade, networks | {stage: failing})
    drawing, other = draw(studio), draw(studio, seed=8)
    for each in (drawing, other):
        while each.stage in ("prior", stage):
            studio.step([each], 99)
        with pytest.raises(FlawedResult):
            each.check()
        assert studio.retry_in_fp32(each)
    assert (drawing.stage, drawing.sample) == (stage, None)
    assert drawing.models is other.models, "one copy of the weights serves all"
    finish(studio, drawing, other)
    assert drawing.models is cascade, "the weights in fp32 go with the stage"
    drawing.check()
    assert studio.retry_in_fp32(drawing) is (stage == "prior"), "each stage has one second try"


def test_the_copy_in_fp32_is_gone_when_nobody_needs_it() -> None:
    cascade = in_bf16()
    studio = Studio(cascade, eager(cascade))
    drawing = draw(studio)
    while drawing.stage == "prior":
        studio.step([drawing], 99)
    assert studio.retry_in_fp32(drawing)
    assert len(studio._in_fp32) == 1
    studio.step([drawing], 99)
    weight = weakref.ref(drawing.models.stage_c.get_parameter("down_blocks.0.0.channelwise.0.weight"))
    assert weight() is not None
    del drawing
    assert len(studio._in_fp32) == 0
    assert weight() is None


def test_nothing_is_kept_of_a_drawing_that_is_given_up(studio: Studio) -> None:
    drawing = draw(studio)
    studio.step([drawing], 99)
    assert drawing.sample is not None
    latents = weakref.ref(drawing.sample.latents)
    studio.forget(drawing)
    del drawing
    gc.collect()
    assert latents() is None


def test_in_fp32_there_is_no_second_try(studio: Studio) -> None:
    drawing = draw(studio)
    finish(studio, drawing)
    assert not studio.retry_in_fp32(drawing)


def test_pixels_that_failed_in_bf16_are_made_again_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = in_bf16()
    studio = Studio(cascade, eager(cascade))
    drawing = draw(studio)
    finish(studio, drawing)
    original = StageA.decode

    def fail_in_bf16(stage_a: StageA, values: Tensor, scale_factor: float) -> Tensor:
        pixels = original(stage_a, values, scale_factor)
        return pixels * float("nan") if values.dtype is torch.bfloat16 else pixels

    monkeypatch.setattr(StageA, "decode", fail_in_bf16)
    [finished] = studio.decode([drawing])
    image = finished()
    assert np.asarray(image).std() > 5


def test_previews_show_what_stage_c_has_in_mind(cascade: Cascade) -> None:
    seen: list[Tensor] = []

    def previewer(clean: Tensor) -> Tensor:
        seen.append(clean)
        return torch.rand(1, 3, 24, 24)

    models = small_cascade(previewer=previewer)
    drawing = draw(studio := Studio(models, eager(models)))
    assert studio.preview(drawing) is None, "nothing was predicted yet"
    studio.step([drawing], 99)
    image = studio.preview(drawing)
    assert image is not None
    assert image.size == (24, 24)
    assert drawing.sample is not None
    assert torch.equal(seen[0][0], drawing.sample.clean)
    while drawing.stage == "prior":
        studio.step([drawing], 99)
    assert studio.preview(drawing) is None


def test_without_a_previewer_there_are_no_previews(studio: Studio) -> None:
    drawing = draw(studio)
    studio.step([drawing], 99)
    assert studio.preview(drawing) is None


def test_pictures_of_one_size_are_decoded_in_as_few_calls_as_memory_allows(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = [draw(studio, seed=seed) for seed in range(3)]
    expected = finish(studio, *drawings)
    chunks: list[int] = []
    original = studio.models.stage_a.decode

    def decode(values: Tensor, scale_factor: float) -> Tensor:
        chunks.append(len(values))
        return original(values, scale_factor=scale_factor)

    monkeypatch.setattr(studio.models.stage_a, "decode", decode)
    monkeypatch.setattr("cascade.tasks.picture.DECODE_PIXELS", 2 * 128 * 128)
    assert [finish_one().tobytes() for finish_one in studio.decode(drawings)] == expected
    assert chunks == [2, 1]
