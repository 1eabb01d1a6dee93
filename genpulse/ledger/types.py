"""
The few SQL words that PostgreSQL and SQLite spell differently: times and "now".

Time is the database's, never a host's, so that workers with wrong clocks cannot reap each other.
PostgreSQL keeps ``timestamptz``; SQLite keeps integer milliseconds since the epoch, because it has
no time type and compares text.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import functions
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = ["Timestamp", "after", "now"]

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MILLISECOND = dt.timedelta(milliseconds=1)


class Timestamp(TypeDecorator[dt.datetime]):
    """An aware UTC time with at least a millisecond's precision."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """BIGINT milliseconds on SQLite, ``timestamptz`` elsewhere."""
        if dialect.name == "sqlite":
            return dialect.type_descriptor(sa.BigInteger())
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> Any:
        """Refuse naive times: they mean something else on every host."""
        if value is None:
            return None
        if value.tzinfo is None:
            msg = "a time without a zone"
            raise ValueError(msg)
        return (value - _EPOCH) // _MILLISECOND if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> dt.datetime | None:
        """Aware UTC, whatever zone the session has."""
        if value is None:
            return None
        if dialect.name == "sqlite":
            return _EPOCH + int(value) * _MILLISECOND
        assert isinstance(value, dt.datetime)
        return value.astimezone(dt.UTC)


class now(functions.FunctionElement[dt.datetime]):  # noqa: N801  # reads as the SQL function it is
    """The time at the start of this statement, by the database's clock."""

    type = Timestamp()
    inherit_cache = True
    name = "now"


class after(functions.FunctionElement[dt.datetime]):  # noqa: N801  # reads as the SQL function it is
    """``after(seconds)`` is that many seconds from now; negative is in the past."""

    type = Timestamp()
    inherit_cache = True
    name = "after"

    def __init__(self, seconds: float | sa.ColumnElement[Any]) -> None:
        literal = sa.literal(seconds, sa.Float) if isinstance(seconds, int | float) else seconds
        super().__init__(literal)


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **kw: Any) -> str:  # noqa: ARG001  # given by SQLAlchemy
    return "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kw: Any) -> str:  # noqa: ARG001  # given by SQLAlchemy
    # unixepoch('subsec') is younger than the SQLite of Debian 12; julianday is exact to 0.05 ms.
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


@compiles(after, "postgresql")
def _after_postgresql(element: after, compiler: SQLCompiler, **kw: Any) -> str:
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(after, "sqlite")
def _after_sqlite(element: after, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return (
        "(CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"
        f" + CAST(ROUND(({seconds}) * 1000.0) AS INTEGER))"
    )
