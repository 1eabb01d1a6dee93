"""
Lists of an owner's tasks, newest first, whose cost has a bound whatever is asked for.

One filter leads, and is answered by an index in the list's own order: the batch, else an entry of
the metadata, else the statuses, else the owner. What it gives is held against the other filters, a
thousand ids at a time and at most :data:`SCANNED` for a page. So a page may be short although more is
to come; its cursor says so. Each statement is a range of one index or a lookup by primary key, which
no planner gets wrong, however many tasks there are and whatever they have in common.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.batches import Batches
from genpulse.ledger.labels import label
from genpulse.ledger.requests import NARROW, in_parts, is_id, task_from_row
from genpulse.model import Task, TaskStatus

__all__ = ["SCANNED", "Lists", "Page"]

SCANNED = 10_000
"""Tasks that one page looks at, at most."""

_AT_A_TIME = 1000

_SKEW = dt.timedelta(days=1)
"""An id carries the time of the host that made it; how far its clock may be from the database's."""

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_FIRST_ID, _LAST_ID = "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"

_Lead: TypeAlias = Callable[[str, int], sa.Select[Any]]
"""Candidates below an id, newest first, so many: ``id``, and whether it ``fits`` what the lead can tell."""


class Page(NamedTuple):
    """Some tasks, and the id behind which the list goes on; ``None`` at its end."""

    tasks: list[Task]
    next_id: str | None


class Lists(Batches):
    """The statements behind the public list."""

    def list_tasks(  # each is one filter of the public list
        self,
        owner: str,
        *,
        statuses: Collection[TaskStatus] = (),
        task_type: str | None = None,
        labels: Mapping[str, str] | None = None,
        batch_id: str | None = None,
        created_after: dt.datetime | None = None,
        created_before: dt.datetime | None = None,
        before_id: str | None = None,
        limit: int = 50,
    ) -> Page:
        """
        List an owner's tasks, newest first, without params, outputs and attempts.

        Args:
            statuses: Any of these; all if empty.
            labels: Entries that the metadata must have, all of them.
            before_id: ``next_id`` of the page before; ids are in order of time, so that this
                keyset neither skips nor repeats a task while new ones arrive.

        Returns:
            At most *limit* tasks; fewer, even none, where :data:`SCANNED` were looked at.
        """
        if not all(is_id(each.lower()) for each in (batch_id, before_id) if each is not None):
            return Page([], None)
        digests = sorted(label(owner, key, value) for key, value in (labels or {}).items())
        oldest = _id_at(created_after, -_SKEW) if created_after else _FIRST_ID
        newest = _id_at(created_before, _SKEW) if created_before else _LAST_ID
        start = min(newest, before_id.lower()) if before_id else newest
        task = t.tasks.c
        rest: list[sa.ColumnElement[bool]] = []
        leads_by_status = batch_id is None and not digests
        if statuses and not leads_by_status:
            rest.append(task.status.in_(sorted(statuses)))
        if task_type is not None:
            rest.append(task.task_type == task_type)
        if created_after is not None:
            rest.append(task.created_at > created_after)
        if created_before is not None:
            rest.append(task.created_at < created_before)
        if batch_id is not None:
            lead = _of_batch(owner, batch_id.lower(), oldest, rest)
        elif digests:
            lead = _labeled(digests.pop(), oldest)
        else:
            lead = _of_owner(owner, statuses, oldest, rest)
        late = () if batch_id is not None or leads_by_status else rest

        def read(connection: sa.Connection) -> Page:
            found: list[str] = []
            below, looked_at, more = start, 0, True
            size = _AT_A_TIME if rest or digests else limit + 1
            while more and len(found) <= limit and looked_at < SCANNED:
                rows = connection.execute(lead(below, size)).all()
                fitting = [row.id for row in rows if row.fits]
                found += _matching(connection, fitting, late, digests)
                more, looked_at = len(rows) == size, looked_at + len(rows)
                below = rows[-1].id if rows else below
            page = found[:limit]
            query = NARROW.where(task.id.in_(page)).order_by(task.id.desc())
            tasks = [task_from_row(row) for row in connection.execute(query).mappings()] if page else []
            return Page(tasks, page[-1] if len(found) > limit else below if more else None)

        return self._read(read)


def _fits(rest: Sequence[sa.ColumnElement[bool]]) -> sa.Label[Any]:
    return (sa.and_(*rest) if rest else sa.literal(1)).label("fits")


def _of_owner(
    owner: str, statuses: Collection[TaskStatus], oldest: str, rest: Sequence[sa.ColumnElement[bool]]
) -> _Lead:
    task = t.tasks.c
    each_of: list[list[sa.ColumnElement[bool]]] = [[task.status == each] for each in sorted(statuses)]

    def lead(below: str, size: int) -> sa.Select[Any]:
        lists = [
            sa.select(task.id, _fits(rest))
            .where(task.owner == owner, *of_status, task.id >= oldest, task.id < below)
            .order_by(task.id.desc())
            .limit(size)
            for of_status in each_of or [[]]
        ]
        if len(lists) == 1:
            return lists[0]
        # Each status is a range of the index; together they are in order once the newest of all are taken.
        together = sa.union_all(*(sa.select(each.subquery()) for each in lists)).subquery()
        return sa.select(together).order_by(together.c.id.desc()).limit(size)

    return lead


def _of_batch(owner: str, batch_id: str, oldest: str, rest: Sequence[sa.ColumnElement[bool]]) -> _Lead:
    task = t.tasks.c
    return lambda below, size: (
        sa.select(task.id, _fits(rest))
        .where(task.batch_id == batch_id, task.owner == owner, task.id >= oldest, task.id < below)
        .order_by(task.id.desc())
        .limit(size)
    )


def _labeled(digest: str, oldest: str) -> _Lead:
    """The owner is part of the digest."""
    entry = t.task_labels.c
    return lambda below, size: (
        sa.select(entry.task_id.label("id"), _fits(()))
        .where(entry.label == digest, entry.task_id >= oldest, entry.task_id < below)
        .order_by(entry.task_id.desc())
        .limit(size)
    )


def _matching(
    connection: sa.Connection, ids: Sequence[str], rest: Sequence[sa.ColumnElement[bool]], digests: list[str]
) -> list[str]:
    """Those of *ids* that fit the other filters, in their order."""
    kept = set(ids)
    if rest:
        queries = (sa.select(t.tasks.c.id).where(t.tasks.c.id.in_(some), *rest) for some in in_parts(kept))
        kept = {each for query in queries for each in connection.execute(query).scalars()}
    if digests:
        entry = t.task_labels.c
        counts = (
            sa.select(entry.task_id)
            .where(entry.task_id.in_(some), entry.label.in_(digests))
            .group_by(entry.task_id)
            .having(sa.func.count() == len(digests))
            for some in in_parts(kept)
        )
        kept = {each for query in counts for each in connection.execute(query).scalars()}
    return [each for each in ids if each in kept]


def _id_at(at: dt.datetime, skew: dt.timedelta) -> str:
    """The least id of that time and *skew*; their sum may lie beyond the years there are."""
    milliseconds = min(max((at - _EPOCH + skew) // dt.timedelta(milliseconds=1), 0), 2**48 - 1)
    text = f"{milliseconds:012x}"
    return f"{text[:8]}-{text[8:]}-0000-0000-000000000000"
