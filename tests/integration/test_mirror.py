"""Between Celery's world and the ledger: a result copy that harms nobody, and what the parent notes."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery, states
from celery.result import AsyncResult

from genpulse.config import Settings
from genpulse.tasks import mirror
from genpulse.tasks.mirror import MirroredRedisBackend, ParentNotes
from genpulse.tasks.producer import result_backend
from genpulse.testing.services import FaultProxy, Mode
from tests.support import wait_until


def app_on(url: str) -> Celery:
    """An application with the worker's own backend settings, on another Redis."""
    app = Celery("test", set_as_current=False, backend=result_backend(Settings.build(redis_url=url)))
    app.conf.update(redis_socket_timeout=1.0, redis_socket_connect_timeout=1.0, result_expires=86_400)
    return app


@pytest.fixture
def app(valkey_url: str) -> Iterator[Any]:
    """An application whose results go to the session's Valkey."""
    found: Any = app_on(valkey_url)
    yield found
    found.backend.client.close()


def test_celerys_tools_see_the_result(app: Any) -> None:
    """``AsyncResult`` of our own task id finds what the task function returned."""
    task_id = str(uuid.uuid4())
    assert isinstance(app.backend, MirroredRedisBackend)

    app.backend.store_result(task_id, {"status": "completed"}, states.SUCCESS)

    result: Any = AsyncResult(task_id, app=app)
    assert (result.state, result.result) == ("SUCCESS", {"status": "completed"})


def test_a_result_expires(app: Any, valkey_url: str) -> None:
    """Redis keeps no result for ever."""
    app.backend.store_result("a", 1, states.SUCCESS)

    with redis.Redis.from_url(valkey_url) as client:
        assert [0 < client.ttl(key) <= 86_400 for key in client.scan_iter()] == [True]


def test_calling_a_task_subscribes_to_nothing(app: Any, valkey_url: str) -> None:
    """Celery's backend holds one channel for each task that was sent, for ever; ours none."""
    app.backend.on_task_call(None, str(uuid.uuid4()))

    with redis.Redis.from_url(valkey_url) as client:
        assert client.pubsub_channels() == []


@pytest.mark.parametrize("mode", ["refuse", "blackhole", "reset"])
def test_a_redis_that_is_away_never_raises_nor_hangs(
    mode: Mode, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """
    The task has told the ledger already; its copy for Celery's tools may be lost, and costs little.

    After a failure the next tasks do not wait at all.
    """
    proxy = fault_proxy(valkey_url)
    backend: Any = app_on(proxy.url_of(valkey_url)).backend
    backend.store_result("before", 1, states.SUCCESS)
    proxy.set_mode(mode)

    began = time.monotonic()
    backend.store_result("a", {"status": "completed"}, states.SUCCESS)
    assert time.monotonic() - began < 4

    began = time.monotonic()
    for number in range(20):
        backend.store_result(f"b{number}", 1, states.SUCCESS)
        backend.mark_as_failure(f"c{number}", RuntimeError("x"))
        assert backend.get_task_meta(f"d{number}")["status"] == "PENDING"
    assert time.monotonic() - began < 1
    backend.client.close()


def test_the_mirror_works_again_when_redis_does(
    valkey_url: str, fault_proxy: Callable[[str], FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause after a failure ends."""
    monkeypatch.setattr(mirror, "PAUSE_S", 0.2)
    proxy = fault_proxy(valkey_url)
    backend: Any = app_on(proxy.url_of(valkey_url)).backend
    proxy.set_mode("refuse")
    backend.store_result("a", 1, states.SUCCESS)
    proxy.set_mode("pass")

    def stored() -> bool:
        backend.store_result("b", 1, states.SUCCESS)
        return bool(backend.get_task_meta("b", cache=False)["status"] == "SUCCESS")

    wait_until(stored, 5)
    backend.client.close()


def test_a_result_that_cannot_be_written_harms_nobody(app: Any) -> None:
    """A value that is no JSON turns no success into a failure."""
    app.backend.store_result("a", object(), states.SUCCESS)


# -- What only the parent sees -------------------------------------------------------------------


class Ledger:
    """Notes what it is told, after *failures* refusals."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.told: list[tuple[str, str | None]] = []
        self.thread: int | None = None

    def __call__(self, task_id: str, worker: str | None) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the ledger is away")
        self.thread = threading.get_ident()
        self.told.append((task_id, worker))


def test_notes_reach_the_ledger_in_order_from_another_thread() -> None:
    """The main process goes on serving the broker while the ledger is told."""
    ledger = Ledger()
    notes = ParentNotes(ledger)
    notes.start()
    notes.lease_over("a", "node:1")
    notes.canceled("b")

    wait_until(lambda: ledger.told == [("a", "node:1"), ("b", None)])
    assert ledger.thread != threading.get_ident()
    notes.stop()


def test_a_note_is_tried_until_the_ledger_is_back() -> None:
    """A short outage of the ledger loses no note."""
    ledger = Ledger(failures=2)
    notes = ParentNotes(ledger)
    notes.start()
    notes.canceled("a")

    wait_until(lambda: ledger.told == [("a", None)])
    notes.stop()


def test_a_note_is_given_up_after_its_time() -> None:
    """A long outage holds neither the queue nor the process: the lease's own end says the same."""
    ledger = Ledger(failures=10_000)
    notes = ParentNotes(ledger, try_s=0.3)
    notes.start()
    notes.lease_over("a", "node:1")
    time.sleep(0.5)
    ledger.failures = 0
    notes.canceled("b")

    wait_until(lambda: ledger.told == [("b", None)])
    notes.stop()


def test_noting_never_waits() -> None:
    """A ledger that hangs does not hold the main process, and neither does stopping."""
    release = threading.Event()

    def hang(_task_id: str, _worker: str | None) -> None:
        release.wait(20)

    notes = ParentNotes(hang)
    notes.start()

    began = time.monotonic()
    for number in range(1000):
        notes.lease_over(str(number), "node:1")
    assert time.monotonic() - began < 1
    notes.stop(wait_s=0.2)
    assert time.monotonic() - began < 2
    release.set()


def test_stopping_writes_what_is_noted() -> None:
    """A child that died in a shutdown is still noted."""
    ledger = Ledger()
    notes = ParentNotes(ledger)
    notes.start()
    notes.lease_over("a", "node:1")

    notes.stop()

    assert ledger.told == [("a", "node:1")]
