"""Batches, what their tasks share, and an index of the tasks' metadata."""

import json

import sqlalchemy as sa
from alembic import op

from genpulse.ledger.labels import label
from genpulse.ledger.types import Timestamp

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_Id = sa.Uuid(as_uuid=False)


def upgrade() -> None:
    """Add tables and columns; index the metadata of the tasks there are."""
    op.create_table(
        "batches",
        sa.Column("id", _Id, nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("shared_params", sa.JSON(), nullable=False),
        sa.Column("grid", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.add_column("tasks", sa.Column("batch_id", _Id, nullable=True))
    op.add_column("tasks", sa.Column("batch_index", sa.Integer(), nullable=True))
    condition = sa.text("batch_id IS NOT NULL")
    op.create_index(
        "ix_tasks_batch",
        "tasks",
        ["batch_id", "batch_index"],
        postgresql_where=condition,
        sqlite_where=condition,
    )
    _remake_keys(with_batches=True)
    op.create_table(
        "task_labels",
        sa.Column("task_id", _Id, nullable=False),
        sa.Column("label", _Id, nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_task_labels_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "label", name=op.f("pk_task_labels")),
    )
    op.create_index("ix_task_labels_label_task_id", "task_labels", ["label", "task_id"])
    _label_tasks(op.get_bind())


def _remake_keys(*, with_batches: bool) -> None:
    """SQLite cannot change a column; the table is small, for its rows live a day."""
    op.execute("CREATE TABLE former_keys AS SELECT * FROM idempotency_keys WHERE task_id IS NOT NULL")
    op.drop_table("idempotency_keys")
    more = (
        (
            sa.Column("batch_id", _Id, nullable=True),
            sa.ForeignKeyConstraint(
                ["batch_id"],
                ["batches.id"],
                name=op.f("fk_idempotency_keys_batch_id"),
                ondelete="CASCADE",
            ),
        )
        if with_batches
        else ()
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("task_id", _Id, nullable=with_batches),
        sa.Column("expires_at", Timestamp(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_idempotency_keys_task_id"), ondelete="CASCADE"
        ),
        *more,
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    op.execute(
        "INSERT INTO idempotency_keys (owner, key, body_hash, task_id, expires_at)"
        " SELECT owner, key, body_hash, task_id, expires_at FROM former_keys"
    )
    op.drop_table("former_keys")
    for column in ("task_id", "expires_at", *(("batch_id",) if with_batches else ())):
        op.create_index(op.f(f"ix_idempotency_keys_{column}"), "idempotency_keys", [column])


def _label_tasks(connection: sa.Connection) -> None:
    tasks = sa.table(
        "tasks", sa.column("id", _Id), sa.column("owner", sa.String), sa.column("metadata", sa.JSON)
    )
    labels = sa.table("task_labels", sa.column("task_id", _Id), sa.column("label", _Id))
    last = "00000000-0000-0000-0000-000000000000"
    while rows := connection.execute(
        sa.select(tasks).where(tasks.c.id > last).order_by(tasks.c.id).limit(5000)
    ).all():
        last = rows[-1].id
        found = [
            {"task_id": row.id, "label": label(row.owner, key, value)}
            for row in rows
            for key, value in _mapping(row.metadata).items()
        ]
        if found:
            connection.execute(sa.insert(labels), found)


def _mapping(value: object) -> dict[str, str]:
    found = json.loads(value) if isinstance(value, str) else value
    return found if isinstance(found, dict) else {}


def downgrade() -> None:
    """
    Take them away.

    Tasks of a batch get their whole params back first; the batch itself is forgotten.
    """
    from genpulse.ledger.sharing import join

    connection = op.get_bind()
    batches = sa.table("batches", sa.column("id", _Id), sa.column("shared_params", sa.JSON))
    tasks = sa.table("tasks", sa.column("id", _Id), sa.column("batch_id", _Id), sa.column("params", sa.JSON))
    for batch in connection.execute(sa.select(batches)).all():
        for row in connection.execute(sa.select(tasks).where(tasks.c.batch_id == batch.id)).all():
            connection.execute(
                sa.update(tasks)
                .where(tasks.c.id == row.id)
                .values(params=join(batch.shared_params, row.params))
            )
    op.drop_index("ix_task_labels_label_task_id", table_name="task_labels")
    op.drop_table("task_labels")
    _remake_keys(with_batches=False)
    op.drop_index("ix_tasks_batch", table_name="tasks")
    op.drop_column("tasks", "batch_index")
    op.drop_column("tasks", "batch_id")
    op.drop_table("batches")
