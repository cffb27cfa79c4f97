"""What the tests of the command share: how it was left, and settings that make a picture quickly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = ("--width", "128", "--height", "128", "--steps", "2", "--decoder-steps", "2")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit status and both streams of a command."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


def files(folder: Path) -> list[str]:
    """Names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    """A picture as an array, (h, w, 3)."""
    with Image.open(path) as image:
        return np.asarray(image)
