"""`make bench-gpu`: steps at published full size on a CUDA device, in bf16, for batches of 1 to 8 pictures.

Weights are random and made on the device. `--compile graphs` and `full` run ours as the server can. Needs
torch and transformers; compares with diffusers where it is installed. Prints a table and one line of JSON
with the same figures.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from typing import get_args

import torch

from cascade.acceleration import Compile, accelerate
from cascade.config import STAGE_A, STAGE_B_1_5B, STAGE_C_3_6B
from cascade.networks.stage_a import StageA
from tests.benchmarks.measure import Comparison, Spread, Work, compare, surroundings
from tests.benchmarks.steps import Step, stage_b_step, stage_c_step
from tests.benchmarks.weights import in_diffusers, random_network

Works = tuple[Work, Work | None]  # ours and diffusers'

BATCHES = (1, 2, 4, 8)
# TFLOP of one picture: two rows of C, one of B, one decoding (counted on meta tensors, multiply-add = 2)
TERAFLOP = {"C 3.6B, guided": 8.157, "B 1.5B": 6.174, "A decode": 2.172}


def main() -> int:
    """Measure and print; 2 where there is no device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--compile", choices=get_args(Compile), nargs="+", default=["off"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: no CUDA device is here", file=sys.stderr)
        return 2
    torch.cuda.init()
    comparisons = []
    for batch in arguments.batches:
        for (name, make), mode in product(MAKERS.items(), arguments.compile):
            works = make(batch, mode)
            torch.cuda.reset_peak_memory_stats()
            shown = f"{name}, batch {batch}" + ("" if mode == "off" else f", {mode}")
            comparisons.append(compare(shown, *works, rounds=arguments.rounds))
            print(_line(comparisons[-1], TERAFLOP[name] * batch), flush=True)
            del works
            gc.collect()
            torch.cuda.empty_cache()
    figures = {**surroundings(), "comparisons": [asdict(comparison) for comparison in comparisons]}
    print(json.dumps(figures))
    return 0


def _stage_c(batch: int, mode: Compile) -> Works:
    return _step(stage_c_step(STAGE_C_3_6B, 2 * batch, 24, "cuda", with_reference=_has_reference()), mode)


def _stage_b(batch: int, mode: Compile) -> Works:
    return _step(stage_b_step(STAGE_B_1_5B, batch, 256, "cuda", with_reference=_has_reference()), mode)


def _step(step: Step, mode: Compile) -> Works:
    network = accelerate(step.network, mode, torch.device("cuda"))
    ours = torch.inference_mode()(lambda: network(step.latents, step.ratio, step.condition))
    return ours, step.theirs if step.reference else None


def _stage_a(batch: int, _: Compile) -> Works:
    network = random_network(StageA, STAGE_A, torch.bfloat16, "cuda")
    latents = torch.randn(batch, STAGE_A.latent_channels, 256, 256, device="cuda").bfloat16()
    ours = torch.inference_mode()(lambda: network.decode(latents, scale_factor=1))
    if not _has_reference():
        return ours, None
    reference = in_diffusers(network)
    return ours, torch.inference_mode()(lambda: reference.decode(latents).sample)


MAKERS: dict[str, Callable[[int, Compile], Works]] = {
    "C 3.6B, guided": _stage_c,
    "B 1.5B": _stage_b,
    "A decode": _stage_a,
}


def _has_reference() -> bool:
    return find_spec("diffusers") is not None


def _line(comparison: Comparison, teraflop: float) -> str:
    ours, ratio = Spread.of(comparison.ours), comparison.ratio
    shown = f"{comparison.name:34} {ours.median * 1e3:8.2f} ms ({ours.low * 1e3:.2f}..{ours.high * 1e3:.2f})"
    shown += f"  {teraflop / ours.median:6.0f} TFLOP/s  {torch.cuda.max_memory_allocated() / 1e9:5.1f} GB"
    return f"{shown}  {ratio.median:.2f} x diffusers" if ratio else shown


if __name__ == "__main__":
    sys.exit(main())
