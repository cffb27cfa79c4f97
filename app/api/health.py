"""Routes about the server itself: index, liveness, readiness, version and metrics."""

from fastapi import APIRouter, Depends, Response

from app.api.deps import TheServices, authenticate
from app.api.description import NEEDS_KEY, problems
from app.errors import Overloaded

router = APIRouter(tags=["Health"])


@router.get("/", operation_id="index", summary="What this is")
@router.head("/", include_in_schema=False)
async def index(services: TheServices) -> dict[str, str]:
    """Return name, version, model and the path of the documentation."""
    return {
        "name": "stable-cascade-server",
        "version": services.version,
        "model": services.settings.model_name,
        "docs": "/docs",
    }


@router.get("/healthz", operation_id="healthz", summary="Is the process up?")
@router.head("/healthz", include_in_schema=False)
async def healthz() -> dict[str, str]:
    """Answer 200 always: the process is up, whatever the engine does."""
    return {"status": "ok"}


@router.get(
    "/readyz", operation_id="readyz", summary="Would a request be accepted now?", responses=problems(500, 503)
)
@router.head("/readyz", include_in_schema=False)
async def readyz(services: TheServices) -> dict[str, str]:
    """Answer 200 when the model is loaded, queue and disk have room and the database answers.

    Else 503 with `Retry-After`, or 500 if the model cannot be loaded.
    """
    dispatcher = services.dispatcher
    model = dispatcher.model
    if not dispatcher.is_accepting:
        raise Overloaded(
            "no request can be accepted now", retry_after_seconds=dispatcher.retry_after_seconds()
        )
    if not dispatcher.has_room:
        error = dispatcher.room_error()
        raise Overloaded(error.message, retry_after_seconds=error.retry_after_seconds)
    return {
        "status": "ready",
        "model": services.settings.model_name,
        "device": model.device,
        "dtype": model.dtype,
    }


@router.get("/version", operation_id="version", summary="Version of server and model")
@router.head("/version", include_in_schema=False)
async def version(services: TheServices) -> dict[str, str]:
    """Return the version of this program and the checkpoint it was given."""
    return {"version": services.version, "model": services.settings.model_name}


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Figures for Prometheus",
    dependencies=[Depends(authenticate)],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(401)},
    openapi_extra=NEEDS_KEY,
)
@router.head("/metrics", dependencies=[Depends(authenticate)], include_in_schema=False)
async def metrics(services: TheServices) -> Response:
    """Return the metrics in Prometheus text format."""
    return Response(services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
