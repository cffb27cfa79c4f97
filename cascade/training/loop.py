"""The one training loop: Muon and AdamW, warm-up and cosine, averaged weights, resuming, live figures.

A trainer provides a module and a loss; everything else is the same for all components. The state is written
as safetensors (never pickled) and replaced atomically, so that a run may be stopped at any moment.
"""

import hashlib
import json
import math
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

from cascade.errors import CheckpointError

Loss = Callable[[nn.Module, int, np.random.Generator], tuple[Tensor, dict[str, float]]]
Judge = Callable[[nn.Module, int], dict[str, float]]

STATE_FILE = "training.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    matrix_rate: float = 0.0  # of Muon for the weight matrices; 0: AdamW for everything
    warmup: int = 100
    final_fraction: float = 0.01  # of the learning rate, at the last step
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 500
    judge_every: int = 0
    seconds: float = 0.0  # time limit for all parts of the run together; 0: none
    compute_dtype: torch.dtype = torch.float32  # bf16: the loss sees a rounded copy, the updates stay fp32

    def progress(self, step: int, spent: float = 0.0) -> float:
        """Return the factor of the learning rates at a step: linear warm-up, then half a cosine.

        With a time limit, progress is the larger of the shares of the steps made and of the seconds `spent`.
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = min(1.0, max(step / self.steps, spent / self.seconds if self.seconds else 0.0))
        cosine = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
        return warm * cosine


def fit(
    module: nn.Module,
    loss: Loss,
    plan: Plan,
    folder: Path,
    *,
    title: str,
    judge: Judge | None = None,
    trainable: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Train `module` to the end of `plan` and return a copy with the averaged weights.

    Args:
        loss: (module, step, random generator) -> loss and figures to show. The generator depends only on
            the plan's seed and the step, so a resumed run draws what an undisturbed one would.
        folder: keeps the state; an unfinished run found there is continued.
        judge: called with the averaged module every `plan.judge_every` steps and at the end; may save files
            and returns figures, which are shown.
        trainable: masks by parameter name; entries where a mask is 0 keep their values.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = _Optimizer(parameters, plan)
    masks = {name: mask.to(parameters[name].device) for name, mask in (trainable or {}).items()}
    average = deepcopy(module).eval().requires_grad_(False)
    worker = module if plan.compute_dtype == torch.float32 else deepcopy(module).to(plan.compute_dtype)
    copies = {name: p for name, p in worker.named_parameters() if name in parameters}
    start, spent = _resume(folder / STATE_FILE, module, average, optimizer)
    began = time.monotonic()
    figures: dict[str, float] = {}
    with _progress(title) as progress:
        task = progress.add_task(title, total=plan.steps, completed=start, figures="")
        for step in range(start, plan.steps):
            elapsed = (spent or 0.0) + time.monotonic() - began
            worker.train()
            if worker is not module:
                torch._foreach_copy_([p.data for p in copies.values()], [p.data for p in parameters.values()])
            rng = np.random.default_rng((plan.seed, step))
            torch.manual_seed(int(rng.integers(2**62)))
            value, shown = loss(worker, step, rng)
            value.backward()  # type: ignore[no-untyped-call]
            _collect_gradients(parameters, copies, masks)
            norm = nn.utils.clip_grad_norm_(parameters.values(), plan.clip_norm)
            if torch.isfinite(norm):
                optimizer.step(plan.progress(step, elapsed))
            for parameter in parameters.values():
                parameter.grad = None
            _update_average(average, module, min(plan.ema_decay, (step + 1) / (step + 10)))
            _blend(figures, {"loss": float(value.detach()), **shown})
            progress.update(task, advance=1, figures=_format(figures))
            done = step + 1
            is_last = done == plan.steps or 0 < plan.seconds <= elapsed
            if done % plan.save_every == 0 or is_last:
                seconds = None if spent is None else spent + time.monotonic() - began
                _save(folder / STATE_FILE, module, average, optimizer, done, seconds)
                progress.log_line(done, figures)
            if judge and (is_last or (plan.judge_every and done % plan.judge_every == 0)):
                progress.console.print(f"step {done}  {_format(judge(average, done))}", highlight=False)
            if is_last:
                break
    return average


def _collect_gradients(
    parameters: dict[str, nn.Parameter], copies: dict[str, nn.Parameter], trainable: Mapping[str, Tensor]
) -> None:
    """Move the gradients of the working copy to the parameters, with those of frozen entries zeroed."""
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


def seconds_spent(state: Path) -> float | None:
    """Return the seconds spent on all parts of the run with this state file; None if that is not known."""
    with safe_open(state, framework="pt") as file:
        progress = json.loads((file.metadata() or {}).get("progress", "{}"))
    seconds = progress.get("seconds")
    return None if seconds is None else float(seconds)


def _save(
    path: Path,
    module: nn.Module,
    average: nn.Module,
    optimizer: "_Optimizer",
    step: int,
    seconds: float | None,
) -> None:
    frozen = _frozen(module)
    tensors = {
        f"{part}.{name}": tensor
        for part, each in (("module", module), ("average", average))
        for name, tensor in each.state_dict().items()
        if name not in frozen
    }
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    progress = {"step": step, "seconds": seconds, "frozen": _checksum(frozen)}
    save_file(contiguous, partial, metadata={"progress": json.dumps(progress)})
    partial.replace(path)


def _resume(
    path: Path, module: nn.Module, average: nn.Module, optimizer: "_Optimizer"
) -> tuple[int, float | None]:
    """Restore everything from the state file, if there is one; return the steps and seconds already spent.

    The seconds are None, also in later parts, for a state file of earlier versions. Frozen parameters are not
    read from the file. Raises `CheckpointError` if they are not those that the run began with.
    """
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    frozen = _frozen(module)
    if progress.get("frozen") not in (None, _checksum(frozen)):
        message = "the run began with other weights in what is not trained; remove this file to start anew"
        raise CheckpointError(f"{path}: {message}")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    module.load_state_dict(part("module.") | frozen)
    average.load_state_dict(part("average.") | frozen)
    optimizer.restore(part("optimizer."))
    return int(progress["step"]), seconds_spent(path)


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not trained."""
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Optimizer:
    """Muon (Jordan et al. 2024) for weight matrices where the plan asks for it, AdamW for the rest.

    Convolutions are matrices too, (out, in * height * width), except depthwise ones. Both rules leave a whole
    row or column without a gradient unchanged.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], plan: Plan) -> None:
        self._parameters = parameters
        self._matrices = {
            name: nn.Parameter(parameter.data.flatten(1))
            for name, parameter in parameters.items()
            if plan.matrix_rate and parameter.dim() in (2, 4) and min(parameter.shape[:2]) > 1
        }
        others = [parameter for name, parameter in parameters.items() if name not in self._matrices]
        self._optimizers: list[torch.optim.Optimizer] = []
        if others:
            self._optimizers.append(
                torch.optim.AdamW(
                    others,
                    lr=plan.learning_rate,
                    betas=plan.betas,
                    weight_decay=plan.weight_decay,
                    fused=True,
                )
            )
        if self._matrices:
            self._optimizers.append(
                torch.optim.Muon(
                    self._matrices.values(),
                    lr=plan.matrix_rate,
                    weight_decay=plan.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    def step(self, progress: float) -> None:
        """Update all parameters from their gradients, at `progress` times the learning rates."""
        for name, matrix in self._matrices.items():
            gradient = self._parameters[name].grad
            matrix.grad = None if gradient is None else gradient.flatten(1)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * progress
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Return moments and counters, named KEY.PARAMETER."""
        return {
            f"{key}.{name}": tensor
            for name, parameter in (self._parameters | self._matrices).items()
            for optimizer in self._optimizers
            for key, tensor in optimizer.state.get(parameter, {}).items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for joined, tensor in state.items():
            key, name = joined.split(".", 1)
            is_matrix = name in self._matrices
            parameter = self._matrices[name] if is_matrix else self._parameters[name]
            self._optimizers[-1 if is_matrix else 0].state[parameter][key] = tensor.to(parameter.device)
