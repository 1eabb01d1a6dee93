"""
One attempt and the next one, where the first ends badly: what each may write, and what it may touch.

The ledger, the broker, the storage and the runner are real, and so is the simulator's server; only
Celery is left out. A worker child is a :class:`Child` of this process: it cannot be killed, so its
death is that a sweeper takes its lease away, which is also what a thawed process finds.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests

from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.ledger import tables as t
from genpulse.live import Live
from genpulse.model import Task, TaskStatus
from genpulse.tasks import render, runner
from tests.support import wait_until
from tests.support.children import Child
from tests.support.cluster import Workflow, simple, sleeping
from tests.support.ledger import die, open_ledger, row_of, rows, run_sql, submit

if TYPE_CHECKING:
    from genpulse.testing.services import FaultProxy
    from genpulse.testing.simulator import Simulator

SERVER = "gpu1"


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone, for the test's own eyes."""
    with open_ledger(ledger_url, pool_size=2) as found:
        yield found


@pytest.fixture
def hire(simulator: Simulator, valkey_url: str, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Make children that serve the simulator."""
    hired: list[Child] = []

    def make(ledger: Ledger | str, *, limits: dict[str, Any] | None = None, **options: Any) -> Child:
        url = ledger if isinstance(ledger, str) else ledger.engine.url.render_as_string(hide_password=False)
        settings = Settings.build(
            data_dir=tmp_path / "data",
            database_url=url,
            redis_url=valkey_url,
            comfy_urls=f"{SERVER}={simulator.url}",
            beat_s=0.1,
            drain_s=0.0,
            **(limits or {}),
        )
        hired.append(Child(settings, f"child-{len(hired)}", **options))
        return hired[-1]

    yield make
    # Without its server every attempt that still runs ends; threads are left to the process's end.
    simulator.stop()
    for child in hired:
        with contextlib.suppress(AssertionError):
            child.end(5.0)
        child.close()


def order(ledger: Ledger, workflow: Workflow, **values: Any) -> Task:
    """A task that renders *workflow*."""
    return submit(ledger, params={"workflow": workflow, "inputs": {}}, **values)


def take_away(ledger: Ledger, task: Task) -> None:
    """What a sweeper does when the worker of the running attempt is dead or was frozen too long."""
    (lease,) = rows(ledger, t.leases, t.leases.c.task_id == task.id)
    fence = SimpleNamespace(task_id=task.id, attempt=lease["attempt"], claim=lease["claim"])
    held: Any = SimpleNamespace(fence=fence)
    # A beat may come between the two statements of it, and renew the lease.
    wait_until(lambda: die(ledger, held) is TaskStatus.PENDING)


def make_due(ledger: Ledger) -> None:
    """Let no back-off be waited for."""
    run_sql(ledger, "UPDATE tasks SET available_at = created_at")


def done(ledger: Ledger, task: Task) -> Task:
    """The task with its outputs and attempts."""
    found = ledger.get(task.id)
    assert found is not None
    return found


def outcomes(ledger: Ledger, task: Task) -> list[str]:
    """How its attempts ended."""
    return [str(attempt.outcome) for attempt in done(ledger, task).attempts]


def prompts(ledger: Ledger, task: Task) -> list[str | None]:
    """The prompts of its attempts."""
    return [attempt.prompt_id for attempt in done(ledger, task).attempts]


def logged(simulator: Simulator, event: str) -> list[str]:
    """The prompts to which this happened on the server."""
    return [str(line["prompt_id"]) for line in simulator.log if line["event"] == event]


def start_held(simulator: Simulator, child: Child, task: Task) -> None:
    """Start an attempt whose prompt begins and renders no further for now; interrupts wait as well."""
    simulator.faults(stall=True)
    child.start(task)
    wait_until(lambda: logged(simulator, "started"))


# -- the worker is lost ---------------------------------------------------------------------------


def test_whoever_lost_its_lease_leaves_the_prompt_to_the_next(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """The first child stops without a word to the server, the second follows the very same prompt."""
    task = order(ledger, simple())
    first = hire(ledger)
    start_held(simulator, first, task)
    take_away(ledger, task)
    assert first.end() == "lost"

    second = hire(ledger)
    second.start(task)
    simulator.faults(stall=False)

    assert second.end() == "completed"
    assert logged(simulator, "started") == prompts(ledger, task)[:1]
    assert len(set(prompts(ledger, task))) == 1
    assert logged(simulator, "interrupted") == []
    assert outcomes(ledger, task) == ["lost", "completed"]


def test_whoever_thaws_and_sees_a_stall_leaves_the_prompt_to_its_adopter(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """A frozen child was told nothing: it asks for its lease before it stops what it takes for stuck."""
    task = order(ledger, simple())
    frozen = hire(ledger, beats=False, limits={"stall_s": 1, "lease_s": 2})
    start_held(simulator, frozen, task)
    take_away(ledger, task)
    assert frozen.end() == "lost"

    second = hire(ledger)
    second.start(task)
    simulator.faults(stall=False)

    assert second.end() == "completed"
    assert logged(simulator, "interrupted") == []
    assert outcomes(ledger, task) == ["lost", "completed"]


def test_whoever_lost_at_the_very_end_cleans_nothing_up(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """Its outputs are stored, and its last write matches nothing: the server's copy is the next one's."""
    task = order(ledger, simple())
    late = hire(ledger, beats=False, after=lambda _: take_away(ledger, task))
    assert late.run(task) == "lost"

    assert hire(ledger).run(task) == "completed"
    assert logged(simulator, "started") == prompts(ledger, task)[:1]
    assert len(set(prompts(ledger, task))) == 1
    assert [output.key.split("/")[2] for output in done(ledger, task).outputs] == ["2"]


def test_pictures_of_the_socket_alone_are_rendered_again(
    sqlite_ledger_url: str, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """They went to the child that was lost: the next one stops that prompt and sends one of its own."""
    workflow = simple()
    workflow["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    with open_ledger(sqlite_ledger_url) as ledger:
        task = order(ledger, workflow)
        first = hire(ledger)
        start_held(simulator, first, task)
        take_away(ledger, task)
        assert first.end() == "lost"
        simulator.faults(stall=False)

        assert hire(ledger).run(task) == "completed"
        assert logged(simulator, "started") == prompts(ledger, task)
        assert len(done(ledger, task).outputs) == 1


def test_a_prompt_is_written_down_before_it_is_sent(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the child or the server dies in between, the next one knows what to look for."""
    monkeypatch.setattr(render, "SERVER_PATIENCE_S", 0.1)
    monkeypatch.setattr(runner, "NO_SERVER_PAUSE_S", 0.0)
    task = order(ledger, simple())
    simulator.faults(exit_at="submitted")
    hire(ledger).run(task)

    assert prompts(ledger, task) == logged(simulator, "submitted")


# -- the worker is told to stop -------------------------------------------------------------------


def test_a_drain_hands_over_and_counts_nowhere(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """A deploy costs no rendering: the prompt runs on, and the next worker of the server adopts it."""
    task = order(ledger, simple(), max_attempts=1)
    first = hire(ledger)
    start_held(simulator, first, task)
    first.draining.set()
    assert first.end() == "pending"
    row = row_of(ledger, task)
    assert (row["losses"], row["failures"], row["bound_server"]) == (0, 0, SERVER)

    second = hire(ledger)
    second.start(task)
    simulator.faults(stall=False)

    assert second.end() == "completed"
    assert len(logged(simulator, "started")) == 1
    assert logged(simulator, "interrupted") == []
    assert outcomes(ledger, task) == ["handed_back", "completed"]


def test_a_cancel_stops_the_prompt_on_its_server(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """By its id, and before the attempt ends: nothing renders for nobody."""
    task = order(ledger, sleeping(30.0))
    child = hire(ledger)
    child.start(task)
    wait_until(lambda: logged(simulator, "started"))
    ledger.cancel(task.id)

    assert child.end() == "canceled"
    assert logged(simulator, "interrupted") == prompts(ledger, task)


# -- the rendering or the storing goes wrong ------------------------------------------------------


def test_an_error_is_judged_once_and_never_adopted(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """The history still has the prompt whose files are gone: the next attempt sends one of its own."""
    task = order(ledger, simple())
    simulator.faults(lose_outputs=True)
    assert hire(ledger).run(task) == "pending"
    simulator.faults(lose_outputs=False)
    make_due(ledger)

    assert hire(ledger).run(task) == "completed"
    assert len(set(prompts(ledger, task))) == 2
    assert outcomes(ledger, task) == ["retry", "completed"]


def test_a_server_forgets_the_prompt_of_a_failed_task(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child]
) -> None:
    """Its history would keep the whole workflow, and nobody looks there again. Nothing was stored, either."""
    task = order(ledger, simple())
    simulator.faults(fail_next="exception")
    assert hire(ledger).run(task) == "failed"

    (prompt_id,) = prompts(ledger, task)
    assert requests.get(f"{simulator.url}/history/{prompt_id}", timeout=5).json() == {}
    assert rows(ledger, t.removals) == []


def test_how_far_a_canceled_task_came_is_kept(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Child], valkey_url: str
) -> None:
    """In the attempt's row, by its last write: Redis forgets."""
    task = order(ledger, sleeping(30.0))
    child, live = hire(ledger), Live(valkey_url)
    child.start(task)
    told = wait_until(lambda: (live.progress(task.id) or {}).get("percent"))
    live.close()
    ledger.cancel(task.id)

    assert child.end() == "canceled"
    (attempt,) = done(ledger, task).attempts
    assert attempt.progress is not None
    assert told <= attempt.progress <= 100


def test_nothing_is_completed_before_all_of_it_is_stored(
    ledger: Ledger,
    simulator: Simulator,
    hire: Callable[..., Child],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Storage that takes no bytes costs an attempt and no rendering; the next one stores them, whole."""
    monkeypatch.setattr(runner, "_STORE_TRIES_S", (0.01,))
    workflow = simple(batch=2)
    workflow["3"] = {"class_type": "PreviewAny", "inputs": {"source": "said"}}
    full = tmp_path / "full"
    full.write_bytes(b"")  # a file, where a folder would be needed
    task = order(ledger, workflow)
    assert hire(ledger, storage=full).run(task) == "pending"
    assert outcomes(ledger, task) == ["storage_failed"]
    make_due(ledger)

    assert hire(ledger).run(task) == "completed"
    assert len(logged(simulator, "started")) == 1
    assert len(done(ledger, task).outputs) == 3
    for output in done(ledger, task).outputs:
        data = (tmp_path / "data" / "assets" / output.key).read_bytes()
        assert hashlib.sha256(data).hexdigest() == output.sha256


def test_an_outcome_is_held_until_the_ledger_is_back(
    postgres_ledger_url: str,
    simulator: Simulator,
    hire: Callable[..., Child],
    fault_proxy: Callable[[str], FaultProxy],
) -> None:
    """A rendering that ends while the ledger is away is neither lost nor done again."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(postgres_ledger_url) as ledger:
        task = order(ledger, simple())
        child = hire(proxy.url_of(postgres_ledger_url))
        start_held(simulator, child, task)
        proxy.set_mode("refuse")
        simulator.faults(stall=False)
        wait_until(lambda: logged(simulator, "finished"))
        with pytest.raises(AssertionError, match="did not end"):
            child.end(0.3)
        proxy.set_mode("pass")

        assert child.end() == "completed"
        assert outcomes(ledger, task) == ["completed"]
