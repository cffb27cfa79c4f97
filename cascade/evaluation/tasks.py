"""Scores of every task of a checkpoint, on held-out scenes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cascade.errors import InvalidSetting
from cascade.evaluation.figures import Easel, Figure
from cascade.evaluation.picture_tasks import (
    ASPECTS,
    STRENGTHS,
    image_to_image,
    inpainting,
    reconstruction,
    variation,
)
from cascade.evaluation.trained_tasks import ENLARGED, canny, lcm, lora, super_resolution
from cascade.models import Models


@dataclass(frozen=True, slots=True)
class Task:
    """How a task is scored, and how many pictures that takes."""

    score: Callable[[Easel], list[Figure]]
    pictures: int  # drawn per case, at most


TASKS = MappingProxyType(
    {
        "reconstruct": Task(reconstruction, len(ASPECTS)),
        "image-to-image": Task(image_to_image, len(STRENGTHS) + 1),
        "variation": Task(variation, 3),
        "inpainting": Task(inpainting, 3),
        "control": Task(canny, 2),
        "super-resolution": Task(super_resolution, len(ENLARGED)),
        "lora": Task(lora, 4),
        "lcm": Task(lcm, 2),
    }
)


def choose_tasks(names: Sequence[str]) -> list[str]:
    """Return the named tasks in order, "all" for all; raise `InvalidSetting` for an unknown name."""
    for name in names:
        if name not in TASKS and name != "all":
            raise InvalidSetting("tasks", f"must be one of all, {', '.join(TASKS)}, but is {name!r}")
    return [name for name in TASKS if name in names or "all" in names]


def evaluate_tasks(
    models: Models,
    names: Sequence[str],
    count: int,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Figure]]:
    """Score tasks with `count` cases each; a task that the checkpoint cannot do has no figures.

    Args:
        progress: called with the number of pictures made and the number to make.
    """
    total = count * sum(TASKS[name].pictures for name in names)
    done = 0

    def report(made: int) -> None:
        nonlocal done
        done += made
        if progress is not None:
            progress(done, total)

    figures = {}
    for name in names:
        figures[name] = TASKS[name].score(Easel(models, count, seed, report))
    report(total - done)
    return figures
