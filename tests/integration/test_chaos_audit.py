"""The chaos program's book: the database's own triggers write down every change of a task's state."""

from __future__ import annotations

import sqlalchemy as sa

from genpulse.model import TaskStatus
from tests.chaos import audit
from tests.support.ledger import claim, open_ledger, output, submit


def test_the_book_of_a_good_life_is_clean(ledger_url: str) -> None:
    """On both databases the triggers see a claim, a hand-back and an end with an output."""
    with open_ledger(ledger_url) as ledger:
        audit.install(ledger.engine)
        task = submit(ledger)
        ledger.hand_back(claim(ledger, task).fence, adopt_wait_s=None)
        ledger.finish(claim(ledger, task).fence, TaskStatus.COMPLETED, outputs=[output()])
        entries = audit.read(ledger.engine)

        with ledger.engine.begin() as connection:
            connection.execute(sa.text("UPDATE tasks SET claim = 'x' WHERE attempt = 2"))
        assert len(list(audit.wrong(audit.read(ledger.engine)))) == 1
    assert [each.new_status for each in entries] == [
        "processing", "pending", "processing", "completed", "output of completed",
    ]  # fmt: skip
    assert {each.task_id for each in entries} == {task.id}
    assert list(audit.wrong(entries)) == []
