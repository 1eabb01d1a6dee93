"""
The queue and the history of one server, in memory only: a restart forgets both.

The queue is a heap, and ``GET /queue`` shows it as it lies in memory, which is not the order of execution.
Moving a prompt from pending to running and from running to history is atomic under one lock.

Source: ComfyUI 0.3.64 ``execution.PromptQueue``; traces 09, 10, 23, 25, 34.
"""

from __future__ import annotations

import copy
import heapq
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Item", "PromptQueue"]

Item = tuple[float, str, Any, Any, list[str]]
"""``(number, prompt_id, prompt, extra_data, output node ids)``, compared in this order by the heap."""

_SENSITIVE = ("auth_token_comfy_org", "api_key_comfy_org")
_HISTORY_SIZE = 10_000


class PromptQueue:
    """*changed* is called, under the lock, whenever the number of waiting or running prompts may differ."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.RLock()
        self._not_empty = threading.Condition(self._lock)
        self._pending: list[Item] = []
        self._running: dict[int, Item] = {}
        self._history: dict[str, dict[str, Any]] = {}
        self._flags: dict[str, Any] = {}
        self._next_slot = 0

    def put(self, item: Item) -> None:
        """
        Queue a prompt.

        Raises:
            TypeError: Number and prompt_id equal those of a waiting one, so the heap compares the prompts
                themselves. The item is in the queue all the same [trace 23].
        """
        with self._lock:
            heapq.heappush(self._pending, item)
            self._changed()
            self._not_empty.notify()

    def get(self, timeout_s: float) -> tuple[int, Item] | None:
        """Take the first prompt and mark it running; None when there is none for *timeout_s*."""
        with self._not_empty:
            if not self._pending and not self._flags:
                self._not_empty.wait(timeout_s)
            if not self._pending:
                return None
            item = heapq.heappop(self._pending)
            slot, self._next_slot = self._next_slot, self._next_slot + 1
            self._running[slot] = copy.deepcopy(item)
            self._changed()
            return slot, item

    def done(self, slot: int, result: dict[str, Any], status: dict[str, Any]) -> None:
        """Move a running prompt into the history, without its secrets; the oldest entry makes room."""
        with self._lock:
            item = self._running.pop(slot)
            if len(self._history) > _HISTORY_SIZE:
                del self._history[next(iter(self._history))]
            for key in _SENSITIVE:
                if key in item[3]:
                    del item[3][key]
            self._history[item[1]] = {"prompt": item, "outputs": {}, "status": status} | result
            self._changed()

    def remaining(self) -> int:
        """How many wait or run."""
        with self._lock:
            return len(self._pending) + len(self._running)

    def listing(self) -> tuple[list[Item], list[Item]]:
        """What runs and what waits, the latter in heap order. The items must not be changed."""
        with self._lock:
            return list(self._running.values()), list(self._pending)

    def delete(self, prompt_id: object) -> Item | None:
        """Take out the first waiting prompt of this id [trace 23]; None if there is none."""
        with self._lock:
            for place, item in enumerate(self._pending):
                if item[1] == prompt_id:
                    del self._pending[place]
                    heapq.heapify(self._pending)
                    self._changed()
                    return item
            return None

    def clear(self) -> list[Item]:
        """Take out everything that waits."""
        with self._lock:
            gone, self._pending = self._pending, []
            self._changed()
            return gone

    def running_ids(self) -> list[str]:
        """The ids of what runs now."""
        with self._lock:
            return [item[1] for item in self._running.values()]

    def history(
        self, prompt_id: str | None = None, *, max_items: int | None = None, offset: int = -1
    ) -> dict[str, Any]:
        """Entries by prompt id, oldest first; *max_items* alone means the newest [trace 25]."""
        with self._lock:
            if prompt_id is not None:
                return {prompt_id: self._history[prompt_id]} if prompt_id in self._history else {}
            if offset < 0 and max_items is not None:
                offset = len(self._history) - max_items
            found: dict[str, Any] = {}
            for place, (key, entry) in enumerate(self._history.items()):
                if place >= offset:
                    found[key] = entry
                    if max_items is not None and len(found) >= max_items:
                        break
            return found

    def clear_history(self) -> None:
        """Forget all that has ended."""
        with self._lock:
            self._history = {}

    def delete_history(self, prompt_id: str) -> None:
        """Forget one entry; unknown ids are fine."""
        with self._lock:
            self._history.pop(prompt_id, None)

    def set_flag(self, name: str, value: Any) -> None:
        """Ask the worker to free something when it is idle (``POST /free``)."""
        with self._lock:
            self._flags[name] = value
            self._not_empty.notify()

    def take_flags(self) -> dict[str, Any]:
        """What the worker was asked to free since the last time."""
        with self._lock:
            flags, self._flags = self._flags, {}
            return flags

    def wake(self) -> None:
        """Let a waiting worker look again, for instance because the server ends."""
        with self._lock:
            self._not_empty.notify_all()
