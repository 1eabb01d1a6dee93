"""``genpulse start-all`` and ``demo`` as processes, for tests that look at them from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

__all__ = ["StackProcess"]

START_S = 120.0
"""How long a start may take on a machine that does other things besides."""


class StackProcess:
    """One ``genpulse start-all`` (or ``demo``) with its own data folder; a context manager."""

    def __init__(self, folder: Path, *arguments: str, command: str = "start-all") -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log = folder / f"{command}.log"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("GENPULSE_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "genpulse", command, *arguments],
                cwd=folder, env=environ | {"COLUMNS": "200"}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.descendants()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self.survivors(30)

    def said(self) -> str:
        """Everything it printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait until it printed something that fits *pattern*."""
        ends = time.monotonic() + timeout_s
        while True:
            if found := re.search(pattern, self.said()):
                return found
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < ends, f"never said {pattern!r}:\n{self.said()}"
            time.sleep(0.05)

    def wait_up(self) -> str:
        """Wait until everything was started; the API's URL."""
        return self.wait_for(r"API (http://\S+?), its page")[1]

    def end(self, number: signal.Signals, timeout_s: float = 40) -> int:
        """Signal it and wait for its end; its exit code."""
        self.descendants()
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def descendants(self) -> list[psutil.Process]:
        """The processes below it, now; all that were ever seen here are remembered."""
        try:
            found: Sequence[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self._seen |= {process.pid: process for process in found}
        return list(found)

    def survivors(self, timeout_s: float) -> list[str]:
        """Command lines of what is left of everything seen, after at most *timeout_s*."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=timeout_s)
        lines = []
        for process in alive:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    lines.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return lines

    def part(self, text: str) -> psutil.Process:
        """The first process of it, closest to the root, whose command line contains *text*."""
        for process in self.descendants():
            try:
                line = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if text in line and "watchdog.py" not in line:
                return process
        raise AssertionError(f"no process {text!r}")
