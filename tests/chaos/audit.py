"""
A book that the database itself keeps, by triggers of this program: every change of a task's state.

Polling sees what a row is; this sees all that it ever was, whoever wrote it, in the order of the
commits' row locks. So a write of an old attempt cannot hide between two looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa

__all__ = ["Entry", "install", "read", "wrong"]

FINAL = frozenset({"completed", "failed", "canceled"})

_CHANGED = (
    "OLD.status IS {differs} NEW.status OR OLD.attempt IS {differs} NEW.attempt"
    " OR OLD.claim IS {differs} NEW.claim"
)
_COLUMNS = "task_id, old_status, new_status, old_attempt, new_attempt, old_claim, new_claim"
_CHANGE = "NEW.id, OLD.status, NEW.status, OLD.attempt, NEW.attempt, OLD.claim, NEW.claim"
_TABLE = (
    f"CREATE TABLE chaos_audit (id {{serial}}, {_COLUMNS.replace('task_id', 'task_id {uuid} NOT NULL')})".replace(
        "_status", "_status TEXT"
    )
    .replace("_attempt", "_attempt INTEGER")
    .replace("_claim", "_claim TEXT")
)
_OUTPUT = (
    "INSERT INTO chaos_audit (task_id, new_status, old_attempt, new_attempt)"
    " SELECT NEW.task_id, 'output of ' || status, NEW.attempt, attempt FROM tasks WHERE id = NEW.task_id;"
)
_POSTGRESQL = (
    _TABLE.format(serial="bigserial PRIMARY KEY", uuid="uuid"),
    f"""
    CREATE FUNCTION chaos_note_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO chaos_audit ({_COLUMNS}) VALUES ({_CHANGE}); RETURN NULL; END $$
    """,
    f"""
    CREATE FUNCTION chaos_note_output() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN {_OUTPUT} RETURN NULL; END $$
    """,
    f"""
    CREATE TRIGGER chaos_note_change AFTER UPDATE ON tasks FOR EACH ROW
    WHEN ({_CHANGED.format(differs="DISTINCT FROM")}) EXECUTE FUNCTION chaos_note_change()
    """,
    """
    CREATE TRIGGER chaos_note_output AFTER INSERT ON outputs
    FOR EACH ROW EXECUTE FUNCTION chaos_note_output()
    """,
)
_SQLITE = (
    _TABLE.format(serial="INTEGER PRIMARY KEY", uuid="TEXT"),
    f"""
    CREATE TRIGGER chaos_note_change AFTER UPDATE ON tasks WHEN {_CHANGED.format(differs="NOT")}
    BEGIN INSERT INTO chaos_audit ({_COLUMNS}) VALUES ({_CHANGE}); END
    """,
    f"CREATE TRIGGER chaos_note_output AFTER INSERT ON outputs BEGIN {_OUTPUT} END",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One change of a row of ``tasks``; an output that was written has ``new_status`` ``output of …``."""

    task_id: str
    old_status: str | None
    new_status: str
    old_attempt: int
    new_attempt: int
    old_claim: str | None
    new_claim: str | None


def install(engine: sa.Engine) -> None:
    """Add the book to a migrated ledger."""
    with engine.begin() as connection:
        for statement in _POSTGRESQL if connection.dialect.name == "postgresql" else _SQLITE:
            connection.exec_driver_sql(statement)


def read(engine: sa.Engine) -> list[Entry]:
    """All of it, in order."""
    query = sa.text(f"SELECT {_COLUMNS} FROM chaos_audit ORDER BY id")
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return [Entry(_canonical(str(row[0])), *row[1:]) for row in rows]


def _canonical(task_id: str) -> str:
    """SQLAlchemy keeps a UUID without its dashes in SQLite."""
    if len(task_id) != 32:
        return task_id
    return "-".join((task_id[:8], task_id[8:12], task_id[12:16], task_id[16:20], task_id[20:]))


def wrong(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """Changes that no life of a task has: ``(task id, what)``."""
    for entry in entries:
        if problem := _problem(entry):
            yield entry.task_id, problem


def _problem(entry: Entry) -> str | None:
    change = f"{entry.old_status}/{entry.old_attempt} became {entry.new_status}/{entry.new_attempt}"
    if entry.new_status.startswith("output of "):
        if entry.new_status == "output of completed" and entry.old_attempt == entry.new_attempt:
            return None
        return f"an output of attempt {entry.old_attempt} was written: {entry.new_status}/{entry.new_attempt}"
    if entry.old_status in FINAL:
        return f"a final state was changed: {change}"
    if (entry.old_status, entry.new_status) == ("pending", "processing"):
        fresh = entry.new_attempt == entry.old_attempt + 1 and entry.new_claim not in {None, entry.old_claim}
        return None if fresh else f"claimed without a fence of its own: {change}"
    if entry.new_attempt != entry.old_attempt:
        return f"the attempt changed without a claim: {change}"
    if entry.old_status == entry.new_status == "processing":
        return f"a running attempt's claim was changed: {change}"
    if (entry.old_status, entry.new_status) == ("pending", "completed"):
        return f"completed and not running: {change}"
    return None
