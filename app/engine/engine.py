"""The engine: one thread that owns the device, behind a bounded queue.

It takes the next jobs that can be made together, drives the runner from step to step, looks between two
steps whether anybody still wants the pictures, and hands them over. It knows jobs, not tensors.
"""

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from app.engine.cost import CostModel
from app.errors import (
    AppError,
    ClientGone,
    GenerationFailed,
    ModelLoading,
    ModelUnusable,
    Overloaded,
    ShuttingDown,
)
from app.jobs.job import Job, Picture, Progress
from app.logs import Logger
from app.metrics import Metrics
from app.schemas import GenerationRequest

LOADING_RETRY_SECONDS = 5
GPU_BATCH = 8
MAX_RETRY_SECONDS = 59  # the AI SDK ignores a Retry-After of a minute and more

Steps = Generator[Progress, None, list[list[Picture]]]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it is loaded."""

    device: str
    dtype: str
    native_size: tuple[int, int]  # (width, height) of `auto`


class Runner(Protocol):
    """Makes pictures. Only the engine's thread calls it."""

    def load(self) -> ModelFacts:
        """Read the model. Its errors are shown to the operator."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Steps:
        """Make the pictures of `requests` together, yielding after every step; returns one list for each.

        Closing the generator between two steps stops the work. The pictures of a request do not depend on
        the others.
        """


class Engine:
    """Accepts requests and works on them in order of arrival."""

    def __init__(
        self, runner: Runner, *, max_queue: int, max_batch: int | None, metrics: Metrics, logger: Logger
    ) -> None:
        self._runner = runner
        self._max_queue = max_queue
        self._wanted_batch = max_batch
        self._metrics = metrics
        self._logger = logger
        self._cost = CostModel()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self.loaded: Future[ModelFacts] = Future()  # an error in it is why there will be no model
        self.closed: Future[None] = Future()  # done when no more requests are taken
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch("queue_jobs", "Jobs waiting", lambda: self.num_queued)
        metrics.watch("running_jobs", "Jobs on the device", lambda: len(self._running))
        metrics.watch("model_loaded", "1 when the model is loaded", lambda: self.has_model)

    @property
    def model(self) -> ModelFacts:
        """The loaded model; raises ModelLoading until there is one, ModelUnusable if there will be none."""
        self._require_model()
        return self.loaded.result()

    @property
    def has_model(self) -> bool:
        """Whether the model is loaded and the thread that works with it lives."""
        return self.loaded.done() and self.loaded.exception() is None and self._thread.is_alive()

    @property
    def _max_batch(self) -> int:
        """Pictures made together. On a CPU one: more gain little and cost the equality to the last bit."""
        if self._wanted_batch is not None:
            return self._wanted_batch
        return 1 if self.model.device == "cpu" else GPU_BATCH

    @property
    def num_queued(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    @property
    def is_accepting(self) -> bool:
        """Whether a request sent now would be queued."""
        return self.has_model and not self.closed.done() and self._has_room()

    def start(self) -> None:
        """Begin to load the model, then to work."""
        self._thread.start()

    def close(self) -> None:
        """Refuse new work and fail what waits; what is on the device goes on."""
        with self._changed:
            if not self.closed.done():
                self.closed.set_result(None)
            waiting, self._queue = list(self._queue), deque()
        for job in waiting:
            job.fail(self._stopping_error())

    def abandon(self) -> None:
        """Close, and fail what is on the device at once; the work on it stops after the step."""
        self.close()
        with self._changed:
            self._is_stopping = True
            running = list(self._running)
            self._changed.notify()
        for job in running:
            job.fail(self._stopping_error())

    def stop(self, timeout_seconds: float) -> None:
        """Abandon all work and give the thread some time to end."""
        self.abandon()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def submit(self, request: GenerationRequest) -> Job:
        """Queue a request. Raises Overloaded when the queue is full: the bound is exact."""
        self._require_model()
        with self._changed:
            if self.closed.done():
                raise self._stopping_error()
            if not self._has_room():
                self._metrics.refused.labels("overloaded").inc()
                raise Overloaded(
                    f"{len(self._queue)} requests are waiting already; try again later",
                    retry_after_seconds=self.retry_after_seconds(),
                )
            job = Job(request)
            job.outcome.add_done_callback(lambda _: self._count(job))
            self._queue.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Free the place of a queued job at once, of a running one after the step."""
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
        job.cancel()

    def retry_after_seconds(self) -> int:
        """When half of the waiting work should be done, in whole seconds from 1 to 59."""
        waiting = [*self._running, *self._queue]
        units = sum(self._cost.units(job.request) for job in waiting)
        seconds = self._cost.seconds(units, len(waiting)) / 2
        return min(max(round(seconds), 1), MAX_RETRY_SECONDS)

    def _require_model(self) -> None:
        if not self.loaded.done():
            raise ModelLoading("the model is being loaded", retry_after_seconds=LOADING_RETRY_SECONDS)
        if self.loaded.exception() is not None:
            raise ModelUnusable("the model could not be loaded; the server's log says why")

    def _has_room(self) -> bool:
        idle = not self._running and not self._queue
        return len(self._queue) < self._max_queue or (idle and self._max_queue == 0)

    def _stopping_error(self) -> ShuttingDown:
        return ShuttingDown("the server is stopping", retry_after_seconds=LOADING_RETRY_SECONDS)

    def _run(self) -> None:
        try:
            self.loaded.set_result(self._runner.load())
        except Exception as error:
            self.loaded.set_exception(error)
            return
        try:
            while jobs := self._take():
                self._work(jobs)
        finally:
            self.abandon()  # if the thread dies of an error, nobody waits for it in vain

    def _take(self) -> list[Job]:
        """The oldest job and those behind it that can be made with it; empty when the engine stops."""
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._queue or self._is_stopping)
            if self._is_stopping:
                return []
            jobs = [self._queue.popleft()]
            num_images = jobs[0].request.num_images
            for job in list(self._queue):
                fits = num_images + job.request.num_images <= self._max_batch
                if fits and _can_share(job.request, jobs[0].request):
                    self._queue.remove(job)
                    jobs.append(job)
                    num_images += job.request.num_images
            self._running = jobs
        self._metrics.batch_pictures.observe(num_images)
        return jobs

    def _work(self, jobs: list[Job]) -> None:
        """Make the pictures of `jobs` and end every one of them."""
        jobs = [job for job in jobs if job.start()]
        if not jobs:
            return
        try:
            results = self._drive(jobs)
        except AppError as error:
            self._fail(jobs, error)
        except Exception:
            self._logger.exception("generation failed", jobs=[job.id for job in jobs])
            self._fail(jobs, GenerationFailed("the model failed on this request; the server's log says why"))
        else:
            for job, pictures in zip(jobs, results, strict=True):
                job.succeed(pictures)
            self._learn(jobs)

    def _drive(self, jobs: list[Job]) -> list[list[Picture]]:
        """Step the runner to its end, or until nobody waits for any of the jobs."""
        with closing(self._make([job.request for job in jobs])) as steps:
            while True:
                try:
                    progress = next(steps)
                except StopIteration as end:
                    results: list[list[Picture]] = end.value
                    break
                self._metrics.steps.labels(progress.stage).inc()
                for job in jobs:
                    job.report(progress)
                if self._is_stopping:
                    raise self._stopping_error()
                if all(job.is_finished for job in jobs):
                    raise ClientGone("nobody waits for these pictures any more")
        if [len(pictures) for pictures in results] != [job.request.num_images for job in jobs]:
            raise RuntimeError("the runner made another number of pictures than it was asked for")
        return results

    def _make(self, requests: list[GenerationRequest]) -> Steps:
        """Make all pictures, a request of many in parts that are no larger than a batch."""
        if len(requests) > 1:
            return (yield from self._runner.generate(requests))
        [request] = requests
        pictures: list[Picture] = []
        for start in range(0, request.num_images, self._max_batch):
            seeds = request.seeds[start : start + self._max_batch]
            [made] = yield from self._runner.generate([request.model_copy(update={"seeds": seeds})])
            pictures += made
        return [pictures]

    def _fail(self, jobs: list[Job], error: AppError) -> None:
        """Fail the one at fault: several jobs are tried again one by one."""
        if len(jobs) == 1 or self._is_stopping:
            for job in jobs:
                job.fail(error)
        else:
            for job in jobs:
                self._work([job])

    def _learn(self, jobs: list[Job]) -> None:
        if all(job.status == "succeeded" for job in jobs):
            units = sum(self._cost.units(job.request) for job in jobs)
            self._cost.learn(units, jobs[0].running_seconds)

    def _count(self, job: Job) -> None:
        self._metrics.jobs.labels(job.status).inc()
        self._metrics.queued_seconds.observe(job.queued_seconds)
        if job.started_at is not None:
            self._metrics.running_seconds.observe(job.running_seconds)


def _can_share(a: GenerationRequest, b: GenerationRequest) -> bool:
    """Whether two requests can be made together: the same shapes, and noise drawn in the same way."""
    return (a.width, a.height, a.preset) == (b.width, b.height, b.preset)
