"""
The ComfyUI servers one worker serves: which of them answer, and which rest after a failure.

Health is found by asking (``GET /prompt`` and ``GET /queue``). A server that does not answer is asked
again after 2 s, so that it is used again right after it is back. One that answers but failed an attempt
cools off, 2 s at first and doubled up to 60 s, and is asked again before it counts as healthy. Knows
nothing of other processes; safe to share between threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from genpulse.comfy.client import ComfyClient
from genpulse.errors import ComfyUnavailable

__all__ = ["Server", "ServerPool", "ServerState"]

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


class _Entry:
    """The pool's mutable record of one server; touched under the pool's lock only."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.healthy = False
        self.reason = "not asked yet"
        self.failures = 0
        self.cool_until = 0.0
        self.queue_remaining: int | None = None
        self.client: ComfyClient | None = None


class ServerPool:
    """
    Servers by name, with a client for each.

    Until it was asked for the first time no server is healthy: call :meth:`probe_all`.

    Args:
        servers: Distinct names.
        connect: Makes a client for an address.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        servers: Iterable[Server],
        *,
        connect: Callable[[str], ComfyClient] = ComfyClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries: dict[str, _Entry] = {}
        for server in servers:
            if server.name in self._entries:
                msg = f"two ComfyUI servers are named {server.name}"
                raise ValueError(msg)
            self._entries[server.name] = _Entry(server)
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
        """Servers that answered when last asked and do not cool off. Asks nobody."""
        with self._lock:
            now = self._clock()
            return tuple(
                entry.server for entry in self._entries.values() if entry.healthy and entry.cool_until <= now
            )

    def mark_bad(self, name: str, reason: str) -> None:
        """A server failed an attempt: let it rest, longer each time in a row."""
        with self._lock:
            entry = self._entries[name]
            entry.failures += 1
            self._rest(entry, reason, min(MAX_COOL_OFF_S, COOL_OFF_S * 2 ** min(entry.failures - 1, 10)))

    def mark_away(self, name: str, reason: str) -> None:
        """A server did not answer an attempt: ask it again before it counts, but soon, for it may be back."""
        with self._lock:
            self._rest(self._entries[name], reason, AWAY_S)

    def mark_good(self, name: str) -> None:
        """A server did its work: forget earlier failures."""
        with self._lock:
            entry = self._entries[name]
            entry.healthy, entry.reason, entry.failures, entry.cool_until = True, "", 0, 0.0

    def probe(self, name: str) -> bool:
        """
        Ask one server now, unless it cools off; returns whether it is healthy.

        An answer makes it healthy again but does not shorten its next rest, for a server whose worker
        thread is dead answers too. Only :meth:`mark_good` does.
        """
        entry = self._entries[name]
        with self._lock:
            if entry.cool_until > self._clock():
                return False
        client = self.client(name)
        try:
            remaining = client.queue_remaining(timeout_s=PROBE_TIMEOUT_S)
            client.queue(timeout_s=PROBE_TIMEOUT_S)
        except ComfyUnavailable as error:
            with self._lock:
                self._rest(entry, error.message, COOL_OFF_S)
            return False
        with self._lock:
            if entry.cool_until > self._clock():
                return False  # marked bad while it was asked
            entry.healthy, entry.reason, entry.queue_remaining = True, "", remaining
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
            now = self._clock()
            return tuple(
                ServerState(
                    name=entry.server.name,
                    healthy=entry.healthy and entry.cool_until <= now,
                    reason=entry.reason,
                    retry_in_s=max(0.0, entry.cool_until - now),
                    queue_remaining=entry.queue_remaining,
                )
                for entry in self._entries.values()
            )

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

    def _rest(self, entry: _Entry, reason: str, seconds: float) -> None:
        entry.healthy = False
        entry.reason = reason
        entry.queue_remaining = None
        entry.cool_until = max(entry.cool_until, self._clock() + seconds)
