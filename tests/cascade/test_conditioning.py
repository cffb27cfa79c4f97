"""The CLIP towers as Stage C needs them: padding mask, states before the final norm, first end token."""

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import ImageEncoder, TextEncoder
from tests.cascade.diffusers_pipelines import Pipelines, random_pipelines


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    made = random_pipelines(1)
    made.prior.text_encoder.requires_grad_(False)
    return made


@pytest.fixture
def encoder(pipelines: Pipelines) -> TextEncoder:
    return TextEncoder(pipelines.prior.tokenizer, pipelines.prior.text_encoder)


def by_diffusers(pipelines: Pipelines, prompt: str, negative_prompt: str = "") -> tuple[Tensor, ...]:
    """Prompt, pooled prompt, negative prompt and pooled negative prompt."""
    embeddings: tuple[Tensor, ...] = pipelines.prior.encode_prompt(
        device=torch.device("cpu"),
        batch_size=1,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        prompt=prompt,
        negative_prompt=negative_prompt,
    )
    return embeddings


def test_embeddings_are_those_of_the_diffusers_pipeline(pipelines: Pipelines, encoder: TextEncoder) -> None:
    hidden, pooled, negative_hidden, negative_pooled = by_diffusers(pipelines, "A red circle", "blurry")
    embeddings = encoder.encode(["A red circle", "blurry"])
    torch.testing.assert_close(embeddings.hidden, torch.cat([hidden, negative_hidden]), atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings.pooled, torch.cat([pooled, negative_pooled]), atol=1e-5, rtol=0)
    assert embeddings.hidden.shape == (2, 24, 96)
    assert embeddings.pooled.shape == (2, 1, 96)


def test_hidden_states_are_those_before_the_final_norm(encoder: TextEncoder) -> None:
    embeddings = encoder.encode(["red"])
    tokens = encoder.tokenizer(["red"], padding="max_length", return_tensors="pt")
    output = encoder.model.text_model(**tokens)
    normed = encoder.model.text_model.final_layer_norm(embeddings.hidden)
    torch.testing.assert_close(normed, output.last_hidden_state, atol=1e-5, rtol=0)
    assert (embeddings.hidden - output.last_hidden_state).abs().max() > 0.1


def test_the_padding_mask_changes_the_padded_rows(encoder: TextEncoder) -> None:
    embeddings = encoder.encode(["red"])
    tokens = encoder.tokenizer(["red"], padding="max_length", return_tensors="pt")
    unmasked = encoder.model.text_model(tokens.input_ids, output_hidden_states=True).hidden_states[-1]
    num_real = embeddings.num_tokens[0]
    torch.testing.assert_close(embeddings.hidden[:, :num_real], unmasked[:, :num_real], atol=1e-5, rtol=0)
    assert (embeddings.hidden[:, num_real:] - unmasked[:, num_real:]).abs().max() > 0.01


@pytest.mark.parametrize("stated_end", [513, 2])
def test_pooling_takes_the_first_end_token_even_with_larger_ids_before_it(
    pipelines: Pipelines, stated_end: int
) -> None:
    """Old configurations state 2, which makes transformers take the largest id: an added word instead."""
    model = copy.deepcopy(pipelines.prior.text_encoder)

    class Tokens(dict[str, Tensor]):
        input_ids = torch.tensor([[512, 514, 5, 513, 513, 513]])
        attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0]])

        def to(self, _: torch.device) -> "Tokens":
            return self

    class Tokenizer:
        model_max_length = 6
        eos_token_id = 513

        def __call__(self, _: list[str], **options: Any) -> Any:
            return (
                Tokens()
                if "return_tensors" in options
                else type("Ids", (), {"input_ids": [[512, 514, 5, 513]]})
            )

    table = torch.cat([model.get_input_embeddings().weight.detach(), torch.ones(1, 96)])
    model.text_model.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(table)
    model.text_model.eos_token_id = stated_end
    embeddings = TextEncoder(Tokenizer(), model).encode(["<added> x"])
    end = model.text_model.final_layer_norm(embeddings.hidden[:, 3:4])
    torch.testing.assert_close(embeddings.pooled, model.text_projection(end), atol=1e-5, rtol=0)


def test_an_empty_prompt_is_a_prompt(pipelines: Pipelines, encoder: TextEncoder) -> None:
    embeddings = encoder.encode([""])
    assert embeddings.num_tokens == (2,)
    assert embeddings.pooled.abs().max() > 0.1


@pytest.mark.parametrize("prompt", ["\0", "a\0b", "\u200b \U0001f600"])
def test_odd_characters_are_embedded_like_others(encoder: TextEncoder, prompt: str) -> None:
    embeddings = encoder.encode([prompt])
    assert embeddings.num_tokens[0] > 2
    assert embeddings.pooled.isfinite().all()


def test_long_prompts_are_cut_and_flagged(pipelines: Pipelines, encoder: TextEncoder) -> None:
    # one token per letter here, and begin and end: 22 letters just fit
    embeddings = encoder.encode(["a" * 22, "a" * 23, "a" * 5000])
    assert embeddings.num_tokens == (24, 25, 5002)
    assert embeddings.truncated == (False, True, True)
    hidden, pooled, _, _ = by_diffusers(pipelines, "a" * 5000)
    torch.testing.assert_close(embeddings.hidden[2:], hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings.pooled[2:], pooled, atol=1e-5, rtol=0)


def test_prompts_do_not_notice_each_other(encoder: TextEncoder) -> None:
    together = encoder.encode(["a red circle", "", "blue"])
    alone = encoder.encode(["a red circle"])
    torch.testing.assert_close(together.hidden[:1], alone.hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.pooled[:1], alone.pooled, atol=1e-5, rtol=0)


def test_image_embeddings_are_those_of_the_diffusers_pipeline(pipelines: Pipelines) -> None:
    prior = pipelines.prior
    encoder = ImageEncoder(prior.feature_extractor, prior.image_encoder)
    images = [
        Image.linear_gradient("L").convert("RGB"),
        Image.radial_gradient("L").resize((90, 60)).convert("RGB"),
    ]
    expected, _ = prior.encode_image(images, torch.device("cpu"), torch.float32, 1, 1)
    embeddings = encoder.encode(images)
    assert embeddings.shape == (2, 1, 48)
    torch.testing.assert_close(embeddings[:, 0], expected[0], atol=1e-5, rtol=0)
