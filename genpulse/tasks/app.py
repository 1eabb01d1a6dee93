"""
The worker's side of Celery: the application, its task functions and its signals.

``celery -A genpulse worker -Q comfy`` finds ``app`` here through the package's lazy attribute.
Importing this module builds nothing. The task functions are thin shells: what an attempt does
stands in :mod:`genpulse.tasks.runner`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import uuid
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlsplit

from celery import Celery, signals
from celery.exceptions import Ignore
from celery.worker.request import Request

from genpulse.config import Settings, SettingsError, is_loopback
from genpulse.tasks import queues
from genpulse.tasks.broker import WorkerAMQP
from genpulse.tasks.producer import broker_url, celery_queue, result_backend
from genpulse.tasks.registry import Registry, RegistryError, default_registry
from genpulse.telemetry import metrics, setup_logging

__all__ = ["GenPulseRequest", "build_app", "node_name", "refusal"]

EXIT_CONFIG = 78
"""``EX_CONFIG`` of sysexits.h: a supervisor need not try again before something was changed."""

log = logging.getLogger("genpulse.worker")


class GenPulseRequest(Request):
    """
    A message in the worker's main process, which alone sees a child die.

    Celery's signal ``task_failure`` says the same without naming the child, and the lease to end
    is that of *this* child: the task may be another's by now.
    """

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """A child was lost (or, harmless here, the task raised)."""
        if not return_ok and self.worker_pid:
            _note_lost_child(self.id, self.hostname, self.worker_pid)
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """Celery's hard limit ended the child."""
        if not soft and self.worker_pid:
            _note_lost_child(self.id, self.hostname, self.worker_pid)
        return super().on_timeout(soft, timeout)


class _QuietCelery(Celery):
    """
    A Celery whose workers do not ask each other anything.

    Mingle makes a worker wait a second at its start for news of others, and gossip keeps a
    subscription that serves nothing here: the ledger knows what Celery's workers would tell. The
    command line is the user's (``celery -A genpulse worker -Q comfy``), so it is said here.
    """

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        """The class of this application's workers."""
        whose: Any = self  # the stubs know classes only, not Celery's own lazy names
        base = whose.subclass_with_self("celery.apps.worker:Worker")

        class Worker(base):  # type: ignore[misc, valid-type]  # made at run time by Celery
            def prepare_args(self, **kwargs: Any) -> dict[str, Any]:
                return {**kwargs, "without_mingle": True, "without_gossip": True}

        return Worker


def build_app(settings: Settings | None = None, registry: Registry | None = None) -> Celery:
    """
    Build the worker's Celery application: one task function for each task type.

    Args:
        settings: By default ``celeryconfig`` reads the environment.
        registry: By default every installed handler.

    Raises:
        SettingsError: A setting cannot be used.
        RegistryError: A handler plug-in cannot be used.
    """
    registry = registry or default_registry()
    celery = _QuietCelery("genpulse", amqp=WorkerAMQP)
    celery.config_from_object("celeryconfig", force=True)
    if settings is not None:
        celery.conf.update(broker_url=broker_url(settings), result_backend=result_backend(settings))
    names = (*registry.queues(), queues.WEBHOOKS)
    celery.conf.task_queues = [celery_queue(name) for name in names]
    celery.conf.task_routes = {
        registry.task_name(found.task_type): {"queue": found.queue} for found in registry
    }
    for found in registry:
        _add_task_function(celery, registry.task_name(found.task_type), found.summary)
    _add_webhooks(celery)
    _connect_signals()
    return celery


def _add_task_function(celery: Celery, name: str, summary: str) -> None:
    def run(self: Any, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        return _run(self.request.id)

    run.__doc__ = summary
    run.__name__ = name.rpartition(".")[2].replace("-", "_")
    # Not shared: Celery would put it into every other application of this process as well.
    options: dict[str, Any] = {
        "bind": True,
        "shared": False,
        "name": name,
        "Request": f"{__name__}:GenPulseRequest",
    }
    celery.task(run, **options)


def _add_webhooks(celery: Celery) -> None:
    """The task that delivers webhooks. Its message names none: the ledger knows what is due."""

    def run() -> int:
        from genpulse.tasks.webhooks import deliver_due

        return deliver_due(shares=any(name != queues.WEBHOOKS for name in _served))

    options: dict[str, Any] = {"shared": False, "name": "genpulse.webhooks", "ignore_result": True}
    celery.task(run, **options)


def _run(message_id: str) -> dict[str, Any]:
    """
    The body of every task function. The message is only a hint: its id is the task's id.

    Raises:
        Ignore: There is nothing to do for this worker; whatever Redis says about the task stays.
    """
    task_id = _task_id(message_id)
    if task_id is None:
        log.warning("message_dropped", extra={"reason": "its id is no task id"})
        raise Ignore
    from genpulse.tasks.runner import run_message

    summary = run_message(task_id)
    if summary is None:
        raise Ignore
    return dict(summary)


def _task_id(text: Any) -> str | None:
    """The canonical form of a task's id, or ``None`` for anything else."""
    try:
        return str(uuid.UUID(text))
    except (ValueError, AttributeError, TypeError):
        return None


# -- The worker's start and stop -----------------------------------------------------------------


def refusal(settings: Settings) -> str | None:
    """Why a worker must not start with these settings; ``None`` if it may."""
    broker = urlsplit(settings.redis_url.get_secret_value())
    local = broker.scheme in {"unix", "redis+socket"} or is_loopback(broker.hostname or "localhost")
    if settings.uses_sqlite and not local:
        return (
            "GENPULSE_DATABASE_URL: this worker's ledger is a SQLite file on this host, but its broker "
            f"is on {broker.hostname}; workers that share a broker must share a ledger: use PostgreSQL"
        )
    return None


def node_name(queue_names: tuple[str, ...], pid: int, host: str) -> str:
    """
    A worker's name when ``-n`` gives none: ``genpulse-comfy-4711@host``.

    Celery's own default is the same for all workers of a host, and Flower, ``inspect`` and the
    ledger's leases would take two for one.
    """
    return f"genpulse-{'+'.join(queue_names)}-{pid}@{host}"


_node = f"celery@{socket.gethostname()}"
_served: tuple[str, ...] = ()


def _asked_queues(conf: Any, options: Any) -> tuple[str, ...]:
    """``-Q``, or every queue that a task type is routed to."""
    asked = options.get("queues")
    if isinstance(asked, str):
        asked = [name.strip() for name in asked.split(",") if name.strip()]
    return tuple(asked) if asked else tuple(queue.name for queue in conf.task_queues or ())


def _on_celeryd_init(instance: Any = None, conf: Any = None, options: Any = None, **_: Any) -> None:
    """Before the worker is set up: refuse, or say how many children, and under which name."""
    try:
        settings = Settings.from_env()
    except SettingsError as error:
        _stop(error)
    if reason := refusal(settings):
        _stop(reason)
    # What every child needs is imported once, before the first fork, and shared by all of them.
    from genpulse.tasks import board, drain, presence, render, runner  # noqa: F401 - only to be loaded

    # Before the first fork: the children see the same memory.
    drain.prepare_drain()
    board.prepare_board()
    if settings.metrics_port:
        metrics.prepare()
    _take_over_revoke()
    asked = _asked_queues(conf, options)
    servers = [server.name for server in settings.servers]
    if not options.get("concurrency"):
        conf.worker_concurrency = queues.slots(asked, servers, settings.worker_concurrency)
    if options.get("time_limit"):
        # Celery lets the setting win over its own option.
        for function in instance.app.tasks.values():
            function.time_limit = options["time_limit"]
    host = socket.gethostname()
    if instance.hostname == f"celery@{host}" and not _names_the_node(sys.argv):
        instance.hostname = node_name(asked, os.getpid(), host)
    global _node  # noqa: PLW0603 - the children inherit it: Celery's signal in them names no worker
    _node = instance.hostname


def _names_the_node(argv: list[str]) -> bool:
    """Whether the command line has Celery's ``-n`` or ``--hostname``."""
    return any(
        word == "--hostname"
        or word.startswith("--hostname=")
        or (word.startswith("-n") and word[:3] != "--n")
        for word in argv
    )


def _on_celeryd_after_setup(instance: Any = None, conf: Any = None, **_: Any) -> None:
    """After ``-Q`` was applied: add the queues of the servers this worker serves."""
    settings = Settings.from_env()
    consumed = instance.app.amqp.queues
    asked = tuple(consumed.consume_from)
    global _served  # noqa: PLW0603 - the children inherit it, as above
    _served = asked
    if not _gave_queues(instance):
        log.warning("serving_every_queue", extra={"reason": "no -Q was given", "queues": list(asked)})
    routed = {queue.name for queue in conf.task_queues or ()}
    for name in asked:
        if queues.base_queue(name) not in routed:
            log.warning("queue_without_task_type", extra={"queue": name})
    for name in queues.worker_queues(asked, [server.name for server in settings.servers]):
        if name not in asked:
            consumed.select_add(celery_queue(name))


def _gave_queues(instance: Any) -> bool:
    return instance.app.amqp.queues._consume_from is not None  # noqa: SLF001 - Celery keeps -Q nowhere else


def _on_setup_logging(loglevel: Any = None, **_: Any) -> None:
    """Ours instead of Celery's: all lines of a worker look the same."""
    settings = Settings.from_env()
    setup_logging(loglevel or settings.log_level, settings.log_format)


def _on_worker_ready(sender: Any = None, **_: Any) -> None:
    from genpulse.tasks import mirror, presence

    mirror.parent_notes().start()
    presence.start_in_worker(sender)


def _on_worker_process_init(sender: Any = None, **_: Any) -> None:
    from genpulse.tasks import mirror, runner

    mirror.forget_parent()
    runner.start_child(str(sender))


def _on_worker_process_shutdown(**_: Any) -> None:
    from genpulse.tasks import runner

    runner.stop_child()


def _on_worker_shutting_down(**_: Any) -> None:
    """SIGTERM, and again for a second one."""
    from genpulse.tasks import drain

    drain.begin_drain()


def _on_worker_shutdown(**_: Any) -> None:
    from genpulse.tasks import background, mirror

    mirror.parent_notes().stop()
    background.stop()


def _revoke(_state: Any, task_id: Any, **_: Any) -> dict[str, str]:
    """
    What Celery's remote control (Flower) calls revoke and terminate: here a cancel, and nothing else.

    Celery's own would note the id in every worker and swallow whatever comes with it later, and signal
    a child that the cancel ends anyway.
    """
    from genpulse.tasks import mirror

    asked = [task_id] if isinstance(task_id, str) else list(task_id or ())
    ids = [found for each in asked if (found := _task_id(each)) is not None]
    for each in ids:
        mirror.parent_notes().canceled(each)
    return {"ok": f"{len(ids)} task(s) are being canceled"}


def _take_over_revoke() -> None:
    from celery.worker.control import control_command

    register: Any = control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
    register(_revoke)


def _on_task_revoked(request: Any = None, **_: Any) -> None:
    """A task was revoked by another way, a stamped header for example: that is a cancel as well."""
    from genpulse.tasks import mirror

    task_id = getattr(request, "id", None)
    if task_id:
        mirror.parent_notes().canceled(str(task_id))


def _note_lost_child(task_id: str, node: str, pid: object) -> None:
    from genpulse.tasks import mirror

    mirror.parent_notes().lease_over(task_id, f"{node}:{pid}")


_RECEIVERS = (
    (signals.setup_logging, _on_setup_logging),
    (signals.celeryd_init, _on_celeryd_init),
    (signals.celeryd_after_setup, _on_celeryd_after_setup),
    (signals.worker_ready, _on_worker_ready),
    (signals.worker_process_init, _on_worker_process_init),
    (signals.worker_process_shutdown, _on_worker_process_shutdown),
    (signals.worker_shutting_down, _on_worker_shutting_down),
    (signals.worker_shutdown, _on_worker_shutdown),
    (signals.task_revoked, _on_task_revoked),
)


def _connect_signals() -> None:
    """Celery's signals belong to the process; connecting twice is the same as once."""
    for signal, receiver in _RECEIVERS:
        signal.connect(receiver, weak=False, dispatch_uid=f"genpulse{receiver.__name__}")


def _stop(reason: object) -> NoReturn:
    """
    End the process with one line.

    Not an exception: Celery's signals log those and go on, and its command line prints a traceback.
    """
    sys.stderr.write(f"genpulse: {reason}\n")
    raise SystemExit(EXIT_CONFIG)


_lock = threading.Lock()
_app: Celery | None = None


def __getattr__(name: str) -> Any:
    """``app``: the process's own application, built once (PEP 562)."""
    if name != "app":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    global _app  # noqa: PLW0603 - the lazy attribute's memory
    with _lock:
        if _app is None:
            try:
                _app = build_app()
            except (SettingsError, RegistryError) as error:
                _stop(error)
        return _app
