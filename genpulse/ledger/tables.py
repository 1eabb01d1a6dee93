"""
The ledger's tables, and the triggers that hold what no statement may break.

The task row is its own outbox (``dispatched_at IS NULL``). Rows that change every two seconds
(leases) are narrow and apart from the wide, seldom-changed tasks. Indexes that hot queries use are
partial, over live rows only, so that their cost does not grow with history.

The migrations in ``migrations/`` build exactly this; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from genpulse.ledger.types import Timestamp

__all__ = [
    "TRIGGERS",
    "WEBHOOK_TRIGGERS",
    "api_keys",
    "assets",
    "attempts",
    "batches",
    "idempotency_keys",
    "leases",
    "metadata",
    "outputs",
    "removals",
    "strays",
    "task_inputs",
    "task_labels",
    "tasks",
    "webhook_attempts",
    "webhook_deliveries",
    "workers",
]

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Id = sa.Uuid(as_uuid=False)


def _live(condition: str) -> dict[str, Any]:
    """A partial index, spelled once for both databases."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("task_type", sa.String(100), nullable=False),
    sa.Column("queue", sa.String(100), nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("params", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("callback_url", sa.Text),
    sa.Column("retry_of", _Id),
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    # The random half of the fence: after a fail-over of the database a number can be given twice.
    sa.Column("claim", sa.String(40)),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("losses", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("updated_at", Timestamp, nullable=False),
    sa.Column("available_at", Timestamp, nullable=False),
    sa.Column("expires_at", Timestamp),
    sa.Column("dispatched_at", Timestamp),
    sa.Column("started_at", Timestamp),
    sa.Column("completed_at", Timestamp),
    sa.Column("cancel_requested_at", Timestamp),
    sa.Column("deadline_at", Timestamp),
    sa.Column("bound_server", sa.String(200)),
    sa.Column("bound_until", Timestamp),
    sa.Column("error", sa.JSON),
    sa.Column("run_s", sa.Float),
    sa.Column("store_s", sa.Float),
    # No foreign keys: a batch outlives its tasks by no more than the next time somebody tidies up.
    sa.Column("batch_id", _Id),
    sa.Column("batch_index", sa.Integer),
    # The request that sent it, by its id and by its place in a trace.
    sa.Column("request_id", sa.String(64)),
    sa.Column("traceparent", sa.String(60)),
    # The batch that keeps the rest of the params of a task that is not one of its own: a retry's.
    sa.Column("params_of", _Id),
    sa.CheckConstraint(
        "status IN ('pending', 'processing', 'completed', 'failed', 'canceled')", name="status"
    ),
    sa.CheckConstraint(
        "(status IN ('completed', 'failed', 'canceled')) = (completed_at IS NOT NULL)", name="final_has_end"
    ),
    sa.Index("ix_tasks_owner_id", "owner", "id"),
    sa.Index("ix_tasks_owner_status_id", "owner", "status", "id"),
    sa.Index("ix_tasks_batch", "batch_id", "batch_index", **_live("batch_id IS NOT NULL")),
    sa.Index("ix_tasks_params_of", "params_of", **_live("params_of IS NOT NULL")),
    sa.Index("ix_tasks_retry_of", "retry_of", **_live("retry_of IS NOT NULL")),
    sa.Index(
        "ix_tasks_outbox",
        "queue",
        "priority",
        "created_at",
        "id",
        **_live("status = 'pending' AND dispatched_at IS NULL"),
    ),
    sa.Index(
        "ix_tasks_live",
        "queue",
        "status",
        "priority",
        "created_at",
        "id",
        "completed_at",  # always NULL here; SQLite then reads nothing but the index
        **_live("completed_at IS NULL"),
    ),
    # Apart from the outbox, so that a long backlog costs the relay and the sweeper nothing.
    sa.Index(
        "ix_tasks_runway",
        "queue",
        "priority",
        "dispatched_at",
        **_live("status = 'pending' AND dispatched_at IS NOT NULL"),
    ),
    sa.Index("ix_tasks_bound", "bound_server", **_live("status = 'pending' AND bound_server IS NOT NULL")),
    sa.Index("ix_tasks_expiry", "expires_at", **_live("status = 'pending' AND expires_at IS NOT NULL")),
    # By owner, for the caps: which is the oldest of those that wait.
    sa.Index(
        "ix_tasks_queued", "owner", "queue", "priority", "created_at", "id", **_live("status = 'pending'")
    ),
    sa.Index("ix_tasks_ended", "completed_at", **_live("completed_at IS NOT NULL")),
    sa.Index("ix_tasks_run_time", "task_type", "completed_at", **_live("run_s IS NOT NULL")),
)

# Tasks that were submitted together. What all their params have in common stands here once; a task's own
# row then has the rest.
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("shared_params", sa.JSON, nullable=False),
    # The names of what the grid varied; empty for a batch of tasks that were named one by one.
    sa.Column("grid", sa.JSON, nullable=False),
)

# Each entry of a task's metadata as a digest of owner, key and value, so that one index serves every
# label on both databases, whatever its length.
task_labels = sa.Table(
    "task_labels",
    metadata,
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("label", _Id, primary_key=True),
    sa.Index("ix_task_labels_label_task_id", "label", "task_id"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("claim", sa.String(40), nullable=False),
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("server", sa.String(200)),
    sa.Column("prompt_id", _Id),
    sa.Column("client_id", sa.String(100)),
    sa.Column("started_at", Timestamp, nullable=False),
    sa.Column("submitted_at", Timestamp),
    sa.Column("rendered_at", Timestamp),
    sa.Column("ended_at", Timestamp),
    sa.Column("outcome", sa.String(20)),
    sa.Column("error", sa.JSON),
    sa.Column("progress", sa.Float),
    sa.Index("ix_attempts_running", "server", **_live("ended_at IS NULL AND server IS NOT NULL")),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("claim", sa.String(40), nullable=False, unique=True),
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("session_key", sa.BigInteger, nullable=False),
    sa.Column("renewed_at", Timestamp, nullable=False),
    sa.Column("expires_at", Timestamp, nullable=False),
    sa.Column("deadline_at", Timestamp),
    sa.Column("cancel_requested", sa.Boolean(create_constraint=False), nullable=False),
    postgresql_with={"fillfactor": "50"},
)

# A stray outlives its task's row: its prompt may still be on a server when the task is deleted.
strays = sa.Table(
    "strays",
    metadata,
    sa.Column("server", sa.String(200), primary_key=True),
    sa.Column("prompt_id", _Id, primary_key=True),
    sa.Column("task_id", _Id, nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("since", Timestamp, nullable=False),
)

outputs = sa.Table(
    "outputs",
    metadata,
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("index", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("node_id", sa.String(200), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("content_type", sa.String(200), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("width", sa.Integer),
    sa.Column("height", sa.Integer),
    sa.Column("key", sa.Text, nullable=False, index=True),
)

assets = sa.Table(
    "assets",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("key", sa.Text, nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("content_type", sa.String(200), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("uploaded_again_at", Timestamp),
    sa.Index("ix_assets_owner_id", "owner", "id"),
    sa.Index("ix_assets_created_at", "created_at"),
    sa.Index("ix_assets_owner_sha256_name", "owner", "sha256", "name", unique=True),
)

# Which assets and which other tasks' outputs a task needs: what is named here is not retired.
task_inputs = sa.Table(
    "task_inputs",
    metadata,
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("source_id", _Id, primary_key=True, index=True),
)

# Bytes to delete: all of a deleted task's, what an ended attempt stored, or one asset's key. A row is
# written in the transaction that made the bytes nobody's, so that no crash leaves bytes behind.
removals = sa.Table(
    "removals",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("task_id", _Id, index=True),
    sa.Column("attempt", sa.Integer),
    sa.Column("key", sa.Text),
    sa.Column("owner", sa.String(200)),
    # When the last writer of these bytes ended: a late one may be as much later as it was frozen.
    sa.Column("ended_at", Timestamp, nullable=False),
    # NULL: nothing is left to do; the row of a deleted task stays a while to say that it was deleted.
    sa.Column("due_at", Timestamp),
    sa.Index("ix_removals_due", "due_at", **_live("due_at IS NOT NULL")),
    sa.Index("ix_removals_done", "ended_at", **_live("due_at IS NULL")),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("owner", sa.String(200), primary_key=True),
    # Whose key it is: the id of an API key, or a word for a caller who has none of the ledger's. No
    # foreign key: what one caller took says nothing about another's, whatever becomes of it.
    sa.Column("api_key", sa.String(20), primary_key=True, server_default=""),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_hash", sa.String(64), nullable=False),
    # One of the two: what the key brought about.
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), index=True),
    sa.Column("expires_at", Timestamp, nullable=False, index=True),
    sa.Column("batch_id", _Id, sa.ForeignKey("batches.id", ondelete="CASCADE"), index=True),
)

# Never deleted: an installation that had keys once is not open to all when the last one is revoked.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("owner", sa.String(200), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("rate", sa.String(40)),
    sa.Column("max_queued", sa.Integer),
    sa.Column("max_running", sa.Integer),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("expires_at", Timestamp),
    sa.Column("revoked_at", Timestamp),
    sa.Column("last_used_at", Timestamp),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("queues", sa.JSON, nullable=False),
    sa.Column("servers", sa.JSON, nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),
    sa.Column("consuming", sa.Boolean(create_constraint=False), nullable=False),
    sa.Column("session_key", sa.BigInteger, nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("started_at", Timestamp, nullable=False),
    sa.Column("seen_at", Timestamp, nullable=False, index=True),
)

# What is to be told to a task's ``callback_url``. A claimed one has a claim, and is due again when
# its ``next_at`` comes without an outcome.
webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("task_id", _Id, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("event_type", sa.String(40), nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    # Without its port, in one spelling: it bounds the tries under way to one receiver.
    sa.Column("host", sa.String(300), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("next_at", Timestamp),
    sa.Column("claim", sa.String(40)),
    sa.Column("ended_at", Timestamp),
    sa.CheckConstraint("status IN ('pending', 'delivered', 'failed', 'gone')", name="status"),
    sa.CheckConstraint("(status = 'pending') = (next_at IS NOT NULL)", name="pending_has_time"),
    sa.Index("ix_webhook_deliveries_owner_id", "owner", "id"),
    sa.Index("ix_webhook_deliveries_due", "next_at", "id", **_live("status = 'pending'")),
    # By owner, for whose turn it is; with the host, so that those of a busy one are passed over unread.
    sa.Index("ix_webhook_deliveries_turn", "owner", "next_at", "id", "host", **_live("status = 'pending'")),
    sa.Index("ix_webhook_deliveries_claimed", "host", "next_at", **_live("claim IS NOT NULL")),
)

webhook_attempts = sa.Table(
    "webhook_attempts",
    metadata,
    sa.Column(
        "delivery_id", _Id, sa.ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True
    ),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("started_at", Timestamp, nullable=False),
    sa.Column("duration_s", sa.Float),
    sa.Column("status_code", sa.Integer),
    sa.Column("error", sa.Text),
    sa.Column("excerpt", sa.Text),
)

# Belt and braces: whatever a statement says, no row leaves a final state, no attempt number falls.
TRIGGERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "postgresql": (
        (
            """
            CREATE FUNCTION genpulse_guard_task() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
              IF OLD.status IN ('completed', 'failed', 'canceled')
                 AND (NEW.status, NEW.attempt, NEW.error::text, NEW.completed_at)
                     IS DISTINCT FROM (OLD.status, OLD.attempt, OLD.error::text, OLD.completed_at) THEN
                RAISE EXCEPTION 'task % is final (%)', OLD.id, OLD.status
                  USING ERRCODE = 'integrity_constraint_violation';
              END IF;
              IF NEW.attempt < OLD.attempt THEN
                RAISE EXCEPTION 'the attempt of task % cannot fall', OLD.id
                  USING ERRCODE = 'integrity_constraint_violation';
              END IF;
              RETURN NEW;
            END $$
            """,
            """
            CREATE TRIGGER genpulse_guard_task BEFORE UPDATE ON tasks
              FOR EACH ROW EXECUTE FUNCTION genpulse_guard_task()
            """,
            """
            CREATE FUNCTION genpulse_guard_attempt() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
              RAISE EXCEPTION 'attempt % of task % has ended', OLD.number, OLD.task_id
                USING ERRCODE = 'integrity_constraint_violation';
            END $$
            """,
            """
            CREATE TRIGGER genpulse_guard_attempt BEFORE UPDATE ON attempts
              FOR EACH ROW WHEN (OLD.ended_at IS NOT NULL) EXECUTE FUNCTION genpulse_guard_attempt()
            """,
        ),
        (
            "DROP TRIGGER genpulse_guard_attempt ON attempts",
            "DROP FUNCTION genpulse_guard_attempt()",
            "DROP TRIGGER genpulse_guard_task ON tasks",
            "DROP FUNCTION genpulse_guard_task()",
        ),
    ),
    "sqlite": (
        (
            """
            CREATE TRIGGER genpulse_guard_task_final BEFORE UPDATE ON tasks
            WHEN OLD.status IN ('completed', 'failed', 'canceled')
              AND (NEW.status IS NOT OLD.status OR NEW.attempt IS NOT OLD.attempt
                   OR NEW.error IS NOT OLD.error OR NEW.completed_at IS NOT OLD.completed_at)
            BEGIN SELECT RAISE(ABORT, 'the task is final'); END
            """,
            """
            CREATE TRIGGER genpulse_guard_task_attempt BEFORE UPDATE ON tasks
            WHEN NEW.attempt < OLD.attempt
            BEGIN SELECT RAISE(ABORT, 'the attempt of a task cannot fall'); END
            """,
            """
            CREATE TRIGGER genpulse_guard_attempt BEFORE UPDATE ON attempts
            WHEN OLD.ended_at IS NOT NULL
            BEGIN SELECT RAISE(ABORT, 'the attempt has ended'); END
            """,
        ),
        (
            "DROP TRIGGER genpulse_guard_attempt",
            "DROP TRIGGER genpulse_guard_task_attempt",
            "DROP TRIGGER genpulse_guard_task_final",
        ),
    ),
}

# A task's end is announced by the statement that ends it, whichever that is: no verb can forget to.
# The ids are UUIDv7, as ours are everywhere: their order is that of time.
WEBHOOK_TRIGGERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "postgresql": (
        (
            """
            CREATE FUNCTION genpulse_announce_task() RETURNS trigger LANGUAGE plpgsql AS $$
            DECLARE
              ms text := lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0');
              random text := replace(gen_random_uuid()::text, '-', '');
            BEGIN
              INSERT INTO webhook_deliveries
                (id, owner, task_id, event_type, url, host, status, tries, attempts, created_at, next_at)
              VALUES (
                (ms || '7' || substr(random, 14, 3) || substr(random, 17))::uuid,
                NEW.owner, NEW.id, 'task.' || NEW.status, NEW.callback_url,
                left(rtrim(coalesce(lower(
                  substring(NEW.callback_url from '//([[][^]]*[]]|[^/?#:]+)')), ''), '.'), 300),
                'pending', 0, 0, statement_timestamp(), statement_timestamp());
              RETURN NULL;
            END $$
            """,
            """
            CREATE TRIGGER genpulse_announce_task AFTER UPDATE ON tasks FOR EACH ROW
              WHEN (OLD.completed_at IS NULL AND NEW.completed_at IS NOT NULL
                    AND NEW.callback_url IS NOT NULL)
              EXECUTE FUNCTION genpulse_announce_task()
            """,
        ),
        (
            "DROP TRIGGER genpulse_announce_task ON tasks",
            "DROP FUNCTION genpulse_announce_task()",
        ),
    ),
    "sqlite": (
        (
            """
            CREATE TRIGGER genpulse_announce_task AFTER UPDATE ON tasks
            WHEN OLD.completed_at IS NULL AND NEW.completed_at IS NOT NULL
              AND NEW.callback_url IS NOT NULL
            BEGIN
              INSERT INTO webhook_deliveries
                (id, owner, task_id, event_type, url, host, status, tries, attempts, created_at, next_at)
              SELECT
                lower(printf('%012x', at) || '7' || substr(hex(randomblob(2)), 1, 3)
                      || substr('89ab', 1 + abs(random() % 4), 1) || substr(hex(randomblob(8)), 1, 15)),
                NEW.owner, NEW.id, 'task.' || NEW.status, NEW.callback_url,
                substr(lower(CASE WHEN substr(host, 1, 1) = '[' THEN substr(host, 1, instr(host, ']'))
                             ELSE rtrim(substr(host, 1, instr(host || ':', ':') - 1), '.') END), 1, 300),
                'pending', 0, 0, at, at
              FROM (SELECT at, substr(rest, 1, instr(rest || '#', '#') - 1) AS host
              FROM (SELECT at, substr(rest, 1, instr(rest || '?', '?') - 1) AS rest
              FROM (SELECT at, substr(rest, 1, instr(rest || '/', '/') - 1) AS rest
              FROM (SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) AS at,
                           substr(NEW.callback_url, instr(NEW.callback_url, '//') + 2) AS rest))));
            END
            """,
        ),
        ("DROP TRIGGER genpulse_announce_task",),
    ),
}
