"""
How gunicorn serves the API: ``gunicorn -c python:genpulse.web.gunicorn_conf "genpulse.web:create_app()"``.

Threads, because requests wait for a database and never for a GPU; ours end with callers who are too slow
(:mod:`genpulse.web.pace`). The relay and the sweeper start
after the fork, in each worker: a thread of the parent that was inside SQLite while it forked would
leave the child locked for ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genpulse.config import Settings
from genpulse.tasks import background
from genpulse.telemetry import metrics, setup_logging, traces
from genpulse.web.callers import reason_not_to_listen

_settings = Settings.from_env()

bind = (
    f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
)
worker_class = "genpulse.web.pace.PacedThreads"
workers = _settings.api_workers
threads = _settings.api_threads
# Idle connections take no thread, but are counted here, and one beyond it is not accepted.
worker_connections = _settings.api_threads + 1000
preload_app = False
timeout = 60
graceful_timeout = 10
keepalive = 20
_memory = Path("/dev/shm")  # noqa: S108  # gunicorn makes an unnamed file there
if _memory.is_dir():
    # Heartbeats go to memory where there is some: a slow disk must not look like a hung worker.
    worker_tmp_dir = str(_memory)
loglevel = _settings.log_level.lower()
accesslog = None
# gunicorn's own lines go where all others go; see genpulse.telemetry.
logconfig_dict = {
    "root": {"level": "INFO", "handlers": []},
    "loggers": {
        name: {"level": level, "handlers": [], "propagate": True, "qualname": name}
        # The access log is genpulse.web.observe's: by route template, with ids, and without the query.
        for name, level in (("gunicorn.error", loglevel.upper()), ("gunicorn.access", "WARNING"))
    },
}
# Off: a socket of a fixed name in the home folder, which two servers would share.
control_socket_disable = True
forwarded_allow_ips = "127.0.0.1,::1"


def on_starting(_server: Any) -> None:
    """In the main process, before the first fork: the workers inherit the logging, or never start."""
    setup_logging(_settings.log_level, _settings.log_format)
    if reason := reason_not_to_listen(_settings):
        raise SystemExit(reason)
    metrics.prepare()


def post_worker_init(worker: Any) -> None:
    """In the forked worker, with its application loaded: start relay and sweeper, and let views wake them."""
    service = worker.wsgi.extensions["genpulse"]
    worker.genpulse_background = background.start_in_api(service.settings)
    service.wake = worker.genpulse_background.wake
    service.announce_cancel = worker.genpulse_background.announce_cancel
    # gunicorn calls no hook for SIGTERM; its own flag is what changes.
    service.is_stopping = lambda: not worker.alive


def worker_exit(_server: Any, worker: Any) -> None:
    """About to end: the threads must not be in the middle of a transaction."""
    if (app := getattr(worker, "wsgi", None)) is not None:  # there is none if it could not be loaded
        app.extensions["genpulse"].watchers.close()
    running = getattr(worker, "genpulse_background", None)
    if running is not None:
        running.stop()
    traces.stop()
