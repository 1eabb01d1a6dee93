"""
How many may watch while others submit: POST /task with and without open event streams, in one run.

The watchers are one process with plain sockets. In the first case each watches a task of its own, and
some of these are at work, telling their progress four times a second as a worker does; in the second
all of them watch one task that is at work.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests

from benchmarks._bench import figures, show, simple
from benchmarks.ingest import storm
from genpulse import live as genpulse_live
from genpulse.config import Settings
from genpulse.ledger import Ledger, ProcessSession
from genpulse.live import Live
from genpulse.testing import services
from tests.support import wait_until
from tests.support.cluster import Cluster

PROGRESS_S = 0.25
BEGAN = time.monotonic()


def hold(address: tuple[str, int], task_ids: list[str], held: Any, events: Any, stop: Any) -> None:
    """Open a stream for each id, come back where one is refused, and count what is heard."""
    selector = selectors.DefaultSelector()

    def connect(task_id: str) -> None:
        connection = socket.create_connection(address)
        connection.sendall(
            f"GET /task/{task_id}/events HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n\r\n".encode()
        )
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, [task_id, False])

    for task_id in task_ids:
        connect(task_id)
    while not stop.is_set():
        for key, _ in selector.select(0.2):
            task_id, is_open = key.data
            piece = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]  # they are sockets
            if not is_open and piece.startswith(b"HTTP/1.1 200"):
                key.data[1] = True
                with held.get_lock():
                    held.value += 1
            elif not is_open or not piece:
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]  # the same
                connect(task_id)
                continue
            with events.get_lock():
                events.value += piece.count(b"event: progress")


@contextmanager
def watching(url: str, task_ids: list[str]) -> Iterator[Any]:
    """That many streams, open; yields the counter of the progress events that they heard."""
    context = multiprocessing.get_context("spawn")
    held, events, stop = context.Value("i", 0), context.Value("i", 0), context.Event()
    parts = urlsplit(url)
    watcher = context.Process(
        target=hold, args=((parts.hostname, parts.port), task_ids, held, events, stop), daemon=True
    )
    watcher.start()
    try:
        wait_until(lambda: held.value >= len(task_ids), 240, message=f"{len(task_ids)} streams are open")
        yield events
    finally:
        stop.set()
        watcher.join(10)


@contextmanager
def at_work(live: Live, task_ids: list[str]) -> Iterator[None]:
    """Tell the progress of these tasks."""
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(PROGRESS_S):
            step = int((time.monotonic() - BEGAN) * 10)  # an attempt's progress never falls
            for task_id in task_ids:
                detail = {"node_id": "3", "class_type": "KSampler", "step": step, "steps": 100_000}
                live.publish_progress(task_id, 1, step / 1000, detail)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    for name, value, what in (
        ("watchers", 500, "event streams"),
        ("running", 16, "of the watched tasks are at work"),
        ("clients", 4, "submit at once"),
        ("requests", 100, "submissions of each, in each round"),
        ("rounds", 3, "with and without watchers, in turn"),
        ("threads", 0, "of each API process; the default setting if 0"),
        ("places", 0, "for watchers in each API process; the default setting if 0"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default {value})")
    return parser.parse_args()


def main() -> None:
    """Run it and print the table."""
    given = options()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genpulse-bench-")))
        url = f"sqlite:///{folder / 'genpulse.db'}"
        if given.database == "postgresql":
            url = stack.enter_context(services.start_postgres(folder / "postgres")).url
        with contextlib.closing(Ledger.connect(Settings.build(database_url=url).ledger_url)) as ledger:
            ledger.migrate()
        env = {
            name: str(value)
            for name, value in (
                ("GENPULSE_API_THREADS", given.threads),
                ("GENPULSE_MAX_WATCHERS", given.places),
            )
            if value
        }
        cluster = stack.enter_context(
            Cluster(folder / "cluster", url, api_workers=2, env={"GENPULSE_MAX_QUEUED": "0", **env})
        )
        genpulse_live.TIMEOUT_S = (
            5.0  # on a crowded machine a worker would rather say nothing; this one tells all
        )
        live = Live(cluster.settings.redis_url.get_secret_value())
        task_ids = [cluster.submit(simple(number)) for number in range(given.watchers)]
        running = task_ids[: given.running]
        session = ProcessSession(cluster.ledger, None)
        session.hold()  # or the sweeper takes the tasks away from us
        for task_id in running:
            claim = cluster.ledger.claim(
                task_id,
                claim=secrets.token_hex(8),
                worker="bench:1",
                session_key=session.key,
                servers=[],
                lease_s=3600,
            )
            assert claim is not None
        measure(given, cluster, live, running, task_ids)


def measure(
    given: argparse.Namespace, cluster: Cluster, live: Live, running: list[str], task_ids: list[str]
) -> None:
    """Rounds without watchers, with each their own, and with all of them on one task, in turn."""
    taken: dict[str, list[float]] = {}
    heard: dict[str, list[float]] = {}
    memory: dict[str, int] = {}

    def post(session: requests.Session, number: int) -> None:
        body = {"task_type": "comfyui", "params": {"workflow": simple(30_000 + number)}}
        session.post(f"{cluster.url}/task", json=body, timeout=60).raise_for_status()

    def submit(name: str) -> None:
        taken.setdefault(name, []).extend(storm(given.clients, given.requests, post)[1])
        memory[name] = sum(
            process.memory_info().rss for process in psutil.Process(cluster.api.pid).children(recursive=True)
        )

    cases = {
        f"{given.watchers} watchers, {given.running} of their tasks at work": (running, task_ids),
        f"{given.watchers} watchers of one task": (running[:1], running[:1] * given.watchers),
    }
    submit("no watchers")  # the first requests of a process are slow
    taken.clear()
    for _ in range(given.rounds):
        submit("no watchers")
        for name, (working, watched) in cases.items():
            with at_work(live, working), watching(cluster.url, watched) as events:
                before, began = events.value, time.monotonic()
                submit(name)
                heard.setdefault(name, []).append((events.value - before) / (time.monotonic() - began))
    floor = figures(taken["no watchers"])[0]
    rows = []
    for name, seconds in taken.items():
        median, high = figures(seconds)
        rate = sum(heard.get(name, [0.0])) / len(heard.get(name, [0.0]))
        rows.append(
            (
                name,
                f"{1000 * median:.1f}",
                f"{1000 * high:.1f}",
                f"{1000 * max(seconds):.0f}",
                f"{median / floor:.2f}",
                f"{rate:.0f}",
                f"{memory[name] / 2**20:.0f}",
            )
        )
    show(
        f"POST /task by {given.clients} clients beside watchers, {len(taken['no watchers'])} each, {given.database}",
        ("", "median ms", "p95 ms", "max ms", "ratio", "events/s", "RSS MB"),
        rows,
        f"2 API processes of {cluster.settings.api_threads} threads, {cluster.settings.watcher_places} places each.",
    )


if __name__ == "__main__":
    main()
