"""
How fast an owner may submit: Flask-Limiter, counting in Redis so that all processes count together.

Redis informs and never decides. Each question to it ends within 50 ms; after a failure this process
counts for itself and tries Redis again after one second, then two, then four. Where no key is needed
there is no limit, for the only callers are this machine's own.
"""

from __future__ import annotations

import logging
import math
import re
import time
from typing import Any

import redis
from flask import Flask, Response
from flask_limiter import Limiter, RateLimitExceeded

from genpulse.config import Settings
from genpulse.live import TIMEOUT_S
from genpulse.web import access
from genpulse.web.problems import Problem

__all__ = ["install"]

_KEY_PREFIX = "genpulse:limit"
_NO_LIMIT = ""


def install(app: Flask, settings: Settings) -> None:
    """Limit the routes that are marked so; after :func:`genpulse.web.access.install`, which says who asks."""

    def rate() -> str:
        route = access.route()
        if route is None or not route.is_limited or not access.caller().shows_key:
            return _NO_LIMIT
        key = access.caller().key
        said = settings.submit_rate if key is None or key.rate is None else key.rate
        return _NO_LIMIT if said == "0" else said

    def whose() -> str:
        caller = access.caller()
        # A key with a rate of its own counts for itself; all others of an owner count together.
        own = caller.key is not None and caller.key.rate is not None
        return f"{caller.owner}:{caller.key.id}" if own and caller.key else caller.owner

    # What from_url takes; the library's type knows only text and numbers.
    options: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "retry_on_timeout": False,
        "retry": None,
        "key_prefix": _KEY_PREFIX,
    }
    limiter = Limiter(
        whose,
        application_limits=[rate],
        strategy="sliding-window-counter",
        storage_uri=_storage_uri(settings.redis_url.get_secret_value()),
        storage_options=options,
        in_memory_fallback_enabled=True,
        swallow_errors=True,
    )
    limiter.logger.addFilter(_in_one_line)
    limiter.init_app(app)

    def tell(answer: Response) -> Response:
        if (window := _window(limiter)) is not None:
            limit, remaining, reset_s = window
            answer.headers["RateLimit-Limit"] = str(limit)
            answer.headers["RateLimit-Remaining"] = str(remaining)
            answer.headers["RateLimit-Reset"] = str(reset_s)
        return answer

    def refuse(_: RateLimitExceeded) -> Response:
        window = _window(limiter)
        wait_s = window[2] if window else 1
        detail = f"More submissions than {rate().replace('/', ' a ')}; go on in {wait_s} s."
        return Problem(429, detail=detail, retryable=True, headers={"Retry-After": str(wait_s)}).response()

    app.after_request(tell)
    app.register_error_handler(RateLimitExceeded, refuse)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Redis went away: a line of the log, and no traceback for each request that met it."""
    record.exc_info = None
    return True


def _window(limiter: Limiter) -> tuple[int, int, int] | None:
    """Limit, what is left of it, and in how many seconds there is more; ``None`` where nothing is limited."""
    if (found := limiter.current_limit) is None:
        return None
    try:
        remaining, reset_at = found.remaining, found.reset_at
    except (redis.RedisError, OSError):  # it went away between counting and telling
        return None
    return found.limit.amount, max(0, remaining), max(1, math.ceil(reset_at - time.time()))


def _storage_uri(redis_url: str) -> str:
    """The Redis URL in the words of the ``limits`` package."""
    return re.sub(r"^(redis\+socket|unix)://", "redis+unix://", redis_url)
