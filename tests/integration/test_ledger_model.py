"""
A task's life as a state machine, against the real ledger on both databases.

Hypothesis plays workers, sweepers, callers and crashes in any order: claims whose answer was lost,
writes that come twice or far too late, workers that vanish between two steps. A model in plain
Python says what must come of it, and after every step the tables are compared with it.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from genpulse.ledger import Ledger, StaleLease
from genpulse.ledger import tables as t
from genpulse.model import AttemptOutcome, Claim, ErrorInfo, NewTask, TaskStatus
from tests.support.ledger import OOM, open_ledger, output, run_sql

MAX_ATTEMPTS, MAX_LOST = 3, 2
SERVERS = ("gpu1", "gpu2")
PLACES = [("comfy", server) for server in SERVERS]
EXAMPLES = int(os.environ.get("GENPULSE_TEST_EXAMPLES", "30"))
"""More of them for a long search."""
PENDING, PROCESSING = TaskStatus.PENDING, TaskStatus.PROCESSING
COMPLETED, FAILED, CANCELED = TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELED
NUMBERS = st.integers(0, 19)
STEPS = (*["claim"] * 6, *["end"] * 6, "record", "follow", "cancel", "release_bindings", "relay")
PROMPTS = ("adopt", "gpu1", "gpu2", "")
"""What an attempt writes down first: an earlier prompt if there is one, a new one, or none."""
ENDS = (
    *["reap"] * 3,
    *["hand_back"] * 3,
    *["storage_failed"] * 2,
    "retry",
    "completed",
    "failed",
    "canceled",
)


@dataclass
class Try:
    """One attempt as the model knows it."""

    number: int
    prompt: tuple[str, str] | None = None
    """Server and prompt id, once written down."""
    outcome: AttemptOutcome | None = None
    has_deadline: bool = False


@dataclass
class Life:
    """A task as the model knows it."""

    task_id: str
    status: TaskStatus = PENDING
    cancel: bool = False
    failures: int = 0
    losses: int = 0
    bound: str | None = None
    tries: list[Try] = field(default_factory=list)
    strays: set[tuple[str, str]] = field(default_factory=set)
    """Server and prompt id of what an ended attempt may have left."""

    @property
    def running(self) -> Try:
        return self.tries[-1]


@dataclass
class Held:
    """A claim in a worker's hands; it may be long lost."""

    life: Life
    claim: Claim
    servers: tuple[str, ...]

    @property
    def is_newest(self) -> bool:
        return self.life.status is PROCESSING and self.life.running.number == self.claim.fence.attempt

    @property
    def own(self) -> Try:
        return self.life.tries[self.claim.fence.attempt - 1]


class TaskLife(RuleBasedStateMachine):
    """The rules. ``ledger`` is set by the test; each example begins with empty tables."""

    ledger: ClassVar[Ledger]

    def __init__(self) -> None:
        super().__init__()
        run_sql(self.ledger, sa.delete(t.tasks))
        run_sql(self.ledger, sa.delete(t.strays))
        run_sql(self.ledger, sa.delete(t.removals))
        self.lives: list[Life] = []
        self.claims: list[Held] = []
        self.finals: dict[str, tuple[Any, ...]] = {}
        self.tokens = itertools.count()

    # One rule, because Hypothesis leaves out some of several rules in each run, and a life needs all.
    @rule(what=st.sampled_from(STEPS), which=NUMBERS, choice=st.integers(0, 11))
    def step(self, what: str, which: int, choice: int) -> None:
        """One thing that somebody does."""
        if what == "claim":
            servers = ((), ("gpu1",), ("gpu2",))[choice // 4] if which == 1 else SERVERS
            self.claim(self.waiting(which), servers, PROMPTS[choice % 4], twice=which == 2)
        elif what == "cancel":
            self.cancel(self.living(which))
        elif what == "release_bindings":
            self.release_bindings(((), ("gpu1",), SERVERS)[choice % 3])
        elif what == "relay":
            self.relay()
        elif self.claims:
            held = self.holder(which)
            if what == "end":
                self.end_attempt(held, ENDS[choice % len(ENDS)], which % 2 == 0)
            elif what == "record":
                self.record_prompt(held, PROMPTS[choice % 3])
            else:
                self.follow(held)

    def living(self, which: int) -> Life:
        """One of the newest two tasks, so that their lives become long; seldom the very first."""
        return (
            self.lives[0]
            if which == 0 or not self.lives
            else self.lives[-1 - which % min(2, len(self.lives))]
        )

    def waiting(self, which: int) -> Life:
        """A task that waits, or a new one; seldom any."""
        live = [life for life in self.lives if not life.status.is_final]
        if len(live) < 2:
            self.submit()
            live.append(self.lives[-1])
        waiting = [life for life in live if life.status is PENDING]
        return self.living(which) if which == 0 or not waiting else waiting[which % len(waiting)]

    def holder(self, which: int) -> Held:
        """A claim that holds its task; seldom one that lost it long ago. The others have crashed."""
        holding = [held for held in self.claims if held.is_newest]
        return (
            holding[which % len(holding)] if holding and which > 2 else self.claims[which % len(self.claims)]
        )

    # -- callers ------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.submit()

    def submit(self) -> None:
        task, _ = self.ledger.submit(
            NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada", max_attempts=MAX_ATTEMPTS)
        )
        self.lives.append(Life(task.id))

    def cancel(self, life: Life) -> None:
        found = self.ledger.cancel(life.task_id)
        if life.status is PENDING:
            life.status = CANCELED
        if life.status is PROCESSING:
            life.cancel = True
        assert found is not None
        assert found.status is life.status

    # -- workers ------------------------------------------------------------------------------

    def claim(self, life: Life, servers: tuple[str, ...], prompt: str, *, twice: bool) -> None:
        # No backoff stands in the way: how long a wait is, is no part of this model.
        run_sql(
            self.ledger,
            sa.update(t.tasks)
            .where(t.tasks.c.id == life.task_id, t.tasks.c.status == "pending")
            .values(available_at=t.tasks.c.created_at),
        )
        token = f"token-{next(self.tokens)}"
        ask: Callable[[], Claim | None] = lambda: self.ledger.claim(  # noqa: E731  # asked once or twice
            life.task_id, claim=token, worker=f"w{token}", session_key=1, servers=servers, lease_s=15.0
        )
        found = ask()
        if twice:
            assert ask() == found
        may = life.status is PENDING and (life.bound is None or life.bound in servers)
        assert (found is not None) is may
        if found is None:
            return
        judged = {each.prompt for each in life.tries if each.outcome and not each.outcome.leaves_prompt}
        expected = [
            (each.number, each.prompt)
            for each in reversed(life.tries)
            if each.prompt and each.prompt not in judged and each.outcome and each.outcome.leaves_prompt
        ]
        assert [(each.number, (each.server, each.prompt_id)) for each in found.predecessors] == expected
        life.status = PROCESSING
        life.tries.append(Try(len(life.tries) + 1))
        assert found.fence.attempt == life.running.number
        held = Held(life, found, servers)
        self.claims.append(held)
        if prompt:
            self.record_prompt(held, prompt)

    def record_prompt(self, held: Held, prompt: str) -> None:
        """Write down a new prompt on the server *prompt*, or adopt an earlier one if there is one."""
        earlier = held.claim.predecessors
        adopted = prompt == "adopt" and bool(earlier)
        server = prompt if prompt in SERVERS else "gpu1"
        place = (
            (str(earlier[0].server), str(earlier[0].prompt_id)) if adopted else (server, str(uuid.uuid4()))
        )
        matched = self.ledger.record_prompt(
            held.claim.fence, server=place[0], prompt_id=place[1], client_id="c", adopted=adopted
        )
        assert matched is held.is_newest
        if matched:
            held.own.prompt = place
            held.life.bound = None
            if adopted:
                held.life.strays.discard(place)

    def follow(self, held: Held) -> None:
        """A beat, and the two moments of rendering."""
        fence = held.claim.fence
        beats = self.ledger.renew([fence.claim], 15.0)
        assert set(beats) == ({fence.claim} if held.is_newest else set())
        if beats:
            assert beats[fence.claim].cancel is held.life.cancel
        assert (self.ledger.record_running(fence) is not None) is held.is_newest
        assert self.ledger.record_rendered(fence) is held.is_newest

    def end(self, held: Held, expected: TaskStatus, write: Callable[[], TaskStatus | None]) -> None:
        """Check an attempt's last write, made once or repeated after a lost answer."""
        if held.is_newest:
            assert write() is (CANCELED if held.life.cancel else expected)
            return
        before = everything(self.ledger)
        answer = write()
        assert everything(self.ledger) == before
        outcome = held.own.outcome
        if outcome is AttemptOutcome.LOST:
            assert answer is None
        elif outcome in {AttemptOutcome.COMPLETED, AttemptOutcome.FAILED, AttemptOutcome.CANCELED}:
            assert answer == outcome.value
        else:
            assert answer is PENDING

    def ended(
        self, held: Held, status: TaskStatus, outcome: AttemptOutcome, *, stray: bool, bound: bool = False
    ) -> None:
        """The model after an attempt's last write matched."""
        life, own = held.life, held.own
        if life.cancel:
            status, outcome, bound = CANCELED, AttemptOutcome.CANCELED, False
        life.status, own.outcome = status, outcome
        if stray and own.prompt:
            life.strays.add(own.prompt)
        if status.is_final or not bound:
            life.bound = None
        elif own.prompt:
            life.bound = own.prompt[0]

    def end_attempt(self, held: Held, how: str, flag: bool) -> None:
        if how in {COMPLETED, FAILED, CANCELED}:
            self.finish(held, TaskStatus(how), flag)
        elif how == "reap":
            self.reap(held, flag)
        elif how == "hand_back":
            self.hand_back(held, flag)
        else:
            self.retry_later(held, how == "storage_failed", flag)

    def finish(self, held: Held, status: TaskStatus, leaves: bool) -> None:
        was_newest = held.is_newest
        error = None if status is COMPLETED else ErrorInfo("node_error", "A node raised.")
        self.end(
            held,
            status,
            lambda: self.ledger.finish(
                held.claim.fence, status, outputs=[output()], error=error, leaves_prompt=leaves
            ),
        )
        if was_newest:
            self.ended(held, status, AttemptOutcome(status.value), stray=leaves)

    def retry_later(self, held: Held, stored_badly: bool, leaves: bool) -> None:
        was_newest, life = held.is_newest, held.life
        outcome = AttemptOutcome.STORAGE_FAILED if stored_badly else AttemptOutcome.RETRY
        last = life.failures + 1 >= MAX_ATTEMPTS
        self.end(
            held,
            FAILED if last else PENDING,
            lambda: self.ledger.retry_later(
                held.claim.fence, OOM, delay_s=0, outcome=outcome, leaves_prompt=leaves
            ),
        )
        if was_newest:
            life.failures += 0 if life.cancel else 1
            self.ended(
                held,
                FAILED if last else PENDING,
                AttemptOutcome.FAILED if last else outcome,
                stray=leaves or stored_badly,
                bound=stored_badly,
            )

    def hand_back(self, held: Held, may_adopt: bool) -> None:
        was_newest = held.is_newest
        self.end(
            held,
            PENDING,
            lambda: self.ledger.hand_back(held.claim.fence, adopt_wait_s=0.0 if may_adopt else None),
        )
        if was_newest:
            self.ended(held, PENDING, AttemptOutcome.HANDED_BACK, stray=True, bound=may_adopt)

    # -- sweepers -----------------------------------------------------------------------------

    def reap(self, held: Held, again: bool) -> None:
        """A sweeper finds the lease run out, whether its worker lives or not."""
        fence, life = held.claim.fence, held.life
        self.ledger.end_lease_of(f"w{fence.claim}", life.task_id)
        was_newest = held.is_newest
        stale = [lease for lease in self.ledger.stale_leases(60.0) if lease.fence == fence]
        assert len(stale) == was_newest
        lease = StaleLease(fence, "w", 1, expired=True)
        ended = self.ledger.reap(lease, missed_s=6.0, max_lost=MAX_LOST)
        if was_newest:
            losses = life.losses + (not life.cancel)
            status = FAILED if losses > MAX_LOST else PENDING
            assert ended is (CANCELED if life.cancel else status)
            life.losses = losses
            self.ended(held, status, AttemptOutcome.LOST, stray=True, bound=True)
        else:
            assert ended is None
        if again:
            assert self.ledger.reap(lease, missed_s=6.0, max_lost=MAX_LOST) is None

    def release_bindings(self, live: tuple[str, ...]) -> None:
        freed = [life for life in self.lives if life.status is PENDING and life.bound not in {None, *live}]
        assert self.ledger.release_bindings([("comfy", server) for server in live]) == len(freed)
        for life in freed:
            life.bound = None

    def relay(self) -> None:
        """Everything that may go is taken, and what the broker did not take is put back."""
        batch = self.ledger.take("comfy", 3, 100) + self.ledger.take_bound(PLACES)
        assert {each.task_id for each in batch} <= {
            life.task_id for life in self.lives if life.status is PENDING
        }
        bound = {life.task_id: life.bound for life in self.lives}
        assert all(each.server == bound[each.task_id] for each in batch)
        assert self.ledger.put_back(batch) == len(batch)

    # -- what always holds --------------------------------------------------------------------

    @invariant()
    def the_tables_say_what_the_model_says(self) -> None:
        found_rows = read_all(self.ledger)
        tasks = {row["id"]: row for row in found_rows["tasks"]}
        assert tasks.keys() == {life.task_id for life in self.lives}
        attempts: dict[str, list[Any]] = {}
        for row in sorted(found_rows["attempts"], key=lambda row: int(row["number"])):
            attempts.setdefault(row["task_id"], []).append(row)
        leases = {row["task_id"]: row["attempt"] for row in found_rows["leases"]}
        outputs = {row["task_id"]: row["attempt"] for row in found_rows["outputs"]}
        strays: dict[str, set[tuple[str, str]]] = {}
        for row in found_rows["strays"]:
            strays.setdefault(row["task_id"], set()).add((row["server"], row["prompt_id"]))
        removals: dict[str, set[int]] = {}
        for row in found_rows["removals"]:
            removals.setdefault(row["task_id"], set()).add(row["attempt"])
        # A final state never changes.
        for row in tasks.values():
            if row["completed_at"] is not None:
                end = (row["status"], row["attempt"], row["completed_at"], repr(row["error"]))
                assert self.finals.setdefault(row["id"], end) == end
        for life in self.lives:
            row = tasks[life.task_id]
            assert row["status"] == life.status
            assert row["attempt"] == len(life.tries)
            assert (row["failures"], row["losses"]) == (life.failures, life.losses)
            assert life.failures <= MAX_ATTEMPTS
            assert life.losses <= MAX_LOST + 1
            assert (row["bound_server"] if life.status is PENDING else life.bound) == life.bound
            # The history is complete and in order, and only the newest attempt may be open.
            found = attempts.get(life.task_id, [])
            assert [each["number"] for each in found] == list(range(1, len(life.tries) + 1))
            for each, known in zip(found, life.tries, strict=True):
                assert (each["outcome"] or None) == known.outcome
                assert (each["ended_at"] is not None) == (known.outcome is not None)
                assert ((each["server"], each["prompt_id"]) if each["prompt_id"] else None) == known.prompt
            # A lease exists exactly while an attempt runs, and is its own.
            assert leases.get(life.task_id) == (len(life.tries) if life.status is PROCESSING else None)
            # Outputs belong to the attempt that completed the task.
            assert outputs.get(life.task_id) == (len(life.tries) if life.status is COMPLETED else None)
            # Whatever an ended attempt may have left on a server, somebody knows of it.
            assert strays.get(life.task_id, set()) == life.strays
            # And what it may have stored in vain; never of the attempt that completed its task.
            in_vain = {
                each.number for each in life.tries if each.outcome not in {None, AttemptOutcome.COMPLETED}
            }
            assert removals.get(life.task_id, set()) == in_vain


def read_all(ledger: Ledger) -> dict[str, list[sa.RowMapping]]:
    """The rows of the tables that a life touches, in one transaction."""
    tables = (t.tasks, t.attempts, t.leases, t.strays, t.outputs, t.removals)
    with ledger.engine.connect().execution_options(genpulse_read_only=True) as connection:
        return {table.name: list(connection.execute(sa.select(table)).mappings()) for table in tables}


def everything(ledger: Ledger) -> dict[str, list[str]]:
    """The same as text in a fixed order, to see that nothing changed."""
    return {
        name: sorted(repr(tuple(row.values())) for row in found) for name, found in read_all(ledger).items()
    }


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger; durability costs a sync for each of thousands of steps and shows nothing here."""
    with open_ledger(ledger_url, pool_size=1) as found:
        if not found.is_postgresql:

            @sa.event.listens_for(found.engine, "connect")
            def hurry(connection: Any, _record: Any) -> None:
                connection.execute("PRAGMA synchronous=OFF").close()

        yield found


@pytest.mark.timeout(400)  # a failure is shrunk before it is told
def test_a_tasks_life_holds_its_invariants_in_any_order(ledger: Ledger) -> None:
    """Whatever workers, sweepers and callers do, and wherever they crash, the ledger keeps its word."""
    machine = type("TaskLifeHere", (TaskLife,), {"ledger": ledger})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
