"""A bounded cache of recent results that counts hits and misses."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Cache of computed values that drops the least recently used one first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """Return the value of a key, made if it is not cached. An error in `make` leaves no trace."""
        if key in self._values:
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key]
        value = make(key)
        self.misses += 1
        self._values[key] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def clear(self) -> None:
        """Forget all values, but keep the counts."""
        self._values.clear()
