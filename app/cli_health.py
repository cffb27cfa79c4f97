"""`cascade health`: asks a server on this machine how it is, for container health checks and scripts."""

import http.client
from typing import Annotated

import typer

TIMEOUT_SECONDS = 5.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # wildcards -> loopback


def health(
    host: Annotated[str | None, typer.Option(help="Of the server.", show_default="CASCADE_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Of the server.", show_default="CASCADE_PORT")] = None,
    ready: Annotated[
        bool, typer.Option("--ready", help="Ask whether a request would be accepted now, not only for life.")
    ] = False,
) -> None:
    """Ask a running server how it is. Exit status 0: well; 1: not, or nobody there.

    A server whose queue is full lives but is not ready: restart on the first, send work by the second.

    \b
    Examples:
      cascade health
      cascade health --ready --port 9000
    """
    from app.settings import load_settings

    settings = load_settings()
    address = host or settings.host
    path = "/readyz" if ready else "/healthz"
    status, answer = _ask(EVERYWHERE.get(address, address), settings.port if port is None else port, path)
    typer.echo(answer)
    raise typer.Exit(0 if status == 200 else 1)


def _ask(host: str, port: int, path: str) -> tuple[int, str]:
    """Return the status (0 without an answer), and a line to print about it."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        words = response.read(1000).decode(errors="replace").splitlines()
        return response.status, f"{response.status} {words[0] if words else ''}".strip()
    except (OSError, http.client.HTTPException) as error:
        return 0, f"no answer from {host}:{port}: {error}"
    finally:
        connection.close()
