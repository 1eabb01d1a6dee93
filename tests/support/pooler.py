"""
A door to PostgreSQL that refuses clients which send options, as PgBouncer does.

Source: PostgreSQL manual, "Message Formats"; PgBouncer's manual, ``ignore_startup_parameters``.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

__all__ = ["refusing_options"]

_SSL_REQUEST = 80877103
_GSS_REQUEST = 80877104


@contextlib.contextmanager
def refusing_options(url: str) -> Iterator[tuple[str, list[bool]]]:
    """The URL of the door before the database at *url*; and for each client, whether it was refused."""
    parsed = sa.make_url(url)
    refused: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            while True:
                try:
                    client, _ = door.accept()
                except OSError:
                    return
                threading.Thread(target=_meet, args=(client, parsed, refused), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        at = parsed.set(host="127.0.0.1", port=door.getsockname()[1])
        yield at.render_as_string(hide_password=False), refused


def _meet(client: socket.socket, target: Any, refused: list[bool]) -> None:
    with client, contextlib.suppress(OSError):
        while True:
            head = client.recv(8, socket.MSG_WAITALL)
            size, code = struct.unpack("!ii", head)
            body = client.recv(size - 8, socket.MSG_WAITALL) if size > 8 else b""
            if code not in {_SSL_REQUEST, _GSS_REQUEST}:
                break
            client.sendall(b"N")
        refused.append(b"options\0" in body)
        if refused[-1]:
            fields = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0"
            client.sendall(b"E" + struct.pack("!i", 4 + len(fields)) + fields)
            return
        with socket.create_connection((target.host, target.port or 5432)) as server:
            server.sendall(head + body)
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
