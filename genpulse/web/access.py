"""
Who may call, decided before a body is read or a view runs.

With an API key in the settings or in the ledger, every route but the open ones asks for
``Authorization: Bearer <key>``, and for the route's scope. The pages for people take the key as the
password of HTTP Basic, too, because a browser can ask for that.

Without any key the server listens on loopback only, which keeps other machines out but not the web
pages in this machine's browsers: a page may post to ``http://127.0.0.1:8000`` from anywhere, or
point its own name at 127.0.0.1 (DNS rebinding) and then read the answers. So a request must then
also name a loopback host, and must not come from another origin.
"""

from __future__ import annotations

import base64
import binascii
import re

from flask import Flask, Response, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from genpulse.config import Settings, is_loopback
from genpulse.errors import LedgerUnavailable
from genpulse.web.callers import EVERYBODY, Caller, Callers, TooManyWrongKeys, WrongKey
from genpulse.web.contract import Route, Routes
from genpulse.web.problems import Problem, request_id
from genpulse.web.service import Service, service

__all__ = ["caller", "install", "is_still_welcome", "may", "owner", "room", "route", "shared"]

_HOST = re.compile(r"^(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d+)?$")


def install(app: Flask, settings: Settings, routes: Routes) -> None:
    """Guard every request of *app*, and put the security headers on every answer."""
    if settings.proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=settings.proxies, x_proto=settings.proxies, x_host=0)  # type: ignore[method-assign]  # how werkzeug's middleware is put on
    here: Service = app.extensions["genpulse"]
    callers = Callers(settings, here.ledger, here.live)
    by_view = {each.view.__name__: each for each in routes}

    def guard() -> None:
        # An address that does not exist, or not for this method, tells nothing: routing answers it.
        g.callers = callers
        g.route = by_view.get((request.endpoint or "").rpartition(".")[2])
        is_open = g.route is None or g.route.is_open
        try:
            g.caller = _caller(callers, g.route)
        except LedgerUnavailable:
            if not callers.are_known_by_key:
                _refuse_strangers()
            if not is_open:
                raise
        except (TooManyWrongKeys, WrongKey) as error:
            if not is_open:
                raise _refusal(error, g.route) from error
        if g.route is not None and not is_open and g.route.scope not in caller().scopes:
            raise Problem(403, detail=f"This takes a key with the scope {g.route.scope}.")

    def note(answer: Response) -> Response:
        # After the answer is sent: a ledger that hangs holds nobody up.
        if (found := g.get("caller")) is not None and (write := callers.use_to_note(found)) is not None:
            answer.call_on_close(write)
        return answer

    app.before_request(guard)
    app.after_request(_harden)
    app.after_request(note)


def caller() -> Caller:
    """Who asks. On an open route only where :func:`may` says so."""
    found: Caller = g.caller
    return found


def owner() -> str:
    """Whose tasks and files this request may see."""
    return caller().owner


def room(tasks: int) -> None:
    """
    Make sure that the caller may have so many more tasks waiting.

    Raises:
        QueueFull: Not now.
    """
    key = caller().key
    cap = None if key is None else key.max_queued
    service().admission.check(owner(), tasks=tasks, max_queued=cap)


def may(scope: str) -> bool:
    """Whether the caller showed a key with *scope*, or none is needed here."""
    found: Caller | None = g.get("caller")
    return found is not None and scope in found.scopes


def is_still_welcome() -> bool:
    """Whether the caller of a request that goes on for long would still be let in, as far as can be told."""
    found: bool = g.callers.still_opens(caller())
    return found


def shared() -> bool:
    """Whether this installation has keys, so that one owner must leave something to the others."""
    found: bool = g.callers.are_several(caller())
    return found


def route() -> Route | None:
    """The route that was asked for; ``None`` for an address that does not exist."""
    found: Route | None = g.get("route")
    return found


def _caller(callers: Callers, wanted: Route | None) -> Caller:
    """
    Who asks.

    Raises:
        WrongKey: Nobody we know.
        TooManyWrongKeys: Nobody we listen to now.
        LedgerUnavailable: It is not known.
        Problem: 403, another web page where no key is needed.
    """
    if not callers.need_key():
        _refuse_strangers()
        return EVERYBODY
    token = _token(for_people=wanted is not None and wanted.for_people)
    if not token:
        raise WrongKey("Send the API key as Authorization: Bearer <key>.")
    return callers.identify(token, request.remote_addr or "")


def _token(*, for_people: bool) -> bytes:
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    # WSGI hands headers over as latin-1; encoding them back gives the bytes that were sent.
    sent = text.strip().encode("latin-1", "replace")
    if scheme.lower() == "bearer":
        return sent
    # Basic is sent along by the browser to whoever asks for a page of ours: good enough to look.
    if scheme.lower() == "basic" and for_people:
        try:
            return base64.b64decode(sent, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _refusal(error: TooManyWrongKeys | WrongKey, wanted: Route | None) -> Problem:
    if isinstance(error, TooManyWrongKeys):
        return Problem(
            429,
            detail="This address showed too many wrong API keys.",
            headers={"Retry-After": str(error.retry_after_s)},
            retryable=True,
        )
    kind = "Basic" if wanted is not None and wanted.for_people else "Bearer"
    return Problem(401, detail=str(error), headers={"WWW-Authenticate": f'{kind} realm="genpulse"'})


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
    match = _HOST.fullmatch(host)
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
