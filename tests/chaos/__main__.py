"""
Kill and break things while tasks run, then prove that nothing was lost and nothing done twice.

``python -m tests.chaos --seed N --minutes M --tasks K`` starts PostgreSQL, a broker, the API, three
simulated ComfyUI servers and three workers, sends tasks over HTTP from several clients, and breaks
one thing after the other as the seed says. When everything has come to rest it compares the
simulators' own logs and the stored bytes with what was promised. Exits with 1 on any violation.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from tests.chaos import verify
from tests.chaos.load import Clients
from tests.chaos.schedule import Fault, plan_faults, plan_orders
from tests.chaos.world import World

REST_S = 180.0
"""How long everything may take to come to rest after the last fault."""


def main() -> int:
    """Run it; the exit code."""
    options = _options()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    directory = Path(tempfile.mkdtemp(prefix="genpulse-chaos-")) if options.keep is None else options.keep
    say(
        f"seed {seed}, {options.minutes:g} min, {options.tasks} tasks, {options.database}; logs in {directory}"
    )
    began = time.monotonic()
    world = World(directory, options.database)
    try:
        ok = _run(world, seed, options.minutes * 60, options.tasks)
    finally:
        world.close()
    say(f"{'PASSED' if ok else 'FAILED'} with seed {seed} after {time.monotonic() - began:.0f} s")
    if ok and options.keep is None:
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if ok else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chaos", description="Break things, then prove that nothing was lost."
    )
    parser.add_argument("--seed", type=int, help="the same seed breaks the same things (default: random)")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long tasks and faults go on")
    parser.add_argument("--tasks", type=int, default=150)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and logs here")
    return parser.parse_args()


def _run(world: World, seed: int, length_s: float, tasks: int) -> bool:
    lease_s = world.cluster.settings.lease_s
    faults = plan_faults(seed, length_s, postgresql=world.postgres is not None, lease_s=lease_s)
    clients = Clients(world.cluster.url, f"chaos-{seed}", plan_orders(seed, length_s, tasks))
    watcher = verify.Watcher(world)
    watcher.start()
    clients.start()
    _fire_all(world, faults)
    clients.join()
    say("everything sent and fired; waiting for rest")
    world.mend()
    began = time.monotonic()
    if verify.rest(world, REST_S):
        say(f"at rest after {time.monotonic() - began:.1f} s")
    watcher.stop()
    seen = verify.collect(world)
    violations = verify.verify(world, clients, watcher, seen)
    say("\n" + verify.table(world, clients, seen) + "\n")
    say(verify.summary(world, clients, seen))
    (world.cluster.directory / "histories.txt").write_text(verify.histories(world, seen))
    for violation in violations:
        say(f"VIOLATION: {violation.text}")
        if violation.task_id is not None:
            say(verify.history(seen, violation.task_id))
    return not violations


def _fire_all(world: World, faults: list[Fault]) -> None:
    """Each fault at its time in a thread of its own: some last longer than the pause to the next."""
    began = time.monotonic()
    threads: list[threading.Thread] = []

    def fire(fault: Fault) -> None:
        try:
            world.fire(fault)
        except Exception:  # noqa: BLE001 - a fault that cannot be made is a fault of this program
            traceback.print_exc()
            world.complaints.append(f"fault {fault.number} ({fault.kind}) could not be made")

    for fault in faults:
        time.sleep(max(0.0, began + fault.at_s - time.monotonic()))
        say(
            f"{fault.at_s:7.1f} s  #{fault.number} {fault.kind} (target {fault.target}, {fault.length_s:g} s)"
        )
        threads.append(threading.Thread(target=fire, args=(fault,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()


def say(text: str) -> None:
    """One line for the person who watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
