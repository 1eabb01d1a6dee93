"""
What each request leaves behind: one line in the log, a count, and its id in every line that it causes.

A caller may name the request by ``X-Request-ID``, so that one id goes through several systems; ours is
a UUID. It is in the answer, in problem documents, and with the task, whose attempts log it too.
"""

from __future__ import annotations

import time

import structlog
from flask import Flask, Response, g, request

from genpulse.telemetry import metrics, traces
from genpulse.web.problems import request_id

__all__ = ["install"]

log = structlog.get_logger("genpulse.access")

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ASKED_OFTEN = frozenset({"/health", "/ready", "/status", "/metrics"})
"""By probes and collectors: on the level DEBUG."""


def install(app: Flask) -> None:
    """Watch every request of *app*. To be called first, so that nothing happens before or after it."""

    def begin() -> None:
        # The thread served another request before.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id())
        traces.name_trace()
        g.began_at = time.perf_counter()
        metrics.HTTP_IN_FLIGHT.add()

    def note(answer: Response) -> Response:
        seconds = time.perf_counter() - g.began_at
        route = getattr(g.get("route"), "rule", "unmatched")
        method = request.method if request.method in _METHODS else "other"
        status = str(answer.status_code)
        metrics.HTTP_REQUESTS.add(method=method, route=route, status=status)
        metrics.HTTP_SECONDS.observe(seconds, method=method, route=route)
        answer.call_on_close(_over)
        (log.debug if route in _ASKED_OFTEN else log.info)(
            "request",
            method=method,
            route=route,
            status=answer.status_code,
            ms=round(seconds * 1000, 1),
            owner=getattr(g.get("caller"), "owner", None),
        )
        return answer

    app.before_request(begin)
    app.after_request(note)


def _over() -> None:
    metrics.HTTP_IN_FLIGHT.add(-1)
