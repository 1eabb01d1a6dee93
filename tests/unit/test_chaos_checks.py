"""The chaos program's own judgement: it sees what must not be, and excuses what may be."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from genpulse.model import Attempt, AttemptOutcome
from tests.chaos import audit
from tests.chaos.audit import Entry
from tests.chaos.evidence import Evidence
from tests.chaos.load import Clients
from tests.chaos.recovery import LIMITS, Recovery
from tests.chaos.schedule import KINDS, SERVED, SERVERS, Order, plan_faults, plan_orders, stall_limit_s
from tests.chaos.verify import _rendered
from tests.chaos.world import Block

TASK = "task"


def test_the_seed_decides_the_schedule() -> None:
    """The same seed breaks the same things at the same times; a long run has every kind."""
    faults = plan_faults(7, 600, postgresql=True, lease_s=15)

    assert faults == plan_faults(7, 600, postgresql=True, lease_s=15)
    assert faults != plan_faults(8, 600, postgresql=True, lease_s=15)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.kind for fault in plan_faults(7, 600, postgresql=True, lease_s=15, kinds=["deploy"])} == {
        "deploy"
    }
    assert plan_orders(7, 60, 50) == plan_orders(7, 60, 50)
    assert len({order.color for order in plan_orders(7, 60, 50)}) == 50


@pytest.mark.parametrize(("minutes", "tasks"), [(1, 80), (30, 3000)])
def test_the_tasks_fit_the_servers(minutes: int, tasks: int) -> None:
    """From 0.05 s to a minute, few of them long, and a part of the servers' time is left."""
    length_s = 60.0 * minutes
    faults = plan_faults(7, length_s, postgresql=True, lease_s=15)
    seconds = [order.seconds for order in plan_orders(7, length_s, tasks, faults)]

    assert len(seconds) == tasks
    assert min(seconds) >= 0.05
    assert max(seconds) <= 60
    assert sum(seconds) < 0.75 * len(SERVERS) * length_s
    assert max(seconds) < 2 * stall_limit_s(length_s)  # else who waits behind it takes the server for dead
    assert sum(each > 10 for each in seconds) < 0.1 * tasks


# -- rendered again -------------------------------------------------------------------------------


def seen(*prompts: tuple[str, str, float], status: str = "success", outcome: str = "lost") -> Evidence:
    """Prompts of one task, each with its server and the time of its start; one second long."""
    found = Evidence({}, [])
    for prompt_id, server, at in prompts:
        found.owner[prompt_id] = TASK
        ended = dt.datetime.fromtimestamp(at + 5, dt.UTC)
        found.followers[prompt_id].append(
            Attempt(
                TASK,
                1,
                "w0-a@test:1",
                started_at=dt.datetime.fromtimestamp(at, dt.UTC),
                ended_at=ended,
                outcome=AttemptOutcome(outcome),
            )
        )
        for event, late in (("submitted", 0.0), ("started", 0.1), ("finished", 1.0)):
            entry = {"event": event, "prompt_id": prompt_id, "server": server, "t": at + late}
            found.events.append(entry | ({"status": status} if event == "finished" else {}))
            found.by_prompt[prompt_id].append(found.events[-1])
    return found


def world(**changes: Any) -> Any:
    """A world in which nothing happened but *changes*."""
    quiet: dict[str, Any] = {
        name: {server: [] for server in SERVERS} for name in ("deaths", "silences", "stalls", "gone")
    }
    quiet["down"] = {name: [] for name in SERVED}
    parts = {name: value | changes.get(name, {}) for name, value in quiet.items()}
    blocks = defaultdict(list, changes.get("blocks", {}))
    settings = SimpleNamespace(adopt_wait_s=120)
    return SimpleNamespace(
        **parts, blocks=blocks, stall_s=15, shots=[], cluster=SimpleNamespace(settings=settings)
    )


def clients(form: str = "picture") -> Clients:
    """Nobody, who sent one order."""
    found = Clients("", "", [])
    found.accepted[TASK] = Order(0, 0.0, 1.0, 0, form=form)
    return found


AGAIN = (("p1", "gpu2", 10.0), ("p2", "gpu3", 20.0))


def test_one_rendering_needs_no_reason() -> None:
    """And a prompt that no attempt names, or nobody ordered, is seen."""
    assert list(_rendered(world(), clients(), seen(AGAIN[0]))) == []
    unnamed = seen(AGAIN[0])
    unnamed.followers.clear()
    assert len(list(_rendered(world(), clients(), unnamed))) == 1


@pytest.mark.parametrize(
    ("changes", "violations"),
    [
        ({}, 1),
        ({"deaths": {"gpu2": [10.5]}}, 0),
        ({"deaths": {"gpu2": [20.5]}}, 1),  # too late to be the reason
        ({"deaths": {"gpu3": [10.5]}}, 1),  # another server
        ({"silences": {"gpu2": [(9.0, 19.0)]}}, 0),
        ({"silences": {"gpu2": [(9.0, 15.0)]}}, 1),  # too short to be given up
        ({"stalls": {"gpu2": [(5.0, 30.0)]}}, 1),  # not beyond the limit when it was sent again
        ({"down": {"b": [(11.0, 19.0)]}}, 1),  # the other worker of that server lives
        ({"down": {"a": [(12.0, 13.5)], "b": [(11.0, 19.0)]}}, 0),
        ({"down": {"a": [(10.5, 11.5)], "b": [(10.0, 11.0)]}}, 1),  # both were back long before
        ({"down": {"a": [(19.5, 21.0)], "b": [(11.0, 19.0)]}}, 1),  # never both at once
        ({"blocks": {("a", "gpu2"): [Block(9.0, 19.5, False)]}}, 1),  # the other worker reaches it
        (
            {
                "blocks": {
                    ("a", "gpu2"): [Block(9.0, 19.5, False)],
                    ("b", "gpu2"): [Block(9.5, 19.5, False)],
                }
            },
            0,
        ),
        (
            {"blocks": {("a", "gpu2"): [Block(11.0, 12.5, True)], ("b", "gpu2"): [Block(11.0, 12.5, True)]}},
            0,
        ),
        ({"blocks": {("a", "gpu2"): [Block(11.0, 12.5, True)]}, "down": {"b": [(9.0, 19.0)]}}, 0),
    ],
)
def test_a_second_rendering_needs_a_reason(changes: dict[str, Any], violations: int) -> None:
    """Its server died, was silent for long or refused, or had no live worker, when that was decided."""
    assert len(list(_rendered(world(**changes), clients(), seen(*AGAIN)))) == violations


def test_what_arrives_late_was_not_there_to_be_adopted() -> None:
    """A prompt that a broken network held up came to its server after the next one was sent."""
    found = seen(*AGAIN)
    for event in found.by_prompt["p1"]:
        event["t"] += 15.0
    found.followers["p1"][0] = dataclasses.replace(
        found.followers["p1"][0], submitted_at=dt.datetime.fromtimestamp(10.0, dt.UTC)
    )

    assert list(_rendered(world(), clients(), found)) == []


def test_a_handed_back_prompt_waits_for_its_worker() -> None:
    """A deploy renders nothing twice, although no worker serves the server for a while."""
    away = {"down": {"a": [(9.0, 19.0)], "b": [(9.0, 19.0)]}}

    assert len(list(_rendered(world(**away), clients(), seen(*AGAIN, outcome="handed_back")))) == 1
    assert len(list(_rendered(world(**away), clients(), seen(*AGAIN, outcome="lost")))) == 0


@pytest.mark.parametrize(
    ("form", "outcome", "violations"),
    [("socket", "lost", 0), ("socket", "canceled", 1), ("picture", "lost", 1)],
)
def test_only_what_was_on_a_socket_may_be_rendered_again(form: str, outcome: str, violations: int) -> None:
    """And only if the socket broke with its attempt."""
    assert len(list(_rendered(world(), clients(form), seen(*AGAIN, outcome=outcome)))) == violations


# -- the book, and the limits ---------------------------------------------------------------------


def entry(
    old: str, new: str, attempts: tuple[int, int] = (1, 1), claims: tuple[Any, Any] = ("a", "a")
) -> Entry:
    """One change of a task's row."""
    return Entry(TASK, old, new, *attempts, *claims)


@pytest.mark.parametrize(
    "wrong",
    [
        entry("completed", "pending"),
        entry("canceled", "completed"),
        entry("processing", "completed", (1, 2)),
        entry("pending", "processing", (1, 1)),
        entry("pending", "processing", (1, 2), ("a", "a")),
        entry("processing", "processing", (1, 1), ("a", "b")),
        entry("pending", "completed"),
        Entry(TASK, None, "output of completed", 1, 2, None, None),
        Entry(TASK, None, "output of processing", 2, 2, None, None),
    ],
)
def test_the_book_shows_what_no_task_does(wrong: Entry) -> None:
    """Final states that change, claims without a fence, outputs of an old attempt."""
    assert len(list(audit.wrong([wrong]))) == 1


def test_limits_count_what_else_was_broken() -> None:
    """A recovery alone has its limit; others that fell into it, and slack, add to it."""

    def late(seconds: float, others_s: float = 0.0, slack: float = 1.0) -> bool:
        return Recovery("child killed", TASK, 0.0, seconds, LIMITS["child killed"], others_s).is_late(slack)

    assert not late(7.9)
    assert late(8.1)
    assert not late(9.0, others_s=2.0)
    assert not late(15.0, slack=2.0)
