"""
What must be true once everything has come to rest, by the simulators' own logs and the stored bytes.

Each check returns violations: sentences with the id of the task they are about, whose history is
then printed. Nothing here asks GenPulse whether it did well.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import redis
import requests
import sqlalchemy as sa
from PIL import Image

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import tables as t
from genpulse.model import Attempt, Task, TaskStatus
from genpulse.tasks import queues
from tests.chaos.load import Clients
from tests.chaos.schedule import KINDS
from tests.chaos.world import SERVED, Shot, World

__all__ = [
    "Evidence",
    "Violation",
    "Watcher",
    "collect",
    "histories",
    "history",
    "rest",
    "summary",
    "table",
    "verify",
]

STOPPED_WITHIN_S = 8.0
"""How long a prompt may go on after its task became final, while its server could be reached."""
SILENT_S = 9.0
"""A ComfyUI server that answers nothing for so long may be given up."""
_TAKEOVERS = frozenset(
    {
        "child killed", "worker killed", "child told to stop", "child frozen", "worker frozen",
        "parent frozen", "deploy", "comfy killed", "comfy crashed",
    }
)  # fmt: skip
_OUTAGES = frozenset({"valkey killed", "valkey wiped", "valkey silent", "valkey refused"})
_LEDGER_OUTAGES = frozenset({"postgres killed", "postgres crashed"})
_ENDS = frozenset({"finished", "interrupted", "deleted"})


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must never be."""

    text: str
    task_id: str | None = None


@dataclass(slots=True)
class Evidence:
    """Everything the checks look at, read once at rest."""

    tasks: dict[str, Task]
    events: list[dict[str, Any]]
    """What the simulators wrote, in order of time."""
    by_prompt: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    owner: dict[str, str] = field(default_factory=dict)
    """The task of each prompt."""


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
                found = finals(self._world)
            except sa.exc.SQLAlchemyError:
                continue
            for task_id, state in found.items():
                self.first_seen.setdefault(task_id, state)

    def stop(self) -> None:
        """No more looks."""
        self._stopping.set()
        self.join()


def finals(world: World) -> dict[str, tuple[str, Any]]:
    """State and time of everything that is final."""
    query = sa.select(t.tasks.c.id, t.tasks.c.status, t.tasks.c.completed_at).where(
        t.tasks.c.completed_at.is_not(None)
    )
    with world.ledger.engine.connect() as connection:
        return {str(row[0]): (str(row[1]), row[2]) for row in connection.execute(query).all()}


def rest(world: World, timeout_s: float) -> bool:
    """Wait until nothing is left to do."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        try:
            left = _left_over(world)
        except (sa.exc.SQLAlchemyError, LedgerUnavailable, redis.RedisError):
            left = ["an outage"]
        if not left:
            return True
        time.sleep(0.5)
    return False


def collect(world: World) -> Evidence:
    """Read the ledger and the simulators' logs."""
    with world.ledger.engine.connect() as connection:
        ids = [str(row) for row in connection.execute(sa.select(t.tasks.c.id)).scalars()]
    tasks = {task_id: task for task_id in ids if (task := world.ledger.get(task_id)) is not None}
    found = Evidence(tasks, world.cluster.executions())
    for event in found.events:
        if event.get("prompt_id") is not None:
            found.by_prompt[event["prompt_id"]].append(event)
    for task in tasks.values():
        for attempt in task.attempts:
            if attempt.prompt_id is not None:
                found.owner[attempt.prompt_id] = task.id
    return found


def verify(world: World, clients: Clients, watcher: Watcher, seen: Evidence) -> list[Violation]:
    """All checks."""
    return [
        *(Violation(text) for text in (*clients.trouble, *world.complaints)),
        *_accepted(clients, seen),
        *_unchanged(watcher, seen),
        *_outputs(world, clients, seen),
        *_renderings(world, seen),
        *_stopped(world, seen),
        *(Violation(f"the kind of fault {kind!r} was fired and hit nothing") for kind in _missed(world)),
        *(Violation(f"at rest there is still {text}") for text in _left_over(world)),
    ]


def _missed(world: World) -> set[str]:
    """Kinds of fault that proved nothing."""
    hit = {shot.fault.kind for shot in world.shots if shot.hits}
    return {shot.fault.kind for shot in world.shots} - hit


def _accepted(clients: Clients, seen: Evidence) -> Iterator[Violation]:
    """Every 202 is one task, and every task has a final state."""
    for task_id in clients.accepted:
        if task_id not in seen.tasks:
            yield Violation(f"accepted and not in the ledger: {task_id}")
    orders = [order.index for order in clients.accepted.values()]
    if len(orders) != len(set(orders)):
        yield Violation("one order became two tasks")
    if len(seen.tasks) > len(orders) + len(clients.given_up):
        yield Violation(f"{len(seen.tasks)} tasks in the ledger of {len(orders)} orders")
    for task in seen.tasks.values():
        if not task.status.is_final:
            yield Violation(f"never became final: {task.status}", task.id)
        elif task.status is TaskStatus.FAILED:
            yield Violation(f"failed: {task.error}", task.id)
        elif task.status is TaskStatus.CANCELED and task.cancel_requested_at is None:
            yield Violation("canceled, and nobody asked for it", task.id)
        open_ones = [attempt.number for attempt in task.attempts if attempt.ended_at is None]
        if task.status.is_final and open_ones:
            yield Violation(f"final with open attempts {open_ones}", task.id)


def _unchanged(watcher: Watcher, seen: Evidence) -> Iterator[Violation]:
    for task_id, (status, at) in watcher.first_seen.items():
        task = seen.tasks.get(task_id)
        if task is None or (str(task.status), task.completed_at) != (status, at):
            yield Violation(f"was {status} at {at} and is no more", task_id)


def _outputs(world: World, clients: Clients, seen: Evidence) -> Iterator[Violation]:
    """Completed means: its own picture, stored as the row says."""
    for task_id, order in clients.accepted.items():
        task = seen.tasks.get(task_id)
        if task is None or task.status is not TaskStatus.COMPLETED:
            if task is not None and task.outputs:
                yield Violation(f"{task.status} with outputs", task_id)
            continue
        if len(task.outputs) != 1:
            yield Violation(f"completed with {len(task.outputs)} outputs", task_id)
        for output in task.outputs:
            if not output.key.startswith(f"outputs/{task_id}/{task.attempt}/"):
                yield Violation(f"output {output.key} is of another attempt than {task.attempt}", task_id)
            answer = requests.get(f"{world.cluster.url}/task/{task_id}/outputs/{output.index}", timeout=10)
            data = answer.content
            if answer.status_code != requests.codes.ok:
                yield Violation(f"output {output.index}: {answer.status_code}", task_id)
            elif hashlib.sha256(data).hexdigest() != output.sha256 or len(data) != output.size_bytes:
                yield Violation(f"output {output.index} differs from its digest", task_id)
            else:
                color = _color_of(data)
                if color != order.color:
                    yield Violation(f"asked for color {order.color:06x}, got {color:06x}", task_id)


def _color_of(picture: bytes) -> int:
    """The one color of a picture, or -1."""
    with Image.open(io.BytesIO(picture)) as image:
        colors = image.convert("RGB").getcolors(2)
    if colors is None or len(colors) != 1:
        return -1
    red, green, blue = colors[0][1]  # type: ignore[misc]  # RGB pixels are triples
    return int(red) << 16 | int(green) << 8 | int(blue)


# -- rendered twice -------------------------------------------------------------------------------


def _renderings(world: World, seen: Evidence) -> Iterator[Violation]:
    """Every rendering after a task's first has an allowed reason; nothing is rendered for nobody."""
    for event in seen.events:
        if event["event"] == "started" and event["prompt_id"] not in seen.owner:
            yield Violation(f"prompt {event['prompt_id']} was rendered on {event['server']} for no attempt")
    for task_id, events in _starts(seen).items():
        for first, second in itertools.pairwise(events):
            if _excuse(world, seen, first, second) is None:
                yield Violation(
                    f"rendered on {first['server']} at {_clock(first['t'])} and again on "
                    f"{second['server']} at {_clock(second['t'])}, for no allowed reason",
                    task_id,
                )


def _starts(seen: Evidence) -> dict[str, list[dict[str, Any]]]:
    """
    The renderings of each task, each with ``sent``, when its prompt was first submitted; in that order.

    A prompt that waited on a frozen server may start after its successor on another one.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in seen.events:
        if event["event"] == "started" and event["prompt_id"] in seen.owner:
            sent = float(seen.by_prompt[event["prompt_id"]][0]["t"])
            found[seen.owner[event["prompt_id"]]].append({**event, "sent": sent})
    return {task_id: sorted(events, key=lambda event: event["sent"]) for task_id, events in found.items()}


def _excuse(world: World, seen: Evidence, first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Why what *first* started had to be rendered again as *second*; ``None``: it had not."""
    server, began, again = str(first["server"]), first["sent"], second["sent"]
    if any(began <= at <= again for at in world.deaths[server]):
        return "its server died"
    if any(
        end - start >= SILENT_S and start <= again and began <= end for start, end in world.silences[server]
    ):
        return "its server was silent for long"
    for event in seen.by_prompt[first["prompt_id"]]:
        if event["event"] == "finished" and event.get("status") == "error":
            return "it ended in an error"
    if _unreachable(world, server, began, again):
        return "no live worker reached its server"
    return None


def _unreachable(world: World, server: str, since: float, until: float) -> bool:
    """Whether there was a moment at which every worker of *server* was away."""
    spans = [world.down[name] for name, served in SERVED.items() if server in served]
    moments = [max(since, start) for each in spans for start, _ in each if start <= until]
    return any(
        all(any(start <= moment <= end for start, end in each) for each in spans) for moment in moments
    )


def _stopped(world: World, seen: Evidence) -> Iterator[Violation]:
    """No prompt goes on for long after its task became final."""
    for prompt_id, events in seen.by_prompt.items():
        task = seen.tasks.get(seen.owner.get(prompt_id, ""))
        started = next((event for event in events if event["event"] == "started"), None)
        if task is None or task.completed_at is None or started is None:
            continue
        server, final_at = str(started["server"]), task.completed_at.timestamp()
        ended = [float(event["t"]) for event in events if event["event"] in _ENDS]
        ended += [at for at in world.deaths[server] if at >= float(started["t"])]
        end = min(ended, default=float("inf"))
        since = max(final_at, float(started["t"]))
        if end - since > STOPPED_WITHIN_S and not _disturbed(world, server, since, end):
            yield Violation(
                f"its prompt {prompt_id} went on for {end - since:.1f} s on {server} after the end", task.id
            )


def _disturbed(world: World, server: str, since: float, until: float) -> bool:
    """Whether the ledger, or every worker of *server*, was away in that time."""
    if _unreachable(world, server, since - 10, until):
        return True
    return any(
        shot.fault.kind in _LEDGER_OUTAGES
        and shot.fired_at - 10 <= until
        and (shot.back_at or shot.fired_at) + 10 >= since
        for shot in world.shots
    )


def _left_over(world: World) -> list[str]:
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


# -- what is printed ------------------------------------------------------------------------------


def history(seen: Evidence, task_id: str) -> str:
    """All that is known of a task, in order of time."""
    task = seen.tasks.get(task_id)
    if task is None:
        return f"{task_id}: not in the ledger"
    lines: list[tuple[float, str]] = [(task.created_at.timestamp(), f"created, priority {task.priority}")]
    if task.cancel_requested_at is not None:
        lines.append((task.cancel_requested_at.timestamp(), "cancel asked for"))
    if task.completed_at is not None:
        lines.append((task.completed_at.timestamp(), f"final: {task.status} {task.error or ''}"))
    for attempt in task.attempts:
        lines += _attempt_lines(attempt)
    for prompt_id, owner in seen.owner.items():
        if owner == task_id:
            for event in seen.by_prompt[prompt_id]:
                extra = event.get("status", "")
                lines.append(
                    (float(event["t"]), f"  {event['server']}: {event['event']} {prompt_id[:8]} {extra}")
                )
    return "\n".join([f"task {task_id}", *(f"  {_clock(at)} {text}" for at, text in sorted(lines))])


def histories(world: World, seen: Evidence) -> str:
    """Every fault, and every task with more than one attempt."""
    lines = [
        f"{_clock(shot.fired_at)} to {_clock(shot.back_at or shot.fired_at)} #{shot.fault.number} "
        f"{shot.fault.kind} {shot.target}: {', '.join(f'{run.task_id}/{run.attempt}' for run in shot.hits)}"
        for shot in sorted(world.shots, key=lambda shot: shot.fired_at)
    ]
    lines += [history(seen, task.id) for task in seen.tasks.values() if len(task.attempts) > 1]
    return "\n".join(lines)


def _attempt_lines(attempt: Attempt) -> Iterator[tuple[float, str]]:
    who = f"attempt {attempt.number}"
    yield attempt.started_at.timestamp(), f"{who} claimed by {attempt.worker}"
    if attempt.submitted_at is not None:
        prompt = str(attempt.prompt_id)[:8]
        yield attempt.submitted_at.timestamp(), f"{who} takes prompt {prompt} on {attempt.server}"
    if attempt.ended_at is not None:
        error = json.dumps(attempt.error.as_dict()) if attempt.error else ""
        yield attempt.ended_at.timestamp(), f"{who} ended: {attempt.outcome} {error}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d}"


def table(world: World, clients: Clients, seen: Evidence) -> str:
    """Per kind of fault: fired, running attempts hit, recovery."""
    lines = [f"{'fault':<20} {'fired':>5} {'hit':>5} {'median s':>9} {'worst s':>9}"]
    for kind in KINDS:
        shots = [shot for shot in world.shots if shot.fault.kind == kind]
        if not shots:
            continue
        times = [each for shot in shots for each in _recoveries(shot, clients, seen)]
        median = f"{statistics.median(times):.1f}" if times else "-"
        worst = f"{max(times):.1f}" if times else "-"
        hits = sum(len(shot.hits) for shot in shots)
        lines.append(f"{kind:<20} {len(shots):>5} {hits:>5} {median:>9} {worst:>9}")
    return "\n".join(lines)


def summary(world: World, clients: Clients, seen: Evidence) -> str:
    """What became of the tasks, in one line each."""
    states = [str(task.status) for task in seen.tasks.values()]
    ends = [
        each.outcome for task in seen.tasks.values() for each in task.attempts if each.outcome is not None
    ]
    again: dict[str, int] = defaultdict(int)
    for events in _starts(seen).values():
        for first, second in itertools.pairwise(events):
            again[_excuse(world, seen, first, second) or "no allowed reason"] += 1
    return "\n".join(
        [
            f"accepted {len(clients.accepted)}, given up {len(clients.given_up)}, canceled by us {len(clients.canceled_at)}",
            "tasks: " + ", ".join(f"{state} {states.count(state)}" for state in sorted(set(states))),
            "attempts: " + ", ".join(f"{each} {ends.count(each)}" for each in sorted(set(ends))),
            "rendered again: " + (", ".join(f"{why} {number}" for why, number in again.items()) or "never"),
        ]
    )


def _recoveries(shot: Shot, clients: Clients, seen: Evidence) -> Iterator[float]:
    """
    Seconds until things moved again.

    For what takes an attempt away: until the next one follows or sends a prompt, which may have to
    wait for a free slot too. For the broker and the ledger: until the first step of any attempt
    after it was back. For the API: until the next 202. For sockets: from the end of the
    rendering to that of the task.
    """
    kind = shot.fault.kind
    if kind in _TAKEOVERS:
        for run in shot.hits:
            task = seen.tasks.get(run.task_id)
            following = (
                next((each for each in task.attempts if each.number > run.attempt), None) if task else None
            )
            if following is not None and following.submitted_at is not None:
                yield following.submitted_at.timestamp() - shot.fired_at
    elif kind in _OUTAGES | _LEDGER_OUTAGES:
        back_at = shot.back_at or shot.fired_at
        steps = [
            at.timestamp() - back_at
            for task in seen.tasks.values()
            for attempt in task.attempts
            for at in (
                (attempt.started_at,)
                if kind in _OUTAGES
                else (attempt.started_at, attempt.submitted_at, attempt.ended_at)
            )
            if at is not None and at.timestamp() > back_at
        ]
        if steps:
            yield min(steps)
    elif kind == "api killed":
        later = [at - shot.fired_at for at in clients.accepted_at if at > shot.fired_at]
        if later:
            yield min(later)
    else:
        for run in shot.hits:
            task = seen.tasks.get(run.task_id)
            ends = [
                float(event["t"])
                for event in seen.by_prompt[run.prompt_id or ""]
                if event["event"] == "finished" and float(event["t"]) > shot.fired_at
            ]
            if ends and task is not None and task.completed_at is not None:
                yield max(0.0, task.completed_at.timestamp() - ends[0])
