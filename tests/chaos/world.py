"""The cluster under test, the hands that break it, and the supervisor that starts again what died."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis
import requests
import sqlalchemy as sa

from genpulse.config import Settings
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger
from genpulse.ledger import tables as t
from genpulse.testing import services
from genpulse.testing.services import FaultProxy, Postgres, Service, ServiceError
from tests.chaos.schedule import Fault
from tests.support.cluster import Cluster

__all__ = ["SERVED", "Run", "Shot", "World"]

SERVED = {"a": ("gpu1", "gpu2"), "b": ("gpu2",), "c": ("gpu3",)}
"""Which worker serves which ComfyUI servers; one of them is shared by two."""

ENV = {
    # A task that fails here failed for a reason of ours: the bounds are out of reach.
    "GENPULSE_MAX_LOST": "50",
    "GENPULSE_MAX_ATTEMPTS": "50",
    "GENPULSE_DRAIN_S": "3",
}
_FIND_S = 12.0
"""How long a fault waits for a running attempt that it can hit."""
_PREFER_S = 2.0
"""How long it waits for one at the place that the seed says, before it takes another."""
_EXIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Run:
    """A running attempt, as it was when something broke."""

    task_id: str
    attempt: int
    worker: str
    server: str | None
    prompt_id: str | None

    @property
    def pid(self) -> int:
        """The worker child that runs it."""
        return int(self.worker.rpartition(":")[2])

    @property
    def node(self) -> str:
        """The worker's name."""
        return self.worker.rpartition(":")[0]


@dataclass(slots=True)
class Shot:
    """A fault that was fired."""

    fault: Fault
    fired_at: float
    back_at: float | None = None
    hits: list[Run] = field(default_factory=list)
    target: str = ""


class World:
    """
    API, broker behind a proxy, three simulators, three workers, on a ledger of its own.

    Args:
        directory: Everything's data and logs.
        database: ``sqlite`` or ``postgresql``.
    """

    def __init__(self, directory: Path, database: str) -> None:
        self.shots: list[Shot] = []
        self.complaints: list[str] = []
        self.down: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVED}
        """When a worker was away, by name; the end is infinite while it is."""
        self.deaths: dict[str, list[float]] = {}
        """When a ComfyUI server was killed, by name."""
        self.silences: dict[str, list[tuple[float, float]]] = {}
        """When a ComfyUI server was frozen, by name."""
        self._locks: dict[str, threading.Lock] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._set_up(directory, database)
        except BaseException:
            self._stack.close()
            raise

    def _set_up(self, directory: Path, database: str) -> None:
        self.postgres: Postgres | None = None
        if database == "postgresql":
            self.postgres = self._stack.enter_context(services.start_postgres(directory / "postgres"))
            url = self.postgres.create_database()
        else:
            url = f"sqlite:///{directory / 'genpulse.db'}"
        ledger = Ledger.connect(Settings.build(database_url=url).ledger_url)
        ledger.migrate()
        ledger.close()
        self.valkey = self._stack.enter_context(services.start_valkey(directory / "valkey", append_only=True))
        self.proxy = self._stack.enter_context(FaultProxy(self.valkey.url))
        self.cluster = self._stack.enter_context(
            Cluster(directory, url, env=ENV, redis_url=self.proxy.url_of(self.valkey.url))
        )
        self.servers = sorted({server for served in SERVED.values() for server in served})
        for name in self.servers:
            self.deaths[name], self.silences[name] = [], []
            self.cluster.start_simulator(name)
        for name, served in SERVED.items():
            self.cluster.start_worker(name, served, wait=False)
        for name in SERVED:
            self.cluster.wait_for_worker(name)

    def close(self) -> None:
        """Stop everything."""
        self._stack.close()

    @property
    def ledger(self) -> Ledger:
        """The program's own connection to the truth."""
        return self.cluster.ledger

    def running(self) -> list[Run]:
        """The attempts that run now; empty while the ledger is away."""
        query = sa.select(
            t.attempts.c.task_id,
            t.attempts.c.number,
            t.attempts.c.worker,
            t.attempts.c.server,
            t.attempts.c.prompt_id,
        ).where(t.attempts.c.ended_at.is_(None))
        try:
            with self.ledger.engine.connect() as connection:
                return [Run(*row) for row in connection.execute(query).all()]
        except sa.exc.SQLAlchemyError:
            return []

    # -- faults -------------------------------------------------------------------------------

    def fire(self, fault: Fault) -> None:
        """Break one thing, mend it when its time is over, and note both."""
        shot = Shot(fault, time.time())
        hands: dict[str, Callable[[Shot], None]] = {
            "child killed": lambda shot: self._signal_child(shot, signal.SIGKILL),
            "child told to stop": lambda shot: self._signal_child(shot, signal.SIGTERM),
            "child frozen": self._freeze_child,
            "worker killed": self._kill_worker,
            "worker frozen": self._freeze_worker,
            "parent frozen": self._freeze_worker,
            "deploy": self._deploy,
            "comfy killed": self._kill_server,
            "comfy crashed": self._crash_server,
            "comfy frozen": self._freeze_server,
            "api killed": self._kill_api,
            "valkey killed": self._kill_valkey,
            "valkey wiped": self._wipe_valkey,
            "valkey silent": self._break_network,
            "valkey refused": self._break_network,
            "postgres killed": self._kill_postgres,
            "postgres crashed": self._crash_postgres,
            "sockets cut": self._fault_server,
            "sockets muted": self._fault_server,
            "answer lost": self._fault_server,
            "storage broken": self._break_storage,
        }
        hands[fault.kind](shot)
        self.shots.append(shot)

    @contextlib.contextmanager
    def _alone(self, *parts: str) -> Iterator[None]:
        """One fault at a time for each part; they are always locked in the same order."""
        with contextlib.ExitStack() as stack:
            for part in sorted(parts):
                stack.enter_context(self._locks.setdefault(part, threading.Lock()))
            yield

    def _find(self, fits: Callable[[Run], bool]) -> list[Run]:
        """Running attempts with a prompt that fit; waits a while for one."""
        ends = time.monotonic() + _FIND_S
        while True:
            found = [run for run in self.running() if run.prompt_id is not None and fits(run)]
            if found or time.monotonic() > ends:
                return found
            time.sleep(0.1)

    def _busy(self, shot: Shot, names: Sequence[str], owner: Callable[[Run], str]) -> str:
        """The one of *names* that the seed says, or the next one that has something to lose."""
        first = shot.fault.target % len(names)
        turned = [*names[first:], *names[:first]]
        began = time.monotonic()
        while (waited_s := time.monotonic() - began) < _FIND_S:
            busy = {owner(run) for run in self.running() if run.prompt_id is not None}
            for name in turned if waited_s > _PREFER_S else turned[:1]:
                if name in busy:
                    return name
            time.sleep(0.1)
        return turned[0]

    def _worker(self, shot: Shot) -> str:
        names = {self._node(name): name for name in SERVED}
        shot.target = self._busy(shot, list(SERVED), lambda run: names[run.node])
        return shot.target

    def _server(self, shot: Shot) -> str:
        shot.target = self._busy(shot, self.servers, lambda run: run.server or "")
        return shot.target

    def _node(self, name: str) -> str:
        return f"{self.cluster._full_name(name)}@test"

    @contextlib.contextmanager
    def _away(self, name: str) -> Iterator[None]:
        """Note that no process of this worker does its work meanwhile."""
        spans = self.down[name]
        spans.append((time.time(), float("inf")))
        try:
            yield
        finally:
            spans[-1] = (spans[-1][0], time.time() + 1.0)

    def _signal_child(self, shot: Shot, number: signal.Signals) -> None:
        node = self._node(self._worker(shot))
        with self._alone(shot.target):
            shot.hits = self._find(lambda run: run.node == node)[:1]
            shot.fired_at = time.time()
            for run in shot.hits:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(run.pid, number)

    def _freeze_child(self, shot: Shot) -> None:
        node = self._node(self._worker(shot))
        with self._alone(shot.target):
            shot.hits = self._find(lambda run: run.node == node)[:1]
            shot.fired_at = time.time()
            for run in shot.hits:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(run.pid, signal.SIGSTOP)
                    time.sleep(shot.fault.length_s)
                    os.kill(run.pid, signal.SIGCONT)

    def _kill_worker(self, shot: Shot) -> None:
        name = self._worker(shot)
        node, worker = self._node(name), self.cluster.worker(name)
        with self._alone(name):
            shot.hits = self._find(lambda run: run.node == node)
            with self._away(name):
                shot.fired_at = time.time()
                worker.kill()
                time.sleep(shot.fault.length_s)
                self._start_worker(name)
            shot.back_at = time.time()

    def _freeze_worker(self, shot: Shot) -> None:
        name = self._worker(shot)
        node, worker = self._node(name), self.cluster.worker(name)
        only_parent = shot.fault.kind == "parent frozen"
        with self._alone(name):
            shot.hits = self._find(lambda run: run.node == node)
            with self._away(name):
                shot.fired_at = time.time()
                if only_parent:
                    os.kill(worker.pid, signal.SIGSTOP)
                else:
                    worker.freeze()
                time.sleep(shot.fault.length_s)
                worker.thaw()
            shot.back_at = time.time()

    def _deploy(self, shot: Shot) -> None:
        shot.target = "all"
        shot.fired_at = time.time()
        for name in SERVED:
            node, worker = self._node(name), self.cluster.worker(name)
            with self._alone(name):
                shot.hits += [run for run in self.running() if run.node == node]
                with self._away(name):
                    way = shot.fault.target % 3  # supervisors differ
                    for _ in range(2 if way == 1 else 1):
                        with contextlib.suppress(ProcessLookupError):
                            (os.killpg if way == 2 else os.kill)(worker.pid, signal.SIGTERM)
                        time.sleep(0.3)
                    try:
                        worker.wait(_EXIT_S)
                    except TimeoutError:
                        self.complaints.append(
                            f"worker {name} did not end within {_EXIT_S:g} s of SIGTERM (fault {shot.fault.number})"
                        )
                    self._start_worker(name)
        shot.back_at = time.time()

    def _start_worker(self, name: str) -> None:
        """What a supervisor does: end what is left of it, and start it under the same name."""
        worker = self.cluster.worker(name)
        _start_again(worker)
        node, ends = self._node(name), time.monotonic() + 90
        while time.monotonic() < ends:
            with contextlib.suppress(LedgerUnavailable):
                if any(row.name == node and row.pid == worker.pid for row in self.ledger.workers()):
                    return
            if not worker.alive():
                _start_again(worker)
            time.sleep(0.1)
        self.complaints.append(f"worker {name} was started and never registered")

    def _kill_server(self, shot: Shot) -> None:
        name = self._server(shot)
        with self._alone(name):
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            self.deaths[name].append(shot.fired_at)
            self.cluster.simulators[name].kill()
            time.sleep(shot.fault.length_s)
            _start_again(self.cluster.simulators[name])
            shot.back_at = time.time()

    def _crash_server(self, shot: Shot) -> None:
        name = self._server(shot)
        server = self.cluster.simulators[name]
        with self._alone(name):
            step = ("submitted", "started", "node", "finished")[shot.fault.target % 4]
            self._set_faults(name, exit_at=step)
            with contextlib.suppress(TimeoutError):
                server.wait(_FIND_S)
            shot.fired_at = time.time()
            if server.alive():
                self._set_faults(name, exit_at="")
            if not server.alive():
                shot.hits = [run for run in self.running() if run.server == name and run.prompt_id]
                self.deaths[name].append(shot.fired_at)
                time.sleep(shot.fault.length_s)
                _start_again(server)
            shot.back_at = time.time()

    def _freeze_server(self, shot: Shot) -> None:
        name = self._server(shot)
        with self._alone(name):
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            self.cluster.simulators[name].freeze()
            time.sleep(shot.fault.length_s)
            self.cluster.simulators[name].thaw()
            shot.back_at = time.time()
            self.silences[name].append((shot.fired_at, shot.back_at))

    def _break_storage(self, shot: Shot) -> None:
        """A file stands where the folder was: no permission is asked, so it fails for root too."""
        folder = self.cluster.settings.assets_dir
        away = folder.with_name("assets-away")
        with self._alone("storage"):
            if not folder.exists():
                return
            shot.hits = self._find(lambda run: True)
            shot.fired_at = time.time()
            folder.rename(away)
            folder.touch()
            time.sleep(shot.fault.length_s)
            folder.unlink()
            away.rename(folder)
            shot.back_at = time.time()

    def _kill_api(self, shot: Shot) -> None:
        with self._alone("api"):
            shot.hits = self._find(lambda run: True)
            shot.fired_at = time.time()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.cluster.api.pid, signal.SIGKILL)
            time.sleep(shot.fault.length_s)
            _start_again(self.cluster.api)
            shot.back_at = time.time()

    def _kill_valkey(self, shot: Shot) -> None:
        with self._alone("valkey"):
            shot.hits = self._find(lambda run: True)
            shot.fired_at = time.time()
            self.valkey.kill()
            time.sleep(shot.fault.length_s)
            _start_again(self.valkey)
            shot.back_at = time.time()

    def _wipe_valkey(self, shot: Shot) -> None:
        with self._alone("valkey"):
            shot.hits = self._find(lambda run: True)
            with redis.Redis.from_url(self.valkey.url, socket_timeout=5) as client:
                client.flushall()
            shot.fired_at = shot.back_at = time.time()

    def _break_network(self, shot: Shot) -> None:
        with self._alone("valkey"):
            shot.hits = self._find(lambda run: True)
            shot.fired_at = time.time()
            self.proxy.set_mode("blackhole" if shot.fault.kind == "valkey silent" else "refuse")
            time.sleep(shot.fault.length_s)
            self.proxy.set_mode("pass")
            shot.back_at = time.time()

    def _kill_postgres(self, shot: Shot) -> None:
        assert self.postgres is not None
        with self._alone("postgres"):
            shot.hits = self._find(lambda run: True)
            shot.fired_at = time.time()
            self.postgres.kill()
            time.sleep(shot.fault.length_s)
            _start_again(self.postgres)
            shot.back_at = time.time()

    def _crash_postgres(self, shot: Shot) -> None:
        assert self.postgres is not None
        with self._alone("postgres"):
            shot.hits = self._find(lambda run: True)
            children = sorted(psutil.Process(self.postgres.pid).children(), key=lambda child: child.pid)
            shot.fired_at = time.time()
            if children:
                children[shot.fault.target % len(children)].kill()
            ends = time.monotonic() + 30
            while time.monotonic() < ends:
                time.sleep(0.05)
                with contextlib.suppress(LedgerUnavailable):
                    self.ledger.ping()
                    break
            shot.back_at = time.time()

    def _fault_server(self, shot: Shot) -> None:
        name = self._server(shot)
        with self._alone(name):
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            if shot.fault.kind == "sockets cut":
                self._set_faults(name, drop_sockets=True)
            elif shot.fault.kind == "answer lost":
                self._set_faults(name, lose_answers_next=1)
            else:
                self._set_faults(name, mute_sockets=True)
                time.sleep(shot.fault.length_s + 3)
                self._set_faults(name, mute_sockets=False)

    def _set_faults(self, name: str, **faults: object) -> None:
        url = self.cluster.simulators[name].url
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{url}/simulator/faults", json=faults, timeout=5)

    def mend(self) -> None:
        """Whatever is still broken after the last fault."""
        self.proxy.set_mode("pass")
        parts: Sequence[Service] = [self.valkey, self.cluster.api, *self.cluster.simulators.values()]
        for part in [*parts, *([self.postgres] if self.postgres else [])]:
            if not part.alive():
                _start_again(part)
        for name in self.servers:
            self._set_faults(name, mute_sockets=False, lose_answers_next=0, exit_at="")
        for name in SERVED:
            if not self.cluster.worker(name).alive():
                self.complaints.append(f"worker {name} ended by itself: see {self.cluster.worker(name).log}")
                with self._away(name):
                    self._start_worker(name)


def _start_again(service: Service) -> None:
    """Start a dead service, as often as it takes: what it needs may be away as well."""
    ends = time.monotonic() + 90
    while True:
        try:
            service.restart()
        except ServiceError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)
        else:
            return
