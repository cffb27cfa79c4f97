"""How much room is enough, and what is told of it."""

import asyncio
import io
from pathlib import Path

import pytest

from app.errors import StorageFull
from app.jobs import disk_space
from app.jobs.disk_space import DiskSpace
from app.logs import make_logger
from app.metrics import Metrics
from app.storage.writing import Space
from tests.app.jobs.servers import until, usual_settings

pytestmark = pytest.mark.anyio

PLENTY = Space(free=2**35, total=2**40)


class Scene:
    """Space on a disk and a database whose space the test decides."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.space: Space | None = PLENTY
        self.refusal: Exception | None = None
        self.num_looks = self.num_tries = 0
        self.held_up: list[bool] = []
        self.log = io.StringIO()
        self.disk_space = DiskSpace(
            [Path("pictures")],
            try_job=self._try_job,
            on_held_up=self.held_up.append,
            metrics=Metrics(),
            logger=make_logger(usual_settings(), self.log),
        )
        patch.setattr(disk_space, "space_of", self._look)
        patch.setattr(disk_space, "LOOK_SECONDS", 0.001)

    def _look(self, _: Path) -> Space | None:
        self.num_looks += 1
        return self.space

    async def _try_job(self) -> None:
        self.num_tries += 1
        if self.refusal is not None:
            raise self.refusal

    async def look_on(self) -> None:
        """Until what is so now has been seen."""
        task = asyncio.create_task(self.disk_space.watch())
        enough = self.num_looks + 2
        await until(lambda: self.num_looks >= enough)
        task.cancel()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


@pytest.mark.parametrize(
    ("space", "is_short"),
    [
        (Space(free=disk_space.RESERVE_BYTES, total=2**40), False),
        (Space(free=disk_space.RESERVE_BYTES - 1, total=2**40), True),
        (Space(free=2**20, total=6 * 2**20), False),  # a small one, of which a twentieth is kept back
        (Space(free=2**18, total=6 * 2**20), True),
        (Space(free=0, total=2**40), True),
        (None, False),
    ],
)
async def test_how_much_is_enough(scene: Scene, space: Space | None, is_short: bool) -> None:
    scene.space = space
    await scene.look_on()
    assert scene.disk_space.is_short == is_short


async def test_who_waits_is_told_after_a_while_and_not_before(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space, "PATIENCE_SECONDS", 60)
    scene.space = Space(free=0, total=2**40)
    await scene.look_on()
    assert not any(scene.held_up)
    monkeypatch.setattr(disk_space, "PATIENCE_SECONDS", 0)
    await scene.look_on()
    assert scene.held_up[-1:] == [True]
    scene.space = PLENTY
    await scene.look_on()
    assert scene.held_up[-1:] == [False]
    assert [line.count("no room") for line in scene.log.getvalue().splitlines()] == [1, 0], "each change once"


async def test_a_database_that_refused_is_asked_until_it_takes_one(scene: Scene) -> None:
    await scene.look_on()
    assert scene.num_tries == 0
    scene.refusal = StorageFull("no")
    scene.disk_space.refused(scene.refusal)
    await scene.look_on()
    scene.refusal = ConnectionError("away, and perhaps full when it is back")
    await scene.look_on()
    assert scene.num_tries >= 2
    assert scene.disk_space.is_short
    scene.refusal = None
    await scene.look_on()
    assert not scene.disk_space.is_short


async def test_there_is_room_when_all_that_lacked_it_found_it(scene: Scene) -> None:
    for what in ("a picture", "a row"):
        scene.disk_space.lacks(what, StorageFull("no"))
    scene.disk_space.suffices("a picture")
    scene.disk_space.suffices("another")
    assert scene.disk_space.is_short
    scene.disk_space.suffices("a row")
    assert not scene.disk_space.is_short
