"""
What a worker's main process does besides Celery's own work: it is seen, and it looks after its servers.

Its row in the ledger is its heartbeat. It consumes queues that need a ComfyUI server only while one of
its own is healthy, and it stops the prompts on its servers that nobody waits for any more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any

import structlog

import genpulse
from genpulse.comfy.client import Place
from genpulse.comfy.pool import Server, ServerPool
from genpulse.config import Settings
from genpulse.errors import ComfyUnavailable, LedgerUnavailable
from genpulse.ledger import ProcessSession, Stray
from genpulse.live import redis_client
from genpulse.tasks import background, queues
from genpulse.tasks.background import Background, logged
from genpulse.tasks.board import board
from genpulse.tasks.broker import pulse
from genpulse.tasks.consuming import ConsumerWatch, Sight, reconnect_consumer, restart_worker, sees_free
from genpulse.tasks.drain import is_draining
from genpulse.tasks.producer import BrokerUnavailable, RunwayView
from genpulse.telemetry import metrics

__all__ = ["WorkerBackground", "open_pool", "start_in_worker"]

log = structlog.get_logger("genpulse.presence")

JANITOR_S = 0.5
WATCH_S = 1.0
OTHERS_FRESH_S = 8.0
"""How old the word of another worker may be: it asks its servers every 2 s, and for 5 s at most."""
UNOBEYED_S = 30.0
"""A prompt that goes on for so long although it was told to stop: its server may be dead behind its HTTP."""


def open_pool(settings: Settings) -> ServerPool:
    """The ComfyUI servers of this worker; what one of its processes finds out holds for all of them."""
    return ServerPool([Server(server.name, server.url) for server in settings.servers], marks=board())


def start_in_worker(consumer: Any) -> Background:
    """Start relay, sweeper, presence and janitor in this worker's main process."""
    settings = Settings.from_env()
    if settings.metrics_port:
        metrics.start("worker")
        metrics.serve(settings.metrics_host, settings.metrics_port)
    return background.run(WorkerBackground(settings, consumer))


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
        self._pool: ServerPool = open_pool(settings)
        self._session = ProcessSession(self.ledger, settings.direct_url_if_any)
        self._paused: set[str] = set()
        self._resuming: dict[str, int] = {}
        """To be consumed again, and how often they were seen so: a cancel may still be on its way."""
        self._slots = 1
        self._disobeys_since: dict[str, float] = {}
        self._queues_seen = RunwayView(redis_client(settings.redis_url.get_secret_value(), timeout_s=1.0))
        self._watch = ConsumerWatch(
            pulse,
            reconnect=lambda: reconnect_consumer(consumer),
            restart=lambda: restart_worker(settings.drain_s, self._children),
        )
        self.run_every(min(settings.beat_s, 2.0), self._present, "presence")
        self.run_every(WATCH_S, self._watch_consumer, "watch")
        if settings.servers:
            self.run_every(JANITOR_S, self._clean, "janitor")

    def start(self) -> None:
        """Register at once, so that the runway knows the slots, then start the threads."""
        with logged("presence"):
            self._present()
        super().start()

    def stop(self, wait_s: float = 3.0) -> None:
        """Stop, and leave no row behind."""
        with logged("presence"), self.quiet():
            self.ledger.forget_worker(self._name, self._session.key)
            self._session.release()
        super().stop(wait_s)

    def _present(self) -> None:
        serves = any(queues.describe(queues.base_queue(name)).on_servers for name in self._queue_names())
        if serves:
            self._pool.probe_all()
        consuming = self._consume_if_healthy() if serves else True
        with self.quiet():
            with contextlib.suppress(LedgerUnavailable):
                self._session.hold()
            self.ledger.register_worker(
                name=self._name,
                host=socket.gethostname(),
                pid=os.getpid(),
                queues=self._queue_names(),
                # A worker for other queues serves no server, whatever its settings name: a task that is
                # bound to one would wait for it in vain.
                servers=[state.as_dict() for state in self._pool.states()] if serves else [],
                slots=self._count_slots(),
                consuming=consuming and not is_draining(),
                session_key=self._session.key,
                version=genpulse.__version__,
            )

    def _count_slots(self) -> int:
        """The children that Celery keeps; once its pool has ended, as many as there were."""
        with contextlib.suppress(AttributeError):
            self._slots = int(self._consumer.pool.num_processes or 1)
        return self._slots

    def _queue_names(self) -> list[str]:
        return sorted({*self._consumed(), *self._paused, *self._resuming})

    def _consumed(self) -> set[str]:
        return {str(name) for name in self._consumer.app.amqp.queues.consume_from}

    def _consume_if_healthy(self) -> bool:
        """
        Stop consuming the queues that need a ComfyUI server while none is healthy, and begin again.

        Celery's consumer belongs to the main thread's loop: ``call_soon`` hands the change over. What
        was handed over is lost if the broker breaks right then, so it is looked at again each time.

        Returns:
            Whether any queue is consumed.
        """
        if not self.settings.servers:
            return True
        known, consumed = set(self._queue_names()), self._consumed()
        paused, reason = self._to_pause(known)
        if again := self._paused - paused:
            log.info("consuming_again", queues=sorted(again))
        if names := paused - self._paused:
            log.warning("not_consuming", reason=reason, queues=sorted(names))
        seen = {name: times + (name in consumed) for name, times in self._resuming.items()} | dict.fromkeys(
            again, 0
        )
        self._resuming = {name: times for name, times in seen.items() if times < 3 and name not in paused}
        self._paused = paused
        for name in self._resuming.keys() - (consumed - again):
            self._consumer.call_soon(self._consumer.add_task_queue, name)
        for name in paused & consumed:
            self._consumer.call_soon(self._consumer.cancel_task_queue, name)
        return bool(known - self._paused)

    def _to_pause(self, known: set[str]) -> tuple[set[str], str]:
        """
        Those of our queues whose tasks have no use for this worker now, and why.

        With a server healthy that is the queue of one that another worker reaches and we do not: what
        is bound to it has its prompt there. Of one that nobody reaches we go on to consume, so that
        its tasks find out at once and go elsewhere.
        """
        healthy = {server.name for server in self._pool.healthy()}
        if not healthy:
            on_servers = {name for name in known if queues.describe(queues.base_queue(name)).on_servers}
            return on_servers, "no healthy ComfyUI server"
        if len(healthy) == len(self._pool.servers):
            return set(), ""
        try:
            with self.quiet():
                others = [info for info in self.ledger.workers(OTHERS_FRESH_S) if info.name != self._name]
        except LedgerUnavailable:
            return self._paused, "only another worker reaches the ComfyUI server"
        reached = {
            queues.server_queue(*place)
            for info in others
            if info.consuming
            for place, well in queues.reach(info).items()
            if well and place[1] not in healthy
        }
        return (
            known & reached,
            "only another worker reaches the ComfyUI server",
        )

    def _watch_consumer(self) -> None:
        """Look whether Celery's consumer does what it is there for."""
        names = [str(name) for name in self._consumer.app.amqp.queues.consume_from]
        page = board()
        alive = self._children()
        known = page.children() if page is not None else {}
        children = {pid: busy for pid, busy in known.items() if pid in alive}
        if not sees_free(children, bool(names)):
            self._watch.look(Sight(free=False, broker=False))
            return
        try:
            with self.quiet():
                waiting = sum(self._queues_seen.counts(names).values())
        except BrokerUnavailable:
            self._watch.look(Sight(free=True, broker=False))
            return
        self._watch.look(Sight(free=True, broker=True, waiting=waiting))

    def _children(self) -> set[int]:
        """The processes of Celery's pool."""
        pool = getattr(self._consumer.pool, "_pool", None)
        return {int(child.pid) for child in getattr(pool, "_pool", ()) if child.pid}

    def _clean(self) -> None:
        """Stop prompts on our servers that nobody waits for any more."""
        names = [server.name for server in self.settings.servers]
        with self.quiet():
            strays = self.ledger.strays_on(names)
        if not strays:
            return
        healthy = {server.name for server in self._pool.healthy()}
        away: set[str] = set()
        for stray in sorted(strays, key=lambda each: each.server not in healthy):
            if stray.server in away:
                continue
            try:
                gone = self._is_gone(stray)
            except ComfyUnavailable:
                # Also if it refuses: that may be so from here alone. Restarted, it says that it knows
                # nothing of the prompt.
                away.add(stray.server)
                continue
            if gone:
                self._disobeys_since.pop(stray.prompt_id, None)
                log.info("stray_gone", server=stray.server, prompt_id=stray.prompt_id, task_id=stray.task_id)
                with self.quiet():
                    self.ledger.forget_stray(stray)

    def _is_gone(self, stray: Stray) -> bool:
        """Tell the server to stop the prompt; whether it has."""
        client = self._pool.client(stray.server)
        seen = client.stop(stray.prompt_id, within_s=2.0)
        if seen.place is Place.RUNNING:
            self._mind_disobedience(stray)
        elif seen.place is Place.FINISHED:
            with contextlib.suppress(ComfyUnavailable):  # what is left of it in the history; a courtesy
                client.forget(stray.prompt_id)
        return seen.is_over

    def _mind_disobedience(self, stray: Stray) -> None:
        """
        Count a server as stuck whose running prompt does not obey.

        It is how a worker that has just started learns of a dead server: the ledger kept the stray.
        """
        since = self._disobeys_since.setdefault(stray.prompt_id, time.monotonic())
        if time.monotonic() - since >= UNOBEYED_S and not self._pool.is_stuck(stray.server):
            log.warning("server_stuck", server=stray.server, prompt_id=stray.prompt_id)
            self._pool.mark_bad(stray.server, "no progress", stuck_on=stray.prompt_id)
