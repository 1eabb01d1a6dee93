"""
How others know at once that a process is dead: it holds something that dies with it.

On PostgreSQL that is a session advisory lock: ``kill -9`` closes the connection, and the server
frees the lock. On SQLite it is an ``flock`` on a file beside the database: the kernel frees it.
A process that is merely cut off looks dead as well, which is why the lock alone decides nothing:
the sweeper also wants three missed beats, and the fence keeps a wrongly reaped one's writes out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from genpulse.errors import LedgerUnavailable
from genpulse.ledger.ledger import Ledger
from genpulse.ledger.running import Beat

__all__ = ["ProcessSession", "SessionProbe"]


def _folder(ledger: Ledger) -> Path:
    return Path(f"{ledger.engine.url.database}.sessions")


_sessions: weakref.WeakSet[ProcessSession] = weakref.WeakSet()
_abandoned: list[object] = []  # kept, so that no destructor runs on a parent's connection


def _abandon_all() -> None:
    for session in list(_sessions):
        session.abandon()
    _sessions.clear()


os.register_at_fork(after_in_child=_abandon_all)


class ProcessSession:
    """
    What one process holds while it lives, and, on PostgreSQL, hears notifications on.

    Not for sharing between threads, and never across a fork: make it in the process it stands for.
    """

    def __init__(self, ledger: Ledger, direct_url: str | None = None) -> None:
        self.key = secrets.randbits(62)
        """Written beside every lease and worker row of this process."""
        self._ledger = ledger
        # Its own engine: behind a transaction pooler a session lock needs the direct address.
        self._direct = Ledger.connect(direct_url) if direct_url else ledger
        self._connection: sa.Connection | None = None
        self._locked = False
        self._file: int | None = None
        _sessions.add(self)

    def abandon(self) -> None:
        """
        In a forked child: close the copies of the parent's descriptors and nothing else.

        A copy would keep the lock after the parent's death. Neither library may be told, for it
        would say good-bye to the server in the parent's name.
        """
        if self._connection is not None:
            with contextlib.suppress(Exception):
                os.close(_driver(self._connection).fileno())
            _abandoned.append(self._connection)
            self._connection = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def hold(self) -> None:
        """
        Take the lock, or make sure that it is still held; cheap to repeat with every beat.

        Raises:
            LedgerUnavailable: It could not be taken now. Leases still work, only slower to reap.
        """
        if self._ledger.is_postgresql:
            self._hold_connection()
        elif self._file is None:
            folder = _folder(self._ledger)
            folder.mkdir(exist_ok=True)
            path = folder / str(self.key)
            while True:
                file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(file, fcntl.LOCK_EX)
                # Between the two lines a sweeper may have collected the file as a dead process's.
                if os.fstat(file).st_nlink:
                    self._file = file
                    return
                os.close(file)

    def _hold_connection(self) -> None:
        with self._ours() as connection:
            # Not the first time: our own lost connection may still hold it on the server.
            held = sa.literal(1) if self._locked else sa.func.pg_try_advisory_lock(self.key)
            self._locked = connection.execute(sa.select(held)).scalar() not in {None, False}
            # Words that came with the answer, not through wait(). The beat that follows sees what they
            # announce; kept, they would pile up where nobody waits for words.
            _driver(connection).notifies.clear()

    @contextlib.contextmanager
    def _ours(self) -> Iterator[sa.Connection]:
        """The connection, made if it is not there; each statement on it is a transaction of its own."""
        try:
            if self._connection is None:
                connection = self._direct.engine.connect()
                self._connection = connection.execution_options(isolation_level="AUTOCOMMIT")
                self._connection.execute(sa.text("LISTEN genpulse"))
            yield self._connection
            self._connection.commit()
        except Exception as error:
            self._drop_connection()
            # The driver raises its own and SQLAlchemy's classes; every one of them means "not now".
            raise LedgerUnavailable(str(error).partition("\n")[0]) from error

    def renew(self, claims: Collection[str], lease_s: float) -> dict[str, Beat]:
        """
        Renew the leases of this process as :meth:`Ledger.renew` does, without a further connection.

        Raises:
            LedgerUnavailable: The connection is lost; the next :meth:`hold` opens another.
        """
        if not self._ledger.is_postgresql:
            return self._ledger.renew(claims, lease_s)
        with self._ours() as connection:
            return self._ledger.renew(claims, lease_s, connection=connection)

    def _drop_connection(self) -> None:
        self._locked = False
        if self._connection is not None:
            with contextlib.suppress(Exception):  # it is broken already
                self._connection.invalidate()
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def wait(self, timeout_s: float, waker: int) -> list[str]:
        """
        Sleep until *waker* (a file descriptor) becomes readable, a notification comes, or time is up.

        Returns:
            The words of the notifications, for example ``cancel`` or ``task``.
        """
        connection = _driver(self._connection) if self._connection is not None else None
        watched: list[int] = [waker]
        if connection is not None:
            if connection.notifies:  # they came with the answer to a renewal
                timeout_s = 0.0
            watched.append(connection.fileno())
        readable, _, _ = select.select(watched, [], [], max(0.0, timeout_s))
        if connection is None or (readable in ([], [waker]) and not connection.notifies):
            return []
        try:
            connection.poll()
            notes = [note.payload for note in connection.notifies]
            connection.notifies.clear()
        except Exception:  # noqa: BLE001  # the server closed the connection; the next hold() opens another
            self._drop_connection()
            return []
        return notes

    def release(self) -> None:
        """Let go, so that nobody waits for this process any more."""
        self._drop_connection()
        if self._file is not None:
            (_folder(self._ledger) / str(self.key)).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def _driver(connection: sa.Connection) -> Any:
    """psycopg2's own connection, for its descriptor and its notifications."""
    return connection.connection.dbapi_connection


class SessionProbe:
    """Asks which processes still hold their session."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def alive(self, keys: Collection[int]) -> set[int]:
        """The keys among *keys* whose process lives. A session that was never taken counts as dead."""
        if self._ledger.is_postgresql:
            return self._ledger.sessions_alive(keys)
        return {key for key in keys if self._file_is_held(key)}

    def _file_is_held(self, key: int) -> bool:
        try:
            file = os.open(_folder(self._ledger) / str(key), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not deceive each other
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def collect(self) -> None:
        """Remove the files of dead processes (SQLite only)."""
        if self._ledger.is_postgresql:
            return
        for path in _folder(self._ledger).glob("[0-9]*"):
            if not self._file_is_held(int(path.name)):
                path.unlink(missing_ok=True)
