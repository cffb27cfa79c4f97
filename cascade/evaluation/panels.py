"""Labelled sheets: rows of pictures with a few words below each, on white."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cascade import marks

_GAP = 16
_LINE = 1.25  # height of a line of text, relative to the font size
_TITLE, _HEADING, _LABEL = 24, 17, 15  # font sizes, pixels
_INK, _PALE, _FRAME, _PAPER = (30, 30, 30), (90, 90, 90), (190, 190, 190), (255, 255, 255)
_WIDEST = 2000  # pixels: longest line of text where no width is given
_NARROWEST = 112  # pixels that a label may take even if its picture is narrower


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture and the label below it."""

    image: Image.Image
    label: str


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures side by side below a heading, which may be empty."""

    heading: str
    panels: tuple[Panel, ...]


def draw_sheet(
    title: str, rows: Sequence[Row], side: int = 256, width: int = 0, margin: int = _GAP, letters: float = 1
) -> Image.Image:
    """Draw a sheet of rows. A picture of 256 pixels is drawn `side` pixels wide, others in proportion.

    A row that does not fit into `width` pixels is wrapped; with 0, none is. `letters` scales the text.
    """
    strips = [_draw_row(row, side / 256, width, letters) for row in rows]
    return stack([_text_image(title, _TITLE * letters, _INK, width or _WIDEST), *strips], margin)


def stack(parts: Sequence[Image.Image], margin: int = 0) -> Image.Image:
    """Stack pictures on white, one below the other, aligned left."""
    width = max(part.width for part in parts) + 2 * margin
    height = sum(part.height + _GAP for part in parts) - _GAP + 2 * margin
    whole = Image.new("RGB", (width, height), _PAPER)
    top = margin
    for part in parts:
        whole.paste(part, (margin, top))
        top += part.height + _GAP
    return whole


def save_png(sheet: Image.Image, path: Path) -> None:
    """Write a sheet with 256 colours: enough for flat shapes, at a third of the bytes."""
    few = sheet.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    marks.save_png(few, path, optimize=True)


def _draw_row(row: Row, scale: float, width: int, letters: float) -> Image.Image:
    lines: list[list[Image.Image]] = [[]]
    used = 0
    for cell in (_draw_panel(panel, scale, letters) for panel in row.panels):
        if width and lines[-1] and used + cell.width > width:
            lines.append([])
            used = 0
        lines[-1].append(cell)
        used += cell.width + _GAP
    parts = [_text_image(row.heading, _HEADING * letters, _INK, width or _WIDEST)] if row.heading else []
    parts += [_join(line) for line in lines if line]
    return stack(parts)


def _join(cells: Iterable[Image.Image]) -> Image.Image:
    cells = list(cells)
    width = sum(cell.width + _GAP for cell in cells) - _GAP
    strip = Image.new("RGB", (width, max(cell.height for cell in cells)), _PAPER)
    left = 0
    for cell in cells:
        strip.paste(cell, (left, 0))
        left += cell.width + _GAP
    return strip


def _draw_panel(panel: Panel, scale: float, letters: float) -> Image.Image:
    size = (max(1, round(panel.image.width * scale)), max(1, round(panel.image.height * scale)))
    image = panel.image.convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    label = _text_image(panel.label, _LABEL * letters, _PALE, max(size[0], round(_NARROWEST * letters)))
    cell = Image.new("RGB", (max(size[0] + 2, label.width), size[1] + 8 + label.height), _PAPER)
    ImageDraw.Draw(cell).rectangle((0, 0, size[0] + 1, size[1] + 1), outline=_FRAME)
    cell.paste(image, (1, 1))
    cell.paste(label, (0, size[1] + 8))
    return cell


def _text_image(text: str, size: float, ink: tuple[int, int, int], width: int) -> Image.Image:
    """Draw text in lines of at most `width` pixels; a word that is longer gets its own line."""
    font = ImageFont.load_default(size=size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    height = round(size * _LINE)
    longest = max((round(font.getlength(line)) for line in lines), default=0)
    image = Image.new("RGB", (longest + 2, height * max(1, len(lines))), _PAPER)
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        draw.text((0, index * height), line, ink, font)
    return image
