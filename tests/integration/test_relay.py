"""The relay: from the outbox to the broker's runway, whatever state the broker is in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.ledger import tables as t
from genpulse.model import Priority, Task, TaskStatus
from genpulse.tasks import queues, schedule
from genpulse.tasks.producer import Producer, RunwayView
from genpulse.tasks.relay import Relay, live_slots
from genpulse.testing.services import FaultProxy
from tests.support import wait_until
from tests.support.ledger import claim, open_ledger, prompt, row_of, rows, submit


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone."""
    with open_ledger(ledger_url, pool_size=2) as found:
        yield found


def make_relay(ledger: Ledger, redis_url: str, timeout_s: float = 0.5) -> Relay:
    """A relay with a producer of its own."""
    return Relay(ledger, Producer(Settings.build(redis_url=redis_url), timeout_s=timeout_s))


def in_redis(valkey_url: str, *names: str) -> set[str]:
    """Ids of the messages that wait in the broker."""
    with redis.Redis.from_url(valkey_url) as client:
        return RunwayView(client).waiting_ids(names or ("comfy", "cpu"))


def register(ledger: Ledger, *, slots: int, servers: tuple[str, ...] = (), consuming: bool = True) -> None:
    """A live worker of the queue comfy."""
    ledger.register_worker(
        name=f"w-{slots}@host",
        host="host",
        pid=1,
        queues=["comfy", *(f"comfy@{name}" for name in servers)],
        servers=[{"name": name, "healthy": True, "reason": ""} for name in servers],
        slots=slots,
        consuming=consuming,
        session_key=1,
        version="1",
    )


# -- which, and how many --------------------------------------------------------------------------


def test_higher_priority_goes_first_then_the_older(ledger: Ledger) -> None:
    """Whatever the order in which they came."""
    low, normal, older, high = (
        submit(ledger, priority=priority)
        for priority in (Priority.LOW, Priority.NORMAL, Priority.NORMAL, Priority.HIGH)
    )

    batch = schedule.next_batch(ledger, {"comfy": 10}, [])

    assert [each.task_id for each in batch] == [task.id for task in (high, normal, older, low)]


@pytest.mark.parametrize(("slots", "expected"), [({}, 2), ({"comfy": 1}, 2), ({"comfy": 5}, 5)])
def test_the_runway_is_one_message_a_slot_and_two_at_least(
    ledger: Ledger, slots: dict[str, int], expected: int
) -> None:
    """The rest of the backlog waits in the ledger; a second look adds nothing."""
    for _ in range(8):
        submit(ledger)

    assert len(schedule.next_batch(ledger, slots, [])) == expected
    assert schedule.next_batch(ledger, slots, []) == []


def test_a_claim_makes_room(ledger: Ledger) -> None:
    """What runs is no more on the runway."""
    tasks = [submit(ledger) for _ in range(4)]
    schedule.next_batch(ledger, {}, [])
    claim(ledger, tasks[0])

    assert [each.task_id for each in schedule.next_batch(ledger, {}, [])] == [tasks[2].id]


def test_a_full_runway_does_not_hold_up_the_more_urgent(ledger: Ledger) -> None:
    """A higher priority exceeds the bound; a lower one waits behind all of it."""
    for _ in range(3):
        submit(ledger, priority=Priority.NORMAL)
    schedule.next_batch(ledger, {}, [])
    submit(ledger, priority=Priority.LOW)
    urgent = [submit(ledger, priority=Priority.HIGH) for _ in range(3)]

    assert [each.task_id for each in schedule.next_batch(ledger, {}, [])] == [task.id for task in urgent[:2]]
    assert ledger.runway() == {"comfy": {0: 2, 3: 2}}


def test_queues_have_runways_of_their_own(ledger: Ledger) -> None:
    """Long work on one does not hold up the other."""
    for queue in ("comfy", "cpu"):
        for _ in range(3):
            submit(ledger, queue=queue)
    schedule.next_batch(ledger, {}, [])
    assert ledger.runway() == {"comfy": {3: 2}, "cpu": {3: 2}}


def test_relays_at_once_do_not_exceed_the_runway_by_much_and_send_nothing_twice(ledger_url: str) -> None:
    """Each counts before it takes; at worst each adds one runway's length."""
    with open_ledger(ledger_url) as ledger:
        for _ in range(30):
            submit(ledger)
    batches: list[list[str]] = []

    def run() -> None:
        with open_ledger(ledger_url) as own:
            batches.append([each.task_id for each in schedule.next_batch(own, {"comfy": 3}, [])])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = [task_id for batch in batches for task_id in batch]
    assert len(sent) == len(set(sent))
    assert 3 <= len(sent) <= 12


def test_slots_count_where_a_worker_consumes(ledger: Ledger) -> None:
    """One that paused for want of a server, or drains, adds none; server queues count for nothing."""
    register(ledger, slots=2, servers=("gpu1",))
    register(ledger, slots=3, consuming=False)
    assert live_slots(ledger.workers()) == {"comfy": 2}


# -- sending --------------------------------------------------------------------------------------


def test_what_is_sent_lies_in_its_queue_by_priority(ledger: Ledger, valkey_url: str) -> None:
    """And is marked in the ledger as sent."""
    normal, high = submit(ledger), submit(ledger, priority=Priority.HIGH)
    small = submit(ledger, queue="cpu", task_type="image-convert")

    assert make_relay(ledger, valkey_url).pulse() == 3

    with redis.Redis.from_url(valkey_url) as client:
        for task, queue, step in ((normal, "comfy", 3), (high, "comfy", 0), (small, "cpu", 3)):
            (message,) = client.lrange(queues.redis_key(queue, step), 0, -1)
            assert task.id in message.decode()
    assert make_relay(ledger, valkey_url).pulse() == 0


def test_a_bound_task_goes_to_the_queue_of_its_server(ledger: Ledger, valkey_url: str) -> None:
    """As soon as a live worker serves it, and before all that never ran, however low its priority."""
    task = submit(ledger, priority=Priority.LOW)
    held = claim(ledger, task)
    prompt(ledger, held, "gpu1")
    ledger.hand_back(held.fence, adopt_wait_s=60)
    relay = make_relay(ledger, valkey_url)

    assert relay.pulse() == 0
    register(ledger, slots=2, servers=("gpu1",))
    wait_until(relay.pulse, 3.0)

    assert in_redis(valkey_url, "comfy") == set()
    with redis.Redis.from_url(valkey_url) as client:
        (message,) = client.lrange(queues.redis_key("comfy@gpu1", 0), 0, -1)
    assert task.id in message.decode()


@pytest.mark.parametrize("mode", ["refuse", "blackhole", "reset"])
def test_a_broker_that_takes_nothing_gets_nothing_lost(
    ledger: Ledger, valkey_url: str, fault_proxy: Callable[[str], FaultProxy], mode: Any
) -> None:
    """The batch is put back in its order, and goes when the broker is there again, in seconds."""
    proxy = fault_proxy(valkey_url)
    relay = make_relay(ledger, proxy.url_of(valkey_url))
    tasks = [submit(ledger) for _ in range(2)]
    proxy.set_mode(mode)

    for _ in range(3):
        assert relay.pulse() == 0
        assert [row["dispatched_at"] for row in rows(ledger, t.tasks)] == [None, None]

    proxy.set_mode("pass")
    wait_until(relay.pulse, 4.0)
    assert {task.id for task in tasks} <= in_redis(valkey_url)


def test_a_broker_that_is_away_is_left_alone_for_a_moment(
    ledger: Ledger, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Each failed attempt holds a thread for its time-out, so they become fewer, but never rare."""
    proxy = fault_proxy(valkey_url)
    relay = make_relay(ledger, proxy.url_of(valkey_url))
    submit(ledger)
    proxy.set_mode("refuse")
    relay.pulse()
    began = time.monotonic()
    assert relay.pulse() == 0
    assert time.monotonic() - began < 0.1
    proxy.set_mode("pass")
    relay.resume()
    assert relay.pulse() == 1


def test_while_the_broker_is_a_black_hole_requests_are_quick(
    ledger_url: str, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """No transaction is open while Redis is spoken to: another connection writes meanwhile."""
    proxy = fault_proxy(valkey_url)
    proxy.set_mode("blackhole")
    with open_ledger(ledger_url) as own, open_ledger(ledger_url, pool_size=1) as other:
        relay = make_relay(own, proxy.url_of(valkey_url), timeout_s=3.0)
        submit(other)
        thread = threading.Thread(target=relay.pulse)
        thread.start()
        wait_until(lambda: proxy.accepted, 5.0)
        taken: list[float] = []
        accepted: list[Task] = []
        while thread.is_alive() and len(taken) < 20:
            began = time.monotonic()
            accepted.append(submit(other))
            assert other.cancel(accepted[-1].id) is not None
            taken.append(time.monotonic() - began)
        during = len(taken)
        thread.join(20)

        assert during >= 5, "the relay was not waiting for the broker any more"
        assert sorted(taken)[len(taken) // 2] < 1.0
        assert max(taken) < 2.5


def test_a_task_that_is_being_sent_can_be_canceled_at_once(
    ledger: Ledger, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Not even its own row is held while the broker hangs."""
    proxy = fault_proxy(valkey_url)
    proxy.set_mode("blackhole")
    task = submit(ledger)
    relay = make_relay(ledger, proxy.url_of(valkey_url), timeout_s=3.0)
    thread = threading.Thread(target=relay.pulse)
    thread.start()
    wait_until(lambda: proxy.accepted, 5.0)

    canceled = ledger.cancel(task.id)
    waits_for_the_broker = thread.is_alive()
    proxy.set_mode("pass")
    thread.join(20)

    assert canceled is not None
    assert canceled.status is TaskStatus.CANCELED
    assert waits_for_the_broker, "the cancel had to wait for the relay"


def test_a_relay_that_dies_after_taking_loses_nothing(ledger: Ledger, valkey_url: str) -> None:
    """Its rows look sent; the sweeper compares and finds them."""
    task = submit(ledger)
    schedule.next_batch(ledger, {}, [])
    time.sleep(0.01)

    assert [each.task_id for each in ledger.overdue(0.0)] == [task.id]
    assert in_redis(valkey_url) == set()
    assert row_of(ledger, task)["status"] == TaskStatus.PENDING
