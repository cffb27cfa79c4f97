"""`/api/v1/jobs`: list, read, follow, cancel and delete jobs. Nobody sees the jobs of another key."""

import asyncio
import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from app.api.answers import events_path, view
from app.api.deps import Services, TheExchange, TheServices, authenticate, public_base
from app.api.description import EVENTS_CONTENT, NEEDS_KEY, problems
from app.api.job_events import JobStream, last_number
from app.api.streams import respond_with_events
from app.api.views import JobList, JobView
from app.errors import NotFound
from app.jobs.job import Job, JobStatus

NO_JOB = "there is no such job; ended ones are kept for a while only"
KEYED = [Depends(authenticate)]

router = APIRouter(prefix="/api/v1/jobs", tags=["Jobs"])


async def _job(job_id: str, services: Services, tenant: str | None) -> Job:
    job = await services.store.get(job_id, tenant)
    if job is None:
        raise NotFound(NO_JOB)
    return job


@router.get(
    "",
    operation_id="listJobs",
    summary="Your jobs",
    dependencies=KEYED,
    responses=problems(400, 401),
    openapi_extra=NEEDS_KEY,
)
async def list_jobs(
    request: Request,
    services: TheServices,
    exchange: TheExchange,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[
        str | None, Query(max_length=200, description="`next_cursor` of the page before")
    ] = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs of this status")] = None,
) -> JobList:
    """List jobs, newest first. The cursor stays valid while new jobs arrive."""
    base = public_base(request, services.settings)
    found, following = await services.store.list(exchange.tenant, limit=limit, cursor=cursor, status=status)
    return JobList(
        data=[await view(job, services, exchange, base) for job in found],
        has_more=following is not None,
        next_cursor=following,
    )


@router.get(
    "/{job_id}",
    operation_id="getJob",
    summary="One job",
    dependencies=KEYED,
    responses=problems(401, 404),
    openapi_extra=NEEDS_KEY,
)
async def get_job(job_id: str, request: Request, services: TheServices, exchange: TheExchange) -> JobView:
    """Return its state, and its pictures so far with freshly signed URLs."""
    job = await _job(job_id, services, exchange.tenant)
    return await view(job, services, exchange, public_base(request, services.settings))


@router.get(
    "/{job_id}/events",
    operation_id="getJobEvents",
    summary="The progress of a job as server-sent events",
    response_class=Response,
    responses={
        200: {"description": "The events", "content": EVENTS_CONTENT},
        204: {"description": "`Last-Event-ID` is that of the last event"},
        **problems(400, 401, 403, 404, 410),
    },
    openapi_extra=NEEDS_KEY,
)
async def get_job_events(
    job_id: str,
    request: Request,
    services: TheServices,
    exchange: TheExchange,
    exp: Annotated[str, Query(description="With `sig`, as in `urls.events`, instead of a key")] = "",
    sig: Annotated[str, Query(description="HMAC-SHA256 of path and end")] = "",
    last_event_id: Annotated[str, Header(description="Where an earlier stream ended")] = "",
) -> Response:
    """Stream events from the one after `Last-Event-ID` on. An ended job has one event, its last."""
    if sig:
        services.signer.verify(events_path(job_id), exp, sig)
        job = await _job(job_id, services, None)
    else:
        await authenticate(request, services, exchange)
        job = await _job(job_id, services, exchange.tenant)
    last = int(last_event_id) if re.fullmatch(r"[0-9]{1,9}", last_event_id) else 0
    if job.is_finished and last >= last_number(job):
        return Response(status_code=204)  # otherwise a browser would reconnect for ever
    stream = JobStream(services, exchange, public_base(request, services.settings))
    return respond_with_events(stream.events(job, last), {}, services.metrics, retry=True)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancelJob",
    summary="Stop the work on a job",
    dependencies=KEYED,
    responses=problems(401, 404),
    openapi_extra=NEEDS_KEY,
)
async def cancel_job(job_id: str, request: Request, services: TheServices, exchange: TheExchange) -> JobView:
    """Cancel: a queued job never starts, a running one stops after its step, an ended one is unchanged."""
    job = await services.dispatcher.cancel(job_id, exchange.tenant)
    if job is None:
        raise NotFound(NO_JOB)
    return await view(job, services, exchange, public_base(request, services.settings))


@router.delete(
    "/{job_id}",
    operation_id="deleteJob",
    summary="Forget an ended job and its pictures",
    dependencies=KEYED,
    status_code=204,
    responses=problems(401, 404, 409),
    openapi_extra=NEEDS_KEY,
)
async def delete_job(job_id: str, services: TheServices, exchange: TheExchange) -> Response:
    """Delete a job that has ended; cancel it first if it has not."""
    job = await _job(job_id, services, exchange.tenant)
    if job.is_finished:  # before the row is, which names them
        names = [image.name for image in job.images]
        await asyncio.get_running_loop().run_in_executor(services.storage, services.images.remove, names)
    if await services.store.delete(job_id, exchange.tenant) is None:
        raise NotFound(NO_JOB)
    return Response(status_code=204)
