"""
pytest-celery's own fixtures on local processes: the product's worker command, Valkey, a real ledger.

The root configuration switches the plug-in off, because importing it costs every other test run a
second; its fixtures are taken from it here by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import (  # noqa: F401 - fixtures
    CELERY_REDIS_BACKEND,
    CELERY_REDIS_BROKER,
    CELERY_SETUP_WORKER,
    celery_backend_cluster,
    celery_backend_cluster_config,
    celery_broker_cluster,
    celery_broker_cluster_config,
    celery_redis_backend,
    celery_redis_broker,
    celery_setup,
    celery_setup_app,
    celery_setup_cls,
    celery_setup_config,
    celery_setup_name,
    celery_setup_worker,
    celery_worker_cluster,
    celery_worker_cluster_config,
    default_worker_app,
    default_worker_cls,
)

from genpulse.ledger import Ledger
from genpulse.model import NewTask, Task
from genpulse.testing.services import start_valkey
from tests.celery_nodes.nodes import GenPulseWorker, Valkey
from tests.support import wait_until


@pytest.fixture(params=[CELERY_REDIS_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> Any:
    """Redis only; RabbitMQ would be in the matrix because py-amqp is installed."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[CELERY_REDIS_BACKEND])
def celery_backend(request: pytest.FixtureRequest) -> Any:
    """Redis only."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[CELERY_SETUP_WORKER])
def celery_worker(request: pytest.FixtureRequest) -> Any:
    """The product's worker only."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def default_redis_broker(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey of this test's own, which it may stop; it keeps its data over a restart."""
    with start_valkey(tmp_path / "valkey", append_only=True) as service:
        yield Valkey.of(service)


@pytest.fixture
def default_redis_backend(default_redis_broker: Valkey) -> Valkey:
    """Broker and result backend are the same Redis, as GenPulse has them."""
    return default_redis_broker


@pytest.fixture
def sleeper_plugin(tmp_path: Path) -> Path:
    """A folder for ``PYTHONPATH`` in which the task type ``sleep`` is installed."""
    folder = tmp_path / "plugin"
    info = folder / "genpulse_test_sleeper-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: genpulse-test-sleeper\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[genpulse.handlers]\nsleep = genpulse_test_sleeper:Sleeper\n")
    source = Path(__file__).with_name("sleeper.py").read_text(encoding="utf-8")
    (folder / "genpulse_test_sleeper.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture
def worker_args() -> list[str]:
    """More of Celery's options for the worker; a test overrides it."""
    return ["-c", "2"]


@pytest.fixture
def broker_url(default_redis_broker: Valkey) -> str:
    """Where the worker looks for Redis; a test may put a breakable network between."""
    return default_redis_broker.service.url


@pytest.fixture
def default_worker_env(
    broker_url: str, sqlite_ledger_url: str, sleeper_plugin: Path, tmp_path: Path
) -> dict[str, str]:
    """Nothing but the URLs, and short leases: a new worker takes nothing back before one has passed."""
    return {
        "GENPULSE_LEASE_S": "3",
        "GENPULSE_BEAT_S": "1",
        "GENPULSE_REDIS_URL": broker_url,
        "GENPULSE_DATABASE_URL": sqlite_ledger_url,
        "GENPULSE_DATA_DIR": str(tmp_path / "data"),
        "PYTHONPATH": str(sleeper_plugin),
    }


@pytest.fixture
def start_worker(
    default_worker_env: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., GenPulseWorker]]:
    """Start more workers: ``start_worker("second", "-c", "1")``."""
    started: list[GenPulseWorker] = []

    def start(name: str, *args: str, **env: str) -> GenPulseWorker:
        directory = tmp_path / name
        directory.mkdir()
        started.append(GenPulseWorker.launch(default_worker_env | env, directory, args))
        return started[-1]

    yield start
    for worker in started:
        worker.teardown()


@pytest.fixture
def default_worker_container(
    start_worker: Callable[..., GenPulseWorker], worker_args: list[str]
) -> GenPulseWorker:
    """The worker of pytest-celery's setup: a real process with the product's command."""
    return start_worker("worker", *worker_args)


@dataclass
class Story:
    """Submits tasks of the type ``sleep`` and tells what became of them."""

    ledger: Ledger
    log: Path
    ids: list[str] = field(default_factory=list)

    def submit(self, **params: Any) -> str:
        """Record a task; the worker's own relay finds it."""
        task, _ = self.ledger.submit(
            NewTask("sleep", "comfy", {"log": str(self.log), **params}, owner="test", max_attempts=2)
        )
        self.ids.append(task.id)
        return task.id

    def get(self, task_id: str) -> Task:
        """What the ledger says."""
        task = self.ledger.get(task_id)
        assert task is not None
        return task

    def ended(self, task_id: str, timeout_s: float = 20) -> Task:
        """Wait until the task is final."""

        def final() -> Task | None:
            task = self.get(task_id)
            return task if task.status.is_final else None

        found = wait_until(final, timeout_s, message=f"the end of {task_id}")
        assert found is not None
        return found

    def lines(self, word: str, task_id: str) -> list[list[str]]:
        """``[word, id, attempt, pid]`` of each line of the task's own log."""
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split() for line in text.splitlines() if line.startswith(f"{word} {task_id} ")]

    def started(self, task_id: str, times: int = 1, timeout_s: float = 20) -> int:
        """Wait until an attempt has begun; returns the child's process id."""
        found = wait_until(
            lambda: (lines := self.lines("start", task_id))[times - 1 :] and lines,
            timeout_s,
            message=f"start {times} of {task_id}",
        )
        return int(found[times - 1][3])


@pytest.fixture
def story(sqlite_ledger_url: str, tmp_path: Path) -> Iterator[Story]:
    """The ledger of this test, and a log past it."""
    ledger = Ledger.connect(sqlite_ledger_url)
    yield Story(ledger, tmp_path / "sleeper.log")
    ledger.close()


@pytest.fixture
def celery_app(broker_url: str) -> Iterator[Celery]:
    """Celery's own tools, as Flower has them: only the URL is known to it."""
    app = Celery("tools", broker=broker_url, backend=broker_url, set_as_current=False)
    yield app
    app.close()
