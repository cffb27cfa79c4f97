"""`cascade encode`, `decode` and `reconstruct` with the embedded checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cascade
from cascade.tasks.autoencode import DecodeSettings
from cascade.tasks.latents import Latents
from tests.app.cli.running import Run, files, pixels

FAST = ("--decoder-steps", 1)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = Image.new("RGB", (256, 256), "blue")
    image.paste("red", (64, 64, 192, 192))
    image.save(tmp_path / "in.png")
    return tmp_path / "in.png"


def test_encode_and_decode_are_together_what_reconstruct_does(
    run: Run, picture: Path, tmp_path: Path
) -> None:
    stored, decoded, again = (tmp_path / name for name in ("a.safetensors", "b.png", "c.png"))
    outcome = run("encode", picture, "-o", stored)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{stored}  256x256 as 16 x 6 x 6, {stored.stat().st_size:,} bytes\n"
    outcome = run("decode", stored, "-o", decoded, "--seed", 3, *FAST)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{decoded}  256x256  seed 3\n"
    assert run("reconstruct", picture, "-o", again, "--seed", 3, *FAST).status == 0
    assert np.array_equal(pixels(decoded), pixels(again))
    models = cascade.Cascade.from_pretrained("tiny")
    expected = models.reconstruct(Image.open(picture), DecodeSettings(seed=3, decoder_steps=1))
    assert np.array_equal(pixels(decoded), np.asarray(expected))
    assert models.encode(Image.open(picture)).encoder_sha256 == Latents.load(stored).encoder_sha256


def test_the_size_may_be_another(run: Run, picture: Path, tmp_path: Path) -> None:
    outcome = run("reconstruct", picture, "-o", tmp_path / "a.webp", "--width", 384, "--height", 128, *FAST)
    assert outcome.out == f"{tmp_path / 'a.webp'}  384x128  seed 0\n"
    assert pixels(tmp_path / "a.webp").shape == (128, 384, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("encode", "nowhere.png"), "nowhere.png: No such file or directory"),
        (("encode", "text.png"), "picture: text.png is no picture that can be read"),
        (("encode", "in.png", "-o", "a.bin"), "--output: must end in .safetensors, not '.bin'"),
        (("encode", "in.png", "-o", "nowhere/a.safetensors"), "--output: the folder nowhere does not exist"),
        (("encode", "in.png", "--width", 60), "--width: must be a whole number from 64"),
        (("encode", "in.png", "--preset", "best"), "--preset: must be one of official, diffusers"),
        (("decode", "nowhere.safetensors"), "nowhere.safetensors: cannot be read"),
        (("decode", "text.png"), "text.png: not a safetensors file"),
        (("decode", "in.png", "-o", "a.gif"), "--output: must end in .png"),
        (("reconstruct", "text.png"), "picture: text.png is no picture"),
        (("reconstruct", "in.png", "--decoder-steps", 0), "--decoder-steps: must be a whole number from 1"),
        (("reconstruct", "in.png", "--seed", -1), "--seed: must be a whole number from 0"),
        (("reconstruct", "in.png", "-m", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    outcome = run(*arguments)
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert words in line
    assert files(tmp_path) == [picture.name, "text.png"]


def test_latents_of_another_model_need_a_word(run: Run, picture: Path, tmp_path: Path) -> None:
    models = cascade.Cascade.from_pretrained("tiny")
    found = models.encode(Image.open(picture))
    Latents(found.values, 256, 256, "elsewhere", "0" * 64).save(tmp_path / "a.safetensors")
    arguments = ("decode", tmp_path / "a.safetensors", "-o", tmp_path / "a.png", *FAST)
    outcome = run(*arguments)
    assert outcome.status == 2
    assert "--model: the latents were made by the encoder of elsewhere, and that of tiny is another" in (
        outcome.err
    )
    assert "\n" not in outcome.err.strip()
    assert run(*arguments, "--any-model").status == 0
    assert pixels(tmp_path / "a.png").shape == (256, 256, 3)
