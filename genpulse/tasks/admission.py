"""
Whether there is room for one more task: refused with ``queue_full`` before memory or disk is full.

Far from a cap a count a second old will do, so most submissions cost nothing. Close to it every
submission counts anew; requests at the very same moment may still pass it by as many as they are.

What is on its way in is counted as well, for a thousand bodies that each fit by themselves do not fit
together: files by what they announce and will need on the disks, JSON by what was read of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from genpulse.config import Settings
from genpulse.errors import QueueFull
from genpulse.ledger import Ledger

__all__ = ["Admission"]

RETRY_AFTER_S = 5
DISK_RETRY_AFTER_S = 60
BODY_RETRY_AFTER_S = 1
MAX_BODIES_BYTES = 128 * 2**20
"""JSON that this process may have in hand at a time; read and checked it takes several times that."""
CHECK_EVERY_BYTES = 4 * 2**20
"""A file that comes in is held against the disks this often."""
_COUNT_AGE_S = 1.0
_MARGIN = 10
"""Closer to a cap than a tenth of it, or than this many tasks, is close."""
_MAX_OWNERS = 4096


NO_ROOM = "There is no room on this server's disk."


@dataclass(slots=True, eq=False)
class _Incoming:
    """A file on its way in: how long it said it is, or has turned out to be, and what is there of it."""

    expected: int
    received: int = 0


class Admission:
    """Counts what waits, by owner and in all. Threads share one."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._lock = threading.Lock()
        self._counts: dict[str | None, tuple[float, int]] = {}
        self._keeps_files = settings.uses_sqlite or settings.storage == "local"
        self._disk: tuple[float, bool] = (0.0, True)
        self._incoming: set[_Incoming] = set()
        self._bodies_limit = max(MAX_BODIES_BYTES, 2 * settings.max_body_bytes)
        self._bodies = 0

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
            raise QueueFull(NO_ROOM, retry_after_s=DISK_RETRY_AFTER_S)

    @contextlib.contextmanager
    def receiving(self, announced: int) -> Iterator[Callable[[int], None]]:
        """
        Keep room on the disks for a file that comes in, for as long as the block lasts.

        It goes through the folder for temporary files, which needs room for it and no more, and from
        there to the data folder, if that is where files are kept.

        Args:
            announced: Its bytes as far as they are known; 0 if they are not.

        Returns:
            To be called with the number of bytes that came in since the last call.

        Raises:
            QueueFull: There is no room, at the beginning or any more.
        """
        incoming = _Incoming(announced)
        with self._lock:
            self._incoming.add(incoming)
        unchecked = 0

        def note(number: int) -> None:
            nonlocal unchecked
            incoming.received += number
            incoming.expected = max(incoming.expected, incoming.received)
            unchecked += number
            if unchecked >= CHECK_EVERY_BYTES:
                unchecked = 0
                self._check_incoming()

        try:
            self._check_incoming()
            yield note
        finally:
            with self._lock:
                self._incoming.discard(incoming)

    def _check_incoming(self) -> None:
        with self._lock:
            incoming = [(each.expected, each.received) for each in self._incoming]
        spool, kept = Path(tempfile.gettempdir()), self._settings.data_dir
        needed: Counter[int] = Counter({_device(spool): sum(most - got for most, got in incoming)})
        folders = {_device(spool): spool}
        if self._keeps_files and self._settings.min_free_bytes:
            copies = sum(most for most, _ in incoming) if self._settings.storage == "local" else 0
            needed[_device(kept)] += copies + self._settings.min_free_bytes
            folders[_device(kept)] = kept
        if any(_free_bytes(folders[device]) < number for device, number in needed.items()):
            raise QueueFull(NO_ROOM, retry_after_s=DISK_RETRY_AFTER_S)

    @contextlib.contextmanager
    def reading(self, announced: int) -> Iterator[Callable[[int], None]]:
        """
        Count the bytes of a JSON body in memory, for as long as the block lasts.

        Only those that were read count: whoever announces many and sends them slowly takes nobody's place.

        Args:
            announced: The body's bytes as far as they are known; 0 if they are not.

        Returns:
            To be called with each number of bytes that was read.

        Raises:
            QueueFull: There are too many in hand, or would be with those announced.
        """
        mine = 0

        def take(number: int, *, also: int = 0) -> None:
            nonlocal mine
            with self._lock:
                if self._bodies + number + also > self._bodies_limit:
                    msg = "This server reads as many requests as it has memory for."
                    raise QueueFull(msg, retry_after_s=BODY_RETRY_AFTER_S)
                self._bodies += number
                mine += number

        take(0, also=announced)
        try:
            yield take
        finally:
            with self._lock:
                self._bodies -= mine

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
    with contextlib.suppress(OSError):
        return shutil.disk_usage(_existing(folder)).free
    return 2**63  # what cannot be read is no reason to refuse


def _device(folder: Path) -> int:
    """The file system of *folder*, as a number."""
    with contextlib.suppress(OSError):
        return os.stat(_existing(folder)).st_dev  # noqa: PTH116  # of a folder that may not be ours
    return -1


def _existing(folder: Path) -> Path:
    places = (folder.absolute(), *folder.absolute().parents)
    return next((place for place in places if place.exists()), places[-1])
