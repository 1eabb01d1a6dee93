"""Retries, last progress, what a task needs, and bytes to delete; strays outlive their tasks."""

import re

import sqlalchemy as sa
from alembic import op

from genpulse.ledger.types import Timestamp

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add tables, columns and indexes; find out what the tasks there are need."""
    op.add_column("attempts", sa.Column("progress", sa.Float(), nullable=True))
    op.create_index("ix_tasks_owner_status_id", "tasks", ["owner", "status", "id"])
    op.create_index(
        "ix_tasks_retry_of",
        "tasks",
        ["retry_of"],
        postgresql_where=sa.text("retry_of IS NOT NULL"),
        sqlite_where=sa.text("retry_of IS NOT NULL"),
    )
    op.add_column("assets", sa.Column("uploaded_again_at", Timestamp(), nullable=True))
    op.create_index("ix_assets_created_at", "assets", ["created_at"])
    # Two uploads at once could make two records of one name; both may be in use, so the later is renamed.
    op.execute(
        "UPDATE assets SET name = name || ' (' || CAST(id AS VARCHAR(40)) || ')' WHERE EXISTS ("
        "SELECT 1 FROM assets AS other WHERE other.owner = assets.owner AND other.sha256 = assets.sha256"
        " AND other.name = assets.name AND other.id < assets.id)"
    )
    op.create_index("ix_assets_owner_sha256_name", "assets", ["owner", "sha256", "name"], unique=True)
    op.create_table(
        "task_inputs",
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("source_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_task_inputs_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "source_id", name=op.f("pk_task_inputs")),
    )
    op.create_index(op.f("ix_task_inputs_source_id"), "task_inputs", ["source_id"])
    op.create_table(
        "removals",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("owner", sa.String(length=200), nullable=True),
        sa.Column("ended_at", Timestamp(), nullable=False),
        sa.Column("due_at", Timestamp(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_removals")),
    )
    op.create_index(op.f("ix_removals_task_id"), "removals", ["task_id"])
    for name, column, condition in (
        ("ix_removals_due", "due_at", "due_at IS NOT NULL"),
        ("ix_removals_done", "ended_at", "due_at IS NULL"),
    ):
        op.create_index(
            name,
            "removals",
            [column],
            postgresql_where=sa.text(condition),
            sqlite_where=sa.text(condition),
        )
    _rebuild_strays(owned=False)
    _fill_task_inputs()


def downgrade() -> None:
    """Take it away again."""
    op.execute("DELETE FROM strays WHERE task_id NOT IN (SELECT id FROM tasks)")
    _rebuild_strays(owned=True)
    op.drop_table("removals")
    op.drop_table("task_inputs")
    op.drop_index("ix_assets_owner_sha256_name", "assets")
    op.drop_index("ix_assets_created_at", "assets")
    op.drop_column("assets", "uploaded_again_at")
    op.drop_index("ix_tasks_retry_of", "tasks")
    op.drop_index("ix_tasks_owner_status_id", "tasks")
    op.drop_column("attempts", "progress")


def _rebuild_strays(*, owned: bool) -> None:
    """Make the table anew with or without its foreign key, which SQLite cannot drop."""
    key = sa.ForeignKeyConstraint(
        ["task_id"], ["tasks.id"], name=op.f("fk_strays_task_id"), ondelete="CASCADE"
    )
    op.execute("CREATE TABLE strays_kept AS SELECT * FROM strays")
    op.drop_table("strays")
    op.create_table(
        "strays",
        sa.Column("server", sa.String(length=200), nullable=False),
        sa.Column("prompt_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("task_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("since", Timestamp(), nullable=False),
        *([key] if owned else []),
        sa.PrimaryKeyConstraint("server", "prompt_id", name=op.f("pk_strays")),
    )
    op.create_index(op.f("ix_strays_task_id"), "strays", ["task_id"])
    op.execute("INSERT INTO strays SELECT * FROM strays_kept")
    op.drop_table("strays_kept")


def _fill_task_inputs() -> None:
    """Read the references out of the params of the tasks there are."""
    connection = op.get_bind()
    uuid = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    reference = re.compile(rf'"(?:asset:({uuid})|output:({uuid})/\d+)"')
    tasks = sa.table("tasks", sa.column("id", sa.Uuid(as_uuid=False)), sa.column("params", sa.Text))
    inputs = sa.table(
        "task_inputs",
        sa.column("task_id", sa.Uuid(as_uuid=False)),
        sa.column("source_id", sa.Uuid(as_uuid=False)),
    )
    query = sa.select(tasks.c.id, sa.cast(tasks.c.params, sa.Text)).execution_options(yield_per=500)
    found = [
        {"task_id": task_id, "source_id": source}
        for task_id, params in connection.execute(query)
        for source in sorted({(a or b).lower() for a, b in reference.findall(params)})
    ]
    if found:
        connection.execute(sa.insert(inputs), found)
