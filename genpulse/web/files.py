"""
Stored bytes on their way out: in pieces (``Range``), not twice (``ETag``), never as a page.

A stored file is somebody else's content on our origin. Whatever a browser could run (HTML, SVG,
XML, scripts) goes out as an attachment of no type, and everything goes out sandboxed and unsniffed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from flask import Response, request
from werkzeug.http import unquote_etag

from genpulse.storage import StorageProvider, content_disposition, shows_inline
from genpulse.web.problems import Problem

__all__ = ["send_stored"]

_CHUNK_BYTES = 256 * 1024


def send_stored(
    storage: StorageProvider, key: str, *, content_type: str, size_bytes: int, sha256: str, name: str
) -> Response:
    """
    Answer the bytes under *key*, whole or the one range that was asked for.

    Raises:
        ObjectNotFound: Storage holds no such key (any more).
        Problem: 416 for a range that lies outside the file; 412 for an ``If-Match`` that does not fit.
        StorageUnavailable: The storage does not answer.
    """
    inline = shows_inline(content_type)
    headers = {
        "ETag": f'"{sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
        "Content-Disposition": content_disposition(name, inline=inline),
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if request.if_match and not request.if_match.contains(sha256):
        raise Problem(412, detail="The file is not the one that If-Match names.")
    if request.if_none_match and request.if_none_match.contains_weak(sha256):
        storage.stat(key)  # what is gone is gone, even for a caller that has it
        return Response(status=304, headers=headers)
    start, stop, status = 0, size_bytes, 200
    if (wanted := _range(sha256, size_bytes)) is not None:
        start, stop, status = *wanted, 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
    answer = Response(status=status, headers=headers)
    answer.content_type = content_type if inline else "application/octet-stream"
    if request.method == "HEAD":
        storage.stat(key)
    else:
        # Opened before the first byte goes out, so that a missing object is an error and not half an answer.
        stream = storage.open(key, start=start, length=stop - start)
        # No direct_passthrough: with it werkzeug hands the pieces to the server as they are, and
        # nothing that is to happen when the answer is closed ever does.
        answer.response = _pieces(stream)
        answer.call_on_close(stream.close)
    answer.content_length = stop - start
    return answer


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _range(sha256: str, size_bytes: int) -> tuple[int, int] | None:
    """First byte and the one after the last; ``None`` for all, which is what several ranges get too."""
    wanted = request.range
    if request.method != "GET" or wanted is None or wanted.units != "bytes" or len(wanted.ranges) != 1:
        return None
    condition = request.headers.get("If-Range")
    if condition is not None and unquote_etag(condition) != (sha256, False):
        return None
    first, stop = wanted.ranges[0]
    if first < 0:  # the last so many; of a shorter file that is all (RFC 9110, 14.1.2)
        first, stop = max(0, size_bytes + first), size_bytes
    if first >= size_bytes:
        outside = {"Content-Range": f"bytes */{size_bytes}"}
        raise Problem(416, detail=f"The file has {size_bytes} bytes.", headers=outside)
    return first, min(stop if stop is not None else size_bytes, size_bytes)
