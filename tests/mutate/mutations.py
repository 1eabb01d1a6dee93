"""
The breakages: what is taken away from the code, and which tests claim to notice.

Each patch names a small text that stands exactly once in its file, so that it goes on fitting while
the code around it changes. ``tests/unit/test_mutations.py`` sees to it that all of them fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTATIONS", "Edit", "Mutation", "PatchMisfit"]


class PatchMisfit(Exception):
    """The patch does not fit any more: the code it breaks was changed. Mend the patch, not the code."""


@dataclass(frozen=True)
class Edit:
    """Replace *old*, which stands once in *file*, by *new*."""

    file: str
    """Below the root of the tree."""
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """
    One way to break GenPulse that users would notice.

    Args:
        name: A word for the command line.
        meaning: What is wrong then, in one sentence.
        edits: The patch.
        tests: Node ids of pytest. **Every one of them** must fail; one without ``[…]`` fails if any of
            its parameters does.
        timeout_s: For all of these tests together, with the start of the services.
    """

    name: str
    meaning: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    timeout_s: float = 180.0

    def patched(self, root: Path) -> Iterator[tuple[Path, str]]:
        """
        The files that change, and their broken text. Nothing is written.

        Raises:
            PatchMisfit: A text to be replaced is not there exactly once.
        """
        texts: dict[str, str] = {}
        for edit in self.edits:
            text = texts.get(edit.file) or (root / edit.file).read_text(encoding="utf-8")
            if (times := text.count(edit.old)) != 1:
                msg = (
                    f"{self.name}: the patch does not fit any more: {edit.file} has its text {times} times, "
                    f"not once:\n{edit.old}"
                )
                raise PatchMisfit(msg)
            texts[edit.file] = text.replace(edit.old, edit.new)
        for name, text in texts.items():
            yield root / name, text


RUNNING = "genpulse/ledger/running.py"
REQUESTS = "genpulse/ledger/requests.py"
SWEEPER = "genpulse/tasks/sweeper.py"
RELAY = "genpulse/tasks/relay.py"
RENDER = "genpulse/tasks/render.py"
RUNNER = "genpulse/tasks/runner.py"
RETIRING = "genpulse/ledger/retiring.py"
CLIENT = "genpulse/comfy/client.py"
WEBHOOKS = "genpulse/ledger/webhooks.py"

LEDGER_TESTS = "tests/integration/test_ledger.py::"
ATTEMPT_TESTS = "tests/integration/test_attempt.py::"
SWEEPER_TESTS = "tests/integration/test_sweeper.py::"
COLLECTOR_TESTS = "tests/integration/test_collector.py::"
SERVERS_TESTS = "tests/integration/test_attempt_servers.py::"
RETRY_TESTS = "tests/integration/api/test_api_retry.py::"
RELAY_TESTS = "tests/integration/test_relay.py::"
FORK_TESTS = "tests/integration/test_fork_rule.py::"
CLIENT_TESTS = "tests/integration/test_comfy_client.py::"
STORAGE_TESTS = "tests/integration/test_storage_s3.py::"
FOLLOW_TESTS = "tests/integration/test_comfy_client_follow.py::"
DELIVERY_TESTS = "tests/integration/test_webhooks.py::"
WEBHOOK_TESTS = "tests/integration/test_ledger_webhooks.py::"

MUTATIONS: tuple[Mutation, ...] = (
    # -- the ledger ---------------------------------------------------------------------------
    Mutation(
        "no-fence",
        "An attempt that lost its task goes on writing to it.",
        (
            Edit(
                RUNNING,
                "        t.tasks.c.attempt == fence.attempt,\n        t.tasks.c.claim == fence.claim,\n",
                "",
            ),
        ),
        (LEDGER_TESTS + "test_an_old_attempt_changes_nothing",),
    ),
    Mutation(
        "no-claim-token",
        "The attempt's number alone is the fence, and after a fail-over a number is given out twice.",
        (Edit(RUNNING, "        t.tasks.c.claim == fence.claim,\n", ""),),
        (LEDGER_TESTS + "test_the_number_alone_is_not_enough",),
    ),
    Mutation(
        "running-task-claimed-again",
        "A message that arrives twice runs the task twice.",
        (
            Edit(
                RUNNING,
                "task.status == TaskStatus.PENDING,\n                        task.cancel_requested_at.is_(None),",
                "task.cancel_requested_at.is_(None),",
            ),
        ),
        (LEDGER_TESTS + "test_of_many_claimers_one_gets_the_task",),
    ),
    Mutation(
        "claim-ignores-binding",
        "A worker that does not reach the server with the task's prompt takes the task and renders it again.",
        (
            Edit(
                RUNNING,
                "sa.or_(task.bound_server.is_(None), task.bound_server.in_(list(servers))),",
                "",
            ),
        ),
        (LEDGER_TESTS + "test_a_bound_task_is_for_workers_of_its_server_only",),
    ),
    Mutation(
        "cancel-loses",
        "A task whose cancel was accepted ends as completed all the same.",
        (
            Edit(
                RUNNING,
                'ended = TaskStatus.CANCELED if row["cancel_requested_at"] is not None else status',
                "ended = status",
            ),
        ),
        (
            LEDGER_TESTS + "test_a_cancel_committed_before_finish_wins",
            LEDGER_TESTS + "test_a_cancel_wins_over_every_way_an_attempt_can_end",
        ),
    ),
    Mutation(
        "state-before-outputs",
        "The final state is committed before the outputs are: a crash in between completes an empty task.",
        (
            Edit(
                RUNNING,
                "self._end_task(connection, fence, ended, error=error, run_s=run_s, store_s=store_s)",
                "self._end_task(connection, fence, ended, error=error, run_s=run_s, store_s=store_s)\n"
                "            connection.connection.commit()",
            ),
        ),
        (LEDGER_TESTS + "test_a_finish_that_breaks_in_the_middle_writes_nothing",),
    ),
    Mutation(
        "final-states-unguarded",
        "Nothing in the database stops a statement that changes a final state.",
        (
            Edit(
                "genpulse/ledger/migrations/versions/0001_first_tables.py",
                "for statement in TRIGGERS[op.get_bind().dialect.name][0]:",
                "for statement in TRIGGERS[op.get_bind().dialect.name][0][:0]:",
            ),
        ),
        (LEDGER_TESTS + "test_no_sql_leaves_a_final_state",),
    ),
    Mutation(
        "drain-counts-as-loss",
        "A few deploys in a row fail a task that did nothing wrong.",
        (
            Edit(
                RUNNING,
                "            self._end_attempt(connection, fence, AttemptOutcome.HANDED_BACK,",
                "            mine = t.tasks.c.id == fence.task_id\n"
                "            connection.execute(sa.update(t.tasks).where(mine).values(losses=t.tasks.c.losses + 1))\n"
                "            self._end_attempt(connection, fence, AttemptOutcome.HANDED_BACK,",
            ),
        ),
        (
            LEDGER_TESTS + "test_hand_backs_count_nowhere",
            ATTEMPT_TESTS + "test_a_drain_hands_over_and_counts_nowhere",
        ),
    ),
    Mutation(
        "poison-without-end",
        "A task that kills every worker it runs on is tried for ever.",
        (Edit(RUNNING, "if losses > max_lost:", "if False:"),),
        (
            LEDGER_TESTS + "test_losses_have_a_bound_of_their_own",
            SWEEPER_TESTS + "test_poison_ends_at_its_bound",
        ),
    ),
    Mutation(
        "deadline-anew-for-an-adopter",
        "Each time a worker is lost, a prompt gets all of its timeout_s once more.",
        (Edit(RUNNING, "if finished or not adopted:", "if True:"),),
        (LEDGER_TESTS + "test_the_deadline_is_set_once_and_goes_over_to_an_adopter",),
    ),
    Mutation(
        "key-in-a-transaction-of-its-own",
        "Callers that send the same request at once make several tasks of it.",
        (
            Edit(
                REQUESTS,
                "            if idempotency_key is not None:\n",
                "            if idempotency_key is not None:\n"
                "                connection.connection.commit()  # the task alone\n",
            ),
        ),
        (
            LEDGER_TESTS + "test_many_callers_at_once_with_one_key_make_one_task",
            LEDGER_TESTS + "test_the_same_key_and_body_give_the_same_task",
        ),
    ),
    Mutation(
        "owner-check-dropped",
        "Anybody who knows its id reads somebody else's task.",
        (
            Edit(
                REQUESTS,
                "                query = query.where(t.tasks.c.owner == owner)\n"
                "            row = connection.execute(query).mappings().first()\n",
                "                pass\n            row = connection.execute(query).mappings().first()\n",
            ),
        ),
        (
            LEDGER_TESTS + "test_somebody_elses_task_is_unknown",
            "tests/integration/api/test_two_owners.py::test_neither_owner_reaches_anything_of_the_other",
        ),
    ),
    # -- relay and sweeper --------------------------------------------------------------------
    Mutation(
        "relay-holds-its-transaction",
        "While the broker hangs, so do the requests that touch what the relay is sending.",
        (
            Edit(
                RELAY,
                "            self._producer.publish([_message(dispatch) for dispatch in batch])",
                "            with self._ledger.engine.begin() as held:\n"
                '                held.exec_driver_sql("UPDATE tasks SET updated_at = updated_at")\n'
                "                self._producer.publish([_message(dispatch) for dispatch in batch])",
            ),
        ),
        (RELAY_TESTS + "test_a_task_that_is_being_sent_can_be_canceled_at_once",),
    ),
    Mutation(
        "relay-forgets-its-batch",
        "What a broker that is away did not take looks sent.",
        (Edit(RELAY, "            self._ledger.put_back(batch)\n", ""),),
        (RELAY_TESTS + "test_a_broker_that_takes_nothing_gets_nothing_lost",),
    ),
    Mutation(
        "no-reconciliation",
        "A message that Redis lost is never sent again.",
        (Edit(SWEEPER, "put_back = self._ledger.put_back(lost)", "put_back = 0"),),
        (
            SWEEPER_TESTS + "test_a_lost_message_is_sent_again_when_it_was_missing_twice",
            SWEEPER_TESTS + "test_a_wiped_broker_is_filled_again_within_seconds",
        ),
    ),
    Mutation(
        "epoch-ignored",
        "After Redis was wiped or restarted, every waiting task waits seconds longer than it need.",
        (Edit(SWEEPER, "changed = self._epoch is not None and epoch != self._epoch", "changed = False"),),
        (SWEEPER_TESTS + "test_a_wiped_broker_is_filled_again_within_seconds",),
    ),
    Mutation(
        "reaper-without-grace",
        "After a restart of the database the first sweeper takes every running task away from its worker.",
        (
            Edit(
                SWEEPER,
                "return time.monotonic() - self._connected_since >= lease_s",
                "return True",
            ),
        ),
        (
            SWEEPER_TESTS + "test_a_sweeper_that_just_connected_reaps_nothing",
            SWEEPER_TESTS + "test_a_sweeper_that_just_connected_frees_no_binding",
            SWEEPER_TESTS + "test_a_sweeper_that_was_frozen_with_the_workers_begins_anew",
        ),
    ),
    Mutation(
        "living-worker-reaped",
        "A worker that missed three beats is taken for dead although its process holds its session.",
        (
            Edit(
                SWEEPER,
                "            if lease.session_key in alive and not lease.expired:\n                continue\n",
                "",
            ),
        ),
        (SWEEPER_TESTS + "test_a_dead_process_is_known_after_three_missed_beats",),
    ),
    Mutation(
        "stray-stopped-before-its-adopter-came",
        "The prompt that a lost or drained worker left is stopped although its task waits for that server.",
        (
            Edit(
                RUNNING,
                "sa.and_(task.bound_server.is_(None), origin.c.outcome.not_in(adoptable)),",
                "sa.true(),",
            ),
        ),
        (LEDGER_TESTS + "test_a_stray_is_left_alone_while_somebody_may_adopt_it",),
    ),
    # -- processes ----------------------------------------------------------------------------
    Mutation(
        "no-fork-lock",
        "A child that is forked while a thread of its parent is in SQLite finds the database locked for ever.",
        (
            Edit(
                "genpulse/ledger/base.py",
                "before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child",
                "after_in_child=self._after_in_child",
            ),
        ),
        (FORK_TESTS + "test_a_fork_waits_for_the_work_under_the_lock_and_the_child_has_a_fresh_one",),
    ),
    Mutation(
        "background-outside-the-fork-lock",
        "The lock is there, and the relay and the sweeper of a worker do not take it.",
        (
            Edit(
                "genpulse/tasks/background.py",
                "        with fork_lock, self.ledger.together():\n            yield",
                "        with self.ledger.together():\n            yield",
            ),
        ),
        (FORK_TESTS + "test_relay_and_sweeper_of_a_process_that_forks_work_under_the_lock",),
    ),
    Mutation(
        "child-keeps-its-parents-session",
        "A parent that was killed looks alive as long as one of its children lives.",
        (
            Edit(
                "genpulse/ledger/sessions.py",
                "os.register_at_fork(after_in_child=_abandon_all)",
                "",
            ),
        ),
        ("tests/integration/test_sessions.py::test_a_forked_child_does_not_keep_its_parents_session_alive",),
    ),
    Mutation(
        "lost-lease-unheard",
        "A worker that was frozen past its lease never learns that another one has its task.",
        (Edit("genpulse/tasks/heartbeat.py", "signals.lost = True", "pass"),),
        (ATTEMPT_TESTS + "test_whoever_lost_its_lease_leaves_the_prompt_to_the_next[sqlite]",),
    ),
    # -- one attempt --------------------------------------------------------------------------
    Mutation(
        "no-adoption",
        "Every lost worker and every deploy costs the rendering that was under way.",
        (Edit(RENDER, "finished = attempt.adopt() or attempt.submit()", "finished = attempt.submit()"),),
        (
            ATTEMPT_TESTS + "test_whoever_lost_its_lease_leaves_the_prompt_to_the_next",
            ATTEMPT_TESTS + "test_whoever_lost_at_the_very_end_cleans_nothing_up",
            ATTEMPT_TESTS + "test_a_drain_hands_over_and_counts_nowhere",
        ),
    ),
    Mutation(
        "adopting-an-error",
        "A prompt that ended in an error is adopted, and its one error uses up all attempts.",
        (
            Edit(RUNNING, "                and each.prompt_id not in judged\n", ""),
            Edit(RUNNING, "                and each.outcome.leaves_prompt\n", ""),
        ),
        (
            LEDGER_TESTS + "test_only_a_prompt_whose_end_nobody_saw_may_be_adopted",
            ATTEMPT_TESTS + "test_an_error_is_judged_once_and_never_adopted",
        ),
    ),
    Mutation(
        "a-broken-road-is-taken-for-a-dead-server",
        "One worker that cannot reach a server has its prompt rendered again, though another one could go on with it.",
        (
            Edit(
                RENDER,
                'context.log.info("server_reached_by_another_worker", server=server)\n                return True\n',
                "return False\n",
            ),
        ),
        (
            SERVERS_TESTS + "test_a_prompt_is_adopted_by_the_worker_that_still_reaches_its_server",
            SERVERS_TESTS + "test_a_finished_picture_is_fetched_by_the_worker_that_still_reaches_its_server",
            SERVERS_TESTS + "test_a_worker_that_cannot_reach_a_prompts_server_leaves_it_to_the_one_that_can",
        ),
    ),
    Mutation(
        "sent-too-late-and-not-owned-up-to",
        "A process that is frozen right before it sends its prompt renders it on its thaw, for nobody.",
        (Edit(RENDER, "                context.note_stray(self.server, self.prompt_id)\n", ""),),
        (SERVERS_TESTS + "test_a_process_that_was_frozen_right_before_its_post_leaves_word_of_what_it_sent",),
    ),
    Mutation(
        "loser-interrupts",
        "A worker that lost its lease stops the prompt that another one has adopted.",
        (
            Edit(
                RENDER,
                "        except (LeaseLost, Draining):\n",
                "        except LeaseLost:\n"
                "            self._stop(self.server, self.prompt_id)\n"
                "            raise\n"
                "        except Draining:\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_whoever_lost_its_lease_leaves_the_prompt_to_the_next",),
    ),
    Mutation(
        "clean-up-by-a-loser",
        "A worker whose last write came too late deletes what the next one needs.",
        (
            Edit(
                RUNNER,
                "        if status is None:\n            return self._lost(context)\n",
                "        if status is None:\n"
                "            context.clean_up()\n"
                "            return self._lost(context)\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_whoever_lost_at_the_very_end_cleans_nothing_up",),
    ),
    Mutation(
        "drain-stops-the-prompt",
        "A deploy throws away what its workers were rendering.",
        (
            Edit(
                RENDER,
                "        except (LeaseLost, Draining):\n",
                "        except Draining:\n"
                "            self._stop(self.server, self.prompt_id)\n"
                "            raise\n"
                "        except LeaseLost:\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_a_drain_hands_over_and_counts_nowhere",),
    ),
    Mutation(
        "cancel-leaves-the-gpu-busy",
        "A canceled task renders on for nobody.",
        (
            Edit(
                RENDER,
                "        except (TaskCanceled, DeadlineExceeded):\n"
                "            self._stop(self.server, self.prompt_id)\n",
                "        except (TaskCanceled, DeadlineExceeded):\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_a_cancel_stops_the_prompt_on_its_server",),
    ),
    Mutation(
        "sent-before-written-down",
        "A crash right after the prompt was sent leaves one that nobody knows of, rendered for nobody.",
        (
            Edit(RENDER, "            self._record(client_id)\n            context.confirm()\n", ""),
            Edit(
                RENDER,
                "            if accepted.node_errors:\n",
                "            self._record(client_id)\n            if accepted.node_errors:\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_a_prompt_is_written_down_before_it_is_sent",),
    ),
    Mutation(
        "socket-pictures-taken-for-stored",
        "A prompt whose pictures went to a dead worker is adopted, and has nothing to give.",
        (Edit(RENDER, "if self.socket_nodes and found.place is not Place.PENDING:", "if False:"),),
        (ATTEMPT_TESTS + "test_pictures_of_the_socket_alone_are_rendered_again",),
    ),
    Mutation(
        "unstored-output-left-out",
        "A task is completed although storage did not take all of its outputs.",
        (
            Edit(
                RENDER,
                "                stored.append(self._capture(output))\n",
                "                with contextlib.suppress(StorageUnavailable):\n"
                "                    stored.append(self._capture(output))\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_nothing_is_completed_before_all_of_it_is_stored",),
    ),
    Mutation(
        "outcome-thrown-away",
        "What was rendered while the ledger was away is lost, and rendered again.",
        (
            Edit(
                RUNNER,
                "                if checked:\n                    self.check()\n",
                "                raise LeaseLost from error\n                if checked:\n                    self.check()\n",
            ),
        ),
        (ATTEMPT_TESTS + "test_an_outcome_is_held_until_the_ledger_is_back",),
    ),
    # -- what is sent again, and what is deleted ------------------------------------------------
    Mutation(
        "retried-twice",
        "Two operators who retry by filter at once make two tasks of each.",
        (Edit(REQUESTS, "if former not in retried:", "if retried is not None:"),),
        (RETRY_TESTS + "test_many_who_retry_by_filter_at_once_make_one_of_each[postgresql]",),
    ),
    Mutation(
        "named-bytes-removed",
        "The collector believes whatever is noted for removal, and deletes what a row still names.",
        (Edit(RETIRING, "due.where(~named)", "due"),),
        (COLLECTOR_TESTS + "test_what_a_row_names_is_never_taken",),
    ),
    Mutation(
        "needed-file-deleted",
        "A task is accepted while its file is being deleted, and finds it gone.",
        (
            Edit(
                REQUESTS, "if gone := set(some) - set(connection.execute(known).scalars()):", "if gone := ():"
            ),
        ),
        (COLLECTOR_TESTS + "test_a_task_that_names_what_is_gone_is_not_recorded",),
    ),
    Mutation(
        "late-upload-stays",
        "What a frozen worker stores after its attempt was collected is never deleted.",
        (Edit(RETIRING, "[at for at in REMOVAL_PASSES_S if at > removal.age_s]", "[]"),),
        (COLLECTOR_TESTS + "test_what_a_fenced_off_attempt_stores_later_is_deleted_too",),
    ),
    Mutation(
        "orphans-forgotten",
        "What an attempt stored in vain stays for ever: nobody wrote down that it is there.",
        (
            Edit(
                RUNNING,
                "if stored and row is not None and outcome is not",
                "if not stored and outcome is not",
            ),
        ),
        (COLLECTOR_TESTS + "test_what_an_attempt_stored_in_vain_is_deleted",),
    ),
    Mutation(
        "stray-goes-with-its-task",
        "A prompt of a deleted task renders on, and nobody stops it.",
        (
            Edit(
                RUNNING,
                ".outerjoin(t.tasks, task.id == stray.task_id)",
                ".join(t.tasks, task.id == stray.task_id)",
            ),
        ),
        (COLLECTOR_TESTS + "test_a_prompt_left_on_a_server_is_stopped_although_its_task_is_deleted",),
    ),
    # -- webhooks -----------------------------------------------------------------------------
    Mutation(
        "webhooks-of-one-owner-without-bound",
        "An owner whose receivers hang, each under a name of its own, holds up everybody's webhooks.",
        (
            Edit(
                WEBHOOKS,
                ".where(owners.c.owner.is_not(None), owners.c.owner.not_in(full_owners))",
                ".where(owners.c.owner.is_not(None))",
            ),
        ),
        (WEBHOOK_TESTS + "test_one_owner_has_only_so_many_tries_under_way",),
    ),
    Mutation(
        "webhooks-claimed-at-once",
        "Deliverers that claim in the same moment all take the last place of a host.",
        (
            Edit(
                WEBHOOKS,
                "            if self.is_postgresql:  # two at once",
                "            if False:  # two at once",
            ),
        ),
        (WEBHOOK_TESTS + "test_the_bounds_hold_for_deliverers_that_claim_at_once",),
    ),
    Mutation(
        "webhooks-not-by-turns",
        "Webhooks wait for the whole backlog of another owner.",
        (
            Edit(
                WEBHOOKS,
                ".order_by(due.c.under_way, due.c.owner <= after_owner, due.c.owner)",
                ".order_by(due.c.owner)",
            ),
        ),
        (
            WEBHOOK_TESTS + "test_a_long_backlog_is_its_owners_own",
            WEBHOOK_TESTS + "test_owners_take_turns_where_receivers_answer_at_once",
        ),
    ),
    Mutation(
        "webhooks-in-every-child",
        "Receivers that hang take every child of a worker from the other queues.",
        (
            Edit(
                "genpulse/tasks/webhooks.py",
                "page.begin_round(1 if shares else MAX_CHILDREN)",
                "page.begin_round(MAX_CHILDREN)",
            ),
        ),
        (DELIVERY_TESTS + "TestOnAWorker::test_one_child_at_a_time_delivers_where_others_are_served",),
    ),
    # -- what callers see ---------------------------------------------------------------------
    Mutation(
        "progress-falls-with-redis",
        "A hiccup of Redis shows a task at 63 % as one at 0 %, and ends long polls.",
        (
            Edit(
                "genpulse/web/api.py",
                "here.farthest.of(task.id, task.attempt, here.live.progress(task.id))",
                "here.live.progress(task.id)",
            ),
        ),
        ("tests/integration/api/test_api_tasks.py::test_progress_does_not_fall_while_redis_is_silent",),
    ),
    # -- ComfyUI and storage ------------------------------------------------------------------
    Mutation(
        "stall-clock-on-a-deaf-socket",
        "Where no socket works, every rendering that takes long is taken for a stall and done again.",
        (
            Edit(
                "genpulse/comfy/follower.py",
                "if self._heard_at is not None and now - self._heard_at > self._stall_s:",
                "if now - (self._heard_at or self._running_since or now) > self._stall_s:",
            ),
        ),
        (FOLLOW_TESTS + "TestServersThatFail::test_what_was_never_heard_cannot_stall",),
    ),
    Mutation(
        "blind-second-post",
        "A POST whose answer was lost is sent again without a look, and renders twice.",
        (
            Edit(
                CLIENT,
                "return self._deliver_again(workflow, prompt_id, client_id, extra_data)",
                "return self.submit(workflow, prompt_id=prompt_id, client_id=client_id)",
            ),
        ),
        (CLIENT_TESTS + "TestPrompts::test_an_uncertain_post_is_not_repeated",),
    ),
    Mutation(
        "interrupt-without-an-id",
        "Stopping one prompt stops whatever runs on the server.",
        (
            Edit(
                CLIENT,
                'self._post("/interrupt", {"prompt_id": prompt_id}, timeout_s=timeout_s)',
                'self._post("/interrupt", {}, timeout_s=timeout_s)',
            ),
        ),
        (CLIENT_TESTS + "TestCancel::test_a_finished_prompt_and_an_unknown_one_disturb_nobody",),
    ),
    Mutation(
        "digest-not-compared",
        "A store that holds other bytes than it was sent is believed.",
        (
            Edit(
                "genpulse/storage/base.py",
                "if found.size_bytes == wanted.size_bytes and (vouched or self._digest(wanted.key) == wanted.sha256):",
                "if found.size_bytes == wanted.size_bytes:",
            ),
        ),
        (STORAGE_TESTS + "TestVerification::test_a_store_that_proves_nothing_is_read_back",),
    ),
)
