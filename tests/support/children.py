"""A worker child in a thread, for tests of what attempts leave to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from genpulse.comfy.pool import Marks, Server, ServerPool
from genpulse.config import Settings
from genpulse.model import Claim, Task
from genpulse.storage import LocalStorage
from genpulse.tasks import runner, wiring
from genpulse.tasks.heartbeat import Heartbeat
from genpulse.tasks.registry import default_registry

__all__ = ["Child"]


class Child:
    """
    A worker child in a thread: its own ledger, storage, pool and heartbeat.

    Args:
        beats: Whether its heartbeat runs. Without it, it is never told that its lease is lost.
        marks: Shared with its siblings.
        after: Done with the claim when the handler is through, before the attempt ends.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        *,
        beats: bool = True,
        storage: Path | None = None,
        after: Callable[[Claim], None] | None = None,
        marks: Marks | None = None,
    ) -> None:
        self.draining = threading.Event()
        self.said: dict[str, Any] | None = None
        self._after = after
        self._beats = beats
        self._heartbeat = Heartbeat(settings, self.draining.is_set)
        self._ledger = wiring.open_ledger(settings, pool_size=1)
        servers = [Server(server.name, server.url) for server in settings.servers]
        self.pool = ServerPool(servers, marks=marks)
        self.pool.probe_all()
        self._handlers = default_registry()
        registry: Any = SimpleNamespace(get=self._handler)
        self._runner = runner.Runner(
            settings,
            ledger=self._ledger,
            storage=LocalStorage(storage or settings.assets_dir),
            live=wiring.open_live(settings),
            pool=self.pool,
            registry=registry,
            heartbeat=self._heartbeat,
            worker=f"{name}@host:1",
        )
        if beats:
            self._heartbeat.start()
        self._thread: threading.Thread | None = None

    def _handler(self, name: str) -> Any:
        handler = self._handlers.get(name)

        def execute(task: Task, context: runner.AttemptContext) -> Any:
            made = handler.execute(task, context)
            if self._after is not None:
                self._after(context.claim)
            return made

        return SimpleNamespace(queue=handler.queue, execute=execute)

    def start(self, task: Task) -> None:
        """Run the task's next attempt in a thread."""

        def run() -> None:
            self.said = self._runner.run(task.id)

        self._thread = threading.Thread(target=run, name="child", daemon=True)
        self._thread.start()

    def has_heard_of_its_loss(self) -> bool:
        """Whether its heartbeat found that the attempt which runs is no more the task's."""
        return all(signals.lost for _, signals in self._heartbeat._runs.values())

    def end(self, within_s: float = 20.0) -> str:
        """Wait for the end of the attempt; the word that the runner has for it."""
        assert self._thread is not None
        self._thread.join(within_s)
        assert not self._thread.is_alive(), "the attempt did not end"
        assert self.said is not None, "the task was not to be had"
        return str(self.said["status"])

    def run(self, task: Task) -> str:
        """:meth:`start` and :meth:`end`."""
        self.start(task)
        return self.end()

    def close(self) -> None:
        """Give everything back."""
        if self._beats:
            self._heartbeat.stop()
        self.pool.close()
        self._ledger.close()
