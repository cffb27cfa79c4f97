"""The text of settings in a picture, as AUTOMATIC1111 made it a custom, read back into its parts.

A prompt of any number of lines, then perhaps `Negative prompt: ...`, then a line of `Name: value` with commas
between; a value that holds commas is JSON text.
"""

import json
import re

_PAIR = re.compile(r'(\w[\w \-/]{0,60}): *("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_LEAST_PAIRS = 3  # of the last line; with fewer it is a part of the prompt


def parse_parameters(text: str) -> dict[str, str]:
    """The settings by their names, with `Prompt` and `Negative prompt` among them; {} for an empty text."""
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
