"""
A whole GenPulse on this machine for tests: real processes, the real command lines, real sockets.

Every process can be killed, frozen and started again. What a GPU host runs is
``celery -A genpulse worker -Q comfy``, and so is it here.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import psutil
import requests

from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.testing import services
from genpulse.testing.services import Service, answers_http, free_port
from tests.support import wait_until

__all__ = ["Cluster", "save_image", "simple", "sleeping"]

Workflow = dict[str, dict[str, Any]]


def simple(color: int = 255, *, size: int = 64, batch: int = 1, prefix: str = "test") -> Workflow:
    """A picture of one colour, as the recorded ``simple.json`` makes it."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": size, "height": size, "batch_size": batch, "color": color},
        },
        "2": save_image("1", prefix),
    }


def sleeping(seconds: float, color: int = 255, *, size: int = 64) -> Workflow:
    """The same, rendered for *seconds* (the simulator's own node)."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": size, "height": size, "batch_size": 1, "color": color},
        },
        "2": {"class_type": "SimSleep", "inputs": {"image": ["1", 0], "seconds": seconds, "seed": color}},
        "3": save_image("2"),
    }


def save_image(source: str, prefix: str = "test") -> dict[str, Any]:
    """A node that saves the pictures of node *source*."""
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix}}


class Cluster:
    """
    Valkey, a ledger and the API; simulators and workers as a test adds them.

    Args:
        directory: Data, logs and working directory of everything.
        database_url: A migrated ledger.
        env: Further ``GENPULSE_…`` variables for every process.
        redis_url: Use this broker (through a proxy, say) instead of one of its own.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str,
        *,
        env: Mapping[str, str] | None = None,
        redis_url: str | None = None,
        api_workers: int = 1,
    ) -> None:
        self.directory = directory
        self.database_url = database_url
        self.stack = ExitStack()
        self.simulators: dict[str, Service] = {}
        self.workers: dict[str, Service] = {}
        self._numbered = 0
        directory.mkdir(parents=True, exist_ok=True)
        self.valkey: Service | None = None
        if redis_url is None:
            self.valkey = self.stack.enter_context(
                services.start_valkey(directory / "valkey", append_only=True)
            )
            redis_url = self.valkey.url
        self.env = {
            "GENPULSE_DATA_DIR": str(directory / "data"),
            "GENPULSE_DATABASE_URL": database_url,
            "GENPULSE_REDIS_URL": redis_url,
            "GENPULSE_API_WORKERS": str(api_workers),
            **(env or {}),
        }
        self.settings = Settings.from_env(self.env)
        self.ledger = Ledger.connect(self.settings.ledger_url)
        self.stack.callback(self.ledger.close)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.api = self._start(
            "api",
            ["-m", "genpulse", "start-api"],
            {"GENPULSE_PORT": str(port)},
            url=self.url,
            probe=answers_http(f"{self.url}/health"),
            ready_s=90.0,
        )
        self.started_at = time.monotonic()
        self.http = requests.Session()
        self.stack.callback(self.http.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()

    # -- processes ----------------------------------------------------------------------------

    def _start(
        self, name: str, args: Sequence[str], env: Mapping[str, str | None], **options: Any
    ) -> Service:
        return self.stack.enter_context(
            services.start_python(
                args,
                self.directory / name,
                name=name,
                env={**self.env, **env, "PYTHONPATH": str(Path(__file__).parents[2])},
                **options,
            )
        )

    def start_simulator(self, name: str, *extra: str) -> Service:
        """Start a simulated ComfyUI under a fleet-wide name."""
        server = self.stack.enter_context(
            services.start_simulator(self.directory / name, name=name, extra=("--name", name, *extra))
        )
        self.simulators[name] = server
        return server

    def start_worker(
        self,
        name: str,
        servers: Sequence[str] = (),
        *,
        queues: str = "comfy",
        concurrency: int | None = None,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
        urls: Mapping[str, str] | None = None,
    ) -> Service:
        """
        Start ``celery -A genpulse worker`` serving the named simulators.

        Args:
            urls: Where this worker finds a server, by name, if not at its own address (a proxy's, say).
        """
        name = f"w{self._numbered}-{name}"  # a node's name is never used twice: its row would look alive
        self._numbered += 1
        found = {each: self.simulators[each].url for each in servers} | dict(urls or {})
        args = ["-m", "celery", "-A", "genpulse", "worker", "-Q", queues, "-n", f"{name}@test", "-l", "INFO"]
        if concurrency is not None:
            args += ["-c", str(concurrency)]
        worker = self._start(
            name,
            args,
            {"GENPULSE_COMFY_URLS": ",".join(map("=".join, found.items())), **(env or {})},
            grace_s=20.0,
        )
        self.workers[name] = worker
        if wait:
            self.wait_for_worker(name)
        return worker

    def start_sweeper(self) -> Service:
        """Start ``genpulse start-sweeper`` beside the sweepers that the API and each worker run."""
        return self._start("sweeper", ["-m", "genpulse", "start-sweeper"], {})

    def wait_for_worker(self, name: str, timeout_s: float = 60.0) -> None:
        """Wait until the worker is in the ledger and consumes."""
        name = name if name in self.workers else self._full_name(name)
        wait_until(
            lambda: any(each.name == f"{name}@test" and each.consuming for each in self.ledger.workers()),
            timeout_s,
            message=f"worker {name} is registered",
        )

    def children(self, name: str) -> list[int]:
        """The pids of a worker's children."""
        return [child.pid for child in psutil.Process(self.worker(name).pid).children()]

    def child_running(self, task_id: str) -> int:
        """The pid of the child that runs a task now."""
        task = self.ledger.get(task_id)
        assert task is not None
        return int(task.attempts[-1].worker.rpartition(":")[2])

    def kill(self, pid: int) -> None:
        """``kill -9``."""
        os.kill(pid, signal.SIGKILL)

    def heal(self) -> None:
        """Whatever the last test killed: one server ``gpu1`` and one worker for it, and nothing else."""
        self._numbered += 1
        for name in [name for name in self.simulators if name != "gpu1"]:
            self.simulators.pop(name).stop()
        usable = [name for name, worker in self.workers.items() if worker.alive() and name.endswith("-one")]
        for name in [name for name in self.workers if name not in usable[:1]]:
            self.workers.pop(name).stop()
        if self.valkey is not None and not self.valkey.alive():
            self.valkey.restart()
        if "gpu1" not in self.simulators:
            self.start_simulator("gpu1")
        elif not self.simulators["gpu1"].alive():
            self.simulators["gpu1"].restart()
        if not usable:
            self.start_worker("one", ["gpu1"])
        else:
            wait_until(lambda: any(each.consuming for each in self.ledger.workers()), 30)

    def worker(self, name: str) -> Service:
        """The newest worker that was started as *name*."""
        return self.workers[self._full_name(name)]

    def _full_name(self, name: str) -> str:
        return max((each for each in self.workers if each.endswith(f"-{name}")), key=_number)

    # -- tasks --------------------------------------------------------------------------------

    def submit(self, workflow: Workflow, *, headers: Mapping[str, str] | None = None, **body: Any) -> str:
        """``POST /task`` for a workflow; returns the task's id."""
        params = {"workflow": workflow, **({"inputs": body.pop("inputs")} if "inputs" in body else {})}
        answer = self.http.post(
            f"{self.url}/task",
            json={"task_type": "comfyui", "params": params, **body},
            headers=dict(headers or {}),
            timeout=30,
        )
        assert answer.status_code == requests.codes.accepted, answer.text
        return str(answer.json()["task_id"])

    def task(self, task_id: str) -> dict[str, Any]:
        """``GET /task/{id}``."""
        answer = self.http.get(f"{self.url}/task/{task_id}", timeout=30)
        assert answer.status_code == requests.codes.ok, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def cancel(self, task_id: str) -> requests.Response:
        """``POST /task/{id}/cancel``."""
        return self.http.post(f"{self.url}/task/{task_id}/cancel", timeout=30)

    def wait(self, task_id: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait for a task's final state."""
        return wait_until(
            lambda: found if (found := self.task(task_id))["completed_at"] else None,
            timeout_s,
            every_s=0.05,
            message=f"task {task_id} is final",
        )

    def wait_for_rendering(self, task_id: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until a simulator renders the task's newest prompt."""

        def rendering() -> dict[str, Any] | None:
            found = self.ledger.get(task_id)
            assert found is not None
            prompt = found.attempts[-1].prompt_id if found.attempts else None
            if prompt is None or found.status != "processing":
                return None
            seen = [event for event in self.executions() if event.get("prompt_id") == prompt]
            return self.task(task_id) if any(event["event"] == "started" for event in seen) else None

        return wait_until(rendering, timeout_s, message=f"task {task_id} renders")

    def output(self, task_id: str, index: int = 0) -> bytes:
        """The bytes of an output, by its stable link."""
        answer = self.http.get(f"{self.url}/task/{task_id}/outputs/{index}", timeout=30)
        assert answer.status_code == requests.codes.ok, answer.text
        return answer.content

    def executions(self, name: str | None = None) -> list[dict[str, Any]]:
        """What the simulators wrote of their executions, in order of time."""
        found: list[dict[str, Any]] = []
        for each in self.simulators if name is None else [name]:
            path = self.directory / each / "executions.jsonl"
            if path.exists():
                found += [
                    {**json.loads(line), "server": each} for line in path.read_text().splitlines() if line
                ]
        return sorted(found, key=lambda event: float(event["t"]))

    def renderings(self, task_id: str) -> list[dict[str, Any]]:
        """Every start of one of a task's prompts on any simulator."""
        found = self.ledger.get(task_id)
        assert found is not None
        prompts = {attempt.prompt_id for attempt in found.attempts}
        return [
            event
            for event in self.executions()
            if event["event"] == "started" and event.get("prompt_id") in prompts
        ]


def _number(name: str) -> int:
    return int(name.partition("-")[0].removeprefix("w"))
