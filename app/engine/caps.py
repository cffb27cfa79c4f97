"""How many rows a step may take: as measured on the device, and less where memory turned out to be short."""

from collections.abc import Mapping

from app.engine.profile import best_rows, parse_shape
from app.engine.scheduler import BatchKey


class Caps:
    """The caps of all keys. A shape that was not profiled takes after the nearest, by its number of cells."""

    def __init__(self, profile: Mapping[str, Mapping[int, float]], *, max_rows: int | None = None) -> None:
        self._profiled: dict[tuple[str, int], int] = {}
        for name, measured in profile.items():
            stage, height, width = parse_shape(name)
            self._profiled[stage, height * width] = best_rows(measured)
        self._max_rows = max_rows
        self._known: dict[BatchKey, int] = {}  # those asked for before, some of them halved since

    def cap(self, key: BatchKey) -> int:
        """Rows that may be stepped together, at least 1."""
        if key not in self._known:
            rows = self._estimated(key)
            self._known[key] = max(1, rows if self._max_rows is None else min(rows, self._max_rows))
        return self._known[key]

    @property
    def largest(self) -> int:
        """Of those of the profiled shapes."""
        rows = max(self._profiled.values())
        return rows if self._max_rows is None else min(rows, self._max_rows)

    def halve(self, key: BatchKey) -> None:
        """Allow half of the rows from now on, but at least 1."""
        self._known[key] = max(1, self.cap(key) // 2)

    def _estimated(self, key: BatchKey) -> int:
        """As many cells as in the nearest profiled shape."""
        cells = key.shape[0] * key.shape[1]
        known = [area for stage, area in self._profiled if stage == key.stage]
        nearest = min(known, key=lambda area: abs(area - cells))
        return round(self._profiled[key.stage, nearest] * nearest / cells)
