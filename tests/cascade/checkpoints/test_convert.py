import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableCascadeUNet
from safetensors.torch import load_file, save_file

from cascade.checkpoints.convert import convert
from cascade.checkpoints.inspect import inspect
from cascade.checkpoints.keys import Component
from cascade.checkpoints.load import load_cascade, load_network
from cascade.checkpoints.save import TargetLayout
from cascade.errors import CheckpointError, InvalidSetting
from cascade.models import Models
from tests.cascade.checkpoints.test_keys import comfyui_files
from tests.cascade.diffusers_pipelines import Pipelines

WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_equal(one: Models, other: Models) -> None:
    for name in ("stage_a", "stage_b", "stage_c"):
        assert getattr(one, name).config == getattr(other, name).config
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("stage_a", "stage_b", "stage_c")]
    pairs += [(one.text_encoder.model, other.text_encoder.model)]
    assert one.image_encoder is not None
    assert other.image_encoder is not None
    pairs += [(one.image_encoder.model, other.image_encoder.model)]
    for first, second in pairs:
        states = first.state_dict(), second.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor, states[1][name]), name
    assert one.prior_schedule == other.prior_schedule
    assert one.decoder_schedule == other.decoder_schedule
    assert one.native == other.native


def test_a_checkpoint_is_the_same_after_any_round(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"native_sizes": [[256, 256]]}))
    original, back = tmp_path / "original", tmp_path / "back"
    assert convert(folder, original, layout="original") == original
    assert {file.name for file in original.glob("*.safetensors")} == {
        "stage_a.safetensors",
        "stage_b.safetensors",
        "stage_c.safetensors",
    }
    convert(original, back, layout="diffusers")
    for name in ("prior", "decoder", "vqgan", "text_encoder", "image_encoder"):
        file = f"{name}/{WEIGHTS}" if (folder / name / WEIGHTS).exists() else f"{name}/model.safetensors"
        before, after = load_file(folder / file), load_file(back / file)
        before = {key: value for key, value in before.items() if not key.endswith("num_batches_tracked")}
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.dtype is after[key].dtype
            assert torch.equal(value, after[key]), key
    models = load_cascade(folder)
    assert_equal(models, load_cascade(original))
    assert_equal(models, load_cascade(back))


def test_diffusers_reads_what_was_converted(folder: Path, pipelines: Pipelines, tmp_path: Path) -> None:
    convert(folder, tmp_path / "original", layout="original")
    convert(tmp_path / "original" / "stage_b.safetensors", tmp_path / "decoder", layout="diffusers")
    network = StableCascadeUNet.from_pretrained(tmp_path / "decoder", local_files_only=True)
    for name, value in pipelines.decoder.decoder.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_combined_files_of_comfyui_load_and_convert(
    folder: Path, pipelines: Pipelines, tmp_path: Path
) -> None:
    combined = tmp_path / "combined"
    combined.mkdir()
    for stage, values in zip("cb", comfyui_files(pipelines), strict=True):
        separate = {name: value.contiguous().clone() for name, value in values.items()}
        save_file(separate, combined / f"stable_cascade_stage_{stage}.safetensors")
    shutil.copytree(folder / "tokenizer", combined / "tokenizer")
    assert inspect(combined).missing == ()
    assert {part.layout for part in inspect(combined).components} == {"comfyui"}

    found = load_cascade(combined)
    for ours, theirs in ((found.stage_c, pipelines.prior.prior), (found.stage_b, pipelines.decoder.decoder)):
        assert torch.equal(ours.state_dict()["embedding.1.weight"], theirs.state_dict()["embedding.1.weight"])
    expected = pipelines.prior.text_encoder.state_dict()["text_projection.weight"]
    assert torch.equal(found.text_encoder.model.state_dict()["text_projection.weight"], expected)
    assert found.image_encoder is not None
    assert found.text_encoder is not found.decoder_text_encoder  # two files, whose bytes differ

    convert(combined, tmp_path / "plain", layout="diffusers")
    for name in ("prior", "decoder", "vqgan"):
        before, after = (load_network(place / name) for place in (folder, tmp_path / "plain"))
        for key, value in before.state_dict().items():
            assert key.endswith("num_batches_tracked") or torch.equal(after.state_dict()[key], value), key


def test_one_component_goes_to_a_file_and_back(folder: Path, tmp_path: Path) -> None:
    file = convert(folder / "prior", tmp_path / "c.safetensors", layout="original")
    assert file == tmp_path / "c.safetensors"
    assert load_network(file).config == load_network(folder / "prior").config
    assert convert(file, tmp_path / "prior", layout="diffusers") == tmp_path / "prior"
    before, after = load_file(folder / "prior" / WEIGHTS), load_file(tmp_path / "prior" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "stage_c_bf16"), ("float16", "stage_c")])
def test_weights_can_be_stored_in_another_type(dtype: str, name: str, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", layout="original", dtype=dtype)
    tensors = load_file(tmp_path / "out" / f"{name}.safetensors")
    expected = getattr(torch, dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    original = load_network(folder / "prior").state_dict()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, original[key].to(expected)), key
    statistics = load_file(next((tmp_path / "out").glob("stage_a*")))["down_blocks.3.1.running_var"]
    assert statistics.dtype is torch.float32


def test_values_too_large_for_float16_are_named_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    file = folder / "decoder" / WEIGHTS
    tensors = load_file(file)
    tensors["clf.1.bias"][3] = 1e6
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"clf\.1\.bias has values beyond the range of float16"):
        convert(folder, tmp_path / "out", layout="diffusers", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]


def test_a_damaged_source_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    file = folder / "decoder" / WEIGHTS
    tensors = load_file(file)
    del tensors["clf.1.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 missing:\n    clf\.1\.bias"):
        convert(folder, tmp_path / "out", layout="original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_nothing_is_overwritten(layout: TargetLayout, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="taken: exists already"):
        convert(folder, target, layout=layout)
    assert (target / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("source", "target", "arguments", "message"),
    [
        (
            "prior",
            "out",
            {"layout": "comfyui"},
            "layout: 'comfyui' is unknown; allowed are diffusers, original",
        ),
        ("prior", "out", {"layout": "original", "dtype": "int8"}, "dtype: 'int8' is unknown"),
        ("prior", "a.safetensors", {"layout": "diffusers"}, "target: .* must be a folder"),
        ("", "a.safetensors", {"layout": "original"}, "target: .* must be a folder: the source has 5"),
    ],
)
def test_wrong_arguments_are_refused(
    source: str, target: str, arguments: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        convert(folder / source, tmp_path / target, **arguments)


def test_a_folder_without_components_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no component"):
        convert(tmp_path, tmp_path / "out", layout="original")


def test_half_a_checkpoint_converts_to_half_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "decoder")
    convert(folder, tmp_path / "out", layout="original")
    found = {part.component for part in inspect(tmp_path / "out").components}
    assert Component.STAGE_C in found
    assert Component.STAGE_B not in found


def test_the_embedded_checkpoint_is_converted_by_its_name(tmp_path: Path) -> None:
    convert("tiny", tmp_path / "original", layout="original")
    assert_equal(load_cascade(tmp_path / "original", dtype="float32"), load_cascade("tiny", dtype="float32"))
