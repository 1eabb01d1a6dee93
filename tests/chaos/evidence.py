"""What a run leaves behind: the ledger's rows, the simulators' own logs, what is still in Redis at rest."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import redis
import requests
import sqlalchemy as sa

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import tables as t
from genpulse.model import Attempt, Task
from genpulse.tasks import queues
from tests.chaos.load import Clients
from tests.chaos.world import World

__all__ = ["Evidence", "Watcher", "collect", "left_over", "rest"]

Event = dict[str, Any]


@dataclass(slots=True)
class Evidence:
    """Everything the checks look at, read once at rest."""

    tasks: dict[str, Task]
    events: list[Event]
    """What the simulators wrote, in order of time."""
    by_prompt: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    by_client: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    """Sockets that were opened, by client id."""
    owner: dict[str, str] = field(default_factory=dict)
    """The task of each prompt, by what was asked for: its seed is the order's colour."""
    rendered: dict[tuple[str, int], float] = field(default_factory=dict)
    """When the rendering of an attempt ended well, by task and number."""
    followers: dict[str, list[Attempt]] = field(default_factory=lambda: defaultdict(list))
    """The attempts that sent or adopted each prompt, in order."""


class Watcher(threading.Thread):
    """Notes every final state as soon as it is there, to compare it with the last one."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._stopping = threading.Event()
        self.first_seen: dict[str, tuple[str, Any]] = {}

    def run(self) -> None:
        """Look once a second."""
        while not self._stopping.wait(1.0):
            try:
                found = _finals(self._world)
            except sa.exc.SQLAlchemyError:
                continue
            for task_id, state in found.items():
                self.first_seen.setdefault(task_id, state)

    def stop(self) -> None:
        """No more looks."""
        self._stopping.set()
        self.join()


def _finals(world: World) -> dict[str, tuple[str, Any]]:
    """State and time of everything that is final."""
    query = sa.select(t.tasks.c.id, t.tasks.c.status, t.tasks.c.completed_at).where(
        t.tasks.c.completed_at.is_not(None)
    )
    with world.ledger.engine.connect() as connection:
        return {str(row[0]): (str(row[1]), row[2]) for row in connection.execute(query).all()}


def collect(world: World, clients: Clients) -> Evidence:
    """Read the ledger and the simulators' logs."""
    with world.ledger.engine.connect() as connection:
        ids = [str(row) for row in connection.execute(sa.select(t.tasks.c.id)).scalars()]
    tasks = {task_id: task for task_id in ids if (task := world.ledger.get(task_id)) is not None}
    found = Evidence(tasks, world.cluster.executions())
    attempt = t.attempts.c
    query = sa.select(attempt.task_id, attempt.number, attempt.rendered_at)
    with world.ledger.engine.connect() as connection:
        for row in connection.execute(query.where(attempt.rendered_at.is_not(None))):
            found.rendered[str(row.task_id), row.number] = row.rendered_at.timestamp()
    for event in found.events:
        if event.get("prompt_id") is not None:
            found.by_prompt[event["prompt_id"]].append(event)
        elif event["event"] == "listening":
            found.by_client[event["client_id"]].append(event)
    asked_by = {order.color: task_id for task_id, order in clients.accepted.items()}
    for prompt_id, events in found.by_prompt.items():
        for seed in events[0].get("seeds", ()):
            if seed in asked_by:
                found.owner[prompt_id] = asked_by[seed]
    for task in tasks.values():
        for each in task.attempts:
            if each.prompt_id is not None:
                found.followers[each.prompt_id].append(each)
    return found


def rest(world: World, timeout_s: float) -> bool:
    """Wait until nothing is left to do."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        try:
            left = left_over(world)
        except (sa.exc.SQLAlchemyError, LedgerUnavailable, redis.RedisError):
            left = ["an outage"]
        if not left:
            return True
        time.sleep(0.5)
    return False


def left_over(world: World) -> list[str]:
    """What must not be there at rest."""
    left: list[str] = []
    with world.ledger.engine.connect() as connection:
        for table, what in ((t.leases, "live leases"), (t.strays, "strays")):
            number = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            if number:
                left.append(f"{what}: {number}")
        live = connection.execute(
            sa.select(sa.func.count()).select_from(t.tasks).where(t.tasks.c.completed_at.is_(None))
        ).scalar_one()
        if live:
            left.append(f"tasks that are not final: {live}")
    left += _in_broker(world)
    for name, server in world.cluster.simulators.items():
        try:
            queue = requests.get(f"{server.url}/queue", timeout=5).json()
        except requests.RequestException as error:
            left.append(f"{name} that does not answer: {error}")
            continue
        for part in ("queue_running", "queue_pending"):
            left += [f"prompt {item[1]} in {part} of {name}" for item in queue[part]]
    return left


def _in_broker(world: World) -> list[str]:
    left: list[str] = []
    with redis.Redis.from_url(world.valkey.url, socket_timeout=5, decode_responses=True) as client:
        for key in client.scan_iter():
            kind = client.type(key)
            if kind == "list" and client.llen(key):
                left.append(f"{client.llen(key)} messages in {key!r}")
            elif key in {"unacked", "unacked_index"}:
                left.append(f"a message in {key}")
            elif client.ttl(key) == -1 and key not in queues.PERMANENT_KEYS:
                left.append(f"the key {key!r} without an expiry")
    return left
