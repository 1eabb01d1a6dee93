"""
The threads behind the API and behind a worker's main process: relay, sweeper, presence, janitor.

They start after the fork (gunicorn's ``post_worker_init``, Celery's ``worker_ready``), never at
import. A worker's main process forks again whenever a child ends, so its ledger and Redis work
happens under :data:`genpulse.ledger.fork_lock` and keeps no connection that a child could inherit.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import structlog

import genpulse
from genpulse.comfy.pool import ServerPool
from genpulse.config import Settings
from genpulse.errors import ComfyUnavailable, GenPulseError, LedgerUnavailable
from genpulse.ledger import ProcessSession, fork_lock
from genpulse.live import Ear, redis_client
from genpulse.tasks import queues, wiring
from genpulse.tasks.producer import Producer, RunwayView
from genpulse.tasks.relay import Relay
from genpulse.tasks.sweeper import Sweeper

__all__ = [
    "Background",
    "WorkerBackground",
    "begin_drain",
    "is_draining",
    "start_in_api",
    "start_in_worker",
    "stop",
]

log = structlog.get_logger("genpulse.background")

POLL_S = 0.5
"""How often the relay looks when nobody wakes it."""
SWEEP_S = 1.0
JANITOR_S = 0.5


class Background:
    """
    Relay and sweeper in threads of this process, each with a ledger of its own.

    Args:
        forks: This process forks later on: hold the fork lock while at work.
    """

    def __init__(self, settings: Settings, *, forks: bool = False) -> None:
        self.settings = settings
        self.ledger = wiring.open_ledger(settings, pool_size=0 if forks else 2)
        self.stopping = threading.Event()
        self._forks = forks
        self._awake = threading.Event()
        self._producer = Producer(settings)
        self._relay = Relay(self.ledger, self._producer)
        self._view = RunwayView(redis_client(settings.redis_url.get_secret_value(), timeout_s=1.0))
        # The sweeper's own relay and producer: two threads never share one.
        self._sweeper = Sweeper(settings, self.ledger, Relay(self.ledger, Producer(settings)), self._view)
        self._ear = Ear(settings.redis_url.get_secret_value(), self._heard)
        self._threads = [
            threading.Thread(target=self._relay_loop, name="genpulse-relay", daemon=True),
            threading.Thread(target=self._sweep_loop, name="genpulse-sweeper", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads."""
        self._ear.start()
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There is something in the outbox. Called right after a commit; never waits."""
        self._awake.set()

    def stop(self, wait_s: float = 3.0) -> None:
        """End the threads, waiting for each at most *wait_s* seconds."""
        self.stopping.set()
        self._awake.set()
        self._ear.stop()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(wait_s)
        self._producer.close()
        self.ledger.close()

    def run_every(self, seconds: float, work: Callable[[], None], name: str) -> None:
        """Add a thread that does *work* every so often until :meth:`stop`; its failures are logged."""

        def loop() -> None:
            while not self.stopping.wait(seconds):
                with _logged(name):
                    work()

        self._threads.append(threading.Thread(target=loop, name=f"genpulse-{name}", daemon=True))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Around ledger and Redis work: no fork happens meanwhile, if this process forks at all."""
        if not self._forks:
            yield
            return
        with fork_lock:
            yield

    def _heard(self, word: str) -> None:
        if word in {"task", "claim"}:
            self._awake.set()

    def _relay_loop(self) -> None:
        while not self.stopping.is_set():
            self._awake.wait(POLL_S)
            self._awake.clear()
            with _logged("relay"), self.quiet():
                # A batch is bounded: go on until the runway is full or the outbox empty.
                while self._relay.pulse() and not self.stopping.is_set():
                    pass

    def _sweep_loop(self) -> None:
        while not self.stopping.wait(SWEEP_S):
            with _logged("sweeper"), self.quiet():
                self._sweeper.sweep()


class WorkerBackground(Background):
    """
    What a worker's main process adds: its row in the ledger, its servers' health, its strays.

    Args:
        consumer: Celery's consumer, to stop and start consuming with the health of the servers.
    """

    def __init__(self, settings: Settings, consumer: Any) -> None:
        super().__init__(settings, forks=True)
        self._consumer = consumer
        self._name = str(consumer.hostname)
        self._pool: ServerPool = wiring.open_pool(settings)
        self._session = ProcessSession(self.ledger, _direct_url(settings))
        self._paused: set[str] = set()
        self.run_every(min(settings.beat_s, 2.0), self._present, "presence")
        if settings.servers:
            self.run_every(JANITOR_S, self._clean, "janitor")

    def start(self) -> None:
        """Register at once, so that the runway knows the slots, then start the threads."""
        with _logged("presence"):
            self._present()
        super().start()

    def stop(self, wait_s: float = 3.0) -> None:
        """Stop, and leave no row behind."""
        with _logged("presence"), self.quiet():
            self.ledger.forget_worker(self._name, self._session.key)
            self._session.release()
        super().stop(wait_s)

    def _present(self) -> None:
        self._pool.probe_all()
        consuming = self._consume_if_healthy()
        with self.quiet():
            with contextlib.suppress(LedgerUnavailable):
                self._session.hold()
            self.ledger.register_worker(
                name=self._name,
                host=socket.gethostname(),
                pid=os.getpid(),
                queues=self._queue_names(),
                servers=[state.as_dict() for state in self._pool.states()],
                slots=int(self._consumer.pool.num_processes or 1),
                consuming=consuming and not is_draining(),
                session_key=self._session.key,
                version=genpulse.__version__,
            )

    def _queue_names(self) -> list[str]:
        consumed = {str(name) for name in self._consumer.app.amqp.queues.consume_from}
        return sorted(consumed | self._paused)

    def _consume_if_healthy(self) -> bool:
        """
        Stop consuming the queues that need a ComfyUI server while none is healthy, and begin again.

        Celery's consumer belongs to the main thread's loop: ``call_soon`` hands the change over.
        """
        if not self.settings.servers:
            return True
        healthy = bool(self._pool.healthy())
        if healthy and self._paused:
            names, self._paused = self._paused, set()
            log.info("consuming_again", queues=sorted(names))
            for name in names:
                self._consumer.call_soon(self._consumer.add_task_queue, name)
        elif not healthy and not self._paused:
            names = {
                name
                for name in map(str, self._consumer.app.amqp.queues.consume_from)
                if queues.describe(queues.base_queue(name)).on_servers
            }
            log.warning("not_consuming", reason="no healthy ComfyUI server", queues=sorted(names))
            self._paused = names
            for name in names:
                self._consumer.call_soon(self._consumer.cancel_task_queue, name)
        return healthy

    def _clean(self) -> None:
        """Stop prompts on our servers that nobody waits for any more."""
        names = [server.name for server in self.settings.servers]
        with self.quiet():
            strays = self.ledger.strays_on(names)
        for stray in strays:
            client = self._pool.client(stray.server)
            try:
                gone = client.stop(stray.prompt_id, within_s=2.0).is_over
            except ComfyUnavailable as error:
                gone = error.refused
            if gone:
                log.info("stray_gone", server=stray.server, prompt_id=stray.prompt_id, task_id=stray.task_id)
                with self.quiet():
                    self.ledger.forget_stray(stray)


@contextlib.contextmanager
def _logged(name: str) -> Iterator[None]:
    """The edge of a thread: an outage is one line, anything else a traceback; the thread goes on."""
    try:
        yield
    except LedgerUnavailable as error:
        _log_seldom(name, str(error))
    except GenPulseError as error:
        log.warning("background_failed", part=name, error=str(error))
    except Exception:
        log.exception("background_failed", part=name)


_logged_at: dict[str, float] = {}


def _log_seldom(name: str, reason: str) -> None:
    if time.monotonic() - _logged_at.get(name, -60.0) > 30.0:  # one line in half a minute
        _logged_at[name] = time.monotonic()
        log.warning("ledger_away", part=name, reason=reason)


def _direct_url(settings: Settings) -> str | None:
    return settings.ledger_direct_url if settings.database_direct_url.get_secret_value() else None


# -- The drain flag: one byte that a worker's main process shares with its children ---------------

_shared: mmap.mmap | None = None


def prepare_drain() -> None:
    """Make the shared flag. Called before the first fork, so that every child sees the same byte."""
    global _shared  # noqa: PLW0603  # one per worker, inherited by its children
    if _shared is None:
        _shared = mmap.mmap(-1, mmap.PAGESIZE)


def begin_drain() -> None:
    """Tell this worker and its children to take no more and to hand back what they have."""
    prepare_drain()
    assert _shared is not None
    if not _shared[0]:
        log.info("draining")
    _shared[0] = 1


def is_draining() -> bool:
    """Whether this worker was told to stop."""
    return _shared is not None and bool(_shared[0])


# -- Doors for gunicorn and Celery ----------------------------------------------------------------

_running: Background | None = None


def start_in_api(settings: Settings) -> Background:
    """Start relay and sweeper in this API process."""
    return _start(Background(settings))


def start_in_worker(consumer: Any) -> Background:
    """Start everything that a worker's main process does besides Celery's own work."""
    return _start(WorkerBackground(Settings.from_env(), consumer))


def stop() -> None:
    """Stop what was started in this process."""
    global _running  # one per process
    running, _running = _running, None
    if running is not None:
        running.stop()


def _start(background: Background) -> Background:
    global _running  # noqa: PLW0603  # one per process
    _running = background
    background.start()
    return background
