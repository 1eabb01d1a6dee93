"""Webhooks by turns of their owners: the index for it, and hosts without their ports."""

import sqlalchemy as sa
from alembic import op

from genpulse.ledger.tables import WEBHOOK_TRIGGERS

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index, write the trigger anew, and the hosts of what still waits."""
    waits = sa.text("status = 'pending'")
    op.create_index(
        "ix_webhook_deliveries_turn",
        "webhook_deliveries",
        ["owner", "next_at", "id", "host"],
        unique=False,
        postgresql_where=waits,
        sqlite_where=waits,
    )
    database = op.get_bind().dialect.name
    make, drop = WEBHOOK_TRIGGERS[database]
    for statement in (*drop, *make):
        op.execute(statement)
    if database == "postgresql":
        bare = "regexp_replace(host, ':[0-9]*$', '')"
    else:  # an address has digits at its end too, but no colon before them
        bare = (
            "CASE WHEN rtrim(host, '0123456789') LIKE '%:'"
            " THEN rtrim(rtrim(host, '0123456789'), ':') ELSE host END"
        )
    op.execute(f"UPDATE webhook_deliveries SET host = rtrim({bare}, '.') WHERE status = 'pending'")  # noqa: S608 - both texts stand above


def downgrade() -> None:
    """Take the index away; a host without its port does an older version no harm."""
    op.drop_index("ix_webhook_deliveries_turn", "webhook_deliveries")
