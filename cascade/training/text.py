"""Trains the text tower of the tiny checkpoint and its tokenizer, by supervision instead of contrast.

A contrastive text model tells captions apart without saying what they contain. So linear heads, discarded
afterwards, have to read every fact that a caption states from the pooled embedding and the token states.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cascade.training.captions import ATTRIBUTES, Caption, caption
from cascade.training.free_captions import free_caption, phrases
from cascade.training.loop import Plan, fit
from cascade.training.scenes import held_out_generator, sample_scene

MAX_TOKENS = 64
NUM_MERGES = 1200
HIDDEN = 128
START, END = "<|startoftext|>", "<|endoftext|>"
PLAN = Plan(steps=1400, learning_rate=1e-3, seed=21, save_every=100)
BATCH_SIZE = 192

_VOCABULARY_WEIGHT = 20  # so that rare words become few tokens, too
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train tokenizer and text tower and save them in `run`/tokenizer and `run`/text_encoder."""
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, run / "tokenizer")
    torch.manual_seed(plan.seed)
    training = TextTraining(CLIPTextModelWithProjection(text_config(tokenizer)))

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        del step
        batch = encode(tokenizer, [*sample_captions(rng, BATCH_SIZE - 1), Caption("", {})], rng)
        with torch.autocast("cpu", torch.bfloat16):
            pooled, state = module(batch)
        losses = [attribute_losses(scores, batch.labels) for scores in (pooled, state)]
        return sum(losses, torch.zeros(())), {"places": accuracy(pooled, batch.labels, "near_shape")}

    average = fit(training, loss, plan, run / "text_training", title="text tower")
    assert isinstance(average, TextTraining)
    average.text.save_pretrained(run / "text_encoder")
    figures = evaluate(average, tokenizer)
    (run / "text_training" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Batch:
    """Captions as tokens, with the facts as classes and one position at or after the end of each."""

    tokens: Tensor  # (b, 64)
    mask: Tensor  # (b, 64)
    labels: Tensor  # (b, attributes)
    position: Tensor  # (b,)


class TextTraining(nn.Module):
    """The text tower with linear heads on its pooled embedding and on the state of one token."""

    def __init__(self, text: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.text = text
        classes = sum(len(values) + 1 for values in ATTRIBUTES.values())
        self.read_pooled = nn.Linear(HIDDEN, classes)
        self.read_state = nn.Linear(HIDDEN, classes)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return scores of all classes of all attributes, (b, classes): from the embedding and the state."""
        output = self.text(input_ids=batch.tokens, attention_mask=batch.mask, output_hidden_states=True)
        states = output.hidden_states[-1]
        state = states[torch.arange(len(states)), batch.position]
        scores = self.read_pooled(output.text_embeds), self.read_state(F.layer_norm(state, state.shape[-1:]))
        return scores[0].float(), scores[1].float()


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Configure three layers of width 128 with the big model's exact GELU; the first end token is pooled."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # the fused attention is slow backwards on CPUs
    )


def sample_captions(rng: np.random.Generator, count: int) -> list[Caption]:
    """Sample captions of fresh scenes."""
    return [caption(sample_scene(rng), rng) for _ in range(count)]


def encode(tokenizer: CLIPTokenizer, captions: list[Caption], rng: np.random.Generator) -> Batch:
    """Return tokens and labels of captions, and a random position at the end token or in the padding."""
    encoded = tokenizer(
        [one.text for one in captions],
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ends = encoded.attention_mask.sum(1).numpy() - 1
    return Batch(
        tokens=encoded.input_ids,
        mask=encoded.attention_mask,
        labels=torch.tensor([one.labels() for one in captions]),
        position=torch.from_numpy(rng.integers(ends, MAX_TOKENS)),
    )


def attribute_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy, summed over the attributes."""
    parts = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(_split(scores))]
    return torch.stack(parts).sum()


def accuracy(scores: Tensor, labels: Tensor, attribute: str) -> float:
    """Return the share of captions whose value of an attribute ("not stated" is one) is read correctly."""
    index = list(ATTRIBUTES).index(attribute)
    part = list(_split(scores))[index]
    return (part.argmax(1) == labels[:, index]).float().mean().item()


@torch.inference_mode()
def evaluate(training: TextTraining, tokenizer: CLIPTokenizer, count: int = 2048) -> dict[str, float]:
    """Return the accuracy of each attribute on held-out captions, from the embedding and from a state."""
    rng = held_out_generator(0)
    batch = encode(tokenizer, sample_captions(rng, count), rng)
    pooled, state = training.eval()(batch)
    figures = {name: accuracy(pooled, batch.labels, name) for name in ATTRIBUTES}
    return figures | {f"{name} (state)": accuracy(state, batch.labels, name) for name in ATTRIBUTES}


def train_tokenizer(num_captions: int = 20_000) -> CLIPTokenizer:
    """Train byte pairs in the CLIP layout: bytes, bytes that end a word, pairs of captions, start, end."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe: Any = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + NUM_MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    rng = np.random.default_rng(PLAN.seed)
    texts = [one.text for one in sample_captions(rng, num_captions)]
    free = [free_caption(sample_scene(rng), rng).text for _ in range(num_captions)]
    bpe.train_from_iterator([*texts, *free, *phrases() * _VOCABULARY_WEIGHT], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:NUM_MERGES]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer with the two files of the CLIP layout beside what transformers writes."""
    tokenizer.save_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in state["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _split(scores: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(scores, [len(values) + 1 for values in ATTRIBUTES.values()], dim=1))


def main() -> None:
    """Train into the folder given on the command line."""
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
