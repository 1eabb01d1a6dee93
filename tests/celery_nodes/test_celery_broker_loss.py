"""Redis restarted, killed, wiped and black-holed under a worker that is at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery

from genpulse.model import TaskStatus
from genpulse.testing.services import FaultProxy
from tests.celery_nodes.conftest import Story
from tests.celery_nodes.nodes import GenPulseWorker, Valkey
from tests.support import wait_until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def proxy(default_redis_broker: Valkey, fault_proxy: Callable[[str], FaultProxy]) -> FaultProxy:
    """A breakable network between the worker and Redis."""
    return fault_proxy(default_redis_broker.service.url)


@pytest.fixture
def through_proxy(proxy: FaultProxy, default_redis_broker: Valkey) -> dict[str, str]:
    """The worker's environment with the breakable network in it."""
    return {"GENPULSE_REDIS_URL": proxy.url_of(default_redis_broker.service.url)}


def test_a_restart_of_redis_disturbs_no_task_and_work_goes_on_within_seconds(
    start_worker: Callable[..., GenPulseWorker], story: Story, default_redis_broker: Valkey
) -> None:
    """
    Celery alone: the running task twice, or its result lost, and up to 30 s without work.

    One child is busy and one waits in BRPOP, which is how 5.7.0 crashed.
    """
    worker = start_worker("worker", "-c", "2").service
    pid = worker.pid
    running = story.submit(seconds=8)
    story.started(running)

    default_redis_broker.service.stop(keep=True)
    waiting = story.submit()
    time.sleep(3)
    default_redis_broker.service.start()
    back = time.monotonic()

    story.started(waiting, timeout_s=60)
    assert time.monotonic() - back < 12  # about 3 on an idle machine; Celery's own step is 30
    task = story.ended(running, 60)
    assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1)
    assert len(story.lines("start", running)) == 1
    assert (worker.alive(), worker.pid) == (True, pid)


def test_a_worker_survives_losing_redis_again_and_again(
    start_worker: Callable[..., GenPulseWorker],
    story: Story,
    proxy: FaultProxy,
    through_proxy: dict[str, str],
) -> None:
    """The connection is cut six times while one child works and one waits: same process, no second run."""
    worker = start_worker("worker", "-c", "2", **through_proxy).service
    pid = worker.pid
    running = story.submit(seconds=10)
    story.started(running)

    for _ in range(6):
        proxy.cut()
        time.sleep(1)

    assert story.ended(running, 60).attempt == 1
    assert len(story.lines("start", running)) == 1
    assert story.ended(story.submit(), 60).status is TaskStatus.COMPLETED
    assert (worker.alive(), worker.pid) == (True, pid)


def test_a_task_ends_while_redis_is_a_black_hole(
    start_worker: Callable[..., GenPulseWorker],
    story: Story,
    proxy: FaultProxy,
    through_proxy: dict[str, str],
) -> None:
    """The outcome goes to the ledger at once; the copy for Celery's tools holds nobody up."""
    start_worker("worker", "-c", "1", **through_proxy)
    running = story.submit(seconds=2)
    story.started(running)

    proxy.set_mode("blackhole")

    assert story.ended(running).status is TaskStatus.COMPLETED
    wait_until(lambda: story.lines("end", running))
    proxy.set_mode("pass")
    assert story.ended(story.submit(), 60).status is TaskStatus.COMPLETED


def test_a_child_lost_while_redis_is_away_costs_one_attempt(
    start_worker: Callable[..., GenPulseWorker],
    story: Story,
    proxy: FaultProxy,
    through_proxy: dict[str, str],
) -> None:
    """
    The main process waits for Redis and sees no child die; the ledger notices by the missed beats.

    Its background threads go on, so the task is ready when Redis is back.
    """
    start_worker("worker", "-c", "1", **through_proxy)
    task_id = story.submit(seconds=6)
    child = story.started(task_id)
    time.sleep(3)  # one lease: a new worker takes nothing back before
    proxy.set_mode("blackhole")

    os.kill(child, signal.SIGKILL)

    wait_until(lambda: story.get(task_id).status is TaskStatus.PENDING, 30)
    proxy.set_mode("pass")
    assert story.ended(task_id, 60).attempt == 2


def test_a_wiped_redis_loses_no_task(
    start_worker: Callable[..., GenPulseWorker], story: Story, default_redis_broker: Valkey
) -> None:
    """Messages that are gone are sent again; nothing runs twice."""
    start_worker("worker", "-c", "1")
    busy = story.submit(seconds=3)
    story.started(busy)
    waiting = [story.submit() for _ in range(3)]
    with redis.Redis.from_url(default_redis_broker.service.url) as client:
        wait_until(lambda: any(key.startswith(b"comfy") for key in client.scan_iter()))
        client.flushall()

    for task_id in [busy, *waiting]:
        assert story.ended(task_id, 60).status is TaskStatus.COMPLETED
        assert len(story.lines("start", task_id)) == 1


def test_redis_holds_nothing_for_ever_but_what_is_listed(
    start_worker: Callable[..., GenPulseWorker],
    story: Story,
    default_redis_broker: Valkey,
    celery_app: Celery,
) -> None:
    """After work, every key without an expiry is on the list of permanent keys."""
    from genpulse.tasks.queues import PERMANENT_KEYS

    start_worker("worker", "-c", "1")
    for _ in range(3):
        story.ended(story.submit())
    assert wait_until(celery_app.control.inspect(timeout=1).ping, 20)

    def strangers() -> list[str]:
        with redis.Redis.from_url(default_redis_broker.service.url) as client:
            found: Any = client.scan_iter()
            return [
                key.decode() for key in found if client.ttl(key) == -1 and key.decode() not in PERMANENT_KEYS
            ]

    wait_until(lambda: not strangers(), 10, message=f"only listed keys, not {strangers()}")
