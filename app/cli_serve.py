"""`cascade serve`: the HTTP server in this process."""

import asyncio
import errno
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli_systemd import ServiceManager

if TYPE_CHECKING:
    from app.settings import Settings

BACKLOG = 2048  # connections that the kernel queues while the event loop is starting
UNSENT_BYTES = 256 * 1024  # in the kernel, which would buffer megabytes for a client that reads nothing


def serve(
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address to listen on.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="0 takes a free one.", show_default="8000")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="tiny, a folder, or a repository name.",
            show_default="tiny",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "--device",
            metavar="DEVICES",
            help="auto, cpu, cuda:0,cuda:1, ...",
            show_default="auto",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="auto, float32 or bfloat16.", show_default="auto")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of jobs, pictures and secrets.", show_default="data"),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Listen beyond this machine although no key is set.")
    ] = False,
) -> None:
    """Serve pictures over HTTP. Options win over the environment (CASCADE_HOST, CASCADE_PORT, ...).

    \b
    Examples:
      cascade serve
      cascade serve --model DIR --port 9000
      CASCADE_API_KEYS=secret cascade serve --host 0.0.0.0
    """
    from app.settings import load_settings

    chosen = {
        "host": host,
        "port": port,
        "model": model,
        "devices": devices,
        "dtype": dtype,
        "data_dir": data_dir,
        "allow_anonymous": allow_anonymous or None,
    }
    settings = load_settings(**{name: value for name, value in chosen.items() if value is not None})
    with listen(settings.host, settings.port) as listener:  # first of all, so that a busy port fails at once
        _run(settings, listener)


def _run(settings: "Settings", listener: socket.socket) -> None:
    """Serve on `listener` until stopped. Raises the reason if the server cannot work."""
    from app.api.connections import DrainingServer, configure
    from app.logs import Relay, make_logger
    from app.main import create_app
    from app.settings import service_environment

    address, bound_port = listener.getsockname()[:2]
    settings = settings.model_copy(update={"port": bound_port})
    manager = ServiceManager.of_environment(service_environment(), os.getpid())
    unusable: list[Exception] = []
    feeding: list[asyncio.Task[None]] = []

    def ready() -> None:
        gc.freeze()  # otherwise each scan of permanent objects would block for a tenth of a second
        manager.ready(f"serving {settings.model_name}")
        feeding.append(asyncio.create_task(manager.keep_alive()))

    def stop(error: Exception) -> None:
        unusable.append(error)
        server.should_exit = True

    _take_all_descriptors()
    manager.starting(f"loading {settings.model_name}")
    logger = make_logger(settings)
    logger.info("loading", model=settings.model_name, url=f"http://{_bracketed(address)}:{bound_port}")
    app = create_app(settings, on_ready=ready, on_unusable=stop)
    server = DrainingServer(
        configure(app, settings), settings.grace_seconds, on_stopping=lambda: manager.stopping("draining")
    )
    with Relay("asyncio", logger), Relay("uvicorn", logger, is_muted=lambda: bool(unusable)):
        signal.signal(signal.SIGTERM, _leave)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # the usual way to stop a server, which has logged it
            sys.exit(130)
        except SystemExit:
            if not unusable:
                raise
    if unusable:
        raise unusable[0]


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: the host is unknown, or the port is taken or not permitted; the message says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):  # the latter for impossible names
        raise OSError(f"the host {host!r} is not known here; choose an address with --host") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only if the protocol is given
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit this.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = (
            "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        )
        raise OSError(f"{_bracketed(host)}:{port} {reason}; choose another with --host and --port") from None
    return listener


def _take_all_descriptors() -> None:
    """Raise the limit of descriptors: the usual 1024 are few, and meant for programs that use select()."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Exit with success: after the server has drained, SIGTERM is the regular end."""
    sys.exit(0)
