"""
Stands between an owner and one child process, so that the child never outlives its owner.

Run as a script by :mod:`genpulse.testing.services`, with the standard library only and without
importing GenPulse, so that it is up in a few milliseconds. It promises:

- End of file on stdin means that the owner is gone (it may have been killed with -9) or asks for a
  stop. The child gets its stop signal; it knows best how to end its own children, and a Celery pool
  process would drop its task on a stop signal of its own. Whatever is left when the child has ended
  gets SIGTERM, and what is left of it all after the grace SIGKILL.
- "What is left" is the child's process group, and on Linux every descendant in whatever session,
  because orphans come to the watchdog as their subreaper. It ends only when all of them have.
- A child that ends by itself is reported at once; its own children are left alone until the end of
  file, because a test that kills a parent wants to see what its children do.
- On Linux the child gets SIGKILL if the watchdog itself is killed.

Arguments: one JSON object with ``command``, ``stop_signal``, ``grace_s``, ``uid``, ``gid`` (null: not
changed) and ``remove`` (folders to delete at the end unless the owner wrote ``k``, keep, before).
Stdout carries ``pid N`` and ``exit N`` lines for the owner; stderr is the child's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LEFTOVERS_S = 2.0
"""How long what a child left behind has between SIGTERM and SIGKILL."""


def prctl(option: int, value: int) -> None:
    """Linux's ``prctl(2)``; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def spawn(spec: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the child in a session of its own; it dies with us even if we are killed."""
    watchdog = os.getpid()

    def die_with_the_watchdog() -> None:
        # Runs after the change of user, which would clear the setting.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != watchdog:
            os._exit(1)

    who: dict[str, Any] = {}
    if spec["uid"] is not None:
        who = {"user": spec["uid"], "group": spec["gid"], "extra_groups": []}
    return subprocess.Popen(
        spec["command"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,
        preexec_fn=die_with_the_watchdog,  # noqa: PLW1509 - no thread was started yet
        **who,
    )


def report(line: str) -> None:
    """Tell the owner, if there still is one."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode() + b"\n")


def orphans() -> list[int]:
    """Pids whose parent we are; without ``/proc`` none."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):  # noqa: PTH208 - the names are all that is wanted
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - no pathlib here
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if int(parent) == os.getpid() and state != b"Z":
                    found.append(int(name))
    return found


def signal_all(group: int, number: int) -> None:
    """Signal the child's process group and every descendant that came to us."""
    with contextlib.suppress(OSError):
        os.killpg(group, number)
    for pid in orphans():
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def anything_left(group: int) -> bool:
    """Whether the group or any descendant lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return bool(orphans())
    except PermissionError:
        return True
    return True


class Watch:
    """The state of one watch: is the owner there, and how did the child end."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.exit_code: int | None = None
        self.owner_gone = False
        self.keep = False
        self._wake, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def on_term(self, *_: object) -> None:
        """SIGTERM to the watchdog means the same as end of file."""
        self.owner_gone = True

    def reap(self) -> None:
        """Collect whatever ended; report the child itself."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.child.pid:
                    self.exit_code = self.child.returncode = os.waitstatus_to_exitcode(status)
                    report(f"exit {self.exit_code}")

    def wait(self, timeout_s: float) -> None:
        """Sleep until the owner speaks or goes, a process ends, or the time is over."""
        inputs = [self._wake] if self.owner_gone else [0, self._wake]
        with contextlib.suppress(InterruptedError):
            ready, _, _ = select.select(inputs, [], [], timeout_s)
            if self._wake in ready:
                os.read(self._wake, 4096)
            if 0 in ready:
                said = os.read(0, 4096)
                self.keep = self.keep or b"k" in said
                self.owner_gone = not said
        self.reap()

    def stop(self, stop_signal: int, grace_s: float) -> None:
        """Signal the child, then what it left behind, then kill."""
        group = self.child.pid
        ends = time.monotonic() + grace_s
        if self.exit_code is None:
            with contextlib.suppress(OSError):
                os.kill(group, stop_signal)  # not send_signal(), which would collect the exit code
            signal_all(group, signal.SIGCONT)  # a frozen child could not obey
        while self.exit_code is None and time.monotonic() < ends:
            self.wait(0.2)
        if self.exit_code is not None and anything_left(group):
            signal_all(group, signal.SIGTERM)
            signal_all(group, signal.SIGCONT)
            ends = time.monotonic() + LEFTOVERS_S
            while anything_left(group) and time.monotonic() < ends:
                self.wait(0.05)
        while anything_left(group) or self.exit_code is None:
            signal_all(group, signal.SIGKILL)
            self.wait(0.02)


def main() -> int:
    """Watch one child until it and all of its descendants are gone."""
    spec = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = spawn(spec)
    except OSError as error:
        report("exit 127")
        sys.stderr.write(f"cannot start {spec['command'][0]}: {error}\n")
        return 127
    report(f"pid {child.pid}")
    watch = Watch(child)
    signal.signal(signal.SIGTERM, watch.on_term)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    watch.reap()
    while not watch.owner_gone:
        if watch.exit_code is not None and not anything_left(child.pid):
            break
        watch.wait(5.0 if watch.exit_code is None else 0.2)
    watch.stop(spec["stop_signal"], spec["grace_s"])
    if not watch.keep and watch.owner_gone:
        for folder in spec["remove"]:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
