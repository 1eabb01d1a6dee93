"""
A task type for these tests, installed into the workers as a plug-in: it sleeps, and writes down when.

``log`` gets a line ``start|end <task id> <attempt> <pid>`` for each attempt, past the ledger.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pydantic

from genpulse.tasks.registry import BaseHandler

if TYPE_CHECKING:
    from genpulse.model import NewOutput, Task
    from genpulse.tasks.runner import AttemptContext


class SleepParams(pydantic.BaseModel):
    """How long, and how."""

    log: str
    seconds: float = 0
    die: Literal["never", "first", "always"] = "never"
    """Kill the own process with -9 in the first attempt, or in each."""
    once: bool = False
    """Sleep in the first attempt only."""
    deaf: bool = False
    """Do not look whether the attempt should stop."""


class Sleeper(BaseHandler):
    """Sleeps on the queue ``comfy``."""

    task_type = "sleep"
    queue = "comfy"
    params_model = SleepParams
    summary = "Sleep."

    def execute(self, task: Task, context: AttemptContext) -> tuple[NewOutput, ...]:
        """Write, sleep, write, and store one small text."""
        params = SleepParams.model_validate(dict(task.params))
        attempt = context.claim.fence.attempt

        def note(word: str) -> None:
            with Path(params.log).open("a", encoding="utf-8") as log:
                log.write(f"{word} {task.id} {attempt} {os.getpid()}\n")

        note("start")
        if params.die == "always" or (params.die == "first" and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        ends = time.monotonic() + (0 if params.once and attempt > 1 else params.seconds)
        while time.monotonic() < ends:
            if not params.deaf:
                context.check()
            time.sleep(0.02)
        note("end")
        return (context.store(b"slept", name="slept.txt", node_id="1", content_type="text/plain"),)
