"""Pictures as files: names, formats, the grid of all pictures, and writing all or none."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from app.schemas import OutputFormat
    from cascade import GeneratedImage, TextToImage

FORMATS: Mapping[str, "OutputFormat"] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
GRID_GAP = 4  # pixels between the pictures of a grid


def picture_format(path: Path) -> "OutputFormat":
    """The format that the suffix asks for.

    Raises:
        InvalidSetting: the suffix is none that we write.
    """
    from cascade.errors import InvalidSetting

    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        message = f"must end in {', '.join(FORMATS)}, not {path.suffix or path.name!r}"
        raise InvalidSetting("output", message) from None


def check_folder(path: Path) -> None:
    """Refuse before the work is done what could not be saved after it."""
    from cascade.errors import InvalidSetting

    folder = path.parent
    if not folder.is_dir():
        raise InvalidSetting("output", f"the folder {folder} does not exist")
    if path.is_dir():
        raise InvalidSetting("output", f"{path} is a folder")
    if not os.access(folder, os.W_OK):
        raise InvalidSetting("output", f"the folder {folder} may not be written to")


def numbered(path: Path, count: int) -> list[Path]:
    """The path itself for one picture, else NAME-0.png, NAME-1.png, ..."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def save_pictures(
    pictures: Sequence["GeneratedImage"],
    output: Path,
    *,
    quality: int,
    has_grid: bool,
    named_model: str | None,
) -> None:
    """Write all pictures, and with `has_grid` NAME-grid.png.

    Args:
        named_model: writes the settings into the files, with this name of the model.

    Raises:
        OSError: a file could not be written; then none is.
    """
    from app.storage.encoding import encode

    output_format = picture_format(output)
    files = {}
    for path, picture in zip(numbered(output, len(pictures)), pictures, strict=True):
        text = parameters_text(picture.settings, named_model) if named_model is not None else None
        files[path] = encode(picture.image, output_format, quality, text)
    if has_grid:
        sheet = contact_sheet([picture.image for picture in pictures])
        files[output.with_stem(f"{output.stem}-grid")] = encode(sheet, output_format, quality)
    write_all(files)


def contact_sheet(images: list["Image"]) -> "Image":
    """All pictures, which have one size, in a grid that is about square."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    size = (columns * (width + GRID_GAP) - GRID_GAP, rows * (height + GRID_GAP) - GRID_GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + GRID_GAP), row * (height + GRID_GAP)))
    return sheet


def parameters_text(settings: "TextToImage", model: str) -> str:
    """The settings as the text that many tools read from a picture."""
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    named = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": settings.guidance_scale,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": model,
        "Decoder steps": settings.decoder_steps,
        "Decoder CFG scale": settings.decoder_guidance_scale,
        "Preset": settings.preset,
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in named.items()))
    return "\n".join(lines)


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write every file or, when one cannot be written, none."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path, written in partial.items():
            written.replace(path)
    except BaseException:  # Ctrl-C too
        for written in partial.values():
            written.unlink(missing_ok=True)
        raise
