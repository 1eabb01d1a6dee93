"""
Batches: many tasks recorded in one transaction, read and canceled by one id.

All or nothing. What the tasks' params have in common is stored once, with the batch
(:mod:`genpulse.ledger.sharing`); from then on each is a task like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.requests import (
    CANCELED,
    INSERT,
    IdempotencyConflict,
    KeyTaken,
    Requests,
    is_id,
    new_id,
    task_from_row,
    values_of,
)
from genpulse.ledger.sharing import split
from genpulse.ledger.types import after, now
from genpulse.model import Batch, NewTask, Task, TaskStatus

__all__ = ["Batches"]

_TIDY_AFTER_S = 3600.0


class Batches(Requests):
    """The statements about tasks that were submitted together."""

    def submit_batch(
        self,
        tasks: Sequence[NewTask],
        *,
        grid: Sequence[str] = (),
        idempotency_key: str | None = None,
        api_key: str = "",
        body_hash: str = "",
        idempotency_ttl_s: int = 86_400,
    ) -> tuple[Batch, bool]:
        """
        Record tasks of one owner, all of them or none; from the commit on they are accepted.

        Args:
            tasks: At least one. They run in this order where nothing else decides.
            grid: Names of the params that vary, to be told to readers.
            idempotency_key: As for a single task, and of the same kind: a key that brought about a
                task is taken for a batch as well.
            api_key: The id of the API key that was shown; callers without one share a word.

        Returns:
            The batch with its ``task_ids``, and whether it is an earlier one (a replay); that has none.

        Raises:
            IdempotencyConflict: The key was used with another body.
            SourceGone: A file or task that one of them names was deleted meanwhile.
            LedgerUnavailable: Nothing was recorded, or it is in doubt.
        """
        batch_id, owner = new_id(), tasks[0].owner
        # In the order of the tasks, for that is the order of the line: priority, time, id.
        by_id = dict(zip(sorted(new_id() for _ in tasks), tasks, strict=True))
        shared, own = split([new.params for new in tasks])
        rows = [
            values_of(task_id, new) | {"params": params, "batch_index": index}
            for index, ((task_id, new), params) in enumerate(zip(by_id.items(), own, strict=True))
        ]
        assets = set[str]().union(*(new.assets for new in tasks))
        sources = set[str]().union(*(new.source_tasks for new in tasks))

        def record(connection: sa.Connection) -> Batch:
            batch = {
                "id": batch_id,
                "owner": owner,
                "size": len(tasks),
                "shared_params": shared,
                "grid": list(grid),
            }
            row = (
                connection.execute(sa.insert(t.batches).values(created_at=now()).returning(t.batches), batch)
                .mappings()
                .one()
            )
            if idempotency_key is not None:
                self._take_key(
                    connection,
                    owner=owner,
                    api_key=api_key,
                    key=idempotency_key,
                    body_hash=body_hash,
                    batch_id=batch_id,
                    expires_at=after(idempotency_ttl_s),
                )
            self._hold_sources(connection, owner, assets, sources)
            connection.execute(INSERT.values(batch_id=batch_id), rows)
            self._insert_beside(connection, by_id)
            return _batch(row, {TaskStatus.PENDING: len(tasks)}, task_ids=tuple(by_id))

        def recorded(connection: sa.Connection) -> Batch | None:
            found = _read_batch(connection, batch_id=batch_id, owner=owner)
            return found and dataclasses.replace(found, task_ids=tuple(by_id))

        while True:
            with contextlib.suppress(KeyTaken):
                return self._write_or_find(record, recorded), False
            earlier = self.find_batch_replay(owner, str(idempotency_key), body_hash, api_key=api_key)
            if earlier is not None:
                return earlier, True

    def find_batch_replay(self, owner: str, key: str, body_hash: str, *, api_key: str = "") -> Batch | None:
        """
        The batch that a request with this key has brought about before.

        Raises:
            IdempotencyConflict: The key was used with another body.
        """
        column = t.idempotency_keys.c
        query = sa.select(column.body_hash, column.batch_id).where(
            column.owner == owner, column.api_key == api_key, column.key == key
        )
        row = self._read(lambda connection: connection.execute(query).first())
        if row is None:
            return None
        if row.body_hash != body_hash or row.batch_id is None:
            msg = "this Idempotency-Key was used before with another body"
            raise IdempotencyConflict(msg)
        return self.get_batch(row.batch_id, owner)

    def get_batch(self, batch_id: str, owner: str | None = None) -> Batch | None:
        """
        Read a batch: how many of its tasks are in which state.

        Args:
            owner: If given, somebody else's batch is as unknown as one that does not exist.
        """
        if not is_id(batch_id := batch_id.lower()):
            return None
        return self._read(functools.partial(_read_batch, batch_id=batch_id, owner=owner))

    def batch_tasks(self, batch_id: str, owner: str, *, after_index: int = -1, limit: int = 50) -> list[Task]:
        """A batch's tasks in the order of their submission, with whole params."""
        task = t.tasks.c
        query = (
            sa.select(t.tasks)
            .where(task.batch_id == batch_id, task.owner == owner, task.batch_index > after_index)
            .order_by(task.batch_index)
            .limit(limit)
        )
        shared = sa.select(t.batches.c.shared_params).where(t.batches.c.id == batch_id)

        def read(connection: sa.Connection) -> list[Task]:
            rows = connection.execute(query).mappings().all()
            # Once, and not joined to each row: it may be a workflow of a megabyte.
            common = connection.execute(shared).scalar_one_or_none() if rows else None
            return [task_from_row({**row, "shared_params": common}) for row in rows]

        return self._read(read)

    def batch_task_ids(self, batch_id: str, owner: str) -> list[str]:
        """The ids of a batch's tasks in the order of their submission."""
        task = t.tasks.c
        query = (
            sa.select(task.id)
            .where(task.batch_id == batch_id, task.owner == owner)
            .order_by(task.batch_index)
        )
        return list(self._read(lambda connection: connection.execute(query).scalars().all()))

    def cancel_batch(self, batch_id: str, owner: str | None = None) -> Batch | None:
        """
        End all its waiting tasks now, and ask the workers of the running ones to stop; safe to repeat.

        Returns:
            The batch as it now is, or ``None`` if there is none for this owner.
        """
        if not is_id(batch_id := batch_id.lower()):
            return None
        task, lease = t.tasks.c, t.leases.c

        def request(connection: sa.Connection) -> Batch | None:
            if _read_batch(connection, batch_id=batch_id, owner=owner) is None:
                return None
            mine = (task.batch_id == batch_id, task.completed_at.is_(None))
            # In one order for all who lock several rows. Afterwards nobody changes them but us.
            locked = sa.select(task.id, task.status).where(*mine).order_by(task.id).with_for_update()
            rows = connection.execute(locked).all()
            running = [row.id for row in rows if row.status == TaskStatus.PROCESSING]
            asked = {"cancel_requested_at": now(), "updated_at": now()}
            ended = asked | {
                "status": TaskStatus.CANCELED,
                "completed_at": now(),
                "error": CANCELED.as_dict(),
            }
            untold = task.cancel_requested_at.is_(None)
            # The running ones first: the others are not "mine" any more once they are final.
            connection.execute(
                sa.update(t.tasks).where(*mine, task.status == TaskStatus.PROCESSING, untold).values(**asked)
            )
            connection.execute(
                sa.update(t.tasks).where(*mine, task.status == TaskStatus.PENDING).values(**ended)
            )
            # One at a time: a worker renews its leases in an order of its own, all in one statement.
            for task_id in running:
                connection.execute(
                    sa.update(t.leases).where(lease.task_id == task_id).values(cancel_requested=True)
                )
            if rows:
                self._notify(connection, "cancel")
            return _read_batch(connection, batch_id=batch_id, owner=owner)

        return self._write(request)

    def forget_empty_batches(self) -> int:
        """
        Drop batches whose tasks were all deleted, in a bounded number. Returns how many.

        One whose shared params a retry uses stays until that is gone as well.
        """
        batch = t.batches.c
        empty = (
            sa.select(batch.id)
            .where(
                batch.created_at < after(-_TIDY_AFTER_S),
                ~sa.exists().where(t.tasks.c.batch_id == batch.id),
                ~sa.exists().where(t.tasks.c.params_of == batch.id),
            )
            .limit(500)
        )
        if self._read(lambda connection: connection.execute(empty.limit(1)).first()) is None:
            return 0
        statement = sa.delete(t.batches).where(batch.id.in_(empty))
        return self._write(lambda connection: connection.execute(statement).rowcount)


def _read_batch(connection: sa.Connection, *, batch_id: str, owner: str | None) -> Batch | None:
    query = sa.select(t.batches).where(t.batches.c.id == batch_id)
    if owner is not None:
        query = query.where(t.batches.c.owner == owner)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    task = t.tasks.c
    counts = (
        sa.select(
            task.status,
            sa.func.count().label("number"),
            sa.func.count(task.cancel_requested_at).label("stopping"),
            sa.func.max(task.updated_at).label("updated_at"),
            sa.func.max(task.completed_at).label("ended_at"),
        )
        .where(task.batch_id == batch_id)
        .group_by(task.status)
    )
    by_status = {TaskStatus(found.status): found for found in connection.execute(counts)}
    processing = by_status.get(TaskStatus.PROCESSING)
    final = all(status.is_final for status in by_status)
    ends = [found.ended_at for found in by_status.values() if found.ended_at is not None]
    return _batch(
        row,
        {status: found.number for status, found in by_status.items()},
        stopping=processing.stopping if processing else 0,
        updated_at=max((found.updated_at for found in by_status.values()), default=None),
        ended_at=max(ends, default=None) if final else None,
    )


def _batch(row: sa.RowMapping, counts: Mapping[TaskStatus, int], **more: Any) -> Batch:
    return Batch(
        id=row["id"],
        owner=row["owner"],
        size=row["size"],
        created_at=row["created_at"],
        grid=tuple(row["grid"]),
        counts={status: counts.get(status, 0) for status in TaskStatus},
        **more,
    )
