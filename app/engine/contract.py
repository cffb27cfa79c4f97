"""What the engine asks of a runner, which calls the networks. The engine knows pictures and rows, no tensors.

Two threads call a runner: the loop (load, expect, start, begin, step, check, retry_in_fp32, drop) and, beside
it, the finisher (decode, preview). The heartbeat reads `device_memory_bytes` and `counts`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from app.engine.protocol import Configure, Ready, Run
from app.engine.scheduler import BatchKey


class Work(NamedTuple):
    """Steps of one kind that lie ahead of a picture."""

    key: BatchKey
    rows: int  # in a batch: 2 where guided
    steps: int


class Track(Protocol):
    """One picture on its way, in the hands of a runner, which alone moves it."""

    @property
    def work(self) -> Sequence[Work]:
        """What lies ahead, the stage in work first; the last is ("decode", one row, one step) of Stage A."""

    @property
    def step(self) -> int:
        """Steps done of the stage in work."""

    @property
    def latents(self) -> bytes | None:
        """Of Stage C once it is done, fp32: enough to begin again at Stage B, with the same result."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A finished picture."""

    width: int
    height: int
    pixels: bytes  # RGB, 8 bits, rows from the top
    resampled_from: tuple[int, int] | None
    prompt_truncated: bool
    prompt_tokens: int


Kind = TypeVar("Kind", bound=Track)  # of a runner's own tracks


class Runner(Protocol[Kind]):
    """Moves pictures by calling networks.

    Its errors are those of app.errors (OutOfMemory, GenerationFailed, DeviceGone, ...), or surprises.
    """

    @property
    def counts(self) -> Mapping[str, int]:
        """Totals since the start: "cache_hits", "cache_misses", ..."""

    def load(self, configure: Configure) -> Ready:
        """Read the model, profile, warm up. Any error means that the model is unusable."""

    def expect(self, request: bytes) -> None:
        """Encode the texts of a request, as JSON, that may be about to come. Raises what `begin` may."""

    def start(self, run: Run) -> Kind:
        """Plan a picture: which steps of which shapes. Cheap, without the device. Raises InvalidRequest."""

    def begin(self, track: Kind) -> None:
        """Make it ready for its first step: encode the text (cached), draw the noise. Called once."""

    def step(self, tracks: Sequence[Kind]) -> None:
        """Advance all, of one key, by one step, and into their next stage at the end of one.

        All or nothing: after an error every one stands where it stood. More rows than the cap are stepped in
        several calls of the network. Returns when the device is done, so that it can be timed.
        """

    def check(self, track: Kind) -> None:
        """At the end of a stage. Raises GenerationFailed when its latents are not finite, or all the same."""

    def retry_in_fp32(self, track: Kind) -> bool:
        """Go back to where the stage just ended began, in fp32. False where it was fp32 already."""

    def decode(self, tracks: Sequence[Kind]) -> list[Callable[[], Decoded]]:
        """Stage A of one or two pictures, each of which is finished when called.

        Raises GenerationFailed for pixels that cannot be a picture.
        """

    def preview(self, track: Kind) -> tuple[int, int, bytes] | None:
        """Width, height and pixels of what Stage C has in mind now. None where the model has no previewer."""

    def drop(self, track: Kind) -> None:
        """Keep nothing of a picture that nobody wants any more."""

    def cap(self, key: BatchKey) -> int:
        """Rows that may be stepped together."""

    def halve(self, key: BatchKey) -> None:
        """Lower the cap, because memory was not enough. Never below 1."""

    def device_memory_bytes(self) -> int:
        """In use on the device, 0 where that is the memory of the process."""


AnyRunner = Runner[Any]  # for those to whom it is all one which
