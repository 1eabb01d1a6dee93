"""
What a list and a scrape cost among very many tasks, and a batch beside as many single submissions.

The history is made by the ledger's own verbs in batches: half of it completed, a label that one in ten
has, one that one in ten thousand has, and a rare task type.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks._bench import figures, show, simple
from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.ledger import tables as t
from genpulse.model import NewTask, TaskStatus
from genpulse.telemetry import setup_logging
from genpulse.testing import services
from genpulse.web import create_app

OWNERS = ("default", "ada")


def fill(ledger: Ledger, tasks: int) -> None:
    """Record *tasks* tasks of two owners; every other one is completed at once."""
    for start in range(0, tasks, 1000):
        owner = OWNERS[start // 1000 % 2]
        ledger.submit_batch(
            [
                NewTask(
                    task_type="rare" if number % 10_000 == 6000 else "comfyui",
                    queue="comfy",
                    params={"workflow": {"1": "node"}, "inputs": {"seed": number}},
                    owner=owner,
                    metadata={
                        "project": f"p{number % 10}",
                        "order": str(number // 10_000) if number % 10_000 == 8000 else f"x{number}",
                    },
                )
                for number in range(start, min(start + 1000, tasks))
            ]
        )
        with ledger.engine.begin() as connection:
            # As a worker's verbs would leave it, but a thousand at a time.
            connection.execute(
                sa.update(t.tasks)
                .where(t.tasks.c.status == TaskStatus.PENDING, t.tasks.c.batch_index % 2 == 0)
                .values(status=TaskStatus.COMPLETED, completed_at=t.tasks.c.created_at, attempt=1, run_s=1.0)
            )


def timed(work: Callable[[], Any], times: int = 15) -> list[float]:
    """Seconds of each of *times* runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    """Run it and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--tasks", type=int, default=200_000, help="default 200000")
    options = parser.parse_args()
    setup_logging("WARNING", "console")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder / 'ledger.db'}"
        if options.database == "postgresql":
            url = stack.enter_context(services.start_postgres(folder / "postgres")).url
        settings = Settings.build(
            database_url=url,
            data_dir=folder,
            redis_url="redis://127.0.0.1:1/0",
            submit_rate="0",
            max_queued=0,
            max_queued_total=0,
        )
        ledger = Ledger.connect(settings.ledger_url, pool_size=2)
        stack.callback(ledger.close)
        ledger.migrate()
        fill(ledger, options.tasks)
        if ledger.is_postgresql:
            with ledger.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("ANALYZE"))
        lists(ledger, options)
        submissions(settings, options)
        scrapes(settings, options)


def lists(ledger: Ledger, options: argparse.Namespace) -> None:
    """One page of each kind."""
    middle = ledger.list_tasks("default", limit=1).tasks[0].created_at
    kinds: dict[str, dict[str, Any]] = {
        "newest first": {},
        "one status": {"statuses": [TaskStatus.COMPLETED]},
        "two statuses": {"statuses": [TaskStatus.COMPLETED, TaskStatus.PENDING]},
        "a label that 1 in 10 has": {"labels": {"project": "p3"}},
        "a label that 1 in 10,000 has": {"labels": {"order": "0"}},
        "both labels": {"labels": {"project": "p0", "order": "0"}},
        "a label and a status": {"labels": {"project": "p3"}, "statuses": [TaskStatus.PENDING]},
        "a status that none has": {"statuses": [TaskStatus.FAILED]},
        "a rare type (the bound is reached)": {"task_type": "rare"},
        "a type that none has (the bound)": {"task_type": "none"},
        "made before this minute": {"created_before": middle},
    }
    rows = []
    floor = 0.0
    for name, filters in kinds.items():
        page = ledger.list_tasks("default", **filters)
        median, high = figures(timed(functools.partial(ledger.list_tasks, "default", **filters)))
        floor = floor or median
        more = "yes" if page.next_id else "no"
        shown = f"{1000 * median:.1f}", f"{1000 * high:.1f}", f"{median / floor:.1f}"
        rows.append((name, str(len(page.tasks)), more, *shown))
    show(
        f"one page of 50 among {options.tasks:,} tasks, {options.database}",
        ("", "tasks", "more", "median ms", "p95 ms", "ratio"),
        rows,
    )


def submissions(settings: Settings, options: argparse.Namespace) -> None:
    """A thousand tasks, each way, in this process."""
    client = create_app(settings).test_client()
    body = {"task_type": "comfyui", "params": {"workflow": simple(1)}}
    place = next(
        f"inputs.{node}.{field}"
        for node, found in body["params"]["workflow"].items()  # type: ignore[index]  # it is one of dicts
        for field, value in found["inputs"].items()
        if isinstance(value, int)
    )

    def send(path: str, what: Any) -> None:
        answer = client.post(path, json=what)
        if answer.status_code != 202:
            raise RuntimeError(answer.text)

    single, _ = figures(timed(lambda: send("/task", body), 50))
    grid, grid_high = figures(
        timed(lambda: send("/task/batch", {"template": body, "grid": {place: list(range(1000))}}), 5)
    )
    tasks, tasks_high = figures(timed(lambda: send("/task/batch", {"tasks": [body] * 1000}), 5))
    show(
        f"1,000 tasks in one request, {options.database}",
        ("", "median s", "p95 s", "ratio"),
        [
            ("1,000 × POST /task", f"{1000 * single:.2f}", "", "1.00"),
            ("a grid", f"{grid:.2f}", f"{grid_high:.2f}", f"{grid / (1000 * single):.2f}"),
            ("tasks one by one", f"{tasks:.2f}", f"{tasks_high:.2f}", f"{tasks / (1000 * single):.2f}"),
        ],
    )


def scrapes(settings: Settings, options: argparse.Namespace) -> None:
    """``GET /metrics`` with half of the history waiting, beside reading one task."""
    client = create_app(settings).test_client()
    task_id = client.get("/task?limit=1").get_json()["tasks"][0]["task_id"]

    def read(path: str) -> None:
        answer = client.get(path)
        if answer.status_code != 200:
            raise RuntimeError(answer.text)

    one, one_high = figures(timed(lambda: read(f"/task/{task_id}"), 50))
    read("/metrics")  # the first one counts what ended meanwhile
    scrape, high = figures(timed(lambda: read("/metrics")))
    show(
        f"one request among {options.tasks:,} tasks, {options.database}",
        ("", "median ms", "p95 ms", "ratio"),
        [
            ("GET /task/{id}", f"{1000 * one:.1f}", f"{1000 * one_high:.1f}", "1.0"),
            ("GET /metrics", f"{1000 * scrape:.1f}", f"{1000 * high:.1f}", f"{scrape / one:.1f}"),
        ],
    )


if __name__ == "__main__":
    main()
