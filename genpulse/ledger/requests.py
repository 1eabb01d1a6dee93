"""What callers ask of the ledger: submit, read, list and cancel tasks; keep and find assets."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
import uuid_utils

from genpulse.errors import GenPulseError
from genpulse.ledger import tables as t
from genpulse.ledger.keys import Keys
from genpulse.ledger.types import after, now
from genpulse.model import (
    Asset,
    Attempt,
    AttemptOutcome,
    ErrorInfo,
    NewTask,
    Output,
    OutputKind,
    Priority,
    Task,
    TaskStatus,
)

__all__ = ["IdempotencyConflict", "Requests", "new_id"]

CANCELED = ErrorInfo(code="canceled", message="The task was canceled.")

POSITION_LIMIT = 10_000


class IdempotencyConflict(GenPulseError):
    """The key was used before, with another body."""


class _KeyTaken(Exception):  # never leaves this module: it only rolls the insert back
    """Somebody else's row holds the idempotency key."""


def new_id() -> str:
    """A UUIDv7: unique without asking anybody, and in order of time."""
    return str(uuid_utils.uuid7())


def task_from_row(
    row: sa.RowMapping, *, outputs: Sequence[Output] = (), attempts: Sequence[Attempt] = ()
) -> Task:
    """Build the frozen record from a row of ``tasks``."""
    return Task(
        id=row["id"],
        owner=row["owner"],
        task_type=row["task_type"],
        queue=row["queue"],
        priority=Priority.from_step(row["priority"]),
        status=TaskStatus(row["status"]),
        params=row["params"],
        attempt=row["attempt"],
        max_attempts=row["max_attempts"],
        timeout_s=row["timeout_s"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        metadata=row["metadata"],
        callback_url=row["callback_url"],
        retry_of=row["retry_of"],
        started_at=row["started_at"],
        completed_at=row["completed_at"],
        expires_at=row["expires_at"],
        available_at=row["available_at"],
        cancel_requested_at=row["cancel_requested_at"],
        bound_server=row["bound_server"],
        error=ErrorInfo.from_dict(row["error"]),
        run_s=row["run_s"],
        store_s=row["store_s"],
        outputs=tuple(outputs),
        attempts=tuple(attempts),
    )


def attempt_from_row(row: sa.RowMapping) -> Attempt:
    """Build the frozen record from a row of ``attempts``."""
    return Attempt(
        task_id=row["task_id"],
        number=row["number"],
        worker=row["worker"],
        started_at=row["started_at"],
        server=row["server"],
        prompt_id=row["prompt_id"],
        client_id=row["client_id"],
        submitted_at=row["submitted_at"],
        ended_at=row["ended_at"],
        outcome=AttemptOutcome(row["outcome"]) if row["outcome"] else None,
        error=ErrorInfo.from_dict(row["error"]),
    )


def _output_from_row(row: sa.RowMapping) -> Output:
    return Output(
        node_id=row["node_id"],
        name=row["name"],
        kind=OutputKind(row["kind"]),
        content_type=row["content_type"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        key=row["key"],
        width=row["width"],
        height=row["height"],
        index=row["index"],
    )


class Requests(Keys):
    """The statements behind the API's routes."""

    def submit(
        self,
        new: NewTask,
        *,
        idempotency_key: str | None = None,
        body_hash: str = "",
        idempotency_ttl_s: int = 86_400,
    ) -> tuple[Task, bool]:
        """
        Record a task; from the commit on it is accepted.

        Key and task are one transaction: of any number of callers with the same key, one records
        a task and the others get that task.

        Args:
            idempotency_key: The caller's key, unique per owner while it is kept.
            body_hash: Digest of the request; the same key with another digest is a conflict.

        Returns:
            The task, and whether it is an earlier one (a replay).

        Raises:
            IdempotencyConflict: The key was used with another body.
            LedgerUnavailable: Nothing is known to be recorded.
        """
        task_id = new_id()

        def record(connection: sa.Connection) -> Task:
            row = (
                connection.execute(
                    sa.insert(t.tasks)
                    .values(
                        id=task_id,
                        owner=new.owner,
                        task_type=new.task_type,
                        queue=new.queue,
                        priority=new.priority.step,
                        status=TaskStatus.PENDING,
                        params=dict(new.params),
                        metadata=dict(new.metadata),
                        callback_url=new.callback_url,
                        retry_of=new.retry_of,
                        timeout_s=new.timeout_s,
                        max_attempts=new.max_attempts,
                        created_at=now(),
                        updated_at=now(),
                        available_at=now(),
                        expires_at=after(new.expires_in_s) if new.expires_in_s is not None else None,
                    )
                    .returning(t.tasks)
                )
                .mappings()
                .one()
            )
            if idempotency_key is not None:
                key_of_owner = (
                    t.idempotency_keys.c.owner == new.owner,
                    t.idempotency_keys.c.key == idempotency_key,
                )
                connection.execute(
                    sa.delete(t.idempotency_keys).where(
                        *key_of_owner, t.idempotency_keys.c.expires_at <= now()
                    )
                )
                taken = connection.execute(
                    self._insert(t.idempotency_keys)
                    .values(
                        owner=new.owner,
                        key=idempotency_key,
                        body_hash=body_hash,
                        task_id=task_id,
                        expires_at=after(idempotency_ttl_s),
                    )
                    .on_conflict_do_nothing()
                    .returning(t.idempotency_keys.c.task_id)
                ).first()
                if taken is None:
                    raise _KeyTaken
            return task_from_row(row)

        try:
            return self._write(record), False
        except _KeyTaken:
            return self._replay(new.owner, str(idempotency_key), body_hash), True

    def _replay(self, owner: str, key: str, body_hash: str) -> Task:
        def find(connection: sa.Connection) -> sa.RowMapping | None:
            query = (
                sa.select(t.tasks, t.idempotency_keys.c.body_hash)
                .join(t.idempotency_keys, t.idempotency_keys.c.task_id == t.tasks.c.id)
                .where(t.idempotency_keys.c.owner == owner, t.idempotency_keys.c.key == key)
            )
            return connection.execute(query).mappings().first()

        row = self._read(find)
        if row is None or row["body_hash"] != body_hash:
            msg = "this Idempotency-Key was used before with another body"
            raise IdempotencyConflict(msg)
        return task_from_row(row)

    def get(self, task_id: str, owner: str | None = None) -> Task | None:
        """
        Read one task with its outputs and attempts.

        Args:
            owner: If given, somebody else's task is as unknown as one that does not exist.
        """

        def read(connection: sa.Connection) -> Task | None:
            query = sa.select(t.tasks).where(t.tasks.c.id == task_id)
            if owner is not None:
                query = query.where(t.tasks.c.owner == owner)
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            outputs = connection.execute(
                sa.select(t.outputs).where(t.outputs.c.task_id == task_id).order_by(t.outputs.c.index)
            ).mappings()
            attempts = connection.execute(
                sa.select(t.attempts).where(t.attempts.c.task_id == task_id).order_by(t.attempts.c.number)
            ).mappings()
            return task_from_row(
                row,
                outputs=[_output_from_row(found) for found in outputs],
                attempts=[attempt_from_row(found) for found in attempts],
            )

        return self._read(read)

    def list_tasks(  # each is one filter of the public list
        self,
        owner: str,
        *,
        status: TaskStatus | None = None,
        task_type: str | None = None,
        created_after: dt.datetime | None = None,
        before_id: str | None = None,
        limit: int = 50,
    ) -> list[Task]:
        """
        List an owner's tasks, newest first, without outputs and attempts.

        Args:
            before_id: The last id of the page before; ids are in order of time, so that this
                keyset neither skips nor repeats a task while new ones arrive.
        """
        query = sa.select(t.tasks).where(t.tasks.c.owner == owner).order_by(t.tasks.c.id.desc()).limit(limit)
        if status is not None:
            query = query.where(t.tasks.c.status == status)
        if task_type is not None:
            query = query.where(t.tasks.c.task_type == task_type)
        if created_after is not None:
            query = query.where(t.tasks.c.created_at > created_after)
        if before_id is not None:
            query = query.where(t.tasks.c.id < before_id)
        return self._read(
            lambda connection: [task_from_row(row) for row in connection.execute(query).mappings()]
        )

    def queue_position(self, task: Task) -> int | None:
        """How many waiting tasks of its queue go before this one, plus 1; ``None`` unless pending."""
        if task.status is not TaskStatus.PENDING:
            return None
        ahead = (
            sa.select(sa.literal(1))
            .where(
                t.tasks.c.completed_at.is_(None),  # names the index, whose range this is
                t.tasks.c.status == TaskStatus.PENDING,
                t.tasks.c.queue == task.queue,
                sa.tuple_(t.tasks.c.priority, t.tasks.c.created_at, t.tasks.c.id)
                < sa.tuple_(
                    sa.literal(task.priority.step, t.tasks.c.priority.type),
                    sa.literal(task.created_at, t.tasks.c.created_at.type),
                    sa.literal(task.id, t.tasks.c.id.type),
                ),
            )
            .limit(POSITION_LIMIT)
            .subquery()
        )
        query = sa.select(sa.func.count()).select_from(ahead)
        return 1 + self._read(lambda connection: connection.execute(query).scalar_one())

    def cancel(self, task_id: str, owner: str | None = None) -> Task | None:
        """
        End a waiting task now, or ask the worker of a running one to stop it.

        Safe to repeat. A final task stays as it is. Committed before an attempt's ``finish``, the
        cancel wins.

        Returns:
            The task as it now is, or ``None`` if there is none for this owner.
        """

        def request(connection: sa.Connection) -> bool:
            query = (
                sa.select(t.tasks.c.status, t.tasks.c.queue).where(t.tasks.c.id == task_id).with_for_update()
            )
            if owner is not None:
                query = query.where(t.tasks.c.owner == owner)
            row = connection.execute(query).first()
            if row is None:
                return False
            values: dict[str, Any] = {"cancel_requested_at": now(), "updated_at": now()}
            if row.status == TaskStatus.PENDING:
                values |= {"status": TaskStatus.CANCELED, "completed_at": now(), "error": CANCELED.as_dict()}
            elif row.status != TaskStatus.PROCESSING:
                return True
            connection.execute(
                sa.update(t.tasks)
                .where(t.tasks.c.id == task_id, t.tasks.c.cancel_requested_at.is_(None))
                .values(**values)
            )
            connection.execute(
                sa.update(t.leases).where(t.leases.c.task_id == task_id).values(cancel_requested=True)
            )
            self._notify(connection, "cancel")
            return True

        return self.get(task_id, owner) if self._write(request) else None

    def counts(self) -> dict[str, dict[str, int]]:
        """Live tasks as ``{queue: {"pending": n, "processing": n}}``; final ones are not counted."""
        query = (
            sa.select(t.tasks.c.queue, t.tasks.c.status, sa.func.count())
            .where(t.tasks.c.completed_at.is_(None))
            .group_by(t.tasks.c.queue, t.tasks.c.status)
        )
        found: dict[str, dict[str, int]] = {}
        for queue, status, number in self._read(lambda connection: connection.execute(query).all()):
            found.setdefault(queue, {"pending": 0, "processing": 0})[status] = number
        return found

    def find_output(self, key: str) -> tuple[str, Output] | None:
        """The owner and record of the output stored under *key*."""
        query = (
            sa.select(t.outputs, t.tasks.c.owner)
            .join(t.tasks, t.tasks.c.id == t.outputs.c.task_id)
            .where(t.outputs.c.key == key)
        )
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else (row["owner"], _output_from_row(row))

    def add_asset(  # the columns of one row
        self, *, owner: str, key: str, name: str, content_type: str, size_bytes: int, sha256: str
    ) -> Asset:
        """
        Record an uploaded file whose bytes are stored already.

        The same bytes of the same owner are one asset: a repeated upload returns the first record.
        """

        def record(connection: sa.Connection) -> sa.RowMapping:
            found = (
                connection.execute(
                    sa.select(t.assets)
                    .where(t.assets.c.key == key, t.assets.c.owner == owner, t.assets.c.name == name)
                    .limit(1)
                )
                .mappings()
                .first()
            )
            if found is not None:
                return found
            return (
                connection.execute(
                    sa.insert(t.assets)
                    .values(
                        id=new_id(),
                        owner=owner,
                        key=key,
                        name=name,
                        content_type=content_type,
                        size_bytes=size_bytes,
                        sha256=sha256,
                        created_at=now(),
                    )
                    .returning(t.assets)
                )
                .mappings()
                .one()
            )

        return Asset(**self._write(record))

    def get_asset(self, asset_id: str, owner: str) -> Asset | None:
        """An owner's asset by id."""
        query = sa.select(t.assets).where(t.assets.c.id == asset_id, t.assets.c.owner == owner)
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else Asset(**row)

    def find_asset(self, key: str) -> Asset | None:
        """An asset by its storage key."""
        query = sa.select(t.assets).where(t.assets.c.key == key).limit(1)
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else Asset(**row)

    def _notify(self, connection: sa.Connection, word: str) -> None:
        """Wake listeners when this transaction commits. SQLite has no such thing: Redis tells them."""
        if self.is_postgresql:
            connection.execute(sa.select(sa.func.pg_notify("genpulse", word)))
