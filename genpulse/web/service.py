"""What a request can reach: one object, built by ``create_app`` and kept with the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from flask import current_app

from genpulse.live import Farthest

if TYPE_CHECKING:
    from genpulse.config import Settings
    from genpulse.ledger import Ledger
    from genpulse.live import Live
    from genpulse.storage import StorageProvider
    from genpulse.tasks.admission import Admission
    from genpulse.tasks.registry import Registry
    from genpulse.web.condition import Conditions
    from genpulse.web.watch import Watchers

__all__ = ["OWNER", "Service", "service"]

OWNER = "default"
"""Who the tasks of the single key, and of a server without one, belong to."""


def _nobody() -> None:
    """Until a background thread is attached, a sweeper elsewhere picks new tasks up."""


@dataclass(slots=True)
class Service:
    """The collaborators of the views. ``wake`` tells the relay that a task was committed."""

    settings: Settings
    ledger: Ledger
    storage: StorageProvider
    live: Live
    registry: Registry
    admission: Admission
    wake: Callable[[], None] = field(default=_nobody)
    announce_cancel: Callable[[], None] = field(default=_nobody)
    """Tells the workers, through Redis and never in the request, that a cancel was committed."""
    is_stopping: Callable[[], bool] = field(default=lambda: False)
    """Whether the process was told to stop: ``/ready`` says so while requests in flight end."""
    farthest: Farthest = field(default_factory=Farthest)
    watchers: Watchers = field(init=False)
    """Event streams and long polls; ``create_app`` sets it."""
    conditions: Conditions = field(init=False)
    """What works; ``create_app`` sets it."""


def service() -> Service:
    """The current application's :class:`Service`."""
    return cast("Service", current_app.extensions["genpulse"])
