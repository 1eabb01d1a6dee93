"""
The Redis side of the relay: put messages on the runway, and look at what is on it.

Imports nothing of the worker. A Redis that does not answer costs a call a second or two and then
an error, never a hang; what a failed call may have sent anyway is a duplicate hint, and harmless.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import redis
from celery import Celery
from kombu import Connection
from kombu import Queue as KombuQueue

from genpulse.config import Settings
from genpulse.errors import GenPulseError
from genpulse.tasks import queues
from genpulse.tasks.registry import task_name

__all__ = ["BrokerUnavailable", "Epoch", "Message", "Producer", "RunwayView", "broker_url", "result_backend"]

EPOCH_KEY = "genpulse:epoch"

DELIVERY_GRACE_S = 5.0
"""How long a delivered message counts as on its way to a claim. A worker that died before its claim
leaves its message in ``unacked``, and that must not look like a waiting message."""
STALE_DELIVERY_S = 30.0
"""A delivery that is noted for so long and not acknowledged will never be."""


class BrokerUnavailable(GenPulseError):
    """Redis did not answer in time. Says nothing about whether the messages arrived."""


class Message(NamedTuple):
    """One hint to a worker: look at this task."""

    task_id: str
    task_name: str
    queue: str
    priority_step: int


class Epoch(NamedTuple):
    """Two of these differ when Redis was restarted (``run_id``) or wiped (``token``) in between."""

    run_id: str
    token: str


def broker_url(settings: Settings) -> str:
    """The Redis URL in Celery's words. Holds a password: never log it."""
    return re.sub(r"^unix://", "redis+socket://", settings.redis_url.get_secret_value())


def result_backend(settings: Settings) -> str:
    """The worker's result backend as Celery's setting wants it. Holds a password: never log it."""
    url = re.sub(r"^(unix|redis\+socket)://", "socket://", settings.redis_url.get_secret_value())
    return f"genpulse.tasks.mirror:MirroredRedisBackend+{url}"


def celery_queue(name: str) -> KombuQueue:
    """
    A queue as Celery wants it, without an exchange.

    Messages go straight to the list, so nothing about a queue is kept in Redis that a ``FLUSHALL``
    could take away.
    """
    return KombuQueue(name, exchange="", routing_key=name)


class Producer:
    """
    Sends Celery messages by task name; each message's ``task_id`` is our own.

    Has no result backend (Celery's would subscribe to one channel for each task, for ever), and one
    connection, made when it is first needed and anew after a fork or a failure. Threads share it.

    Args:
        settings: Names the broker.
        timeout_s: Bound for connecting and for each answer of Redis.
    """

    def __init__(self, settings: Settings, *, timeout_s: float = 1.0) -> None:
        self._url = broker_url(settings)
        self._options = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "socket_keepalive": True,
            "health_check_interval": 0,  # a check is one more wait; a dead connection shows in the write
            "retry_on_timeout": False,  # or kombu would send one by one
            "priority_steps": list(queues.PRIORITY_STEPS),
            "max_retries": 0,
            "interval_start": 0,
            "interval_step": 0,
            "interval_max": 0,
        }
        self._lock = threading.Lock()
        self._app: Celery | None = None
        self._connection: Connection | None = None
        self._pid = 0

    def publish(self, messages: Sequence[Message | tuple[str, str, str, int]]) -> None:
        """
        Send all *messages* in one pipelined write, in this order.

        Raises:
            BrokerUnavailable: Within a few timeouts. Some messages, or all, may have arrived.
        """
        if not messages:
            return
        batch = [Message(*message) for message in messages]
        with self._lock:
            try:
                self._send(batch)
            except Exception as error:
                # Redis, kombu and the socket have a tree of errors each; here they mean the same.
                self._drop()
                msg = f"the broker took no messages: {type(error).__name__}"
                raise BrokerUnavailable(msg) from error

    def close(self) -> None:
        """Close the connection; a later :meth:`publish` opens a new one."""
        with self._lock:
            self._drop()

    def _send(self, messages: Sequence[Message]) -> None:
        if self._pid != os.getpid():
            # A connection inherited over a fork belongs to the parent: forget it, unclosed.
            self._pid, self._connection, self._app = os.getpid(), None, None
        if self._app is None:
            self._app = _producer_app(self._url)
        if self._connection is None:
            self._connection = Connection(self._url, transport_options=self._options)
        app = self._app
        # kombu's type stubs know neither ``batch`` nor a queue object for ``send_task``.
        producer: Any = app.amqp.Producer(self._connection.default_channel, auto_declare=False)
        send: Any = app.send_task
        with producer, producer.batch(max_size=len(messages)):
            for message in messages:
                send(
                    message.task_name,
                    task_id=message.task_id,
                    queue=celery_queue(message.queue),
                    priority=message.priority_step,
                    producer=producer,
                    retry=False,
                    declare=[],
                    add_to_parent=False,
                )

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # it is being thrown away because it failed
                connection.collect(socket_timeout=0.1)


def _producer_app(url: str) -> Celery:
    """A Celery application that can only send; never the process's current one."""
    app = Celery("genpulse-producer", broker=url, backend=None, set_as_current=False, autofinalize=True)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=queues.DEFAULT_QUEUE,
        task_default_exchange="",
        task_send_sent_event=False,
        enable_utc=True,
    )
    return app


class RunwayView:
    """
    What Redis holds of the runway, read exactly.

    Args:
        client: A Redis client with short timeouts; its errors become :class:`BrokerUnavailable`.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def waiting_ids(self, names: Iterable[str]) -> set[str]:
        """
        Ids of the tasks whose message waits in one of the queues *names* (server queues must be
        named too), or was delivered less than 5 s ago and may be about to be claimed.

        Two round trips. A message is in neither place for the moment between being popped and
        being noted as delivered, so a task missing once is not lost yet.

        Raises:
            BrokerUnavailable: Redis did not answer.
        """
        try:
            pipe = self._client.pipeline(transaction=True)
            for name in dict.fromkeys(names):
                for key in queues.redis_keys(name):
                    pipe.lrange(key, 0, -1)
            pipe.zrangebyscore("unacked_index", time.time() - DELIVERY_GRACE_S, "+inf")
            *lists, tags = cast("list[list[Any]]", pipe.execute())
            ids = {found for messages in lists for message in messages if (found := _task_id(message))}
            if tags:
                delivered = cast("list[Any]", self._client.hmget("unacked", tags))
                ids.update(found for entry in delivered if entry and (found := _delivered_id(entry)))
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"the runway cannot be read: {type(error).__name__}") from error
        return ids

    def forget_stale_deliveries(self, older_than_s: float = STALE_DELIVERY_S) -> int:
        """
        Drop our messages that are noted as delivered and were never acknowledged: their worker died,
        or the acknowledgement was lost on the way. kombu would keep them until its visibility timeout.

        We acknowledge within milliseconds, so an old note is nobody's; a worker that acknowledges
        after all finds nothing, and the task was sent again long ago. Another application's messages
        in the same Redis stay. Returns how many; raises :class:`BrokerUnavailable`.
        """
        try:
            old = self._client.zrangebyscore("unacked_index", "-inf", time.time() - older_than_s)
            tags = cast("list[Any]", old)
            if not tags:
                return 0
            entries = cast("list[Any]", self._client.hmget("unacked", tags))
            ours = [tag for tag, entry in zip(tags, entries, strict=True) if entry is None or _is_ours(entry)]
            if ours:
                pipe = self._client.pipeline(transaction=True)
                pipe.zrem("unacked_index", *ours)
                pipe.hdel("unacked", *ours)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"the runway cannot be read: {type(error).__name__}") from error
        return len(ours)

    def server_queues(self) -> set[str]:
        """The server queues (``comfy@gpu1``) that hold messages, whoever put them there."""
        try:
            keys = {_text(key) for key in self._client.scan_iter(match="*@*", count=1000, _type="list")}
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"the runway cannot be read: {type(error).__name__}") from error
        # Celery's own lists (replies to remote control) have an "@" in their names too.
        return {name for name in map(queues.queue_of_key, keys) if not name.endswith(".pidbox")}

    def clear(self, names: Iterable[str]) -> None:
        """Delete all messages of these queues; raises :class:`BrokerUnavailable`."""
        try:
            for name in names:
                self._client.delete(*queues.redis_keys(name))
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"a queue cannot be cleared: {type(error).__name__}") from error

    def counts(self, names: Iterable[str]) -> dict[str, int]:
        """Waiting messages by queue; raises :class:`BrokerUnavailable`."""
        wanted = list(dict.fromkeys(names))
        try:
            pipe = self._client.pipeline(transaction=False)
            for name in wanted:
                for key in queues.redis_keys(name):
                    pipe.llen(key)
            sizes = cast("list[int]", pipe.execute())
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"the runway cannot be read: {type(error).__name__}") from error
        width = len(queues.PRIORITY_STEPS)
        return {name: sum(sizes[i * width : (i + 1) * width]) for i, name in enumerate(wanted)}

    def epoch(self) -> Epoch:
        """
        Which life of Redis this is; sets our key if it is not there.

        The caller keeps the last one: a difference means that messages may be lost, and that the
        runway must be compared at once. Raises :class:`BrokerUnavailable`.
        """
        try:
            pipe = self._client.pipeline(transaction=True)
            pipe.set(EPOCH_KEY, secrets.token_hex(8), nx=True)
            pipe.get(EPOCH_KEY)
            _, token = pipe.execute()
            return Epoch(self.run_id(), _text(token))
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"the broker's epoch cannot be read: {type(error).__name__}") from error

    def run_id(self) -> str:
        """Redis' own id of its process, or ``""`` where a hosted Redis hides it."""
        try:
            return str(self._client.info("server").get("run_id", ""))
        except redis.ResponseError:
            return ""
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable(f"the broker's epoch cannot be read: {type(error).__name__}") from error


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def _task_id(message: bytes | str) -> str | None:
    """The task id in a message as kombu writes it; ``None`` for anything else in the list."""
    try:
        return str(json.loads(message)["headers"]["id"])
    except (ValueError, TypeError, LookupError):
        return None


def _is_ours(entry: bytes | str) -> bool:
    """Whether an ``unacked`` entry is a message for one of our task functions."""
    try:
        return str(json.loads(entry)[0]["headers"]["task"]).startswith(task_name(""))
    except (ValueError, TypeError, LookupError):
        return False


def _delivered_id(entry: bytes | str) -> str | None:
    """The same for an ``unacked`` entry, ``[message, exchange, routing key]``."""
    try:
        return str(json.loads(entry)[0]["headers"]["id"])
    except (ValueError, TypeError, LookupError):
        return None
