"""
The web side: validates, submits and reads. It runs no task and speaks to no ComfyUI server.

:func:`create_app` is one of the two places where objects are built (the worker's start is the
other one); importing this package builds nothing.
"""

from __future__ import annotations

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine

from genpulse.config import Settings
from genpulse.ledger import metadata
from genpulse.tasks.admission import Admission
from genpulse.tasks.registry import Registry, default_registry
from genpulse.tasks.wiring import open_ledger, open_live, open_storage
from genpulse.telemetry import metrics as measured
from genpulse.telemetry import traces
from genpulse.web import access, limits, observe, problems
from genpulse.web.condition import Conditions
from genpulse.web.service import Service
from genpulse.web.watch import Watchers

__all__ = ["Service", "create_app"]


class _Database(SQLAlchemy):
    """
    Flask-SQLAlchemy over the ledger's own tables and engine.

    The ledger's engine begins transactions in a way of its own and knows its time-outs; a second
    engine beside it would be a second set of connections with other manners.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(metadata=metadata)
        self._engine = engine

    def _make_engine(self, bind_key: str | None, options: dict[str, object], app: Flask) -> Engine:
        del bind_key, options, app
        return self._engine


def create_app(settings: Settings | None = None, *, registry: Registry | None = None) -> Flask:
    """
    Build the web application.

    Nothing is connected and no thread is started: gunicorn's hook attaches the relay and the
    sweeper after the fork (:mod:`genpulse.web.gunicorn_conf`).

    Args:
        settings: From the environment if not given.
        registry: The task types to offer; every installed one if not given.

    Raises:
        SettingsError: A setting cannot be used.
        RegistryError: A task type's declaration cannot be used.
    """
    from genpulse.web import batch, deliveries, docs, events, metrics  # their routes join the table
    from genpulse.web.api import MODELS, ROUTES
    from genpulse.web.contract import Contract

    del docs, metrics
    settings = settings or Settings.from_env()
    registry = registry or default_registry()
    names = [name for handler in registry for name in (handler.task_type, *handler.aliases)]
    models = (*MODELS, *batch.MODELS, *deliveries.MODELS, *events.MODELS)
    app = Contract(__name__, ROUTES, models, names, webhooks=deliveries.WEBHOOKS)
    app.json.sort_keys = False  # type: ignore[attr-defined]  # Flask's default provider has it
    # Up to five times as many in a rush. Watchers need none while they wait.
    ledger = open_ledger(settings, pool_size=min(6, settings.api_threads))
    app.config.update(MAX_CONTENT_LENGTH=settings.max_body_bytes, SQLALCHEMY_DATABASE_URI=settings.ledger_url)
    _Database(ledger.engine).init_app(app)
    service = app.extensions["genpulse"] = Service(
        settings=settings,
        ledger=ledger,
        storage=open_storage(settings),
        live=open_live(settings),
        registry=registry,
        admission=Admission(settings, ledger),
    )
    service.watchers = Watchers(
        ledger,
        settings.redis_url.get_secret_value(),
        places=settings.watcher_places,
        is_stopping=lambda: service.is_stopping(),  # noqa: PLW0108 - gunicorn's hook sets it later
    )
    service.conditions = Conditions(service)
    measured.start("fleet", "api")
    traces.start(settings.otlp_endpoint, "genpulse-api")
    traces.instrument(app)
    observe.install(app)
    problems.install(app)
    access.install(app, settings, ROUTES)
    limits.install(app, settings)
    return app
