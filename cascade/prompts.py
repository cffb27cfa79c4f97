"""Prompts as text: weights written into them with brackets, and chunks for prompts beyond the window."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cascade.errors import InvalidSetting

MAX_PROMPT_CHARACTERS = 32_000
MAX_CHUNKS = 8
MAX_WEIGHT = 10.0
BRACKET_WEIGHT = 1.1  # of "(word)"; "[word]" divides by it

_CLOSING = {")": "(", "]": "["}
_ESCAPED = "()[]\\"
_LONGEST_NUMBER = 16  # characters between the colon and the closing parenthesis
_NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightedText:
    """A prompt without its brackets, and the weight of every character."""

    text: str
    weights: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        """Whether all weights are 1."""
        return all(weight == 1 for weight in self.weights)

    def weight(self, start: int, end: int) -> float:
        """Return the weight of a token of the characters `start` to `end`: their mean, or 1 for none."""
        weights = self.weights[start:end]
        if all(weight == weights[0] for weight in weights):
            return weights[0] if weights else 1.0  # exactly, without the rounding of a mean
        return math.fsum(weights) / len(weights)


def read_weights(prompt: str) -> WeightedText:
    r"""Separate the weights from a prompt in the syntax that most programs for diffusion models read.

    "(word)" is 1.1, "(word:1.3)" is 1.3, "[word]" is 1/1.1, and nested brackets multiply. A backslash escapes
    a bracket or a backslash: "\(". Unpaired brackets are text, and so is a colon without a number after it.

    Raises:
        InvalidSetting: the product of the weights around a word is outside 0 to `MAX_WEIGHT`.
    """
    partners = _partners(prompt)
    text: list[str] = []
    weights: list[float] = []
    around = [1.0]  # the products of the weights of the open brackets
    position = 0
    while position < len(prompt):
        character = prompt[position]
        partner = partners.get(position)
        if _is_escape(prompt, position):
            position += 1
            text.append(prompt[position])
            weights.append(around[-1])
        elif partner is None:
            text.append(character)
            weights.append(around[-1])
        elif partner.weight is not None:  # it opens
            around.append(_checked(around[-1] * partner.weight))
        else:
            around.pop()
        position = partner.goes_on if partner else position + 1
    return WeightedText("".join(text), tuple(weights))


def split_chunks(tokens: Sequence[T], size: int) -> list[list[T]]:
    """Split tokens into chunks of `size`; no tokens give one empty chunk.

    Raises:
        InvalidSetting: more than `MAX_CHUNKS` would be needed.
    """
    if len(tokens) > MAX_CHUNKS * size:
        raise InvalidSetting(
            "long_prompt",
            f"a prompt may have {MAX_CHUNKS * size} tokens in {MAX_CHUNKS} chunks, but one has {len(tokens)}",
        )
    return [list(tokens[start : start + size]) for start in range(0, max(1, len(tokens)), size)]


@dataclass(frozen=True, slots=True)
class _Bracket:
    """One bracket of a pair."""

    goes_on: int  # the position of the next character to be read
    weight: float | None = None  # the factor of an opening bracket


def _partners(prompt: str) -> dict[int, _Bracket]:
    """Return the paired brackets by position; a number at the end belongs to the closing one."""
    found: dict[int, _Bracket] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    position = 0
    while position < len(prompt):
        character = prompt[position]
        if _is_escape(prompt, position):
            position += 1
        elif character in opened:
            opened[character].append(position)
        elif character in _CLOSING and opened[_CLOSING[character]]:
            start = opened[_CLOSING[character]].pop()
            for others in opened.values():  # brackets left open inside the pair are text
                while others and others[-1] > start:
                    others.pop()
            weight, colon = _weight(prompt, start, position)
            found[start] = _Bracket(start + 1, weight)
            found[colon] = _Bracket(position + 1)
        position += 1
    return found


def _weight(prompt: str, start: int, end: int) -> tuple[float, int]:
    """Return the weight of the pair at `start` and `end`, and where its text ends."""
    if prompt[start] == "[":
        return 1 / BRACKET_WEIGHT, end
    colon = prompt.rfind(":", max(start + 1, end - _LONGEST_NUMBER), end)
    number = _NUMBER.fullmatch(prompt, colon, end) if colon >= 0 else None
    return (float(number[1]), colon) if number else (BRACKET_WEIGHT, end)


def _is_escape(prompt: str, position: int) -> bool:
    return prompt[position] == "\\" and prompt[position + 1 : position + 2] in tuple(_ESCAPED)


def _checked(weight: float) -> float:
    if not 0 <= weight <= MAX_WEIGHT:
        raise InvalidSetting(
            "weighted_prompt",
            f"weights must be from 0 to {MAX_WEIGHT:g}, but one is {weight:g}; "
            r"brackets that are text are written \( and \)",
        )
    return weight
