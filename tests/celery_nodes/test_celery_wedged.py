"""A worker that lives and does not consume is noticed by itself, and works again without anybody's help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from genpulse.model import AttemptOutcome, TaskStatus
from tests.celery_nodes.conftest import Story
from tests.celery_nodes.nodes import GenPulseWorker, children
from tests.support import wait_until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def wedge(
    sleeper_plugin: Path, tmp_path: Path, start_worker: Callable[..., GenPulseWorker], story: Story
) -> Callable[[str], tuple[GenPulseWorker, str]]:
    """Start a worker of two slots, let it run one long task, and wedge its consumer."""

    def act(how: str) -> tuple[GenPulseWorker, str]:
        seconds = 6 if how in {"deaf", "leak"} else 20
        source = Path(__file__).with_name("wedge.py").read_text(encoding="utf-8")
        (sleeper_plugin / "sitecustomize.py").write_text(source, encoding="utf-8")
        order = tmp_path / "wedge"
        worker = start_worker("worker", "-c", "2", TEST_WEDGE=str(order), GENPULSE_DRAIN_S="1")
        running = story.submit(seconds=seconds, once=True)
        story.started(running, timeout_s=50)
        order.write_text(how)
        wait_until(lambda: not order.exists(), 30)
        return worker, running

    return act


@pytest.mark.parametrize("how", ["deaf", pytest.param("leak", marks=pytest.mark.slow)])
def test_a_deaf_consumer_connects_anew(
    wedge: Callable[[str], tuple[GenPulseWorker, str]], story: Story, how: str
) -> None:
    """No task is disturbed: the same children go on, and the one that waited is taken."""
    worker, running = wedge(how)
    before = children(worker.service)

    assert story.ended(story.submit(), 60).status is TaskStatus.COMPLETED

    assert story.ended(running, 60).attempt == 1
    assert children(worker.service) == before
    assert "worker_starts_again" not in worker.service.log_text()


@pytest.mark.parametrize("how", ["lame", "hang"])
def test_a_worker_that_no_reconnect_helps_starts_again(
    wedge: Callable[[str], tuple[GenPulseWorker, str]], story: Story, how: str
) -> None:
    """In the same process, after its running task was handed back: no loss is counted."""
    worker, running = wedge(how)
    pid, before = worker.service.pid, children(worker.service)

    assert story.ended(story.submit(), 60).status is TaskStatus.COMPLETED

    task = story.ended(running, 60)
    assert [attempt.outcome for attempt in task.attempts] == [
        AttemptOutcome.HANDED_BACK,
        AttemptOutcome.COMPLETED,
    ]
    assert (worker.service.alive(), worker.service.pid) == (True, pid)
    assert not set(before) & set(children(worker.service))
    assert worker.service.log_text().count("worker_starts_again") == 1
