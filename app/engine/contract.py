"""The interface of a runner, which calls the networks. The engine knows pictures and rows, no tensors.

Two threads call a runner: the loop (load, expect, start, begin, step, check, retry_in_fp32, drop) and, at the
same time, the finisher (decode, preview). The heartbeat reads `device_memory_bytes` and `counts`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from app.engine.protocol import Configure, Ready, Run
from app.engine.scheduler import BatchKey


class Work(NamedTuple):
    """Steps of one kind that a picture still needs."""

    key: BatchKey
    rows: int  # of the picture in a batch: 2 where guided
    steps: int


class Track(Protocol):
    """A runner's state of one picture in work; only the runner changes it."""

    @property
    def work(self) -> Sequence[Work]:
        """Work that is left, the current stage first; the last is Stage A ("decode", one row, one step)."""

    @property
    def step(self) -> int:
        """Number of steps done in the current stage."""

    @property
    def latents(self) -> bytes | None:
        """Latents of Stage C once it is done, fp32: enough to restart at Stage B with the same result."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A finished picture."""

    width: int
    height: int
    pixels: bytes  # RGB, 8 bits, rows from the top
    resampled_from: tuple[int, int] | None
    prompt_truncated: bool
    prompt_tokens: int


Kind = TypeVar("Kind", bound=Track)  # a runner's own class of tracks


class Runner(Protocol[Kind]):
    """Advances pictures by calling networks.

    It raises errors of app.errors (OutOfMemory, GenerationFailed, DeviceGone, ...), or unexpected ones.
    """

    @property
    def counts(self) -> Mapping[str, int]:
        """Totals since the start: "cache_hits", "cache_misses", ..."""

    def load(self, configure: Configure) -> Ready:
        """Read the model, profile, warm up. Any error but DeviceGone means that the model is unusable."""

    def expect(self, request: bytes) -> None:
        """Encode the texts of a request (JSON) that may arrive soon. Raises the errors of `begin`."""

    def start(self, run: Run) -> Kind:
        """Plan the steps and shapes of a picture; cheap, without the device. Raises InvalidRequest."""

    def begin(self, track: Kind) -> None:
        """Prepare the first step: encode the text (cached), draw the noise. Repeated after OutOfMemory."""

    def step(self, tracks: Sequence[Kind]) -> None:
        """Advance pictures of one key by one step, and into the next stage after the last step of one.

        All or nothing: after an error every picture is where it was. More rows than the cap are stepped in
        several network calls. Returns when the device is done, so that the step can be timed.
        """

    def check(self, track: Kind) -> None:
        """Check the latents of a stage that ended. Raises GenerationFailed if not finite, or all the same."""

    def retry_in_fp32(self, track: Kind) -> bool:
        """Return to the start of the stage that just ended, in fp32. False if it ran in fp32 already."""

    def decode(self, tracks: Sequence[Kind]) -> list[Callable[[], Decoded]]:
        """Run Stage A for one or two pictures; return for each a callable that finishes it.

        Raises GenerationFailed for pixels that cannot be a picture.
        """

    def preview(self, track: Kind) -> tuple[int, int, bytes] | None:
        """Return width, height and pixels of Stage C's current estimate. None if there is nothing to show."""

    def drop(self, track: Kind) -> None:
        """Free what is kept for a picture that nobody wants any more."""

    def cap(self, key: BatchKey) -> int:
        """Return how many rows may be stepped together."""

    def halve(self, key: BatchKey) -> None:
        """Halve the cap, because memory was not enough. Never below 1."""

    def device_memory_bytes(self) -> int:
        """Return the bytes in use on the device, 0 if it shares the memory of the process."""


AnyRunner = Runner[Any]  # for code that works with every kind of track
