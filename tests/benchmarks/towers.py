"""A CLIP text tower of the published size with random weights, and a tokenizer that needs no files."""

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


def text_tower() -> Any:
    """The published tower (bigG with projection, 694,659,840 parameters) in bf16."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        max_position_embeddings=77,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        tower = CLIPTextModelWithProjection(config)
    tower = tower.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for weight in tower.parameters():
            weight.fill_(0.01)
    return tower


def tokenizer() -> Any:
    """One token per letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
