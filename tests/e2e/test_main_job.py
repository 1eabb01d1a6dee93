"""The main job, as the product is used: a workflow in over HTTP, stored pictures out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests.support.cluster import Cluster, simple


@pytest.fixture(params=["local", "s3"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, ledger_url: str) -> Iterator[Cluster]:
    """An API and two workers on one queue, each serving only a server of its own."""
    env: dict[str, str] = {}
    if request.param == "s3":
        chosen = request.getfixturevalue("s3_settings")
        env = {f"GENPULSE_{name.upper()}": str(value) for name, value in chosen.items()}
    with Cluster(tmp_path / "cluster", ledger_url, env=env) as running:
        for name in ("gpu1", "gpu2"):
            running.start_simulator(name)
            running.start_worker(name, [name], wait=False)
        for name in ("gpu1", "gpu2"):
            running.wait_for_worker(name)
        yield running


@pytest.mark.timeout(120)
def test_workflows_become_stored_pictures(cluster: Cluster) -> None:
    """Each task ends completed, with links that answer the very bytes ComfyUI rendered."""
    colors = [0xFF0000 + 17 * number for number in range(8)]
    tasks = {cluster.submit(simple(color, batch=2)): color for color in colors}

    for task_id, color in tasks.items():
        done = cluster.wait(task_id)
        assert done["status"] == "completed", done
        assert len(done["outputs"]) == len(done["result"]["images"]) == 2
        for output in done["outputs"]:
            data = cluster.output(task_id, output["index"])
            assert hashlib.sha256(data).hexdigest() == output["sha256"]
            assert len(data) == output["size_bytes"]
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.size == (output["width"], output["height"]) == (64, 64)
                assert picture.convert("RGB").getpixel((5, 5)) == (color >> 16, color >> 8 & 255, color & 255)
            assert requests.get(output["url"], timeout=10).content == data

    servers = {event["server"] for event in cluster.executions() if event["event"] == "started"}
    assert servers == {"gpu1", "gpu2"}
    assert len([event for event in cluster.executions() if event["event"] == "started"]) == len(tasks)
