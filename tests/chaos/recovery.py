"""
How long it took until things moved again after a fault, and how long it may take.

For what takes an attempt away, moving again means that the simulator's own log shows the next
attempt: it submitted a prompt, opened a socket with the adopted prompt's client id, or read its history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from genpulse.model import Attempt, AttemptOutcome
from genpulse.tasks.queues import SLOTS_PER_SERVER
from tests.chaos.evidence import Evidence
from tests.chaos.load import Clients
from tests.chaos.schedule import SERVED
from tests.chaos.world import Shot, World

__all__ = ["CANCEL", "LIMITS", "Recovery", "recoveries"]

CANCEL = "cancel"

LIMITS = {
    "child killed": 8.0,
    "worker killed": 8.0,
    "child frozen": 17.0,
    "worker frozen": 17.0,
    "comfy killed": 5.0,
    "comfy crashed": 5.0,
    "sockets muted": 3.0,
    "valkey killed": 4.0,
    "valkey wiped": 4.0,
    "valkey silent": 4.0,
    "valkey refused": 4.0,
    "postgres killed": 4.0,
    "postgres crashed": 4.0,
    CANCEL: 1.0,
}
"""Seconds, by kind of fault; for broker and database from when they are back."""

_TAKEOVERS = frozenset(
    {
        "child killed", "worker killed", "child told to stop", "child frozen", "worker frozen", "deploy",
        "comfy killed", "comfy crashed", "comfy frozen", "comfy stalled", "comfy zombie",
        "network refused", "network halved", "prompt forgotten",
    }
)  # fmt: skip
_BROKER = frozenset(
    {
        "valkey killed", "valkey wiped", "valkey silent", "valkey refused", "runway flooded",
        "messages doubled",
    }
)  # fmt: skip
_LEDGER = frozenset({"postgres killed", "postgres crashed"})
_API = frozenset({"api killed", "api answers lost"})
_GAVE_UP = frozenset(
    {AttemptOutcome.LOST, AttemptOutcome.HANDED_BACK, AttemptOutcome.UNREACHABLE, AttemptOutcome.RETRY}
)
_OTHERS_S = 8.0
"""How long a fault without a limit of its own may hold up another one's recovery once it is over."""
_STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery: ``seconds`` from *since*, allowed ``limit_s`` and what other faults in it add."""

    kind: str
    task_id: str | None
    since: float
    seconds: float
    limit_s: float | None
    others_s: float
    """What other faults that fell into it may add; 0: it was alone."""

    def is_late(self, slack: float) -> bool:
        """Whether it took longer than it may."""
        return self.limit_s is not None and self.seconds > self.limit_s * slack + self.others_s


@dataclass(frozen=True, slots=True)
class _Time:
    """From the fault, or its end, until something moved again."""

    task_id: str | None
    since: float
    until: float
    parts: frozenset[str] = frozenset()
    """The workers and servers that had a part in it: faults of others did not matter."""
    server: str = ""
    """Set where only this one would do, for the prompt is on it."""


def recoveries(world: World, clients: Clients, seen: Evidence) -> list[Recovery]:
    """Everything that recovered, fault by fault, and the cancels."""
    times: list[tuple[str, Shot | None, _Time]] = [
        (shot.fault.kind, shot, each) for shot in world.shots for each in _times(world, shot, clients, seen)
    ]
    times += [(CANCEL, None, each) for each in _cancels(world, clients, seen)]
    return [
        Recovery(
            kind,
            each.task_id,
            each.since,
            each.until - each.since,
            LIMITS.get(kind),
            _others(world, seen, shot, each),
        )
        for kind, shot, each in times
    ]


def _times(world: World, shot: Shot, clients: Clients, seen: Evidence) -> Iterator[_Time]:
    kind = shot.fault.kind
    if kind in _TAKEOVERS:
        yield from _takeovers(world, shot, seen)
    elif kind == "out of memory":
        yield from _tried_again(world, shot, seen)
    elif kind in _BROKER:
        yield from _first(shot, _claims(shot.over_at, seen))
    elif kind in _LEDGER:
        yield from _first(shot, _steps(seen))
    elif kind in _API:
        yield from _first(shot, ((None, at) for at in clients.accepted_at))
    else:
        yield from _delays(world, shot, seen)


def _takeovers(world: World, shot: Shot, seen: Evidence) -> Iterator[_Time]:
    since = shot.fired_at + (world.stall_s if shot.fault.kind in {"comfy stalled", "comfy zombie"} else 0)
    for run in shot.hits:
        task = seen.tasks.get(run.task_id)
        mine = next((each for each in task.attempts if each.number == run.attempt), None) if task else None
        if task is None or mine is None or mine.outcome not in _GAVE_UP:
            continue  # it ended by itself before the fault took effect, or was canceled
        moves = [
            (at, each) for each in task.attempts if each.number > run.attempt for at in _signs(each, seen)
        ]
        if moves:
            at, following = min(moves, key=lambda move: move[0])
            adopted = following.prompt_id == run.prompt_id
            parts = _parts(world, run.server, run.worker, following.server, following.worker)
            server = str(run.server) if adopted else ""
            yield _Time(run.task_id, since, max(at, since), parts, server)


def _tried_again(world: World, shot: Shot, seen: Evidence) -> Iterator[_Time]:
    """The same attempt may send another prompt."""
    for run in shot.hits:
        sent = [
            float(event["t"])
            for prompt_id, task_id in seen.owner.items()
            if task_id == run.task_id and prompt_id != run.prompt_id
            for event in seen.by_prompt[prompt_id]
            if event["event"] == "submitted" and event["t"] > shot.fired_at
        ]
        if sent:
            yield _Time(run.task_id, shot.fired_at, min(sent), _parts(world, run.server, run.worker))


def _parts(world: World, *names: str | None) -> frozenset[str]:
    """Servers as they are called, and workers by their short names."""
    return frozenset(world.worker_named(name) or name for name in names if name)


def _signs(attempt: Attempt, seen: Evidence) -> Iterator[float]:
    """When a simulator noticed an attempt."""
    began = attempt.started_at.timestamp()
    for event in seen.by_prompt[attempt.prompt_id or ""]:
        if event["event"] in {"submitted", "read"} and float(event["t"]) >= began:
            yield float(event["t"])
    for event in seen.by_client[attempt.client_id or ""]:
        if float(event["t"]) >= began:
            yield float(event["t"])


def _first(shot: Shot, steps: Iterator[tuple[str | None, float]]) -> Iterator[_Time]:
    later = [(at, task_id) for task_id, at in steps if at > shot.over_at]
    if later:
        at, task_id = min(later, key=lambda each: each[0])
        yield _Time(task_id, shot.over_at, at)


def _claims(back_at: float, seen: Evidence) -> Iterator[tuple[str | None, float]]:
    """The first claims of tasks that waited for nothing but a message when the broker was back."""
    for task in seen.tasks.values():
        if task.attempts and task.created_at.timestamp() < back_at:
            yield task.id, task.attempts[0].started_at.timestamp()


def _steps(seen: Evidence) -> Iterator[tuple[str | None, float]]:
    """Everything that an attempt writes."""
    for task in seen.tasks.values():
        for attempt in task.attempts:
            for at in (attempt.started_at, attempt.submitted_at, attempt.ended_at):
                if at is not None:
                    yield task.id, at.timestamp()


def _delays(world: World, shot: Shot, seen: Evidence) -> Iterator[_Time]:
    """How much later than its rendering a task ended, if that ended while something was broken."""
    for run in shot.hits:
        task = seen.tasks.get(run.task_id)
        ends = [
            float(event["t"])
            for event in seen.by_prompt[run.prompt_id or ""]
            if event["event"] == "finished" and float(event["t"]) > shot.fired_at
        ]
        if not ends or task is None or task.completed_at is None:
            continue
        if shot.fault.kind == "sockets muted" and ends[0] > shot.over_at:
            continue
        waits_for_mending = shot.fault.kind in {"storage broken", "network stalled"}
        since = max(ends[0], shot.over_at) if waits_for_mending else ends[0]
        parts = _parts(world, run.server, run.worker)
        until = max(since, task.completed_at.timestamp())
        yield _Time(run.task_id, since, until, parts, str(run.server))


def _cancels(world: World, clients: Clients, seen: Evidence) -> Iterator[_Time]:
    """From the answer to a cancel to the end of the prompt that ran then."""
    for task_id, at in clients.canceled_at.items():
        task = seen.tasks.get(task_id)
        for attempt in task.attempts if task else ():
            events = {event["event"]: float(event["t"]) for event in seen.by_prompt[attempt.prompt_id or ""]}
            stopped = events.get("interrupted", events.get("deleted"))
            if _open(attempt, at, at) and events.get("submitted", at) < at and stopped and stopped > at:
                parts = _parts(world, attempt.server, attempt.worker)
                yield _Time(task_id, at, stopped, parts, str(attempt.server))


def _others(world: World, seen: Evidence, mine: Shot | None, each: _Time) -> float:
    """How long other faults, and others' tasks, may have held up a recovery."""
    total = 0.0
    for shot in world.shots:
        kind = shot.fault.kind
        after_s = LIMITS.get(kind, _OTHERS_S)
        if shot is mine or shot.fired_at > each.until or shot.over_at + after_s < each.since:
            continue
        everywhere = kind in _BROKER | _LEDGER | {"deploy"}
        if everywhere or shot.target in each.parts:
            total += shot.over_at - shot.fired_at + after_s
    return total + _full(world, seen, each)


def _full(world: World, seen: Evidence, each: _Time) -> float:
    """How long, in a time, there was no free slot and server for another attempt of a task."""
    if each.task_id is None:
        return 0.0
    others = [attempt for task in seen.tasks.values() if task.id != each.task_id for attempt in task.attempts]
    others = [attempt for attempt in others if _open(attempt, each.since, each.until)]
    steps = int((each.until - each.since) / _STEP_S)
    return _STEP_S * sum(
        not _has_room(world, seen, others, each, each.since + number * _STEP_S) for number in range(steps)
    )


def _has_room(world: World, seen: Evidence, others: list[Attempt], each: _Time, at: float) -> bool:
    running = [attempt for attempt in others if _open(attempt, at, at)]
    rendering = {
        attempt.server
        for attempt in running
        if seen.rendered.get((attempt.task_id, attempt.number), float("inf")) > at
    }
    for name, served in SERVED.items():
        if _in(world.down[name], at):
            continue
        mine = [attempt for attempt in running if world.worker_named(attempt.worker) == name]
        usable = [
            server
            for server in served
            if (server == each.server if each.server else server not in rendering)
            and not _in([*world.gone[server], *world.silences[server], *world.stalls[server]], at)
        ]
        if usable and len(mine) < SLOTS_PER_SERVER * len(served):
            return True
    return False


def _open(attempt: Attempt, since: float, until: float) -> bool:
    ended = attempt.ended_at.timestamp() if attempt.ended_at is not None else until
    return attempt.started_at.timestamp() <= until and ended >= since


def _in(spans: list[tuple[float, float]], at: float) -> bool:
    return any(start <= at < end for start, end in spans)
