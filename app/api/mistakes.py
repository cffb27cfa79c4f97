"""Turns the mistakes in a body into one error, which names their places as the caller called them."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.api.sources import INVALID_IMAGE
from app.api.values import pointer, printable
from app.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)

MAX_PLACES = 20  # mistakes that one answer lists

CODES = {  # pydantic's type of a mistake -> our code; others are "invalid_value"
    "not_a_number": "invalid_type",
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "string_type": "invalid_type",
    "int_type": "invalid_type",
    "int_parsing": "invalid_type",
    "int_parsing_size": "integer_out_of_range",
    "int_from_float": "invalid_type",
    "float_type": "invalid_type",
    "float_parsing": "invalid_type",
    "bool_type": "invalid_type",
    "bool_parsing": "invalid_type",
    "list_type": "invalid_type",
    "dict_type": "invalid_type",
    "model_type": "invalid_type",
    "tuple_type": "invalid_type",
    INVALID_IMAGE: INVALID_IMAGE,
    "unsupported_url": "unsupported_parameter",
}

INSTEAD = {  # names in other interfaces -> the native ones
    "size": "width and height",
    "n": "num_images_per_prompt",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "steps": "prior_num_inference_steps",
    "num_inference_steps": "prior_num_inference_steps",
    "cfg": "prior_guidance_scale",
    "cfg_scale": "prior_guidance_scale",
    "guidance_scale": "prior_guidance_scale",
    "denoising_strength": "strength",
    "sampler_name": "sampler",
    "output_compression": "output_quality",
    "partial_images": "previews",
    "stream": "the header Accept: text/event-stream",
}


def validated(kind: type[Body], given: Mapping[str, Any], sent_as: Mapping[str, str]) -> Body:
    """Validate a body of this kind. Raises InvalidRequest that says what is wrong with it.

    Args:
        sent_as: the caller's names of members, where they differ from those here.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _invalid_request(error, sent_as, kind) from None


def _invalid_request(
    error: ValidationError, sent_as: Mapping[str, str], kind: type[BaseModel]
) -> InvalidRequest:
    """Return an error with the first mistake as message, under the caller's name, and all places."""
    problems = error.errors(include_url=False, include_input=False)
    places = [
        (pointer(_path(problem, sent_as)), _words(problem, _path(problem, sent_as), kind))
        for problem in problems[:MAX_PLACES]
    ]
    first = problems[0]
    code = CODES.get(first["type"], "invalid_value")
    bounds = first.get("ctx", {}).values()
    is_bounded = first["type"] in ("greater_than_equal", "less_than_equal")
    if is_bounded and all(isinstance(bound, int) for bound in bounds):
        code = "integer_out_of_range"
    param = _path(first, sent_as)[0]
    return InvalidRequest(places[0][1], param=param, code=code, places=places)


def _path(problem: ErrorDetails, sent_as: Mapping[str, str]) -> list[str]:
    """Return the names down to the mistake. One about several members names one, or else `seeds`."""
    first, *rest = problem["loc"] or (problem.get("ctx", {}).get("member", "seeds"),)
    names = [sent_as.get(str(first), str(first)), *(str(part) for part in rest if part != "[key]")]
    return [printable(name) for name in names]


def _words(problem: ErrorDetails, names: list[str], kind: type[BaseModel]) -> str:
    name = ".".join(names)
    if problem["type"] == "missing":
        return f"{name} is required"
    if problem["type"] == "extra_forbidden":
        instead = _instead(name, kind) if len(names) == 1 else None
        return f"{name} is no member of this request" + (f", use {instead}" if instead else "")
    if problem["type"].startswith("url_"):
        return f"{name} must be an http or https URL"
    if problem["type"] == "int_parsing_size":
        return f"{name} must be a smaller number"
    if problem["type"] in ("model_type", "dict_type"):
        return f"{name} must be an object"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    message = message.replace("a valid tuple", "a list")
    message = re.sub(r"^(?:String|List|Tuple|Dictionary) should", "should", message)
    message = re.sub(r" after validation, not \w+$", "", message.replace("should", "must", 1))
    if problem["type"] == "company":
        message = message.replace(problem["ctx"]["member"], names[0], 1)
    return f"{name} {message}" if problem["loc"] else message


def _instead(name: str, kind: type[BaseModel]) -> str | None:
    """Return the member that was probably meant by an unknown one, if any."""
    name = name.lower()
    close = get_close_matches(name, kind.model_fields, n=1, cutoff=0.8)
    return INSTEAD.get(name) or (close[0] if close else None)
