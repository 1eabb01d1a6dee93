"""
What Redis tells about running tasks: the newest progress, a log of events, and taps on the shoulder.

Nothing here decides anything. Every call has a time-out of 50 ms and never raises; after a failure
Redis is left alone for five seconds, so that a request or an attempt pays for a dead Redis once.
Every key expires.

A task's log is a Redis stream of two kinds of entries: ``progress`` with its numbers, and ``change``,
which says only that the ledger has something new to read. :class:`EventReader` follows the logs of
any number of tasks on one connection.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import redis

__all__ = ["START", "Ear", "Entry", "EventReader", "Farthest", "Live", "Past", "order", "redis_client"]

TIMEOUT_S = 0.05
PAUSE_S = 5.0
PROGRESS_TTL_S = 25 * 3600
"""Longer than an attempt can be (Celery ends it after a day), however long its node says nothing."""
EVENTS_KEPT = 1000
"""Entries of a task's log, about; older ones are trimmed."""
EVENTS_TTL_S = 3600
FINAL_TTL_S = 120
"""How long the log of a final task stays: its row says the rest."""
PREVIEW_TTL_S = 60
PREVIEW_MAX_BYTES = 256 * 1024
WATCHED_TTL_S = 20
"""For how long one word of a watcher asks a worker for previews."""
START = "0-0"
"""The id before all ids."""
BLOCK_S = 1.0
BATCH_S = 0.01
"""A pause of the reader after each reading, so that many entries cost one command."""

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
        encoding_errors="replace",  # anybody's garbage may lie in a queue; it must not end a sweep
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

        def publish() -> None:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(_progress_key(task_id), value, ex=PROGRESS_TTL_S)
                _log(pipe, task_id, "progress", value)
                pipe.execute()

        self._try(publish, None)

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
        """The task is final: its row says what there is to say, and who watches it is told to look."""

        def forget() -> None:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.delete(_progress_key(task_id))
                _log(pipe, task_id, "change", "", ttl_s=FINAL_TTL_S)
                pipe.execute()

        self._try(forget, None)

    def touch(self, task_id: str) -> None:
        """The task changed in the ledger: who watches it is told to look."""

        def touch() -> None:
            with self._redis.pipeline(transaction=True) as pipe:
                _log(pipe, task_id, "change", "")
                pipe.execute()

        self._try(touch, None)

    def publish_preview(
        self, task_id: str, attempt: int, picture: bytes, content_type: str, node_id: str | None
    ) -> bool:
        """
        Show an unfinished picture to those who asked for it; without such a watcher it goes nowhere.

        Only the newest is kept, for a minute. One above :data:`PREVIEW_MAX_BYTES` is dropped.

        Returns:
            Whether it was published.
        """
        if len(picture) > PREVIEW_MAX_BYTES:
            return False

        def publish() -> bool:
            if not self._redis.exists(_watched_key(task_id)):
                return False
            value = json.dumps(
                {
                    "attempt": attempt,
                    "node_id": node_id,
                    "content_type": content_type,
                    "data": base64.b64encode(picture).decode("ascii"),
                }
            )
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.xadd(
                    _preview_key(task_id), {"kind": "preview", "data": value}, maxlen=1, approximate=False
                )
                pipe.expire(_preview_key(task_id), PREVIEW_TTL_S)
                pipe.execute()
            return True

        return bool(self._try(publish, False))

    def wake(self, word: str) -> None:
        """Tell whoever listens that there is something to do."""
        self._try(lambda: self._redis.publish(CHANNEL, word), None)

    def count(self, name: str, *, ttl_s: int) -> None:
        """Add one to a counter that all processes share; it ends *ttl_s* after its first count."""

        def add() -> None:
            pipe = self._redis.pipeline(transaction=True)
            pipe.set(_counter_key(name), 0, ex=ttl_s, nx=True)
            pipe.incr(_counter_key(name))
            pipe.execute()

        self._try(add, None)

    def counted(self, name: str) -> int | None:
        """A shared counter's value; ``None`` where Redis does not say."""
        value = self._try(lambda: self._redis.get(_counter_key(name)), None)
        return int(value) if isinstance(value, str) and value.isdigit() else None

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


class Farthest:
    """
    How far this process has shown each attempt to be, so that progress never falls within one.

    Redis is silent for seconds after a hiccup, and forgets when it is wiped. Other API processes have
    memories of their own: one that was never asked before shows what Redis tells just then. Threads
    share one.

    Args:
        kept: Tasks remembered, those last asked for.
    """

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._known: dict[str, Mapping[str, Any]] = {}

    def of(self, task_id: str, attempt: int, newest: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """
        What to show of a running attempt: *newest*, as Redis told it, or what was farther on.

        Returns:
            ``{"attempt", "percent", "detail"}``, of this attempt and with a number from 0 to 100, or ``None``.
        """
        told = newest if newest is not None and _is_of(newest, attempt) else None
        with self._lock:
            known = self._known.pop(task_id, None)
            if known is not None and known["attempt"] > attempt:  # the caller's row is an older one
                self._known[task_id] = known
                return told
            if (
                known is None
                or known["attempt"] < attempt
                or (told is not None and told["percent"] >= known["percent"])
            ):
                known = told
            if known is not None:
                self._known[task_id] = known  # at the end: it was asked for just now
                if len(self._known) > self._kept:
                    del self._known[next(iter(self._known))]
            return known

    def forget(self, task_id: str) -> None:
        """The task is final: its row says how far it came."""
        with self._lock:
            self._known.pop(task_id, None)


def _is_of(told: Mapping[str, Any], attempt: int) -> bool:
    percent = told.get("percent")
    return told.get("attempt") == attempt and isinstance(percent, int | float) and 0 <= percent <= 100


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a task's log: ``progress``, ``change`` or ``preview`` with its data."""

    id: str
    """Redis' own, ``<milliseconds>-<number>``; of previews it is of another count."""
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Past:
    """What a task's log holds after an id."""

    newest: str
    """The id to go on from."""
    entries: tuple[Entry, ...] = ()
    complete: bool = True
    """Whether nothing is missing between the id asked for and the first entry."""


@dataclass(slots=True)
class _Followed:
    """How far the reader is in the logs of one task; ``None`` until that is known."""

    after: str | None = None
    previews_after: str | None = None


class EventReader:
    """
    Follows the logs of many tasks with one connection and one thread, through every restart of Redis.

    A second connection, of which callers take turns, answers :meth:`past` and interrupts the
    reading when a task is added. Nothing runs before the first :meth:`follow`.

    Args:
        heard: Called in the reader's thread with the id of a task and a new entry; must not block.
    """

    def __init__(self, url: str, heard: Callable[[str, Entry], None]) -> None:
        self._reading = redis_client(url, timeout_s=BLOCK_S + 2.0)
        self._asking = redis_client(url, timeout_s=TIMEOUT_S)
        self._heard = heard
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._quiet_until = 0.0
        self._followed: dict[str, _Followed] = {}
        self._call = f"genpulse:call:{uuid.uuid4().hex}"
        self._called_after = START
        self._busy = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_up = False
        """Whether the last reading was answered."""

    def follow(self, task_id: str, after: str | None = None) -> Past | None:
        """
        Hear of everything that is logged from now on, and read what was logged before.

        Entries may be heard twice, here and in ``heard``, or by another follower of the task: compare ids.

        Args:
            after: Read the entries after this id; without it none, only where the log ends now.

        Returns:
            ``None`` if Redis does not answer; new entries are heard when it does.
        """
        with self._lock:
            followed = self._followed.setdefault(task_id, _Followed())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="genpulse-events", daemon=True)
                self._thread.start()
        self._busy.set()
        past = self._ask(lambda: self._past(task_id, after))
        if past is not None:
            with self._lock:
                if followed.after is None or order(past.newest) < order(followed.after):
                    followed.after = past.newest
            self._interrupt()
        return past

    def want_previews(self, task_ids: list[str]) -> None:
        """Ask the workers of these followed tasks for previews; to be said again each few seconds."""
        with self._lock:
            news = [self._followed[task_id] for task_id in task_ids if task_id in self._followed]
            began = [each for each in news if each.previews_after is None]
            for each in began:
                each.previews_after = START

        def ask() -> None:
            with self._asking.pipeline(transaction=False) as pipe:
                for task_id in task_ids:
                    pipe.set(_watched_key(task_id), "1", ex=WATCHED_TTL_S)
                pipe.execute()

        self._ask(ask)
        if began:
            self._interrupt()

    def drop_previews(self, task_id: str) -> None:
        """Nobody here asks for previews of this task any more."""
        with self._lock:
            if task_id in self._followed:
                self._followed[task_id].previews_after = None

    def unfollow(self, task_id: str) -> None:
        """Hear no more of this task."""
        with self._lock:
            self._followed.pop(task_id, None)
            if not self._followed:
                self._busy.clear()

    def stop(self) -> None:
        """Stop reading; the thread ends within a second."""
        self._stopping.set()
        self._busy.set()

    def _ask(self, ask: Callable[[], T]) -> T | None:
        with self._turn:
            if time.monotonic() < self._quiet_until:
                return None
            try:
                return ask()
            except (redis.RedisError, OSError):
                self._quiet_until = time.monotonic() + PAUSE_S
                return None

    def _past(self, task_id: str, after: str | None) -> Past:
        key = _events_key(task_id)
        with self._asking.pipeline(transaction=True) as pipe:
            pipe.xrevrange(key, count=1)
            if after is not None:
                pipe.xrange(key, after, after, count=1)
                pipe.xlen(key)
                pipe.xread({key: after})
            last, *rest = pipe.execute()
        newest = last[0][0] if last else START
        if after is None:
            return Past(newest)
        known, length, found = rest
        # What one has seen and is still there was followed by what is there. Before the very first
        # entry nothing is missing as long as nothing can have been trimmed.
        complete = bool(known) or (after == START and length < EVENTS_KEPT)
        entries = tuple(filter(None, (_entry(*each) for each in found[0][1]))) if found else ()
        return Past(newest, entries, complete)

    def _interrupt(self) -> None:
        """Let the reader look again at what it is to follow."""

        def call() -> None:
            with self._asking.pipeline(transaction=True) as pipe:
                pipe.xadd(self._call, {"kind": "call"}, maxlen=1, approximate=False)
                pipe.expire(self._call, 60)
                pipe.execute()

        self._ask(call)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._busy.wait()
            try:
                self._read()
            except (redis.RedisError, OSError, ValueError):
                self.is_up = False
                self._stopping.wait(1.0)
            else:
                self.is_up = True
                self._stopping.wait(BATCH_S)
        for client in (self._reading, self._asking):
            with contextlib.suppress(redis.RedisError, OSError):
                client.close()

    def _read(self) -> None:
        with self._lock:
            lost = [task_id for task_id, each in self._followed.items() if each.after is None]
        if lost:
            self._find_ends(lost)
        sources = {self._call: ""}
        streams: dict[Any, Any] = {self._call: self._called_after}
        with self._lock:
            for task_id, each in self._followed.items():
                if each.after is not None:
                    sources[_events_key(task_id)] = task_id
                    streams[_events_key(task_id)] = each.after
                if each.previews_after is not None:
                    sources[_preview_key(task_id)] = task_id
                    streams[_preview_key(task_id)] = each.previews_after
        found: Any = self._reading.xread(streams, block=int(BLOCK_S * 1000), count=200)
        for key, entries in found or ():
            last = entries[-1][0]
            if key == self._call:
                self._called_after = last
                continue
            task_id = sources[key]
            with self._lock:
                followed = self._followed.get(task_id)
                if followed is None:
                    continue
                if key == _preview_key(task_id):
                    followed.previews_after = last if followed.previews_after is not None else None
                elif followed.after == streams[key]:  # else somebody came and asked for what lies before
                    followed.after = last
            for each in entries:
                entry = _entry(*each)
                if entry is not None:
                    self._heard(task_id, entry)

    def _find_ends(self, task_ids: list[str]) -> None:
        """Redis did not answer when these were added: go on from where their logs end now."""
        with self._reading.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.xrevrange(_events_key(task_id), count=1)
            ends = pipe.execute()
        with self._lock:
            for task_id, last in zip(task_ids, ends, strict=True):
                followed = self._followed.get(task_id)
                if followed is not None and followed.after is None:
                    followed.after = last[0][0] if last else START


def _entry(entry_id: str, fields: Mapping[str, str]) -> Entry | None:
    """An entry as it was logged; ``None`` for one that is not ours."""
    try:
        data = json.loads(fields.get("data") or "{}")
    except ValueError:
        return None
    return Entry(entry_id, fields.get("kind", ""), data) if isinstance(data, dict) else None


def order(entry_id: str) -> tuple[int, int]:
    """What compares ids of entries: they count like numbers, not like text."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def _log(pipe: Any, task_id: str, kind: str, data: str, *, ttl_s: int = EVENTS_TTL_S) -> None:
    """Add an entry to a task's log, as part of a transaction: a log without an end would stay for ever."""
    key = _events_key(task_id)
    pipe.xadd(key, {"kind": kind, "data": data}, maxlen=EVENTS_KEPT, approximate=True)
    pipe.expire(key, ttl_s)


def _progress_key(task_id: str) -> str:
    return f"genpulse:progress:{task_id}"


def _events_key(task_id: str) -> str:
    return f"genpulse:events:{task_id}"


def _preview_key(task_id: str) -> str:
    return f"genpulse:preview:{task_id}"


def _watched_key(task_id: str) -> str:
    return f"genpulse:watched:{task_id}"


def _counter_key(name: str) -> str:
    return f"genpulse:count:{name}"
