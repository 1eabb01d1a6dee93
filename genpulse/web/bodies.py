"""
What comes in, read strictly and within bounds: JSON bodies and uploaded files.

JSON that one reader takes for this and another for that is refused here, before anybody acts on
it: repeated keys, ``NaN``, numbers no other program can hold, lone surrogates, NUL characters
(PostgreSQL keeps neither in text) and nesting without end. Files go through a temporary file, so
memory stays the same whatever their size, and their type is read from their bytes, not from what
the caller says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, cast

import filetype
from flask import current_app, request
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from genpulse.errors import QueueFull
from genpulse.storage import clean_filename
from genpulse.tasks.admission import DISK_RETRY_AFTER_S, NO_ROOM
from genpulse.web.problems import Problem, pointer
from genpulse.web.service import service

__all__ = ["MAX_DEPTH", "Upload", "check_values", "read_json", "read_upload", "sniff_type"]

MAX_DEPTH = 64
"""Deepest nesting of a JSON body; workflows of real life stay under ten."""

_NUMBERS = (-(2**63), 2**64 - 1)
"""Whole numbers every reader keeps exactly; ComfyUI's seeds go up to the upper end."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_CHUNK_BYTES = 64 * 1024
_SPOOL_BYTES = 512 * 1024
_HEAD_BYTES = 8192
_DRAIN_BYTES = 8 * 2**20
_DRAIN_S = 2.0
_PART_HEADER_BYTES = 256 * 1024
_MAX_PARTS = 100
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def read_json() -> Iterator[Any]:
    """
    The request's JSON body, counted as memory in use for as long as the block lasts.

    Raises:
        QueueFull: This process has as many bytes of bodies in hand as it may.
        Problem: 415 for another media type, 413 above the app's ``MAX_CONTENT_LENGTH`` (counted
            while reading, so a chunked body is bounded as well), 400 ``invalid_json`` for what is
            not JSON, 422 ``invalid_request`` for JSON that could not be kept, 408 for what comes
            too slowly (:mod:`genpulse.web.pace`).
    """
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise Problem(415, detail="Send the body as application/json.")
    if request.mimetype_params.get("charset", "utf-8").lower() not in {"utf-8", "utf8"}:
        raise Problem(415, detail="JSON is UTF-8; send no other charset.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, detail="Send the body without a Content-Encoding.")
    limit = int(current_app.config["MAX_CONTENT_LENGTH"])
    with contextlib.ExitStack() as stack:
        with _receiving(f"The body is larger than {limit} bytes."):
            announced = min(request.content_length or 0, limit)
            count = stack.enter_context(service().admission.reading(announced))
            body = _read_all(limit, count)
        yield _parse(body)


def _parse(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
        is_harmless = not _SUSPECT.search(text)
        value = (_PLAIN_DECODER if is_harmless else _DECODER).decode(text)
    except UnicodeDecodeError:
        raise _invalid_json("The body is not valid UTF-8.") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if is_harmless:
        if _is_too_deep(value, MAX_DEPTH):
            raise _too_deep()
    else:
        check_values(value)
    return value


def _read_all(limit: int, count: Callable[[int], None]) -> bytes:
    """
    The whole body, or "too large" if it has more bytes than *limit*; *count* is told of each piece.

    ``request.get_data`` cuts a chunked body off at the limit and calls what is left the body; then
    the beginning of a body could be taken for all of it.
    """
    request.max_content_length = limit + 1
    found = bytearray()
    while chunk := request.stream.read(min(_CHUNK_BYTES, limit + 1 - len(found))):
        count(len(chunk))
        found += chunk
        if len(found) > limit:
            raise RequestEntityTooLarge
    return bytes(found)


@contextlib.contextmanager
def _receiving(too_large: str) -> Iterator[None]:
    """
    Make "too slow" a 408, "too large" a 413 that its caller gets to read, and let "no room" be read as well.

    A caller that is still sending when the connection closes sees a broken pipe and no answer, so
    a little more is taken in and thrown away first.
    """
    try:
        yield
    except ClientDisconnected as error:
        # Werkzeug's word for every failure to read; the server's own is behind it.
        if isinstance(error.__context__, TimeoutError):
            raise Problem(408, detail="The body came too slowly.", retryable=True) from None
        raise
    except (QueueFull, RequestEntityTooLarge) as error:
        # Without this word of the server's, reading on might wait for bytes that never come.
        if request.environ.get("wsgi.input_terminated"):
            source, until = request.environ["wsgi.input"], time.monotonic() + _DRAIN_S
            with contextlib.suppress(OSError):
                for _ in range(_DRAIN_BYTES // _CHUNK_BYTES):
                    if time.monotonic() > until or not source.read(_CHUNK_BYTES):
                        break
        if isinstance(error, QueueFull):
            raise
        raise Problem(413, detail=too_large) from None


@contextlib.contextmanager
def _refusing_on_full_disk() -> Iterator[None]:
    """A disk that is full, or a quota, is no fault of the request's and none of ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise QueueFull(NO_ROOM, retry_after_s=DISK_RETRY_AFTER_S) from error


def check_values(value: Any) -> None:
    """
    Refuse a JSON value that could not be stored or sent on.

    Raises:
        Problem: 422 with the place of a NUL character, half a surrogate pair, a number beyond 64
            bits, or nesting deeper than :data:`MAX_DEPTH`.
    """
    _check(value, [])


@dataclass(frozen=True, slots=True)
class Upload:
    """A received file: open at its start, hashed, its type read from its content."""

    stream: BinaryIO
    name: str
    size_bytes: int
    sha256: str
    content_type: str
    extension: str
    """With its dot, or empty where the type has none we trust."""


@contextlib.contextmanager
def read_upload(max_bytes: int) -> Iterator[Upload]:
    """
    The one part named ``file`` of a ``multipart/form-data`` body, for as long as the block lasts.

    Raises:
        Problem: 415 for another media type, 413 above *max_bytes*, 408 for what comes too slowly, 400
            for a broken form, 422 for a form without a part ``file``, with two of them, or with an empty one.
        QueueFull: There is no room for it on the disks.
    """
    boundary = request.mimetype_params.get("boundary", "")
    if request.mimetype != "multipart/form-data":
        raise Problem(415, detail="Send the file as multipart/form-data, in a part named file.")
    if not boundary or not boundary.isascii() or len(boundary) > 200:
        raise Problem(400, "invalid_form", "The multipart boundary is missing or unusable.")
    # The form's own lines come on top of the file's bytes.
    request.max_content_length = max_bytes + _PART_HEADER_BYTES
    too_large = f"The file is larger than {max_bytes} bytes, or the form around it is."
    with contextlib.ExitStack() as stack:
        with _receiving(too_large):
            announced = min(request.content_length or 0, max_bytes)
            count = stack.enter_context(service().admission.receiving(announced))
        # Closing it writes once more what did not go to the disk, and fails again.
        stack.enter_context(_refusing_on_full_disk())
        spool = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES))
        with _receiving(too_large), _refusing_on_full_disk():
            upload = _receive(cast("BinaryIO", spool), boundary.encode("ascii"), max_bytes, count)
        yield upload


def sniff_type(head: bytes) -> tuple[str, str]:
    """Content type and extension (with its dot) of a file that begins with *head*."""
    kind = filetype.guess(head)
    if kind is not None:
        return str(kind.mime), f".{kind.extension}"
    # A cut through the last character is no reason to call a text binary.
    with contextlib.suppress(UnicodeDecodeError):
        text = head.decode("utf-8") if len(head) < _HEAD_BYTES else head[:-4].decode("utf-8", "ignore")
        if text and "\ufffd" not in text and not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
            return "text/plain", ".txt"
    return "application/octet-stream", ""


def _receive(spool: BinaryIO, boundary: bytes, max_bytes: int, count: Callable[[int], None]) -> Upload:
    digest = hashlib.sha256()
    head = b""
    size = 0
    name: str | None = None
    in_file = False
    # Bounds what is held at one time: a part's headers, or the bytes that may start a boundary.
    decoder = MultipartDecoder(boundary, _PART_HEADER_BYTES)
    parts = 0
    try:
        for event in _events(decoder):
            if isinstance(event, File | Field):
                parts += 1
                if parts > _MAX_PARTS:
                    raise Problem(400, "invalid_form", f"The form has more than {_MAX_PARTS} parts.")
                in_file = isinstance(event, File) and event.name == "file"
                if isinstance(event, File) and event.name == "file":
                    if name is not None:
                        raise Problem(
                            422, detail="Send one file at a time.", errors=[("/file", "given twice")]
                        )
                    name = event.filename
            elif in_file:
                size += len(event.data)
                if size > max_bytes:
                    raise RequestEntityTooLarge
                count(len(event.data))
                head += event.data[: _HEAD_BYTES - len(head)]
                digest.update(event.data)
                spool.write(event.data)
    except (ValueError, UnicodeDecodeError):
        raise Problem(400, "invalid_form", "The multipart form is broken.") from None
    if name is None:
        raise Problem(422, detail="The form has no part named file.", errors=[("/file", "is required")])
    if not size:
        raise Problem(422, detail="The file is empty.", errors=[("/file", "is empty")])
    spool.seek(0)
    content_type, extension = sniff_type(head)
    return Upload(spool, clean_filename(name) or "file", size, digest.hexdigest(), content_type, extension)


def _events(decoder: MultipartDecoder) -> Iterator[File | Field | Data]:
    stream = request.stream
    while True:
        event = decoder.next_event()
        if isinstance(event, Epilogue):
            return
        if isinstance(event, NeedData):
            decoder.receive_data(stream.read(_CHUNK_BYTES) or None)
        elif isinstance(event, File | Field | Data):
            yield event


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _invalid_json("An object of the body has the same key twice.")
    return found


def _constant(name: str) -> NoReturn:
    raise _invalid_json(f"{name} is not JSON.")


def _integer(text: str) -> int:
    # Python refuses to read more than 4,300 digits, and takes long for what is just below.
    if len(text) > 40:
        raise Problem(422, detail="A number of the body is beyond 64 bits.")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)

_PLAIN_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)

_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])|[0-9]{19}|[0-9][eE]\+?[0-9]{3}")
"""
What every text has that :func:`check_values` would refuse: an escape for NUL or for half a pair, a long
number or a large exponent. Looking at each value of a body of megabytes takes seconds, this takes
milliseconds; what only looks suspect is then looked at value by value.
"""


def _is_too_deep(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if not left:
        return True
    return any(
        _is_too_deep(item, left - 1)
        for item in (value.values() if isinstance(value, dict) else value)
        if isinstance(item, dict | list)
    )


def _check(value: Any, path: list[str | int]) -> None:
    """Refuse what could not be stored or sent on, with its place. *path* is where *value* stands."""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict | list):
        if len(path) >= MAX_DEPTH:
            raise _too_deep()
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                _check_text(key, [*path, key])
            path.append(key)
            _check(item, path)
            path.pop()
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _refused(path, "is too large a number")
    elif isinstance(value, int) and not _NUMBERS[0] <= value <= _NUMBERS[1]:
        raise _refused(path, "is a number beyond 64 bits")


def _check_text(text: str, path: list[str | int]) -> None:
    if "\0" in text:
        raise _refused(path, "has a NUL character, which cannot be stored")
    if not text.isascii() and _SURROGATES.search(text):
        raise _refused(path, "has half of a surrogate pair, which is no character")


def _refused(path: list[str | int], reason: str) -> Problem:
    # A pointer may go through the very key that is refused.
    where = _SURROGATES.sub("\ufffd", pointer(path).replace("\0", "\ufffd"))[:500]
    return Problem(422, "invalid_request", f"{where or 'The body'} {reason}.", errors=[(where, reason)])


def _too_deep() -> Problem:
    return Problem(422, "invalid_request", f"The body is nested deeper than {MAX_DEPTH} levels.")


def _invalid_json(detail: str) -> Problem:
    return Problem(400, "invalid_json", detail)
