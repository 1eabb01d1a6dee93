"""
The whole of GenPulse on one machine, with nothing installed: ``genpulse start-all`` and the demo.

It is the same code as in a grown-up deployment, as separate processes with the same command lines;
only Valkey, SQLite and (if nothing better is named) the ComfyUI simulator are brought along. It promises:

- Every process runs under :mod:`genpulse.testing.watchdog`, so a start-all killed with -9 leaves none.
- A process that ends by itself is started again, after a pause that grows while it keeps ending.
- One stack per data folder: a second one is refused, and Valkey never shares its append-only file,
  not even with a Valkey of a killed start-all that is still ending.
- Everything listens on loopback; Valkey and Flower ask for a password that only the user who runs
  it can read, for whoever can write to the broker can run tasks.

The data folder::

    genpulse.db            the ledger           assets/               outputs and uploads
    valkey/                append-only file     comfyui-simulator/    its input, output, temp
    logs/                  one per process      stack.json            what runs where, and its lock
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Literal, Self

from pydantic import SecretStr

from genpulse.config import PREFIX, ComfyServer, Settings
from genpulse.errors import LedgerUnavailable
from genpulse.testing.services import Service, ServiceError, answers_http, find_valkey, free_port

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "EmbeddedStack",
    "StackError",
    "StackOptions",
    "comfy_at",
    "local_url",
    "migrate_ledger",
    "run_stack",
    "running_url",
    "until_signaled",
]

LOOPBACK = "127.0.0.1"
SIMULATOR_PORT = 8188
LOG_BYTES = 20 * 2**20
"""A log above this size is put aside at the next start, over the one that was put aside before."""
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before a process that ended is started again; the first one anew after a minute's peace."""
PEACE_S = 60.0
Say = Callable[[str], None]
Probe = Callable[[], None]

# Becomes Valkey once it alone holds the lock of Valkey's folder; the lock goes with the process.
_LOCK_AND_EXEC = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
os.set_inheritable(fd, True)
os.execv(sys.argv[2], sys.argv[2:])
"""


class StackError(Exception):
    """The stack cannot start or was refused; one line for a person. ``exit_code`` is the command's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What the embedded stack is told besides the settings; ``None`` leaves the choice to it."""

    comfy_port: int | None = None
    valkey_port: int | None = None
    comfy_args: tuple[str, ...] = ()
    """More arguments for ``libs/comfyui/main.py``."""
    flower: bool = True
    comfy_main: Path = Path("libs/comfyui/main.py")
    simulator_args: tuple[str, ...] = ()


@dataclass(slots=True)
class _Spec:
    """How to start one process and how to tell that it is ready."""

    name: str
    command: Sequence[str | Path]
    probe: Probe | None
    where: str = ""
    env: Mapping[str, str | None] = field(default_factory=dict)
    cwd: Path | None = None
    grace_s: float = 6.0
    ready_s: float = 60.0
    needed: bool = True
    """Whether the stack fails to start when this does; otherwise it is tried again like one that ended."""


class _Part(threading.Thread):
    """One process of the stack with the thread that starts it and starts it again."""

    def __init__(self, spec: _Spec, log: Path, say: Say) -> None:
        super().__init__(name=f"part-{spec.name}", daemon=True)
        self.spec = spec
        self.log = log
        self.ready = threading.Event()
        """Set when it answered for the first time, or when it is clear that it will not."""
        self.problem: str = ""
        self.service: Service | None = None
        self._say = say
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Start, watch, start again; until stopped."""
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._start()
                self._wait_ready()
            except ServiceError as error:
                if self.spec.needed and not self.ready.is_set():
                    self.problem = str(error)
                    self.ready.set()
                    return
                self._say(f"{self.spec.name}: {str(error).splitlines()[0]}")
            else:
                self.ready.set()
                if failures:
                    self._say(f"{self.spec.name} {'is back' if self.spec.probe else 'runs again'}")
                self._watch()
            if self._stopping.is_set():
                return
            if self.service is not None and self.service.exit_code == os.EX_CONFIG:
                self._say(f"{self.spec.name} cannot run like this: {_last_line(self.log)}  (log: {self.log})")
                return
            failures = 1 if time.monotonic() - began > PEACE_S else failures + 1
            pause = BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]
            code = self.service.exit_code if self.service else None
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            if failures < 4:
                self._say(
                    f"{self.spec.name} ended ({how}); starting it again in {pause:g} s  (log: {self.log})"
                )
            elif failures == 4:
                self._say(
                    f"{self.spec.name} keeps ending; trying on every {BACKOFF_S[-1]:g} s  (log: {self.log})"
                )
            self._end_service()
            self._stopping.wait(pause)

    def stop(self) -> None:
        """End the process and all it started; returns when it is gone."""
        self._stopping.set()
        self._end_service()
        if self.is_alive():
            self.join(5)
        self._end_service()

    def kill(self) -> None:
        """End the process at once, without its farewell."""
        self._stopping.set()
        service = self.service
        if service is not None:
            with contextlib.suppress(Exception):
                service.kill()

    def _start(self) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            self.service = Service(
                self.spec.name,
                self.spec.command,
                self.spec.cwd or Path.cwd(),
                env=self.spec.env,
                log=self.log,
                grace_s=self.spec.grace_s,
            )

    def _end_service(self) -> None:
        with self._lock:
            service = self.service
        if service is not None:
            service.stop()

    def _wait_ready(self) -> None:
        ends = time.monotonic() + self.spec.ready_s
        while self.spec.probe is not None and not self._stopping.is_set():
            problem = ""
            try:
                self.spec.probe()
            except (OSError, RuntimeError) as error:
                problem = str(error)
            service = self.service
            if service is None or not service.alive():
                code = service.exit_code if service else None
                msg = f"ended with exit code {code} before it was ready:\n{log_end(self.log)}"
                raise ServiceError(msg)
            if not problem:
                return
            if time.monotonic() > ends:
                msg = f"no answer in {self.spec.ready_s:g} s ({problem}):\n{log_end(self.log)}"
                raise ServiceError(msg)
            self._stopping.wait(0.03)

    def _watch(self) -> None:
        while not self._stopping.wait(0.1):
            if self.service is None or not self.service.alive():
                return


class EmbeddedStack:
    """
    Everything that ``start-all`` runs. A context manager: leaving it stops all of it.

    What the settings name is used and not brought along: a ``redis_url``, a ``database_url``,
    ``comfy_urls``. What they leave open is chosen here, ports included.

    Args:
        settings: As the user gave them.
        options: What only this stack knows.
        say: Takes one line for the person in front of it.

    Raises:
        StackError: From :meth:`start`.
    """

    def __init__(
        self, settings: Settings, options: StackOptions | None = None, *, say: Say = lambda _line: None
    ) -> None:
        self.options = options or StackOptions()
        self.given = settings
        self.settings = settings
        """The settings that the processes get; complete once :meth:`start` has returned."""
        self.data_dir = settings.data_dir.absolute()
        self.comfy_kind = ""
        """``yours``, ``libs/comfyui`` or ``simulator``."""
        self.parts: dict[str, _Part] = {}
        self._say = say
        self._lock: _StackLock | None = None
        self._environ: dict[str, str | None] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.start_rest()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def api_url(self) -> str:
        """Where a program on this machine reaches the API."""
        return local_url(self.settings.host, self.settings.port)

    @property
    def flower_url(self) -> str:
        """Where Flower is; it asks for the user and password of :attr:`flower_login`."""
        return f"http://{LOOPBACK}:{self.settings.flower_port}/flower/"

    @property
    def flower_login(self) -> str:
        """Where Flower's user and password are written; never the password itself."""
        if self.given.flower_basic_auth.get_secret_value():
            return f"{PREFIX}FLOWER_BASIC_AUTH"
        return _short(self.data_dir / "flower-password")

    def start(self) -> None:
        """
        Start what renders and return when the API answers; its worker may still be on the way.

        Raises:
            StackError: Another stack has this data folder, a port that was asked for is taken, or a
                process does not start.
        """
        began = time.monotonic()
        self._make_folders()
        self._lock = _StackLock(self.data_dir)
        self._choose()
        self._begin("comfyui", self._comfy())
        self._begin("valkey", self._valkey())
        with self._together("the ledger"):
            migrate_ledger(self.settings, wait_s=30)
        self._wait("valkey")
        self._begin("api", self._api())
        if self.settings.servers:
            self._begin("worker", self._worker("comfy"))
        self._wait("api")
        self._lock.tell({"url": self.api_url, "flower": self.flower_url, "pid": os.getpid()})
        if self.comfy_kind == "simulator":
            self._wait("comfyui")
        self._say(f"the API answers after {time.monotonic() - began:.1f} s")

    def start_rest(self) -> None:
        """Start what a first picture does not need: the worker for short work, and Flower."""
        self._begin("worker-cpu", self._worker("cpu"))
        if self.options.flower:
            self._begin("flower", self._flower())

    def stop(self) -> None:
        """Stop everything, users before what they use; repeating is fine."""
        self._stopped.set()
        for names in (("flower", "api", "worker", "worker-cpu"), ("comfyui",), ("valkey",)):
            threads = [
                threading.Thread(target=part.stop, name=f"stop-{name}")
                for name in names
                if (part := self.parts.get(name)) is not None
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def kill(self) -> None:
        """End every process at once; for the second Ctrl-C."""
        for part in list(self.parts.values()):
            part.kill()

    @property
    def given_up(self) -> list[str]:
        """Processes that are not tried again, for their settings would not be better the next time."""
        return [name for name, part in self.parts.items() if not part.is_alive()]

    def rows(self) -> list[tuple[str, str, str]]:
        """``(what, where, log)`` of each process, for a table."""
        rows = []
        for name, part in self.parts.items():
            note = ""
            if name == "comfyui":
                note = " SIMULATED, draws its pictures" if self.comfy_kind == "simulator" else " libs/comfyui"
            rows.append((name + note, part.spec.where, _short(part.log)))
        if self.comfy_kind == "yours":
            rows += [(f"comfyui {server.name} (yours)", server.url, "") for server in self.settings.servers]
        return rows

    # What runs

    def _choose(self) -> None:
        """Fix ports, passwords and addresses, and with them the settings of every process."""
        given = self.given.model_fields_set
        if self._lock is not None and self._lock.unclean:
            self._let_the_dead_go()
        values: dict[str, object] = {name: getattr(self.given, name) for name in given}
        values["data_dir"] = self.data_dir
        values["port"] = self._port("API", self.given.port, "--port", asked="port" in given)
        if self.options.flower:
            values["flower_port"] = self._port(
                "Flower", self.given.flower_port, "--flower-port", asked="flower_port" in given
            )
        if not self.given.flower_basic_auth.get_secret_value():
            values["flower_basic_auth"] = self._secret(
                self.data_dir / "flower-password", lambda: f"genpulse:{_password()}"
            )
        if "redis_url" not in given:
            self._valkey_port = self._port(
                "Valkey", self.options.valkey_port or 0, "--valkey-port", asked=True
            )
            password = self._secret(self.data_dir / "valkey" / "password", _password)
            values["redis_url"] = f"redis://:{password}@{LOOPBACK}:{self._valkey_port}/0"
        values.setdefault("api_workers", 1)
        values.setdefault("drain_s", 5)
        values["comfy_urls"] = self._choose_comfy()
        self.settings = Settings.build(**values)
        self._environ = _environ(values)

    def _choose_comfy(self) -> str:
        asked = self.options.comfy_port
        if (self.options.comfy_main).is_file() and not self.given.comfy_urls:
            self.comfy_kind = "libs/comfyui"
        elif self.given.comfy_urls:
            self.comfy_kind = "yours"
            return _named(self.given.servers)
        else:
            self.comfy_kind = "simulator"
        if (
            asked is None
            and _taken(SIMULATOR_PORT)
            and comfy_at(f"http://{LOOPBACK}:{SIMULATOR_PORT}") == "real"
        ):
            self._say(
                f"a ComfyUI answers on port {SIMULATOR_PORT}: --comfy http://{LOOPBACK}:{SIMULATOR_PORT} uses it"
            )
        self._comfy_port = self._port(
            "ComfyUI", asked or SIMULATOR_PORT, "--comfy-port", asked=asked is not None
        )
        name = "simulator" if self.comfy_kind == "simulator" else "comfyui"
        return f"{name}=http://{LOOPBACK}:{self._comfy_port}"

    def _comfy(self) -> _Spec | None:
        if self.comfy_kind == "yours":
            return None
        url = f"http://{LOOPBACK}:{self._comfy_port}"
        if self.comfy_kind == "libs/comfyui":
            main = self.options.comfy_main.absolute()
            command: list[str | Path] = [
                comfy_python(main.parent), main, "--listen", LOOPBACK, "--port", str(self._comfy_port),
                "--disable-auto-launch", *self.options.comfy_args,
            ]  # fmt: skip
            return _Spec(
                "comfyui",
                command,
                answers_http(f"{url}/prompt"),
                url,
                cwd=main.parent,
                ready_s=600,
                needed=False,
            )
        folder = self.data_dir / "comfyui-simulator"
        command = [
            sys.executable, "-m", "genpulse.testing.simulator", "--host", LOOPBACK, "--port", str(self._comfy_port),
            "--data-dir", folder, *self.options.simulator_args,
        ]  # fmt: skip
        return _Spec("comfyui", command, answers_http(f"{url}/prompt"), url)

    def _valkey(self) -> _Spec | None:
        if "redis_url" in self.given.model_fields_set:
            return None
        folder = self.data_dir / "valkey"
        password = (folder / "password").read_text().strip()
        config = folder / "valkey.conf"
        quoted = '"' + str(folder).replace("\\", "\\\\").replace('"', '\\"') + '"'
        lines = [
            f"bind {LOOPBACK}", f"port {self._valkey_port}", f"dir {quoted}", f"requirepass {password}", 'save ""',
            "appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction",
        ]  # fmt: skip
        _write_private(config, "\n".join(lines) + "\n")
        try:
            server = find_valkey()
        except ServiceError as error:
            raise StackError(str(error)) from error
        command: list[str | Path] = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _LOCK_AND_EXEC,
            folder / "lock",
            server,
            config,
        ]
        where = f"redis://{LOOPBACK}:{self._valkey_port}/0"
        return _Spec("valkey", command, _answers_ping(self._valkey_port, password), where)

    def _api(self) -> _Spec:
        return _Spec(
            "api",
            [sys.executable, "-m", "genpulse", "start-api"],
            answers_http(f"{self.api_url}/health"),
            self.api_url,
            env=self._environ,
        )

    def _worker(self, queue: str) -> _Spec:
        name = "worker" if queue == "comfy" else f"worker-{queue}"
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "genpulse",
            "start-worker",
            "-Q",
            f"{queue},webhooks" if queue == "cpu" else queue,
            "-n",
            f"{queue}@%h",
        ]
        if queue == "cpu" and not self.settings.worker_concurrency:
            # One more, for a round of webhooks whose receivers are slow holds one.
            command += ["-c", str(min(4, os.cpu_count() or 1) + 1)]
        # Another start-all on this machine, with a data folder of its own, has a node of this name too;
        # they share nothing, since each has a broker of its own.
        return _Spec(
            name, command, None, f"queue {queue}", env=self._environ, grace_s=self.settings.drain_s + 4
        )

    def _flower(self) -> _Spec:
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "genpulse",
            "start-flower",
            "--db",
            self.data_dir / "flower.db",
        ]
        return _Spec("flower", command, None, self.flower_url, env=self._environ, grace_s=2)

    # How it runs

    def _begin(self, name: str, spec: _Spec | None) -> None:
        if spec is None:
            return
        log = self.data_dir / "logs" / f"{spec.name}.log"
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
        part = _Part(spec, log, self._say)
        self.parts[name] = part
        part.start()

    def _wait(self, name: str) -> None:
        part = self.parts.get(name)
        if part is None:
            return
        while not part.ready.wait(0.1):  # short waits let a signal's handler run
            pass
        if part.problem:
            msg = f"{name} does not start: {part.problem}"
            raise StackError(msg)

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        try:
            yield
        except LedgerUnavailable as error:
            msg = f"{what} does not answer: {error}"
            raise StackError(msg, exit_code=3) from error

    def _make_folders(self) -> None:
        try:
            for folder in ("assets", "valkey", "logs"):
                (self.data_dir / folder).mkdir(parents=True, exist_ok=True)
            (self.data_dir / "valkey").chmod(0o700)
        except OSError as error:
            msg = f"cannot use the data folder {self.data_dir}: {error.strerror or error}"
            raise StackError(msg, exit_code=2) from error

    def _let_the_dead_go(self) -> None:
        """The stack before us was killed: its processes are ending, so wait for their ports."""
        ends = time.monotonic() + 15
        wanted = {self.given.port, self.given.flower_port, self.options.comfy_port or SIMULATOR_PORT}
        last = self._lock.before.get("ports") if self._lock else None
        ports = wanted & set(last if isinstance(last, list) else [])
        while any(_taken(port) for port in ports) and time.monotonic() < ends:
            time.sleep(0.1)

    def _port(self, what: str, wanted: int, option: str, *, asked: bool) -> int:
        """*wanted*, if nobody has it; another one if the user did not insist."""
        if not wanted:
            return self._remember(free_port())
        if not _taken(wanted):
            return self._remember(wanted)
        if asked:
            msg = f"port {wanted} for {what} is taken; choose another one with {option}"
            raise StackError(msg, exit_code=2)
        other = next((port for port in range(wanted + 1, wanted + 50) if not _taken(port)), 0) or free_port()
        self._say(f"port {wanted} is taken, so {what} gets {other} ({option} chooses another one)")
        return self._remember(other)

    def _remember(self, port: int) -> int:
        if self._lock is not None:
            self._lock.ports.append(port)
        return port

    def _secret(self, path: Path, make: Callable[[], str]) -> str:
        """The secret in *path*, made at the first start."""
        with contextlib.suppress(FileNotFoundError):
            if found := path.read_text().strip():
                return found
        secret = make()
        _write_private(path, secret + "\n")
        return secret


class _StackLock:
    """One stack per data folder; the locked file says what runs where."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / "stack.json"
        self.ports: list[int] = []
        self._file: IO[str] = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        ends = time.monotonic() + 1  # a reader holds it for a moment
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < ends:
                    time.sleep(0.05)
                    continue
                found = _read_stack(self._file)
                self._file.close()
                who = (
                    f" (process {found['pid']}, {found['url']})" if "pid" in found and "url" in found else ""
                )
                msg = f"another start-all or demo runs with the data folder {data_dir}{who}; --data-dir names another one"
                raise StackError(msg, exit_code=1) from None
            break
        self.before = _read_stack(self._file)
        self.unclean = bool(self.before)
        """Whether the stack before us was killed; a clean end leaves the file empty."""
        self.tell({"pid": os.getpid()})

    def tell(self, what: Mapping[str, object]) -> None:
        """Write what readers may know."""
        self._file.seek(0)
        self._file.truncate()
        json.dump({**what, "ports": self.ports}, self._file)
        self._file.flush()

    def release(self) -> None:
        """Say that nothing runs, and let go."""
        self._file.seek(0)
        self._file.truncate()
        self._file.close()


def local_url(host: str, port: int) -> str:
    """Where a program on this machine reaches a server that listens on *host*."""
    host = {"0.0.0.0": LOOPBACK, "localhost": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 - not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def running_url(data_dir: Path) -> str | None:
    """The API of the ``start-all`` that runs with this data folder, if one does."""
    try:
        with (data_dir / "stack.json").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                url = _read_stack(file).get("url")
                return str(url) if url else None
    except OSError:
        pass
    return None


def comfy_at(url: str) -> Literal["real", "simulated", ""]:
    """What answers at *url* in ComfyUI's manner; empty if nothing does."""
    import requests

    try:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(f"{url}/system_stats", timeout=10)
            system = answer.json()["system"] if answer.ok else None
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return ""
    if not isinstance(system, dict):
        return ""
    return "simulated" if system.get("pytorch_version") == "simulated" else "real"


def migrate_ledger(settings: Settings, *, wait_s: float) -> None:
    """
    Bring the ledger's tables up to date, waiting for a database that is still starting.

    Raises:
        LedgerUnavailable: It did not answer within *wait_s*.
    """
    from genpulse.ledger import Ledger

    if settings.uses_sqlite:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + wait_s
    while True:
        try:
            Ledger.connect(settings.direct_url_if_any or settings.ledger_url).migrate()
        except LedgerUnavailable:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)
        else:
            return


def run_stack(settings: Settings, options: StackOptions, console: Console) -> int:
    """Run the stack in the foreground until Ctrl-C or SIGTERM; the exit code."""
    stack = EmbeddedStack(settings, options, say=speaker(console))
    was_up = False
    with until_signaled(stack, console) as signaled:
        stack.start()
        stack.start_rest()
        was_up = True
        show_stack(stack, console)
        speaker(console)(
            f"API {stack.api_url}, its page {stack.api_url}/docs. Ctrl-C stops everything; tasks and pictures stay."
        )
        signaled.wait()
    return exit_code(signaled, was_up=was_up)


# In front of a person


class Signaled(threading.Event):
    """Waits for the end; ``by`` is the signal that asked for it, 0 while none did."""

    by: int = 0

    def wait(self, timeout: float | None = None) -> bool:
        """Like the event's own, in short steps, so that a signal's handler runs at once."""
        ends = None if timeout is None else time.monotonic() + timeout
        while not super().wait(0.5):
            if ends is not None and time.monotonic() >= ends:
                return False
        return True


@contextlib.contextmanager
def until_signaled(stack: EmbeddedStack, console: Console) -> Iterator[Signaled]:
    """
    Run the block until it ends or Ctrl-C, SIGTERM or SIGHUP comes; stop *stack* either way.

    The first signal leaves the block, a second one kills what does not stop.
    """
    state = Signaled()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handle(number: int, _frame: FrameType | None) -> None:
        if state.is_set():
            threading.Thread(target=stack.kill, daemon=True).start()
            return
        state.by = number
        state.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield state
    finally:
        state.set()
        if state.by:
            speaker(console)("stopping everything; once more kills it")
        stack.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(signaled: Signaled, *, was_up: bool) -> int:
    """Ctrl-C is how a stack is ended, so that is no failure; before it was up it is."""
    return 0 if was_up or not signaled.by else 128 + signaled.by


def speaker(console: Console) -> Say:
    """Print plain lines; what they quote is no markup."""

    def say(line: str) -> None:
        # A terminal that was closed must not end the thread that watches a process, nor the stopping.
        with contextlib.suppress(OSError, SystemExit):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return say


def show_stack(stack: EmbeddedStack, console: Console) -> None:
    """A table of what runs where; plain lines where nobody watches."""
    if console.is_terminal:
        from rich.table import Table

        table = Table("what", "where", "log", box=None, pad_edge=False, header_style="dim")
        for row in stack.rows():
            table.add_row(*row)
        console.print(table)
    else:
        say = speaker(console)
        for what, where, log in stack.rows():
            say(f"{what}: {where}" + (f"  (log: {log})" if log else ""))
    if "flower" in stack.parts:
        speaker(console)(f"Flower's user and password: {stack.flower_login}")
    if stack.comfy_kind == "simulator":
        speaker(console)(
            "NO REAL COMFYUI: the simulator speaks its protocol and draws stand-in pictures. "
            "A real one: --comfy http://127.0.0.1:8188, or put it into libs/comfyui"
        )


def log_end(log: Path) -> str:
    """The last lines of a log, where the reason stands."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace")[-4000:].strip().splitlines()[-12:])
    return ""


def _last_line(log: Path) -> str:
    return log_end(log).rpartition("\n")[2]


def comfy_python(folder: Path) -> Path:
    """The interpreter that ComfyUI's own folder brings (it needs torch), else this one."""
    for name in ("venv", ".venv"):
        if (found := folder / name / "bin" / "python").exists():
            return found
    return Path(sys.executable)


def _answers_ping(port: int, password: str) -> Probe:
    def probe() -> None:
        with socket.create_connection((LOOPBACK, port), timeout=1) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2 and (piece := connection.recv(256)):
                answer += piece
        if not answer.endswith(b"+PONG\r\n"):  # "-LOADING …" while it reads its file
            raise OSError(answer.decode(errors="replace"))

    return probe


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
    return False


def _read_stack(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    with contextlib.suppress(ValueError):
        found = json.load(file)
        if isinstance(found, dict):
            return found
    return {}


def _environ(values: Mapping[str, object]) -> dict[str, str | None]:
    """Settings as the variables that give them to a child."""
    plain = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in values.items()
    }
    return {PREFIX + name.upper(): text for name, text in plain.items()}


def _named(servers: Sequence[ComfyServer]) -> str:
    return ",".join(f"{server.name}={server.url}" for server in servers)


def _password() -> str:
    return secrets.token_urlsafe(18)


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, whatever was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def _short(path: Path) -> str:
    """Relative to where the user stands, if it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
