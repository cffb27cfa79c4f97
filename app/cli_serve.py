"""`cascade serve`: the HTTP server in this process."""

import asyncio
import errno
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.settings import Settings

GRACE_SECONDS = 30  # for requests in work when the server is told to stop
ANSWER_SECONDS = 2  # of these, for the answers to those whose work is given up
BACKLOG = 2048  # connections that the kernel keeps for us while the event loop is starting


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
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, ...", show_default="auto")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="auto, float32 or bfloat16.", show_default="auto")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of pictures and secrets.", show_default="data"),
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
        "device": device,
        "dtype": dtype,
        "data_dir": data_dir,
        "allow_anonymous": allow_anonymous or None,
    }
    settings = load_settings(**{name: value for name, value in chosen.items() if value is not None})
    with listen(settings.host, settings.port) as listener:  # first of all: a busy port is known at once
        _run(settings, listener)


def _run(settings: "Settings", listener: socket.socket) -> None:
    """Serve on `listener` until somebody stops it; raises why the model could not be loaded."""
    import uvicorn

    from app.main import create_app

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            engine.close()
            given_up = asyncio.get_running_loop().call_later(GRACE_SECONDS - ANSWER_SECONDS, engine.abandon)
            try:
                await super().shutdown(sockets)
            finally:
                given_up.cancel()

    address, bound_port = listener.getsockname()[:2]
    settings = settings.model_copy(update={"port": bound_port})
    is_new = not settings.data_dir.exists()
    unusable: list[BaseException] = []

    def stop(error: BaseException) -> None:
        unusable.append(error)
        server.should_exit = True

    app = create_app(settings, on_unusable=stop)
    engine = app.state.services.engine
    url = f"http://{_bracketed(address)}:{bound_port}"
    app.state.services.logger.info("loading", model=settings.model_name, url=url)
    config = uvicorn.Config(
        app,
        log_config=None,  # the app logs its own requests, one JSON line each
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the app decides which proxies it believes
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config)
    signal.signal(signal.SIGTERM, _leave)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # the usual way to stop a server, which has said so itself
        sys.exit(130)
    if unusable:
        if is_new:
            _remove_unused(settings.data_dir)
        raise unusable[0]


def _remove_unused(data_dir: Path) -> None:
    """Remove a data folder that this start has made, unless something is in it by now."""
    with suppress(OSError):
        (data_dir / "files").rmdir()
        (data_dir / "secret").unlink()
        data_dir.rmdir()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the host is unknown, the port taken or not ours; the message says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):  # the latter of names that cannot be one
        raise OSError(f"the host {host!r} is not known here; choose an address with --host") from None
    family, _, _, _, address = found[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """After the server has drained, a request to terminate is a success."""
    sys.exit(0)
