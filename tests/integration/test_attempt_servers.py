"""
What an attempt does about the servers: out of memory, dead behind their HTTP, too slow, or uncertain.

The ledger, the storage and the runner are real, and so are the simulators' servers. Children that are
siblings share their marks, as a worker's processes do.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from genpulse.comfy import follower
from genpulse.comfy.client import ComfyClient
from genpulse.config import Settings
from genpulse.ledger import Ledger, ProcessSession
from genpulse.ledger import tables as t
from genpulse.model import AttemptOutcome, Task, TaskStatus
from genpulse.tasks import render
from genpulse.tasks.board import Board
from genpulse.testing.services import FaultProxy
from genpulse.testing.simulator import Simulator
from tests.support import wait_until
from tests.support.children import Child
from tests.support.cluster import Workflow, simple, sleeping
from tests.support.ledger import open_ledger, row_of, rows, run_sql, submit


@pytest.fixture
def ledger(sqlite_ledger_url: str) -> Iterator[Ledger]:
    """What is written here is tried on both databases by the ledger's own tests."""
    with open_ledger(sqlite_ledger_url, pool_size=2) as found:
        yield found


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server counts as away after two seconds of silence, not ten."""
    monkeypatch.setattr(follower, "SILENT_SERVER_S", 2.0)
    monkeypatch.setattr(render, "GONE_AFTER_S", 2.0)


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
        storage = settings.pop("storage", None)
        built = Settings.build(
            data_dir=tmp_path / "data",
            database_url=ledger.engine.url.render_as_string(hide_password=False),
            redis_url=valkey_url,
            comfy_urls=",".join(f"{each}={server.url}" for each, server in servers.items()),
            **{"beat_s": 0.1, "drain_s": 0.0, **settings},
        )
        hired.append(Child(built, name, marks=marks, storage=storage))
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


@contextlib.contextmanager
def presence_of(
    ledger: Ledger, server: str, *, healthy: Callable[[], bool], silent: str = "", every_s: float = 0.2
) -> Iterator[None]:
    """The row of a live worker, written anew again and again as its heartbeat does it."""
    stop = threading.Event()
    session = ProcessSession(ledger)

    def beat() -> None:
        session.hold()
        servers = [server, silent] if silent else [server]
        while True:
            ledger.register_worker(
                name="second@host",
                host="host",
                pid=2,
                queues=["comfy", *(f"comfy@{name}" for name in servers)],
                servers=[
                    {"name": name, "healthy": name == server and healthy(), "reason": ""} for name in servers
                ],
                slots=2,
                consuming=True,
                session_key=session.key,
                version="1",
            )
            if stop.wait(every_s):
                break
        session.release()

    thread = threading.Thread(target=beat, name="presence", daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


def through(road: FaultProxy) -> Any:
    """The server at the end of a road, for :func:`hire`."""
    return SimpleNamespace(url=f"http://127.0.0.1:{road.port}")


def hand_back(child: Child, task: Task, server: Simulator) -> None:
    """Let the prompt begin, and drain the child: the prompt goes on, for the next one to adopt."""
    child.start(task)
    wait_until(lambda: logged(server, "started"))
    child.draining.set()
    assert child.end() == TaskStatus.PENDING


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


def test_the_one_more_try_is_on_the_server_that_was_freed(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """Although another one has become free meanwhile, and would be the first to be chosen."""
    servers = {"gpu1": start_server("gpu1"), "gpu2": start_server("gpu2")}
    servers["gpu2"].faults(fail_next="oom")
    sibling, child = hire("sibling", servers), hire("child", servers)
    sibling.start(order(ledger, sleeping(0.8)))
    wait_until(lambda: logged(servers["gpu1"], "started"))
    task = order(ledger, simple())

    assert child.run(task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("completed", "gpu2")]
    assert len(logged(servers["gpu2"], "started")) == 2
    assert sibling.end() == TaskStatus.COMPLETED


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
    one, two = hire("one", {"gpu1": gpu1}, board, stall_s=1.5), hire("two", {"gpu1": gpu1}, board)
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


# -- limits -----------------------------------------------------------------------------------------


def spans(simulator: Simulator, prompt_id: str) -> float:
    """How long a prompt ran until it was interrupted, by the server's own log."""
    at = {line["event"]: line["t"] for line in simulator.log if line.get("prompt_id") == prompt_id}
    return float(at["interrupted"] - at["started"])


def newest_prompt(ledger: Ledger, task: Task) -> str:
    """The prompt of the task's newest attempt."""
    found = ledger.get(task.id)
    assert found is not None
    return str(found.attempts[-1].prompt_id)


def test_at_its_deadline_a_prompt_is_stopped_by_its_id_and_no_other(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """Within 2 s, while the one that waits behind it renders next, with a time of its own."""
    gpu1 = start_server("gpu1")
    one, two = hire("one", {"gpu1": gpu1}), hire("two", {"gpu1": gpu1})
    one.run(order(ledger, simple()))
    late, behind = order(ledger, sleeping(60), timeout_s=1), order(ledger, sleeping(0.5), timeout_s=1)
    one.start(late)
    wait_until(lambda: len(logged(gpu1, "started")) == 2)
    two.start(behind)

    assert one.end() == TaskStatus.FAILED
    assert two.end() == TaskStatus.COMPLETED

    found = ledger.get(late.id)
    assert found is not None
    assert found.error is not None
    assert found.error.code == "timeout"
    assert logged(gpu1, "interrupted") == [newest_prompt(ledger, late)]
    assert 1.0 <= spans(gpu1, newest_prompt(ledger, late)) < 4.0


def test_waiting_in_the_servers_queue_is_no_rendering_time(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """A prompt behind a long one has its whole ``timeout_s`` when it runs."""
    gpu1 = start_server("gpu1")
    one, two = hire("one", {"gpu1": gpu1}), hire("two", {"gpu1": gpu1})
    one.run(order(ledger, simple()))
    one.start(order(ledger, sleeping(3)))
    wait_until(lambda: len(logged(gpu1, "started")) == 2)
    behind = order(ledger, sleeping(0.2), timeout_s=1)
    two.start(behind)

    assert two.end() == TaskStatus.COMPLETED
    assert one.end() == TaskStatus.COMPLETED


def test_whoever_adopts_a_prompt_has_what_is_left_of_its_time(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """The clock runs on from when the prompt was first seen running, over all who follow it."""
    gpu1 = start_server("gpu1")
    task = order(ledger, sleeping(60), timeout_s=4)
    first = hire("first", {"gpu1": gpu1})
    first.start(task)
    wait_until(lambda: row_of(ledger, task)["deadline_at"])
    time.sleep(2.0)
    first.draining.set()
    assert first.end() == TaskStatus.PENDING

    assert again(ledger, hire("second", {"gpu1": gpu1}), task) == TaskStatus.FAILED

    assert [outcome for outcome, _ in history(ledger, task)] == ["handed_back", "failed"]
    assert len(logged(gpu1, "started")) == 1
    assert 4.0 <= spans(gpu1, newest_prompt(ledger, task)) < 5.9  # anew it would be 6 s


def test_storing_has_a_limit_of_its_own_and_costs_no_rendering(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child], tmp_path: Path
) -> None:
    """Storage that fails for long ends the attempt; the next one adopts the finished prompt."""
    gpu1 = start_server("gpu1")
    full = tmp_path / "full"
    full.write_bytes(b"")  # a file, where a folder would be needed
    task = order(ledger, simple(), timeout_s=1)
    child = hire("child", {"gpu1": gpu1}, storage=full, store_timeout_s=1.2)

    began = time.monotonic()
    assert child.run(task) == TaskStatus.PENDING
    assert time.monotonic() - began < 10  # all tries take 15 s

    assert again(ledger, hire("second", {"gpu1": gpu1}), task) == TaskStatus.COMPLETED
    assert history(ledger, task) == [("storage_failed", "gpu1"), ("completed", "gpu1")]
    assert len(logged(gpu1, "started")) == 1


# -- a post whose answer is lost --------------------------------------------------------------------


def test_a_post_whose_answer_was_lost_is_looked_up_and_not_repeated(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """The prompt is in the queue: it is followed, and rendered once."""
    gpu1 = start_server("gpu1")
    gpu1.faults(lose_answers_next=1)
    task = order(ledger, sleeping(0.5))

    assert hire("child", {"gpu1": gpu1}).run(task) == TaskStatus.COMPLETED

    assert logged(gpu1, "started") == [newest_prompt(ledger, task)]
    assert [outcome for outcome, _ in history(ledger, task)] == ["completed"]


# -- a road that is broken for one worker alone -----------------------------------------------------


@pytest.mark.parametrize("mode", ["refuse", "blackhole"])
@pytest.mark.usefixtures("short_silence")
def test_a_prompt_is_adopted_by_the_worker_that_still_reaches_its_server(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child], mode: Any
) -> None:
    """It counts as an attempt, and nothing is rendered twice."""
    gpu1 = start_server("gpu1")
    task = order(ledger, sleeping(8))
    with FaultProxy(gpu1.url) as road, presence_of(ledger, "gpu1", healthy=lambda: True):
        first = hire("first", {"gpu1": through(road)})
        first.start(task)
        wait_until(lambda: logged(gpu1, "started"))
        road.set_mode(mode)
        assert first.end() == TaskStatus.PENDING
        assert row_of(ledger, task)["bound_server"] == "gpu1"
        assert row_of(ledger, task)["available_at"] <= dt.datetime.now(dt.UTC)

        assert hire("second", {"gpu1": gpu1}).run(task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("unreachable", "gpu1"), ("completed", "gpu1")]
    assert len(logged(gpu1, "started")) == 1
    assert logged(gpu1, "interrupted") == []


@pytest.mark.usefixtures("short_silence")
def test_a_finished_picture_is_fetched_by_the_worker_that_still_reaches_its_server(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child], tmp_path: Path
) -> None:
    """The road breaks between the end of the rendering and the download."""
    gpu1 = start_server("gpu1")
    full = tmp_path / "full"
    full.write_bytes(b"")  # a file, where a folder would be needed: storing is tried for a while
    task = order(ledger, simple())
    with FaultProxy(gpu1.url) as road, presence_of(ledger, "gpu1", healthy=lambda: True):
        first = hire("first", {"gpu1": through(road)}, storage=full)
        first.start(task)
        wait_until(lambda: rows(ledger, t.attempts, t.attempts.c.rendered_at.is_not(None)))
        road.set_mode("refuse")
        assert first.end() == TaskStatus.PENDING

        assert hire("second", {"gpu1": gpu1}).run(task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("unreachable", "gpu1"), ("completed", "gpu1")]
    assert len(logged(gpu1, "started")) == 1


@pytest.mark.parametrize("others", ["nobody", "as cut off"])
def test_a_server_that_nobody_reaches_has_forgotten_the_prompt(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child], others: str
) -> None:
    """The task is bound to nothing, and the prompt is noted to be stopped, should the server be there after all."""
    gpu1 = start_server("gpu1")
    task = order(ledger, sleeping(60))
    with contextlib.ExitStack() as stack:
        road = stack.enter_context(FaultProxy(gpu1.url))
        if others != "nobody":
            stack.enter_context(presence_of(ledger, "gpu1", healthy=lambda: False))
        first = hire("first", {"gpu1": through(road)})
        first.start(task)
        wait_until(lambda: logged(gpu1, "started"))
        road.set_mode("refuse")
        began = time.monotonic()
        assert first.end() == TaskStatus.PENDING
        assert time.monotonic() - began < 5.0

    assert row_of(ledger, task)["bound_server"] is None
    assert history(ledger, task) == [("retry", "gpu1")]
    assert [stray.prompt_id for stray in ledger.strays_on(["gpu1"])] == logged(gpu1, "started")


@pytest.mark.usefixtures("short_silence")
def test_a_worker_that_cannot_reach_a_prompts_server_leaves_it_to_the_one_that_can(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """It gives the task back uncounted, although it has another server of its own."""
    gpu1, gpu2 = start_server("gpu1"), start_server("gpu2")
    task = order(ledger, sleeping(8))
    with FaultProxy(gpu1.url) as road, presence_of(ledger, "gpu1", healthy=lambda: True):
        second = hire("second", {"gpu1": gpu1})
        hand_back(second, task, gpu1)
        first = hire("first", {"gpu1": through(road), "gpu2": gpu2})
        road.set_mode("refuse")

        assert again(ledger, first, task) == TaskStatus.PENDING
        assert row_of(ledger, task)["bound_server"] == "gpu1"
        assert again(ledger, hire("third", {"gpu1": gpu1}), task) == TaskStatus.COMPLETED

    assert [outcome for outcome, _ in history(ledger, task)] == ["handed_back", "handed_back", "completed"]
    assert len(logged(gpu1, "started")) == 1
    assert logged(gpu2, "started") == []


def test_a_prompt_that_nobody_gets_an_answer_for_is_passed_on_so_often_and_no_more(
    ledger: Ledger,
    start_server: Callable[[str], Simulator],
    hire: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server may be well for all who look at it, and answer for everything but this prompt."""
    monkeypatch.setattr(render, "ROADS_TRIED", 2)
    gpu1, gpu2 = start_server("gpu1"), start_server("gpu2")
    task = order(ledger, sleeping(60))
    with FaultProxy(gpu1.url) as road, presence_of(ledger, "gpu1", healthy=lambda: True):
        first = hire("first", {"gpu1": gpu1})
        hand_back(first, task, gpu1)
        other = hire("other", {"gpu1": through(road), "gpu2": gpu2})
        road.set_mode("refuse")
        for _ in range(2):
            assert again(ledger, other, task) == TaskStatus.PENDING
        other.start(task)
        wait_until(lambda: logged(gpu2, "started"))

    assert [outcome for outcome, _ in history(ledger, task)[:3]] == ["handed_back"] * 3
    assert [stray.prompt_id for stray in ledger.strays_on(["gpu1"])] == logged(gpu1, "started")
    other.draining.set()


def test_a_worker_that_speaks_late_because_of_another_server_is_waited_for(
    ledger: Ledger,
    start_server: Callable[[str], Simulator],
    hire: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks all its servers before it says anything, and one of them is silent."""
    monkeypatch.setattr(render, "OTHERS_S", 0.5)
    gpu1 = start_server("gpu1")
    task = order(ledger, sleeping(8))
    with (
        FaultProxy(gpu1.url) as road,
        presence_of(ledger, "gpu1", healthy=lambda: True, silent="gpu9", every_s=2.0),
    ):
        wait_until(ledger.workers)
        first = hire("first", {"gpu1": through(road)})
        first.start(task)
        wait_until(lambda: logged(gpu1, "started"))
        road.set_mode("refuse")
        assert first.end() == TaskStatus.PENDING

    assert history(ledger, task) == [("unreachable", "gpu1")]


def test_a_finished_picture_is_fetched_later_by_the_only_worker_of_its_server(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child], tmp_path: Path
) -> None:
    """Its road breaks during the download: the next attempt adopts what is rendered."""
    gpu1 = start_server("gpu1")
    full = tmp_path / "full"
    full.write_bytes(b"")  # a file, where a folder would be needed: storing is tried for a while
    task = order(ledger, simple())
    with FaultProxy(gpu1.url) as road:
        servers = {"gpu1": through(road)}
        first = hire("first", servers, storage=full)
        first.start(task)
        wait_until(lambda: rows(ledger, t.attempts, t.attempts.c.rendered_at.is_not(None)))
        road.set_mode("refuse")
        assert first.end() == TaskStatus.PENDING
        road.set_mode("pass")

        assert again(ledger, hire("second", servers), task) == TaskStatus.COMPLETED

    assert history(ledger, task) == [("storage_failed", "gpu1"), ("completed", "gpu1")]
    assert len(logged(gpu1, "started")) == 1


def test_a_prompt_whose_post_got_no_answer_before_the_road_broke_is_not_forgotten(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """It arrived, its answer did not, and then nobody was there to be asked: it may be rendering."""
    gpu1, gpu2 = start_server("gpu1"), start_server("gpu2")
    busy = hire("busy", {"gpu2": gpu2})
    busy.start(order(ledger, sleeping(30)))
    wait_until(lambda: logged(gpu2, "started"))
    task = order(ledger, sleeping(60))
    with FaultProxy(gpu1.url) as road:
        road.set_mode("delay", delay_s=0.4)
        gpu1.faults(lose_answers_next=1)
        child = hire("child", {"gpu1": through(road), "gpu2": gpu2})
        child.start(task)
        wait_until(lambda: logged(gpu1, "submitted"), every_s=0.01)
        road.set_mode("refuse")

        assert child.end() == TaskStatus.PENDING

    assert history(ledger, task) == [("retry", "gpu1")]
    assert [stray.prompt_id for stray in ledger.strays_on(["gpu1"])] == logged(gpu1, "submitted")
    busy.draining.set()


def test_parts_that_a_server_left_out_fail_the_task_also_if_its_answer_was_lost(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """The server runs the rest and calls it success; only the answer to the POST said what is missing."""
    gpu1 = start_server("gpu1")
    gpu1.faults(lose_answers_next=1)
    whole = simple()
    task = order(ledger, whole | {"99": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}})

    assert hire("child", {"gpu1": gpu1}).run(task) == TaskStatus.FAILED

    found = ledger.get(task.id)
    assert found is not None
    assert found.error is not None
    assert (found.error.code, found.error.node_id) == ("invalid_workflow", "99")


# -- interrupted by ourselves -----------------------------------------------------------------------


def test_a_prompt_that_was_stopped_before_its_adoption_is_rendered_again_and_not_canceled(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """Nobody asked for a cancel: whoever cleared up was quicker than whoever adopts."""
    gpu1 = start_server("gpu1")
    task = order(ledger, sleeping(60))
    first = hire("first", {"gpu1": gpu1})
    hand_back(first, task, gpu1)
    second = hire("second", {"gpu1": gpu1})
    second.start(task)
    wait_until(lambda: len(rows(ledger, t.attempts, t.attempts.c.prompt_id.is_not(None))) == 2)

    ComfyClient(gpu1.url).stop(logged(gpu1, "started")[0])

    assert second.end() == TaskStatus.PENDING
    assert [outcome for outcome, _ in history(ledger, task)] == ["handed_back", "retry"]


def test_a_prompt_that_begins_while_it_is_to_be_withdrawn_is_left_alone(
    ledger: Ledger, start_server: Callable[[str], Simulator], hire: Callable[..., Child]
) -> None:
    """The server counts as stuck, and moves on: what was said to wait in vain renders already."""
    gpu1 = start_server("gpu1")
    child = hire("child", {"gpu1": gpu1})
    child.run(order(ledger, simple()))
    gpu1.faults(mute_sockets=True)
    task = order(ledger, sleeping(2))
    child.start(task)
    wait_until(lambda: len(logged(gpu1, "started")) == 2, every_s=0.001)

    child.pool.mark_bad("gpu1", "no progress", stuck_on="another prompt")

    assert child.end() == TaskStatus.COMPLETED
    assert logged(gpu1, "interrupted") == []


# -- a prompt that is sent by a loser ---------------------------------------------------------------


def test_a_process_that_was_frozen_right_before_its_post_leaves_word_of_what_it_sent(
    ledger: Ledger,
    start_server: Callable[[str], Simulator],
    hire: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease was there when it looked, and is another's when the prompt arrives: somebody must stop it."""
    gpu1 = start_server("gpu1")
    task = order(ledger, simple())
    deliver = ComfyClient.deliver
    frozen, thawed = threading.Event(), threading.Event()

    def freeze(self: ComfyClient, *arguments: Any, **values: Any) -> Any:
        if not frozen.is_set():
            frozen.set()
            assert thawed.wait(20)
        return deliver(self, *arguments, **values)

    monkeypatch.setattr(ComfyClient, "deliver", freeze)
    first = hire("first", {"gpu1": gpu1})
    first.start(task)
    assert frozen.wait(10)
    ledger.end_lease_of("first@host:1", task.id)
    (lease,) = ledger.stale_leases(60.0)
    assert ledger.reap(lease, missed_s=60.0, max_lost=3) == TaskStatus.PENDING
    assert hire("second", {"gpu1": gpu1}).run(task) == TaskStatus.COMPLETED
    for stray in ledger.strays_on(["gpu1"]):  # as the janitor, who finds nothing of it on the server
        ledger.forget_stray(stray)
    wait_until(first.has_heard_of_its_loss)  # a process that was frozen for long asks; this one only seems so
    thawed.set()

    assert first.end() == "lost"

    sent = [stray.prompt_id for stray in ledger.strays_on(["gpu1"])]
    assert len(sent) == 1
    assert sent[0] in logged(gpu1, "submitted")
    assert [outcome for outcome, _ in history(ledger, task)] == ["lost", "completed"]


def prompt_of(ledger: Ledger, task: Task) -> str | None:
    """The prompt of the task's newest attempt."""
    found = ledger.get(task.id)
    assert found is not None
    assert found.attempts[-1].outcome is AttemptOutcome.HANDED_BACK
    return found.attempts[-1].prompt_id
