"""`/openapi.json`: complete enough that a client can be generated from it."""

import re
from typing import Any

import httpx2
import pytest

from tests.app.conftest import Serve

pytestmark = pytest.mark.anyio

STATUSES = {
    *("200", "202", "400", "401", "404", "406", "408", "409"),
    *("413", "415", "422", "429", "500", "503", "504", "507"),
}
FORMS = {"application/json", "image/png", "image/jpeg", "image/webp", "text/event-stream"}
JOB = {"$ref": "#/components/schemas/JobView"}


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
    assert set(operation["responses"]) == STATUSES
    for status, response in operation["responses"].items():
        schema = response["content"]["application/json"]["schema"]
        assert status[0] == "2" or schema == {"$ref": "#/components/schemas/OpenAIError"}
    assert set(operation["responses"]["200"]["content"]) == FORMS
    assert operation["responses"]["202"]["content"]["application/json"]["schema"] == JOB
    schemes = description["components"]["securitySchemes"]
    assert operation["security"] == [{}, *({name: []} for name in schemes)]


async def test_keys_are_needed_where_there_are_any(serve: Serve) -> None:
    async with serve(api_keys="k") as client:
        description = (await client.get("/openapi.json")).json()
    schemes = description["components"]["securitySchemes"]
    operation = description["paths"]["/v1/images/generations"]["post"]
    assert operation["security"] == [{name: []} for name in schemes]


async def test_webhooks_are_described_as_they_are_sent(description: dict[str, Any]) -> None:
    operation = description["webhooks"]["image.job"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/WebhookMessage"}
    assert {header["name"] for header in operation["parameters"]} == {
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    }
    given = description["paths"]["/api/v1/images"]["post"]["requestBody"]["content"]["application/json"]
    whole, bare, absent = given["schema"]["properties"]["webhook"]["anyOf"]
    assert whole == {"$ref": "#/components/schemas/WebhookBody"}
    assert (bare["format"], absent) == ("uri", {"type": "null"})


async def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    found = set(re.findall(r"#/components/schemas/([^'\"]+)", str(description)))
    assert found <= description["components"]["schemas"].keys()
    assert "WebhookMessage" in found


async def test_a_job_has_one_schema(description: dict[str, Any]) -> None:
    """Generators of clients make nothing of two with one title."""
    schemas = description["components"]["schemas"]
    assert [name for name in schemas if "Input" in name or "Output" in name] == []
    assert schemas["JobView"]["properties"]["created_at"]["format"] == "date-time"


async def test_no_default_is_an_object(description: dict[str, Any]) -> None:
    """Generators of clients leave out a body that has one."""
    for path in ("/api/v1/images", "/v1/images/generations"):
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert {} not in [member.get("default") for member in body["schema"]["properties"].values()]


async def test_the_native_contract_is_described_whole(description: dict[str, Any]) -> None:
    operation = description["paths"]["/api/v1/images"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert set(operation["responses"]) == STATUSES
    for status, response in operation["responses"].items():
        assert status[0] == "2" or set(response["content"]) == {"application/problem+json"}
    assert set(operation["responses"]["200"]["content"]) == FORMS
    assert {parameter["name"] for parameter in operation["parameters"]} == {
        "Accept", "Prefer", "Idempotency-Key",
    }  # fmt: skip
    job = description["components"]["schemas"]["JobView"]
    assert set(job["required"]) >= {"id", "status", "progress", "images", "urls"}


async def test_references_lead_somewhere_and_422_means_one_thing(
    description: dict[str, Any],
) -> None:
    text = str(description)
    assert "HTTPValidationError" not in text
    reused = [
        name
        for name, path in description["paths"].items()
        if any("422" in op["responses"] for op in path.values())
    ]
    assert sorted(reused) == [
        "/api/v1/images", "/hf/image-to-image", "/hf/text-to-image", "/sdapi/v1/img2img", "/sdapi/v1/txt2img",
        "/v1/images/edits", "/v1/images/generations", "/v1/images/variations",
    ]  # fmt: skip
    for reference in _references(description):
        assert reference.removeprefix("#/components/schemas/") in description["components"]["schemas"]


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in _references(value)]
    if isinstance(node, list):
        return [found for value in node for found in _references(value)]
    return []


async def test_every_example_can_be_sent_as_it_stands(client: httpx2.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    refused = {}
    for path, operations in description["paths"].items():
        body = (
            operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        )
        for name, example in body.get("examples", {}).items():
            answer = await client.post(path, json=example["value"])
            if not answer.is_success:
                refused[f"{path} {name}"] = answer.json()
    lora = refused.pop("/api/v1/images LoRA")  # one that the embedded checkpoint brings
    assert lora["errors"][0]["pointer"] == "/loras/0/name"
    assert refused == {}
