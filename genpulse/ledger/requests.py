"""What callers ask of the ledger: submit, read, list and cancel tasks; keep and find assets."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import uuid_utils

from genpulse.errors import GenPulseError
from genpulse.ledger import tables as t
from genpulse.ledger.keys import Keys
from genpulse.ledger.labels import label
from genpulse.ledger.sharing import Shared, join
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

__all__ = ["IdempotencyConflict", "Requests", "Source", "SourceGone", "new_id"]

CANCELED = ErrorInfo(code="canceled", message="The task was canceled.")

POSITION_LIMIT = 10_000
UPLOAD_S = 86_400.0
"""How long an upload may take from its last byte here to its record; what lasted longer is collected."""


class IdempotencyConflict(GenPulseError):
    """The key was used before, with another body."""


class SourceGone(GenPulseError):
    """A file or a task that the new task names is not there (any more): nothing was recorded."""


class KeyTaken(Exception):  # never leaves the ledger: it only rolls the insert back
    """Somebody else's row holds the idempotency key."""


def new_id() -> str:
    """A UUIDv7: unique without asking anybody, and in order of time."""
    return str(uuid_utils.uuid7())


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_id(text: str) -> bool:
    """Whether the text can be an id at all: PostgreSQL calls a comparison with anything else an error."""
    return _ID.fullmatch(text) is not None


_PARAMS_OF = sa.func.coalesce(t.tasks.c.params_of, t.tasks.c.batch_id, type_=t.tasks.c.batch_id.type)

WHOLE = sa.select(t.tasks, t.batches.c.shared_params).outerjoin(t.batches, t.batches.c.id == _PARAMS_OF)
"""Tasks with what a batch keeps for them."""

NARROW = sa.select(*(column for column in t.tasks.c if column.name != "params"))
"""Tasks without params: a page of large workflows would be many megabytes that nobody asked for."""


def task_from_row(
    row: sa.RowMapping | Mapping[str, Any],
    *,
    outputs: Sequence[Output] = (),
    attempts: Sequence[Attempt] = (),
) -> Task:
    """
    Build the frozen record from a row of ``tasks``.

    A task whose params a batch keeps a part of has them whole only if its row was read by :data:`WHOLE`.
    """
    shared = row.get("shared_params")
    return Task(
        id=row["id"],
        owner=row["owner"],
        task_type=row["task_type"],
        queue=row["queue"],
        priority=Priority.from_step(row["priority"]),
        status=TaskStatus(row["status"]),
        params=join(shared, row["params"]) if shared is not None else row.get("params", {}),
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
        batch_id=row["batch_id"],
        batch_index=row["batch_index"],
        request_id=row["request_id"],
        traceparent=row["traceparent"],
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
        progress=row["progress"],
    )


def _asset_from_row(row: sa.RowMapping) -> Asset:
    return Asset(
        id=row["id"],
        owner=row["owner"],
        key=row["key"],
        name=row["name"],
        content_type=row["content_type"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        created_at=row["created_at"],
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


def in_parts(ids: Iterable[str]) -> Iterator[list[str]]:
    """Some ids at a time, for the databases bound how many a statement may name."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), 500):
        yield ordered[start : start + 500]


def _all(query: sa.Select[Any], connection: sa.Connection) -> Sequence[Any]:
    return connection.execute(query).all()


INSERT = sa.insert(t.tasks).values(
    status=TaskStatus.PENDING,
    created_at=now(),
    updated_at=now(),
    available_at=now(),
    expires_at=after(sa.bindparam("expires_in_s", type_=sa.Float)),
)
"""Takes the rows of :func:`values_of`."""


def values_of(task_id: str, new: NewTask) -> dict[str, Any]:
    """What a new task's row says."""
    return {
        "id": task_id,
        "owner": new.owner,
        "task_type": new.task_type,
        "queue": new.queue,
        "priority": new.priority.step,
        "params": dict(new.params),
        "metadata": dict(new.metadata),
        "callback_url": new.callback_url,
        "retry_of": new.retry_of,
        "params_of": new.params_of,
        "timeout_s": new.timeout_s,
        "max_attempts": new.max_attempts,
        "expires_in_s": new.expires_in_s,
        "request_id": new.request_id,
        "traceparent": new.traceparent,
    }


@dataclass(frozen=True, slots=True)
class Source:
    """A task that is sent again, and what a batch keeps of its params."""

    task: Task
    shared: Shared | None
    size: int
    """About how many bytes of JSON it takes beside what it shares."""


class Requests(Keys):
    """The statements behind the API's routes."""

    def submit(
        self,
        new: NewTask,
        *,
        idempotency_key: str | None = None,
        api_key: str = "",
        body_hash: str = "",
        idempotency_ttl_s: int = 86_400,
    ) -> tuple[Task, bool]:
        """
        Record a task; from the commit on it is accepted.

        Key and task are one transaction: of any number of callers with the same key, one records
        a task and the others get that task.

        Args:
            idempotency_key: The caller's key, unique per API key while it is kept.
            api_key: The id of the API key that was shown; callers without one share a word.
            body_hash: Digest of the request; the same key with another digest is a conflict.

        Returns:
            The task, and whether it is an earlier one (a replay).

        Raises:
            IdempotencyConflict: The key was used with another body.
            SourceGone: A file or task that it names was deleted meanwhile.
            LedgerUnavailable: Nothing was recorded, or it is in doubt.
        """
        task_id = new_id()

        def record(connection: sa.Connection) -> Task:
            row = self._insert_task(connection, task_id, new)
            if idempotency_key is not None:
                self._take_key(
                    connection,
                    owner=new.owner,
                    api_key=api_key,
                    key=idempotency_key,
                    body_hash=body_hash,
                    task_id=task_id,
                    expires_at=after(idempotency_ttl_s),
                )
            return task_from_row(row)

        def recorded(connection: sa.Connection) -> Task | None:
            row = connection.execute(sa.select(t.tasks).where(t.tasks.c.id == task_id)).mappings().first()
            return None if row is None else task_from_row(row)

        while True:
            with contextlib.suppress(KeyTaken):
                return self._write_or_find(record, recorded), False
            # None: the task that had the key was deleted in this very moment, and the key with it.
            earlier = self.find_replay(new.owner, str(idempotency_key), body_hash, api_key=api_key)
            if earlier is not None:
                return earlier, True

    def _insert_task(self, connection: sa.Connection, task_id: str, new: NewTask) -> sa.RowMapping:
        """Write a new task's row, and hold fast what it needs: from now on that is not retired."""
        if new.retry_of is not None:
            # Waits for a retry in bulk, or a deletion, of the same task.
            former = sa.select(t.tasks.c.id).where(t.tasks.c.id == new.retry_of, t.tasks.c.owner == new.owner)
            if connection.execute(former.with_for_update()).first() is None:
                raise SourceGone(new.retry_of)
        self._hold_sources(connection, new.owner, new.assets, new.source_tasks)
        insert = INSERT.returning(t.tasks)
        row = connection.execute(insert, values_of(task_id, new)).mappings().one()
        self._insert_beside(connection, {task_id: new})
        return row

    def _hold_sources(
        self, connection: sa.Connection, owner: str, assets: Collection[str], tasks: Collection[str]
    ) -> None:
        """
        Lock what new tasks need, so that it is not retired before they name it.

        Raises:
            SourceGone: It was, just now.
        """
        for table, ids in ((t.assets, assets), (t.tasks, tasks)):
            for some in in_parts(ids):
                known = (
                    sa.select(table.c.id)
                    .where(table.c.id.in_(some), table.c.owner == owner)
                    .order_by(table.c.id)
                    .with_for_update(read=True, key_share=True)
                )
                if gone := set(some) - set(connection.execute(known).scalars()):
                    raise SourceGone(", ".join(sorted(gone)))

    def _insert_beside(self, connection: sa.Connection, tasks: Mapping[str, NewTask]) -> None:
        """The narrow rows that belong to new tasks: what they need, and by what they are found."""
        sources = [
            {"task_id": task_id, "source_id": each}
            for task_id, new in tasks.items()
            for each in sorted(new.assets | new.source_tasks)
        ]
        if sources:
            connection.execute(sa.insert(t.task_inputs), sources)
        labels = [
            {"task_id": task_id, "label": label(new.owner, key, value)}
            for task_id, new in tasks.items()
            for key, value in new.metadata.items()
        ]
        if labels:
            connection.execute(sa.insert(t.task_labels), labels)

    def _take_key(
        self, connection: sa.Connection, *, owner: str, api_key: str, key: str, **values: Any
    ) -> None:
        """Write an idempotency key beside what it brings about; raises :class:`KeyTaken`."""
        column = t.idempotency_keys.c
        connection.execute(
            sa.delete(t.idempotency_keys).where(
                column.owner == owner,
                column.api_key == api_key,
                column.key == key,
                column.expires_at <= now(),
            )
        )
        taken = connection.execute(
            self._insert(t.idempotency_keys)
            .values(owner=owner, api_key=api_key, key=key, **values)
            .on_conflict_do_nothing()
            .returning(column.key)
        ).first()
        if taken is None:
            raise KeyTaken

    def find_replay(self, owner: str, key: str, body_hash: str, *, api_key: str = "") -> Task | None:
        """
        The task that an idempotency key of this API key brought, if it is still kept.

        Raises:
            IdempotencyConflict: It was used with another body.
        """

        def find(connection: sa.Connection) -> sa.RowMapping | None:
            query = (
                sa.select(t.tasks, t.idempotency_keys.c.body_hash)
                .select_from(t.idempotency_keys)
                .outerjoin(t.tasks, t.tasks.c.id == t.idempotency_keys.c.task_id)
                .where(
                    t.idempotency_keys.c.owner == owner,
                    t.idempotency_keys.c.api_key == api_key,
                    t.idempotency_keys.c.key == key,
                )
            )
            return connection.execute(query).mappings().first()

        row = self._read(find)
        if row is None:
            return None
        if row["body_hash"] != body_hash or row["id"] is None:  # then it brought about a batch
            msg = "this Idempotency-Key was used before with another body"
            raise IdempotencyConflict(msg)
        return task_from_row(row)

    def get(self, task_id: str, owner: str | None = None, *, with_params: bool = True) -> Task | None:
        """
        Read one task with its outputs and attempts.

        Args:
            owner: If given, somebody else's task is as unknown as one that does not exist.
            with_params: Whether they are needed: they may be a workflow of megabytes.
        """
        if not is_id(task_id := task_id.lower()):
            return None

        def read(connection: sa.Connection) -> Task | None:
            query = (WHOLE if with_params else NARROW).where(t.tasks.c.id == task_id)
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

    def stamps(self, task_ids: Collection[str]) -> dict[str, tuple[str, int, dt.datetime]]:
        """
        What changes whenever a task does: status, attempt and ``updated_at`` by id, in one statement.

        An id that no task has is not in the answer.
        """
        columns = (t.tasks.c.id, t.tasks.c.status, t.tasks.c.attempt, t.tasks.c.updated_at)
        query = sa.select(*columns).where(t.tasks.c.id.in_(sorted(task_ids)))
        return self._read(
            lambda connection: {row[0]: (row[1], row[2], row[3]) for row in connection.execute(query)}
        )

    def retryable(  # each is one filter
        self,
        owner: str,
        *,
        status: TaskStatus = TaskStatus.FAILED,
        error_code: str | None = None,
        task_type: str | None = None,
        created_after: dt.datetime | None = None,
        created_before: dt.datetime | None = None,
        after_id: str | None = None,
        again: bool = False,
        limit: int = 100,
    ) -> list[str]:
        """
        The ids of an owner's final tasks that a retry in bulk may take, oldest first.

        Args:
            after_id: The last id of the page before.
            again: Also those that were retried already.
        """
        task, later = t.tasks.c, t.tasks.alias("later")
        query = sa.select(task.id).where(task.owner == owner, task.status == status).order_by(task.id)
        if error_code is not None:
            query = query.where(task.error["code"].as_string() == error_code)
        if task_type is not None:
            query = query.where(task.task_type == task_type)
        if created_after is not None:
            query = query.where(task.created_at > created_after)
        if created_before is not None:
            query = query.where(task.created_at < created_before)
        if after_id is not None:
            query = query.where(task.id > after_id)
        if not again:
            query = query.where(~sa.exists().where(later.c.retry_of == task.id))
        return list(self._read(lambda connection: connection.execute(query.limit(limit)).scalars().all()))

    def retry_sources(
        self, task_ids: Sequence[str], known: dict[str, Shared], *, max_bytes: int
    ) -> list[Source | None]:
        """
        The first of these tasks with their params, without outputs and attempts.

        What a batch keeps for several of them is read once, and is one object in the params of all.

        Args:
            known: What batches keep, by their ids, as far as it was read before; more is added.
            max_bytes: About how much JSON to read and to copy; what the first one needs comes on top.

        Returns:
            At least one, in order; ``None`` for one that was deleted meanwhile.
        """
        task = t.tasks.c
        length = sa.func.length(sa.cast(task.params, sa.Text)).label("params_length")
        narrow = sa.select(_PARAMS_OF.label("shared_id"), length)

        def read(connection: sa.Connection) -> list[Source | None]:
            found: list[Source | None] = []
            left = max_bytes
            for task_id in task_ids:
                # One by one: what they need together cannot be known before.
                about = connection.execute(narrow.where(task.id == task_id)).first()
                if about is None:
                    found.append(None)
                    continue
                shared_id, needed = about
                if found and needed > left:
                    break
                if shared_id is not None and shared_id not in known:
                    if found and left < max_bytes // 2:  # it may be large, and the next call has room for it
                        break
                    kept = sa.select(t.batches.c.shared_params).where(t.batches.c.id == shared_id)
                    if (params := connection.execute(kept).scalar()) is not None:
                        known[shared_id] = Shared(shared_id, params)
                        needed += known[shared_id].size if found else 0
                row = connection.execute(sa.select(t.tasks).where(task.id == task_id)).mappings().first()
                if row is None:
                    found.append(None)
                    continue
                shared = known.get(shared_id)
                if shared is not None:
                    needed += shared.copied(row["params"])
                whole = {**row, "shared_params": None if shared is None else shared.params}
                found.append(Source(task_from_row(whole), shared, needed))
                left -= needed
                if left <= 0:
                    break
            return found

        return self._read(read)

    def retry_all(self, retries: Sequence[NewTask], *, again: bool = False) -> list[Task]:
        """
        Record retries (``retry_of`` says of what) in one transaction; those that may not be are left out.

        Of any number of callers at once, one retries a task, unless *again* is asked for. A task is
        left out if it, or a file that it needs, was deleted meanwhile. The batch that a retry's params are
        a rest of (``params_of``) must be that of the task it retries: while that is there, so is the batch.

        Returns:
            The new tasks, whose params are the rest where a batch keeps some of them.
        """
        by_former = {str(new.retry_of): new for new in retries}

        def record(connection: sa.Connection) -> list[Task]:
            task = t.tasks.c
            formers = sa.select(task.id).where(task.id.in_(sorted(by_former))).order_by(task.id)
            # Whoever was there first has committed when these locks are ours: a second statement sees it.
            locked = connection.execute(formers.with_for_update()).scalars().all()
            retried: set[str | None] = set()
            if not again:
                earlier = sa.select(task.retry_of).where(task.retry_of.in_(locked))
                retried = set(connection.execute(earlier).scalars())
            made = []
            for former in locked:
                if former not in retried:
                    with contextlib.suppress(SourceGone):
                        row = self._insert_task(connection, new_id(), by_former[former])
                        made.append(task_from_row(row))
            return made

        return self._write(record) if retries else []

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
            The task as it now is, without params, or ``None`` if there is none for this owner.
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

        return self.get(task_id, owner, with_params=False) if self._write(request) else None

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

    def reuse_asset(self, *, owner: str, name: str, content_type: str, sha256: str) -> Asset | None:
        """
        Take an upload whose bytes this owner has stored already: nothing needs to be stored again.

        The same bytes under the same name are the same asset, young again; under another name they are
        a new asset that shares the stored object.

        Returns:
            The asset, or ``None``: the bytes are new.
        """
        asset = t.assets.c
        same = (asset.owner == owner, asset.sha256 == sha256)
        again = (
            sa.update(t.assets)
            .where(*same, asset.name == name)
            .values(uploaded_again_at=now())
            .returning(t.assets)
        )

        def take(connection: sa.Connection) -> sa.RowMapping | None:
            if (found := connection.execute(again).mappings().first()) is not None:
                return found
            # Locked, so that it is not retired, and its object with it, before this one stands beside it.
            other = sa.select(t.assets).where(*same).order_by(asset.id).limit(1)
            shared = connection.execute(other.with_for_update(read=True, key_share=True)).mappings().first()
            if shared is None:
                return None
            values = {
                "id": new_id(),
                "owner": owner,
                "key": shared["key"],
                "name": name,
                "content_type": content_type,
                "size_bytes": shared["size_bytes"],
                "sha256": sha256,
                "created_at": now(),
            }
            return self._add_asset(connection, values)

        row = self._write(take)
        return None if row is None else _asset_from_row(row)

    def expect_asset(self, owner: str, sha256: str, extension: str = "") -> tuple[str, str]:
        """
        Choose id and key of an asset whose bytes are going to be stored.

        No key is given twice, so that deleting one is never about somebody's new bytes. It is noted for
        deletion until :meth:`add_asset`: a crash between the two leaves nothing behind for good.

        Returns:
            The id and the key.
        """
        asset_id = new_id()
        key = f"assets/{owner}/{sha256}/{asset_id}{extension}"
        statement = sa.insert(t.removals).values(
            id=asset_id, key=key, ended_at=after(UPLOAD_S), due_at=after(UPLOAD_S)
        )
        self._write(lambda connection: connection.execute(statement))
        return asset_id, key

    def add_asset(  # the columns of one row
        self,
        *,
        asset_id: str,
        owner: str,
        key: str,
        name: str,
        content_type: str,
        size_bytes: int,
        sha256: str,
    ) -> Asset:
        """
        Record an uploaded file whose bytes are stored now, under what :meth:`expect_asset` chose.

        Of two uploads of the same file at once one is recorded, and both get it; the other one's bytes
        are deleted.

        Raises:
            SourceGone: Storing took so long that the bytes are taken for left behind.
        """
        values = {
            "id": asset_id,
            "owner": owner,
            "key": key,
            "name": name,
            "content_type": content_type,
            "size_bytes": size_bytes,
            "sha256": sha256,
            "created_at": now(),
        }
        removal = t.removals.c

        def record(connection: sa.Connection) -> sa.RowMapping:
            row = self._add_asset(connection, values)
            if row["id"] != asset_id:
                connection.execute(
                    sa.update(t.removals).where(removal.id == asset_id).values(ended_at=now(), due_at=now())
                )
                return row
            expected = sa.delete(t.removals).where(removal.id == asset_id, removal.ended_at > now())
            if connection.execute(expected).rowcount == 0:
                raise SourceGone(key)
            return row

        return _asset_from_row(self._write(record))

    def _add_asset(self, connection: sa.Connection, values: dict[str, Any]) -> sa.RowMapping:
        """Insert the row, or find the one of the same owner, bytes and name, which is young again."""
        statement = (
            self._insert(t.assets)
            .values(**values)
            .on_conflict_do_update(
                index_elements=["owner", "sha256", "name"], set_={"uploaded_again_at": now()}
            )
            .returning(t.assets)
        )
        return connection.execute(statement).mappings().one()

    def get_asset(self, asset_id: str, owner: str) -> Asset | None:
        """An owner's asset by id."""
        if not is_id(asset_id := asset_id.lower()):
            return None
        query = sa.select(t.assets).where(t.assets.c.id == asset_id, t.assets.c.owner == owner)
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else _asset_from_row(row)

    def known_assets(self, owner: str, asset_ids: Collection[str]) -> set[str]:
        """Which of these ids are assets of this owner."""
        asset = t.assets.c
        found: set[str] = set()
        for some in in_parts(filter(is_id, asset_ids)):
            query = sa.select(asset.id).where(asset.owner == owner, asset.id.in_(some))
            found.update(row.id for row in self._read(functools.partial(_all, query)))
        return found

    def known_outputs(self, owner: str, outputs: Collection[tuple[str, int]]) -> set[tuple[str, int]]:
        """Which of these ``(task id, index)`` are outputs of this owner's tasks."""
        found: set[tuple[str, int]] = set()
        for some in in_parts({task_id for task_id, _ in outputs if is_id(task_id)}):
            query = (
                sa.select(t.outputs.c.task_id, t.outputs.c.index)
                .join(t.tasks, t.tasks.c.id == t.outputs.c.task_id)
                .where(t.tasks.c.owner == owner, t.outputs.c.task_id.in_(some))
            )
            rows = self._read(functools.partial(_all, query))
            found.update((row.task_id, row.index) for row in rows)
        return found & set(outputs)

    def find_asset(self, key: str) -> Asset | None:
        """An asset by its storage key; the oldest, where several share the object."""
        query = sa.select(t.assets).where(t.assets.c.key == key).order_by(t.assets.c.id).limit(1)
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else _asset_from_row(row)

    def _notify(self, connection: sa.Connection, word: str) -> None:
        """Wake listeners when this transaction commits. SQLite has no such thing: Redis tells them."""
        if self.is_postgresql:
            connection.execute(sa.select(sa.func.pg_notify("genpulse", word)))
