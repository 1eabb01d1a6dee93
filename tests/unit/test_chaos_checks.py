"""The chaos program's own judgement: it sees what must not be, and excuses what may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.schedule import KINDS, plan_faults, plan_orders
from tests.chaos.verify import Evidence, _renderings

TASK = "task"


def test_the_seed_decides_the_schedule() -> None:
    """The same seed breaks the same things at the same times; a long run has every kind."""
    faults = plan_faults(7, 600, postgresql=True, lease_s=15)

    assert faults == plan_faults(7, 600, postgresql=True, lease_s=15)
    assert faults != plan_faults(8, 600, postgresql=True, lease_s=15)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert plan_orders(7, 60, 50) == plan_orders(7, 60, 50)
    assert len({order.color for order in plan_orders(7, 60, 50)}) == 50


def seen(*prompts: tuple[str, str, float], status: str = "success") -> Evidence:
    """Prompts of one task, each with its server and the time of its start; one second long."""
    found = Evidence({}, [])
    for prompt_id, server, at in prompts:
        found.owner[prompt_id] = TASK
        for event, late in (("submitted", 0.0), ("started", 0.1), ("finished", 1.0)):
            entry = {"event": event, "prompt_id": prompt_id, "server": server, "t": at + late}
            found.events.append(entry | ({"status": status} if event == "finished" else {}))
            found.by_prompt[prompt_id].append(found.events[-1])
    return found


def world(**changes: Any) -> Any:
    """A world in which nothing happened but *changes*."""
    servers = ("gpu1", "gpu2", "gpu3")
    quiet: dict[str, Any] = {
        "deaths": {name: [] for name in servers},
        "silences": {name: [] for name in servers},
        "down": {"a": [], "b": [], "c": []},
    }
    return SimpleNamespace(**{name: value | changes.get(name, {}) for name, value in quiet.items()})


AGAIN = (("p1", "gpu2", 10.0), ("p2", "gpu3", 20.0))


def test_one_rendering_needs_no_reason() -> None:
    """And a prompt that no attempt names is seen."""
    assert list(_renderings(world(), seen(AGAIN[0]))) == []
    nobodys = seen(AGAIN[0])
    nobodys.owner.clear()
    assert len(list(_renderings(world(), nobodys))) == 1


@pytest.mark.parametrize(
    ("changes", "violations"),
    [
        ({}, 1),
        ({"deaths": {"gpu2": [10.5]}}, 0),
        ({"deaths": {"gpu2": [20.5]}}, 1),  # too late to be the reason
        ({"deaths": {"gpu3": [10.5]}}, 1),  # another server
        ({"silences": {"gpu2": [(9.0, 19.0)]}}, 0),
        ({"silences": {"gpu2": [(9.0, 11.0)]}}, 1),  # too short to be given up
        ({"down": {"b": [(11.0, 19.0)]}}, 1),  # the other worker of that server lives
        ({"down": {"a": [(12.0, 13.0)], "b": [(11.0, 19.0)]}}, 0),
        ({"down": {"a": [(19.5, 21.0)], "b": [(11.0, 19.0)]}}, 1),  # never both at once
    ],
)
def test_a_second_rendering_needs_a_reason(changes: dict[str, Any], violations: int) -> None:
    """Its server died, was silent for long, or had no live worker, between the two."""
    assert len(list(_renderings(world(**changes), seen(*AGAIN)))) == violations


def test_an_error_is_a_reason() -> None:
    """The prompt ended badly, and was judged."""
    assert list(_renderings(world(), seen(*AGAIN, status="error"))) == []
