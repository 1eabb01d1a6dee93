"""The cluster under test, the hands that break it, and the supervisor that starts again what died."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
import requests
import sqlalchemy as sa

from genpulse.config import Settings
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger
from genpulse.ledger import tables as t
from genpulse.tasks.producer import BrokerUnavailable, Message, Producer
from genpulse.tasks.queues import COMFY, PRIORITY_STEPS
from genpulse.tasks.registry import task_name
from genpulse.testing import services
from genpulse.testing.services import FaultProxy, Postgres, Service, ServiceError
from tests.chaos import audit
from tests.chaos.schedule import FROZEN, SERVED, SERVERS, SHARED, Fault
from tests.support.cluster import Cluster

__all__ = ["Run", "Shot", "World"]

ENV = {
    # A task that fails here failed for a reason of ours: the bounds are out of reach.
    "GENPULSE_MAX_LOST": "50",
    "GENPULSE_MAX_ATTEMPTS": "50",
    "GENPULSE_DRAIN_S": "3",
}
_FIND_S = 24.0
"""How long a fault waits for a running attempt that it can hit."""
_PREFER_S = 2.0
"""How long it waits for one at the place that the seed says, before it takes another."""
_ANY_S = 6.0
"""After so long an attempt will do that is nearly over."""
_FEED_S = 3.0
"""How long it waits for any before it has one more task sent."""
_LEFT_S = 1.5
_SOON_S = 4.0
"""A prompt that comes to a server that works no longer than this starts before the fault gives up."""
_EXIT_S = 30.0
_FLOOD = 300


@dataclass(frozen=True, slots=True)
class Run:
    """A running attempt, as it was when something broke."""

    task_id: str
    attempt: int
    worker: str
    server: str | None = None
    prompt_id: str | None = None
    left_s: float = 0.0
    """About how long its prompt renders on."""

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

    @property
    def over_at(self) -> float:
        """When it was mended; at once if there was nothing to mend."""
        return self.back_at or self.fired_at


@dataclass(slots=True)
class Block:
    """A time in which a worker's network to a server did not work; ``end`` is infinite while it lasts."""

    start: float
    end: float
    refused: bool


class World:
    """
    API and broker behind proxies, a sweeper, four simulators, three workers, on a ledger of its own.

    Between each worker and each of its servers is a proxy, too.

    Args:
        directory: Everything's data and logs.
        database: ``sqlite`` or ``postgresql``.
        stall_s: The workers' ``GENPULSE_STALL_S``.
    """

    def __init__(self, directory: Path, database: str, *, stall_s: int = 60) -> None:
        self.stall_s = stall_s
        self.shots: list[Shot] = []
        self.complaints: list[str] = []
        self.left_s: Callable[[str, float], float] = lambda _task_id, _submitted_at: 0.0
        """How long a task renders on, by its id and the time of its prompt: what is worth breaking."""
        self.feed: Callable[[float], None] = lambda _seconds: None
        """Has one more task sent that renders so long."""
        self.down: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVED}
        """When a worker was away, by name; the end is infinite while it is."""
        self.deaths: dict[str, list[float]] = {name: [] for name in SERVERS}
        """When a ComfyUI server was killed, by name."""
        self.gone: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVERS}
        """From then until it was started again."""
        self.silences: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVERS}
        """When a ComfyUI server was frozen, by name."""
        self.stalls: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVERS}
        """When a ComfyUI server answered and did nothing, by name."""
        self.blocks: dict[tuple[str, str], list[Block]] = defaultdict(list)
        """When the network between a worker and a server was broken."""
        self._locks: dict[str, threading.Lock] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._set_up(directory, database)
        except BaseException:
            self._stack.close()
            raise

    def _set_up(self, directory: Path, database: str) -> None:
        enter = self._stack.enter_context
        self.postgres: Postgres | None = None
        if database == "postgresql":
            self.postgres = enter(services.start_postgres(directory / "postgres"))
            url = self.postgres.create_database()
        else:
            url = f"sqlite:///{directory / 'genpulse.db'}"
        # This program looks often: a new connection for each look would be half of PostgreSQL's work.
        self.ledger = Ledger.connect(Settings.build(database_url=url).ledger_url, pool_size=4)
        self._stack.callback(self.ledger.close)
        self.ledger.migrate()
        audit.install(self.ledger.engine)
        self.valkey = enter(services.start_valkey(directory / "valkey", append_only=True))
        self.proxy = enter(FaultProxy(self.valkey.url))
        self.cluster = enter(
            Cluster(
                directory,
                url,
                env=ENV | {"GENPULSE_STALL_S": str(self.stall_s)},
                redis_url=self.proxy.url_of(self.valkey.url),
            )
        )
        self.front = enter(FaultProxy(self.cluster.url))
        self.url = self.front.url_of(self.cluster.url)
        self.sweeper = self.cluster.start_sweeper()
        self.roads: dict[tuple[str, str], FaultProxy] = {}
        for name in SERVERS:
            self.cluster.start_simulator(name)
        for name, served in SERVED.items():
            for server in served:
                self.roads[name, server] = enter(FaultProxy(self.cluster.simulators[server].url))
            urls = {server: self.roads[name, server].url_of("http://x:1") for server in served}
            self.cluster.start_worker(name, served, wait=False, urls=urls)
        for name in SERVED:
            self.cluster.wait_for_worker(name)

    def close(self) -> None:
        """Stop everything."""
        self._stack.close()

    def running(self) -> list[Run]:
        """The attempts that run now, those with most left to do first; empty while the ledger is away."""
        attempt = t.attempts.c
        query = sa.select(
            attempt.task_id,
            attempt.number,
            attempt.worker,
            attempt.server,
            attempt.prompt_id,
            attempt.submitted_at,
        ).where(attempt.ended_at.is_(None))
        try:
            with self.ledger.engine.connect() as connection:
                rows = connection.execute(query).all()
        except sa.exc.SQLAlchemyError:
            return []
        found = [
            Run(*row[:5], left_s=self.left_s(row.task_id, row.submitted_at.timestamp()) if row[5] else 0.0)
            for row in rows
        ]
        return sorted(found, key=lambda run: -run.left_s)

    # -- faults -------------------------------------------------------------------------------

    def fire(self, fault: Fault) -> Shot:
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
            "comfy stalled": self._stall_server,
            "comfy zombie": self._stall_server,
            "prompt forgotten": lambda shot: self._spoil_prompt(shot, "lose_prompt_next", 1, 0),
            "answer lost": lambda shot: self._spoil_prompt(shot, "lose_answers_next", 1, 0),
            "out of memory": lambda shot: self._spoil_prompt(shot, "fail_next", "oom", ""),
            "sockets cut": self._break_sockets,
            "sockets muted": self._break_sockets,
            "network cut": self._cut_network,
            "network stalled": self._stall_network,
            "network refused": self._refuse_network,
            "network halved": self._halve_network,
            "api killed": lambda shot: self._kill(shot, "api", self.cluster.api, group=True),
            "api answers lost": self._lose_answers,
            "sweeper killed": lambda shot: self._kill(shot, "sweeper", self.sweeper),
            "valkey killed": lambda shot: self._kill(shot, "valkey", self.valkey),
            "valkey wiped": self._wipe_valkey,
            "valkey silent": self._break_valkey,
            "valkey refused": self._break_valkey,
            "runway flooded": self._flood_runway,
            "messages doubled": self._double_messages,
            "postgres killed": lambda shot: self._kill(shot, "postgres", self.postgres),
            "postgres crashed": self._crash_postgres,
            "storage broken": self._break_storage,
        }
        hands[fault.kind](shot)
        self.shots.append(shot)
        return shot

    @contextlib.contextmanager
    def _alone(self, *parts: str) -> Iterator[None]:
        """One fault at a time for each part; they are always locked in the same order."""
        with contextlib.ExitStack() as stack:
            for part in sorted(parts):
                stack.enter_context(self._locks.setdefault(part, threading.Lock()))
            yield

    def _find(self, fits: Callable[[Run], bool] = lambda _: True) -> list[Run]:
        """Running attempts with a prompt that fit; waits a while for one that is not nearly over."""
        began = fed_at = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            fed_at = self._feed(fed_at, 2 * _LEFT_S)
            left_s = _LEFT_S if waited_s < _ANY_S else 0.0
            found = [run for run in self.running() if run.prompt_id is not None and fits(run)]
            if (found and found[0].left_s >= left_s) or waited_s > _FIND_S:
                return found
            time.sleep(0.1)

    def _feed(self, fed_at: float, seconds: float) -> float:
        """Nothing was found for a while: have a task sent. When this was done last."""
        if time.monotonic() - fed_at < _FEED_S:
            return fed_at
        self.feed(seconds)
        return time.monotonic()

    @contextlib.contextmanager
    def _hold(
        self, shot: Shot, names: Sequence[str], owner: Callable[[Run], str], *, idle_s: float = 0.0
    ) -> Iterator[str]:
        """
        Keep one of *names* from other faults: the one that the seed says, or another that has more to lose.

        Args:
            owner: Which of them an attempt belongs to.
            idle_s: Rather one whose running prompts end within this time, as the next one is meant.
        """
        first = shot.fault.target % len(names)
        turned = [*names[first:], *names[:first]]
        needs_s = shot.fault.length_s - 4 if shot.fault.kind in FROZEN else _LEFT_S
        began = fed_at = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            fed_at = self._feed(fed_at, needs_s + 6)
            left: dict[str, float] = {}
            for run in self.running():
                if run.prompt_id is not None:
                    left[owner(run)] = max(left.get(owner(run), 0.0), run.left_s)
            if idle_s:
                fit = [name for name in turned if left.get(name, 0.0) <= idle_s]
            else:
                least_s = needs_s if waited_s < _ANY_S else min(needs_s, 0.3)
                fit = [name for name in turned if left.get(name, -1.0) >= least_s]
            if waited_s > _FIND_S:
                fit += turned
            for name in fit if waited_s > _PREFER_S else [each for each in fit if each == turned[0]]:
                lock = self._locks.setdefault(name, threading.Lock())
                if lock.acquire(blocking=False):
                    shot.target = name
                    try:
                        yield name
                    finally:
                        lock.release()
                    return
            time.sleep(0.1)

    def _a_worker(self, shot: Shot) -> contextlib.AbstractContextManager[str]:
        names = {self._node(name): name for name in SERVED}
        return self._hold(shot, list(SERVED), lambda run: names[run.node])

    def _a_server(self, shot: Shot, *, idle_s: float = 0.0) -> contextlib.AbstractContextManager[str]:
        return self._hold(shot, SERVERS, lambda run: run.server or "", idle_s=idle_s)

    def _node(self, name: str) -> str:
        return f"{self.cluster._full_name(name)}@test"

    def worker_named(self, child: str) -> str:
        """The short name of the worker of a child ``node:pid``; empty if it is none."""
        return next((name for name in SERVED if child.startswith(f"{self._node(name)}:")), "")

    @contextlib.contextmanager
    def _away(self, name: str) -> Iterator[None]:
        """Note that no process of this worker does its work meanwhile."""
        spans = self.down[name]
        spans.append((time.time(), float("inf")))
        try:
            yield
        finally:
            spans[-1] = (spans[-1][0], time.time() + 1.0)

    # -- workers

    def _signal_child(self, shot: Shot, number: signal.Signals) -> None:
        with self._a_worker(shot) as name:
            node = self._node(name)
            shot.hits = self._find(lambda run: run.node == node)[:1]
            shot.fired_at = time.time()
            for run in shot.hits:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(run.pid, number)

    def _freeze_child(self, shot: Shot) -> None:
        with self._a_worker(shot) as name:
            node = self._node(name)
            shot.hits = self._find(lambda run: run.node == node)[:1]
            shot.fired_at = time.time()
            for run in shot.hits:
                with contextlib.suppress(ProcessLookupError):
                    self._freeze(lambda number, pid=run.pid: os.kill(pid, number))  # type: ignore[misc]  # bound now
                    time.sleep(shot.fault.length_s)
                    os.kill(run.pid, signal.SIGCONT)
            shot.back_at = time.time()

    def _kill_worker(self, shot: Shot) -> None:
        with self._a_worker(shot) as name:
            node, worker = self._node(name), self.cluster.worker(name)
            shot.hits = self._find(lambda run: run.node == node)
            with self._away(name):
                shot.fired_at = time.time()
                worker.kill()
                time.sleep(shot.fault.length_s)
                self._start_worker(name)
            shot.back_at = time.time()

    def _freeze_worker(self, shot: Shot) -> None:
        with self._a_worker(shot) as name:
            node, worker = self._node(name), self.cluster.worker(name)
            shot.hits = self._find(lambda run: run.node == node)
            with self._away(name):
                shot.fired_at = time.time()
                everything = shot.fault.kind == "worker frozen"
                self._freeze(lambda number: (os.killpg if everything else os.kill)(worker.pid, number))
                time.sleep(shot.fault.length_s)
                worker.thaw()
            shot.back_at = time.time()

    def _freeze(self, send: Callable[[signal.Signals], None]) -> None:
        """
        SIGSTOP; on SQLite not in the middle of a write.

        There a process that is frozen while it writes keeps the one write lock of the file, and all
        the others wait for it: that is SQLite's nature, and documented.
        """
        send(signal.SIGSTOP)
        while self.postgres is None and not self._can_write():
            send(signal.SIGCONT)
            time.sleep(0.05)
            send(signal.SIGSTOP)

    def _can_write(self) -> bool:
        try:
            with self.ledger.engine.begin() as connection:
                connection.exec_driver_sql("PRAGMA user_version")
        except sa.exc.OperationalError:
            return False
        return True

    def _deploy(self, shot: Shot) -> None:
        shot.target = "all"
        with self._alone("deploy"):  # two at once would leave nobody who works
            self._deploy_all(shot)

    def _deploy_all(self, shot: Shot) -> None:
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

    # -- ComfyUI servers

    def _kill_server(self, shot: Shot) -> None:
        with self._a_server(shot) as name:
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            self._restart_server(shot, name)

    def _restart_server(self, shot: Shot, name: str) -> None:
        """End it, if it lives, and start it again when its time has come."""
        server = self.cluster.simulators[name]
        self.deaths[name].append(time.time())
        self.gone[name].append((time.time(), float("inf")))
        server.kill()
        with self._refusing(*(self.roads[road] for road in self._roads_to(name))):
            time.sleep(shot.fault.length_s)
            _start_again(server)
        shot.back_at = time.time()
        self.gone[name][-1] = (self.gone[name][-1][0], shot.back_at)

    def _crash_server(self, shot: Shot) -> None:
        with self._a_server(shot, idle_s=_SOON_S) as name:
            server = self.cluster.simulators[name]
            step = ("submitted", "started", "node", "finished")[shot.fault.target % 4]
            self._set_faults(name, exit_at=step)
            ends, fed_at = time.monotonic() + _FIND_S, time.monotonic()
            while server.alive() and time.monotonic() < ends:
                fed_at = self._feed(fed_at, 1.0)
                time.sleep(0.02)
            shot.fired_at = time.time()
            if server.alive():
                self._set_faults(name, exit_at="")
            if not server.alive():
                shot.hits = [run for run in self.running() if run.server == name and run.prompt_id]
                self._restart_server(shot, name)

    def _freeze_server(self, shot: Shot) -> None:
        with self._a_server(shot) as name:
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            self.silences[name].append((shot.fired_at, float("inf")))
            self.cluster.simulators[name].freeze()
            time.sleep(shot.fault.length_s)
            self.cluster.simulators[name].thaw()
            shot.back_at = time.time()
            self.silences[name][-1] = (shot.fired_at, shot.back_at)

    def _stall_server(self, shot: Shot) -> None:
        dies = shot.fault.kind == "comfy zombie"
        with self._a_server(shot, idle_s=_SOON_S if dies else 0.0) as name:
            began = time.time()
            if dies:  # the next prompt is the one that kills it
                self._set_faults(name, zombie=True)
                self._wait_for_event(name, "worker_died", began)
                self._set_faults(name, zombie=False)
                if not self._has_event(name, "worker_died", began):
                    return
                shot.hits = [run for run in self.running() if run.server == name and run.prompt_id]
            else:
                shot.hits = self._find(lambda run: run.server == name)
                self._set_faults(name, stall=True)
            shot.fired_at = time.time()
            self.stalls[name].append((began, float("inf")))
            time.sleep(self.stall_s + shot.fault.length_s)
            if dies:
                self._restart_server(shot, name)
            else:
                self._set_faults(name, stall=False)
                shot.back_at = time.time()
            self.stalls[name][-1] = (began, time.time())

    def _spoil_prompt(self, shot: Shot, switch: str, on: object, off: object) -> None:
        """One prompt that comes next goes wrong on its server."""
        with self._a_server(shot, idle_s=_SOON_S) as name:
            self._set_faults(name, **{switch: on})
            ends, fed_at = time.monotonic() + _FIND_S, time.monotonic()
            while time.monotonic() < ends and self._fault(name, switch) not in {off, None}:
                fed_at = self._feed(fed_at, 1.0)
                time.sleep(0.05)
            shot.fired_at = time.time()
            if self._fault(name, switch) == off:
                shot.hits = [run for run in self.running() if run.server == name and run.prompt_id]
            self._set_faults(name, **{switch: off})

    def _break_sockets(self, shot: Shot) -> None:
        with self._a_server(shot) as name:
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            if shot.fault.kind == "sockets cut":
                self._set_faults(name, drop_sockets=True)
                return
            self._set_faults(name, mute_sockets=True)
            time.sleep(shot.fault.length_s + 3)
            self._set_faults(name, mute_sockets=False)
            shot.back_at = time.time()

    def _wait_for_event(self, name: str, event: str, since: float) -> None:
        ends, fed_at = time.monotonic() + _FIND_S, time.monotonic()
        while time.monotonic() < ends and not self._has_event(name, event, since):
            fed_at = self._feed(fed_at, 1.0)
            time.sleep(0.2)

    def _has_event(self, name: str, event: str, since: float) -> bool:
        return any(each["event"] == event and each["t"] >= since for each in self.cluster.executions(name))

    def _fault(self, name: str, switch: str) -> object:
        """A simulator's switch as it is now; ``None`` while it cannot be asked."""
        with contextlib.suppress(requests.RequestException):
            answer: dict[str, object] = requests.get(self._faults_url(name), timeout=5).json()
            return answer[switch]
        return None

    def _set_faults(self, name: str, **faults: object) -> None:
        with contextlib.suppress(requests.RequestException):
            requests.post(self._faults_url(name), json=faults, timeout=5)

    def _faults_url(self, name: str) -> str:
        return f"{self.cluster.simulators[name].url}/simulator/faults"

    # -- the network to them

    def _cut_network(self, shot: Shot) -> None:
        with self._a_server(shot) as name:
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            for _ in range(3):
                for road in self._roads_to(name):
                    self.roads[road].cut()
                time.sleep(shot.fault.length_s / 5)

    def _stall_network(self, shot: Shot) -> None:
        with self._a_server(shot) as name:
            found = self._find(lambda run: run.server == name)
            first = self.worker_named(found[0].worker) if found else next(iter(self._roads_to(name)))[0]
            shot.hits = [run for run in found if self.worker_named(run.worker) == first]
            shot.fired_at = time.time()
            with self._blocked([(first, name)], refused=False):
                time.sleep(shot.fault.length_s)
            shot.back_at = time.time()

    def _refuse_network(self, shot: Shot) -> None:
        with self._a_server(shot) as name:
            shot.hits = self._find(lambda run: run.server == name)
            shot.fired_at = time.time()
            with self._blocked(self._roads_to(name), refused=True):
                time.sleep(shot.fault.length_s)
            shot.back_at = time.time()

    def _halve_network(self, shot: Shot) -> None:
        with self._hold(shot, [SHARED], lambda run: str(run.server)) as name:
            found = self._find(lambda run: run.server == name)
            first = self.worker_named(found[0].worker) if found else self._roads_to(name)[0][0]
            shot.hits = [run for run in found if self.worker_named(run.worker) == first]
            shot.fired_at = time.time()
            with self._blocked([(first, name)], refused=True):
                time.sleep(shot.fault.length_s)
            shot.back_at = time.time()

    def _roads_to(self, server: str) -> list[tuple[str, str]]:
        return [road for road in self.roads if road[1] == server]

    @contextlib.contextmanager
    def _blocked(self, roads: Sequence[tuple[str, str]], *, refused: bool) -> Iterator[None]:
        blocks = [Block(time.time(), float("inf"), refused) for _ in roads]
        for road, block in zip(roads, blocks, strict=True):
            self.blocks[road].append(block)
            self.roads[road].set_mode("refuse" if refused else "blackhole")
        try:
            yield
        finally:
            for road, block in zip(roads, blocks, strict=True):
                self.roads[road].set_mode("pass")
                block.end = time.time()

    # -- API, sweeper, broker, database, storage

    @contextlib.contextmanager
    def _refusing(self, *proxies: FaultProxy) -> Iterator[None]:
        """A proxy before a dead process must look like one: nobody listens."""
        for proxy in proxies:
            proxy.set_mode("refuse")
        try:
            yield
        finally:
            for proxy in proxies:
                proxy.set_mode("pass")

    def _kill(self, shot: Shot, part: str, service: Service | None, *, group: bool = False) -> None:
        assert service is not None
        proxies = {"api": [self.front], "valkey": [self.proxy]}.get(part, [])
        with self._alone(part):
            shot.hits = self._find()
            shot.fired_at = time.time()
            if group:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(service.pid, signal.SIGKILL)
            else:
                service.kill()
            with self._refusing(*proxies):
                time.sleep(shot.fault.length_s)
                _start_again(service)
            shot.back_at = time.time()

    def _lose_answers(self, shot: Shot) -> None:
        with self._alone("api"):
            before = self.front.accepted
            runs = self._find()
            shot.fired_at = time.time()
            self.front.set_mode("lose")
            ends = time.monotonic() + _FIND_S
            while time.monotonic() < ends and self.front.accepted == before:
                time.sleep(0.05)
            time.sleep(shot.fault.length_s / 2)
            self.front.set_mode("pass")
            shot.back_at = time.time()
            shot.hits = runs if self.front.accepted > before else []

    def _wipe_valkey(self, shot: Shot) -> None:
        with self._alone("valkey"):
            shot.hits = self._find()
            with redis.Redis.from_url(self.valkey.url, socket_timeout=5) as client:
                client.flushall()
            shot.fired_at = shot.back_at = time.time()

    def _break_valkey(self, shot: Shot) -> None:
        with self._alone("valkey"):
            shot.hits = self._find()
            shot.fired_at = time.time()
            self.proxy.set_mode("blackhole" if shot.fault.kind == "valkey silent" else "refuse")
            time.sleep(shot.fault.length_s)
            self.proxy.set_mode("pass")
            shot.back_at = time.time()

    def _flood_runway(self, shot: Shot) -> None:
        """What other programs, and bugs, may put into the queue: none of it may end a worker or lose a task."""
        with self._alone("valkey"):
            shot.hits = self._find()
            shot.fired_at = time.time()
            rng = random.Random(shot.fault.target)
            names = [task_name("comfyui"), "shop.send_invoice"]
            messages = [
                Message(str(uuid.UUID(int=rng.getrandbits(128), version=4)), rng.choice(names), COMFY, 0)
                for _ in range(_FLOOD)
            ]
            self._publish(messages)
            with redis.Redis.from_url(self.valkey.url, socket_timeout=5) as client:
                client.lpush(COMFY, "garbage", "[]", "{}", '{"headers": 3}', b"\xff\xfe", '{"body": "x"}')

    def _double_messages(self, shot: Shot) -> None:
        with self._alone("valkey"):
            shot.hits = self._find()
            shot.fired_at = time.time()
            query = sa.select(t.tasks.c.id).where(t.tasks.c.completed_at.is_(None))
            with self.ledger.engine.connect() as connection:
                ids = [str(row) for row in connection.execute(query).scalars()]
            name = task_name("comfyui")
            self._publish([Message(each, name, COMFY, step) for each in ids for step in PRIORITY_STEPS[:3]])

    def _publish(self, messages: list[Message]) -> None:
        producer = Producer(Settings.build(redis_url=self.valkey.url))
        with contextlib.closing(producer), contextlib.suppress(BrokerUnavailable):
            producer.publish(messages)

    def _crash_postgres(self, shot: Shot) -> None:
        assert self.postgres is not None
        with self._alone("postgres"):
            shot.hits = self._find()
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

    def _break_storage(self, shot: Shot) -> None:
        """A file stands where the folder was: no permission is asked, so it fails for root too."""
        folder = self.cluster.settings.assets_dir
        away = folder.with_name("assets-away")
        with self._alone("storage"):
            shot.hits = self._find() if folder.exists() else []
            shot.fired_at = time.time()
            if not shot.hits:
                return
            folder.rename(away)
            folder.touch()
            time.sleep(shot.fault.length_s)
            folder.unlink()
            away.rename(folder)
            shot.back_at = time.time()

    def mend(self) -> None:
        """Whatever is still broken after the last fault."""
        for proxy in (self.proxy, self.front, *self.roads.values()):
            if proxy.mode != "pass":
                proxy.set_mode("pass")
        parts: list[Any] = [self.valkey, self.postgres, self.cluster.api, self.sweeper]
        for part in [*parts, *self.cluster.simulators.values()]:
            if part is not None and not part.alive():
                _start_again(part)
        for name in SERVERS:
            self._set_faults(
                name, mute_sockets=False, stall=False, zombie=False, lose_answers_next=0,
                lose_prompt_next=0, fail_next="", exit_at="",
            )  # fmt: skip
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
