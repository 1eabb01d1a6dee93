"""
What Redis tells about running tasks: the newest progress, and taps on the shoulder.

Nothing here decides anything. Every call has a time-out of 50 ms and never raises; after a failure
Redis is left alone for five seconds, so that a request or an attempt pays for a dead Redis once.
Every key expires.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import redis

__all__ = ["Ear", "Live", "redis_client"]

TIMEOUT_S = 0.05
PAUSE_S = 5.0
PROGRESS_TTL_S = 3600

CHANNEL = "genpulse:wake"
"""Pub/sub: one word a message, ``task``, ``claim`` or ``cancel``. A lost message costs a poll's wait."""

T = TypeVar("T")


def redis_client(url: str, *, timeout_s: float) -> redis.Redis:
    """A client whose every wait is bounded. *url* may hold a password: never log it."""
    url = url.replace("redis+socket://", "unix://", 1)
    client: redis.Redis = redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry_on_timeout=False,
        retry=None,
        decode_responses=True,
    )
    return client


class Live:
    """Newest progress of tasks, and wake-up calls. Threads share one."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._redis = redis_client(url, timeout_s=TIMEOUT_S)
        self._quiet_until = 0.0

    def publish_progress(self, task_id: str, attempt: int, percent: float, detail: Mapping[str, Any]) -> None:
        """Remember how far an attempt is, 0 to 100, with what API.md calls ``progress_detail``."""
        value = json.dumps({"attempt": attempt, "percent": percent, "detail": dict(detail)})
        self._try(lambda: self._redis.set(_progress_key(task_id), value, ex=PROGRESS_TTL_S), None)

    def progress(self, task_id: str) -> dict[str, Any] | None:
        """The newest ``{"attempt", "percent", "detail"}`` of a task, if Redis has it."""
        text = self._try(lambda: self._redis.get(_progress_key(task_id)), None)
        if not isinstance(text, str):
            return None
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            return value if isinstance(value, dict) else None
        return None

    def forget_progress(self, task_id: str) -> None:
        """The task is final: its row says what there is to say."""
        self._try(lambda: self._redis.delete(_progress_key(task_id)), None)

    def wake(self, word: str) -> None:
        """Tell whoever listens that there is something to do."""
        self._try(lambda: self._redis.publish(CHANNEL, word), None)

    def is_up(self) -> bool:
        """Whether Redis answered just now."""
        return bool(self._try(self._redis.ping, False))

    def close(self) -> None:
        """Close the connections."""
        with contextlib.suppress(redis.RedisError, OSError):
            self._redis.close()

    def _try(self, ask: Callable[[], Any], otherwise: T) -> Any | T:
        if time.monotonic() < self._quiet_until:
            return otherwise
        try:
            return ask()
        except (redis.RedisError, OSError):
            self._quiet_until = time.monotonic() + PAUSE_S
            return otherwise


class Ear:
    """
    Listens for wake-up calls in a thread of its own, through every restart of Redis.

    Args:
        heard: Called with each word; must not block.
    """

    def __init__(self, url: str, heard: Callable[[str], None]) -> None:
        self._redis = redis_client(url, timeout_s=2.0)
        self._heard = heard
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="genpulse-ear", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; the thread ends within a second."""
        self._stopping.set()

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]  # redis-py leaves it bare
                    pubsub.subscribe(CHANNEL)
                    while not self._stopping.is_set():
                        message = pubsub.get_message(timeout=1.0)
                        if message is not None and isinstance(message.get("data"), str):
                            self._heard(message["data"])
            except (redis.RedisError, OSError, ValueError):
                self._stopping.wait(1.0)


def _progress_key(task_id: str) -> str:
    return f"genpulse:progress:{task_id}"
