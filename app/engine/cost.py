"""The cost model: predicts seconds of the device, and learns from every tick.

The seconds of a tick are linear in its rows, with a line for each stage and shape. The engine asks what is
left of a picture, the API process for the price of a request and for how long to wait.
"""

from collections.abc import Iterable, Mapping
from math import ceil, log
from typing import Annotated

import msgspec

from app.engine.contract import Work
from app.engine.protocol import Observation
from app.engine.scheduler import BatchKey, Stage
from app.schemas import GenerationRequest

MAX_RETRY_SECONDS = 59  # the AI SDK ignores a Retry-After of a minute and more
LEARNING_RATE = 0.2
MAX_LINES = 256  # of a stage; the one that was learned longest ago is forgotten
TYPICAL_ROWS = 8  # of a full batch, until a cap has been seen

_CELL_PIXELS = 42.67  # side of a cell of Stage C's latent
_LATENTS_PER_CELL = 10.67  # side of that cell in Stage B's latent, whose sides are even

_TINY = 1e-9  # seconds


class Line(msgspec.Struct, array_like=True):
    """The seconds of a tick: `start`, plus `row` for each of its rows."""

    start: Annotated[float, msgspec.Meta(ge=0)]
    row: Annotated[float, msgspec.Meta(gt=0)]
    cap: Annotated[int, msgspec.Meta(ge=1)] = TYPICAL_ROWS  # rows of a full batch

    def seconds(self, rows: int) -> float:
        """Return the seconds of a tick with so many rows."""
        return self.start + self.row * rows

    @property
    def shared_seconds(self) -> float:
        """Seconds of one row in a full batch."""
        return self.seconds(self.cap) / self.cap

    def scaled(self, factor: float) -> "Line":
        """Return the line of a device that takes `factor` times as long."""
        return Line(self.start * factor, self.row * factor, self.cap)

    def approach(self, rows: int, seconds: float) -> None:
        """Move the line towards a measurement, by normalised least mean squares."""
        lean = rows / TYPICAL_ROWS  # in this unit start and slope have equal weight
        step = LEARNING_RATE * (seconds - self.seconds(rows)) / (1 + lean**2)
        self.start = max(0.0, self.start + step)
        self.row = max(self.row / 2, self.row + step * lean / TYPICAL_ROWS)


Lines = dict[str, dict[int, Line]]  # by stage and number of cells

# Used until anything is measured: about five seconds for a picture of 1024x1024.
_GUESSES: Lines = {
    "prior": {24 * 24: Line(0.02, 0.07)},
    "decoder": {256 * 256: Line(0.02, 0.12)},
    "decode": {256 * 256: Line(0.0, 0.3)},
}


class CostModel:
    """Predicts from the ticks that it has seen and, for other shapes, from those of the nearest shapes."""

    def __init__(self) -> None:
        self.drawn: tuple[int, int] | None = None  # the one size of a model that resamples to all others
        self.error = 0.0  # recent mean relative error of its predictions
        self._lines: Lines = {"prior": {}, "decoder": {}, "decode": {}}

    def step_seconds(self, key: BatchKey, rows: int) -> float:
        """Return the seconds of a tick with so many rows."""
        return self._line(key.stage, _cells(key.shape)).seconds(rows)

    def alone(self, work: Iterable[Work]) -> float:
        """Return the seconds that work takes with the device to itself."""
        return sum(steps * self.step_seconds(key, rows) for key, rows, steps in work)

    def shared(self, work: Iterable[Work]) -> float:
        """Return the seconds of the device that work takes in full batches."""
        return sum(
            steps * rows * self._line(key.stage, _cells(key.shape)).shared_seconds
            for key, rows, steps in work
        )

    def price(self, request: GenerationRequest) -> float:
        """Return the seconds of the device that a request takes in full batches."""
        return request.num_images * self.shared(work_of(request, self.drawn))

    def eta_seconds(self, request: GenerationRequest, *, ahead_seconds: float, num_devices: int) -> float:
        """Return the seconds until the last picture of a request, with `ahead_seconds` of work before it."""
        together = (ahead_seconds + self.price(request)) / max(num_devices, 1)
        return max(together, self.alone(work_of(request, self.drawn)))

    def learn(self, tick: Observation) -> None:
        """Learn from a tick."""
        if tick.seconds <= 0:
            return
        cells = _parse_cells(tick.shape)
        line = self._line(tick.stage, cells)
        predicted = line.seconds(tick.rows)
        self.error += LEARNING_RATE * (abs(predicted / tick.seconds - 1) - self.error)
        if cells not in self._lines[tick.stage]:
            line = line.scaled(tick.seconds / predicted)
        line.approach(tick.rows, tick.seconds)
        line.cap = max(tick.cap, 1)
        self._remember(tick.stage, cells, line)

    def learn_profile(self, row_seconds: Mapping[str, float]) -> None:
        """Learn what an engine measured at its start: seconds of a row in a full batch, by "stage:HxW"."""
        for name, seconds in row_seconds.items():
            stage, _, shape = name.partition(":")
            cells = _parse_cells(shape)
            line = self._line(stage, cells)
            self._remember(stage, cells, line.scaled(seconds / line.shared_seconds))

    def snapshot(self) -> bytes:
        """Return all that it knows, as JSON."""
        return msgspec.json.encode(self._lines)

    def restore(self, snapshot: bytes) -> None:
        """Take over a snapshot of another model. Raises msgspec.DecodeError for anything else."""
        for stage, lines in msgspec.json.decode(snapshot, type=dict[Stage, dict[int, Line]]).items():
            for cells, line in lines.items():
                self._remember(stage, cells, line)

    def _remember(self, stage: str, cells: int, line: Line) -> None:
        lines = self._lines[stage]
        lines.pop(cells, None)
        lines[cells] = line
        if len(lines) > MAX_LINES:
            del lines[next(iter(lines))]

    def _line(self, stage: str, cells: int) -> Line:
        lines = self._lines[stage] or _GUESSES[stage]
        return lines[cells] if cells in lines else _estimate(lines, cells)


def _estimate(lines: Mapping[int, Line], cells: int) -> Line:
    """Estimate a line from other sizes: by a power law between two of them, in proportion beyond them."""
    smaller = max((size for size in lines if size < cells), default=None)
    larger = min((size for size in lines if size > cells), default=None)
    if smaller is None or larger is None:
        size = larger or smaller or cells
        return Line(lines[size].start, lines[size].row * cells / size, lines[size].cap)
    low, high = lines[smaller], lines[larger]
    share = log(cells / smaller) / log(larger / smaller)
    start, row = _between(low.start, high.start, share), _between(low.row, high.row, share)
    return Line(start, row, low.cap)


def _between(low: float, high: float, share: float) -> float:
    """Interpolate on a power law, for which no value may be zero."""
    return max(low, _TINY) ** (1 - share) * max(high, _TINY) ** share  # type: ignore[no-any-return]


def work_of(request: GenerationRequest, drawn: tuple[int, int] | None = None) -> list[Work]:
    """Return the steps of one picture of a request, drawn at its own size or, if given, at `drawn`."""
    width, height = drawn or (request.width, request.height)
    prior = ceil(height / _CELL_PIXELS), ceil(width / _CELL_PIXELS)
    decoder = _even(int(prior[0] * _LATENTS_PER_CELL)), _even(int(prior[1] * _LATENTS_PER_CELL))
    guided, decoder_rows = request.guided_steps, 2 if request.decoder_guidance_scale > 1 else 1
    work = [
        Work(BatchKey("prior", prior), 2, guided),
        Work(BatchKey("prior", prior), 1, request.prior_steps - guided),
        Work(BatchKey("decoder", decoder), decoder_rows, request.decoder_num_inference_steps),
        Work(BatchKey("decode", decoder), 1, 1),
    ]
    return [part for part in work if part.steps]


def retry_after_seconds(queued_seconds: float, num_devices: int) -> int:
    """Return the seconds until half of a full queue should be done, 1 to MAX_RETRY_SECONDS."""
    return min(max(ceil(queued_seconds / max(num_devices, 1) / 2), 1), MAX_RETRY_SECONDS)


def _cells(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _parse_cells(shape: str) -> int:
    height, width = shape.split("x")
    return int(height) * int(width)


def _even(side: int) -> int:
    return side + side % 2
