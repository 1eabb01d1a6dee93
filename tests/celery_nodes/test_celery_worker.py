"""The product's own worker command under what happens to workers: kills, revokes, strange messages."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult
from pytest_celery import CeleryTestSetup

from genpulse.config import Settings
from genpulse.model import AttemptOutcome, TaskStatus
from genpulse.tasks.producer import Producer
from genpulse.tasks.queues import takes
from tests.celery_nodes.conftest import Story
from tests.celery_nodes.nodes import GenPulseWorker, children
from tests.support import wait_until

pytestmark = pytest.mark.timeout(120)


def test_a_task_goes_through_and_celery_knows_it_by_our_id(
    celery_setup: CeleryTestSetup, story: Story, celery_app: Celery
) -> None:
    """Ledger, relay, Redis, worker, ledger; and ``AsyncResult`` of our id tells the same story."""
    task_id = story.submit()

    task = story.ended(task_id)

    assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1)
    result: Any = AsyncResult(task_id, app=celery_app)
    wait_until(lambda: result.state == "SUCCESS")
    assert result.name == "genpulse.sleep"


def test_a_killed_child_costs_one_attempt(celery_setup: CeleryTestSetup, story: Story) -> None:
    """The task runs again in another child, and the lost attempt stays in its history."""
    task_id = story.submit(die="first")

    task = story.ended(task_id)

    assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 2)
    assert [attempt.outcome for attempt in sorted(task.attempts, key=lambda found: found.number)] == [
        AttemptOutcome.LOST,
        AttemptOutcome.COMPLETED,
    ]


def test_the_parent_ends_the_lease_of_a_dead_child(
    story: Story, start_worker: Callable[..., GenPulseWorker]
) -> None:
    """It alone sees the death at once; the lease itself would have gone on for a minute."""
    start_worker("patient", "-c", "1", GENPULSE_LEASE_S="60")
    task_id = story.submit(die="first")
    child = story.started(task_id)

    (lease,) = wait_until(lambda: story.ledger.stale_leases(missed_s=1e6), 10)

    assert (lease.fence.task_id, lease.expired) == (task_id, True)
    assert lease.worker.endswith(f":{child}")


def test_a_task_that_kills_every_child_ends(celery_setup: CeleryTestSetup, story: Story) -> None:
    """Poison is bounded by the ledger (``GENPULSE_MAX_LOST``); Celery's own retry would never end."""
    task_id = story.submit(die="always")

    task = story.ended(task_id, 60)

    assert task.status is TaskStatus.FAILED
    assert task.error is not None
    assert task.error.code == "worker_lost"
    other = story.submit()
    assert story.ended(other).status is TaskStatus.COMPLETED


def test_a_killed_worker_loses_nothing(celery_setup: CeleryTestSetup, story: Story) -> None:
    """``kill -9`` of the main process: its children die with it, and the next worker goes on."""
    running = story.submit(seconds=2)
    waiting = [story.submit() for _ in range(3)]
    story.started(running)

    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    celery_setup.worker.restart()

    assert story.ended(running, 30).attempt == 2
    for task_id in waiting:
        assert story.ended(task_id, 30).status is TaskStatus.COMPLETED
    assert len(story.lines("end", running)) == 1


def test_sigterm_hands_back_and_ends(
    celery_setup: CeleryTestSetup, story: Story, start_worker: Callable[..., GenPulseWorker]
) -> None:
    """A worker told to stop gives its task back uncounted, and ends by itself with exit code 0."""
    task_id = story.submit(seconds=30)
    story.started(task_id)

    celery_setup.worker.kill("SIGTERM")

    service = celery_setup.worker.container.service
    assert service.wait(25) == 0
    task = story.get(task_id)
    assert task.status is TaskStatus.PENDING
    assert [attempt.outcome for attempt in task.attempts] == [AttemptOutcome.HANDED_BACK]


def test_a_terminated_task_is_canceled(
    celery_setup: CeleryTestSetup, story: Story, celery_app: Celery
) -> None:
    """What Flower's *Terminate* does: the ledger says canceled, and the child goes on with the next task."""
    task_id = story.submit(seconds=30)
    story.started(task_id)

    before = children(celery_setup.worker.container.service)
    celery_app.control.revoke(task_id, terminate=True)

    assert story.ended(task_id).status is TaskStatus.CANCELED
    assert story.ended(story.submit()).status is TaskStatus.COMPLETED
    assert children(celery_setup.worker.container.service) == before  # the cancel ends it, no signal


def test_a_revoked_task_is_canceled(celery_setup: CeleryTestSetup, story: Story, celery_app: Celery) -> None:
    """
    What Flower's *Revoke* does to a task that waits: it is canceled in the ledger.

    Its message alone taken away, it would be sent again for ever.
    """
    busy = [story.submit(seconds=3) for _ in range(2)]
    for task_id in busy:
        story.started(task_id)
    waiting = story.submit()

    celery_app.control.revoke(waiting)

    assert story.ended(waiting).status is TaskStatus.CANCELED
    assert story.lines("start", waiting) == []


def test_a_revoke_leaves_no_memory_in_any_worker(
    celery_setup: CeleryTestSetup, story: Story, celery_app: Celery
) -> None:
    """Celery's own would swallow every later message with that id, for hours; unknown ids do no harm."""
    task_id, unknown = story.submit(seconds=30), str(uuid.uuid4())
    story.started(task_id)

    celery_app.control.revoke([task_id, unknown, "nonsense"], terminate=True, signal="SIGKILL")

    assert story.ended(task_id).status is TaskStatus.CANCELED
    (revoked,) = (wait_until(celery_app.control.inspect(timeout=1).revoked, 20) or {}).values()
    assert revoked == []


def test_messages_that_are_no_tasks_end_no_worker(
    celery_setup: CeleryTestSetup, story: Story, broker_url: str
) -> None:
    """Nonsense, unknown ids, unknown task types and strange arguments are dropped; work goes on."""
    worker = celery_setup.worker.container.service
    pid = worker.pid
    before = children(worker)
    producer = Producer(Settings.build(redis_url=broker_url))
    with redis.Redis.from_url(broker_url) as client:
        client.lpush("comfy", "garbage", b"\xff", "null", "{}", '{"headers": {"task": "genpulse.sleep"}}')
        producer.publish(
            [
                ("nonsense", "genpulse.sleep", "comfy", 0),
                ("../../etc/passwd", "genpulse.sleep", "comfy", 0),
                (str(uuid.uuid4()), "genpulse.sleep", "comfy", 0),
                (str(uuid.uuid4()), "genpulse.nobody-has-this", "comfy", 0),
                ("", "", "comfy", 0),
            ]
        )
        for body in (b"3", b"null", b"[]", b"[[], {}]", b'{"args": 1}', b"[1, 2, 3]", b"{"):
            push_call(client, body)
        wait_until(lambda: not client.llen("comfy"))
    producer.close()

    assert story.ended(story.submit()).status is TaskStatus.COMPLETED
    assert (worker.alive(), worker.pid, children(worker)) == (True, pid, before)


def push_call(client: Any, body: bytes) -> None:
    """Put a message with a sound envelope and a strange *body* into the queue."""
    import base64
    import json

    message = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "genpulse.sleep", "id": str(uuid.uuid4()), "lang": "py"},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "comfy"},
            "body_encoding": "base64",
        },
    }
    client.lpush("comfy", json.dumps(message))


def test_an_urgent_task_overtakes_those_that_wait(celery_setup: CeleryTestSetup, story: Story) -> None:
    """Nothing is prefetched: with both children busy, what comes last and is urgent runs first."""
    from genpulse.model import NewTask, Priority

    for _ in range(2):
        story.started(story.submit(seconds=2))
    lesser = [story.submit() for _ in range(4)]
    time.sleep(1)  # long enough for the relay and for a worker that prefetches
    urgent, _ = story.ledger.submit(
        NewTask("sleep", "comfy", {"log": str(story.log)}, owner="test", priority=Priority.HIGH)
    )

    for task_id in lesser:
        story.ended(task_id)

    order = [line.split()[1] for line in story.log.read_text().splitlines() if line.startswith("start")][2:]
    assert order.index(urgent.id) <= 1  # two children came free at about the same time


def test_a_hung_child_is_ended_by_celerys_limit(
    story: Story, start_worker: Callable[..., GenPulseWorker]
) -> None:
    """The wide net: a child that nothing else reached is killed, and its lease ends with it."""
    worker = start_worker("limited", "-c", "1", "--time-limit", "2")
    task_id = story.submit(seconds=60, deaf=True)
    first = story.started(task_id)

    story.started(task_id, times=2)

    assert first not in children(worker.service)


def test_two_workers_of_one_host_have_two_names(
    celery_setup: CeleryTestSetup, celery_app: Celery, start_worker: Callable[..., GenPulseWorker]
) -> None:
    """Celery's default name is the same for both; Flower and leases would take them for one."""
    second = start_worker("second", "-c", "1")

    names = wait_until(
        lambda: (found := sorted(celery_app.control.inspect(timeout=1).ping() or {}))[1:] and found, 20
    )

    pids = {celery_setup.worker.container.service.pid, second.service.pid}
    assert {int(name.partition("@")[0].rpartition("-")[2]) for name in names} == pids
    assert all(name.startswith("genpulse-comfy-") for name in names)


def test_a_given_name_is_kept(start_worker: Callable[..., GenPulseWorker], celery_app: Celery) -> None:
    """``-n`` is the user's word."""
    start_worker("named", "-c", "1", "-n", "painter@%h")

    names = wait_until(lambda: celery_app.control.inspect(timeout=1).ping(), 20)
    assert [name.partition("@")[0] for name in names or {}] == ["painter"]


def test_concurrency_and_server_queues_follow_the_servers(
    start_worker: Callable[..., GenPulseWorker],
    celery_app: Celery,
    start_simulator: Callable[..., Any],
) -> None:
    """``-Q comfy`` with two servers: two slots for each, and the queue of each is consumed."""
    one, two = start_simulator("one"), start_simulator("two")
    start_worker("serving", GENPULSE_COMFY_URLS=f"gpu1={one.url},gpu2={two.url}")
    inspect = celery_app.control.inspect(timeout=1)

    stats = wait_until(inspect.stats, 20)
    queues = wait_until(inspect.active_queues, 20)

    assert [found["pool"]["max-concurrency"] for found in stats.values()] == [4]
    assert {queue["name"] for found in queues.values() for queue in found} == {
        "comfy",
        "comfy@gpu1",
        "comfy@gpu2",
    }


@pytest.mark.parametrize(
    ("asked", "served"), [("cpu", []), ("comfy,cpu", ["gpu1"])], ids=["cpu", "comfy-and-cpu"]
)
def test_a_dead_server_stops_no_queue_that_needs_none(
    start_worker: Callable[..., GenPulseWorker], story: Story, asked: str, served: list[str]
) -> None:
    """And a worker for other queues serves no server, whatever its settings name."""
    worker = start_worker("other", "-Q", asked, "-c", "1", GENPULSE_COMFY_URLS="gpu1=http://127.0.0.1:1")

    found = wait_until(story.ledger.workers, 20)[0]

    assert [server["name"] for server in found.servers] == served
    assert found.consuming
    assert takes(found, "cpu")
    assert not takes(found, "comfy")
    assert worker.service.log_text().count("not_consuming") == len(served)


def test_c_wins_over_the_servers(start_worker: Callable[..., GenPulseWorker], celery_app: Celery) -> None:
    """``-c`` is the user's word."""
    start_worker("small", "-c", "3")

    stats = wait_until(celery_app.control.inspect(timeout=1).stats, 20)
    assert [found["pool"]["max-concurrency"] for found in stats.values()] == [3]


def test_a_child_hit_by_sigterm_is_replaced(celery_setup: CeleryTestSetup, story: Story) -> None:
    """A supervisor or an operator that ends one child takes no slot from the worker."""
    worker = celery_setup.worker.container.service
    pid = children(worker)[0]

    os.kill(pid, signal.SIGTERM)

    wait_until(lambda: pid not in children(worker) and len(children(worker)) == 2)
    assert story.ended(story.submit()).status is TaskStatus.COMPLETED
