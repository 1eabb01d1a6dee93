"""Idempotency keys are those of an API key, and no longer of an owner."""

import sqlalchemy as sa
from alembic import op

from genpulse.ledger.types import Timestamp

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_Id = sa.Uuid(as_uuid=False)
_OF_ITS_OWNER = """
INSERT INTO idempotency_keys (owner, api_key, key, body_hash, task_id, expires_at, batch_id)
SELECT f.owner, api_keys.id, f.key, f.body_hash, f.task_id, f.expires_at, f.batch_id
FROM former_keys AS f JOIN api_keys ON api_keys.owner = f.owner
"""
# The owner of those without a key, and of the single key of the settings.
_OF_EVERYBODY = """
INSERT INTO idempotency_keys (owner, api_key, key, body_hash, task_id, expires_at, batch_id)
SELECT f.owner, who.api_key, f.key, f.body_hash, f.task_id, f.expires_at, f.batch_id
FROM former_keys AS f CROSS JOIN (SELECT '' AS api_key UNION ALL SELECT 'single') AS who
WHERE f.owner = 'default'
"""
_ONE_OF_EACH = """
INSERT INTO idempotency_keys (owner, key, body_hash, task_id, expires_at, batch_id)
SELECT owner, key, body_hash, task_id, expires_at, batch_id FROM former_keys AS f
WHERE api_key = (SELECT MIN(o.api_key) FROM former_keys AS o WHERE o.owner = f.owner AND o.key = f.key)
"""


def upgrade() -> None:
    """
    Add the column, and copy each row for every API key of its owner.

    Of a row that is there it is not known which of them took it: whoever repeats a request after the
    upgrade is to find it all the same, and within a day they are all gone.
    """
    _remake(_OF_ITS_OWNER, _OF_EVERYBODY, by_api_key=True)


def downgrade() -> None:
    """Take it away; of an owner's rows of one name one stays."""
    _remake(_ONE_OF_EACH, by_api_key=False)


def _remake(*fill: str, by_api_key: bool) -> None:
    """SQLite cannot change a primary key; the table is small, for its rows live a day."""
    op.execute("CREATE TABLE former_keys AS SELECT * FROM idempotency_keys")
    op.drop_table("idempotency_keys")
    api_key = (
        (sa.Column("api_key", sa.String(length=20), nullable=False, server_default=""),) if by_api_key else ()
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=200), nullable=False),
        *api_key,
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("task_id", _Id, nullable=True),
        sa.Column("expires_at", Timestamp(), nullable=False),
        sa.Column("batch_id", _Id, nullable=True),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_idempotency_keys_task_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_idempotency_keys_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(
            "owner", *(column.name for column in api_key), "key", name=op.f("pk_idempotency_keys")
        ),
    )
    for statement in fill:
        op.execute(statement)
    op.drop_table("former_keys")
    for column in ("task_id", "expires_at", "batch_id"):
        op.create_index(op.f(f"ix_idempotency_keys_{column}"), "idempotency_keys", [column])
