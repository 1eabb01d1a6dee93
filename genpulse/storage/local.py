"""
Objects as plain files under one directory, readable with any other tool.

``<root>/<key>`` is the object. ``<root>/.genpulse/`` holds files being written (``tmp/``), what a
plain file cannot say of itself (``about/``: type, digest, name) and locks. No key begins with that name.

- A write goes to ``tmp/``, is flushed to the disk and renamed, and so is its directory entry.
- Paths are walked by file descriptor without following symbolic links, so that no key leaves the
  root, not even while somebody swaps a directory for a link.
- The record in ``about/`` is written *before* the rename and keeps the former one beside it; readers
  take the entry that fits the size and time of the file they see. A crash between the two
  leaves the old object with the old record.
- A cut of the power may cost a young record, never bytes: records are not flushed, which halves the
  time of an upload. Type and name are then guessed from the key; the ledger has them anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import mimetypes
import os
import stat as stat_module
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import quote

from genpulse.errors import ObjectNotFound, StorageUnavailable
from genpulse.storage.base import (
    CHUNK_BYTES,
    DEFAULT_TYPE,
    RESERVED,
    InvalidKey,
    StorageProvider,
    StoredObject,
    check_key,
)

__all__ = ["LocalStorage"]

_LOCKS = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What the system says when a key's path leads through something that is not a directory of ours.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR}


class LocalStorage(StorageProvider):
    """
    Keep objects under the directory *root*, which is made at the first write.

    Args:
        root: May itself be a symbolic link; links inside it are not followed.
        base_url: Where the API is reached; links are ``<base_url>/static/assets/<key>``.
    """

    signs_urls = False

    def __init__(self, root: Path | str, *, base_url: str = "") -> None:
        self.root = Path(root)
        self.base_url = base_url.rstrip("/")

    def get_url(
        self,
        key: str,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        expires_s: int | None = None,
    ) -> str:
        """The path under which the API serves the file; name, type and time are the API's matter."""
        return f"{self.base_url}/static/assets/{quote(check_key(key))}"

    def check(self) -> None:
        """Write a file, flush it and remove it."""
        with _translated(), self._stage() as staged:
            staged.write(b"ok")
            _sync(staged.fileno())

    def collect_leftovers(self, older_than_s: float) -> int:
        """Remove files of ``tmp/`` last written before that time whose writer is gone."""
        limit, removed = time.time() - older_than_s, 0
        with _translated(), self._folder(RESERVED, "tmp") as folder:
            for name in os.listdir(folder):  # noqa: PTH208 - a descriptor, not a path
                with contextlib.suppress(FileNotFoundError, BlockingIOError):
                    if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > limit:
                        continue
                    with _closing(os.open(name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)) as fd:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds this
                        os.unlink(name, dir_fd=folder)
                        removed += 1
        return removed

    @contextlib.contextmanager
    def _stage(self) -> Iterator[IO[bytes]]:
        name = uuid.uuid4().hex
        with _translated(), self._folder(RESERVED, "tmp") as folder:
            # Not mkstemp: that would leave files which only their writer may read.
            staged = open(name, "x+b", opener=functools.partial(_open_below, folder))  # noqa: SIM115 - closed below
        try:
            fcntl.flock(staged, fcntl.LOCK_EX)
            yield staged
        finally:
            with contextlib.suppress(OSError):
                staged.close()
            with contextlib.suppress(OSError), self._folder(RESERVED, "tmp") as folder:
                os.unlink(name, dir_fd=folder)

    def _publish(self, staged: IO[bytes], wanted: StoredObject) -> bool:
        *parents, name = wanted.key.split("/")
        with _translated():
            staged.flush()
            _sync(staged.fileno())
            seen = os.fstat(staged.fileno())
            if seen.st_size != wanted.size_bytes:
                msg = "the disk took fewer bytes than were written"
                raise StorageUnavailable(msg)
            with self._locked(wanted.key), self._folder(RESERVED, "tmp") as tmp:
                self._record(wanted, seen, tmp)
                # A delete may prune the folder between its making and the rename: then make it again.
                for last in (False, False, True):
                    try:
                        with self._folder_for_writing(parents) as folder:
                            os.replace(staged.name, name, src_dir_fd=tmp, dst_dir_fd=folder)
                            # Folders made on the way stand earlier in the file system's journal, so
                            # that this flush keeps them too; each one more would cost as much again.
                            _sync(folder)
                        break
                    except FileNotFoundError:
                        if last:
                            raise
                    except IsADirectoryError as error:
                        msg = "other keys lie below this one"
                        raise InvalidKey(msg) from error
        return True

    def _stat(self, key: str) -> StoredObject:
        for _ in range(5):
            with _closing(self._descriptor(key)) as fd:
                seen = os.fstat(fd)
            if about := self._about(key, seen):
                return StoredObject(key, seen.st_size, about.content_type, about.sha256, about.filename)
        guess = mimetypes.guess_type(key)[0] or DEFAULT_TYPE
        return StoredObject(key, seen.st_size, guess)

    def _open(self, key: str, start: int, length: int | None) -> BinaryIO:
        return io.BufferedReader(_Window(self._descriptor(key), start, length), CHUNK_BYTES // 4)

    def _delete(self, key: str) -> None:
        parents = key.split("/")[:-1]
        with _translated(), self._locked(key):
            try:
                with self._folder(*parents, create=False) as folder:
                    os.unlink(key.rpartition("/")[2], dir_fd=folder)
                    _sync(folder)
            except OSError as error:
                if not _absent(error):
                    raise
            about, record = _record_path(key)
            with contextlib.suppress(FileNotFoundError), self._folder(*about, create=False) as folder:
                os.unlink(record, dir_fd=folder)
            while parents:
                *parents, empty = parents
                try:
                    with self._folder(*parents, create=False) as folder:
                        os.rmdir(empty, dir_fd=folder)
                except OSError:
                    break

    def _keys(self, prefix: str) -> Iterator[str]:
        # From the folder that the prefix names: its neighbours may be a million other tasks.
        waiting = [prefix[: prefix.rfind("/") + 1]]
        if waiting[0]:
            try:
                check_key(waiting[0].removesuffix("/"))
            except InvalidKey:  # no key begins like this
                return
        while waiting:
            below = waiting.pop()
            for name, is_dir in self._entries(below):
                key = below + name
                if is_dir:
                    if key.casefold() != RESERVED and f"{key}/".startswith(prefix[: len(key) + 1]):
                        waiting.append(f"{key}/")
                elif key.startswith(prefix):
                    with contextlib.suppress(InvalidKey):  # a file that somebody else put there
                        yield check_key(key)

    def _entries(self, below: str) -> list[tuple[str, bool]]:
        """Names of the files (false) and directories (true) in a folder, links and the like left out."""
        try:
            with self._folder(*below.split("/")[:-1], create=False) as folder, os.scandir(folder) as entries:
                return [
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
                ]
        except OSError as error:
            if _absent(error):
                return []
            raise _unavailable(error) from error

    # Paths, as descriptors.

    @contextlib.contextmanager
    def _folder(self, *parts: str, create: bool = True) -> Iterator[int]:
        """The directory below the root, opened part by part so that no link is followed."""
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _folder_for_writing(self, parents: list[str]) -> Iterator[int]:
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(self._folder(*parents))
            except OSError as error:
                if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                    msg = "the key lies below another object or a link"
                    raise InvalidKey(msg) from error
                raise
            yield folder

    def _descriptor(self, key: str) -> int:
        """The object's file, opened for reading; a link, a pipe or a directory is no object."""
        *parents, name = key.split("/")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with self._folder(*parents, create=False) as folder:
                fd = os.open(name, flags, dir_fd=folder)
        except OSError as error:
            if _absent(error):
                msg = f"no object under {key!r}"
                raise ObjectNotFound(msg) from error
            raise _unavailable(error) from error
        if not stat_module.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            msg = f"no object under {key!r}"
            raise ObjectNotFound(msg)
        return fd

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """One writer or deleter of a key at a time, among all processes of this host."""
        name = f"{int(_hash(key), 16) % _LOCKS:02d}"
        with self._folder(RESERVED, "locks") as folder:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with _closing(fd):
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield

    # The record beside an object.

    def _record(self, wanted: StoredObject, seen: os.stat_result, tmp: int) -> None:
        about, name = _record_path(wanted.key)
        entries = {_identity(seen): _About(wanted.content_type, wanted.sha256, wanted.filename)}
        with contextlib.suppress(ObjectNotFound), _closing(self._descriptor(wanted.key)) as fd:
            former = os.fstat(fd)
            if known := self._about(wanted.key, former):
                entries.setdefault(_identity(former), known)
        draft = uuid.uuid4().hex
        with self._folder(*about) as folder:
            with open(draft, "x", opener=functools.partial(_open_below, tmp)) as file:
                record = {identity: dataclasses.asdict(entry) for identity, entry in entries.items()}
                json.dump({"key": wanted.key, "is": record}, file)
            os.replace(draft, name, src_dir_fd=tmp, dst_dir_fd=folder)

    def _about(self, key: str, seen: os.stat_result) -> _About | None:
        """The record's entry for the file as *seen*, if it has one."""
        about, name = _record_path(key)
        try:
            with (
                self._folder(*about, create=False) as folder,
                open(name, opener=functools.partial(_open_below, folder)) as file,
            ):
                entries = {identity: _About(**entry) for identity, entry in json.load(file)["is"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        except OSError as error:
            raise _unavailable(error) from error
        if exact := entries.get(_identity(seen)):
            return exact
        # A file from a backup has another time: believed for its type and name, not for its digest.
        for identity, entry in entries.items():
            if len(entries) == 1 and identity.startswith(f"{seen.st_size}-"):
                return dataclasses.replace(entry, sha256=None)
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class _About:
    """What a plain file cannot say of itself."""

    content_type: str
    sha256: str | None
    filename: str | None


class _Window(io.RawIOBase):
    """*length* bytes of an open file from *start* on; closes the descriptor."""

    def __init__(self, fd: int, start: int, length: int | None) -> None:
        self._fd = fd
        self._at = start
        self._end = None if length is None else start + length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        wish = len(buffer) if self._end is None else min(len(buffer), self._end - self._at)
        with _translated():
            data = os.pread(self._fd, wish, self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def _open_below(folder: int, name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)


def _identity(seen: os.stat_result) -> str:
    return f"{seen.st_size}-{seen.st_mtime_ns}"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _record_path(key: str) -> tuple[tuple[str, ...], str]:
    digest = _hash(key)
    return (RESERVED, "about", digest[:2]), f"{digest[2:]}.json"


def _absent(error: OSError) -> bool:
    # macOS says EPERM for the unlink of a directory.
    return error.errno in _NOT_THERE or isinstance(error, IsADirectoryError)


def _sync(fd: int) -> None:
    """Flush to the disk itself; macOS' fsync stops at the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, full)
            return
    os.fsync(fd)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> StorageUnavailable:
    # strerror only: the file name in str(error) is not for callers.
    return StorageUnavailable(
        f"the storage directory cannot be used: {error.strerror or 'input/output error'}"
    )
