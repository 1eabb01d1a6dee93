"""
What the relay and the sweeper ask: which tasks go to the broker, what it lost, who is alive.

No transaction is open while Redis is spoken to. Rows are taken with one short UPDATE; a batch that
Redis did not take is put back, and one whose relay died is found by :meth:`Dispatching.overdue`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.keys import OwnerRoom
from genpulse.ledger.running import Running
from genpulse.ledger.types import after, now
from genpulse.model import ErrorInfo, TaskStatus, WorkerInfo

__all__ = ["Dispatch", "Dispatching", "Waiting"]

EXPIRED = ErrorInfo(code="expired", message="The task was not started before its expiry time.")

_MAX_BATCH = 500


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A task taken out of the outbox, to be sent to the broker."""

    task_id: str
    task_type: str
    queue: str
    priority: int
    dispatched_at: dt.datetime
    server: str | None = None
    """The server it is bound to; the message goes to that server's own queue."""


class Waiting(NamedTuple):
    """What the outbox holds that may go to the broker now."""

    priorities: dict[str, list[int]]
    """By queue, the priorities that have unbound tasks."""
    bound: frozenset[tuple[str, str]]
    """The (queue, server) that have bound tasks."""


class Dispatching(Running):
    """The statements of the relay and the sweeper about the outbox and the workers."""

    def waiting(self) -> Waiting:
        """What has tasks in the outbox that may go now. One cheap read, for it is asked all the time."""
        task = t.tasks.c
        bound = (
            sa.select(task.queue, task.bound_server)
            .where(
                task.status == TaskStatus.PENDING,
                task.bound_server.is_not(None),
                task.dispatched_at.is_(None),
                task.available_at <= now(),
            )
            .distinct()
        )
        query = (
            sa.select(task.queue, task.priority)
            .where(
                task.status == TaskStatus.PENDING,
                task.dispatched_at.is_(None),
                task.bound_server.is_(None),
                task.available_at <= now(),
                sa.tuple_(task.queue, task.priority)
                > sa.tuple_(
                    sa.bindparam("queue", type_=sa.String), sa.bindparam("priority", type_=sa.Integer)
                ),
            )
            .order_by(task.queue, task.priority)
            .limit(1)
        )

        def leap(connection: sa.Connection) -> Waiting:
            # From one pair to the next along the index: a GROUP BY would read the whole backlog.
            found: dict[str, list[int]] = {}
            last = {"queue": "", "priority": -1}
            while (row := connection.execute(query, last).first()) is not None:
                found.setdefault(row.queue, []).append(row.priority)
                last = {"queue": row.queue, "priority": row.priority}
            return Waiting(found, frozenset((row[0], row[1]) for row in connection.execute(bound)))

        return self._read(leap)

    def runway(self) -> dict[str, dict[int, int]]:
        """How many waiting messages each queue has in the broker, by priority."""
        task = t.tasks.c
        query = (
            sa.select(task.queue, task.priority, sa.func.count())
            .where(
                task.status == TaskStatus.PENDING,
                task.dispatched_at.is_not(None),
                task.bound_server.is_(None),
            )
            .group_by(task.queue, task.priority)
        )
        found: dict[str, dict[int, int]] = {}
        for queue, priority, number in self._read(lambda connection: connection.execute(query).all()):
            found.setdefault(queue, {})[priority] = number
        return found

    def take(self, queue: str, priority: int, limit: int, room: OwnerRoom | None = None) -> list[Dispatch]:
        """
        Take the oldest tasks of one priority out of the outbox. Two relays never take the same.

        Args:
            room: What the owners have left; tasks of one that has none are passed over.
        """
        limit = min(limit, _MAX_BATCH)
        may_go = _may_go(queue, priority)
        oldest = sa.select(t.tasks.c.id).where(*may_go).order_by(t.tasks.c.created_at, t.tasks.c.id)
        if room is None or room.is_unlimited:
            return self._take(oldest.limit(limit).with_for_update(skip_locked=True))
        chosen = self._read(lambda connection: _oldest_with_room(connection, may_go, limit, room))
        if not chosen:
            return []
        still = sa.select(t.tasks.c.id).where(t.tasks.c.id.in_(chosen), *may_go)
        return self._take(still.with_for_update(skip_locked=True))

    def take_bound(self, served: Collection[tuple[str, str]]) -> list[Dispatch]:
        """Take bound tasks of these (queue, server), the ones that live workers consume."""
        if not served:
            return []
        task = t.tasks.c
        bound = (
            sa.select(task.id)
            .where(
                task.status == TaskStatus.PENDING,
                task.dispatched_at.is_(None),
                sa.tuple_(task.queue, task.bound_server).in_(sorted(served)),
                task.available_at <= now(),
            )
            .order_by(task.priority, task.created_at)
            .limit(_MAX_BATCH)
            .with_for_update(skip_locked=True)
        )
        return self._take(bound)

    def _take(self, chosen: sa.Select[tuple[str]]) -> list[Dispatch]:
        task = t.tasks.c
        # A common table, because PostgreSQL may run a LIMIT … FOR UPDATE subquery once for each row
        # of the outer table, and take more than the limit.
        rows_taken = chosen.cte("chosen")
        statement = (
            sa.update(t.tasks)
            .where(
                task.id.in_(sa.select(rows_taken.c.id)),
                task.status == TaskStatus.PENDING,
                task.dispatched_at.is_(None),
            )
            .values(dispatched_at=now())
            .returning(
                task.id,
                task.task_type,
                task.queue,
                task.priority,
                task.dispatched_at,
                task.bound_server,
                task.created_at,
            )
        )
        rows = self._write(lambda connection: connection.execute(statement).all())
        rows = sorted(rows, key=lambda row: (row.priority, row.created_at, row.id))
        return [
            Dispatch(row.id, row.task_type, row.queue, row.priority, row.dispatched_at, row.bound_server)
            for row in rows
        ]

    def put_back(self, dispatches: Sequence[Dispatch]) -> int:
        """Return tasks to the outbox whose message the broker did not take, or lost."""
        task = t.tasks.c

        def undo(connection: sa.Connection) -> int:
            return sum(
                connection.execute(
                    sa.update(t.tasks)
                    .where(
                        task.id == each.task_id,
                        task.status == TaskStatus.PENDING,
                        task.dispatched_at == each.dispatched_at,
                    )
                    .values(dispatched_at=None)
                ).rowcount
                for each in sorted(dispatches, key=lambda each: each.task_id)  # one order for all who lock
            )

        return self._write(undo) if dispatches else 0

    def overdue(self, older_than_s: float) -> list[Dispatch]:
        """Tasks that were sent to the broker so long ago and are not claimed yet."""
        task = t.tasks.c
        query = (
            sa.select(
                task.id, task.task_type, task.queue, task.priority, task.dispatched_at, task.bound_server
            )
            .where(task.status == TaskStatus.PENDING, task.dispatched_at <= after(-older_than_s))
            .order_by(task.dispatched_at)
            .limit(5000)
        )
        rows = self._read(lambda connection: connection.execute(query).all())
        return [Dispatch(*row) for row in rows]

    def expire(self) -> int:
        """Fail tasks that were not started before their expiry time. Returns how many."""
        task = t.tasks.c
        return self._sweep_pending(
            (task.attempt == 0, task.expires_at <= now()),
            status=TaskStatus.FAILED,
            completed_at=now(),
            error=EXPIRED.as_dict(),
        )

    def bound(self) -> set[tuple[str, str]]:
        """The (queue, server) to which waiting tasks are bound."""
        task = t.tasks.c
        query = (
            sa.select(task.queue, task.bound_server)
            .where(task.status == TaskStatus.PENDING, task.bound_server.is_not(None))
            .distinct()
        )
        rows = self._read(lambda connection: connection.execute(query).all())
        return {(row[0], row[1]) for row in rows}

    def release_bindings(
        self, served: Collection[tuple[str, str]], gone: Collection[tuple[str, str]] = ()
    ) -> int:
        """
        Free tasks bound to a server that no live worker serves, once they have waited long enough.

        Args:
            served: The (queue, server) that a live worker consumes.
            gone: Those whose server was dead for so long that it forgot every prompt: nothing is left
                to wait for.
        """
        task = t.tasks.c
        place = sa.tuple_(task.queue, task.bound_server)
        unserved = sa.and_(
            place.not_in(sorted(served)),
            sa.or_(task.bound_until.is_(None), task.bound_until <= now()),
        )
        return self._sweep_pending(
            (
                task.bound_server.is_not(None),
                sa.or_(unserved, place.in_(sorted(gone))),
            ),
            bound_server=None,
            bound_until=None,
            dispatched_at=None,
        )

    def _sweep_pending(self, condition: tuple[sa.ColumnElement[bool], ...], **values: Any) -> int:
        """
        Change the pending tasks for which *condition* holds; takes the write lock only if there are any.

        Rows that somebody else is writing are left for the next pass: two statements over many rows
        that wait for each other's would be a deadlock.
        """
        task = t.tasks.c
        found = sa.select(task.id).where(task.status == TaskStatus.PENDING, *condition).limit(_MAX_BATCH)
        if self._read(lambda connection: connection.execute(found).first()) is None:
            return 0
        chosen = found.with_for_update(skip_locked=True).cte("chosen")
        statement = (
            sa.update(t.tasks)
            .where(task.id.in_(sa.select(chosen.c.id)))
            .values(**values, updated_at=now())
            .returning(task.id)  # sqlite3 counts no rows of a statement that begins with WITH
        )
        return len(self._write(lambda connection: connection.execute(statement).all()))

    def forget_expired_keys(self) -> int:
        """Drop idempotency keys that are past their time, in a bounded batch."""
        key = t.idempotency_keys.c
        old = sa.select(key.owner, key.api_key, key.key).where(key.expires_at <= now()).limit(1000)
        rows = self._read(lambda connection: connection.execute(old).all())
        if not rows:
            return 0

        def drop(connection: sa.Connection) -> int:
            return sum(
                connection.execute(
                    sa.delete(t.idempotency_keys).where(
                        key.owner == row.owner,
                        key.api_key == row.api_key,
                        key.key == row.key,
                        key.expires_at <= now(),
                    )
                ).rowcount
                for row in rows
            )

        return self._write(drop)

    def connections(self) -> tuple[int, int] | None:
        """
        Connections to this database, everybody's, and how many its server takes for all of its databases.

        ``None`` on SQLite, which has none to count.
        """
        if not self.is_postgresql:
            return None
        query = sa.text(
            "SELECT count(*), current_setting('max_connections')::int FROM pg_stat_activity"
            " WHERE datname = current_database()"
        )
        row = self._read(lambda connection: connection.execute(query).one())
        return int(row[0]), int(row[1])

    # -- workers ------------------------------------------------------------------------------

    def register_worker(  # the columns of one row
        self,
        *,
        name: str,
        host: str,
        pid: int,
        queues: Sequence[str],
        servers: Sequence[Mapping[str, Any]],
        slots: int,
        consuming: bool,
        session_key: int,
        version: str,
    ) -> None:
        """Write or refresh a worker's row; the time of the call is its heartbeat."""
        values = {
            "host": host,
            "pid": pid,
            "queues": list(queues),
            "servers": [dict(server) for server in servers],
            "slots": slots,
            "consuming": consuming,
            "session_key": session_key,
            "version": version,
            "seen_at": now(),
        }
        insert = self._insert(t.workers).values(name=name, started_at=now(), **values)
        # A restarted process of the same name starts anew; a heartbeat keeps the time of its start.
        started = sa.case((t.workers.c.session_key == session_key, t.workers.c.started_at), else_=now())
        statement = insert.on_conflict_do_update(
            index_elements=["name"], set_={**values, "started_at": started}
        )
        self._write(lambda connection: connection.execute(statement))

    def forget_worker(self, name: str, session_key: int | None = None) -> None:
        """Drop the row of a worker that stopped in order, or is long gone."""
        statement = sa.delete(t.workers).where(t.workers.c.name == name)
        if session_key is not None:
            statement = statement.where(t.workers.c.session_key == session_key)
        self._write(lambda connection: connection.execute(statement))

    def workers(self, seen_within_s: float = 15.0) -> list[WorkerInfo]:
        """Workers whose heartbeat is this fresh."""
        return [info for info, _ in self.workers_with_sessions(seen_within_s)]

    def workers_with_sessions(self, seen_within_s: float = 15.0) -> list[tuple[WorkerInfo, int]]:
        """As :meth:`workers`, with the key that each process holds while it lives."""
        query = (
            sa.select(t.workers).where(t.workers.c.seen_at > after(-seen_within_s)).order_by(t.workers.c.name)
        )
        rows = self._read(lambda connection: connection.execute(query).mappings().all())
        return [
            (
                WorkerInfo(
                    name=row["name"],
                    host=row["host"],
                    pid=row["pid"],
                    queues=tuple(row["queues"]),
                    servers=tuple(row["servers"]),
                    slots=row["slots"],
                    consuming=bool(row["consuming"]),
                    version=row["version"],
                    started_at=row["started_at"],
                    seen_at=row["seen_at"],
                ),
                int(row["session_key"]),
            )
            for row in rows
        ]

    def forget_old_workers(self, older_than_s: float = 3600.0) -> int:
        """Drop the rows of workers that vanished long ago."""
        statement = sa.delete(t.workers).where(t.workers.c.seen_at < after(-older_than_s))
        return self._write(lambda connection: connection.execute(statement).rowcount)


def _may_go(queue: str, priority: int) -> tuple[sa.ColumnElement[bool], ...]:
    """The unbound tasks of one priority that wait in the outbox and are due."""
    task = t.tasks.c
    return (
        task.status == TaskStatus.PENDING,
        task.queue == queue,
        task.priority == priority,
        task.dispatched_at.is_(None),
        task.bound_server.is_(None),
        task.available_at <= now(),
    )


def _oldest_with_room(
    connection: sa.Connection, may_go: tuple[sa.ColumnElement[bool], ...], limit: int, room: OwnerRoom
) -> list[str]:
    """
    Ids of the oldest tasks whose owners have room, up to *limit*.

    From one owner to the next along the index, and then the oldest of those whose turn it may be: what
    an owner without room has waiting, thousands perhaps, is not read.
    """
    task = t.tasks.c
    waits = task.status == TaskStatus.PENDING
    owners = sa.select(sa.func.min(task.owner).label("owner")).where(waits).cte("owners", recursive=True)
    following = sa.select(sa.func.min(task.owner)).where(waits, task.owner > owners.c.owner).scalar_subquery()
    owners = owners.union_all(sa.select(following).where(owners.c.owner.is_not(None)))
    head = sa.select(sa.func.min(task.created_at)).where(*may_go, task.owner == owners.c.owner)
    heads = (
        sa.select(owners.c.owner, head.scalar_subquery().label("head"))
        .where(owners.c.owner.is_not(None), owners.c.owner.not_in(room.full()))
        .subquery()
    )
    # So many owners are enough: each of them has a task that is older than all of the next one's.
    first = sa.select(heads.c.owner).where(heads.c.head.is_not(None)).order_by(heads.c.head).limit(limit)
    candidates: list[Any] = []
    for owner in connection.execute(first).scalars().all():
        of_owner = (
            sa.select(task.created_at, task.id, task.owner)
            .where(*may_go, task.owner == owner)
            .order_by(task.created_at, task.id)
            .limit(limit)
        )
        candidates += connection.execute(of_owner).all()
    chosen: list[str] = []
    for row in sorted(candidates, key=lambda row: (row.created_at, row.id)):
        if len(chosen) == limit:
            break
        if room.take(row.owner):
            chosen.append(row.id)
    return chosen
