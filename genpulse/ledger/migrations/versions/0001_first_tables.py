"""The first tables: tasks and their attempts, leases, strays and outputs; assets, keys, workers."""

import sqlalchemy as sa
from alembic import op

from genpulse.ledger.tables import TRIGGERS
from genpulse.ledger.types import Timestamp

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make everything."""
    op.create_table(
        "assets",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("content_type", sa.String(length=200), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_assets")),
    )
    op.create_index(op.f("ix_assets_key"), "assets", ["key"], unique=False)
    op.create_index("ix_assets_owner_id", "assets", ["owner", "id"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("task_type", sa.String(length=100), nullable=False),
        sa.Column("queue", sa.String(length=100), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("callback_url", sa.Text(), nullable=True),
        sa.Column("retry_of", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("timeout_s", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("claim", sa.String(length=40), nullable=True),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("losses", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.Column("available_at", Timestamp(), nullable=False),
        sa.Column("expires_at", Timestamp(), nullable=True),
        sa.Column("dispatched_at", Timestamp(), nullable=True),
        sa.Column("started_at", Timestamp(), nullable=True),
        sa.Column("completed_at", Timestamp(), nullable=True),
        sa.Column("cancel_requested_at", Timestamp(), nullable=True),
        sa.Column("deadline_at", Timestamp(), nullable=True),
        sa.Column("bound_server", sa.String(length=200), nullable=True),
        sa.Column("bound_until", Timestamp(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("run_s", sa.Float(), nullable=True),
        sa.Column("store_s", sa.Float(), nullable=True),
        sa.CheckConstraint(
            "(status IN ('completed', 'failed', 'canceled')) = (completed_at IS NOT NULL)",
            name=op.f("ck_tasks_final_has_end"),
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed', 'canceled')",
            name=op.f("ck_tasks_status"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
    )
    op.create_index(
        "ix_tasks_bound",
        "tasks",
        ["bound_server"],
        unique=False,
        postgresql_where=sa.text("status = 'pending' AND bound_server IS NOT NULL"),
        sqlite_where=sa.text("status = 'pending' AND bound_server IS NOT NULL"),
    )
    op.create_index(
        "ix_tasks_ended",
        "tasks",
        ["completed_at"],
        unique=False,
        postgresql_where=sa.text("completed_at IS NOT NULL"),
        sqlite_where=sa.text("completed_at IS NOT NULL"),
    )
    op.create_index(
        "ix_tasks_expiry",
        "tasks",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending' AND expires_at IS NOT NULL"),
        sqlite_where=sa.text("status = 'pending' AND expires_at IS NOT NULL"),
    )
    op.create_index(
        "ix_tasks_live",
        "tasks",
        ["queue", "status", "priority", "created_at", "id", "completed_at"],
        unique=False,
        postgresql_where=sa.text("completed_at IS NULL"),
        sqlite_where=sa.text("completed_at IS NULL"),
    )
    op.create_index(
        "ix_tasks_outbox",
        "tasks",
        ["queue", "priority", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'pending' AND dispatched_at IS NULL"),
        sqlite_where=sa.text("status = 'pending' AND dispatched_at IS NULL"),
    )
    op.create_index(
        "ix_tasks_run_time",
        "tasks",
        ["task_type", "completed_at"],
        unique=False,
        postgresql_where=sa.text("run_s IS NOT NULL"),
        sqlite_where=sa.text("run_s IS NOT NULL"),
    )
    op.create_index("ix_tasks_owner_id", "tasks", ["owner", "id"], unique=False)
    op.create_index(
        "ix_tasks_runway",
        "tasks",
        ["queue", "priority", "dispatched_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending' AND dispatched_at IS NOT NULL"),
        sqlite_where=sa.text("status = 'pending' AND dispatched_at IS NOT NULL"),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("host", sa.String(length=200), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("queues", sa.JSON(), nullable=False),
        sa.Column("servers", sa.JSON(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("consuming", sa.Boolean(), nullable=False),
        sa.Column("session_key", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("started_at", Timestamp(), nullable=False),
        sa.Column("seen_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )
    op.create_index(op.f("ix_workers_seen_at"), "workers", ["seen_at"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("claim", sa.String(length=40), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("server", sa.String(length=200), nullable=True),
        sa.Column("prompt_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("client_id", sa.String(length=100), nullable=True),
        sa.Column("started_at", Timestamp(), nullable=False),
        sa.Column("submitted_at", Timestamp(), nullable=True),
        sa.Column("rendered_at", Timestamp(), nullable=True),
        sa.Column("ended_at", Timestamp(), nullable=True),
        sa.Column("outcome", sa.String(length=20), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_attempts_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "number", name=op.f("pk_attempts")),
    )
    op.create_index(
        "ix_attempts_running",
        "attempts",
        ["server"],
        unique=False,
        postgresql_where=sa.text("ended_at IS NULL AND server IS NOT NULL"),
        sqlite_where=sa.text("ended_at IS NULL AND server IS NOT NULL"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("expires_at", Timestamp(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_idempotency_keys_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_expires_at"), "idempotency_keys", ["expires_at"], unique=False)
    op.create_index(op.f("ix_idempotency_keys_task_id"), "idempotency_keys", ["task_id"], unique=False)
    op.create_table(
        "leases",
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("claim", sa.String(length=40), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("session_key", sa.BigInteger(), nullable=False),
        sa.Column("renewed_at", Timestamp(), nullable=False),
        sa.Column("expires_at", Timestamp(), nullable=False),
        sa.Column("deadline_at", Timestamp(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_leases_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_leases")),
        sa.UniqueConstraint("claim", name=op.f("uq_leases_claim")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "outputs",
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("node_id", sa.String(length=200), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("content_type", sa.String(length=200), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("key", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_outputs_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "index", name=op.f("pk_outputs")),
    )
    op.create_index(op.f("ix_outputs_key"), "outputs", ["key"], unique=False)
    op.create_table(
        "strays",
        sa.Column("server", sa.String(length=200), nullable=False),
        sa.Column("prompt_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("since", Timestamp(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_strays_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("server", "prompt_id", name=op.f("pk_strays")),
    )
    op.create_index(op.f("ix_strays_task_id"), "strays", ["task_id"], unique=False)
    for statement in TRIGGERS[op.get_bind().dialect.name][0]:
        op.execute(statement)


def downgrade() -> None:
    """Take everything away."""
    for statement in TRIGGERS[op.get_bind().dialect.name][1]:
        op.execute(statement)
    for table in (
        "idempotency_keys",
        "outputs",
        "strays",
        "leases",
        "attempts",
        "workers",
        "assets",
        "tasks",
    ):
        op.drop_table(table)
