"""
A process that forks under load: ``python fork_load.py URL COUNT locked|unlocked PATIENCE_S``.

Its threads write to a SQLite ledger as a worker's main process does, under the fork lock or without
it, while the main thread forks children that use the ledger themselves. Every second child is killed
with -9 in the middle of its work. Prints how many children ended well, and ends with 0 if none got
stuck, with 3 if one found the database locked for ever.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger, fork_lock
from genpulse.model import NewTask

NEW = NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada")


def say(text: str) -> None:
    """To whoever started this."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def load(url: str, *, locked: bool, stopping: threading.Event) -> None:
    """What relay and sweeper do, again and again."""
    ledger = Ledger.connect(url)
    while not stopping.is_set():
        with fork_lock if locked else contextlib.nullcontext(), contextlib.suppress(LedgerUnavailable):
            task, _ = ledger.submit(NEW)
            ledger.put_back(ledger.take("comfy", 3, 2))
            ledger.cancel(task.id)
        time.sleep(0.001)


def child(url: str) -> None:
    """Use the ledger, then end without tidying up, as a pool's child does."""
    code = 3
    try:
        ledger = Ledger.connect(url)
        task, _ = ledger.submit(NEW)
        code = 0 if ledger.get(task.id) is not None else 4
    except LedgerUnavailable:
        code = 3
    finally:
        os._exit(code)


def main(url: str, count: int, *, locked: bool, patience_s: float) -> int:
    """Fork *count* children, one after the other."""
    stopping = threading.Event()
    threads = [
        threading.Thread(
            target=load, args=(url,), kwargs={"locked": locked, "stopping": stopping}, daemon=True
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    dice = random.Random(7)
    well = 0
    for number in range(count):
        time.sleep(dice.random() * 0.01)
        pid = os.fork()
        if not pid:
            child(url)
        if number % 2:
            time.sleep(dice.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
        ends = time.monotonic() + patience_s
        while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > ends:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                say(f"child {number} got stuck; {well} ended well")
                os._exit(3)
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(found[1])
        if code not in {0, -signal.SIGKILL}:
            say(f"child {number} ended with {code}; {well} ended well")
            os._exit(code)
        well += code == 0
    stopping.set()
    for thread in threads:
        thread.join(30)
    say(f"{well} ended well")
    return 0


if __name__ == "__main__":
    sys.exit(
        main(sys.argv[1], int(sys.argv[2]), locked=sys.argv[3] == "locked", patience_s=float(sys.argv[4]))
    )
