"""``GET /metrics``: what the processes of this API counted, and the fleet as the ledger knows it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

from flask import Response

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ended, Ledger
from genpulse.model import TaskStatus
from genpulse.tasks import queues
from genpulse.telemetry import metrics
from genpulse.telemetry.metrics import Sample
from genpulse.web.api import ROUTES
from genpulse.web.contract import text_answer
from genpulse.web.service import service

__all__: list[str] = []

LOOK_BACK_S = 600.0
"""Ended tasks are counted at a scrape; of what ended longer before it nothing is counted any more."""


@ROUTES.add(
    "GET",
    "/metrics",
    tag="System",
    answers={200: text_answer("Prometheus' text format.", "genpulse_ledger_up 1.0\n")},
    scope="admin",
)
def read_metrics() -> Response:
    """Answer Prometheus. With the ledger away it is what this API counted itself."""
    try:
        found = list(_fleet(service().ledger))
        _count_ended(service().ledger)
        found.append(Sample(metrics.LEDGER_UP, 1))
    except LedgerUnavailable:
        found = [Sample(metrics.LEDGER_UP, 0)]
    found.append(Sample(metrics.BROKER_UP, service().live.is_up()))
    return Response(metrics.text(found), content_type=metrics.CONTENT_TYPE)


def _fleet(ledger: Ledger) -> Iterator[Sample]:
    """The gauges, each from live rows."""
    lines = {(line.queue, line.status): line for line in ledger.lines()}
    workers = ledger.workers()
    for queue in sorted({*service().registry.queues(), *(queue for queue, _ in lines)}):
        for status in (TaskStatus.PENDING, TaskStatus.PROCESSING):
            line = lines.get((queue, status))
            labels = {"queue": queue, "status": str(status)}
            yield Sample(metrics.QUEUE_TASKS, line.number if line else 0, labels)
        waiting = lines.get((queue, TaskStatus.PENDING))
        yield Sample(metrics.QUEUE_OLDEST, waiting.oldest_s if waiting else 0.0, {"queue": queue})
        slots = sum(worker.slots for worker in workers if queues.takes(worker, queue))
        yield Sample(metrics.QUEUE_SLOTS, slots, {"queue": queue})
    for consuming in (True, False):
        number = sum(worker.consuming is consuming for worker in workers)
        yield Sample(metrics.WORKERS, number, {"consuming": str(consuming).lower()})
    healthy: dict[str, bool] = {}
    for worker in workers:
        for server in worker.servers:
            name = str(server["name"])
            healthy[name] = healthy.get(name, False) or bool(server["healthy"])
    busy = ledger.rendering()
    for name, is_healthy in sorted(healthy.items()):
        yield Sample(metrics.SERVER_UP, is_healthy, {"server": name})
        yield Sample(metrics.SERVER_BUSY, name in busy, {"server": name})
    late = ledger.webhook_backlog()
    yield Sample(metrics.WEBHOOKS_DUE, late.due)
    yield Sample(metrics.WEBHOOKS_OLDEST, late.oldest_s)


def _count_ended(ledger: Ledger) -> None:
    """
    Count the tasks that ended since the last scrape, whoever ended them.

    They end in workers, sweepers and requests, on many hosts. All of them write it to the ledger, so
    that is where they are counted, by each API for itself.
    """
    with metrics.bookmark() as mark:
        since = dt.datetime.fromisoformat(mark.place) if mark.place else None
        back_s = LOOK_BACK_S if since else min(LOOK_BACK_S, metrics.uptime_s())
        ended, until = ledger.ended_since(since, at_most_s=back_s)
        mark.place = until.isoformat()
        for each in ended:
            _count(each)


def _count(ended: Ended) -> None:
    metrics.TASKS_ENDED.add(task_type=ended.task_type, status=str(ended.status), error_code=ended.error_code)
    for metric, seconds in (
        (metrics.QUEUE_SECONDS, ended.queue_s),
        (metrics.RUN_SECONDS, ended.run_s),
        (metrics.STORE_SECONDS, ended.store_s),
    ):
        if seconds is not None:
            metric.observe(seconds, task_type=ended.task_type)
