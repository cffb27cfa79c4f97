"""The tokenizer's layout and the objectives of the text and vision towers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from cascade.training import vision
from cascade.training.captions import ATTRIBUTES, Caption
from cascade.training.free_captions import phrases
from cascade.training.scenes import render, sample_scene
from cascade.training.text import (
    MAX_TOKENS,
    TextTraining,
    accuracy,
    attribute_losses,
    encode,
    sample_captions,
    save_tokenizer,
    text_config,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(num_captions=2000), folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def training(tokenizer: CLIPTokenizer) -> TextTraining:
    torch.manual_seed(0)
    return TextTraining(CLIPTextModelWithProjection(text_config(tokenizer)))


def test_vocabulary_has_the_clip_layout(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(1714))
    assert len(tokenizer) == 1714
    assert [f"{token}</w>" for token in tokens[:256]] == tokens[256:512]
    assert tokens[0] == "!"
    assert tokens[1712:] == ["<|startoftext|>", "<|endoftext|>"]


def test_prompts_are_lowered_wrapped_padded_with_the_end_and_cut(tokenizer: CLIPTokenizer) -> None:
    padded = tokenizer("A Red Circle", padding="max_length", truncation=True).input_ids
    assert len(padded) == MAX_TOKENS == tokenizer.model_max_length
    assert padded[0] == 1712
    assert padded[1:4] == tokenizer("a red circle").input_ids[1:-1]
    assert {*padded[4:]} == {1713}
    cut = tokenizer("circle " * 80, padding="max_length", truncation=True).input_ids
    assert len(cut) == MAX_TOKENS
    assert cut[-1] == 1713


def test_every_word_of_a_caption_is_one_token_and_all_captions_fit(tokenizer: CLIPTokenizer) -> None:
    texts = [one.text for one in sample_captions(np.random.default_rng(5), 500)]
    for text in texts:
        tokens = tokenizer(text).input_ids
        assert len(tokens) <= MAX_TOKENS
        assert len(tokens) - 2 == len(text.replace(",", " ,").replace(".", " .").split())


def test_words_of_free_captions_are_few_tokens(tokenizer: CLIPTokenizer) -> None:
    words = " ".join(phrases()).split()
    assert np.mean([len(ids) for ids in tokenizer(words, add_special_tokens=False).input_ids]) < 1.4


def test_any_text_has_tokens(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer("Ünï¢ode 圆 🎨, 42!").input_ids
    assert tokens.count(1713) == 1


def test_saved_tokenizer_has_both_files_of_the_layout(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again("a tiny orange star").input_ids == tokenizer("a tiny orange star").input_ids


def test_positions_lie_at_the_end_or_in_the_padding(tokenizer: CLIPTokenizer) -> None:
    batch = encode(tokenizer, sample_captions(np.random.default_rng(0), 50), np.random.default_rng(1))
    assert (batch.tokens[torch.arange(50), batch.position] == 1713).all()
    assert batch.labels.shape == (50, len(ATTRIBUTES))


def test_the_first_end_token_is_pooled(tokenizer: CLIPTokenizer, training: TextTraining) -> None:
    model = training.text.eval()
    alone = model(**tokenizer(["a red circle"], return_tensors="pt")).text_embeds
    padded = model(**tokenizer(["a red circle"], padding="max_length", return_tensors="pt")).text_embeds
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0)


def test_training_lowers_the_text_loss(tokenizer: CLIPTokenizer, training: TextTraining) -> None:
    batch = encode(tokenizer, sample_captions(np.random.default_rng(0), 24), np.random.default_rng(1))
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = torch.stack([attribute_losses(scores, batch.labels) for scores in training(batch)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_accuracy_reads_the_attribute_that_is_asked_for() -> None:
    facts = [Caption("", {"background": "green"}), Caption("", {})]
    labels = torch.tensor([one.labels() for one in facts])
    scores = torch.zeros(2, sum(len(values) + 1 for values in ATTRIBUTES.values()))
    scores[:, 2] = 1  # the class of a green background
    assert accuracy(scores, labels, "background") == 0.5
    assert accuracy(scores, labels, "first_shape") == 1.0


def test_pictures_are_prepared_as_the_image_processor_does() -> None:
    scenes = [sample_scene(np.random.default_rng(2), size) for size in ((256, 256), (448, 256))]
    images = [Image.fromarray(render(scene)) for scene in scenes]
    expected = vision.image_processor()(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(vision.prepare(scenes), expected, atol=1e-6, rtol=0)


def test_the_vision_tower_has_the_text_towers_dimensions(training: TextTraining) -> None:
    model = CLIPVisionModelWithProjection(vision.vision_config()).eval()
    embedding = model(pixel_values=torch.zeros(2, 3, 64, 64)).image_embeds
    assert embedding.shape == (2, training.text.config.projection_dim)


def test_contrast_is_lowest_when_pairs_match() -> None:
    texts = torch.eye(6)
    matched, shuffled = (
        vision.contrastive_loss(texts, texts),
        vision.contrastive_loss(texts.roll(1, 0), texts),
    )
    assert matched < 0.01 < shuffled
