"""
What a worker's main process and its children know of each other without asking anybody.

A page of shared memory, made before the first fork: the marks on the worker's ComfyUI servers, and
which children are at work, and whether on webhooks. One child that finds a server stuck thereby stops its siblings and the
main process at once. No lock stands between a writer that is killed and the others: each field is
written alone, and a record caught half written costs one question to a server, or one look.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from typing import Final

from genpulse.comfy.pool import Mark

__all__ = ["Board", "board", "prepare_board"]

MAX_SERVERS: Final = 64
MAX_CHILDREN: Final = 512

_FREE, _BUSY, _DELIVERS = range(3)

# Eight-byte fields first, so that each is aligned and written in one go: failures, rest, reason, prompt.
_MARK = struct.Struct("=Qd48s64s")
_CHILD = struct.Struct("=II")


class Board:
    """The shared page. Marks of servers beyond the first 64 are not shared."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MAX_SERVERS * _MARK.size + MAX_CHILDREN * _CHILD.size)
        self._own: dict[int, Mark] = {}
        self._lock = threading.Lock()

    # -- marks on servers ---------------------------------------------------------------------

    def __getitem__(self, index: int) -> Mark:
        """The mark of a server, by its place in the settings."""
        if index >= MAX_SERVERS:
            return self._own.get(index, Mark())
        failures, cool_until, reason, stuck_on = _MARK.unpack_from(self._memory, index * _MARK.size)
        return Mark(failures, cool_until, _text(reason), _text(stuck_on))

    def __setitem__(self, index: int, mark: Mark) -> None:
        """Replace it; of two at once one wins."""
        if index >= MAX_SERVERS:
            self._own[index] = mark
            return
        reason = mark.reason.encode()[:48].decode(errors="ignore").encode()  # never half a character
        _MARK.pack_into(
            self._memory,
            index * _MARK.size,
            mark.failures,
            mark.cool_until,
            reason,
            mark.stuck_on.encode()[:64],
        )

    # -- children -----------------------------------------------------------------------------

    def enter(self, pid: int | None = None) -> None:
        """This child is ready for messages. Takes the place of a dead one."""
        pid = os.getpid() if pid is None else pid
        with self._lock:
            for place in range(MAX_CHILDREN):
                held, _ = self._child(place)
                if held in {0, pid} or not _lives(held):
                    _CHILD.pack_into(self._memory, self._at(place), pid, 0)
                    # Two that start at once may want the same place: whoever wrote last has it.
                    if self._child(place)[0] == pid:
                        return

    def set_busy(self, busy: bool) -> None:
        """This child is at work on a message, or free for the next."""
        self._set_work(_BUSY if busy else _FREE)

    def begin_round(self, most: int) -> bool:
        """
        This child wants to deliver webhooks; whether it may, for *most* do so at a time.

        Of two that begin in the same moment both may be told no. The round ends with :meth:`set_busy`.
        """
        self._set_work(_DELIVERS)
        if sum(work == _DELIVERS for work in self._works().values()) <= most:
            return True
        self._set_work(_FREE)
        return False

    def children(self) -> dict[int, bool]:
        """By pid of each living child: whether it is at work."""
        return {pid: work != _FREE for pid, work in self._works().items()}

    def _set_work(self, work: int) -> None:
        pid = os.getpid()
        for place in range(MAX_CHILDREN):
            held, _ = self._child(place)
            if held == pid:
                _CHILD.pack_into(self._memory, self._at(place), pid, work)
                return
            if not held:
                return

    def _works(self) -> dict[int, int]:
        """What each living child does."""
        found = {}
        for place in range(MAX_CHILDREN):
            pid, work = self._child(place)
            if not pid:
                break
            if _lives(pid):
                found[pid] = work
        return found

    def _at(self, place: int) -> int:
        return MAX_SERVERS * _MARK.size + place * _CHILD.size

    def _child(self, place: int) -> tuple[int, int]:
        pid, work = _CHILD.unpack_from(self._memory, self._at(place))
        return pid, work


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_board: Board | None = None


def prepare_board() -> None:
    """Make the page of this worker. Called before the first fork, so that every child sees the same."""
    global _board  # noqa: PLW0603  # one per worker, inherited by its children
    if _board is None:
        _board = Board()


def board() -> Board | None:
    """The page of this worker; ``None`` in a process that is no worker."""
    return _board
