"""
Why a pending task waits, as a code for programs and a sentence for people.

The first reason that holds is told, from what would hold it up longest to what is over by itself.
Everything comes from the ledger, but for the broker, which is asked whether it is there.
"""

from __future__ import annotations

import datetime as dt

from genpulse.model import Task, TaskStatus
from genpulse.tasks import queues
from genpulse.web.service import service

__all__ = ["wait_reason"]


def wait_reason(task: Task, position: int | None) -> tuple[str, str] | None:
    """
    Code and text, or ``None`` if the task does not wait.

    Args:
        position: Its place in the line of its queue, from 1.
    """
    if task.status is not TaskStatus.PENDING:
        return None
    return (
        _bound(task)
        or _owner_limit(task)
        or _no_worker(task)
        or _no_broker()
        or _backoff(task)
        or _in_line(position)
    )


def _bound(task: Task) -> tuple[str, str] | None:
    if task.bound_server is None:
        return None
    served = {place for worker in service().ledger.workers() for place in queues.reach(worker)}
    if (task.queue, task.bound_server) in served:
        return "bound", f"The task goes on on the server {task.bound_server}, which has what it needs."
    return "bound", (
        f"The server {task.bound_server} has what the task needs, and no worker serves it just now; "
        "before long the task goes elsewhere."
    )


def _owner_limit(task: Task) -> tuple[str, str] | None:
    running, cap = service().ledger.running_of(task.owner, service().settings.max_running)
    if not cap or running < cap:
        return None
    tasks = "1 task runs" if running == 1 else f"{running} tasks run"
    return "owner_limit", f"{tasks} already, as many as this owner may have at once."


def _no_worker(task: Task) -> tuple[str, str] | None:
    serving = [worker for worker in service().ledger.workers() if task.queue in worker.queues]
    if not serving:
        return "no_worker", f"Waiting for a worker of the queue {task.queue}."
    if any(queues.takes(worker, task.queue) for worker in serving):
        return None
    if any(server["healthy"] for worker in serving for server in worker.servers):
        return "no_worker", f"The workers of the queue {task.queue} are stopping."
    why = sorted({str(server["reason"]) for worker in serving for server in worker.servers} - {""})
    told = f" ({'; '.join(why)})" if why else ""
    return "no_server", f"The workers of the queue {task.queue} have no healthy server just now{told}."


def _no_broker() -> tuple[str, str] | None:
    if service().live.is_up():
        return None
    return "no_broker", "The broker does not answer just now; the task goes on when it is back."


def _backoff(task: Task) -> tuple[str, str] | None:
    # A new task is available at once; only one that had an attempt is worth asking the ledger's clock.
    if task.available_at is None or task.available_at <= task.created_at:
        return None
    left_s = (task.available_at - service().ledger.ping()) / dt.timedelta(seconds=1)
    if left_s <= 0:
        return None
    return "backoff", f"The last attempt failed; the next one is due in {max(1, round(left_s))} s."


def _in_line(position: int | None) -> tuple[str, str]:
    if position is None or position <= 1:
        return "next", "The task goes next."
    first = "1 task goes" if position == 2 else f"{position - 1} tasks go"
    return "queued", f"{first} first."
