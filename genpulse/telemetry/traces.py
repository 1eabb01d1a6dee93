"""
OpenTelemetry traces: the request, each attempt of its task, ComfyUI's part and storage's, as one trace.

The request's place in its trace (``traceparent``) is kept with the task, because what leads from a
request to its attempts is a row and not a call: the message is only a hint, and may be sent again or
come twice. An attempt that dies with its process leaves no span; the next one is beside where it was.

Off until :func:`start`, which alone imports the SDK. The SDK reads ``OTEL_*`` variables by itself
(headers, sampling, resource). Spans wait in a bounded line for a thread of their own: a collector that
is away or slow costs no request and no task anything. No span has params, prompt text or messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import structlog

__all__ = ["instrument", "name_trace", "origin", "span", "start", "stop"]

log = structlog.get_logger("genpulse.traces")

_UNWATCHED = "^/$,/health,/ready,/status,/metrics"
_provider: Any = None
_tracer: Any = None


def start(endpoint: str, service: str) -> None:
    """
    Begin to trace this process, after any fork; nothing if *endpoint* is empty or it was done before.

    Args:
        endpoint: Base URL of an OTLP receiver over HTTP; ``/v1/traces`` is added.
        service: The process's name, unless ``OTEL_SERVICE_NAME`` gives one.
    """
    global _provider, _tracer  # noqa: PLW0603 - one per process
    if not endpoint or _tracer is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("not_traced", reason=f"{error}; install genpulse[otel]")
        return
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    _provider = TracerProvider(resource=resource, shutdown_on_exit=True)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=2)
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("genpulse")


def stop() -> None:
    """Send what waits, for a few seconds at most, and trace no more."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.force_flush(2000)
        provider.shutdown()


def instrument(app: Any) -> None:
    """Trace the requests of a Flask application."""
    if _tracer is None:
        return
    from opentelemetry.instrumentation.flask import FlaskInstrumentor

    instrumentor: Any = FlaskInstrumentor()  # the library has no annotation here
    instrumentor.instrument_app(app, tracer_provider=_provider, excluded_urls=_UNWATCHED)


def origin() -> dict[str, str | None]:
    """The request that this code runs for: ``request_id`` and ``traceparent``, each if there is one."""
    found = structlog.contextvars.get_contextvars()
    return {"request_id": found.get("request_id"), "traceparent": _traceparent()}


def _traceparent() -> str | None:
    here = _here()
    return here and f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"


def name_trace() -> None:
    """From here on, each line of this thread's log names the trace that it belongs to, if there is one."""
    if (here := _here()) is not None:
        structlog.contextvars.bind_contextvars(trace_id=f"{here.trace_id:032x}")


def _here() -> Any:
    """The context of the span that is open here, if any."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    return found if found.is_valid else None


@contextlib.contextmanager
def span(
    name: str,
    *,
    parent: str | None = None,
    kind: Literal["internal", "client", "consumer"] = "internal",
    **attributes: Any,
) -> Iterator[Any]:
    """
    A stretch of work, below *parent* (a ``traceparent``) or below the span that is open here.

    An exception marks it as failed, by its type only: messages may hold what a user wrote.

    Yields:
        What takes further attributes (``set_attribute``), or ``None`` while nothing is traced.
    """
    if _tracer is None:
        yield None
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with _tracer.start_as_current_span(
        name,
        context=context,
        kind=trace.SpanKind[kind.upper()],
        attributes={f"genpulse.{key}": value for key, value in attributes.items() if value is not None},
        record_exception=False,
        set_status_on_exception=False,
    ) as opened:
        try:
            yield opened
        except Exception as error:
            opened.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
