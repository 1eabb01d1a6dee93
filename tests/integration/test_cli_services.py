"""Commands that run until they are told to stop, each against real services."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis
import requests

from genpulse.ledger import Ledger
from genpulse.model import NewTask
from genpulse.tasks.queues import redis_keys
from genpulse.testing.services import answers_http, free_port, start_python
from tests.support import wait_until

pytestmark = pytest.mark.timeout(120)


def test_start_sweeper_relays_and_stops_when_told(ledger_url: str, valkey_url: str, tmp_path: Path) -> None:
    """Alone it brings a recorded task to the broker, where a worker would find it; SIGTERM is exit code 0."""
    ledger = Ledger.connect(ledger_url)
    ledger.submit(NewTask(task_type="image-convert", queue="cpu", params={}, owner="somebody"))
    env = {"GENPULSE_DATABASE_URL": ledger_url, "GENPULSE_REDIS_URL": valkey_url, "GENPULSE_COMFY_URLS": None}

    with start_python(["-m", "genpulse", "start-sweeper"], tmp_path, name="sweeper", env=env) as sweeper:
        with redis.Redis.from_url(valkey_url) as broker:
            wait_until(lambda: any(broker.llen(key) for key in redis_keys("cpu")), timeout_s=60)
        os.kill(sweeper.pid, signal.SIGTERM)
        assert sweeper.wait(15) == 0, sweeper.log_text()
    ledger.close()


def test_simulator_listens_where_it_is_told(tmp_path: Path) -> None:
    """``genpulse simulator`` is a ComfyUI at the port given, with its files in the folder given."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with start_python(
        ["-m", "genpulse", "simulator", "--port", str(port), "--data-dir", str(tmp_path / "files")],
        tmp_path,
        probe=answers_http(f"{url}/prompt"),
    ):
        assert requests.get(f"{url}/queue", timeout=5).json() == {"queue_running": [], "queue_pending": []}
    assert (tmp_path / "files").is_dir()
