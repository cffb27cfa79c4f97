"""The one training loop: AdamW, warm-up and cosine, an average of the weights, resuming, live figures.

A trainer brings a module and a loss; everything else is the same for all components. The state is written
as safetensors (never pickled) and replaced atomically, so that a run may be stopped at any moment.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.memory import keep_freed_memory

Loss = Callable[[nn.Module, int, np.random.Generator], tuple[Tensor, dict[str, float]]]
Sampler = Callable[[nn.Module, int], None]

STATE_FILE = "training.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup: int = 100
    final_fraction: float = 0.01  # of the learning rate, at the last step
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 500
    sample_every: int = 0
    compute_dtype: torch.dtype = torch.float32  # bf16: the loss sees a rounded copy, the updates stay fp32

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = min(1.0, step / self.steps)
        cosine = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * warm * cosine


def fit(
    module: nn.Module,
    loss: Loss,
    plan: Plan,
    folder: Path,
    *,
    title: str,
    sample: Sampler | None = None,
    trainable: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Train `module` to the end of `plan` and return a copy with the averaged weights.

    Args:
        loss: (module, step, random generator) -> loss and figures to show. The generator depends only on
            the plan's seed and the step, so a resumed run draws what an undisturbed one would.
        folder: keeps the state; an unfinished run found there is continued.
        sample: called with the averaged module every `plan.sample_every` steps and at the end.
        trainable: masks by parameter name; entries where a mask is 0 keep their values.
    """
    keep_freed_memory()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=plan.learning_rate,
        betas=plan.betas,
        weight_decay=plan.weight_decay,
        fused=True,
    )
    average = deepcopy(module).eval().requires_grad_(False)
    worker = module if plan.compute_dtype == torch.float32 else deepcopy(module).to(plan.compute_dtype)
    copies = {name: p for name, p in worker.named_parameters() if name in parameters}
    start = _resume(folder / STATE_FILE, module, average, optimizer, parameters)
    figures: dict[str, float] = {}
    with _progress(title) as progress:
        task = progress.add_task(title, total=plan.steps, completed=start, figures="")
        for step in range(start, plan.steps):
            worker.train()
            if worker is not module:
                torch._foreach_copy_([p.data for p in copies.values()], [p.data for p in parameters.values()])
            rng = np.random.default_rng((plan.seed, step))
            torch.manual_seed(int(rng.integers(2**62)))
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            value, shown = loss(worker, step, rng)
            value.backward()  # type: ignore[no-untyped-call]
            _collect_gradients(parameters, copies, trainable or {})
            norm = nn.utils.clip_grad_norm_(parameters.values(), plan.clip_norm)
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _update_average(average, module, min(plan.ema_decay, (step + 1) / (step + 10)))
            _blend(figures, {"loss": float(value.detach()), **shown})
            progress.update(task, advance=1, figures=_format(figures))
            done = step + 1
            if done % plan.save_every == 0 or done == plan.steps:
                _save(folder / STATE_FILE, module, average, optimizer, parameters, done)
                progress.log_line(done, figures)
            if sample and (done == plan.steps or (plan.sample_every and done % plan.sample_every == 0)):
                sample(average, done)
    return average


def _collect_gradients(
    parameters: dict[str, nn.Parameter], copies: dict[str, nn.Parameter], trainable: Mapping[str, Tensor]
) -> None:
    """Hand the gradients of the working copy to the parameters proper, without those of frozen entries."""
    for name, copy in copies.items():
        if copy.grad is None:
            continue
        gradient = copy.grad.float()
        parameters[name].grad = gradient * trainable[name] if name in trainable else gradient
        if copy is not parameters[name]:
            copy.grad = None


class _Report(Progress):
    """A progress bar on a terminal; plain lines, one at each save, in a log file."""

    started = 0.0

    def log_line(self, step: int, figures: dict[str, float]) -> None:
        if not self.console.is_terminal:
            minutes = (time.monotonic() - self.started) / 60
            self.console.print(f"step {step}  {minutes:.1f} min  {_format(figures)}", highlight=False)
            sys.stdout.flush()


def _progress(title: str) -> _Report:
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    report = _Report(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2)
    report.started = time.monotonic()
    return report


def _blend(figures: dict[str, float], new: dict[str, float]) -> None:
    for name, value in new.items():
        figures[name] = 0.98 * figures[name] + 0.02 * value if name in figures else value


def _format(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


@torch.no_grad()
def _update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    pairs = [
        (a, p) for a, p in zip(average.parameters(), module.parameters(), strict=True) if p.requires_grad
    ]
    torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(current)


def _save(
    path: Path,
    module: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    step: int,
) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for name, parameter in parameters.items():
        for key, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"progress": json.dumps({"step": step})})
    os.replace(partial, path)


def _resume(
    path: Path,
    module: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
) -> int:
    """Fill everything from the state file, if there is one; the number of steps already done."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(json.loads(file.metadata()["progress"])["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    module.load_state_dict(
        {k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")}
    )
    average.load_state_dict(
        {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
    )
    for name, parameter in parameters.items():
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {key: tensors.get(f"optimizer.{key}.{name}") for key in keys}
        if all(tensor is not None for tensor in state.values()):
            optimizer.state[parameter] = state
    return step
