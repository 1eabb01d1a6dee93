"""
How fast things move again: each fault ten times, one at a time, on an otherwise idle cluster.

Measured as ``dev.py chaos`` measures it, by the simulators' own logs, and held against the same limits:
exits with 1 if the worst of a kind is above its limit, or a fault hit nothing. Broker and database
count from when they are back until every task that waited for them was claimed, everything else
from the fault.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._bench import show
from tests.chaos.evidence import Evidence, collect
from tests.chaos.lateness import Lateness
from tests.chaos.load import Clients
from tests.chaos.recovery import CANCEL, LIMITS, recoveries
from tests.chaos.schedule import Fault, Order
from tests.chaos.world import World
from tests.support import wait_until

FROZEN_S = 18.0
"""How long a frozen process stays so: past its lease, and until its prompt was adopted."""
ABSENT_S = 2.0
"""How long a service that was killed stays away."""
KINDS = {
    "child killed": (10.0, ABSENT_S),
    "worker killed": (10.0, ABSENT_S),
    "child frozen": (22.0, FROZEN_S),
    "worker frozen": (22.0, FROZEN_S),
    "comfy killed": (4.0, ABSENT_S),
    "sockets muted": (4.0, 1.5),
    CANCEL: (20.0, 0.0),
    "valkey killed": (3.0, ABSENT_S),
    "valkey wiped": (3.0, 0.0),
    "valkey refused": (3.0, ABSENT_S),
    "valkey silent": (3.0, ABSENT_S),
    "postgres killed": (4.0, ABSENT_S),
    "postgres crashed": (4.0, 0.0),
}
"""By kind: how long the task renders that it hits, and how long the fault lasts."""


class Rounds:
    """One fault after the other, each with a task to hit, on a cluster that does nothing else."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clients = Clients(world.url, "recovery", [])
        world.left_s = self.clients.left_s
        self._sent = 0
        self._waited: dict[str, list[tuple[float, list[str]]]] = {}
        """By kind: when broker or database was back, and the tasks that waited for it."""

    def send(self, seconds: float) -> str:
        """Send a task that renders so long; its id."""
        self._sent += 1
        order = Order(index=self._sent, at_s=0.0, seconds=seconds, color=self._sent)
        task_id = self.clients.send(order)
        assert task_id is not None, "the API took no task"
        return task_id

    def run(self, kind: str, number: int) -> None:
        """One round; returns when its tasks have ended and everything is there again."""
        renders_s, lasts_s = KINDS[kind]
        tasks = [self.send(renders_s)]
        wait_until(lambda: self._renders(tasks[0]), 60, message=f"the task for {kind!r} renders")
        if kind == CANCEL:
            self.clients.cancel(tasks[0])
        else:
            tasks += self._break(Fault(number, 0.0, kind, number, lasts_s))
        wait_until(lambda: all(map(self._is_final, tasks)), 90, every_s=0.1, message=f"the end of {kind!r}")
        wait_until(self._is_whole, 60, every_s=0.1, message="everything is there again")

    def _break(self, fault: Fault) -> list[str]:
        """Fire; further tasks that waited for what was broken, if tasks wait for it."""
        if not fault.kind.startswith(("valkey", "postgres")):
            self.world.fire(fault)
            return []
        waiting: list[str] = []
        with ThreadPoolExecutor() as threads:
            if fault.kind == "valkey wiped":
                with self._nobody_consumes():
                    waiting += [self.send(0.1) for _ in range(6)]
                    time.sleep(1.0)  # so that they are in Redis
                    shot = self.world.fire(fault)
            else:
                fired = threads.submit(self.world.fire, fault)
                time.sleep(fault.length_s / 2)
                waiting += threads.map(self.send, [0.1, 0.1])
                shot = fired.result()
        self._waited.setdefault(fault.kind, []).append((shot.over_at, waiting))
        return waiting

    @contextlib.contextmanager
    def _nobody_consumes(self) -> Iterator[None]:
        """Stop the workers' main processes for a moment: messages pile up in Redis."""
        pids = [worker.pid for worker in self.world.cluster.workers.values()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def times(self, kind: str, seen: Evidence) -> list[float]:
        """Seconds of every round of a kind that hit something."""
        if kind not in self._waited:
            found = recoveries(self.world, self.clients, seen)
            return [each.seconds for each in found if each.kind == kind]
        return [
            max(0.0, max(seen.tasks[each].attempts[0].started_at.timestamp() for each in waiting) - back_at)
            for back_at, waiting in self._waited[kind]
        ]

    def _renders(self, task_id: str) -> bool:
        prompts = {run.prompt_id for run in self.world.running() if run.task_id == task_id}
        started = (each for each in self.world.cluster.executions() if each["event"] == "started")
        return any(each["prompt_id"] in prompts for each in started)

    def _is_final(self, task_id: str) -> bool:
        task = self.world.ledger.get(task_id)
        return task is not None and task.status.is_final

    def _is_whole(self) -> bool:
        workers = self.world.ledger.workers(5.0)
        return sum(each.consuming for each in workers) == len(self.world.cluster.workers) and all(
            server["healthy"] for each in workers for server in each.servers
        )


def main() -> int:
    """Run it and print the table; the exit code."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="genpulse-recovery-") as folder:
        lateness = Lateness(Path(folder))
        world = World(Path(folder), options.database, stall_s=60)
        try:
            rounds = Rounds(world)
            # A sweeper reaps only after one lease of unbroken connection.
            time.sleep(world.cluster.settings.lease_s)
            for kind in options.kinds:
                for number in range(options.rounds):
                    rounds.run(kind, number)
                if kind.startswith("postgres"):
                    time.sleep(world.cluster.settings.lease_s)
                sys.stderr.write(f"{kind}: {options.rounds} times\n")
            seen = collect(world, rounds.clients)
            times = {kind: rounds.times(kind, seen) for kind in options.kinds}
        finally:
            world.close()
            lateness.close()
        late_s, usual_s, waiting = lateness.worst_s(), lateness.median_s(), lateness.waiting()
    show(
        f"recovery, {options.rounds} of each, {options.database}",
        ("", "rounds", "median s", "worst s", "limit s"),
        [_row(kind, seconds) for kind, seconds in times.items()],
        f"a sleep of 20 ms was late by {1000 * usual_s:.0f} ms (median of each second's worst), "
        f"{1000 * late_s:.0f} ms at worst; some process waited for a core {waiting:.0f} % of the time",
    )
    return _verdict(times, options.rounds, options.slack)


def _row(kind: str, seconds: Sequence[float]) -> tuple[str, ...]:
    figure: Callable[[float], str] = "{:.2f}".format
    median, worst = (figure(statistics.median(seconds)), figure(max(seconds))) if seconds else ("", "")
    return (kind, str(len(seconds)), median, worst, f"{LIMITS[kind]:g}")


def _verdict(times: dict[str, list[float]], rounds: int, slack: float) -> int:
    problems = [
        f"{kind}: {len(seconds)} of {rounds} faults hit something" if len(seconds) < rounds else
        f"{kind}: {max(seconds):.2f} s, the limit is {LIMITS[kind] * slack:g} s"
        for kind, seconds in times.items()
        if len(seconds) < rounds or max(seconds) > LIMITS[kind] * slack
    ]  # fmt: skip
    for problem in problems:
        sys.stderr.write(f"TOO LATE: {problem}\n")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--rounds", type=int, default=10, help="of each kind; default 10")
    parser.add_argument("--slack", type=float, default=1.0, help="multiply the limits, on a slow machine")
    parser.add_argument("--kinds", type=lambda text: text.split(","), metavar="A,B", help="only these")
    options = parser.parse_args()
    there = [kind for kind in KINDS if options.database == "postgresql" or not kind.startswith("postgres")]
    options.kinds = options.kinds or there
    if unknown := [kind for kind in options.kinds if kind not in there]:
        parser.error(f"no such kind: {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
