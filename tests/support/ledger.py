"""Short ways to a task in the state that a test of the ledger is about."""

from __future__ import annotations

import itertools
import secrets
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any, TypeVar

import sqlalchemy as sa

from genpulse.ledger import Ledger, StaleLease
from genpulse.ledger import tables as t
from genpulse.model import Claim, ErrorInfo, NewOutput, NewTask, OutputKind, Task, TaskStatus

__all__ = [
    "OOM",
    "at_once",
    "claim",
    "die",
    "open_ledger",
    "output",
    "prompt",
    "row_of",
    "rows",
    "run_sql",
    "submit",
    "try_claim",
]

T = TypeVar("T")

OOM = ErrorInfo(code="out_of_memory", message="The GPU's memory did not suffice.", retryable=True)


@contextmanager
def open_ledger(url: str, pool_size: int = 0) -> Iterator[Ledger]:
    """A ledger that is closed at the end, also where the bare ``postgresql://`` is meant."""
    ledger = Ledger.connect(url, pool_size=pool_size)
    try:
        yield ledger
    finally:
        ledger.close()


def submit(ledger: Ledger, **values: Any) -> Task:
    """A new pending task."""
    task, _ = ledger.submit(
        NewTask(**({"task_type": "comfyui", "queue": "comfy", "params": {"n": 1}, "owner": "ada"} | values))
    )
    return task


def claim(ledger: Ledger, task: Task | str, *, servers: Sequence[str] = (), **values: Any) -> Claim:
    """Claim a task that is to be had."""
    found = try_claim(ledger, task, servers=servers, **values)
    assert found is not None, "the task is not to be had"
    return found


def try_claim(
    ledger: Ledger, task: Task | str, *, servers: Sequence[str] = (), **values: Any
) -> Claim | None:
    """Claim a task with a fresh token, or find out that it is not to be had."""
    given: dict[str, Any] = {
        "claim": secrets.token_hex(8),
        "worker": "w@host:1",
        "session_key": 1,
        "lease_s": 15.0,
        **values,
    }
    return ledger.claim(task if isinstance(task, str) else task.id, servers=servers, **given)


def prompt(ledger: Ledger, held: Claim, server: str = "gpu1", prompt_id: str | None = None) -> str:
    """Write down a prompt of this attempt, adopted if its id is given."""
    name = prompt_id or str(uuid.uuid4())
    assert ledger.record_prompt(
        held.fence, server=server, prompt_id=name, client_id="client", adopted=prompt_id is not None
    )
    return name


def die(ledger: Ledger, held: Claim, *, max_lost: int = 3) -> TaskStatus | None:
    """The attempt's worker vanishes: its lease runs out and a sweeper takes the task back."""
    run_sql(
        ledger,
        sa.update(t.leases)
        .where(t.leases.c.claim == held.fence.claim)
        .values(expires_at=sa.text("renewed_at")),
    )
    lease = StaleLease(held.fence, "w@host:1", 1, expired=True)
    return ledger.reap(lease, missed_s=6.0, max_lost=max_lost)


_counter = itertools.count()


def output(name: str | None = None) -> NewOutput:
    """A stored file with a key of its own."""
    name = name or f"out-{next(_counter)}.png"
    return NewOutput("9", name, OutputKind.IMAGE, "image/png", 10, "0" * 64, f"outputs/{name}", 4, 2)


def run_sql(ledger: Ledger, statement: sa.Executable | str) -> int:
    """Run raw SQL as somebody who does not use the ledger's verbs; returns how many rows it touched."""
    with ledger.engine.begin() as connection:
        return connection.execute(sa.text(statement) if isinstance(statement, str) else statement).rowcount


def rows(ledger: Ledger, table: sa.Table, *where: sa.ColumnElement[bool]) -> list[sa.RowMapping]:
    """Rows of a table as mappings."""
    with ledger.engine.connect() as connection:
        return list(connection.execute(sa.select(table).where(*where)).mappings())


def row_of(ledger: Ledger, task: Task | str) -> sa.RowMapping:
    """The task's own row, with the columns that the public record leaves out."""
    (row,) = rows(ledger, t.tasks, t.tasks.c.id == (task if isinstance(task, str) else task.id))
    return row


def at_once(number: int, act: Callable[[int], T]) -> list[T]:
    """Call ``act(0)``, ``act(1)``, … in as many threads, let go at the same moment."""
    barrier = Barrier(number)

    def go(index: int) -> T:
        barrier.wait(10)
        return act(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(go, range(number)))
