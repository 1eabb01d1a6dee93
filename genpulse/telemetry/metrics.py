"""
Prometheus metrics: what there is to count, and how the processes of one program count together.

Each process of a program (gunicorn's, or a Celery worker's) counts into a memory-mapped file of the
program's own directory; whichever is scraped reads all of them. The files belong to *slots*: a process
takes the first slot that no living process holds and counts on from what it finds there. So counters
do not fall when a process is replaced, there are never more files than processes at a time, and the
gauges of a dead process are known by a slot that nobody holds.

Labels are few and bounded: task types, queues, servers, routes, outcomes. Never an id, never an owner.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple

import structlog

__all__ = [
    "CONTENT_TYPE",
    "METRICS",
    "Metric",
    "Sample",
    "bookmark",
    "prepare",
    "serve",
    "start",
    "text",
    "uptime_s",
]

log = structlog.get_logger("genpulse.metrics")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TASK_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14_400.0)

METRICS: dict[str, Metric] = {}
"""Every metric by its name, in the order of the documentation."""


@dataclass(frozen=True, slots=True)
class Metric:
    """
    One metric. Counting is nothing until :func:`start`, and never raises.

    ``source`` says who answers for it: ``fleet`` is read from the ledger, and the same wherever it is
    asked for; ``api`` and ``worker`` are counted by those processes and are to be summed.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    source: Literal["fleet", "api", "worker", "api, worker"] = "fleet"
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Join the table."""
        METRICS[self.name] = self

    def add(self, amount: float = 1.0, **labels: str) -> None:
        """Count, or raise and lower a gauge."""
        self._do("inc", amount, labels)

    def observe(self, value: float, **labels: str) -> None:
        """Put one value into a histogram."""
        self._do("observe", value, labels)

    def _do(self, verb: str, value: float, labels: dict[str, str]) -> None:
        # One process may be several programs' (in tests), and none counts what it does not show.
        if _made is None or (found := _made.get(self.name)) is None:
            return
        try:
            with _lock:
                getattr(found.labels(**labels) if labels else found, verb)(value)
        except (OSError, ValueError) as error:  # no space left for the file, or it is damaged
            log.warning("metric_not_counted", metric=self.name, error=str(error))


class Sample(NamedTuple):
    """What a metric of the fleet says at this moment."""

    metric: Metric
    value: float
    labels: Mapping[str, str] = {}


# -- The fleet, from the ledger -------------------------------------------------------------------

LEDGER_UP = Metric("genpulse_ledger_up", "gauge", "Whether the ledger answered this scrape.")
BROKER_UP = Metric("genpulse_broker_up", "gauge", "Whether the broker answers.")
QUEUE_TASKS = Metric(
    "genpulse_queue_tasks", "gauge", "Tasks that wait (`pending`) or run (`processing`).", ("queue", "status")
)
QUEUE_OLDEST = Metric(
    "genpulse_queue_oldest_seconds",
    "gauge",
    "Age of the oldest task that waits; 0 without any.",
    ("queue",),
)
QUEUE_SLOTS = Metric(
    "genpulse_queue_slots", "gauge", "Slots of the workers that take tasks of a queue now.", ("queue",)
)
WORKERS = Metric(
    "genpulse_workers", "gauge", "Workers that were seen lately, by whether they take tasks.", ("consuming",)
)
SERVER_UP = Metric(
    "genpulse_server_up", "gauge", "Whether a ComfyUI server is healthy for one of its workers.", ("server",)
)
SERVER_BUSY = Metric(
    "genpulse_server_busy",
    "gauge",
    "Whether a ComfyUI server has a prompt of ours that is not rendered yet; its mean over time is the busy share.",
    ("server",),
)
WEBHOOKS_DUE = Metric("genpulse_webhooks_due", "gauge", "Webhooks that should have been tried by now.")
WEBHOOKS_OLDEST = Metric(
    "genpulse_webhooks_oldest_seconds", "gauge", "For how long the oldest of them has been due."
)
TASKS_ENDED = Metric(
    "genpulse_tasks_ended_total",
    "counter",
    "Tasks that reached a final state; `error_code` is empty for completed ones.",
    ("task_type", "status", "error_code"),
)
QUEUE_SECONDS = Metric(
    "genpulse_task_queue_seconds",
    "histogram",
    "From the submission to the first attempt, of ended tasks.",
    ("task_type",),
    buckets=_TASK_S,
)
RUN_SECONDS = Metric(
    "genpulse_task_run_seconds",
    "histogram",
    "Rendering, of the attempt that ended the task.",
    ("task_type",),
    buckets=_TASK_S,
)
STORE_SECONDS = Metric(
    "genpulse_task_store_seconds",
    "histogram",
    "Storing the outputs, of the attempt that ended the task.",
    ("task_type",),
    buckets=_TASK_S,
)

# -- What a process does itself -------------------------------------------------------------------

HTTP_REQUESTS = Metric(
    "genpulse_http_requests_total",
    "counter",
    "HTTP requests by route template; `unmatched` where there is no such route.",
    ("method", "route", "status"),
    "api",
)
HTTP_SECONDS = Metric(
    "genpulse_http_request_seconds",
    "histogram",
    "Until the answer begins, so that event streams count as any other request.",
    ("method", "route"),
    "api",
    _LATENCY_S,
)
HTTP_IN_FLIGHT = Metric(
    "genpulse_http_requests_in_flight", "gauge", "Requests being worked on, open streams included.", (), "api"
)
TASKS_SUBMITTED = Metric(
    "genpulse_tasks_submitted_total", "counter", "Tasks that were recorded.", ("task_type",), "api"
)
MESSAGES_SENT = Metric(
    "genpulse_messages_sent_total", "counter", "Messages that relays gave to the broker.", (), "api, worker"
)
SWEPT = Metric(
    "genpulse_swept_total",
    "counter",
    "What sweepers set right: `reaped` leases, `sent_again` messages, `expired` tasks, `released` bindings.",
    ("work",),
    "api, worker",
)
ATTEMPTS = Metric(
    "genpulse_attempts_ended_total",
    "counter",
    "Attempts that ended in this worker; those of lost workers are among `genpulse_swept_total`.",
    ("task_type", "outcome"),
    "worker",
)
WEBHOOK_TRIES = Metric(
    "genpulse_webhook_tries_total",
    "counter",
    "Tries of webhooks; `pending` is one that will be tried again.",
    ("outcome",),
    "worker",
)


# -- Counting -------------------------------------------------------------------------------------

# Held while counting and across a fork: a child must not inherit a lock that nobody will release.
_lock = threading.Lock()
_made: dict[str, Any] | None = None
_directory: Path | None = None
_started_at = time.monotonic()
_PREFIX = "genpulse-metrics-"


def prepare() -> Path:
    """
    Make this start's directory. In the main process, before it forks; its children inherit it.

    It goes when the main process ends; one that was left by a killed program goes at the next start.
    """
    global _directory, _started_at  # inherited by the children
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of a name nobody knows there
    parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    _remove_dead(parent)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    # Held by this process and all its children, for as long as one of them lives.
    lock = (directory / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            lock.close()
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    _directory, _started_at = directory, time.monotonic()
    return directory


def _remove_dead(parent: Path) -> None:
    for old in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if old.is_symlink() or old.stat().st_uid != os.getuid():
                continue
            lock = old / "lock"
            # One without a lock is about to get it, unless it is old.
            if not (_is_free(lock) if lock.exists() else time.time() - old.stat().st_mtime > 60.0):
                continue
            shutil.rmtree(old, ignore_errors=True)


def start(*sources: Literal["fleet", "api", "worker"]) -> None:
    """
    Begin to count the metrics of these sources; doing it again is nothing.

    After :func:`prepare` this process counts together with its siblings, and otherwise by itself.
    """
    global _made  # noqa: PLW0603 - one per process
    with _lock:
        if _made is not None:
            return
        import prometheus_client
        from prometheus_client import values

        if _directory is not None:
            # The library looks for the directory there, and only there.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_directory)
            values.ValueClass = values.MultiProcessValue(_Slot(_directory))  # type: ignore[no-untyped-call]  # the library has no annotation here
        registry = prometheus_client.CollectorRegistry()
        made: dict[str, Any] = {"": registry}
        for metric in METRICS.values():
            if not {*metric.source.split(", ")} & {*sources}:
                continue
            words = (metric.name, metric.help, metric.labels)
            if metric.kind == "counter":
                made[metric.name] = prometheus_client.Counter(*words, registry=registry)
            elif metric.kind == "histogram":
                made[metric.name] = prometheus_client.Histogram(
                    *words, registry=registry, buckets=metric.buckets
                )
            elif metric.source != "fleet":
                made[metric.name] = prometheus_client.Gauge(
                    *words, registry=registry, multiprocess_mode="livesum"
                )
        _made = made


def uptime_s() -> float:
    """How long this program has been counting."""
    return time.monotonic() - _started_at


class _Slot:
    """
    The number under which this process counts; another one after a fork.

    A slot is held by a lock that ends with its process, however that ends.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pid = 0
        self._number = ""
        self._held: IO[str] | None = None

    def __call__(self) -> str:
        if self._pid != os.getpid():
            if self._held is not None:
                self._held.close()  # the parent's: it goes on holding it
            self._number, self._held = self._take()
            self._pid = os.getpid()
        return self._number

    def _take(self) -> tuple[str, IO[str]]:
        number = 0
        while True:
            file = (self._directory / f"slot-{number}").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                number += 1
            else:
                # What the last holder had in flight ended with it.
                for gauges in self._directory.glob(f"gauge_live*_{number}.db"):
                    gauges.unlink()
                return str(number), file


def _is_free(lock: Path) -> bool:
    """Whether no living process holds this lock file."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def text(samples: Iterable[Sample] = ()) -> bytes:
    """What all processes of this program counted, and *samples*, as Prometheus reads it."""
    from prometheus_client import generate_latest

    families = [*_counted(), *_families(samples)]

    class Collected:
        def collect(self) -> Iterator[Any]:
            yield from families

    return generate_latest(Collected())


def _counted() -> Iterable[Any]:
    if _made is None:
        return ()
    if _directory is None:
        return list(_made[""].collect())
    from prometheus_client.multiprocess import MultiProcessCollector

    files = [
        str(file)
        for file in sorted(_directory.glob("*.db"))
        if not file.name.startswith("gauge_live")
        or not _is_free(_directory / f"slot-{file.stem.rpartition('_')[2]}")
    ]
    return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]  # the library has no annotation here


def _families(samples: Iterable[Sample]) -> Iterable[Any]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    found: dict[str, GaugeMetricFamily] = {}
    for metric, value, labels in samples:
        family = found.setdefault(
            metric.name, GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        )
        family.add_metric([labels[name] for name in metric.labels], value)
    return found.values()


@contextlib.contextmanager
def bookmark() -> Iterator[Bookmark]:
    """
    How far the ledger's history was counted; one process at a time holds it.

    Read by the scrape that counts ended tasks, so that of many processes each task is counted by one.
    """
    if _directory is None:
        with _bookmark_lock:
            yield _bookmark
        return
    with (_directory / "bookmark").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = Bookmark(file.read())
        before = found.place
        try:
            yield found
        finally:
            if found.place != before:
                file.truncate(0)
                file.write(found.place)


@dataclass(slots=True)
class Bookmark:
    """A place, as text; empty at first."""

    place: str = ""


_bookmark = Bookmark()
_bookmark_lock = threading.Lock()


# -- The port of a worker -------------------------------------------------------------------------


def serve(host: str, port: int) -> int | None:
    """
    Answer ``GET /metrics`` in a thread of this process, without asking for a key.

    Returns:
        The port, or ``None`` if it cannot be had: a worker works without.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            known = self.path.partition("?")[0] == "/metrics"
            body = text() if known else b"not found\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", CONTENT_TYPE if known else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Scrapes are no news."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        log.warning("metrics_port_not_available", host=host, port=port, error=str(error))
        return None
    # A child that inherited the listening socket would keep the port when this process is gone.
    os.register_at_fork(after_in_child=server.socket.close)
    threading.Thread(target=server.serve_forever, name="genpulse-metrics", daemon=True).start()
    return int(server.server_address[1])


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
