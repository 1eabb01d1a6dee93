"""
The life of an attempt: claim, renew, record the prompt, finish, give back, and what death leaves.

Every write of a running attempt carries its :class:`~genpulse.model.Fence`: the attempt's number
and a random claim token. A write that matches no row was a loser's and changed nothing. Each
function may be repeated after an answer was lost; what it finds then is recognised as its own.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from genpulse.errors import OutOfMemory
from genpulse.ledger import tables as t
from genpulse.ledger.lists import Lists
from genpulse.ledger.requests import CANCELED, WHOLE, attempt_from_row, new_id, task_from_row
from genpulse.ledger.types import Timestamp, after, now
from genpulse.model import (
    Attempt,
    AttemptOutcome,
    Claim,
    ErrorInfo,
    Fence,
    NewOutput,
    TaskStatus,
)

__all__ = ["Beat", "Running", "StaleLease", "Stray"]

WORKER_LOST = ErrorInfo(
    code="worker_lost",
    message="The worker vanished while it ran this task, as often as the limit allows.",
    retryable=True,
)
LOSS_BACKOFF_S = (0.0, 2.0, 10.0, 30.0)
"""Wait before the attempt after the first, second, … loss. The first waits for nothing."""
REMOVAL_PASSES_S = (30.0, 600.0, 86_400.0)
"""
How long after its end what an attempt stored is deleted, if no completed task names it.

The first is later than a lease; the others find what a process stored that was fenced off and went on,
or was frozen for long.
"""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a renewal told about one lease."""

    cancel: bool
    late: bool


@dataclass(frozen=True, slots=True)
class StaleLease:
    """A lease that was not renewed for three beats, or ran out."""

    fence: Fence
    worker: str
    session_key: int
    expired: bool


@dataclass(frozen=True, slots=True)
class Stray:
    """A prompt that may still be on a server although no attempt follows it."""

    server: str
    prompt_id: str
    task_id: str
    attempt: int


class Running(Lists):
    """The statements of workers and of the sweeper about attempts."""

    def claim(  # who claims, for how long, and what it serves
        self,
        task_id: str,
        *,
        claim: str,
        worker: str,
        session_key: int,
        servers: Collection[str],
        lease_s: float,
        max_running: int = 0,
    ) -> Claim | None:
        """
        Take a pending task for a new attempt, or find out that it is not to be had.

        Survives a lost answer: called again with the same *claim* it returns the same attempt.

        Args:
            claim: A fresh random token of the caller's.
            worker: Name of the child process, ``node:pid``.
            session_key: What the process holds while it lives; see ``Heartbeat``.
            servers: Names of the ComfyUI servers this worker serves. A task bound to another
                server is refused.
            max_running: Cap on the running tasks of one owner, where no key says otherwise; 0 is none.

        Returns:
            The claim, or ``None``: running, final, canceled, not due yet, expired, bound elsewhere, or
            one more than its owner may have running. That one is back in the outbox.
        """

        def take(connection: sa.Connection) -> Claim | None:
            task = t.tasks.c
            if self._put_back_if_at_cap(connection, task_id, max_running):
                return None
            taken = (
                connection.execute(
                    sa.update(t.tasks)
                    .where(
                        task.id == task_id,
                        task.status == TaskStatus.PENDING,
                        task.cancel_requested_at.is_(None),
                        task.available_at <= now(),
                        sa.or_(task.bound_server.is_(None), task.bound_server.in_(list(servers))),
                        sa.or_(task.attempt > 0, task.expires_at.is_(None), task.expires_at > now()),
                    )
                    .values(
                        status=TaskStatus.PROCESSING,
                        attempt=task.attempt + 1,
                        claim=claim,
                        updated_at=now(),
                        started_at=sa.func.coalesce(task.started_at, now()),
                    )
                    .returning(t.tasks)
                )
                .mappings()
                .first()
            )
            if taken is None:
                return self._own_claim(connection, task_id, claim)
            connection.execute(
                sa.insert(t.attempts).values(
                    task_id=task_id, number=taken["attempt"], claim=claim, worker=worker, started_at=now()
                )
            )
            lease = {
                "attempt": taken["attempt"],
                "claim": claim,
                "worker": worker,
                "session_key": session_key,
                "renewed_at": now(),
                "expires_at": after(lease_s),
                "deadline_at": None,
                "cancel_requested": False,
            }
            connection.execute(
                self._insert(t.leases)
                .values(task_id=task_id, **lease)
                .on_conflict_do_update(index_elements=["task_id"], set_=lease)
            )
            return self._claimed(connection, taken)

        return self._write(take)

    def _put_back_if_at_cap(self, connection: sa.Connection, task_id: str, max_running: int) -> bool:
        """The relay counts before it sends, but two relays may count at once, and a cap may be lowered."""
        task = t.tasks.c
        waiting = (
            task.id == task_id,
            task.status == TaskStatus.PENDING,
            # Its prompt is on a server already: following it is no more work than is being done.
            task.bound_server.is_(None),
        )
        owner = connection.execute(sa.select(task.owner).where(*waiting)).scalar_one_or_none()
        if owner is None or not self._is_at_cap(connection, owner, max_running):
            return False
        connection.execute(sa.update(t.tasks).where(*waiting).values(dispatched_at=None))
        return True

    def _own_claim(self, connection: sa.Connection, task_id: str, claim: str) -> Claim | None:
        """An earlier call of ours whose answer was lost left this row."""
        row = (
            connection.execute(
                sa.select(t.tasks).where(
                    t.tasks.c.id == task_id,
                    t.tasks.c.claim == claim,
                    t.tasks.c.status == TaskStatus.PROCESSING,
                )
            )
            .mappings()
            .first()
        )
        return None if row is None else self._claimed(connection, row)

    def _claimed(self, connection: sa.Connection, row: sa.RowMapping) -> Claim:
        earlier: Sequence[Attempt] = ()
        if row["attempt"] > 1:
            rows = connection.execute(
                sa.select(t.attempts)
                .where(t.attempts.c.task_id == row["id"], t.attempts.c.number < row["attempt"])
                .order_by(t.attempts.c.number.desc())
            ).mappings()
            earlier = [attempt_from_row(found) for found in rows]
        if row["batch_id"] is not None or row["params_of"] is not None:
            row = connection.execute(WHOLE.where(t.tasks.c.id == row["id"])).mappings().one()
        # A prompt whose end was seen by any attempt is judged, and never adopted again.
        judged = {each.prompt_id for each in earlier if each.outcome and not each.outcome.leaves_prompt}
        return Claim(
            task=task_from_row(row),
            fence=Fence(row["id"], row["attempt"], row["claim"]),
            predecessors=tuple(
                each
                for each in earlier
                if each.prompt_id is not None
                and each.prompt_id not in judged
                and each.outcome is not None
                and each.outcome.leaves_prompt
            ),
            deadline_at=row["deadline_at"],
            exhausted=frozenset(
                each.server
                for each in earlier
                if each.server is not None and each.error is not None and each.error.code == OutOfMemory.code
            ),
        )

    def renew(
        self, claims: Collection[str], lease_s: float, *, connection: sa.Connection | None = None
    ) -> dict[str, Beat]:
        """
        Renew all leases of a process in one statement.

        Args:
            connection: To do it on, one that commits by itself; by default one of the engine's.

        Returns:
            A :class:`Beat` by claim token. A token that is missing was taken over: its attempt is lost.
        """
        lease = t.leases.c
        statement = (
            sa.update(t.leases)
            .where(lease.claim.in_(list(claims)))
            .values(renewed_at=now(), expires_at=after(lease_s))
            .returning(
                lease.claim,
                lease.cancel_requested,
                sa.and_(lease.deadline_at.is_not(None), lease.deadline_at <= now()).label("late"),
            )
        )
        if connection is not None:
            rows = connection.execute(statement).all()
        else:
            rows = self._write(lambda own: own.execute(statement).all())
        return {row.claim: Beat(cancel=bool(row.cancel_requested), late=bool(row.late)) for row in rows}

    def still_held(self, fence: Fence) -> bool:
        """Whether this attempt is still the one that may write."""
        query = sa.select(sa.literal(1)).where(*_of(fence))
        return self._read(lambda connection: connection.execute(query).first()) is not None

    # -- one attempt's own writes -------------------------------------------------------------

    def assign_server(self, fence: Fence, loads: dict[str, int] | None, servers: Sequence[str]) -> str | None:
        """
        Choose the server with the fewest running attempts of ours, and write it to the attempt.

        One transaction at a time chooses, so that two children do not both take the idle one.

        Args:
            servers: Healthy candidates in order of preference.
            loads: Further load by name that is not ours, added to the count.

        Returns:
            The name, or ``None`` if the fence does not match or there is no candidate.
        """

        def choose(connection: sa.Connection) -> str | None:
            if self.is_postgresql:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CHOOSE_LOCK)))
            rows = connection.execute(
                sa.select(t.attempts.c.server, sa.func.count())
                .where(
                    t.attempts.c.ended_at.is_(None),
                    t.attempts.c.server.in_(list(servers)),
                    t.attempts.c.rendered_at.is_(None),
                    t.attempts.c.task_id != fence.task_id,
                )
                .group_by(t.attempts.c.server)
            )
            busy = {str(server): int(number) for server, number in rows}
            best = min(servers, key=lambda name: busy.get(name, 0) + (loads or {}).get(name, 0), default=None)
            if best is None or not self._update_attempt(connection, fence, server=best):
                return None
            return best

        return self._write(choose)

    def renders_elsewhere(self, fence: Fence, server: str) -> bool:
        """Whether another attempt of ours has a prompt on *server* that is not rendered yet."""
        attempt = t.attempts.c
        query = sa.select(sa.literal(1)).where(
            attempt.server == server,
            attempt.ended_at.is_(None),
            attempt.submitted_at.is_not(None),
            attempt.rendered_at.is_(None),
            attempt.task_id != fence.task_id,
        )
        return self._read(lambda connection: connection.execute(query).first()) is not None

    def usual_run_s(self, task_type: str) -> float | None:
        """Median rendering time of the newest completed tasks of a type; ``None`` without any."""
        query = (
            sa.select(t.tasks.c.run_s)
            .where(
                t.tasks.c.completed_at.is_not(None),
                t.tasks.c.task_type == task_type,
                t.tasks.c.run_s.is_not(None),
            )
            .order_by(t.tasks.c.completed_at.desc())
            .limit(9)
        )
        found = sorted(self._read(lambda connection: connection.execute(query).scalars().all()))
        return found[len(found) // 2] if found else None

    def record_prompt(
        self,
        fence: Fence,
        *,
        server: str,
        prompt_id: str,
        client_id: str,
        adopted: bool = False,
        finished: bool = False,
    ) -> bool:
        """
        Write down which prompt this attempt follows, *before* it is sent or followed.

        A new prompt starts without a deadline; an adopted one keeps the task's, and is a stray no more.
        One that is *finished* already needs none: it rendered in time, only nobody looked.

        Returns:
            Whether the fence matched. If not, the prompt must not be sent.
        """

        def record(connection: sa.Connection) -> bool:
            values: dict[str, Any] = {"bound_server": None, "bound_until": None}
            if finished or not adopted:
                values["deadline_at"] = None
            if not self._update_task(connection, fence, **values):
                return False
            self._update_attempt(
                connection, fence, server=server, prompt_id=prompt_id, client_id=client_id, submitted_at=now()
            )
            # Also for a new prompt: the attempt may have had another one before, with a deadline of its own.
            deadline = sa.select(t.tasks.c.deadline_at).where(t.tasks.c.id == fence.task_id).scalar_subquery()
            connection.execute(
                sa.update(t.leases).where(t.leases.c.claim == fence.claim).values(deadline_at=deadline)
            )
            if adopted:
                connection.execute(
                    sa.delete(t.strays).where(t.strays.c.server == server, t.strays.c.prompt_id == prompt_id)
                )
            return True

        return self._write(record)

    def record_running(self, fence: Fence) -> dt.datetime | None:
        """
        Start the rendering clock, once for a prompt however many attempts follow it.

        Returns:
            The deadline, or ``None`` if the fence did not match.
        """

        def start(connection: sa.Connection) -> dt.datetime | None:
            deadline = connection.execute(
                sa.update(t.tasks)
                .where(*_of(fence))
                .values(
                    deadline_at=sa.func.coalesce(
                        t.tasks.c.deadline_at,
                        after(sa.cast(t.tasks.c.timeout_s, sa.Float)),
                        type_=Timestamp(),
                    ),
                    updated_at=now(),
                )
                .returning(t.tasks.c.deadline_at)
            ).scalar()
            connection.execute(
                sa.update(t.leases).where(t.leases.c.claim == fence.claim).values(deadline_at=deadline)
            )
            return deadline

        return self._write(start)

    def record_rendered(self, fence: Fence) -> bool:
        """
        The prompt has ended well: stop the rendering clock; storing has its own limit.

        The deadline goes, or an attempt that adopts the finished prompt would be too late at once.
        """

        def record(connection: sa.Connection) -> bool:
            if not self._update_task(connection, fence, deadline_at=None):
                return False
            self._update_attempt(connection, fence, rendered_at=now())
            connection.execute(
                sa.update(t.leases).where(t.leases.c.claim == fence.claim).values(deadline_at=None)
            )
            return True

        return self._write(record)

    def finish(  # everything that one transaction writes
        self,
        fence: Fence,
        status: TaskStatus,
        *,
        outputs: Sequence[NewOutput] = (),
        error: ErrorInfo | None = None,
        run_s: float | None = None,
        store_s: float | None = None,
        leaves_prompt: bool = False,
        progress: float | None = None,
        stored: bool = True,
    ) -> TaskStatus | None:
        """
        End the task: outputs, final state and history in one transaction, under the fence.

        Survives a lost answer: called again it finds its own final row and says the same.

        Args:
            leaves_prompt: The prompt may still be on its server; somebody there must stop it.
            progress: How far the attempt came, 0 to 100, as far as it is known.
            stored: The attempt may have put objects into storage: those that no completed task
                names are deleted later on.

        Returns:
            The state the task ended in (``canceled`` if a cancel was committed first), or ``None``:
            this attempt lost the task and wrote nothing.
        """

        def end(connection: sa.Connection) -> TaskStatus | None:
            row = self._lock(connection, fence)
            if row is None:
                return self._own_end(connection, fence)
            ended = TaskStatus.CANCELED if row["cancel_requested_at"] is not None else status
            self._end_task(connection, fence, ended, error=error, run_s=run_s, store_s=store_s)
            if ended is TaskStatus.COMPLETED and outputs:
                connection.execute(
                    sa.insert(t.outputs),
                    [_output_values(fence, index, output) for index, output in enumerate(outputs)],
                )
            outcome = AttemptOutcome(ended.value)
            self._end_attempt(
                connection, fence, outcome, error=error, stray=leaves_prompt, progress=progress, stored=stored
            )
            return ended

        return self._write(end)

    def retry_later(  # the error, its weight and what it leaves behind
        self,
        fence: Fence,
        error: ErrorInfo,
        *,
        delay_s: float,
        outcome: AttemptOutcome = AttemptOutcome.RETRY,
        leaves_prompt: bool = False,
        bind_to: str | None = None,
        progress: float | None = None,
        stored: bool = True,
    ) -> TaskStatus | None:
        """
        End this attempt in a retryable error: another one follows, or the bound is reached.

        Args:
            delay_s: Wait before the next attempt.
            outcome: ``retry``, or ``storage_failed`` or ``unreachable`` if the prompt may be adopted.
            leaves_prompt: The prompt may still be on its server.
            bind_to: The server that has a prompt of the task, if it is not this attempt's own.
            progress, stored: As :meth:`finish`.

        Returns:
            ``pending``, ``failed`` (that was the last attempt), ``canceled`` (a cancel came first),
            or ``None``: this attempt lost the task.
        """

        def end(connection: sa.Connection) -> TaskStatus | None:
            row = self._lock(connection, fence)
            if row is None:
                return self._own_end(connection, fence)
            adoptable = outcome.leaves_prompt
            end_attempt = functools.partial(
                self._end_attempt,
                connection,
                fence,
                stray=leaves_prompt or adoptable,
                progress=progress,
                stored=stored,
            )
            if row["cancel_requested_at"] is not None:
                self._end_task(connection, fence, TaskStatus.CANCELED)
                end_attempt(AttemptOutcome.CANCELED)
                return TaskStatus.CANCELED
            if row["failures"] + 1 >= row["max_attempts"]:
                self._end_task(
                    connection, fence, TaskStatus.FAILED, error=error, failures=row["failures"] + 1
                )
                end_attempt(AttemptOutcome.FAILED, error=error)
                return TaskStatus.FAILED
            self._back_to_pending(
                connection,
                fence,
                delay_s=delay_s,
                bound_for_s=delay_s if adoptable else None,
                bind_to=bind_to,
                failures=row["failures"] + 1,
                error=error.as_dict(),
            )
            end_attempt(outcome, error=error)
            return TaskStatus.PENDING

        return self._write(end)

    def hand_back(
        self,
        fence: Fence,
        *,
        adopt_wait_s: float | None,
        delay_s: float = 0.0,
        progress: float | None = None,
        stored: bool = True,
        go_to: str | None = None,
    ) -> TaskStatus | None:
        """
        Give the task back uncounted; a prompt that was sent runs on, for the next worker to adopt.

        Args:
            adopt_wait_s: How long the task waits for a worker of its prompt's server. ``None``: no
                server has a prompt of it, any worker may have the task.
            delay_s: Wait before the next attempt, where one at once would find the same.
            progress, stored: As :meth:`finish`.
            go_to: The server that shall have the task next, for as long as a live worker serves it.

        Returns:
            As :meth:`retry_later`.
        """

        def end(connection: sa.Connection) -> TaskStatus | None:
            row = self._lock(connection, fence)
            if row is None:
                return self._own_end(connection, fence)
            known: dict[str, Any] = {"stray": True, "progress": progress, "stored": stored}
            if row["cancel_requested_at"] is not None:
                self._end_task(connection, fence, TaskStatus.CANCELED)
                self._end_attempt(connection, fence, AttemptOutcome.CANCELED, **known)
                return TaskStatus.CANCELED
            self._back_to_pending(
                connection, fence, delay_s=delay_s, bound_for_s=0.0 if go_to else adopt_wait_s, bind_to=go_to
            )
            self._end_attempt(connection, fence, AttemptOutcome.HANDED_BACK, **known)
            return TaskStatus.PENDING

        return self._write(end)

    # -- what death leaves --------------------------------------------------------------------

    def end_lease_of(self, worker: str, task_id: str) -> None:
        """The parent saw this child die or be killed: its lease on this task is over now."""
        statement = (
            sa.update(t.leases)
            .where(t.leases.c.task_id == task_id, t.leases.c.worker == worker)
            .values(expires_at=after(-1.0))
        )
        self._write(lambda connection: connection.execute(statement))

    def stale_leases(self, missed_s: float) -> list[StaleLease]:
        """Leases that ran out, or were not renewed for *missed_s* seconds."""
        lease = t.leases.c
        query = (
            sa.select(
                lease.task_id,
                lease.attempt,
                lease.claim,
                lease.worker,
                lease.session_key,
                (lease.expires_at < now()).label("expired"),
            )
            .where(sa.or_(lease.expires_at < now(), lease.renewed_at < after(-missed_s)))
            .order_by(lease.expires_at)
            .limit(200)
        )
        rows = self._read(lambda connection: connection.execute(query).all())
        return [
            StaleLease(
                Fence(row.task_id, row.attempt, row.claim), row.worker, row.session_key, bool(row.expired)
            )
            for row in rows
        ]

    def sessions_alive(self, keys: Collection[int]) -> set[int]:
        """
        Which of these processes still hold their advisory lock (PostgreSQL only).

        Source: PostgreSQL manual, ``pg_locks``: a bigint key is split over ``classid`` and ``objid``.
        """
        if not keys:
            return set()
        query = sa.text(
            "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks"
            " WHERE locktype = 'advisory' AND granted AND objsubid = 1"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        held = set(self._read(lambda connection: connection.execute(query).scalars().all()))
        return held & set(keys)

    def reap(
        self, lease: StaleLease, *, missed_s: float, max_lost: int, progress: float | None = None
    ) -> TaskStatus | None:
        """
        Take a dead worker's task back, if its lease is still as stale as it was seen.

        Any number of sweepers may call this at once: one wins, the others get ``None``.

        Args:
            max_lost: Losses after which the task fails instead: at the one after so many.
            progress: How far the attempt was seen to be, if anybody knows.

        Returns:
            What became of the task, or ``None`` if the lease was renewed or taken meanwhile.
        """
        fence = lease.fence

        def take_back(connection: sa.Connection) -> TaskStatus | None:
            # The task first, then its lease: everybody locks in this order.
            row = self._lock(connection, fence, skip_locked=True)
            if row is None:
                return None
            columns = t.leases.c
            stale = columns.expires_at < now()
            if not lease.expired:
                stale = sa.or_(stale, columns.renewed_at < after(-missed_s))
            found = connection.execute(
                sa.select(columns.attempt).where(columns.claim == fence.claim, stale).with_for_update()
            ).first()
            if found is None:
                return None
            known: dict[str, Any] = {"stray": True, "progress": progress}
            if row["cancel_requested_at"] is not None:
                self._end_task(connection, fence, TaskStatus.CANCELED)
                self._end_attempt(connection, fence, AttemptOutcome.CANCELED, **known)
                return TaskStatus.CANCELED
            losses = row["losses"] + 1
            if losses > max_lost:
                self._end_task(connection, fence, TaskStatus.FAILED, error=WORKER_LOST, losses=losses)
                self._end_attempt(connection, fence, AttemptOutcome.LOST, error=WORKER_LOST, **known)
                return TaskStatus.FAILED
            delay = LOSS_BACKOFF_S[min(losses, len(LOSS_BACKOFF_S)) - 1]
            self._back_to_pending(connection, fence, delay_s=delay, bound_for_s=0.0, losses=losses)
            self._end_attempt(connection, fence, AttemptOutcome.LOST, **known)
            return TaskStatus.PENDING

        return self._write(take_back)

    def strays_on(self, servers: Collection[str]) -> list[Stray]:
        """
        Prompts on these servers that nobody waits for any more and that must be stopped.

        A stray of a task that is waiting for its adopter, or whose running attempt may still adopt
        it, is left alone. So is one that any worker of its server may yet adopt: a task that is bound to
        nothing any more goes to whoever claims it first.
        """
        if not servers:
            return []
        stray, task, attempt, origin = t.strays.c, t.tasks.c, t.attempts.c, t.attempts.alias("origin")
        adoptable = [outcome for outcome in AttemptOutcome if outcome.leaves_prompt]
        query = (
            sa.select(stray.server, stray.prompt_id, stray.task_id, stray.attempt)
            .outerjoin(t.tasks, task.id == stray.task_id)
            .outerjoin(
                t.attempts,
                sa.and_(
                    attempt.task_id == task.id, attempt.number == task.attempt, attempt.ended_at.is_(None)
                ),
            )
            .outerjoin(
                origin,
                sa.and_(origin.c.task_id == stray.task_id, origin.c.number == stray.attempt),
            )
            .where(
                stray.server.in_(list(servers)),
                sa.or_(
                    task.id.is_(None),  # deleted since
                    task.completed_at.is_not(None),
                    sa.and_(
                        task.status == TaskStatus.PENDING,
                        sa.or_(
                            sa.and_(task.bound_server.is_(None), origin.c.outcome.not_in(adoptable)),
                            task.bound_server != stray.server,
                        ),
                    ),
                    # A running attempt that has written down a prompt of its own will not adopt this one.
                    sa.and_(
                        task.status == TaskStatus.PROCESSING,
                        attempt.prompt_id.is_not(None),
                        attempt.prompt_id != stray.prompt_id,
                    ),
                ),
            )
            .limit(100)
        )
        rows = self._read(lambda connection: connection.execute(query).all())
        return [Stray(row.server, row.prompt_id, row.task_id, row.attempt) for row in rows]

    def note_stray(self, fence: Fence, server: str, prompt_id: str) -> None:
        """
        An attempt that lost its task sent this prompt all the same: somebody at its server must stop it.

        Nothing of the task is written, so no fence: if an adopter follows the prompt by now, it is left
        alone until the task has ended.
        """
        self._write(lambda connection: self._insert_stray(connection, fence, server, prompt_id))

    def forget_old_strays(self, older_than_s: float) -> int:
        """Drop what was noted so long ago that its server has been restarted, or is there no more."""
        statement = sa.delete(t.strays).where(t.strays.c.since < after(-older_than_s))
        return self._write(lambda connection: connection.execute(statement).rowcount)

    def forget_stray(self, stray: Stray) -> None:
        """The prompt is gone from its server."""
        statement = sa.delete(t.strays).where(
            t.strays.c.server == stray.server, t.strays.c.prompt_id == stray.prompt_id
        )
        self._write(lambda connection: connection.execute(statement))

    # -- pieces of the transactions above -----------------------------------------------------

    def _lock(
        self, connection: sa.Connection, fence: Fence, *, skip_locked: bool = False
    ) -> sa.RowMapping | None:
        task = t.tasks.c
        return (
            connection.execute(
                sa.select(task.cancel_requested_at, task.failures, task.losses, task.max_attempts)
                .where(*_of(fence))
                .with_for_update(skip_locked=skip_locked)
            )
            .mappings()
            .first()
        )

    def _own_end(self, connection: sa.Connection, fence: Fence) -> TaskStatus | None:
        """What an earlier call of ours, whose answer was lost, made of the task."""
        ended = connection.execute(
            sa.select(t.attempts.c.outcome, t.tasks.c.status, t.tasks.c.attempt)
            .join(t.tasks, t.tasks.c.id == t.attempts.c.task_id)
            .where(
                t.attempts.c.task_id == fence.task_id,
                t.attempts.c.number == fence.attempt,
                t.attempts.c.claim == fence.claim,
                t.attempts.c.ended_at.is_not(None),
            )
        ).first()
        if ended is None or ended.outcome == AttemptOutcome.LOST:
            return None
        if ended.outcome in {AttemptOutcome.COMPLETED, AttemptOutcome.FAILED, AttemptOutcome.CANCELED}:
            return TaskStatus(ended.outcome)
        return TaskStatus.PENDING

    def _end_task(
        self,
        connection: sa.Connection,
        fence: Fence,
        status: TaskStatus,
        *,
        error: ErrorInfo | None = None,
        **values: Any,
    ) -> None:
        if status is TaskStatus.CANCELED and (error is None or error.code != CANCELED.code):
            error = CANCELED
        connection.execute(
            sa.update(t.tasks)
            .where(*_of(fence))
            .values(
                status=status,
                completed_at=now(),
                updated_at=now(),
                bound_server=None,
                bound_until=None,
                deadline_at=None,
                error=error.as_dict() if error is not None else sa.null(),
                **values,
            )
        )

    def _back_to_pending(
        self,
        connection: sa.Connection,
        fence: Fence,
        *,
        delay_s: float,
        bound_for_s: float | None,
        bind_to: str | None = None,
        **values: Any,
    ) -> None:
        """Return the task to the outbox; bound to *bind_to*, or to the server that has its prompt, if one may."""
        if bound_for_s is None:
            values |= {"bound_server": None, "bound_until": None}
        elif bind_to is not None:
            values |= {"bound_server": bind_to, "bound_until": after(bound_for_s)}
        else:
            sent_to = connection.execute(
                sa.select(t.attempts.c.server).where(
                    t.attempts.c.task_id == fence.task_id,
                    t.attempts.c.number == fence.attempt,
                    t.attempts.c.submitted_at.is_not(None),
                )
            ).scalar()
            if sent_to is not None:  # else an older binding, which this attempt did not get to use, stays
                values["bound_server"] = sent_to
            values["bound_until"] = after(bound_for_s)
        connection.execute(
            sa.update(t.tasks)
            .where(*_of(fence))
            .values(
                status=TaskStatus.PENDING,
                claim=None,
                dispatched_at=None,
                available_at=after(delay_s),
                updated_at=now(),
                **values,
            )
        )
        self._notify(connection, "task")

    def _end_attempt(
        self,
        connection: sa.Connection,
        fence: Fence,
        outcome: AttemptOutcome,
        *,
        error: ErrorInfo | None = None,
        stray: bool = False,
        progress: float | None = None,
        stored: bool = True,
    ) -> None:
        row = connection.execute(
            sa.update(t.attempts)
            .where(*_attempt_of(fence))
            .values(
                ended_at=now(),
                outcome=outcome,
                error=error.as_dict() if error is not None else sa.null(),
                progress=progress,
            )
            .returning(t.attempts.c.server, t.attempts.c.prompt_id)
        ).first()
        connection.execute(sa.delete(t.leases).where(t.leases.c.claim == fence.claim))
        if stray and row is not None and row.prompt_id is not None:
            self._insert_stray(connection, fence, row.server, row.prompt_id)
        if stored and row is not None and outcome is not AttemptOutcome.COMPLETED:
            # It may be uploading even now, if it only lost its lease: hence the passes, and their times.
            connection.execute(
                sa.insert(t.removals).values(
                    id=new_id(),
                    task_id=fence.task_id,
                    attempt=fence.attempt,
                    ended_at=now(),
                    due_at=after(REMOVAL_PASSES_S[0]),
                )
            )

    def _insert_stray(self, connection: sa.Connection, fence: Fence, server: str, prompt_id: str) -> None:
        connection.execute(
            self._insert(t.strays)
            .values(
                server=server,
                prompt_id=prompt_id,
                task_id=fence.task_id,
                attempt=fence.attempt,
                since=now(),
            )
            .on_conflict_do_nothing()
        )

    def _update_task(self, connection: sa.Connection, fence: Fence, **values: Any) -> bool:
        """
        Write to the running attempt's task; false if the fence does not match.

        The task's row comes first in every transaction, then the attempt's, then the lease: two that
        lock in different orders would wait for each other.
        """
        return connection.execute(sa.update(t.tasks).where(*_of(fence)).values(**values)).rowcount == 1

    def _update_attempt(self, connection: sa.Connection, fence: Fence, **values: Any) -> bool:
        """Write to the running attempt's row; false if this attempt is not the running one."""
        updated = connection.execute(sa.update(t.attempts).where(*_attempt_of(fence)).values(**values))
        return updated.rowcount == 1


_CHOOSE_LOCK = 7_310_573_201


def _of(fence: Fence) -> tuple[sa.ColumnElement[bool], ...]:
    """The fence as a condition on ``tasks``."""
    return (
        t.tasks.c.id == fence.task_id,
        t.tasks.c.attempt == fence.attempt,
        t.tasks.c.claim == fence.claim,
        t.tasks.c.status == TaskStatus.PROCESSING,
    )


def _attempt_of(fence: Fence) -> tuple[sa.ColumnElement[bool], ...]:
    """The fence as a condition on ``attempts``; an attempt's end is written with its task's."""
    return (
        t.attempts.c.task_id == fence.task_id,
        t.attempts.c.number == fence.attempt,
        t.attempts.c.claim == fence.claim,
        t.attempts.c.ended_at.is_(None),
    )


def _output_values(fence: Fence, index: int, output: NewOutput) -> dict[str, Any]:
    return {
        "task_id": fence.task_id,
        "index": index,
        "attempt": fence.attempt,
        "node_id": output.node_id,
        "name": output.name,
        "kind": output.kind,
        "content_type": output.content_type,
        "size_bytes": output.size_bytes,
        "sha256": output.sha256,
        "width": output.width,
        "height": output.height,
        "key": output.key,
    }
