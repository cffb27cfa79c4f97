"""`/openapi.json`: complete enough that a client can be generated from it."""

from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
async def description(client: httpx2.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get("/openapi.json")).json()
    return answer


async def test_every_operation_is_named_tagged_and_explained(description: dict[str, Any]) -> None:
    assert description["openapi"].startswith("3.1")
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) >= 8
    for operation in operations:
        assert operation["tags"]
        assert operation["summary"]
        assert operation["description"]


async def test_the_generation_is_described_whole(description: dict[str, Any]) -> None:
    operation = description["paths"]["/v1/images/generations"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert body["schema"]["required"] == ["prompt"]
    number, absent = body["schema"]["properties"]["n"]["anyOf"]
    assert (number["minimum"], number["maximum"], absent) == (1, 10, {"type": "null"})
    assert body["schema"]["properties"]["prompt"]["type"] == "string"
    assert body["examples"]
    assert set(operation["responses"]) == {
        "200", "400", "401", "404", "406", "413", "415", "500", "503", "504", "507",
    }  # fmt: skip
    for status, response in operation["responses"].items():
        schema = response["content"]["application/json"]["schema"]
        assert status == "200" or schema == {"$ref": "#/components/schemas/OpenAIError"}
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json", "image/png", "image/jpeg", "image/webp",
    }  # fmt: skip
    assert {next(iter(entry)) for entry in operation["security"]} == set(
        description["components"]["securitySchemes"]
    )


async def test_references_lead_somewhere_and_422_leaves_the_server_never(
    description: dict[str, Any],
) -> None:
    text = str(description)
    assert "HTTPValidationError" not in text
    assert all("422" not in op["responses"] for path in description["paths"].values() for op in path.values())
    for reference in _references(description):
        assert reference.removeprefix("#/components/schemas/") in description["components"]["schemas"]


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in _references(value)]
    if isinstance(node, list):
        return [found for value in node for found in _references(value)]
    return []
