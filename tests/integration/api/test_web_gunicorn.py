"""The API as it is served: gunicorn's own processes, sockets and signals."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genpulse.ledger import Ledger
from genpulse.testing.services import free_port

TASK = json.dumps({"task_type": "image-convert", "params": {}})


class Server:
    """One ``gunicorn`` with one worker process."""

    def __init__(self, port: int, log: Path, environment: dict[str, str]) -> None:
        self.port = port
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "gunicorn", "--config", "python:genpulse.web.gunicorn_conf",
                    "genpulse.web:create_app()",
                ],
                env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(
                method, path, body, {name.replace("_", "-"): text for name, text in headers.items()}
            )
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.headers.items()},
                answer.read(),
            )
        finally:
            connection.close()

    def wait_until_ready(self) -> None:
        """Until ``/ready`` says 200."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.ask("GET", "/ready")[0] == 200:
                    return
            except OSError:
                time.sleep(0.05)
        pytest.fail(f"not ready: {self.log.read_text()}")


@pytest.fixture
def server(ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Server]:
    """A running server on a real ledger and broker."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GENPULSE_")} | {
        "GENPULSE_DATABASE_URL": ledger_url,
        "GENPULSE_REDIS_URL": valkey_url,
        "GENPULSE_DATA_DIR": str(tmp_path / "data"),
        "GENPULSE_PORT": str(port),
        "GENPULSE_API_WORKERS": "1",
        "GENPULSE_API_THREADS": "8",
        "GENPULSE_MAX_BODY_BYTES": "65536",
        "GENPULSE_MAX_UPLOAD_BYTES": "1048576",
    }
    running = Server(port, tmp_path / "gunicorn.log", environment)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        try:
            running.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
            raise


def test_a_submission_wakes_the_relay_of_its_own_process(
    server: Server, ledger_url: str, valkey_url: str
) -> None:
    """Upload, submit, and the message is in Redis though nobody swept."""
    import redis

    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n\x89PNG\r\n\x1a\n\r\n--b--\r\n'
    status, _, asset = server.ask(
        "POST", "/storage/upload", form, Content_Type="multipart/form-data; boundary=b"
    )
    assert status == 201, asset
    ledger = Ledger.connect(ledger_url)
    types = json.loads(server.ask("GET", "/task-types")[2])["task_types"]
    assert "image-convert" in [found["task_type"] for found in types]
    ledger.close()
    with redis.Redis.from_url(valkey_url) as client:
        task = {
            "task_type": "image-convert",
            "params": {"source": f"asset:{json.loads(asset)['id']}", "format": "png"},
        }

        status, headers, body = server.ask("POST", "/task", json.dumps(task), Content_Type="application/json")

        assert status == 202, body
        assert headers["location"].startswith(f"http://127.0.0.1:{server.port}/task/")
        deadline = time.monotonic() + 5
        while not client.llen("cpu\x06\x163") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.llen("cpu\x06\x163") == 1


def test_a_chunked_body_is_bounded_too(server: Server) -> None:
    """No length is told, so the limit has to hold while reading; and no beginning is taken for the whole."""
    small = iter([TASK.encode()[:10], TASK.encode()[10:]])
    exact = iter([TASK.encode(), b" " * (65_536 - len(TASK))])
    above = iter([TASK.encode(), b" " * (65_537 - len(TASK))])
    endless = (b"x" * 16_384 for _ in range(64))

    taken = server.ask("POST", "/task", small, Content_Type="application/json")
    refused = server.ask("POST", "/task", endless, Content_Type="application/json")

    assert taken[0] == 422, taken  # it was read: the params lack a source
    assert (refused[0], json.loads(refused[2])["code"]) == (413, "too_large")
    assert server.ask("POST", "/task", exact, Content_Type="application/json")[0] == 422
    assert server.ask("POST", "/task", above, Content_Type="application/json")[0] == 413
    assert server.ask("GET", "/health")[0] == 200


def test_a_chunked_upload_is_taken_and_bounded(server: Server) -> None:
    """Files of unknown length are streamed; above the limit they are refused on the way."""

    def form(megabytes: int) -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(megabytes * 16):
            yield b"\0" * 65_536
        yield b"\r\n--b--\r\n"

    taken = server.ask("POST", "/storage/upload", form(1), Content_Type="multipart/form-data; boundary=b")
    refused = server.ask("POST", "/storage/upload", form(3), Content_Type="multipart/form-data; boundary=b")

    assert taken[0] == 201, taken
    assert refused[0] == 413


def test_a_caller_that_goes_away_disturbs_nobody(server: Server) -> None:
    """Half a body and a closed socket: no row, no 500 in the log."""
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(
                b"POST /task HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b'Content-Length: 500\r\n\r\n{"task_type"'
            )

    assert server.ask("GET", "/health")[0] == 200
    assert json.loads(server.ask("GET", "/task")[2])["tasks"] == []
    assert "request_failed" not in server.log.read_text()


def test_sigterm_ends_the_server_within_seconds(server: Server) -> None:
    """Idle keep-alive connections and the background threads hold nothing up."""
    idle = http.client.HTTPConnection("127.0.0.1", server.port)
    idle.request("GET", "/health")
    idle.getresponse().read()
    begun = time.monotonic()

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(15) == 0, server.log.read_text()
    assert time.monotonic() - begun < 8
    assert "Traceback" not in server.log.read_text()
    idle.close()
