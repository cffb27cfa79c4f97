"""Encoding of prompts and image prompts by the two CLIP towers: the embeddings that guide Stages C and B."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from cascade.errors import InvalidSetting
from cascade.networks.adapters import Adapter, Change
from cascade.prompts import MAX_PROMPT_CHARACTERS, WeightedText, read_weights, split_chunks

_TOWER = "text_model."


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """Embeddings of prompts by the text tower, one row per prompt."""

    hidden: Tensor  # (b, n, d): last layer, before the final norm; n is the window times the number of chunks
    pooled: Tensor  # (b, 1, d): normed state of the first end token, projected
    num_tokens: tuple[int, ...]  # of each prompt before truncation, with one begin and one end token
    truncated: tuple[bool, ...]  # whether the prompt was too long and its end was cut off

    def __len__(self) -> int:
        return len(self.num_tokens)

    @classmethod
    def cat(cls, embeddings: "Sequence[TextEmbeddings]") -> "TextEmbeddings":
        """Concatenate the rows of several embeddings, in order."""
        return cls(
            hidden=torch.cat([each.hidden for each in embeddings]),
            pooled=torch.cat([each.pooled for each in embeddings]),
            num_tokens=tuple(count for each in embeddings for count in each.num_tokens),
            truncated=tuple(flag for each in embeddings for flag in each.truncated),
        )

    def row(self, index: int) -> "TextEmbeddings":
        """Return the embeddings of one prompt."""
        one = slice(index, index + 1)
        return TextEmbeddings(self.hidden[one], self.pooled[one], self.num_tokens[one], self.truncated[one])


def encode_texts(
    encoder: "TextEncoder", texts: Iterable[str], *, weighted: bool = False, long: bool = False
) -> dict[str, TextEmbeddings]:
    """Encode the distinct texts in one pass of the encoder, and return their embeddings by text.

    With `weighted` or `long`, each text is encoded by itself and has as many chunks as it needs.
    """
    distinct = list(dict.fromkeys(texts))
    if weighted or long:
        return {text: encoder.encode([text], weighted=weighted, long=long) for text in distinct}
    embeddings = encoder.encode(distinct)
    return {text: embeddings.row(index) for index, text in enumerate(distinct)}


def pad_chunks(text: TextEmbeddings, empty: TextEmbeddings, length: int) -> TextEmbeddings:
    """Pad the hidden states of texts to `length` tokens with chunks of the empty prompt.

    So a prompt and a shorter negative prompt guide with the same number of tokens.

    Args:
        empty: the embedding of "", one row.
    """
    rows, present, window = len(text), text.hidden.shape[1], empty.hidden.shape[1]
    if length == present:
        return text
    missing, rest = divmod(length - present, window)
    if missing < 0 or rest:
        raise ValueError(f"{present} tokens cannot be padded to {length} by chunks of {window}")
    padding = empty.hidden.repeat(rows, missing, 1)
    return replace(text, hidden=torch.cat([text.hidden, padding], dim=1))


class TextEncoder:
    """Tokenizer and text tower, as transformers builds them (`CLIPTextModelWithProjection`)."""

    def __init__(self, tokenizer: Any, model: Any, own: Adapter | None = None) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.own = own  # used unless a call passes an adapter that changes texts
        self._changed: WeakKeyDictionary[Adapter, dict[str, Tensor]] = WeakKeyDictionary()

    @property
    def max_tokens(self) -> int:
        """Number of tokens to which every prompt is padded or cut: 77 in the official checkpoints."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    @torch.inference_mode()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        weighted: bool = False,
        long: bool = False,
        adapter: Adapter | None = None,
    ) -> TextEmbeddings:
        """Encode `prompts`; the empty one is a prompt like any other.

        The tower gets the padding mask: it changes the states at pad positions, which Stage C reads too.

        Args:
            weighted: read weights written into the prompts (`cascade.prompts.read_weights`). The hidden
                state h of a weighted token becomes e + weight (h - e), where e is that of the empty prompt
                at the same position; so weight 0 removes a token, and weight 1 leaves h bit-identical.
                This is ComfyUI's rule. The other common rule, to multiply h and restore the overall mean,
                has almost no effect here: Stage C normalizes each mapped token, which undoes a factor, and
                huge channels dominate the mean of the states before the final norm. The pooled embedding is
                unchanged: it summarizes the whole prompt, and no token has a share of its own in it.
            long: read prompts longer than the window in chunks, each with begin and end tokens, and
                concatenate their hidden states, (b, window * chunks, d), where `chunks` is that of the
                longest prompt; others are padded with chunks of the empty prompt. The pooled embedding is
                the first chunk's.
            adapter: LoRAs, whose learned tokens may occur in the prompts, and which may change the tower.

        Raises:
            InvalidSetting: a weight is out of range, a prompt needs too many chunks, or `adapter` changes
                texts as a merged LoRA does already.
        """
        if adapter is None or not adapter.changes_text:
            adapter = self.own
        elif self.own is not None and adapter is not self.own:
            raise InvalidSetting("loras", "no LoRA that changes texts can be used beside a merged one")
        if weighted or long:
            return self._encode_by_chunks(prompts, adapter, weighted=weighted, long=long)
        if adapter is not None:
            rows = [self._tokenize(prompt, adapter)[0] for prompt in prompts]
        else:
            rows = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
        ids, mask = self._windows([row[: self.max_tokens - 2] for row in rows])
        hidden, pooled = self._run(ids, mask, adapter)
        num_tokens = tuple(len(row) + 2 for row in rows)
        truncated = tuple(count > self.max_tokens for count in num_tokens)
        return TextEmbeddings(hidden, pooled, num_tokens, truncated)

    def _encode_by_chunks(
        self, prompts: Sequence[str], adapter: Adapter | None, *, weighted: bool, long: bool
    ) -> TextEmbeddings:
        """Encode each prompt in as many chunks as it needs, padded to the number of the longest."""
        rows = [self._encode_one(prompt, adapter, weighted=weighted, long=long) for prompt in prompts]
        length = max(row.hidden.shape[1] for row in rows)
        if length > self.max_tokens:
            empty = self.encode([""], adapter=adapter)
            rows = [pad_chunks(row, empty, length) for row in rows]
        return TextEmbeddings.cat(rows)

    def _encode_one(
        self, prompt: str, adapter: Adapter | None, *, weighted: bool, long: bool
    ) -> TextEmbeddings:
        """Encode one prompt; exactly as `encode` does if it fits into the window and all weights are 1."""
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise InvalidSetting(
                "prompt", f"may have {MAX_PROMPT_CHARACTERS} characters, but has {len(prompt)}"
            )
        if weighted and adapter is not None and adapter.words:
            prompt = _learned_words(adapter).sub(_escape_brackets, prompt)  # brackets in them are no weights
        read = read_weights(prompt) if weighted else WeightedText(prompt, (1.0,) * len(prompt))
        plain = self.encode([read.text], adapter=adapter)
        is_long = long and plain.truncated[0]
        if not is_long and read.is_plain:
            return plain
        tokens, places = self._tokenize(read.text, adapter)
        size = self.max_tokens - 2
        ids = split_chunks(tokens, size) if long else [tokens[:size]]
        if is_long:
            hidden, pooled = self._run(*self._windows(ids), adapter)
        else:
            hidden, pooled = plain.hidden, plain.pooled
        if not read.is_plain:
            weights = [read.weight(*place) for place in places]
            rows = split_chunks(weights, size) if long else [weights[:size]]
            hidden = self._weigh(hidden, rows, adapter)
        return TextEmbeddings(
            hidden=hidden.reshape(1, -1, hidden.shape[-1]),
            pooled=pooled[:1],
            num_tokens=plain.num_tokens,
            truncated=(plain.truncated[0] and not long,),
        )

    def _windows(self, chunks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Add begin, end and padding to chunks; return ids and attention mask, (chunks, window) each."""
        first, last, pad = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
        )
        ids = torch.full((len(chunks), self.max_tokens), pad)
        mask = torch.zeros_like(ids)
        for row, chunk in enumerate(chunks):
            real = torch.tensor([first, *chunk, last])
            ids[row, : len(real)], mask[row, : len(real)] = real, 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _weigh(self, hidden: Tensor, weights: Sequence[Sequence[float]], adapter: Adapter | None) -> Tensor:
        """Weight hidden states (chunks, window, d); `weights` have no entries for begin and end tokens."""
        factors = torch.ones(hidden.shape[:2])
        for row, chunk in enumerate(weights):
            factors[row, 1 : 1 + len(chunk)] = torch.tensor(chunk)
        factors = factors[..., None].to(hidden.device)
        empty = self.encode([""], adapter=adapter).hidden.float()
        weighed = (empty + factors * (hidden.float() - empty)).to(hidden.dtype)
        return torch.where(factors == 1, hidden, weighed)

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, adapter: Adapter | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states (b, n, d) and pooled embeddings (b, 1, d) of tokens and their mask, (b, n)."""
        changed, ids = ({}, input_ids) if adapter is None else self._adapted(adapter, input_ids)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "output_hidden_states": True}
        inside = {
            name.removeprefix(_TOWER): weight for name, weight in changed.items() if name.startswith(_TOWER)
        }
        tower = self.model.text_model
        outputs = functional_call(tower, inside, kwargs=inputs) if inside else tower(**inputs)
        # Old configurations make transformers take the largest id, but learned tokens' ids exceed the end's
        first_end = (input_ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        projection = changed.get("text_projection.weight", self.model.text_projection.weight)
        pooled = F.linear(outputs.last_hidden_state[rows, first_end], projection)
        return outputs.hidden_states[-1], pooled.unsqueeze(1)

    def _tokenize(self, text: str, adapter: Adapter | None) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens without begin and end, and the range of characters of each.

        A word that a LoRA has learned is one token, with an id beyond the end of the embedding table. Neither
        the tokenizer nor the table is changed, so the word is unknown to other requests.
        """
        words = list(adapter.words) if adapter else []
        numbers = {word.lower(): index for index, word in enumerate(words, self._table.num_embeddings)}
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for part in _learned_words(adapter).split(text) if adapter and words else [text]:
            if part.lower() in numbers:
                ids.append(numbers[part.lower()])
                places.append((start, start + len(part)))
            elif part:
                tokens = self.tokenizer(
                    part, add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
                ids += tokens.input_ids
                places += [(start + first, start + last) for first, last in tokens.offset_mapping]
            start += len(part)
        return ids, places

    def _adapted(self, adapter: Adapter, input_ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weights changed by an adapter, with a small embedding table, and ids into that table."""
        changed = self._changed.get(adapter)
        if changed is None:
            changed = self._changed[adapter] = {
                f"{path}.weight": _changed_weight(self.model.get_parameter(f"{path}.weight"), change)
                for path, change in adapter.text.items()
            }
        table, words = self._table, list(adapter.words.values())
        present, ids = torch.unique(input_ids, return_inverse=True)
        rows = [
            words[index - table.num_embeddings]
            if index >= table.num_embeddings
            else adapter.rows.get(index, table.weight[index])
            for index in present.tolist()
        ]
        small = torch.stack([row.to(table.weight) for row in rows])
        return {**changed, f"{_TOWER}embeddings.token_embedding.weight": small}, ids

    @property
    def _table(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())


def _learned_words(adapter: Adapter) -> re.Pattern[str]:
    """Return a pattern that matches any learned word of an adapter, ignoring case, the longest first."""
    longest_first = sorted(adapter.words, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})", re.IGNORECASE)


def _escape_brackets(match: re.Match[str]) -> str:
    return re.sub(r"([()\[\]])", r"\\\1", match[0])


def _changed_weight(weight: Tensor, change: Change) -> Tensor:
    return (weight.float() + change.dense(weight)).to(weight.dtype)


class ImageEncoder:
    """Image processor and vision tower, as transformers builds them (`CLIPVisionModelWithProjection`)."""

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor = processor
        self.model = model

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images, one embedding each, not normalized: (b, 1, d)."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        embeddings: Tensor = self.model(pixels.to(self.model.device, self.model.dtype)).image_embeds
        return embeddings.unsqueeze(1)
