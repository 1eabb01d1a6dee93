"""
The worker's connection to Redis: Celery's own, with what it lacks to survive.

Every cure here names the version it was needed for, and has a test in ``tests/celery_nodes`` or
``tests/integration/test_celery_broker.py`` that fails without it. When kombu or Celery is
raised, take one out, and look whether its test still needs it.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping
from queue import Empty
from typing import Any

from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport import redis

from genpulse.tasks.consuming import Pulse

__all__ = ["WorkerAMQP", "WorkerConnection", "pulse"]

log = logging.getLogger("genpulse.broker")

pulse = Pulse()
"""Of this process's consumer, whichever connection it is on."""


class WorkerChannel(redis.Channel):
    """A channel that does not break on something that is no JSON."""

    def _brpop_read(self, **options: Any) -> Any:
        # 5.7.0: the item is out of the list already; the error would end the worker.
        try:
            delivered = super()._brpop_read(**options)  # type: ignore[misc]  # the stubs leave it out
        except Empty:
            pulse.answered_at = time.monotonic()
            raise
        except ValueError as error:
            log.warning("message_dropped", extra={"reason": f"no JSON: {type(error).__name__}"})
            raise Empty from None
        pulse.answered_at = pulse.delivered_at = time.monotonic()
        return delivered


class WorkerTransport(redis.Transport):
    """
    A transport that drops what is no task message.

    Celery 5.7.0 ends the worker on a message whose envelope, id or arguments are not what it
    expects, and the supervisor's next worker would be ended by the next one.
    """

    Channel = WorkerChannel

    def _deliver(self, message: Any, queue: str | None) -> None:
        if (problem := _problem(message)) is not None:
            log.warning("message_dropped", extra={"reason": problem, "queue": queue})
            return
        lost: tuple[Any, ...] = (*self.connection_errors, *self.channel_errors)
        try:
            super()._deliver(message, queue)
        except lost as error:
            # kombu counts a KeyError as a lost connection, and the message's content can raise one.
            if not isinstance(error, KeyError):
                raise
            log.warning("message_dropped", extra={"reason": f"Celery misses {error} in it", "queue": queue})
        except Exception:
            log.exception("message_dropped", extra={"reason": "Celery cannot handle it", "queue": queue})


class WorkerConnection(Connection):
    """
    kombu's connection with cures for kombu and Celery 5.7.0.

    - Celery retries a lost broker after 2, 4, … 30 s and has no setting for it; here after 2 s at
      most, so that a worker consumes again seconds after Redis is back.
    - 5.7.0 closes a half-closed channel a second time when Redis goes away, which raises
      ``AttributeError: 'NoneType' object has no attribute 'hostname'`` and ends the worker. Either of
      the two methods below is enough for the case in the tests; they were measured together.
    - The two classes above.
    """

    def get_transport_cls(self) -> Any:
        """Put our transport in the place of kombu's for Redis."""
        found = super().get_transport_cls()
        return WorkerTransport if found is redis.Transport else found

    def ensure_connection(  # type: ignore[override]  # the stubs know no fractions of a second
        self,
        errback: Any = None,
        max_retries: Any = None,
        interval_start: Any = 0.2,
        interval_step: Any = 0.3,
        interval_max: Any = 2,
        **kwargs: Any,
    ) -> WorkerConnection:
        """Wait for the broker, asking at least every *interval_max* seconds."""
        return super().ensure_connection(
            errback, max_retries, interval_start, interval_step, interval_max, **kwargs
        )

    def maybe_close_channel(self, channel: Any) -> None:
        """Close *channel* whatever state its transport is in."""
        try:
            super().maybe_close_channel(channel)
        except AttributeError:
            log.debug("channel_was_half_closed")

    def collect(self, socket_timeout: float | None = None) -> None:
        """Forget the default channel together with the transport it belongs to."""
        try:
            super().collect(socket_timeout)
        finally:
            self._default_channel = None


class WorkerAMQP(AMQP):
    """Celery's messaging on :class:`WorkerConnection`."""

    Connection = WorkerConnection


def _problem(message: Any) -> str | None:
    """
    What keeps *message* from being one that Celery can take; ``None`` if nothing does.

    Answers to remote control come through lists too. They carry no ``task`` and are not held
    against the rules for tasks.

    Source: Celery's message protocol 2, ``docs/internals/protocol``.
    """
    if not isinstance(message, Mapping):
        return "no message"
    properties, headers = message.get("properties"), message.get("headers")
    if not isinstance(properties, Mapping) or not isinstance(properties.get("delivery_tag"), str):
        return "no properties"
    if not isinstance(properties.get("delivery_info"), Mapping):
        return "no delivery info"
    if headers is None or (isinstance(headers, Mapping) and "task" not in headers):
        return None
    if not isinstance(headers, Mapping):
        return "no headers"
    if not (isinstance(headers["task"], str) and isinstance(headers.get("id"), str)):
        return "no task id"
    limits = headers.get("timelimit")
    if limits is not None and not (isinstance(limits, list) and len(limits) == 2):  # soft and hard
        return "strange limits"
    if message.get("content-type") != "application/json":
        return "no JSON"
    return None if _is_call(message.get("body"), properties.get("body_encoding")) else "no arguments"


def _is_call(body: Any, encoding: Any) -> bool:
    """
    Whether *body* is ``[args, kwargs, embedded]``.

    Celery hands anything else to a child, and never gives its slot free again.
    """
    try:
        call = json.loads(base64.b64decode(body, validate=True) if encoding == "base64" else body)
    except (ValueError, TypeError):
        return False
    return (
        isinstance(call, list)
        and len(call) == 3
        and isinstance(call[0], list)
        and isinstance(call[1], dict)
        and isinstance(call[2], dict | None)
    )
