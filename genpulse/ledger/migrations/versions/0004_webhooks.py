"""Webhooks: deliveries, the log of their tries, and the trigger that writes them."""

import sqlalchemy as sa
from alembic import op

from genpulse.ledger.tables import WEBHOOK_TRIGGERS
from genpulse.ledger.types import Timestamp

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables, then what fills them."""
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("event_type", sa.String(length=40), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("host", sa.String(length=300), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("next_at", Timestamp(), nullable=True),
        sa.Column("claim", sa.String(length=40), nullable=True),
        sa.Column("ended_at", Timestamp(), nullable=True),
        sa.CheckConstraint(
            "status IN ('pending', 'delivered', 'failed', 'gone')",
            name=op.f("ck_webhook_deliveries_status"),
        ),
        sa.CheckConstraint(
            "(status = 'pending') = (next_at IS NOT NULL)",
            name=op.f("ck_webhook_deliveries_pending_has_time"),
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_webhook_deliveries_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(op.f("ix_webhook_deliveries_task_id"), "webhook_deliveries", ["task_id"], unique=False)
    op.create_index("ix_webhook_deliveries_owner_id", "webhook_deliveries", ["owner", "id"], unique=False)
    for name, columns, condition in (
        ("ix_webhook_deliveries_due", ["next_at", "id"], "status = 'pending'"),
        ("ix_webhook_deliveries_claimed", ["host", "next_at"], "claim IS NOT NULL"),
    ):
        where = sa.text(condition)
        op.create_index(
            name, "webhook_deliveries", columns, unique=False, postgresql_where=where, sqlite_where=where
        )
    op.create_table(
        "webhook_attempts",
        sa.Column("delivery_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("started_at", Timestamp(), nullable=False),
        sa.Column("duration_s", sa.Float(), nullable=True),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("excerpt", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["webhook_deliveries.id"],
            name=op.f("fk_webhook_attempts_delivery_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("pk_webhook_attempts")),
    )
    for statement in WEBHOOK_TRIGGERS[op.get_bind().dialect.name][0]:
        op.execute(statement)


def downgrade() -> None:
    """Take them away."""
    for statement in WEBHOOK_TRIGGERS[op.get_bind().dialect.name][1]:
        op.execute(statement)
    op.drop_table("webhook_attempts")
    op.drop_table("webhook_deliveries")
