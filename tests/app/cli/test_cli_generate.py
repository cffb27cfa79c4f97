import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cascade
from app.cli_generate import hint_at_vocabulary
from tests.app.cli.running import SMALL, Run, files, pixels

TWO_STEPS = ("--seed", 7, "--steps", 2, "--decoder-steps", 1)


def test_generate_saves_what_the_library_makes(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("generate", "a cat", "-o", tmp_path / "a.png", "--model", checkpoint, "--seed", 7, *SMALL)
    assert outcome.status == 0
    assert outcome.out == f"{tmp_path / 'a.png'}  128x128  seed 7\n"
    assert "drawn in" in outcome.err
    [expected] = cascade.Cascade.from_pretrained(checkpoint).text_to_image(
        "a cat", width=128, height=128, seed=7, steps=2, decoder_steps=2
    )
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected.image))


def test_generate_saves_several_pictures_and_a_grid(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "a.webp"
    outcome = run("generate", "a cat", "-n", 2, "-o", to, "-m", checkpoint, "--seed", 7, *SMALL)
    assert outcome.status == 0
    assert files(tmp_path) == ["a-0.webp", "a-1.webp", "a-grid.webp"]
    first, second, grid = outcome.out.splitlines()
    assert [line.split()[-1] for line in (first, second)] == ["7", "8"]
    assert grid == f"{tmp_path / 'a-grid.webp'}  all of them"
    assert pixels(tmp_path / "a-grid.webp").shape == (128, 260, 3)


def test_generate_embeds_settings_on_request(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "a.png"
    run("generate", "a cat", "-o", to, "-m", checkpoint, "--embed-metadata", "--seed", 7, *SMALL)
    with Image.open(to) as image:
        text = image.info["parameters"]
    assert text.startswith("a cat\nSteps: 2")
    assert "Seed: 7" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", 0), "--steps: must be a whole number from 1 to 100, but is 0"),
        (("--decoder-steps", 61), "--decoder-steps: must be a whole number from 1 to 60"),
        (("--guidance-scale", "nan"), "--guidance-scale: must be a number from 0 to 20"),
        (("--width", 60, "--height", 128), "--width: must be a whole number from 64 to 4096"),
        (("--width", 64), "64x1024 is beyond the aspect ratios"),
        (("--width", 4096, "--height", 4096), "more than 4194304 pixels"),
        (("--seed", -1), "--seed: must be a whole number from 0 to 4294967295"),
        (("-n", 11), "--num-images: must be a whole number from 1 to 10"),
        (("--sampler", "euler"), "--sampler: must be one of ddpm, ddim, lcm"),
        (("--preset", "best"), "--preset: must be one of official, diffusers"),
        (("--device", "toaster"), "--device: "),
        (("--dtype", "int8"), "--dtype: "),
        (("-o", "a.gif"), "--output: must end in .png"),
        (("-o", "nowhere/a.png"), "--output: the folder nowhere does not exist"),
        (("--preview", "now.gif"), "--preview: must end in .png"),
        (("--preview", "nowhere/a.png"), "--preview: the folder nowhere does not exist"),
        (("-m", "nowhere/at/all"), "nowhere/at/all"),
        (("-m", "model.ckpt"), "model.ckpt"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    run: Run,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("generate", "a cat", "-o", "a.png", "--model", checkpoint, *arguments)
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert words in line
    assert files(tmp_path) == []


@pytest.mark.parametrize("prompt", ["", "   ", "x" * 100_000], ids=["empty", "blank", "endless"])
def test_a_wrong_prompt_is_one_short_line(run: Run, tmp_path: Path, prompt: str) -> None:
    outcome = run("generate", prompt, "-o", tmp_path / "a.png")
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("cascade: prompt: ")
    assert len(line) < 200
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    outcome = run("generate", "a cat", "-o", tmp_path / "a.png", "-m", checkpoint, *SMALL)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].endswith("No space left on device")
    assert files(tmp_path) == []


def test_interrupting_ends_cleanly(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade.Cascade, "from_pretrained", interrupted)
    outcome = run("generate", "a cat", "-o", tmp_path / "a.png", "-m", checkpoint)
    assert (outcome.status, outcome.err) == (130, "cascade: interrupted\n")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("prompt", "model", "has_hint"),
    [
        ("a castle at dusk", "tiny", True),
        ("two Discs on blue", "tiny", False),
        ("crosses", "tiny", False),
        ("a castle at dusk", "elsewhere", False),
    ],
)
def test_only_the_embedded_checkpoint_says_what_it_knows(
    capsys: pytest.CaptureFixture[str], prompt: str, model: str, has_hint: bool
) -> None:
    hint_at_vocabulary(model, prompt)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == has_hint
    assert all(line.startswith("hint: tiny draws only flat shapes (circle, square,") for line in lines)


def test_the_preview_shows_what_stage_c_draws_after_every_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(path: Path, to: Path) -> Path:
        if to.name == "now.png":
            seen.append(pixels(path))
        return replace(path, to)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", spy)
    to = tmp_path / "a.png"
    outcome = run(
        "generate", "a red circle", "-n", 2, "-o", to, "--preview", tmp_path / "now.png", *TWO_STEPS
    )
    assert outcome.status == 0
    first, second = seen
    assert first.shape == second.shape == (48, 100, 3), "two pictures side by side"
    assert not np.array_equal(first, second)
    assert second.std() > 5, "a flat picture would prove nothing"
    assert np.array_equal(pixels(tmp_path / "now.png"), second)


def test_without_a_previewer_there_is_no_preview(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    to, now = tmp_path / "a.png", tmp_path / "now.png"
    outcome = run("generate", "a cat", "-o", to, "--preview", now, "-m", checkpoint, *SMALL)
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("cascade: --preview: the checkpoint")
    assert line.endswith("has no previewer")
    assert files(tmp_path) == []
