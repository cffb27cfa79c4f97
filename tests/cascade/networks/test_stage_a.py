"""Stage A against diffusers, and strip by strip against the whole picture at once."""

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from cascade.checkpoints.configs import to_json
from cascade.checkpoints.keys import Component
from cascade.config import StageAConfig
from cascade.networks import stage_a
from cascade.networks.stage_a import StageA
from tests.cascade.networks.reference import TOLERANCE, difference, diffusers_names, noise, randomized, worst

PUBLISHED_SHAPE = StageAConfig(bottleneck_blocks=3, hidden_channels=48, codebook_size=32)
DEEP = StageAConfig(levels=3, bottleneck_blocks=1, hidden_channels=64, latent_channels=6, codebook_size=8)
FLAT = StageAConfig(levels=1, bottleneck_blocks=2, hidden_channels=20, codebook_size=8, scale_factor=1.7)
CONFIGS = {"published shape": PUBLISHED_SHAPE, "deep": DEEP, "flat": FLAT}


def reference(network: StageA) -> PaellaVQModel:
    """diffusers' Stage A with the dimensions and the weights of ours, without its scale factor."""
    settings = to_json(network.config)
    del settings["_class_name"]
    model = PaellaVQModel(**settings)
    model.load_state_dict(diffusers_names(Component.STAGE_A, network.state_dict()))
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.inference_mode()
def test_encode_equals_diffusers(config: StageAConfig) -> None:
    network = randomized(StageA(config), seed=1)
    stride = 2**config.levels
    pixels = noise(2, 2, 3, 9 * stride, 7 * stride)
    theirs = reference(network).encode(pixels).latents / config.scale_factor
    assert difference(theirs) > 0.3
    assert worst(network.encode(pixels), theirs) <= TOLERANCE


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.inference_mode()
def test_decode_equals_diffusers(config: StageAConfig) -> None:
    network = randomized(StageA(config), seed=3)
    latents = noise(4, 2, config.latent_channels, 9, 7)
    theirs = reference(network).decode(config.scale_factor * latents).sample
    assert difference(theirs) > 0.3
    assert worst(network.decode(latents), theirs) <= TOLERANCE


@torch.inference_mode()
def test_another_scale_factor_can_be_asked_for() -> None:
    network = randomized(StageA(PUBLISHED_SHAPE), seed=5)
    latents = noise(6, 1, 4, 5, 5)
    theirs = reference(network).decode(0.3764 * latents).sample
    assert worst(network.decode(latents, scale_factor=0.3764), theirs) <= TOLERANCE


@pytest.mark.parametrize("strip_elements", [1, 48 * 13 * 5, 1 << 30], ids=["narrow", "uneven", "whole"])
@torch.inference_mode()
def test_strips_join_without_a_seam(monkeypatch: pytest.MonkeyPatch, strip_elements: int) -> None:
    network = randomized(StageA(PUBLISHED_SHAPE), seed=7)
    latents = noise(8, 2, 4, 23, 13)
    expected = reference(network).decode(0.43 * latents).sample
    monkeypatch.setattr(stage_a, "_STRIP_ELEMENTS", strip_elements)
    assert worst(network.decode(latents), expected) <= TOLERANCE


@torch.inference_mode()
def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    network = randomized(StageA(PUBLISHED_SHAPE), seed=9)
    latents = noise(10, 2, 4, 6, 5)
    together = network.decode(latents)
    for row in range(2):
        # the same products, blocked otherwise by the matrix library when there are fewer rows
        assert worst(network.decode(latents[row : row + 1]), together[row : row + 1]) <= 1e-5


@torch.inference_mode()
def test_bf16_is_close_to_fp32() -> None:
    network = randomized(StageA(PUBLISHED_SHAPE), seed=11)
    latents = noise(12, 1, 4, 8, 8)
    exact = network.decode(latents)
    rounded = network.bfloat16().decode(latents.bfloat16())
    assert rounded.dtype == torch.bfloat16
    # 8 bits: 4e-3 relative error per layer, over some ten layers
    assert (rounded.float() - exact).square().mean().sqrt() <= 0.03 * exact.std()


def test_gradients_reach_every_weight_but_the_codebook() -> None:
    network = randomized(StageA(FLAT), seed=13)
    network.decode(network.encode(noise(14, 1, 3, 4, 4))).square().sum().backward()
    without = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert without == ["vquantizer.codebook.weight"]
