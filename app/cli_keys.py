"""`cascade keys`: the file of those who may call a server."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

keys = typer.Typer(
    name="keys",
    help="Add, list and revoke the API keys in a file, of which a running server takes note.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SHOWN_DIGITS = 12  # of a digest, which identify a key
LEAST_DIGITS = 6


def _check_name(name: str) -> str:
    from app.api_keys import check_name

    try:
        return check_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


File = Annotated[Path, typer.Argument(metavar="FILE", help="File of the keys.", show_default=False)]


@keys.command("add")
def add(
    file: File,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            callback=_check_name,
            help="Whose key it is. Keys of one name see the same jobs.",
        ),
    ],
    days: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=36_500, help="Days until it expires.", show_default="never"),
    ] = None,
    rate_limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Requests for pictures in a minute.", show_default="the server's"
        ),
    ] = None,
) -> None:
    """Make a key and print it.

    It is shown this once: the file has only its digest. A file that does not exist is made. To replace a key,
    add one of the same name, change its users over, and revoke the old one by the digits that list shows.

    \b
    Examples:
      cascade keys add keys.json web
      cascade keys add keys.json guest --days 30 --rate-limit 10
    """
    import hashlib

    from app.api_keys import KeyEntry, changing, new_key, read_entries, write_entries

    key = new_key()
    expires = None if days is None else (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
    digest = hashlib.sha256(key.encode()).hexdigest()
    entry = KeyEntry(name=name, sha256=digest, expires=expires, rate_limit=rate_limit)
    with changing(file) as path:
        write_entries(path, [*(read_entries(path) if path.exists() else []), entry])
    typer.echo(key)


@keys.command("list")
def show(file: File) -> None:
    """Show the keys of a file.

    They are told apart by the first digits of their digests.
    """
    from app.api_keys import read_entries

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "sha256", "expires", "rate limit"):
        table.add_column(title)
    for entry in read_entries(file):
        is_over = entry.expires is not None and entry.expires <= datetime.now(UTC)
        ends = "never" if entry.expires is None else f"{entry.expires:%Y-%m-%d %H:%M %Z}"
        table.add_row(
            entry.name,
            entry.sha256[:SHOWN_DIGITS],
            f"{ends} (expired)" if is_over else ends,
            "" if entry.rate_limit is None else str(entry.rate_limit),
        )
    Console(highlight=False).print(table)


@keys.command("revoke")
def revoke(
    file: File,
    which: Annotated[
        str, typer.Argument(metavar="WHICH", help="A name, for all its keys, or first digits of a sha256.")
    ],
) -> None:
    """Remove keys. A server that runs refuses them within seconds.

    \b
    Examples:
      cascade keys revoke keys.json guest
      cascade keys revoke keys.json 5e884898da28
    """
    from app.api_keys import changing, read_entries, write_entries
    from app.errors import SettingsError

    with changing(file) as path:
        entries = read_entries(path)
        revoked = [entry for entry in entries if entry.name == which]
        if not revoked and len(which) >= LEAST_DIGITS:
            revoked = [entry for entry in entries if entry.sha256.lower().startswith(which.lower())]
        if not revoked:
            raise SettingsError(f"{file}: there is no key of {which}")
        write_entries(path, [entry for entry in entries if entry not in revoked])
    for entry in revoked:
        typer.echo(f"revoked {entry.name} {entry.sha256[:SHOWN_DIGITS]}")
