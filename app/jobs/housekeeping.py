"""Housekeeping: removes old jobs, the pictures made for them and given with them, and what crashes left."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

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
    encoders: Executor,
    settings: Settings,
    logger: Logger,
    clock: Callable[[], float] = time.time,
) -> None:
    """Tidy up periodically. What fails, because disk or database are away, is done in the next round."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            removed = await loop.run_in_executor(encoders, images.sweep)
            names = await store.prune(clock() - settings.job_ttl)
            removed += await loop.run_in_executor(encoders, images.remove, names)
            unused = await store.unused_inputs(await loop.run_in_executor(encoders, inputs.old))
            removed += await loop.run_in_executor(encoders, inputs.remove, unused)
            if removed:
                logger.info("old pictures removed", files=removed)
        except Exception as error:
            logger.warning("old jobs and pictures could not be removed", reason=str(error))
        await asyncio.sleep(min(ROUND_SECONDS, settings.job_ttl, settings.file_ttl))
