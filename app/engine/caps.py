"""How many rows a step may take: as measured on the device, or fewer where memory turned out to be short."""

from collections.abc import Mapping

from app.engine.profile import best_rows, parse_shape
from app.engine.scheduler import BatchKey


class Caps:
    """The caps of all keys. For a shape without a profile, the nearest one by number of cells is scaled."""

    def __init__(self, profile: Mapping[str, Mapping[int, float]], *, max_rows: int | None = None) -> None:
        self._profiled: dict[tuple[str, int], int] = {}
        for name, measured in profile.items():
            stage, height, width = parse_shape(name)
            self._profiled[stage, height * width] = best_rows(measured)
        self._max_rows = max_rows
        self._known: dict[BatchKey, int] = {}  # by key that was asked for before; some halved since

    def cap(self, key: BatchKey) -> int:
        """Return how many rows may be stepped together, at least 1."""
        if key not in self._known:
            rows = self._estimated(key)
            self._known[key] = max(1, rows if self._max_rows is None else min(rows, self._max_rows))
        return self._known[key]

    @property
    def largest(self) -> int:
        """Largest cap of the profiled shapes."""
        rows = max(self._profiled.values())
        return rows if self._max_rows is None else min(rows, self._max_rows)

    def halve(self, key: BatchKey) -> None:
        """Halve the cap of a key, but not below 1."""
        self._known[key] = max(1, self.cap(key) // 2)

    def _estimated(self, key: BatchKey) -> int:
        """Return the rows with as many cells in all as the best batch of the nearest profiled shape."""
        cells = key.shape[0] * key.shape[1]
        known = [area for stage, area in self._profiled if stage == key.stage]
        nearest = min(known, key=lambda area: abs(area - cells))
        return round(self._profiled[key.stage, nearest] * nearest / cells)
