from pathlib import Path

import numpy as np
import pytest

from tests.app.cli.running import SMALL, Run, pixels


def test_inspect_lists_components_and_what_is_missing(run: Run, checkpoint: Path) -> None:
    outcome = run("inspect", checkpoint)
    assert outcome.status == 0
    for component in ("stage_a", "stage_b", "stage_c", "text_encoder", "image_encoder"):
        assert component in outcome.out
    assert "prior/diffusion_pytorch_model.safetensors" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("complete")

    part = run("inspect", checkpoint / "prior")
    assert part.out.splitlines()[-1] == "missing: stage_b, stage_a, text_encoder, tokenizer"


def test_inspect_lists_the_loras_beside_a_checkpoint(run: Run, checkpoint: Path) -> None:
    assert "LoRAs: azure, lcm, night" in run("inspect", "tiny").out.splitlines()
    assert "LoRAs" not in run("inspect", checkpoint).out


def test_inspect_names_a_damaged_file(run: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "stage_c.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    outcome = run("inspect", damaged)
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("cascade: ")
    assert str(damaged) in line


def test_inspect_of_a_folder_without_a_checkpoint_is_an_error(run: Run, tmp_path: Path) -> None:
    outcome = run("inspect", tmp_path)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == f"cascade: {tmp_path}: holds no component of Stable Cascade\n"
    (tmp_path / "old.ckpt").touch()
    outcome = run("inspect", tmp_path)
    assert outcome.status == 2
    assert outcome.out.startswith(f"refused: {tmp_path / 'old.ckpt'} may run code")


def test_inspect_suggests_nothing_that_it_cannot_read(run: Run) -> None:
    outcome = run("inspect", "stabilityai/stable-cascade")
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.startswith(
        "cascade: stabilityai/stable-cascade: no such checkpoint; give tiny, a folder or a"
    )
    assert "`cascade download OWNER/NAME` fetches a repository and prints its folder" in line


def test_every_line_of_a_long_error_has_the_prefix(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("generate", "a cat", "-o", tmp_path / "a.png", "--model", checkpoint / "prior")
    lines = outcome.err.splitlines()
    assert len(lines) > 3
    assert all(line.startswith("cascade: ") for line in lines)


def test_one_component_is_one_file(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "c.safetensors"
    outcome = run("convert", checkpoint / "prior", to, "--layout", "original")
    [line] = outcome.out.splitlines()
    assert line.startswith(f"{to}  ")
    assert outcome.err.startswith(f"wrote 1 file to {to}, ")


def test_a_converted_checkpoint_gives_the_same_picture(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("convert", checkpoint, tmp_path / "original", "--layout", "original")
    written = [path for path in sorted((tmp_path / "original").rglob("*")) if path.is_file()]
    assert [line.split("  ")[0] for line in outcome.out.splitlines()] == list(map(str, written))
    size = (tmp_path / "original" / "stage_c.safetensors").stat().st_size
    assert f"stage_c.safetensors  {size / 1e6:.1f} MB\n" in outcome.out
    assert outcome.err.startswith(f"wrote {len(written)} files to {tmp_path / 'original'}, ")
    for name, model in (("a", checkpoint), ("b", tmp_path / "original")):
        run("generate", "a cat", "-o", tmp_path / f"{name}.png", "-m", model, "--seed", 7, *SMALL)
    # Where mapped weights lie in memory may change the last bit of a sum; see the pipeline's test.
    made, expected = (pixels(tmp_path / f"{name}.png").astype(int) for name in "ba")
    assert np.abs(made - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layout", "comfyui"), "'original', 'diffusers'"),
        (("--layout", "original", "--dtype", "int8"), "--dtype: "),
        ((), "--layout"),
    ],
)
def test_convert_says_what_is_allowed(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    outcome = run("convert", checkpoint, tmp_path / "new", *arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["nope", "tiny", "a/b/c", "/a"])
def test_download_says_what_a_repository_is_called(run: Run, name: str) -> None:
    outcome = run("download", name)
    assert outcome.status == 2
    assert outcome.err == (
        f"cascade: repository: must be OWNER/NAME, such as stabilityai/stable-cascade, but is {name!r}\n"
    )


def test_an_interrupted_download_says_that_it_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cascade.checkpoints.hub.download", interrupted)
    outcome = run("download", "owner/name")
    assert (outcome.status, outcome.err) == (130, "cascade: interrupted; run it again to go on\n")


def test_download_without_a_hub_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_repository: str, **_settings: object) -> None:
        raise PermissionError(13, "Permission denied", "cache")

    monkeypatch.setattr("cascade.checkpoints.hub.download", refused)
    outcome = run("download", "owner/name", "--cache", tmp_path)
    assert outcome.status == 2
    assert outcome.err == "cascade: cache: Permission denied\n"


def test_download_prints_the_notice_and_the_folders(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, **settings: object) -> tuple[Path, ...]:
        notify = settings["notify"]
        assert callable(notify)
        notify(f"{repository}: non-commercial")
        return (tmp_path / "one", tmp_path / "two")

    monkeypatch.setattr("cascade.checkpoints.hub.download", download)
    outcome = run("download", "owner/name", "--variant", "lite")
    assert outcome.out == f"{tmp_path / 'one'}\n{tmp_path / 'two'}\n"
    assert outcome.err == "owner/name: non-commercial\n"
