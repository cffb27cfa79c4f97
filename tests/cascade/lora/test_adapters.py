"""LoRAs beside the weights give what merged weights give, and rows of a batch do not notice each other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.lora import LoRA, combine, merge, read_lora
from cascade.models import Models
from cascade.networks.adapters import Adapter, Change, can_be_beside
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from tests.cascade.lora.files import LAYOUTS, attention_factors, factors_of, peft, save
from tests.cascade.networks.reference import noise
from tests.cascade.small_models import small_cascade

Read = Callable[[dict[str, Tensor]], LoRA]


@pytest.fixture(scope="module")
def models() -> Models:
    return small_cascade()


@pytest.fixture
def read(models: Models, tmp_path: Path) -> Read:
    def call(tensors: dict[str, Tensor]) -> LoRA:
        return read_lora(save(tmp_path / "some.safetensors", tensors), models)

    return call


def prepared(stage: StageC, adapters: list[Adapter | None] | None, rows: int, seed: int = 2) -> Condition:
    text, pooled, image = noise(seed, rows, 6, 8), noise(seed + 1, rows, 1, 8), noise(seed + 2, rows, 1, 4)
    return stage.prepare(text, pooled, image, adapters=adapters)


@torch.inference_mode()
def run(stage: StageC, adapters: list[Adapter | None] | None, rows: int = 1) -> Tensor:
    condition = prepared(stage, adapters, rows)
    return stage(noise(5, rows, 16, 6, 5), torch.linspace(0.2, 0.8, rows), condition)


def linear_layers(stage: StageC) -> dict[str, tuple[int, ...]]:
    """Every layer that can be adapted by rows."""
    shapes = {}
    for name, weight in stage.named_parameters():
        path = name.replace(".in_proj_weight", ".in_proj.weight").removesuffix(".weight")
        if weight.dim() == 2 and can_be_beside(path):
            shapes[path] = tuple(weight.shape)
    return shapes


def test_every_linear_layer_of_the_blocks_can_be_adapted(models: Models) -> None:
    places = {path.split(".", 3)[-1] if "blocks" in path else path for path in linear_layers(models.stage_c)}
    assert places == {
        *("channelwise.0", "channelwise.4", "mapper", "mapper_sca", "mapper_crp", "kv_mapper.1"),
        *("attention.attn.in_proj", "attention.attn.out_proj"),
        *("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper"),
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_side_paths_are_as_good_as_merged_weights(models: Models, read: Read, seed: int) -> None:
    lora = read(peft(factors_of(linear_layers(models.stage_c), seed)))
    merged = run(merge(models, [(lora, 0.7)]).stage_c, None)
    beside = run(models.stage_c, [combine(models, [(lora, 0.7)])])
    assert (merged - run(models.stage_c, None)).abs().max() > 0.1
    torch.testing.assert_close(beside, merged, atol=1e-5, rtol=0)


def test_each_layer_by_itself_has_its_effect(models: Models, read: Read) -> None:
    plain = run(models.stage_c, None)
    for path, shape in linear_layers(models.stage_c).items():
        lora = read(peft(factors_of({path: shape}, 4)))
        beside = run(models.stage_c, [combine(models, [(lora, 1.0)])])
        merged = run(merge(models, [(lora, 1.0)]).stage_c, None)
        torch.testing.assert_close(beside, merged, atol=1e-5, rtol=0, msg=path)
        assert (beside - plain).abs().max() > 1e-4, path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_tell_the_same(models: Models, read: Read, layout: str) -> None:
    factors = attention_factors(models.stage_c, 1)
    blocks = combine(models, [(read(LAYOUTS[layout](factors)), 1.0)]).blocks
    told = {
        f"{block}.{place}": change for block, places in blocks.items() for place, change in places.items()
    }
    assert told.keys() == factors.keys()
    for path, (down, up) in factors.items():
        weight = torch.zeros(len(up), down.shape[1])
        torch.testing.assert_close(told[path].dense(weight), up @ down, atol=1e-6, rtol=1e-5)


def test_a_third_of_a_projection_may_be_changed_alone(models: Models, read: Read) -> None:
    factors = attention_factors(models.stage_c, 1)
    tensors = {name: tensor for name, tensor in peft(factors).items() if ".to_k." in name}
    adapter = combine(models, [(read(tensors), 1.0)])
    for path, (down, up) in factors.items():
        block, _, place = path.partition(".attention")
        if place.endswith("in_proj"):
            change = adapter.blocks[block]["attention" + place].dense(torch.zeros(len(up), down.shape[1]))
            queries, keys, values = change.chunk(3)
            torch.testing.assert_close(keys, up.chunk(3)[1] @ down)
            assert not queries.any()
            assert not values.any()


def test_several_add_up(models: Models, read: Read) -> None:
    one, two = (read(peft(attention_factors(models.stage_c, seed))) for seed in (1, 2))
    both = run(models.stage_c, [combine(models, [(one, 0.5), (two, -1.5)])])
    merged = run(merge(merge(models, [(one, 0.5)]), [(two, -1.5)]).stage_c, None)
    torch.testing.assert_close(both, merged, atol=1e-5, rtol=0)


def test_rows_of_different_adapters_are_those_of_lone_runs(models: Models, read: Read) -> None:
    shapes = linear_layers(models.stage_c)
    one, two, three = (combine(models, [(read(peft(factors_of(shapes, seed))), 1.0)]) for seed in (1, 2, 3))
    adapters = [one, None, two, three, None, one]
    rows = len(adapters)
    text, pooled, image = noise(2, rows, 6, 8), noise(3, rows, 1, 8), noise(4, rows, 1, 4)
    latents, ratio, stage = noise(5, rows, 16, 6, 5), torch.linspace(0.2, 0.8, rows), models.stage_c
    with torch.inference_mode():
        by_row = [(text[row : row + 1], pooled[row : row + 1], image[row : row + 1]) for row in range(rows)]
        conditions = [
            stage.prepare(*row, adapters=[adapter]) for row, adapter in zip(by_row, adapters, strict=True)
        ]
        together = stage(latents, ratio, Condition.cat(conditions))
        plain = stage(latents, ratio, Condition.cat([stage.prepare(*row) for row in by_row]))
        for row, adapter in enumerate(adapters):
            some = slice(row, row + 1)
            alone = stage(latents[some], ratio[some], conditions[row])
            assert torch.equal(together[some], alone), row
            assert torch.equal(together[row], plain[row]) == (adapter is None), row


def test_rows_of_one_adapter_may_be_computed_together(models: Models, read: Read) -> None:
    """As on a GPU, and where gradients are wanted: by adapter instead of by row."""
    shapes = linear_layers(models.stage_c)
    one, two = (combine(models, [(read(peft(factors_of(shapes, seed))), 1.0)]) for seed in (1, 2))
    mixtures: list[list[Adapter | None]] = [[one, None, two, one], [one] * 4, [None, one, None, one]]
    for adapters in mixtures:
        by_row = run(models.stage_c, adapters, rows=4)
        condition = prepared(models.stage_c, adapters, 4)
        together = models.stage_c(noise(5, 4, 16, 6, 5), torch.linspace(0.2, 0.8, 4), condition)
        torch.testing.assert_close(together, by_row, atol=1e-5, rtol=0)


def test_conditions_keep_their_adapters(models: Models) -> None:
    adapter = Adapter.of({})
    with_it, without = prepared(models.stage_c, [adapter], 1), prepared(models.stage_c, None, 2)
    joined = Condition.cat([without, with_it, without])
    assert joined.adapters == (None, None, adapter, None, None)
    assert joined[1:3].adapters == (None, adapter)
    assert joined[[2, 0]].adapters == (adapter, None)
    assert joined[torch.tensor([3, 2])].adapters == (None, adapter)
    assert joined[:2].adapters is None
    assert Condition.cat([without, without]).adapters is None
    assert prepared(models.stage_c, [None, None], 2).adapters is None


@pytest.mark.parametrize("axis", [1, 0], ids=["outputs", "inputs"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_dora_is_its_formula(models: Models, read: Read, axis: int, scale: float) -> None:
    factors = attention_factors(models.stage_c, 1) | factors_of(
        {"down_blocks.0.0.channelwise.0": (64, 16)}, seed=2
    )
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    adapted = peft(factors)
    for name in [name for name in adapted if ".lora_A" in name]:
        down, up = adapted[name], adapted[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("prior.").removesuffix(".lora_A.weight")
        weight = weight_at(models.stage_c, path)
        moved = weight + up @ down
        size = (len(weight), 1) if axis == 1 else (1, weight.shape[1])
        magnitude = torch.rand(size, generator=torch.Generator().manual_seed(len(tensors))) + 0.5
        tensors[f"prior.{path}.dora_scale"] = magnitude
        changed = magnitude * moved / moved.norm(dim=axis, keepdim=True)
        expected[path] = weight + scale * (changed - weight)
    lora = read(adapted | tensors)
    merged = merge(models, [(lora, scale)]).stage_c
    for path, weight in expected.items():
        torch.testing.assert_close(weight_at(merged, path), weight, atol=1e-5, rtol=1e-5)
    beside = run(models.stage_c, [combine(models, [(lora, scale)])])
    torch.testing.assert_close(beside, run(merged, None), atol=1e-5, rtol=0)


def weight_at(stage: StageC, path: str) -> Tensor:
    """The weight of a layer in diffusers' spelling."""
    outer, _, place = path.partition(".attention.")
    if place == "to_out.0":
        return stage.get_parameter(f"{outer}.attention.attn.out_proj.weight")
    if place:
        return stage.get_parameter(f"{outer}.attention.attn.in_proj_weight").chunk(3)["qkv".index(place[-1])]
    return stage.get_parameter(f"{path}.weight")


def test_gradients_reach_both_factors(models: Models) -> None:
    stage = models.stage_c
    factors = factors_of(linear_layers(stage), 1)
    changes = {
        path: Change(down.requires_grad_(), up.requires_grad_()) for path, (down, up) in factors.items()
    }
    adapter, other = Adapter.of(changes), Adapter.of({})
    mixtures: list[list[Adapter | None]] = [[adapter, adapter], [other, adapter], [None, adapter]]
    for adapters in mixtures:
        condition = prepared(stage, adapters, 2)
        noise_of = stage(noise(5, 2, 16, 6, 5), torch.tensor([0.3, 0.6]), condition)
        leaves = [factor for pair in factors.values() for factor in pair]
        for path, gradient in zip(
            [path for path in factors for _ in range(2)],
            torch.autograd.grad(noise_of[1].square().sum(), leaves),
            strict=True,
        ):
            assert gradient.abs().max() > 0, path


def test_convolutions_can_only_be_merged(models: Models, read: Read) -> None:
    path = "down_blocks.0.0.depthwise"
    down, up = noise(1, 2, 1, 3, 3), noise(2, 16, 2, 1, 1)
    lora = read({f"prior.{path}.lora_A.weight": down, f"prior.{path}.lora_B.weight": up})
    with pytest.raises(ValueError, match=f"must be merged.*prior.{path}.lora_A.weight"):
        combine(models, [(lora, 1.0)])
    merged = merge(models, [(lora, 2.0)]).stage_c.get_parameter(f"{path}.weight")
    product = torch.einsum("orxy,rihw->oihw", up, down)
    torch.testing.assert_close(merged - models.stage_c.get_parameter(f"{path}.weight"), 2 * product)


def test_merging_leaves_the_models_as_they_are(models: Models, read: Read) -> None:
    before = run(models.stage_c, None)
    merge(models, [(read(peft(attention_factors(models.stage_c, 1))), 1.0)])
    assert torch.equal(run(models.stage_c, None), before)
