"""Builds and wires the server; nobody else does."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import FastAPI

from app.api import docs, files, health, openai
from app.api.deps import Services
from app.api.description import describe
from app.api.failures import install_handlers
from app.api.gateway import Gateway
from app.engine.engine import Engine, ModelFacts, Runner
from app.engine.runner import CascadeRunner
from app.logs import is_for_people, make_logger
from app.metrics import Metrics
from app.settings import Settings, load_settings
from app.storage.images import ImageStore
from app.storage.signing import Signer, load_secret

DISTRIBUTION = "stable-cascade-server"
NUM_ENCODERS = 2
STOP_SECONDS = 10.0
SWEEP_SECONDS = 60.0
FIRST_PROMPT = '{"prompt":"a red circle on a blue background","seed":7,"response_format":"url"}'

Unusable = Callable[[BaseException], None]


def create_app(
    settings: Settings | None = None, *, runner: Runner | None = None, on_unusable: Unusable | None = None
) -> FastAPI:
    """A server of its own, that shares nothing with another one in the same process.

    `runner` replaces the real model. `on_unusable` is told, from another thread, why the model could not
    be loaded; without it the log is.
    """
    settings = settings or load_settings()
    services = _build_services(
        settings, runner or CascadeRunner(settings.model, settings.device, settings.dtype)
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.engine.loaded.add_done_callback(lambda loaded: _announce(services, loaded, on_unusable))
        services.engine.start()
        sweeper = asyncio.create_task(_sweep(services))
        try:
            yield
        finally:
            sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await sweeper
            await asyncio.to_thread(services.engine.stop, STOP_SECONDS)
            services.encoders.shutdown()
            services.logger.info("stopped")

    app = FastAPI(
        title="Stable Cascade Server",
        description="Pictures from prompts, by Stable Cascade.",
        version=services.version,
        lifespan=lifespan,
        docs_url=None,  # ours, which needs no other server
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    for router in (openai.router, files.router, health.router, docs.router):
        app.include_router(router)
    install_handlers(app)
    describe(app)
    app.add_middleware(
        Gateway,
        server=app,
        cors_origins=settings.cors_origins,
        metrics=services.metrics,
        logger=services.logger,
    )
    return app


def _build_services(settings: Settings, runner: Runner) -> Services:
    folder = settings.data_dir / "files"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    metrics, logger = Metrics(), make_logger(settings)
    return Services(
        settings=settings,
        engine=Engine(
            runner,
            max_queue=settings.max_queue,
            max_batch=settings.max_batch,
            metrics=metrics,
            logger=logger,
        ),
        images=ImageStore(folder, settings.file_ttl),
        signer=Signer(load_secret(settings.data_dir / "secret"), settings.url_ttl),
        encoders=ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="encoder"),
        metrics=metrics,
        logger=logger,
        version=version(DISTRIBUTION),
    )


def _announce(services: Services, loaded: "Future[ModelFacts]", on_unusable: Unusable | None) -> None:
    """Log how loading ended; on success a terminal also gets a line to paste."""
    settings, logger = services.settings, services.logger
    error = loaded.exception()
    if error is not None:
        if on_unusable is not None:
            on_unusable(error)
        else:
            logger.error("the model could not be loaded", model=settings.model, reason=str(error))
        return
    model = loaded.result()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = settings.public_base_url or f"http://{host}:{settings.port}"
    logger.info("ready", url=url, model=settings.model_name, device=model.device, dtype=model.dtype)
    if not (settings.api_keys or settings.is_loopback):
        logger.warning("no API key is set: everybody who can connect may ask for pictures")
    if sys.stderr.isatty() and is_for_people(settings, sys.stderr):
        sys.stderr.write(f"{_example(url, has_keys=bool(settings.api_keys))}\n")


def _example(url: str, *, has_keys: bool) -> str:
    """A first request, as a command for a shell."""
    key = ' -H "authorization: Bearer $KEY"' if has_keys else ""
    return f"curl -s {url}/v1/images/generations{key} -H 'content-type: application/json' -d '{FIRST_PROMPT}'"


async def _sweep(services: Services) -> None:
    """Remove pictures whose time is over, now and then, as long as the server lives."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            removed = await loop.run_in_executor(services.encoders, services.images.sweep)
            if removed:
                services.logger.info("old pictures removed", files=removed)
        except OSError as error:
            services.logger.warning("old pictures could not be removed", reason=str(error))
        await asyncio.sleep(min(SWEEP_SECONDS, services.settings.file_ttl))
