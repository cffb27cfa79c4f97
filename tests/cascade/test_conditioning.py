"""The CLIP towers as Stage C needs them: padding mask, states before the final norm, first end token."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import ImageEncoder, TextEncoder, encode_texts, pad_chunks
from cascade.errors import InvalidSetting
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

    class Tokenizer:
        model_max_length = 6
        bos_token_id, eos_token_id, pad_token_id = 512, 513, 513

        def __call__(self, _: list[str], **options: Any) -> Any:
            return SimpleNamespace(input_ids=[[514, 5]])

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


def test_without_weights_and_length_every_bit_is_that_of_the_ordinary_embedding(encoder: TextEncoder) -> None:
    for prompt, plain in [("a red", "a red"), ("", ""), ("(a:1) red", "a red"), (r"a \(b\)", "a (b)")]:
        expected = encoder.encode([plain])
        embeddings = encoder.encode([prompt], weighted=True, long=True)
        assert torch.equal(embeddings.hidden, expected.hidden), prompt
        assert torch.equal(embeddings.pooled, expected.pooled), prompt
        assert (embeddings.num_tokens, embeddings.truncated) == (expected.num_tokens, expected.truncated)


def test_brackets_are_text_unless_asked_for(encoder: TextEncoder) -> None:
    assert encoder.encode(["(a:2)"]).num_tokens[0] > encoder.encode(["a"]).num_tokens[0]


def test_a_weight_scales_the_difference_from_the_empty_prompt(encoder: TextEncoder) -> None:
    plain, empty = encoder.encode(["a b c"]), encoder.encode([""])
    weighted = encoder.encode(["a (b:1.5) c"], weighted=True)
    tokens = encoder.tokenizer("a b c").input_ids
    changed = [at for at in range(24) if not torch.equal(weighted.hidden[0, at], plain.hidden[0, at])]
    assert 0 < len(changed) < len(tokens) - 2
    assert "".join(encoder.tokenizer.decode([tokens[at]]) for at in changed).strip() == "b"
    at = changed[0]
    expected = empty.hidden[0, at] + 1.5 * (plain.hidden[0, at] - empty.hidden[0, at])
    torch.testing.assert_close(weighted.hidden[0, at], expected, atol=1e-5, rtol=0)
    assert torch.equal(weighted.pooled, plain.pooled)
    nothing = encoder.encode(["a (b:0) c"], weighted=True)
    assert torch.equal(nothing.hidden[0, at], empty.hidden[0, at])


def test_weights_of_a_prompt_that_is_cut_are_those_of_what_is_left(encoder: TextEncoder) -> None:
    cut = encoder.encode(["(a:2)" + "a" * 40], weighted=True)
    plain = encoder.encode(["a" * 41])
    assert cut.truncated == (True,)
    assert cut.num_tokens == plain.num_tokens == (43,)
    assert cut.hidden.shape == plain.hidden.shape
    assert not torch.equal(cut.hidden[:, 1], plain.hidden[:, 1])
    assert torch.equal(cut.hidden[:, 2:], plain.hidden[:, 2:])


def test_long_prompts_are_read_in_chunks_of_the_window(encoder: TextEncoder) -> None:
    # one token per letter here, so 22 letters fill a window
    embeddings = encoder.encode(["a" * 22 + "b" * 22 + "c"], long=True)
    parts = [encoder.encode([part]) for part in ("a" * 22, "b" * 22, "c")]
    assert (embeddings.num_tokens, embeddings.truncated) == ((47,), (False,))
    assert embeddings.hidden.shape == (1, 3 * 24, 96)
    # Letters in the middle of a word have tokens of their own, and the last of a word another.
    assert_same_but_for_the_ends_of_words(embeddings.hidden, torch.cat([part.hidden for part in parts], 1))
    assert embeddings.pooled.shape == (1, 1, 96)
    assert not torch.equal(embeddings.hidden[:, :24], embeddings.hidden[:, 24:48])


def assert_same_but_for_the_ends_of_words(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found[:, :20], expected[:, :20], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 24:44], expected[:, 24:44], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 48:], expected[:, 48:], atol=1e-5, rtol=0)


def test_chunks_of_words_are_the_windows_of_these_words(encoder: TextEncoder) -> None:
    words = ["a b c d e f g h i j k l m n o p q r s t u v", "z y x"]
    embeddings = encoder.encode([" ".join(words)], long=True)
    first, second = (encoder.encode([part]) for part in words)
    assert first.num_tokens == (24,)
    torch.testing.assert_close(
        embeddings.hidden, torch.cat([first.hidden, second.hidden], 1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(embeddings.pooled, first.pooled, atol=1e-5, rtol=0)


def test_weights_reach_into_later_chunks(encoder: TextEncoder) -> None:
    words = "a b c d e f g h i j k l m n o p q r s t u v "
    plain = encoder.encode([words + "z y"], long=True)
    weighted = encoder.encode([words + "(z:2) y"], weighted=True, long=True)
    changed = [at for at in range(48) if not torch.equal(weighted.hidden[0, at], plain.hidden[0, at])]
    assert changed == [25]
    empty = encoder.encode([""]).hidden[0, 1]
    torch.testing.assert_close(
        weighted.hidden[0, 25], empty + 2 * (plain.hidden[0, 25] - empty), atol=1e-5, rtol=0
    )


def test_a_shorter_prompt_is_padded_by_chunks_of_the_empty_one(encoder: TextEncoder) -> None:
    long, short = "a" * 30, "b"
    together = encoder.encode([long, short], long=True)
    empty, alone = encoder.encode([""]), encoder.encode([short])
    assert together.hidden.shape[:2] == (2, 48)
    padded = pad_chunks(alone, empty, 48)
    assert torch.equal(padded.hidden, torch.cat([alone.hidden, empty.hidden], 1))
    assert torch.equal(padded.hidden[0], together.hidden[1])
    assert pad_chunks(alone, empty, 24) is alone
    for length in (30, 12):
        with pytest.raises(ValueError, match=f"24 tokens cannot be padded to {length}"):
            pad_chunks(alone, empty, length)


def test_endless_prompts_are_refused(encoder: TextEncoder) -> None:
    assert encoder.encode(["a" * 176], long=True).hidden.shape[1] == 8 * 24
    with pytest.raises(InvalidSetting, match="176 tokens in 8 chunks, but one has 177"):
        encoder.encode(["a" * 177], long=True)
    with pytest.raises(InvalidSetting, match="prompt: may have 32000 characters, but has 32001"):
        encoder.encode(["a" * 32_001], long=True)


def test_each_text_has_the_chunks_that_it_needs(encoder: TextEncoder) -> None:
    texts = encode_texts(encoder, ["a" * 30, "b", "b"], long=True)
    assert {text: row.hidden.shape[1] for text, row in texts.items()} == {"a" * 30: 48, "b": 24}
