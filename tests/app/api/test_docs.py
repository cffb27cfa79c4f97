"""`/docs`: a page that needs nobody but this server."""

import re

import httpx2
import pytest

pytestmark = pytest.mark.anyio


async def test_everything_that_the_page_loads_comes_from_this_server(client: httpx2.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in re.sub(r"^\s*//.*$", "", page.text, flags=re.MULTILINE), "names another server"
    named = re.findall(r"""(?:src|href)=["']([^"']+)["']|url: '([^']+)'""", page.text)
    paths = {path for pair in named for path in pair if path and not path.startswith("data:")}
    assert paths == {"docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"}
    for path in paths:  # relative to /docs
        answer = await client.get(f"/{path}")
        assert answer.status_code == 200
        assert len(answer.content) > 1000


async def test_the_files_of_the_page_have_types_and_may_be_kept(client: httpx2.AsyncClient) -> None:
    script = await client.head("/docs/swagger-ui-bundle.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["cache-control"] == "public, max-age=86400"
    assert (await client.get("/docs/swagger-ui.css")).headers["content-type"].startswith("text/css")


@pytest.mark.parametrize("name", ["redoc.standalone.js", "nothing", "..%2Fcore.py"])
async def test_no_other_file_is_given_out(client: httpx2.AsyncClient, name: str) -> None:
    assert (await client.get(f"/docs/{name}")).status_code == 404
