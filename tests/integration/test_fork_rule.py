"""
The fork rule: a thread that is inside SQLite while its process forks leaves the child locked out.

SQLite keeps the locks of a process in its memory, and the child inherits that memory but not the
locks. A worker's main process writes to the ledger in threads and forks whenever a child ends, so
these threads work under :data:`genpulse.ledger.fork_lock`, which a fork waits for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from genpulse.config import Settings
from genpulse.ledger import fork_lock
from genpulse.tasks.background import Background
from tests.support.ledger import claim, open_ledger, submit

# Python 3.12 and newer warn of what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

PROGRAM = Path(__file__).parents[1] / "support" / "fork_load.py"


def forks(url: str, count: int, how: str, patience_s: float) -> subprocess.CompletedProcess[str]:
    """Run the program; see :mod:`tests.support.fork_load`."""
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", PROGRAM, url, str(count), how, str(patience_s)],
        capture_output=True,
        text=True,
        timeout=170,
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_hundred_children_under_load_are_never_locked_out(sqlite_ledger_url: str) -> None:
    """Half of them are killed with -9 in the middle of a write; parent and children go on."""
    ended = forks(sqlite_ledger_url, 200, "locked", 29.0)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = re.search(r"(\d+) ended well", ended.stdout)
    assert found is not None
    assert int(found[1]) >= 100
    with open_ledger(sqlite_ledger_url) as ledger:
        assert claim(ledger, submit(ledger)).fence.attempt == 1


@pytest.mark.timeout(120)
def test_without_the_lock_a_child_is_locked_out(sqlite_ledger_url: str) -> None:
    """So the test above shows what it says it shows."""
    ended = forks(sqlite_ledger_url, 1000, "unlocked", 6.0)

    assert ended.returncode == 3, ended.stdout + ended.stderr


def test_a_fork_waits_for_the_work_under_the_lock_and_the_child_has_a_fresh_one() -> None:
    """Nobody is inside a library when the memory is copied."""
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with fork_lock:
            inside.set()
            time.sleep(0.3)
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(5)
    pid = os.fork()
    if not pid:
        with fork_lock:
            os._exit(0 if done.is_set() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.join()
    with fork_lock:
        pass


def test_relay_and_sweeper_of_a_process_that_forks_work_under_the_lock(
    sqlite_ledger_url: str, valkey_url: str
) -> None:
    """A worker's main process forks whenever a child ends, and its threads are never in a library then."""
    settings = Settings.build(database_url=sqlite_ledger_url, redis_url=valkey_url)
    background = Background(settings, forks=True)
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with background.quiet():
            inside.set()
            time.sleep(0.3)
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(5)
    pid = os.fork()
    if not pid:
        os._exit(0 if done.is_set() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.join()
    background.stop()
