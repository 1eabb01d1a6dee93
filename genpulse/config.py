"""
Settings: one frozen object, read once from ``GENPULSE_*`` variables and a ``.env`` file.

This is the only module that reads the environment. A wrong value stops the start and names itself;
secrets never print. ``docs/reference/settings.md`` lists every setting, and a test holds that
table against this class.
"""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

__all__ = ["ComfyServer", "Settings", "SettingsError", "is_loopback", "is_rate"]

PREFIX = "GENPULSE_"

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

S3Provider = Literal["aws", "oss", "r2", "gcs", "minio"]


class SettingsError(Exception):
    """A setting has a value that cannot be used. Its text names the variable, not the value."""


class ComfyServer(tuple[str, str]):
    """A ComfyUI server as ``(name, url)``; the name is the same for the whole fleet."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The fleet-wide name, part of the queue ``comfy@<name>``."""
        return self[0]

    @property
    def url(self) -> str:
        """The base URL without a trailing slash."""
        return self[1]


class Settings(BaseSettings):
    """Everything that can be set. Durations are seconds, sizes bytes."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    # Where things are
    data_dir: Path = Field(Path("data"), description="Folder for everything embedded: SQLite, assets, logs.")
    database_url: SecretStr = Field(
        SecretStr(""),
        description="The ledger: `postgresql://…`, or `sqlite:///file`. Empty: SQLite in the data folder.",
    )
    database_direct_url: SecretStr = Field(
        SecretStr(""),
        description="PostgreSQL past a transaction pooler, for leases and LISTEN. Empty: the same as the database URL.",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Broker, result backend and live progress: Redis or Valkey.",
    )
    comfy_urls: str = Field(
        "",
        description="ComfyUI servers of this worker, `name=url` separated by commas. An unnamed loopback URL is named `<hostname>:<port>`. Empty: this worker has none.",
    )
    public_url: str = Field(
        "",
        description="The API's address as callers see it, for links in answers. Empty: the request's own address.",
    )

    # API
    host: str = Field(
        "127.0.0.1",
        description="Address the API listens on. Anything but loopback needs an API key, here or in the ledger.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port of the API.")
    api_key: SecretStr = Field(
        SecretStr(""),
        description="A key for a small deployment, beside those of `genpulse keys`; callers send it as `Authorization: Bearer …`. Without any key the API listens on loopback only.",
    )
    api_workers: int = Field(2, ge=1, le=64, description="API processes.")
    api_threads: int = Field(
        544,
        ge=2,
        le=4096,
        description="Threads of each API process, started as they are needed. 32 of them, or half of fewer than 64, are kept free of watchers.",
    )
    max_watchers: int = Field(
        512,
        ge=0,
        description="Event streams and long polls that each API process holds at a time, as far as its threads reach. Beyond it a stream is refused with 503 and a long poll answers at once. Where the ledger has API keys, one owner holds at most half of them.",
    )
    watch_s: float = Field(
        3600,
        gt=0,
        description="How long one event stream or long poll lives at most. A stream is then resumed by its reader.",
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Largest JSON body of a request.")
    max_upload_bytes: int = Field(2 * 2**30, ge=1024, description="Largest uploaded file.")
    proxies: int = Field(
        0,
        ge=0,
        le=10,
        description="Reverse proxies in front of the API; so many entries of `X-Forwarded-For` are believed.",
    )

    # Limits
    submit_rate: str = Field(
        "100/second",
        description="Submissions and uploads of one owner, like `10/second` or `600/minute`. `0`: no limit. Without API keys there is none.",
    )
    max_queued: int = Field(10_000, ge=0, description="Tasks of one owner that may wait. 0: any number.")
    max_queued_total: int = Field(100_000, ge=0, description="Tasks of all that may wait. 0: any number.")
    max_running: int = Field(
        0, ge=0, description="Tasks of one owner that may run at once; more wait. 0: any number."
    )
    min_free_bytes: int = Field(
        256 * 2**20,
        ge=0,
        description="Nothing more is taken in while the data folder's disk has less free, beside what uploads under way will need. Only for what is kept there.",
    )
    wrong_keys: int = Field(
        10,
        ge=1,
        description="Wrong API keys of one address in a minute; after that it is refused until the minute is over.",
    )

    # Tasks
    timeout_s: int = Field(900, ge=1, le=86_400, description="Rendering time of a task that names none.")
    max_attempts: int = Field(
        3, ge=1, le=100, description="Attempts of a task that may end in a retryable error."
    )
    max_lost: int = Field(
        3, ge=0, le=100, description="Attempts that may be lost with their worker before a task fails."
    )
    idempotency_ttl_s: int = Field(86_400, ge=1, description="How long an Idempotency-Key is remembered.")

    retention_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="Days after its end at which a task is deleted with its outputs, and after which uploads go that no task needs. Empty: all is kept for ever.",
    )

    # Workers
    lease_s: float = Field(
        15, gt=0, description="How long a worker may run a task without renewing its lease."
    )
    beat_s: float = Field(
        2,
        gt=0,
        description="How often leases are renewed; three missed beats of a vanished process end them.",
    )
    drain_s: float = Field(
        8, ge=0, description="How long a worker told to stop waits before it hands its tasks back."
    )
    stall_s: float = Field(
        900,
        gt=0,
        description="How long a running prompt may go without progress before its server is cooled off.",
    )
    adopt_wait_s: float = Field(
        120,
        ge=0,
        description="How long a handed-back task waits for a worker of the server that has its prompt.",
    )
    store_timeout_s: float = Field(
        3600, gt=0, description="How long storing the outputs of one attempt may take."
    )
    worker_concurrency: int = Field(
        0,
        ge=0,
        le=256,
        description="Slots of a worker. 0: two per ComfyUI server on `comfy`, else the number of cores; one more where webhooks share the worker.",
    )

    # Storage
    storage: Literal["local", "s3"] = Field("local", description="Where outputs and assets are kept.")
    s3_provider: S3Provider = Field(
        "aws",
        description="Preset for the object store: `aws`, `oss` (Aliyun), `r2`, `gcs` or `minio` (any S3-compatible server).",
    )
    s3_bucket: str = Field("", description="Bucket for outputs and assets.")
    s3_region: str = Field("", description="Region; for OSS like `cn-hangzhou`.")
    s3_endpoint_url: str = Field("", description="Endpoint. Empty: the provider's own for the region.")
    s3_access_key_id: SecretStr = Field(
        SecretStr(""), description="Access key id. Empty: boto3's own search."
    )
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="Secret access key.")
    s3_prefix: str = Field("", description="Put before every key in the bucket.")
    s3_signature_version: str = Field("", description="`s3v4` or `s3`. Empty: the provider's default.")
    s3_multipart_bytes: int = Field(
        16 * 2**20, ge=5 * 2**20, description="Files above this size are uploaded in parts."
    )
    s3_presign_s: int = Field(3600, ge=1, le=604_800, description="How long a signed link works.")
    s3_redirect: bool = Field(
        True,
        description="Answer downloads with a signed link of the object store. `false`: stream them through the API, for a store that callers cannot reach.",
    )

    # Going out: inputs by URL, webhooks
    egress_allow: str = Field(
        "",
        description="What URLs of callers may reach although it is not public: hosts, `.domain`s, addresses and networks (`10.1.0.0/16`), separated by commas. A host in it may be on any port.",
    )
    egress_http: bool = Field(False, description="Whether URLs of callers may be `http:`.")
    egress_ports: str = Field(
        "443,8443", description="Ports that URLs of callers may name, separated by commas."
    )
    input_max_bytes: int = Field(512 * 2**20, ge=1, description="Largest input that is fetched by URL.")
    input_timeout_s: float = Field(120, gt=0, description="How long fetching one input may take in all.")
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="Signs webhooks: `whsec_` and 24 to 64 bytes in base64. Several, separated by commas, while you rotate: each signs. Empty: `callback_url` is refused.",
    )
    webhook_timeout_s: float = Field(
        15, gt=0, le=600, description="How long a webhook's receiver has to answer."
    )
    webhook_schedule_s: str = Field(
        "0,5,60,300,1800,7200,28800,86400",
        description="When a webhook is tried, in seconds after the task's end.",
    )

    # Metrics and traces
    metrics_host: str = Field(
        "127.0.0.1", description="Address on which a worker answers `GET /metrics`, without asking for a key."
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port for it, one for each worker of a host. 0: it counts nothing."
    )
    otlp_endpoint: str = Field(
        "",
        description="Base URL of an OpenTelemetry collector (OTLP over HTTP) that gets the traces. Empty: `OTEL_EXPORTER_OTLP_ENDPOINT`, and without that there are none.",
    )

    # Flower and logs
    flower_host: str = Field(
        "127.0.0.1", description="Address Flower listens on. Anything but loopback needs basic auth."
    )
    flower_port: int = Field(5555, ge=0, le=65535, description="Port of Flower.")
    flower_basic_auth: SecretStr = Field(SecretStr(""), description="`user:password` for Flower.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe log line that is written."
    )
    log_format: Literal["console", "json"] = Field("console", description="How log lines look.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in counts; ``from_env`` is where the environment enters."""
        return (init_settings,)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, env_file: Path | str | None = ".env"
    ) -> Self:
        """
        Read the settings.

        Args:
            environ: The variables; the process's own by default. A test passes a dict.
            env_file: Lines ``GENPULSE_X=…`` that the variables override; skipped if not there.

        Raises:
            SettingsError: A variable is unknown or has a value that cannot be used.
        """
        found: dict[str, str] = {}
        if environ is None:
            environ = os.environ
            if env_file is not None and Path(env_file).is_file():
                from dotenv import dotenv_values

                found |= {key: value or "" for key, value in dotenv_values(env_file).items()}
        found |= environ
        ours = {
            key.removeprefix(PREFIX).lower(): value
            for key, value in found.items()
            if key.startswith(PREFIX) and not key.startswith(_NOT_SETTINGS)
        }
        # OpenTelemetry's own name for it, where all programs of a host share one.
        if not ours.get("otlp_endpoint") and "OTEL_EXPORTER_OTLP_ENDPOINT" in found:
            ours["otlp_endpoint"] = found["OTEL_EXPORTER_OTLP_ENDPOINT"]
        unknown = sorted(set(ours) - set(cls.model_fields))
        if unknown:
            names = ", ".join(PREFIX + name.upper() for name in unknown)
            msg = f"unknown setting: {names} (docs/reference/settings.md lists them all)"
            raise SettingsError(msg)
        return cls.build(**{key: value for key, value in ours.items() if value != ""})

    @classmethod
    def build(cls, **values: Any) -> Self:
        """Make settings from Python values; raises :class:`SettingsError` like :meth:`from_env`."""
        try:
            return cls(**values)
        except ValidationError as error:
            lines = [
                f"{PREFIX + str(problem['loc'][0]).upper() + ': ' if problem['loc'] else ''}"
                f"{problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors(include_url=False, include_input=False)
            ]
            raise SettingsError("; ".join(lines)) from None

    @field_validator("database_url", "database_direct_url")
    @classmethod
    def _name_the_driver(cls, value: SecretStr) -> SecretStr:
        """SQLAlchemy 2.1 reads a bare ``postgresql://`` as psycopg 3, which we do not ship."""
        url = value.get_secret_value()
        if not url:
            return value
        url = re.sub(r"^postgres(ql)?(\+psycopg2)?://", "postgresql+psycopg2://", url)
        if not url.startswith(("postgresql+psycopg2://", "sqlite:///")):
            msg = "must start with postgresql:// or sqlite:///"
            raise ValueError(msg)
        return SecretStr(url)

    @field_validator("submit_rate")
    @classmethod
    def _rate_parses(cls, value: str) -> str:
        if not is_rate(value):
            msg = "must look like 10/second, 600/minute or 1000/hour, or be 0"
            raise ValueError(msg)
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr) -> SecretStr:
        if not re.match(r"^(rediss?|redis\+socket|unix)://", value.get_secret_value()):
            msg = "must start with redis://, rediss:// or unix://"
            raise ValueError(msg)
        return value

    @field_validator("comfy_urls")
    @classmethod
    def _servers_parse(cls, value: str) -> str:
        parse_servers(value)
        return value

    @field_validator("public_url", "s3_endpoint_url", "otlp_endpoint")
    @classmethod
    def _http_url(cls, value: str) -> str:
        if value and not re.match(r"^https?://[^/]+", value):
            msg = "must be an http:// or https:// URL"
            raise ValueError(msg)
        return value.rstrip("/")

    @field_validator("egress_allow")
    @classmethod
    def _allowed_parse(cls, value: str) -> str:
        parse_allowed(value)
        return value

    @field_validator("egress_ports")
    @classmethod
    def _ports_parse(cls, value: str) -> str:
        if not all(part.isdecimal() and 0 < int(part) < 65536 for part in _parts(value)):
            msg = "must be ports, separated by commas"
            raise ValueError(msg)
        return value

    @field_validator("webhook_schedule_s")
    @classmethod
    def _schedule_parse(cls, value: str) -> str:
        try:
            seconds = [float(part) for part in _parts(value)]
        except ValueError:
            seconds = []
        if not seconds or seconds[0] or seconds != sorted(seconds) or seconds[-1] > 30 * 86_400:
            msg = "must be rising numbers of seconds from 0, separated by commas"
            raise ValueError(msg)
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _secrets_parse(cls, value: SecretStr) -> SecretStr:
        for part in _parts(value.get_secret_value()):
            try:
                key = base64.b64decode(part.removeprefix("whsec_"), validate=True)
            except ValueError:
                key = b""
            if not part.startswith("whsec_") or not 24 <= len(key) <= 64:
                msg = "must be whsec_ and 24 to 64 bytes in base64; make one with `genpulse webhook-secret --new`"
                raise ValueError(msg)
        return value

    @field_validator("flower_basic_auth")
    @classmethod
    def _user_and_password(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value() and not re.match(r"^[^:]+:.+$", value.get_secret_value()):
            msg = "must look like user:password"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.flower_basic_auth.get_secret_value() and not is_loopback(self.flower_host):
            msg = f"{PREFIX}FLOWER_HOST: without {PREFIX}FLOWER_BASIC_AUTH Flower listens on loopback only"
            raise ValueError(msg)
        if self.lease_s < 3 * self.beat_s:
            msg = f"{PREFIX}LEASE_S: must be at least three times {PREFIX}BEAT_S"
            raise ValueError(msg)
        if self.storage == "s3" and not self.s3_bucket:
            msg = f"{PREFIX}S3_BUCKET: is needed when {PREFIX}STORAGE is s3"
            raise ValueError(msg)
        return self

    @property
    def ledger_url(self) -> str:
        """The database URL with its default applied. Holds a password: never log it."""
        return self.database_url.get_secret_value() or f"sqlite:///{self.data_dir.absolute() / 'genpulse.db'}"

    @property
    def direct_url_if_any(self) -> str | None:
        """The database past its transaction pooler, if there is one; for leases and LISTEN."""
        return self.database_direct_url.get_secret_value() or None

    @property
    def uses_sqlite(self) -> bool:
        """Whether the ledger is a file on this host."""
        return self.ledger_url.startswith("sqlite")

    @property
    def assets_dir(self) -> Path:
        """Where local storage keeps its files."""
        return self.data_dir / "assets"

    @property
    def webhook_keys(self) -> tuple[bytes, ...]:
        """The keys that sign webhooks, the newest first as they stand in the setting. Never log them."""
        parts = _parts(self.webhook_secret.get_secret_value())
        return tuple(base64.b64decode(part.removeprefix("whsec_")) for part in parts)

    @property
    def webhook_schedule(self) -> tuple[float, ...]:
        """When a webhook is tried, in seconds after the task's end."""
        return tuple(float(part) for part in _parts(self.webhook_schedule_s))

    @property
    def watcher_places(self) -> int:
        """How many watchers an API process takes, so that they never have all of its threads."""
        return min(self.max_watchers, self.api_threads - min(32, self.api_threads // 2))

    @property
    def retention(self) -> dt.timedelta | None:
        """How long a task is kept after its end; ``None`` for ever."""
        return None if self.retention_days is None else dt.timedelta(days=self.retention_days)

    @property
    def servers(self) -> tuple[ComfyServer, ...]:
        """The ComfyUI servers this worker serves, by fleet-wide name."""
        return parse_servers(self.comfy_urls)


# Variables that share the prefix and belong to the tests or to the embedded services.
_NOT_SETTINGS = (f"{PREFIX}TEST_", f"{PREFIX}REQUIRE_", f"{PREFIX}DEV_")


def is_loopback(host: str) -> bool:
    """Whether *host* reaches this machine only."""
    return host in {"localhost", "::1"} or host.startswith("127.")


def is_rate(text: str) -> bool:
    """Whether *text* is a number of submissions for a time, or 0 for no limit."""
    return text == "0" or re.fullmatch(r"[1-9]\d{0,8}/(second|minute|hour)", text, re.ASCII) is not None


def parse_allowed(text: str) -> tuple[frozenset[str], tuple[IPNetwork, ...]]:
    """
    Read ``hooks.corp, .example.org, 10.1.0.0/16`` into names and networks.

    Raises:
        ValueError: Neither a name nor a network.
    """
    names: set[str] = set()
    networks: list[IPNetwork] = []
    for part in _parts(text.lower()):
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError:
            if not re.fullmatch(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*", part) or part.split(".")[-1].isdigit():
                msg = f"{part!r} is neither a host nor a network like 10.1.0.0/16"
                raise ValueError(msg) from None
            names.add(part)
    return frozenset(names), tuple(networks)


def _parts(text: str) -> list[str]:
    return [part for piece in text.split(",") if (part := piece.strip())]


_SERVER_NAME_CHARS = 200


def parse_servers(text: str) -> tuple[ComfyServer, ...]:
    """
    Read ``gpu1=http://127.0.0.1:8188,…``.

    Raises:
        ValueError: Not a URL, two servers of one name, a name that the ledger would not take, or an
            unnamed server on another host, whose name could not be the same for the whole fleet.
    """
    servers: list[ComfyServer] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, url = part.rpartition("=") if re.match(r"^[\w.:-]+=", part) else ("", "", part)
        split = urlsplit(url)
        if split.scheme not in {"http", "https"} or not split.hostname:
            msg = f"{part!r} is not name=http://host:port"
            raise ValueError(msg)
        if not name:
            if not is_loopback(split.hostname):
                msg = f"give the server at {split.hostname} a name: name={url}"
                raise ValueError(msg)
            name = f"{socket.gethostname()}:{split.port or 8188}"
        if len(name) > _SERVER_NAME_CHARS:
            msg = f"a server's name has at most {_SERVER_NAME_CHARS} characters"
            raise ValueError(msg)
        servers.append(ComfyServer((name, url.rstrip("/"))))
    names = [server.name for server in servers]
    if len(set(names)) < len(names):
        msg = "two servers have the same name"
        raise ValueError(msg)
    return tuple(servers)
