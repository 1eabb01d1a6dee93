"""Run by Alembic: the connection is handed over by :meth:`genpulse.ledger.Ledger.migrate`."""

from alembic import context

from genpulse.ledger.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    compare_type=True,
    render_as_batch=connection.dialect.name == "sqlite",
    transaction_per_migration=False,
)
context.run_migrations()
