"""Fault points: what they do, that each is somewhere, and that no write goes without."""

import ast
import inspect
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Row, select

from app.errors import SettingsError
from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS, POINTS, Faults, InjectedFault, Point
from app.jobs.job import Job, JobStatus, Webhook
from app.jobs.outbox import Delivery
from app.jobs.store import JobStore
from app.jobs.tables import metadata
from tests.app.jobs.stores import LEASE_SECONDS, MANY, Clock, add, add_running, empty, new_image, new_job

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "app").rglob("*.py"))


def test_a_point_acts_at_its_passage_alone() -> None:
    faults = Faults(["after_commit:raise@2"])
    faults.hit("after_commit")
    faults.hit("before_commit")
    with pytest.raises(InjectedFault, match="after_commit, passage 2"):
        faults.hit("after_commit")
    faults.hit("after_commit")
    NO_FAULTS.hit("after_commit")


def test_a_killed_process_does_not_clean_up() -> None:
    hit = "Faults(['after_claim:kill@1']).hit('after_claim')"
    program = f"from app.jobs.faults import Faults\ntry: {hit}\nfinally: print('cleaning up')"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nowhere:kill@1",
        "after_commit",
        "after_commit:kill",
        "after_commit:burn@1",
        "after_commit:kill@0",
        "after_commit:kill@x",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        Faults([text])


def calls_in(path: Path, *words: str) -> list[ast.Call]:
    """All calls in a file, if one of the words is anywhere in it: most have none, and to parse takes long."""
    source = path.read_text()
    nodes = ast.walk(ast.parse(source)) if any(word in source for word in words) else ()
    return [node for node in nodes if isinstance(node, ast.Call)]


def hits(path: Path) -> list[str]:
    calls = calls_in(path, ".hit(")
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "hit"]
    return [
        str(argument.value) for call in named for argument in call.args if isinstance(argument, ast.Constant)
    ]


def test_every_point_is_somewhere_once() -> None:
    assert sorted(point for path in SOURCES for point in hits(path)) == sorted(POINTS)


def test_only_the_database_opens_transactions() -> None:
    """So every write passes the two points of `Database.write`: readers cannot write."""
    openers = {"create_engine", "create_async_engine", "begin", "begin_nested", "commit"}
    found = {
        path.name
        for path in SOURCES
        if path.parent.name == "jobs"
        for call in calls_in(path, *(f"{opener}(" for opener in openers))
        if ast.unparse(call.func).rsplit(".", 1)[-1] in openers
    }
    assert found == {"database.py"}


# What a test of interruptions need not interrupt.
READS = {
    "require_room",
    "has_due_deliveries",
    "get",
    "list",
    "counts",
    "position",
    "load_latents",
    "has_input",
    "unused_inputs",
    "try_to_submit",  # which leaves nothing
}
LIFE = {"open", "close"}

HOOK = Webhook("https://one.example", (JobStatus.CANCELED,), "https://server.example")
TOLD = Delivery(new_job(id="job_told"), JobStatus.CANCELED, 0)

# Each with a queued and a running job, so that it has something to write.
WRITES: dict[str, Callable[[JobStore, Job, Job], Awaitable[object]]] = {
    "submit": lambda store, _, __: store.submit(new_job(), max_queue=MANY),
    "request_cancel": lambda store, queued, _: store.request_cancel(queued.id, None),
    "delete": lambda store, _, __: store.delete("job_ended", None),
    "claim": lambda store, _, __: store.claim("one", limit=1, lease_seconds=LEASE_SECONDS),
    "renew": lambda store, _, __: store.renew("one", 2 * LEASE_SECONDS),
    "save_latents": lambda store, _, running: store.save_latents(running, 0, b"latents"),
    "save_image": lambda store, _, running: store.save_image(running, new_image()),
    "move": lambda store, _, running: store.move(running, running.released()),
    "release": lambda store, _, __: store.release("one"),
    "expire": lambda store, queued, _: store.expire(queued.deadline_at or 0.0),
    "prune": lambda store, _, __: store.prune(LATER),
    "claim_deliveries": lambda store, _, __: store.claim_deliveries(limit=1, hold_seconds=30),
    "settle_delivery": lambda store, _, __: store.settle_delivery(TOLD, again_after=1.0),
}
LATER = 2e9


class Armed(Faults):
    """Breaks the first passage of a point after it was armed."""

    def __init__(self) -> None:
        super().__init__()
        self.point: Point | None = None

    def hit(self, point: Point) -> None:
        if point == self.point:
            self.point = None
            raise InjectedFault(point)


def test_every_method_of_the_store_is_known_here() -> None:
    methods = {name for name, _ in inspect.getmembers(JobStore, callable) if not name.startswith("_")}
    assert methods == READS | LIFE | WRITES.keys()


@pytest.mark.anyio
async def test_a_write_that_is_interrupted_happened_if_it_was_committed(
    store: JobStore, clock: Clock
) -> None:
    faults = Armed()
    database = Database(store._database._reader, store._database._writer, faults)
    store = JobStore(database, clock.wall, clock.steady, faults)
    points: tuple[Point, ...] = ("before_commit", "after_commit")
    for (name, write), point in product(WRITES.items(), points):
        ended, queued = new_job(id="job_ended"), new_job(deadline_at=clock.now + 100)
        told = replace(TOLD.job, webhook=HOOK)
        for job in (ended, told):
            await add(store, job)
            await store.move(job, job.canceled(clock.now))
        running = await add_running(store)
        await add(store, queued)
        before = await database.read(contents)
        faults.point = point
        with pytest.raises(InjectedFault):
            await write(store, queued, running)
        assert (await database.read(contents) == before) == (point == "before_commit"), (name, point)
        await database.write(empty)


def contents(connection: Connection) -> list[Sequence[Row[Any]]]:
    """All rows there are."""
    queries = [select(table).order_by(*table.primary_key) for table in metadata.sorted_tables]
    return [connection.execute(query).all() for query in queries]
