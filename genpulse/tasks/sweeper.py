"""
The sweeper: each second it sets right what crashes, wipes and lost messages left.

Idempotent, and any number may run at once: every step is a conditional update that one of them
wins. It reaps, and frees tasks from their servers, only after it was itself connected to the ledger
without a break for one lease: right after an outage every lease looks stale and every worker gone
although they are well. A pass that comes late by the ledger's clock is such a break too, for this
process may have been frozen together with the workers.
"""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass

import structlog

from genpulse.config import Settings
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Dispatch, Ledger, SessionProbe
from genpulse.live import Live
from genpulse.model import Fence, WorkerInfo
from genpulse.tasks import queues
from genpulse.tasks.producer import BrokerUnavailable, Epoch, RunwayView
from genpulse.tasks.relay import Relay
from genpulse.telemetry import metrics

__all__ = ["Sweeper", "Swept"]

log = structlog.get_logger("genpulse.sweeper")

MISSED_BEATS = 3
OVERDUE_S = 5.0
"""A message that was sent longer ago, and is nowhere in Redis, is lost."""
WORKER_FRESH_S = 15.0
GONE_AFTER_S = 10.0
_RARELY_S = 60.0
_STRAY_KEPT_S = 7 * 86_400.0
_CLEAR_S = 10.0
_COLLECT_S = 10.0


Place = tuple[str, str]
"""A queue and a server: what a waiting task is bound to."""


@dataclass(slots=True)
class Swept:
    """What one pass did."""

    reaped: int = 0
    sent_again: int = 0
    expired: int = 0
    released: int = 0
    relayed: int = 0


class Sweeper:
    """One pass is :meth:`sweep`. Not for sharing between threads."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        relay: Relay,
        view: RunwayView,
        live: Live | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._relay = relay
        self._view = view
        self._live = live
        self._probe = SessionProbe(ledger)
        self._connected_since: float | None = None
        self._pinged_at: dt.datetime | None = None
        self._epoch: Epoch | None = None
        self._missing: dict[str, Dispatch] = {}
        self._down_since: dict[Place, float] = {}
        self._known_queues: set[str] = set()
        self._rarely_at = time.monotonic()
        self._cleared_at = 0.0
        self._collected_at = time.monotonic()

    def sweep(self) -> Swept:
        """
        One pass.

        Raises:
            LedgerUnavailable: The pass was cut short; the next one starts anew.
        """
        swept = Swept()
        try:
            if self._is_steady():
                swept.reaped = self._reap()
                live, gone = self._servers()
                swept.released = self._ledger.release_bindings(live, gone)
                self._clear_unserved(live | gone)
            swept.expired = self._ledger.expire()
            swept.sent_again = self._reconcile()
            swept.relayed = self._relay.pulse()
            self._rarely()
        except LedgerUnavailable:
            self._connected_since = None
            raise
        finally:
            for work in ("reaped", "sent_again", "expired", "released"):
                metrics.SWEPT.add(getattr(swept, work), work=work)
        return swept

    def _is_steady(self) -> bool:
        """Whether the ledger was there, and this process at work, for one lease without a break."""
        lease_s = self._settings.lease_s
        at, before = self._ledger.ping(), self._pinged_at
        self._pinged_at = at
        late = before is not None and at - before > dt.timedelta(seconds=max(3.0, lease_s / 2))
        if self._connected_since is None or late:
            self._connected_since = time.monotonic()
        return time.monotonic() - self._connected_since >= lease_s

    def _live_workers(self) -> list[WorkerInfo]:
        """
        Workers with a fresh row whose process holds its session, or beat just now.

        As with leases, a free session alone says nothing: a database that restarts between two passes
        drops the sessions of all, and they are well.
        """
        rows = self._ledger.workers_with_sessions(WORKER_FRESH_S)
        alive = self._probe.alive([key for _, key in rows])
        beating = {info.name for info in self._ledger.workers(MISSED_BEATS * self._settings.beat_s)}
        return [info for info, key in rows if key in alive or info.name in beating]

    def _servers(self) -> tuple[set[Place], set[Place]]:
        """
        The server queues that live workers consume, and those whose server none of them reaches any more.

        A server that nobody reached for :data:`GONE_AFTER_S` is taken to have forgotten its prompts;
        its workers do not consume, so a task bound to it would wait for ever.
        """
        healthy: dict[Place, bool] = {}
        for worker in self._live_workers():
            for place, well in queues.reach(worker).items():
                healthy[place] = healthy.get(place, False) or well
        at = time.monotonic()
        self._known_queues |= {queue for queue, _ in healthy}
        down = {place for place, well in healthy.items() if not well}
        self._down_since = {place: self._down_since.get(place, at) for place in down}
        gone = {place for place, since in self._down_since.items() if at - since >= GONE_AFTER_S}
        return healthy.keys() - gone, gone

    def _clear_unserved(self, served: set[Place]) -> None:
        """
        Delete what waits in the queue of a server that nobody serves and no waiting task is bound to.

        The task of such a message was freed, has ended, or runs elsewhere. Nobody would ever take it out.
        A list of another application may have an "@" in its name too: only queues that a worker was
        seen to consume count.
        """
        if time.monotonic() - self._cleared_at < _CLEAR_S:
            return
        self._cleared_at = time.monotonic()
        try:
            waiting = {
                name for name in self._view.server_queues() if queues.base_queue(name) in self._known_queues
            }
            if not waiting:
                return
            needed = served | self._ledger.bound()
            unserved = waiting - {queues.server_queue(queue, server) for queue, server in needed}
            self._view.clear(unserved)
        except BrokerUnavailable:
            return
        if unserved:
            log.info("server_queues_cleared", queues=sorted(unserved))

    def _reap(self) -> int:
        """Take back the tasks of dead workers: their session is gone and three beats are missed, or the lease ran out."""
        missed_s = MISSED_BEATS * self._settings.beat_s
        stale = self._ledger.stale_leases(missed_s)
        if not stale:
            return 0
        alive = self._probe.alive([lease.session_key for lease in stale])
        reaped = 0
        for lease in stale:
            if lease.session_key in alive and not lease.expired:
                continue
            status = self._ledger.reap(
                lease,
                missed_s=missed_s,
                max_lost=self._settings.max_lost,
                progress=self._last_seen(lease.fence),
            )
            if status is not None:
                reaped += 1
                log.warning(
                    "attempt_lost",
                    task_id=lease.fence.task_id,
                    attempt=lease.fence.attempt,
                    worker=lease.worker,
                    now=str(status),
                )
        return reaped

    def _last_seen(self, fence: Fence) -> float | None:
        """How far a dead worker's attempt was, if Redis still knows: nobody else can tell any more."""
        known = self._live.progress(fence.task_id) if self._live is not None else None
        percent = known.get("percent") if known and known.get("attempt") == fence.attempt else None
        return float(percent) if isinstance(percent, int | float) and 0 < percent <= 100 else None

    def _reconcile(self) -> int:
        """
        Put tasks back whose message Redis has lost.

        A message is in no list for the moment between being popped and being noted as delivered, so
        it must be missing twice, unless Redis itself was restarted or wiped.
        """
        try:
            epoch = self._view.epoch()
            self._collect()
            changed = self._epoch is not None and epoch != self._epoch
            if changed:
                log.warning("broker_restarted_or_wiped")
            overdue = self._ledger.overdue(0.0 if changed else OVERDUE_S)
            if not overdue:
                self._epoch, self._missing = epoch, {}
                return 0
            present = self._view.waiting_ids(_queue_names(overdue))
        except BrokerUnavailable:
            return 0
        missing = {each.task_id: each for each in overdue if each.task_id not in present}
        lost = [each for task_id, each in missing.items() if changed or self._missing.get(task_id) == each]
        self._missing = missing
        put_back = self._ledger.put_back(lost)
        self._epoch = epoch
        if put_back:
            log.warning("messages_lost_by_broker", sent_again=put_back)
        self._relay.resume()
        return put_back

    def _collect(self) -> None:
        """Drop what dead workers, and lost acknowledgements, left behind as delivered."""
        if time.monotonic() - self._collected_at < _COLLECT_S:
            return
        self._collected_at = time.monotonic()
        if dropped := self._view.forget_stale_deliveries():
            log.info("stale_deliveries_dropped", number=dropped)

    def _rarely(self) -> None:
        if time.monotonic() - self._rarely_at < _RARELY_S:
            return
        self._rarely_at = time.monotonic()
        self._ledger.forget_expired_keys()
        self._ledger.forget_empty_batches()
        self._ledger.forget_old_workers()
        self._ledger.forget_old_strays(_STRAY_KEPT_S)
        self._probe.collect()


def _queue_names(dispatches: list[Dispatch]) -> set[str]:
    """Every queue in which one of these messages may wait."""
    names: set[str] = set()
    for each in dispatches:
        names.add(each.queue)
        if each.server is not None:
            names.add(queues.server_queue(each.queue, each.server))
    return names
