"""Figures of an evaluation of tasks, and the `Easel` that draws their pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from cascade.evaluation.evaluate import BATCH_SIZE
from cascade.evaluation.verifier import judge, read_picture
from cascade.models import Models
from cascade.tasks.generation import generate, run_to_end
from cascade.tasks.settings import ImageSettings
from cascade.training.captions import Caption, caption
from cascade.training.scenes import Picture, Scene, held_out_generator, sample_scene


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and the bounds that it should keep; without bounds it only informs."""

    name: str
    value: float
    least: float | None = None
    most: float | None = None
    unit: str = ""  # "%": the value is a fraction of 1, shown in percent

    @property
    def met(self) -> bool:
        """Whether the value is within the bounds; NaN never is."""
        low = -np.inf if self.least is None else self.least
        high = np.inf if self.most is None else self.most
        return bool(low <= self.value <= high)

    @property
    def target(self) -> str:
        """The bounds in words, such as "at least 85 %"; empty without any."""
        bounds = (("at least", self.least), ("at most", self.most))
        return " and ".join(f"{word} {self._said(bound)}" for word, bound in bounds if bound is not None)

    def __str__(self) -> str:
        return self._said(self.value)

    def _said(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.4g} %"
        return f"{value:.4g} {self.unit}".rstrip()


def share(
    name: str, hits: Sequence[bool], *, least: float | None = None, most: float | None = None
) -> Figure:
    """Return the share of `hits` that are true as a figure in percent."""
    return Figure(f"{name} (of {len(hits)})", float(np.mean(hits)), least, most, "%")


@dataclass(slots=True)
class Easel:
    """Draws the pictures of a task in batches; `report` is called with the size of each.

    `shown` keeps the pictures by name, for inspection.
    """

    models: Models
    count: int  # cases per figure
    seed: int = 0
    report: Callable[[int], None] = lambda _: None
    shown: dict[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def generator(self) -> np.random.Generator:
        """A new generator for the cases of a task, always seeded alike."""
        return held_out_generator(1000 + self.seed)

    def scenes(self, rng: np.random.Generator, size: tuple[int, int] = (256, 256)) -> list[Scene]:
        """Sample one scene for each case."""
        return [sample_scene(rng, size) for _ in range(self.count)]

    def draw(self, name: str, requests: Sequence[ImageSettings]) -> list[Picture]:
        """Draw `requests`, row i with the seed `seed` + i, and return the pixels."""
        seeded = [replace(request, seed=self.seed + row) for row, request in enumerate(requests)]
        images: list[Image.Image] = []
        for start in range(0, len(seeded), BATCH_SIZE):
            batch = seeded[start : start + BATCH_SIZE]
            images += [made[0].image for made in run_to_end(generate(self.models, batch))]
            self.report(len(batch))
        return self.show(name, images)

    def show(self, name: str, images: Sequence[Image.Image]) -> list[Picture]:
        """Keep pictures in `shown` and return their pixels."""
        self.shown[name] = list(images)
        return [np.asarray(image.convert("RGB")) for image in images]


def told(scene: Scene, rng: np.random.Generator, *, background: bool = False) -> Caption:
    """Return a caption of `scene`; with `background`, one that states the background."""
    while "background" not in (stated := caption(scene, rng)).facts and background:
        pass
    return stated


def are_right(captions: Sequence[Caption], pictures: Sequence[Picture]) -> list[bool]:
    """Return for each picture whether it shows what its caption says."""
    return [
        judge(one.facts, read_picture(picture)).is_right
        for one, picture in zip(captions, pictures, strict=True)
    ]
