"""
Connections, transactions and the fork rule: what every statement of the ledger stands on.

Two traps decide this module, both measured. A plain ``BEGIN`` on SQLite that later writes fails
with "database is locked" at once, whatever ``busy_timeout`` says, so every transaction that may
write begins with ``BEGIN IMMEDIATE``. And a thread that is inside SQLite while its process forks
leaves the child locked for ever, so background work in a process that forks happens under
:data:`fork_lock`, which a fork waits for.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import NullPool

from genpulse.errors import LedgerUnavailable
from genpulse.ledger.types import now

__all__ = ["Base", "connect", "fork_lock"]

T = TypeVar("T")

READ_ONLY = {"genpulse_read_only": True}
READ_WRITE = {"genpulse_read_only": False}

_CONNECT_POSTGRESQL = {
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
    "application_name": "genpulse",
}
_SQLITE_BUSY_S = 30.0
# Fixed in 3.51.3 and in two back-ports: a race that can corrupt a database in WAL mode.
_SQLITE_WAL_SAFE = ((3, 44, 6), (3, 50, 7), (3, 51, 3))


class _ForkLock:
    """
    A lock that background threads hold while they speak to the ledger or to Redis.

    ``os.register_at_fork`` takes it around each fork, so that the child starts with no thread of
    its parent inside a library. The child gets a fresh lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        os.register_at_fork(
            before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
        )

    def _before(self) -> None:
        self._lock.acquire()

    def _after_in_parent(self) -> None:
        self._lock.release()

    def _after_in_child(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


fork_lock = _ForkLock()

FROZEN_TRANSACTION_S = 5.0
"""How long a transaction may wait for its own process (PostgreSQL); far below a lease."""
_SERVER_SETTINGS = {
    "statement_timeout": "15000",
    "lock_timeout": "10000",
    "timezone": "UTC",
    # A process that is frozen, or whose host died, between two statements of a transaction keeps its
    # row locks, and its task could be neither reaped nor canceled: the server ends it.
    "idle_in_transaction_session_timeout": str(int(1000 * FROZEN_TRANSACTION_S)),
}


def connect(url: str, *, pool_size: int = 0, server_settings: bool = True) -> sa.Engine:
    """
    Make an engine for a ledger's database. Nothing is connected yet.

    Args:
        url: ``postgresql+psycopg2://…`` or ``sqlite:///file``; a missing folder is made.
        pool_size: Connections kept open. 0 opens and closes one for each transaction, which is
            what a process that forks must do: nothing is there to be inherited.
        server_settings: Send time-outs when connecting. A transaction pooler refuses them: then, and
            without, each transaction sets its own, which is one more round trip.
    """
    parsed = sa.make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        # SQLAlchemy 2.1 reads the bare name as psycopg 3, which we do not ship.
        parsed = parsed.set(drivername="postgresql+psycopg2")
    pool: dict[str, Any] = (
        {"pool_size": pool_size, "max_overflow": 4 * pool_size, "pool_timeout": 5}
        if pool_size
        else {"poolclass": NullPool}
    )
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(parsed, connect_args={"timeout": _SQLITE_BUSY_S}, **pool)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    arguments: dict[str, Any] = dict(_CONNECT_POSTGRESQL)
    engine = sa.create_engine(parsed, connect_args=arguments, **pool)
    settings = _ServerSettings(sent=server_settings)
    sa.event.listen(engine, "do_connect", settings.connect)
    sa.event.listen(engine, "begin", settings.begin)
    return engine


class _ServerSettings:
    """
    Our time-outs on PostgreSQL: sent when connecting, or set in each transaction.

    Source: PgBouncer's manual, ``ignore_startup_parameters``: it refuses a client that sends options.
    """

    def __init__(self, *, sent: bool) -> None:
        self._sent = sent

    def connect(self, dialect: Any, _record: Any, arguments: Any, parameters: dict[str, Any]) -> Any:
        options = " ".join(f"-c {name}={value}" for name, value in _SERVER_SETTINGS.items())
        if self._sent:
            try:
                return dialect.connect(*arguments, **parameters, options=options)
            except dialect.loaded_dbapi.OperationalError as error:
                if "startup parameter" not in str(error):
                    raise
                self._sent = False
        return dialect.connect(*arguments, **parameters)

    def begin(self, connection: sa.Connection) -> None:
        if not self._sent and connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            words = [f"SET LOCAL {name} = '{value}'" for name, value in _SERVER_SETTINGS.items()]
            connection.exec_driver_sql("; ".join(words))


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late
    safe = any(
        sqlite3.sqlite_version_info[:2] == version[:2] and sqlite3.sqlite_version_info >= version
        for version in _SQLITE_WAL_SAFE
    )
    journal = "WAL" if safe or sqlite3.sqlite_version_info >= max(_SQLITE_WAL_SAFE) else "TRUNCATE"
    for pragma in (
        f"busy_timeout={int(_SQLITE_BUSY_S * 1000)}",
        f"journal_mode={journal}",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("genpulse_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


class _Shared(threading.local):
    """What :meth:`Base.together` keeps for one thread."""

    is_wanted = False
    connection: sa.Connection | None = None


class Base:
    """One engine, and transactions on it whose failures are ours."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.is_postgresql = engine.dialect.name == "postgresql"
        self._insert: Callable[[sa.Table], Any] = (
            postgresql.insert
            if self.is_postgresql
            else sqlite.insert  # ON CONFLICT is spelled by the dialect
        )
        self._shared = _Shared()

    @classmethod
    def connect(cls, url: str, *, pool_size: int = 0, server_settings: bool = True) -> Self:
        """Open a ledger by URL; see :func:`connect`."""
        return cls(connect(url, pool_size=pool_size, server_settings=server_settings))

    def close(self) -> None:
        """Close the connections that are kept."""
        self.engine.dispose()

    def ping(self) -> dt.datetime:
        """
        Ask the database for its tables, and for its time.

        Raises:
            LedgerUnavailable: It did not answer, or the migrations were not run.
        """
        query = sa.select(now(), sa.text("(SELECT 1 FROM tasks LIMIT 1)"))
        at: dt.datetime = self._read(lambda connection: connection.execute(query).one()[0])
        return at

    def _read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run *work* in a transaction that only reads."""
        return self._transact(work, READ_ONLY)

    def _write(self, work: Callable[[sa.Connection], T]) -> T:
        """
        Run *work* in a transaction that may write.

        A connection that turns out dead before the commit is replaced once, because nothing was
        done on it yet; a commit whose answer was lost raises, *in doubt*, and its caller reads back.
        """
        return self._transact(work, READ_WRITE)

    def _write_or_find(
        self, work: Callable[[sa.Connection], T], find: Callable[[sa.Connection], T | None]
    ) -> T:
        """
        :meth:`_write`; where the commit's answer was lost, what *find* finds of it is the answer.

        What is not there yet may come still, from a commit that is under way: then it stays in doubt.
        """
        try:
            return self._write(work)
        except LedgerUnavailable as error:
            if not error.in_doubt:
                raise
            with contextlib.suppress(LedgerUnavailable):
                if (found := self._read(find)) is not None:
                    return found
            raise

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """
        Do this thread's transactions meanwhile on one connection, which is given back at the end.

        For passes of a dozen statements in a process that keeps no connection: to open one for each
        costs more, here and in the database, than what they ask. They stay transactions of their own.
        """
        if self._shared.is_wanted:
            yield
            return
        self._shared.is_wanted = True
        try:
            yield
        finally:
            self._shared.is_wanted = False
            self._drop_shared()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        if not self._shared.is_wanted:
            with self.engine.connect() as connection:
                yield connection
            return
        if self._shared.connection is None:
            self._shared.connection = self.engine.connect()
        try:
            yield self._shared.connection
        except BaseException:
            self._drop_shared()  # whatever state it is in
            raise

    def _drop_shared(self) -> None:
        connection, self._shared.connection = self._shared.connection, None
        if connection is not None:
            with contextlib.suppress(sa.exc.DBAPIError):  # it is broken already
                connection.close()

    def _transact(self, work: Callable[[sa.Connection], T], options: dict[str, Any]) -> T:
        for last in (False, True):
            committing = False
            try:
                with self._connected() as connection:
                    connection.execution_options(**options)
                    with connection.begin():
                        result = work(connection)
                        committing = True
                    return result
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated and not committing and not last:
                    continue
                in_doubt = committing and options is READ_WRITE
                if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.InternalError):
                    raise LedgerUnavailable(_reason(error), in_doubt=in_doubt) from error
                if error.connection_invalidated:
                    raise LedgerUnavailable(_reason(error), in_doubt=in_doubt) from error
                if isinstance(error, sa.exc.ProgrammingError):  # tables are missing: not migrated yet
                    raise LedgerUnavailable(_reason(error)) from error
                raise
            except sa.exc.TimeoutError as error:
                msg = "no database connection became free"
                raise LedgerUnavailable(msg) from error
        raise AssertionError  # the loop returns or raises


def _reason(error: sa.exc.DBAPIError) -> str:
    """The first line of the driver's words; statement and parameters stay out of it."""
    words = str(error.orig)
    if "no such table" in words or ("relation" in words and "does not exist" in words):
        return "the tables are missing or old: run `genpulse migrate`"
    return str(error.orig).strip().partition("\n")[0] or type(error.orig).__name__
