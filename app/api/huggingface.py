"""Hugging Face's task contract, `/hf/text-to-image` and `/hf/image-to-image`: the answer is the picture.

Its clients post to the URL that they are given and add nothing, so each task has a URL of its own.
"""

from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from app.api.accept import raw_format
from app.api.answers import ignored_params, picture_headers, raw_picture, replayed
from app.api.bodies import ALIASES, given_picture
from app.api.deps import (
    Services,
    TheExchange,
    TheServices,
    authenticate,
    count_request,
    parse_object,
    read_body,
    read_json_object,
)
from app.api.description import HF_IMAGE_TO_IMAGE, HF_RESPONSES, HF_TEXT_TO_IMAGE
from app.api.gateway import Exchange
from app.api.generation import require_success
from app.api.layers import Asked, LayerBody, draw, in_native_members
from app.api.sources import Source
from app.errors import InvalidRequest

router = APIRouter(
    prefix="/hf", tags=["Hugging Face"], dependencies=[Depends(authenticate), Depends(count_request)]
)

RENAMED = ("num_inference_steps", "guidance_scale")  # as OpenAI's layer does
KNOWN = (*RENAMED, "target_size")
NOT_HERE = ("image", "num_images", "seeds")  # native members that do not apply, or that `inputs` replaces


@router.post(
    "/text-to-image",
    operation_id="textToImage",
    summary="Make a picture from a prompt",
    response_class=Response,
    responses=HF_RESPONSES,
    openapi_extra=HF_TEXT_TO_IMAGE,
)
async def text_to_image(request: Request, services: TheServices, exchange: TheExchange) -> Response:
    """Draw the prompt in `inputs`. `parameters` may have native members, too; unknown ones are ignored."""
    members = await read_json_object(request, services)
    body = _body({"prompt": members.get("inputs")}, _parameters(members), {"prompt": "inputs"})
    return await _respond(request, services, exchange, members, body)


@router.post(
    "/image-to-image",
    operation_id="imageToImage",
    summary="Make a picture from a picture",
    response_class=Response,
    responses=HF_RESPONSES,
    openapi_extra=HF_IMAGE_TO_IMAGE,
)
async def image_to_image(request: Request, services: TheServices, exchange: TheExchange) -> Response:
    """Redraw a picture, which is `inputs` in base64, or the body itself.

    With a prompt the picture is redrawn to match it, more freely with a higher `strength`; without one the
    answer is a variation of what the picture shows.
    """
    members = await _members(request, services)
    parameters = _parameters(members)
    if members.get("inputs") is None:
        message = "inputs is required: a picture in base64"
        raise InvalidRequest(message, param="inputs", code="missing_required_parameter")
    picture = given_picture(members["inputs"], "inputs")
    parameters = {**_target_size(parameters), **parameters}
    if parameters.get("prompt"):
        body = _body({"image": picture}, parameters, {"image": "inputs"})
    else:
        given = {"prompt": "", "strength": None, "image_prompts": [{"image": picture}]}
        body = _body(given, parameters, {"image_prompts": "inputs"})
    return await _respond(request, services, exchange, members, body)


async def _members(request: Request, services: Services) -> dict[str, Any]:
    """Read JSON or a picture, told apart by the first byte: clients send a wrong type, or none."""
    content = await read_body(request, services, services.settings.max_body_bytes)
    if content.removeprefix(BOM_UTF8).lstrip()[:1] == b"{":
        return await parse_object(content, services)
    return {"inputs": Source(content, place="inputs")} if content else {}


def _parameters(members: Mapping[str, Any]) -> dict[str, Any]:
    parameters = members.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest("parameters must be an object", param="parameters", code="invalid_type")
    return {name: value for name, value in parameters.items() if name not in NOT_HERE and value is not None}


def _target_size(parameters: Mapping[str, Any]) -> dict[str, Any]:
    size = parameters.get("target_size", {})
    if not isinstance(size, Mapping):
        message = "target_size must be an object with width and height"
        raise InvalidRequest(message, param="target_size", code="invalid_type")
    return {name: size.get(name) for name in ("width", "height")}


def _body(given: Mapping[str, Any], parameters: Mapping[str, Any], sent_as: Mapping[str, str]) -> LayerBody:
    """Return the native members of a task. `given` wins over `parameters` of the same name."""
    named, names = {**parameters, **given}, dict(sent_as)
    for alias in RENAMED:
        if named.get(ALIASES[alias]) is None and named.get(alias) is not None:
            named[ALIASES[alias]] = named[alias]
            names[ALIASES[alias]] = alias
    return in_native_members(named, names)


async def _respond(
    request: Request, services: Services, exchange: Exchange, members: Mapping[str, Any], body: LayerBody
) -> Response:
    accepted = raw_format(request.headers.get("accept", ""), body.output_format)
    asked = Asked(members, body, accepted or body.output_format)
    drawn = await draw(request, services, exchange, asked)
    require_success(drawn.job)
    ignored = _parameters(members).keys() - LayerBody.model_fields.keys() - set(KNOWN)
    headers = picture_headers(drawn.job) | replayed(drawn.is_replay) | ignored_params(ignored)
    return await raw_picture(services, drawn.job, headers)
