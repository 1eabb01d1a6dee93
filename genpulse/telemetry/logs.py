"""
Logs: events with a fixed name and data beside it, as lines for a person or as JSON.

Our own events, Celery's and gunicorn's lines go through one handler and look the same. Ids are
bound around an attempt, so that every line of it carries ``task_id`` and ``attempt``. No secret,
no workflow and no prompt text is ever logged.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Literal

import structlog

__all__ = ["setup_logging"]

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

_CHATTY = ("urllib3", "botocore", "boto3", "websocket", "PIL", "amqp", "kombu")


def setup_logging(level: int | str = "INFO", style: Literal["console", "json"] = "console") -> None:
    """
    Send everything that is logged in this process to its standard error.

    Safe to repeat: the last call decides.

    Args:
        level: Least severe line that is written.
        style: ``console`` for people, ``json`` for collectors.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_repetition,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    last: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if style == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _without_repetition(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Celery hands over, as ``data``, the dictionary that its sentence was made of."""
    if str(event.get("logger", "")).startswith("celery."):
        event.pop("data", None)
    return event
