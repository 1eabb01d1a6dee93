"""What a child does with one message, against a real ledger: its handler and its servers are the test's."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from genpulse.comfy.pool import ServerPool
from genpulse.config import Settings
from genpulse.errors import NoServer
from genpulse.ledger import Ledger
from genpulse.model import AttemptOutcome, NewOutput, OutputKind, TaskStatus
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


CLAIMS_AND_IS_TOLD_TO_STOP = """
import os, signal, sys
from genpulse.tasks import runner

runner.start_child("node")
claim = runner._runner.ledger.claim

def told(*args, **values):
    claimed = claim(*args, **values)
    os.kill(os.getpid(), signal.SIGTERM)  # before the heartbeat has heard of the attempt
    return claimed

runner._runner.ledger.claim = told
runner.run_message(sys.argv[1])
signal.pause()
"""


def test_sigterm_right_after_the_claim_is_a_hand_back(
    sqlite_ledger_url: str, valkey_url: str, tmp_path: Path
) -> None:
    """The milliseconds in which an attempt is claimed and nobody watches it are no loss either."""
    with open_ledger(sqlite_ledger_url) as ledger:
        task = submit(ledger, task_type="image-convert", queue="cpu")
        child = subprocess.run(
            [sys.executable, "-c", CLAIMS_AND_IS_TOLD_TO_STOP, task.id],
            env={
                **os.environ,
                "GENPULSE_DATABASE_URL": sqlite_ledger_url,
                "GENPULSE_REDIS_URL": valkey_url,
                "GENPULSE_DATA_DIR": str(tmp_path),
                "GENPULSE_DRAIN_S": "0",
            },
            timeout=50,
            check=False,
        )

        found = ledger.get(task.id)
        assert found is not None
        assert [each.outcome for each in found.attempts] == [AttemptOutcome.HANDED_BACK]
        assert child.returncode == -signal.SIGTERM


IGNORES_ITS_DEADLINE = """
import sys, time
from types import SimpleNamespace
from genpulse.tasks import heartbeat, runner

heartbeat.KILL_AFTER_S = 0.5
runner.start_child("node")
deaf = SimpleNamespace(queue="cpu", execute=lambda *_: time.sleep(600))
runner._runner.registry = SimpleNamespace(get=lambda _: deaf)
runner.run_message(sys.argv[1])
"""


def test_an_attempt_that_ignores_its_deadline_ends_with_its_process(
    ledger_url: str, valkey_url: str, tmp_path: Path
) -> None:
    """The lease thread writes its end and takes the process away; nothing else could reach it."""
    with open_ledger(ledger_url) as ledger:
        task = submit(ledger, task_type="image-convert", queue="cpu", timeout_s=1)
        child = subprocess.run(
            [sys.executable, "-c", IGNORES_ITS_DEADLINE, task.id],
            env={
                **os.environ,
                "GENPULSE_DATABASE_URL": ledger_url,
                "GENPULSE_REDIS_URL": valkey_url,
                "GENPULSE_DATA_DIR": str(tmp_path),
                "GENPULSE_BEAT_S": "0.2",
            },
            timeout=50,
            check=False,
        )

        found = ledger.get(task.id)
        assert found is not None
        assert found.status is TaskStatus.FAILED
        assert found.error is not None
        assert found.error.code == "timeout"
        assert child.returncode == -signal.SIGKILL


def test_an_outcome_that_the_ledger_refuses_is_a_failure_of_the_task(
    ledger_url: str, valkey_url: str, tmp_path: Path
) -> None:
    """Not an attempt that dies at its last line, is taken for lost, and renders it all again."""
    output = NewOutput("9", "a.png", OutputKind.IMAGE, "image/png", 1, "0" * 64, "outputs/a.png")
    settings = Settings.build(data_dir=tmp_path, database_url=ledger_url, redis_url=valkey_url)
    with open_ledger(ledger_url) as ledger:
        # SQLite takes texts of any length, but both take numbers of 64 bits at most.
        child = make_runner(settings, ledger, lambda *_: (dataclasses.replace(output, size_bytes=2**70),))
        task = submit(ledger)

        said = child.run(task.id)

        found = ledger.get(task.id)
        assert said == {"task_id": task.id, "attempt": 1, "status": "failed"}
        assert found is not None
        assert (found.status, found.error and found.error.code) == (TaskStatus.FAILED, "internal")
        assert [each.outcome for each in found.attempts] == [AttemptOutcome.FAILED]
        assert found.outputs == ()


def test_what_a_server_calls_a_node_is_cut_to_what_the_ledger_takes(
    ledger_url: str, valkey_url: str, tmp_path: Path
) -> None:
    """A node that a server added itself may have any id, and its picture is stored all the same."""
    settings = Settings.build(data_dir=tmp_path, database_url=ledger_url, redis_url=valkey_url)

    def execute(_: Any, context: runner.AttemptContext) -> tuple[NewOutput, ...]:
        named = context.store(b"text", name="a.txt", node_id="7." * 150)
        strange = context.store(b"text", name="b.txt", node_id="\0\ud800", content_type="x" * 300)
        return (named, strange)

    with open_ledger(ledger_url) as ledger:
        task = submit(ledger)

        make_runner(settings, ledger, execute).run(task.id)

        found = ledger.get(task.id)
        assert found is not None
        assert found.status is TaskStatus.COMPLETED
        assert [(len(each.node_id), each.content_type) for each in found.outputs] == [
            (200, "text/plain; charset=utf-8"),
            (1, "application/octet-stream"),
        ]
