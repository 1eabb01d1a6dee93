"""
What works and what does not, as ``/status`` and ``/ready`` tell it: looked at once a second at most.

Both routes are open, so that strangers must not be able to keep the ledger busy with them. Each process
remembers what it saw for :data:`REMEMBERED_S` seconds, and only one thread at a time looks again. For the one
word that strangers get, nothing is asked that could not change the word any more.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from genpulse.errors import LedgerUnavailable
from genpulse.model import WorkerInfo
from genpulse.tasks import queues

if TYPE_CHECKING:
    from genpulse.web.service import Service

__all__ = ["Condition", "Conditions"]

REMEMBERED_S = 1.0
"""How long a picture is as good as a new one."""
MEANWHILE_S = 2.0
"""How old it may be for those who come while somebody is looking again; after that they wait, too."""
WEBHOOKS_LATE_S = 60.0
"""How long a webhook may be due before it is a problem."""


@dataclass(frozen=True, slots=True)
class Condition:
    """
    What was seen at one time.

    Attributes:
        accepting: Whether the ledger takes tasks.
        problems: A sentence each; of a short look only the first that was met.
        details: Queues, workers, servers and connections; nothing of a short look.
    """

    accepting: bool
    problems: Sequence[str]
    details: dict[str, Any] = field(default_factory=dict)


class Conditions:
    """What this process knows of how things are. Threads share one."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._short = _Picture(lambda: self._look(closely=False))
        self._close = _Picture(lambda: self._look(closely=True))

    def now(self, *, closely: bool) -> Condition:
        """How things are, as of a moment ago: with all details, or just enough for one word."""
        return self._close.get() if closely else self._short.get()

    def _look(self, *, closely: bool) -> Condition:
        ledger = self._service.ledger
        try:
            ledger.ping()
            workers = ledger.workers()
            found = itertools.chain(self._fleet_problems(workers), self._broker_problems())
            problems = list(itertools.islice(found, None if closely else 1))
            return Condition(True, problems, self._details(workers) if closely else {})
        except LedgerUnavailable:
            return Condition(False, ["The ledger does not answer.", *self._broker_problems()])

    def _fleet_problems(self, workers: Sequence[WorkerInfo]) -> Iterator[str]:
        for name in self._service.registry.queues():
            serving = [worker for worker in workers if name in worker.queues]
            if not serving:
                yield f"No worker serves the queue {name}."
            elif not any(queues.takes(worker, name) for worker in serving):
                yield f"No worker of the queue {name} takes tasks just now."
        late = self._service.ledger.webhook_backlog()
        if late.oldest_s > WEBHOOKS_LATE_S:
            served = any(queues.WEBHOOKS in worker.queues for worker in workers)
            why = "their receivers are slow" if served else "no worker serves the queue webhooks"
            yield f"Webhooks are late ({late.due} due): {why}."
        for name, server in _servers(workers).items():
            if not server["healthy"]:
                yield f"The server {name} is not healthy: {server['reason'] or 'no reason known'}."

    def _broker_problems(self) -> Iterator[str]:
        if not self._service.live.is_up():
            yield "The broker does not answer; tasks are accepted and wait in the ledger."

    def _details(self, workers: Sequence[WorkerInfo]) -> dict[str, Any]:
        counts = self._service.ledger.counts()
        lines = {}
        for name in self._service.registry.queues():
            live = [worker for worker in workers if name in worker.queues and queues.takes(worker, name)]
            lines[name] = {
                "pending": 0,
                "processing": 0,
                **counts.get(name, {}),
                "workers": len(live),
                "slots": sum(worker.slots for worker in live),
            }
        found: dict[str, Any] = {
            "queues": lines,
            "workers": [
                {
                    "name": worker.name,
                    "queues": list(worker.queues),
                    "slots": worker.slots,
                    "consuming": worker.consuming,
                    "version": worker.version,
                    "started_at": worker.started_at,
                    "seen_at": worker.seen_at,
                }
                for worker in workers
            ],
            "servers": _servers(workers),
        }
        if (counted := self._service.ledger.connections()) is not None:
            found["database"] = {"connections": counted[0], "limit": counted[1]}
        return found


def _servers(workers: Sequence[WorkerInfo]) -> dict[str, dict[str, Any]]:
    """The ComfyUI servers by name; one is healthy if any worker finds it so."""
    servers: dict[str, dict[str, Any]] = {}
    for worker in workers:
        for server in worker.servers:
            entry = servers.setdefault(server["name"], {"healthy": False, "workers": 0, "reason": ""})
            entry["workers"] += 1
            entry["healthy"] = entry["healthy"] or bool(server["healthy"])
            entry["reason"] = "" if entry["healthy"] else entry["reason"] or str(server.get("reason", ""))
    return servers


class _Picture:
    """The newest picture, and who makes the next."""

    def __init__(self, look: Callable[[], Condition]) -> None:
        self._look = look
        self._looking = threading.Lock()
        self._seen: tuple[float, Condition] | None = None

    def get(self) -> Condition:
        if (found := self._not_older_than(REMEMBERED_S)) is not None:
            return found
        meanwhile = self._not_older_than(MEANWHILE_S)
        if not self._looking.acquire(blocking=meanwhile is None):
            assert meanwhile is not None
            return meanwhile
        try:
            # Whoever waited finds what the one before saw.
            if (found := self._not_older_than(REMEMBERED_S)) is None:
                found = self._look()
                self._seen = time.monotonic(), found
            return found
        finally:
            self._looking.release()

    def _not_older_than(self, seconds: float) -> Condition | None:
        seen = self._seen
        return seen[1] if seen is not None and time.monotonic() - seen[0] < seconds else None
