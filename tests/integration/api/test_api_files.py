"""Files in and out over HTTP: uploads, outputs, assets, ranges and digests."""

from __future__ import annotations

import hashlib
import io
import resource
import tracemalloc
from typing import Any

import pytest

from genpulse.model import NewOutput, OutputKind, TaskStatus
from tests.support.ledger import at_once

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0" * 100
CONTENT = bytes(range(256)) * 40
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def upload(api: Any, content: bytes, name: str = "a.png", *, client: Any = None, **more: Any) -> Any:
    """POST one file."""
    return (client or api.client).post("/storage/upload", data={"file": (io.BytesIO(content), name)}, **more)


def stored_output(api: Any, content: bytes, content_type: str = "image/png", name: str = "a.png") -> str:
    """The address of an output with this content."""
    task_id = api.submit()["task_id"]
    api.complete(task_id, (name, content, content_type))
    return str(api.client.get(f"/task/{task_id}").json["outputs"][0]["url"])


class Pattern(io.RawIOBase):
    """A stream of *size* bytes that takes no memory."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Zeros."""
        count = min(len(buffer), self._left)
        buffer[:count] = bytes(count)
        self._left -= count
        return count


def test_an_upload_is_stored_under_its_digest(api: Any) -> None:
    """The answer names the bytes by digest, and they can be read back."""
    answer = upload(api, PNG, "../../ü.png")

    asset = answer.json
    digest = hashlib.sha256(PNG).hexdigest()
    assert answer.status_code == 201
    assert asset["key"] == f"assets/default/{digest}/{asset['id']}.png"
    assert (asset["sha256"], asset["size_bytes"], asset["name"]) == (digest, len(PNG), "ü.png")
    assert answer.headers["Location"] == asset["url"]
    assert api.client.get(asset["url"]).data == PNG
    assert api.service.ledger.get_asset(asset["id"], "default").content_type == "image/png"


def test_the_same_upload_twice_is_one_asset(api: Any) -> None:
    """A caller may repeat an upload whose answer got lost."""
    assert upload(api, PNG).json["id"] == upload(api, PNG).json["id"]
    assert api.rows("assets") == len(list(api.service.storage.keys())) == 1


def test_the_same_bytes_under_two_names_are_stored_once(api: Any) -> None:
    """Each name is an asset of its own; they share the object."""
    one, other = upload(api, PNG, "a.png").json, upload(api, PNG, "b.png").json

    assert one["id"] != other["id"]
    assert (one["key"], other["name"]) == (other["key"], "b.png")
    assert len(list(api.service.storage.keys())) == 1


def test_many_uploads_of_the_same_file_at_once_are_one_asset(api: Any) -> None:
    """Whoever comes first is recorded; what the others stored meanwhile is noted for removal."""
    found = at_once(4, lambda _: upload(api, PNG, client=api.app.test_client()).json)

    assert len({asset["id"] for asset in found}) == api.rows("assets") == 1
    assert api.rows("removals") == len(list(api.service.storage.keys())) - 1


def test_a_repeated_upload_brings_lost_bytes_back(api: Any) -> None:
    """The record alone is no file: whoever sends the bytes again gets them stored again."""
    asset = upload(api, PNG).json
    api.service.storage.delete_file(asset["key"])

    assert upload(api, PNG).json["id"] == asset["id"]
    assert api.client.get(asset["url"]).data == PNG


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (PNG, "page.html", "image/png"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "x.png", "image/jpeg"),
        (b"<html><script>alert(1)</script>", "a.png", "text/plain"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.svg", "text/plain"),
        ("ein Gedicht für dich".encode() * 1000, "p.txt", "text/plain"),
        (b"\x00\x01\x02\x03", "a.txt", "application/octet-stream"),
    ],
)
def test_the_type_is_read_from_the_bytes(lone_api: Any, content: bytes, name: str, expected: str) -> None:
    """Neither the name nor the caller's word decides what a file is served as."""
    assert upload(lone_api, content, name).json["content_type"] == expected


def test_nothing_stored_is_ever_a_page_of_ours(api: Any) -> None:
    """HTML, SVG and scripts leave as an attachment of no type; all leaves sandboxed and unsniffed."""
    for content_type in (
        "text/html",
        "image/svg+xml",
        "application/xhtml+xml",
        "text/javascript",
        "application/pdf",
    ):
        answer = api.client.get(stored_output(api, b"<script>alert(1)</script>", content_type, "x.html"))

        assert answer.headers["Content-Type"] == "application/octet-stream", content_type
        assert answer.headers["Content-Disposition"].startswith("attachment")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in answer.headers["Content-Security-Policy"]


def test_a_picture_is_shown_in_place_under_its_own_name(api: Any) -> None:
    """Inline, with a name of any script that cannot break out of the header."""
    answer = api.client.get(stored_output(api, PNG, name='a"\r\nSet-Cookie: x=ü.png'))

    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["Content-Disposition"].startswith("inline; filename=")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=10000-", 10_000, 10_239),
        ("bytes=-5", 10_235, 10_239),
        ("bytes=10239-99999", 10_239, 10_239),
        ("bytes=-99999", 0, 10_239),
    ],
)
def test_a_range_is_answered_with_its_bytes(lone_api: Any, asked: str, first: int, last: int) -> None:
    """A player can seek, and a broken download goes on where it stopped."""
    url = stored_output(lone_api, CONTENT)

    answer = lone_api.client.get(url, headers={"Range": asked})

    assert answer.status_code == 206
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/10240"
    assert answer.data == CONTENT[first : last + 1]
    assert int(answer.headers["Content-Length"]) == len(answer.data)


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=a-b", "lines=0-1", "bytes=0-1,4-5", "bytes=", "x", "bytes=-"]
)
def test_a_range_that_is_none_gets_the_whole(lone_api: Any, asked: str) -> None:
    """A range is a wish; what cannot be understood, or asks for several, is answered in full."""
    answer = lone_api.client.get(stored_output(lone_api, CONTENT), headers={"Range": asked})

    assert (answer.status_code, answer.data) == (200, CONTENT)


def test_a_range_behind_the_end_is_416(lone_api: Any) -> None:
    """The answer tells how long the file is."""
    answer = lone_api.client.get(stored_output(lone_api, CONTENT), headers={"Range": "bytes=10240-"})

    assert (answer.status_code, answer.json["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == "bytes */10240"


def test_a_range_of_a_changed_file_gets_the_whole(lone_api: Any) -> None:
    """``If-Range`` with another digest: the pieces would not fit together."""
    url = stored_output(lone_api, CONTENT)
    etag = lone_api.client.get(url).headers["ETag"]

    same = lone_api.client.get(url, headers={"Range": "bytes=0-1", "If-Range": etag})
    other = lone_api.client.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'})

    assert (same.status_code, other.status_code) == (206, 200)


def test_known_bytes_are_304_and_wrong_ones_412(lone_api: Any) -> None:
    """The digest is the ETag."""
    url = stored_output(lone_api, CONTENT)
    etag = f'"{hashlib.sha256(CONTENT).hexdigest()}"'

    assert lone_api.client.get(url).headers["ETag"] == etag
    assert lone_api.client.get(url, headers={"If-None-Match": f'"x", W/{etag}'}).status_code == 304
    assert lone_api.client.get(url, headers={"If-None-Match": "*"}).status_code == 304
    assert lone_api.client.get(url, headers={"If-Match": '"x"'}).status_code == 412


def test_head_tells_all_but_the_bytes(api: Any) -> None:
    """Size, type and digest without a transfer."""
    url = stored_output(api, CONTENT)

    whole, head = api.client.get(url), api.client.head(url)

    assert (head.status_code, head.data) == (200, b"")
    for name in ("Content-Length", "Content-Type", "ETag", "Accept-Ranges", "Content-Disposition"):
        assert head.headers[name] == whole.headers[name]


def test_an_output_whose_file_is_gone_is_410(api: Any) -> None:
    """The address was right; what it stood for was deleted. HEAD and a cached copy say the same."""
    url = stored_output(api, CONTENT)
    etag = api.client.get(url).headers["ETag"]
    for key in list(api.service.storage.keys()):
        api.service.storage.delete_file(key)

    answers = [
        api.client.get(url),
        api.client.head(url),
        api.client.get(url, headers={"If-None-Match": etag}),
    ]

    assert [answer.status_code for answer in answers] == [410, 410, 410]
    assert answers[0].json["code"] == "gone"


def test_an_output_that_never_was_is_404(api: Any) -> None:
    """By number, by sign, by size, or before the task has run."""
    task_id = api.submit()["task_id"]
    for index in ("0", "1", "-1", "x", "9" * 30, "1.0"):
        assert api.client.get(f"/task/{task_id}/outputs/{index}").status_code == 404


def test_only_files_that_somebody_owns_can_be_read(api: Any) -> None:
    """What an attempt left behind that lost its task is served to nobody, though it lies in storage."""
    api.service.storage.upload_file("outputs/stray/1/0", io.BytesIO(PNG), content_type="image/png")

    assert api.client.get("/static/assets/outputs/stray/1/0").status_code == 404


@pytest.mark.parametrize(
    "key",
    ["../genpulse.db", "%2e%2e/genpulse.db", "a//b", "/etc/passwd", "a%00b", "a%5cb", "%ff", "x" * 5000, "."],
)
def test_a_key_that_cannot_be_one_is_404(lone_api: Any, key: str) -> None:
    """No path leads out of the storage, and no key is an error of another kind."""
    assert lone_api.client.get(f"/static/assets/{key}").status_code == 404


def test_an_object_store_is_answered_by_a_signed_link(
    api: Any, s3_settings: dict[str, str], build: Any
) -> None:
    """302 to a link that works by itself, fresh each time; the API carries no bytes."""
    import urllib.request

    other = build(api.service.settings.ledger_url, api.service.settings.data_dir, **s3_settings)
    task_id = other.submit()["task_id"]
    other.complete(task_id, ("a.png", PNG, "image/png"))
    url = other.client.get(f"/task/{task_id}").json["outputs"][0]["url"]

    answer = other.client.get(url)

    assert answer.status_code == 302
    assert answer.headers["Cache-Control"] == "no-store"
    with urllib.request.urlopen(answer.headers["Location"]) as stored:
        assert stored.read() == PNG
    assert other.client.get(f"/static/assets/outputs/{task_id}/1/0").status_code == 404
    other.service.ledger.close()


def test_an_upload_takes_no_memory(lone_api: Any, build: Any, tmp_path: Any) -> None:
    """A file of 96 MB goes through a few megabytes."""
    size = 96 * 2**20
    big = build(lone_api.service.settings.ledger_url, tmp_path / "big", max_upload_bytes=2 * size)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="zeros"\r\n\r\n'
    tail = b"\r\n--b--\r\n"
    body = _Joined(head, Pattern(size), tail)
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        answer = big.client.post(
            "/storage/upload",
            environ_overrides={
                "wsgi.input": body,
                "CONTENT_TYPE": "multipart/form-data; boundary=b",
                "CONTENT_LENGTH": str(size + len(head) + len(tail)),
            },
        )
        _, traced = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert answer.status_code == 201, answer.text
    assert answer.json["size_bytes"] == size
    assert traced < 16 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 48 * 1024
    big.service.ledger.close()


class _Joined(io.RawIOBase):
    def __init__(self, *parts: Any) -> None:
        self._parts = [io.BytesIO(part) if isinstance(part, bytes) else part for part in parts]

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """From the first part that has something left."""
        while self._parts:
            data = self._parts[0].read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._parts.pop(0)
        return 0


def test_a_download_takes_no_memory(lone_api: Any) -> None:
    """The bytes go out in pieces as they are read."""
    size = 64 * 2**20
    task_id = lone_api.submit()["task_id"]
    claim = lone_api.claim(task_id)
    stored = lone_api.service.storage.upload_file(
        "big", io.BufferedReader(Pattern(size)), content_type="video/mp4"
    )
    output = NewOutput("9", "a.mp4", OutputKind.VIDEO, "video/mp4", size, str(stored.sha256), "big")
    lone_api.service.ledger.finish(claim.fence, TaskStatus.COMPLETED, outputs=[output])
    tracemalloc.start()
    try:
        answer = lone_api.client.get(f"/task/{task_id}/outputs/0", buffered=False)
        total = sum(len(piece) for piece in answer.response)
        _, traced = tracemalloc.get_traced_memory()
        answer.close()
    finally:
        tracemalloc.stop()

    assert total == size
    assert traced < 8 * 2**20


def test_a_file_above_the_limit_is_413_and_leaves_nothing(api: Any) -> None:
    """Refused while it is read; neither storage nor ledger keep a part of it."""
    limit = api.service.settings.max_upload_bytes

    def send(size: int) -> Any:  # werkzeug's own encoder leaves a temporary file open
        body = FORM + b"\0" * size + b"\r\n--b--\r\n"
        return api.client.post("/storage/upload", data=body, content_type="multipart/form-data; boundary=b")

    told, fits = send(limit + 1), send(limit)

    assert (told.status_code, told.json["code"]) == (413, "too_large")
    assert fits.status_code == 201
    assert len(list(api.service.storage.keys())) == api.rows("assets") == 1


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"\r\n", "multipart/form-data; boundary=b", 400),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 422),
        (b"rubbish", "multipart/form-data; boundary=b", 400),
        (FORM + b"x", "multipart/form-data; boundary=b", 400),
        (FORM + b"x\r\n--b--\r\n", "multipart/form-data", 400),
        (FORM + b"x\r\n--b--\r\n", "multipart/form-data; boundary=" + "b" * 300, 400),
        (FORM + b"x\r\n--b--\r\n", "multipart/form-data; boundary=c", 400),
        (FORM + b"x\r\n--b--\r\n", "application/json", 415),
        (FORM + b"x\r\n--b--\r\n", "", 415),
        (FORM + b"\r\n--b--\r\n", "multipart/form-data; boundary=b", 422),
        (FORM.replace(b'"file"', b'"other"') + b"x\r\n--b--\r\n", "multipart/form-data; boundary=b", 422),
        (FORM.replace(b'; filename="a"', b"") + b"x\r\n--b--\r\n", "multipart/form-data; boundary=b", 422),
        (FORM + b"x\r\n" + FORM + b"y\r\n--b--\r\n", "multipart/form-data; boundary=b", 422),
        (b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", 400),
        (b"--b\r\n" + b"X" * 400_000, "multipart/form-data; boundary=b", 413),
        (
            b"--b\r\nContent-Disposition: \xff\xfe\r\n\r\nx\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
            400,
        ),
        (FORM.replace(b"form-data; ", b"") * 20, "multipart/form-data; boundary=b", 400),
    ],
)
def test_a_form_that_is_none_is_refused(lone_api: Any, body: bytes, content_type: str, status: int) -> None:
    """Every broken form gets an answer below 500 and leaves nothing behind."""
    answer = lone_api.client.post("/storage/upload", data=body, headers={"Content-Type": content_type})

    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/problem+json"
    assert lone_api.rows("assets") == len(list(lone_api.service.storage.keys())) == 0


def test_a_form_of_many_parts_is_refused_early(lone_api: Any) -> None:
    """A form is one file; thousands of small parts are work for nothing."""
    part = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\ny\r\n'

    answer = lone_api.client.post(
        "/storage/upload",
        data=part * 1000 + b"--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )

    assert (answer.status_code, answer.json["code"]) == (400, "invalid_form")
