"""
The ledger: the tables that hold the truth about tasks, and every SQL statement.

PostgreSQL for many machines, SQLite for one. A task is accepted when its row is committed, and
final when one fenced ``UPDATE`` says so; everything in Redis can be rebuilt from here. The
statements stand in chapters: :mod:`~genpulse.ledger.keys` (who may call, and how much), then
:mod:`~genpulse.ledger.requests` (the API's), then
:mod:`~genpulse.ledger.running` (the worker's), then :mod:`~genpulse.ledger.dispatching` (the
relay's and the sweeper's).
"""

from genpulse.ledger.base import fork_lock
from genpulse.ledger.dispatching import Dispatch
from genpulse.ledger.keys import KeyText, OwnerRoom, mint
from genpulse.ledger.ledger import Ledger
from genpulse.ledger.measures import Ended, Line
from genpulse.ledger.requests import IdempotencyConflict, Source, SourceGone, new_id
from genpulse.ledger.retiring import Removal
from genpulse.ledger.running import Beat, StaleLease, Stray
from genpulse.ledger.sessions import ProcessSession, SessionProbe
from genpulse.ledger.sharing import Shared
from genpulse.ledger.tables import metadata
from genpulse.ledger.webhooks import Backlog, Delivery, DeliveryStatus, DeliveryTry

__all__ = [
    "Backlog",
    "Beat",
    "Delivery",
    "DeliveryStatus",
    "DeliveryTry",
    "Dispatch",
    "Ended",
    "IdempotencyConflict",
    "KeyText",
    "Ledger",
    "Line",
    "OwnerRoom",
    "ProcessSession",
    "Removal",
    "SessionProbe",
    "Shared",
    "Source",
    "SourceGone",
    "StaleLease",
    "Stray",
    "fork_lock",
    "metadata",
    "mint",
    "new_id",
]
