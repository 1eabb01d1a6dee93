"""Batches and lists in the ledger, on both databases."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from genpulse.ledger import IdempotencyConflict, Ledger, Shared, SourceGone, lists, new_id
from genpulse.ledger import tables as t
from genpulse.model import NewTask, Priority, TaskStatus
from tests.support.ledger import at_once, claim, open_ledger, row_of, rows, run_sql, submit

PENDING, PROCESSING, COMPLETED = TaskStatus.PENDING, TaskStatus.PROCESSING, TaskStatus.COMPLETED
FAILED, CANCELED = TaskStatus.FAILED, TaskStatus.CANCELED


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """An empty ledger."""
    with open_ledger(ledger_url, pool_size=4) as found:
        yield found


def new(n: int = 0, **values: Any) -> NewTask:
    """A task of a batch: one workflow for all, and a number of its own."""
    given: dict[str, Any] = {
        "task_type": "comfyui",
        "queue": "comfy",
        "params": {"workflow": {"1": "node"}, "inputs": {"seed": n, "same": "x"}},
        "owner": "ada",
    }
    return NewTask(**given | values)


def test_a_batch_is_recorded_as_a_whole(ledger: Ledger) -> None:
    """Each task is one like any other, with an id in the order of the request and its own settings."""
    batch, replayed = ledger.submit_batch(
        [
            new(0, priority=Priority.HIGH, expires_in_s=60),
            new(1, metadata={"k": "v"}, callback_url="https://example.org/"),
            *(new(n) for n in range(2, 1000)),
        ]
    )

    tasks = ledger.batch_tasks(batch.id, "ada", limit=2000)
    assert (replayed, batch.size, batch.status, batch.counts[PENDING]) == (False, 1000, PENDING, 1000)
    assert [task.params["inputs"] for task in tasks] == [{"seed": n, "same": "x"} for n in range(1000)]
    assert [task.id for task in tasks] == sorted(task.id for task in tasks)
    assert [task.batch_index for task in tasks] == list(range(1000))
    assert (tasks[0].priority, tasks[1].priority) == (Priority.HIGH, Priority.NORMAL)
    assert tasks[0].expires_at is not None
    assert (tasks[1].expires_at, tasks[1].metadata) == (None, {"k": "v"})
    assert tasks[1].callback_url == "https://example.org/"
    assert ledger.queue_position(tasks[999]) == 1000
    assert ledger.batch_tasks(batch.id, "bob") == []


def test_a_worker_gets_the_whole_params(ledger: Ledger) -> None:
    """What the batch keeps for its tasks is put together again by claim, a repeated claim and a read."""
    batch, _ = ledger.submit_batch([new(1), new(2)])
    task_id = ledger.batch_task_ids(batch.id, "ada")[1]
    whole = new(2).params

    first = claim(ledger, task_id, claim="token")
    again = claim(ledger, task_id, claim="token")

    assert row_of(ledger, task_id)["params"] == {"inputs": {"seed": 2}}
    assert first.task.params == again.task.params == whole
    found = ledger.get(task_id)
    assert found is not None
    assert found.params == whole


def test_all_or_nothing(ledger: Ledger) -> None:
    """One task names a file that is gone: none is recorded, and no batch and no key either."""
    gone = frozenset({"00000000-0000-7000-8000-000000000000"})

    with pytest.raises(SourceGone):
        ledger.submit_batch([new(1), new(2, assets=gone)], idempotency_key="k")

    assert not rows(ledger, t.tasks)
    assert not rows(ledger, t.batches)
    assert not rows(ledger, t.idempotency_keys)


def test_many_callers_with_one_key_get_one_batch(ledger: Ledger) -> None:
    """Key and batch are one transaction."""
    found = at_once(4, lambda _: ledger.submit_batch([new(1), new(2)], idempotency_key="k", body_hash="h"))

    assert len({batch.id for batch, _ in found}) == 1
    assert sorted(replayed for _, replayed in found) == [False, True, True, True]
    assert len(rows(ledger, t.tasks)) == 2


def test_a_key_is_for_one_thing(ledger: Ledger) -> None:
    """A key of a batch makes no task, a key of a task no batch, and neither another body."""
    ledger.submit_batch([new()], idempotency_key="batch", body_hash="h")
    ledger.submit(new(), idempotency_key="task", body_hash="h")

    for key, body_hash in (("batch", "other"), ("task", "h")):
        with pytest.raises(IdempotencyConflict):
            ledger.submit_batch([new()], idempotency_key=key, body_hash=body_hash)
    with pytest.raises(IdempotencyConflict):
        ledger.submit(new(), idempotency_key="batch", body_hash="h")


def test_the_state_of_a_batch_is_that_of_its_tasks(ledger: Ledger) -> None:
    """Pending, then processing until the last is final; then the worst that happened."""
    batch_id = ledger.submit_batch([new(n) for n in range(3)])[0].id
    first, second, third = ledger.batch_task_ids(batch_id, "ada")

    def now() -> tuple[Any, ...]:
        found = ledger.get_batch(batch_id, "ada")
        assert found is not None
        return found.status, found.progress, found.ended_at is not None

    seen = [now()]
    fence = claim(ledger, first).fence
    seen.append(now())
    ledger.finish(fence, COMPLETED)
    seen.append(now())
    ledger.cancel(second)
    ledger.finish(claim(ledger, third).fence, FAILED)
    seen.append(now())

    assert seen == [
        (PENDING, 0.0, False),
        (PROCESSING, 0.0, False),
        (PROCESSING, 33.3, False),
        (FAILED, 100.0, True),
    ]
    assert ledger.get_batch(batch_id, "bob") is None


def test_canceling_ends_what_waits_and_stops_what_runs(ledger: Ledger) -> None:
    """Final tasks stay as they are; safe to repeat; another owner cannot."""
    batch_id = ledger.submit_batch([new(n) for n in range(4)])[0].id
    done, running, *_ = ledger.batch_task_ids(batch_id, "ada")
    ledger.finish(claim(ledger, done).fence, COMPLETED)
    held = claim(ledger, running)
    other = submit(ledger)

    assert ledger.cancel_batch(batch_id, "bob") is None
    found = [ledger.cancel_batch(batch_id, "ada") for _ in range(2)]

    for batch in found:
        assert batch is not None
        assert (batch.counts[COMPLETED], batch.counts[PROCESSING], batch.counts[CANCELED]) == (1, 1, 2)
        assert batch.stopping == 1
    assert ledger.renew([held.fence.claim], 15)[held.fence.claim].cancel
    assert row_of(ledger, other)["status"] == PENDING
    assert ledger.finish(held.fence, COMPLETED) is CANCELED


def test_a_batch_goes_when_its_last_task_is_gone(ledger: Ledger) -> None:
    """Deleted tasks are in no count; the empty batch is tidied away, and its key with it."""
    batch_id = ledger.submit_batch([new(1), new(2)], idempotency_key="k")[0].id
    first, second = ledger.batch_task_ids(batch_id, "ada")
    run_sql(ledger, sa.update(t.batches).values(created_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC)))
    ledger.cancel_batch(batch_id)

    ledger.delete_task(first)
    assert ledger.forget_empty_batches() == 0
    found = ledger.get_batch(batch_id)
    assert found is not None
    assert (found.size, sum(found.counts.values()), found.status) == (2, 1, CANCELED)
    ledger.delete_task(second)
    assert ledger.forget_empty_batches() == 1
    assert ledger.get_batch(batch_id) is None
    assert not rows(ledger, t.idempotency_keys)


def test_a_retry_of_a_batchs_task_stands_alone(ledger: Ledger) -> None:
    """What a retry in bulk reads has the whole params."""
    batch_id = ledger.submit_batch([new(1), new(2)])[0].id
    ledger.finish(claim(ledger, ledger.batch_task_ids(batch_id, "ada")[1]).fence, FAILED)

    (source,) = ledger.retry_sources(ledger.retryable("ada"), {}, max_bytes=10**6)

    assert source is not None
    assert source.task.params == new(2).params


def test_what_a_batch_keeps_is_read_once_for_all_that_are_sent_again(ledger: Ledger) -> None:
    """The very same objects, over several readings; each reading is bounded, and ends with at least one."""
    batch_id = ledger.submit_batch([new(n) for n in range(4)])[0].id
    ids = ledger.batch_task_ids(batch_id, "ada")
    other = submit(ledger, params={"text": "x" * 1000})
    gone = new_id()
    known: dict[str, Shared] = {}

    first = ledger.retry_sources([*ids[:2], gone, ids[2], other.id, ids[3]], known, max_bytes=900)
    rest = ledger.retry_sources([other.id, ids[3]], known, max_bytes=900)

    assert [source and source.task.id for source in first] == [*ids[:2], None, ids[2]]
    assert [source and source.task.id for source in rest] == [other.id]
    (shared,) = known.values()
    tasks = [source.task for source in first if source is not None]
    assert [task.params for task in tasks] == [new(n).params for n in range(3)]
    assert all(task.params["workflow"] is shared.params["workflow"] for task in tasks)


def test_retries_use_what_the_batch_keeps_and_are_none_of_it(ledger: Ledger) -> None:
    """They are claimed and read whole, also when the batch's own tasks are all deleted."""
    batch_id = ledger.submit_batch([new(n) for n in range(2)])[0].id
    ids = ledger.batch_task_ids(batch_id, "ada")
    run_sql(ledger, sa.update(t.batches).values(created_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC)))
    ledger.cancel_batch(batch_id)
    sources = ledger.retry_sources(ids, {}, max_bytes=10**6)
    retries = []
    for source in sources:
        assert source is not None
        assert source.shared is not None
        own = source.shared.rest_of(source.task.params)
        assert own is not None
        assert "workflow" not in own
        retries.append(new(retry_of=source.task.id, params=own, params_of=batch_id))
    made = [task.id for task in ledger.retry_all(retries)]

    assert ledger.batch_task_ids(batch_id, "ada") == ids
    assert every(ledger, batch_id=batch_id) == ids[::-1]
    found = ledger.get_batch(batch_id)
    assert found is not None
    assert found.counts[PENDING] == 0
    for task_id in ids:
        ledger.delete_task(task_id)
    assert ledger.forget_empty_batches() == 0
    for number, task_id in enumerate(made):
        held = claim(ledger, task_id)
        assert held.task.params == new(number).params
        assert (held.task.batch_id, held.task.batch_index) == (None, None)
        ledger.finish(held.fence, FAILED)
        assert narrow_and_whole(ledger, task_id) == ({}, new(number).params)
    (again, _) = ledger.retry_sources(ledger.retryable("ada"), {}, max_bytes=10**6)
    assert again is not None
    assert again.task.params == new(0).params  # a retry of a retry
    for task_id in made:
        ledger.delete_task(task_id)
    assert ledger.forget_empty_batches() == 1


def narrow_and_whole(ledger: Ledger, task_id: str) -> tuple[Any, Any]:
    """A task's params, as somebody reads them who does not need them, and who does."""
    narrow, whole = ledger.get(task_id, with_params=False), ledger.get(task_id)
    assert narrow is not None
    assert whole is not None
    assert (narrow.status, narrow.attempts) == (whole.status, whole.attempts)
    return narrow.params, whole.params


# -- lists --------------------------------------------------------------------------------------


def every(ledger: Ledger, **filters: Any) -> list[str]:
    """All ids of a list, by small pages."""
    found: list[str] = []
    before: str | None = None
    for _ in range(100):
        page, before = ledger.list_tasks("ada", before_id=before, **{"limit": 2} | filters)
        found += [task.id for task in page]
        if before is None:
            return found
    raise AssertionError


def test_every_combination_of_filters_is_right(ledger: Ledger) -> None:
    """Held against the plain rule, newest first, over pages."""
    made = []
    for number in range(24):
        kind = ("comfyui", "image-convert")[number % 2]
        labels = {"mod": str(number % 3)} | ({"even": "yes"} if number % 2 == 0 else {})
        task = submit(ledger, task_type=kind, metadata=labels)
        if number % 4 == 0:
            ledger.cancel(task.id)
        made.append((task.id, kind, labels, CANCELED if number % 4 == 0 else PENDING))
    submit(ledger, owner="bob", metadata={"mod": "1"})

    for statuses in ((), (CANCELED,), (CANCELED, PENDING), (FAILED,)):
        for only in (None, "comfyui"):
            for labels in ({}, {"mod": "1"}, {"mod": "2", "even": "yes"}, {"mod": "9"}):
                expected = [
                    task_id
                    for task_id, its_kind, its_labels, status in reversed(made)
                    if (not statuses or status in statuses)
                    and only in {None, its_kind}
                    and labels.items() <= its_labels.items()
                ]
                found = every(ledger, statuses=statuses, task_type=only, labels=labels)
                assert found == expected, (statuses, only, labels)


def test_a_batchs_tasks_can_be_listed_and_filtered(ledger: Ledger) -> None:
    """Its failed ones, for example."""
    batch_id = ledger.submit_batch([new(n, metadata={"n": str(n)}) for n in range(5)])[0].id
    submit(ledger)
    ids = ledger.batch_task_ids(batch_id, "ada")
    ledger.cancel(ids[3])

    assert every(ledger, batch_id=batch_id) == ids[::-1]
    assert every(ledger, batch_id=batch_id, statuses=[CANCELED]) == [ids[3]]
    assert every(ledger, batch_id=batch_id, labels={"n": "1"}) == [ids[1]]
    assert ledger.list_tasks("bob", batch_id=batch_id).tasks == []


def test_the_time_of_creation_is_a_filter_from_both_sides(ledger: Ledger) -> None:
    """By the ledger's clock; the bounds themselves are out."""
    tasks = [submit(ledger) for _ in range(3)]
    for number, task in enumerate(tasks):
        at = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC) + dt.timedelta(seconds=number)
        run_sql(ledger, sa.update(t.tasks).where(t.tasks.c.id == task.id).values(created_at=at))
    middle = dt.datetime(2026, 1, 1, 12, 0, 1, tzinfo=dt.UTC)
    second = dt.timedelta(seconds=1)

    assert every(ledger, created_after=middle - 2 * second) == [task.id for task in reversed(tasks)]
    # Ids say now, so that nothing made a day after the bound or later is looked at.
    today = tasks[1].created_at
    for task in tasks:
        run_sql(ledger, sa.update(t.tasks).where(t.tasks.c.id == task.id).values(created_at=today))
    assert every(ledger, created_after=today - second, created_before=today + second) == [
        task.id for task in reversed(tasks)
    ]
    assert every(ledger, created_before=today) == []
    assert every(ledger, created_after=today) == []
    year = dt.datetime(1, 1, 2, tzinfo=dt.UTC)
    assert every(ledger, created_before=year) == []
    assert every(ledger, created_after=dt.datetime(9999, 12, 30, tzinfo=dt.UTC)) == []


def test_no_page_looks_at_more_than_the_bound(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter that leaves little gives short and empty pages, whose cursors lead through all the same."""
    monkeypatch.setattr(lists, "SCANNED", 4)
    monkeypatch.setattr(lists, "_AT_A_TIME", 2)
    wanted = submit(ledger, task_type="image-convert")
    for _ in range(9):
        submit(ledger)
    statements: list[Any] = []
    sa.event.listen(ledger.engine, "before_cursor_execute", lambda *given: statements.append(given))

    page, more = ledger.list_tasks("ada", task_type="image-convert")

    assert (page, more is not None) == ([], True)
    assert len([each for each in statements if "SELECT" in str(each[2])]) == 2
    assert every(ledger, task_type="image-convert") == [wanted.id]


def test_a_list_reads_no_params(ledger: Ledger) -> None:
    """A page of tasks with large workflows would be megabytes that nobody asked for."""
    submit(ledger, params={"big": "x"})

    assert ledger.list_tasks("ada").tasks[0].params == {}


def test_deleting_a_task_takes_its_labels_along(ledger: Ledger) -> None:
    """The index of the metadata holds nothing that is gone."""
    task = submit(ledger, metadata={"k": "v"})
    ledger.cancel(task.id)

    ledger.delete_task(task.id)

    assert not rows(ledger, t.task_labels)
