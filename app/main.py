"""The only module that builds and wires the server."""

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from app.api import (
    a1111,
    a1111_surroundings,
    docs,
    files,
    health,
    huggingface,
    jobs,
    models,
    native,
    openai,
    webhooks,
)
from app.api.deps import Services
from app.api.description import describe
from app.api.failures import install_handlers
from app.api.gateway import Gateway
from app.api.key_ring import KeyRing
from app.api.limits import RateLimit
from app.api.origins import Origins
from app.api.tracing import Tracing, make_tracing
from app.api.uploads import Uploads
from app.api.webhooks import message_body
from app.clock import SteadyClock
from app.engine.contract import AnyRunner
from app.engine.cost import CostModel
from app.engine.protocol import Configure
from app.errors import ModelUnusable, Overloaded, SettingsError, StorageFull
from app.jobs.dispatcher import Dispatcher
from app.jobs.faults import Faults
from app.jobs.housekeeping import prune_periodically
from app.jobs.links import Launch, ProcessLauncher, ThreadLauncher
from app.jobs.server_lock import lock_server
from app.jobs.store import JobStore
from app.jobs.supervisor import Supervisor
from app.jobs.webhooks import WebhookSender
from app.logs import Logger, is_for_people, make_logger
from app.metrics import Metrics
from app.outbound import Outbound
from app.settings import Settings, load_settings
from app.storage.bucket import Bucket, BucketImages, BucketInputs
from app.storage.credentials import Credentials, make_credentials
from app.storage.images import ImageStore
from app.storage.inputs import InputStore
from app.storage.loras import InstalledLoRAs
from app.storage.signing import Signer, load_secret
from app.storage.writing import room_for

DISTRIBUTION = "stable-cascade-server"
NUM_ENCODERS = 2
NUM_STORAGE_THREADS = 16  # they wait for disks or a bucket; half of them may have to write
FIRST_PROMPT = '{"prompt":"a red circle on a blue background","seed":7,"response_format":"url"}'

Ready = Callable[[], None]
Unusable = Callable[[Exception], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a server that exist before its event loop runs."""

    settings: Settings
    images: ImageStore
    inputs: InputStore
    signer: Signer
    keys: KeyRing
    credentials: Credentials
    metrics: Metrics
    tracing: Tracing
    logger: Logger
    clock: Callable[[], float]
    launch: Launch


def create_app(
    settings: Settings | None = None,
    *,
    runner: AnyRunner | None = None,
    on_ready: Ready = lambda: None,
    on_unusable: Unusable = lambda _: None,
) -> FastAPI:
    """Create a server that shares nothing with another one in the same process.

    `runner` replaces the real model, in a thread of this process. `on_ready` is called when requests can be
    served, `on_unusable` with the reason why they never will be, be it the database or the model. Raises
    SettingsError when there is no disk space for what a server has to write.
    """
    settings = settings or load_settings()
    with _room_to_start(settings.data_dir):
        parts = _build_parts(settings, runner)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                with _room_to_start(settings.data_dir):
                    services = await _start(parts, stack)
            except SettingsError as error:
                on_unusable(error)
                raise
            app.state.services = services
            announcing = asyncio.create_task(_announce(services, on_ready, on_unusable))
            stack.push_async_callback(_cancel, announcing)
            yield
        parts.logger.info("stopped")

    app = FastAPI(
        title="Stable Cascade Server",
        description="Pictures from prompts, by Stable Cascade.",
        version=version(DISTRIBUTION),
        lifespan=lifespan,
        docs_url=None,  # replaced by ours, which needs no CDN
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,  # one job, one schema
        telemetry=parts.tracing.config,
    )
    for part in (openai, native, models, jobs, webhooks, a1111, a1111_surroundings, huggingface, files):
        app.include_router(part.router)
    for part in (health, docs):
        app.include_router(part.router)
    app.webhooks.include_router(webhooks.calls)
    install_handlers(app)
    describe(app, needs_key=settings.has_keys)
    app.add_middleware(
        Gateway,
        server=app,
        origins=Origins(settings),
        metrics=parts.metrics,
        logger=parts.logger,
    )
    return app


@contextmanager
def _room_to_start(folder: Path) -> Iterator[None]:
    """Turn a lack of disk space at the start into a SettingsError."""
    try:
        with room_for("what a server needs"):
            yield
    except StorageFull as error:
        raise SettingsError(f"there is no space left in {folder}; make some, and start again") from error


def _build_parts(settings: Settings, runner: AnyRunner | None) -> Parts:
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    logger = make_logger(settings)
    clock = SteadyClock(time.time)
    images, inputs = _stores(settings, clock)
    secret = load_secret(settings.data_dir / "secret", settings.signing_secret)
    credentials = make_credentials(settings.c2pa_certificate, settings.c2pa_key)
    metrics = Metrics()
    metrics.certificate_expiry.set(credentials.expires_at)
    return Parts(
        settings=settings,
        images=images,
        inputs=inputs,
        signer=Signer(secret, settings.url_ttl, clock),
        keys=KeyRing(settings.api_keys, settings.api_keys_file, logger),
        credentials=credentials,
        metrics=metrics,
        tracing=make_tracing(settings.trace_endpoint),
        logger=logger,
        clock=clock,
        launch=ProcessLauncher(settings) if runner is None else ThreadLauncher(runner, logger),
    )


def _stores(settings: Settings, clock: Callable[[], float]) -> tuple[ImageStore, InputStore]:
    """Build the stores of results and of input pictures."""
    files, inputs = settings.data_dir / "files", settings.data_dir / "inputs"
    for folder in (files, inputs):
        folder.mkdir(exist_ok=True, mode=0o700)
    if settings.bucket_url is None:
        return ImageStore(files, settings.file_ttl, clock), InputStore(inputs, settings.max_pixels, clock)
    bucket = Bucket.open(settings.bucket_url)
    return (
        BucketImages(bucket, files, settings.file_ttl, clock),
        BucketInputs(bucket, inputs, settings.max_pixels, clock),
    )


async def _start(parts: Parts, stack: AsyncExitStack) -> Services:
    """Start everything that runs; `stack` stops it, in reverse order."""
    settings = parts.settings
    faults = Faults(settings.faults)
    stack.callback(parts.tracing.close)
    server_lock = lock_server(settings.data_dir, is_sole=settings.database_url is None)
    stack.callback(server_lock.leave)
    store = await JobStore.open(settings.jobs_url, clock=parts.clock, faults=faults)
    stack.push_async_callback(store.close)
    encoders = stack.enter_context(ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="encoder"))
    storage = ThreadPoolExecutor(NUM_STORAGE_THREADS, thread_name_prefix="storage")
    stack.callback(storage.shutdown, wait=False, cancel_futures=True)  # a bucket may hang
    dispatcher = Dispatcher(
        store,
        _supervisors(parts),
        server_lock=server_lock,
        images=parts.images,
        inputs=parts.inputs,
        encoders=encoders,
        storage=storage,
        credentials=parts.credentials,
        cost=CostModel(),
        settings=settings,
        metrics=parts.metrics,
        logger=parts.logger,
        clock=parts.clock,
        faults=faults,
    )
    await dispatcher.start()
    stack.push_async_callback(dispatcher.stop)
    outbound = Outbound(settings.outbound_allow)
    stack.push_async_callback(outbound.close)
    services = Services(
        settings=settings,
        store=store,
        dispatcher=dispatcher,
        images=parts.images,
        inputs=parts.inputs,
        signer=parts.signer,
        credentials=parts.credentials,
        outbound=outbound,
        uploads=Uploads(),
        keys=parts.keys,
        limit=RateLimit(settings.rate_limit),
        encoders=encoders,
        storage=storage,
        reader=stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="reader")),
        loras=InstalledLoRAs(),
        metrics=parts.metrics,
        tracing=parts.tracing,
        logger=parts.logger,
        version=version(DISTRIBUTION),
        clock=parts.clock,
    )
    for work in (parts.keys.watch(), _tidy(services), _webhook_sender(services, faults).run()):
        stack.push_async_callback(_cancel, asyncio.create_task(work))
    return services


def _tidy(services: Services) -> Coroutine[None, None, None]:
    """Return the work of removing, now and then, what is too old."""
    return prune_periodically(
        services.store,
        services.images,
        services.inputs,
        services.storage,
        services.settings,
        services.logger,
        services.clock,
    )


def _webhook_sender(services: Services, faults: Faults) -> WebhookSender:
    """Build the sender of webhooks."""
    return WebhookSender(
        services.store,
        body=partial(message_body, services),
        secret=services.signer.webhook_secret,
        post=services.outbound.post,
        metrics=services.metrics,
        logger=services.logger,
        clock=time.time,  # receivers compare it with their own
        faults=faults,
    )


def _supervisors(parts: Parts) -> list[Supervisor]:
    """Return the supervisor of an engine for each device."""
    settings = parts.settings
    return [
        Supervisor(
            parts.launch,
            Configure(
                model=settings.model,
                device=device,
                dtype=settings.dtype,
                compile=settings.compile,
                is_strict=settings.strict,
                max_rows=settings.max_rows,
                cache_dir=str(settings.profiles_dir),
                lora_dir=_text(settings.lora_dir),
                controlnet_dir=_text(settings.controlnet_dir),
                weights=settings.weights,
                faults=settings.faults,
            ),
            metrics=parts.metrics,
            logger=parts.logger,
        )
        for device in settings.devices
    ]


def _text(folder: Path | None) -> str | None:
    return None if folder is None else str(folder.absolute())


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _announce(services: Services, on_ready: Ready, on_unusable: Unusable) -> None:
    """Log how loading ended; on success also print a first request to paste."""
    settings, logger = services.settings, services.logger
    await services.dispatcher.wait_loaded(math.inf)
    try:
        model = services.dispatcher.model
    except ModelUnusable:
        on_unusable(SettingsError(services.dispatcher.engines[0].reason))
        return
    except Overloaded:  # the server stopped before it was ready
        return
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = settings.public_base_url or f"http://{host}:{settings.port}"
    logger.info("ready", url=url, model=settings.model_name, device=model.device, dtype=model.dtype)
    if not settings.has_keys:
        log = logger.info if settings.is_loopback else logger.warning
        log("no API key is set: everybody who can connect may ask for pictures")
    if sys.stderr.isatty() and is_for_people(settings, sys.stderr):
        sys.stderr.write(f"{_example(url, has_keys=settings.has_keys)}\n")
    on_ready()


def _example(url: str, *, has_keys: bool) -> str:
    """Return a first request as a shell command."""
    key = ' -H "authorization: Bearer $KEY"' if has_keys else ""
    return f"curl -s {url}/v1/images/generations{key} -H 'content-type: application/json' -d '{FIRST_PROMPT}'"
