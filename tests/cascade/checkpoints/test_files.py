import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.checkpoints.files import companion, find_parts, scan
from cascade.checkpoints.keys import Component
from cascade.errors import CheckpointError, InvalidSetting
from tests.cascade.diffusers_pipelines import Pipelines, random_pipelines

ALL = {
    Component.STAGE_A,
    Component.STAGE_B,
    Component.STAGE_C,
    Component.TEXT_ENCODER,
    Component.IMAGE_ENCODER,
}


def split(folder: Path, prior: Path, decoder: Path) -> None:
    """Move the one folder of both pipelines apart into two."""
    shutil.copytree(folder, prior)
    shutil.copytree(folder, decoder)
    for name in ("decoder", "vqgan"):
        shutil.rmtree(prior / name)
    for name in ("prior", "image_encoder", "feature_extractor"):
        shutil.rmtree(decoder / name)


def test_both_pipelines_in_one_folder(saved_folder: Path) -> None:
    assert find_parts(saved_folder).keys() == ALL


def test_two_sub_folders_of_any_name(saved_folder: Path, tmp_path: Path) -> None:
    split(saved_folder, tmp_path / "first one", tmp_path / "x.y")
    parts = find_parts(tmp_path)
    assert parts.keys() == ALL
    prior, decoder = parts[Component.STAGE_C][0], parts[Component.STAGE_B][0]
    texts = parts[Component.TEXT_ENCODER]
    assert companion(prior, texts).folder == tmp_path / "first one" / "text_encoder"
    assert companion(decoder, texts).folder == tmp_path / "x.y" / "text_encoder"


@pytest.mark.parametrize("named", ["model", "model-prior"])
def test_sibling_folders_stand_in_for_each_other(named: str, saved_folder: Path, tmp_path: Path) -> None:
    split(saved_folder, tmp_path / "model-prior", tmp_path / "model")
    assert find_parts(tmp_path / named).keys() == ALL


def test_among_several_siblings_the_related_name_wins(saved_folder: Path, tmp_path: Path) -> None:
    split(saved_folder, tmp_path / "model-prior", tmp_path / "model")
    shutil.copytree(tmp_path / "model-prior", tmp_path / "another")
    assert find_parts(tmp_path / "model")[Component.STAGE_C][0].root == tmp_path / "model-prior"
    (tmp_path / "model-prior").rename(tmp_path / "third")
    with pytest.raises(CheckpointError, match="missing: stage_c"):
        find_parts(tmp_path / "model")  # two could be meant


def test_damage_matters_in_the_related_sibling_only(saved_folder: Path, tmp_path: Path) -> None:
    split(saved_folder, tmp_path / "model-prior", tmp_path / "model")
    shutil.copytree(tmp_path / "model-prior", tmp_path / "another")
    (tmp_path / "another" / "cut.safetensors").write_bytes(b"x")
    assert find_parts(tmp_path / "model").keys() == ALL
    (tmp_path / "model-prior" / "cut.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model-prior/cut\.safetensors"):
        find_parts(tmp_path / "model")


def test_a_relative_path_has_siblings_too(
    saved_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(saved_folder, tmp_path / "model-prior", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    assert find_parts(Path()).keys() == ALL


def test_the_folder_of_the_combined_pipeline(saved_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "combined"
    shutil.copytree(saved_folder, folder)
    for name in ("prior", "image_encoder", "feature_extractor"):
        (folder / name).rename(folder / f"prior_{name}")
    for name in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(folder / name, folder / f"prior_{name}")
    parts = find_parts(folder)
    assert parts.keys() == ALL
    texts = parts[Component.TEXT_ENCODER]
    assert companion(parts[Component.STAGE_C][0], texts).folder.name == "prior_text_encoder"
    assert companion(parts[Component.STAGE_B][0], texts).folder.name == "text_encoder"


def add_bf16(folder: Path) -> None:
    """A half precision file beside each full one, as on the hub."""
    for file in folder.glob("*/*.safetensors"):
        tensors = {n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(file).items()}
        save_file(tensors, file.with_suffix(".bf16.safetensors"))


def test_the_variant_and_then_the_dtype_choose_among_files(folder: Path) -> None:
    add_bf16(folder)
    name = "diffusion_pytorch_model"
    for variant, dtype, suffix in [
        (None, torch.float32, ""),
        (None, torch.bfloat16, ".bf16"),
        ("bf16", torch.float32, ".bf16"),
        ("bf16", None, ".bf16"),
        ("fp32", None, ""),
        ("fp32", torch.bfloat16, ""),
    ]:
        part = find_parts(folder, variant=variant, dtype=dtype)[Component.STAGE_C][0]
        assert part.files[0].name == f"{name}{suffix}.safetensors", (variant, dtype)


def test_lite_networks_are_taken_when_asked_or_alone(folder: Path) -> None:
    shutil.copytree(folder / "prior", folder / "prior_lite")
    assert find_parts(folder)[Component.STAGE_C][0].folder.name == "prior"
    assert find_parts(folder, variant="lite")[Component.STAGE_C][0].folder.name == "prior_lite"
    assert find_parts(folder, variant="lite")[Component.STAGE_B][0].folder.name == "decoder"
    shutil.rmtree(folder / "prior")
    assert find_parts(folder)[Component.STAGE_C][0].folder.name == "prior_lite"


def test_an_unknown_variant_is_refused(saved_folder: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"variant: .* no files of the variant int4"):
        find_parts(saved_folder, variant="int4")


def test_shards_are_joined(pipelines: Pipelines, folder: Path) -> None:
    shutil.rmtree(folder / "decoder")
    pipelines.decoder.decoder.save_pretrained(folder / "decoder", max_shard_size="1MB", variant="bf16")
    part = find_parts(folder)[Component.STAGE_B][0]
    assert len(part.files) > 2
    assert part.stored.keys() == pipelines.decoder.decoder.state_dict().keys()


@pytest.fixture
def shards(pipelines: Pipelines, tmp_path: Path) -> Path:
    pipelines.decoder.decoder.save_pretrained(tmp_path, max_shard_size="1MB")
    return tmp_path


def test_a_lost_shard_is_named(shards: Path) -> None:
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"1 of 4 shards are missing: {lost.name}"):
        scan(shards)


def test_shards_without_their_index_are_refused(shards: Path) -> None:
    next(shards.glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match=r"one of 4 shards, but their index\.json is missing"):
        scan(shards)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": "../../etc/passwd"}}])
def test_malformed_indexes_are_refused(content: dict, shards: Path) -> None:
    index = next(shards.glob("*.index.json"))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json: (has no weight_map|points out of its folder)"):
        scan(shards)


def test_half_a_checkpoint_is_described_in_one_message(folder: Path) -> None:
    shutil.rmtree(folder / "decoder")
    (folder / "vqgan" / "diffusion_pytorch_model.safetensors").rename(folder / "vqgan" / "weights.ckpt")
    save_file({"unet.conv_in.weight": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError) as error:
        find_parts(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}: incomplete checkpoint")
    for line in (
        "found: stage_c (custom, diffusers layout, float32) in prior",
        "found: text_encoder",
        "missing: stage_b, accepted are decoder/ or stage_b[_lite][_bf16].safetensors",
        "missing: stage_a",
        "refused: weights.ckpt",
        "not recognised: other.safetensors",
    ):
        assert line in message
    assert "missing: stage_c" not in message


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: no \.safetensors file") as error:
        find_parts(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused_by_name(folder: Path) -> None:
    file = folder / "stage_c.ckpt"
    file.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"stage_c\.ckpt: \.ckpt files are pickles"):
        find_parts(file)


def test_a_damaged_file_is_named(folder: Path) -> None:
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(file)):
        find_parts(folder)


def test_a_named_file_goes_before_others_of_its_kind(folder: Path) -> None:
    other = random_pipelines(seed=8).prior.prior
    save_file(other.state_dict(), folder / "tuned.safetensors")
    assert find_parts(folder / "tuned.safetensors")[Component.STAGE_C][0].files[0].name == "tuned.safetensors"


@pytest.mark.parametrize("name", ["another.safetensors", "another-00001-of-00002.safetensors"])
def test_a_damaged_neighbour_does_not_hide_the_named_file(folder: Path, name: str) -> None:
    file = folder / "stage_c.safetensors"
    save_file(random_pipelines(seed=8).prior.prior.state_dict(), file)
    (folder / name).write_bytes(b"x")
    assert find_parts(file)[Component.STAGE_C][0].files == (file,)
    with pytest.raises(CheckpointError, match=name):
        find_parts(folder)
    with pytest.raises(CheckpointError, match=name):
        find_parts(folder / name)


def test_damage_is_told_when_something_is_missing(folder: Path) -> None:
    damaged = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"damaged: {damaged}: .*\n(.*\n)*.*missing: stage_b"):
        find_parts(folder / "prior" / "diffusion_pytorch_model.safetensors", folder)
