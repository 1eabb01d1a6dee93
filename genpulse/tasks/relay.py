"""
The relay: from the outbox in the ledger to the runway in the broker.

Runs after the commit, outside every request, in threads of the API and of each worker's main
process. Any number may run at once. Rows are taken in one short transaction, Redis is asked with
none open, and a batch that it did not take is put back. Death in between leaves rows that look
sent; the sweeper compares them with what Redis holds.
"""

from __future__ import annotations

import time

import structlog

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Dispatch, Ledger
from genpulse.model import WorkerInfo
from genpulse.tasks import queues, schedule
from genpulse.tasks.producer import BrokerUnavailable, Message, Producer
from genpulse.tasks.registry import task_name
from genpulse.telemetry import metrics

__all__ = ["Relay", "live_slots"]

log = structlog.get_logger("genpulse.relay")

_PAUSE_S = (0.2, 0.5, 1.0, 2.0)


class Relay:
    """
    Moves tasks from the outbox to the broker. Not for sharing between threads.

    Args:
        max_running: Cap on the running tasks of one owner where no key says otherwise; 0 is none.
    """

    def __init__(self, ledger: Ledger, producer: Producer, *, max_running: int = 0) -> None:
        self._ledger = ledger
        self._producer = producer
        self._max_running = max_running
        self._broker_failures = 0
        self._quiet_until = 0.0
        self._workers: list[WorkerInfo] = []
        self._looked_at = 0.0

    def pulse(self) -> int:
        """
        One pass: top the runway up.

        Returns:
            How many messages were sent. 0 also while the broker is being left alone after a failure.

        Raises:
            LedgerUnavailable: Nothing was taken, or what was taken is for the sweeper to find.
        """
        if time.monotonic() < self._quiet_until:
            return 0
        workers = self._live_workers()
        served = {pair for worker in workers for pair in queues.reach(worker)}
        batch = schedule.next_batch(self._ledger, live_slots(workers), served, self._max_running)
        if not batch:
            return 0
        try:
            self._producer.publish([_message(dispatch) for dispatch in batch])
        except BrokerUnavailable as error:
            self._broker_failures += 1
            self._quiet_until = time.monotonic() + _PAUSE_S[min(self._broker_failures, len(_PAUSE_S)) - 1]
            if self._broker_failures == 1:
                log.warning("broker_away", waiting=len(batch), reason=str(error))
            self._ledger.put_back(batch)
            return 0
        if self._broker_failures:
            log.info("broker_back", failures=self._broker_failures)
        self._broker_failures = 0
        metrics.MESSAGES_SENT.add(len(batch))
        return len(batch)

    def resume(self) -> None:
        """The broker is known to be there again: end the pause."""
        self._quiet_until = 0.0

    def _live_workers(self) -> list[WorkerInfo]:
        """The workers' rows, at most a second old; an old list does no harm."""
        if time.monotonic() - self._looked_at > 1.0:
            try:
                self._workers = self._ledger.workers()
            except LedgerUnavailable:
                self._workers = []
                raise
            self._looked_at = time.monotonic()
        return self._workers


def live_slots(workers: list[WorkerInfo]) -> dict[str, int]:
    """Slots by queue, of workers that take its tasks; server queues count for nothing here."""
    found: dict[str, int] = {}
    for worker in workers:
        for queue in worker.queues:
            if queue == queues.base_queue(queue) and queues.takes(worker, queue):
                found[queue] = found.get(queue, 0) + worker.slots
    return found


def _message(dispatch: Dispatch) -> Message:
    name = task_name(dispatch.task_type)
    if dispatch.server is None:
        return Message(dispatch.task_id, name, dispatch.queue, dispatch.priority)
    # It has had its turn: its prompt is on that server already, and only somebody to follow it is missing.
    queue = queues.server_queue(dispatch.queue, dispatch.server)
    return Message(dispatch.task_id, name, queue, queues.PRIORITY_STEPS[0])
