"""Which request sent a task: its id, and its place in a trace."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; of the tasks there are it is not known."""
    op.add_column("tasks", sa.Column("request_id", sa.String(length=64), nullable=True))
    op.add_column("tasks", sa.Column("traceparent", sa.String(length=60), nullable=True))


def downgrade() -> None:
    """Take them away."""
    op.drop_column("tasks", "traceparent")
    op.drop_column("tasks", "request_id")
