"""
Whether there is room for one more task: refused with ``queue_full`` before memory or disk is full.

Far from a cap a count a second old will do, so most submissions cost nothing. Close to it every
submission counts anew; requests at the very same moment may still pass it by as many as they are.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

from genpulse.config import Settings
from genpulse.errors import QueueFull
from genpulse.ledger import Ledger

__all__ = ["Admission"]

RETRY_AFTER_S = 5
_COUNT_AGE_S = 1.0
_MARGIN = 10
"""Closer to a cap than a tenth of it, or than this many tasks, is close."""
_MAX_OWNERS = 4096


class Admission:
    """Counts what waits, by owner and in all. Threads share one."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._lock = threading.Lock()
        self._counts: dict[str | None, tuple[float, int]] = {}
        self._keeps_files = settings.uses_sqlite or settings.storage == "local"
        self._disk: tuple[float, bool] = (0.0, True)

    def check(self, owner: str, *, tasks: int = 1, max_queued: int | None = None) -> None:
        """
        Make sure that *tasks* more of *owner* may wait.

        Args:
            max_queued: The owner's cap, instead of the one of the settings; 0 is none.

        Raises:
            QueueFull: They may not, for now.
            LedgerUnavailable: Nothing is known.
        """
        self.check_disk()
        cap = self._settings.max_queued if max_queued is None else max_queued
        if not self._fits(owner, tasks, cap):
            msg = f"This owner has {cap} tasks waiting at most; send more when some are done."
            raise QueueFull(msg, retry_after_s=RETRY_AFTER_S)
        if not self._fits(None, tasks, self._settings.max_queued_total):
            msg = "There are as many tasks waiting as this server takes."
            raise QueueFull(msg, retry_after_s=RETRY_AFTER_S)

    def check_disk(self) -> None:
        """
        Make sure that there is room for more files, where files are kept on this machine.

        Raises:
            QueueFull: The disk is nearly full.
        """
        if not self._keeps_files or not self._settings.min_free_bytes:
            return
        read_at, has_room = self._disk
        if time.monotonic() - read_at > _COUNT_AGE_S:
            has_room = _free_bytes(self._settings.data_dir) >= self._settings.min_free_bytes
            self._disk = (time.monotonic(), has_room)
        if not has_room:
            raise QueueFull("There is no room on this server's disk.", retry_after_s=60)

    def _fits(self, owner: str | None, tasks: int, cap: int) -> bool:
        if not cap:
            return True
        with self._lock:
            read_at, count = self._counts.get(owner, (0.0, 0))
        fresh = time.monotonic() - read_at < _COUNT_AGE_S
        if not fresh or count + tasks > cap - max(_MARGIN, cap // 10):
            count = self._ledger.queued(owner, cap)
            read_at = time.monotonic()
        fits = count + tasks <= cap
        with self._lock:
            if len(self._counts) >= _MAX_OWNERS:
                self._counts.clear()
            self._counts[owner] = (read_at, count + tasks if fits else count)
        return fits


def _free_bytes(folder: Path) -> int:
    """What the disk of *folder* has free for us; the folder need not be there yet."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            break
    return 2**63  # what cannot be read is no reason to refuse
