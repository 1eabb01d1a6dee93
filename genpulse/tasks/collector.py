"""
The collector: deletes the bytes that no row names any more, and what is past its time.

It deletes only what the ledger noted for removal: a deleted task's files, what an ended attempt stored
without completing its task, an upload that nothing needs. It never looks for "what no row knows".
Idempotent, and any number may run: each takes other removals, and one that dies on the way is
followed by another. It speaks to the storage, which may be slow, so it runs beside the API and in
``genpulse start-sweeper``, and not in a worker's main process, which forks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from genpulse.config import Settings
from genpulse.errors import StorageUnavailable
from genpulse.ledger import Ledger, Removal
from genpulse.model import output_prefix
from genpulse.storage import StorageProvider

__all__ = ["Collected", "Collector"]

log = structlog.get_logger("genpulse.collector")

RETIRE_EVERY_S = 60.0
LEFTOVERS_EVERY_S = 3600.0
LEFTOVER_AGE_S = 86_400.0
"""Half-written files and parts of uploads that are older than this have no writer any more."""
_BATCH = 100
_FAILURES = 3
_TAKEN_FOR_S = 300.0


@dataclass(slots=True)
class Collected:
    """What one pass did."""

    tasks: int = 0
    assets: int = 0
    objects: int = 0
    leftovers: int = 0


class Collector:
    """
    One pass is :meth:`collect`. Not for sharing between threads.

    Args:
        is_stopping: Asked between two pieces of work; a pass may be long after a busy day.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        storage: StorageProvider,
        *,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._storage = storage
        self._is_stopping = is_stopping
        self._retire_at = 0.0
        self._leftovers_at = 0.0

    def collect(self) -> Collected:
        """
        One pass.

        Raises:
            LedgerUnavailable: The pass was cut short; the next one goes on.
            StorageUnavailable: As well; what it took is due again after five minutes.
        """
        done = Collected()
        if time.monotonic() >= self._retire_at:
            self._retire_at = time.monotonic() + RETIRE_EVERY_S
            self._retire(done)
        self._remove(done)
        if time.monotonic() >= self._leftovers_at:
            self._leftovers_at = time.monotonic() + LEFTOVERS_EVERY_S
            done.leftovers = self._storage.collect_leftovers(LEFTOVER_AGE_S)
        if done != Collected():
            log.info(
                "collected",
                tasks=done.tasks,
                assets=done.assets,
                objects=done.objects,
                leftovers=done.leftovers,
            )
        return done

    def _retire(self, done: Collected) -> None:
        """Delete the rows of what is past its time; their bytes are removals from then on."""
        self._ledger.forget_deleted()
        if (keep := self._settings.retention) is None:
            return
        done.tasks = self._in_batches(lambda: self._ledger.retire_tasks(keep.total_seconds(), limit=_BATCH))
        done.assets = self._in_batches(lambda: self._ledger.retire_assets(keep.total_seconds(), limit=_BATCH))

    def _in_batches(self, retire: Callable[[], int]) -> int:
        total = 0
        while not self._is_stopping():
            total += (retired := retire())
            if retired < _BATCH:
                break
        return total

    def _remove(self, done: Collected) -> None:
        failures = 0
        while not self._is_stopping():
            batch = self._ledger.take_removals(limit=_BATCH, for_s=_TAKEN_FOR_S)
            began = time.monotonic()
            for removal in batch:
                # What is left of the batch when its time is half over is for whoever comes next.
                if self._is_stopping() or time.monotonic() - began > _TAKEN_FOR_S / 2:
                    return
                try:
                    done.objects += self._delete(removal)
                except StorageUnavailable as error:
                    log.warning("removal_put_off", task_id=removal.task_id, error=str(error))
                    # One object that cannot be deleted must not keep all others; a store that is away may.
                    failures += 1
                    if failures >= _FAILURES:
                        raise
                else:
                    self._ledger.removed(removal)
            if len(batch) < _BATCH:
                return

    def _delete(self, removal: Removal) -> int:
        if removal.task_id is not None:
            return self._storage.delete_below(output_prefix(removal.task_id, removal.attempt))
        if removal.key is not None:
            self._storage.delete_file(removal.key)
        return 1
