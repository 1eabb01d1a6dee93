"""What a caller is told when the ledger goes away in the middle of a submission, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from genpulse.errors import LedgerUnavailable

TASK: dict[str, Any] = {"task_type": "echo", "params": {"text": "hi"}}


@contextmanager
def answers_lost(api: Any, *, committed: bool, reads: bool = True) -> Iterator[None]:
    """
    The connection breaks at the next commits: once they are done, or before.

    Args:
        reads: Whether the ledger answers again, to whoever reads back.
    """
    engine = api.service.ledger.engine

    def commit(connection: sa.Connection) -> None:
        if not connection.get_execution_options()["genpulse_read_only"]:
            if committed:
                connection.exec_driver_sql("COMMIT")
            raise sa.exc.OperationalError("COMMIT", {}, Exception("the server closed the connection"))

    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options()["genpulse_read_only"] and began and not reads:
            raise sa.exc.OperationalError("BEGIN", {}, Exception("connection refused"))
        began.append(True)

    began: list[bool] = []
    api.service.admission.check("default")  # counts what waits, and remembers it for a second
    api.client.get("/task")  # as the door does with the first key
    sa.event.listen(engine, "commit", commit)
    sa.event.listen(engine, "begin", begin)
    try:
        yield
    finally:
        sa.event.remove(engine, "commit", commit)
        sa.event.remove(engine, "begin", begin)


def send(api: Any, what: str, **headers: str) -> Any:
    """Submit a task, or a batch of two."""
    if what == "task":
        return api.client.post("/task", json=TASK, headers=headers)
    return api.client.post("/task/batch", json={"tasks": [TASK, TASK]}, headers=headers)


@pytest.mark.parametrize("what", ["task", "batch"])
def test_a_commit_whose_answer_was_lost_is_read_back(api: Any, what: str) -> None:
    """It was recorded, so it is accepted, and nobody sends it a second time."""
    with answers_lost(api, committed=True):
        answer = send(api, what, **{"Idempotency-Key": "k"})

    assert answer.status_code == 202, answer.text
    assert "Idempotency-Replayed" not in answer.headers
    assert api.rows("tasks") == (1 if what == "task" else 2)
    again = send(api, what, **{"Idempotency-Key": "k"})
    assert again.headers["Idempotency-Replayed"] == "true"
    name = "task_id" if what == "task" else "task_ids"
    assert again.json[name] == answer.json[name]


@pytest.mark.parametrize("what", ["task", "batch"])
@pytest.mark.parametrize("committed", [True, False])
def test_what_cannot_be_read_back_is_in_doubt(api: Any, what: str, committed: bool) -> None:
    """The caller is not told that nothing was accepted, but how to repeat it safely."""
    key = {"Idempotency-Key": "k"}
    with answers_lost(api, committed=committed, reads=False):
        answer = send(api, what, **key)

    assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (503, "unavailable", True)
    assert "nothing was accepted" not in answer.text
    assert "not known" in answer.json["detail"]
    assert "Idempotency-Key" in answer.json["detail"]
    again = send(api, what, **key)
    assert again.status_code == 202
    assert ("Idempotency-Replayed" in again.headers) is committed
    assert api.rows("tasks") == (1 if what == "task" else 2)


@pytest.mark.parametrize("what", ["task", "batch"])
def test_what_follows_the_commit_is_a_courtesy(api: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger goes away right behind it: 202 with what is known."""

    def away(*_: object, **__: object) -> Any:
        raise LedgerUnavailable("away")

    for name in ("get", "get_batch", "queue_position", "batch_task_ids"):
        monkeypatch.setattr(api.service.ledger, name, away)

    answer = send(api, what)

    assert answer.status_code == 202, answer.text
    if what == "task":
        assert answer.json["queue_position"] is None
    else:
        monkeypatch.undo()
        assert answer.json["task_ids"] == api.service.ledger.batch_task_ids(
            answer.json["batch_id"], "default"
        )


def test_to_wait_is_a_courtesy_too(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Prefer: wait`` without a ledger to wait for is a plain 202."""

    def away(*_: object, **__: object) -> Any:
        raise LedgerUnavailable("away")

    monkeypatch.setattr(api.service.ledger, "get", away)

    answer = send(api, "task", Prefer="wait=5")

    assert answer.status_code == 202, answer.text
    assert "Preference-Applied" not in answer.headers
    assert api.rows("tasks") == 1


def test_a_ledger_that_was_away_before_accepted_nothing(api: Any) -> None:
    """Then it may be said so."""
    engine = api.service.ledger.engine

    def begin(_: sa.Connection) -> None:
        raise sa.exc.OperationalError("BEGIN", {}, Exception("connection refused"))

    sa.event.listen(engine, "begin", begin)
    answer = send(api, "task")
    sa.event.remove(engine, "begin", begin)

    assert answer.status_code == 503
    assert "nothing was accepted" in answer.json["detail"]


def test_a_cancel_that_cannot_be_read_back_is_safe_to_repeat(api: Any) -> None:
    """It was committed, and the answer does not say that it was not."""
    task_id = api.submit()["task_id"]
    began: list[bool] = []

    def begin(connection: sa.Connection) -> None:
        if began and connection.get_execution_options()["genpulse_read_only"]:
            raise sa.exc.OperationalError("BEGIN", {}, Exception("connection refused"))
        began.append(not connection.get_execution_options()["genpulse_read_only"])

    api.client.get("/task")
    engine = api.service.ledger.engine
    sa.event.listen(engine, "begin", begin)
    answer = api.client.post(f"/task/{task_id}/cancel")
    sa.event.remove(engine, "begin", begin)

    assert answer.status_code == 503
    assert "nothing was accepted" not in answer.text
    assert api.client.post(f"/task/{task_id}/cancel").json["status"] == "canceled"
