"""Which queues a worker stops and starts to consume as its servers come and go, and what of it gets lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genpulse.comfy.pool import Server
from genpulse.config import Settings
from genpulse.tasks.presence import WorkerBackground


class Consumer:
    """Celery's consumer as far as it matters here: what is handed over happens later, or is lost."""

    def __init__(self, *names: str) -> None:
        self.hostname = "w@host"
        self.consumed = dict.fromkeys(names)
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=SimpleNamespace(consume_from=self.consumed)))
        self.handed_over: list[tuple[Callable[[str], None], str]] = []

    def call_soon(self, act: Callable[[str], None], name: str) -> None:
        self.handed_over.append((act, name))

    def add_task_queue(self, name: str) -> None:
        self.consumed[name] = None

    def cancel_task_queue(self, name: str) -> None:
        self.consumed.pop(name, None)

    def turn(self, *, loses: bool = False) -> None:
        """One turn of Celery's loop; a broken broker loses what was handed over to it."""
        acts, self.handed_over = self.handed_over, []
        for act, name in () if loses else acts:
            act(name)


@pytest.fixture
def consumer() -> Consumer:
    """It consumes a queue, and the queue of its server."""
    return Consumer("comfy", "comfy@gpu1")


@pytest.fixture
def health() -> set[str]:
    """The servers that are well."""
    return {"gpu1"}


@pytest.fixture
def presence(consumer: Consumer, health: set[str], tmp_path: Path) -> Iterator[Any]:
    """A worker's background whose threads never start."""
    settings = Settings.build(
        data_dir=tmp_path, comfy_urls="gpu1=http://127.0.0.1:1", redis_url="redis://127.0.0.1:1/0"
    )
    background: Any = WorkerBackground(settings, consumer)
    gpu1 = Server("gpu1", "http://127.0.0.1:1")
    background._pool = SimpleNamespace(
        servers=(gpu1,), healthy=lambda: tuple(each for each in (gpu1,) if each.name in health)
    )
    yield background
    background.ledger.close()


def test_it_stops_and_starts_with_its_servers(presence: Any, consumer: Consumer, health: set[str]) -> None:
    """Its row names the queues all the while: they are its own."""
    health.clear()
    assert not presence._consume_if_healthy()
    consumer.turn()
    assert not consumer.consumed
    assert presence._queue_names() == ["comfy", "comfy@gpu1"]

    health.add("gpu1")
    assert presence._consume_if_healthy()
    consumer.turn()

    assert set(consumer.consumed) == {"comfy", "comfy@gpu1"}


def test_what_a_broken_broker_lost_is_handed_over_again(
    presence: Any, consumer: Consumer, health: set[str]
) -> None:
    """Else the worker would live on and never consume again."""
    health.clear()
    presence._consume_if_healthy()
    consumer.turn(loses=True)
    presence._consume_if_healthy()
    consumer.turn()
    assert not consumer.consumed

    health.add("gpu1")
    presence._consume_if_healthy()
    consumer.turn(loses=True)
    assert not consumer.consumed
    assert presence._queue_names() == ["comfy", "comfy@gpu1"]
    presence._consume_if_healthy()
    consumer.turn()

    assert set(consumer.consumed) == {"comfy", "comfy@gpu1"}


def test_a_stop_that_comes_after_the_start_does_not_last(
    presence: Any, consumer: Consumer, health: set[str]
) -> None:
    """The loop was busy for so long that both waited, and it keeps no order."""
    health.clear()
    presence._consume_if_healthy()
    health.add("gpu1")
    presence._consume_if_healthy()
    consumer.handed_over.reverse()
    consumer.turn()
    presence._consume_if_healthy()
    consumer.turn()

    assert set(consumer.consumed) == {"comfy", "comfy@gpu1"}


def test_a_queue_that_a_person_canceled_stays_so(presence: Any, consumer: Consumer) -> None:
    """Remote control of Celery may take a queue away for good."""
    consumer.cancel_task_queue("comfy")
    for _ in range(3):
        presence._consume_if_healthy()
        consumer.turn()

    assert set(consumer.consumed) == {"comfy@gpu1"}
