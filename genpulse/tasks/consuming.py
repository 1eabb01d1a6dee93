"""
Notices a worker that lives and does not consume, and restarts it.

After some reconnects Celery's consumer is alive and deaf: it waits on a socket that nobody reads, or
believes its slots taken that are free, or its loop hangs. Nothing else shows it: the process runs, the
leases are renewed, the row in the ledger is fresh. Seen from outside of the consumer it is plain,
though: a child is free, Redis answers *us*, and the consumer has had no answer from it for many times
as long as it ever waits for one, or a message lies in a queue of ours and is not taken.

First the consumer is made to connect anew, as after a lost connection. If that does not help, the
worker drains as for SIGTERM, so that its prompts run on and are adopted, and starts again in the same
process, so that it needs no supervisor and a supervisor sees no exit. Why so: ``docs/decisions/0004``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

import structlog

from genpulse.tasks.drain import begin_drain, is_draining

__all__ = ["ConsumerWatch", "Pulse", "Sight", "restart_worker"]

log = structlog.get_logger("genpulse.consuming")

WEDGED_S = 15.0
"""A consumer waits a second for an answer of Redis, and is back some 8 s after a connection died silently."""
GAP_S = 5.0
"""Looks further apart than this say nothing: this process did not run in between."""
ENDS_WITHIN_S = 10.0
"""How long a worker that is told to restart may take beyond its drain before it is made to."""
EX_TEMPFAIL = 75
"""Of sysexits.h: the supervisor should try again."""


@dataclass(slots=True)
class Pulse:
    """What the consumer's connection tells of itself; times are monotonic."""

    answered_at: float = 0.0
    """When Redis last answered a wait for messages, with one or with none."""
    delivered_at: float = 0.0
    """When a message last came."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What one look sees."""

    free: bool
    """A child is free, some queue is consumed, and the worker is not told to stop."""
    broker: bool
    """Redis answered us."""
    waiting: int = 0
    """Messages in the queues that this worker consumes."""


@dataclass(slots=True)
class ConsumerWatch:
    """
    Judges by looks, one a second; any thread, but one at a time.

    Args:
        pulse: Of the consumer.
        reconnect: Makes the consumer connect anew.
        restart: Makes the worker start again. Neither waits.
    """

    pulse: Pulse
    reconnect: Callable[[], None]
    restart: Callable[[], None]
    clock: Callable[[], float] = time.monotonic
    _looked_at: float = field(default=0.0, init=False)
    _silent_since: float | None = field(default=None, init=False)
    _starving_since: float | None = field(default=None, init=False)
    _last: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    _reconnected: bool = field(default=False, init=False)

    def look(self, sight: Sight) -> None:
        """Take one look, and act if the consumer has been deaf for :data:`WEDGED_S` without a break."""
        now = self.clock()
        gap, self._looked_at = now - self._looked_at, now
        (answered, delivered), self._last = self._last, (self.pulse.answered_at, self.pulse.delivered_at)
        if not sight.free or not sight.broker or gap > GAP_S:
            self._silent_since = self._starving_since = None
            return
        if answered != self.pulse.answered_at:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        if delivered != self.pulse.delivered_at or not sight.waiting:
            self._starving_since = None
        elif self._starving_since is None:
            self._starving_since = now
        since = min((each for each in (self._silent_since, self._starving_since) if each), default=None)
        if since is None:
            self._reconnected = False
        elif now - since >= WEDGED_S:
            self._silent_since = self._starving_since = None
            self._act(sight, now - since)

    def _act(self, sight: Sight, silent_s: float) -> None:
        act = "restart" if self._reconnected else "reconnect"
        log.error("consumer_deaf", act=act, waiting=sight.waiting, for_s=round(silent_s, 1))
        if self._reconnected:
            self.restart()
        else:
            self._reconnected = True
            self.reconnect()


def reconnect_consumer(consumer: Any) -> None:
    """Let Celery's consumer lose its connection: it builds all of it anew."""

    def lose() -> NoReturn:
        msg = "the consumer does not consume"
        raise ConnectionError(msg)

    consumer.call_soon(lose)


def restart_worker(drain_s: float, children: Callable[[], Collection[int]]) -> None:
    """
    Drain this worker and start it again in this very process; returns at once.

    The main thread ends the worker in order, if it still does anything; if not, the children are
    ended here once they have handed back.
    """
    threading.Thread(target=_restart, args=(drain_s, children), name="genpulse-restart", daemon=True).start()


def _restart(drain_s: float, children: Callable[[], Collection[int]]) -> None:
    import atexit

    from celery.worker import state

    begin_drain()
    atexit.register(_start_again)
    # The event loop looks at it at every turn, as after a signal.
    state.should_stop = EX_TEMPFAIL  # type: ignore[assignment]  # the stubs know its first value only
    ends = time.monotonic() + drain_s + ENDS_WITHIN_S
    while time.monotonic() < ends:
        time.sleep(0.2)
    log.error("worker_hangs", act="start again without its main thread")
    _end(children())
    _start_again()


def _end(children: Collection[int]) -> None:
    """Kill and collect them: the new worker would not know that the dead are its own."""
    left = set(children)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ends = time.monotonic() + 5.0
    while left and time.monotonic() < ends:
        for pid in tuple(left):
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    left.discard(pid)
            except ChildProcessError:  # collected by the main thread
                left.discard(pid)
        time.sleep(0.02)


def _start_again() -> NoReturn:
    """Become a new worker with the same command line, process id and supervisor."""
    log.warning("worker_starts_again")
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # our own command line
    except OSError:
        log.exception("worker_cannot_start_again")
        os._exit(EX_TEMPFAIL)


def sees_free(children: dict[int, bool], consumes: bool) -> bool:
    """Whether a child is free to take what the consumer should bring."""
    return consumes and not is_draining() and not all(children.values())
