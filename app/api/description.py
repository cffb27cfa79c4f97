"""The parts of `/openapi.json` that FastAPI cannot read from the routes: bodies, errors, keys."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.api.bodies import (
    GenerationMembers,
    ImageEditBody,
    ImageGenerationBody,
    ImageVariationBody,
    NativeImageBody,
)
from app.api.examples import MASK_URI, PICTURE, PICTURE_URI
from app.api.failures import A1111Error, HuggingFaceError, OpenAIError, Problem
from app.api.forms import STRUCTURED, WITH_PICTURE
from app.api.views import JobView
from app.schemas import MAX_EDIT_PICTURES

_REFERENCE = "#/components/schemas/{model}"

Responses = dict[int | str, dict[str, Any]]

MEANINGS = {
    304: "The caller has it already",
    400: "The request is wrong; the error names the member and what is allowed",
    401: "No key, or an unknown one",
    403: "The signature is wrong",
    404: "There is no such thing",
    405: "The path takes other methods",
    406: "No form that `Accept` allows can be given",
    408: "The body came too slowly",
    409: "The job is not in a state for this",
    410: "The URL has expired",
    413: "The body is too large",
    415: "The body is neither JSON nor a form",
    416: "The range lies outside the file",
    422: "The idempotency key came before, with another request",
    429: "This key asks too often; see `Retry-After`",
    500: "The picture could not be made; asking again would not help",
    503: "The queue is full or the model is not loaded yet; see `Retry-After`",
    504: "The picture took too long",
    507: "There is no room on the disk; see `Retry-After`. A job that `X-Job-Id` names goes on when there is",
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
EVENTS_CONTENT: dict[str, Any] = {"text/event-stream": {}}  # a schema would be that of one event

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
    """Describe the errors of a route in OpenAI's format."""
    return {status: {"model": OpenAIError, "description": MEANINGS[status]} for status in statuses}


def a1111_errors(*statuses: int) -> Responses:
    """Describe the errors of a route in AUTOMATIC1111's format."""
    return {status: {"model": A1111Error, "description": MEANINGS[status]} for status in statuses}


def hugging_face_errors(*statuses: int) -> Responses:
    """Describe the errors of a route in Hugging Face's format."""
    return {status: {"model": HuggingFaceError, "description": MEANINGS[status]} for status in statuses}


def problems(*statuses: int) -> Responses:
    """Describe the errors of a route as RFC 9457 problems."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


def _body_schema(body: type[GenerationMembers]) -> dict[str, Any]:
    """Return the schema of a body; all members that are not required may also be null, as if absent."""
    schema = body.model_json_schema(ref_template=_REFERENCE)
    schema.pop("$defs", None)  # `describe` puts them among the components
    for name, member in schema["properties"].items():
        if name not in schema.get("required", ()) and "anyOf" not in member:
            texts = {key: member.pop(key) for key in ("title", "description", "default") if key in member}
            if texts.get("default") == {}:  # some client generators fail on it
                del texts["default"]
            schema["properties"][name] = {"anyOf": [member, {"type": "null"}], **texts}
    return schema


_FILE = {"type": "string", "format": "binary"}


def _form_schema(
    body: type[GenerationMembers], *, pictures: int, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return a body's schema as a form: pictures are file parts, structured members are JSON text."""
    schema = _body_schema(body)
    properties: dict[str, Any] = {name: m for name, m in schema["properties"].items() if name not in without}
    if pictures:
        about = "The picture" if pictures == 1 else "Once or several times, also as `image[]`"
        several = {"type": "array", "items": _FILE, "minItems": 1, "maxItems": pictures}
        properties["image"] = {**(_FILE if pictures == 1 else several), "description": about}
    if "mask" in properties:
        properties["mask"] = {**_FILE, "description": properties["mask"]["description"]}
    for name in STRUCTURED:
        if name in properties:
            about = f"JSON text. {properties[name].get('description', '')}".strip()
            properties[name] = {
                "type": "string",
                "contentMediaType": "application/json",
                "description": about,
            }
    for name in WITH_PICTURE:
        if name in properties:
            properties[name]["description"] += " (a file part of this name is its picture)"
    properties["params"] = {
        "type": "string",
        "contentMediaType": "application/json",
        "description": "A whole JSON object; single fields win",
    }
    return {**schema, "properties": properties}


def _header(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": description,
    }


_PREFER = _header("Prefer", "`respond-async`: 202 and the job at once. `wait=N`: 202 if it takes longer")
_KEY = _header("Idempotency-Key", "Sent again with the same body: the answer of the first time")


def _generation(
    body: type[GenerationMembers],
    accept: str,
    examples: dict[str, dict[str, Any]],
    *,
    pictures: int = 1,
    without: tuple[str, ...] = (),
    requires: tuple[str, ...] = ("prompt",),
) -> dict[str, Any]:
    """Describe the requests of a route that makes pictures.

    `pictures` is the maximum number of `image` file parts; `without` are members that do not apply there.
    """
    named = {name: {"value": example} for name, example in examples.items()}
    schema = _body_schema(body)
    schema["properties"] = {name: m for name, m in schema["properties"].items() if name not in without}
    schema["required"] = list(requires)
    form = {**_form_schema(body, pictures=pictures, without=without), "required": list(requires)}
    content = {
        "application/json": {"schema": schema, "examples": named},
        "multipart/form-data": {"schema": form},
    }
    return {
        **NEEDS_KEY,
        "parameters": [_header("Accept", accept), _PREFER, _KEY],
        "requestBody": {"required": True, "content": content},
    }


_ERRORS = (400, 401, 404, 406, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507)
_JOB = {"schema": {"$ref": "#/components/schemas/JobView"}}
_ACCEPTED = {"description": "The job, which goes on", "content": {"application/json": _JOB}}

GENERATION = _generation(
    ImageGenerationBody,
    "`image/png` (jpeg, webp) first in preference: the bytes of one picture",
    {
        "simple": {"prompt": "a red circle on a blue background"},
        "complete": {
            "prompt": "a red circle on a blue background",
            "negative_prompt": "green",
            "n": 2,
            "size": "512x512",
            "seed": 7,
            "steps": 20,
            "guidance_scale": 4.0,
            "response_format": "url",
            "output_format": "webp",
        },
        "stream": {"prompt": "a red circle", "stream": True, "partial_images": 1},
    },
)
GENERATION_RESPONSES: Responses = {
    200: {
        "description": "The pictures",
        "content": {
            "application/json": {"schema": _ANSWER_SCHEMA, "example": _ANSWER_EXAMPLE},
            **PICTURE_CONTENT,
            **EVENTS_CONTENT,
        },
    },
    202: _ACCEPTED,
    **openai_errors(*_ERRORS),
}

EDIT = _generation(
    ImageEditBody,
    "`image/png` (jpeg, webp) first in preference: the bytes of one picture",
    {
        "edit": {"image": PICTURE_URI, "prompt": "the same on a green background", "strength": 0.6},
        "inpainting": {"image": PICTURE_URI, "mask": MASK_URI, "prompt": "a blue square", "feather": 8},
        "several": {
            "images": [{"image_url": PICTURE_URI}, {"image_url": PICTURE_URI}],
            "prompt": "the first in the manner of the second",
        },
    },
    pictures=MAX_EDIT_PICTURES,
    requires=("image", "prompt"),
)
VARIATION = _generation(
    ImageVariationBody,
    "`image/png` (jpeg, webp) first in preference: the bytes of one picture",
    {"simple": {"image": PICTURE_URI, "n": 2}},
    without=("image_prompts", "mask", "strength", "feather", "anchor"),
    requires=("image",),
)

NATIVE_GENERATION = _generation(
    NativeImageBody,
    "`image/png` (jpeg, webp) first in preference: the bytes of one picture; `text/event-stream`: events",
    {
        "simple": {"prompt": "a red circle on a blue background"},
        "complete": {
            "prompt": "a green star left of a red square on a white background",
            "negative_prompt": "text, watermark",
            "width": 1024,
            "height": 1024,
            "num_images_per_prompt": 2,
            "seed": 42,
            "prior_num_inference_steps": 20,
            "prior_guidance_scale": 4.0,
            "decoder_num_inference_steps": 10,
            "output_format": "webp",
            "response_format": "url",
            "deadline_seconds": 600,
            "metadata": {"order": "A-99"},
        },
        "image-to-image": {
            "prompt": "a red star on a blue background",
            "image": PICTURE_URI,
            "strength": 0.6,
        },
        "inpainting": {
            "prompt": "a yellow star on a blue background",
            "image": PICTURE_URI,
            "mask": MASK_URI,
            "feather": 8,
        },
        "outpainting": {
            "prompt": "a red circle on a blue background",
            "image": PICTURE_URI,
            "anchor": "center",
            "width": 1024,
            "height": 512,
        },
        "image prompts": {
            "prompt": "a green star",
            "image_prompts": [{"image": PICTURE_URI, "weight": 1.0}],
        },
        "control": {
            "prompt": "a green circle on a white background",
            "control": {"type": "canny", "image": PICTURE_URI, "scale": 0.8},
        },
        "LoRA": {"prompt": "a red circle", "loras": [{"name": "night", "scale": 0.8}]},
    },
)
NATIVE_RESPONSES: Responses = {
    200: {
        "description": "The ended job, the picture or the events",
        "content": {"application/json": _JOB, **PICTURE_CONTENT, **EVENTS_CONTENT},
    },
    202: _ACCEPTED,
    **problems(*_ERRORS),
}


_LAYER_ERRORS = (400, 401, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507)
_A1111_ANSWER = {
    "type": "object",
    "properties": {
        "images": {"type": "array", "items": {"type": "string", "description": "A PNG file in base64"}},
        "parameters": {"type": "object", "description": "The request"},
        "info": {"type": "string", "contentMediaType": "application/json", "description": "JSON as a text"},
    },
    "required": ["images", "parameters", "info"],
}
A1111_RESPONSES: Responses = {
    200: {"description": "The pictures", "content": {"application/json": {"schema": _A1111_ANSWER}}},
    **a1111_errors(*_LAYER_ERRORS),
}
HF_RESPONSES: Responses = {
    200: {"description": "The picture", "content": PICTURE_CONTENT},
    **hugging_face_errors(*_LAYER_ERRORS, 406),
}


def _layer(content: dict[str, Any], *headers: dict[str, Any]) -> dict[str, Any]:
    body = {"required": True, "content": content}
    return {**NEEDS_KEY, "parameters": [*headers, _KEY], "requestBody": body}


def json_body(properties: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    """Describe the body of a route that reads a few members of an object."""
    schema = {"type": "object", "properties": properties, "additionalProperties": True}
    content = {"application/json": {"schema": schema, "examples": {"simple": {"value": example}}}}
    return {**NEEDS_KEY, "requestBody": {"content": content}}


def a1111_body(body: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Describe the requests of a route that makes pictures for AUTOMATIC1111's clients."""
    schema = body.model_json_schema(ref_template=_REFERENCE)
    return _layer({"application/json": {"schema": schema, "examples": {"simple": {"value": example}}}})


def _task(inputs: str, parameters: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            "inputs": {"type": "string", "description": inputs},
            "parameters": {
                "type": "object",
                "properties": parameters,
                "additionalProperties": True,
                "description": "Native members count, too; unknown ones are ignored",
            },
        },
        "required": ["inputs"],
    }
    return {"application/json": {"schema": schema, "examples": {"simple": {"value": example}}}}


_WHOLE, _TEXT, _FRACTION = {"type": "integer"}, {"type": "string"}, {"type": "number"}
_ACCEPT = _header("Accept", "`image/jpeg`, `image/webp`: that format, and else PNG")
_STEPS = {"num_inference_steps": _WHOLE, "guidance_scale": _FRACTION, "seed": _WHOLE}
HF_TEXT_TO_IMAGE = _layer(
    _task(
        "The prompt",
        {"negative_prompt": _TEXT, "width": _WHOLE, "height": _WHOLE, **_STEPS},
        {"inputs": "a red circle on a blue background", "parameters": {"seed": 7}},
    ),
    _ACCEPT,
)
HF_IMAGE_TO_IMAGE = _layer(
    {
        **_task(
            "The picture in base64",
            {
                "prompt": _TEXT,
                "negative_prompt": _TEXT,
                "strength": _FRACTION,
                "target_size": {"type": "object", "properties": {"width": _WHOLE, "height": _WHOLE}},
                **_STEPS,
            },
            {"inputs": PICTURE, "parameters": {"prompt": "a red star on a blue background", "strength": 0.6}},
        ),
        **PICTURE_CONTENT,
    },
    _ACCEPT,
)


def describe(app: FastAPI, *, needs_key: bool) -> None:
    """Add the parts of this module to `app`'s OpenAPI; `needs_key` tells whether keys are configured."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                webhooks=app.webhooks.routes,
                separate_input_output_schemas=False,
            )
            components = schema.setdefault("components", {})
            components["securitySchemes"] = SECURITY_SCHEMES
            schemas = components.setdefault("schemas", {})
            for model in (Problem, JobView):
                own = model.model_json_schema(mode="serialization", ref_template=_REFERENCE)
                schemas.update(own.pop("$defs", {}))
                schemas[model.__name__] = own
            schemas.update(NativeImageBody.model_json_schema(ref_template=_REFERENCE)["$defs"])
            _remove_framework_errors(schema)
            if not needs_key:
                _make_keys_optional(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this way of extending


def _make_keys_optional(schema: dict[str, Any]) -> None:
    for path in schema["paths"].values():
        for operation in path.values():
            if "security" in operation:
                operation["security"] = [{}, *operation["security"]]


def _remove_framework_errors(schema: dict[str, Any]) -> None:
    """Remove FastAPI's own 422, listed wherever there are parameters: this server never sends it."""
    for path in (*schema["paths"].values(), *schema["webhooks"].values()):
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
