"""The thread that decodes pictures and previews beside the loop, so that no step has to wait for them."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from app.engine.contract import AnyRunner, Decoded
from app.engine.picture import Picture
from app.engine.protocol import Message, Observation, Previewed
from app.engine.pulse import Pulse
from app.engine.stepping import raise_if_gone
from app.logs import Logger

AT_ONCE = 2  # pictures in a call of Stage A, which has the largest activations of all stages


@dataclass(frozen=True, slots=True)
class Finished:
    """A report that a picture has left the finisher, with the error if it could not be decoded."""

    picture: Picture
    error: Exception | None = None


class Finisher:
    """A thread that decodes and sends pictures. It reports each picture, each call and a fatal error."""

    def __init__(
        self,
        runner: AnyRunner,
        send: Callable[[Message], None],
        report: Callable[[Finished | Observation | Exception], None],
        pulse: Pulse,
        clock: Callable[[], float],
        logger: Logger,
    ) -> None:
        self._runner = runner
        self._send = send
        self._report = report
        self._pulse = pulse
        self._clock = clock
        self._logger = logger
        self._drawn: deque[Picture] = deque()
        self._previews: dict[Picture, int] = {}  # number of the latest one wanted, by picture
        self._is_working = False
        self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="finisher", daemon=True).start()

    def finish(self, picture: Picture) -> None:
        """Queue a picture to be decoded and sent."""
        with self._changed:
            self._previews.pop(picture, None)
            self._drawn.append(picture)
            self._changed.notify_all()

    def preview(self, picture: Picture, number: int) -> None:
        """Send a preview once no picture waits to be decoded; it replaces an older one that waits."""
        with self._changed:
            self._previews[picture] = number
            self._changed.notify_all()

    def drop(self, picture: Picture) -> None:
        """Skip work that has not begun on a picture that nobody wants any more."""
        with self._changed:
            picture.is_dropped = True
            self._previews.pop(picture, None)
            if picture in self._drawn:
                self._drawn.remove(picture)
                self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Wait until no picture is being decoded or waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not (self._is_working or self._drawn))

    def close(self) -> None:
        """Let the thread end after its current work."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (work := self._take()) is not None:
                work()
                del work  # which refers to pictures, and would keep them while the thread waits
        except Exception as error:  # the device is gone; the loop raises it
            self._report(error)
        finally:
            self.close()

    def _take(self) -> Callable[[], None] | None:
        """Wait for the next work, pictures before previews; return None when the thread is to end."""
        with self._changed:
            self._is_working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._drawn or self._previews or self._is_closed)
            if self._is_closed:
                return None
            self._is_working = True
            if self._drawn:
                pictures = self._take_alike()
                is_backlogged = any(picture.key == pictures[0].key for picture in self._drawn)
                return partial(self._finish, pictures, is_backlogged)
            picture = next(iter(self._previews))
            return partial(self._show, picture, self._previews.pop(picture))

    def _take_alike(self) -> list[Picture]:
        """Take the oldest picture, and the next ones that the same call can decode."""
        alike = (picture for picture in self._drawn if picture.key == self._drawn[0].key)
        pictures = list(islice(alike, AT_ONCE))
        for picture in pictures:
            self._drawn.remove(picture)
        return pictures

    def _finish(self, pictures: list[Picture], is_backlogged: bool) -> None:
        """Decode and send pictures. When that fails for two together, try each alone."""
        try:
            decoded = self._decode(pictures, is_backlogged)
        except Exception as error:
            raise_if_gone(error)
            if len(pictures) == 1:
                self._report(Finished(pictures[0], error))
            else:
                for picture in pictures:
                    self._finish([picture], is_backlogged=False)
        else:
            for picture, made in zip(pictures, decoded, strict=True):
                self._send_off(picture, made)

    def _decode(self, pictures: list[Picture], is_backlogged: bool) -> list[Decoded]:
        with self._pulse.busy(sum(picture.entry.cost_left for picture in pictures)):
            began = self._clock()
            drawn = self._runner.decode([picture.track for picture in pictures])
            seconds = self._clock() - began  # of Stage A alone: the cost must not depend on the final size
            decoded = [finished() for finished in drawn]
        rows = len(pictures)
        tick = self._pulse.observe(
            pictures[0].key,
            rows=rows,
            samples=rows,
            seconds=seconds,
            cap=AT_ONCE,
            is_backlogged=is_backlogged,
        )
        self._report(tick)
        return decoded

    def _send_off(self, picture: Picture, decoded: Decoded) -> None:
        picture.end_stage("decode", self._clock())
        if not picture.is_dropped:
            self._send(picture.pixels(decoded))
        self._report(Finished(picture))

    def _show(self, picture: Picture, number: int) -> None:
        try:
            with self._pulse.busy(0.0):
                made = self._runner.preview(picture.track)
        except Exception as error:
            raise_if_gone(error)
            self._logger.warning("a preview failed", job=picture.run.job, exc_info=error)
            return
        if made is not None and not picture.is_dropped:
            width, height, pixels = made
            self._send(Previewed(picture.run.job, picture.run.index, number, width, height, pixels))
