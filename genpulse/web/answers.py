"""What the views have in common in answering: JSON from models, links in the caller's own tree, ETags."""

from __future__ import annotations

import hashlib
from typing import Any

from flask import Response, request, url_for
from pydantic import BaseModel

from genpulse.web.service import service

__all__ = ["etag", "json_answer", "link", "with_etag"]


def json_answer(view: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """The model as JSON."""
    return Response(view.model_dump_json(), status=status, headers=headers, content_type="application/json")


def link(view: str, **values: Any) -> str:
    """The address of a view, below the mount (root or ``/v1``) that this request came in by."""
    path = url_for(f"{request.blueprint or 'api'}.{view}", **values)
    public = service().settings.public_url
    if not public:
        return request.host_url.rstrip("/") + path
    # Behind a proxy that strips a prefix, the public address has it and our path does not.
    return public.rstrip("/") + path.removeprefix(request.script_root or "\0")


def etag(answer: Response) -> str:
    """A strong validator: the digest of the very bytes, without its quotation marks."""
    return hashlib.sha256(answer.get_data()).hexdigest()[:32]


def with_etag(answer: Response) -> Response:
    """The answer with its ETag, or 304 if the caller has just this."""
    answer.set_etag(etag(answer))
    answer.headers["Cache-Control"] = "private, no-cache"
    answer.make_conditional(request)
    return answer
