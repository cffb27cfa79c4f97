"""`make bench-gpu`: steps at published full size on a CUDA device, in bf16, for batches of 1 to 8 pictures.

Weights are random and made on the device, once per network; every way to run it and diffusers, where that is
installed, then take turns. The device's own peaks are measured first, for the roofline. `--out FILE` keeps
the figures; `python -m tests.benchmarks.gpu_page FILE` puts them into RESULTS.md, on any machine.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from cascade.acceleration import Compile, accelerate, keeping_graphs
from cascade.config import STAGE_A, STAGE_B_1_5B, STAGE_C_3_6B
from cascade.networks.stage_a import StageA
from tests.benchmarks.measure import Spread, Work, surroundings, take_turns
from tests.benchmarks.steps import Step, stage_b_step, stage_c_step
from tests.benchmarks.weights import in_diffusers, random_network

BATCHES = (1, 2, 4, 8)
# TFLOP of one picture: two rows of C, one of B, one decoding (counted on meta tensors, multiply-add = 2)
TERAFLOP = {"C 3.6B, guided": 8.157, "B 1.5B": 6.174, "A decode": 2.172}
WEIGHT_GB = {"C 3.6B, guided": 7.178, "B 1.5B": 3.126, "A decode": 0.037}
MODES: tuple[Compile, ...] = get_args(Compile)

Works = dict[str, Work]  # by mode, and "diffusers"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one way to run one network at one batch size."""

    network: str
    batch: int
    mode: str
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the device can do: bf16 products, and moving memory (bytes read plus bytes written)."""

    teraflops: float
    terabytes: float

    def roofline(self, network: str, batch: int) -> float:
        """Seconds that nothing on this device can undercut: all arithmetic, or the weights read once."""
        compute = TERAFLOP[network] * batch / self.teraflops
        return max(compute, WEIGHT_GB[network] / 1e3 / self.terabytes)


def main() -> int:
    """Measure and print; 2 where there is no device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--modes", choices=MODES, nargs="+", default=["off", "graphs"])
    parser.add_argument("--networks", choices=TERAFLOP, nargs="+", default=list(TERAFLOP))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: no CUDA device is here", file=sys.stderr)
        return 2
    torch.cuda.init()
    peaks = measure_peaks()
    print(f"{torch.cuda.get_device_name()}: {peaks.teraflops:.0f} TFLOP/s, {peaks.terabytes:.2f} TB/s")
    timings: list[Timing] = []
    for network in arguments.networks:
        for batch, works in MAKERS[network](max(arguments.batches), arguments.batches, arguments.modes):
            taken = take_turns(list(works.values()), rounds=arguments.rounds)
            timings += [Timing(network, batch, mode, each) for mode, each in zip(works, taken, strict=True)]
            _show(network, batch, dict(zip(works, taken, strict=True)), peaks)
            if arguments.out:
                _keep(arguments.out, peaks, timings)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def measure_peaks() -> Peaks:
    """A large bf16 product and a large copy, as fast as the libraries do them."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product, copy = take_turns([lambda: left @ right, lambda: target.copy_(source)], rounds=20)
    return Peaks(
        teraflops=2 * 8192**3 / Spread.of(product).median / 1e12,
        terabytes=2 * source.nbytes / Spread.of(copy).median / 1e12,
    )


def _stage_c(most: int, batches: list[int], modes: list[Compile]) -> Iterator[tuple[int, Works]]:
    step = stage_c_step(STAGE_C_3_6B, 2 * most, 24, "cuda", with_reference=_has_reference())
    return _steps(step, 2, batches, modes)


def _stage_b(most: int, batches: list[int], modes: list[Compile]) -> Iterator[tuple[int, Works]]:
    step = stage_b_step(STAGE_B_1_5B, most, 256, "cuda", with_reference=_has_reference())
    return _steps(step, 1, batches, modes)


def _steps(step: Step, rows: int, batches: list[int], modes: list[Compile]) -> Iterator[tuple[int, Works]]:
    """One step of some pictures of so many rows each. To compile blocks changes a network: it gets a copy."""
    networks = {
        mode: accelerate(
            deepcopy(step.network) if mode == "full" else step.network, mode, torch.device("cuda")
        )
        for mode in modes
    }
    with keeping_graphs(networks.values()):
        for batch in batches:
            some = step.first(rows * batch)
            works: Works = {
                mode: torch.inference_mode()(
                    lambda network=network, some=some: network(some.latents, some.ratio, some.condition)
                )
                for mode, network in networks.items()
            }
            yield batch, works | ({"diffusers": some.theirs} if some.reference is not None else {})


def _stage_a(most: int, batches: list[int], modes: list[Compile]) -> Iterator[tuple[int, Works]]:
    network = random_network(StageA, STAGE_A, torch.bfloat16, "cuda")
    reference = in_diffusers(network) if _has_reference() else None
    for batch in batches:
        latents = torch.randn(batch, STAGE_A.latent_channels, 256, 256, device="cuda").bfloat16()
        works: Works = {"off": partial(_decode, network.decode, latents, scale_factor=1)}
        if reference is not None:
            works["diffusers"] = partial(_decode, reference.decode, latents)
        yield batch, works


@torch.inference_mode()
def _decode(decode: Callable[..., object], latents: torch.Tensor, **settings: float) -> object:
    return decode(latents, **settings)


MAKERS: dict[str, Callable[[int, list[int], list[Compile]], Iterator[tuple[int, Works]]]] = {
    "C 3.6B, guided": _stage_c,
    "B 1.5B": _stage_b,
    "A decode": _stage_a,
}


def _has_reference() -> bool:
    return find_spec("diffusers") is not None


def _show(network: str, batch: int, taken: dict[str, tuple[float, ...]], peaks: Peaks) -> None:
    theirs = taken.get("diffusers")
    for mode, seconds in taken.items():
        spread = Spread.of(seconds)
        line = f"{network:15} batch {batch}  {mode:9} {spread.median * 1e3:8.2f} ms"
        line += f" ({spread.low * 1e3:.2f}..{spread.high * 1e3:.2f})"
        line += f"  {peaks.roofline(network, batch) / spread.median:4.0%} of the roofline"
        if theirs and mode != "diffusers":
            ratio = Spread.of([mine / other for mine, other in zip(seconds, theirs, strict=True)])
            line += f"  {ratio.median:.2f} x diffusers"
        print(line, flush=True)


def _keep(path: Path, peaks: Peaks, timings: list[Timing]) -> None:
    figures = {**surroundings(), "peaks": asdict(peaks), "timings": [asdict(timing) for timing in timings]}
    path.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    sys.exit(main())
