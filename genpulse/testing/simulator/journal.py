"""
The execution log: what this server accepted, ran and threw away, in order, written as it happens.

Chaos tests compare it with what GenPulse says, so it must survive the death of the process: with a
path each entry is one line of JSON, flushed before the server goes on. Entries look like::

    {"t": 1795304257.9, "event": "started", "prompt_id": "...", "client_id": "...", "server": "gpu1"}

Events: ``boot``, ``submitted`` (with the ``seeds`` of its nodes), ``started``, ``finished`` (with ``status`` success or error, and the
``files`` really written), ``interrupted``, ``deleted``, ``lost`` (a fault forgot it), ``freed`` (its memory, as
it was asked to), ``worker_died``, ``exit``; and who follows a prompt: ``listening`` (a socket of that client id
was opened), ``read`` (its history entry was given out).
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Journal"]

_KEPT = 100_000
"""Entries kept in memory for ``GET /simulator/log``; the file has all of them."""


class Journal:
    """
    An append-only log in memory and, if *path* is given, in a file that several runs may share.

    ``listener`` is called after an entry is safe; the server uses it to crash at a chosen event.
    """

    def __init__(self, path: Path | None = None, *, server: str = "") -> None:
        self.listener: Callable[[str], None] | None = None
        self._server = server
        self._entries: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def add(self, event: str, prompt_id: str | None = None, client_id: object = None, **more: Any) -> None:
        """Write one entry; when this returns, a reader of the file sees the whole line."""
        entry: dict[str, Any] = {"t": time.time(), "event": event}
        if prompt_id is not None:
            entry["prompt_id"] = prompt_id
        if prompt_id is not None or client_id is not None:
            entry["client_id"] = client_id
        entry |= more
        if self._server:
            entry["server"] = self._server
        with self._lock:
            self._entries.append(entry)
            if self._file is not None:
                self._file.write(json.dumps(entry, default=str) + "\n")
                self._file.flush()
        if self.listener is not None:
            self.listener(event)

    def entries(self) -> list[dict[str, Any]]:
        """A copy of what is in memory, oldest first."""
        with self._lock:
            return list(self._entries)

    def close(self) -> None:
        """Close the file; later entries are only kept in memory."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
