"""
How tasks and files go: by their owner's wish, by age, or because no row names their bytes any more.

Rows first. What deletes a row notes its bytes for removal in the same transaction, and nothing else
deletes bytes. So no row is left that answers with bytes that are gone, and a crash at any line leaves
bytes only for as long as it takes the next collector to come by. A key is never used a second time
(an attempt's number and an asset's id are part of it): whatever is noted for removal stays nobody's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.dispatching import Dispatching
from genpulse.ledger.requests import new_id
from genpulse.ledger.running import REMOVAL_PASSES_S
from genpulse.ledger.types import Timestamp, after, now
from genpulse.model import TaskStatus

__all__ = ["Removal", "Retiring"]

GONE_KEPT_S = 30 * 86_400.0
"""How long it is remembered that a task was deleted."""


@dataclass(frozen=True, slots=True)
class Removal:
    """Bytes to delete: all of a task's, one attempt's, or the one object under *key*."""

    id: str
    task_id: str | None
    attempt: int | None
    key: str | None
    age_s: float
    """How long ago its last writer ended; another pass follows if one may still be at it."""


class Retiring(Dispatching):
    """The statements of deletion, of retention and of the collector."""

    def delete_task(self, task_id: str, owner: str | None = None) -> TaskStatus | None:
        """
        Delete a final task with all its rows; its bytes follow.

        Returns:
            The status it had, or ``None`` if there is none for this owner. If that is not final,
            nothing was deleted.
        """

        def delete(connection: sa.Connection) -> TaskStatus | None:
            task = t.tasks.c
            query = sa.select(task.status).where(task.id == task_id).with_for_update()
            if owner is not None:
                query = query.where(task.owner == owner)
            found = connection.execute(query).scalar()
            if found is None:
                return None
            status = TaskStatus(found)
            if status.is_final:
                self._delete(connection, [task_id])
            return status

        return self._write(delete)

    def was_deleted(self, task_id: str, owner: str) -> bool:
        """Whether this owner had a task of this id, which was deleted not long ago."""
        removal = t.removals.c
        query = sa.select(sa.literal(1)).where(
            removal.task_id == task_id, removal.attempt.is_(None), removal.owner == owner
        )
        return self._read(lambda connection: connection.execute(query).first()) is not None

    def retire_tasks(self, older_than_s: float, *, limit: int = 200) -> int:
        """
        Delete final tasks that ended so long ago, the oldest first, in a bounded transaction.

        One whose outputs a living task needs, or whose webhook is still to be delivered, stays for as long.

        Returns:
            How many; fewer than *limit* means that this was all.
        """
        task = t.tasks.c
        # Spelled like the index's condition. The comparison alone would do, but not for SQLite.
        old = (task.completed_at.is_not(None), task.completed_at <= after(-older_than_s))
        if not self._any(sa.select(task.id).where(*old)):
            return 0
        delivery = t.webhook_deliveries.c
        untold = sa.exists().where(delivery.task_id == task.id, delivery.status == "pending")
        chosen = (
            sa.select(task.id)
            .where(*old, ~_needed(task.id, by_living=True), ~untold)
            .order_by(task.completed_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )

        def delete(connection: sa.Connection) -> int:
            ids = connection.execute(chosen).scalars().all()
            # Asked again, now that they are locked: a task may have come in that needs one of them.
            needed = sa.select(task.id).where(task.id.in_(ids), _needed(task.id, by_living=True))
            kept = set(connection.execute(needed).scalars())
            self._delete(connection, [each for each in ids if each not in kept])
            return len(ids)

        return self._write(delete)

    def _delete(self, connection: sa.Connection, ids: Collection[str]) -> None:
        """Delete these tasks, which are final and locked; note their bytes."""
        if not ids:
            return
        task = t.tasks.c
        rows = connection.execute(sa.select(task.id, task.owner, task.completed_at).where(task.id.in_(ids)))
        connection.execute(
            sa.insert(t.removals).values(due_at=now()),
            [
                {"id": new_id(), "task_id": row.id, "owner": row.owner, "ended_at": row.completed_at}
                for row in rows
            ],
        )
        # Attempts, outputs, inputs, idempotency keys: all that hangs on a task goes along.
        connection.execute(sa.delete(t.tasks).where(task.id.in_(ids)))

    def retire_assets(self, older_than_s: float, *, limit: int = 200) -> int:
        """
        Delete uploads that no task needs and that were last sent so long ago, in a bounded transaction.

        The stored object goes with the last asset that shares it.

        Returns:
            How many; fewer than *limit* means that this was all.
        """
        asset = t.assets.c
        old = (
            asset.created_at <= after(-older_than_s),
            sa.func.coalesce(asset.uploaded_again_at, asset.created_at, type_=Timestamp())
            <= after(-older_than_s),
            ~_needed(asset.id),
        )
        if not self._any(sa.select(asset.id).where(*old)):
            return 0
        oldest = sa.select(asset.key).where(*old).order_by(asset.created_at).limit(limit)

        def delete(connection: sa.Connection) -> int:
            keys = sorted(set(connection.execute(oldest).scalars()))
            # All who share an object, in one order for all who lock.
            sharing = sa.select(asset.id).where(asset.key.in_(keys)).order_by(asset.id)
            locked = connection.execute(sharing.with_for_update()).scalars().all()
            # Asked again under the locks: one may be in use, or young, since.
            gone = (
                connection.execute(sa.delete(t.assets).where(asset.id.in_(locked), *old).returning(asset.key))
                .scalars()
                .all()
            )
            left = set(connection.execute(sa.select(asset.key).where(asset.key.in_(keys))).scalars())
            if unshared := sorted(set(gone) - left):
                connection.execute(
                    sa.insert(t.removals).values(ended_at=now(), due_at=now()),
                    [{"id": new_id(), "key": key} for key in unshared],
                )
            return len(gone)

        return self._write(delete)

    # -- bytes --------------------------------------------------------------------------------

    def take_removals(self, *, limit: int = 50, for_s: float = 300.0) -> list[Removal]:
        """
        Take removals that are due. Two collectors do not take the same for *for_s* seconds.

        What a row names after all is never among them.
        """
        removal = t.removals.c
        due = sa.select(removal.id).where(removal.due_at.is_not(None), removal.due_at <= now())
        if not self._any(due):
            return []
        named = sa.or_(
            sa.exists().where(t.outputs.c.task_id == removal.task_id, t.outputs.c.attempt == removal.attempt),
            sa.and_(removal.attempt.is_(None), sa.exists().where(t.tasks.c.id == removal.task_id)),
            sa.exists().where(t.assets.c.key == removal.key),
        )
        chosen = (
            due.where(~named)
            .order_by(removal.due_at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=t.removals)
            .cte("chosen")
        )
        statement = (
            sa.update(t.removals)
            .where(removal.id.in_(sa.select(chosen.c.id)))
            .values(due_at=after(for_s))
            .returning(
                removal.id,
                removal.task_id,
                removal.attempt,
                removal.key,
                removal.ended_at,
                now().label("now"),
            )
        )
        rows = self._write(lambda connection: connection.execute(statement).all())
        return [
            Removal(row.id, row.task_id, row.attempt, row.key, (row.now - row.ended_at).total_seconds())
            for row in rows
        ]

    def removed(self, removal: Removal) -> None:
        """
        The bytes were deleted. Another pass follows while a writer that was fenced off may be at work.

        Of a deleted task the row stays a while, and tasks that retried it forget it.
        """
        column = t.removals.c
        whole_task = removal.task_id is not None and removal.attempt is None
        later = [at for at in REMOVAL_PASSES_S if at > removal.age_s]

        def settle(connection: sa.Connection) -> None:
            if whole_task:
                connection.execute(
                    sa.update(t.tasks).where(t.tasks.c.retry_of == removal.task_id).values(retry_of=None)
                )
            if later or whole_task:
                due = after(later[0] - removal.age_s) if later else None
                connection.execute(sa.update(t.removals).where(column.id == removal.id).values(due_at=due))
            else:
                connection.execute(sa.delete(t.removals).where(column.id == removal.id))

        self._write(settle)

    def forget_deleted(self) -> int:
        """Forget tasks that were deleted long ago, in a bounded batch."""
        removal = t.removals.c
        old = sa.select(removal.id).where(removal.due_at.is_(None), removal.ended_at <= after(-GONE_KEPT_S))
        if not self._any(old):
            return 0
        statement = sa.delete(t.removals).where(removal.id.in_(old.limit(1000)))
        return self._write(lambda connection: connection.execute(statement).rowcount)

    def _any(self, query: sa.Select[tuple[str]]) -> bool:
        """Whether there is anything to do: a read, which never waits for the write lock of SQLite."""
        return self._read(lambda connection: connection.execute(query.limit(1)).first()) is not None


def _needed(source_id: sa.Column[str], *, by_living: bool = False) -> sa.ColumnElement[bool]:
    """Whether a task (a living one) names this asset or task."""
    inputs = t.task_inputs.c
    if not by_living:
        return sa.exists().where(inputs.source_id == source_id)
    user = t.tasks.alias("user_of_it")
    return sa.exists().where(
        inputs.source_id == source_id, user.c.id == inputs.task_id, user.c.completed_at.is_(None)
    )
