"""What the metrics ask: live rows by partial indexes, and what ended since the last time. Never the history."""

from __future__ import annotations

import datetime as dt
from typing import NamedTuple

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.base import Base
from genpulse.ledger.types import Timestamp, after, now
from genpulse.model import TaskStatus

__all__ = ["Ended", "Line", "Measures"]

_SETTLED_S = 2.0
"""A task's end becomes visible with the commit, a moment after the time that it says."""


class Line(NamedTuple):
    """The live tasks of a queue in one state."""

    queue: str
    status: TaskStatus
    number: int
    oldest_s: float
    """Since the oldest of them was submitted."""


class Ended(NamedTuple):
    """What a metric wants to know of a final task."""

    task_type: str
    status: TaskStatus
    error_code: str
    queue_s: float | None
    run_s: float | None
    store_s: float | None


class Measures(Base):
    """The statements behind ``GET /metrics``."""

    def lines(self) -> list[Line]:
        """The live tasks by queue and state, out of one index."""
        task = t.tasks.c
        query = (
            sa.select(
                task.queue,
                task.status,
                sa.func.count(),
                sa.func.min(task.created_at, type_=Timestamp()),
                now(),
            )
            .where(task.completed_at.is_(None))
            .group_by(task.queue, task.status)
        )
        rows = self._read(lambda connection: connection.execute(query).all())
        return [
            Line(queue, TaskStatus(status), number, max(0.0, (at - oldest).total_seconds()))
            for queue, status, number, oldest, at in rows
        ]

    def rendering(self) -> set[str]:
        """The ComfyUI servers that have a prompt of ours which is not rendered yet."""
        attempt = t.attempts.c
        query = (
            sa.select(attempt.server)
            .where(
                attempt.ended_at.is_(None),
                attempt.server.is_not(None),
                attempt.submitted_at.is_not(None),
                attempt.rendered_at.is_(None),
            )
            .distinct()
        )
        return set(self._read(lambda connection: connection.execute(query).scalars().all()))

    def ended_since(self, since: dt.datetime | None, *, at_most_s: float) -> tuple[list[Ended], dt.datetime]:
        """
        The tasks that ended since a time, or in the last *at_most_s* seconds if that is less.

        Returns:
            They, and the time to begin with the next time.
        """
        task = t.tasks.c

        def read(connection: sa.Connection) -> tuple[list[Ended], dt.datetime]:
            until, earliest = connection.execute(sa.select(after(-_SETTLED_S), after(-at_most_s))).one()
            begin = earliest if since is None else max(since, earliest)
            if begin >= until:
                return [], since or until
            rows = connection.execute(
                sa.select(
                    task.task_type,
                    task.status,
                    task.error,
                    task.created_at,
                    task.started_at,
                    task.run_s,
                    task.store_s,
                ).where(task.completed_at > begin, task.completed_at <= until)
            )
            return [
                Ended(
                    row.task_type,
                    TaskStatus(row.status),
                    str((row.error or {}).get("code", "")),
                    (row.started_at - row.created_at).total_seconds() if row.started_at else None,
                    row.run_s,
                    row.store_s,
                )
                for row in rows
            ], until

        return self._read(read)
