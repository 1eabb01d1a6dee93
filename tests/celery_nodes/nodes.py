"""
pytest-celery's nodes as local processes, for machines without a Docker engine.

Its nodes, clusters and setups speak only to a ``pytest_docker_tools`` container, and that one only
to a docker-py ``Container``. :class:`LocalContainer` is the part of the latter that they use, on a
:class:`genpulse.testing.services.Service`, so that everything above it is pytest-celery's own.
"""

from __future__ import annotations

import os
import signal as signals
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_celery import CeleryWorkerContainer, RedisContainer

from genpulse.testing.services import Service, start_process

__all__ = ["GenPulseWorker", "LocalContainer", "Valkey", "children"]


class LocalContainer:
    """What pytest-celery uses of docker-py's ``Container``, on a service."""

    def __init__(
        self, service: Service, *, inner_port: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        self.service = service
        self.id = uuid.uuid4().hex
        self.name = service.name
        ports = {inner_port: [{"HostPort": str(service.port)}]} if inner_port else {}
        self.attrs: dict[str, Any] = {
            "Config": {
                "Hostname": f"127.0.0.1:{service.port}" if service.port else socket.gethostname(),
                "Env": [f"{key}={value}" for key, value in (env or {}).items()],
            },
            "NetworkSettings": {"Networks": {"local": {"IPAddress": "127.0.0.1"}}, "Ports": ports},
            "HostConfig": {"PortBindings": {}},
        }

    @property
    def status(self) -> str:
        """Docker's word for it."""
        return "running" if self.service.alive() else "exited"

    def reload(self) -> None:
        """Docker's state is asked for anew; ours is never old."""

    def logs(self, **_: Any) -> bytes:
        """What it printed."""
        return self.service.log_text().encode()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send *signal* to the process itself."""
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal)
        if number == signals.SIGKILL:
            self.service.kill()
        elif self.service.alive():
            os.kill(self.service.pid, number)

    def stop(self, timeout: int = 10) -> None:
        """End it and everything it started."""
        self.service.stop(keep=True)

    def restart(self, timeout: int = 10) -> None:
        """End what is left of it and start it again, with the same command and data."""
        self.service.restart()

    def remove(self, **_: Any) -> None:
        """End it for good."""
        self.service.stop()


class _OnLoopback:
    """The two places where pytest-celery's classes believe in Docker's network."""

    def get_addr(self, port: str) -> tuple[str, int]:
        return "127.0.0.1", self._container.service.port  # type: ignore[attr-defined]  # our own container's field

    def get_open_tcp_ports(self) -> list[str]:
        return [name.partition("/")[0] for name in self._container.attrs["NetworkSettings"]["Ports"]]  # type: ignore[attr-defined]  # our own container's field

    @property
    def service(self) -> Service:
        """The process."""
        found: Service = self._container.service  # type: ignore[attr-defined]  # our own container's field
        return found

    def teardown(self) -> None:
        """Leave nothing behind, whatever the test did."""
        self.service.stop()


class Valkey(_OnLoopback, RedisContainer):  # type: ignore[misc]  # pytest-celery is untyped
    """pytest-celery's Redis node on the embedded Valkey."""

    @classmethod
    def of(cls, service: Service) -> Valkey:
        """Wrap a running Valkey."""
        return cls(LocalContainer(service, inner_port="6379/tcp"))

    @property
    def host_url(self) -> str:
        """The address for this process; Docker's ``localhost`` may be IPv6."""
        return self.service.url

    @property
    def ready_prompt(self) -> str | None:
        """The service was probed already."""
        return None


class GenPulseWorker(_OnLoopback, CeleryWorkerContainer):  # type: ignore[misc]  # pytest-celery is untyped
    """The product's own worker command."""

    @classmethod
    def command(cls, *args: str, **_: Any) -> list[str]:
        """What a user types on a GPU host."""
        celery = Path(sys.executable).with_name("celery")
        return [str(celery), "-A", "genpulse", "worker", "-Q", cls.worker_queue(), "-l", "INFO", *args]

    @classmethod
    def worker_queue(cls) -> str:
        """The queue of ``-Q``."""
        return "comfy"

    @classmethod
    def launch(
        cls, env: Mapping[str, str | None], directory: Path, args: Sequence[str] = ()
    ) -> GenPulseWorker:
        """Start a worker and wait until Celery says that it is ready."""
        log = directory / "worker.log"

        def ready() -> None:
            # The log goes on over a restart: what follows the last banner is this start's.
            if " ready." not in log.read_text(errors="replace").rpartition("[config]")[2]:
                raise OSError("not ready yet")

        service = start_process(
            "worker", cls.command(*args), directory, env=env, probe=ready, log=log, grace_s=20, ready_s=40
        )
        return cls(
            LocalContainer(service, env={key: value for key, value in env.items() if value is not None})
        )


def children(service: Service) -> list[int]:
    """Process ids of a worker's pool, in the order they were started."""
    try:
        text = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(pid) for pid in text.split()]
