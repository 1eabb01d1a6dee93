"""
What an attempt does about the servers themselves: out of memory, dead behind their HTTP, or restarted.

The ledger, the storage and the runner are real, and so are the simulators' servers. Children that are
siblings share their marks, as a worker's processes do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from genpulse.config import Settings
from genpulse.ledger import Ledger, ProcessSession
from genpulse.model import AttemptOutcome, Task, TaskStatus
from genpulse.tasks.board import Board
from genpulse.testing.simulator import Simulator
from tests.support import wait_until
from tests.support.children import Child
from tests.support.cluster import Workflow, simple, sleeping
from tests.support.ledger import open_ledger, row_of, run_sql, submit


@pytest.fixture
def ledger(sqlite_ledger_url: str) -> Iterator[Ledger]:
    """What is written here is tried on both databases by the ledger's own tests."""
    with open_ledger(sqlite_ledger_url, pool_size=2) as found:
        yield found


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[str], Simulator]]:
    """Start a simulator under a name."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(Simulator(data_dir=tmp_path / name, name=name))


@pytest.fixture
def hire(valkey_url: str, tmp_path: Path, ledger: Ledger) -> Iterator[Callable[..., Child]]:
    """Make children: ``hire("one", {"gpu1": simulator}, stall_s=1)``."""
    hired: list[Child] = []

    def make(name: str, servers: dict[str, Simulator], marks: Board | None = None, **settings: Any) -> Child:
        built = Settings.build(
            data_dir=tmp_path / "data",
            database_url=ledger.engine.url.render_as_string(hide_password=False),
            redis_url=valkey_url,
            comfy_urls=",".join(f"{each}={server.url}" for each, server in servers.items()),
            **{"beat_s": 0.1, "drain_s": 0.0, **settings},
        )
        hired.append(Child(built, name, marks=marks))
        return hired[-1]

    yield make
    for child in hired:
        with contextlib.suppress(AssertionError):
            child.end(5.0)
        child.close()


@contextlib.contextmanager
def worker_of(ledger: Ledger, server: str, *, healthy: bool = True) -> Iterator[None]:
    """The row of a live worker that serves *server*."""
    session = ProcessSession(ledger)
    session.hold()
    ledger.register_worker(
        name=f"worker-of-{server}@host",
        host="host",
        pid=1,
        queues=["comfy", f"comfy@{server}"],
        servers=[{"name": server, "healthy": healthy, "reason": ""}],
        slots=2,
        consuming=True,
        session_key=session.key,
        version="1",
    )
    yield
    session.release()


def order(ledger: Ledger, workflow: Workflow, **values: Any) -> Task:
    """A task that renders *workflow*."""
    return submit(ledger, params={"workflow": workflow, "inputs": {}}, **values)


def again(ledger: Ledger, child: Child, task: Task) -> str:
    """The task's next attempt, without waiting for its back-off."""
    run_sql(ledger, "UPDATE tasks SET available_at = created_at")
    return child.run(task)


def history(ledger: Ledger, task: Task) -> list[tuple[str, str | None]]:
    """How each attempt ended, and on which server."""
    found = ledger.get(task.id)
    assert found is not None
    return [(str(attempt.outcome), attempt.server) for attempt in found.attempts]


def logged(simulator: Simulator, event: str) -> list[str]:
    """The prompts to which this happened on the server."""
    return [str(line.get("prompt_id", "")) for line in simulator.log if line["event"] == event]


# -- out of memory --------------------------------------------------------------------------------


def test_a_server_out_of_memory_is_freed_and_tried_once_more(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """One attempt: it fails, the server is told to free its memory, and the second prompt completes."""
    gpu1 = start_server("gpu1")
    gpu1.faults(fail_next="oom")
    task = order(ledger, simple())

    assert hire("child", {"gpu1": gpu1}).run(task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("completed", "gpu1")]
    events = [line["event"] for line in gpu1.log if line["event"] in {"started", "freed"}]
    assert events == ["started", "freed", "started"]


def test_a_second_prompt_of_an_attempt_has_a_rendering_time_of_its_own(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """What the one that ran out of memory took is not taken from the other's ``timeout_s``."""
    gpu1 = start_server("gpu1")
    gpu1.faults(fail_next="oom")
    task = order(ledger, sleeping(1.5), timeout_s=2)

    assert hire("child", {"gpu1": gpu1}).run(task) == TaskStatus.COMPLETED

    found = ledger.get(task.id)
    assert found is not None
    assert found.run_s is not None
    assert 1.0 < found.run_s < 2.5


def test_what_runs_out_of_memory_twice_goes_to_another_server_of_the_worker(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """The next attempt leaves out the server that had its second chance, idle as it may be."""
    gpu1, gpu2 = start_server("gpu1"), start_server("gpu2")
    gpu1.faults(fail_next="oom", fail_times=2)
    task = order(ledger, simple())
    child = hire("child", {"gpu1": gpu1, "gpu2": gpu2})

    assert child.run(task) == TaskStatus.PENDING
    assert again(ledger, child, task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("retry", "gpu1"), ("completed", "gpu2")]


def test_what_runs_out_of_memory_twice_goes_to_a_server_of_another_worker(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """The worker of the exhausted server gives it on, uncounted, bound to a server that is alive."""
    gpu1, gpu2 = start_server("gpu1"), start_server("gpu2")
    gpu1.faults(fail_next="oom", fail_times=2)
    task = order(ledger, simple())
    first, second = hire("first", {"gpu1": gpu1}), hire("second", {"gpu2": gpu2})
    assert first.run(task) == TaskStatus.PENDING

    with worker_of(ledger, "gpu2"):
        assert again(ledger, first, task) == TaskStatus.PENDING
    assert row_of(ledger, task)["bound_server"] == "gpu2"
    assert again(ledger, second, task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("retry", "gpu1"), ("handed_back", None), ("completed", "gpu2")]


@pytest.mark.parametrize("other", [False, True], ids=["alone", "the-other-is-down"])
def test_the_only_server_alive_gets_its_task_again(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child], other: bool
) -> None:
    """Where there is nowhere else, the attempts go on there until their bound."""
    gpu1 = start_server("gpu1")
    gpu1.faults(fail_next="oom", fail_times=4)
    task = order(ledger, simple(), max_attempts=2)
    child = hire("child", {"gpu1": gpu1})

    with worker_of(ledger, "gpu2", healthy=False) if other else contextlib.nullcontext():
        assert child.run(task) == TaskStatus.PENDING
        assert again(ledger, child, task) == TaskStatus.FAILED

    found = ledger.get(task.id)
    assert found is not None
    assert found.error is not None
    assert found.error.code == "out_of_memory"
    assert len(logged(gpu1, "started")) == 4


# -- servers that make no progress ----------------------------------------------------------------


def test_a_dead_server_is_known_to_all_siblings_and_costs_those_that_wait_nothing(
    ledger: Ledger,
    start_server: Callable[[str], Simulator],
    hire: Callable[..., Child],
) -> None:
    """
    Its worker thread dies with one prompt; another waits behind it, and both end on the other server.

    The one that stalled has lost an attempt; the one that waited behind it has moved within its own.
    """
    gpu1, gpu2 = start_server("gpu1"), start_server("gpu2")
    board = Board()
    one, two = (hire(name, {"gpu1": gpu1}, board, stall_s=1.5) for name in ("one", "two"))
    one.run(order(ledger, simple()))  # such tasks are quick: the second prompt is posted behind the first
    gpu1.faults(zombie=True)
    poison, behind = order(ledger, simple(1)), order(ledger, simple(2))
    one.start(poison)
    wait_until(lambda: len(logged(gpu1, "submitted")) == 2)
    two.start(behind)
    wait_until(lambda: len(logged(gpu1, "submitted")) == 3)

    assert one.end() == TaskStatus.PENDING
    assert two.end() == TaskStatus.PENDING

    assert history(ledger, poison) == [("retry", "gpu1")]
    assert history(ledger, behind) == [("handed_back", "gpu1")]
    (state,) = two.pool.states()
    assert (state.healthy, state.reason) == (False, "no progress")
    assert logged(gpu1, "deleted") == [prompt_of(ledger, behind)]
    elsewhere = hire("elsewhere", {"gpu2": gpu2})
    for task in (poison, behind):
        assert again(ledger, elsewhere, task) == TaskStatus.COMPLETED


def test_a_dead_server_is_used_again_once_it_was_restarted(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """It answers all the time and is not healthy; after the restart it is, without anybody's help."""
    gpu1 = start_server("gpu1")
    gpu1.faults(zombie=True)
    child = hire("child", {"gpu1": gpu1}, Board(), stall_s=0.5)
    task = order(ledger, simple())
    assert child.run(task) == TaskStatus.PENDING
    assert requests.get(f"{gpu1.url}/prompt", timeout=5).status_code == 200
    wait_until(lambda: child.pool.states()[0].retry_in_s == 0, 10)
    assert child.pool.probe_all() == ()

    gpu1.restart()

    wait_until(child.pool.probe_all, 10)
    assert again(ledger, child, task) == TaskStatus.COMPLETED


def prompt_of(ledger: Ledger, task: Task) -> str | None:
    """The prompt of the task's newest attempt."""
    found = ledger.get(task.id)
    assert found is not None
    assert found.attempts[-1].outcome is AttemptOutcome.HANDED_BACK
    return found.attempts[-1].prompt_id
