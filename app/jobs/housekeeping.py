"""Housekeeping: removes old jobs, the pictures made for them and given with them, and what crashes left."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

from app.errors import StorageFull
from app.jobs.store import JobStore
from app.logs import Logger
from app.settings import Settings
from app.storage.images import ImageStore
from app.storage.inputs import InputStore

ROUND_SECONDS = 60.0


async def prune_periodically(
    store: JobStore,
    images: ImageStore,
    inputs: InputStore,
    storage: Executor,
    settings: Settings,
    logger: Logger,
    clock: Callable[[], float] = time.time,
) -> None:
    """Tidy up periodically. What fails, because disk, bucket or database are away, is done later."""
    loop = asyncio.get_running_loop()

    async def sweep() -> int:
        return await loop.run_in_executor(storage, images.sweep)

    async def prune() -> int:
        names = await store.prune(clock() - settings.job_ttl)
        return await loop.run_in_executor(storage, images.remove, names)

    async def forget_inputs() -> int:
        unused = await store.unused_inputs(await loop.run_in_executor(storage, inputs.old))
        return await loop.run_in_executor(storage, inputs.remove, unused)

    while True:
        removed = 0
        for chore in (sweep, prune, forget_inputs):
            try:
                removed += await chore()
            except Exception as error:
                reason = error.reason if isinstance(error, StorageFull) else str(error)
                logger.warning("old jobs and pictures could not be removed", reason=reason)
        if removed:
            logger.info("old pictures removed", files=removed)
        await asyncio.sleep(min(ROUND_SECONDS, settings.job_ttl, settings.file_ttl))
