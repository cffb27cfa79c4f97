"""The fused CPU operators against the plain formulas, and their block against its training path."""

import gc
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.networks import fused
from cascade.networks.blocks import Downsample, ResBlock, Upsample
from cascade.networks.fused import (
    _attention_in_pieces,
    _packed_linear,
    attention,
    energy,
    layer_norm,
    linear,
    linear_add,
    linear_add_each,
    linear_gelu,
    packed_linear,
)
from cascade.networks.stage_b import StageB
from cascade.networks.unet import Condition
from tests.cascade.networks.reference import noise, randomized, worst
from tests.cascade.small_models import STAGE_B

HALF_STEP = 2**-8  # of bf16, relative: one rounding of the result, and nothing else, separates the two


def close_in_bf16(ours: Tensor, exact: Tensor) -> bool:
    return bool(((ours.double() - exact.double()).abs() <= HALF_STEP * exact.double().abs() + 1e-4).all())


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What makes small products in fp32: in the second case, MKL even where it is slow."""
    is_mkl = request.param == "MKL"
    if is_mkl and not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("there is no MKL")
    monkeypatch.setattr(fused, "_has_fast_mkl", lambda: is_mkl)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_fused_layers_equal_the_formulas(dtype: torch.dtype, library: str) -> None:
    x, weight = noise(1, 2, 5, 7, 32).to(dtype), (noise(2, 48, 32) / 5).to(dtype)
    bias, residual = noise(3, 48).to(dtype), noise(4, 2, 48, 5, 7).to(dtype).permute(0, 2, 3, 1)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for packed in (None, packed_linear(weight)):
        assert close_in_bf16(linear(x, weight, bias, packed), exact)
        assert close_in_bf16(linear_gelu(x, weight, bias, packed), F.gelu(exact))
        assert close_in_bf16(linear_add(x, weight, bias, residual, packed), residual.double() + exact)
    is_mkl = library == "MKL" and dtype is torch.float32
    assert (packed is not None and packed.for_mkl(x) is not None) is is_mkl


@pytest.mark.skipif(not fused._has_fast_mkl(), reason="this processor is not MKL's maker's")
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 384), (384, 96), (112, 336), (512, 512)])
@torch.inference_mode()
def test_mkl_gives_a_row_the_same_alone_and_in_company(inputs: int, outputs: int, threads: int) -> None:
    weight, bias, before = noise(1, outputs, inputs), noise(2, outputs), torch.get_num_threads()
    packed = packed_linear(weight)
    assert packed is not None
    torch.set_num_threads(threads)
    try:
        for tokens in (2, 4, 9, 36, 64, 250):
            x, residual = noise(3, 8, tokens, inputs), noise(4, 8, tokens, outputs)
            assert packed.for_mkl(x) is not None
            together = linear_add(x, weight, bias, residual, packed)
            for rows in (slice(0, 1), slice(7, 8), slice(2, 5)):
                some = linear_add(x[rows], weight, bias, residual[rows], packed)
                assert torch.equal(some, together[rows]), (tokens, rows)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_mkl_is_not_used_where_its_sums_depend_on_the_batch(library: str) -> None:
    layers = {inputs: packed_linear(noise(1, 16, inputs)) for inputs in (24, 512, 528)}
    layers[32] = packed_linear(noise(1, 24, 32))
    chosen = {
        (inputs, tokens): packed is not None and packed.for_mkl(noise(2, 3, tokens, inputs)) is not None
        for inputs, packed in layers.items()
        for tokens in (1, 2)
    }
    assert [each for each, is_mkl in chosen.items() if is_mkl] == ([(512, 2)] if library == "MKL" else [])


@torch.inference_mode()
def test_a_batch_may_be_empty(library: str) -> None:
    weight, bias = noise(1, 32, 16), noise(2, 32)
    assert linear(noise(3, 0, 4, 16), weight, bias, packed_linear(weight)).shape == (0, 4, 32), library


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
@torch.inference_mode()
def test_only_small_weights_are_packed() -> None:
    assert packed_linear(torch.zeros(512, 512)) is not None
    assert packed_linear(torch.zeros(512, 513)) is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
@torch.inference_mode()
def test_packed_weights_are_kept_as_long_as_the_weight() -> None:
    gc.collect()
    before, weight = len(_packed_linear), torch.ones(8, 8)
    assert packed_linear(weight) is packed_linear(weight)
    assert len(_packed_linear) == before + 1
    del weight
    assert len(_packed_linear) == before


@torch.inference_mode()
def test_where_packed_weights_cannot_be_read_the_plain_ones_are() -> None:
    x, weight, bias = noise(1, 5, 24), noise(2, 40, 24), noise(3, 40)
    packed = packed_linear(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias, packed), F.linear(x, weight, bias))
        assert torch.equal(linear_gelu(x, weight, bias, packed), F.gelu(F.linear(x, weight, bias)))
        assert torch.equal(linear_add(x, weight, bias, bias, packed), bias + F.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 9, 11, 4096), (3, 64, 64, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_is_the_norm_over_the_picture_in_fp32(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = noise(5, *shape).to(dtype)
    exact = x.double().square().sum(dim=(1, 2), keepdim=True).sqrt()
    # fp32 sums of some thousand positive numbers, piece by piece
    assert (energy(x) / exact - 1).abs().max() <= 2e-6


@pytest.mark.parametrize("shape", [(2, 4, 5, 24), (2, 16, 16, 24), (1, 40, 33, 96)])
@pytest.mark.parametrize("has_gain", [False, True])
@torch.inference_mode()
def test_layer_norm_equals_the_formula_far_from_zero(shape: tuple[int, ...], has_gain: bool) -> None:
    x = noise(5, *shape) + 30
    exact = F.layer_norm(x.double(), shape[-1:], eps=1e-6)
    if not has_gain:
        assert worst(layer_norm(x), exact) <= 2e-5
        return
    gain, bias = torch.tensor(1.5), torch.tensor(-0.25)
    assert worst(layer_norm(x, gain, bias), exact * 1.5 - 0.25) <= 2e-5


def test_large_values_do_not_overflow_the_energy() -> None:
    x = torch.full((1, 4, 4, 8), 2e15, dtype=torch.bfloat16)
    assert energy(x).isfinite().all()


@pytest.mark.parametrize("side", [3, 30, 120], ids=["few tokens", "scales the map", "scales the weights"])
@pytest.mark.parametrize(("skip_channels", "kernel_size"), [(0, 3), (20, 5)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
def test_a_block_gives_the_same_with_and_without_gradients(
    side: int, skip_channels: int, kernel_size: int, dtype: torch.dtype, limit: float
) -> None:
    block = randomized(ResBlock(20, skip_channels, kernel_size), seed=6).to(dtype)
    x = noise(7, 2, side, side + 1, 20).to(dtype)
    skip = noise(8, 2, side, side + 1, skip_channels).to(dtype) if skip_channels else None
    kept = x.clone()
    recorded = block(x, skip)
    with torch.inference_mode():
        quick = block(x, skip)
    assert recorded.requires_grad
    assert worst(quick.float(), recorded.float()) <= limit * recorded.abs().max().item()
    assert torch.equal(x, kept)


@torch.inference_mode()
def test_weights_that_were_put_in_order_are_what_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomized(StageB(STAGE_B), seed=1)
    given = prepared_step(network)
    expected = network(*given)
    for kind in (Downsample, Upsample):
        monkeypatch.setattr(kind, "step_weights", lambda _: pytest.fail("put in order during a step"))
    assert torch.equal(network(*given), expected)


@torch.inference_mode()
def test_a_map_without_any_energy_gives_finite_numbers() -> None:
    block = randomized(ResBlock(20), seed=6)
    for parameter in cast(nn.Linear, block.channelwise[0]).parameters():
        parameter.zero_()
    assert block(noise(7, 2, 5, 5, 20)).isfinite().all()


@pytest.mark.parametrize("tokens", [9, 36, 64, 250, 1024])
@pytest.mark.parametrize(("narrow", "wide"), [(96, 384), (112, 448)])
@pytest.mark.parametrize("is_packed", [False, True])
@torch.inference_mode()
def test_fused_layers_give_a_row_the_same_alone_and_in_company(
    tokens: int, narrow: int, wide: int, is_packed: bool
) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(5, tokens, narrow), torch.randn(5, tokens, wide)
    weight, bias = torch.randn(wide, narrow), torch.randn(wide)
    packed = packed_linear(weight) if is_packed else None
    layers = {
        "linear": lambda rows: linear(x[rows], weight, bias, packed),
        "gelu": lambda rows: linear_gelu(x[rows], weight, bias, packed),
        "add": lambda rows: linear_add(x[rows], weight, bias, residual[rows], packed),
    }
    for name, layer in layers.items():
        alone = [layer(slice(row, row + 1)) for row in range(len(x))]
        assert torch.equal(torch.cat(alone), layer(slice(None))), name


@pytest.mark.parametrize("is_compiled", [False, True])
@torch.inference_mode()
def test_pictures_with_weights_of_their_own(is_compiled: bool) -> None:
    """As one by one, and compiled, where that is not for the number of pictures that came first."""
    traced: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        traced.append(module)
        return module

    layer = torch.compile(linear_add_each, backend=backend, dynamic=True)
    x, weights = noise(1, 5, 6, 7, 24), noise(2, 5, 40, 24) / 5
    bias, residual = noise(3, 40), noise(4, 5, 6, 7, 40)
    kept = residual.clone()
    for rows in (2, 3, 5):
        given = x[:rows], weights[:rows], bias, residual[:rows]
        alone = [linear_add(x[n][None], weights[n], bias, residual[n][None]) for n in range(rows)]
        if is_compiled:
            assert (layer(*given) - torch.cat(alone)).abs().max() <= 1e-5
        else:
            assert torch.equal(linear_add_each(*given), torch.cat(alone))
    assert len(traced) == int(is_compiled)
    assert torch.equal(residual, kept)
    with torch.autocast("cpu", torch.bfloat16):  # of what comes before, x alone is rounded
        rounded = (layer if is_compiled else linear_add_each)(x.bfloat16(), weights, bias, residual)
    assert (rounded - torch.cat(alone)).abs().max() <= 0.1


def query_key_value(rows: int, heads: int, n: int, m: int) -> list[Tensor]:
    """In bf16, laid out as the network's projections leave them."""
    sizes = {21: n, 22: m, 23: m}
    return [noise(seed, rows, size, heads, 16).bfloat16().transpose(1, 2) for seed, size in sizes.items()]


@pytest.mark.parametrize(
    ("heads", "n", "m"),
    [
        pytest.param(5, 200, 213, id="one piece"),
        pytest.param(3, 900, 931, id="pieces of some heads"),
        pytest.param(1, 1500, 1511, id="pieces of some queries"),
    ],
)
@pytest.mark.parametrize("offset", [0, 8])  # a share of all keys, whose scores the softmax does not see
@pytest.mark.parametrize("factor", [1, 16])
@torch.inference_mode()
def test_attention_in_pieces_is_as_exact_as_the_fused_operator(
    heads: int, n: int, m: int, offset: float, factor: float
) -> None:
    query, key, value = query_key_value(2, heads, n, m)
    common = noise(24, heads, 1, 16)
    query, key = ((query + common) * factor).bfloat16(), (key + offset * common).bfloat16()
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())

    def error(attended: Tensor) -> float:
        return float((attended.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    fused = error(F.scaled_dot_product_attention(query, key, value))
    # twice a rounding to 8 bits: of the weights of the values, and of the difference of each from the largest
    assert error(_attention_in_pieces(query, key, value)) <= fused + 2**-9


@pytest.mark.parametrize(
    ("dtype", "n", "m", "is_in_pieces"),
    [
        (torch.bfloat16, 300, 309, True),
        (torch.float32, 300, 309, False),
        (torch.bfloat16, 40, 49, False),
        (torch.bfloat16, 40, 4000, False),
    ],
)
@torch.inference_mode()
def test_only_large_pictures_in_bf16_are_attended_in_pieces(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n: int, m: int, is_in_pieces: bool
) -> None:
    monkeypatch.setattr(fused, "_has_fast_products", lambda: True)
    monkeypatch.setattr(fused, "_fused_dtypes", lambda: (torch.float32, torch.bfloat16))
    in_pieces = torch.zeros(())
    monkeypatch.setattr(fused, "_attention_in_pieces", lambda *_: in_pieces)
    query, key, value = (tensor.to(dtype) for tensor in query_key_value(1, 4, n, m))
    assert (attention(query, key, value) is in_pieces) is is_in_pieces


@pytest.mark.parametrize("n", [40, 300, 1500])
@torch.inference_mode()
def test_attention_in_bf16_gives_a_row_the_same_alone_and_in_company(n: int) -> None:
    query, key, value = query_key_value(3, 2, n, n + 9)
    together = attention(query, key, value)
    for row in range(3):
        assert torch.equal(attention(query[row, None], key[row, None], value[row, None])[0], together[row])


def prepared_step(network: StageB) -> tuple[Tensor, Tensor, Condition]:
    condition = network.prepare(noise(1, 1, 16, 3, 3), noise(2, 1, 1, 8), (24, 24))
    return noise(3, 1, 4, 24, 24), torch.tensor([0.4]), condition


def test_gradients_reach_all_weights_of_what_was_prepared_without_them() -> None:
    network = randomized(StageB(STAGE_B), seed=1)
    with torch.no_grad():
        given = prepared_step(network)
    network(*given).square().mean().backward()
    blocks = [block for block in network.modules() if isinstance(block, ResBlock | Downsample | Upsample)]
    assert {type(block) for block in blocks} == {ResBlock, Downsample, Upsample}
    for block in blocks:
        assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.0.depthwise.weight",
        "down_blocks.0.0.channelwise.0.weight",
        "up_blocks.0.0.channelwise.4.weight",
        "down_blocks.1.2.attention.attn.in_proj_weight",
        "down_blocks.1.2.attention.attn.out_proj.weight",
        "down_downscalers.1.1.weight",
        "up_upscalers.0.1.weight",
        "up_upscalers.0.1.bias",
        "down_blocks.0.0.channelwise.2.gamma",
        "down_blocks.0.0.channelwise.2.beta",
    ],
)
@torch.no_grad()
def test_a_changed_weight_counts_from_the_next_preparation_on(name: str) -> None:
    """Even when it is changed behind the back of PyTorch, which does not count that."""
    network = randomized(StageB(STAGE_B), seed=1)
    before = network(*prepared_step(network))
    network.get_parameter(name).data.mul_(2)
    after = network(*prepared_step(network))
    assert worst(after, before) > 1e-3
    again = randomized(StageB(STAGE_B), seed=1)
    again.get_parameter(name).mul_(2)
    assert torch.equal(after, again(*prepared_step(again)))


@torch.no_grad()
def test_a_network_may_change_its_type_between_two_runs() -> None:
    network = randomized(StageB(STAGE_B), seed=1)
    before = network(*prepared_step(network))
    network.to(torch.bfloat16).to(torch.float32)
    rounded = network(*prepared_step(network))
    network.to(torch.bfloat16)
    assert network.constants().res_weights[0].kernel.dtype is torch.bfloat16
    assert 0 < worst(rounded, before) < 0.1
