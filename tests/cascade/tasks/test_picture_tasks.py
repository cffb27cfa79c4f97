"""Tasks that begin with a picture: image to image, inpainting, image prompts; alone and in company."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade.errors import InvalidSetting
from cascade.networks.unet import Condition
from cascade.pipeline import Cascade
from cascade.sampling.denoise import Guides, Network
from cascade.sizes import NativeSizes, plan_size
from cascade.tasks.autoencode import DecodeSettings
from cascade.tasks.drawing import Drawing, Studio
from cascade.tasks.generation import GeneratedImage, Progress, generate
from cascade.tasks.inpainting import canvas_of, free_cells
from cascade.tasks.picture import begin_prior, encode_inputs, plan_pictures, prior_condition
from cascade.tasks.settings import Control, ImagePrompt, ImageSettings, LoRAUse
from tests.cascade.tasks.seeing import OneLoRA, box_mask, controlnet, scene, seeing_cascade

QUICK: dict[str, Any] = {"steps": 4, "decoder_steps": 2, "seed": 7}
SOURCE = scene()
MASK = box_mask(SOURCE.size, (44, 46, 84, 84))  # in the middle one of the 3x3 cells of Stage C
COMPANY: list[dict[str, Any]] = [
    {"prompt": "a red circle", "width": 128, "height": 128},
    {"prompt": "a blue star", "image": SOURCE, "strength": 0.6, "guidance_scale": 7.0},
    {"prompt": "two words", "image": SOURCE, "strength": 0.3, "preset": "diffusers", "seed": 3},
    {"prompt": "kept", "image": SOURCE, "strength": 0.0},
    {"prompt": "a hole", "image": SOURCE, "mask": MASK, "feather": 5, "decoder_guidance_scale": 1.5},
    {"image_prompts": (ImagePrompt(SOURCE), ImagePrompt(scene(seed=2), 0.5)), "width": 128, "height": 128},
    {"prompt": "both", "image_prompts": (ImagePrompt(SOURCE),), "width": 128, "height": 128, "steps": 5},
    {"prompt": "late", "guidance_interval": (0.25, 0.75), "width": 128, "height": 128, "seed": 9},
    {"prompt": "around", "image": SOURCE.crop((0, 0, 64, 96)), "anchor": "left", "width": 128, "height": 128},
]


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return seeing_cascade()


def pixels(made: GeneratedImage) -> NDArray[np.uint8]:
    return np.asarray(made.image)


def run(cascade: Cascade, *requests: ImageSettings) -> tuple[list[Progress], list[GeneratedImage]]:
    seen: list[Progress] = []
    steps = generate(cascade, requests)
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as finished:
            return seen, [image for images in finished.value for image in images]


def networks(cascade: Cascade) -> dict[str, Network[Condition]]:
    return {"prior": cascade.stage_c, "decoder": cascade.stage_b}


def draw(studio: Studio, settings: dict[str, Any]) -> Drawing:
    [picture] = plan_pictures(studio.models, ImageSettings(**(QUICK | settings)))
    drawing = Drawing(picture, studio.models)
    studio.begin(drawing)
    return drawing


def finish(studio: Studio, *drawings: Drawing, rows: int = 99) -> list[bytes]:
    for stage in ("prior", "decoder"):
        while active := [drawing for drawing in drawings if drawing.stage == stage]:
            studio.step(active, rows)
    return [studio.decode([drawing])[0]().tobytes() for drawing in drawings]


@pytest.mark.parametrize("rows", [99, 3, 1])
def test_tasks_of_every_kind_share_a_studio_to_the_last_bit(cascade: Cascade, rows: int) -> None:
    studio = Studio(cascade, networks(cascade))
    alone = [finish(studio, draw(studio, settings))[0] for settings in COMPANY]
    assert len(set(alone)) == len(alone)
    studio = Studio(cascade, networks(cascade))
    assert finish(studio, *(draw(studio, settings) for settings in COMPANY), rows=rows) == alone


@pytest.mark.parametrize("rows", [99, 3])
def test_controls_and_loras_share_a_studio_with_all_others_to_the_last_bit(rows: int) -> None:
    control = Control("canny", Image.effect_noise((128, 128), 90), start=0.0, end=0.5)
    use, size = (LoRAUse("any"),), {"width": 128, "height": 128}
    company: list[dict[str, Any]] = [
        {"prompt": "plain"} | size,
        {"prompt": "edges", "control": control} | size,
        {"prompt": "adapted", "loras": use, "image_prompts": (ImagePrompt(SOURCE),)} | size,
        {
            "prompt": "all",
            "image": SOURCE,
            "mask": MASK,
            "loras": use,
            "image_prompts": (ImagePrompt(SOURCE),),
        },
    ]
    bare = seeing_cascade()
    extras: dict[str, Any] = {
        "controlnets": {"canny": controlnet(1), "inpainting": controlnet(4)},
        "loras": OneLoRA(),
    }
    cascade = seeing_cascade(**extras)
    plain, studio = (Studio(each, networks(each)) for each in (bare, cascade))
    alone = [finish(studio, draw(studio, settings))[0] for settings in company]
    assert finish(studio, *(draw(studio, settings) for settings in company), rows=rows) == alone
    without = [
        finish(plain, draw(plain, settings | {"control": None, "loras": ()}))[0] for settings in company
    ]
    assert [made == other for made, other in zip(alone, without, strict=True)] == [True, False, False, False]


def test_the_inpainting_controlnet_is_used_unasked(cascade: Cascade) -> None:
    helped = seeing_cascade(controlnets={"inpainting": controlnet(4)})
    [plain], [made] = (each.inpaint(SOURCE, "a hole", MASK, **QUICK) for each in (cascade, helped))
    assert not np.array_equal(pixels(plain), pixels(made))
    [redrawn], [expected] = (each.image_to_image(SOURCE, "x", **QUICK) for each in (helped, cascade))
    assert np.array_equal(pixels(redrawn), pixels(expected)), "where nothing is masked it is not"


def test_tasks_of_every_kind_share_a_run_of_the_library_to_the_last_bit(cascade: Cascade) -> None:
    requests = [ImageSettings(**(QUICK | settings)) for settings in COMPANY]
    _, together = run(cascade, *requests)
    for request, made in zip(requests, together, strict=True):
        _, [alone] = run(cascade, request)
        assert np.array_equal(pixels(alone), pixels(made)), request.prompt
        assert pixels(made).std() > 5, "a flat picture would prove nothing"


def test_when_one_group_of_rows_fails_no_drawing_has_moved(cascade: Cascade) -> None:
    """Drawings with different numbers of tokens need two calls; the second one fails."""
    calls = 0

    def failing(values: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the device hiccups")
        return cascade.stage_c(values, ratio, condition)

    studio = Studio(cascade, networks(cascade) | {"prior": failing})
    drawings = [draw(studio, COMPANY[0]), draw(studio, COMPANY[5])]
    with pytest.raises(RuntimeError, match="hiccups"):
        studio.step(drawings, 99)
    assert [drawing.sample and drawing.sample.step for drawing in drawings] == [0, 0]
    assert calls == 2


def test_strength_0_is_the_reconstruction_and_takes_no_step_of_stage_c(cascade: Cascade) -> None:
    settings = ImageSettings(image=SOURCE, strength=0, **QUICK)
    seen, [made] = run(cascade, settings)
    assert {step.stage for step in seen} == {"decoder", "decode"}
    expected = cascade.reconstruct(SOURCE, DecodeSettings(seed=7, decoder_steps=2))
    assert np.array_equal(pixels(made), np.asarray(expected))


def test_strength_1_does_not_look_at_the_picture(cascade: Cascade) -> None:
    [made] = cascade.image_to_image(SOURCE, "a red circle", strength=1, **QUICK)
    [expected] = cascade.text_to_image("a red circle", width=128, height=128, **QUICK)
    assert np.array_equal(pixels(made), pixels(expected))


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(20, 0.3, 6), (20, 0.01, 1), (100, 0.29, 29), (10, 0.75, 7), (4, 1, 4)]
)
def test_a_share_of_the_steps_is_made(steps: int, strength: float, made: int) -> None:
    settings = ImageSettings(image=SOURCE, strength=strength, steps=steps)
    assert settings.prior_steps == made


@pytest.mark.parametrize("preset", ["official", "diffusers"])
def test_the_start_resembles_the_source_less_the_larger_strength_is(cascade: Cascade, preset: str) -> None:
    def likeness(strength: float, **more: Any) -> float:
        settings = ImageSettings(image=SOURCE, strength=strength, preset=preset, **QUICK, **more)
        [picture] = plan_pictures(cascade, settings)
        clean = torch.randn(picture.prior_shape, generator=torch.Generator().manual_seed(3))
        given = replace(encode_inputs(cascade, picture), semantic=clean)
        condition = prior_condition(cascade, cascade.text_encoder.encode([""]))
        sample = begin_prior(cascade, picture, Guides(condition, None), given)
        assert sample.levels.steps == picture.prior_steps
        return float(torch.corrcoef(torch.stack([sample.latents.flatten(), clean.flatten()]))[0, 1])

    seen = [likeness(strength) for strength in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0.9 > 0.4 > seen[-1]
    at_shift = likeness(0.5, noise_at_sampling_shift=True)
    assert at_shift < seen[2] if preset == "official" else at_shift == seen[2]


@pytest.mark.slow
def test_the_embedded_checkpoint_redraws_more_the_larger_strength_is() -> None:
    tiny = Cascade.from_pretrained("tiny", device="cpu", dtype="float32")
    [source] = tiny.text_to_image("a red circle on a blue background", seed=3)
    distances = []
    for strength in (0.0, 0.3, 0.6, 1.0):
        made = [
            pixels(
                tiny.image_to_image(
                    source.image, "a green star on a white background", strength=strength, seed=seed
                )[0]
            )
            for seed in range(4)
        ]
        distances.append(np.mean([np.abs(each - pixels(source).astype(float)).mean() for each in made]))
    assert distances[0] < 3
    assert distances[:3] == sorted(distances[:3])
    assert distances[2] > 80


@pytest.mark.parametrize("size", [(128, 128), (72, 64), (200, 104), (136, 264)])
@pytest.mark.parametrize("feather", [0, 7])
def test_what_the_mask_keeps_comes_back_to_the_bit(
    cascade: Cascade, size: tuple[int, int], feather: int
) -> None:
    source = scene(*size)
    mask = box_mask(size, (20, 10, 55, 50))
    [made] = cascade.inpaint(source, "a hole", mask, feather=feather, **QUICK)
    kept, before, after = np.asarray(mask) == 0, np.asarray(source), pixels(made)
    assert made.image.size == size
    assert np.array_equal(after[kept], before[kept])
    assert np.abs(after[~kept].astype(float) - before[~kept]).mean() > 10


def test_what_is_kept_is_exact_where_the_checkpoint_resamples() -> None:
    cascade = seeing_cascade(NativeSizes(((128, 128), (192, 128)), resamples=True))
    source, mask = scene(360, 240), box_mask((360, 240), (100, 60, 200, 180))
    [made] = cascade.inpaint(source, "a hole", mask, **QUICK)
    assert made.resampled_from == (192, 128)
    kept = np.asarray(mask) == 0
    assert np.array_equal(pixels(made)[kept], np.asarray(source)[kept])
    assert not np.array_equal(pixels(made)[~kept], np.asarray(source)[~kept])


def test_the_new_part_fades_in_inside_the_mask_only(cascade: Cascade) -> None:
    hard, soft = (pixels(cascade.inpaint(SOURCE, "x", MASK, feather=f, **QUICK)[0]) for f in (0, 9))
    middle = (slice(62, 68), slice(62, 68))
    assert np.array_equal(hard[middle], soft[middle])
    edge = np.asarray(MASK)[:, 44] > 0
    before = np.asarray(SOURCE).astype(float)
    assert (
        np.abs(soft[edge, 44] - before[edge, 44]).mean()
        < 0.2 * np.abs(hard[edge, 44] - before[edge, 44]).mean()
    )


def test_transparency_is_a_mask(cascade: Cascade) -> None:
    seen_through = SOURCE.copy()
    seen_through.putalpha(Image.eval(MASK, lambda value: 255 - value))
    [by_mask] = cascade.inpaint(SOURCE, "a hole", MASK, **QUICK)
    [by_alpha] = cascade.inpaint(seen_through, "a hole", **QUICK)
    assert np.array_equal(pixels(by_mask), pixels(by_alpha))


def test_latents_of_what_is_kept_are_the_source_s_own_in_both_stages(cascade: Cascade) -> None:
    studio = Studio(cascade, networks(cascade))
    drawing = draw(studio, COMPANY[4])
    finish(studio, drawing)
    given = drawing.inputs
    for made, own, free in (
        (drawing.semantic, given.semantic, given.semantic_free),
        (drawing.latents, given.latents, given.latents_free),
    ):
        assert made is not None
        assert own is not None
        assert free is not None
        assert free.any()
        assert not free.all()
        assert torch.equal(made[:, ~free], own[:, ~free])
        assert not torch.equal(made[:, free], own[:, free])


def test_a_cell_is_drawn_anew_if_any_of_its_pixels_is() -> None:
    plan = plan_size(200, 104, NativeSizes())
    for grid in (plan.prior_grid, plan.decoder_grid):
        for x, y in ((0, 0), (199, 103), (77, 50)):
            free = free_cells(box_mask((200, 104), (x, y, x + 1, y + 1)), plan, grid, torch.device("cpu"))
            left, top = (plan.draw_width - 200) // 2, (plan.draw_height - 104) // 2
            row = int((y + top) * grid[0] / plan.draw_height)
            column = int((x + left) * grid[1] / plan.draw_width)
            assert free[row, column]
            assert 1 <= free.sum() <= 16, "and cells far from it are not"


@pytest.mark.parametrize(
    ("anchor", "corner"),
    [
        ("center", (40, 24)),
        ("top-left", (0, 0)),
        ("bottom-right", (80, 48)),
        ("top", (40, 0)),
        ("left", (0, 24)),
        ("bottom", (40, 48)),
        ("right", (80, 24)),
    ],
)
def test_outpainting_leaves_the_source_at_its_anchor(
    cascade: Cascade, anchor: str, corner: tuple[int, int]
) -> None:
    source = scene(120, 80)
    [made] = cascade.outpaint(source, "more", anchor=anchor, width=200, height=128, **QUICK)
    left, top = corner
    assert made.image.size == (200, 128)
    inner = pixels(made)[top : top + 80, left : left + 120]
    assert np.array_equal(inner, np.asarray(source))
    settings = ImageSettings(image=source, anchor=anchor, width=200, height=128)
    canvas = canvas_of(settings, plan_size(200, 128, NativeSizes()))
    assert canvas is not None
    difference = np.abs(pixels(made).astype(float) - np.asarray(canvas.image))
    assert difference.sum() / (200 * 128 - 120 * 80) > 10, "the rest is drawn, not the repeated edges"


def test_image_prompts_guide_by_their_weight(cascade: Cascade) -> None:
    size: dict[str, Any] = {"width": 128, "height": 128}
    other = scene(seed=2)

    def drawn(*prompts: ImagePrompt, prompt: str = "x") -> bytes:
        return cascade.image_variation(prompts, prompt, **QUICK, **size)[0].image.tobytes()

    [plain] = cascade.text_to_image("x", **QUICK, **size)
    assert drawn(ImagePrompt(SOURCE, 0.0)) == plain.image.tobytes(), "nothing of a picture is no picture"
    different = [
        plain.image.tobytes(),
        drawn(ImagePrompt(SOURCE)),
        drawn(ImagePrompt(SOURCE, 0.5)),
        drawn(ImagePrompt(SOURCE), prompt=""),
        drawn(ImagePrompt(other)),
        drawn(ImagePrompt(SOURCE), ImagePrompt(other)),
    ]
    assert len(set(different)) == len(different)


def test_unguided_rows_have_zeros_for_as_many_pictures(cascade: Cascade) -> None:
    studio = Studio(cascade, networks(cascade))
    sample = draw(studio, COMPANY[5]).sample
    assert sample is not None
    assert sample.guides.unconditional is not None
    text = cascade.text_encoder.encode([""])
    expected = cascade.stage_c.prepare(text.hidden, text.pooled, torch.zeros(1, 2, 4))
    for made, wanted in zip(sample.guides.unconditional.keys_values, expected.keys_values, strict=True):
        assert torch.equal(made, wanted)


def test_guidance_is_on_in_its_interval_only(cascade: Cascade) -> None:
    rows: list[int] = []

    def counting(values: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        rows.append(len(values))
        return cascade.stage_c(values, ratio, condition)

    studio = Studio(cascade, networks(cascade) | {"prior": counting})
    drawing = draw(studio, COMPANY[7] | {"steps": 8})
    assert drawing.picture.prior_rows == 2
    finish(studio, drawing)
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1]
    whole, off = (ImageSettings(prompt="x", guidance_scale=scale, **QUICK) for scale in (4.0, 1.0))
    assert (len(whole.guided_steps), len(off.guided_steps)) == (4, 0)


def test_an_absent_size_is_the_source_s(cascade: Cascade) -> None:
    for size, expected in (((131, 101), (131, 101)), ((40, 30), (85, 64))):
        [made] = cascade.image_to_image(scene(*size), "x", strength=0, **QUICK)
        assert made.image.size == expected


def test_a_source_of_another_shape_is_cut_centrally(cascade: Cascade) -> None:
    wide = Image.new("RGB", (384, 128), "red")
    wide.paste(SOURCE, (128, 0))
    [made] = cascade.image_to_image(wide, strength=0.5, width=128, height=128, **QUICK)
    [expected] = cascade.image_to_image(SOURCE, strength=0.5, **QUICK)
    assert np.abs(pixels(made).astype(float) - pixels(expected)).mean() < 3


def test_a_picture_is_turned_as_its_camera_says(cascade: Cascade) -> None:
    turned = scene(128, 96).rotate(90, expand=True)
    turned.getexif()[0x0112] = 6  # turn by 270 degrees
    assert ImageSettings(image=turned, prompt="x").image.size == (128, 96)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.5}, "strength: needs an image"),
        ({"mask": MASK}, "mask: needs an image"),
        ({"anchor": "left"}, "anchor: needs an image"),
        ({"image": "a.png"}, "image: must be a picture"),
        ({"image": SOURCE, "strength": 1.5}, "strength: must be a number from 0 to 1"),
        ({"image": SOURCE, "mask": Image.new("L", (5, 5))}, "mask: must have the size of the image, 128x128"),
        ({"image": SOURCE, "anchor": "middle"}, "anchor: must be one of center, top"),
        ({"image": SOURCE, "mask": MASK, "feather": -1}, "feather: must be a whole number"),
        ({"image_prompts": (ImagePrompt(SOURCE),) * 16}, "image_prompts: may be 15 at most, but are 16"),
        ({"image_prompts": [ImagePrompt(SOURCE)]}, "image_prompts: must be a tuple of ImagePrompt"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval: must begin before it ends"),
        ({"guidance_interval": (0.5, 1.5)}, "guidance_interval: must be a number from 0 to 1"),
        ({"prompt": ""}, "prompt: must not be blank"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        ImageSettings(**({"prompt": "x"} | change))
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("missing", "settings", "words"),
    [
        ("effnet", COMPANY[1], "image: "),
        ("image_encoder", COMPANY[5], "image_prompts: need the vision tower"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(missing: str, settings: dict[str, Any], words: str) -> None:
    cascade = seeing_cascade(**{missing: None})
    with pytest.raises(InvalidSetting) as caught:
        run(cascade, ImageSettings(**(QUICK | settings)))
    assert str(caught.value).startswith(words)
    assert missing in str(caught.value)


def test_what_cannot_be_done_is_refused(cascade: Cascade) -> None:
    with pytest.raises(InvalidSetting, match=r"^anchor: needs a canvas no smaller than the image, 128x128"):
        cascade.outpaint(SOURCE, "x", width=96, height=128, **QUICK)
    with pytest.raises(InvalidSetting, match=r"^mask: is needed"):
        cascade.inpaint(SOURCE, "x", **QUICK)
    with pytest.raises(InvalidSetting, match=r"^image_prompts: must be one picture or more"):
        cascade.image_variation([], **QUICK)


def test_an_image_prompt_of_several_pictures_is_encoded_once(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cascade.image_encoder is not None
    encoded: list[Image.Image] = []
    original = cascade.image_encoder.encode

    def encode(images: list[Image.Image]) -> Tensor:
        encoded.extend(images)
        return original(images)

    monkeypatch.setattr(cascade.image_encoder, "encode", encode)
    studio = Studio(cascade, networks(cascade))
    prompts = (ImagePrompt(SOURCE), ImagePrompt(SOURCE.copy(), 0.5))
    drawings = [draw(studio, {"image_prompts": prompts, "seed": seed}) for seed in range(3)]
    assert len(encoded) == 2
    embeds = [drawing.inputs.image_embeds for drawing in drawings]
    assert embeds[0] is not None
    assert embeds[1] is not None
    assert torch.equal(embeds[0], embeds[1])
    assert torch.equal(embeds[0][:, 0] * 0.5, embeds[0][:, 1])
