"""The bodies of the contracts: what is a mistake, and where it is said to be."""

from typing import Any

import pytest

from app.api.bodies import NativeImageBody, parse_image_edit, parse_image_generation, parse_native
from app.api.mistakes import INSTEAD
from app.api.sources import Source
from app.errors import InvalidRequest


def refused(members: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_native({"prompt": "x", **members})
    return caught.value


@pytest.mark.parametrize("strength", [0, 0.0, "0"])
def test_no_prompt_is_needed_for_a_picture_that_is_kept(strength: object) -> None:
    picture = Source(b"a file")
    assert parse_native({"image": picture, "strength": strength}).prompt == ""
    assert parse_image_edit({"image": picture, "strength": strength}).prompt == ""
    with pytest.raises(InvalidRequest, match="prompt is required"):
        parse_native({"image": picture, "strength": 0.5})


@pytest.mark.parametrize(
    ("members", "pointer", "code"),
    [
        ({"prompt": None}, "/prompt", "missing_required_parameter"),
        ({"prompt": ""}, "/prompt", "invalid_value"),
        ({"n": 2}, "/n", "unsupported_parameter"),
        ({"a/b~": 2}, "/a~1b~0", "unsupported_parameter"),
        ({"a\nb": 2}, "/'a\\nb'", "unsupported_parameter"),
        ({"num_images_per_prompt": 11}, "/num_images_per_prompt", "integer_out_of_range"),
        ({"width": 99_999}, "/width", "invalid_value"),
        ({"seeds": [1, -1], "num_images_per_prompt": 2}, "/seeds", "invalid_value"),
        ({"seeds": [1, "x"]}, "/seeds/1", "invalid_type"),
        ({"seeds": [1, 2], "num_images_per_prompt": 3}, "/seeds", "invalid_value"),
        ({"seeds": [1], "seed": 1}, "/seeds", "invalid_value"),
        ({"seeds": []}, "/seeds", "invalid_value"),
        ({"seeds": 5}, "/seeds", "invalid_type"),
        ({"metadata": {"a": 1}}, "/metadata/a", "invalid_type"),
        ({"metadata": {"k" * 65: "v"}}, "/metadata/'" + "k" * 64 + "'", "invalid_value"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "/metadata", "invalid_value"),
        ({"metadata": {"a": "v" * 513}}, "/metadata/a", "invalid_value"),
        ({"previews": 4}, "/previews", "integer_out_of_range"),
        ({"priority": 11}, "/priority", "integer_out_of_range"),
        ({"deadline_seconds": 0}, "/deadline_seconds", "integer_out_of_range"),
        ({"on_disconnect": "stay"}, "/on_disconnect", "invalid_value"),
        ({"image": 5}, "/image", "invalid_image"),
        ({"image": "https://example.org/a.png"}, "/image", "unsupported_parameter"),
        ({"mask": "aGk="}, "/mask", "invalid_value"),
        ({"strength": 0.5}, "/strength", "invalid_value"),
        ({"strength": 1.5, "image": "aGk="}, "/strength", "invalid_value"),
        ({"anchor": "middle", "image": "aGk="}, "/anchor", "invalid_value"),
        ({"feather": 4}, "/feather", "invalid_value"),
        ({"image_prompts": [{"weight": 1}]}, "/image_prompts/0/image", "missing_required_parameter"),
        ({"image_prompts": ["aGk="] * 5}, "/image_prompts", "invalid_value"),
        ({"image_prompts": [{"image": "aGk=", "wait": 1}]}, "/image_prompts/0/wait", "unsupported_parameter"),
        ({"control": {"type": "depth", "image": "aGk="}}, "/control/type", "invalid_value"),
        ({"control": {"type": "canny", "image": "aGk=", "start": 1}}, "/control", "invalid_value"),
        ({"loras": [{"name": "a", "scale": 3}]}, "/loras/0/scale", "invalid_value"),
        ({"loras": [{"name": ""}]}, "/loras/0/name", "invalid_value"),
        ({"guidance_interval": [0.6, 0.2]}, "/guidance_interval", "invalid_value"),
        ({"guidance_interval": 0.6}, "/guidance_interval", "invalid_type"),
        ({"webhook": 3}, "/webhook", "invalid_type"),
        ({"webhook": {}}, "/webhook/url", "missing_required_parameter"),
        ({"webhook": "x.example"}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "ftp://x.example"}}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "//x.example"}}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "https://me:secret@x.example"}}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "https://:secret@x.example"}}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "https://me@x.example"}}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "https://x.example/" + "x" * 2100}}, "/webhook/url", "invalid_value"),
        ({"webhook": {"url": "https://x.example", "events": []}}, "/webhook/events", "invalid_value"),
        ({"webhook": {"url": "https://x.example", "events": ["end"]}}, "/webhook/events/0", "invalid_value"),
        ({"webhook": {"url": "https://x.example", "on": 1}}, "/webhook/on", "unsupported_parameter"),
    ],
)
def test_a_mistake_is_pointed_at(members: dict[str, Any], pointer: str, code: str) -> None:
    error = refused(members)
    places = error.places or [(f"/{error.param}", error.message)]
    assert (places[0][0], error.code) == (pointer, code)
    assert places[0][1] == error.message
    assert "should" not in error.message
    assert "tuple" not in error.message
    assert "validation" not in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize(
    ("member", "instead"),
    [
        ("size", ", use width and height"),
        ("n", ", use num_images_per_prompt"),
        ("negativ_prompt", ", use negative_prompt"),
        ("WIDTH", ", use width"),
        ("temperature", ""),
    ],
)
def test_a_member_of_another_interface_is_answered_with_ours(member: str, instead: str) -> None:
    assert refused({member: 1}).message == f"{member} is no member of this request{instead}"


def test_what_is_named_instead_exists() -> None:
    members = NativeImageBody.model_fields.keys()
    assert INSTEAD.keys().isdisjoint(members)
    words = {word for instead in INSTEAD.values() for word in instead.split() if word.isidentifier()}
    assert words - {"and", "the", "header"} <= members


def test_all_mistakes_are_listed_but_no_flood() -> None:
    error = refused({"width": 1, "height": 2, "priority": 99})
    assert [pointer for pointer, _ in error.places] == ["/width", "/height", "/priority"]
    assert len(refused({f"x{i}": i for i in range(150)}).places) == 20


def test_the_number_of_pictures_follows_the_seeds() -> None:
    assert parse_native({"prompt": "x"}).num_images == 1
    assert parse_native({"prompt": "x", "seeds": [4, 9, 2]}).num_images == 3
    assert parse_native({"prompt": "x", "num_images_per_prompt": 2, "seeds": [1, 2]}).num_images == 2


def test_null_is_absent_and_what_is_empty_asks_for_nothing() -> None:
    body = parse_native({"prompt": "x", "seed": None, "loras": [], "image": None, "strength": None})
    assert body.seed is None
    inside = {
        "loras": [{"name": "a", "scale": None}],
        "webhook": {"url": "https://x.example", "events": None},
    }
    for parse in (parse_native, parse_image_generation):
        given = inside if parse is parse_native else {"loras": inside["loras"]}
        assert parse({"prompt": "x", **given}).loras[0].scale == 1.0
    assert parse_image_generation({"prompt": "x", "seeds": [], "stream": "", "mask": ""}).seeds is None


def test_members_of_both_contracts_mean_the_same() -> None:
    members = {"prompt": "x", "seeds": [3], "priority": -2, "deadline_seconds": 9, "on_disconnect": "finish"}
    native, openai = parse_native(members), parse_image_generation(members)
    for name in members:
        assert getattr(native, name) == getattr(openai, name)


def test_a_stream_may_be_asked_for_in_words() -> None:
    body = parse_image_generation({"prompt": "x", "stream": "true", "partial_images": "2"})
    assert (body.stream, body.partial_images) == (True, 2)
