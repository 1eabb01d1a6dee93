"""
The one table of queues: their names, who serves them, and what they are called in Redis.

A task type names its queue in its handler (:mod:`genpulse.tasks.registry`) with a constant from
here; a plug-in may bring a queue of its own. ``<queue>@<server>`` is the *server queue* of a task
that is bound to one ComfyUI server; every worker that serves this server consumes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from genpulse.model import WorkerInfo

__all__ = [
    "COMFY",
    "CPU",
    "DEFAULT_QUEUE",
    "HARD_LIMIT_S",
    "PERMANENT_KEYS",
    "PRIORITY_STEPS",
    "QUEUES",
    "WEBHOOKS",
    "Queue",
    "base_queue",
    "check_name",
    "describe",
    "queue_of_key",
    "redis_key",
    "redis_keys",
    "server_queue",
    "slots",
    "takes",
    "worker_queues",
]

COMFY = "comfy"
CPU = "cpu"
WEBHOOKS = "webhooks"

DEFAULT_QUEUE = COMFY

HARD_LIMIT_S = 24 * 3600
"""Celery's own time limit, the same wide net for every queue."""

SLOTS_PER_SERVER = 2
"""One task stores while the next one renders."""

PRIORITY_STEPS = (0, 3, 6, 9)
"""Redis' priority lists of a queue in the order they are served: 0 first (RabbitMQ's is reversed)."""

# kombu's Redis transport, ``Channel.sep``.
_SEPARATOR = "\x06\x16"


@dataclass(frozen=True, slots=True)
class Queue:
    """A line of waiting messages."""

    name: str
    summary: str
    on_servers: bool
    """Its tasks run on ComfyUI servers: slots by server, and a server queue for each of them."""


QUEUES = MappingProxyType(
    {
        queue.name: queue
        for queue in (
            Queue(COMFY, "Workflows on ComfyUI servers", on_servers=True),
            Queue(CPU, "Short work on the worker's own cores", on_servers=False),
            Queue(WEBHOOKS, "Hints that webhooks are due; no task type has it", on_servers=False),
        )
    }
)

PERMANENT_KEYS = (
    "genpulse:epoch",
    "unacked",
    "unacked_index",
    "unacked_mutex",
    "_kombu.binding.celery.pidbox",
    "_kombu.binding.celeryev",
    "_kombu.binding.reply.celery.pidbox",
    "_kombu.binding_deadlines",
)
"""Redis keys besides the queues' own lists that are meant to stay without an expiry."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Return *name* if it can be a queue's; raises :class:`ValueError` if not."""
    if not _NAME.fullmatch(name):
        msg = f"{name!r} cannot be the name of a queue (letters, digits, '.', '_' and '-', at most 63)"
        raise ValueError(msg)
    return name


def describe(name: str) -> Queue:
    """The table's row for *name*; a queue that a plug-in brings may use servers."""
    return QUEUES.get(name) or Queue(name, "", on_servers=True)


def server_queue(queue: str, server: str) -> str:
    """``comfy@gpu1``: where a task of *queue* waits that only workers of *server* may take."""
    return f"{queue}@{server}"


def base_queue(queue: str) -> str:
    """``comfy`` for both ``comfy`` and ``comfy@gpu1``."""
    return queue.partition("@")[0]


def worker_queues(asked: Iterable[str], servers: Iterable[str]) -> tuple[str, ...]:
    """
    What a worker consumes that was started with ``-Q`` *asked* and serves *servers* (names).

    Returns:
        The asked queues and then the server queues, each once.
    """
    asked = list(dict.fromkeys(asked))
    bound = [
        server_queue(queue, server)
        for queue in asked
        if "@" not in queue and describe(queue).on_servers
        for server in servers
    ]
    return tuple(dict.fromkeys(asked + bound))


def takes(worker: WorkerInfo, queue: str) -> bool:
    """
    Whether a live worker takes tasks of *queue* just now.

    Not while it drains, nor while the queue needs a ComfyUI server and none of the worker's is healthy.
    """
    if not worker.consuming or queue not in worker.queues:
        return False
    needs_server = describe(base_queue(queue)).on_servers and bool(worker.servers)
    return not needs_server or any(server["healthy"] for server in worker.servers)


def reach(worker: WorkerInfo) -> dict[tuple[str, str], bool]:
    """
    The server queues that a worker consumes, as (queue, server), and whether it reaches their server.

    A server of which it knows by its settings, and whose queue it does not consume, is no use to a task.
    """
    healthy = {str(server["name"]): bool(server.get("healthy")) for server in worker.servers}
    pairs = ((name.partition("@")[0], name.partition("@")[2]) for name in worker.queues)
    return {(queue, server): healthy[server] for queue, server in pairs if server in healthy}


def slots(queues: Sequence[str], servers: Sequence[str], configured: int = 0) -> int:
    """
    How many children a worker starts if ``-c`` does not say.

    *configured* wins where it is not 0. Otherwise two per server for queues that run on servers,
    and one per usable core where a queue needs none. One more if webhooks share the worker with others:
    a round of them, whose receivers may be slow, holds one.
    """
    if configured:
        return configured
    names = {base_queue(queue) for queue in queues}
    wanted = 0
    if any(describe(name).on_servers for name in names):
        wanted += SLOTS_PER_SERVER * max(1, len(servers))
    if not wanted or any(not describe(name).on_servers for name in names):
        wanted = max(wanted, _cores())
    return wanted + (WEBHOOKS in names and len(names) > 1)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def redis_key(queue: str, step: int) -> str:
    """
    The Redis list of *queue* at a priority step.

    Source: kombu 5.7 ``transport/redis.py``, ``Channel._q_for_pri``; no ``global_keyprefix``.
    """
    return f"{queue}{_SEPARATOR}{step}" if step else queue


def queue_of_key(key: str) -> str:
    """The queue whose Redis list this is."""
    return key.partition(_SEPARATOR)[0]


def redis_keys(queue: str) -> tuple[str, ...]:
    """The Redis lists of *queue*, most urgent first."""
    return tuple(redis_key(queue, step) for step in PRIORITY_STEPS)
