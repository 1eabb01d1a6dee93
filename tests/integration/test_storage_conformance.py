"""What every storage backend promises, run against each of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genpulse.errors import ObjectNotFound
from genpulse.storage import InvalidKey, LocalStorage, StorageProvider, StoredObject
from genpulse.storage.s3 import S3Storage

MIB = 1024 * 1024
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20


def put(storage: StorageProvider, key: str, data: bytes, content_type: str = "image/png") -> StoredObject:
    """Store *data*; shorter to read than the call itself."""
    return storage.upload_file(key, io.BytesIO(data), content_type=content_type)


def get(storage: StorageProvider, key: str, **window: Any) -> bytes:
    """All bytes of an object, or of a part of it."""
    with storage.open(key, **window) as stream:
        return stream.read()


class Failing(io.RawIOBase):
    """A source that gives *data* and then raises."""

    def __init__(self, data: bytes, error: Exception) -> None:
        self._data = io.BytesIO(data)
        self._error = error

    def read(self, size: int = -1, /) -> bytes:
        """The data, then the error."""
        chunk = self._data.read(min(size, 64 * 1024))
        if not chunk:
            raise self._error
        return chunk


# The test is inherited, by one class for each backend, and clears the storage itself.
_INHERITED = [HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]

# Runs in a process that is killed: reads half of its source, says so, and waits for the end.
VICTIM = """
import io, json, sys, time
from genpulse.storage import LocalStorage, S3Storage

class Half(io.RawIOBase):
    given = 0
    def read(self, size=-1, /):
        if self.given > 7_000_000:
            print("half", flush=True)
            time.sleep(600)
        self.given += size
        return b"h" * size

name, arguments = json.loads(sys.argv[1])
storage = {"LocalStorage": LocalStorage, "S3Storage": S3Storage}[name](**arguments)
storage.upload_file("out/a.png", Half(), content_type="image/png")
"""


FORKS = """
import io, json, os, sys
from genpulse.storage import LocalStorage, S3Storage

name, arguments = json.loads(sys.argv[1])
storage = {"LocalStorage": LocalStorage, "S3Storage": S3Storage}[name](**arguments)
objects = {name: name.encode() * 300_000 for name in "pc"}
for name, data in objects.items():
    storage.upload_file(name, io.BytesIO(data), content_type="a/b")
child = os.fork()
name = "p" if child else "c"
for _ in range(20):
    with storage.open(name) as stream:
        assert stream.read() == objects[name]
storage.upload_file("parent" if child else "child", io.BytesIO(b"after"), content_type="a/b")
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class StorageConformance:
    """What every storage backend promises; each backend's test class inherits it."""

    @pytest.mark.parametrize("size", [0, 1, 4096, 300_001, 5 * MIB, 5 * MIB + 1, 17 * MIB])
    def test_bytes_come_back_as_they_were(self, storage: StorageProvider, size: int) -> None:
        """An object of any size, empty, in one piece or in parts, is read back byte for byte."""
        data = random.Random(size).randbytes(size)

        stored = put(storage, "out/a.bin", data)

        assert stored.size_bytes == size
        assert stored.sha256 == hashlib.sha256(data).hexdigest()
        assert get(storage, "out/a.bin") == data

    def test_stat_tells_what_was_given(self, storage: StorageProvider) -> None:
        """Size, type, digest and file name are kept beside the bytes, in any script."""
        stored = storage.upload_file(
            "out/1/bild.png", io.BytesIO(PNG), content_type="image/png", filename="Größe 100% „画“.png"
        )

        assert storage.stat("out/1/bild.png") == stored
        assert stored.filename == "Größe 100% „画“.png"
        assert (stored.content_type, stored.size_bytes) == ("image/png", len(PNG))

    def test_a_malformed_type_is_kept_as_plain_bytes(self, storage: StorageProvider) -> None:
        """A type that could not stand in a header becomes application/octet-stream."""
        put(storage, "x", b"1", "image/png\r\nX-Evil: 1")

        assert storage.stat("x").content_type == "application/octet-stream"

    def test_an_unknown_key_is_not_found(self, storage: StorageProvider) -> None:
        """Reading what is not there says so at once, also for a part of a path that exists."""
        put(storage, "out/1/a.png", PNG)

        for key in ("nothing", "out", "out/1", "out/1/b.png", "out/1/a.png/deeper"):
            with pytest.raises(ObjectNotFound):
                storage.stat(key)
            with pytest.raises(ObjectNotFound):
                storage.open(key)
            with pytest.raises(ObjectNotFound):
                storage.open(key, start=1, length=0)

    def test_deleting_twice_is_fine(self, storage: StorageProvider) -> None:
        """Delete is idempotent, so clean-up can be repeated after a crash."""
        put(storage, "out/x", b"")

        storage.delete_file("out/x")
        storage.delete_file("out/x")

        assert list(storage.keys()) == []

    def test_a_second_upload_replaces_the_first(self, storage: StorageProvider) -> None:
        """Nothing of a longer old object stays behind, neither bytes nor type nor name."""
        storage.upload_file("x", io.BytesIO(PNG), content_type="image/png", filename="long.png")

        put(storage, "x", b"short", "text/plain")

        assert get(storage, "x") == b"short"
        assert storage.stat("x") == StoredObject("x", 5, "text/plain", hashlib.sha256(b"short").hexdigest())

    def test_a_window_gives_just_those_bytes(self, storage: StorageProvider) -> None:
        """A window is cut at the object's end; one that lies behind it is empty."""
        put(storage, "x", PNG)

        assert len(PNG) == 5128
        for start, length in [(0, 1), (0, 5000), (0, 9999), (10, None), (10, 20), (5127, 1), (5127, 9)]:
            assert get(storage, "x", start=start, length=length) == PNG[start:][:length]
        for start, length in [(5128, 1), (9999, None), (9999, 1), (7, 0)]:
            assert get(storage, "x", start=start, length=length) == b""

    def test_a_window_of_an_empty_object_is_empty(self, storage: StorageProvider) -> None:
        """An empty object has no bytes, wherever one looks."""
        put(storage, "x", b"")

        assert get(storage, "x") == get(storage, "x", start=0, length=5) == get(storage, "x", start=3) == b""

    def test_a_negative_window_is_a_mistake(self, storage: StorageProvider) -> None:
        """Start and length count from 0; anything else is the programmer's error, not an empty read."""
        put(storage, "x", PNG)

        with pytest.raises(ValueError, match="from 0"):
            storage.open("x", start=-1)
        with pytest.raises(ValueError, match="from 0"):
            storage.open("x", length=-1)

    def test_reading_in_pieces_gives_the_whole(self, storage: StorageProvider) -> None:
        """``read(n)`` gives n bytes until the end, then nothing."""
        put(storage, "x", PNG)

        with storage.open("x") as stream:
            pieces = list(iter(lambda: stream.read(1000), b""))

        assert [len(piece) for piece in pieces] == [1000] * 5 + [128]
        assert b"".join(pieces) == PNG

    @pytest.mark.parametrize("read", [0, 3 * MIB, 9 * MIB])
    def test_a_failing_source_changes_nothing(self, storage: StorageProvider, read: int) -> None:
        """The source's own error goes through, and readers still see the old object."""
        put(storage, "x", b"old")

        with pytest.raises(ConnectionResetError, match="the server went away"):
            storage.upload_file(
                "x",
                Failing(bytes(read), ConnectionResetError("the server went away")),  # type: ignore[arg-type]  # enough
                content_type="image/png",
            )

        assert get(storage, "x") == b"old"
        assert storage.stat("x").content_type == "image/png"

    def test_a_failing_source_leaves_no_new_key(self, storage: StorageProvider) -> None:
        """A first upload that fails was never there."""
        with pytest.raises(OSError, match="no more"):
            storage.upload_file("x", Failing(PNG, OSError("no more")), content_type="a/b")  # type: ignore[arg-type]  # only its read is used

        assert list(storage.keys()) == []
        assert storage.collect_leftovers(0) == 0

    def test_keys_are_found_by_the_text_they_begin_with(self, storage: StorageProvider) -> None:
        """A prefix is text, not a folder: it may end in the middle of a name."""
        for key in ("out/1/a.png", "out/1/b.png", "out/10/a.png", "other", "out.txt"):
            put(storage, key, b".")

        assert sorted(storage.keys()) == ["other", "out.txt", "out/1/a.png", "out/1/b.png", "out/10/a.png"]
        assert sorted(storage.keys("out/1")) == ["out/1/a.png", "out/1/b.png", "out/10/a.png"]
        assert sorted(storage.keys("out/1/")) == ["out/1/a.png", "out/1/b.png"]
        assert sorted(storage.keys("ou")) == ["out.txt", "out/1/a.png", "out/1/b.png", "out/10/a.png"]
        assert list(storage.keys("nothing")) == list(storage.keys("/")) == list(storage.keys("../")) == []

    def test_a_folder_is_deleted_whole_and_alone(self, storage: StorageProvider) -> None:
        """``out/1/`` is not ``out/10/``; it may be repeated; and what names no folder is refused."""
        for key in ("out/1/a", "out/1/b/c", "out/10/a", "out.txt"):
            put(storage, key, b".")

        assert storage.delete_below("out/1/") == 2
        assert storage.delete_below("out/1/") == 0
        assert sorted(storage.keys()) == ["out.txt", "out/10/a"]
        for wrong in ("", "/", "out/1", "../", ".genpulse/", "out//"):
            with pytest.raises(InvalidKey):
                storage.delete_below(wrong)

    def test_more_keys_than_one_page(self, storage: StorageProvider) -> None:
        """Every key is listed once, however many there are."""
        wanted = [f"many/{number:02d}/{number % 7}.png" for number in range(60)]
        for key in wanted:
            put(storage, key, b"")

        assert sorted(storage.keys("many/")) == wanted

    def test_a_bad_key_is_refused_everywhere(self, storage: StorageProvider) -> None:
        """No operation takes a key that could mean another place."""
        for key in ("", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".", "a\\b", "a\0b", "a\nb"):
            for call in (storage.open, storage.stat, storage.delete_file, storage.get_url):
                with pytest.raises(InvalidKey):
                    call(key)
            with pytest.raises(InvalidKey):
                put(storage, key, b"")

    @settings(max_examples=25, deadline=None, suppress_health_check=_INHERITED)
    @given(
        parts=st.lists(
            st.text(
                st.characters(
                    exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/\\\ufffe\uffff"
                )
            )
            .filter(lambda part: part not in {"", ".", "..", ".genpulse"})
            .filter(lambda part: len(part.encode()) < 60),
            min_size=1,
            max_size=4,
        ),
        data=st.binary(max_size=200),
    )
    def test_any_printable_key_works(self, storage: StorageProvider, parts: list[str], data: bytes) -> None:
        """Spaces, percent signs, plus, question marks, hashes and every script are part of the name."""
        key = "/".join(parts)

        stored = storage.upload_file(key, io.BytesIO(data), content_type="image/png", filename=parts[-1])

        assert list(storage.keys()) == [key]
        assert get(storage, key) == data
        assert storage.stat(key) == stored
        storage.delete_file(key)
        assert list(storage.keys()) == []

    def test_check_is_content_with_a_working_store(self, storage: StorageProvider) -> None:
        """``check`` leaves nothing behind."""
        storage.check()

        assert list(storage.keys()) == []


class ConcurrentConformance:
    """
    What a backend promises to those who use one key at the same time.

    Not asked of the verifying server, which replaces an object's bytes and their description one
    after the other.
    """

    def test_writers_of_one_key_do_not_mix(self, storage: StorageProvider) -> None:
        """Whoever writes last wins whole; a reader in between sees one whole object with its own digest."""
        contents = [bytes([number]) * (200_000 + number) for number in range(6)]
        put(storage, "x", contents[0])
        seen: list[bytes] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                seen.append(get(storage, "x"))

        with ThreadPoolExecutor(8) as pool:
            reader = pool.submit(read)
            written = [pool.submit(put, storage, "x", data) for data in contents * 4]
            failures = [future.exception() for future in written]
            done.set()
            reader.result()

        assert failures == [None] * len(written)
        assert set(seen) <= set(contents)
        last = get(storage, "x")
        assert last in contents
        assert storage.stat("x").sha256 == hashlib.sha256(last).hexdigest()


class ProcessConformance:
    """What a backend promises to and about other processes; ``recipe`` tells them how to make it."""

    def recipe(self, storage: StorageProvider) -> tuple[str, dict[str, Any]]:
        """Class and arguments with which another process makes the same storage."""
        raise NotImplementedError

    def test_a_killed_upload_is_never_readable(self, storage: StorageProvider) -> None:
        """After kill -9 in the middle of an upload the old object is there, whole, and nothing new."""
        put(storage, "out/a.png", PNG)

        with kill_at_half(VICTIM, self.recipe(storage)):
            assert get(storage, "out/a.png") == PNG

        assert list(storage.keys()) == ["out/a.png"]
        assert get(storage, "out/a.png") == PNG
        storage.collect_leftovers(0)
        assert get(storage, "out/a.png") == PNG

    def test_a_fork_may_go_on_using_it(self, storage: StorageProvider) -> None:
        """After a fork parent and child use it side by side, and neither hears the other's answers."""
        subprocess.run(
            [sys.executable, "-c", FORKS, json.dumps(self.recipe(storage))], check=True, timeout=30
        )

        assert get(storage, "child") == get(storage, "parent") == b"after"


@contextlib.contextmanager
def kill_at_half(script: str, recipe: object) -> Iterator[None]:
    """Run *script* until it says ``half``, do what the block does, then kill -9 it."""
    command = [sys.executable, "-c", script, json.dumps(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        try:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "half\n"
            yield
        finally:
            victim.kill()
    assert victim.returncode == -9


class TestLocalStorage(ConcurrentConformance, ProcessConformance, StorageConformance):
    """A directory."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        """A directory that does not exist yet."""
        return LocalStorage(tmp_path / "data" / "assets")

    def recipe(self, storage: StorageProvider) -> tuple[str, dict[str, Any]]:
        """The same directory."""
        assert isinstance(storage, LocalStorage)
        return "LocalStorage", {"root": str(storage.root)}

    def test_deleting_a_part_of_a_path_deletes_nothing(self, storage: StorageProvider) -> None:
        """A key that is merely a folder of others is not there, so deleting it changes nothing."""
        put(storage, "out/1/a.png", PNG)

        storage.delete_file("out/1")

        assert get(storage, "out/1/a.png") == PNG


class S3Conformance(StorageConformance):
    """What the object stores share."""

    @pytest.fixture
    def arguments(self) -> dict[str, Any]:
        """Arguments of :class:`S3Storage`, for each store its own."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self, arguments: dict[str, Any]) -> Iterator[S3Storage]:
        """A bucket of this test's own, with the smallest parts."""
        storage = S3Storage(**arguments)
        yield storage
        storage.close()


class TestS3OnAVerifyingServer(ProcessConformance, S3Conformance):
    """MinIO's shape: path style, SigV4; the server checks every signature and Content-MD5."""

    @pytest.fixture
    def arguments(self, s3_settings: dict[str, str]) -> dict[str, Any]:
        """A new bucket, with a prefix."""
        found = {
            name.removeprefix("s3_"): value for name, value in s3_settings.items() if name.startswith("s3_")
        }
        self.arguments_used = found | {"prefix": "some/prefix", "multipart_bytes": 5 * MIB}
        return self.arguments_used

    def recipe(self, storage: StorageProvider) -> tuple[str, dict[str, Any]]:
        """The same bucket."""
        return "S3Storage", self.arguments_used


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    """The port of a moto server: knows virtual hosts, SigV2 and checksums, verifies no signature."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from moto.server import ThreadedMotoServer

    real = DomainDispatcherApplication.infer_service_region_host

    def infer(app: Any, environ: dict[str, Any], path: str) -> str | None:
        # A SigV2 signature with four slashes in its base64 would be read as the name of a service.
        signed_v2 = environ.get("HTTP_AUTHORIZATION", "").startswith("AWS ")
        return None if signed_v2 else real(app, environ, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainDispatcherApplication, "infer_service_region_host", infer)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        yield server.get_host_and_port()[1]
        server.stop()


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name below s3.test is this machine."""
    real = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        local = isinstance(host, str) and (host == "s3.test" or host.endswith(".s3.test"))
        return real("127.0.0.1" if local else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


class MotoConformance(ConcurrentConformance, S3Conformance):
    """Shapes that the verifying server does not know."""

    provider: str
    endpoint_url: str

    @pytest.fixture
    def arguments(self, moto: int, request: pytest.FixtureRequest) -> dict[str, Any]:
        """A new bucket."""
        found: dict[str, Any] = {
            "provider": "minio",
            "bucket": f"t-{abs(hash(request.node.nodeid)):x}"[:40],
            "region": "us-east-1",
            "endpoint_url": f"http://127.0.0.1:{moto}",
            "access_key_id": "AKIAGENPULSETEST",
            "secret_access_key": "genpulse-test-secret",
        }
        requests.put(f"{found['endpoint_url']}/{found['bucket']}", timeout=10).raise_for_status()
        endpoint = {"endpoint_url": self.endpoint_url.format(port=moto)}
        return found | endpoint | {"provider": self.provider, "multipart_bytes": 5 * MIB}


@pytest.mark.usefixtures("hosts")
class TestOss(MotoConformance):
    """Aliyun's shape: the bucket in the host name, SigV2, no checksum headers."""

    provider = "oss"
    endpoint_url = "http://s3.test:{port}"


class TestAws(MotoConformance):
    """Amazon's shape: SHA-256 checksums of objects and parts, SigV4."""

    provider = "aws"
    endpoint_url = "http://127.0.0.1:{port}"
