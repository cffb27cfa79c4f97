"""Steps a batch in spite of errors: with less memory, and without the picture that is to blame."""

from collections import Counter
from collections.abc import Callable, Sequence

from app.engine.contract import AnyRunner, Track
from app.engine.picture import Picture
from app.errors import DeviceGone, GenerationFailed, OutOfMemory

# Messages of CUDA and its libraries for a lost context, after which every later call fails too.
_LAST_WORDS = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "invalid program counter",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ecc",
    "context is destroyed",
    "device unavailable",
    "no longer available",
    "fallen off the bus",
    "cublas_status_execution_failed",
    "cudnn_status_execution_failed",
    "cudnn_status_internal_error",
)


def raise_if_gone(error: Exception) -> None:
    """Raise DeviceGone if the error means that every later call of the device will fail."""
    words = str(error).lower()
    if isinstance(error, DeviceGone):
        raise error
    if any(last in words for last in _LAST_WORDS):
        raise DeviceGone(str(error).splitlines()[0]) from error


class Stepper:
    """Steps pictures with a runner, and finds the culprit when that fails. Its methods raise DeviceGone."""

    def __init__(self, runner: AnyRunner, events: Counter[str], make_room: Callable[[], None]) -> None:
        self._runner = runner
        self._events = events
        self._make_room = make_room

    def begin(self, pictures: Sequence[Picture], now: float) -> dict[Picture, Exception]:
        """Prepare the pictures that take their first step; return those that failed, with the errors."""
        failed: dict[Picture, Exception] = {}
        for picture in pictures:
            if picture.began_stage_at is not None:
                continue
            picture.began_stage_at = now
            try:
                self._runner.begin(picture.track)
            except OutOfMemory:
                failed |= self._with_room(picture, self._runner.begin)
            except Exception as error:
                raise_if_gone(error)
                failed[picture] = error
        return failed

    def step(self, pictures: Sequence[Picture]) -> dict[Picture, Exception]:
        """Advance all pictures by one step; return those that failed, with the errors."""
        if not pictures:
            return {}
        try:
            self._runner.step([picture.track for picture in pictures])
        except OutOfMemory:
            return self._step_in_less_memory(pictures)
        except Exception as error:
            raise_if_gone(error)
            if len(pictures) == 1:
                return {pictures[0]: error}
            self._events["bisections"] += 1
            return self._step_halves(pictures)
        return {}

    def is_repeated(self, picture: Picture) -> bool:
        """Check the result of a stage: True if it is to be repeated in fp32. Raises if it was already."""
        try:
            self._runner.check(picture.track)
        except GenerationFailed:
            if not self._runner.retry_in_fp32(picture.track):
                raise
            self._events["fp32_retries"] += 1
            return True
        return False

    def _step_in_less_memory(self, pictures: Sequence[Picture]) -> dict[Picture, Exception]:
        """Lower the cap below what was tried, and take the same step in parts."""
        is_lowered = self._lower_cap(pictures)
        if len(pictures) > 1:
            return self._step_halves(pictures)
        if is_lowered:
            return self.step(pictures)  # a guided picture, now row by row
        return self._with_room(pictures[0], lambda track: self._runner.step([track]))

    def _lower_cap(self, pictures: Sequence[Picture]) -> bool:
        key = pictures[0].key
        rows = sum(picture.track.work[0].rows for picture in pictures)
        is_lowered = False
        while self._runner.cap(key) >= rows > 1:
            self._runner.halve(key)
            self._events["halvings"] += 1
            is_lowered = True
        return is_lowered

    def _step_halves(self, pictures: Sequence[Picture]) -> dict[Picture, Exception]:
        middle = len(pictures) // 2
        return self.step(pictures[:middle]) | self.step(pictures[middle:])

    def _with_room(self, picture: Picture, act: Callable[[Track], None]) -> dict[Picture, Exception]:
        """Try once more after the finisher has freed the memory of Stage A."""
        self._events["memory_waits"] += 1
        self._make_room()
        try:
            act(picture.track)
        except Exception as error:
            raise_if_gone(error)
            return {picture: error}
        return {}
