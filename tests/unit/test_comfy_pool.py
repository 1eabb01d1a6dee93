"""Which servers are asked, which rest, and for how long."""

from __future__ import annotations

import threading

import pytest

from genpulse.comfy.client import ComfyClient, QueueSnapshot
from genpulse.comfy.pool import Server, ServerPool
from genpulse.errors import ComfyUnavailable


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeServer(ComfyClient):
    """A client whose server is up or down as the test says."""

    up = True
    asked = 0

    def queue_remaining(self, *, timeout_s: float | None = None) -> int:
        self.asked += 1
        if not self.up:
            msg = "nothing listens"
            raise ComfyUnavailable(msg, refused=True)
        return 3

    def queue(self, *, timeout_s: float | None = None) -> QueueSnapshot:
        return QueueSnapshot()


def pool_of(*names: str) -> tuple[ServerPool, dict[str, FakeServer], FakeClock]:
    """A pool of fake servers by name, with a clock that the test moves."""
    clock = FakeClock()
    pool = ServerPool(
        [Server(name, f"http://{name}.invalid") for name in names], connect=FakeServer, clock=clock
    )
    fakes: dict[str, FakeServer] = {}
    for name in names:
        client = pool.client(name)
        assert isinstance(client, FakeServer)
        fakes[name] = client
    return pool, fakes, clock


def test_no_server_is_healthy_before_it_was_asked() -> None:
    """Nothing is assumed: a worker asks before it consumes."""
    pool, _, _ = pool_of("a")

    assert pool.healthy() == ()
    assert [server.name for server in pool.probe_all()] == ["a"]
    assert pool.states()[0].queue_remaining == 3


def test_a_dead_server_does_not_hide_the_others() -> None:
    """The healthy ones are found although one is down, and its reason holds no address."""
    pool, fakes, _ = pool_of("a", "b")
    fakes["a"].up = False

    assert [server.name for server in pool.probe_all()] == ["b"]
    assert pool.states()[0].as_dict() == {"name": "a", "healthy": False, "reason": "nothing listens"}


def test_a_failed_attempt_rests_longer_each_time() -> None:
    """2, 4, 8 … 60 s, and nobody is asked meanwhile."""
    pool, fakes, clock = pool_of("a")
    rests = []
    for _ in range(7):
        pool.mark_bad("a", "stalled")
        rests.append(pool.states()[0].retry_in_s)
        asked = fakes["a"].asked
        clock.now += rests[-1] - 0.1
        pool.probe_all()
        assert fakes["a"].asked == asked
        clock.now += 0.2

    assert rests == pytest.approx([2, 4, 8, 16, 32, 60, 60])


def test_a_server_that_is_away_for_long_is_used_again_at_once() -> None:
    """Not answering is no reason to rest longer: after an hour it is asked 2 s later, as at first."""
    pool, fakes, clock = pool_of("a")
    fakes["a"].up = False
    for _ in range(30):
        pool.probe_all()
        assert pool.states()[0].retry_in_s == pytest.approx(2)
        clock.now += 2.1
    fakes["a"].up = True

    assert len(pool.probe_all()) == 1


def test_a_server_is_asked_again_before_it_counts() -> None:
    """The end of its rest alone does not make a server healthy; an answer does."""
    pool, _, clock = pool_of("a")
    pool.probe_all()
    pool.mark_bad("a", "stalled")
    clock.now += 2.1

    assert pool.healthy() == ()
    assert len(pool.probe_all()) == 1


def test_an_answer_does_not_forgive_but_work_does() -> None:
    """A server whose worker thread is dead answers too: only a finished attempt resets its rest."""
    pool, _, clock = pool_of("a")
    for rest in (2.0, 4.0):
        pool.mark_bad("a", "stalled")
        assert pool.states()[0].retry_in_s == rest
        clock.now += rest + 0.1
        pool.probe_all()
    pool.mark_good("a")
    pool.mark_bad("a", "stalled")

    assert pool.states()[0].retry_in_s == 2.0


def test_names_are_distinct() -> None:
    """Two servers of one name would share a queue."""
    with pytest.raises(ValueError, match="two ComfyUI servers"):
        ServerPool([Server("a", "http://x"), Server("a", "http://y")])


def test_threads_may_share_a_pool() -> None:
    """Marks and questions from many threads leave a consistent state."""
    pool, _, _ = pool_of("a", "b")

    def hammer() -> None:
        for _ in range(50):
            pool.mark_bad("a", "x")
            pool.mark_good("a")
            pool.probe_all()
            pool.states()

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {server.name for server in pool.probe_all()} >= {"b"}
