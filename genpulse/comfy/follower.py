"""
Following one prompt until its end: a socket that hints, and polling that knows.

ComfyUI's socket loses messages, never replays them, and can fall silent for reasons that are not
ours; ``/queue`` and then ``/history`` are the truth. So the end of a prompt is always read from the
history, the socket only says *when* to look, and polling goes on behind it. Three threads, so that
nothing waits for anything else:

- the reader drains the socket whatever happens, since one socket that is not read stops delivery for
  every client of the server; it also opens the socket again, with the same client id, after it has
  closed the old one: a server that still holds the old one forgets the new one with it;
- the poller asks ``/queue`` and ``/history``, and may hang as long as the server does;
- the caller's thread runs :meth:`Follower.follow` and asks its ``check`` every 0.2 s.

Source: ComfyUI 0.3.64 ``server.py`` and ``execution.py``, observed.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote, urlsplit, urlunsplit

import websocket

from genpulse.comfy.client import ComfyClient, Place, Whereabouts
from genpulse.comfy.events import (
    Event,
    Executing,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    PreviewImage,
    Progress,
    Running,
    Status,
    Unknown,
    parse_binary,
    parse_text,
    prompt_of,
)
from genpulse.comfy.history import HistoryEntry
from genpulse.errors import ComfyUnavailable, PromptLost, ServerStalled

__all__ = ["Finished", "Follower", "SocketFrame"]

TICK_S = 0.2
"""How often ``check`` is asked at least."""
CONFIRM_S = 0.3
"""Between two looks that must agree before a prompt is called lost or a server gone."""
SILENT_SERVER_S = 10.0
"""How long a server may answer nothing before it counts as unavailable."""
DEAF_S = 2.0
"""A prompt runs this long and the open socket has said nothing about it: open it again."""
QUIET_S = 3.0
"""A prompt runs and the socket, heard before, is quiet this long: open it again, and double it."""
FROZEN_S = 5.0
"""Two looks, usually 0.2 s apart, that lie further apart: this process did not run in between."""
FRAMES_GRACE_S = 3.0
"""The history has the end: how long a quiet socket may still owe frames that exist nowhere else."""
MAX_LAG_S = 60.0
"""The same if the socket is not quiet."""
MAX_MESSAGE_BYTES = 512 * 2**20
MAX_WAITING_EVENTS = 10_000
_PROGRESS_STATE = b'{"type": "progress_state"'


@dataclass(frozen=True, slots=True)
class SocketFrame:
    """A result that a ``SaveImageWebsocket`` node sent over the socket, and nowhere else."""

    node_id: str
    prompt_id: str | None
    image_type: str
    """``image/png`` or ``image/jpeg``."""
    data: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """How a followed prompt ended."""

    entry: HistoryEntry
    frames: tuple[SocketFrame, ...] = ()
    """In the order in which they came, of the nodes named as ``socket_nodes``."""
    heard_from_start: bool = False
    """One and the same socket was open from the prompt's start to its very last message."""
    frames_complete: bool = True
    """
    Whether ``frames`` are all there are: heard from the start, below the byte cap, and as many as
    each node announced. Always true without ``socket_nodes``.
    """


class Follower:
    """
    A socket of one client id, and the way to follow a prompt with it. Use it as a context manager.

    Open it *before* the prompt is submitted, or results on the socket are lost. Opening waits up to
    2 s for the server's first message and never fails: without a socket, polling alone does it.

    Args:
        client: The server. Its calls run in the poller's thread.
        client_id: Whose messages to hear. One per attempt; the same one to adopt a prompt.
        socket_nodes: Nodes whose pictures are results (``workflow.socket_output_nodes``).
        previews: Whether ``on_event`` gets sampler previews; of several that wait, only the newest.
        max_frame_bytes: Bound for the results held in memory. Beyond it they are not complete.
    """

    def __init__(
        self,
        client: ComfyClient,
        client_id: str,
        *,
        socket_nodes: Collection[str] = (),
        previews: bool = False,
        max_frame_bytes: int = 512 * 2**20,
    ) -> None:
        if not client_id:
            msg = "a client id is a non-empty text"
            raise ValueError(msg)
        self._client = client
        self._socket_nodes = frozenset(socket_nodes)
        self._bell = threading.Event()
        self._reader = _Reader(
            client,
            client_id,
            self._bell,
            socket_nodes=self._socket_nodes,
            previews=previews,
            max_frame_bytes=max_frame_bytes,
        )

    def __enter__(self) -> Self:
        self._reader.start()
        self._reader.settled.wait(2.0)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. The prompt, if any, runs on."""
        self._reader.close()

    @property
    def connected(self) -> bool:
        """Whether the socket is open and has said something."""
        return self._reader.connected

    def follow(
        self,
        prompt_id: str,
        *,
        check: Callable[[], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        stall_s: float = 900.0,
        poll_s: float = 0.5,
    ) -> Finished:
        """
        Wait until the prompt is over and read how it ended. It may be pending, running or over already.

        Args:
            prompt_id: Submitted by anybody, this process or another.
            check: Called at least every 0.25 s. What it raises comes out at once, and the prompt is
                left alone.
            on_event: Gets this prompt's events in order, in this thread, and ``Running`` once when it
                is first seen running. What it raises comes out too.
            stall_s: How long a running prompt may say nothing. Counted only while the socket is
                open, and only after something of this prompt was heard, or after a new socket was
                greeted and not told what executes: a worker thread that lives tells that at once.
            poll_s: Between two looks while the socket says nothing.

        Raises:
            PromptLost: Neither in the queue nor in the history, seen twice.
            ServerStalled: No event for *stall_s* although it runs; or it waits behind one and the same
                prompt for twice as long, as behind one that killed the server's worker thread.
            ComfyUnavailable: The server refuses connections (``refused``), or was silent for 10 s.
        """
        watch = _Watch(
            self._reader, prompt_id, on_event, stall_s=stall_s, wants_frames=bool(self._socket_nodes)
        )
        poller = _Poller(self._client, prompt_id, self._bell, poll_s)
        # The socket of a prompt that was just submitted speaks within milliseconds; asking at once
        # would only cost the server. An adopted prompt may be over already.
        poller.start(first_after_s=0.05 if self._reader.connected else 0.0)
        try:
            while True:
                if check is not None:
                    check()
                watch.hear(poller)
                finished = watch.judge(poller)
                if finished is not None:
                    return finished
                self._bell.wait(TICK_S)
                self._bell.clear()
        finally:
            poller.stop()


class _Watch:
    """What one call of ``follow`` knows: heard by socket, seen by polling, and what follows from both."""

    def __init__(
        self,
        reader: _Reader,
        prompt_id: str,
        on_event: Callable[[Event], None] | None,
        *,
        stall_s: float,
        wants_frames: bool,
    ) -> None:
        self._reader = reader
        self._prompt_id = prompt_id
        self._on_event = on_event
        self._stall_s = stall_s
        self._wants_frames = wants_frames
        self._running_since: float | None = None
        self._place: Place | None = None
        self._heard_at: float | None = None
        self._heard_checked_at = time.monotonic()
        self._started_on: int | None = None
        self._ended_on: int | None = None
        self._announced: dict[str, int] = {}
        self._entry: HistoryEntry | None = None
        self._entry_at = 0.0
        self._head: tuple[str, ...] = ()
        self._head_since: float | None = None
        self._unknown_since: float | None = None
        self._failing_since: float | None = None
        self._refused_since: float | None = None
        self._next_reopen_at = 0.0
        self._deaf_pause_s = DEAF_S
        self._quiet_pause_s = QUIET_S
        self._heard_on: int | None = None

    def hear(self, poller: _Poller) -> None:
        """Take in what the reader left: events of this prompt, and when to look at the history."""
        for generation, item in self._reader.take():
            event = parse_text(item) if isinstance(item, bytes) else item
            prompt = prompt_of(event)
            is_ours = prompt == self._prompt_id
            if not is_ours and not (prompt is None and isinstance(event, Executing | PreviewImage)):
                continue
            self._heard_on = generation
            if is_ours:
                self._heard_at = time.monotonic()
            self._note(event, generation)
            if is_ours or not isinstance(event, Executing) or event.node is not None:
                self._tell_running()
            if self._on_event is not None:
                self._on_event(event)
            if is_ours and isinstance(event, Executing) and event.node is None:
                poller.look_at_history()
            elif isinstance(event, ExecutionSuccess | ExecutionInterrupted) or (
                isinstance(event, ExecutionError) and event.final
            ):
                # The history may lack it for a moment yet; the last message usually follows in 1 ms.
                poller.look_soon(0.05)
        now = time.monotonic()
        away_s = now - self._heard_checked_at
        if away_s > FROZEN_S:
            # This process was stopped, and nobody listened: no clock has run. What the first sockets
            # and polls after a thaw say is as old as the freeze.
            self._running_since, self._head_since, self._failing_since = (
                None if since is None else since + away_s
                for since in (self._running_since, self._head_since, self._failing_since)
            )
        if self._heard_at is not None and (away_s > FROZEN_S or not self._reader.connected):
            # Nothing can be heard meanwhile: the stall clock stands still.
            self._heard_at = min(now, self._heard_at + away_s)
        self._heard_checked_at = now

    def _note(self, event: Event, generation: int) -> None:
        match event:
            case ExecutionStart():
                self._started_on = generation
                self._announced.clear()
            case Executing(node=None, prompt_id=str()):
                self._ended_on = generation
            case Progress(node=str(node), max=maximum):
                self._announced[node] = int(maximum)
            case _:
                pass

    def _tell_running(self) -> None:
        if self._running_since is None:
            self._running_since = time.monotonic()
            if self._on_event is not None:
                self._on_event(Running(self._prompt_id))

    def judge(self, poller: _Poller) -> Finished | None:
        """Weigh what polling saw since the last call; the end, or ``None``, or an error."""
        now = time.monotonic()
        for asked_at, sight in poller.take():
            if isinstance(sight, ComfyUnavailable):
                self._take_failure(sight, poller, asked_at, now)
            elif sight is not None:
                self._take_sight(sight, poller, now)
        if self._entry is not None:
            return self._finish(now)
        if self._place is Place.RUNNING:
            self._mind_the_socket(now)
            if self._heard_at is not None and now - self._heard_at > self._stall_s:
                msg = f"the prompt made no progress for {self._stall_s:g} s"
                raise ServerStalled(msg, stuck_on=self._prompt_id)
            if self._is_dead_at_the_head(now):
                msg = f"the server has said nothing of the prompt it runs for {self._stall_s:g} s"
                raise ServerStalled(msg, stuck_on=self._prompt_id)
        heard_just_now = self._heard_at is not None and now - self._heard_at < 1.0
        poller.set_relaxed(heard_just_now and self._reader.connected)
        return None

    def _is_dead_at_the_head(self, now: float) -> bool:
        """
        Whether the server's worker thread died with this prompt, which then "runs" for ever.

        A deaf socket is silent too. But a server whose thread lives tells a new socket of the client
        whose prompt runs, right after the greeting, which node executes; and it does so past the
        queue that a socket nobody reads can block.
        """
        since, greeted_at = self._running_since, self._reader.greeted_at
        return (
            self._heard_on is None
            and since is not None
            and now - since > self._stall_s
            and self._reader.connected
            and greeted_at is not None
            and greeted_at > since
            and now - greeted_at > 1.0
        )

    def _take_failure(self, error: ComfyUnavailable, poller: _Poller, asked_at: float, now: float) -> None:
        self._failing_since = asked_at if self._failing_since is None else self._failing_since
        if error.refused:
            if self._refused_since is not None and now - self._refused_since >= CONFIRM_S * 0.9:
                raise error
            self._refused_since = now if self._refused_since is None else self._refused_since
            poller.look_soon(CONFIRM_S)
        else:
            self._refused_since = None
            if now - self._failing_since >= SILENT_SERVER_S:
                raise error

    def _take_sight(self, sight: Whereabouts, poller: _Poller, now: float) -> None:
        self._failing_since = self._refused_since = None
        self._place = sight.place
        if sight.place is Place.FINISHED and sight.entry is not None:
            if self._entry is None:
                self._entry, self._entry_at = sight.entry, now
        elif sight.place is Place.UNKNOWN:
            if self._unknown_since is not None and now - self._unknown_since >= CONFIRM_S * 0.9:
                msg = "the ComfyUI server knows nothing of the prompt any more"
                raise PromptLost(msg)
            self._unknown_since = now if self._unknown_since is None else self._unknown_since
            poller.look_soon(CONFIRM_S)
            return
        self._unknown_since = None
        if sight.place is Place.RUNNING:
            self._tell_running()
        elif sight.place is Place.PENDING:
            self._mind_the_line(sight.running, now)

    def _mind_the_line(self, head: tuple[str, ...], now: float) -> None:
        """A worker thread that died takes its prompt to the head of the line, for ever, and HTTP goes on."""
        if self._head_since is None or head != self._head:
            self._head, self._head_since = head, now
        elif now - self._head_since > 2 * self._stall_s:
            msg = f"the server's queue has not moved for {2 * self._stall_s:g} s"
            raise ServerStalled(msg, stuck_on=next(iter(head), ""))

    def _finish(self, now: float) -> Finished | None:
        """The history has the end. Results that exist on the socket alone may still be under way."""
        entry = self._entry
        assert entry is not None
        owes_frames = (
            self._wants_frames
            and entry.status == "success"
            and self._ended_on is None
            and self._started_on in {None, self._reader.generation}
            and self._reader.connected
        )
        # A graph of many nodes makes the socket lag seconds behind; others' messages must not hold us for ever.
        quiet_s = now - max(self._entry_at, self._reader.last_message_at)
        if owes_frames and quiet_s < FRAMES_GRACE_S and now - self._entry_at < MAX_LAG_S:
            return None
        self._tell_running()
        heard_all = self._started_on is not None and self._started_on == self._ended_on
        frames = self._reader.frames_of(self._prompt_id)
        counts = collections.Counter(frame.node_id for frame in frames)
        complete = not self._wants_frames or (
            heard_all
            and not self._reader.overflowed
            and all(counts[node] >= self._announced.get(node, 0) for node in self._reader.socket_nodes)
        )
        return Finished(entry=entry, frames=frames, heard_from_start=heard_all, frames_complete=complete)

    def _mind_the_socket(self, now: float) -> None:
        """
        Open the socket again if it is silent although polling says that the prompt runs.

        Each futile attempt doubles the pause: silence has innocent reasons too (a slow node), and
        reasons that a new socket does not cure (another client that does not read its own).
        """
        reader = self._reader
        if not reader.connected or self._running_since is None or now < self._next_reopen_at:
            return
        heard_here = self._heard_on == reader.generation
        if not heard_here:
            if now - max(reader.opened_at, self._running_since) < DEAF_S:
                return
            pause = self._deaf_pause_s = min(60.0, self._deaf_pause_s * 2)
        elif reader.is_dead(now):
            pause = QUIET_S
        else:
            # Results on this socket would be lost while it is opened again, so silence alone is no reason.
            if self._wants_frames or now - reader.last_message_at < self._quiet_pause_s:
                return
            pause = self._quiet_pause_s = min(120.0, self._quiet_pause_s * 2)
        self._next_reopen_at = now + pause
        reader.reopen()


class _Poller:
    """Asks where the prompt is, in a thread of its own, since a server may hang in the middle of it."""

    def __init__(self, client: ComfyClient, prompt_id: str, bell: threading.Event, poll_s: float) -> None:
        self._client = client
        self._prompt_id = prompt_id
        self._bell = bell
        self._poll_s = poll_s
        self._relaxed = False
        self._sights: collections.deque[tuple[float, Whereabouts | ComfyUnavailable | None]] = (
            collections.deque()
        )
        self._nudge = threading.Condition()
        self._due_at = 0.0
        self._history_first = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="comfy-poller", daemon=True)

    def start(self, *, first_after_s: float) -> None:
        self._due_at = time.monotonic() + first_after_s
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. A call that hangs is left behind; its thread ends with the call."""
        with self._nudge:
            self._stopped = True
            self._nudge.notify()

    def take(self) -> list[tuple[float, Whereabouts | ComfyUnavailable | None]]:
        """What was seen since the last call, each with the time at which it was asked for."""
        sights = []
        while self._sights:
            sights.append(self._sights.popleft())
        return sights

    def look_soon(self, within_s: float) -> None:
        with self._nudge:
            self._due_at = min(self._due_at, time.monotonic() + within_s)
            self._nudge.notify()

    def look_at_history(self) -> None:
        """The socket said that this was the last message: the history has it now, ask it alone."""
        with self._nudge:
            self._history_first = True
            self._due_at = 0.0
            self._nudge.notify()

    def set_relaxed(self, relaxed: bool) -> None:
        """While the socket speaks, look only every 2 s: ``/queue`` carries whole prompts."""
        if relaxed != self._relaxed:
            with self._nudge:
                self._relaxed = relaxed
                if not relaxed:
                    self._due_at = min(self._due_at, time.monotonic() + self._poll_s)
                    self._nudge.notify()

    def _run(self) -> None:
        try:
            self._poll()
        finally:
            self._client.release_thread()

    def _poll(self) -> None:
        while True:
            with self._nudge:
                while not self._stopped and (wait := self._due_at - time.monotonic()) > 0:
                    self._nudge.wait(wait)
                if self._stopped:
                    return
                history_first, self._history_first = self._history_first, False
                self._due_at = float("inf")
            began = time.monotonic()
            sight = self._look(history_first=history_first)
            took = time.monotonic() - began
            self._sights.append((began, sight))
            with self._nudge:
                if sight is None:
                    pause = 0.02
                elif self._relaxed:
                    pause = max(2.0, self._poll_s)
                else:
                    # A queue of thousands costs the server; asking takes a tenth of the time at most.
                    pause = max(self._poll_s, min(2.0, 10 * took))
                if not self._history_first:
                    self._due_at = min(self._due_at, time.monotonic() + pause)
            self._bell.set()

    def _look(self, *, history_first: bool) -> Whereabouts | ComfyUnavailable | None:
        """``None``: the history alone was asked and has nothing yet."""
        try:
            if history_first:
                entry = self._client.history(self._prompt_id, timeout_s=5.0)
                return None if entry is None else Whereabouts(Place.FINISHED, entry=entry)
            return self._client.look(self._prompt_id, timeout_s=5.0)
        except ComfyUnavailable as error:
            return error


class _Reader:
    """
    The socket and the thread that drains it.

    ``generation`` counts its connections, so that "the same socket from start to end" is a
    comparison of two numbers.
    """

    def __init__(
        self,
        client: ComfyClient,
        client_id: str,
        bell: threading.Event,
        *,
        socket_nodes: frozenset[str],
        previews: bool,
        max_frame_bytes: int,
    ) -> None:
        self._url = _socket_url(client.base_url, client_id)
        self._auth = client.basic_auth
        self._connect_timeout_s = client.connect_timeout_s
        self._bell = bell
        self.socket_nodes = socket_nodes
        self._previews = previews
        self._max_frame_bytes = max_frame_bytes
        self._frames: list[SocketFrame] = []
        self._frame_bytes = 0
        self.overflowed = False
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[int, Event | bytes]] = collections.deque()
        self._newest_state: tuple[int, bytes] | None = None
        self._newest_preview: tuple[int, PreviewImage] | None = None
        self.settled = threading.Event()
        """The first connection was greeted, or failed."""
        self.generation = 0
        self.connected = False
        self.opened_at = 0.0
        self.greeted_at: float | None = None
        """When the open socket got its greeting, a ``status`` that names its client."""
        self.last_message_at = 0.0
        self._last_sign_at = 0.0
        self._pinged_at: float | None = None
        self._executing: Executing | None = None
        self._stopping = threading.Event()
        self._reopening = False
        self._socket: websocket.WebSocket | None = None
        self._thread = threading.Thread(target=self._run, name="comfy-socket", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Say goodbye, so that the server forgets this client id, and end the thread."""
        self._stopping.set()
        socket = self._socket
        if socket is not None:
            with contextlib.suppress(websocket.WebSocketException, OSError, AttributeError):
                socket.send_close()
        if self._thread.is_alive():
            self._thread.join(0.5)

    def reopen(self) -> None:
        """Close the socket, wait for its end, and open a new one. Returns at once."""
        self._reopening = True
        self.connected = False

    def is_dead(self, now: float) -> bool:
        """Whether a ping sent 3 s ago is unanswered and nothing else came."""
        return self._pinged_at is not None and now - self._pinged_at > 3.0

    def take(self) -> list[tuple[int, Event | bytes]]:
        """
        What came since the last call, each with its generation. Bytes are a ``progress_state`` not
        yet parsed: it grows with the square of the nodes, and only the newest is worth reading.
        """
        with self._lock:
            items = list(self._waiting)
            self._waiting.clear()
            # Before the messages that end the prompt, or they would come after its end.
            for newest in (self._newest_state, self._newest_preview):
                if newest is not None:
                    items.insert(0, newest)
            self._newest_state = self._newest_preview = None
        return items

    def frames_of(self, prompt_id: str) -> tuple[SocketFrame, ...]:
        """The results of one prompt so far."""
        with self._lock:
            return tuple(frame for frame in self._frames if frame.prompt_id == prompt_id)

    def _run(self) -> None:
        backoff_s = 0.0
        while not self._stopping.wait(backoff_s):
            socket = self._open()
            if socket is None:
                self.settled.set()
                # The next one is tried at 2, 4, 8 s: without a socket polling does it alone.
                backoff_s = min(8.0, backoff_s * 2) if backoff_s else 2.0
                continue
            began = time.monotonic()
            try:
                self._drain(socket)
            finally:
                self.connected = False
                self._executing = None
                self._socket = None
                self._bell.set()
                # Wait for the server's own close: while it holds the old socket, a new one with the
                # same client id would be forgotten together with the old one.
                _hang_up(socket, timeout_s=1.0)
                self.settled.set()
            was_asked, self._reopening = self._reopening, False
            lived_s = time.monotonic() - began
            backoff_s = (
                0.0 if was_asked or lived_s > 2.0 else (min(8.0, backoff_s * 2) if backoff_s else 0.25)
            )

    def _open(self) -> websocket.WebSocket | None:
        headers = []
        if self._auth is not None:
            token = base64.b64encode(":".join(self._auth).encode()).decode()
            headers.append(f"Authorization: Basic {token}")
        self._reopening = False
        try:
            socket = websocket.create_connection(
                self._url,
                timeout=self._connect_timeout_s,
                suppress_origin=True,
                redirect_limit=0,
                http_no_proxy=["*"],
                header=headers,
                skip_utf8_validation=True,
            )
        except Exception:  # noqa: BLE001 - the library's handshake parser raises anything; polling goes on
            return None
        _cap_messages(socket)
        try:
            # Only as the very first message; it makes previews name their node and prompt.
            socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            socket.settimeout(0.25)
        except (websocket.WebSocketException, OSError):
            _hang_up(socket, timeout_s=0.0)
            return None
        now = time.monotonic()
        self._pinged_at = None
        self._executing = None
        self.greeted_at = None
        self.opened_at = self.last_message_at = self._last_sign_at = now
        self._socket = socket
        return socket

    def _drain(self, socket: websocket.WebSocket) -> None:
        generation = self.generation + 1
        greeted = False
        while not self._stopping.is_set() and not self._reopening:
            try:
                opcode, data = socket.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                if not self._keep_alive(socket, greeted=greeted):
                    return
                continue
            except (websocket.WebSocketException, OSError, ValueError, AttributeError):
                return
            now = self._last_sign_at = time.monotonic()
            self._pinged_at = None
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return
            if opcode not in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                continue
            self.last_message_at = now
            if not greeted:
                greeted = True
                self.generation = generation
                self.connected = True
                self.settled.set()
            self._take_message(generation, bytes(data), binary=opcode == websocket.ABNF.OPCODE_BINARY)

    def _keep_alive(self, socket: websocket.WebSocket, *, greeted: bool) -> bool:
        now = time.monotonic()
        if not greeted:
            return now - self.opened_at < 5.0
        if self._pinged_at is not None:
            return now - self._pinged_at < 20.0
        if now - self._last_sign_at > 2.0:
            try:
                socket.ping()
            except (websocket.WebSocketException, OSError):
                return False
            self._pinged_at = now
        return True

    def _take_message(self, generation: int, data: bytes, *, binary: bool) -> None:
        if not binary and data.startswith(_PROGRESS_STATE):
            with self._lock:
                self._newest_state = (generation, data)
            self._bell.set()
            return
        event = parse_binary(data) if binary else parse_text(data)
        if isinstance(event, Status) and event.sid is not None:
            self.greeted_at = time.monotonic()
        if isinstance(event, Unknown | Status):
            return
        if isinstance(event, PreviewImage):
            self._take_picture(generation, event)
            return
        if isinstance(event, Executing):
            self._executing = event if event.node is not None else None
        with self._lock:
            last = self._waiting[-1][1] if self._waiting else None
            if isinstance(event, Progress) and isinstance(last, Progress) and last.node == event.node:
                self._waiting.pop()  # the caller is behind; of one node's steps the newest is enough
            elif len(self._waiting) >= MAX_WAITING_EVENTS:
                self._waiting.popleft()
            self._waiting.append((generation, event))
        self._bell.set()

    def _take_picture(self, generation: int, picture: PreviewImage) -> None:
        node, prompt = picture.node_id, picture.prompt_id
        if node is None and self._executing is not None:
            # Event 1 says neither; the node that executes is the one that sent it.
            node = self._executing.display_node or self._executing.node
            prompt = self._executing.prompt_id
        if node is None:
            return  # somebody else's, whose prompt has no client id
        result_of = next(
            (name for name in (node, picture.display_node_id) if name in self.socket_nodes), None
        )
        if result_of is not None:
            self._keep_frame(SocketFrame(result_of, prompt, picture.image_type, picture.data))
        elif self._previews:
            preview = PreviewImage(picture.image_type, picture.data, node, prompt, picture.display_node_id)
            with self._lock:
                self._newest_preview = (generation, preview)
            self._bell.set()

    def _keep_frame(self, frame: SocketFrame) -> None:
        with self._lock:
            if self._frame_bytes + len(frame.data) > self._max_frame_bytes:
                self.overflowed = True
                return
            self._frame_bytes += len(frame.data)
            self._frames.append(frame)


def _socket_url(base_url: str, client_id: str) -> str:
    parts = urlsplit(base_url)
    scheme = "wss" if parts.scheme == "https" else "ws"
    query = f"clientId={quote(client_id, safe='')}"
    return urlunsplit((scheme, parts.netloc, f"{parts.path}/ws", query, ""))


def _hang_up(socket: websocket.WebSocket, *, timeout_s: float) -> None:
    """Close politely for at most *timeout_s*, then for certain: ``close`` alone may keep the descriptor."""
    with contextlib.suppress(Exception):
        socket.close(timeout=timeout_s)
    with contextlib.suppress(Exception):
        socket.shutdown()  # type: ignore[no-untyped-call]  # the library leaves this one untyped


def _cap_messages(socket: websocket.WebSocket) -> None:
    """websocket-client believes any length a frame announces; ours refuses absurd ones."""
    buffer: Any = socket.frame_buffer
    receive = buffer.recv_strict

    def capped(size: int) -> bytes:
        if size > MAX_MESSAGE_BYTES:
            msg = "message too large"
            raise websocket.WebSocketPayloadException(msg)
        data: bytes = receive(size)
        return data

    buffer.recv_strict = capped
