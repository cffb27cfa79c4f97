"""Distils Stage C to four steps without guidance: a LoRA for the sampler "lcm".

Consistency distillation (Luo et al. 2023, latent consistency models): from noised latents the frozen, guided
Stage C takes one deterministic step; what the student says of the place it came from should be what its
average says of the place it went to. So all noise levels come to agree on one clean code.
"""

from copy import deepcopy
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.networks.stage_c import StageC
from cascade.sampling.guidance import guide
from cascade.sampling.presets import PRESETS
from cascade.sampling.samplers import clean_latents
from cascade.sampling.schedule import CosineSchedule, signal_and_noise
from cascade.training.drawing_codes import conditions, draw_codes, held_out, shares_right
from cascade.training.loop import Plan, fit
from cascade.training.low_rank import LowRank, Predictor, all_matrices, save_dotted
from cascade.training.stage_c import SCHEDULE, load_text_encoder
from cascade.training.tables import CPU, choose_table, embed_table, make_tables

NAME = "lcm"
STEPS = 4
PLAN = Plan(
    steps=30_000,
    learning_rate=1e-3,
    warmup=200,
    ema_decay=0.999,
    final_fraction=0.02,
    save_every=500,
    judge_every=1000,
    seed=61,
)

_RANK = 24
_GUIDANCE = 4.0
_HOP = 1 / 16  # of the run, by which the teacher steps
_TARGET_DECAY = 0.95
_AT_START = 0.25  # share of rows of pure noise
_AT_STEPS = 0.35  # share of rows at the levels of a run of four steps
_HUBER = 0.03
_STRENGTH = 0.5  # that is written: of 80 prompts the whole change drew 58 right, half of it 71 and none 69


def train(
    out: Path,
    model: Path = EMBEDDED["tiny"],
    plan: Plan = PLAN,
    *,
    device: torch.device = CPU,
    batch: int = 48,
    scenes: int = 20_000,
) -> None:
    """Train the LoRA `out`/lcm.safetensors; an interrupted run goes on where it was."""
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(model / "prior")).to(device).eval().requires_grad_(False)
    text = load_text_encoder(model)
    text.model.to(device).float()
    schedule = CosineSchedule(SCHEDULE)
    tables = make_tables(text, scenes, seed=plan.seed, device=device)
    embedded = {table.size: embed_table(text, table) for table in tables}
    empty = text.encode([""])
    no_text = empty.hidden.clone(), empty.pooled.clone()
    predictor = Predictor(stage)
    student = LowRank(stage, all_matrices(stage), _RANK, 1.0).to(device)
    target: LowRank | None = None

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        nonlocal target
        assert isinstance(module, LowRank)
        target = follow(target, module)
        table = choose_table(tables, rng)
        rows = torch.from_numpy(rng.integers(0, len(table), batch)).to(device)
        words = tuple(part[rows] for part in embedded[table.size])
        times = draw_times(batch, rng)
        log_snr = schedule.log_snr(times)
        later = schedule.log_snr((times - _HOP).clamp(min=0))
        noised = noised_rows(table.codes[rows], log_snr.to(device), (times == 1).to(device))
        ratio, later_ratio = (schedule.ratio(level).float().to(device) for level in (log_snr, later))
        is_end = (times <= _HOP).to(device)
        with torch.no_grad():
            stepped, clean = teacher_step(
                predictor, noised, ratio, log_snr.to(device), later.to(device), words, no_text
            )
            noise = target.predict(predictor, stepped, later_ratio, *words)
            said = clean_latents(stepped, noise.float(), later.to(device))
            goal = torch.where(is_end.view(-1, 1, 1, 1), clean, said)
        noise = module.predict(predictor, noised, ratio, *words)
        apart = clean_latents(noised, noise.float(), log_snr.to(device)) - goal
        value = ((apart.square() + _HUBER**2).sqrt() - _HUBER).mean()
        return value, {"error": float(apart.detach().square().mean())}

    best = 0.0

    def report(module: nn.Module, step: int) -> dict[str, float]:
        nonlocal best
        assert isinstance(module, LowRank)
        figures = judge(module, stage, schedule, model)
        score = figures["right_1"] + figures["right_2"]
        if score >= best:
            best = score
            path = out / f"{NAME}.safetensors"
            save_dotted(module, path, metadata(step, figures), strength=_STRENGTH)
        return figures

    fit(
        student,
        loss,
        plan,
        out / NAME,
        title="LCM",
        judge=report,
        trainable=student.trainable(StageC(stage.config)),
    )


def metadata(step: int, figures: dict[str, float]) -> dict[str, str]:
    """What the file says about itself."""
    return {"name": NAME, "sampler": "lcm", "steps": str(STEPS), "guidance_scale": "1"}


def follow(target: LowRank | None, student: LowRank) -> LowRank:
    """The slow copy of the student that it learns from."""
    if target is None:
        return deepcopy(student).requires_grad_(False)
    torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - _TARGET_DECAY)
    return target


def draw_times(count: int, rng: np.random.Generator) -> Tensor:
    """Times of the noised rows, (b,) in fp64: the start, the steps of a short run, and anywhere."""
    times = (rng.permutation(count) + 1 - rng.random(count)) / count
    kind = rng.random(count)
    times[kind < _AT_START + _AT_STEPS] = (
        rng.integers(1, STEPS, int((kind < _AT_START + _AT_STEPS).sum())) / STEPS
    )
    times[kind < _AT_START] = 1.0
    return torch.from_numpy(times)


def noised_rows(clean: Tensor, log_snr: Tensor, is_start: Tensor) -> Tensor:
    """Latents at their levels; rows at the start are pure noise, as a run begins."""
    alpha, sigma = (scale.float().view(-1, 1, 1, 1) for scale in signal_and_noise(log_snr))
    noise = torch.randn_like(clean)
    return torch.where(is_start.view(-1, 1, 1, 1), noise, alpha * clean + sigma * noise)


def teacher_step(
    predictor: Predictor,
    latents: Tensor,
    ratio: Tensor,
    log_snr: Tensor,
    later: Tensor,
    words: tuple[Tensor, ...],
    no_text: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Latents after a deterministic, guided step from `log_snr` to `later`, and the clean ones predicted."""
    count = len(latents)
    both = [
        torch.cat([told, empty.expand(count, -1, -1)]) for told, empty in zip(words, no_text, strict=True)
    ]
    noise = predictor(latents.repeat(2, 1, 1, 1), ratio.repeat(2), *both).float()
    scale = torch.full((count,), _GUIDANCE, device=latents.device)
    rescale = torch.full((count,), PRESETS["official"].rescale, device=latents.device)
    guided = guide(noise[:count], noise[count:], scale, rescale)
    clean = clean_latents(latents, guided, log_snr)
    alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in signal_and_noise(later))
    return alpha * clean + sigma * guided, clean


@torch.no_grad()
def judge(
    adapter: LowRank, stage: StageC, schedule: CosineSchedule, model: Path, count: int = 200
) -> dict[str, float]:
    """Shares of held-out captions whose code, drawn in four steps without guidance, reads right."""
    text = load_text_encoder(model)
    text.model.to(stage.device).float()
    scenes, captions = held_out(count)
    embeddings = text.encode([one.text for one in captions])
    merged = adapter.merged(stage)
    guided, unguided = conditions(merged, embeddings.hidden.clone(), embeddings.pooled.clone(), text)
    codes = draw_codes(
        merged, schedule, guided, unguided, guidance_scale=1, steps=STEPS, sampler="lcm", count=count
    )
    return shares_right(codes, scenes, captions)
