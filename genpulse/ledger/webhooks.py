"""
Webhooks: what is to be told to whom, which tries there were, and who is at it just now.

Nobody calls anything to announce a task's end: a trigger writes the delivery in the very statement
that makes the task final (:data:`genpulse.ledger.tables.WEBHOOK_TRIGGERS`), whichever verb that is.

A delivery is due when its ``next_at`` has come. Claiming it sets ``next_at`` to the end of the
claim, so a deliverer that dies leaves it due again by itself. The claim's random token fences the
write of the outcome. Death between the receiver's answer and that write means that the receiver
hears the same thing twice, under the same id.

Places are shared out by owner: whoever has the fewest tries under way goes next, so that nobody waits
for another's backlog, however long it is. Tries to one host, and of one owner, are bounded, whatever
number of deliverers there is.
"""

from __future__ import annotations

import datetime as dt
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.base import Base
from genpulse.ledger.types import Timestamp, after, now

__all__ = ["Backlog", "Delivery", "DeliveryStatus", "DeliveryTry", "Webhooks"]

VANISHED = "the process that tried vanished before it could write what came of it"


class DeliveryStatus(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    """Tried as often as the schedule says."""
    GONE = "gone"
    """The receiver answered 410: it wants no more of this."""


@dataclass(frozen=True, slots=True)
class DeliveryTry:
    """One try. One that has neither status nor error is under way."""

    number: int
    started_at: dt.datetime
    duration_s: float | None
    status_code: int | None
    error: str | None
    excerpt: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event of one task, on its way to the task's ``callback_url``."""

    id: str
    """Also the ``webhook-id``: the same on every try."""
    owner: str
    task_id: str
    event_type: str
    url: str
    status: DeliveryStatus
    tries: int
    """Since the event, or since it was last asked for again: the place in the schedule."""
    attempts: int
    """Of all time: the number of the newest try."""
    created_at: dt.datetime
    next_at: dt.datetime | None
    """When it will be tried, or taken over if the try under way does not end; ``None`` once over."""
    ended_at: dt.datetime | None
    log: tuple[DeliveryTry, ...] = ()
    claim: str | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """Deliveries that are due and that nobody has taken."""

    due: int
    oldest_s: float


class Webhooks(Base):
    """
    The statements of deliverers, and of the API about deliveries.

    Args of many: *at* is the time to take for now, for tests that let days pass; by default the
    database's.
    """

    def webhook_due(self, *, per_host: int, per_owner: int, at: dt.datetime | None = None) -> bool:
        """Whether there is anything that may be delivered now. One cheap read."""
        query = sa.select(_due(per_host, per_owner, at).c.id).limit(1)
        return self._read(lambda connection: connection.execute(query).first()) is not None

    def webhook_backlog(self) -> Backlog:
        """How many deliveries are due, and for how long the oldest has been."""
        delivery = t.webhook_deliveries.c
        query = sa.select(sa.func.count(), sa.func.min(delivery.next_at, type_=Timestamp()), now()).where(
            delivery.status == DeliveryStatus.PENDING, delivery.next_at <= now()
        )
        due, oldest, at = self._read(lambda connection: connection.execute(query).one())
        return Backlog(due, (at - oldest).total_seconds() if oldest is not None else 0.0)

    def claim_delivery(
        self,
        *,
        lease_s: float,
        per_host: int,
        per_owner: int,
        after_owner: str = "",
        at: dt.datetime | None = None,
    ) -> Delivery | None:
        """
        Take a delivery that is due, for *lease_s* seconds, and begin a try in its log.

        It is one of the owner who has the fewest tries under way, and of that owner's the one that is
        due for longest. Two deliverers never take the same one.

        Args:
            per_host: Tries under way at a time to one host: a receiver that hangs holds up what goes to
                it, and nothing else.
            per_owner: Tries under way at a time of one owner, who may name any number of hosts.
            after_owner: Among owners with equally few under way the next one by name after this: one
                whose receivers answer at once would else have its turn again and again.
        """
        # SQLite's write lock, and PostgreSQL's below, are not for looking.
        if not self.webhook_due(per_host=per_host, per_owner=per_owner, at=at):
            return None
        token = secrets.token_hex(16)
        delivery, attempt = t.webhook_deliveries.c, t.webhook_attempts.c
        due = _due(per_host, per_owner, at)
        chosen = (
            sa.select(due.c.id)
            .order_by(due.c.under_way, due.c.owner <= after_owner, due.c.owner)
            .limit(1)
            .cte("chosen")
        )

        def take(connection: sa.Connection) -> Delivery | None:
            if self.is_postgresql:  # two at once would both see the last free place
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIM_LOCK)))
            row = (
                connection.execute(
                    sa.update(t.webhook_deliveries)
                    .where(
                        delivery.id.in_(sa.select(chosen.c.id)),
                        delivery.status == DeliveryStatus.PENDING,
                        delivery.next_at <= _moment(at),
                    )
                    .values(
                        claim=token,
                        next_at=_moment(at, lease_s),
                        tries=delivery.tries + 1,
                        attempts=delivery.attempts + 1,
                    )
                    .returning(t.webhook_deliveries)
                )
                .mappings()
                .first()
            )
            if row is None:
                return None
            connection.execute(
                sa.update(t.webhook_attempts)
                .where(
                    attempt.delivery_id == row["id"], attempt.duration_s.is_(None), attempt.error.is_(None)
                )
                .values(error=VANISHED)
            )
            connection.execute(
                sa.insert(t.webhook_attempts).values(
                    delivery_id=row["id"], number=row["attempts"], started_at=_moment(at)
                )
            )
            return _delivery(row)

        return self._write(take)

    def record_delivery(
        self,
        claimed: Delivery,
        status: DeliveryStatus,
        *,
        duration_s: float,
        status_code: int | None = None,
        error: str | None = None,
        excerpt: str | None = None,
        retry_in_s: float = 0.0,
        at: dt.datetime | None = None,
    ) -> bool:
        """
        Write what came of a try.

        Args:
            status: ``PENDING`` for another try in *retry_in_s* seconds; anything else ends it.

        Returns:
            False if the claim is over: somebody else tries, and their word counts.
        """
        delivery, attempt = t.webhook_deliveries.c, t.webhook_attempts.c
        waits = status is DeliveryStatus.PENDING

        def record(connection: sa.Connection) -> bool:
            ours = connection.execute(
                sa.update(t.webhook_deliveries)
                .where(
                    delivery.id == claimed.id,
                    delivery.claim == claimed.claim,
                    delivery.status == DeliveryStatus.PENDING,
                )
                .values(
                    status=status,
                    claim=None,
                    next_at=_moment(at, retry_in_s) if waits else None,
                    ended_at=None if waits else _moment(at),
                )
            ).rowcount
            if ours:
                connection.execute(
                    sa.update(t.webhook_attempts)
                    .where(attempt.delivery_id == claimed.id, attempt.number == claimed.attempts)
                    .values(duration_s=duration_s, status_code=status_code, error=error, excerpt=excerpt)
                )
            return bool(ours)

        return self._write(record)

    def redeliver(self, delivery_id: str, owner: str, *, at: dt.datetime | None = None) -> Delivery | None:
        """
        Begin the schedule of a delivery anew, now; the id stays, so a receiver sees what it is.

        One that is being tried this moment is left to it. Safe to repeat.

        Returns:
            The delivery as it now is, or ``None`` if there is none for this owner.
        """
        delivery = t.webhook_deliveries.c
        under_way = sa.and_(delivery.claim.is_not(None), delivery.next_at > _moment(at))
        statement = (
            sa.update(t.webhook_deliveries)
            .where(delivery.id == delivery_id, delivery.owner == owner, sa.not_(under_way))
            .values(status=DeliveryStatus.PENDING, tries=0, claim=None, next_at=_moment(at), ended_at=None)
        )
        self._write(lambda connection: connection.execute(statement))
        return self.get_delivery(delivery_id, owner)

    def get_delivery(self, delivery_id: str, owner: str) -> Delivery | None:
        """An owner's delivery with the log of its tries."""
        delivery, attempt = t.webhook_deliveries.c, t.webhook_attempts.c

        def read(connection: sa.Connection) -> Delivery | None:
            row = (
                connection.execute(
                    sa.select(t.webhook_deliveries).where(delivery.id == delivery_id, delivery.owner == owner)
                )
                .mappings()
                .first()
            )
            if row is None:
                return None
            tries = connection.execute(
                sa.select(t.webhook_attempts)
                .where(attempt.delivery_id == delivery_id)
                .order_by(attempt.number)
            ).mappings()
            return _delivery(row, tuple(_try(found) for found in tries))

        return self._read(read)

    def list_deliveries(
        self,
        owner: str,
        *,
        status: DeliveryStatus | None = None,
        task_id: str | None = None,
        before_id: str | None = None,
        limit: int = 50,
    ) -> list[Delivery]:
        """An owner's deliveries, newest first, without their logs; *before_id* ends the page before."""
        delivery = t.webhook_deliveries.c
        query = (
            sa.select(t.webhook_deliveries)
            .where(delivery.owner == owner)
            .order_by(delivery.id.desc())
            .limit(limit)
        )
        if status is not None:
            query = query.where(delivery.status == status)
        if task_id is not None:
            query = query.where(delivery.task_id == task_id)
        if before_id is not None:
            query = query.where(delivery.id < before_id)
        return self._read(lambda connection: [_delivery(row) for row in connection.execute(query).mappings()])


_CLAIM_LOCK = 7_310_573_203


def _due(per_host: int, per_owner: int, at: dt.datetime | None) -> sa.Subquery:
    """
    Of each owner who may have one more try under way: the ``id`` of what is due for longest.

    Besides it ``owner`` and ``under_way``, the number of that owner's tries. Goes from one owner to the
    next along the index, so that a backlog of thousands is not read.
    """
    delivery = t.webhook_deliveries.c
    waits = delivery.status == DeliveryStatus.PENDING
    owners = sa.select(sa.func.min(delivery.owner).label("owner")).where(waits).cte("owners", recursive=True)
    following = (
        sa.select(sa.func.min(delivery.owner)).where(waits, delivery.owner > owners.c.owner).scalar_subquery()
    )
    owners = owners.union_all(sa.select(following).where(owners.c.owner.is_not(None)))

    tried = t.webhook_deliveries.alias("tried").c
    is_tried = (
        tried.claim.is_not(None),
        tried.status == DeliveryStatus.PENDING,
        tried.next_at > _moment(at),
    )
    busy_hosts = (
        sa.select(tried.host).where(*is_tried).group_by(tried.host).having(sa.func.count() >= per_host)
    )
    tries = sa.select(tried.owner, sa.func.count().label("tries")).where(*is_tried).group_by(tried.owner)
    full_owners = tries.with_only_columns(tried.owner).having(sa.func.count() >= per_owner)
    busy_owners = tries.subquery("busy_owners")
    under_way = sa.func.coalesce(busy_owners.c.tries, 0)
    oldest = (
        sa.select(delivery.id)
        .where(
            waits,
            delivery.owner == owners.c.owner,
            delivery.next_at <= _moment(at),
            delivery.host.not_in(busy_hosts),
        )
        .order_by(delivery.next_at, delivery.id)
        .limit(1)
        .scalar_subquery()
    )
    heads = (
        sa.select(owners.c.owner, under_way.label("under_way"), oldest.label("id"))
        .select_from(owners.outerjoin(busy_owners, busy_owners.c.owner == owners.c.owner))
        .where(owners.c.owner.is_not(None), owners.c.owner.not_in(full_owners))
        .subquery("heads")
    )
    return sa.select(heads).where(heads.c.id.is_not(None)).subquery("due")


def _moment(at: dt.datetime | None, plus_s: float = 0.0) -> sa.ColumnElement[Any]:
    """A time *plus_s* seconds after *at*, or after now by the database's clock."""
    if at is not None:
        return sa.literal(at + dt.timedelta(seconds=plus_s), Timestamp())
    return after(plus_s) if plus_s else now()


def _delivery(row: sa.RowMapping, log: tuple[DeliveryTry, ...] = ()) -> Delivery:
    return Delivery(
        id=row["id"],
        owner=row["owner"],
        task_id=row["task_id"],
        event_type=row["event_type"],
        url=row["url"],
        status=DeliveryStatus(row["status"]),
        tries=row["tries"],
        attempts=row["attempts"],
        created_at=row["created_at"],
        next_at=row["next_at"],
        ended_at=row["ended_at"],
        log=log,
        claim=row["claim"],
    )


def _try(row: sa.RowMapping) -> DeliveryTry:
    return DeliveryTry(
        number=row["number"],
        started_at=row["started_at"],
        duration_s=row["duration_s"],
        status_code=row["status_code"],
        error=row["error"],
        excerpt=row["excerpt"],
    )
