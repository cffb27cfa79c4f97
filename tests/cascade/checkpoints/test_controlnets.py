"""ControlNets beside a checkpoint and by themselves: found, recognised, checked, saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.checkpoints.configs import usual_injections
from cascade.checkpoints.convert import convert
from cascade.checkpoints.inspect import inspect
from cascade.checkpoints.keys import Component
from cascade.checkpoints.load import load_cascade, load_controlnet, load_network
from cascade.checkpoints.save import save_cascade
from cascade.config import ControlNetConfig, EffNetStage
from cascade.errors import CheckpointError
from cascade.models import Models
from cascade.networks.controlnet import ControlNet
from tests.cascade.networks.reference import randomized

STAGES = (
    EffNetStage("fused", 1, 1, 4, 1),
    EffNetStage("fused", 4, 2, 8, 1),
    EffNetStage("mbconv", 4, 1, 8, 2),
)


@pytest.fixture(scope="session")
def plain(saved_folder: Path) -> Models:
    return load_cascade(saved_folder)


def controlnet(models: Models, kind: str, places: tuple[int, ...] = (0, 2)) -> ControlNet:
    stage = models.stage_c
    widths = tuple(stage.config.block_out_channels[stage.control_levels[place]] for place in places)
    effnet = ControlNetConfig("effnet", 1, 12, places, widths, stem_channels=4, stages=STAGES)
    configs = {
        "canny": effnet,
        "inpainting": replace(effnet, in_channels=4),
        "super_resolution": ControlNetConfig(
            "large", 16, 8, places, widths, hidden_channels=(24, 12), num_blocks=2
        ),
        "identity": ControlNetConfig("simple", 20, 10, places, widths, hidden_channels=(8,)),
    }
    return randomized(ControlNet(configs[kind]), seed=1)


KINDS = ("canny", "inpainting", "super_resolution", "identity")


def write(network: ControlNet, file: Path, **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), file, metadata)
    return file


def published_strides(network: ControlNet) -> ControlNet:
    """The same with the strides that are taken where none are stated."""
    stages = tuple(
        replace(stage, stride=stride) for stage, stride in zip(network.config.stages, (1, 2, 2), strict=False)
    )
    return ControlNet(replace(network.config, stages=stages))


def test_all_kinds_are_found_by_their_shapes_in_a_checkpoint(folder: Path, plain: Models) -> None:
    assert not plain.controlnets
    for index, kind in enumerate(KINDS):  # names say nothing
        write(controlnet(plain, kind), folder / "controlnet" / f"{index}.safetensors", injections="0,2")
    models = load_cascade(folder)
    assert sorted(models.controlnets) == sorted(KINDS)
    for kind, network in models.controlnets.items():
        expected = controlnet(plain, kind)
        assert network.kind == kind
        assert network.injections == (0, 2)
        if kind in ("canny", "inpainting"):
            assert network.config == published_strides(expected).config
        else:
            assert network.config == expected.config
        for name, tensor in expected.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name
        assert not network.training


def test_a_saved_checkpoint_keeps_them_with_all_that_shapes_do_not_show(
    plain: Models, tmp_path: Path
) -> None:
    networks = {kind: controlnet(plain, kind, (1, 3)) for kind in KINDS}
    models = replace(plain, controlnets=networks)
    save_cascade(models, tmp_path / "saved", layout="original")
    convert(tmp_path / "saved", tmp_path / "converted", layout="diffusers")
    for name in ("saved", "converted"):
        files = sorted((tmp_path / name / "controlnet").iterdir())
        assert [file.stem for file in files] == sorted(KINDS)
        found = load_cascade(tmp_path / name).controlnets
        assert {kind: each.config for kind, each in found.items()} == {
            kind: each.config for kind, each in networks.items()
        }
        for kind, network in networks.items():
            for key, tensor in network.state_dict().items():
                assert torch.equal(found[kind].state_dict()[key], tensor), key


def test_one_file_by_itself(plain: Models, tmp_path: Path) -> None:
    file = write(controlnet(plain, "identity"), tmp_path / "faces.safetensors", injections="0,2")
    network = load_network(file)
    assert isinstance(network, ControlNet)
    assert load_controlnet(file, plain).config == network.config == controlnet(plain, "identity").config
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="should hold one controlnet, holds none"):
        load_controlnet(tmp_path / "empty", plain)


def test_a_folder_of_further_ones_goes_first(folder: Path, plain: Models, tmp_path: Path) -> None:
    write(controlnet(plain, "identity"), folder / "controlnet" / "identity.safetensors", injections="0,2")
    write(controlnet(plain, "canny"), folder / "controlnet" / "canny.safetensors", injections="0,2")
    write(controlnet(plain, "identity"), tmp_path / "more" / "x.safetensors", injections="1,3")
    models = load_cascade(folder, controlnets=tmp_path / "more")
    assert models.controlnets["identity"].injections == (1, 3)
    assert models.controlnets["canny"].injections == (0, 2)
    with pytest.raises(CheckpointError, match="no such file or folder of ControlNets"):
        load_cascade(folder, controlnets=tmp_path / "nothing")


def test_inspect_lists_them(folder: Path, plain: Models) -> None:
    write(controlnet(plain, "canny"), folder / "controlnet" / "edges.safetensors")
    part = inspect(folder).components[-1]
    assert (part.component, part.variant, part.problem) == (Component.CONTROLNET, "canny, custom", None)
    assert part.layout == "original"
    counted = sum(tensor.numel() for tensor in controlnet(plain, "canny").parameters())
    assert counted < part.parameters < 1.5 * counted  # statistics are floats, too


def test_places_that_no_file_states() -> None:
    assert usual_injections(8, 64) == (0, 4, 8, 12, 51, 55, 59, 63)
    assert usual_injections(64, 64) == tuple(range(64))
    assert usual_injections(8, 8) == tuple(range(8))
    assert usual_injections(4, 8) == (0, 2, 4, 6)


def test_absent_places_are_spread_over_this_stage_c(folder: Path, plain: Models) -> None:
    count = len(plain.stage_c.control_levels)
    write(controlnet(plain, "identity", tuple(range(count))), folder / "controlnet" / "x.safetensors")
    assert load_cascade(folder).controlnets["identity"].injections == tuple(range(count))


def test_batch_norms_and_their_network_stay_in_fp32(folder: Path, plain: Models) -> None:
    for kind in ("canny", "super_resolution"):
        write(controlnet(plain, kind), folder / "controlnet" / f"{kind}.safetensors", injections="0,2")
    models = load_cascade(folder, dtype="bfloat16")
    assert models.controlnets["canny"].dtype is torch.float32
    assert models.controlnets["super_resolution"].dtype is torch.bfloat16
    for network in models.controlnets.values():
        channels = network.config.in_channels
        maps = network(torch.zeros(1, channels, 32, 32))
        assert all(each.isfinite().all() for each in maps)


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        ("canny", "backbone.2.0.block.1.1.running_var"),
        ("super_resolution", "backbone.3.blocks.2.bias"),
        ("super_resolution", "projections.1.0.weight"),
        ("identity", "backbone.2.bias"),
    ],
)
def test_missing_and_foreign_tensors_are_named(folder: Path, plain: Models, kind: str, absent: str) -> None:
    file = write(controlnet(plain, kind), folder / "controlnet" / "x.safetensors", injections="0,2")
    tensors = load_file(file)
    tensors["extra.weight"] = tensors.pop(absent)
    save_file(tensors, file, {"injections": "0,2"})
    with pytest.raises(CheckpointError) as raised:
        load_cascade(folder)
    text = str(raised.value)
    assert str(file) in text
    assert f"1 missing:\n    {absent}" in text
    assert "1 unexpected:\n    extra.weight" in text
    assert inspect(folder).components[-1].problem == text


@pytest.mark.parametrize(
    ("injections", "message"),
    [
        ("0,99", "injects before ResBlock 99, but Stage C has"),
        ("0", "not one for each of 2 projections"),
        ("2,0", "different numbers that rise"),
        ("0,x", "malformed"),
        ("0,-2", "no possible value"),
    ],
)
def test_impossible_places_are_refused(folder: Path, plain: Models, injections: str, message: str) -> None:
    file = folder / "controlnet" / "x.safetensors"
    write(controlnet(plain, "identity"), file, injections=injections)
    with pytest.raises(CheckpointError, match=message):
        load_cascade(folder)


def test_one_for_a_stage_c_of_other_widths_is_left_out(folder: Path, plain: Models) -> None:
    config = replace(controlnet(plain, "identity").config, out_channels=(40, 40))
    file = write(ControlNet(config), folder / "controlnet" / "x.safetensors", injections="0,2")
    assert not load_cascade(folder).controlnets
    with pytest.raises(CheckpointError, match="adds 40 channels before ResBlock 0 of Stage C"):
        load_controlnet(file, plain)
