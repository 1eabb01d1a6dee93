"""A process that is frozen, or whose host died, in the middle of a transaction does not keep its locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from genpulse.errors import LedgerUnavailable
from genpulse.model import TaskStatus
from tests.support.ledger import claim, open_ledger, submit

HOLDER = """
import sys
import sqlalchemy as sa
from genpulse.ledger import Ledger, tables as t

ledger = Ledger.connect(sys.argv[1])
query = sa.select(t.tasks.c.id).where(t.tasks.c.id == sys.argv[2]).with_for_update()
with ledger.engine.connect() as connection, connection.begin():
    connection.execute(query).all()
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.timeout(120)
def test_a_frozen_transaction_lets_go_of_its_task(postgres_ledger_url: str) -> None:
    """A task whose worker was stopped between two statements can be taken back, well within a lease."""
    with open_ledger(postgres_ledger_url) as ledger:
        task = submit(ledger)
        held = claim(ledger, task)
        command = [sys.executable, "-c", HOLDER, postgres_ledger_url, task.id]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            os.kill(holder.pid, signal.SIGSTOP)
            began = time.monotonic()
            ended = None
            while ended is None and time.monotonic() - began < 30:
                try:
                    ended = ledger.finish(held.fence, TaskStatus.FAILED)
                except LedgerUnavailable:
                    continue  # waited for the lock as long as a statement may
            took_s = time.monotonic() - began
            os.kill(holder.pid, signal.SIGKILL)

    assert ended is TaskStatus.FAILED
    assert took_s < 10
