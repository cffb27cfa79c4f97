"""Training times of the components of a run, kept in the packed checkpoint and stated on its card."""

import json
from pathlib import Path

from cascade.training.loop import STATE_FILE, seconds_spent

TIMES_NAME = "training.json"


def save_times(run: Path, folder: Path) -> None:
    """Write the times in the state files of a run into a checkpoint folder; nothing if none is recorded."""
    states = sorted(run.glob(f"*/{STATE_FILE}"))
    seconds = {state.parent.name.removesuffix("_training"): seconds_spent(state) for state in states}
    known = {name: round(value, 1) for name, value in seconds.items() if value is not None}
    if known:
        (folder / TIMES_NAME).write_text(json.dumps({"seconds": known}, indent=2) + "\n", encoding="utf-8")


def training_time(folder: Path) -> str:
    """Return the training times of a packed checkpoint, and its note on them; empty if none are recorded."""
    path = folder / TIMES_NAME
    if not path.is_file():
        return ""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    times = ", ".join(f"`{name}` {value / 60:.0f} min" for name, value in recorded["seconds"].items())
    return f"The training took, by the clock: {times}. {recorded.get('note', '')}".rstrip()
