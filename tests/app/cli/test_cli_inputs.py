"""Pictures as options of `cascade generate`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cascade
from app.cli_inputs import read_image_prompts, read_loras
from cascade.errors import InvalidSetting
from tests.app.cli.running import Run, files, pixels

QUICK = ("--seed", 7, "--steps", 4, "--decoder-steps", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.png"
    Image.new("RGB", (256, 256), (35, 75, 215)).save(path)
    return path


def test_a_picture_is_redrawn_as_the_library_does(run: Run, source: Path, tmp_path: Path) -> None:
    to = tmp_path / "a.png"
    outcome = run("generate", "a red circle", "--image", source, "--strength", 0.5, "-o", to, *QUICK)
    assert outcome.status == 0, outcome.err
    with Image.open(source) as image:
        [expected] = cascade.Cascade.from_pretrained("tiny").image_to_image(
            image, "a red circle", strength=0.5, seed=7, steps=4, decoder_steps=1
        )
    assert np.array_equal(pixels(to), np.asarray(expected.image))


def test_a_mask_keeps_what_is_black(run: Run, source: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (90, 90, 160, 160))
    mask.save(tmp_path / "mask.png")
    to = tmp_path / "a.png"
    arguments = ("--image", source, "--mask", tmp_path / "mask.png", "--feather", 3)
    outcome = run("generate", "a red circle", *arguments, "-o", to, *QUICK)
    assert outcome.status == 0, outcome.err
    kept = np.asarray(mask) == 0
    assert np.array_equal(pixels(to)[kept], pixels(source)[kept])
    assert not np.array_equal(pixels(to)[~kept], pixels(source)[~kept])


def test_a_canvas_and_an_image_prompt_need_no_words(run: Run, source: Path, tmp_path: Path) -> None:
    to = tmp_path / "a.png"
    outcome = run(
        *("generate", "--image-prompt", f"{source}:0.5", "--image", source, "--anchor", "left"),
        *("--width", 320, "--height", 256, "-o", to, *QUICK),
    )
    assert outcome.status == 0, outcome.err
    assert pixels(to).shape == (256, 320, 3)
    assert np.array_equal(pixels(to)[:, :256], pixels(source))


def test_an_enlarged_picture_keeps_to_the_small_one_unless_it_shall_not(
    run: Run, source: Path, tmp_path: Path
) -> None:
    small, to = Image.open(source).convert("RGB").resize((64, 64)), tmp_path / "a.png"
    small.save(tmp_path / "small.png")
    differences = []
    for asked in ((), ("--no-faithful",), ("--control-scale", 0), ("--control-scale", 0, "--faithful")):
        control = ("--control", f"super_resolution:{tmp_path / 'small.png'}")
        outcome = run("generate", "a red circle", *control, *asked, "-o", to, *QUICK)
        assert outcome.status == 0, outcome.err
        again = Image.open(to).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        differences.append(np.abs(np.asarray(again, float) - np.asarray(small)).mean())
    kept, drawn, without, kept_without = differences
    assert max(kept, kept_without) < 1 < min(drawn, without)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "nowhere.png"), "--image: nowhere.png: No such file or directory"),
        (("--image", "text.png"), "--image: text.png is no picture that can be read"),
        (("--image", "cut.png"), "--image: cut.png"),
        (("--mask", "source.png"), "--mask: needs an image"),
        (("--strength", 0.5), "--strength: needs an image"),
        (("--image", "source.png", "--strength", 2), "--strength: must be a number from 0 to 1"),
        (("--image", "source.png", "--anchor", "up"), "--anchor: must be one of center"),
        (("--image-prompt", "nowhere.png:2"), "--image-prompt: nowhere.png: No such file"),
        (("--image-prompt", "source.png:9"), "--image-prompt: must be a number from -2 to 2, but is 9.0"),
        (("--control", "source.png"), "--control: must be KIND:FILE, but is 'source.png'"),
        (("--control", "lines:source.png"), "--control: must be one of canny"),
        (("--lora", "style:much"), "--lora: must be NAME or NAME:SCALE, but is 'style:much'"),
        (("--guidance-interval", 0.7, 0.2), "--guidance-interval: must begin before it ends"),
    ],
)
def test_a_wrong_picture_is_one_line_that_names_the_option(
    run: Run,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(source.parent)
    Path("text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save("noise.png")
    Path("cut.png").write_bytes(Path("noise.png").read_bytes()[:1000])
    before = files(source.parent)
    outcome = run("generate", "a cat", "-o", "a.png", *arguments)
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.startswith(f"cascade: {words}")
    assert files(source.parent) == before


def test_a_colon_may_be_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a:2"
    Image.new("RGB", (8, 8)).save(path, "png")
    assert [prompt.weight for prompt in read_image_prompts([str(path), f"{path}:0.5"])] == [1.0, 0.5]
    assert [(lora.name, lora.scale) for lora in read_loras(["azure", "azure:-0.5"])] == [
        ("azure", 1.0),
        ("azure", -0.5),
    ]
    with pytest.raises(InvalidSetting, match=r"^loras: "):
        read_loras([":1"])
