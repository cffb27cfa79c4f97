"""The database of the jobs, SQLite in a file or PostgreSQL, each set up so that commits are durable.

A transaction is a function of a connection, the same one for both. For SQLite it runs in a thread: in the
only one that writes, so that writers queue here and not for its lock, or in one of a few that read beside it.
A caller that is canceled meanwhile cannot leave it half done. For PostgreSQL it runs on asyncpg.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.errors import SettingsError, StorageFull
from app.jobs.faults import Faults
from app.jobs.migrations import migrate
from app.storage.writing import space_of

BUSY_SECONDS = 30  # to wait for SQLite's lock: other servers or the operator's tools may use the file
LOCKED_PAUSE = 0.01
START_BYTES = 2**18  # of free space; with less, SQLite may fail to open even an existing database
CONNECT_SECONDS = 10
NUM_READERS = 2  # of SQLite
NUM_CONNECTIONS = 8  # to PostgreSQL
ANSWER_SECONDS = 30  # a connection that is silent for so long is broken
QUEUE_LOCK, SCHEMA_LOCK = 0x63617363_01, 0x63617363_02  # advisory locks; any two numbers would do

_HAS_WRITTEN = "has_written"  # in Connection.info: whether the transaction did; else it hits no fault point

T = TypeVar("T")
P = ParamSpec("P")


class DatabaseAway(ConnectionError):
    """The database does not answer, or not now."""


class Access(Protocol):
    """A way to run transactions."""

    async def run(self, transaction: Callable[[Connection], T]) -> T:
        """Run `transaction` and commit it, or roll it back if it raises."""

    async def close(self) -> None:
        """Close all connections."""


class Database:
    """Runs transactions. One object per process and database."""

    def __init__(self, reader: Access, writer: Access, faults: Faults) -> None:
        self._reader = reader
        self._writer = writer
        self._faults = faults

    @classmethod
    async def open(cls, url: str, faults: Faults) -> Self:
        """Connect and bring the schema up to date. Raises SettingsError when that is not possible."""
        target = _parse(url)
        is_sqlite = target.get_backend_name() == "sqlite"
        database = cls(*(_open_sqlite(target) if is_sqlite else _open_postgresql(target)), faults)
        try:
            if is_sqlite:
                await asyncio.to_thread(_make_file, target)
            await database._writer.run(_prepare)
        except (DBAPIError, OSError, CommandError) as error:
            await database.close()
            reason: object = error.orig if isinstance(error, DBAPIError) else error
            if is_sqlite and _lacks_space(target):  # SQLite only says "disk I/O error" for some files
                reason = f"there is no space left in {_path(target).parent} ({reason})"
            raise SettingsError(f"the database {target!r} cannot be used: {reason}") from error
        return database

    async def close(self) -> None:
        """Close all connections, after the transactions under way."""
        await self._reader.close()
        await self._writer.close()

    async def read(
        self, body: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what `body` reads, all from one snapshot."""
        with _known_errors():
            return await self._reader.run(lambda connection: body(connection, *args, **kwargs))

    async def write(
        self, body: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `body` as a transaction, whole or not at all. Raises StorageFull if there is no room.

        After DatabaseAway it may have been committed all the same: only the answer may have been lost.
        """

        def transaction(connection: Connection) -> tuple[T, bool]:
            connection.info[_HAS_WRITTEN] = False
            result = body(connection, *args, **kwargs)
            if has_written := connection.info[_HAS_WRITTEN]:
                self._faults.hit("before_commit")
            return result, has_written

        with _known_errors():
            result, has_written = await self._writer.run(transaction)
        if has_written:
            self._faults.hit("after_commit")
        return result


@contextmanager
def _known_errors() -> Iterator[None]:
    """Turn drivers' errors into StorageFull for a full disk and DatabaseAway for a database that is away."""
    try:
        yield
    except DBAPIError as error:
        if _is_full(error):
            message = "there is no room in the database of the jobs; the operator has to make some"
            raise StorageFull(message) from error
        if error.connection_invalidated or isinstance(error, OperationalError | InterfaceError):
            raise DatabaseAway(f"the database does not answer: {error.orig}") from error
        raise
    except (OSError, PoolTimeout) as error:  # there was no connection to begin with
        raise DatabaseAway(f"the database does not answer: {error}") from error


def lock_queue(connection: Connection) -> None:
    """Keep all other transactions that call this waiting, on any server, until this one ends."""
    if connection.dialect.name == "postgresql":  # SQLite lets one write at a time anyway
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({QUEUE_LOCK})")


class _Threads:
    """Transactions of SQLite, in as many threads as connections."""

    def __init__(self, engine: Engine, num_threads: int) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="database")

    async def run(self, transaction: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, transaction)

    def _run(self, transaction: Callable[[Connection], T]) -> T:
        with self._engine.begin() as connection:
            return transaction(connection)

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        self._engine.dispose()


class _Loop:
    """Transactions of PostgreSQL, in the event loop, where each waits for its own answers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def run(self, transaction: Callable[[Connection], T]) -> T:
        async with self._engine.begin() as connection:
            return await connection.run_sync(transaction)

    async def close(self) -> None:
        await self._engine.dispose()


def _parse(url: str) -> URL:
    try:
        target = make_url(url)
    except ArgumentError:
        raise SettingsError(
            "the URL of a database must be like postgresql+asyncpg://USER@HOST/NAME"
        ) from None
    match target.get_backend_name():
        case "postgresql":
            return target.set(drivername="postgresql+asyncpg")
        case "sqlite" if target.database not in (None, "", ":memory:"):
            return target.set(drivername="sqlite")
        case _:
            raise SettingsError(f"jobs are kept in PostgreSQL or in a file of SQLite, not in {target!r}")


def _open_sqlite(target: URL) -> tuple[Access, Access]:
    readers = _sqlite_engine(target, NUM_READERS, begin="DEFERRED", query_only="ON")
    writer = _sqlite_engine(target, 1, begin="IMMEDIATE", query_only="OFF")
    _note_writing(writer)
    return _Threads(readers, NUM_READERS), _Threads(writer, 1)


def _sqlite_engine(target: URL, num_connections: int, *, begin: str, query_only: str) -> Engine:
    pragmas = {
        "synchronous": "FULL",  # what is committed is on the disk
        "foreign_keys": "ON",
        "query_only": query_only,
    }
    engine = create_engine(
        target,
        poolclass=QueuePool,
        pool_size=num_connections,
        max_overflow=0,
        hide_parameters=True,  # an error is logged, and they may include a prompt
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # sqlite3 itself would begin late, and deferred
        _write_ahead(connection)
        for name, value in pragmas.items():
            connection.execute(f"PRAGMA {name} = {value}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {begin}")

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Use a write-ahead log, and wait for locks. If others are just opening the same new file, SQLite
    refuses at once to change the journal, without regard to its time-out, so this tries again."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            is_locked = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_locked or time.monotonic() > deadline:
                raise
        time.sleep(LOCKED_PAUSE)


def _open_postgresql(target: URL) -> tuple[Access, Access]:
    engine = create_async_engine(
        target,
        pool_size=NUM_CONNECTIONS,
        max_overflow=0,
        pool_pre_ping=True,  # survives a restart of the database
        hide_parameters=True,
        connect_args={"timeout": CONNECT_SECONDS, "command_timeout": ANSWER_SECONDS},
    )
    _note_writing(engine.sync_engine)
    snapshots = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return _Loop(snapshots), _Loop(engine)


def _note_writing(engine: Engine) -> None:
    @event.listens_for(engine, "after_cursor_execute")
    def note(connection: Connection, cursor: Any, _: str, __: Any, context: Any, ___: bool) -> None:
        if (context.isinsert or context.isupdate or context.isdelete) and cursor.rowcount != 0:
            connection.info[_HAS_WRITTEN] = True


def _path(target: URL) -> Path:
    return Path(target.database or "")


def _lacks_space(target: URL) -> bool:
    space = space_of(_path(target).parent)
    return space is not None and space.free < START_BYTES


def _make_file(target: URL) -> None:
    """Create the file so that only its owner can read the prompts in it."""
    path = _path(target)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)


def _prepare(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})")
    migrate(connection)


def _is_full(error: DBAPIError) -> bool:
    full = {"SQLITE_FULL", "53100"}  # 53100: disk_full of PostgreSQL
    return bool({getattr(error.orig, "sqlite_errorname", None), getattr(error.orig, "sqlstate", None)} & full)
