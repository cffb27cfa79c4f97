"""Time and peak memory of loading a checkpoint of lite size, each loader in a process of its own."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.config import SCHEDULE_B, SCHEDULE_C, STAGE_A, STAGE_B_700M, STAGE_C_1B
from cascade.devices import peak_bytes
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from tests.benchmarks.measure import ROOT
from tests.benchmarks.weights import random_network

CPU = torch.device("cpu")
LIMIT = 1.1  # largest peak, as a multiple of the weights


@dataclass(frozen=True, slots=True)
class Loading:
    """What one process saw; bytes are resident memory at its highest."""

    name: str
    seconds: float
    peak_bytes: int  # after every weight was read once
    weight_bytes: int
    start_bytes: int  # interpreter and libraries alone


def loadings(name: str = "C 1B, B 700M, A and a CLIP text tower in bf16") -> list[Loading]:
    """Both loaders on one folder of random weights."""
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as temporary:
        folder = Path(temporary) / "lite"
        subprocess.run([sys.executable, "-m", __name__, "write", folder], check=True, cwd=ROOT)
        return [_load(kind, folder, name) for kind in ("ours", "diffusers")]


def _load(kind: str, folder: Path, name: str) -> Loading:
    words = [sys.executable, "-m", __name__, kind, str(folder)]
    done = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True)
    return Loading(name=f"{kind}: {name}", **json.loads(done.stdout.splitlines()[-1]))


def _write(folder: Path) -> None:
    from cascade.checkpoints.save import save_cascade
    from cascade.conditioning import TextEncoder
    from cascade.models import Models
    from tests.benchmarks.towers import text_tower, tokenizer

    text = TextEncoder(tokenizer(), text_tower())
    models = Models(
        stage_a=random_network(StageA, STAGE_A, torch.bfloat16),
        stage_b=random_network(StageB, STAGE_B_700M, torch.bfloat16),
        stage_c=random_network(StageC, STAGE_C_1B, torch.bfloat16),
        text_encoder=text,
        decoder_text_encoder=text,
        prior_schedule=SCHEDULE_C,
        decoder_schedule=SCHEDULE_B,
    )
    save_cascade(models, folder, torch.bfloat16)


def _ours(folder: Path) -> Callable[[], list[nn.Module]]:
    from cascade.checkpoints.load import load_cascade

    def load() -> list[nn.Module]:
        models = load_cascade(folder, device="cpu", dtype="bfloat16")
        return [models.stage_a, models.stage_b, models.stage_c, models.text_encoder.model]

    return load


def _diffusers(folder: Path) -> Callable[[], list[nn.Module]]:
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from transformers import CLIPTextModelWithProjection

    kinds: dict[str, Any] = {
        "vqgan": PaellaVQModel,
        "decoder": StableCascadeUNet,
        "prior": StableCascadeUNet,
        "text_encoder": CLIPTextModelWithProjection,
    }

    def load() -> list[nn.Module]:
        return [kind.from_pretrained(folder / part, dtype=torch.bfloat16) for part, kind in kinds.items()]

    return load


def _report(load: Callable[[], list[nn.Module]]) -> None:
    start_bytes = peak_bytes(CPU)
    start = time.perf_counter()
    networks = load()
    seconds = time.perf_counter() - start
    for tensor in _tensors(networks):
        tensor.view(-1).view(torch.uint8)[::4096].sum()  # a map of the file is memory once it was read
    weight_bytes = sum(tensor.nbytes for tensor in _tensors(networks))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_bytes": peak_bytes(CPU),
                "weight_bytes": weight_bytes,
                "start_bytes": start_bytes,
            }
        )
    )


def _tensors(networks: list[nn.Module]) -> Iterator[torch.Tensor]:
    return chain.from_iterable(network.state_dict().values() for network in networks)


if __name__ == "__main__":
    command, path = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        _write(path)
    else:
        _report((_ours if command == "ours" else _diffusers)(path))
