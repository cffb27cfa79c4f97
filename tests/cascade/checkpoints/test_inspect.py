import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.checkpoints.convert import convert
from cascade.checkpoints.inspect import inspect
from cascade.checkpoints.keys import Component
from cascade.errors import CheckpointError
from tests.cascade.diffusers_pipelines import Pipelines


def test_a_folder_is_described_completely(saved_folder: Path, pipelines: Pipelines) -> None:
    found = inspect(saved_folder)
    assert found.is_complete
    assert found.missing == ()
    assert [part.component for part in found.components] == [
        Component.STAGE_C,
        Component.STAGE_B,
        Component.STAGE_A,
        Component.TEXT_ENCODER,
        Component.IMAGE_ENCODER,
    ]
    prior = found.components[0]
    parameters = sum(value.numel() for value in pipelines.prior.prior.state_dict().values())
    assert (prior.parameters, prior.num_bytes) == (parameters, 4 * parameters)
    assert (prior.variant, prior.layout, prior.dtypes, prior.problem) == (
        "custom",
        "diffusers",
        ("float32",),
        None,
    )
    assert prior.files == (saved_folder / "prior" / "diffusion_pytorch_model.safetensors",)


def test_the_layout_and_the_dtype_come_from_the_file(folder: Path, tmp_path: Path) -> None:
    file = convert(folder / "decoder", tmp_path / "wrong_fp32.safetensors", layout="original", dtype="bf16")
    (part,) = inspect(file).components
    assert (part.component, part.layout, part.dtypes) == (Component.STAGE_B, "original", ("bfloat16",))
    assert inspect(file).missing == ()  # of a file nothing else is expected


def test_what_is_missing_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "vqgan")
    found = inspect(folder)
    assert found.missing == ("stage_a", "tokenizer")
    assert not found.is_complete


def test_foreign_files_and_pickles_are_listed(folder: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "old.ckpt").write_bytes(b"x")
    found = inspect(folder)
    assert [path.name for path in found.unknown] == ["other.safetensors"]
    assert [path.name for path in found.refused] == ["old.ckpt"]
    assert found.is_complete


def test_a_component_that_would_not_load_says_why(folder: Path) -> None:
    file = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["pixels_mapper.2.bias"]
    save_file(tensors, file)
    part = inspect(folder).components[1]
    assert part.problem is not None
    assert "1 missing:\n    pixels_mapper.2.bias" in part.problem
    assert not inspect(folder).is_complete


def test_a_cut_file_is_an_error(folder: Path) -> None:
    file = folder / "vqgan" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=str(file)):
        inspect(folder)
