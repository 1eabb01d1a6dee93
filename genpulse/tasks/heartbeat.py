"""
Keeps the leases of one worker child, in its own thread and on its own connection.

Every two seconds one statement renews all leases of the process and tells which attempts were
canceled, are past their deadline, or were taken over. A notification (PostgreSQL's, or Redis')
makes the next beat come at once, so that a cancel arrives in milliseconds; if both are away, the
beat brings it. While the ledger is away nothing is renewed, and nothing is lost either: nobody can
claim. An attempt that does not obey its deadline within :data:`KILL_AFTER_S` ends with its process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from genpulse.config import Settings
from genpulse.errors import (
    DeadlineExceeded,
    Draining,
    LeaseLost,
    LedgerUnavailable,
    StopAttempt,
    TaskCanceled,
)
from genpulse.ledger import Beat, Ledger, ProcessSession
from genpulse.live import Ear
from genpulse.model import ErrorInfo, Fence, TaskStatus
from genpulse.tasks import wiring

__all__ = ["Heartbeat", "Signals"]

log = structlog.get_logger("genpulse.heartbeat")

KILL_AFTER_S = 30.0
"""How long after its deadline an attempt may take to end before its process is ended."""
_LOOK_S = 0.5

TIMEOUT = ErrorInfo(code="timeout", message="Rendering took longer than the task's timeout_s.")


@dataclass(slots=True)
class Signals:
    """
    What an attempt is told from outside. Written by the heartbeat, read by the attempt.

    The order of :meth:`check` is the order of what matters: an attempt that lost its lease may not
    even act on a cancel.
    """

    lost: bool = False
    canceled: bool = False
    late_since: float | None = None
    drain_at: float | None = None
    """Monotonic time at which a draining worker hands this attempt back."""
    renewed_at: float = field(default_factory=time.monotonic)
    """Monotonic time of the last beat that found the lease ours; goes on while a process is frozen."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set together with any of the above, for whoever sleeps."""

    def check(self) -> None:
        """Raise what this attempt must end with, if it must."""
        if self.lost:
            raise LeaseLost
        if self.canceled:
            msg = "The task was canceled."
            raise TaskCanceled(msg)
        if self.late_since is not None:
            raise DeadlineExceeded(TIMEOUT.message)
        if self.drain_at is not None and time.monotonic() >= self.drain_at:
            raise Draining

    def pending(self) -> StopAttempt | None:
        """What :meth:`check` would raise now."""
        try:
            self.check()
        except StopAttempt as stop:
            return stop
        return None


class Heartbeat:
    """
    The lease thread of one process. Make and start it after the fork.

    Args:
        worker_drains: Whether the whole worker was told to stop; asked twice a second.
    """

    def __init__(self, settings: Settings, worker_drains: Callable[[], bool]) -> None:
        self._settings = settings
        self._worker_drains = worker_drains
        self._ledger: Ledger = wiring.open_ledger(settings)
        self._session = ProcessSession(self._ledger, settings.direct_url_if_any)
        self._runs: dict[str, tuple[Fence, Signals]] = {}
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._stopping = threading.Event()
        self._holds = threading.Event()
        self._told_to_drain = False
        self._thread = threading.Thread(target=self._run, name="genpulse-heartbeat", daemon=True)
        self._ear = Ear(settings.redis_url.get_secret_value(), self._heard)

    @property
    def session_key(self) -> int:
        """What this process holds while it lives; written beside its leases."""
        return self._session.key

    def start(self) -> None:
        """Start the thread and wait a moment for the session, so that a first claim is covered by it."""
        self._thread.start()
        self._ear.start()
        self._holds.wait(2.0)

    def stop(self) -> None:
        """Stop renewing and let go of the session."""
        self._stopping.set()
        self._ear.stop()
        self._wake()
        self._thread.join(2.0)

    def watch(self, fence: Fence, signals: Signals) -> None:
        """Renew this attempt's lease from now on, and write to *signals* what is learned."""
        with self._lock:
            self._runs[fence.claim] = (fence, signals)
        self._look_at_drain()

    def forget(self, fence: Fence) -> None:
        """The attempt has ended."""
        with self._lock:
            self._runs.pop(fence.claim, None)
            if not self._runs:
                self._told_to_drain = False

    def drain(self) -> None:
        """This child alone was told to stop: hand its attempt back. Safe in a signal handler."""
        self._told_to_drain = True
        self._wake()

    @property
    def is_busy(self) -> bool:
        """Whether an attempt is running."""
        return bool(self._runs)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        beat_at = time.monotonic()
        while not self._stopping.is_set():
            try:
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + self._settings.beat_s
                    self._beat()
                self._look_at_drain()
                words = self._session.wait(min(_LOOK_S, beat_at - time.monotonic()), self._reader)
                if "cancel" in words or self._drain_pipe():
                    beat_at = time.monotonic()
            except LedgerUnavailable as error:
                log.warning("beat_missed", reason=str(error))
                beat_at = time.monotonic() + min(1.0, self._settings.beat_s)
                self._stopping.wait(0.2)
            except Exception:  # the edge of a thread that must never end before its process
                log.exception("beat_failed")
                self._stopping.wait(1.0)
        with contextlib.suppress(Exception):  # the process ends; the server notices either way
            self._session.release()
            self._ledger.close()

    def _beat(self) -> None:
        with self._lock:
            runs = dict(self._runs)
        try:
            self._session.hold()
            beats = self._session.renew(runs.keys(), self._settings.lease_s) if runs else {}
        except LedgerUnavailable as error:
            if not runs:
                raise
            # Behind a pooler the session has an address of its own, and a full database refuses one more
            # connection: as long as there is any way to the ledger, the leases are kept by it.
            beats = self._ledger.renew(runs.keys(), self._settings.lease_s)
            log.warning("session_not_held", reason=str(error))
        else:
            self._holds.set()
        self._apply(runs, beats)

    def _apply(self, runs: Mapping[str, tuple[Fence, Signals]], beats: Mapping[str, Beat]) -> None:
        for claim, (fence, signals) in runs.items():
            beat = beats.get(claim)
            if beat is None:
                with self._lock:
                    ended = claim not in self._runs
                if not ended:
                    signals.lost = True
            else:
                signals.renewed_at = time.monotonic()
                signals.canceled = signals.canceled or beat.cancel
                if beat.late and signals.late_since is None:
                    signals.late_since = time.monotonic()
            if signals.lost or signals.canceled or signals.late_since is not None:
                signals.stopped.set()
            late_s = time.monotonic() - signals.late_since if signals.late_since is not None else 0.0
            if late_s > KILL_AFTER_S and not signals.lost:
                self._end_process(fence)

    def _end_process(self, fence: Fence) -> None:
        """The attempt ignores its deadline: write its end for it and take its process away."""
        log.error("attempt_killed", task_id=fence.task_id, attempt=fence.attempt, reason="deadline ignored")
        with contextlib.suppress(LedgerUnavailable):
            self._ledger.finish(fence, TaskStatus.FAILED, error=TIMEOUT, leaves_prompt=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def _look_at_drain(self) -> None:
        if not (self._told_to_drain or self._worker_drains()):
            return
        with self._lock:
            runs = list(self._runs.values())
        for _, signals in runs:
            if signals.drain_at is None:
                signals.drain_at = time.monotonic() + self._settings.drain_s

    def _heard(self, word: str) -> None:
        if word == "cancel":
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: the thread is awake already
            os.write(self._writer, b"!")

    def _drain_pipe(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._reader, 4096))
        return False
