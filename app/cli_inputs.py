"""Reads and checks the pictures and other inputs that options of the commands name."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from cascade import Control, ImagePrompt, LoRAUse
    from cascade.tasks.settings import FeatureMap

MAX_PIXELS = 100_000_000


def read_picture(path: Path, option: str) -> "Image":
    """Read the picture in a file; an error names `option`.

    Raises:
        InvalidSetting: it cannot be read, is no picture, or is too large.
    """
    from PIL import Image, UnidentifiedImageError

    from cascade.errors import InvalidSetting

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidSetting(option, f"{path} has more than {MAX_PIXELS} pixels")
            image.load()
            return image.copy()
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        if isinstance(error, InvalidSetting):
            raise
        raise InvalidSetting(option, f"{path} is no picture that can be read") from None
    except OSError as error:
        reason = error.strerror or "is cut short or damaged"
        raise InvalidSetting(option, f"{path}: {reason}") from None


def optional_picture(path: Path | None, option: str) -> "Image | None":
    """Read the picture in a file if the option is given."""
    return None if path is None else read_picture(path, option)


def read_image_prompts(texts: list[str] | None) -> tuple["ImagePrompt", ...]:
    """Parse image prompts, FILE or FILE:WEIGHT each."""
    from cascade import ImagePrompt

    parts = [split_number(text, "image_prompts", is_file=True) for text in texts or ()]
    return tuple(ImagePrompt(read_picture(Path(path), "image_prompts"), weight) for path, weight in parts)


def read_loras(texts: list[str] | None) -> tuple["LoRAUse", ...]:
    """Parse LoRAs, NAME or NAME:SCALE each."""
    from cascade import LoRAUse

    return tuple(LoRAUse(*split_number(text, "loras", is_file=False)) for text in texts or ())


def read_control(
    text: str | None, scale: float, interval: tuple[float, float], *, preprocess: bool, faithful: bool | None
) -> "Control | None":
    """Parse KIND:FILE; for `identity` FILE is a safetensors file with a map."""
    from cascade import Control
    from cascade.errors import InvalidSetting

    if text is None:
        return None
    kind, colon, name = text.partition(":")
    if not colon or not name:
        raise InvalidSetting("control", f"must be KIND:FILE, but is {text!r}")
    if kind == "identity":
        from cascade.tasks.control import read_map

        picture: Image | FeatureMap = read_map(Path(name))
    else:
        picture = read_picture(Path(name), "control")
    return Control(kind, picture, scale, *interval, preprocess=preprocess, faithful=faithful)


def split_number(text: str, option: str, *, is_file: bool) -> tuple[str, float]:
    """Split NAME:NUMBER; the number is 1 if absent. A colon may be part of a file's name."""
    from cascade.errors import InvalidSetting

    name, colon, number = text.rpartition(":")
    if not colon or (is_file and Path(text).exists()):
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        if is_file:
            return text, 1.0
        raise InvalidSetting(option, f"must be NAME or NAME:SCALE, but is {text!r}") from None
