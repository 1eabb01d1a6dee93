"""What a run prints, and the page it writes: the table, the sums, the histories of what took more than one attempt."""

from __future__ import annotations

import json
import platform
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import psutil

from genpulse.model import Attempt
from tests.chaos.evidence import Evidence
from tests.chaos.lateness import Lateness
from tests.chaos.load import Clients
from tests.chaos.recovery import CANCEL, LIMITS, Recovery
from tests.chaos.schedule import KINDS
from tests.chaos.verify import clock, excuses
from tests.chaos.world import World

__all__ = ["Facts", "as_text", "histories", "history", "machine", "markdown", "summary", "table"]

COLUMNS = ("fault", "fired", "hit", "recovered", "median s", "worst s", "worst alone s", "limit s")


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the tables are made of."""

    world: World
    clients: Clients
    seen: Evidence
    found: Sequence[Recovery]
    lateness: Lateness


def table(facts: Facts) -> list[tuple[str, ...]]:
    """Per kind of fault: fired, running attempts hit, recoveries. ``alone``: no other fault fell into it."""
    rows: list[tuple[str, ...]] = []
    for kind in (*KINDS, CANCEL):
        shots = [shot for shot in facts.world.shots if shot.fault.kind == kind]
        mine = [each for each in facts.found if each.kind == kind]
        if not shots and not mine:
            continue
        fired = len(shots) if kind != CANCEL else len(facts.clients.canceled_at)
        hits = sum(len(shot.hits) for shot in shots) if kind != CANCEL else len(mine)
        times = [each.seconds for each in mine]
        alone = [each.seconds for each in mine if not each.others_s]
        figures = (
            _figure(statistics.median(times) if times else None),
            _figure(max(times, default=None)),
            _figure(max(alone, default=None)),
            f"{LIMITS[kind]:g}" if kind in LIMITS else "",
        )
        rows.append((kind, str(fired), str(hits), str(len(times)), *figures))
    return rows


def _figure(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    every = [COLUMNS, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in every
    )  # fmt: skip


def summary(facts: Facts) -> list[str]:
    """What became of the tasks, in one line each."""
    clients, tasks = facts.clients, facts.seen.tasks.values()
    states = Counter(str(task.status) for task in tasks)
    outcomes = Counter(str(each.outcome) for task in tasks for each in task.attempts)
    again = Counter(
        reason or "for no allowed reason" for _, _, reason in excuses(facts.world, clients, facts.seen)
    )
    return [
        f"accepted {len(clients.accepted)} tasks, given up {len(clients.given_up)}",
        f"requests sent again for want of an answer: {clients.sent_again}",
        f"tasks: {_counts(states)}",
        f"attempts: {_counts(outcomes)}",
        f"rendered again: {_counts(again) or 'never'}",
        f"load average {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores; {_lateness(facts)}",
    ]


def _lateness(facts: Facts) -> str:
    median, worst = 1000 * facts.lateness.median_s(), 1000 * facts.lateness.worst_s()
    return (
        f"some process waited for a core {facts.lateness.waiting():.0f} % of the time; a sleep of 20 ms was "
        f"late by {median:.0f} ms (median of each second's worst), {worst:.0f} ms at worst"
    )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counter.items()))


def machine() -> str:
    """Where this runs, and what of it matters."""
    memory = psutil.virtual_memory().total / 2**30
    names = ("genpulse", "celery", "kombu", "redis", "SQLAlchemy", "psycopg2-binary")
    return (
        f"{psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}; " + ", ".join(f"{name} {version(name)}" for name in names)
    )


def markdown(facts: Facts, command: str, verdict: str) -> str:
    """The page of a run, for ``docs/reliability.md``."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    rows += ["| " + " | ".join(row) + " |" for row in table(facts)]
    lines = [f"`{command}` {verdict}", "", f"On {machine()}.", "", *rows, ""]
    lines += [f"- {line}" for line in summary(facts)]
    return "\n".join(lines) + "\n"


def histories(facts: Facts) -> str:
    """Every fault, and every task with more than one attempt."""
    lines = [
        f"{clock(shot.fired_at)} to {clock(shot.over_at)} #{shot.fault.number} {shot.fault.kind} "
        f"{shot.target}: {', '.join(f'{run.task_id}/{run.attempt}' for run in shot.hits)}"
        for shot in sorted(facts.world.shots, key=lambda shot: shot.fired_at)
    ]
    lines += [
        f"{clock(each.since)} {each.kind} {each.task_id} {each.seconds:.2f} s (limit {each.limit_s}, others {each.others_s:.1f})"
        for each in sorted(facts.found, key=lambda each: each.since)
    ]
    lines += [history(facts.seen, task.id) for task in facts.seen.tasks.values() if len(task.attempts) > 1]
    return "\n".join(lines)


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
        for event in seen.by_client[attempt.client_id or ""]:
            lines.append((float(event["t"]), f"  {event['server']}: a socket for attempt {attempt.number}"))
    for prompt_id, owner in seen.owner.items():
        if owner == task_id:
            for event in seen.by_prompt[prompt_id]:
                what = f"{event['event']} {prompt_id[:8]} {event.get('status', '')}"
                lines.append((float(event["t"]), f"  {event['server']}: {what}"))
    return "\n".join([f"task {task_id}", *(f"  {clock(at)} {text}" for at, text in sorted(lines))])


def _attempt_lines(attempt: Attempt) -> Iterator[tuple[float, str]]:
    who = f"attempt {attempt.number}"
    yield attempt.started_at.timestamp(), f"{who} claimed by {attempt.worker}"
    if attempt.submitted_at is not None:
        prompt = str(attempt.prompt_id)[:8]
        yield attempt.submitted_at.timestamp(), f"{who} takes prompt {prompt} on {attempt.server}"
    if attempt.ended_at is not None:
        error = json.dumps(attempt.error.as_dict()) if attempt.error else ""
        yield attempt.ended_at.timestamp(), f"{who} ended: {attempt.outcome} {error}"
