"""AUTOMATIC1111's routes besides generation: options, lists, progress, interrupting, settings in files.

There is one model, and clients cannot change any option: those that they set are accepted and ignored. Most
lists are empty here; where clients need an entry there is one that changes nothing.
"""

import asyncio
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from fastapi import APIRouter, Depends, Request
from PIL import Image

from app.api.a1111 import LAYER, SAMPLERS
from app.api.bodies import given_picture
from app.api.deps import Services, TheExchange, TheServices, authenticate, read_json_object, read_json_or_null
from app.api.description import NEEDS_KEY, a1111_errors, json_body
from app.api.examples import PICTURE
from app.api.generation import resolve_model
from app.api.infotext import parse_parameters
from app.api.sources import Source, content_of, invalid_picture
from app.api.views import MODEL_ID
from app.errors import InvalidRequest
from app.jobs.job import Job, JobStatus, Progress
from app.storage.encoding import EXIF_IFD, USER_COMMENT

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], dependencies=[Depends(authenticate)])

AT_ONCE = 100  # jobs read from the store per page
LONGEST_TEXT = 100_000  # characters of settings read from a picture; the rest is cut off
IDLE = Progress()

OPTIONS: dict[str, Any] = {
    "sd_model_checkpoint": MODEL_ID,
    "sd_checkpoint_hash": "",
    "sd_vae": "None",
    "samples_format": "png",
    "CLIP_stop_at_last_layers": 1,
}
MODEL: dict[str, Any] = {
    "title": MODEL_ID,
    "model_name": MODEL_ID,
    "hash": None,
    "sha256": None,
    "filename": f"{MODEL_ID}.safetensors",
    "config": None,
}
ALWAYS: dict[str, tuple[str, Any]] = {  # path -> what it lists, and the answer
    "sd-models": ("models", [MODEL]),
    "sd-vae": ("VAEs", []),
    "samplers": (
        "samplers",
        [{"name": name, "aliases": [SAMPLERS[name]], "options": {}} for name in SAMPLERS],
    ),
    "schedulers": (
        "schedulers",
        [
            {
                "name": "automatic",
                "label": "Automatic",
                "aliases": None,
                "default_rho": -1.0,
                "need_inner_model": False,
            }
        ],
    ),
    "upscalers": (
        "upscalers",
        [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}],
    ),
    "latent-upscale-modes": ("modes of upscaling", [{"name": "Latent"}]),
    "hypernetworks": ("hypernetworks", []),
    "face-restorers": ("restorers of faces", []),
    "realesrgan-models": ("Real-ESRGAN models", []),
    "prompt-styles": ("styles", []),
    "embeddings": ("embeddings", {"loaded": {}, "skipped": {}}),
    "scripts": ("scripts", {"txt2img": [], "img2img": []}),
    "script-info": ("scripts in detail", []),
    "cmd-flags": ("command line flags", {}),
    "memory": ("memory", {"ram": {}, "cuda": {}}),
}
NOTHING_TO_DO = (
    "refresh-checkpoints",
    "refresh-vae",
    "refresh-loras",
    "refresh-embeddings",
    "unload-checkpoint",
    "reload-checkpoint",
)


def _operation(verb: str, path: str) -> str:
    return f"a1111{verb}" + "".join(word.title() for word in path.split("-"))


def _add_always() -> None:
    def answering(answer: Any) -> Any:
        async def answer_always() -> Any:
            return answer

        return answer_always

    for path, (what, answer) in ALWAYS.items():
        router.add_api_route(
            f"/{path}",
            answering(answer),
            operation_id=_operation("List", path),
            summary=f"The {what}",
            description="The same at all times.",
            response_model=None,
            responses=a1111_errors(401),
            openapi_extra=NEEDS_KEY,
        )
    for path in NOTHING_TO_DO:
        router.add_api_route(
            f"/{path}",
            answering({}),
            methods=["POST"],
            operation_id=_operation("", path),
            summary="Nothing to do",
            description="The model stays loaded, and files are looked for when they are needed.",
            response_model=None,
            responses=a1111_errors(401),
            openapi_extra=NEEDS_KEY,
        )


_add_always()


@router.get(
    "/options",
    operation_id="a1111GetOptions",
    summary="The options",
    responses=a1111_errors(401),
    openapi_extra=NEEDS_KEY,
)
async def get_options() -> dict[str, Any]:
    """Return the options that clients look for."""
    return OPTIONS


@router.post(
    "/options",
    operation_id="a1111SetOptions",
    summary="Take options",
    responses=a1111_errors(400, 401, 404, 413),
    openapi_extra=json_body({"sd_model_checkpoint": {"type": "string"}}, {"sd_model_checkpoint": MODEL_ID}),
)
async def set_options(request: Request, services: TheServices) -> dict[str, Any]:
    """Change nothing. A model other than the one served is an error; all else is ignored."""
    given = await read_json_or_null(request, services) or {}
    name = given.get("sd_model_checkpoint")
    if isinstance(name, str) and name:
        resolve_model(name.partition(" [")[0].removesuffix(".safetensors"), services)
    return {}


@router.get(
    "/loras",
    operation_id="a1111ListLoRAs",
    summary="The LoRAs that are installed",
    responses=a1111_errors(401, 500, 503),
    openapi_extra=NEEDS_KEY,
)
async def list_loras(services: TheServices) -> list[dict[str, Any]]:
    """List the LoRAs; a prompt uses one as `<lora:NAME:1>`."""
    folders = services.dispatcher.model.lora_dirs
    names = await asyncio.get_running_loop().run_in_executor(services.storage, services.loras.names, folders)
    return [{"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in names]


@router.get(
    "/progress",
    operation_id="a1111GetProgress",
    summary="How far the caller's pictures are",
    responses=a1111_errors(401, 503),
    openapi_extra=NEEDS_KEY,
)
async def get_progress(services: TheServices, exchange: TheExchange) -> dict[str, Any]:
    """Report the oldest running job of this API, else the oldest waiting one, else `job_count` 0."""
    jobs = await _open_jobs(services, exchange.tenant)
    first = jobs[0] if jobs else None
    progress = IDLE if first is None else services.dispatcher.progress(first)
    eta_seconds = 0.0 if first is None else await services.dispatcher.eta_seconds(first)
    began = datetime.fromtimestamp(services.clock() if first is None else first.created_at, UTC)
    return {
        "progress": round(progress.fraction, 4),
        "eta_relative": round(eta_seconds, 3),
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": "" if first is None else first.metadata.get("task", first.id),
            "job_count": len(jobs),
            "job_timestamp": f"{began:%Y%m%d%H%M%S}",
            "job_no": 0,
            "sampling_step": progress.step,
            "sampling_steps": progress.steps,
        },
        "current_image": None,
        "textinfo": None,
    }


async def interrupt(services: TheServices, exchange: TheExchange) -> dict[str, Any]:
    """Cancel the jobs; waiting requests get the finished pictures, as from AUTOMATIC1111's server."""
    for job in await _open_jobs(services, exchange.tenant):
        await services.dispatcher.cancel(job.id, exchange.tenant)
    return {}


for name in ("interrupt", "skip"):
    router.add_api_route(
        f"/{name}",
        interrupt,
        methods=["POST"],
        operation_id=_operation("", name),
        summary="Stop the work on the caller's pictures",
        responses=a1111_errors(401, 503),
        openapi_extra=NEEDS_KEY,
    )


@router.post(
    "/png-info",
    operation_id="a1111ReadPicture",
    summary="The settings that are written into a picture",
    responses=a1111_errors(400, 401, 413, 415),
    openapi_extra=json_body({"image": {"type": "string"}}, {"image": PICTURE}),
)
async def read_picture(request: Request, services: TheServices) -> dict[str, Any]:
    """Return the text `parameters` of `image` (base64), raw and parsed."""
    members = await read_json_object(request, services)
    given = members.get("image")
    if not isinstance(given, str) or not given:
        raise InvalidRequest("image must be a picture in base64", param="image")
    source = given_picture(given, "image")
    return await asyncio.get_running_loop().run_in_executor(services.reader, _read, source)


def _read(source: Source) -> dict[str, Any]:
    """Read the settings text of a picture. Runs in the reader's thread."""
    text = _parameters(content_of(source))[:LONGEST_TEXT]
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters": parse_parameters(text)}


def _parameters(content: bytes) -> str:
    """Return the settings text of a file, without decoding its pixels."""
    try:
        with Image.open(BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as file:
            text = file.info.get("parameters")
            if isinstance(text, str):
                return text
            comment = file.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    except Exception:  # Pillow may raise anything for damaged bytes
        raise invalid_picture("image", "must be a picture in PNG, JPEG or WebP") from None
    return comment[8:].decode("utf-16-be", "replace") if comment[:8] == b"UNICODE\x00" else ""


async def _open_jobs(services: Services, tenant: str) -> list[Job]:
    """Return the caller's unfinished jobs of this layer: running before queued, each oldest first."""
    jobs: list[Job] = []
    for status in (JobStatus.QUEUED, JobStatus.RUNNING):
        cursor, is_last = None, False
        while not is_last:
            some, cursor = await services.store.list(tenant, limit=AT_ONCE, cursor=cursor, status=status)
            jobs += (job for job in some if job.metadata.get("api") == LAYER)
            is_last = cursor is None
    return jobs[::-1]
