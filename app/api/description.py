"""What `/openapi.json` says beyond what FastAPI reads from the routes: bodies, errors by family, keys."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.failures import OpenAIError, Problem
from app.schemas import ImageGenerationBody

Responses = dict[int | str, dict[str, Any]]

MEANINGS = {
    304: "The caller has it already",
    400: "The request is wrong; the error names the member and what is allowed",
    401: "No key, or an unknown one",
    403: "The signature is wrong",
    404: "There is no such thing",
    405: "The path takes other methods",
    406: "No form that `Accept` allows can be given",
    410: "The URL has expired",
    413: "The body is too large",
    415: "The body is not JSON",
    416: "The range lies outside the file",
    500: "The picture could not be made; asking again would not help",
    503: "The queue is full or the model is not loaded yet; see `Retry-After`",
    504: "The picture took too long",
    507: "There is no room to keep the picture",
}

SECURITY_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "Basic": {"type": "http", "scheme": "basic", "description": "The key is the password; any user name"},
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "AzureApiKey": {"type": "apiKey", "in": "header", "name": "api-key"},
}
NEEDS_KEY: dict[str, Any] = {"security": [{name: []} for name in SECURITY_SCHEMES]}

_BYTES = {"schema": {"type": "string", "format": "binary"}}
PICTURE_CONTENT = {"image/png": _BYTES, "image/jpeg": _BYTES, "image/webp": _BYTES}

_ANSWER_EXAMPLE = {
    "created": 1767607209,
    "data": [{"url": "http://127.0.0.1:8000/files/7c1f…a0.png?exp=1767610809&sig=9f02…", "seed": 7}],
    "background": "opaque",
    "output_format": "png",
    "quality": "medium",
    "size": "256x256",
    "usage": {
        "input_tokens": 9,
        "input_tokens_details": {"text_tokens": 9, "image_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 9,
    },
}
_ITEM = {
    "type": "object",
    "properties": {
        "b64_json": {"type": "string", "description": "The file in base64"},
        "url": {"type": "string", "format": "uri", "description": "Works without a key, for a while"},
        "seed": {"type": "integer", "description": "Asked for alone it gives this picture again"},
    },
    "required": ["seed"],
}
_ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "created": {"type": "integer"},
        "data": {"type": "array", "items": _ITEM},
        "background": {"type": "string"},
        "output_format": {"type": "string"},
        "quality": {"type": "string"},
        "size": {"type": "string"},
        "usage": {"type": "object"},
        "resampled_from": {
            "type": "string",
            "description": "The size drawn, when it is not the size asked for",
        },
    },
    "required": ["created", "data", "background", "output_format", "quality", "size", "usage"],
}


def openai_errors(*statuses: int) -> Responses:
    """Errors of a route in OpenAI's family, for the description."""
    return {status: {"model": OpenAIError, "description": MEANINGS[status]} for status in statuses}


def problems(*statuses: int) -> Responses:
    """Errors of a route as RFC 9457 problems, for the description."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


def _body_schema() -> dict[str, Any]:
    """The schema of a generation's body, in which every member but the prompt may be null, as if absent."""
    schema = ImageGenerationBody.model_json_schema()
    for name, member in schema["properties"].items():
        if name not in schema["required"] and "anyOf" not in member:
            texts = {key: member.pop(key) for key in ("title", "description", "default") if key in member}
            schema["properties"][name] = {"anyOf": [member, {"type": "null"}], **texts}
    return schema


GENERATION = {
    **NEEDS_KEY,
    "parameters": [
        {
            "name": "Accept",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "`image/png` (jpeg, webp) first in preference: the bytes of one picture",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _body_schema(),
                "examples": {
                    "simple": {"value": {"prompt": "a red circle on a blue background"}},
                    "complete": {
                        "value": {
                            "prompt": "a red circle on a blue background",
                            "negative_prompt": "green",
                            "n": 2,
                            "size": "512x512",
                            "seed": 7,
                            "steps": 20,
                            "guidance_scale": 4.0,
                            "response_format": "url",
                            "output_format": "webp",
                        }
                    },
                },
            }
        },
    },
}
GENERATION_RESPONSES: Responses = {
    200: {
        "description": "The pictures",
        "content": {
            "application/json": {"schema": _ANSWER_SCHEMA, "example": _ANSWER_EXAMPLE},
            **PICTURE_CONTENT,
        },
    },
    **openai_errors(400, 401, 404, 406, 413, 415, 500, 503, 504, 507),
}


def describe(app: FastAPI) -> None:
    """Make `app` describe itself with the parts of this module."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            components = schema.setdefault("components", {})
            components["securitySchemes"] = SECURITY_SCHEMES
            components.setdefault("schemas", {})["Problem"] = Problem.model_json_schema(
                ref_template="#/components/schemas/{model}"
            )
            pointer = components["schemas"]["Problem"].pop("$defs")
            components["schemas"].update(pointer)
            _remove_framework_errors(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this way of extending


def _remove_framework_errors(schema: dict[str, Any]) -> None:
    """FastAPI lists its own 422 wherever there are parameters; here no such answer leaves the server."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
