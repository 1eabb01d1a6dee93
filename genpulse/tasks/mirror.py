"""
Between Celery's world and the ledger, where the ledger is right.

- :class:`MirroredRedisBackend` shows results to Celery's own tools (Flower, ``AsyncResult``). The
  truth was written by the task itself, so this copy may fail: it never raises and never hangs.
- :class:`ParentNotes` tells the ledger what only the worker's main process sees: a child that died,
  a hard limit, a revoke. In a thread, for the main process must go on serving the broker.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from celery.backends.redis import RedisBackend

__all__ = ["MirroredRedisBackend", "ParentNotes", "forget_parent", "parent_notes"]

log = logging.getLogger("genpulse.mirror")

PAUSE_S = 5.0
"""How long the mirror leaves Redis alone after a failure, so that no task pays for each other's."""

T = TypeVar("T")

NOTE_TRY_S = 30.0
"""How long a note is tried. After that the lease's own end says the same."""


class MirroredRedisBackend(RedisBackend):
    """
    Celery's Redis result backend, made harmless.

    A backend that raises turns a success into a failure while Redis is away, and one that waits
    holds the worker's event loop: Celery's 20 retries of a dead Redis are 20 s without a task.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._quiet_until = 0.0
        # Celery's own is 20 tries, a second apart.
        self.retry_policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Copy a result to Redis if Redis takes it; returns it as the base class encodes it."""
        store = super().store_result
        return self._harmless(
            lambda: store(task_id, result, state, traceback=traceback, request=request, **kwargs), result
        )

    def get_task_meta(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        """What Redis knows; a Redis that is away knows nothing, which Celery calls ``PENDING``."""
        read = super().get_task_meta
        nothing = {"task_id": task_id, "status": "PENDING", "result": None}
        return self._harmless(lambda: read(task_id, *args, **kwargs), nothing)

    def _set(self, key: str, value: Any, expires: int | None = None) -> None:
        # The base class uses SETEX, which redis-py 8 deprecates.
        with self.client.pipeline() as pipe:
            pipe.set(key, value, ex=(self.expires if expires is None else expires) or None)  # type: ignore[attr-defined]  # the stubs lack the base class's field
            pipe.publish(key, value)
            pipe.execute()

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to nothing: the base class would hold one channel for each task, for ever."""

    def _harmless(self, act: Callable[[], T], otherwise: T) -> T:
        """Do *act* unless it failed within :data:`PAUSE_S`; *otherwise* stands for any failure."""
        if time.monotonic() < self._quiet_until:
            return otherwise
        try:
            return act()
        except Exception as error:  # noqa: BLE001 - whatever it is, the ledger has the truth already
            self._quiet_until = time.monotonic() + PAUSE_S
            log.warning("result_not_mirrored", extra={"error": type(error).__name__})
            return otherwise


Act = Callable[[str, "str | None"], None]


class ParentNotes:
    """
    Tells the ledger what the main process saw, one note after the other, in a thread of its own.

    Args:
        act: Called with ``(task id, worker)`` to end that worker's lease on the task, or with
            ``(task id, None)`` to cancel the task. May raise, and is then called again.
        try_s: How long one note is tried; it is forgotten afterwards.
    """

    def __init__(self, act: Act, *, try_s: float = NOTE_TRY_S) -> None:
        self._act = act
        self._try_s = try_s
        self._notes: queue.Queue[tuple[str, str | None, float]] = queue.Queue(maxsize=10_000)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once. Only a worker's main process does this, after it forked."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="genpulse-notes", daemon=True)
            self._thread.start()

    def lease_over(self, task_id: str, worker: str) -> None:
        """The child *worker* (``node:pid``) is gone, and with it its lease on the task. Never waits."""
        self._put(task_id, worker)

    def canceled(self, task_id: str) -> None:
        """Somebody revoked the task. Never waits."""
        self._put(task_id, None)

    def stop(self, *, wait_s: float = 3.0) -> None:
        """Do what is noted, and wait for it at most *wait_s* seconds."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def _put(self, task_id: str, worker: str | None) -> None:
        try:
            self._notes.put_nowait((task_id, worker, time.monotonic() + self._try_s))
        except queue.Full:
            log.warning("note_dropped", extra={"task_id": task_id})

    def _run(self) -> None:
        while True:
            try:
                task_id, worker, until = self._notes.get(timeout=0.2)
            except queue.Empty:
                if self._stopping.is_set():
                    return
                continue
            self._do(task_id, worker, until)

    def _do(self, task_id: str, worker: str | None, until: float) -> None:
        pause = 0.2
        while True:
            try:
                self._act(task_id, worker)
            except Exception as error:  # noqa: BLE001 - the edge of a thread; the lease's end says the same
                if self._stopping.is_set() or time.monotonic() + pause > until:
                    what = "lease" if worker else "cancel"
                    log.warning(
                        "note_not_written", extra={"task_id": task_id, "what": what, "error": str(error)}
                    )
                    return
                self._stopping.wait(pause)
                pause = min(2 * pause, 2.0)
            else:
                return


def write_to_ledger(task_id: str, worker: str | None) -> None:
    """
    Put one note into the ledger, on a connection that is opened and closed for it.

    The main process forks a child for each one that ends, so this holds the fork lock.

    Raises:
        LedgerUnavailable: The database did not answer.
    """
    from genpulse.config import Settings
    from genpulse.ledger import fork_lock
    from genpulse.tasks.wiring import open_ledger, open_live

    with fork_lock:
        settings = Settings.from_env()
        ledger = open_ledger(settings)
        try:
            if worker is None:
                ledger.cancel(task_id)
                live = open_live(settings)
                live.wake("cancel")
                live.close()
            else:
                ledger.end_lease_of(worker, task_id)
        finally:
            ledger.close()


_notes: ParentNotes | None = None


def parent_notes() -> ParentNotes:
    """The notes of this main process."""
    global _notes  # noqa: PLW0603 - one per process, built on first use
    if _notes is None:
        _notes = ParentNotes(write_to_ledger)
    return _notes


def forget_parent() -> None:
    """In a child just forked: the parent's notes and their thread are not ours."""
    global _notes  # noqa: PLW0603 - one per process
    _notes = None
