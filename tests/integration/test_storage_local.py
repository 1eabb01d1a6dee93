"""What only a directory can get wrong: links, crashes between two files, other programs' files."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from genpulse.errors import ObjectNotFound, StorageUnavailable
from genpulse.storage import InvalidKey, LocalStorage, StoredObject
from tests.support import wait_until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The storage's directory."""
    return tmp_path / "assets"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    """An empty storage."""
    return LocalStorage(root)


def put(storage: LocalStorage, key: str, data: bytes = b"data") -> StoredObject:
    """Store *data*."""
    return storage.upload_file(key, io.BytesIO(data), content_type="image/png", filename="f.png")


def get(storage: LocalStorage, key: str) -> bytes:
    """All bytes of an object."""
    with storage.open(key) as stream:
        return stream.read()


class TestLinks:
    """No key leads out of the root."""

    @pytest.fixture
    def outside(self, tmp_path: Path) -> Path:
        """A directory with a secret, which is not ours."""
        folder = tmp_path / "outside"
        folder.mkdir()
        (folder / "secret").write_bytes(b"secret")
        return folder

    def test_a_link_to_a_file_is_no_object(self, storage: LocalStorage, root: Path, outside: Path) -> None:
        """It cannot be read, asked about or listed."""
        put(storage, "a")
        (root / "link").symlink_to(outside / "secret")

        for read in (storage.open, storage.stat):
            with pytest.raises(ObjectNotFound):
                read("link")
        assert list(storage.keys()) == ["a"]

    def test_a_link_to_a_directory_leads_nowhere(
        self, storage: LocalStorage, root: Path, outside: Path
    ) -> None:
        """Neither reading, writing, deleting nor listing goes through it."""
        put(storage, "a")
        (root / "link").symlink_to(outside, target_is_directory=True)

        with pytest.raises(ObjectNotFound):
            storage.open("link/secret")
        with pytest.raises(InvalidKey):
            put(storage, "link/new")
        with pytest.raises(InvalidKey):
            put(storage, "link/deeper/new")
        storage.delete_file("link/secret")
        assert list(storage.keys()) == list(storage.keys("a")) == ["a"]
        assert list(storage.keys("link/")) == []
        assert {path.name for path in outside.iterdir()} == {"secret"}

    def test_writing_to_a_link_replaces_the_link(
        self, storage: LocalStorage, root: Path, outside: Path
    ) -> None:
        """What it pointed to stays as it was."""
        root.mkdir()
        (root / "link").symlink_to(outside / "secret")

        put(storage, "link", b"new")

        assert get(storage, "link") == b"new"
        assert (outside / "secret").read_bytes() == b"secret"

    def test_the_root_itself_may_be_a_link(self, tmp_path: Path) -> None:
        """An operator may put the whole storage on another disk."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "assets").symlink_to(tmp_path / "disk")

        put(LocalStorage(tmp_path / "assets"), "out/a")

        assert (tmp_path / "disk" / "out" / "a").read_bytes() == b"data"

    def test_a_directory_swapped_for_a_link_catches_nobody(
        self, storage: LocalStorage, root: Path, outside: Path
    ) -> None:
        """While somebody swaps a folder for a link again and again, no write lands outside."""
        put(storage, "out/a")
        done = threading.Event()

        def swap() -> None:
            while not done.is_set():
                (root / "out").rename(root / "kept")
                (root / "out").symlink_to(outside, target_is_directory=True)
                time.sleep(0.001)
                (root / "out").unlink()
                (root / "kept").rename(root / "out")
                time.sleep(0.001)

        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(swap)
            for number in range(60):
                try:
                    put(storage, f"out/{number}")
                except (InvalidKey, StorageUnavailable):
                    continue
            done.set()
            assert swapping.exception() is None or isinstance(swapping.exception(), OSError)

        assert {path.name for path in outside.iterdir()} == {"secret"}


class TestOtherThings:
    """What lies in the directory without being an object."""

    def test_a_pipe_is_no_object(self, storage: LocalStorage, root: Path) -> None:
        """And reading it does not hang."""
        root.mkdir()
        os.mkfifo(root / "pipe")

        with pytest.raises(ObjectNotFound):
            storage.open("pipe")
        assert list(storage.keys()) == []

    def test_a_file_put_there_by_hand_is_an_object(self, storage: LocalStorage, root: Path) -> None:
        """Its type is guessed from its name; its digest is not known."""
        (root / "hand").mkdir(parents=True)
        (root / "hand" / "cat.png").write_bytes(b"cat")

        assert storage.stat("hand/cat.png") == StoredObject("hand/cat.png", 3, "image/png", None, None)
        assert list(storage.keys()) == ["hand/cat.png"]

    def test_a_file_changed_by_hand_loses_its_record(self, storage: LocalStorage, root: Path) -> None:
        """A digest that does not fit the bytes any more is not given out."""
        put(storage, "a.png")
        (root / "a.png").write_bytes(b"other bytes")

        assert storage.stat("a.png") == StoredObject("a.png", 11, "image/png", None, None)

    def test_a_file_from_a_backup_keeps_type_and_name(self, storage: LocalStorage, root: Path) -> None:
        """A copy of the same size and another time is known again, but its digest is not vouched for."""
        put(storage, "a.bin")
        os.utime(root / "a.bin", (1, 1))

        assert storage.stat("a.bin") == StoredObject("a.bin", 4, "image/png", None, "f.png")

    @pytest.mark.parametrize(
        "record",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"is": []}',
            b'{"is": {"4-1": 5}}',
            b'{"is": {"4-1": {"x": 1}}}',
            b"\xff",
        ],
    )
    def test_a_damaged_record_is_no_record(self, storage: LocalStorage, root: Path, record: bytes) -> None:
        """The bytes are still there, and can be replaced."""
        put(storage, "a.png")
        for path in (root / ".genpulse" / "about").rglob("*.json"):
            path.write_bytes(record)

        assert storage.stat("a.png") == StoredObject("a.png", 4, "image/png", None, None)
        assert put(storage, "a.png") == storage.stat("a.png")

    def test_an_object_is_a_plain_file_that_others_may_read(self, storage: LocalStorage, root: Path) -> None:
        """Permissions follow the umask, as for any file."""
        before = os.umask(0o022)
        try:
            put(storage, "out/a.png")
        finally:
            os.umask(before)

        assert (root / "out" / "a.png").stat().st_mode & 0o777 == 0o644

    def test_a_key_below_an_object_is_refused(self, storage: LocalStorage) -> None:
        """A directory cannot hold both; the object that is there stays."""
        put(storage, "a")
        put(storage, "b/c")

        with pytest.raises(InvalidKey, match="below"):
            put(storage, "a/b")
        with pytest.raises(InvalidKey, match="below"):
            put(storage, "b")

        assert get(storage, "a") == get(storage, "b/c") == b"data"

    def test_empty_folders_go_with_their_last_object(self, storage: LocalStorage, root: Path) -> None:
        """Deleting leaves no skeleton behind, nor a record."""
        put(storage, "out/1/a")
        put(storage, "out/2/a")

        storage.delete_file("out/1/a")

        assert [path.name for path in (root / "out").iterdir()] == ["2"]
        assert len(list((root / ".genpulse" / "about").rglob("*.json"))) == 1

    def test_links_lead_to_the_api(self, root: Path) -> None:
        """Each part of the key is quoted."""
        storage = LocalStorage(root, base_url="https://example.com/")

        assert storage.get_url("a b/ü%?.png") == "https://example.com/static/assets/a%20b/%C3%BC%25%3F.png"
        assert not storage.signs_urls


class TestFailures:
    """A directory that does not do its part."""

    def test_a_root_that_cannot_be_is_unavailable(self, tmp_path: Path) -> None:
        """Every operation says so in words, without the path."""
        (tmp_path / "file").write_bytes(b"")
        storage = LocalStorage(tmp_path / "file" / "assets")

        for call in (storage.check, lambda: put(storage, "a"), lambda: storage.collect_leftovers(0)):
            with pytest.raises(StorageUnavailable) as caught:
                call()
            assert str(tmp_path) not in str(caught.value)
            assert "directory" in str(caught.value)

    def test_a_full_disk_is_unavailable_and_leaves_nothing(self, storage: LocalStorage, root: Path) -> None:
        """The object that was there stays; the failed one's temporary file is gone."""
        put(storage, "a")
        code = f"""if True:
            import io, resource, sys
            from genpulse.errors import StorageUnavailable
            from genpulse.storage import LocalStorage
            resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
            try:
                LocalStorage({str(root)!r}).upload_file("a", io.BytesIO(bytes(9_000_000)), content_type="a/b")
            except StorageUnavailable as error:
                sys.exit("room" not in str(error))
            sys.exit(2)
        """

        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        assert get(storage, "a") == b"data"
        assert list((root / ".genpulse" / "tmp").iterdir()) == []

    def test_nothing_is_listed_where_nothing_is(self, storage: LocalStorage) -> None:
        """A storage that was never written to is empty, not broken, and reading does not make it."""
        assert list(storage.keys()) == []
        storage.delete_file("a")
        with pytest.raises(ObjectNotFound):
            storage.open("a")

    def test_writers_and_deleters_of_one_folder_do_not_trip(self, storage: LocalStorage) -> None:
        """A delete prunes the folder in which somebody else is about to put a file."""

        def work(worker: int) -> None:
            for number in range(15):
                put(storage, f"out/deep/{worker}-{number}")
                storage.delete_file(f"out/deep/{worker}-{number}")

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [None] * 4
        assert list(storage.keys()) == []


# Dies by SIGKILL just before the object's own rename, when its record is written already.
BETWEEN = """
import io, os, signal, sys
from genpulse.storage import LocalStorage
from genpulse.storage import local

real = os.replace
def replace(source, target, **more):
    if target == "a.png":
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, **more)
local.os.replace = replace
LocalStorage(sys.argv[1]).upload_file("a.png", io.BytesIO(b"new!"), content_type="text/plain")
"""

# Uploads objects named by their own digest, over and over, some of them twice with other bytes.
BUSY = """
import hashlib, io, random, sys
from genpulse.storage import LocalStorage

storage, dice = LocalStorage(sys.argv[1]), random.Random(int(sys.argv[2]))
print("go", flush=True)
while True:
    data = dice.randbytes(dice.randrange(400_000))
    storage.upload_file(f"out/{hashlib.sha256(data).hexdigest()}", io.BytesIO(data), content_type="a/b")
    storage.upload_file("same", io.BytesIO(data), content_type=f"a/{len(data)}")
"""


class TestCrashes:
    """Processes that are killed at the worst moment."""

    def test_between_record_and_object_the_old_pair_stays(self, storage: LocalStorage, root: Path) -> None:
        """The old object is described by its old record, not by that of the one that never came."""
        old = put(storage, "a.png")

        assert subprocess.run([sys.executable, "-c", BETWEEN, str(root)]).returncode == -9

        assert storage.stat("a.png") == old
        assert get(storage, "a.png") == b"data"
        assert put(storage, "a.png", b"third") == storage.stat("a.png")

    def test_whatever_is_readable_after_kills_is_whole(self, storage: LocalStorage, root: Path) -> None:
        """Ten writers killed at any moment: each object has its digest, its record is right or absent."""
        dice = random.Random(7)
        for seed in range(10):
            with subprocess.Popen(
                [sys.executable, "-c", BUSY, str(root), str(seed)], stdout=subprocess.PIPE
            ) as victim:
                assert victim.stdout is not None
                assert victim.stdout.readline() == b"go\n"
                time.sleep(dice.random() * 0.2)
                victim.kill()

        keys = list(storage.keys())
        assert len(keys) > 10
        for key in keys:
            digest = hashlib.sha256(get(storage, key)).hexdigest()
            assert key in {f"out/{digest}", "same"}
            about = storage.stat(key)
            assert about.sha256 == digest
            if key == "same":
                assert about.content_type == f"a/{about.size_bytes}"

    def test_leftovers_are_collected_and_live_uploads_spared(self, storage: LocalStorage, root: Path) -> None:
        """A temporary file goes when it is old enough and its writer is dead; never under a writer's hands."""
        tmp = root / ".genpulse" / "tmp"
        half, go_on = threading.Event(), threading.Event()

        class Slow(io.RawIOBase):
            def read(self, size: int = -1, /) -> bytes:
                if half.is_set():
                    go_on.wait(10)
                    return b""
                half.set()
                return b"slow"

        with ThreadPoolExecutor(1) as pool:
            upload = pool.submit(storage.upload_file, "slow", Slow(), content_type="a/b")  # type: ignore[arg-type]  # only its read is used
            assert half.wait(10)
            (tmp / "left-by-a-crash").write_bytes(b"x" * 1000)

            assert storage.collect_leftovers(3600) == 0
            assert storage.collect_leftovers(0) == 1
            assert len(list(tmp.iterdir())) == 1
            go_on.set()
            upload.result()

        assert get(storage, "slow") == b"slow"
        assert list(tmp.iterdir()) == []

    def test_a_leftover_is_never_a_key(self, storage: LocalStorage, root: Path) -> None:
        """Nothing below our own folder can be read, listed, written or deleted, however it is spelled."""
        put(storage, "a")
        (root / ".genpulse" / "tmp" / "half").write_bytes(b"half an object")

        assert list(storage.keys()) == ["a"]
        assert list(storage.keys(".genpulse/")) == []
        for key in (
            ".genpulse/tmp/half",
            ".GENPULSE/tmp/half",
            "./.genpulse/tmp/half",
            "a/../.genpulse/tmp/half",
        ):
            with pytest.raises(InvalidKey):
                storage.open(key)

    def test_a_reader_keeps_the_object_it_opened(self, storage: LocalStorage) -> None:
        """Replacing or deleting an object does not disturb who reads it."""
        put(storage, "a", b"old" * 1000)
        with storage.open("a") as stream:
            first = stream.read(3)
            put(storage, "a", b"new")
            storage.delete_file("a")

            assert first + stream.read() == b"old" * 1000


def test_two_processes_never_mix_record_and_object(storage: LocalStorage, root: Path) -> None:
    """Type and digest always belong to the bytes beside them, while two processes overwrite one key."""
    busy = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(root), str(seed)], stdout=subprocess.PIPE)
        for seed in (1, 2)
    ]
    try:
        wait_until((root / "same").exists)
        for _ in range(3000):
            about = storage.stat("same")
            assert about.content_type == f"a/{about.size_bytes}"
            assert about.sha256 is not None
    finally:
        for process in busy:
            process.kill()
            process.communicate()

    assert storage.stat("same").sha256 == hashlib.sha256(get(storage, "same")).hexdigest()
