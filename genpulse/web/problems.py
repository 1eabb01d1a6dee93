"""
Every refusal as ``application/problem+json`` (RFC 9457), whoever raised it.

A view raises :class:`Problem`, or lets one of our own errors pass; werkzeug's and pydantic's are
translated here too. What nobody expected is logged with its traceback and answered with a 500 that
says nothing but the request's id, which is also in the log line. No answer carries a traceback, a
path or a secret.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from flask import Flask, Response, g, request
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from genpulse.errors import InvalidRequest, LedgerUnavailable, QueueFull, StorageUnavailable

__all__ = [
    "CONTENT_TYPE",
    "MAX_ERRORS",
    "Problem",
    "code_of",
    "install",
    "pointer",
    "printable",
    "title",
    "validation_problem",
]

CONTENT_TYPE = "application/problem+json"

MAX_ERRORS = 50
"""A body of a million mistakes gets an answer that can still be read."""

RETRY_AFTER_S = 2
"""What a caller is told to wait while the ledger or the storage is away."""

_CODES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    410: "gone",
    412: "precondition_failed",
    413: "too_large",
    414: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    417: "expectation_failed",
    422: "invalid_request",
    429: "rate_limited",
    431: "too_large",
    500: "internal",
    503: "unavailable",
}

_log = structlog.get_logger(__name__)


class Problem(Exception):
    """
    A refusal, ready to be answered.

    Args:
        status: HTTP status, 400 or above.
        code: The machine-readable word of API.md; the status' own by default.
        detail: One sentence for a person.
        errors: Where in the input, as ``(pointer, sentence)`` pairs. A pointer into the body is a
            JSON pointer; ``query:<name>``, ``header:<name>`` and ``path:<name>`` name the rest.
        headers: More response headers, for example ``Retry-After``.
        retryable: Whether the same request may succeed later.
    """

    def __init__(
        self,
        status: int,
        code: str | None = None,
        detail: str = "",
        *,
        errors: Iterable[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code or code_of(status)
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})
        self.retryable = retryable

    def response(self) -> Response:
        """The answer. ``instance`` is the request's id, so that a caller can quote it to us."""
        body: dict[str, Any] = {
            "type": f"urn:genpulse:problem:{self.code}",
            "title": title(self.status),
            "status": self.status,
            "detail": self.detail or title(self.status),
            "instance": _instance(),
            "code": self.code,
            "retryable": self.retryable,
        }
        if self.errors:
            body["errors"] = [{"pointer": where, "detail": what} for where, what in self.errors[:MAX_ERRORS]]
        answer = Response(json.dumps(body), status=self.status, content_type=CONTENT_TYPE)
        answer.headers.extend({"Cache-Control": "no-store", **self.headers})
        return answer


def unavailable(detail: str) -> Problem:
    """503 with ``Retry-After``: something we need is away, and comes back."""
    return Problem(503, detail=detail, retryable=True, headers={"Retry-After": str(RETRY_AFTER_S)})


def pointer(parts: Sequence[str | int]) -> str:
    """A JSON pointer (RFC 6901) from its parts; ``""`` is the whole document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def validation_problem(error: ValidationError, *, place: str = "") -> Problem:
    """422 ``invalid_request`` from pydantic's report; never quotes the input back."""
    found = [
        (
            _named(place, _place(problem)) if place else pointer(_place(problem)),
            # Pydantic would name our class.
            "must be a JSON object"
            if problem["type"] == "model_type"
            else problem["msg"].removeprefix("Value error, "),
        )
        for problem in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    where, what = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Problem(422, "invalid_request", f"{where or 'body'}: {what}{more}", errors=found)


def _place(problem: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where pydantic found it; of a key that is wrong it says so in a part of its own, which is no place."""
    parts: tuple[str | int, ...] = problem["loc"]
    return parts[:-1] if parts[-1:] == ("[key]",) else parts


def _named(place: str, parts: Sequence[str | int]) -> str:
    """``query:limit``, ``query:metadata[key]``, ``header:Idempotency-Key``."""
    first, *rest = map(printable, map(str, parts or ("",)))
    return f"{place}:{first}" + "".join(f"[{part}]" for part in rest)


def printable(text: str) -> str:
    """A name from the outside, fit to be said back: no control characters, no half characters, not long."""
    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", "\ufffd", text)[:200]


def request_id() -> str:
    """This request's id: what its caller calls it, or made on first use."""
    if "request_id" not in g:
        named = request.headers.get("X-Request-ID", "")
        g.request_id = named if _REQUEST_ID.fullmatch(named) else str(uuid.uuid4())
    return str(g.request_id)


# It goes into logs and URNs, and comes from anybody.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._~-]{1,64}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def _instance() -> str:
    name = request_id()
    return f"urn:uuid:{name}" if _UUID.fullmatch(name) else f"urn:genpulse:request:{name}"


def install(app: Flask) -> None:
    """Make every error of *app* a problem document."""
    app.register_error_handler(Problem, Problem.response)
    app.register_error_handler(InvalidRequest, _invalid)
    app.register_error_handler(QueueFull, _queue_full)
    app.register_error_handler(LedgerUnavailable, _ledger_away)
    app.register_error_handler(StorageUnavailable, _storage_away)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def _invalid(error: InvalidRequest) -> Response:
    status = {"not_final": 409, "too_large": 413}.get(error.problem, 422)
    return Problem(status, error.problem, error.detail, errors=error.errors).response()


def _queue_full(error: QueueFull) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)}
    return Problem(429, "queue_full", str(error), retryable=True, headers=headers).response()


def _ledger_away(error: LedgerUnavailable) -> Response:
    _log.warning("ledger_unavailable", request_id=request_id(), path=request.path, error=str(error))
    if error.in_doubt:
        return unavailable(_IN_DOUBT).response()
    # What is no submission may be done in part by now, and is safe to repeat.
    is_submission = (route := g.get("route")) is not None and route.is_limited
    return unavailable(_NOTHING_ACCEPTED if is_submission else _REPEAT).response()


_REPEAT = "The ledger does not answer just now; it is safe to repeat the request."
_NOTHING_ACCEPTED = "The ledger does not answer just now; nothing was accepted."
_IN_DOUBT = (
    "The ledger went away before it confirmed the request; it is not known whether that was accepted. "
    "With the same Idempotency-Key it is safe to repeat."
)


def _storage_away(error: StorageUnavailable) -> Response:
    _log.warning("storage_unavailable", request_id=request_id(), path=request.path, error=str(error))
    return unavailable("The storage does not answer just now.").response()


def _http(error: HTTPException) -> Response:
    """Werkzeug's own: 404, 405, 413, … and the redirects, which are no errors."""
    found = error.get_response()
    status = error.code or 500
    if status < 400:
        return found  # type: ignore[return-value]  # werkzeug types it as its own base class
    if status >= 500:
        return _unexpected(error)
    kept = {name: value for name, value in found.headers.items() if name in {"Allow", "Content-Range"}}
    return Problem(status, detail=_DETAILS.get(status, ""), headers=kept).response()


_DETAILS = {
    400: "The request could not be understood.",
    404: "There is nothing at this address.",
    405: "This address does not take that method.",
    413: "The body is larger than this server takes.",
}


def _unexpected(error: Exception) -> Response:
    """The edge of the process: log all, tell nothing."""
    _log.error(
        "request_failed",
        request_id=request_id(),
        method=request.method,
        path=request.path,
        exc_info=(type(error), error, error.__traceback__),
    )
    return Problem(500, detail="Something went wrong here, and it was logged.", retryable=True).response()


def code_of(status: int) -> str:
    """The usual word for a status."""
    return _CODES.get(status, "bad_request" if status < 500 else "internal")


def title(status: int) -> str:
    """The usual phrase of an HTTP status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
