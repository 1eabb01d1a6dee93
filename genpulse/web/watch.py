"""
Who watches which task: event streams and long polls, under one cap for the process.

Each watcher holds a thread of the server, so there are only so many places, and the rest of the
threads is left to all other requests. Where owners share the server, none has more than half of them. What watchers learn comes by two ways, which feed all of them:
one reader of Redis that tells within milliseconds, and one look at the ledger each second that
finds whatever Redis did not tell. Redis may be down, wiped or wrong: then progress is missing and
news are a second late, and the final state is seen all the same.

The threads behind it start with the first watcher, so after gunicorn's fork.
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger
from genpulse.live import Entry, EventReader, Past
from genpulse.model import Task
from genpulse.tasks.background import logged

__all__ = ["News", "Watch", "Watchers"]

LOOK_S = 1.0
"""How often the ledger is asked about all watched tasks at once."""
TICK_S = 0.2
"""How often the watchers' keeper looks whether this process is to stop."""
HANG_UP_S = 1.0
"""How often it looks for callers who went away."""
ASK_PREVIEWS_S = 5.0
UNACKNOWLEDGED_S = 30
"""How long what was sent to a caller may stay unacknowledged before the connection counts as dead."""
BACKLOG = 256
"""Entries that may wait for one slow watcher; one more, and it has to begin anew."""


@dataclass(slots=True)
class News:
    """What a watcher is told: entries of the log in order, and whether the ledger has something new."""

    entries: list[Entry] = field(default_factory=list)
    look: bool = False
    """Read the task again."""
    lost: bool = False
    """Entries were dropped, because this watcher did not take them in time."""
    over: bool = False
    """The process stops, or the caller went away: end now."""


class Watch:
    """
    One watcher of one task. A context manager: until it is closed its place stays taken.

    Attributes:
        past: What the log held after the id asked for; ``None`` if Redis did not answer.
    """

    def __init__(
        self, watchers: Watchers, topic: _Topic, owner: str, connection: socket.socket | None
    ) -> None:
        self.past: Past | None = None
        self.owner = owner
        self.previews = False
        self.connection = connection
        self.is_open = True
        self._watchers = watchers
        self._topic = topic
        self._lock = threading.Lock()
        self._bell = threading.Event()
        self._entries: collections.deque[Entry] = collections.deque()
        self._preview: Entry | None = None
        self._look = self._lost = self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the place back. Safe to repeat."""
        self._watchers.leave(self)

    def ask_for_previews(self) -> None:
        """From now on take unfinished pictures, too, and ask the worker for them."""
        self.previews = True
        self._watchers.want_previews(self.task_id)

    def wait(self, timeout_s: float) -> News:
        """What there is to tell, at the latest after *timeout_s* seconds; possibly nothing."""
        self._bell.wait(max(0.0, timeout_s))
        with self._lock:
            self._bell.clear()
            news = News(list(self._entries), self._look, self._lost, self._over)
            if self._preview is not None:
                news.entries.append(self._preview)
            if self._over:
                self._bell.set()  # and so it stays
            self._entries.clear()
            self._preview = None
            self._look = self._lost = False
        return news

    def task(self) -> Task | None:
        """
        The task as the ledger has it since the last news, without params; all of its watchers share one reading.

        Raises:
            LedgerUnavailable: Ask again later.
        """
        return self._topic.read()

    def saw(self, task: Task) -> None:
        """This reading was made after the watch began: only what differs from it is news."""
        self._watchers.saw(self._topic, task)

    def until(self, enough: Callable[[Task], bool], wait_s: float) -> Task | None:
        """
        The task as soon as it is *enough*, else as it is after *wait_s* seconds.

        *enough* is asked again with every news of the task, progress included.

        Returns:
            ``None`` if the task was deleted meanwhile.

        Raises:
            LedgerUnavailable: It could not be read even once.
        """
        ends = time.monotonic() + wait_s
        task = self._watchers.ledger.get(
            self._topic.task_id, with_params=False
        )  # later than the place in the log
        if task is not None:
            self.saw(task)
        owed = False
        while task is not None and not enough(task):
            left = ends - time.monotonic()
            if left <= 0:
                break
            news = self.wait(min(left, LOOK_S) if owed else left)
            if news.over:
                break
            if news.look or owed:
                owed = False
                try:
                    task = self.task()
                except LedgerUnavailable:
                    owed = True
        return task

    def put(self, entry: Entry) -> None:
        """Take an entry; called by the reader, must not block."""
        with self._lock:
            if entry.kind == "preview":
                if not self.previews:
                    return
                self._preview = entry  # the newest is enough
            elif len(self._entries) >= BACKLOG:
                self._entries.clear()
                self._lost = self._look = True
            else:
                self._entries.append(entry)
                self._look = self._look or entry.kind == "change"
        self._bell.set()

    def look(self) -> None:
        """Be told that the ledger has something new."""
        with self._lock:
            self._look = True
        self._bell.set()

    def end(self) -> None:
        """Be told to end."""
        with self._lock:
            self._over = True
        self._bell.set()

    @property
    def task_id(self) -> str:
        """Whom it watches."""
        return self._topic.task_id


class _Topic:
    """A task that somebody watches, and its newest reading."""

    def __init__(self, task_id: str, ledger: Ledger) -> None:
        self.task_id = task_id
        self.watches: set[Watch] = set()
        self.stamp: Any = None
        self.version = 1
        self._ledger = ledger
        self._reading = threading.Lock()
        self._read_version = 0
        self._task: Task | None = None

    def read(self) -> Task | None:
        with self._reading:
            version = self.version
            if self._read_version != version:
                self._task = self._ledger.get(self.task_id, with_params=False)
                self._read_version = version
            return self._task


class Watchers:
    """
    All watchers of this process.

    Args:
        places: How many there may be at a time.
        is_stopping: Whether the process was told to stop; then all watchers end within a second.
    """

    def __init__(
        self, ledger: Ledger, redis_url: str, *, places: int, is_stopping: Callable[[], bool]
    ) -> None:
        self.ledger = ledger
        self.places = places
        self._is_stopping = is_stopping
        self._reader = EventReader(redis_url, self._heard)
        self._lock = threading.Lock()
        self._topics: dict[str, _Topic] = {}
        self._taken: collections.Counter[str] = collections.Counter()
        """Places by owner."""
        self._busy = threading.Event()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def taken(self) -> int:
        """How many places are taken now."""
        with self._lock:
            return self._taken.total()

    def enter(
        self,
        task_id: str,
        *,
        owner: str,
        shared: bool,
        after: str | None = None,
        connection: socket.socket | None = None,
    ) -> Watch | None:
        """
        Watch a task. What happens to it after this returned is told.

        Args:
            owner: Whose place it takes.
            shared: There are other owners: this one may have half of the places.
            after: Also read what was logged after this id.
            connection: The caller's socket, if the server shows it; the watch ends when it is closed.

        Returns:
            ``None`` if all places are taken, or all of this owner's, or the process stops.
        """
        with self._lock:
            most = max(1, self.places // 2) if shared else self.places
            if self._taken.total() >= self.places or self._taken[owner] >= most:
                return None
            if self._closing.is_set() or self._is_stopping():
                return None
            self._taken[owner] += 1
            topic = self._topics.setdefault(task_id, _Topic(task_id, self.ledger))
            watch = Watch(self, topic, owner, connection)
            topic.watches.add(watch)
            self._start_threads()
        self._busy.set()
        try:
            _expect_answers(connection)
            watch.past = self._reader.follow(task_id, after)
        except BaseException:
            watch.close()
            raise
        return watch

    def leave(self, watch: Watch) -> None:
        """End a watch; :meth:`Watch.close` calls it."""
        with self._lock:
            if not watch.is_open:
                return
            watch.is_open = False
            self._taken[watch.owner] -= 1
            if not self._taken[watch.owner]:
                del self._taken[watch.owner]
            topic = self._topics[watch.task_id]
            topic.watches.discard(watch)
            if not topic.watches:
                del self._topics[watch.task_id]
                self._reader.unfollow(watch.task_id)
            elif watch.previews and not any(other.previews for other in topic.watches):
                self._reader.drop_previews(watch.task_id)
            if not self._taken:
                self._busy.clear()

    def want_previews(self, task_id: str) -> None:
        """See :meth:`Watch.ask_for_previews`; the keeper goes on asking."""
        self._reader.want_previews([task_id])

    def saw(self, topic: _Topic, task: Task) -> None:
        """See :meth:`Watch.saw`."""
        with self._lock:
            if topic.stamp is None:
                topic.stamp = (task.status, task.attempt, task.updated_at)

    def close(self) -> None:
        """End all watches and the threads behind them. Nobody enters any more."""
        self._closing.set()
        self._busy.set()
        self._reader.stop()
        self._end(self._watches())

    def _start_threads(self) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._keep, name="genpulse-watch-keeper", daemon=True),
                threading.Thread(target=self._look, name="genpulse-watch-ledger", daemon=True),
            ]
            for thread in self._threads:
                thread.start()

    def _watches(self) -> list[Watch]:
        with self._lock:
            return [watch for topic in self._topics.values() for watch in topic.watches]

    @staticmethod
    def _end(watches: list[Watch]) -> None:
        for watch in watches:
            watch.end()

    def _heard(self, task_id: str, entry: Entry) -> None:
        """By the reader's thread."""
        with self._lock:
            topic = self._topics.get(task_id)
            if topic is None:
                return
            if entry.kind == "change":
                topic.version += 1
            watches = list(topic.watches)
        for watch in watches:
            watch.put(entry)

    def _look(self) -> None:
        """Compare all watched tasks with the ledger, in one statement each second."""
        while not self._closing.is_set():
            self._busy.wait()
            with self._lock:
                task_ids = list(self._topics)
            with logged("watch"):
                if task_ids:
                    self._compare(self.ledger.stamps(task_ids), task_ids)
            self._closing.wait(LOOK_S)

    def _compare(self, stamps: dict[str, Any], task_ids: list[str]) -> None:
        changed: list[Watch] = []
        with self._lock:
            for task_id in task_ids:
                topic = self._topics.get(task_id)
                stamp = stamps.get(task_id, "deleted")
                # Without a stamp nobody has read it yet, and whoever does will say what was read.
                if topic is not None and topic.stamp is not None and topic.stamp != stamp:
                    topic.stamp = stamp
                    topic.version += 1
                    changed += topic.watches
        for watch in changed:
            watch.look()

    def _keep(self) -> None:
        """See to it that watches end when they are to, and that workers know of those who want previews."""
        next_hang_up = next_previews = time.monotonic()
        while not self._closing.is_set():
            self._busy.wait()
            with logged("watch"):
                now = time.monotonic()
                watches = self._watches()
                if self._is_stopping():
                    self._end(watches)
                if now >= next_hang_up:
                    next_hang_up = now + HANG_UP_S
                    self._end(_hung_up(watches))
                if now >= next_previews:
                    next_previews = now + ASK_PREVIEWS_S
                    if wanted := sorted({watch.task_id for watch in watches if watch.previews}):
                        self._reader.want_previews(wanted)
            self._closing.wait(TICK_S)


def _hung_up(watches: list[Watch]) -> list[Watch]:
    """Those whose caller closed the connection; nothing is read from it."""
    if not hasattr(select, "poll"):
        return []
    gone = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    by_number: dict[int, Watch] = {}
    for watch in watches:
        if watch.connection is not None:
            with contextlib.suppress(OSError, ValueError):
                number = watch.connection.fileno()
                poll.register(number, gone)
                by_number[number] = watch
    # A number may be another connection's by now; then its watch is closed, and ending it does nothing.
    return [by_number[number] for number, seen in poll.poll(0) if seen & gone]


def _expect_answers(connection: socket.socket | None) -> None:
    """A caller whose machine vanished must not keep a thread until TCP gives up a quarter of an hour later."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if connection is not None and option is not None:
        with contextlib.suppress(OSError):  # a Unix socket has no such thing
            connection.setsockopt(socket.IPPROTO_TCP, option, UNACKNOWLEDGED_S * 1000)
