"""Text to image with the real networks at tiny dimensions: settings, sizes, seeds, company, progress."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade.config import ScheduleConfig
from cascade.errors import FlawedResult, InvalidSetting
from cascade.pipeline import Cascade
from cascade.sizes import NativeSizes
from cascade.tasks.generation import GeneratedImage, Progress, generate
from cascade.tasks.picture import to_images
from cascade.tasks.settings import ImageSettings
from tests.cascade.small_models import WordEncoder, small_cascade

TINY = NativeSizes(((128, 128), (192, 128)), resamples=True)
QUICK: dict[str, Any] = {"width": 128, "height": 128, "steps": 3, "decoder_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return small_cascade()


def request(prompt: str = "a red circle", **settings: Any) -> ImageSettings:
    return ImageSettings(prompt=prompt, **(QUICK | settings))


def run(cascade: Cascade, requests: Sequence[ImageSettings]) -> list[list[GeneratedImage]]:
    steps = generate(cascade, requests)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return cast(list[list[GeneratedImage]], finished.value)


def one(cascade: Cascade, settings: ImageSettings) -> GeneratedImage:
    [[made]] = run(cascade, [settings])
    return made


def pixels(made: GeneratedImage) -> NDArray[np.int16]:
    return np.asarray(made.image).astype(np.int16)


def assert_same(made: GeneratedImage, other: GeneratedImage) -> None:
    """To the last bit, in fp32 on a CPU."""
    assert np.array_equal(pixels(made), pixels(other))


def test_pictures_are_not_flat_and_depend_on_every_setting(cascade: Cascade) -> None:
    longer: dict[str, Any] = {"steps": 6, "decoder_steps": 5}
    made = one(cascade, request(**longer))
    assert pixels(made).std() > 10
    changes: list[dict[str, Any]] = [
        {"prompt": "a blue star"},
        {"negative_prompt": "blurry"},
        {"seed": 8},
        {"steps": 7},
        {"guidance_scale": 6.0},
        {"guidance_scale": 1.0},
        {"decoder_steps": 6},
        {"decoder_guidance_scale": 1.5},
        {"preset": "diffusers"},
        {"sampler": "ddim"},
        {"sampler": "lcm"},
    ]
    for change in changes:
        other = one(cascade, request(**longer | change))
        assert np.abs(pixels(made) - pixels(other)).max() > 2, change
    only_decoder: dict[str, Any] = {"guidance_scale": 1.0, "decoder_guidance_scale": 8.0}
    plain, other = (
        one(cascade, request(**only_decoder, negative_prompt=negative)) for negative in ("", "a blue star")
    )
    assert np.abs(pixels(plain) - pixels(other)).max() > 2
    shared, fresh = (one(cascade, request(preset="diffusers", shares_generator=s)) for s in (True, False))
    assert np.abs(pixels(shared) - pixels(fresh)).max() > 2


def test_a_request_gives_the_same_picture_again(cascade: Cascade) -> None:
    assert np.array_equal(pixels(one(cascade, request())), pixels(one(cascade, request())))


def test_guidance_of_one_or_less_is_off(cascade: Cascade) -> None:
    off = one(cascade, request(guidance_scale=1.0, decoder_guidance_scale=0.0))
    for scale in (0.0, 0.5, 1):
        other = one(cascade, request(guidance_scale=scale, decoder_guidance_scale=scale, negative_prompt="x"))
        assert np.array_equal(pixels(off), pixels(other))


def test_pictures_of_one_request_use_the_following_seeds(cascade: Cascade) -> None:
    for preset in ("official", "diffusers"):
        [made] = run(cascade, [request(preset=preset, num_images=3, seed=2**32 - 2)])
        assert [picture.settings.seed for picture in made] == [2**32 - 2, 2**32 - 1, 0]
        for picture in made:
            assert picture.settings.num_images == 1
            assert_same(one(cascade, picture.settings), picture)


def test_requests_of_every_kind_share_a_batch_unnoticed(cascade: Cascade) -> None:
    requests = [
        request(),
        request("a blue star", seed=1, steps=5, decoder_steps=4, guidance_scale=7.5),
        request("two words", guidance_scale=0.0, decoder_guidance_scale=2.0, negative_prompt="blurry"),
        request("odd", preset="diffusers", sampler="ddim", seed=3, decoder_guidance_scale=1.1),
        request("wide", width=256, height=64, sampler="lcm", num_images=2),
    ]
    together = run(cascade, requests)
    assert [len(made) for made in together] == [1, 1, 1, 1, 2]
    for settings, made in zip(requests, together, strict=True):
        [alone] = run(cascade, [settings])
        for picture, other in zip(made, alone, strict=True):
            assert_same(picture, other)


@pytest.mark.parametrize("preset", ["official", "diffusers"])
@pytest.mark.parametrize("size", [(64, 64), (72, 64), (200, 104), (136, 264), (64, 256), (312, 184)])
def test_every_size_comes_out_exactly(cascade: Cascade, size: tuple[int, int], preset: str) -> None:
    made = one(cascade, request(width=size[0], height=size[1], preset=preset))
    assert made.image.size == size
    assert made.resampled_from is None
    assert (made.settings.width, made.settings.height) == size


def test_small_checkpoints_resample_and_say_so() -> None:
    cascade = small_cascade(TINY)
    native = one(cascade, replace(request(), width=None, height=None))
    assert native.image.size == (128, 128)
    assert native.resampled_from is None
    wide = one(cascade, request(width=768, height=512))
    assert wide.image.size == (768, 512)
    assert wide.resampled_from == (192, 128)


def test_settings_come_back_filled_in_and_give_the_picture_again(cascade: Cascade) -> None:
    made = one(cascade, request(seed=None))
    seed = made.settings.seed
    assert seed is not None
    assert 0 <= seed < 2**32
    assert np.array_equal(pixels(one(cascade, made.settings)), pixels(made))
    assert one(cascade, request(seed=None)).settings.seed != seed


def test_a_truncated_prompt_is_flagged(cascade: Cascade) -> None:
    assert not one(cascade, request("one two three four five six")).prompt_truncated
    assert one(cascade, request("one two three four five six seven")).prompt_truncated


def test_a_text_is_encoded_once_however_many_pictures_use_it() -> None:
    cascade = small_cascade()
    run(cascade, [request("a", num_images=2), request("b"), request("a", negative_prompt="b")])
    encoder = cast(WordEncoder, cascade.text_encoder)
    assert encoder.calls == [["a"], [""], ["b"]]  # each by itself, for Stage C and for Stage B


def test_the_decoder_may_have_a_text_encoder_of_its_own() -> None:
    cascade = small_cascade(decoder_text_encoder=WordEncoder())
    run(cascade, [request()])
    for encoder in (cascade.text_encoder, cascade.decoder_text_encoder):
        assert cast(WordEncoder, encoder).calls == [["a red circle"], [""]]


def test_progress_counts_every_step_and_shows_latents(cascade: Cascade) -> None:
    seen = list(generate(cascade, [request(num_images=2), request("x", steps=5, width=192, height=128)]))
    assert [(step.stage, step.step, step.steps) for step in seen] == [
        *(("prior", step, 3 + 5) for step in range(1, 9)),
        *(("decoder", step, 2 + 2) for step in range(1, 5)),
        ("decode", 2, 3),
        ("decode", 3, 3),
    ]
    shapes = [None if step.latents is None else tuple(step.latents.shape) for step in seen]
    assert shapes == [(2, 16, 3, 3)] * 3 + [(1, 16, 3, 5)] * 5 + [None] * 6


def test_the_caller_sees_every_step_and_may_stop(cascade: Cascade) -> None:
    class StopRun(Exception):
        pass

    seen: list[Progress] = []

    def watch(step: Progress) -> None:
        seen.append(step)
        if step.stage == "decoder":
            raise StopRun

    with pytest.raises(StopRun):
        cascade.text_to_image("a red circle", progress=watch, **QUICK)
    assert [step.stage for step in seen] == ["prior"] * 3 + ["decoder"]
    assert len(cascade.text_to_image("a red circle", **QUICK)) == 1


def test_everything_runs_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = small_cascade()
    seen: list[str] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            assert torch.is_inference_mode_enabled(), name
            return original(*arguments, **options)

        return call

    for network, name in (
        (cascade.stage_c, "prepare"),
        (cascade.stage_b, "forward"),
        (cascade.stage_a, "decode"),
    ):
        monkeypatch.setattr(network, name, watched(name, getattr(network, name)))
    one(cascade, request())
    assert set(seen) == {"prepare", "forward", "decode"}


def test_a_generator_between_two_steps_leaves_gradients_on(cascade: Cascade) -> None:
    steps = generate(cascade, [request()])
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()


@pytest.mark.parametrize("preset", ["official", "diffusers"])
def test_a_gentler_clamp_of_the_checkpoint_is_used(preset: str) -> None:
    gentle = ScheduleConfig(clamp_min=0.02)
    usual, clamped = small_cascade(), small_cascade(prior_schedule=gentle, decoder_schedule=gentle)
    settings = request(preset=preset)
    assert np.abs(pixels(one(usual, settings)) - pixels(one(clamped, settings))).max() > 2


def test_bfloat16_weights_work() -> None:
    cascade = small_cascade(dtype=torch.bfloat16)
    for network in (cascade.stage_a, cascade.stage_b, cascade.stage_c):
        network.to(torch.bfloat16)
    made = one(cascade, request(decoder_guidance_scale=1.5))
    assert pixels(made).std() > 10


@pytest.mark.parametrize(
    ("scale_factor", "stated", "official", "diffusers"),
    [
        (0.43, None, 0.43, 0.3764),  # the original files, which state nothing
        (0.3764, None, 0.43, 0.3764),  # the folder of the diffusers repository
        (0.43, 0.43, 0.43, 0.43),  # a folder whose owner put the official constant in
        (0.9, None, 0.9, 0.9),  # a checkpoint with a constant of its own
    ],
)
def test_scale_factor_of_each_preset(
    cascade: Cascade, scale_factor: float, stated: float | None, official: float, diffusers: float
) -> None:
    config = replace(cascade.stage_a.config, scale_factor=scale_factor)
    changed = small_cascade(stated_scale_factor=stated)
    changed.stage_a.config = config
    assert changed.scale_factor("official") == official
    assert changed.scale_factor("diffusers") == diffusers


def test_pixels_become_8_bit_pictures() -> None:
    values = (
        torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 2, 6)
    )
    [image] = to_images(values)
    assert image.size == (6, 2)
    assert image.mode == "RGB"
    assert np.asarray(image)[1, :, 2].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"prompt": ""}, "prompt", "blank"),
        ({"prompt": " \n\t"}, "prompt", "blank"),
        ({"prompt": "x" * 100_000}, "prompt", "32000"),
        ({"prompt": None}, "prompt", "text"),
        ({"negative_prompt": "x" * 32_001}, "negative_prompt", "32000"),
        ({"width": 60}, "width", "whole number from 64 to 4096"),
        ({"width": 4096, "height": 4096}, "size", "4194304"),
        ({"num_images": 0}, "num_images", "1 to 10"),
        ({"num_images": 11}, "num_images", "1 to 10"),
        ({"seed": -1}, "seed", "0 to 4294967295"),
        ({"seed": 2**32}, "seed", "0 to 4294967295"),
        ({"seed": 1.5}, "seed", "whole"),
        ({"steps": 0}, "steps", "1 to 100"),
        ({"steps": 101}, "steps", "1 to 100"),
        ({"steps": True}, "steps", "whole"),
        ({"guidance_scale": -0.1}, "guidance_scale", "0 to 20"),
        ({"guidance_scale": 20.5}, "guidance_scale", "0 to 20"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "0 to 20"),
        ({"guidance_scale": "4"}, "guidance_scale", "number"),
        ({"decoder_steps": 61}, "decoder_steps", "1 to 60"),
        ({"decoder_guidance_scale": 10.5}, "decoder_guidance_scale", "0 to 10"),
        ({"preset": "comfyui"}, "preset", "official, diffusers"),
        ({"sampler": "euler"}, "sampler", "ddpm, ddim, lcm"),
        ({"sampler": ["ddpm"]}, "sampler", "ddpm, ddim, lcm"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change: dict[str, Any], field: str, allowed: str) -> None:
    settings = {"prompt": "a red circle", **QUICK} | change
    with pytest.raises(InvalidSetting, match=f"^{field}: ") as caught:
        ImageSettings(**settings)
    assert caught.value.field == field
    assert allowed in caught.value.message
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_half_a_character_is_refused_and_a_whole_one_is_not(field: str) -> None:
    request(**{field: "caf\u00e9 \U0001f600 \0"})
    with pytest.raises(InvalidSetting, match=f"^{field}: must be valid Unicode text$"):
        request(**{field: "a \ud800 circle"})


@pytest.mark.parametrize("field", ["width", "height"])
@pytest.mark.parametrize("side", [63, 5000, True])
def test_one_side_alone_is_checked_without_a_checkpoint(field: str, side: int) -> None:
    sides: dict[str, Any] = {"width": None, "height": None, field: side}
    with pytest.raises(InvalidSetting, match=f"^{field}: must be a whole number from 64 to 4096"):
        request(**sides)


def test_one_side_alone_is_checked_before_anything_is_computed(cascade: Cascade) -> None:
    with pytest.raises(InvalidSetting, match=r"^size: 64x1024"):
        cascade.text_to_image("a red circle", width=64)


def test_a_picture_is_a_pillow_image(cascade: Cascade) -> None:
    [made] = cascade.text_to_image("a red circle", **QUICK)
    assert isinstance(made.image, Image.Image)
    assert made.image.mode == "RGB"


@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_what_cannot_be_a_picture_is_an_error(stage: str) -> None:
    cascade = small_cascade()
    with torch.no_grad():
        getattr(cascade, stage).clf[1].bias.fill_(float("nan"))
    letter = stage[-1].upper()
    with pytest.raises(FlawedResult, match=f"latents of Stage {letter} are not finite"):
        one(cascade, request())


@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_what_failed_in_bf16_is_made_again_in_fp32(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = small_cascade(dtype=torch.bfloat16)
    for network in (cascade.stage_a, cascade.stage_b, cascade.stage_c):
        network.to(torch.bfloat16)
    broken = getattr(cascade, stage)
    original = type(broken).forward

    def forward(network: Any, *inputs: Any) -> Tensor:
        noise = original(network, *inputs)
        return noise * float("nan") if network is broken else noise

    monkeypatch.setattr(type(broken), "forward", forward)
    assert pixels(one(cascade, request())).std() > 1
