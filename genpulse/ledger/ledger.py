"""The one door to the ledger: all chapters of statements, and the migrations."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from genpulse.errors import LedgerUnavailable
from genpulse.ledger.measures import Measures
from genpulse.ledger.retiring import Retiring
from genpulse.ledger.webhooks import Webhooks

__all__ = ["Ledger"]


class Ledger(Retiring, Webhooks, Measures):
    """Every statement about tasks, given a connected engine or opened by URL."""

    def migrate(self) -> None:
        """
        Bring the tables to this version. Safe to repeat, and for many processes at once.

        Raises:
            LedgerUnavailable: The database did not answer.
        """
        from alembic import command  # half a second of imports that only this call needs
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self.engine.connect() as connection, connection.begin():
                if (
                    self.is_postgresql
                ):  # two migrating processes: the second one waits, then finds nothing to do
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATE_LOCK)))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except sa.exc.OperationalError as error:
            raise LedgerUnavailable(str(error.orig).partition("\n")[0]) from error


_MIGRATE_LOCK = 7_310_573_202
