"""
Kill and break things while tasks run, then prove that nothing was lost and nothing done twice.

``python -m tests.chaos --seed N --minutes M --tasks K`` starts a database, a broker, the API, a sweeper,
four simulated ComfyUI servers and three workers, sends tasks over HTTP from several clients, and breaks
one thing after the other as the seed says. When everything has come to rest it compares the
simulators' own logs and the stored bytes with what was promised. Exits with 1 on any violation.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import sqlalchemy as sa

from genpulse.ledger import tables as t
from tests.chaos import report
from tests.chaos.evidence import Watcher, collect, rest
from tests.chaos.lateness import Lateness
from tests.chaos.load import Clients
from tests.chaos.recovery import recoveries
from tests.chaos.report import Facts
from tests.chaos.schedule import KINDS, Fault, plan_faults, plan_orders, stall_limit_s
from tests.chaos.verify import Violation, clock, verify
from tests.chaos.world import World

REST_S = 120.0
"""How long everything may take to come to rest after the last fault."""
PROGRESS_S = 30.0


def main() -> int:
    """Run it; the exit code."""
    options = _options()
    if options.seed is None:
        options.seed = random.randrange(10**6)
    directory = Path(tempfile.mkdtemp(prefix="genpulse-chaos-")) if options.keep is None else options.keep
    say(
        f"seed {options.seed}, {options.minutes:g} min, {options.tasks} tasks, {options.database}; logs in {directory}"
    )
    began = time.monotonic()
    lateness = Lateness(directory)
    world = World(directory, options.database, stall_s=stall_limit_s(options.minutes * 60))
    try:
        ok = _run(world, lateness, options)
    finally:
        world.close()
        lateness.close()
    say(f"{'PASSED' if ok else 'FAILED'} with seed {options.seed} after {time.monotonic() - began:.0f} s")
    if ok and options.keep is None:
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if ok else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chaos",
        description="Break things, then prove that nothing was lost.",
        epilog="kinds of faults: " + "; ".join(f"{kind} ({what})" for kind, what in KINDS.items()),
    )
    parser.add_argument("--seed", type=int, help="the same seed breaks the same things (default: random)")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long tasks and faults go on")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and logs here")
    parser.add_argument(
        "--kinds", type=_kinds, default=tuple(KINDS), metavar="A,B", help="only these kinds of faults"
    )
    parser.add_argument(
        "--slack", type=float, default=1.0, help="multiply the limits of recovery, on a slow or busy machine"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table as Markdown")
    return parser.parse_args()


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(kind.strip() for kind in text.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        msg = f"no such kind of fault: {', '.join(unknown)}"
        raise argparse.ArgumentTypeError(msg)
    return kinds


def _run(world: World, lateness: Lateness, options: argparse.Namespace) -> bool:
    length_s, lease_s = options.minutes * 60, world.cluster.settings.lease_s
    faults = plan_faults(
        options.seed,
        length_s,
        postgresql=world.postgres is not None,
        lease_s=lease_s,
        kinds=options.kinds,
    )
    orders = plan_orders(options.seed, length_s, options.tasks, faults, lease_s=lease_s)
    clients = Clients(world.url, f"chaos-{options.seed}", orders)
    world.left_s, world.feed = clients.left_s, clients.feed
    watcher = Watcher(world)
    watcher.start()
    clients.start()
    done = threading.Event()
    threading.Thread(target=_tell, args=(world, clients, done), daemon=True).start()
    _fire_all(world, faults)
    clients.join()
    say("everything sent and fired; waiting for rest")
    world.mend()
    began = time.monotonic()
    if rest(world, REST_S):
        say(f"at rest after {time.monotonic() - began:.1f} s")
    done.set()
    watcher.stop()
    seen = collect(world, clients)
    facts = Facts(world, clients, seen, recoveries(world, clients, seen), lateness)
    violations = [*verify(world, clients, watcher, seen), *_late(facts, options.slack)]
    say("\n" + report.as_text(report.table(facts)) + "\n")
    say("\n".join(report.summary(facts)))
    (world.cluster.directory / "histories.txt").write_text(report.histories(facts))
    if options.report is not None:
        command = shlex.join(["python3", "dev.py", "chaos", *_repeatable(options)])
        verdict = f"ended with {len(violations)} violations." if violations else "passed: no violation."
        options.report.write_text(report.markdown(facts, command, verdict))
    for violation in violations:
        say(f"VIOLATION: {violation.text}")
        if violation.task_id is not None:
            say(report.history(seen, violation.task_id))
    return not violations


def _late(facts: Facts, slack: float) -> list[Violation]:
    """Recoveries that took longer than their limits, with how late the machine itself was meanwhile."""
    return [
        Violation(
            f"{each.kind} at {clock(each.since)}: {each.seconds:.1f} s until things moved again, "
            f"{each.seconds / (each.limit_s or 1):.1f} times the limit of {each.limit_s:g} s "
            f"(slack {slack:g}, other faults meanwhile {each.others_s:.1f} s; a sleep of 20 ms was up to "
            f"{facts.lateness.worst_s(each.since, each.since + each.seconds):.2f} s late, and some process waited "
            f"for a core {facts.lateness.waiting(each.since, each.since + each.seconds):.0f} % of the time)",
            each.task_id,
        )
        for each in facts.found
        if each.is_late(slack)
    ]


def _repeatable(options: argparse.Namespace) -> list[str]:
    words = ["--seed", str(options.seed), "--minutes", f"{options.minutes:g}", "--tasks", str(options.tasks)]
    words += ["--database", options.database] if options.database != "postgresql" else []
    words += ["--kinds", ",".join(options.kinds)] if options.kinds != tuple(KINDS) else []
    return words + (["--slack", f"{options.slack:g}"] if options.slack != 1 else [])


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


def _tell(world: World, clients: Clients, done: threading.Event) -> None:
    """A line of progress now and then."""
    began = time.monotonic()
    query = sa.select(t.tasks.c.status, sa.func.count()).group_by(t.tasks.c.status)
    while not done.wait(PROGRESS_S):
        try:
            with world.ledger.engine.connect() as connection:
                states = Counter({str(status): number for status, number in connection.execute(query)})
        except sa.exc.SQLAlchemyError:
            states = Counter()
        counts = ", ".join(f"{name} {number}" for name, number in sorted(states.items())) or "ledger away"
        hits = sum(bool(shot.hits) for shot in world.shots)
        say(
            f"{time.monotonic() - began:7.0f} s  accepted {len(clients.accepted)}: {counts}; "
            f"faults over {len(world.shots)}, {hits} of them hit something"
        )


def say(text: str) -> None:
    """One line for the person who watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
