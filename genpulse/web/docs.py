"""The page that shows the contract. Its scripts come from a package of this host, so it works offline."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from flask import Response, render_template, request
from pydantic import BaseModel, Field

from genpulse.web.api import ROUTES
from genpulse.web.problems import Problem

__all__: list[str] = []

_OURS = files("genpulse.web") / "static"
_SWAGGER = files("flask_openapi_swagger") / "templates" / "swagger"

_ASSETS = {
    "docs.js": (_OURS / "docs.js", "text/javascript"),
    "swagger-ui.css": (_SWAGGER / "css" / "swagger-ui.css", "text/css"),
    "swagger-ui-bundle.js": (_SWAGGER / "js" / "swagger-ui-bundle.js", "text/javascript"),
}

# The page runs the library's script on our origin and lets it speak to nobody but us.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class AssetPath(BaseModel):
    """A file of the page."""

    name: str = Field(max_length=100)


@ROUTES.add("GET", "/docs", documented=False, for_people=True)
def docs() -> Response:
    """Show the contract."""
    return Response(
        render_template("docs.html"), content_type="text/html", headers={"Content-Security-Policy": _POLICY}
    )


@ROUTES.add("GET", "/docs/assets/<name>", documented=False, for_people=True)
def docs_asset(path: AssetPath) -> Response:
    """Answer a script or style of the page."""
    if path.name not in _ASSETS:
        raise Problem(404, detail="There is nothing at this address.")
    source, content_type = _ASSETS[path.name]
    content = source.read_bytes()
    answer = Response(content, content_type=f"{content_type}; charset=utf-8")
    answer.set_etag(hashlib.sha256(content).hexdigest()[:32])
    answer.headers["Cache-Control"] = "public, max-age=3600"
    answer.make_conditional(request)
    return answer
