"""
Objects in a bucket of AWS S3, Aliyun OSS, Cloudflare R2, Google Cloud Storage or a MinIO-like server.

What differs between them is written down once, in :data:`PRESETS`; the facts were taken from the
providers' documents and from requests captured on the wire.

- A stream is spooled first, so that its digest can travel with it and a retry can send it again.
- The store is told the digest of all it is sent (SHA-256 on AWS, Content-MD5 elsewhere) and refuses
  other bytes. Where its answer does not prove that it looked, the object is read back.
- Files above ``multipart_bytes`` go up in parts. An upload that fails is aborted; one whose process
  was killed is invisible to readers and removed by :meth:`S3Storage.collect_leftovers`.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import functools
import hashlib
import io
import mimetypes
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, cast
from urllib.parse import quote, unquote

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from genpulse.errors import GenPulseError, ObjectNotFound, StorageUnavailable
from genpulse.storage.base import (
    CHUNK_BYTES,
    DEFAULT_TYPE,
    InvalidKey,
    StorageProvider,
    StoredObject,
    check_key,
    content_disposition,
    shows_inline,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["PRESETS", "Preset", "S3Storage"]

_MIB = 1024 * 1024
_LEAST_PART_BYTES = 5 * _MIB  # S3 refuses smaller parts, the last one excepted
_MOST_PARTS = 10_000
_LONGEST_LINK_S = 604_800  # SigV4 signs for a week at most
_SPOOL_BYTES = 8 * _MIB  # smaller files never touch the disk of this host
_MAX_PREFIX_BYTES = 120


@dataclass(frozen=True, slots=True)
class Preset:
    """
    How one provider wants to be spoken to.

    ``signature_version`` is always given to boto3: with a foreign endpoint and none set it would sign
    links with SigV2, which R2 and others refuse.
    """

    endpoint_url: str | None
    """With ``{region}``; ``None`` leaves it to boto3, ``""`` means that the operator must name one."""
    region: str | None
    signature_version: Literal["s3", "s3v4"]
    addressing_style: Literal["path", "virtual"]
    checksums: bool = False
    """Whether the store knows the ``x-amz-checksum`` headers. boto3 would send them to all of them,
    as trailers in ``aws-chunked`` bodies, which OSS and others refuse."""


PRESETS: Mapping[str, Preset] = {
    # "auto" would sign links for the global host, which redirects to the region and refuses them there.
    "aws": Preset(None, None, "s3v4", "virtual", checksums=True),
    # Path style is refused (SecondLevelDomainForbidden). Aliyun's own document asks for SigV2, yet some
    # accounts have it switched off: hence the setting for the signature.
    "oss": Preset("https://s3.oss-{region}.aliyuncs.com", "", "s3", "virtual"),
    "r2": Preset("", "auto", "s3v4", "path"),
    "gcs": Preset("https://storage.googleapis.com", "auto", "s3v4", "path"),
    "minio": Preset("", "us-east-1", "s3v4", "path"),
}


class S3Storage(StorageProvider):
    """
    Keep objects in one bucket, under *prefix*.

    Nothing is connected before the first call; every process that shares the object after a fork
    makes its own connections.

    Args:
        provider: A name in :data:`PRESETS`.
        region: Needed for ``oss`` (``cn-hangzhou``); the others have one.
        endpoint_url: Needed for ``r2`` and ``minio``; overrides the preset's elsewhere.
        access_key_id: Empty, like the secret: boto3's own search (files, instance role).
        prefix: Put before every key, with a slash between.
        signature_version: ``s3v4`` or ``s3``; empty means the preset's.
        multipart_bytes: Larger files are sent in parts.
        presign_s: How long a link of :meth:`get_url` works if nothing else is said.
        redirects: Callers can reach the store, so downloads may be links to it (``signs_urls``).

    Raises:
        ValueError: Names the argument that is missing or wrong.
    """

    def __init__(
        self,
        *,
        bucket: str,
        provider: str = "aws",
        region: str = "",
        endpoint_url: str = "",
        access_key_id: str = "",
        secret_access_key: str = "",
        prefix: str = "",
        signature_version: str = "",
        multipart_bytes: int = 16 * _MIB,
        presign_s: int = 3600,
        redirects: bool = True,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        max_tries: int = 4,
    ) -> None:
        if provider not in PRESETS:
            msg = f"provider: {provider!r} is none of {', '.join(PRESETS)}"
            raise ValueError(msg)
        if not bucket:
            msg = "bucket: is missing"
            raise ValueError(msg)
        if bool(access_key_id) != bool(secret_access_key):
            msg = "access_key_id and secret_access_key: give both or neither"
            raise ValueError(msg)
        if multipart_bytes < _LEAST_PART_BYTES:
            msg = f"multipart_bytes: at least {_LEAST_PART_BYTES}"
            raise ValueError(msg)
        self.preset = PRESETS[provider]
        self.bucket = bucket
        self.prefix = _clean_prefix(prefix)
        self.presign_s = _link_time(presign_s)
        self.signs_urls = redirects
        self._multipart_bytes = multipart_bytes
        region = region.removeprefix("oss-") if provider == "oss" else region
        self._credentials = (access_key_id or None, secret_access_key or None)
        self._region = region or self.preset.region or None
        self._endpoint_url = endpoint_url or _preset_endpoint(provider, region)
        style = self.preset.addressing_style
        if provider == "aws" and "." in bucket:
            # No certificate covers a host name with the bucket's dots in it.
            style = "path"
            china = ".cn" if region.startswith("cn-") else ""
            self._endpoint_url = endpoint_url or f"https://s3.{region or 'us-east-1'}.amazonaws.com{china}"
        self._config = _config(
            signature_version or self.preset.signature_version,
            style,
            checksums=self.preset.checksums,
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": max_tries},
        )
        self._made: tuple[int, S3Client] | None = None

    def get_url(
        self,
        key: str,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        expires_s: int | None = None,
    ) -> str:
        """
        A link that was signed just now and opens without credentials.

        Without *filename* and *content_type* the answer carries what was given at the upload. With a
        name alone its type is guessed from it; what could hold script is offered as a download.
        """
        params = {"Bucket": self.bucket, "Key": self._full(check_key(key))}
        if filename is not None or content_type is not None:
            kind = content_type or mimetypes.guess_type(filename or key)[0] or DEFAULT_TYPE
            params["ResponseContentDisposition"] = content_disposition(filename, inline=shows_inline(kind))
            params["ResponseContentType"] = kind
        seconds = self.presign_s if expires_s is None else _link_time(expires_s)
        with _translated():
            return self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=seconds)

    def check(self) -> None:
        """Ask for the bucket. The key needs the right to list it."""
        with _translated():
            self._client.head_bucket(Bucket=self.bucket)

    def collect_leftovers(self, older_than_s: float) -> int:
        """Abort multipart uploads under our prefix that began before that time, by the store's clock."""
        limit, removed = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=older_than_s), 0
        with _translated():
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for upload in page.get("Uploads", ()):
                    if upload["Key"].startswith(self.prefix) and upload["Initiated"] <= limit:
                        self._abort(upload["Key"], upload["UploadId"])
                        removed += 1
        return removed

    def close(self) -> None:
        """Close this process's connections."""
        made, self._made = self._made, None
        if made and made[0] == os.getpid():
            made[1].close()

    @contextlib.contextmanager
    def _stage(self) -> Iterator[IO[bytes]]:
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as staged:
            yield staged

    def _publish(self, staged: IO[bytes], wanted: StoredObject) -> bool:
        # Parts only where they are needed: one PUT is one request, and its ETag proves more.
        send = self._put_parts if wanted.size_bytes > self._multipart_bytes else self._put_whole
        with _translated():
            return send(staged, wanted)

    def _put_whole(self, staged: IO[bytes], wanted: StoredObject) -> bool:
        digests = _Digests.of(staged)
        staged.seek(0)
        answer = self._client.put_object(
            Bucket=self.bucket,
            Key=self._full(wanted.key),
            Body=staged,
            ContentLength=wanted.size_bytes,
            **_headers(wanted),
            **digests.guard(self.preset),
        )
        return digests.vouched_by(answer)

    def _put_parts(self, staged: IO[bytes], wanted: StoredObject) -> bool:
        place: dict[str, Any] = {"Bucket": self.bucket, "Key": self._full(wanted.key)}
        algorithm: dict[str, Any] = {"ChecksumAlgorithm": "SHA256"} if self.preset.checksums else {}
        begun = self._client.create_multipart_upload(**place, **_headers(wanted), **algorithm)
        upload_id = begun["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            vouched = True
            # All parts but the last are of one size, which R2 insists on.
            while chunk := staged.read(self._part_bytes(wanted.size_bytes)):
                digests = _Digests.of(io.BytesIO(chunk))
                number = len(parts) + 1
                answer = self._client.upload_part(
                    **place,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=chunk,
                    **digests.guard(self.preset),
                )
                vouched = vouched and digests.vouched_by(answer)
                checksum = {"ChecksumSHA256": digests.sha256} if self.preset.checksums else {}
                parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksum})
            listed = cast("Any", {"Parts": parts})
            self._client.complete_multipart_upload(**place, UploadId=upload_id, MultipartUpload=listed)
        except BaseException:
            # Whatever it was, a stopped attempt too: parts of an open upload are paid for.
            with contextlib.suppress(BotoCoreError, ClientError):
                self._abort(place["Key"], upload_id)
            raise
        return vouched

    def _part_bytes(self, size_bytes: int) -> int:
        most = -(-size_bytes // _MOST_PARTS)
        return max(_LEAST_PART_BYTES, min(self._multipart_bytes, 16 * _MIB), -(-most // _MIB) * _MIB)

    def _abort(self, full_key: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=full_key, UploadId=upload_id)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":
                raise

    def _stat(self, key: str) -> StoredObject:
        with self._looking_for(key):
            head = self._client.head_object(Bucket=self.bucket, Key=self._full(key))
        # Some servers give metadata names back in another case.
        metadata = {name.lower(): value for name, value in head.get("Metadata", {}).items()}
        name = metadata.get("filename")
        return StoredObject(
            key=key,
            size_bytes=head["ContentLength"],
            content_type=head.get("ContentType", DEFAULT_TYPE),
            sha256=metadata.get("sha256"),
            filename=unquote(name) if name else None,
        )

    def _open(self, key: str, start: int, length: int | None) -> BinaryIO:
        end = etag = None
        if start or length is not None:
            # A range that leaves the object means 416 to one store, 400 to another, and to OSS "send it all".
            with self._looking_for(key):
                head = self._client.head_object(Bucket=self.bucket, Key=self._full(key))
            size, etag = head["ContentLength"], head["ETag"]
            end = size if length is None else min(size, start + length)
            if start >= end:
                return io.BytesIO()
        fetch = functools.partial(self._fetch, key, end)
        return io.BufferedReader(_Body(fetch, start, etag), CHUNK_BYTES // 4)

    def _fetch(self, key: str, end: int | None, start: int, etag: str | None) -> Mapping[str, Any]:
        """GetObject's answer for the bytes from *start* to *end* of one version."""
        wanted: dict[str, Any] = {"IfMatch": etag} if etag else {}
        if start or end is not None:
            wanted["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        with self._looking_for(key):
            answer = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **wanted)
        if "Range" in wanted and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            answer["Body"].close()
            msg = "the object store gave another range than was asked for"
            raise StorageUnavailable(msg)
        if etag and answer["ETag"] != etag:  # not every store heeds If-Match
            answer["Body"].close()
            msg = "the object was replaced while it was read"
            raise StorageUnavailable(msg)
        return answer

    def _delete(self, key: str) -> None:
        # One by one: delete_objects needs a Content-MD5 on OSS, which boto3 no longer sends.
        with contextlib.suppress(ObjectNotFound), self._looking_for(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._full(key))

    def _keys(self, prefix: str) -> Iterator[str]:
        with _translated():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._full(prefix)):
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self.prefix)
                    with contextlib.suppress(InvalidKey):  # something that is not ours, like "folder/"
                        yield check_key(key)

    def _full(self, key: str) -> str:
        return self.prefix + key

    @contextlib.contextmanager
    def _looking_for(self, key: str) -> Iterator[None]:
        """Say "not found" only if the bucket is there: a HEAD cannot tell the two apart."""
        with _translated():
            try:
                yield
            except ClientError as error:
                if _code(error) not in {"404", "NoSuchKey", "NotFound"}:
                    raise
                self._require_bucket()
                msg = f"no object under {key!r}"
                raise ObjectNotFound(msg) from error

    def _require_bucket(self) -> None:
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            # A key that may not list its bucket gets 403 here and is believed.
            if _status(error) == 404:
                raise StorageUnavailable(_NO_BUCKET) from error

    @property
    def _client(self) -> S3Client:
        # Sockets must not be shared across a fork; two threads racing here make one client too many.
        made = self._made
        if made is None or made[0] != os.getpid():
            key_id, secret = self._credentials
            client: S3Client = boto3.session.Session().client(
                "s3",
                region_name=self._region,
                endpoint_url=self._endpoint_url,
                aws_access_key_id=key_id,
                aws_secret_access_key=secret,
                config=self._config,
            )
            made = self._made = (os.getpid(), client)
        return made[1]


class _Body(io.RawIOBase):
    """An object's bytes from the network; a lost connection is taken up again where it broke."""

    def __init__(
        self, fetch: Callable[[int, str | None], Mapping[str, Any]], start: int, etag: str | None
    ) -> None:
        self._fetch = fetch
        self._at = start
        self._etag = etag
        self._stream: Any = io.BytesIO()  # something to close if connecting fails
        self._connect()

    def _connect(self) -> None:
        """Ask for what is still to come, of the same version."""
        answer = self._fetch(self._at, self._etag)
        self._etag = answer["ETag"]
        self._stream = answer["Body"]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        for tries_left in (2, 1, 0):
            try:
                with _translated():
                    data: bytes = self._stream.read(len(buffer))
                break
            except StorageUnavailable:
                self._stream.close()
                if not tries_left:
                    raise
                self._connect()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@dataclass(frozen=True, slots=True)
class _Digests:
    """What the store is told of the bytes it is sent, in base64."""

    md5: str
    sha256: str

    @classmethod
    def of(cls, stream: IO[bytes]) -> _Digests:
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
        return cls(_base64(md5.digest()), _base64(sha256.digest()))

    def guard(self, preset: Preset) -> dict[str, Any]:
        """The header with which the store refuses other bytes."""
        return {"ChecksumSHA256": self.sha256} if preset.checksums else {"ContentMD5": self.md5}

    def vouched_by(self, answer: Mapping[str, Any]) -> bool:
        """Whether the answer names a digest which the store made. An ETag is the MD5 often, not always."""
        etag = answer.get("ETag", "").strip('"').lower()
        return answer.get("ChecksumSHA256") == self.sha256 or etag == base64.b64decode(self.md5).hex()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _headers(wanted: StoredObject) -> dict[str, Any]:
    # Metadata travels in HTTP headers, hence the percent signs.
    name = {"filename": quote(wanted.filename, safe="")} if wanted.filename else {}
    return {
        "ContentType": wanted.content_type,
        "ContentDisposition": content_disposition(wanted.filename, inline=shows_inline(wanted.content_type)),
        "Metadata": {"sha256": wanted.sha256 or "", **name},
    }


def _config(
    signature_version: str, style: Literal["path", "virtual"], *, checksums: bool, **more: Any
) -> Config:
    more["ignore_configured_endpoint_urls"] = True  # our settings say where, no stray AWS_ENDPOINT_URL
    when: Literal["when_supported", "when_required"] = "when_supported" if checksums else "when_required"
    return Config(
        signature_version=signature_version,
        s3={"addressing_style": style},
        request_checksum_calculation=when,
        response_checksum_validation=when,
        tcp_keepalive=True,
        max_pool_connections=16,
        **more,
    )


def _preset_endpoint(provider: str, region: str) -> str | None:
    template = PRESETS[provider].endpoint_url
    if template is None:
        return None
    if not template:
        msg = f"endpoint_url: is needed for {provider}"
        raise ValueError(msg)
    if "{region}" in template and not region:
        msg = f"region: is needed for {provider}"
        raise ValueError(msg)
    return template.format(region=region)


def _clean_prefix(prefix: str) -> str:
    prefix = prefix.strip("/")
    if len(prefix.encode()) > _MAX_PREFIX_BYTES:
        msg = f"prefix: at most {_MAX_PREFIX_BYTES} bytes"
        raise ValueError(msg)
    return f"{check_key(prefix)}/" if prefix else ""


def _link_time(seconds: int) -> int:
    if not 1 <= seconds <= _LONGEST_LINK_S:
        msg = f"a signed link works for 1 to {_LONGEST_LINK_S} seconds"
        raise ValueError(msg)
    return seconds


_NO_BUCKET = "the storage bucket does not exist"
_REFUSED = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what boto3 raises into ours. Its own words name hosts and keys, so only codes are kept."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise _ours(error) from error


def _ours(error: BotoCoreError | ClientError) -> GenPulseError:
    if isinstance(error, ClientError):
        code = _code(error)
        if code == "NoSuchBucket" or (error.operation_name == "HeadBucket" and _status(error) == 404):
            return StorageUnavailable(_NO_BUCKET)
        if code in _REFUSED:
            return StorageUnavailable(f"the object store refused our credentials ({code})")
        return StorageUnavailable(f"the object store answered {code or _status(error)}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StorageUnavailable("there are no credentials for the object store")
    if isinstance(error, BotoConnectionError | HTTPClientError):
        return StorageUnavailable(f"the object store does not answer ({type(error).__name__})")
    return StorageUnavailable(f"the object store cannot be used ({type(error).__name__})")
