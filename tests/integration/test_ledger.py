"""What each verb of the ledger promises, on PostgreSQL and on SQLite."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import IdempotencyConflict, Ledger, StaleLease, Stray, new_id
from genpulse.ledger import tables as t
from genpulse.model import (
    AttemptOutcome,
    Claim,
    Fence,
    NewTask,
    Priority,
    Task,
    TaskStatus,
)
from genpulse.testing.services import FaultProxy
from tests.support import wait_until
from tests.support.ledger import (
    OOM,
    at_once,
    claim,
    die,
    open_ledger,
    output,
    prompt,
    row_of,
    rows,
    run_sql,
    submit,
    try_claim,
)
from tests.support.pooler import refusing_options

PENDING, PROCESSING = TaskStatus.PENDING, TaskStatus.PROCESSING
COMPLETED, FAILED, CANCELED = TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELED


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone."""
    with open_ledger(ledger_url, pool_size=2) as found:
        yield found


def see(ledger: Ledger, task: Task | str) -> Task:
    """The task as it is now."""
    found = ledger.get(task if isinstance(task, str) else task.id)
    assert found is not None
    return found


def outcomes(ledger: Ledger, task: Task) -> list[str | None]:
    """How the attempts ended, oldest first."""
    return [each.outcome and each.outcome.value for each in see(ledger, task).attempts]


def make_due(ledger: Ledger, task: Task) -> None:
    """The wait before the next attempt is over."""
    run_sql(
        ledger, sa.update(t.tasks).where(t.tasks.c.id == task.id).values(available_at=t.tasks.c.created_at)
    )


def everything(ledger: Ledger) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, to see that nothing changed."""
    return {
        table.name: sorted(tuple(map(repr, row.values())) for row in rows(ledger, table))
        for table in t.metadata.sorted_tables
    }


# -- submit ---------------------------------------------------------------------------------------


def test_a_submitted_task_is_pending_and_reads_back_as_it_was_given(ledger: Ledger) -> None:
    """Nothing of a request is lost or changed on its way through the table."""
    new = NewTask(
        task_type="comfyui",
        queue="comfy",
        params={"workflow": {"1": {"inputs": {"text": "naïve ☃ \u0001"}}}, "big": 2**53, "none": None},
        owner="ada",
        priority=Priority.HIGH,
        timeout_s=7,
        expires_in_s=60,
        max_attempts=5,
        callback_url="https://example.org/hook",
        metadata={"job": "7"},
    )

    task, replayed = ledger.submit(new)

    assert not replayed
    assert see(ledger, task) == task
    assert (task.status, task.attempt, task.priority) == (PENDING, 0, Priority.HIGH)
    assert (task.params, task.metadata, task.max_attempts) == (new.params, new.metadata, 5)
    assert task.expires_at is not None
    assert task.expires_at - task.created_at == dt.timedelta(seconds=60)
    assert task.created_at.tzinfo is dt.UTC


def test_the_same_key_and_body_give_the_same_task(ledger: Ledger) -> None:
    """A caller that lost the answer sends again and learns the first task, in its present state."""
    new = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")
    first, _ = ledger.submit(new, idempotency_key="k", body_hash="h")
    ledger.cancel(first.id)

    again, replayed = ledger.submit(new, idempotency_key="k", body_hash="h")

    assert (again.id, again.status, replayed) == (first.id, CANCELED, True)
    assert len(rows(ledger, t.tasks)) == 1


def test_the_same_key_with_another_body_is_a_conflict_and_records_nothing(ledger: Ledger) -> None:
    """Answering with the first task would hide that the second one was never accepted."""
    new = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")
    ledger.submit(new, idempotency_key="k", body_hash="h")

    with pytest.raises(IdempotencyConflict):
        ledger.submit(new, idempotency_key="k", body_hash="other")

    assert len(rows(ledger, t.tasks)) == 1


def test_keys_belong_to_their_owner(ledger: Ledger) -> None:
    """Two owners may choose the same key."""
    for owner in ("ada", "bob"):
        _, replayed = ledger.submit(
            NewTask(task_type="comfyui", queue="comfy", params={}, owner=owner),
            idempotency_key="k",
            body_hash="h",
        )
        assert not replayed


def test_many_callers_at_once_with_one_key_make_one_task(ledger: Ledger) -> None:
    """Key and task are one transaction: one caller records, the others get its task."""
    new = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")
    for round_ in range(5):
        answers = at_once(
            8,
            lambda _, key=f"k{round_}": ledger.submit(new, idempotency_key=key, body_hash="h"),  # type: ignore[misc]  # bound now
        )
        assert len({task.id for task, _ in answers}) == 1
        assert sorted(replayed for _, replayed in answers) == [False] + [True] * 7
    assert len(rows(ledger, t.tasks)) == 5


def test_many_callers_at_once_with_an_expired_key_make_one_new_task(ledger: Ledger) -> None:
    """An old key is free again, for exactly one of them."""
    new = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")
    old, _ = ledger.submit(new, idempotency_key="k", body_hash="h", idempotency_ttl_s=-1)

    answers = at_once(8, lambda _: ledger.submit(new, idempotency_key="k", body_hash="h"))

    (found,) = {task.id for task, _ in answers}
    assert found != old.id


def test_expired_keys_are_forgotten_and_fresh_ones_kept(ledger: Ledger) -> None:
    """The table does not grow for ever."""
    new = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")
    ledger.submit(new, idempotency_key="old", body_hash="h", idempotency_ttl_s=-1)
    ledger.submit(new, idempotency_key="new", body_hash="h")

    assert ledger.forget_expired_keys() == 1
    assert [row["key"] for row in rows(ledger, t.idempotency_keys)] == ["new"]


# -- reading --------------------------------------------------------------------------------------


def test_somebody_elses_task_is_unknown(ledger: Ledger) -> None:
    """Reading and canceling with another owner finds nothing and changes nothing."""
    task = submit(ledger)

    assert ledger.get(task.id, "bob") is None
    assert ledger.cancel(task.id, "bob") is None
    assert ledger.get(new_id()) is None
    assert ledger.cancel(new_id()) is None
    assert see(ledger, task).status is PENDING


def test_pages_neither_skip_nor_repeat_while_new_tasks_arrive(ledger: Ledger) -> None:
    """The keyset is the last id of the page before, and ids are in order of time."""
    ids = [submit(ledger).id for _ in range(10)]
    submit(ledger, owner="bob")
    seen: list[str] = []
    before = None
    while True:
        page, before = ledger.list_tasks("ada", before_id=before, limit=3)
        seen += [task.id for task in page]
        submit(ledger)
        if before is None:
            break

    assert seen == ids[::-1]


def test_the_list_filters(ledger: Ledger) -> None:
    """By status, type and time, newest first."""
    first, second, third = (
        submit(ledger, task_type=kind) for kind in ("comfyui", "image-convert", "comfyui")
    )
    ledger.cancel(first.id)

    def ids(**filters: Any) -> list[str]:
        return [task.id for task in ledger.list_tasks("ada", **filters).tasks]

    assert ids(statuses=[CANCELED]) == [first.id]
    assert ids(statuses=[PENDING, CANCELED]) == [third.id, second.id, first.id]
    assert ids(task_type="comfyui") == [third.id, first.id]
    assert third.id in ids(created_after=second.created_at - dt.timedelta(milliseconds=1))
    assert ids(created_after=third.created_at) == []


def test_the_position_counts_what_goes_before(ledger: Ledger) -> None:
    """Higher priority first, then age; other queues and tasks that run do not count."""
    low = submit(ledger, priority=Priority.LOW)
    running = submit(ledger, priority=Priority.HIGH)
    claim(ledger, running)
    submit(ledger, queue="cpu", priority=Priority.HIGH)
    first, second = submit(ledger), submit(ledger)
    high = submit(ledger, priority=Priority.HIGH)

    assert [ledger.queue_position(task) for task in (high, first, second, low)] == [1, 2, 3, 4]
    assert ledger.queue_position(see(ledger, running)) is None


def test_counts_are_of_live_tasks(ledger: Ledger) -> None:
    """Final tasks are history and cost the count nothing."""
    submit(ledger)
    submit(ledger, queue="cpu")
    claim(ledger, submit(ledger))
    ledger.cancel(submit(ledger).id)

    assert ledger.counts() == {
        "comfy": {"pending": 1, "processing": 1},
        "cpu": {"pending": 1, "processing": 0},
    }


def test_outputs_and_assets_are_found_by_their_keys(ledger: Ledger) -> None:
    """What serves a stored file asks whose it is."""
    held = claim(ledger, submit(ledger))
    made = output()
    ledger.finish(held.fence, COMPLETED, outputs=[made])
    asset_id, key = ledger.expect_asset("ada", "0" * 64, ".png")
    asset = ledger.add_asset(
        asset_id=asset_id,
        owner="ada",
        key=key,
        name="x.png",
        content_type="image/png",
        size_bytes=1,
        sha256="0" * 64,
    )
    again = ledger.reuse_asset(owner="ada", name="x.png", content_type="image/png", sha256="0" * 64)

    owner, found = ledger.find_output(made.key) or ("", None)
    assert (owner, found and found.key) == ("ada", made.key)
    assert again == asset == ledger.get_asset(asset.id, "ada") == ledger.find_asset(key)
    assert ledger.get_asset(asset.id, "bob") is None
    assert ledger.find_output("none") is None
    assert ledger.find_asset("none") is None


# -- claim ----------------------------------------------------------------------------------------


def test_of_many_claimers_one_gets_the_task(ledger: Ledger) -> None:
    """However many messages name a task, it runs once."""
    for _ in range(10):
        task = submit(ledger)
        found = [each for each in at_once(6, lambda _, task=task: try_claim(ledger, task)) if each]  # type: ignore[misc]  # bound now
        assert len(found) == 1
        assert (found[0].task.status, found[0].fence.attempt) == (PROCESSING, 1)
        assert len(rows(ledger, t.leases, t.leases.c.task_id == task.id)) == 1


def test_a_claim_repeated_with_its_token_is_the_same_claim(ledger: Ledger) -> None:
    """A claim whose answer was lost is recognised as one's own, and makes no second attempt."""
    task = submit(ledger)
    first = claim(ledger, task, claim="token")
    before = everything(ledger)

    assert claim(ledger, task, claim="token").fence == first.fence
    assert try_claim(ledger, task, claim="another") is None
    assert everything(ledger) == before


def test_an_old_token_claims_nothing_once_the_task_moved_on(ledger: Ledger) -> None:
    """A late repetition does not steal the next attempt."""
    task = submit(ledger)
    first = claim(ledger, task, claim="token")
    die(ledger, first)
    claim(ledger, task, claim="next")

    assert try_claim(ledger, task, claim="token") is None


def test_a_canceled_task_is_not_to_be_had(ledger: Ledger) -> None:
    """Its message may still lie in the broker."""
    task = submit(ledger)
    ledger.cancel(task.id)
    assert try_claim(ledger, task) is None


def test_a_task_is_not_to_be_had_before_it_is_due(ledger: Ledger) -> None:
    """A backoff holds whatever the broker delivers."""
    task = submit(ledger)
    ledger.retry_later(claim(ledger, task).fence, OOM, delay_s=60)
    assert try_claim(ledger, task) is None
    make_due(ledger, task)
    assert try_claim(ledger, task) is not None


def test_an_expired_task_is_not_started_but_goes_on_once_it_was(ledger: Ledger) -> None:
    """``expires_in_s`` applies before the first attempt only."""
    assert try_claim(ledger, submit(ledger, expires_in_s=0)) is None

    started = submit(ledger, expires_in_s=60)
    held = claim(ledger, started)
    ledger.hand_back(held.fence, adopt_wait_s=None)
    run_sql(
        ledger, sa.update(t.tasks).where(t.tasks.c.id == started.id).values(expires_at=t.tasks.c.created_at)
    )
    ledger.expire()
    assert try_claim(ledger, started) is not None


def test_a_bound_task_is_for_workers_of_its_server_only(ledger: Ledger) -> None:
    """Another one would render again what the server still has."""
    task = submit(ledger)
    held = claim(ledger, task)
    prompt(ledger, held, "gpu1")
    ledger.hand_back(held.fence, adopt_wait_s=60)

    assert see(ledger, task).bound_server == "gpu1"
    assert try_claim(ledger, task, servers=[]) is None
    assert try_claim(ledger, task, servers=["gpu2", "gpu3"]) is None
    assert try_claim(ledger, task, servers=["gpu2", "gpu1"]) is not None


# -- the fence ------------------------------------------------------------------------------------


def fenced_writes(ledger: Ledger, fence: Fence) -> dict[str, Callable[[], Any]]:
    """Everything an attempt can write."""
    return {
        "assign_server": lambda: ledger.assign_server(fence, None, ["gpu9"]),
        "record_prompt": lambda: ledger.record_prompt(
            fence, server="gpu9", prompt_id=str(uuid.uuid4()), client_id="old"
        ),
        "adopt": lambda: ledger.record_prompt(
            fence, server="gpu1", prompt_id=str(uuid.UUID(int=1)), client_id="old", adopted=True
        ),
        "record_running": lambda: ledger.record_running(fence),
        "record_rendered": lambda: ledger.record_rendered(fence),
        "finish": lambda: ledger.finish(fence, COMPLETED, outputs=[output()], run_s=1.0),
        "retry_later": lambda: ledger.retry_later(fence, OOM, delay_s=0),
        "hand_back": lambda: ledger.hand_back(fence, adopt_wait_s=0),
        "reap": lambda: ledger.reap(StaleLease(fence, "w", 1, expired=True), missed_s=0, max_lost=0),
        "still_held": lambda: ledger.still_held(fence),
    }


WRITES = list(fenced_writes(None, Fence("", 0, "")))  # type: ignore[arg-type]  # only the names are read


@pytest.mark.parametrize("verb", WRITES)
def test_an_old_attempt_changes_nothing(ledger: Ledger, verb: str) -> None:
    """Its lease was taken over: each of its writes matches no row, and it is told so."""
    task = submit(ledger)
    old = claim(ledger, task)
    prompt(ledger, old, "gpu1")
    die(ledger, old)
    new = claim(ledger, task, servers=["gpu1"])
    prompt(ledger, new, "gpu1")
    before = everything(ledger)

    assert not fenced_writes(ledger, old.fence)[verb]()

    assert everything(ledger) == before
    assert ledger.still_held(new.fence)


@pytest.mark.parametrize("verb", WRITES)
def test_the_number_alone_is_not_enough(ledger: Ledger, verb: str) -> None:
    """After a fail-over of the database the same number can be given twice; the token cannot."""
    task = submit(ledger)
    held = claim(ledger, task)
    prompt(ledger, held)
    before = everything(ledger)

    assert not fenced_writes(ledger, Fence(task.id, held.fence.attempt, "another"))[verb]()

    assert everything(ledger) == before


@pytest.mark.parametrize("verb", WRITES)
def test_nothing_is_written_to_an_ended_attempt(ledger: Ledger, verb: str) -> None:
    """A completed task and its history stay as they are, whoever comes late."""
    held = claim(ledger, submit(ledger))
    prompt(ledger, held)
    ledger.finish(held.fence, COMPLETED, outputs=[output()])
    before = everything(ledger)

    fenced_writes(ledger, held.fence)[verb]()

    assert everything(ledger) == before


def test_a_renewal_tells_which_leases_are_gone(ledger: Ledger) -> None:
    """One statement renews all leases of a process; a token that is missing was taken over."""
    first, second, third = (claim(ledger, submit(ledger)) for _ in range(3))
    die(ledger, first)
    ledger.cancel(second.task.id)
    tokens = [each.fence.claim for each in (first, second, third)]

    beats = ledger.renew(tokens, 15.0)

    assert set(beats) == set(tokens[1:])
    assert [beats[token].cancel for token in tokens[1:]] == [True, False]
    assert not any(beat.late for beat in beats.values())


def test_a_renewed_lease_is_not_stale(ledger: Ledger) -> None:
    """Stale means run out, or not renewed for three beats."""
    short = claim(ledger, submit(ledger), lease_s=-1.0)
    held = claim(ledger, submit(ledger))

    assert [(each.fence, each.expired) for each in ledger.stale_leases(6.0)] == [(short.fence, True)]
    assert {each.fence for each in ledger.stale_leases(-1.0)} == {short.fence, held.fence}
    ledger.renew([short.fence.claim], 15.0)
    assert ledger.stale_leases(6.0) == []


# -- finish ---------------------------------------------------------------------------------------


def test_finish_writes_outputs_state_and_history_together(ledger: Ledger) -> None:
    """Outputs keep their order; the lease is gone; the times are in order."""
    task = submit(ledger)
    held = claim(ledger, task)
    prompt(ledger, held)
    made = [output(), output(), output()]

    assert ledger.finish(held.fence, COMPLETED, outputs=made, run_s=1.5, store_s=0.5) is COMPLETED

    done = see(ledger, task)
    assert [(each.index, each.key) for each in done.outputs] == [(n, each.key) for n, each in enumerate(made)]
    assert (done.status, done.run_s, done.store_s, done.error) == (COMPLETED, 1.5, 0.5, None)
    (attempt,) = done.attempts
    assert attempt.outcome is AttemptOutcome.COMPLETED
    assert attempt.ended_at is not None
    assert done.completed_at is not None
    assert task.created_at <= attempt.started_at <= attempt.ended_at
    assert rows(ledger, t.leases) == []


def test_a_finish_that_breaks_in_the_middle_writes_nothing(ledger: Ledger) -> None:
    """No task is completed without its outputs, whatever stops the transaction between the two."""
    held = claim(ledger, submit(ledger))
    refused = replace(output(), key=None)  # type: ignore[arg-type]  # by the table
    before = everything(ledger)

    with pytest.raises(sa.exc.IntegrityError):
        ledger.finish(held.fence, COMPLETED, outputs=[output(), refused])

    assert everything(ledger) == before
    assert ledger.finish(held.fence, COMPLETED, outputs=[output()]) is COMPLETED


@pytest.mark.parametrize("status", [COMPLETED, FAILED, CANCELED])
def test_finish_repeated_says_the_same_and_changes_nothing(ledger: Ledger, status: TaskStatus) -> None:
    """Its first answer may have been lost."""
    held = claim(ledger, submit(ledger))
    made = [output()]
    first = ledger.finish(held.fence, status, outputs=made, error=OOM if status is FAILED else None)
    before = everything(ledger)

    assert ledger.finish(held.fence, status, outputs=made) is first is status
    assert everything(ledger) == before


def test_a_finish_whose_answer_was_lost_is_found_when_repeated(
    postgres_ledger_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """The connection is cut after the server committed: nobody knows, so the caller asks again."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(proxy.url_of(postgres_ledger_url)) as ledger:
        held = claim(ledger, submit(ledger))

        def commit_and_cut(connection: sa.Connection) -> None:
            driver: Any = connection.connection.dbapi_connection
            driver.commit()
            driver.cursor().execute("SELECT 1")  # so that SQLAlchemy's own COMMIT has something to lose
            proxy.cut()

        sa.event.listen(ledger.engine, "commit", commit_and_cut, once=True)
        with pytest.raises(LedgerUnavailable):
            ledger.finish(held.fence, COMPLETED, outputs=[output()])

        assert ledger.finish(held.fence, COMPLETED, outputs=[output()]) is COMPLETED
        assert len(see(ledger, held.task).outputs) == 1


def test_a_claim_whose_answer_was_lost_is_found_when_repeated(
    postgres_ledger_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Cut before the commit, the statement is repeated; cut after it, the token is recognised."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(proxy.url_of(postgres_ledger_url)) as ledger:
        task = submit(ledger)
        lost: list[int] = []

        def cut_once(*_: Any) -> None:
            lost.append(1)
            proxy.cut()

        sa.event.listen(ledger.engine, "before_cursor_execute", cut_once, once=True)
        held = claim(ledger, task, claim="token")

        assert (lost, held.fence.attempt) == ([1], 1)
        assert claim(ledger, task, claim="token").fence == held.fence


def test_a_cancel_committed_before_finish_wins(ledger: Ledger) -> None:
    """The caller was told 202; the outputs are not shown."""
    held = claim(ledger, submit(ledger))
    ledger.cancel(held.task.id)

    assert ledger.finish(held.fence, COMPLETED, outputs=[output()]) is CANCELED

    done = see(ledger, held.task)
    assert (done.status, done.outputs) == (CANCELED, ())
    assert done.error is not None
    assert done.error.code == "canceled"
    assert outcomes(ledger, held.task) == ["canceled"]


def test_a_cancel_after_finish_changes_nothing(ledger: Ledger) -> None:
    """Final is final."""
    held = claim(ledger, submit(ledger))
    ledger.finish(held.fence, COMPLETED, outputs=[output()])
    before = everything(ledger)

    canceled = ledger.cancel(held.task.id)

    assert canceled is not None
    assert canceled.status is COMPLETED
    assert everything(ledger) == before


def test_a_waiting_task_is_canceled_at_once_and_a_running_one_is_asked(ledger: Ledger) -> None:
    """Repeating a cancel keeps the time of the first."""
    waiting = ledger.cancel(submit(ledger).id)
    held = claim(ledger, submit(ledger))
    asked = ledger.cancel(held.task.id)
    again = ledger.cancel(held.task.id)

    assert waiting is not None
    assert (waiting.status, waiting.error and waiting.error.code) == (CANCELED, "canceled")
    assert asked is not None
    assert again is not None
    assert asked.status is PROCESSING
    assert asked.cancel_requested_at == again.cancel_requested_at is not None


@pytest.mark.parametrize(
    "end",
    [
        lambda ledger, fence: ledger.retry_later(fence, OOM, delay_s=0),
        lambda ledger, fence: ledger.hand_back(fence, adopt_wait_s=60),
        lambda ledger, fence: ledger.finish(fence, FAILED, error=OOM),
    ],
    ids=["retry_later", "hand_back", "finish"],
)
def test_a_cancel_wins_over_every_way_an_attempt_can_end(ledger: Ledger, end: Callable[..., Any]) -> None:
    """No canceled task goes back to the line."""
    held = claim(ledger, submit(ledger))
    ledger.cancel(held.task.id)

    assert end(ledger, held.fence) is CANCELED
    assert end(ledger, held.fence) is CANCELED
    assert see(ledger, held.task).status is CANCELED


def test_a_cancel_wins_over_a_loss(ledger: Ledger) -> None:
    """The worker died before it could obey: the task ends, and its prompt is a stray."""
    held = claim(ledger, submit(ledger))
    lost = prompt(ledger, held)
    ledger.cancel(held.task.id)

    assert die(ledger, held) is CANCELED
    assert [stray.prompt_id for stray in ledger.strays_on(["gpu1"])] == [lost]


# -- retry, loss, hand-back -----------------------------------------------------------------------


def test_retryable_errors_end_at_the_bound(ledger: Ledger) -> None:
    """``max_attempts`` is how many attempts may end in such an error; all of them stay as history."""
    task = submit(ledger, max_attempts=3)
    ends = [ledger.retry_later(claim(ledger, task).fence, OOM, delay_s=0) for _ in range(3)]

    assert ends == [PENDING, PENDING, FAILED]
    assert outcomes(ledger, task) == ["retry", "retry", "failed"]
    done = see(ledger, task)
    assert done.error == OOM
    assert [each.error for each in done.attempts] == [OOM] * 3
    assert try_claim(ledger, task) is None


def test_retry_later_repeated_counts_once(ledger: Ledger) -> None:
    """The answer of the first call may have been lost, and the next attempt may run already."""
    task = submit(ledger)
    held = claim(ledger, task)
    ledger.retry_later(held.fence, OOM, delay_s=0)
    claim(ledger, task)
    before = everything(ledger)

    assert ledger.retry_later(held.fence, OOM, delay_s=0) is PENDING
    assert everything(ledger) == before


def test_losses_have_a_bound_of_their_own(ledger: Ledger) -> None:
    """A task that kills its workers ends; retryable errors are counted apart."""
    task = submit(ledger, max_attempts=2)
    ends = []
    ledger.retry_later(claim(ledger, task).fence, OOM, delay_s=0)
    for _ in range(4):
        make_due(ledger, task)
        ends.append(die(ledger, claim(ledger, task), max_lost=3))

    assert ends == [PENDING, PENDING, PENDING, FAILED]
    assert outcomes(ledger, task) == ["retry", *["lost"] * 4]
    error = see(ledger, task).error
    assert error is not None
    assert error.code == "worker_lost"


def test_the_first_loss_waits_for_nothing_and_later_ones_wait(ledger: Ledger) -> None:
    """A worker that was unlucky costs no time; a task that kills workers slows down."""
    task = submit(ledger)
    die(ledger, claim(ledger, task))
    held = try_claim(ledger, task)
    assert held is not None
    die(ledger, held)
    assert try_claim(ledger, task) is None


def test_hand_backs_count_nowhere(ledger: Ledger) -> None:
    """A deploy may hit a task as often as it likes; ``attempt`` exceeds ``max_attempts``."""
    task = submit(ledger, max_attempts=1)
    for _ in range(5):
        assert ledger.hand_back(claim(ledger, task).fence, adopt_wait_s=None) is PENDING
    held = claim(ledger, task)

    assert held.fence.attempt == 6
    assert (row_of(ledger, task)["failures"], row_of(ledger, task)["losses"]) == (0, 0)
    assert ledger.retry_later(held.fence, OOM, delay_s=0) is FAILED


def test_many_sweepers_reap_a_lease_once(ledger: Ledger) -> None:
    """One wins, the loss is counted once."""
    for _ in range(5):
        task = submit(ledger)
        claim(ledger, task, lease_s=-1.0)
        (lease,) = ledger.stale_leases(6.0)

        ends = at_once(6, lambda _, lease=lease: ledger.reap(lease, missed_s=6.0, max_lost=3))  # type: ignore[misc]  # bound now

        assert sorted(filter(None, ends)) == [PENDING]
        assert row_of(ledger, task)["losses"] == 1
        ledger.cancel(task.id)


def test_a_lease_renewed_after_it_was_seen_is_not_reaped(ledger: Ledger) -> None:
    """Between looking and reaping its worker came back."""
    held = claim(ledger, submit(ledger), lease_s=-1.0)
    (lease,) = ledger.stale_leases(6.0)
    ledger.renew([held.fence.claim], 15.0)

    assert ledger.reap(lease, missed_s=6.0, max_lost=3) is None
    assert ledger.still_held(held.fence)


def test_a_lease_seen_as_expired_is_judged_by_expiry_alone(ledger: Ledger) -> None:
    """Beats count only for a process whose session is known to be gone."""
    held = claim(ledger, submit(ledger), lease_s=15.0)

    expired = StaleLease(held.fence, "w", 1, expired=True)
    assert ledger.reap(expired, missed_s=-1.0, max_lost=3) is None
    silent = StaleLease(held.fence, "w", 1, expired=False)
    assert ledger.reap(silent, missed_s=60.0, max_lost=3) is None
    assert ledger.reap(silent, missed_s=-1.0, max_lost=3) is PENDING


def test_a_parent_ends_the_lease_of_its_dead_child_only(ledger: Ledger) -> None:
    """The task may already run elsewhere when Celery's parent tells of the death."""
    held = claim(ledger, submit(ledger), worker="a@host:1")

    ledger.end_lease_of("a@host:2", held.task.id)
    assert ledger.stale_leases(6.0) == []
    ledger.end_lease_of("a@host:1", held.task.id)
    assert [(lease.fence, lease.expired) for lease in ledger.stale_leases(6.0)] == [(held.fence, True)]


# -- adoption, bindings, strays -------------------------------------------------------------------


def test_only_a_prompt_whose_end_nobody_saw_may_be_adopted(ledger: Ledger) -> None:
    """Lost, handed back or rendered and not stored; newest first; never one that was judged."""
    task = submit(ledger, max_attempts=9)
    everywhere = ["gpu1"]
    ends: list[tuple[str, Callable[[Claim], Any]]] = [
        ("lost", lambda held: die(ledger, held)),
        ("retry", lambda held: ledger.retry_later(held.fence, OOM, delay_s=0)),
        ("handed_back", lambda held: ledger.hand_back(held.fence, adopt_wait_s=0)),
        (
            "storage_failed",
            lambda held: ledger.retry_later(
                held.fence, OOM, delay_s=0, outcome=AttemptOutcome.STORAGE_FAILED
            ),
        ),
    ]
    prompts: dict[str, str] = {}
    for name, end in ends:
        held = claim(ledger, task, servers=everywhere)
        prompts[name] = prompt(ledger, held)
        end(held)
        make_due(ledger, task)
    without_prompt = claim(ledger, task, servers=everywhere)
    die(ledger, without_prompt)
    make_due(ledger, task)

    found = claim(ledger, task, servers=everywhere).predecessors

    assert [each.prompt_id for each in found] == [
        prompts[name] for name in ("storage_failed", "handed_back", "lost")
    ]
    assert {each.client_id for each in found} == {"client"}


def test_a_prompt_that_an_adopter_judged_is_not_adopted_again(ledger: Ledger) -> None:
    """The first attempt was lost, the second adopted its prompt and saw it fail: it is judged."""
    task = submit(ledger)
    first = claim(ledger, task)
    name = prompt(ledger, first)
    die(ledger, first)
    second = claim(ledger, task, servers=["gpu1"])
    assert [each.prompt_id for each in second.predecessors] == [name]
    prompt(ledger, second, prompt_id=name)
    ledger.retry_later(second.fence, OOM, delay_s=0)

    assert claim(ledger, task).predecessors == ()


def test_a_binding_is_freed_when_no_live_worker_serves_its_server(ledger: Ledger) -> None:
    """At once after a loss; after the adoption wait when it was handed back."""
    lost, handed_back = submit(ledger), submit(ledger)
    for task in (lost, handed_back):
        held = claim(ledger, task)
        prompt(ledger, held, "gpu1")
        if task is lost:
            die(ledger, held)
        else:
            ledger.hand_back(held.fence, adopt_wait_s=60)
    (first,) = [each for each in ledger.take_bound([("comfy", "gpu1")]) if each.task_id == lost.id]
    assert first.server == "gpu1"

    assert ledger.release_bindings([("comfy", "gpu1"), ("comfy", "gpu2")]) == 0
    assert ledger.release_bindings([("comfy", "gpu2"), ("thumbs", "gpu1")]) == 1

    assert see(ledger, lost).bound_server is None
    assert row_of(ledger, lost)["dispatched_at"] is None
    assert see(ledger, handed_back).bound_server == "gpu1"
    run_sql(ledger, sa.update(t.tasks).values(bound_until=t.tasks.c.created_at))
    assert ledger.release_bindings([]) == 1


def test_a_bound_task_goes_to_its_server_and_counts_on_no_runway(ledger: Ledger) -> None:
    """It waits in the server's own queue, beside the line of all others."""
    task = submit(ledger)
    held = claim(ledger, task)
    prompt(ledger, held, "gpu1")
    ledger.hand_back(held.fence, adopt_wait_s=60)

    waiting = ledger.waiting()
    assert waiting.priorities == {}
    assert waiting.bound == ledger.bound() == {("comfy", "gpu1")}
    assert ledger.take("comfy", 3, 10) == []
    assert ledger.take_bound([]) == ledger.take_bound([("comfy", "gpu2"), ("thumbs", "gpu1")]) == []
    assert [(each.task_id, each.server) for each in ledger.take_bound([("comfy", "gpu1")])] == [
        (task.id, "gpu1")
    ]
    assert ledger.runway() == {}


def test_an_attempt_that_did_not_get_to_look_leaves_the_binding(ledger: Ledger) -> None:
    """It was claimed and lost again before it wrote a prompt down."""
    task = submit(ledger)
    held = claim(ledger, task)
    prompt(ledger, held, "gpu1")
    die(ledger, held)
    die(ledger, claim(ledger, task, servers=["gpu1"]))

    assert see(ledger, task).bound_server == "gpu1"


def strays(ledger: Ledger) -> set[str]:
    """Prompts that the janitor of gpu1 must stop now."""
    return {stray.prompt_id for stray in ledger.strays_on(["gpu1"])}


def test_a_stray_is_left_alone_while_somebody_may_adopt_it(ledger: Ledger) -> None:
    """It waits for its adopter, then the adopter decides; when nobody will, it is to be stopped."""
    task = submit(ledger)
    first = claim(ledger, task)
    old = prompt(ledger, first)
    die(ledger, first)
    assert len(rows(ledger, t.strays)) == 1
    assert strays(ledger) == set()

    second = claim(ledger, task, servers=["gpu1"])
    assert strays(ledger) == set()
    own = prompt(ledger, second)
    assert strays(ledger) == {old}
    assert ledger.strays_on(["gpu2"]) == ledger.strays_on([]) == []

    ledger.finish(second.fence, COMPLETED, outputs=[output()])
    assert strays(ledger) == {old}
    ledger.forget_stray(Stray("gpu1", old, task.id, 1))
    assert rows(ledger, t.strays) == []
    assert own not in strays(ledger)


def test_an_adopted_prompt_is_no_stray(ledger: Ledger) -> None:
    """Its new attempt follows it, and becomes the one that leaves it behind."""
    task = submit(ledger)
    first = claim(ledger, task)
    name = prompt(ledger, first)
    ledger.hand_back(first.fence, adopt_wait_s=60)
    second = claim(ledger, task, servers=["gpu1"])

    prompt(ledger, second, prompt_id=name)
    assert rows(ledger, t.strays) == []

    die(ledger, second)
    assert [(row["prompt_id"], row["attempt"]) for row in rows(ledger, t.strays)] == [(name, 2)]


@pytest.mark.parametrize("how", ["canceled", "poison", "uncertain"])
def test_a_stray_is_to_be_stopped_when_its_task_moved_on(ledger: Ledger, how: str) -> None:
    """A cancel, an end as poison, and one that nobody may adopt, between two attempts also stop the GPU."""
    task = submit(ledger)
    held = claim(ledger, task)
    name = prompt(ledger, held)
    if how == "uncertain":
        ledger.retry_later(held.fence, OOM, delay_s=0, leaves_prompt=True)
    else:
        die(ledger, held, max_lost=0 if how == "poison" else 3)
    if how == "canceled":
        ledger.cancel(task.id)

    assert strays(ledger) == {name}


def test_a_stray_outlives_the_binding_until_another_prompt_takes_its_place(ledger: Ledger) -> None:
    """A worker of its server that is back before the task is claimed must not stop what it may adopt."""
    task = submit(ledger)
    held = claim(ledger, task)
    name = prompt(ledger, held)
    die(ledger, held)
    assert ledger.release_bindings([]) == 1
    assert strays(ledger) == set()

    second = claim(ledger, task)
    assert [each.prompt_id for each in second.predecessors] == [name]
    assert strays(ledger) == set()
    prompt(ledger, second, "gpu2")

    assert strays(ledger) == {name}


def test_an_uncertain_prompt_of_a_retryable_error_is_a_stray(ledger: Ledger) -> None:
    """The server did not answer and may go on: nobody adopts it, somebody stops it."""
    held = claim(ledger, submit(ledger))
    name = prompt(ledger, held)
    ledger.retry_later(held.fence, OOM, delay_s=0, leaves_prompt=True)
    assert strays(ledger) == {name}


def test_a_prompt_whose_end_was_seen_is_no_stray(ledger: Ledger) -> None:
    """Nothing is left to stop."""
    for leaves in (False, True):
        held = claim(ledger, submit(ledger))
        prompt(ledger, held)
        ledger.finish(held.fence, FAILED, error=OOM, leaves_prompt=leaves)
        assert bool(rows(ledger, t.strays)) is leaves


# -- limits ---------------------------------------------------------------------------------------


def test_the_deadline_is_set_once_and_goes_over_to_an_adopter(ledger: Ledger) -> None:
    """However many attempts follow a prompt, it may render for ``timeout_s`` in all."""
    task = submit(ledger, timeout_s=50)
    first = claim(ledger, task)
    name = prompt(ledger, first)
    deadline = ledger.record_running(first.fence)
    assert deadline is not None
    assert ledger.record_running(first.fence) == deadline
    ledger.hand_back(first.fence, adopt_wait_s=60)

    second = claim(ledger, task, servers=["gpu1"])
    assert second.deadline_at == deadline
    prompt(ledger, second, prompt_id=name)
    assert rows(ledger, t.leases)[0]["deadline_at"] == deadline
    assert ledger.record_running(second.fence) == deadline


def test_a_new_prompt_has_a_deadline_of_its_own(ledger: Ledger) -> None:
    """Rendering anew begins with the whole time."""
    task = submit(ledger, timeout_s=50)
    first = claim(ledger, task)
    prompt(ledger, first)
    old = ledger.record_running(first.fence)
    die(ledger, first)
    second = claim(ledger, task, servers=["gpu1"])
    prompt(ledger, second)

    assert rows(ledger, t.leases)[0]["deadline_at"] is None
    new = ledger.record_running(second.fence)
    assert old is not None
    assert new is not None
    assert new > old


def test_a_beat_tells_that_the_deadline_passed(ledger: Ledger) -> None:
    """Storing has its own limit: once rendered, nothing is late."""
    held = claim(ledger, submit(ledger, timeout_s=0))
    prompt(ledger, held)
    ledger.record_running(held.fence)
    token = held.fence.claim

    assert wait_until(lambda: ledger.renew([token], 15.0)[token].late, 2.0)
    ledger.record_rendered(held.fence)
    assert not ledger.renew([token], 15.0)[token].late


def test_whoever_adopts_a_finished_prompt_to_store_it_is_not_too_late(ledger: Ledger) -> None:
    """The prompt was rendered in time and storage failed: the old deadline is no more."""
    task = submit(ledger, timeout_s=0)
    first = claim(ledger, task)
    name = prompt(ledger, first)
    ledger.record_running(first.fence)
    ledger.record_rendered(first.fence)
    ledger.retry_later(first.fence, OOM, delay_s=0, outcome=AttemptOutcome.STORAGE_FAILED)
    time.sleep(0.01)

    second = claim(ledger, task, servers=["gpu1"])
    prompt(ledger, second, prompt_id=name)

    assert not ledger.renew([second.fence.claim], 15.0)[second.fence.claim].late


def test_what_was_not_started_in_time_fails_as_expired(ledger: Ledger) -> None:
    """And what was started, or has time left, does not."""
    late, early, without = (submit(ledger, expires_in_s=seconds) for seconds in (0, 60, None))

    assert ledger.expire() == 1

    done = see(ledger, late)
    assert (done.status, done.error and done.error.code) == (FAILED, "expired")
    assert see(ledger, early).status is see(ledger, without).status is PENDING
    assert ledger.expire() == 0


# -- servers --------------------------------------------------------------------------------------


def test_attempts_that_choose_at_once_spread_over_the_servers(ledger: Ledger) -> None:
    """Two children do not both take the idle server."""
    names = ["gpu1", "gpu2", "gpu3"]
    held = [claim(ledger, submit(ledger)) for _ in range(6)]

    chosen = at_once(6, lambda index: ledger.assign_server(held[index].fence, None, names))

    assert sorted(map(str, chosen)) == sorted(names * 2)


def test_rendered_attempts_and_foreign_load_are_weighed(ledger: Ledger) -> None:
    """One that only stores burdens no server; load that is not ours counts; order breaks ties."""
    first, second, third = (claim(ledger, submit(ledger)) for _ in range(3))
    assert ledger.assign_server(first.fence, None, ["gpu1", "gpu2"]) == "gpu1"
    assert ledger.assign_server(second.fence, {"gpu2": 5}, ["gpu1", "gpu2"]) == "gpu1"
    ledger.record_rendered(first.fence)
    ledger.record_rendered(second.fence)
    assert ledger.assign_server(third.fence, None, ["gpu1", "gpu2"]) == "gpu1"
    assert ledger.assign_server(third.fence, None, []) is None


def test_whether_another_renders_there_is_seen(ledger: Ledger) -> None:
    """Only a prompt that was written down and is not rendered counts, and not one's own."""
    one, other = claim(ledger, submit(ledger)), claim(ledger, submit(ledger))
    assert not ledger.renders_elsewhere(one.fence, "gpu1")
    prompt(ledger, other, "gpu1")
    assert ledger.renders_elsewhere(one.fence, "gpu1")
    assert not ledger.renders_elsewhere(other.fence, "gpu1")
    ledger.record_rendered(other.fence)
    assert not ledger.renders_elsewhere(one.fence, "gpu1")


def test_the_usual_time_is_the_median_of_the_newest(ledger: Ledger) -> None:
    """Of nine tasks of this type; another type does not matter."""
    assert ledger.usual_run_s("comfyui") is None
    for run_s in (100.0, *[float(n) for n in range(9)]):
        ledger.finish(claim(ledger, submit(ledger)).fence, COMPLETED, run_s=run_s)
        time.sleep(0.002)
    ledger.finish(claim(ledger, submit(ledger, task_type="other")).fence, COMPLETED, run_s=1000.0)

    assert ledger.usual_run_s("comfyui") == 4.0


# -- the outbox -----------------------------------------------------------------------------------


def test_the_oldest_of_a_priority_are_taken_once(ledger: Ledger) -> None:
    """Two relays never take the same task, and none is forgotten."""
    ids = [submit(ledger).id for _ in range(20)]
    assert [each.task_id for each in ledger.take("comfy", 3, 2)] == ids[:2]

    taken = at_once(6, lambda _: [each.task_id for each in ledger.take("comfy", 3, 3)])

    flat = [task_id for batch in taken for task_id in batch]
    assert len(flat) == len(set(flat))
    rest = [each.task_id for each in ledger.take("comfy", 3, 100)]
    assert sorted(flat + rest) == ids[2:]


def test_a_limit_holds_whatever_plan_the_database_chooses(postgres_ledger_url: str) -> None:
    """PostgreSQL may run a subquery once for each row, and a LIMIT then is none."""
    with open_ledger(postgres_ledger_url) as ledger:
        for _ in range(20):
            submit(ledger)

        @sa.event.listens_for(ledger.engine, "begin")
        def plan_badly(connection: sa.Connection) -> None:
            for what in ("hashjoin", "mergejoin", "material", "memoize", "hashagg", "sort"):
                connection.exec_driver_sql(f"SET LOCAL enable_{what} = off")

        assert len(ledger.take("comfy", 3, 2)) == 2


def test_what_waits_and_what_is_on_the_runway(ledger: Ledger) -> None:
    """By queue and priority; what is not due, bound or running is in neither."""
    submit(ledger)
    submit(ledger, priority=Priority.HIGH)
    submit(ledger, priority=Priority.HIGH)
    submit(ledger, queue="cpu", priority=Priority.LOW)
    claim(ledger, submit(ledger, queue="only-running"))
    delayed = submit(ledger, queue="only-delayed")
    ledger.retry_later(claim(ledger, delayed).fence, OOM, delay_s=60)

    assert ledger.waiting().priorities == {"comfy": [0, 3], "cpu": [6]}
    ledger.take("comfy", 0, 1)
    ledger.take("cpu", 6, 5)
    assert ledger.waiting().priorities == {"comfy": [0, 3]}
    assert ledger.runway() == {"comfy": {0: 1}, "cpu": {6: 1}}


def test_put_back_returns_only_what_was_not_taken_again(ledger: Ledger) -> None:
    """A late answer of the broker does not undo what another relay did since."""
    first, second = submit(ledger), submit(ledger)
    batch = ledger.take("comfy", 3, 2)
    claim(ledger, first)

    assert ledger.put_back(batch) == 1
    assert ledger.put_back(batch) == 0
    assert see(ledger, first).status is PROCESSING
    time.sleep(0.002)
    (again,) = ledger.take("comfy", 3, 2)
    assert again.task_id == second.id
    assert ledger.put_back(batch) == 0
    assert ledger.put_back([again]) == 1
    assert ledger.put_back([]) == 0


def test_overdue_is_what_was_sent_long_ago_and_not_claimed(ledger: Ledger) -> None:
    """These are the messages to look for in the broker."""
    submit(ledger)
    claim(ledger, submit(ledger))
    (sent,) = ledger.take("comfy", 3, 1)
    time.sleep(0.01)

    assert ledger.overdue(0.0) == [sent]
    assert ledger.overdue(5.0) == []


# -- workers --------------------------------------------------------------------------------------


def register(ledger: Ledger, name: str = "w@host", session_key: int = 2**62 - 1, **values: Any) -> None:
    """A worker's heartbeat."""
    given: dict[str, Any] = {
        "queues": ["comfy"],
        "servers": [{"name": "gpu1", "healthy": True}],
        "slots": 2,
        "consuming": True,
        **values,
    }
    ledger.register_worker(name=name, host="host", pid=1, session_key=session_key, version="1", **given)


def test_a_heartbeat_keeps_the_start_and_a_restart_begins_anew(ledger: Ledger) -> None:
    """The row of a name is written over; the session tells a restart from a beat."""
    register(ledger)
    (first,) = ledger.workers()
    time.sleep(0.01)
    register(ledger, slots=4)
    ((beat, key),) = ledger.workers_with_sessions()
    register(ledger, session_key=2)
    (restarted,) = ledger.workers()

    assert (beat.slots, beat.started_at, key) == (4, first.started_at, 2**62 - 1)
    assert beat.seen_at > first.seen_at
    assert restarted.started_at > first.started_at
    assert beat.servers == ({"name": "gpu1", "healthy": True},)


def test_a_worker_that_stopped_forgets_its_own_row_only(ledger: Ledger) -> None:
    """A successor of the same name may already be there."""
    register(ledger, session_key=2)
    ledger.forget_worker("w@host", session_key=1)
    assert len(ledger.workers()) == 1
    ledger.forget_worker("w@host", session_key=2)
    assert ledger.workers() == []


def test_workers_that_are_silent_are_not_live_and_later_forgotten(ledger: Ledger) -> None:
    """Their heartbeat tells."""
    register(ledger)
    assert ledger.workers(seen_within_s=-1.0) == []
    assert ledger.forget_old_workers(60.0) == 0
    assert ledger.forget_old_workers(-1.0) == 1


# -- belt and braces ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "status = 'pending', completed_at = NULL",
        "status = 'failed'",
        "attempt = attempt + 1",
        "completed_at = created_at",
        "error = '{}'",
    ],
)
def test_no_sql_leaves_a_final_state(ledger: Ledger, change: str) -> None:
    """A trigger holds it, whoever writes."""
    held = claim(ledger, submit(ledger))
    ledger.finish(held.fence, COMPLETED)
    time.sleep(0.002)

    with pytest.raises(sa.exc.IntegrityError):
        run_sql(ledger, f"UPDATE tasks SET {change}")

    assert see(ledger, held.task).status is COMPLETED


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE tasks SET attempt = attempt - 1",
        "UPDATE tasks SET status = 'asleep'",
        "UPDATE tasks SET status = 'completed'",
        "UPDATE tasks SET completed_at = created_at",
    ],
    ids=["an attempt falls", "an unknown state", "final without an end", "an end without being final"],
)
def test_no_sql_breaks_a_live_task(ledger: Ledger, statement: str) -> None:
    """Triggers and checks hold the states together."""
    claim(ledger, submit(ledger))
    with pytest.raises(sa.exc.IntegrityError):
        run_sql(ledger, statement)


def test_no_sql_changes_an_attempt_that_ended(ledger: Ledger) -> None:
    """History is written once."""
    ledger.hand_back(claim(ledger, submit(ledger)).fence, adopt_wait_s=None)
    with pytest.raises(sa.exc.IntegrityError):
        run_sql(ledger, "UPDATE attempts SET outcome = 'completed'")


def test_a_task_takes_its_rows_along(ledger: Ledger) -> None:
    """Deleting a task leaves no attempt, lease, output or key behind; a stray is the server's matter."""
    new = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")
    done, _ = ledger.submit(new, idempotency_key="k", body_hash="h")
    held = claim(ledger, done)
    prompt(ledger, held)
    ledger.finish(held.fence, COMPLETED, outputs=[output()], leaves_prompt=True)
    claim(ledger, submit(ledger))

    run_sql(ledger, sa.delete(t.tasks))

    assert {name for name, found in everything(ledger).items() if found} == {"strays"}


def test_no_time_of_a_host_enters_a_statement(ledger: Ledger) -> None:
    """Workers with wrong clocks cannot reap each other: every time is made by the database."""
    sent: list[Any] = []
    deadlines: list[Any] = []  # the database's own answer, given back to it for the lease
    a_year_ago_ms = (time.time() - 365 * 86400) * 1000

    def is_time(value: object) -> bool:
        return isinstance(value, dt.datetime) or (
            isinstance(value, int | float) and a_year_ago_ms < value < a_year_ago_ms * 1.1
        )

    def spy(_conn: Any, _cursor: Any, statement: str, parameters: Any, _ctx: Any, many: bool) -> None:
        for each in parameters if many else [parameters]:
            values = each.values() if isinstance(each, dict) else each
            sent.extend((statement, value) for value in values if is_time(value))

    sa.event.listen(ledger.engine, "before_cursor_execute", spy)
    task = submit(ledger, expires_in_s=60)
    ledger.take("comfy", 3, 1)
    for end in ("retry", "hand_back", "die", "finish"):
        held = claim(ledger, task, servers=["gpu1"])
        ledger.assign_server(held.fence, None, ["gpu1"])
        prompt(ledger, held)
        deadline = ledger.record_running(held.fence)
        assert deadline is not None
        deadlines += [
            deadline,
            (deadline - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1),
        ]
        ledger.renew([held.fence.claim], 15.0)
        ledger.record_rendered(held.fence)
        if end == "retry":
            ledger.retry_later(held.fence, OOM, delay_s=0)
        elif end == "hand_back":
            ledger.hand_back(held.fence, adopt_wait_s=5)
        elif end == "die":
            die(ledger, held)
        else:
            ledger.finish(held.fence, COMPLETED, outputs=[output()])
    register(ledger)
    ledger.cancel(submit(ledger).id)
    ledger.stale_leases(6.0)
    ledger.overdue(5.0)
    ledger.expire()
    ledger.release_bindings([])
    ledger.forget_expired_keys()
    ledger.forget_old_workers()
    ledger.workers()

    assert [each for each in sent if each[1] not in deadlines] == []
    sent.clear()
    # The watch works: a time that is given does show.
    ledger.list_tasks("ada", created_after=dt.datetime.now(dt.UTC))
    assert len(sent) == 1


def test_the_database_tells_the_time(ledger: Ledger) -> None:
    """``ping`` answers with it, aware, to the millisecond."""
    first = ledger.ping()
    time.sleep(0.02)
    assert 0.01 < (ledger.ping() - first).total_seconds() < 5
    assert abs((first - dt.datetime.now(dt.UTC)).total_seconds()) < 5


# -- outages --------------------------------------------------------------------------------------


def test_an_error_names_no_secret(postgres_url: str) -> None:
    """Neither a refused connection, nor a wrong password, nor missing tables tell the password."""
    url = sa.make_url(postgres_url)
    texts = []
    for broken in (
        url.set(port=1),
        url.set(password="hunter2"),
        url,
        url.set(database="none", password=url.password),
    ):
        with open_ledger(broken.render_as_string(hide_password=False)) as ledger:
            with pytest.raises(LedgerUnavailable) as caught:
                ledger.ping()
            texts.append(f"{caught.value} {caught.value.__cause__}")
            texts.append(repr(ledger.engine))
    assert url.password is not None
    for text in texts:
        assert "hunter2" not in text
        assert url.password not in text


@pytest.mark.parametrize("mode", ["refuse", "reset"])
def test_a_ledger_that_is_away_says_so_and_works_again_when_it_is_back(
    postgres_ledger_url: str, fault_proxy: Callable[[str], FaultProxy], mode: Any
) -> None:
    """One error class for every way a database can be gone; pooled connections heal by themselves."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(proxy.url_of(postgres_ledger_url), pool_size=2) as ledger:
        task = submit(ledger)
        proxy.set_mode(mode)
        for act in (ledger.ping, lambda: submit(ledger), lambda: claim(ledger, task)):
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                act()
            assert time.monotonic() - began < 5
        proxy.set_mode("pass")
        assert claim(ledger, task).fence.attempt == 1
        assert len(rows(ledger, t.tasks)) == 1


def test_a_pass_of_work_done_together_takes_one_connection_and_outlives_its_loss(ledger_url: str) -> None:
    """In a process that keeps none: one for all of its statements, given back at the end."""
    with open_ledger(ledger_url) as ledger, open_ledger(ledger_url) as other:
        opened: list[Any] = []
        closed: list[Any] = []
        sa.event.listen(ledger.engine, "connect", lambda connection, _record: opened.append(connection))
        sa.event.listen(ledger.engine, "close", lambda connection, _record: closed.append(connection))
        with ledger.together():
            task = submit(ledger)
            with ledger.together():
                assert see(ledger, task).status is PENDING
            assert ledger.cancel(task.id) is not None
            assert len(opened) == 1
            assert see(other, task).status is CANCELED  # each was a transaction of its own
            if ledger.is_postgresql:
                run_sql(
                    other,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
                )
            else:
                opened[0].close()
            with contextlib.suppress(LedgerUnavailable):
                ledger.ping()
            assert see(ledger, task).status is CANCELED
        assert see(ledger, task).status is CANCELED

    assert len(opened) == 3
    assert len(closed) >= 2


@pytest.mark.parametrize("pooler", ["refuses options", "is said to be there"])
def test_behind_a_pooler_each_transaction_has_our_time_outs(postgres_ledger_url: str, pooler: str) -> None:
    """What may not be sent when connecting is set in the transaction, and goes with it."""
    query = sa.text("SELECT name, setting FROM pg_settings WHERE name LIKE '%_timeout'")
    with contextlib.ExitStack() as stack:
        url, refused = stack.enter_context(refusing_options(postgres_ledger_url))
        ledger = Ledger.connect(url, server_settings=pooler == "refuses options")
        stack.callback(ledger.close)
        ledger.ping()
        ledger.ping()
        with ledger.engine.connect() as connection:
            inside = {row.name: row.setting for row in connection.execute(query)}

    assert {name: inside[name] for name in ("lock_timeout", "statement_timeout")} == {
        "lock_timeout": "10000",
        "statement_timeout": "15000",
    }
    assert inside["idle_in_transaction_session_timeout"] == "5000"
    assert refused == [False] * 3 if pooler == "is said to be there" else [True, False, False, False]


def test_a_restart_of_postgresql_costs_a_pooled_connection_no_error(
    postgres_ledger_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """A connection that died while idle is replaced once: nothing was done on it yet."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(proxy.url_of(postgres_ledger_url), pool_size=1) as ledger:
        ledger.ping()
        proxy.cut()
        assert submit(ledger).attempt == 0
        assert len(rows(ledger, t.tasks)) == 1


# -- storms ---------------------------------------------------------------------------------------


def one_life(ledger: Ledger, task_id: str, dice: random.Random) -> None:
    """A worker that takes a task and ends it in some way."""
    held = try_claim(ledger, task_id, servers=["gpu1", "gpu2"])
    if held is None:
        return
    fence = held.fence
    ledger.assign_server(fence, None, ["gpu1", "gpu2"])
    adopted = held.predecessors[0] if held.predecessors and dice.random() < 0.7 else None
    ledger.record_prompt(
        fence,
        server=str(adopted.server) if adopted else "gpu1",
        prompt_id=str(adopted.prompt_id) if adopted else str(uuid.uuid4()),
        client_id="c",
        adopted=adopted is not None,
    )
    ledger.record_running(fence)
    ledger.record_rendered(fence)
    end = dice.random()
    if end < 0.3:
        ledger.finish(fence, COMPLETED, outputs=[output()])
    elif end < 0.6:
        ledger.retry_later(fence, OOM, delay_s=0, leaves_prompt=dice.random() < 0.5)
    elif end < 0.9:
        ledger.hand_back(fence, adopt_wait_s=0)


def test_storms_of_all_verbs_make_no_deadlock_and_leave_a_whole_ledger(ledger_url: str) -> None:
    """Workers, sweepers, relays and callers at once on the same few tasks: every statement is answered."""
    failures: list[BaseException] = []
    ids: list[str] = []
    over = threading.Event()

    def sweep(ledger: Ledger, dice: random.Random) -> None:
        for lease in ledger.stale_leases(-1.0):
            ledger.reap(StaleLease(lease.fence, "w", 1, expired=False), missed_s=-1.0, max_lost=50)
        ledger.release_bindings([])
        ledger.expire()
        ledger.put_back(ledger.overdue(0.0))

    def beat(ledger: Ledger, dice: random.Random) -> None:
        ledger.renew([row["claim"] for row in rows(ledger, t.leases)], 15.0)

    def relay(ledger: Ledger, dice: random.Random) -> None:
        batch = ledger.take_bound([("comfy", "gpu1"), ("comfy", "gpu2")]) + ledger.take("comfy", 3, 10)
        dice.shuffle(batch)
        ledger.put_back(batch)

    def call(ledger: Ledger, dice: random.Random) -> None:
        ids.append(submit(ledger, expires_in_s=dice.choice([None, 0, 1]), max_attempts=50).id)
        if dice.random() < 0.2:
            ledger.cancel(dice.choice(ids[-8:]))
        for stray in ledger.strays_on(["gpu1", "gpu2"]):
            ledger.forget_stray(stray)

    def work(ledger: Ledger, dice: random.Random) -> None:
        if ids:
            one_life(ledger, dice.choice(ids[-4:]), dice)

    def run(part: Callable[[Ledger, random.Random], None], seed: int) -> None:
        dice = random.Random(seed)
        with open_ledger(ledger_url, pool_size=1) as ledger:
            try:
                while not over.is_set():
                    part(ledger, dice)
            except BaseException as error:  # noqa: BLE001  # whatever it is fails the test
                failures.append(error)
                over.set()

    crowd = 1 if ledger_url.startswith("sqlite") else 2
    # One beat: a lease is renewed by its own process alone, never by two at once.
    parts = [work] * 3 * crowd + [sweep, relay] * crowd + [beat, call]
    threads = [threading.Thread(target=run, args=(part, seed)) for seed, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    over.wait(4)
    with open_ledger(ledger_url) as ledger, contextlib.suppress(AssertionError):
        wait_until(lambda: over.is_set() or len(rows(ledger, t.attempts)) > 15, 25, every_s=0.5)
    over.set()
    for thread in threads:
        thread.join(40)

    assert not failures, failures
    with open_ledger(ledger_url) as ledger:
        running = {row["id"] for row in rows(ledger, t.tasks, t.tasks.c.status == "processing")}
        assert {row["task_id"] for row in rows(ledger, t.leases)} == running
        assert {
            row["task_id"] for row in rows(ledger, t.attempts, t.attempts.c.ended_at.is_(None))
        } == running
        for task in rows(ledger, t.tasks):
            attempts = rows(ledger, t.attempts, t.attempts.c.task_id == task["id"])
            assert sorted(row["number"] for row in attempts) == list(range(1, task["attempt"] + 1))
        assert len(rows(ledger, t.attempts)) > 10
