"""What pictures cost: predicted seconds of the device, learned from every tick.

The ticks of a stage and shape lie on a straight line: something to start with, and so much for each row. The
engine asks what is left of a picture, the API process for the price of a request and for how long to wait.
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
MAX_LINES = 256  # of a stage; the one that was not seen for longest is forgotten
TYPICAL_ROWS = 8  # of a full batch, before one has been seen

_CELL_PIXELS = 42.67  # a cell of Stage C's latent
_LATENTS_PER_CELL = 10.67  # the same cell in Stage B's latent, whose sides are even

_TINY = 1e-9  # seconds


class Line(msgspec.Struct, array_like=True):
    """Seconds of a tick: `start`, and `row` for each of its rows."""

    start: Annotated[float, msgspec.Meta(ge=0)]
    row: Annotated[float, msgspec.Meta(gt=0)]
    cap: Annotated[int, msgspec.Meta(ge=1)] = TYPICAL_ROWS  # rows of a full batch

    def seconds(self, rows: int) -> float:
        """Of a tick with so many rows."""
        return self.start + self.row * rows

    @property
    def shared_seconds(self) -> float:
        """Of a row in a full batch."""
        return self.seconds(self.cap) / self.cap

    def scaled(self, factor: float) -> "Line":
        """The same on a device that takes `factor` times as long."""
        return Line(self.start * factor, self.row * factor, self.cap)

    def approach(self, rows: int, seconds: float) -> None:
        """Come nearer to what was measured, by normalised least mean squares."""
        lean = rows / TYPICAL_ROWS  # in this unit start and slope weigh alike
        step = LEARNING_RATE * (seconds - self.seconds(rows)) / (1 + lean**2)
        self.start = max(0.0, self.start + step)
        self.row = max(self.row / 2, self.row + step * lean / TYPICAL_ROWS)


Lines = dict[str, dict[int, Line]]  # by stage and number of cells

# Until anything is known: about five seconds for a picture of 1024x1024.
_GUESSES: Lines = {
    "prior": {24 * 24: Line(0.02, 0.07)},
    "decoder": {256 * 256: Line(0.02, 0.12)},
    "decode": {256 * 256: Line(0.0, 0.3)},
}


class CostModel:
    """Predicts by what it has seen, and where it has not, by the nearest shapes that it has."""

    def __init__(self) -> None:
        self.drawn: tuple[int, int] | None = None  # size of all that a model draws which resamples to others
        self.error = 0.0  # of its predictions of late, on average, as a share of what was measured
        self._lines: Lines = {"prior": {}, "decoder": {}, "decode": {}}

    def step_seconds(self, key: BatchKey, rows: int) -> float:
        """Of a tick with so many rows."""
        return self._line(key.stage, _cells(key.shape)).seconds(rows)

    def alone(self, work: Iterable[Work]) -> float:
        """Seconds that work takes with the device to itself."""
        return sum(steps * self.step_seconds(key, rows) for key, rows, steps in work)

    def shared(self, work: Iterable[Work]) -> float:
        """Seconds of the device that work takes in full batches."""
        return sum(
            steps * rows * self._line(key.stage, _cells(key.shape)).shared_seconds
            for key, rows, steps in work
        )

    def price(self, request: GenerationRequest) -> float:
        """Seconds of the device that a request takes."""
        return request.num_images * self.shared(work_of(request, self.drawn))

    def eta_seconds(self, request: GenerationRequest, *, ahead_seconds: float, num_devices: int) -> float:
        """From now to the last picture of a request, with work of `ahead_seconds` before it."""
        in_company = (ahead_seconds + self.price(request)) / max(num_devices, 1)
        return max(in_company, self.alone(work_of(request, self.drawn)))

    def learn(self, tick: Observation) -> None:
        """Take note of a tick."""
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
        """Take what an engine measured when it started: seconds of a row in a full batch, by "stage:HxW"."""
        for name, seconds in row_seconds.items():
            stage, _, shape = name.partition(":")
            cells = _parse_cells(shape)
            line = self._line(stage, cells)
            self._remember(stage, cells, line.scaled(seconds / line.shared_seconds))

    def snapshot(self) -> bytes:
        """All that it knows, as JSON."""
        return msgspec.json.encode(self._lines)

    def restore(self, snapshot: bytes) -> None:
        """Know what another one knew. Raises msgspec.DecodeError for what is no snapshot."""
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
    """A line by those of other sizes: a power law between two of them, proportion beyond the last."""
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
    """On a power law, for which nothing is quite zero."""
    return max(low, _TINY) ** (1 - share) * max(high, _TINY) ** share  # type: ignore[no-any-return]


def work_of(request: GenerationRequest, drawn: tuple[int, int] | None = None) -> list[Work]:
    """The steps of one picture of a request, `drawn` at its own size or at another."""
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
    """When to come back to a full queue of so much work: when half of it should be done."""
    return min(max(ceil(queued_seconds / max(num_devices, 1) / 2), 1), MAX_RETRY_SECONDS)


def _cells(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _parse_cells(shape: str) -> int:
    height, width = shape.split("x")
    return int(height) * int(width)


def _even(side: int) -> int:
    return side + side % 2
