"""Each service's very command line of docker-compose.yml, run against local services instead of containers."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from genpulse.client import Client
from genpulse.testing.demo import COLOR, CORE_WORKFLOW, check_picture
from genpulse.testing.services import (
    Postgres,
    Service,
    answers_http,
    find_valkey,
    free_port,
    start_python,
    start_s3,
    start_simulator,
)
from tests.support.compose import read_compose

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
KEY = "a-key-of-the-test"


class Deployment:
    """The services of the file as local processes; what a container would give them is put in."""

    def __init__(self, folder: Path, postgres: Postgres, stack: ExitStack) -> None:
        self.folder = folder
        self.ports = {"api": free_port(), "flower": free_port(), "valkey": free_port()}
        self.s3 = stack.enter_context(start_s3(folder / "s3", bucket="somebody-elses"))
        self.comfy = stack.enter_context(start_simulator(folder / "comfyui"))
        self.compose = read_compose(
            {
                "GENPULSE_API_KEY": KEY,
                "GENPULSE_FLOWER_BASIC_AUTH": "ops:of-the-test",
                "GENPULSE_COMFY_URLS": f"gpu1={self.comfy.url}",
                "POSTGRES_PASSWORD": "unused",
                "VALKEY_PASSWORD": "vk-of-the-test",
                "S3_ACCESS_KEY": self.s3.credentials.access_key_id,
                "S3_SECRET_KEY": self.s3.credentials.secret_access_key,
            }
        )
        self.here = {
            "GENPULSE_DATABASE_URL": postgres.create_database(),
            "GENPULSE_REDIS_URL": f"redis://:vk-of-the-test@127.0.0.1:{self.ports['valkey']}/0",
            "GENPULSE_S3_ENDPOINT_URL": self.s3.url,
            "GENPULSE_DATA_DIR": str(folder / "data"),
        }
        self.valkey = stack.enter_context(self._valkey())
        self.migrated = subprocess.run(
            self.command("migrate"),
            cwd=folder,
            env=self.environment("migrate"),
            capture_output=True,
            text=True,
        )
        self.api = self.start(stack, "api", "GENPULSE_PORT", "/ready")
        self.worker = self.start(stack, "worker")
        self.worker_cpu = self.start(stack, "worker-cpu")
        self.flower = self.start(stack, "flower", "GENPULSE_FLOWER_PORT", "/flower/healthcheck")

    def command(self, name: str) -> list[str]:
        """The image's entry point, ``genpulse``, with the service's arguments."""
        arguments = [
            part.replace("/data/", f"{self.folder}/") for part in self.compose["services"][name]["command"]
        ]
        return [sys.executable, "-m", "genpulse", *arguments]

    def environment(self, name: str, **more: str) -> dict[str, str]:
        """The service's environment, with local addresses in place of the network's names."""
        given: Mapping[str, Any] = self.compose["services"][name]["environment"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GENPULSE_")}
        return clean | {key: str(value) for key, value in given.items()} | self.here | more

    def start(self, stack: ExitStack, name: str, port_setting: str = "", path: str = "") -> Service:
        """Start one service under its own command line."""
        port = self.ports.get(name, 0)
        more = {port_setting: str(port)} if port_setting else {}
        url = f"http://127.0.0.1:{port}"
        removed: dict[str, str | None] = {key: None for key in os.environ if key.startswith("GENPULSE_")}
        return stack.enter_context(
            start_python(
                self.command(name)[1:],
                self.folder,
                name=name,
                url=url if port else "",
                probe=answers_http(url + path) if port else None,
                env=removed | self.environment(name, **more),
                ready_s=90,
            )
        )

    def check_health(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run the service's own health check as its container would."""
        kind, *test = self.compose["services"][name]["healthcheck"]["test"]
        line = test[0] if kind == "CMD-SHELL" else shlex.join(test)
        for inside, service in ((":8000/", "api"), (":5555/", "flower")):
            line = line.replace(inside, f":{self.ports[service]}/")
        scripts = str(Path(sys.executable).parent)
        more = {"HOSTNAME": socket.gethostname(), "PATH": f"{scripts}:{os.environ['PATH']}"}
        return subprocess.run(
            ["sh", "-c", line], cwd=self.folder, env=self.environment(name, **more),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def _valkey(self) -> Service:
        program, *arguments = self.compose["services"]["valkey"]["command"]
        assert program == "valkey-server"
        port = self.ports["valkey"]
        folder = self.folder / "valkey"
        folder.mkdir()
        place = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]

        def accepts() -> None:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()

        return Service("valkey", [find_valkey(), *arguments, *place], folder, probe=accepts)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Deployment]:
    """Everything that the file starts, started."""
    with ExitStack() as stack:
        yield Deployment(tmp_path_factory.mktemp("compose"), postgres, stack)


def test_the_job_makes_tables_and_bucket(deployment: Deployment) -> None:
    """After ``migrate`` there are tables in PostgreSQL and there is a bucket in the object store."""
    assert deployment.migrated.returncode == 0, deployment.migrated.stderr
    assert "made the bucket genpulse" in deployment.migrated.stderr
    assert (deployment.s3.root / "genpulse").is_dir()


def test_the_api_asks_for_its_key(deployment: Deployment) -> None:
    """What is published beyond the machine is open to key holders only."""
    answer = requests.post(f"{deployment.api.url}/task", json={}, timeout=10)

    assert answer.status_code == 401


def test_a_workflow_goes_all_the_way(deployment: Deployment) -> None:
    """The commands fit together: API, worker, ComfyUI, PostgreSQL, Valkey and S3 make a picture."""
    with Client(deployment.api.url, KEY) as client:
        body = {"task_type": "comfyui", "params": {"workflow": CORE_WORKFLOW}}
        task = client.follow(client.submit(body)["task_id"], timeout_s=120)
        assert task["status"] == "completed", task
        path = client.download(task["outputs"][0], deployment.folder / "out")

    assert check_picture(path.read_bytes(), COLOR ^ 0xFFFFFF) == (640, 384)
    assert list((deployment.s3.root / "genpulse").iterdir())


@pytest.mark.parametrize("name", ["api", "worker", "worker-cpu", "flower"])
def test_health_checks_are_true_of_a_healthy_service(deployment: Deployment, name: str) -> None:
    """The check of each service succeeds while it runs (and says so within its start period's patience)."""
    ends = time.monotonic() + 90
    while (found := deployment.check_health(name)).returncode != 0 and time.monotonic() < ends:
        time.sleep(1)

    assert found.returncode == 0, found.stdout + found.stderr


def test_flower_asks_for_its_password(deployment: Deployment) -> None:
    """Without the password there is nothing to see."""
    url = f"{deployment.flower.url}/flower/"

    assert requests.get(url, timeout=10).status_code == 401
    assert requests.get(url, auth=("ops", "of-the-test"), timeout=10).status_code == 200
