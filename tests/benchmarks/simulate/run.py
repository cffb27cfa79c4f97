"""`python -m tests.benchmarks.simulate.run`: the scheduler on measured steps, against one picture at a time.

Prints tables, writes simulation.md and plots/simulation.png. `--measure MODEL` times the steps of a model on
this machine first; without it they are those in results.json, or in an engine's profile, `--profile FILE`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from app.engine.profile import Profile, load_profile
from app.engine.protocol import Configure
from app.engine.runner import CascadeRunner
from tests.benchmarks.report import keep, read_figures
from tests.benchmarks.simulate import scenarios
from tests.benchmarks.simulate.fleet import Speed
from tests.benchmarks.simulate.report import Findings, show, write_page

MANY = 10_000  # so that all who want a share are aboard
DECISIONS = ((1, 1), (10, 100), (10_000, 100), (1, 2_500))  # tenants and shapes of ten thousand pictures


def main() -> int:
    """Simulate and report; 2 where no step times are known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", metavar="MODEL")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.measure:
        keep("ticks", {"model": arguments.measure, "profile": measure(arguments.measure)})
    profile, origin = _profile(arguments.profile)
    if profile is None:
        print("simulate: no step times are known; measure some with --measure tiny", file=sys.stderr)
        return 2
    began = time.perf_counter()
    findings = simulate(Speed(profile))
    show(findings)
    write_page(findings, origin)
    print(f"simulated in {time.perf_counter() - began:.0f} s")
    return 0


def simulate(speed: Speed) -> Findings:
    """Run all scenarios."""
    lab = scenarios.Lab(speed)
    heavy = {"9": 3.0}
    return Findings(
        clients=scenarios.by_clients(lab),
        loads=scenarios.by_load(lab),
        fleets=scenarios.by_fleet(lab),
        company=[
            scenarios.beside_bulk("ours", lab.together),
            scenarios.beside_bulk("one by one", lab.one_by_one),
        ],
        shares=[
            scenarios.shares("ours", lab.together(room=MANY), {}),
            scenarios.shares(
                "ours, one with three times the weight", lab.together(weights=heavy, room=MANY), heavy
            ),
            scenarios.shares("one by one", lab.one_by_one(), {}),
        ],
        decisions=[scenarios.decision(10_000, tenants, shapes) for tenants, shapes in DECISIONS],
    )


def measure(model: str) -> Profile:
    """What an engine of this model measures when it starts here."""
    with tempfile.TemporaryDirectory() as folder:
        CascadeRunner().load(Configure(model=model, device="cpu", dtype="float32", cache_dir=folder))
        [path] = Path(folder).iterdir()
        profile = load_profile(path)
    assert profile is not None
    return profile


def _profile(path: Path | None) -> tuple[Profile | None, str]:
    """Step times and where they are from."""
    if path is not None:
        return load_profile(path), path.name
    ticks = read_figures().get("ticks")
    if ticks is None:
        return None, ""
    origin = f"`{ticks['model']}` on {ticks['hardware']}, {ticks['threads']} threads, {ticks['date']}"
    return msgspec.convert(ticks["profile"], Profile, strict=False), origin


if __name__ == "__main__":
    sys.exit(main())
