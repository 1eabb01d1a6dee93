"""
What every storage backend promises, and the algorithm they share.

:class:`StorageProvider` owns the order of things: check the key, stage the whole stream while
counting and hashing it, publish it in one step, verify what is there. A backend adds seven small
primitives (``_stage``, ``_publish``, ``_stat``, ``_open``, ``_delete``, ``_keys``, ``check``).

Promises:

- A reader sees the whole old object, the whole new one, or :class:`~genpulse.errors.ObjectNotFound`;
  never a part of one, whatever died in the middle.
- ``upload_file`` returns only when the bytes in the store were compared with those that were read.
- A source that fails keeps its own error; a store that fails raises
  :class:`~genpulse.errors.StorageUnavailable`, without address, path or secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, BinaryIO
from urllib.parse import quote

from genpulse.errors import ObjectNotFound, Permanent, StorageUnavailable

__all__ = [
    "InvalidKey",
    "StorageProvider",
    "StoredObject",
    "check_key",
    "clean_filename",
    "content_disposition",
    "shows_inline",
]

CHUNK_BYTES = 1024 * 1024
DEFAULT_TYPE = "application/octet-stream"
RESERVED = ".genpulse"
"""First part of a path that is never a key: local storage's own files lie there."""

_MAX_KEY_BYTES = 900  # S3 allows 1024; the rest is for the bucket prefix
_MAX_PART_BYTES = 255  # one file name on every file system we meet
_MAX_FILENAME_BYTES = 200


class InvalidKey(Permanent, ValueError):
    """The text cannot be a key, in any backend."""

    code = "storage_failed"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """
    One object as the backend knows it.

    ``sha256`` (lowercase hex) and ``filename`` are ``None`` for objects that came into the store
    by other hands.
    """

    key: str
    size_bytes: int
    content_type: str
    sha256: str | None = None
    filename: str | None = None


class StorageProvider(ABC):
    """
    Keep byte streams under keys, whole or not at all.

    A key is a relative path of printable text, ``a/b/c.png``, at most 900 bytes of UTF-8. Do not use a
    key as the folder of another one (``a`` and ``a/b``): a directory cannot hold both.
    Instances may be shared by threads and survive a fork.
    """

    signs_urls: bool
    """True: callers are sent to ``get_url``, a signed link. False: the API reads the bytes for them."""

    def upload_file(
        self, key: str, stream: BinaryIO, *, content_type: str, filename: str | None = None
    ) -> StoredObject:
        """
        Store *stream*, read to its end, under *key*, replacing what was there.

        Memory stays bounded whatever the size. Nothing is visible until the stream ended well.

        Args:
            content_type: Kept and given back; a malformed one becomes ``application/octet-stream``.
            filename: The name to offer when a person downloads it; cleaned by :func:`clean_filename`.

        Raises:
            InvalidKey: The key is not allowed.
            StorageUnavailable: The store did not take the bytes, or holds other bytes than were sent.
                Whatever *stream* raises goes through unchanged.
        """
        check_key(key)
        with self._stage() as staged:
            size, digest = _copy(stream, staged)
            wanted = StoredObject(
                key=key,
                size_bytes=size,
                content_type=_clean_type(content_type),
                sha256=digest,
                filename=clean_filename(filename),
            )
            staged.seek(0)
            vouched = self._publish(staged, wanted)
        self._verify(wanted, vouched=vouched)
        return wanted

    def open(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        """
        A stream of the object's bytes, to be closed (it is its own context manager). It cannot seek.

        Args:
            start: First byte to give; at or behind the end the stream is empty.
            length: How many bytes at most; ``None`` means to the end.

        Raises:
            ObjectNotFound: No such key.
            StorageUnavailable: Now, or from ``read`` when the connection is lost on the way.
        """
        if start < 0 or (length is not None and length < 0):
            msg = "start and length count bytes from 0"
            raise ValueError(msg)
        check_key(key)
        if length == 0:
            self._stat(key)
            return io.BytesIO()
        return self._open(key, start, length)

    def stat(self, key: str) -> StoredObject:
        """
        Size, type, digest and name of the object.

        Raises:
            ObjectNotFound: No such key.
            StorageUnavailable: The store did not answer.
        """
        return self._stat(check_key(key))

    @abstractmethod
    def get_url(
        self,
        key: str,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        expires_s: int | None = None,
    ) -> str:
        """
        A link to the object, made without asking the store whether the object exists.

        Args:
            filename: What a browser should call the file.
            content_type: What the answer should claim to be; only signed links can promise it.
            expires_s: How long a signed link works.
        """

    def delete_file(self, key: str) -> None:
        """Remove the object. One that is not there is fine, so clean-up can be repeated."""
        self._delete(check_key(key))

    def delete_below(self, folder: str) -> int:
        """
        Remove every object whose key begins with *folder*, which ends with a slash; returns how many.

        May be repeated, also after it was cut short. What is stored there meanwhile may stay.

        Raises:
            InvalidKey: Not the beginning of a key; ``a/1`` without its slash would also mean ``a/10``.
        """
        if not folder.endswith("/"):
            msg = "a folder ends with a slash"
            raise InvalidKey(msg)
        check_key(folder.removesuffix("/"))
        found = list(self._keys(folder))
        for key in found:
            self._delete(key)
        return len(found)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Every key that begins with the text *prefix*, in no promised order."""
        return self._keys(prefix)

    @abstractmethod
    def check(self) -> None:
        """
        Prove that the store can be used with this configuration.

        Raises:
            StorageUnavailable: Says what is missing, without a secret.
        """

    @abstractmethod
    def collect_leftovers(self, older_than_s: float) -> int:
        """Remove what crashed uploads left behind and nobody writes to; returns how many."""

    def close(self) -> None:  # noqa: B027 - a directory has nothing to close
        """Give back connections. The next call would open new ones."""

    # What a backend adds.

    @abstractmethod
    def _stage(self) -> AbstractContextManager[IO[bytes]]:
        """A new private file to write and read; gone at the end unless it was published."""

    @abstractmethod
    def _publish(self, staged: IO[bytes], wanted: StoredObject) -> bool:
        """
        Make *staged* (rewound) the object, in one step for readers.

        Returns:
            Whether the bytes at rest are already proven; if not they are read back.
        """

    @abstractmethod
    def _stat(self, key: str) -> StoredObject: ...

    @abstractmethod
    def _open(self, key: str, start: int, length: int | None) -> BinaryIO: ...

    @abstractmethod
    def _delete(self, key: str) -> None: ...

    @abstractmethod
    def _keys(self, prefix: str) -> Iterator[str]: ...

    def _verify(self, wanted: StoredObject, *, vouched: bool) -> None:
        try:
            found = self._stat(wanted.key)
        except ObjectNotFound as error:
            msg = "the store took the object and does not have it"
            raise StorageUnavailable(msg) from error
        if found.sha256 not in {None, wanted.sha256}:
            return  # somebody else wrote this key since, whole and verified by themselves
        if found.size_bytes == wanted.size_bytes and (vouched or self._digest(wanted.key) == wanted.sha256):
            return
        with contextlib.suppress(StorageUnavailable):
            self._delete(wanted.key)
        msg = "the store holds other bytes than were sent; they were removed"
        raise StorageUnavailable(msg)

    def _digest(self, key: str) -> str:
        with self.open(key) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a BufferedReader


def _copy(source: BinaryIO, staged: IO[bytes]) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        # Only the writing is ours to translate: the source may be a socket with OSErrors of its own.
        with _no_room():
            staged.write(chunk)
    with _no_room():
        staged.flush()
    return size, digest.hexdigest()


@contextlib.contextmanager
def _no_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = "there is no room to take the file in"
        raise StorageUnavailable(msg) from error


def check_key(key: str) -> str:
    """
    Return *key* if it may be one.

    Raises:
        InvalidKey: Empty, absolute, too long, with a ``..``, ``.`` or empty part, a backslash or a
            control character, not encodable, or in the part reserved for our own files.
    """
    try:
        encoded = key.encode()
    except UnicodeEncodeError as error:
        msg = "a key must be encodable as UTF-8"
        raise InvalidKey(msg) from error
    parts = key.split("/")
    if not 0 < len(encoded) <= _MAX_KEY_BYTES or any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
        msg = f"a key has 1 to {_MAX_KEY_BYTES} bytes, each of its parts at most {_MAX_PART_BYTES}"
        raise InvalidKey(msg)
    if any(part in {"", ".", ".."} for part in parts):
        msg = "a key is a relative path without empty, '.' or '..' parts"
        raise InvalidKey(msg)
    if "\\" in key or any(_is_unprintable(char) for char in key):
        msg = "a key holds no backslash and no control characters"
        raise InvalidKey(msg)
    if parts[0].casefold() == RESERVED:
        msg = f"keys under {RESERVED}/ are reserved"
        raise InvalidKey(msg)
    return key


def _is_unprintable(char: str) -> bool:
    # Cc: control characters. U+FFFE and U+FFFF have no place in the XML of an S3 listing. The line and
    # paragraph separators break logs.
    return unicodedata.category(char) in {"Cc", "Zl", "Zp"} or char in "\ufffe\uffff"


# Marks that turn the direction of text round, with which "gpj.exe" can be shown as "exe.jpg".
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean_filename(name: str | None) -> str | None:
    """
    The last part of *name* without what a header, a shell or a reader could be fooled by.

    Returns:
        At most 200 bytes of UTF-8, its extension kept, or ``None`` when nothing is left.
    """
    text = _BIDI.sub("", re.split(r"[/\\]", name or "")[-1])
    text = "".join("_" if unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} else char for char in text)
    text = text.strip().strip("\ufffe\uffff")
    if text in {"", ".", ".."}:
        return None
    if len(text.encode()) > _MAX_FILENAME_BYTES:
        stem, dot, extension = text.rpartition(".")
        tail = dot + extension if stem and len(extension.encode()) <= 16 else ""
        room = _MAX_FILENAME_BYTES - len(tail.encode())
        text = text.encode()[:room].decode(errors="ignore") + tail
    return text


def content_disposition(filename: str | None, *, inline: bool = False) -> str:
    """
    A ``Content-Disposition`` value that is plain ASCII and cannot be broken out of.

    A name outside ASCII is given twice, as RFC 6266 advises: a plain ``filename`` for old clients and
    ``filename*`` in the encoding of RFC 5987, which wins where it is understood.
    """
    kind = "inline" if inline else "attachment"
    name = clean_filename(filename)
    if name is None:
        return kind
    folded = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    # Quotes need escapes that clients read differently, and some decode a percent sign.
    plain = re.sub(r'["%;\\]', "_", folded).strip()
    if plain == name:
        return f'{kind}; filename="{plain}"'
    if not plain.strip("._ ") or plain.startswith("."):
        plain = f"file{plain}" if plain.startswith(".") else "file"
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def shows_inline(content_type: str) -> bool:
    """Whether a browser may show the type in its window: media and plain text, never what can hold script."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "text/plain" or (
        kind.partition("/")[0] in {"image", "video", "audio"} and "xml" not in kind
    )


_WORD = r"[A-Za-z0-9!#$&^_.+-]+"
_TYPE = re.compile(rf'{_WORD}/{_WORD}(\s*;\s*{_WORD}=({_WORD}|"[\x20\x21\x23-\x5b\x5d-\x7e]*"))*')


def _clean_type(content_type: str) -> str:
    text = content_type.strip()
    return text if len(text) <= 200 and _TYPE.fullmatch(text) else DEFAULT_TYPE
