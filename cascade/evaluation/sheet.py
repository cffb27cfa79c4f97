"""The contact sheet: pictures with their prompts, and whether the verifier found them right."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cascade.evaluation.evaluate import ASPECTS, Judged
from cascade.marks import save_png

_COLUMNS = 10
_PICTURE = 256
_GAP = 12
_TEXT = 92  # pixels below a picture
_CHARACTERS = 38  # in a line of text
_LINES = 3  # of a prompt
_RIGHT, _WRONG, _INK, _PAPER = (20, 130, 60), (200, 30, 30), (40, 40, 40), (255, 255, 255)


def save_sheet(judged: Sequence[Judged], path: Path) -> None:
    """Write pictures to a PNG, framed green if right and red if wrong."""
    rows = -(-len(judged) // _COLUMNS)
    columns = min(_COLUMNS, len(judged))
    cell_width, cell_height = _PICTURE + _GAP, _PICTURE + _GAP + _TEXT
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _PAPER)
    for index, one in enumerate(judged):
        row, column = divmod(index, _COLUMNS)
        _draw_cell(sheet, one, _GAP + column * cell_width, _GAP + row * cell_height)
    save_png(sheet, path)


def _draw_cell(sheet: Image.Image, one: Judged, x: int, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    is_right = one.verdict.is_right
    draw.rectangle((x - 4, y - 4, x + _PICTURE + 3, y + _PICTURE + 3), _RIGHT if is_right else _WRONG)
    image = one.image.copy()
    image.thumbnail((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
    sheet.paste(image, (x + (_PICTURE - image.width) // 2, y + (_PICTURE - image.height) // 2))
    words = textwrap.fill(one.caption.text, _CHARACTERS, max_lines=_LINES, placeholder=" ...")
    font = ImageFont.load_default(size=13)
    draw.multiline_text((x, y + _PICTURE + 6), words, _INK, font)
    finding = textwrap.fill(_finding(one), _CHARACTERS)
    draw.multiline_text((x, y + _PICTURE + 60), finding, _RIGHT if is_right else _WRONG, font)


def _finding(one: Judged) -> str:
    """Return the verdict in words: right, or what is wrong."""
    wrong = [
        name.split(",")[0]
        for aspect, name in ASPECTS.items()
        if aspect != "is_right" and getattr(one.verdict, aspect) is False
    ]
    if one.verdict.is_right:
        return f"right, except {', '.join(wrong)}" if wrong else "right"
    return f"wrong: {', '.join(wrong)}"
