"""Broker outages as a caller sees them, and a worker whose children die all the time."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from genpulse.testing import services
from genpulse.testing.services import FaultProxy
from tests.support import wait_until
from tests.support.cluster import Cluster, simple, sleeping


@pytest.mark.timeout(180)
def test_a_black_holed_broker_is_not_felt(tmp_path: Path, ledger_url: str) -> None:
    """Submitting, reading and canceling go on as fast as before; what was taken runs afterwards."""
    with (
        services.start_valkey(tmp_path / "valkey", append_only=True) as valkey,
        FaultProxy(valkey.url) as proxy,
        Cluster(tmp_path / "cluster", ledger_url, redis_url=proxy.url_of(valkey.url)) as cluster,
    ):
        cluster.start_simulator("gpu1")
        cluster.start_worker("one", ["gpu1"])
        cluster.wait(cluster.submit(simple(1)))
        running = cluster.submit(sleeping(60))
        cluster.wait_for_rendering(running)

        proxy.set_mode("blackhole")
        slowest = 0.0
        tasks = []
        for color in range(25):
            began = time.monotonic()
            tasks.append(cluster.submit(simple(color)))
            slowest = max(slowest, time.monotonic() - began)
        began = time.monotonic()
        assert cluster.cancel(tasks.pop()).status_code == 200
        assert cluster.cancel(running).status_code == 202
        slowest = max(slowest, time.monotonic() - began)
        cancel_s = wait_until(
            lambda: time.monotonic() - began if cluster.task(running)["completed_at"] else None, 15
        )
        assert slowest < 1.0
        assert cancel_s < 5.0  # the beat brings it, or NOTIFY does
        assert cluster.task(tasks[0])["status"] == "pending"

        proxy.set_mode("pass")
        for task_id in tasks:
            assert cluster.wait(task_id, 60)["status"] == "completed"
            assert len(cluster.renderings(task_id)) == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_hundred_killed_children_lose_nothing(tmp_path: Path, sqlite_ledger_url: str) -> None:
    """Under load on SQLite a child is killed 200 times: no new child is stuck, every task completes once."""
    env = {"GENPULSE_MAX_LOST": "100", "GENPULSE_LEASE_S": "6", "GENPULSE_BEAT_S": "1"}
    rng = random.Random(7)
    with Cluster(tmp_path / "cluster", sqlite_ledger_url, env=env) as cluster:
        cluster.start_simulator("gpu1")
        worker = cluster.start_worker("one", ["gpu1"], concurrency=4)
        time.sleep(6)  # the sweeper may reap
        tasks: list[str] = []
        for killed in range(200):
            if killed % 5 == 0:
                tasks.append(cluster.submit(sleeping(0.2, killed)))
            children = wait_until(lambda: cluster.children("one"), 30)
            try:
                os.kill(rng.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                continue
            time.sleep(0.15)

        for task_id in tasks:
            done = cluster.wait(task_id, 120)
            assert done["status"] == "completed", done
            assert len(done["outputs"]) == 1
        assert worker.alive()
