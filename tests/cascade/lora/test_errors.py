"""Files that are unknown, do not fit or are hostile are refused by one line that names their tensors."""

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.errors import CheckpointError
from cascade.lora import read_lora
from cascade.models import Models
from tests.cascade.lora.files import attention_factors, kohya, official, peft, save
from tests.cascade.small_models import small_cascade


@pytest.fixture(scope="module")
def models() -> Models:
    return small_cascade()


def refusal(models: Models, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_lora(path, models)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def refused(models: Models, tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    return refusal(models, save(tmp_path / "some.safetensors", tensors))


def test_tensors_of_no_layer_are_named(models: Models, tmp_path: Path) -> None:
    tensors = peft(attention_factors(models.stage_c, 1))
    tensors["prior.down_blocks.7.2.attention.to_q.lora_A.weight"] = torch.ones(1, 1)
    tensors["alien"] = torch.ones(1)
    message = refused(models, tmp_path, tensors)
    assert "alien, prior.down_blocks.7.2.attention.to_q.lora_A.weight;" in message


def test_a_whole_model_is_no_lora(models: Models, tmp_path: Path) -> None:
    message = refused(models, tmp_path, dict(models.stage_c.state_dict()))
    assert "tensors of no layer" in message
    assert "more" in message
    assert "alpha" in refused(models, tmp_path, {"prior.down_blocks.0.1.mapper.alpha": torch.ones(())})


def test_an_official_file_for_another_network(models: Models, tmp_path: Path) -> None:
    tensors = official(attention_factors(models.stage_c, 1))
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("weights.7.")}
    assert "weights.7" in refused(models, tmp_path, fewer)
    more = tensors | {"weights.8.lora_up": torch.ones(16, 1), "weights.8.lora_down": torch.ones(1, 16)}
    assert "weights.8.lora_" in refused(models, tmp_path, more)
    assert "strange" in refused(models, tmp_path, tensors | {"strange": torch.ones(1)})


def test_one_factor_alone(models: Models, tmp_path: Path) -> None:
    tensors = kohya(attention_factors(models.stage_c, 1))
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    del tensors[name]
    message = refused(models, tmp_path, tensors)
    assert "lora_up is missing beside" in message
    assert name.replace("_up", "_down") in message


@pytest.mark.parametrize(
    ("down", "up"),
    [((3, 15), (16, 3)), ((3, 16), (17, 3)), ((3, 16), (16, 4)), ((3, 16, 1), (16, 3)), ((16,), (16,))],
)
def test_shapes_that_do_not_fit(
    models: Models, tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    name = "prior.down_blocks.0.2.attention.to_out.0"
    tensors = {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}
    if down == (3, 16, 1):  # a trailing axis of one is no fault
        read_lora(save(tmp_path / "some.safetensors", tensors), models)
        return
    message = refused(models, tmp_path, tensors)
    assert f"{name}.lora_A.weight" in message
    assert "[16, 16]" in message


def test_hostile_ranks_and_numbers(models: Models, tmp_path: Path) -> None:
    name = "prior.down_blocks.0.2.attention.to_out.0"
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(1025, 16),
        f"{name}.lora_B.weight": torch.zeros(16, 1025),
    }
    assert "1025" in refused(models, tmp_path, tensors)
    tensors = peft(attention_factors(models.stage_c, 1))
    for value in (float("nan"), float("inf")):
        tensors[f"{name}.lora_B.weight"][3, 1] = value
        message = refused(models, tmp_path, tensors)
        assert name in message
        assert "not finite" in message
    kohyas = kohya(attention_factors(models.stage_c, 1), alpha=float("nan"))
    assert "alpha" in refused(models, tmp_path, kohyas)
    kohyas = {
        key: torch.ones(2) if key.endswith("alpha") else tensor
        for key, tensor in kohya(attention_factors(models.stage_c, 1)).items()
    }
    assert "alpha" in refused(models, tmp_path, kohyas)


def test_a_header_that_claims_more_than_the_file_has(models: Models, tmp_path: Path) -> None:
    header = {
        "prior.down_blocks.0.2.attention.to_out.0.lora_A.weight": {
            "dtype": "F32",
            "shape": [10**9, 16],
            "data_offsets": [0, 64 * 10**9],
        }
    }
    text = json.dumps(header).encode()
    path = tmp_path / "some.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "lies" in refusal(models, path)


def test_a_dora_scale_that_fits_neither_side(models: Models, tmp_path: Path) -> None:
    tensors = peft(attention_factors(models.stage_c, 1))
    tensors["prior.down_blocks.0.2.attention.to_out.0.dora_scale"] = torch.ones(15, 1)
    assert "DoRA scale" in refused(models, tmp_path, tensors)


def test_a_layer_in_two_spellings(models: Models, tmp_path: Path) -> None:
    factors = attention_factors(models.stage_c, 1)
    message = refused(models, tmp_path, peft(factors) | kohya(factors))
    assert "twice" in message


def test_pickles_are_refused(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    path.write_bytes(b"anything")
    assert "pickle" in refusal(models, path)
