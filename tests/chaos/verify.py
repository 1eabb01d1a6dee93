"""
What must be true once everything has come to rest, by the simulators' own logs and the stored bytes.

Each check returns violations: sentences with the id of the task they are about, whose history is
then printed. Nothing here asks GenPulse whether it did well.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import sqlalchemy as sa
from PIL import Image

from genpulse.ledger import tables as t
from genpulse.model import Attempt, AttemptOutcome, Task, TaskStatus
from tests.chaos import audit
from tests.chaos.evidence import Event, Evidence, Watcher, left_over
from tests.chaos.load import Clients
from tests.chaos.schedule import SERVED, Order
from tests.chaos.world import World

__all__ = ["Violation", "clock", "excuses", "renderings", "verify"]

STOPPED_WITHIN_S = 8.0
"""How long a prompt may go on after its task became final, while its server could be reached."""
SILENT_S = 9.0
"""A ComfyUI server that answers nobody for so long may be given up."""
NOTICED_S = 3.0
"""What a sweeper saw of the workers may be so old when it ends an attempt."""
_ENDS = frozenset({"finished", "interrupted", "deleted"})


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must never be."""

    text: str
    task_id: str | None = None


def verify(world: World, clients: Clients, watcher: Watcher, seen: Evidence) -> list[Violation]:
    """All checks."""
    return [
        *(Violation(text) for text in (*clients.trouble, *world.complaints)),
        *_accepted(clients, seen),
        *_unchanged(watcher, seen),
        *(Violation(text, task_id) for task_id, text in audit.wrong(audit.read(world.ledger.engine))),
        *_attempts(seen),
        *_outputs(world, clients, seen),
        *_stored(world, seen),
        *_rendered(world, clients, seen),
        *_stopped(world, seen),
        *(Violation(f"the kind of fault {kind!r} was fired and hit nothing") for kind in _missed(world)),
        *(Violation(f"at rest there is still {text}") for text in left_over(world)),
    ]


def _missed(world: World) -> set[str]:
    """Kinds of fault that proved nothing."""
    hit = {shot.fault.kind for shot in world.shots if shot.hits}
    return {shot.fault.kind for shot in world.shots} - hit


def _accepted(clients: Clients, seen: Evidence) -> Iterator[Violation]:
    """Every 202 is one task, and every task has the final state that it should."""
    for task_id in clients.accepted:
        if task_id not in seen.tasks:
            yield Violation(f"accepted and not in the ledger: {task_id}")
    orders = [order.index for order in clients.accepted.values()]
    if len(orders) != len(set(orders)):
        yield Violation("one order became two tasks")
    if len(seen.tasks) > len(orders) + len(clients.given_up):
        yield Violation(f"{len(seen.tasks)} tasks in the ledger of {len(orders)} orders")
    for task in seen.tasks.values():
        order = clients.accepted.get(task.id)
        fails = order is not None and order.form == "failing"
        if not task.status.is_final:
            yield Violation(f"never became final: {task.status}", task.id)
        elif task.status is TaskStatus.FAILED:
            if not fails or task.error is None or task.error.code != "node_error":
                yield Violation(f"failed: {task.error}", task.id)
        elif task.status is TaskStatus.CANCELED:
            if task.cancel_requested_at is None:
                yield Violation("canceled, and nobody asked for it", task.id)
        elif fails:
            yield Violation("completed, although a node of it raises", task.id)


def _unchanged(watcher: Watcher, seen: Evidence) -> Iterator[Violation]:
    for task_id, (status, at) in watcher.first_seen.items():
        task = seen.tasks.get(task_id)
        if task is None or (str(task.status), task.completed_at) != (status, at):
            yield Violation(f"was {status} at {at} and is no more", task_id)


def _attempts(seen: Evidence) -> Iterator[Violation]:
    """Attempts are numbered without a gap, never overlap, and only the last one ended the task."""
    finals = {AttemptOutcome.COMPLETED, AttemptOutcome.FAILED, AttemptOutcome.CANCELED}
    for task in seen.tasks.values():
        if [each.number for each in task.attempts] != list(range(1, task.attempt + 1)):
            yield Violation(f"attempts {[each.number for each in task.attempts]} of {task.attempt}", task.id)
        for each, following in itertools.pairwise(task.attempts):
            if each.ended_at is None or each.ended_at > following.started_at:
                yield Violation(f"attempt {following.number} began before {each.number} had ended", task.id)
            if each.outcome in finals:
                yield Violation(f"attempt {each.number} ended the task, and another followed", task.id)
        last = task.attempts[-1] if task.attempts else None
        if last is not None and task.status.is_final and last.ended_at is None:
            yield Violation(f"final with attempt {last.number} open", task.id)
        if task.status is TaskStatus.COMPLETED and (
            last is None or last.outcome is not AttemptOutcome.COMPLETED
        ):
            yield Violation("completed, but not by its last attempt", task.id)


def _outputs(world: World, clients: Clients, seen: Evidence) -> Iterator[Violation]:
    """Completed means: its own picture, stored as the row says."""
    with requests.Session() as http:
        for task_id, order in clients.accepted.items():
            task = seen.tasks.get(task_id)
            if task is None:
                continue
            if task.status is not TaskStatus.COMPLETED:
                if task.outputs:
                    yield Violation(f"{task.status} with outputs", task_id)
                continue
            if len(task.outputs) != 1:
                yield Violation(f"completed with {len(task.outputs)} outputs", task_id)
            for problem in _bad_outputs(http, world.cluster.url, task, order):
                yield Violation(problem, task_id)


def _bad_outputs(http: requests.Session, url: str, task: Task, order: Order) -> Iterator[str]:
    for output in task.outputs:
        if not output.key.startswith(f"outputs/{task.id}/{task.attempt}/"):
            yield f"output {output.key} is of another attempt than {task.attempt}"
        answer = http.get(f"{url}/task/{task.id}/outputs/{output.index}", timeout=10)
        data = answer.content
        if answer.status_code != requests.codes.ok:
            yield f"output {output.index}: {answer.status_code}"
        elif hashlib.sha256(data).hexdigest() != output.sha256 or len(data) != output.size_bytes:
            yield f"output {output.index} differs from its digest"
        elif (color := _color_of(data)) != order.color:
            yield f"asked for color {order.color:06x}, got {color:06x}"


def _color_of(picture: bytes) -> int:
    """The one color of a picture, or -1."""
    with Image.open(io.BytesIO(picture)) as image:
        colors = image.convert("RGB").getcolors(2)
    if colors is None or len(colors) != 1:
        return -1
    red, green, blue = colors[0][1]  # type: ignore[misc]  # RGB pixels are triples
    return int(red) << 16 | int(green) << 8 | int(blue)


def _stored(world: World, seen: Evidence) -> Iterator[Violation]:
    """Every object has a row, or is what an ended attempt that did not complete left behind."""
    root: Path = world.cluster.settings.assets_dir
    with world.ledger.engine.connect() as connection:
        known = set(connection.execute(sa.select(t.outputs.c.key)).scalars())
    for path in root.rglob("*"):
        key = path.relative_to(root).as_posix()
        if not path.is_file() or key.startswith(".genpulse/") or key in known:
            continue
        parts = key.split("/")
        task = seen.tasks.get(parts[1]) if len(parts) == 4 and parts[0] == "outputs" else None
        if task is None or not any(
            str(each.number) == parts[2] and each.ended_at and each.outcome is not AttemptOutcome.COMPLETED
            for each in task.attempts
        ):
            yield Violation(f"the stored object {key} has no row, and no ended attempt that left it")


# -- rendered twice -------------------------------------------------------------------------------


def _rendered(world: World, clients: Clients, seen: Evidence) -> Iterator[Violation]:
    """Every rendering after a task's first has an allowed reason; nothing is rendered for nobody."""
    for event in seen.events:
        prompt_id = event.get("prompt_id")
        if event["event"] != "started" or prompt_id in seen.followers:
            continue
        # After running out of memory an attempt tries once more, with a prompt of a new id.
        if prompt_id not in seen.owner or not _ended_in_error(seen, event):
            yield Violation(f"prompt {prompt_id} was rendered on {event['server']} for no attempt")
    for first, second, reason in excuses(world, clients, seen):
        if reason is None:
            yield Violation(
                f"rendered on {first['server']} at {clock(first['t'])} and again on "
                f"{second['server']} at {clock(second['t'])}, for no allowed reason",
                seen.owner[first["prompt_id"]],
            )


def excuses(world: World, clients: Clients, seen: Evidence) -> Iterator[tuple[Event, Event, str | None]]:
    """Each rendering that another one followed, that one, and the reason; ``None``: there is none."""
    for task_id, events in renderings(seen).items():
        order = clients.accepted.get(task_id)
        for first, second in itertools.pairwise(events):
            yield first, second, _excuse(world, seen, order, first, second)


def renderings(seen: Evidence) -> dict[str, list[Event]]:
    """
    The renderings of each task, each with ``sent``, when its attempt sent it; in that order.

    A prompt that waited on a frozen server, or in a network that held it up, may start after its
    successor on another one. ``known`` is when its server had it.
    """
    found: dict[str, list[Event]] = defaultdict(list)
    for event in seen.events:
        if event["event"] == "started" and event["prompt_id"] in seen.owner:
            known = float(seen.by_prompt[event["prompt_id"]][0]["t"])
            written = [each.submitted_at for each in seen.followers.get(event["prompt_id"], ())]
            sent = min([known, *(at.timestamp() for at in written if at is not None)])
            found[seen.owner[event["prompt_id"]]].append({**event, "sent": sent, "known": known})
    return {task_id: sorted(events, key=lambda event: event["sent"]) for task_id, events in found.items()}


def _excuse(world: World, seen: Evidence, order: Order | None, first: Event, second: Event) -> str | None:
    """Why what *first* started had to be rendered again as *second*; ``None``: it had not."""
    server, began, again = str(first["server"]), float(first["sent"]), float(second["sent"])
    if first["known"] > again:
        return "its server did not have it yet"
    if any(began <= at <= again for at in world.deaths[server]):
        return "its server had died and forgotten it"
    for start, end in world.stalls[server]:
        if min(end, again) - max(start, began) >= world.stall_s - 1:
            return "it made no progress beyond the limit"
    for shot in world.shots:
        if (
            shot.fault.kind == "out of memory"
            and any(hit.prompt_id == first["prompt_id"] for hit in shot.hits)
            and _ended_in_error(seen, first)
        ):
            return "it had run out of memory"
    last = next(reversed(seen.followers[first["prompt_id"]]), None)
    if order is not None and order.form == "socket" and last is not None and _broke_socket(last):
        return "its pictures were on the socket alone"
    return _unreachable_for(world, server, last, began, again)


def _ended_in_error(seen: Evidence, first: Event) -> bool:
    return any(
        event["event"] == "finished" and event.get("status") == "error"
        for event in seen.by_prompt[first["prompt_id"]]
    )


def _broke_socket(last: Attempt) -> bool:
    """Whether the attempt ended so that its socket ended with it, or says itself that pictures are missing."""
    if last.outcome in {AttemptOutcome.LOST, AttemptOutcome.HANDED_BACK, AttemptOutcome.UNREACHABLE}:
        return True
    return last.error is not None and "socket" in last.error.message


def _unreachable_for(
    world: World, server: str, last: Attempt | None, began: float, again: float
) -> str | None:
    """Whether no live worker could reach *server* when the next rendering was decided, and how."""
    since = began
    if last is not None and last.ended_at is not None:
        before_s = NOTICED_S if last.outcome in {AttemptOutcome.LOST, AttemptOutcome.HANDED_BACK} else 15.0
        since = max(began, last.ended_at.timestamp() - before_s)
    for start, end, why in _unreachable(world, server):
        overlap_s = min(end, again) - max(start, since)
        if overlap_s < 0:
            continue
        if why == "refused":
            return "its server refused every live worker"
        silent_s = min(end, again) - start
        if why == "silent" and silent_s >= SILENT_S:
            return "its server was silent for long to every live worker"
        handed_back = last is not None and last.outcome is AttemptOutcome.HANDED_BACK
        if why == "alone" and (not handed_back or silent_s >= world.cluster.settings.adopt_wait_s):
            return "no live worker served its server"
    return None


def _unreachable(world: World, server: str) -> Iterator[tuple[float, float, str]]:
    """
    The times in which no live worker reached *server*, and why.

    ``alone``: no worker that serves it lived. ``refused``: those that lived were refused. ``silent``:
    nothing came back, from the server or the network.
    """
    workers = [name for name, served in SERVED.items() if server in served]
    edges = {at for span in world.silences[server] for at in span}
    for name in workers:
        edges |= {at for span in world.down[name] for at in span}
        edges |= {at for block in world.blocks[name, server] for at in (block.start, block.end)}
    open_since: tuple[float, str] | None = None
    for start, end in itertools.pairwise(sorted(edges)):
        why = _why(world, server, workers, start)
        if open_since is not None and open_since[1] != why:
            yield open_since[0], start, open_since[1]
            open_since = None
        if why is not None and open_since is None:
            open_since = (start, why)
        if open_since is not None and end == max(edges):
            yield open_since[0], end, open_since[1]


def _why(world: World, server: str, workers: list[str], at: float) -> str | None:
    """What keeps every live worker from *server* right after *at*; ``None``: one of them reaches it."""
    live = [name for name in workers if not _within(world.down[name], at)]
    if not live:
        return "alone"
    blocks = [
        next((block for block in world.blocks[name, server] if block.start <= at < block.end), None)
        for name in live
    ]
    if all(block is not None and block.refused for block in blocks):
        return "refused"
    if _within(world.silences[server], at) or all(block is not None for block in blocks):
        return "silent"
    return None


def _within(spans: list[tuple[float, float]], at: float) -> bool:
    return any(start <= at < end for start, end in spans)


# -- rendered on ----------------------------------------------------------------------------------


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
    """Whether somebody could have stopped a prompt on *server* in that time, but for what we broke."""
    spans = [*world.stalls[server], *((start, end) for start, end, _ in _unreachable(world, server))]
    spans += [
        (shot.fired_at, shot.over_at + 5)
        for shot in world.shots
        if shot.fault.kind in {"postgres killed", "postgres crashed"}
    ]
    return any(start - 10 <= until and end + 10 >= since for start, end in spans)


def clock(at: float) -> str:
    """A time of day, to the millisecond."""
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d}"
