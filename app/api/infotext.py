"""Parser of the settings text in a picture, in the format that AUTOMATIC1111 introduced.

A prompt of any number of lines, then optionally `Negative prompt: ...`, then a line of comma-separated
`Name: value` pairs; a value that contains commas is a JSON string.
"""

import json
import re

_PAIR = re.compile(r'(\w[\w \-/]{0,60}): *("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_LEAST_PAIRS = 3  # in the last line; with fewer it is part of the prompt


def parse_parameters(text: str) -> dict[str, str]:
    """Return the settings by name, including `Prompt` and `Negative prompt`; {} for an empty text."""
    lines = text.strip().splitlines()
    if not lines:
        return {}
    settings = _PAIR.findall(lines[-1])
    if len(settings) < _LEAST_PAIRS:
        settings = []
    else:
        lines.pop()
    prompt, _, negative = "\n".join(lines).partition(_NEGATIVE)
    named = {name: _plain(value) for name, value in settings}
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **named}


def _plain(value: str) -> str:
    value = value.strip()
    if value[:1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value
