"""
What the benchmarks share: a server, a lean client straight into it, GenPulse in front of it.

The lean client is the least that gets a picture out of ComfyUI: one POST, one socket, one look at
the history, one download; no ids kept, nothing stored, nothing survived. It is the floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import requests
import websocket
from rich.console import Console
from rich.table import Table

from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.testing import services
from genpulse.testing.services import Postgres, Service
from tests.support.cluster import Cluster, Workflow, simple, sleeping

__all__ = ["Bench", "Counts", "Lean", "arguments", "bench", "figures", "show"]

console = Console(width=110)


class Lean:
    """The floor: a client without memory, straight into one ComfyUI."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = requests.Session()
        self.client_id = uuid.uuid4().hex
        address = f"ws{url.removeprefix('http')}/ws?clientId={self.client_id}"
        self.socket = websocket.create_connection(address, suppress_origin=True)
        self.socket.recv()

    def submit(self, workflow: Workflow) -> str:
        """``POST /prompt``; returns the prompt's id."""
        body = {"prompt": workflow, "client_id": self.client_id}
        answer = self.http.post(f"{self.url}/prompt", json=body, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["prompt_id"])

    def wait(self, prompt_id: str) -> None:
        """Read the socket until this prompt's very last message."""
        while True:
            message = self.socket.recv()
            if isinstance(message, str) and '"executing"' in message:
                data = json.loads(message)["data"]
                if data.get("node") is None and data.get("prompt_id") == prompt_id:
                    return

    def download(self, prompt_id: str) -> int:
        """Fetch every picture of a finished prompt; returns the bytes."""
        entry = self.http.get(f"{self.url}/history/{prompt_id}", timeout=60).json()[prompt_id]
        size = 0
        for node in entry["outputs"].values():
            for image in node.get("images", ()):
                size += len(self.http.get(f"{self.url}/view", params=image, timeout=60).content)
        return size


@dataclass(frozen=True)
class Counts:
    """What one task costs the database and the broker."""

    ledger: float
    redis: float


class Bench:
    """A running GenPulse, the server behind it, and the lean client beside it."""

    def __init__(self, cluster: Cluster, comfy_url: str, postgres: Postgres | None) -> None:
        self.cluster = cluster
        self.lean = Lean(comfy_url)
        self._postgres = postgres

    def genpulse_once(self, workflow: Workflow) -> int:
        """A task from POST to the downloaded bytes, by polling as a caller would."""
        task_id = self.cluster.submit(workflow)
        self.finish(task_id)
        return sum(
            len(self.cluster.output(task_id, output["index"]))
            for output in self.cluster.task(task_id)["outputs"]
        )

    def finish(self, task_id: str, every_s: float = 0.005) -> dict[str, Any]:
        """Poll until the task is final; raises if it did not complete."""
        while True:
            found = self.cluster.task(task_id)
            if found["completed_at"] is not None:
                if found["status"] != "completed":
                    msg = f"a task of the benchmark ended {found['status']}: {found['error']}"
                    raise RuntimeError(msg)
                return found
            time.sleep(every_s)

    def count(self, work: Callable[[], int]) -> Counts:
        """
        Ledger statements and Redis commands of each task of *work*, without what an idle system costs.

        Counted by the servers themselves; statements only on PostgreSQL.
        """
        time.sleep(1.0)
        began, before = time.monotonic(), self._totals()
        tasks = work()
        took, after = time.monotonic() - began, self._totals()
        time.sleep(max(took, 3.0))
        rest_began, rest_before = time.monotonic(), self._totals()
        time.sleep(max(took, 3.0))
        rest, rest_after = time.monotonic() - rest_began, self._totals()
        per_task = [
            max(0.0, (after[i] - before[i] - (rest_after[i] - rest_before[i]) * took / rest) / tasks)
            for i in range(2)
        ]
        return Counts(*per_task)

    def _totals(self) -> tuple[int, int]:
        assert self.cluster.valkey is not None
        client = redis.Redis.from_url(self.cluster.valkey.url)
        commands = int(client.info("stats")["total_commands_processed"])
        client.close()
        statements = 0
        if self._postgres is not None:
            statements = self._postgres.log.read_bytes().count(b"LOG:  statement: ")
        return statements, commands


@contextmanager
def bench(options: argparse.Namespace) -> Iterator[Bench]:
    """Start everything that a benchmark needs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genpulse-bench-")))
        postgres: Postgres | None = None
        if options.database == "postgresql":
            postgres = stack.enter_context(services.start_postgres(folder / "postgres"))
            url = postgres.url
        else:
            url = f"sqlite:///{folder / 'genpulse.db'}"
        ledger = Ledger.connect(Settings.build(database_url=url).ledger_url)
        ledger.migrate()
        ledger.close()
        cluster = stack.enter_context(Cluster(folder / "cluster", url, api_workers=2))
        comfy_url = options.comfy or cluster.start_simulator("sim").url
        if options.comfy:
            cluster.simulators["sim"] = _Elsewhere(comfy_url)  # type: ignore[assignment]  # only its url is used
        cluster.start_worker("bench", ["sim"])
        if postgres is not None:
            _log_statements(postgres)
        yield Bench(cluster, comfy_url, postgres)


@dataclass(frozen=True)
class _Elsewhere:
    """A server that was not started here."""

    url: str


def _log_statements(postgres: Postgres) -> None:
    import psycopg2

    connection = psycopg2.connect(postgres.url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("ALTER SYSTEM SET log_statement = 'all'")
        cursor.execute("SELECT pg_reload_conf()")
    connection.close()


def arguments(description: str | None, **defaults: int) -> argparse.Namespace:
    """The options of a benchmark; *defaults* are its own numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--comfy", metavar="URL", help="a ComfyUI to use instead of the simulator")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    return parser.parse_args()


def figures(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> None:
    """Print a table that reads as Markdown, too."""
    table = Table(title=title, box=None, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column != columns[0] else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note)
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


__all__ += ["Service", "simple", "sleeping"]
