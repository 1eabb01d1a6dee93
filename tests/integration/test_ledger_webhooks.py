"""Deliveries in the ledger: written with the state they announce, claimed by one, fenced, listed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import sqlalchemy as sa

from genpulse.errors import GenPulseError
from genpulse.ledger import Delivery, DeliveryStatus, Ledger
from genpulse.ledger import tables as t
from genpulse.model import Task, TaskStatus
from tests.support.ledger import OOM, at_once, claim, die, open_ledger, output, rows, run_sql, submit

HOOK = "https://Hooks.Example.com:8443/genpulse?a=b"


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """On both databases."""
    with open_ledger(ledger_url) as ledger:
        yield ledger


def hooked(ledger: Ledger, url: str = HOOK, **values: object) -> Task:
    """A pending task that wants to be announced."""
    return submit(ledger, callback_url=url, **values)


def ended(ledger: Ledger, url: str = HOOK, **values: object) -> Task:
    """The same, completed."""
    task = hooked(ledger, url, **values)
    ledger.finish(claim(ledger, task).fence, TaskStatus.COMPLETED, outputs=[output()])
    return task


def take(ledger: Ledger, **values: Any) -> Delivery | None:
    """What is due, for a minute."""
    return ledger.claim_delivery(**({"lease_s": 60, "per_host": 8, "per_owner": 16} | values))


def taken(ledger: Ledger, **values: Any) -> Delivery:
    """What must be due."""
    found = take(ledger, **values)
    assert found is not None
    return found


def is_due(ledger: Ledger, per_owner: int = 16) -> bool:
    """Whether anything may be tried."""
    return ledger.webhook_due(per_host=8, per_owner=per_owner)


def finish(status: TaskStatus) -> Callable[[Ledger, Task], object]:
    """End the task by its worker's own word."""
    error = OOM if status is TaskStatus.FAILED else None
    return lambda ledger, task: ledger.finish(claim(ledger, task).fence, status, error=error)


def cancel_running(ledger: Ledger, task: Task) -> None:
    """Cancel a running task, whose worker then ends it."""
    held = claim(ledger, task)
    ledger.cancel(task.id)
    ledger.finish(held.fence, TaskStatus.COMPLETED)


def cancel_handed_back(ledger: Ledger, task: Task) -> None:
    """Cancel a task whose worker is stopping."""
    held = claim(ledger, task)
    ledger.cancel(task.id)
    ledger.hand_back(held.fence, adopt_wait_s=None)


def expire(ledger: Ledger, task: Task) -> None:
    """Let its time run out before anybody begins."""
    run_sql(ledger, sa.update(t.tasks).where(t.tasks.c.id == task.id).values(expires_at=task.created_at))
    ledger.expire()


ENDS: dict[str, tuple[Callable[[Ledger, Task], object], str]] = {
    "completed": (finish(TaskStatus.COMPLETED), "task.completed"),
    "failed": (finish(TaskStatus.FAILED), "task.failed"),
    "last retry": (lambda ledger, task: ledger.retry_later(claim(ledger, task).fence, OOM, delay_s=0), "task.failed"),
    "canceled while waiting": (lambda ledger, task: ledger.cancel(task.id), "task.canceled"),
    "canceled while running": (cancel_running, "task.canceled"),
    "canceled while handed back": (cancel_handed_back, "task.canceled"),
    "expired": (expire, "task.failed"),
    "poison": (lambda ledger, task: die(ledger, claim(ledger, task), max_lost=0), "task.failed"),
}  # fmt: skip


@pytest.mark.parametrize(("end", "event"), ENDS.values(), ids=ENDS.keys())
def test_every_end_of_a_task_is_announced_once(
    ledger: Ledger, end: Callable[[Ledger, Task], object], event: str
) -> None:
    """Whatever ends it; a task without a callback is announced to nobody."""
    task, silent = hooked(ledger, max_attempts=1), submit(ledger, max_attempts=1)
    for each in (task, silent):
        end(ledger, each)

    (delivery,) = ledger.list_deliveries("ada")
    assert (delivery.task_id, delivery.event_type, delivery.url) == (task.id, event, HOOK)
    assert (delivery.status, delivery.tries, delivery.attempts) == (DeliveryStatus.PENDING, 0, 0)
    assert uuid.UUID(delivery.id).version == 7
    assert uuid.UUID(delivery.id).variant == uuid.RFC_4122
    assert abs((delivery.created_at - task.created_at).total_seconds()) < 60
    ledger.cancel(task.id)
    assert len(ledger.list_deliveries("ada")) == 1


def test_the_row_and_the_state_are_one_transaction(ledger: Ledger) -> None:
    """A transaction that fails after the state was written leaves neither."""
    task = hooked(ledger)
    held = claim(ledger, task)
    bad = dataclasses.replace(output(), sha256=cast("str", object()))
    with pytest.raises((GenPulseError, sa.exc.SQLAlchemyError, ValueError)):
        ledger.finish(held.fence, TaskStatus.COMPLETED, outputs=[bad])

    found = ledger.get(task.id)
    assert found is not None
    assert found.status is TaskStatus.PROCESSING
    assert ledger.list_deliveries("ada") == []


@pytest.mark.parametrize(
    ("url", "host"),
    [
        (HOOK, "hooks.example.com"),
        ("https://a.example", "a.example"),
        ("https://a.example:443", "a.example"),
        ("https://A.Example.:8443/x:1", "a.example"),
        ("https://192.0.2.10:443/x", "192.0.2.10"),
        ("https://a.example/x//y", "a.example"),
        ("https://a.example?x=/y", "a.example"),
        ("https://a.example#x", "a.example"),
        ("https://[2606:4700::1111]:8443/x", "[2606:4700::1111]"),
        ("https://[2606:4700::1111]", "[2606:4700::1111]"),
    ],
)
def test_the_host_of_a_callback_is_known(ledger: Ledger, url: str, host: str) -> None:
    """It limits how many tries one receiver can hold up, whatever its ports and however it is spelled."""
    ended(ledger, url)
    assert [row["host"] for row in rows(ledger, t.webhook_deliveries)] == [host]


def test_of_many_deliverers_one_gets_a_delivery(ledger: Ledger) -> None:
    """Each delivery goes to one of them, and none is left."""
    tasks = {ended(ledger, f"https://h{n}.example/").id for n in range(3)}
    found = [each for each in at_once(6, lambda _: take(ledger)) if each is not None]
    while len(found) < 3:  # those that met on one row may have left another for later
        found.append(taken(ledger))
    assert len(found) == 3
    assert {each.task_id for each in found} == tasks
    assert take(ledger) is None
    assert not is_due(ledger)


def test_a_receiver_that_hangs_holds_up_its_own_only(ledger: Ledger) -> None:
    """Beyond the cap of one host the next host's turn comes."""
    for _ in range(4):
        ended(ledger, "https://slow.example/x")
    other = ended(ledger, "https://quick.example/")
    assert [taken(ledger, per_host=2).url for _ in range(3)] == [
        "https://slow.example/x",
        "https://slow.example/x",
        "https://quick.example/",
    ]
    assert take(ledger, per_host=2) is None
    assert other.callback_url == "https://quick.example/"
    assert ledger.webhook_backlog().due == 2


def test_one_owner_has_only_so_many_tries_under_way(ledger: Ledger) -> None:
    """Whatever number of hosts they are for; another owner's turn comes meanwhile."""
    for n in range(4):
        ended(ledger, f"https://a{n}.eve.example/", owner="eve")
    first, _ = [taken(ledger, per_owner=2) for _ in range(2)]
    assert take(ledger, per_owner=2) is None
    assert not is_due(ledger, per_owner=2)

    ended(ledger)
    assert is_due(ledger, per_owner=2)
    assert taken(ledger, per_owner=2).owner == "ada"
    assert take(ledger, per_owner=2) is None
    ledger.record_delivery(first, DeliveryStatus.DELIVERED, duration_s=1, status_code=200)
    assert taken(ledger, per_owner=2).owner == "eve"


def test_the_bounds_hold_for_deliverers_that_claim_at_once(ledger: Ledger) -> None:
    """None of them sees the last place free that another one is taking."""
    owners = ["ada", "bob", "eve", "zoe"]
    for owner in owners:
        ended(ledger, "https://shared.example/", owner=owner)
    # Each would choose another owner's; a slow commit is what they might not see.
    sa.event.listen(ledger.engine, "commit", lambda _: time.sleep(0.2))
    found = at_once(4, lambda n: take(ledger, per_host=1, after_owner=["", *owners][n]))
    assert len([each for each in found if each is not None]) == 1


def test_a_long_backlog_is_its_owners_own(ledger: Ledger) -> None:
    """What another owner has due goes next, however many are due for longer."""
    for n in range(9):
        ended(ledger, f"https://a{n}.example/")
    taken(ledger)
    ended(ledger, owner="eve")
    assert taken(ledger).owner == "eve"
    assert [taken(ledger).owner for _ in range(3)] == ["ada"] * 3


def test_owners_take_turns_where_receivers_answer_at_once(ledger: Ledger) -> None:
    """With nothing under way at any claim, the one before them has no right to the next turn as well."""
    for n in range(4):
        for owner in ("ada", "bob", "eve"):
            ended(ledger, f"https://{owner}.example/{n}", owner=owner)
    turns: list[str] = []
    for _ in range(6):
        delivery = taken(ledger, after_owner=turns[-1] if turns else "")
        ledger.record_delivery(delivery, DeliveryStatus.DELIVERED, duration_s=0.1, status_code=200)
        turns.append(delivery.owner)
    assert turns == ["ada", "bob", "eve"] * 2


def test_of_an_owner_the_one_due_for_longest_goes_first(ledger: Ledger) -> None:
    """Their own deliveries keep their order."""
    tasks = [ended(ledger, f"https://h{n}.example/").id for n in range(3)]
    assert [taken(ledger).task_id for _ in range(3)] == tasks


def test_a_turn_is_found_by_the_index(sqlite_ledger_url: str) -> None:
    """A backlog of thousands is not read for it."""
    with open_ledger(sqlite_ledger_url) as ledger:
        asked: list[tuple[str, Any]] = []
        sa.event.listen(
            ledger.engine, "before_cursor_execute", lambda *event: asked.append((event[2], event[3]))
        )
        is_due(ledger)
        ((statement, parameters),) = [each for each in asked if "webhook_deliveries" in each[0]]
        with ledger.engine.connect() as connection:
            plan = [
                str(row[-1])
                for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            ]
    steps = [step for step in plan if "webhook_deliveries" in step]
    assert steps
    assert [step for step in steps if "INDEX" not in step] == []
    assert any("ix_webhook_deliveries_turn (owner=? AND next_at<?)" in step for step in steps), plan


def test_an_outcome_is_written_with_its_log(ledger: Ledger) -> None:
    """A failed try comes again when it is due; a good one ends it."""
    ended(ledger)
    first = taken(ledger)
    assert ledger.record_delivery(
        first,
        DeliveryStatus.PENDING,
        duration_s=0.25,
        status_code=500,
        error="x",
        excerpt="no",
        retry_in_s=60,
    )
    assert take(ledger) is None
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=61)
    second = take(ledger, at=later)
    assert second is not None
    assert (second.id, second.tries, second.attempts) == (first.id, 2, 2)
    assert ledger.record_delivery(second, DeliveryStatus.DELIVERED, duration_s=0.1, status_code=204, at=later)

    found = ledger.get_delivery(first.id, "ada")
    assert found is not None
    assert (found.status, found.next_at, found.ended_at is not None) == (DeliveryStatus.DELIVERED, None, True)
    assert [(each.number, each.status_code, each.error, each.excerpt) for each in found.log] == [
        (1, 500, "x", "no"),
        (2, 204, None, None),
    ]
    assert take(ledger, at=later + dt.timedelta(days=2)) is None


def test_a_deliverer_that_died_leaves_the_delivery_due_again(ledger: Ledger) -> None:
    """Under the same id; the log says that somebody vanished, and the dead one's word counts no more."""
    ended(ledger)
    dead = taken(ledger)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=61)
    assert take(ledger, at=later - dt.timedelta(seconds=10)) is None
    heir = take(ledger, at=later)
    assert heir is not None
    assert (heir.id, heir.attempts) == (dead.id, 2)

    assert not ledger.record_delivery(dead, DeliveryStatus.DELIVERED, duration_s=1)
    assert ledger.record_delivery(heir, DeliveryStatus.DELIVERED, duration_s=1, status_code=200)
    found = ledger.get_delivery(dead.id, "ada")
    assert found is not None
    assert [each.error is not None for each in found.log] == [True, False]


def test_a_delivery_is_sent_again_when_asked(ledger: Ledger) -> None:
    """With its id and from the schedule's start; not while it is being tried, and only to its owner."""
    ended(ledger)
    first = taken(ledger)
    during = ledger.redeliver(first.id, "ada")
    assert during is not None
    assert take(ledger) is None
    ledger.record_delivery(first, DeliveryStatus.GONE, duration_s=0.1, status_code=410)

    assert ledger.redeliver(first.id, "eve") is None
    assert take(ledger) is None
    assert ledger.redeliver(str(uuid.uuid4()), "ada") is None
    again = ledger.redeliver(first.id, "ada")
    assert again is not None
    assert (again.status, again.tries, again.attempts) == (DeliveryStatus.PENDING, 0, 1)
    assert taken(ledger).id == first.id


def test_the_list_is_the_owners_and_goes_on_where_it_ended(ledger: Ledger) -> None:
    """Newest first, by status and task, without gaps or repeats."""
    tasks = [ended(ledger) for _ in range(5)]
    ended(ledger, owner="eve")
    everything = ledger.list_deliveries("ada")
    assert sorted((each.task_id for each in everything), reverse=True) == sorted(
        (task.id for task in tasks), reverse=True
    )
    assert [each.id for each in everything] == sorted((each.id for each in everything), reverse=True)

    paged: list[str] = []
    for _ in itertools.count():
        page = ledger.list_deliveries("ada", limit=2, before_id=paged[-1] if paged else None)
        if not page:
            break
        paged += [each.id for each in page]
    assert paged == [each.id for each in everything]
    assert [each.task_id for each in ledger.list_deliveries("ada", task_id=tasks[2].id)] == [tasks[2].id]
    assert ledger.list_deliveries("ada", status=DeliveryStatus.DELIVERED) == []
    assert ledger.get_delivery(everything[0].id, "eve") is None


def test_deliveries_go_with_their_task(ledger: Ledger) -> None:
    """Who deletes a task wants to hear no more of it."""
    task = ended(ledger)
    taken(ledger)
    run_sql(ledger, sa.delete(t.tasks).where(t.tasks.c.id == task.id))
    assert rows(ledger, t.webhook_deliveries) == []
    assert rows(ledger, t.webhook_attempts) == []
