"""The finetuning run: updates from batches, states and sheets on the way, a checkpoint at the end."""

import functools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.checkpoints.load import EMBEDDED, load_cascade
from cascade.checkpoints.save import save_cascade
from cascade.checkpoints.sums import write_sums
from cascade.errors import CheckpointError, InvalidSetting
from cascade.marks import save_png
from cascade.models import Models
from cascade.networks.blocks import AttnBlock, ResBlock
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.pipeline import Cascade
from cascade.training.finetune.batches import make_source
from cascade.training.finetune.buckets import BatchOrder, bucket_sizes, nearest_bucket
from cascade.training.finetune.dataset import read_dataset
from cascade.training.finetune.objective import (
    AdaptiveWeights,
    Batch,
    DecoderObjective,
    LossWeights,
    P2Weights,
    PriorObjective,
    row_errors,
)
from cascade.training.finetune.parallel import World, distribute, joined, local, whole
from cascade.training.finetune.pictures import Pictures
from cascade.training.finetune.settings import FinetuneSettings
from cascade.training.finetune.state import STATE_FILE, State, restore_state, save_state

SHEET_PICTURES = 4

_SHOWN_SKIPS = 5
_SMOOTHING = 0.9  # of the loss beside the progress bar


def finetune(settings: FinetuneSettings) -> list[float]:
    """Finetune one stage of a checkpoint and write the new checkpoint to `settings.output`.

    An interrupted run resumes from its last saved state. Under `torchrun` every process calls this.

    Returns:
        The unweighted error of the noise at every update of this part of the run.

    Raises:
        InvalidSetting: the settings or the data are unusable, or an unfinished run has other settings.
        CheckpointError: a component is missing, a file damaged, the output not empty, or the disk full.
    """
    with joined(settings.device) as world:
        return _Run(settings, world).go()


class _Run:
    """One process's part of a run."""

    def __init__(self, settings: FinetuneSettings, world: World) -> None:
        self.settings = settings
        self.world = world
        self.console = Console(stderr=True, quiet=not world.is_first)
        if settings.output.exists() and (settings.output.is_file() or any(settings.output.iterdir())):
            raise CheckpointError(f"{settings.output}: exists already; name a new folder")
        _check_batch(settings, world)
        dataset = read_dataset(settings.data)
        for line in dataset.skipped[:_SHOWN_SKIPS]:
            self._say(f"skipped {line}")
        self.models = load_cascade(settings.model, device="cpu", dtype="float32")
        sizes = bucket_sizes(self.models.native, settings.image_size)
        buckets = [nearest_bucket(each.width, each.height, sizes) for each in dataset.examples]
        self.order = BatchOrder(buckets, settings.batch // settings.accumulate, settings.seed)
        self.pictures = Pictures(dataset, self.order.members, self._say)
        self.source = make_source(settings, world, self.models, self.pictures, sizes, self._say)
        self.identity = settings.identity() | {"dataset": dataset.digest}
        self.captions = [each.caption for each in dataset.examples[:SHEET_PICTURES]]
        used = len(set(buckets))
        self._say(f"{len(buckets)} pictures in {used} sizes, {len(dataset.skipped)} skipped")

    def go(self) -> list[float]:
        """Train from where the run stands to its end, and write the checkpoint."""
        settings, world = self.settings, self.world
        kept = deepcopy(self._stage)  # for the result and the sheets; it is not trained itself
        runner, state = self._begin()
        start = restore_state(self._state_file, state, self.identity)
        losses: list[float] = []
        shown: float | None = None
        title = {"prior": "Stage C", "decoder": "Stage B"}[settings.stage]
        with _bar(self.console) as bar:
            task = bar.add_task(title, total=settings.steps, completed=start, figures="")
            for step in range(start, settings.steps):
                rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup))
                error, norm = self._update(runner, state, step, rate)
                _follow(state.average, state.parameters, min(settings.ema_decay, (step + 1) / (step + 10)))
                losses.append(error)
                shown = error if shown is None else _SMOOTHING * shown + (1 - _SMOOTHING) * error
                figures = f"loss {shown:.4f}  norm {norm:.3g}  rate {rate:.2g}"
                bar.update(task, advance=1, figures=figures)
                self._keep(step + 1, state, kept, figures)
        self._take_over(kept, state)
        if world.is_first:
            self._write(kept)
            unreadable = len(self.pictures.dataset.skipped) + len(self.pictures.unreadable)
            self._say(f"{settings.output}: done; {unreadable} pictures were skipped")
        world.wait()
        return losses

    def _begin(self) -> tuple[nn.Module, State]:
        """Return the module that runs forward and backward, and the state before the first update."""
        settings, stage = self.settings, self._stage
        stage.to(self.world.device).train().requires_grad_(True)
        if settings.checkpointing:
            _recompute(stage)
        objective: nn.Module = (
            PriorObjective(self.models.stage_c)
            if settings.stage == "prior"
            else DecoderObjective(self.models.stage_b)
        )
        runner = distribute(objective, self.world, sharded=settings.sharded)
        parameters = dict(stage.named_parameters())
        return runner, State(
            parameters=parameters,
            average={n: p.detach().clone() for n, p in parameters.items()} if settings.ema_decay else {},
            optimizer=torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.01),
            weights=AdaptiveWeights() if settings.weighting == "adaptive" else P2Weights(),
        )

    def _keep(self, done: int, state: State, kept: nn.Module, figures: str) -> None:
        """Save the state and draw a sheet, each when it is due."""
        settings, is_last = self.settings, done == self.settings.steps
        if done % settings.save_every == 0 or is_last:
            save_state(self._state_file, self.world, state, {"step": done, "identity": self.identity})
            self._log(f"step {done}  {figures}")
        if settings.sheet_every and (done % settings.sheet_every == 0 or is_last):
            self._take_over(kept, state)
            self._sheet(kept, done)

    @property
    def _state_file(self) -> Path:
        return self.settings.work / STATE_FILE

    @property
    def _stage(self) -> nn.Module:
        return self.models.stage_c if self.settings.stage == "prior" else self.models.stage_b

    def _update(self, runner: nn.Module, state: State, step: int, rate: float) -> tuple[float, float]:
        """Make one update from its forward passes; return the noise's mean error and the gradients' norm."""
        settings = self.settings
        torch.manual_seed(hash((settings.seed, step)) % 2**63)  # dropout inside the network
        error = 0.0
        for part in range(settings.accumulate):
            number = step * settings.accumulate + part
            bucket, indices = self.order[number]
            batch = self.source(number, bucket, indices)
            is_last = part == settings.accumulate - 1
            with self._gradients_stay(runner, is_last), self._autocast():
                errors = row_errors(runner(batch.latents, batch.ratio, *batch.told), batch.noise)
                loss = (errors * state.weights(batch.log_snr)).mean() / settings.accumulate
                loss.backward()  # type: ignore[no-untyped-call]
            error += self._learn_levels(state.weights, batch, errors) / settings.accumulate
        parameters, optimizer = state.parameters, state.optimizer
        norm = whole(nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm or float("inf")))
        if torch.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return error, float(norm)

    def _learn_levels(self, weights: LossWeights, batch: Batch, errors: Tensor) -> float:
        """Update the weights by the errors of all processes, so that all agree; return the mean error."""
        everywhere = self.world.gather(errors.detach())
        weights.update(self.world.gather(batch.log_snr), everywhere)
        return float(everywhere.mean())

    def _gradients_stay(self, runner: nn.Module, is_last: bool) -> Any:
        """Suspend the exchange of gradients between processes until the last forward pass of an update."""
        if isinstance(runner, nn.parallel.DistributedDataParallel) and not is_last:
            return runner.no_sync()
        if self.world.size > 1 and self.settings.sharded:
            cast(Any, runner).set_requires_gradient_sync(is_last)
        return nullcontext()

    def _autocast(self) -> Any:
        on_gpu = self.world.device.type == "cuda"
        wanted = on_gpu if self.settings.bf16 is None else self.settings.bf16
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=wanted)

    def _take_over(self, kept: nn.Module, state: State) -> None:
        """Fill a whole copy of the stage with the average, tensor by tensor; every process must call it."""
        tensors = state.average or state.parameters
        with torch.no_grad():
            for name, parameter in kept.named_parameters():
                parameter.copy_(whole(tensors[name]))

    def _result(self, stage: nn.Module) -> Models:
        if self.settings.stage == "prior":
            return replace(self.models, stage_c=cast(StageC, stage))
        return replace(self.models, stage_b=cast(StageB, stage))

    def _sheet(self, stage: nn.Module, step: int) -> None:
        """Draw the first captions with the averaged weights, side by side."""
        if self.world.is_first:
            models = self._result(deepcopy(stage).to(self.world.device).eval().requires_grad_(False))
            for network in (models.stage_a, models.stage_b, models.stage_c):
                network.to(self.world.device)
            models = replace(models, device=self.world.device)
            for encoder in (models.text_encoder, models.decoder_text_encoder):
                encoder.model.to(self.world.device)
            save_sheet(models, self.captions, self.settings.work / f"sheet-{step:07}.png")
        self.world.wait()

    def _write(self, stage: nn.Module) -> None:
        """Write the new checkpoint: the trained stage, and everything else as in the original one."""
        settings = self.settings
        for name in ("text_encoder", "decoder_text_encoder", "image_encoder"):
            encoder = getattr(self.models, name)
            if encoder is not None:
                encoder.model.cpu()
        models = self._result(stage)
        for network in (models.stage_a, models.stage_b, models.stage_c, models.effnet, models.previewer):
            if network is not None:
                network.cpu()
        save_cascade(models, settings.output, getattr(torch, settings.save_dtype))
        base = EMBEDDED.get(settings.model, Path(settings.model).expanduser())
        extras = [
            name
            for name in ("controlnet", "loras")
            if (base / name).is_dir() and not (settings.output / name).exists()
        ]
        for name in extras:
            shutil.copytree(base / name, settings.output / name)
        if extras:
            write_sums(settings.output)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _log(self, line: str) -> None:
        if not self.console.is_terminal:
            self._say(line)


def save_sheet(models: Models, captions: list[str], path: Path) -> None:
    """Draw captions with seeds 0, 1, ... and write the pictures side by side."""
    cascade = Cascade(**{field.name: getattr(models, field.name) for field in fields(Models)})
    images = [cascade.text_to_image(text, seed=seed)[0].image for seed, text in enumerate(captions)]
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    save_png(sheet, path)


def _check_batch(settings: FinetuneSettings, world: World) -> None:
    if settings.batch % (settings.accumulate * world.size):
        raise InvalidSetting(
            "batch",
            f"{settings.batch} is no multiple of accumulate {settings.accumulate} x {world.size} processes",
        )


def _recompute(stage: nn.Module) -> None:
    """Checkpoint the activations of the large blocks: the backward pass recomputes them."""
    for block in stage.modules():
        if isinstance(block, ResBlock | AttnBlock):
            forward: Callable[..., Tensor] = block.forward
            block.forward = functools.partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]


@torch.no_grad()
def _follow(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    if average:
        olds = [local(average[name]) for name in average]
        news = [local(parameters[name]) for name in average]
        torch._foreach_lerp_(olds, news, 1 - decay)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=not console.is_terminal,
    )
