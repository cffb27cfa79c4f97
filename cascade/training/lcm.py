"""Distils Stage C to four steps without guidance: a LoRA for the sampler "lcm".

The sampler is that of latent consistency models (Luo et al. 2023): predict the clean latents, noise them
anew to the next level, and so on. The LoRA is trained on the latents that such runs visit
(`cascade.training.visits`): from there it has to predict at once where the guided Stage C would arrive.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.networks.stage_c import StageC
from cascade.sampling.samplers import clean_latents
from cascade.sampling.schedule import CosineSchedule
from cascade.training.code import read_code, scene_code
from cascade.training.drawing_codes import conditions, draw_codes, held_out, shares_right, shows
from cascade.training.loop import Plan, fit
from cascade.training.low_rank import LowRank, Predictor, all_matrices, save_dotted
from cascade.training.scenes import SQUARE_SIZE, sample_size
from cascade.training.stage_c import SCHEDULE, load_text_encoder
from cascade.training.tables import CPU
from cascade.training.visits import Visits, ask, level_at, visit

NAME = "lcm"
STEPS = 4
TIMES = tuple(1 - step / STEPS for step in range(STEPS))  # of the run's steps, in the sampler's order
PLAN = Plan(
    steps=10_000,
    learning_rate=1e-3,
    matrix_rate=7e-3,
    warmup=100,
    compute_dtype=torch.bfloat16,
    ema_decay=0.998,
    final_fraction=0.02,
    save_every=250,
    judge_every=1000,
    seed=61,
)

_RANK = 28
_FIRST = 8  # batches of runs before the first step
_EVERY = 50  # steps between visits
_PER_VISIT = 2  # batches of runs
_HUBER = 0.03
_NEAR = 0.03  # squared distance from a scene's code, within which Stage B draws it well


class Lessons:
    """All rows to learn from, by the size of their pictures and their time.

    Beyond `most` runs in all, the oldest are dropped: each size keeps the share of `most` that it has of all
    runs so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # runs, of all sizes together
        self.seen: dict[tuple[int, int], int] = {}  # runs so far
        self.rows: dict[tuple[int, int], list[Visits]] = {}

    def __len__(self) -> int:
        return sum(len(visits[0]) for visits in self.rows.values())

    def add(self, size: tuple[int, int], visits: list[Visits]) -> None:
        """Add the rows of some runs.

        Latents of later steps come from a student that has changed since, so fewer of them are kept.
        """
        known = self.rows.get(size)
        self.rows[size] = (
            [old.followed_by(new, len(old) + len(new)) for old, new in zip(known, visits, strict=True)]
            if known
            else visits
        )
        self.seen[size] = self.seen.get(size, 0) + len(visits[0])
        seen = sum(self.seen.values())
        for each, kept in self.rows.items():
            most = max(1, round(self.most * self.seen[each] / max(1, seen)))
            bounds = (most, *(max(1, most // 8),) * (STEPS - 1))
            self.rows[each] = [
                some[max(0, len(some) - bound) :] for some, bound in zip(kept, bounds, strict=True)
            ]

    def draw(self, count: int, rng: np.random.Generator) -> list[Visits]:
        """Draw `count` rows of one size, about as many of each time."""
        sizes = [size for size, visits in self.rows.items() if all(map(len, visits))]
        chances = np.array([len(self.rows[size][0]) for size in sizes], float)
        visits = self.rows[sizes[int(rng.choice(len(sizes), p=chances / chances.sum()))]]
        shares = [len(part) for part in np.array_split(np.arange(count), STEPS)]
        return [
            some[torch.from_numpy(rng.integers(0, len(some), share)).to(some.latents.device)]
            for some, share in zip(visits, shares, strict=True)
        ]


def train(
    out: Path,
    model: Path = EMBEDDED["tiny"],
    plan: Plan = PLAN,
    *,
    device: torch.device = CPU,
    batch: int = 48,
    scenes: int = 20_000,
) -> None:
    """Train the LoRA `out`/lcm.safetensors; an interrupted run is resumed, with new visits.

    Args:
        scenes: the number of runs whose visits are kept.
    """
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(model / "prior")).to(device).eval().requires_grad_(False)
    worker = cast(StageC, load_network(model / "prior")).to(device, plan.compute_dtype)
    worker = worker.eval().requires_grad_(False)
    text = load_text_encoder(model)
    text.model.to(device).float()
    schedule = CosineSchedule(SCHEDULE)
    predictor = Predictor(worker)
    lessons = Lessons(scenes)
    student = LowRank(stage, all_matrices(stage), _RANK, 1.0).to(device)

    def learn_more(module: LowRank, batches: int, rng: np.random.Generator) -> None:
        merged = module.merged(worker)
        for _ in range(batches):
            size = sample_size(rng)
            asked = ask(text, batch, size, rng)
            lessons.add(size, visit(merged, worker, schedule, text, asked, TIMES))

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, LowRank)
        if not lessons.rows:
            learn_more(module, _FIRST, rng)
        elif step % _EVERY == 0:
            learn_more(module, _PER_VISIT, rng)
        visits = lessons.draw(batch, rng)
        levels, ratios = zip(
            *(level_at(schedule, time, len(some), device) for time, some in zip(TIMES, visits, strict=True)),
            strict=True,
        )
        latents, goals, hidden, pooled = (
            torch.cat([getattr(some, name) for some in visits])
            for name in ("latents", "goals", "hidden", "pooled")
        )
        noise = module.predict(predictor, latents, torch.cat(ratios), hidden, pooled)
        errors = apart(clean_latents(latents, noise.float(), torch.cat(levels)), goals)
        by_time = [float(some.detach().mean()) for some in torch.split(errors, list(map(len, visits)))]
        figures = {f"at_{time:g}": error for time, error in zip(TIMES, by_time, strict=True)}
        return errors.mean(), figures | {"runs": float(len(lessons))}

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, LowRank)
        save_dotted(module, out / f"{NAME}.safetensors", metadata())
        return judge(module, stage, schedule, model)

    fit(
        student,
        loss,
        plan,
        out / NAME,
        title="LCM",
        judge=report,
        trainable=student.trainable(StageC(stage.config)),
    )


def metadata() -> dict[str, str]:
    """Return the metadata of the LoRA's file."""
    return {"name": NAME, "sampler": "lcm", "steps": str(STEPS), "guidance_scale": "1"}


def apart(clean: Tensor, goals: Tensor) -> Tensor:
    """Return the distance of codes (b, 16, h, w) from their goals, (b,): of the background plus of the rest.

    It is not squared: where several scenes may be meant, the code at the least squared distance lies between
    them and shows none; that at the least plain distance is one of them, the likeliest.
    """
    wrong = (clean - goals).square()
    parts = (wrong[:, :3].mean((1, 2, 3)), wrong[:, 3:].mean((1, 2, 3)))
    return torch.stack([(part + _HUBER**2).sqrt() - _HUBER for part in parts]).sum(0)


@torch.no_grad()
def judge(
    adapter: LowRank, stage: StageC, schedule: CosineSchedule, model: Path, count: int = 200
) -> dict[str, float]:
    """Return the shares of held-out captions whose code, drawn in four steps without guidance, reads right.

    A code may read right and yet lie too far from every scene to be drawn well. "drawn" is the share of those
    that read right and lie near, "blur" the mean distance. Of 240 pictures, 94 % of those with such codes
    were verified, and 62 % of those whose codes read right but lay farther off.
    """
    text = load_text_encoder(model)
    text.model.to(stage.device).float()
    scenes, captions = held_out(count)
    embeddings = text.encode([one.text for one in captions])
    merged = adapter.merged(stage)
    guided, unguided = conditions(merged, embeddings.hidden.clone(), embeddings.pooled.clone(), text)
    codes = draw_codes(
        merged, schedule, guided, unguided, guidance_scale=1, steps=STEPS, sampler="lcm", count=count
    )
    blurs = [blur(code) for code in codes]
    drawn = [
        near < _NEAR and shows(read_code(code.numpy(), SQUARE_SIZE), scene, stated)
        for code, near, scene, stated in zip(codes, blurs, scenes, captions, strict=True)
    ]
    figures = {"drawn": round(float(np.mean(drawn)), 3), "blur": round(float(np.mean(blurs)), 4)}
    return shares_right(codes, scenes, captions) | figures


def blur(code: Tensor) -> float:
    """Return the squared distance of a square picture's code from that of the scene that it reads as."""
    values = code.numpy()
    return float(((scene_code(read_code(values, SQUARE_SIZE)) - values) ** 2).mean())
