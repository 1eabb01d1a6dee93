"""What only an object store can get wrong: presets on the wire, links, parts, lost connections, lies."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from botocore.awsrequest import AWSResponse

from genpulse.errors import LeaseLost, ObjectNotFound, StorageUnavailable
from genpulse.storage import S3Storage
from genpulse.testing.services import FaultProxy, S3Server, free_port
from tests.integration.test_storage_conformance import kill_at_half
from tests.support import wait_until

MIB = 1024 * 1024
KEYS = {"access_key_id": "AKIAGENPULSETEST", "secret_access_key": "genpulse-test-secret"}


@pytest.fixture
def arguments(s3_settings: dict[str, str]) -> dict[str, Any]:
    """How to reach a bucket of this test alone on the verifying server."""
    found = {name.removeprefix("s3_"): value for name, value in s3_settings.items() if name.startswith("s3_")}
    return found | {"multipart_bytes": 5 * MIB}


@pytest.fixture
def make(arguments: dict[str, Any]) -> Iterator[Callable[..., S3Storage]]:
    """Make a storage that differs from *arguments* in some."""
    with contextlib.ExitStack() as stack:

        def make(**changes: Any) -> S3Storage:
            return stack.enter_context(contextlib.closing(S3Storage(**arguments | changes)))

        yield make


@pytest.fixture
def storage(make: Callable[..., S3Storage]) -> S3Storage:
    """The bucket."""
    return make()


@pytest.fixture
def files(s3: S3Server, arguments: dict[str, Any]) -> Path:
    """Where the server keeps the bucket's objects."""
    return s3.root / str(arguments["bucket"])


def put(storage: S3Storage, key: str, data: bytes = b"data", **more: Any) -> None:
    """Store *data*."""
    storage.upload_file(key, io.BytesIO(data), **{"content_type": "image/png"} | more)


def get(storage: S3Storage, key: str, **window: Any) -> bytes:
    """All bytes of an object."""
    with storage.open(key, **window) as stream:
        return stream.read()


def uploads(storage: S3Storage) -> list[str]:
    """Keys of multipart uploads that are still open."""
    return [
        upload["Key"]
        for upload in storage._client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", [])
    ]


def on(storage: S3Storage, event: str, act: Callable[..., Any]) -> None:
    """Hook into botocore: ``before-send.s3`` sees the bytes for the wire, ``after-call`` the parsed answer."""
    storage._client.meta.events.register(event, act)


def captured(storage: S3Storage, act: Callable[[], object]) -> list[Any]:
    """The requests that *act* would send, as they would go out; the answer to each is an empty 200."""
    seen: list[Any] = []

    def answer(request: Any, **_: Any) -> AWSResponse:
        seen.append(request)
        body = request.body.read() if hasattr(request.body, "read") else request.body
        request.sent = body or b""
        raw: Any = io.BytesIO(b"<x><UploadId>u</UploadId></x>")
        raw.stream = lambda amt=None, **_: iter([raw.getvalue()])
        etag = f'"{hashlib.md5(request.sent).hexdigest()}"'
        headers: Any = {"ETag": etag, "Content-Length": str(len(request.sent))}
        return AWSResponse(request.url, 200, headers, raw)

    on(storage, "before-send.s3", answer)
    with contextlib.suppress(StorageUnavailable):
        act()
    return seen


PROVIDERS: list[tuple[str, dict[str, str], str, str]] = [
    ("aws", {"region": "eu-west-1"}, "https://b-1.s3.eu-west-1.amazonaws.com/out/a.png", "AWS4-HMAC-SHA256 "),
    ("aws", {}, "https://b-1.s3.amazonaws.com/out/a.png", "AWS4-HMAC-SHA256 "),
    (
        "aws",
        {"region": "cn-north-1"},
        "https://b-1.s3.cn-north-1.amazonaws.com.cn/out/a.png",
        "AWS4-HMAC-SHA256 ",
    ),
    ("oss", {"region": "cn-hangzhou"}, "https://b-1.s3.oss-cn-hangzhou.aliyuncs.com/out/a.png", "AWS AKIA"),
    (
        "oss",
        {"region": "oss-cn-hangzhou"},
        "https://b-1.s3.oss-cn-hangzhou.aliyuncs.com/out/a.png",
        "AWS AKIA",
    ),
    (
        "oss",
        {"region": "cn-hangzhou", "signature_version": "s3v4"},
        "https://b-1.s3.oss-cn-hangzhou.aliyuncs.com/out/a.png",
        "AWS4-HMAC-SHA256 ",
    ),
    (
        "oss",
        {"endpoint_url": "https://s3.oss-cn-hangzhou-internal.aliyuncs.com", "region": "cn-hangzhou"},
        "https://b-1.s3.oss-cn-hangzhou-internal.aliyuncs.com/out/a.png",
        "AWS AKIA",
    ),
    (
        "r2",
        {"endpoint_url": "https://acc.r2.cloudflarestorage.com"},
        "https://acc.r2.cloudflarestorage.com/b-1/out/a.png",
        "AWS4-HMAC-SHA256 ",
    ),
    ("gcs", {}, "https://storage.googleapis.com/b-1/out/a.png", "AWS4-HMAC-SHA256 "),
    (
        "minio",
        {"endpoint_url": "http://127.0.0.1:9000"},
        "http://127.0.0.1:9000/b-1/out/a.png",
        "AWS4-HMAC-SHA256 ",
    ),
]


@pytest.mark.parametrize(("provider", "more", "url", "authorization"), PROVIDERS)
class TestPresets:
    """What each provider is sent, as captured just before the socket."""

    @pytest.fixture
    def preset(self, provider: str, more: dict[str, str]) -> Iterator[S3Storage]:
        """A storage that never reaches its provider."""
        with contextlib.closing(S3Storage(provider=provider, bucket="b-1", **KEYS, **more)) as storage:  # type: ignore[arg-type]  # text only
            yield storage

    def test_an_upload_is_plain_and_guarded(
        self, preset: S3Storage, provider: str, url: str, authorization: str
    ) -> None:
        """The body goes as it is, never in signed chunks, beside a digest that the store checks."""
        request = captured(preset, lambda: put(preset, "out/a.png", b"data", filename="é.png"))[0]

        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        assert request.url == url
        assert headers["authorization"].startswith(authorization)
        assert request.sent == b"data"
        assert headers["content-length"] == "4"
        assert headers["content-type"] == "image/png"
        assert headers["x-amz-meta-sha256"] == hashlib.sha256(b"data").hexdigest()
        assert headers["x-amz-meta-filename"] == "%C3%A9.png"
        assert headers["content-disposition"].startswith("inline; filename=")
        assert "x-amz-trailer" not in headers
        assert "aws-chunked" not in headers.get("content-encoding", "")
        checksums = [name for name in headers if name.startswith("x-amz-checksum")]
        if provider == "aws":
            assert checksums == ["x-amz-checksum-sha256"]
            assert headers["x-amz-checksum-sha256"] == _base64(hashlib.sha256(b"data"))
        else:
            assert checksums == []
            assert "x-amz-sdk-checksum-algorithm" not in headers
            assert headers["content-md5"] == _base64(hashlib.md5(b"data"))

    def test_parts_are_sent_the_same_way(
        self, preset: S3Storage, provider: str, url: str, authorization: str
    ) -> None:
        """Each part has its digest, and all but the last are of one size."""
        preset._multipart_bytes = 5 * MIB
        data = bytes(11 * MIB)

        requests = captured(preset, lambda: put(preset, "out/a.png", data))

        begin, *parts, finish = requests[:5]
        assert [len(part.sent) for part in parts] == [5 * MIB, 5 * MIB, MIB]
        assert begin.url == f"{url}?uploads"
        assert b"CompleteMultipartUpload" in finish.sent
        for part in parts:
            names = {name.lower() for name in part.headers}
            assert ("content-md5" in names) == (provider != "aws")
            assert ("x-amz-checksum-sha256" in names) == (provider == "aws")
            assert "x-amz-trailer" not in names
        assert (b"ChecksumSHA256" in finish.sent) == (provider == "aws")

    def test_links_are_signed_as_the_provider_wants(
        self, preset: S3Storage, provider: str, url: str, authorization: str
    ) -> None:
        """The link has the provider's host and signature, and says name and type of the answer."""
        link = urlsplit(preset.get_url("out/a.png", filename="é.png", content_type="image/png", expires_s=60))

        assert f"{link.scheme}://{link.netloc}{link.path}" == url
        query = parse_qs(link.query)
        assert query["response-content-disposition"] == [
            "inline; filename=\"e.png\"; filename*=UTF-8''%C3%A9.png"
        ]
        assert query["response-content-type"] == ["image/png"]
        if authorization.startswith("AWS4"):
            assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
            assert query["X-Amz-Expires"] == ["60"]
        else:
            assert query["AWSAccessKeyId"] == ["AKIAGENPULSETEST"]
            assert 50 < int(query["Expires"][0]) - time.time() < 70

    def test_deleting_is_one_call_for_each_key(
        self, preset: S3Storage, provider: str, url: str, authorization: str
    ) -> None:
        """The bulk call needs a Content-MD5 that boto3 no longer sends, so it is never used."""
        request = captured(preset, lambda: preset.delete_file("out/a.png"))[0]

        assert request.method == "DELETE"
        assert request.url == url

    def test_the_secret_is_nowhere_to_be_seen(
        self, preset: S3Storage, provider: str, url: str, authorization: str
    ) -> None:
        """Neither in the object's text nor in a link."""
        assert KEYS["secret_access_key"] not in repr(preset) + str(preset) + preset.get_url("a")


def test_a_bucket_with_dots_is_no_host_name() -> None:
    """No certificate covers such a host, so the bucket goes into the path, and the region stays in the host."""
    with contextlib.closing(S3Storage(bucket="my.bucket", region="eu-west-1", **KEYS)) as storage:  # type: ignore[arg-type]  # text only
        request = captured(storage, lambda: put(storage, "a"))[0]

        assert request.url == "https://s3.eu-west-1.amazonaws.com/my.bucket/a"
        assert storage.get_url("a").startswith("https://s3.eu-west-1.amazonaws.com/my.bucket/a?")


class TestArguments:
    """Mistakes are told when the storage is made, by name."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"provider": "azure"}, "provider"),
            ({"bucket": ""}, "bucket"),
            ({"provider": "oss"}, "region"),
            ({"provider": "r2"}, "endpoint_url"),
            ({"provider": "minio"}, "endpoint_url"),
            ({"access_key_id": "A"}, "secret_access_key"),
            ({"secret_access_key": "s3cr3t"}, "access_key_id"),
            ({"multipart_bytes": 1000}, "multipart_bytes"),
            ({"presign_s": 0}, "604800"),
            ({"presign_s": 604_801}, "604800"),
            ({"prefix": "a/../b"}, "key"),
            ({"prefix": "x" * 121}, "prefix"),
        ],
    )
    def test_a_mistake_is_named(self, arguments: dict[str, Any], words: str) -> None:
        """The message holds the argument's name and never a secret."""
        with pytest.raises(ValueError, match=words) as caught:
            S3Storage(**{"bucket": "b", "provider": "aws", **arguments})

        assert "s3cr3t" not in str(caught.value)

    def test_parts_are_large_enough_for_the_largest_object(self) -> None:
        """Never more than ten thousand parts, never smaller than 5 MiB."""
        storage = S3Storage(bucket="b", multipart_bytes=5 * MIB)

        for size in (6 * MIB, 50 * 1024 * MIB, 5 * 1024 * 1024 * MIB):
            part = storage._part_bytes(size)
            assert part >= 5 * MIB
            assert -(-size // part) <= 10_000

    def test_keys_lie_under_the_prefix(self, make: Callable[..., S3Storage], files: Path) -> None:
        """Two storages in one bucket see only their own."""
        one, two = make(prefix="/one/"), make(prefix="two")
        put(one, "a", b"1")
        put(two, "a", b"2")

        assert list(one.keys()) == list(two.keys()) == ["a"]
        assert (get(one, "a"), get(two, "a")) == (b"1", b"2")
        assert (files / "one" / "a").read_bytes() == b"1"

    def test_what_is_not_ours_is_not_listed(self, storage: S3Storage, files: Path) -> None:
        """An object whose name could not be one of our keys is passed over; the list has many pages."""
        for number in range(1100):
            (files / f"{number:04d}").write_bytes(b"")
        (files / "back\\slash").write_bytes(b"")

        assert sorted(storage.keys()) == [f"{number:04d}" for number in range(1100)]


class TestLinks:
    """Signed links against a server that verifies them."""

    def test_a_link_opens_without_credentials(self, storage: S3Storage) -> None:
        """And gives bytes, type and name as they were stored."""
        put(storage, "out/ä b.png", b"picture", filename="é.png")

        answer = requests.get(storage.get_url("out/ä b.png"), timeout=5)

        assert answer.content == b"picture"
        assert answer.headers["Content-Type"] == "image/png"
        assert (
            answer.headers["Content-Disposition"] == "inline; filename=\"e.png\"; filename*=UTF-8''%C3%A9.png"
        )

    def test_what_can_hold_script_is_stored_as_a_download(self, storage: S3Storage) -> None:
        """A page somebody uploaded does not run where pictures are shown."""
        put(storage, "x", b"<script>", content_type="text/html", filename="x.html")

        headers = requests.get(storage.get_url("x"), timeout=5).headers

        assert headers["Content-Disposition"] == 'attachment; filename="x.html"'

    def test_a_name_decides_what_the_answer_claims_to_be(self, storage: S3Storage) -> None:
        """A link for cat.png promises a picture, one for x.html a download, whatever is stored."""
        picture = parse_qs(urlsplit(storage.get_url("x", filename="cat.png")).query)
        page = parse_qs(urlsplit(storage.get_url("x", filename="x.html")).query)

        assert picture["response-content-type"] == ["image/png"]
        assert picture["response-content-disposition"][0].startswith("inline")
        assert page["response-content-disposition"][0].startswith("attachment")

    @pytest.mark.parametrize("change", ["key", "type", "signature"])
    def test_a_changed_link_is_refused(self, storage: S3Storage, change: str) -> None:
        """It is good for this object and this answer only."""
        put(storage, "a")
        put(storage, "b")
        link = storage.get_url("a", filename="a.png")
        changed = {
            "key": link.replace("/a?", "/b?"),
            "type": link.replace("image%2Fpng", "text%2Fhtml"),
            "signature": link[:-1] + ("0" if link[-1] != "0" else "1"),
        }[change]

        assert requests.get(link, timeout=5).status_code == 200
        assert changed != link
        assert requests.get(changed, timeout=5).status_code == 403

    def test_a_link_expires(self, storage: S3Storage) -> None:
        """A fresh one works again."""
        put(storage, "a")
        link = storage.get_url("a", expires_s=1)

        wait_until(lambda: requests.get(link, timeout=5).status_code == 403, 5)

        assert requests.get(storage.get_url("a"), timeout=5).status_code == 200


class TestRefusals:
    """Configurations that cannot work say so, in words and without a secret."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"bucket": "missing-bucket"}, "bucket does not exist"),
            ({"secret_access_key": "wrong-secret-123"}, "refused our credentials"),
            ({"access_key_id": "AKIAUNKNOWN"}, "refused our credentials"),
        ],
    )
    def test_every_operation_tells_the_reason(
        self, make: Callable[..., S3Storage], changes: dict[str, str], words: str
    ) -> None:
        """Also a HEAD, whose answer from the store is only a number."""
        calls: list[Callable[[S3Storage], object]] = [
            lambda storage: storage.check(),
            lambda storage: put(storage, "a"),
            lambda storage: storage.open("a"),
            lambda storage: storage.stat("a"),
            lambda storage: storage.delete_file("a"),
            lambda storage: list(storage.keys()),
            lambda storage: storage.collect_leftovers(0),
        ]
        for call in calls:
            # Each with a connection of its own: this server breaks one on which it refused a body.
            with pytest.raises(StorageUnavailable, match=words) as caught:
                call(make(**changes))
            assert "secret" not in str(caught.value)

    def test_no_server_is_unavailable(self, make: Callable[..., S3Storage]) -> None:
        """Without the address, which callers may not know."""
        port = free_port()
        storage = make(endpoint_url=f"http://127.0.0.1:{port}", max_tries=1)

        with pytest.raises(StorageUnavailable, match="does not answer") as caught:
            storage.check()
        assert str(port) not in str(caught.value)

    def test_a_server_that_says_nothing_is_unavailable_in_time(
        self,
        make: Callable[..., S3Storage],
        arguments: dict[str, Any],
        fault_proxy: Callable[[str], FaultProxy],
    ) -> None:
        """No call waits for ever."""
        proxy = fault_proxy(arguments["endpoint_url"])
        storage = make(endpoint_url=proxy.url_of(arguments["endpoint_url"]), max_tries=1, read_timeout_s=0.5)
        proxy.set_mode("blackhole")
        began = time.monotonic()

        with pytest.raises(StorageUnavailable, match="does not answer"):
            put(storage, "a")
        assert time.monotonic() - began < 5

    def test_without_credentials_it_says_so(
        self, make: Callable[..., S3Storage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Where boto3's own search finds none."""
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        storage = make(access_key_id="", secret_access_key="")

        for call in (storage.check, lambda: put(storage, "a"), lambda: storage.get_url("a")):
            with pytest.raises(StorageUnavailable, match="no credentials"):
                call()

    def test_credentials_of_the_host_are_found(
        self, make: Callable[..., S3Storage], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Empty settings mean boto3's own search."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", arguments["access_key_id"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", arguments["secret_access_key"])

        make(access_key_id="", secret_access_key="").check()

    def test_a_stray_endpoint_in_the_environment_is_not_used(
        self, make: Callable[..., S3Storage], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only our settings say where objects go."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        storage = make(provider="aws", endpoint_url="", region="eu-west-1")

        assert urlsplit(storage.get_url("a")).netloc.endswith(".s3.eu-west-1.amazonaws.com")

    def test_a_short_outage_is_bridged(
        self,
        make: Callable[..., S3Storage],
        arguments: dict[str, Any],
        fault_proxy: Callable[[str], FaultProxy],
    ) -> None:
        """A connection that is reset is tried again, with the whole body."""
        proxy = fault_proxy(arguments["endpoint_url"])
        storage = make(endpoint_url=proxy.url_of(arguments["endpoint_url"]))
        tries: list[str] = []

        def break_and_mend(request: Any, **_: Any) -> None:
            tries.append(request.method)
            proxy.set_mode("pass" if tries.count("PUT") > 1 else "reset")

        on(storage, "before-send.s3", break_and_mend)

        put(storage, "a", bytes(3 * MIB))

        assert tries == ["PUT", "PUT", "HEAD"]
        assert get(storage, "a") == bytes(3 * MIB)


class TestVerification:
    """A store that holds other bytes than it was sent is found out."""

    def test_bytes_changed_on_the_way_are_refused(self, make: Callable[..., S3Storage], files: Path) -> None:
        """The digest that travels with them does not fit; nothing is stored."""
        storage = make(max_tries=1)

        def spoil(request: Any, **_: Any) -> None:
            if request.method == "PUT":
                request.body = b"DATA"

        on(storage, "before-send.s3", spoil)

        with pytest.raises(StorageUnavailable, match="BadDigest"):
            put(storage, "a", b"data")
        assert not (files / "a").exists()

    @pytest.mark.parametrize("etag", ["not-the-md5", ""])
    def test_a_store_that_proves_nothing_is_read_back(
        self, storage: S3Storage, files: Path, etag: str
    ) -> None:
        """An ETag need not be the MD5; then the object itself is compared, and a wrong one removed."""
        gets: list[str] = []
        on(storage, "before-call.s3.GetObject", lambda **_: gets.append("get"))
        on(storage, "after-call.s3.PutObject", lambda parsed, **_: parsed.update(ETag=f'"{etag}"'))

        put(storage, "good", b"data")
        assert gets == ["get"]

        on(storage, "after-call.s3.PutObject", lambda **_: (files / "bad").write_bytes(b"rot!"))
        with pytest.raises(StorageUnavailable, match="other bytes"):
            put(storage, "bad", b"data")
        with pytest.raises(ObjectNotFound):
            storage.stat("bad")

    def test_a_store_that_vouches_is_not_read_back(self, storage: S3Storage) -> None:
        """The usual case costs one look at the header."""
        gets: list[str] = []
        on(storage, "before-call.s3.GetObject", lambda **_: gets.append("get"))

        put(storage, "a", b"data")
        put(storage, "b", bytes(11 * MIB))

        assert gets == []

    def test_a_store_that_cut_the_object_is_found_out(self, storage: S3Storage, files: Path) -> None:
        """Even when it vouched for the bytes: the size is asked again."""

        def cut(**_: Any) -> None:
            record = files / ".nanio-meta" / "a.json"
            record.write_text(record.read_text().replace('"size":4', '"size":2'))
            (files / "a").write_bytes(b"da")

        on(storage, "after-call.s3.PutObject", cut)

        with pytest.raises(StorageUnavailable, match="other bytes"):
            put(storage, "a", b"data")
        with pytest.raises(ObjectNotFound):
            storage.stat("a")

    def test_a_store_that_forgot_the_object_is_found_out(self, storage: S3Storage, files: Path) -> None:
        """It said yes and has nothing."""
        on(storage, "after-call.s3.PutObject", lambda **_: (files / "a").unlink())

        with pytest.raises(StorageUnavailable, match="does not have it"):
            put(storage, "a", b"data")

    def test_somebody_elses_later_upload_is_no_failure(self, make: Callable[..., S3Storage]) -> None:
        """Another writer replaced the object between our upload and our look at it."""
        storage, other = make(), make()
        on(storage, "after-call.s3.PutObject", lambda **_: put(other, "a", b"a later one"))

        put(storage, "a", b"first")

        assert get(storage, "a") == b"a later one"


# Says "half" when its second part is about to go out, and waits to be killed.
HALF_SENT = """
import io, json, sys, time
from genpulse.storage import S3Storage

def wait(params, **_):
    if params["query_string"]["partNumber"] == 2:
        print("half", flush=True)
        time.sleep(600)

storage = S3Storage(**json.loads(sys.argv[1]))
storage._client.meta.events.register("before-call.s3.UploadPart", wait)
storage.upload_file("out/a.png", io.BytesIO(bytes(15_000_000)), content_type="image/png")
"""


class TestParts:
    """Uploads in parts, whole or not at all."""

    @pytest.mark.parametrize("error", [LeaseLost("gone"), KeyboardInterrupt()])
    def test_a_stopped_upload_is_aborted(self, storage: S3Storage, error: BaseException) -> None:
        """Whatever stops it goes through; no part stays behind to be paid for."""

        def stop(params: Any, **_: Any) -> None:
            if params["query_string"]["partNumber"] == 2:
                assert uploads(storage) == ["a"]
                raise error

        on(storage, "before-call.s3.UploadPart", stop)

        with pytest.raises(type(error)):
            put(storage, "a", bytes(11 * MIB))

        assert uploads(storage) == []
        assert list(storage.keys()) == []

    def test_a_failed_part_is_our_error_and_aborted(self, make: Callable[..., S3Storage]) -> None:
        """The store's refusal becomes ours."""
        storage = make(max_tries=1)

        def spoil(request: Any, **_: Any) -> None:
            if "partNumber=2" in request.url:
                request.body = bytes(5 * MIB)

        on(storage, "before-send.s3", spoil)

        with pytest.raises(StorageUnavailable):
            put(storage, "a", b"x" * 11 * MIB)

        assert uploads(storage) == []

    def test_killed_between_parts_it_is_invisible_and_collected(
        self, storage: S3Storage, arguments: dict[str, Any]
    ) -> None:
        """The old object stays; the open upload is found by its age, and only under our prefix."""
        put(storage, "out/a.png", b"old")

        with kill_at_half(HALF_SENT, arguments):
            assert get(storage, "out/a.png") == b"old"

        assert get(storage, "out/a.png") == b"old"
        assert uploads(storage) == ["out/a.png"]
        assert storage.collect_leftovers(3600) == 0
        assert storage.collect_leftovers(0) == 1
        assert uploads(storage) == []

    def test_uploads_of_others_are_left_alone(self, make: Callable[..., S3Storage]) -> None:
        """Another prefix of the bucket is not ours to clean."""
        ours, theirs = make(prefix="ours"), make(prefix="theirs")
        theirs._client.create_multipart_upload(Bucket=theirs.bucket, Key="theirs/a")

        assert ours.collect_leftovers(0) == 0
        assert uploads(theirs) == ["theirs/a"]


class TestReading:
    """Streams that break on the way."""

    @pytest.fixture
    def proxy(self, arguments: dict[str, Any], fault_proxy: Callable[[str], FaultProxy]) -> FaultProxy:
        """A breakable network before the server."""
        return fault_proxy(arguments["endpoint_url"])

    @pytest.fixture
    def far(self, make: Callable[..., S3Storage], arguments: dict[str, Any], proxy: FaultProxy) -> S3Storage:
        """The bucket behind that network."""
        return make(endpoint_url=proxy.url_of(arguments["endpoint_url"]))

    @pytest.mark.parametrize("window", [{}, {"start": 1000, "length": 20_000_000}])
    def test_a_cut_connection_is_taken_up_where_it_broke(
        self, far: S3Storage, proxy: FaultProxy, window: dict[str, int]
    ) -> None:
        """The reader notices nothing, and no byte comes twice."""
        data = bytes(range(256)) * 100_000
        put(far, "a", data)

        with far.open("a", **window) as stream:
            found = stream.read(100_000)
            proxy.cut()
            while chunk := stream.read(1_000_000):
                found += chunk

        assert found == data[window.get("start", 0) :][: window.get("length")]
        assert proxy.accepted > 1

    def test_a_connection_that_stays_lost_is_an_error(
        self, make: Callable[..., S3Storage], arguments: dict[str, Any], proxy: FaultProxy
    ) -> None:
        """Never a short read that looks like the end."""
        far = make(endpoint_url=proxy.url_of(arguments["endpoint_url"]), max_tries=1)
        put(far, "a", bytes(25 * MIB))

        with far.open("a") as stream:
            stream.read(100_000)
            proxy.set_mode("refuse")
            with pytest.raises(StorageUnavailable):
                stream.read()

    def test_two_versions_are_never_mixed(
        self, far: S3Storage, storage: S3Storage, proxy: FaultProxy
    ) -> None:
        """When the object was replaced meanwhile, going on would give half of each."""
        put(far, "a", b"1" * 25 * MIB)

        with far.open("a") as stream:
            stream.read(100_000)
            put(storage, "a", b"2" * 25 * MIB)
            proxy.cut()
            with pytest.raises(StorageUnavailable, match="replaced"):
                stream.read()

    def test_a_stream_that_is_not_read_to_its_end_can_be_closed(self, storage: S3Storage) -> None:
        """And the storage goes on working."""
        put(storage, "a", bytes(MIB))
        for _ in range(30):
            with storage.open("a") as stream:
                stream.read(10)

        assert get(storage, "a", start=MIB - 3) == b"\0\0\0"


def test_uploading_keeps_memory_bounded(arguments: dict[str, Any]) -> None:
    """An object of 100 MB goes up and comes down in a process that may not grow by half of it."""
    code = """if True:
        import hashlib, io, json, resource, sys
        from genpulse.storage import S3Storage

        class Zeros(io.RawIOBase):
            left = 100_000_000
            def read(self, size=-1, /):
                size = min(size, self.left)
                self.left -= size
                return bytes(size)

        storage = S3Storage(**json.loads(sys.argv[1]))
        storage.check()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stored = storage.upload_file("a", Zeros(), content_type="a/b")
        with storage.open("a") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert stored.size_bytes == 100_000_000 and digest == stored.sha256
        assert grown * (1 if sys.platform == "darwin" else 1024) < 50_000_000, grown
    """
    subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], check=True, timeout=50)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()
