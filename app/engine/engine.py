"""The engine's loop, in the thread that owns the device: take the next batch, step it, update, publish.

Everything else arrives between two steps, through one inbox: messages of the API process and reports of the
finisher. `contract` defines what a runner does, `scheduler` decides which pictures step next.
"""

from collections.abc import Callable
from queue import Empty, SimpleQueue

from app.engine.active_pictures import ActivePictures
from app.engine.contract import AnyRunner
from app.engine.cost import CostModel
from app.engine.finisher import Finished, Finisher
from app.engine.picture import Picture
from app.engine.protocol import (
    AnyToEngine,
    Cancel,
    Drain,
    Expect,
    Failed,
    Latents,
    Message,
    Observation,
    Progressed,
    Run,
    WantPreviews,
)
from app.engine.pulse import Pulse
from app.engine.scheduler import Batch, Scheduler
from app.engine.stepping import Stepper, raise_if_gone
from app.errors import AppError, GenerationFailed
from app.jobs.faults import Faults
from app.logs import Logger


class HungUp:
    """In the inbox: the other end of the socket is gone."""


InboxMessage = AnyToEngine | Finished | Observation | Exception | HungUp
Inbox = SimpleQueue[InboxMessage]


class Engine:
    """The loop of an engine, which works on pictures until it is drained or the other end hangs up."""

    def __init__(
        self,
        runner: AnyRunner,
        scheduler: Scheduler,
        cost: CostModel,
        *,
        inbox: Inbox,
        send: Callable[[Message], None],
        pulse: Pulse,
        faults: Faults,
        clock: Callable[[], float],
        logger: Logger,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._cost = cost
        self._inbox = inbox
        self._send = send
        self._pulse = pulse
        self._faults = faults
        self._clock = clock
        self._logger = logger
        self._finisher = Finisher(runner, send, inbox.put, pulse, clock, logger)
        self._stepper = Stepper(runner, pulse.events, make_room=self._finisher.wait_until_idle)
        self._active = ActivePictures()
        self._is_idle = True
        self._is_draining = False
        self._is_over = False

    def run(self) -> None:
        """Step batch after batch. Raises DeviceGone when that is not possible any more."""
        try:
            while self._listen():
                batch = self._scheduler.next(self._clock())
                self._is_idle = batch is None
                if batch is not None:
                    self._tick(batch)
        finally:
            self._finisher.close()

    def _tick(self, batch: Batch) -> None:
        with self._pulse.busy(self._cost.step_seconds(batch.key, batch.rows)):
            pictures = self._step(batch)
            self._update(pictures, batch.key.stage)
            self._publish(pictures)

    def _listen(self) -> bool:
        """Handle the inbox, waiting for it while there is nothing to step. False when all is done."""
        while not self._is_over:
            is_done = self._is_draining and not self._active
            try:
                message = self._inbox.get(block=self._is_idle and not is_done)
            except Empty:
                return not is_done
            self._handle(message)
            self._is_idle = False
        return False

    def _handle(self, message: InboxMessage) -> None:
        match message:
            case Run():
                self._admit(message)
            case Expect(request):
                self._expect(request)
            case Cancel(job):
                self._drop(job)
            case WantPreviews(job, count):
                self._active.want_previews(job, count)
            case Drain():
                self._is_draining = True
            case Observation():
                self._cost.learn(message)
            case Finished(picture, Exception() as error) if not picture.is_dropped:
                self._fail(picture.run, error)
            case Finished(picture):
                self._let_go(picture)
            case HungUp():
                self._is_over = True
            case Exception():
                raise message

    def _expect(self, request: bytes) -> None:
        """Use idle time to prepare for a request that may come. Its errors are reported when it does."""
        if self._active:
            return
        with self._pulse.busy(0.0):
            try:
                self._runner.expect(request)
            except Exception as error:
                raise_if_gone(error)

    def _admit(self, run: Run) -> None:
        """Take a picture aboard and give it to the scheduler."""
        if run in self._active:
            return
        try:
            track = self._runner.start(run)
        except Exception as error:
            raise_if_gone(error)
            self._fail(run, error)
            return
        picture = Picture.aboard(run, track, self._clock())
        picture.follow(self._cost.alone(picture.track.work))
        self._active.add(picture)
        self._pulse.num_samples = len(self._active)
        self._scheduler.add(picture.entry)

    def _step(self, batch: Batch) -> list[Picture]:
        """Advance a batch by one step; return its pictures that are still wanted."""
        pictures = [self._active.at(entry.job, entry.index) for entry in batch.entries]
        if any(picture.run.is_alone for picture in pictures):
            self._finisher.wait_until_idle()
        self._faults.hit("engine_before_step")
        num_events = self._pulse.events.total()
        began = self._clock()
        failed = self._stepper.begin(pictures, began)
        stepping = self._clock()
        failed |= self._stepper.step([picture for picture in pictures if picture not in failed])
        ended = self._clock()
        self._scheduler.stepped(batch, ended - began)
        if not failed and self._pulse.events.total() == num_events:
            self._observe(batch, ended - stepping)
        for picture, error in failed.items():
            self._fail(picture.run, error)
        return [picture for picture in pictures if not picture.is_dropped]

    def _observe(self, batch: Batch, seconds: float) -> None:
        """Record and learn from a step that went as planned."""
        tick = self._pulse.observe(
            batch.key,
            rows=batch.rows,
            samples=len(batch.entries),
            seconds=seconds,
            cap=self._runner.cap(batch.key),
            is_backlogged=batch.has_backlog,
        )
        self._cost.learn(tick)

    def _update(self, pictures: list[Picture], stage: str) -> None:
        """Bring the scheduler up to date after a step of `stage`, and hand over what is drawn."""
        for picture in pictures:
            if picture.key.stage != stage:
                self._end_stage(picture, stage)
            if picture.is_dropped:
                continue
            cost_left = self._cost.alone(picture.track.work)
            if picture.is_in_place:
                picture.entry.cost_left = cost_left
                continue
            self._scheduler.remove(picture.entry)
            picture.follow(cost_left)
            if picture.is_drawn:
                self._hand_over(picture)
            else:
                self._scheduler.add(picture.entry)

    def _end_stage(self, picture: Picture, stage: str) -> None:
        """Check the result of a stage; if it is flawed, the stage is repeated or the picture fails."""
        try:
            is_repeated = self._stepper.is_repeated(picture)
        except Exception as error:
            raise_if_gone(error)
            self._fail(picture.run, error)
            return
        if is_repeated:
            return
        picture.end_stage(stage, self._clock())
        if stage == "prior" and picture.track.latents is not None:
            self._send(Latents(picture.run.job, picture.run.index, picture.track.latents))

    def _hand_over(self, picture: Picture) -> None:
        """Hand a picture over to the finisher, and wait for it only if it must be alone."""
        picture.is_in_queue = False
        self._finisher.finish(picture)
        if picture.run.is_alone:
            self._finisher.wait_until_idle()

    def _publish(self, pictures: list[Picture]) -> None:
        """Send the progress of the pictures, not too often, and order the previews that are due."""
        due = self._active.to_tell(pictures, self._clock())
        if due:
            self._send(Progressed(tuple(picture.progress() for picture in due)))
        for picture in self._active.to_show(pictures):
            self._finisher.preview(picture, picture.num_previews - 1)

    def _fail(self, run: Run, error: Exception) -> None:
        """Report that a picture failed, and drop its whole job."""
        self._drop(run.job)
        if isinstance(error, AppError):
            self._logger.info("a picture failed", job=run.job, index=run.index, code=error.code)
            told = error
        else:
            self._logger.error("a picture failed", job=run.job, index=run.index, exc_info=error)
            told = GenerationFailed("the model failed on this picture; the server's log says why")
        self._send(Failed(run.job, run.index, told.code, told.message))
        # Its frames refer to ours, which hold it: the cycle would keep pictures until a garbage collection.
        error.__traceback__ = error.__cause__ = error.__context__ = None

    def _drop(self, job: str) -> None:
        """Drop a job, wherever its pictures are."""
        for picture in self._active.of(job):
            self._finisher.drop(picture)
            if picture.is_in_queue:
                self._scheduler.remove(picture.entry)
                self._runner.drop(picture.track)
            self._let_go(picture)

    def _let_go(self, picture: Picture) -> None:
        self._active.remove(picture)
        self._pulse.num_samples = len(self._active)
