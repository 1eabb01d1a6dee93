"""The sweeper: what crashes, wipes and lost messages left is set right in seconds, by any number of them."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from genpulse.config import Settings
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger, ProcessSession
from genpulse.ledger import tables as t
from genpulse.live import Live
from genpulse.model import Claim, TaskStatus
from genpulse.tasks import queues
from genpulse.tasks.producer import Producer, RunwayView
from genpulse.tasks.relay import Relay
from genpulse.tasks.sweeper import OVERDUE_S, Sweeper, Swept
from genpulse.testing import services
from genpulse.testing.services import FaultProxy
from tests.support import wait_until
from tests.support.ledger import at_once, claim, open_ledger, prompt, row_of, rows, run_sql, submit

LEASE_S, BEAT_S = 1.2, 0.3


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone."""
    with open_ledger(ledger_url, pool_size=2) as found:
        yield found


@pytest.fixture
def make_sweeper(valkey_url: str) -> Iterator[Callable[..., Sweeper]]:
    """Sweepers with short leases, on the session's Valkey or behind a proxy."""
    with contextlib.ExitStack() as stack:

        def make(ledger: Ledger, redis_url: str = valkey_url, lease_s: float = LEASE_S) -> Sweeper:
            settings = Settings.build(redis_url=redis_url, lease_s=lease_s, beat_s=lease_s / 4)
            client = stack.enter_context(redis.Redis.from_url(redis_url, socket_timeout=0.5))
            relay = Relay(ledger, Producer(settings, timeout_s=0.5))
            return Sweeper(settings, ledger, relay, RunwayView(client), Live(redis_url))

        yield make


@contextlib.contextmanager
def worker(
    ledger: Ledger, *servers: str, healthy: bool = True, queue: str = "comfy"
) -> Iterator[ProcessSession]:
    """A live worker of these servers: a fresh row, and a session that is held."""
    session = ProcessSession(ledger)
    session.hold()
    ledger.register_worker(
        name=f"w{session.key}",
        host="h",
        pid=1,
        queues=[queue, *(f"{queue}@{name}" for name in servers)],
        servers=[{"name": name, "healthy": healthy, "reason": ""} for name in servers],
        slots=2,
        consuming=True,
        session_key=session.key,
        version="1",
    )
    yield session
    session.release()


def hold(ledger: Ledger, session_key: int, **values: Any) -> Claim:
    """A task that runs in a process with this session."""
    return claim(ledger, submit(ledger), session_key=session_key, **values)


def status(ledger: Ledger, held: Claim) -> str:
    """What became of the task."""
    return str(row_of(ledger, held.task)["status"])


def steady(sweeper: Sweeper) -> None:
    """Let the sweeper be connected for one lease."""
    sweeper.sweep()
    time.sleep(LEASE_S + 0.05)


# -- reaping --------------------------------------------------------------------------------------


def test_a_lease_that_ran_out_is_taken_back(ledger: Ledger, make_sweeper: Callable[..., Sweeper]) -> None:
    """Also while the process lives: it may be frozen, and a thawed one is fenced."""
    with worker(ledger) as session:
        sweeper = make_sweeper(ledger)
        held = hold(ledger, session.key, lease_s=LEASE_S)
        steady(sweeper)

        wait_until(lambda: sweeper.sweep().reaped, 3.0)

        assert status(ledger, held) == TaskStatus.PENDING
        assert not ledger.still_held(held.fence)


def test_how_far_a_lost_attempt_came_is_kept(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper], valkey_url: str
) -> None:
    """Its worker cannot tell any more; Redis can, for the while that it knows. Of another attempt it says nothing."""
    live = Live(valkey_url)
    with worker(ledger) as session:
        sweeper = make_sweeper(ledger)
        told, older = (hold(ledger, session.key, lease_s=LEASE_S) for _ in range(2))
        live.publish_progress(told.task.id, 1, 41.5, {})
        live.publish_progress(older.task.id, 7, 99.0, {})
        steady(sweeper)

        reaped = 0
        while reaped < 2:  # by the test's own time limit
            reaped += sweeper.sweep().reaped

    live.close()
    progress = {row["task_id"]: row["progress"] for row in rows(ledger, t.attempts)}
    assert progress == {told.task.id: 41.5, older.task.id: None}


def test_a_dead_process_is_known_after_three_missed_beats(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """Its session is free, so nobody waits for the lease to run out; a living one is left alone."""
    with worker(ledger) as session:
        sweeper = make_sweeper(ledger)
        steady(sweeper)
        living = hold(ledger, session.key, lease_s=60.0)
        dead = hold(ledger, secrets.randbits(62), lease_s=60.0)
        began = time.monotonic()

        assert sweeper.sweep().reaped == 0
        wait_until(lambda: sweeper.sweep().reaped, 5.0)

        assert time.monotonic() - began > 2.5 * BEAT_S
        assert (status(ledger, dead), status(ledger, living)) == ("pending", "processing")


def test_a_sweeper_that_just_connected_reaps_nothing(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """Right after an outage every lease looks stale although its worker is well."""
    held = hold(ledger, 1, lease_s=-10.0)
    sweeper = make_sweeper(ledger)
    began = time.monotonic()

    assert sweeper.sweep().reaped == 0
    wait_until(lambda: sweeper.sweep().reaped, 6.0)

    assert time.monotonic() - began >= LEASE_S
    assert status(ledger, held) == TaskStatus.PENDING


def test_an_outage_of_the_ledger_begins_the_grace_anew(
    postgres_ledger_url: str, fault_proxy: Callable[[str], FaultProxy], make_sweeper: Callable[..., Sweeper]
) -> None:
    """The workers need a beat to renew what ran out meanwhile."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(proxy.url_of(postgres_ledger_url)) as ledger:
        sweeper = make_sweeper(ledger)
        steady(sweeper)
        held = hold(ledger, 1, lease_s=-10.0)
        proxy.set_mode("refuse")
        with pytest.raises(LedgerUnavailable):
            sweeper.sweep()
        proxy.set_mode("pass")

        assert sweeper.sweep().reaped == 0
        assert status(ledger, held) == TaskStatus.PROCESSING
        wait_until(lambda: sweeper.sweep().reaped, 6.0)


def test_a_sweeper_that_was_frozen_with_the_workers_begins_anew(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """A host that slept: by the ledger's clock the pass comes late, and all leases look stale."""
    sweeper = make_sweeper(ledger)
    steady(sweeper)
    held = hold(ledger, 1, lease_s=-10.0)
    time.sleep(2.2)  # together with the lease above more than the three seconds that a pass may be late

    assert sweeper.sweep().reaped == 0
    assert status(ledger, held) == TaskStatus.PROCESSING


def test_many_sweepers_take_a_task_back_once(ledger_url: str, make_sweeper: Callable[..., Sweeper]) -> None:
    """Every step is a conditional update that one of them wins."""
    with contextlib.ExitStack() as stack:
        ledgers = [stack.enter_context(open_ledger(ledger_url)) for _ in range(4)]
        sweepers = [make_sweeper(ledger) for ledger in ledgers]
        for sweeper in sweepers:
            sweeper.sweep()
        held = [hold(ledgers[0], 1, lease_s=-1.0) for _ in range(3)]
        time.sleep(LEASE_S)

        swept: list[Swept] = []
        for _ in range(3):
            swept += at_once(4, lambda index: sweepers[index].sweep())

        assert sum(each.reaped for each in swept) == 3
        assert [row_of(ledgers[0], each.task)["losses"] for each in held] == [1, 1, 1]


def test_poison_ends_at_its_bound(ledger: Ledger, make_sweeper: Callable[..., Sweeper]) -> None:
    """A task that takes every worker down with it fails, with its history."""
    sweeper = make_sweeper(ledger)
    steady(sweeper)
    task = submit(ledger)
    for _ in range(4):
        run_sql(ledger, sa.update(t.tasks).values(available_at=t.tasks.c.created_at))
        claim(ledger, task, lease_s=-1.0)
        assert sweeper.sweep().reaped == 1

    done = ledger.get(task.id)
    assert done is not None
    assert (done.status, done.error and done.error.code) == (TaskStatus.FAILED, "worker_lost")
    assert [each.outcome for each in done.attempts] == ["lost"] * 4


# -- bindings and expiry --------------------------------------------------------------------------


def test_a_bound_task_is_freed_when_its_last_worker_is_gone(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """While one lives it waits for that one, also beyond the adoption wait."""
    sweeper = make_sweeper(ledger)
    steady(sweeper)
    with worker(ledger, "gpu1"), worker(ledger, "gpu2"):
        held = hold(ledger, 1, lease_s=-1.0)
        prompt(ledger, held, "gpu1")
        swept = sweeper.sweep()
        assert (swept.reaped, swept.released) == (1, 0)
        assert row_of(ledger, held.task)["bound_server"] == "gpu1"
        assert sweeper.sweep().released == 0

    wait_until(lambda: sweeper.sweep().released, 3.0)
    assert row_of(ledger, held.task)["bound_server"] is None


def test_what_waits_for_a_server_that_nobody_serves_is_cleared(
    ledger: Ledger,
    make_sweeper: Callable[..., Sweeper],
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its task went elsewhere or ended; where a task is still bound, or a worker serves it, it stays."""
    monkeypatch.setattr("genpulse.tasks.sweeper._CLEAR_S", 0.0)
    sweeper = make_sweeper(ledger)
    held = hold(ledger, 1)
    prompt(ledger, held, "bound")
    ledger.hand_back(held.fence, adopt_wait_s=600.0)
    celerys_own = "host@x.reply.celery.pidbox"
    with redis.Redis.from_url(valkey_url, decode_responses=True) as client, worker(ledger, "served"):
        for name in (
            "comfy@bound",
            "comfy@served",
            "comfy@gone",
            "comfy@gone\x06\x169",
            celerys_own,
            "comfy",
            "mails@high",
        ):
            client.lpush(name, "{}")
        client.set("note@gone", "no list")
        steady(sweeper)
        sweeper.sweep()

        left = {key for key in client.scan_iter() if client.type(key) == "list"}
        assert left == {"comfy@bound", "comfy@served", celerys_own, "comfy", "mails@high"}
        assert client.get("note@gone") == "no list"


def test_a_worker_that_knows_the_server_and_not_the_queue_holds_no_task(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """Two workers of one host have one file of settings; the one that consumes the queue has gone."""
    sweeper = make_sweeper(ledger)
    steady(sweeper)
    held = hold(ledger, 1, lease_s=-1.0)
    prompt(ledger, held, "gpu1")

    with worker(ledger, "gpu1", queue="thumbs"):
        swept = sweeper.sweep()

    assert (swept.reaped, swept.released) == (1, 1)
    assert row_of(ledger, held.task)["bound_server"] is None


def test_a_sweeper_that_just_connected_frees_no_binding(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """After a restart of the database no worker holds its session for a moment, and all are well."""
    held = hold(ledger, 1)
    prompt(ledger, held, "gpu1")
    ledger.hand_back(held.fence, adopt_wait_s=0.0)
    sweeper = make_sweeper(ledger)
    assert sweeper.sweep().released == 0
    time.sleep(LEASE_S)
    assert sweeper.sweep().released == 1


def test_a_short_restart_of_the_ledger_frees_no_binding(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper]
) -> None:
    """It falls between two passes and takes the session of a worker that is well and beats."""
    sweeper = make_sweeper(ledger)
    steady(sweeper)
    held = hold(ledger, 1)
    prompt(ledger, held, "gpu1")
    ledger.hand_back(held.fence, adopt_wait_s=0.0)

    with worker(ledger, "gpu1") as session:
        session.release()
        assert sweeper.sweep().released == 0
        wait_until(lambda: sweeper.sweep().released, 3.0)  # its row is not renewed: it is dead


def test_a_server_that_nobody_reaches_holds_no_task(
    ledger: Ledger, make_sweeper: Callable[..., Sweeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker lives but does not consume: after a while the task is free, however long it might wait."""
    monkeypatch.setattr("genpulse.tasks.sweeper.GONE_AFTER_S", 0.5)
    sweeper = make_sweeper(ledger)
    steady(sweeper)
    held = hold(ledger, 1)
    prompt(ledger, held, "gpu1")
    ledger.hand_back(held.fence, adopt_wait_s=600.0)

    with worker(ledger, "gpu1", healthy=False):
        assert sweeper.sweep().released == 0
        time.sleep(0.6)
        assert sweeper.sweep().released == 1


def test_what_was_not_started_in_time_is_ended(ledger: Ledger, make_sweeper: Callable[..., Sweeper]) -> None:
    """At once: no grace is needed for what no worker has."""
    submit(ledger, expires_in_s=0)
    assert make_sweeper(ledger).sweep().expired == 1


# -- the broker -----------------------------------------------------------------------------------


def sent(valkey_url: str) -> set[str]:
    """Ids of the messages that wait in the broker."""
    with redis.Redis.from_url(valkey_url) as client:
        return RunwayView(client).waiting_ids(["comfy", "comfy@gpu1"])


def test_a_wiped_broker_is_filled_again_within_seconds(
    ledger: Ledger, valkey_url: str, make_sweeper: Callable[..., Sweeper]
) -> None:
    """FLUSHALL takes our epoch key along, so the next pass knows and sends everything again."""
    tasks = {submit(ledger).id for _ in range(2)}
    sweeper = make_sweeper(ledger)
    sweeper.sweep()
    assert sent(valkey_url) == tasks
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()

    swept = sweeper.sweep()

    assert (swept.sent_again, swept.relayed) == (2, 2)
    assert sent(valkey_url) == tasks


def test_a_restarted_broker_is_filled_again_within_seconds(
    ledger: Ledger, tmp_path: Path, make_sweeper: Callable[..., Sweeper]
) -> None:
    """Without persistence a restart forgets all messages; its ``run_id`` tells."""
    with services.start_valkey(tmp_path / "valkey") as own:
        tasks = {submit(ledger).id for _ in range(2)}
        sweeper = make_sweeper(ledger, own.url)
        sweeper.sweep()
        assert sent(own.url) == tasks
        own.kill()
        swept = sweeper.sweep()
        assert (swept.sent_again, swept.relayed) == (0, 0)
        own.restart()
        began = time.monotonic()

        def filled() -> bool:
            sweeper.sweep()
            return sent(own.url) == tasks

        wait_until(filled, 6.0)
        assert time.monotonic() - began < 4.0


def test_a_lost_message_is_sent_again_when_it_was_missing_twice(
    ledger: Ledger, valkey_url: str, make_sweeper: Callable[..., Sweeper]
) -> None:
    """A single message that vanished: overdue, and in no list; what is still there is left alone."""
    lost, there = submit(ledger), submit(ledger)
    sweeper = make_sweeper(ledger)
    sweeper.sweep()
    with redis.Redis.from_url(valkey_url) as client:
        client.rpop(queues.redis_key("comfy", 3))
    assert sent(valkey_url) == {there.id}
    # Six seconds later, without waiting for them.
    before = (
        f"dispatched_at - {int(OVERDUE_S * 1000) + 1000}"
        if not ledger.is_postgresql
        else f"dispatched_at - interval '{OVERDUE_S + 1} s'"
    )
    run_sql(ledger, f"UPDATE tasks SET dispatched_at = {before}")

    assert sweeper.sweep().sent_again == 0
    assert sweeper.sweep().sent_again == 1
    assert sent(valkey_url) == {lost.id, there.id}
    assert [sweeper.sweep().sent_again for _ in range(2)] == [0, 0]


def test_a_fresh_message_is_not_looked_for(ledger: Ledger, make_sweeper: Callable[..., Sweeper]) -> None:
    """Between being sent and being claimed it is in flight."""
    submit(ledger)
    ledger.take("comfy", 3, 1)
    sweeper = make_sweeper(ledger)
    assert [sweeper.sweep().sent_again for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("mode", ["refuse", "blackhole"])
def test_without_a_broker_the_sweeper_does_the_rest(
    ledger: Ledger,
    valkey_url: str,
    fault_proxy: Callable[[str], FaultProxy],
    make_sweeper: Callable[..., Sweeper],
    mode: Any,
) -> None:
    """It reaps and expires; what is pending goes out when the broker is back, and nothing is lost."""
    proxy = fault_proxy(valkey_url)
    sweeper = make_sweeper(ledger, proxy.url_of(valkey_url))
    steady(sweeper)
    proxy.set_mode(mode)
    held = hold(ledger, 1, lease_s=-1.0)
    waiting = submit(ledger)
    swept = sweeper.sweep()
    assert (swept.reaped, swept.relayed) == (1, 0)

    proxy.set_mode("pass")
    wait_until(lambda: sweeper.sweep().relayed, 4.0)
    wait_until(lambda: sent(valkey_url) == {held.task.id, waiting.id}, 4.0)
