"""Prompts and image prompts to the embeddings that guide Stages C and B, by the two CLIP towers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """What the text tower says about some prompts, one row each."""

    hidden: Tensor  # (b, n, d): last layer, before the final norm
    pooled: Tensor  # (b, 1, d): normed, at the first end token, projected
    num_tokens: tuple[int, ...]  # of each prompt before truncation, with begin and end
    truncated: tuple[bool, ...]  # the prompt was too long and its end was cut off

    def __len__(self) -> int:
        return len(self.num_tokens)

    @classmethod
    def cat(cls, embeddings: "Sequence[TextEmbeddings]") -> "TextEmbeddings":
        """The rows of several, in order."""
        return cls(
            hidden=torch.cat([each.hidden for each in embeddings]),
            pooled=torch.cat([each.pooled for each in embeddings]),
            num_tokens=tuple(count for each in embeddings for count in each.num_tokens),
            truncated=tuple(flag for each in embeddings for flag in each.truncated),
        )

    def row(self, index: int) -> "TextEmbeddings":
        """What is said about one of the prompts."""
        one = slice(index, index + 1)
        return TextEmbeddings(self.hidden[one], self.pooled[one], self.num_tokens[one], self.truncated[one])


def encode_texts(encoder: "TextEncoder", texts: Iterable[str]) -> dict[str, TextEmbeddings]:
    """The embeddings of each text, in one pass of the encoder; a text that comes twice is encoded once."""
    distinct = list(dict.fromkeys(texts))
    embeddings = encoder.encode(distinct)
    return {text: embeddings.row(index) for index, text in enumerate(distinct)}


class TextEncoder:
    """Tokenizer and text tower, as transformers builds them (`CLIPTextModelWithProjection`)."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def max_tokens(self) -> int:
        """Length to which every prompt is padded or cut: 77 in the official checkpoints."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embed `prompts`; the empty one is a prompt like any other.

        The padding mask is passed: it changes the rows of the pad positions, which Stage C reads too.
        """
        device = self.model.device
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        outputs = self.model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        )
        # transformers takes the largest id in old configurations; added tokens (LoRA) are larger than the end
        first_end = (tokens.input_ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
        rows = torch.arange(len(prompts), device=device)
        pooled = self.model.text_projection(outputs.last_hidden_state[rows, first_end])
        num_tokens = tuple(len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
        return TextEmbeddings(
            hidden=outputs.hidden_states[-1],
            pooled=pooled.unsqueeze(1),
            num_tokens=num_tokens,
            truncated=tuple(count > self.max_tokens for count in num_tokens),
        )


class ImageEncoder:
    """Image processor and vision tower, as transformers builds them (`CLIPVisionModelWithProjection`)."""

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor = processor
        self.model = model

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """The embedding of each image, not normalised, (b, 1, d)."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        embeddings: Tensor = self.model(pixels.to(self.model.device, self.model.dtype)).image_embeds
        return embeddings.unsqueeze(1)
