"""Latents that a short run visits, and the codes to which the guided Stage C goes from there.

A run of few steps visits latents that are unlike any noised picture: its first predictions lie between the
pictures that a prompt allows. So the student is trained on its own latents (Ross et al. 2011, DAgger). From
each of them the teacher, guided and in small deterministic steps, goes to a clean code. That is read and
encoded anew, so it is exactly the code of a scene; a scene that does not match its caption is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cascade.conditioning import TextEncoder
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from cascade.sampling.guidance import guide
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import clean_latents
from cascade.sampling.schedule import CosineSchedule, signal_and_noise
from cascade.training.captions import Caption, caption
from cascade.training.code import grid_size, read_code, scene_code
from cascade.training.drawing_codes import conditions, shows
from cascade.training.scenes import Scene, sample_scene

GUIDANCE = 4.0

_HOP = 1 / 8  # the teacher's step, as a share of the run
_DECIDED = 0.5  # time up to which guidance does nothing (by Stage C's training)
_FARTHEST = 0.15  # largest squared distance of a code from that of the scene that it reads as


@dataclass(frozen=True, slots=True)
class Visits:
    """Rows to learn from, all at one time of the run."""

    latents: Tensor  # (n, 16, h, w): visited by the student
    goals: Tensor  # (n, 16, h, w): clean codes that it should have predicted
    hidden: Tensor  # (n, t, d) and
    pooled: Tensor  # (n, 1, d): embeddings of its prompts

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor | slice) -> "Visits":
        """Return some of the rows."""
        return Visits(*(getattr(self, part.name)[rows] for part in fields(self)))

    def followed_by(self, later: "Visits", most: int) -> "Visits":
        """Return the rows of both; of more than `most` the oldest are dropped."""
        both = Visits(
            *(torch.cat([getattr(self, part.name), getattr(later, part.name)]) for part in fields(self))
        )
        return both[slice(max(0, len(both) - most), len(both))]


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts for pictures of one size, with the scenes that they describe."""

    scenes: list[Scene]
    captions: list[Caption]
    hidden: Tensor  # (n, t, d)
    pooled: Tensor  # (n, 1, d)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the codes."""
        return grid_size(self.scenes[0].width, self.scenes[0].height)


def ask(text: TextEncoder, count: int, size: tuple[int, int], rng: np.random.Generator) -> Asked:
    """Sample new scenes of a size (width, height) and captions of them."""
    scenes = [sample_scene(rng, size) for _ in range(count)]
    captions = [caption(scene, rng) for scene in scenes]
    embeddings = text.encode([one.text for one in captions])
    return Asked(scenes, captions, embeddings.hidden.clone(), embeddings.pooled.clone())


@torch.no_grad()
def visit(
    student: StageC,
    teacher: StageC,
    schedule: CosineSchedule,
    text: TextEncoder,
    asked: Asked,
    times: Sequence[float],
) -> list[Visits]:
    """Let the student draw with the sampler "lcm" at some `times`, and let the teacher continue from each.

    Where the teacher does not reach the scene asked for, the goal is the last one that it reached from an
    earlier time of the same run; without one, the row is left out.

    Returns:
        Rows by time; the prompt of a run is the same at all times.
    """
    count, device = len(asked.scenes), teacher.device
    told, _ = conditions(student, asked.hidden, asked.pooled, text)
    guided, unguided = conditions(teacher, asked.hidden, asked.pooled, text)
    both = Condition.cat([guided, unguided[[0] * count]])
    latents = torch.randn(count, 16, *asked.grid, device=device)
    goals = torch.zeros_like(latents)
    is_known = torch.zeros(count, dtype=torch.bool)
    visits = []
    for time, later in pairwise([*times, 0.0]):
        ends = go_on(teacher, schedule, latents, time, guided, both)
        for row, (end, scene, stated) in enumerate(zip(ends, asked.scenes, asked.captions, strict=True)):
            goal = exact(end, scene, stated)
            if goal is not None:
                goals[row], is_known[row] = goal.to(device), True
        kept = is_known.nonzero().flatten().to(device)
        words = (part[kept].to(teacher.dtype) for part in (asked.hidden, asked.pooled))
        visits.append(Visits(latents[kept], goals[kept], *words))
        if later > 0:
            level, ratio = level_at(schedule, time, count, device)
            clean = clean_latents(latents, student(latents, ratio, told).float(), level)
            alpha, sigma = scales_at(schedule, later)
            latents = alpha * clean + sigma * torch.randn_like(clean)
    return visits


def go_on(
    teacher: StageC,
    schedule: CosineSchedule,
    latents: Tensor,
    start: float,
    guided: Condition,
    both: Condition,
) -> Tensor:
    """Return the clean codes that the teacher reaches from latents (b, 16, h, w) at the time `start`.

    Args:
        guided: conditions of the prompts, b rows.
        both: the same and then those of the empty prompt, 2 b rows.
    """
    count = len(latents)
    clean = latents
    scale = torch.full((count,), GUIDANCE, device=latents.device)
    rescale = torch.full((count,), PRESETS["official"].rescale, device=latents.device)
    times = np.linspace(start, 0, max(2, round(start / _HOP)) + 1).tolist()
    for time, later in pairwise(times):
        level, ratio = level_at(schedule, time, count, latents.device)
        if time > _DECIDED:
            noise = teacher(latents.repeat(2, 1, 1, 1), ratio.repeat(2), both).float()
            noise = guide(noise[:count], noise[count:], scale, rescale)
        else:
            noise = teacher(latents, ratio, guided).float()
        clean = clean_latents(latents, noise, level)
        alpha, sigma = scales_at(schedule, later)
        latents = alpha * clean + sigma * noise
    return clean


def exact(code: Tensor, asked: Scene, stated: Caption) -> Tensor | None:
    """Return the exact code of the scene that `code` (16, h, w) reads as, or None if it was not asked for."""
    values = code.float().cpu().numpy()
    read = read_code(values, (asked.width, asked.height))
    if not shows(read, asked, stated) or not stands_as_told(read, stated):
        return None
    if any(thing.colour == read.background for thing in read.things):
        return None
    written = scene_code(read)
    return torch.from_numpy(written) if float(((written - values) ** 2).mean()) < _FARTHEST else None


def stands_as_told(read: Scene, stated: Caption) -> bool:
    """Return whether things have the places and sizes that the caption states; colours identify them."""
    judges: dict[str, Callable[..., str]] = {"place": read.place, "size": read.size_word}
    return all(
        told(thing) == stated.facts.get(f"{mention}_{what}", told(thing))
        for mention in ("first", "second")
        for thing in read.things
        if thing.colour == stated.facts.get(f"{mention}_colour")
        for what, told in judges.items()
    )


def level_at(
    schedule: CosineSchedule, time: float, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return level (log SNR) and ratio at `time` for `count` rows, (count,) each."""
    level = schedule.log_snr(torch.full((count,), time, dtype=torch.float64))
    return level.float().to(device), schedule.ratio(level).float().to(device)


def scales_at(schedule: CosineSchedule, time: float) -> tuple[float, float]:
    """Return alpha and sigma at `time`."""
    alpha, sigma = signal_and_noise(schedule.log_snr(torch.tensor(time, dtype=torch.float64)))
    return float(alpha), float(sigma)
