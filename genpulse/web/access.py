"""
Who may call, decided before a body is read or a view runs.

With ``GENPULSE_API_KEY`` every route but the open ones asks for ``Authorization: Bearer <key>``.
Without it the server listens on loopback only, which keeps other machines out but not the web
pages in this machine's browsers: a page may post to ``http://127.0.0.1:8000`` from anywhere, or
point its own name at 127.0.0.1 (DNS rebinding) and then read the answers. So a request must then
also name a loopback host, and must not come from another origin.
"""

from __future__ import annotations

import hmac
import re

from flask import Flask, Response, g, request

from genpulse.config import Settings, is_loopback
from genpulse.web.problems import Problem, request_id
from genpulse.web.service import OWNER

__all__ = ["holds_key", "install", "owner"]

_HOST = re.compile(r"^(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d+)?$")


def install(app: Flask, settings: Settings, open_views: frozenset[str]) -> None:
    """
    Guard every request of *app*, and put the security headers on every answer.

    Args:
        open_views: Names of the view functions that answer without a key.
    """
    key = settings.api_key.get_secret_value().encode("utf-8")

    def guard() -> None:
        g.holds_key = not key or _matches(key)
        if not key:
            _refuse_strangers()
        # An address that does not exist, or not for this method, tells nothing: routing answers it.
        view = (request.endpoint or "").rpartition(".")[2]
        if request.endpoint and view not in open_views and not g.holds_key:
            raise Problem(
                401,
                detail="Send the API key as Authorization: Bearer <key>.",
                headers={"WWW-Authenticate": 'Bearer realm="genpulse"'},
            )

    app.before_request(guard)
    app.after_request(_harden)


def owner() -> str:
    """Whose tasks and files this request may see."""
    return OWNER


def holds_key() -> bool:
    """Whether the caller showed the key, or none is needed here."""
    return bool(g.get("holds_key", False))


def _matches(key: bytes) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    # WSGI hands headers over as latin-1; encoding them back gives the bytes that were sent.
    sent = token.strip().encode("latin-1", "replace")
    return hmac.compare_digest(sent, key) and scheme.lower() == "bearer"


def _refuse_strangers() -> None:
    if not _is_loopback_host(request.headers.get("Host", "")):
        raise Problem(403, detail="Without an API key this server answers only under a loopback name.")
    origin = request.headers.get("Origin")
    same_origin = origin is None or origin.lower() == f"{request.scheme}://{request.headers['Host']}".lower()
    site = request.headers.get("Sec-Fetch-Site", "none")
    looking = request.method in {"GET", "HEAD"} and request.headers.get("Sec-Fetch-Mode") == "navigate"
    if not same_origin or (site in {"cross-site", "same-site"} and not looking):
        raise Problem(403, detail="Without an API key this server takes no requests from other web pages.")


def _is_loopback_host(host: str) -> bool:
    match = _HOST.match(host)
    name = (match[1] or match[2] or "").lower().rstrip(".") if match else ""
    # "127.evil.example" begins like a loopback address and is none.
    return is_loopback(name) and (
        not name.startswith("127.") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", name))
    )


def _harden(answer: Response) -> Response:
    defaults = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "X-Request-Id": request_id(),
    }
    for name, value in defaults.items():
        answer.headers.setdefault(name, value)
    if "Cache-Control" not in answer.headers:
        answer.headers["Cache-Control"] = "no-store"
    return answer
