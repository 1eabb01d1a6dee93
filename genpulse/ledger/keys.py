"""
API keys, and how much their owners may have waiting and running.

A key is ``gp_<id>_<secret>``: the id finds the row, and what the row has is only the SHA-256 of the
whole text. The secret has 256 random bits, so a fast hash is as good as a slow one: there is nothing
to guess from. A revoked key keeps its row.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from genpulse.ledger import tables as t
from genpulse.ledger.base import Base
from genpulse.ledger.types import after, now
from genpulse.model import ApiKey, TaskStatus

__all__ = ["KeyText", "Keys", "OwnerRoom", "mint"]

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ID_CHARS = 12
_SECRET_CHARS = 43  # 256 bits
_FORM = re.compile(r"gp_([0-9a-z]{12})_([0-9A-Za-z]{43})", re.ASCII)

USED_EVERY_S = 60
"""A key's last use is written at most this often."""


@dataclass(frozen=True, slots=True)
class KeyText:
    """The text of a key, as its holder has it."""

    id: str
    text: str = field(repr=False)

    @property
    def digest(self) -> str:
        """What the ledger keeps of it."""
        return hashlib.sha256(self.text.encode("ascii")).hexdigest()

    def fits(self, key: ApiKey | None) -> bool:
        """Whether this is the secret of *key*; takes as long for a key that does not exist."""
        return hmac.compare_digest(self.digest, key.digest if key else "-" * 64) and key is not None

    @classmethod
    def parse(cls, text: str) -> KeyText | None:
        """``None`` for what has not the form of a key."""
        match = _FORM.fullmatch(text)
        return cls(match[1], text) if match else None


def mint() -> KeyText:
    """A new key's text, from the system's randomness."""
    key_id = "".join(secrets.choice(_ALPHABET[:36]) for _ in range(_ID_CHARS))
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_CHARS))
    return KeyText(key_id, f"gp_{key_id}_{secret}")


class OwnerRoom:
    """
    How many more tasks of each owner may be on their way or running; counts down as they are taken.

    Args:
        default: Tasks of one owner that may run at once; 0 is no cap.
        caps: The same by owner, where a key says something else.
        used: Tasks on their way or running now, by owner.
    """

    def __init__(self, default: int, caps: Mapping[str, int], used: Mapping[str, int]) -> None:
        self._default = default
        self._caps = dict(caps)
        self._used = Counter(used)

    @property
    def is_unlimited(self) -> bool:
        """Whether no owner has any cap, which is the usual case."""
        return not self._default and not any(self._caps.values())

    def take(self, owner: str) -> bool:
        """Count one more task of *owner*, unless that is one too many."""
        cap = self._caps.get(owner, self._default)
        if cap and self._used[owner] >= cap:
            return False
        self._used[owner] += 1
        return True

    def full(self) -> list[str]:
        """The owners that have no room."""
        return [
            owner
            for owner, number in self._used.items()
            if 0 < self._caps.get(owner, self._default) <= number
        ]


class Keys(Base):
    """The statements about API keys and owners."""

    def add_key(
        self,
        key: KeyText,
        *,
        name: str,
        owner: str,
        scopes: Collection[str],
        expires_in_s: float | None = None,
        rate: str | None = None,
        max_queued: int | None = None,
        max_running: int | None = None,
    ) -> ApiKey:
        """Record a new key. From the commit on an installation without keys asks for one."""
        statement = (
            sa.insert(t.api_keys)
            .values(
                id=key.id,
                name=name,
                owner=owner,
                digest=key.digest,
                scopes=list(scopes),
                rate=rate,
                max_queued=max_queued,
                max_running=max_running,
                created_at=now(),
                expires_at=after(expires_in_s) if expires_in_s is not None else None,
            )
            .returning(t.api_keys, sa.false().label("is_expired"))
        )
        return _key(self._write(lambda connection: connection.execute(statement).mappings().one()))

    def find_key(self, key_id: str) -> ApiKey | None:
        """A key by its id, whether it still opens anything or not."""
        query = _KEYS.where(t.api_keys.c.id == key_id)
        row = self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else _key(row)

    def list_keys(self) -> list[ApiKey]:
        """All keys, oldest first, the revoked ones too."""
        query = _KEYS.order_by(t.api_keys.c.created_at, t.api_keys.c.id)
        return [
            _key(row) for row in self._read(lambda connection: connection.execute(query).mappings().all())
        ]

    def has_keys(self) -> bool:
        """Whether a key was ever made here."""
        query = sa.select(sa.literal(1)).select_from(t.api_keys).limit(1)
        return self._read(lambda connection: connection.execute(query).first()) is not None

    def revoke_key(self, key_id: str) -> ApiKey | None:
        """End a key, for good; safe to repeat. ``None`` if there is none of this id."""
        statement = (
            sa.update(t.api_keys)
            .where(t.api_keys.c.id == key_id, t.api_keys.c.revoked_at.is_(None))
            .values(revoked_at=now())
        )
        self._write(lambda connection: connection.execute(statement))
        return self.find_key(key_id)

    def note_key_use(self, key_id: str) -> None:
        """Write down that a key is in use, unless somebody did within the last minute."""
        key = t.api_keys.c
        statement = (
            sa.update(t.api_keys)
            .where(
                key.id == key_id, sa.or_(key.last_used_at.is_(None), key.last_used_at < after(-USED_EVERY_S))
            )
            .values(last_used_at=now())
        )
        self._write(lambda connection: connection.execute(statement))

    # -- how much an owner may have -------------------------------------------------------------

    def queued(self, owner: str | None, limit: int) -> int:
        """How many tasks wait, of *owner* or of all, counted up to *limit*."""
        query = sa.select(sa.literal(1)).where(t.tasks.c.status == TaskStatus.PENDING).limit(limit)
        if owner is not None:
            query = query.where(t.tasks.c.owner == owner)
        count = sa.select(sa.func.count()).select_from(query.subquery())
        return int(self._read(lambda connection: connection.execute(count).scalar_one()))

    def owner_room(self, default: int) -> OwnerRoom:
        """
        What the relay may send of each owner's tasks.

        Args:
            default: Cap on an owner's running tasks where no key says otherwise; 0 is none.
        """
        task, key = t.tasks.c, t.api_keys.c
        said = _running_caps().group_by(key.owner).add_columns(key.owner)
        # Counted here: for a GROUP BY owner the database would read an index of all that waits, or ever was.
        running = sa.select(task.owner).where(
            task.id.in_(sa.select(t.leases.c.task_id)), task.status == TaskStatus.PROCESSING
        )
        sent = sa.select(task.owner).where(
            task.status == TaskStatus.PENDING, task.dispatched_at.is_not(None), task.bound_server.is_(None)
        )

        def read(connection: sa.Connection) -> OwnerRoom:
            caps = {
                row.owner: cap
                for row in connection.execute(said)
                if (cap := _cap(row.least, row.most)) is not None
            }
            if not default and not any(caps.values()):
                return OwnerRoom(0, {}, {})
            used: Counter[str] = Counter()
            for query in (running, sent):
                used.update(connection.execute(query).scalars())
            return OwnerRoom(default, caps, used)

        return self._read(read)

    def running_of(self, owner: str, default: int) -> tuple[int, int]:
        """How many tasks an owner has running, and how many that may be (0: any number)."""
        return self._read(lambda connection: _running_of(connection, owner, default))

    def _is_at_cap(self, connection: sa.Connection, owner: str, default: int) -> bool:
        """
        Whether one more running task of *owner* would be too many.

        Where there is a cap, claims of one owner go one at a time: two of them at once would both see
        the last free place.
        """
        running, cap = _running_of(connection, owner, default)
        if not cap:
            return False
        if self.is_postgresql:
            lock = sa.func.pg_advisory_xact_lock(_OWNER_LOCK, sa.func.hashtext(owner))
            connection.execute(sa.select(lock))
            running, _ = _running_of(connection, owner, default)  # now with the ones that went before us
        return running >= cap


def _running_caps() -> sa.Select[Any]:
    """The least and the greatest cap on running tasks that usable keys name."""
    key = t.api_keys.c
    return sa.select(
        sa.func.min(key.max_running).label("least"), sa.func.max(key.max_running).label("most")
    ).where(
        key.max_running.is_not(None),
        key.revoked_at.is_(None),
        sa.or_(key.expires_at.is_(None), key.expires_at > now()),
    )


def _cap(least: int | None, most: int | None) -> int | None:
    """The most generous of an owner's caps, where 0 is no cap at all; ``None`` if no key names one."""
    return 0 if least == 0 else most


def _running_of(connection: sa.Connection, owner: str, default: int) -> tuple[int, int]:
    said = _running_caps().where(t.api_keys.c.owner == owner).subquery()
    running = (
        sa.select(sa.func.count())
        .where(t.tasks.c.status == TaskStatus.PROCESSING, t.tasks.c.owner == owner)
        .scalar_subquery()
    )
    row = connection.execute(sa.select(said.c.least, said.c.most, running.label("running"))).one()
    cap = _cap(row.least, row.most)
    return int(row.running), default if cap is None else cap


_KEYS = sa.select(
    t.api_keys, sa.func.coalesce(t.api_keys.c.expires_at <= now(), sa.false()).label("is_expired")
)


def _key(row: sa.RowMapping) -> ApiKey:
    return ApiKey(**{**row, "scopes": tuple(row["scopes"]), "is_expired": bool(row["is_expired"])})


_OWNER_LOCK = 731_057
