import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.checkpoints.inspect import inspect
from cascade.checkpoints.keys import Component, to_original
from cascade.checkpoints.load import load_cascade, load_network, parse_device, parse_dtype
from cascade.checkpoints.save import save_component
from cascade.checkpoints.stored import StoredTensor
from cascade.config import SCHEDULE_B, SCHEDULE_C, EffNetConfig, EffNetStage, ScheduleConfig
from cascade.errors import CheckpointError, InvalidSetting
from cascade.models import Models
from cascade.networks.effnet import EffNetEncoder
from tests.cascade.diffusers_pipelines import Pipelines, random_pipelines

WEIGHTS = "diffusion_pytorch_model.safetensors"


def networks(models: Models) -> dict[Component, nn.Module]:
    assert models.image_encoder is not None
    return {
        Component.STAGE_A: models.stage_a,
        Component.STAGE_B: models.stage_b,
        Component.STAGE_C: models.stage_c,
        Component.TEXT_ENCODER: models.text_encoder.model,
        Component.IMAGE_ENCODER: models.image_encoder.model,
    }


def references(pipelines: Pipelines) -> dict[Component, dict[str, Tensor]]:
    """What diffusers and transformers hold, under canonical names."""
    modules: dict[Component, Any] = {
        Component.STAGE_A: pipelines.decoder.vqgan,
        Component.STAGE_B: pipelines.decoder.decoder,
        Component.STAGE_C: pipelines.prior.prior,
        Component.TEXT_ENCODER: pipelines.prior.text_encoder,
        Component.IMAGE_ENCODER: pipelines.prior.image_encoder,
    }
    return {
        component: {
            name: tensor.read()
            for name, tensor in to_original(
                component, {name: StoredTensor.of(value) for name, value in module.state_dict().items()}
            ).items()
        }
        for component, module in modules.items()
    }


def assert_same_weights(models: Models, pipelines: Pipelines, dtype: torch.dtype = torch.float32) -> None:
    expected = references(pipelines)
    for component, network in networks(models).items():
        found = network.state_dict()
        for name, value in expected[component].items():
            assert torch.equal(found[name].float(), value.to(found[name].dtype).float()), name
            if value.is_floating_point() and not name.startswith("down_blocks.3.1"):
                assert found[name].dtype is dtype, name


def test_every_weight_arrives(saved_folder: Path, pipelines: Pipelines) -> None:
    models = load_cascade(saved_folder)
    assert_same_weights(models, pipelines)
    assert models.text_encoder is models.decoder_text_encoder
    assert models.name == str(saved_folder)
    assert not models.native.resamples
    for network in networks(models).values():
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))


def test_bf16_keeps_batch_norms_in_fp32(saved_folder: Path, pipelines: Pipelines) -> None:
    models = load_cascade(saved_folder, dtype="bfloat16")
    assert_same_weights(models, pipelines, torch.bfloat16)
    norm = models.stage_a.state_dict()
    for name in ("weight", "bias", "running_mean", "running_var"):
        expected = pipelines.decoder.vqgan.state_dict()[f"down_blocks.3.1.{name}"]
        assert torch.equal(norm[f"down_blocks.3.1.{name}"], expected)


def test_bf16_networks_run(saved_folder: Path) -> None:
    models = load_cascade(saved_folder, dtype="bfloat16")
    latents = models.stage_a.encode(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16))
    assert latents.dtype is torch.bfloat16
    assert models.text_encoder.encode(["a word"]).hidden.dtype is torch.bfloat16


def test_half_precision_files_and_mixed_types_are_converted(folder: Path, pipelines: Pipelines) -> None:
    file = folder / "prior" / WEIGHTS
    types = [torch.float16, torch.float32, torch.bfloat16]
    tensors = load_file(file)
    # to_q, to_k and to_v of one block must agree, so the type follows from the rest of the name
    mixed = {n: t.to(types[sum(map(len, n.split(".to_")[0].split("."))) % 3]) for n, t in tensors.items()}
    save_file(mixed, file)
    assert {t.dtype for t in mixed.values()} == set(types)
    found = load_network(folder / "prior").state_dict()
    expected = to_original(Component.STAGE_C, {name: StoredTensor.of(value) for name, value in mixed.items()})
    for name, tensor in expected.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], tensor.read().float()), name


def test_a_decoder_with_its_own_text_encoder_keeps_it(saved_folder: Path, tmp_path: Path) -> None:
    for name in ("prior", "decoder"):
        shutil.copytree(saved_folder, tmp_path / name)
        shutil.rmtree(tmp_path / name / {"prior": "decoder", "decoder": "prior"}[name])
    shutil.rmtree(tmp_path / "prior" / "vqgan")
    same = load_cascade(tmp_path)
    assert same.text_encoder is same.decoder_text_encoder

    other = random_pipelines(seed=6).decoder.text_encoder
    other.save_pretrained(tmp_path / "decoder" / "text_encoder")
    models = load_cascade(tmp_path)
    assert models.text_encoder is not models.decoder_text_encoder
    key = "text_projection.weight"
    assert torch.equal(models.decoder_text_encoder.model.state_dict()[key], other.state_dict()[key])
    assert not torch.equal(models.text_encoder.model.state_dict()[key], other.state_dict()[key])


def test_schedules_and_native_sizes_come_from_the_folder(folder: Path) -> None:
    (folder / "prior_scheduler").mkdir()
    (folder / "prior_scheduler" / "scheduler_config.json").write_text('{"s": 0.01, "shift": 1.5}')
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"native_sizes": [[256, 256], [384, 256]]}))
    models = load_cascade(folder)
    assert models.prior_schedule == ScheduleConfig(s=0.01, shift=1.5)
    assert models.decoder_schedule == SCHEDULE_B
    assert (models.native.sizes, models.native.resamples) == (((256, 256), (384, 256)), True)


def test_one_scheduler_serves_both_with_the_shift_of_each_stage(saved_folder: Path) -> None:
    models = load_cascade(saved_folder)
    assert (models.prior_schedule, models.decoder_schedule) == (SCHEDULE_C, SCHEDULE_B)


@pytest.mark.parametrize("stated", [0.43, 0.3764, 0.9, None])
def test_the_stated_scale_factor_of_stage_a_is_kept(stated: float | None, folder: Path) -> None:
    file = folder / "vqgan" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_factor": stated}))
    models = load_cascade(folder)
    assert models.stated_scale_factor == stated
    assert models.stage_a.config.scale_factor == (stated or 0.43)


@pytest.mark.parametrize("sizes", [[[256]], [256, 256], 256])
def test_malformed_native_sizes_are_refused(sizes: object, folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"native_sizes": sizes}))
    with pytest.raises(CheckpointError, match=r"model_index\.json: native_sizes must be pairs"):
        load_cascade(folder)


@pytest.mark.parametrize("size", [["256", 256], [0, 256], [100, 100], [True, 8], [64, 512], [1e3, 1e3]])
def test_native_sizes_that_cannot_be_drawn_are_refused(size: object, folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"native_sizes": [[256, 256], size]}))
    with pytest.raises(
        CheckpointError,
        match=r"model_index\.json: native_sizes has .*(width: |height: |size: |no multiples of 8)",
    ):
        load_cascade(folder)


def test_pictures_as_prompts_are_optional(folder: Path) -> None:
    shutil.rmtree(folder / "image_encoder")
    assert load_cascade(folder).image_encoder is None


def test_a_lost_tokenizer_says_where_to_get_one(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(
        CheckpointError, match=r"tokenizer is missing.*cascade download stabilityai/stable-cascade"
    ):
        load_cascade(folder)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer: not a CLIP tokenizer"):
        load_cascade(folder)


@pytest.mark.parametrize("length", ["x", 0, -77, 77.5, True, [77]])
def test_a_tokenizer_that_knows_no_length_is_refused(length: object, folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: model_max_length must be a whole"):
        load_cascade(folder)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    file = folder / "decoder" / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_all_faults_of_a_file_are_listed_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["down_blocks.0.0.depthwise.bias"]
        tensors["up_blocks.1.0.channelwise.4.bias"] = torch.zeros(7)
        tensors["mystery"] = torch.zeros(1)
        tensors["clf.1.bias"] = torch.zeros(16, dtype=torch.int32)

    file = change_weights(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        load_cascade(folder)
    assert str(error.value).splitlines() == [
        f"{file}: the tensors do not fit the network",
        "  1 missing:",
        "    down_blocks.0.0.depthwise.bias",
        "  1 unexpected:",
        "    mystery",
        "  1 of another shape:",
        "    up_blocks.1.0.channelwise.4.bias is [7], should be [64]",
        "  1 not floating point:",
        "    clf.1.bias is int32",
    ]


def test_long_lists_are_cut_and_counted(folder: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    change_weights(folder, drop)
    with pytest.raises(CheckpointError, match=r"    and \d+ more") as error:
        load_cascade(folder)
    assert len(str(error.value).splitlines()) < 30


def test_a_config_that_lies_is_refused_with_its_folder(folder: Path) -> None:
    file = folder / "decoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_out_channels": [32, 64, 256]}))
    with pytest.raises(CheckpointError, match=r"decoder.*block_out_channels = \[32, 64, 256\]"):
        load_cascade(folder)


def test_a_tower_whose_config_lies_is_refused(folder: Path) -> None:
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"text_encoder.*num_hidden_layers = 3, but the tensors show 2"):
        load_cascade(folder)


MALFORMED = [
    ("prior", "patch_size", [[]]),
    ("prior", "num_attention_heads", 1),
    ("prior", "num_attention_heads", ["x", "y"]),
    ("prior", "up_num_layers_per_block", ["CTA", "CTA"]),
    ("prior", "down_num_layers_per_block", -1),
    ("prior", "block_types_per_layer", 7),
    ("prior", "self_attn", {"a": 1}),
    ("decoder", "dropout", "nan"),
    ("decoder", "dropout", [0.1, float("nan"), 0.1]),
    ("decoder", "num_attention_heads", {"a": 1}),
    ("vqgan", "scale_factor", "large"),
    ("vqgan", "scale_factor", 0),
    ("vqgan", "scale_factor", -0.43),
    ("vqgan", "scale_factor", float("inf")),
    ("vqgan", "scale_factor", 10**400),
    ("text_encoder", "hidden_act", "sharp"),
    ("text_encoder", "num_attention_heads", 0),
    ("image_encoder", "layer_norm_eps", []),
    ("feature_extractor", "crop_size", [[]]),
]


@pytest.mark.parametrize(("part", "name", "value"), MALFORMED)
def test_malformed_settings_are_errors_of_the_checkpoint(
    part: str, name: str, value: object, folder: Path
) -> None:
    (file,) = (folder / part).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=part):
        load_cascade(folder)


def test_a_far_block_in_a_name_costs_no_memory(folder: Path) -> None:
    far = "down_blocks.0.999999999999.mapper.weight"
    file = change_weights(folder, lambda tensors: tensors.update({far: torch.zeros(1)}))
    (folder / "decoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"down_blocks\.0\.999999999999\.\* among \d+ tensors") as error:
        load_network(file)
    assert str(file) in str(error.value)


def test_an_empty_tensor_is_named(folder: Path) -> None:
    file = change_weights(folder, lambda t: t.update({"embedding.1.weight": torch.zeros(32, 0, 1, 1)}))
    (folder / "decoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"embedding\.1\.weight is empty.*\[32, 0, 1, 1\]"):
        load_network(file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("channels", 10**12, "no network can have these dimensions"),
        ("repeats", "x", "repeats must be a whole number of at least 1, but is 'x'"),
    ],
)
def test_a_config_of_impossible_dimensions_is_refused(
    name: str, value: object, message: str, tmp_path: Path
) -> None:
    """It is complete, and so believed where the tensors lack something."""
    stages = (EffNetStage("fused", 1, 1, 8, 1), EffNetStage("fused", 1, 2, 8, 1))
    network = EffNetEncoder(EffNetConfig(stem_channels=8, stages=stages, head_channels=16))
    weights = save_component(network, tmp_path)
    tensors = load_file(weights)
    del tensors["mapper.0.weight"]
    save_file(tensors, weights)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for stage in content["stages"]:
        stage[name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as error:
        load_network(tmp_path)
    assert str(error.value).startswith(f"{weights}: ")


def test_a_trimmed_stage_a_loads_without_codebook(folder: Path) -> None:
    file = folder / "vqgan" / WEIGHTS
    tensors = load_file(file)
    del tensors["vquantizer.embedding.weight"]
    save_file(tensors, file)
    codebook = load_cascade(folder).stage_a.state_dict()["vquantizer.codebook.weight"]
    assert codebook.shape == (64, 4)
    assert not codebook.any()


def test_weights_of_the_right_type_stay_maps_of_their_file(folder: Path) -> None:
    network = load_network(folder / "prior")
    with Path("/proc/self/maps").open() as maps:
        assert any(str(folder / "prior" / WEIGHTS) in line for line in maps)
    with torch.no_grad():
        network.state_dict()["embedding.1.weight"].zero_()
    assert load_network(folder / "prior").state_dict()["embedding.1.weight"].any()


def test_one_component_alone_loads(folder: Path) -> None:
    assert type(load_network(folder / "vqgan" / WEIGHTS)).__name__ == "StageA"
    with pytest.raises(CheckpointError, match="should hold one component, holds"):
        load_network(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "dtype: float16 is refused: .* Stage C exceed its range.*use bfloat16"),
        ({"dtype": torch.float16}, "dtype: float16 is refused"),
        ({"dtype": "int8"}, "dtype: 'int8' is unknown; allowed are auto, float32, bfloat16"),
        ({"device": "quantum"}, "device: 'quantum' is not here; allowed are auto, cpu"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not here"),
        ({"device": "meta"}, "device: 'meta' is not here"),
    ],
)
def test_unknown_settings_are_refused_before_anything_is_read(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        load_cascade("nowhere/at-all", **arguments)


def test_automatic_types() -> None:
    assert parse_dtype("auto", torch.device("cpu")) is torch.float32
    assert parse_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert parse_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert parse_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("source", ["nowhere", "no/such/folder", "./x/y", "bad name/x", ""])
def test_a_source_that_is_not_there_says_what_can_be_given(source: str) -> None:
    for read in (load_cascade, load_network, inspect):
        with pytest.raises(CheckpointError, match=r"\S: no such checkpoint; give tiny, a folder"):
            read(source)
