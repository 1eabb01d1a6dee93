"""
The WebSockets of one server and the single loop that sends to them.

Messages are posted from any thread and sent in order by one task, as in ComfyUI; whoever has no open
socket misses them. Two well-known traps come from that very shape and are kept: a socket that does not
read holds up everybody, and the end of an old socket takes the new one of the same clientId with it.

Source: ComfyUI 0.3.64 ``server.py`` (``websocket_handler``, ``send``, ``publish_loop``); traces 11 to 14,
18, 19, 30, 42.
"""

from __future__ import annotations

import asyncio
import io
import json
import struct
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image

from genpulse.testing.simulator.faults import Faults

__all__ = ["Hub"]

PREVIEW_IMAGE = 1
TEXT = 3
PREVIEW_IMAGE_WITH_METADATA = 4
_FORMATS = {"JPEG": 1, "PNG": 2}
_UNREAD_S = 0.5
"""How long a repaired send loop waits for a socket before it resets it."""


class Hub:
    """
    Sockets by client id, and what the worker says about the prompt that runs.

    *crash* is called with an exit code when a message cannot be sent at all, which ends a real server.
    """

    def __init__(
        self,
        faults: Faults,
        *,
        features: dict[str, Any],
        queue_info: Callable[[], dict[str, Any]],
        crash: Callable[[int], None],
    ) -> None:
        self.client_id: Any = None
        """Whose prompt runs, or ran last: the receiver of progress. Written by the worker."""
        self.last_node_id: str | None = None
        self._faults = faults
        self._features = features
        self._queue_info = queue_info
        self._crash = crash
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._client_features: dict[str, dict[str, Any]] = {}
        self._transports: dict[web.WebSocketResponse, asyncio.BaseTransport | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._messages: asyncio.Queue[tuple[Any, Any, Any]] = asyncio.Queue()
        self._publisher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send; called inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._publisher = self._loop.create_task(self._publish())

    def stop(self) -> None:
        """Stop sending and reset every socket; called inside the event loop."""
        self._loop = None
        if self._publisher is not None:
            self._publisher.cancel()
        self.drop_all()

    def post(self, event: Any, data: Any, sid: Any = None) -> None:
        """Send a message to the client *sid*, or to all; from any thread, without waiting."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._messages.put_nowait, (event, data, sid))

    def supports_metadata(self, sid: Any) -> bool:
        """Whether this client asked for previews with metadata (event 4 instead of 1)."""
        flags = self._client_features.get(sid, {})
        return flags.get("supports_preview_metadata", False) is True

    def drop_all(self) -> None:
        """Reset every connection that carries a socket, without a close frame."""
        for transport in list(self._transports.values()):
            _abort(transport)

    @property
    def open_sockets(self) -> int:
        """How many clients would get a broadcast."""
        return len(self._sockets)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One WebSocket from its opening to its end."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._transports[socket] = request.transport
        sid = request.rel_url.query.get("clientId", "")
        if sid:
            self._sockets.pop(sid, None)
        else:
            sid = uuid.uuid4().hex
        self._sockets[sid] = socket
        self._client_features[sid] = {}
        try:
            await self._send("status", {"status": self._queue_info(), "sid": sid}, sid)
            if self.client_id == sid and self.last_node_id is not None:
                await self._send("executing", {"node": self.last_node_id}, sid)
            await self._listen(socket, sid)
        finally:
            del self._transports[socket]
            if self._faults.client_id_trap or self._sockets.get(sid) is socket:
                self._sockets.pop(sid, None)
                self._client_features.pop(sid, None)
        return socket

    async def _listen(self, socket: web.WebSocketResponse, sid: str) -> None:
        first = True
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                data = json.loads(message.data)
            except ValueError:
                continue  # what is no JSON does not count as the first message [trace 19]
            if first and isinstance(data, dict) and data.get("type") == "feature_flags":
                flags = data.get("data", {})
                self._client_features[sid] = flags if isinstance(flags, dict) else {}
                await self._send("feature_flags", self._features, sid)
            first = False

    async def _publish(self) -> None:
        try:
            while True:
                await self._send(*await self._messages.get())
        except Exception:  # noqa: BLE001  an unhashable client_id, a value that is no JSON: the process dies [trace 42]
            self._crash(134)

    async def _send(self, event: Any, data: Any, sid: Any) -> None:
        if isinstance(event, int):
            payload: str | bytes = struct.pack(">I", event) + _frame(data)
        else:
            payload = ""
        if sid is None:
            receivers = list(self._sockets.values())
        elif sid in self._sockets:
            receivers = [self._sockets[sid]]
        else:
            return
        if not isinstance(event, int):
            payload = json.dumps({"type": event, "data": data})
        for socket in receivers:
            if self._faults.mute_sockets and event != "feature_flags":
                continue
            await self._deliver(socket, payload)
        if receivers and self._faults.drop_after_messages > 0:
            self._faults.take("drop_after_messages")
            if self._faults.drop_after_messages == 0:
                self.drop_all()

    async def _deliver(self, socket: web.WebSocketResponse, payload: str | bytes) -> None:
        send = socket.send_str(payload) if isinstance(payload, str) else socket.send_bytes(payload)
        with suppress(ConnectionError, RuntimeError):
            if self._faults.shared_send_loop:
                await send
            else:
                try:
                    await asyncio.wait_for(send, _UNREAD_S)
                except TimeoutError:
                    _abort(self._transports.get(socket))


def preview_frame(fmt: str, image: Image.Image) -> bytes:
    """The body of event 1 after its number: image format and image."""
    return struct.pack(">I", _FORMATS[fmt]) + _encoded(fmt, image)


def preview_frame_with_metadata(fmt: str, image: Image.Image, metadata: dict[str, Any]) -> bytes:
    """The body of event 4 after its number: length of the metadata, metadata, image."""
    head = json.dumps({**metadata, "image_type": f"image/{fmt.lower()}"}).encode()
    return struct.pack(">I", len(head)) + head + _encoded(fmt, image)


def text_frame(node_id: str, text: str) -> bytes:
    """The body of event 3 after its number: length of the node id, node id, text."""
    name = node_id.encode()
    return struct.pack(">I", len(name)) + name + text.encode()


def _abort(transport: asyncio.BaseTransport | None) -> None:
    if isinstance(transport, asyncio.Transport):
        transport.abort()


def _encoded(fmt: str, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, quality=95, compress_level=1)
    return buffer.getvalue()


def _frame(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(f"no frame: {data!r}")
    return data
