"""What happens when something dies: the rows of the design's failure table, each tried for real."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
import requests

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


@pytest.mark.parametrize("cluster", ["sqlite"], indirect=True)
def test_one_prompt_survives_every_way_to_stop_a_worker(cluster: Cluster) -> None:
    """
    Each worker takes no more, hands back uncounted, leaves the prompt alone and ends; the next one adopts.

    The last one is stopped as ``docker stop`` does it: SIGTERM, and SIGKILL for all that lives 10 s later.
    """
    task_id = cluster.submit(sleeping(600))
    stops = (sigterm, sigterm_twice, sigint, sigterm_to_the_group, docker_stop)
    worker = "one"
    for number, stop in enumerate(stops):
        wait_until_followed(cluster, task_id, worker)
        successor = f"next{number}"
        if stop is not docker_stop:
            patient = stops[number + 1] is docker_stop  # only then the default of 8 s is what is tried
            env = {} if patient else {"GENPULSE_DRAIN_S": "1"}
            cluster.start_worker(successor, ["gpu1"], env=env)
        stop(cluster, worker)
        worker = successor

    found = cluster.ledger.get(task_id)
    assert found is not None
    assert [attempt.outcome for attempt in found.attempts] == ["handed_back"] * len(stops)
    assert len(cluster.renderings(task_id)) == 1
    assert cluster.cancel(task_id).status_code == 200


def wait_until_followed(cluster: Cluster, task_id: str, name: str) -> None:
    """Wait until the named worker follows the task's prompt."""

    def follows() -> bool:
        found = cluster.ledger.get(task_id)
        assert found is not None
        last = found.attempts[-1] if found.attempts else None
        return last is not None and last.prompt_id is not None and f"-{name}@" in last.worker

    wait_until(follows, 30, message=f"{name} follows {task_id}")
    cluster.wait_for_rendering(task_id)


def sigterm(cluster: Cluster, name: str) -> None:
    """To the main process."""
    os.kill(cluster.worker(name).pid, signal.SIGTERM)
    assert cluster.worker(name).wait(30) == 0


def sigterm_twice(cluster: Cluster, name: str) -> None:
    """By somebody impatient."""
    os.kill(cluster.worker(name).pid, signal.SIGTERM)
    time.sleep(0.3)
    sigterm(cluster, name)


def sigint(cluster: Cluster, name: str) -> None:
    """Ctrl-C, for which Celery's exit code is 1."""
    os.kill(cluster.worker(name).pid, signal.SIGINT)
    assert cluster.worker(name).wait(30) == 1


def sigterm_to_the_group(cluster: Cluster, name: str) -> None:
    """To every process of it, which is systemd's default."""
    os.killpg(cluster.worker(name).pid, signal.SIGTERM)
    assert cluster.worker(name).wait(30) == 0


def docker_stop(cluster: Cluster, name: str) -> None:
    """A polite word, ten seconds, and the end."""
    worker = cluster.worker(name)
    os.kill(worker.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        worker.wait(10.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("cluster", ["postgresql"], indirect=True)
def test_a_rolling_deploy_under_load_renders_nothing_twice(cluster: Cluster) -> None:
    """Both workers are replaced, one after the other, while they render what takes longer than their drain."""
    cluster.start_simulator("gpu2")
    env = {"GENPULSE_DRAIN_S": "1"}
    cluster.start_worker("old", ["gpu1", "gpu2"], env=env)
    tasks = [cluster.submit(sleeping(5, color)) for color in range(6)]
    cluster.wait_for_rendering(tasks[0])

    for number, old in enumerate(["one", "old"]):
        cluster.start_worker(f"new{number}", ["gpu1", "gpu2"], env=env)
        sigterm(cluster, old)

    for task_id in tasks:
        done = cluster.wait(task_id, 90)
        assert done["status"] == "completed"
        assert {attempt["outcome"] for attempt in done["attempts"]} <= {"handed_back", "completed"}
        assert len(cluster.renderings(task_id)) == 1


@pytest.mark.parametrize("cluster", ["sqlite"], indirect=True)
def test_a_server_that_is_dead_behind_its_http_stops_its_worker_until_it_is_restarted(
    cluster: Cluster,
) -> None:
    """The task waits and says why, the worker takes no more; a restart of the server is all that is needed."""
    cluster.start_simulator("gpu2")
    cluster.start_worker("two", ["gpu2"], env={"GENPULSE_STALL_S": "1"})
    sigterm(cluster, "one")
    faults = {"zombie": True}
    assert requests.post(f"{cluster.simulators['gpu2'].url}/simulator/faults", json=faults, timeout=5).ok
    task_id = cluster.submit(simple(1))

    reason = wait_until(
        lambda: (found := cluster.task(task_id)["wait_reason"]) and found["code"] == "no_server" and found, 30
    )
    assert "no progress" in reason["text"]
    status = requests.get(f"{cluster.url}/status", timeout=5).json()
    assert (status["servers"]["gpu2"]["healthy"], status["servers"]["gpu2"]["reason"]) == (
        False,
        "no progress",
    )
    assert requests.get(f"{cluster.simulators['gpu2'].url}/prompt", timeout=5).ok

    cluster.simulators["gpu2"].restart()
    assert cluster.wait(task_id, 40)["status"] == "completed"


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


def test_cancel_reaches_the_server(cluster: Cluster) -> None:
    """A cancel of a running task stops its prompt within a second, and no other."""
    other = cluster.submit(simple(1))
    cluster.wait(other)
    task_id = cluster.submit(sleeping(30))
    cluster.wait_for_rendering(task_id)

    began = time.time()
    assert cluster.cancel(task_id).status_code == 202
    done = cluster.wait(task_id)
    # Earlier tests of this session have left their lines in the same servers' logs.
    since = [event for event in cluster.executions() if event["t"] >= began]
    stopped = [event for event in since if event["event"] == "interrupted"]
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
