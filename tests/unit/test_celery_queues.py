"""The table of queues: what a worker consumes, how many slots it has, what Redis calls a queue."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from kombu.transport.redis import PRIORITY_STEPS, Channel

from genpulse.model import Priority, WorkerInfo
from genpulse.tasks import queues


def test_a_worker_also_consumes_the_queues_of_its_servers() -> None:
    """A task bound to a server reaches whichever worker serves it, whatever its ``-Q`` order."""
    assert queues.worker_queues(["comfy"], ["gpu1", "gpu2"]) == ("comfy", "comfy@gpu1", "comfy@gpu2")


def test_a_queue_without_servers_has_no_server_queues() -> None:
    """``cpu`` work runs on no ComfyUI server, so nothing is ever bound there."""
    assert queues.worker_queues(["cpu"], ["gpu1"]) == ("cpu",)


def test_a_named_server_queue_is_not_doubled() -> None:
    """``-Q comfy,comfy@gpu1`` asks for the same thing as ``-Q comfy``."""
    assert queues.worker_queues(["comfy", "comfy@gpu1"], ["gpu1"]) == ("comfy", "comfy@gpu1")


@pytest.mark.parametrize(
    ("asked", "servers", "configured", "expected"),
    [
        (["comfy"], ["a", "b"], 0, 4),
        (["comfy"], [], 0, 2),
        (["comfy", "comfy@a"], ["a"], 0, 2),
        (["comfy"], ["a", "b"], 1, 1),
        (["cpu"], ["a"], 7, 7),
    ],
)
def test_slots_follow_the_servers(
    asked: list[str], servers: list[str], configured: int, expected: int
) -> None:
    """Two slots for each server; a number that was set wins."""
    assert queues.slots(asked, servers, configured) == expected


def test_cpu_work_gets_the_cores() -> None:
    """A queue without servers has one slot for each core, also beside ``comfy``."""
    assert queues.slots(["cpu"], ["a"]) >= 1
    assert queues.slots(["comfy", "cpu"], ["a"]) >= queues.slots(["cpu"], [])


def test_webhooks_beside_others_get_a_slot_of_their_own() -> None:
    """A round of them holds one child, which is then not missing to the other queues."""
    assert queues.slots(["cpu", "webhooks"], []) == queues.slots(["cpu"], []) + 1
    assert queues.slots(["webhooks"], []) == queues.slots(["cpu"], [])
    assert queues.slots(["cpu", "webhooks"], [], 1) == 1


def test_redis_keys_are_kombus() -> None:
    """The runway is read from the very lists that kombu writes."""
    ours = [queues.redis_key("comfy@gpu1", step) for step in queues.PRIORITY_STEPS]

    assert list(queues.PRIORITY_STEPS) == PRIORITY_STEPS
    assert ours == [f"comfy@gpu1{Channel.sep}{step}" if step else "comfy@gpu1" for step in PRIORITY_STEPS]
    assert queues.redis_keys("comfy@gpu1") == tuple(ours)


def test_every_priority_has_its_own_list() -> None:
    """No two priorities of the API share a list in Redis, and the most urgent is read first."""
    steps = [priority.step for priority in (Priority.HIGH, Priority.NORMAL, Priority.LOW)]

    assert steps == sorted(set(steps))
    assert set(steps) <= set(queues.PRIORITY_STEPS)


def test_a_server_queue_leads_back_to_its_queue() -> None:
    """Queue and server queue can be told apart, because a queue's name holds no ``@``."""
    assert queues.base_queue(queues.server_queue("comfy", "gpu1")) == "comfy"
    with pytest.raises(ValueError, match="cannot be the name"):
        queues.check_name("a@b")


def worker(**given: Any) -> WorkerInfo:
    """A live worker of both queues with one healthy server."""
    now = dt.datetime.now(dt.UTC)
    facts: dict[str, Any] = {
        "name": "w@host", "host": "host", "pid": 1, "queues": ("comfy", "comfy@gpu1", "cpu"), "slots": 2,
        "servers": ({"name": "gpu1", "healthy": True, "reason": ""},), "consuming": True, "version": "1",
        "started_at": now, "seen_at": now,
    }  # fmt: skip
    return WorkerInfo(**facts | given)


SICK = ({"name": "gpu1", "healthy": False, "reason": "refused"},)


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        (worker(), {"comfy", "comfy@gpu1", "cpu"}),
        (worker(servers=SICK), {"cpu"}),
        (worker(consuming=False), set()),
        (worker(queues=("cpu",), servers=SICK), {"cpu"}),
        (worker(queues=("comfy",), servers=()), {"comfy"}),
    ],
    ids=["well", "server-sick", "draining", "cpu-only", "no-server-named"],
)
def test_a_worker_takes_what_it_can_run(found: WorkerInfo, taken: set[str]) -> None:
    """A dead ComfyUI stops the queues that need one, and no other."""
    assert {name for name in ("comfy", "comfy@gpu1", "cpu", "else") if queues.takes(found, name)} == taken
