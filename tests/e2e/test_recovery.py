"""What happens when something dies: the rows of the design's failure table, each tried for real."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support import wait_until
from tests.support.cluster import Cluster, simple, sleeping

pytestmark = pytest.mark.timeout(180)


def steady(cluster: Cluster) -> None:
    """Wait until the API's sweeper may reap: it was connected for one lease without a break."""
    time.sleep(max(0.0, cluster.settings.lease_s + 1.5 - (time.monotonic() - cluster.started_at)))


def test_killed_child_is_adopted(cluster: Cluster) -> None:
    """When the child that renders is killed with -9, within 8 s another one follows the very same prompt."""
    steady(cluster)
    task_id = cluster.submit(sleeping(14))
    cluster.wait_for_rendering(task_id)

    killed_at = time.monotonic()
    cluster.kill(cluster.child_running(task_id))
    wait_until(lambda: cluster.task(task_id)["attempt"] == 2 and len(prompts(cluster, task_id)) == 2, 12)
    recovered_s = time.monotonic() - killed_at

    done = cluster.wait(task_id)
    assert done["status"] == "completed"
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["lost", "completed"]
    assert len(cluster.renderings(task_id)) == 1
    assert len(set(prompts(cluster, task_id))) == 1
    assert recovered_s < 8


def test_killed_worker_is_adopted_by_the_next(cluster: Cluster) -> None:
    """When a whole worker is killed with -9, its successor on that server adopts the prompt."""
    steady(cluster)
    task_id = cluster.submit(sleeping(14))
    cluster.wait_for_rendering(task_id)

    cluster.kill(cluster.worker("one").pid)
    cluster.start_worker("two", ["gpu1"], wait=False)
    wait_until(lambda: cluster.task(task_id)["attempt"] == 2 and len(prompts(cluster, task_id)) == 2, 20)

    done = cluster.wait(task_id)
    assert done["status"] == "completed"
    assert len(cluster.renderings(task_id)) == 1


def test_killed_server_means_another_rendering(cluster: Cluster) -> None:
    """ComfyUI forgets all when it dies: the task is rendered on another server within 5 s."""
    cluster.start_simulator("gpu2")
    cluster.start_worker("two", ["gpu2"])
    task_id = cluster.submit(sleeping(6))
    seen = cluster.wait_for_rendering(task_id)
    victim = seen["attempts"][-1]["server"]

    killed_at = time.monotonic()
    cluster.simulators[victim].kill()
    wait_until(lambda: len(cluster.renderings(task_id)) == 2, 15)
    recovered_s = time.monotonic() - killed_at

    done = cluster.wait(task_id)
    assert done["status"] == "completed"
    assert recovered_s < 5


def test_drain_hands_over_without_stopping_the_prompt(cluster: Cluster) -> None:
    """SIGTERM to a worker: it exits within its grace, and the next one adopts what it rendered."""
    task_id = cluster.submit(sleeping(25))
    cluster.wait_for_rendering(task_id)

    began = time.monotonic()
    os.kill(cluster.worker("one").pid, signal.SIGTERM)
    wait_until(lambda: not cluster.worker("one").alive(), 30)
    drained_s = time.monotonic() - began
    cluster.start_worker("two", ["gpu1"])

    done = cluster.wait(task_id, 60)
    assert done["status"] == "completed"
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["handed_back", "completed"]
    assert len(cluster.renderings(task_id)) == 1
    assert drained_s < 15


def test_child_told_to_stop_hands_back(cluster: Cluster) -> None:
    """SIGTERM to the child that renders: no loss is counted, the prompt runs on, and the child ends."""
    task_id = cluster.submit(sleeping(12))
    cluster.wait_for_rendering(task_id)

    child = cluster.child_running(task_id)
    os.kill(child, signal.SIGTERM)

    done = cluster.wait(task_id, 60)
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["handed_back", "completed"]
    assert len(cluster.renderings(task_id)) == 1
    wait_until(lambda: child not in cluster.children("one"), 10)


def test_group_told_to_stop_hands_back(cluster: Cluster) -> None:
    """The same when a supervisor signals every process of the worker, as systemd does by default."""
    task_id = cluster.submit(sleeping(16))
    cluster.wait_for_rendering(task_id)

    os.killpg(cluster.worker("one").pid, signal.SIGTERM)
    wait_until(lambda: not cluster.worker("one").alive(), 30)
    cluster.start_worker("two", ["gpu1"])

    done = cluster.wait(task_id, 60)
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["handed_back", "completed"]
    assert len(cluster.renderings(task_id)) == 1


def test_cancel_reaches_the_server(cluster: Cluster) -> None:
    """A cancel of a running task stops its prompt within a second, and no other."""
    other = cluster.submit(simple(1))
    cluster.wait(other)
    task_id = cluster.submit(sleeping(30))
    cluster.wait_for_rendering(task_id)

    began = time.time()
    assert cluster.cancel(task_id).status_code == 202
    done = cluster.wait(task_id)
    stopped = [event for event in cluster.executions() if event["event"] == "interrupted"]
    assert done["status"] == "canceled"
    assert [event["prompt_id"] for event in stopped] == prompts(cluster, task_id)
    assert stopped[0]["t"] - began < 1
    assert cluster.cancel(task_id).status_code == 200


def test_wiped_and_restarted_broker_loses_nothing(cluster: Cluster) -> None:
    """FLUSHALL and a restart of Valkey with tasks waiting: all of them run, each once."""
    import redis

    assert cluster.valkey is not None
    blocker = cluster.submit(sleeping(3))
    cluster.wait_for_rendering(blocker)
    waiting = [cluster.submit(sleeping(0.3, color)) for color in range(6)]
    redis.Redis.from_url(cluster.valkey.url).flushall()
    more = [cluster.submit(simple(color)) for color in range(3)]
    cluster.valkey.restart()
    late = cluster.submit(simple(9))

    for task_id in [blocker, *waiting, *more, late]:
        done = cluster.wait(task_id, 60)
        assert done["status"] == "completed"
        assert len(cluster.renderings(task_id)) == 1


def prompts(cluster: Cluster, task_id: str) -> list[str]:
    """The prompt ids of a task's attempts, in order; attempts without one are left out."""
    found = cluster.ledger.get(task_id)
    assert found is not None
    return [attempt.prompt_id for attempt in found.attempts if attempt.prompt_id is not None]
