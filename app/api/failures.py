"""Errors as answers. The path chooses the format, since clients of a contract read no other."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from app.errors import AppError, InvalidRequest, MethodNotAllowed, ModelLoading, NotFound, PayloadTooLarge

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")


class OpenAIErrorMembers(BaseModel):
    """The members of an OpenAI error; all four are always present."""

    message: str = Field(description="What was wrong and what is allowed, in one sentence")
    type: str
    param: str | None = Field(description="The member at fault")
    code: str | None


class OpenAIError(BaseModel):
    """An error in OpenAI's format."""

    error: OpenAIErrorMembers


class ProblemPointer(BaseModel):
    """One member at fault."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """An error in the format of RFC 9457 (`application/problem+json`)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[ProblemPointer] = []


class A1111Error(BaseModel):
    """An error in the format of AUTOMATIC1111's server."""

    error: str
    detail: str = Field(description="What was wrong and what is allowed, in one sentence")
    body: str
    errors: str


class HuggingFaceError(BaseModel):
    """An error in the format of Hugging Face's inference servers."""

    error: str = Field(description="What was wrong and what is allowed, in one sentence")
    estimated_time: float | None = Field(
        None, exclude_if=lambda seconds: seconds is None, description="Seconds until the model is loaded"
    )


def openai_error(error: AppError) -> dict[str, Any]:
    """Return the body for `error` in OpenAI's format."""
    members = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": members}


def respond(error: AppError, path: str, request_id: str) -> Response:
    """Return the answer for `error` in the format of `path`."""
    family = _FAMILIES.get(path.split("/")[1] if path.startswith("/") else "")
    if family is not None:
        return family(error)
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "instance": path,
        "code": error.code,
        "request_id": request_id,
    }
    places = error.places or ([(f"/{error.param}", error.message)] if error.param else [])
    if places:
        problem["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in places]
    return JSONResponse(problem, error.status, error.headers, media_type="application/problem+json")


def _openai(error: AppError) -> Response:
    return JSONResponse(openai_error(error), error.status, error.headers)


def _a1111(error: AppError) -> Response:
    """Answer in A1111's format; a 401 also offers Basic, since its clients send keys as passwords."""
    told = A1111Error(error="HTTPException", detail=error.message, body="", errors=error.message)
    headers = dict(error.headers)
    if error.status == 401:
        headers["WWW-Authenticate"] += ', Basic realm="images"'
    return JSONResponse(told.model_dump(), error.status, headers)


def _hugging_face(error: AppError) -> Response:
    told = HuggingFaceError(error=error.message)
    if isinstance(error, ModelLoading):
        told.estimated_time = float(error.headers["Retry-After"])
    return JSONResponse(told.model_dump(), error.status, error.headers)


# By the first part of the path; for other paths errors are RFC 9457 problems.
_FAMILIES: Mapping[str, Callable[[AppError], Response]] = MappingProxyType(
    {"v1": _openai, "sdapi": _a1111, "hf": _hugging_face}
)


def install_handlers(app: FastAPI) -> None:
    """Answer every error of a route in its format; the gateway catches exceptions not listed here."""

    async def handle(request: Request, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, HTTPException) and error.status_code == 404:
            path = _meant(request) or path
        return respond(as_app_error(error, request), path, request.state.exchange.request_id)

    for kind in (AppError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)


def allowed_methods(server: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of all routes at the path of `scope`, and OPTIONS."""
    methods = {"OPTIONS"}
    for route in iter_route_contexts(server.router.routes):
        match, _ = route.matches({**scope, "method": "GET"})
        if match is not Match.NONE:
            methods |= route.methods or set()
    return [method for method in METHODS if method in methods]


def _meant(request: Request) -> str | None:
    """Return the path with `/v1` in front if there is such a route: OpenAI clients' base URLs may lack it."""
    path = f"/v1{request.url.path}"
    scope = {**request.scope, "path": path}
    is_there = any(
        route.matches(scope)[0] is Match.FULL for route in iter_route_contexts(request.app.router.routes)
    )
    return path if is_there else None


def as_app_error(error: Exception, request: Request) -> AppError:
    """Convert an error of the framework to an AppError."""
    if isinstance(error, AppError):
        return error
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        name = str(problem["loc"][-1])
        return InvalidRequest(f"{name} {problem['msg'].replace('Input should', 'must')}", param=name)
    assert isinstance(error, HTTPException), "handlers are installed for three kinds of errors"
    method, path = request.method, request.url.path
    if error.status_code == 404:
        hint = f"; did you mean {meant}?" if (meant := _meant(request)) else ""
        return NotFound(f"there is nothing at {path}{hint}", code="unknown_url")
    if error.status_code == 405:
        allowed = ", ".join(allowed_methods(request.app, request.scope))
        return MethodNotAllowed(f"{path} takes {allowed}, not {method}", headers={"Allow": allowed})
    if error.status_code == 413:
        return PayloadTooLarge("the body is too large")
    return InvalidRequest(str(error.detail))
