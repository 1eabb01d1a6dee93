"""``genpulse start-all`` from outside: who is started again, who is stopped, what stays."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from genpulse.client import Client
from genpulse.testing.demo import CORE_WORKFLOW
from genpulse.testing.embedded import running_url
from genpulse.testing.services import free_port
from tests.support.stacks import StackProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
BODY = {"task_type": "comfyui", "params": {"workflow": CORE_WORKFLOW}}

# ComfyUI's command line as start-all uses it, with the simulator behind it.
STAND_IN_MAIN = """
import json, runpy, sys
from pathlib import Path
folder = Path(__file__).parent
(folder / "arguments.json").write_text(json.dumps(sys.argv))
port = sys.argv[sys.argv.index("--port") + 1]
sys.argv[1:] = ["--port", port, "--data-dir", str(folder / "files")]
runpy.run_module("genpulse.testing.simulator", run_name="__main__")
"""


@pytest.fixture(scope="module")
def taken() -> Iterator[dict[str, int]]:
    """The usual ports, in somebody else's hands."""
    with socket.socket() as api, socket.socket() as flower:
        ports = {}
        for name, holder, wanted in (("api", api, 8000), ("flower", flower, 5555)):
            try:
                holder.bind(("127.0.0.1", wanted))
                holder.listen()
            except OSError:
                pass  # somebody outside of this test has it: as good
            ports[name] = wanted
        yield ports


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, taken: dict[str, int]) -> Iterator[StackProcess]:
    """A start-all that found its usual ports taken."""
    del taken
    with StackProcess(tmp_path_factory.mktemp("start-all")) as process:
        process.wait_up()
        yield process


def test_taken_ports_are_told_and_replaced(stack: StackProcess) -> None:
    """It says which port is taken, which one it took, and which option chooses."""
    said = stack.said()

    assert "port 8000 is taken, so API gets" in said
    assert "(--port chooses another one)" in said
    assert "--flower-port" in said
    assert requests.get(f"{stack.wait_up()}/health", timeout=10).status_code == 200


def test_a_second_stack_on_the_same_data_is_refused(stack: StackProcess) -> None:
    """Two stacks would share a broker's file; the message names the one that runs."""
    began = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-m", "genpulse", "start-all", "--data-dir", str(stack.data_dir)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert second.returncode == 1
    assert "another start-all or demo runs" in second.stderr
    assert stack.wait_up() in second.stderr
    assert time.monotonic() - began < 20


def test_submit_finds_the_running_stack(stack: StackProcess) -> None:
    """In the folder where start-all runs no URL is needed, whatever port it got."""
    assert running_url(stack.data_dir) == stack.wait_up()
    (stack.folder / "workflow.json").write_text(json.dumps(CORE_WORKFLOW))

    done = subprocess.run(
        [sys.executable, "-m", "genpulse", "submit", "workflow.json", "-o", "pictures", "--timeout", "90"],
        cwd=stack.folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert (stack.folder / done.stdout.strip()).is_file()


def test_a_killed_worker_is_started_again(stack: StackProcess) -> None:
    """Kill -9 of the worker costs a moment; the next task completes on the new one."""
    worker = stack.part("worker -Q comfy ")
    worker.kill()

    stack.wait_for(r"worker ended \(signal 9\); starting it again")

    with Client(stack.wait_up()) as client:
        task = client.follow(client.submit(BODY)["task_id"], timeout_s=120)
    assert task["status"] == "completed"
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.parametrize(("name", "text"), [("valkey", "valkey-server"), ("api", "gunicorn")])
def test_killed_services_are_started_again(stack: StackProcess, name: str, text: str) -> None:
    """Valkey and API come back at the same place after kill -9, and the next task completes."""
    stack.part(text).kill()

    stack.wait_for(rf"{name} is back")

    with Client(stack.wait_up()) as client:
        task = client.follow(client.submit(BODY)["task_id"], timeout_s=120)
    assert task["status"] == "completed"


def test_flower_asks_for_a_password(stack: StackProcess) -> None:
    """Its password lies in a file that only this user can read."""
    url = stack.wait_for(r"flower: (http://\S+)")[1]
    file = stack.data_dir / "flower-password"
    user, _, password = file.read_text().strip().partition(":")
    ends = time.monotonic() + 60
    while True:
        try:
            refused = requests.get(url, timeout=10).status_code
            break
        except requests.ConnectionError:
            assert time.monotonic() < ends
            time.sleep(0.2)

    assert refused == 401
    assert requests.get(url, auth=(user, password), timeout=10).status_code == 200
    assert file.stat().st_mode & 0o077 == 0


def test_valkey_asks_for_a_password(stack: StackProcess) -> None:
    """Whoever can write to the broker can run tasks, so it is not open to the whole machine."""
    url = stack.wait_for(r"valkey: (redis://\S+)")[1]
    port = int(url.rpartition(":")[2].partition("/")[0])

    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(64).startswith(b"-NOAUTH")


def test_a_killed_stack_leaves_no_orphan_and_loses_no_task(tmp_path: Path) -> None:
    """Kill -9 of start-all takes everything along; the next one goes on with the same tasks, and Ctrl-C ends it."""
    options = ("--port", str(free_port()), "--no-flower")
    with StackProcess(tmp_path, *options) as first:
        with Client(first.wait_up()) as client:
            done = client.follow(client.submit(BODY)["task_id"], timeout_s=120)["task_id"]
            slow = client.submit(BODY | {"metadata": {"n": "2"}})["task_id"]
        first.end(signal.SIGKILL)

        with StackProcess(tmp_path, *options) as second:  # at once: it waits for the ports itself
            url = second.wait_up()
            assert first.survivors(20) == []
            with Client(url) as client:
                assert client.task(done)["status"] == "completed"
                assert client.follow(slow, timeout_s=120)["status"] == "completed"
            assert url == f"http://127.0.0.1:{options[1]}"
            began = time.monotonic()
            assert second.end(signal.SIGINT) == 0
            assert time.monotonic() - began < 25  # about 3 s on a quiet machine
            assert second.survivors(0) == []
    assert running_url(tmp_path / "data") is None


def test_a_comfyui_beside_it_is_launched(tmp_path: Path) -> None:
    """With libs/comfyui/main.py there is no simulator: it is started with its own interpreter's arguments."""
    comfy = tmp_path / "libs" / "comfyui"
    comfy.mkdir(parents=True)
    (comfy / "main.py").write_text(STAND_IN_MAIN)

    with StackProcess(
        tmp_path, "--no-flower", "--comfy-args", "--cpu", "--port", str(free_port())
    ) as process:
        with Client(process.wait_up()) as client:
            task = client.follow(client.submit(BODY)["task_id"], timeout_s=120)
        said = process.said()

        assert process.end(signal.SIGTERM) == 0
        assert process.survivors(0) == []
    assert task["status"] == "completed"
    assert "comfyui libs/comfyui" in said
    assert "SIMULATED" not in said
    assert "--cpu" in json.loads((comfy / "arguments.json").read_text())


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    """Whoever changes their mind early gets 130 and no processes."""
    with StackProcess(tmp_path, "--no-flower", "--port", str(free_port())) as process:
        ends = time.monotonic() + 60
        while len(process.descendants()) < 2 and time.monotonic() < ends:
            time.sleep(0.02)

        assert process.end(signal.SIGINT) == 130
        assert process.survivors(0) == []
