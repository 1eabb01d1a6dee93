"""
How a task looks in a terminal: a moving bar where there is one, plain lines where there is none.

Everything goes to standard error, so that standard output holds results only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Show", "describe", "error_line", "showing", "status_parts"]

PLAIN_STEP = 20
"""Percent between two plain lines of one state."""


class Show(Protocol):
    """Takes each reading of ``GET /task/{id}``."""

    def __call__(self, task: Mapping[str, Any], /) -> None:
        """Show this reading."""


@contextmanager
def showing(console: Console, *, quiet: bool = False) -> Iterator[Show]:
    """A function that shows readings of one task on *console* while the block runs."""
    if quiet:
        yield lambda _task, /: None
    elif console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=False,
        ) as bar:
            row = bar.add_task("sent", total=100)

            def move(task: Mapping[str, Any], /) -> None:
                done = 100 if task["status"] == "completed" else task.get("progress") or 0
                bar.update(row, completed=done, description=describe(task))

            yield move
    else:
        yield _Lines(console)


class _Lines:
    """One line for each change that matters to somebody reading a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[str, int] = ("", -1)

    def __call__(self, task: Mapping[str, Any], /) -> None:
        percent = int(task.get("progress") or 0)
        now = (str(task["status"]), percent // PLAIN_STEP)
        if now != self._last:
            self._last = now
            shown = f"{describe(task)} {percent} %" if task["status"] == "processing" else describe(task)
            self._console.print(shown, markup=False, highlight=False, soft_wrap=True)


def describe(task: Mapping[str, Any]) -> str:
    """The state of a task in a few words: ``processing KSampler``, ``pending, number 3 in line``."""
    status = str(task["status"])
    if status == "pending":
        reason = task.get("wait_reason") or {}
        if isinstance(reason, Mapping) and reason.get("text"):
            return f"pending: {reason['text']}"
        position = task.get("queue_position")
        return f"pending, number {position} in line" if position else "pending"
    if status == "processing":
        detail = task.get("progress_detail") or {}
        return " ".join(filter(None, ("processing", str(detail.get("class_type") or ""))))
    return status


def error_line(task: Mapping[str, Any]) -> str:
    """Why a final task did not complete, in one line."""
    error = task.get("error") or {}
    code = str(error.get("code") or task["status"])
    node = error.get("node_id")
    known = f"node {node}, {kind}" if (kind := error.get("class_type")) else f"node {node}"
    where = f" ({known})" if node else ""
    message = " ".join(str(error.get("message") or "").split())
    return f"{code}{where}" + (f": {message}" if message else "")


def status_parts(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    """``GET /status`` for a person: one line, what is wrong, and a table for each list it has."""
    yield Text(f"{status.get('status', '?')}, version {status.get('version', '?')}")
    for problem in status.get("problems") or ():
        yield Text(f"  - {problem}")
    for name in ("queues", "workers", "servers"):
        if rows := _rows(status.get(name)):
            yield Text("")
            yield _table(name, rows)


def _rows(found: Any) -> list[Mapping[str, Any]]:
    """A list of objects, or an object of objects, as rows."""
    if isinstance(found, Mapping):
        return [
            {"name": name, **(row if isinstance(row, Mapping) else {"value": row})}
            for name, row in found.items()
        ]
    return [row for row in found or () if isinstance(row, Mapping)]


def _table(name: str, rows: list[Mapping[str, Any]]) -> Table:
    columns = [
        column for column in dict.fromkeys(name for row in rows for name in row) if column not in _UNSHOWN
    ]
    table = Table(*columns, title=name, title_justify="left", box=None, header_style="dim")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


_UNSHOWN = frozenset({"version", "started_at"})
"""What ``--json`` has and a person does not miss."""
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and (instant := _INSTANT.match(value)):
        return f"{instant[1]} UTC"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(found)}" for key, found in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(
            _cell(item.get("name") if isinstance(item, Mapping) and "name" in item else item)
            for item in value
        )
    return str(value)
