"""What a child does with one message, against a real ledger: its handler and its servers are the test's."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from genpulse.comfy.pool import ServerPool
from genpulse.config import Settings
from genpulse.errors import NoServer
from genpulse.ledger import Ledger
from genpulse.model import AttemptOutcome, TaskStatus
from genpulse.storage import LocalStorage
from genpulse.tasks import runner, wiring
from genpulse.tasks.heartbeat import Heartbeat
from tests.support.ledger import open_ledger, submit


def make_runner(settings: Settings, ledger: Ledger, execute: Any) -> runner.Runner:
    """A runner whose one handler does *execute*; its heartbeat does not beat."""
    registry: Any = SimpleNamespace(get=lambda _: SimpleNamespace(queue="comfy", execute=execute))
    return runner.Runner(
        settings,
        ledger=ledger,
        storage=LocalStorage(settings.assets_dir),
        live=wiring.open_live(settings),
        pool=ServerPool([]),
        registry=registry,
        heartbeat=Heartbeat(settings, lambda: False),
        worker="w:1",
    )


def test_a_child_without_a_server_does_not_empty_the_runway(
    sqlite_ledger_url: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hands the task back uncounted, and takes no other for a moment, unless the worker drains."""

    def execute(*_: Any) -> NoReturn:
        raise NoServer("none is healthy")

    monkeypatch.setattr(runner, "NO_SERVER_PAUSE_S", 0.5)
    settings = Settings.build(data_dir=tmp_path, database_url=sqlite_ledger_url, redis_url=valkey_url)
    with open_ledger(sqlite_ledger_url) as ledger:
        child = make_runner(settings, ledger, execute)
        task = submit(ledger)
        began = time.monotonic()
        assert child.run(task.id) == {"task_id": task.id, "attempt": 1, "status": "pending"}
        assert time.monotonic() - began >= 0.5

        monkeypatch.setattr(runner, "is_draining", lambda: True)
        began = time.monotonic()
        child.run(submit(ledger).id)
        assert time.monotonic() - began < 0.5

        found = ledger.get(task.id)
        assert found is not None
        assert found.status is TaskStatus.PENDING
        assert [each.outcome for each in found.attempts] == [AttemptOutcome.HANDED_BACK]
