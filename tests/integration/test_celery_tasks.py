"""The task functions in a real Celery worker within this process (``celery.contrib.pytest``)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.result import AsyncResult

from genpulse.config import Settings
from genpulse.tasks import runner
from genpulse.tasks.app import build_app
from genpulse.tasks.producer import Producer
from genpulse.tasks.registry import default_registry, task_name
from tests.support import wait_until


class Recorder:
    """Stands where the runner stands, and notes which ids it was given."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.answer: dict[str, Any] | None = {"status": "completed"}

    def __call__(self, task_id: str) -> dict[str, Any] | None:
        self.ids.append(task_id)
        if self.answer is None:
            return None
        return {"task_id": task_id, **self.answer}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The runner's door."""
    recorder = Recorder()
    monkeypatch.setattr(runner, "run_message", recorder)
    return recorder


@pytest.fixture
def app(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """The product's application in a worker thread of this process, without its signals."""
    monkeypatch.setattr("genpulse.tasks.app._connect_signals", lambda: None)
    app = build_app(Settings.build(redis_url=valkey_url))
    with start_worker(app, pool="threads", perform_ping_check=False, queues=None, loglevel="WARNING"):
        yield app
    app.close()


@pytest.fixture
def producer(valkey_url: str) -> Iterator[Producer]:
    """What the relay sends with."""
    found = Producer(Settings.build(redis_url=valkey_url))
    yield found
    found.close()


def test_every_task_type_has_a_task_function_on_its_queue(
    app: Celery, run: Recorder, producer: Producer
) -> None:
    """A message by name reaches the runner with our own id, for every installed task type."""
    sent = {}
    for handler in default_registry():
        task_id = str(uuid.uuid4())
        sent[task_id] = handler
        producer.publish([(task_id, task_name(handler.task_type), handler.queue, 3)])

    wait_until(lambda: set(run.ids) == set(sent))
    for task_id in sent:
        result: Any = AsyncResult(task_id, app=app)
        wait_until(lambda result=result: result.state == "SUCCESS")  # type: ignore[misc]  # bound now
        assert result.result["task_id"] == task_id


def test_a_message_without_work_leaves_no_result(app: Celery, run: Recorder, producer: Producer) -> None:
    """A duplicate ends with ``Ignore``, so that it cannot overwrite what the first one left."""
    run.answer = None
    task_id = str(uuid.uuid4())

    producer.publish([(task_id, "genpulse.comfyui", "comfy", 3)])

    wait_until(lambda: run.ids == [task_id])
    assert AsyncResult(task_id, app=app).state == "PENDING"


def test_an_id_that_is_no_task_id_never_reaches_the_runner(
    app: Celery, run: Recorder, producer: Producer
) -> None:
    """Whoever can write to Redis cannot make the ledger's drivers read strange text."""
    good = str(uuid.uuid4())

    producer.publish([("'; DROP", "genpulse.comfyui", "comfy", 0), (good, "genpulse.comfyui", "comfy", 3)])

    wait_until(lambda: run.ids == [good])


def test_no_task_is_retried_or_acknowledged_late(app: Celery) -> None:
    """What research measured about Celery's own retries holds for every task function."""
    ours = [task for name, task in app.tasks.items() if name.startswith("genpulse.")]

    assert ours
    assert not any(task.acks_late or task.reject_on_worker_lost or task.track_started for task in ours)
    assert app.conf.worker_cancel_long_running_tasks_on_connection_loss is False
