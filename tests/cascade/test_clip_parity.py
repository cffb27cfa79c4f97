"""How we use the CLIP towers, against a second, plain reading: which state, which masks, which token."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.conditioning import ImageEncoder, TextEncoder
from tests.cascade.diffusers_pipelines import Pipelines, random_pipelines
from tests.cascade.networks.reference import TOLERANCE, worst

Weights = Mapping[str, Tensor]
Activation = Callable[[Tensor], Tensor]

PROMPTS = ["", "a red circle", "Two words, and a very long rest that is cut off at the end of the window"]


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    return random_pipelines(seed=3)


def plain_text(model: CLIPTextModelWithProjection, ids: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
    """The state after the last layer, before the final norm (b, n, d), and the pooled, projected one (b, d).

    A position sees those before it and itself, but never a padded one; the first end token is pooled.
    """
    weights, config = model.state_dict(), model.config
    length = ids.shape[1]
    x = weights["text_model.embeddings.token_embedding.weight"][ids]
    x = x + weights["text_model.embeddings.position_embedding.weight"][:length]
    visible = torch.ones(length, length).tril().bool() & is_real[:, None, None, :].bool()
    for number in range(config.num_hidden_layers):
        x = plain_layer(
            weights, f"text_model.encoder.layers.{number}", x, config.num_attention_heads, visible, F.gelu
        )
    ends = [row.index(config.eos_token_id) for row in ids.tolist()]
    normed = plain_norm(weights, "text_model.final_layer_norm", x)
    pooled = torch.stack([normed[row, end] for row, end in enumerate(ends)])
    return x, pooled @ weights["text_projection.weight"].T


def plain_image(model: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """The projected class token (b, d), not normalised."""
    weights, config = model.state_dict(), model.config
    x = F.conv2d(pixels, weights["vision_model.embeddings.patch_embedding.weight"], stride=config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    first = weights["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + weights["vision_model.embeddings.position_embedding.weight"]
    x = plain_norm(weights, "vision_model.pre_layrnorm", x)
    for number in range(config.num_hidden_layers):
        prefix = f"vision_model.encoder.layers.{number}"
        x = plain_layer(
            weights, prefix, x, config.num_attention_heads, None, lambda y: y * torch.sigmoid(1.702 * y)
        )
    x = plain_norm(weights, "vision_model.post_layernorm", x[:, 0])
    return x @ weights["visual_projection.weight"].T


def plain_layer(
    weights: Weights, prefix: str, x: Tensor, heads: int, visible: Tensor | None, activation: Activation
) -> Tensor:
    """A pre-norm transformer layer; `visible` says which keys a query may see."""
    normed = plain_norm(weights, f"{prefix}.layer_norm1", x)
    query, key, value = (
        plain_linear(weights, f"{prefix}.self_attn.{name}_proj", normed)
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for name in "qkv"
    )
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    x = x + plain_linear(weights, f"{prefix}.self_attn.out_proj", attended)
    hidden = activation(
        plain_linear(weights, f"{prefix}.mlp.fc1", plain_norm(weights, f"{prefix}.layer_norm2", x))
    )
    return x + plain_linear(weights, f"{prefix}.mlp.fc2", hidden)


def plain_norm(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def plain_linear(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    return x @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]


@torch.inference_mode()
def test_text_equals_the_plain_reading(pipelines: Pipelines) -> None:
    tokenizer, model = pipelines.prior.tokenizer, pipelines.prior.text_encoder
    embeddings = TextEncoder(tokenizer, model).encode(PROMPTS)
    length = tokenizer.model_max_length
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    hidden, pooled = plain_text(model, tokens.input_ids, tokens.attention_mask)
    assert embeddings.hidden.shape == (3, length, model.config.hidden_size)
    assert worst(embeddings.hidden, hidden) <= TOLERANCE
    assert worst(embeddings.pooled, pooled[:, None]) <= TOLERANCE


@torch.inference_mode()
def test_the_padding_mask_matters_at_padded_positions_only(pipelines: Pipelines) -> None:
    tokenizer, model = pipelines.prior.tokenizer, pipelines.prior.text_encoder
    embeddings = TextEncoder(tokenizer, model).encode(["a red circle"])
    count = embeddings.num_tokens[0]
    ids = tokenizer(["a red circle"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    unmasked, _ = plain_text(model, ids, torch.ones_like(ids))
    assert worst(embeddings.hidden[:, :count], unmasked[:, :count]) <= TOLERANCE
    assert worst(embeddings.hidden[:, count:], unmasked[:, count:]) > 0.01


@torch.inference_mode()
def test_images_equal_the_plain_reading(pipelines: Pipelines) -> None:
    model, processor = pipelines.prior.image_encoder, pipelines.prior.feature_extractor
    noisy = np.random.default_rng(4).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    images = [Image.fromarray(noisy[0]), Image.fromarray(noisy[1, :33, :33])]
    pixels = processor(images=images, return_tensors="pt").pixel_values
    embeddings = ImageEncoder(processor, model).encode(images)
    assert worst(embeddings, plain_image(model, pixels)[:, None]) <= TOLERANCE
