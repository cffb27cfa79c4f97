"""`/docs`: Swagger UI, with its script and style served from here, so that it works offline."""

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from app.errors import NotFound

FOLDER = Path(fastapi_offline.__file__).parent / "static"  # holds Swagger UI as published
MEDIA_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}

router = APIRouter(include_in_schema=False)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def page(request: Request) -> HTMLResponse:
    """Return the page. Its URLs are relative, so that a proxy may put the server under any path."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title=request.app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


@router.api_route("/docs/{name}", methods=["GET", "HEAD"])
async def asset(name: str) -> FileResponse:
    """Return a file of the page."""
    if name not in MEDIA_TYPES:
        raise NotFound(f"/docs/{name} is not here; the page itself is /docs")
    headers = {"Cache-Control": "public, max-age=86400"}
    return FileResponse(FOLDER / name, media_type=MEDIA_TYPES[name], headers=headers)
