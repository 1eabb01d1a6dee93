"""Retries of a batch's tasks use what the batch keeps for all of them."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_Id = sa.Uuid(as_uuid=False)


def upgrade() -> None:
    """Add the column; the tasks there are have their params, or are in a batch."""
    op.add_column("tasks", sa.Column("params_of", _Id, nullable=True))
    condition = sa.text("params_of IS NOT NULL")
    op.create_index(
        "ix_tasks_params_of", "tasks", ["params_of"], postgresql_where=condition, sqlite_where=condition
    )


def downgrade() -> None:
    """Take it away; what used it gets its whole params back first."""
    from genpulse.ledger.sharing import join

    connection = op.get_bind()
    batches = sa.table("batches", sa.column("id", _Id), sa.column("shared_params", sa.JSON))
    tasks = sa.table("tasks", sa.column("id", _Id), sa.column("params_of", _Id), sa.column("params", sa.JSON))
    for batch_id in connection.execute(
        sa.select(tasks.c.params_of).where(tasks.c.params_of.is_not(None)).distinct()
    ).scalars():
        shared = sa.select(batches.c.shared_params).where(batches.c.id == batch_id)
        common = connection.execute(shared).scalar_one()
        for task_id in connection.execute(
            sa.select(tasks.c.id).where(tasks.c.params_of == batch_id)
        ).scalars():
            own = connection.execute(sa.select(tasks.c.params).where(tasks.c.id == task_id)).scalar_one()
            connection.execute(sa.update(tasks).where(tasks.c.id == task_id).values(params=join(common, own)))
    op.drop_index("ix_tasks_params_of", table_name="tasks")
    op.drop_column("tasks", "params_of")
