"""
The ComfyUI servers one worker serves: which of them answer, and which rest after a failure.

Health is found by asking (``GET /prompt`` and ``GET /queue``). A server that does not answer is asked
again after 2 s, so that it is used again right after it is back. One that answers but failed an attempt
cools off, 2 s at first and doubled up to 60 s, and is asked again before it counts as healthy.

An answer alone does not clear a server whose prompt made no progress: its worker thread may be dead
while HTTP goes on, and then that prompt stays at the head of its queue until the server is restarted.
Such a server is *stuck* on that prompt, and is healthy again only when the prompt runs no more.

What is known of a failure is a :class:`Mark`. The caller may pass a place for the marks that several
processes share, so that one's finding holds for all of them at once. Safe to share between threads.

Source: ComfyUI 0.3.64 ``main.prompt_worker``, observed; its issue 16312.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from genpulse.comfy.client import ComfyClient
from genpulse.errors import ComfyUnavailable

__all__ = ["Mark", "Marks", "Server", "ServerPool", "ServerState"]

COOL_OFF_S = 2.0
MAX_COOL_OFF_S = 60.0
AWAY_S = 0.5
PROBE_TIMEOUT_S = 5.0
"""Garbage collection stalls a busy server for 0.2 s and loading a model for seconds: 1 s is too short."""


@dataclass(frozen=True, slots=True)
class Server:
    """A ComfyUI server. The name is the same for the whole fleet; the address may differ by host."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class ServerState:
    """What this process believes about a server. ``reason`` carries no address."""

    name: str
    healthy: bool
    reason: str
    retry_in_s: float = 0.0
    """Until the server is asked again, when it cools off."""
    queue_remaining: int | None = None
    """Prompts on the server when it was asked last, anybody's."""

    def as_dict(self) -> dict[str, Any]:
        """JSON shape for the worker's heartbeat."""
        return {"name": self.name, "healthy": self.healthy, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Mark:
    """What is held against a server; the default is nothing."""

    failures: int = 0
    """Attempts it failed since it last did its work."""
    cool_until: float = 0.0
    """When it may be asked again, by the clock of all processes on this host."""
    reason: str = ""
    stuck_on: str = ""
    """The prompt that made no progress; while the server runs it, an answer says nothing."""


class Marks(Protocol):
    """Where the marks are kept, by a server's place in the pool."""

    def __getitem__(self, index: int, /) -> Mark:
        """The mark of a server."""

    def __setitem__(self, index: int, mark: Mark, /) -> None:
        """Replace it. Of two at once one may win."""


class _Entry:
    """The pool's own record of one server; touched under the pool's lock only."""

    def __init__(self, server: Server, index: int) -> None:
        self.server = server
        self.index = index
        self.answers = False
        self.answered_at = 0.0
        self.reason = "not asked yet"
        self.queue_remaining: int | None = None
        self.client: ComfyClient | None = None


class ServerPool:
    """
    Servers by name, with a client for each.

    Until it was asked for the first time no server is healthy: call :meth:`probe_all`.

    Args:
        servers: Distinct names.
        connect: Makes a client for an address.
        clock: Monotonic seconds; the same for everybody who shares *marks*.
        marks: Shared with other processes; by default this pool's own.
    """

    def __init__(
        self,
        servers: Iterable[Server],
        *,
        connect: Callable[[str], ComfyClient] = ComfyClient,
        clock: Callable[[], float] = time.monotonic,
        marks: Marks | None = None,
    ) -> None:
        self._entries: dict[str, _Entry] = {}
        for index, server in enumerate(servers):
            if server.name in self._entries:
                msg = f"two ComfyUI servers are named {server.name}"
                raise ValueError(msg)
            self._entries[server.name] = _Entry(server, index)
        self._marks: Marks = [Mark() for _ in self._entries] if marks is None else marks
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def servers(self) -> tuple[Server, ...]:
        """All servers, in the order given."""
        return tuple(entry.server for entry in self._entries.values())

    def client(self, name: str) -> ComfyClient:
        """The client of a server. Made on first use, so that a forked child gets its own."""
        entry = self._entries[name]
        with self._lock:
            if entry.client is None:
                entry.client = self._connect(entry.server.url)
            return entry.client

    def healthy(self) -> tuple[Server, ...]:
        """Servers that answered when last asked, and nothing is held against. Asks nobody."""
        with self._lock:
            return tuple(entry.server for entry in self._entries.values() if self._is_healthy(entry))

    def is_stuck(self, name: str) -> bool:
        """Whether somebody found that the server makes no progress: what waits in its queue waits in vain."""
        return bool(self._marks[self._entries[name].index].stuck_on)

    def mark_bad(self, name: str, reason: str, *, stuck_on: str = "") -> None:
        """
        A server failed an attempt: let it rest, longer each time in a row.

        Several attempts that fail together, in whatever process, are one failure.

        Args:
            stuck_on: The prompt that made no progress, if that is what happened.
        """
        with self._lock:
            entry = self._entries[name]
            entry.answers = False
            old, now = self._marks[entry.index], self._clock()
            if old.cool_until > now and old.reason == reason and old.stuck_on == stuck_on:
                return
            failures = old.failures + 1
            rest_s = min(MAX_COOL_OFF_S, COOL_OFF_S * 2 ** min(failures - 1, 10))
            self._marks[entry.index] = Mark(failures, max(old.cool_until, now + rest_s), reason, stuck_on)

    def mark_away(self, name: str, reason: str) -> None:
        """A server did not answer an attempt: ask it again before it counts, but soon, for it may be back."""
        with self._lock:
            self._rest(self._entries[name], reason, AWAY_S)

    def mark_good(self, name: str) -> None:
        """A server did its work: forget earlier failures."""
        with self._lock:
            entry = self._entries[name]
            entry.answers, entry.reason, entry.answered_at = True, "", self._clock()
            if self._marks[entry.index] != Mark():
                self._marks[entry.index] = Mark()

    def probe(self, name: str) -> bool:
        """
        Ask one server now, unless it cools off; returns whether it is healthy.

        An answer makes it healthy again but does not shorten its next rest. Only :meth:`mark_good` does,
        or, for a server that was stuck, that the prompt it was stuck on runs no more.
        """
        entry = self._entries[name]
        with self._lock:
            if self._marks[entry.index].cool_until > self._clock():
                return False
        client = self.client(name)
        try:
            remaining = client.queue_remaining(timeout_s=PROBE_TIMEOUT_S)
            running = client.queue(timeout_s=PROBE_TIMEOUT_S).running
        except ComfyUnavailable as error:
            with self._lock:
                self._rest(entry, error.message, COOL_OFF_S, gone=error.refused)
            return False
        with self._lock:
            mark = self._marks[entry.index]
            if mark.cool_until > self._clock():
                return False  # marked bad while it was asked
            if mark.stuck_on and mark.stuck_on in running:
                self._rest(entry, mark.reason, COOL_OFF_S)
                return False
            if mark.reason:
                self._marks[entry.index] = Mark(mark.failures)
            entry.answers, entry.reason, entry.queue_remaining = True, "", remaining
            entry.answered_at = self._clock()
        return True

    def probe_all(self) -> tuple[Server, ...]:
        """Ask all servers that do not cool off, at the same time; returns the healthy ones."""
        names = list(self._entries)
        if len(names) == 1:
            self.probe(names[0])
        elif names:
            with ThreadPoolExecutor(
                max_workers=min(16, len(names)), thread_name_prefix="comfy-probe"
            ) as threads:
                list(threads.map(self._probe_in_thread, names))
        return self.healthy()

    def states(self) -> tuple[ServerState, ...]:
        """What is believed of every server, in the order given."""
        with self._lock:
            return tuple(self._state(entry) for entry in self._entries.values())

    def close(self) -> None:
        """Close all idle connections."""
        with self._lock:
            clients = [entry.client for entry in self._entries.values() if entry.client is not None]
        for client in clients:
            with contextlib.suppress(Exception):
                client.close()

    def _probe_in_thread(self, name: str) -> None:
        try:
            self.probe(name)
        finally:
            self.client(name).release_thread()

    def _is_healthy(self, entry: _Entry) -> bool:
        mark = self._marks[entry.index]
        # What another process marked is over only when this one has asked since, or the rest ended.
        return (
            entry.answers
            and not mark.stuck_on
            and mark.cool_until <= self._clock()
            and mark.cool_until <= entry.answered_at
        )

    def _state(self, entry: _Entry) -> ServerState:
        mark, healthy = self._marks[entry.index], self._is_healthy(entry)
        return ServerState(
            name=entry.server.name,
            healthy=healthy,
            reason="" if healthy else mark.reason or entry.reason or "not asked since it rested",
            retry_in_s=max(0.0, mark.cool_until - self._clock()),
            queue_remaining=entry.queue_remaining,
        )

    def _rest(self, entry: _Entry, reason: str, seconds: float, *, gone: bool = False) -> None:
        """Ask it again in *seconds*. What else is held against it stays, unless its process is *gone*."""
        entry.answers = False
        entry.reason = reason
        entry.queue_remaining = None
        old = self._marks[entry.index]
        until = max(old.cool_until, self._clock() + seconds)
        stuck_on = "" if gone else old.stuck_on
        self._marks[entry.index] = Mark(old.failures, until, old.reason if stuck_on else reason, stuck_on)
