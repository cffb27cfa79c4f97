import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline
from safetensors import safe_open

from cascade.checkpoints import writing
from cascade.checkpoints.keys import Component
from cascade.checkpoints.load import load_cascade, load_network
from cascade.checkpoints.save import save_cascade, save_component
from cascade.checkpoints.stored import StoredTensor
from cascade.checkpoints.writing import atomic_folder, write_tensors
from cascade.config import EffNetConfig, EffNetStage, PreviewerConfig
from cascade.errors import CheckpointError
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.previewer import Previewer
from cascade.sizes import NativeSizes
from tests.cascade.checkpoints.test_convert import assert_equal
from tests.cascade.diffusers_pipelines import Pipelines

WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER = EffNetConfig(
    stem_channels=8,
    stages=(EffNetStage("fused", 1, 1, 8, 1), EffNetStage("mbconv", 4, 2, 16, 2)),
    head_channels=32,
    latent_channels=16,
)


def keep(_name: str, present: torch.dtype) -> torch.dtype:
    return present


@pytest.mark.parametrize("network", [EffNetEncoder(ENCODER), Previewer(PreviewerConfig(16, 64, 3))])
def test_our_own_networks_come_back_with_their_configuration(network: Any, tmp_path: Path) -> None:
    file = save_component(network, tmp_path / "part")
    assert file == tmp_path / "part" / WEIGHTS
    found = load_network(tmp_path / "part")
    assert type(found) is type(network)
    assert found.config == network.config
    for name, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_whole_checkpoint_comes_back(layout: Any, saved_folder: Path, tmp_path: Path) -> None:
    models = load_cascade(saved_folder)
    models.effnet, models.previewer = (
        EffNetEncoder(ENCODER).eval(),
        Previewer(PreviewerConfig(16, 64, 3)).eval(),
    )
    models.native = NativeSizes(((256, 256), (384, 256)), resamples=True)
    save_cascade(models, tmp_path / "saved", layout=layout)
    found = load_cascade(tmp_path / "saved")
    assert_equal(models, found)
    assert found.previewer is not None
    assert found.effnet is not None
    if (
        layout == "diffusers"
    ):  # the strides of an encoder stand in its config.json, or in the header of its file
        assert found.effnet.config == ENCODER
    for name, value in models.effnet.state_dict().items():
        assert torch.equal(found.effnet.state_dict()[name], value), name


def test_diffusers_loads_both_pipelines_from_one_saved_folder(
    saved_folder: Path, pipelines: Pipelines, tmp_path: Path
) -> None:
    save_cascade(load_cascade(saved_folder), tmp_path / "saved")
    prior = StableCascadePriorPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    decoder = StableCascadeDecoderPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    for found, expected in (
        (prior.prior, pipelines.prior.prior),
        (prior.image_encoder, pipelines.prior.image_encoder),
        (decoder.decoder, pipelines.decoder.decoder),
        (decoder.vqgan, pipelines.decoder.vqgan),
        (decoder.text_encoder, pipelines.decoder.text_encoder),
    ):
        for name, value in expected.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(found.state_dict()[name], value), name


def test_a_saved_file_is_read_by_the_formats_own_reader(tmp_path: Path) -> None:
    values = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(5, 3, dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "one": torch.tensor(3),
        "none": torch.zeros(0, 2),
    }
    path = tmp_path / "a.safetensors"
    write_tensors(path, {n: StoredTensor.of(v) for n, v in values.items()}, keep, {"note": "ä"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}
        assert set(file.keys()) == values.keys()
        for name, value in values.items():
            assert torch.equal(file.get_tensor(name), value)


def test_the_original_layout_names_files_as_published(saved_folder: Path, tmp_path: Path) -> None:
    network = load_network(saved_folder / "prior")
    assert save_component(network, tmp_path, layout="original").name == "stage_c.safetensors"
    file = save_component(network, tmp_path, torch.bfloat16, layout="original")
    assert file.name == "stage_c_bf16.safetensors"


def test_a_full_disk_leaves_the_old_files_as_they_were(
    saved_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network(saved_folder / "vqgan")
    save_component(network, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 10_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def open_on_full_disk(path: Path, mode: str) -> FullDisk:
        return FullDisk(path, mode)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(
        CheckpointError, match="cannot be written: no space left on the disk; nothing was left"
    ):
        save_component(network, tmp_path, torch.bfloat16)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/part.*cannot be written"):
        save_component(Previewer(PreviewerConfig(16, 64, 3)), tmp_path / "file" / "part")


def test_an_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    def begin_and_stop() -> None:
        with atomic_folder(tmp_path / "new") as partial:
            (partial / "begun").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_and_stop()
    assert list(tmp_path.iterdir()) == []


def test_a_file_being_written_is_not_taken_for_a_checkpoint(saved_folder: Path, tmp_path: Path) -> None:
    name = writing._partial_name(tmp_path / "prior").name
    assert name.startswith(".")
    (tmp_path / name).symlink_to(saved_folder / "prior")
    with pytest.raises(CheckpointError, match="should hold one component, holds none"):
        load_network(tmp_path)


def test_a_tower_states_its_type_and_class(saved_folder: Path, tmp_path: Path) -> None:
    tower = load_network(saved_folder / "text_encoder")
    save_component(tower, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["CLIPTextModelWithProjection"]
    assert content["num_attention_heads"] == 3
    assert str(Component.TEXT_ENCODER) == "text_encoder"
