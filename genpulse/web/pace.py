"""
gunicorn's threads for callers who may be slow, but not for ever: :class:`PacedThreads`.

gunicorn's own thread worker waits without a limit once the first byte has come. So a stranger, who needs
no key for it, could hold every thread with a byte each. Here the head of a request has to be there in
:data:`HEAD_S` seconds, no single wait for a caller lasts longer than :data:`STALL_S`, and after
:data:`GRACE_S` seconds of waiting whoever sends a body or takes an answer has to have moved
:data:`FLOOR_BYTES_S` bytes for each further one. A file of any size goes over any line faster than that.

Only waiting for the caller counts: an event stream may be silent, and a view may think, as long as they like.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

__all__ = ["FLOOR_BYTES_S", "GRACE_S", "HEAD_S", "STALL_S", "PacedSocket", "PacedThreads"]

HEAD_S = 15.0
"""From the first byte of a request to the end of its head."""
STALL_S = 30.0
"""Longest wait for the next byte from a caller, and for room for the next byte to one."""
GRACE_S = 30.0
"""So much waiting is free for each request, one way and the other."""
FLOOR_BYTES_S = 1024
"""Bytes that have to be moved for each second of waiting after that."""


class _Pace:
    """What was moved one way, and for how long that was waited for."""

    def __init__(self) -> None:
        self._moved_bytes = 0
        self._waited_s = 0.0

    def is_kept(self, moved_bytes: int, waited_s: float) -> bool:
        self._moved_bytes += moved_bytes
        self._waited_s += waited_s
        return self._moved_bytes >= FLOOR_BYTES_S * (self._waited_s - GRACE_S)


def _nothing() -> None:
    """Nobody wants to be told."""


class PacedSocket(socket.socket):
    """
    A caller's connection that waits for the caller as the module says.

    A head that comes too slowly looks as if the caller had hung up, and an answer that is taken too
    slowly as if the connection broke: gunicorn takes both quietly. Of a body the reader is told, by
    ``TimeoutError``, because it can still answer.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.begin_head()

    @classmethod
    def of(cls, accepted: socket.socket) -> PacedSocket:
        """Take a socket over; *accepted* is empty afterwards."""
        family, kind, protocol = accepted.family, accepted.type, accepted.proto
        return cls(family, kind, protocol, fileno=accepted.detach())

    def begin_head(self) -> None:
        """What is received next is the head of a request; its time begins with its first byte."""
        self._in_head = True
        self._head_ends: float | None = None
        self._on_late: Callable[[], None] = _nothing
        self._receiving, self._sending = _Pace(), _Pace()

    def begin_body(self, on_late: Callable[[], None]) -> None:
        """The head is complete. *on_late* is called before a read of the body fails for slowness."""
        self._in_head, self._on_late = False, on_late

    def setblocking(self, flag: bool, /) -> None:
        """To gunicorn this socket may block; but never for ever."""
        self.settimeout(STALL_S if flag else 0.0)

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """
        Receive at most *size* bytes; none if the connection is at its end, or a head is late.

        Raises:
            TimeoutError: The body comes too slowly.
        """
        return self._recv_head(size, flags) if self._in_head else self._recv_body(size, flags)

    def _recv_head(self, size: int, flags: int) -> bytes:
        now = time.monotonic()
        if self._head_ends is None:  # asked for when there is something to receive
            self._head_ends = now + HEAD_S
        patience, left = self.gettimeout(), self._head_ends - now
        if left <= 0:
            return b""
        self.settimeout(left if patience is None else min(left, patience))
        try:
            return super().recv(size, flags)
        except TimeoutError:
            return b""
        finally:
            self.settimeout(patience)

    def _recv_body(self, size: int, flags: int) -> bytes:
        began = time.monotonic()
        try:
            found = super().recv(size, flags)
        except TimeoutError:
            found = None
        # At the end of the connection there is nothing more to wait for.
        if found == b"" or (found and self._receiving.is_kept(len(found), time.monotonic() - began)):
            return found
        self._on_late()
        raise TimeoutError("the body comes too slowly")

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """
        Send all of *data*, however long that takes at a tolerable pace.

        Raises:
            BrokenPipeError: The caller takes it too slowly.
        """
        left = memoryview(data).cast("B")
        while left:
            began = time.monotonic()
            try:
                sent = super().send(left, flags)
            except TimeoutError:
                sent = 0
            left = left[sent:]
            # Python's own would want all of it within one time-out, be it a word or many megabytes.
            if not sent or not self._sending.is_kept(sent, time.monotonic() - began):
                raise BrokenPipeError(errno.EPIPE, "the caller takes the answer too slowly")


class PacedThreads(ThreadWorker):  # type: ignore[misc]  # gunicorn has no annotations
    """gunicorn's ``gthread``, on :class:`PacedSocket`; TLS, if there is any, is the business of a proxy before it."""

    def enqueue_req(self, conn: Any) -> None:
        """By the main loop: each connection comes by here before a thread takes it."""
        if type(conn.sock) is socket.socket:
            conn.sock = PacedSocket.of(conn.sock)
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """By a thread: everything about one request."""
        if isinstance(conn.sock, PacedSocket):
            conn.sock.begin_head()
        goes_on = super().handle(conn)
        if not goes_on and conn.sock.fileno() >= 0:
            # It lingers for up to two seconds. The main loop, which would do it, has all others to serve.
            conn.close(graceful=True)
        return goes_on

    def handle_request(self, req: Any, conn: Any) -> Any:
        """By a thread, once the head is read."""
        if isinstance(conn.sock, PacedSocket):
            conn.sock.begin_body(req.force_close)
        return super().handle_request(req, conn)

    def finish_request(self, conn: Any, fs: Any) -> None:
        """By the main loop, when the thread is done with a connection."""
        if conn.sock.fileno() < 0:
            self.nr_conns -= 1
        else:
            super().finish_request(conn, fs)
