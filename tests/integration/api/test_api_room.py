"""Bodies and files that do not fit: said so in time, and nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genpulse.errors import QueueFull
from genpulse.tasks import admission

MB = 2**20


def upload(api: Any, size: int) -> Any:
    """Upload a file of so many bytes; the client of the tests would write a temporary file of its own."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
    form = head + os.urandom(size) + b"\r\n--b--\r\n"
    return api.client.post("/storage/upload", data=form, content_type="multipart/form-data; boundary=b")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel lets this process write no file beyond so many bytes, as a quota or a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_queue_full(answer: Any) -> None:
    """429, to be tried again later."""
    assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (429, "queue_full", True)
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_disk_that_fills_up_during_an_upload_is_queue_full(api: Any) -> None:
    """No 500, and no half of the file is left."""
    before = set(Path(tempfile.gettempdir()).iterdir())

    with largest_file(MB):
        answer = upload(api, 3 * MB)

    assert_queue_full(answer)
    assert api.rows("assets") == 0
    assert not [
        path for path in api.service.settings.assets_dir.rglob("*") if path.is_file() and path.stat().st_size
    ]
    assert set(Path(tempfile.gettempdir()).iterdir()) <= before
    assert upload(api, 3 * MB).status_code == 201


def test_a_data_folder_that_fills_up_is_unavailable(build: Any, ledger_url: str, tmp_path: Path) -> None:
    """The temporary file was written, and the stored one cannot be: it goes, and the caller comes back."""
    api = build(ledger_url, tmp_path / "data")
    api.client.get("/task")
    limit = 64 * 1024 + max((each.stat().st_size for each in tmp_path.rglob("*.db*")), default=0)

    with largest_file(limit):
        answer = upload(api, limit + 4096)  # stays in memory until it is stored

    assert (answer.status_code, answer.json["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert not [path for path in api.service.settings.assets_dir.rglob("*") if path.stat().st_size > 8192]
    api.service.ledger.close()


# -- what comes in at the same time ----------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free on the file systems of the two folders, which are two."""
    free = {"tmp": 100 * MB, "data": 100 * MB}

    def name(folder: Path) -> str:
        return "tmp" if str(folder) == tempfile.gettempdir() else "data"

    monkeypatch.setattr(admission, "_device", lambda folder: sorted(free).index(name(folder)))
    monkeypatch.setattr(admission, "_free_bytes", lambda folder: free[name(folder)])
    return free


def fits(found: admission.Admission, size: int) -> bool:
    """Whether a file of this size would be let in now."""
    try:
        with found.receiving(size):
            return True
    except QueueFull:
        return False


@pytest.mark.parametrize("folder", ["tmp", "data"])
def test_files_that_fit_one_by_one_are_not_all_let_in_together(
    lone_api: Any, build: Any, tmp_path: Path, disk: dict[str, int], folder: str
) -> None:
    """Each keeps what it announced free, in both folders, until it is done."""
    url = lone_api.service.settings.database_url.get_secret_value()
    api = build(url, tmp_path / "other", min_free_bytes=10 * MB)
    room = api.service.admission
    disk["tmp" if folder == "data" else "data"] = 10_000 * MB
    free = 100 * MB - (10 * MB if folder == "data" else 0)

    with room.receiving(40 * MB), room.receiving(40 * MB):
        assert fits(room, free - 80 * MB)
        assert not fits(room, free - 80 * MB + 1)
    assert fits(room, free)
    assert not fits(room, free + 1)
    api.service.ledger.close()


def test_a_file_is_held_against_the_disk_as_it_comes_in(lone_api: Any, disk: dict[str, int]) -> None:
    """Somebody else may fill it meanwhile, and a length that was not announced shows only then."""
    room = lone_api.service.admission
    disk["data"] = 1000 * MB

    with room.receiving(0) as note:
        for _ in range(20):
            note(MB)
        disk["tmp"] = disk["data"] = 0
        note(3 * MB)
        with pytest.raises(QueueFull):
            note(MB)


def test_an_upload_that_finds_no_room_is_refused_at_once(lone_api: Any, disk: dict[str, int]) -> None:
    """By what it announces, before a byte is read."""
    disk |= {"tmp": MB, "data": 1000 * MB}
    before = lone_api.service.admission

    assert_queue_full(upload(lone_api, 2 * MB))
    assert upload(lone_api, MB // 2).status_code == 201
    assert before._incoming == set()


def test_bodies_in_memory_are_bounded(lone_api: Any) -> None:
    """What one thread reads counts for all; what was announced and is not there yet takes no place."""
    room = lone_api.service.admission
    room._bodies_limit = MB
    body = {"task_type": "echo", "params": {"text": "x" * 1000}}

    with room.reading(MB) as count, room.reading(MB):
        count(MB - 500)
        refused = lone_api.client.post("/task", json=body)
        batch = lone_api.client.post("/task/batch", json={"tasks": [body]})
        read = lone_api.client.get("/task")
        with pytest.raises(QueueFull):
            count(501)
        count(500)

    assert_queue_full(refused)
    assert_queue_full(batch)
    assert read.status_code == 200
    assert room._bodies == 0
    assert lone_api.client.post("/task", json=body).status_code == 202
    assert lone_api.client.post("/task", data=b"{", content_type="application/json").status_code == 400
    assert room._bodies == 0
    assert lone_api.rows("tasks") == 1


def test_a_body_of_unknown_length_is_counted_while_it_is_read(lone_api: Any) -> None:
    """Chunked, it announces nothing."""
    lone_api.service.admission._bodies_limit = 1000
    text = b'{"task_type": "echo", "params": {"text": "' + b"x" * 1000 + b'"}}'
    chunked = {"wsgi.input_terminated": True}

    answer = lone_api.client.post(
        "/task",
        input_stream=io.BytesIO(text),
        content_type="application/json",
        environ_overrides=chunked,
        headers={"Transfer-Encoding": "chunked"},
    )

    assert_queue_full(answer)
    assert lone_api.service.admission._bodies == 0
