"""Training of the encoder and the previewer: their targets and norms, and that the results can be loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cascade.networks.effnet import EffNetEncoder, resize_for_encoder
from cascade.networks.previewer import Previewer
from cascade.training import encoder
from cascade.training.loop import Plan
from cascade.training.scenes import NATIVE_SIZES, held_out_generator, sample_scene


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_BATCH", 4)
    monkeypatch.setattr(encoder, "_NORM_BATCHES", 2)
    monkeypatch.setattr(encoder, "_HELD_OUT_PICTURES", 2)


@pytest.mark.parametrize("size", NATIVE_SIZES, ids=str)
@torch.inference_mode()
def test_encoder_and_previewer_fit_the_code_at_every_size(size: tuple[int, int]) -> None:
    networks = encoder.EncoderAndPreviewer().eval()
    pictures, codes = encoder.scenes_and_codes([sample_scene(held_out_generator(1), size)])
    assert networks.encoder(resize_for_encoder(pictures)).shape == codes.shape
    assert networks.previewer(codes).shape == encoder.previews(pictures, codes).shape


def test_previews_are_the_picture_made_small() -> None:
    pictures, codes = encoder.scenes_and_codes([sample_scene(held_out_generator(2))])
    previews = encoder.previews(pictures, codes)
    assert previews.shape == (1, 3, 48, 48)
    assert torch.allclose(previews.mean((2, 3)), pictures.mean((2, 3)), atol=0.005)


def test_norms_are_those_of_the_present_weights(small_batches: None) -> None:
    networks = encoder.EncoderAndPreviewer()
    first = networks.previewer.blocks[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    nn.init.constant_(first.bias, 10)
    encoder.estimate_norms(networks, Plan(steps=0, learning_rate=1))
    after_activation = networks.previewer.blocks[2]
    assert isinstance(after_activation, nn.BatchNorm2d)
    assert after_activation.running_mean is not None
    assert torch.allclose(after_activation.running_mean, torch.full((64,), 10.0), atol=1.5)
    assert not networks.training


def test_both_networks_learn(small_batches: None) -> None:
    networks = encoder.EncoderAndPreviewer()
    value, figures = encoder.loss(networks, 0, np.random.default_rng(1))
    value.backward()
    without = [name for name, weight in networks.named_parameters() if not weight.grad.abs().sum() > 0]  # type: ignore[union-attr]
    assert without == []
    assert value.item() == pytest.approx(figures["code"] + figures["preview"], rel=1e-4)


def test_training_writes_both_components(tmp_path: Path, small_batches: None) -> None:
    encoder.train(tmp_path, Plan(steps=2, learning_rate=1e-3))
    for folder, network in {
        "effnet_encoder": EffNetEncoder(encoder.TINY_EFFNET),
        "previewer": Previewer(encoder.TINY_PREVIEWER),
    }.items():
        weights = load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        missing, unexpected = network.load_state_dict(weights, strict=False)
        assert all(name.endswith("num_batches_tracked") for name in missing)
        assert unexpected == []


@torch.inference_mode()
def test_figures_of_an_untrained_encoder_are_bad() -> None:
    figures = encoder.figures(encoder.EncoderAndPreviewer().eval(), count=2)
    assert figures["all"] == 0
    assert figures["code_error"] > 0.3
