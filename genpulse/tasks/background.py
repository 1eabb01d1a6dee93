"""
The threads behind the API and behind a worker's main process: relay, sweeper, and the API's collector.

They start after the fork (gunicorn's ``post_worker_init``, Celery's ``worker_ready``), never at
import. A worker's main process forks again whenever a child ends, so its ledger and Redis work
happens under :data:`genpulse.ledger.fork_lock` and keeps no connection that a child could inherit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import structlog

from genpulse.config import Settings
from genpulse.errors import GenPulseError, LedgerUnavailable
from genpulse.ledger import fork_lock
from genpulse.live import Ear, redis_client
from genpulse.tasks import wiring
from genpulse.tasks.collector import Collector
from genpulse.tasks.producer import Producer, RunwayView
from genpulse.tasks.relay import Relay
from genpulse.tasks.sweeper import Sweeper
from genpulse.tasks.webhooks import Bell

__all__ = ["Background", "logged", "run", "start_in_api", "stop"]

log = structlog.get_logger("genpulse.background")

POLL_S = 0.5
"""How often the relay looks when nobody wakes it."""
SWEEP_S = 1.0
COLLECT_S = 1.0


class Background:
    """
    Relay and sweeper in threads of this process; the collector too, unless the process forks.

    Args:
        forks: This process forks later on: hold the fork lock while at work.
    """

    def __init__(self, settings: Settings, *, forks: bool = False) -> None:
        self.settings = settings
        self.ledger = wiring.open_ledger(settings, pool_size=0 if forks else 3)
        self.stopping = threading.Event()
        self._forks = forks
        self._awake = threading.Event()
        self._canceled = threading.Event()
        self._live = wiring.open_live(settings)
        self._producer = Producer(settings)
        self._relay = Relay(self.ledger, self._producer, max_running=settings.max_running)
        self._view = RunwayView(redis_client(settings.redis_url.get_secret_value(), timeout_s=1.0))
        # The sweeper's own relay and producer: two threads never share one.
        others = Relay(self.ledger, Producer(settings), max_running=settings.max_running)
        self._sweeper = Sweeper(settings, self.ledger, others, self._view, self._live)
        self._bell = Bell(self.ledger, self._producer, self._view)
        self._ear = Ear(settings.redis_url.get_secret_value(), self._heard)
        self._threads = [
            threading.Thread(target=self._relay_loop, name="genpulse-relay", daemon=True),
            threading.Thread(target=self._sweep_loop, name="genpulse-sweeper", daemon=True),
        ]
        if not forks:
            storage = wiring.open_storage(settings)
            collector = Collector(settings, self.ledger, storage, is_stopping=self.stopping.is_set)
            self.run_every(COLLECT_S, collector.collect, "collector")

    def start(self) -> None:
        """Start the threads."""
        self._ear.start()
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There is something in the outbox. Called right after a commit; never waits."""
        self._awake.set()

    def announce_cancel(self) -> None:
        """
        A cancel of a running task was committed. Called in a request; never waits.

        The relay's thread tells the workers through Redis. With it away, PostgreSQL's NOTIFY has told
        them, or the next beat will.
        """
        self._canceled.set()
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

    def run_every(self, seconds: float, work: Callable[[], object], name: str) -> None:
        """Add a thread that does *work* every so often until :meth:`stop`; its failures are logged."""

        def loop() -> None:
            while not self.stopping.wait(seconds):
                with logged(name):
                    work()

        self._threads.append(threading.Thread(target=loop, name=f"genpulse-{name}", daemon=True))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """
        Around ledger and Redis work: no fork happens meanwhile, if this process forks at all.

        The work is then done on one connection to the ledger, closed at the end.
        """
        if not self._forks:
            yield
            return
        with fork_lock, self.ledger.together():
            yield

    def _heard(self, word: str) -> None:
        if word in {"task", "claim"}:
            self._awake.set()

    def _relay_loop(self) -> None:
        while not self.stopping.is_set():
            self._awake.wait(POLL_S)
            self._awake.clear()
            if self._canceled.is_set():
                self._canceled.clear()
                self._live.wake("cancel")
            with logged("relay"), self.quiet():
                # A batch is bounded: go on until the runway is full or the outbox empty.
                while self._relay.pulse() and not self.stopping.is_set():
                    pass
            with logged("webhooks"), self.quiet():
                self._bell.ring()

    def _sweep_loop(self) -> None:
        while not self.stopping.wait(SWEEP_S):
            with logged("sweeper"), self.quiet():
                self._sweeper.sweep()


@contextlib.contextmanager
def logged(name: str) -> Iterator[None]:
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


# -- Doors for gunicorn and Celery ----------------------------------------------------------------

_running: Background | None = None


def start_in_api(settings: Settings) -> Background:
    """Start relay and sweeper in this API process."""
    return run(Background(settings))


def stop() -> None:
    """Stop what was started in this process."""
    global _running  # one per process
    running, _running = _running, None
    if running is not None:
        running.stop()


def run(background: Background) -> Background:
    """Start these threads as the ones of this process, for :func:`stop`."""
    global _running  # noqa: PLW0603  # one per process
    _running = background
    background.start()
    return background
