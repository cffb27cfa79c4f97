import hashlib
import subprocess
from pathlib import Path

import pytest

from cascade.checkpoints.convert import convert
from cascade.checkpoints.inspect import inspect
from cascade.checkpoints.load import load_cascade
from cascade.checkpoints.save import save_cascade
from cascade.checkpoints.sums import SUMS_NAME, check_sums, write_sums
from cascade.errors import CheckpointError


@pytest.fixture
def listed(folder: Path) -> Path:
    write_sums(folder)
    return folder


def flip(path: Path) -> tuple[str, str]:
    """Flip one bit in the middle; the checksums before and after."""
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return before, hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "decoder/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_one_flipped_bit_is_named_with_both_checksums(name: str, listed: Path) -> None:
    load_cascade(listed)
    expected, found = flip(listed / name)
    with pytest.raises(CheckpointError, match=f"{name}: damaged .* should be {expected}, is {found}"):
        load_cascade(listed)


def test_the_list_is_that_of_sha256sum(listed: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_NAME], cwd=listed, check=True)


def test_large_files_are_left_to_a_check_without_limit(listed: Path) -> None:
    flip(listed / "prior" / "diffusion_pytorch_model.safetensors")
    check_sums(listed, max_bytes=1_000_000)
    with pytest.raises(CheckpointError, match="prior"):
        check_sums(listed, max_bytes=None)
    with pytest.raises(CheckpointError, match="prior"):
        inspect(listed, verify=True)
    assert inspect(listed).is_complete


def test_deleted_and_added_files_are_no_damage(listed: Path) -> None:
    (listed / "notes.txt").write_text("mine")
    (listed / "feature_extractor" / "preprocessor_config.json").unlink()
    check_sums(listed)


def test_a_folder_without_a_list_is_not_checked(folder: Path) -> None:
    check_sums(folder)


def test_a_malformed_list_is_named(folder: Path) -> None:
    (folder / SUMS_NAME).write_text("no sum at all\n")
    with pytest.raises(CheckpointError, match=f"{SUMS_NAME}: malformed line 'no sum at all'"):
        load_cascade(folder)


def test_saved_and_converted_checkpoints_bring_their_list(folder: Path, tmp_path: Path) -> None:
    save_cascade(load_cascade(folder), tmp_path / "saved")
    convert(folder, tmp_path / "converted", layout="original")
    for name in ("saved", "converted"):
        flip(next((tmp_path / name).rglob("*.safetensors")))
        with pytest.raises(CheckpointError, match="damaged or changed"):
            load_cascade(tmp_path / name)
